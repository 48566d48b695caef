//! Medians, and what can be said of their ratio.

use std::fmt;

use serde::Serialize;
use snapfence_image_format::storage::Chance;

const RESAMPLES: usize = 2000;

/// A ratio of two medians, and the interval in which 95 of 100 resamplings have it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// Of the values themselves.
    pub median: f64,
    /// Where the interval begins.
    pub low: f64,
    /// Where it ends.
    pub high: f64,
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} times as fast ({:.2} to {:.2})", self.median, self.low, self.high)
    }
}

/// The middle of the values, the mean of the two middle ones of an even number.
///
/// # Panics
/// If there are none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) { f64::midpoint(sorted[middle - 1], sorted[middle]) } else { sorted[middle] }
}

/// The least value that so many percent of the values do not exceed.
///
/// # Panics
/// If there are none.
pub fn percentile(values: &[f64], percent: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// The median of `above` over that of `below`.
///
/// # Panics
/// If there is none of either.
pub fn ratio(above: &[f64], below: &[f64]) -> Ratio {
    let mut chance = Chance::new(1);
    let mut resampled = |values: &[f64]| {
        let drawn: Vec<f64> = values.iter().map(|_| values[chance.below(values.len() as u64) as usize]).collect();
        median(&drawn)
    };
    let mut ratios: Vec<f64> = (0..RESAMPLES).map(|_| resampled(above) / resampled(below)).collect();
    ratios.sort_unstable_by(f64::total_cmp);
    Ratio { median: median(above) / median(below), low: ratios[RESAMPLES / 40], high: ratios[RESAMPLES - 1 - RESAMPLES / 40] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_numbers() {
        assert_eq!([median(&[3.0, 1.0, 2.0]), median(&[4.0, 1.0, 2.0, 3.0]), median(&[7.0])], [2.0, 2.5, 7.0]);
    }

    #[test]
    fn a_ratio_lies_in_its_interval_and_is_certain_where_all_values_are_the_same() {
        assert_eq!(ratio(&[4.0; 5], &[2.0; 5]), Ratio { median: 2.0, low: 2.0, high: 2.0 });
        let ratio = ratio(&[8.0, 9.0, 10.0, 11.0, 12.0], &[4.0, 5.0, 5.0, 5.0, 6.0]);
        assert_eq!(ratio.median, 2.0);
        assert!(ratio.low < 2.0 && ratio.high > 2.0 && ratio.low >= 8.0 / 6.0 && ratio.high <= 12.0 / 4.0, "{ratio}");
    }

    #[test]
    fn percentiles_are_values_that_there_are() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!([0.0, 50.0, 99.0, 100.0].map(|percent| percentile(&values, percent)), [1.0, 100.0, 198.0, 200.0]);
        assert_eq!(percentile(&[7.0], 99.0), 7.0);
    }
}
