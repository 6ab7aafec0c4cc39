//! Refusals: `{"error":{"code","message","field"?}}`. The message is for the caller; what is internal goes to the log.

use axum::{
    Json,
    extract::rejection::BytesRejection,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::json;

use crate::{model::validate::FieldError, store::StoreError};

/// See the module's text.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    code: &'static str,
    field: Option<String>,
    message: String,
    retry_after_s: Option<u64>,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        // A new leader is found in about this time.
        let retry_after_s = (status == StatusCode::SERVICE_UNAVAILABLE).then_some(2);
        Self { status, code, field: None, message: message.into(), retry_after_s }
    }

    /// The same, about a field, a query parameter or a header.
    pub(super) fn of(self, field: impl Into<String>) -> Self {
        Self { field: Some(field.into()), ..self }
    }

    /// The same, to be tried again in so many seconds.
    pub(super) fn after(self, seconds: u64) -> Self {
        Self { retry_after_s: Some(seconds), ..self }
    }

    /// What is stored of `what` cannot be read or written.
    pub(super) fn unreadable(what: &str, error: &serde_json::Error) -> Self {
        tracing::error!(%error, what, "what is stored cannot be read or written");
        let message = format!("what is stored of the {what} cannot be read; the log says why");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }

    /// A request with this Idempotency-Key was begun, and how it ended is not known.
    pub(super) fn begun() -> Self {
        let message = "a request with this Idempotency-Key has made its change, or is making it, and its answer is not \
                       known (yet): read what it was to change, and use another key for another change";
        Self::new(StatusCode::CONFLICT, "idempotency_unknown", message)
    }

    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    pub(super) fn conflict() -> Self {
        let message = "others changed the same thing over and over at this moment; try again";
        Self::new(StatusCode::CONFLICT, "conflict", message)
    }
}

impl From<FieldError> for ApiError {
    fn from(error: FieldError) -> Self {
        let field = Some(error.field).filter(|field| !field.is_empty());
        Self { field, ..Self::new(StatusCode::BAD_REQUEST, "invalid_field", error.message) }
    }
}

impl From<BytesRejection> for ApiError {
    fn from(rejection: BytesRejection) -> Self {
        match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => {
                let message = "the body is larger than is accepted (limits.max_body_bytes)";
                Self::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
            }
            _ => {
                let message = "the body could not be read to its end";
                Self::new(StatusCode::BAD_REQUEST, "invalid_body", message)
            }
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        if let StoreError::NotLeading(_) = error {
            let message = format!("{error}; nothing was changed, try again in a moment");
            return Self::new(StatusCode::SERVICE_UNAVAILABLE, "not_leading", message);
        }
        tracing::error!(%error, "a request could not be served");
        if let StoreError::Denied(_) | StoreError::Rewound(_) | StoreError::Invalid(_) = error {
            return Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "store_refuses",
                format!("{error}; nothing was changed"),
            );
        }
        if let StoreError::NoQuorum(_) = error {
            let message =
                "the store has no quorum; whether the change took place is unknown: read it, then try again";
            return Self::new(StatusCode::SERVICE_UNAVAILABLE, "store_no_quorum", message);
        }
        let message =
            "the store is not available; whether the change took place is unknown: read it, then try again";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "store_unavailable", message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut error = json!({ "code": self.code, "message": self.message });
        if let Some(field) = self.field {
            error["field"] = field.into();
        }
        let mut response = (self.status, Json(json!({ "error": error }))).into_response();
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
