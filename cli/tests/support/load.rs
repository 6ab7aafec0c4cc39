//! Load on the public port, and what the proxy and its engines say meanwhile.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::{Up, client};

/// A request that has ended.
pub(crate) struct Outcome {
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
    /// What was wrong with the answer.
    pub(crate) result: Result<(), String>,
}

/// None of these failed; else it says how many did, and shows some.
pub(crate) fn none_failed(outcomes: &[Outcome]) {
    let failed: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.result.as_ref().err()).collect();
    let some = &failed[..failed.len().min(5)];
    assert!(failed.is_empty(), "{} of {} failed: {some:?}", failed.len(), outcomes.len());
}

/// Workers that send one streamed request after the other.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    workers: JoinSet<Vec<Outcome>>,
}

impl Load {
    /// `workers` that ask `model` for so many tokens each time.
    pub(crate) fn start(up: &Up, model: &str, workers: usize, max_tokens: u32) -> Self {
        Self::on(&up.url(), model, workers, max_tokens)
    }

    /// The same at this API.
    pub(crate) fn on(url: &str, model: &str, workers: usize, max_tokens: u32) -> Self {
        let (stop, done) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let body = json!({
            "model": model, "stream": true, "max_tokens": max_tokens, "ignore_eos": true,
            "messages": [{"role": "user", "content": "hi"}],
        });
        let worker = |_| {
            let (url, body) = (format!("{url}/v1/chat/completions"), body.clone());
            let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
            async move {
                let client = client();
                let mut outcomes = vec![];
                while !stop.load(SeqCst) {
                    let began = Instant::now();
                    let result = ask(&client, &url, &body).await;
                    done.fetch_add(1, SeqCst);
                    outcomes.push(Outcome { began, ended: Instant::now(), result });
                }
                outcomes
            }
        };
        let workers = (0..workers).map(worker).collect();
        Self { stop, done, workers }
    }

    /// Requests that have ended.
    pub(crate) fn done(&self) -> usize {
        self.done.load(SeqCst)
    }

    /// Ends it; every request.
    pub(crate) async fn end(self) -> Vec<Outcome> {
        self.stop.store(true, SeqCst);
        self.workers.join_all().await.into_iter().flatten().collect()
    }
}

async fn ask(client: &reqwest::Client, url: &str, body: &Value) -> Result<(), String> {
    let answer = client.post(url).json(body).send().await.map_err(|e| e.to_string())?;
    let status = answer.status();
    let text = answer.text().await.map_err(|e| e.to_string())?;
    let whole = status.is_success() && text.ends_with("data: [DONE]\n\n");
    if whole { Ok(()) } else { Err(format!("{status}: {text}")) }
}

/// Waits for something that is asked for over HTTP.
pub(crate) async fn until<T>(what: &str, longest: Duration, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + longest;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "not within {longest:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// `GET http://ADDRESS/PATH` as JSON.
pub(crate) async fn get(address: &str, path: &str) -> Option<Value> {
    client().get(format!("http://{address}{path}")).send().await.ok()?.json().await.ok()
}

/// What the proxy knows of an endpoint.
pub(crate) async fn seen_by_proxy(up: &Up, model: &str, id: &str) -> Option<Value> {
    let seen = get(&up.address("proxy_private"), "/debug/endpoints").await?;
    seen["models"][model].as_array()?.iter().find(|endpoint| endpoint["id"] == id).cloned()
}

/// The state of an endpoint's health, as the proxy sees it; empty while it does not know it.
pub(crate) async fn state(up: &Up, model: &str, id: &str) -> String {
    let seen = seen_by_proxy(up, model, id).await.unwrap_or_default();
    seen["health"]["state"].as_str().unwrap_or_default().to_owned()
}

/// A series of the proxy, labels and all.
pub(crate) async fn proxy_metric(up: &Up, series: &str) -> Option<f64> {
    let url = format!("http://{}/metrics", up.address("proxy_private"));
    let text = client().get(url).send().await.ok()?.text().await.ok()?;
    let line =
        text.lines().find(|line| line.strip_prefix(series).is_some_and(|rest| rest.starts_with(' ')))?;
    line.rsplit(' ').next()?.parse().ok()
}
