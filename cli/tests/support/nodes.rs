//! A control plane, a proxy and several nodes as processes of their own. The test is what systemd is elsewhere: an agent that
//! ends is started again.

use std::{
    collections::BTreeMap,
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
    },
    thread::JoinHandle,
    time::Duration,
};

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{client, load::until, penstock, pid};

/// For anything, on a machine that is busy with other tests.
pub(crate) const LONGEST: Duration = Duration::from_secs(120);

/// Settings as environment variables, without their prefix.
pub(crate) type Settings<'a> = &'a [(&'a str, &'a str)];

/// See the module's text. Whatever is left of it ends with it.
pub(crate) struct Nodes {
    pub(crate) agents: Vec<Agent>,
    controlplane: Child,
    proxy: Child,
    http: u16,
    public: u16,
    dir: TempDir,
}

/// One node's agent, started again whenever it ends.
pub(crate) struct Agent {
    pub(crate) node_id: String,
    pub(crate) state_dir: PathBuf,
    private: u16,
    pid: Arc<AtomicU32>,
    ends: Arc<AtomicBool>,
    keeper: Option<JoinHandle<()>>,
}

/// An engine, as its agent's record has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Recorded {
    pub(crate) replica_id: String,
    pub(crate) pid: i32,
    pub(crate) port: u16,
}

/// A process of an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Marked {
    pub(crate) pid: i32,
    pub(crate) group: i32,
    pub(crate) state: char,
}

fn logged(mut command: Command, log: &Path) -> Command {
    let file = fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
    command.stdout(file.try_clone().unwrap()).stderr(file);
    command
}

fn free_ports(count: usize) -> Vec<u16> {
    let held: Vec<TcpListener> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    held.iter().map(|socket| socket.local_addr().unwrap().port()).collect()
}

impl Nodes {
    /// One node for each of `nodes`: the settings of its agent beside those that all need.
    pub(crate) fn start(nodes: &[Settings<'_>], controlplane: Settings<'_>, proxy: Settings<'_>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        let ports = free_ports(4 + nodes.len());
        let [http, grpc, public, private] = ports[..4] else { unreachable!("four") };
        let local = |port: u16| format!("127.0.0.1:{port}");
        let start = |name: &str, own: &[(&str, String)], settings: Settings<'_>| {
            let mut command = penstock();
            command.arg(name);
            let prefix = format!("PENSTOCK_{}__", name.to_uppercase());
            for (key, value) in own {
                command.env(format!("{prefix}{key}"), value);
            }
            for (key, value) in settings {
                command.env(format!("{prefix}{key}"), value);
            }
            logged(command, &at.join(format!("{name}.log"))).spawn().unwrap()
        };
        let file = |name: &str| at.join(name).to_str().unwrap().to_owned();
        let planes = [
            ("LISTEN__HTTP", local(http)),
            ("LISTEN__GRPC", local(grpc)),
            ("STORE__PATH", file("store.redb")),
        ];
        let controlplane = start("controlplane", &planes, controlplane);
        let endpoints = json!([format!("http://{}", local(grpc))]).to_string();
        let gateway = [
            ("PUBLIC__LISTEN", local(public)),
            ("PRIVATE__LISTEN", local(private)),
            ("DISCOVERY__NODE_ID", "proxy".to_owned()),
            ("DISCOVERY__CONTROLPLANES", endpoints.clone()),
            ("DISCOVERY__SNAPSHOT_FILE", file("snapshot")),
        ];
        let proxy = start("proxy", &gateway, proxy);
        let agents = nodes.iter().zip(&ports[4..]).enumerate();
        let agents = agents.map(|(n, (settings, port))| Agent::start(at, n, *port, &endpoints, settings));
        let agents = agents.collect();
        Self { agents, controlplane, proxy, http, public, dir }
    }

    /// Of the API for clients.
    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.public)
    }

    /// A good answer of the control plane.
    pub(crate) async fn ask(&self, path: &str) -> Option<Value> {
        let answer = client().get(format!("http://127.0.0.1:{}{path}", self.http)).send().await.ok()?;
        if answer.status().is_success() { answer.json().await.ok() } else { None }
    }

    /// Deploys "m" once so many nodes are there.
    pub(crate) async fn deploy(&self, spec: Value) {
        let nodes = self.agents.len();
        until("all nodes are there", LONGEST, async || {
            let seen = self.ask("/api/v2/nodes").await?;
            (seen["nodes"].as_array()?.len() == nodes).then_some(())
        })
        .await;
        let url = format!("http://127.0.0.1:{}/api/v2/deployments/m", self.http);
        let answer = client().put(url).json(&spec).send().await.unwrap();
        assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
    }

    /// Takes "m" away.
    pub(crate) async fn undeploy(&self) {
        let url = format!("http://127.0.0.1:{}/api/v2/deployments/m", self.http);
        let answer = client().delete(url).send().await.unwrap();
        assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
    }

    /// The replicas of "m", as the control plane tells them.
    pub(crate) async fn endpoints(&self) -> Option<Vec<Value>> {
        self.ask("/api/v2/endpoints").await?["endpoints"].as_array().cloned()
    }

    /// How "m" stands.
    pub(crate) async fn status(&self) -> Option<Value> {
        Some(self.ask("/api/v2/deployments/m").await?["status"].clone())
    }

    /// Waits until exactly so many replicas have a place, all ready.
    pub(crate) async fn wait_for_ready(&self, wanted: usize) -> Vec<Value> {
        until("as many replicas as wanted, all ready", LONGEST, async || {
            let endpoints = self.endpoints().await?;
            let ready = endpoints.iter().filter(|e| e["state"] == "ready").count();
            (ready == wanted && endpoints.len() == wanted).then_some(endpoints)
        })
        .await
    }

    /// Ends everything.
    pub(crate) fn stop(mut self) {
        for agent in &mut self.agents {
            agent.stop();
        }
        for child in [&mut self.proxy, &mut self.controlplane] {
            kill(pid(child.id()), Signal::SIGTERM).unwrap();
            assert!(child.wait().unwrap().success());
        }
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for agent in &mut self.agents {
            agent.kill();
        }
        for child in [&mut self.proxy, &mut self.controlplane] {
            child.kill().ok();
            child.wait().ok();
        }
        for process in self.agents.iter().flat_map(Agent::processes) {
            kill(nix::unistd::Pid::from_raw(process.pid), Signal::SIGKILL).ok();
        }
        if !std::thread::panicking() {
            return;
        }
        for file in fs::read_dir(self.dir.path()).unwrap().filter_map(Result::ok) {
            let path = file.path();
            if path.extension().is_some_and(|extension| extension == "log") {
                let text = fs::read_to_string(&path).unwrap_or_default();
                let last: Vec<&str> = text.lines().rev().take(60).collect();
                let last: Vec<&str> = last.into_iter().rev().collect();
                eprintln!("--- {}\n{}", path.display(), last.join("\n"));
            }
        }
    }
}

impl Agent {
    fn start(at: &Path, number: usize, private: u16, endpoints: &str, settings: Settings<'_>) -> Self {
        let (node_id, state_dir) = (format!("node-{number}"), at.join(format!("node-{number}")));
        let sim = json!([env!("CARGO_BIN_EXE_penstock"), "engine-sim"]).to_string();
        let mut env: BTreeMap<String, String> = BTreeMap::new();
        let listen = format!("127.0.0.1:{private}");
        let own = [
            ("NODE_ID", node_id.as_str()),
            ("STATE_DIR", state_dir.to_str().unwrap()),
            ("PRIVATE__LISTEN", &listen),
            ("CONTROLPLANE__ENDPOINTS", endpoints),
            ("GPUS__SOURCE", "simulated"),
            ("GPUS__SIMULATED_COUNT", "4"),
            ("ENGINES__PORT_BASE", "0"),
            ("ENGINES__SIM__COMMAND", &sim),
        ];
        for (key, value) in own.iter().chain(settings) {
            env.insert(format!("PENSTOCK_AGENT__{key}"), (*value).to_owned());
        }
        let (pid, ends) = (Arc::<AtomicU32>::default(), Arc::<AtomicBool>::default());
        let log = at.join(format!("{node_id}.log"));
        let (its_pid, its_end) = (pid.clone(), ends.clone());
        let keeper = std::thread::spawn(move || {
            while !its_end.load(SeqCst) {
                let mut command = penstock();
                command.arg("agent").envs(&env).stdin(Stdio::null());
                let mut child = logged(command, &log).spawn().unwrap();
                its_pid.store(child.id(), SeqCst);
                // Told to end between the look and the start.
                if its_end.load(SeqCst) {
                    child.kill().ok();
                }
                child.wait().unwrap();
                its_pid.store(0, SeqCst);
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        Self { node_id, state_dir, private, pid, ends, keeper: Some(keeper) }
    }

    /// Its process; None between two of them.
    pub(crate) fn pid(&self) -> Option<i32> {
        i32::try_from(self.pid.load(SeqCst)).ok().filter(|pid| *pid > 0)
    }

    fn signal(&self, signal: Signal) {
        if let Some(process) = self.pid() {
            kill(nix::unistd::Pid::from_raw(process), signal).ok();
        }
    }

    /// With SIGTERM; what becomes of its engines is its settings' business.
    fn stop(&mut self) {
        self.end(Signal::SIGTERM);
    }

    fn kill(&mut self) {
        self.end(Signal::SIGKILL);
    }

    fn end(&mut self, signal: Signal) {
        self.ends.store(true, SeqCst);
        self.signal(signal);
        self.signal(Signal::SIGCONT);
        if let Some(keeper) = self.keeper.take() {
            keeper.join().unwrap();
        }
    }

    /// What it says of its engines.
    pub(crate) async fn engines(&self) -> Option<Vec<Value>> {
        let url = format!("http://127.0.0.1:{}/engines", self.private);
        let answer: Value = client().get(url).send().await.ok()?.json().await.ok()?;
        answer["engines"].as_array().cloned()
    }

    /// A series of its metrics, labels and all.
    pub(crate) async fn metric(&self, series: &str) -> Option<f64> {
        let url = format!("http://127.0.0.1:{}/metrics", self.private);
        let text = client().get(url).send().await.ok()?.text().await.ok()?;
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value?.parse().ok()
    }

    /// Its records that name a process.
    pub(crate) fn records(&self) -> Vec<Recorded> {
        let Ok(entries) = fs::read_dir(self.state_dir.join("engines")) else { return Vec::new() };
        let read = |entry: fs::DirEntry| {
            let record: Value = serde_json::from_slice(&fs::read(entry.path()).ok()?).ok()?;
            let pid = i32::try_from(record["pid"].as_i64()?).ok().filter(|pid| *pid > 1)?;
            let port = u16::try_from(record["port"].as_u64()?).ok()?;
            Some(Recorded { replica_id: record["assignment"]["replica_id"].as_str()?.into(), pid, port })
        };
        let mut records: Vec<Recorded> = entries.filter_map(Result::ok).filter_map(read).collect();
        records.sort_by(|a, b| a.replica_id.cmp(&b.replica_id));
        records
    }

    /// Processes of its engines, dead ones that nobody reaped included.
    pub(crate) fn processes(&self) -> Vec<Marked> {
        let mark = format!("PENSTOCK_STATE_DIR={}", self.state_dir.display());
        let read = |pid: i32| {
            let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
            environment.split(|byte| *byte == 0).find(|entry| *entry == mark.as_bytes())?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
            let state = fields.next()?.chars().next()?;
            Some(Marked { pid, group: fields.nth(1)?.parse().ok()?, state })
        };
        let entries = fs::read_dir("/proc").unwrap();
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).filter_map(read).collect()
    }
}
