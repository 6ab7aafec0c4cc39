//! Is the engine getting anywhere? Pure: readings and times in, what to do out.
//!
//! vLLM's API server answers `/health` with 200 while its EngineCore stands still, so an answer proves nothing; tokens do.
//! Evidence that the core took a step is any of these between two readings of `/metrics`: one of the counters that its steps
//! feed moved ([`Figures::counters`]); the share of the KV cache in use moved while as many requests ran as before. And a
//! canary, a completion of one token, that was answered. After [`Limits::canary`] without evidence the canary is asked, and
//! after [`Limits::wedge`] without any the engine is wedged, if the canary has been out all the while.
//!
//! The cases it was thought through for:
//!
//! - *Working.* Counters move several times a second: nothing is asked, and an engine that is full never sees a canary.
//! - *Idle.* Nothing moves because there is nothing to do. Only the canary can tell that from a core that died in its sleep,
//!   where requests of clients would never even show as running. One token every [`Limits::canary`].
//! - *A long prefill, alone.* A prompt of a million tokens is computed in chunks, and no counter moves before the last: vLLM
//!   counts prompt tokens with the first token made. But each chunk takes KV blocks, so the KV figure moves with each step.
//!   (With the requests that end or begin it moves without the core in some engines: hence "as many ran as before".)
//! - *A huge queue.* The canary waits at its end, for minutes; the counters move meanwhile, and it is taken back.
//! - *Saturated API server.* `/metrics` takes seconds: readings come late but come, and evidence is what moved between two of
//!   them, however far apart. If none comes at all ([`Limits::canary`] without one), or they have no counters, only the canary
//!   is left, which may stand in a queue: then the engine has [`BLIND`] times as long.
//! - *A stuck gauge.* An engine that says "1 running" for ever, after a request that was lost, answers its canary.
//! - *One request that stands still among others.* The engine gets on; it is the proxy's to give that one up.
//! - *Clients that leave a frozen engine.* Their aborts are counted without the core (`finished_reason="abort"`), so they are
//!   no evidence. Nor are arrivals: "running" and "waiting" are only told, never believed.
//! - *We ourselves stood still* (a stopped agent, a suspended machine). Time in which nobody looked is no time without
//!   progress: a gap between two looks counts as [`LONGEST_GAP`] at most.
//!
//! Absent: what asks the canary and what ends the engine (`canary`, `ending`). Not found: an engine that makes tokens, but
//! wrong ones, and one of several cores behind one server that stands still while the others work (their counters are added).

use std::time::{Duration, Instant};

/// How many times as long an engine has whose progress cannot be read.
const BLIND: u32 = 4;
/// The most that the time between two looks counts for.
const LONGEST_GAP: Duration = Duration::from_secs(2);
/// A difference in KV use below this is rounding.
const KV_STEP: f32 = 1e-6;

/// What a reading of `/metrics` says of progress; what the engine does not tell is `None`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Figures {
    /// Requests being worked on.
    pub(crate) running: Option<u32>,
    /// Requests in the queue.
    pub(crate) waiting: Option<u32>,
    /// Share of the KV cache in use.
    pub(crate) kv_used_ratio: Option<f32>,
    /// Tokens made.
    pub(crate) generated: Option<f64>,
    /// Tokens of prompts computed.
    pub(crate) prompts: Option<f64>,
    /// Steps that gave tokens out.
    pub(crate) iterations: Option<f64>,
    /// Requests that ended, aborted ones left out.
    pub(crate) ended: Option<f64>,
    /// Tokens that followed another of their request.
    pub(crate) token_gaps: Option<f64>,
}

impl Figures {
    /// What only moves when the core steps.
    fn counters(&self) -> [Option<f64>; 5] {
        [self.generated, self.prompts, self.iterations, self.ended, self.token_gaps]
    }

    /// It has nothing to do, as far as it says.
    fn is_idle(&self) -> bool {
        self.running == Some(0) && self.waiting.unwrap_or(0) == 0
    }

    /// Whether the core took a step between `before` and this. A counter that fell is another core's: a step too.
    fn moved_since(&self, before: &Self) -> bool {
        let mut pairs = self.counters().into_iter().zip(before.counters());
        let counted = pairs.any(|(now, before)| now.zip(before).is_some_and(|(now, before)| now != before));
        let kv = self.kv_used_ratio.zip(before.kv_used_ratio);
        let computes = self.running == before.running && !self.is_idle();
        counted || (computes && kv.is_some_and(|(now, before)| (now - before).abs() > KV_STEP))
    }
}

/// When to ask and when to give up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Without evidence for this long: the canary is asked. It is asked no more often than that.
    pub(crate) canary: Duration,
    /// Without evidence for this long: wedged. More than `canary`.
    pub(crate) wedge: Duration,
}

/// What is to be done now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing.
    Fine,
    /// The canary, which is not out.
    Ask,
    /// Evidence came while the canary is out: it is not needed any more, and would only add to a busy engine's work.
    TakeBack,
    /// The engine gets nowhere: why it is thought so.
    Wedged(String),
}

/// What is known of one engine's progress.
#[derive(Debug, Clone)]
pub(crate) struct Progress {
    limits: Limits,
    /// The last good reading.
    last: Option<(Instant, Figures)>,
    /// The last evidence.
    moved: Instant,
    /// The first canary since then was asked.
    doubted: Option<Instant>,
    /// The last one was asked.
    asked: Option<Instant>,
    is_out: bool,
    looked: Instant,
}

impl Progress {
    /// An engine that has just proved itself.
    pub(crate) fn new(limits: Limits, now: Instant) -> Self {
        Self { limits, last: None, moved: now, doubted: None, asked: None, is_out: false, looked: now }
    }

    /// Takes a reading in.
    pub(crate) fn read(&mut self, figures: Figures, now: Instant) {
        if self.last.is_some_and(|(_, before)| figures.moved_since(&before)) {
            self.prove(now);
        }
        self.last = Some((now, figures));
    }

    /// The canary came back: answered, or with an error, which proves nothing.
    pub(crate) fn returned(&mut self, answered: bool, now: Instant) {
        self.is_out = false;
        if answered {
            self.prove(now);
        }
    }

    fn prove(&mut self, now: Instant) {
        self.moved = now;
        self.doubted = None;
    }

    /// Since when there is no evidence.
    pub(crate) fn moved(&self) -> Instant {
        self.moved
    }

    /// Looks at the clock. [`Verdict::Ask`] and [`Verdict::TakeBack`] are taken as done.
    pub(crate) fn look(&mut self, now: Instant) -> Verdict {
        self.forget_gap(now);
        let quiet = now.saturating_duration_since(self.moved);
        if quiet < self.limits.canary {
            return match std::mem::take(&mut self.is_out) {
                true => Verdict::TakeBack,
                false => Verdict::Fine,
            };
        }
        let in_doubt = self.doubted.map(|since| now.saturating_duration_since(since));
        let limit = self.limit(now);
        if in_doubt.is_some_and(|doubt| doubt >= limit.saturating_sub(self.limits.canary)) && quiet >= limit {
            return Verdict::Wedged(self.reason(quiet, now));
        }
        let recently = self.asked.is_some_and(|at| now.saturating_duration_since(at) < self.limits.canary);
        if self.is_out || recently {
            return Verdict::Fine;
        }
        self.doubted.get_or_insert(now);
        (self.asked, self.is_out) = (Some(now), true);
        Verdict::Ask
    }

    /// Moves the past nearer by the time in which nobody looked.
    fn forget_gap(&mut self, now: Instant) {
        let gap = now.saturating_duration_since(self.looked).saturating_sub(LONGEST_GAP);
        if !gap.is_zero() {
            let past = [Some(&mut self.moved), self.doubted.as_mut(), self.asked.as_mut()];
            for at in past.into_iter().flatten() {
                // Nothing that was noted meanwhile comes to lie in the future.
                *at = (*at + gap).min(now);
            }
        }
        self.looked = now;
    }

    /// How long without evidence is too long, by what can be read at all.
    fn limit(&self, now: Instant) -> Duration {
        let readable = self.last.is_some_and(|(at, figures)| {
            let fresh = now.saturating_duration_since(at) < self.limits.canary;
            fresh && (figures.is_idle() || figures.counters().iter().any(Option::is_some))
        });
        if readable { self.limits.wedge } else { self.limits.wedge.saturating_mul(BLIND) }
    }

    fn reason(&self, quiet: Duration, now: Instant) -> String {
        let asked = self.doubted.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let told = match self.last {
            Some((at, figures)) => {
                let or_unknown = |n: Option<u32>| n.map_or("?".to_owned(), |n| n.to_string());
                let age = now.saturating_duration_since(at).as_secs();
                let (running, waiting) = (or_unknown(figures.running), or_unknown(figures.waiting));
                format!("{running} running and {waiting} waiting as of {age} s ago")
            }
            None => "its /metrics never answered".to_owned(),
        };
        format!(
            "wedged: no progress for {:.0} s ({told}), and a completion of one token has had no answer for {:.0} s",
            quiet.as_secs_f64(),
            asked.as_secs_f64()
        )
    }
}

#[cfg(test)]
#[path = "progress_tests.rs"]
mod tests;
