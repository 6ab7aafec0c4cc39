//! Adding up the windows, and saying what came out.

use std::time::Duration;

use hdrhistogram::Histogram;

use super::{Options, stream::histogram};

/// One window.
pub(super) struct Window {
    pub(super) took: Duration,
    /// CPU time of the proxy.
    pub(super) cpu: Duration,
    pub(super) updates: u64,
    /// Of events, in microseconds.
    pub(super) delays: Histogram<u64>,
}

/// All windows of one kind.
struct Windows {
    took: Duration,
    cpu: Duration,
    updates: u64,
    delays: Histogram<u64>,
}

impl Default for Windows {
    fn default() -> Self {
        Self { took: Duration::ZERO, cpu: Duration::ZERO, updates: 0, delays: histogram() }
    }
}

/// How long updates took from their making, in microseconds.
pub(super) struct Convergence {
    pub(super) pushes: u64,
    acked: Histogram<u64>,
    in_use: Histogram<u64>,
    missing: u64,
}

impl Default for Convergence {
    fn default() -> Self {
        Self { pushes: 0, acked: histogram(), in_use: histogram(), missing: 0 }
    }
}

impl Convergence {
    pub(super) fn note(&mut self, acked: Option<Duration>, in_use: Option<Duration>) {
        for (time, into) in [(acked, &mut self.acked), (in_use, &mut self.in_use)] {
            match time {
                Some(time) => {
                    into.saturating_record(u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1))
                }
                None => self.missing += 1,
            }
        }
    }
}

/// What came out.
#[derive(Default)]
pub(super) struct Figures {
    without: Windows,
    with: Windows,
    pub(super) converged: Convergence,
    pub(super) memory_bytes: u64,
    /// Why streams ended that should not have.
    pub(super) broken: Vec<String>,
}

impl Figures {
    pub(super) fn add(&mut self, updates: bool, window: &Window) {
        let sum = if updates { &mut self.with } else { &mut self.without };
        sum.took += window.took;
        sum.cpu += window.cpu;
        sum.updates += window.updates;
        // Both have the same bounds.
        sum.delays.add(&window.delays).unwrap_or_default();
    }

    /// Whether every stream lived and every update arrived.
    pub(super) fn is_good(&self) -> bool {
        self.broken.is_empty() && self.converged.missing == 0
    }

    pub(super) fn text(&self, options: &Options) -> String {
        let row = |name: &str, windows: &Windows| {
            let seconds = windows.took.as_secs_f64().max(f64::MIN_POSITIVE);
            format!(
                "| {name} | {:.0} | {:.0} | {} | {} | {} | {:.0} % |\n",
                windows.updates as f64 / seconds,
                windows.delays.len() as f64 / seconds,
                ms(windows.delays.value_at_quantile(0.5)),
                ms(windows.delays.value_at_quantile(0.99)),
                ms(windows.delays.value_at_quantile(0.999)),
                100.0 * windows.cpu.as_secs_f64() / seconds,
            )
        };
        let line = |name: &str, times: &Histogram<u64>| {
            format!(
                "| {name} | {} | {} | {} |\n",
                ms(times.value_at_quantile(0.5)),
                ms(times.value_at_quantile(0.99)),
                ms(times.max())
            )
        };
        let mut text = format!(
            "{} endpoints in {} pools, {} streams of {} events a second, {} pairs of windows of {} s, updates gathered for {} ms\n\n",
            options.endpoints,
            options.pools,
            options.streams,
            options.events_per_s,
            options.rounds,
            options.window_s,
            options.coalesce_ms,
        );
        text += "| windows | updates/s | events/s | delay p50 | p99 | p99.9 | CPU of the proxy |\n|---|---|---|---|---|---|---|\n";
        text += &row("without updates", &self.without);
        text += &row("with updates", &self.with);
        text += &format!(
            "\n| {} updates in {} pushes | p50 | p99 | longest |\n|---|---|---|---|\n",
            self.with.updates, self.converged.pushes
        );
        text += &line("made to acknowledged", &self.converged.acked);
        text += &line("made to in use", &self.converged.in_use);
        text += &format!("\nmemory of the proxy: {} MiB\n", self.memory_bytes >> 20);
        if self.converged.missing > 0 {
            text += &format!("NOT GOOD: {} updates were not seen to arrive\n", self.converged.missing);
        }
        if let Some(why) = self.broken.first() {
            text += &format!("NOT GOOD: {} streams ended; one because {why}\n", self.broken.len());
        }
        text
    }
}

fn ms(micros: u64) -> String {
    format!("{:.2} ms", micros as f64 / 1e3)
}
