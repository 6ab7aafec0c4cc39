//! GPUs as `/api/v2/nodes` shows them: what is known of each, and why it is or is not used.

use penstock_proto::v1;
use serde_json::{Map, Value, json};

/// One GPU. A figure that its card does not say, and a list that is empty, is left out.
pub(super) fn shown(gpu: &v1::Gpu) -> Value {
    let health = match v1::GpuHealth::try_from(gpu.health) {
        Ok(v1::GpuHealth::Healthy) => "healthy",
        Ok(v1::GpuHealth::Degraded) => "degraded",
        Ok(v1::GpuHealth::Faulty) => "faulty",
        Ok(v1::GpuHealth::Unspecified) | Err(_) => "unknown",
    };
    let errors = gpu.errors.unwrap_or_default();
    let processes = gpu.processes.iter().map(|process| {
        json!({ "pid": process.pid, "used_mib": process.used_mib, "replica_id": process.replica_id })
    });
    let xids = gpu.xids.iter().map(|xid| {
        json!({ "xid": xid.xid, "meaning": xid.meaning, "count": xid.count, "last_unix_ms": xid.last_unix_ms })
    });
    let parts = gpu.mig_instances.iter().map(
        |part| json!({ "uuid": part.uuid, "name": part.name, "memory_total_mib": part.memory_total_mib }),
    );
    let mut shown = Map::new();
    let always = [
        ("uuid", json!(gpu.uuid)),
        ("name", json!(gpu.name)),
        ("memory_total_mib", json!(gpu.memory_total_mib)),
        ("memory_used_mib", json!(gpu.memory_used_mib)),
        ("fault", json!(gpu.fault)),
        ("health", json!(health)),
        ("reason", json!(gpu.health_reason)),
        ("remedy", json!(gpu.remedy)),
    ];
    shown.extend(always.map(|(name, value)| (name.to_owned(), value)));
    let as_known = [
        ("numa_node", json!(gpu.numa_node)),
        ("link_group", json!(Some(&gpu.link_group).filter(|group| !group.is_empty()))),
        ("pci_bus_id", json!(Some(&gpu.pci_bus_id).filter(|id| !id.is_empty()))),
        ("utilization_percent", json!(gpu.utilization_percent)),
        ("temperature_c", json!(gpu.temperature_c)),
        ("slowdown_c", json!(gpu.slowdown_c)),
        ("shutdown_c", json!(gpu.shutdown_c)),
        ("power_w", json!(gpu.power_w)),
        ("power_limit_w", json!(gpu.power_limit_w)),
        ("sm_clock_mhz", json!(gpu.sm_clock_mhz)),
        ("memory_clock_mhz", json!(gpu.memory_clock_mhz)),
        ("throttle_reasons", json!(gpu.throttle_reasons)),
        ("ecc_corrected", json!(errors.corrected)),
        ("ecc_uncorrected", json!(errors.uncorrected)),
        ("ecc_corrected_ever", json!(errors.corrected_ever)),
        ("ecc_uncorrected_ever", json!(errors.uncorrected_ever)),
        ("remap_pending", json!(errors.remap_pending)),
        ("remap_failed", json!(errors.remap_failed)),
        ("pcie_replays", json!(errors.pcie_replays)),
        ("processes", processes.collect()),
        ("xids", xids.collect()),
        ("mig_enabled", json!(gpu.mig_enabled)),
        ("mig_instances", parts.collect()),
    ];
    let says = |value: &Value| !value.is_null() && value.as_array().is_none_or(|list| !list.is_empty());
    shown.extend(as_known.into_iter().filter(|(_, v)| says(v)).map(|(name, v)| (name.to_owned(), v)));
    Value::Object(shown)
}

/// Where a node's GPUs are read from.
pub(super) fn source(source: &v1::GpuSource) -> Value {
    json!({
        "kind": source.kind,
        "driver_version": source.driver_version,
        "cuda_version": source.cuda_version,
        "reason": source.reason,
        "reading_age_ms": source.reading_age_ms,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_card_does_not_say_is_not_there_and_zero_is() {
        let gpu = v1::Gpu { uuid: "g".into(), utilization_percent: Some(0), health: 3, ..v1::Gpu::default() };
        let shown = shown(&gpu);
        assert_eq!((&shown["utilization_percent"], &shown["health"]), (&json!(0), &json!("faulty")));
        for absent in ["temperature_c", "power_w", "processes", "link_group", "mig_enabled"] {
            assert!(shown.get(absent).is_none(), "{absent}");
        }
        assert_eq!(super::shown(&v1::Gpu::default())["health"], "unknown", "an older agent");
    }
}
