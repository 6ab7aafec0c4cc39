//! Who may use the REST API, over real sockets: roles, tokens made and withdrawn, limits.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Plane, wait};
use reqwest::header::HeaderMap;
use serde_json::Value;

const ROOT: &str = "root-token";
const OPS: &str = "ops-token";
const GUEST: &str = "guest-token";

async fn closed(dir: &std::path::Path, limit: u32) -> Plane {
    Plane::start_with(dir, |config| {
        config.auth.tokens =
            vec![format!("{ROOT}:admin"), format!("{OPS}:operator"), format!("{GUEST}:viewer")];
        config.auth.rate_limit_per_minute = limit;
    })
    .await
}

#[tokio::test]
async fn each_role_may_what_the_table_says_and_probes_need_no_token() {
    let dir = tempfile::tempdir().unwrap();
    let plane = closed(dir.path(), 0).await;
    for path in
        ["/livez", "/healthz", "/readyz", "/metrics", "/", "/v1/admin/ui", "/console/app.js", "/openapi.json"]
    {
        assert!(plane.fetch(path).await.status().as_u16() != 401, "{path}");
    }
    let put = Some(r#"{"replicas":0}"#);
    for (method, path, body, nobody, guest, ops, root) in [
        ("GET", "/api/v2/deployments", None, 401, 200, 200, 200),
        ("GET", "/v1/admin/cluster/status", None, 401, 200, 200, 200),
        ("GET", "/v1/admin/logs?lines=5", None, 401, 200, 200, 200),
        ("GET", "/api/audit-logs", None, 401, 200, 200, 200),
        ("PUT", "/api/v2/deployments/m", put, 401, 403, 201, 200),
        ("POST", "/api/v2/endpoints/m-0/drain", None, 401, 403, 404, 404),
        ("POST", "/api/v2/nodes/n/cordon", None, 401, 403, 404, 404),
        // A log may hold what clients asked.
        ("GET", "/api/v2/models/m/replicas/m-0/logs", None, 401, 403, 404, 404),
        ("DELETE", "/api/v2/deployments/m", None, 401, 403, 200, 404),
        ("GET", "/api/v2/tokens", None, 401, 403, 403, 200),
        ("POST", "/api/v2/tokens", Some("{}"), 401, 403, 403, 400),
        ("GET", "/api/v2/nowhere", None, 404, 404, 404, 404),
        ("DELETE", "/api/v2/nodes", None, 405, 405, 405, 405),
    ] {
        for (token, expected) in [("", nobody), (GUEST, guest), (OPS, ops), (ROOT, root), ("wrong", nobody)] {
            let (status, answer, headers) = plane.ask(method, path, token, &[], body).await;
            assert_eq!(status, expected, "{method} {path} {token}: {answer}");
            match status {
                401 => {
                    assert_eq!(answer["error"]["code"], "unauthenticated");
                    assert_eq!(headers["www-authenticate"], "Bearer");
                }
                403 => {
                    let message = answer["error"]["message"].as_str().unwrap();
                    assert!(message.contains("takes the role"), "{message}");
                }
                _ => {}
            }
        }
    }
    let refused = "penstock_controlplane_http_refused_total{reason=\"forbidden\"}";
    assert!(plane.metric(refused).await >= 6.0);
    plane.stop().await;
}

#[tokio::test]
async fn tokens_are_made_used_and_withdrawn_and_an_admin_always_stays() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    assert_eq!(plane.get("/api/v2/whoami").await["open"], true);
    let make =
        async |token: &str, body: &str| plane.ask("POST", "/api/v2/tokens", token, &[], Some(body)).await;
    let (status, answer, _) = make("", r#"{"name":"ci","role":"operator"}"#).await;
    assert_eq!((status, answer["error"]["code"].as_str()), (409, Some("no_admin_left")), "{answer}");
    let (status, answer, _) = make("", r#"{"name":"root","role":"admin"}"#).await;
    assert_eq!(status, 201, "{answer}");
    let root = answer["token"].as_str().unwrap().to_owned();
    assert_eq!(
        plane.call("GET", "/api/v2/models", None).await.0,
        401,
        "it is closed from the first token on"
    );
    let (_, answer, _) = make(&root, r#"{"name":"ci","role":"operator"}"#).await;
    let ci = answer["token"].as_str().unwrap().to_owned();
    let (status, answer, _) = make(&root, r#"{"name":"ci","role":"viewer"}"#).await;
    assert_eq!((status, answer["error"]["field"].as_str()), (409, Some("name")));
    let (_, who, _) = plane.ask("GET", "/api/v2/whoami", &ci, &[], None).await;
    assert_eq!(
        (who["name"].as_str(), who["role"].as_str(), who["open"].as_bool()),
        (Some("ci"), Some("operator"), Some(false))
    );
    let (_, listed, _) = plane.ask("GET", "/api/v2/tokens", &root, &[], None).await;
    let text = listed.to_string();
    assert!(
        listed["tokens"].as_array().unwrap().len() == 2 && !text.contains(&ci) && !text.contains("sha256"),
        "{text}"
    );
    let (status, answer, _) = make(&root, r#"{"name":"brief","role":"viewer","expires_in_s":1}"#).await;
    assert_eq!(status, 201);
    let brief = answer["token"].as_str().unwrap().to_owned();
    let expired = wait("the token to expire", async || {
        let (status, answer, _) = plane.ask("GET", "/api/v2/models", &brief, &[], None).await;
        (status == 401).then_some(answer)
    })
    .await;
    assert!(expired["error"]["message"].as_str().unwrap().contains("expired"), "{expired}");
    let (status, ..) = make(&root, r#"{"name":"brief","role":"viewer"}"#).await;
    assert_eq!(status, 201, "the name of an expired one is free");
    let (status, answer, _) = plane.ask("DELETE", "/api/v2/tokens/root", &root, &[], None).await;
    assert_eq!((status, answer["error"]["code"].as_str()), (409, Some("no_admin_left")));
    let (status, ..) = plane.ask("DELETE", "/api/v2/tokens/ci", &root, &[], None).await;
    assert_eq!(status, 200);
    assert_eq!(plane.ask("GET", "/api/v2/models", &ci, &[], None).await.0, 401);
    let (status, answer, _) = plane
        .ask(
            "POST",
            "/api/v2/tokens",
            &root,
            &[("idempotency-key", "k")],
            Some(r#"{"name":"x","role":"viewer"}"#),
        )
        .await;
    assert_eq!((status, answer["error"]["field"].as_str()), (400, Some("Idempotency-Key")));
    plane.stop().await;
    // Tokens outlive the process, and of them only hashes are on the disk.
    let stored = std::fs::read(dir.path().join("store.redb")).unwrap();
    assert!(!stored.windows(root.len()).any(|window| window == root.as_bytes()));
    let plane = Plane::start(dir.path()).await;
    assert_eq!(plane.ask("GET", "/api/v2/models", &root, &[], None).await.0, 200);
    assert_eq!(plane.call("GET", "/api/v2/models", None).await.0, 401);
    plane.stop().await;
}

#[tokio::test]
async fn a_token_that_asks_too_often_is_told_when_to_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let plane = closed(dir.path(), 10).await;
    let mut last: Option<(u16, Value, HeaderMap)> = None;
    for n in 0..11 {
        let answer = plane.ask("GET", "/api/v2/models", GUEST, &[], None).await;
        assert_eq!(answer.0, if n < 10 { 200 } else { 429 });
        last = Some(answer);
    }
    let (_, answer, headers) = last.unwrap();
    assert_eq!(answer["error"]["code"], "rate_limited");
    let after: u64 = headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=61).contains(&after), "{after}");
    assert_eq!(plane.ask("GET", "/api/v2/models", OPS, &[], None).await.0, 200, "another token has its own");
    assert_eq!(plane.fetch("/livez").await.status().as_u16(), 200);
    assert_eq!(plane.call("GET", "/api/v2/models", None).await.0, 401, "who has no token is not counted");
    plane.stop().await;
}

#[tokio::test]
async fn a_viewer_sees_no_secrets() {
    let dir = tempfile::tempdir().unwrap();
    let plane = closed(dir.path(), 0).await;
    let at = "/api/v2/deployments/m";
    for secret in ["s3cret-1", "s3cret-2"] {
        let body = format!(
            r#"{{"replicas":0,"env":{{"HF_TOKEN":"{secret}","A":"b"}},"args":["--api-token={secret}"]}}"#
        );
        assert!(plane.ask("PUT", at, OPS, &[], Some(&body)).await.0 < 300);
    }
    for path in [at, "/api/v2/deployments", "/api/v2/revisions/m", "/api/v2/diff/m", "/api/v2/audit"] {
        let (status, shown, _) = plane.ask("GET", path, GUEST, &[], None).await;
        let text = shown.to_string();
        assert!(status == 200 && !text.contains("s3cret") && text.contains("***"), "{path}: {text}");
        let (_, shown, _) = plane.ask("GET", path, OPS, &[], None).await;
        assert_eq!(shown.to_string().contains("s3cret"), !path.contains("audit"), "{path}");
    }
    plane.stop().await;
}
