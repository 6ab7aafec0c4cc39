//! The parts of a deployment's body that say how its engines are started: typed options, further arguments, environment,
//! adapters. What is refused of arguments and variables is [`refused`]'s, which agents check again.

use std::collections::BTreeMap;

use penstock_proto::engine::{
    EngineOptions, Share, gpus_needed,
    refused::{self, Dialect},
    repeated,
};
use serde_json::{Map, Value};

use super::{
    FieldError, MAX_ADAPTERS, kind, model_name, object, policy::ResourcesAsked, string, text, whole_in,
};
use crate::model::desired::{EngineSpec, LoraAdapter};

const MAX_ARGS: usize = 256;
/// Most GPUs of one replica: more than any one host has.
pub(super) const MAX_GPUS: u64 = 64;
/// The types that vLLM knows.
const DTYPES: [&str; 6] = ["auto", "half", "float16", "bfloat16", "float", "float32"];
/// An hour, in seconds.
const MAX_SHUTDOWN_S: u64 = 3_600;
const MAX_COUNT: u64 = 10_000_000;
const MAX_LENGTH: u64 = 1 << 40;
/// What every reader of JSON takes for the same number.
const MAX_SEED: i64 = (1 << 53) - 1;

type Fields = Map<String, Value>;

/// How the engines of `model` are started.
pub(super) fn spec(model: &str, fields: &Fields, asked: ResourcesAsked) -> Result<EngineSpec, FieldError> {
    let gpus = whole_in(fields, "gpus_per_replica", 1, MAX_GPUS)?;
    if let Some((flat, nested)) = gpus.zip(asked.gpus).filter(|(flat, nested)| flat != nested) {
        let message = format!("gpus_per_replica says {flat} and resources says {nested}: leave one out");
        return Err(FieldError::new("resources.gpus", message));
    }
    let mut options = options(fields)?;
    if let Some(size) = asked.tensor_parallel {
        if let Some(other) = options.tensor_parallel.filter(|other| *other != size) {
            let message = format!("tensor_parallel says {other} and resources says {size}: leave one out");
            return Err(FieldError::new("resources.tensor_parallel", message));
        }
        options.tensor_parallel = Some(size);
    }
    let mut spec = EngineSpec {
        engine: engine(fields)?,
        model_path: text(fields, "model_path")?.unwrap_or(model).to_owned(),
        args: args(fields)?,
        env: env(fields)?,
        gpus_per_replica: 1,
        resources: asked.resources,
        lora: lora(model, fields)?,
        options,
        warm: super::warm::warm(fields)?,
    };
    let said = gpus.map(|n| ("gpus_per_replica", n)).or(asked.gpus.map(|n| ("resources.gpus", n)));
    spec.gpus_per_replica = gpus_of(&spec, said)?;
    if spec.model_path.is_empty() || spec.model_path.starts_with('-') {
        let wanted = "must be a model folder or id that does not start with '-'";
        let message = format!("model_path {wanted}; it is {:?}", spec.model_path);
        return Err(FieldError::new("model_path", message));
    }
    check_company(&spec)?;
    Ok(spec)
}

fn engine(fields: &Fields) -> Result<String, FieldError> {
    let engine = text(fields, "engine")?.unwrap_or("vllm");
    let known = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
    if engine.is_empty() || engine.len() > 64 || !engine.chars().all(known) {
        let wanted = "must name an entry of the agents' [engines] settings, such as \"vllm\" or \"sim\"";
        return Err(FieldError::new("engine", format!("engine {wanted}; it is {engine:?}")));
    }
    Ok(engine.to_owned())
}

/// The GPUs of each replica: as asked, and no other number than its parallel sizes need.
fn gpus_of(spec: &EngineSpec, said: Option<(&str, u32)>) -> Result<u32, FieldError> {
    let Some((needed, how)) = gpus_needed(&spec.options, &spec.args) else {
        return Ok(said.map_or(1, |(_, count)| count));
    };
    let count = u32::try_from(needed).ok().filter(|count| u64::from(*count) <= MAX_GPUS);
    match (count, said) {
        (None, _) => {
            let message = format!("{how} needs {needed} GPUs of one node; at most {MAX_GPUS} are accepted");
            Err(FieldError::new("tensor_parallel", message))
        }
        (Some(count), Some((field, said))) if said != count => {
            let message =
                format!("{field} is {said}, and {how} needs {count}: make them equal, or leave {field} out");
            Err(FieldError::new(field, message))
        }
        (Some(count), _) => Ok(count),
    }
}

/// What fields, adapters and arguments need of each other.
fn check_company(spec: &EngineSpec) -> Result<(), FieldError> {
    let gives = |option: &str| {
        spec.args.iter().any(|arg| arg.split('=').next().is_some_and(|name| name.replace('_', "-") == option))
    };
    if !spec.lora.is_empty() && gives("--lora-modules") {
        let message = "lora and the argument --lora-modules exclude each other: name all adapters in lora";
        return Err(FieldError::new("lora", message));
    }
    let options = &spec.options;
    let lora_sizes = [("max_lora_rank", options.max_lora_rank), ("max_loras", options.max_loras)];
    if let Some((field, _)) = lora_sizes.iter().find(|(_, size)| size.is_some())
        && spec.lora.is_empty()
        && !gives("--enable-lora")
    {
        let message = format!(
            "{field} says how adapters are run, and there are none: name them in lora, or leave it out"
        );
        return Err(FieldError::new(field, message));
    }
    if let Some((n, field)) = repeated(options, &spec.args) {
        let message =
            format!("args[{n}] says again what the field {} says: leave the argument out", field.name);
        return Err(FieldError::new("args", message));
    }
    let dialect = Dialect::of_name(&spec.engine);
    refused::check_args(&spec.args, dialect)
        .map_err(|(n, sentence)| FieldError::new("args", format!("args[{n}] {sentence}")))?;
    for name in spec.env.keys() {
        refused::check_variable(name, dialect)
            .map_err(|sentence| FieldError::new(&format!("env.{name}"), sentence))?;
    }
    Ok(())
}

fn options(fields: &Fields) -> Result<EngineOptions, FieldError> {
    let number = |name, low, high| whole_in(fields, name, low, high);
    let flag = |name| super::policy::flag(fields, name);
    Ok(EngineOptions {
        tensor_parallel: number("tensor_parallel", 1, MAX_GPUS)?,
        pipeline_parallel: number("pipeline_parallel", 1, MAX_GPUS)?,
        data_parallel: number("data_parallel", 1, MAX_GPUS)?,
        dtype: dtype(fields)?,
        max_model_len: length(fields)?,
        gpu_memory_utilization: share(fields)?,
        quantization: word(fields, "quantization")?,
        max_num_seqs: number("max_num_seqs", 1, MAX_COUNT)?,
        max_num_queued_reqs: number("max_num_queued_reqs", 1, MAX_COUNT)?,
        enable_prefix_caching: flag("enable_prefix_caching")?,
        max_lora_rank: number("max_lora_rank", 1, 1_024)?,
        max_loras: number("max_loras", 1, 1_024)?,
        kv_events: flag("kv_events")?,
        shutdown_timeout_s: number("shutdown_timeout_s", 0, MAX_SHUTDOWN_S)?,
        tokenizer: tokenizer(fields)?,
        trust_remote_code: flag("trust_remote_code")?,
        seed: seed(fields)?,
        load_format: word(fields, "load_format")?,
        reasoning_parser: word(fields, "reasoning_parser")?,
        tool_call_parser: word(fields, "tool_call_parser")?,
    })
}

fn dtype(fields: &Fields) -> Result<Option<String>, FieldError> {
    let Some(named) = text(fields, "dtype")? else { return Ok(None) };
    if !DTYPES.contains(&named) {
        let shown: String = named.chars().take(64).collect();
        let message = format!("dtype must be one of {}; it is {shown:?}", DTYPES.join(", "));
        return Err(FieldError::new("dtype", message));
    }
    Ok(Some(named.to_owned()))
}

fn length(fields: &Fields) -> Result<Option<u64>, FieldError> {
    let Some(value) = fields.get("max_model_len") else { return Ok(None) };
    let length = value.as_u64().filter(|length| (1..=MAX_LENGTH).contains(length));
    length.map(Some).ok_or_else(|| {
        let found = if value.is_number() { value.to_string() } else { kind(value).to_owned() };
        let message =
            format!("max_model_len must be a whole number of tokens from 1 to {MAX_LENGTH}, not {found}");
        FieldError::new("max_model_len", message)
    })
}

fn share(fields: &Fields) -> Result<Option<Share>, FieldError> {
    let name = "gpu_memory_utilization";
    let Some(value) = fields.get(name) else { return Ok(None) };
    let wrong = |why: String| FieldError::new(name, format!("{name}: {why}"));
    let number = value
        .as_f64()
        .ok_or_else(|| wrong(format!("it must be a number above 0 and up to 1, not {}", kind(value))))?;
    Share::try_from(number).map(Some).map_err(wrong)
}

fn seed(fields: &Fields) -> Result<Option<i64>, FieldError> {
    let Some(value) = fields.get("seed") else { return Ok(None) };
    let seed = value.as_i64().filter(|seed| (-MAX_SEED..=MAX_SEED).contains(seed));
    seed.map(Some).ok_or_else(|| {
        let found = if value.is_number() { value.to_string() } else { kind(value).to_owned() };
        FieldError::new(
            "seed",
            format!("seed must be a whole number from -{MAX_SEED} to {MAX_SEED}, not {found}"),
        )
    })
}

fn tokenizer(fields: &Fields) -> Result<Option<String>, FieldError> {
    let Some(path) = text(fields, "tokenizer")? else { return Ok(None) };
    if path.is_empty() || path.starts_with('-') {
        let wanted = "tokenizer must be a tokenizer's folder or id that does not start with '-'";
        return Err(FieldError::new("tokenizer", format!("{wanted}; it is {path:?}")));
    }
    Ok(Some(path.to_owned()))
}

/// A name out of a list that grows with vLLM's releases.
fn word(fields: &Fields, field: &str) -> Result<Option<String>, FieldError> {
    let Some(word) = text(fields, field)? else { return Ok(None) };
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if word.is_empty() || word.len() > 64 || !word.chars().all(allowed) || word.starts_with('-') {
        let shown: String = word.chars().take(64).collect();
        let wanted = "must have 1 to 64 characters out of A-Z a-z 0-9 . _ - and not start with '-'";
        return Err(FieldError::new(field, format!("{field} {wanted}; it is {shown:?}")));
    }
    Ok(Some(word.to_owned()))
}

fn args(fields: &Fields) -> Result<Vec<String>, FieldError> {
    let Some(value) = fields.get("args") else { return Ok(Vec::new()) };
    let Some(items) = value.as_array().filter(|items| items.len() <= MAX_ARGS) else {
        let wanted = format!("args must be an array of at most {MAX_ARGS} strings, not {}", kind(value));
        return Err(FieldError::new("args", wanted));
    };
    let numbered = items.iter().enumerate();
    numbered.map(|(n, item)| string(&format!("args[{n}]"), item).map(str::to_owned)).collect()
}

fn lora(base: &str, fields: &Fields) -> Result<Vec<LoraAdapter>, FieldError> {
    let Some(value) = fields.get("lora") else { return Ok(Vec::new()) };
    let Some(items) = value.as_array().filter(|items| items.len() <= MAX_ADAPTERS) else {
        let wanted =
            format!("lora must be an array of at most {MAX_ADAPTERS} objects {{\"name\", \"path\"}}");
        return Err(FieldError::new("lora", wanted));
    };
    let mut out: Vec<LoraAdapter> = Vec::with_capacity(items.len());
    for (n, item) in items.iter().enumerate() {
        let at = format!("lora[{n}]");
        let adapter = adapter(item).map_err(|error| error.inside(&at))?;
        if adapter.name == base || out.iter().any(|before| before.name == adapter.name) {
            let message =
                format!("{at}.name is {:?}, which is taken by the model or by another", adapter.name);
            return Err(FieldError::new(&format!("{at}.name"), message));
        }
        out.push(adapter);
    }
    Ok(out)
}

fn adapter(item: &Value) -> Result<LoraAdapter, FieldError> {
    let fields = object(item, &["name", "path"])?;
    let given = |field: &str| {
        text(fields, field)?.ok_or_else(|| FieldError::new(field, format!("{field} is missing")))
    };
    let (name, path) = (given("name")?, given("path")?);
    model_name(name).map_err(|error| FieldError::new("name", error.message))?;
    if path.is_empty() || path.starts_with('-') {
        let wanted = "path must be an adapter's folder or id that does not start with '-'";
        return Err(FieldError::new("path", format!("{wanted}; it is {path:?}")));
    }
    Ok(LoraAdapter { name: name.to_owned(), path: path.to_owned() })
}

fn env(fields: &Fields) -> Result<BTreeMap<String, String>, FieldError> {
    let Some(value) = fields.get("env") else { return Ok(BTreeMap::new()) };
    let Some(pairs) = value.as_object().filter(|pairs| pairs.len() <= MAX_ARGS) else {
        let wanted = format!("env must be an object of at most {MAX_ARGS} strings, not {}", kind(value));
        return Err(FieldError::new("env", wanted));
    };
    let mut out = BTreeMap::new();
    for (name, value) in pairs {
        let field = format!("env.{}", name.chars().take(64).collect::<String>());
        let letters = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if name.is_empty() || name.len() > 256 || !letters || name.starts_with(|c: char| c.is_ascii_digit()) {
            let wanted = "a variable's name has letters, digits and '_' and does not start with a digit";
            return Err(FieldError::new(&field, wanted));
        }
        out.insert(name.clone(), string(&field, value)?.to_owned());
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::deployment_body, *};

    fn accepted(body: Value) -> EngineSpec {
        deployment_body("m", &body, 10).unwrap_or_else(|error| panic!("{body}: {}", error.message)).spec
    }

    #[test]
    fn every_typed_field_is_read_and_what_is_stored_is_what_was_said() {
        let body = json!({
            "tensor_parallel": 2, "pipeline_parallel": 2, "data_parallel": 1, "dtype": "bfloat16", "max_model_len": 8192,
            "gpu_memory_utilization": 0.85, "quantization": "fp8", "max_num_seqs": 64, "max_num_queued_reqs": 128,
            "enable_prefix_caching": false, "max_lora_rank": 64, "max_loras": 2, "kv_events": true,
            "shutdown_timeout_s": 0, "tokenizer": "org/t", "trust_remote_code": false, "seed": -1,
            "load_format": "dummy", "reasoning_parser": "qwen3", "tool_call_parser": "hermes",
            "lora": [{"name": "sql", "path": "/l"}],
        });
        let spec = accepted(body.clone());
        assert_eq!(spec.gpus_per_replica, 4, "tensor times pipeline");
        assert_eq!(spec.options.given().len(), penstock_proto::engine::FIELDS.len());
        let stored = serde_json::to_value(&spec).expect("JSON");
        for (field, value) in body.as_object().expect("object") {
            assert_eq!(&stored[field], value, "{field}");
        }
        assert_eq!(serde_json::from_value::<EngineSpec>(stored).expect("the same"), spec);
    }

    #[test]
    fn gpus_follow_parallel_sizes_wherever_they_are_said() {
        for (body, gpus) in [
            (json!({}), 1),
            (json!({"gpus_per_replica": 4}), 4),
            (json!({"tensor_parallel": 4}), 4),
            (json!({"tensor_parallel": 4, "gpus_per_replica": 4}), 4),
            (json!({"resources": {"tensor_parallel": 2}, "tensor_parallel": 2}), 2),
            (json!({"tensor_parallel": 2, "args": ["-pp", "3"]}), 6),
            (json!({"gpus_per_replica": 1, "args": ["-tp", "2"]}), 1),
        ] {
            assert_eq!(accepted(body.clone()).gpus_per_replica, gpus, "{body}");
        }
    }

    #[test]
    fn every_refusal_names_its_field_and_what_is_accepted() {
        for (body, field, part) in [
            (json!({"tensor_parallel": 0}), "tensor_parallel", "from 1 to 64"),
            (
                json!({"tensor_parallel": 2, "gpus_per_replica": 1}),
                "gpus_per_replica",
                "gpus_per_replica is 1, and tensor_parallel 2 needs 2: make them equal, or leave gpus_per_replica out",
            ),
            (
                json!({"tensor_parallel": 2, "pipeline_parallel": 2, "resources": {"gpus": 2}}),
                "resources.gpus",
                "tensor_parallel 2 x pipeline_parallel 2 needs 4",
            ),
            (json!({"tensor_parallel": 64, "pipeline_parallel": 64}), "tensor_parallel", "at most 64"),
            (
                json!({"tensor_parallel": 2, "resources": {"tensor_parallel": 4}}),
                "resources.tensor_parallel",
                "leave one out",
            ),
            (json!({"dtype": "fp8"}), "dtype", "one of auto, half"),
            (json!({"max_model_len": "32k"}), "max_model_len", "not a string"),
            (json!({"gpu_memory_utilization": 0}), "gpu_memory_utilization", "above 0 and up to 1"),
            (json!({"gpu_memory_utilization": 1.1}), "gpu_memory_utilization", "not 1.1"),
            (json!({"gpu_memory_utilization": "90%"}), "gpu_memory_utilization", "not a string"),
            (json!({"quantization": "a b"}), "quantization", "1 to 64 characters"),
            (json!({"max_num_seqs": -1}), "max_num_seqs", "not -1"),
            (json!({"enable_prefix_caching": "yes"}), "enable_prefix_caching", "true or false"),
            (json!({"max_loras": 2}), "max_loras", "name them in lora"),
            (json!({"shutdown_timeout_s": 3601}), "shutdown_timeout_s", "from 0 to 3600"),
            (json!({"tokenizer": "--x"}), "tokenizer", "start with '-'"),
            (json!({"seed": 0.5}), "seed", "not 0.5"),
            (json!({"max_model_length": 1}), "max_model_length", "did you mean \"max_model_len\"?"),
            (
                json!({"max_model_len": 10, "args": ["--x", "--max_model_len=20"]}),
                "args",
                "args[1] says again what the field max_model_len says",
            ),
            (json!({"args": ["--config", "x"]}), "args", "a file could say everything"),
            (json!({"env": {"VLLM_PORT": "1"}}), "env.VLLM_PORT", "fixed"),
        ] {
            let error = deployment_body("m", &body, 10).expect_err(&body.to_string());
            assert_eq!(error.field, field, "{body}: {}", error.message);
            assert!(error.message.contains(part), "{body}: {}", error.message);
        }
        accepted(json!({"engine": "llama", "args": ["--config", "x"]}));
    }
}
