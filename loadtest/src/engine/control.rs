//! `/sim/...`: what tests and operators of the simulator use. No gateway may let anyone reach it.
//!
//! | | |
//! |---|---|
//! | `GET /sim/state` | counts, load, process ids |
//! | `GET /sim/requests?limit=N&id=X` | the newest requests (of that X-Request-Id), oldest first |
//! | `DELETE /sim/requests` | forget them |
//! | `GET`, `POST`, `DELETE /sim/faults` | list; add one fault or a list of them; remove all |

use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use super::{
    faults::{Fault, FaultKind},
    http::{BodyError, Conn, Head, Response},
    record::unix_us,
    run::{Next, flushed},
    state::Engine,
};

/// Requests listed unless asked otherwise.
const DEFAULT_LIMIT: usize = 100;

/// True if a path belongs here.
pub(super) fn is_control(path: &str) -> bool {
    path.starts_with("/sim/")
}

/// Answers one control request.
pub(super) async fn handle(engine: &Engine, conn: &mut Conn, head: &Head) -> Next {
    let body = match conn.read_body(head).await {
        Ok(body) => body,
        Err(BodyError::Gone) => return Next::Close,
        Err(_) => {
            conn.respond(&error(400, "the body cannot be read"), false);
            flushed(conn, false).await;
            return Next::Close;
        }
    };
    let response = match (head.method(), head.path()) {
        ("GET", "/sim/state") => Response::json(200, state(engine).to_string()),
        ("GET", "/sim/requests") => {
            let limit = head.query("limit").map_or(Ok(DEFAULT_LIMIT), str::parse);
            match limit {
                Ok(limit) => Response::json(
                    200,
                    json!({"requests": engine.records.list(limit, head.query("id"))}).to_string(),
                ),
                Err(_) => error(400, "`limit` must be a whole number"),
            }
        }
        ("DELETE", "/sim/requests") => {
            engine.records.clear();
            Response::json(200, "{}")
        }
        ("GET", "/sim/faults") => faults(engine),
        ("DELETE", "/sim/faults") => {
            engine.with_faults(super::faults::FaultTable::clear);
            faults(engine)
        }
        ("POST", "/sim/faults") => match parse(&body) {
            Ok(new) => {
                add(engine, new);
                faults(engine)
            }
            Err(message) => error(400, &message),
        },
        (_, "/sim/state" | "/sim/requests" | "/sim/faults") => error(405, "method not allowed"),
        _ => error(404, "there are /sim/state, /sim/requests and /sim/faults"),
    };
    conn.respond(&response, head.keep_alive());
    flushed(conn, head.keep_alive()).await
}

fn state(engine: &Engine) -> Value {
    let load = engine.scheduler.load();
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    json!({
        "pid": std::process::id(),
        "core_pid": engine.core_pid,
        "model": engine.options.served_name(),
        "phase": format!("{:?}", engine.phase()).to_lowercase(),
        "now_unix_us": unix_us(),
        "in_flight": count(&engine.in_flight),
        "running": load.running,
        "waiting": load.waiting,
        "kv_used_ratio": load.kv_used_ratio,
        "kv_blocks": load.kv_blocks,
        "preemptions": load.preemptions,
        "prefix_queries": load.prefix_queries,
        "prefix_hits": load.prefix_hits,
        "connections": count(&engine.connections),
        "requests": count(&engine.requests),
        "disconnects": count(&engine.disconnects),
        "generated_tokens": engine.metrics.generation_tokens.get(),
    })
}

fn faults(engine: &Engine) -> Response {
    let list = engine.with_faults(|faults| json!({"faults": faults.list()}));
    Response::json(200, list.to_string())
}

fn parse(body: &[u8]) -> Result<Vec<Fault>, String> {
    let value: Value = serde_json::from_slice(body).map_err(|e| format!("not JSON: {e}"))?;
    let items = match value {
        Value::Array(items) => items,
        one => vec![one],
    };
    items
        .into_iter()
        .map(|item| {
            let fault: Fault = serde_json::from_value(item).map_err(|e| e.to_string())?;
            fault.validate()?;
            match fault.kind {
                FaultKind::NeverReady | FaultKind::CrashOnLoad => {
                    Err(format!("`{}` can only be given with --sim-fault", fault.kind.name()))
                }
                _ => Ok(fault),
            }
        })
        .collect()
}

/// Adds faults; a crash without anything to wait for (`count` 0) happens now.
fn add(engine: &Engine, new: Vec<Fault>) {
    if let Some(now) = new.iter().find(|f| f.kind == FaultKind::Crash && f.count == Some(0)) {
        engine.crash(now.code);
    }
    engine.with_faults(|faults| faults.add(new));
}

fn error(status: u16, message: &str) -> Response {
    Response::json(status, json!({"error": message}).to_string())
}
