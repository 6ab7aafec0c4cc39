//! What the engine remembers of its requests, so that tests can prove what arrived and when a client was gone.
//!
//! A bounded ring; the oldest is forgotten. The head is kept as it came and parsed only when somebody asks, so that
//! remembering costs little. A record whose request was dropped without a word settles as "dropped".

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use bytes::Bytes;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::http::Head;

/// The ring.
#[derive(Debug)]
pub(super) struct Records {
    ring: Mutex<VecDeque<Arc<Mutex<Record>>>>,
    capacity: usize,
    sha256: bool,
}

#[derive(Debug)]
struct Record {
    number: u64,
    head: Head,
    body_bytes: Option<u64>,
    xxh3: Option<u64>,
    sha256: Option<String>,
    arrived_unix_us: u64,
    engine_id: String,
    tokens: u64,
    status: u16,
    outcome: String,
    ended_unix_us: u64,
}

/// One request being written down; settles when dropped.
#[derive(Debug)]
pub(super) struct Recorder {
    record: Arc<Mutex<Record>>,
    sha256: bool,
}

/// Wall-clock time, µs since 1970.
pub(super) fn unix_us() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

impl Records {
    /// A ring of `capacity` records.
    pub(super) const fn new(capacity: usize, sha256: bool) -> Self {
        Self { ring: Mutex::new(VecDeque::new()), capacity, sha256 }
    }

    /// Begins the record of a request.
    pub(super) fn begin(&self, number: u64, head: Head) -> Recorder {
        let record = Arc::new(Mutex::new(Record {
            number,
            head,
            body_bytes: None,
            xxh3: None,
            sha256: None,
            arrived_unix_us: unix_us(),
            engine_id: String::new(),
            tokens: 0,
            status: 0,
            outcome: String::new(),
            ended_unix_us: 0,
        }));
        if self.capacity > 0 {
            let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
            if ring.len() >= self.capacity {
                ring.pop_front();
            }
            ring.push_back(record.clone());
        }
        Recorder { record, sha256: self.sha256 }
    }

    /// The newest `limit` records, oldest first; with `id` only those of that X-Request-Id.
    pub(super) fn list(&self, limit: usize, id: Option<&str>) -> Value {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = |r: &Arc<Mutex<Record>>| {
            let record = r.lock().unwrap_or_else(PoisonError::into_inner);
            let matches = id.is_none_or(|id| record.head.header("x-request-id") == Some(id));
            matches.then(|| record.json())
        };
        let mut newest: Vec<Value> = ring.iter().rev().filter_map(wanted).take(limit).collect();
        newest.reverse();
        newest.into()
    }

    /// Forgets all.
    pub(super) fn clear(&self) {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Record {
    fn json(&self) -> Value {
        let headers: Vec<Value> = self.head.headers().map(|(name, value)| json!([name, value])).collect();
        let ended = |us| if us == 0 { Value::Null } else { Value::from(us) };
        let outcome = if self.ended_unix_us == 0 { "running" } else { self.outcome.as_str() };
        json!({
            "number": self.number,
            "request_id": self.head.header("x-request-id"),
            "engine_id": self.engine_id,
            "method": self.head.method(),
            "path": self.head.path(),
            "headers": headers,
            "body_bytes": self.body_bytes,
            "body_xxh3": self.xxh3.map(|hash| format!("{hash:016x}")),
            "body_sha256": self.sha256,
            "tokens": self.tokens,
            "status": self.status,
            "outcome": outcome,
            "arrived_unix_us": self.arrived_unix_us,
            "ended_unix_us": ended(self.ended_unix_us),
            "disconnect_seen_unix_us": ended(if self.outcome == "disconnect" { self.ended_unix_us } else { 0 }),
        })
    }
}

impl Recorder {
    fn with(&self, change: impl FnOnce(&mut Record)) {
        change(&mut self.record.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The body is here.
    pub(super) fn body(&self, body: &Bytes) {
        let sha256 = self.sha256.then(|| Sha256::digest(body).iter().map(|b| format!("{b:02x}")).collect());
        self.with(|r| {
            r.body_bytes = u64::try_from(body.len()).ok();
            r.xxh3 = Some(xxhash_rust::xxh3::xxh3_64(body));
            r.sha256 = sha256;
        });
    }

    /// The id the engine gave it.
    pub(super) fn engine_id(&self, id: &str) {
        self.with(|r| r.engine_id = id.to_string());
    }

    /// Tokens sent so far.
    pub(super) fn tokens(&self, tokens: u64) {
        self.with(|r| r.tokens = tokens);
    }

    /// The status answered.
    pub(super) fn status(&self, status: u16) {
        self.with(|r| r.status = status);
    }

    /// The status answered; 0 if none was.
    pub(super) fn answered(&self) -> u16 {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).status
    }

    /// How it ended; the first word counts.
    pub(super) fn end(&self, outcome: &str) {
        self.with(|r| {
            if r.ended_unix_us == 0 {
                r.ended_unix_us = unix_us();
                r.outcome = outcome.to_string();
            }
        });
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.end("dropped");
    }
}
