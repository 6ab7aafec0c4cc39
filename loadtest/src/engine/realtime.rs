//! `/v1/realtime`: a WebSocket that speaks the events of vLLM's realtime transcription and a few of OpenAI's.
//!
//! - `session.created` comes first; `session.update` is answered by `session.updated` and checks its `model`.
//! - `input_audio_buffer.append` takes base64 audio; `input_audio_buffer.commit` is answered by `transcription.delta`s and
//!   `transcription.done`, the text of [`super::audio::heard`].
//! - `response.create` is answered by `response.created`, `response.output_text.delta`s and `response.done`.
//! - Bytes (binary messages) come back as they are.
//!
//! Faults strike as elsewhere: before the handshake's answer, or (`close`, `reset`) after as many deltas.

use std::sync::atomic::Ordering;

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        handshake::derive_accept_key,
        protocol::{CloseFrame, Role, frame::coding::CloseCode},
    },
};

use super::{
    audio,
    faults::{Fault, FaultKind},
    http::{Conn, Head, Response},
    record::{Recorder, unix_us},
    run::{Next, flushed},
    state::{Counted, Engine},
};

/// The path.
pub(super) const PATH: &str = "/v1/realtime";

/// Bytes of audio that wait to be transcribed at most.
const MAX_AUDIO_BYTES: usize = 16 << 20;

/// Why a conversation ended.
enum End {
    /// The client closed, or hung up.
    Client(&'static str),
    /// A fault: the connection is dropped, or reset.
    Fault(FaultKind),
    /// The engine is stopping.
    Stopping,
}

/// A conversation.
struct Session<'a> {
    engine: &'a Engine,
    socket: WebSocketStream<&'a mut TcpStream>,
    fault: Option<Fault>,
    audio: Vec<u8>,
    deltas: u64,
}

/// Answers a handshake and holds the conversation. The connection ends with it.
pub(super) async fn serve(
    engine: &Engine,
    conn: &mut Conn,
    recorder: &Recorder,
    head: &Head,
    fault: Option<Fault>,
) -> Next {
    let Some(key) = head.header("sec-websocket-key").filter(|_| is_handshake(head)) else {
        // The framework knows the path for WebSockets only.
        let response = Response::json(404, "{\"detail\":\"Not Found\"}");
        recorder.status(response.status);
        conn.respond(&response, false);
        flushed(conn, false).await;
        recorder.end("finished");
        return Next::Close;
    };
    let protocols = head.header("sec-websocket-protocol").unwrap_or("");
    let protocol = protocols.split(',').map(str::trim).find(|name| *name == "realtime");
    let protocol = protocol.map_or_else(String::new, |name| format!("sec-websocket-protocol: {name}\r\n"));
    let answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-accept: {}\r\n{protocol}\r\n",
        derive_accept_key(key.as_bytes())
    );
    conn.out.extend_from_slice(answer.as_bytes());
    recorder.status(101);
    if flushed(conn, true).await == Next::Close {
        recorder.end("disconnect");
        return Next::Close;
    }
    let _in_flight = Counted::new(&engine.in_flight);
    let end = {
        let (stream, early) = conn.raw();
        let socket = WebSocketStream::from_partially_read(stream, early, Role::Server, None).await;
        let mut session = Session { engine, socket, fault, audio: Vec::new(), deltas: 0 };
        match session.hold().await {
            Ok(()) => End::Client("disconnect"),
            Err(end) => end,
        }
    };
    match end {
        End::Client(how) => {
            if how == "disconnect" {
                engine.disconnects.fetch_add(1, Ordering::Relaxed);
            }
            recorder.end(how);
        }
        End::Fault(kind) => {
            if kind == FaultKind::Reset {
                conn.reset();
            }
            recorder.end(&format!("fault {}", kind.name()));
        }
        End::Stopping => recorder.end("shutdown"),
    }
    Next::Close
}

fn is_handshake(head: &Head) -> bool {
    let has = |name: &str, word: &str| {
        head.header(name).is_some_and(|v| v.split(',').any(|w| w.trim().eq_ignore_ascii_case(word)))
    };
    head.method() == "GET"
        && has("connection", "upgrade")
        && has("upgrade", "websocket")
        && has("sec-websocket-version", "13")
}

impl Session<'_> {
    /// Talks until somebody ends it. `Ok` when the client is gone without a goodbye.
    async fn hold(&mut self) -> Result<(), End> {
        let model = self.engine.options.served_name().to_owned();
        let id = format!("sess-{:016x}", fastrand::u64(..));
        self.say(
            json!({"type": "session.created", "id": id, "created": unix_us() / 1_000_000, "model": model}),
        )
        .await?;
        loop {
            let message = tokio::select! {
                message = self.socket.next() => message,
                () = self.engine.closing.cancelled() => {
                    let frame = CloseFrame { code: CloseCode::Restart, reason: "shutting down".into() };
                    // Whoever does not read it learns by the end of the connection.
                    drop(self.socket.close(Some(frame)).await);
                    return Err(End::Stopping);
                }
            };
            match message {
                Some(Ok(Message::Text(text))) => self.on_event(&text).await?,
                Some(Ok(Message::Binary(bytes))) => self.send(Message::Binary(bytes)).await?,
                Some(Ok(Message::Close(_))) => {
                    // The answer to a close is queued already; this sends it and waits for the end.
                    drop(self.socket.flush().await);
                    return Err(End::Client("finished"));
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Ok(()),
            }
        }
    }

    async fn on_event(&mut self, text: &str) -> Result<(), End> {
        let event: Value = serde_json::from_str(text).unwrap_or_default();
        let field = |name: &str| event.get(name).and_then(Value::as_str).unwrap_or_default();
        match field("type") {
            "session.update" => {
                let model = field("model");
                if !model.is_empty() && !self.engine.options.serves(model) {
                    let message = format!("The model `{model}` does not exist.");
                    return self
                        .say(json!({"type": "error", "error": message, "code": "model_not_found"}))
                        .await;
                }
                self.say(json!({"type": "session.updated"})).await
            }
            "input_audio_buffer.append" => match from_base64(field("audio")) {
                Some(bytes) if self.audio.len() + bytes.len() <= MAX_AUDIO_BYTES => {
                    self.audio.extend(bytes);
                    Ok(())
                }
                _ => {
                    self.say(json!({"type": "error", "error": "Invalid audio", "code": "invalid_audio"}))
                        .await
                }
            },
            "input_audio_buffer.commit" => {
                let heard = audio::heard(&std::mem::take(&mut self.audio));
                self.deltas(&heard, "transcription.delta").await?;
                self.say(json!({"type": "transcription.done", "text": heard})).await
            }
            "response.create" => {
                let text = audio::heard(field("instructions").as_bytes());
                self.say(json!({"type": "response.created"})).await?;
                self.deltas(&text, "response.output_text.delta").await?;
                self.say(json!({"type": "response.done", "response": {"status": "completed", "text": text}}))
                    .await
            }
            _ => {
                self.say(json!({"type": "error", "error": "Unknown event type", "code": "unknown_event"}))
                    .await
            }
        }
    }

    async fn deltas(&mut self, text: &str, kind: &str) -> Result<(), End> {
        for word in text.split_inclusive(' ') {
            if let Some(fault) = &self.fault
                && fault.after_tokens.is_some_and(|after| self.deltas >= after)
                && matches!(fault.kind, FaultKind::Close | FaultKind::Reset)
            {
                return Err(End::Fault(fault.kind));
            }
            self.say(json!({"type": kind, "delta": word})).await?;
            self.deltas += 1;
        }
        Ok(())
    }

    async fn say(&mut self, event: Value) -> Result<(), End> {
        self.send(Message::text(event.to_string())).await
    }

    async fn send(&mut self, message: Message) -> Result<(), End> {
        self.socket.send(message).await.map_err(|_| End::Client("disconnect"))
    }
}

/// Bytes in base64, padded or not; `None` for anything else.
fn from_base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut word, mut bits) = (0u32, 0);
    for letter in text.trim_end_matches('=').bytes() {
        let value = match letter {
            b'A'..=b'Z' => letter - b'A',
            b'a'..=b'z' => letter - b'a' + 26,
            b'0'..=b'9' => letter - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        word = word << 6 | u32::from(value);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push(u8::try_from(word >> bits & 0xff).unwrap_or_default());
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_read_with_and_without_padding() {
        for (text, bytes) in
            [("", &b""[..]), ("AA==", b"\0"), ("AAE", b"\0\x01"), ("//79", b"\xff\xfe\xfd"), ("aGk=", b"hi")]
        {
            assert_eq!(from_base64(text).as_deref(), Some(bytes), "{text}");
        }
        assert_eq!(from_base64("a b"), None);
    }
}
