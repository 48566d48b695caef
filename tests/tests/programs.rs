//! What is built for users holds nothing that exists for tests.

use anyhow::{Result, ensure};
use snapfence_tests::backend::program;
use snapfence_tests::tools;

/// The simulated disk is where faults are injected, the one in memory stands for files: the library has both, the programs must not.
#[test]
fn the_programs_hold_no_fault_points() -> Result<()> {
    for name in ["snapfenced", "snapfence"] {
        let path = program(name)?.display().to_string();
        let symbols = tools::run("nm", ["--demangle", &path])?;
        ensure!(symbols.contains("storage::uring"), "{name}: its symbols cannot be read");
        let found: Vec<&str> = symbols
            .lines()
            .filter(|line| ["storage::simulated", "storage::memory"].iter().any(|part| line.contains(part)))
            .take(5)
            .collect();
        ensure!(found.is_empty(), "{name}: {found:#?}");
    }
    Ok(())
}
