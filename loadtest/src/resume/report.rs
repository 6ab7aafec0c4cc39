//! Adding up the windows, and saying what came out.

use std::{collections::BTreeMap, time::Duration};

use super::{Kind, Options};

/// One window.
#[derive(Debug, Clone)]
pub(super) struct Window {
    pub(super) took: Duration,
    /// CPU time of the proxy.
    pub(super) cpu: Duration,
    /// Events relayed to clients, or whole answers.
    pub(super) events: u64,
    pub(super) streams: u64,
    /// What it had at most, beyond what it had before.
    pub(super) memory_bytes: u64,
}

impl Window {
    fn cpu_us(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.events as f64
    }

    fn rate(&self) -> f64 {
        self.events as f64 / self.took.as_secs_f64()
    }

    fn stream_kib(&self) -> f64 {
        self.memory_bytes as f64 / 1024.0 / self.streams as f64
    }

    /// One line of progress.
    pub(super) fn text(&self) -> String {
        format!("{:.2} µs of CPU for each, {:.0}/s", self.cpu_us(), self.rate())
    }
}

/// All windows, by kind and whether they were paced.
#[derive(Debug, Default)]
pub(super) struct Figures {
    windows: BTreeMap<(bool, Kind), Vec<Window>>,
}

impl Figures {
    pub(super) fn add(&mut self, kind: Kind, paced: bool, window: Window) {
        self.windows.entry((paced, kind)).or_default().push(window);
    }

    /// The smallest, the middle and the largest value of windows of one kind.
    fn spread(&self, kind: Kind, paced: bool, of: impl Fn(&Window) -> f64) -> [f64; 3] {
        let windows = self.windows.get(&(paced, kind)).map(Vec::as_slice).unwrap_or_default();
        let mut values: Vec<f64> = windows.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        [at(0), at(values.len() / 2), at(values.len().saturating_sub(1))]
    }

    /// The tables.
    pub(super) fn text(&self, options: &Options) -> String {
        let mut text = format!(
            "{} rounds; the middle of each, the smallest and the largest behind it\n\n\
             | {} streams of {} tokens at {} a second | CPU of an event | added | memory of a stream | added |\n\
             |---|---|---|---|---|\n",
            options.rounds, options.streams, options.tokens, options.events_per_s
        );
        let [_, cpu_off, _] = self.spread(Kind::Off, true, Window::cpu_us);
        let [_, memory_off, _] = self.spread(Kind::Off, true, Window::stream_kib);
        for kind in Kind::STREAMS {
            let [least, cpu, most] = self.spread(kind, true, Window::cpu_us);
            let [_, memory, _] = self.spread(kind, true, Window::stream_kib);
            text += &format!(
                "| {} | {cpu:.2} µs ({least:.2} to {most:.2}) | {:+.2} µs, {:+.1} % | {memory:.1} KiB | {:+.1} KiB |\n",
                kind.name(),
                cpu - cpu_off,
                (cpu / cpu_off - 1.0) * 100.0,
                memory - memory_off,
            );
        }
        text += &format!(
            "\n| {} streams of {} tokens at full speed | CPU of an event | added | events/s |\n|---|---|---|---|\n",
            options.fast_streams, options.fast_tokens
        );
        let [_, cpu_off, _] = self.spread(Kind::Off, false, Window::cpu_us);
        for kind in Kind::STREAMS {
            let [least, cpu, most] = self.spread(kind, false, Window::cpu_us);
            let [_, rate, _] = self.spread(kind, false, Window::rate);
            text += &format!(
                "| {} | {cpu:.2} µs ({least:.2} to {most:.2}) | {:+.2} µs, {:+.1} % | {rate:.0} |\n",
                kind.name(),
                cpu - cpu_off,
                (cpu / cpu_off - 1.0) * 100.0,
            );
        }
        text += &format!(
            "\n| {} whole answers of {} tokens by {} clients | CPU of an answer | answers/s |\n|---|---|---|\n",
            options.answers,
            super::ANSWER_TOKENS,
            options.fast_streams
        );
        for kind in Kind::ANSWERS {
            let [least, cpu, most] = self.spread(kind, false, Window::cpu_us);
            let [_, rate, _] = self.spread(kind, false, Window::rate);
            text += &format!("| {} | {cpu:.0} µs ({least:.0} to {most:.0}) | {rate:.0} |\n", kind.name());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn windows_are_compared_by_their_middles() {
        let mut figures = Figures::default();
        for (kind, micros) in [(Kind::Off, [900, 1_000, 5_000]), (Kind::On, [1_100, 1_050, 1_000])] {
            for cpu in micros {
                let window = Window {
                    took: Duration::from_secs(1),
                    cpu: Duration::from_micros(cpu * 100),
                    events: 10_000,
                    streams: 10,
                    memory_bytes: cpu << 10,
                };
                figures.add(kind, true, window);
            }
        }
        let options = Options::parse_from(["bench", "--proxy=p", "--engine-sim=e"]);
        let text = figures.text(&options);
        assert!(
            text.contains("| resume off | 10.00 µs (9.00 to 50.00) | +0.00 µs, +0.0 % | 100.0 KiB |"),
            "{text}"
        );
        assert!(
            text.contains("| resume on | 10.50 µs (10.00 to 11.00) | +0.50 µs, +5.0 % | 105.0 KiB | +5.0"),
            "{text}"
        );
    }
}
