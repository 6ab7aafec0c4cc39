//! Audio and WebSockets of the simulator: forms, speech, realtime.
#![allow(clippy::unwrap_used)]

mod engine_support;

use engine_support::{Sim, request, wait_for};
use futures_util::{SinkExt, StreamExt};
use penstock_loadtest::engine::audio::heard;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Error, Message, protocol::frame::coding::CloseCode},
};

const SOUND: &[u8] = b"RIFF\r\n--not the boundary\r\n\x00\xff";

fn form(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut body =
        b"--B\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\n".to_vec();
    body.extend(SOUND);
    for (name, value) in fields {
        body.extend(
            format!("\r\n--B\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}").bytes(),
        );
    }
    body.extend(b"\r\n--B--\r\n");
    body
}

fn transcribe(sim: &Sim, path: &str, fields: &[(&str, &str)]) -> engine_support::Reply {
    let body = form(fields);
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: multipart/form-data; boundary=B\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    request(sim.address, &head, &body)
}

#[test]
fn a_transcription_depends_on_the_bytes_of_the_file() {
    let sim = Sim::start(&[]);
    for path in ["/v1/audio/transcriptions", "/v1/audio/translations"] {
        let reply = transcribe(&sim, path, &[("model", "sim-model")]);
        assert_eq!((reply.status, &reply.json()["text"]), (200, &json!(heard(SOUND))), "{}", reply.text());
    }
    let text =
        transcribe(&sim, "/v1/audio/transcriptions", &[("response_format", "text"), ("model", "sim-model")]);
    assert_eq!(text.text(), heard(SOUND));
    let stream = transcribe(&sim, "/v1/audio/transcriptions", &[("model", "sim-model"), ("stream", "true")]);
    assert_eq!(stream.content(), heard(SOUND));
    assert!(stream.head.contains("text/event-stream") && stream.text().ends_with("data: [DONE]\n\n"));
    assert_ne!(heard(b"a"), heard(b"b"));
}

#[test]
fn what_is_wrong_with_a_form_is_refused() {
    let sim = Sim::start(&[]);
    assert_eq!(transcribe(&sim, "/v1/audio/transcriptions", &[("model", "other")]).status, 404);
    let bad = [("model", "sim-model"), ("response_format", "mp3")];
    assert_eq!(transcribe(&sim, "/v1/audio/transcriptions", &bad).status, 400);
    assert_eq!(sim.post("/v1/audio/transcriptions", &json!({"model": "sim-model"})).status, 400);
}

#[test]
fn speech_pooling_and_classes() {
    let sim = Sim::start(&[]);
    let speech = sim.post("/v1/audio/speech", &json!({"model": "sim-model", "input": "hello"}));
    assert!(speech.head.contains("audio/wav") && speech.body.starts_with(b"RIFF"));
    assert_eq!(speech.body.len(), 44 + 5 * 3200);
    let pooled = sim.post("/pooling", &json!({"model": "sim-model", "input": ["a", "b"]})).json();
    assert_eq!(pooled["data"].as_array().unwrap().len(), 2);
    let class = sim.post("/classify", &json!({"model": "sim-model", "input": "a"})).json();
    assert!(class["data"][0]["label"].as_str().unwrap().starts_with("LABEL_"));
}

async fn connect(sim: &Sim) -> Result<WebSocketStream<TcpStream>, Error> {
    let stream = TcpStream::connect(sim.address).await.unwrap();
    client_async(format!("ws://{}/v1/realtime?model=sim-model", sim.address), stream)
        .await
        .map(|(socket, _)| socket)
}

async fn event(socket: &mut WebSocketStream<TcpStream>) -> Value {
    serde_json::from_str(socket.next().await.unwrap().unwrap().to_text().unwrap()).unwrap()
}

async fn say(socket: &mut WebSocketStream<TcpStream>, event: Value) {
    socket.send(Message::text(event.to_string())).await.unwrap();
}

#[tokio::test]
async fn a_realtime_session_transcribes_what_it_is_sent() {
    let sim = Sim::start(&[]);
    let mut socket = connect(&sim).await.unwrap();
    assert_eq!(event(&mut socket).await["type"], "session.created");
    say(&mut socket, json!({"type": "session.update", "model": "other"})).await;
    assert_eq!(event(&mut socket).await["code"], "model_not_found");
    say(&mut socket, json!({"type": "input_audio_buffer.append", "audio": "aGVs"})).await;
    say(&mut socket, json!({"type": "input_audio_buffer.append", "audio": "bG8="})).await;
    say(&mut socket, json!({"type": "input_audio_buffer.commit", "final": true})).await;
    let mut text = String::new();
    loop {
        let event = event(&mut socket).await;
        match event["type"].as_str().unwrap() {
            "transcription.delta" => text.push_str(event["delta"].as_str().unwrap()),
            "transcription.done" => {
                assert_eq!(event["text"], text);
                break;
            }
            other => panic!("{other}"),
        }
    }
    assert_eq!(text, heard(b"hello"));
    socket.send(Message::binary(vec![1, 2, 3])).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap().into_data().to_vec(), [1, 2, 3]);
    socket.close(None).await.unwrap();
    while socket.next().await.is_some() {}
    wait_for("the record", || sim.last_record()["outcome"] == "finished");
    assert_eq!(sim.last_record()["status"], 101);
}

#[tokio::test]
async fn faults_strike_a_realtime_session() {
    let sim = Sim::start(&[]);
    sim.fault(json!({"kind": "busy", "count": 1, "path": "/v1/realtime"}));
    assert!(matches!(connect(&sim).await, Err(Error::Http(answer)) if answer.status() == 503));
    sim.fault(json!({"kind": "close", "after_tokens": 2, "count": 1, "path": "/v1/realtime"}));
    let mut socket = connect(&sim).await.unwrap();
    event(&mut socket).await;
    say(&mut socket, json!({"type": "response.create"})).await;
    let mut deltas = 0;
    while let Some(Ok(message)) = socket.next().await {
        deltas += usize::from(message.to_text().unwrap().contains("response.output_text.delta"));
    }
    assert_eq!(deltas, 2);
    wait_for("the record", || sim.last_record()["outcome"] == "fault close");
}

#[tokio::test]
async fn an_engine_that_stops_says_so() {
    let sim = Sim::start(&[]);
    let mut socket = connect(&sim).await.unwrap();
    event(&mut socket).await;
    sim.signal(sim.pid, nix::sys::signal::Signal::SIGTERM);
    match socket.next().await {
        Some(Ok(Message::Close(Some(frame)))) => assert_eq!(frame.code, CloseCode::Restart),
        other => panic!("{other:?}"),
    }
}
