//! Mutual TLS on the gRPC side: who is let in, who is told what, and certificates that change under way.
#![allow(clippy::unwrap_used)]

mod common;
mod etcd_support;

use std::{
    path::Path,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::{Duration, SystemTime},
};

use common::{Plane, hello, wait};
use etcd_support::{Cluster, planes::Planes};
use penstock_config::TlsConfig;
use penstock_proto::{
    tls::{ClientTls, dial, in_words},
    v1::{self, agent_message::Message, fleet_client::FleetClient},
    xds::{self, aggregated_discovery_service_client::AggregatedDiscoveryServiceClient},
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};

/// Longer than the control plane takes to look at its files.
const RELOADED: Duration = Duration::from_secs(40);

/// An authority, and what it signs.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // One of the same name with another key would be told of as a wrong signature.
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("authority {}", COUNT.fetch_add(1, Relaxed));
        params.distinguished_name.push(DnType::CommonName, name);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Writes a certificate and its key as `dir/NAME.pem` and `dir/NAME.key`, this authority as `dir/NAME.ca`.
    fn issue(&self, dir: &Path, name: &str, expires: Duration) -> TlsConfig {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["127.0.0.1".into(), "localhost".into()]).unwrap();
        let now = SystemTime::now();
        params.not_before = (now - Duration::from_secs(7_200)).into();
        params.not_after = (now - Duration::from_secs(3_600) + expires).into();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        let write = |suffix: &str, text: String| {
            let path = dir.join(format!("{name}.{suffix}"));
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        TlsConfig {
            ca_file: write("ca", self.0.pem()),
            cert_file: write("pem", certificate.pem()),
            key_file: write("key", key.serialize_pem()),
        }
    }
}

const LONG: Duration = Duration::from_secs(86_400);

fn client(files: &TlsConfig) -> Option<ClientTls> {
    ClientTls::of(&files.ca_file, &files.cert_file, &files.key_file)
}

/// Subscribes and waits for the first response; what went wrong, in words.
async fn subscribe(endpoint: Result<Endpoint, String>) -> Result<(), String> {
    let channel = endpoint?.connect().await.map_err(|e| in_words(&e))?;
    let (outbound, stream) = tokio::sync::mpsc::channel(4);
    let request = xds::DeltaDiscoveryRequest {
        node: Some(xds::Node { id: "p".into(), ..Default::default() }),
        type_url: xds::ENDPOINT_TABLE_TYPE.into(),
        ..Default::default()
    };
    outbound.send(request).await.unwrap();
    let mut client = AggregatedDiscoveryServiceClient::new(channel);
    let stream = client.delta_aggregated_resources(ReceiverStream::new(stream)).await;
    let first = stream.map_err(|e| in_words(&e))?.into_inner().message().await;
    first.map_err(|e| in_words(&e))?.ok_or("closed")?;
    Ok(())
}

#[tokio::test]
async fn who_shows_no_certificate_of_ours_is_refused_and_both_sides_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (Authority::new(), Authority::new());
    let server = ours.issue(dir.path(), "server", LONG);
    let plane = Plane::start_with(dir.path(), |config| config.listen.tls = server.clone()).await;
    let good = ours.issue(dir.path(), "good", LONG);
    subscribe(dial(&plane.grpc, client(&good).as_ref())).await.unwrap();
    assert_eq!(plane.metric("penstock_controlplane_grpc_refused_total").await, 0.0);

    let expired = ours.issue(dir.path(), "expired", Duration::ZERO);
    let stranger = TlsConfig { ca_file: good.ca_file.clone(), ..theirs.issue(dir.path(), "stranger", LONG) };
    let anonymous =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(std::fs::read(&good.ca_file).unwrap()));
    let anonymous = Endpoint::from_shared(format!("https://{}", plane.grpc)).unwrap().tls_config(anonymous);
    // What it would trust is not what the server shows.
    let elsewhere = TlsConfig { ca_file: theirs.issue(dir.path(), "x", LONG).ca_file, ..good.clone() };
    let tries = [
        (dial(&plane.grpc, None), ""),
        (anonymous.map_err(|e| e.to_string()), "CertificateRequired"),
        (dial(&plane.grpc, client(&expired).as_ref()), "CertificateExpired"),
        (dial(&plane.grpc, client(&stranger).as_ref()), "UnknownCA"),
        (dial(&plane.grpc, client(&elsewhere).as_ref()), "UnknownIssuer"),
    ];
    for (number, (endpoint, words)) in (1..).zip(tries) {
        let error = subscribe(endpoint).await.unwrap_err();
        assert!(error.contains(words), "{words}: {error}");
        let counted = async || {
            let refused = plane.metric("penstock_controlplane_grpc_refused_total").await;
            (refused >= f64::from(number)).then_some(())
        };
        wait("a refusal that is counted", counted).await;
    }
    let error = dial(&format!("https://{}", plane.grpc), None).unwrap_err();
    assert!(error.contains("no certificates are set"), "{error}");
    plane.stop().await;
}

#[tokio::test]
async fn renewed_certificates_are_used_without_a_restart_and_bad_ones_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (Authority::new(), Authority::new());
    let server = first.issue(dir.path(), "server", LONG);
    let plane = Plane::start_with(dir.path(), |config| config.listen.tls = server.clone()).await;
    let old = first.issue(dir.path(), "old", LONG);
    let new = second.issue(dir.path(), "new", LONG);
    subscribe(dial(&plane.grpc, client(&old).as_ref())).await.unwrap();
    assert!(subscribe(dial(&plane.grpc, client(&new).as_ref())).await.is_err());

    std::fs::write(&server.cert_file, "garbage").unwrap();
    let refused = "penstock_controlplane_grpc_certificate_reloads_total{outcome=\"refused\"}";
    eventually(async || plane.metric(refused).await >= 1.0).await;
    subscribe(dial(&plane.grpc, client(&old).as_ref())).await.expect("the former one is still in use");

    second.issue(dir.path(), "server", LONG);
    eventually(async || subscribe(dial(&plane.grpc, client(&new).as_ref())).await.is_ok()).await;
    assert!(subscribe(dial(&plane.grpc, client(&old).as_ref())).await.is_err());
    plane.stop().await;
}

async fn eventually(mut holds: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + RELOADED;
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "not within {RELOADED:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn files_that_cannot_be_used_are_named_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (Authority::new(), Authority::new());
    let good = ours.issue(dir.path(), "good", LONG);
    let other = theirs.issue(dir.path(), "other", LONG);
    let old = ours.issue(dir.path(), "old", Duration::ZERO);
    for (tls, words) in [
        (TlsConfig { key_file: other.key_file.clone(), ..good.clone() }, "other.key: this is not the key"),
        (TlsConfig { cert_file: good.key_file.clone(), ..good.clone() }, "good.key: it holds no certificate"),
        (TlsConfig { ca_file: "/nonexistent.pem".into(), ..good.clone() }, "/nonexistent.pem cannot be read"),
        (old, "old.pem: a certificate in it has expired"),
        (TlsConfig { key_file: String::new(), ..good.clone() }, "listen.tls.key_file is empty"),
    ] {
        let mut config = penstock_config::controlplane::ControlPlaneConfig::default();
        config.listen.http = "127.0.0.1:0".into();
        config.listen.grpc = "127.0.0.1:0".into();
        config.store.path = dir.path().join("store.redb").to_str().unwrap().into();
        config.listen.tls = tls;
        let error = penstock_controlplane::run(config, None, Default::default()).await.unwrap_err();
        assert!(error.to_string().contains(words), "{words}: {error}");
    }
}

/// An agent may dial any control plane: what a follower relays to the leader goes over mutual TLS too.
#[tokio::test]
async fn a_follower_relays_to_the_leader_over_tls() {
    let Some(cluster) = Cluster::start(1).await else { return };
    let dir = tempfile::tempdir().unwrap();
    let ours = Authority::new();
    let server = ours.issue(dir.path(), "server", LONG);
    let planes = Planes::start(&cluster, 2, |_| {
        let set =
            |key: &str, file: &str| (format!("PENSTOCK_CONTROLPLANE__LISTEN__TLS__{key}"), file.to_owned());
        vec![
            set("CA_FILE", &server.ca_file),
            set("CERT_FILE", &server.cert_file),
            set("KEY_FILE", &server.key_file),
        ]
    })
    .await;
    let follower = 1 - planes.leader(&[0, 1]).await;
    let good = ours.issue(dir.path(), "good", LONG);
    let (outbound, stream) = tokio::sync::mpsc::channel(4);
    let first = v1::AgentMessage { message: Some(Message::Hello(hello("n", 1))) };
    outbound.send(first).await.unwrap();
    let channel = dial(&planes.all[follower].grpc, client(&good).as_ref()).unwrap().connect().await.unwrap();
    let mut session =
        FleetClient::new(channel).session(ReceiverStream::new(stream)).await.unwrap().into_inner();
    let answer = session.message().await.unwrap().unwrap().message.unwrap();
    assert!(matches!(answer, v1::controller_message::Message::Welcome(_)), "{answer:?}");
}
