//! The commented settings files are the reference that operators read: each must say exactly what the built-in defaults
//! are, miss no key, and explain every one.

#![allow(clippy::unwrap_used)]

use std::{collections::BTreeSet, fmt::Debug, path::PathBuf};

use penstock_config::{agent::AgentConfig, controlplane::ControlPlaneConfig, load, proxy::ProxyConfig};
use serde::{Serialize, de::DeserializeOwned};
use toml::{Table, Value};

#[test]
fn proxy_toml_is_the_defaults_explained() {
    assert_file_equals_defaults::<ProxyConfig>("proxy");
}

#[test]
fn controlplane_toml_is_the_defaults_explained() {
    assert_file_equals_defaults::<ControlPlaneConfig>("controlplane");
}

#[test]
fn agent_toml_is_the_defaults_explained() {
    assert_file_equals_defaults::<AgentConfig>("agent");
}

fn assert_file_equals_defaults<T: Serialize + DeserializeOwned + Default + PartialEq + Debug>(process: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("{process}.toml"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));

    let loaded: T = load(process, Some(&path), []).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(loaded, T::default(), "{} differs from the defaults", path.display());

    let file: Table = toml::from_str(&text).unwrap();
    let missing: Vec<String> =
        keys(&Table::try_from(T::default()).unwrap()).difference(&keys(&file)).cloned().collect();
    assert_eq!(missing, Vec::<String>::new(), "keys missing in {}", path.display());

    let unexplained = unexplained(&text);
    assert_eq!(unexplained, Vec::<String>::new(), "no comment above or beside, in {}", path.display());
}

#[test]
fn a_misspelt_key_beside_free_form_entries_gets_a_hint() {
    let env = [("PENSTOCK_AGENT__ENGINES__PORT_BAS".to_string(), "0".to_string())];
    let error = load::<AgentConfig>("agent", None, env).unwrap_err().to_string();
    assert!(error.contains("did you mean `engines.port_base`?"), "{error}");
}

/// Every key as a dotted path; a table without keys counts as one.
fn keys(tree: &Table) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (key, value) in tree {
        match value {
            Value::Table(inner) if !inner.is_empty() => {
                found.extend(keys(inner).into_iter().map(|below| format!("{key}.{below}")));
            }
            _ => drop(found.insert(key.clone())),
        }
    }
    found
}

/// The lines that set a key with no comment on them or right above them.
fn unexplained(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut above = "";
    let mut depth = 0_i32; // of brackets: the inner lines of an array set no key
    for line in text.lines().map(str::trim) {
        let (code, comment) = line.split_once('#').map_or((line, ""), |(code, comment)| (code, comment));
        let sets_a_key = depth == 0 && !code.starts_with('[') && code.contains('=');
        if sets_a_key && comment.trim().is_empty() && !above.starts_with('#') {
            found.push(line.to_string());
        }
        if sets_a_key || depth > 0 {
            let count = |c: char| i32::try_from(code.matches(c).count()).unwrap_or(i32::MAX);
            depth += count('[') - count(']');
        }
        above = line;
    }
    found
}

#[test]
fn a_key_without_a_comment_is_found() {
    let text = "# why\na = 1\nb = 2\nc = 3 # beside\n\n[s]\n# list\nd = [\n  'x=y',\n]\ne = 1\n";
    assert_eq!(unexplained(text), ["b = 2", "e = 1"]);
}
