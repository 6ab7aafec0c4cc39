//! Engines' logs for whoever asks: handed to the session of the replica's node, and back part by part.
//!
//! The agent sends a part only for a credit, and gets the next one when a part was taken: a reader that is slow, or stops,
//! holds up nothing but itself. A stream ends when its reader goes, the node's session ends, or the log does.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use penstock_proto::v1;
use tokio::sync::mpsc;

use super::roster::Seat;

/// Logs of one node that are read at the same time; the agent has the same bound.
pub const MOST_PER_NODE: usize = 8;
/// Logs that one control plane reads at the same time.
pub const MOST: usize = 64;
/// Parts that may be on the way.
const CREDITS: u32 = 4;
/// Requests to one session that may wait: more than its streams can have at any time.
const WAITING: usize = 64;

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Whose log.
    pub replica_id: String,
    /// So many of its last lines.
    pub lines: u32,
    /// And what comes then.
    pub follow: bool,
    /// Of its life before the present one.
    pub previous: bool,
}

/// Why there is no log to be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No session.
    #[error("the agent of node {0} is not connected: its engines' logs are on the node, in its state_dir")]
    NotConnected(String),
    /// Too many at once.
    #[error(
        "{MOST_PER_NODE} logs of one node, and {MOST} of all, can be read at the same time, and they are: try again when one of \
         them is done"
    )]
    TooMany,
}

/// Every log that is being read, and the sessions that can be asked.
#[derive(Debug, Default)]
pub struct Logs {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    last: u64,
    nodes: BTreeMap<String, (u64, mpsc::Sender<v1::LogRequest>)>,
    open: BTreeMap<u64, Open>,
}

#[derive(Debug)]
struct Open {
    seat: u64,
    chunks: mpsc::Sender<v1::LogChunk>,
}

impl Logs {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session can be asked from now on: what it shall send to its agent.
    pub fn connect(&self, node_id: &str, seat: &Seat) -> mpsc::Receiver<v1::LogRequest> {
        let (requests, waiting) = mpsc::channel(WAITING);
        self.inner().nodes.insert(node_id.to_owned(), (seat.number, requests));
        waiting
    }

    /// A session has ended, and its streams with it.
    pub fn disconnect(&self, node_id: &str, seat: &Seat) {
        let mut inner = self.inner();
        if inner.nodes.get(node_id).is_some_and(|(number, _)| *number == seat.number) {
            inner.nodes.remove(node_id);
        }
        inner.open.retain(|_, open| open.seat != seat.number);
    }

    /// Begins to read a log.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn open(self: &Arc<Self>, node_id: &str, wanted: Wanted) -> Result<LogStream, Refusal> {
        let mut inner = self.inner();
        let not_connected = || Refusal::NotConnected(node_id.to_owned());
        let (seat, requests) = inner.nodes.get(node_id).cloned().ok_or_else(not_connected)?;
        let of_node = inner.open.values().filter(|open| open.seat == seat).count();
        if of_node >= MOST_PER_NODE || inner.open.len() >= MOST {
            return Err(Refusal::TooMany);
        }
        let id = inner.last + 1;
        let request = v1::LogRequest {
            id,
            replica_id: wanted.replica_id,
            lines: wanted.lines,
            follow: wanted.follow,
            previous: wanted.previous,
            credits: CREDITS,
            cancel: false,
        };
        requests.try_send(request).map_err(|_| not_connected())?;
        // One place more, for the end.
        let (chunks, parts) = mpsc::channel(CREDITS as usize + 1);
        inner.last = id;
        inner.open.insert(id, Open { seat, chunks });
        Ok(LogStream { id, logs: self.clone(), requests, parts })
    }

    /// Takes a part in. Never waits: an agent that sends more than it was asked for loses the stream.
    pub fn take(&self, seat: &Seat, chunk: v1::LogChunk) {
        let mut inner = self.inner();
        let (id, last) = (chunk.id, chunk.last);
        // Whoever read it has gone: the agent hears of it.
        let Some(open) = inner.open.get(&id).filter(|open| open.seat == seat.number) else { return };
        let taken = open.chunks.try_send(chunk).is_ok();
        if !taken {
            tracing::warn!(id, "a log was given up: its agent sent more than it was asked for");
        }
        if last || !taken {
            inner.open.remove(&id);
        }
    }
}

/// A log that is being read.
#[derive(Debug)]
pub struct LogStream {
    id: u64,
    logs: Arc<Logs>,
    requests: mpsc::Sender<v1::LogRequest>,
    parts: mpsc::Receiver<v1::LogChunk>,
}

impl LogStream {
    /// The next part; the one that is marked as the last has no other after it. None: the session has ended before it.
    pub async fn next(&mut self) -> Option<v1::LogChunk> {
        let part = self.parts.recv().await?;
        if !part.last {
            let credit = v1::LogRequest { id: self.id, credits: 1, ..Default::default() };
            // A session that has ended shows in the next part.
            self.requests.send(credit).await.ok();
        }
        Some(part)
    }
}

impl Drop for LogStream {
    fn drop(&mut self) {
        if self.logs.inner().open.remove(&self.id).is_some() {
            let cancel = v1::LogRequest { id: self.id, cancel: true, ..Default::default() };
            if self.requests.try_send(cancel).is_err() {
                tracing::debug!(
                    id = self.id,
                    "a session has ended before it was told that nobody reads a log any more"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;

    fn wanted() -> Wanted {
        Wanted { replica_id: "m-0".into(), lines: 5, follow: true, previous: false }
    }

    fn seat(number: u64) -> Seat {
        Seat { number, replaced: CancellationToken::new() }
    }

    fn part(id: u64, data: &[u8], last: bool) -> v1::LogChunk {
        v1::LogChunk { id, data: data.into(), last, error: String::new() }
    }

    #[tokio::test]
    async fn parts_come_for_credits_and_a_reader_that_goes_is_told() {
        let (logs, seat) = (Arc::new(Logs::default()), seat(3));
        assert_eq!(logs.open("n", wanted()).unwrap_err(), Refusal::NotConnected("n".into()));
        let mut asked = logs.connect("n", &seat);
        let mut stream = logs.open("n", wanted()).unwrap();
        let request = asked.recv().await.unwrap();
        assert_eq!((request.replica_id.as_str(), request.lines, request.credits), ("m-0", 5, CREDITS));
        let id = request.id;
        logs.take(&seat, part(id, b"a", false));
        assert_eq!(stream.next().await.unwrap().data, b"a");
        let credit = asked.recv().await.unwrap();
        assert_eq!((credit.id, credit.credits, credit.replica_id.as_str()), (id, 1, ""));
        drop(stream);
        assert!(asked.recv().await.unwrap().cancel);
        logs.take(&seat, part(id, b"late", false));
        assert!(logs.inner().open.is_empty());
    }

    #[tokio::test]
    async fn the_end_is_the_logs_or_the_sessions() {
        let (logs, seat) = (Arc::new(Logs::default()), seat(3));
        let mut asked = logs.connect("n", &seat);
        let mut stream = logs.open("n", wanted()).unwrap();
        logs.take(&seat, part(1, b"", true));
        assert!(stream.next().await.unwrap().last);
        drop(stream);
        let mut stream = logs.open("n", wanted()).unwrap();
        logs.disconnect("n", &seat);
        assert_eq!(stream.next().await, None);
        drop(stream);
        let told: Vec<u64> = std::iter::from_fn(|| asked.try_recv().ok()).map(|request| request.id).collect();
        assert_eq!(told, [1, 2], "what has ended is not cancelled");
    }

    #[tokio::test]
    async fn more_than_was_asked_for_ends_a_stream_and_other_sessions_have_no_say() {
        let (logs, own, other) = (Arc::new(Logs::default()), seat(3), seat(4));
        let _asked = logs.connect("n", &own);
        let mut stream = logs.open("n", wanted()).unwrap();
        logs.take(&other, part(1, b"not yours", false));
        for _ in 0..=CREDITS + 1 {
            logs.take(&own, part(1, b"x", false));
        }
        for _ in 0..=CREDITS {
            assert_eq!(stream.next().await.unwrap().data, b"x");
        }
        assert_eq!(stream.next().await, None);
    }

    #[tokio::test]
    async fn so_many_and_no_more_of_one_node() {
        let logs = Arc::new(Logs::default());
        let _asked = (logs.connect("n", &seat(1)), logs.connect("o", &seat(2)));
        let all: Vec<_> = (0..MOST_PER_NODE).map(|_| logs.open("n", wanted()).unwrap()).collect();
        assert_eq!(logs.open("n", wanted()).unwrap_err(), Refusal::TooMany);
        logs.open("o", wanted()).unwrap();
        drop(all);
        logs.open("n", wanted()).unwrap();
    }

    #[tokio::test]
    async fn a_newer_session_of_a_node_is_not_taken_away_by_the_end_of_the_older() {
        let logs = Arc::new(Logs::default());
        let _older = logs.connect("n", &seat(1));
        let _newer = logs.connect("n", &seat(2));
        logs.disconnect("n", &seat(1));
        logs.open("n", wanted()).unwrap();
    }
}
