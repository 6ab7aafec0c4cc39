//! What a run found, and how it is said.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    Plan,
    answer::ERROR_EVENT,
    stats::{Counts, Failed, Quantiles, Stats},
};

/// The part of a run that was measured: without the warm-up, and without the end in which nothing new was begun.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Window {
    /// When it began, ns of the machine's monotonic clock.
    pub began_ns: u64,
    /// When it ended.
    pub ended_ns: u64,
    /// Its length, s.
    pub seconds: f64,
    /// What happened in it.
    #[serde(flatten)]
    pub counts: Counts,
}

/// What a run found. Times and rates are those of the measured part ([`Window`]), `good`, `failed` and `tokens_verified` those
/// of all of it.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Concurrent streams; in the open loop the most that there might be.
    pub streams: u64,
    /// Tokens asked for in each request, unless they vary.
    pub tokens_per_request: u64,
    /// Wall time, s.
    pub elapsed_s: f64,
    /// Requests whose every token was right.
    pub good: u64,
    /// The others.
    pub failed: u64,
    /// Of the others: streams that said so themselves, by an error event. The rest were refused, cut, or wrong.
    pub error_events: u64,
    /// The others by kind.
    pub failures: BTreeMap<String, Failed>,
    /// Open loop: sessions that arrived.
    pub arrived: u64,
    /// Open loop: sessions that arrived while all places were taken and as many waited as may.
    pub not_sent: u64,
    /// Tokens of the good requests.
    pub tokens_verified: u64,
    /// These per second of wall time.
    pub tokens_per_s: f64,
    /// Good requests per second of wall time.
    pub requests_per_s: f64,
    /// Events of streams.
    pub events: u64,
    /// Bytes of response bodies.
    pub body_bytes: u64,
    /// Tokens per second that each stream should have got; 0 = not said.
    pub wanted_rate: f64,
    /// The measured part.
    pub window: Window,
    /// From the request to the first text; in the open loop from when it should have been sent.
    pub ttft: Quantiles,
    /// Open loop: from when it was sent.
    pub ttft_service: Option<Quantiles>,
    /// Between texts of one stream.
    pub inter_token: Quantiles,
    /// From the engine's writing of an event to its being here; none if engines do not tell it (`--sim-stamp`).
    pub one_way: Option<Quantiles>,
    /// From the request to the end; in the open loop from when it should have been sent.
    pub total: Quantiles,
    /// Open loop: from when it was sent.
    pub total_service: Option<Quantiles>,
    /// Open loop: from when requests should have been sent to when they were.
    pub late: Option<Quantiles>,
    /// CPU time of this process during the run, s.
    pub generator_cpu_s: f64,
    /// All counts at each second of the run.
    pub seconds: Vec<Counts>,
    /// Curves of percentiles, for plots: a name, and points of nines and ms.
    #[serde(skip)]
    pub(super) curves: Vec<(&'static str, Vec<(f64, f64)>)>,
}

impl Report {
    pub(super) fn new(plan: &Plan, stats: &Stats, ended_ns: u64, cpu_s: f64) -> Self {
        let seconds = |from_ns: u64, to_ns: u64| to_ns.saturating_sub(from_ns) as f64 / 1e9;
        let elapsed_s = seconds(plan.start_ns, ended_ns);
        let open = !plan.options.arrivals.is_closed();
        let (began_ns, measured_to_ns) = (plan.span.from_ns.min(ended_ns), plan.span.to_ns.min(ended_ns));
        let one_way = Some(stats.one_way.quantiles()).filter(|quantiles| quantiles.count > 0);
        let in_open = |quantiles: Quantiles| open.then_some(quantiles);
        Self {
            streams: if open { plan.options.max_in_flight } else { plan.options.streams },
            tokens_per_request: plan.options.tokens,
            elapsed_s,
            good: stats.all.good,
            failed: stats.all.failed,
            error_events: stats.failures.get(ERROR_EVENT).map_or(0, |f| f.count),
            failures: stats.failures.clone(),
            arrived: stats.arrived,
            not_sent: stats.not_sent,
            tokens_verified: stats.tokens,
            tokens_per_s: stats.tokens as f64 / elapsed_s,
            requests_per_s: stats.all.good as f64 / elapsed_s,
            events: stats.all.events,
            body_bytes: stats.all.bytes,
            wanted_rate: plan.options.rate,
            window: Window {
                began_ns,
                ended_ns: measured_to_ns,
                seconds: seconds(began_ns, measured_to_ns),
                counts: stats.measured,
            },
            ttft: stats.ttft.quantiles(),
            ttft_service: in_open(stats.ttft_service.quantiles()),
            inter_token: stats.gap.quantiles(),
            one_way,
            total: stats.total.quantiles(),
            total_service: in_open(stats.total_service.quantiles()),
            late: in_open(stats.late.quantiles()),
            generator_cpu_s: cpu_s,
            seconds: stats.seconds.clone(),
            curves: vec![
                ("ttft", stats.ttft.curve()),
                ("inter-token", stats.gap.curve()),
                ("one-way", stats.one_way.curve()),
                ("total", stats.total.curve()),
            ],
        }
    }

    /// True if something was done and all of it was right.
    pub const fn is_good(&self) -> bool {
        self.good > 0 && self.failed == 0
    }

    /// One line of JSON.
    pub fn json(&self) -> String {
        serde_json::to_string(self).unwrap_or_else(|e| format!("{{\"error\":\"{e}\"}}"))
    }

    /// The times by their names; those that were not measured are missing.
    pub(super) fn times(&self) -> Vec<(&'static str, Quantiles)> {
        let all = [
            ("ttft", Some(self.ttft)),
            ("  as sent", self.ttft_service),
            ("inter-token", Some(self.inter_token)),
            ("one-way", self.one_way),
            ("total", Some(self.total)),
            ("  as sent", self.total_service),
            ("sent late", self.late),
        ];
        all.into_iter().filter_map(|(name, quantiles)| Some((name, quantiles?))).collect()
    }

    /// What it did, in lines of a name and words.
    pub(super) fn facts(&self) -> Vec<(&'static str, String)> {
        let mut wanted = String::new();
        if self.wanted_rate > 0.0 {
            wanted = format!(", {:.0}/s wanted", self.wanted_rate * self.streams as f64);
        }
        let mut facts = vec![
            (
                "requests",
                format!("{} good, {} failed ({:.1}/s)", self.good, self.failed, self.requests_per_s),
            ),
            ("tokens", format!("{} verified ({:.0}/s{wanted})", self.tokens_verified, self.tokens_per_s)),
        ];
        if self.late.is_some() {
            facts.push(("sessions", format!("{} arrived, {} not sent", self.arrived, self.not_sent)));
        }
        let Window { seconds, counts, .. } = self.window;
        let rate = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        let (requests, events) = (rate(counts.good), rate(counts.events));
        facts.push(("measured", format!("{seconds:.2} s, {requests:.1} requests/s, {events:.0} events/s")));
        let mut cpu = format!("{:.2} s of CPU", self.generator_cpu_s);
        if self.events > 0 {
            cpu.push_str(&format!(", {:.1} µs an event", self.generator_cpu_s * 1e6 / self.events as f64));
        }
        facts.push(("generator", cpu));
        if self.one_way.is_none() && self.events > 0 {
            facts.push(("one-way", "not measured: events do not say when they were written".into()));
        }
        facts
    }

    /// For a human.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{} streams, {} tokens each, {:.2} s\n",
            self.streams, self.tokens_per_request, self.elapsed_s
        );
        for (name, fact) in self.facts() {
            text.push_str(&format!("{name:<10} {fact}\n"));
        }
        text.push_str("\n              p50        p90        p99      p99.9        max   (ms)\n");
        for (name, q) in self.times() {
            let ms = milliseconds(&q).map(|ms| format!("{ms:10.3}"));
            text.push_str(&format!("{name:<11}{}\n", ms.join(" ")));
        }
        for (kind, failure) in &self.failures {
            text.push_str(&format!("failed: {kind} × {}: {}\n", failure.count, failure.example));
        }
        text
    }

    /// Tables in Markdown.
    pub fn markdown(&self) -> String {
        let mut text = String::from("| what | |\n|---|---|\n");
        let about =
            format!("{} of {} tokens, {:.2} s", self.streams, self.tokens_per_request, self.elapsed_s);
        text.push_str(&format!("| streams | {about} |\n"));
        for (name, fact) in self.facts() {
            text.push_str(&format!("| {name} | {fact} |\n"));
        }
        for (kind, failure) in &self.failures {
            let example = failure.example.replace('|', "\\|").replace(['\n', '\r'], " ");
            text.push_str(&format!("| failed: {kind} | {}, the first: {example} |\n", failure.count));
        }
        text.push_str("\n| ms | p50 | p90 | p99 | p99.9 | max |\n|---|---|---|---|---|---|\n");
        for (name, q) in self.times() {
            let ms = milliseconds(&q).map(|ms| format!("{ms:.3}"));
            text.push_str(&format!("| {} | {} |\n", name.trim(), ms.join(" | ")));
        }
        text
    }
}

/// The percentiles in ms.
pub(super) fn milliseconds(q: &Quantiles) -> [f64; 5] {
    [q.p50_us, q.p90_us, q.p99_us, q.p999_us, q.max_us].map(|us| us as f64 / 1e3)
}
