#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bessel_tests::fuzz::store_image(data));
