use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::openai::event::EventSplitter;

const CHAT: [&str; 5] = [
    "data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n",
    "data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" \\\"finish_reason\\\":\\\"abort\\\", \\\"usage\\\":{\\\"prompt_tokens\\\":1} [DONE]\"},\"finish_reason\":null}],\"usage\":null}\n\n",
    "data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"x\"},\"finish_reason\":\"length\",\"stop_reason\":null}]}\n\n",
    "data: {\"id\":\"c\",\"choices\":[],\"usage\":{\"prompt_tokens\":14,\"total_tokens\":19,\"completion_tokens\":5,\"prompt_tokens_details\":{\"cached_tokens\":8}}}\n\n",
    "data: [DONE]\n\n",
];

fn observed(stream: &str) -> StreamFacts {
    let mut facts = StreamFacts::default();
    facts.observe(stream.as_bytes());
    facts
}

#[test]
fn a_chat_ends_with_its_reason_its_usage_and_done() {
    let facts = observed(&CHAT.concat());
    assert_eq!(
        (facts.events, facts.finish_reason, facts.finished_choices),
        (5, Some(FinishReason::Length), 1)
    );
    assert_eq!(facts.usage, Usage { prompt: Some(14), completion: Some(5), cached: Some(8) });
    assert_eq!(facts.terminal, Some(Terminal::Done));
    assert!(facts.is_over() && facts.succeeded());
}

#[test]
fn text_that_looks_like_an_end_is_text() {
    let facts = observed(&CHAT[..2].concat());
    assert_eq!(facts, StreamFacts { events: 2, begun: true, ..StreamFacts::default() });
}

#[test]
fn an_error_inside_a_stream_is_no_success_though_done_follows() {
    for (event, message) in [
        (
            "data: {\"error\": {\"message\": \"EngineCore \\\"died\\\"\", \"type\": \"InternalServerError\", \"code\": 500}}",
            "EngineCore \"died\"",
        ),
        ("data: {\"error\":{\"code\":500}}", "an error without a message"),
        ("data: {\"error\":\"Unauthorized\"}", "Unauthorized"),
        ("data: {\"object\":\"error\",\"message\":\"old style\",\"code\":400}", "old style"),
        (
            "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"x\",\"message\":\"overloaded\"}}",
            "overloaded",
        ),
        ("data: {\"type\":\"error\",\"code\":\"x\",\"message\":\"by type alone\"}", "by type alone"),
        ("event: error\ndata: not json", "an error without a message"),
    ] {
        let facts = observed(&format!("{}{event}\n\ndata: [DONE]\n\n", CHAT[0]));
        assert_eq!(facts.error.as_deref(), Some(message), "{event}");
        assert!(facts.is_over() && !facts.succeeded(), "{event}");
    }
    let nothing_wrong = observed("data: {\"error\": null, \"choices\":[{\"finish_reason\":\"stop\"}]}\n\n");
    assert_eq!((nothing_wrong.error, nothing_wrong.finish_reason), (None, Some(FinishReason::Stop)));
}

#[test]
fn abort_and_done_without_a_reason_are_no_success() {
    assert!(!observed("data: [DONE]\n\n").succeeded());
    let aborted = CHAT.concat().replace("\"length\"", "\"abort\"");
    assert!(!observed(&aborted).succeeded());
    let one_of_two = "data: {\"choices\":[{\"finish_reason\":\"abort\"},{\"finish_reason\": \"stop\"}]}\n\ndata: [DONE]\n\n";
    let facts = observed(one_of_two);
    assert_eq!((facts.finish_reason, facts.finished_choices), (Some(FinishReason::Abort), 2));
    assert!(!facts.succeeded());
}

#[test]
fn a_long_error_message_is_cut_between_characters() {
    let facts = observed(&format!("data: {{\"error\":{{\"message\":\"{}\"}}}}\n\n", "水".repeat(500)));
    assert_eq!(facts.error.map(|message| message.len()), Some(255));
}

#[test]
fn anthropic_messages_end_with_message_stop() {
    let stream = concat!(
        "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"m\",\"usage\":{\"input_tokens\":9,\"output_tokens\":0,\"cache_read_input_tokens\":4}}}\n\n",
        "event: ping\ndata: {\"type\":\"ping\"}\n\n",
        "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"delta\":{\"type\":\"text_delta\",\"text\":\"x\"}}\n\n",
        "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"max_tokens\"},\"usage\":{\"output_tokens\":7}}\n\n",
        "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n",
    );
    for stream in [
        stream.to_owned(),
        stream.lines().filter(|line| !line.starts_with("event")).map(|line| format!("{line}\n")).collect(),
    ] {
        let facts = observed(&stream);
        assert_eq!(facts.usage, Usage { prompt: Some(9), completion: Some(7), cached: Some(4) });
        assert_eq!(
            (facts.finish_reason, facts.terminal),
            (Some(FinishReason::Length), Some(Terminal::MessageStop))
        );
        assert!(facts.succeeded());
    }
}

#[test]
fn responses_end_in_three_ways() {
    let end = |name: &str, body: &str| {
        observed(&format!(
            "event: response.created\ndata: {{\"response\":{{\"usage\":null}},\"type\":\"response.created\"}}\n\nevent: {name}\ndata: {{\"response\":{body},\"type\":\"{name}\"}}\n\n"
        ))
    };
    let usage = r#""usage":{"input_tokens":3,"input_tokens_details":{"cached_tokens":1},"output_tokens":4,"total_tokens":7}"#;
    let facts = end("response.completed", &format!("{{\"status\":\"completed\",{usage}}}"));
    assert_eq!(facts.usage, Usage { prompt: Some(3), completion: Some(4), cached: Some(1) });
    assert_eq!(
        (facts.finish_reason, facts.terminal),
        (Some(FinishReason::Stop), Some(Terminal::ResponseCompleted))
    );
    assert!(facts.succeeded());

    let facts = end(
        "response.completed",
        r#"{"status":"incomplete","incomplete_details":{"reason":"max_output_tokens"}}"#,
    );
    assert_eq!(facts.finish_reason, Some(FinishReason::Length));
    let facts = end("response.incomplete", r#"{"incomplete_details":{"reason":"content_filter"}}"#);
    assert_eq!(
        (facts.finish_reason, facts.terminal),
        (Some(FinishReason::ContentFilter), Some(Terminal::ResponseIncomplete))
    );
    let facts =
        end("response.failed", r#"{"status":"failed","error":{"code":"server_error","message":"gone"}}"#);
    assert_eq!((facts.error.as_deref(), facts.terminal), (Some("gone"), Some(Terminal::ResponseFailed)));
    assert!(facts.is_over() && !facts.succeeded());
}

#[test]
fn the_framing_of_the_standard_is_understood() {
    let stream = "\u{feff}data:{\"choices\":\r\ndata:[{\"finish_reason\":\"stop\"}]}\r\nid: 1\r\n\r\n: keep-alive\r\n\r\nevent\r\rdata: [DONE]\r\r";
    let facts = observed(stream);
    assert_eq!(
        (facts.events, facts.finish_reason, facts.terminal),
        (2, Some(FinishReason::Stop), Some(Terminal::Done))
    );
    assert_eq!(observed("data: [DONE]\n").events, 0, "an unfinished event is none");
    assert_eq!(observed("database: [DONE]\n\n").events, 0);
}

#[test]
fn counts_that_are_no_counts_are_left_out() {
    for usage in [
        "null",
        "{}",
        "[1]",
        "{\"prompt_tokens\":-1}",
        "{\"prompt_tokens\":\"9\"}",
        "{\"prompt_tokens\":9.5}",
        "7",
    ] {
        assert_eq!(observed(&format!("data: {{\"usage\":{usage}}}\n\n")).usage, Usage::default(), "{usage}");
    }
}

#[test]
fn a_unary_body_tells_its_usage_however_much_follows_it() {
    let ids = vec!["12345"; 50_000].join(",");
    let body = format!(
        "{{\"choices\":[{{\"message\":{{\"content\":\"{}\"}},\"finish_reason\":\"stop\"}},{{\"finish_reason\":\"abort\"}},{{\"finish_reason\":\"length\"}}],\"usage\":{{\"prompt_tokens\":50000,\"completion_tokens\":2}},\"prompt_token_ids\":[{ids}]}}",
        "x".repeat(40_000)
    );
    for size in [1, 7, 1000, 16 << 10, 1 << 20] {
        let mut facts = BodyFacts::default();
        for chunk in body.as_bytes().chunks(size) {
            facts.push(chunk);
            assert!(facts.recent.len() < 2 * BodyFacts::OVERLAP + size, "memory is bounded");
        }
        assert_eq!(
            facts.usage(),
            Usage { prompt: Some(50_000), completion: Some(2), cached: None },
            "{size}"
        );
        assert_eq!(facts.finish_reason(), Some(FinishReason::Abort), "{size}");
    }
    assert_eq!(BodyFacts::default().usage(), Usage::default());
}

fn event() -> impl Strategy<Value = String> {
    prop_oneof![
        prop::sample::select(CHAT.to_vec()).prop_map(str::to_owned),
        prop::sample::select(vec![
            ": keep-alive\n\n",
            "data: {\"error\":{\"message\":\"m\"}}\n\n",
            "data: {\"choices\":[{\"finish_reason\":\"abort\"}]}\n\n",
            "event: message_stop\ndata: {}\n\n",
            "data: 1\ndata: 2\n\n",
        ])
        .prop_map(str::to_owned),
        "[a-z{}\":\n\r ]{0,30}".prop_map(|text| format!("data: {text}\n\n")),
    ]
}

proptest! {
    #[test]
    fn facts_do_not_depend_on_how_the_stream_is_cut(
        events in prop::collection::vec(event(), 0..8),
        end in prop::sample::select(vec!["\n", "\r\n", "\r"]),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let stream = events.concat().replace('\n', end);
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).chain([0, stream.len()]).collect();
        cuts.sort_unstable();
        let (mut splitter, mut facts) = (EventSplitter::default(), StreamFacts::default());
        for pair in cuts.windows(2) {
            let chunk = Bytes::copy_from_slice(&stream.as_bytes()[pair[0]..pair[1]]);
            if let Some(whole) = splitter.push(chunk).expect("small") {
                facts.observe(&whole);
            }
        }
        prop_assert_eq!(facts, observed(&stream), "{:?}", stream);
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(prop_oneof![any::<u8>(), prop::sample::select(b"\n\r:{}\"data[]".to_vec())], 0..300)) {
        StreamFacts::default().observe(&bytes);
        let mut facts = BodyFacts::default();
        facts.push(&bytes);
        let _ = (facts.usage(), facts.finish_reason());
    }
}
