//! plan() under scripts with golden transcripts (`tests/plan/*.txt`) and under random histories.

mod limits;
mod properties;
mod scaling;
mod script;
mod sleeping;
mod world;

use std::path::Path;

use world::World;

/// Each file is a list of commands (`> ...`), each followed by what it must bring about. `UPDATE_TRANSCRIPTS=1` writes
/// what it brings about now; read the difference before you keep it.
#[test]
fn scripts_bring_about_their_transcripts() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plan");
    let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 4, "the transcripts are missing from {}", folder.display());
    for file in files {
        let script = std::fs::read_to_string(&file).unwrap();
        let mut world = World::default();
        let mut transcript = String::new();
        for line in script.lines() {
            if let Some(command) = line.strip_prefix("> ") {
                transcript.push_str(&format!("{line}\n{}", world.command(command)));
            } else if line.starts_with('#') || line.is_empty() {
                transcript.push_str(&format!("{line}\n"));
            }
        }
        if std::env::var_os("UPDATE_TRANSCRIPTS").is_some() {
            std::fs::write(&file, transcript).unwrap();
        } else {
            assert_eq!(transcript, script, "{} (UPDATE_TRANSCRIPTS=1 rewrites it)", file.display());
        }
    }
}
