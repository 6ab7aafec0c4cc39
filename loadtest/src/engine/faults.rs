//! Faults on demand: what may go wrong in an engine, for how many requests, and when. Pure.
//!
//! A [`FaultTable`] is an ordered list; a request takes the first fault that applies to it. `count` bounds how many
//! requests a fault hits; `share` makes it hit a repeatable part of them (seeded by the fault, by arrival number). One
//! fault per request: two at once would hide each other.
//!
//! Written as JSON (`{"kind":"reset","after_tokens":5,"count":1}`) or on the command line (`reset:after_tokens=5,count=1`).

use serde::{Deserialize, Serialize};

use super::tokens;

/// One fault and whom it hits.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// What happens.
    pub kind: FaultKind,
    /// After how many tokens of the response (of all choices). Absent: before any byte of the response, where the kind
    /// allows it. 0: after the response header. All of them: before what follows the last token.
    #[serde(default)]
    pub after_tokens: Option<u64>,
    /// Requests left to hit; absent = all.
    #[serde(default)]
    pub count: Option<u64>,
    /// Share of requests to hit, 0 to 1.
    #[serde(default = "whole")]
    pub share: f64,
    /// Decides which requests make up the share.
    #[serde(default)]
    pub seed: u64,
    /// Only requests whose path starts with this.
    #[serde(default)]
    pub path: String,
    /// For `status`: the HTTP status, 400 to 599.
    #[serde(default = "default_status")]
    pub status: u16,
    /// For `slow`: how many times longer each token takes, 1 to 10,000.
    #[serde(default = "default_factor")]
    pub factor: f64,
    /// For `cut`: bytes of the event that still go out; as many as it has and more: all of them, and not the end of
    /// their chunk.
    #[serde(default)]
    pub byte: usize,
    /// For `cut`: which event of the stream, counted from 0, those with the role, the finish reason and the usage and
    /// `[DONE]` included. Absent: the first one after `after_tokens`. A stream without such an event is left alone.
    #[serde(default)]
    pub event: Option<u64>,
    /// For `freeze`: milliseconds between comments (`: keep-alive`) while it lasts; 0 = silence.
    #[serde(default)]
    pub keep_alive_ms: u64,
    /// For `crash`: the exit code; 137 = by SIGKILL, so that nothing is cleaned up.
    #[serde(default = "default_code")]
    pub code: u8,
    /// Requests hit so far.
    #[serde(default)]
    pub hits: u64,
}

const fn whole() -> f64 {
    1.0
}
const fn default_status() -> u16 {
    500
}
const fn default_factor() -> f64 {
    10.0
}
const fn default_code() -> u8 {
    137
}

/// What happens to a request, or to the engine.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// Tokens come `factor` times slower.
    Slow,
    /// The request is read and never answered; /health stays 200.
    Hang,
    /// The stream stops after k tokens and stays open.
    Freeze,
    /// TCP RST after k tokens, or before the response.
    Reset,
    /// An error frame inside the 200 and then `[DONE]`, after k tokens; unary: status 500.
    Error,
    /// `finish_reason` "abort" and `[DONE]`, after k tokens; unary: a 200 with what there is.
    Abort,
    /// HTTP `status` with vLLM's error body.
    Status,
    /// 503 as from a full queue.
    Busy,
    /// The whole process dies with `code`, after k tokens or at once.
    Crash,
    /// One event of broken JSON after k tokens; the stream goes on.
    GarbageSse,
    /// Bytes that are no HTTP after k tokens, or instead of the response; then the connection closes.
    GarbageHttp,
    /// The connection closes after k tokens without the last chunk.
    Close,
    /// The body ends properly after k tokens, without finish reason or `[DONE]`.
    End,
    /// The connection closes within an event, after `byte` bytes of it: the one after k tokens, or number `event`.
    Cut,
    /// /health answers 503.
    Unhealthy,
    /// The listening socket never opens. Only on the command line.
    NeverReady,
    /// The process exits with `code` while loading. Only on the command line.
    CrashOnLoad,
}

impl FaultKind {
    /// True if a request is what it hits; else it is the engine.
    pub const fn hits_requests(self) -> bool {
        !matches!(self, Self::Unhealthy | Self::NeverReady | Self::CrashOnLoad)
    }

    /// Its name as written.
    pub fn name(self) -> String {
        serde_json::to_value(self).ok().and_then(|v| v.as_str().map(String::from)).unwrap_or_default()
    }
}

impl Fault {
    /// A fault of `kind` with every default.
    pub const fn new(kind: FaultKind) -> Self {
        Self {
            kind,
            after_tokens: None,
            count: None,
            share: 1.0,
            seed: 0,
            path: String::new(),
            status: default_status(),
            factor: default_factor(),
            byte: 0,
            event: None,
            keep_alive_ms: 0,
            code: default_code(),
            hits: 0,
        }
    }

    /// Parses `KIND` or `KIND:key=value,key=value`.
    ///
    /// # Errors
    /// A sentence that names the unknown kind, key or value.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        let mut object = serde_json::Map::new();
        object.insert("kind".into(), kind.replace('-', "_").into());
        for pair in rest.split(',').filter(|p| !p.is_empty()) {
            let (key, value) =
                pair.split_once('=').ok_or_else(|| format!("`{pair}` in fault `{text}` is not KEY=VALUE"))?;
            let value = match key {
                "path" => value.into(),
                _ => serde_json::from_str(value)
                    .map_err(|_| format!("`{value}` in fault `{text}` is not a number"))?,
            };
            object.insert(key.replace('-', "_"), value);
        }
        let fault: Self =
            serde_json::from_value(object.into()).map_err(|e| format!("fault `{text}`: {e}"))?;
        fault.validate()?;
        Ok(fault)
    }

    /// Checks ranges.
    ///
    /// # Errors
    /// A sentence that names the field.
    pub fn validate(&self) -> Result<(), String> {
        if !(0.0..=1.0).contains(&self.share) {
            return Err(format!("`share` must be from 0 to 1, not {}", self.share));
        }
        if !(1.0..=10_000.0).contains(&self.factor) {
            return Err(format!("`factor` must be from 1 to 10000, not {}", self.factor));
        }
        if !(400..=599).contains(&self.status) {
            return Err(format!("`status` must be from 400 to 599, not {}", self.status));
        }
        Ok(())
    }

    /// ITL factor in percent.
    pub fn slow_percent(&self) -> u64 {
        if self.kind != FaultKind::Slow {
            return 100;
        }
        // In range by validate().
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let percent = (self.factor * 100.0) as u64;
        percent
    }

    /// True once `tokens` tokens of the response are out.
    pub fn is_due(&self, tokens: u64) -> bool {
        self.after_tokens.unwrap_or(0) <= tokens
    }
}

/// The faults in force.
#[derive(Debug, Default)]
pub struct FaultTable {
    faults: Vec<Fault>,
    arrivals: u64,
}

impl FaultTable {
    /// Starts with `faults`.
    pub const fn new(faults: Vec<Fault>) -> Self {
        Self { faults, arrivals: 0 }
    }

    /// Adds faults behind those in force.
    pub fn add(&mut self, faults: impl IntoIterator<Item = Fault>) {
        self.faults.extend(faults);
    }

    /// Removes all.
    pub fn clear(&mut self) {
        self.faults.clear();
    }

    /// Those in force, used-up ones included.
    pub fn list(&self) -> &[Fault] {
        &self.faults
    }

    /// True if a fault of the engine itself is in force.
    pub fn has(&self, kind: FaultKind) -> bool {
        self.faults.iter().any(|f| f.kind == kind && f.count != Some(0))
    }

    /// The fault that hits a request for `path` which arrives now, if any.
    pub fn take(&mut self, path: &str) -> Option<Fault> {
        self.arrivals += 1;
        let arrival = self.arrivals;
        let fault = self.faults.iter_mut().find(|f| {
            f.kind.hits_requests() && f.count != Some(0) && path.starts_with(&f.path) && in_share(f, arrival)
        })?;
        fault.hits += 1;
        if let Some(left) = &mut fault.count {
            *left -= 1;
        }
        Some(fault.clone())
    }
}

fn in_share(fault: &Fault, arrival: u64) -> bool {
    let draw = tokens::finish(fault.seed.rotate_left(17) ^ arrival.wrapping_mul(0x9e37_79b9_7f4a_7c15)) >> 11;
    // 53 bits are exact in an f64.
    draw as f64 / ((1u64 << 53) as f64) < fault.share
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_the_short_form() {
        let fault = Fault::parse("cut:after_tokens=5,event=3,byte=17,count=2,path=/v1/chat").unwrap();
        let wanted = Fault {
            after_tokens: Some(5),
            event: Some(3),
            byte: 17,
            count: Some(2),
            path: "/v1/chat".into(),
            ..Fault::new(FaultKind::Cut)
        };
        assert_eq!(fault, wanted);
        assert_eq!(Fault::parse("never-ready").unwrap().kind, FaultKind::NeverReady);
    }

    #[test]
    fn says_what_is_wrong() {
        for (text, word) in [
            ("explode", "explode"),
            ("reset:after=3", "after"),
            ("reset:after_tokens=x", "x"),
            ("reset:nonsense", "KEY=VALUE"),
            ("status:status=200", "status"),
            ("busy:share=2", "share"),
            ("slow:factor=0", "factor"),
        ] {
            let error = Fault::parse(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn count_and_order_decide() {
        let mut table = FaultTable::new(vec![
            Fault { count: Some(2), ..Fault::new(FaultKind::Reset) },
            Fault { path: "/v1/chat".into(), ..Fault::new(FaultKind::Busy) },
        ]);
        let kinds: Vec<_> =
            ["/v1/chat", "/v1/x", "/v1/chat", "/v1/x"].map(|p| table.take(p).map(|f| f.kind)).to_vec();
        assert_eq!(kinds, [Some(FaultKind::Reset), Some(FaultKind::Reset), Some(FaultKind::Busy), None]);
        assert_eq!(table.list()[0].hits, 2);
        table.clear();
        assert_eq!(table.take("/v1/chat"), None);
    }

    #[test]
    fn share_hits_its_part_and_repeats() {
        let hits = |seed| {
            let mut table = FaultTable::new(vec![Fault { share: 0.3, seed, ..Fault::new(FaultKind::Busy) }]);
            (0..1000).map(|_| table.take("/").is_some()).collect::<Vec<_>>()
        };
        let count = hits(1).iter().filter(|&&h| h).count();
        assert!((250..350).contains(&count), "{count}");
        assert_eq!(hits(1), hits(1));
        assert_ne!(hits(1), hits(2));
    }

    #[test]
    fn engine_faults_hit_no_request() {
        let mut table = FaultTable::new(vec![Fault::new(FaultKind::Unhealthy)]);
        assert_eq!(table.take("/v1/chat/completions"), None);
        assert!(table.has(FaultKind::Unhealthy));
    }
}
