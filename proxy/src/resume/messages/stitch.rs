//! The continuation's events as events of the stream.

use super::super::{
    Refusal,
    wire::{self, Seam},
};
use crate::openai::span::{
    self,
    Step::{At, Key},
};

/// How the engine writes a delta of text: pydantic's order of keys is not everybody's.
#[derive(Debug, Clone)]
pub(super) struct Form {
    before: Vec<u8>,
    after: Vec<u8>,
    index: u64,
    /// Whether the index comes before what it is the index of.
    index_first: bool,
}

impl Form {
    pub(super) fn of(data: &[u8]) -> Option<Self> {
        let text = span::find(data, &[Key("delta"), Key("text")])?;
        let index = span::find(data, &[Key("index")])?;
        Some(Self {
            before: data.get(..text.start)?.to_vec(),
            after: data.get(text.end..)?.to_vec(),
            index: wire::count(data, &[Key("index")])?,
            index_first: index.start < text.start,
        })
    }

    /// A delta of the text `json`, a JSON string.
    fn text(&self, index: u64, json: &[u8]) -> Vec<u8> {
        if index == self.index {
            return [&self.before, json, &self.after].concat();
        }
        self.of_block(
            "content_block_delta",
            index,
            "delta",
            &[br#"{"type":"text_delta","text":"#, json, b"}"].concat(),
        )
    }

    fn of_block(&self, kind: &str, index: u64, key: &str, value: &[u8]) -> Vec<u8> {
        let mut out = format!("{{\"type\":\"{kind}\"").into_bytes();
        let number = format!(",\"index\":{index}").into_bytes();
        let value = [format!(",\"{key}\":").as_bytes(), value].concat();
        let pair = if self.index_first { [number, value] } else { [value, number] };
        out.extend(pair.concat());
        out.push(b'}');
        out
    }
}

/// What the counts at the end are made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counts {
    /// Tokens of the prompt, as the stream said.
    pub(super) input: Option<u64>,
    /// Tokens of the answer that were prompt of the continuation.
    pub(super) seen: u64,
    /// Whether those are all that were asked for.
    pub(super) full: bool,
}

/// What becomes of the events of a continuation.
#[derive(Debug)]
pub struct Stitch {
    seam: Seam,
    how: How,
}

#[derive(Debug)]
enum How {
    /// The request was asked again: what opens the stream comes once.
    Again { started: bool, opened: bool },
    /// A chat completion goes on where the text ended.
    Chat(Box<Chat>),
}

impl Stitch {
    pub(super) fn again(started: bool, opened: bool, seam: Seam) -> Self {
        Self { seam, how: How::Again { started, opened } }
    }

    pub(super) fn chat(form: Form, counts: Counts, seam: Seam) -> Self {
        let chat = Chat {
            index: form.index,
            form,
            counts,
            block: Block::Text,
            pending: String::new(),
            calls: Vec::new(),
            arguments: String::new(),
            finish: None,
            ended: false,
        };
        Self { seam, how: How::Chat(Box::new(chat)) }
    }

    /// Appends what an event of the continuation is in the stream, if anything.
    ///
    /// # Errors
    /// It does not fit what the client has seen.
    pub fn on_event(&mut self, name: &[u8], data: &[u8], out: &mut Vec<u8>) -> Result<(), Refusal> {
        if wire::error(name, data).is_some() || (data != b"[DONE]" && !span::is_json(data)) {
            // Who sees the stream next says what it means.
            wire::event(out, name, data);
            return Ok(());
        }
        match &mut self.how {
            How::Again { started, opened } => again(&mut self.seam, (started, opened), name, data, out),
            How::Chat(_) if data != b"[DONE]" && span::get(data, &[Key("choices")]).is_none() => {
                wire::event(out, name, data);
                Ok(())
            }
            How::Chat(chat) => chat.on_chunk(&mut self.seam, data, out),
        }
    }
}

fn again(
    seam: &mut Seam,
    (started, opened): (&mut bool, &mut bool),
    name: &[u8],
    data: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), Refusal> {
    match span::get(data, &[Key("type")]).and_then(span::string).unwrap_or_default() {
        b"message_start" if std::mem::take(started) => return Ok(()),
        b"content_block_start" if std::mem::take(opened) => {
            let kind = wire::text(data, &[Key("content_block"), Key("type")]);
            return if kind.as_deref() == Some("text") { Ok(()) } else { Err(Refusal::Mismatch) };
        }
        b"content_block_delta" if !seam.is_closed() => {
            let path = [Key("delta"), Key("text")];
            let text = wire::text(data, &path).ok_or(Refusal::Mismatch)?;
            let new = seam.new_text(&text);
            if !new.is_empty() {
                let mut edits = wire::Edits::default();
                edits.set(data, &path, wire::quoted(new));
                wire::event(out, name, &edits.make(data));
            }
            return Ok(());
        }
        // The answer ended before anything new came; the client's block must be closed all the same.
        b"message_delta" if std::mem::take(opened) => {
            wire::event(out, b"content_block_stop", br#"{"type":"content_block_stop","index":0}"#);
        }
        _ => {}
    }
    wire::event(out, name, data);
    Ok(())
}

#[derive(Debug)]
enum Block {
    None,
    Text,
    /// The call's id.
    Tool(String),
}

/// A chat completion's chunks as messages' events, as vLLM's adapter makes them.
#[derive(Debug)]
struct Chat {
    form: Form,
    counts: Counts,
    index: u64,
    block: Block,
    /// Text that came within a tool's block: it follows in one of its own.
    pending: String,
    /// Ids of calls by their index.
    calls: Vec<(u64, String)>,
    /// Arguments of the last call.
    arguments: String,
    /// `finish_reason` and, as it is written, `stop_reason`.
    finish: Option<(String, Vec<u8>)>,
    ended: bool,
}

impl Chat {
    fn on_chunk(&mut self, seam: &mut Seam, data: &[u8], out: &mut Vec<u8>) -> Result<(), Refusal> {
        if data == b"[DONE]" {
            // Without an end before it, it is none: the client gets no end either.
            if self.ended {
                wire::event(out, b"message_stop", br#"{"type":"message_stop"}"#);
            }
            return Ok(());
        }
        let choice = [Key("choices"), At(0)];
        if span::find(data, &choice).is_none() {
            self.end(data, out);
            return Ok(());
        }
        let [choices, first] = choice;
        if let Some(reason) = wire::text(data, &[choices, first, Key("finish_reason")]) {
            let stop = span::get(data, &[choices, first, Key("stop_reason")]).unwrap_or(b"null");
            self.finish = Some((reason, stop.to_vec()));
        }
        if self.counts.full {
            return Ok(());
        }
        let delta = [choices, first, Key("delta")];
        for key in ["reasoning", "reasoning_content"] {
            let [a, b, c] = delta;
            if wire::text(data, &[a, b, c, Key(key)]).is_some_and(|text| !text.is_empty()) {
                return Err(Refusal::Mismatch);
            }
        }
        let [a, b, c] = delta;
        let content = [a, b, c, Key("content")];
        if let Some(json) =
            span::get(data, &content).filter(|json| json.starts_with(b"\"") && *json != b"\"\"")
        {
            self.content(seam, json, out)?;
        }
        if let Some(calls) = span::find(data, &[a, b, c, Key("tool_calls")]) {
            for call in span::elements(data, &calls) {
                self.call(data.get(call).unwrap_or_default(), out);
            }
        }
        Ok(())
    }

    fn content(&mut self, seam: &mut Seam, json: &[u8], out: &mut Vec<u8>) -> Result<(), Refusal> {
        if seam.is_closed() && !matches!(self.block, Block::Tool(_)) {
            self.text(json, out);
            return Ok(());
        }
        let text: String = serde_json::from_slice(json).map_err(|_| Refusal::Unreadable)?;
        let new = seam.new_text(&text);
        match self.block {
            _ if new.is_empty() => {}
            Block::Tool(_) => self.pending.push_str(new),
            Block::None | Block::Text => self.text(&wire::quoted(new), out),
        }
        Ok(())
    }

    fn text(&mut self, json: &[u8], out: &mut Vec<u8>) {
        if matches!(self.block, Block::None) {
            self.start(br#"{"type":"text","text":""}"#, out);
            self.block = Block::Text;
        }
        wire::event(out, b"content_block_delta", &self.form.text(self.index, json));
    }

    fn call(&mut self, call: &[u8], out: &mut Vec<u8>) {
        let at = wire::count(call, &[Key("index")]).unwrap_or_default();
        let arguments = wire::text(call, &[Key("function"), Key("arguments")]).unwrap_or_default();
        let id = match wire::text(call, &[Key("id")]) {
            Some(id) => {
                self.calls.retain(|(index, _)| *index != at);
                self.calls.push((at, id.clone()));
                if let Some(name) = wire::raw(call, &[Key("function"), Key("name")])
                    && !self.is_open(&id)
                {
                    self.stop(out);
                    self.arguments.clear();
                    let block = [
                        br#"{"type":"tool_use","id":"#,
                        &wire::quoted(&id)[..],
                        br#","name":"#,
                        name,
                        br#","input":{}}"#,
                    ];
                    self.start(&block.concat(), out);
                    self.block = Block::Tool(id.clone());
                }
                Some(id)
            }
            None => self.calls.iter().find(|(index, _)| *index == at).map(|(_, id)| id.clone()),
        };
        if !arguments.is_empty() && id.is_some_and(|id| self.is_open(&id)) {
            self.arguments.push_str(&arguments);
            let delta =
                [br#"{"type":"input_json_delta","partial_json":"#, &wire::quoted(&arguments)[..], b"}"]
                    .concat();
            let data = self.form.of_block("content_block_delta", self.index, "delta", &delta);
            wire::event(out, b"content_block_delta", &data);
        }
    }

    fn is_open(&self, call: &str) -> bool {
        matches!(&self.block, Block::Tool(id) if id == call)
    }

    fn start(&self, block: &[u8], out: &mut Vec<u8>) {
        let data = self.form.of_block("content_block_start", self.index, "content_block", block);
        wire::event(out, b"content_block_start", &data);
    }

    fn stop(&mut self, out: &mut Vec<u8>) {
        if !matches!(self.block, Block::None) {
            let data = format!("{{\"type\":\"content_block_stop\",\"index\":{}}}", self.index);
            wire::event(out, b"content_block_stop", data.as_bytes());
            self.index += 1;
            self.block = Block::None;
        }
        let pending = std::mem::take(&mut self.pending);
        if !pending.is_empty() {
            self.text(&wire::quoted(&pending), out);
            self.stop(out);
        }
    }

    /// The chunk that has no choice: the counts.
    fn end(&mut self, data: &[u8], out: &mut Vec<u8>) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        self.stop(out);
        let number = |path: &[_]| wire::count(data, path);
        let prompt = number(&[Key("usage"), Key("prompt_tokens")]).unwrap_or_default();
        let new = number(&[Key("usage"), Key("completion_tokens")]).unwrap_or_default();
        let input = self.counts.input.unwrap_or_else(|| prompt.saturating_sub(self.counts.seen));
        let cached = number(&[Key("usage"), Key("prompt_tokens_details"), Key("cached_tokens")]);
        let cached = cached.map(|cached| cached.min(input));
        let output = self.counts.seen + if self.counts.full { 0 } else { new };
        let (reason, sequence) = self.reason();
        let read = cached.map(|cached| format!(",\"cache_read_input_tokens\":{cached}")).unwrap_or_default();
        let input = input - cached.unwrap_or_default();
        let data = format!(
            "{{\"type\":\"message_delta\",\"delta\":{{\"stop_reason\":{reason},\"stop_sequence\":{sequence}}},\
             \"usage\":{{\"input_tokens\":{input},\"output_tokens\":{output}{read}}}}}"
        );
        wire::event(out, b"message_delta", data.as_bytes());
    }

    /// Anthropic's `stop_reason` and `stop_sequence`, as vLLM maps them.
    fn reason(&self) -> (&'static str, String) {
        let null = || "null".to_owned();
        if self.counts.full {
            return ("\"max_tokens\"", null());
        }
        // What ends without a reason ended by itself; vLLM's adapter says so too.
        let (finish, stop) = self.finish.as_ref().map_or(("stop", &b"null"[..]), |(f, s)| (f.as_str(), s));
        let called = !self.calls.is_empty();
        match finish {
            "length" => ("\"max_tokens\"", null()),
            "stop" | "tool_calls" if called && span::is_json(self.arguments.as_bytes()) => {
                ("\"tool_use\"", null())
            }
            "stop" | "tool_calls" if stop.starts_with(b"\"") => {
                ("\"stop_sequence\"", String::from_utf8_lossy(stop).into_owned())
            }
            "tool_calls" => ("\"tool_use\"", null()),
            "stop" if called => ("\"tool_use\"", null()),
            "stop" => ("\"end_turn\"", null()),
            _ => ("null", null()),
        }
    }
}
