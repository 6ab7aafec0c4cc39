//! `[engines.NAME]`: the programs that engines are.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::warm::{PrefetchProgram, RestoreProgram};

/// `[engines.NAME]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineProgram {
    /// "vllm": the program takes `serve MODEL ...` and vLLM's options. "exec": `command` is a template.
    pub kind: String,
    /// Program and its leading arguments. Of kind "exec" all of its arguments, with placeholders.
    pub command: Vec<String>,
    /// Arguments of every engine of this name, put before the deployment's own.
    pub args: Vec<String>,
    /// Environment of every engine of this name; the deployment's own wins.
    pub env: BTreeMap<String, String>,
    /// Arguments that make the program print its version and end; empty: it is not asked.
    pub version_args: Vec<String>,
    /// Seconds that running requests get after SIGTERM where a deployment does not say; 0: as the program does by itself.
    pub shutdown_timeout_s: u32,
    /// Path that is 200 while an engine lives.
    pub health_path: String,
    /// Path that must be 200 before a first completion is tried; empty: none.
    pub ready_path: String,
    /// What `/metrics` is: "vllm", or "none": its load is not read.
    pub metrics: String,
    /// Of kind "exec": the arguments for a typed field of a deployment, by the field's name, with {value} in them.
    pub options: BTreeMap<String, Vec<String>>,
    /// Starts an engine of this name from a checkpoint.
    pub restore: RestoreProgram,
    /// Fetches a model before an engine of this name is started.
    pub prefetch: PrefetchProgram,
}

impl Default for EngineProgram {
    fn default() -> Self {
        Self {
            kind: "vllm".into(),
            command: Vec::new(),
            args: Vec::new(),
            env: BTreeMap::new(),
            version_args: vec!["--version".into()],
            shutdown_timeout_s: 0,
            health_path: "/health".into(),
            ready_path: String::new(),
            metrics: "vllm".into(),
            options: BTreeMap::new(),
            restore: RestoreProgram::default(),
            prefetch: PrefetchProgram::default(),
        }
    }
}

impl EngineProgram {
    /// Whether `command` is a template.
    pub fn is_exec(&self) -> bool {
        self.kind == "exec"
    }

    /// Whether its `/metrics` say what vLLM's say.
    pub fn says_load(&self) -> bool {
        self.metrics == "vllm"
    }

    pub(crate) fn validate(&self, name: &str) -> Result<(), String> {
        let key = |field: &str| format!("engines.{name}.{field}");
        self.restore.validate(name)?;
        self.prefetch.validate(name)?;
        crate::agent::one_of(&key("kind"), &self.kind, &["vllm", "exec"])?;
        crate::agent::one_of(&key("metrics"), &self.metrics, &["vllm", "none"])?;
        if self.command.first().is_none_or(String::is_empty) {
            return Err(format!("engines.{name}.command is empty; name the program, as [\"vllm\"]"));
        }
        if let Some(variable) = self.env.keys().find(|key| key.is_empty() || key.contains(['=', '\0'])) {
            let wrong = format!("has the name {variable:?}; it must not be empty or contain '='");
            return Err(format!("engines.{name}.env {wrong}"));
        }
        let paths = [("health_path", &self.health_path, false), ("ready_path", &self.ready_path, true)];
        for (field, path, may_be_empty) in paths {
            let plain = path.starts_with('/') && !path.contains(|c: char| c.is_control() || c == ' ');
            let off = may_be_empty && path.is_empty();
            if !plain && !off {
                let or = if may_be_empty { ", or be empty" } else { "" };
                return Err(format!("{} is {path:?}; it must begin with '/'{or}", key(field)));
            }
        }
        if !self.is_exec() && !self.options.is_empty() {
            return Err(format!("{} is for kind \"exec\": vLLM's options are known", key("options")));
        }
        if self.is_exec() && self.shutdown_timeout_s != 0 {
            let how = "say options.shutdown_timeout_s, or put the time into command";
            return Err(format!("{} is for kind \"vllm\": {how}", key("shutdown_timeout_s")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_programs_name_their_key_and_what_is_accepted() {
        let refused = |change: fn(&mut EngineProgram)| {
            let mut program = EngineProgram { command: vec!["serve-it".into()], ..EngineProgram::default() };
            program.validate("mine").expect("valid before");
            change(&mut program);
            program.validate("mine").expect_err("must be refused")
        };
        for (told, part) in [
            (refused(|p| p.kind = "tgi".into()), "engines.mine.kind is \"tgi\"; accepted: vllm, exec"),
            (refused(|p| p.metrics = "some".into()), "engines.mine.metrics"),
            (refused(|p| p.command.clear()), "engines.mine.command is empty"),
            (refused(|p| drop(p.env.insert("A=B".into(), String::new()))), "engines.mine.env has the name"),
            (refused(|p| p.health_path.clear()), "engines.mine.health_path is \"\"; it must begin with '/'"),
            (refused(|p| p.ready_path = "ready".into()), "or be empty"),
            (refused(|p| drop(p.options.insert("dtype".into(), vec![]))), "engines.mine.options is for kind"),
            (
                refused(|p| (p.kind, p.shutdown_timeout_s) = ("exec".into(), 5)),
                "engines.mine.shutdown_timeout_s is for kind \"vllm\"",
            ),
        ] {
            assert!(told.contains(part), "{told}");
        }
    }
}
