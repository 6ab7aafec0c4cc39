//! What every request can say beside its body: query parameters, conditions, and the form of a list.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Json,
    extract::FromRequestParts,
    http::{HeaderMap, HeaderName, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use super::error::ApiError;
use crate::{
    access::Caller,
    store::{Revision, keys},
};

/// Marks answers to dry runs.
pub(super) const DRY_RUN: HeaderName = HeaderName::from_static("penstock-dry-run");
/// Most things on one page of a list, and as many come where nothing is said.
pub(super) const MAX_PAGE: usize = 1_000;
/// Longest cursor; names are shorter.
pub(super) const MAX_CURSOR_BYTES: usize = 1_024;
/// Longest name to filter by, in characters.
pub(super) const MAX_FILTER_CHARS: usize = 256;
/// Longest query.
const MAX_QUERY_BYTES: usize = 8 << 10;

/// The query parameters of a request, all of which its route takes.
#[derive(Debug, Clone, Default)]
pub(super) struct Params(Arc<BTreeMap<String, String>>);

fn invalid(name: &str, message: String) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, "invalid_parameter", message).of(name)
}

impl Params {
    /// Refuses what is not among `accepted`, and what is there twice.
    pub(super) fn parse(query: Option<&str>, accepted: &[&str]) -> Result<Self, ApiError> {
        let mut params = BTreeMap::new();
        let query = query.unwrap_or_default();
        if query.len() > MAX_QUERY_BYTES {
            let message = format!("the query is longer than {MAX_QUERY_BYTES} bytes");
            return Err(ApiError::new(StatusCode::BAD_REQUEST, "invalid_parameter", message));
        }
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            if !accepted.contains(&&*name) {
                let shown: String = name.chars().take(64).collect();
                let known = match accepted {
                    [] => "this path takes none".to_owned(),
                    _ => format!("accepted are {}", accepted.join(", ")),
                };
                let message = format!("unknown query parameter {shown:?}: {known}");
                let error = ApiError::new(StatusCode::BAD_REQUEST, "unknown_parameter", message);
                return Err(error.of(shown));
            }
            if params.insert(name.clone().into_owned(), value.into_owned()).is_some() {
                return Err(invalid(&name, format!("the query parameter {name} is there twice")));
            }
        }
        Ok(Self(Arc::new(params)))
    }

    /// The text of a parameter.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// A parameter that is a name to look for.
    pub(super) fn name(&self, name: &str) -> Result<Option<String>, ApiError> {
        let Some(text) = self.text(name) else { return Ok(None) };
        if text.chars().count() > MAX_FILTER_CHARS {
            return Err(invalid(
                name,
                format!("{name} is longer than any name: accepted are up to {MAX_FILTER_CHARS}"),
            ));
        }
        Ok(Some(text.to_owned()))
    }

    /// A parameter that is a whole number.
    pub(super) fn number(&self, name: &str, low: u64, high: u64) -> Result<Option<u64>, ApiError> {
        let Some(text) = self.text(name) else { return Ok(None) };
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let number = text.parse().ok().filter(|number| digits && (low..=high).contains(number));
        number.map(Some).ok_or_else(|| {
            let shown: String = text.chars().take(64).collect();
            invalid(name, format!("{name} is {shown:?}: accepted is a whole number from {low} to {high}"))
        })
    }

    /// A parameter that is true or false; false where it is not given.
    pub(super) fn flag(&self, name: &str) -> Result<bool, ApiError> {
        match self.text(name) {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(text) => {
                let shown: String = text.chars().take(64).collect();
                Err(invalid(name, format!("{name} is {shown:?}: accepted are true and false")))
            }
        }
    }

    /// How many things a page shall have.
    pub(super) fn limit(&self) -> Result<usize, ApiError> {
        let limit = self.number("limit", 1, MAX_PAGE as u64)?;
        Ok(limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(MAX_PAGE))
    }

    /// The key of the last thing of the page before.
    fn cursor(&self) -> Result<Option<String>, ApiError> {
        let Some(text) = self.text("cursor") else { return Ok(None) };
        let key =
            keys::decode(text).filter(|key| text.len() <= MAX_CURSOR_BYTES && keys::encode(key) == text);
        key.map(Some).ok_or_else(|| {
            invalid(
                "cursor",
                "cursor is none that this list gave: take next_cursor of the page before".into(),
            )
        })
    }

    /// A page of `items`, which are in the order of their keys: `{"<things>": [...], "next_cursor": ...}`.
    pub(super) fn page<T>(
        &self,
        things: &str,
        items: impl IntoIterator<Item = (String, T)>,
        show: impl Fn(T) -> Value,
    ) -> Result<Json<Value>, ApiError> {
        let (limit, cursor) = (self.limit()?, self.cursor()?);
        let (mut shown, mut last, mut next) = (Vec::new(), String::new(), None);
        let rest =
            items.into_iter().skip_while(|(key, _)| cursor.as_ref().is_some_and(|cursor| key <= cursor));
        for (key, item) in rest {
            if shown.len() == limit {
                next = Some(keys::encode(&last));
                break;
            }
            shown.push(show(item));
            last = key;
        }
        Ok(Json(json!({ things: shown, "next_cursor": next })))
    }
}

impl<S: Sync> FromRequestParts<S> for Params {
    type Rejection = StatusCode;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, StatusCode> {
        // The guard puts it there on every route.
        parts.extensions.get::<Self>().cloned().ok_or(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

/// Under which conditions something is changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Conditions {
    /// `If-Match`: only if it is there, and at one of these revisions, if there are any.
    present: Option<Vec<Revision>>,
    /// `If-None-Match: *`: only if it is not there.
    absent: bool,
}

impl Conditions {
    pub(super) fn of(headers: &HeaderMap) -> Result<Self, ApiError> {
        let all = |name: HeaderName| {
            let values = headers.get_all(name).iter().map(|value| value.to_str().unwrap_or("?"));
            values.flat_map(|value| value.split(',')).map(|value| value.trim().to_owned()).collect::<Vec<_>>()
        };
        let malformed = |name: &str, wanted: &str| {
            let message = format!("{name} is malformed: accepted is {wanted}");
            Err(ApiError::new(StatusCode::BAD_REQUEST, "invalid_header", message).of(name))
        };
        let mut conditions = Self::default();
        let wanted = all(header::IF_MATCH);
        if !wanted.is_empty() {
            let mut revisions = Vec::new();
            for tag in wanted.iter().filter(|tag| *tag != "*") {
                let digits = tag.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
                match digits.filter(|d| d.bytes().all(|b| b.is_ascii_digit())).and_then(|d| d.parse().ok()) {
                    Some(revision) => revisions.push(revision),
                    None => return malformed("If-Match", "* or the ETag of an answer, such as \"42\""),
                }
            }
            conditions.present = Some(revisions);
        }
        match all(header::IF_NONE_MATCH).as_slice() {
            [] => {}
            [only] if only == "*" => conditions.absent = true,
            _ => return malformed("If-None-Match", "*, for a thing that must not be there yet"),
        }
        Ok(conditions)
    }

    /// Whether they hold for something at `revision`; 0: it is not there.
    pub(super) fn check(&self, revision: Revision) -> Result<(), ApiError> {
        let failed = |message: String| {
            Err(ApiError::new(StatusCode::PRECONDITION_FAILED, "precondition_failed", message))
        };
        if self.absent && revision != 0 {
            return failed(format!(
                "If-None-Match: * asks that it is not there, and it is, at revision {revision}"
            ));
        }
        match &self.present {
            Some(_) if revision == 0 => failed("If-Match asks that it is there, and it is not".into()),
            Some(any) if !any.is_empty() && !any.contains(&revision) => failed(format!(
                "it was changed: it is at revision {revision} now, which is none that If-Match names; nothing was changed"
            )),
            _ => Ok(()),
        }
    }
}

/// A request that changes something: by whom, whether for show, and under which conditions.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    pub(super) caller: Caller,
    pub(super) dry_run: bool,
    pub(super) conditions: Conditions,
}

impl<S: Send + Sync> FromRequestParts<S> for Ask {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Response> {
        let caller = Caller::from_request_parts(parts, state).await.map_err(IntoResponse::into_response)?;
        let params = Params::from_request_parts(parts, state).await.map_err(IntoResponse::into_response)?;
        let read =
            || -> Result<_, ApiError> { Ok((params.flag("dry_run")?, Conditions::of(&parts.headers)?)) };
        let (dry_run, conditions) = read().map_err(IntoResponse::into_response)?;
        Ok(Self { caller, dry_run, conditions })
    }
}

/// An answer about one thing.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) body: Value,
    /// The revision that its ETag names; 0: none.
    pub(super) revision: Revision,
    pub(super) dry_run: bool,
}

impl Reply {
    /// 200.
    pub(super) fn ok(body: Value, revision: Revision) -> Self {
        Self { status: StatusCode::OK, body, revision, dry_run: false }
    }
}

impl IntoResponse for Reply {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body)).into_response();
        let headers = response.headers_mut();
        if self.revision != 0
            && let Ok(tag) = format!("\"{}\"", self.revision).parse()
        {
            headers.insert(header::ETAG, tag);
        }
        if self.dry_run {
            headers.insert(DRY_RUN, header::HeaderValue::from_static("true"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(error: ApiError) -> (String, String) {
        let error = format!("{error:?}");
        (error.clone(), error)
    }

    #[test]
    fn unknown_and_malformed_parameters_are_refused_by_name() {
        let params = Params::parse(Some("limit=5&cursor=a%252Fb"), &["limit", "cursor"]).expect("valid");
        assert_eq!((params.limit().expect("5"), params.cursor().expect("a/b")), (5, Some("a/b".into())));
        for (query, part) in [
            ("limits=5", "accepted are limit, cursor"),
            ("limit=5&limit=6", "twice"),
            ("=", "unknown query parameter"),
        ] {
            let error = Params::parse(Some(query), &["limit", "cursor"]).expect_err(query);
            assert!(told(error).0.contains(part), "{query}");
        }
        assert!(told(Params::parse(Some("x"), &[]).expect_err("none")).0.contains("takes none"));
        for (query, part) in [
            ("limit=0", "from 1 to 1000"),
            ("limit=+5", "from 1 to 1000"),
            ("limit=", "from 1 to 1000"),
            ("cursor=%2F", "none that this list gave"),
        ] {
            let params = Params::parse(Some(query), &["limit", "cursor"]).expect(query);
            let error = params.page("x", Vec::<(String, ())>::new(), |()| Value::Null).expect_err(query);
            assert!(told(error).0.contains(part), "{query}");
        }
        assert!(Params::parse(Some("dry_run=1"), &["dry_run"]).expect("known").flag("dry_run").is_err());
    }

    #[test]
    fn pages_follow_one_another_to_the_end() {
        let items = || (0..5).map(|n| (format!("k/{n}"), n));
        let mut query = "limit=2".to_owned();
        let mut seen = Vec::new();
        loop {
            let page = Params::parse(Some(&query), &["limit", "cursor"]).expect("valid");
            let Json(page) = page.page("things", items(), |n| json!(n)).expect("valid");
            seen.extend(page["things"].as_array().expect("an array").clone());
            let Some(cursor) = page["next_cursor"].as_str() else { break };
            query = format!("limit=2&cursor={}", cursor.replace('%', "%25"));
        }
        assert_eq!(seen, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn conditions_hold_or_say_why() {
        let of = |name: HeaderName, value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().expect("a header"));
            Conditions::of(&headers)
        };
        let if_match = |value: &str| of(header::IF_MATCH, value);
        assert!(if_match("\"3\", \"5\"").expect("valid").check(5).is_ok());
        assert!(if_match("\"3\"").expect("valid").check(5).is_err());
        assert!(if_match("*").expect("valid").check(5).is_ok());
        assert!(if_match("*").expect("valid").check(0).is_err());
        assert!(if_match("3").is_err() && if_match("W/\"3\"").is_err() && if_match("\"\"").is_err());
        let absent = of(header::IF_NONE_MATCH, "*").expect("valid");
        assert!(absent.check(0).is_ok() && absent.check(1).is_err());
        assert!(of(header::IF_NONE_MATCH, "\"3\"").is_err());
        assert!(Conditions::default().check(0).is_ok() && Conditions::default().check(9).is_ok());
    }
}
