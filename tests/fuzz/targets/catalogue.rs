//! The fuzzer's program of the target of this name.
#![no_main]

// The fuzzer's own hook ends the process at a panic that is caught as well.
libfuzzer_sys::fuzz_target!(
    init: std::panic::set_hook(Box::new(|_| ())),
    |input: &[u8]| snapfence_fuzz::catalogue::run(input)
);
