//! DR42: backup, loss of everything, restore; and that a restore never tears down what serves unless it is told to.
//!
//! The times that it takes are printed; docs/backup.md has them.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    path::{Path, PathBuf},
    process::Output,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use support::{Up, client, eventually, penstock, pid};

const SOON: Duration = Duration::from_secs(60);

fn ok(output: Output) -> String {
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{}: {told}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

async fn chats(url: &str, model: &str) -> bool {
    let body = json!({"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2});
    let answer = client().post(format!("{url}/v1/chat/completions")).json(&body).send().await;
    answer.is_ok_and(|answer| answer.status().as_u16() == 200)
}

/// Until the model answers.
async fn serves(url: &str, model: &str) {
    let deadline = Instant::now() + SOON;
    while !chats(url, model).await {
        assert!(Instant::now() < deadline, "{model} does not answer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Replica and process of every ready engine.
fn engines(up: &Up) -> Vec<(String, u64)> {
    let ready = up.endpoints().into_iter().filter(|e| e["state"] == "ready");
    let mut all: Vec<_> =
        ready.map(|e| (e["id"].as_str().unwrap().to_owned(), e["pid"].as_u64().unwrap())).collect();
    all.sort();
    all
}

fn fleet(dir: &Path) -> PathBuf {
    let file = dir.join("fleet.yaml");
    let text = "kind: Deployment\nname: tuned\nspec: {engine: sim, model_path: x, replicas: 2}\n---\n\
                kind: Route\nname: chat\nspec: {targets: [{model: tuned}]}\n---\n\
                kind: NodePolicy\nname: spare\nspec: {cordoned: true, reason: not yet}\n";
    std::fs::write(&file, text).unwrap();
    file
}

/// Everything is lost: the machine, its store, its engines. A new site is made out of the file alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_site_serves_again_out_of_a_backup() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("backup.json");
    let old = Up::start(&["--engines", "1"]);
    let manifest = fleet(dir.path());
    ok(old.run(&["apply", "-f", manifest.to_str().unwrap(), "--wait"]));
    ok(old.run(&["backup", "-o", file.to_str().unwrap()]));
    let generation = old.endpoints().iter().map(|e| e["generation"].as_u64().unwrap()).max().unwrap();
    old.stop();

    let started = Instant::now();
    let site = dir.path().join("new");
    let store = site.join("controlplane/store.redb");
    let restore = |args: &[&str]| {
        let mut command = penstock();
        command.arg("restore").arg(&file).arg("--offline").arg(&store).args(args).output().unwrap()
    };
    let tried = ok(restore(&["--dry-run"]));
    assert!(tried.contains("would restore") && !store.exists(), "{tried}");
    assert!(ok(restore(&[])).contains("4 to add"), "two deployments, a route, a word on a node");
    assert!(ok(restore(&[])).contains("0 to add"), "twice is as good as once");
    let new = Up::start_in(&site, &[]);
    serves(&new.url(), "chat").await;
    println!("RTO, a new site from a file: {:.1} s", started.elapsed().as_secs_f64());
    serves(&new.url(), "sim-model").await;
    new.wait_for_ready(3);
    assert!(new.endpoints().iter().all(|e| e["generation"].as_u64().unwrap() > 0));
    let nodes = new.run_json(&["get", "nodes", "spare"]);
    assert_eq!(nodes["nodes"][0]["policy"]["reason"], "not yet");
    // Another engine gets a generation that was never given out.
    ok(new.run(&["scale", "tuned", "--replicas", "3", "--wait"]));
    let newest = new.endpoints().iter().map(|e| e["generation"].as_u64().unwrap()).max().unwrap();
    assert!(newest > generation + 100_000, "{newest} after {generation}");
    assert!(ok(new.run(&["apply", "-f", manifest.to_str().unwrap(), "--dry-run"])).contains("1 to change"));
    new.stop();
}

/// The control plane's store is lost while engines serve: they go on, and are taken over by the restored control plane.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn engines_outlive_the_loss_of_the_store_and_its_restore() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("backup.json");
    let up = Up::start(&["--engines", "2"]);
    ok(up.run(&["apply", "-f", fleet(dir.path()).to_str().unwrap(), "--wait"]));
    let before = engines(&up);
    assert_eq!(before.len(), 4);
    ok(up.run(&["backup", "-o", file.to_str().unwrap()]));

    let (stop, failed, done) =
        (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let load = tokio::spawn({
        let (stop, failed, done, url) = (stop.clone(), failed.clone(), done.clone(), up.url());
        async move {
            while !stop.load(Ordering::Relaxed) {
                let good = chats(&url, "chat").await && chats(&url, "sim-model").await;
                if good { &done } else { &failed }.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    std::fs::remove_file(up.data_dir().join("controlplane/store.redb")).unwrap();
    let lost = up.pid("controlplane");
    kill(pid(lost), Signal::SIGKILL).unwrap();
    let status = eventually("a control plane with nothing", SOON, || {
        let output = up.run(&["cluster", "status", "-o", "json"]);
        let status: Value = serde_json::from_slice(&output.stdout).ok()?;
        (up.try_pid("controlplane") != Some(lost) && status["models"] == 0).then_some(status)
    });
    let started = Instant::now();
    assert!(ok(up.run(&["restore", file.to_str().unwrap()])).contains("4 to add"));
    let after = eventually("the same engines", SOON, || Some(engines(&up)).filter(|now| *now == before));
    println!("RTO, the store alone, engines running: {:.1} s", started.elapsed().as_secs_f64());
    assert_eq!(after, before, "the same processes");
    let restored = up.run_json(&["cluster", "status"]);
    assert!(restored["term"].as_u64() > status["term"].as_u64(), "{restored}");
    // The proxy and the agent follow it: a change reaches them.
    ok(up.run(&["scale", "tuned", "--replicas", "1", "--wait"]));
    ok(up.run(&["deploy", "later", "--engine", "sim", "--wait"]));
    serves(&up.url(), "later").await;
    stop.store(true, Ordering::Relaxed);
    load.await.unwrap();
    let (failed, done) = (failed.load(Ordering::Relaxed), done.load(Ordering::Relaxed));
    assert!(done > 10, "{done}");
    assert_eq!(failed, 0, "of {done}: nobody noticed\n{}", up.logs());
    up.stop();
}

/// Restoring what is older than what runs changes nothing unless it is forced, and then drains.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_backup_tears_nothing_down() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("backup.json");
    let path = file.to_str().unwrap();
    let up = Up::start(&["--engines", "1"]);
    ok(up.run(&["backup", "-o", path]));
    ok(up.run(&["deploy", "newer", "--engine", "sim", "--wait"]));
    ok(up.run(&["scale", "sim-model", "--replicas", "2", "--wait"]));
    let before = engines(&up);

    let refused = up.run(&["restore", path]);
    assert_eq!(refused.status.code(), Some(1));
    let told = stderr(&refused);
    for part in [
        "nothing was changed",
        "deployment \"newer\": it was made after this backup",
        "1 serving endpoints would end",
        "deployment \"sim-model\": it was changed at revision",
        "replicas would fall from 2 to 1",
    ] {
        assert!(told.contains(part), "{part} missing in\n{told}");
    }
    assert!(ok(up.run(&["restore", path, "--dry-run", "--force"])).contains("1 to change, 1 to delete"));
    assert!(ok(up.run(&["restore", path, "--only-missing"])).contains("2 kept as they are"));
    assert_eq!(engines(&up), before, "everything serves as it did");

    ok(up.run(&["restore", path, "--force"]));
    eventually("what the backup wants", SOON, || (engines(&up).len() == 1).then_some(()));
    assert_eq!(engines(&up)[0].1, before.iter().find(|(id, _)| id.starts_with("sim-model-0")).unwrap().1);

    // A backup that cannot be trusted is refused, and stays as it was.
    let text = std::fs::read_to_string(&file).unwrap();
    let bad = dir.path().join("bad.json");
    for (broken, part) in [
        (text.replace("\"replicas\":1", "\"replicas\":9"), "checksum does not fit"),
        (text[..text.len() / 2].to_owned(), "cut off"),
        (text.replace("\"penstock_backup\": 1", "\"penstock_backup\": 7"), "form 7"),
    ] {
        std::fs::write(&bad, &broken).unwrap();
        let refused = up.run(&["restore", bad.to_str().unwrap(), "--force"]);
        assert_eq!(refused.status.code(), Some(2));
        assert!(
            stderr(&refused).contains(part) && stderr(&refused).contains("nothing was changed"),
            "{}",
            stderr(&refused)
        );
        assert_eq!(std::fs::read_to_string(&bad).unwrap(), broken);
    }
    // The store of a running control plane is its own.
    let store = up.data_dir().join("controlplane/store.redb");
    let busy = penstock().args(["backup", "-o", "-", "--offline"]).arg(&store).output().unwrap();
    assert_eq!(busy.status.code(), Some(1));
    assert!(stderr(&busy).contains("another process has it open"), "{}", stderr(&busy));
    up.stop();
}
