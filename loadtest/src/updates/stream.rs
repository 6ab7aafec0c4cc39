//! Clients: one stream each, read as it comes, the delay of every event noted.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use memchr::memmem;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{Options, engine::STAMP};

/// Longest delay that is told apart, in microseconds.
const MAX_US: u64 = 60_000_000;

/// An empty histogram of microseconds.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, MAX_US, 3).expect("constants that are valid")
}

/// What all streams have seen.
#[derive(Debug)]
pub(super) struct Delays {
    epoch: Instant,
    seen: Mutex<Histogram<u64>>,
    open: AtomicU32,
}

impl Delays {
    pub(super) fn new(epoch: Instant) -> Self {
        Self { epoch, seen: Mutex::new(histogram()), open: AtomicU32::new(0) }
    }

    /// Streams that have had an event.
    pub(super) fn open(&self) -> u32 {
        self.open.load(Relaxed)
    }

    /// Forgets what was before.
    pub(super) fn begin(&self) {
        self.with(Histogram::reset);
    }

    /// What was seen since.
    pub(super) fn take(&self) -> Histogram<u64> {
        self.with(|seen| seen.clone())
    }

    fn note(&self, written_ns: u128) {
        let delay = self.epoch.elapsed().as_nanos().saturating_sub(written_ns) / 1_000;
        self.with(|seen| seen.saturating_record(u64::try_from(delay).unwrap_or(MAX_US).max(1)));
    }

    fn with<T>(&self, change: impl FnOnce(&mut Histogram<u64>) -> T) -> T {
        change(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// One stream, for as long as the process lives.
///
/// # Errors
/// Why it ended.
pub(super) async fn run(
    proxy: SocketAddr,
    index: u32,
    options: Options,
    delays: Arc<Delays>,
) -> Result<(), String> {
    let mut stream = TcpStream::connect(proxy).await.map_err(|e| format!("cannot connect: {e}"))?;
    stream.set_nodelay(true).map_err(|e| e.to_string())?;
    let model = Options::pool(index % options.pools);
    let body = format!(r#"{{"model":"{model}","stream":true,"messages":[]}}"#);
    let head =
        "POST /v1/chat/completions HTTP/1.1\r\nhost: p\r\ncontent-type: application/json\r\ncontent-length: ";
    let request = format!("{head}{}\r\n\r\n{body}", body.len());
    stream.write_all(request.as_bytes()).await.map_err(|e| format!("cannot send: {e}"))?;
    let (mut unread, mut begun) = (Vec::with_capacity(4_096), false);
    loop {
        match tokio::time::timeout(Duration::from_secs(60), stream.read_buf(&mut unread)).await {
            Ok(Ok(1..)) => {}
            Ok(Ok(_)) => return Err(format!("the proxy ended it: {}", tail(&unread))),
            Ok(Err(e)) => return Err(format!("it broke: {e}")),
            Err(_) => return Err("nothing for 60 s".into()),
        }
        let (stamps, rest) = stamps(&unread);
        if stamps.is_empty() && unread.len() > 64 << 10 {
            return Err(format!("no events: {}", tail(&unread)));
        }
        for written_ns in stamps {
            delays.note(written_ns);
            if !std::mem::replace(&mut begun, true) {
                delays.open.fetch_add(1, Relaxed);
            }
        }
        unread.drain(..rest);
    }
}

fn tail(bytes: &[u8]) -> String {
    let from = bytes.len().saturating_sub(300);
    String::from_utf8_lossy(bytes.get(from..).unwrap_or_default()).into_owned()
}

/// The times of all whole events in `bytes`, and how much of it they take.
fn stamps(bytes: &[u8]) -> (Vec<u128>, usize) {
    let (mut found, mut rest) = (Vec::new(), 0);
    for at in memmem::find_iter(bytes, STAMP) {
        let Some(event) = bytes.get(at + STAMP.len()..) else { break };
        let Some(end) = memmem::find(event, b"\n\n") else { break };
        let digits = event.split(|b| !b.is_ascii_digit()).next().unwrap_or_default();
        if let Some(time) = std::str::from_utf8(digits).ok().and_then(|text| text.parse().ok()) {
            found.push(time);
        }
        rest = at + STAMP.len() + end;
    }
    (found, rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_events_are_found_and_the_rest_is_kept() {
        let bytes = b"HTTP/1.1 200 OK\r\n\r\n1f\r\ndata: {\"t\":12,\"x\":1}\n\n\r\n1f\r\ndata: {\"t\":345}\n\n\r\ndata: {\"t\":6";
        let (found, rest) = stamps(bytes);
        assert_eq!(found, [12, 345]);
        assert!(bytes[rest..].ends_with(b"data: {\"t\":6") && stamps(&bytes[rest..]).0.is_empty());
        assert_eq!(stamps(b"nothing"), (vec![], 0));
    }
}
