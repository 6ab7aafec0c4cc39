//! What an engine says of its load in `/metrics` (Prometheus text).
//!
//! A pure reader of the few figures we need, tolerant of labels, of several engine cores behind one server (their counts
//! are added, the fullest cache counts) and of names that changed between vLLM versions. A line it cannot read is skipped:
//! an odd line must not cost the figures of the others.

use super::ttft::FirstTokens;

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

const TTFT_SUM: &str = "vllm:time_to_first_token_seconds_sum";
const TTFT_COUNT: &str = "vllm:time_to_first_token_seconds_count";

/// A difference in KV use below this is none.
const KV_STEP: f32 = 0.01;

impl Load {
    /// Whether it is worth telling to somebody who knows `before`.
    pub(crate) fn differs(&self, before: &Self) -> bool {
        (self.running, self.waiting) != (before.running, before.waiting)
            || (self.kv_used_ratio - before.kv_used_ratio).abs() >= KV_STEP
    }
}

const RUNNING: &[&str] = &["vllm:num_requests_running"];
const WAITING: &[&str] = &["vllm:num_requests_waiting"];
/// The second is vLLM's name before 0.10.
const KV_USED: &[&str] = &["vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"];

/// The load in a scrape's text, or the name of the figure that it lacks.
///
/// # Errors
/// The first name of the figure that no line holds. The KV figure may be absent (0 then): engines without a KV cache are
/// engines too.
pub(crate) fn parse(text: &str) -> Result<Load, &'static str> {
    let (mut running, mut waiting, mut kv) = (None::<f64>, None::<f64>, None::<f64>);
    let (mut ttft_sum, mut ttft_count) = (None::<f64>, None::<f64>);
    for (name, value) in text.lines().filter_map(sample) {
        if RUNNING.contains(&name) {
            *running.get_or_insert(0.0) += value;
        } else if WAITING.contains(&name) {
            *waiting.get_or_insert(0.0) += value;
        } else if KV_USED.contains(&name) {
            kv = Some(kv.unwrap_or(0.0).max(value));
        } else if name == TTFT_SUM {
            *ttft_sum.get_or_insert(0.0) += value;
        } else if name == TTFT_COUNT {
            *ttft_count.get_or_insert(0.0) += value;
        }
    }
    Ok(Load {
        running: count(running.ok_or("vllm:num_requests_running")?),
        waiting: count(waiting.ok_or("vllm:num_requests_waiting")?),
        kv_used_ratio: ratio(kv.unwrap_or(0.0)),
        first_tokens: ttft_sum.zip(ttft_count).map(|(seconds, requests)| FirstTokens { requests, seconds }),
    })
}

/// Name and value of a sample line; `None` for comments, blank lines, and values that are no figure.
fn sample(line: &str) -> Option<(&str, f64)> {
    let line = line.trim();
    let name_end = line.find(['{', ' ', '\t'])?;
    let (name, rest) = line.split_at_checked(name_end)?;
    if name.is_empty() || name.starts_with('#') {
        return None;
    }
    let rest = if rest.starts_with('{') { rest.get(labels_end(rest)?..)? } else { rest };
    let value: f64 = rest.split_ascii_whitespace().next()?.parse().ok()?;
    (value.is_finite() && value >= 0.0).then_some((name, value))
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

    #[test]
    fn reads_what_vllm_writes() {
        let text = "\
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
";
        let first_tokens = Some(FirstTokens { requests: 4.0, seconds: 1.5 });
        assert_eq!(parse(text), Ok(Load { running: 3, waiting: 12, kv_used_ratio: 0.25, first_tokens }));
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
        assert_eq!(parse(text), Ok(Load { running: 3, waiting: 0, kv_used_ratio: 0.75, first_tokens: None }));
    }

    #[test]
    fn labels_may_hold_braces_quotes_and_spaces() {
        let text = "vllm:num_requests_running{model_name=\"a } \\\" b\"} 4\nvllm:num_requests_waiting{} 0\n";
        assert_eq!(parse(text).map(|l| l.running), Ok(4));
    }

    #[test]
    fn a_missing_figure_is_named_and_nonsense_is_skipped() {
        assert_eq!(parse(""), Err("vllm:num_requests_running"));
        assert_eq!(parse("vllm:num_requests_running NaN\n"), Err("vllm:num_requests_running"));
        let text =
            "vllm:num_requests_running 1e300\nvllm:num_requests_running{ 5\nvllm:num_requests_waiting -1\n";
        assert_eq!(parse(text), Err("vllm:num_requests_waiting"));
        let huge =
            "vllm:num_requests_running 1e300\nvllm:num_requests_waiting 1\nvllm:kv_cache_usage_perc 7\n";
        assert_eq!(
            parse(huge),
            Ok(Load { running: u32::MAX, waiting: 1, kv_used_ratio: 1.0, first_tokens: None })
        );
    }

    proptest! {
        #[test]
        fn nothing_that_comes_from_outside_makes_it_panic(text in "(vllm:num_requests_running|[{}\" \\\\=é0-9\n#]){0,40}") {
            if let Ok(load) = parse(&text) {
                prop_assert!((0.0..=1.0).contains(&load.kv_used_ratio));
            }
        }
    }
}
