//! What is accepted from outside: request bodies, model names, node ids, addresses. Every refusal is a sentence.
//!
//! Bodies are read into a [`Value`] first and checked field by field, because serde's own errors name neither the field
//! nor what it would accept. Duplicate keys are refused: two readers of such a body could disagree about its meaning.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::{desired::EngineSpec, policy::Policy};

mod engine;
mod policy;
mod token;
mod warm;

pub use policy::{node_body, node_policy_body, prefetch_body, reason_body, rollback_body, wake_body};
pub use token::{TokenBody, token_body, token_name};

/// A field that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// The field, or "model" for the name in the path.
    pub field: String,
    /// What is wrong and what is accepted.
    pub message: String,
}

impl FieldError {
    pub(super) fn new(field: &str, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into() }
    }

    /// The same, of a field inside another.
    pub(super) fn inside(self, outer: &str) -> Self {
        let field = if self.field.is_empty() { outer.to_owned() } else { format!("{outer}.{}", self.field) };
        Self { field, message: format!("{outer}: {}", self.message) }
    }
}

/// A checked body of PUT /api/v2/deployments/{model}.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeploymentBody {
    /// Wanted engines.
    pub replicas: u32,
    /// How each is started.
    pub spec: EngineSpec,
    /// How it is placed, rolled out, protected and scaled.
    pub policy: Policy,
}

/// A checked body of PATCH /api/v2/deployments/{model}: what is None stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PatchBody {
    /// Wanted engines.
    pub replicas: Option<u32>,
    /// Whether a changed spec replaces what runs.
    pub paused: Option<bool>,
}

const FIELDS: [&str; 13] = [
    "replicas",
    "engine",
    "model_path",
    "args",
    "env",
    "gpus_per_replica",
    "lora",
    "resources",
    "placement",
    "rollout",
    "disruption",
    "autoscaling",
    "warm",
];
/// Most LoRA adapters of one deployment, and most that are taken from one engine.
pub const MAX_ADAPTERS: usize = 256;
const MAX_TEXT_BYTES: usize = 4_096;

/// Every field of the body of a PUT.
pub fn deployment_fields() -> Vec<&'static str> {
    let typed = penstock_proto::engine::FIELDS.iter().map(|field| field.name);
    FIELDS.into_iter().chain(typed).collect()
}

/// Checks the body of a PUT.
pub fn deployment_body(model: &str, body: &Value, max_replicas: u32) -> Result<DeploymentBody, FieldError> {
    let fields = object(body, &deployment_fields())?;
    let asked = policy::resources(fields, engine::MAX_GPUS)?;
    let spec = engine::spec(model, fields, asked)?;
    let replicas = whole_in(fields, "replicas", 0, u64::from(max_replicas))?.unwrap_or(1);
    Ok(DeploymentBody { replicas, spec, policy: policy::policy(fields, max_replicas)? })
}

/// Checks the body of a PATCH, which can change the number of replicas and pause a rollout.
pub fn patch_body(body: &Value, max_replicas: u32) -> Result<PatchBody, FieldError> {
    let fields = object(body, &["replicas", "paused"])?;
    let replicas = whole_in(fields, "replicas", 0, u64::from(max_replicas))?;
    let paused = policy::flag(fields, "paused")?;
    if replicas.is_none() && paused.is_none() {
        let message = "replicas is missing: give a whole number, or paused: true or false";
        return Err(FieldError::new("replicas", message));
    }
    Ok(PatchBody { replicas, paused })
}

/// Checks a model's name.
pub fn model_name(name: &str) -> Result<(), FieldError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._:/@-".contains(c);
    if name.is_empty() || name.len() > 256 || !name.chars().all(allowed) || name.starts_with(['/', '.']) {
        let shown: String = name.chars().take(64).collect();
        return Err(FieldError::new(
            "model",
            format!(
                "a model name has 1 to 256 characters out of A-Z a-z 0-9 . _ : / @ - and does not start with '/' \
                 or '.'; this one is {shown:?}"
            ),
        ));
    }
    Ok(())
}

/// Checks a node's id.
pub fn node_id(id: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if id.is_empty() || id.len() > 128 || !id.chars().all(allowed) {
        let shown: String = id.chars().take(64).collect();
        return Err(format!(
            "a node id has 1 to 128 characters out of A-Z a-z 0-9 . _ -; this one is {shown:?}"
        ));
    }
    Ok(())
}

/// Checks an engine's address: a host name or IP address and a port that can be connected to.
pub fn address(address: &str) -> Result<(), String> {
    let wrong = || format!("{address:?} is not HOST:PORT with a port from 1 to 65535 (IPv6 in brackets)");
    if address.len() > 300 {
        return Err("the address is longer than 300 bytes".into());
    }
    if let Ok(socket) = address.parse::<std::net::SocketAddr>() {
        if socket.ip().is_unspecified() || socket.ip().is_multicast() {
            return Err(format!("{address:?} is no address that a proxy can connect to"));
        }
        return if socket.port() == 0 { Err(wrong()) } else { Ok(()) };
    }
    let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
    let host_char = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    let number = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    if host.is_empty() || !host.chars().all(host_char) || !number || !port.parse::<u16>().is_ok_and(|p| p > 0)
    {
        return Err(wrong());
    }
    Ok(())
}

/// Parses JSON, refusing duplicate keys; the error says where.
pub fn json(bytes: &[u8]) -> Result<Value, String> {
    serde_json::from_slice::<Strict>(bytes).map(|strict| strict.0).map_err(|e| e.to_string())
}

pub(super) fn object<'a>(body: &'a Value, known: &[&str]) -> Result<&'a Map<String, Value>, FieldError> {
    let Some(fields) = body.as_object() else {
        return Err(FieldError::new("", format!("the body must be a JSON object, not {}", kind(body))));
    };
    if let Some(field) = fields.keys().find(|field| !known.contains(&field.as_str())) {
        let near = known.iter().map(|k| (strsim::damerau_levenshtein(field, k), k)).min();
        let hint = match near {
            Some((distance, name)) if distance <= 3 => format!("did you mean {name:?}?"),
            _ => format!("known are {}", known.join(", ")),
        };
        let shown: String = field.chars().take(64).collect();
        return Err(FieldError::new(&shown, format!("unknown field {shown:?}: {hint}")));
    }
    Ok(fields)
}

fn text<'a>(fields: &'a Map<String, Value>, field: &str) -> Result<Option<&'a str>, FieldError> {
    match fields.get(field) {
        None => Ok(None),
        Some(value) => string(field, value).map(Some),
    }
}

pub(super) fn string<'a>(field: &str, value: &'a Value) -> Result<&'a str, FieldError> {
    let Some(text) = value.as_str() else {
        return Err(FieldError::new(field, format!("{field} must be a string, not {}", kind(value))));
    };
    if text.len() > MAX_TEXT_BYTES || text.contains('\0') {
        let wanted = format!("{field} must be at most {MAX_TEXT_BYTES} bytes without NUL");
        return Err(FieldError::new(field, wanted));
    }
    Ok(text)
}

pub(super) fn whole_in(
    fields: &Map<String, Value>,
    field: &str,
    low: u64,
    high: u64,
) -> Result<Option<u32>, FieldError> {
    let Some(value) = fields.get(field) else { return Ok(None) };
    let number = value.as_u64().filter(|n| (low..=high).contains(n)).and_then(|n| u32::try_from(n).ok());
    number.map(Some).ok_or_else(|| {
        let found = if value.is_number() { value.to_string() } else { kind(value).to_owned() };
        FieldError::new(field, format!("{field} must be a whole number from {low} to {high}, not {found}"))
    })
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// A [`Value`] whose objects have no duplicate keys.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Self)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("a number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut out = Vec::new();
        while let Some(Strict(item)) = items.next_element()? {
            out.push(item);
        }
        Ok(Value::Array(out))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut out = Map::new();
        while let Some(key) = fields.next_key::<String>()? {
            if out.contains_key(&key) {
                return Err(A::Error::custom(format!("the key {key:?} is there twice")));
            }
            let Strict(value) = fields.next_value()?;
            out.insert(key, value);
        }
        Ok(Value::Object(out))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json as value;

    use super::*;

    #[test]
    fn defaults_fill_what_is_left_out() {
        let body = deployment_body("m", &value!({}), 10).expect("valid");
        assert_eq!(
            (body.replicas, body.spec.engine.as_str(), body.spec.model_path.as_str()),
            (1, "vllm", "m")
        );
        assert_eq!(body.spec.gpus_per_replica, 1);
    }

    #[test]
    fn every_refusal_names_its_field() {
        for (body, field, part) in [
            (value!([]), "", "a JSON object"),
            (value!({"replica": 1}), "replica", "did you mean \"replicas\"?"),
            (value!({"zebra_stripes": 1}), "zebra_stripes", "known are replicas, engine"),
            (value!({"replicas": "3"}), "replicas", "whole number from 0 to 10, not a string"),
            (value!({"replicas": -1}), "replicas", "not -1"),
            (value!({"replicas": 1.5}), "replicas", "not 1.5"),
            (value!({"replicas": 11}), "replicas", "not 11"),
            (value!({"replicas": null}), "replicas", "not null"),
            (value!({"engine": 1}), "engine", "must be a string"),
            (value!({"engine": "a b"}), "engine", "[engines]"),
            (value!({"model_path": ""}), "model_path", "folder or id"),
            (value!({"model_path": "--help"}), "model_path", "start with '-'"),
            (value!({"args": "--x"}), "args", "array"),
            (value!({"args": ["--x", 1]}), "args[1]", "must be a string"),
            (value!({"args": ["--port=1"]}), "args", "args[0] \"--port\" is not accepted: the agent gives"),
            (value!({"args": ["--served_model_name", "x"]}), "args", "the deployment's model name is served"),
            (value!({"env": []}), "env", "object"),
            (value!({"env": {"A": 1}}), "env.A", "must be a string"),
            (value!({"env": {"1A": "x"}}), "env.1A", "digit"),
            (value!({"env": {"A": "x\u{0}"}}), "env.A", "NUL"),
            (value!({"lora": {}}), "lora", "array"),
            (
                value!({"lora": [{"name": "a", "path": "p"}], "args": ["--lora_modules", "b=q"]}),
                "lora",
                "exclude each other",
            ),
            (value!({"lora": [{"name": "a"}]}), "lora[0].path", "missing"),
            (value!({"lora": [{"name": "a b", "path": "p"}]}), "lora[0].name", "1 to 256 characters"),
            (value!({"lora": [{"name": "a", "path": "-p"}]}), "lora[0].path", "start with '-'"),
            (value!({"lora": [{"name": "m", "path": "p"}]}), "lora[0].name", "taken"),
            (
                value!({"lora": [{"name": "a", "path": "p", "max_rank_of_all": 1}]}),
                "lora[0].max_rank_of_all",
                "known are name, path",
            ),
            (value!({"gpus_per_replica": 0}), "gpus_per_replica", "from 1 to 64"),
        ] {
            let error = deployment_body("m", &body, 10).expect_err(&body.to_string());
            assert_eq!(error.field, field, "{body}");
            assert!(error.message.contains(part), "{body}: {}", error.message);
        }
        assert_eq!(patch_body(&value!({}), 10).expect_err("missing").field, "replicas");
    }

    #[test]
    fn names_and_addresses() {
        for good in ["m", "Qwen/Qwen2.5-7B", "a:b@c_d"] {
            model_name(good).expect(good);
        }
        for bad in ["", "/m", ".m", "a b", "ü", &"x".repeat(257)] {
            assert_eq!(model_name(bad).expect_err(bad).field, "model");
        }
        for good in ["127.0.0.1:1", "gpu-1.example:65535", "[::1]:80"] {
            address(good).expect(good);
        }
        for bad in
            ["", "h", "h:", "h:0", "h:65536", ":80", "h:+80", "::1:80", "0.0.0.0:80", "a/b:80", "127.0.0.1:0"]
        {
            address(bad).expect_err(bad);
        }
        node_id("gpu-1.rack_2").expect("valid");
        for bad in ["", "a b", "a/b", &"x".repeat(129)] {
            node_id(bad).expect_err(bad);
        }
    }

    #[test]
    fn duplicate_keys_and_garbage_are_no_json() {
        assert!(json(br#"{"a":1,"a":2}"#).expect_err("twice").contains("\"a\" is there twice"));
        assert!(json(br#"{"x":{"a":1,"a":2}}"#).is_err());
        for bad in [&b""[..], b"{", b"{} x", b"\xff", b"nope"] {
            assert!(json(bad).is_err());
        }
        assert_eq!(json(br#"{"a":[1,-2,3.5,null,true,"x"]}"#), Ok(value!({"a":[1,-2,3.5,null,true,"x"]})));
        assert!(json("[".repeat(100_000).as_bytes()).is_err(), "no stack overflow");
    }
}
