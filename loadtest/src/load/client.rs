//! One worker: one connection, one request at a time, everything checked.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpStream, task::JoinSet};

use super::{
    Options, Target,
    report::{ERROR_EVENT, Stats, note},
    shape::{Misshapen, Shape},
    sse::{self, Event, Splitter},
    verify::{Checker, Wrong},
};
use crate::engine::template::Message;

/// Longest example of an error body kept.
const MAX_EXAMPLE: usize = 300;

/// A failed request: its kind, for counting, and what happened.
struct Failure {
    kind: String,
    detail: String,
}

impl Failure {
    fn new(kind: &str, detail: impl ToString) -> Self {
        Self { kind: kind.into(), detail: detail.to_string() }
    }
}

impl From<Wrong> for Failure {
    fn from(wrong: Wrong) -> Self {
        Self::new(wrong.kind(), &wrong)
    }
}

impl From<Misshapen> for Failure {
    fn from(misshapen: Misshapen) -> Self {
        Self::new("misshapen stream", &misshapen)
    }
}

/// A worker.
pub(super) struct Worker {
    target: Target,
    options: Arc<Options>,
    index: u64,
    made: u64,
    stats: Arc<Mutex<Stats>>,
    sender: Option<http1::SendRequest<Full<Bytes>>>,
    /// The task that drives the connection; ends with it, or with the worker.
    connection: JoinSet<()>,
}

/// What a stream has said so far.
struct Progress {
    started: Instant,
    last: Option<Instant>,
    finish: Option<String>,
    usage: Option<(u64, u64)>,
    done: bool,
    text: String,
    shape: Shape,
    /// Ids must come, and are checked.
    ids: bool,
}

impl Worker {
    pub(super) fn new(target: Target, options: Arc<Options>, index: u64, stats: Arc<Mutex<Stats>>) -> Self {
        Self { target, options, index, made: 0, stats, sender: None, connection: JoinSet::new() }
    }

    /// Makes one request and counts it.
    pub(super) async fn request(&mut self) {
        self.made += 1;
        if let Err(failure) = self.try_request().await {
            self.sender = None;
            self.stats().fail(&failure.kind, &failure.detail);
        }
    }

    async fn try_request(&mut self) -> Result<(), Failure> {
        let messages = [Message::new("user", self.prompt())];
        let mut checker = Checker::chat(&messages, self.options.tokens);
        let body = self.body(&messages[0].content);
        let started = Instant::now();
        let response = self.send(body).await?;
        let status = response.status();
        if !status.is_success() {
            let body = self.collect(response).await.unwrap_or_default();
            let text = String::from_utf8_lossy(&body[..body.len().min(MAX_EXAMPLE)]).into_owned();
            return Err(Failure::new(&format!("status {}", status.as_u16()), text));
        }
        if self.options.unary {
            self.check_unary(response, &mut checker).await?;
        } else {
            self.check_stream(response, &mut checker, started).await?;
        }
        let mut stats = self.stats();
        stats.good += 1;
        stats.tokens += self.options.tokens;
        note(&mut stats.total_us, started.elapsed());
        Ok(())
    }

    fn prompt(&self) -> String {
        let (seed, index, made) = (self.options.seed, self.index, self.made);
        let mut text = format!("run {seed}, stream {index}, request {made}");
        if self.options.prompt_bytes > 0 {
            let padding = " The quick brown fox jumps over the lazy dog.";
            text.extend(padding.chars().cycle().take(self.options.prompt_bytes));
        }
        text
    }

    fn body(&self, content: &str) -> Bytes {
        let stream = !self.options.unary;
        let mut body = json!({
            "messages": [{"role": "user", "content": content}], "max_tokens": self.options.tokens, "ignore_eos": true,
            "stream": stream,
        });
        if stream {
            body["stream_options"] = json!({"include_usage": true});
        }
        if self.options.token_ids {
            body["return_token_ids"] = true.into();
        }
        body["model"] = self.options.model.as_str().into();
        Bytes::from(body.to_string())
    }

    async fn send(&mut self, body: Bytes) -> Result<Response<Incoming>, Failure> {
        let fresh = !matches!(&self.sender, Some(sender) if !sender.is_closed());
        if fresh {
            self.connect().await?;
        }
        let idle = self.idle();
        let Some(sender) = &mut self.sender else { return Err(Failure::new("connect", "no connection")) };
        let mut request = Request::post(format!("{}/v1/chat/completions", self.target.base))
            .header("host", &self.target.authority)
            .header("content-type", "application/json");
        if let Some(key) = &self.options.api_key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let request = request.body(Full::new(body)).map_err(|e| Failure::new("request", e))?;
        let sent = async {
            sender.ready().await?;
            sender.send_request(request).await
        };
        match tokio::time::timeout(idle, sent).await {
            Ok(response) => response.map_err(|e| Failure::new("send", e)),
            Err(_) => Err(Failure::new("timeout", "no response header")),
        }
    }

    async fn connect(&mut self) -> Result<(), Failure> {
        let stream =
            TcpStream::connect(&self.target.authority).await.map_err(|e| Failure::new("connect", e))?;
        stream.set_nodelay(true).map_err(|e| Failure::new("connect", e))?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|e| Failure::new("connect", e))?;
        self.connection.abort_all();
        self.connection.spawn(async move {
            // What breaks the connection is seen by the request on it.
            connection.await.unwrap_or_default();
        });
        self.sender = Some(sender);
        Ok(())
    }

    async fn collect(&self, response: Response<Incoming>) -> Result<Bytes, Failure> {
        let collected = tokio::time::timeout(self.idle(), response.into_body().collect()).await;
        let body = collected.map_err(|_| Failure::new("timeout", "no body"))?;
        Ok(body.map_err(|e| Failure::new("cut", e))?.to_bytes())
    }

    async fn check_unary(&self, response: Response<Incoming>, checker: &mut Checker) -> Result<(), Failure> {
        let bytes = self.collect(response).await?;
        self.stats().bytes += bytes.len() as u64;
        let body: Value = serde_json::from_slice(&bytes).map_err(|e| Failure::new("garbage", e))?;
        let choice = &body["choices"][0];
        let text = choice["message"]["content"].as_str().unwrap_or("");
        checker.text(text)?;
        if self.options.token_ids {
            checker.prompt_ids(&ids(&body["prompt_token_ids"]))?;
            checker.ids(&ids(&choice["token_ids"]))?;
            checker.end_of_ids()?;
        }
        let usage = &body["usage"];
        let usage = usage["prompt_tokens"].as_u64().zip(usage["completion_tokens"].as_u64());
        Ok(checker.end(choice["finish_reason"].as_str(), usage)?)
    }

    async fn check_stream(
        &self,
        response: Response<Incoming>,
        checker: &mut Checker,
        started: Instant,
    ) -> Result<(), Failure> {
        let mut body = response.into_body();
        let mut splitter = Splitter::default();
        let mut progress = Progress {
            started,
            last: None,
            finish: None,
            usage: None,
            done: false,
            text: String::new(),
            shape: Shape::default(),
            ids: self.options.token_ids,
        };
        loop {
            let frame = tokio::time::timeout(self.idle(), body.frame()).await;
            let frame = frame.map_err(|_| Failure::new("timeout", "no event"))?;
            let Some(frame) = frame else { break };
            let frame = frame.map_err(|e| Failure::new("cut", e))?;
            let Some(data) = frame.data_ref() else { continue };
            splitter.push(data).map_err(|_| Failure::new("garbage", "an endless event"))?;
            let mut stats = self.stats();
            stats.bytes += data.len() as u64;
            while let Some(event) = splitter.next_event() {
                progress.take(event, checker, &mut stats)?;
            }
        }
        if splitter.pending() > 0 || !progress.done {
            return Err(Failure::new("cut", "ended without [DONE]"));
        }
        if self.options.token_ids {
            checker.end_of_ids()?;
        }
        checker.end(progress.finish.as_deref(), progress.usage)?;
        Ok(progress.shape.end()?)
    }

    fn idle(&self) -> Duration {
        Duration::from_secs_f64(self.options.idle_timeout_s)
    }

    fn stats(&self) -> MutexGuard<'_, Stats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress {
    fn take(&mut self, event: &[u8], checker: &mut Checker, stats: &mut Stats) -> Result<(), Failure> {
        if self.done {
            return Err(Failure::new("garbage", "an event after [DONE]"));
        }
        match sse::parse(event) {
            Event::Delta { content, finish_reason } => {
                self.shape.take(event)?;
                if self.ids {
                    check_ids(event, checker)?;
                }
                if !content.is_empty() {
                    self.text.clear();
                    sse::unescape(content, &mut self.text)
                        .ok_or_else(|| Failure::new("garbage", lossy(event)))?;
                    checker.text(&self.text)?;
                    let now = Instant::now();
                    match self.last.replace(now) {
                        None => note(&mut stats.ttft_us, now - self.started),
                        Some(last) => note(&mut stats.gap_us, now - last),
                    }
                }
                if let Some(reason) = finish_reason {
                    self.finish = Some(String::from_utf8_lossy(reason).into_owned());
                }
            }
            Event::Usage { prompt_tokens, completion_tokens } => {
                self.shape.take(event)?;
                self.usage = Some((prompt_tokens, completion_tokens));
            }
            Event::Done => self.done = true,
            Event::Error(data) if sse::is_typed(data) => {
                return Err(Failure::new(ERROR_EVENT, lossy(data)));
            }
            Event::Error(data) => return Err(Failure::new("error without a type", lossy(data))),
            Event::Comment => {}
            Event::Unknown => return Err(Failure::new("garbage", lossy(event))),
        }
        Ok(())
    }
}

/// Checks the ids that an event tells.
fn check_ids(event: &[u8], checker: &mut Checker) -> Result<(), Failure> {
    if let Some(prompt) = sse::numbers_after(event, b"\"prompt_token_ids\":") {
        checker.prompt_ids(&prompt)?;
    }
    match sse::numbers_after(event, b"\"token_ids\":") {
        Some(ids) => Ok(checker.ids(&ids)?),
        None => Ok(()),
    }
}

/// A list of ids in a body.
fn ids(value: &Value) -> Vec<u32> {
    let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
    value.as_array().map(|ids| ids.iter().filter_map(id).collect()).unwrap_or_default()
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(MAX_EXAMPLE)]).into_owned()
}
