//! The signals of a process's life: SIGTERM and SIGINT stop it, SIGUSR2 upgrades it. SIGHUP goes to [`crate::listener::reload`].

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// What an operator can ask for by a signal.
pub(crate) enum Asked {
    /// To finish what there is, and end.
    Stop,
    /// To give way to a new binary.
    Upgrade,
}

/// The signals that are listened to.
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    upgrade: Signal,
    /// Whether it was asked to stop while it did something else.
    pub(crate) stop_came: bool,
}

impl Signals {
    /// Listens from here on.
    pub(crate) fn new() -> Result<Self, String> {
        let of = |kind| signal(kind).map_err(|e| e.to_string());
        Ok(Self {
            terminate: of(SignalKind::terminate())?,
            interrupt: of(SignalKind::interrupt())?,
            upgrade: of(SignalKind::user_defined2())?,
            stop_came: false,
        })
    }

    /// The next of them.
    pub(crate) async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::Stop,
            _ = self.interrupt.recv() => Asked::Stop,
            _ = self.upgrade.recv() => Asked::Upgrade,
        }
    }

    /// Waits for SIGTERM or SIGINT alone, and remembers it.
    pub(crate) async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
        self.stop_came = true;
    }

    /// A token that the next SIGTERM or SIGINT cancels.
    pub(crate) fn hurry(mut self) -> CancellationToken {
        let hurry = CancellationToken::new();
        let second = hurry.clone();
        // Lives as long as the drain: the process ends after it.
        drop(tokio::spawn(async move {
            self.stop().await;
            second.cancel();
        }));
        hurry
    }
}
