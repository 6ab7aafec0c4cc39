//! XIDs as they happen: a thread of its own waits for the driver's events, each time for a bounded while.
//!
//! The thread holds the library open by itself. It ends within one wait after it was told to; a driver that hangs in a wait
//! keeps the thread, and nothing else. Events that nobody takes are dropped beyond a bound: an XID that repeats that fast
//! has said what it has to say.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nvml_wrapper::{EventSet, Nvml, bitmasks::event::EventTypes, enums::event::XidError, error::NvmlError};
use tokio::sync::Notify;

use crate::gpu::XidSeen;

/// Longest wait of one call.
const WAIT_MS: u32 = 250;
/// How long its end is waited for.
const END: Duration = Duration::from_millis(1_500);
/// Events that wait to be taken.
const WAITING: usize = 256;
/// Pause after an error that is none of a wait's usual ends.
const PAUSE: Duration = Duration::from_secs(1);
/// What NVML says for an XID that it does not know.
const UNKNOWN: u32 = 999;

/// The thread, and what it heard.
pub(super) struct Listener {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    heard: Receiver<XidSeen>,
}

/// Listens to every GPU that tells of XIDs. None, with a line in the log: this library or these cards do not.
pub(super) fn listen(nvml: &Arc<Nvml>, wake: Arc<Notify>) -> Option<Listener> {
    let lib = nvml.lib();
    let needed = [
        lib.nvmlEventSetCreate.is_ok(),
        lib.nvmlEventSetFree.is_ok(),
        lib.nvmlEventSetWait_v2.is_ok(),
        lib.nvmlDeviceRegisterEvents.is_ok(),
        lib.nvmlDeviceGetSupportedEventTypes.is_ok(),
    ];
    if needed.contains(&false) {
        tracing::warn!("this NVML tells of no events: XIDs are not seen; readings are judged all the same");
        return None;
    }
    let (tell, heard) = sync_channel(WAITING);
    let stop = Arc::new(AtomicBool::new(false));
    let (nvml, stopped) = (Arc::clone(nvml), Arc::clone(&stop));
    let thread = std::thread::Builder::new()
        .name("gpu-events".into())
        .spawn(move || run(&nvml, &tell, &wake, &stopped))
        .inspect_err(|error| tracing::error!(%error, "cannot start a thread for GPU events"))
        .ok()?;
    Some(Listener { stop, thread: Some(thread), heard })
}

impl Listener {
    /// What was heard since the last call.
    pub(super) fn take(&mut self) -> Vec<XidSeen> {
        self.heard.try_iter().collect()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { return };
        let begun = Instant::now();
        while !thread.is_finished() {
            if begun.elapsed() >= END {
                tracing::error!("the driver hangs in a wait for GPU events; the thread is left behind");
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        if thread.join().is_err() {
            tracing::error!("the thread for GPU events broke");
        }
    }
}

fn run(nvml: &Nvml, tell: &SyncSender<XidSeen>, wake: &Notify, stop: &AtomicBool) {
    let set = match register(nvml) {
        Ok(Some(set)) => set,
        Ok(None) => return tracing::info!("no GPU here tells of XIDs"),
        Err(error) => return tracing::error!(%error, "GPU events cannot be waited for: XIDs are not seen"),
    };
    let mut failed = false;
    while !stop.load(Ordering::Relaxed) {
        match set.wait(WAIT_MS) {
            Ok(event) => {
                failed = false;
                let Some(xid) = event.event_data else { continue };
                let xid = match xid {
                    XidError::Value(value) => u32::try_from(value).unwrap_or(UNKNOWN),
                    XidError::Unknown => UNKNOWN,
                };
                // A GPU that has fallen off the bus may not say its name any more.
                let uuid = event.device.uuid().unwrap_or_default();
                let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                let unix_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
                if tell.try_send(XidSeen { uuid, xid, unix_ms }).is_err() {
                    tracing::warn!(xid, "an XID was not taken in: too many wait");
                }
                wake.notify_one();
            }
            Err(NvmlError::Timeout) => {}
            Err(error) => {
                // A lost GPU makes every wait fail; readings tell which it is.
                if !std::mem::replace(&mut failed, true) {
                    tracing::error!(%error, "the driver's events cannot be waited for; trying on");
                    wake.notify_one();
                }
                let until = Instant::now() + PAUSE;
                while Instant::now() < until && !stop.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(u64::from(WAIT_MS)));
                }
            }
        }
    }
}

/// One set for all GPUs that can. A set is lost when a registration fails: then it begins anew without that GPU.
fn register(nvml: &Nvml) -> Result<Option<EventSet<'_>>, NvmlError> {
    let able = |index: &u32| {
        let types = nvml.device_by_index(*index).and_then(|device| device.supported_event_types());
        types.is_ok_and(|types| types.contains(EventTypes::CRITICAL_XID_ERROR))
    };
    let mut indexes: Vec<u32> = (0..nvml.device_count()?).filter(able).collect();
    'anew: while !indexes.is_empty() {
        let mut set = nvml.create_event_set()?;
        for (at, index) in indexes.iter().enumerate() {
            let device = nvml.device_by_index(*index)?;
            set = match device.register_events(EventTypes::CRITICAL_XID_ERROR, set) {
                Ok(set) => set,
                Err(error) => {
                    tracing::warn!(index, %error, "this GPU's events cannot be had");
                    indexes.remove(at);
                    continue 'anew;
                }
            };
        }
        return Ok(Some(set));
    }
    Ok(None)
}
