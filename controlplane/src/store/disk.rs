//! The embedded store's file: one redb database, opened by one process.
//!
//! Everything is read into memory at open and written through at each commit; nothing else is ever read from it.
//! A new file is made beside its final name and renamed, so that a crash while it is being made leaves no half file.
//! A file that is not ours, or is damaged, is refused in words and left alone: an operator decides what becomes of it.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Read,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};

use super::{Entry, LeaseId, Revision, StoreError, memory::Changes};

const KEYS: TableDefinition<&str, &[u8]> = TableDefinition::new("keys");
const LEASES: TableDefinition<u64, u64> = TableDefinition::new("leases");
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");

/// Version of this file's own layout.
const FORMAT: u64 = 1;
/// What every redb file begins with.
const MAGIC: [u8; 9] = [b'r', b'e', b'd', b'b', 0x1A, 0x0A, 0xA9, 0x0D, 0x0A];
/// create revision, modification revision, version, lease: little-endian, before the value.
const HEADER_BYTES: usize = 32;

/// The open file.
pub(super) struct Disk {
    database: Database,
}

/// What the file held.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) entries: BTreeMap<String, Entry>,
    pub(super) revision: Revision,
    pub(super) last_lease: LeaseId,
    /// Lease and TTL in milliseconds.
    pub(super) leases: Vec<(LeaseId, u64)>,
}

type AnyError = Box<dyn std::error::Error + Send + Sync>;

impl Disk {
    /// Opens or makes the file. Blocks.
    pub(super) fn open(path: &Path) -> Result<(Self, Loaded), StoreError> {
        // A damaged page can make the library panic; the operator shall read a sentence, not a backtrace.
        let opened = catch_unwind(AssertUnwindSafe(|| {
            if !path.exists() {
                create(path)?;
            }
            open_existing(path)
        }));
        let reason = match opened {
            Ok(Ok(opened)) => return Ok(opened),
            Ok(Err(reason)) => reason,
            Err(_) => "it is damaged in a way that cannot be read".into(),
        };
        Err(StoreError::Open(format!(
            "cannot open the store {} (store.path): {reason}; the file was left as it is",
            path.display()
        )))
    }

    /// Makes a group of transactions durable: when this returns Ok it survives a power cut. Blocks.
    pub(super) fn commit(&self, changes: &Changes, last_lease: LeaseId) -> Result<(), AnyError> {
        let write = self.database.begin_write()?;
        {
            let mut keys = write.open_table(KEYS)?;
            for (key, entry) in &changes.entries {
                match entry {
                    Some(entry) => keys.insert(key.as_str(), encode(entry).as_slice())?,
                    None => keys.remove(key.as_str())?,
                };
            }
            let mut leases = write.open_table(LEASES)?;
            for (lease, ttl_ms) in &changes.leases {
                match ttl_ms {
                    Some(ttl_ms) => leases.insert(lease, ttl_ms)?,
                    None => leases.remove(lease)?,
                };
            }
            let mut meta = write.open_table(META)?;
            meta.insert("revision", changes.revision)?;
            meta.insert("last_lease", last_lease)?;
        }
        write.commit()?;
        Ok(())
    }
}

fn create(path: &Path) -> Result<(), AnyError> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(parent)?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.new", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let made = fill(&temporary).and_then(|()| {
        // A link fails when the name was taken meanwhile, where a rename would replace the other process's file.
        match std::fs::hard_link(&temporary, path) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => Err(e.into()),
            _ => Ok(File::open(parent)?.sync_all()?),
        }
    });
    drop(std::fs::remove_file(&temporary));
    made
}

fn fill(path: &Path) -> Result<(), AnyError> {
    let database = Database::create(path)?;
    let write = database.begin_write()?;
    write.open_table(KEYS)?;
    write.open_table(LEASES)?;
    write.open_table(META)?.insert("format", FORMAT)?;
    write.commit()?;
    Ok(())
}

fn open_existing(path: &Path) -> Result<(Disk, Loaded), AnyError> {
    let mut magic = [0; MAGIC.len()];
    let read = File::open(path)?.read_exact(&mut magic);
    if read.is_err() || magic != MAGIC {
        return Err("it is not a store of Penstock's".into());
    }
    let database = Database::open(path).map_err(|error| -> AnyError {
        match error {
            DatabaseError::DatabaseAlreadyOpen => "another process has it open; stop that one first".into(),
            other => format!("it is damaged: {other}").into(),
        }
    })?;
    let loaded = load(&database)?;
    Ok((Disk { database }, loaded))
}

fn load(database: &Database) -> Result<Loaded, AnyError> {
    let read = database.begin_read()?;
    let meta = read.open_table(META).map_err(|_| "it is another program's redb file")?;
    let number = |name: &str| Ok::<_, AnyError>(meta.get(name)?.map(|v| v.value()));
    match number("format")? {
        Some(FORMAT) => {}
        Some(other) => return Err(format!("it has layout {other}, this build reads {FORMAT}").into()),
        None => return Err("it is another program's redb file".into()),
    }
    let mut entries = BTreeMap::new();
    for row in read.open_table(KEYS)?.iter()? {
        let (key, value) = row?;
        let entry = decode(key.value(), value.value())
            .ok_or_else(|| format!("it is damaged: key {:?} has no header", key.value()))?;
        entries.insert(entry.key.clone(), entry);
    }
    let mut leases = Vec::new();
    for row in read.open_table(LEASES)?.iter()? {
        let (lease, ttl_ms) = row?;
        leases.push((lease.value(), ttl_ms.value()));
    }
    let revision = number("revision")?.unwrap_or(0);
    if let Some(ahead) = entries.values().find(|e| e.mod_revision > revision) {
        return Err(format!("it is damaged: key {:?} is newer than the store", ahead.key).into());
    }
    Ok(Loaded { entries, revision, last_lease: number("last_lease")?.unwrap_or(0), leases })
}

fn encode(entry: &Entry) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_BYTES + entry.value.len());
    for number in [entry.create_revision, entry.mod_revision, entry.version, entry.lease] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    out.extend_from_slice(&entry.value);
    out
}

fn decode(key: &str, stored: &[u8]) -> Option<Entry> {
    let (header, value) = stored.split_at_checked(HEADER_BYTES)?;
    let mut numbers = header.chunks_exact(8).filter_map(|c| c.try_into().ok().map(u64::from_le_bytes));
    Some(Entry {
        key: key.to_owned(),
        value: Bytes::copy_from_slice(value),
        create_revision: numbers.next()?,
        mod_revision: numbers.next()?,
        version: numbers.next()?,
        lease: numbers.next()?,
    })
}
