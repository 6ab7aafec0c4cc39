use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    super::model::{Answer, Event, Finish, Relay, Stream, answers, bytes, through},
    *,
};

impl Stream for Seen {
    type Stitch = Stitch;
    fn on_event(&mut self, name: &[u8], data: &[u8]) -> Verdict {
        self.on_event(name, data)
    }
    fn plan(&self, original: &Members<'_>, answers: &Answers) -> Result<(Ask, Stitch), NoPlan> {
        self.plan(original, answers)
    }
    fn resumed(&mut self) {
        self.resumed();
    }
    fn stitch(stitch: &mut Stitch, name: &[u8], data: &[u8], out: &mut Vec<u8>) -> Result<(), Refusal> {
        stitch.on_event(name, data, out)
    }
}

/// The events of one response in the making, numbered.
struct Writer {
    /// Which engine writes the response; and which the message in it.
    id: usize,
    item: usize,
    max: u64,
    events: Vec<Event>,
}

impl Writer {
    fn push(&mut self, kind: &'static str, before: &str, after: &str) {
        let number = self.events.len();
        let data = format!("{{{before}\"sequence_number\":{number},{after}\"type\":\"{kind}\"}}");
        self.events.push((kind, data));
    }

    fn response(&self, status: &str, details: &Value, output: &str, usage: &Value) -> String {
        let (id, max) = (self.id, self.max);
        format!(
            r#"{{"id":"resp_{id}","created_at":{id},"incomplete_details":{details},"model":"m{id}","object":"response","output":{output},"temperature":1.0,"max_output_tokens":{max},"status":"{status}","usage":{usage}}}"#
        )
    }

    fn part(text: &str, logprobs: &str) -> String {
        let text = Value::from(text);
        format!(r#"{{"annotations":[],"text":{text},"type":"output_text","logprobs":{logprobs}}}"#)
    }

    fn message(&self, content: &str, status: &str) -> String {
        let item = self.item;
        format!(
            r#"{{"id":"msg_{item}","content":[{content}],"role":"assistant","status":"{status}","type":"message","phase":null}}"#
        )
    }

    fn begin(&mut self) {
        let response = self.response("in_progress", &Value::Null, "[]", &Value::Null);
        self.push("response.created", &format!("\"response\":{response},"), "");
        self.push("response.in_progress", &format!("\"response\":{response},"), "");
    }

    fn delta(&mut self, text: &str) {
        let item = self.item;
        if self.events.len() == 2 {
            let message = self.message("", "in_progress");
            self.push("response.output_item.added", &format!("\"item\":{message},\"output_index\":0,"), "");
            let part = Self::part("", "[]");
            let place =
                format!("\"content_index\":0,\"item_id\":\"msg_{item}\",\"output_index\":0,\"part\":{part},");
            self.push("response.content_part.added", &place, "");
        }
        let text = Value::from(text);
        let before = format!(
            "\"content_index\":0,\"delta\":{text},\"item_id\":\"msg_{item}\",\"logprobs\":[],\"output_index\":0,"
        );
        self.push("response.output_text.delta", &before, "");
    }

    fn end(&mut self, text: &str, finish: Finish, input: u64, made: u64) {
        let item = self.item;
        let mut output = "[]".to_owned();
        if !text.is_empty() {
            let quoted = Value::from(text);
            let before =
                format!("\"content_index\":0,\"item_id\":\"msg_{item}\",\"logprobs\":[],\"output_index\":0,");
            self.push("response.output_text.done", &before, &format!("\"text\":{quoted},"));
            let part = Self::part(text, "null");
            let place =
                format!("\"content_index\":0,\"item_id\":\"msg_{item}\",\"output_index\":0,\"part\":{part},");
            self.push("response.content_part.done", &place, "");
            let message = self.message(&part, "completed");
            self.push("response.output_item.done", &format!("\"item\":{message},\"output_index\":0,"), "");
            output = format!("[{message}]");
        }
        let usage = json!({
            "input_tokens": input, "input_tokens_details": {"cached_tokens": 2}, "output_tokens": made,
            "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": input + made,
        });
        let (status, details) = match finish {
            Finish::Length => ("incomplete", json!({"reason": "max_output_tokens"})),
            Finish::End | Finish::Stop => ("completed", Value::Null),
        };
        let response = self.response(status, &details, &output, &usage);
        self.push("response.completed", &format!("\"response\":{response},"), "");
    }
}

/// `/v1/responses` of engine number `id`: the answer behind `text`, in at most `max` tokens.
fn responses(answer: &Answer, (id, item): (usize, usize), text: &str, max: u64) -> Vec<Event> {
    let rest = answer.after(text, max);
    let mut writer = Writer { id, item, max, events: Vec::new() };
    writer.begin();
    rest.tokens.iter().for_each(|token| writer.delta(token));
    writer.end(&rest.tokens.concat(), rest.finish, rest.prompt, rest.made);
    writer.events
}

fn engine(answer: &Answer, number: usize, ask: &Ask) -> Vec<Event> {
    let body: Value = serde_json::from_slice(&ask.body).expect("JSON");
    assert_eq!(body["stream"], true);
    let last = body["input"].as_array().and_then(|items| items.last());
    let last = last.filter(|last| last["status"] == "in_progress");
    let text = last.map_or("", |last| last["content"][0]["text"].as_str().expect("text"));
    responses(answer, (number, number), text, body["max_output_tokens"].as_u64().expect("a limit"))
}

fn body(answer: &Answer) -> Vec<u8> {
    json!({"model": "m", "input": "hi", "max_output_tokens": answer.max(), "stream": true})
        .to_string()
        .into_bytes()
}

fn same(answer: &Answer, cuts: &[usize]) {
    let delivered = through::<Seen>(answer, &body(answer), cuts, |number, ask| engine(answer, number, ask));
    let delivered = String::from_utf8(delivered).expect("UTF-8");
    let first =
        |what: &str| (0..9).find(|id| delivered.contains(&format!("\"id\":\"{what}_{id}\""))).unwrap_or(0);
    let expected = responses(answer, (first("resp"), first("msg")), "", answer.max());
    assert_eq!(delivered, String::from_utf8_lossy(&bytes(&expected)), "{answer:?} {cuts:?}");
}

#[test]
fn a_stream_cut_anywhere_is_the_uninterrupted_one() {
    for finish in [Finish::End, Finish::Length, Finish::Stop] {
        let answer = Answer::of(&[" Hello", ",", "\n", " wörld \"x\"", " 😀"], finish);
        for first in 0..13 {
            same(&answer, &[first]);
            for second in 0..13 {
                same(&answer, &[first, second]);
                same(&answer, &[first, second, 5]);
            }
        }
    }
}

#[test]
fn an_answer_without_text_goes_on_too() {
    let answer = Answer::of(&[], Finish::End);
    (0..3).for_each(|cut| same(&answer, &[cut]));
}

proptest! {
    #[test]
    fn any_answer_cut_anywhere_is_the_uninterrupted_one(
        answer in answers(), cuts in prop::collection::vec(0usize..17, 1..4),
    ) {
        same(&answer, &cuts);
    }

    #[test]
    fn no_bytes_panic(name in ".{0,12}", data in ".{0,40}") {
        let mut seen = Seen::default();
        let _verdict = seen.on_event(name.as_bytes(), data.as_bytes());
        let counts = stitch::Counts { seen: 1, full: None };
        let mut stitch = Stitch::new(Opening::default(), 0, "x".into(), counts, wire::Seam::default());
        prop_assert!(stitch.on_event(name.as_bytes(), data.as_bytes(), &mut Vec::new()).is_ok());
    }
}

fn begun() -> Vec<Event> {
    responses(&Answer::of(&["a", " b"], Finish::End), (0, 0), "", 9)[..5].to_vec()
}

#[test]
fn every_way_to_die_is_seen() {
    let after = |name: &'static str, data: &str| {
        let mut events = begun();
        events.push((name, data.to_owned()));
        Relay::<Seen>::new().relay(&events)
    };
    let end = |kind: &'static str, status: &str| {
        after(kind, &json!({"type": kind, "response": {"status": status}}).to_string())
    };
    assert_eq!(end("response.completed", "completed"), Ok(()));
    assert_eq!(end("response.completed", "incomplete"), Ok(()));
    assert_eq!(end("response.incomplete", "incomplete"), Ok(()));
    assert_eq!(end("response.completed", "cancelled"), Err(Loss::Aborted));
    assert_eq!(end("response.completed", "failed"), Err(Loss::ErrorEvent));
    assert_eq!(end("response.completed", "in_progress"), Err(Loss::Unfinished));
    assert_eq!(end("response.failed", "failed"), Err(Loss::ErrorEvent));
    assert_eq!(end("response.cancelled", "cancelled"), Err(Loss::Aborted));
    assert_eq!(after("", "[DONE]"), Err(Loss::Unfinished));
    assert_eq!(after("", r#"{"error":{"message":"m","code":500}}"#), Err(Loss::ErrorEvent));
    assert_eq!(after("error", r#"{"type":"error","code":"x","message":"m"}"#), Err(Loss::ErrorEvent));
    assert_eq!(
        after("", r#"{"error":{"message":"m","code":400}}"#),
        Ok(()),
        "no other engine would do better"
    );
    for garbage in ["", "{", "{}", "[]", "1", r#"{"type":"surprise"}"#, r#"{"choices":[]}"#] {
        assert_eq!(after("", garbage), Err(Loss::Garbage), "{garbage}");
    }
    assert_eq!(after("response.created", r#"{"type":"response.queued"}"#), Err(Loss::Garbage));
}

fn refused(events: &[Event], more: Value) -> Option<Refusal> {
    let mut body = json!({"model": "m", "input": "hi", "stream": true});
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    let mut relay = Relay::<Seen>::new();
    relay.relay(events).expect("nothing is wrong with it");
    relay.ask(body.to_string().as_bytes(), &Answer::of(&["a"], Finish::End)).err()
}

#[test]
fn what_would_be_wrong_is_refused() {
    let with = |more: Value| refused(&begun(), more);
    assert_eq!(with(json!({})), None);
    assert_eq!(with(json!({"text": {"format": {"type": "text"}}, "tools": [{"type": "function"}]})), None);
    for key in ["previous_response_id", "conversation", "kv_transfer_params"] {
        assert_eq!(with(json!({key: "x"})), Some(Refusal::EngineState), "{key}");
        assert_eq!(refused(&[], json!({key: "x"})), Some(Refusal::EngineState), "{key}");
    }
    assert_eq!(with(json!({"background": true})), Some(Refusal::EngineState));
    for format in ["json_object", "json_schema"] {
        let text = json!({"text": {"format": {"type": format}}});
        assert_eq!(with(text.clone()), Some(Refusal::StructuredOutput));
        assert_eq!(refused(&begun()[..4], text), None, "nothing of it was half done");
    }
    assert_eq!(with(json!({"structured_outputs": {"regex": "x"}})), Some(Refusal::StructuredOutput));
    let tools = |choice: Value| json!({"tools": [{"type": "function"}], "tool_choice": choice});
    assert_eq!(with(tools(json!("required"))), Some(Refusal::StructuredOutput));
    assert_eq!(with(tools(json!({"type": "function"}))), Some(Refusal::StructuredOutput));
    assert_eq!(with(json!({"tools": [{"type": "web_search"}]})), Some(Refusal::ToolCall));
    assert_eq!(with(json!({"tools": 5})), Some(Refusal::Body));
    assert_eq!(with(json!({"presence_penalty": 0.5})), Some(Refusal::OutputPenalties));
    assert_eq!(with(json!({"include": ["message.output_text.logprobs"]})), Some(Refusal::OutputState));
    assert_eq!(with(json!({"include_reasoning": false})), Some(Refusal::Reasoning));
    for input in [json!(5), json!([]), json!([{"role": "assistant", "status": "incomplete", "content": "x"}])]
    {
        assert_eq!(with(json!({"input": input})), Some(Refusal::Body));
    }
    let item = |kind: &str| {
        let data = json!({"type": "response.output_item.added", "item": {"type": kind}}).to_string();
        refused(&[&begun()[..2], &[("response.output_item.added", data)]].concat(), json!({}))
    };
    assert_eq!(item("reasoning"), Some(Refusal::Reasoning));
    assert_eq!(item("function_call"), Some(Refusal::ToolCall));
    assert_eq!(item("surprise"), Some(Refusal::Unreadable));
    let second = &begun()[2..3];
    assert_eq!(
        refused(&[&begun(), second].concat(), json!({})),
        Some(Refusal::Unreadable),
        "several messages"
    );
    let event = |kind: &'static str| {
        refused(&[&begun()[..], &[(kind, json!({"type": kind}).to_string())]].concat(), json!({}))
    };
    assert_eq!(event("response.reasoning_text.delta"), Some(Refusal::Reasoning));
    assert_eq!(event("response.function_call_arguments.delta"), Some(Refusal::ToolCall));
    assert_eq!(event("response.surprise"), Some(Refusal::Unreadable));
}

#[test]
fn the_input_keeps_what_it_was() {
    let input = |raw: &str| {
        let body = format!("{{\"input\":{raw}}}");
        let original = Members::of(body.as_bytes()).expect("an object");
        String::from_utf8(request::input(&original, "so \"").expect("an input")).expect("UTF-8")
    };
    let item = r#"{"type":"message","role":"assistant","status":"in_progress","content":[{"type":"output_text","text":"so \"","annotations":[]}]}"#;
    let user = r#"{"type":"message","role":"user","content":"h\u00e9"}"#;
    assert_eq!(input(r#""h\u00e9""#), format!("[{user},{item}]"));
    let items = r#"[ {"role":"user", "content":1e-05 } "#;
    assert_eq!(input(&format!("{items}]")), format!("{items},{item}]"));
}

#[test]
fn a_call_behind_the_cut_follows_the_message() {
    let answer = Answer::of(&["a", " b"], Finish::End);
    let mut relay = Relay::<Seen>::new();
    relay.relay(&begun()).expect("a beginning");
    relay.ask(&body(&answer), &answer).expect("a plan");
    let mut writer = Writer { id: 9, item: 9, max: 6, events: Vec::new() };
    writer.begin();
    let call = r#"{"id":"fc_1","type":"function_call","name":"f"}"#;
    writer.push("response.output_item.added", &format!("\"item\":{call},\"output_index\":0,"), "");
    writer.push("response.output_item.done", &format!("\"item\":{call},\"output_index\":0,"), "");
    let usage = json!({"input_tokens": 8, "output_tokens": 3, "total_tokens": 11});
    let response = writer.response("completed", &Value::Null, &format!("[{call}]"), &usage);
    writer.push("response.completed", &format!("\"response\":{response},"), "");
    relay.relay(&writer.events).expect("it fits");
    let delivered = String::from_utf8(relay.delivered).expect("UTF-8");
    let events: Vec<Value> = delivered
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(|data| serde_json::from_str(data).expect("JSON"))
        .collect();
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    let kinds: Vec<&str> = events.iter().skip(5).filter_map(|event| event["type"].as_str()).collect();
    let expected = [
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "output_item.done",
    ];
    assert_eq!(kinds[..5], expected.map(|kind| format!("response.{kind}")));
    assert_eq!(events[8]["output_index"], 1);
    let response = &events[10]["response"];
    assert_eq!((&response["id"], &response["max_output_tokens"]), (&json!("resp_0"), &json!(9)));
    assert_eq!(response["output"][0]["content"][0]["text"], "a");
    assert_eq!(response["output"][1]["id"], "fc_1");
    assert_eq!(response["usage"], json!({"input_tokens": 7, "output_tokens": 4, "total_tokens": 11}));
    assert_eq!(relay.seen.tokens(), Some(4));
}
