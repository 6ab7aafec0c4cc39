//! What a person who misspelt a setting gets to read.

use std::io::Write;

use serde::Deserialize;

use super::*;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Example {
    listen: Listen,
    timeouts: Timeouts,
    labels: BTreeMap<String, String>,
    engines: BTreeMap<String, Engine>,
    swallower: Swallower,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Listen {
    public: String,
    port: u16,
    tls: bool,
    names: Vec<String>,
}

impl Default for Listen {
    fn default() -> Self {
        Self { public: "0.0.0.0:8081".into(), port: 7, tls: false, names: vec![] }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Timeouts {
    connect_ms: u64,
    ratio: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Engine {
    command: Vec<String>,
}

/// A struct whose author forgot `deny_unknown_fields`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default)]
struct Swallower {
    known: u32,
}

fn from_file(text: &str) -> Result<Example, ConfigError> {
    let mut file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    load("proxy", Some(file.path()), [])
}

fn from_env(name: &str, value: &str) -> Result<Example, ConfigError> {
    load("proxy", None, [(name.to_string(), value.to_string())])
}

#[test]
fn the_environment_wins_over_the_file_and_the_file_over_the_defaults() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "[listen]\npublic = 'a:1'\nport = 9\n").unwrap();
    let env = [
        ("PENSTOCK_PROXY__LISTEN__PUBLIC".to_string(), "b:2".to_string()),
        ("PENSTOCK_AGENT__LISTEN__PORT".to_string(), "nonsense of another process".to_string()),
        ("PENSTOCK_CONTROLPLANE".to_string(), "http://not-a-setting".to_string()),
    ];
    let config: Example = load("proxy", Some(file.path()), env).unwrap();
    assert_eq!(config.listen, Listen { public: "b:2".into(), port: 9, ..Listen::default() });
    assert_eq!(config.timeouts, Timeouts::default());
}

#[test]
fn variables_are_read_against_the_type_of_the_default() {
    assert_eq!(from_env("penstock_proxy__listen__PORT", "80").unwrap().listen.port, 80);
    assert_eq!(from_env("PENSTOCK_PROXY__LISTEN__PUBLIC", "8081").unwrap().listen.public, "8081");
    assert!(from_env("PENSTOCK_PROXY__LISTEN__TLS", "true").unwrap().listen.tls);
    assert_eq!(from_env("PENSTOCK_PROXY__LISTEN__NAMES", "['a', 'b']").unwrap().listen.names, ["a", "b"]);
    assert_eq!(from_env("PENSTOCK_PROXY__TIMEOUTS__RATIO", "2").unwrap().timeouts.ratio, 2.0);
    assert_eq!(from_env("PENSTOCK_PROXY__LABELS__RACK", "1").unwrap().labels["rack"], "1");
    assert_eq!(
        from_env("PENSTOCK_PROXY__ENGINES__SIM__COMMAND", "['x']").unwrap().engines["sim"].command,
        ["x"]
    );
}

#[test]
fn a_free_form_table_takes_any_name_but_its_entries_are_checked() {
    let config = from_file("[labels]\nzone = 'a'\n[engines.mine]\ncommand = ['x']\n").unwrap();
    assert_eq!(config.labels["zone"], "a");
    assert_eq!(config.engines["mine"].command, ["x"]);
    let error = from_file("[engines.mine]\ncomand = ['x']\n").unwrap_err().to_string();
    assert!(error.contains("unknown key `engines.mine.comand`"), "{error}");
    assert!(from_file("[labels]\nzone = 4\n").unwrap_err().to_string().contains("key `labels.zone`"));
}

#[test]
fn an_unknown_key_in_a_file_names_file_line_key_and_the_nearest_key() {
    let error = from_file("# a comment\n[listen]\npubilc = 'x'\n").unwrap_err().to_string();
    assert!(error.contains(".toml:3: unknown key `listen.pubilc`; did you mean `listen.public`?"), "{error}");
    let error = from_file("[lissten]\npublic = 'x'\n").unwrap_err().to_string();
    assert!(error.contains(".toml:1: unknown key `lissten`; did you mean `listen`?"), "{error}");
    let error = from_file("connect_ms = 3\n").unwrap_err().to_string();
    assert!(error.contains("did you mean `timeouts.connect_ms`?"), "{error}");
    let error = from_file("qqqq = 3\n").unwrap_err().to_string();
    assert!(error.ends_with("unknown key `qqqq`"), "{error}");
}

#[test]
fn an_unknown_key_in_the_environment_names_the_variable() {
    let error = from_env("PENSTOCK_PROXY__LISTEN__PROT", "80").unwrap_err().to_string();
    assert_eq!(
        error,
        "environment variable PENSTOCK_PROXY__LISTEN__PROT: unknown key `listen.prot`; did you mean `listen.port`?"
    );
    assert!(matches!(from_env("PENSTOCK_PROXY__", "x"), Err(ConfigError::UnknownKey { .. })));
    assert!(matches!(from_env("PENSTOCK_PROXY__LISTEN____X", "x"), Err(ConfigError::UnknownKey { .. })));
}

#[test]
fn a_key_that_a_struct_would_swallow_is_unknown_too() {
    let error = from_file("[swallower]\nknwon = 1\n").unwrap_err().to_string();
    assert!(error.contains("unknown key `swallower.knwon`; did you mean `swallower.known`?"), "{error}");
}

#[test]
fn a_wrong_type_names_the_key_what_was_found_and_what_is_accepted() {
    let error = from_file("[listen]\n\nport = 'eighty'\n").unwrap_err().to_string();
    assert!(
        error.ends_with(
            ":3: key `listen.port`: found string \"eighty\", accepted: a whole number (default 7)"
        ),
        "{error}"
    );
    let error = from_file("listen = 3\n").unwrap_err().to_string();
    assert!(error.contains("key `listen`: found integer 3, accepted: a table of keys"), "{error}");
    let error = from_env("PENSTOCK_PROXY__LISTEN__TLS", "yes").unwrap_err().to_string();
    assert!(error.contains("found string \"yes\", accepted: true or false"), "{error}");
    let error = from_file("[listen]\nnames = [1]\n").unwrap_err().to_string();
    assert!(error.contains("key `listen.names`"), "{error}");
}

#[test]
fn a_number_out_of_range_names_the_range() {
    for (value, expected) in [("70000", "0 to 65535"), ("-1", "0 to 65535")] {
        let error = from_env("PENSTOCK_PROXY__LISTEN__PORT", value).unwrap_err().to_string();
        assert!(error.contains("key `listen.port`") && error.contains(expected), "{error}");
    }
}

#[test]
fn text_that_is_not_toml_and_a_file_that_is_not_there_are_named() {
    let error = from_file("[listen\n").unwrap_err().to_string();
    assert!(error.contains("not TOML") && error.contains("line 1"), "{error}");
    let error = load::<Example>("proxy", Some(Path::new("/nonexistent.toml")), []).unwrap_err().to_string();
    assert!(error.starts_with("cannot read the settings file /nonexistent.toml"), "{error}");
}

#[test]
fn nothing_given_is_the_defaults() {
    assert_eq!(load::<Example>("proxy", None, []).unwrap(), Example::default());
    assert_eq!(from_file("").unwrap(), Example::default());
}
