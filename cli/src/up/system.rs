//! The chapters of an `up`: start, supervise, stop.

use std::{io, path::PathBuf, time::Duration};

use penstock_config::{agent::AgentConfig, controlplane::ControlPlaneConfig, proxy::ProxyConfig};
use tokio::time::Instant;

use super::{
    banner::{EngineSummary, Notes, Pids, Summary},
    children::{AgentAddresses, ControlPlaneAddresses, Kind, ProxyAddresses},
    datadir::DataDir,
    error::UpError,
    leftovers,
    plan::{self, Plan},
    ports::{self, Wanted},
    settings::{self, Addresses, Gpus},
    signals::Signals,
    supervise::{Event, Supervised},
    wait,
};
use crate::{
    api::{ControlPlane, Deployment, Endpoint},
    args::{Engine, UpArgs},
    output::say,
};

/// How long each child may take to stop before it is killed. The proxy and the engines are told to drain for 10 s; the
/// agent then needs its engines' own time to end.
const STOP_PROXY: Duration = Duration::from_secs(15);
const STOP_AGENT: Duration = Duration::from_secs(40);
const STOP_CONTROLPLANE: Duration = Duration::from_secs(10);
/// How long what they left behind, against their promise, may take.
const STOP_LEFT: Duration = Duration::from_secs(5);

pub(crate) struct System {
    plan: Plan,
    data: DataDir,
    json: bool,
    default_data_dir: bool,
    /// This program, which the children are too.
    program: PathBuf,
    at: Addresses,
    gpus: Gpus,
    controlplane: Supervised,
    agent: Supervised,
    proxy: Supervised,
    /// Set when all was ready; kept true in `up.json` as children come back.
    summary: Option<Summary>,
}

/// The settings as the children read them, the environment's changes included.
struct Effective {
    controlplane: ControlPlaneConfig,
    agent: AgentConfig,
    proxy: ProxyConfig,
}

impl System {
    pub(crate) fn new(plan: Plan, data: DataDir, options: &UpArgs) -> Result<Self, UpError> {
        let program = std::env::current_exe()
            .map_err(|e| UpError::Failed(format!("cannot find this program's own file: {e}")))?;
        Ok(Self {
            at: Addresses::new(plan.ports),
            gpus: plan.gpus(0, 0),
            plan,
            data,
            json: options.json,
            default_data_dir: options.data_dir.is_none(),
            program,
            controlplane: Supervised::new(Kind::ControlPlane),
            agent: Supervised::new(Kind::Agent),
            proxy: Supervised::new(Kind::Proxy),
            summary: None,
        })
    }

    /// Brings everything up, to the first completion through the proxy. Gives back what to print.
    ///
    /// # Errors
    /// Whatever stood in the way; what was started meanwhile runs on until [`Self::stop`].
    pub(crate) async fn start(&mut self) -> Result<String, UpError> {
        let deadline = Instant::now() + self.plan.ready;
        ports::check(&wanted_ports(&self.write_settings()?))?;
        for kind in [Kind::ControlPlane, Kind::Agent, Kind::Proxy] {
            self.data.rotate_log(kind.name());
        }
        self.data.rotate_log(settings::ACCESS_LOG);

        // First the control plane: the others are told its address, and the agent how many GPUs what it stores needs.
        let controlplane = self.controlplane.start(&self.program, &self.data)?;
        let announced: ControlPlaneAddresses = controlplane.announced(deadline).await?;
        (self.at.http, self.at.grpc) = (announced.http, announced.grpc);
        let token = std::env::var("PENSTOCK_TOKEN").ok().filter(|token| !token.is_empty());
        let server = ControlPlane::new(&format!("http://{}", self.at.http), "penstock up", token)
            .map_err(|e| UpError::Failed(e.to_string()))?;
        let engines = self.deploy(&server, deadline).await?;
        self.write_settings()?;

        let agent = self.agent.start(&self.program, &self.data)?;
        let proxy = self.proxy.start(&self.program, &self.data)?;
        let announced: AgentAddresses = agent.announced(deadline).await?;
        self.at.agent_private = announced.private;
        let announced: ProxyAddresses = proxy.announced(deadline).await?;
        (self.at.public, self.at.proxy_private) = (announced.public, announced.private);
        let effective = self.write_settings()?; // with the ports that were taken, for the next start of each

        let (endpoints, models) = self.ready(&server, engines, deadline).await?;
        let summary = self.summarise(endpoints, models);
        self.keep(&summary)?;
        let notes = Notes {
            pretended_gpus: self.plan.engine == Engine::Vllm && self.gpus != Gpus::Real,
            no_api_keys: effective.proxy.auth.keys.is_empty(),
            default_data_dir: self.default_data_dir,
        };
        let text = if self.json {
            summary.line()
        } else {
            summary.banner(&self.plan.model, self.plan.engine_name(), notes)
        };
        self.summary = Some(summary);
        Ok(text)
    }

    fn tell(&self, line: &str) {
        tell(self.json, line);
    }

    /// Whether there is anything to stop.
    pub(crate) fn has_started(&self) -> bool {
        [&self.controlplane, &self.agent, &self.proxy].iter().any(|child| child.has_started())
    }

    fn write_settings(&self) -> Result<Effective, UpError> {
        let penstock = self.program.display().to_string();
        let agent = settings::agent(&self.data, &self.at, self.gpus, &penstock, self.plan.vllm.as_ref());
        Ok(Effective {
            controlplane: settings::write(
                &self.data,
                Kind::ControlPlane,
                &settings::controlplane(&self.data, &self.at),
            )?,
            agent: settings::write(&self.data, Kind::Agent, &agent)?,
            proxy: settings::write(&self.data, Kind::Proxy, &settings::proxy(&self.data, &self.at))?,
        })
    }

    /// Asks for the deployment unless the store has it as wanted, and counts GPUs. Gives back the engines wanted.
    async fn deploy(&mut self, server: &ControlPlane, deadline: Instant) -> Result<u32, UpError> {
        let stored = wait::answered(deadline, || server.deployments()).await?.value.deployments;
        let (own, others): (Vec<_>, Vec<_>) = stored.iter().partition(|d| d.model == self.plan.model);
        let own = own.first().copied();
        let spec = self.plan.spec(own);
        if own.is_none_or(|stored| !plan::is_as_asked(stored, &spec)) {
            wait::answered(deadline, || server.deploy(&self.plan.model, &spec)).await?;
        }
        for other in &others {
            let Deployment { model, replicas, engine, .. } = other;
            self.tell(&format!("resuming {model} too: {replicas} engines ({engine}), as stored"));
        }
        let needed = others.iter().map(|d| d.replicas.saturating_mul(d.gpus_per_replica));
        self.gpus = self.plan.gpus(spec.replicas, needed.fold(0, u32::saturating_add));
        Ok(spec.replicas)
    }

    /// Waits until the engines are ready and the proxy serves them; a child that dies meanwhile is an error.
    async fn ready(
        &mut self,
        server: &ControlPlane,
        engines: u32,
        deadline: Instant,
    ) -> Result<(Vec<Endpoint>, Vec<String>), UpError> {
        let model = &self.plan.model;
        let proxy = wait::Proxy { public: &self.at.public, private: &self.at.proxy_private };
        let ready = async {
            let endpoints =
                wait::engines_ready(server, model, engines, deadline, |line| tell(self.json, line)).await?;
            proxy.serves((engines > 0).then_some(model.as_str()), deadline).await?;
            Ok((endpoints, proxy.models().await?))
        };
        tokio::select! {
            ready = ready => ready,
            Event::Ended(status) = self.controlplane.event() => Err(self.controlplane.ended_early(status)),
            Event::Ended(status) = self.agent.event() => Err(self.agent.ended_early(status)),
            Event::Ended(status) = self.proxy.event() => Err(self.proxy.ended_early(status)),
        }
    }

    fn summarise(&self, mut endpoints: Vec<Endpoint>, models: Vec<String>) -> Summary {
        endpoints.sort_by(|a, b| a.id.cmp(&b.id));
        let engine = |e: Endpoint| EngineSummary { id: e.id, address: e.address, pid: e.pid };
        Summary {
            public: reachable(&self.at.public),
            proxy_private: reachable(&self.at.proxy_private),
            controlplane: reachable(&self.at.http),
            grpc: reachable(&self.at.grpc),
            agent_private: reachable(&self.at.agent_private),
            console: format!("http://{}/", reachable(&self.at.http)),
            models,
            engines: endpoints.into_iter().map(engine).collect(),
            pids: self.pids(),
            data_dir: self.data.root().display().to_string(),
        }
    }

    fn pids(&self) -> Pids {
        Pids {
            proxy: self.proxy.pid(),
            controlplane: self.controlplane.pid(),
            agent: self.agent.pid(),
            up: std::process::id(),
        }
    }

    fn keep(&self, summary: &Summary) -> Result<(), UpError> {
        penstock_config::announce(&self.data.summary(), summary).map_err(|e| UpError::Failed(e.to_string()))
    }

    /// Starts again whatever dies, until a signal (`Ok`) or until a child dies for the last time.
    pub(crate) async fn supervise(&mut self, signals: &mut Signals) -> Result<(), UpError> {
        loop {
            let (child, event) = tokio::select! {
                () = signals.next() => return Ok(()),
                event = self.controlplane.event() => (&mut self.controlplane, event),
                event = self.agent.event() => (&mut self.agent, event),
                event = self.proxy.event() => (&mut self.proxy, event),
            };
            match event {
                Event::Ended(status) => child.ended(status)?,
                Event::Succeeded(successor) => {
                    child.succeeded(successor);
                    self.update_summary()?;
                }
                Event::Due => {
                    let process = child.start(&self.program, &self.data)?;
                    say(&format!("the {} runs again, pid {}", process.kind.name(), process.pid));
                    self.update_summary()?;
                }
            }
        }
    }

    fn update_summary(&mut self) -> Result<(), UpError> {
        let pids = self.pids();
        let Some(summary) = &mut self.summary else { return Ok(()) };
        summary.pids = pids;
        let summary = summary.clone();
        self.keep(&summary)
    }

    /// Stops in the order in which nothing is lost: the proxy finishes streams while its engines still run, the agent
    /// ends its engines while the control plane still hears of it. Then nothing of this data directory is left.
    ///
    /// # Errors
    /// A process that could not be ended.
    pub(crate) async fn stop(&mut self, signals: &mut Signals) -> Result<(), UpError> {
        if let Err(error) = std::fs::remove_file(self.data.summary())
            && error.kind() != io::ErrorKind::NotFound
        {
            say(&UpError::io("remove", &self.data.summary(), &error).to_string());
        }
        self.tell("stopping; open streams get 10 s; once more to stop at once");
        let mut hasten = false;
        for (child, name, longest) in [
            (&mut self.proxy, "proxy", STOP_PROXY),
            (&mut self.agent, "agent", STOP_AGENT),
            (&mut self.controlplane, "controlplane", STOP_CONTROLPLANE),
        ] {
            let killed = child.stop(Instant::now() + longest, &mut hasten, signals).await;
            if killed && !hasten {
                say(&format!("the {name} did not stop within {} s and was killed", longest.as_secs()));
            }
        }
        let left = leftovers::find(self.data.root());
        if !left.is_empty() && !hasten {
            say(&format!("the agent left these behind; ending them:{}", leftovers::list(&left)));
        }
        leftovers::end(self.data.root(), if hasten { Duration::ZERO } else { STOP_LEFT })
    }
}

/// A line on how it goes: for people, who did not ask for JSON.
fn tell(json: bool, line: &str) {
    if !json {
        say(line);
    }
}

/// `0.0.0.0` and `[::]` are no addresses to connect to.
fn reachable(address: &str) -> String {
    address.replacen("0.0.0.0:", "127.0.0.1:", 1).replacen("[::]:", "[::1]:", 1)
}

fn wanted_ports(effective: &Effective) -> [Wanted; 5] {
    let wanted =
        |address: &str, purpose, variable| Wanted { address: address.to_string(), purpose, variable };
    let Effective { controlplane, agent, proxy } = effective;
    [
        wanted(&proxy.public.listen, "proxy, for clients,", "PENSTOCK_PROXY__PUBLIC__LISTEN"),
        wanted(&proxy.private.listen, "proxy, for probes and metrics,", "PENSTOCK_PROXY__PRIVATE__LISTEN"),
        wanted(
            &controlplane.listen.http,
            "control plane, for REST and console,",
            "PENSTOCK_CONTROLPLANE__LISTEN__HTTP",
        ),
        wanted(&controlplane.listen.grpc, "control plane, for gRPC,", "PENSTOCK_CONTROLPLANE__LISTEN__GRPC"),
        wanted(&agent.private.listen, "agent, for probes and metrics,", "PENSTOCK_AGENT__PRIVATE__LISTEN"),
    ]
}
