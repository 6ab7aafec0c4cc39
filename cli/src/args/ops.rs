//! Arguments of the commands that run a site: manifests, looking, checks, tokens, backups.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum, ValueHint};

use super::{Format, Remote, Server, Wait};
use crate::apply::plan::{Prune, prune};

/// `penstock apply`
#[derive(Debug, Clone, Args)]
pub(crate) struct ApplyArgs {
    /// Manifest in YAML, JSON or TOML, a folder of them, or - for standard input; repeatable
    #[arg(long = "file", short, value_name = "FILE", required = true, value_hint = ValueHint::AnyPath)]
    pub(crate) files: Vec<PathBuf>,
    /// Check everything and show what would change; change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Delete things of this kind that no manifest names, all or those whose name fits: deployments, routes:team-a-*
    #[arg(long, value_name = "KIND[:PATTERN]", value_parser = prune)]
    pub(crate) prune: Vec<Prune>,
    #[command(flatten)]
    pub(crate) wait: Wait,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// `penstock diff`
#[derive(Debug, Clone, Args)]
pub(crate) struct DiffArgs {
    /// Model whose deployment's revisions are compared [default: its last change]
    #[arg(required_unless_present = "files", conflicts_with = "files")]
    pub(crate) model: Option<String>,
    /// Manifest, folder or - whose changes to the site are shown; repeatable
    #[arg(long = "file", short, value_name = "FILE", value_hint = ValueHint::AnyPath)]
    pub(crate) files: Vec<PathBuf>,
    /// As for `apply`: also show what would be deleted
    #[arg(long, value_name = "KIND[:PATTERN]", value_parser = prune, requires = "files")]
    pub(crate) prune: Vec<Prune>,
    /// Exit with 5 if anything differs
    #[arg(long)]
    pub(crate) exit_code: bool,
    /// Revision to start from [default: the one before --to]
    #[arg(long, value_name = "N", conflicts_with = "files")]
    pub(crate) from: Option<u64>,
    /// Revision to end at [default: the present one]
    #[arg(long, value_name = "N", conflicts_with = "files")]
    pub(crate) to: Option<u64>,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// What can be listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Things {
    #[value(alias = "deployment")]
    Deployments,
    #[value(alias = "model")]
    Models,
    #[value(alias = "placement")]
    Placements,
    #[value(alias = "node")]
    Nodes,
    #[value(alias = "endpoint")]
    Endpoints,
    #[value(alias = "proxy")]
    Proxies,
    #[value(alias = "route")]
    Routes,
    /// Of the models that are named
    #[value(alias = "revision")]
    Revisions,
    Audit,
    #[value(alias = "token")]
    Tokens,
}

/// `penstock get`
#[derive(Debug, Clone, Args)]
pub(crate) struct GetArgs {
    /// What to list
    pub(crate) kind: Things,
    /// Only these, by name; one that is not there is an error
    pub(crate) names: Vec<String>,
    /// Only names, one in a line
    #[arg(long)]
    pub(crate) names_only: bool,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// What can be described.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Thing {
    #[value(aliases = ["deployments", "model", "models"])]
    Deployment,
    #[value(alias = "nodes")]
    Node,
    #[value(alias = "endpoints")]
    Endpoint,
    #[value(alias = "routes")]
    Route,
    #[value(alias = "proxies")]
    Proxy,
}

/// `penstock describe`
#[derive(Debug, Clone, Args)]
pub(crate) struct DescribeArgs {
    /// Its kind
    pub(crate) kind: Thing,
    /// Its name
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// `penstock drain`
#[derive(Debug, Clone, Args)]
pub(crate) struct DrainArgs {
    /// Endpoint's id, as `penstock endpoints` shows it, or node/NAME: everything moves away within each deployment's budget
    pub(crate) target: String,
    /// Why, for other operators (nodes)
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
    /// Move the endpoint's streams to others, one after another, instead of letting them end there
    #[arg(long)]
    pub(crate) move_streams: bool,
    /// Come back only when the endpoint has no request, or the node no engine, left
    #[arg(long)]
    pub(crate) wait: bool,
    /// Longest wait, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600, requires = "wait")]
    pub(crate) timeout_s: u64,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// `penstock wait-ready`
#[derive(Debug, Clone, Args)]
pub(crate) struct WaitReadyArgs {
    /// Models to wait for [default: every deployment]
    pub(crate) models: Vec<String>,
    /// Longest wait, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub(crate) timeout_s: u64,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// `penstock verify-chat`
#[derive(Debug, Clone, Args)]
pub(crate) struct VerifyChatArgs {
    /// Name to ask for [default: the first that the proxy lists]
    pub(crate) model: Option<String>,
    /// Proxy's address for clients [default: that of the `penstock up` on --data-dir, else http://127.0.0.1:8081]
    #[arg(long, value_name = "URL", env = "PENSTOCK_PROXY_URL", value_hint = ValueHint::Url)]
    pub(crate) proxy: Option<String>,
    /// Key of the proxy's API, where it wants one
    #[arg(long, value_name = "KEY", env = "PENSTOCK_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    /// What to say
    #[arg(long, value_name = "TEXT", default_value = "Say hello in five words.")]
    pub(crate) prompt: String,
    /// Longest answer, in tokens
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) max_tokens: u32,
    /// Longest wait for the whole answer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub(crate) timeout_s: u64,
    /// Data directory of the `penstock up` to ask [default: ~/.local/share/penstock]
    #[arg(long, value_name = "DIR", env = "PENSTOCK_DATA_DIR", value_hint = ValueHint::DirPath)]
    pub(crate) data_dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `penstock doctor`
#[derive(Debug, Clone, Args)]
pub(crate) struct DoctorArgs {
    /// A proxy's private port to look at, repeatable [default: that of the `penstock up` on --data-dir]
    #[arg(long, value_name = "URL", value_hint = ValueHint::Url)]
    pub(crate) proxy: Vec<String>,
    /// Another control plane that should be there, repeatable
    #[arg(long = "also", value_name = "URL", value_hint = ValueHint::Url)]
    pub(crate) others: Vec<String>,
    /// The control plane's settings file: its etcd and its disk are looked at from here
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) config: Option<PathBuf>,
    /// Warnings fail as well
    #[arg(long)]
    pub(crate) strict: bool,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// What a machine is to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    Proxy,
    Controlplane,
    Agent,
}

/// `penstock preflight`
#[derive(Debug, Clone, Args)]
pub(crate) struct PreflightArgs {
    /// What shall run here, repeatable [default: all of it]
    #[arg(long = "for", value_name = "PART")]
    pub(crate) parts: Vec<Part>,
    /// etcd's members, as http://HOST:2379, repeatable
    #[arg(long = "etcd", value_name = "URL")]
    pub(crate) etcd: Vec<String>,
    /// Command that starts vLLM
    #[arg(long, value_name = "COMMAND", default_value = "vllm")]
    pub(crate) vllm: String,
    /// Folder for state
    #[arg(long, value_name = "DIR", default_value = "/var/lib/penstock", value_hint = ValueHint::DirPath)]
    pub(crate) state_dir: PathBuf,
    /// Settings of the agent that shall run here: its restore hooks, prefetch commands and models' disk are looked at
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) agent_config: Option<PathBuf>,
    /// Warnings fail as well
    #[arg(long)]
    pub(crate) strict: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `penstock etcd-topology`
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum EtcdTopologyCommand {
    /// Choose members out of machines; talks to nobody
    Plan(TopologyArgs),
}

/// How members are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// Every machine
    Traditional,
    /// Five of five or more, three of three or four, else every machine; zones do not count
    Standard,
    /// Two zones and an arbitration zone: 2+2+1, or 1+1+1 with fewer machines
    #[value(name = "multizone-ha", aliases = ["multiZoneHA", "multi-zone-ha"])]
    MultiZoneHa,
}

/// `penstock etcd-topology plan`
#[derive(Debug, Clone, Args)]
pub(crate) struct TopologyArgs {
    /// A machine that could be a member, repeatable: --node m1=az1; without a zone: --node m1
    #[arg(long = "node", value_name = "NAME[=ZONE]", required = true)]
    pub(crate) nodes: Vec<String>,
    /// How to choose
    #[arg(long, value_name = "MODE", default_value = "standard")]
    pub(crate) mode: Mode,
    /// Zone that only votes
    #[arg(long, value_name = "ZONE", default_value = "reserved-arbitration")]
    pub(crate) arbitration_zone: String,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `penstock token`
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token; it is shown once
    Create(TokenCreateArgs),
    /// Tokens that were made, without their secrets
    List(Remote),
    /// Take a token back, at once
    Revoke(TokenRevokeArgs),
}

/// What a token may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    /// Look
    Viewer,
    /// Look, deploy, scale, drain
    Operator,
    /// Everything, tokens and backups included
    Admin,
}

/// `penstock token create`
#[derive(Debug, Clone, Args)]
pub(crate) struct TokenCreateArgs {
    /// Name, for lists and the audit
    pub(crate) name: String,
    /// What it may do
    #[arg(long, value_name = "ROLE", default_value = "viewer")]
    pub(crate) role: Role,
    /// It ends by itself after so many seconds
    #[arg(long, value_name = "SECONDS")]
    pub(crate) expires_in_s: Option<u64>,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// `penstock token revoke`
#[derive(Debug, Clone, Args)]
pub(crate) struct TokenRevokeArgs {
    /// Its name
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// `penstock audit`
#[derive(Debug, Clone, Args)]
pub(crate) struct AuditArgs {
    /// Only what concerns this model
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// Only what this one did
    #[arg(long, value_name = "NAME")]
    pub(crate) actor: Option<String>,
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub(crate) limit: u32,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// `penstock logs`
#[derive(Debug, Clone, Args)]
pub(crate) struct LogsArgs {
    /// Of this replica's engine, as MODEL/REPLICA or REPLICA; without it, the control plane's own
    #[arg(value_name = "MODEL/REPLICA")]
    pub(crate) replica: Option<String>,
    /// How many of the last lines
    #[arg(long, short = 'n', value_name = "N", default_value_t = 200)]
    pub(crate) lines: u32,
    /// Go on with what the engine writes, until it is interrupted
    #[arg(long, short, requires = "replica")]
    pub(crate) follow: bool,
    /// Of the engine's life before the present one: why it was started again
    #[arg(long, short, requires = "replica", conflicts_with = "follow")]
    pub(crate) previous: bool,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// `penstock gpu`
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum GpuCommand {
    /// Put a GPU back into use after its XIDs or ECC errors were seen to (a reset, a replacement)
    Clear(ClearGpuArgs),
}

/// `penstock gpu clear`
#[derive(Debug, Clone, Args)]
pub(crate) struct ClearGpuArgs {
    /// Its uuid, as `penstock gpus` shows it
    pub(crate) uuid: String,
    /// Private port of its node's agent [default: that of the `penstock up` on --data-dir, else http://127.0.0.1:18092]
    #[arg(long, value_name = "URL", value_hint = ValueHint::Url)]
    pub(crate) agent: Option<String>,
    /// Data directory of the `penstock up` to talk to [default: ~/.local/share/penstock]
    #[arg(long, value_name = "DIR", env = "PENSTOCK_DATA_DIR", value_hint = ValueHint::DirPath)]
    pub(crate) data_dir: Option<PathBuf>,
    /// How to print: a sentence, or the agent's answer as JSON or YAML
    #[arg(long, short, value_name = "FORMAT", default_value = "table")]
    pub(crate) output: Format,
}

/// `penstock cluster`
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Who leads, in which term, on which store, and how many of everything there are
    Status(Remote),
}

/// `penstock place`
#[derive(Debug, Clone, Args)]
pub(crate) struct PlaceArgs {
    /// Name under which it is deployed: /placements/UID
    #[arg(long, value_name = "UID")]
    pub(crate) model_uid: String,
    /// Model folder on the node, or a model id
    #[arg(long, value_name = "NAME")]
    pub(crate) model_name: String,
    /// Node that it goes to
    #[arg(long, value_name = "NODE")]
    pub(crate) node_id: String,
    /// Kind of engine
    #[arg(long, value_name = "NAME", default_value = "vllm")]
    pub(crate) engine: String,
    /// Taken for the guide's sake: the node's agent chooses the port, from its engines.port_base up
    #[arg(long, value_name = "PORT")]
    pub(crate) port: Option<u16>,
    /// Longest wait for its place, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub(crate) timeout_s: u64,
    #[command(flatten)]
    pub(crate) remote: Remote,
}

/// `penstock backup`
#[derive(Debug, Clone, Args)]
pub(crate) struct BackupArgs {
    /// File to write [default: penstock-DATE-rREVISION.json here]; - is standard output
    #[arg(long = "out", short = 'o', value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) file: Option<PathBuf>,
    /// Read the embedded store in this file instead; its control plane must be stopped
    #[arg(long, value_name = "STORE", value_hint = ValueHint::FilePath)]
    pub(crate) offline: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) server: Server,
}

/// `penstock restore`
#[derive(Debug, Clone, Args)]
pub(crate) struct RestoreArgs {
    /// Backup
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    /// Show what would change; change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Also change and delete what differs from the backup; engines end and are replaced within each deployment's budget
    #[arg(long, conflicts_with = "only_missing")]
    pub(crate) force: bool,
    /// Only add what is missing
    #[arg(long)]
    pub(crate) only_missing: bool,
    /// Place every replica anew: for a site with other machines
    #[arg(long)]
    pub(crate) without_placements: bool,
    /// Restore into the embedded store in this file, which is made if missing; its control plane must be stopped
    #[arg(long, value_name = "STORE", value_hint = ValueHint::FilePath)]
    pub(crate) offline: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) remote: Remote,
}
