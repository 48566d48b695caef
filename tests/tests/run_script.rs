//! tests/run.sh, whose last line is what people and machines believe, with a cargo and a fuzzer that only print what they are told to.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result};

/// Makes a program that prints something and ends.
fn pretend(program: &Path, (printed, status): (&str, i32)) -> Result<()> {
    let says = program.with_extension("says");
    std::fs::write(&says, printed)?;
    std::fs::write(program, format!("#!/bin/sh\ncat '{}'\nexit {status}\n", says.display()))?;
    Ok(std::fs::set_permissions(program, std::fs::Permissions::from_mode(0o755))?)
}

/// Held while programs are written and run: a program that another thread starts meanwhile would hold the written one open, and a file that is open for
/// writing cannot be run.
static ALONE: Mutex<()> = Mutex::new(());

/// Runs the script over what cargo and the fuzzer are to print, and gives its status and what it says after that.
fn closing_with(cargo: (&str, i32), fuzzer: (&str, i32)) -> Result<(Option<i32>, String)> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir()?;
    let (bin, tests) = (folder.path().join("bin"), folder.path().join("tests"));
    std::fs::create_dir(&bin)?;
    std::fs::create_dir(&tests)?;
    pretend(&bin.join("cargo"), cargo)?;
    pretend(&tests.join("fuzz.sh"), fuzzer)?;
    let script = tests.join("run.sh");
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("run.sh"), &script)?;
    let path = format!("{}:{}", bin.display(), std::env::var("PATH")?);
    let output = Command::new(script).env("PATH", path).env("CARGO_TARGET_DIR", folder.path()).output()?;
    let said = String::from_utf8(output.stdout)?;
    let said = said.strip_prefix(cargo.0).and_then(|said| said.strip_prefix(fuzzer.0)).context("what both print is shown")?;
    let (before, time) = said.trim_end().rsplit_once(" (in ").context("the time comes last")?;
    anyhow::ensure!(time.ends_with(" s)"), "{said}");
    Ok((output.status.code(), before.to_owned()))
}

/// With a fuzzer that has nothing to do.
fn closing(printed: &str, status: i32) -> Result<(Option<i32>, String)> {
    let (status, said) = closing_with((printed, status), ("fuzz: building\n", 0))?;
    Ok((status, said.strip_suffix(", 0 inputs fuzzed").context("no inputs")?.to_owned()))
}

const PASSED: &str = "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";

#[test]
fn results_of_all_programs_are_added_up() -> Result<()> {
    assert_eq!(closing(&format!("{PASSED}{PASSED}"), 0)?, (Some(0), "6 passed, 0 failed, 2 skipped".to_owned()));
    let failed = "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured\n";
    assert_eq!(closing(&format!("{PASSED}{failed}"), 101)?, (Some(101), "4 passed, 2 failed, 1 skipped".to_owned()));
    Ok(())
}

#[test]
fn a_fuzz_target_is_a_test() -> Result<()> {
    let held = "fuzz: building\nfuzz: a: 12 executions, 2 a second\nfuzz: b_c: 30 executions, 5 a second\n";
    let expected = "5 passed, 0 failed, 1 skipped, 42 inputs fuzzed".to_owned();
    assert_eq!(closing_with((PASSED, 0), (held, 0))?, (Some(0), expected));
    let broken = "fuzz: a: 12 executions, 2 a second\nfuzz: b FAILED after 3 executions (all it said: log)\n";
    let expected = "4 passed, 1 failed, 1 skipped, 12 inputs fuzzed".to_owned();
    assert_eq!(closing_with((PASSED, 0), (broken, 1))?, (Some(1), expected));
    let expected = "3 passed, 1 failed, 1 skipped, 0 inputs fuzzed".to_owned();
    assert_eq!(closing_with((PASSED, 0), ("fuzz: building\nerror\n", 1))?, (Some(1), expected));
    Ok(())
}

#[test]
fn what_tests_leave_out_is_listed_and_counted() -> Result<()> {
    let printed = format!("test a ... skipped: a: no loop device\nok\nskipped: b: no qemu-img\ntest b ... ok\n{PASSED}");
    let expected = "Left out:\n  a: no loop device\n  b: no qemu-img\n3 passed, 0 failed, 3 skipped";
    assert_eq!(closing(&printed, 0)?, (Some(0), expected.to_owned()));
    Ok(())
}

#[test]
fn a_build_that_fails_or_a_run_of_nothing_is_a_failure() -> Result<()> {
    assert_eq!(closing("error: could not compile\n", 101)?, (Some(101), "0 passed, 1 failed".to_owned()));
    assert_eq!(closing("", 0)?.0, Some(1));
    Ok(())
}
