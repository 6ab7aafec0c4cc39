//! Which path is what: methods, keys, faults before a response, and the way to each endpoint.

use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::{
    chat::{self, Origin},
    completions, control,
    error::ApiError,
    faults::{Fault, FaultKind},
    http::{BodyError, Conn, Head, Response},
    messages, other_routes, realtime,
    record::{Recorder, unix_us},
    render::Job,
    request::Fields,
    responses,
    run::{self, Next, flushed},
    state::{Counted, Engine},
};

/// Bodies above this are parsed off the event loop: a megabyte of JSON takes milliseconds.
const INLINE_BODY_BYTES: usize = 64 << 10;

/// Endpoints that generate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Generation {
    Chat,
    Completions,
    Responses,
    Messages,
}

impl Generation {
    fn of(path: &str) -> Option<Self> {
        match path {
            "/v1/chat/completions" => Some(Self::Chat),
            "/v1/completions" => Some(Self::Completions),
            "/v1/responses" => Some(Self::Responses),
            "/v1/messages" => Some(Self::Messages),
            _ => None,
        }
    }

    fn job(self, fields: Fields, origin: &Origin, engine: &super::args::Options) -> Result<Job, ApiError> {
        match self {
            Self::Chat => chat::job(fields, origin, engine),
            Self::Completions => completions::job(fields, origin, engine),
            Self::Responses => responses::job(fields, origin, engine),
            Self::Messages => messages::job(fields, origin, engine),
        }
    }

    fn error_body(self, error: &ApiError) -> String {
        if self == Self::Messages { error.anthropic_body() } else { error.openai_body() }
    }
}

/// Answers one request whose head is read.
pub(super) async fn handle(engine: &Engine, conn: &mut Conn, head: Head) -> Next {
    let path = head.path().to_string();
    // What tests look at is not itself remembered, nor hit by faults.
    if control::is_control(&path) {
        return control::handle(engine, conn, &head).await;
    }
    let number = engine.requests.fetch_add(1, Ordering::Relaxed) + 1;
    let recorder = engine.records.begin(number, head.clone());
    let method = if head.method() == "POST" { "POST" } else { "GET" };
    let next = converse(engine, conn, &recorder, head, &path).await;
    let handler = if other_routes::exists(&path) { path.as_str() } else { "none" };
    let status = match recorder.answered() / 100 {
        2 => "2xx",
        4 => "4xx",
        5 => "5xx",
        _ => "none",
    };
    engine.metrics.http_requests.with_label_values(&[handler, method, status]).inc();
    next
}

async fn converse(engine: &Engine, conn: &mut Conn, recorder: &Recorder, head: Head, path: &str) -> Next {
    let body = match conn.read_body(&head).await {
        Ok(body) => body,
        Err(error) => return refuse_body(conn, recorder, &error).await,
    };
    recorder.body(&body);
    let keep_alive = head.keep_alive();
    if let Some(response) = forbidden(engine, &head, path) {
        return answer(conn, recorder, &response, keep_alive).await;
    }
    let is_post = head.method() == "POST";
    let generation = Generation::of(path).filter(|_| is_post);
    let realtime = path == realtime::PATH;
    let fault = if is_post && other_routes::is_inference(path) || generation.is_some() || realtime {
        engine.take_fault(path)
    } else {
        None
    };
    if let Some(fault) = &fault
        && let Some(next) = before_response(engine, conn, recorder, fault, keep_alive).await
    {
        return next;
    }
    if realtime {
        return realtime::serve(engine, conn, recorder, &head, fault).await;
    }
    match generation {
        Some(generation) => generate(engine, conn, recorder, generation, head, body, fault).await,
        None => {
            let response = other_routes::answer(engine, &head, path, body).await;
            answer(conn, recorder, &response, keep_alive).await
        }
    }
}

async fn generate(
    engine: &Engine,
    conn: &mut Conn,
    recorder: &Recorder,
    generation: Generation,
    head: Head,
    body: Bytes,
    fault: Option<Fault>,
) -> Next {
    let keep_alive = head.keep_alive();
    let given = head.header("x-request-id").filter(|id| !id.is_empty());
    let id =
        given.map_or_else(|| format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..)), String::from);
    recorder.engine_id(&id);
    let headers = response_headers(engine, &head, &id);
    let origin = Origin { id, created: unix_us() / 1_000_000, fingerprint: engine.fingerprint.clone() };
    let job = if body.len() <= INLINE_BODY_BYTES {
        Fields::parse(&head, &body).and_then(|fields| generation.job(fields, &origin, &engine.options))
    } else {
        let options = engine.options.clone();
        let parse =
            move || Fields::parse(&head, &body).and_then(|fields| generation.job(fields, &origin, &options));
        // While megabytes are parsed, the peer may leave: it is seen afterwards.
        tokio::task::spawn_blocking(parse)
            .await
            .unwrap_or_else(|_| Err(ApiError::internal("the request could not be parsed")))
    };
    match job {
        Ok(job) => {
            let headers = if job.stream { headers.0 } else { headers.0 + &headers.1 };
            let _tracked = engine.options.server_load_tracking.then(|| Counted::new(&engine.tracked));
            run::run(engine, conn, recorder, job, fault, &headers, keep_alive).await
        }
        Err(error) => {
            let response = Response::json(error.status, generation.error_body(&error));
            answer(conn, recorder, &response, keep_alive).await
        }
    }
}

/// Header lines of any response to this request, and those of a unary one only.
fn response_headers(engine: &Engine, head: &Head, id: &str) -> (String, String) {
    let echo =
        if engine.options.request_id_headers { format!("x-request-id: {id}\r\n") } else { String::new() };
    let load = match head.header("endpoint-load-metrics-format") {
        Some("TEXT") => {
            let load = engine.scheduler.load();
            format!(
                "endpoint-load-metrics: TEXT named_metrics.num_requests_waiting={:.1}, named_metrics.kv_cache_usage_perc={}\r\n",
                load.waiting as f64, load.kv_used_ratio
            )
        }
        Some("JSON") => {
            let load = engine.scheduler.load();
            format!(
                "endpoint-load-metrics: JSON {{\"named_metrics\": {{\"num_requests_waiting\": {:.1}, \"kv_cache_usage_perc\": {}}}}}\r\n",
                load.waiting as f64, load.kv_used_ratio
            )
        }
        _ => String::new(),
    };
    (echo, load)
}

/// A body that could not be read.
async fn refuse_body(conn: &mut Conn, recorder: &Recorder, error: &BodyError) -> Next {
    let response = match error {
        BodyError::Gone => {
            recorder.end("disconnect");
            return Next::Close;
        }
        BodyError::TooLarge => Response::text(413, "Request body is larger than 64 MiB."),
        BodyError::Invalid => Response::text(400, "Invalid HTTP request received."),
    };
    answer(conn, recorder, &response, false).await;
    Next::Close
}

/// The refusal of a request without a key, where keys are needed.
fn forbidden(engine: &Engine, head: &Head, path: &str) -> Option<Response> {
    let keys = &engine.options.api_keys;
    let guarded = ["/v1", "/v2", "/inference", "/cohere"].iter().any(|prefix| path.starts_with(prefix));
    if keys.is_empty() || !guarded || head.method() == "OPTIONS" {
        return None;
    }
    let given = head.header("authorization").and_then(|v| v.strip_prefix("Bearer "));
    let known = given.is_some_and(|given| keys.iter().any(|key| key == given));
    (!known).then(|| Response::json(401, "{\"error\":\"Unauthorized\"}"))
}

/// Strikes a fault that comes before any byte of the response. None if this one does not.
async fn before_response(
    engine: &Engine,
    conn: &mut Conn,
    recorder: &Recorder,
    fault: &Fault,
    keep_alive: bool,
) -> Option<Next> {
    let at_once = fault.after_tokens.is_none();
    let name = format!("fault {}", fault.kind.name());
    match fault.kind {
        FaultKind::Hang => {
            tokio::select! {
                () = conn.gone() => {
                    engine.disconnects.fetch_add(1, Ordering::Relaxed);
                    recorder.end("disconnect");
                }
                () = engine.closing.cancelled() => recorder.end(&name),
            }
            Some(Next::Close)
        }
        FaultKind::Status | FaultKind::Busy => {
            let error = if fault.kind == FaultKind::Busy {
                ApiError::busy()
            } else {
                ApiError::of_status(fault.status)
            };
            recorder.end(&name);
            Some(answer(conn, recorder, &Response::json(error.status, error.openai_body()), keep_alive).await)
        }
        FaultKind::Reset if at_once => {
            conn.reset();
            recorder.end(&name);
            Some(Next::Close)
        }
        FaultKind::Close if at_once => {
            recorder.end(&name);
            Some(Next::Close)
        }
        FaultKind::GarbageHttp if at_once => {
            conn.out.extend_from_slice(b"ZZ this is not HTTP\r\n\r\n");
            recorder.end(&name);
            flushed(conn, false).await;
            Some(Next::Close)
        }
        FaultKind::Crash if at_once => {
            engine.crash(fault.code);
            Some(Next::Close)
        }
        _ => None,
    }
}

/// Sends a whole response.
async fn answer(conn: &mut Conn, recorder: &Recorder, response: &Response, keep_alive: bool) -> Next {
    recorder.status(response.status);
    conn.respond(response, keep_alive);
    let next = flushed(conn, keep_alive).await;
    recorder.end("finished");
    next
}
