//! `[warm]`, `[engines.NAME.restore]` and `[engines.NAME.prefetch]`: how an agent starts engines without starting from
//! nothing. `docs/warm-starts.md` tells the whole of it.

use serde::{Deserialize, Serialize};

use crate::storage::{SecretRef, Storage};

/// What the commands' arguments may name.
pub const RESTORE_PLACEHOLDERS: [&str; 8] =
    ["model", "model_path", "storage", "path", "host", "port", "gpus", "replica"];
/// What a prefetch command's arguments may name.
pub const PREFETCH_PLACEHOLDERS: [&str; 3] = ["model", "model_path", "folder"];

/// `[warm]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WarmConfig {
    /// Longest time that an engine may take to fall asleep; longer: it is ended instead.
    pub sleep_ms: u64,
    /// Longest time from the order to wake to a completion; longer: it is started anew.
    pub wake_ms: u64,
    /// Where the files of `secret_ref = "file:NAME"` are; empty: there are none.
    pub secrets_dir: String,
    /// Where models are kept; its free space is looked at before fetching and starting. Empty: it is not looked at.
    pub models_dir: String,
    /// What must stay free there, in GiB.
    pub spare_gib: u64,
    /// Models fetched at the same time.
    pub prefetch_parallel: u32,
    /// Tries of one prefetch before an engine's start fails, and rests as failed starts do.
    pub prefetch_tries: u32,
}

impl Default for WarmConfig {
    fn default() -> Self {
        Self {
            sleep_ms: 60_000,
            wake_ms: 120_000,
            secrets_dir: String::new(),
            models_dir: String::new(),
            spare_gib: 1,
            prefetch_parallel: 1,
            prefetch_tries: 3,
        }
    }
}

/// `[engines.NAME.restore]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RestoreProgram {
    /// The hook: program and arguments. Empty: engines of this name are never restored.
    pub command: Vec<String>,
    /// From where, unless a deployment says another.
    pub storage: String,
    /// `file:NAME` or `env:NAME`, unless a deployment says another; empty: none.
    pub secret_ref: String,
    /// The base path of the storage on this node.
    pub path: String,
    /// Longest time from the hook's start to a completion; then it is ended, and the engine is started cold.
    pub timeout_s: u64,
}

impl Default for RestoreProgram {
    fn default() -> Self {
        Self {
            command: Vec::new(),
            storage: String::new(),
            secret_ref: String::new(),
            path: String::new(),
            timeout_s: 300,
        }
    }
}

/// `[engines.NAME.prefetch]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PrefetchProgram {
    /// Program and arguments. Empty: nothing is fetched, engines fetch for themselves.
    pub command: Vec<String>,
    /// Longest time of one try.
    pub timeout_s: u64,
}

impl Default for PrefetchProgram {
    fn default() -> Self {
        Self { command: Vec::new(), timeout_s: 3_600 }
    }
}

impl WarmConfig {
    /// Rules that types cannot say.
    ///
    /// # Errors
    /// A sentence that names the key and what is accepted.
    pub fn validate(&self) -> Result<(), String> {
        let positive = [
            ("warm.sleep_ms", self.sleep_ms),
            ("warm.wake_ms", self.wake_ms),
            ("warm.prefetch_parallel", self.prefetch_parallel.into()),
            ("warm.prefetch_tries", self.prefetch_tries.into()),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(format!("{key} is 0; it must be at least 1"));
        }
        for (key, folder) in [("warm.secrets_dir", &self.secrets_dir), ("warm.models_dir", &self.models_dir)]
        {
            if !folder.is_empty() && !folder.starts_with('/') {
                return Err(format!("{key} is {folder:?}; it must be a path from the root, or empty"));
            }
        }
        Ok(())
    }
}

impl RestoreProgram {
    /// Rules that types cannot say, for `[engines.NAME.restore]`.
    ///
    /// # Errors
    /// A sentence that names the key and what is accepted.
    pub fn validate(&self, name: &str) -> Result<(), String> {
        let key = |field: &str| format!("engines.{name}.restore.{field}");
        check_command(&key("command"), &self.command, &RESTORE_PLACEHOLDERS)?;
        if self.timeout_s == 0 {
            return Err(format!("{} is 0; it must be at least 1", key("timeout_s")));
        }
        if !self.path.is_empty() && (!self.path.starts_with('/') || self.path.contains("/..")) {
            return Err(format!("{} is {:?}; it must be a path from the root", key("path"), self.path));
        }
        if !self.storage.is_empty() {
            self.storage.parse::<Storage>().map_err(|e| format!("{}: {e}", key("storage")))?;
        }
        if !self.secret_ref.is_empty() {
            self.secret_ref.parse::<SecretRef>().map_err(|e| format!("{}: {e}", key("secret_ref")))?;
        }
        Ok(())
    }
}

impl PrefetchProgram {
    /// Rules that types cannot say, for `[engines.NAME.prefetch]`.
    ///
    /// # Errors
    /// A sentence that names the key and what is accepted.
    pub fn validate(&self, name: &str) -> Result<(), String> {
        check_command(&format!("engines.{name}.prefetch.command"), &self.command, &PREFETCH_PLACEHOLDERS)?;
        match self.timeout_s {
            0 => Err(format!("engines.{name}.prefetch.timeout_s is 0; it must be at least 1")),
            _ => Ok(()),
        }
    }
}

fn check_command(key: &str, command: &[String], known: &[&str]) -> Result<(), String> {
    if command.first().is_some_and(String::is_empty) {
        return Err(format!("{key} begins with an empty string; name the program first, or leave all empty"));
    }
    for arg in command {
        filled(arg, |name| known.contains(&name).then(String::new))
            .map_err(|unknown| format!("{key} has {{{unknown}}}; known are {{{}}}", known.join("}, {")))?;
    }
    Ok(())
}

/// `template` with each `{name}` replaced by `value(name)`. Braces around anything but a plain word stay as they are.
///
/// # Errors
/// The first name that has no value.
pub fn filled(template: &str, value: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some((before, after)) = rest.split_once('{') {
        out.push_str(before);
        let named = after
            .split_once('}')
            .filter(|(name, _)| !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c == '_'));
        match named {
            Some((name, behind)) => {
                out.push_str(&value(name).ok_or_else(|| name.to_owned())?);
                rest = behind;
            }
            None => {
                out.push('{');
                rest = after;
            }
        }
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_filled_and_other_braces_stay() {
        let value = |name: &str| (name == "port").then(|| "80".to_owned());
        assert_eq!(filled("--port={port}, {port}", value), Ok("--port=80, 80".into()));
        assert_eq!(filled("{\"a\": {}} {", value), Ok("{\"a\": {}} {".into()));
        assert_eq!(filled("{prot}", value), Err("prot".into()));
    }

    #[test]
    fn what_cannot_be_is_named_with_its_key() {
        let restore = |change: fn(&mut RestoreProgram)| {
            let mut program = RestoreProgram::default();
            change(&mut program);
            program.validate("vllm").expect_err("refused")
        };
        for (change, part) in [
            (
                (|r| r.command = vec!["x".into(), "{prot}".into()]) as fn(&mut RestoreProgram),
                "{prot}; known are {model}",
            ),
            (|r| r.command = vec![String::new()], "restore.command begins"),
            (|r| r.storage = "ckpt".into(), "restore.storage: \"ckpt\" is no storage"),
            (|r| r.secret_ref = "sesame".into(), "restore.secret_ref: it is neither"),
            (|r| r.path = "ckpt".into(), "restore.path is \"ckpt\""),
            (|r| r.timeout_s = 0, "restore.timeout_s is 0"),
        ] {
            let error = restore(change);
            assert!(error.contains(part) && error.contains("engines.vllm.restore"), "{error}");
        }
        let prefetch = PrefetchProgram { command: vec!["hf".into(), "{port}".into()], timeout_s: 1 };
        assert!(prefetch.validate("vllm").expect_err("refused").contains("{model_path}"));
        let warm = WarmConfig { models_dir: "models".into(), ..WarmConfig::default() };
        assert!(warm.validate().expect_err("refused").contains("warm.models_dir"));
        let warm = WarmConfig { wake_ms: 0, ..WarmConfig::default() };
        assert!(warm.validate().expect_err("refused").contains("warm.wake_ms is 0"));
    }
}
