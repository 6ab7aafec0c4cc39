//! All that is known of one request, in the form in which it is told: the line of the access log and the head of a
//! decision record are this struct as JSON. docs/observability.md explains each field; a test holds the two together.
//!
//! Holds no secret and none of a prompt: keys by their name, paths without their query. What a client chose freely (the
//! path, a model that does not exist) is cut to [`MAX_TEXT`] bytes and escaped as any JSON string, so that no request can
//! begin a line of its own.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use chrono::{DateTime, SecondsFormat, Utc};
use penstock_proto::Version;
use serde::{Serialize, Serializer};

/// Longest text from outside that is kept, in bytes.
pub const MAX_TEXT: usize = 256;

/// One request, as far as it is known. Times are since the request's head was read.
#[derive(Debug, Clone, Serialize)]
pub struct Facts {
    /// When it ended.
    #[serde(serialize_with = "rfc3339")]
    pub time: SystemTime,
    /// Our name for it, also in the `x-request-id` of the answer and of what the engine got.
    pub request_id: String,
    /// Where the connection came from.
    pub client: Option<IpAddr>,
    /// Name of the API key; empty where none is asked for or it was refused.
    pub key: String,
    /// HTTP method.
    #[serde(serialize_with = "method")]
    pub method: http::Method,
    /// As asked for, without the query.
    pub path: String,
    /// The API, as in metrics; "none" where the path is no API of ours.
    pub route: &'static str,
    /// As asked for; empty until the body was read.
    #[serde(serialize_with = "text")]
    pub model: Arc<str>,
    /// The pool of endpoints that the model led to.
    pub deployment: String,
    /// The endpoint tried last.
    #[serde(serialize_with = "text")]
    pub endpoint: Arc<str>,
    /// Engines asked.
    pub attempts: usize,
    /// What the client was told; 499 if it left before that.
    pub status: u16,
    /// How it ended.
    pub outcome: Outcome,
    /// Whose fault: "none", "client", "upstream", "gateway".
    pub blame: &'static str,
    /// Code of the error; empty without one.
    pub error: &'static str,
    /// Bytes of the request's body.
    pub bytes_in: u64,
    /// Bytes of the answer's body written.
    pub bytes_out: u64,
    /// Tokens of the prompt, as the engine counted.
    pub prompt_tokens: Option<u64>,
    /// Tokens generated, as the engine counted.
    pub completion_tokens: Option<u64>,
    /// Time spent waiting for an engine with room.
    #[serde(rename = "queue_ms")]
    pub queue: Millis,
    /// How often the stream went on at another engine.
    pub resumes: u32,
    /// Time from the losses of its engines to what followed them.
    #[serde(rename = "resume_ms")]
    pub resume: Millis,
    /// Why it did not go on when it last should have; empty if it did, or never had to.
    pub resume_refused: &'static str,
    /// Time to the first byte of the engine's answer.
    #[serde(rename = "ttft_ms")]
    pub ttft: Option<Millis>,
    /// Mean gap between the events of a stream.
    #[serde(rename = "itl_mean_ms")]
    pub itl_mean: Option<Millis>,
    /// Longest gap inside a stream.
    #[serde(rename = "itl_max_ms")]
    pub itl_max: Option<Millis>,
    /// Time to the end.
    #[serde(rename = "duration_ms")]
    pub duration: Millis,
    /// Whether a stream was asked for.
    pub stream: bool,
    /// Tables it was routed by; "0.0" before any.
    #[serde(serialize_with = "version")]
    pub snapshot: Version,
    /// Trace id of the client's `traceparent`; empty without a valid one.
    pub trace_id: String,
    /// The client's own name for the request, as it gets it back in `x-client-request-id`; empty without one, or where it
    /// is longer than 128 bytes or not of printable ASCII.
    pub client_request_id: String,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The client has the whole answer, whatever its status.
    Completed,
    /// The client left first, or took nothing for too long.
    ClientGone,
    /// Refused or failed before anything of an answer was written.
    Error,
    /// Broken off after the answer had begun.
    Cut,
}

/// A time, told in milliseconds with three digits behind the point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Millis(pub Duration);

impl Serialize for Millis {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let micros = u32::try_from(self.0.as_micros());
        // Beyond 71 minutes thousandths say nothing.
        to.serialize_f64(micros.map_or(self.0.as_secs_f64().round() * 1e3, |micros| f64::from(micros) / 1e3))
    }
}

impl Facts {
    /// Nothing known but the name.
    pub fn new(request_id: String) -> Self {
        Self {
            time: SystemTime::UNIX_EPOCH,
            request_id,
            client: None,
            key: String::new(),
            method: http::Method::GET,
            path: String::new(),
            route: "none",
            model: Arc::default(),
            deployment: String::new(),
            endpoint: Arc::default(),
            attempts: 0,
            status: 499, // unless somebody says otherwise before the end
            outcome: Outcome::ClientGone,
            blame: "client",
            error: "",
            bytes_in: 0,
            bytes_out: 0,
            prompt_tokens: None,
            completion_tokens: None,
            queue: Millis::default(),
            resumes: 0,
            resume: Millis::default(),
            resume_refused: "",
            ttft: None,
            itl_mean: None,
            itl_max: None,
            duration: Millis::default(),
            stream: false,
            snapshot: Version::default(),
            trace_id: String::new(),
            client_request_id: String::new(),
        }
    }
}

/// The beginning of `text`, at most [`MAX_TEXT`] bytes.
pub fn cut(text: &str) -> &str {
    if text.len() <= MAX_TEXT {
        return text;
    }
    let end = (0..=MAX_TEXT).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    text.get(..end).unwrap_or_default()
}

/// The trace id of a `traceparent` header that is one (W3C Trace Context: `00-32 hex-16 hex-2 hex`, not all zero).
pub fn trace_id(traceparent: &str) -> Option<&str> {
    let mut parts = traceparent.trim().splitn(4, '-');
    let (version, trace, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |text: &str, length: usize| {
        text.len() == length && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    let right = hex(version, 2) && version != "ff" && hex(trace, 32) && hex(parent, 16);
    let flags = flags.get(..2).is_some_and(|f| hex(f, 2)) && (version != "00" || flags.len() == 2);
    (right && flags && trace.bytes().any(|b| b != b'0')).then_some(trace)
}

fn rfc3339<S: Serializer>(time: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    let time = DateTime::<Utc>::from_timestamp(seconds, since.subsec_nanos()).unwrap_or_default();
    to.serialize_str(&time.to_rfc3339_opts(SecondsFormat::Millis, true))
}

fn method<S: Serializer>(method: &http::Method, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(cut(method.as_str()))
}

pub(super) fn text<S: Serializer>(text: &Arc<str>, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(text)
}

fn version<S: Serializer>(version: &Version, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(version)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn json(facts: &Facts) -> serde_json::Value {
        serde_json::to_value(facts).expect("plain data")
    }

    #[test]
    fn times_are_told_in_utc_and_milliseconds() {
        let mut facts = Facts::new("id".into());
        facts.time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
        facts.ttft = Some(Millis(Duration::from_micros(1_234)));
        facts.duration = Millis(Duration::from_secs(7_200));
        let json = json(&facts);
        assert_eq!(json["time"], "2023-11-14T22:13:20.123Z");
        assert_eq!(json["ttft_ms"], 1.234);
        assert_eq!(json["duration_ms"], 7_200_000.0);
        assert_eq!(json["itl_max_ms"], serde_json::Value::Null);
    }

    #[test]
    fn every_field_is_explained_in_the_documentation() {
        let document = include_str!("../../../docs/observability.md");
        for field in json(&Facts::new("id".into())).as_object().expect("an object").keys() {
            assert!(document.contains(&format!("| `{field}` |")), "{field} is not in docs/observability.md");
        }
    }

    #[test]
    fn only_a_valid_traceparent_gives_a_trace_id() {
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        assert_eq!(trace_id(&format!("00-{id}-00f067aa0ba902b7-01")), Some(id));
        assert_eq!(trace_id(&format!("cc-{id}-00f067aa0ba902b7-01-more")), Some(id), "versions to come");
        for bad in [
            String::new(),
            format!("00-{id}-00f067aa0ba902b7"),
            format!("00-{id}-00f067aa0ba902b7-01-more"),
            format!("ff-{id}-00f067aa0ba902b7-01"),
            format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)),
            format!("00-{}-00f067aa0ba902b7-01", id.to_uppercase()),
            format!("00-{id}\n-00f067aa0ba902b-01"),
        ] {
            assert_eq!(trace_id(&bad), None, "{bad}");
        }
    }

    proptest! {
        /// Log injection: whatever a client writes, a line is one line and reads back as what was written.
        #[test]
        fn no_text_begins_a_line_of_its_own(path in any::<String>(), model in any::<String>()) {
            let mut facts = Facts::new("id".into());
            facts.path = cut(&path).to_owned();
            facts.model = cut(&model).into();
            let line = serde_json::to_string(&facts).expect("plain data");
            prop_assert!(line.bytes().all(|b| b >= 0x20), "{:?}", line);
            let read: serde_json::Value = serde_json::from_str(&line).expect("JSON");
            prop_assert_eq!(read["path"].as_str(), Some(cut(&path)));
            prop_assert_eq!(read["model"].as_str(), Some(cut(&model)));
            prop_assert!(cut(&path).len() <= MAX_TEXT && path.starts_with(cut(&path)));
        }
    }
}
