//! Fuzzes the splitter of events with what `properties/events.rs` demands of it.

#![no_main]

#[path = "../properties/events.rs"]
mod property;

libfuzzer_sys::fuzz_target!(|data: &[u8]| property::check(data));
