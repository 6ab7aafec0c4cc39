//! One child under supervision: running, or waiting to be started again.

use std::{path::Path, process::ExitStatus, time::Duration};

use tokio::time::{Instant, sleep, sleep_until, timeout_at};

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
    /// Have given way to a successor, and finish what they have.
    finishing: Vec<Process>,
}

/// Between two looks for a successor.
const LOOK: Duration = Duration::from_millis(200);

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
    /// Another process has taken its place, of its own accord.
    Succeeded(Box<Process>),
}

impl Supervised {
    pub(crate) fn new(kind: Kind) -> Self {
        Self { kind, restarts: Restarts::default(), state: State::Idle, finishing: Vec::new() }
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
            State::Running(process) => loop {
                let ended = tokio::select! {
                    status = process.wait() => Some(status),
                    () = sleep(LOOK), if self.kind == Kind::Proxy => None,
                };
                self.finishing.retain_mut(|old| !old.has_ended());
                if let Some(successor) = process.successor() {
                    return Event::Succeeded(Box::new(successor));
                }
                if let Some(status) = ended {
                    return Event::Ended(status);
                }
            },
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

    /// Watches `successor` from here on, and lets the process before it finish.
    pub(crate) fn succeeded(&mut self, successor: Box<Process>) {
        let (name, pid) = (self.kind.name(), successor.pid);
        if let State::Running(old) = std::mem::replace(&mut self.state, State::Running(successor)) {
            say(&format!("the {name} gave way to a new process: pid {pid}, before {}", old.pid));
            self.finishing.push(*old);
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
        let mut finishing = std::mem::take(&mut self.finishing);
        finishing.iter().for_each(Process::terminate);
        if !*hasten {
            let all = async {
                process.wait().await;
                for old in &mut finishing {
                    old.wait().await;
                }
            };
            let ended = tokio::select! {
                ended = timeout_at(deadline, all) => ended.is_ok(),
                () = signals.next() => {
                    *hasten = true;
                    false
                }
            };
            if ended {
                return false;
            }
        }
        for left in finishing.iter_mut().chain([process.as_mut()]) {
            left.kill_group();
            left.wait().await;
        }
        true
    }
}
