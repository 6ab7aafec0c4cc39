//! One file per engine: what the next agent needs in order to take it over, or to end it.
//!
//! Written before the spawn (without a pid) and again right after it, and removed only when no process of the engine is
//! left. An agent killed between spawn and second write leaves a process that no record names; the environment variables
//! of `command` mark it, and `adopt` finds it by them.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    assignment::Assignment,
    state::{stem, write_atomically},
    warm::Way,
};

/// What is known of an engine's process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// What it runs for.
    pub(crate) assignment: Assignment,
    /// Where it listens.
    pub(crate) port: u16,
    /// Its main process and group; 0 while it is being spawned.
    pub(crate) pid: i32,
    /// When the main process started: ticks since boot.
    pub(crate) start_ticks: u64,
    /// The boot that those ticks belong to.
    pub(crate) boot_id: String,
    /// Starts after the first, for this generation.
    pub(crate) restarts: u32,
    /// It has been ready, so proxies may be sending it requests.
    #[serde(default)]
    pub(crate) ready: bool,
    /// The folder of its cgroup; empty: it has none.
    #[serde(default)]
    pub(crate) cgroup: String,
    /// It was put to sleep and not woken since; set before it is asked to, so that an agent that ends meanwhile leaves word.
    #[serde(default)]
    pub(crate) asleep: bool,
    /// How it was started.
    #[serde(default)]
    pub(crate) way: Way,
    /// What was executed, for the operator; without secrets.
    pub(crate) command: Vec<String>,
    /// What its program is, and what is to be known of how it was started.
    #[serde(default)]
    pub(crate) origin: Origin,
}

/// What an engine was started from, for the operator.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Origin {
    /// What its program called its version; empty: not known.
    pub(crate) version: String,
    /// Such as an option that its version does not have, and that was left out.
    pub(crate) notes: Vec<String>,
    /// First of the ports on which it publishes KV events, and how many; 0: it does not.
    pub(crate) kv_events: (u16, u16),
    /// host:port of the first; empty: it does not.
    pub(crate) kv_events_address: String,
    /// Where its data-parallel ranks meet; 0: it has none.
    pub(crate) rpc_port: u16,
}

/// The folder of records.
#[derive(Debug, Clone)]
pub(crate) struct Records {
    dir: PathBuf,
}

impl Records {
    /// Records in `dir`, which exists.
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Writes the record of its replica.
    pub(crate) fn write(&self, record: &Record) -> io::Result<()> {
        write_atomically(&self.path(&record.assignment.replica_id), &serde_json::to_vec_pretty(record)?)
    }

    /// Removes the replica's record, if there is one.
    pub(crate) fn remove(&self, replica_id: &str) -> io::Result<()> {
        match fs::remove_file(self.path(replica_id)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// The replica's record. One that is damaged counts as none: the marks on its processes are still there.
    pub(crate) fn read(&self, replica_id: &str) -> Option<Record> {
        read(&self.path(replica_id))
    }

    /// Every record that can be read.
    pub(crate) fn all(&self) -> Vec<Record> {
        let Ok(entries) = fs::read_dir(&self.dir) else { return Vec::new() };
        let paths = entries.filter_map(|e| Some(e.ok()?.path()));
        paths.filter(|p| p.extension().is_some_and(|e| e == "json")).filter_map(|p| read(&p)).collect()
    }

    fn path(&self, replica_id: &str) -> PathBuf {
        self.dir.join(format!("{}.json", stem(replica_id)))
    }
}

fn read(path: &Path) -> Option<Record> {
    let bytes = fs::read(path).ok()?;
    serde_json::from_slice(&bytes)
        .inspect_err(|error| tracing::error!(path = %path.display(), %error, "an engine's record is damaged"))
        .ok()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::assignment::EngineSpec;

    pub(crate) fn record(replica_id: &str, pid: i32) -> Record {
        Record {
            assignment: Assignment {
                model: "m".into(),
                replica_id: replica_id.into(),
                generation: 1,
                spec: EngineSpec::default(),
                gpu_uuids: vec![],
                asleep: false,
            },
            port: 1,
            pid,
            start_ticks: 100,
            boot_id: "boot".into(),
            restarts: 0,
            ready: false,
            cgroup: String::new(),
            asleep: false,
            way: Way::Cold,
            command: vec![],
            origin: Origin::default(),
        }
    }

    #[test]
    fn a_record_comes_back_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().to_owned());
        let first = record("org/a:0", 12);
        records.write(&first).unwrap();
        records.write(&record("b", 13)).unwrap();
        assert_eq!(records.read("org/a:0"), Some(first));
        assert_eq!(records.all().len(), 2);
        records.remove("org/a:0").unwrap();
        records.remove("org/a:0").unwrap();
        assert_eq!(records.read("org/a:0"), None);
    }

    #[test]
    fn a_damaged_record_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().to_owned());
        fs::write(dir.path().join("b.json"), "{").unwrap();
        assert_eq!(records.read("b"), None);
        assert!(records.all().is_empty());
    }
}
