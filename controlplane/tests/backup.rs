//! Backups over REST and by the clock, and what a restore refuses, on a control plane with a scripted agent.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Agent, Plane, wait};
use penstock_controlplane::backup::Backup;
use serde_json::{Value, json};

async fn backup(plane: &Plane) -> String {
    let answer = plane.fetch("/api/v2/backup").await;
    assert_eq!(answer.status().as_u16(), 200);
    let name = answer.headers()["content-disposition"].to_str().unwrap().to_owned();
    assert!(name.contains("penstock-") && name.contains(".json"), "{name}");
    answer.text().await.unwrap()
}

async fn restore(plane: &Plane, query: &str, body: &str) -> (u16, Value) {
    plane.call("POST", &format!("/api/v2/restore{query}"), Some(body)).await
}

async fn put(plane: &Plane, path: &str, body: Value) {
    let (status, answer) = plane.call("PUT", path, Some(&body.to_string())).await;
    assert!(status < 300, "{path}: {status} {answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_goes_into_an_empty_site_and_peers_see_a_later_term() {
    let (old, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let plane = Plane::start(old.path()).await;
    let agent = Agent::connect(&plane, "n1", 2).await;
    put(&plane, "/api/v2/deployments/a%2Fb", json!({"engine": "sim", "replicas": 1})).await;
    put(&plane, "/api/v2/routes/chat", json!({"targets": [{"model": "a/b"}]})).await;
    put(
        &plane,
        "/api/v2/nodes/spare",
        json!({"cordoned": true, "taints": [{"key": "k", "effect": "no_schedule"}]}),
    )
    .await;
    let placed = agent.wait_assigned(1).await;
    agent.serve(&placed[0], 9_001).await;
    let text = backup(&plane).await;
    let kept = Backup::read(text.as_bytes()).unwrap();
    assert!(kept.entries.iter().all(|e| !e.key.starts_with("/endpoints/") && !e.key.starts_with("/nodes/")));
    let (before, term) = (plane.get("/api/v2/deployments").await, agent.welcome().term);
    drop(agent);
    plane.stop().await;

    let plane = Plane::start(new.path()).await;
    let (status, tried) = restore(&plane, "?dry_run=true", &text).await;
    assert_eq!((status, &tried["dry_run"], &tried["into_empty"]), (200, &json!(true), &json!(true)));
    assert_eq!(plane.get("/api/v2/deployments").await, json!({"deployments": [], "next_cursor": null}));
    let (status, done) = restore(&plane, "", &text).await;
    assert_eq!((status, done["changes"].as_array().unwrap().len()), (200, 3), "{done}");
    let after = plane.get("/api/v2/deployments/a%2Fb").await;
    for field in ["replicas", "engine", "model_path", "created_unix_s"] {
        assert_eq!(after[field], before["deployments"][0][field], "{field}");
    }
    assert_eq!(plane.get("/api/v2/nodes/spare").await["policy"]["taints"][0]["key"], "k");
    // The same machine comes back and keeps what it runs, under a term that it has not seen yet.
    let agent = Agent::connect(&plane, "n1", 2).await;
    let again = agent.wait_assigned(1).await;
    assert_eq!((again[0].generation, &again[0].replica_id), (placed[0].generation, &placed[0].replica_id));
    assert!(agent.welcome().term > term + 1_000, "{} after {term}", agent.welcome().term);
    assert_eq!(plane.get("/api/v2/cluster/status").await["term"], agent.welcome().term);
    let result = agent.serve(&again[0], 9_001).await;
    assert!(result.accepted, "{result:?}");
    // What is given out next was never given out.
    put(&plane, "/api/v2/deployments/c", json!({"engine": "sim"})).await;
    let newest = agent.wait_assigned(2).await.iter().map(|a| a.generation).max().unwrap();
    assert!(newest > kept.generation + 1_000, "{newest}");
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_restored_is_refused_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    put(&plane, "/api/v2/deployments/m", json!({"engine": "sim", "replicas": 0})).await;
    let text = backup(&plane).await;
    put(&plane, "/api/v2/deployments/m", json!({"engine": "sim", "replicas": 0, "args": ["--x"]})).await;
    let now = plane.get("/api/v2/deployments").await;
    for (query, body, status, code, part) in [
        ("", "{}", 422, "invalid_backup", "no backup"),
        ("", &text[..text.len() / 2], 400, "invalid_json", "not JSON"),
        ("", &text.replace("\"schema\": 2", "\"schema\": 3"), 422, "invalid_backup", "checksum"),
        ("", &text, 409, "restore_guarded", "deployment \"m\": it was changed at revision"),
        ("?force=perhaps", &text, 400, "invalid_parameter", "true and false"),
        ("?forse=true", &text, 400, "unknown_parameter", "only_missing"),
    ] {
        let (found, answer) = restore(&plane, query, body).await;
        assert_eq!((found, answer["error"]["code"].as_str().unwrap()), (status, code), "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(part), "{answer}");
        assert_eq!(plane.get("/api/v2/deployments").await, now);
    }
    let (status, kept) = restore(&plane, "?only_missing=true", &text).await;
    assert_eq!((status, &kept["changes"][0]["what"]), (200, &json!("keep")), "{kept}");
    let (status, done) = restore(&plane, "?force=true", &text).await;
    assert_eq!((status, &done["changes"][0]["what"]), (200, &json!("change")), "{done}");
    assert_eq!(plane.get("/api/v2/deployments/m").await["args"], json!([]));
    // Going back is the newest revision, and can be undone like any other.
    assert_eq!(plane.get("/api/v2/revisions/m").await["revisions"][0]["number"], 3);
    plane.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_makes_backups_by_the_clock_and_says_when() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("backups");
    let there = || -> Vec<std::path::PathBuf> {
        let files = std::fs::read_dir(&folder).into_iter().flatten().map(|file| file.unwrap().path());
        files.filter(|file| file.extension().is_some_and(|ending| ending == "json")).collect()
    };
    let plane = Plane::start_with(dir.path(), |config| {
        config.backup.dir = folder.to_str().unwrap().into();
        config.backup.every_s = 1;
        config.backup.keep = 2;
        config.backup.keep_days = 0;
    })
    .await;
    let made = async || plane.metric("penstock_controlplane_backups_total{outcome=\"ok\"}").await >= 4.0;
    wait("four backups", async || made().await.then_some(())).await;
    assert!((1..=3).contains(&there().len()), "{:?}", there());
    let newest = there().into_iter().max().unwrap();
    Backup::read(&std::fs::read(newest).unwrap()).unwrap();
    assert!(plane.metric("penstock_controlplane_backup_last_success_timestamp_seconds").await > 1.6e9);
    assert!(plane.metric("penstock_controlplane_backup_bytes").await > 100.0);
    assert_eq!(plane.metric("penstock_controlplane_backup_interval_seconds").await, 1.0);
    // A folder that cannot be written is counted; the rest goes on.
    std::fs::remove_dir_all(&folder).unwrap();
    std::fs::write(&folder, "in the way").unwrap();
    let failed =
        async || plane.metric("penstock_controlplane_backups_total{outcome=\"failed\"}").await >= 1.0;
    wait("a failure", async || failed().await.then_some(())).await;
    plane.stop().await;
}
