//! The commands that run a site, against a whole Penstock: apply and its sisters, looking, checks, a chat.

#![allow(clippy::unwrap_used)]

mod support;

use std::{path::Path, process::Output};

use serde_json::{Value, json};
use support::{Up, penstock};

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn exits(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "{}\n{}", stdout(output), stderr(output));
}

fn write(dir: &Path, text: &str) -> String {
    let file = dir.join("fleet.yaml");
    std::fs::write(&file, text).unwrap();
    file.to_str().unwrap().to_owned()
}

fn outcomes(json: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let each = json["results"].as_array().unwrap().iter();
    each.map(|one| (text(&one["name"]), text(&one["outcome"]))).collect()
}

#[test]
fn manifests_are_applied_compared_and_pruned() {
    let dir = tempfile::tempdir().unwrap();
    let up = Up::start(&["--engines", "1"]);
    let fleet = "kind: Route\nname: chat\nspec: {targets: [{model: a}, {model: sim-model, weight: 1}]}\n---\n\
                 kind: Deployment\nname: a\nspec: {engine: sim, replicas: 1}\n---\n\
                 kind: NodePolicy\nname: n-9\nspec: {labels: {rack: '7'}}\n";
    let file = write(dir.path(), fleet);
    let differs = up.run(&["diff", "-f", &file, "--exit-code"]);
    exits(&differs, 5);
    assert!(stdout(&differs).contains("3 to create"), "{}", stdout(&differs));
    let tried = up.run(&["apply", "-f", &file, "--dry-run"]);
    exits(&tried, 0);
    exits(&up.run(&["diff", "-f", &file, "--exit-code"]), 5);
    let applied = up.run_json(&["apply", "-f", &file, "--wait"]);
    let pair = |name: &str, outcome: &str| (name.to_owned(), outcome.to_owned());
    assert_eq!(outcomes(&applied), [pair("n-9", "created"), pair("a", "created"), pair("chat", "created")]);
    let again = up.run_json(&["apply", "-f", &file]);
    assert!(outcomes(&again).iter().all(|(_, outcome)| outcome == "unchanged"), "{again}");
    exits(&up.run(&["diff", "-f", &file, "--exit-code"]), 0);

    // What others changed meanwhile is seen field by field; replicas that a manifest does not speak of stay.
    exits(&up.run(&["scale", "a", "--replicas", "2", "--wait"]), 0);
    let quiet = write(dir.path(), &fleet.replace(", replicas: 1", ", args: [--sim-itl-ms=3]"));
    let told = stdout(&up.run(&["diff", "-f", &quiet]));
    assert!(told.contains("+ args: [\"--sim-itl-ms=3\"]") && !told.contains("replicas"), "{told}");
    let changed = up.run(&["apply", "-f", &quiet, "--wait"]);
    exits(&changed, 0);
    assert!(stdout(&changed).contains("changed    args"), "{}", stdout(&changed));
    assert_eq!(up.run_json(&["get", "deployments", "a"])["deployments"][0]["replicas"], 2);

    // Pruning takes only what is named, and a typing error in one document applies none of the others.
    let one =
        write(dir.path(), "kind: Deployment\nname: sim-model\nspec: {engine: sim, model_path: sim-model}\n");
    assert!(stdout(&up.run(&["diff", "-f", &one, "--prune", "routes"])).is_empty());
    exits(&up.run(&["apply", "-f", &one, "--prune", "routes"]), 2);
    let bad =
        write(dir.path(), "kind: Deployment\nname: b\n---\nkind: Deployment\nname: c\nspec: {replicsa: 1}\n");
    let refused = up.run(&["apply", "-f", &bad]);
    exits(&refused, 2);
    assert!(stderr(&refused).contains("fleet.yaml:6 (document 2): spec.replicsa"), "{}", stderr(&refused));
    exits(&up.run(&["get", "deployments", "b"]), 4);
    // What only the control plane can refuse fails by itself; the rest is done.
    let half = write(
        dir.path(),
        "kind: Deployment\nname: chat\nspec: {engine: sim, replicas: 0}\n---\nkind: Deployment\nname: d\nspec: {engine: sim, replicas: 0}\n",
    );
    let failed = up.run(&["apply", "-f", &half, "-o", "json"]);
    exits(&failed, 1);
    let json: Value = serde_json::from_slice(&failed.stdout).unwrap();
    assert_eq!(outcomes(&json), [pair("chat", "failed"), pair("d", "created")]);
    assert!(json["results"][0]["error"].as_str().unwrap().contains("name of a route"), "{json}");
    let keep = write(
        dir.path(),
        "kind: Deployment\nname: sim-model\nspec: {engine: sim, model_path: sim-model}\n---\nkind: Route\nname: sim-model\nspec: {targets: [{model: sim-model}]}\n",
    );
    let pruned = up.run_json(&["apply", "-f", &keep, "--prune", "routes"]);
    assert!(outcomes(&pruned).contains(&pair("chat", "deleted")), "{pruned}");
    let pruned = outcomes(&up.run_json(&["apply", "-f", &keep, "--prune", "deployments"]));
    assert_eq!(pruned[2..], [pair("a", "deleted"), pair("d", "deleted")]);
    let left = stdout(&up.run(&["get", "deployments", "--names-only"]));
    assert_eq!(left, "sim-model\n");
    up.stop();
}

#[test]
fn looking_checking_and_chatting() {
    let up = Up::start(&["--engines", "2"]);
    let seen = up.run_json(&["get", "endpoints", "sim-model-1"]);
    assert_eq!(seen["endpoints"].as_array().unwrap().len(), 1);
    assert_eq!(stdout(&up.run(&["get", "node", "--names-only"])), "local\n");
    let yaml = stdout(&up.run(&["get", "deployments", "-o", "yaml"]));
    assert!(yaml.starts_with("deployments:\n  - model: sim-model\n"), "{yaml}");
    exits(&up.run(&["get", "routes", "nobody"]), 4);
    exits(&up.run(&["get", "things"]), 2);
    for (kind, name, part) in [
        ("deployment", "sim-model", "waits for nothing"),
        ("node", "local", "endpoints (2)"),
        ("endpoint", "sim-model-0", "deployment\n"),
        ("route", "sim-model", "implicit: true"),
        ("proxy", "local", "version_acked"),
    ] {
        let page = up.run(&["describe", kind, name]);
        exits(&page, 0);
        assert!(stdout(&page).contains(part), "{}", stdout(&page));
        exits(&up.run(&["describe", kind, "nobody"]), 4);
    }
    exits(&up.run(&["wait-ready"]), 0);
    exits(&up.run(&["wait-ready", "nobody"]), 4);
    assert!(stdout(&up.run(&["cluster", "status"])).contains("leader_id"));

    let chat = up.run(&["verify-chat", "--json"]);
    exits(&chat, 0);
    let chat: Value = serde_json::from_slice(&chat.stdout).unwrap();
    assert!(chat["engine"].as_str().unwrap().starts_with("sim-model-"), "{chat}");
    assert!(chat["ttft_ms"].as_u64() <= chat["total_ms"].as_u64() && chat["tokens"] == 32, "{chat}");
    exits(&up.run(&["verify-chat", "nobody"]), 1);
    let nobody = penstock().args(["verify-chat", "--proxy", "http://127.0.0.1:9"]).output().unwrap();
    exits(&nobody, 3);

    let doctor = up.run(&["doctor"]);
    exits(&doctor, 0);
    for part in ["leads, term", "2 of 2 engines ready", "proxy local: tables of version", "backups: none"] {
        assert!(stdout(&doctor).contains(part), "{part} missing in\n{}", stdout(&doctor));
    }
    exits(&up.run(&["doctor", "--strict"]), 1);
    let gone =
        penstock().args(["doctor", "--controlplane", "http://127.0.0.1:9", "-o", "json"]).output().unwrap();
    exits(&gone, 1);
    let gone: Value = serde_json::from_slice(&gone.stdout).unwrap();
    assert_eq!(gone["worst"], json!("fail"));

    // Draining the node moves nothing away here, for there is no other; it says so when it is waited for.
    let drained = up.run(&["drain", "node/local", "--reason", "disk", "--wait", "--timeout-s", "1"]);
    exits(&drained, 1);
    assert!(stderr(&drained).contains("stays so, but this is left: sim-model-0"), "{}", stderr(&drained));
    assert!(stdout(&up.run(&["doctor"])).contains("in maintenance: disk"));
    exits(&up.run(&["undrain", "node/local"]), 0);
    exits(&up.run(&["drain", "sim-model-0", "--wait"]), 0);
    exits(&up.run(&["undrain", "sim-model-0"]), 0);
    exits(&up.run(&["drain", "node/nobody"]), 4);

    let placed = up.run(&[
        "place",
        "--model-uid",
        "u",
        "--model-name",
        "x",
        "--node-id",
        "local",
        "--engine",
        "sim",
        "--port",
        "10814",
    ]);
    exits(&placed, 0);
    assert!(
        stdout(&placed).starts_with("placed: key=/placements/u replica=u-0 node=local"),
        "{}",
        stdout(&placed)
    );
    assert!(stderr(&placed).contains("port 10814 is not passed on"));
    let elsewhere = ["place", "--model-uid", "sim-model", "--model-name", "x", "--node-id", "local"];
    exits(&up.run(&elsewhere), 1);
    up.stop();
}

#[test]
fn commands_that_need_no_site() {
    let run = |args: &[&str]| penstock().args(args).output().unwrap();
    let preflight = run(&["preflight", "--for", "proxy", "--json"]);
    let json: Value = serde_json::from_slice(&preflight.stdout).unwrap();
    assert!(json["findings"].as_array().unwrap().len() >= 5, "{json}");
    let taken = std::net::TcpListener::bind("0.0.0.0:18090");
    let preflight = stdout(&run(&["preflight", "--for", "controlplane", "--etcd", "http://127.0.0.1:9"]));
    assert!(preflight.contains("FAIL  etcd http://127.0.0.1:9"), "{preflight}");
    if taken.is_ok() {
        assert!(preflight.contains("18090, for the control plane"), "{preflight}");
    }
    let zones = ["--node", "m1=x", "--node", "m2=y", "--node", "a=reserved-arbitration"];
    let plan = run(&[&["etcd-topology", "plan", "--mode", "multiZoneHA"][..], &zones].concat());
    exits(&plan, 0);
    assert!(stdout(&plan).contains("3 members, 1+1+1"), "{}", stdout(&plan));
    exits(&run(&["etcd-topology", "plan", "--mode", "multizone-ha", "--node", "m1"]), 2);
    assert!(stdout(&run(&["man"])).starts_with(".ie"), "{}", &stdout(&run(&["man"]))[..40]);
    assert!(stdout(&run(&["completions", "bash"])).contains("etcd-topology"));
}
