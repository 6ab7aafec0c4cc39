//! Where the control planes are: the addresses of the settings in turn, or the leader that etcd names.
//!
//! etcd is asked over its JSON gateway (`/v3/kv/range`) for `/meta/leader`, before every session. While nobody leads, or etcd
//! does not answer, the leader of the last time is tried: it may well be there.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::STANDARD};
use penstock_config::agent::FleetConfig;
use serde::Deserialize;
use serde_json::json;

/// Where the leading control plane's record is.
const LEADER: &str = "/meta/leader";
/// Longest wait for one member of etcd.
const PATIENCE: Duration = Duration::from_secs(3);
/// Longest answer that is read: the record is a few hundred bytes.
const MOST_BYTES: usize = 64 << 10;

/// See the module's text.
pub(crate) struct Directory {
    endpoints: Vec<String>,
    next: usize,
    etcd: Option<Etcd>,
}

struct Etcd {
    members: Vec<String>,
    key: String,
    client: reqwest::Client,
    known: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Range {
    #[serde(default)]
    kvs: Vec<Pair>,
}

#[derive(Debug, Deserialize)]
struct Pair {
    #[serde(default)]
    value: String,
}

/// What of the leader's record is used.
#[derive(Debug, Deserialize)]
struct Leader {
    grpc: String,
}

impl Directory {
    /// As the settings say.
    ///
    /// # Errors
    /// There can be no HTTP client.
    pub(crate) fn new(config: &FleetConfig) -> Result<Self, String> {
        let client = || {
            let builder = reqwest::Client::builder().no_proxy().connect_timeout(PATIENCE).timeout(PATIENCE);
            builder.build().map_err(|e| format!("cannot make an HTTP client: {e}"))
        };
        let etcd = match config.etcd_endpoints.as_slice() {
            [] => None,
            members => Some(Etcd {
                members: members.iter().map(|member| member.trim_end_matches('/').to_owned()).collect(),
                key: format!("{}{LEADER}", config.etcd_prefix),
                client: client()?,
                known: None,
            }),
        };
        Ok(Self { endpoints: config.endpoints.clone(), next: 0, etcd })
    }

    /// The address to dial now.
    ///
    /// # Errors
    /// A sentence: etcd does not say, and never has.
    pub(crate) async fn next(&mut self) -> Result<String, String> {
        if let Some(etcd) = &mut self.etcd {
            return etcd.leader().await;
        }
        let at = self.next % self.endpoints.len().max(1);
        self.next = at + 1;
        self.endpoints.get(at).cloned().ok_or_else(|| "controlplane.endpoints is empty".to_owned())
    }
}

impl Etcd {
    async fn leader(&mut self) -> Result<String, String> {
        let mut why = Vec::new();
        for at in 0..self.members.len() {
            let Some(member) = self.members.get(at) else { continue };
            match self.ask(member).await {
                Ok(Some(address)) => {
                    if self.known.as_ref() != Some(&address) {
                        tracing::info!(member, address, "etcd names the leading control plane");
                    }
                    self.known = Some(address.clone());
                    // The one that answered is asked first the next time.
                    self.members.rotate_left(at);
                    return Ok(address);
                }
                Ok(None) => why.push(format!(
                    "etcd at {member} has no {}: no control plane leads, or controlplane.etcd_prefix is not their store.prefix",
                    self.key
                )),
                Err(error) => why.push(format!("etcd at {member} (controlplane.etcd_endpoints): {error}")),
            }
        }
        self.known.clone().ok_or_else(|| why.join("; "))
    }

    async fn ask(&self, member: &str) -> Result<Option<String>, String> {
        let body = json!({ "key": STANDARD.encode(&self.key), "limit": 1 });
        let answer = self.client.post(format!("{member}/v3/kv/range")).json(&body).send().await;
        let mut answer = answer.map_err(|e| cause(&e))?;
        let status = answer.status();
        let mut bytes = Vec::new();
        while let Some(part) = answer.chunk().await.map_err(|e| cause(&e))? {
            bytes.extend_from_slice(&part);
            if bytes.len() > MOST_BYTES {
                return Err("its answer is too long to be etcd's".into());
            }
        }
        if !status.is_success() {
            let said: String = String::from_utf8_lossy(&bytes).chars().take(200).collect();
            let auth = if said.contains("user name is empty") || said.contains("invalid auth token") {
                "; the agent asks without a user: name the control planes in controlplane.endpoints instead"
            } else {
                ""
            };
            return Err(format!("it answered {status}: {}{auth}", said.trim()));
        }
        address(&bytes)
    }
}

/// The leader's gRPC address, out of etcd's answer; None: there is none.
fn address(answer: &[u8]) -> Result<Option<String>, String> {
    let range: Range =
        serde_json::from_slice(answer).map_err(|e| format!("its answer is not etcd's: {e}"))?;
    let Some(pair) = range.kvs.first() else { return Ok(None) };
    let value = STANDARD.decode(&pair.value).map_err(|e| format!("its answer is not etcd's: {e}"))?;
    let leader: Leader =
        serde_json::from_slice(&value).map_err(|e| format!("{LEADER} holds no control plane: {e}"))?;
    Ok(Some(leader.grpc).filter(|address| !address.is_empty()))
}

fn cause(error: &reqwest::Error) -> String {
    penstock_proto::tls::in_words(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn addresses_of_the_settings_are_taken_in_turn() {
        let config = FleetConfig { endpoints: vec!["a:1".into(), "b:1".into()], ..FleetConfig::default() };
        let mut directory = Directory::new(&config).unwrap();
        for expected in ["a:1", "b:1", "a:1"] {
            assert_eq!(directory.next().await.unwrap(), expected);
        }
    }

    #[test]
    fn the_leaders_address_is_read_out_of_etcds_answer() {
        let answer = |value: &str| {
            format!(
                "{{\"header\":{{}},\"kvs\":[{{\"key\":\"eA==\",\"value\":\"{value}\"}}],\"count\":\"1\"}}"
            )
        };
        let record = STANDARD.encode(r#"{"id":"cp0","http":"h:1","grpc":"h:2","zone":""}"#);
        assert_eq!(address(answer(&record).as_bytes()).unwrap().as_deref(), Some("h:2"));
        assert_eq!(address(b"{\"header\":{\"revision\":\"1\"}}").unwrap(), None);
        assert!(address(b"<html>").unwrap_err().contains("not etcd's"));
        assert!(address(answer("%").as_bytes()).unwrap_err().contains("not etcd's"));
        assert!(
            address(answer(&STANDARD.encode("x")).as_bytes()).unwrap_err().contains("holds no control plane")
        );
    }

    #[tokio::test]
    async fn an_etcd_that_is_not_there_is_named() {
        let config =
            FleetConfig { etcd_endpoints: vec!["http://127.0.0.1:1".into()], ..FleetConfig::default() };
        let error = Directory::new(&config).unwrap().next().await.unwrap_err();
        assert!(error.contains("etcd at http://127.0.0.1:1 (controlplane.etcd_endpoints): "), "{error}");
    }
}
