//! The shell around [`progress`](super::progress): readings in, canaries out, and the end of waiting when the engine is wedged.
//!
//! A canary is a completion of one token, asked by the agent itself of an engine that shows no progress, and never of one
//! that does. Its request id begins with [`ID_PREFIX`]. It is counted apart (`penstock_agent_engine_canaries_total`), and taken
//! out of the load that proxies and the autoscaler are told of: else an idle model would never be idle. Not taken out are the
//! engine's own totals (`vllm:request_success_total`: one with finish reason "length" for each) and its mean time to the first
//! token, where a canary is one request among others.

use std::{
    future::Future,
    pin::Pin,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::time::{MissedTickBehavior, interval};

use super::{
    context::Context,
    load::{Load, Scrape},
    probe::Target,
    progress::{Limits, Progress, Verdict},
};

/// What a canary's request id begins with.
const ID_PREFIX: &str = "penstock-canary";
/// How often the clock is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// Longest wait for a canary; the verdict comes long before.
const LONGEST: Duration = Duration::from_secs(3_600);

/// One that is out.
type Canary<'a> = Pin<Box<dyn Future<Output = Result<(), String>> + Send + 'a>>;

/// One engine's progress, shared by the loops that watch it.
#[derive(Debug)]
pub(crate) struct Pulse {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    progress: Progress,
    is_out: bool,
    /// When the last canary came back.
    back: Option<Instant>,
}

/// An engine, and whom to ask in it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Subject<'a> {
    /// Its replica.
    pub(crate) replica_id: &'a str,
    /// Its server.
    pub(crate) target: &'a Target,
    /// The name that it serves.
    pub(crate) model: &'a str,
}

impl Pulse {
    /// Of an engine that has just completed a request.
    pub(crate) fn new(limits: Limits) -> Self {
        let progress = Progress::new(limits, Instant::now());
        Self { inner: Mutex::new(Inner { progress, is_out: false, back: None }) }
    }

    /// Takes a reading in that was begun at `began`. The load that clients make: without our own request.
    pub(crate) fn read(&self, scrape: &Scrape, began: Instant) -> Option<Load> {
        let mut inner = self.lock();
        inner.progress.read(scrape.figures, Instant::now());
        // It may have been answered between the engine's telling and our hearing.
        let has_ours = inner.is_out || inner.back.is_some_and(|back| back >= began);
        scrape.load.map(|load| if has_ours { load.less_one() } else { load })
    }

    /// The last evidence that the engine gets on.
    pub(crate) fn moved(&self) -> Instant {
        self.lock().progress.moved()
    }

    /// Returns, with the reason, when the engine gets nowhere.
    pub(crate) async fn until_wedged(&self, cx: &Context, subject: Subject<'_>) -> String {
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut out: Option<Canary<'_>> = None;
        let mut asked = 0_u64;
        loop {
            let answer = async {
                match out.as_mut() {
                    Some(canary) => canary.await,
                    None => std::future::pending().await,
                }
            };
            // The answer first: it must not be overlooked because the time was up as well.
            tokio::select! {
                biased;
                answer = answer => {
                    out = None;
                    self.came_back(cx, subject, answer);
                }
                _ = ticks.tick() => {}
            }
            let verdict = self.lock().progress.look(Instant::now());
            match verdict {
                Verdict::Fine => {}
                Verdict::Ask => {
                    asked += 1;
                    let id = format!("{ID_PREFIX}-{}-{asked}", subject.replica_id);
                    tracing::debug!(replica = subject.replica_id, id, "no progress: asking for one token");
                    self.lock().is_out = true;
                    out = Some(Box::pin(async move {
                        cx.probe.canary(subject.target, subject.model, &id, LONGEST).await
                    }));
                }
                Verdict::TakeBack => {
                    out = None;
                    self.is_back();
                    cx.metrics.canary("taken_back");
                }
                Verdict::Wedged(reason) => {
                    cx.metrics.canary("unanswered");
                    cx.metrics.wedges.inc();
                    return reason;
                }
            }
        }
    }

    fn came_back(&self, cx: &Context, subject: Subject<'_>, answer: Result<(), String>) {
        self.is_back();
        self.lock().progress.returned(answer.is_ok(), Instant::now());
        match answer {
            Ok(()) => cx.metrics.canary("answered"),
            Err(reason) => {
                cx.metrics.canary("failed");
                tracing::warn!(replica = subject.replica_id, reason, "a canary failed");
            }
        }
    }

    fn is_back(&self) {
        let mut inner = self.lock();
        (inner.is_out, inner.back) = (false, Some(Instant::now()));
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{load, progress::Limits};

    #[test]
    fn a_canary_is_no_load_until_a_reading_was_begun_after_its_return() {
        let limits = Limits { canary: Duration::from_secs(15), wedge: Duration::from_secs(30) };
        let pulse = Pulse::new(limits);
        let scrape = load::parse("vllm:num_requests_running 1\nvllm:num_requests_waiting 0\n");
        let running = |began: Instant| pulse.read(&scrape, began).unwrap().running;
        let before = Instant::now();
        assert_eq!(running(before), 1);
        pulse.lock().is_out = true;
        assert_eq!(running(before), 0);
        pulse.is_back();
        assert_eq!(running(before), 0);
        let back = pulse.lock().back.unwrap();
        assert_eq!(running(back + Duration::from_millis(1)), 1);
    }
}
