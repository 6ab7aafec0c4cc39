//! defaults ← file ← environment, with every unknown key refused.
//!
//! The defaults, put into a tree of keys, say which keys there are. Each setting of the file and of the environment is
//! then laid over the defaults *alone* and deserialized: what fails is that setting's fault, so the error can name it,
//! which a failure of the whole could not. Whether a key is known is `serde`'s word and not the tree's, so that free-form
//! tables (labels, engines by name) need no list of exceptions; a key that a struct would swallow unread is found because
//! it does not come back when the result is written out again.

use std::{collections::BTreeMap, path::Path};

use serde::{Serialize, de::DeserializeOwned};
use toml::{
    Table, Value,
    de::{DeTable, DeValue},
};

use crate::tree::{self, KeyPath};

/// Why settings could not be used. The text names the file or variable, the key, and what would be accepted.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the settings file {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The text is not TOML, or a value is not accepted.
    #[error("{origin}: {message}")]
    Invalid {
        /// File (with the line, where known) or variable.
        origin: String,
        /// What is wrong and what is accepted.
        message: String,
    },
    /// There is no such key.
    #[error("{origin}: unknown key `{key}`{}", .nearest.as_ref().map(|n| format!("; did you mean `{n}`?")).unwrap_or_default())]
    UnknownKey {
        /// File (with the line, where known) or variable.
        origin: String,
        /// The key as it was given, from the top: `listen.pubilc`.
        key: String,
        /// The known key most like it, if one is alike.
        nearest: Option<String>,
    },
}

/// The environment of this process for [`load`], without the variables that are not Unicode (no setting is spelt so;
/// `std::env::vars` would panic on them).
pub fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

/// Settings of the process `process` ("proxy", "controlplane", "agent"): defaults, overlaid with `file` if given, then
/// with the variables `PENSTOCK_<PROCESS>__<SECTION>__<KEY>` out of `env` (in any case). A variable's text is taken as it
/// is for a string key, else read as a TOML value.
///
/// # Errors
/// See [`ConfigError`]. The first mistake found is reported, the file's before the environment's.
pub fn load<T: Serialize + DeserializeOwned + Default>(
    process: &str,
    file: Option<&Path>,
    env: impl IntoIterator<Item = (String, String)>,
) -> Result<T, ConfigError> {
    let defaults = defaults::<T>()?;
    let mut merged = defaults.clone();
    if let Some(path) = file {
        let origin = path.display().to_string();
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: origin.clone(), source })?;
        for setting in file_settings(&origin, &text, &defaults)? {
            setting.check::<T>(&defaults)?;
            tree::set(&mut merged, &setting.path, setting.value);
        }
    }
    let mut variables: Vec<_> = env.into_iter().collect();
    variables.sort(); // so that one of two spellings of a name always wins, and errors come in one order
    for (name, text) in variables {
        if let Some(setting) = env_setting::<T>(process, &name, &text, &defaults)? {
            setting.check::<T>(&defaults)?;
            tree::set(&mut merged, &setting.path, setting.value);
        }
    }
    parse(merged)
        .map_err(|message| ConfigError::Invalid { origin: format!("settings of {process}"), message })
}

/// One setting out of a file or a variable.
struct Setting {
    origin: String,
    path: KeyPath,
    value: Value,
}

impl Setting {
    /// Refuses the setting unless it alone, laid over the defaults, is accepted and comes back when written out.
    fn check<T: Serialize + DeserializeOwned>(&self, defaults: &Table) -> Result<(), ConfigError> {
        if let Some(default) = tree::get(defaults, &self.path)
            && !same_kind(default, &self.value)
        {
            return Err(self.wrong_type(default));
        }
        let mut alone = defaults.clone();
        tree::set(&mut alone, &self.path, self.value.clone());
        let accepted: T = parse(alone).map_err(|message| match unknown_field(&message) {
            Some(field) => self.unknown(defaults, field),
            None => self.invalid(message + &self.hint(defaults)),
        })?;
        let written = Table::try_from(&accepted).map_err(|e| self.invalid(e.to_string()))?;
        match self.leaves().into_iter().find(|path| tree::get(&written, path).is_none()) {
            Some(swallowed) => Err(self.unknown_path(defaults, &swallowed)),
            None => Ok(()),
        }
    }

    /// For a key that the defaults lack and a free-form table took for one of its entries.
    fn hint(&self, defaults: &Table) -> String {
        match tree::get(defaults, &self.path) {
            Some(_) => String::new(),
            None => tree::nearest(defaults, &self.path)
                .map(|nearest| format!("; did you mean `{}`?", nearest.join(".")))
                .unwrap_or_default(),
        }
    }

    fn leaves(&self) -> Vec<KeyPath> {
        match &self.value {
            Value::Table(table) if !table.is_empty() => {
                tree::leaves(table).into_iter().map(|below| [self.path.clone(), below].concat()).collect()
            }
            _ => vec![self.path.clone()],
        }
    }

    fn wrong_type(&self, default: &Value) -> ConfigError {
        self.invalid(format!("found {}, accepted: {}", described(&self.value), accepted(default)))
    }

    fn invalid(&self, message: String) -> ConfigError {
        let origin = self.origin.clone();
        ConfigError::Invalid { origin, message: format!("key `{}`: {message}", self.path.join(".")) }
    }

    /// `field` is the last word of an unknown key at or below this setting's path.
    fn unknown(&self, defaults: &Table, field: &str) -> ConfigError {
        let path = self.leaves().into_iter().find_map(|path| {
            path.iter().position(|word| word == field).and_then(|at| path.get(..=at)).map(<[String]>::to_vec)
        });
        self.unknown_path(defaults, &path.unwrap_or_else(|| self.path.clone()))
    }

    fn unknown_path(&self, defaults: &Table, path: &[String]) -> ConfigError {
        ConfigError::UnknownKey {
            origin: self.origin.clone(),
            key: path.join("."),
            nearest: tree::nearest(defaults, path).map(|p| p.join(".")),
        }
    }
}

/// The settings that the file's text makes, each with its line.
fn file_settings(origin: &str, text: &str, defaults: &Table) -> Result<Vec<Setting>, ConfigError> {
    let not_toml = |e: toml::de::Error| ConfigError::Invalid {
        origin: origin.into(),
        message: format!("not TOML: {}", e.to_string().trim_end()),
    };
    let table: Table = toml::from_str(text).map_err(not_toml)?;
    let mut lines = BTreeMap::new();
    note_lines(text, DeTable::parse(text).map_err(not_toml)?.get_ref(), &[], &mut lines);
    let settings = tree::settings(&table, defaults).into_iter().map(|(path, value)| {
        let line = lines.get(&path).map(|line| format!(":{line}")).unwrap_or_default();
        Setting { origin: format!("{origin}{line}"), path, value }
    });
    Ok(settings.collect())
}

/// Notes the line (from 1) on which each key of `table` is written.
fn note_lines(text: &str, table: &DeTable<'_>, above: &[String], lines: &mut BTreeMap<KeyPath, usize>) {
    for (key, value) in table {
        let path = [above, &[key.get_ref().to_string()]].concat();
        let before = text.get(..key.span().start).unwrap_or_default();
        if let DeValue::Table(inner) = value.get_ref() {
            note_lines(text, inner, &path, lines);
        }
        lines.insert(path, before.matches('\n').count() + 1);
    }
}

/// The setting that a variable makes, or `None` when it is no setting of this process.
fn env_setting<T: DeserializeOwned>(
    process: &str,
    name: &str,
    text: &str,
    defaults: &Table,
) -> Result<Option<Setting>, ConfigError> {
    let lower = name.to_lowercase();
    let Some(words) = lower.strip_prefix(&format!("penstock_{}__", process.to_lowercase())) else {
        return Ok(None);
    };
    let path: KeyPath = words.split("__").map(String::from).collect();
    let origin = format!("environment variable {name}");
    let setting = |value: Value| Setting { origin: origin.clone(), path: path.clone(), value };
    let plain = || Value::String(text.into());
    Ok(Some(match (tree::get(defaults, &path), toml_value(text)) {
        (Some(Value::String(_)), _) | (None, None) => setting(plain()),
        (Some(_), Some(value)) => setting(value),
        (Some(default), None) => return Err(setting(plain()).wrong_type(default)),
        // An entry of a free-form table: 1 may be meant as a number or as text; what the struct takes decides.
        (None, Some(value)) => {
            let mut alone = defaults.clone();
            tree::set(&mut alone, &path, value.clone());
            setting(if parse::<T>(alone).is_ok() { value } else { plain() })
        }
    }))
}

fn toml_value(text: &str) -> Option<Value> {
    let mut table: Table = toml::from_str(&format!("value = {text}")).ok()?;
    table.remove("value").filter(|_| table.is_empty())
}

fn defaults<T: Serialize + Default>() -> Result<Table, ConfigError> {
    Table::try_from(T::default())
        .map_err(|e| ConfigError::Invalid { origin: "built-in defaults".into(), message: e.to_string() })
}

fn parse<T: DeserializeOwned>(table: Table) -> Result<T, String> {
    table.try_into().map_err(|e: toml::de::Error| in_plain_words(e.message()))
}

/// The field that a `deny_unknown_fields` struct did not know, out of `serde`'s sentence about it.
fn unknown_field(message: &str) -> Option<&str> {
    message.split_once("unknown field `")?.1.split_once('`').map(|(field, _)| field)
}

/// Puts the names of Rust's integer types in `serde`'s sentences into ranges.
fn in_plain_words(message: &str) -> String {
    let ranges = [
        ("expected u8", "accepted: a whole number from 0 to 255"),
        ("expected u16", "accepted: a whole number from 0 to 65535"),
        ("expected u32", "accepted: a whole number from 0 to 4294967295"),
        ("expected u64", "accepted: a whole number from 0 up"),
        ("expected usize", "accepted: a whole number from 0 up"),
    ];
    let found = ranges.iter().find(|(rust, _)| message.ends_with(rust));
    found.map_or_else(|| message.to_string(), |(rust, plain)| message.replace(rust, plain))
}

/// Whether a value of the default's key may look like `given`. A whole number does for a fraction.
fn same_kind(default: &Value, given: &Value) -> bool {
    default.same_type(given) || matches!((default, given), (Value::Float(_), Value::Integer(_)))
}

fn described(value: &Value) -> String {
    match value {
        Value::Table(_) => "a table".into(),
        Value::Array(_) => "an array".into(),
        other => format!("{} {other}", other.type_str()),
    }
}

fn accepted(default: &Value) -> String {
    match default {
        Value::String(text) => format!("a string in quotes (default \"{text}\")"),
        Value::Integer(number) => format!("a whole number (default {number})"),
        Value::Float(number) => format!("a number (default {number})"),
        Value::Boolean(value) => format!("true or false (default {value})"),
        Value::Array(_) => format!("an array, as [\"a\", \"b\"] (default {default})"),
        Value::Table(_) => "a table of keys".into(),
        Value::Datetime(_) => "a date and time".into(),
    }
}

#[cfg(test)]
mod tests;
