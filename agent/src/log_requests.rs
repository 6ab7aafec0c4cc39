//! Requests for logs that come over the session with the control plane.
//!
//! Each is a task that sends a chunk only for a credit that it was given, so that there is never more on the way than the
//! control plane asked for: at most [`MOST`] times [`CREDITS`] chunks, half of what the session's outbox holds, and reports
//! pass between them. They end with the session.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use penstock_proto::v1::{self, agent_message::Message as Out};
use tokio::{
    sync::{Semaphore, mpsc},
    task::{AbortHandle, JoinSet},
};

use crate::{
    engine::context::Context,
    tail::{self, Wanted},
};

/// Requests that are answered at the same time.
const MOST: usize = 8;
/// Credits that one request can hold, whatever it is given.
const CREDITS: usize = 4;

/// The requests of one session.
pub(crate) struct LogRequests {
    cx: Arc<Context>,
    outbox: mpsc::Sender<v1::AgentMessage>,
    tasks: JoinSet<u64>,
    open: BTreeMap<u64, (Arc<Semaphore>, AbortHandle)>,
}

impl LogRequests {
    /// None yet; what is said goes to `outbox`.
    pub(crate) fn new(cx: Arc<Context>, outbox: mpsc::Sender<v1::AgentMessage>) -> Self {
        Self { cx, outbox, tasks: JoinSet::new(), open: BTreeMap::new() }
    }

    /// Takes a message in. Never waits.
    pub(crate) fn take(&mut self, request: v1::LogRequest) {
        while let Some(ended) = self.tasks.try_join_next() {
            if let Ok(id) = ended {
                self.open.remove(&id);
            }
        }
        self.open.retain(|_, (_, task)| !task.is_finished());
        let id = request.id;
        if request.cancel {
            if let Some((_, task)) = self.open.remove(&id) {
                task.abort();
            }
            return;
        }
        let credits = usize::try_from(request.credits).unwrap_or(CREDITS);
        if let Some((held, _)) = self.open.get(&id) {
            held.add_permits(credits.min(CREDITS.saturating_sub(held.available_permits())));
            return;
        }
        // What says more of a request that has ended meanwhile.
        if request.replica_id.is_empty() {
            return;
        }
        if self.open.len() >= MOST {
            let error = format!(
                "{MOST} logs of this node are being read already; try again when one of them is done"
            );
            let refusal = v1::LogChunk { id, last: true, error, ..Default::default() };
            if self.outbox.try_send(v1::AgentMessage { message: Some(Out::Log(refusal)) }).is_err() {
                tracing::warn!("a request for a log was not answered: the control plane does not read");
            }
            return;
        }
        let held = Arc::new(Semaphore::new(credits.min(CREDITS)));
        let wanted = Wanted {
            replica_id: request.replica_id,
            lines: request.lines,
            follow: request.follow,
            previous: request.previous,
        };
        tracing::debug!(id, ?wanted, "a log is asked for");
        let serving = serve(self.cx.clone(), id, wanted, held.clone(), self.outbox.clone());
        let task = self.tasks.spawn(serving);
        self.open.insert(id, (held, task));
    }

    /// Ends them all.
    pub(crate) async fn end(mut self) {
        self.tasks.shutdown().await;
    }
}

async fn serve(
    cx: Arc<Context>,
    id: u64,
    wanted: Wanted,
    credits: Arc<Semaphore>,
    outbox: mpsc::Sender<v1::AgentMessage>,
) -> u64 {
    let say = async |chunk: v1::LogChunk| {
        outbox.send(v1::AgentMessage { message: Some(Out::Log(chunk)) }).await.is_ok()
    };
    let (parts, mut reading) = mpsc::channel::<Bytes>(1);
    let sending = async {
        while let Some(part) = reading.recv().await {
            let Ok(credit) = credits.acquire().await else { return };
            credit.forget();
            if !say(v1::LogChunk { id, data: part.into(), ..Default::default() }).await {
                return;
            }
        }
    };
    let (read, ()) = tokio::join!(tail::pump(cx, wanted, parts), sending);
    say(v1::LogChunk { id, last: true, error: read.err().unwrap_or_default(), ..Default::default() }).await;
    id
}
