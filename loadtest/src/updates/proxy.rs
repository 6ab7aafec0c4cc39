//! The proxy under test: a process of its own, looked at through /proc and its private port.

use std::{
    ffi::OsString,
    net::SocketAddr,
    path::Path,
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::Deserialize;
use tempfile::TempDir;
use tokio::{
    process::{Child, Command},
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::ads::Log;
use crate::{ask, usage};

/// How long it may take to start, to use what it was told, and to stop.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Proxy {
    pub(crate) public: SocketAddr,
    private: SocketAddr,
    pid: u32,
    child: Child,
    /// Where it keeps its state.
    _folder: TempDir,
}

#[derive(Debug, Deserialize)]
struct Announced {
    public: SocketAddr,
    private: SocketAddr,
}

#[derive(Debug, Deserialize)]
struct Readyz {
    snapshot_version: String,
}

impl Proxy {
    /// Starts one that is told of its engines at `ads`, with more settings as environment variables.
    pub(crate) async fn start(
        program: &Path,
        ads: SocketAddr,
        settings: &[(&str, &str)],
    ) -> Result<Self, String> {
        Self::launch(&[], program, ads, settings, &[]).await
    }

    /// The same, with a file of settings.
    pub(crate) async fn start_with(program: &Path, ads: SocketAddr, file: &Path) -> Result<Self, String> {
        Self::launch(&[], program, ads, &[], &["--config".into(), file.into()]).await
    }

    /// [`Self::start`] with another program and its flags in front: one that becomes the proxy, as valgrind does.
    pub(crate) async fn start_under(
        under: &[OsString],
        program: &Path,
        ads: SocketAddr,
        settings: &[(&str, &str)],
    ) -> Result<Self, String> {
        Self::launch(under, program, ads, settings, &[]).await
    }

    async fn launch(
        under: &[OsString],
        program: &Path,
        ads: SocketAddr,
        settings: &[(&str, &str)],
        args: &[OsString],
    ) -> Result<Self, String> {
        let folder = tempfile::tempdir().map_err(|e| format!("cannot make a folder: {e}"))?;
        let announce = folder.path().join("announce.json");
        let mut words = under.iter().map(OsString::as_os_str).chain([program.as_os_str()]);
        let first = words.next().unwrap_or(program.as_os_str());
        let child = Command::new(first)
            .args(words)
            .args(["--listen", "127.0.0.1:0", "--private-listen", "127.0.0.1:0", "--log-level", "warn"])
            .arg("--controlplane")
            .arg(format!("http://{ads}"))
            .arg("--announce")
            .arg(&announce)
            .env("PENSTOCK_PROXY__DISCOVERY__SNAPSHOT_FILE", folder.path().join("snapshot"))
            .env("PENSTOCK_PROXY__DRAIN__DEADLINE_MS", "1")
            .envs(settings.iter().copied())
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| format!("cannot start {}: {e}", first.display()))?;
        let pid = child.id().ok_or("the proxy has ended at once")?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(announced) =
                std::fs::read(&announce).ok().and_then(|text| serde_json::from_slice::<Announced>(&text).ok())
            {
                let Announced { public, private } = announced;
                return Ok(Self { public, private, pid, child, _folder: folder });
            }
            if Instant::now() > deadline {
                return Err("the proxy did not start".into());
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until it uses that revision or a later one.
    pub(crate) async fn wait_for_revision(&mut self, wanted: u64) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = revision(self.private).await;
            if seen.as_ref().is_ok_and(|seen| *seen >= wanted) {
                return Ok(());
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(format!("the proxy has ended: {status}"));
            }
            if Instant::now() > deadline {
                return Err(format!("the proxy does not use revision {wanted}: {seen:?}"));
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Notes in `log` which revision it uses, every few milliseconds, until aborted.
    pub(super) fn watch(&self, log: Arc<Log>) -> JoinHandle<()> {
        let private = self.private;
        tokio::spawn(async move {
            loop {
                if let Ok(seen) = revision(private).await {
                    log.in_use(seen, Instant::now());
                }
                sleep(Duration::from_millis(10)).await;
            }
        })
    }

    /// Its process id.
    pub(crate) const fn pid(&self) -> u32 {
        self.pid
    }

    /// CPU time it has used.
    pub(crate) fn cpu(&self) -> Result<Duration, String> {
        usage::cpu(self.pid)
    }

    /// Memory that is in RAM.
    pub(crate) fn memory(&self) -> Result<u64, String> {
        usage::memory(self.pid)
    }

    /// Ends it.
    pub(crate) async fn stop(mut self) -> Result<(), String> {
        self.child.start_kill().map_err(|e| format!("cannot end the proxy: {e}"))?;
        timeout(PATIENCE, self.child.wait())
            .await
            .map_err(|_| "the proxy does not end")?
            .map_err(|e| e.to_string())?;
        Ok(())
    }
}

/// The revision that the proxy at `private` says it uses.
async fn revision(private: SocketAddr) -> Result<u64, String> {
    let ready: Readyz =
        serde_json::from_value(ask::json(private, "/readyz").await?).map_err(|e| format!("/readyz: {e}"))?;
    let (_, revision) = ready.snapshot_version.split_once('.').ok_or("/readyz: no version")?;
    revision.parse().map_err(|_| "/readyz: no revision".to_owned())
}
