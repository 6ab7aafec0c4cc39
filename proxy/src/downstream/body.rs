//! Taking a request's body whole, within limits of size, pace and memory.
//!
//! Whole, because the model that decides the route may be its last key, and because a retry needs it again. Pingora's own
//! retry buffer ends at 64 KiB and is not used. A body is one `Bytes` from here on; attempts share it without a copy.

use std::{sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use penstock_config::proxy::LimitsConfig;
use pingora_core::protocols::http::ServerSession;
use pingora_error::ErrorType;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};

use crate::error::GatewayError;

/// A body and the share of the memory budget it holds; the share is given back on drop.
#[derive(Debug)]
pub struct HeldBody {
    /// The body as it came.
    pub bytes: Bytes,
    _share: Share,
}

/// Bytes that all bodies together may hold.
#[derive(Debug, Clone)]
pub struct BodyBudget {
    /// One permit is [`Self::UNIT`] bytes.
    permits: Arc<Semaphore>,
    total: usize,
}

impl BodyBudget {
    const UNIT: usize = 1024;

    /// A budget of `bytes`.
    pub fn new(bytes: usize) -> Self {
        let total = (bytes / Self::UNIT).clamp(1, Semaphore::MAX_PERMITS);
        Self { permits: Arc::new(Semaphore::new(total)), total }
    }

    /// Bytes reserved now, by all requests together.
    pub fn held_bytes(&self) -> usize {
        self.total.saturating_sub(self.permits.available_permits()) * Self::UNIT
    }

    fn share(&self) -> Share {
        Share { budget: self.clone(), held: None, bytes: 0 }
    }
}

#[derive(Debug)]
struct Share {
    budget: BodyBudget,
    held: Option<OwnedSemaphorePermit>,
    bytes: usize,
}

impl Share {
    /// Sees to it that at least `bytes` are reserved.
    fn grow_to(&mut self, bytes: usize) -> Result<(), GatewayError> {
        let missing = bytes.saturating_sub(self.bytes).div_ceil(BodyBudget::UNIT);
        if missing == 0 {
            return Ok(());
        }
        let permits = u32::try_from(missing).map_err(|_| GatewayError::Overloaded)?;
        let more = Arc::clone(&self.budget.permits)
            .try_acquire_many_owned(permits)
            .map_err(|_| GatewayError::Overloaded)?;
        match &mut self.held {
            Some(held) => held.merge(more),
            None => self.held = Some(more),
        }
        self.bytes += missing * BodyBudget::UNIT;
        Ok(())
    }
}

/// The announced length, if there is one. Pingora has checked the header's syntax by then.
pub fn announced_length(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.trim().parse().ok()
}

/// Whether the client holds its body back until it hears from us (`Expect: 100-continue`), and has not heard yet.
pub fn waits_to_continue(session: &ServerSession) -> bool {
    let asked = session.get_header_bytes(header::EXPECT).eq_ignore_ascii_case(b"100-continue");
    asked && session.response_written().is_none()
}

/// Reads the body to its end.
///
/// # Errors
/// `BodyTooLarge`, `BodyTimeout`, `BodyFraming`, `Overloaded`, or `ClientGone`.
pub async fn read(
    session: &mut ServerSession,
    limits: &LimitsConfig,
    budget: &BodyBudget,
) -> Result<HeldBody, GatewayError> {
    let too_large = GatewayError::BodyTooLarge { limit: limits.body_bytes };
    let announced = announced_length(&session.req_header().headers);
    if announced.is_some_and(|length| length > limits.body_bytes) {
        return Err(too_large);
    }
    let mut share = budget.share();
    share.grow_to(announced.unwrap_or(0))?;
    if waits_to_continue(session) {
        // Or pingora takes the 100 for an early answer and closes the connection after the real one.
        session.set_close_on_response_before_downstream_finish(false);
        session.write_continue_response().await.map_err(|_| GatewayError::ClientGone)?;
    }
    let idle = Duration::from_millis(limits.body_idle_ms);
    let deadline = Instant::now() + Duration::from_millis(limits.body_total_ms);
    let mut body = BytesMut::new();
    loop {
        let until = deadline.min(Instant::now() + idle);
        let read =
            timeout_at(until, session.read_request_body()).await.map_err(|_| GatewayError::BodyTimeout)?;
        let Some(chunk) = read.map_err(|e| read_error(&e))? else { break };
        let length = body.len() + chunk.len();
        if length > limits.body_bytes {
            return Err(too_large);
        }
        if body.is_empty() && announced == Some(chunk.len()) {
            return Ok(HeldBody { bytes: chunk, _share: share }); // came in one read, the usual case
        }
        share.grow_to(length)?;
        if body.is_empty() {
            body.reserve(announced.unwrap_or(chunk.len()));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(HeldBody { bytes: body.freeze(), _share: share })
}

fn read_error(error: &pingora_error::Error) -> GatewayError {
    match error.etype() {
        ErrorType::ReadTimedout => GatewayError::BodyTimeout,
        ErrorType::ConnectionClosed | ErrorType::ReadError => GatewayError::ClientGone,
        _ => GatewayError::BodyFraming,
    }
}

/// Takes what is left of an upload that was refused, so that the client can read the refusal instead of a reset, and the
/// connection can serve its next request. Gives up after `limits.body_idle_ms`, or after as much again as a body may hold.
pub async fn discard_rest(session: &mut ServerSession, limits: &LimitsConfig) {
    let deadline = Instant::now() + Duration::from_millis(limits.body_idle_ms);
    let mut left = limits.body_bytes.saturating_mul(2);
    while let Ok(Ok(Some(chunk))) = timeout_at(deadline, session.read_request_body()).await {
        left = left.saturating_sub(chunk.len());
        if left == 0 {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up_to_the_budget_and_are_given_back() {
        let budget = BodyBudget::new(10 * 1024);
        let mut first = budget.share();
        first.grow_to(6 * 1024).expect("fits");
        first.grow_to(5 * 1024).expect("less is nothing");
        let mut second = budget.share();
        assert_eq!(second.grow_to(5 * 1024), Err(GatewayError::Overloaded));
        second.grow_to(4 * 1024).expect("exactly what is left");
        assert_eq!(budget.held_bytes(), 10 * 1024);
        drop(first);
        second.grow_to(10 * 1024).expect("the first one's came back");
        drop(second);
        assert_eq!(budget.held_bytes(), 0);
    }
}
