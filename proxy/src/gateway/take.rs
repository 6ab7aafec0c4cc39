//! From a head and a body to a request for an engine.

use std::ops::Range;

use bytes::Bytes;
use http::{HeaderMap, header};
use penstock_config::proxy::Unary;
use pingora_core::protocols::http::ServerSession;

use super::{Done, Gateway};
use crate::{
    admission::auth::Caller,
    downstream::{body, peer::Peer},
    error::GatewayError,
    openai::{
        Api, Media, multipart,
        request::{self, Edit, ScanError},
    },
    record::Record,
    resume::{body::Members, chunks::Wishes, unary},
    routing::{policy::Asked, prefix::Chain},
    upstream::{
        headers::{self, Sender},
        request::EngineRequest,
    },
};

/// Header by which a client asks that its stream not go on at another engine: `0`, `off` or `false`.
pub const RESUME: &str = "x-penstock-resume";

/// The URL that is asked of the engine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Url<'a> {
    /// The path.
    pub(super) path: &'a str,
    /// The query as the client wrote it, with its `?`; may be empty.
    pub(super) query: &'a str,
}

/// What a body says that the gateway acts on, whatever its media type.
struct Facts {
    model: String,
    /// Where to write another name of the model, and whether it is written in JSON.
    model_range: Range<usize>,
    json: bool,
    stream: bool,
    /// JSON text of `user`.
    user: Option<Range<usize>>,
    removed: Vec<Range<usize>>,
    /// Where `return_token_ids` stands, and whether it is `true`.
    return_ids: Option<(Range<usize>, bool)>,
    /// Whether the prompt is part of the answer; engines that return ids leave it out.
    echo: bool,
    insert_at: usize,
}

impl Gateway {
    /// An inference request, from its head to the end of its answer.
    pub(super) async fn inference(
        &self,
        session: &mut ServerSession,
        record: &mut Record<'_>,
        api: Api,
        url: Url<'_>,
        from: Source<'_>,
    ) -> Result<Done, GatewayError> {
        let boundary = check_media(&session.req_header().headers, api.media())?;
        let held = body::read(session, &self.config.limits, &self.bodies).await?;
        record.body(held.bytes.len());
        let sender = sender(session, from);
        let mut chain = self.pick_rules.chain();
        let remove: &[String] = if sender.trusted { &[] } else { &self.config.trust.remove_fields };
        let facts = self.facts(&held.bytes, boundary.as_deref(), &mut chain, remove);
        let facts = facts.map_err(GatewayError::Body)?;
        self.metrics.untrusted_fields.inc_by(facts.removed.len() as u64);
        let request = EngineRequest {
            api,
            stream: facts.stream,
            request_id: record.request_id().to_owned(),
            target: [url.path, url.query].concat(),
            headers: self.headers_for_engine(session, &sender, record.request_id()),
            body: Bytes::new(),
            resume: self.wishes(&session.req_header().headers, api, &facts, from.caller),
            whole: None,
        };
        let tells_ids = matches!(api, Api::ChatCompletions | Api::Completions);
        let asks_ids = request.resume.is_some()
            && facts.stream
            && tells_ids
            && self.config.resume.token_ids
            && !facts.echo;
        let user = facts.user.clone().and_then(|range| held.bytes.get(range));
        let session_key = self.session_key(&session.req_header().headers, user);
        let prefix = chain.map(Chain::hashes).unwrap_or_default();
        let asked = Asked { session: session_key, prefix: &prefix, adapter: None };
        let assembles = request.resume.is_some() && !facts.stream;
        let aim = |request: &mut EngineRequest, served_model: &str| {
            request.body = body_for_engine(&held.bytes, &facts, served_model, asks_ids);
            if assembles {
                ask_for_a_stream(request);
            }
        };
        self.ask_targets(session, record, &facts.model, &asked, request, aim).await
    }

    fn facts(
        &self,
        body: &[u8],
        boundary: Option<&str>,
        chain: &mut Option<Chain>,
        remove: &[String],
    ) -> Result<Facts, ScanError> {
        match boundary {
            None => {
                let facts = request::scan_with(body, &self.scan_limits, chain.as_mut(), remove)?;
                Ok(Facts {
                    model: facts.model,
                    model_range: facts.model_range,
                    json: true,
                    stream: facts.stream,
                    user: facts.user_range,
                    removed: facts.removed,
                    return_ids: facts.return_token_ids,
                    echo: facts.echo,
                    insert_at: facts.insert_at,
                })
            }
            Some(boundary) => {
                let facts = multipart::scan(body, boundary, self.scan_limits.max_model_bytes, remove)?;
                Ok(Facts {
                    model: facts.model,
                    model_range: facts.model_range,
                    json: false,
                    stream: facts.stream,
                    user: None,
                    removed: facts.removed,
                    return_ids: None,
                    echo: false,
                    insert_at: 0,
                })
            }
        }
    }

    /// What a stream is to be tracked for, if it may go on at another engine.
    fn wishes(&self, headers: &HeaderMap, api: Api, facts: &Facts, caller: Caller<'_>) -> Option<Wishes> {
        let off = |value: &http::HeaderValue| matches!(value.as_bytes(), b"0" | b"off" | b"false");
        let wanted = self.config.resume.enabled && caller.resume && !headers.get(RESUME).is_some_and(off);
        let ids = facts.return_ids.as_ref().is_some_and(|(_, asked)| *asked);
        let streams = facts.stream || facts.json && self.config.resume.unary == Unary::Stream;
        (wanted && streams).then_some(Wishes {
            chat: api == Api::ChatCompletions,
            ids,
            strip: self.config.resume.strip_token_ids,
        })
    }

    /// What names the caller's session, for session affinity.
    pub(super) fn session_key(&self, headers: &HeaderMap, user: Option<&[u8]>) -> Option<u64> {
        let routing = &self.config.routing;
        self.pick_rules.key.session(headers, &routing.session_header, &routing.session_cookie, user)
    }

    pub(super) fn headers_for_engine(
        &self,
        session: &ServerSession,
        sender: &Sender<'_>,
        request_id: &str,
    ) -> HeaderMap {
        let client = &session.req_header().headers;
        headers::forwarded(client, sender, &self.config.trust.remove_headers, request_id, fastrand::u64(..))
    }
}

/// Whose request it is: the connection's, and the key's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    /// The other end of the connection.
    pub(super) peer: &'a Peer,
    /// Whose key it is.
    pub(super) caller: Caller<'a>,
}

/// What an engine hears of whoever sent the request.
pub(super) fn sender<'a>(session: &'a ServerSession, from: Source<'_>) -> Sender<'a> {
    let head = session.req_header();
    let host = head.headers.get(header::HOST).map(http::HeaderValue::as_bytes);
    let authority = || head.uri.authority().map(|authority| authority.as_str().as_bytes());
    Sender {
        address: from.peer.address.ip(),
        tls: from.peer.tls,
        host: host.or_else(authority).unwrap_or_default(),
        behind_proxy: from.peer.trusted,
        trusted: from.peer.trusted || from.caller.trusted,
    }
}

/// Checks that the body is announced as what the API takes; for a form, its boundary.
fn check_media(headers: &HeaderMap, media: Media) -> Result<Option<String>, GatewayError> {
    let encoding = headers.get(header::CONTENT_ENCODING).map(http::HeaderValue::as_bytes).unwrap_or_default();
    if !encoding.is_empty() && !encoding.eq_ignore_ascii_case(b"identity") {
        let got = String::from_utf8_lossy(encoding).into_owned();
        return Err(GatewayError::UnsupportedEncoding { got });
    }
    let value = headers.get(header::CONTENT_TYPE).map(http::HeaderValue::as_bytes).unwrap_or_default();
    let essence = value.split(|b| *b == b';').next().unwrap_or_default().trim_ascii();
    let fits = match media {
        Media::Json => {
            let suffix = essence.len().checked_sub(5).and_then(|at| essence.get(at..));
            essence.eq_ignore_ascii_case(b"application/json")
                || suffix.is_some_and(|suffix| suffix.eq_ignore_ascii_case(b"+json"))
        }
        Media::Form => essence.eq_ignore_ascii_case(b"multipart/form-data"),
    };
    if !fits {
        let got = String::from_utf8_lossy(essence).into_owned();
        return Err(GatewayError::UnsupportedMediaType { got, accepted: media.content_type() });
    }
    match media {
        Media::Json => Ok(None),
        Media::Form => {
            let error = GatewayError::Body(ScanError::NotAForm(multipart::FormError::Boundary));
            multipart::boundary(value).map(Some).ok_or(error)
        }
    }
}

/// Has the engine stream an answer that the client wants whole, where the two are equivalent.
fn ask_for_a_stream(request: &mut EngineRequest) {
    let stream = Members::of(&request.body).ok().and_then(|members| unary::as_stream(request.api, &members));
    request.stream = stream.is_some();
    request.whole = stream.map(|stream| std::mem::replace(&mut request.body, stream.into()));
}

/// The client's bytes. Only the value of `model` is replaced, where the engines know another name, what an untrusted caller
/// may not say is cut out, and token ids are asked for.
fn body_for_engine(body: &Bytes, facts: &Facts, served_model: &str, asks_ids: bool) -> Bytes {
    let mut edits: Vec<Edit<'_>> = facts.removed.iter().map(|range| (range.clone(), &[][..])).collect();
    let name = match facts.json {
        true => request::json_string(served_model),
        false => served_model.as_bytes().to_vec(),
    };
    if facts.model != served_model {
        edits.push((facts.model_range.clone(), &name));
    }
    match &facts.return_ids {
        _ if !asks_ids => {}
        None => edits.push((facts.insert_at..facts.insert_at, br#""return_token_ids":true,"#)),
        Some((_, true)) => {}
        Some((range, false)) => edits.push((range.clone(), b"true")),
    }
    request::rewrite(body, edits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(header::HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), value.parse().expect("a value"))).collect()
    }

    #[test]
    fn media_types_are_checked_and_named() {
        let check = |value: &str, media| check_media(&headers(&[(header::CONTENT_TYPE, value)]), media);
        for fine in ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"] {
            assert_eq!(check(fine, Media::Json), Ok(None), "{fine}");
        }
        assert_eq!(check("multipart/form-data; boundary=x", Media::Form), Ok(Some("x".into())));
        for (got, media, accepted) in [
            ("text/plain", Media::Json, "application/json"),
            ("json", Media::Json, "application/json"),
            ("application/json", Media::Form, "multipart/form-data"),
            ("multipart/form-data; boundary=x", Media::Json, "application/json"),
        ] {
            let error = check(got, media).expect_err(got);
            assert_eq!((error.status(), error.message().contains(accepted)), (415, true), "{error:?}");
        }
        assert_eq!(check("multipart/form-data", Media::Form).map_err(|e| e.status()), Err(400));
        assert!(
            check_media(&HeaderMap::new(), Media::Json)
                .is_err_and(|e| e.message().contains("no Content-Type"))
        );
    }

    #[test]
    fn compressed_bodies_are_refused_by_name() {
        let json = (header::CONTENT_TYPE, "application/json");
        for encoding in ["gzip", "zstd", "br", "identity, gzip"] {
            let error =
                check_media(&headers(&[json.clone(), (header::CONTENT_ENCODING, encoding)]), Media::Json);
            let error = error.expect_err(encoding);
            assert_eq!(error.status(), 415);
            assert!(
                error.message().contains(encoding) && error.message().contains("uncompressed"),
                "{error:?}"
            );
        }
        assert!(check_media(&headers(&[json, (header::CONTENT_ENCODING, "Identity")]), Media::Json).is_ok());
    }
}
