//! The order of everything the control plane publishes.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// (term, revision): the leader's term, then the store's revision. Written `TERM.REVISION` on the wire.
///
/// A higher term always wins, so that nothing a deposed leader still sends can replace what its successor said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version {
    /// The leader's term.
    pub term: u64,
    /// The store's revision.
    pub revision: u64,
}

/// The text was not `TERM.REVISION`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseVersionError(String);

impl fmt::Display for ParseVersionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "version {:?} is not TERM.REVISION, two decimal numbers with a dot between", self.0)
    }
}

impl std::error::Error for ParseVersionError {}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.term, self.revision)
    }
}

impl FromStr for Version {
    type Err = ParseVersionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (term, revision) = text.split_once('.')?;
            Some(Self { term: term.parse().ok()?, revision: revision.parse().ok()? })
        };
        parse().ok_or_else(|| ParseVersionError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_term_beats_any_revision() {
        let old: Version = "1.900".parse().expect("valid");
        let new: Version = "2.3".parse().expect("valid");
        assert!(new > old);
        assert_eq!(new.to_string(), "2.3");
    }

    #[test]
    fn garbage_is_refused_in_words() {
        for text in ["", "1", "1.", ".1", "a.b", "1.2.3", "-1.2"] {
            let error = text.parse::<Version>().expect_err(text);
            assert!(error.to_string().contains("TERM.REVISION"), "{error}");
        }
    }
}
