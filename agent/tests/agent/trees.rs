//! Process trees that do not want to end: stopped, outside of every group, kept over an agent's death.

use std::{fs, path::Path};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    controlplane::ControlPlane,
    node::{Node, assignment, eventually, lives, number},
};

/// Processes below `pid`, by their parents' word.
fn below(pid: i32) -> Vec<i32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

#[tokio::test]
async fn an_engine_leads_a_session_of_its_own() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    cp.assign(1, 2, vec![assignment("m-0", 7, &["--orphan"])]).await;
    node.start().await;
    let pid = number(&node.registered("m-0").await, "pid");
    for process in below(pid).into_iter().chain([pid]) {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
        let fields: Vec<i32> = stat
            .rsplit(')')
            .next()
            .unwrap()
            .split_ascii_whitespace()
            .skip(1)
            .take(3)
            .map(|f| f.parse().unwrap())
            .collect();
        assert_eq!(fields[1..], [pid, pid], "group and session of {process}");
    }
}

#[tokio::test]
async fn a_stopped_engine_is_ended_all_the_same() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    node.config.engines.drain_ms = 0;
    node.config.engines.settle_ms = 0;
    cp.assign(1, 2, vec![assignment("m-0", 7, &[])]).await;
    node.start().await;
    let pid = number(&node.registered("m-0").await, "pid");
    let from = cp.heard().len();
    kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
    cp.assign(1, 3, vec![]).await;
    cp.hears_of_no("m-0", from).await;
    assert!(!lives(pid));
    assert!(
        node.get("/metrics").await.1.contains("penstock_agent_engine_kills_total 0"),
        "SIGTERM was enough"
    );
}

/// What carries no mark, has left group and session, and writes to nobody's log is known by its cgroup alone; also to an
/// agent that finds its main process dead.
#[tokio::test]
async fn a_cgroup_gives_away_what_has_shed_every_other_mark() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    node.config.engines.cgroup = "auto".into();
    cp.assign(1, 2, vec![assignment("m-0", 7, &["--outside"])]).await;
    node.start().await;
    let engine = node.registered("m-0").await;
    let pid = number(&engine, "pid");
    let record = fs::read_to_string(format!("{}/engines/m-0.json", node.config.state_dir)).unwrap();
    let record: serde_json::Value = serde_json::from_str(&record).unwrap();
    let cgroup = record["cgroup"].as_str().unwrap().to_owned();
    if cgroup.is_empty() {
        println!(
            "skipped: no cgroup (v2) can be made here; {}",
            fs::read_to_string(node.agent_log()).unwrap()
        );
        cp.assign(1, 3, vec![]).await;
        node.no_process_is_left().await;
        return;
    }
    let members = || -> Vec<i32> {
        let text = fs::read_to_string(format!("{cgroup}/cgroup.procs")).unwrap_or_default();
        text.lines().map(|line| line.parse().unwrap()).collect()
    };
    let marked = node.processes();
    let outside =
        eventually("the process outside", || members().into_iter().find(|pid| !marked.contains(pid))).await;

    node.kill_agent();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    node.start().await;
    let again = node.engine("m-0", |e| e["state"] == "ready" && number(e, "pid") != pid).await;
    assert!(!lives(outside), "what the first engine left, beside the second");

    // A stop leaves neither a process nor a folder.
    let outside = eventually("the second process outside", || {
        let marked = node.processes();
        members().into_iter().find(|pid| !marked.contains(pid))
    });
    let outside = outside.await;
    let from = cp.heard().len();
    cp.assign(1, 3, vec![]).await;
    cp.hears_of_no("m-0", from).await;
    assert!(!lives(outside) && !lives(number(&again, "pid")));
    assert!(!Path::new(&cgroup).exists());
    node.signal_agent(Signal::SIGTERM);
    assert!(node.agent_ends().await.success());
    assert!(!Path::new(&cgroup).parent().unwrap().exists(), "nothing of the agent's own is left");
}

#[tokio::test]
async fn a_limit_that_cannot_be_kept_to_and_a_cgroup_that_is_none_are_refused() {
    let cp = ControlPlane::start().await;
    for (cgroup, memory, expected) in [
        ("off", 512, "engines.memory_max_mib is 512, and cannot be kept to: engines.cgroup is \"off\""),
        ("/nowhere", 0, "engines.cgroup is \"/nowhere\", and engines get no cgroups there"),
    ] {
        let mut node = Node::new(&cp);
        (node.config.engines.cgroup, node.config.engines.memory_max_mib) = (cgroup.into(), memory);
        let mut agent = node.spawn(&[]);
        let code = eventually("the agent's end", || agent.try_wait().unwrap()).await.code();
        let said = fs::read_to_string(node.agent_log()).unwrap();
        assert!(code == Some(1) && said.contains(expected), "{code:?} {said}");
    }
}
