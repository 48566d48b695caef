//! Measuring snapfence and what it is compared with, by the same means.

pub mod chain;
pub mod load;
