//! How engines are told what a deployment says: typed fields on the simulator, and any other server by a template.

#![allow(clippy::unwrap_used)]

mod support;

use std::{path::Path, process::Output, time::Duration};

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use support::{Up, client, eventually, pid};

/// A server with nothing of OpenAI's API but chats, and with paths of its own for its health.
const TINY: &str = r#"
import http.server, json, sys

class Server(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def say(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.say(200 if self.path in ("/alive", "/ready") else 404, {})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != "/v1/chat/completions" or asked["model"] != sys.argv[2]:
            return self.say(404, {"error": {"message": "no such path or model"}})
        message = {"role": "assistant", "content": " ".join(sys.argv[3:])}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self.say(200, {"id": "x", "object": "chat.completion", "model": sys.argv[2], "choices": [choice]})

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Server).serve_forever()
"#;

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Applies one manifest; gives back the exit code and what was said.
fn apply(up: &Up, dir: &Path, manifest: &Value) -> (Option<i32>, String) {
    let file = dir.join("manifest.yaml");
    std::fs::write(&file, manifest.to_string()).unwrap();
    let output = up.run(&["apply", "--wait", "-f", file.to_str().unwrap()]);
    (output.status.code(), text(&output))
}

/// The agent's own list.
async fn engines(up: &Up) -> Value {
    let url = format!("http://{}/engines", up.address("agent_private"));
    client().get(url).send().await.unwrap().json().await.unwrap()
}

/// The entry of a model's only engine.
async fn engine(up: &Up, model: &str) -> Value {
    let list = engines(up).await;
    list["engines"].as_array().unwrap().iter().find(|e| e["model"] == model).cloned().unwrap()
}

fn command(engine: &Value) -> String {
    let words: Vec<&str> =
        engine["command"].as_array().unwrap().iter().map(|w| w.as_str().unwrap()).collect();
    words.join(" ")
}

/// What a chat through the proxy is answered.
async fn chat(up: &Up, model: &str) -> String {
    let body = json!({"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4});
    let url = format!("{}/v1/chat/completions", up.url());
    let response = client().post(url).json(&body).send().await.unwrap();
    assert_eq!(response.status(), 200, "{}", up.logs());
    let answer: Value = response.json().await.unwrap();
    answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

/// The model's only endpoint, once it is ready as another process than `before`.
fn ready(up: &Up, model: &str, before: u64) -> Value {
    eventually(&format!("a ready engine of {model}"), Duration::from_secs(90), || {
        let mut of_model = up.endpoints().into_iter().filter(|e| e["model"] == model);
        of_model
            .find(|e| e["state"] == "ready" && e["pid"].as_u64().is_some_and(|pid| pid != before && pid > 0))
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn typed_fields_reach_the_engine_and_its_version_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let up = Up::start(&["--engines", "1"]);
    let manifest = |spec: Value| json!({"kind": "Deployment", "name": "typed", "spec": spec});
    let spec = json!({
        "engine": "sim", "tensor_parallel": 2, "dtype": "bfloat16", "max_model_len": 4096, "max_num_seqs": 8,
        "gpu_memory_utilization": 0.85, "max_num_queued_reqs": 16, "enable_prefix_caching": false, "kv_events": true,
        "shutdown_timeout_s": 3, "seed": -7, "tool_call_parser": "hermes", "max_loras": 2,
        "lora": [{"name": "sql", "path": "/loras/sql"}], "env": {"HF_TOKEN": "hush-hush"},
        "args": ["--hf-token", "hush-hush"],
    });
    assert_eq!(apply(&up, dir.path(), &manifest(spec.clone())).0, Some(0), "{}", up.logs());
    assert!(!chat(&up, "typed").await.is_empty());

    let engine = engine(&up, "typed").await;
    let line = command(&engine);
    for part in [
        "--enable-lora --lora-modules sql=/loras/sql --tensor-parallel-size 2 --dtype bfloat16 --max-model-len 4096",
        "--gpu-memory-utilization 0.85 --max-num-seqs 8 --max-num-queued-reqs 16 --no-enable-prefix-caching --max-loras 2",
        "\"endpoint\":\"tcp://*:",
        "--shutdown-timeout 3 --seed=-7 --enable-auto-tool-choice --tool-call-parser hermes --hf-token ***",
    ] {
        assert!(line.contains(part), "{part}\nin\n{line}");
    }
    assert_eq!(engine["gpu_uuids"].as_array().unwrap().len(), 2, "as many as tensor_parallel says");
    assert_eq!(engine["version"], penstock_loadtest::engine::VLLM_VERSION);
    let shown = ready(&up, "typed", 0);
    assert_eq!(shown["engine_version"], engine["version"]);
    assert!(shown["kv_events_address"].as_str().unwrap().starts_with("127.0.0.1:"), "{shown}");
    assert_ne!(shown["kv_events_address"], shown["address"]);
    let log = std::fs::read_to_string(engine["log"].as_str().unwrap()).unwrap();
    assert!(!engines(&up).await.to_string().contains("hush") && !log.contains("hush"), "a secret is shown");
    let nodes = text(&up.run(&["nodes"]));
    assert!(nodes.contains(&format!("sim {}", penstock_loadtest::engine::VLLM_VERSION)), "{nodes}");

    // The same again changes nothing; what cannot be is refused with the field, before anything is sent.
    let (_, told) = apply(&up, dir.path(), &manifest(spec));
    assert!(told.contains("unchanged"), "{told}");
    for (spec, part) in [
        (
            json!({"max_model_len": 1, "args": ["--max_model_len=2"]}),
            "args[0] says again what the field max_model_len says",
        ),
        (json!({"tensor_parallel": 2, "gpus_per_replica": 1}), "make them equal"),
        (json!({"args": ["--config", "x.yaml"]}), "a file could say everything"),
        (json!({"env": {"VLLM_SERVER_DEV_MODE": "1"}}), "spec.env.VLLM_SERVER_DEV_MODE"),
    ] {
        let (code, told) = apply(&up, dir.path(), &manifest(spec));
        assert!(code == Some(2) && told.contains(part), "{part}\nin\n{told}");
    }
    up.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn any_server_with_openais_api_runs_by_a_template() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("tiny.py");
    std::fs::write(&script, TINY).unwrap();
    let penstock = env!("CARGO_BIN_EXE_penstock");
    let another = format!(
        "{{kind = 'exec', command = ['{penstock}', 'engine-sim', 'serve', '{{model_path}}', '--host={{host}}', \
         '--port={{port}}', '--served-model-name={{served_model_name}}'], options = {{max_model_len = \
         ['--max-model-len={{value}}']}}}}"
    );
    let tiny = format!(
        "{{kind = 'exec', command = ['python3', '{}', '{{port}}', '{{served_model_name}}', 'GPUs', '{{gpus}}'], \
         health_path = '/alive', ready_path = '/ready', metrics = 'none'}}",
        script.display()
    );
    let env = [
        ("PENSTOCK_AGENT__ENGINES__ANOTHER", another.as_str()),
        ("PENSTOCK_AGENT__ENGINES__TINY", tiny.as_str()),
        // Nothing says when such an engine has drained: all of the time is waited.
        ("PENSTOCK_AGENT__ENGINES__DRAIN_MS", "1000"),
    ];
    let up = Up::start_with_env(&["--engines", "1"], &env);
    let manifest = |name: &str, spec: Value| json!({"kind": "Deployment", "name": name, "spec": spec});
    let another = json!({"engine": "another", "max_model_len": 4096});
    assert_eq!(apply(&up, dir.path(), &manifest("a", another)).0, Some(0), "{}", up.logs());
    assert!(command(&engine(&up, "a").await).ends_with("--served-model-name=a --max-model-len=4096"));
    assert!(!chat(&up, "a").await.is_empty());

    assert_eq!(apply(&up, dir.path(), &manifest("t", json!({"engine": "tiny"}))).0, Some(0), "{}", up.logs());
    assert!(chat(&up, "t").await.starts_with("GPUs SIM-"), "{}", up.logs());
    for model in ["a", "t"] {
        let before = ready(&up, model, 0)["pid"].as_u64().unwrap();
        kill(pid(u32::try_from(before).unwrap()), Signal::SIGKILL).unwrap();
        ready(&up, model, before);
        assert!(!chat(&up, model).await.is_empty());
    }

    // What the template does not say is refused where it is tried, with the field, and not run into a crash loop.
    let impossible = manifest(
        "t",
        json!({"engine": "tiny", "dtype": "half", "rollout": {"max_surge": 0, "max_unavailable": 1}}),
    );
    let file = dir.path().join("impossible.yaml");
    std::fs::write(&file, impossible.to_string()).unwrap();
    assert_eq!(up.run(&["apply", "-f", file.to_str().unwrap()]).status.code(), Some(0));
    let refused = eventually("a refusal", Duration::from_secs(60), || {
        up.endpoints().into_iter().find(|e| e["model"] == "t" && e["state"] == "failed")
    });
    let reason = refused["reason"].as_str().unwrap();
    assert!(reason.contains("dtype cannot be told to engine \"tiny\""), "{reason}");
    for model in ["a", "t"] {
        assert_eq!(up.run(&["delete", model, "--wait"]).status.code(), Some(0), "{}", up.logs());
    }
    up.stop();
}
