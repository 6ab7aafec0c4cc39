//! The life of one engine: which states there are, and which moves between them are legal.
//!
//! ```text
//!   Starting ──► Loading ──► Ready ──► Draining ──► Stopped
//!      │            │          │          ▲
//!      │            ├──────────┼──────────┘ │ (told to stop, or it runs and does nothing)
//!      └────────────┴──────────┴────────────┴──► Failed ──► Starting (after a pause) | Stopped
//! ```
//!
//! An engine that may sleep goes from Ready to Asleep, is woken into Loading, and is stopped or fails like any other; one that
//! an earlier agent left sleeping goes there from Loading.
//!
//! Pure: the supervisor owns a [`Life`] and moves it; nothing else can. Invariants: an engine is Ready only after a real
//! completion; Stopped is the end, and is reached only when no process of the engine is left; a Failed engine is visible
//! as such until its next start. An engine that hangs (wedged, silent, never ready) is Draining while it is taken out of
//! routing, dumped and ended, and Failed when nothing of it is left.
//!
//! The rooms: [`supervisor`] (the story), [`command`] with [`vllm`], [`exec`] and [`versions`], and [`launch`] (its
//! beginning), `serving`, [`readiness`] and [`watch`] (its middle; [`progress`] and [`canary`] find the ones that hang),
//! `ending`, [`dump`] and [`stop`] (its end), [`causes`] and [`verdict`] (why), [`process`], [`spawn`] and [`cgroup`] (its
//! processes), [`records`] and [`adopt`] (what survives the agent).

pub(crate) mod adopt;
pub(crate) mod attempts;
pub(crate) mod canary;
pub(crate) mod causes;
pub(crate) mod cgroup;
pub(crate) mod command;
pub(crate) mod context;
pub(crate) mod dump;
mod ending;
pub(crate) mod exec;
pub(crate) mod launch;
pub(crate) mod load;
pub(crate) mod logs;
pub(crate) mod ports;
pub(crate) mod probe;
pub(crate) mod process;
pub(crate) mod procfs;
pub(crate) mod programs;
pub(crate) mod progress;
pub(crate) mod readiness;
pub(crate) mod records;
mod serving;
pub(crate) mod spawn;
pub(crate) mod stop;
pub(crate) mod supervisor;
pub(crate) mod ttft;
pub(crate) mod verdict;
pub(crate) mod verify;
pub(crate) mod versions;
pub(crate) mod vllm;
pub(crate) mod watch;

use std::fmt;

use penstock_proto::v1;

/// Where an engine is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum State {
    /// No process yet: it is being prepared, or waits for something.
    Starting,
    /// Its process runs and has not completed a request yet.
    Loading,
    /// It completed a request.
    Ready,
    /// It is being ended: deregistered, drained, then its processes terminated.
    Draining,
    /// No process is left, and none will be started.
    Stopped,
    /// It ended, or could not be started; `reason` says why. It is started again after a pause where that can help.
    Failed,
    /// It runs without its GPU memory, registered nowhere, and can be woken.
    Asleep,
}

impl State {
    /// All of them.
    pub(crate) const ALL: [Self; 7] = [
        Self::Starting,
        Self::Loading,
        Self::Ready,
        Self::Draining,
        Self::Stopped,
        Self::Failed,
        Self::Asleep,
    ];

    /// Whether the move is legal.
    pub(crate) fn may_become(self, next: Self) -> bool {
        use State::{Asleep, Draining, Failed, Loading, Ready, Starting, Stopped};
        matches!(
            (self, next),
            (Starting, Loading | Failed | Stopped)
                | (Loading, Ready | Asleep | Draining | Failed)
                | (Ready, Asleep | Draining | Failed)
                | (Asleep, Loading | Draining | Failed)
                | (Draining, Stopped | Failed)
                | (Failed, Starting | Stopped)
        )
    }

    /// Lower-case name: label of metrics, value in JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Asleep => "asleep",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl From<State> for v1::EngineState {
    fn from(state: State) -> Self {
        match state {
            State::Starting => Self::Starting,
            State::Loading => Self::Loading,
            State::Ready => Self::Ready,
            State::Draining => Self::Draining,
            State::Stopped => Self::Stopped,
            State::Failed => Self::Failed,
            State::Asleep => Self::Asleep,
        }
    }
}

/// A move that the state machine does not have: a defect in the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an engine cannot go from {from} to {to}")]
pub(crate) struct IllegalMove {
    /// Where it is and stays.
    pub(crate) from: State,
    /// Where it was to go.
    pub(crate) to: State,
}

/// One engine's way through the states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Life {
    state: State,
}

impl Life {
    /// A life begins in Starting.
    pub(crate) fn begin() -> Self {
        Self { state: State::Starting }
    }

    /// Where it is.
    pub(crate) fn state(self) -> State {
        self.state
    }

    /// Moves on.
    ///
    /// # Errors
    /// [`IllegalMove`]; the state is unchanged.
    pub(crate) fn move_to(&mut self, next: State) -> Result<(), IllegalMove> {
        if !self.state.may_become(next) {
            return Err(IllegalMove { from: self.state, to: next });
        }
        self.state = next;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stopped_is_the_end_and_is_reached_from_everywhere() {
        for from in State::ALL {
            assert!(!State::Stopped.may_become(from));
            assert!(!from.may_become(from), "{from} to itself");
        }
        let reaches_the_end = |from: State| {
            let mut seen = vec![from];
            let mut at = 0;
            while let Some(state) = seen.get(at).copied() {
                seen.extend(
                    State::ALL
                        .into_iter()
                        .filter(|n| state.may_become(*n) && !seen.contains(n))
                        .collect::<Vec<_>>(),
                );
                at += 1;
            }
            seen.contains(&State::Stopped)
        };
        assert!(State::ALL.into_iter().all(reaches_the_end));
    }

    #[test]
    fn ready_comes_only_after_loading_and_a_crash_is_always_visible() {
        let into_ready: Vec<_> = State::ALL.into_iter().filter(|s| s.may_become(State::Ready)).collect();
        assert_eq!(into_ready, [State::Loading]);
        let into_starting: Vec<_> =
            State::ALL.into_iter().filter(|s| s.may_become(State::Starting)).collect();
        assert_eq!(into_starting, [State::Failed]);
    }

    #[test]
    fn a_sleeper_serves_only_after_it_has_loaded_again() {
        assert!(State::Ready.may_become(State::Asleep) && State::Asleep.may_become(State::Loading));
        let from_sleep: Vec<_> = State::ALL.into_iter().filter(|s| State::Asleep.may_become(*s)).collect();
        assert_eq!(from_sleep, [State::Loading, State::Draining, State::Failed]);
    }

    #[test]
    fn an_illegal_move_changes_nothing() {
        let mut life = Life::begin();
        let error = life.move_to(State::Ready).expect_err("illegal");
        assert_eq!(error.to_string(), "an engine cannot go from starting to ready");
        assert_eq!(life.state(), State::Starting);
        for next in [State::Loading, State::Ready, State::Failed, State::Starting, State::Stopped] {
            life.move_to(next).expect("legal");
        }
    }
}
