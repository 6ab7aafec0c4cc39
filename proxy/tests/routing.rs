//! Routing policies with real requests: where a session or a prompt goes, and when it moves.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::SocketAddr;

use penstock_config::proxy::{Policy, ProxyConfig};
use support::*;

/// Engines that answer at once, each saying its number.
async fn engines(n: usize) -> Vec<Engine> {
    let mut engines = vec![];
    for number in 0..n {
        engines.push(Engine::answering(json_answer("200 OK", &format!("{{\"engine\":{number}}}"))).await);
    }
    engines
}

fn start(policy: Policy, addresses: &[SocketAddr]) -> Proxy {
    let mut config = ProxyConfig::default();
    config.routing.policy = policy;
    config.routing.session_cookie = "sid".into();
    config.routing.hash_key = "the same in every run".into();
    Proxy::start(config, addresses)
}

async fn asked(proxy: &Proxy, headers: &str, body: &str) -> usize {
    let answer = proxy.exchange(&post_with(CHAT, &format!("connection: close\r\n{headers}"), body)).await;
    let (_, number) = answer.split_once("{\"engine\":").unwrap_or_else(|| panic!("{answer}"));
    number.trim_end_matches('}').parse().unwrap()
}

fn body(user: &str) -> String {
    format!(r#"{{"messages":[{{"role":"user","content":"hi"}}],"user":"{user}","model":"m"}}"#)
}

#[tokio::test]
async fn a_session_stays_with_its_engine_and_moves_only_when_that_is_lost() {
    let engines = engines(4).await;
    let addresses: Vec<_> = engines.iter().map(|engine| engine.address).collect();
    let proxy = start(Policy::SessionAffinity, &addresses);
    let header = |session: usize| format!("x-session-affinity: s{session}\r\n");
    let mut homes = vec![];
    for session in 0..16 {
        let home = asked(&proxy, &header(session), &chat(false)).await;
        for _ in 0..3 {
            assert_eq!(asked(&proxy, &header(session), &chat(false)).await, home, "session {session}");
        }
        homes.push(home);
    }
    let lost = homes[0];
    assert!(homes.iter().any(|home| *home != lost), "all sessions on one engine: {homes:?}");
    // The same fleet, seen by a proxy to which one engine is lost: ids and key are the same, so are the homes.
    let mut fewer = addresses.clone();
    fewer[lost] = nobody().await;
    let proxy = start(Policy::SessionAffinity, &fewer);
    for (session, home) in homes.iter().enumerate() {
        let now = asked(&proxy, &header(session), &chat(false)).await;
        assert_eq!(
            now != *home,
            *home == lost,
            "session {session} was on {home}, is on {now}, lost is {lost}"
        );
        assert_eq!(asked(&proxy, &header(session), &chat(false)).await, now, "its new home is one, too");
    }
    proxy.settles().await;
}

#[tokio::test]
async fn a_session_is_known_by_its_cookie_or_its_user_too() {
    let engines = engines(4).await;
    let addresses: Vec<_> = engines.iter().map(|engine| engine.address).collect();
    let proxy = start(Policy::SessionAffinity, &addresses);
    for name in 0..8 {
        let (cookie, user) = (format!("cookie: a=b; sid=s{name}\r\n"), body(&format!("u{name}")));
        let (by_cookie, by_user) = (asked(&proxy, &cookie, &user).await, asked(&proxy, "", &user).await);
        for _ in 0..3 {
            let other = body("somebody else");
            assert_eq!(asked(&proxy, &cookie, &other).await, by_cookie, "the cookie comes before the user");
            assert_eq!(asked(&proxy, "", &user).await, by_user);
        }
    }
    let affine = proxy.gateway.metrics.picks.with_label_values(&["session_affinity", "affine"]).get();
    assert_eq!(affine, 8 * 8);
}

#[tokio::test]
async fn a_prompt_returns_to_the_engine_that_has_its_beginning() {
    let engines = engines(4).await;
    let addresses: Vec<_> = engines.iter().map(|engine| engine.address).collect();
    let proxy = start(Policy::PrefixAffinity, &addresses);
    for talk in 0..8 {
        let said = format!("talk {talk} ").repeat(200);
        let prompt = |more: &str| {
            format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{said}"}}{more}]}}"#)
        };
        let home = asked(&proxy, "", &prompt("")).await;
        let next = r#",{"role":"assistant","content":"yes"},{"role":"user","content":"and then?"}"#;
        for _ in 0..3 {
            assert_eq!(asked(&proxy, "", &prompt(next)).await, home, "talk {talk}");
        }
        let ids: Vec<String> = (1000 * talk..1000 * talk + 600).map(|id: usize| id.to_string()).collect();
        let tokens = |more: &str| format!(r#"{{"model":"m","prompt":[{}{more}]}}"#, ids.join(","));
        let home = asked(&proxy, "", &tokens("")).await;
        assert_eq!(asked(&proxy, "", &tokens(",7,8,9")).await, home, "token ids of talk {talk}");
    }
}

#[tokio::test]
async fn round_robin_and_a_models_own_policy() {
    let engines = engines(3).await;
    let addresses: Vec<_> = engines.iter().map(|engine| engine.address).collect();
    let mut config = ProxyConfig::default();
    config.routing.policy_by_model.insert("m".into(), Policy::RoundRobin);
    let proxy = Proxy::start(config, &addresses);
    let mut seen = vec![];
    for _ in 0..6 {
        seen.push(asked(&proxy, "", &chat(false)).await);
    }
    assert_eq!(seen, [0, 1, 2, 0, 1, 2]);
}
