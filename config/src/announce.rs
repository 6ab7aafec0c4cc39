//! The announce file: how a process tells whoever started it where it listens.
//!
//! A port of 0 in the settings means "any free one", so the addresses are known only after binding. A file (rather than
//! a line on stdout) can be read at any time, by several readers, and survives the reader. The rename makes it appear
//! whole: a reader sees nothing, the former text, or the new text, never half of one.

use std::{io, path::Path};

use serde::Serialize;

/// Writes `addresses` as one JSON object to `path`, replacing what was there in one step. Call it once every socket of
/// the process is bound.
///
/// # Errors
/// The text names the file: its folder is absent or not writable, or the value cannot be put into JSON.
pub fn announce(path: &Path, addresses: &impl Serialize) -> io::Result<()> {
    let named =
        |e: io::Error| io::Error::new(e.kind(), format!("cannot announce in {}: {e}", path.display()));
    let mut text = serde_json::to_vec(addresses).map_err(|e| named(e.into()))?;
    text.push(b'\n');
    // Beside the target, so that the rename stays on one file system; with the pid, so that two writers never share it.
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let written = std::fs::write(&temporary, &text).and_then(|()| std::fs::rename(&temporary, path));
    if written.is_err() {
        drop(std::fs::remove_file(&temporary));
    }
    written.map_err(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_the_former_text_whole_and_leaves_no_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("proxy.json");
        announce(&path, &[("public", "127.0.0.1:1")]).unwrap();
        announce(&path, &serde_json::json!({"public": "127.0.0.1:2"})).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"public\":\"127.0.0.1:2\"}\n");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_absent_folder_is_an_error_that_names_the_file() {
        let error = announce(Path::new("/nonexistent-folder/a.json"), &1).unwrap_err();
        assert!(error.to_string().contains("/nonexistent-folder/a.json"), "{error}");
    }
}
