//! Why a request body was refused: always the client's to mend, always a 400.

use std::fmt;

use crate::openai::multipart::FormError;

/// What is wrong with a request body. `Display` is the sentence that the client gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ScanError {
    /// The body is not UTF-8, which JSON must be.
    InvalidUtf8 {
        /// Where the first bad byte is, from the start of the body.
        offset: usize,
    },
    /// The body breaks JSON's grammar.
    NotJson {
        /// Where, in bytes from the start of the body.
        offset: usize,
        /// What the grammar allows there, in words.
        expected: &'static str,
        /// The byte that is there; `None` at the end of the body.
        found: Option<u8>,
    },
    /// The body is JSON, but not an object.
    NotAnObject,
    /// Arrays and objects are nested deeper than allowed.
    TooDeep {
        /// Levels allowed.
        limit: usize,
    },
    /// There is no `model` at the top level.
    MissingModel,
    /// There is no `model` in a URL that must name one.
    MissingModelInUrl,
    /// There is no `model` among the fields of a form.
    MissingModelInForm,
    /// The body is not the form that its content type announces.
    NotAForm(FormError),
    /// `model` is there and is not a string.
    ModelNotString,
    /// `model` is longer than any name we serve may be.
    ModelNameTooLong {
        /// Bytes allowed.
        limit: usize,
    },
    /// A key that we act on is there twice: we and the engine might each believe another one.
    DuplicateKey(&'static str),
    /// A value that we act on has the wrong type.
    WrongType {
        /// The key.
        field: &'static str,
        /// What its value may be, in words.
        expected: &'static str,
    },
}

impl ScanError {
    /// The OpenAI error's `param`: the field to mend, where it is one.
    #[must_use]
    pub const fn param(&self) -> Option<&'static str> {
        match self {
            Self::MissingModel
            | Self::MissingModelInUrl
            | Self::MissingModelInForm
            | Self::ModelNotString
            | Self::ModelNameTooLong { .. } => Some("model"),
            Self::DuplicateKey(field) | Self::WrongType { field, .. } => Some(field),
            Self::InvalidUtf8 { .. }
            | Self::NotJson { .. }
            | Self::NotAnObject
            | Self::NotAForm(_)
            | Self::TooDeep { .. } => None,
        }
    }

    /// The OpenAI error's `code`, and the metric's label: one of a fixed set.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::InvalidUtf8 { .. } => "invalid_utf8",
            Self::NotJson { .. } => "invalid_json",
            Self::NotAnObject => "not_an_object",
            Self::TooDeep { .. } => "nested_too_deep",
            Self::MissingModel | Self::MissingModelInUrl | Self::MissingModelInForm => "missing_model",
            Self::NotAForm(_) => "invalid_form",
            Self::ModelNotString => "invalid_model",
            Self::ModelNameTooLong { .. } => "model_name_too_long",
            Self::DuplicateKey(_) => "duplicate_key",
            Self::WrongType { .. } => "invalid_type",
        }
    }
}

impl fmt::Display for ScanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InvalidUtf8 { offset } => {
                write!(f, "The request body is not valid UTF-8 at byte {offset}; JSON must be UTF-8.")
            }
            Self::NotJson { offset, expected, found: None } => {
                write!(
                    f,
                    "The request body is not valid JSON: it ends at byte {offset}, where {expected} was expected."
                )
            }
            Self::NotJson { offset, expected, found: Some(byte) } => {
                write!(
                    f,
                    "The request body is not valid JSON: expected {expected} at byte {offset}, found "
                )?;
                match byte {
                    b' '..=b'~' => write!(f, "'{}'.", char::from(*byte)),
                    _ => write!(f, "byte 0x{byte:02x}."),
                }
            }
            Self::NotAnObject => {
                f.write_str("The request body must be a JSON object, such as {\"model\": \"...\"}.")
            }
            Self::TooDeep { limit } => {
                write!(f, "The request body nests arrays and objects deeper than {limit} levels.")
            }
            Self::MissingModel => f.write_str("The request body has no \"model\"; name the model to use."),
            Self::MissingModelInUrl => {
                f.write_str("The URL names no model; add it as a parameter: ?model=NAME.")
            }
            Self::MissingModelInForm => {
                f.write_str("The form has no field \"model\"; name the model to use.")
            }
            Self::NotAForm(error) => write!(f, "The request body is not valid multipart/form-data: {error}."),
            Self::ModelNotString => f.write_str("\"model\" must be a string."),
            Self::ModelNameTooLong { limit } => write!(f, "\"model\" is longer than {limit} bytes."),
            Self::DuplicateKey(field) => {
                write!(f, "\"{field}\" is given more than once; give it once.")
            }
            Self::WrongType { field, expected } => write!(f, "\"{field}\" must be {expected}."),
        }
    }
}

impl std::error::Error for ScanError {}
