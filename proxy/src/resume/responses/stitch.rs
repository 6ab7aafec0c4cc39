//! The continuation's events as events of the stream.

use super::{
    super::{
        Refusal,
        wire::{self, Edits, Seam},
    },
    Opening,
};
use crate::openai::span::{
    self,
    Step::{At, Key},
};

/// What the counts at the end are made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counts {
    /// Tokens of the answer that were prompt of the continuation.
    pub(super) seen: u64,
    /// All that were asked for, if the answer has as many.
    pub(super) full: Option<u64>,
}

/// What becomes of the events of a continuation.
#[derive(Debug)]
pub struct Stitch {
    opening: Opening,
    /// The number of the next event.
    next: u64,
    /// The whole text of the message.
    text: String,
    counts: Counts,
    seam: Seam,
    /// The continuation's id of the message that the client knows by another.
    theirs: Option<Vec<u8>>,
    /// Whether the continuation has begun an item.
    begun: bool,
    /// The message as it ended: written here where the continuation had nothing to add to it.
    closed: Option<Vec<u8>>,
    /// How far the places of the continuation's items lie behind.
    shift: u64,
}

impl Stitch {
    pub(super) fn new(opening: Opening, next: u64, text: String, counts: Counts, seam: Seam) -> Self {
        Self { opening, next, text, counts, seam, theirs: None, begun: false, closed: None, shift: 0 }
    }

    /// Appends what an event of the continuation is in the stream, if anything.
    ///
    /// # Errors
    /// It does not fit what the client has seen.
    pub fn on_event(&mut self, name: &[u8], data: &[u8], out: &mut Vec<u8>) -> Result<(), Refusal> {
        if wire::error(name, data).is_some() || !span::is_json(data) {
            // Who sees the stream next says what it means.
            wire::event(out, name, data);
            return Ok(());
        }
        let mut edits = Edits::default();
        match span::get(data, &[Key("type")]).and_then(span::string).unwrap_or_default() {
            b"response.created" if self.opening.created.is_some() => return Ok(()),
            b"response.in_progress" if self.opening.in_progress => return Ok(()),
            b"response.output_item.added" => {
                let is_message = wire::text(data, &[Key("item"), Key("type")]).as_deref() == Some("message");
                let is_first = !std::mem::replace(&mut self.begun, true);
                if is_first && self.opening.item.is_some() {
                    if is_message {
                        self.theirs = wire::raw(data, &[Key("item"), Key("id")]).map(<[u8]>::to_vec);
                        return Ok(());
                    }
                    if self.text.is_empty() || !is_call(data) {
                        return Err(Refusal::Mismatch);
                    }
                    self.close(out)?;
                }
                if self.counts.full.is_some() {
                    return Ok(());
                }
            }
            b"response.content_part.added" if self.is_ours(data) && self.opening.part.is_some() => {
                return Ok(());
            }
            b"response.output_text.delta" if self.is_ours(data) => {
                let piece = wire::text(data, &[Key("delta")]).ok_or(Refusal::Mismatch)?;
                let whole = self.seam.is_closed();
                let new = self.seam.new_text(&piece);
                if new.is_empty() || self.counts.full.is_some() {
                    return Ok(());
                }
                self.text.push_str(new);
                if !whole {
                    edits.set(data, &[Key("delta")], wire::quoted(new));
                }
            }
            b"response.output_text.done" if self.is_ours(data) => {
                edits.set(data, &[Key("text")], wire::quoted(&self.text));
            }
            b"response.content_part.done" if self.is_ours(data) => {
                edits.set(data, &[Key("part"), Key("text")], wire::quoted(&self.text));
            }
            b"response.output_item.done" if self.is_item(data) => {
                self.message(data, &[Key("item")], &mut edits);
                self.closed = Some(Vec::new());
            }
            b"response.completed" | b"response.incomplete" => {
                if self.opening.item.is_some() && self.closed.is_none() {
                    self.close(out)?;
                }
                self.end(data, &mut edits);
            }
            // A call that began where nothing may come any more.
            _ if self.counts.full.is_some() && !self.is_ours(data) => return Ok(()),
            _ => {}
        }
        self.write(name, data, edits, out);
        Ok(())
    }

    /// Whether an event is about the message that the client has under another id.
    fn is_ours(&self, data: &[u8]) -> bool {
        let id = wire::raw(data, &[Key("item_id")]);
        id.is_some() && id == self.theirs.as_deref()
    }

    fn is_item(&self, data: &[u8]) -> bool {
        let id = wire::raw(data, &[Key("item"), Key("id")]);
        id.is_some() && id == self.theirs.as_deref()
    }

    /// Writes an event with what is the stream's own: ids, places, its number.
    fn write(&mut self, name: &[u8], data: &[u8], mut edits: Edits, out: &mut Vec<u8>) {
        if let Some(created) = &self.opening.created {
            for key in ["id", "created_at", "model", "max_output_tokens"] {
                let path = [Key("response"), Key(key)];
                if let Some(value) = span::get(created, &path) {
                    edits.set(data, &path, value);
                }
            }
        }
        if let Some(ours) = self.our_id() {
            for path in [&[Key("item_id")][..], &[Key("item"), Key("id")]] {
                if wire::raw(data, path).is_some_and(|id| Some(id) == self.theirs.as_deref()) {
                    edits.set(data, path, ours.clone());
                }
            }
        }
        let place = [Key("output_index")];
        if self.shift > 0
            && let Some(index) = wire::count(data, &place)
        {
            edits.set(data, &place, (index + self.shift).to_string());
        }
        let number = [Key("sequence_number")];
        if span::find(data, &number).is_some() {
            edits.set(data, &number, self.next.to_string());
            self.next += 1;
        }
        wire::event(out, name, &edits.make(data));
    }

    fn our_id(&self) -> Option<Vec<u8>> {
        span::get(self.opening.item.as_ref()?, &[Key("item"), Key("id")]).map(<[u8]>::to_vec)
    }

    /// The edits of a finished message at `at`: its id and its text.
    fn message(&self, data: &[u8], at: &[span::Step<'_>], edits: &mut Edits) {
        let path = |rest: &[span::Step<'static>]| -> Vec<span::Step<'_>> {
            at.iter().chain(rest).copied().collect()
        };
        if at.len() > 1
            && let Some(ours) = self.our_id()
        {
            edits.set(data, &path(&[Key("id")]), ours);
        }
        let text = path(&[Key("content"), At(0), Key("text")]);
        if span::find(data, &text).is_some() {
            edits.set(data, &text, wire::quoted(&self.text));
        } else if let Some(part) = self.part().filter(|_| !self.text.is_empty()) {
            edits.set(data, &path(&[Key("content")]), [b"[", &part[..], b"]"].concat());
        }
    }

    /// The finished part, from the one that was opened.
    fn part(&self) -> Option<Vec<u8>> {
        let part = span::get(self.opening.part.as_ref()?, &[Key("part")])?;
        let mut edits = Edits::default();
        edits.set(part, &[Key("text")], wire::quoted(&self.text));
        edits.set(part, &[Key("logprobs")], *b"null");
        Some(edits.make(part).to_vec())
    }

    /// Ends the message, which the continuation did not open: the model had said all of it.
    fn close(&mut self, out: &mut Vec<u8>) -> Result<(), Refusal> {
        let (Some(added), Some(opened), Some(part), Some(id)) =
            (self.opening.item.clone(), self.opening.part.clone(), self.part(), self.our_id())
        else {
            return Err(Refusal::Mismatch);
        };
        let text = wire::quoted(&self.text);
        let place = wire::count(&added, &[Key("output_index")]).unwrap_or_default();
        let done = [
            br#"{"content_index":0,"item_id":"#,
            &id[..],
            br#","logprobs":[],"output_index":"#,
            place.to_string().as_bytes(),
            br#","sequence_number":0,"text":"#,
            &text,
            br#","type":"response.output_text.done"}"#,
        ]
        .concat();
        self.write(b"response.output_text.done", &done, Edits::default(), out);
        let mut edits = Edits::default();
        edits.set(&opened, &[Key("part")], part.clone());
        edits.set(&opened, &[Key("type")], *br#""response.content_part.done""#);
        self.write(b"response.content_part.done", &opened, edits, out);
        let mut edits = Edits::default();
        edits.set(&added, &[Key("item"), Key("content")], [b"[", &part[..], b"]"].concat());
        edits.set(&added, &[Key("item"), Key("status")], *br#""completed""#);
        edits.set(&added, &[Key("type")], *br#""response.output_item.done""#);
        let finished = edits.make(&added);
        self.write(b"response.output_item.done", &finished, Edits::default(), out);
        self.closed = span::get(&finished, &[Key("item")]).map(<[u8]>::to_vec);
        self.shift = 1;
        Ok(())
    }

    /// The edits of the response at its end.
    fn end(&self, data: &[u8], edits: &mut Edits) {
        let output = [Key("response"), Key("output")];
        match self.closed.as_deref() {
            // Written here: the continuation's own items follow it.
            Some(item) if !item.is_empty() => {
                let rest = span::get(data, &output).and_then(|all| all.strip_prefix(b"[")).unwrap_or(b"]");
                let rest = if self.counts.full.is_some() { b"]" } else { rest };
                let comma: &[u8] = if rest.trim_ascii_start().starts_with(b"]") { b"" } else { b"," };
                edits.set(data, &output, [b"[", item, comma, rest].concat());
            }
            Some(_) => self.message(data, &[Key("response"), Key("output"), At(0)], edits),
            None => {}
        }
        if self.counts.full.is_some() {
            edits.set(data, &[Key("response"), Key("status")], *br#""incomplete""#);
            let details = [Key("response"), Key("incomplete_details")];
            edits.set(data, &details, *br#"{"reason":"max_output_tokens"}"#);
        }
        let field = |key| [Key("response"), Key("usage"), Key(key)];
        let (Some(input), Some(output)) =
            (wire::count(data, &field("input_tokens")), wire::count(data, &field("output_tokens")))
        else {
            return;
        };
        let input = input.saturating_sub(self.counts.seen);
        let output = self.counts.full.unwrap_or(output.saturating_add(self.counts.seen));
        edits.set(data, &field("input_tokens"), input.to_string());
        edits.set(data, &field("output_tokens"), output.to_string());
        edits.set(data, &field("total_tokens"), input.saturating_add(output).to_string());
        let [a, b, details] = field("input_tokens_details");
        let cached = [a, b, details, Key("cached_tokens")];
        if wire::count(data, &cached).is_some_and(|cached| cached > input) {
            edits.set(data, &cached, input.to_string());
        }
    }
}

fn is_call(data: &[u8]) -> bool {
    wire::text(data, &[Key("item"), Key("type")]).is_some_and(|kind| kind.ends_with("_call"))
}
