//! A small fleet, process by process, on an etcd of its own: so that each can be killed and come back at the same place.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{client, load::until, penstock, pid};

/// For a process to be up, or for the fleet to have settled, on a machine that is busy with other tests.
pub(crate) const LONGEST: Duration = Duration::from_secs(90);

/// A process that ends with the test.
pub(crate) struct Process {
    name: String,
    make: Box<dyn Fn() -> Command + Send + Sync>,
    child: Option<Child>,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Process {
    fn new(name: &str, make: impl Fn() -> Command + Send + Sync + 'static) -> Self {
        let mut process = Self { name: name.into(), make: Box::new(make), child: None };
        process.start();
        process
    }

    pub(crate) fn start(&mut self) {
        assert!(self.child.is_none(), "{} runs", self.name);
        self.child = Some((self.make)().stdin(Stdio::null()).spawn().unwrap());
    }

    /// With SIGKILL.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// With SIGTERM, and waits; how it ended, if it ran.
    fn terminate(&mut self) -> Option<ExitStatus> {
        let mut child = self.child.take()?;
        kill(pid(child.id()), Signal::SIGTERM).ok()?;
        child.wait().ok()
    }

    /// The same; it must end well.
    pub(crate) fn stop(&mut self) {
        let ended = self.terminate();
        assert!(ended.is_some_and(|status| status.success()), "{}: {ended:?}", self.name);
    }
}

/// Wrong clocks of processes, by name, through libfaketime (Debian's `faketime`). Their monotonic clocks are right, as they
/// are on a machine whose date is wrong.
#[derive(Clone)]
pub(crate) struct Clocks {
    library: PathBuf,
    dir: PathBuf,
}

impl Clocks {
    /// In a folder that outlives the processes. None, with the reason printed, where there is no libfaketime.
    pub(crate) fn new(dir: &Path) -> Option<Self> {
        let libraries = std::fs::read_dir("/usr/lib").unwrap().filter_map(Result::ok);
        let mut at = libraries.map(|folder| folder.path().join("faketime/libfaketimeMT.so.1"));
        let library = at.find(|file| file.exists());
        if library.is_none() {
            let reason = "no libfaketime (scripts/setup.sh test installs it): nothing was tested";
            assert!(std::env::var_os("CI").is_none(), "{reason}");
            println!("{reason}");
        }
        Some(Self { library: library?, dir: dir.into() })
    }

    /// Sets a process's clock, running or not: "+1h", "-1h", "+0".
    pub(crate) fn set(&self, process: &str, offset: &str) {
        let (file, new) = (self.file(process), self.dir.join("new"));
        std::fs::write(&new, offset).unwrap();
        std::fs::rename(new, file).unwrap();
    }

    fn file(&self, process: &str) -> PathBuf {
        self.dir.join(format!("{process}.clock"))
    }

    fn worn_by(&self, command: &mut Command, process: &str) {
        let file = self.file(process);
        if file.exists() {
            command.env("LD_PRELOAD", &self.library).env("FAKETIME_TIMESTAMP_FILE", file);
            command.envs([("DONT_FAKE_MONOTONIC", "1"), ("FAKETIME_CACHE_DURATION", "1")]);
        }
    }
}

/// See the module's text. The last fields are dropped last: engines end with their agent.
pub(crate) struct Fleet {
    pub(crate) proxies: Vec<Process>,
    pub(crate) controlplanes: Vec<Process>,
    pub(crate) etcd: Process,
    agent: Process,
    ports: Ports,
    dir: TempDir,
}

#[derive(Clone)]
struct Ports {
    etcd: [u16; 2],
    http: [u16; 2],
    grpc: [u16; 2],
    public: [u16; 2],
    private: [u16; 2],
    agent: u16,
}

/// Free ones, all different: they are held until all are found.
fn free_ports() -> Ports {
    let held: Vec<TcpListener> = (0..11).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let mut ports = held.iter().map(|socket| socket.local_addr().unwrap().port());
    let mut pair = || [ports.next().unwrap(), ports.next().unwrap()];
    let (etcd, http, grpc, public, private) = (pair(), pair(), pair(), pair(), pair());
    Ports { etcd, http, grpc, public, private, agent: ports.next().unwrap() }
}

fn logged(mut command: Command, log: &Path) -> Command {
    let file = std::fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
    command.stdout(file.try_clone().unwrap()).stderr(file);
    command
}

impl Drop for Fleet {
    /// A test that failed shows what was logged last, and its engines end with their agent.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        self.agent.terminate();
        for file in std::fs::read_dir(self.dir.path()).unwrap().filter_map(Result::ok) {
            let path = file.path();
            if path.extension().is_some_and(|extension| extension == "log") {
                let text = std::fs::read_to_string(&path).unwrap_or_default();
                let last: Vec<&str> = text.lines().rev().take(25).collect();
                let last: Vec<&str> = last.into_iter().rev().collect();
                eprintln!("--- {}\n{}", path.display(), last.join("\n"));
            }
        }
    }
}

impl Fleet {
    /// Two control planes, two proxies and an agent. None, with the reason printed, where there is no etcd.
    pub(crate) fn start() -> Option<Self> {
        Self::start_with(None)
    }

    /// The same, with wrong clocks: of "controlplane-0", "controlplane-1" and "agent", if they were set.
    pub(crate) fn start_with(clocks: Option<&Clocks>) -> Option<Self> {
        if Command::new("etcd").arg("--version").output().is_err() {
            println!("skipped: no etcd on this machine (apt-get install etcd-server)");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let at: PathBuf = dir.path().into();
        let ports = free_ports();
        let etcd = {
            let (at, [port, peer]) = (at.clone(), ports.etcd);
            Process::new("etcd", move || {
                let mut command = Command::new("etcd");
                let url = |port: u16| format!("http://127.0.0.1:{port}");
                command.arg("--data-dir").arg(at.join("etcd")).args(["--log-level", "error"]);
                for (flag, port) in [("client", port), ("peer", peer)] {
                    command.arg(format!("--listen-{flag}-urls")).arg(url(port));
                }
                command.arg("--advertise-client-urls").arg(url(port));
                command.arg("--initial-advertise-peer-urls").arg(url(peer));
                command.arg("--initial-cluster").arg(format!("default={}", url(peer)));
                logged(command, &at.join("etcd.log"))
            })
        };
        let controlplanes = (0..2).map(|index| {
            let (at, ports, clocks) = (at.clone(), ports.clone(), clocks.cloned());
            Process::new("controlplane", move || {
                let mut command = penstock();
                command.arg("controlplane");
                clocks.iter().for_each(|c| c.worn_by(&mut command, &format!("controlplane-{index}")));
                command.arg("--http-listen").arg(format!("127.0.0.1:{}", ports.http[index]));
                command.arg("--grpc-listen").arg(format!("127.0.0.1:{}", ports.grpc[index]));
                command.arg("--etcd-endpoints").arg(format!("http://127.0.0.1:{}", ports.etcd[0]));
                logged(command, &at.join(format!("controlplane-{index}.log")))
            })
        });
        let controlplanes: Vec<Process> = controlplanes.collect();
        let grpc = json!(ports.grpc.map(|port| format!("http://127.0.0.1:{port}"))).to_string();
        let agent = {
            let (at, endpoints, clocks) = (at.clone(), grpc.clone(), clocks.cloned());
            let port = ports.agent;
            Process::new("agent", move || {
                let mut command = penstock();
                command.arg("agent");
                clocks.iter().for_each(|c| c.worn_by(&mut command, "agent"));
                let sim = json!([env!("CARGO_BIN_EXE_penstock"), "engine-sim"]).to_string();
                for (key, value) in [
                    ("NODE_ID", "node-1"),
                    ("STATE_DIR", at.join("agent").to_str().unwrap()),
                    ("PRIVATE__LISTEN", &format!("127.0.0.1:{port}")),
                    ("CONTROLPLANE__ENDPOINTS", &endpoints),
                    ("GPUS__SOURCE", "simulated"),
                    ("GPUS__SIMULATED_COUNT", "4"),
                    ("ENGINES__PORT_BASE", "0"),
                    ("ENGINES__SIM__COMMAND", &sim),
                ] {
                    command.env(format!("PENSTOCK_AGENT__{key}"), value);
                }
                logged(command, &at.join("agent.log"))
            })
        };
        let proxies = (0..2).map(|index| {
            let (at, ports, controlplanes) = (at.clone(), ports.clone(), grpc.clone());
            Process::new("proxy", move || {
                let mut command = penstock();
                command.arg("proxy");
                let file = at.join(format!("snapshot-{index}"));
                for (key, value) in [
                    ("PUBLIC__LISTEN", format!("127.0.0.1:{}", ports.public[index]).as_str()),
                    ("PRIVATE__LISTEN", &format!("127.0.0.1:{}", ports.private[index])),
                    ("DISCOVERY__NODE_ID", &format!("proxy-{index}")),
                    ("DISCOVERY__CONTROLPLANES", &controlplanes),
                    ("DISCOVERY__SNAPSHOT_FILE", file.to_str().unwrap()),
                ] {
                    command.env(format!("PENSTOCK_PROXY__{key}"), value);
                }
                logged(command, &at.join(format!("proxy-{index}.log")))
            })
        });
        let proxies = proxies.collect();
        Some(Self { proxies, controlplanes, etcd, agent, ports, dir })
    }

    /// Of a proxy's API.
    pub(crate) fn url(&self, proxy: usize) -> String {
        format!("http://127.0.0.1:{}", self.ports.public[proxy])
    }

    /// What a proxy says of itself; None while it is not there.
    pub(crate) async fn readyz(&self, proxy: usize) -> Option<Value> {
        let url = format!("http://127.0.0.1:{}/readyz", self.ports.private[proxy]);
        client().get(url).send().await.ok()?.json().await.ok()
    }

    /// An answer of some control plane, if it is a good one.
    pub(crate) async fn ask(&self, plane: usize, path: &str) -> Option<Value> {
        let url = format!("http://127.0.0.1:{}{path}", self.ports.http[plane]);
        let answer = client().get(url).send().await.ok()?;
        if answer.status().is_success() { answer.json().await.ok() } else { None }
    }

    /// Deploys "m" and waits until both proxies serve it.
    pub(crate) async fn deploy(&self, replicas: u32) {
        self.deploy_by(0, replicas).await;
    }

    /// The same by one control plane.
    pub(crate) async fn deploy_by(&self, plane: usize, replicas: u32) {
        let url = format!("http://127.0.0.1:{}/api/v2/deployments/m", self.ports.http[plane]);
        let body = json!({"engine": "sim", "model_path": "x", "replicas": replicas});
        until("it is deployed", LONGEST, async || {
            let answer = client().put(&url).json(&body).send().await.ok()?;
            answer.status().is_success().then_some(())
        })
        .await;
        for proxy in 0..2 {
            until("a proxy knows all", LONGEST, async || {
                let known = self.endpoints(proxy).await?;
                (known.len() == replicas as usize).then_some(())
            })
            .await;
        }
    }

    /// The endpoints of "m" as a proxy knows them.
    pub(crate) async fn endpoints(&self, proxy: usize) -> Option<Vec<Value>> {
        let url = format!("http://127.0.0.1:{}/debug/endpoints", self.ports.private[proxy]);
        let known: Value = client().get(url).send().await.ok()?.json().await.ok()?;
        known["models"]["m"].as_array().cloned()
    }

    /// Ends everything in order, engines included.
    pub(crate) fn stop(mut self) {
        self.agent.stop();
        for process in self.proxies.iter_mut().chain(&mut self.controlplanes) {
            process.stop();
        }
    }
}
