//! The fuzz targets' properties over the committed corpus, and the splitter at every place where a stream can be cut.
//!
//! `make fuzz` looks for new inputs; what it finds goes into `fuzz/corpus`, where this test keeps it found.

#![allow(clippy::unwrap_used, unreachable_pub)] // test code; the properties are public to the fuzz targets

#[path = "../../fuzz/properties/answers.rs"]
mod answers;
#[path = "../../fuzz/properties/events.rs"]
mod events;
#[path = "../../fuzz/properties/request.rs"]
mod request;
#[path = "../../fuzz/properties/usage.rs"]
mod usage;

use std::path::Path;

use bytes::Bytes;
use penstock_proxy::openai::event::{DEFAULT_MAX_EVENT_BYTES, EventSplitter};

/// Runs `check` on every input of a target's corpus; a failure names its file.
fn replay(target: &str, check: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut names: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    assert!(names.len() > 5, "{} has {} files", folder.display(), names.len());
    for name in names {
        let input = std::fs::read(&name).unwrap();
        eprintln!("{}", name.display());
        check(&input);
        // What a transfer cuts off is an input, too: every beginning, of long ones some two hundred.
        for end in (0..input.len()).step_by(1 + input.len() / 200) {
            check(&input[..end]);
        }
    }
}

#[test]
fn request_bodies() {
    replay("request", request::check);
}

#[test]
fn event_streams() {
    replay("events", events::check);
}

#[test]
fn answers_of_engines() {
    replay("answers", answers::check);
}

#[test]
fn answers_of_any_text() {
    replay("usage", usage::check);
}

/// The streams of the corpus of events, without the cuts in front.
fn streams() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/events");
    let read = |entry: std::io::Result<std::fs::DirEntry>| std::fs::read(entry.unwrap().path()).unwrap();
    let inputs = std::fs::read_dir(folder).unwrap().map(read);
    inputs.map(|input| input[1 + usize::from(input[0] % 16)..].to_vec()).collect()
}

#[test]
fn every_single_cut_and_every_pair_of_cuts_of_every_stream() {
    for stream in streams() {
        for first in 0..=stream.len() {
            events::check_chunks(&stream, &[&stream[..first], &stream[first..]]);
        }
        // Pairs are quadratic: of long streams the beginning.
        let short = &stream[..stream.len().min(120)];
        for first in 0..=short.len() {
            for second in first..=short.len() {
                events::check_chunks(short, &[&short[..first], &short[first..second], &short[second..]]);
            }
        }
        events::check_chunks(&stream, &stream.chunks(1).collect::<Vec<_>>());
    }
}

#[test]
fn an_event_of_the_largest_size_passes_and_one_byte_more_does_not() {
    // What is held back is the event without its last byte: the blank line's end completes it.
    for (more, passes) in [(0, true), (1, false)] {
        let mut event = b"data: ".to_vec();
        event.resize(DEFAULT_MAX_EVENT_BYTES - 1 + more, b'x');
        event.push(b'\n');
        let mut splitter = EventSplitter::default();
        let held: Result<Vec<_>, _> =
            event.chunks(60_000).map(|chunk| splitter.push(Bytes::copy_from_slice(chunk))).collect();
        assert_eq!(held.is_ok(), passes, "{more} more");
        assert!(splitter.pending_bytes() <= DEFAULT_MAX_EVENT_BYTES);
        if passes {
            let whole = splitter.push(Bytes::from_static(b"\n")).unwrap().unwrap();
            assert_eq!(whole.len(), event.len() + 1);
        }
    }
}
