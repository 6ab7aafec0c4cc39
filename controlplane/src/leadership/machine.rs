//! The candidate as a state machine: what it asks the store for next, and whether it may write now. Pure.
//!
//! Times are milliseconds of one process's own monotonic clock; no two clocks are ever compared. A lease granted or
//! renewed by a request that was *sent* at `t` lives, by the store's clock, at least until `t + ttl`, since the store began
//! to count later. So `until = t + ttl - margin` is a time at which our lease surely lives, if our clock runs no slower
//! than the store's by more than `margin / ttl` (one tenth; crystal clocks differ by a ten-thousandth). From `until` on
//! nothing is written, whether the store can be reached or not.
//!
//! That is economy: it spares writes that would fail and makes two writers at one time rare. Safety is the fence: each
//! write compares the election key's revision in its own transaction, so that it does not matter what a candidate
//! believes: not if it was stopped between looking at its clock and sending, not if its clock stands still.
//!
//! A leader that cannot reach the store is *suspended*, not deposed: when the store answers again and the lease still
//! lives, so does the key that hangs on it, and the same term goes on. A short outage of the store changes no leader.
//!
//! `explorer` (in the tests) runs this very code through every interleaving of up to three candidates.

/// What the times are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rules {
    /// How long the lease is asked for, in milliseconds.
    pub ttl_ms: u64,
    /// How long before its end it counts as ended.
    pub margin_ms: u64,
    /// Shortest pause between two tries of the same.
    pub retry_ms: u64,
}

impl Rules {
    /// For a lease of `ttl_ms`.
    pub fn new(ttl_ms: u64) -> Self {
        Self { ttl_ms, margin_ms: ttl_ms / 10, retry_ms: (ttl_ms / 20).clamp(20, 500) }
    }
}

/// Where a candidate stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Another leads, or nobody.
    Following {
        /// When it may stand for election.
        not_before: u64,
    },
    /// It has a lease and stands for election.
    Standing {
        /// Its lease.
        lease: u64,
        /// Its lease surely lives until then.
        until: u64,
        /// When it tries (again).
        next_try: u64,
    },
    /// It was elected.
    Leading {
        /// Its lease.
        lease: u64,
        /// Revision of the election key.
        term: u64,
        /// It may write until then.
        until: u64,
        /// When it renews the lease.
        renew_at: u64,
    },
    /// Its lease is to be given back.
    Resigning {
        /// That lease.
        lease: u64,
        /// When it may stand for election again.
        not_before: u64,
    },
}

/// What a candidate asks the store for next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ask {
    /// Nothing until this time, or until something changes.
    Wait(Option<u64>),
    /// A lease.
    Grant,
    /// The election key, on this lease, if nobody has it.
    Campaign(u64),
    /// To renew this lease.
    Renew(u64),
    /// To end this lease.
    Revoke(u64),
}

/// What the store said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Answer {
    /// To [`Ask::Grant`].
    Granted(u64),
    /// To [`Ask::Campaign`]: the key is ours, and this is its revision.
    Elected(u64),
    /// To [`Ask::Campaign`]: another has the key.
    Beaten,
    /// To [`Ask::Renew`] or [`Ask::Revoke`].
    Done,
    /// The lease has ended.
    Gone,
    /// Nothing, or nothing certain.
    Failed,
}

/// See the module's text.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Machine {
    rules: Rules,
    state: State,
    may_lead: bool,
}

impl Machine {
    /// A candidate that leads nothing yet; one that may not lead never asks for anything.
    pub fn new(rules: Rules, may_lead: bool) -> Self {
        Self { rules, state: State::Following { not_before: 0 }, may_lead }
    }

    /// Where it stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// The term it may write in now.
    pub fn writing(&self, now: u64) -> Option<u64> {
        match self.state {
            State::Leading { term, until, .. } if now < until => Some(term),
            _ => None,
        }
    }

    /// What to ask for now; `vacant`: nobody holds the election key, as far as is known.
    pub fn ask(&self, now: u64, vacant: bool) -> Ask {
        match self.state {
            State::Following { .. } if !self.may_lead || !vacant => Ask::Wait(None),
            State::Following { not_before } if now < not_before => Ask::Wait(Some(not_before)),
            State::Following { .. } => Ask::Grant,
            // Its lease may end before the key is put on it; a new one is as good.
            State::Standing { lease, until, .. } if now >= until => Ask::Revoke(lease),
            State::Standing { next_try, .. } if now < next_try => Ask::Wait(Some(next_try)),
            State::Standing { lease, .. } => Ask::Campaign(lease),
            State::Leading { renew_at, .. } if now < renew_at => Ask::Wait(Some(renew_at)),
            State::Leading { lease, .. } => Ask::Renew(lease),
            State::Resigning { lease, .. } => Ask::Revoke(lease),
        }
    }

    /// Takes in what became of `asked`, which was sent at `sent`; it is `now` by now.
    pub fn hear(&mut self, asked: Ask, answer: Answer, sent: u64, now: u64) {
        let lives_until = (sent + self.rules.ttl_ms).saturating_sub(self.rules.margin_ms);
        let soon = now + self.rules.retry_ms;
        self.state = match (self.state, asked, answer) {
            (State::Following { .. }, Ask::Grant, Answer::Granted(lease)) => {
                State::Standing { lease, until: lives_until, next_try: now }
            }
            (State::Following { .. }, Ask::Grant, _) => State::Following { not_before: soon },
            (State::Standing { lease, until, .. }, Ask::Campaign(for_lease), answer)
                if lease == for_lease =>
            {
                match answer {
                    Answer::Elected(term) => {
                        State::Leading { lease, term, until, renew_at: half_way(now, until) }
                    }
                    Answer::Beaten => State::Resigning { lease, not_before: soon },
                    Answer::Gone => State::Following { not_before: now },
                    _ => State::Standing { lease, until, next_try: soon },
                }
            }
            (State::Leading { lease, term, until, .. }, Ask::Renew(for_lease), answer)
                if lease == for_lease =>
            {
                match answer {
                    Answer::Done => State::Leading {
                        lease,
                        term,
                        until: until.max(lives_until),
                        renew_at: half_way(now, lives_until).max(soon),
                    },
                    Answer::Gone => State::Following { not_before: now },
                    _ => State::Leading { lease, term, until, renew_at: half_way(now, until).max(soon) },
                }
            }
            // A lease that could not be given back ends by itself.
            (State::Standing { lease, .. }, Ask::Revoke(ended), _) if lease == ended => {
                State::Following { not_before: soon }
            }
            (State::Resigning { lease, not_before }, Ask::Revoke(ended), _) if lease == ended => {
                State::Following { not_before }
            }
            (unchanged, _, _) => unchanged,
        };
    }

    /// A write of this term was refused by the fence: another has led since.
    pub fn fenced(&mut self, term: u64, now: u64) {
        if let State::Leading { lease, term: own, .. } = self.state
            && own == term
        {
            self.state = State::Resigning { lease, not_before: now + self.rules.retry_ms };
        }
    }

    /// Gives up whatever it has, for good.
    pub fn resign(&mut self) {
        self.may_lead = false;
        if let State::Standing { lease, .. } | State::Leading { lease, .. } = self.state {
            self.state = State::Resigning { lease, not_before: u64::MAX };
        }
    }
}

/// Half of the time that is left: leases are renewed long before they end, and more often the closer that is.
fn half_way(now: u64, until: u64) -> u64 {
    now + until.saturating_sub(now) / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elected(at: u64) -> Machine {
        let mut machine = Machine::new(Rules::new(3_000), true);
        machine.hear(Ask::Grant, Answer::Granted(7), at, at);
        machine.hear(Ask::Campaign(7), Answer::Elected(40), at, at);
        machine
    }

    #[test]
    fn a_lease_counts_from_when_it_was_asked_for() {
        let mut machine = Machine::new(Rules::new(3_000), true);
        assert_eq!(machine.ask(0, false), Ask::Wait(None));
        assert_eq!(machine.ask(0, true), Ask::Grant);
        machine.hear(Ask::Grant, Answer::Granted(7), 100, 900);
        assert_eq!((machine.ask(900, true), machine.writing(900)), (Ask::Campaign(7), None));
        machine.hear(Ask::Campaign(7), Answer::Elected(40), 900, 1_000);
        assert_eq!((machine.writing(1_000), machine.writing(2_799)), (Some(40), Some(40)));
        assert_eq!(machine.writing(2_800), None, "granted at 100, for 3000, less a tenth");
        assert_eq!(machine.ask(1_000, false), Ask::Wait(Some(1_900)), "half of what is left");
    }

    #[test]
    fn an_outage_suspends_and_the_same_term_goes_on_if_the_lease_lived() {
        let mut machine = elected(0);
        for at in [1_350, 2_050, 2_400, 2_690, 3_500] {
            machine.hear(Ask::Renew(7), Answer::Failed, at - 10, at);
        }
        assert_eq!(machine.writing(2_699), Some(40));
        assert_eq!(machine.writing(3_500), None);
        assert_eq!(machine.ask(3_700, true), Ask::Renew(7), "it goes on asking");
        machine.hear(Ask::Renew(7), Answer::Done, 3_700, 3_710);
        assert_eq!(machine.writing(3_710), Some(40));
        machine.hear(Ask::Renew(7), Answer::Gone, 5_000, 5_010);
        assert_eq!((machine.writing(5_010), machine.ask(5_010, true)), (None, Ask::Grant));
    }

    #[test]
    fn the_beaten_the_fenced_and_the_resigned_give_their_lease_back() {
        let mut beaten = Machine::new(Rules::new(3_000), true);
        beaten.hear(Ask::Grant, Answer::Granted(7), 0, 0);
        beaten.hear(Ask::Campaign(7), Answer::Beaten, 0, 5);
        assert_eq!(beaten.ask(5, false), Ask::Revoke(7));
        beaten.hear(Ask::Revoke(7), Answer::Failed, 5, 5);
        assert_eq!(beaten.ask(10, true), Ask::Wait(Some(155)));
        let mut fenced = elected(0);
        fenced.fenced(39, 10);
        assert_eq!(fenced.writing(10), Some(40), "an older term's refusal means nothing");
        fenced.fenced(40, 10);
        assert_eq!((fenced.writing(10), fenced.ask(10, false)), (None, Ask::Revoke(7)));
        let mut resigned = elected(0);
        resigned.resign();
        assert_eq!((resigned.writing(1), resigned.ask(1, false)), (None, Ask::Revoke(7)));
        resigned.hear(Ask::Revoke(7), Answer::Done, 1, 2);
        assert_eq!(resigned.ask(9_999, true), Ask::Wait(None));
        assert_eq!(Machine::new(Rules::new(3_000), false).ask(0, true), Ask::Wait(None));
    }

    #[test]
    fn a_late_answer_to_an_older_lease_changes_nothing() {
        let mut machine = elected(0);
        machine.hear(Ask::Renew(6), Answer::Gone, 0, 1);
        machine.hear(Ask::Campaign(7), Answer::Beaten, 0, 1);
        assert_eq!(machine.writing(1), Some(40));
    }
}
