//! Takes secrets out of states before they are kept or shown: values of environment variables, and of arguments, whose names
//! sound like a secret. Pure.

use penstock_proto::engine::secret::{is_secret, masked_args};
use serde_json::Value;

/// What stands in a secret's place.
pub use penstock_proto::engine::secret::MASKED;

/// `state` with every secret in its `env` and `args`, at any depth, replaced by [`MASKED`].
pub fn mask(state: &Value) -> Value {
    let mut masked = state.clone();
    walk(&mut masked);
    masked
}

/// Masks `value`, which stands at `path` of a deployment ("env.HF_TOKEN"), if it is a secret or holds one.
pub fn mask_field(path: &str, value: &mut Value) {
    match (path.strip_prefix("env."), path, &mut *value) {
        (Some(name), ..) if is_secret(name) => *value = MASKED.into(),
        (None, "args", Value::Array(args)) => mask_args(args),
        _ => walk(value),
    }
}

fn walk(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(walk),
        Value::Object(fields) => {
            for (name, value) in fields {
                match (name.as_str(), value) {
                    ("env", Value::Object(env)) => {
                        let secrets = env.iter_mut().filter(|(name, _)| is_secret(name));
                        secrets.for_each(|(_, value)| *value = MASKED.into());
                    }
                    ("args", Value::Array(args)) => mask_args(args),
                    (_, value) => walk(value),
                }
            }
        }
        _ => {}
    }
}

/// Anything that is no string stays as it is, and is no argument.
fn mask_args(args: &mut [Value]) {
    let texts: Vec<&str> = args.iter().map(|arg| arg.as_str().unwrap_or_default()).collect();
    let masked = masked_args(texts);
    for (arg, masked) in args.iter_mut().zip(masked) {
        if arg.is_string() {
            *arg = masked.into();
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_sounds_like_a_secret_is_masked() {
        let state = json!({
            "env": {"HF_TOKEN": "a", "AWS_SECRET_ACCESS": "b", "db_password": "c", "PATH": "/bin"},
            "args": ["--hf-token", "d", "--api_key=e", "--max-tokens", "5", "--tokenizer", "t", "--seed", "1", "--hf_token"],
            "placement": {"tolerations": [{"key": "spot"}], "node_selector": {"token": "no secret"}},
            "inner": [{"env": {"X_API_KEY": "f"}}],
        });
        let masked = mask(&state);
        assert_eq!(
            masked,
            json!({
                "env": {"HF_TOKEN": "***", "AWS_SECRET_ACCESS": "***", "db_password": "***", "PATH": "/bin"},
                "args": ["--hf-token", "***", "--api_key=***", "--max-tokens", "5", "--tokenizer", "t", "--seed", "1",
                    "--hf_token"],
                "placement": {"tolerations": [{"key": "spot"}], "node_selector": {"token": "no secret"}},
                "inner": [{"env": {"X_API_KEY": "***"}}],
            })
        );
    }
}
