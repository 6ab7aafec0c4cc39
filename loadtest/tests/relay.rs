//! The raw TCP relay as a process: verified streams and whole answers pass, and engines share the connections.

#![allow(clippy::unwrap_used)]

mod engine_support;

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
};

use engine_support::Sim;
use penstock_loadtest::load::{Options, run};

struct Relay {
    child: Child,
    url: String,
}

impl Relay {
    fn start(engines: &[&Sim]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_penstock-relay"));
        for engine in engines {
            command.args(["--engine", engine.url("").trim_start_matches("http://")]);
        }
        let mut child = command.args(["--threads", "2"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").unwrap();
        Self { child, url: format!("http://{address}") }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.child.kill().and_then(|()| self.child.wait()).unwrap();
    }
}

#[tokio::test]
async fn every_byte_passes_and_engines_share_the_connections() {
    let engines = [Sim::start(&["--sim-speed", "0"]), Sim::start(&["--sim-speed", "0"])];
    let relay = Relay::start(&[&engines[0], &engines[1]]);
    let streams = Options {
        url: relay.url.clone(),
        streams: 40,
        tokens: 50,
        requests: 80,
        connect_ramp_ms: 50,
        ..Options::default()
    };
    let report = run(streams.clone()).await.unwrap();
    assert!(report.is_good() && report.good == 80, "{}", report.table());
    let shares = engines.each_ref().map(|sim| sim.state()["generated_tokens"].as_u64().unwrap());
    assert!(shares.iter().all(|share| *share > 1_000), "{shares:?}");
    // Few: a simulator keeps idle connections for five seconds, as vLLM does, and a busy machine takes long for large bodies.
    let bodies = Options { unary: true, prompt_bytes: 100_000, streams: 4, requests: 12, ..streams };
    let report = run(bodies).await.unwrap();
    assert!(report.is_good(), "{}", report.table());
}

#[test]
fn bad_input_is_answered_in_words() {
    let run = |arguments: &[&str]| {
        let ran = Command::new(env!("CARGO_BIN_EXE_penstock-relay")).args(arguments).output().unwrap();
        (ran.status.code(), String::from_utf8(ran.stderr).unwrap())
    };
    let (code, said) = run(&[]);
    assert!(code == Some(2) && said.contains("--engine"), "{said}");
    let (code, said) = run(&["--engine", "127.0.0.1:1", "--buffer-kib", "0"]);
    assert!(code == Some(2) && said.contains("`0` is not a whole number from 1 to 65536"), "{said}");
    let (code, said) = run(&["--engine", "127.0.0.1:1", "--listen", "192.0.2.1:1"]);
    assert!(code == Some(1) && said.contains("cannot listen on 192.0.2.1:1"), "{said}");
}
