//! tests/run.sh, whose last line is what people and machines believe, with a cargo that only prints what it is told to.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};

/// Runs the script over what cargo is to print, and gives its status and what it says after that.
fn closing(printed: &str, status: i32) -> Result<(Option<i32>, String)> {
    let folder = tempfile::tempdir()?;
    let cargo = folder.path().join("cargo");
    std::fs::write(folder.path().join("printed"), printed)?;
    std::fs::write(&cargo, format!("#!/bin/sh\ncat '{}/printed'\nexit {status}\n", folder.path().display()))?;
    std::fs::set_permissions(&cargo, std::fs::Permissions::from_mode(0o755))?;
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH")?);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("run.sh");
    let output = Command::new(script).env("PATH", path).env("CARGO_TARGET_DIR", folder.path()).output()?;
    let said = String::from_utf8(output.stdout)?;
    let said = said.strip_prefix(printed).context("what cargo prints is shown")?;
    let (before, time) = said.trim_end().rsplit_once(" (in ").context("the time comes last")?;
    anyhow::ensure!(time.ends_with(" s)"), "{said}");
    Ok((output.status.code(), before.to_owned()))
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
