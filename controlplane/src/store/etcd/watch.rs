//! A watch that outlives its connection.
//!
//! It remembers the next revision it owes, so a connection that breaks (a member died, was cut off, or the network was)
//! is replaced at another member and nothing is lost or repeated. What it cannot bridge it says: events that were
//! compacted away meanwhile, and a store whose history is not the one it followed.
//!
//! Between messages it holds no more than one message of etcd's: a slow reader slows the stream by gRPC's flow control,
//! and etcd drops it behind its compaction in the end.

use std::{sync::Arc, time::Duration};

use etcd_client::{Event as EtcdEvent, EventType, WatchOptions, WatchStream};
use futures_util::stream;

use super::{
    Inner,
    convert::{number, signed},
    failure::{Cause, Failure, Verdict},
    link::jittered,
};
use crate::store::{Event, EventBatch, Revision, StoreError, Watch, WatchError};

/// Largest message of a watch: a thousand revisions of the largest transactions do not travel in one.
const MAX_MESSAGE_BYTES: usize = 256 << 20;
/// First pause after a broken connection.
const PAUSE: Duration = Duration::from_millis(20);
/// Longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

pub(super) fn open(inner: Arc<Inner>, prefix: &str, from: Revision) -> Watch {
    let follower =
        Follower { inner, prefix: prefix.to_owned(), next: from.max(1), stream: None, pause: PAUSE };
    Box::pin(stream::unfold(Some(follower), |follower| async move {
        let mut follower = follower?;
        match follower.batch().await {
            Ok(batch) => Some((Ok(batch), Some(follower))),
            Err(error) => Some((Err(error), None)),
        }
    }))
}

struct Follower {
    inner: Arc<Inner>,
    prefix: String,
    /// The first revision that was not delivered yet.
    next: Revision,
    stream: Option<(WatchStream, u64)>,
    pause: Duration,
}

/// Why a stream gave no events.
enum Stop {
    /// For the reader.
    Tell(WatchError),
    /// For nobody: connect again.
    Broken(Failure),
}

impl From<etcd_client::Error> for Stop {
    fn from(error: etcd_client::Error) -> Self {
        Self::Broken(Failure::of(&error))
    }
}

impl Follower {
    async fn batch(&mut self) -> Result<EventBatch, WatchError> {
        let closed = self.inner.closed.clone();
        tokio::select! {
            biased;
            () = closed.cancelled() => Err(WatchError::Broken("the store was closed".into())),
            batch = self.follow() => batch,
        }
    }

    async fn follow(&mut self) -> Result<EventBatch, WatchError> {
        loop {
            match self.step().await {
                Ok(Some(batch)) => return Ok(batch),
                Ok(None) => {}
                Err(Stop::Tell(error)) => return Err(error),
                Err(Stop::Broken(failure)) => {
                    if let Some((_, number)) = self.stream.take() {
                        self.inner.link.leave(number);
                    }
                    if failure.verdict == Verdict::Final && failure.cause != Cause::Auth {
                        return Err(WatchError::Broken(failure.into_store_error(0).to_string()));
                    }
                    tracing::debug!(?failure, next = self.next, "a watch is connected anew");
                    tokio::time::sleep(jittered(self.pause)).await;
                    self.pause = (self.pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    /// Connects if need be, and takes one message.
    async fn step(&mut self) -> Result<Option<EventBatch>, Stop> {
        if self.stream.is_none() {
            self.connect().await?;
        }
        let Some((stream, _)) = &mut self.stream else { return Ok(None) };
        let lost = || Failure::new(Verdict::Unknown, Cause::Unreachable, "etcd ended the watch");
        let response = stream.message().await?.ok_or_else(|| Stop::Broken(lost()))?;
        if response.compact_revision() > 0 {
            // The oldest revision that is kept is the compact revision itself.
            let through = number(response.compact_revision()).saturating_sub(1).max(self.next);
            return Err(Stop::Tell(WatchError::Compacted { through }));
        }
        if response.canceled() {
            let status = tonic::Status::unavailable(response.cancel_reason());
            let status = if response.cancel_reason().contains("permission denied") {
                tonic::Status::permission_denied(response.cancel_reason())
            } else {
                status
            };
            return Err(etcd_client::Error::GRpcStatus(status).into());
        }
        self.pause = PAUSE;
        let events: Vec<Event> = response.events().iter().filter_map(|e| self.event(e)).collect();
        // The header's revision may run ahead of the events that were sent: only events say how far it is.
        let Some(revision) = events.last().map(Event::revision) else { return Ok(None) };
        self.next = revision + 1;
        Ok(Some(EventBatch { revision, events }))
    }

    async fn connect(&mut self) -> Result<(), Stop> {
        // A store that was wiped or restored would let us wait for a revision that means something else by then.
        self.inner.witness().await.map_err(|error| match error {
            StoreError::Unavailable(why) | StoreError::NoQuorum(why) => {
                Stop::Broken(Failure::new(Verdict::Unknown, Cause::Unreachable, why))
            }
            other => Stop::Tell(WatchError::Broken(other.to_string())),
        })?;
        let (client, number) = self.inner.link.client().await.map_err(Stop::Broken)?;
        let options = WatchOptions::new().with_prefix().with_start_revision(signed(self.next));
        let mut client = client.watch_client().max_decoding_message_size(MAX_MESSAGE_BYTES);
        let opening = client.watch(self.inner.prefix.full(&self.prefix), Some(options));
        let limit = self.inner.member_timeout;
        let opened = tokio::time::timeout(limit, opening).await;
        match opened.map_err(|_| Failure::silent(limit.as_millis())) {
            Ok(Ok(stream)) => {
                self.stream = Some((stream, number));
                Ok(())
            }
            Ok(Err(error)) => {
                self.inner.link.leave(number);
                Err(error.into())
            }
            Err(failure) => {
                self.inner.link.leave(number);
                Err(Stop::Broken(failure))
            }
        }
    }

    fn event(&self, event: &EtcdEvent) -> Option<Event> {
        let kv = event.kv()?;
        match event.event_type() {
            EventType::Put => self.inner.prefix.entry(kv).map(Event::Put),
            EventType::Delete => {
                let key = self.inner.prefix.own(kv.key())?;
                Some(Event::Delete { key, revision: number(kv.mod_revision()) })
            }
        }
    }
}
