//! The events of a continuation as events of the stream that it continues.

use bytes::Bytes;

use super::{
    Refusal,
    sample::{Ending, Sample, event, push_ids},
    stop::Stops,
    wire::Seam as Gap,
};
use crate::openai::{
    event::walk,
    request::{Edit, rewrite},
    span::{self, Step::At, Step::Key},
};

/// How the continuation's chunks are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Form {
    /// As they come: it was asked for by the stream's own API.
    Native,
    /// By this sample of the stream: they are chunks of a text completion, or their text changes on the way.
    Sample(Sample),
}

/// How the counts of both parts become those of the whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Merge {
    /// Tokens of the answer that are prompt now.
    pub before: u64,
    /// Tokens of the prompt, if they are known.
    pub prompt: Option<u64>,
    /// Characters of the answer so far.
    pub characters: u64,
}

/// Makes events of the stream out of those of its continuation.
#[derive(Debug)]
pub struct Stitch {
    /// `id` and `created` of the stream, as they are written.
    names: Option<(Vec<u8>, Vec<u8>)>,
    form: Form,
    merge: Merge,
    /// White space where the text seen and its continuation meet.
    gap: Gap,
    stops: Option<Stopping>,
    over: bool,
}

/// The stop strings are the gateway's to find.
#[derive(Debug)]
struct Stopping {
    stops: Stops,
    /// Tokens before which none counts.
    min: u64,
    /// Tokens of the continuation so far.
    generated: u64,
    /// The client wants the usage at the end.
    usage: bool,
}

impl Stitch {
    /// For a stream of these names; without any, the continuation's own stay.
    #[must_use]
    pub fn new(names: Option<(Vec<u8>, Vec<u8>)>, form: Form, merge: Merge) -> Self {
        Self { names, form, merge, gap: Gap::default(), stops: None, over: false }
    }

    /// Takes off what white space the client has already.
    #[must_use]
    pub(super) fn behind(mut self, gap: Gap) -> Self {
        self.gap = gap;
        self
    }

    /// Looks for stop strings once `min` tokens have come; `usage` as the client asked for it.
    #[must_use]
    pub fn stopping_at(mut self, stops: Stops, min: u64, usage: bool) -> Self {
        self.stops = Some(Stopping { stops, min, generated: 0, usage });
        self
    }

    /// Whether the stream has its end, whatever the engine still says.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        self.over
    }

    /// Whole events of the continuation as whole events of the stream.
    ///
    /// # Errors
    /// They are not what was asked for.
    pub fn push(&mut self, events: &Bytes, first: bool) -> Result<Bytes, Refusal> {
        let mut out = Vec::with_capacity(events.len());
        for one in walk(events, first) {
            if self.over {
                break;
            }
            let is_last = *one.data == b"[DONE]"[..] || span::get(&one.data, &[Key("choices")]).is_none();
            if is_last {
                out.extend_from_slice(events.get(one.range).unwrap_or_default());
            } else {
                self.chunk(&one.data, &mut out)?;
            }
        }
        Ok(out.into())
    }

    fn chunk(&mut self, data: &[u8], out: &mut Vec<u8>) -> Result<(), Refusal> {
        let has_choice = span::find(data, &[Key("choices"), At(0)]).is_some();
        match (&self.form, has_choice) {
            (Form::Sample(sample), true) => {
                let sample = sample.clone();
                self.written(&sample, data, out)
            }
            _ => {
                let native = self.native(data);
                out.extend(event(&native));
                Ok(())
            }
        }
    }

    /// A chunk under the stream's names, with the counts of the whole.
    fn native(&mut self, data: &[u8]) -> Vec<u8> {
        let at = |path: &[span::Step<'_>]| span::find(data, path);
        let content =
            at(&[Key("choices"), At(0), Key("delta"), Key("content")]).filter(|_| !self.gap.is_closed());
        let joined = content.and_then(|range| {
            let piece: String = serde_json::from_slice(data.get(range.clone())?).ok()?;
            Some((range, serde_json::Value::from(self.gap.new_text(&piece)).to_string()))
        });
        let mut edits: Vec<Edit<'_>> = Vec::new();
        edits.extend(joined.iter().map(|(range, text)| (range.clone(), text.as_bytes())));
        if let Some((id, created)) = &self.names {
            edits.extend(at(&[Key("id")]).map(|range| (range, &**id)));
            edits.extend(at(&[Key("created")]).map(|range| (range, &**created)));
        }
        let object: &[u8] = b"\"chat.completion.chunk\"";
        if self.is_rendered_chat() {
            edits.extend(at(&[Key("object")]).map(|range| (range, object)));
        }
        let usage =
            at(&[Key("usage")]).and_then(|range| Some((range.clone(), self.usage(data.get(range)?)?)));
        edits.extend(usage.iter().map(|(range, usage)| (range.clone(), &**usage)));
        let offsets = [Key("choices"), At(0), Key("logprobs"), Key("text_offset")];
        let shifted = at(&offsets).and_then(|range| Some((range.clone(), self.shifted(data.get(range)?)?)));
        edits.extend(shifted.iter().map(|(range, offsets)| (range.clone(), &**offsets)));
        rewrite(&data.to_vec().into(), edits).into()
    }

    fn is_rendered_chat(&self) -> bool {
        matches!(&self.form, Form::Sample(sample) if sample.is_chat())
    }

    /// The counts of both parts.
    fn usage(&self, usage: &[u8]) -> Option<Vec<u8>> {
        if self.merge == Merge::default() {
            return None;
        }
        let count = |key| {
            span::get(usage, &[Key(key)]).and_then(|n| std::str::from_utf8(n).ok()?.parse::<u64>().ok())
        };
        let prompt = self.merge.prompt.unwrap_or(count("prompt_tokens")?.saturating_sub(self.merge.before));
        let completion = count("completion_tokens")?.saturating_add(self.merge.before);
        let cached_path = [Key("prompt_tokens_details"), Key("cached_tokens")];
        let cached =
            span::get(usage, &cached_path).and_then(|n| std::str::from_utf8(n).ok()?.parse::<u64>().ok());
        let mut numbers = vec![
            (span::find(usage, &[Key("prompt_tokens")])?, prompt.to_string()),
            (span::find(usage, &[Key("completion_tokens")])?, completion.to_string()),
        ];
        if let Some(range) = span::find(usage, &[Key("total_tokens")]) {
            numbers.push((range, prompt.saturating_add(completion).to_string()));
        }
        // The next engine may have had the answer's beginning in its cache; of the prompt it cannot have had more than all.
        if let Some((range, cached)) = span::find(usage, &cached_path).zip(cached) {
            numbers.push((range, cached.min(prompt).to_string()));
        }
        let edits = numbers.iter().map(|(range, number)| (range.clone(), number.as_bytes())).collect();
        Some(rewrite(&usage.to_vec().into(), edits).into())
    }

    /// Offsets into the whole text.
    fn shifted(&self, offsets: &[u8]) -> Option<Vec<u8>> {
        if self.merge.characters == 0 {
            return None;
        }
        let offsets: Vec<u64> = serde_json::from_slice(offsets).ok()?;
        let shifted: Vec<u64> = offsets.iter().map(|at| at.saturating_add(self.merge.characters)).collect();
        serde_json::to_vec(&shifted).ok()
    }

    /// A chunk of a text completion in the stream's form.
    fn written(&mut self, sample: &Sample, data: &[u8], out: &mut Vec<u8>) -> Result<(), Refusal> {
        let of_choice = |key| span::get(data, &[Key("choices"), At(0), Key(key)]);
        let text = of_choice("text").and_then(span::string).ok_or(Refusal::Mismatch)?;
        let ids = of_choice("token_ids").unwrap_or(b"null");
        let mut reason = of_choice("finish_reason").filter(|reason| *reason != b"null").map(<[u8]>::to_vec);
        let mut stop_reason = of_choice("stop_reason").unwrap_or(b"null").to_vec();
        let mut text = text.to_vec();
        if let Some(stopping) = &mut self.stops {
            let mut read = Vec::new();
            if !push_ids(ids, &mut read) {
                return Err(Refusal::Mismatch);
            }
            let quoted = [b"\"", &text[..], b"\""].concat();
            let piece: String = serde_json::from_slice(&quoted).map_err(|_| Refusal::Mismatch)?;
            stopping.generated += read.len() as u64;
            let mut let_out = stopping.stops.push(&piece, stopping.generated > stopping.min);
            match let_out.stop {
                Some(stop) => {
                    reason = Some(b"\"stop\"".to_vec());
                    stop_reason = serde_json::Value::from(stop).to_string().into_bytes();
                    self.over = true;
                }
                None if reason.is_some() => let_out.text.push_str(&stopping.stops.rest()),
                None => {}
            }
            text = escaped(&let_out.text);
        }
        let mut last = Vec::new();
        if let Some(usage) = span::get(data, &[Key("usage")]).filter(|usage| *usage != b"null") {
            last.extend_from_slice(b",\"usage\":");
            last.extend(self.usage(usage).unwrap_or_else(|| usage.to_vec()));
        }
        if let Some(fingerprint) = span::get(data, &[Key("system_fingerprint")]).filter(|f| *f != b"null") {
            last.extend_from_slice(b",\"system_fingerprint\":");
            last.extend_from_slice(fingerprint);
        }
        let ending = reason.as_deref().map(|reason| Ending { reason, stop_reason: &stop_reason });
        out.extend(sample.write(&text, ids, ending, &last));
        if self.over {
            self.end(data, out);
        }
        Ok(())
    }

    /// The end of a stream that a stop string ended here and not at its engine.
    fn end(&self, data: &[u8], out: &mut Vec<u8>) {
        let Some(stopping) = &self.stops else { return };
        if let (true, Some((id, created)), Some(prompt)) = (stopping.usage, &self.names, self.merge.prompt) {
            let completion = self.merge.before.saturating_add(stopping.generated);
            let total = prompt.saturating_add(completion);
            let object: &[u8] =
                if self.is_rendered_chat() { b"chat.completion.chunk" } else { b"text_completion" };
            let mut json =
                [b"{\"id\":", &**id, b",\"object\":\"", object, b"\",\"created\":", created].concat();
            json.extend_from_slice(b",\"model\":");
            json.extend_from_slice(span::get(data, &[Key("model")]).unwrap_or(b"null"));
            let counts = format!(
                ",\"choices\":[],\"usage\":{{\"prompt_tokens\":{prompt},\"total_tokens\":{total},\"completion_tokens\":{completion}}}}}"
            );
            json.extend_from_slice(counts.as_bytes());
            out.extend(event(&json));
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }
}

/// `text` as it is written inside a JSON string.
fn escaped(text: &str) -> Vec<u8> {
    let quoted = serde_json::Value::from(text).to_string().into_bytes();
    span::string(&quoted).unwrap_or_default().to_vec()
}
