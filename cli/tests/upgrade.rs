//! `penstock proxy upgrade` on a running `penstock up`: no request fails, and `up` follows the new process.

#![allow(clippy::unwrap_used)]

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use nix::sys::signal::{Signal, kill};
use serde_json::json;
use support::{Up, client, eventually, penstock, pid};
use tokio::task::JoinSet;

const SOON: Duration = Duration::from_secs(60);

/// Asks one stream after the other until told to stop; panics at the first that is not whole.
async fn worker(url: String, stop: Arc<AtomicBool>, done: Arc<AtomicUsize>) {
    let client = client();
    while !stop.load(SeqCst) {
        let body = json!({"model": "sim-model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "stream": true});
        let answer = client.post(format!("{url}/v1/chat/completions")).json(&body).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        let text = answer.text().await.unwrap();
        assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
        done.fetch_add(1, SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn up_follows_an_upgraded_proxy_and_nothing_fails() {
    let up = Up::start(&["--engines", "1"]);
    let (stop, done) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
    let mut workers = JoinSet::new();
    for _ in 0..4 {
        workers.spawn(worker(up.url(), Arc::clone(&stop), Arc::clone(&done)));
    }
    let more = |requests: usize| {
        let goal = done.load(SeqCst) + requests;
        eventually("the load goes on", SOON, || (done.load(SeqCst) >= goal).then_some(()));
    };
    tokio::task::block_in_place(|| {
        more(10);
        let announce = up.data_dir().join("run/proxy.json");
        for _ in 0..2 {
            let before = up.pid("proxy");
            let output = penstock().args(["proxy", "upgrade", "--announce"]).arg(&announce).output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
            let after = eventually("`up` follows", SOON, || {
                up.try_pid("proxy").filter(|now| *now != before && *now != 0)
            });
            assert!(
                said.contains(&format!("pid {after} ")) && said.contains(&format!("pid {before} ")),
                "{said}"
            );
            more(10);
        }
        assert!(up.stderr().contains("the proxy gave way to a new process"), "{}", up.stderr());
        assert!(!up.stderr().contains("ended"), "nothing was taken for a death: {}", up.stderr());
    });
    stop.store(true, SeqCst);
    while let Some(worker) = workers.join_next().await {
        worker.expect("no request failed");
    }
    // Under supervision like the first one: killed, it is started again.
    let upgraded = up.pid("proxy");
    kill(pid(upgraded), Signal::SIGKILL).unwrap();
    eventually("a new proxy", SOON, || up.try_pid("proxy").filter(|now| *now != upgraded && *now != 0));
    up.stop();
}
