//! The whole fleet over mutual TLS: control plane, agent, proxy and an engine, and a certificate renewed under way.

#![allow(clippy::unwrap_used)]

mod support;

use std::{path::Path, time::Duration};

use nix::sys::signal::{Signal, kill};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use serde_json::{Value, json};
use support::{Up, client, eventually};

const SOON: Duration = Duration::from_secs(60);

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str) -> Authority {
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// Writes `dir/NAME.pem` and `dir/NAME.key`.
fn issue(authority: &Authority, dir: &Path, name: &str) {
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["127.0.0.1".into()]).unwrap();
    let certificate = params.signed_by(&key, authority).unwrap();
    std::fs::write(dir.join(format!("{name}.pem")), certificate.pem()).unwrap();
    std::fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
}

/// One section's three files, as the environment has them.
fn settings(section: &str, dir: &Path, name: &str) -> Vec<(String, String)> {
    [
        ("CA_FILE", "ca.pem".to_owned()),
        ("CERT_FILE", format!("{name}.pem")),
        ("KEY_FILE", format!("{name}.key")),
    ]
    .into_iter()
    .map(|(key, file)| (format!("{section}__TLS__{key}"), dir.join(file).to_str().unwrap().to_owned()))
    .collect()
}

async fn chat(up: &Up) -> Result<(), String> {
    let body =
        json!({"model": "sim-model", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]});
    let request = client().post(format!("{}/v1/chat/completions", up.url())).json(&body);
    let answer = request.send().await.map_err(|e| e.to_string())?;
    let (status, text) = (answer.status(), answer.text().await.map_err(|e| e.to_string())?);
    if status.is_success() { Ok(()) } else { Err(format!("{status}: {text}")) }
}

async fn readyz(address: &str) -> Value {
    client().get(format!("http://{address}/readyz")).send().await.unwrap().json().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_over_mutual_tls_serves_scales_and_takes_renewed_certificates() {
    let dir = tempfile::tempdir().unwrap();
    let ours = authority("ours");
    std::fs::write(dir.path().join("ca.pem"), ours.pem()).unwrap();
    for name in ["controlplane", "agent", "proxy"] {
        issue(&ours, dir.path(), name);
    }
    let mut env = settings("PENSTOCK_CONTROLPLANE__LISTEN", dir.path(), "controlplane");
    env.extend(settings("PENSTOCK_AGENT__CONTROLPLANE", dir.path(), "agent"));
    env.extend(settings("PENSTOCK_PROXY__DISCOVERY", dir.path(), "proxy"));
    let env: Vec<(&str, &str)> = env.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let up = Up::start_with_env(&["--engines", "1"], &env);
    chat(&up).await.unwrap();
    // It is TLS: a peer in clear gets nowhere.
    let clear = client().get(format!("http://{}/", up.address("grpc"))).send().await;
    assert!(clear.is_err(), "{clear:?}");

    for name in ["controlplane", "agent", "proxy"] {
        issue(&ours, dir.path(), name);
    }
    // The new ones serve once connections begin anew.
    kill(support::pid(up.pid("controlplane")), Signal::SIGKILL).unwrap();
    let connected = || {
        // It may not be up again.
        let output = up.run(&["proxies", "--output", "json"]);
        let proxies: Value = serde_json::from_slice(&output.stdout).ok()?;
        proxies["proxies"].as_array().filter(|all| !all.is_empty()).map(|_| ())
    };
    eventually("the proxy's subscription", SOON, connected);
    up.run_json(&["scale", "sim-model", "--replicas", "2"]);
    up.wait_for_ready(2);
    chat(&up).await.unwrap();

    // A proxy with a certificate of somebody else cannot connect, and says why.
    std::fs::write(dir.path().join("ca.pem"), authority("theirs").pem()).unwrap();
    kill(support::pid(up.pid("controlplane")), Signal::SIGKILL).unwrap();
    let reason = eventually("a proxy that says why it is alone", SOON, || {
        let shown = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(readyz(&up.address("proxy_private")))
        });
        Some(shown.to_string()).filter(|text| text.contains("UnknownIssuer"))
    });
    assert!(reason.contains("invalid peer certificate"), "{reason}");
    chat(&up).await.expect("it goes on with what it knows");
    std::fs::write(dir.path().join("ca.pem"), ours.pem()).unwrap();
    eventually("the proxy's subscription", SOON, connected);
    up.stop();
}
