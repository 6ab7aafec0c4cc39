//! One child under supervision: running, or waiting to be started again.

use std::{path::Path, process::ExitStatus};

use tokio::time::{Instant, sleep_until, timeout_at};

use super::{
    children::{self, Kind, Process, describe},
    datadir::DataDir,
    error::UpError,
    restart::{Restarts, Verdict},
    signals::Signals,
};
use crate::output::say;

#[derive(Debug)]
pub(crate) struct Supervised {
    kind: Kind,
    restarts: Restarts,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Not started yet, or stopped for good.
    Idle,
    Running(Box<Process>),
    /// Died, to be started again then.
    Waiting(Instant),
}

/// What happened to a supervised child.
#[derive(Debug)]
pub(crate) enum Event {
    Ended(ExitStatus),
    /// The pause after an end is over.
    Due,
}

impl Supervised {
    pub(crate) fn new(kind: Kind) -> Self {
        Self { kind, restarts: Restarts::default(), state: State::Idle }
    }

    /// Starts the child, for the first time or again. Call it on the main thread only.
    pub(crate) fn start(&mut self, program: &Path, data: &DataDir) -> Result<&mut Process, UpError> {
        self.state = State::Running(Box::new(children::spawn(program, data, self.kind)?));
        match &mut self.state {
            State::Running(process) => Ok(process),
            State::Idle | State::Waiting(_) => {
                Err(UpError::Failed("a child that was started is gone".into()))
            }
        }
    }

    /// Whether it was started and not stopped for good.
    pub(crate) fn has_started(&self) -> bool {
        !matches!(self.state, State::Idle)
    }

    /// 0 while it does not run.
    pub(crate) fn pid(&self) -> u32 {
        if let State::Running(process) = &self.state { process.pid } else { 0 }
    }

    /// Waits for the next event; for ever while idle. May be cancelled and called again.
    pub(crate) async fn event(&mut self) -> Event {
        match &mut self.state {
            State::Idle => std::future::pending().await,
            State::Running(process) => Event::Ended(process.wait().await),
            State::Waiting(due) => {
                sleep_until(*due).await;
                Event::Due
            }
        }
    }

    /// Reports an end during the start, when it is not forgiven.
    pub(crate) fn ended_early(&self, status: ExitStatus) -> UpError {
        UpError::Failed(format!("the {} ended ({}){}", self.kind.name(), describe(status), self.tail()))
    }

    /// Reports an end and decides when to start it again.
    ///
    /// # Errors
    /// It ended right after its start too often.
    pub(crate) fn ended(&mut self, status: ExitStatus) -> Result<(), UpError> {
        let State::Running(process) = &self.state else { return Ok(()) };
        let name = self.kind.name();
        let report =
            format!("the {name} (pid {}) ended: {}{}", process.pid, describe(status), process.tail());
        match self.restarts.ended(process.started.elapsed()) {
            Verdict::After(pause) => {
                say(&format!("{report}\npenstock: starting it again in {} ms", pause.as_millis()));
                self.state = State::Waiting(Instant::now() + pause);
                Ok(())
            }
            Verdict::GiveUp(times) => {
                self.state = State::Idle;
                Err(UpError::Failed(format!("{report}\nThat was the {times}th time in a row; giving up")))
            }
        }
    }

    fn tail(&self) -> String {
        if let State::Running(process) = &self.state { process.tail() } else { String::new() }
    }

    /// SIGTERM, and SIGKILL to its group at `deadline` or at the next signal, after which `hasten` is set. True when it
    /// came to SIGKILL.
    pub(crate) async fn stop(&mut self, deadline: Instant, hasten: &mut bool, signals: &mut Signals) -> bool {
        let State::Running(mut process) = std::mem::replace(&mut self.state, State::Idle) else {
            return false;
        };
        process.terminate();
        if !*hasten {
            let ended = tokio::select! {
                ended = timeout_at(deadline, process.wait()) => ended.is_ok(),
                () = signals.next() => {
                    *hasten = true;
                    false
                }
            };
            if ended {
                return false;
            }
        }
        process.kill_group();
        process.wait().await;
        true
    }
}
