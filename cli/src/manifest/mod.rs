//! Manifests: files that say what is wanted of a site, for `penstock apply` and `penstock diff -f`.
//!
//! A document names its `kind`, a `name`, and a `spec` that is what the REST API takes for that kind. It is checked by the
//! control plane's own code before anything is sent, so that a refusal names file, document, line and field, and no half of
//! a file is applied because the other half has a typing error.
//!
//! YAML (several documents in a file) and TOML (one document, or several as `[[manifest]]`); JSON is YAML. YAML is read
//! strictly: duplicate keys, aliases and tags are refused, and `yes` is a string.

pub(crate) mod check;
pub(crate) mod emit;
mod read;
mod source;
mod toml;
mod yaml;

use std::{collections::BTreeMap, fmt};

use serde_json::Value;

pub(crate) use check::{Wanted, check};
pub(crate) use source::load;

/// The JSON schema of a document.
pub(crate) const SCHEMA: &str = include_str!("../../../docs/manifest.schema.json");

/// What a document can be about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    NodePolicy,
    Deployment,
    Route,
}

impl Kind {
    /// In the order in which they are applied: nodes first, then what runs on them, then what leads there.
    pub(crate) const ALL: [Self; 3] = [Self::NodePolicy, Self::Deployment, Self::Route];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::NodePolicy => "NodePolicy",
            Self::Deployment => "Deployment",
            Self::Route => "Route",
        }
    }

    /// Where the API has it.
    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::NodePolicy => "nodes",
            Self::Deployment => "deployments",
            Self::Route => "routes",
        }
    }

    /// From its name, in any case, also in the plural.
    pub(crate) fn named(name: &str) -> Option<Self> {
        let name = name.to_lowercase().replace(['-', '_'], "");
        let singular = match name.strip_suffix("ies") {
            Some(stem) => format!("{stem}y"),
            None => name.strip_suffix('s').unwrap_or(&name).to_owned(),
        };
        Self::ALL.into_iter().find(|kind| kind.as_str().to_lowercase() == singular)
    }
}

/// One document as it was written.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Document {
    pub(crate) at: Place,
    pub(crate) value: Value,
    /// Line of each field, by its path: `spec.rollout.max_surge`, `spec.targets[0].model`.
    pub(crate) lines: BTreeMap<String, usize>,
}

/// Where a document begins.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Place {
    pub(crate) file: String,
    /// From 1.
    pub(crate) document: usize,
    /// From 1; 0: not known.
    pub(crate) line: usize,
}

/// A document that can be applied.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Manifest {
    pub(crate) at: Place,
    pub(crate) kind: Kind,
    pub(crate) name: String,
    pub(crate) spec: Value,
}

/// Why a document is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) at: Place,
    /// Path of the field; empty: the document as a whole.
    pub(crate) field: String,
    /// What is wrong and what is accepted.
    pub(crate) message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { file, document, line } = &self.at;
        write!(f, "{file}")?;
        if *line > 0 {
            write!(f, ":{line}")?;
        }
        if *document > 0 {
            write!(f, " (document {document})")?;
        }
        match self.field.is_empty() {
            true => write!(f, ": {}", self.message),
            false => write!(f, ": {}: {}", self.field, self.message),
        }
    }
}

impl Document {
    /// The place of a field: its own line, else that of what it is in.
    pub(crate) fn place(&self, field: &str) -> Place {
        let mut path = field;
        loop {
            if let Some(line) = self.lines.get(path) {
                return Place { line: *line, ..self.at.clone() };
            }
            match path.rfind(['.', '[']) {
                Some(at) => path = path.get(..at).unwrap_or_default(),
                None => return self.at.clone(),
            }
        }
    }

    pub(crate) fn problem(&self, field: &str, message: impl Into<String>) -> Problem {
        Problem { at: self.place(field), field: field.to_owned(), message: message.into() }
    }
}
