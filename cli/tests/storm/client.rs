//! One worker of a storm: makes requests as planned, leaves as planned, and checks what it stays for.

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http_body_util::{BodyExt, StreamBody};
use hyper::{
    Request, Response,
    body::{Frame, Incoming},
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use penstock_loadtest::load::sse::{Event, Splitter, parse, unescape};
use serde_json::Value;
use tokio::{io::AsyncWriteExt, net::TcpStream, task::JoinSet};
use xxhash_rust::xxh3::xxh3_64;

use super::plan::{Leave, Plan, Transport};

type Body = StreamBody<Pin<Box<dyn Stream<Item = Result<Frame<Bytes>, Infallible>> + Send>>>;

/// How a request ended, for its client.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// Whole, every token right.
    Good,
    /// An error answer in the API's shape.
    Refused(u16),
    /// A stream that ended with an error event, its tokens right so far.
    Broken,
    /// The engine itself ended the generation and said so.
    Aborted,
    /// The client left in this phase, at this time (µs since 1970); the hash is its body's.
    Left { phase: &'static str, at_unix_us: u64, body: u64 },
    /// The connection was lost that another request shared and broke.
    Lost,
    /// Anything else: a failure of the test.
    Wrong(String),
}

/// What several workers share.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) address: SocketAddr,
    /// A client that would have stayed leaves after this time.
    pub(crate) patience: Duration,
    /// HTTP/2 connections; whoever finds one broken replaces it.
    pub(crate) h2: Arc<Vec<Mutex<Option<http2::SendRequest<Body>>>>>,
    /// The tasks that drive them.
    pub(crate) tasks: Arc<Mutex<JoinSet<()>>>,
}

/// A worker.
pub(crate) struct Client {
    shared: Shared,
    kept: Option<http1::SendRequest<Body>>,
    /// Drives the HTTP/1.1 connection; ending it closes the socket.
    connection: JoinSet<()>,
}

fn unix_us() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    u64::try_from(since.as_micros()).unwrap()
}

fn wrong(what: &str, detail: impl std::fmt::Debug) -> Outcome {
    Outcome::Wrong(format!("{what}: {detail:?}"))
}

impl Client {
    pub(crate) fn new(shared: Shared) -> Self {
        Self { shared, kept: None, connection: JoinSet::new() }
    }

    /// Makes one request.
    pub(crate) async fn request(&mut self, plan: &Plan) -> Outcome {
        let body = plan.body();
        if matches!(plan.leave, Leave::Connected | Leave::InHead) {
            return self.knock(plan, &body).await;
        }
        let planned = match plan.leave {
            Leave::Waiting(time) => Some(time),
            // As long as the part of the body needs to be on its way.
            Leave::InUpload => Some(Duration::from_millis(5)),
            _ => None,
        };
        let outcome =
            tokio::time::timeout(planned.unwrap_or(self.shared.patience), self.converse(plan, &body)).await;
        match outcome {
            // What was to be left may have been answered before.
            Ok(outcome) => {
                if !matches!(outcome, Outcome::Good) || plan.transport == Transport::Close {
                    self.hang_up();
                }
                match outcome {
                    Outcome::Left { phase, body, .. } => Outcome::Left { phase, at_unix_us: unix_us(), body },
                    other => other,
                }
            }
            Err(_) => {
                let at_unix_us = unix_us();
                self.hang_up();
                Outcome::Left { phase: plan.phase(), at_unix_us, body: xxh3_64(&body) }
            }
        }
    }

    /// Closes the worker's own connection.
    fn hang_up(&mut self) {
        self.kept = None;
        self.connection.abort_all();
    }

    /// Connects, and leaves before the request's head is whole.
    async fn knock(&mut self, plan: &Plan, body: &[u8]) -> Outcome {
        let Ok(mut stream) = TcpStream::connect(self.shared.address).await else {
            return Outcome::Wrong("cannot connect".into());
        };
        if plan.leave == Leave::InHead {
            let head: &[u8] = match plan.transport {
                Transport::H2 => b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x0c\x04\x00",
                _ => b"POST /v1/chat/completions HTTP/1.1\r\nhost: storm\r\ncontent-le",
            };
            stream.write_all(head).await.unwrap_or_default();
        }
        if plan.reset {
            stream.set_zero_linger().unwrap_or_default();
        }
        let at_unix_us = unix_us();
        drop(stream);
        Outcome::Left { phase: plan.phase(), at_unix_us, body: xxh3_64(body) }
    }

    async fn converse(&mut self, plan: &Plan, body: &[u8]) -> Outcome {
        let shares = plan.transport == Transport::H2;
        let reused = self.kept.is_some() && plan.transport == Transport::KeepAlive;
        let response = match self.send(plan, body).await {
            Ok(response) => response,
            Err(_) if shares => return Outcome::Lost,
            Err(e) => return wrong(if reused { "no answer on a kept connection" } else { "no answer" }, e),
        };
        let status = response.status().as_u16();
        let left = Outcome::Left { phase: plan.phase(), at_unix_us: 0, body: xxh3_64(body) };
        match (status, plan.stream) {
            (200, true) => read_stream(response, plan, left, shares).await,
            (200, false) => match response.collect().await {
                Ok(body) => check_unary(&body.to_bytes(), plan),
                Err(_) if shares => Outcome::Lost,
                Err(e) => wrong("a unary answer was cut", e),
            },
            _ => match response.collect().await {
                Ok(body) => check_error(status, &body.to_bytes()),
                Err(_) if shares => Outcome::Lost,
                Err(e) => wrong("an error answer was cut", e),
            },
        }
    }

    async fn send(&mut self, plan: &Plan, body: &[u8]) -> Result<Response<Incoming>, hyper::Error> {
        let request = Request::post("http://storm/v1/chat/completions")
            .header("host", "storm")
            .header("content-type", "application/json")
            .header("content-length", body.len());
        let request =
            if plan.transport == Transport::Close { request.header("connection", "close") } else { request };
        let request = request.body(upload(plan, body)).unwrap();
        if plan.transport == Transport::H2 {
            let mut sender = self.h2_sender(plan).await?;
            sender.ready().await?;
            return sender.send_request(request).await;
        }
        if plan.transport == Transport::Close || self.kept.as_ref().is_none_or(http1::SendRequest::is_closed)
        {
            self.connect(plan).await?;
        }
        let sender = self.kept.as_mut().unwrap();
        sender.ready().await?;
        sender.send_request(request).await
    }

    async fn connect(&mut self, plan: &Plan) -> Result<(), hyper::Error> {
        self.hang_up();
        let stream = TcpStream::connect(self.shared.address).await.expect("the gateway accepts connections");
        if plan.reset {
            stream.set_zero_linger().unwrap();
        }
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        self.connection.spawn(async move {
            // What breaks it is seen by the request on it.
            connection.await.unwrap_or_default();
        });
        self.kept = Some(sender);
        Ok(())
    }

    /// One of the shared HTTP/2 connections, made anew if it is broken. One in fifty is given up with all on it.
    async fn h2_sender(&self, plan: &Plan) -> Result<http2::SendRequest<Body>, hyper::Error> {
        let hash = xxh3_64(&plan.body());
        let slot = usize::try_from(hash).unwrap_or(0) % self.shared.h2.len();
        let slot = &self.shared.h2[slot];
        let present = slot.lock().unwrap().clone().filter(|sender| !sender.is_closed());
        if let Some(sender) = present
            && !hash.is_multiple_of(50)
        {
            return Ok(sender);
        }
        let stream = TcpStream::connect(self.shared.address).await.expect("the gateway accepts connections");
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        self.shared.tasks.lock().unwrap().spawn(async move { connection.await.unwrap_or_default() });
        *slot.lock().unwrap() = Some(sender.clone());
        Ok(sender)
    }
}

/// The body as it is sent: whole, or a part of it and then nothing more.
fn upload(plan: &Plan, body: &[u8]) -> Body {
    let frame = |bytes: &[u8]| Ok(Frame::data(Bytes::copy_from_slice(bytes)));
    if plan.leave == Leave::InUpload {
        let part = frame(&body[..body.len() / 2]);
        return StreamBody::new(stream::iter([part]).chain(stream::pending()).boxed());
    }
    StreamBody::new(stream::iter([frame(body)]).boxed())
}

/// Reads a stream to where the plan leaves it.
async fn read_stream(response: Response<Incoming>, plan: &Plan, left: Outcome, shares: bool) -> Outcome {
    let mut body = response.into_body();
    let (mut splitter, mut checker) = (Splitter::default(), plan.checker());
    let (mut text, mut finish, mut usage, mut events, mut done) = (String::new(), None, None, 0, false);
    loop {
        let frame = match body.frame().await {
            Some(Ok(frame)) => frame,
            Some(Err(_)) if shares => return Outcome::Lost,
            Some(Err(e)) => return wrong("a stream was cut", e),
            None => break,
        };
        let Some(data) = frame.data_ref() else { continue };
        if plan.leave == Leave::InsideAnEvent {
            // A read that ends inside an event leaves the rest of it unread in the socket.
            return left;
        }
        if splitter.push(data).is_err() {
            return Outcome::Wrong("an endless event".into());
        }
        while let Some(event) = splitter.next_event() {
            if done {
                return wrong("an event after the last", String::from_utf8_lossy(event));
            }
            events += 1;
            match parse(event) {
                Event::Delta { content, finish_reason } => {
                    text.clear();
                    if unescape(content, &mut text).is_none() {
                        return wrong("broken JSON", String::from_utf8_lossy(event));
                    }
                    if let Err(e) = checker.text(&text) {
                        return wrong("a wrong token", e);
                    }
                    finish = finish_reason.map(|f| String::from_utf8_lossy(f).into_owned()).or(finish);
                }
                Event::Usage { prompt_tokens, completion_tokens } => {
                    usage = Some((prompt_tokens, completion_tokens));
                }
                Event::Done => done = true,
                Event::Error(_) => return Outcome::Broken,
                Event::Comment => {}
                Event::Unknown => return wrong("an odd event", String::from_utf8_lossy(event)),
            }
            if plan.leave == Leave::AfterEvents(events) {
                return left;
            }
        }
    }
    match (done, finish.as_deref()) {
        (false, _) => Outcome::Wrong("a stream ended without [DONE] and without an error".into()),
        (true, Some("abort")) => Outcome::Aborted,
        (true, finish) => {
            checker.end(finish, usage).map_or_else(|e| wrong("not whole", e), |()| Outcome::Good)
        }
    }
}

fn check_unary(bytes: &[u8], plan: &Plan) -> Outcome {
    let Ok(body) = serde_json::from_slice::<Value>(bytes) else {
        return wrong("not JSON", String::from_utf8_lossy(bytes));
    };
    let choice = &body["choices"][0];
    if choice["finish_reason"] == "abort" {
        return Outcome::Aborted;
    }
    let mut checker = plan.checker();
    let usage = &body["usage"];
    let usage = usage["prompt_tokens"].as_u64().zip(usage["completion_tokens"].as_u64());
    let checked = checker
        .text(choice["message"]["content"].as_str().unwrap_or_default())
        .and_then(|()| checker.end(choice["finish_reason"].as_str(), usage));
    checked.map_or_else(|e| wrong("not whole", e), |()| Outcome::Good)
}

fn check_error(status: u16, bytes: &[u8]) -> Outcome {
    let body: Value = serde_json::from_slice(bytes).unwrap_or_default();
    let said = body["error"]["message"].as_str().is_some_and(|message| !message.is_empty());
    if said && status >= 500 {
        Outcome::Refused(status)
    } else {
        wrong("an odd error", (status, String::from_utf8_lossy(bytes)))
    }
}
