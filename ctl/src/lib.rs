//! The control protocol of the snapfence daemon and a client for it.

pub mod client;
pub mod protocol;

use std::error::Error;

/// An error with its causes, in one line. Some errors tell their cause themselves; it is not told twice.
pub fn describe(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let told = error.to_string();
        if !text.contains(&told) {
            text = text + ": " + &told;
        }
        cause = error.source();
    }
    text
}
