//! The engines: simulators, each a process of its own, so that their work is not counted as the proxy's.

use std::{net::SocketAddr, path::Path, process::Stdio, time::Duration};

use serde::Deserialize;
use tempfile::TempDir;
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep},
};

/// How long one may take to start.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running simulator; it ends with this.
pub(crate) struct Engine {
    pub(crate) address: SocketAddr,
    _child: Child,
    _folder: TempDir,
}

#[derive(Debug, Deserialize)]
struct Announced {
    address: SocketAddr,
}

impl Engine {
    /// Starts one with more flags and waits until it is ready.
    pub(crate) async fn start(program: &Path, model: &str, flags: &[String]) -> Result<Self, String> {
        let folder = tempfile::tempdir().map_err(|e| format!("cannot make a folder: {e}"))?;
        let announce = folder.path().join("announce.json");
        let mut child = Command::new(program)
            .args(["serve", model, "--host", "127.0.0.1", "--port", "0"])
            .args(["--sim-no-core", "--sim-load-ms", "1", "--max-num-seqs", "100000", "--sim-announce"])
            .arg(&announce)
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| format!("cannot start {}: {e}", program.display()))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = std::fs::read(&announce).ok();
            if let Some(said) = said.and_then(|text| serde_json::from_slice::<Announced>(&text).ok()) {
                return Ok(Self { address: said.address, _child: child, _folder: folder });
            }
            if let Ok(Some(status)) = child.try_wait() {
                return Err(format!("an engine has ended at once: {status}"));
            }
            if Instant::now() > deadline {
                return Err("an engine did not start".into());
            }
            sleep(Duration::from_millis(20)).await;
        }
    }
}
