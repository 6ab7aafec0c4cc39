//! The simulator's own flags: one table from which they are parsed and explained.

use std::path::PathBuf;

use super::{
    args::SimOptions,
    faults::{Fault, FaultKind},
};

/// One flag.
pub(super) struct SimFlag {
    /// Name without the dashes in front.
    pub(super) name: &'static str,
    /// What its value is called; empty = a switch.
    pub(super) value: &'static str,
    /// One line for `--help`.
    pub(super) help: &'static str,
    /// Sets it.
    pub(super) set: fn(&mut SimOptions, &str) -> Result<(), String>,
}

/// Longest time a flag may name: a day, in ms.
const DAY_MS: f64 = 86_400_000.0;

fn float(value: &str, max: f64) -> Result<f64, String> {
    let number = value.parse::<f64>().ok().filter(|n| n.is_finite() && (0.0..=max).contains(n));
    number.ok_or_else(|| format!("`{value}` is not a number from 0 to {max}"))
}

fn int(value: &str, min: u64, max: u64) -> Result<u64, String> {
    let number = value.parse::<u64>().ok().filter(|n| (min..=max).contains(n));
    number.ok_or_else(|| format!("`{value}` is not a whole number from {min} to {max}"))
}

fn size(value: &str, min: u64, max: u64) -> Result<usize, String> {
    int(value, min, max).and_then(|n| usize::try_from(n).map_err(|e| e.to_string()))
}

/// All of them.
pub(super) const SIM_FLAGS: &[SimFlag] = &[
    SimFlag {
        name: "sim-load-ms",
        value: "MS",
        help: "time until the port opens (200)",
        set: |o, v| int(v, 0, 86_400_000).map(|n| o.load_ms = n),
    },
    SimFlag {
        name: "sim-ttft-ms",
        value: "MS",
        help: "base of the time to the first token (10)",
        set: |o, v| float(v, DAY_MS).map(|n| o.ttft_ms = n),
    },
    SimFlag {
        name: "sim-prefill-tokens-per-s",
        value: "N",
        help: "uncached prompt tokens computed per second; 0 = at once (4000000)",
        set: |o, v| int(v, 0, u64::MAX).map(|n| o.prefill_tokens_per_s = n),
    },
    SimFlag {
        name: "sim-itl-ms",
        value: "MS",
        help: "base of the time between tokens (5)",
        set: |o, v| float(v, DAY_MS).map(|n| o.itl_ms = n),
    },
    SimFlag {
        name: "sim-itl-growth-us",
        value: "US",
        help: "added to it per running request (20)",
        set: |o, v| float(v, DAY_MS).map(|n| o.itl_growth_us = n),
    },
    SimFlag {
        name: "sim-jitter-percent",
        value: "N",
        help: "variation of the time between tokens, either way (10)",
        set: |o, v| int(v, 0, 100).map(|n| o.jitter_percent = n),
    },
    SimFlag {
        name: "sim-jitter-seed",
        value: "N",
        help: "seed of that variation (0)",
        set: |o, v| int(v, 0, u64::MAX).map(|n| o.jitter_seed = n),
    },
    SimFlag {
        name: "sim-speed",
        value: "FACTOR",
        help: "divides these times; 0 = tokens as fast as they are read (1)",
        set: |o, v| match float(v, 1e6)? {
            n if n > 0.0 && n < 1e-6 => Err(format!("`{v}` is neither 0 nor at least 0.000001")),
            n => {
                o.speed = n;
                Ok(())
            }
        },
    },
    SimFlag {
        name: "sim-burst",
        value: "N",
        help: "events per write when several are due (1)",
        set: |o, v| size(v, 1, 1024).map(|n| o.burst = n),
    },
    SimFlag {
        name: "sim-stamp",
        value: "N",
        help: "put the time of its writing into every N-th event of a stream, as sim_ns; 0 = none (0)",
        set: |o, v| int(v, 0, u64::MAX).map(|n| o.stamp = n),
    },
    SimFlag {
        name: "sim-kv-blocks",
        value: "N",
        help: "KV blocks of 16 tokens (65536)",
        set: |o, v| size(v, 1, 1 << 32).map(|n| o.kv_blocks = n),
    },
    SimFlag {
        name: "sim-no-core",
        value: "",
        help: "no EngineCore process",
        set: |o, _| {
            o.core = false;
            Ok(())
        },
    },
    SimFlag {
        name: "sim-fault",
        value: "KIND[:KEY=VALUE,...]",
        help: "a fault from the start; may be repeated (see /sim/faults)",
        set: |o, v| Fault::parse(v).map(|f| o.faults.push(f)),
    },
    SimFlag {
        name: "sim-announce",
        value: "FILE",
        help: "write {\"address\",\"pid\",\"core_pid\"} there when ready",
        set: |o, v| {
            o.announce = Some(PathBuf::from(v));
            Ok(())
        },
    },
    SimFlag {
        name: "sim-dev-mode",
        value: "",
        help: "open /sleep, /pause and the like, as VLLM_SERVER_DEV_MODE=1 does",
        set: |o, _| {
            o.dev_mode = true;
            Ok(())
        },
    },
    SimFlag {
        name: "sim-sigterm",
        value: "abort|error",
        help: "how streams end on SIGTERM when --shutdown-timeout is 0 (abort)",
        set: |o, v| {
            o.sigterm = match v {
                "abort" => FaultKind::Abort,
                "error" => FaultKind::Error,
                _ => return Err(format!("`{v}` is neither abort nor error")),
            };
            Ok(())
        },
    },
    SimFlag {
        name: "sim-records",
        value: "N",
        help: "requests remembered for /sim/requests (1024)",
        set: |o, v| size(v, 0, 1 << 20).map(|n| o.records = n),
    },
    SimFlag {
        name: "sim-sha256",
        value: "",
        help: "compute SHA-256 of request bodies for /sim/requests",
        set: |o, _| {
            o.sha256 = true;
            Ok(())
        },
    },
    SimFlag {
        name: "sim-reasoning-tokens",
        value: "N",
        help: "first tokens of each chat answer that are reasoning (0)",
        set: |o, v| int(v, 0, u64::from(u32::MAX)).map(|n| o.reasoning_tokens = n),
    },
    SimFlag {
        name: "sim-tool-call-tokens",
        value: "N",
        help: "tokens behind them that are a call of the request's first tool, if it has one (0)",
        set: |o, v| int(v, 0, u64::from(u32::MAX)).map(|n| o.tool_call_tokens = n),
    },
];
