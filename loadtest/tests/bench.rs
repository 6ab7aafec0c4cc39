//! The comparison with the peers as a command, at its smallest: processes begin, carry a verified load, are measured and
//! end; who is not there is reported; results are kept, merged and put into a page.

#![allow(clippy::unwrap_used)]

use std::{
    path::Path,
    process::{Command, Output},
};

use serde_json::Value;

fn bench(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_penstock-bench"));
    command.args(["--relay", env!("CARGO_BIN_EXE_penstock-relay")]);
    command.args(["--engine-sim", env!("CARGO_BIN_EXE_penstock-engine-sim")]);
    command.args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_quick_run_measures_who_is_there_and_reports_who_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(
        at("page.md"),
        "# Page\n\n<!-- bench: made by `make bench`, do not edit -->\n<!-- bench: end -->\n\nEnd.\n",
    )
    .unwrap();
    // Built with the workspace's tests; on its own this package does not build it.
    let is_there = Path::new(env!("CARGO_BIN_EXE_penstock-bench")).with_file_name("penstock-proxy").is_file();
    let flags = [
        "--quick",
        "--threads",
        "1",
        "--cells",
        "unary,burst,idle",
        "--peers",
        "direct,relay,penstock,nginx",
    ];
    let ran = bench(&[&flags[..], &["--json", &at("first.json"), "--write", &at("page.md")]].concat());
    let said = text(&ran.stderr);
    assert!(ran.status.success(), "{said}");

    let results: Value = serde_json::from_slice(&std::fs::read(at("first.json")).unwrap()).unwrap();
    let turns = results["turns"].as_array().unwrap();
    for peer in ["direct", "relay", "penstock", "nginx"] {
        let own: Vec<&Value> = turns.iter().filter(|turn| turn["peer"] == peer).collect();
        assert_eq!(own.len(), if peer == "direct" { 2 } else { 3 }, "{said}");
        for turn in own {
            let sample = &turn["sample"];
            if peer == "nginx" || (peer == "penstock" && !is_there) {
                assert!(turn["why_not"].as_str().unwrap().contains("not installed: "), "{turn}");
                continue;
            }
            assert!(sample["failed"] == 0 && sample["units"].as_f64().unwrap() > 0.0, "{turn}");
            // An idle stream may cost nothing for a second.
            let busy = peer != "direct" && turn["cell"] != "idle";
            assert!(!busy || sample["cpu_s"].as_f64().unwrap() > 0.0, "{turn}");
        }
    }
    assert!(results["machine"]["cores"].as_u64().unwrap() > 0 && results["versions"]["relay"].is_string());
    assert!(!results["flags"].as_str().unwrap().contains(&at("")), "{results}");

    let page = std::fs::read_to_string(at("page.md")).unwrap();
    assert!(page.starts_with("# Page\n") && page.ends_with("\nEnd.\n"), "{page}");
    assert!(
        page.contains("(`burst`)") && page.contains("- nginx: not installed: --peers-dir is not given."),
        "{page}"
    );

    let again = bench(&["--from", &at("first.json"), &at("first.json"), "--write", &at("page.md")]);
    assert!(again.status.success(), "{}", text(&again.stderr));
    assert_eq!(std::fs::read_to_string(at("page.md")).unwrap(), page);
}

#[test]
fn bad_input_is_answered_in_words() {
    let ran = bench(&["--cells", "x"]);
    assert!(ran.status.code() == Some(2) && text(&ran.stderr).contains("there is no cell `x`"));
    let ran = bench(&["--from", "/nowhere.json"]);
    assert!(ran.status.code() == Some(1) && text(&ran.stderr).contains("/nowhere.json: No such file"));
    let ran = Command::new(env!("CARGO_BIN_EXE_penstock-bench"))
        .args(["--quick", "--engine-sim", "/nowhere"])
        .output()
        .unwrap();
    assert!(text(&ran.stderr).contains("there is no /nowhere: name it with --engine-sim"));
}
