use super::*;
use crate::{endpoints::Snapshot, telemetry::models::MAX_MODELS};

fn rendered(metrics: &Metrics) -> String {
    metrics.render(&State {
        snapshot: &Snapshot::default(),
        xds: &crate::xds::status::XdsStatus::default().view(),
        draining: false,
        body_bytes_held: 0,
        now_ms: 0,
        max_ejected_percent: 67,
    })
}

#[test]
fn every_series_exists_at_zero() {
    let text = rendered(&Metrics::new().expect("names are unique"));
    for line in [
        "penstock_proxy_retries_total{reason=\"connect\"} 0",
        "penstock_proxy_requests_inflight 0",
        "penstock_proxy_ejections_total{reason=\"hang\"} 0",
        "penstock_proxy_streams_leave_total{reason=\"moved\"} 0",
        "penstock_proxy_endpoints_by_health{state=\"half_open\"} 0",
        "penstock_proxy_upstream_connections_total{origin=\"reused\"} 0",
        "penstock_proxy_xds_last_response_age_seconds -1",
        "penstock_proxy_snapshot_age_seconds -1",
        "penstock_proxy_snapshot_from_disk 0",
        "penstock_proxy_queue_outcomes_total{outcome=\"deadline\"} 0",
        "penstock_proxy_access_log_dropped_total{reason=\"queue_full\"} 0",
        "penstock_proxy_decisions_recorded_total{why=\"retried\"} 0",
    ] {
        assert!(text.contains(line), "{line} missing in\n{text}");
    }
}

#[test]
fn what_is_counted_by_model_exists_at_zero_for_every_route() {
    let metrics = Metrics::new().expect("names are unique");
    metrics.of_model("m");
    let text = rendered(&metrics);
    for line in [
        "penstock_proxy_model_requests_inflight{model=\"m\"} 0",
        "penstock_proxy_tokens_total{kind=\"completion\",model=\"m\"} 0",
        "penstock_proxy_inter_token_latency_seconds_count{model=\"m\"} 0",
    ] {
        assert!(text.contains(line), "{line} missing in\n{text}");
    }
}

#[test]
fn models_beyond_the_limit_share_one_label() {
    let metrics = Metrics::new().expect("names are unique");
    for n in 0..MAX_MODELS + 50 {
        metrics.of_model(&format!("m{n}")).ttft.observe(1.0);
    }
    let text = rendered(&metrics);
    let series =
        text.lines().filter(|l| l.starts_with("penstock_proxy_time_to_first_byte_seconds_count")).count();
    assert_eq!(series, MAX_MODELS + 1);
    assert!(text.contains("penstock_proxy_time_to_first_byte_seconds_count{model=\"(other)\"} 50"), "{text}");
}
