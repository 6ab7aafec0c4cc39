//! The questions put to an engine: `GET /health`, one token, its counters.
//!
//! Each goes over a connection of its own, closed after the answer. A probe is to say whether a new request could get
//! through, and the first thing that such a request may need is a connection; one from the pool proves only itself. Nor do
//! probes keep thousands of idle connections open, or take one that a request is about to use. The price is a handshake on
//! the fleet's own network every few seconds for endpoints that serve nothing.
//! Dropping a question closes its connection.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Method, StatusCode, header};
use penstock_config::proxy::HealthConfig;
use pingora_core::{
    connectors::{ConnectorOptions, http::Connector},
    protocols::http::client::HttpSession,
};
use pingora_error::{BError, Error, ErrorType};
use pingora_http::RequestHeader;
use serde_json::json;
use tokio::time::timeout;

use super::progress::{Canary, Counters};
use crate::endpoints::Endpoint;

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
pub struct Prober {
    connector: Connector,
    path: String,
    timeout: Duration,
    canary: Duration,
}

impl std::fmt::Debug for Prober {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prober").field("path", &self.path).finish_non_exhaustive()
    }
}

/// What an engine is asked.
struct Question {
    method: Method,
    path: String,
    body: Bytes,
    /// How much of the answer's body is wanted.
    most: usize,
}

impl Question {
    fn get(path: &str, most: usize) -> Self {
        Self { method: Method::GET, path: path.to_owned(), body: Bytes::new(), most }
    }
}

impl Prober {
    /// With the settings' path and patience.
    pub fn new(config: &HealthConfig) -> Self {
        Self {
            connector: Connector::new(Some(ConnectorOptions::new(1))),
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
        let question = Question {
            method: Method::POST,
            path: "/v1/completions".into(),
            body: body.to_string().into(),
            most: 0,
        };
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
    ) -> Result<(StatusCode, Bytes), BError> {
        let (session, _) = self.connector.get_http_session(&endpoint.peer).await?;
        connected();
        let HttpSession::H1(mut connection) = session else {
            return Error::e_explain(ErrorType::InvalidHTTPHeader, "not HTTP/1.1");
        };
        let mut head = RequestHeader::build(question.method, question.path.as_bytes(), Some(5))?;
        head.insert_header(header::HOST, &endpoint.address)?;
        head.insert_header(header::USER_AGENT, "penstock-health")?;
        head.insert_header(header::CONNECTION, "close")?;
        if !question.body.is_empty() {
            head.insert_header(header::CONTENT_TYPE, "application/json")?;
            head.insert_header(header::CONTENT_LENGTH, question.body.len())?;
        }
        connection.write_request_header(Box::new(head)).await?;
        connection.write_body(&question.body).await?;
        connection.finish_body().await?;
        let status = loop {
            connection.read_response().await?;
            match connection.get_status() {
                Some(status) if !status.is_informational() => break status,
                _ => {}
            }
        };
        let mut body = BytesMut::new();
        while body.len() < question.most {
            let Some(chunk) = connection.read_body_ref().await? else { break };
            body.extend_from_slice(chunk);
        }
        Ok((status, body.freeze()))
    }
}
