//! Why `penstock up` could not do what was asked.

use crate::output::USAGE;

/// The text is for the person at the terminal: what was tried, what is wrong, what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpError {
    /// The command line or the settings cannot work: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// It could work, and did not: exit code 1.
    #[error("{0}")]
    Failed(String),
    /// The error was printed before the children were stopped; what is left is the exit code.
    #[error("stopped after the failure above")]
    Said(u8),
    /// A signal asked to stop before all was ready: exit code 0, as after any other stop.
    #[error("interrupted")]
    Interrupted,
}

impl UpError {
    /// What `penstock` exits with.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => USAGE,
            Self::Failed(_) => 1,
            Self::Said(code) => *code,
            Self::Interrupted => 0,
        }
    }

    /// `what` says what was tried.
    pub(crate) fn io(what: &str, path: &std::path::Path, error: &std::io::Error) -> Self {
        Self::Failed(format!("cannot {what} {}: {error}", path.display()))
    }
}
