//! How `penstock up` begins and ends: resumed state, one owner, a hard kill, a hasty stop.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use support::{Up, eventually, marked, penstock};

#[test]
fn a_second_start_resumes_what_the_first_one_was_scaled_to() {
    let dir = tempfile::tempdir().unwrap();
    let up = Up::start_in(dir.path(), &["--engines", "1"]);
    up.run_json(&["scale", "sim-model", "--replicas", "2", "--wait"]);
    up.stop();
    assert!(!dir.path().join("up.json").exists());
    let up = Up::start_in(dir.path(), &[]);
    assert_eq!(up.json["engines"].as_array().unwrap().len(), 2, "{}", up.json);
    up.stop();
}

#[test]
fn a_second_up_on_the_same_data_directory_is_refused_with_1() {
    let up = Up::start(&["--engines", "1"]);
    let second = penstock()
        .args(["up", "--json", "--ports", "auto", "--data-dir"])
        .arg(up.data_dir())
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    let error = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(error.contains(&format!("pid {}", up.pid("up"))) && error.contains("--data-dir"), "{error}");
    up.stop();
}

#[test]
fn killed_hard_it_leaves_nothing_once_the_next_one_has_started() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = Up::start_in(dir.path(), &["--engines", "2"]);
    let agent = first.pid("agent");
    let before = marked(dir.path());
    // The agent first, so that nobody is left who would end the engines.
    nix::sys::signal::kill(support::pid(agent), Signal::SIGKILL).unwrap();
    first.kill_hard();
    let second = Up::start_in(dir.path(), &["--engines", "1"]);
    let still: Vec<i32> = marked(dir.path()).into_iter().filter(|pid| before.contains(pid)).collect();
    assert!(still.is_empty(), "of the first up: {still:?}\n{}", second.stderr());
    second.stop();
}

#[test]
fn killed_hard_its_children_stop_by_themselves() {
    let mut up = Up::start(&["--engines", "1"]);
    up.kill_hard();
    let dir = up.data_dir().to_path_buf();
    eventually("the children follow", Duration::from_secs(40), || marked(&dir).is_empty().then_some(()));
}

#[test]
fn an_interrupt_before_it_is_ready_ends_it_with_0_and_nothing_left() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = penstock()
        .args(["up", "--json", "--ports", "auto", "--engines", "1", "--data-dir"])
        .arg(dir.path())
        .arg("--engine-arg=--sim-load-ms=600000")
        .spawn()
        .unwrap();
    eventually("the agent runs", Duration::from_secs(30), || {
        dir.path().join("run/agent.json").exists().then_some(())
    });
    nix::sys::signal::kill(support::pid(child.id()), Signal::SIGINT).unwrap();
    let status = eventually("the end", Duration::from_secs(40), || child.try_wait().unwrap());
    assert_eq!(status.code(), Some(0));
    assert!(marked(dir.path()).is_empty());
}

#[test]
fn not_ready_in_time_is_1_and_says_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let output = penstock()
        .args(["up", "--json", "--ports", "auto", "--engines", "1", "--ready-timeout-s", "3", "--data-dir"])
        .arg(dir.path())
        .arg("--engine-arg=--sim-load-ms=600000")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("0 of 1 engines") && error.contains("--ready-timeout-s"), "{error}");
    assert!(marked(dir.path()).is_empty());
}

#[test]
fn a_child_that_dies_again_and_again_ends_it_all_with_1() {
    let mut up = Up::start(&["--engines", "0"]);
    for _ in 0..6 {
        let proxy = up.pid("proxy");
        nix::sys::signal::kill(support::pid(proxy), Signal::SIGKILL).unwrap();
        eventually("a new proxy, or the end", Duration::from_secs(20), || {
            (up.try_pid("proxy") != Some(proxy)).then_some(())
        });
    }
    assert_eq!(up.wait().code(), Some(1));
    assert!(up.stderr().contains("giving up"), "{}", up.stderr());
    assert!(marked(up.data_dir()).is_empty());
}

#[test]
fn a_second_signal_hastens() {
    let mut up = Up::start(&["--engines", "1"]);
    let began = Instant::now();
    up.signal(Signal::SIGTERM);
    up.signal(Signal::SIGINT);
    up.wait();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert!(marked(up.data_dir()).is_empty());
}
