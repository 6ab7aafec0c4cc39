//! The generator beside the measurement: a thread of its own with a runtime of its own, so that neither waits for the other.
//!
//! It shares a process with the benchmark and with nothing that is measured.

use std::{collections::BTreeMap, thread::JoinHandle, time::Duration};

use tokio::{sync::oneshot, task::JoinSet};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    cell::{Shape, Unit},
    results::{Latency, Sample},
};
use crate::load;

/// What is asked for, and where.
#[derive(Debug, Clone)]
pub(super) struct Target {
    /// One for a gateway; several are loaded side by side, each with a share of the streams.
    pub(super) urls: Vec<String>,
    pub(super) model: String,
    pub(super) api_key: Option<String>,
}

/// A load under way; it ends with this.
pub(super) struct Loading {
    reports: oneshot::Receiver<Result<Vec<load::Report>, String>>,
    thread: JoinHandle<()>,
    _cancel: DropGuard,
}

/// The generators' options for `shape`, one for each URL.
pub(super) fn options(shape: &Shape, target: &Target) -> Vec<load::Options> {
    let count = u32::try_from(target.urls.len()).unwrap_or(1).max(1);
    let each = target.urls.iter().zip(0u32..).map(|(url, index)| {
        // The first ones take what is left over.
        let streams = shape.streams / count + u32::from(index < shape.streams % count);
        load::Options {
            url: url.clone(),
            model: target.model.clone(),
            streams: streams.max(1).into(),
            tokens: shape.tokens.into(),
            duration_s: shape.duration_s.unwrap_or(0.0),
            connect_ramp_ms: Duration::from_secs_f64(shape.ramp_s).as_millis() as u64,
            prompt_bytes: shape.prompt_bytes,
            unary: shape.unary,
            seed: index.into(),
            api_key: target.api_key.clone(),
            idle_timeout_s: 30.0,
            ..load::Options::default()
        }
    });
    each.collect()
}

/// Begins the load.
pub(super) fn start(shape: &Shape, target: &Target) -> Result<Loading, String> {
    let all = options(shape, target);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| format!("cannot start the generator: {e}"))?;
    let (done, reports) = oneshot::channel();
    let cancel = CancellationToken::new();
    let cancelled = cancel.clone();
    let work = async move {
        let mut running = JoinSet::new();
        for options in all {
            running.spawn(load::run(options));
        }
        let mut reports = Vec::new();
        while let Some(ended) = running.join_next().await {
            match ended {
                Ok(Ok(report)) => reports.push(report),
                Ok(Err(e)) => return Err(e.to_string()),
                Err(e) => return Err(e.to_string()),
            }
        }
        Ok(reports)
    };
    let thread = std::thread::Builder::new().name("generator".into()).spawn(move || {
        runtime.block_on(async move {
            tokio::select! {
                // Whoever asked may have left.
                reports = work => done.send(reports).map_or((), drop),
                () = cancelled.cancelled() => {}
            }
        });
    });
    let thread = thread.map_err(|e| format!("cannot start the generator: {e}"))?;
    Ok(Loading { reports, thread, _cancel: cancel.drop_guard() })
}

impl Loading {
    /// Waits for its end, for so long.
    pub(super) async fn end(mut self, patience: Duration) -> Result<Vec<load::Report>, String> {
        let ended = tokio::time::timeout(patience, &mut self.reports).await;
        let reports =
            ended.map_err(|_| format!("the load did not end within {:.0} s", patience.as_secs_f64()))?;
        let reports = reports.map_err(|_| "the generator is gone".to_owned())??;
        // It has said its last.
        self.thread.join().map_err(|_| "the generator panicked".to_owned())?;
        Ok(reports)
    }

    /// Whether it has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }
}

/// Adds what the generators say to `sample`.
pub(super) fn note(sample: &mut Sample, unit: Unit, reports: &[load::Report]) {
    let mut failures: BTreeMap<String, (u64, String)> = BTreeMap::new();
    for report in reports {
        sample.good += report.good;
        sample.failed += report.failed;
        for (kind, failure) in &report.failures {
            failures.entry(kind.clone()).or_insert((0, failure.example.clone())).0 += failure.count;
        }
    }
    sample.failures = failures;
    let latencies: Vec<Latency> = reports.iter().filter_map(|report| latency(report, unit)).collect();
    sample.latency = Latency::mean(&latencies);
}

/// What clients waited for.
fn latency(report: &load::Report, unit: Unit) -> Option<Latency> {
    let quantiles = match unit {
        Unit::Request => &report.total,
        Unit::Event | Unit::Stream => return None,
    };
    let some = quantiles.count > 0;
    some.then(|| Latency { p50_us: quantiles.p50_us as f64, p99_us: quantiles.p99_us as f64 })
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            cell::{Cell, Scale},
            peer::Peer,
        },
        *,
    };

    fn target(urls: &[&str]) -> Target {
        let urls = urls.iter().map(|url| (*url).to_owned()).collect();
        Target { urls, model: "m".into(), api_key: Some("k".into()) }
    }

    #[test]
    fn engines_without_a_gateway_share_the_streams() {
        let scale = Scale { seconds: 1.0, divisor: 1, most_streams: 1_002 };
        let shape = Cell::Paced10k.shape(Peer::Direct, scale);
        let all = options(&shape, &target(&["http://a:1", "http://a:2", "http://a:3", "http://a:4"]));
        assert_eq!(all.iter().map(|one| one.streams).collect::<Vec<_>>(), [251, 251, 250, 250]);
        assert_eq!(all.iter().map(|one| one.seed).collect::<Vec<_>>(), [0, 1, 2, 3]);
        let one = options(&shape, &target(&["http://a:1"]));
        assert_eq!((one[0].streams, one[0].connect_ramp_ms, one[0].duration_s), (1_002, 501, 0.0));
        assert_eq!(one[0].api_key.as_deref(), Some("k"));
    }

    #[tokio::test]
    async fn a_load_on_nobody_fails_and_one_that_is_left_ends() {
        let scale = Scale { seconds: 0.5, divisor: 64, most_streams: 10 };
        let shape = Cell::Unary.shape(Peer::Direct, scale);
        let loading = start(&shape, &target(&["http://127.0.0.1:9"])).unwrap();
        let mut sample = Sample::default();
        note(&mut sample, Unit::Request, &loading.end(Duration::from_secs(60)).await.unwrap());
        assert!(sample.good == 0 && sample.failures["connect"].0 == sample.failed && sample.failed > 0);
        assert_eq!(sample.latency, None);
        let left =
            start(&Shape { duration_s: Some(1e6), ..shape }, &target(&["http://127.0.0.1:9"])).unwrap();
        assert!(!left.has_ended());
        let late = left.end(Duration::from_millis(10)).await.unwrap_err();
        assert!(late.contains("did not end"), "{late}");
        assert!(start(&shape, &target(&["ftp://x"])).unwrap().end(Duration::from_secs(60)).await.is_err());
    }
}
