//! The questions put to an engine: `GET /health`, one token, its counters.
//!
//! Each goes over a connection of its own, closed after the answer. A probe is to say whether a new request could get
//! through, and the first thing that such a request may need is a connection; one from the pool proves only itself. Nor do
//! probes keep thousands of idle connections open, or take one that a request is about to use. The price is a handshake on
//! the fleet's own network every few seconds for endpoints that serve nothing.
//! Dropping a question closes its connection.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use penstock_config::proxy::{HealthConfig, UpstreamConfig};
use serde_json::json;
use tokio::time::timeout;

use super::progress::{Canary, Counters};
use crate::{
    endpoints::Endpoint,
    upstream::connection::{BodyError, Connection, HeadError},
};

/// Of an engine's metrics, in bytes: what comes behind is not looked at.
const MOST_METRICS: usize = 4 << 20;

/// What became of a probe; a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probed {
    /// An answer below 500.
    Passed,
    /// No connection, or an answer of 500 and more.
    Failed,
    /// Nothing in time.
    TimedOut,
}

impl Probed {
    /// Every result, for metrics that exist at zero.
    pub const ALL: [Self; 3] = [Self::Passed, Self::Failed, Self::TimedOut];

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
        }
    }
}

/// Who asks.
#[derive(Debug)]
pub struct Prober {
    connect: Duration,
    path: String,
    timeout: Duration,
    canary: Duration,
}

/// Why there is no answer: nobody needs to know more.
struct Unanswered;

impl From<std::io::Error> for Unanswered {
    fn from(_: std::io::Error) -> Self {
        Self
    }
}

impl From<HeadError> for Unanswered {
    fn from(_: HeadError) -> Self {
        Self
    }
}

impl From<BodyError> for Unanswered {
    fn from(_: BodyError) -> Self {
        Self
    }
}

/// What an engine is asked.
struct Question {
    path: String,
    /// Empty for a `GET`.
    body: Bytes,
    /// How much of the answer's body is wanted.
    most: usize,
}

impl Question {
    fn get(path: &str, most: usize) -> Self {
        Self { path: path.to_owned(), body: Bytes::new(), most }
    }
}

impl Question {
    fn head(&self, host: &str) -> String {
        let (method, body) = match self.body.len() {
            0 => ("GET", String::new()),
            length => ("POST", format!("content-type: application/json\r\ncontent-length: {length}\r\n")),
        };
        let path = &self.path;
        format!(
            "{method} {path} HTTP/1.1\r\nhost: {host}\r\nuser-agent: penstock-health\r\nconnection: close\r\n{body}\r\n"
        )
    }
}

impl Prober {
    /// With the settings' path and patience.
    pub fn new(config: &HealthConfig, upstream: &UpstreamConfig) -> Self {
        Self {
            connect: Duration::from_millis(upstream.connect_ms),
            path: config.probe_path.clone(),
            timeout: Duration::from_millis(config.probe_timeout_ms),
            canary: Duration::from_millis(config.canary_ms),
        }
    }

    /// Whether the engine answers. An answer of 4xx passes: somebody is there, and knows HTTP; whether the path is right is
    /// not a matter of its health.
    /// `connected` is called when it has accepted the connection.
    pub async fn health(&self, endpoint: &Endpoint, connected: impl FnOnce()) -> Probed {
        match timeout(self.timeout, self.ask(endpoint, Question::get(&self.path, 0), connected)).await {
            Ok(Ok((status, _))) if !status.is_server_error() => Probed::Passed,
            Ok(_) => Probed::Failed,
            Err(_) => Probed::TimedOut,
        }
    }

    /// Asks for one token of `model`, by the name that the engine knows.
    pub async fn token(&self, endpoint: &Endpoint, model: &str) -> Canary {
        let body = json!({"model": model, "prompt": "1", "max_tokens": 1, "temperature": 0});
        let question = Question { path: "/v1/completions".into(), body: body.to_string().into(), most: 0 };
        match timeout(self.canary, self.ask(endpoint, question, || ())).await {
            Ok(Ok((status, _))) if status.is_success() => Canary::Answered,
            Ok(Ok(_)) => Canary::Refused,
            Ok(Err(_)) => Canary::Unreached,
            Err(_) => Canary::Silent,
        }
    }

    /// The engine's counters of work, if it shows any.
    pub async fn counters(&self, endpoint: &Endpoint) -> Option<Counters> {
        let asked = self.ask(endpoint, Question::get("/metrics", MOST_METRICS), || ());
        let (status, text) = timeout(self.timeout, asked).await.ok()?.ok()?;
        status.is_success().then(|| Counters::parse(&String::from_utf8_lossy(&text)))?
    }

    async fn ask(
        &self,
        endpoint: &Endpoint,
        question: Question,
        connected: impl FnOnce(),
    ) -> Result<(StatusCode, Bytes), Unanswered> {
        let mut connection = Connection::connect(endpoint.resolved, self.connect).await?;
        connected();
        connection.send(question.head(&endpoint.address).as_bytes(), &question.body).await?;
        let status = connection.read_head(|head| Ok(head.status)).await?;
        let mut body = BytesMut::new();
        while body.len() < question.most {
            let Some(more) = connection.read_body().await? else { break };
            body.extend_from_slice(&more);
        }
        Ok((status, body.freeze()))
    }
}
