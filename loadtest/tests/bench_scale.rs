//! The scaling benchmark, as small as it can be: all axes, real processes, tables in a file.
#![allow(clippy::unwrap_used)]

use std::{path::Path, process::Command};

const MARKS: [&str; 2] =
    ["<!-- made by make bench-scale: begin -->", "<!-- made by make bench-scale: end -->"];

fn run(args: &[&str]) -> Option<(Option<i32>, String, String)> {
    let program = Path::new(env!("CARGO_BIN_EXE_penstock-bench-scale"));
    let proxy = program.with_file_name("penstock-proxy");
    if !proxy.is_file() {
        println!("penstock-proxy was not built: nothing to measure");
        return None;
    }
    let mut command = Command::new(program);
    command.arg("--proxy").arg(proxy).args(["--engine-sim", env!("CARGO_BIN_EXE_penstock-engine-sim")]);
    let output = command.args(["--rounds", "1", "--seconds", "1.5"]).args(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Some((output.status.code(), text(output.stdout), text(output.stderr)))
}

#[test]
fn every_axis_is_measured_and_its_line_written() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("scaling.md");
    std::fs::write(&file, format!("before\n{}\n{}\nafter\n", MARKS[0], MARKS[1])).unwrap();
    let path = file.to_str().unwrap();
    let small = [
        ["--streams", "10,40"],
        ["--events-per-s", "2000"],
        ["--endpoints", "4,200"],
        ["--tenants", "1,50"],
        ["--prompts", "1000,20000"],
        ["--write", path],
    ];
    let Some((code, said, progress)) = run(&small.concat()) else { return };
    assert_eq!(code, Some(0), "{progress}");
    for wanted in ["| 40 |", "| 200 |", "| 50 |", "| 20000 |", "| 1000 | 10000 | 1000000 |"] {
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
    let written = std::fs::read_to_string(&file).unwrap();
    assert!(written.starts_with("before\n") && written.ends_with("after\n") && written.contains("| 200 |"));
}

#[test]
fn what_cannot_be_done_is_said() {
    let none = ["--streams", "--endpoints", "--tenants", "--prompts"];
    let Some((code, said, _)) = run(&[&none[..], &["--write", "/nonexistent/file"]].concat()) else { return };
    assert!(code == Some(1) && said.contains("--write /nonexistent/file: No such file"), "{said}");
    let unmarked = tempfile::NamedTempFile::new().unwrap();
    let (code, said, _) =
        run(&[&none[..], &["--write", unmarked.path().to_str().unwrap()]].concat()).unwrap();
    assert!(code == Some(1) && said.contains("does not have both marks"), "{said}");
}
