//! Fuzzes what is read of answers with what `properties/usage.rs` demands of it.

#![no_main]

#[path = "../properties/usage.rs"]
mod property;

libfuzzer_sys::fuzz_target!(|data: &[u8]| property::check(data));
