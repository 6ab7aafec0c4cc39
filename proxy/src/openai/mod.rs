//! The dialects we speak: OpenAI's HTTP API as vLLM serves it, and Anthropic's messages beside it.
//!
//! - [`mod@route`]: method and path → what the gateway does with it. Everything not named there is refused, so that an
//!   engine's admin paths (`/sleep`, `/pause`, `/metrics` ...) can never be reached through the proxy.
//! - [`request`]: the facts we need from a JSON body, found in one pass; the body itself stays as it came.
//! - [`multipart`]: the same for the forms of `/v1/audio`; [`query`]: for the URL of `/v1/realtime`.
//! - [`event`]: server-sent events out of a byte stream, whole, whatever the chunk boundaries.
//! - [`usage`]: what those events say about the stream's end: finish reason, tokens, in-band errors.
//! - [`span`]: where a value stands in a JSON text, to change it and nothing else.
//! - [`error_body`]: an engine's error, in whatever shape it came, in the shape of the API.
//!
//! Why not typed requests: an engine accepts fields we have never heard of, and a body parsed and written again is a
//! different body. We read the few values we act on and splice single values in place.
//!
//! Invariants: every module here is pure (bytes in, facts out; no clock, no I/O), and nothing panics on any input.

pub mod error_body;
pub mod event;
pub mod multipart;
pub mod query;
pub mod request;
pub mod route;
pub mod span;
pub mod usage;

pub use self::route::{Route, route};

/// One inference API. The names are bounded, so they may label metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Api {
    /// `/v1/chat/completions`
    ChatCompletions,
    /// vLLM's `/v1/chat/completions/batch`
    ChatBatch,
    /// `/v1/completions`
    Completions,
    /// `/v1/responses`
    Responses,
    /// `/v1/embeddings`, Cohere's `/v2/embed`
    Embeddings,
    /// `/v1/rerank`, `/rerank`, `/v2/rerank`
    Rerank,
    /// `/v1/score`, `/score`
    Score,
    /// vLLM's `/generative_scoring`
    GenerativeScoring,
    /// vLLM's `/pooling`
    Pooling,
    /// vLLM's `/classify`
    Classify,
    /// `/v1/audio/transcriptions`
    Transcriptions,
    /// `/v1/audio/translations`
    Translations,
    /// `/v1/audio/speech`
    Speech,
    /// The WebSocket `/v1/realtime`
    Realtime,
    /// Anthropic's `/v1/messages`
    Messages,
    /// Anthropic's `/v1/messages/count_tokens`
    CountTokens,
    /// vLLM's `/tokenize`
    Tokenize,
    /// vLLM's `/detokenize`
    Detokenize,
}

/// How a request says what it wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Media {
    /// A JSON object in the body.
    Json,
    /// A form with a file: `multipart/form-data`.
    Form,
}

impl Media {
    /// The content type that says so.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Form => "multipart/form-data",
        }
    }
}

impl Api {
    /// Every API, for metrics that start at zero.
    pub const ALL: [Self; 18] = [
        Self::ChatCompletions,
        Self::ChatBatch,
        Self::Completions,
        Self::Responses,
        Self::Embeddings,
        Self::Rerank,
        Self::Score,
        Self::GenerativeScoring,
        Self::Pooling,
        Self::Classify,
        Self::Transcriptions,
        Self::Translations,
        Self::Speech,
        Self::Realtime,
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
            Self::ChatBatch => "chat_batch",
            Self::Completions => "completions",
            Self::Responses => "responses",
            Self::Embeddings => "embeddings",
            Self::Rerank => "rerank",
            Self::Score => "score",
            Self::GenerativeScoring => "generative_scoring",
            Self::Pooling => "pooling",
            Self::Classify => "classify",
            Self::Transcriptions => "transcriptions",
            Self::Translations => "translations",
            Self::Speech => "speech",
            Self::Realtime => "realtime",
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
            Self::Responses => ErrorShape::Responses,
            _ => ErrorShape::OpenAi,
        }
    }

    /// How its requests say what they want.
    #[must_use]
    pub const fn media(self) -> Media {
        match self {
            Self::Transcriptions | Self::Translations => Media::Form,
            _ => Media::Json,
        }
    }

    /// Whether an answer with status 200 is JSON, or events where a stream was asked for, and nothing else. Pooling may
    /// answer in bytes, transcriptions in plain text, and speech is sound.
    #[must_use]
    pub const fn answers_json(self) -> bool {
        !matches!(
            self,
            Self::Pooling | Self::Embeddings | Self::Transcriptions | Self::Translations | Self::Speech
        )
    }
}

/// How an error body is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorShape {
    /// `{"error":{"message","type","param","code"}}`
    OpenAi,
    /// `{"type":"error","error":{"type","message"}}`
    Anthropic,
    /// As OpenAI's; inside a stream an event named `error`: `{"type":"error","code","message","param"}`.
    Responses,
}
