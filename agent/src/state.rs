//! The state folder: what survives the agent, and the lock that keeps a second agent out.
//!
//! ```text
//! STATE_DIR/agent.lock           held while an agent runs; holds its pid
//!           assignments.json     the last accepted assignments
//!           engines/STEM.json    one record per engine (see `engine::records`)
//!           prefetch/STEM.json   one mark per model that was fetched (see `warm::prefetch`)
//!           logs/STEM.log        one log per engine, and STEM.previous.log
//! ```
//!
//! Every file is replaced by rename, so that a reader sees the old or the new one, whole.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::fcntl::{Flock, FlockArg};
use tokio::time::Instant;

use crate::assignment::Desired;

const LOCK_POLL: Duration = Duration::from_millis(100);

/// Why the state folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    /// It cannot be made or written.
    #[error("cannot use the state folder {path} (setting state_dir): {source}")]
    Unusable {
        /// The folder or file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// Another agent has it.
    #[error(
        "the state folder {path} (setting state_dir) is in use by another agent (pid {pid}); \
         stop that one, or give this one a folder of its own"
    )]
    InUse {
        /// The folder.
        path: String,
        /// What the lock file says.
        pid: String,
    },
}

/// Paths in the state folder.
#[derive(Debug, Clone)]
pub(crate) struct StateDir {
    root: PathBuf,
}

/// Keeps other agents out while it lives.
#[derive(Debug)]
pub(crate) struct StateLock {
    _lock: Flock<File>,
}

impl StateDir {
    /// Makes the folder where needed and takes its lock, waiting at most `wait` for an agent that is just stopping.
    ///
    /// # Errors
    /// The folder cannot be used, or another agent keeps it.
    pub(crate) async fn open(root: &Path, wait: Duration) -> Result<(Self, StateLock), StateError> {
        let unusable = |path: &Path| {
            let path = path.display().to_string();
            move |source| StateError::Unusable { path, source }
        };
        for dir in [root.to_owned(), root.join("engines"), root.join("logs")] {
            DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(unusable(&dir))?;
        }
        let root = root.canonicalize().map_err(unusable(root))?;
        let lock = lock(&root, wait).await?;
        Ok((Self { root }, lock))
    }

    /// The folder itself, without links in its path.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Where engine records are.
    pub(crate) fn engines(&self) -> PathBuf {
        self.root.join("engines")
    }

    /// Where the marks of fetched models are; made with the first.
    pub(crate) fn prefetches(&self) -> PathBuf {
        self.root.join("prefetch")
    }

    /// Where engine logs are.
    pub(crate) fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// Where dumps of engines that hung are.
    pub(crate) fn dumps(&self) -> PathBuf {
        self.root.join("dumps")
    }

    /// The log of the replica's engine.
    pub(crate) fn log(&self, replica_id: &str) -> PathBuf {
        self.logs().join(format!("{}.log", stem(replica_id)))
    }

    /// What the node's programs said of their versions.
    pub(crate) fn versions(&self) -> PathBuf {
        self.root.join("versions.json")
    }

    fn assignments(&self) -> PathBuf {
        self.root.join("assignments.json")
    }

    /// The assignments accepted last; `None` when there were none, or their file cannot be read (which is logged).
    pub(crate) fn load_assignments(&self) -> Option<Desired> {
        let path = self.assignments();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "cannot read the last assignments");
                return None;
            }
        };
        serde_json::from_str(&text)
            .inspect_err(
                |error| tracing::error!(path = %path.display(), %error, "the last assignments are damaged"),
            )
            .ok()
    }

    /// Keeps the assignments for the next agent.
    pub(crate) fn store_assignments(&self, desired: &Desired) -> io::Result<()> {
        write_atomically(&self.assignments(), &serde_json::to_vec_pretty(desired)?)
    }
}

/// Replaces `path` by a file with these bytes, whole or not at all, also across a loss of power.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_data()?;
    fs::rename(&temporary, path)
}

/// A file name for a replica id: letters, digits, '-', '_' and '.' stay, other bytes become %XX. Distinct ids have distinct
/// names; an id that would give too long a name ends in its hash.
pub(crate) fn stem(replica_id: &str) -> String {
    const LONGEST: usize = 120;
    let mut stem = String::new();
    for byte in replica_id.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => stem.push(char::from(byte)),
            _ => stem.push_str(&format!("%{byte:02X}")),
        }
    }
    if stem.len() > LONGEST {
        stem.truncate(LONGEST);
        stem.push_str(&format!("%{:016x}", hash(replica_id)));
    }
    stem
}

/// FNV-1a: short and the same in every release.
pub(crate) fn hash(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

async fn lock(root: &Path, wait: Duration) -> Result<StateLock, StateError> {
    let path = root.join("agent.lock");
    let unusable = |source| StateError::Unusable { path: path.display().to_string(), source };
    let deadline = Instant::now() + wait;
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .map_err(unusable)?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                let note = |file: &mut File| {
                    file.rewind()?;
                    file.set_len(0)?;
                    file.write_all(std::process::id().to_string().as_bytes())
                };
                note(&mut lock).map_err(unusable)?;
                return Ok(StateLock { _lock: lock });
            }
            Err((back, errno)) if errno == nix::errno::Errno::EWOULDBLOCK => file = back,
            Err((_, errno)) => return Err(unusable(errno.into())),
        }
        if Instant::now() >= deadline {
            let mut pid = String::new();
            let read = file.rewind().and_then(|()| file.read_to_string(&mut pid));
            let pid = if read.is_ok() && !pid.is_empty() { pid } else { "unknown".into() };
            return Err(StateError::InUse { path: root.display().to_string(), pid });
        }
        tokio::time::sleep(LOCK_POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[tokio::test]
    async fn one_agent_at_a_time_and_the_second_is_told_who() {
        let dir = tempfile::tempdir().unwrap();
        let (_, lock) = StateDir::open(dir.path(), Duration::ZERO).await.unwrap();
        let error = StateDir::open(dir.path(), Duration::ZERO).await.unwrap_err().to_string();
        assert!(
            error.contains("in use by another agent") && error.contains(&std::process::id().to_string()),
            "{error}"
        );
        drop(lock);
        StateDir::open(dir.path(), Duration::ZERO).await.unwrap();
    }

    #[tokio::test]
    async fn assignments_survive_and_damage_is_no_assignments() {
        let dir = tempfile::tempdir().unwrap();
        let (state, _lock) = StateDir::open(dir.path(), Duration::ZERO).await.unwrap();
        assert_eq!(state.load_assignments(), None);
        let desired = Desired { version: "3.9".parse().unwrap(), assignments: vec![] };
        state.store_assignments(&desired).unwrap();
        assert_eq!(state.load_assignments(), Some(desired));
        fs::write(state.assignments(), b"{\"versi").unwrap();
        assert_eq!(state.load_assignments(), None);
    }

    #[tokio::test]
    async fn a_folder_that_cannot_be_made_names_the_setting() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = StateDir::open(&file.path().join("x"), Duration::ZERO).await.unwrap_err().to_string();
        assert!(error.contains("setting state_dir"), "{error}");
    }

    proptest! {
        #[test]
        fn stems_are_file_names_and_distinct(a in ".{0,80}", b in ".{0,80}") {
            let (x, y) = (stem(&a), stem(&b));
            prop_assert!(x.len() <= 140 && !x.contains('/') && !x.contains('.'));
            prop_assert_eq!(a == b, x == y);
        }
    }
}
