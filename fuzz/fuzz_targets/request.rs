//! The request scanner against serde_json, over any bytes: the property itself is shared with `proxy/tests/corpus.rs`.

#![no_main]

#[path = "../properties/request.rs"]
mod property;

libfuzzer_sys::fuzz_target!(|data: &[u8]| property::check(data));
