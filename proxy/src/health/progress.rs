//! Whether an engine that says nothing is hung or merely busy. Pure: what was seen in, a doubt or a verdict out.
//!
//! An engine's API server goes on answering `/health` while its core stands still, and an engine that computes a long prompt
//! is as silent as one that is dead. So silence alone ejects nobody: it raises a doubt, and a doubt has the engine
//! examined ([`super::probe`]). How long it may last depends on what was going on:
//!
//! - Two streams or more were flowing, and all stopped: nothing that an engine does for one request stops all the others for
//!   long. `hang_ms`.
//! - One stream was (a tool call that is held back until it is whole looks like this), or requests only wait for their first
//!   byte (long prompts, whole answers): `hang_waiting_ms`.
//! - A request has timed out: `hang_ms`, whatever was going on.
//!
//! Silence is the time since a byte came from the engine, on any of its streams, or since it got its first request after
//! having none, unless one has timed out since. A stream whose client does not read is not counted: its silence is the client's.
//!
//! # The examination
//!
//! The engine is asked for one token. If it comes, all is well. If not, the request may stand in a long queue; so the
//! engine's own counters, read before and after, decide: if they have moved, it is busy. An engine is hung if neither
//! a token came nor a counter moved, or if a token did not come and it has no counters to show. An engine that refuses the
//! question (it makes no text, or is full) and shows no counters is left alone.

/// What is seen of an endpoint from here. Times in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Signs {
    /// Requests under way.
    pub inflight: u32,
    /// Those of them whose answer is flowing, and whose client reads.
    pub flowing: u32,
    /// Since the last byte of any of them.
    pub silent_ms: u64,
    /// Whether one has timed out since.
    pub timed_out: bool,
}

/// How long silence may last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// Of streams that were flowing; 0: nobody is examined.
    pub flowing_ms: u64,
    /// Of requests that wait.
    pub waiting_ms: u64,
}

/// Whether the engine should be examined.
pub fn is_doubtful(signs: &Signs, patience: &Patience) -> bool {
    if patience.flowing_ms == 0 {
        return false;
    }
    let strong = signs.flowing >= 2 || signs.timed_out;
    let longest = if strong { patience.flowing_ms } else { patience.waiting_ms };
    (signs.inflight > 0 || signs.timed_out) && signs.silent_ms >= longest
}

/// What became of the request for one token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Canary {
    /// It came.
    Answered,
    /// An error came instead.
    Refused,
    /// Nothing came.
    Silent,
    /// The engine could not be reached: a matter for probes.
    Unreached,
}

/// What an examination found; a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It makes tokens.
    Alive,
    /// It makes none.
    Hung,
    /// Cannot be told.
    Unknown,
}

impl Verdict {
    /// Every verdict, for metrics that exist at zero.
    pub const ALL: [Self; 3] = [Self::Alive, Self::Hung, Self::Unknown];

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Alive => "alive",
            Self::Hung => "hung",
            Self::Unknown => "unknown",
        }
    }
}

/// The verdict on an engine whose counters were `before` and `after` the question; `None`: it showed none.
pub fn verdict(canary: Canary, before: Option<&Counters>, after: Option<&Counters>) -> Verdict {
    match (canary, before.zip(after)) {
        (Canary::Answered, _) => Verdict::Alive,
        (Canary::Unreached, _) => Verdict::Unknown,
        (_, Some((before, after))) if after.have_moved_since(before) => Verdict::Alive,
        (_, Some(_)) | (Canary::Silent, None) => Verdict::Hung,
        (Canary::Refused, None) => Verdict::Unknown,
    }
}

/// Series of vLLM that move only when its core does: tokens, steps, and the cache that a prompt takes while it is being computed.
/// `prompt_tokens_total` is not among them: the question itself may move it.
const SERIES: [&str; 3] =
    ["vllm:generation_tokens_total", "vllm:iteration_tokens_total_count", "vllm:kv_cache_usage_perc"];

/// An engine's counters of work, summed over its ranks; only good for comparing.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Counters([f64; SERIES.len()]);

impl Counters {
    /// Reads them from Prometheus text; `None` if none of them is there.
    pub fn parse(text: &str) -> Option<Self> {
        let mut sums = Self::default();
        let mut found = false;
        for line in text.lines() {
            let end = line.find(['{', ' ']).unwrap_or(line.len());
            let Some(series) = SERIES.iter().position(|name| line.get(..end) == Some(*name)) else {
                continue;
            };
            let value = line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok());
            if let (Some(sum), Some(value)) = (sums.0.get_mut(series), value.filter(|v| v.is_finite())) {
                *sum += value;
                found = true;
            }
        }
        found.then_some(sums)
    }

    /// Whether work was done between the two. Less than before is none: requests that are given up free their cache.
    pub fn have_moved_since(&self, before: &Self) -> bool {
        self.0.iter().zip(&before.0).any(|(now, then)| now > then)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PATIENCE: Patience = Patience { flowing_ms: 5_000, waiting_ms: 30_000 };

    fn doubtful(inflight: u32, flowing: u32, silent_ms: u64, timed_out: bool) -> bool {
        is_doubtful(&Signs { inflight, flowing, silent_ms, timed_out }, &PATIENCE)
    }

    #[test]
    fn streams_that_all_stopped_are_doubted_soon_and_a_long_prompt_late() {
        assert!(doubtful(9, 2, 5_000, false));
        assert!(!doubtful(9, 9, 4_999, false));
        assert!(!doubtful(9, 1, 29_999, false), "one stream may be held back by its parser");
        assert!(!doubtful(9, 0, 29_999, false), "prompts may be long");
        assert!(doubtful(1, 0, 30_000, false));
        assert!(doubtful(0, 0, 5_000, true), "the one that waited has given up");
        assert!(!doubtful(0, 0, 90_000, false), "nobody asked for anything");
    }

    #[test]
    fn with_no_patience_set_nobody_is_examined() {
        let signs = Signs { inflight: 9, flowing: 9, silent_ms: u64::MAX, timed_out: true };
        assert!(!is_doubtful(&signs, &Patience { flowing_ms: 0, waiting_ms: 1 }));
    }

    #[test]
    fn a_busy_engine_is_known_by_its_counters_when_its_queue_is_long() {
        let (before, after) = (Counters([1.0; 3]), Counters([2.0, 1.0, 1.0]));
        assert_eq!(verdict(Canary::Silent, Some(&before), Some(&after)), Verdict::Alive);
        assert_eq!(verdict(Canary::Silent, Some(&before), Some(&before)), Verdict::Hung);
        assert_eq!(verdict(Canary::Silent, Some(&after), Some(&before)), Verdict::Hung, "less is no work");
        assert_eq!(verdict(Canary::Refused, Some(&before), Some(&before)), Verdict::Hung);
        assert_eq!(verdict(Canary::Silent, None, None), Verdict::Hung);
        assert_eq!(verdict(Canary::Silent, Some(&before), None), Verdict::Hung);
        assert_eq!(verdict(Canary::Refused, None, Some(&after)), Verdict::Unknown);
        assert_eq!(verdict(Canary::Answered, Some(&before), Some(&before)), Verdict::Alive);
        assert_eq!(verdict(Canary::Unreached, Some(&before), Some(&before)), Verdict::Unknown);
    }

    #[test]
    fn counters_are_summed_over_ranks_and_others_are_not_looked_at() {
        let text = "# HELP vllm:generation_tokens_total x\n\
            vllm:generation_tokens_total{engine=\"0\",model_name=\"m\"} 10.0\n\
            vllm:generation_tokens_total{engine=\"1\",model_name=\"m\"} 5\n\
            vllm:generation_tokens_total_created{engine=\"0\"} 1.7e9\n\
            vllm:kv_cache_usage_perc 0.5\nhttp_requests_total 7\nvllm:iteration_tokens_total_count NaN\n";
        assert_eq!(Counters::parse(text), Some(Counters([15.0, 0.0, 0.5])));
        assert_eq!(Counters::parse("http_requests_total 7\n"), None);
    }

    proptest! {
        #[test]
        fn any_text_can_be_read(text in "\\PC{0,200}", tail in "(vllm:generation_tokens_total[{} 0-9a-z]{0,9}\n){0,3}") {
            let _any = Counters::parse(&(text + "\n" + &tail));
        }

        #[test]
        fn who_made_a_byte_within_its_patience_is_not_doubted(inflight in 0u32..500, flowing in 0u32..500, silent_ms in 0u64..5_000, timed_out: bool) {
            prop_assert!(!doubtful(inflight, flowing, silent_ms, timed_out));
        }
    }
}
