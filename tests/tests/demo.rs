//! The demo, as `make demo` runs it, with few snapshots: it verifies them itself.

use anyhow::{Result, ensure};
use snapfence_tests::backend::program;
use snapfence_tests::tools;

#[test]
fn the_demo_holds_what_it_promises() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let output = folder.path().display().to_string();
    let demo = program("snapfence-demo")?.display().to_string();
    let said = tools::run(&demo, ["--output", &output, "--snapshots", "3", "--pause-ms", "300"])?;
    println!("{said}");
    ensure!(said.contains("  ok    all 3 snapshots are one cut through time") && !said.contains("  FAIL"), "{said}");
    ensure!(said.trim_end().lines().last().is_some_and(|line| line.starts_with("Done in ")), "{said}");
    ensure!(std::fs::read_to_string(folder.path().join("stall.svg"))?.contains("<svg"), "no plot");
    Ok(())
}
