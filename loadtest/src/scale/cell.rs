//! One measurement: a proxy that begins empty, in front of simulators, under a load of its own.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use super::Options;
use crate::{
    load::{self, Mark, lengths::whole},
    resume::Engine,
    updates::{Ads, Options as FleetOptions, Proxy},
    usage,
};

/// Engines behind each proxy.
const ENGINES: u32 = 4;
/// Clients that ask for whole answers; large prompts have fewer.
const CLIENTS: u64 = 32;
/// Bytes of all prompts that may be under way.
const UNDER_WAY_BYTES: u64 = 16 << 20;
/// Tokens of whole answers.
const TOKENS: u64 = 16;
/// Before what is measured.
const WARMUP_S: f64 = 1.0;
/// How long a proxy without requests is watched.
const IDLE: Duration = Duration::from_secs(2);
/// CPU time of which a figure can be made.
const LEAST_CPU: Duration = Duration::from_millis(50);
/// How often the memory is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Connections that are opened a second.
const CONNECTS_PER_S: f64 = 1_000.0;

/// What grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Axis {
    /// Open streams.
    Streams,
    /// Endpoints of the pool.
    Endpoints,
    /// API keys.
    Tenants,
    /// Bytes of the prompt.
    Prompt,
}

impl Axis {
    pub(super) const ALL: [Self; 4] = [Self::Streams, Self::Endpoints, Self::Tenants, Self::Prompt];

    /// What it is called.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Streams => "open streams",
            Self::Endpoints => "endpoints in the pool",
            Self::Tenants => "API keys in use",
            Self::Prompt => "bytes of a prompt",
        }
    }

    /// What the CPU time is divided by.
    pub(super) const fn unit(self) -> &'static str {
        match self {
            Self::Streams => "event",
            Self::Endpoints | Self::Tenants | Self::Prompt => "request",
        }
    }

    /// Where it is measured.
    pub(super) fn places(self, options: &Options) -> &[u32] {
        match self {
            Self::Streams => &options.streams,
            Self::Endpoints => &options.endpoints,
            Self::Tenants => &options.tenants,
            Self::Prompt => &options.prompts,
        }
    }
}

/// What was measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measured {
    /// CPU of an event or request, µs.
    pub(super) cpu_us: f64,
    /// How many of them there were.
    pub(super) units: u64,
    /// Share of a core without any requests.
    pub(super) idle: f64,
    /// Most memory while it was under load, bytes.
    pub(super) memory: f64,
}

/// Measures at one place of an axis.
pub(super) async fn measure(options: &Options, axis: Axis, place: u32) -> Result<Measured, String> {
    let mut tasks = JoinSet::new();
    let count = u64::from(place);
    let pause_ms = f64::from(place) * 1e3 / options.events_per_s;
    let flags = match axis {
        Axis::Streams => vec![format!("--sim-itl-ms={pause_ms}"), "--sim-itl-growth-us=0".into()],
        // Room for the prompts that are under way, of a few million tokens.
        _ => vec!["--sim-speed=0".into(), "--sim-kv-blocks=1048576".into()],
    };
    let mut engines = Vec::new();
    for _ in 0..ENGINES {
        engines.push(Engine::start(&options.engine_sim, &FleetOptions::pool(0), &flags).await?);
    }
    let addresses: Vec<SocketAddr> = engines.iter().map(|engine| engine.address).collect();
    let endpoints = if axis == Axis::Endpoints { place } else { ENGINES };
    let fleet = FleetOptions { endpoints, pools: 1, ..FleetOptions::of(options.proxy.clone()) };
    let keys = if axis == Axis::Tenants { Some(Keys::new(place)?) } else { None };

    let ads = Ads::start(&fleet, &addresses, &mut tasks).await?;
    let mut proxy = match &keys {
        None => Proxy::start(&options.proxy, ads.address, &[]).await?,
        Some(keys) => Proxy::start_with(&options.proxy, ads.address, &keys.settings()).await?,
    };
    ads.ready().await?;
    proxy.wait_for_revision(1).await?;
    let idle = idle(&proxy).await?;
    let mut wanted = load::Options {
        url: format!("http://{}", proxy.public),
        model: FleetOptions::pool(0),
        streams: CLIENTS,
        tokens: TOKENS,
        unary: true,
        prompt_bytes: 1_000,
        connect_ramp_ms: 200,
        warmup_s: WARMUP_S,
        duration_s: WARMUP_S + options.seconds,
        api_keys: keys.as_ref().map(Keys::plain),
        ..load::Options::default()
    };
    match axis {
        Axis::Streams => {
            let ramp_s = f64::from(place) / CONNECTS_PER_S;
            wanted.streams = count;
            wanted.unary = false;
            wanted.connect_ramp_ms = whole(ramp_s * 1e3);
            wanted.warmup_s = ramp_s + WARMUP_S;
            wanted.duration_s = wanted.warmup_s + options.seconds;
            // Each is open from its beginning to the end of what is measured, and a little longer.
            wanted.tokens = tokens(wanted.duration_s + 1.0, pause_ms);
        }
        Axis::Prompt => {
            wanted.prompt_bytes = place as usize;
            wanted.streams = (UNDER_WAY_BYTES / count.max(1)).clamp(2, CLIENTS);
        }
        Axis::Endpoints | Axis::Tenants => {}
    }
    let measured = loaded(&proxy, axis, wanted).await;
    proxy.stop().await?;
    Ok(Measured { idle, ..measured? })
}

/// Tokens of a stream that lasts so long.
fn tokens(seconds: f64, pause_ms: f64) -> u64 {
    whole((seconds * 1e3 / pause_ms).ceil()).max(1)
}

/// What a load takes; nothing of the time before it.
async fn loaded(proxy: &Proxy, axis: Axis, wanted: load::Options) -> Result<Measured, String> {
    let pid = proxy.pid();
    let mut cpu = Vec::new();
    let mut most = proxy.memory()?;
    let report = {
        let loading = load::run_with(wanted, |_: Mark| cpu.push(usage::cpu(pid)));
        tokio::pin!(loading);
        loop {
            tokio::select! {
                done = &mut loading => break done.map_err(|e| e.to_string())?,
                () = sleep(LOOK) => most = most.max(proxy.memory()?),
            }
        }
    };
    if !report.is_good() {
        return Err(format!("the load was not good\n{}", report.table()));
    }
    let mut cpu = cpu.into_iter();
    let (Some(before), Some(after)) = (cpu.next(), cpu.next()) else { return Err("no measured part".into()) };
    let used = after?.saturating_sub(before?);
    let counts = report.window.counts;
    let units = if axis == Axis::Streams { counts.events } else { counts.good };
    // The kernel tells CPU time by hundredths of a second.
    if units == 0 || used < LEAST_CPU {
        let why = format!("{units} {}s and {used:?} of CPU are too little to measure", axis.unit());
        return Err(format!("{why}: take more --seconds\n{}", report.table()));
    }
    Ok(Measured { cpu_us: used.as_secs_f64() * 1e6 / units as f64, units, idle: 0.0, memory: most as f64 })
}

/// The share of a core that it takes without requests.
async fn idle(proxy: &Proxy) -> Result<f64, String> {
    let (before, began) = (proxy.cpu()?, Instant::now());
    sleep(IDLE).await;
    let used = proxy.cpu()?.saturating_sub(before);
    Ok(used.as_secs_f64() / began.elapsed().as_secs_f64())
}

/// API keys: as clients have them, and as the proxy is told.
struct Keys(TempDir);

impl Keys {
    fn new(count: u32) -> Result<Self, String> {
        let folder = tempfile::tempdir().map_err(|e| format!("cannot make a folder: {e}"))?;
        let key = |number: u32| format!("key-{number:06}");
        let plain: String = (0..count).map(|number| key(number) + "\n").collect();
        let entry = |number: u32| {
            let hash: String = Sha256::digest(key(number)).iter().map(|byte| format!("{byte:02x}")).collect();
            format!("\"tenant-{number:06}:{hash}\",\n")
        };
        let settings = format!("[auth]\nkeys = [\n{}]\n", (0..count).map(entry).collect::<String>());
        let keys = Self(folder);
        for (path, text) in [(keys.plain(), plain), (keys.settings(), settings)] {
            std::fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
        }
        Ok(keys)
    }

    fn plain(&self) -> PathBuf {
        self.0.path().join("keys")
    }

    fn settings(&self) -> PathBuf {
        self.0.path().join("proxy.toml")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_as_long_as_it_has_to_be() {
        assert_eq!((tokens(10.0, 25.0), tokens(10.1, 2_000.0), tokens(0.1, 2_000.0)), (400, 6, 1));
    }

    #[test]
    fn keys_are_told_as_hashes() {
        let keys = Keys::new(2).unwrap();
        assert_eq!(std::fs::read_to_string(keys.plain()).unwrap(), "key-000000\nkey-000001\n");
        let settings = std::fs::read_to_string(keys.settings()).unwrap();
        let parsed: toml::Value = toml::from_str(&settings).unwrap();
        let entries = parsed["auth"]["keys"].as_array().unwrap();
        assert!(entries.len() == 2 && entries[0].as_str().unwrap().len() == "tenant-000000:".len() + 64);
    }
}
