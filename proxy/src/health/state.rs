//! The state machine of one endpoint's health.
//!
//! # States
//!
//! - *Admitted*: picked. *Suspect* is the same with something to remember: failures in a row, fewer than eject.
//! - *Ejected* until a moment, for a [`Reason`]: not picked.
//! - *Half-open*: that moment has passed. Picked for few requests at a time, to see.
//!
//! # Transitions
//!
//! Admitted ──(failures in a row; a worse success rate or speed than its pool's; a hang found)──► Ejected for `base · 2^(n-1)`,
//!   n the ejections in a row, at most `max`
//! Ejected ──(time)──► Half-open
//! Ejected ──(the proof that its reason asks for: [`Cure`])──► Half-open at once
//! Half-open ──(`trials` answers begun)──► Admitted
//! Half-open ──(a trial fails)──► Ejected, for twice as long
//! Half-open ──(a probe fails)──► Ejected, for as long as before
//!
//! One trial runs at first, and one more at a time for each that was answered: an engine that is still dead costs a single
//! request, and that one is tried elsewhere.
//!
//! # What counts as what
//!
//! Three rows of failures are counted, each ended by its own opposite. *Failures* before an answer end when an answer begins.
//! *Breaks* inside an answer end when an answer ends whole: the beginning of an answer must not wipe out that all of them
//! break, and an engine whose answers take minutes must not be ejected by three stray failures while hundreds flow (a
//! breaker fed only by ends does that). *Unreached* connections and probes end when a probe or a request gets through.
//!
//! A timeout is not a failure here. It says that an engine is slow or hung, and those two must be told apart by somebody
//! who can ([`super::progress`]); where nobody does, it counts as one. A busy 503, a pooled connection found closed, and
//! whatever the client did are not events at all ([`Failure::of`]).
//!
//! A good probe proves that the engine can be reached, and so cures an endpoint that could not be; it is no proof against
//! errors or a hang, which answer probes all the while. For errors and slowness only trials are proof. A trial at a hung engine
//! would cost a client all of its patience, so there the request for one token stands in for trials: a hang lasts for `max`
//! from the last time that none came, and ends as soon as one does.
//!
//! # Invariants
//!
//! - No ejection lasts longer than `max` from its beginning, whatever probes say: a wrong probe path or a broken check
//!   cannot keep an engine out for good; it is tried. (A hang begins anew each time it is found; that was a try.)
//! - Events change nothing that is older than they are: a request sent before an ejection that fails during it, or after it,
//!   does not lengthen it. Only trials count in half-open.
//! - Without an event against it, an endpoint is never ejected.
//!
//! Ejections in a row are forgotten once the endpoint has been back for `max`: one that fails half of its requests passes
//! trials by luck and must not begin anew each time.

use crate::error::UpstreamFailure;

/// The rules, in milliseconds and counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// Failures in a row that eject.
    pub consecutive_failures: u32,
    /// Length of the first ejection.
    pub base_ejection_ms: u64,
    /// Longest ejection.
    pub max_ejection_ms: u64,
    /// Trials at a time, at most, and how many must be answered.
    pub trials: u32,
    /// Good probes in a row that end an ejection for being unreachable.
    pub probe_successes: u32,
    /// Whether silent engines are examined. If not, a timeout is a failure.
    pub silence_is_examined: bool,
}

/// Why an endpoint is out; a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Requests failed in a row.
    ConsecutiveFailures,
    /// Too many requests failed, compared to its pool.
    SuccessRate,
    /// First tokens came too late, compared to its pool.
    Latency,
    /// Probes failed in a row.
    Probe,
    /// It takes requests and makes no tokens.
    Hang,
}

impl Reason {
    /// Every reason, for metrics that exist at zero.
    pub const ALL: [Self; 5] =
        [Self::ConsecutiveFailures, Self::SuccessRate, Self::Latency, Self::Probe, Self::Hang];

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::ConsecutiveFailures => "consecutive_failures",
            Self::SuccessRate => "success_rate",
            Self::Latency => "latency",
            Self::Probe => "probe",
            Self::Hang => "hang",
        }
    }
}

/// What brings an ejected endpoint to half-open before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cure {
    /// Nothing does: it reacts, and does badly.
    Time,
    /// Good probes: it could not be reached.
    Probe,
    /// A token: it made none.
    Token,
}

/// A failed request, as far as the endpoint's health is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// No connection.
    Unreached,
    /// An error instead of an answer.
    Answer,
    /// An answer that began and broke.
    Break,
    /// Nothing for too long.
    Silence,
}

impl Failure {
    /// What an attempt's failure says of the endpoint, if anything. A full engine is healthy; a connection that the
    /// engine closed while idle says nothing.
    pub fn of(failure: UpstreamFailure) -> Option<Self> {
        match failure {
            UpstreamFailure::Busy | UpstreamFailure::StaleConnection => None,
            UpstreamFailure::Connect => Some(Self::Unreached),
            UpstreamFailure::BeforeFirstByte | UpstreamFailure::Garbage => Some(Self::Answer),
            UpstreamFailure::MidStream => Some(Self::Break),
            UpstreamFailure::FirstByteTimeout | UpstreamFailure::IdleTimeout => Some(Self::Silence),
        }
    }
}

/// What can happen to an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A good answer has begun.
    Began,
    /// An answer has come whole.
    Finished,
    /// A request failed.
    Failed {
        /// How.
        failure: Failure,
        /// Whether it was a trial.
        trial: bool,
    },
    /// A probe was answered well.
    ProbePassed,
    /// A probe was not, or too late.
    ProbeFailed,
    /// It does worse than its pool.
    Outlier(Reason),
    /// It was examined, and is hung.
    Hung,
    /// It was examined, or sends bytes: it makes tokens.
    Alive,
}

/// Where an endpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Picked, with nothing against it.
    Admitted,
    /// Picked, with failures in a row.
    Suspect,
    /// Not picked.
    Ejected,
    /// Picked for trials.
    HalfOpen,
}

impl Phase {
    /// Every phase, for metrics that exist at zero.
    pub const ALL: [Self; 4] = [Self::Admitted, Self::Suspect, Self::Ejected, Self::HalfOpen];

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Admitted => "admitted",
            Self::Suspect => "suspect",
            Self::Ejected => "ejected",
            Self::HalfOpen => "half_open",
        }
    }
}

/// A change that is told: counted and logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transition {
    /// Admitted or half-open before.
    Ejected {
        /// Why.
        reason: Reason,
        /// Until it is tried again.
        for_ms: u64,
    },
    /// Half-open before, admitted now.
    Returned,
}

/// An ejection, from its beginning until trials have ended it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Out {
    /// When it began.
    pub since_ms: u64,
    /// When trials begin.
    pub until_ms: u64,
    /// Why.
    pub reason: Reason,
    /// What ends it before.
    pub cure: Cure,
}

/// One endpoint's health. `Default` is admitted. All times are on one clock that never goes back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Machine {
    failures: u32,
    breaks: u32,
    unreached: u32,
    probes_passed: u32,
    trials_passed: u32,
    ejections: u32,
    returned_ms: u64,
    out: Option<Out>,
}

impl Machine {
    /// The present ejection, half-open included.
    pub fn out(&self) -> Option<Out> {
        self.out
    }

    /// Whether nothing speaks against the endpoint.
    pub fn is_clean(&self) -> bool {
        self.out.is_none() && self.failures == 0 && self.breaks == 0 && self.unreached == 0
    }

    /// Connections and probes in a row that did not get through.
    pub fn unreached(&self) -> u32 {
        self.unreached
    }

    /// Where it is at `now_ms`.
    pub fn phase(&self, now_ms: u64) -> Phase {
        match self.out {
            Some(out) if now_ms < out.until_ms => Phase::Ejected,
            Some(_) => Phase::HalfOpen,
            None if self.is_clean() => Phase::Admitted,
            None => Phase::Suspect,
        }
    }

    /// Trials that may run at one time while half-open.
    pub fn trials_allowed(&self, rules: &Rules) -> u32 {
        (self.trials_passed + 1).min(rules.trials)
    }

    /// Takes note of an event at `now_ms`.
    pub fn on(&mut self, event: Event, now_ms: u64, rules: &Rules) -> Option<Transition> {
        match self.phase(now_ms) {
            Phase::Admitted | Phase::Suspect => self.while_picked(event, now_ms, rules),
            Phase::Ejected => {
                self.while_ejected(event, now_ms, rules);
                None
            }
            Phase::HalfOpen => self.on_trial(event, now_ms, rules),
        }
    }

    fn while_picked(&mut self, event: Event, now_ms: u64, rules: &Rules) -> Option<Transition> {
        let (reason, cure) = match event {
            Event::Began => {
                (self.failures, self.unreached) = (0, 0);
                return None;
            }
            Event::Finished => {
                (self.failures, self.unreached, self.breaks) = (0, 0, 0);
                return None;
            }
            Event::ProbePassed => {
                self.unreached = 0;
                return None;
            }
            Event::Alive => return None,
            Event::Failed { failure: Failure::Silence, .. } if rules.silence_is_examined => return None,
            Event::Failed { failure, .. } => {
                let row = match failure {
                    Failure::Unreached => &mut self.unreached,
                    Failure::Break => &mut self.breaks,
                    Failure::Answer | Failure::Silence => &mut self.failures,
                };
                *row = row.saturating_add(1);
                let cure = if failure == Failure::Unreached { Cure::Probe } else { Cure::Time };
                (Reason::ConsecutiveFailures, cure)
            }
            Event::ProbeFailed => {
                self.unreached = self.unreached.saturating_add(1);
                (Reason::Probe, Cure::Probe)
            }
            Event::Outlier(reason) => return Some(self.eject(reason, Cure::Time, now_ms, rules)),
            Event::Hung => return Some(self.eject(Reason::Hang, Cure::Token, now_ms, rules)),
        };
        let before_answers = self.failures.saturating_add(self.unreached);
        let enough = before_answers.max(self.breaks) >= rules.consecutive_failures;
        enough.then(|| self.eject(reason, cure, now_ms, rules))
    }

    /// No new requests come: what is heard is about old ones, or from those who examine.
    fn while_ejected(&mut self, event: Event, now_ms: u64, rules: &Rules) {
        let length = self.length(rules);
        let Some(out) = &mut self.out else { return };
        match event {
            Event::ProbePassed => {
                self.unreached = 0;
                self.probes_passed = self.probes_passed.saturating_add(1);
                if out.cure == Cure::Probe && self.probes_passed >= rules.probe_successes {
                    out.until_ms = now_ms;
                }
            }
            Event::ProbeFailed => {
                self.probes_passed = 0;
                self.unreached = self.unreached.saturating_add(1);
                if self.unreached >= rules.consecutive_failures {
                    out.cure = Cure::Probe;
                }
                if out.cure == Cure::Probe {
                    out.extend(now_ms.saturating_add(length), rules);
                }
            }
            Event::Hung => {
                let until_ms = now_ms.saturating_add(rules.max_ejection_ms);
                *out = Out { since_ms: now_ms, until_ms, cure: Cure::Token, ..*out };
            }
            Event::Alive if out.cure == Cure::Token => out.until_ms = now_ms,
            Event::Began if out.cure != Cure::Time => out.until_ms = now_ms,
            Event::Alive | Event::Began | Event::Finished | Event::Failed { .. } | Event::Outlier(_) => {}
        }
    }

    fn on_trial(&mut self, event: Event, now_ms: u64, rules: &Rules) -> Option<Transition> {
        match event {
            Event::Began => {
                self.trials_passed = self.trials_passed.saturating_add(1);
                if self.trials_passed < rules.trials {
                    return None;
                }
                let ejections = self.ejections;
                *self = Self { ejections, returned_ms: now_ms, ..Self::default() };
                Some(Transition::Returned)
            }
            Event::Failed { failure, trial: true } => {
                let reason = self.out.map_or(Reason::ConsecutiveFailures, |out| out.reason);
                let cure = match failure {
                    Failure::Unreached => Cure::Probe,
                    Failure::Silence if rules.silence_is_examined => Cure::Token,
                    _ => Cure::Time,
                };
                Some(self.eject(reason, cure, now_ms, rules))
            }
            Event::Hung => Some(self.eject(Reason::Hang, Cure::Token, now_ms, rules)),
            Event::ProbeFailed => {
                let until_ms = now_ms.saturating_add(self.length(rules));
                (self.probes_passed, self.trials_passed) = (0, 0);
                self.unreached = self.unreached.saturating_add(1);
                if let Some(out) = &mut self.out {
                    *out = Out { since_ms: now_ms, until_ms, cure: Cure::Probe, ..*out };
                }
                None
            }
            Event::ProbePassed => {
                self.unreached = 0;
                None
            }
            Event::Failed { .. } | Event::Finished | Event::Outlier(_) | Event::Alive => None,
        }
    }

    fn eject(&mut self, reason: Reason, cure: Cure, now_ms: u64, rules: &Rules) -> Transition {
        let forgotten =
            self.out.is_none() && now_ms >= self.returned_ms.saturating_add(rules.max_ejection_ms);
        let before = if forgotten { 0 } else { self.ejections };
        *self =
            Self { ejections: before.saturating_add(1), returned_ms: self.returned_ms, ..Self::default() };
        let for_ms = match cure {
            Cure::Token => rules.max_ejection_ms.max(1),
            Cure::Time | Cure::Probe => self.length(rules),
        };
        let until_ms = now_ms.saturating_add(for_ms);
        self.out = Some(Out { since_ms: now_ms, until_ms, reason, cure });
        Transition::Ejected { reason, for_ms }
    }

    /// Of the present ejection, by how many came in a row.
    fn length(&self, rules: &Rules) -> u64 {
        let doublings = self.ejections.saturating_sub(1).min(32);
        rules.base_ejection_ms.saturating_mul(1 << doublings).min(rules.max_ejection_ms).max(1)
    }
}

impl Out {
    fn extend(&mut self, until_ms: u64, rules: &Rules) {
        let last = self.since_ms.saturating_add(rules.max_ejection_ms);
        self.until_ms = self.until_ms.max(until_ms.min(last));
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
