//! A GPU as `GET /gpus` shows it.

use penstock_proto::v1;
use serde_json::{Value, json};

/// Every figure by its name; null where the card does not say.
pub(crate) fn shown(gpu: &v1::Gpu) -> Value {
    let health = match v1::GpuHealth::try_from(gpu.health) {
        Ok(v1::GpuHealth::Degraded) => "degraded",
        Ok(v1::GpuHealth::Faulty) => "faulty",
        _ => "healthy",
    };
    let errors = gpu.errors.unwrap_or_default();
    let processes = gpu.processes.iter().map(
        |process| json!({"pid": process.pid, "used_mib": process.used_mib, "replica_id": process.replica_id}),
    );
    let xids = gpu.xids.iter().map(|xid| {
        json!({"xid": xid.xid, "meaning": xid.meaning, "count": xid.count, "last_unix_ms": xid.last_unix_ms})
    });
    let mig = gpu
        .mig_instances
        .iter()
        .map(|part| json!({"uuid": part.uuid, "name": part.name, "memory_total_mib": part.memory_total_mib}));
    json!({
        "uuid": gpu.uuid,
        "name": gpu.name,
        "pci_bus_id": gpu.pci_bus_id,
        "numa_node": gpu.numa_node,
        "link_group": gpu.link_group,
        "health": health,
        "reason": gpu.health_reason,
        "remedy": gpu.remedy,
        "fault": gpu.fault,
        "memory_total_mib": gpu.memory_total_mib,
        "memory_used_mib": gpu.memory_used_mib,
        "utilization_percent": gpu.utilization_percent,
        "temperature_c": gpu.temperature_c,
        "slowdown_c": gpu.slowdown_c,
        "shutdown_c": gpu.shutdown_c,
        "power_w": gpu.power_w,
        "power_limit_w": gpu.power_limit_w,
        "sm_clock_mhz": gpu.sm_clock_mhz,
        "memory_clock_mhz": gpu.memory_clock_mhz,
        "throttle_reasons": gpu.throttle_reasons,
        "ecc_corrected": errors.corrected,
        "ecc_uncorrected": errors.uncorrected,
        "ecc_corrected_ever": errors.corrected_ever,
        "ecc_uncorrected_ever": errors.uncorrected_ever,
        "remap_pending": errors.remap_pending,
        "remap_failed": errors.remap_failed,
        "pcie_replays": errors.pcie_replays,
        "processes": processes.collect::<Vec<_>>(),
        "xids": xids.collect::<Vec<_>>(),
        "mig_enabled": gpu.mig_enabled,
        "mig_instances": mig.collect::<Vec<_>>(),
    })
}
