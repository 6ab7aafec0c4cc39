//! The pure parts of the hot path, one at a time, for `make count`: it runs this program under callgrind, once with so many
//! repetitions and once with twice as many, and compares what one costs with what it has cost
//! (`loadtest/instructions.toml`).
//!
//!     instructions --list              what there is: repetitions that measure it well, and its name
//!     instructions --run NAME TIMES    one of them
//!
//! With anything else it runs each once, so that none can rot. Everything is fixed: texts, seeds, clocks.

use std::{hint::black_box, net::SocketAddr, process::ExitCode, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use penstock_config::proxy::{ProxyConfig, TelemetryConfig};
use penstock_proto::{v1, xds};
use penstock_proxy::{
    endpoints::EndpointTable,
    openai::{
        Api,
        event::EventSplitter,
        request::{ScanLimits, rewrite, scan_with},
    },
    resume::{chunks::Wishes, tracker::Tracker},
    routing::{self, PickRules, policy::Asked},
    telemetry::{
        access_log::{self, AccessLog},
        facts::{Facts, Outcome},
        metrics::Metrics,
    },
    upstream::{
        headers::{Sender, forwarded},
        request::EngineRequest,
    },
    xds::state::XdsState,
};
use prost::Message;

/// As in the proxy.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// What is repeated.
type Step = Box<dyn FnMut()>;

/// One part.
struct Part {
    name: &'static str,
    /// Repetitions that measure it well.
    times: u32,
    /// Makes all that it needs.
    make: fn() -> Step,
}

const PARTS: &[Part] = &[
    Part { name: "event, one a read: split, track", times: 2_000, make: || events(1) },
    Part { name: "events, eight a read: split, track", times: 500, make: || events(8) },
    Part { name: "event in two reads: split, track", times: 2_000, make: halves },
    Part { name: "first event, 1,000 ids of the prompt: track", times: 20, make: first_event },
    Part { name: "request of 1 KB: scan", times: 500, make: || scan(1 << 10) },
    Part { name: "request of 64 KB: scan", times: 50, make: || scan(64 << 10) },
    Part { name: "request of 1 MB: scan", times: 5, make: || scan(1 << 20) },
    Part { name: "request of 1 KB: ask for token ids", times: 500, make: || ask_for_ids(1 << 10) },
    Part { name: "request of 64 KB: ask for token ids", times: 50, make: || ask_for_ids(64 << 10) },
    Part { name: "pick from 4 endpoints", times: 500, make: || pick(4) },
    Part { name: "pick from 100 endpoints", times: 300, make: || pick(100) },
    Part { name: "pick from 10,000 endpoints", times: 20, make: || pick(10_000) },
    Part { name: "head for an engine", times: 200, make: head },
    Part { name: "access log, a line", times: 500, make: log_line },
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["--list"] => PARTS.iter().for_each(|part| println!("{} {}", part.times, part.name)),
        ["--run", name, times] => {
            let part = PARTS.iter().find(|part| part.name == *name);
            let (Some(part), Ok(times)) = (part, times.parse::<u32>()) else {
                eprintln!("instructions: no {name:?}, or {times:?} is no number; --list says what there is");
                return ExitCode::from(2);
            };
            let mut step = (part.make)();
            (0..times).for_each(|_| step());
        }
        _ => {
            for part in PARTS {
                (part.make)()();
                println!("{}: runs", part.name);
            }
        }
    }
    ExitCode::SUCCESS
}

/// A chunk of a chat as vLLM writes it, 230 bytes, with the ids that the proxy asks for.
fn chunk(number: usize) -> String {
    format!(
        "data: {{\"id\":\"chatcmpl-0123456789abcdef0123456789abcdef\",\"object\":\"chat.completion.chunk\",\
         \"created\":1794000000,\"model\":\"model-0\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\" word{}\"}},\
         \"logprobs\":null,\"finish_reason\":null,\"token_ids\":[{}]}}]}}\n\n",
        number % 10,
        1_000 + number % 9_000
    )
}

/// What a stream begins with.
fn opening(prompt_ids: usize) -> Bytes {
    let ids: Vec<String> = (0..prompt_ids).map(|i| (i * 7_919 % 128_000).to_string()).collect();
    Bytes::from(format!(
        "data: {{\"id\":\"chatcmpl-0123456789abcdef0123456789abcdef\",\"object\":\"chat.completion.chunk\",\
         \"created\":1794000000,\"model\":\"model-0\",\"choices\":[{{\"index\":0,\"delta\":{{\"role\":\"assistant\",\
         \"content\":\"\"}},\"logprobs\":null,\"finish_reason\":null}}],\"prompt_token_ids\":[{}]}}\n\n",
        ids.join(",")
    ))
}

fn tracker() -> Tracker {
    Tracker::new(Api::ChatCompletions, Wishes { chat: true, ids: false, strip: false })
}

/// Reads that take turns, as a stream of the chat API that has begun.
fn stream(reads: Vec<Bytes>) -> Step {
    let (mut splitter, mut tracker) = (EventSplitter::default(), tracker());
    let mut turn = reads.into_iter().cycle();
    let mut read = move |bytes: Bytes| {
        if let Ok(Some(whole)) = splitter.push(bytes) {
            black_box(tracker.pass(whole));
        }
    };
    read(opening(8));
    Box::new(move || turn.by_ref().take(1).for_each(&mut read))
}

fn events(a_read: usize) -> Step {
    let text = |read: usize| (0..a_read).map(|i| chunk(read * a_read + i)).collect::<String>();
    stream((0..64).map(|read| Bytes::from(text(read))).collect())
}

/// Two of them make an event, which a repetition takes.
fn halves() -> Step {
    let (mut splitter, mut tracker) = (EventSplitter::default(), tracker());
    let reads: Vec<(Bytes, Bytes)> = (0..64)
        .map(|number| {
            let mut first = Bytes::from(chunk(number));
            let second = first.split_off(100);
            (first, second)
        })
        .collect();
    let mut turn = reads.into_iter().cycle();
    Box::new(move || {
        for (first, second) in turn.by_ref().take(1) {
            for half in [first, second] {
                if let Ok(Some(whole)) = splitter.push(half) {
                    black_box(tracker.pass(whole));
                }
            }
        }
    })
}

fn first_event() -> Step {
    let opening = opening(1_000);
    Box::new(move || {
        black_box(tracker().pass(opening.clone()));
    })
}

/// A chat of about that many bytes.
fn body(bytes: usize) -> Bytes {
    const SENTENCE: &str = "The sluice opens, and the water of the mill race turns the wheel. ";
    let content = SENTENCE.repeat((bytes / SENTENCE.len()).max(1));
    Bytes::from(format!(
        "{{\"model\":\"model-0\",\"messages\":[{{\"role\":\"system\",\"content\":\"Be brief.\"}},\
         {{\"role\":\"user\",\"content\":\"{content}\"}}],\"stream\":true,\"max_tokens\":256,\"temperature\":0.7,\
         \"stream_options\":{{\"include_usage\":true}}}}"
    ))
}

fn scan(bytes: usize) -> Step {
    let (body, limits) = (body(bytes), ScanLimits::default());
    let remove = ProxyConfig::default().trust.remove_fields;
    Box::new(move || {
        let facts = scan_with(black_box(&body), &limits, None, &remove);
        assert!(facts.is_ok(), "{facts:?}");
    })
}

fn ask_for_ids(bytes: usize) -> Step {
    let body = body(bytes);
    Box::new(move || {
        black_box(rewrite(&body, vec![(1..1, br#""return_token_ids":true,"#)]));
    })
}

/// A table with one pool of so many endpoints.
fn table(endpoints: usize) -> Option<EndpointTable> {
    let endpoint = |number: usize| v1::Endpoint {
        id: format!("e{number:05}"),
        address: SocketAddr::from(([127, 0, 0, 1], 9)).to_string(),
        generation: 1,
        state: v1::EndpointState::Ready.into(),
        ..Default::default()
    };
    let pool = v1::EndpointTable {
        pool: "m".into(),
        endpoints: (0..endpoints).map(endpoint).collect(),
        ..Default::default()
    };
    let resource = xds::Resource {
        name: "m".into(),
        version: "1".into(),
        resource: Some(xds::Any { type_url: xds::ENDPOINT_TABLE_TYPE.into(), value: pool.encode_to_vec() }),
        ..Default::default()
    };
    let told = xds::DeltaDiscoveryResponse {
        type_url: xds::ENDPOINT_TABLE_TYPE.into(),
        system_version_info: "1.1".into(),
        resources: vec![resource],
        ..Default::default()
    };
    let config = ProxyConfig::default();
    let table = EndpointTable::new(config.upstream, &config.resume);
    table.apply(&XdsState::default().apply(&told).ok()?);
    Some(table)
}

fn pick(endpoints: usize) -> Step {
    let config = ProxyConfig::default();
    let mut rng = fastrand::Rng::with_seed(7);
    let rules = PickRules::new(&config.routing, &config.queue, config.health.max_ejected_percent, &mut rng);
    let table = table(endpoints);
    // Some are busier than others.
    let mut held = std::collections::VecDeque::new();
    Box::new(move || {
        let snapshot = table.as_ref().map(|table| Arc::clone(&table.load()));
        let Some(pool) = snapshot.as_ref().and_then(|snapshot| snapshot.pools.get("m")) else {
            unreachable!("the table was refused");
        };
        let picked = routing::pick(pool, &[], &Asked::default(), 3_600_000, (&rules, &rules.rules), |n| {
            rng.usize(..n)
        });
        assert!(picked.is_ok(), "{picked:?}");
        held.push_back(picked);
        if held.len() > 3 {
            held.pop_front();
        }
    })
}

/// What OpenAI's Python client sends.
const CLIENT: &[(&str, &str)] = &[
    ("host", "api.example.com"),
    ("accept-encoding", "gzip, deflate"),
    ("connection", "keep-alive"),
    ("accept", "application/json"),
    ("content-type", "application/json"),
    ("user-agent", "OpenAI/Python 2.54.0"),
    ("x-stainless-lang", "python"),
    ("x-stainless-package-version", "2.54.0"),
    ("x-stainless-os", "Linux"),
    ("x-stainless-arch", "x64"),
    ("x-stainless-runtime", "CPython"),
    ("x-stainless-runtime-version", "3.11.2"),
    ("authorization", "Bearer sk-0123456789abcdef"),
    ("x-stainless-async", "false"),
    ("x-stainless-retry-count", "0"),
    ("x-stainless-read-timeout", "600"),
    ("content-length", "1024"),
];

fn head() -> Step {
    let client: HeaderMap = CLIENT
        .iter()
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
        .collect();
    let remove = ProxyConfig::default().trust.remove_headers;
    let body = body(1 << 10);
    Box::new(move || {
        let sender = Sender {
            address: [127, 0, 0, 1].into(),
            tls: false,
            host: b"api.example.com",
            behind_proxy: false,
            trusted: false,
        };
        let id = "0198c7f2-3a4b-7c5d-8e6f-0123456789ab";
        let request = EngineRequest {
            api: Api::ChatCompletions,
            stream: true,
            request_id: id.to_owned(),
            target: "/v1/chat/completions".to_owned(),
            headers: forwarded(black_box(&client), &sender, &remove, id, 0xab),
            body: body.clone(),
            resume: None,
            whole: None,
        };
        assert!(!black_box(request.head("127.0.0.1:8000")).is_empty());
    })
}

/// A log whose lines are all written before its counts are looked at.
struct Log(AccessLog);

impl Drop for Log {
    fn drop(&mut self) {
        assert!(self.0.flush(Duration::from_secs(60)), "the lines were not written");
    }
}

fn log_line() -> Step {
    let config = TelemetryConfig { access_log: "/dev/null".into(), ..TelemetryConfig::default() };
    let log =
        Metrics::new().map_err(|e| format!("{e:?}")).and_then(|m| access_log::open(&config, &Arc::new(m)));
    let log = log.map(Log);
    let mut facts = Facts::new("0198c7f2-3a4b-7c5d-8e6f-0123456789ab".into());
    facts.client = Some([127, 0, 0, 1].into());
    facts.method = http::Method::POST;
    (facts.path, facts.route, facts.stream) = ("/v1/chat/completions".into(), "chat_completions", true);
    (facts.model, facts.deployment, facts.endpoint) =
        ("model-0".into(), "model-0".into(), "model-0-3".into());
    (facts.attempts, facts.status, facts.outcome, facts.blame) = (1, 200, Outcome::Completed, "none");
    (facts.bytes_in, facts.bytes_out) = (1_024, 23_000);
    (facts.prompt_tokens, facts.completion_tokens) = (Some(250), Some(100));
    Box::new(move || match &log {
        Ok(log) => log.0.write(black_box(&facts)),
        Err(e) => unreachable!("no log: {e}"),
    })
}
