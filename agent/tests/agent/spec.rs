//! What a deployment says, down to the engine's command line: typed fields, versions, and what is refused.

use std::{fs, os::unix::fs::PermissionsExt};

use penstock_config::agent::EngineProgram;
use penstock_proto::v1::{self, EngineState, agent_message::Message};

use crate::{
    controlplane::ControlPlane,
    engine,
    node::{Node, assignment, number},
};

/// An assignment with typed fields, of a program that calls itself an older vLLM.
fn typed(generation: u64, options: v1::EngineOptions) -> v1::Assignment {
    let mut assignment = assignment("m-0", generation, &[]);
    if let Some(spec) = assignment.spec.as_mut() {
        spec.engine = "old".into();
        spec.options = Some(options);
        spec.env.insert("MY_API_KEY".into(), "hush-hush".into());
    }
    assignment
}

/// Puts a program on the node that says `version` when it is asked, and is the stand-in otherwise.
fn install(node: &mut Node, version: &str) {
    let program = node.path("old-vllm");
    let stand_in = engine::command().iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ");
    let script = format!(
        "#!/bin/sh\nif [ \"$1\" = --version ]; then echo 'INFO noise'; echo {version}; exit; fi\nexec {stand_in} \"$@\"\n"
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let env = [(engine::ROLE.to_owned(), "1".to_owned())].into();
    let old =
        EngineProgram { command: vec![program], env, shutdown_timeout_s: 3, ..EngineProgram::default() };
    node.config.engines.programs.insert("old".into(), old);
}

#[tokio::test]
async fn a_command_line_is_fitted_to_the_version_that_the_program_tells() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    install(&mut node, "0.17.0");
    let options = v1::EngineOptions { kv_events: Some(true), max_num_seqs: Some(8), ..Default::default() };
    cp.assign(1, 2, vec![typed(1, options)]).await;
    node.start().await;
    let engine = node.registered("m-0").await;
    let words: Vec<&str> = engine["command"].as_array().unwrap().iter().filter_map(|w| w.as_str()).collect();
    let line = words.join(" ");
    assert!(line.contains("--max-num-seqs 8 --kv-events-config {\"enable_kv_cache_events\":true"), "{line}");
    assert!(!line.contains("--shutdown-timeout"), "it came later: {line}");
    assert_eq!(engine["version"], "0.17.0");
    assert!(engine["notes"][0].as_str().unwrap().contains("--shutdown-timeout was left out"), "{engine}");
    let status = cp.hears_status("m-0", 0, |s| s.state == i32::from(EngineState::Ready)).await;
    assert_eq!((status.engine_version.as_str(), status.notes.len()), ("0.17.0", 1));
    let publishes = status.kv_events_address.rsplit(':').next().unwrap().parse::<u16>().unwrap();
    assert!(
        line.contains(&format!("tcp://*:{publishes}")) && i32::from(publishes) != number(&engine, "port")
    );
    let told = |m: &Message| match m {
        Message::Report(report) => report.programs.iter().find(|p| p.name == "old").cloned(),
        _ => None,
    };
    let program = cp.hears("the programs", 0, |heard| heard.iter().rev().find_map(told)).await;
    assert!(program.supports.contains(&"kv_events".to_owned()), "{program:?}");
    assert!(!program.supports.contains(&"shutdown_timeout".to_owned()), "{program:?}");
    assert!(!node.get("/engines").await.1.contains("hush"), "a secret is shown");
}

#[tokio::test]
async fn what_the_version_lacks_is_refused_until_a_newer_one_is_installed() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    install(&mut node, "0.28.0");
    // It is given up here meanwhile, and tried again slowly.
    node.config.engines.give_up_retry_s = 1;
    let options = v1::EngineOptions { max_num_queued_reqs: Some(5), ..Default::default() };
    cp.assign(1, 2, vec![typed(1, options)]).await;
    node.start().await;
    let failed = cp.hears_status("m-0", 0, |s| s.state == i32::from(EngineState::Failed)).await;
    let wanted = "vLLM 0.28.0 of this node has no --max-num-queued-reqs (field max_num_queued_reqs): it came with 0.29.0";
    assert!(failed.reason.contains(wanted), "{}", failed.reason);
    assert_eq!(failed.pid, 0, "nothing was started");
    install(&mut node, "0.33.0+cpu");
    let engine = node.registered("m-0").await;
    assert_eq!(engine["version"], "0.33.0+cpu");
}

#[tokio::test]
async fn a_template_that_cannot_be_filled_in_ends_the_agent_at_once() {
    let cp = ControlPlane::start().await;
    let mut node = Node::new(&cp);
    let command = vec!["serve-it".into(), "{port}".into(), "{modelpath}".into()];
    let program = EngineProgram { kind: "exec".into(), command, ..EngineProgram::default() };
    node.config.engines.programs.insert("mine".into(), program);
    let status = node.spawn(&[]).wait().unwrap();
    assert_eq!(status.code(), Some(2));
    let log = fs::read_to_string(node.agent_log()).unwrap();
    assert!(log.contains("engines.mine.command has \"{modelpath}\": {modelpath} is no placeholder"), "{log}");
}
