//! One method per call of the control plane's REST API.

use std::time::Duration;

use reqwest::{Client, Method, Response, StatusCode, Url};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::*;

/// For an answer that goes on until whoever asked goes: longer than anybody looks.
const ENDLESS: Duration = Duration::from_secs(30 * 24 * 3_600);
/// Things asked for at once.
const PAGE: usize = 500;

/// A control plane at an address.
#[derive(Debug, Clone)]
pub(crate) struct ControlPlane {
    base: Url,
    /// Where the address came from, for the error that nobody answers there.
    origin: String,
    client: Client,
    /// Shown to the control plane as who asks.
    token: Option<String>,
}

/// What a call says beside its path.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ask<'a> {
    pub(crate) query: &'a [(&'a str, String)],
    pub(crate) headers: &'a [(&'a str, String)],
    pub(crate) body: Option<&'a Value>,
}

impl ControlPlane {
    /// `address` is `http://HOST:PORT`; `origin` says where it came from ("--controlplane", "the default").
    pub(crate) fn new(address: &str, origin: &str, token: Option<String>) -> Result<Self, ApiError> {
        let wrong = |why: String| {
            ApiError::Usage(format!(
                "{origin}: {address:?} is no address of a control plane: {why}; accepted: http://HOST:PORT"
            ))
        };
        let base = Url::parse(address).map_err(|e| wrong(e.to_string()))?;
        if base.scheme() != "http" || base.host_str().is_none() {
            return Err(wrong("not http".into()));
        }
        // No proxy of the environment: control planes are neighbours, and often on the loopback address.
        let client = Client::builder()
            .no_proxy()
            .connect_timeout(Duration::from_secs(3))
            .timeout(Duration::from_secs(30))
            .build()
            .map_err(|e| ApiError::Usage(format!("cannot set up HTTP: {e}")))?;
        Ok(Self { base, origin: origin.into(), client, token })
    }

    /// `http://HOST:PORT`.
    pub(crate) fn address(&self) -> &str {
        self.base.as_str().trim_end_matches('/')
    }

    pub(crate) async fn status(&self) -> Result<Reply<ClusterStatus>, ApiError> {
        self.call(Method::GET, &["api", "v2", "cluster", "status"], None::<&()>).await
    }

    pub(crate) async fn models(&self) -> Result<Reply<Models>, ApiError> {
        self.call(Method::GET, &["api", "v2", "models"], None::<&()>).await
    }

    pub(crate) async fn endpoints(&self) -> Result<Reply<Endpoints>, ApiError> {
        self.call(Method::GET, &["api", "v2", "endpoints"], None::<&()>).await
    }

    pub(crate) async fn nodes(&self) -> Result<Reply<Nodes>, ApiError> {
        self.call(Method::GET, &["api", "v2", "nodes"], None::<&()>).await
    }

    pub(crate) async fn proxies(&self) -> Result<Reply<Proxies>, ApiError> {
        self.call(Method::GET, &["api", "v2", "proxies"], None::<&()>).await
    }

    pub(crate) async fn deployments(&self) -> Result<Reply<Deployments>, ApiError> {
        self.call(Method::GET, &["api", "v2", "deployments"], None::<&()>).await
    }

    pub(crate) async fn deployment(&self, model: &str) -> Result<Reply<Deployment>, ApiError> {
        self.call(Method::GET, &["api", "v2", "deployments", model], None::<&()>).await
    }

    pub(crate) async fn deploy(
        &self,
        model: &str,
        spec: &DeploymentSpec,
    ) -> Result<Reply<Deployment>, ApiError> {
        self.call(Method::PUT, &["api", "v2", "deployments", model], Some(spec)).await
    }

    pub(crate) async fn scale(&self, model: &str, replicas: u32) -> Result<Reply<Deployment>, ApiError> {
        let body = serde_json::json!({ "replicas": replicas });
        self.call(Method::PATCH, &["api", "v2", "deployments", model], Some(&body)).await
    }

    pub(crate) async fn delete(&self, model: &str) -> Result<Reply<Deployment>, ApiError> {
        self.call(Method::DELETE, &["api", "v2", "deployments", model], None::<&()>).await
    }

    pub(crate) async fn routes(&self) -> Result<Reply<Routes>, ApiError> {
        self.call(Method::GET, &["api", "v2", "routes"], None::<&()>).await
    }

    pub(crate) async fn set_route(&self, name: &str, spec: &RouteSpec) -> Result<Reply<Route>, ApiError> {
        self.call(Method::PUT, &["api", "v2", "routes", name], Some(spec)).await
    }

    pub(crate) async fn delete_route(&self, name: &str) -> Result<Reply<Route>, ApiError> {
        self.call(Method::DELETE, &["api", "v2", "routes", name], None::<&()>).await
    }

    /// `move_streams`: its streams go on at others.
    pub(crate) async fn drain(
        &self,
        endpoint: &str,
        move_streams: bool,
    ) -> Result<Reply<Endpoint>, ApiError> {
        // Not said where it is not asked for: a control plane of before it existed would refuse it.
        let query = move_streams.then(|| ("move_streams", "true".to_owned()));
        let ask = Ask { query: query.as_slice(), ..Ask::default() };
        let path = ["api", "v2", "endpoints", endpoint, "drain"];
        let (call, response) = self.send(Method::POST, &path, &ask).await?;
        self.read(call, response).await
    }

    pub(crate) async fn undrain(&self, endpoint: &str) -> Result<Reply<Endpoint>, ApiError> {
        self.call(Method::POST, &["api", "v2", "endpoints", endpoint, "undrain"], None::<&()>).await
    }

    pub(crate) async fn endpoint(&self, endpoint: &str) -> Result<Reply<Endpoint>, ApiError> {
        self.call(Method::GET, &["api", "v2", "endpoints", endpoint], None::<&()>).await
    }

    pub(crate) async fn node(&self, node: &str) -> Result<Reply<Node>, ApiError> {
        self.call(Method::GET, &["api", "v2", "nodes", node], None::<&()>).await
    }

    /// Everything of a kind, page by page.
    pub(crate) async fn list(&self, things: &str) -> Result<Vec<Value>, ApiError> {
        let mut all = Vec::new();
        let mut query = vec![("limit", PAGE.to_string())];
        loop {
            let ask = Ask { query: &query, ..Ask::default() };
            let page = self.ask(Method::GET, &["api", "v2", things], &ask).await?;
            let items = page.get(things).and_then(Value::as_array).ok_or_else(|| ApiError::Malformed {
                call: format!("GET /api/v2/{things}"),
                message: format!("there is no list {things:?} in it"),
            })?;
            all.extend(items.iter().cloned());
            match page.get("next_cursor").and_then(Value::as_str) {
                // A cursor that stands still would go on for ever.
                Some(next) if !items.is_empty() => {
                    query = vec![("limit", PAGE.to_string()), ("cursor", next.to_owned())]
                }
                _ => return Ok(all),
            }
        }
    }

    /// `word`: "cordon", "maintenance" or "uncordon".
    pub(crate) async fn speak_of_node(
        &self,
        node: &str,
        word: &str,
        reason: Option<&str>,
    ) -> Result<Reply<Node>, ApiError> {
        let body = reason.map(|reason| serde_json::json!({ "reason": reason }));
        self.call(Method::POST, &["api", "v2", "nodes", node, word], body.as_ref()).await
    }

    /// Wants a model on a node's disks, or does not any more.
    pub(crate) async fn prefetch(
        &self,
        node: &str,
        model: &str,
        remove: bool,
    ) -> Result<Reply<serde_json::Value>, ApiError> {
        let body = serde_json::json!({ "model": model, "remove": remove });
        self.call(Method::POST, &["api", "v2", "nodes", node, "prefetch"], Some(&body)).await
    }

    pub(crate) async fn revisions(&self, model: &str) -> Result<Reply<Revisions>, ApiError> {
        self.call(Method::GET, &["api", "v2", "revisions", model], None::<&()>).await
    }

    pub(crate) async fn diff(
        &self,
        model: &str,
        from: Option<u64>,
        to: Option<u64>,
    ) -> Result<Reply<Differences>, ApiError> {
        let given = [("from", from), ("to", to)].into_iter().filter_map(|(key, n)| Some((key, n?)));
        let query: Vec<(&str, u64)> = given.collect();
        self.call_with(Method::GET, &["api", "v2", "diff", model], &query, None::<&()>).await
    }

    pub(crate) async fn rollback(&self, model: &str, to: Option<u64>) -> Result<Reply<Deployment>, ApiError> {
        let body = to.map(|to| serde_json::json!({ "to": to }));
        self.call(Method::POST, &["api", "v2", "rollback", model], body.as_ref()).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &[&str],
        body: Option<&impl Serialize>,
    ) -> Result<Reply<T>, ApiError> {
        self.call_with(method, path, &[], body).await
    }

    async fn call_with<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &[&str],
        query: &[(&str, u64)],
        body: Option<&impl Serialize>,
    ) -> Result<Reply<T>, ApiError> {
        let query: Vec<(&str, String)> = query.iter().map(|(key, value)| (*key, value.to_string())).collect();
        let body = body.map(serde_json::to_value).transpose().map_err(|e| ApiError::Usage(e.to_string()))?;
        let ask = Ask { query: &query, headers: &[], body: body.as_ref() };
        let (call, response) = self.send(method, path, &ask).await?;
        self.read(call, response).await
    }

    /// One call of any part of the API. What comes back is JSON.
    pub(crate) async fn ask(&self, method: Method, path: &[&str], ask: &Ask<'_>) -> Result<Value, ApiError> {
        let (call, response) = self.send(method, path, ask).await?;
        self.read::<Value>(call, response).await.map(|reply| reply.json)
    }

    /// The same of a GET without more.
    pub(crate) async fn get(&self, path: &[&str]) -> Result<Value, ApiError> {
        self.ask(Method::GET, path, &Ask::default()).await
    }

    /// The body of an answer as it came, for documents; without the deadline of a call.
    pub(crate) async fn document(&self, path: &[&str]) -> Result<Vec<u8>, ApiError> {
        let (call, response) = self.send(Method::GET, path, &Ask::default()).await?;
        let status = response.status();
        let body = response.bytes().await.map_err(|e| self.unreachable(&e))?;
        match status.is_success() {
            true => Ok(body.into()),
            false => Err(refusal(call, status, serde_json::from_slice(&body).ok())),
        }
    }

    /// The body of an answer part by part, as it comes, for as long as it goes on.
    pub(crate) async fn stream(&self, path: &[&str], ask: &Ask<'_>) -> Result<Parts, ApiError> {
        let (call, response) = self.within(Method::GET, path, ask, Some(ENDLESS)).await?;
        let status = response.status();
        if status.is_success() {
            return Ok(Parts { call, response });
        }
        let body = response.bytes().await.map_err(|e| self.unreachable(&e))?;
        Err(refusal(call, status, serde_json::from_slice(&body).ok()))
    }

    async fn send(
        &self,
        method: Method,
        path: &[&str],
        ask: &Ask<'_>,
    ) -> Result<(String, Response), ApiError> {
        self.within(method, path, ask, None).await
    }

    /// With another deadline than a call's.
    async fn within(
        &self,
        method: Method,
        path: &[&str],
        ask: &Ask<'_>,
        deadline: Option<Duration>,
    ) -> Result<(String, Response), ApiError> {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.clear().extend(path); // percent-encodes each: a model's name may hold '/'
        }
        for (key, value) in ask.query {
            url.query_pairs_mut().append_pair(key, value);
        }
        let call = format!("{method} {url}");
        let mut request = self.client.request(method, url);
        if let Some(deadline) = deadline {
            request = request.timeout(deadline);
        }
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        for (name, value) in ask.headers {
            request = request.header(*name, value);
        }
        if let Some(body) = ask.body {
            request = request.json(body);
        }
        let response = request.send().await.map_err(|e| self.unreachable(&e))?;
        Ok((call, response))
    }

    async fn read<T: DeserializeOwned>(
        &self,
        call: String,
        response: Response,
    ) -> Result<Reply<T>, ApiError> {
        let status = response.status();
        let body = response.bytes().await.map_err(|e| self.unreachable(&e))?;
        let json = serde_json::from_slice::<Value>(&body);
        if !status.is_success() {
            return Err(refusal(call, status, json.ok()));
        }
        let json =
            json.map_err(|e| ApiError::Malformed { call: call.clone(), message: format!("not JSON: {e}") })?;
        let value =
            T::deserialize(&json).map_err(|e| ApiError::Malformed { call, message: e.to_string() })?;
        Ok(Reply { json, value })
    }

    fn unreachable(&self, error: &reqwest::Error) -> ApiError {
        let url = self.address().to_owned();
        ApiError::Unreachable { url, origin: self.origin.clone(), reason: root_cause(error) }
    }
}

/// An answer that comes bit by bit.
#[derive(Debug)]
pub(crate) struct Parts {
    call: String,
    response: Response,
}

impl Parts {
    /// The next one; None: it is complete.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<u8>>, ApiError> {
        match self.response.chunk().await {
            Ok(part) => Ok(part.map(Into::into)),
            Err(error) => Err(ApiError::Found(format!(
                "the answer to {} broke off ({}): the control plane, or the node's agent, has gone; what it had so far is above",
                self.call,
                root_cause(&error)
            ))),
        }
    }
}

/// The innermost error: "connection refused" rather than three layers of "error sending request".
pub(crate) fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

fn refusal(call: String, status: StatusCode, json: Option<Value>) -> ApiError {
    let said = |key: &str| json.as_ref()?.get("error")?.get(key)?.as_str().filter(|s| !s.is_empty());
    let Some(message) = said("message") else {
        return ApiError::Malformed { call, message: format!("status {status} without a reason") };
    };
    match (status, said("field")) {
        (StatusCode::UNAUTHORIZED, _) => ApiError::Refused {
            call,
            status,
            message: format!("{message}; --token TOKEN or PENSTOCK_TOKEN names who asks"),
        },
        (StatusCode::NOT_FOUND, _) => ApiError::NotFound(message.into()),
        (_, Some(field)) => ApiError::Refused { call, status, message: format!("{field}: {message}") },
        (_, None) => ApiError::Refused { call, status, message: message.into() },
    }
}
