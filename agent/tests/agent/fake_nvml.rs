//! A small fake of NVIDIA's management library. It is no module of the tests: they compile it with `rustc` into a shared
//! library ([`crate::nvml`]) that the agent loads instead of the real one.
//!
//! It reads what it pretends from the file `LIBRARY.script` beside itself at each call, lines of `KEY=VALUE`:
//! `gpus=2`; for GPU N `N.FIGURE=VALUE`, and `N.lost=1`; `event=COUNT:N:XID` is told once for each new COUNT; `hang=1` keeps
//! readings of the temperature from returning. What it was called for at its beginning and end goes to `LIBRARY.calls`.
//!
//! `--cfg old` leaves out what older drivers do not have, `--cfg ancient` also what no reading can do without.

#![allow(unused, non_snake_case, clippy::all)]

use std::{
    ffi::{c_char, c_int, c_uint, c_ulonglong, c_void},
    fs,
    io::Write,
    sync::atomic::{AtomicU64, Ordering},
    thread::sleep,
    time::{Duration, Instant},
};

type Device = *mut c_void;
type Code = c_uint;

const OK: Code = 0;
const INVALID: Code = 2;
const NOT_SUPPORTED: Code = 3;
const NOT_FOUND: Code = 6;
const TOO_SMALL: Code = 7;
const TIMEOUT: Code = 10;
const LOST: Code = 15;
/// Handles of parts of GPUs: this, and the GPU's number.
const PART: usize = 0x100;

static TOLD: AtomicU64 = AtomicU64::new(0);

/// The path that this library was loaded from.
fn own_path() -> String {
    let own = own_path as *const () as usize;
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for line in maps.lines() {
        let mut fields = line.split_ascii_whitespace();
        let Some((from, to)) = fields.next().and_then(|range| range.split_once('-')) else { continue };
        let (from, to) = (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16));
        if from.is_ok_and(|from| from <= own) && to.is_ok_and(|to| own < to) {
            return line.find('/').map(|at| line[at..].to_owned()).unwrap_or_default();
        }
    }
    String::new()
}

fn said(key: &str) -> Option<String> {
    let script = fs::read_to_string(format!("{}.script", own_path())).unwrap_or_default();
    let value = |line: &str| Some(line.strip_prefix(key)?.strip_prefix('=')?.trim().to_owned());
    script.lines().rev().find_map(value)
}

fn number(key: &str) -> Option<u64> {
    said(key)?.parse().ok()
}

fn called(what: &str) {
    let path = format!("{}.calls", own_path());
    if let Ok(mut file) = fs::OpenOptions::new().create(true).append(true).open(path) {
        writeln!(file, "{what}").ok();
    }
}

/// The GPU's number, or why there is none to be read.
fn gpu(device: Device) -> Result<usize, Code> {
    let index = (device as usize).wrapping_sub(1) & 0xff;
    match number(&format!("{index}.lost")) {
        Some(1) => Err(LOST),
        _ => Ok(index),
    }
}

/// Writes the figure of the GPU, as far as the script has it.
unsafe fn figure<T: TryFrom<u64>>(device: Device, name: &str, out: *mut T) -> Code {
    let index = match gpu(device) {
        Ok(index) => index,
        Err(code) => return code,
    };
    match number(&format!("{index}.{name}")).and_then(|value| T::try_from(value).ok()) {
        Some(value) => {
            unsafe { *out = value };
            OK
        }
        None => NOT_SUPPORTED,
    }
}

unsafe fn text(to: *mut c_char, size: usize, text: &str) -> Code {
    if text.len() >= size {
        return TOO_SMALL;
    }
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), to, text.len());
        *to.add(text.len()) = 0;
    }
    OK
}

#[no_mangle]
pub extern "C" fn nvmlInit_v2() -> Code {
    called("init");
    OK
}

#[no_mangle]
pub extern "C" fn nvmlShutdown() -> Code {
    called("shutdown");
    OK
}

#[no_mangle]
pub unsafe extern "C" fn nvmlSystemGetDriverVersion(to: *mut c_char, size: c_uint) -> Code {
    unsafe { text(to, size as usize, "570.86.15") }
}

#[no_mangle]
pub unsafe extern "C" fn nvmlSystemGetCudaDriverVersion_v2(version: *mut c_int) -> Code {
    unsafe { *version = 12_080 };
    OK
}

#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetCount_v2(count: *mut c_uint) -> Code {
    unsafe { *count = number("gpus").unwrap_or(2) as c_uint };
    OK
}

#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, device: *mut Device) -> Code {
    unsafe { *device = (index as usize + 1) as Device };
    OK
}

#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetUUID(device: Device, to: *mut c_char, size: c_uint) -> Code {
    let kind = if device as usize >= PART { "MIG" } else { "GPU" };
    match gpu(device) {
        Ok(index) => unsafe { text(to, size as usize, &format!("{kind}-fake-{index}")) },
        Err(code) => code,
    }
}

#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetName(device: Device, to: *mut c_char, size: c_uint) -> Code {
    let name = if device as usize >= PART { "Fake GPU MIG 1g.10gb" } else { "Fake GPU" };
    match gpu(device) {
        Ok(_) => unsafe { text(to, size as usize, name) },
        Err(code) => code,
    }
}

#[repr(C)]
pub struct Memory {
    version: c_uint,
    total: c_ulonglong,
    reserved: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

#[cfg(not(ancient))]
#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetMemoryInfo_v2(device: Device, memory: *mut Memory) -> Code {
    let index = match gpu(device) {
        Ok(index) => index,
        Err(code) => return code,
    };
    let mib = 1u64 << 20;
    let used = number(&format!("{index}.used")).unwrap_or_else(|| processes(index).iter().map(|p| p.1).sum()) * mib;
    let total = if device as usize >= PART { 10_240 * mib } else { 81_920 * mib };
    unsafe {
        ((*memory).total, (*memory).used, (*memory).free) = (total, used, total - used);
    }
    OK
}

#[repr(C)]
pub struct Pci {
    legacy: [c_char; 16],
    domain: c_uint,
    bus: c_uint,
    device: c_uint,
    id: c_uint,
    subsystem: c_uint,
    bus_id: [c_char; 32],
}

unsafe fn pci(index: usize, pci: *mut Pci) -> Code {
    unsafe { text((*pci).bus_id.as_mut_ptr(), 32, &format!("00000000:{:02X}:00.0", 0x1a + index)) }
}

#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetPciInfo_v3(device: Device, out: *mut Pci) -> Code {
    match gpu(device) {
        Ok(index) => unsafe { pci(index, out) },
        Err(code) => code,
    }
}

#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetUtilizationRates(device: Device, rates: *mut [c_uint; 2]) -> Code {
    unsafe { figure(device, "utilization", rates.cast::<c_uint>()) }
}

#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetTemperature(device: Device, _: c_uint, out: *mut c_uint) -> Code {
    while said("hang").is_some_and(|hang| hang == "1") {
        sleep(Duration::from_millis(10));
    }
    unsafe { figure(device, "temperature", out) }
}

#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetTemperatureThreshold(device: Device, which: c_uint, out: *mut c_uint) -> Code {
    unsafe { figure(device, if which == 0 { "shutdown" } else { "slowdown" }, out) }
}

#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetPowerUsage(device: Device, out: *mut c_uint) -> Code {
    unsafe { figure(device, "power", out) }
}

#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetEnforcedPowerLimit(device: Device, out: *mut c_uint) -> Code {
    unsafe { figure(device, "power_limit", out) }
}

#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetClockInfo(device: Device, which: c_uint, out: *mut c_uint) -> Code {
    unsafe { figure(device, if which == 1 { "sm_clock" } else { "memory_clock" }, out) }
}

#[cfg(not(old))]
#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetCurrentClocksThrottleReasons(device: Device, out: *mut c_ulonglong) -> Code {
    unsafe { figure(device, "throttle", out) }
}

#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetTotalEccErrors(
    device: Device,
    error: c_uint,
    counter: c_uint,
    out: *mut c_ulonglong,
) -> Code {
    let name = ["corrected", "uncorrected"][error as usize & 1];
    let when = ["", "_ever"][counter as usize & 1];
    unsafe { figure(device, &format!("{name}{when}"), out) }
}

#[repr(C)]
pub struct Field {
    id: c_uint,
    scope: c_uint,
    timestamp: i64,
    latency: i64,
    kind: c_uint,
    code: Code,
    value: u64,
}

#[cfg(not(old))]
#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetFieldValues(device: Device, count: c_int, fields: *mut Field) -> Code {
    let index = match gpu(device) {
        Ok(index) => index,
        Err(code) => return code,
    };
    for at in 0..count as usize {
        let field = unsafe { &mut *fields.add(at) };
        let name = match field.id {
            144 => "remap_pending",
            145 => "remap_failed",
            230 => "recovery",
            _ => return INVALID,
        };
        (field.kind, field.code) = (1, NOT_SUPPORTED);
        if let Some(value) = number(&format!("{index}.{name}")) {
            (field.value, field.code) = (value, OK);
        }
    }
    OK
}

#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetPcieReplayCounter(device: Device, out: *mut c_uint) -> Code {
    unsafe { figure(device, "replays", out) }
}

/// `PID:MIB,PID:MIB`
fn processes(index: usize) -> Vec<(u32, u64)> {
    let text = said(&format!("{index}.processes")).unwrap_or_default();
    let one = |part: &str| {
        let (pid, mib) = part.split_once(':')?;
        Some((pid.parse().ok()?, mib.parse().ok()?))
    };
    text.split(',').filter_map(one).collect()
}

#[repr(C)]
pub struct Process {
    pid: c_uint,
    used: c_ulonglong,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

#[cfg(not(old))]
#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetComputeRunningProcesses_v3(
    device: Device,
    count: *mut c_uint,
    out: *mut Process,
) -> Code {
    let index = match gpu(device) {
        Ok(index) => index,
        Err(code) => return code,
    };
    let all = processes(index);
    let room = unsafe { std::mem::replace(&mut *count, all.len() as c_uint) };
    if all.is_empty() {
        return OK;
    }
    if out.is_null() || (room as usize) < all.len() {
        return TOO_SMALL;
    }
    for (at, (pid, mib)) in all.into_iter().enumerate() {
        let process = Process { pid, used: mib << 20, gpu_instance: u32::MAX, compute_instance: u32::MAX };
        unsafe { out.add(at).write(process) };
    }
    OK
}

#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetMigMode(device: Device, now: *mut c_uint, pending: *mut c_uint) -> Code {
    unsafe {
        *pending = 0;
        figure(device, "mig", now)
    }
}

#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetMaxMigDeviceCount(_: Device, count: *mut c_uint) -> Code {
    unsafe { *count = 7 };
    OK
}

#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetMigDeviceHandleByIndex(device: Device, index: c_uint, part: *mut Device) -> Code {
    // Indexes have gaps.
    if index != 2 {
        return NOT_FOUND;
    }
    unsafe { *part = (device as usize + PART) as Device };
    OK
}

#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetNvLinkState(device: Device, link: c_uint, active: *mut c_uint) -> Code {
    if link > 1 {
        return INVALID;
    }
    unsafe { figure(device, "nvlink", active) }
}

#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetNvLinkRemotePciInfo_v2(device: Device, _: c_uint, out: *mut Pci) -> Code {
    match gpu(device) {
        Ok(index) => unsafe { pci(1 - index.min(1), out) },
        Err(code) => code,
    }
}

#[cfg(not(old))]
#[no_mangle]
pub unsafe extern "C" fn nvmlEventSetCreate(set: *mut *mut c_void) -> Code {
    unsafe { *set = 0x1000 as *mut c_void };
    OK
}

#[cfg(not(old))]
#[no_mangle]
pub extern "C" fn nvmlEventSetFree(_: *mut c_void) -> Code {
    called("free");
    OK
}

#[cfg(not(old))]
#[no_mangle]
pub unsafe extern "C" fn nvmlDeviceGetSupportedEventTypes(_: Device, types: *mut c_ulonglong) -> Code {
    unsafe { *types = 0x1f };
    OK
}

#[cfg(not(old))]
#[no_mangle]
pub extern "C" fn nvmlDeviceRegisterEvents(_: Device, _: c_ulonglong, _: *mut c_void) -> Code {
    OK
}

#[repr(C)]
pub struct Event {
    device: Device,
    kind: c_ulonglong,
    data: c_ulonglong,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

#[cfg(not(old))]
#[no_mangle]
pub unsafe extern "C" fn nvmlEventSetWait_v2(_: *mut c_void, event: *mut Event, timeout_ms: c_uint) -> Code {
    let deadline = Instant::now() + Duration::from_millis(timeout_ms.into());
    loop {
        let text = said("event").unwrap_or_default();
        let parts: Vec<u64> = text.split(':').filter_map(|part| part.parse().ok()).collect();
        if let [count, index, xid] = parts[..] {
            if TOLD.fetch_max(count, Ordering::Relaxed) < count {
                unsafe {
                    (*event).device = (index as usize + 1) as Device;
                    ((*event).kind, (*event).data) = (8, xid);
                }
                return OK;
            }
        }
        if Instant::now() >= deadline {
            return TIMEOUT;
        }
        sleep(Duration::from_millis(10));
    }
}
