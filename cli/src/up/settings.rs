//! The settings that `up` gives its children: the built-in defaults, except for what one machine and one data directory
//! call for. The environment (`PENSTOCK_PROXY__...`) still wins: children read it themselves, after their file.

use std::path::PathBuf;

use penstock_config::{
    ConfigError, agent::AgentConfig, controlplane::ControlPlaneConfig, proxy::ProxyConfig,
};
use serde::{Serialize, de::DeserializeOwned};

use super::{children::Kind, datadir::DataDir, error::UpError};
use crate::args::Ports;

/// Name of the one node and the one proxy of an `up`.
const LOCAL: &str = "local";
/// How long Ctrl-C waits for open streams in the proxy, and again for what still runs in the engines.
const DRAIN_MS: u64 = 10_000;
/// Name of the log with a line for each request.
pub(crate) const ACCESS_LOG: &str = "proxy-access";
/// First port of engines with `--ports default`.
const ENGINE_PORT_BASE: u16 = 10_814;

/// Where the children listen: an address with port 0 before the first start, and the one that was taken afterwards, so
/// that a child that is started again comes back at the same place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Addresses {
    pub(crate) public: String,
    pub(crate) proxy_private: String,
    pub(crate) http: String,
    pub(crate) grpc: String,
    pub(crate) agent_private: String,
    pub(crate) engine_port_base: u16,
}

impl Addresses {
    /// Loopback only: what `up` starts asks nobody for a password.
    pub(crate) fn new(ports: Ports) -> Self {
        let at = |port: u16| format!("127.0.0.1:{}", if ports == Ports::Auto { 0 } else { port });
        Self {
            public: at(8081),
            proxy_private: at(18081),
            http: at(18090),
            grpc: at(18091),
            agent_private: at(18092),
            engine_port_base: if ports == Ports::Auto { 0 } else { ENGINE_PORT_BASE },
        }
    }
}

/// What the agent is told about its GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gpus {
    /// Those of the machine.
    Real,
    /// So many pretended ones.
    Simulated(u32),
}

pub(crate) fn controlplane(data: &DataDir, at: &Addresses) -> ControlPlaneConfig {
    let mut config = ControlPlaneConfig::default();
    config.listen.http = at.http.clone();
    config.listen.grpc = at.grpc.clone();
    config.store.path = data.state("controlplane").join("store.redb").display().to_string();
    config
}

/// `penstock` is this program, whose `engine-sim` is the simulated engine; `vllm` the command that starts vLLM.
pub(crate) fn agent(
    data: &DataDir,
    at: &Addresses,
    gpus: Gpus,
    penstock: &str,
    vllm: Option<&PathBuf>,
) -> AgentConfig {
    let mut config = AgentConfig { node_id: LOCAL.into(), ..AgentConfig::default() };
    config.state_dir = data.state("agent").display().to_string();
    config.private.listen = at.agent_private.clone();
    // What is killed together with its agent leaves no cgroups behind that way.
    config.engines.cgroup = "off".into();
    config.controlplane.endpoints = vec![at.grpc.clone()];
    match gpus {
        Gpus::Real => config.gpus.source = "nvml".into(),
        Gpus::Simulated(count) => {
            config.gpus.source = "simulated".into();
            config.gpus.simulated_count = count;
        }
    }
    config.engines.port_base = at.engine_port_base;
    config.engines.drain_ms = DRAIN_MS;
    if let Some(sim) = config.engines.programs.get_mut("sim") {
        sim.command = vec![penstock.into(), "engine-sim".into()];
    }
    if let (Some(program), Some(vllm)) = (config.engines.programs.get_mut("vllm"), vllm) {
        program.command = vec![vllm.display().to_string()];
    }
    config
}

pub(crate) fn proxy(data: &DataDir, at: &Addresses) -> ProxyConfig {
    let mut config = ProxyConfig::default();
    config.public.listen = at.public.clone();
    config.private.listen = at.proxy_private.clone();
    config.discovery.node_id = LOCAL.into();
    config.discovery.controlplanes = vec![at.grpc.clone()];
    config.discovery.snapshot_file = data.state("proxy").join("snapshot").display().to_string();
    config.drain.deadline_ms = DRAIN_MS;
    config.telemetry.access_log = data.log(ACCESS_LOG).display().to_string();
    config
}

/// Writes `config` as the settings file of `kind`, and gives back what the child will make of it: with the
/// environment's changes.
pub(crate) fn write<T: Serialize + DeserializeOwned + Default>(
    data: &DataDir,
    kind: Kind,
    config: &T,
) -> Result<T, UpError> {
    let path = data.config(kind.name());
    let values = toml::to_string(config)
        .map_err(|e| UpError::Failed(format!("cannot write the settings of {} as TOML: {e}", kind.name())))?;
    let text = format!(
        "# Written by `penstock up` at each start: changes here are lost. Set PENSTOCK_{}__SECTION__KEY instead.\n{values}",
        kind.name().to_uppercase()
    );
    std::fs::write(&path, text).map_err(|e| UpError::io("write", &path, &e))?;
    penstock_config::load(kind.name(), Some(&path), penstock_config::environment()).map_err(|e| match e {
        ConfigError::Read { .. } => UpError::Failed(e.to_string()),
        _ => UpError::Usage(e.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data() -> (tempfile::TempDir, DataDir) {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        (dir, data)
    }

    #[test]
    fn what_is_written_reads_back_the_same_and_is_valid() {
        let (_dir, data) = data();
        let at = Addresses { grpc: "127.0.0.1:18091".into(), ..Addresses::new(Ports::Auto) };
        let config = controlplane(&data, &at);
        assert_eq!(write(&data, Kind::ControlPlane, &config).unwrap(), config);
        config.validate().unwrap();
        let config = proxy(&data, &at);
        assert_eq!(write(&data, Kind::Proxy, &config).unwrap(), config);
        config.validate().unwrap();
        let vllm = PathBuf::from("/opt/vllm/bin/vllm");
        for (gpus, vllm) in [(Gpus::Simulated(4), None), (Gpus::Real, Some(&vllm))] {
            let config = agent(&data, &at, gpus, "/usr/bin/penstock", vllm);
            assert_eq!(write(&data, Kind::Agent, &config).unwrap(), config);
            config.validate().unwrap();
        }
    }

    #[test]
    fn everything_listens_on_loopback_and_keeps_its_state_in_the_data_directory() {
        let (_dir, data) = data();
        let root = data.root().display().to_string();
        let at = Addresses::new(Ports::Default);
        let (plane, proxy) = (controlplane(&data, &at), proxy(&data, &at));
        let agent = agent(&data, &at, Gpus::Simulated(1), "penstock", None);
        for listen in [
            &plane.listen.http,
            &plane.listen.grpc,
            &proxy.public.listen,
            &proxy.private.listen,
            &agent.private.listen,
        ] {
            assert!(listen.starts_with("127.0.0.1:"), "{listen}");
        }
        for path in [&plane.store.path, &agent.state_dir, &proxy.discovery.snapshot_file] {
            assert!(path.starts_with(&root), "{path}");
        }
        assert_eq!(agent.engines.programs["sim"].command, ["penstock", "engine-sim"]);
        assert_eq!(agent.engines.port_base, 10_814);
        assert_eq!(Addresses::new(Ports::Auto).engine_port_base, 0);
    }
}
