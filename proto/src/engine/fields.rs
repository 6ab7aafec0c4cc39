//! Which of vLLM's options the typed fields stand for.

use super::EngineOptions;

/// How a field becomes arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `--option value`
    Value,
    /// `--option` for true, `--no-option` for false.
    Switch,
    /// `--option` for true, nothing for false.
    On,
    /// Something that needs more than its value.
    Special,
}

/// A typed field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// Its name in a deployment.
    pub name: &'static str,
    /// vLLM's option.
    pub option: &'static str,
    /// Other names of it.
    pub aliases: &'static [&'static str],
    /// How it is said.
    pub form: Form,
}

const fn plain(name: &'static str, option: &'static str, form: Form) -> Field {
    Field { name, option, aliases: &[], form }
}

const fn short(name: &'static str, option: &'static str, aliases: &'static [&'static str]) -> Field {
    Field { name, option, aliases, form: Form::Value }
}

/// All typed fields, in the order in which an engine's command line has them.
pub const FIELDS: [Field; 20] = [
    short("tensor_parallel", "--tensor-parallel-size", &["-tp"]),
    short("pipeline_parallel", "--pipeline-parallel-size", &["-pp"]),
    short("data_parallel", "--data-parallel-size", &["-dp"]),
    plain("dtype", "--dtype", Form::Value),
    plain("max_model_len", "--max-model-len", Form::Value),
    plain("gpu_memory_utilization", "--gpu-memory-utilization", Form::Value),
    short("quantization", "--quantization", &["-q"]),
    plain("max_num_seqs", "--max-num-seqs", Form::Value),
    plain("max_num_queued_reqs", "--max-num-queued-reqs", Form::Value),
    plain("enable_prefix_caching", "--enable-prefix-caching", Form::Switch),
    plain("max_lora_rank", "--max-lora-rank", Form::Value),
    plain("max_loras", "--max-loras", Form::Value),
    plain("kv_events", "--kv-events-config", Form::Special),
    plain("shutdown_timeout_s", "--shutdown-timeout", Form::Value),
    plain("tokenizer", "--tokenizer", Form::Value),
    plain("trust_remote_code", "--trust-remote-code", Form::On),
    plain("seed", "--seed", Form::Value),
    plain("load_format", "--load-format", Form::Value),
    plain("reasoning_parser", "--reasoning-parser", Form::Value),
    plain("tool_call_parser", "--tool-call-parser", Form::Special),
];

/// The field of a name.
pub fn field(name: &str) -> Option<&'static Field> {
    FIELDS.iter().find(|field| field.name == name)
}

/// The option that an argument gives, as vLLM reads it ('_' is '-' in it), without its value; None: it is a value.
pub fn option_of(arg: &str) -> Option<String> {
    let option = arg.split('=').next().unwrap_or(arg);
    let word = option.trim_start_matches('-').chars().next()?;
    (option.starts_with('-') && !word.is_ascii_digit() && word != '.').then(|| option.replace('_', "-"))
}

/// Whether an argument gives a field's option: whole, by another of its names, negated, or by a beginning of it that is no
/// other field's option.
fn gives(arg: &str, field: &Field) -> bool {
    let Some(option) = option_of(arg) else { return false };
    let positive = option.strip_prefix("--no-").map(|rest| format!("--{rest}"));
    let option = positive.as_deref().unwrap_or(&option);
    if option == field.option {
        return true;
    }
    if field.aliases.iter().any(|alias| option.starts_with(alias)) && !option.starts_with("--") {
        // "-tp2" and "-tp=2" as well; "-pp" is no "-p".
        return true;
    }
    // argparse takes an unambiguous beginning for the whole; which are unambiguous is for vLLM to know.
    let whole = FIELDS.iter().any(|other| other.option == option);
    option.len() > 4 && option.starts_with("--") && field.option.starts_with(option) && !whole
}

/// The value that the arguments give a field's option, if they do; the last one counts.
pub(super) fn value_in<'a>(args: &'a [String], field: &Field) -> Option<&'a str> {
    let at = args.iter().rposition(|arg| gives(arg, field))?;
    let arg = args.get(at)?;
    match arg.split_once('=') {
        Some((_, value)) => Some(value),
        None => args.get(at + 1).map(String::as_str),
    }
}

/// The first argument that says again what a typed field says: its position, and the field.
pub fn repeated(options: &EngineOptions, args: &[String]) -> Option<(usize, &'static Field)> {
    let given = options.given();
    let set = FIELDS.iter().filter(|field| given.iter().any(|(name, _)| *name == field.name));
    let set: Vec<&'static Field> = set.collect();
    args.iter().enumerate().find_map(|(n, arg)| Some((n, *set.iter().find(|field| gives(arg, field))?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(options: &EngineOptions, arg: &str) -> Option<&'static str> {
        repeated(options, &["--x".into(), arg.to_owned()]).map(|(at, field)| {
            assert_eq!(at, 1);
            field.name
        })
    }

    #[test]
    fn a_repetition_is_found_in_every_spelling() {
        let options = EngineOptions {
            tensor_parallel: Some(2),
            tokenizer: Some("t".into()),
            enable_prefix_caching: Some(true),
            quantization: Some("fp8".into()),
            max_num_seqs: Some(1),
            ..Default::default()
        };
        for (arg, field) in [
            ("--tensor-parallel-size", "tensor_parallel"),
            ("--tensor_parallel_size=2", "tensor_parallel"),
            ("--tensor-par", "tensor_parallel"),
            ("-tp", "tensor_parallel"),
            ("-tp=4", "tensor_parallel"),
            ("--tokenizer=x", "tokenizer"),
            ("--no-enable-prefix-caching", "enable_prefix_caching"),
            ("-q", "quantization"),
            ("--max-num-seqs", "max_num_seqs"),
        ] {
            assert_eq!(first(&options, arg), Some(field), "{arg}");
        }
        for fine in [
            "--tokenizer-mode",
            "--max-num-queued-reqs",
            "--max-num-batched-tokens",
            "-pp",
            "-1",
            "fp8",
            "--seed=2",
        ] {
            assert_eq!(first(&options, fine), None, "{fine}");
        }
        assert_eq!(first(&EngineOptions::default(), "--seed"), None, "what no field says may be an argument");
    }

    #[test]
    fn numbers_and_values_are_no_options() {
        for value in ["-1", "-.5", "x", "", "-", "--"] {
            assert_eq!(option_of(value), None, "{value}");
        }
        assert_eq!(option_of("--a_b=c_d").as_deref(), Some("--a-b"));
        assert_eq!(option_of("-O3").as_deref(), Some("-O3"));
    }
}
