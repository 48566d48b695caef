//! Tests that this machine cannot run.
//!
//! A test that returns early counts as passed. So what it left out is said on standard error, past the harness, which keeps what a passing
//! test prints to itself; tests/run.sh counts these lines. The crates beneath this one take the file by its path.

use std::ffi::OsStr;
use std::fmt::Display;
use std::io::Write as _;

/// Says that the test of this thread, or a part of it, was left out, in a line of its own that begins with `skipped: `.
///
/// # Panics
///
/// If `CI` is set, to anything but nothing or `false`: there, everything that a test needs must be at hand.
pub fn skipped(reason: impl Display) {
    let line = line(std::thread::current().name(), &reason);
    assert!(!is_forbidden(std::env::var_os("CI").as_deref()), "nothing may be left out where CI is set: {reason}");
    // Nobody is told where standard error is closed.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

fn line(test: Option<&str>, reason: &impl Display) -> String {
    let reason = reason.to_string().replace('\n', " ");
    format!("skipped: {}: {reason}\n", test.unwrap_or("a part of a test"))
}

fn is_forbidden(ci: Option<&OsStr>) -> bool {
    ci.is_some_and(|value| !value.is_empty() && value != "false")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_one_line() {
        assert_eq!(line(Some("uring::a_test"), &"no loop device:\nnone"), "skipped: uring::a_test: no loop device: none\n");
    }

    #[test]
    fn nothing_may_be_left_out_in_ci() {
        for (value, expected) in [(None, false), (Some(""), false), (Some("false"), false), (Some("true"), true), (Some("1"), true)] {
            assert_eq!(is_forbidden(value.map(OsStr::new)), expected, "CI={value:?}");
        }
    }
}
