//! The deploy guide's agent steps, followed to the letter: its flags, its keys, its log lines (G01-G06, G16-G18), on a real etcd.
//!
//! The simulator stands in for vLLM. Where etcd is not installed the test says so and passes; with CI set it fails.
#![allow(clippy::unwrap_used)]

mod support;

use std::{
    fs,
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use support::{client, eventually, penstock};

const PATIENCE: Duration = Duration::from_secs(60);

/// A process of the guide; it ends with the test.
struct Step(Child);

impl Drop for Step {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

impl Step {
    fn run(command: &mut Command, log: &Path) -> Self {
        let log = fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
        Self(command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap())
    }

    fn pid(&self) -> Pid {
        support::pid(self.0.id())
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn installed() -> bool {
    let found =
        Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        let reason = "skipped: etcd is not in PATH (scripts/setup.sh test installs it)";
        assert!(std::env::var_os("CI").is_none(), "{reason}");
        println!("{reason}");
    }
    found
}

async fn get(url: &str) -> Option<(u16, String)> {
    let answer = client().get(url).send().await.ok()?;
    Some((answer.status().as_u16(), answer.text().await.ok()?))
}

/// Asks again until there is an answer.
async fn soon<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(std::time::Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Keys in etcd that begin with `prefix`, as `etcdctl get --prefix --keys-only` shows them.
async fn keys(etcd: &str, prefix: &str) -> Vec<String> {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let mut end = prefix.as_bytes().to_vec();
    *end.last_mut().unwrap() += 1;
    let body = json!({"key": STANDARD.encode(prefix), "range_end": STANDARD.encode(end), "keys_only": true});
    let answer = client().post(format!("{etcd}/v3/kv/range")).json(&body).send().await.unwrap();
    let answer: Value = answer.json().await.unwrap();
    let keys = answer["kvs"].as_array().cloned().unwrap_or_default();
    keys.iter()
        .map(|kv| String::from_utf8(STANDARD.decode(kv["key"].as_str().unwrap()).unwrap()).unwrap())
        .collect()
}

#[tokio::test]
async fn the_guides_agent_steps() {
    if !installed() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let read = |name: &str| fs::read_to_string(path(name)).unwrap_or_default();

    // G03: etcd, and that it is healthy.
    let (etcd_port, peer_port) = (free_port(), free_port());
    let etcd = format!("http://127.0.0.1:{etcd_port}");
    let peer = format!("http://127.0.0.1:{peer_port}");
    let mut command = Command::new("etcd");
    command.arg("--data-dir").arg(path("etcd"));
    command.args(["--listen-client-urls", &etcd, "--advertise-client-urls", &etcd]);
    command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
    command.args(["--initial-cluster", &format!("default={peer}")]);
    let _etcd = Step::run(&mut command, &path("etcd.log"));
    let healthy = async || {
        get(&format!("{etcd}/health")).await.filter(|(_, body)| body.contains("\"health\":\"true\""))
    };
    assert_eq!(soon("etcd's health", healthy).await.0, 200);

    // The agent first: the order is nobody's business (G22). It says where it looks, and goes on looking.
    let engine_port = free_port();
    let agent_port = free_port();
    let sim = format!("[\"{}\", \"engine-sim\"]", env!("CARGO_BIN_EXE_penstock"));
    let settings = format!(
        "state_dir = \"{}\"\n[private]\nlisten = \"127.0.0.1:{agent_port}\"\n[gpus]\nsource = \"simulated\"\n[controlplane]\n\
         backoff_max_ms = 300\n[engines]\nport_base = {engine_port}\ncgroup = \"off\"\n[engines.vllm]\ncommand = {sim}\n",
        path("agent").display()
    );
    fs::write(path("agent.toml"), settings).unwrap();
    let agent = || {
        let mut command = penstock();
        command.args(["agent", "--config", path("agent.toml").to_str().unwrap()]);
        command.args(["--node-id", "node-1", "--etcd-endpoints", &etcd]);
        command
    };
    let node = Step::run(&mut agent(), &path("agent.log"));
    let looked = || read("agent.log").contains("has no /meta/leader: no control plane leads").then_some(());
    eventually("that the agent looks for a leader", PATIENCE, looked);

    // The control plane, on the same etcd.
    let mut command = penstock();
    command.args(["controlplane", "--http-listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0"]);
    command.args(["--etcd-endpoints", &etcd, "--announce", path("controlplane.json").to_str().unwrap()]);
    let _controlplane = Step::run(&mut command, &path("controlplane.log"));
    let announced = eventually("the control plane", PATIENCE, || {
        serde_json::from_str::<Value>(&read("controlplane.json")).ok()
    });
    let controlplane = format!("http://{}", announced["http"].as_str().unwrap());
    let present = async || {
        get(&format!("{controlplane}/api/v2/nodes/node-1")).await.filter(|(status, _)| *status == 200)
    };
    soon("the node", present).await;
    assert!(read("agent.log").contains("etcd names the leading control plane"));

    // G04: the scheduler's command, its line, its key.
    let port = engine_port.to_string();
    let place = ["place", "--model-uid", "qwen", "--model-name", "/models/qwen", "--node-id", "node-1"];
    let output = penstock()
        .args(place)
        .args(["--engine", "vllm", "--port", &port, "--controlplane", &controlplane])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("placed: key=/placements/qwen "), "{said}");
    assert_eq!(keys(&etcd, "/placements/").await, ["/placements/qwen"]);

    // G05: started, waited for, registered: the key and the line.
    let registered = async || Some(keys(&etcd, "/endpoints/").await).filter(|keys| !keys.is_empty());
    let endpoints = soon("an endpoint in etcd", registered).await;
    assert_eq!(endpoints, ["/endpoints/qwen/qwen-0"]);
    let line = eventually("the line of the guide", PATIENCE, || {
        read("agent.log").lines().find(|line| line.contains("registered endpoint ")).map(str::to_owned)
    });
    assert!(line.contains(&format!("base_url=http://127.0.0.1:{engine_port}")), "{line}");

    // G06: the engine itself lists the model.
    let (status, models) = get(&format!("http://127.0.0.1:{engine_port}/v1/models")).await.unwrap();
    assert!(status == 200 && models.contains("\"qwen\""), "{status} {models}");

    // G17: a second agent on the same port is told so, and exits.
    fs::write(
        path("second.toml"),
        format!(
            "state_dir = \"{}\"\n[private]\nlisten = \"127.0.0.1:{agent_port}\"\n",
            path("other").display()
        ),
    )
    .unwrap();
    let second =
        penstock().args(["agent", "--config", path("second.toml").to_str().unwrap()]).output().unwrap();
    let complaint = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(1), "{complaint}");
    assert!(
        complaint.contains(&format!("cannot listen on 127.0.0.1:{agent_port} (setting private.listen)")),
        "{complaint}"
    );

    // Its log, through the control plane.
    let logs = penstock()
        .args(["logs", "qwen/qwen-0", "--lines", "50", "--controlplane", &controlplane])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&logs.stdout).into_owned();
    assert!(
        logs.status.success() && text.contains("# penstock starts qwen-0: "),
        "{text}\n{}",
        String::from_utf8_lossy(&logs.stderr)
    );

    // G18: the server is killed, what it leaves is ended, and another takes its place.
    let engine = async || -> Option<(i32, String)> {
        let (_, body) = get(&format!("http://127.0.0.1:{agent_port}/engines")).await?;
        let body: Value = serde_json::from_str(&body).ok()?;
        let engine = body["engines"].get(0)?.clone();
        let pid = engine["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).filter(|pid| *pid > 0)?;
        Some((pid, engine["state"].as_str()?.to_owned()))
    };
    let (first, _) = engine().await.unwrap();
    let group = |leader: i32| -> Vec<i32> {
        let pids =
            fs::read_dir("/proc").unwrap().filter_map(|e| e.ok()?.file_name().to_str()?.parse::<i32>().ok());
        let of_group = |pid: &i32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let mut fields = stat.rsplit(')').next().unwrap_or_default().split_ascii_whitespace();
            fields.next() != Some("Z") && fields.nth(1).and_then(|f| f.parse::<i32>().ok()) == Some(leader)
        };
        pids.filter(of_group).collect()
    };
    let before = group(first);
    assert!(before.contains(&first));
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    let replaced = async || engine().await.filter(|(pid, state)| *pid != first && state == "ready");
    soon("another engine", replaced).await;
    assert_eq!(group(first), Vec::<i32>::new(), "left of {before:?}");

    // The agent ends in order, and its engine with it.
    let (last, _) = engine().await.unwrap();
    kill(node.pid(), Signal::SIGTERM).unwrap();
    let mut node = node;
    let status = eventually("the agent's end", PATIENCE, || node.0.try_wait().unwrap());
    assert!(status.success(), "{}", read("agent.log"));
    assert_eq!(group(last), Vec::<i32>::new());
    let gone = async || keys(&etcd, "/endpoints/").await.is_empty().then_some(());
    soon("no endpoint in etcd", gone).await;
}
