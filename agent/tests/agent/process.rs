//! The agent as an operator meets it: usage, settings, ports, a second agent.

use std::{fs, net::TcpListener, process::Child};

use crate::{
    controlplane::ControlPlane,
    node::{Node, eventually},
};

async fn exit_code(mut agent: Child) -> Option<i32> {
    eventually("the agent's end", || agent.try_wait().unwrap()).await.code()
}

fn stderr(node: &Node) -> String {
    fs::read_to_string(node.agent_log()).unwrap()
}

#[tokio::test]
async fn a_taken_port_is_named_with_its_setting() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    node.config.private.listen = taken.local_addr().unwrap().to_string();
    assert_eq!(exit_code(node.spawn(&[])).await, Some(1));
    let expected = format!("cannot listen on {} (setting private.listen)", node.config.private.listen);
    assert!(stderr(&node).contains(&expected), "{}", stderr(&node));
}

#[tokio::test]
async fn a_second_agent_on_one_state_folder_is_turned_away() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    node.start().await;
    assert_eq!(exit_code(node.spawn(&[])).await, Some(1));
    let expected = format!("in use by another agent (pid {})", node.agent_pid());
    assert!(stderr(&node).contains(&expected), "{}", stderr(&node));
}

#[tokio::test]
async fn bad_usage_and_bad_settings_exit_with_2() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    assert_eq!(exit_code(node.spawn(&["--no-such-flag"])).await, Some(2));
    node.config.on_shutdown = "explode".into();
    assert_eq!(exit_code(node.spawn(&[])).await, Some(2));
    assert!(stderr(&node).contains("on_shutdown is \"explode\"; accepted: stop, keep"), "{}", stderr(&node));
}

#[tokio::test]
async fn the_private_server_tells_how_things_are() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    node.start().await;
    for path in ["/livez", "/healthz"] {
        assert_eq!(node.get(path).await, (200, "ok".into()));
    }
    cp.hears("a report", 0, |heard| (heard.len() >= 2).then_some(())).await;
    let (status, body) = node.get("/readyz").await;
    assert_eq!(status, 200, "{body}");
    assert!(node.get("/gpus").await.1.contains("SIM-node-1-3"));
    let metrics = node.get("/metrics").await.1;
    for line in
        ["penstock_agent_session_connected 1", "penstock_agent_gpus 4", "penstock_agent_sessions_total 1"]
    {
        assert!(metrics.lines().any(|l| l == line), "{line} not in\n{metrics}");
    }
    assert_eq!(node.get("/nothing").await.0, 404);
}
