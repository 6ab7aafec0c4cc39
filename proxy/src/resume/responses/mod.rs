//! A stream of `/v1/responses` that goes on.
//!
//! vLLM continues a last `input` item of the assistant whose status is "in_progress". Its answer is a response of its own,
//! which `stitch` makes the rest of the one that the client has: ids, numbers, the whole text where it is repeated.
//!
//! The events that end a text say nothing of how it ended; only `response.completed` does. So they are held until it comes.
//! (Stock vLLM closes an aborted response that used no harmony as "completed": such an end cannot be told from a true one.)

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
    opening: Opening,
    text: String,
    /// The number of the next event.
    next: u64,
    /// Why this answer cannot be continued.
    refusal: Option<Refusal>,
    output: Option<u64>,
    over: bool,
}

/// What opens a stream, as its engine wrote it.
#[derive(Debug, Clone, Default)]
struct Opening {
    /// The data of `response.created`.
    created: Option<Vec<u8>>,
    /// Whether the client has the `response.in_progress`.
    in_progress: bool,
    /// The data of the message's `response.output_item.added`.
    item: Option<Vec<u8>>,
    /// The data of the text's `response.content_part.added`.
    part: Option<Vec<u8>>,
}

impl Seen {
    /// Takes in an event on its way to the client.
    pub fn on_event(&mut self, name: &[u8], data: &[u8]) -> Verdict {
        if self.over {
            return Verdict::Pass;
        }
        let verdict = self.verdict(name, data);
        // What is held has no number yet: it counts when an event behind it passes.
        if verdict == Verdict::Pass
            && let Some(number) = wire::count(data, &[Key("sequence_number")])
        {
            self.next = number.saturating_add(1);
        }
        verdict
    }

    fn verdict(&mut self, name: &[u8], data: &[u8]) -> Verdict {
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
            b"response.created" => self.opening.created = Some(data.to_vec()),
            b"response.queued" => {}
            b"response.in_progress" => self.opening.in_progress = true,
            b"response.output_item.added" => self.item(data),
            b"response.content_part.added" => self.part(data),
            b"response.output_text.delta" => self.delta(data),
            b"response.output_text.done" | b"response.content_part.done" | b"response.output_item.done" => {
                return Verdict::Hold;
            }
            b"response.completed" | b"response.incomplete" => return self.end(data),
            b"response.failed" => return Verdict::Lost(Loss::ErrorEvent),
            b"response.cancelled" => return Verdict::Lost(Loss::Aborted),
            kind if kind.starts_with(b"response.reasoning") => self.refuse(Refusal::Reasoning),
            kind if memchr::memmem::find(kind, b"_call").is_some() => self.refuse(Refusal::ToolCall),
            kind if kind.starts_with(b"response.") => self.refuse(Refusal::Unreadable),
            _ => return Verdict::Lost(Loss::Garbage),
        }
        Verdict::Pass
    }

    fn item(&mut self, data: &[u8]) {
        match wire::text(data, &[Key("item"), Key("type")]).as_deref() {
            Some("message") if self.opening.item.is_none() => self.opening.item = Some(data.to_vec()),
            Some("reasoning") => self.refuse(Refusal::Reasoning),
            Some(kind) if kind.ends_with("_call") => self.refuse(Refusal::ToolCall),
            _ => self.refuse(Refusal::Unreadable),
        }
    }

    fn part(&mut self, data: &[u8]) {
        match wire::text(data, &[Key("part"), Key("type")]).as_deref() {
            Some("output_text") if self.opening.part.is_none() => self.opening.part = Some(data.to_vec()),
            Some("reasoning_text") => self.refuse(Refusal::Reasoning),
            _ => self.refuse(Refusal::Unreadable),
        }
    }

    fn delta(&mut self, data: &[u8]) {
        match wire::text(data, &[Key("delta")]) {
            Some(text) if self.opening.part.is_some() && self.opening.item.is_some() => {
                self.text.push_str(&text)
            }
            _ => self.refuse(Refusal::Unreadable),
        }
    }

    fn end(&mut self, data: &[u8]) -> Verdict {
        match wire::text(data, &[Key("response"), Key("status")]).as_deref() {
            Some("completed" | "incomplete") => {
                self.over = true;
                self.output = wire::count(data, &[Key("response"), Key("usage"), Key("output_tokens")]);
                Verdict::Pass
            }
            Some("cancelled") => Verdict::Lost(Loss::Aborted),
            Some("failed") => Verdict::Lost(Loss::ErrorEvent),
            _ => Verdict::Lost(Loss::Unfinished),
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
        request::portable(original)?;
        if let Some(refusal) = self.refusal {
            return Err(refusal.into());
        }
        let (told, seam) = wire::Seam::of(&self.text);
        let (body, seen, full) = if told.is_empty() {
            (original.write(&[], &[]), 0, None)
        } else {
            request::continuable(original)?;
            let input = request::input(original, told)?;
            let seen = answers.tokens.ok_or_else(|| NoPlan::Asks(Question::Tokens(told.to_owned())))?;
            match original.count("max_output_tokens") {
                None => (original.write(&[], &[("input", input)]), seen, None),
                Some(max) => {
                    let left = max.saturating_sub(seen);
                    let limit = left.max(1).to_string().into_bytes();
                    let body = original.write(&[], &[("input", input), ("max_output_tokens", limit)]);
                    // At its limit already: it is asked for a token that nobody gets.
                    (body, seen.min(max), (left == 0).then_some(max))
                }
            }
        };
        let ask = Ask { path: "/v1/responses", body, recomputed: seen };
        let counts = stitch::Counts { seen, full };
        Ok((ask, Stitch::new(self.opening.clone(), self.next, self.text.clone(), counts, seam)))
    }

    /// A plan was carried out: what was held never reached the client.
    pub fn resumed(&mut self) {
        self.output = None;
    }

    /// Output tokens, as soon as the stream has said how many.
    #[must_use]
    pub fn tokens(&self) -> Option<u64> {
        self.output
    }
}
