//! `snapfence`, the command line of the storage daemon.
//!
//! Exit status: 0 done, 1 failed, 2 wrong usage.

mod arguments;
mod commands;
mod render;

use std::io::{self, ErrorKind, Write as _};
use std::process::ExitCode;

use clap::Parser as _;

use arguments::Arguments;

/// Exit status of wrong usage that only shows after parsing; the parser itself exits with the same.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match commands::run(arguments) {
        Ok(status) => status,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is left to tell if this fails.
            let _ = writeln!(io::stderr(), "snapfence: {}", snapfence::describe(error.as_ref()));
            ExitCode::from(if error.is::<commands::UsageError>() { USAGE } else { 1 })
        }
    }
}

/// Whether our reader has had enough, as `head` does.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.is::<commands::OutputError>()
        && error.chain().any(|cause| cause.downcast_ref::<io::Error>().is_some_and(|cause| cause.kind() == ErrorKind::BrokenPipe))
}
