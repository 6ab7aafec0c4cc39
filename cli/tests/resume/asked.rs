//! What is asked, and what came of it, told apart from names that differ from run to run.

use serde_json::{Value, json};

use super::gateway::{MODEL, Proxy};

/// One request.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) path: &'static str,
    pub(crate) body: Value,
}

/// Tokens of an answer.
pub(crate) const TOKENS: u64 = 12;

/// A stream of each API, for this prompt.
pub(crate) fn of_each_api(prompt: &str) -> Vec<Asked> {
    let messages = json!([{"role": "user", "content": prompt}]);
    vec![
        Asked {
            path: "/v1/chat/completions",
            body: json!({
                "model": MODEL, "messages": messages, "max_tokens": TOKENS, "stream": true,
                "stream_options": {"include_usage": true},
            }),
        },
        Asked {
            path: "/v1/completions",
            body: json!({
                "model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "stream": true,
                "stream_options": {"include_usage": true},
            }),
        },
        Asked {
            path: "/v1/messages",
            body: json!({"model": MODEL, "messages": messages, "max_tokens": TOKENS, "stream": true}),
        },
        Asked {
            path: "/v1/responses",
            body: json!({"model": MODEL, "input": prompt, "max_output_tokens": TOKENS, "stream": true}),
        },
    ]
}

impl Asked {
    /// The same with other members.
    pub(crate) fn with(&self, members: Value) -> Self {
        let mut asked = self.clone();
        for (key, value) in members.as_object().unwrap() {
            asked.body[key] = value.clone();
        }
        asked
    }

    /// All of the answer, byte for byte. `session` decides which engine is asked first.
    pub(crate) async fn of(&self, client: &reqwest::Client, proxy: &Proxy, session: &str) -> String {
        let request = client.post(format!("{}{}", proxy.url, self.path)).json(&self.body);
        let answer = request.header("x-session-affinity", session).send().await.unwrap();
        let status = answer.status();
        let text = answer.text().await.unwrap();
        assert!(status.is_success(), "{status}: {text}");
        text
    }
}

/// An answer's bytes, with the names that an engine gives to each answer made the same. They must not vary within it.
pub(crate) fn told_apart(stream: &str) -> String {
    let mut names: Vec<(String, Value)> = Vec::new();
    let events = stream.split_inclusive("\n\n").map(|event| {
        let Some((before, data)) = event.split_once("data: ") else { return event.to_owned() };
        let Ok(mut json) = serde_json::from_str::<Value>(data.trim_end()) else { return event.to_owned() };
        rename(&mut json, "", &mut names);
        format!("{before}data: {json}\n\n")
    });
    events.collect()
}

fn rename(json: &mut Value, path: &str, names: &mut Vec<(String, Value)>) {
    match json {
        Value::Object(members) => {
            for (key, value) in members {
                let place = format!("{path}.{key}");
                if ["id", "item_id", "created", "created_at"].contains(&key.as_str()) && !value.is_null() {
                    // An item's name is the same wherever it stands.
                    let place = match value.as_str() {
                        Some(text) => text.chars().take_while(|c| !c.is_ascii_digit()).take(4).collect(),
                        None => place,
                    };
                    match names.iter().find(|(known, _)| *known == place) {
                        Some((_, name)) => assert_eq!(value, name, "{place} varies within the stream"),
                        None => names.push((place.clone(), value.clone())),
                    }
                    *value = place.into();
                } else {
                    rename(value, &place, names);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| rename(item, path, names)),
        _ => {}
    }
}

/// Text that an answer of any API says.
pub(crate) fn text_of(stream: &str) -> String {
    let data = stream.lines().filter_map(|line| line.strip_prefix("data: "));
    let jsons = data.filter_map(|data| serde_json::from_str::<Value>(data).ok());
    let pieces = jsons.map(|json| {
        ["/choices/0/delta/content", "/choices/0/text", "/delta/text", "/delta"]
            .iter()
            .find_map(|path| json.pointer(path).and_then(Value::as_str).map(str::to_owned))
            .unwrap_or_default()
    });
    pieces.collect()
}
