//! The signals that mean "stop".

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::error::UpError;

/// SIGINT (Ctrl-C), SIGTERM, and SIGHUP (the terminal is gone), from now on.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    pub(crate) fn new() -> Result<Self, UpError> {
        let listen =
            |kind| signal(kind).map_err(|e| UpError::Failed(format!("cannot listen for signals: {e}")));
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    /// The next of them. May be cancelled and called again.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}
