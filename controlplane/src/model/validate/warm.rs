//! The part `warm` of a deployment's body. "off" is accepted for each of its three parts.

use penstock_config::storage::{SecretRef, Storage};
use serde_json::{Map, Value};

use super::{FieldError, object, policy::flag, text, whole_in as whole};
use crate::model::warm::{Prefetch, Restore, Sleep, WarmSpec};

/// A day, in seconds.
const MAX_SECONDS: u64 = 86_400;
/// 64 TiB.
const MAX_GIB: u64 = 65_536;

/// `warm` of a deployment's body.
pub(super) fn warm(fields: &Map<String, Value>) -> Result<WarmSpec, FieldError> {
    let Some(value) = fields.get("warm") else { return Ok(WarmSpec::default()) };
    read(value).map_err(|error| error.inside("warm"))
}

fn read(value: &Value) -> Result<WarmSpec, FieldError> {
    let fields = object(value, &["sleep", "restore", "prefetch"])?;
    let off = |field: &str| fields.get(field).and_then(Value::as_str) == Some("off");
    let sleep = match part(fields, "sleep").filter(|_| !off("sleep")) {
        None => None,
        Some(value) => Some(sleep(value).map_err(|error| error.inside("sleep"))?),
    };
    let restore = match part(fields, "restore") {
        None => None,
        Some(_) if off("restore") => Some(Restore { off: true, ..Restore::default() }),
        Some(value) => Some(restore(value).map_err(|error| error.inside("restore"))?),
    };
    let prefetch = match part(fields, "prefetch") {
        None => None,
        Some(_) if off("prefetch") => Some(Prefetch { off: true, ..Prefetch::default() }),
        Some(value) => Some(prefetch(value).map_err(|error| error.inside("prefetch"))?),
    };
    Ok(WarmSpec { sleep, restore, prefetch })
}

/// As the API shows what was not said, null is nothing.
fn part<'a>(fields: &'a Map<String, Value>, field: &str) -> Option<&'a Value> {
    fields.get(field).filter(|value| !value.is_null())
}

fn sleep(value: &Value) -> Result<Sleep, FieldError> {
    let fields = object(value, &["level"])?;
    let missing = || {
        let wanted =
            "level is missing: 1 keeps the weights in the host's memory, 2 drops them; or \"sleep\": \"off\"";
        FieldError::new("level", wanted)
    };
    Ok(Sleep { level: whole(fields, "level", 1, 2)?.ok_or_else(missing)? })
}

fn restore(value: &Value) -> Result<Restore, FieldError> {
    let fields = object(value, &["off", "storage", "secret_ref", "path", "timeout_s"])?;
    let said = |field: &str| Ok::<_, FieldError>(text(fields, field)?.unwrap_or_default().to_owned());
    let restore = Restore {
        off: flag(fields, "off")?.unwrap_or(false),
        storage: said("storage")?,
        secret_ref: said("secret_ref")?,
        path: said("path")?,
        timeout_s: whole(fields, "timeout_s", 0, MAX_SECONDS)?.unwrap_or(0),
    };
    let refused = |field: &str, why: String| FieldError::new(field, format!("{field}: {why}"));
    if !restore.secret_ref.is_empty() {
        restore.secret_ref.parse::<SecretRef>().map_err(|e| refused("secret_ref", e.to_string()))?;
    }
    if !restore.path.is_empty() && (!restore.path.starts_with('/') || restore.path.contains("/..")) {
        return Err(refused("path", format!("{:?} is no path from the root", restore.path)));
    }
    if !restore.storage.is_empty() {
        let storage: Storage = restore.storage.parse().map_err(|e| refused("storage", format!("{e}")))?;
        if !restore.path.is_empty() {
            storage.agrees_with(&restore.path).map_err(|e| refused("storage", e.to_string()))?;
        }
    }
    Ok(restore)
}

fn prefetch(value: &Value) -> Result<Prefetch, FieldError> {
    let fields = object(value, &["off", "size_gib"])?;
    Ok(Prefetch {
        off: flag(fields, "off")?.unwrap_or(false),
        size_gib: whole(fields, "size_gib", 0, MAX_GIB)?.unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::deployment_body, *};

    #[test]
    fn what_is_said_is_read_and_what_is_shown_can_be_said() {
        let body = json!({"warm": {
            "sleep": {"level": 2},
            "restore": {"storage": "file:///ckpt/m", "secret_ref": "env:KEY", "path": "/ckpt", "timeout_s": 60},
            "prefetch": {"size_gib": 16},
        }});
        let warm = deployment_body("m", &body, 10).expect("valid").spec.warm;
        assert_eq!(warm.sleep, Some(Sleep { level: 2 }));
        let shown = json!({"warm": warm});
        assert_eq!(shown, body);
        assert_eq!(deployment_body("m", &shown, 10).expect("valid").spec.warm, warm);
        let off = json!({"warm": {"sleep": "off", "restore": "off", "prefetch": "off"}});
        let off = deployment_body("m", &off, 10).expect("valid").spec.warm;
        assert!(off.sleep.is_none() && off.restore.as_ref().is_some_and(|r| r.off));
        assert!(off.prefetch.is_some_and(|p| p.off));
        assert_eq!(deployment_body("m", &json!({"warm": off}), 10).expect("valid").spec.warm, off);
        for nothing in [json!({}), json!({"warm": {}}), json!({"warm": {"sleep": null, "restore": null}})] {
            assert!(deployment_body("m", &nothing, 10).expect("valid").spec.warm.is_default());
        }
    }

    #[test]
    fn every_refusal_names_its_whole_path() {
        for (body, field, part) in [
            (json!(1), "warm", "must be a JSON object"),
            (json!({"snooze": 1}), "warm.snooze", "known are sleep, restore, prefetch"),
            (json!({"sleep": {}}), "warm.sleep.level", "level is missing"),
            (json!({"sleep": {"level": 3}}), "warm.sleep.level", "from 1 to 2"),
            (json!({"sleep": "on"}), "warm.sleep", "must be a JSON object"),
            (json!({"restore": {"command": ["x"]}}), "warm.restore.command", "unknown field"),
            (json!({"restore": {"storage": "ckpt"}}), "warm.restore.storage", "accepted: file:///PATH"),
            (json!({"restore": {"secret_ref": "hunter2"}}), "warm.restore.secret_ref", "file:NAME"),
            (json!({"restore": {"path": "ckpt"}}), "warm.restore.path", "from the root"),
            (
                json!({"restore": {"path": "/ckpt", "storage": "file:///other"}}),
                "warm.restore.storage",
                "does not lie under",
            ),
            (json!({"prefetch": {"size_gib": -1}}), "warm.prefetch.size_gib", "not -1"),
        ] {
            let error = deployment_body("m", &json!({"warm": body}), 10).expect_err(&body.to_string());
            assert_eq!(error.field, field, "{body}");
            assert!(
                error.message.contains(part) && !error.message.contains("hunter2"),
                "{body}: {}",
                error.message
            );
        }
    }
}
