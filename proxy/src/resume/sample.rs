//! One delivered event as the form of all the others.
//!
//! The chunks of a stream differ in their text and their token ids, and in nothing else until the last one. So the first
//! plain chunk is read with care, and each that follows is compared with it: the bytes before the text, between text and ids,
//! and behind them. What fits needs no parser; whatever else comes does not fit and is read with care. And an event that
//! another engine owes the stream can be written in the same form, byte for byte as the first engine would have.
//!
//! Cost of a chunk that fits: three comparisons of bytes, one search for the end of the text, a few digits.

use std::ops::Range;

use crate::openai::{
    request::{Edit, rewrite},
    span::{self, Step::Key},
};

/// The JSON of a plain chunk: text, no finish reason, no log probabilities, no usage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    json: Vec<u8>,
    chat: bool,
    /// The text, quotes excluded.
    text: Range<usize>,
    /// The array of ids.
    ids: Option<Range<usize>>,
    /// The `null` of the finish reason.
    finish: Range<usize>,
}

/// What a chunk that fits says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fit<'a> {
    /// As it is written in JSON.
    pub text: &'a [u8],
    /// Where the array of ids stands; empty if the form has none.
    pub ids_at: Range<usize>,
}

/// How a chunk of [`Sample`]'s form ends its choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ending<'a> {
    /// The finish reason, JSON.
    pub reason: &'a [u8],
    /// The stop reason, JSON.
    pub stop_reason: &'a [u8],
}

impl Sample {
    /// The form of `json`, if it is plain. `chat`: a chunk of a chat completion, else of a text completion.
    #[must_use]
    pub fn learn(json: &[u8], chat: bool) -> Option<Self> {
        let choices = span::find(json, &[Key("choices")])?;
        let whole = span::elements(json, &choices).next()?;
        let choice = json.get(whole.clone())?;
        let at = |path: &[span::Step<'_>]| {
            span::find(choice, path).map(|range| range.start + whole.start..range.end + whole.start)
        };
        // Cheapest first: a stream's first chunk has the prompt's ids and is no form, as it tells a role.
        if chat && span::members(json, &at(&[Key("delta")])?).count() != 1 {
            return None;
        }
        let text = at(if chat { &[Key("delta"), Key("content")] } else { &[Key("text")] })?;
        let is_null = |range: &Range<usize>| json.get(range.clone()) == Some(b"null");
        let finish = at(&[Key("finish_reason")]).filter(is_null)?;
        let ids = at(&[Key("token_ids")]).filter(|range| !is_null(range));
        let alone = span::elements(json, &choices).count() == 1;
        let nothing_else =
            ["logprobs", "stop_reason"].iter().all(|key| at(&[Key(key)]).is_none_or(|range| is_null(&range)))
                && ["usage", "system_fingerprint"]
                    .iter()
                    .all(|key| span::find(json, &[Key(key)]).is_none_or(|range| is_null(&range)));
        let in_order = ids.as_ref().is_none_or(|ids| ids.start > text.end && ids.end < whole.end);
        let is_string = json.get(text.start) == Some(&b'"');
        (alone && nothing_else && in_order && is_string && finish.start > text.end).then(|| Self {
            json: json.to_vec(),
            chat,
            text: text.start + 1..text.end - 1,
            ids,
            finish,
        })
    }

    /// Whether it is a chunk of a chat.
    #[must_use]
    pub const fn is_chat(&self) -> bool {
        self.chat
    }

    /// What `json` says, if it is of this form.
    #[inline]
    #[must_use]
    pub fn fit<'a>(&self, json: &'a [u8]) -> Option<Fit<'a>> {
        let before = self.json.get(..self.text.start)?;
        let rest = json.strip_prefix(before)?;
        // The text's opening quote is the last byte of what is before it.
        let end = span::string_end(json, before.len() - 1)? - 1;
        let text = json.get(before.len()..end)?;
        debug_assert!(rest.starts_with(text));
        match &self.ids {
            None => {
                let after = self.json.get(self.text.end..)?;
                (json.get(end..)? == after).then_some(Fit { text, ids_at: 0..0 })
            }
            Some(ids) => {
                let between = self.json.get(self.text.end..ids.start)?;
                let start = end + between.len();
                let array = json.get(end..)?.strip_prefix(between)?;
                let length = memchr::memchr(b']', array)? + 1;
                let after = self.json.get(ids.end..)?;
                (array.first() == Some(&b'[') && array.get(length..)? == after)
                    .then_some(Fit { text, ids_at: start..start + length })
            }
        }
    }

    /// A chunk of this form, as an event: other text and ids, and its end if it has one. `last` is put behind the last
    /// member: `,"key":value`.
    #[must_use]
    pub fn write(&self, text: &[u8], ids: &[u8], ending: Option<Ending<'_>>, last: &[u8]) -> Vec<u8> {
        let finish = ending.map(|ending| [ending.reason, b",\"stop_reason\":", ending.stop_reason].concat());
        let mut edits: Vec<Edit<'_>> = vec![(self.text.clone(), text)];
        if let Some(range) = &self.ids {
            edits.push((range.clone(), ids));
        }
        if let Some(finish) = &finish {
            edits.push((self.finish.clone(), finish));
        }
        let end = self.json.len().saturating_sub(1);
        edits.push((end..end, last));
        event(&rewrite(&self.json.clone().into(), edits))
    }
}

/// `json` as an event, in the engines' form.
#[must_use]
pub fn event(json: &[u8]) -> Vec<u8> {
    [b"data: ", json, b"\n\n"].concat()
}

/// Digits of the largest id.
const MOST_DIGITS: u32 = 10;

/// The ids of an array that is nothing but digits and commas, with blanks behind these at most, appended to `ids`; whether it was.
#[inline]
pub fn push_ids(array: &[u8], ids: &mut Vec<u32>) -> bool {
    let Some(inside) = array.strip_prefix(b"[").and_then(|rest| rest.strip_suffix(b"]")) else {
        return false;
    };
    if inside.is_empty() {
        return true;
    }
    let (mut id, mut digits) = (0u64, 0u32);
    for byte in inside {
        match byte {
            b'0'..=b'9' => {
                id = id * 10 + u64::from(byte - b'0');
                digits += 1;
                if digits > MOST_DIGITS {
                    return false;
                }
            }
            b',' => {
                let (Ok(whole), 1..) = (u32::try_from(id), digits) else { return false };
                ids.push(whole);
                (id, digits) = (0, 0);
            }
            b' ' if digits == 0 => {}
            _ => return false,
        }
    }
    let (Ok(last), 1..) = (u32::try_from(id), digits) else { return false };
    ids.push(last);
    true
}

/// `ids` as a JSON array.
#[must_use]
pub fn ids_json(ids: &[u32]) -> Vec<u8> {
    let mut out = Vec::with_capacity(ids.len() * 7 + 2);
    out.push(b'[');
    for (i, id) in ids.iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        out.extend_from_slice(id.to_string().as_bytes());
    }
    out.push(b']');
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::openai::span::Step::At;

    const CHAT: &str = r#"{"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"a\"b"},"logprobs":null,"finish_reason":null,"token_ids":[7]}]}"#;
    const TEXT: &str = r#"{"id":"c","choices":[{"index":0,"text":" x","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":[7]}],"usage":null}"#;

    fn sample(json: &str) -> Sample {
        Sample::learn(json.as_bytes(), json == CHAT).expect("plain")
    }

    #[test]
    fn what_is_of_the_form_fits_and_says_its_text_and_ids() {
        for json in [CHAT, TEXT] {
            let sample = sample(json);
            for (text, ids) in [("", "[1]"), (r#"\\\" \ud83d x"#, "[12,3]"), ("]", "[]")] {
                let written = sample.write(text.as_bytes(), ids.as_bytes(), None, b"");
                let json = &written[6..written.len() - 2];
                let fit = sample.fit(json).expect("of the form");
                assert_eq!((fit.text, &json[fit.ids_at]), (text.as_bytes(), ids.as_bytes()));
            }
            assert_eq!(
                sample.write(
                    span::string(
                        span::get(
                            json.as_bytes(),
                            if json == CHAT {
                                &[Key("choices"), At(0), Key("delta"), Key("content")]
                            } else {
                                &[Key("choices"), At(0), Key("text")]
                            }
                        )
                        .expect("text")
                    )
                    .expect("a string"),
                    b"[7]",
                    None,
                    b""
                ),
                event(json.as_bytes())
            );
        }
    }

    #[test]
    fn whatever_else_comes_does_not_fit() {
        let sample = sample(CHAT);
        for (from, to) in [
            ("\"finish_reason\":null", "\"finish_reason\":\"stop\""),
            ("\"id\":\"c\"", "\"id\":\"d\""),
            ("{\"content\":\"a\\\"b\"}", "{\"tool_calls\":[]}"),
            ("{\"content\":\"a\\\"b\"}", "{\"content\":\"x\",\"reasoning\":\"y\"}"),
            ("[7]}]}", "[7]}],\"usage\":{}}"),
            ("[7]", "null"),
            ("[7]}]}", "[7]}]"),
        ] {
            let other = CHAT.replace(from, to);
            assert_ne!(other, CHAT, "{from}");
            assert_eq!(sample.fit(other.as_bytes()), None, "{other}");
        }
        for prefix in 0..CHAT.len() {
            assert_eq!(sample.fit(&CHAT.as_bytes()[..prefix]), None);
        }
    }

    #[test]
    fn only_a_plain_chunk_is_a_form() {
        for (from, to) in [
            ("\"finish_reason\":null", "\"finish_reason\":\"stop\""),
            ("\"logprobs\":null", "\"logprobs\":{}"),
            ("{\"content\":\"a\\\"b\"}", "{\"role\":\"assistant\",\"content\":\"\"}"),
            ("{\"content\":\"a\\\"b\"}", "{\"content\":null}"),
            ("}]}", "},{\"index\":1}]}"),
            ("}]}", "}],\"usage\":{}}"),
        ] {
            assert_eq!(Sample::learn(CHAT.replace(from, to).as_bytes(), true), None, "{to}");
        }
        assert_eq!(Sample::learn(b"[DONE]", true), None);
    }

    #[test]
    fn an_end_is_written_where_engines_write_it() {
        let ending = Ending { reason: b"\"length\"", stop_reason: b"null" };
        let written = sample(CHAT).write(b"z", b"[8]", Some(ending), b",\"system_fingerprint\":\"f\"");
        let text = String::from_utf8(written).expect("UTF-8");
        assert!(
            text.contains(
                r#""finish_reason":"length","stop_reason":null,"token_ids":[8]}],"system_fingerprint":"f"}"#
            ),
            "{text}"
        );
    }

    proptest! {
        #[test]
        fn ids_survive(ids in prop::collection::vec(any::<u32>(), 0..6)) {
            let mut read = Vec::new();
            prop_assert!(push_ids(&ids_json(&ids), &mut read));
            prop_assert_eq!(read, ids);
        }

        #[test]
        fn no_bytes_panic(bytes in "\\PC{0,60}") {
            drop(sample(TEXT).fit(bytes.as_bytes()));
            drop(Sample::learn(bytes.as_bytes(), true));
            push_ids(bytes.as_bytes(), &mut Vec::new());
        }
    }
}
