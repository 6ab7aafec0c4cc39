//! Large bodies through the whole system: `model` as the last key, every framing, and every byte as it was sent.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use serde_json::Value;
use support::{Up, client};
use xxhash_rust::xxh3::xxh3_64;

/// A chat request of about `size` bytes. The bulk is a field that nobody knows, full of what a careless scanner trips over.
fn body(size: usize, seed: u64) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let pieces =
        [r#"{\"model\":\"decoy\"}"#, r"\\", r"\u00e9", "é", " plain text ", r#"\""#, "}],[{", "🦀", r"\n"];
    let mut body =
        br#"{"messages" : [ {"role":"user","content":"hi"} ] ,"max_tokens":1,"padding":""#.to_vec();
    while body.len() < size {
        body.extend_from_slice(pieces[rng.usize(0..pieces.len())].as_bytes());
    }
    body.extend_from_slice(b"\" ,\t\"nested\":{\"model\":\"decoy\"},\n \"model\" :\"sim-model\" } ");
    body
}

enum Framing {
    ContentLength,
    Chunked,
    H2,
}

async fn post(url: &str, framing: &Framing, body: &[u8]) -> (u16, String, String) {
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(60));
    let client =
        if matches!(framing, Framing::H2) { client.http2_prior_knowledge() } else { client.http1_only() };
    let body = match framing {
        Framing::Chunked => {
            let pieces: Vec<_> = body.chunks(100_003).map(|c| Ok::<_, std::io::Error>(c.to_vec())).collect();
            reqwest::Body::wrap_stream(futures_util::stream::iter(pieces))
        }
        _ => body.to_vec().into(),
    };
    let request = client.build().unwrap().post(format!("{url}/v1/chat/completions"));
    let answer = request.header("content-type", "application/json").body(body).send().await.unwrap();
    let id = answer.headers()["x-request-id"].to_str().unwrap().to_owned();
    (answer.status().as_u16(), id, answer.text().await.unwrap())
}

#[tokio::test]
async fn a_large_body_arrives_byte_for_byte_whatever_its_framing() {
    let up = Up::start(&["--engines", "1"]);
    let engine = up.json["engines"][0]["address"].as_str().unwrap().to_owned();
    for size in [1 << 20, 20 << 20] {
        for (seed, framing) in [Framing::ContentLength, Framing::Chunked, Framing::H2].iter().enumerate() {
            let body = body(size, seed as u64);
            let (status, id, text) = post(&up.url(), framing, &body).await;
            assert_eq!(status, 200, "{text}");
            let seen = client().get(format!("http://{engine}/sim/requests?id={id}")).send().await.unwrap();
            let seen: Value = seen.json().await.unwrap();
            let record = &seen["requests"][0];
            assert_eq!(record["body_bytes"], body.len(), "{seen}");
            assert_eq!(record["body_xxh3"], format!("{:016x}", xxh3_64(&body)), "{seen}");
        }
    }
    up.stop();
}

#[tokio::test]
async fn a_body_of_33_mib_is_refused_in_openais_shape() {
    let up = Up::start(&["--engines", "1"]);
    let body = body(33 << 20, 1);
    for framing in [Framing::ContentLength, Framing::Chunked, Framing::H2] {
        let (status, _, text) = post(&up.url(), &framing, &body).await;
        assert_eq!(status, 413, "{text}");
        let error: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(error["error"]["code"], "request_too_large", "{text}");
    }
    up.stop();
}
