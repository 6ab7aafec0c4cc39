//! `penstock-bench-instructions` as its user runs it: real callgrind over a small program, pins written, kept, and broken.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

/// A folder with a program of parts, and where its pins go.
struct Bench {
    folder: TempDir,
}

impl Bench {
    /// Its part "turns" takes `turns` turns of a loop.
    fn new(turns: u32) -> Self {
        let bench = Self { folder: TempDir::new().unwrap() };
        bench.parts(&format!(
            "[ \"$1\" = --list ] && echo '40 turns' && exit\ni=0\nwhile [ $i -lt $(($3 * {turns})) ]; do i=$((i + 1)); done\n"
        ));
        bench
    }

    /// Makes the program anew.
    fn parts(&self, script: &str) {
        let file = self.file("parts");
        fs::write(&file, format!("#!/bin/sh\n{script}")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, flags: &[&str]) -> (i32, String) {
        let none = Path::new("/nonexistent");
        let output: Output = Command::new(env!("CARGO_BIN_EXE_penstock-bench-instructions"))
            .args([Path::new("--proxy"), none, Path::new("--engine-sim"), none])
            .args([Path::new("--parts"), &self.file("parts"), Path::new("--pins"), &self.file("pins.toml")])
            .args(["--only", "turns"])
            .args(flags)
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap(), String::from_utf8(text).unwrap())
    }
}

#[test]
fn what_costs_more_or_less_than_it_did_fails_and_says_so() {
    let bench = Bench::new(10);
    let (code, said) = bench.run(&["--pin"]);
    assert_eq!((code, said.contains("NEW"), said.contains("is written")), (0, true, true), "{said}");
    let (code, said) = bench.run(&[]);
    assert_eq!((code, said.contains("+0.0 %")), (0, true), "the same again: {said}");
    for (turns, word) in [(12, "are allowed"), (8, "cheaper than pinned")] {
        let other = Bench::new(turns);
        fs::copy(bench.file("pins.toml"), other.file("pins.toml")).unwrap();
        let (code, said) = other.run(&[]);
        assert_eq!(code, 1, "{said}");
        for part in ["\"turns\" costs", word, "make count ARGS=--pin"] {
            assert!(said.contains(part), "{part} not in {said}");
        }
        let (code, said) = other.run(&["--pin"]);
        assert_eq!(code, 0, "{said}");
        let (code, said) = other.run(&[]);
        assert_eq!(code, 0, "pinned: {said}");
    }
}

#[test]
fn where_the_instructions_go_is_written_down() {
    let bench = Bench::new(10);
    let folder = bench.file("kept");
    let (code, said) = bench.run(&["--pin", "--keep", folder.to_str().unwrap()]);
    assert_eq!(code, 0, "{said}");
    let text = fs::read_to_string(folder.join("turns.txt")).unwrap();
    assert!(text.contains("turns: instructions of one more") && text.lines().count() > 10, "{text}");
}

#[test]
fn what_is_missing_is_named() {
    let bench = Bench::new(1);
    let (code, said) = bench.run(&[]);
    assert_eq!((code, said.contains("pins.toml") && said.contains("--pin")), (1, true), "{said}");
    fs::write(bench.file("pins.toml"), "counts = 1").unwrap();
    let (code, said) = bench.run(&[]);
    assert_eq!((code, said.contains("pins.toml")), (1, true), "{said}");
    fs::remove_file(bench.file("pins.toml")).unwrap();
    let (code, said) = bench.run(&["--pin", "--only", "nothing of that name", "--only", "neither"]);
    assert_eq!(code, 0, "one of several is enough: {said}");
    bench.parts("echo nothing useful\n");
    let (code, said) = bench.run(&[]);
    assert_eq!((code, said.contains("not a list of parts")), (1, true), "{said}");
    bench.parts("[ \"$1\" = --list ] && echo '1 turns' && exit\necho broken >&2\nexit 3\n");
    let (code, said) = bench.run(&[]);
    assert_eq!((code, said.contains("broken") && said.contains("--run turns 1")), (1, true), "{said}");
}
