//! One client: one request at a time, everything checked.

use std::{pin::Pin, rc::Rc, task::Poll};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Request, Response,
    body::{Body, Incoming},
    client::conn::http2,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{sync::Mutex, task::JoinSet};

use super::{
    answer::{Answer, Began, Failure, check_whole, lossy},
    connection::{Http1, Patience, Stream},
    lane::Lane,
    prompts::{Session, body},
    verify::Checker,
};
use crate::clock::now_ns;

/// Longest whole answer.
const MAX_BODY_BYTES: usize = 64 << 20;
/// How much HTTP/2 may send unasked, on a stream and on a connection: never a reason to wait here.
const WINDOW_BYTES: u32 = 16 << 20;

/// A connection that several clients use, and the task that drives it.
pub(super) type SharedHttp2 = Rc<Mutex<Option<Http2>>>;

/// HTTP/2 to the server.
pub(super) struct Http2 {
    sender: http2::SendRequest<Full<Bytes>>,
    /// Ends with this.
    _connection: JoinSet<()>,
}

/// A client.
pub(super) struct Client {
    /// Named in its prompts.
    stream: u64,
    /// Requests of the stream so far.
    made: u64,
    /// Which connection of HTTP/2 is its.
    group: u64,
    http1: Option<Http1>,
}

/// What is done with the bytes of an answer.
enum Reader {
    Stream(Box<Answer>),
    Whole(Vec<u8>, Box<Checker>),
    /// The status is an error.
    Refusal(u16, Vec<u8>),
}

impl Client {
    /// The `number`-th of its thread's.
    pub(super) fn new(lane: &Lane, number: u64) -> Self {
        let group = number / lane.plan.options.streams_per_connection;
        Self { stream: number, made: 0, group, http1: None }
    }

    /// What it says in `authorization`; empty for nothing.
    fn key<'a>(&self, lane: &'a Lane) -> &'a str {
        let (keys, options) = (&lane.plan.keys, &lane.plan.options);
        let count = keys.len().max(1) as u64;
        // Streams that last begin apart, so that together they come through all keys.
        let apart = options.arrivals.is_closed();
        let first = if apart { self.stream.saturating_mul(count) / options.streams } else { self.stream };
        let turn = first.wrapping_add(self.made) % count;
        usize::try_from(turn).ok().and_then(|turn| keys.get(turn)).map_or("", String::as_str)
    }

    /// Speaks for another stream from now on.
    pub(super) const fn is_stream(&mut self, stream: u64) {
        self.stream = stream;
        self.made = 0;
    }

    /// Asks the session's next question and counts the answer. How long it thinks before the one after it, in ms; none if
    /// there is none, or if this one failed.
    pub(super) async fn ask(
        &mut self,
        lane: &Lane,
        session: &mut Session,
        intended_ns: Option<u64>,
    ) -> Option<u64> {
        self.made += 1;
        let tokens = session.ask(&lane.plan.traffic, self.made);
        let options = &lane.plan.options;
        let mut checker = Checker::chat(session.messages(), tokens);
        if session.goes_on() {
            checker.keep_text();
        }
        if !options.token_ids {
            checker.forget_ids();
        }
        let body = body(options, session.messages(), tokens);
        let began_ns = now_ns();
        let began = Began { intended_ns: intended_ns.unwrap_or(began_ns), began_ns };
        if let Some(intended_ns) = intended_ns.filter(|ns| lane.plan.span.holds(*ns)) {
            lane.stats.borrow_mut().late.note(intended_ns, began_ns);
        }
        let answered = match options.http2 {
            true => self.ask_http2(lane, body, began, checker).await,
            false => self.ask_http1(lane, &body, began, checker).await,
        };
        let now_ns = now_ns();
        match answered {
            Ok(text) => {
                lane.stats.borrow_mut().good(now_ns, began.intended_ns, began_ns, tokens);
                session.goes_on().then(|| session.answered(&lane.plan.traffic, text.unwrap_or_default()))
            }
            Err(failure) => {
                self.http1 = None;
                lane.stats.borrow_mut().fail(now_ns, &failure.kind, &failure.detail);
                None
            }
        }
    }

    async fn ask_http1(
        &mut self,
        lane: &Lane,
        body: &[u8],
        began: Began,
        checker: Checker,
    ) -> Result<Option<String>, Failure> {
        let mut patience = Patience::new(lane.idle);
        let kept = self.http1.take().and_then(|mut kept| kept.is_idle().then_some(kept));
        let mut connection = match kept {
            Some(kept) => kept,
            None => Http1::new(Stream::open(lane).await?),
        };
        let mut request = Vec::with_capacity(lane.plan.head.len() + body.len() + 160);
        request.extend_from_slice(&lane.plan.head);
        let key = self.key(lane);
        if !key.is_empty() {
            request.extend_from_slice(format!("authorization: {key}\r\n").as_bytes());
        }
        request.extend_from_slice(format!("content-length: {}\r\n\r\n", body.len()).as_bytes());
        request.extend_from_slice(body);
        connection.write(lane, &request, &mut patience).await?;
        drop(request);
        let head = connection.head(lane, &mut patience).await?;
        let mut reader = Reader::new(head.status, lane, began, checker);
        let reusable = connection
            .body(lane, head.framing, &mut patience, |bytes, now_ns| reader.take(bytes, now_ns, lane))
            .await?;
        if reusable && head.keep_alive {
            self.http1 = Some(connection);
        }
        reader.end(lane)
    }

    async fn ask_http2(
        &mut self,
        lane: &Lane,
        body: Vec<u8>,
        began: Began,
        checker: Checker,
    ) -> Result<Option<String>, Failure> {
        let mut patience = Patience::new(lane.idle);
        let mut sender = self.connection(lane).await?;
        let scheme = if lane.plan.target.tls { "https" } else { "http" };
        let (authority, base) = (&lane.plan.target.authority, &lane.plan.target.base);
        let mut request = Request::post(format!("{scheme}://{authority}{base}/v1/chat/completions"))
            .header("content-type", "application/json");
        let key = self.key(lane);
        if !key.is_empty() {
            request = request.header("authorization", key);
        }
        let request = request.body(Full::new(Bytes::from(body))).map_err(|e| Failure::new("request", e))?;
        let mut sending = std::pin::pin!(async {
            sender.ready().await?;
            sender.send_request(request).await
        });
        let response: Response<Incoming> = std::future::poll_fn(|cx| match sending.as_mut().poll(cx) {
            Poll::Ready(sent) => Poll::Ready(sent.map_err(|e| Failure::new("send", e))),
            Poll::Pending => patience.poll(cx, "response header"),
        })
        .await?;
        patience.heard(now_ns());
        let mut reader = Reader::new(response.status().as_u16(), lane, began, checker);
        let mut body = response.into_body();
        loop {
            let frame = std::future::poll_fn(|cx| match Pin::new(&mut body).poll_frame(cx) {
                Poll::Ready(frame) => {
                    Poll::Ready(frame.transpose().map_err(|e| Failure::new("cut", with_source(&e))))
                }
                Poll::Pending => patience.poll(cx, "event"),
            });
            let Some(frame) = frame.await? else { break };
            let now_ns = now_ns();
            patience.heard(now_ns);
            if let Some(bytes) = frame.data_ref() {
                reader.take(bytes, now_ns, lane)?;
            }
        }
        reader.end(lane)
    }

    /// The connection of its group, which is opened if there is none.
    async fn connection(&self, lane: &Lane) -> Result<http2::SendRequest<Full<Bytes>>, Failure> {
        let slot = Rc::clone(lane.http2.borrow_mut().entry(self.group).or_default());
        let mut slot = slot.lock().await;
        if let Some(open) = slot.as_ref().filter(|open| !open.sender.is_closed()) {
            return Ok(open.sender.clone());
        }
        let stream = Stream::open(lane).await?;
        let (sender, driver) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|e| Failure::new("connect", with_source(&e)))?;
        let mut connection = JoinSet::new();
        connection.spawn(async move {
            // What breaks the connection is seen by the requests on it.
            driver.await.unwrap_or_default();
        });
        *slot = Some(Http2 { sender: sender.clone(), _connection: connection });
        Ok(sender)
    }
}

/// An error with what is behind it: hyper says the better part there.
fn with_source(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

impl Reader {
    fn new(status: u16, lane: &Lane, began: Began, checker: Checker) -> Self {
        let options = &lane.plan.options;
        match status {
            200..300 if options.unary => Self::Whole(Vec::new(), Box::new(checker)),
            200..300 => Self::Stream(Box::new(Answer::new(began, checker, options.token_ids))),
            _ => Self::Refusal(status, Vec::new()),
        }
    }

    fn take(&mut self, bytes: &[u8], now_ns: u64, lane: &Lane) -> Result<(), Failure> {
        let mut stats = lane.stats.borrow_mut();
        match self {
            Self::Stream(answer) => answer.take(bytes, now_ns, &mut stats),
            Self::Whole(body, _) | Self::Refusal(_, body) => {
                stats.read(now_ns, bytes.len(), 0);
                body.extend_from_slice(bytes);
                let endless = body.len() > MAX_BODY_BYTES;
                if endless { Err(Failure::new("garbage", "an endless body")) } else { Ok(()) }
            }
        }
    }

    /// The text of a right answer, if it was kept.
    fn end(self, lane: &Lane) -> Result<Option<String>, Failure> {
        match self {
            Self::Stream(answer) => answer.end(),
            Self::Whole(body, checker) => check_whole(&body, *checker, lane.plan.options.token_ids),
            Self::Refusal(status, body) => Err(Failure::new(&format!("status {status}"), lossy(&body))),
        }
    }
}
