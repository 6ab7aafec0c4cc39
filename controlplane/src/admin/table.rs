//! One row for each method of each path: who may use it, who answers it, and what the API's document says of it. The router,
//! the guard and the document are made from the rows, so they cannot disagree.

use std::sync::Arc;

use axum::{http::Method, routing::MethodRouter};
use penstock_config::controlplane::Role;

use crate::core::Core;

/// Who may use a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Everybody, without a token: probes, metrics, the console's files.
    Open,
    /// Whoever has at least this role.
    Role(Role),
}

/// Everybody, without a token.
pub(super) const OPEN: Access = Access::Open;
/// Reads.
pub(super) const VIEWER: Access = Access::Role(Role::Viewer);
/// Changes what shall run.
pub(super) const OPERATOR: Access = Access::Role(Role::Operator);
/// Decides who may do what, and moves whole states.
pub(super) const ADMIN: Access = Access::Role(Role::Admin);

/// What an answer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// JSON, by its schema's name in `openapi/*.json`.
    Json(&'static str),
    /// Something else, by its media type.
    Media(&'static str),
}

/// See the module's text.
pub(super) struct Row {
    pub(super) method: Method,
    /// As the router takes it.
    pub(super) path: &'static str,
    pub(super) access: Access,
    pub(super) handler: MethodRouter<Arc<Core>>,
    /// Names the operation.
    pub(super) id: &'static str,
    /// What it does.
    pub(super) summary: &'static str,
    /// Its query parameters; each is described in `openapi`.
    pub(super) query: Vec<&'static str>,
    /// The schema of its body, and whether there must be one.
    pub(super) body: Option<(&'static str, bool)>,
    pub(super) answers: Vec<(u16, Content)>,
    /// Refusals beyond those that every route has.
    pub(super) errors: Vec<u16>,
    /// Takes conditions (`If-Match`, `If-None-Match`) and answers with an ETag.
    pub(super) conditional: bool,
    /// Takes an Idempotency-Key.
    pub(super) repeatable: bool,
}

impl Row {
    pub(super) fn new(
        access: Access,
        method: Method,
        path: &'static str,
        id: &'static str,
        summary: &'static str,
        handler: MethodRouter<Arc<Core>>,
    ) -> Self {
        let (query, answers, errors) = (Vec::new(), Vec::new(), Vec::new());
        let body = None;
        Self {
            method,
            path,
            access,
            handler,
            id,
            summary,
            query,
            body,
            answers,
            errors,
            conditional: false,
            repeatable: false,
        }
    }

    /// Takes further query parameters.
    pub(super) fn query(mut self, names: &[&'static str]) -> Self {
        self.query.extend(names);
        self
    }

    /// Takes `limit` and `cursor`.
    pub(super) fn paged(self) -> Self {
        self.query(&["limit", "cursor"])
    }

    /// Takes a body.
    pub(super) fn body(mut self, schema: &'static str) -> Self {
        self.body = Some((schema, true));
        self.fails(&[413, 415])
    }

    /// Takes a body that may be left out.
    pub(super) fn may_have_body(mut self, schema: &'static str) -> Self {
        self.body = Some((schema, false));
        self.fails(&[413, 415])
    }

    /// Answers 200 with JSON.
    pub(super) fn gives(self, schema: &'static str) -> Self {
        self.answers(200, Content::Json(schema))
    }

    /// Answers 200 with something else.
    pub(super) fn sends(self, media: &'static str) -> Self {
        self.answers(200, Content::Media(media))
    }

    pub(super) fn answers(mut self, status: u16, content: Content) -> Self {
        self.answers.push((status, content));
        self
    }

    /// May be refused in these ways too.
    pub(super) fn fails(mut self, statuses: &[u16]) -> Self {
        self.errors.extend(statuses);
        self
    }

    /// Is about one thing, which may not be there.
    pub(super) fn named(self) -> Self {
        self.fails(&[404])
    }

    /// Answers with an ETag.
    pub(super) fn conditional(mut self) -> Self {
        self.conditional = true;
        self
    }

    /// Changes a thing through `edit`: dry runs, conditions, repetitions, and being overtaken.
    pub(super) fn edits(self) -> Self {
        self.conditional().repeatable().query(&["dry_run"]).fails(&[409, 412])
    }

    /// Is made once for each Idempotency-Key.
    pub(super) fn repeatable(mut self) -> Self {
        self.repeatable = true;
        self.fails(&[409, 422])
    }
}
