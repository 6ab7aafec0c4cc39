//! Where manifests come from: files, folders, standard input.

use std::{
    fs, io,
    io::Read,
    path::{Path, PathBuf},
};

use super::{Document, Place, Problem, read::Broken, toml, yaml};

/// Larger than any manifest, and no harm to read.
const MAX_BYTES: u64 = 16 << 20;
/// Files of a folder that are manifests.
const ENDINGS: [&str; 4] = ["yaml", "yml", "json", "toml"];

/// Every document of `paths`, in order; `-` is standard input, a folder all of its manifests by name. Every file is read,
/// so that all problems are told at once.
pub(crate) fn load(paths: &[PathBuf]) -> Result<Vec<Document>, Vec<Problem>> {
    let (mut documents, mut problems) = (Vec::new(), Vec::new());
    for path in paths {
        match files(path) {
            Err(problem) => problems.push(problem),
            Ok(files) => {
                for file in files {
                    match one(&file) {
                        Ok(found) => documents.extend(found),
                        Err(problem) => problems.push(problem),
                    }
                }
            }
        }
    }
    if problems.is_empty() { Ok(documents) } else { Err(problems) }
}

fn problem(file: &Path, line: usize, message: String) -> Problem {
    let at = Place { file: shown(file), document: 0, line };
    Problem { at, field: String::new(), message }
}

fn shown(file: &Path) -> String {
    if file == Path::new("-") { "standard input".into() } else { file.display().to_string() }
}

fn files(path: &Path) -> Result<Vec<PathBuf>, Problem> {
    if path == Path::new("-") || !path.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let unreadable = |error: io::Error| problem(path, 0, format!("cannot read the folder: {error}"));
    let mut found = Vec::new();
    for entry in fs::read_dir(path).map_err(unreadable)? {
        let file = entry.map_err(unreadable)?.path();
        let ending = file.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        if file.is_file() && ENDINGS.contains(&ending) {
            found.push(file);
        }
    }
    found.sort();
    match found.is_empty() {
        true => Err(problem(
            path,
            0,
            format!("the folder has no manifest: files that end in {}", ENDINGS.join(", ")),
        )),
        false => Ok(found),
    }
}

fn one(file: &Path) -> Result<Vec<Document>, Problem> {
    let text = text(file).map_err(|error| problem(file, 0, format!("cannot read it: {error}")))?;
    let is_toml = file.extension().is_some_and(|ending| ending == "toml")
        || (file == Path::new("-") && looks_like_toml(&text));
    let read = if is_toml { toml::documents(&text) } else { yaml::documents(&text) };
    let read = read.map_err(|Broken { line, message }| problem(file, line, message))?;
    if read.is_empty() {
        return Err(problem(file, 0, "it says nothing: a manifest has kind, name and spec".into()));
    }
    let document = |(n, lined): (usize, super::read::Lined)| Document {
        at: Place { file: shown(file), document: n + 1, line: lined.line },
        value: lined.value,
        lines: lined.lines,
    };
    Ok(read.into_iter().enumerate().map(document).collect())
}

fn text(file: &Path) -> io::Result<String> {
    let mut text = String::new();
    let read = match file == Path::new("-") {
        true => io::stdin().lock().take(MAX_BYTES + 1).read_to_string(&mut text)?,
        false => fs::File::open(file)?.take(MAX_BYTES + 1).read_to_string(&mut text)?,
    };
    match u64::try_from(read).is_ok_and(|read| read > MAX_BYTES) {
        true => Err(io::Error::other(format!("it is larger than {MAX_BYTES} bytes"))),
        false => Ok(text),
    }
}

/// The first line that says something decides: `name = ...` or `[table]` is TOML, unless it is JSON's bracket.
fn looks_like_toml(text: &str) -> bool {
    let mut lines = text.lines().map(str::trim);
    let first = lines.find(|line| !line.is_empty() && !line.starts_with('#')).unwrap_or_default();
    let key = first.split('=').next().unwrap_or_default().trim();
    let assigns = first.contains('=') && !key.is_empty() && !key.contains([':', '{', '"']);
    assigns || (first.starts_with('[') && first.ends_with(']'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_gives_its_manifests_by_name_and_every_problem_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("b.yaml", "kind: x\n---\nkind: y\n");
        write("a.toml", "kind = \"w\"\n");
        write("notes.txt", "not: [a manifest");
        let documents = load(&[dir.path().to_path_buf()]).unwrap();
        let kinds: Vec<_> = documents.iter().map(|d| d.value["kind"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["w", "x", "y"]);
        assert_eq!((documents[2].at.document, documents[2].at.line), (2, 3));
        write("c.yaml", "a: [");
        write("d.json", "");
        let problems = load(&[dir.path().to_path_buf(), dir.path().join("none.yaml")]).unwrap_err();
        let told: Vec<String> = problems.iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), 3, "{told:?}");
        assert!(told[0].contains("c.yaml:") && told[1].contains("says nothing"), "{told:?}");
        assert!(told[2].contains("none.yaml: cannot read it"), "{told:?}");
    }

    #[test]
    fn standard_input_is_told_apart_by_its_first_line() {
        for (text, toml) in [
            ("# x\nkind = \"a\"\n", true),
            ("[[manifest]]\n", true),
            ("kind: a=b\n", false),
            ("{\"kind\": \"a=b\"}", false),
            ("---\nkind: a\n", false),
            ("", false),
        ] {
            assert_eq!(looks_like_toml(text), toml, "{text}");
        }
    }
}
