//! vLLM's command line for an assignment. Pure.
//!
//! Order: what the agent decides, adapters, the program's arguments, typed fields, the deployment's arguments. Of two that
//! say the same argparse takes the later one: a deployment wins over the node's settings.

use penstock_config::agent::EngineProgram;
use penstock_proto::engine::{
    EngineOptions, Form, field, gpus_needed,
    refused::{self, Dialect},
    repeated,
};
use serde_json::json;

use super::{
    command::{Place, SpecError, check_value},
    versions,
};
use crate::{
    assignment::{Assignment, EngineSpec},
    warm::sleep,
};

const SHUTDOWN: &str = "--shutdown-timeout";

/// Program and arguments, and what the operator should know of them.
///
/// # Errors
/// What is wrong with the assignment and what is accepted.
pub(super) fn arguments(
    program: &EngineProgram,
    assignment: &Assignment,
    place: &Place<'_>,
) -> Result<(Vec<String>, Vec<String>), SpecError> {
    let spec = &assignment.spec;
    check(program, assignment, place)?;
    let (options, own_time) = with_shutdown_time(program, spec, place);
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
    let mut typed = lora_arguments(&spec.lora);
    typed.extend(sleep::arguments(spec));
    typed.extend(program.args.iter().cloned());
    typed.extend(option_arguments(&options, place)?);
    let (mut arguments, mut notes) = (Vec::new(), Vec::new());
    let all = typed.into_iter().chain(spec.args.iter().cloned()).collect();
    match place.version {
        Some(version) => {
            let niceties: &[&str] = if own_time { &[SHUTDOWN] } else { &[] };
            let fitted = versions::fit(all, version, niceties).map_err(SpecError::of_version)?;
            (arguments, notes) = (fitted.arguments, fitted.notes);
        }
        None => arguments.extend(all),
    }
    let argv = program.command.iter().cloned().chain(ours.map(str::to_owned)).chain(arguments).collect();
    Ok((argv, notes))
}

fn check(program: &EngineProgram, assignment: &Assignment, place: &Place<'_>) -> Result<(), SpecError> {
    let spec = &assignment.spec;
    let refuse = |whose: &'static str| {
        move |(_, sentence): (usize, String)| SpecError::new(format!("{whose} {sentence}"))
    };
    refused::check_args(&program.args, Dialect::Vllm).map_err(refuse("the agent's setting args:"))?;
    refused::check_args(&spec.args, Dialect::Vllm).map_err(refuse("the argument"))?;
    for name in spec.env.keys() {
        refused::check_variable(name, Dialect::Vllm).map_err(SpecError::new)?;
    }
    if let Some((n, field)) = repeated(&spec.options, &spec.args) {
        let arg = spec.args.get(n).and_then(|arg| arg.split('=').next()).unwrap_or_default();
        return Err(SpecError::new(format!(
            "the argument {arg:?} says again what the field {} says: leave the argument out",
            field.name
        )));
    }
    for (name, path) in &spec.lora {
        check_value("an adapter's name", name)?;
        check_value("an adapter's path", path)?;
    }
    let texts = [
        ("dtype", &spec.options.dtype),
        ("quantization", &spec.options.quantization),
        ("tokenizer", &spec.options.tokenizer),
        ("load_format", &spec.options.load_format),
        ("reasoning_parser", &spec.options.reasoning_parser),
        ("tool_call_parser", &spec.options.tool_call_parser),
    ];
    for (name, value) in texts {
        value.as_ref().map_or(Ok(()), |value| check_value(name, value))?;
    }
    let assigned = assignment.gpu_uuids.len();
    if let Some((needed, how)) = gpus_needed(&spec.options, &spec.args)
        && assigned > 0
        && u64::try_from(assigned) != Ok(needed)
    {
        return Err(SpecError::new(format!(
            "{how} needs {needed} GPUs, and {assigned} are assigned: make gpus_per_replica {needed}"
        )));
    }
    match spec.options.shutdown_timeout_s {
        Some(time) if time > place.longest_shutdown_s => Err(SpecError::new(format!(
            "shutdown_timeout_s is {time}; at most {} fits before this node's agent kills the engine (its setting \
             engines.term_ms, less a second)",
            place.longest_shutdown_s
        ))),
        _ => Ok(()),
    }
}

/// The options with the program's time for a shutdown, where nobody else says one; and whether it is that.
fn with_shutdown_time(
    program: &EngineProgram,
    spec: &EngineSpec,
    place: &Place<'_>,
) -> (EngineOptions, bool) {
    let mut options = spec.options.clone();
    let asked = EngineOptions { shutdown_timeout_s: Some(0), ..EngineOptions::default() };
    let said = |args: &[String]| repeated(&asked, args).is_some();
    let own = program.shutdown_timeout_s.min(place.longest_shutdown_s);
    let ours = options.shutdown_timeout_s.is_none() && own > 0 && !said(&program.args) && !said(&spec.args);
    if ours {
        options.shutdown_timeout_s = Some(own);
    }
    (options, ours)
}

fn option_arguments(options: &EngineOptions, place: &Place<'_>) -> Result<Vec<String>, SpecError> {
    let mut out = Vec::new();
    let missing = |what: &str| SpecError::new(format!("no port was taken for {what}"));
    for (name, value) in options.given() {
        let Some(field) = field(name) else { continue };
        let on = value == "true";
        match (field.form, name) {
            // A value that begins with '-' would be an option.
            (Form::Value, _) if value.starts_with('-') => out.push(format!("{}={value}", field.option)),
            (Form::Value, _) => out.extend([field.option.to_owned(), value]),
            (Form::Switch, _) if !on => out.push(field.option.replacen("--", "--no-", 1)),
            (Form::Switch | Form::On, _) if on => out.push(field.option.to_owned()),
            (Form::Special, "kv_events") if on => {
                let port = place.kv_events_port.ok_or_else(|| missing("KV events"))?;
                out.extend([field.option.to_owned(), kv_events_config(port)]);
            }
            (Form::Special, "tool_call_parser") => {
                out.extend(["--enable-auto-tool-choice".to_owned(), field.option.to_owned(), value]);
            }
            (Form::Switch | Form::On | Form::Special, _) => {}
        }
    }
    if options.data_parallel.is_some_and(|ranks| ranks > 1) {
        let port = place.rpc_port.ok_or_else(|| missing("data parallelism"))?;
        out.extend(["--data-parallel-rpc-port".to_owned(), port.to_string()]);
    }
    Ok(out)
}

/// `*`, since vLLM binds that and connects to anything that names a host; rank N publishes on the N-th port after it.
fn kv_events_config(port: u16) -> String {
    let config = json!({
        "enable_kv_cache_events": true,
        "publisher": "zmq",
        "endpoint": format!("tcp://*:{port}"),
        "topic": "kv-events",
    });
    config.to_string()
}

/// vLLM takes all adapters behind one option.
fn lora_arguments(lora: &[(String, String)]) -> Vec<String> {
    if lora.is_empty() {
        return Vec::new();
    }
    let modules = lora.iter().map(|(name, path)| format!("{name}={path}"));
    ["--enable-lora".to_owned(), "--lora-modules".to_owned()].into_iter().chain(modules).collect()
}
