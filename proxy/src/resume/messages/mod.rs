//! Anthropic's messages: a stream of `/v1/messages` that goes on.
//!
//! vLLM's `/v1/messages` does not continue a last message of the assistant; its `/v1/chat/completions` does, and the former is
//! an adapter of the latter. So the rest is asked as a chat completion: `request` says of the request what vLLM's
//! adapter would, and `stitch` of the chunks.
//!
//! vLLM ends a stream that was aborted with a `stop_reason` of null. So nothing of an end is the client's before
//! `message_stop`: what precedes it is held.

mod request;
mod stitch;
#[cfg(test)]
mod tests;

pub use self::stitch::Stitch;
use super::{Answers, Ask, Loss, NoPlan, Question, Refusal, Verdict, body::Members, wire};
use crate::openai::span::{self, Step::Key};

/// What the client has seen of one stream.
#[derive(Debug, Default)]
pub struct Seen {
    /// Whether it has the `message_start`.
    started: bool,
    /// Tokens of the prompt.
    input: Option<u64>,
    /// Whether it has the start of the block of text.
    opened: bool,
    text: String,
    form: Option<stitch::Form>,
    /// Why this answer cannot be continued.
    refusal: Option<Refusal>,
    /// Whether the reason why it ended has come.
    reason: bool,
    output: Option<u64>,
    over: bool,
}

impl Seen {
    /// Takes in an event on its way to the client.
    pub fn on_event(&mut self, name: &[u8], data: &[u8]) -> Verdict {
        if self.over {
            return Verdict::Pass;
        }
        if data == b"[DONE]" {
            return Verdict::Lost(Loss::Unfinished);
        }
        if !span::is_json(data) {
            return Verdict::Lost(Loss::Garbage);
        }
        match wire::error(name, data) {
            Some(wire::Blame::Engine) => return Verdict::Lost(Loss::ErrorEvent),
            Some(wire::Blame::Request) => {
                self.over = true;
                return Verdict::Pass;
            }
            None => {}
        }
        let kind = span::get(data, &[Key("type")]).and_then(span::string).unwrap_or_default();
        if !name.is_empty() && name != kind {
            return Verdict::Lost(Loss::Garbage);
        }
        match kind {
            b"ping" => Verdict::Pass,
            b"message_start" if !self.started => {
                self.started = true;
                self.input = wire::count(data, &[Key("message"), Key("usage"), Key("input_tokens")]);
                Verdict::Pass
            }
            b"content_block_start" => {
                self.open(data);
                Verdict::Pass
            }
            b"content_block_delta" => {
                self.delta(data);
                Verdict::Pass
            }
            b"content_block_stop" => Verdict::Hold,
            b"message_delta" => self.end(data),
            b"message_stop" if self.reason => {
                self.over = true;
                Verdict::Pass
            }
            b"message_stop" => Verdict::Lost(Loss::Unfinished),
            _ => Verdict::Lost(Loss::Garbage),
        }
    }

    fn open(&mut self, data: &[u8]) {
        let block = wire::text(data, &[Key("content_block"), Key("type")]);
        match block.as_deref() {
            // A second one comes only behind a block of another kind.
            Some("text") if !self.opened => self.opened = true,
            Some("thinking" | "redacted_thinking") => self.refuse(Refusal::Reasoning),
            Some("tool_use") => self.refuse(Refusal::ToolCall),
            _ => self.refuse(Refusal::Unreadable),
        }
    }

    fn delta(&mut self, data: &[u8]) {
        let kind = wire::text(data, &[Key("delta"), Key("type")]);
        match (kind.as_deref(), wire::text(data, &[Key("delta"), Key("text")])) {
            (Some("text_delta"), Some(text)) if self.opened => {
                self.text.push_str(&text);
                if self.form.is_none() {
                    self.form = stitch::Form::of(data);
                }
            }
            (Some("thinking_delta" | "signature_delta"), _) => self.refuse(Refusal::Reasoning),
            (Some("input_json_delta"), _) => self.refuse(Refusal::ToolCall),
            _ => self.refuse(Refusal::Unreadable),
        }
    }

    fn end(&mut self, data: &[u8]) -> Verdict {
        match wire::text(data, &[Key("delta"), Key("stop_reason")]).as_deref() {
            None | Some("abort") => Verdict::Lost(Loss::Aborted),
            Some("error") => Verdict::Lost(Loss::ErrorEvent),
            Some(_) => {
                self.reason = true;
                self.output = wire::count(data, &[Key("usage"), Key("output_tokens")]);
                Verdict::Hold
            }
        }
    }

    fn refuse(&mut self, refusal: Refusal) {
        self.refusal.get_or_insert(refusal);
    }

    /// The request that brings the rest of the answer to `original`, which is the body as the engine got it.
    ///
    /// # Errors
    /// A question without whose answer it cannot be written, or why it would be wrong.
    pub fn plan(&self, original: &Members<'_>, answers: &Answers) -> Result<(Ask, Stitch), NoPlan> {
        if original.raw("kv_transfer_params").is_some() || original.raw("ec_transfer_params").is_some() {
            return Err(Refusal::EngineState.into());
        }
        if let Some(refusal) = self.refusal {
            return Err(refusal.into());
        }
        let (told, seam) = wire::Seam::of(&self.text);
        if told.is_empty() {
            let ask = Ask { path: "/v1/messages", body: original.write(&[], &[]), recomputed: 0 };
            return Ok((ask, Stitch::again(self.started, self.opened, seam)));
        }
        let max = original.count("max_tokens").ok_or(Refusal::Body)?;
        let form = self.form.clone().ok_or(Refusal::Unreadable)?;
        let base = request::Chat::of(original)?;
        let seen = answers.tokens.ok_or_else(|| NoPlan::Asks(Question::Tokens(told.to_owned())))?;
        let left = max.saturating_sub(seen);
        let ask =
            Ask { path: "/v1/chat/completions", body: base.continued(told, left.max(1)), recomputed: seen };
        // The model may have reached its limit before it could say so: it is asked for a token that nobody gets.
        let counts = stitch::Counts { input: self.input, seen: seen.min(max), full: left == 0 };
        Ok((ask, Stitch::chat(form, counts, seam)))
    }

    /// A plan was carried out: what was held never reached the client.
    pub fn resumed(&mut self) {
        self.reason = false;
        self.output = None;
    }

    /// Output tokens, as soon as the stream has said how many.
    #[must_use]
    pub fn tokens(&self) -> Option<u64> {
        self.output
    }
}
