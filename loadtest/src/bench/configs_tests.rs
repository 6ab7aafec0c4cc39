//! The settings, word for word, and by the gateways' own checks where those are installed.

use std::{path::PathBuf, process::Command};

use super::{
    super::{
        peer::Peer,
        plan::{Programs, plan},
        tls,
    },
    *,
};

fn engines() -> [SocketAddr; 2] {
    [1, 2].map(|port| SocketAddr::from(([127, 0, 0, 1], port)))
}

fn setting<'a>(folder: &'a Path, engines: &'a [SocketAddr], tls: bool) -> Setting<'a> {
    Setting {
        folder,
        port: 8_000,
        spare_port: 8_001,
        engines,
        model: "model-0",
        threads: 2,
        open_files: 20_000,
        tls,
    }
}

#[test]
fn nginx_word_for_word() {
    let text = nginx(&setting(Path::new("/x"), &engines(), false));
    assert_eq!(
        text,
        "daemon off;
worker_processes 2;
worker_rlimit_nofile 20000;
pid /x/nginx.pid;
error_log stderr error;
events {
    worker_connections 20000;
}
http {
    access_log off;
    client_body_temp_path /x/temp;
    proxy_temp_path /x/temp;
    fastcgi_temp_path /x/temp;
    uwsgi_temp_path /x/temp;
    scgi_temp_path /x/temp;
    client_max_body_size 0;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    tcp_nodelay on;
    upstream engines {
        zone engines 1m;
        least_conn;
        server 127.0.0.1:1;
        server 127.0.0.1:2;
        keepalive 4096;
        keepalive_requests 1000000000;
    }
    server {
        listen 127.0.0.1:8000 reuseport backlog=4096;
        location / {
            proxy_pass http://engines;
            proxy_http_version 1.1;
            proxy_set_header Connection \"\";
            proxy_set_header Host $host;
            proxy_buffering off;
            proxy_request_buffering off;
            proxy_read_timeout 1h;
            proxy_send_timeout 1h;
        }
    }
}
"
    );
    let tls = nginx(&setting(Path::new("/x"), &engines(), true));
    assert!(tls.contains("listen 127.0.0.1:8000 ssl http2 reuseport"));
    assert!(tls.contains("ssl_certificate /x/certificate.pem;"));
}

#[test]
fn haproxy_word_for_word() {
    let text = haproxy(&setting(Path::new("/x"), &engines(), true));
    assert_eq!(
        text,
        "global
    nbthread 2
    maxconn 9950
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
    bind 127.0.0.1:8000 ssl crt /x/both.pem alpn h2,http/1.1
    default_backend engines
backend engines
    balance leastconn
    server engine0 127.0.0.1:1
    server engine1 127.0.0.1:2
"
    );
    assert!(haproxy(&setting(Path::new("/x"), &engines(), false)).contains("bind 127.0.0.1:8000\n"));
}

#[test]
fn envoy_and_litellm_know_every_engine() {
    let engines = engines();
    let plain = setting(Path::new("/x"), &engines, false);
    let text = envoy(&plain);
    let cluster = &text["static_resources"]["clusters"][0];
    assert_eq!(cluster["lb_policy"], "LEAST_REQUEST");
    let endpoints = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"].as_array().unwrap();
    assert_eq!(endpoints.len(), 2);
    let chain = |text: &Value| text["static_resources"]["listeners"][0]["filter_chains"][0].clone();
    assert!(chain(&text).get("transport_socket").is_none());
    assert!(chain(&envoy(&setting(Path::new("/x"), &engines, true))).get("transport_socket").is_some());
    let text = litellm(&plain);
    assert_eq!(text["model_list"][1]["litellm_params"]["api_base"], "http://127.0.0.1:2/v1");
    assert_eq!(text["model_list"][1]["model_name"], "model-0");
}

#[test]
fn penstock_takes_its_settings() {
    let engines = engines();
    let ads = SocketAddr::from(([127, 0, 0, 1], 9));
    for (tls, options) in [(false, Options::Default), (false, Options::On), (true, Options::Off)] {
        let text = penstock(&setting(Path::new("/x"), &engines, tls), ads, options);
        let config: penstock_config::proxy::ProxyConfig = toml::from_str(&text).expect(&text);
        config.validate().expect(&text);
        assert_eq!(config.public.threads, 2);
        assert_eq!(config.listeners.len(), usize::from(tls));
        assert_eq!(config.auth.keys.len(), usize::from(options == Options::On));
        assert_eq!(config.resume.enabled, options != Options::Off);
        assert_eq!(config.telemetry.access_log == "off", options == Options::Off);
    }
}

#[test]
fn every_peer_has_its_port_and_its_engines() {
    let engines = engines();
    let setting = setting(Path::new("/x"), &engines, true);
    let ads = SocketAddr::from(([127, 0, 0, 1], 9));
    for peer in Peer::ALL.into_iter().filter(|peer| *peer != Peer::Direct) {
        let plan = plan(peer, PathBuf::from("/p"), &setting, ads);
        let all = format!("{:?}", (&plan.arguments, &plan.files));
        assert!(all.contains("8000"), "{peer:?}: {all}");
        let engine = match peer {
            Peer::Envoy => "\"port_value\\\":2}",
            _ if peer.is_penstock() => "127.0.0.1:9",
            _ => "127.0.0.1:2",
        };
        assert!(all.contains(engine), "{peer:?}: {all}");
    }
}

/// The gateways' own checks, where `scripts/bench_peers.sh` has put the gateways: PENSTOCK_BENCH_PEERS names the folder.
#[test]
fn real_gateways_accept_their_settings() {
    let Some(folder) = std::env::var_os("PENSTOCK_BENCH_PEERS") else { return };
    let programs = Programs {
        proxy: PathBuf::new(),
        relay: PathBuf::new(),
        engine_sim: PathBuf::new(),
        peers: Some(folder.into()),
    };
    let engines = engines();
    let ads = SocketAddr::from(([127, 0, 0, 1], 9));
    for (peer, check) in
        [(Peer::Nginx, &["-t"][..]), (Peer::Haproxy, &["-c"]), (Peer::Envoy, &["--mode", "validate"])]
    {
        let Ok(program) = programs.find(peer) else { continue };
        for tls in [false, true] {
            let temporary = tempfile::tempdir().unwrap();
            tls::write(temporary.path()).unwrap();
            let plan = plan(peer, program.clone(), &setting(temporary.path(), &engines, tls), ads);
            for (name, text) in &plan.files {
                std::fs::write(temporary.path().join(name), text).unwrap();
            }
            let environment = plan.environment.iter().map(|(name, value)| (*name, value.as_str()));
            let ran =
                Command::new(&plan.program).args(&plan.arguments).args(check).envs(environment).output();
            let ran = ran.unwrap();
            assert!(ran.status.success(), "{peer:?}, TLS {tls}: {}", String::from_utf8_lossy(&ran.stderr));
        }
    }
}
