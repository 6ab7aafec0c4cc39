//! Method and path → what the gateway does with it: the whole surface, in one table.
//!
//! Paths match exactly: no trailing slash, no doubled slash, no percent-decoding of the fixed part, case counts. What
//! is sent upstream is the constant in [`Route::Inference`], never text that a client wrote. What is not in the table does
//! not exist: an engine serves much beside inference (sleep, pause, adapters, metrics, SageMaker's `/invocations`, which
//! takes any request), most of it without a key.
//!
//! Deliberately absent: `/cohere/v2/chat` and the token-in, token-out API (`/inference/v1`, `/render`, `/derender`).

use std::borrow::Cow;

use http::Method;

use super::{Api, ErrorShape, query::percent_decode};

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
    /// Tunnel a WebSocket to an engine of the model that the query names: `GET /v1/realtime`.
    Realtime,
    /// List what is served: `GET /v1/models`.
    Models,
    /// One served model: `GET /v1/models/{id}`.
    Model {
        /// The model's name, percent-decoded; may contain `/`.
        id: Cow<'a, str>,
    },
    /// A response that an engine may keep: `/v1/responses/{id}` and below. Which engine, nobody knows: 501.
    StoredResponse,
    /// `OPTIONS`: what else the path takes.
    Options {
        /// The methods.
        allow: &'static str,
    },
    /// The path exists, the method does not: 405 with `Allow`.
    MethodNotAllowed {
        /// The methods that the path takes.
        allow: &'static str,
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
            Self::Realtime => Api::Realtime.label(),
            Self::Models => "models",
            Self::Model { .. } => "model",
            Self::StoredResponse => "stored_response",
            Self::Options { .. } => "options",
            Self::MethodNotAllowed { .. } => "method_not_allowed",
            Self::NotFound { .. } => "not_found",
        }
    }

    /// The shape in which errors of this route are written.
    #[must_use]
    pub const fn shape(&self) -> ErrorShape {
        match self {
            Self::Inference { api, .. } => api.shape(),
            Self::MethodNotAllowed { shape, .. } | Self::NotFound { shape } => *shape,
            _ => ErrorShape::OpenAi,
        }
    }
}

/// The path of the WebSocket, here and at the engine.
pub const REALTIME_PATH: &str = "/v1/realtime";

/// The inference paths, each with its API. All of them take POST.
const INFERENCE_PATHS: [(&str, Api); 21] = [
    ("/v1/chat/completions", Api::ChatCompletions),
    ("/v1/chat/completions/batch", Api::ChatBatch),
    ("/v1/completions", Api::Completions),
    ("/v1/responses", Api::Responses),
    ("/v1/embeddings", Api::Embeddings),
    ("/v2/embed", Api::Embeddings),
    ("/v1/rerank", Api::Rerank),
    ("/rerank", Api::Rerank),
    ("/v2/rerank", Api::Rerank),
    ("/v1/score", Api::Score),
    ("/score", Api::Score),
    ("/generative_scoring", Api::GenerativeScoring),
    ("/pooling", Api::Pooling),
    ("/classify", Api::Classify),
    ("/v1/audio/transcriptions", Api::Transcriptions),
    ("/v1/audio/translations", Api::Translations),
    ("/v1/audio/speech", Api::Speech),
    ("/v1/messages", Api::Messages),
    ("/v1/messages/count_tokens", Api::CountTokens),
    ("/tokenize", Api::Tokenize),
    ("/detokenize", Api::Detokenize),
];

const POST: &str = "POST, OPTIONS";
const GET: &str = "GET, HEAD, OPTIONS";
const UPGRADE: &str = "GET, OPTIONS";
const STORED: &str = "GET, POST, DELETE, OPTIONS";

/// Decides what a request line means. `path` comes without its query.
#[must_use]
pub fn route<'a>(method: &Method, path: &'a str) -> Route<'a> {
    let (found, allow) = match known(path) {
        Some(known) => known,
        None if path == "*" && method == Method::OPTIONS => {
            return Route::Options { allow: "GET, HEAD, POST, OPTIONS" };
        }
        // Anthropic's clients parse only their own shape, also of a 404 below their prefix.
        None if path.starts_with("/v1/messages/") => return Route::NotFound { shape: ErrorShape::Anthropic },
        None => return Route::NotFound { shape: ErrorShape::OpenAi },
    };
    if method == Method::OPTIONS {
        return Route::Options { allow };
    }
    if allow.split(", ").any(|allowed| allowed == method.as_str()) {
        return found;
    }
    Route::MethodNotAllowed { allow, shape: found.shape() }
}

/// What `path` is for, and the methods it takes.
fn known(path: &str) -> Option<(Route<'_>, &'static str)> {
    if let Some(&(path, api)) = INFERENCE_PATHS.iter().find(|(known, _)| *known == path) {
        return Some((Route::Inference { api, path }, POST));
    }
    match path {
        "/v1/models" => return Some((Route::Models, GET)),
        REALTIME_PATH => return Some((Route::Realtime, UPGRADE)),
        _ => {}
    }
    if let Some(id) = path.strip_prefix("/v1/models/") {
        return percent_decode(id).filter(|id| !id.is_empty()).map(|id| (Route::Model { id }, GET));
    }
    let stored = path.strip_prefix("/v1/responses/").filter(|rest| !rest.is_empty());
    stored.map(|_| (Route::StoredResponse, STORED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_inference_path_takes_post_and_nothing_else() {
        for (path, api) in INFERENCE_PATHS {
            assert_eq!(route(&Method::POST, path), Route::Inference { api, path });
            assert_eq!(route(&Method::OPTIONS, path), Route::Options { allow: POST });
            for method in
                [Method::GET, Method::PUT, Method::DELETE, Method::HEAD, Method::TRACE, Method::CONNECT]
            {
                assert_eq!(route(&method, path), Route::MethodNotAllowed { allow: POST, shape: api.shape() });
            }
        }
    }

    #[test]
    fn every_api_has_a_path_and_a_label_of_its_own() {
        let mut labels: Vec<_> = Api::ALL.iter().map(|api| api.label()).collect();
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels.len(), Api::ALL.len());
        for api in Api::ALL.into_iter().filter(|api| *api != Api::Realtime) {
            assert!(INFERENCE_PATHS.iter().any(|(_, other)| *other == api), "{api:?}");
        }
    }

    #[test]
    fn models_are_listed_and_named_models_may_contain_slashes() {
        let model = |id: &'static str| Route::Model { id: Cow::Borrowed(id) };
        assert_eq!(route(&Method::GET, "/v1/models"), Route::Models);
        assert_eq!(route(&Method::HEAD, "/v1/models"), Route::Models);
        assert_eq!(route(&Method::GET, "/v1/models/tiny"), model("tiny"));
        assert_eq!(route(&Method::GET, "/v1/models/org/tiny"), model("org/tiny"));
        assert_eq!(route(&Method::GET, "/v1/models/org%2Ftiny%20x"), model("org/tiny x"));
        assert_eq!(
            route(&Method::DELETE, "/v1/models/tiny"),
            Route::MethodNotAllowed { allow: GET, shape: ErrorShape::OpenAi }
        );
    }

    #[test]
    fn the_websocket_and_stored_responses_are_known_by_their_methods() {
        assert_eq!(route(&Method::GET, "/v1/realtime"), Route::Realtime);
        assert_eq!(route(&Method::POST, "/v1/realtime").label(), "method_not_allowed");
        for (method, path) in [
            (Method::GET, "/v1/responses/resp_1"),
            (Method::DELETE, "/v1/responses/resp_1"),
            (Method::POST, "/v1/responses/resp_1/cancel"),
            (Method::GET, "/v1/responses/resp_1/input_items"),
        ] {
            assert_eq!(route(&method, path), Route::StoredResponse, "{method} {path}");
        }
        assert_eq!(route(&Method::PUT, "/v1/responses/resp_1").label(), "method_not_allowed");
        assert_eq!(route(&Method::GET, "/v1/responses").label(), "method_not_allowed");
    }

    #[test]
    fn options_says_what_a_path_takes() {
        assert_eq!(route(&Method::OPTIONS, "/v1/models"), Route::Options { allow: GET });
        assert_eq!(route(&Method::OPTIONS, "*").label(), "options");
        assert_eq!(route(&Method::OPTIONS, "/sleep").label(), "not_found");
        assert_eq!(route(&Method::GET, "*").label(), "not_found");
    }

    /// All that vLLM 0.33 serves beside inference, development mode, scale-out and elastic EP included.
    const ENGINE_ONLY: &[&str] = &[
        "/health",
        "/ping",
        "/invocations",
        "/version",
        "/load",
        "/metrics",
        "/kv_event_sources",
        "/tokenizer_info",
        "/server_info",
        "/docs",
        "/redoc",
        "/openapi.json",
        "/sleep",
        "/wake_up",
        "/is_sleeping",
        "/release_kv_cache_memory",
        "/reset_prefix_cache",
        "/reset_mm_cache",
        "/reset_encoder_cache",
        "/collective_rpc",
        "/pause",
        "/resume",
        "/is_paused",
        "/abort_requests",
        "/init_weights_update_group",
        "/update_weights",
        "/update_weights_from_disk",
        "/init_weight_transfer_engine",
        "/get_world_size",
        "/scale_elastic_ep",
        "/is_scaling_elastic_ep",
        "/fault_tolerance/apply",
        "/fault_tolerance/status",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/load_lora_adapter",
        "/unload_lora_adapter",
        "/start_profile",
        "/stop_profile",
        "/inference/v1/generate",
        "/inference/v1/abort_requests",
        "/v1/chat/completions/render",
        "/v1/chat/completions/derender",
        "/v1/completions/render",
        "/v1/completions/derender",
        "/v1/messages/render",
        "/cohere/v2/chat",
        "/v1/systemone",
        "/ready",
        "/readyz",
        "/livez",
        "/v1/load",
        "/v1/metrics",
        "/v1/sleep",
        "/v1/files",
        "/v1/batches",
        "/v1/fine_tuning/jobs",
        "/v1/images/generations",
        "/sim/state",
        "/sim/faults",
    ];

    #[test]
    fn no_path_of_an_engine_beside_inference_is_known() {
        for path in ENGINE_ONLY {
            for method in
                [Method::GET, Method::POST, Method::PUT, Method::DELETE, Method::HEAD, Method::OPTIONS]
            {
                assert_eq!(route(&method, path).label(), "not_found", "{method} {path}");
            }
        }
    }

    #[test]
    fn no_spelling_leads_around_the_table() {
        let tricks = |path: &str| {
            let bare = path.trim_start_matches('/');
            let encoded: String = bare.bytes().map(|byte| format!("%{byte:02x}")).collect();
            [
                format!("/{path}"),
                format!("{path}/"),
                format!("/./{bare}"),
                format!("/v1/../{bare}"),
                format!("/v1/chat/completions/../../../{bare}"),
                format!("/v1/chat/completions/..%2f..%2f..%2f{bare}"),
                format!("/v1/chat/completions;{path}"),
                format!("/{encoded}"),
                format!("/%2e/{bare}"),
                format!("\\{bare}"),
                path.to_ascii_uppercase(),
                format!("{path}%00"),
                format!("{path} "),
            ]
        };
        let known = INFERENCE_PATHS.iter().map(|(path, _)| *path).filter(|path| *path != "/v1/messages");
        for path in ENGINE_ONLY.iter().copied().chain(known) {
            for trick in tricks(path) {
                for method in [Method::GET, Method::POST] {
                    let label = route(&method, &trick).label();
                    assert!(label == "not_found" || label == "stored_response", "{method} {trick}: {label}");
                }
            }
        }
        // Names of models and of responses may look like anything: neither is ever asked of an engine.
        assert_eq!(route(&Method::GET, "/v1/models/../../sleep").label(), "model");
        for path in [
            "",
            "/",
            "/v1",
            "/v1/",
            "/v1/models/",
            "/v1/models/%zz",
            "/v1/models/%f",
            "/v1/models/%ff",
            "/v1/responses/",
        ] {
            assert_eq!(route(&Method::GET, path).label(), "not_found", "{path}");
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
