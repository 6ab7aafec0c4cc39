//! P5: with the control plane standing still, requests are served, by a proxy that is restarted meanwhile too.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use support::{Up, client, eventually, pid};

async fn chat(url: &str) -> Result<(), String> {
    let body =
        json!({"model": "sim-model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3});
    let answer = client().post(format!("{url}/v1/chat/completions")).json(&body).send().await;
    let answer = answer.map_err(|e| e.to_string())?;
    let status = answer.status();
    if status.is_success() {
        Ok(())
    } else {
        Err(format!("{status}: {}", answer.text().await.unwrap_or_default()))
    }
}

#[tokio::test]
async fn a_proxy_restarted_while_the_control_plane_stands_still_serves() {
    let up = Up::start(&["--engines", "2"]);
    let ready = || async {
        let answer =
            client().get(format!("http://{}/readyz", up.address("proxy_private"))).send().await.ok()?;
        Some((answer.status().as_u16(), answer.json::<Value>().await.ok()?))
    };
    assert_eq!(ready().await.unwrap().1["status"], "ok");

    // Standing still is worse than gone: connections to it open, and nothing comes.
    let controlplane = pid(up.pid("controlplane"));
    kill(controlplane, Signal::SIGSTOP).unwrap();
    let old = up.pid("proxy");
    kill(pid(old), Signal::SIGKILL).unwrap();
    eventually("the proxy is started again", Duration::from_secs(30), || {
        (up.pid("proxy") != old).then_some(())
    });
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while !matches!(ready().await, Some((200, _))) {
        assert!(std::time::Instant::now() < deadline, "ready from its snapshot: {:?}", ready().await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for _ in 0..20 {
        chat(&up.url()).await.unwrap();
    }
    let (_, state) = ready().await.unwrap();
    assert!(state["status"].as_str().unwrap().starts_with("degraded"), "{state}");

    kill(controlplane, Signal::SIGCONT).unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while ready().await.is_none_or(|(_, state)| state["status"] != "ok") {
        assert!(std::time::Instant::now() < deadline, "connected again: {:?}", ready().await);
        chat(&up.url()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    up.wait_for_ready(2);
    chat(&up.url()).await.unwrap();
    up.stop();
}
