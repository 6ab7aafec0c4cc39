//! What is asked: sessions of one turn or more, their texts and their lengths. Pure: the dice are the session's own.
//!
//! A session is what one person asks, one question after the other: each prompt holds the questions before it and their real
//! answers, so whoever routes by prefix has something to find. Sessions may share a prefix, as those of one application
//! share its instructions: it is their first message, of the role `system`.
//!
//! All follows from the run's seed, the session's stream and its number there, whatever order things happen in.

use serde_json::json;

use super::{
    Options,
    lengths::{Chooser, Lengths},
    trace::{Entry, Trace},
};
use crate::engine::template::Message;

/// The text that prompts are filled with. Nothing but ASCII, so it can be cut anywhere.
const PADDING: &str = " The quick brown fox jumps over the lazy dog.";

/// What all sessions of a run have in common.
#[derive(Debug)]
pub(super) struct Traffic {
    seed: u64,
    prompt: Lengths,
    output: Lengths,
    turns: Lengths,
    think_ms: Lengths,
    prefixes: Chooser,
    prefix_bytes: usize,
    pub(super) trace: Trace,
}

impl Traffic {
    pub(super) fn new(options: &Options, trace: Trace) -> Self {
        let constant = |length: usize| Lengths::Constant(u64::try_from(length).unwrap_or(u64::MAX));
        Self {
            seed: options.seed,
            prompt: options.prompt_length.unwrap_or(constant(options.prompt_bytes)),
            output: options.output_length.unwrap_or(Lengths::Constant(options.tokens)),
            turns: options.turns,
            think_ms: options.think_ms,
            prefixes: Chooser::new(options.prefix_choice, options.prefixes),
            prefix_bytes: options.prefix_bytes,
            trace,
        }
    }
}

/// One person.
#[derive(Debug)]
pub(super) struct Session {
    rng: fastrand::Rng,
    stream: u64,
    messages: Vec<Message>,
    turns_left: u64,
    /// What the trace says of it.
    entry: Option<Entry>,
}

impl Session {
    /// Session `number` of `stream`.
    pub(super) fn new(traffic: &Traffic, stream: u64, number: u64, entry: Option<Entry>) -> Self {
        let mixed = (traffic.seed.rotate_left(40) ^ stream.rotate_left(20) ^ number)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut rng = fastrand::Rng::with_seed(mixed);
        let prefix = traffic.prefixes.draw(&mut rng).map(|prefix| {
            let text = format!("These are the instructions of application {prefix}.");
            Message::new("system", filled(text, traffic.prefix_bytes))
        });
        let turns_left = traffic.turns.draw(&mut rng, &[]).max(1);
        Self { rng, stream, messages: prefix.into_iter().collect(), turns_left, entry }
    }

    /// Asks the next question, as request `made` of the stream; the tokens that its answer shall have.
    pub(super) fn ask(&mut self, traffic: &Traffic, made: u64) -> u64 {
        let entry = self.entry.unwrap_or(Entry { at_ns: 0, prompt_bytes: None, output_tokens: None });
        let drawn = traffic.prompt.draw(&mut self.rng, &traffic.trace.prompt_bytes);
        let bytes = usize::try_from(entry.prompt_bytes.unwrap_or(drawn)).unwrap_or(usize::MAX);
        let text = format!("run {}, stream {}, request {made}", traffic.seed, self.stream);
        let length = text.len().saturating_add(bytes);
        self.messages.push(Message::new("user", filled(text, length)));
        self.turns_left = self.turns_left.saturating_sub(1);
        let drawn = traffic.output.draw(&mut self.rng, &traffic.trace.output_tokens);
        entry.output_tokens.unwrap_or(drawn).max(1)
    }

    /// The conversation so far.
    pub(super) fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Whether a question will follow the one that was asked.
    pub(super) const fn goes_on(&self) -> bool {
        self.turns_left > 0
    }

    /// Takes the answer in; how many milliseconds the person thinks before the next question.
    pub(super) fn answered(&mut self, traffic: &Traffic, answer: String) -> u64 {
        self.messages.push(Message::new("assistant", answer));
        traffic.think_ms.draw(&mut self.rng, &[])
    }
}

/// `text`, filled up to `length` bytes.
fn filled(mut text: String, length: usize) -> String {
    let missing = length.saturating_sub(text.len());
    text.reserve(missing);
    while text.len() + PADDING.len() <= length {
        text.push_str(PADDING);
    }
    text.push_str(PADDING.get(..length.saturating_sub(text.len())).unwrap_or_default());
    text
}

/// The body of a request.
pub(super) fn body(options: &Options, messages: &[Message], tokens: u64) -> Vec<u8> {
    let size = messages.iter().map(|message| message.content.len() + 64).sum::<usize>() + 256;
    let mut body = Vec::with_capacity(size);
    body.extend_from_slice(b"{\"messages\":[");
    for (i, message) in messages.iter().enumerate() {
        body.extend_from_slice(if i > 0 { b",{\"role\":" } else { b"{\"role\":" });
        push_json(&mut body, &message.role);
        body.extend_from_slice(b",\"content\":");
        push_json(&mut body, &message.content);
        body.push(b'}');
    }
    let mut rest = json!({"max_tokens": tokens, "ignore_eos": true, "stream": !options.unary});
    if !options.unary {
        rest["stream_options"] = json!({"include_usage": true});
    }
    if options.token_ids {
        rest["return_token_ids"] = true.into();
    }
    rest["model"] = options.model.as_str().into();
    body.extend_from_slice(b"],");
    body.extend_from_slice(rest.to_string().get(1..).unwrap_or_default().as_bytes());
    body
}

/// Appends `text` as a JSON string.
fn push_json(body: &mut Vec<u8>, text: &str) {
    // A vector takes everything, and every text can be written.
    serde_json::to_writer(body, text).unwrap_or_default();
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn traffic(options: Options) -> Traffic {
        Traffic::new(&options, Trace::default())
    }

    #[test]
    fn a_session_holds_what_was_said_and_follows_from_its_seed() {
        let options = Options {
            turns: Lengths::Constant(3),
            prompt_length: Some(Lengths::Uniform(0, 90)),
            output_length: Some(Lengths::Uniform(1, 50)),
            think_ms: Lengths::Constant(7),
            ..Options::default()
        };
        let traffic = traffic(options);
        let play = |number| {
            let mut session = Session::new(&traffic, 4, number, None);
            let mut tokens = Vec::new();
            for made in 1..=3 {
                tokens.push(session.ask(&traffic, made));
                assert_eq!(session.goes_on(), made < 3);
                assert_eq!(session.answered(&traffic, format!("answer {made}")), 7);
            }
            (session.messages, tokens)
        };
        let (messages, tokens) = play(1);
        assert_eq!((messages.clone(), tokens.clone()), play(1));
        assert_ne!((messages.clone(), tokens.clone()), play(2));
        let roles: Vec<&str> = messages.iter().map(|message| message.role.as_str()).collect();
        assert_eq!(roles, ["user", "assistant"].repeat(3));
        assert!(messages[2].content.starts_with("run 0, stream 4, request 2"));
        assert!(tokens.iter().all(|tokens| (1..=50).contains(tokens)));
    }

    #[test]
    fn prefixes_are_shared_and_as_long_as_wanted() {
        let traffic = traffic(Options { prefixes: 3, prefix_bytes: 500, ..Options::default() });
        let prefix = |stream| Session::new(&traffic, stream, 0, None).messages()[0].clone();
        let mut seen: Vec<String> = (0..60).map(|stream| prefix(stream).content).collect();
        assert!(seen.iter().all(|text| text.len() == 500) && prefix(0).role == "system");
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 3);
    }

    #[test]
    fn a_trace_says_how_long_things_are() {
        let trace = Trace::parse("at_s,prompt_bytes,output_tokens\n0,1000,5\n1,,\n").unwrap();
        let traffic = Traffic::new(&Options { prompt_bytes: 7, tokens: 9, ..Options::default() }, trace);
        let asked = |at: usize| {
            let mut session = Session::new(&traffic, 0, 0, Some(traffic.trace.entries[at]));
            let tokens = session.ask(&traffic, 1);
            (session.messages()[0].content.len(), tokens)
        };
        let text = "run 0, stream 0, request 1".len();
        assert_eq!((asked(0), asked(1)), ((text + 1000, 5), (text + 7, 9)));
    }

    #[test]
    fn bodies_are_json() {
        let messages = [Message::new("system", "a\"b\n"), Message::new("user", "c")];
        let body = |options: &Options| -> Value {
            serde_json::from_slice(&super::body(options, &messages, 5)).unwrap()
        };
        let wanted = json!([{"role": "system", "content": "a\"b\n"}, {"role": "user", "content": "c"}]);
        let streamed = body(&Options { token_ids: true, ..Options::default() });
        assert_eq!((&streamed["messages"], &streamed["max_tokens"]), (&wanted, &json!(5)));
        assert_eq!(streamed["stream_options"], json!({"include_usage": true}));
        assert_eq!((&streamed["return_token_ids"], &streamed["model"]), (&json!(true), &json!("sim-model")));
        let unary = body(&Options { unary: true, ..Options::default() });
        assert!(unary["stream"] == false && unary.get("stream_options").is_none());
    }
}
