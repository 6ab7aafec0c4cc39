//! Whether an engine is at its limit: a request sent there now would only wait there.
//!
//! Two sources, each with its own decay, so that neither can keep an engine shut by being old:
//!
//! - *What it reported.* Requests waiting inside an engine mean that it runs as many as it can: its capacity is what it
//!   runs, and it may have [`Limits::waiting`] more in its own queue (so that it never idles while we are told), fewer when
//!   its KV cache is nearly full as well. Compared with the load estimate, which grows with each request sent since, so one
//!   old report does not let a whole queue in. An engine that reports nobody waiting is never full by its report, whatever
//!   its other gauges say: vLLM's KV gauge has been seen to stay high after mass aborts.
//! - *Busy answers* ([`Learnt`]). A 503 says how many of our own requests the engine held when it wanted no more. A full
//!   engine refuses whatever comes, so one refusal among requests that were taken is a stray and teaches nothing: two
//!   that were sent one after the other are believed ([`ROW`]), three where the engine has carried more of late
//!   ([`ROW_BELOW`]), and these cut the limit to half of what it carried at most: others may have filled it.
//!   From a cut on the limit doubles its growth: one more after the first step, two after the second, and so on. A step is
//!   [`Limits::busy_step_ms`], or as many good answers as the limit ([`ANSWERS_A_STEP`] at least); a full engine refuses at
//!   the first, so it is asked twice a step and not once a request, and a place that falls free there is used at once. After
//!   [`BUSY_MEMORY_STEPS`] the limit is forgotten.
//!
//! A fixed ceiling on requests per engine ([`Limits::inflight`]) serves engines that neither report nor refuse.

/// Steps after which a busy answer is forgotten. By then the limit would have grown by a thousand.
pub const BUSY_MEMORY_STEPS: u64 = 10;

/// Refusals of requests sent one after the other that are believed. One in thirty at random makes two in a row once in a
/// thousand requests, and at a load that the engine has not carried yet a limit does little harm.
pub const ROW: u32 = 2;

/// The same at a load that it has carried: three in a row come by chance once in thirty thousand requests.
pub const ROW_BELOW: u32 = 3;

/// Fewest good answers since the last cut that count as a step: of a full engine's answers, at most one in so many is followed
/// by a refusal.
pub const ANSWERS_A_STEP: u32 = 16;

/// Steps for which it is remembered how many an engine has carried.
const CARRIED_STEPS: u64 = 8;

/// The limits, see `[queue]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests that may wait inside an engine.
    pub waiting: u32,
    /// KV use, in thousandths, from which on only one may.
    pub kv_permille: u32,
    /// Milliseconds after which one request more than a busy engine held is tried.
    pub busy_step_ms: u64,
    /// Requests of this proxy that an engine may have; 0: no such limit.
    pub inflight: u32,
}

/// What an engine said of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reported {
    /// Requests that it works on.
    pub running: u32,
    /// Requests in its own queue.
    pub waiting: u32,
    /// KV cache in use, in thousandths.
    pub kv_permille: u32,
}

/// A limit that busy answers have taught.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Busy {
    /// This proxy's requests there that it is thought to hold, as of the last cut.
    pub most: u32,
    /// Steps gained by good answers since.
    pub gained: u32,
    /// When the last cut was, on the clock of the picks.
    pub at_ms: u64,
}

impl Busy {
    /// How many of our own the engine is thought to hold at `now_ms`; `None` once that is forgotten.
    pub fn limit(&self, now_ms: u64, step_ms: u64) -> Option<u32> {
        let steps = now_ms.saturating_sub(self.at_ms) / step_ms.max(1) + u64::from(self.gained);
        (steps < BUSY_MEMORY_STEPS).then(|| self.most.saturating_add((1 << steps) - 1))
    }
}

/// What an engine's answers have taught about how much it holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Learnt {
    busy: Option<Busy>,
    /// Most of our requests that it had when it took one more, that one counted, and when that was.
    carried: u32,
    carried_ms: u64,
    /// The last row of refusals: the first and the last of these requests, by number, and how many there were.
    row: (u64, u64, u32),
    /// Good answers since the last step.
    answers: u32,
}

impl Learnt {
    /// The limit; it may be forgotten by now.
    pub const fn busy(&self) -> Option<Busy> {
        self.busy
    }

    /// It gave a good answer to a request with which it had `load` of ours.
    pub fn accepted(&mut self, load: u32, now_ms: u64, step_ms: u64) {
        if load >= self.carried(now_ms, step_ms) {
            (self.carried, self.carried_ms) = (load, now_ms);
        }
        let Some(busy) = &mut self.busy else { return };
        let Some(limit) = busy.limit(now_ms, step_ms) else {
            self.busy = None;
            return;
        };
        self.answers += 1;
        if self.answers >= limit.max(ANSWERS_A_STEP) {
            self.answers = 0;
            busy.gained += 1;
        }
    }

    /// It answered busy to the request of that number, in the order in which they were sent to it, while it held `held` of
    /// ours, the refused one not counted.
    pub fn refused(&mut self, number: u64, held: u32, now_ms: u64, step_ms: u64) {
        let (first, last, count) = self.row;
        let joins = count > 0 && number.saturating_add(1) >= first && number <= last.saturating_add(1);
        self.row = if joins {
            (first.min(number), last.max(number), count.saturating_add(1))
        } else {
            (number, number, 1)
        };
        let carried = self.carried(now_ms, step_ms);
        let (row, most) = if held >= carried { (ROW, held) } else { (ROW_BELOW, held.max(carried / 2)) };
        if self.row.2 < row {
            return;
        }
        // What it carried before says no more than this.
        self.carried = carried.min(most);
        self.answers = 0;
        self.busy = Some(Busy { most, gained: 0, at_ms: now_ms });
    }

    /// Most that it carried of late.
    fn carried(&self, now_ms: u64, step_ms: u64) -> u32 {
        let fresh = now_ms.saturating_sub(self.carried_ms) < step_ms.saturating_mul(CARRIED_STEPS);
        if fresh { self.carried } else { 0 }
    }
}

/// Whether an engine with `local` requests of this proxy, and `load` of everybody by the estimate, is at its limit.
/// `reported` must be fresh.
pub fn is_full(
    (local, load): (u32, u32),
    reported: Option<Reported>,
    busy: Option<Busy>,
    now_ms: u64,
    limits: &Limits,
) -> bool {
    let ceiling = limits.inflight > 0 && local >= limits.inflight;
    let refused =
        busy.and_then(|busy| busy.limit(now_ms, limits.busy_step_ms)).is_some_and(|most| local >= most);
    let queueing = reported.filter(|reported| reported.waiting > 0).is_some_and(|reported| {
        let room =
            if reported.kv_permille >= limits.kv_permille { limits.waiting.min(1) } else { limits.waiting };
        load >= reported.running.saturating_add(room)
    });
    ceiling || refused || queueing
}

#[cfg(test)]
#[path = "saturation_tests.rs"]
mod tests;
