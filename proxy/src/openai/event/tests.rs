use proptest::prelude::*;

use super::*;

/// What the fuzz target checks, too.
#[allow(unreachable_pub, dead_code)] // public to the fuzz target, which calls what is not called here
#[path = "../../../../fuzz/properties/events.rs"]
mod properties;

/// Feeds `chunks`, checks what must hold after each, and gives the outputs and the held-back rest.
fn split(chunks: &[&[u8]]) -> (Vec<Bytes>, Bytes) {
    properties::check_chunks(&chunks.concat(), chunks);
    let mut splitter = EventSplitter::default();
    let push = |chunk: &&[u8]| splitter.push(Bytes::copy_from_slice(chunk)).expect("small");
    let outputs: Vec<Bytes> = chunks.iter().filter_map(push).collect();
    assert!(outputs.iter().all(|output| !output.is_empty()));
    let partial = splitter.take_partial();
    assert_eq!(splitter.pending_bytes(), 0);
    (outputs, partial)
}

#[test]
fn a_chunk_of_whole_events_is_handed_on_without_a_copy() {
    let chunk = Bytes::from_static(b"data: 1\n\ndata: 2\n\n");
    let whole = EventSplitter::default().push(chunk.clone()).expect("small").expect("whole");
    assert_eq!((whole.as_ptr(), whole.len()), (chunk.as_ptr(), chunk.len()));
}

#[test]
fn what_is_whole_of_a_chunk_is_a_slice_of_it() {
    let chunk = Bytes::from_static(b"data: 1\n\ndata: 2");
    let mut splitter = EventSplitter::default();
    let whole = splitter.push(chunk.clone()).expect("small").expect("whole");
    assert_eq!((whole.as_ptr(), whole.len()), (chunk.as_ptr(), 9));
    assert_eq!(splitter.pending_bytes(), 7);
    let whole = splitter.push(Bytes::from_static(b"\n\n: keep-alive\n\ndat")).expect("small");
    assert_eq!(whole.as_deref(), Some(&b"data: 2\n\n: keep-alive\n\n"[..]));
    assert_eq!(splitter.take_partial(), "dat");
}

#[test]
fn an_event_that_ends_in_a_bare_cr_is_not_held_for_a_line_feed() {
    let (outputs, partial) = split(&[b"data: 1\r\n\r", b"\ndata: 2\r\r"]);
    assert_eq!(outputs, ["data: 1\r\n\r", "\ndata: 2\r\r"]);
    assert!(partial.is_empty());
}

#[test]
fn the_line_feed_of_a_cut_crlf_is_no_blank_line() {
    let (outputs, partial) = split(&[b"data: 1\r", b"\ndata: 2\r", b"\n\r\n"]);
    assert_eq!(outputs, ["data: 1\r\ndata: 2\r\n\r\n"]);
    assert!(partial.is_empty());
}

#[test]
fn the_limit_is_for_what_is_held_back_not_for_a_burst() {
    let mut splitter = EventSplitter::new(10);
    let burst = Bytes::from_static(b"data: 1\n\ndata: 2\n\ndata: 3\n\n0123456789");
    assert_eq!(splitter.push(burst).expect("each is small").map(|whole| whole.len()), Some(27));
    assert_eq!(splitter.pending_bytes(), 10);
    let error = splitter.push(Bytes::from_static(b"x")).expect_err("eleven");
    assert_eq!(error, EventTooLarge { limit: 10 });
    assert!(error.to_string().contains("more than 10 bytes"));
}

#[test]
fn a_large_event_in_small_chunks_arrives_whole() {
    let event = [b"data: ".as_slice(), &vec![b'x'; 1 << 20], b"\n\n"].concat();
    let chunks: Vec<_> = event.chunks(1500).collect();
    let (outputs, partial) = split(&chunks);
    assert_eq!(outputs, [event]);
    assert!(partial.is_empty());
}

#[test]
fn nothing_comes_of_an_empty_chunk() {
    let (outputs, partial) = split(&[b"", b"data: 1", b"", b"\n\n", b""]);
    assert_eq!(outputs, ["data: 1\n\n"]);
    assert!(partial.is_empty());
}

fn line() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        Just("data: {\"choices\":[]}"),
        Just("data:x"),
        Just("data"),
        Just("event: error"),
        Just(": keep-alive"),
        Just("\u{feff}data: 1"),
        Just("id: 7"),
        Just(""),
        Just("")
    ]
}

prop_compose! {
    /// A stream of lines, blank ones among them, with line ends of all three kinds, perhaps unfinished.
    fn stream()(lines in prop::collection::vec((line(), prop::sample::select(vec!["\n", "\r\n", "\r"])), 0..12),
                tail in prop::sample::select(vec!["", "dat", "data: 1\n", "\r"])) -> Vec<u8> {
        let mut text: String = lines.into_iter().flat_map(|(line, end)| [line, end]).collect();
        text.push_str(tail);
        text.into_bytes()
    }
}

proptest! {
    // Each case tries every pair of cuts: a few thousand splits.
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_pair_of_cuts_of_a_stream_gives_whole_events(input in stream()) {
        for first in 0..=input.len() {
            for second in first..=input.len() {
                split(&[&input[..first], &input[first..second], &input[second..]]);
            }
        }
        split(&input.chunks(1).collect::<Vec<_>>());
    }
}

proptest! {
    #[test]
    fn random_bytes_in_random_chunks_keep_the_promises(
        chunks in prop::collection::vec(prop::collection::vec(prop::sample::select(b"\n\n\r\rda:".to_vec()), 0..9), 0..40)
    ) {
        let chunks: Vec<&[u8]> = chunks.iter().map(Vec::as_slice).collect();
        let (outputs, partial) = split(&chunks);
        prop_assert_eq!([outputs.concat(), partial.to_vec()].concat(), chunks.concat());
    }
}
