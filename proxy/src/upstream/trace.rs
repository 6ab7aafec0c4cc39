//! W3C Trace Context: a caller's trace goes on through us, with a span of our own.
//!
//! Read strictly: what is not a valid `traceparent` is dropped with its `tracestate`, as the standard asks, and not replaced.
//! A trace that we began would come unsampled to the engine and switch off its own sampling.

use http::{HeaderMap, HeaderName, HeaderValue};

/// `traceparent`
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// `tracestate`
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Most members of a `tracestate`.
const MAX_MEMBERS: usize = 32;
/// Longest `tracestate` that goes on, in bytes; the standard asks for 512.
const MAX_STATE_BYTES: usize = 1024;

/// Whose trace it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent<'a> {
    /// 32 lower-case hex digits, not all zero.
    pub trace_id: &'a str,
    /// 16 lower-case hex digits, not all zero: the caller's span.
    pub parent_id: &'a str,
    /// Bit 0: sampled. Bit 1: the trace id is random.
    pub flags: u8,
}

/// The flags that this version of the standard knows.
const KNOWN_FLAGS: u8 = 0b11;

impl<'a> TraceParent<'a> {
    /// Reads a header's value; a later version's as if it were of version 00, which it must begin like.
    #[must_use]
    pub fn parse(value: &'a [u8]) -> Option<Self> {
        let text = std::str::from_utf8(value).ok()?.trim_matches([' ', '\t']);
        let mut parts = text.splitn(5, '-');
        let mut hex = |digits: usize| {
            let part = parts.next()?;
            let fine = part.len() == digits && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            fine.then_some(part)
        };
        let (version, trace_id, parent_id, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
        let more = parts.next();
        if version == "ff" || version == "00" && more.is_some() {
            return None;
        }
        let zero = |id: &str| id.bytes().all(|b| b == b'0');
        if zero(trace_id) || zero(parent_id) {
            return None;
        }
        let flags = u8::from_str_radix(flags, 16).ok()? & KNOWN_FLAGS;
        Some(Self { trace_id, parent_id, flags })
    }

    /// The header for the next in line, with our span as its parent.
    #[must_use]
    pub fn continued(&self, span_id: u64) -> Option<HeaderValue> {
        let span_id = span_id.max(1); // zero is no span
        let text = format!("00-{}-{span_id:016x}-{:02x}", self.trace_id, self.flags);
        HeaderValue::try_from(text).ok()
    }
}

/// The trace headers to send on, for those that came: ours, and the caller's state if it is well formed.
#[must_use]
pub fn continued(headers: &HeaderMap, span_id: u64) -> Option<(HeaderValue, Option<HeaderValue>)> {
    let mut parents = headers.get_all(&TRACEPARENT).iter();
    let parent = TraceParent::parse(parents.next()?.as_bytes())?;
    if parents.next().is_some() {
        return None; // two parents are none
    }
    Some((parent.continued(span_id)?, state(headers)))
}

/// The `tracestate` lines joined, if they are a list of `key=value`.
fn state(headers: &HeaderMap) -> Option<HeaderValue> {
    let mut members = Vec::new();
    for line in headers.get_all(&TRACESTATE) {
        members.extend(line.to_str().ok()?.split(',').map(str::trim).filter(|member| !member.is_empty()));
    }
    let well_formed =
        |member: &&str| member.split_once('=').is_some_and(|(k, v)| !k.is_empty() && !v.is_empty());
    if members.is_empty() || members.len() > MAX_MEMBERS || !members.iter().all(well_formed) {
        return None;
    }
    let joined = members.join(",");
    (joined.len() <= MAX_STATE_BYTES).then(|| HeaderValue::try_from(joined).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in lines {
            map.append(HeaderName::from_static(name), value.parse().expect("a value"));
        }
        map
    }

    #[test]
    fn a_valid_trace_goes_on_with_our_span_and_its_flags() {
        for (version, flags, kept) in
            [("00", "01", "01"), ("00", "00", "00"), ("00", "ff", "03"), ("cc", "03", "03")]
        {
            let value = format!("{version}-{TRACE}-00f067aa0ba902b7-{flags}");
            let sent = continued(&headers(&[("traceparent", &value)]), 0xab).expect(&value).0;
            assert_eq!(sent, format!("00-{TRACE}-00000000000000ab-{kept}"));
        }
        assert!(TraceParent::parse(format!("01-{TRACE}-00f067aa0ba902b7-01-more").as_bytes()).is_some());
        assert!(
            continued(&headers(&[("traceparent", &format!("00-{TRACE}-00f067aa0ba902b7-01"))]), 0)
                .is_some_and(|(sent, _)| sent.to_str().is_ok_and(|sent| sent.contains("-0000000000000001-")))
        );
    }

    #[test]
    fn what_is_no_trace_is_dropped() {
        let upper = TRACE.to_uppercase();
        for bad in [
            String::new(),
            "garbage".into(),
            format!("00-{TRACE}-00f067aa0ba902b7"),
            format!("00-{TRACE}-00f067aa0ba902b7-1"),
            format!("00-{TRACE}-00f067aa0ba902b7-01-more"),
            format!("ff-{TRACE}-00f067aa0ba902b7-01"),
            format!("00-{upper}-00f067aa0ba902b7-01"),
            format!("00-{TRACE}-0000000000000000-01"),
            format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)),
            format!("00-{}-00f067aa0ba902b7-01", "g".repeat(32)),
        ] {
            assert_eq!(TraceParent::parse(bad.as_bytes()), None, "{bad}");
        }
        let good = format!("00-{TRACE}-00f067aa0ba902b7-01");
        assert_eq!(continued(&headers(&[("traceparent", &good), ("traceparent", &good)]), 1), None);
        assert_eq!(continued(&headers(&[("tracestate", "a=b")]), 1), None, "a state without a trace");
    }

    #[test]
    fn state_goes_on_if_it_is_a_list() {
        let good = format!("00-{TRACE}-00f067aa0ba902b7-01");
        let state = |lines: &[&str]| {
            let mut all = vec![("traceparent", &*good)];
            all.extend(lines.iter().map(|line| ("tracestate", *line)));
            continued(&headers(&all), 1).expect("a trace").1.map(|v| v.to_str().unwrap_or("").to_owned())
        };
        assert_eq!(state(&["a=1, b@v=2", ",c=3"]).as_deref(), Some("a=1,b@v=2,c=3"));
        for bad in [vec![], vec![""], vec!["a"], vec!["=1"], vec!["a=1", "b"]] {
            assert_eq!(state(&bad), None, "{bad:?}");
        }
        assert_eq!(state(&[&"a=1,".repeat(33)]), None);
        assert_eq!(state(&[&format!("a={}", "x".repeat(1100))]), None);
    }
}
