//! The process as its user runs it: exit codes, the announce file, SIGTERM, kill -9.
#![allow(clippy::unwrap_used)]

use std::{
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

fn command(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_penstock-controlplane"));
    command
        .args(["--http-listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0", "--log-level", "warn"])
        .args(["--data-dir".as_ref(), dir.as_os_str()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Ends with the test, whatever happens.
struct Running(Option<Child>);

impl Running {
    fn start(mut command: Command, announce: &Path) -> (Self, serde_json::Value) {
        let mut running = Self(Some(command.arg("--announce").arg(announce).spawn().unwrap()));
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Ok(text) = std::fs::read_to_string(announce) {
                return (running, serde_json::from_str(&text).unwrap());
            }
            let child = running.0.as_mut().unwrap();
            assert!(child.try_wait().unwrap().is_none(), "it ended before it announced itself");
            assert!(Instant::now() < deadline, "nothing was announced");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn end(mut self, signal: Signal) -> Output {
        let child = self.0.take().unwrap();
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        child.wait_with_output().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

#[test]
fn sigterm_and_sigint_end_it_with_zero_and_a_kill_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let client = reqwest::Client::builder().timeout(Duration::from_secs(10)).build().unwrap();
    let mut last_term = 0;
    for (round, signal) in (1..).zip([Signal::SIGKILL, Signal::SIGTERM, Signal::SIGINT]) {
        let announce = dir.path().join(format!("announce-{round}.json"));
        let (running, addresses) = Running::start(command(dir.path()), &announce);
        assert_eq!(addresses["pid"].as_u64(), running.0.as_ref().map(|c| u64::from(c.id())));
        let url = format!("http://{}/api/v2", addresses["http"].as_str().unwrap());
        let body = runtime.block_on(async {
            let put =
                client.put(format!("{url}/deployments/m{round}")).header("content-type", "application/json");
            assert_eq!(put.body("{}").send().await.unwrap().status().as_u16(), 201);
            let status =
                client.get(format!("{url}/cluster/status")).send().await.unwrap().text().await.unwrap();
            serde_json::from_str::<serde_json::Value>(&status).unwrap()
        });
        let term = body["term"].as_u64().unwrap();
        assert!(term > last_term, "{body}");
        last_term = term;
        assert_eq!((body["models"].as_u64(), body["leader"].as_bool()), (Some(round), Some(true)), "{body}");
        let output = running.end(signal);
        if signal != Signal::SIGKILL {
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(0), "{stderr}");
        }
    }
}

#[test]
fn what_cannot_work_is_said_in_one_line_with_its_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let settings = dir.path().join("wrong.toml");
    std::fs::write(&settings, "[fleet]\nlease_ttl = 5\n").unwrap();
    let announce = dir.path().join("announce.json");
    let (held, _) = Running::start(command(dir.path()), &announce);
    let other = tempfile::tempdir().unwrap();
    for (dir, args, code, part) in [
        (dir.path(), vec![], 1, "another process has it open"),
        (other.path(), vec!["--grpc-listen", taken.as_str()], 1, "listen.grpc"),
        (other.path(), vec!["--http-listen", "nowhere"], 2, "listen.http is \"nowhere\""),
        (other.path(), vec!["--config", settings.to_str().unwrap()], 2, "lease_ttl_ms"),
        (other.path(), vec!["--config", "/nonexistent.toml"], 2, "/nonexistent.toml"),
        (other.path(), vec!["--log-level", "loud"], 2, "log.level"),
        (other.path(), vec!["--nonsense"], 2, "--nonsense"),
    ] {
        // The last value of a flag given twice counts, so drop the default for the one under test.
        let mut command = Command::new(env!("CARGO_BIN_EXE_penstock-controlplane"));
        for (flag, default) in [("--http-listen", "127.0.0.1:0"), ("--grpc-listen", "127.0.0.1:0")] {
            if !args.contains(&flag) {
                command.args([flag, default]);
            }
        }
        let output = command.args(["--data-dir".as_ref(), dir.as_os_str()]).args(&args).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(part), "{args:?}: {stderr}");
    }
    assert_eq!(held.end(Signal::SIGTERM).status.code(), Some(0));
}
