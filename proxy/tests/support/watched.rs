//! A gateway whose endpoints are watched, load on it, and engines that can be made ill and well again.

use std::sync::atomic::AtomicBool;

use penstock_proxy::{
    endpoints::Endpoint,
    health::{self, Phase},
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::*;

/// A gateway with its watch.
pub struct Watched {
    pub proxy: Proxy,
    stop: CancellationToken,
    watch: JoinHandle<()>,
}

impl Watched {
    pub fn start(config: ProxyConfig, engines: &[SocketAddr]) -> Self {
        let proxy = Proxy::start(config, engines);
        let stop = CancellationToken::new();
        let watch = tokio::spawn(health::watch::run(Arc::clone(&proxy.gateway), stop.clone()));
        Self { proxy, stop, watch }
    }

    pub fn endpoint(&self, at: usize) -> Arc<Endpoint> {
        Arc::clone(&self.proxy.gateway.table.load().pools["m"].endpoints[at])
    }

    pub fn phase(&self, at: usize) -> Phase {
        self.endpoint(at).vitals().phase(self.proxy.gateway.now_ms())
    }

    /// Waits until an endpoint is ejected; how long that took.
    pub async fn ejected(&self, at: usize) -> Duration {
        let began = Instant::now();
        eventually("the endpoint is ejected", || self.phase(at) == Phase::Ejected).await;
        began.elapsed()
    }

    pub async fn admitted(&self, at: usize) {
        eventually("the endpoint is back", || {
            matches!(self.phase(at), Phase::Admitted | Phase::Suspect) && !self.endpoint(at).draining
        })
        .await;
    }

    pub fn ejections(&self, reason: &str) -> u64 {
        ejections(&self.proxy, reason)
    }

    pub fn all_ejections(&self) -> u64 {
        health::Reason::ALL.iter().map(|reason| self.ejections(reason.label())).sum()
    }

    /// Examinations that ended with a verdict.
    pub fn verdicts(&self, verdict: &str) -> u64 {
        self.proxy.gateway.metrics.hang_checks.with_label_values(&[verdict]).get()
    }

    /// Ends the watch, and with it every check that is under way.
    pub async fn stop(self) -> Proxy {
        self.stop.cancel();
        tokio::time::timeout(PATIENCE, self.watch).await.expect("it ends").unwrap();
        self.proxy
    }
}

/// What an engine is like now; shared with the script that acts on it.
#[derive(Clone, Default)]
pub struct Switch(Arc<AtomicBool>);

impl Switch {
    pub fn on(&self) {
        self.0.store(true, SeqCst);
    }

    pub fn off(&self) {
        self.0.store(false, SeqCst);
    }

    pub fn is_on(&self) -> bool {
        self.0.load(SeqCst)
    }
}

/// Workers that send one streamed request after the other, each on a connection of its own.
pub struct Load {
    stop: Switch,
    workers: JoinSet<Vec<String>>,
}

impl Load {
    pub fn start(proxy: &Proxy, workers: usize) -> Self {
        let (stop, address) = (Switch::default(), proxy.address);
        let worker = |_| {
            let stop = stop.clone();
            async move {
                let mut answers = vec![];
                while !stop.is_on() {
                    let mut client = Client::connect(address).await;
                    client.send(&post(CHAT, &chat(true))).await;
                    answers.push(client.read_to_end().await);
                }
                answers
            }
        };
        let workers = (0..workers).map(worker).collect();
        Self { stop, workers }
    }

    /// Ends it; every answer.
    pub async fn end(self) -> Vec<String> {
        self.stop.on();
        let ended = tokio::time::timeout(PATIENCE, self.workers.join_all()).await;
        ended.expect("every request is answered").into_iter().flatten().collect()
    }
}

/// Answers that are not whole streams.
pub fn failures(answers: &[String]) -> Vec<&String> {
    answers.iter().filter(|answer| !answer.contains("[DONE]")).collect()
}

/// A streamed answer after a while.
pub fn after(ms: u64) -> Vec<Step> {
    vec![Step::Pause(Duration::from_millis(ms)), Step::Send(sse(&["token"]).into())]
}

pub fn send(answer: &str) -> Vec<Step> {
    vec![Step::Send(answer.into())]
}

pub fn ok() -> Vec<Step> {
    send(&json_answer("200 OK", "{}"))
}

pub fn broken() -> Vec<Step> {
    send(&json_answer("500 Internal Server Error", r#"{"error":{"message":"x","code":500}}"#))
}

pub fn is_probe(seen: &Seen) -> bool {
    seen.head.starts_with("get /health")
}
