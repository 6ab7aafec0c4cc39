//! A decision record as a story for people: what was asked, where each attempt went and why, how it ended. Pure.
//!
//! Fields that an older proxy does not send have defaults; those that a newer one adds are left out.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::output::table;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Decision {
    why: String,
    request: Request,
    attempts: Vec<Attempt>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Request {
    time: String,
    request_id: String,
    client: Option<String>,
    key: String,
    method: String,
    path: String,
    model: String,
    deployment: String,
    status: u16,
    outcome: String,
    blame: String,
    error: String,
    bytes_in: u64,
    bytes_out: u64,
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    queue_ms: f64,
    resumes: u32,
    resume_ms: f64,
    resume_refused: String,
    ttft_ms: Option<f64>,
    itl_mean_ms: Option<f64>,
    itl_max_ms: Option<f64>,
    duration_ms: f64,
    stream: bool,
    snapshot: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Attempt {
    began_ms: f64,
    endpoint: String,
    policy: String,
    how: String,
    connection: String,
    connected_ms: Option<f64>,
    first_byte_ms: Option<f64>,
    failed_ms: Option<f64>,
    failure: String,
    detail: String,
    next: String,
    considered: Option<Considered>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Considered {
    endpoints: u64,
    candidates: u64,
    out: BTreeMap<String, u64>,
    panic: bool,
    shown: Vec<Candidate>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Candidate {
    id: String,
    local: u32,
    load: u32,
    weight: u32,
    near: bool,
    reported: Option<Reported>,
    health: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Reported {
    running: u32,
    waiting: u32,
    age_ms: u64,
}

/// The story of `decision`, which `proxy` told.
pub(super) fn tell(decision: &Decision, proxy: &str) -> String {
    let mut lines = request(decision, proxy);
    for (index, attempt) in decision.attempts.iter().enumerate() {
        lines.push(String::new());
        tell_attempt(index + 1, attempt, &mut lines);
    }
    if decision.attempts.is_empty() {
        lines.push(String::new());
        lines.push("No engine was asked: it was refused before that.".into());
    }
    lines.push(String::new());
    lines.push(ending(&decision.request));
    // Escapes of the terminal are no part of a story.
    let plain = |line: String| line.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    let lines: Vec<String> = lines.into_iter().flat_map(split).map(plain).collect();
    lines.join("\n") + "\n"
}

/// Tables come as several lines.
fn split(text: String) -> Vec<String> {
    text.split('\n').map(str::to_owned).collect()
}

fn ms(time: f64) -> String {
    match time {
        t if t >= 10_000.0 => format!("{:.1} s", t / 1e3),
        t if t >= 100.0 => format!("{t:.0} ms"),
        t => format!("{t:.1} ms"),
    }
}

fn request(decision: &Decision, proxy: &str) -> Vec<String> {
    let r = &decision.request;
    let why = match decision.why.as_str() {
        "failed" => "it failed",
        "retried" => "an attempt failed",
        "asked" => "the client asked for it",
        "sampled" => "it was sampled",
        other => other,
    };
    let from = r.client.as_deref().unwrap_or("an unknown address");
    let key = if r.key.is_empty() { String::new() } else { format!(", key {}", r.key) };
    let kind = if r.stream { "a stream" } else { "a whole answer" };
    let model = match (r.model.as_str(), r.deployment.as_str()) {
        ("", _) => "no model known".to_owned(),
        (model, "") => format!("model {model:?}"),
        (model, pool) => format!("model {model:?}, pool {pool:?}"),
    };
    vec![
        format!("Request {}, ended {}", r.request_id, r.time),
        format!("  {} {} from {from}{key}: {model}, {kind}, {} bytes", r.method, r.path, r.bytes_in),
        format!("  recorded by {proxy} because {why}; tables {}", r.snapshot),
    ]
}

fn tell_attempt(number: usize, attempt: &Attempt, lines: &mut Vec<String>) {
    let at = ms(attempt.began_ms);
    match attempt.endpoint.as_str() {
        "" => lines.push(format!("Pick {number}, after {at}: no endpoint was left")),
        endpoint => lines.push(format!(
            "Attempt {number}, after {at}: {endpoint} ({}, {})",
            attempt.policy,
            match attempt.how.as_str() {
                "affine" => "its session's or its prompt's",
                "spilled" => "the one with affinity was too busy",
                how => how,
            }
        )),
    }
    match &attempt.considered {
        Some(seen) => considered(seen, &attempt.endpoint, lines),
        None => lines.push("  what the pick looked at was not recorded (send x-penstock-explain: 1)".into()),
    }
    if let Some(time) = attempt.connected_ms {
        lines.push(format!("  {} connection after {}", attempt.connection, ms(time)));
    }
    if let Some(time) = attempt.first_byte_ms {
        lines.push(format!("  first byte of its answer after {}", ms(time)));
    }
    if !attempt.failure.is_empty() {
        let after = attempt.failed_ms.map(|time| format!(" after {}", ms(time))).unwrap_or_default();
        let detail = if attempt.detail.is_empty() { String::new() } else { format!(": {}", attempt.detail) };
        lines.push(format!("  failed{after}: {}{detail}", attempt.failure));
        match attempt.next.as_str() {
            "retry" => lines.push("  so another endpoint was tried".into()),
            "resume" => lines.push("  so another endpoint was asked to go on with the stream".into()),
            "resend" => lines.push("  so it was sent again: the engine never saw it".into()),
            "give_up" => {
                lines.push("  and it was not tried again: not safe, or no attempts or no budget left".into())
            }
            _ => {}
        }
    }
}

fn considered(seen: &Considered, chosen: &str, lines: &mut Vec<String>) {
    let out: Vec<String> = seen.out.iter().map(|(filter, count)| format!("{count} {filter}")).collect();
    let out = if out.is_empty() { String::new() } else { format!("; left out: {}", out.join(", ")) };
    lines.push(format!("  {} of {} endpoints could take it{out}", seen.candidates, seen.endpoints));
    if seen.panic {
        lines.push("  panic: too many were out for their health, so it was not looked at".into());
    }
    if seen.shown.is_empty() {
        return;
    }
    let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
    let rows = seen.shown.iter().map(|c| {
        let mark = if c.id == chosen { "* " } else { "  " };
        let weight = format!("{}%", c.weight / 10);
        let (local, load) = (c.local.to_string(), c.load.to_string());
        let reported = c.reported.as_ref().map_or_else(
            || "-".to_owned(),
            |said| format!("{}+{}, {} ms ago", said.running, said.waiting, said.age_ms),
        );
        [format!("{mark}{}", c.id), load, local, reported, weight, yes(c.near), c.health.clone()]
    });
    let text = table(["  ENDPOINT", "LOAD", "OWN", "REPORTED", "WEIGHT", "NEAR", "HEALTH"], rows);
    lines.extend(text.trim_end().lines().map(|line| format!("    {line}")));
    let more = seen.candidates.saturating_sub(seen.shown.len() as u64);
    if more > 0 {
        lines.push(format!("      and {more} more"));
    }
}

fn ending(r: &Request) -> String {
    let how = match r.outcome.as_str() {
        "completed" => format!("Answered {}", r.status),
        "client_gone" => "The client left".to_owned(),
        "error" => format!("Refused with {}", r.status),
        "cut" => format!("Broken off after it had begun, with an error event ({})", r.status),
        other => format!("Ended: {other} ({})", r.status),
    };
    let blame = match (r.blame.as_str(), r.error.as_str()) {
        ("none" | "", _) => String::new(),
        (blame, "") => format!(", by fault of the {blame}"),
        (blame, error) => format!(", {error}, by fault of the {blame}"),
    };
    let mut text = format!("{how}{blame}, after {}", ms(r.duration_ms));
    if r.queue_ms > 0.0 {
        text += &format!("; {} in the queue", ms(r.queue_ms));
    }
    if r.resumes > 0 {
        let times = if r.resumes == 1 { "once".to_owned() } else { format!("{} times", r.resumes) };
        text += &format!("; went on at another engine {times}, {} in all", ms(r.resume_ms));
    }
    if !r.resume_refused.is_empty() {
        text += &format!("; did not go on elsewhere: {}", r.resume_refused);
    }
    if let Some(time) = r.ttft_ms {
        text += &format!("; first byte after {}", ms(time));
    }
    if let (Some(mean), Some(longest)) = (r.itl_mean_ms, r.itl_max_ms) {
        text += &format!("; gaps {} on average, {} at most", ms(mean), ms(longest));
    }
    let tokens = |count: Option<u64>| count.map_or("?".to_owned(), |count| count.to_string());
    if r.prompt_tokens.is_some() || r.completion_tokens.is_some() {
        text += &format!("; {} tokens in, {} out", tokens(r.prompt_tokens), tokens(r.completion_tokens));
    }
    if r.bytes_out > 0 {
        text += &format!("; {} bytes", r.bytes_out);
    }
    text + "."
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn told(json: serde_json::Value) -> String {
        tell(&serde_json::from_value(json).unwrap(), "http://p:1")
    }

    #[test]
    fn a_retried_request_is_a_story() {
        let text = told(json!({
            "why": "retried",
            "request": {
                "time": "2026-01-01T00:00:00.000Z", "request_id": "ab", "client": "10.0.0.1", "key": "alice",
                "method": "POST", "path": "/v1/completions", "model": "m", "deployment": "m", "status": 200,
                "outcome": "completed", "blame": "none", "bytes_in": 12, "bytes_out": 345, "completion_tokens": 7,
                "ttft_ms": 12.34, "duration_ms": 12_345.0, "snapshot": "1.2", "queue_ms": 0.0,
            },
            "attempts": [
                {"began_ms": 0.1, "endpoint": "e0", "policy": "least_loaded", "how": "balanced", "failed_ms": 0.5,
                 "failure": "connect", "detail": "refused", "next": "retry", "considered": {
                    "endpoints": 4, "candidates": 2, "out": {"draining": 1, "ejected": 1}, "panic": false,
                    "shown": [{"id": "e0", "load": 3, "local": 3, "weight": 1000, "near": true, "health": "admitted",
                               "reported": {"running": 5, "waiting": 1, "age_ms": 120}}]}},
                {"began_ms": 0.7, "endpoint": "e1", "policy": "least_loaded", "how": "spilled", "connection": "new",
                 "connected_ms": 0.2, "first_byte_ms": 11.0},
            ],
        }));
        for part in [
            "POST /v1/completions from 10.0.0.1, key alice: model \"m\", pool \"m\", a whole answer, 12 bytes",
            "recorded by http://p:1 because an attempt failed; tables 1.2",
            "Attempt 1, after 0.1 ms: e0 (least_loaded, balanced)",
            "2 of 4 endpoints could take it; left out: 1 draining, 1 ejected",
            "* e0        3     3    5+1, 120 ms ago  100%    yes   admitted",
            "and 1 more",
            "failed after 0.5 ms: connect: refused",
            "so another endpoint was tried",
            "new connection after 0.2 ms",
            "Answered 200, after 12.3 s; first byte after 12.3 ms; ? tokens in, 7 out; 345 bytes.",
        ] {
            assert!(text.contains(part), "{part:?} missing in\n{text}");
        }
    }

    #[test]
    fn what_is_missing_or_hostile_still_makes_a_story() {
        let text = told(json!({"request": {"path": "/\u{1b}[31m", "outcome": "error", "status": 404,
            "blame": "client", "error": "unknown_url"}, "something": "new"}));
        assert!(text.contains("No engine was asked"), "{text}");
        assert!(text.contains("Refused with 404, unknown_url, by fault of the client"), "{text}");
        assert!(!text.contains('\u{1b}'), "{text}");
    }
}
