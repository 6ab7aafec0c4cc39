//! How things are changed through the REST API: conditions, dry runs, repetitions, pages, and what the audit keeps.
#![allow(clippy::unwrap_used)]

mod common;

use common::Plane;
use penstock_controlplane::store::{EmbeddedStore, Store, Txn, keys};
use serde_json::{Value, json};

const AT: &str = "/api/v2/deployments/m";

#[tokio::test]
async fn conditions_guard_against_overwriting() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let put =
        async |headers: &[(&str, &str)], body: &str| plane.ask("PUT", AT, "", headers, Some(body)).await;
    let (status, answer, _) = put(&[("if-match", "*")], "{}").await;
    assert_eq!((status, answer["error"]["code"].as_str()), (412, Some("precondition_failed")));
    let (status, created, headers) = put(&[("if-none-match", "*")], r#"{"replicas":0}"#).await;
    assert_eq!(status, 201);
    let tag = headers["etag"].to_str().unwrap().to_owned();
    assert_eq!(tag, format!("\"{}\"", created["revision"]));
    let (_, _, read) = plane.ask("GET", AT, "", &[], None).await;
    assert_eq!(read["etag"].to_str().unwrap(), tag);
    assert_eq!(put(&[("if-none-match", "*")], "{}").await.0, 412);
    let (status, _, headers) = put(&[("if-match", &tag)], r#"{"replicas":0,"engine":"sim"}"#).await;
    assert_eq!(status, 200);
    let newer = headers["etag"].to_str().unwrap().to_owned();
    let (status, answer, _) = put(&[("if-match", &tag)], r#"{"replicas":0}"#).await;
    assert_eq!(status, 412, "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("nothing was changed"));
    for (name, value) in [("if-match", "5"), ("if-match", "W/\"5\""), ("if-none-match", "\"5\"")] {
        let (status, answer, _) = put(&[(name, value)], "{}").await;
        assert_eq!(
            (status, answer["error"]["code"].as_str()),
            (400, Some("invalid_header")),
            "{name}: {value}"
        );
    }
    let patch = plane.ask("PATCH", AT, "", &[("if-match", &tag)], Some(r#"{"replicas":1}"#)).await;
    let delete = plane.ask("DELETE", AT, "", &[("if-match", &tag)], None).await;
    assert_eq!((patch.0, delete.0), (412, 412));
    assert_eq!(plane.ask("DELETE", AT, "", &[("if-match", &newer)], None).await.0, 200);
    assert_eq!(plane.ask("DELETE", AT, "", &[("if-match", &newer)], None).await.0, 404);
    plane.stop().await;
}

#[tokio::test]
async fn a_dry_run_says_what_would_be_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let dry = format!("{AT}?dry_run=true");
    let (status, would, headers) = plane.ask("PUT", &dry, "", &[], Some(r#"{"replicas":3}"#)).await;
    assert_eq!(
        (status, would["replicas"].as_u64(), &headers["penstock-dry-run"]),
        (200, Some(3), &"true".parse().unwrap())
    );
    assert_eq!(plane.call("GET", AT, None).await.0, 404);
    assert_eq!(
        plane.ask("PUT", &dry, "", &[], Some(r#"{"replicas":-3}"#)).await.0,
        400,
        "it checks all the same"
    );
    assert_eq!(plane.call("PUT", AT, Some(r#"{"replicas":0}"#)).await.0, 201);
    let revision = plane.get(AT).await["revision"].clone();
    let route = json!({"targets": [{"model": "m"}]}).to_string();
    for (method, path, body) in [
        ("PATCH", dry.as_str(), Some(r#"{"replicas":9}"#)),
        ("DELETE", &dry, None),
        ("PUT", "/api/v2/routes/chat?dry_run=true", Some(&*route)),
        ("PATCH", "/api/v2/nodes/n?dry_run=true", Some(r#"{"labels":{"a":"b"}}"#)),
    ] {
        let (status, answer, headers) = plane.ask(method, path, "", &[], body).await;
        assert_eq!(
            (status, headers.contains_key("penstock-dry-run")),
            (200, true),
            "{method} {path}: {answer}"
        );
    }
    assert_eq!(plane.get(AT).await["revision"], revision);
    assert_eq!(plane.call("GET", "/api/v2/routes/chat", None).await.0, 404);
    assert_eq!(plane.get("/api/v2/audit").await["records"].as_array().unwrap().len(), 1);
    for (path, code, field) in [
        (format!("{AT}?dry_run=yes"), "invalid_parameter", "dry_run"),
        (format!("{AT}?dryrun=true"), "unknown_parameter", "dryrun"),
    ] {
        let (status, answer, _) = plane.ask("PUT", &path, "", &[], Some("{}")).await;
        let error = &answer["error"];
        assert_eq!((status, error["code"].as_str(), error["field"].as_str()), (400, Some(code), Some(field)));
    }
    plane.stop().await;
}

#[tokio::test]
async fn a_repeated_request_is_done_once_and_answered_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    let key = [("idempotency-key", "deploy-1")];
    let body = r#"{"replicas":0}"#;
    let (status, first, headers) = plane.ask("PUT", AT, "", &key, Some(body)).await;
    assert_eq!((status, headers.get("idempotency-replayed")), (201, None));
    assert_eq!(plane.call("PATCH", AT, Some(r#"{"replicas":2}"#)).await.0, 200);
    let (status, again, replay) = plane.ask("PUT", AT, "", &key, Some(body)).await;
    assert_eq!((status, &again), (201, &first), "the answer of then");
    assert_eq!(
        (&replay["idempotency-replayed"], &replay["etag"]),
        (&"true".parse().unwrap(), &headers["etag"])
    );
    assert_eq!(plane.get(AT).await["replicas"], 2, "and nothing was done");
    for (method, path, body) in [
        ("PUT", AT, Some(r#"{"replicas":1}"#)),
        ("PUT", "/api/v2/deployments/n", Some(body)),
        ("DELETE", AT, None),
    ] {
        let (status, answer, _) = plane.ask(method, path, "", &key, body).await;
        assert_eq!((status, answer["error"]["code"].as_str()), (422, Some("idempotency_mismatch")));
    }
    // What failed may be sent again under its key.
    let retry = [("idempotency-key", "deploy-2")];
    assert_eq!(
        plane.ask("PATCH", "/api/v2/deployments/late", "", &retry, Some(r#"{"replicas":0}"#)).await.0,
        404
    );
    assert_eq!(plane.call("PUT", "/api/v2/deployments/late", Some(body)).await.0, 201);
    assert_eq!(
        plane.ask("PATCH", "/api/v2/deployments/late", "", &retry, Some(r#"{"replicas":0}"#)).await.0,
        200
    );
    assert_eq!(plane.ask("PUT", AT, "", &[("idempotency-key", "")], Some(body)).await.0, 400);
    // Many at once: one does it, and the others are told that it is so, or that it is under way.
    let same = [("idempotency-key", "deploy-3")];
    let all = (0..8).map(|_| plane.ask("PUT", "/api/v2/deployments/race", "", &same, Some(body)));
    let mut statuses: Vec<u16> =
        futures_util::future::join_all(all).await.iter().map(|(status, ..)| *status).collect();
    statuses.sort_unstable();
    let done = statuses.iter().filter(|status| **status == 201).count();
    assert!(done >= 1 && statuses.iter().all(|s| [200, 201, 409].contains(s)), "{statuses:?}");
    let audit = plane.get("/api/v2/audit?model=race").await;
    assert_eq!(audit["records"].as_array().unwrap().len(), 1, "{audit}");
    plane.stop().await;
    let plane = Plane::start(dir.path()).await;
    let (status, again, _) = plane.ask("PUT", AT, "", &key, Some(body)).await;
    assert_eq!((status, &again), (201, &first), "also after a restart");
    plane.stop().await;
}

#[tokio::test]
async fn lists_come_in_pages() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start(dir.path()).await;
    for n in 0..7 {
        plane.call("PUT", &format!("/api/v2/deployments/a%2Fm{n}"), Some(r#"{"replicas":0}"#)).await;
    }
    for (things, path, expected) in [
        ("deployments", "/api/v2/deployments", 7),
        ("models", "/api/v2/models", 7),
        ("routes", "/api/v2/routes", 7),
        ("records", "/api/v2/audit", 7),
        ("endpoints", "/api/v2/endpoints", 0),
        ("nodes", "/api/v2/nodes", 0),
        ("proxies", "/api/v2/proxies", 0),
        ("tokens", "/api/v2/tokens", 0),
        ("placements", "/api/v2/placements", 0),
    ] {
        let (mut seen, mut cursor) = (Vec::<Value>::new(), String::new());
        loop {
            let page = plane.get(&format!("{path}?limit=3{cursor}")).await;
            let items = page[things].as_array().unwrap();
            assert!(items.len() <= 3);
            seen.extend(items.clone());
            let Some(next) = page["next_cursor"].as_str() else { break };
            cursor = format!("&cursor={}", next.replace('%', "%25"));
        }
        let whole = plane.get(path).await;
        assert_eq!((seen.len(), whole["next_cursor"].clone()), (expected, Value::Null), "{path}");
        let whole = whole[things].as_array().unwrap();
        let names =
            |all: &[Value]| all.iter().map(|v| (v["model"].clone(), v["name"].clone())).collect::<Vec<_>>();
        assert_eq!(names(&seen), names(whole), "{path}");
        for (query, field) in
            [("limit=0", "limit"), ("limit=x", "limit"), ("cursor=%00", "cursor"), ("page=2", "page")]
        {
            let (status, answer) = plane.call("GET", &format!("{path}?{query}"), None).await;
            assert_eq!(
                (status, answer["error"]["field"].as_str()),
                (400, Some(field)),
                "{path}?{query}: {answer}"
            );
        }
    }
    plane.stop().await;
}

#[tokio::test]
async fn every_change_is_recorded_and_tampering_shows() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start_with(dir.path(), |config| config.auth.tokens = vec!["t:admin".into()]).await;
    let ask =
        async |method: &str, path: &str, body: Option<&str>| plane.ask(method, path, "t", &[], body).await;
    let body = r#"{"replicas":0,"env":{"HF_TOKEN":"s3cret"}}"#;
    let (_, put, _) = ask("PUT", AT, Some(body)).await;
    ask("PATCH", AT, Some(r#"{"replicas":1}"#)).await;
    ask("PATCH", AT, Some(r#"{"replicas":1}"#)).await; // changes nothing
    ask("PUT", "/api/v2/routes/chat", Some(r#"{"targets":[{"model":"m"}]}"#)).await;
    ask("PATCH", "/api/v2/nodes/n", Some(r#"{"labels":{"a":"b"}}"#)).await;
    ask("POST", "/api/v2/nodes/n/cordon", Some(r#"{"reason":"dust"}"#)).await;
    ask("POST", "/api/v2/tokens", Some(r#"{"name":"ci","role":"viewer"}"#)).await;
    ask("DELETE", "/api/v2/routes/chat", None).await;
    let (_, page, _) = ask("GET", "/api/v2/audit", None).await;
    let records = page["records"].as_array().unwrap();
    let told = |r: &Value| {
        format!(
            "{} {} {}",
            r["method"].as_str().unwrap(),
            r["kind"].as_str().unwrap(),
            r["name"].as_str().unwrap()
        )
    };
    let all: Vec<String> = records.iter().rev().map(told).collect();
    assert_eq!(
        all,
        [
            "PUT deployment m",
            "PATCH deployment m",
            "PUT route chat",
            "PATCH node n",
            "POST node n",
            "POST token ci",
            "DELETE route chat",
        ]
    );
    let first = records.last().unwrap();
    assert_eq!(
        (first["number"].as_u64(), &first["before"], &first["revision"]),
        (Some(1), &Value::Null, &put["revision"])
    );
    assert_eq!(
        (first["after"]["env"]["HF_TOKEN"].as_str(), first["role"].as_str()),
        (Some("***"), Some("admin"))
    );
    assert!(first["actor"].as_str().unwrap().starts_with("settings-"));
    assert!(first["peer"].as_str().unwrap().starts_with("127.0.0.1:"));
    let second = &records[records.len() - 2];
    assert_eq!((&second["before"]["replicas"], &second["after"]["replicas"]), (&json!(0), &json!(1)));
    assert_eq!(second["prev"], first["hash"]);
    let (_, of_m, _) = ask("GET", "/api/audit-logs?model=m&kind=deployment&limit=1", None).await;
    assert_eq!(
        (told(&of_m["records"][0]).as_str(), of_m["next_cursor"].as_str()),
        ("PATCH deployment m", Some("2"))
    );
    let (_, none, _) = ask("GET", "/api/v2/audit?actor=nobody", None).await;
    assert_eq!(none["records"], json!([]));
    let (_, whole, _) = ask("GET", "/api/v2/audit/verify", None).await;
    assert_eq!(
        (whole["intact"].as_bool(), whole["first"].as_u64(), whole["last"].as_u64()),
        (Some(true), Some(1), Some(7))
    );
    let noted = format!("/api/v2/audit/verify?number=3&hash={}", records[4]["hash"].as_str().unwrap());
    assert_eq!(ask("GET", &noted, None).await.1["noted"], true);
    assert_eq!(ask("GET", &noted.replace("number=3", "number=4"), None).await.1["noted"], false);
    assert_eq!(ask("GET", "/api/v2/audit/verify?number=3", None).await.0, 400);
    plane.stop().await;

    // Somebody with the store's file makes one record say something else.
    let store = EmbeddedStore::open(&dir.path().join("store.redb"), 100).await.unwrap();
    let key = keys::audit_record(2);
    let value = String::from_utf8(store.get(&key).await.unwrap().unwrap().value.to_vec()).unwrap();
    let other = value.replace("settings-", "sittings-");
    assert_ne!(other, value);
    store.txn(Txn::new().put(key, other)).await.unwrap();
    store.close().await;
    let plane = Plane::start(dir.path()).await;
    let verdict = plane.ask("GET", "/api/v2/audit/verify", "t", &[], None).await;
    assert_eq!(verdict.0, 401, "the settings' token is not set here, the stored one keeps it closed");
    plane.stop().await;
    let plane = Plane::start_with(dir.path(), |config| config.auth.tokens = vec!["t:admin".into()]).await;
    let (_, verdict, _) = plane.ask("GET", "/api/v2/audit/verify", "t", &[], None).await;
    assert_eq!(
        (verdict["intact"].as_bool(), verdict["broken"]["number"].as_u64()),
        (Some(false), Some(2)),
        "{verdict}"
    );
    plane.stop().await;
}

#[tokio::test]
async fn old_records_go_and_the_rest_still_holds() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::start_with(dir.path(), |config| config.audit.keep = 100).await;
    for n in 0..230 {
        let body = format!(r#"{{"labels":{{"n":"{n}"}}}}"#);
        assert_eq!(plane.call("PATCH", "/api/v2/nodes/n", Some(&body)).await.0, 200);
    }
    let verdict = plane.get("/api/v2/audit/verify").await;
    assert_eq!(
        (verdict["intact"].as_bool(), verdict["first"].as_u64(), verdict["last"].as_u64()),
        (Some(true), Some(131), Some(230)),
        "{verdict}"
    );
    let page = plane.get("/api/v2/audit").await;
    let numbers: Vec<u64> =
        page["records"].as_array().unwrap().iter().map(|r| r["number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (131..=230).rev().collect::<Vec<_>>());
    assert_eq!(page["next_cursor"], Value::Null);
    plane.stop().await;
}

#[tokio::test]
async fn what_is_observed_is_told_in_json() {
    let dir = tempfile::tempdir().unwrap();
    let plane =
        Plane::start_with(dir.path(), |config| config.observe.router_url = "http://127.0.0.1:1".into()).await;
    plane.call("PUT", AT, Some(r#"{"replicas":2}"#)).await;
    let waiting = common::wait("what it waits for", async || {
        let waiting = plane.get("/api/observe/waiting").await;
        waiting["models"][0]["waiting"][0].is_string().then_some(waiting)
    })
    .await;
    assert_eq!((&waiting["models"][0]["model"], &waiting["models"][0]["wanted"]), (&json!("m"), &json!(2)));
    let metrics = plane.get("/api/observe/metrics").await;
    let metrics = metrics["metrics"].as_array().unwrap();
    let deployments = metrics.iter().find(|m| m["name"] == "penstock_controlplane_deployments").unwrap();
    assert_eq!((&deployments["kind"], &deployments["samples"][0]["value"]), (&json!("gauge"), &json!(1.0)));
    let router = plane.get("/api/observe/router").await;
    assert!(router["healthy"] == false && !router["error"].as_str().unwrap().is_empty(), "{router}");
    for path in ["/api/v2/logs?lines=1000", "/v1/admin/logs?lines=1"] {
        assert!(plane.get(path).await["lines"].is_array(), "{path}");
    }
    for path in ["/api/v2/logs?lines=0", "/v1/admin/logs?lines=1001", "/api/v2/logs?line=5"] {
        assert_eq!(plane.call("GET", path, None).await.0, 400, "{path}");
    }
    let document = plane.get("/openapi.json").await;
    assert_eq!(document["openapi"], "3.1.0");
    plane.stop().await;
}
