//! The command line: what can be asked for, and nothing of how it is done.

mod ops;

use std::{ffi::OsString, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

pub(crate) use ops::*;

use crate::{api::RouteTarget, commands::simulate::SimulateArgs};

const EXIT_CODES: &str = "Exit codes:
  0  done
  1  failed: the server said no, a port is taken, not ready in time
  2  wrong usage or settings
  3  the control plane, or a proxy, cannot be reached
  4  it knows no such thing
  5  what was compared differs (`diff --exit-code`)";

/// Penstock: a gateway for fleets of vLLM engines.
#[derive(Debug, Parser)]
#[command(name = "penstock", version, after_help = EXIT_CODES, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a whole Penstock on this machine: control plane, agent, proxy and engines
    Up(UpArgs),
    /// Make the site what manifests say: deployments, routes, what is said of nodes
    Apply(ApplyArgs),
    /// Print the JSON schema of manifests, for editors and checks
    Schema,
    /// Things of one kind, or some of them by name
    Get(GetArgs),
    /// Everything about one thing, with what waits on what and why
    Describe(DescribeArgs),
    /// Come back when deployments have every engine that they want
    WaitReady(WaitReadyArgs),
    /// A real completion through the proxy: does it stream, how fast, which engine answered
    VerifyChat(VerifyChatArgs),
    /// Look at everything that an operator would look at, and say what to do
    Doctor(DoctorArgs),
    /// Look at this machine before Penstock is installed on it
    Preflight(PreflightArgs),
    /// Which machines should be members of etcd
    EtcdTopology {
        #[command(subcommand)]
        command: EtcdTopologyCommand,
    },
    /// Tokens of the control plane's API
    Token {
        #[command(subcommand)]
        command: TokenCommand,
    },
    /// What was changed, by whom, from where; newest first
    Audit(AuditArgs),
    /// The log of a replica's engine, or the control plane's last log lines
    Logs(LogsArgs),
    /// The control planes themselves
    Cluster {
        #[command(subcommand)]
        command: ClusterCommand,
    },
    /// Place a model on one node, in the words of the operations guide
    Place(PlaceArgs),
    /// Write what is wanted of the site into a file
    Backup(BackupArgs),
    /// Make the site what a backup says, as far as nothing that serves is torn down
    Restore(RestoreArgs),
    /// The control plane and what it manages, in short
    Status(Remote),
    /// Models that are served
    Models(Remote),
    /// Create or replace a deployment: a model and how many engines serve it
    Deploy(DeployArgs),
    /// Change how many engines serve a model
    Scale(ScaleArgs),
    /// Delete a deployment; its engines finish their requests and stop
    Delete(DeleteArgs),
    /// Names that clients can ask for, and where each leads
    Routes(Remote),
    /// Make or delete a route: an alias, a split between deployments, fallbacks
    Route {
        #[command(subcommand)]
        command: RouteCommand,
    },
    /// Take an endpoint, or all of a node, out of use until `undrain`: running requests finish, new ones go elsewhere
    Drain(DrainArgs),
    /// Put a drained endpoint, or node, back into use
    Undrain(EndpointArgs),
    /// What a deployment was: its revisions, newest first, each with what it changed
    History(ModelArgs),
    /// What manifests would change (-f), or what differs between two revisions of a deployment
    Diff(DiffArgs),
    /// Make a deployment what it was before its last change, or at an earlier revision
    Rollback(RollbackArgs),
    /// Start nothing new on a node until `uncordon`; what runs there stays
    Cordon(NodeArgs),
    /// Fetch a deployed model onto nodes before any engine there needs it
    Prefetch(PrefetchArgs),
    /// Start nothing new on a node and move away what runs there, within each deployment's budget, until `uncordon`
    Maintenance(NodeArgs),
    /// Put a cordoned node, or one in maintenance, back into use
    Uncordon(NodeArgs),
    /// Engines: where each runs and in what state
    Endpoints(EndpointsArgs),
    /// Nodes: machines with GPUs, each with an agent
    Nodes(Remote),
    /// GPUs of all nodes: how they are, and why one is not used
    Gpus(Remote),
    /// One GPU, on its own node
    Gpu {
        #[command(subcommand)]
        command: GpuCommand,
    },
    /// Proxies that subscribe to this control plane, and the version each has
    Proxies(Remote),
    /// Versions of this program and of the control plane
    Version(Remote),
    /// Why a request went where it went: what each pick saw, what failed, what followed
    Explain(ExplainArgs),
    /// Compare routing policies on a simulated fleet; talks to nobody
    Simulate(SimulateArgs),
    /// Print a completion script: penstock completions bash > /etc/bash_completion.d/penstock
    Completions {
        /// Shell to complete in
        shell: clap_complete::Shell,
    },
    /// Print the manual page: penstock man > /usr/share/man/man1/penstock.1
    Man,
    /// Run the data plane (`penstock proxy --help`)
    Proxy(ProcessArgs),
    /// Run the control plane (`penstock controlplane --help`)
    Controlplane(ProcessArgs),
    /// Run the agent of a node (`penstock agent --help`)
    Agent(ProcessArgs),
    /// Run a simulated vLLM engine (`penstock engine-sim --help`)
    EngineSim(ProcessArgs),
    /// Run the load generator (`penstock load --help`)
    Load(ProcessArgs),
}

/// Here for `--help` and completions only: `processes::run` takes these lines before they are parsed.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub(crate) struct ProcessArgs {
    /// The process's own flags
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) args: Vec<OsString>,
}

/// How to reach the control plane.
#[derive(Debug, Clone, Args)]
pub(crate) struct Server {
    /// Control plane's address [default: that of the `penstock up` on --data-dir, else http://127.0.0.1:18090]
    #[arg(long, alias = "server", value_name = "URL", env = "PENSTOCK_CONTROLPLANE", value_hint = ValueHint::Url)]
    pub(crate) controlplane: Option<String>,
    /// Who asks, where the control plane wants to know: a token of its settings (auth.tokens) or of `penstock token create`
    #[arg(long, value_name = "TOKEN", env = "PENSTOCK_TOKEN", hide_env_values = true)]
    pub(crate) token: Option<String>,
    /// Data directory of the `penstock up` to talk to [default: ~/.local/share/penstock]
    #[arg(long, value_name = "DIR", env = "PENSTOCK_DATA_DIR", value_hint = ValueHint::DirPath)]
    pub(crate) data_dir: Option<PathBuf>,
}

/// How to reach the control plane, and how to print what it says.
#[derive(Debug, Clone, Args)]
pub(crate) struct Remote {
    #[command(flatten)]
    pub(crate) server: Server,
    /// How to print: a table for people, or the server's answer as JSON or YAML
    #[arg(long, short, value_name = "FORMAT", default_value = "table")]
    pub(crate) output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
    Yaml,
}

/// `penstock up`
#[derive(Debug, Clone, Args)]
pub(crate) struct UpArgs {
    /// Engines to run [default: as many as this data directory's last start, else 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub(crate) engines: Option<u32>,
    /// Kind of engine
    #[arg(long, value_name = "KIND", default_value = "sim")]
    pub(crate) engine: Engine,
    /// Where vLLM is installed: DIR/venv/bin/vllm or DIR/bin/vllm [default: vllm on the PATH]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) vllm_dir: Option<PathBuf>,
    /// vLLM's model folder
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) model_dir: Option<PathBuf>,
    /// Name under which the model is served [default: sim-model, or the name of --model-dir]
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// Further argument for each engine, repeatable: --engine-arg=--sim-itl-ms=5
    #[arg(long = "engine-arg", value_name = "ARG", allow_hyphen_values = true)]
    pub(crate) engine_args: Vec<String>,
    /// GPUs to simulate [default: one for each engine and a spare; with vLLM and a GPU in the machine: none]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) gpus: Option<u32>,
    /// Ports to listen on: the documented ones, or any that are free
    #[arg(long, value_name = "WHICH", default_value = "default")]
    pub(crate) ports: Ports,
    /// Where state, settings and logs are kept [default: ~/.local/share/penstock]
    #[arg(long, value_name = "DIR", env = "PENSTOCK_DATA_DIR", value_hint = ValueHint::DirPath)]
    pub(crate) data_dir: Option<PathBuf>,
    /// Print one line of JSON instead of the banner when all is ready
    #[arg(long)]
    pub(crate) json: bool,
    /// Longest wait for all to be ready, in seconds [default: 60, with vLLM 600]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) ready_timeout_s: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Engine {
    /// Simulated engines: no GPU, no model, vLLM's API
    Sim,
    /// Real vLLM
    Vllm,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Ports {
    /// API 8081, proxy private 18081, control plane 18090 and 18091, agent 18092, engines from 10814 up
    Default,
    /// Free ones, shown in the banner
    Auto,
}

/// `penstock deploy`
#[derive(Debug, Clone, Args)]
pub(crate) struct DeployArgs {
    /// Name under which clients ask for the model
    pub(crate) model: String,
    /// Engines
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) replicas: u32,
    /// Kind of engine, as agents name it in their settings: vllm, sim
    #[arg(long, value_name = "NAME")]
    pub(crate) engine: Option<String>,
    /// Model folder on the nodes, or a model id [default: MODEL]
    #[arg(long, value_name = "PATH")]
    pub(crate) model_path: Option<String>,
    /// Further argument of each engine, repeatable: --arg=--max-model-len=8192
    #[arg(long = "arg", value_name = "ARG", allow_hyphen_values = true)]
    pub(crate) args: Vec<String>,
    /// Environment variable of each engine, repeatable
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = name_and_value)]
    pub(crate) env: Vec<(String, String)>,
    /// GPUs of each engine
    #[arg(long, value_name = "N")]
    pub(crate) gpus_per_replica: Option<u32>,
    /// LoRA adapter that each engine loads, repeatable; clients ask for it by NAME
    #[arg(long = "lora", value_name = "NAME=PATH", value_parser = name_and_value)]
    pub(crate) lora: Vec<(String, String)>,
    /// Typed field of the deployment, repeatable: --set max_model_len=8192; docs/engines.md lists them
    #[arg(long = "set", value_name = "FIELD=VALUE", value_parser = name_and_value)]
    pub(crate) fields: Vec<(String, String)>,
    #[command(flatten)]
    pub(crate) wait: Wait,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// `penstock scale`
#[derive(Debug, Clone, Args)]
pub(crate) struct ScaleArgs {
    /// Model whose deployment changes
    pub(crate) model: String,
    /// Engines wanted
    #[arg(long, value_name = "N")]
    pub(crate) replicas: u32,
    #[command(flatten)]
    pub(crate) wait: Wait,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// `penstock delete`
#[derive(Debug, Clone, Args)]
pub(crate) struct DeleteArgs {
    /// Model whose deployment goes
    pub(crate) model: String,
    #[command(flatten)]
    pub(crate) wait: Wait,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// Whether to come back at once or when it is done.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Wait {
    /// Come back only when the engines are as asked for
    #[arg(long)]
    pub(crate) wait: bool,
    /// Longest wait, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600, requires = "wait")]
    pub(crate) timeout_s: u64,
}

/// `penstock route`
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum RouteCommand {
    /// Create or replace a route
    Set(RouteSetArgs),
    /// Delete a route; a deployment of that name is then served by itself again
    Delete(RouteDeleteArgs),
}

/// `penstock route set`
#[derive(Debug, Clone, Args)]
pub(crate) struct RouteSetArgs {
    /// Name that clients ask for
    pub(crate) name: String,
    /// Deployment, or adapter of one, that answers, and its share of the sum of weights (0 to 1000), repeatable
    #[arg(long = "target", value_name = "MODEL[=WEIGHT]", value_parser = target, required = true)]
    pub(crate) targets: Vec<RouteTarget>,
    /// Other name to try when no target can answer, repeatable: in this order
    #[arg(long = "fallback", value_name = "NAME")]
    pub(crate) fallbacks: Vec<String>,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// `penstock route delete`
#[derive(Debug, Clone, Args)]
pub(crate) struct RouteDeleteArgs {
    /// Route's name
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// `penstock undrain`
#[derive(Debug, Clone, Args)]
pub(crate) struct EndpointArgs {
    /// Endpoint's id, as `penstock endpoints` shows it, or node/NAME
    pub(crate) endpoint_id: String,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// `penstock history`
#[derive(Debug, Clone, Args)]
pub(crate) struct ModelArgs {
    /// Model whose deployment it is
    pub(crate) model: String,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// `penstock rollback`
#[derive(Debug, Clone, Args)]
pub(crate) struct RollbackArgs {
    /// Model whose deployment it is
    pub(crate) model: String,
    /// Revision to go back to [default: the one before the last change]
    #[arg(long, value_name = "N")]
    pub(crate) to: Option<u64>,
    #[command(flatten)]
    pub(crate) wait: Wait,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// `penstock cordon`, `maintenance` and `uncordon`
#[derive(Debug, Clone, Args)]
pub(crate) struct NodeArgs {
    /// Node's name, as `penstock nodes` shows it
    pub(crate) node: String,
    /// Why, for other operators
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// `penstock prefetch`
#[derive(Debug, Clone, Args)]
pub(crate) struct PrefetchArgs {
    /// Model of a deployment
    pub(crate) model: String,
    /// Node that shall have it, repeatable [default: every worker node that is there]
    #[arg(long = "node", value_name = "NODE")]
    pub(crate) nodes: Vec<String>,
    /// It is not wanted there ahead any more; what was fetched stays on the disk
    #[arg(long)]
    pub(crate) remove: bool,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// `penstock endpoints`
#[derive(Debug, Clone, Args)]
pub(crate) struct EndpointsArgs {
    /// Only this model's
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// `penstock explain`
#[derive(Debug, Clone, Args)]
pub(crate) struct ExplainArgs {
    /// Its name: the answer's x-request-id header, or request_id in the access log
    pub(crate) request_id: String,
    /// Private port of a proxy that may have served it, repeatable [default: that of the `penstock up` on --data-dir,
    /// else http://127.0.0.1:18081]
    #[arg(long, value_name = "URL", value_hint = ValueHint::Url)]
    pub(crate) proxy: Vec<String>,
    /// Data directory of the `penstock up` to ask [default: ~/.local/share/penstock]
    #[arg(long, value_name = "DIR", env = "PENSTOCK_DATA_DIR", value_hint = ValueHint::DirPath)]
    pub(crate) data_dir: Option<PathBuf>,
    /// Print the proxy's JSON
    #[arg(long)]
    pub(crate) json: bool,
}

fn name_and_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
        _ => Err("expected NAME=VALUE".into()),
    }
}

fn target(text: &str) -> Result<RouteTarget, String> {
    let (model, weight) = match text.split_once('=') {
        None => (text, None),
        Some((model, weight)) => {
            let weight = weight.parse().ok().filter(|weight| *weight <= 1_000);
            (model, Some(weight.ok_or("the weight must be a whole number from 0 to 1000")?))
        }
    };
    if model.is_empty() {
        return Err("expected MODEL=WEIGHT".into());
    }
    Ok(RouteTarget { model: model.into(), weight })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn error(line: &str) -> String {
        Cli::try_parse_from(line.split(' ')).expect_err(line).to_string()
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_process_is_listed_in_the_help() {
        let help = Cli::command().render_help().to_string();
        for (name, _) in crate::processes::PROCESSES {
            assert!(help.contains(&format!("  {name} ")), "{name} is missing in:\n{help}");
        }
    }

    #[test]
    fn mistakes_name_the_argument_and_what_is_accepted() {
        assert!(error("penstock up --engines many").contains("--engines"));
        assert!(error("penstock up --engines 1001").contains("0..=1000"));
        assert!(error("penstock up --ports some").contains("possible values: default, auto"));
        assert!(error("penstock up --engine tgi").contains("possible values: sim, vllm"));
        assert!(error("penstock deploy m --env NOVALUE").contains("expected NAME=VALUE"));
        assert!(error("penstock scale m").contains("--replicas"));
        assert!(error("penstock scale m --replicas 1 --timeout-s 5").contains("--wait"));
        assert!(error("penstock statsu").contains("status"));
        assert!(error("penstock route set m").contains("--target"));
        assert!(error("penstock route set m --target a=1001").contains("0 to 1000"));
        assert!(error("penstock route set m --target =1").contains("expected MODEL=WEIGHT"));
        assert!(error("penstock deploy m --lora sql").contains("expected NAME=VALUE"));
    }

    #[test]
    fn engine_arguments_may_start_with_dashes() {
        let line = "penstock up --engine-arg=--sim-itl-ms=5 --engine-arg --sim-seed=1";
        let Command::Up(options) = Cli::try_parse_from(line.split(' ')).expect("parses").command else {
            panic!("not up");
        };
        assert_eq!(options.engine_args, ["--sim-itl-ms=5", "--sim-seed=1"]);
    }
}
