//! Points in time as people write them.

use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

const MICROSECONDS: u64 = 1_000_000;
const DAY_SECONDS: u64 = 86_400;

/// A point in time, UTC, to the microsecond. On the wire in the form of RFC 3339: `2026-11-23T05:52:58.123456Z`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Moment {
    microseconds: u64,
}

/// Not a point in time in the form that we write.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a time of the form 2026-11-23T05:52:58.123456Z")]
pub struct MomentError(String);

impl Moment {
    /// The last microsecond of the year 9999, the last that RFC 3339 can write.
    const LAST: u64 = 253_402_300_800 * MICROSECONDS - 1;

    /// The present by the system's clock; 1970 if that is before.
    #[must_use]
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::from_unix_microseconds(u64::try_from(since.as_micros()).unwrap_or(Self::LAST))
    }

    /// That many microseconds after the beginning of 1970; at most the end of 9999.
    #[must_use]
    pub fn from_unix_microseconds(microseconds: u64) -> Self {
        Self { microseconds: microseconds.min(Self::LAST) }
    }

    /// Microseconds since the beginning of 1970.
    #[must_use]
    pub fn unix_microseconds(self) -> u64 {
        self.microseconds
    }
}

/// Days in the years before this one since 1970.
fn days_before_year(year: u64) -> u64 {
    let before = year - 1;
    let leaps = |to: u64| to / 4 - to / 100 + to / 400;
    (year - 1970) * 365 + leaps(before) - leaps(1969)
}

fn month_days(year: u64) -> [u64; 12] {
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
}

impl fmt::Display for Moment {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, microseconds) = (self.microseconds / MICROSECONDS, self.microseconds % MICROSECONDS);
        let (days, second_of_day) = (seconds / DAY_SECONDS, seconds % DAY_SECONDS);
        // No year is shorter than 365 days, so the guess is never too low.
        let mut year = 1970 + days / 365;
        while days_before_year(year) > days {
            year -= 1;
        }
        let mut day = days - days_before_year(year);
        let mut month = 1;
        for length in month_days(year) {
            if day < length {
                break;
            }
            day -= length;
            month += 1;
        }
        let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
        write!(formatter, "{year:04}-{month:02}-{:02}T{hour:02}:{minute:02}:{second:02}.{microseconds:06}Z", day + 1)
    }
}

impl FromStr for Moment {
    type Err = MomentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let form = b"0000-00-00T00:00:00.000000Z";
            let fits = |(at, letter): (usize, u8)| if form[at] == b'0' { letter.is_ascii_digit() } else { letter == form[at] };
            if text.len() != form.len() || !text.bytes().enumerate().all(fits) {
                return None;
            }
            let part = |from: usize, to: usize| text[from..to].parse::<u64>().ok();
            let (year, month, day) = (part(0, 4)?, part(5, 7)?, part(8, 10)?);
            let (hour, minute, second, microseconds) = (part(11, 13)?, part(14, 16)?, part(17, 19)?, part(20, 26)?);
            if year < 1970 || hour > 23 || minute > 59 || second > 59 {
                return None;
            }
            let months = month_days(year);
            let before = usize::try_from(month.checked_sub(1)?).ok()?;
            if day == 0 || day > *months.get(before)? {
                return None;
            }
            let days = days_before_year(year) + months[..before].iter().sum::<u64>() + day - 1;
            let seconds = days * DAY_SECONDS + hour * 3600 + minute * 60 + second;
            Some(Self { microseconds: seconds * MICROSECONDS + microseconds })
        };
        parse().ok_or_else(|| MomentError(text.to_owned()))
    }
}

impl From<Moment> for String {
    fn from(moment: Moment) -> Self {
        moment.to_string()
    }
}

impl TryFrom<String> for Moment {
    type Error = MomentError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_the_calendar_has_them() {
        // From GNU date: date -u -d @N +%FT%T
        let known = [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_399, "2000-02-28T23:59:59.000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000Z"),
            (951_868_800, "2000-03-01T00:00:00.000000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000000Z"),
            (1_735_689_600, "2025-01-01T00:00:00.000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000Z"),
            (253_402_300_799, "9999-12-31T23:59:59.000000Z"),
        ];
        for (seconds, text) in known {
            let moment = Moment::from_unix_microseconds(seconds * MICROSECONDS);
            assert_eq!(moment.to_string(), text);
            assert_eq!(text.parse(), Ok(moment));
        }
        assert_eq!(Moment::from_unix_microseconds(u64::MAX).to_string(), "9999-12-31T23:59:59.999999Z");
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "2026", "2026-02-29T00:00:00.000000Z", "2026-13-01T00:00:00.000000Z", "2026-01-00T00:00:00.000000Z"] {
            assert!(text.parse::<Moment>().is_err(), "{text}");
        }
        for text in
            ["1969-12-31T23:59:59.000000Z", "2026-01-01T24:00:00.000000Z", "2026-01-01T00:00:00.00000éZ", "2026-01-01 00:00:00.000000Z"]
        {
            assert!(text.parse::<Moment>().is_err(), "{text}");
        }
    }
}
