//! What proxy and engines say of themselves during a storm.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use serde_json::{Value, json};

use super::support::{Up, client};

/// A `penstock up` under observation.
pub(crate) struct Fleet {
    pub(crate) up: Up,
    engines: Vec<String>,
    http: reqwest::Client,
    faulty: AtomicBool,
}

/// What the proxy holds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Holdings {
    /// Open file descriptors.
    pub(crate) fds: usize,
    /// Resident memory, in MiB.
    pub(crate) rss_mib: usize,
}

impl Fleet {
    pub(crate) fn start(args: &[&str], env: &[(&str, &str)]) -> Self {
        // Requests are known again by their bytes, so engines are to get them as they came.
        let as_they_came = [("PENSTOCK_PROXY__RESUME__TOKEN_IDS", "false")];
        let up = Up::start_with_env(args, &[&as_they_came, env].concat());
        let engines = up.json["engines"].as_array().unwrap();
        let engines = engines.iter().map(|e| e["address"].as_str().unwrap().to_owned()).collect();
        Self { up, engines, http: client(), faulty: AtomicBool::new(false) }
    }

    async fn get(&self, address: &str, path: &str) -> String {
        let answer = self.http.get(format!("http://{address}{path}")).send().await.unwrap();
        answer.text().await.unwrap()
    }

    async fn get_json(&self, address: &str, path: &str) -> Value {
        serde_json::from_str(&self.get(address, path).await).unwrap()
    }

    /// Puts these faults on every engine; none: takes all away.
    pub(crate) async fn faults(&self, faults: &[Value]) {
        self.faulty.store(!faults.is_empty(), Relaxed);
        for engine in &self.engines {
            let url = format!("http://{engine}/sim/faults");
            let request = if faults.is_empty() {
                self.http.delete(url)
            } else {
                self.http.post(url).json(&json!(faults))
            };
            let answer = request.send().await.unwrap();
            assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
        }
    }

    /// Whether there are faults.
    pub(crate) fn is_faulty(&self) -> bool {
        self.faulty.load(Relaxed)
    }

    /// The proxy's series of this name, all labels added up.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let text = self.get(&self.up.address("proxy_private"), "/metrics").await;
        let values = text.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            rest.starts_with(['{', ' ']).then(|| rest.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
        });
        let values: Vec<f64> = values.collect();
        assert!(!values.is_empty(), "no series {name} in:\n{text}");
        values.iter().sum()
    }

    /// Everything that is still counted as under way, by where; empty when all is settled.
    pub(crate) async fn under_way(&self) -> Vec<String> {
        let mut left = Vec::new();
        let mut note = |what: String, count: f64| {
            if count != 0.0 {
                left.push(format!("{what}: {count}"));
            }
        };
        for gauge in ["penstock_proxy_requests_inflight", "penstock_proxy_request_bytes_held"] {
            note(gauge.to_owned(), self.metric(gauge).await);
        }
        let private = self.up.address("proxy_private");
        let ready = self.get_json(&private, "/readyz").await;
        note("inflight of /readyz".into(), ready["inflight"].as_f64().unwrap());
        let endpoints = self.get_json(&private, "/debug/endpoints").await;
        let endpoints = endpoints["models"]["sim-model"].as_array().unwrap();
        assert_eq!(endpoints.len(), self.engines.len());
        for endpoint in endpoints {
            note(format!("inflight of {}", endpoint["id"]), endpoint["inflight"].as_f64().unwrap());
        }
        for engine in &self.engines {
            let state = self.get_json(engine, "/sim/state").await;
            for key in ["in_flight", "running", "waiting"] {
                note(format!("{key} of engine {engine}"), state[key].as_f64().unwrap());
            }
        }
        left
    }

    /// Waits until nothing is under way anywhere.
    pub(crate) async fn settles(&self, longest: Duration) {
        let deadline = tokio::time::Instant::now() + longest;
        loop {
            let left = self.under_way().await;
            if left.is_empty() {
                return;
            }
            assert!(tokio::time::Instant::now() < deadline, "still there after {longest:?}: {left:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// What the proxy's process holds now.
    pub(crate) fn holdings(&self) -> Holdings {
        let pid = self.up.pid("proxy");
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let rss = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
        let rss_kib: usize = rss.trim().trim_end_matches(" kB").parse().unwrap();
        Holdings { fds: self.descriptors().len(), rss_mib: rss_kib / 1024 }
    }

    /// What the proxy's descriptors are, but for connections to its private port: those are this test's own questions, and
    /// its client keeps one or two.
    fn descriptors(&self) -> Vec<String> {
        let pid = self.up.pid("proxy");
        let private: SocketAddr = self.up.address("proxy_private").parse().unwrap();
        let mut sockets = HashMap::new();
        for line in std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap().lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let port = |field: &str| u16::from_str_radix(field.rsplit(':').next().unwrap(), 16).unwrap();
            let (local, remote, state) = (port(fields[1]), port(fields[2]), fields[3]);
            let is_question = local == private.port() && remote != 0;
            let said = format!("TCP from port {local} to {remote}, state {state}");
            sockets.insert(format!("socket:[{}]", fields[9]), (!is_question).then_some(said));
        }
        let files = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let links = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
        links
            .filter_map(|link| {
                let link = link.to_string_lossy().into_owned();
                sockets.get(&link).cloned().unwrap_or(Some(link))
            })
            .collect()
    }

    /// Waits until the proxy has no more than `limit` descriptors: idle connections to engines are kept 4 s.
    pub(crate) async fn descriptors_fall_to(&self, limit: usize) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
        loop {
            let now = self.descriptors();
            if now.len() <= limit {
                return;
            }
            let waits = tokio::time::Instant::now() < deadline;
            assert!(waits, "{} descriptors, {limit} at most before: {now:#?}", now.len());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// When engines saw that the client of a body had gone, by the body's hash.
    pub(crate) async fn disconnects_seen(&self) -> HashMap<u64, u64> {
        let mut seen = HashMap::new();
        for engine in &self.engines {
            let answer = self.get_json(engine, "/sim/requests?limit=1000000").await;
            for record in answer["requests"].as_array().unwrap() {
                let hash = record["body_xxh3"].as_str().and_then(|h| u64::from_str_radix(h, 16).ok());
                if let (Some(hash), Some(at)) = (hash, record["disconnect_seen_unix_us"].as_u64()) {
                    seen.insert(hash, at);
                }
            }
        }
        seen
    }
}
