//! vLLM processes that belong to nobody here: reported, and left alone.

use std::{
    fs,
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
};

use penstock_proto::v1::{self, agent_message::Message};
use serde_json::Value;

use crate::{
    controlplane::ControlPlane,
    node::{Node, assignment, lives, number},
};

/// A process that calls itself `name`, as vLLM's do.
fn named(name: &str, args: &[&str]) -> Child {
    Command::new("sleep")
        .arg0(name)
        .args(args)
        .arg("600")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn foreign_processes_are_told_apart_from_our_own_and_are_never_touched() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    node.config.engines.foreign_s = 1;
    let mut core = named("VLLM::EngineCore", &[]);
    // A server under an interpreter, on a port.
    let script = node.dir.path().join("vllm");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let body = format!(
        "import socket, time\ns = socket.socket()\ns.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\ns.bind(('127.0.0.1', {port}))\ns.listen()\ntime.sleep(600)\n"
    );
    fs::write(&script, body).unwrap();
    let mut server = Command::new("python3")
        .args([script.to_str().unwrap(), "serve", "/models/theirs", "--api-key", "a-secret"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    cp.assign(1, 2, vec![assignment("m-0", 7, &["--orphan"])]).await;
    node.start().await;
    node.registered("m-0").await;
    let (core_pid, server_pid) = (core.id(), server.id());
    let both = |report: &v1::NodeReport| {
        let has = |pid, ready: fn(&v1::ForeignProcess) -> bool| {
            report.foreign.iter().any(|p| p.pid == pid && ready(p))
        };
        has(core_pid, |_| true) && has(server_pid, |p| p.port > 0)
    };
    let foreign = cp.hears("both foreign processes", 0, |heard| {
        heard.iter().find_map(|m| match m {
            Message::Report(report) if both(report) => Some(report.foreign.clone()),
            _ => None,
        })
    });
    let foreign = foreign.await;
    let of = |pid| foreign.iter().find(|process| process.pid == pid).unwrap();
    assert_eq!(of(core_pid).kind, "engine_core");
    let server_seen = of(server_pid);
    assert_eq!((server_seen.kind.as_str(), server_seen.model.as_str()), ("server", "/models/theirs"));
    assert_eq!(server_seen.port, u32::from(port));
    assert!(!server_seen.user.is_empty() && server_seen.rss_mib > 0);
    assert!(!format!("{foreign:?}").contains("a-secret"));
    let own = u32::try_from(number(&node.registered("m-0").await, "pid")).unwrap();
    assert!(foreign.iter().all(|process| process.pid != own));

    let listed: Value = serde_json::from_str(&node.get("/foreign").await.1).unwrap();
    assert!(listed["processes"].as_array().unwrap().iter().any(|p| p["pid"] == core_pid));
    node.metric_reaches("penstock_agent_foreign_processes", 2).await;
    cp.assign(1, 3, vec![]).await;
    node.no_process_is_left().await;
    node.signal_agent(nix::sys::signal::Signal::SIGTERM);
    assert!(node.agent_ends().await.success());
    for process in [&mut core, &mut server] {
        assert!(lives(i32::try_from(process.id()).unwrap()));
        process.kill().unwrap();
        process.wait().unwrap();
    }
}
