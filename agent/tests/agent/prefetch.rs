//! Models that are fetched before an engine needs them, and disks without room for them.

use std::fs;

use nix::sys::statvfs::statvfs;
use penstock_config::warm::PrefetchProgram;
use penstock_proto::v1::{self, EngineState, agent_message::Message};

use crate::{
    controlplane::ControlPlane,
    node::{Node, assignment, eventually, number},
};

/// A node whose stand-in engines have their models fetched by this script; `FETCHED` is a file of the node.
fn node(cp: &ControlPlane, script: &str) -> Node {
    let mut node = Node::new(cp);
    let script = script.replace("FETCHED", &node.path("fetched"));
    let prefetch = PrefetchProgram {
        command: ["sh", "-c", &script, "fetch", "{model_path}"].map(str::to_owned).to_vec(),
        timeout_s: 20,
    };
    node.config.engines.programs.get_mut("stand-in").unwrap().prefetch = prefetch;
    node
}

fn on_gpu(replica: &str, generation: u64, gpu: u32) -> v1::Assignment {
    let mut assignment = assignment(replica, generation, &[]);
    assignment.gpu_uuids = vec![format!("SIM-node-1-{gpu}")];
    assignment
}

fn fetched(node: &Node) -> Vec<String> {
    let text = fs::read_to_string(node.path("fetched")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

#[tokio::test]
async fn two_replicas_share_one_fetch_and_later_starts_need_none() {
    let cp = ControlPlane::start().await;
    let mut node = node(&cp, "sleep 0.5; echo \"$1\" >> FETCHED");
    cp.assign(1, 2, vec![on_gpu("m-0", 7, 0), on_gpu("m-1", 8, 1)]).await;
    node.start().await;
    cp.hears("the wait for the other's fetch", 0, |heard| {
        let waits = |s: &v1::EngineStatus| s.reason.contains("which is being fetched already");
        heard.iter().any(|m| matches!(m, Message::Report(r) if r.engines.iter().any(waits))).then_some(())
    })
    .await;
    for replica in ["m-0", "m-1"] {
        let engine = node.registered(replica).await;
        assert_eq!(engine["started"], "prefetched");
        assert!(number(&engine, "ready_ms") >= 450, "the wait is not in the time: {engine:#}");
    }
    assert_eq!(fetched(&node), ["model"]);
    let fetching = cp.hears_status("m-0", 0, |s| s.state == i32::from(EngineState::Loading)).await;
    assert_eq!(fetching.start_note, "");

    // Nor does another agent fetch again.
    node.kill_agent();
    node.start().await;
    cp.assign(1, 3, vec![on_gpu("m-2", 9, 2)]).await;
    assert_eq!(node.registered("m-2").await["started"], "prefetched");
    assert_eq!(fetched(&node), ["model"]);
}

#[tokio::test]
async fn a_fetch_is_tried_again_and_its_failure_is_told() {
    let cp = ControlPlane::start().await;
    let mut node = node(
        &cp,
        "echo \"$1\" >> FETCHED; test $(wc -l < FETCHED) -gt 4 || { echo no route to hub; exit 3; }",
    );
    node.config.engines.backoff_min_ms = 20;
    node.config.engines.backoff_max_ms = 50;
    cp.assign(1, 2, vec![on_gpu("m-0", 7, 0)]).await;
    node.start().await;
    let failed = cp.hears_status("m-0", 0, |s| s.state == i32::from(EngineState::Failed)).await;
    assert!(
        failed.reason.contains("model could not be fetched in 3 tries; the last try"),
        "{}",
        failed.reason
    );
    assert!(failed.reason.contains("exited with code 3; last lines: no route to hub"), "{}", failed.reason);
    assert_eq!(node.registered("m-0").await["started"], "prefetched");
    assert_eq!(fetched(&node).len(), 5);
    node.metric_reaches("penstock_agent_warm_failures_total{way=\"prefetched\"}", 4).await;
}

#[tokio::test]
async fn a_fetch_that_is_called_off_ends_with_its_processes() {
    let cp = ControlPlane::start().await;
    let mut node = node(&cp, "touch FETCHED; sleep 600 & sleep 600");
    cp.assign(1, 2, vec![on_gpu("m-0", 7, 0)]).await;
    node.start().await;
    let marked = node.path("fetched");
    eventually("the fetch", || fs::exists(&marked).unwrap().then_some(())).await;
    let from = cp.heard().len();
    cp.assign(1, 3, vec![]).await;
    cp.hears_of_no("m-0", from).await;
    node.no_process_is_left().await;
    // One that an agent leaves behind when it is killed is ended by the next.
    cp.assign(1, 4, vec![on_gpu("m-1", 8, 0)]).await;
    eventually("the second fetch", || (!node.processes().is_empty()).then_some(())).await;
    node.kill_agent();
    assert!(!node.processes().is_empty());
    cp.assign(1, 5, vec![]).await;
    node.start().await;
    node.no_process_is_left().await;
}

#[tokio::test]
async fn a_disk_without_room_is_said_in_words_before_anything_is_fetched() {
    let cp = ControlPlane::start().await;
    let mut node = node(&cp, "echo \"$1\" >> FETCHED");
    fs::create_dir_all(node.path("models")).unwrap();
    node.config.warm.models_dir = node.path("models");
    node.config.warm.spare_gib = 0;
    let stat = statvfs(node.path("models").as_str()).unwrap();
    let gib = stat.blocks() * stat.fragment_size() / (1 << 30) + 1;
    let mut large = on_gpu("m-0", 7, 0);
    let size_gib = u32::try_from(gib).unwrap();
    large.spec.as_mut().unwrap().prefetch = Some(v1::PrefetchSpec { off: false, size_gib });
    cp.assign(1, 2, vec![large, on_gpu("m-1", 8, 1)]).await;
    node.start().await;
    let failed = cp.hears_status("m-0", 0, |s| s.state == i32::from(EngineState::Failed)).await;
    assert!(failed.reason.contains(&format!("{gib} GiB for model and")), "{}", failed.reason);
    assert!(failed.reason.contains("are missing"), "{}", failed.reason);
    // One whose size is not known is fetched: the other's failure is its own.
    node.registered("m-1").await;
    let disk = cp
        .hears("the disk's figures", 0, |heard| {
            heard.iter().find_map(|m| if let Message::Report(r) = m { r.disk.clone() } else { None })
        })
        .await;
    assert_eq!(disk.folder, node.path("models"));
    assert!(disk.free_bytes <= disk.total_bytes && disk.total_bytes > 0);
}

#[tokio::test]
async fn what_is_wished_for_is_fetched_ahead_and_told_of() {
    let cp = ControlPlane::start().await;
    let mut node = node(&cp, "echo \"$1\" >> FETCHED; test \"$1\" != bad || exit 3");
    node.config.engines.backoff_min_ms = 10;
    node.config.engines.backoff_max_ms = 20;
    node.start().await;
    let wish = |model: &str| {
        let spec = v1::EngineSpec { model_path: model.into(), ..assignment("x", 1, &[]).spec.unwrap() };
        v1::PrefetchWish { model: model.into(), spec: Some(spec) }
    };
    let told = async |model: &str, state: &str, from: usize| {
        let is = |p: &&v1::PrefetchStatus| p.model == model && p.state == state;
        cp.hears(&format!("{model} {state}"), from, |heard| {
            heard.iter().find_map(|m| match m {
                Message::Report(r) => r.prefetches.iter().find(is).cloned(),
                _ => None,
            })
        })
        .await
    };
    cp.hears("a session", 0, |heard| (!heard.is_empty()).then_some(())).await;
    cp.wish(vec![wish("good"), wish("bad")]).await;
    told("good", "done", 0).await;
    assert!(told("bad", "failed", 0).await.reason.contains("bad could not be fetched in 3 tries"));
    let count = |name: &str| fetched(&node).iter().filter(|line| *line == name).count();
    let before = count("bad");
    eventually("another try", || (count("bad") > before).then_some(())).await;
    assert_eq!(count("good"), 1);
    // What is not wished for any more is not tried any more, nor told of.
    let from = cp.heard().len();
    cp.wish(vec![wish("good")]).await;
    cp.hears("a report without it", from, |heard| {
        let last =
            heard.iter().rev().find_map(|m| if let Message::Report(r) = m { Some(r) } else { None })?;
        (last.prefetches.iter().all(|p| p.model != "bad")).then_some(())
    })
    .await;
    // A start finds it there.
    let mut start = on_gpu("m-0", 7, 0);
    start.spec.as_mut().unwrap().model_path = "good".into();
    cp.assign(1, 2, vec![start]).await;
    assert_eq!(node.registered("m-0").await["started"], "prefetched");
    assert_eq!(count("good"), 1);
}
