//! `penstock verify-chat`: a real completion through the proxy, streamed, with what a user would feel of it.
//!
//! It succeeds only if text came, event by event, and the stream ended as the API says. Which engine answered is asked of
//! the proxy's private port where that is known; not knowing is no failure.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use reqwest::{Client, RequestBuilder, Response, Url};
use serde_json::{Value, json};

use crate::{
    api::{ApiError, root_cause},
    args::VerifyChatArgs,
    output::print,
    up::{last_proxy, last_public},
};

/// A line of a stream is never longer: one event with one token.
const MAX_LINE: usize = 1 << 20;

/// What was seen.
#[derive(Debug, Default)]
struct Seen {
    text: String,
    first_token: Option<Duration>,
    /// Events with text.
    events: u32,
    tokens: Option<u64>,
    finish: Option<String>,
    done: bool,
    error: Option<String>,
}

impl Seen {
    /// Takes one line of the stream.
    fn line(&mut self, line: &str, at: Duration) {
        let Some(data) = line.strip_prefix("data:").map(str::trim) else { return };
        if data == "[DONE]" {
            self.done = true;
            return;
        }
        let event: Value = match serde_json::from_str(data) {
            Ok(event) => event,
            Err(error) => {
                self.error.get_or_insert(format!("an event is not JSON: {error}"));
                return;
            }
        };
        if let Some(error) = event.get("error") {
            let message = error.get("message").and_then(Value::as_str).map(str::to_owned);
            self.error.get_or_insert(message.unwrap_or_else(|| error.to_string()));
        }
        if let Some(tokens) = event.pointer("/usage/completion_tokens").and_then(Value::as_u64) {
            self.tokens = Some(tokens);
        }
        let choice = event.pointer("/choices/0");
        // Models that think aloud say so in a field of their own first.
        let said = ["/delta/content", "/delta/reasoning_content", "/delta/reasoning"];
        let said =
            said.iter().filter_map(|path| choice?.pointer(path)?.as_str()).find(|text| !text.is_empty());
        if let Some(text) = said {
            self.first_token.get_or_insert(at);
            self.events += 1;
            self.text.push_str(text);
        }
        if let Some(reason) = choice.and_then(|choice| choice.get("finish_reason")?.as_str()) {
            self.finish = Some(reason.to_owned());
        }
    }

    /// Why this is no success.
    fn fault(&self) -> Option<String> {
        if let Some(error) = &self.error {
            return Some(format!("the stream broke: {error}"));
        }
        if self.text.is_empty() {
            return Some("the answer has no text".into());
        }
        if !self.done {
            return Some("the stream ended before its [DONE]".into());
        }
        None
    }
}

pub(super) async fn verify(args: &VerifyChatArgs) -> Result<(), ApiError> {
    let data_dir = args.data_dir.as_deref();
    let (address, origin) = match &args.proxy {
        Some(address) => (address.clone(), "--proxy or PENSTOCK_PROXY_URL".to_owned()),
        None => {
            last_public(data_dir).unwrap_or_else(|| ("http://127.0.0.1:8081".into(), "the default".into()))
        }
    };
    let base = Url::parse(&address).ok().filter(|url| url.scheme() == "http" && url.host_str().is_some());
    let base = base.ok_or_else(|| {
        ApiError::Usage(format!("{origin}: {address:?} is no address of a proxy; accepted: http://HOST:PORT"))
    })?;
    let client = Client::builder()
        .no_proxy()
        .connect_timeout(Duration::from_secs(3))
        .timeout(Duration::from_secs(args.timeout_s))
        .build()
        .map_err(|e| ApiError::Usage(format!("cannot set up HTTP: {e}")))?;
    let proxy = Proxy { client, base, origin, key: args.api_key.clone() };
    let model = match &args.model {
        Some(model) => model.clone(),
        None => proxy.first_model().await?,
    };
    let body = json!({
        "model": model, "stream": true, "max_tokens": args.max_tokens,
        "stream_options": { "include_usage": true },
        "messages": [{ "role": "user", "content": args.prompt }],
    });
    let started = Instant::now();
    let ask = proxy.post("v1/chat/completions")?.header("x-penstock-explain", "1").json(&body);
    let answer = proxy.answered(ask).await?;
    let header = |name: &str| answer.headers().get(name)?.to_str().ok().map(str::to_owned);
    let (request_id, by_model) = (header("x-request-id"), header("x-penstock-model"));
    let seen = read(answer, started, &proxy).await?;
    let total = started.elapsed();
    let engine = engine(&proxy.client, data_dir, request_id.as_deref()).await;
    let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let fault = seen.fault();
    let report = json!({
        "ok": fault.is_none(), "model": model, "answered_by_model": by_model, "engine": engine,
        "request_id": request_id, "ttft_ms": seen.first_token.map(ms), "total_ms": ms(total),
        "tokens": seen.tokens, "events": seen.events, "finish_reason": seen.finish, "text": seen.text,
        "fault": fault,
    });
    match args.json {
        true => print(&format!("{report:#}\n"))?,
        false => print(&story(&report))?,
    }
    fault.map_or(Ok(()), |fault| Err(ApiError::Found(fault)))
}

struct Proxy {
    client: Client,
    base: Url,
    origin: String,
    key: Option<String>,
}

impl Proxy {
    fn url(&self, path: &str) -> Result<Url, ApiError> {
        self.base.join(path).map_err(|e| ApiError::Usage(format!("{}: {e}", self.base)))
    }

    fn with_key(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    fn post(&self, path: &str) -> Result<RequestBuilder, ApiError> {
        Ok(self.with_key(self.client.post(self.url(path)?)))
    }

    fn unreachable(&self, error: &reqwest::Error) -> ApiError {
        let url = self.base.as_str().trim_end_matches('/').to_owned();
        ApiError::ProxyUnreachable { url, origin: self.origin.clone(), reason: root_cause(error) }
    }

    async fn answered(&self, request: RequestBuilder) -> Result<Response, ApiError> {
        let answer = request.send().await.map_err(|error| self.unreachable(&error))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let body = answer.bytes().await.unwrap_or_default();
        let said = serde_json::from_slice::<Value>(&body).ok();
        let message = said.as_ref().and_then(|said| said.pointer("/error/message")?.as_str());
        let message = message.map_or_else(|| String::from_utf8_lossy(&body).into_owned(), str::to_owned);
        Err(ApiError::Found(format!("the proxy answered {status}: {message}")))
    }

    async fn first_model(&self) -> Result<String, ApiError> {
        let ask = self.with_key(self.client.get(self.url("v1/models")?));
        let models: Value =
            self.answered(ask).await?.json().await.map_err(|e| ApiError::Malformed {
                call: "GET /v1/models".into(),
                message: root_cause(&e),
            })?;
        let first = models.pointer("/data/0/id").and_then(Value::as_str).map(str::to_owned);
        first.ok_or_else(|| {
            ApiError::NotFound("the proxy serves no model: `penstock deploy MODEL` makes one".into())
        })
    }
}

async fn read(answer: Response, started: Instant, proxy: &Proxy) -> Result<Seen, ApiError> {
    let (mut seen, mut rest) = (Seen::default(), Vec::new());
    let mut chunks = answer.bytes_stream();
    while let Some(chunk) = chunks.next().await {
        match chunk {
            Ok(chunk) => rest.extend_from_slice(&chunk),
            Err(error) if seen.text.is_empty() => return Err(proxy.unreachable(&error)),
            Err(error) => {
                seen.error.get_or_insert(root_cause(&error));
                return Ok(seen);
            }
        }
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            seen.line(String::from_utf8_lossy(&line).trim_end(), started.elapsed());
        }
        if rest.len() > MAX_LINE {
            seen.error.get_or_insert(format!("a line of the stream is longer than {MAX_LINE} bytes"));
            return Ok(seen);
        }
    }
    Ok(seen)
}

/// The endpoint that answered, as the proxy of an `up` on this machine tells.
async fn engine(
    client: &Client,
    data_dir: Option<&std::path::Path>,
    request: Option<&str>,
) -> Option<String> {
    let (private, _) = last_proxy(data_dir)?;
    let mut url = Url::parse(&private).ok()?;
    url.path_segments_mut().ok()?.clear().extend(["debug", "decisions", request?]);
    // The proxy writes it down once the stream is over, which the client may know first.
    for pause in [0, 50, 100, 200, 400] {
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let decision: Value = client.get(url.clone()).send().await.ok()?.json().await.ok()?;
        let last = decision.get("attempts").and_then(Value::as_array).and_then(|attempts| attempts.last());
        let endpoint = last.and_then(|last| last.get("endpoint")?.as_str());
        if let Some(endpoint) = endpoint.filter(|endpoint| !endpoint.is_empty()) {
            return Some(endpoint.to_owned());
        }
    }
    None
}

fn story(report: &Value) -> String {
    let text = |key: &str| match report.get(key) {
        None | Some(Value::Null) => "?".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    let by = match report.get("answered_by_model").and_then(Value::as_str) {
        Some(by) => format!("{} (answered by {by})", text("model")),
        None => text("model"),
    };
    format!(
        "{}\n\nmodel            {by}\nengine           {}\nfirst token      {} ms\nwhole answer     {} ms, {} tokens in {} \
         events, ended by {}\nrequest          {}\n",
        text("text").trim(),
        text("engine"),
        text("ttft_ms"),
        text("total_ms"),
        text("tokens"),
        text("events"),
        text("finish_reason"),
        text("request_id"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(lines: &[&str]) -> Seen {
        let mut seen = Seen::default();
        for (n, line) in lines.iter().enumerate() {
            seen.line(line, Duration::from_millis(n as u64));
        }
        seen
    }

    #[test]
    fn a_whole_stream_is_a_success_and_its_first_text_counts() {
        let seen = seen(&[
            "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}",
            ": a comment",
            "data: {\"choices\":[{\"delta\":{\"content\":\"he\"}}]}",
            "data: {\"choices\":[{\"delta\":{\"content\":\"y\"},\"finish_reason\":\"stop\"}]}",
            "data: {\"choices\":[],\"usage\":{\"completion_tokens\":2}}",
            "data: [DONE]",
        ]);
        assert_eq!(seen.fault(), None);
        assert_eq!((seen.text.as_str(), seen.first_token), ("hey", Some(Duration::from_millis(2))));
        assert_eq!((seen.events, seen.tokens, seen.finish.as_deref()), (2, Some(2), Some("stop")));
    }

    #[test]
    fn what_is_no_answer_is_told() {
        let said = "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}";
        for (lines, part) in [
            (&["data: [DONE]"][..], "no text"),
            (&[said], "before its [DONE]"),
            (&[said, "data: {\"error\":{\"message\":\"engine died\"}}"], "engine died"),
            (&[said, "data: {{"], "not JSON"),
        ] {
            let fault = seen(lines).fault().unwrap();
            assert!(fault.contains(part), "{fault}");
        }
    }
}
