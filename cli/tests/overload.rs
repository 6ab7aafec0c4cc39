//! DR31: three times as many requests as the engines can run. Their work goes on at its peak, whoever is admitted gets his
//! first token within the queue's deadline, the others are told when to come back, and it is over when the load is.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use serde_json::json;
use support::{Up, client};
use tokio::task::JoinSet;

/// Requests that the two engines run at a time.
const CAPACITY: usize = 16;
const TOKENS: usize = 30;
/// `queue.deadline_ms`; the refusals come from it.
const DEADLINE: Duration = Duration::from_millis(500);

#[derive(Default)]
struct Tally {
    /// From the request to the first event, of those that were admitted.
    first_tokens: Vec<Duration>,
    /// Whole answers.
    answered: usize,
    refused: usize,
}

/// One stream after the other until told to stop; a refused one pauses, though not as long as it is told.
async fn worker(url: String, number: usize, stop: Arc<AtomicBool>) -> Tally {
    let client = client();
    let mut tally = Tally::default();
    while !stop.load(SeqCst) {
        let body = json!({
            "model": "sim-model", "max_tokens": TOKENS, "stream": true,
            "messages": [{"role": "user", "content": format!("worker {number}, {}", tally.answered)}],
        });
        let asked = Instant::now();
        let request = client.post(format!("{url}/v1/chat/completions")).json(&body);
        let mut answer = request.send().await.unwrap();
        if answer.status() == 503 {
            let after: u64 = answer.headers()["retry-after"].to_str().unwrap().parse().unwrap();
            assert!((1..=30).contains(&after), "{after}");
            assert!(answer.text().await.unwrap().contains("engine_overloaded"));
            tally.refused += 1;
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        }
        assert_eq!(answer.status(), 200);
        let mut text = answer.chunk().await.unwrap().expect("an event").to_vec();
        tally.first_tokens.push(asked.elapsed());
        while let Some(chunk) = answer.chunk().await.unwrap() {
            text.extend_from_slice(&chunk);
        }
        assert!(text.ends_with(b"data: [DONE]\n\n"), "{}", String::from_utf8_lossy(&text));
        tally.answered += 1;
    }
    tally
}

/// Runs `workers` for a while; what they saw, and whole answers a second.
async fn load(up: &Up, workers: usize, time: Duration) -> (Tally, f64) {
    let stop = Arc::new(AtomicBool::new(false));
    let mut running = JoinSet::new();
    let began = Instant::now();
    for number in 0..workers {
        running.spawn(worker(up.url(), number, Arc::clone(&stop)));
    }
    tokio::time::sleep(time).await; // the length of the measurement, not a wait for something
    stop.store(true, SeqCst);
    let mut all = Tally::default();
    for tally in running.join_all().await {
        all.first_tokens.extend(tally.first_tokens);
        all.answered += tally.answered;
        all.refused += tally.refused;
    }
    all.first_tokens.sort_unstable();
    let rate = all.answered as f64 / began.elapsed().as_secs_f64();
    (all, rate)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_times_the_capacity_is_served_at_the_peak_and_the_rest_is_told_when_to_come_back() {
    let deadline = DEADLINE.as_millis().to_string();
    let engine_args =
        ["--max-num-seqs=8", "--max-num-queued-reqs=2", "--sim-itl-ms=20", "--sim-itl-growth-us=0"];
    let args: Vec<String> = ["--engines=2".to_owned()]
        .into_iter()
        .chain(engine_args.iter().map(|arg| format!("--engine-arg={arg}")))
        .collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let up = Up::start_with_env(&args, &[("PENSTOCK_PROXY__QUEUE__DEADLINE_MS", &deadline)]);

    let (calm, peak) = load(&up, CAPACITY, Duration::from_secs(4)).await;
    let (crowded, rate) = load(&up, 3 * CAPACITY, Duration::from_secs(6)).await;
    let p99 = crowded.first_tokens[crowded.first_tokens.len() * 99 / 100];
    eprintln!(
        "peak {peak:.1}/s with {CAPACITY} clients ({} refused); {rate:.1}/s with {}: {} answered, {} refused, \
         time to first token p99 {p99:?}",
        calm.refused,
        3 * CAPACITY,
        crowded.answered,
        crowded.refused,
    );
    assert!(crowded.refused > 0, "more was asked than fits within the deadline");
    // Ten per cent is the promise; the rest is what else this machine may have to do during one phase and not the other.
    assert!(rate > 0.75 * peak, "{rate:.1}/s where {peak:.1}/s were possible");
    assert!(p99 < DEADLINE + Duration::from_secs(2), "{p99:?}");

    let (quiet, _) = load(&up, 1, Duration::from_secs(1)).await;
    assert_eq!(quiet.refused, 0);
    assert!(quiet.first_tokens[0] < Duration::from_secs(2), "{:?} with the load gone", quiet.first_tokens[0]);
    up.stop();
}
