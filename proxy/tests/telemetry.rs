//! What is told about requests: the access log, decision records, the private port's views, metrics.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use penstock_config::proxy::ProxyConfig;
use penstock_proxy::{
    private::{self, PrivateState},
    xds::status::XdsStatus,
};
use serde_json::Value;
use support::*;
use tempfile::TempDir;
use tokio::net::TcpListener;

const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":3}}\n\n";

/// A gateway that logs to a file, and its private port.
struct Seen {
    proxy: Proxy,
    private: SocketAddr,
    folder: TempDir,
}

impl Seen {
    async fn start(mut config: ProxyConfig, engines: &[SocketAddr]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        config.telemetry.access_log = folder.path().join("log").display().to_string();
        let proxy = Proxy::start(config, engines);
        let state = PrivateState { gateway: Arc::clone(&proxy.gateway), xds: Arc::new(XdsStatus::default()) };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let private = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, private::router(state)).await });
        Self { proxy, private, folder }
    }

    /// Every line of the log, once there are as many as `count`.
    async fn lines(&self, count: usize) -> Vec<Value> {
        let path = self.folder.path().join("log");
        eventually(&format!("{count} lines"), || lines(&path).len() >= count).await;
        lines(&path)
    }

    async fn get(&self, path: &str) -> (u16, String) {
        get(self.private, path).await
    }

    async fn json(&self, path: &str) -> Value {
        let (status, body) = self.get(path).await;
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut client = Client::connect(address).await;
    client.send(format!("GET {path} HTTP/1.1\r\nhost: p\r\nconnection: close\r\n\r\n").as_bytes()).await;
    let answer = client.read_to_end().await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_owned())
}

fn header<'a>(answer: &'a str, name: &str) -> &'a str {
    answer.lines().find_map(|line| line.strip_prefix(&format!("{name}: "))).expect(name)
}

fn line<'a>(lines: &'a [Value], request_id: &str) -> &'a Value {
    lines.iter().find(|line| line["request_id"] == request_id).expect("its line")
}

fn stream_with_usage() -> Vec<Step> {
    let event = |text: &str| Step::Send(chunk(text).into_bytes());
    vec![
        Step::Send(SSE_HEAD.as_bytes().to_vec()),
        event(&delta("one")),
        Step::Pause(Duration::from_millis(200)),
        event(&delta("two")),
        event(USAGE),
        Step::Send(format!("{}0\r\n\r\n", chunk("data: [DONE]\n\n")).into_bytes()),
    ]
}

#[tokio::test]
async fn a_stream_leaves_its_line_and_its_figures() {
    let engine = Engine::start(|_| stream_with_usage()).await;
    let mut config = ProxyConfig::default();
    let hash = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"; // of "secret"
    config.auth.keys = vec![format!("alice:{hash}")];
    let seen = Seen::start(config, &[engine.address]).await;
    let headers = "connection: close\r\nauthorization: Bearer secret\r\nx-request-id: mine-1\r\n\
                   traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n";
    let body = r#"{"model":"m","stream":true,"messages":[{"role":"user","content":"whisper"}]}"#;
    let answer = seen.proxy.exchange(&post_with(&format!("{CHAT}?token=hidden"), headers, body)).await;
    assert!(answer.contains("[DONE]"), "{answer}");

    let lines = seen.lines(1).await;
    let line = line(&lines, header(&answer, "x-request-id"));
    let expected = serde_json::json!({
        "client": "127.0.0.1", "key": "alice", "method": "POST", "path": CHAT, "route": "chat_completions",
        "model": "m", "deployment": "m", "endpoint": "e0", "attempts": 1, "status": 200, "outcome": "completed",
        "blame": "none", "error": "", "bytes_in": body.len(), "prompt_tokens": 11, "completion_tokens": 3,
        "queue_ms": 0.0, "stream": true, "snapshot": "1.1", "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
        "client_request_id": "mine-1",
    });
    for (field, value) in expected.as_object().unwrap() {
        assert_eq!(&line[field], value, "{field} in {line}");
    }
    let ms = |field: &str| line[field].as_f64().unwrap_or_else(|| panic!("no {field} in {line}"));
    assert!(ms("itl_max_ms") >= 100.0 && ms("itl_mean_ms") <= ms("itl_max_ms"), "{line}");
    assert!(ms("ttft_ms") > 0.0 && ms("duration_ms") >= ms("ttft_ms") + 100.0, "{line}");
    assert!(ms("bytes_out") > 100.0, "{line}");
    let text = line.to_string();
    for secret in ["secret", "whisper", "hidden", hash] {
        assert!(!text.contains(secret), "{secret} in {text}");
    }
    let (_, metrics) = seen.get("/metrics").await;
    for wanted in [
        "penstock_proxy_time_to_first_byte_seconds_count{model=\"m\"} 1",
        "penstock_proxy_inter_token_latency_seconds_count{model=\"m\"} 1",
        "penstock_proxy_inter_token_latency_max_seconds_bucket{model=\"m\",le=\"0.02\"} 0",
        "penstock_proxy_tokens_total{kind=\"completion\",model=\"m\"} 3",
        "penstock_proxy_model_requests_inflight{model=\"m\"} 0",
        "penstock_proxy_access_log_lines_total 1",
        "penstock_proxy_snapshot_from_disk 1",
    ] {
        assert!(metrics.contains(wanted), "{wanted} missing in\n{metrics}");
    }
}

#[tokio::test]
async fn however_a_request_ends_it_has_one_line() {
    let engine = Engine::start(|number| match number {
        0 => vec![
            Step::Send(SSE_HEAD.as_bytes().to_vec()),
            Step::Send(chunk(&delta("x")).into_bytes()),
            Step::Close,
        ],
        1 => vec![
            Step::Send(SSE_HEAD.as_bytes().to_vec()),
            Step::Send(chunk(&delta("x")).into_bytes()),
            Step::UntilClosed,
        ],
        2 => vec![Step::Send(json_answer("503 Busy", "{}").into_bytes())],
        3 => vec![Step::Send(json_answer("500 Oops", "{}").into_bytes())],
        _ => vec![Step::Send(json_answer("400 No", "{\"error\":{}}").into_bytes())],
    })
    .await;
    let mut config = ProxyConfig::default();
    config.upstream.attempts = 1;
    let seen = Seen::start(config, &[engine.address]).await;
    let proxy = &seen.proxy;
    let told = |lines: &[Value], answer: &str| {
        let line = line(lines, header(answer, "x-request-id"));
        let text = |field: &str| line[field].as_str().unwrap().to_owned();
        (line["status"].as_u64().unwrap(), text("outcome"), text("blame"), text("error"))
    };
    let is = |status: u64, outcome: &str, blame: &str, error: &str| {
        (status, outcome.to_owned(), blame.to_owned(), error.to_owned())
    };

    let broken = proxy.exchange(&post(CHAT, &chat(true))).await;
    let mut leaving = Client::connect(proxy.address).await;
    leaving.send(&post(CHAT, &chat(true))).await;
    let left = leaving.read_until("data: ").await;
    drop(leaving);
    let lines = seen.lines(2).await;
    assert_eq!(told(&lines, &broken), is(502, "cut", "upstream", "stream_interrupted"));
    assert_eq!(told(&lines, &left), is(499, "client_gone", "client", "client_gone"));

    let shed = proxy.exchange(&post(CHAT, &chat(false))).await;
    let failed = proxy.exchange(&post(CHAT, &chat(false))).await;
    let refused = proxy.exchange(&post(CHAT, &chat(false))).await;
    let unknown = proxy.exchange(&post(CHAT, r#"{"model":"x\ny"}"#)).await;
    let nowhere = proxy.exchange(&post("/admin", "{}")).await;
    proxy.exchange(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    let lines = seen.lines(7).await;
    assert_eq!(told(&lines, &shed), is(503, "error", "upstream", "engine_overloaded"));
    assert_eq!(told(&lines, &failed), is(500, "completed", "upstream", ""), "the engine's own answer");
    assert_eq!(told(&lines, &refused), is(400, "completed", "client", ""));
    assert_eq!(told(&lines, &unknown), is(404, "error", "client", "model_not_found"));
    assert_eq!(line(&lines, header(&unknown, "x-request-id"))["model"], "x\ny");
    assert_eq!(told(&lines, &nowhere), is(404, "error", "client", "unknown_url"));
    assert_eq!(lines.len(), 7, "a line each, and none for the probe");
    proxy.settles().await;
}

#[tokio::test]
async fn what_clients_choose_makes_no_series() {
    let seen = Seen::start(ProxyConfig::default(), &[nobody().await]).await;
    let flood = async |from: usize| {
        for n in from..from + 100 {
            let body = format!(r#"{{"model":"no-such-model-{n}"}}"#);
            assert!(seen.proxy.exchange(&post(CHAT, &body)).await.contains("404"));
            assert!(seen.proxy.exchange(&post(&format!("/v1/{n}"), "{}")).await.contains("404"));
        }
        seen.get("/metrics").await.1.lines().count()
    };
    let before = flood(0).await;
    assert_eq!(flood(100).await, before);
}

#[tokio::test]
async fn a_retried_request_can_be_explained() {
    let engine = Engine::answering(sse(&["hello"])).await;
    let mut config = ProxyConfig::default();
    config.telemetry.decisions_sample = 0;
    let seen = Seen::start(config, &[nobody().await, engine.address]).await;
    // Of two idle engines either may come first.
    let (decision, id) = loop {
        let headers = "connection: close\r\nx-penstock-explain: 1\r\n";
        let answer = seen.proxy.exchange(&post_with(CHAT, headers, &chat(true))).await;
        let id = header(&answer, "x-request-id").to_owned();
        seen.proxy.settles().await;
        let decision = seen.json(&format!("/debug/decisions/{id}")).await;
        if decision["why"] == "retried" {
            break (decision, id);
        }
        assert_eq!(decision["why"], "asked", "{decision}");
    };
    assert!(!engine.seen()[0].head.contains("x-penstock-explain"), "it is not the engine's business");
    assert_eq!((&decision["request"]["status"], &decision["request"]["attempts"]), (&200.into(), &2.into()));
    let [first, second] = decision["attempts"].as_array().unwrap().as_slice() else { panic!("{decision}") };
    assert_eq!(
        (&first["endpoint"], &first["failure"], &first["next"]),
        (&"e0".into(), &"connect".into(), &"retry".into())
    );
    assert!(first["failed_ms"].as_f64().is_some() && first["detail"] != "", "{first}");
    assert_eq!(first["considered"]["candidates"], 2);
    assert_eq!(second["considered"]["out"], serde_json::json!({"tried": 1}));
    assert_eq!(second["endpoint"], "e1");
    assert!(second["first_byte_ms"].as_f64() >= second["connected_ms"].as_f64(), "{second}");

    let answer = seen.proxy.exchange(&post_with(CHAT, "connection: close\r\n", "{")).await;
    seen.proxy.settles().await;
    let refused = seen.json(&format!("/debug/decisions/{}", header(&answer, "x-request-id"))).await;
    assert_eq!((&refused["why"], &refused["attempts"]), (&"failed".into(), &serde_json::json!([])));

    let listed = seen.json("/debug/decisions?model=m&limit=1").await;
    assert_eq!(listed["decisions"][0]["request"]["request_id"], id.as_str(), "the refused one has no model");
    let (status, text) = seen.get("/debug/decisions/never-seen").await;
    assert!(status == 404 && text.contains("decisions_sample"), "{text}");
    let (status, text) = seen.get("/debug/decisions?mode=m").await;
    assert!(status == 400 && text.contains("accepted: model=NAME"), "{text}");
}

#[tokio::test]
async fn a_large_fleet_is_shown_in_pages() {
    let addresses: Vec<SocketAddr> = (0..2_500u16).map(|n| ([127, 0, 0, 1], 20_000 + n).into()).collect();
    let seen = Seen::start(ProxyConfig::default(), &addresses).await;
    let mut next = Value::from("/debug/snapshot?limit=900");
    let (mut ids, mut pages) = (Vec::new(), 0);
    while let Some(path) = next.as_str() {
        let page = seen.json(path).await;
        pages += 1;
        assert_eq!(
            (&page["version"], &page["source"], &page["endpoints_total"]),
            (&"1.1".into(), &"disk".into(), &2_500.into())
        );
        assert_eq!(page["routes"].is_array(), pages == 1, "routes are on the first page");
        ids.extend(
            page["endpoints"].as_array().unwrap().iter().map(|e| e["id"].as_str().unwrap().to_owned()),
        );
        next = page["next"].clone();
    }
    let mut sorted = ids.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!((ids.len(), sorted.len(), pages), (2_500, 2_500, 3));
    let page = seen.json("/debug/snapshot?model=m&limit=1").await;
    assert_eq!(
        (&page["pools"][0]["endpoints"], &page["routes"][0]["targets"][0]["served_model"]),
        (&2_500.into(), &"m".into())
    );
    assert!(page["age_s"].is_u64() && page["pools"][0]["retries_left"].is_u64(), "{page}");
    assert_eq!(seen.get("/debug/snapshot?model=other").await.0, 404);
    assert_eq!(seen.get("/debug/snapshot?after=x").await.0, 400);
    let endpoints = seen.json("/debug/endpoints?limit=2").await;
    assert_eq!(endpoints["models"]["m"].as_array().unwrap().len(), 2);
}

/// The process itself, without a control plane.
struct Process {
    child: Child,
    public: SocketAddr,
    private: SocketAddr,
    folder: TempDir,
}

impl Process {
    async fn start(access_log: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let announce = folder.path().join("announce");
        let child = Command::new(env!("CARGO_BIN_EXE_penstock-proxy"))
            .args(["--listen", "127.0.0.1:0", "--private-listen", "127.0.0.1:0", "--announce"])
            .arg(&announce)
            .env("PENSTOCK_PROXY__DISCOVERY__CONTROLPLANES", "[]")
            .env("PENSTOCK_PROXY__DISCOVERY__SNAPSHOT_FILE", folder.path().join("snapshot"))
            .env(
                "PENSTOCK_PROXY__TELEMETRY__ACCESS_LOG",
                access_log.replace("FOLDER", &folder.path().display().to_string()),
            )
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        eventually("it is up", || announce.exists()).await;
        let announced: Value = serde_json::from_slice(&std::fs::read(&announce).unwrap()).unwrap();
        let address = |key: &str| announced[key].as_str().unwrap().parse().unwrap();
        Self { child, public: address("public"), private: address("private"), folder }
    }

    async fn request(&self) -> String {
        let mut client = Client::connect(self.public).await;
        client.send(&post(CHAT, &chat(false))).await;
        client.read_to_end().await
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[tokio::test]
async fn lines_go_to_standard_output_and_all_are_there_after_sigterm() {
    let mut process = Process::start("stdout").await;
    for _ in 0..20 {
        assert!(process.request().await.contains("gateway_not_ready"));
    }
    process.signal("-TERM");
    let stdout = BufReader::new(process.child.stdout.take().unwrap());
    let lines: Vec<Value> =
        stdout.lines().map(|line| serde_json::from_str(&line.unwrap()).expect("nothing but JSON")).collect();
    assert_eq!(lines.len(), 20);
    assert!(lines.iter().all(|line| line["error"] == "gateway_not_ready" && line["blame"] == "gateway"));
    assert!(process.child.wait().unwrap().success());
}

#[tokio::test]
async fn a_log_that_was_moved_away_is_opened_again_on_sighup() {
    let process = Process::start("FOLDER/log").await;
    let (path, moved) = (process.folder.path().join("log"), process.folder.path().join("log.1"));
    process.request().await;
    eventually("the first line", || lines(&path).len() == 1).await;
    std::fs::rename(&path, &moved).unwrap();
    process.signal("-HUP");
    eventually("the file is there again", || path.exists()).await;
    process.request().await;
    eventually("the second line", || lines(&path).len() == 1).await;
    assert_eq!(lines(&moved).len(), 1);
}

#[tokio::test]
async fn a_log_on_a_full_device_holds_up_nobody() {
    let process = Process::start("/dev/full").await;
    for _ in 0..50 {
        assert!(process.request().await.contains("gateway_not_ready"));
    }
    let all_counted = async || {
        let (_, metrics) = get(process.private, "/metrics").await;
        metrics.contains("penstock_proxy_access_log_dropped_total{reason=\"write_error\"} 50")
    };
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !all_counted().await {
        assert!(tokio::time::Instant::now() < deadline, "every lost line is counted");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
