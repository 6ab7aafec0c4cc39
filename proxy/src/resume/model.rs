//! For the tests of the APIs that are continued by text: an engine that knows one answer by heart, and the relay around it.

use proptest::prelude::*;

use super::{Answers, Ask, Loss, NoPlan, Question, Refusal, Verdict, body::Members, wire};
use crate::openai::event::walk;

/// Tokens of every prompt, less those of the answer.
pub(super) const INPUT: u64 = 7;

/// How an answer ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finish {
    End,
    Length,
    Stop,
}

/// An answer known by heart.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    pub(super) tokens: Vec<String>,
    pub(super) finish: Finish,
}

/// What is left of an answer behind a text.
pub(super) struct Rest {
    pub(super) tokens: Vec<String>,
    pub(super) finish: Finish,
    /// Tokens of the prompt, those of the text included.
    pub(super) prompt: u64,
    /// Tokens made, the one that ended it included.
    pub(super) made: u64,
}

impl Answer {
    pub(super) fn of(tokens: &[&str], finish: Finish) -> Self {
        Self { tokens: tokens.iter().map(|token| (*token).to_owned()).collect(), finish }
    }

    pub(super) fn max(&self) -> u64 {
        let length = self.tokens.len() as u64;
        if self.finish == Finish::Length { length } else { length + 5 }
    }

    /// How many tokens a text has that the answer begins with.
    pub(super) fn count(&self, text: &str) -> u64 {
        let mut all = String::new();
        let starts = self.tokens.iter().take_while(|token| {
            let before = all.len();
            all.push_str(token);
            before < text.len()
        });
        let count = starts.count() as u64;
        assert!(all.starts_with(text), "{text:?} is no beginning of {all:?}");
        count
    }

    /// What an engine generates behind `text`, in at most `max` tokens.
    pub(super) fn after(&self, text: &str, max: u64) -> Rest {
        let seen = self.count(text);
        let rest: Vec<String> =
            self.tokens.iter().skip(usize::try_from(seen).expect("small")).cloned().collect();
        let prompt = INPUT + seen;
        if rest.is_empty() && self.finish == Finish::Length {
            return Rest { tokens: vec![" beyond".into()], finish: Finish::Length, prompt, made: 1 };
        }
        let made = rest.len() as u64 + u64::from(self.finish != Finish::Length);
        assert!(made <= max, "{made} of {max}");
        Rest { tokens: rest, finish: self.finish, prompt, made }
    }
}

/// Answers whose text can be cut into their tokens again: white space is before a word or alone.
pub(super) fn answers() -> impl Strategy<Value = Answer> {
    let token = prop::sample::select(vec![" a", "b", "\n", "\"q\\", " é😀", "\t", "\u{1}", " long word"]);
    let finish = prop::sample::select(vec![Finish::End, Finish::Length, Finish::Stop]);
    (prop::collection::vec(token, 1..9), finish).prop_map(|(tokens, finish)| Answer::of(&tokens, finish))
}

/// An event: its name and data.
pub(super) type Event = (&'static str, String);

/// The bytes of events.
pub(super) fn bytes(events: &[Event]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, data) in events {
        wire::event(&mut out, name.as_bytes(), data.as_bytes());
    }
    out
}

/// One API's memory and stitches.
pub(super) trait Stream: Default {
    type Stitch;
    fn on_event(&mut self, name: &[u8], data: &[u8]) -> Verdict;
    fn plan(&self, original: &Members<'_>, answers: &Answers) -> Result<(Ask, Self::Stitch), NoPlan>;
    fn resumed(&mut self);
    fn stitch(stitch: &mut Self::Stitch, name: &[u8], data: &[u8], out: &mut Vec<u8>) -> Result<(), Refusal>;
}

/// A stream as its client gets it, engine after engine.
pub(super) struct Relay<S: Stream> {
    pub(super) seen: S,
    stitch: Option<S::Stitch>,
    pub(super) delivered: Vec<u8>,
    held: Vec<u8>,
}

impl<S: Stream> Relay<S> {
    pub(super) fn new() -> Self {
        Self { seen: S::default(), stitch: None, delivered: Vec::new(), held: Vec::new() }
    }

    /// Relays events of the engine under way, until the stream is lost.
    pub(super) fn relay(&mut self, events: &[Event]) -> Result<(), Loss> {
        for (name, data) in events {
            let mut out = Vec::new();
            match &mut self.stitch {
                None => wire::event(&mut out, name.as_bytes(), data.as_bytes()),
                Some(stitch) => {
                    S::stitch(stitch, name.as_bytes(), data.as_bytes(), &mut out).expect("it fits");
                }
            }
            for event in walk(&out, false) {
                let event_bytes = &out[event.range.clone()];
                match self.seen.on_event(event.name, &event.data) {
                    Verdict::Pass => {
                        self.delivered.append(&mut self.held);
                        self.delivered.extend_from_slice(event_bytes);
                    }
                    Verdict::Hold => self.held.extend_from_slice(event_bytes),
                    Verdict::Drop => {}
                    Verdict::Lost(loss) => return Err(loss),
                }
            }
        }
        Ok(())
    }

    /// Asks for the rest, all questions answered.
    pub(super) fn ask(&mut self, body: &[u8], answer: &Answer) -> Result<Ask, Refusal> {
        let original = Members::of(body).expect("an object");
        let mut answers = Answers::default();
        let (ask, stitch) = match self.seen.plan(&original, &answers) {
            Err(NoPlan::Asks(Question::Tokens(text))) => {
                answers.tokens = Some(answer.count(&text));
                self.seen.plan(&original, &answers)
            }
            other => other,
        }
        .map_err(|why| match why {
            NoPlan::Refused(refusal) => refusal,
            NoPlan::Asks(question) => panic!("asked again: {question:?}"),
        })?;
        self.seen.resumed();
        self.held.clear();
        self.stitch = Some(stitch);
        Ok(ask)
    }
}

/// The answer through engines that die after so many events each, and then one that does not.
pub(super) fn through<S: Stream>(
    answer: &Answer,
    body: &[u8],
    cuts: &[usize],
    engine: impl Fn(usize, &Ask) -> Vec<Event>,
) -> Vec<u8> {
    let mut relay = Relay::<S>::new();
    let mut ask = Ask { path: "", body: body.to_vec(), recomputed: 0 };
    for (number, cut) in cuts.iter().enumerate() {
        let events = engine(number, &ask);
        relay.relay(&events[..events.len().min(*cut)]).expect("nothing is wrong with it");
        if *cut >= events.len() {
            return relay.delivered;
        }
        ask = relay.ask(body, answer).expect("it can go on");
    }
    relay.relay(&engine(cuts.len(), &ask)).expect("nothing is wrong with it");
    assert!(relay.held.is_empty());
    relay.delivered
}
