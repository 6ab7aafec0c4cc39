//! REST on a follower: what needs the leader is handed to it, the rest is answered here.
//!
//! Writes go to the leader. So do reads of what only the leader knows (engines' states and what waits on what come from
//! agents' sessions); if it cannot be reached they are answered from this control plane's own view, which has everything
//! that is stored. What is about this very process (probes, metrics, its proxies, the status) is answered here always.
//!
//! A request that was handed on carries a mark, and is not handed on again: a leader that lost its term meanwhile
//! answers 503 itself. Whoever asks gets 503 with Retry-After while nobody leads.
//!
//! Where tokens are limited the leader counts: what is handed on it counts itself, and of what is answered here it is told
//! first, by asking whose token it is. A leader that does not answer at once is not waited for: this control plane counts.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{ConnectInfo, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use futures_util::StreamExt;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::json;

use crate::{
    access::{CLIENT, FORWARDED_BY},
    core::Core,
    leadership::Leader,
};

/// Longest time for the leader to count a request that is answered here.
const COUNT: Duration = Duration::from_secs(1);
/// Longest time to connect to the leader.
const CONNECT: Duration = Duration::from_secs(2);
/// Headers that belong to one connection.
const HOP: [HeaderName; 6] = [
    header::CONNECTION,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::TE,
    header::TRAILER,
    HeaderName::from_static("keep-alive"),
];

#[derive(Clone)]
struct Forwarder {
    core: Arc<Core>,
    client: Client<HttpConnector, Body>,
}

/// Puts the hand-over in front of `router`.
pub(crate) fn before(core: Arc<Core>, router: Router) -> Router {
    let mut connector = HttpConnector::new();
    connector.set_connect_timeout(Some(CONNECT));
    connector.set_nodelay(true);
    let client =
        Client::builder(TokioExecutor::new()).pool_idle_timeout(Duration::from_secs(10)).build(connector);
    router.layer(middleware::from_fn_with_state(Forwarder { core, client }, hand_on))
}

/// Where a request is answered.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Here,
    /// By the leader, or here if there is none.
    LeaderOrHere,
    Leader,
}

fn is_api(path: &str) -> bool {
    path.starts_with("/api/") || (path.starts_with("/v1/admin/") && path != "/v1/admin/ui")
}

fn place(method: &Method, path: &str) -> Place {
    let api = is_api(path);
    let about_this_process = [
        "/api/v2/cluster/",
        "/api/v2/logs",
        "/v1/admin/cluster/",
        "/v1/admin/logs",
        "/api/observe/metrics",
        "/api/observe/router",
    ];
    match *method {
        _ if !api => Place::Here,
        Method::GET | Method::HEAD | Method::OPTIONS => {
            let own = about_this_process.iter().any(|own| path.starts_with(own));
            if own { Place::Here } else { Place::LeaderOrHere }
        }
        _ => Place::Leader,
    }
}

async fn hand_on(State(forwarder): State<Forwarder>, mut request: Request, next: Next) -> Response {
    let core = &forwarder.core;
    let place = place(request.method(), request.uri().path());
    // One that leads, or did until its lease could not be renewed, answers by itself, if only to say so.
    let leads = core.leadership.elected().is_some();
    if leads || request.headers().contains_key(FORWARDED_BY) {
        return next.run(request).await;
    }
    if place == Place::Here {
        let counted = is_api(request.uri().path()) && core.gate.counts(&core.view());
        if counted && let Some(refusal) = forwarder.refused_by_leader(request.headers()).await {
            return refusal;
        }
        return next.run(request).await;
    }
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|peer| peer.0.to_string());
    if let Some(peer) = peer.and_then(|peer| HeaderValue::from_str(&peer).ok()) {
        request.headers_mut().insert(CLIENT, peer);
    }
    let Some(leader) = core.view().leader.as_ref().map(|leader| leader.value.clone()) else {
        if place == Place::LeaderOrHere {
            return next.run(request).await;
        }
        core.metrics.forwarded.with_label_values(&["no_leader"]).inc();
        let message = "no control plane leads at the moment; nothing was changed, try again in a moment";
        return unavailable("no_leader", message);
    };
    if place == Place::LeaderOrHere {
        let (parts, _) = request.into_parts();
        let asked = Request::from_parts(parts.clone(), Body::empty());
        return match forwarder.send(&leader, asked).await {
            Ok(response) => response,
            Err(_) => next.run(Request::from_parts(parts, Body::empty())).await,
        };
    }
    match forwarder.send(&leader, request).await {
        Ok(response) => response,
        Err(error) => {
            tracing::warn!(leader = leader.id, error, "a request could not be handed to the leader");
            let message = "the leader could not be reached to the end; whether the change took place is unknown: read \
                           it, then try again";
            unavailable("leader_unreachable", message)
        }
    }
}

impl Forwarder {
    /// Has the leader count a request that is answered here; its refusal, if it has one.
    async fn refused_by_leader(&self, headers: &HeaderMap) -> Option<Response> {
        let token = headers.get(header::AUTHORIZATION)?;
        let leader = self.core.view().leader.as_ref().map(|leader| leader.value.clone())?;
        let mut request = Request::new(Body::empty());
        *request.uri_mut() = Uri::from_static("/api/v2/whoami");
        request.headers_mut().insert(header::AUTHORIZATION, token.clone());
        let answer = tokio::time::timeout(COUNT, self.send(&leader, request)).await.ok()?.ok()?;
        (answer.status() == StatusCode::TOO_MANY_REQUESTS).then_some(answer)
    }

    /// Gives up when another leads, or nobody: a leader that hangs must not hold callers up longer than its lease.
    async fn send(&self, leader: &Leader, mut request: Request) -> Result<Response, String> {
        let address = &leader.http;
        let sent = async {
            let endless = request.uri().path().ends_with("/logs");
            let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
            *request.uri_mut() =
                format!("http://{address}{path}").parse::<Uri>().map_err(|e| e.to_string())?;
            for name in &HOP {
                request.headers_mut().remove(name);
            }
            request.headers_mut().remove(header::HOST);
            let id = &self.core.config.election.id;
            let by = HeaderValue::from_str(id).unwrap_or(HeaderValue::from_static("follower"));
            request.headers_mut().insert(FORWARDED_BY, by);
            let mut response = self.client.request(request).await.map_err(|e| e.to_string())?;
            for name in &HOP {
                response.headers_mut().remove(name);
            }
            let (head, body) = response.into_parts();
            // A log that is followed goes on for ever, and this process shall not.
            let stop = self.core.stop.clone().cancelled_owned();
            let body = match endless {
                true => Body::from_stream(Body::new(body).into_data_stream().take_until(stop)),
                false => Body::new(body),
            };
            Ok(Response::from_parts(head, body))
        };
        let limit = Duration::from_millis(self.core.config.election.forward_timeout_ms);
        let outcome = tokio::select! {
            outcome = sent => outcome,
            () = self.core.another_leads(leader) => Err("it leads no more".to_owned()),
            () = tokio::time::sleep(limit) => Err(format!("no answer within {limit:?}")),
        };
        let label = if outcome.is_ok() { "ok" } else { "failed" };
        self.core.metrics.forwarded.with_label_values(&[label]).inc();
        outcome
    }
}

fn unavailable(code: &str, message: &str) -> Response {
    let body = axum::Json(json!({ "error": { "code": code, "message": message } }));
    (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "2")], body).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_needs_the_leader_goes_there() {
        for (method, path, expected) in [
            (Method::GET, "/livez", Place::Here),
            (Method::GET, "/metrics", Place::Here),
            (Method::GET, "/v1/admin/ui", Place::Here),
            (Method::GET, "/api/v2/proxies", Place::LeaderOrHere),
            (Method::GET, "/api/v2/cluster/status", Place::Here),
            (Method::GET, "/v1/admin/cluster/status", Place::Here),
            (Method::GET, "/v1/admin/logs", Place::Here),
            (Method::GET, "/api/v2/whoami", Place::LeaderOrHere),
            (Method::GET, "/api/audit-logs", Place::LeaderOrHere),
            (Method::GET, "/api/v2/endpoints", Place::LeaderOrHere),
            (Method::GET, "/api/v2/models/m/replicas/m-0/logs", Place::LeaderOrHere),
            (Method::HEAD, "/api/v2/deployments/m", Place::LeaderOrHere),
            (Method::PUT, "/api/v2/deployments/m", Place::Leader),
            (Method::POST, "/api/v2/endpoints/m-0/drain", Place::Leader),
            (Method::DELETE, "/api/v2/deployments/m", Place::Leader),
        ] {
            assert_eq!(place(&method, path), expected, "{method} {path}");
        }
    }
}
