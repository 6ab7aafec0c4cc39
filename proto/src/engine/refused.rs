//! Arguments and environment variables that no deployment may give, each with its reason: what the agent decides, what would
//! hide an engine from those who watch it, and what would reach beyond one engine on one node.
//!
//! Not on the list is what merely runs other code (`--trust-remote-code`, `LD_PRELOAD`, `PYTHONPATH`): who may deploy may say
//! what is run. A list of what is allowed would have to follow every release of vLLM.

use super::fields::{FIELDS, option_of};

/// Whose options arguments are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// vLLM's, or its simulator's: everything is checked.
    Vllm,
    /// Another server's, whose options this build does not know: only what every agent decides is checked.
    Other,
}

impl Dialect {
    /// What can be told from the name of an entry of `[engines]` alone. The agent, which knows the entry, checks again.
    pub fn of_name(engine: &str) -> Self {
        if engine == "vllm" || engine == "sim" { Self::Vllm } else { Self::Other }
    }
}

/// A refused option. A name that ends with `*` stands for all that begin so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    /// The option or variable.
    pub name: &'static str,
    /// Why.
    pub reason: &'static str,
}

const fn no(name: &'static str, reason: &'static str) -> Refused {
    Refused { name, reason }
}

const ONE_NODE: &str = "an engine lives on one node, on the GPUs that its replica was given";
const NO_TLS: &str = "agent and proxies reach engines over plain HTTP";
const OTHER_WIRE: &str = "agent and proxies speak HTTP with engines";

/// Options that are refused for every engine: the agent decides them.
pub const COMMON: [Refused; 3] = [
    no("--host", "the agent's setting engines.bind_host decides where engines listen"),
    no("--port", "the agent gives each engine a port"),
    no("--served-model-name", "the deployment's model name is served"),
];

/// Options of vLLM that are refused.
pub const OPTIONS: [Refused; 39] = [
    no("--uds", "proxies reach engines over TCP"),
    no("--model", "the deployment's model_path is served"),
    no("--config", "a file could say everything that is refused here: write its options as args"),
    no("--ssl-*", NO_TLS),
    no("--enable-ssl-refresh", NO_TLS),
    no("--grpc*", OTHER_WIRE),
    no("--root-path", "agent and proxies ask for the API's own paths"),
    no(
        "--api-key",
        "agent and proxies have no key for engines: clients' keys are checked by the proxy (auth.keys)",
    ),
    no("--middleware", "it would stand between the engine and those who ask whether it is well"),
    no("--headless", "an engine without a server can be neither asked nor routed to"),
    no("--tokens-only", "an engine is ready when it has completed a text, which it would refuse"),
    no(
        "--disable-log-stats",
        "its /metrics would say nothing of load: routing, progress checks and autoscaling go by it",
    ),
    no("--device-ids", "the control plane chooses the GPUs of a replica"),
    no("--enable-elastic-ep", "it would take GPUs that were given to other replicas"),
    no("--data-parallel-address", ONE_NODE),
    no("--data-parallel-rpc-port", "the agent gives each engine its ports"),
    no("--data-parallel-rank", ONE_NODE),
    no("--data-parallel-start-rank", ONE_NODE),
    no("--data-parallel-size-local", ONE_NODE),
    no("--data-parallel-backend", ONE_NODE),
    no("--data-parallel-external-lb", ONE_NODE),
    no("--data-parallel-hybrid-lb", ONE_NODE),
    no(
        "--data-parallel-supervisor-port",
        "the agent is the supervisor of its engines, and gives them their ports",
    ),
    no("-dpa", ONE_NODE),
    no("-dpb", ONE_NODE),
    no("-dpl", ONE_NODE),
    no("-dpn", ONE_NODE),
    no("-dpp", "the agent gives each engine its ports"),
    no("-dpr", ONE_NODE),
    no("-dph", ONE_NODE),
    no("-dpe", ONE_NODE),
    no("-dpm", ONE_NODE),
    no("--data-parallel-multi-port-external-lb", ONE_NODE),
    no("--nnodes", ONE_NODE),
    no("-n", ONE_NODE),
    no("--node-rank", ONE_NODE),
    no("-r", ONE_NODE),
    no("--master-*", ONE_NODE),
    no("--kv-events-config", "the agent gives each engine ports of its own for them: say kv_events: true"),
];

/// Values that are refused of options that are otherwise free.
const VALUES: [(&str, &str, &str); 1] = [(
    "--distributed-executor-backend",
    "ray",
    "Ray's workers live outside of the engine's processes: the agent could neither watch nor end them",
)];

/// Environment variables that are refused for every engine.
pub const COMMON_VARIABLES: [Refused; 4] = [
    no("PENSTOCK_REPLICA", "the agent knows its engines by it"),
    no("PENSTOCK_STATE_DIR", "the agent knows its engines by it"),
    no("PENSTOCK_SIM_GPUS", "the control plane chooses the GPUs of a replica"),
    no("CUDA_VISIBLE_DEVICES", "the control plane chooses the GPUs of a replica"),
];

const FIXED_PORT: &str =
    "engines of one node would meet on a port that is fixed: left out, each finds free ones";

/// Environment variables of vLLM and its libraries that are refused.
pub const VARIABLES: [Refused; 14] = [
    no("CUDA_DEVICE_ORDER", "the agent sets it, so that vLLM and NVML count GPUs alike"),
    no("VLLM_PORT", FIXED_PORT),
    no("VLLM_DP_*", ONE_NODE),
    no("VLLM_HOST_IP", "it is another on each node: set it in the agent's [engines.NAME.env]"),
    no(
        "VLLM_API_KEY",
        "agent and proxies have no key for engines: clients' keys are checked by the proxy (auth.keys)",
    ),
    no(
        "VLLM_SERVER_DEV_MODE",
        "it opens paths that pause and read out the engine: say warm.sleep, which the agent keeps in hand",
    ),
    no("VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", "a server whose engine is dead would look alive"),
    no("MASTER_ADDR", ONE_NODE),
    no("MASTER_PORT", FIXED_PORT),
    no("RANK", ONE_NODE),
    no("LOCAL_RANK", ONE_NODE),
    no("WORLD_SIZE", ONE_NODE),
    no("PROMETHEUS_MULTIPROC_DIR", "engines of one node would write into each other's figures"),
    no(
        "RAY_ADDRESS",
        "Ray's workers live outside of the engine's processes: the agent could neither watch nor end them",
    ),
];

impl Refused {
    fn family(&self) -> Option<&'static str> {
        self.name.strip_suffix('*')
    }

    /// Whether `option` is this one, or a beginning of it that argparse would take for the whole.
    fn is_meant_by(&self, option: &str) -> bool {
        let stem = self.family().unwrap_or(self.name);
        let long = option.starts_with("--");
        if self.family().is_some() && option.starts_with(stem) {
            return true;
        }
        if !self.name.starts_with("--") {
            return option == self.name
                || (!long && option.strip_prefix(self.name).is_some_and(|v| !v.is_empty()));
        }
        let whole = FIELDS.iter().any(|field| field.option == option);
        option == stem || (long && option.len() > 2 && stem.starts_with(option) && !whole)
    }
}

/// Checks arguments.
///
/// # Errors
/// The first one that is refused: its position, and a sentence without the argument's value.
pub fn check_args(args: &[String], dialect: Dialect) -> Result<(), (usize, String)> {
    for (n, arg) in args.iter().enumerate() {
        if arg == "--" {
            return Err((n, "\"--\" is not accepted: what follows it would not be options".into()));
        }
        let Some(option) = option_of(arg) else { continue };
        let vllms = if dialect == Dialect::Vllm { OPTIONS.as_slice() } else { &[] };
        let listed = COMMON.iter().chain(vllms).find(|refused| refused.is_meant_by(&option));
        let value = || arg.split_once('=').map(|(_, value)| value).or(args.get(n + 1).map(String::as_str));
        let valued = VALUES
            .iter()
            .find(|(name, bad, _)| dialect == Dialect::Vllm && *name == option && value() == Some(bad));
        let given: String = arg.split('=').next().unwrap_or(arg).chars().take(64).collect();
        match (listed, valued) {
            (Some(refused), _) => {
                let whole =
                    if option == refused.name { String::new() } else { format!(" ({})", refused.name) };
                return Err((n, format!("{given:?}{whole} is not accepted: {}", refused.reason)));
            }
            (None, Some((_, bad, reason))) => {
                return Err((n, format!("{given:?} is not accepted with {bad:?}: {reason}")));
            }
            (None, None) => {}
        }
    }
    Ok(())
}

/// Checks the name of an environment variable.
///
/// # Errors
/// A sentence.
pub fn check_variable(name: &str, dialect: Dialect) -> Result<(), String> {
    let vllms = if dialect == Dialect::Vllm { VARIABLES.as_slice() } else { &[] };
    let is_it = |refused: &&Refused| match refused.family() {
        Some(stem) => name.starts_with(stem),
        None => name == refused.name,
    };
    match COMMON_VARIABLES.iter().chain(vllms).find(is_it) {
        Some(refused) => Err(format!("the environment variable {name} is not accepted: {}", refused.reason)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(args: &str, dialect: Dialect) -> Option<String> {
        let args: Vec<String> = args.split(' ').map(str::to_owned).collect();
        check_args(&args, dialect).err().map(|(_, sentence)| sentence)
    }

    #[test]
    fn what_is_refused_is_refused_in_every_spelling() {
        for (arg, part) in [
            ("--port", "\"--port\" is not accepted: the agent gives"),
            ("--port=1", "the agent gives each engine a port"),
            ("--por", "\"--por\" (--port) is not accepted"),
            ("--host=::", "engines.bind_host"),
            ("--served_model_name x", "\"--served_model_name\" is not accepted: the deployment's"),
            ("--served-model", "(--served-model-name)"),
            ("--uds=/x", "over TCP"),
            ("--", "not be options"),
            ("--config x.yaml", "\"--config\" is not accepted: a file"),
            ("--ssl-keyfile=/k", "plain HTTP"),
            ("--ssl_ca_certs", "plain HTTP"),
            ("--ssl", "plain HTTP"),
            ("--grpc", "speak HTTP"),
            ("--grpc-port=1", "speak HTTP"),
            ("--api_key=secret", "auth.keys"),
            ("-dpa=h", "one node"),
            ("--master_addr=h", "one node"),
            ("--disable-log-stats", "/metrics"),
            ("--distributed-executor-backend ray", "Ray's workers"),
            ("--distributed_executor_backend=ray", "Ray's workers"),
            ("--data-parallel-size-local 1", "one node"),
            ("--kv-events-config {}", "kv_events: true"),
        ] {
            let sentence = told(arg, Dialect::Vllm).unwrap_or_else(|| panic!("{arg} is taken"));
            assert!(sentence.contains(part), "{arg}: {sentence}");
            assert!(!sentence.contains("secret"), "values may be secrets: {sentence}");
        }
    }

    #[test]
    fn what_only_looks_alike_is_taken() {
        for fine in [
            "--portable",
            "--host-cache=1",
            "-O3",
            "value",
            "--seed",
            "--config-format auto",
            "--model-impl auto",
            "--data-parallel-size 2",
            "-dp 2",
            "--api-server-count 1",
            "--distributed-executor-backend mp",
            "--grammar",
            "-1",
        ] {
            assert_eq!(told(fine, Dialect::Vllm), None, "{fine}");
        }
        assert_eq!(told("--config x --api-key k --model m", Dialect::Other), None, "another's options");
        assert!(told("--port=1", Dialect::Other).is_some());
    }

    #[test]
    fn variables_are_refused_by_name_and_family() {
        for bad in
            ["CUDA_VISIBLE_DEVICES", "PENSTOCK_REPLICA", "VLLM_PORT", "VLLM_DP_RANK", "VLLM_SERVER_DEV_MODE"]
        {
            let sentence = check_variable(bad, Dialect::Vllm).expect_err(bad);
            assert!(sentence.contains(bad), "{sentence}");
        }
        for fine in ["VLLM_LOGGING_LEVEL", "HF_TOKEN", "LD_PRELOAD", "OMP_NUM_THREADS"] {
            check_variable(fine, Dialect::Vllm).expect(fine);
        }
        check_variable("RANK", Dialect::Other).expect("means nothing to others");
        check_variable("CUDA_VISIBLE_DEVICES", Dialect::Other).expect_err("the agent's");
    }

    #[test]
    fn the_document_has_every_field_and_everything_that_is_refused() {
        let document = include_str!("../../../docs/engines.md");
        let refused = COMMON.iter().chain(&OPTIONS).chain(&COMMON_VARIABLES).chain(&VARIABLES);
        let fields = FIELDS.iter().flat_map(|field| [field.name, field.option]);
        for name in refused.map(|refused| refused.name).chain(fields) {
            assert!(document.contains(&format!("`{name}`")), "docs/engines.md does not speak of {name}");
        }
    }

    #[test]
    fn every_reason_is_a_part_of_a_sentence() {
        for refused in COMMON.iter().chain(&OPTIONS).chain(&COMMON_VARIABLES).chain(&VARIABLES) {
            assert!(refused.reason.len() > 15 && !refused.reason.ends_with('.'), "{refused:?}");
        }
    }
}
