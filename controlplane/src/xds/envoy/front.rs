//! What clients of an Envoy see: the listener and its routes.
//!
//! A request is routed twice. By its path first: at those of inference a filter is switched on that reads the model out of the
//! body and has the request routed again. Only then is there a model, so a model's route need not look at the path, and no
//! other path leads to an engine.

use std::{collections::BTreeMap, time::Duration};

use penstock_proto::{
    v1,
    xds::{
        envoy::{
            config::{
                core::v3::{DataSource, HeaderValue, HeaderValueOption, data_source},
                listener::v3::{Filter, FilterChain, Listener, filter},
                route::v3::{
                    DirectResponseAction, FilterConfig, HeaderMatcher, RetryPolicy, Route, RouteAction,
                    RouteConfiguration, RouteMatch, VirtualHost, WeightedCluster, header_matcher,
                    retry_policy::{RetryHostPredicate, retry_host_predicate},
                    route::Action,
                    route_action::ClusterSpecifier,
                    route_match::PathSpecifier,
                    weighted_cluster::ClusterWeight,
                },
            },
            extensions::{
                filters::{
                    http::{
                        json_to_metadata::v3::{
                            JsonToMetadata,
                            json_to_metadata::{KeyValuePair, MatchRules, Rule, Selector, selector},
                        },
                        router::v3::Router,
                    },
                    network::http_connection_manager::v3::{
                        HttpConnectionManager, HttpFilter, Rds, http_connection_manager::RouteSpecifier,
                        http_filter,
                    },
                },
                retry::host::previous_hosts::v3::PreviousHostsPredicate,
            },
            r#type::matcher::v3::{
                MetadataMatcher, RegexMatcher, StringMatcher, ValueMatcher,
                metadata_matcher::{PathSegment, path_segment},
                string_matcher::MatchPattern,
                value_matcher,
            },
        },
        google::BoolValue,
    },
};
use serde_json::json;

use super::{Envoy, NAME, address, any, by_ads, duration, number};

/// Where clients' requests may go; the rest of what engines have is for their operators.
const PATHS: [&str; 18] = [
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v2/embed",
    "/v1/rerank",
    "/rerank",
    "/v2/rerank",
    "/v1/score",
    "/score",
    "/pooling",
    "/classify",
    "/v1/audio/speech",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
];
/// The filter that finds the model in a body.
const READ_MODEL: &str = "envoy.filters.http.json_to_metadata";
/// What engines obey without asking who says it, as `[trust]` of our proxies takes out. Bodies pass as they are.
const UNTRUSTED: [&str; 3] = ["x-data-parallel-rank", "x-session-id", "x-vllm-priority"];
/// The time for a response's head and between its parts is the routes'; a connection without requests may idle as here.
const CONNECTION_IDLE: Duration = Duration::from_secs(3_600);

/// Where a name leads.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    created_unix_s: i64,
    parent: String,
    /// Pools with their weights; empty: none that an Envoy could use.
    targets: Vec<(String, u32)>,
    /// By which name an engine knows the model, if that is why there are none.
    known_as: String,
}

impl Entry {
    pub(super) fn new(route: &v1::ModelRoute) -> Self {
        let (same, others): (Vec<_>, Vec<_>) =
            route.targets.iter().partition(|target| target.served_model == route.model);
        let weighted = same.iter().filter(|target| target.weight > 0);
        Self {
            created_unix_s: route.created_unix_s,
            parent: route.parent.clone(),
            targets: weighted.map(|target| (target.pool.clone(), target.weight)).collect(),
            known_as: others.first().map(|target| target.served_model.clone()).unwrap_or_default(),
        }
    }

    /// What it refers to.
    pub(super) fn pools(&self) -> impl Iterator<Item = &str> {
        self.targets.iter().map(|(pool, _)| pool.as_str())
    }
}

pub(super) fn listener(envoy: &Envoy) -> Listener {
    let model = Rule {
        selectors: vec![Selector { selector: Some(selector::Selector::Key("model".into())) }],
        on_present: Some(KeyValuePair {
            metadata_namespace: NAME.into(),
            key: "model".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let read_model = JsonToMetadata {
        request_rules: Some(MatchRules {
            rules: vec![model],
            // Clients that do not say what they send mean JSON, as engines take it.
            allow_empty_content_type: true,
            allow_content_types_regex: Some(regex("(?i)application/json( *;.*)?")),
            ..Default::default()
        }),
        ..Default::default()
    };
    let http_filter = |name: &str, config| HttpFilter {
        name: name.into(),
        config_type: Some(http_filter::ConfigType::TypedConfig(config)),
        ..Default::default()
    };
    let manager = HttpConnectionManager {
        stat_prefix: NAME.into(),
        route_specifier: Some(RouteSpecifier::Rds(Rds {
            config_source: by_ads(),
            route_config_name: NAME.into(),
        })),
        http_filters: vec![
            HttpFilter { disabled: true, ..http_filter(READ_MODEL, any(&read_model)) },
            http_filter("envoy.filters.http.router", any(&Router::default())),
        ],
        common_http_protocol_options: Some(super::common(CONNECTION_IDLE)),
        stream_idle_timeout: duration(envoy.idle),
        use_remote_address: Some(BoolValue { value: true }),
        normalize_path: Some(BoolValue { value: true }),
        merge_slashes: true,
        // A client whose request was misread must not take its connection along.
        stream_error_on_invalid_http_message: Some(BoolValue { value: true }),
        ..Default::default()
    };
    Listener {
        name: NAME.into(),
        address: address(&envoy.listen.ip().to_string(), envoy.listen.port()),
        // The body is held until the model in it is known, and for a retry.
        per_connection_buffer_limit_bytes: number(envoy.max_body_bytes),
        filter_chains: vec![FilterChain {
            filters: vec![Filter {
                name: "envoy.filters.network.http_connection_manager".into(),
                config_type: Some(filter::ConfigType::TypedConfig(any(&manager))),
            }],
            ..Default::default()
        }],
        ..Default::default()
    }
}

pub(super) fn routes(names: &BTreeMap<String, Entry>, idle: Duration) -> RouteConfiguration {
    let models = names.iter().map(|(name, entry)| route(name, entry, idle));
    let mut routes: Vec<Route> = vec![listing(names)];
    routes.extend(models);
    routes.extend(PATHS.map(inference));
    routes.push(Route {
        r#match: Some(RouteMatch {
            path_specifier: Some(PathSpecifier::Prefix("/".into())),
            ..Default::default()
        }),
        ..refusal(404, "not_found", "there is nothing at this path")
    });
    let largest = routes.iter().filter_map(direct_body).map(str::len).max().unwrap_or(0);
    RouteConfiguration {
        name: NAME.into(),
        virtual_hosts: vec![VirtualHost {
            name: NAME.into(),
            domains: vec!["*".into()],
            routes,
            request_headers_to_remove: UNTRUSTED.map(str::to_owned).into(),
            ..Default::default()
        }],
        max_direct_response_body_size_bytes: number(u32::try_from(largest).unwrap_or(u32::MAX).max(4_096)),
        ..Default::default()
    }
}

fn route(name: &str, entry: &Entry, idle: Duration) -> Route {
    let is_name = value_matcher::MatchPattern::StringMatch(exact(name));
    let found = RouteMatch {
        path_specifier: Some(PathSpecifier::Prefix("/".into())),
        dynamic_metadata: vec![MetadataMatcher {
            filter: NAME.into(),
            path: vec![PathSegment { segment: Some(path_segment::Segment::Key("model".into())) }],
            value: Some(ValueMatcher { match_pattern: Some(is_name) }),
            ..Default::default()
        }],
        ..Default::default()
    };
    let found = Some(found);
    let clusters = match entry.targets.as_slice() {
        [] if entry.known_as.is_empty() => {
            let message =
                format!("the model {name:?} leads only to other models, which this gateway does not do");
            return Route { r#match: found, ..refusal(404, "model_not_found", &message) };
        }
        [] => {
            let message = format!(
                "the model {name:?} is known to its engines as {:?}: ask for that, since this gateway rewrites no requests",
                entry.known_as
            );
            return Route { r#match: found, ..refusal(404, "model_not_found", &message) };
        }
        [(pool, _)] => ClusterSpecifier::Cluster(pool.clone()),
        several => ClusterSpecifier::WeightedClusters(WeightedCluster {
            clusters: several
                .iter()
                .map(|(pool, weight)| ClusterWeight {
                    name: pool.clone(),
                    weight: number(*weight),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        }),
    };
    let action = RouteAction {
        cluster_specifier: Some(clusters),
        // No total timeout: a generation takes as long as it takes. What is silent for too long is ended.
        timeout: duration(Duration::ZERO),
        idle_timeout: duration(idle),
        retry_policy: Some(retries()),
        ..Default::default()
    };
    Route { r#match: found, action: Some(Action::Route(action)), ..Default::default() }
}

/// A path at which the model is looked for, and what is said when there is none, or none that is served.
fn inference(path: &str) -> Route {
    let is_post = HeaderMatcher {
        name: ":method".into(),
        header_match_specifier: Some(header_matcher::HeaderMatchSpecifier::StringMatch(exact("POST"))),
        ..Default::default()
    };
    let on = FilterConfig { config: Some(Default::default()), ..Default::default() };
    Route {
        r#match: Some(RouteMatch {
            path_specifier: Some(PathSpecifier::Path(path.into())),
            headers: vec![is_post],
            ..Default::default()
        }),
        typed_per_filter_config: [(READ_MODEL.to_owned(), any(&on))].into(),
        ..refusal(404, "model_not_found", "the request's JSON body names no model that is served here")
    }
}

/// Only what has not begun is tried again, and elsewhere.
fn retries() -> RetryPolicy {
    RetryPolicy {
        retry_on: "connect-failure,refused-stream,reset-before-request,reset,retriable-status-codes".into(),
        retriable_status_codes: vec![503],
        num_retries: number(3),
        retry_host_predicate: vec![RetryHostPredicate {
            name: "envoy.retry_host_predicates.previous_hosts".into(),
            config_type: Some(retry_host_predicate::ConfigType::TypedConfig(any(
                &PreviousHostsPredicate::default(),
            ))),
        }],
        host_selection_retry_max_attempts: 5,
        ..Default::default()
    }
}

/// `GET /v1/models`: what is served, as one engine would not know it.
fn listing(names: &BTreeMap<String, Entry>) -> Route {
    let served = names.iter().filter(|(_, entry)| !entry.targets.is_empty());
    let data: Vec<_> = served
        .map(|(name, entry)| {
            let parent = Some(&entry.parent).filter(|parent| !parent.is_empty());
            json!({"id": name, "object": "model", "created": entry.created_unix_s, "owned_by": NAME, "parent": parent})
        })
        .collect();
    let body = json!({"object": "list", "data": data}).to_string();
    Route {
        r#match: Some(RouteMatch {
            path_specifier: Some(PathSpecifier::Path("/v1/models".into())),
            ..Default::default()
        }),
        ..direct(200, body)
    }
}

fn refusal(status: u32, code: &str, message: &str) -> Route {
    let kind = "invalid_request_error";
    direct(
        status,
        json!({"error": {"message": message, "type": kind, "param": null, "code": code}}).to_string(),
    )
}

fn direct(status: u32, body: String) -> Route {
    let header =
        HeaderValue { key: "content-type".into(), value: "application/json".into(), ..Default::default() };
    let replace = penstock_proto::xds::envoy::config::core::v3::header_value_option::HeaderAppendAction::OverwriteIfExistsOrAdd;
    Route {
        action: Some(Action::DirectResponse(DirectResponseAction {
            status,
            body: Some(DataSource {
                specifier: Some(data_source::Specifier::InlineString(body)),
                ..Default::default()
            }),
            ..Default::default()
        })),
        response_headers_to_add: vec![HeaderValueOption {
            header: Some(header),
            append_action: replace.into(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn direct_body(route: &Route) -> Option<&str> {
    match route.action.as_ref()? {
        Action::DirectResponse(direct) => match direct.body.as_ref()?.specifier.as_ref()? {
            data_source::Specifier::InlineString(body) => Some(body),
            _ => None,
        },
        _ => None,
    }
}

fn exact(text: &str) -> StringMatcher {
    StringMatcher { match_pattern: Some(MatchPattern::Exact(text.to_owned())), ..Default::default() }
}

fn regex(regex: &str) -> RegexMatcher {
    RegexMatcher { regex: regex.to_owned(), ..Default::default() }
}
