//! A pool as Envoy's cluster and assignment.

use std::{collections::BTreeMap, time::Duration};

use penstock_proto::{
    v1,
    xds::envoy::{
        config::{
            cluster::v3::{
                CircuitBreakers, Cluster, OutlierDetection,
                circuit_breakers::{Thresholds, thresholds::RetryBudget},
                cluster::{ClusterDiscoveryType, CommonLbConfig, DiscoveryType, EdsClusterConfig, LbPolicy},
            },
            core::v3::{HealthStatus, Http1ProtocolOptions, Locality},
            endpoint::v3::{
                ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint::HostIdentifier,
            },
        },
        extensions::upstreams::http::v3::{
            HttpProtocolOptions,
            http_protocol_options::{
                ExplicitHttpConfig, UpstreamProtocolOptions, explicit_http_config::ProtocolConfig,
            },
        },
    },
};
use prost::Name;

use super::{address, any, by_ads, common, duration, number, percent};

/// uvicorn, which engines answer with, closes a connection that idles for five seconds: ours are closed before.
const UPSTREAM_IDLE: Duration = Duration::from_secs(4);
/// Requests and connections of one pool. Envoy's default of 1,024 is far below what a pool of engines carries.
const MOST: u32 = 1_000_000;

pub(super) fn cluster(pool: &str, connect: Duration) -> Cluster {
    let http = HttpProtocolOptions {
        common_http_protocol_options: Some(common(UPSTREAM_IDLE)),
        upstream_protocol_options: Some(UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
            protocol_config: Some(ProtocolConfig::HttpProtocolOptions(Http1ProtocolOptions::default())),
        })),
        ..Default::default()
    };
    Cluster {
        name: pool.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds.into())),
        eds_cluster_config: Some(EdsClusterConfig { eds_config: by_ads(), service_name: String::new() }),
        connect_timeout: duration(connect),
        lb_policy: LbPolicy::LeastRequest.into(),
        circuit_breakers: Some(CircuitBreakers {
            thresholds: vec![Thresholds {
                max_connections: number(MOST),
                max_pending_requests: number(MOST),
                max_requests: number(MOST),
                // Of the requests under way, so that retries cannot double the load on a pool that fails.
                retry_budget: Some(RetryBudget {
                    budget_percent: percent(20.0),
                    min_retry_concurrency: number(10),
                    ..Default::default()
                }),
                ..Default::default()
            }],
            ..Default::default()
        }),
        outlier_detection: Some(OutlierDetection {
            consecutive_5xx: number(5),
            interval: duration(Duration::from_secs(2)),
            base_ejection_time: duration(Duration::from_secs(10)),
            max_ejection_percent: number(50),
            // Rates are noise with the few requests that each engine answers.
            enforcing_success_rate: number(0),
            ..Default::default()
        }),
        common_lb_config: Some(CommonLbConfig {
            // Envoy would send requests to draining endpoints once half of a pool drains.
            healthy_panic_threshold: percent(0.0),
            // A drain is in use at once, not with the next second: the engine is stopped when it was acknowledged.
            update_merge_window: duration(Duration::ZERO),
            ..Default::default()
        }),
        // One that has left the table takes nothing new; what runs on it runs to its end.
        ignore_health_on_host_removal: true,
        typed_extension_protocol_options: [(HttpProtocolOptions::full_name(), any(&http))].into(),
        ..Default::default()
    }
}

/// Endpoints by zone. An address that is no IP address is passed on as it is: an Envoy refuses it with its reason.
pub(super) fn assignment(table: &v1::EndpointTable) -> ClusterLoadAssignment {
    let mut zones: BTreeMap<&str, Vec<LbEndpoint>> = BTreeMap::new();
    for endpoint in &table.endpoints {
        let (host, port) = endpoint.address.rsplit_once(':').unwrap_or((&endpoint.address, ""));
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let health = match endpoint.state() {
            v1::EndpointState::Ready => HealthStatus::Healthy,
            v1::EndpointState::Draining | v1::EndpointState::Unspecified => HealthStatus::Draining,
        };
        let host = Endpoint { address: address(host, port.parse().unwrap_or(0)), ..Default::default() };
        zones.entry(&endpoint.zone).or_default().push(LbEndpoint {
            health_status: health.into(),
            load_balancing_weight: number(1),
            host_identifier: Some(HostIdentifier::Endpoint(host)),
            ..Default::default()
        });
    }
    let localities = zones.into_iter().map(|(zone, endpoints)| LocalityLbEndpoints {
        locality: Some(Locality { zone: zone.to_owned(), ..Default::default() }),
        load_balancing_weight: number(u32::try_from(endpoints.len()).unwrap_or(u32::MAX)),
        lb_endpoints: endpoints,
        ..Default::default()
    });
    ClusterLoadAssignment {
        cluster_name: table.pool.clone(),
        endpoints: localities.collect(),
        ..Default::default()
    }
}
