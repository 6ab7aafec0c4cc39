//! The settings of each gateway, written from the same few facts.
//!
//! Fair means: as many workers as Penstock has threads, least connections or what comes closest to it, connections to
//! engines kept, no buffering of answers or bodies, no access log (Penstock writes its own), timeouts long enough never to
//! fire, bodies of any size in the cells. Everything else is each one's default.

use std::{fmt::Write, net::SocketAddr, path::Path};

use serde_json::{Value, json};

/// What a gateway is told.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setting<'a> {
    /// A folder of its own.
    pub(super) folder: &'a Path,
    /// Where clients connect.
    pub(super) port: u16,
    /// For metrics and the like.
    pub(super) spare_port: u16,
    pub(super) engines: &'a [SocketAddr],
    pub(super) model: &'a str,
    pub(super) threads: u16,
    /// Open files of a process.
    pub(super) open_files: u64,
    /// PEM files that stand in the folder, if clients speak TLS and HTTP/2.
    pub(super) tls: bool,
}

/// Certificate, key, and both in one, in the folder.
pub(super) const CERTIFICATE: &str = "certificate.pem";
pub(super) const KEY: &str = "key.pem";
pub(super) const BOTH: &str = "both.pem";

/// Connections to engines that may be idle.
const KEEPALIVE: u32 = 4_096;

impl Setting<'_> {
    /// The path of a file in the folder.
    pub(super) fn path(&self, file: &str) -> String {
        self.folder.join(file).display().to_string()
    }
}

/// nginx.conf.
pub(super) fn nginx(setting: &Setting<'_>) -> String {
    let mut servers = String::new();
    for engine in setting.engines {
        writeln!(servers, "        server {engine};").unwrap_or_default();
    }
    let tls = if setting.tls {
        format!(
            "        ssl_certificate {};\n        ssl_certificate_key {};\n        http2_max_concurrent_streams 256;\n",
            setting.path(CERTIFICATE),
            setting.path(KEY)
        )
    } else {
        String::new()
    };
    format!(
        "daemon off;
worker_processes {threads};
worker_rlimit_nofile {files};
pid {pid};
error_log stderr error;
events {{
    worker_connections {files};
}}
http {{
    access_log off;
    client_body_temp_path {temp};
    proxy_temp_path {temp};
    fastcgi_temp_path {temp};
    uwsgi_temp_path {temp};
    scgi_temp_path {temp};
    client_max_body_size 0;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    tcp_nodelay on;
    upstream engines {{
        zone engines 1m;
        least_conn;
{servers}        keepalive {KEEPALIVE};
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port}{how} reuseport backlog=4096;
{tls}        location / {{
            proxy_pass http://engines;
            proxy_http_version 1.1;
            proxy_set_header Connection \"\";
            proxy_set_header Host $host;
            proxy_buffering off;
            proxy_request_buffering off;
            proxy_read_timeout 1h;
            proxy_send_timeout 1h;
        }}
    }}
}}
",
        threads = setting.threads,
        files = setting.open_files,
        pid = setting.path("nginx.pid"),
        temp = setting.path("temp"),
        port = setting.port,
        how = if setting.tls { " ssl http2" } else { "" },
    )
}

/// haproxy.cfg.
pub(super) fn haproxy(setting: &Setting<'_>) -> String {
    let mut servers = String::new();
    for (index, engine) in setting.engines.iter().enumerate() {
        writeln!(servers, "    server engine{index} {engine}").unwrap_or_default();
    }
    // Two files for each connection, and some dozens for itself.
    let connections = setting.open_files.saturating_sub(100) / 2;
    let tls =
        if setting.tls { format!(" ssl crt {} alpn h2,http/1.1", setting.path(BOTH)) } else { String::new() };
    format!(
        "global
    nbthread {threads}
    maxconn {connections}
    tune.h2.max-concurrent-streams 256
defaults
    mode http
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    timeout http-request 1m
    timeout http-keep-alive 1h
    option http-keep-alive
    option http-no-delay
    http-reuse always
frontend clients
    bind 127.0.0.1:{port}{tls}
    default_backend engines
backend engines
    balance leastconn
{servers}",
        threads = setting.threads,
        port = setting.port,
    )
}

/// envoy.json: a bootstrap without an admin port or a control plane.
pub(super) fn envoy(setting: &Setting<'_>) -> Value {
    let address = |address: SocketAddr| json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}});
    let endpoints: Vec<Value> =
        setting.engines.iter().map(|engine| json!({"endpoint": {"address": address(*engine)}})).collect();
    let limits = ["max_connections", "max_pending_requests", "max_requests", "max_retries"];
    let limits: serde_json::Map<String, Value> =
        limits.iter().map(|name| ((*name).to_owned(), json!(1_000_000))).collect();
    let manager = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "clients",
        "codec_type": "AUTO",
        "stream_idle_timeout": "0s",
        "http2_protocol_options": {"max_concurrent_streams": 256},
        "route_config": {"virtual_hosts": [{
            "name": "engines",
            "domains": ["*"],
            "routes": [{
                "match": {"prefix": "/"},
                "route": {
                    "cluster": "engines",
                    "timeout": "0s",
                    "retry_policy": {"retry_on": "connect-failure,refused-stream", "num_retries": 2},
                },
            }],
        }]},
        "http_filters": [{
            "name": "envoy.filters.http.router",
            "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
        }],
    });
    let mut chain = json!({
        "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}],
    });
    if setting.tls {
        let file = |name| json!({"filename": setting.path(name)});
        chain["transport_socket"] = json!({
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                "common_tls_context": {
                    "alpn_protocols": ["h2", "http/1.1"],
                    "tls_certificates": [{"certificate_chain": file(CERTIFICATE), "private_key": file(KEY)}],
                },
            },
        });
    }
    json!({"static_resources": {
        "listeners": [{
            "name": "clients",
            "address": address(SocketAddr::from(([127, 0, 0, 1], setting.port))),
            "tcp_backlog_size": 4096,
            "filter_chains": [chain],
        }],
        "clusters": [{
            "name": "engines",
            "type": "STATIC",
            "connect_timeout": "5s",
            "lb_policy": "LEAST_REQUEST",
            "load_assignment": {"cluster_name": "engines", "endpoints": [{"lb_endpoints": endpoints}]},
            "circuit_breakers": {"thresholds": [limits]},
        }],
    }})
}

/// LiteLLM's config.yaml. Every JSON document is a YAML document.
pub(super) fn litellm(setting: &Setting<'_>) -> Value {
    let models: Vec<Value> = setting
        .engines
        .iter()
        .map(|engine| {
            json!({
                "model_name": setting.model,
                "litellm_params": {
                    "model": format!("hosted_vllm/{}", setting.model),
                    "api_base": format!("http://{engine}/v1"),
                    "api_key": "none",
                },
            })
        })
        .collect();
    json!({
        "model_list": models,
        "router_settings": {"routing_strategy": "least-busy", "num_retries": 0},
        "litellm_settings": {"request_timeout": 3600, "telemetry": false},
    })
}

/// Settings of Python's logging that leave LiteLLM's access log out.
pub(super) const NO_ACCESS_LOG: &str = r#"{"version": 1, "disable_existing_loggers": false, "loggers": {"uvicorn.access": {"level": "CRITICAL", "propagate": false}}}"#;

/// Penstock's own settings.
pub(super) fn penstock(setting: &Setting<'_>, ads: SocketAddr, options: Options) -> String {
    let Setting { threads, port, spare_port, .. } = setting;
    let listen = if setting.tls {
        format!(
            "listen = \"\"\nthreads = {threads}\n\n[listeners.tls]\nlisten = \"127.0.0.1:{port}\"\ncertificate = {:?}\nkey = {:?}\n",
            setting.path(CERTIFICATE),
            setting.path(KEY)
        )
    } else {
        format!("listen = \"127.0.0.1:{port}\"\nthreads = {threads}\n")
    };
    let rest = match options {
        Options::Default => String::new(),
        Options::On => format!("\n[auth]\nkeys = [\"bench:{}\"]\n", sha256_hex(API_KEY)),
        Options::Off => "\n[resume]\nenabled = false\n\n[health]\nprobe_interval_ms = 0\n".to_owned(),
    };
    let telemetry = match options {
        Options::Default => format!("access_log = {:?}\n", setting.path("access.log")),
        Options::On => format!("access_log = {:?}\ndecisions_sample = 1\n", setting.path("access.log")),
        Options::Off => "access_log = \"off\"\ndecisions_sample = 0\ndecisions_kept = 0\n".to_owned(),
    };
    format!(
        "[log]
level = \"warn\"

[public]
{listen}
[private]
listen = \"127.0.0.1:{spare_port}\"

[discovery]
controlplanes = [\"http://{ads}\"]
snapshot_file = {snapshot:?}

[drain]
deadline_ms = 1

[telemetry]
{telemetry}{rest}",
        snapshot = setting.path("snapshot"),
    )
}

/// What of Penstock's options is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Options {
    /// As it comes, with an access log.
    Default,
    /// Keys, and every routing decision recorded, too.
    On,
    /// No resumes, no access log, no probes, no recorded decisions.
    Off,
}

/// The key that clients of Penstock with all on show.
pub(super) const API_KEY: &str = "bench-key";

fn sha256_hex(text: &str) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(text).iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").unwrap_or_default();
        hex
    })
}

#[cfg(test)]
#[path = "configs_tests.rs"]
mod tests;
