//! What a load does.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::Serialize;

/// A number of bytes, as fio takes it: with a suffix k, m, g or t for powers of 1,024.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is no size: expected a number of bytes, with k, m, g or t for more of them");
        let (digits, shift) = match text.char_indices().next_back().ok_or_else(wrong)? {
            (at, 'k' | 'K') => (&text[..at], 10),
            (at, 'm' | 'M') => (&text[..at], 20),
            (at, 'g' | 'G') => (&text[..at], 30),
            (at, 't' | 'T') => (&text[..at], 40),
            _ => (text, 0),
        };
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        number.checked_mul(1 << shift).map(Size).ok_or_else(wrong)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, 't'), (30, 'g'), (20, 'm'), (10, 'k')];
        match units.into_iter().find(|(shift, _)| self.0 > 0 && self.0.is_multiple_of(1 << shift)) {
            Some((shift, unit)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

/// Which requests in which order, by fio's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum Pattern {
    /// Reads from the first block to the last, again and again.
    Read,
    /// Writes in the same order.
    Write,
    /// Reads of random blocks.
    RandRead,
    /// Writes of random blocks.
    RandWrite,
    /// Reads and writes of random blocks, so many of the one as of the other.
    RandRw,
}

impl Pattern {
    /// Whether blocks are chosen at random.
    pub fn is_random(self) -> bool {
        !matches!(self, Self::Read | Self::Write)
    }
}

/// What is done to one target.
#[derive(Clone, Debug, PartialEq, Serialize, clap::Args)]
pub struct Job {
    /// Which requests
    #[arg(long, value_enum, default_value = "randread")]
    pub rw: Pattern,
    /// Bytes of each request
    #[arg(long, default_value = "4k", value_name = "BYTES")]
    pub bs: Size,
    /// Requests in flight on each queue
    #[arg(long, default_value_t = 32, value_name = "N")]
    pub iodepth: usize,
    /// Queues that are used
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub queues: usize,
    /// Requests begin at this rate, whatever becomes of them (open loop); latencies count from when they are due
    #[arg(long, value_name = "PER_SECOND")]
    pub rate_iops: Option<u64>,
    /// Seconds that are measured
    #[arg(long, default_value_t = 5.0, value_name = "SECONDS")]
    pub runtime: f64,
    /// Seconds before them
    #[arg(long, default_value_t = 0.5, value_name = "SECONDS")]
    pub ramp_time: f64,
    /// The requests stay within so many bytes from the beginning, if not on all of the device
    #[arg(long, value_name = "BYTES")]
    pub size: Option<Size>,
    /// Look for completions all the time instead of waiting to be told
    #[arg(long)]
    pub hipri: bool,
    /// For what is random
    #[arg(long, default_value_t = 1, value_name = "NUMBER")]
    pub randseed: u64,
}

impl Job {
    /// The time that is measured.
    pub fn measured(&self) -> Duration {
        Duration::from_secs_f64(self.runtime)
    }

    /// The time before it.
    pub fn ramp(&self) -> Duration {
        Duration::from_secs_f64(self.ramp_time)
    }

    /// Requests in flight at a time.
    pub fn slots(&self) -> usize {
        self.iodepth * self.queues
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written_as_fio_does() {
        for (text, bytes) in [("512", 512), ("4k", 4096), ("3M", 3 << 20), ("1g", 1 << 30), ("2t", 2 << 40), ("0", 0)] {
            assert_eq!(text.parse(), Ok(Size(bytes)));
            assert_eq!(Size(bytes).to_string(), text.to_lowercase());
        }
        for text in ["", "k", "4kb", "-1", "1.5m", "99999999999t", "\u{e4}"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }
}
