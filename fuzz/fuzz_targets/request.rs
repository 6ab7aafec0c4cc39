//! Fuzzes the scanner of requests with what `properties/request.rs` demands of it.

#![no_main]

#[path = "../properties/request.rs"]
mod property;

libfuzzer_sys::fuzz_target!(|data: &[u8]| property::check(data));
