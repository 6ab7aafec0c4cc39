//! The dialects we speak: OpenAI's HTTP API as vLLM serves it, and Anthropic's messages beside it.
//!
//! - [`route`]: method and path → what the gateway does with it. Everything not named here is refused, so that an
//!   engine's admin paths (`/sleep`, `/pause`, `/metrics` ...) can never be reached through the proxy.
//! - [`request`]: the facts we need from a request body, found in one pass; the body itself stays as it came.
//! - [`event`]: server-sent events out of a byte stream, whole, whatever the chunk boundaries.
//! - [`usage`]: what those events say about the stream's end: finish reason, tokens, in-band errors.
//!
//! Why not typed requests: an engine accepts fields we have never heard of, and a body parsed and written again is a
//! different body. We read the few values we act on and splice single values in place.
//!
//! Invariants: every module here is pure (bytes in, facts out; no clock, no I/O), and nothing panics on any input.
//!
//! Paths match exactly: no trailing slash, no doubled slash, no percent-decoding of the fixed part, case counts. What
//! is sent upstream is the constant in [`Route::Inference`], never text that a client wrote.
//!
//! Deliberately absent: `GET /v1/responses/{id}` and its `cancel` (they need to know which engine holds the response),
//! multipart `/v1/audio/*`, and the WebSocket `/v1/realtime`: all 404.

pub mod event;
pub mod request;
pub mod usage;

use std::borrow::Cow;

use http::Method;

/// One inference API. The names are bounded, so they may label metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Api {
    /// `/v1/chat/completions`
    ChatCompletions,
    /// `/v1/completions`
    Completions,
    /// `/v1/responses`
    Responses,
    /// `/v1/embeddings`
    Embeddings,
    /// `/v1/rerank`, `/rerank`, `/v2/rerank`
    Rerank,
    /// `/v1/score`, `/score`
    Score,
    /// Anthropic's `/v1/messages`
    Messages,
    /// Anthropic's `/v1/messages/count_tokens`
    CountTokens,
    /// vLLM's `/tokenize`
    Tokenize,
    /// vLLM's `/detokenize`
    Detokenize,
}

impl Api {
    /// Every API, for metrics that start at zero.
    pub const ALL: [Self; 10] = [
        Self::ChatCompletions,
        Self::Completions,
        Self::Responses,
        Self::Embeddings,
        Self::Rerank,
        Self::Score,
        Self::Messages,
        Self::CountTokens,
        Self::Tokenize,
        Self::Detokenize,
    ];

    /// Name of the API in metrics and logs.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::ChatCompletions => "chat_completions",
            Self::Completions => "completions",
            Self::Responses => "responses",
            Self::Embeddings => "embeddings",
            Self::Rerank => "rerank",
            Self::Score => "score",
            Self::Messages => "messages",
            Self::CountTokens => "count_tokens",
            Self::Tokenize => "tokenize",
            Self::Detokenize => "detokenize",
        }
    }

    /// The shape in which this API's clients expect errors.
    #[must_use]
    pub const fn shape(self) -> ErrorShape {
        match self {
            Self::Messages | Self::CountTokens => ErrorShape::Anthropic,
            _ => ErrorShape::OpenAi,
        }
    }

    /// Whether `"stream": true` makes this API answer with server-sent events.
    #[must_use]
    pub const fn streams(self) -> bool {
        matches!(self, Self::ChatCompletions | Self::Completions | Self::Responses | Self::Messages)
    }
}

/// How an error body is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorShape {
    /// `{"error":{"message","type","param","code"}}`
    OpenAi,
    /// `{"type":"error","error":{"type","message"}}`
    Anthropic,
}

/// What the gateway does with a method and a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route<'a> {
    /// Forward to an engine of the model that the body names.
    Inference {
        /// Which API.
        api: Api,
        /// The path to ask the engine for.
        path: &'static str,
    },
    /// List what is served: `GET /v1/models`.
    Models,
    /// One served model: `GET /v1/models/{id}`.
    Model {
        /// The model's name, percent-decoded; may contain `/`.
        id: Cow<'a, str>,
    },
    /// The path exists, the method does not: 405 with `Allow`.
    MethodNotAllowed {
        /// The one method the path takes.
        allowed: &'static str,
        /// Shape of the error.
        shape: ErrorShape,
    },
    /// 404.
    NotFound {
        /// Shape of the error.
        shape: ErrorShape,
    },
}

impl Route<'_> {
    /// Name of the route in metrics and logs; one of a fixed set.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Inference { api, .. } => api.label(),
            Self::Models => "models",
            Self::Model { .. } => "model",
            Self::MethodNotAllowed { .. } => "method_not_allowed",
            Self::NotFound { .. } => "not_found",
        }
    }

    /// The shape in which errors of this route are written.
    #[must_use]
    pub const fn shape(&self) -> ErrorShape {
        match self {
            Self::Inference { api, .. } => api.shape(),
            Self::Models | Self::Model { .. } => ErrorShape::OpenAi,
            Self::MethodNotAllowed { shape, .. } | Self::NotFound { shape } => *shape,
        }
    }
}

/// The inference paths, each with its API. All of them take POST only.
const INFERENCE_PATHS: [(&str, Api); 13] = [
    ("/v1/chat/completions", Api::ChatCompletions),
    ("/v1/completions", Api::Completions),
    ("/v1/responses", Api::Responses),
    ("/v1/embeddings", Api::Embeddings),
    ("/v1/rerank", Api::Rerank),
    ("/rerank", Api::Rerank),
    ("/v2/rerank", Api::Rerank),
    ("/v1/score", Api::Score),
    ("/score", Api::Score),
    ("/v1/messages", Api::Messages),
    ("/v1/messages/count_tokens", Api::CountTokens),
    ("/tokenize", Api::Tokenize),
    ("/detokenize", Api::Detokenize),
];

/// Decides what a request line means. `path` comes without its query.
#[must_use]
pub fn route<'a>(method: &Method, path: &'a str) -> Route<'a> {
    if let Some(&(path, api)) = INFERENCE_PATHS.iter().find(|(known, _)| *known == path) {
        if method == Method::POST {
            return Route::Inference { api, path };
        }
        return Route::MethodNotAllowed { allowed: "POST", shape: api.shape() };
    }
    let model = if path == "/v1/models" {
        Some(Route::Models)
    } else {
        path.strip_prefix("/v1/models/").and_then(percent_decode).map(|id| Route::Model { id })
    };
    match model {
        Some(_) if method != Method::GET => {
            Route::MethodNotAllowed { allowed: "GET", shape: ErrorShape::OpenAi }
        }
        Some(route) => route,
        // Anthropic's clients parse only their own shape, also of a 404 below their prefix.
        None if path.starts_with("/v1/messages/") => Route::NotFound { shape: ErrorShape::Anthropic },
        None => Route::NotFound { shape: ErrorShape::OpenAi },
    }
}

/// `None` when nothing is left, or an escape is not two hex digits, or the result is not UTF-8.
fn percent_decode(text: &str) -> Option<Cow<'_, str>> {
    if text.is_empty() {
        return None;
    }
    if !text.contains('%') {
        return Some(Cow::Borrowed(text));
    }
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let (high, low) = (request::hex_digit(bytes.next()?)?, request::hex_digit(bytes.next()?)?);
        decoded.push(high << 4 | low);
    }
    String::from_utf8(decoded).ok().map(Cow::Owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_inference_path_takes_post_and_nothing_else() {
        for (path, api) in INFERENCE_PATHS {
            assert_eq!(route(&Method::POST, path), Route::Inference { api, path });
            for method in [Method::GET, Method::PUT, Method::DELETE, Method::OPTIONS, Method::HEAD] {
                assert_eq!(
                    route(&method, path),
                    Route::MethodNotAllowed { allowed: "POST", shape: api.shape() }
                );
            }
        }
    }

    #[test]
    fn every_api_has_a_path_and_a_label_of_its_own() {
        let mut labels: Vec<_> = Api::ALL.iter().map(|api| api.label()).collect();
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels.len(), Api::ALL.len());
        for api in Api::ALL {
            assert!(INFERENCE_PATHS.iter().any(|(_, other)| *other == api), "{api:?}");
        }
    }

    #[test]
    fn models_are_listed_and_named_models_may_contain_slashes() {
        let model = |id: &'static str| Route::Model { id: Cow::Borrowed(id) };
        assert_eq!(route(&Method::GET, "/v1/models"), Route::Models);
        assert_eq!(route(&Method::GET, "/v1/models/tiny"), model("tiny"));
        assert_eq!(route(&Method::GET, "/v1/models/org/tiny"), model("org/tiny"));
        assert_eq!(route(&Method::GET, "/v1/models/org%2Ftiny%20x"), model("org/tiny x"));
        assert_eq!(
            route(&Method::DELETE, "/v1/models/tiny"),
            Route::MethodNotAllowed { allowed: "GET", shape: ErrorShape::OpenAi }
        );
    }

    #[test]
    fn everything_else_is_not_found() {
        for path in [
            "",
            "/",
            "*",
            "/v1",
            "/v1/",
            "/v1/models/",
            "/v1/models/%zz",
            "/v1/models/%f",
            "/v1/models/%ff",
            "/v1/chat/completions/",
            "//v1/chat/completions",
            "/v1//chat/completions",
            "/V1/chat/completions",
            "/v1/chat%2Fcompletions",
            "/v1/chat/completions/../../sleep",
            "/v1/responses/resp_1",
            "/v1/responses/resp_1/cancel",
            "/v1/audio/transcriptions",
            "/v1/realtime",
            "/sleep",
            "/pause",
            "/metrics",
            "/health",
            "/v1/load_lora_adapter",
            "/inference/v1/generate",
        ] {
            for method in [Method::GET, Method::POST] {
                assert_eq!(
                    route(&method, path),
                    Route::NotFound { shape: ErrorShape::OpenAi },
                    "{method} {path}"
                );
            }
        }
    }

    #[test]
    fn anthropic_clients_get_their_own_shape_also_for_what_is_not_there() {
        assert_eq!(route(&Method::POST, "/v1/messages").shape(), ErrorShape::Anthropic);
        assert_eq!(route(&Method::GET, "/v1/messages").shape(), ErrorShape::Anthropic);
        assert_eq!(route(&Method::POST, "/v1/messages/batches").shape(), ErrorShape::Anthropic);
        assert_eq!(route(&Method::POST, "/v1/messages/batches").label(), "not_found");
    }
}
