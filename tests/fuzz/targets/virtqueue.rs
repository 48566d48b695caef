//! The fuzzer's program of the target of this name.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| snapfence_fuzz::virtqueue::run(input));
