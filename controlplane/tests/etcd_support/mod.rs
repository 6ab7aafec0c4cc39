//! A real etcd for a test: processes of this test's own, on free ports, with data in a temporary folder.
//!
//! Where etcd is not installed the tests say so and pass; with CI set they fail, since there it must be
//! (`scripts/setup.sh test` installs it).
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part of this one")]

pub mod gate;
pub mod planes;

use std::{
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use etcd_client::{Client, CompactionOptions, ConnectOptions};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use penstock_config::controlplane::StoreConfig;
use tokio::time::Instant;

/// Until etcd must be up: the machine may be busy with other tests.
const PATIENCE: Duration = Duration::from_secs(60);

/// One member, running or not.
pub struct Member {
    child: Option<Child>,
    name: String,
    pub client_port: u16,
    peer_port: u16,
    data: PathBuf,
}

/// See the module's text. Every process ends with it.
pub struct Cluster {
    pub members: Vec<Member>,
    pub dir: tempfile::TempDir,
    /// Further flags of every member.
    flags: Vec<String>,
    scheme: &'static str,
    launched: usize,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for index in 0..self.members.len() {
            self.kill(index);
        }
    }
}

/// Ports that are free now, all different.
fn free_ports(count: usize) -> Vec<u16> {
    let held: Vec<TcpListener> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    held.iter().map(|listener| listener.local_addr().unwrap().port()).collect()
}

fn is_installed() -> bool {
    let found =
        Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        let reason = "etcd is not in PATH (scripts/setup.sh test installs it): nothing was tested";
        assert!(std::env::var_os("CI").is_none(), "{reason}");
        eprintln!("{reason}");
    }
    found
}

impl Cluster {
    /// `count` members that have found each other; None where etcd is not installed.
    pub async fn start(count: usize) -> Option<Self> {
        let cluster = Self::start_with(count, "http", |_| Vec::new())?;
        cluster.wait_ready().await;
        Some(cluster)
    }

    /// With further flags, made from the folder; the caller waits until it is ready.
    pub fn start_with(
        count: usize,
        scheme: &'static str,
        flags: impl FnOnce(&std::path::Path) -> Vec<String>,
    ) -> Option<Self> {
        if !is_installed() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let flags = flags(dir.path());
        // Another process may take a port between our look and etcd's: then others are tried.
        for _ in 0..5 {
            let ports = free_ports(2 * count);
            let members = ports.chunks(2).enumerate().map(|(index, ports)| Member {
                child: None,
                name: format!("m{index}"),
                client_port: ports[0],
                peer_port: ports[1],
                data: dir.path().join(format!("m{index}-{}", ports[0])),
            });
            let mut cluster = Self {
                members: members.collect(),
                dir: tempfile::tempdir().unwrap(),
                flags: flags.clone(),
                scheme,
                launched: 0,
            };
            (0..count).for_each(|index| cluster.launch(index));
            std::thread::sleep(Duration::from_millis(150));
            if cluster.members.iter_mut().all(Member::is_running) {
                cluster.dir = dir;
                return Some(cluster);
            }
        }
        panic!("etcd does not start; its output is above");
    }

    fn launch(&mut self, index: usize) {
        let peers: Vec<String> =
            self.members.iter().map(|m| format!("{}=http://127.0.0.1:{}", m.name, m.peer_port)).collect();
        let member = &mut self.members[index];
        let client = format!("{}://127.0.0.1:{}", self.scheme, member.client_port);
        let peer = format!("http://127.0.0.1:{}", member.peer_port);
        let child = Command::new("etcd")
            .args(["--name", &member.name, "--logger", "zap", "--log-level", "fatal"])
            .arg("--data-dir")
            .arg(&member.data)
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &peers.join(","), "--initial-cluster-state", "new"])
            .args(&self.flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        member.child = Some(child);
        self.launched += 1;
    }

    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|m| format!("{}://127.0.0.1:{}", self.scheme, m.client_port)).collect()
    }

    /// A store on this cluster, with short times.
    pub fn settings(&self) -> StoreConfig {
        StoreConfig {
            kind: "etcd".into(),
            endpoints: self.endpoints(),
            request_timeout_ms: 5_000,
            member_timeout_ms: 1_500,
            ..StoreConfig::default()
        }
    }

    /// A client of the member, without anything of Penstock's.
    pub async fn client(&self, index: usize) -> Client {
        let options = ConnectOptions::new().with_timeout(Duration::from_secs(2));
        Client::connect([&self.endpoints()[index]], Some(options)).await.unwrap()
    }

    /// Until every running member serves linearizable reads.
    pub async fn wait_ready(&self) {
        let deadline = Instant::now() + PATIENCE;
        for index in (0..self.members.len()).filter(|i| self.members[*i].child.is_some()) {
            while self.client(index).await.get("/", None).await.is_err() {
                assert!(Instant::now() < deadline, "etcd is not ready in time");
                tokio::time::sleep(Duration::from_millis(25)).await;
            }
        }
    }

    /// Everything that was written so far is compacted but the newest state.
    pub async fn compact(&self) {
        let running = self.members.iter().position(|member| member.child.is_some());
        let mut client = self.client(running.expect("a member runs")).await;
        let revision = client.get("/", None).await.unwrap().header().unwrap().revision();
        client.compact(revision, Some(CompactionOptions::new().with_physical())).await.unwrap();
    }

    /// Index of etcd's own leader.
    pub async fn leader(&self) -> usize {
        let deadline = Instant::now() + PATIENCE;
        loop {
            for index in (0..self.members.len()).filter(|i| self.members[*i].child.is_some()) {
                if let Ok(status) = self.client(index).await.status().await
                    && status.leader() != 0
                    && status.header().unwrap().member_id() == status.leader()
                {
                    return index;
                }
            }
            assert!(Instant::now() < deadline, "etcd elects no leader in time");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// kill -9.
    pub fn kill(&mut self, index: usize) {
        if let Some(mut child) = self.members[index].child.take() {
            drop(child.kill());
            drop(child.wait());
        }
    }

    /// SIGSTOP or SIGCONT.
    pub fn signal(&self, index: usize, signal: Signal) {
        let child = self.members[index].child.as_ref().unwrap();
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
    }

    /// Starts a killed member on its old data.
    pub fn restart(&mut self, index: usize) {
        assert!(self.members[index].child.is_none());
        self.launch(index);
    }

    /// Every member is killed, loses its data and starts anew.
    pub fn wipe(&mut self) {
        for index in 0..self.members.len() {
            self.kill(index);
            std::fs::remove_dir_all(&self.members[index].data).unwrap();
        }
        (0..self.members.len()).for_each(|index| self.launch(index));
    }
}

impl Member {
    fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.try_wait().is_ok_and(|ended| ended.is_none()))
    }
}
