//! Real GPUs, through NVIDIA's management library, which is loaded at run time: the same binary starts on any host.
//!
//! While the library or the driver cannot be had, each reading tries again to load it: a driver may come up after the agent.
//! [`read`] reads one card, [`links`] finds out which reach each other by NVLink, and [`events`] waits for XIDs in a thread
//! of its own. What a card or an older driver does not offer is absent in the reading, not 0; what no reading can do
//! without is asked for when the library is loaded, and missed in words.

mod events;
mod links;
mod read;

use std::{collections::BTreeMap, ffi::OsStr, sync::Arc};

use nvml_wrapper::Nvml;
use penstock_proto::v1;
use tokio::sync::Notify;

use self::events::Listener;
use super::{Driver, Gpus, Reading};

const MIB: u64 = 1 << 20;
/// The first driver with everything that a reading needs.
const OLDEST_DRIVER: &str = "510";

/// The system's NVML, or the one that the settings name.
pub(crate) struct NvmlGpus {
    library: String,
    open: Option<Open>,
    /// The last good reading of each index, for cards that stop answering.
    known: BTreeMap<u32, v1::Gpu>,
    wake: Arc<Notify>,
}

/// A library that was loaded.
struct Open {
    /// Dropped before the library.
    listener: Option<Listener>,
    driver: Driver,
    /// By index.
    links: BTreeMap<u32, String>,
    nvml: Arc<Nvml>,
}

impl NvmlGpus {
    /// Loads nothing yet. `library`: path or name; empty takes the system's. `wake` is told of XIDs.
    pub(crate) fn new(library: &str, wake: Arc<Notify>) -> Self {
        let library = if library.is_empty() { "libnvidia-ml.so.1" } else { library };
        Self { library: library.into(), open: None, known: BTreeMap::new(), wake }
    }

    fn load(&self) -> Result<Open, String> {
        let nvml = Nvml::builder()
            .lib_path(OsStr::new(&self.library))
            .init()
            .map_err(|e| format!("NVML ({}) cannot be used: {e}", self.library))?;
        let missing = missing(&nvml);
        if !missing.is_empty() {
            // Dropping it would call one of them.
            std::mem::forget(nvml);
            return Err(format!(
                "NVML ({}) is too old: it has no {}; driver {OLDEST_DRIVER} or newer is needed",
                self.library,
                missing.join(", ")
            ));
        }
        let nvml = Arc::new(nvml);
        let cuda = nvml.sys_cuda_driver_version().ok().map(|version| {
            let (major, minor) = (
                nvml_wrapper::cuda_driver_version_major(version),
                nvml_wrapper::cuda_driver_version_minor(version),
            );
            format!("{major}.{minor}")
        });
        let version = nvml.sys_driver_version().unwrap_or_default();
        let driver = Driver { version, cuda: cuda.unwrap_or_default() };
        let links = links::groups(&nvml);
        let listener = events::listen(&nvml, self.wake.clone());
        Ok(Open { listener, driver, links, nvml })
    }
}

/// What no reading can do without.
fn missing(nvml: &Nvml) -> Vec<&'static str> {
    let lib = nvml.lib();
    let needed = [
        ("nvmlShutdown", lib.nvmlShutdown.is_ok()),
        ("nvmlDeviceGetCount_v2", lib.nvmlDeviceGetCount_v2.is_ok()),
        ("nvmlDeviceGetHandleByIndex_v2", lib.nvmlDeviceGetHandleByIndex_v2.is_ok()),
        ("nvmlDeviceGetUUID", lib.nvmlDeviceGetUUID.is_ok()),
        ("nvmlDeviceGetName", lib.nvmlDeviceGetName.is_ok()),
        ("nvmlDeviceGetMemoryInfo_v2", lib.nvmlDeviceGetMemoryInfo_v2.is_ok()),
    ];
    needed.into_iter().filter(|(_, there)| !there).map(|(name, _)| name).collect()
}

impl Gpus for NvmlGpus {
    fn sample(&mut self) -> Result<Reading, String> {
        let mut open = match self.open.take() {
            Some(open) => open,
            None => self.load()?,
        };
        let count = open.nvml.device_count().map_err(|e| format!("NVML does not count the GPUs: {e}"))?;
        let cards = (0..count).map(|index| {
            let link = open.links.get(&index).map_or("", String::as_str);
            read::card(&open.nvml, index, link, &mut self.known)
        });
        let cards = cards.collect();
        let xids = open.listener.as_mut().map(Listener::take).unwrap_or_default();
        let driver = open.driver.clone();
        // Kept only after a whole reading: one that fails above loads the library anew.
        self.open = Some(open);
        Ok(Reading { cards, xids, driver })
    }

    fn close(&mut self) {
        self.open = None;
    }
}
