//! Which headers of a client an engine gets.
//!
//! Dropped: what belongs to the client's connection (hop by hop, and whatever `Connection` names), what is written anew
//! (`Host`, `Content-Length`, `X-Request-Id`), the client's credentials, and what engines obey without asking who sent it
//! (`trust.remove_headers`, unless the caller is trusted).
//!
//! Where a request comes from is told by `X-Forwarded-For`, `-Proto` and `-Host`. On an ordinary listener a client's own are
//! lies until proven: they are replaced, and its relatives dropped. On a trusted listener, where only our own proxies connect,
//! they are kept and the address appended.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue, header};

use super::trace;
use crate::{
    admission::auth::WEBSOCKET_KEY_PREFIX, downstream::respond::REQUEST_ID, gateway::RESUME, record::EXPLAIN,
};

/// Never sent on, whoever asks.
const DROPPED: &[&str] = &[
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
    "host",
    "content-length",
    "expect",
    "authorization",
    "x-api-key",
    "api-key",
    "cookie",
    // The answer must not come compressed: events are looked at, and a compressed stream is held back by its encoder.
    "accept-encoding",
    // Asks an engine to tell its load, and to log a line about it.
    "endpoint-load-metrics-format",
    "traceparent",
    "tracestate",
    REQUEST_ID,
    EXPLAIN,
    RESUME,
];

/// What else claims to know where a request comes from.
const ORIGIN_CLAIMS: &[&str] = &[
    "forwarded",
    "via",
    "x-real-ip",
    "x-client-ip",
    "x-cluster-client-ip",
    "true-client-ip",
    "cf-connecting-ip",
];

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// Who sent a request.
#[derive(Debug, Clone, Copy)]
pub struct Sender<'a> {
    /// Whose connection it is.
    pub address: IpAddr,
    /// Whether the connection is encrypted.
    pub tls: bool,
    /// The host that the client asked for.
    pub host: &'a [u8],
    /// Whether only our own proxies connect here, so that what they say of their clients is true.
    pub behind_proxy: bool,
    /// Whether the caller may give engines orders.
    pub trusted: bool,
}

/// The headers for an engine: the client's, cleaned, and ours. `remove` is `trust.remove_headers`; `span_id` our own span, if
/// the client has a trace.
pub fn forwarded(
    client: &HeaderMap,
    sender: &Sender<'_>,
    remove: &[String],
    request_id: &str,
    span_id: u64,
) -> HeaderMap {
    let named = named_by_connection(client.get_all(header::CONNECTION).iter().map(HeaderValue::as_bytes));
    let dropped = |name: &HeaderName| {
        let name = name.as_str();
        DROPPED.contains(&name)
            || named.iter().any(|n| n.eq_ignore_ascii_case(name))
            || !sender.trusted && remove.iter().any(|n| n == name)
            || !sender.behind_proxy && (name.starts_with("x-forwarded-") || ORIGIN_CLAIMS.contains(&name))
    };
    let mut headers = HeaderMap::with_capacity(client.len() + 6);
    for (name, value) in client {
        if dropped(name) {
            continue;
        }
        if name == header::SEC_WEBSOCKET_PROTOCOL {
            headers.extend(without_key(value).map(|value| (name.clone(), value)));
        } else {
            headers.append(name.clone(), value.clone());
        }
    }
    tell_origin(&mut headers, sender);
    if let Some((parent, state)) = trace::continued(client, span_id) {
        headers.insert(trace::TRACEPARENT, parent);
        headers.extend(state.map(|state| (trace::TRACESTATE, state)));
    }
    if let Ok(id) = request_id.try_into() {
        headers.insert(HeaderName::from_static(REQUEST_ID), id);
    }
    headers
}

/// The fields that the values of `Connection` say are its own.
pub fn named_by_connection<'a>(values: impl Iterator<Item = &'a [u8]>) -> Vec<&'a str> {
    let texts = values.filter_map(|value| std::str::from_utf8(value).ok());
    texts.flat_map(|text| text.split(',')).map(str::trim).filter(|name| !name.is_empty()).collect()
}

fn tell_origin(headers: &mut HeaderMap, sender: &Sender<'_>) {
    let before: Vec<&str> =
        headers.get_all(&FORWARDED_FOR).iter().filter_map(|value| value.to_str().ok()).collect();
    let address = sender.address;
    let line =
        if before.is_empty() { address.to_string() } else { format!("{}, {address}", before.join(", ")) };
    set(headers, FORWARDED_FOR, line.as_bytes());
    if !headers.contains_key(&FORWARDED_PROTO) {
        set(headers, FORWARDED_PROTO, if sender.tls { b"https" } else { b"http" });
    }
    if !headers.contains_key(&FORWARDED_HOST) && !sender.host.is_empty() {
        set(headers, FORWARDED_HOST, sender.host);
    }
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: &[u8]) {
    // Made of an address, a constant, or what was a header's value before.
    if let Ok(value) = HeaderValue::from_bytes(value) {
        headers.insert(name, value);
    }
}

/// Subprotocols of a WebSocket less the one that is the client's API key; `None` when nothing is left.
fn without_key(value: &HeaderValue) -> Option<HeaderValue> {
    let names = value.to_str().ok()?.split(',').map(str::trim);
    let kept: Vec<&str> =
        names.filter(|name| !name.is_empty() && !name.starts_with(WEBSOCKET_KEY_PREFIX)).collect();
    if kept.is_empty() { None } else { HeaderValue::try_from(kept.join(", ")).ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))).collect()
    }

    fn remove() -> Vec<String> {
        ["x-data-parallel-rank", "x-session-id", "x-vllm-priority"].map(str::to_owned).to_vec()
    }

    fn sent(client: &[(&'static str, &'static str)], sender: &Sender<'_>) -> Vec<String> {
        let headers = forwarded(&map(client), sender, &remove(), "ours", 0xab);
        let line =
            |(name, value): (&HeaderName, &HeaderValue)| format!("{name}: {}", value.to_str().unwrap_or("?"));
        let mut lines: Vec<_> = headers.iter().map(line).collect();
        lines.sort_unstable();
        lines
    }

    fn client() -> Sender<'static> {
        Sender {
            address: "10.0.0.9".parse().expect("an address"),
            tls: false,
            host: b"api.test",
            behind_proxy: false,
            trusted: false,
        }
    }

    const ORIGIN: [&str; 3] =
        ["x-forwarded-for: 10.0.0.9", "x-forwarded-host: api.test", "x-forwarded-proto: http"];

    #[test]
    fn what_belongs_to_the_connection_stays_there() {
        let lines = sent(
            &[
                ("connection", "close, X-Custom , TE"),
                ("x-custom", "1"),
                ("te", "trailers"),
                ("transfer-encoding", "chunked"),
                ("keep-alive", "timeout=5"),
                ("upgrade", "h2c"),
                ("content-type", "application/json"),
                ("x-kept", "1"),
            ],
            &client(),
        );
        let wanted = [&["content-type: application/json"], &ORIGIN[..], &["x-kept: 1", "x-request-id: ours"]];
        assert_eq!(lines, wanted.concat());
    }

    #[test]
    fn credentials_never_reach_an_engine_and_orders_only_from_the_trusted() {
        let headers = [
            ("authorization", "Bearer secret"),
            ("x-api-key", "secret"),
            ("cookie", "session=1"),
            ("sec-websocket-protocol", "realtime, openai-insecure-api-key.secret"),
            ("x-request-id", "mine"),
            ("x-data-parallel-rank", "3"),
            ("x-session-id", "s"),
            ("x-vllm-priority", "0"),
        ];
        let lines = sent(&headers, &client());
        assert_eq!(lines[0], "sec-websocket-protocol: realtime");
        assert_eq!(lines[1..4], ORIGIN);
        assert_eq!(lines[4..], ["x-request-id: ours"]);
        let lines = sent(&headers, &Sender { trusted: true, ..client() });
        assert!(
            lines.contains(&"x-data-parallel-rank: 3".to_owned())
                && lines.contains(&"x-vllm-priority: 0".to_owned())
        );
        assert!(!lines.iter().any(|line| line.contains("secret") || line.contains("mine")), "{lines:?}");
    }

    #[test]
    fn where_a_request_comes_from_is_told_by_us_or_by_a_proxy_of_ours() {
        let claims = [
            ("x-forwarded-for", "1.1.1.1"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "public.test"),
            ("x-forwarded-client-cert", "forged"),
            ("x-real-ip", "1.1.1.1"),
            ("forwarded", "for=1.1.1.1"),
        ];
        assert_eq!(sent(&claims, &client()), [&ORIGIN[..], &["x-request-id: ours"]].concat());
        let lines = sent(&claims, &Sender { behind_proxy: true, tls: true, ..client() });
        for line in [
            "x-forwarded-for: 1.1.1.1, 10.0.0.9",
            "x-forwarded-proto: https",
            "x-forwarded-host: public.test",
        ] {
            assert!(lines.contains(&line.to_owned()), "{line} not in {lines:?}");
        }
        let lines = sent(&[], &Sender { behind_proxy: true, tls: true, ..client() });
        assert!(lines.contains(&"x-forwarded-proto: https".to_owned()), "nothing said before us: {lines:?}");
        let lines = sent(&[], &Sender { host: b"", ..client() });
        assert!(!lines.iter().any(|line| line.contains("host")), "no host was asked for: {lines:?}");
    }

    #[test]
    fn a_trace_goes_on_and_garbage_does_not() {
        let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let lines = sent(&[("traceparent", parent), ("tracestate", "a=1")], &client());
        assert_eq!(lines[0], "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00000000000000ab-01");
        assert_eq!(lines[1], "tracestate: a=1");
        let lines = sent(&[("traceparent", "00-a-b-01"), ("tracestate", "a=1")], &client());
        assert!(!lines.iter().any(|line| line.starts_with("trace")), "{lines:?}");
    }
}
