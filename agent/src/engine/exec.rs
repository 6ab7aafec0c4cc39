//! The command line of any other server with OpenAI's API: a template of the node's settings. Pure.
//!
//! `command` holds placeholders for what the agent decides; `options` says, field by field, how a typed field of a deployment
//! is told to this server. What a template does not say cannot be asked of it: such a deployment is refused with a sentence,
//! where running it without the field would look as if it had worked.

use penstock_config::agent::EngineProgram;
use penstock_proto::engine::{
    FIELDS, field,
    refused::{self, Dialect},
};

use super::command::{Place, SpecError};
use crate::assignment::{Assignment, EngineSpec};

/// What `command` may hold.
const PLACEHOLDERS: [&str; 7] =
    ["model_path", "served_model_name", "host", "port", "gpus", "gpu_count", "tensor_parallel"];

/// Whether the template of `[engines.NAME]` can be filled in at all.
///
/// # Errors
/// A sentence that names the key and what is accepted.
pub(crate) fn check(name: &str, program: &EngineProgram) -> Result<(), String> {
    if !program.is_exec() {
        return Ok(());
    }
    let known = |placeholder: &str| PLACEHOLDERS.contains(&placeholder).then(String::new);
    for part in program.command.iter().chain(&program.args) {
        expand(part, known).map_err(|why| {
            let accepted = PLACEHOLDERS.map(|name| format!("{{{name}}}")).join(" ");
            format!("engines.{name}.command has {part:?}: {why}; accepted are {accepted}, and {{{{ }}}} for braces")
        })?;
    }
    if !mentions(program, "port") {
        return Err(format!(
            "engines.{name}.command does not have {{port}}: the agent gives each engine a port, and could not tell it"
        ));
    }
    for (option, args) in &program.options {
        if field(option).is_none_or(|field| field.name == "kv_events") {
            let fields = FIELDS.iter().map(|field| field.name).filter(|name| *name != "kv_events");
            let fields = fields.collect::<Vec<_>>().join(", ");
            return Err(format!("engines.{name}.options has {option:?}; accepted are {fields}"));
        }
        for part in args {
            expand(part, |placeholder| (placeholder == "value").then(String::new)).map_err(|why| {
                format!("engines.{name}.options.{option} has {part:?}: {why}; accepted is {{value}}")
            })?;
        }
    }
    Ok(())
}

/// Program and arguments.
///
/// # Errors
/// What is wrong with the assignment and what is accepted.
pub(super) fn arguments(
    program: &EngineProgram,
    assignment: &Assignment,
    place: &Place<'_>,
) -> Result<Vec<String>, SpecError> {
    let spec = &assignment.spec;
    refused::check_args(&spec.args, Dialect::Other)
        .map_err(|(_, sentence)| SpecError::new(format!("the argument {sentence}")))?;
    for name in spec.env.keys() {
        refused::check_variable(name, Dialect::Other).map_err(SpecError::new)?;
    }
    if !spec.lora.is_empty() {
        return Err(SpecError::new(format!(
            "engine {:?} is a template, which cannot be told of adapters: leave lora out",
            spec.engine
        )));
    }
    if spec.warm.sleep_level > 0 {
        return Err(SpecError::new(format!(
            "engine {:?} is a template, and only vLLM can be sent to sleep: leave warm.sleep out",
            spec.engine
        )));
    }
    let parallel =
        spec.options.tensor_parallel.map_or(assignment.gpu_uuids.len().max(1).to_string(), |n| n.to_string());
    let value = |placeholder: &str| {
        Some(match placeholder {
            "model_path" => spec.model_path.clone(),
            "served_model_name" => spec.served_model_name.clone(),
            "host" => place.host.to_owned(),
            "port" => place.port.to_string(),
            "gpus" => assignment.gpu_uuids.join(","),
            "gpu_count" => assignment.gpu_uuids.len().to_string(),
            "tensor_parallel" => parallel.clone(),
            _ => return None,
        })
    };
    let filled = program.command.iter().chain(&program.args).map(|part| expand(part, value));
    let mut argv: Vec<String> = filled.collect::<Result<_, _>>().map_err(SpecError::new)?;
    argv.extend(field_arguments(program, spec)?);
    argv.extend(spec.args.iter().cloned());
    Ok(argv)
}

fn field_arguments(program: &EngineProgram, spec: &EngineSpec) -> Result<Vec<String>, SpecError> {
    let mut out = Vec::new();
    for (name, value) in spec.options.given() {
        let Some(args) = program.options.get(name) else {
            // Its own placeholder has said it already; "off" is how a server that knows nothing of it is anyway.
            if (name == "tensor_parallel" && mentions(program, name))
                || (name == "kv_events" && value == "false")
            {
                continue;
            }
            return Err(SpecError::new(format!(
                "{name} cannot be told to engine {:?}: its template has no {name} (agent setting engines.{}.options)",
                spec.engine, spec.engine
            )));
        };
        let has_value = args.iter().any(|arg| arg.contains("{value}"));
        if value == "false" && !has_value {
            continue;
        }
        for arg in args {
            let told = expand(arg, |placeholder| (placeholder == "value").then(|| value.clone()));
            out.push(told.map_err(SpecError::new)?);
        }
    }
    Ok(out)
}

fn mentions(program: &EngineProgram, placeholder: &str) -> bool {
    let placeholder = format!("{{{placeholder}}}");
    program.command.iter().chain(&program.args).any(|part| part.contains(&placeholder))
}

/// `text` with its placeholders filled in.
fn expand(text: &str, value: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        let (before, from) = rest.split_at(at);
        out.push_str(before);
        rest = if let Some(rest) = from.strip_prefix("{{") {
            out.push('{');
            rest
        } else if let Some(rest) = from.strip_prefix("}}") {
            out.push('}');
            rest
        } else if let Some((name, rest)) = from.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            out.push_str(&value(name).ok_or_else(|| format!("{{{name}}} is no placeholder"))?);
            rest
        } else {
            return Err("it has a brace without its other one".into());
        };
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{assignment::EngineSpec, gpu::GpuKind};

    fn llama() -> EngineProgram {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        EngineProgram {
            kind: "exec".into(),
            command: words(
                "llama-server -m {model_path} --alias {served_model_name} --host {host} --port {port}",
            ),
            args: words("--split-mode row --log-format {{\"json\":true}}"),
            options: [
                ("max_model_len".into(), words("--ctx-size {value}")),
                ("enable_prefix_caching".into(), words("--cache-reuse 256")),
            ]
            .into(),
            ..EngineProgram::default()
        }
    }

    fn assignment() -> Assignment {
        Assignment {
            model: "org/llama".into(),
            replica_id: "org-llama-0".into(),
            generation: 7,
            spec: EngineSpec {
                engine: "llama".into(),
                model_path: "/m/llama.gguf".into(),
                served_model_name: "org/llama".into(),
                ..EngineSpec::default()
            },
            gpu_uuids: vec!["GPU-a".into(), "GPU-b".into()],
            asleep: false,
        }
    }

    fn line(program: &EngineProgram, change: impl FnOnce(&mut EngineSpec)) -> Result<String, String> {
        let mut assignment = assignment();
        change(&mut assignment.spec);
        let place = Place {
            host: "127.0.0.1",
            port: 10_815,
            kv_events_port: None,
            rpc_port: None,
            gpus: GpuKind::None,
            state_dir: "/state",
            longest_shutdown_s: 19,
            version: None,
        };
        arguments(program, &assignment, &place).map(|argv| argv.join(" ")).map_err(|e| e.to_string())
    }

    #[test]
    fn a_template_is_filled_in() {
        check("llama", &llama()).expect("valid");
        let begin = "llama-server -m /m/llama.gguf --alias org/llama --host 127.0.0.1 --port 10815 --split-mode row \
                     --log-format {\"json\":true}";
        assert_eq!(line(&llama(), |_| {}).expect("valid"), begin);
        let more = line(&llama(), |spec| {
            spec.options.max_model_len = Some(4_096);
            spec.options.enable_prefix_caching = Some(true);
            spec.args = vec!["--mlock".into()];
        });
        assert_eq!(more.expect("valid"), format!("{begin} --ctx-size 4096 --cache-reuse 256 --mlock"));
        let off = line(&llama(), |spec| spec.options.enable_prefix_caching = Some(false));
        assert_eq!(off.expect("valid"), begin);
    }

    #[test]
    fn gpus_and_the_parallel_size_have_placeholders() {
        let mut program = llama();
        program.command =
            ["s", "{gpus}", "{gpu_count}", "tp={tensor_parallel}", "{port}"].map(String::from).into();
        program.args.clear();
        assert_eq!(line(&program, |_| {}).expect("valid"), "s GPU-a,GPU-b 2 tp=2 10815");
        let said = line(&program, |spec| spec.options.tensor_parallel = Some(1));
        assert_eq!(said.expect("valid"), "s GPU-a,GPU-b 2 tp=1 10815");
    }

    #[test]
    fn what_a_template_does_not_say_is_refused_with_the_field() {
        let told = line(&llama(), |spec| spec.options.dtype = Some("half".into())).expect_err("no dtype");
        assert!(
            told.contains("dtype cannot be told to engine \"llama\"")
                && told.contains("engines.llama.options"),
            "{told}"
        );
        let told = line(&llama(), |spec| spec.options.tensor_parallel = Some(2)).expect_err("no size");
        assert!(told.contains("tensor_parallel"), "{told}");
        let told =
            line(&llama(), |spec| spec.lora = vec![("a".into(), "p".into())]).expect_err("no adapters");
        assert!(told.contains("leave lora out"), "{told}");
        let told = line(&llama(), |spec| spec.args = vec!["--port=1".into()]).expect_err("ours");
        assert!(told.contains("the agent gives each engine a port"), "{told}");
        let told = line(&llama(), |spec| spec.warm.sleep_level = 1).expect_err("no sleep");
        assert!(told.contains("leave warm.sleep out"), "{told}");
        line(&llama(), |spec| spec.options.kv_events = Some(false)).expect("off is off");
        line(&llama(), |spec| spec.options.kv_events = Some(true)).expect_err("nobody would publish");
    }

    #[test]
    fn a_template_that_cannot_be_filled_in_is_found_when_the_agent_starts() {
        let refused = |change: fn(&mut EngineProgram)| {
            let mut program = llama();
            change(&mut program);
            check("llama", &program).expect_err("must be refused")
        };
        for (told, part) in [
            (
                refused(|p| p.command.push("{modelpath}".into())),
                "{modelpath} is no placeholder; accepted are {model_path}",
            ),
            (refused(|p| p.command.push("{port".into())), "a brace without its other one"),
            (refused(|p| p.command.truncate(3)), "does not have {port}"),
            (
                refused(|p| drop(p.options.insert("ctx".into(), vec![]))),
                "options has \"ctx\"; accepted are tensor_parallel",
            ),
            (refused(|p| drop(p.options.insert("kv_events".into(), vec![]))), "accepted are"),
            (
                refused(|p| drop(p.options.insert("seed".into(), vec!["{port}".into()]))),
                "accepted is {value}",
            ),
        ] {
            assert!(told.contains(part), "{told}");
        }
    }
}
