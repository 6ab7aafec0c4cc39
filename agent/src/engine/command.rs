//! From an assignment to the command line and environment of its engine.
//!
//! Pure, with golden tests: what an operator reads in `GET /engines` is exactly what is decided here. The agent alone
//! decides where an engine listens, under which name it serves and which GPUs it sees; an argument or variable of a
//! deployment that would say otherwise is refused with a sentence, once, and not run into a crash loop.

use std::collections::BTreeMap;

use penstock_config::agent::EngineProgram;

use crate::{assignment::Assignment, gpu::GpuKind, warm::sleep};

/// Names the replica on every process of its engine, so that strays can be found.
pub(crate) const REPLICA_VARIABLE: &str = "PENSTOCK_REPLICA";
/// Names the agent's state folder likewise: two agents on one machine leave each other's engines alone.
pub(crate) const STATE_DIR_VARIABLE: &str = "PENSTOCK_STATE_DIR";
const SIMULATED_GPUS_VARIABLE: &str = "PENSTOCK_SIM_GPUS";
const CUDA_VARIABLE: &str = "CUDA_VISIBLE_DEVICES";

/// Variables that a deployment may not set.
const OWNED_VARIABLES: [&str; 4] =
    [REPLICA_VARIABLE, STATE_DIR_VARIABLE, SIMULATED_GPUS_VARIABLE, CUDA_VARIABLE];

/// Options that a deployment may not give, and why.
const OWNED_OPTIONS: [(&str, &str); 7] = [
    ("--host", "the agent's setting engines.bind_host decides where engines listen"),
    ("--port", "the agent gives each engine a port"),
    ("--uds", "proxies reach engines over TCP"),
    ("--served-model-name", "the deployment's model name is served"),
    ("--model", "the deployment's model_path is served"),
    ("--ssl-keyfile", "proxies reach engines over plain HTTP"),
    ("--ssl-certfile", "proxies reach engines over plain HTTP"),
];

/// What to execute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Launch {
    /// Program, then its arguments; never empty.
    pub(crate) argv: Vec<String>,
    /// Variables laid over the agent's own environment.
    pub(crate) env: BTreeMap<String, String>,
    /// Variables taken out of the agent's own environment.
    pub(crate) env_removed: Vec<&'static str>,
}

/// An assignment that no retry can start; the sentence is for the operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct SpecError(String);

/// What of a launch does not come from the assignment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    /// Address to listen on.
    pub(crate) host: &'a str,
    /// Port to listen on.
    pub(crate) port: u16,
    /// Kind of the node's GPUs.
    pub(crate) gpus: GpuKind,
    /// The agent's state folder.
    pub(crate) state_dir: &'a str,
}

/// The command for `assignment` at `place`, run by one of `programs`.
///
/// # Errors
/// What is wrong with the assignment and what is accepted.
pub(crate) fn launch(
    programs: &BTreeMap<String, EngineProgram>,
    assignment: &Assignment,
    place: Place<'_>,
) -> Result<Launch, SpecError> {
    let spec = &assignment.spec;
    let program = programs.get(&spec.engine).ok_or_else(|| unknown_engine(programs, &spec.engine))?;
    check_value("model_path", &spec.model_path)?;
    check_value("served_model_name", &spec.served_model_name)?;
    program.args.iter().chain(&spec.args).try_for_each(|arg| check_argument(arg))?;
    spec.env.keys().try_for_each(|name| check_variable(name))?;
    for (name, path) in &spec.lora {
        check_value("an adapter's name", name)?;
        check_value("an adapter's path", path)?;
    }

    let port = place.port.to_string();
    let ours = [
        "serve",
        &spec.model_path,
        "--host",
        place.host,
        "--port",
        &port,
        "--served-model-name",
        &spec.served_model_name,
    ];
    let argv: Vec<String> = program
        .command
        .iter()
        .cloned()
        .chain(ours.map(str::to_owned))
        .chain(lora_arguments(&spec.lora))
        .chain(sleep::arguments(spec))
        .chain(program.args.iter().cloned())
        .chain(spec.args.iter().cloned())
        .collect();

    let mut env: BTreeMap<String, String> = program.env.clone();
    env.extend(spec.env.clone());
    env.extend(sleep::environment(spec));
    env.insert(REPLICA_VARIABLE.into(), assignment.replica_id.clone());
    env.insert(STATE_DIR_VARIABLE.into(), place.state_dir.into());
    let uuids = assignment.gpu_uuids.join(",");
    let env_removed = match place.gpus {
        // No GPU assigned: none may be seen, or the engine would take all of them.
        GpuKind::Nvml => {
            env.insert(CUDA_VARIABLE.into(), uuids);
            vec![SIMULATED_GPUS_VARIABLE]
        }
        GpuKind::Simulated => {
            env.insert(SIMULATED_GPUS_VARIABLE.into(), uuids);
            vec![CUDA_VARIABLE]
        }
        GpuKind::None => vec![SIMULATED_GPUS_VARIABLE],
    };
    if let Some(bad) = argv.iter().chain(env.values()).find(|text| text.contains('\0')) {
        return Err(SpecError(format!("{bad:?} holds a NUL character, which no argument or variable can")));
    }
    Ok(Launch { argv, env, env_removed })
}

/// vLLM takes all adapters behind one option.
fn lora_arguments(lora: &[(String, String)]) -> Vec<String> {
    if lora.is_empty() {
        return Vec::new();
    }
    let modules = lora.iter().map(|(name, path)| format!("{name}={path}"));
    ["--enable-lora".to_owned(), "--lora-modules".to_owned()].into_iter().chain(modules).collect()
}

fn unknown_engine(programs: &BTreeMap<String, EngineProgram>, name: &str) -> SpecError {
    let known = programs.keys().cloned().collect::<Vec<_>>().join(", ");
    SpecError(format!(
        "engine {name:?} is not known on this node; known are: {known} (agent settings [engines.NAME])"
    ))
}

fn check_value(field: &str, value: &str) -> Result<(), SpecError> {
    if value.is_empty() {
        return Err(SpecError(format!("{field} is empty")));
    }
    if value.starts_with('-') {
        return Err(SpecError(format!(
            "{field} is {value:?}; it must not begin with '-', which would make it an option"
        )));
    }
    Ok(())
}

/// Also refuses beginnings of owned options ("--por"), which argparse takes for the whole, and vLLM's spelling with '_'.
fn check_argument(arg: &str) -> Result<(), SpecError> {
    if arg == "--" {
        return Err(SpecError(
            "the argument \"--\" is not accepted: what follows it would not be options".into(),
        ));
    }
    if !arg.starts_with("--") {
        return Ok(());
    }
    let option = arg.split('=').next().unwrap_or(arg).replace('_', "-");
    match OWNED_OPTIONS.iter().find(|(owned, _)| owned.starts_with(&option)) {
        Some((owned, reason)) => {
            Err(SpecError(format!("the argument {arg:?} is not accepted ({owned}): {reason}")))
        }
        None => Ok(()),
    }
}

fn check_variable(name: &str) -> Result<(), SpecError> {
    if name.is_empty() || name.contains(['=', '\0']) {
        return Err(SpecError(format!(
            "the environment variable name {name:?} must not be empty or contain '='"
        )));
    }
    if OWNED_VARIABLES.contains(&name) {
        return Err(SpecError(format!("the environment variable {name} is not accepted: the agent sets it")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use penstock_config::agent::EnginesConfig;

    use super::*;
    use crate::assignment::EngineSpec;

    fn assignment() -> Assignment {
        Assignment {
            model: "org/llama".into(),
            replica_id: "org-llama-0".into(),
            generation: 7,
            spec: EngineSpec {
                engine: "vllm".into(),
                model_path: "/models/llama".into(),
                served_model_name: "org/llama".into(),
                args: vec!["--tensor-parallel-size".into(), "2".into(), "--max-model-len=8192".into()],
                env: BTreeMap::from([("VLLM_LOGGING_LEVEL".into(), "DEBUG".into())]),
                ..EngineSpec::default()
            },
            gpu_uuids: vec!["GPU-a".into(), "GPU-b".into()],
            asleep: false,
        }
    }

    fn place(gpus: GpuKind) -> Place<'static> {
        Place { host: "0.0.0.0", port: 10_815, gpus, state_dir: "/state" }
    }

    fn try_launch(change: impl FnOnce(&mut Assignment)) -> Result<Launch, SpecError> {
        let mut assignment = assignment();
        change(&mut assignment);
        launch(&EnginesConfig::default().programs, &assignment, place(GpuKind::Nvml))
    }

    fn env(launch: &Launch) -> Vec<String> {
        launch.env.iter().map(|(k, v)| format!("{k}={v}")).collect()
    }

    #[test]
    fn vllm_on_two_gpus() {
        let launch = try_launch(|_| {}).expect("valid");
        assert_eq!(
            launch.argv.join(" "),
            "vllm serve /models/llama --host 0.0.0.0 --port 10815 --served-model-name org/llama \
             --shutdown-timeout 10 --tensor-parallel-size 2 --max-model-len=8192"
        );
        assert_eq!(
            env(&launch),
            [
                "CUDA_VISIBLE_DEVICES=GPU-a,GPU-b",
                "PENSTOCK_REPLICA=org-llama-0",
                "PENSTOCK_STATE_DIR=/state",
                "VLLM_LOGGING_LEVEL=DEBUG"
            ]
        );
        assert_eq!(launch.env_removed, ["PENSTOCK_SIM_GPUS"]);
    }

    #[test]
    fn adapters_come_before_further_arguments() {
        let adapter = |name: &str, path: &str| (name.to_owned(), path.to_owned());
        let launch =
            try_launch(|a| a.spec.lora = vec![adapter("sql", "/loras/sql"), adapter("o/b", "o/b-lora")]);
        assert_eq!(
            launch.expect("valid").argv.join(" "),
            "vllm serve /models/llama --host 0.0.0.0 --port 10815 --served-model-name org/llama --enable-lora \
             --lora-modules sql=/loras/sql o/b=o/b-lora --shutdown-timeout 10 --tensor-parallel-size 2 \
             --max-model-len=8192"
        );
        for bad in [adapter("", "p"), adapter("--x", "p"), adapter("n", "")] {
            try_launch(|a| a.spec.lora = vec![bad]).expect_err("neither empty nor an option");
        }
    }

    #[test]
    fn the_simulator_on_simulated_gpus() {
        let mut programs = EnginesConfig::default().programs;
        programs.get_mut("sim").unwrap().command = vec!["/opt/penstock".into(), "engine-sim".into()];
        let mut assignment = assignment();
        assignment.spec = EngineSpec {
            engine: "sim".into(),
            model_path: "sim-model".into(),
            served_model_name: "m".into(),
            ..EngineSpec::default()
        };
        let launch = launch(&programs, &assignment, place(GpuKind::Simulated)).expect("valid");
        assert_eq!(
            launch.argv.join(" "),
            "/opt/penstock engine-sim serve sim-model --host 0.0.0.0 --port 10815 --served-model-name m"
        );
        assert_eq!(
            env(&launch),
            ["PENSTOCK_REPLICA=org-llama-0", "PENSTOCK_SIM_GPUS=GPU-a,GPU-b", "PENSTOCK_STATE_DIR=/state"]
        );
        assert_eq!(launch.env_removed, ["CUDA_VISIBLE_DEVICES"]);
    }

    #[test]
    fn an_engine_without_gpus_sees_none_on_a_node_that_has_some() {
        let launch = try_launch(|a| a.gpu_uuids.clear()).expect("valid");
        assert_eq!(launch.env["CUDA_VISIBLE_DEVICES"], "");
        let cpu = super::launch(&EnginesConfig::default().programs, &assignment(), place(GpuKind::None))
            .expect("valid");
        assert!(!cpu.env.contains_key("CUDA_VISIBLE_DEVICES"));
    }

    #[test]
    fn the_deployments_environment_wins_over_the_programs() {
        let mut programs = EnginesConfig::default().programs;
        let theirs = [("A", "program"), ("VLLM_LOGGING_LEVEL", "INFO")];
        programs.get_mut("vllm").unwrap().env = theirs.map(|(k, v)| (k.into(), v.into())).into();
        let launch = launch(&programs, &assignment(), place(GpuKind::Nvml)).expect("valid");
        assert_eq!(
            (launch.env["A"].as_str(), launch.env["VLLM_LOGGING_LEVEL"].as_str()),
            ("program", "DEBUG")
        );
    }

    #[test]
    fn what_the_agent_owns_is_refused_in_every_spelling() {
        for arg in [
            "--port",
            "--port=1",
            "--por",
            "--host=::",
            "--served_model_name",
            "--served-model",
            "--uds=/x",
            "--",
        ] {
            let error = try_launch(|a| a.spec.args.push(arg.into())).expect_err(arg).to_string();
            assert!(error.contains(&format!("{arg:?} is not accepted")), "{error}");
        }
        for name in ["CUDA_VISIBLE_DEVICES", "PENSTOCK_REPLICA", "PENSTOCK_STATE_DIR"] {
            let change = |a: &mut Assignment| drop(a.spec.env.insert(name.into(), "x".into()));
            assert!(try_launch(change).expect_err(name).to_string().contains("the agent sets it"));
        }
        for fine in ["--portable", "--host-cache=1", "-O3", "value", "--seed"] {
            try_launch(|a| a.spec.args.push(fine.into())).expect(fine);
        }
    }

    #[test]
    fn an_unknown_engine_names_the_known_ones() {
        let error = try_launch(|a| a.spec.engine = "sglang".into()).expect_err("unknown").to_string();
        assert!(
            error.contains("engine \"sglang\" is not known on this node; known are: sim, vllm"),
            "{error}"
        );
    }

    #[test]
    fn values_that_would_become_options_or_cannot_be_passed_are_refused() {
        assert!(try_launch(|a| a.spec.model_path = "--trust-remote-code".into()).is_err());
        assert!(try_launch(|a| a.spec.model_path.clear()).is_err());
        assert!(try_launch(|a| a.spec.served_model_name.clear()).is_err());
        assert!(try_launch(|a| a.spec.args.push("a\0b".into())).is_err());
        assert!(try_launch(|a| drop(a.spec.env.insert("A=B".into(), String::new()))).is_err());
    }
}
