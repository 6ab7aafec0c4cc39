//! A WebSocket between a client and an engine, once both have agreed to it: bytes both ways until one side ends it.
//!
//! The two directions move on their own, so that neither a client nor an engine that only talks can block the other
//! direction; each has one buffer and is held back by its reader (backpressure). Four things end it: the client leaves, the
//! engine ends it, nothing is said for too long, the gateway's last call. Where it is we who end it, the client gets a close
//! frame first, if the engine's last frame is whole. Dropping the engine's connection is how the engine learns of it.
//!
//! Cost: a read and a write for what is there, one idle timer for the tunnel, and a look at frame lengths on the way to the
//! client.

use std::{
    pin::{Pin, pin},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use bytes::Bytes;
use pingora_core::protocols::Stream;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf},
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    rename::{Names, Renamer},
    websocket::{FrameTracker, Goodbye},
};
use crate::{
    error::{GatewayError, UpstreamFailure},
    telemetry::metrics::Metrics,
};

/// Bytes of a direction that are under way in here at most.
const BUFFER_BYTES: usize = 16 << 10;

/// How long a goodbye may take to be written.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// One end of a tunnel.
pub struct End {
    /// The connection.
    pub stream: Stream,
    /// What has already been read from it.
    pub first: Bytes,
}

impl std::fmt::Debug for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("End").field("first", &self.first).finish_non_exhaustive()
    }
}

/// What a tunnel needs beside its ends.
#[derive(Debug)]
pub struct TunnelContext<'a> {
    /// Longest silence, both ways together.
    pub idle: Duration,
    /// Longest time that a side may take to accept bytes.
    pub write_stall: Duration,
    /// Cancelled when the gateway will wait no longer.
    pub cut: &'a CancellationToken,
    /// What client and engine call the model, where that differs.
    pub names: Option<Names>,
    /// Where bytes are counted.
    pub metrics: &'a Metrics,
}

/// When something last passed, either way.
struct Heard {
    start: Instant,
    /// After `start`.
    last_ms: AtomicU64,
}

impl Heard {
    fn now(&self) {
        let ms = self.start.elapsed().as_millis();
        self.last_ms.store(u64::try_from(ms).unwrap_or(u64::MAX), Relaxed);
    }

    fn last(&self) -> Instant {
        self.start + Duration::from_millis(self.last_ms.load(Relaxed))
    }
}

/// Why a direction stopped.
enum Stop {
    /// Its source ended.
    Ended,
    /// Its sink takes nothing more.
    Refused,
    /// Its sink took nothing for too long.
    Stalled,
}

/// Runs a tunnel to its end. `Ok` if the engine or the client ended it in order.
///
/// # Errors
/// `ClientGone`, `ClientStalled`, `Draining`, or `Upstream` when the engine was lost or both sides were silent for too long.
pub async fn run(client: End, engine: End, context: &TunnelContext<'_>) -> Result<(), GatewayError> {
    let (mut from_client, mut to_client) = tokio::io::split(client.stream);
    let (mut from_engine, mut to_engine) = tokio::io::split(engine.stream);
    let heard = Heard { start: Instant::now(), last_ms: AtomicU64::new(0) };
    let mut tracker = FrameTracker::default();
    let outcome = {
        let renamer = context.names.clone().map(Renamer::new);
        let up = pump(&mut from_client, &mut to_engine, client.first, renamer, context, |bytes| {
            heard.now();
            context.metrics.bytes_in.inc_by(bytes.len() as u64);
        });
        let down = pump(&mut from_engine, &mut to_client, engine.first, None, context, |bytes| {
            heard.now();
            tracker.push(bytes);
            context.metrics.bytes_out.inc_by(bytes.len() as u64);
        });
        let (up, down) = (pin!(up), pin!(down));
        either_ends(up, down, &heard, context).await
    };
    let said_goodbye = tracker.has_closed();
    let goodbye = match &outcome {
        Err(GatewayError::Draining) => Some(Goodbye::Stopping),
        Err(GatewayError::Upstream(UpstreamFailure::IdleTimeout)) => Some(Goodbye::Idle),
        Err(GatewayError::Upstream(_)) => Some(Goodbye::EngineLost),
        _ => None,
    };
    if let Some(goodbye) = goodbye.filter(|_| tracker.is_between_frames() && !said_goodbye) {
        let frame = goodbye.frame();
        // The client may be gone as well: the tunnel's own outcome stands.
        drop(timeout(LAST_WORDS, to_client.write_all(&frame)).await);
    }
    drop(timeout(LAST_WORDS, to_client.shutdown()).await);
    match outcome {
        // After a close frame the engine hangs up, or the client does: both are in order.
        Err(GatewayError::Upstream(UpstreamFailure::MidStream) | GatewayError::ClientGone)
            if said_goodbye =>
        {
            Ok(())
        }
        outcome => outcome,
    }
}

/// Waits for the first of all that ends a tunnel.
async fn either_ends(
    mut up: Pin<&mut impl Future<Output = Stop>>,
    mut down: Pin<&mut impl Future<Output = Stop>>,
    heard: &Heard,
    context: &TunnelContext<'_>,
) -> Result<(), GatewayError> {
    let lost = Err(GatewayError::Upstream(UpstreamFailure::MidStream));
    let mut idle = pin!(sleep_until(heard.last() + context.idle));
    loop {
        tokio::select! {
            biased;
            stop = down.as_mut() => return match stop {
                Stop::Ended => lost,
                Stop::Refused => Err(GatewayError::ClientGone),
                Stop::Stalled => Err(GatewayError::ClientStalled),
            },
            stop = up.as_mut() => return match stop {
                Stop::Ended => Err(GatewayError::ClientGone),
                Stop::Refused | Stop::Stalled => lost,
            },
            () = context.cut.cancelled() => return Err(GatewayError::Draining),
            () = idle.as_mut() => {
                let until = heard.last() + context.idle;
                if until <= Instant::now() {
                    return Err(GatewayError::Upstream(UpstreamFailure::IdleTimeout));
                }
                idle.as_mut().reset(until);
            }
        }
    }
}

/// Moves bytes one way until that is over. `passed` sees what has come, once it has been handed on.
async fn pump(
    source: &mut ReadHalf<Stream>,
    sink: &mut WriteHalf<Stream>,
    first: Bytes,
    mut renamer: Option<Renamer>,
    context: &TunnelContext<'_>,
    mut passed: impl FnMut(&[u8]),
) -> Stop {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut renamed = Vec::new();
    let mut ready: &[u8] = &first;
    loop {
        if !ready.is_empty() {
            let goes_on = match &mut renamer {
                None => ready,
                Some(renamer) => {
                    renamed.clear();
                    renamer.push(ready, &mut renamed);
                    &renamed
                }
            };
            let write = async {
                sink.write_all(goes_on).await?;
                sink.flush().await
            };
            match timeout(context.write_stall, write).await {
                Ok(Ok(())) => passed(ready),
                Ok(Err(_)) => return Stop::Refused,
                Err(_) => return Stop::Stalled,
            }
        }
        match source.read(&mut buffer).await {
            Ok(0) | Err(_) => return Stop::Ended,
            Ok(read) => ready = buffer.get(..read).unwrap_or_default(),
        }
    }
}
