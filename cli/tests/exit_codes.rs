//! The commands against a scripted control plane: what they ask, what they print, how they exit.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    process::Output,
    thread::JoinHandle,
};

use serde_json::{Value, json};

/// Answers as many requests as there are answers, then hands back the requests: "METHOD PATH BODY".
fn controlplane(answers: Vec<(u16, Value)>) -> (String, JoinHandle<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        answers
            .into_iter()
            .map(|(status, body)| {
                let (stream, _) = listener.accept().unwrap();
                let mut reader = BufReader::new(stream);
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") {
                    assert_ne!(reader.read_line(&mut head).unwrap(), 0, "cut off: {head}");
                }
                let length = head
                    .lines()
                    .find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
                let mut request = vec![0; length.unwrap_or(0)];
                reader.read_exact(&mut request).unwrap();
                let body = body.to_string();
                let answer = format!(
                    "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                );
                reader.get_mut().write_all(answer.as_bytes()).unwrap();
                let line = head.lines().next().unwrap().trim_end_matches(" HTTP/1.1");
                format!("{line} {}", String::from_utf8(request).unwrap()).trim_end().to_string()
            })
            .collect()
    });
    (address, server)
}

fn run(address: &str, args: &[&str]) -> Output {
    support::penstock().args(args).args(["--controlplane", address]).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn nobody_there_is_3_and_says_where_it_looked_and_what_to_do() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for command in [&["status"][..], &["models"], &["scale", "m", "--replicas", "1"], &["drain", "m-0"]] {
        let output = run(&format!("http://{free}"), command);
        assert_eq!(output.status.code(), Some(3), "{command:?}");
        let error = stderr(&output);
        for part in [&free.to_string(), "--controlplane", "penstock up", "refused"] {
            assert!(error.contains(part), "{error}");
        }
    }
}

#[test]
fn the_data_directory_of_an_up_tells_its_control_plane() {
    let dir = tempfile::tempdir().unwrap();
    let (address, server) = controlplane(vec![(200, json!({"models": []}))]);
    let summary = json!({
        "public": "p", "proxy_private": "p", "controlplane": address.trim_start_matches("http://"), "grpc": "g",
        "agent_private": "a", "console": "c", "models": [], "engines": [],
        "pids": {"proxy": 1, "controlplane": 1, "agent": 1, "up": 1}, "data_dir": "d"
    });
    std::fs::write(dir.path().join("up.json"), summary.to_string()).unwrap();
    let output = support::penstock().args(["models", "--data-dir"]).arg(dir.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(server.join().unwrap(), ["GET /api/v2/models"]);
}

#[test]
fn an_unknown_model_is_4_with_the_servers_sentence() {
    let said = json!({"error": {"code": "not_found", "message": "there is no deployment of \"x/y\""}});
    let (address, server) = controlplane(vec![(404, said)]);
    let output = run(&address, &["scale", "x/y", "--replicas", "2"]);
    assert_eq!(output.status.code(), Some(4));
    assert!(stderr(&output).contains("there is no deployment of \"x/y\""));
    assert_eq!(server.join().unwrap(), ["PATCH /api/v2/deployments/x%2Fy {\"replicas\":2}"]);
}

#[test]
fn a_refusal_is_1_and_names_the_field() {
    let said = json!({"error": {"code": "invalid_field", "field": "replicas", "message": "at most 10000"}});
    let (address, server) = controlplane(vec![(400, said)]);
    let output = run(&address, &["deploy", "m", "--replicas", "20000", "--env", "A=b=c", "--arg=--x"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("replicas: at most 10000"), "{}", stderr(&output));
    let asked = "PUT /api/v2/deployments/m {\"replicas\":20000,\"args\":[\"--x\"],\"env\":{\"A\":\"b=c\"}}";
    assert_eq!(server.join().unwrap(), [asked]);
}

#[test]
fn an_answer_that_is_no_control_planes_is_1() {
    let (address, server) = controlplane(vec![(200, json!("hello")), (500, json!({}))]);
    for _ in 0..2 {
        let output = run(&address, &["models"]);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("Does the address belong to a Penstock"), "{}", stderr(&output));
    }
    server.join().unwrap();
}

#[test]
fn wrong_usage_is_2() {
    let code = |args: &[&str]| support::penstock().args(args).output().unwrap().status.code();
    assert_eq!(code(&[]), Some(2));
    assert_eq!(code(&["statsu"]), Some(2));
    assert_eq!(code(&["scale", "m"]), Some(2));
    assert_eq!(code(&["status", "--controlplane", "ftp://x"]), Some(2));
    assert_eq!(code(&["up", "--model-dir", "/tmp"]), Some(2));
    assert_eq!(code(&["--help"]), Some(0));
    assert_eq!(code(&["--version"]), Some(0));
}

#[test]
fn a_setting_that_does_not_exist_stops_up_with_2_and_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    let output = support::penstock()
        .args(["up", "--ports", "auto", "--data-dir"])
        .arg(dir.path())
        .env("PENSTOCK_PROXY__PUBLIC__LISSTEN", "127.0.0.1:0")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("did you mean `public.listen`?"), "{}", stderr(&output));
}

#[test]
fn a_taken_port_stops_up_with_1_before_anything_is_started() {
    let dir = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = support::penstock()
        .args(["up", "--ports", "auto", "--data-dir"])
        .arg(dir.path())
        .env("PENSTOCK_CONTROLPLANE__LISTEN__GRPC", &address)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = stderr(&output);
    assert!(error.contains(&format!("{address} is taken")) && error.contains("control plane"), "{error}");
    assert!(!dir.path().join("logs/controlplane.log").exists());
}

#[test]
fn json_is_the_servers_answer_and_the_table_its_reading() {
    let answer = json!({"endpoints": [
        {"id": "m-0", "model": "m", "state": "ready", "address": "h:1", "kv_used_ratio": 0.25, "novelty": [1]},
        {"id": "n-0", "model": "n", "state": "failed", "reason": "exit code 1"}
    ]});
    let (address, server) = controlplane(vec![(200, answer.clone()), (200, answer.clone()), (200, answer)]);
    let whole = run(&address, &["endpoints", "--output", "json"]);
    let printed: Value = serde_json::from_slice(&whole.stdout).unwrap();
    assert_eq!(printed["endpoints"][0]["novelty"], json!([1]));
    let one = run(&address, &["endpoints", "--output", "json", "--model", "n"]);
    let printed: Value = serde_json::from_slice(&one.stdout).unwrap();
    assert_eq!(printed["endpoints"].as_array().unwrap().len(), 1);
    let table = stdout(&run(&address, &["endpoints"]));
    assert!(table.contains("25%") && table.contains("exit code 1"), "{table}");
    server.join().unwrap();
}

#[test]
fn wait_returns_when_all_is_ready_and_1_when_the_time_is_over() {
    let state = |ready: u32, waiting: &[&str]| json!({"model": "m", "replicas": 2, "status": {"ready": ready, "waiting": waiting}});
    let (address, server) =
        controlplane(vec![(200, state(0, &[])), (200, state(1, &[])), (200, state(2, &[]))]);
    let output = run(&address, &["scale", "m", "--replicas", "2", "--wait"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    server.join().unwrap();

    let starved = state(1, &["m-1 waits for a free GPU"]);
    let (address, server) = controlplane(vec![(200, starved.clone()), (200, starved)]);
    let output = run(&address, &["scale", "m", "--replicas", "2", "--wait", "--timeout-s", "0"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("1 of 2") && stderr(&output).contains("free GPU"),
        "{}",
        stderr(&output)
    );
    server.join().unwrap();
}

#[test]
fn version_tells_its_own_even_when_nobody_answers() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let output = run(&format!("http://{free}"), &["version", "--output", "json"]);
    assert_eq!(output.status.code(), Some(0));
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed, json!({"client": env!("CARGO_PKG_VERSION"), "controlplane": null}));
}

#[test]
fn completions_are_scripts_that_know_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let output = support::penstock().args(["completions", shell]).output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert!(stdout(&output).contains("undrain"), "{shell}");
    }
}

#[test]
fn a_drain_asks_for_moves_only_where_it_shall_and_says_what_is_left() {
    let left = |running: u32| (200, json!({"id": "m-0", "state": "draining", "running": running}));
    let (address, server) = controlplane(vec![left(0), left(0), left(7), left(7), left(1), left(0)]);
    assert!(run(&address, &["drain", "m-0", "--wait"]).status.success());
    let output = run(&address, &["drain", "m-0", "--move-streams", "--wait"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(stderr(&output), "penstock: m-0: 7 requests left\npenstock: m-0: 1 request left\n");
    assert_eq!(
        server.join().unwrap(),
        [
            "POST /api/v2/endpoints/m-0/drain",
            "GET /api/v2/endpoints/m-0",
            "POST /api/v2/endpoints/m-0/drain?move_streams=true",
            "GET /api/v2/endpoints/m-0",
            "GET /api/v2/endpoints/m-0",
            "GET /api/v2/endpoints/m-0",
        ]
    );
    let output = run("http://127.0.0.1:9", &["drain", "node/a", "--move-streams"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("rollout.move_streams"), "{}", stderr(&output));
}
