//! `snapfenced`, the storage daemon.
//!
//! Exit status: 0 after a clean end, 1 if it could not start or something is not durable, 2 wrong usage.

mod log;

use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;

use anyhow::Context as _;
use snapfenced::options::{Options, OptionsError};
use snapfenced::server;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use self::log::Log;

/// Environment variable with the filter for log lines.
const LOG_VARIABLE: &str = "SNAPFENCE_LOG";
/// Exit status of wrong usage.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let options = match Options::from_arguments(std::env::args_os()) {
        Ok(options) => options,
        Err(OptionsError::Help(text)) => {
            // A reader that has gone has had enough.
            let _ = write!(io::stdout(), "{text}");
            return ExitCode::SUCCESS;
        }
        Err(error) => return failed(&anyhow::Error::new(error), USAGE),
    };
    let filter = match log_filter() {
        Ok(filter) => filter,
        Err(error) => return failed(&error, USAGE),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_writer(Log::new(io::stderr()))
        .with_ansi(io::stderr().is_terminal())
        // It would tell of a log that cannot be written by a panic, since standard error cannot be written either.
        .log_internal_errors(false)
        .init();
    match server::run(options) {
        Ok(()) => {
            tracing::info!(event = "stopped", "everything is durable");
            ExitCode::SUCCESS
        }
        Err(error) => failed(&error, 1),
    }
}

/// The log lines that are wanted.
fn log_filter() -> anyhow::Result<EnvFilter> {
    let Some(wanted) = std::env::var_os(LOG_VARIABLE).filter(|wanted| !wanted.is_empty()) else { return Ok(EnvFilter::new("info")) };
    let wrong = || {
        let shown = wanted.display();
        format!("{LOG_VARIABLE}={shown}: expected off, error, warn, info, debug, trace or TARGET=LEVEL, several separated by commas")
    };
    let text = wanted.to_str().ok_or_else(|| anyhow::anyhow!(wrong()))?;
    // A word alone would be a target, all of whose lines are shown and nobody else's: a level misspelt would silence the log.
    let is_word = |part: &str| !part.contains(['=', '[', ':']) && part.parse::<LevelFilter>().is_err();
    if let Some(word) = text.split(',').map(str::trim).find(|part| !part.is_empty() && is_word(part)) {
        return Err(anyhow::anyhow!("'{word}' is no level").context(wrong()));
    }
    EnvFilter::builder().parse(text).with_context(wrong)
}

fn failed(error: &anyhow::Error, status: u8) -> ExitCode {
    // Nobody is left to tell if this fails.
    let line = format!("snapfenced: {}\n", snapfence::describe(error.as_ref()));
    let _ = Log::new(io::stderr()).write_all(line.as_bytes());
    ExitCode::from(status)
}
