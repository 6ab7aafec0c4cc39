//! Errors as vLLM says them: the status, the type, the parameter, and the two shapes (OpenAI's and Anthropic's).

use serde_json::json;

/// An error for the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{status} {kind}: {message}")]
pub(super) struct ApiError {
    /// HTTP status; also `code` in the body.
    pub status: u16,
    /// vLLM's `type`.
    pub kind: &'static str,
    /// For a human.
    pub message: String,
    /// The offending parameter.
    pub param: Option<String>,
}

impl ApiError {
    /// A value that is wrong: 400 `BadRequestError`.
    pub(super) fn bad(param: &str, message: impl Into<String>) -> Self {
        let param = (!param.is_empty()).then(|| param.to_string());
        Self { status: 400, kind: "BadRequestError", message: message.into(), param }
    }

    /// A body that does not validate: 400 `Bad Request`, in the words of the validation library.
    pub(super) fn invalid(kind: &str, location: &str, message: &str) -> Self {
        let loc =
            if location.is_empty() { "('body',)".to_string() } else { format!("('body', '{location}')") };
        Self {
            status: 400,
            kind: "Bad Request",
            message: format!("1 validation error:\n  {{'type': '{kind}', 'loc': {loc}, 'msg': '{message}'}}"),
            param: (!location.is_empty()).then(|| format!("body.{location}")),
        }
    }

    /// Something that does not exist: 404.
    pub(super) fn not_found(param: &str, message: impl Into<String>) -> Self {
        Self { status: 404, kind: "NotFoundError", message: message.into(), param: Some(param.into()) }
    }

    /// The queue is full.
    pub(super) fn busy() -> Self {
        Self {
            status: 503,
            kind: "Service Unavailable",
            message:
                "The engine is currently busy and cannot accept new requests. Please try again later or on a \
                      different instance."
                    .into(),
            param: None,
        }
    }

    /// The EngineCore is gone, or a fault plays that.
    pub(super) fn engine_dead() -> Self {
        Self::internal("EngineCore encountered an issue. See stack trace (above) for the root cause.")
    }

    /// A request during a drain.
    pub(super) fn shutting_down() -> Self {
        Self::internal("cannot schedule new futures after shutdown")
    }

    /// 500.
    pub(super) fn internal(message: &str) -> Self {
        Self { status: 500, kind: "InternalServerError", message: message.into(), param: None }
    }

    /// The error of a status chosen by a fault.
    pub(super) fn of_status(status: u16) -> Self {
        let kind = match status {
            400 => "BadRequestError",
            404 => "NotFoundError",
            422 => "UnprocessableEntityError",
            501 => "NotImplementedError",
            503 => "ServiceUnavailableError",
            500..=599 => "InternalServerError",
            _ => "Bad Request",
        };
        Self { status, kind, message: format!("Injected fault: status {status}"), param: None }
    }

    /// OpenAI's shape, with vLLM's integer code.
    pub(super) fn openai_body(&self) -> String {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}}).to_string()
    }

    /// Anthropic's shape, as vLLM fills it.
    pub(super) fn anthropic_body(&self) -> String {
        json!({"type": "error", "error": {"type": self.kind, "message": self.message}}).to_string()
    }

    /// The in-band form: vLLM writes this one with spaces.
    pub(super) fn in_band(&self) -> String {
        let text = |s: &str| serde_json::Value::from(s).to_string();
        let param = self.param.as_deref().map_or_else(|| "null".into(), text);
        format!(
            "{{\"error\": {{\"message\": {}, \"type\": {}, \"param\": {param}, \"code\": {}}}}}",
            text(&self.message),
            text(self.kind),
            self.status
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_are_those_of_vllm() {
        assert_eq!(
            ApiError::busy().openai_body(),
            "{\"error\":{\"message\":\"The engine is currently busy and cannot accept new requests. Please try again \
             later or on a different instance.\",\"type\":\"Service Unavailable\",\"param\":null,\"code\":503}}"
        );
        assert_eq!(
            ApiError::engine_dead().in_band(),
            "{\"error\": {\"message\": \"EngineCore encountered an issue. See stack trace (above) for the root \
             cause.\", \"type\": \"InternalServerError\", \"param\": null, \"code\": 500}}"
        );
        assert_eq!(
            ApiError::invalid("missing", "messages", "Field required").param.as_deref(),
            Some("body.messages")
        );
    }
}
