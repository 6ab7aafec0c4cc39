//! One node: the agent's process, its settings and its state folder; and what `/proc` says of its engines.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use penstock_config::agent::{AgentConfig, EngineProgram};
use penstock_proto::v1;
use serde_json::Value;

use crate::{
    controlplane::{ControlPlane, PATIENCE},
    engine,
};

/// A node whose agent can be started, killed and started again. Whatever is left of it ends with it.
pub(crate) struct Node {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) config: AgentConfig,
    agent: Option<Child>,
    private: String,
    client: reqwest::Client,
}

impl Node {
    /// A node of the control plane with times short enough for tests; the agent is not started yet.
    pub(crate) fn new(controlplane: &ControlPlane) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = AgentConfig {
            node_id: "node-1".into(),
            zone: "zone-a".into(),
            state_dir: dir.path().join("state").to_str().unwrap().into(),
            ..AgentConfig::default()
        };
        config.log.level = "info,penstock_agent=debug".into();
        config.private.listen = "127.0.0.1:0".into();
        config.controlplane.endpoints = vec![format!("http://{}", controlplane.address)];
        config.controlplane.backoff_min_ms = 20;
        config.controlplane.backoff_max_ms = 100;
        config.controlplane.first_assignments_ms = 300;
        config.controlplane.register_retry_ms = 500;
        config.controlplane.deregister_ms = 1_000;
        config.gpus.source = "simulated".into();
        config.gpus.simulated_count = 4;
        config.gpus.sample_ms = 100;
        let engines = &mut config.engines;
        engines.port_base = 0;
        engines.ready_poll_ms = 20;
        engines.liveness_ms = 100;
        engines.liveness_timeout_ms = 500;
        engines.load_ms = 50;
        engines.settle_ms = 200;
        engines.drain_ms = 20_000;
        engines.term_ms = 5_000;
        engines.orphan_term_ms = 200;
        engines.kill_ms = 5_000;
        engines.cgroup = "off".into();
        engines.backoff_min_ms = 20;
        engines.backoff_max_ms = 200;
        let env = BTreeMap::from([(engine::ROLE.to_owned(), "1".to_owned())]);
        engines.programs.insert(
            "stand-in".into(),
            EngineProgram { command: engine::command(), env, ..EngineProgram::default() },
        );
        let client = reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().unwrap();
        Self { dir, config, agent: None, private: String::new(), client }
    }

    /// Starts the agent and waits until it is up.
    pub(crate) async fn start(&mut self) {
        let announce = self.dir.path().join("announce.json");
        fs::remove_file(&announce).ok();
        self.agent = Some(self.spawn(&["--announce", announce.to_str().unwrap()]));
        let text = eventually("the agent's announcement", || fs::read_to_string(&announce).ok()).await;
        let announced: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(announced["pid"], self.agent_pid());
        self.private = announced["private"].as_str().unwrap().to_owned();
    }

    /// Starts an agent on this node's settings, its standard error going to a file in the node's folder.
    pub(crate) fn spawn(&self, args: &[&str]) -> Child {
        let settings = self.dir.path().join("agent.toml");
        fs::write(&settings, toml::to_string(&self.config).unwrap()).unwrap();
        let log = fs::OpenOptions::new().create(true).append(true).open(self.agent_log()).unwrap();
        Command::new(env!("CARGO_BIN_EXE_penstock-agent"))
            .args(["--config", settings.to_str().unwrap()])
            .args(args)
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    pub(crate) fn agent_log(&self) -> PathBuf {
        self.dir.path().join("agent.log")
    }

    pub(crate) fn agent_pid(&self) -> i32 {
        self.agent.as_ref().unwrap().id().try_into().unwrap()
    }

    pub(crate) fn signal_agent(&self, signal: Signal) {
        kill(Pid::from_raw(self.agent_pid()), signal).unwrap();
    }

    /// kill -9: the agent has no last word.
    pub(crate) fn kill_agent(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
    }

    /// Waits until the agent has ended.
    pub(crate) async fn agent_ends(&mut self) -> ExitStatus {
        let mut agent = self.agent.take().unwrap();
        eventually("the agent's end", || agent.try_wait().unwrap()).await
    }

    /// GET on the private server: status and body.
    pub(crate) async fn get(&self, path: &str) -> (u16, String) {
        let response = self.client.get(format!("http://{}{path}", self.private)).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    /// GET on the private server, as it comes.
    pub(crate) async fn follow(&self, path: &str) -> reqwest::Response {
        self.client.get(format!("http://{}{path}", self.private)).send().await.unwrap()
    }

    /// A request with a body to the private server: status and body.
    pub(crate) async fn send(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let request = self.client.request(method.parse().unwrap(), format!("http://{}{path}", self.private));
        let response = request.body(body.to_owned()).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    /// `GET /gpus`, once it satisfies `is`.
    pub(crate) async fn gpus(&self, is: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let body: Value = serde_json::from_str(&self.get("/gpus").await.1).unwrap();
            if is(&body) {
                return body;
            }
            assert!(Instant::now() < deadline, "the GPUs are {body:#}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until a metric without labels is at least `least`.
    pub(crate) async fn metric_reaches(&self, name: &str, least: u64) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = self.get("/metrics").await.1;
            let value =
                text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')?.parse::<u64>().ok());
            if value.is_some_and(|value| value >= least) {
                return;
            }
            assert!(Instant::now() < deadline, "{name} is {value:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The replica's entry in `GET /engines`, once it satisfies `is`.
    pub(crate) async fn engine(&self, replica_id: &str, is: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let body: Value = serde_json::from_str(&self.get("/engines").await.1).unwrap();
            let found = body["engines"].as_array().unwrap().iter().find(|e| e["id"] == replica_id).cloned();
            if let Some(engine) = found.clone().filter(&is) {
                return engine;
            }
            assert!(Instant::now() < deadline, "{replica_id} is {found:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The replica's entry once it is ready and registered.
    pub(crate) async fn registered(&self, replica_id: &str) -> Value {
        self.engine(replica_id, |e| e["state"] == "ready" && e["registration"] == "accepted").await
    }

    /// Processes of this node's engines that live: those that carry the state folder's mark.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let mark = format!("PENSTOCK_STATE_DIR={}", self.config.state_dir);
        let marked = |pid: &i32| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|b| *b == 0).any(|entry| entry == mark.as_bytes())
        };
        let entries = fs::read_dir("/proc").unwrap();
        let pids = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
        pids.filter(marked).collect()
    }

    /// Waits until no process of any engine of this node is left.
    pub(crate) async fn no_process_is_left(&self) {
        eventually("the end of every engine process", || self.processes().is_empty().then_some(())).await;
    }

    /// A path in the node's folder, for the stand-in's arguments.
    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().ok();
            agent.wait().ok();
        }
        for pid in self.processes() {
            kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
        }
        let records = fs::read_dir(self.dir.path().join("state/engines")).into_iter().flatten();
        for record in records.filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok()) {
            let record: Value = serde_json::from_str(&record).unwrap_or_default();
            if let Some(cgroup) = record["cgroup"].as_str().filter(|cgroup| !cgroup.is_empty()) {
                fs::write(Path::new(cgroup).join("cgroup.kill"), "1").ok();
                let procs = Path::new(cgroup).join("cgroup.procs");
                while fs::read_to_string(&procs).is_ok_and(|procs| !procs.is_empty()) {
                    std::thread::sleep(Duration::from_millis(5));
                }
                fs::remove_dir(cgroup).ok();
                fs::remove_dir(Path::new(cgroup).parent().unwrap()).ok();
            }
        }
        if std::thread::panicking() {
            eprintln!("the agent's log:\n{}", fs::read_to_string(self.agent_log()).unwrap_or_default());
        }
    }
}

/// An assignment of the stand-in engine.
pub(crate) fn assignment(replica_id: &str, generation: u64, args: &[&str]) -> v1::Assignment {
    let spec = v1::EngineSpec {
        engine: "stand-in".into(),
        model_path: "model".into(),
        served_model_name: "served".into(),
        args: args.iter().map(|a| (*a).to_owned()).collect(),
        ..Default::default()
    };
    v1::Assignment {
        model: "m".into(),
        replica_id: replica_id.into(),
        generation,
        spec: Some(spec),
        gpu_uuids: vec!["SIM-node-1-0".into()],
        asleep: false,
    }
}

/// Waits until `find` finds something.
pub(crate) async fn eventually<T>(what: &str, mut find: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(Instant::now() < deadline, "did not come: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Whether the process lives.
pub(crate) fn lives(pid: i32) -> bool {
    fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z'))
}

/// A number out of `GET /engines`.
pub(crate) fn number(engine: &Value, key: &str) -> i32 {
    engine[key].as_i64().unwrap().try_into().unwrap()
}
