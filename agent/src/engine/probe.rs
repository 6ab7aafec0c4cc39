//! Asking an engine over HTTP: health, models, one completion, metrics.
//!
//! Every question has a deadline and a bound on the answer's size, and goes straight to the engine: no proxy, no redirect.

use std::{collections::BTreeSet, fmt, time::Duration};

use penstock_config::agent::EngineProgram;
use serde_json::{Value, json};

use super::load::{self, Load, Scrape};

/// Largest answer that is read. vLLM's /metrics is about 100 kB.
const LONGEST_ANSWER: usize = 4 << 20;
/// Below vLLM's keep-alive of 5 s, so that a question never meets a connection that is just being closed.
const IDLE: Duration = Duration::from_secs(2);
/// Adapters that are told of one engine.
const MOST_ADAPTERS: usize = 256;
/// What a server says of a path that it does not have.
const NO_SUCH_PATH: [&str; 3] = ["answered 404", "answered 405", "answered 501"];
/// Longest wait for the list of models: it costs an engine nothing.
const MODELS_DEADLINE: Duration = Duration::from_secs(10);

/// Asks engines. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Probe {
    client: reqwest::Client,
}

/// One engine's HTTP server.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    base: String,
    /// Path that is 200 while it lives.
    health: String,
    /// Path that must be 200 before it is asked for anything; empty: none.
    ready: String,
    /// It lists the model under the name that clients ask for.
    lists_model: bool,
    /// Its `/metrics` are vLLM's.
    says_load: bool,
}

impl Target {
    /// The server of an engine that was told to listen on `bind_host`:`port`.
    pub(crate) fn new(bind_host: &str, port: u16) -> Self {
        let host = match bind_host.trim_matches(['[', ']']) {
            "0.0.0.0" | "" => "127.0.0.1".to_owned(),
            "::" => "[::1]".to_owned(),
            v6 if v6.contains(':') => format!("[{v6}]"),
            other => other.to_owned(),
        };
        Self {
            base: format!("http://{host}:{port}"),
            health: "/health".into(),
            ready: String::new(),
            lists_model: true,
            says_load: true,
        }
    }

    /// The same, asked as the program wants to be asked.
    pub(crate) fn of(self, program: Option<&EngineProgram>) -> Self {
        let Some(program) = program else { return self };
        Self {
            health: program.health_path.clone(),
            ready: program.ready_path.clone(),
            // Other servers list files, or ids of their own: that they complete under the name is what counts.
            lists_model: !program.is_exec(),
            says_load: program.says_load(),
            ..self
        }
    }

    /// Whether `/metrics` is worth reading.
    pub(crate) fn says_load(&self) -> bool {
        self.says_load
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.base)
    }
}

impl Probe {
    /// A client of its own.
    ///
    /// # Errors
    /// The HTTP client cannot be made.
    pub(crate) fn new() -> Result<Self, reqwest::Error> {
        let client = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .pool_idle_timeout(IDLE)
            .build()?;
        Ok(Self { client })
    }

    /// Its health path is 200.
    ///
    /// # Errors
    /// What came instead, for the operator.
    pub(crate) async fn health(&self, target: &Target, deadline: Duration) -> Result<(), String> {
        let Target { base, health, .. } = target;
        self.ask(self.client.get(format!("{base}{health}")), health, deadline).await.map(drop)
    }

    /// It says that it is ready, and `GET /v1/models` has the model, as far as this kind of engine says such things.
    ///
    /// # Errors
    /// What came instead, for the operator.
    pub(crate) async fn serves(&self, target: &Target, model: &str) -> Result<(), String> {
        let Target { base, ready, .. } = target;
        if !ready.is_empty() {
            self.ask(self.client.get(format!("{base}{ready}")), ready, MODELS_DEADLINE).await?;
        }
        if !target.lists_model {
            return Ok(());
        }
        let request = self.client.get(format!("{base}/v1/models"));
        let answer = json_of(&self.ask(request, "/v1/models", MODELS_DEADLINE).await?, "/v1/models")?;
        let listed = answer.get("data").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let names: Vec<&str> = listed.iter().filter_map(|entry| entry.get("id")?.as_str()).collect();
        if names.contains(&model) {
            return Ok(());
        }
        Err(format!("/v1/models lists {names:?}, not {model:?}"))
    }

    /// The names of the LoRA adapters that `GET /v1/models` lists beside `model`, in order, each once, at most
    /// [`MOST_ADAPTERS`]. Those have a parent.
    ///
    /// # Errors
    /// What came instead, for the operator.
    pub(crate) async fn adapters(&self, target: &Target, model: &str) -> Result<Vec<String>, String> {
        let request = self.client.get(format!("{}/v1/models", target.base));
        let answer = json_of(&self.ask(request, "/v1/models", MODELS_DEADLINE).await?, "/v1/models")?;
        Ok(adapters(&answer, model))
    }

    /// A completion of one token succeeds: of a text, or, where the server has no such path, of a chat.
    ///
    /// # Errors
    /// What came instead, for the operator.
    pub(crate) async fn completes(
        &self,
        target: &Target,
        model: &str,
        deadline: Duration,
    ) -> Result<(), String> {
        self.one_token(target, model, None, deadline).await
    }

    /// The same under a request id that tells the engine's log, and whoever reads it, that this is no client's.
    ///
    /// # Errors
    /// What came instead, for the operator.
    pub(crate) async fn canary(
        &self,
        target: &Target,
        model: &str,
        id: &str,
        deadline: Duration,
    ) -> Result<(), String> {
        self.one_token(target, model, Some(id), deadline).await
    }

    async fn one_token(
        &self,
        target: &Target,
        model: &str,
        id: Option<&str>,
        deadline: Duration,
    ) -> Result<(), String> {
        let text = json!({"model": model, "prompt": "ping", "max_tokens": 1, "temperature": 0});
        let told = self.complete(target, "/v1/completions", &text, id, deadline).await;
        match told {
            Err(why) if !target.lists_model && NO_SUCH_PATH.iter().any(|status| why.contains(status)) => {
                let messages = json!([{"role": "user", "content": "ping"}]);
                let chat = json!({"model": model, "messages": messages, "max_tokens": 1, "temperature": 0});
                self.complete(target, "/v1/chat/completions", &chat, id, deadline).await
            }
            told => told,
        }
    }

    async fn complete(
        &self,
        target: &Target,
        path: &str,
        body: &Value,
        id: Option<&str>,
        deadline: Duration,
    ) -> Result<(), String> {
        let mut request = self
            .client
            .post(format!("{}{path}", target.base))
            .header("content-type", "application/json")
            .body(body.to_string());
        if let Some(id) = id {
            request = request.header("x-request-id", id);
        }
        let answer = json_of(&self.ask(request, "a completion", deadline).await?, "a completion")?;
        match answer.get("choices").and_then(Value::as_array) {
            Some(choices) if !choices.is_empty() => Ok(()),
            _ => Err("a completion was answered without choices".into()),
        }
    }

    /// The engine's load.
    ///
    /// # Errors
    /// What came instead, or that it says no load.
    pub(crate) async fn load(&self, target: &Target, deadline: Duration) -> Result<Load, String> {
        let scrape = self.scrape(target, deadline).await?;
        scrape.load.ok_or_else(|| "/metrics does not say how many requests run and wait".to_owned())
    }

    /// What `/metrics` says.
    ///
    /// # Errors
    /// What came instead, for the operator.
    pub(crate) async fn scrape(&self, target: &Target, deadline: Duration) -> Result<Scrape, String> {
        self.metrics_text(target, deadline).await.map(|text| load::parse(&text))
    }

    /// The text of `/metrics`.
    ///
    /// # Errors
    /// What came instead, for the operator.
    pub(crate) async fn metrics_text(&self, target: &Target, deadline: Duration) -> Result<String, String> {
        if !target.says_load {
            return Err(
                "engines of this kind do not say their load (agent setting engines.NAME.metrics)".into()
            );
        }
        let request = self.client.get(format!("{}/metrics", target.base));
        let body = self.ask(request, "/metrics", deadline).await?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    /// POST on one of the engine's own paths is answered with 200.
    ///
    /// # Errors
    /// What came instead, for the operator.
    pub(crate) async fn post(
        &self,
        target: &Target,
        path: &str,
        body: Option<&Value>,
        deadline: Duration,
    ) -> Result<(), String> {
        let mut request = self.client.post(format!("{}{path}", target.base));
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_string());
        }
        self.ask(request, path, deadline).await.map(drop)
    }

    /// The JSON that GET on one of the engine's own paths is answered with.
    ///
    /// # Errors
    /// What came instead, for the operator.
    pub(crate) async fn json(
        &self,
        target: &Target,
        path: &str,
        deadline: Duration,
    ) -> Result<Value, String> {
        let request = self.client.get(format!("{}{path}", target.base));
        json_of(&self.ask(request, path, deadline).await?, path)
    }

    async fn ask(
        &self,
        request: reqwest::RequestBuilder,
        what: &str,
        deadline: Duration,
    ) -> Result<Vec<u8>, String> {
        let answer = async {
            let mut response = request.send().await.map_err(|e| format!("{what}: {}", cause(&e)))?;
            let status = response.status();
            let mut body = Vec::new();
            while let Some(chunk) = response.chunk().await.map_err(|e| format!("{what}: {}", cause(&e)))? {
                body.extend_from_slice(&chunk);
                if body.len() > LONGEST_ANSWER {
                    return Err(format!("{what}: the answer is longer than {LONGEST_ANSWER} bytes"));
                }
            }
            if status != reqwest::StatusCode::OK {
                let text: String =
                    String::from_utf8_lossy(&body).chars().filter(|c| !c.is_control()).take(200).collect();
                return Err(format!("{what} answered {}: {text}", status.as_u16()));
            }
            Ok(body)
        };
        let late = |_| Err(format!("{what}: no answer within {} ms", deadline.as_millis()));
        tokio::time::timeout(deadline, answer).await.unwrap_or_else(late)
    }
}

fn adapters(answer: &Value, model: &str) -> Vec<String> {
    let listed = answer.get("data").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let children = listed.iter().filter(|entry| entry.get("parent").is_some_and(Value::is_string));
    let names: BTreeSet<&str> = children.filter_map(|entry| entry.get("id")?.as_str()).collect();
    names.into_iter().filter(|name| *name != model).take(MOST_ADAPTERS).map(str::to_owned).collect()
}

fn json_of(body: &[u8], what: &str) -> Result<Value, String> {
    serde_json::from_slice(body).map_err(|e| format!("{what} was not answered with JSON: {e}"))
}

/// The innermost reason: "Connection refused" rather than "error sending request".
fn cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_listens_everywhere_is_asked_at_home() {
        for (bind, base) in [
            ("127.0.0.1", "http://127.0.0.1:7"),
            ("0.0.0.0", "http://127.0.0.1:7"),
            ("::", "http://[::1]:7"),
            ("fd00::1", "http://[fd00::1]:7"),
            ("node-1", "http://node-1:7"),
        ] {
            assert_eq!(Target::new(bind, 7).base, base);
        }
    }

    #[test]
    fn adapters_are_those_with_a_parent() {
        let answer = json!({"data": [
            {"id": "m", "parent": null}, {"id": "alias"}, {"id": "sql", "parent": "m"}, {"id": "art", "parent": "m"},
            {"id": "sql", "parent": "m"}, {"id": 7, "parent": "m"}, {"id": "m", "parent": "m"}, "nonsense",
        ]});
        assert_eq!(adapters(&answer, "m"), ["art", "sql"]);
        assert_eq!(adapters(&json!({"data": "nonsense"}), "m"), Vec::<String>::new());
        let many: Vec<Value> = (0..300).map(|n| json!({"id": format!("a{n}"), "parent": "m"})).collect();
        assert_eq!(adapters(&json!({"data": many}), "m").len(), MOST_ADAPTERS);
    }

    #[tokio::test]
    async fn a_refused_connection_is_said_plainly() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let probe = Probe::new().unwrap();
        let error = probe.health(&Target::new("127.0.0.1", free), Duration::from_secs(5)).await.unwrap_err();
        assert!(error.contains("Connection refused"), "{error}");
    }
}
