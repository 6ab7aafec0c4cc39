//! Real GPUs, through NVIDIA's management library, which is loaded at run time: the same binary starts on any host.
//!
//! While the library or the driver cannot be had, each reading tries again to load it: a driver may come up after the agent.
//! A figure that a card does not have (utilisation under MIG, say) is 0; a card that does not answer is a reading with its
//! fault set, under the uuid that its place had last.

use std::{collections::BTreeMap, ffi::OsStr};

use nvml_wrapper::{Device, Nvml, enum_wrappers::device::TemperatureSensor, error::NvmlError};
use penstock_proto::v1;

use super::Gpus;

const MIB: u64 = 1 << 20;

/// The system's NVML, or the one that the settings name.
pub(crate) struct NvmlGpus {
    library: String,
    nvml: Option<Nvml>,
    /// Uuid by index, for cards that stop answering.
    known: BTreeMap<u32, String>,
}

impl NvmlGpus {
    /// Loads nothing yet. `library`: path or name; empty takes the system's.
    pub(crate) fn new(library: &str) -> Self {
        let library = if library.is_empty() { "libnvidia-ml.so.1" } else { library };
        Self { library: library.into(), nvml: None, known: BTreeMap::new() }
    }
}

impl Gpus for NvmlGpus {
    fn sample(&mut self) -> Result<Vec<v1::Gpu>, String> {
        let nvml = match self.nvml.take() {
            Some(nvml) => nvml,
            None => Nvml::builder()
                .lib_path(OsStr::new(&self.library))
                .init()
                .map_err(|e| format!("NVML ({}) cannot be used: {e}", self.library))?,
        };
        let count = nvml.device_count().map_err(|e| format!("NVML does not count the GPUs: {e}"))?;
        let gpus = (0..count).map(|index| read(&nvml, index, &mut self.known)).collect();
        // Kept only after a whole reading: one that fails above loads the library anew.
        self.nvml = Some(nvml);
        Ok(gpus)
    }
}

fn read(nvml: &Nvml, index: u32, known: &mut BTreeMap<u32, String>) -> v1::Gpu {
    let reading = nvml.device_by_index(index).and_then(|device| read_device(&device));
    match reading {
        Ok(gpu) => {
            known.insert(index, gpu.uuid.clone());
            gpu
        }
        Err(error) => v1::Gpu {
            uuid: known.get(&index).cloned().unwrap_or_else(|| format!("GPU-at-index-{index}")),
            fault: format!("NVML cannot read it: {error}"),
            ..v1::Gpu::default()
        },
    }
}

fn read_device(device: &Device<'_>) -> Result<v1::Gpu, NvmlError> {
    let memory = device.memory_info()?;
    Ok(v1::Gpu {
        uuid: device.uuid()?,
        name: device.name()?,
        memory_total_mib: memory.total / MIB,
        memory_used_mib: memory.used / MIB,
        utilization_percent: device.utilization_rates().map(|u| u.gpu).unwrap_or_default(),
        temperature_c: device.temperature(TemperatureSensor::Gpu).unwrap_or_default(),
        fault: String::new(),
        numa_node: device.pci_info().ok().and_then(|pci| numa_node(&pci.bus_id)),
        link_group: String::new(),
    })
}

/// The NUMA node of a PCI device, as the kernel has it; None where it does not say (it writes -1 then).
fn numa_node(bus_id: &str) -> Option<u32> {
    // NVML writes 00000000:3B:00.0, the kernel 0000:3b:00.0.
    let (domain, rest) = bus_id.split_once(':')?;
    let domain = domain.get(domain.len().checked_sub(4)?..)?;
    let path = format!("/sys/bus/pci/devices/{domain}:{rest}/numa_node").to_ascii_lowercase();
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}
