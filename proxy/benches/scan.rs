//! Throughput of the pure parts that see every byte: the request scan, the event splitter, the event facts.
//!
//! `cargo bench -p penstock-proxy --bench scan`: one line per case, the best of several rounds (the machine may be
//! shared; the best round is the one that was disturbed least). In the crate's test runs (no `--bench` argument) it
//! runs each case once, so that it cannot rot.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use bytes::Bytes;
use penstock_proxy::openai::{
    event::EventSplitter,
    request::{ScanLimits, scan},
    usage::StreamFacts,
};

fn main() {
    let rounds = if std::env::args().any(|argument| argument == "--bench") { 15 } else { 0 };
    for (name, body) in bodies() {
        let best = best_of(rounds, || {
            let facts = scan(black_box(&body), &ScanLimits::default());
            assert!(facts.is_ok(), "{name}: {facts:?}");
        });
        println!(
            "scan   {name:<44} {:>9} bytes {:>9.0} MB/s",
            body.len(),
            megabytes_a_second(body.len(), best)
        );
    }
    for (name, chunks) in streams() {
        let bytes: usize = chunks.iter().map(Bytes::len).sum();
        let mut events = 0;
        let best = best_of(rounds, || {
            let (mut splitter, mut facts) = (EventSplitter::default(), StreamFacts::default());
            for chunk in &chunks {
                if let Ok(Some(whole)) = splitter.push(chunk.clone()) {
                    facts.observe(&whole);
                }
            }
            assert!(facts.is_over() && facts.error.is_none(), "{name}: {facts:?}");
            events = black_box(facts.events);
        });
        let each = best.as_nanos() / u128::from(events.max(1));
        println!(
            "stream {name:<44} {bytes:>9} bytes {:>9.0} MB/s {each:>5} ns/event",
            megabytes_a_second(bytes, best)
        );
    }
}

/// The shortest time of one call; each round repeats it for about 30 ms.
fn best_of(rounds: u32, mut call: impl FnMut()) -> Duration {
    let timed = |call: &mut dyn FnMut(), times: u32| {
        let start = Instant::now();
        (0..times).for_each(|_| call());
        start.elapsed() / times
    };
    let first = timed(&mut call, 1);
    let times = u32::try_from(30_000_000 / first.as_nanos().max(1)).unwrap_or(u32::MAX).max(1);
    (0..rounds).map(|_| timed(&mut call, times)).min().unwrap_or(first)
}

#[allow(clippy::cast_precision_loss)] // A figure for people.
fn megabytes_a_second(bytes: usize, time: Duration) -> f64 {
    bytes as f64 / 1e6 / time.as_secs_f64()
}

fn chat(content: &str) -> Vec<u8> {
    format!(
        r#"{{"messages": [{{"role": "user", "content": "{content}"}}], "stream": true, "model": "tiny"}}"#
    )
    .into_bytes()
}

fn bodies() -> Vec<(&'static str, Vec<u8>)> {
    const SENTENCE: &str = "The sluice opens, and the water of the mill race turns the wheel. ";
    let ids = |separator: &str| {
        let ids: Vec<_> =
            (0..180_000u32).map(|i| (i.wrapping_mul(2_654_435_761) % 128_000).to_string()).collect();
        format!(r#"{{"prompt": [{}], "model": "tiny"}}"#, ids.join(separator)).into_bytes()
    };
    let message = format!(r#"{{"role": "user", "content": "{}\n"}}"#, SENTENCE.repeat(3));
    let messages = vec![message; 4_500].join(", ");
    vec![
        ("one string of ASCII, 1 MiB", chat(&SENTENCE.repeat(16_000))),
        ("one string of ASCII, 20 MiB", chat(&SENTENCE.repeat(320_000))),
        ("one string of UTF-8 Chinese, 1 MiB", chat(&"水闸打开，水车转动。".repeat(35_000))),
        ("one string of \\u escapes, 1 MiB", chat(&"\\u6c34\\u95f8".repeat(87_000))),
        ("prose with \\n every 66 bytes, 1 MiB", chat(&format!("{SENTENCE}\\n").repeat(15_000))),
        (
            "4,500 messages of 200 bytes",
            format!(r#"{{"messages": [{messages}], "model": "tiny"}}"#).into_bytes(),
        ),
        ("180,000 token ids, compact", ids(",")),
        ("180,000 token ids, Python's spacing", ids(", ")),
        ("a short chat", chat("Hello! What is a penstock?")),
    ]
}

fn streams() -> Vec<(&'static str, Vec<Bytes>)> {
    let delta = |i: usize| {
        format!(
            "data: {{\"id\":\"chatcmpl-0123456789abcdef\",\"object\":\"chat.completion.chunk\",\"created\":1794000000,\
             \"model\":\"tiny\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\" word{i}\"}},\"logprobs\":null,\
             \"finish_reason\":null,\"token_ids\":null}}]}}\n\n"
        )
    };
    let with_usage = |i: usize| {
        let usage = format!(
            "]}}],\"usage\":{{\"prompt_tokens\":9,\"total_tokens\":{i},\"completion_tokens\":{i}}}}}\n\n"
        );
        delta(i).replace("}]}\n\n", &usage.replacen("]}", "}", 1))
    };
    let done = || Bytes::from_static(b"data: [DONE]\n\n");
    let each = |event: &dyn Fn(usize) -> String| {
        (0..2_000).map(|i| Bytes::from(event(i))).chain([done()]).collect::<Vec<_>>()
    };
    let all: Vec<u8> = each(&delta).concat();
    let cut = |size: usize| all.chunks(size).map(Bytes::copy_from_slice).collect::<Vec<_>>();
    let typed = |i: usize| {
        format!(
            "event: response.output_text.delta\ndata: {{\"content_index\":0,\"delta\":\" word{i}\",\"item_id\":\"msg_1\",\
             \"output_index\":0,\"sequence_number\":{i},\"type\":\"response.output_text.delta\",\"logprobs\":[]}}\n\n"
        )
    };
    vec![
        ("chat deltas, a chunk each", each(&delta)),
        ("chat deltas with usage, a chunk each", each(&with_usage)),
        ("chat deltas, 16 KiB chunks", cut(16 << 10)),
        ("chat deltas, 100-byte chunks", cut(100)),
        ("responses deltas, a chunk each", each(&typed)),
    ]
}
