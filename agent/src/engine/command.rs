//! From an assignment to the command line and environment of its engine.
//!
//! Pure, with golden tests: what an operator reads in `GET /engines` is exactly what is decided here. The agent alone
//! decides where an engine listens, under which name it serves and which GPUs it sees; an argument or variable of a
//! deployment that would say otherwise is refused with a sentence, once, and not run into a crash loop. What is refused is
//! `penstock_proto::engine::refused`'s, so that the control plane says the same when a deployment is applied.
//!
//! The command line itself is [`super::vllm`]'s or [`super::exec`]'s.

use std::collections::BTreeMap;

use penstock_config::agent::EngineProgram;

use super::{exec, versions::Version, vllm};
use crate::{
    assignment::{Assignment, EngineSpec},
    gpu::GpuKind,
    warm::sleep,
};

/// Names the replica on every process of its engine, so that strays can be found.
pub(crate) const REPLICA_VARIABLE: &str = "PENSTOCK_REPLICA";
/// Names the agent's state folder likewise: two agents on one machine leave each other's engines alone.
pub(crate) const STATE_DIR_VARIABLE: &str = "PENSTOCK_STATE_DIR";
/// Names the pretended GPUs of an engine.
pub(crate) const SIMULATED_GPUS_VARIABLE: &str = "PENSTOCK_SIM_GPUS";
const CUDA_VARIABLE: &str = "CUDA_VISIBLE_DEVICES";
/// Lets vLLM count GPUs as NVML does, which its own figures go by.
const CUDA_ORDER: (&str, &str) = ("CUDA_DEVICE_ORDER", "PCI_BUS_ID");

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

/// An assignment that cannot be started as it is; the sentence is for the operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{sentence}")]
pub(crate) struct SpecError {
    sentence: String,
    /// No retry can start it: it is not what is installed on the node that is in its way.
    pub(crate) permanent: bool,
}

impl SpecError {
    /// With its sentence.
    pub(super) fn new(sentence: impl Into<String>) -> Self {
        Self { sentence: sentence.into(), permanent: true }
    }

    /// One that another version of the program would not have.
    pub(super) fn of_version(sentence: String) -> Self {
        Self { sentence, permanent: false }
    }
}

/// What of a launch does not come from the assignment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    /// Address to listen on.
    pub(crate) host: &'a str,
    /// Port to listen on.
    pub(crate) port: u16,
    /// First port for KV events, if [`extra_ports`] asked for some.
    pub(crate) kv_events_port: Option<u16>,
    /// Port for the ranks of a data-parallel engine to meet, likewise.
    pub(crate) rpc_port: Option<u16>,
    /// Kind of the node's GPUs.
    pub(crate) gpus: GpuKind,
    /// The agent's state folder.
    pub(crate) state_dir: &'a str,
    /// The longest time for a shutdown that ends before the agent's patience does.
    pub(crate) longest_shutdown_s: u32,
    /// The program's version, if it is known.
    pub(crate) version: Option<Version>,
}

/// Ports that an engine needs beside the one that it serves on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ExtraPorts {
    /// In a row, for KV events: one for each data-parallel rank.
    pub(crate) kv_events: u16,
    /// Whether data-parallel ranks need one to meet.
    pub(crate) rpc: bool,
}

/// The ports that an engine with `spec` needs beside the one that it serves on.
pub(crate) fn extra_ports(program: Option<&EngineProgram>, spec: &EngineSpec) -> ExtraPorts {
    if program.is_none_or(EngineProgram::is_exec) {
        return ExtraPorts::default();
    }
    let ranks = spec.options.data_parallel.unwrap_or(1);
    let ranks = u16::try_from(ranks).unwrap_or(u16::MAX);
    ExtraPorts { kv_events: if spec.options.kv_events == Some(true) { ranks } else { 0 }, rpc: ranks > 1 }
}

/// The command for `assignment` at `place`, run by one of `programs`, and what the operator should know of it, such as an
/// option that was left out.
///
/// # Errors
/// What is wrong with the assignment and what is accepted.
pub(crate) fn launch(
    programs: &BTreeMap<String, EngineProgram>,
    assignment: &Assignment,
    place: Place<'_>,
) -> Result<(Launch, Vec<String>), SpecError> {
    let spec = &assignment.spec;
    let program = programs.get(&spec.engine).ok_or_else(|| unknown_engine(programs, &spec.engine))?;
    check_value("model_path", &spec.model_path)?;
    check_value("served_model_name", &spec.served_model_name)?;
    spec.env.keys().try_for_each(|name| check_variable(name))?;
    let (argv, notes) = match program.is_exec() {
        true => (exec::arguments(program, assignment, &place)?, Vec::new()),
        false => vllm::arguments(program, assignment, &place)?,
    };

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
            env.insert(CUDA_ORDER.0.into(), CUDA_ORDER.1.into());
            vec![SIMULATED_GPUS_VARIABLE]
        }
        GpuKind::Simulated => {
            env.insert(SIMULATED_GPUS_VARIABLE.into(), uuids);
            vec![CUDA_VARIABLE]
        }
        GpuKind::None => vec![SIMULATED_GPUS_VARIABLE],
    };
    if argv.iter().chain(env.values()).any(|text| text.contains('\0')) {
        return Err(SpecError::new("an argument or variable holds a NUL character, which none can"));
    }
    Ok((Launch { argv, env, env_removed }, notes))
}

fn unknown_engine(programs: &BTreeMap<String, EngineProgram>, name: &str) -> SpecError {
    let known = programs.keys().cloned().collect::<Vec<_>>().join(", ");
    SpecError::new(format!(
        "engine {name:?} is not known on this node; known are: {known} (agent settings [engines.NAME])"
    ))
}

pub(super) fn check_value(field: &str, value: &str) -> Result<(), SpecError> {
    if value.is_empty() {
        return Err(SpecError::new(format!("{field} is empty")));
    }
    if value.starts_with('-') {
        return Err(SpecError::new(format!(
            "{field} is {value:?}; it must not begin with '-', which would make it an option"
        )));
    }
    Ok(())
}

fn check_variable(name: &str) -> Result<(), SpecError> {
    if name.is_empty() || name.contains(['=', '\0']) {
        return Err(SpecError::new(format!(
            "the environment variable name {name:?} must not be empty or contain '='"
        )));
    }
    Ok(())
}

#[cfg(test)]
#[path = "command_tests.rs"]
mod tests;
