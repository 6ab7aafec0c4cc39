//! One card, read once.

use std::collections::BTreeMap;

use nvml_wrapper::{
    Device, Nvml,
    bitmasks::device::ThrottleReasons,
    enum_wrappers::device::{Clock, EccCounter, MemoryError, TemperatureSensor, TemperatureThreshold},
    enums::device::{SampleValue, UsedGpuMemory},
    error::NvmlError,
    structs::device::FieldId,
    sys_exports::field_id,
};
use penstock_proto::v1;

use super::MIB;
use crate::gpu::{Card, HOT, Recovery, Trouble};

/// Fields that are asked for in one call: pending, failed, what the driver asks for.
const FIELDS: [u32; 3] = [
    field_id::NVML_FI_DEV_REMAPPED_PENDING,
    field_id::NVML_FI_DEV_REMAPPED_FAILURE,
    field_id::NVML_FI_DEV_GET_GPU_RECOVERY_ACTION,
];
/// More parts than any card has.
const MIG_PARTS: u32 = 16;

/// Throttle reasons that are told, by their names; an idle GPU is not throttled.
const THROTTLED: [(ThrottleReasons, &str); 8] = [
    (ThrottleReasons::APPLICATIONS_CLOCKS_SETTING, "applications_clocks_setting"),
    (ThrottleReasons::SW_POWER_CAP, "sw_power_cap"),
    (ThrottleReasons::HW_SLOWDOWN, "hw_slowdown"),
    (ThrottleReasons::SYNC_BOOST, "sync_boost"),
    (ThrottleReasons::SW_THERMAL_SLOWDOWN, "sw_thermal_slowdown"),
    (ThrottleReasons::HW_THERMAL_SLOWDOWN, HOT),
    (ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN, "hw_power_brake_slowdown"),
    (ThrottleReasons::DISPLAY_CLOCK_SETTING, "display_clock_setting"),
];

/// Reads the card at `index`. One that does not read is told with the constant figures that were `known` of it.
pub(super) fn card(nvml: &Nvml, index: u32, link_group: &str, known: &mut BTreeMap<u32, v1::Gpu>) -> Card {
    let reading = nvml.device_by_index(index).map_err(trouble).and_then(|device| whole(&device));
    let why = match reading {
        Ok((mut gpu, recovery)) => {
            gpu.link_group = link_group.to_owned();
            known.insert(index, constant(&gpu));
            return Card { gpu, trouble: None, recovery };
        }
        Err(why) => why,
    };
    let nameless = || v1::Gpu { uuid: format!("GPU-at-index-{index}"), ..v1::Gpu::default() };
    Card { gpu: known.get(&index).cloned().unwrap_or_else(nameless), trouble: Some(why), recovery: None }
}

/// What of a card does not change.
fn constant(gpu: &v1::Gpu) -> v1::Gpu {
    v1::Gpu {
        uuid: gpu.uuid.clone(),
        name: gpu.name.clone(),
        memory_total_mib: gpu.memory_total_mib,
        numa_node: gpu.numa_node,
        link_group: gpu.link_group.clone(),
        slowdown_c: gpu.slowdown_c,
        shutdown_c: gpu.shutdown_c,
        mig_enabled: gpu.mig_enabled,
        pci_bus_id: gpu.pci_bus_id.clone(),
        ..v1::Gpu::default()
    }
}

fn trouble(error: NvmlError) -> Trouble {
    match error {
        NvmlError::GpuLost => Trouble::Lost,
        NvmlError::ResetRequired => Trouble::NeedsReset,
        other => Trouble::Unreadable(other.to_string()),
    }
}

/// A figure that the card may not have. Only a card that is broken as a whole is an error.
fn maybe<T>(figure: Result<T, NvmlError>) -> Result<Option<T>, Trouble> {
    match figure {
        Ok(figure) => Ok(Some(figure)),
        Err(error @ (NvmlError::GpuLost | NvmlError::ResetRequired)) => Err(trouble(error)),
        Err(_) => Ok(None),
    }
}

fn whole(device: &Device<'_>) -> Result<(v1::Gpu, Option<Recovery>), Trouble> {
    let memory = device.memory_info().map_err(trouble)?;
    let pci = maybe(device.pci_info())?;
    let throttled = maybe(device.current_throttle_reasons())?.unwrap_or(ThrottleReasons::empty());
    let (errors, recovery) = errors(device)?;
    let mig_enabled = maybe(device.mig_mode())?.map(|mode| mode.current == 1);
    let threshold = |which| device.temperature_threshold(which);
    let gpu = v1::Gpu {
        uuid: device.uuid().map_err(trouble)?,
        name: device.name().map_err(trouble)?,
        memory_total_mib: memory.total / MIB,
        memory_used_mib: memory.used / MIB,
        utilization_percent: maybe(device.utilization_rates())?.map(|rates| rates.gpu),
        temperature_c: maybe(device.temperature(TemperatureSensor::Gpu))?,
        slowdown_c: maybe(threshold(TemperatureThreshold::Slowdown))?,
        shutdown_c: maybe(threshold(TemperatureThreshold::Shutdown))?,
        numa_node: pci.as_ref().and_then(|pci| numa_node(&pci.bus_id)),
        pci_bus_id: pci.map(|pci| pci.bus_id).unwrap_or_default(),
        power_w: maybe(device.power_usage())?.map(|milliwatts| milliwatts / 1_000),
        power_limit_w: maybe(device.enforced_power_limit())?.map(|milliwatts| milliwatts / 1_000),
        sm_clock_mhz: maybe(device.clock_info(Clock::SM))?,
        memory_clock_mhz: maybe(device.clock_info(Clock::Memory))?,
        throttle_reasons: THROTTLED
            .iter()
            .filter(|(flag, _)| throttled.contains(*flag))
            .map(|(_, name)| (*name).to_owned())
            .collect(),
        errors: Some(errors),
        processes: processes(device)?,
        mig_enabled,
        mig_instances: if mig_enabled == Some(true) { parts(device) } else { vec![] },
        ..v1::Gpu::default()
    };
    Ok((gpu, recovery))
}

fn errors(device: &Device<'_>) -> Result<(v1::GpuErrors, Option<Recovery>), Trouble> {
    let ecc = |error, counter| maybe(device.total_ecc_errors(error, counter));
    let fields = maybe(device.field_values_for(&FIELDS.map(FieldId)))?.unwrap_or_default();
    let mut fields = fields.into_iter().map(|field| match field.ok()?.value.ok()? {
        SampleValue::U32(value) => Some(u64::from(value)),
        SampleValue::U64(value) => Some(value),
        SampleValue::I64(value) => u64::try_from(value).ok(),
        SampleValue::F64(_) => None,
    });
    let mut field = || fields.next().flatten();
    let (rows_pending, failed, asked) = (field(), field(), field());
    // Rows are remapped since Ampere; before, pages were retired.
    let pages_pending = maybe(device.are_pages_pending_retired())?;
    let pending = [rows_pending.map(|rows| rows > 0), pages_pending];
    let errors = v1::GpuErrors {
        corrected: ecc(MemoryError::Corrected, EccCounter::Volatile)?,
        uncorrected: ecc(MemoryError::Uncorrected, EccCounter::Volatile)?,
        corrected_ever: ecc(MemoryError::Corrected, EccCounter::Aggregate)?,
        uncorrected_ever: ecc(MemoryError::Uncorrected, EccCounter::Aggregate)?,
        remap_pending: pending.into_iter().flatten().reduce(|a, b| a || b),
        remap_failed: failed.map(|failed| failed > 0),
        pcie_replays: maybe(device.pcie_replay_counter())?.map(u64::from),
    };
    // nvmlDeviceGpuRecoveryAction_t: reset, reboot, drain of peers, drain and reset.
    let recovery = match asked {
        Some(1) => Some(Recovery::Reset),
        Some(2) => Some(Recovery::Reboot),
        Some(3 | 4) => Some(Recovery::Drain),
        _ => None,
    };
    Ok((errors, recovery))
}

fn processes(device: &Device<'_>) -> Result<Vec<v1::GpuProcess>, Trouble> {
    let listed = maybe(device.running_compute_processes())?.unwrap_or_default();
    let told = listed.into_iter().map(|process| v1::GpuProcess {
        pid: process.pid,
        used_mib: match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes / MIB),
            UsedGpuMemory::Unavailable => None,
        },
        replica_id: String::new(),
    });
    Ok(told.collect())
}

fn parts(device: &Device<'_>) -> Vec<v1::MigInstance> {
    let most = device.mig_device_count().unwrap_or(0).min(MIG_PARTS);
    // Indexes may have gaps.
    let parts = (0..most).filter_map(|index| device.mig_device_by_index(index).ok());
    let told = parts.filter_map(|part| {
        Some(v1::MigInstance {
            uuid: part.uuid().ok()?,
            name: part.name().unwrap_or_default(),
            memory_total_mib: part.memory_info().ok().map(|memory| memory.total / MIB),
        })
    });
    told.collect()
}

/// The NUMA node of a PCI device, as the kernel has it; None where it does not say (it writes -1 then).
fn numa_node(bus_id: &str) -> Option<u32> {
    // NVML writes 00000000:3B:00.0, the kernel 0000:3b:00.0.
    let (domain, rest) = bus_id.split_once(':')?;
    let domain = domain.get(domain.len().checked_sub(4)?..)?;
    let path = format!("/sys/bus/pci/devices/{domain}:{rest}/numa_node").to_ascii_lowercase();
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}
