//! The data directory of one `penstock up`: one owner at a time, and every path in it.
//!
//! ```text
//! up.lock        held (flock) by the running `up`, whose pid it holds; let go by the kernel however `up` ends
//! up.json        what the JSON line says, while all is ready
//! config/        the settings each process was started with, written anew at each start
//! run/           announce files
//! logs/          one log per process, appended
//! controlplane/ agent/ proxy/   state that a later start resumes
//! ```

use std::{
    fs::{File, OpenOptions},
    io::{Read, Seek, Write},
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};

use super::error::UpError;

/// A log larger than this is put aside (one older one is kept) when its process is first started.
const LOG_BYTES: u64 = 16 << 20;

#[derive(Debug)]
pub(crate) struct DataDir {
    root: PathBuf,
    /// Held for its lifetime. Not inherited by children: files are opened close-on-exec.
    _lock: Flock<File>,
}

impl DataDir {
    /// Makes the directory if needed and takes the lock.
    pub(crate) fn open(path: &Path) -> Result<Self, UpError> {
        for folder in ["config", "run", "logs", "controlplane", "agent", "proxy"] {
            let folder = path.join(folder);
            std::fs::create_dir_all(&folder).map_err(|e| UpError::io("create the folder", &folder, &e))?;
        }
        let root = path.canonicalize().map_err(|e| UpError::io("open the data directory", path, &e))?;
        let lock = lock(&root)?;
        Ok(Self { root, _lock: lock })
    }

    /// The canonical path, which also marks this `up`'s processes.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn config(&self, process: &str) -> PathBuf {
        self.root.join("config").join(format!("{process}.toml"))
    }

    pub(crate) fn announce(&self, process: &str) -> PathBuf {
        self.root.join("run").join(format!("{process}.json"))
    }

    pub(crate) fn log(&self, process: &str) -> PathBuf {
        self.root.join("logs").join(format!("{process}.log"))
    }

    pub(crate) fn state(&self, process: &str) -> PathBuf {
        self.root.join(process)
    }

    pub(crate) fn summary(&self) -> PathBuf {
        summary(&self.root)
    }

    /// Puts large logs of earlier runs aside.
    pub(crate) fn rotate_log(&self, process: &str) {
        let log = self.log(process);
        if std::fs::metadata(&log).is_ok_and(|meta| meta.len() > LOG_BYTES) {
            // Failing leaves one long log, which is no reason not to start.
            drop(std::fs::rename(&log, log.with_extension("log.1")));
        }
    }
}

/// Where the `up` that owns `root` says what runs where.
pub(crate) fn summary(root: &Path) -> PathBuf {
    root.join("up.json")
}

/// `given`, else `~/.local/share/penstock`.
pub(crate) fn default_or(given: Option<&Path>) -> Result<PathBuf, UpError> {
    match (given, std::env::var_os("HOME").filter(|home| !home.is_empty())) {
        (Some(path), _) => Ok(path.to_path_buf()),
        (None, Some(home)) => Ok(PathBuf::from(home).join(".local/share/penstock")),
        (None, None) => {
            Err(UpError::Usage("HOME is not set: name a data directory with --data-dir DIR".into()))
        }
    }
}

fn lock(root: &Path) -> Result<Flock<File>, UpError> {
    let path = root.join("up.lock");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|e| UpError::io("open the lock file", &path, &e))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            let written = lock
                .set_len(0)
                .and_then(|()| lock.rewind())
                .and_then(|()| lock.write_all(std::process::id().to_string().as_bytes()));
            written.map_err(|e| UpError::io("write the lock file", &path, &e))?;
            Ok(lock)
        }
        Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
            let mut pid = String::new();
            let holder = match file.read_to_string(&mut pid) {
                Ok(_) if !pid.trim().is_empty() => format!("pid {}", pid.trim()),
                _ => "pid unknown".into(),
            };
            Err(UpError::Failed(format!(
                "another `penstock up` ({holder}) uses {}; stop that one, or give this one its own --data-dir \
                 (and --ports auto)",
                root.display()
            )))
        }
        Err((_, error)) => Err(UpError::io("lock", &path, &error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_owner_is_refused_with_the_first_ones_pid_until_it_lets_go() {
        let dir = tempfile::tempdir().unwrap();
        let first = DataDir::open(dir.path()).unwrap();
        let error = DataDir::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
        assert!(error.contains("--data-dir"), "{error}");
        drop(first);
        DataDir::open(dir.path()).unwrap();
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = DataDir::open(&file.path().join("below")).unwrap_err().to_string();
        assert!(error.contains("below/config"), "{error}");
    }

    #[test]
    fn only_a_large_log_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        std::fs::write(data.log("proxy"), "short").unwrap();
        File::create(data.log("agent")).unwrap().set_len(LOG_BYTES + 1).unwrap();
        data.rotate_log("proxy");
        data.rotate_log("agent");
        assert!(data.log("proxy").exists());
        assert!(!data.log("agent").exists());
        assert!(data.root().join("logs/agent.log.1").exists());
    }
}
