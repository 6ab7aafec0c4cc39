//! The load generator's open loop, sessions, TLS and HTTP/2, against real simulators.
#![allow(clippy::unwrap_used)]

mod engine_support;
mod load_support;

use std::{io::Write, sync::atomic::Ordering, time::Duration};

use engine_support::Sim;
use nix::sys::signal::Signal;
use penstock_loadtest::load::{Arrivals, Mark, Options, Report, lengths::Lengths, run, run_with};

async fn load(sim: &Sim, options: Options) -> Report {
    run(Options { url: sim.url(""), connect_ramp_ms: 0, ..options }).await.unwrap()
}

/// Tokens stop for a while, and with them all that arrives meanwhile: two places, so nearly all of it is sent only later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_engine_shows_in_times_from_the_intended_start() {
    const STALL: Duration = Duration::from_millis(1_500);
    let sim = Sim::start(&["--sim-ttft-ms", "5", "--sim-itl-ms", "1", "--sim-itl-growth-us", "0"]);
    let options = Options {
        url: sim.url(""),
        arrivals: Arrivals::Constant(50.0),
        requests: 150,
        max_in_flight: 2,
        tokens: 3,
        ..Options::default()
    };
    let loading = tokio::spawn(run(options));
    engine_support::wait_for("the first answers", || sim.state()["requests"].as_u64().unwrap() >= 10);
    sim.signal(sim.core_pid.unwrap(), Signal::SIGSTOP);
    tokio::time::sleep(STALL).await;
    sim.signal(sim.core_pid.unwrap(), Signal::SIGCONT);
    let report = loading.await.unwrap().unwrap();
    assert!(report.is_good() && report.good == 150 && report.not_sent == 0, "{}", report.table());
    let (seen, served) = (report.ttft, report.ttft_service.unwrap());
    // 75 of 150 arrive while it stands still.
    assert!(seen.p90_us > 700_000, "{}", report.table());
    assert!(served.max_us > 1_000_000 && served.p90_us < seen.p90_us / 2, "{}", report.table());
    assert!(report.late.unwrap().p90_us > 500_000, "{}", report.table());
}

#[tokio::test]
async fn what_cannot_be_sent_is_counted() {
    let sim = Sim::start(&["--sim-ttft-ms", "500"]);
    let options = Options {
        arrivals: Arrivals::Batch { rate: 1_000.0, size: 20 },
        requests: 20,
        max_in_flight: 3,
        max_waiting: 4,
        tokens: 2,
        ..Options::default()
    };
    let report = load(&sim, options).await;
    assert_eq!((report.arrived, report.not_sent, report.good, report.failed), (20, 13, 7, 0));
    assert!(report.table().contains("20 arrived, 13 not sent"), "{}", report.table());
}

#[tokio::test]
async fn sessions_hold_their_answers_and_share_prefixes() {
    let sim = Sim::start(&["--sim-itl-ms", "1"]);
    let options = Options {
        streams: 4,
        requests: 48,
        turns: Lengths::Constant(4),
        think_ms: Lengths::Uniform(0, 5),
        output_length: Some(Lengths::Uniform(20, 60)),
        prompt_length: Some(Lengths::LogNormal { median: 100.0, sigma: 0.5 }),
        prefixes: 2,
        prefix_bytes: 2_000,
        threads: 2,
        ..Options::default()
    };
    let report = load(&sim, options).await;
    assert!(report.is_good() && report.good == 48, "{}", report.table());
    let metrics = sim.get("/metrics").text();
    let value = |name: &str| {
        let line = metrics.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    let (queries, hits) = (value("vllm:prefix_cache_queries_total"), value("vllm:prefix_cache_hits_total"));
    // Of each prompt nearly all but the first of each application was there before.
    assert!(hits > 0.6 * queries, "{hits} of {queries}");
}

#[tokio::test]
async fn a_trace_is_replayed() {
    let sim = Sim::start(&["--sim-itl-ms", "1"]);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"at_s,output_tokens\n0,5\n0.1,6\n0.4,7\n").unwrap();
    let options = Options {
        arrivals: Arrivals::Trace,
        trace: Some(file.path().to_path_buf()),
        threads: 2,
        ..Options::default()
    };
    let report = load(&sim, options.clone()).await;
    assert!(report.is_good() && report.elapsed_s >= 0.4, "{}", report.table());
    assert_eq!((report.arrived, report.good, report.tokens_verified), (3, 3, 18));
    file.write_all(b"0.3,1\n").unwrap();
    let refused = run(options).await.unwrap_err().to_string();
    assert!(refused.contains("line 5: at_s is 0.3, before that of the line above"), "{refused}");
}

#[tokio::test]
async fn the_measured_part_is_told_and_stamps_are_read() {
    let sim = Sim::start(&["--sim-itl-ms", "5", "--sim-stamp", "4"]);
    let options = Options {
        url: sim.url(""),
        streams: 20,
        tokens: 40,
        duration_s: 2.0,
        warmup_s: 0.5,
        connect_ramp_ms: 100,
        ..Options::default()
    };
    let mut marks = Vec::new();
    let report = run_with(options, |mark| marks.push(mark)).await.unwrap();
    assert!(report.is_good(), "{}", report.table());
    assert_eq!(marks, [Mark::Began, Mark::Ended]);
    let window = report.window;
    assert!((window.seconds - 1.5).abs() < 1e-6 && window.ended_ns - window.began_ns == 1_500_000_000);
    assert!(window.counts.events > 0 && window.counts.events < report.events);
    assert!(report.total.count < report.good, "answers of the warm-up are not in the times");
    let one_way = report.one_way.unwrap();
    let share = one_way.count as f64 / report.inter_token.count as f64;
    assert!((0.2..0.3).contains(&share), "every fourth is stamped: {share}");
    assert!(one_way.p50_us < 1_000_000 && !report.table().contains("not measured"), "{}", report.table());
    let unstamped = load(&Sim::start(&[]), Options { streams: 1, tokens: 3, ..Options::default() }).await;
    assert!(unstamped.one_way.is_none() && unstamped.table().contains("one-way    not measured"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_and_http2_with_many_streams_on_a_connection() {
    let sim = Sim::start(&["--sim-itl-ms", "2", "--sim-stamp", "8"]);
    let clear = load_support::start(sim.address, None).await;
    let many = Options { streams: 30, requests: 60, tokens: 20, connect_ramp_ms: 0, ..Options::default() };
    let http2 = Options { http2: true, streams_per_connection: 10, ..many.clone() };
    let report = run(Options { url: format!("http://{}", clear.address), ..http2.clone() }).await.unwrap();
    assert!(report.is_good() && report.good == 60 && report.one_way.is_some(), "{}", report.table());
    assert_eq!(clear.connections.load(Ordering::Relaxed), 3);

    let tls = load_support::start(sim.address, Some(&["h2", "http/1.1"])).await;
    let mut ca = tempfile::NamedTempFile::new().unwrap();
    ca.write_all(tls.certificate.as_bytes()).unwrap();
    let trusted = Some(ca.path().to_path_buf());
    let url = format!("https://localhost:{}/v1", tls.address.port());
    for options in [
        Options { url: url.clone(), ca: trusted.clone(), ..http2.clone() },
        Options { url: url.clone(), ca: trusted.clone(), ..many.clone() },
        Options { url: url.clone(), ca: trusted.clone(), unary: true, ..http2.clone() },
        Options { url: url.clone(), insecure: true, unary: true, ..many.clone() },
    ] {
        let report = run(options).await.unwrap();
        assert!(report.is_good() && report.good == 60, "{}", report.table());
    }
    let foreign = load_support::start(sim.address, Some(&["http/1.1"])).await;
    let untrusted = format!("https://localhost:{}", foreign.address.port());
    let report = run(Options { url: untrusted.clone(), ca: trusted, ..many.clone() }).await.unwrap();
    assert!(
        report.good == 0 && report.failures["connect"].example.contains("certificate"),
        "{}",
        report.table()
    );
    let report = run(Options { url: untrusted, insecure: true, ..http2 }).await.unwrap();
    assert!(report.good == 0 && report.failures.contains_key("connect"), "{}", report.table());
    let nobody = run(Options { url, ..many }).await.unwrap_err().to_string();
    assert!(nobody.contains("--ca FILE or --insecure"), "{nobody}");
}

#[tokio::test]
async fn the_command_writes_every_kind_of_report() {
    let sim = Sim::start(&["--sim-itl-ms", "1"]);
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("report.html");
    let command = |args: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_penstock-load"));
        if !args.contains(&"--url") {
            command.args(["--url", &sim.url("")]);
        }
        command.args(["--streams", "3", "--tokens", "9", "--connect-ramp", "0"]);
        let output = command.args(args).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, said, errors) =
        command(&["--html", page.to_str().unwrap(), "--arrivals", "poisson:50", "--requests", "9"]);
    assert!(code == Some(0) && said.contains("9 arrived, 0 not sent") && errors.is_empty(), "{said}{errors}");
    let html = std::fs::read_to_string(&page).unwrap();
    assert!(html.matches("<svg").count() == 2 && html.contains("9 good, 0 failed") && !html.contains("http"));
    let (code, said, _) = command(&["--markdown"]);
    assert!(code == Some(0) && said.contains("| requests | 3 good, 0 failed"), "{said}");
    let (code, said, _) = command(&["--json"]);
    let json: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert!(code == Some(0) && json["window"]["good"] == 3 && json["one_way"].is_null(), "{said}");
    for (args, why) in [
        (&["--arrivals", "poisson"][..], "none of closed"),
        (&["--arrivals", "poisson:5"], "--requests or --duration"),
        (&["--output-length", "uniform:5"], "none of N"),
        (&["--url", "https://x"], "--ca FILE"),
        (&["--trace", "/nonexistent", "--arrivals", "trace"], "--trace /nonexistent: No such file"),
        (&["--json", "--markdown"], "cannot be used with"),
    ] {
        let (code, said, errors) = command(args);
        assert!(code == Some(2) && said.is_empty() && errors.contains(why), "{args:?}: {said}{errors}");
    }
    let (code, _, errors) = command(&["--html", "/nonexistent/page.html"]);
    assert!(code == Some(1) && errors.contains("--html /nonexistent/page.html"), "{errors}");
}
