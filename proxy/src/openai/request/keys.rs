//! What a top-level key means to us.

/// The longest key that can be removed, in decoded bytes.
pub const MAX_REMOVED_KEY_BYTES: usize = 64;

/// Whether the gateway itself acts on a top-level `key`, which therefore cannot be removed.
#[must_use]
pub fn is_acted_on(key: &str) -> bool {
    Key::named(key.as_bytes()) != Key::Other
}

/// The top-level keys that we act on, each at most once in a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Field {
    Model,
    Stream,
    StreamOptions,
    MaxTokens,
    MaxCompletionTokens,
    MaxOutputTokens,
    N,
    User,
    ReturnTokenIds,
    Echo,
}

impl Field {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Stream => "stream",
            Self::StreamOptions => "stream_options",
            Self::MaxTokens => "max_tokens",
            Self::MaxCompletionTokens => "max_completion_tokens",
            Self::MaxOutputTokens => "max_output_tokens",
            Self::N => "n",
            Self::User => "user",
            Self::ReturnTokenIds => "return_token_ids",
            Self::Echo => "echo",
        }
    }
}

/// What a top-level key means to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key {
    Field(Field),
    Prompt {
        text: bool,
        token_ids: bool,
    },
    /// To be cut out.
    Removed,
    Other,
}

impl Key {
    /// The longest key that is looked at, every byte written as a `\u` escape.
    pub(super) const MAX_RAW_LEN: usize = 6 * MAX_REMOVED_KEY_BYTES;

    /// The meaning of a decoded key; `remove` says which of the others are to be cut out.
    pub(super) fn of(name: &[u8], remove: &[String]) -> Self {
        match Self::named(name) {
            Self::Other if remove.iter().any(|key| key.as_bytes() == name) => Self::Removed,
            key => key,
        }
    }

    fn named(name: &[u8]) -> Self {
        match name {
            b"model" => Self::Field(Field::Model),
            b"stream" => Self::Field(Field::Stream),
            b"stream_options" => Self::Field(Field::StreamOptions),
            b"max_tokens" => Self::Field(Field::MaxTokens),
            b"max_completion_tokens" => Self::Field(Field::MaxCompletionTokens),
            b"max_output_tokens" => Self::Field(Field::MaxOutputTokens),
            b"n" => Self::Field(Field::N),
            b"user" => Self::Field(Field::User),
            b"return_token_ids" => Self::Field(Field::ReturnTokenIds),
            b"echo" => Self::Field(Field::Echo),
            b"prompt" | b"input" => Self::Prompt { text: true, token_ids: true },
            b"tokens" => Self::Prompt { text: false, token_ids: true },
            b"messages" | b"system" | b"instructions" | b"tools" | b"query" | b"documents" | b"text_1"
            | b"text_2" => Self::Prompt { text: true, token_ids: false },
            _ => Self::Other,
        }
    }
}
