#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bessel::fuzz::api(data));
