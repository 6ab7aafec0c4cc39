//! The load: the generator, with threads of its own, beside the measurement. It shares a process with the benchmark and with
//! nothing that is measured.

use std::{collections::BTreeMap, time::Duration};

use tokio::task::JoinSet;

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
    running: JoinSet<Result<load::Report, load::LoadError>>,
    ended: Vec<load::Report>,
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
            warmup_s: shape.warmup_s(),
            connect_ramp_ms: Duration::from_secs_f64(shape.ramp_s * 1e3).as_secs(),
            prompt_bytes: shape.prompt_bytes,
            unary: shape.unary,
            seed: index.into(),
            api_key: target.api_key.clone(),
            http2: shape.tls_h2.is_some(),
            streams_per_connection: shape.tls_h2.unwrap_or(1).into(),
            // The certificate is as old as the gateway.
            insecure: shape.tls_h2.is_some(),
            quiet: true,
            idle_timeout_s: 30.0,
            ..load::Options::default()
        }
    });
    each.collect()
}

/// Begins the load.
pub(super) fn start(shape: &Shape, target: &Target) -> Loading {
    let mut running = JoinSet::new();
    for options in options(shape, target) {
        running.spawn(load::run(options));
    }
    Loading { running, ended: Vec::new() }
}

impl Loading {
    /// Waits for its end.
    async fn all(&mut self) -> Result<(), String> {
        while let Some(ended) = self.running.join_next().await {
            let report = ended.map_err(|e| format!("the generator: {e}"))?;
            self.ended.push(report.map_err(|e| e.to_string())?);
        }
        Ok(())
    }

    /// Waits for its end, for so long.
    pub(super) async fn end(mut self, patience: Duration) -> Result<Vec<load::Report>, String> {
        let ended = tokio::time::timeout(patience, self.all()).await;
        ended.map_err(|_| format!("the load did not end within {:.0} s", patience.as_secs_f64()))??;
        Ok(self.ended)
    }

    /// Waits for so long; whether it has ended meanwhile.
    ///
    /// # Errors
    /// It could not begin, or broke.
    pub(super) async fn ends_within(&mut self, time: Duration) -> Result<bool, String> {
        match tokio::time::timeout(time, self.all()).await {
            Ok(ended) => ended.map(|()| true),
            Err(_) => Ok(false),
        }
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
        Unit::Request => report.total,
        Unit::Event => report.one_way?,
        Unit::Stream => return None,
    };
    let some = quantiles.count > 0;
    some.then_some(Latency { p50_us: quantiles.p50_us as f64, p99_us: quantiles.p99_us as f64 })
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
        assert_eq!((one[0].streams, one[0].connect_ramp_ms, one[0].duration_s), (1_002, 668, 0.0));
        assert_eq!(one[0].api_key.as_deref(), Some("k"));
    }

    #[tokio::test]
    async fn a_load_on_nobody_fails_and_one_that_is_left_ends() {
        let scale = Scale { seconds: 0.5, divisor: 64, most_streams: 10 };
        let shape = Cell::Unary.shape(Peer::Direct, scale);
        let loading = start(&shape, &target(&["http://127.0.0.1:9"]));
        let mut sample = Sample::default();
        note(&mut sample, Unit::Request, &loading.end(Duration::from_secs(60)).await.unwrap());
        assert!(sample.good == 0 && sample.failures["connect"].0 == sample.failed && sample.failed > 0);
        assert_eq!(sample.latency, None);
        let endless = Shape { duration_s: Some(1e6), ..shape };
        let mut left = start(&endless, &target(&["http://127.0.0.1:9"]));
        assert_eq!(left.ends_within(Duration::from_millis(10)).await, Ok(false));
        let late = left.end(Duration::from_millis(10)).await.unwrap_err();
        assert!(late.contains("did not end"), "{late}");
        let mut wrong = start(&shape, &target(&["ftp://x"]));
        assert!(wrong.ends_within(Duration::from_secs(60)).await.unwrap_err().contains("ftp://x"));
    }
}
