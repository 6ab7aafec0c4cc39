//! `penstock explain`: asks proxies, on their private ports, how they routed a request.
//!
//! All are asked; the first that knows answers. A proxy that cannot be reached is an error only if no other knows the
//! request, for then nobody can say whether it does.

use std::time::Duration;

use reqwest::{Client, StatusCode, Url};
use serde::Deserialize;
use serde_json::Value;

use super::story::{self, Decision};
use crate::{
    api::{ApiError, root_cause},
    args::ExplainArgs,
    output,
    up::last_proxy,
};

pub(super) async fn run(args: &ExplainArgs) -> Result<(), ApiError> {
    let client = Client::builder()
        .no_proxy()
        .connect_timeout(Duration::from_secs(3))
        .timeout(Duration::from_secs(10))
        .build()
        .map_err(|e| ApiError::Usage(format!("cannot set up HTTP: {e}")))?;
    let proxies = proxies(args)?;
    let (mut silent, mut strangers) = (None, Vec::new());
    for (base, origin) in &proxies {
        match ask(&client, base, origin, &args.request_id).await {
            Ok(Answer::Known(json)) => return show(args, base, &json),
            Ok(Answer::Unknown(why)) => strangers.push(format!("{}: {why}", shown(base))),
            Err(error) => silent = silent.or(Some(error)),
        }
    }
    match silent {
        Some(error) => {
            for stranger in strangers {
                output::say(&stranger);
            }
            Err(error)
        }
        None => Err(ApiError::NotFound(format!(
            "no record of request {}\n{}",
            args.request_id,
            strangers.join("\n")
        ))),
    }
}

fn shown(base: &Url) -> &str {
    base.as_str().trim_end_matches('/')
}

/// Whom to ask, each with where its address came from.
fn proxies(args: &ExplainArgs) -> Result<Vec<(Url, String)>, ApiError> {
    let mut addresses: Vec<(String, String)> =
        args.proxy.iter().map(|address| (address.clone(), "--proxy".to_owned())).collect();
    if addresses.is_empty() {
        let default = || ("http://127.0.0.1:18081".to_owned(), "the default".to_owned());
        addresses.push(last_proxy(args.data_dir.as_deref()).unwrap_or_else(default));
    }
    let parsed = addresses.into_iter().map(|(address, origin)| {
        let wrong = |why: &str| {
            ApiError::Usage(format!(
                "{origin}: {address:?} is no address of a proxy's private port: {why}; accepted: http://HOST:PORT"
            ))
        };
        let url = Url::parse(&address).map_err(|e| wrong(&e.to_string()))?;
        let fine = url.scheme() == "http" && url.host_str().is_some();
        if fine { Ok((url, origin)) } else { Err(wrong("not http")) }
    });
    parsed.collect()
}

enum Answer {
    Known(Value),
    /// And why, in its words.
    Unknown(String),
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Refusal {
    error: Reason,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Reason {
    code: String,
    message: String,
}

async fn ask(client: &Client, base: &Url, origin: &str, request_id: &str) -> Result<Answer, ApiError> {
    let mut url = base.clone();
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.clear().extend(["debug", "decisions", request_id]);
    }
    let call = format!("GET {url}");
    let unreachable = |error: &reqwest::Error| ApiError::ProxyUnreachable {
        url: shown(base).to_owned(),
        origin: origin.to_owned(),
        reason: root_cause(error),
    };
    let response = client.get(url).send().await.map_err(|e| unreachable(&e))?;
    let status = response.status();
    let body = response.bytes().await.map_err(|e| unreachable(&e))?;
    let malformed = |message: String| ApiError::Malformed { call: call.clone(), message };
    if status == StatusCode::OK {
        let json = serde_json::from_slice(&body).map_err(|e| malformed(format!("not JSON: {e}")))?;
        return Ok(Answer::Known(json));
    }
    let refusal: Refusal = serde_json::from_slice(&body).unwrap_or_default();
    match (status, refusal.error.code.as_str()) {
        (StatusCode::NOT_FOUND, "not_found") => Ok(Answer::Unknown(refusal.error.message)),
        _ => Err(malformed(format!("status {status}: is it the private port of a Penstock proxy?"))),
    }
}

fn show(args: &ExplainArgs, base: &Url, json: &Value) -> Result<(), ApiError> {
    if args.json {
        return Ok(output::print(&format!("{json:#}\n"))?);
    }
    let decision = Decision::deserialize(json).map_err(|e| ApiError::Malformed {
        call: format!("GET {}/debug/decisions/{}", shown(base), args.request_id),
        message: e.to_string(),
    })?;
    Ok(output::print(&story::tell(&decision, shown(base)))?)
}
