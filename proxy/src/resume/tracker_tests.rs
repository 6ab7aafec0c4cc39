use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::resume::{Question, sample::ids_json};

const CHAT: Wishes = Wishes { chat: true, ids: false, strip: false };

fn event(json: &Value) -> String {
    format!("data: {json}\n\n")
}

fn role() -> String {
    event(&json!({"id": "a", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null}],
        "prompt_token_ids": [7, 8]}))
}

fn token(text: &str, ids: &[u32]) -> String {
    event(&json!({"id": "a", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [
        {"index": 0, "delta": {"content": text}, "logprobs": null, "finish_reason": null, "token_ids": ids}]}))
}

fn finish(text: &str, id: u32, reason: &str) -> String {
    event(&json!({"id": "a", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [
        {"index": 0, "delta": {"content": text}, "logprobs": null, "finish_reason": reason, "stop_reason": null,
         "token_ids": [id]}]}))
}

const DONE: &str = "data: [DONE]\n\n";

/// What passes of these events, and the loss.
fn pass(tracker: &mut Tracker, events: &str) -> (String, Option<Loss>) {
    let passed = tracker.pass(Bytes::copy_from_slice(events.as_bytes()));
    (String::from_utf8(passed.bytes.to_vec()).expect("UTF-8"), passed.loss)
}

fn tracker(wishes: Wishes, events: &str) -> Tracker {
    let mut tracker = Tracker::new(Api::ChatCompletions, wishes);
    assert_eq!(pass(&mut tracker, events).1, None);
    tracker
}

fn asked(tracker: &Tracker, body: &Value, answers: &Answers) -> Result<(String, Value), NoPlan> {
    let plan = tracker.plan(body.to_string().as_bytes(), answers)?;
    Ok((plan.ask.path.to_owned(), serde_json::from_slice(&plan.ask.body).expect("JSON")))
}

fn request() -> Value {
    json!({"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 10, "stream": true,
           "temperature": 0.5, "return_token_ids": true, "tool_choice": "none"})
}

#[test]
fn a_stream_passes_as_it_is_but_for_the_prompts_ids() {
    let mut tracker = Tracker::new(Api::ChatCompletions, CHAT);
    let rest = [token(" a", &[1]), token(" b", &[2])].concat();
    let (passed, _) = pass(&mut tracker, &[role(), rest.clone()].concat());
    assert_eq!(passed, role().replace("[7,8]", "null") + &rest);
    let last = finish(" c", 3, "length");
    assert_eq!(pass(&mut tracker, &last), (String::new(), None), "held until the stream has ended");
    assert_eq!(pass(&mut tracker, DONE), (last + DONE, None));
    assert_eq!((tracker.tokens(), tracker.facts.succeeded()), (Some((2, 3)), true));
}

#[test]
fn ids_are_taken_out_only_where_that_is_set_and_nobody_asked_for_them() {
    let events = [role(), token(" a", &[1]), token(" b", &[2]), token(" c", &[3])].concat();
    let strips = |wishes| pass(&mut Tracker::new(Api::ChatCompletions, wishes), &events).0;
    let stripped = strips(Wishes { strip: true, ..CHAT });
    assert_eq!(stripped.matches("\"token_ids\":null").count(), 3, "{stripped}");
    assert_eq!(strips(Wishes { strip: true, ids: true, ..CHAT }), events);
}

#[test]
fn each_way_to_die_is_seen_and_not_shown() {
    let before = [role(), token(" a", &[1])].concat();
    for (how, loss) in [
        (DONE.to_owned(), Loss::Unfinished),
        (event(&json!({"error": {"message": "dead", "code": 500}})) + DONE, Loss::ErrorEvent),
        (event(&json!({"object": "error", "message": "dead"})), Loss::ErrorEvent),
        (finish("", 0, "abort") + DONE, Loss::Aborted),
        (finish("", 0, "error") + DONE, Loss::ErrorEvent),
        ("data: {\"choices\":[{\"del\n\n".to_owned(), Loss::Garbage),
    ] {
        let mut tracker = tracker(CHAT, &before);
        let (passed, found) = pass(&mut tracker, &[token(" b", &[2]), how.clone()].concat());
        assert_eq!((passed, found), (token(" b", &[2]), Some(loss)), "{how}");
        assert_eq!(tracker.tokens(), Some((2, 2)));
    }
    let fault = event(&json!({"error": {"message": "too long", "code": 400}}));
    assert_eq!(
        pass(&mut tracker(CHAT, &before), &fault),
        (fault, None),
        "the client's own fault is told to it"
    );
}

#[test]
fn the_rest_is_asked_by_ids_with_fewer_tokens() {
    let tracker = tracker(CHAT, &[role(), token(" a", &[1]), token("", &[2]), token(" c", &[3])].concat());
    let (path, body) = asked(&tracker, &request(), &Answers::default()).expect("a plan");
    assert_eq!(path, "/v1/completions");
    assert_eq!(
        body,
        json!({"model": "m", "temperature": 0.5, "prompt": [7, 8, 1, 2, 3], "stream": true,
               "return_token_ids": true, "max_tokens": 7})
    );
}

#[test]
fn what_must_be_known_first_is_asked_for() {
    let tracker = tracker(CHAT, &[role(), token(" a", &[1])].concat());
    let mut body = request();
    body["max_tokens"] = Value::Null;
    assert_eq!(asked(&tracker, &body, &Answers::default()), Err(NoPlan::Asks(Question::Context)));
    let known = Answers { context: Some(100), ..Answers::default() };
    assert_eq!(asked(&tracker, &body, &known).expect("a plan").1["max_tokens"], 97);
    body = request();
    body["stop"] = json!("END");
    assert_eq!(asked(&tracker, &body, &Answers::default()), Err(NoPlan::Asks(Question::Text(vec![1]))));
    let known = Answers { texts: vec![(1, " a EN".into())], ..Answers::default() };
    assert_eq!(
        asked(&tracker, &body, &known).expect("a plan").1.get("stop"),
        None,
        "it is the gateway's to find"
    );
    let other = Answers { texts: vec![(1, "something else".into())], ..Answers::default() };
    assert_eq!(asked(&tracker, &body, &other), Err(Refusal::Mismatch.into()));
}

#[test]
fn nothing_goes_on_from_within_a_character() {
    let mut tracker = tracker(CHAT, &[role(), token(" a", &[1]), token("", &[2]), token("", &[3])].concat());
    let plan = tracker.plan(request().to_string().as_bytes(), &Answers::default()).expect("a plan");
    let body: Value = serde_json::from_slice(&plan.ask.body).expect("JSON");
    assert_eq!((&body["prompt"], plan.kept), (&json!([7, 8, 1]), 1));
    tracker.resumed(plan.kept);
    // The same ids again: the client has them.
    assert_eq!(pass(&mut tracker, &token("", &[2])), (String::new(), None));
    let both = token("é", &[3, 4]);
    assert_eq!(pass(&mut tracker, &both), (token("é", &[4]), None));
    assert_eq!(tracker.tokens(), Some((2, 4)));
}

#[test]
fn a_sampled_answer_may_take_another_turn_where_nothing_was_shown() {
    for (ids, loss) in [(false, None), (true, Some(Loss::Garbage))] {
        let mut tracker =
            tracker(Wishes { ids, ..CHAT }, &[role(), token(" a", &[1]), token("", &[2])].concat());
        tracker.resumed(1);
        let other = token("é", &[9]);
        let shown = if ids { String::new() } else { other.clone() };
        assert_eq!(pass(&mut tracker, &other), (shown, loss));
    }
}

#[test]
fn what_would_be_wrong_is_refused_by_its_reason() {
    let said = [role(), token(" a", &[1])].concat();
    for (member, value, refusal) in [
        ("n", json!(2), Refusal::SeveralChoices),
        ("best_of", json!(2), Refusal::SeveralChoices),
        ("use_beam_search", json!(true), Refusal::BeamSearch),
        ("response_format", json!({"type": "json_object"}), Refusal::StructuredOutput),
        ("structured_outputs", json!({"choice": ["a"]}), Refusal::StructuredOutput),
        ("guided_regex", json!("a+"), Refusal::StructuredOutput),
        ("tool_choice", json!("required"), Refusal::StructuredOutput),
        ("presence_penalty", json!(0.1), Refusal::OutputPenalties),
        ("frequency_penalty", json!(-1), Refusal::OutputPenalties),
        ("bad_words", json!(["a"]), Refusal::OutputState),
        ("thinking_token_budget", json!(5), Refusal::OutputState),
        ("max_tokens", json!(1), Refusal::Mismatch),
    ] {
        let mut body = request();
        body[member] = value;
        let refused = asked(&tracker(CHAT, &said), &body, &Answers::default());
        assert_eq!(refused, Err(refusal.into()), "{member}");
        if refusal != Refusal::Mismatch {
            let again =
                asked(&tracker(CHAT, &role()), &body, &Answers::default()).expect("nothing was said yet");
            assert_eq!(again.1, body);
        }
    }
    for (delta, refusal) in [
        (json!({"reasoning": "hm"}), Refusal::Reasoning),
        (json!({"tool_calls": [{"index": 0}]}), Refusal::ToolCall),
    ] {
        let chunk = json!({"id": "a", "created": 1, "choices": [{"index": 0, "delta": delta, "finish_reason": null}]});
        let tracker = tracker(CHAT, &[role(), event(&chunk)].concat());
        assert_eq!(asked(&tracker, &request(), &Answers::default()), Err(refusal.into()));
    }
}

#[test]
fn by_text_where_ids_do_not_say_everything() {
    let said = [role(), token(" a", &[1])].concat();
    for (member, value) in [
        ("logprobs", json!(true)),
        ("tool_choice", json!("auto")),
        (
            "messages",
            json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ),
    ] {
        let mut body = request();
        body["tools"] = json!([{"type": "function"}]);
        body[member] = value;
        let (path, rest) = asked(&tracker(CHAT, &said), &body, &Answers::default()).expect("a plan");
        assert_eq!((&*path, &rest["max_tokens"]), ("/v1/chat/completions", &json!(9)), "{member}");
        let last = rest["messages"].as_array().and_then(|all| all.last()).expect("messages");
        assert_eq!(*last, json!({"role": "assistant", "content": " a"}));
        assert_eq!(
            (&rest["continue_final_message"], &rest["add_generation_prompt"]),
            (&json!(true), &json!(false))
        );
    }
}

proptest! {
    /// However the bytes are cut into reads, what passes is the same.
    #[test]
    fn reads_do_not_matter(cut in 0usize..6, strip: bool) {
        let events = [role(), token(" a", &[1]), token("é", &[2, 3]), finish(".", 4, "stop"), DONE.into()];
        let wishes = Wishes { strip, ..CHAT };
        let (first, second) = events.split_at(cut.min(5));
        let mut tracker = Tracker::new(Api::ChatCompletions, wishes);
        let parts = [pass(&mut tracker, &first.concat()).0, pass(&mut tracker, &second.concat()).0].concat();
        let whole = pass(&mut Tracker::new(Api::ChatCompletions, wishes), &events.concat()).0;
        prop_assert_eq!(parts, whole);
    }

    #[test]
    fn no_event_panics(text in "\\PC{0,80}", ids in prop::collection::vec(any::<u32>(), 0..3)) {
        let mut tracker = tracker(CHAT, &[role(), token(" a", &[1])].concat());
        drop(pass(&mut tracker, &format!("data: {text}\n\n")));
        drop(tracker.plan(text.as_bytes(), &Answers::default()));
        drop(ids_json(&ids));
    }
}
