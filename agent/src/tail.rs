//! Engines' logs as somebody asks for them: the last lines, and what is written from then on.
//!
//! One task for each that asks, with a bounded channel to it: who reads slowly is read for slowly. It ends when whoever asked
//! has gone, or, of one that follows, when the replica has.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::engine::context::Context;

/// Largest part.
pub(crate) const CHUNK: usize = 32 << 10;
/// Most lines that can be asked for.
pub(crate) const MOST_LINES: u32 = 10_000;
/// How often the end of a log is looked at for more.
const POLL: Duration = Duration::from_millis(200);

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Whose log.
    pub(crate) replica_id: String,
    /// So many of its last lines.
    pub(crate) lines: u32,
    /// And what comes then.
    pub(crate) follow: bool,
    /// Of its life before the present one; nothing comes then.
    pub(crate) previous: bool,
}

/// Sends the log to `out`, until its end, or until nobody listens.
///
/// # Errors
/// A sentence: there is no such log.
pub(crate) async fn pump(cx: Arc<Context>, wanted: Wanted, out: mpsc::Sender<Bytes>) -> Result<(), String> {
    let _counted = Counted::new(cx.clone());
    let id = wanted.replica_id.clone();
    let path = cx.state.log(&id);
    let lines = usize::try_from(wanted.lines.min(MOST_LINES)).unwrap_or_default();
    let (reader, from) = (cx.clone(), path.clone());
    let last = blocking(move || reader.logs.last(&from, lines, wanted.previous)).await;
    let (text, mut at) = match last {
        Ok((Some(text), at)) => (text, at),
        Ok((None, _)) => return Err(format!("{id} has had one life only: its log has no other")),
        Err(_) if !is_here(&cx, &id) => return Err(format!("no engine of {id:?} is, or was, on this node")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => (Vec::new(), 0),
        Err(error) => return Err(format!("the log of {id} cannot be read: {error}")),
    };
    let mut text = Bytes::from(text);
    // Whoever waits learns that there is a log, though nothing is in it yet.
    if text.is_empty() && wanted.follow && out.send(Bytes::new()).await.is_err() {
        return Ok(());
    }
    while !text.is_empty() {
        let part = text.split_to(text.len().min(CHUNK));
        if out.send(part).await.is_err() {
            return Ok(());
        }
    }
    while wanted.follow && !wanted.previous {
        let (reader, path) = (cx.clone(), path.clone());
        // Asked first, so that what it wrote last is read after.
        let stays = is_here(&cx, &id);
        match blocking(move || reader.logs.read(&path, at, CHUNK as u64)).await {
            Ok((bytes, next)) if !bytes.is_empty() => {
                at = next;
                if out.send(Bytes::from(bytes)).await.is_err() {
                    break;
                }
                continue;
            }
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(format!("the log of {id} cannot be read: {error}"));
            }
            _ if !stays => break,
            _ => {}
        }
        tokio::select! {
            () = out.closed() => break,
            () = tokio::time::sleep(POLL) => {}
        }
    }
    Ok(())
}

fn is_here(cx: &Context, replica_id: &str) -> bool {
    cx.board.all().iter().any(|view| view.assignment.replica_id == replica_id)
}

async fn blocking<T: Send + 'static>(
    read: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    tokio::task::spawn_blocking(read).await.unwrap_or_else(|broken| Err(std::io::Error::other(broken)))
}

/// One request, in the metrics, however it ends.
struct Counted(Arc<Context>);

impl Counted {
    fn new(cx: Arc<Context>) -> Self {
        cx.metrics.log_streams.inc();
        Self(cx)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.metrics.log_streams.dec();
    }
}
