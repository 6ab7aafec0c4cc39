//! The parts of a body that say how a deployment is placed, rolled out, protected and scaled, and the body that says how
//! a node is used. A refusal's field is the whole path: "rollout.max_surge".

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{FieldError, kind, object, string, text, whole_in as whole};
use crate::model::policy::{
    Autoscaling, DisruptionPolicy, NodePolicy, PlacementPolicy, Policy, Resources, Role, RolloutPolicy,
    SpreadPolicy, Taint, TaintEffect, Toleration,
};

/// Most labels, taints or tolerations of one thing.
const MAX_ENTRIES: usize = 64;
/// A week, in seconds.
const MAX_SECONDS: u64 = 604_800;
/// A day, in seconds: no agent waits that long for streams.
const MAX_MOVE_AFTER_S: u64 = 86_400;

type Fields = Map<String, Value>;

/// What `fields` say about one part, or its default.
fn part<T: Default>(
    fields: &Fields,
    name: &str,
    known: &[&str],
    read: impl FnOnce(&Fields) -> Result<T, FieldError>,
) -> Result<T, FieldError> {
    let Some(value) = fields.get(name) else { return Ok(T::default()) };
    object(value, known).and_then(read).map_err(|error| error.inside(name))
}

/// `placement`, `rollout`, `disruption` and `autoscaling` of a deployment's body.
pub(super) fn policy(fields: &Fields, max_replicas: u32) -> Result<Policy, FieldError> {
    let known = ["node_selector", "tolerations", "spread", "rebalance"];
    let placement = part(fields, "placement", &known, |placement| {
        Ok(PlacementPolicy {
            node_selector: labels(placement, "node_selector")?,
            tolerations: list(placement, "tolerations", toleration)?,
            spread: part(placement, "spread", &["max_skew", "min_domains"], spread)?,
            rebalance: flag(placement, "rebalance")?.unwrap_or(false),
        })
    })?;
    let known = [
        "max_surge",
        "max_unavailable",
        "progress_deadline_s",
        "paused",
        "move_streams",
        "move_streams_after_s",
    ];
    let rollout = part(fields, "rollout", &known, |rollout| {
        let default = RolloutPolicy::default();
        let most = u64::from(max_replicas);
        let policy = RolloutPolicy {
            max_surge: whole(rollout, "max_surge", 0, most)?.unwrap_or(default.max_surge),
            max_unavailable: whole(rollout, "max_unavailable", 0, most)?.unwrap_or(default.max_unavailable),
            progress_deadline_s: whole(rollout, "progress_deadline_s", 0, MAX_SECONDS)?
                .unwrap_or(default.progress_deadline_s),
            paused: flag(rollout, "paused")?.unwrap_or(default.paused),
            move_streams: flag(rollout, "move_streams")?.unwrap_or(default.move_streams),
            move_streams_after_s: whole(rollout, "move_streams_after_s", 0, MAX_MOVE_AFTER_S)?
                .unwrap_or(default.move_streams_after_s),
        };
        if policy.max_surge == 0 && policy.max_unavailable == 0 {
            let message = "max_surge and max_unavailable cannot both be 0: nothing could ever be replaced";
            return Err(FieldError::new("max_surge", message));
        }
        Ok(policy)
    })?;
    let disruption = part(fields, "disruption", &["min_available"], |disruption| {
        // As the API shows one that is not set.
        let is_set = disruption.get("min_available").is_some_and(|value| !value.is_null());
        let min_available = match is_set {
            true => whole(disruption, "min_available", 0, u64::from(max_replicas))?,
            false => None,
        };
        Ok(DisruptionPolicy { min_available })
    })?;
    let autoscaling = match fields.get("autoscaling") {
        None | Some(Value::Null) => None,
        Some(value) => Some(autoscaling(value, max_replicas).map_err(|error| error.inside("autoscaling"))?),
    };
    Ok(Policy { placement, rollout, disruption, autoscaling })
}

/// `resources` of a deployment's body, and the GPUs and tensor-parallel size it names.
pub(super) struct ResourcesAsked {
    pub(super) resources: Resources,
    pub(super) gpus: Option<u32>,
    pub(super) tensor_parallel: Option<u32>,
}

pub(super) fn resources(fields: &Fields, max_gpus: u64) -> Result<ResourcesAsked, FieldError> {
    const MAX_BYTES: u64 = 1 << 50;
    let none = ResourcesAsked { resources: Resources::default(), gpus: None, tensor_parallel: None };
    let Some(value) = fields.get("resources") else { return Ok(none) };
    let read = |fields: &Fields| {
        let gpus = whole(fields, "gpus", 1, max_gpus)?;
        let tensor_parallel = whole(fields, "tensor_parallel", 1, max_gpus)?;
        let gpu_memory_bytes = match fields.get("gpu_memory_bytes") {
            None => 0,
            Some(value) => value.as_u64().filter(|bytes| *bytes <= MAX_BYTES).ok_or_else(|| {
                let found = if value.is_number() { value.to_string() } else { kind(value).to_owned() };
                let wanted = format!("gpu_memory_bytes must be a whole number of bytes up to {MAX_BYTES}");
                FieldError::new("gpu_memory_bytes", format!("{wanted}, not {found}"))
            })?,
        };
        let share_gpu = flag(fields, "share_gpu")?.unwrap_or(false);
        if share_gpu && gpu_memory_bytes == 0 {
            let message = "share_gpu needs gpu_memory_bytes: what each replica takes of a GPU that it shares";
            return Err(FieldError::new("share_gpu", message));
        }
        let resources = Resources { gpu_memory_bytes, share_gpu };
        Ok(ResourcesAsked { resources, gpus, tensor_parallel })
    };
    let known = ["gpus", "gpu_memory_bytes", "share_gpu", "tensor_parallel"];
    object(value, &known).and_then(read).map_err(|error| error.inside("resources"))
}

fn spread(fields: &Fields) -> Result<SpreadPolicy, FieldError> {
    let default = SpreadPolicy::default();
    Ok(SpreadPolicy {
        max_skew: whole(fields, "max_skew", 1, 10_000)?.unwrap_or(default.max_skew),
        min_domains: whole(fields, "min_domains", 0, 1_000)?.unwrap_or(default.min_domains),
    })
}

fn autoscaling(value: &Value, max_replicas: u32) -> Result<Autoscaling, FieldError> {
    let known = [
        "min",
        "max",
        "target_waiting",
        "target_running",
        "target_ttft_ms",
        "up_window_s",
        "down_window_s",
        "down_percent",
        "idle_to_zero_s",
    ];
    let fields = object(value, &known)?;
    let default = Autoscaling::default();
    let most = u64::from(max_replicas);
    let number = |name, low, high, or| Ok(whole(fields, name, low, high)?.unwrap_or(or));
    let max = whole(fields, "max", 1, most)?
        .ok_or_else(|| FieldError::new("max", "max is missing: give the most replicas that it may get"))?;
    let auto = Autoscaling {
        min: number("min", 0, u64::from(max), default.min.min(max))?,
        max,
        target_waiting: number("target_waiting", 0, 1_000_000, default.target_waiting)?,
        target_running: number("target_running", 0, 1_000_000, default.target_running)?,
        target_ttft_ms: number("target_ttft_ms", 0, 3_600_000, default.target_ttft_ms)?,
        up_window_s: number("up_window_s", 0, 86_400, default.up_window_s)?,
        down_window_s: number("down_window_s", 0, 86_400, default.down_window_s)?,
        down_percent: number("down_percent", 1, 90, default.down_percent)?,
        idle_to_zero_s: number("idle_to_zero_s", 0, MAX_SECONDS, default.idle_to_zero_s)?,
    };
    if auto.target_waiting == 0 && auto.target_running == 0 && auto.target_ttft_ms == 0 {
        let message = "one of target_waiting, target_running and target_ttft_ms must be more than 0";
        return Err(FieldError::new("target_waiting", message));
    }
    if (auto.min == 0) != (auto.idle_to_zero_s > 0) {
        let message =
            "min 0 and idle_to_zero_s go together: after how many idle seconds the last replica ends";
        return Err(FieldError::new("idle_to_zero_s", message));
    }
    Ok(auto)
}

/// Checks the body of PATCH /api/v2/nodes/{id}: what is there replaces what was said before.
pub fn node_body(body: &Value, before: &NodePolicy) -> Result<NodePolicy, FieldError> {
    let fields = object(body, &["taints", "labels", "role", "reason", "prefetch"])?;
    let mut policy = before.clone();
    if fields.contains_key("taints") {
        policy.taints = list(fields, "taints", taint)?;
        policy.taints.sort();
        policy.taints.dedup();
    }
    if fields.contains_key("labels") {
        policy.labels = labels(fields, "labels")?;
    }
    match fields.get("role") {
        None => {}
        Some(Value::Null) => policy.role = None,
        Some(value) => {
            let named = string("role", value)?;
            policy.role = Some(Role::named(named).ok_or_else(|| {
                let all = Role::ALL.map(Role::as_str).join(", ");
                FieldError::new("role", format!("role must be one of {all}, or null; it is {named:?}"))
            })?);
        }
    }
    if fields.contains_key("prefetch") {
        policy.prefetch = list(fields, "prefetch", model)?.into_iter().collect();
    }
    if let Some(reason) = text(fields, "reason")? {
        reason.clone_into(&mut policy.reason);
    }
    Ok(policy)
}

/// Checks the body of PUT /api/v2/nodes/{id}: everything that is said of the node.
pub fn node_policy_body(node: &str, body: &Value) -> Result<NodePolicy, FieldError> {
    let known = ["cordoned", "maintenance", "reason", "taints", "labels", "role", "prefetch"];
    let mut fields = object(body, &known)?.clone();
    let (cordoned, maintenance) = (flag(&fields, "cordoned")?, flag(&fields, "maintenance")?);
    fields.retain(|field, _| field != "cordoned" && field != "maintenance");
    let bare = NodePolicy {
        node_id: node.to_owned(),
        cordoned: cordoned.unwrap_or(false),
        maintenance: maintenance.unwrap_or(false),
        ..NodePolicy::default()
    };
    node_body(&Value::Object(fields), &bare)
}

/// Checks the body of a cordon or a maintenance, which may be empty: why.
pub fn reason_body(body: &Value) -> Result<String, FieldError> {
    Ok(text(object(body, &["reason"])?, "reason")?.unwrap_or_default().to_owned())
}

/// Checks the body of a wake: how many requests wait for the model.
pub fn wake_body(body: &Value) -> Result<u32, FieldError> {
    Ok(whole(object(body, &["queued"])?, "queued", 0, 1_000_000)?.unwrap_or(1))
}

/// Checks the body of a rollback: to which revision; None: the one before the last change.
pub fn rollback_body(body: &Value) -> Result<Option<u64>, FieldError> {
    Ok(whole(object(body, &["to"])?, "to", 1, u64::from(u32::MAX))?.map(u64::from))
}

fn model(value: &Value) -> Result<String, FieldError> {
    let name = string("", value)?;
    super::model_name(name).map_err(|error| FieldError::new("", error.message))?;
    Ok(name.to_owned())
}

/// Checks the body of POST /api/v2/nodes/{id}/prefetch: which model, and whether it is not wanted there any more.
pub fn prefetch_body(body: &Value) -> Result<(String, bool), FieldError> {
    let fields = object(body, &["model", "remove"])?;
    let missing = || FieldError::new("model", "model is missing: name a deployment's model");
    let name = text(fields, "model")?.ok_or_else(missing)?;
    super::model_name(name)?;
    Ok((name.to_owned(), flag(fields, "remove")?.unwrap_or(false)))
}

fn toleration(value: &Value) -> Result<Toleration, FieldError> {
    let fields = object(value, &["key", "value", "effect"])?;
    let key = text(fields, "key")?.unwrap_or_default();
    if !key.is_empty() {
        label_key("key", key)?;
    }
    Ok(Toleration {
        key: key.to_owned(),
        value: text(fields, "value")?.map(str::to_owned),
        effect: fields.get("effect").map(effect).transpose()?,
    })
}

fn taint(value: &Value) -> Result<Taint, FieldError> {
    let fields = object(value, &["key", "value", "effect"])?;
    let key = text(fields, "key")?.ok_or_else(|| FieldError::new("key", "key is missing"))?;
    label_key("key", key)?;
    let effect_given = fields.get("effect");
    let missing =
        || FieldError::new("effect", "effect is missing: prefer_no_schedule, no_schedule or no_execute");
    Ok(Taint {
        key: key.to_owned(),
        value: text(fields, "value")?.unwrap_or_default().to_owned(),
        effect: effect(effect_given.ok_or_else(missing)?)?,
    })
}

fn effect(value: &Value) -> Result<TaintEffect, FieldError> {
    let named = string("effect", value)?;
    let all = [TaintEffect::PreferNoSchedule, TaintEffect::NoSchedule, TaintEffect::NoExecute];
    all.into_iter().find(|effect| effect.as_str() == named).ok_or_else(|| {
        let all = all.map(TaintEffect::as_str).join(", ");
        FieldError::new("effect", format!("effect must be one of {all}; it is {named:?}"))
    })
}

pub(super) fn flag(fields: &Fields, field: &str) -> Result<Option<bool>, FieldError> {
    let Some(value) = fields.get(field) else { return Ok(None) };
    let wanted = || FieldError::new(field, format!("{field} must be true or false, not {}", kind(value)));
    value.as_bool().map(Some).ok_or_else(wanted)
}

fn list<T>(
    fields: &Fields,
    field: &str,
    read: impl Fn(&Value) -> Result<T, FieldError>,
) -> Result<Vec<T>, FieldError> {
    let Some(value) = fields.get(field) else { return Ok(Vec::new()) };
    let Some(items) = value.as_array().filter(|items| items.len() <= MAX_ENTRIES) else {
        let wanted = format!("{field} must be an array of at most {MAX_ENTRIES}, not {}", kind(value));
        return Err(FieldError::new(field, wanted));
    };
    let numbered = items.iter().enumerate();
    numbered.map(|(n, item)| read(item).map_err(|error| error.inside(&format!("{field}[{n}]")))).collect()
}

fn labels(fields: &Fields, field: &str) -> Result<BTreeMap<String, String>, FieldError> {
    let Some(value) = fields.get(field) else { return Ok(BTreeMap::new()) };
    let Some(pairs) = value.as_object().filter(|pairs| pairs.len() <= MAX_ENTRIES) else {
        let wanted =
            format!("{field} must be an object of at most {MAX_ENTRIES} strings, not {}", kind(value));
        return Err(FieldError::new(field, wanted));
    };
    let mut out = BTreeMap::new();
    for (key, value) in pairs {
        let shown = format!("{field}.{}", key.chars().take(64).collect::<String>());
        label_key(&shown, key)?;
        out.insert(key.clone(), string(&shown, value)?.to_owned());
    }
    Ok(out)
}

fn label_key(field: &str, key: &str) -> Result<(), FieldError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    if key.is_empty() || key.len() > 253 || !key.chars().all(allowed) {
        let wanted = "a key has 1 to 253 characters out of A-Z a-z 0-9 . _ - /";
        return Err(FieldError::new(field, wanted));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::deployment_body, *};

    #[test]
    fn everything_at_once_is_read() {
        let body = json!({
            "resources": {"gpu_memory_bytes": 42_949_672_960_u64, "tensor_parallel": 2},
            "placement": {"node_selector": {"gpu": "h100"}, "tolerations": [{"key": "spot", "effect": "no_execute"}],
                "spread": {"max_skew": 2, "min_domains": 2}, "rebalance": true},
            "rollout": {"max_surge": 2, "max_unavailable": 1, "progress_deadline_s": 60, "paused": true,
                "move_streams": false, "move_streams_after_s": 60},
            "disruption": {"min_available": 2},
            "autoscaling": {"min": 0, "max": 9, "target_ttft_ms": 800, "idle_to_zero_s": 900},
        });
        let body = deployment_body("m", &body, 10).expect("valid");
        assert_eq!((body.spec.gpus_per_replica, body.spec.options.tensor_parallel), (2, Some(2)));
        assert_eq!(body.spec.resources.gpu_memory_bytes, 40 << 30);
        assert_eq!(body.policy.placement.tolerations[0].effect, Some(TaintEffect::NoExecute));
        assert!(body.policy.rollout.paused);
        assert_eq!(body.policy.autoscaling.expect("there").target_waiting, 4);
        for body in [json!({}), json!({"disruption": {"min_available": null}, "autoscaling": null})] {
            assert!(deployment_body("m", &body, 10).expect("valid").policy.is_default());
        }
    }

    #[test]
    fn every_refusal_names_its_whole_path() {
        for (body, field, part) in [
            (json!({"rollout": 1}), "rollout", "must be a JSON object"),
            (json!({"rollout": {"surge": 1}}), "rollout.surge", "unknown field"),
            (json!({"rollout": {"max_surge": -1}}), "rollout.max_surge", "not -1"),
            (json!({"rollout": {"max_surge": 0}}), "rollout.max_surge", "both be 0"),
            (json!({"rollout": {"paused": "yes"}}), "rollout.paused", "true or false"),
            (json!({"disruption": {"min_available": "50%"}}), "disruption.min_available", "whole number"),
            (json!({"autoscaling": {}}), "autoscaling.max", "missing"),
            (json!({"autoscaling": {"max": 11}}), "autoscaling.max", "not 11"),
            (json!({"autoscaling": {"max": 2, "min": 3}}), "autoscaling.min", "from 0 to 2"),
            (json!({"autoscaling": {"max": 2, "min": 0}}), "autoscaling.idle_to_zero_s", "go together"),
            (
                json!({"autoscaling": {"max": 2, "target_waiting": 0}}),
                "autoscaling.target_waiting",
                "more than 0",
            ),
            (
                json!({"autoscaling": {"max": 2, "down_percent": 100}}),
                "autoscaling.down_percent",
                "from 1 to 90",
            ),
            (json!({"placement": {"spread": {"max_skew": 0}}}), "placement.spread.max_skew", "from 1"),
            (
                json!({"placement": {"node_selector": {"a b": "c"}}}),
                "placement.node_selector.a b",
                "a key has",
            ),
            (
                json!({"placement": {"node_selector": {"a": 1}}}),
                "placement.node_selector.a",
                "must be a string",
            ),
            (
                json!({"placement": {"tolerations": [{"effect": "no"}]}}),
                "placement.tolerations[0].effect",
                "no_execute",
            ),
            (json!({"resources": {"gpus": 0}}), "resources.gpus", "from 1 to 64"),
            (json!({"resources": {"gpus": 3, "tensor_parallel": 2}}), "resources.gpus", "needs 2"),
            (json!({"resources": {"share_gpu": true}}), "resources.share_gpu", "gpu_memory_bytes"),
            (json!({"resources": {"gpu_memory_bytes": "40G"}}), "resources.gpu_memory_bytes", "bytes"),
            (json!({"resources": {"gpus": 2}, "gpus_per_replica": 1}), "resources.gpus", "gpus_per_replica"),
            (
                json!({"resources": {"tensor_parallel": 4}, "args": ["-tp", "2"]}),
                "args",
                "the field tensor_parallel",
            ),
        ] {
            let error = deployment_body("m", &body, 10).expect_err(&body.to_string());
            assert_eq!(error.field, field, "{body}");
            assert!(error.message.contains(part), "{body}: {}", error.message);
        }
    }

    #[test]
    fn a_nodes_policy_is_what_its_body_says_and_nothing_else() {
        let body = json!({"cordoned": true, "reason": "disk", "labels": {"rack": "7"}});
        let policy = node_policy_body("n", &body).expect("valid");
        assert!(policy.cordoned && !policy.maintenance && policy.reason == "disk");
        assert!(node_policy_body("n", &json!({})).expect("valid").is_empty());
        for (body, field) in [
            (json!({"cordoned": 1}), "cordoned"),
            (json!({"maintenence": true}), "maintenence"),
            (json!({"role": "boss"}), "role"),
        ] {
            assert_eq!(node_policy_body("n", &body).expect_err(&body.to_string()).field, field);
        }
    }

    #[test]
    fn a_nodes_body_changes_what_it_names() {
        let before = NodePolicy { cordoned: true, role: Some(Role::ControlOnly), ..NodePolicy::default() };
        let taint = json!({"key": "spot", "effect": "no_schedule"});
        let body = json!({"taints": [taint, taint], "labels": {"rack": "7"}});
        let after = node_body(&body, &before).expect("valid");
        assert!(after.cordoned && after.taints.len() == 1 && after.role == Some(Role::ControlOnly));
        assert_eq!(node_body(&json!({"role": null}), &after).expect("valid").role, None);
        for (body, field) in [
            (json!({"cordoned": true}), "cordoned"),
            (json!({"role": "boss"}), "role"),
            (json!({"taints": [{"key": "a"}]}), "taints[0].effect"),
            (json!({"taints": [{"effect": "no_schedule"}]}), "taints[0].key"),
            (json!({"labels": []}), "labels"),
        ] {
            assert_eq!(node_body(&body, &before).expect_err(&body.to_string()).field, field);
        }
    }
}
