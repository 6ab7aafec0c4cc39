//! Refusals: `{"error":{"code","field","message"}}`. The message is for the caller; what is internal goes to the log.

use axum::{
    Json,
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
}

impl ApiError {
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, field: None, message: message.into() }
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
        Self { status: StatusCode::BAD_REQUEST, code: "invalid_field", field, message: error.message }
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
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            // A new leader is found in about this time.
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("2"));
        }
        response
    }
}
