//! A thousand streams while engines are killed with SIGKILL at random and started again: no stream fails, no token is lost or
//! doubled, each stream's usage is what it was given, and afterwards nothing is counted as under way.
//!
//! What is hit is the whole engine (its connections break) or its core alone (it says so inside the streams). At least one
//! engine is always left. `PENSTOCK_DRILL_SEED` repeats a run's choices, not its timing; `PENSTOCK_DRILL_SECONDS` is how long
//! it is done (60 in docs/drills.md, shorter unless told), `PENSTOCK_DRILL_STREAMS` how many streams there are.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use penstock_loadtest::load::{Options, Report, run};
use serde_json::Value;
use support::{
    Up, client,
    load::{get, until},
};

/// For anything, on a machine that is busy with other tests.
const LONGEST: Duration = Duration::from_secs(120);
const ENGINES: usize = 4;
/// Tokens of a stream, at two a second: a stream sees a few kills.
const TOKENS: u64 = 20;

/// What dies so often is started again at once here, and is never given up.
const SETTINGS: [(&str, &str); 11] = [
    ("PENSTOCK_AGENT__ENGINES__LIVENESS_MS", "200"),
    ("PENSTOCK_AGENT__ENGINES__READY_POLL_MS", "50"),
    ("PENSTOCK_AGENT__ENGINES__ORPHAN_TERM_MS", "300"),
    ("PENSTOCK_AGENT__ENGINES__BACKOFF_MIN_MS", "50"),
    ("PENSTOCK_AGENT__ENGINES__BACKOFF_MAX_MS", "500"),
    ("PENSTOCK_AGENT__ENGINES__STABLE_S", "1"),
    ("PENSTOCK_AGENT__ENGINES__GIVE_UP_RETRY_S", "1"),
    // By the end of a long stream, unlucky ones have lost more engines than any real stream will.
    ("PENSTOCK_PROXY__RESUME__ATTEMPTS", "30"),
    ("PENSTOCK_PROXY__QUEUE__DEADLINE_MS", "60000"),
    // A request that was not answered yet is retried; half of the engines dead at once is no everyday share of retries.
    ("PENSTOCK_PROXY__UPSTREAM__RETRY_PERCENT", "100"),
    ("PENSTOCK_PROXY__UPSTREAM__ATTEMPTS", "10"),
];

fn setting(name: &str, unless: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.map_or(unless, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// A series of the proxy, over all its labels.
async fn metric(up: &Up, name: &str) -> Option<f64> {
    let url = format!("http://{}/metrics", up.address("proxy_private"));
    let text = client().get(url).send().await.ok()?.text().await.ok()?;
    let of_name =
        text.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
    let sum: Option<f64> = of_name.map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum();
    // The sum of nothing is -0.
    sum.map(|sum| sum + 0.0)
}

/// Engines that serve, as the proxy sees them too.
async fn serving(up: &Up) -> Vec<Value> {
    let told = get(&up.address("controlplane"), "/api/v2/endpoints").await.unwrap_or_default();
    let seen = get(&up.address("proxy_private"), "/debug/endpoints").await.unwrap_or_default();
    let seen = seen["models"]["sim-model"].as_array().cloned().unwrap_or_default();
    let known = |e: &&Value| {
        e["state"] == "ready" && seen.iter().any(|s| s["id"] == e["id"] && s["health"]["state"] == "admitted")
    };
    told["endpoints"].as_array().map(|all| all.iter().filter(known).cloned().collect()).unwrap_or_default()
}

/// Kills for so long; how often.
async fn rage(up: &Up, seconds: u64, rng: &mut fastrand::Rng) -> u32 {
    let (began, mut kills) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(seconds) {
        tokio::time::sleep(Duration::from_millis(rng.u64(300..2_500))).await;
        let engines = serving(up).await;
        if engines.len() < 2 {
            continue;
        }
        let Some(state) =
            get(engines[rng.usize(..engines.len())]["address"].as_str().unwrap(), "/sim/state").await
        else {
            continue;
        };
        let part = if rng.u8(..3) == 0 { "core_pid" } else { "pid" };
        let process = i32::try_from(state[part].as_i64().unwrap()).unwrap();
        // Gone already is as good.
        kills += u32::from(kill(Pid::from_raw(process), Signal::SIGKILL).is_ok());
    }
    kills
}

/// Everything that is still counted as under way.
async fn under_way(up: &Up) -> Option<f64> {
    let mut left = metric(up, "penstock_proxy_requests_inflight").await?;
    let seen = get(&up.address("proxy_private"), "/debug/endpoints").await?;
    for endpoint in seen["models"]["sim-model"].as_array()? {
        left += endpoint["inflight"].as_f64()?;
    }
    for engine in serving(up).await {
        let state = get(engine["address"].as_str()?, "/sim/state").await?;
        left += state["in_flight"].as_f64()?;
    }
    Some(left)
}

fn assert_whole(report: &Report, history: &str) {
    assert!(report.failures.is_empty(), "{} failed\n{}\n{history}", report.failed, report.table());
    assert_eq!(report.tokens_verified, report.good * TOKENS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_streams_outlive_their_engines() {
    let seed = setting("PENSTOCK_DRILL_SEED", fastrand::u64(..1 << 32));
    let seconds = setting("PENSTOCK_DRILL_SECONDS", 15);
    let streams = setting("PENSTOCK_DRILL_STREAMS", 1_000);
    println!("PENSTOCK_DRILL_SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let engines = ENGINES.to_string();
    let pace = [
        "--engine-arg=--sim-itl-ms=500",
        "--engine-arg=--sim-itl-growth-us=0",
        "--engine-arg=--sim-load-ms=100",
    ];
    let up = Up::start_with_env(&[&["--engines", &engines][..], &pace].concat(), &SETTINGS);
    until("all engines serve", LONGEST, async || (serving(&up).await.len() == ENGINES).then_some(())).await;

    let options = Options {
        url: up.url(),
        streams,
        tokens: TOKENS,
        // New streams are begun as long as there are kills, and all of them are read to their end.
        duration_s: (seconds + 20) as f64,
        connect_ramp_ms: 3_000,
        idle_timeout_s: LONGEST.as_secs_f64(),
        seed,
        ..Options::default()
    };
    let load = tokio::spawn(run(options));
    until("most streams are open", LONGEST, async || {
        let open = metric(&up, "penstock_proxy_requests_inflight").await?;
        // On a busy machine the last ones wait to be accepted.
        (open >= streams as f64 * 0.5).then_some(())
    })
    .await;
    let kills = rage(&up, seconds, &mut rng).await;
    let report = load.await.unwrap().unwrap();
    let count =
        async |what: &str| metric(&up, &format!("penstock_proxy_{what}_total")).await.unwrap_or_default();
    let (resumed, refused) = (count("resumes").await, count("resume_refusals").await);
    let history = format!(
        "PENSTOCK_DRILL_SEED={seed}: {kills} kills in {seconds} s, {resumed} resumes, {refused} refused"
    );
    println!("{history}\n{}", report.table());
    assert!(kills >= u32::try_from(seconds / 5).unwrap(), "{history}");
    assert!(report.good >= streams, "{history}");
    assert_whole(&report, &history);
    assert!(resumed >= f64::from(kills) && refused == 0.0, "streams were resumed: {history}");
    until("nothing is under way", LONGEST, async || (under_way(&up).await? == 0.0).then_some(())).await;
    up.stop();
}
