//! kill -9 of one of three engines under load: no request fails, whether it was on that engine or came after, streams go on at the
//! others, and a third engine is there again.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use nix::sys::signal::{Signal, kill};
use serde_json::json;
use support::{Up, client, eventually, pid};
use tokio::task::JoinSet;

const WORKERS: usize = 24;

struct Outcome {
    began: Instant,
    result: Result<(), String>,
}

/// One request after the other until told to stop.
async fn worker(url: String, number: usize, stop: Arc<AtomicBool>, done: Arc<AtomicUsize>) -> Vec<Outcome> {
    let client = client();
    let mut outcomes = Vec::new();
    let streams = number.is_multiple_of(2);
    while !stop.load(SeqCst) {
        let began = Instant::now();
        let body = json!({
            "model": "sim-model",
            "messages": [{"role": "user", "content": format!("worker {number}, request {}", outcomes.len())}],
            "max_tokens": 12,
            "stream": streams,
        });
        let answered = async {
            let request = client.post(format!("{url}/v1/chat/completions")).json(&body);
            let answer = request.send().await.map_err(|e| e.to_string())?;
            let status = answer.status();
            let text = answer.text().await.map_err(|e| e.to_string())?;
            let whole = if streams { text.ends_with("data: [DONE]\n\n") } else { text.contains("\"usage\"") };
            if status.is_success() && whole { Ok(()) } else { Err(format!("{status}: {text}")) }
        };
        let result = answered.await;
        done.fetch_add(1, SeqCst);
        outcomes.push(Outcome { began, result });
    }
    outcomes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_when_an_engine_is_killed_under_load() {
    let up = Up::start(&["--engines", "3"]);
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicUsize::new(0));
    let mut workers = JoinSet::new();
    for number in 0..WORKERS {
        workers.spawn(worker(up.url(), number, Arc::clone(&stop), Arc::clone(&done)));
    }
    eventually("there is load", Duration::from_secs(60), || (done.load(SeqCst) > 100).then_some(()));
    let victim = &up.json["engines"][0];
    let killed = Instant::now();
    kill(pid(u32::try_from(victim["pid"].as_u64().unwrap()).unwrap()), Signal::SIGKILL).unwrap();
    eventually("a third engine is ready again", Duration::from_secs(60), || {
        let ready: Vec<_> = up.endpoints().into_iter().filter(|e| e["state"] == "ready").collect();
        (ready.len() == 3 && ready.iter().all(|e| e["pid"] != victim["pid"])).then_some(())
    });
    stop.store(true, SeqCst);
    let outcomes: Vec<Outcome> = workers.join_all().await.into_iter().flatten().collect();

    let (after, before): (Vec<_>, Vec<_>) = outcomes.iter().partition(|o| o.began >= killed);
    assert!(
        before.len() > 50 && after.len() > 50,
        "there was load: {} before, {} after",
        before.len(),
        after.len()
    );
    let failed: Vec<_> = outcomes.iter().filter_map(|o| o.result.as_ref().err()).collect();
    assert!(failed.is_empty(), "{} of {} requests failed: {failed:?}", failed.len(), outcomes.len());
    up.stop();
}
