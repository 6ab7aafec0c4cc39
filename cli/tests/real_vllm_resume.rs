//! Two real vLLM engines on a CPU, and streams that outlive them: kill -9 of the whole process group, SIGTERM, kill -9 of
//! EngineCore alone. Greedy text equals that of the uninterrupted run.
//!
//! Opt-in, since it takes minutes and gigabytes: `scripts/vllm_cpu.sh DIR`, then
//! `PENSTOCK_TEST_VLLM=DIR cargo nextest run -p penstock --test real_vllm_resume --no-capture`. docs/vllm.md has its output.

#![allow(clippy::unwrap_used)]

#[path = "resume/gateway.rs"]
#[allow(dead_code)]
mod gateway;

use std::{
    net::{SocketAddr, TcpListener},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use gateway::{Proxy, config};
use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use serde_json::{Value, json};

/// Three Python processes import everything, one after the other.
const LONG: Duration = Duration::from_secs(400);
/// Tokens of an answer: seconds of an engine's time.
const TOKENS: u64 = 900;

/// An engine and its processes, which end with this.
struct Vllm {
    address: SocketAddr,
    child: Child,
}

impl Drop for Vllm {
    fn drop(&mut self) {
        killpg(self.group(), Signal::SIGKILL).ok();
        self.child.wait().ok();
    }
}

impl Vllm {
    fn start(folder: &Path) -> Self {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let child = Command::new(folder.join("venv/bin/vllm"))
            .args([
                "serve",
                folder.join("tiny").to_str().unwrap(),
                "--load-format",
                "dummy",
                "--served-model-name",
            ])
            .args([
                gateway::MODEL,
                "--host",
                "127.0.0.1",
                "--port",
                &address.port().to_string(),
                "--seed",
                "1",
            ])
            .args([
                "--max-model-len",
                "2048",
                "--max-num-seqs",
                "32",
                "--enforce-eager",
                "--dtype",
                "bfloat16",
            ])
            .envs([("HF_HUB_OFFLINE", "1"), ("TRANSFORMERS_OFFLINE", "1"), ("VLLM_NO_USAGE_STATS", "1")])
            .envs([("DO_NOT_TRACK", "1"), ("VLLM_CPU_KVCACHE_SPACE", "1")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap();
        Self { address, child }
    }

    fn group(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    async fn is_ready(&self) {
        let (client, deadline) = (reqwest::Client::new(), Instant::now() + LONG);
        let url = format!("http://{}/health", self.address);
        while !client.get(&url).send().await.is_ok_and(|answer| answer.status().is_success()) {
            assert!(Instant::now() < deadline, "vLLM was not ready in time");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// Its EngineCore.
    fn core(&self) -> Pid {
        let of_group = |pid: &i32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let (name, fields) = stat.rsplit_once(')').unwrap_or_default();
            name.contains("VLLM::Engine")
                && fields.split_whitespace().nth(2) == Some(&self.child.id().to_string())
        };
        let entries = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
        let core = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(of_group);
        Pid::from_raw(core.expect("an EngineCore"))
    }
}

/// Greedy requests of each API.
fn requests() -> Vec<(&'static str, Value)> {
    let messages = |text: &str| json!([{"role": "user", "content": text}]);
    let chat = |text: &str| {
        json!({"model": gateway::MODEL, "messages": messages(text), "max_tokens": TOKENS, "temperature": 0, "stream": true,
               "ignore_eos": true, "stream_options": {"include_usage": true}})
    };
    let mut stopped = chat("a stop string that is never said");
    stopped["stop"] = json!(["never said, not by any model"]);
    vec![
        ("/v1/chat/completions", chat("the quick brown fox")),
        ("/v1/chat/completions", chat("é 🎈 jumps over")),
        ("/v1/chat/completions", stopped),
        (
            "/v1/completions",
            json!({"model": gateway::MODEL, "prompt": "the lazy dog", "max_tokens": TOKENS, "temperature": 0, "stream": true,
                   "ignore_eos": true, "stream_options": {"include_usage": true}}),
        ),
    ]
}

/// What a stream said: its text, and its usage.
fn said(stream: &str) -> (String, Value) {
    assert!(stream.ends_with("data: [DONE]\n\n") && !stream.contains("\"error\":"), "{}", tail(stream));
    let data = stream.lines().filter_map(|line| line.strip_prefix("data: "));
    let chunks: Vec<Value> = data.filter_map(|data| serde_json::from_str(data).ok()).collect();
    let piece = |chunk: &Value| {
        let choice = &chunk["choices"][0];
        choice["delta"]["content"].as_str().or_else(|| choice["text"].as_str()).unwrap_or_default().to_owned()
    };
    (chunks.iter().map(piece).collect(), chunks.last().unwrap()["usage"].clone())
}

fn tail(text: &str) -> &str {
    &text[text.char_indices().nth_back(600).map_or(0, |(at, _)| at)..]
}

/// All requests at once; `begun` counts those that have come some way.
async fn ask(proxy: &Proxy, begun: &Arc<AtomicUsize>) -> Vec<(String, Value)> {
    let one = |(path, body): (&'static str, Value)| {
        let (url, begun) = (format!("{}{path}", proxy.url), Arc::clone(begun));
        tokio::spawn(async move {
            let answer = reqwest::Client::new().post(url).json(&body).send().await.unwrap();
            assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
            let (mut bytes, mut read, mut counted) = (Vec::new(), answer.bytes_stream(), false);
            while let Some(chunk) = read.next().await {
                bytes.extend_from_slice(&chunk.unwrap());
                if !counted && bytes.len() > 20_000 {
                    counted = true;
                    begun.fetch_add(1, SeqCst);
                }
            }
            String::from_utf8(bytes).unwrap()
        })
    };
    let tasks: Vec<_> = requests().into_iter().map(one).collect();
    let mut answers = Vec::new();
    for task in tasks {
        answers.push(said(&task.await.unwrap()));
    }
    answers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_outlive_their_vllm() {
    let Ok(folder) = std::env::var("PENSTOCK_TEST_VLLM") else {
        println!("skipped: PENSTOCK_TEST_VLLM does not name a folder made by scripts/vllm_cpu.sh");
        return;
    };
    let folder = Path::new(&folder);
    let began = Instant::now();
    let (mut first, mut second) = (Vllm::start(folder), Vllm::start(folder));
    first.is_ready().await;
    second.is_ready().await;
    println!("{:>6.1} s  two engines are ready", began.elapsed().as_secs_f64());
    let mut config = config();
    (config.resume.stall_ms, config.upstream.first_byte_ms) = (15_000, 60_000);
    let proxy = Proxy::at(config, &[first.address]);
    let whole = ask(&proxy, &Arc::default()).await;
    for (text, usage) in &whole {
        assert_eq!(usage["completion_tokens"], TOKENS, "{}", tail(text));
    }
    println!(
        "{:>6.1} s  {} answers of {TOKENS} tokens, uninterrupted",
        began.elapsed().as_secs_f64(),
        whole.len()
    );
    proxy.knows(&[second.address]);
    assert!(ask(&proxy, &Arc::default()).await == whole, "the engines are not alike");

    for what in ["kill -9 of the process group", "SIGTERM", "kill -9 of EngineCore"] {
        proxy.knows(&[first.address]);
        let begun = Arc::<AtomicUsize>::default();
        let before = proxy.count("penstock_proxy_resumes_total");
        let strikes = async {
            while begun.load(SeqCst) < whole.len() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            proxy.knows(&[first.address, second.address]);
            match what {
                "SIGTERM" => kill(first.group(), Signal::SIGTERM).unwrap(),
                "kill -9 of EngineCore" => kill(first.core(), Signal::SIGKILL).unwrap(),
                _ => killpg(first.group(), Signal::SIGKILL).unwrap(),
            }
            Instant::now()
        };
        let (answers, struck) = tokio::join!(ask(&proxy, &begun), strikes);
        let took = struck.elapsed();
        let resumes = proxy.count("penstock_proxy_resumes_total") - before;
        for (number, (got, wanted)) in answers.iter().zip(&whole).enumerate() {
            let same = got.0.bytes().zip(wanted.0.bytes()).take_while(|(a, b)| a == b).count();
            assert!(
                got == wanted,
                "{what}, request {number}: {same} of {} bytes are the same",
                wanted.0.len()
            );
        }
        println!(
            "{:>6.1} s  {what}: {resumes} of {} streams went on at the other engine, all texts and counts are the same; all \
             ended {:.1} s after it",
            began.elapsed().as_secs_f64(),
            whole.len(),
            took.as_secs_f64()
        );
        assert!(resumes >= 1, "the engine was lost too late");
        if what != "kill -9 of EngineCore" {
            drop(std::mem::replace(&mut first, Vllm::start(folder)));
            first.is_ready().await;
            std::mem::swap(&mut first, &mut second);
            println!("{:>6.1} s  another engine is ready in its place", began.elapsed().as_secs_f64());
        }
    }
    proxy.settles().await;
    assert_eq!(proxy.count("penstock_proxy_resume_refusals_total"), 0);
}
