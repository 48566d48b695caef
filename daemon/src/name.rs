//! Names of devices, snapshots and jobs. They become parts of file names and of messages, so little is allowed.

/// Longest name in bytes.
pub const MAX_BYTES: usize = 64;

/// What a name may be, for people.
pub const RULE: &str = "1 to 64 letters, digits, `-`, `_` or `.`, beginning with a letter or digit";

/// A name that breaks [`RULE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a name has {RULE}")]
pub struct BadName;

/// Gives the name back if it keeps the rule.
///
/// # Errors
/// If it does not.
pub fn check(name: &str) -> Result<&str, BadName> {
    let mut bytes = name.bytes();
    let starts_well = bytes.next().is_some_and(|first| first.is_ascii_alphanumeric());
    let goes_on_well = bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'));
    if starts_well && goes_on_well && name.len() <= MAX_BYTES { Ok(name) } else { Err(BadName) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_a_directory_or_hide() {
        for good in ["vda", "0", "a.b-c_D", &"x".repeat(64)] {
            assert_eq!(check(good), Ok(good));
        }
        for bad in ["", ".", "..", ".a", "-a", "a/b", "a b", "a\n", "ä", "a\0", &"x".repeat(65)] {
            assert_eq!(check(bad), Err(BadName), "{bad:?}");
        }
    }
}
