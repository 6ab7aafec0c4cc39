//! What `up` says when all is ready: the JSON line for programs, the banner for people.

use serde::{Deserialize, Serialize};

/// What runs where. Printed with `--json`, and kept in the data directory as `up.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Summary {
    /// The API for clients, host:port.
    pub(crate) public: String,
    pub(crate) proxy_private: String,
    /// The control plane's REST, host:port.
    pub(crate) controlplane: String,
    pub(crate) grpc: String,
    pub(crate) agent_private: String,
    pub(crate) console: String,
    pub(crate) models: Vec<String>,
    pub(crate) engines: Vec<EngineSummary>,
    pub(crate) pids: Pids,
    pub(crate) data_dir: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EngineSummary {
    pub(crate) id: String,
    pub(crate) address: String,
    pub(crate) pid: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pids {
    pub(crate) proxy: u32,
    pub(crate) controlplane: u32,
    pub(crate) agent: u32,
    pub(crate) up: u32,
}

/// What the banner says beyond the summary.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Notes {
    /// Whether real vLLM runs on GPUs that are only pretended.
    pub(crate) pretended_gpus: bool,
    /// Whether the proxy lets everybody in.
    pub(crate) no_api_keys: bool,
    /// Whether the data directory is the one that the other commands look into unasked.
    pub(crate) default_data_dir: bool,
}

impl Summary {
    /// One line of JSON.
    pub(crate) fn line(&self) -> String {
        // Strings, numbers and lists of them: there is no value here that JSON cannot hold.
        serde_json::to_string(self).unwrap_or_default() + "\n"
    }

    /// `model` is the one to try, of the kind `engine`.
    pub(crate) fn banner(&self, model: &str, engine: &str, notes: Notes) -> String {
        let Self { public, proxy_private, controlplane, grpc, agent_private, console, .. } = self;
        let engines = self.engines.len();
        let kind = if engine == "sim" { "simulated" } else { "vLLM" };
        let several = if engines == 1 { "" } else { "s" };
        let mut text = format!(
            "\nPenstock is up: {engines} {kind} engine{several} serving \"{model}\".\n\n\
             \x20 API            http://{public}/v1\n\
             \x20 console        {console}\n\
             \x20 control plane  http://{controlplane} (REST), {grpc} (gRPC)\n\
             \x20 private        http://{proxy_private}/metrics (proxy), http://{agent_private}/metrics (agent)\n"
        );
        for (n, engine) in self.engines.iter().enumerate() {
            let label = if n == 0 { "engines" } else { "" };
            text += &format!("  {label:<14} {} at {}, pid {}\n", engine.id, engine.address, engine.pid);
        }
        text += &format!(
            "\nTry it:\n\n  curl -N http://{public}/v1/chat/completions -H 'Content-Type: application/json' \\\n    \
             -d '{}'\n\n",
            shell_safe(&chat(model))
        );
        let flag =
            if notes.default_data_dir { String::new() } else { format!(" --data-dir {}", self.data_dir) };
        text += &format!("  penstock status{flag}\n  penstock scale {model} --replicas 4{flag}\n\n");
        if notes.no_api_keys {
            text += "API keys are off: everybody who reaches the API's port may use it. config/proxy.toml, [auth].\n";
        }
        if notes.pretended_gpus {
            text += "Placement counts pretended GPUs: no NVIDIA GPU was found, or --gpus was given.\n";
        }
        text + &format!("Logs: {}/logs. Ctrl-C stops everything.\n\n", self.data_dir)
    }
}

fn chat(model: &str) -> String {
    serde_json::json!({
        "model": model,
        "stream": true,
        "max_tokens": 32,
        "messages": [{"role": "user", "content": "Hello!"}]
    })
    .to_string()
}

/// For use between single quotes.
fn shell_safe(text: &str) -> String {
    text.replace('\'', r"'\''")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn summary() -> Summary {
        let engine = EngineSummary { id: "m-0".into(), address: "127.0.0.1:6".into(), pid: 7 };
        Summary {
            public: "127.0.0.1:1".into(),
            proxy_private: "127.0.0.1:2".into(),
            controlplane: "127.0.0.1:3".into(),
            grpc: "127.0.0.1:4".into(),
            agent_private: "127.0.0.1:5".into(),
            console: "http://127.0.0.1:3/".into(),
            models: vec!["m".into()],
            engines: vec![engine],
            pids: Pids { proxy: 8, controlplane: 9, agent: 10, up: 11 },
            data_dir: "/data".into(),
        }
    }

    #[test]
    fn the_json_line_is_one_line_with_every_key() {
        let line = summary().line();
        assert_eq!(line.matches('\n').count(), 1);
        assert_eq!(
            line.trim(),
            r#"{"public":"127.0.0.1:1","proxy_private":"127.0.0.1:2","controlplane":"127.0.0.1:3","grpc":"127.0.0.1:4","agent_private":"127.0.0.1:5","console":"http://127.0.0.1:3/","models":["m"],"engines":[{"id":"m-0","address":"127.0.0.1:6","pid":7}],"pids":{"proxy":8,"controlplane":9,"agent":10,"up":11},"data_dir":"/data"}"#
        );
        assert_eq!(serde_json::from_str::<Summary>(&line).unwrap(), summary());
    }

    #[test]
    fn the_banner_has_a_curl_line_and_says_what_is_off() {
        let notes = Notes { pretended_gpus: false, no_api_keys: true, default_data_dir: false };
        let text = summary().banner("m'x", "sim", notes);
        assert!(text.contains("1 simulated engine serving"), "{text}");
        assert!(text.contains("curl -N http://127.0.0.1:1/v1/chat/completions"), "{text}");
        assert!(text.contains(r#""model":"m'\''x""#), "{text}");
        assert!(text.contains("API keys are off") && text.contains("--data-dir /data"), "{text}");
        assert!(!text.contains("pretended"), "{text}");
    }
}
