//! Settings of the agent process: `config/agent.toml` explains each.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use crate::gpus::{GpuAction, GpuConfig, GpuPolicyConfig};
use crate::{logging::LogConfig, tls::TlsConfig, warm::WarmConfig};

/// More files of one log than this help nobody.
const MAX_LOG_FILES: u32 = 100;

/// Everything the agent can be told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AgentConfig {
    /// This node's name in the fleet; empty takes the host's name.
    pub node_id: String,
    /// Fault domain; empty: none.
    pub zone: String,
    /// Group of zones; empty: none.
    pub region: String,
    /// Where assignments, engine records and engine logs live. `~/` is the home folder.
    pub state_dir: String,
    /// What SIGTERM does to the engines: "stop" or "keep".
    pub on_shutdown: String,
    /// How it logs.
    pub log: LogConfig,
    /// Free-form properties of the node, for placement.
    pub labels: BTreeMap<String, String>,
    /// Probes, metrics and the list of engines.
    pub private: AgentPrivateConfig,
    /// The session with the control plane.
    pub controlplane: FleetConfig,
    /// Where the node's GPUs are read from.
    pub gpus: GpuConfig,
    /// Sleep, restore, prefetch.
    pub warm: WarmConfig,
    /// How engines are started, watched and stopped, and the programs that are known by name.
    pub engines: EnginesConfig,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self {
            node_id: String::new(),
            zone: String::new(),
            region: String::new(),
            state_dir: "~/.local/share/penstock/agent".into(),
            on_shutdown: "stop".into(),
            log: LogConfig::default(),
            labels: BTreeMap::new(),
            private: AgentPrivateConfig::default(),
            controlplane: FleetConfig::default(),
            gpus: GpuConfig::default(),
            warm: WarmConfig::default(),
            engines: EnginesConfig::default(),
        }
    }
}

pub use crate::programs::EngineProgram;

/// `[private]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AgentPrivateConfig {
    /// host:port for probes, metrics and the list of engines; port 0 takes a free one.
    pub listen: String,
}

impl Default for AgentPrivateConfig {
    fn default() -> Self {
        Self { listen: "127.0.0.1:18092".into() }
    }
}

/// `[controlplane]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FleetConfig {
    /// gRPC addresses of the control planes, tried in turn.
    pub endpoints: Vec<String>,
    /// Members of etcd, through which the leading control plane is found instead; empty: `endpoints` are used.
    pub etcd_endpoints: Vec<String>,
    /// What the control planes put before their keys there (their `store.prefix`).
    pub etcd_prefix: String,
    /// TLS towards them.
    pub tls: TlsConfig,
    /// Longest connect, and longest wait for the answer to our Hello.
    pub connect_ms: u64,
    /// Pause after the first failed try; each further one is up to twice as long.
    pub backoff_min_ms: u64,
    /// Longest pause between tries.
    pub backoff_max_ms: u64,
    /// How long a starting agent waits for assignments before it starts engines of the last ones it knew.
    pub first_assignments_ms: u64,
    /// A registration without an answer, or refused, is sent again after this.
    pub register_retry_ms: u64,
    /// Longest wait for the answer to a deregistration before an engine is stopped regardless.
    pub deregister_ms: u64,
}

impl Default for FleetConfig {
    fn default() -> Self {
        Self {
            endpoints: vec!["http://127.0.0.1:18091".into()],
            etcd_endpoints: Vec::new(),
            etcd_prefix: String::new(),
            tls: TlsConfig::default(),
            connect_ms: 5_000,
            backoff_min_ms: 200,
            backoff_max_ms: 5_000,
            first_assignments_ms: 3_000,
            register_retry_ms: 5_000,
            deregister_ms: 2_000,
        }
    }
}

/// `[engines]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EnginesConfig {
    /// First port given to an engine, then upwards; 0 takes any free port.
    pub port_base: u16,
    /// Address that engines listen on.
    pub bind_host: String,
    /// Host under which proxies reach this node's engines.
    pub advertise_host: String,
    /// Longest time from the start of an engine to its first completion; longer: it is started anew.
    pub ready_s: u64,
    /// Pause between two tries to find out whether an engine is ready.
    pub ready_poll_ms: u64,
    /// Longest wait for the completion that proves an engine ready; one whose port is open and that answers nothing for so
    /// long is started anew.
    pub first_completion_ms: u64,
    /// Pause between two liveness checks of a ready engine.
    pub liveness_ms: u64,
    /// Longest wait for the answer of one liveness check.
    pub liveness_timeout_ms: u64,
    /// Failed liveness checks in a row after which an engine is started anew.
    pub liveness_failures: u32,
    /// Time without any progress after which an engine that answers is ended all the same; 0: never.
    pub wedge_s: u64,
    /// Time without progress after which an engine is asked for one token; at most that often.
    pub canary_s: u64,
    /// Dumps of engines that hung which are kept; 0: none is made.
    pub dumps_kept: u32,
    /// Program, with arguments, whose output for each process goes into a dump; `{pid}` is the process. Empty: none.
    pub dump_command: Vec<String>,
    /// Failures in a row after which an engine is given up on this node; 0: never.
    pub give_up_failures: u32,
    /// The same for starts in a row that were not ready within `ready_s`; 0: never.
    pub give_up_stuck_starts: u32,
    /// Pause between two starts of an engine that was given up.
    pub give_up_retry_s: u64,
    /// Pause between two readings of a ready engine's /metrics.
    pub load_ms: u64,
    /// Longest wait for one reading.
    pub load_timeout_ms: u64,
    /// Pause between two readings of the LoRA adapters that a ready engine lists.
    pub adapters_ms: u64,
    /// Shortest time between an engine's deregistration and its end, for proxies to learn of it.
    pub settle_ms: u64,
    /// Longest wait for an engine's running requests before it is stopped.
    pub drain_ms: u64,
    /// Time from SIGTERM to SIGKILL of an engine's processes.
    pub term_ms: u64,
    /// The same for what is left after an engine's main process has died.
    pub orphan_term_ms: u64,
    /// Time after SIGKILL after which a process that is still there is reported.
    pub kill_ms: u64,
    /// Pause before an engine that failed is started again; each further one is twice as long.
    pub backoff_min_ms: u64,
    /// Longest such pause.
    pub backoff_max_ms: u64,
    /// Time ready after which earlier failures are forgotten.
    pub stable_s: u64,
    /// Size at which an engine's log is put aside.
    pub log_bytes: u64,
    /// Files that are kept of what was put aside, for each engine.
    pub log_files: u32,
    /// "auto" (a cgroup for each engine where the agent may make one), "off", or the cgroup in which they are made.
    pub cgroup: String,
    /// Most memory of an engine; 0: no limit.
    pub memory_max_mib: u64,
    /// Time between two looks for vLLM processes that are none of this agent's; 0: it does not look.
    pub foreign_s: u64,
    /// Programs by the name that a deployment's `engine` gives.
    #[serde(flatten)]
    pub programs: BTreeMap<String, EngineProgram>,
}

impl Default for EnginesConfig {
    fn default() -> Self {
        let vllm = EngineProgram {
            command: vec!["vllm".into()],
            shutdown_timeout_s: 10,
            ..EngineProgram::default()
        };
        let sim = EngineProgram { command: vec!["penstock-engine-sim".into()], ..EngineProgram::default() };
        Self {
            port_base: 10_814,
            bind_host: "127.0.0.1".into(),
            advertise_host: "127.0.0.1".into(),
            ready_s: 900,
            ready_poll_ms: 250,
            first_completion_ms: 120_000,
            liveness_ms: 2_000,
            liveness_timeout_ms: 10_000,
            liveness_failures: 3,
            wedge_s: 30,
            canary_s: 15,
            dumps_kept: 20,
            dump_command: Vec::new(),
            give_up_failures: 5,
            give_up_stuck_starts: 2,
            give_up_retry_s: 300,
            load_ms: 250,
            load_timeout_ms: 5_000,
            adapters_ms: 5_000,
            settle_ms: 1_000,
            drain_ms: 30_000,
            term_ms: 20_000,
            orphan_term_ms: 2_000,
            kill_ms: 10_000,
            backoff_min_ms: 1_000,
            backoff_max_ms: 60_000,
            stable_s: 60,
            log_bytes: 16 << 20,
            log_files: 1,
            cgroup: "auto".into(),
            memory_max_mib: 0,
            foreign_s: 10,
            programs: BTreeMap::from([("vllm".into(), vllm), ("sim".into(), sim)]),
        }
    }
}

impl AgentConfig {
    /// Rules that types cannot say.
    ///
    /// # Errors
    /// A sentence that names the key and what is accepted.
    pub fn validate(&self) -> Result<(), String> {
        one_of("on_shutdown", &self.on_shutdown, &["stop", "keep"])?;
        self.gpus.validate()?;
        not_empty("state_dir", &self.state_dir)?;
        not_empty("engines.bind_host", &self.engines.bind_host)?;
        not_empty("engines.advertise_host", &self.engines.advertise_host)?;
        if self.node_id.chars().any(|c| c.is_control() || c == '/') {
            return Err(format!(
                "node_id is {:?}; it must not contain '/' or control characters",
                self.node_id
            ));
        }
        let cgroup = &self.engines.cgroup;
        if !matches!(cgroup.as_str(), "auto" | "off") && !cgroup.starts_with('/') {
            return Err(format!(
                "engines.cgroup is {cgroup:?}; accepted: \"auto\", \"off\", or the full path of a cgroup"
            ));
        }
        if self.engines.log_files > MAX_LOG_FILES {
            return Err(format!(
                "engines.log_files is {}; accepted: 0 to {MAX_LOG_FILES}",
                self.engines.log_files
            ));
        }
        if self.controlplane.endpoints.is_empty() && self.controlplane.etcd_endpoints.is_empty() {
            return Err("controlplane.endpoints is empty; name at least one, as \"http://HOST:18091\", or etcd's members in \
                        controlplane.etcd_endpoints"
                .into());
        }
        let fleet = &self.controlplane;
        if let Some(bad) = fleet.etcd_endpoints.iter().find(|e| !is_etcd_endpoint(e)) {
            let tls = if bad.starts_with("https://") {
                "; the agent asks etcd without TLS only: name the control planes in controlplane.endpoints instead"
            } else {
                ""
            };
            return Err(format!(
                "controlplane.etcd_endpoints has {bad:?}; accepted: \"http://HOST:PORT\"{tls}"
            ));
        }
        if fleet.etcd_prefix.ends_with('/') || fleet.etcd_prefix.contains('\0') {
            return Err(format!(
                "controlplane.etcd_prefix is {:?}; accepted is what the control planes have as store.prefix, without a slash \
                 at the end, such as \"/penstock\"",
                fleet.etcd_prefix
            ));
        }
        if let Some(bad) = self.controlplane.endpoints.iter().find(|e| !is_endpoint(e)) {
            return Err(format!(
                "controlplane.endpoints has {bad:?}; accepted: \"HOST:PORT\", \"http://HOST:PORT\", \"https://HOST:PORT\""
            ));
        }
        let fleet = &self.controlplane;
        fleet.tls.validate_endpoints("controlplane.tls", "controlplane.endpoints", &fleet.endpoints)?;
        self.validate_times()?;
        self.warm.validate()?;
        self.engines.programs.iter().try_for_each(|(name, program)| program.validate(name))
    }

    fn validate_times(&self) -> Result<(), String> {
        let (fleet, engines) = (&self.controlplane, &self.engines);
        let positive = [
            ("controlplane.connect_ms", fleet.connect_ms),
            ("controlplane.backoff_min_ms", fleet.backoff_min_ms),
            ("controlplane.register_retry_ms", fleet.register_retry_ms),
            ("engines.ready_s", engines.ready_s),
            ("engines.ready_poll_ms", engines.ready_poll_ms),
            ("engines.first_completion_ms", engines.first_completion_ms),
            ("engines.liveness_ms", engines.liveness_ms),
            ("engines.liveness_timeout_ms", engines.liveness_timeout_ms),
            ("engines.liveness_failures", u64::from(engines.liveness_failures)),
            ("engines.canary_s", engines.canary_s),
            ("engines.give_up_retry_s", engines.give_up_retry_s),
            ("engines.load_ms", engines.load_ms),
            ("engines.load_timeout_ms", engines.load_timeout_ms),
            ("engines.adapters_ms", engines.adapters_ms),
            ("engines.kill_ms", engines.kill_ms),
            ("engines.backoff_min_ms", engines.backoff_min_ms),
            ("engines.log_bytes", engines.log_bytes),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(format!("{key} is 0; it must be at least 1"));
        }
        if engines.wedge_s > 0 && engines.canary_s >= engines.wedge_s {
            return Err(format!(
                "engines.canary_s is {}; it must be less than engines.wedge_s, {}: an engine is ended only after it was asked",
                engines.canary_s, engines.wedge_s
            ));
        }
        if engines.dump_command.first().is_some_and(String::is_empty) {
            return Err(
                "engines.dump_command names no program; accepted: [] or [\"py-spy\", \"dump\", \"--pid\", \"{pid}\"]"
                    .into(),
            );
        }
        let ordered = [
            ("controlplane.backoff", fleet.backoff_min_ms, fleet.backoff_max_ms),
            ("engines.backoff", engines.backoff_min_ms, engines.backoff_max_ms),
        ];
        match ordered.iter().find(|(_, min, max)| min > max) {
            Some((key, min, max)) => {
                Err(format!("{key}_max_ms is {max}; it must be at least {key}_min_ms, {min}"))
            }
            None => Ok(()),
        }
    }
}

pub(crate) fn one_of(key: &str, value: &str, accepted: &[&str]) -> Result<(), String> {
    if accepted.contains(&value) {
        return Ok(());
    }
    Err(format!("{key} is {value:?}; accepted: {}", accepted.join(", ")))
}

fn not_empty(key: &str, value: &str) -> Result<(), String> {
    if value.trim().is_empty() { Err(format!("{key} is empty; it needs a value")) } else { Ok(()) }
}

fn is_etcd_endpoint(text: &str) -> bool {
    text.starts_with("http://") && is_endpoint(text)
}

/// `HOST:PORT`, with http:// or https:// before it or not, nothing behind it but perhaps a slash.
fn is_endpoint(text: &str) -> bool {
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://")).unwrap_or(text);
    rest.trim_end_matches('/').rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && !host.contains(['/', '@', ' ']) && port.parse::<u16>().is_ok_and(|p| p != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut AgentConfig)) -> String {
        let mut config = AgentConfig::default();
        change(&mut config);
        config.validate().expect_err("must be refused")
    }

    #[test]
    fn the_defaults_are_valid() {
        AgentConfig::default().validate().expect("defaults");
    }

    #[test]
    fn impossible_settings_name_their_key_and_what_is_accepted() {
        assert!(
            refused(|c| c.on_shutdown = "kill".into())
                .contains("on_shutdown is \"kill\"; accepted: stop, keep")
        );
        assert!(refused(|c| c.gpus.source = "amd".into()).contains("gpus.source"));
        assert!(refused(|c| c.controlplane.endpoints.clear()).contains("controlplane.endpoints"));
        assert!(refused(|c| c.engines.cgroup = "on".into()).contains("engines.cgroup is \"on\""));
        assert!(refused(|c| c.engines.log_files = 101).contains("accepted: 0 to 100"));
        let etcd = |address: &str| refused(|c| c.controlplane.etcd_endpoints = vec![address.into()]);
        assert!(etcd("127.0.0.1:2379").contains("accepted: \"http://HOST:PORT\""));
        assert!(etcd("https://127.0.0.1:2379").contains("without TLS only"));
        assert!(refused(|c| c.controlplane.etcd_prefix = "/a/".into()).contains("controlplane.etcd_prefix"));
        assert!(refused(|c| c.engines.liveness_failures = 0).contains("engines.liveness_failures is 0"));
        assert!(refused(|c| c.engines.backoff_max_ms = 1).contains("engines.backoff_max_ms is 1"));
        assert!(refused(|c| c.engines.canary_s = 30).contains("less than engines.wedge_s, 30"));
        assert!(refused(|c| c.engines.dump_command = vec![String::new()]).contains("engines.dump_command"));
        let no_program = refused(|c| {
            c.engines.programs.insert("mine".into(), EngineProgram::default());
        });
        assert!(no_program.contains("engines.mine.command"), "{no_program}");
    }

    #[test]
    fn an_endpoint_is_a_plain_http_address() {
        for good in ["http://127.0.0.1:18091", "http://cp-1.internal:18091/", "http://[::1]:18091"] {
            assert!(is_endpoint(good), "{good}");
        }
        for bad in ["", "ftp://cp:18091", "http://cp", "http://:1", "http://cp:0", "http://cp:99999"] {
            assert!(
                refused(|c| c.controlplane.endpoints = vec![bad.into()]).contains("http://HOST:PORT"),
                "{bad}"
            );
        }
    }

    #[test]
    fn named_programs_stand_beside_the_scalars_of_their_table() {
        let text = "[engines]\nport_base = 0\n[engines.mine]\ncommand = ['serve-it']\n";
        let config: AgentConfig = toml::from_str(text).expect("valid");
        assert_eq!(config.engines.port_base, 0);
        assert_eq!(config.engines.programs["mine"].command, ["serve-it"]);
        let misspelt = toml::from_str::<AgentConfig>("[engines]\nport_bas = 0\n");
        assert!(misspelt.is_err(), "a misspelt scalar is no program");
    }
}
