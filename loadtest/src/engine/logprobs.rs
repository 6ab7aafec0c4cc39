//! Log probabilities: made up, yet a pure function of the prefix and the token, so that those of a continued stream can be
//! compared with those of one that was never interrupted.
//!
//! The token that is generated is always the most likely one, as in greedy decoding; the alternatives are words that no
//! generation brings. The shapes are vLLM's: `content` in chats, four lists in completions.

use super::{
    error::ApiError,
    render::{push_escaped, push_ids, quoted},
    request::Fields,
    tokens::{self, Prefix},
};

/// `--max-logprobs` of vLLM, as it is unless told otherwise.
const MOST: i64 = 20;

/// One of the likeliest tokens at a place: its text and its log probability.
#[derive(Debug, Clone, PartialEq)]
struct Likely {
    text: String,
    logprob: f64,
}

/// Of one request: how many are asked for, and where its choices are.
#[derive(Debug)]
pub(super) struct Logprobs {
    top: usize,
    /// Of each choice: the sequence so far.
    prefixes: Vec<Prefix>,
    /// Of each choice: characters of its tokens' texts so far.
    offsets: Vec<usize>,
}

/// What a request asks for: none, or how many of the likeliest tokens at each place.
///
/// # Errors
/// 400 for a number that vLLM refuses.
fn checked(name: &str, asked: Option<i64>) -> Result<Option<usize>, ApiError> {
    let Some(asked) = asked else { return Ok(None) };
    if asked > MOST {
        let message =
            format!("Requested sample logprobs of {asked}, which is greater than max allowed: {MOST}");
        return Err(ApiError::bad(name, message));
    }
    match usize::try_from(asked) {
        Ok(top) => Ok(Some(top)),
        Err(_) => Err(ApiError::bad(name, format!("`{name}` must be a positive value or -1."))),
    }
}

/// Takes a chat's `logprobs` and `top_logprobs` out.
///
/// # Errors
/// 400, naming the field.
pub(super) fn of_chat(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let (wanted, top) = (fields.flag("logprobs")?, fields.int("top_logprobs")?);
    if !wanted && top.is_some_and(|top| top > 0) {
        let message = "when using `top_logprobs`, `logprobs` must be set to true.";
        return Err(ApiError::bad("top_logprobs", message));
    }
    Ok(checked("top_logprobs", top.or(Some(0)))?.filter(|_| wanted))
}

/// Takes a completion's `logprobs` out.
///
/// # Errors
/// 400, naming the field.
pub(super) fn of_completion(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let asked = fields.int("logprobs")?;
    checked("logprobs", asked)
}

/// The text of one token, as it stands in a list of log probabilities.
fn text_of(id: u32) -> String {
    match id {
        tokens::IM_START => "<|im_start|>".into(),
        tokens::IM_END => "<|im_end|>".into(),
        _ => tokens::decoded(&[id]),
    }
}

/// The likeliest tokens behind `prefix`, best first: `id`, which is generated there, and others up to `top` in all.
fn likeliest(prefix: &Prefix, id: u32, top: usize) -> Vec<Likely> {
    let draw = |n: u64| tokens::finish(prefix.hash() ^ u64::from(id) << 32 ^ n) & 0x3ff;
    // In steps of 1/1024, which both binary and decimal numbers hold exactly.
    let mut units = draw(0) + 1;
    let mut all = vec![Likely { text: text_of(id), logprob: -(units as f64) / 1024.0 }];
    for n in 1..top.max(1) {
        let n = n as u64;
        units += draw(n) + 256;
        all.push(Likely { text: format!(" or{n}{:03x}", draw(n)), logprob: -(units as f64) / 1024.0 });
    }
    all
}

impl Logprobs {
    /// For choices that begin behind these prefixes.
    pub(super) fn new(top: usize, prefixes: Vec<Prefix>) -> Self {
        Self { top, offsets: vec![0; prefixes.len()], prefixes }
    }

    /// The likeliest tokens at the places of `ids`, which are the next ones of `choice`.
    fn advance(&mut self, choice: usize, ids: &[u32]) -> Vec<Vec<Likely>> {
        let Some(prefix) = self.prefixes.get_mut(choice) else { return Vec::new() };
        let next = |&id: &u32| {
            let likely = likeliest(prefix, id, self.top);
            prefix.push(id);
            likely
        };
        ids.iter().map(next).collect()
    }

    /// Appends a chat's object for `ids`, the next tokens of `choice`.
    pub(super) fn push_chat(&mut self, out: &mut Vec<u8>, choice: usize, ids: &[u32]) {
        out.extend_from_slice(b"{\"content\":[");
        for (i, likely) in self.advance(choice, ids).iter().enumerate() {
            if i > 0 {
                out.push(b',');
            }
            let Some((token, _)) = likely.split_first() else { continue };
            out.push(b'{');
            push_token(out, token);
            out.extend_from_slice(b",\"top_logprobs\":[");
            for (i, other) in likely.iter().take(self.top).enumerate() {
                out.extend_from_slice(if i > 0 { b",{" } else { b"{" });
                push_token(out, other);
                out.push(b'}');
            }
            out.extend_from_slice(b"]}");
        }
        out.extend_from_slice(b"]}");
    }

    /// Appends a completion's object for `ids`, the next tokens of `choice`.
    pub(super) fn push_completion(&mut self, out: &mut Vec<u8>, choice: usize, ids: &[u32]) {
        let places = self.advance(choice, ids);
        let tokens: Vec<&Likely> = places.iter().filter_map(|likely| likely.first()).collect();
        let mut offset = self.offsets.get(choice).copied().unwrap_or(0);
        let join = |parts: Vec<String>| parts.join(",");
        let offsets = tokens.iter().map(|token| {
            let at = offset;
            offset += token.text.chars().count();
            at.to_string()
        });
        let offsets = join(offsets.collect());
        if let Some(known) = self.offsets.get_mut(choice) {
            *known = offset;
        }
        let pair = |other: &Likely| format!("{}:{}", quoted(&other.text), other.logprob);
        let tops = places.iter().map(|likely| format!("{{{}}}", join(likely.iter().map(pair).collect())));
        let text = format!(
            "{{\"text_offset\":[{offsets}],\"token_logprobs\":[{}],\"tokens\":[{}],\"top_logprobs\":[{}]}}",
            join(tokens.iter().map(|token| token.logprob.to_string()).collect()),
            join(tokens.iter().map(|token| quoted(&token.text)).collect()),
            join(tops.collect()),
        );
        out.extend_from_slice(text.as_bytes());
    }
}

/// Appends the inside of a chat's token.
fn push_token(out: &mut Vec<u8>, token: &Likely) {
    out.extend_from_slice(b"\"token\":\"");
    push_escaped(out, &token.text);
    out.extend_from_slice(format!("\",\"logprob\":{},\"bytes\":", token.logprob).as_bytes());
    push_ids(out, &token.text.bytes().map(u32::from).collect::<Vec<_>>());
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn said(push: impl FnOnce(&mut Vec<u8>)) -> Value {
        let mut out = Vec::new();
        push(&mut out);
        serde_json::from_slice(&out).unwrap()
    }

    /// Together, one by one, or by whoever continues: the same.
    #[test]
    fn they_follow_from_the_prefix_alone() {
        let (prompt, ids) = ([1, 2, 3], [4, 5, tokens::CHAR_HEAD, tokens::CHAR_HEAD + 7]);
        let all = Logprobs::new(3, vec![Prefix::of(&prompt)]).advance(0, &ids);
        let mut continued = Logprobs::new(3, vec![Prefix::of(&[1, 2, 3, 4])]);
        assert_eq!(continued.advance(0, &ids[1..2]), all[1..2]);
        assert_eq!(continued.advance(0, &ids[2..]), all[2..]);
        assert_ne!(Logprobs::new(3, vec![Prefix::of(&[9])]).advance(0, &ids), all);
        for likely in &all {
            assert_eq!(likely.len(), 3);
            assert!(likely.windows(2).all(|two| two[0].logprob > two[1].logprob), "{likely:?}");
            assert!(likely[0].logprob < 0.0);
        }
    }

    #[test]
    fn the_shapes_are_those_of_vllm() {
        let mut logprobs = Logprobs::new(2, vec![Prefix::of(&[1])]);
        let chat = said(|out| logprobs.push_chat(out, 0, &[0, tokens::EOS]));
        assert_eq!(chat["content"][0]["token"], " aaaa");
        assert_eq!(chat["content"][0]["bytes"], serde_json::json!([32, 97, 97, 97, 97]));
        assert_eq!(chat["content"][0]["top_logprobs"].as_array().unwrap().len(), 2);
        assert_eq!(chat["content"][0]["top_logprobs"][0]["logprob"], chat["content"][0]["logprob"]);
        assert_eq!(chat["content"][1]["token"], "<|im_end|>");
        let mut logprobs = Logprobs::new(0, vec![Prefix::of(&[1])]);
        let first = said(|out| logprobs.push_completion(out, 0, &[0, 1]));
        assert_eq!(
            (&first["text_offset"], &first["tokens"][1]),
            (&serde_json::json!([0, 5]), &Value::from(" aaab"))
        );
        assert_eq!(first["top_logprobs"][1][" aaab"], first["token_logprobs"][1]);
        assert_eq!(said(|out| logprobs.push_completion(out, 0, &[2]))["text_offset"][0], 10);
        assert_eq!(said(|out| logprobs.push_completion(out, 0, &[]))["tokens"], serde_json::json!([]));
    }
}
