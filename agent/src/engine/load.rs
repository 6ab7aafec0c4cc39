//! What an engine says of its load in `/metrics` (Prometheus text).
//!
//! A pure reader of the few figures we need, tolerant of labels, of several engine cores behind one server (their counts
//! are added, the fullest cache counts) and of names that changed between vLLM versions: [`WANTED`] is the table of them. A
//! line it cannot read is skipped: an odd line must not cost the figures of the others. A figure that is not there is named
//! in [`Scrape::missing`], which is shown and alarmed about: routing and liveness by progress work without it, but worse.

use super::{progress::Figures, ttft::FirstTokens};

/// Waiting and running requests, and how full the KV cache is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Load {
    /// Requests being generated.
    pub(crate) running: u32,
    /// Requests in the engine's queue.
    pub(crate) waiting: u32,
    /// Share of the KV cache in use, 0.0 to 1.0.
    pub(crate) kv_used_ratio: f32,
    /// Its counters of first tokens, if it has them.
    pub(crate) first_tokens: Option<FirstTokens>,
}

/// A difference in KV use below this is none.
const KV_STEP: f32 = 0.01;

impl Load {
    /// Whether it is worth telling to somebody who knows `before`.
    pub(crate) fn differs(&self, before: &Self) -> bool {
        (self.running, self.waiting) != (before.running, before.waiting)
            || (self.kv_used_ratio - before.kv_used_ratio).abs() >= KV_STEP
    }

    /// Without one request, which was ours.
    pub(crate) fn less_one(self) -> Self {
        let (running, waiting) = match self.running {
            0 => (0, self.waiting.saturating_sub(1)),
            n => (n - 1, self.waiting),
        };
        Self { running, waiting, ..self }
    }
}

/// How the values of several engine cores become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Several {
    Add,
    Most,
}

/// A figure that is looked for, and what it is called: the present name first, then older ones.
struct Wanted {
    names: &'static [&'static str],
    several: Several,
    /// Not counted with this label.
    without: Option<&'static str>,
}

const fn sum(names: &'static [&'static str]) -> Wanted {
    Wanted { names, several: Several::Add, without: None }
}

/// Positions in [`WANTED`].
const RUNNING: usize = 0;
const WAITING: usize = 1;
const KV_USED: usize = 2;
const FIRST_TOKENS: usize = 3;
const FIRST_TOKEN_SECONDS: usize = 4;
const GENERATED: usize = 5;
const PROMPTS: usize = 6;
const ITERATIONS: usize = 7;
const ENDED: usize = 8;
const TOKEN_GAPS: usize = 9;

/// Every figure that is used, by the names it has had. Histograms are read by their `_sum` and `_count`.
const WANTED: [Wanted; 10] = [
    sum(&["vllm:num_requests_running"]),
    sum(&["vllm:num_requests_waiting"]),
    // Renamed in 0.9.2; the old name went with 0.12.
    Wanted {
        names: &["vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"],
        several: Several::Most,
        without: None,
    },
    sum(&["vllm:time_to_first_token_seconds_count"]),
    sum(&["vllm:time_to_first_token_seconds_sum"]),
    sum(&["vllm:generation_tokens_total"]),
    sum(&["vllm:prompt_tokens_total"]),
    // Since 0.6.5.
    sum(&["vllm:iteration_tokens_total_count"]),
    // A client that leaves is counted by the API server, whatever its core does.
    Wanted {
        names: &["vllm:request_success_total"],
        several: Several::Add,
        without: Some("finished_reason=\"abort\""),
    },
    // Renamed in 0.10.2; the old name went with 0.13.
    sum(&["vllm:inter_token_latency_seconds_count", "vllm:time_per_output_token_seconds_count"]),
];

/// The names of all figures that are looked for, as the present vLLM has them.
pub(crate) fn wanted() -> impl Iterator<Item = &'static str> {
    WANTED.iter().filter_map(|wanted| wanted.names.first().copied())
}

/// What one reading of `/metrics` holds.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Scrape {
    /// The load, if it says how many requests run and wait. Without a KV figure that is 0: engines without such a cache
    /// are engines too.
    pub(crate) load: Option<Load>,
    /// What it says of progress.
    pub(crate) figures: Figures,
    /// Figures that it lacks, by their present names.
    pub(crate) missing: Vec<&'static str>,
}

/// Reads a scrape's text. A figure that is told by its present name and by an older one counts once, by the present one.
pub(crate) fn parse(text: &str) -> Scrape {
    let mut found: [Option<(usize, f64)>; WANTED.len()] = [None; WANTED.len()];
    for (name, labels, value) in text.lines().filter_map(sample) {
        let position = |wanted: &Wanted| wanted.names.iter().position(|n| *n == name);
        let hit = WANTED.iter().zip(&mut found).find_map(|(w, found)| Some((w, found, position(w)?)));
        let Some((wanted, found, age)) = hit else { continue };
        let counts = wanted.without.is_none_or(|label| !labels.contains(label));
        let value = if counts { value } else { 0.0 };
        *found = Some(match *found {
            Some((known, before)) if known == age => match wanted.several {
                Several::Add => (age, before + value),
                Several::Most => (age, before.max(value)),
            },
            Some((known, before)) if known < age => (known, before),
            _ => (age, value),
        });
    }
    let value = |at: usize| found.get(at).copied().flatten().map(|(_, value)| value);
    let (running, waiting) = (value(RUNNING).map(count), value(WAITING).map(count));
    let kv_used_ratio = value(KV_USED).map(ratio);
    let ttft = value(FIRST_TOKENS).zip(value(FIRST_TOKEN_SECONDS));
    let first_tokens = ttft.map(|(requests, seconds)| FirstTokens { requests, seconds });
    let load = running.zip(waiting).map(|(running, waiting)| Load {
        running,
        waiting,
        kv_used_ratio: kv_used_ratio.unwrap_or(0.0),
        first_tokens,
    });
    let figures = Figures {
        running,
        waiting,
        kv_used_ratio,
        generated: value(GENERATED),
        prompts: value(PROMPTS),
        iterations: value(ITERATIONS),
        ended: value(ENDED),
        token_gaps: value(TOKEN_GAPS),
    };
    let missing = wanted().zip(&found).filter(|(_, found)| found.is_none()).map(|(name, _)| name).collect();
    Scrape { load, figures, missing }
}

/// Name, labels and value of a sample line; `None` for comments, blank lines, and values that are no figure.
fn sample(line: &str) -> Option<(&str, &str, f64)> {
    let line = line.trim();
    let name_end = line.find(['{', ' ', '\t'])?;
    let (name, rest) = line.split_at_checked(name_end)?;
    if name.is_empty() || name.starts_with('#') {
        return None;
    }
    let labels = if rest.starts_with('{') { labels_end(rest)? } else { 0 };
    let (labels, rest) = rest.split_at_checked(labels)?;
    let value: f64 = rest.split_ascii_whitespace().next()?.parse().ok()?;
    (value.is_finite() && value >= 0.0).then_some((name, labels, value))
}

/// Where the text behind the label set begins. Label values are quoted and may hold anything, '}' included.
fn labels_end(text: &str) -> Option<usize> {
    let (mut quoted, mut escaped) = (false, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'}' if !quoted => return Some(at + 1),
            _ => {}
        }
    }
    None
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "`as` saturates, and the value is >= 0"
)]
fn count(value: f64) -> u32 {
    value.round() as u32
}

#[allow(clippy::cast_possible_truncation, reason = "a ratio needs no more digits than f32 has")]
fn ratio(value: f64) -> f32 {
    value.clamp(0.0, 1.0) as f32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PRESENT: &str = "\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine=\"0\",model_name=\"tiny\"} 3.0
vllm:num_requests_waiting{engine=\"0\",model_name=\"tiny\"} 12.0
vllm:num_requests_waiting_by_reason{engine=\"0\",model_name=\"tiny\",reason=\"capacity\"} 11.0
vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"tiny\"} 0.25
vllm:num_requests_running_created{engine=\"0\"} 1.7e+09
vllm:time_to_first_token_seconds_bucket{engine=\"0\",le=\"0.25\"} 3.0
vllm:time_to_first_token_seconds_count{engine=\"0\",model_name=\"tiny\"} 4.0
vllm:time_to_first_token_seconds_sum{engine=\"0\",model_name=\"tiny\"} 1.5
vllm:generation_tokens_total{engine=\"0\",model_name=\"tiny\"} 100.0
vllm:prompt_tokens_total{engine=\"0\",model_name=\"tiny\"} 90.0
vllm:iteration_tokens_total_count{engine=\"0\",model_name=\"tiny\"} 80.0
vllm:request_success_total{engine=\"0\",finished_reason=\"stop\",model_name=\"tiny\"} 5.0
vllm:request_success_total{engine=\"0\",finished_reason=\"length\",model_name=\"tiny\"} 2.0
vllm:request_success_total{engine=\"0\",finished_reason=\"abort\",model_name=\"tiny\"} 70.0
vllm:inter_token_latency_seconds_count{engine=\"0\",model_name=\"tiny\"} 60.0
";

    #[test]
    fn reads_what_vllm_writes() {
        let scrape = parse(PRESENT);
        let first_tokens = Some(FirstTokens { requests: 4.0, seconds: 1.5 });
        assert_eq!(scrape.load, Some(Load { running: 3, waiting: 12, kv_used_ratio: 0.25, first_tokens }));
        let figures = Figures {
            running: Some(3),
            waiting: Some(12),
            kv_used_ratio: Some(0.25),
            generated: Some(100.0),
            prompts: Some(90.0),
            iterations: Some(80.0),
            ended: Some(7.0),
            token_gaps: Some(60.0),
        };
        assert_eq!(scrape.figures, figures, "aborts are no end of the core's making");
        assert_eq!(scrape.missing, Vec::<&str>::new());
    }

    #[test]
    fn older_names_count_where_the_present_one_is_absent() {
        let old = PRESENT
            .replace("kv_cache_usage_perc", "gpu_cache_usage_perc")
            .replace("inter_token_latency_seconds", "time_per_output_token_seconds");
        assert_eq!(parse(&old), parse(PRESENT));
        // Both at once, as in 0.9.2 to 0.11, in either order.
        let both = "vllm:gpu_cache_usage_perc 0.9\nvllm:kv_cache_usage_perc 0.5\nvllm:gpu_cache_usage_perc{e=\"1\"} 0.9\n";
        assert_eq!(parse(both).figures.kv_used_ratio, Some(0.5));
    }

    #[test]
    fn several_cores_are_added_and_the_fullest_cache_counts() {
        let text = "\
vllm:num_requests_running{engine=\"0\"} 1
vllm:num_requests_running{engine=\"1\"} 2
vllm:num_requests_waiting 0
vllm:gpu_cache_usage_perc{engine=\"0\"} 0.5
vllm:gpu_cache_usage_perc{engine=\"1\"} 0.75 1700000000000
";
        let load = Load { running: 3, waiting: 0, kv_used_ratio: 0.75, first_tokens: None };
        assert_eq!(parse(text).load, Some(load));
    }

    #[test]
    fn labels_may_hold_braces_quotes_and_spaces() {
        let text = "vllm:num_requests_running{model_name=\"a } \\\" b\"} 4\nvllm:num_requests_waiting{} 0\n";
        assert_eq!(parse(text).load.map(|l| l.running), Some(4));
    }

    #[test]
    fn what_is_missing_is_named_and_nonsense_is_skipped() {
        let nothing = parse("");
        assert_eq!((nothing.load, nothing.figures), (None, Figures::default()));
        assert_eq!(nothing.missing, wanted().collect::<Vec<_>>());
        assert!(parse("vllm:num_requests_running NaN\n").missing.contains(&"vllm:num_requests_running"));
        let text =
            "vllm:num_requests_running 1e300\nvllm:num_requests_running{ 5\nvllm:num_requests_waiting -1\n";
        let scrape = parse(text);
        assert_eq!((scrape.load, scrape.figures.running), (None, Some(u32::MAX)));
        let huge =
            "vllm:num_requests_running 1e300\nvllm:num_requests_waiting 1\nvllm:kv_cache_usage_perc 7\n";
        let load = Load { running: u32::MAX, waiting: 1, kv_used_ratio: 1.0, first_tokens: None };
        assert_eq!(parse(huge).load, Some(load));
    }

    #[test]
    fn a_request_of_ours_is_no_load() {
        let load = |running, waiting| Load { running, waiting, kv_used_ratio: 0.0, first_tokens: None };
        assert_eq!(load(3, 1).less_one(), load(2, 1));
        assert_eq!(load(0, 2).less_one(), load(0, 1));
        assert_eq!(load(0, 0).less_one(), load(0, 0));
    }

    proptest! {
        #[test]
        fn nothing_that_comes_from_outside_makes_it_panic(text in "(vllm:num_requests_(running|waiting)|[{}\" \\\\=é0-9\n#]){0,40}") {
            if let Some(load) = parse(&text).load {
                prop_assert!((0.0..=1.0).contains(&load.kv_used_ratio));
            }
        }
    }
}
