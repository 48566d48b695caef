//! Measuring snapfence and what it is compared with, by the same means.

pub mod chain;
pub mod html;
pub mod load;
pub mod machine;
pub mod statistics;
