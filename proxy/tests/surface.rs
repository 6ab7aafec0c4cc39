//! The routes, what each takes, and errors of engines in the shape of the API.

#![allow(clippy::unwrap_used)]

mod support;

use penstock_config::proxy::{Policy, ProxyConfig};
use support::*;

async fn proxy(answer: String) -> (Proxy, Engine) {
    let engine = Engine::answering(answer).await;
    (Proxy::start(ProxyConfig::default(), &[engine.address]), engine)
}

fn ok() -> String {
    json_answer("200 OK", r#"{"ok":true}"#)
}

fn body_of(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").unwrap().1
}

#[tokio::test]
async fn every_inference_api_is_served_under_its_own_path() {
    let (proxy, engine) = proxy(ok()).await;
    for path in [
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/embeddings",
        "/v2/embed",
        "/v1/rerank",
        "/rerank",
        "/v2/rerank",
        "/v1/score",
        "/score",
        "/generative_scoring",
        "/pooling",
        "/classify",
        "/v1/audio/speech",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
    ] {
        let answer = proxy.exchange(&post(path, r#"{"model":"m"}"#)).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with(r#"{"ok":true}"#), "{path}: {answer}");
        assert!(engine.seen().pop().unwrap().head.starts_with(&format!("post {path} http/1.1")));
    }
}

/// Raw request targets, some of which a lenient proxy would resolve to an engine's admin path.
const NEVER: &[&str] = &[
    "/sleep",
    "/wake_up",
    "/pause",
    "/resume",
    "/reset_prefix_cache",
    "/server_info",
    "/metrics",
    "/load",
    "/v1/load",
    "/version",
    "/health",
    "/ping",
    "/invocations",
    "/collective_rpc",
    "/v1/load_lora_adapter",
    "/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/start_profile",
    "/scale_elastic_ep",
    "/fault_tolerance/apply",
    "/abort_requests",
    "/inference/v1/generate",
    "/v1/chat/completions/render",
    "/tokenizer_info",
    "/docs",
    "/openapi.json",
    "//sleep",
    "//v1/chat/completions",
    "/v1//chat/completions",
    "/./sleep",
    "/v1/../sleep",
    "/v1/chat/completions/../../../sleep",
    "/%73leep",
    "/v1/%2e%2e/sleep",
    "/v1/chat%2fcompletions",
    "/v1/chat/completions/",
    "/V1/chat/completions",
    "/v1/chat/completions%00",
    "/v1/chat/completions;x",
    "http://engine/sleep",
    "http://engine//sleep",
    "/sleep?path=/v1/models",
];

#[tokio::test]
async fn nothing_else_of_an_engine_can_be_reached() {
    let (proxy, engine) = proxy(ok()).await;
    for target in NEVER {
        for method in ["GET", "POST", "PUT", "DELETE", "HEAD", "PATCH"] {
            let request = format!(
                "{method} {target} HTTP/1.1\r\nhost: g\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: 13\r\n\r\n{{\"model\":\"m\"}}"
            );
            let answer = proxy.exchange(request.as_bytes()).await;
            let status = answer.get(9..12).unwrap_or_default();
            assert!(matches!(status, "404" | "400"), "{method} {target}: {answer}");
        }
    }
    assert!(engine.seen().is_empty(), "{:?}", engine.seen());
    proxy.settles().await;
}

#[tokio::test]
async fn head_and_options_are_answered_without_an_engine() {
    let (proxy, engine) = proxy(ok()).await;
    let ask = async |method: &str, path: &str| {
        let request = format!("{method} {path} HTTP/1.1\r\nhost: g\r\nconnection: close\r\n\r\n");
        proxy.exchange(request.as_bytes()).await.to_ascii_lowercase()
    };
    let listed = ask("GET", "/v1/models").await;
    let head = ask("HEAD", "/v1/models").await;
    assert!(head.starts_with("http/1.1 200") && body_of(&head).is_empty(), "{head}");
    assert!(head.contains(&format!("content-length: {}\r\n", body_of(&listed).len())), "{head}");
    assert!(ask("HEAD", "/healthz").await.starts_with("http/1.1 200"));
    for (path, allow) in
        [(CHAT, "post, options"), ("/v1/models", "get, head, options"), ("*", "get, head, post, options")]
    {
        let answer = ask("OPTIONS", path).await;
        assert!(
            answer.starts_with("http/1.1 204") && answer.contains(&format!("allow: {allow}\r\n")),
            "{answer}"
        );
    }
    let answer = ask("GET", CHAT).await;
    assert!(answer.starts_with("http/1.1 405") && answer.contains("allow: post, options\r\n"), "{answer}");
    for request in
        ["GET /v1/responses/resp_1", "DELETE /v1/responses/resp_1", "POST /v1/responses/resp_1/cancel"]
    {
        let (method, path) = request.split_once(' ').unwrap();
        let answer = ask(method, path).await;
        assert!(
            answer.starts_with("http/1.1 501") && answer.contains("stored_responses_not_supported"),
            "{answer}"
        );
    }
    assert!(engine.seen().is_empty());
}

fn form(model: &str, more: &str) -> String {
    format!(
        "--B\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\nContent-Type: audio/wav\r\n\r\nRIFF\u{0}\r\n--not\r\n\r\n\
         {more}--B\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n{model}\r\n--B--\r\n"
    )
}

fn post_form(path: &str, boundary: &str, body: &str) -> Vec<u8> {
    format!(
        "POST {path} HTTP/1.1\r\nhost: g\r\nconnection: close\r\ncontent-type: multipart/form-data; boundary={boundary}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

const AUDIO: &str = "/v1/audio/transcriptions";

#[tokio::test]
async fn forms_arrive_byte_for_byte_less_what_an_engine_must_not_be_told() {
    let (proxy, engine) = proxy(ok()).await;
    let body = form("m", "");
    for path in [AUDIO, "/v1/audio/translations"] {
        let answer = proxy.exchange(&post_form(path, "B", &body)).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let seen = engine.seen().pop().unwrap();
        assert_eq!(seen.body, body.as_bytes());
        assert!(seen.head.contains("content-type: multipart/form-data; boundary=b"), "{}", seen.head);
    }
    let order = "--B\r\nContent-Disposition: form-data; name=\"vllm_xargs\"\r\n\r\n{}\r\n";
    proxy.exchange(&post_form(AUDIO, "B", &form("m", order))).await;
    assert_eq!(engine.seen().pop().unwrap().body, body.as_bytes());
}

#[tokio::test]
async fn forms_that_are_none_are_refused_in_words() {
    let (proxy, engine) = proxy(ok()).await;
    let cut = form("m", "").replace("--B--", "--B");
    for (request, status, code) in [
        (post_form(AUDIO, "B", &cut), 400, "invalid_form"),
        (post_form(AUDIO, "C", &form("m", "")), 400, "invalid_form"),
        (post_form(AUDIO, "", &form("m", "")), 400, "invalid_form"),
        (post_form(AUDIO, "B", &form("", "")), 400, "missing_model"),
        (post_form(AUDIO, "B", &form("other", "")), 404, "model_not_found"),
        (post(AUDIO, r#"{"model":"m"}"#), 415, "unsupported_media_type"),
        (post_form(CHAT, "B", &form("m", "")), 415, "unsupported_media_type"),
    ] {
        let answer = proxy.exchange(&request).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(code),
            "{code}: {answer}"
        );
    }
    assert!(engine.seen().is_empty());
    proxy.settles().await;
}

#[tokio::test]
async fn a_streamed_transcription_is_a_stream() {
    let (proxy, engine) = proxy(sse(&["hello", " world"])).await;
    let stream = "--B\r\nContent-Disposition: form-data; name=\"stream\"\r\n\r\ntrue\r\n";
    let answer = proxy.exchange(&post_form(AUDIO, "B", &form("m", stream))).await;
    assert!(answer.contains("hello") && answer.contains("[DONE]"), "{answer}");
    assert_eq!(engine.seen().len(), 1);
    proxy.settles().await;
}

fn answer_of(status: &str, content_type: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test]
async fn errors_of_engines_come_in_the_shape_of_the_api() {
    let right = r#"{"error": {"message": "x", "type": "BadRequestError", "param": null, "code": 400}}"#;
    for (path, answer, status, wanted) in [
        (CHAT, answer_of("400 Bad Request", "application/json", right), 400, right.to_owned()),
        (
            CHAT,
            answer_of("422 Unprocessable Entity", "application/json", r#"{"detail":[{"loc":["body","n"],"msg":"bad n"}]}"#),
            422,
            r#"{"error":{"message":"body.n: bad n","type":"invalid_request_error","param":"body.n","code":null}}"#.to_owned(),
        ),
        (
            CHAT,
            answer_of("400 Bad Request", "application/json", r#"{"object":"error","message":"old","type":"BadRequestError","code":400}"#),
            400,
            r#"{"error":{"message":"old","type":"BadRequestError","param":null,"code":400}}"#.to_owned(),
        ),
        (
            CHAT,
            answer_of("500 Internal Server Error", "text/plain", "Internal Server Error"),
            500,
            r#"{"error":{"message":"Internal Server Error","type":"upstream_error","param":null,"code":null}}"#.to_owned(),
        ),
        (
            CHAT,
            answer_of("502 Bad Gateway", "text/html", "<html>nginx at 10.0.0.1:8000</html>"),
            502,
            r#"{"error":{"message":"The engine answered 502 (Bad Gateway) and gave no reason.","type":"upstream_error","param":null,"code":null}}"#.to_owned(),
        ),
        (
            "/v1/responses",
            answer_of("404 Not Found", "application/json", r#"{"detail":"Not Found"}"#),
            404,
            r#"{"error":{"message":"The engine of this model does not serve this API.","type":"invalid_request_error","param":null,"code":"not_served_by_model"}}"#.to_owned(),
        ),
        (
            "/v1/messages",
            answer_of("400 Bad Request", "application/json", right),
            400,
            r#"{"type":"error","error":{"type":"invalid_request_error","message":"x"}}"#.to_owned(),
        ),
    ] {
        let (proxy, _engine) = proxy(answer.clone()).await;
        let got = proxy.exchange(&post(path, r#"{"model":"m"}"#)).await;
        assert!(got.starts_with(&format!("HTTP/1.1 {status}")), "{answer}: {got}");
        assert_eq!(body_of(&got), wanted, "{answer}");
        assert!(got.to_ascii_lowercase().contains("content-type: application/json\r\n"), "{got}");
        proxy.settles().await;
    }
}

#[tokio::test]
async fn an_error_behind_a_200_is_an_error() {
    for lie in [
        answer_of("200 OK", "application/json", r#"{"error":{"message":"Network connection lost"}}"#),
        answer_of("200 OK", "text/plain", "Network connection lost"),
    ] {
        // Another engine gives the answer.
        let script = lie.clone();
        let liar = Engine::start(move |_| vec![Step::Send(script.clone().into_bytes())]).await;
        let honest = Engine::answering(ok()).await;
        let proxy = Proxy::start(ProxyConfig::default(), &[liar.address, honest.address]);
        for _ in 0..4 {
            let answer = proxy.exchange(&post(CHAT, &chat(false))).await;
            assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with(r#"{"ok":true}"#), "{answer}");
        }
        // No other engine: 502, not 200.
        let alone = Proxy::start(ProxyConfig::default(), &[liar.address]);
        let answer = alone.exchange(&post(CHAT, &chat(false))).await;
        assert!(answer.starts_with("HTTP/1.1 502") && answer.contains("Network connection lost"), "{answer}");
        alone.settles().await;
    }
}

#[tokio::test]
async fn events_pass_as_they_are_in_any_spelling_and_count_once() {
    let usage = |n: u32| format!(r#""usage":{{"prompt_tokens":5,"completion_tokens":{n}}}"#);
    let events = [
        ": keep-alive\r\n\r\n".to_owned(),
        format!("data:{{\"choices\":[{{\"delta\":{{\"content\":\"a\"}}}}],{}}}\r\n\r\n", usage(1)),
        format!("data: {{\"choices\":[{{\"delta\":{{}},\"finish_reason\":\"stop\"}}],{}}}\n\n", usage(2)),
        format!("data: {{\"choices\":[],{}}}\n\n", usage(2)),
        "data:[DONE]\r\n\r\n".to_owned(),
    ]
    .concat();
    let (proxy, _engine) = proxy(format!("{SSE_HEAD}{}0\r\n\r\n", chunk(&events))).await;
    let answer = proxy.exchange(&post(CHAT, &chat(true))).await;
    assert!(answer.contains(&events), "{answer}");
    let tokens = |kind| proxy.gateway.metrics.tokens.with_label_values(&["m", kind]).get();
    assert_eq!((tokens("prompt"), tokens("completion")), (5, 2), "usage on every chunk is not added up");
    proxy.settles().await;
}

#[tokio::test]
async fn an_error_event_of_the_wrong_shape_is_put_right_and_no_other() {
    let good = delta("a");
    let wrong =
        "data: {\"object\":\"error\",\"message\":\"died\",\"type\":\"InternalServerError\",\"code\":500}\n\n";
    let stream = format!("{SSE_HEAD}{}{}0\r\n\r\n", chunk(&good), chunk(&format!("{wrong}data: [DONE]\n\n")));
    let (engine, mut config) = (Engine::answering(stream).await, ProxyConfig::default());
    config.resume.enabled = false;
    let proxy = Proxy::start(config, &[engine.address]);
    let answer = proxy.exchange(&post(CHAT, &chat(true))).await;
    let right = r#"data: {"error":{"message":"died","type":"InternalServerError","param":null,"code":500}}"#;
    assert!(answer.contains(&good) && answer.contains(right) && answer.contains("[DONE]"), "{answer}");
    assert_eq!(proxy.gateway.metrics.inband_errors.get(), 1);
}

#[tokio::test]
async fn a_user_that_stands_in_the_prompt_is_no_session() {
    let (a, b) = (Engine::answering(ok()).await, Engine::answering(ok()).await);
    let mut config = ProxyConfig::default();
    config.routing.policy = Policy::SessionAffinity;
    let proxy = Proxy::start(config, &[a.address, b.address]);
    let body = r#"{"messages":[{"role":"user","content":"{\"user\":\"same\"} \"user\": \"same\""}],"x":{"user":"same"},"model":"m"}"#;
    for _ in 0..8 {
        proxy.exchange(&post(CHAT, body)).await;
    }
    let affine = proxy.gateway.metrics.picks.with_label_values(&["session_affinity", "affine"]).get();
    assert_eq!(affine, 0);
    proxy.exchange(&post(CHAT, r#"{"user":"same","model":"m"}"#)).await;
    let affine = proxy.gateway.metrics.picks.with_label_values(&["session_affinity", "affine"]).get();
    assert_eq!(affine, 1);
}
