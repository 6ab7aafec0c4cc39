//! Every way a request can fail at the gateway: whose fault, what the client is told, under which label it is counted.
//!
//! One closed enum, rendered here and nowhere else. The text for the client never contains an address, a model that was
//! not asked for, or an inner error; those go to the log. The shape is the API's own: OpenAI's
//! `{"error":{message,type,param,code}}`, Anthropic's `{"type":"error","error":{type,message}}` on its routes.

use serde_json::{Value, json};

use crate::{
    openai::{ErrorShape, request::ScanError},
    resume::Refusal,
};

/// Who caused a failure; a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blame {
    /// The client's request.
    Client,
    /// The engines behind us.
    Upstream,
    /// This gateway, or how much it is asked to carry.
    Gateway,
}

impl Blame {
    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Upstream => "upstream",
            Self::Gateway => "gateway",
        }
    }
}

/// What went wrong between us and an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpstreamFailure {
    /// No connection: the request was never sent.
    Connect,
    /// A pooled connection turned out to be closed before any byte of the answer: not the engine's failure.
    StaleConnection,
    /// The engine's admission said it is full (503).
    Busy,
    /// The connection broke, or the engine answered 5xx, before a byte reached the client.
    BeforeFirstByte,
    /// No answer within `upstream.first_byte_ms`.
    FirstByteTimeout,
    /// The answer stopped for longer than `upstream.idle_ms`.
    IdleTimeout,
    /// The connection broke after bytes had reached the client.
    MidStream,
    /// What came was not HTTP, or not SSE where SSE was announced.
    Garbage,
}

impl UpstreamFailure {
    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::StaleConnection => "stale_connection",
            Self::Busy => "busy",
            Self::BeforeFirstByte => "before_first_byte",
            Self::FirstByteTimeout => "first_byte_timeout",
            Self::IdleTimeout => "idle_timeout",
            Self::MidStream => "mid_stream",
            Self::Garbage => "garbage",
        }
    }

    /// Every variant, for metrics that exist at zero.
    pub const ALL: [Self; 8] = [
        Self::Connect,
        Self::StaleConnection,
        Self::Busy,
        Self::BeforeFirstByte,
        Self::FirstByteTimeout,
        Self::IdleTimeout,
        Self::MidStream,
        Self::Garbage,
    ];
}

/// Why a request was not answered as asked.
#[derive(Debug, Clone, PartialEq)]
pub enum GatewayError {
    /// The request's head could not be parsed.
    MalformedHead,
    /// The head did not arrive whole within `limits.head_ms`.
    HeadTimeout,
    /// The head is larger than `limits.header_bytes`, or has too many fields.
    HeadTooLarge {
        /// The limit in bytes.
        limit: usize,
    },
    /// No such route.
    UnknownPath {
        /// As asked for.
        path: String,
    },
    /// The route exists, not with this method.
    MethodNotAllowed {
        /// What would be accepted; also the `Allow` header.
        allow: &'static str,
    },
    /// No `Authorization: Bearer`.
    MissingKey,
    /// A key we do not know.
    InvalidKey,
    /// The body is not announced as what the API takes.
    UnsupportedMediaType {
        /// As announced; empty if it was not.
        got: String,
        /// What the API takes.
        accepted: &'static str,
    },
    /// The body is compressed.
    UnsupportedEncoding {
        /// The `Content-Encoding`.
        got: String,
    },
    /// `/v1/realtime` without a WebSocket's handshake, or with a broken one.
    NotAWebSocket {
        /// What is missing, in words.
        problem: &'static str,
    },
    /// A response that some engine may keep: nobody knows which.
    StoredResponse,
    /// The body is larger than `limits.body_bytes`.
    BodyTooLarge {
        /// The limit in bytes.
        limit: usize,
    },
    /// The upload stopped.
    BodyTimeout,
    /// The body's framing was broken (bad chunk, bad length).
    BodyFraming,
    /// The body is not what the API takes.
    Body(ScanError),
    /// No deployment of that name.
    UnknownModel {
        /// As asked for.
        model: String,
    },
    /// The model is deployed, and no endpoint takes requests now.
    NoEndpoint {
        /// As asked for.
        model: String,
    },
    /// Nothing has been heard from a control plane yet and nothing was kept on disk.
    NotReady,
    /// Every engine of the model is at its limit, and waiting was no use.
    Saturated {
        /// When to come back.
        retry_after_s: u32,
    },
    /// The model sleeps; it was woken and was not ready while the request could be held.
    Asleep {
        /// How long it was.
        waited_ms: u64,
    },
    /// Too many bytes of other requests are held: `limits.buffered_bytes`.
    Overloaded,
    /// Engines failed, and no attempt is left.
    Upstream(UpstreamFailure),
    /// The engine was lost in the middle of its answer, and no other went on with it.
    Lost {
        /// How it was lost.
        failure: UpstreamFailure,
        /// Why no other went on.
        refusal: Refusal,
    },
    /// The gateway is stopping and the answer was cut at its deadline.
    Draining,
    /// The client left. Never rendered.
    ClientGone,
    /// The client stopped taking bytes. Never rendered.
    ClientStalled,
}

impl GatewayError {
    /// HTTP status; 499 (nginx's "client closed request") where no answer is sent.
    pub fn status(&self) -> u16 {
        match self {
            Self::MalformedHead | Self::BodyFraming | Self::Body(_) => 400,
            Self::MissingKey | Self::InvalidKey => 401,
            Self::UnknownPath { .. } | Self::UnknownModel { .. } => 404,
            Self::MethodNotAllowed { .. } => 405,
            Self::HeadTimeout | Self::BodyTimeout => 408,
            Self::BodyTooLarge { .. } => 413,
            Self::UnsupportedMediaType { .. } | Self::UnsupportedEncoding { .. } => 415,
            Self::NotAWebSocket { .. } => 426,
            Self::StoredResponse => 501,
            Self::HeadTooLarge { .. } => 431,
            Self::ClientGone | Self::ClientStalled => 499,
            Self::NoEndpoint { .. } | Self::Saturated { .. } | Self::Asleep { .. } => 503,
            Self::NotReady | Self::Overloaded | Self::Draining => 503,
            Self::Upstream(UpstreamFailure::Busy | UpstreamFailure::Connect) => 503,
            Self::Upstream(UpstreamFailure::FirstByteTimeout | UpstreamFailure::IdleTimeout) => 504,
            Self::Upstream(_) => 502,
            Self::Lost { failure, .. } => Self::Upstream(*failure).status(),
        }
    }

    /// Whose fault.
    pub fn blame(&self) -> Blame {
        match self {
            Self::NotReady | Self::Overloaded | Self::Draining => Blame::Gateway,
            Self::NoEndpoint { .. } | Self::Saturated { .. } | Self::Asleep { .. } => Blame::Upstream,
            Self::Upstream(_) | Self::Lost { .. } => Blame::Upstream,
            _ => Blame::Client,
        }
    }

    /// `Retry-After` in seconds, where waiting can help.
    pub fn retry_after_s(&self) -> Option<u32> {
        match self {
            Self::NoEndpoint { .. } | Self::NotReady | Self::Asleep { .. } => Some(5),
            Self::Saturated { retry_after_s } => Some(*retry_after_s),
            Self::Overloaded | Self::Upstream(UpstreamFailure::Busy | UpstreamFailure::Connect) => Some(1),
            Self::Draining => Some(1),
            _ => None,
        }
    }

    /// The stable name: OpenAI's `error.code`, the log's and the metrics' label.
    pub fn code(&self) -> &'static str {
        match self {
            Self::MalformedHead => "malformed_request",
            Self::HeadTimeout => "headers_timeout",
            Self::HeadTooLarge { .. } => "headers_too_large",
            Self::UnknownPath { .. } => "unknown_url",
            Self::MethodNotAllowed { .. } => "method_not_allowed",
            Self::MissingKey => "missing_api_key",
            Self::InvalidKey => "invalid_api_key",
            Self::UnsupportedMediaType { .. } => "unsupported_media_type",
            Self::UnsupportedEncoding { .. } => "unsupported_content_encoding",
            Self::NotAWebSocket { .. } => "websocket_required",
            Self::StoredResponse => "stored_responses_not_supported",
            Self::BodyTooLarge { .. } => "request_too_large",
            Self::BodyTimeout => "request_timeout",
            Self::BodyFraming => "malformed_body",
            Self::Body(e) => e.code(),
            Self::UnknownModel { .. } => "model_not_found",
            Self::NoEndpoint { .. } => "no_endpoint_available",
            Self::Asleep { .. } => "model_starting",
            Self::NotReady => "gateway_not_ready",
            Self::Overloaded => "gateway_overloaded",
            Self::Saturated { .. } | Self::Upstream(UpstreamFailure::Busy) => "engine_overloaded",
            Self::Upstream(UpstreamFailure::Connect) => "engine_unreachable",
            Self::Upstream(UpstreamFailure::FirstByteTimeout) => "engine_timeout",
            Self::Upstream(UpstreamFailure::IdleTimeout) => "engine_stalled",
            Self::Upstream(UpstreamFailure::MidStream) => "stream_interrupted",
            Self::Upstream(_) => "engine_failed",
            Self::Lost { failure, .. } => Self::Upstream(*failure).code(),
            Self::Draining => "gateway_draining",
            Self::ClientGone => "client_gone",
            Self::ClientStalled => "client_stalled",
        }
    }

    /// The sentence for the client: what is wrong and what to do.
    pub fn message(&self) -> String {
        match self {
            Self::MalformedHead => "The request could not be parsed as HTTP.".into(),
            Self::HeadTimeout => "The request's headers did not arrive in time.".into(),
            Self::HeadTooLarge { limit } => {
                format!("The request's headers are larger than the {limit} bytes accepted here.")
            }
            Self::UnknownPath { path } => format!("Unknown request URL: {path}. See /v1/models for a start."),
            Self::MethodNotAllowed { allow } => format!("This URL accepts {allow} only."),
            Self::MissingKey => {
                "No API key was provided. Send it as `Authorization: Bearer YOUR_KEY`.".into()
            }
            Self::InvalidKey => "The API key is not known here.".into(),
            Self::UnsupportedMediaType { got, accepted } if got.is_empty() => {
                format!("The request has no Content-Type; send `Content-Type: {accepted}`.")
            }
            Self::UnsupportedMediaType { got, accepted } => {
                format!("Content-Type {got:?} is not accepted; send `{accepted}`.")
            }
            Self::UnsupportedEncoding { got } => {
                format!("Content-Encoding {got:?} is not accepted; send the body uncompressed.")
            }
            Self::NotAWebSocket { problem } => {
                format!("This URL takes a WebSocket over HTTP/1.1 (wss:// or ws://): {problem}.")
            }
            Self::StoredResponse => "Stored responses cannot be fetched, cancelled or deleted here: they are kept by one engine \
                 of many, if at all. Send the conversation so far in `input`, and use `\"stream\": true` in place of \
                 `\"background\": true`."
                .into(),
            Self::BodyTooLarge { limit } => {
                format!("The request body is larger than the {limit} bytes accepted here.")
            }
            Self::BodyTimeout => "The request body stopped arriving; send it again.".into(),
            Self::BodyFraming => {
                "The request body's framing is broken: it cannot be told where it ends.".into()
            }
            Self::Body(e) => e.to_string(),
            Self::UnknownModel { model } => {
                format!("The model `{model}` does not exist. GET /v1/models lists those that do.")
            }
            Self::NoEndpoint { model } => {
                format!("No engine is ready to serve the model `{model}` now. Try again shortly.")
            }
            Self::Asleep { waited_ms } => {
                let waited_s = waited_ms / 1_000;
                format!("The model is being started and was not ready within {waited_s} s. Try again shortly.")
            }
            Self::NotReady => "The gateway has no routes yet. Try again shortly.".into(),
            Self::Overloaded => {
                "The gateway holds as many request bytes as it may. Try again shortly.".into()
            }
            Self::Saturated { .. } => Self::Upstream(UpstreamFailure::Busy).message(),
            Self::Upstream(failure) => match failure {
                UpstreamFailure::Busy => "Every engine of this model is at its limit. Try again shortly.",
                UpstreamFailure::Connect => "No engine of this model could be reached. Try again shortly.",
                UpstreamFailure::FirstByteTimeout => "The engine did not start to answer in time.",
                UpstreamFailure::IdleTimeout => "The engine stopped in the middle of its answer.",
                UpstreamFailure::MidStream => "The engine was lost in the middle of its answer.",
                UpstreamFailure::Garbage => "The engine's answer could not be understood.",
                UpstreamFailure::BeforeFirstByte | UpstreamFailure::StaleConnection => {
                    "The engine failed before it answered."
                }
            }
            .into(),
            Self::Lost { failure, refusal } => {
                let lost = Self::Upstream(*failure).message();
                format!("{lost} It could not be continued on another engine: {}.", refusal.reason())
            }
            Self::Draining => {
                "The gateway is stopping and could not wait for the rest of this answer.".into()
            }
            Self::ClientGone | Self::ClientStalled => "The client went away.".into(),
        }
    }

    /// OpenAI's `error.param`: the field at fault.
    fn param(&self) -> Option<&str> {
        match self {
            Self::Body(e) => e.param(),
            Self::UnknownModel { .. } => Some("model"),
            Self::Lost { refusal, .. } => refusal.param(),
            _ => None,
        }
    }

    /// The body of the answer, as JSON.
    pub fn body(&self, shape: ErrorShape) -> Value {
        match shape {
            ErrorShape::OpenAi | ErrorShape::Responses => json!({"error": {
                "message": self.message(),
                "type": openai_type(self.status()),
                "param": self.param(),
                "code": self.code(),
            }}),
            ErrorShape::Anthropic => json!({"type": "error", "error": {
                "type": anthropic_type(self.status()),
                "message": self.message(),
            }}),
        }
    }

    /// The same as the last event of a stream that has begun: never followed by `[DONE]`.
    pub fn event(&self, shape: ErrorShape) -> String {
        match shape {
            ErrorShape::OpenAi => format!("data: {}\n\n", self.body(shape)),
            ErrorShape::Anthropic => format!("event: error\ndata: {}\n\n", self.body(shape)),
            ErrorShape::Responses => {
                let event = json!({
                    "type": "error",
                    "code": self.code(),
                    "message": self.message(),
                    "param": self.param(),
                });
                format!("event: error\ndata: {event}\n\n")
            }
        }
    }
}

/// OpenAI's `error.type` for a status.
pub fn openai_type(status: u16) -> &'static str {
    match status {
        401 => "authentication_error",
        400..=499 => "invalid_request_error",
        501 => "not_supported_error",
        503 => "service_unavailable_error",
        504 => "timeout_error",
        _ => "upstream_error",
    }
}

/// Anthropic's `error.type` for a status (their documented list).
pub fn anthropic_type(status: u16) -> &'static str {
    match status {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        400..=499 => "invalid_request_error",
        503 | 529 => "overloaded_error",
        504 => "timeout_error",
        _ => "api_error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_model_is_openais_404() {
        let error = GatewayError::UnknownModel { model: "nope".into() };
        assert_eq!(error.status(), 404);
        let body = error.body(ErrorShape::OpenAi);
        assert_eq!(body["error"]["code"], "model_not_found");
        assert_eq!(body["error"]["param"], "model");
        assert_eq!(body["error"]["type"], "invalid_request_error");
    }

    #[test]
    fn anthropic_routes_get_anthropics_shape() {
        let body = GatewayError::NoEndpoint { model: "m".into() }.body(ErrorShape::Anthropic);
        assert_eq!(body["type"], "error");
        assert_eq!(body["error"]["type"], "overloaded_error");
    }

    #[test]
    fn an_error_event_is_one_event_and_no_done() {
        let event = GatewayError::Upstream(UpstreamFailure::MidStream).event(ErrorShape::OpenAi);
        assert!(event.starts_with("data: {\"error\""));
        assert!(event.ends_with("\n\n"));
        assert!(!event.contains("[DONE]"));
    }
}
