//! Answers of engines, over any bytes and any cuts: the property itself is shared with `proxy/tests/corpus.rs`.

#![no_main]

#[path = "../properties/answers.rs"]
mod property;

libfuzzer_sys::fuzz_target!(|data: &[u8]| property::check(data));
