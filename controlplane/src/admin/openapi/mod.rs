//! `/openapi.json`: the API's document, made from the table of routes ([`super::api`]) and the schemas in `answers.json`,
//! `fleet.json` and `bodies.json`.
//!
//! Paths, methods, parameters, bodies, answers, refusals and roles come from the rows that make the router, so no route can
//! be missing here or be too many. The schemas are written by hand, and closed: a field that an answer has and its schema
//! lacks fails the tools' test, which compares real answers with them.

use std::{collections::BTreeMap, sync::OnceLock};

use axum::{
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};

use super::{
    ask::{MAX_CURSOR_BYTES, MAX_FILTER_CHARS, MAX_PAGE},
    error::ApiError,
    table::{Access, Content, Row},
};

/// Files of schemas by name.
const SCHEMAS: [(&str, &str); 3] = [
    ("answers.json", include_str!("answers.json")),
    ("fleet.json", include_str!("fleet.json")),
    ("bodies.json", include_str!("bodies.json")),
];

/// Refusals by status: what each means.
const REFUSALS: [(u16, &str); 14] = [
    (400, "Something in the request is not accepted; `field` names it."),
    (401, "There is no token, or nobody has it (any more)."),
    (403, "The token's role does not suffice, or a limit of the settings is reached."),
    (404, "There is no such thing."),
    (405, "The path does not take this method."),
    (409, "It cannot be done in the present state, or others change the same thing."),
    (412, "What If-Match or If-None-Match asks does not hold."),
    (413, "The body is too large."),
    (415, "The body is not application/json."),
    (422, "The Idempotency-Key was used for another request."),
    (429, "The token made too many requests; Retry-After says when there is room."),
    (500, "Something stored cannot be read; the log says what."),
    (502, "Another process does not answer."),
    (503, "No control plane leads, or the store does not answer; Retry-After says when to try again."),
];

pub(super) async fn document() -> Response {
    static TEXT: OnceLock<Result<String, String>> = OnceLock::new();
    match TEXT.get_or_init(|| build(&super::api::rows()).map(|document| document.to_string())) {
        Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text.as_str()).into_response(),
        Err(error) => {
            tracing::error!(error, "the API's document cannot be made");
            let message = "the document cannot be made; the log says why";
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message).into_response()
        }
    }
}

/// As the document writes a path: `{*model}` is `{model}`.
pub(super) fn path_of(path: &str) -> String {
    path.replace("{*", "{")
}

/// The document for `rows`; an error if a file of schemas is not JSON.
pub(super) fn build(rows: &[Row]) -> Result<Value, String> {
    let mut schemas = Map::new();
    for (file, text) in SCHEMAS {
        let more: Map<String, Value> = serde_json::from_str(text).map_err(|e| format!("{file}: {e}"))?;
        // "_" is a remark on the file.
        schemas.extend(more.into_iter().filter(|(name, _)| name != "_"));
    }
    let mut paths: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
    for row in rows {
        let operations = paths.entry(path_of(row.path)).or_default();
        operations.insert(row.method.as_str().to_ascii_lowercase(), operation(row));
    }
    let refusals = REFUSALS.map(|(status, meaning)| {
        let refusal = json!({
            "description": meaning,
            "content": { "application/json": { "schema": { "$ref": "#/components/schemas/Error" } } },
        });
        (format!("Refusal{status}"), refusal)
    });
    Ok(json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Penstock control plane",
            "version": env!("CARGO_PKG_VERSION"),
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
            "description": "What shall run, where it runs, who may say so, and who did. docs/admin-api.md explains it.",
        },
        "servers": [{ "url": "/" }],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": Map::from_iter(refusals),
            "securitySchemes": {
                "token": { "type": "http", "scheme": "bearer", "description": "A token with a role." },
            },
        },
    }))
}

fn operation(row: &Row) -> Value {
    let mut parameters = Vec::new();
    for name in path_of(row.path).split(['{', '}']).skip(1).step_by(2) {
        parameters.push(
            json!({ "name": name, "in": "path", "required": true, "schema": path_schema(row.path, name) }),
        );
    }
    parameters.extend(row.query.iter().map(|name| {
        let (description, schema) = query_schema(name, row.path);
        json!({ "name": name, "in": "query", "required": false, "description": description, "schema": schema })
    }));
    let is_read = row.method == axum::http::Method::GET;
    if row.conditional && !is_read {
        parameters.push(header_parameter(
            "If-Match",
            "Only if it is there and at this revision: the ETag of an answer, or *.",
            json!({ "type": "string", "pattern": "^(\\*|\"[0-9]{1,18}\")$" }),
        ));
        if row.method == axum::http::Method::PUT {
            let one = json!({ "type": "string", "const": "*" });
            parameters.push(header_parameter("If-None-Match", "Only if it is not there yet.", one));
        }
    }
    if row.repeatable {
        parameters.push(header_parameter(
            "Idempotency-Key",
            "The same key with the same request gets the same answer, and nothing is done twice.",
            json!({ "type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$" }),
        ));
    }
    let mut operation = json!({ "operationId": row.id, "summary": row.summary });
    if !parameters.is_empty() {
        operation["parameters"] = parameters.into();
    }
    if let Some((schema, required)) = row.body {
        operation["requestBody"] = json!({
            "required": required,
            "content": { "application/json": { "schema": reference(schema) } },
        });
    }
    operation["responses"] = responses(row);
    if let Access::Role(role) = row.access {
        operation["security"] = json!([{ "token": [] }]);
        operation["x-penstock-role"] = role.as_str().into();
    } else {
        operation["security"] = json!([]);
    }
    operation
}

fn responses(row: &Row) -> Value {
    let mut all: BTreeMap<u16, Value> = BTreeMap::new();
    for (status, content) in &row.answers {
        let content = match content {
            Content::Json(schema) => json!({ "application/json": { "schema": reference(schema) } }),
            Content::Media(media) => json!({ *media: {} }),
        };
        let description = match status {
            201 => "It was made.",
            202 => "It was taken in.",
            503 => "It is not so; the answer says why.",
            _ => "As asked.",
        };
        let mut answer = json!({ "description": description, "content": content });
        if row.conditional {
            answer["headers"] = json!({ "ETag": {
                "description": "The revision of the thing, for If-Match.", "schema": { "type": "string" },
            } });
        }
        all.insert(*status, answer);
    }
    let everywhere: &[u16] = match row.access {
        Access::Open => &[400],
        Access::Role(_) => &[400, 401, 403, 429, 500, 503],
    };
    for status in everywhere.iter().chain(&row.errors) {
        let refusal = json!({ "$ref": format!("#/components/responses/Refusal{status}") });
        all.entry(*status).or_insert(refusal);
    }
    let all = all.into_iter().map(|(status, answer)| (status.to_string(), answer));
    Value::Object(all.collect())
}

fn reference(schema: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{schema}") })
}

fn header_parameter(name: &str, description: &str, schema: Value) -> Value {
    json!({ "name": name, "in": "header", "required": false, "description": description, "schema": schema })
}

fn path_schema(path: &str, name: &str) -> Value {
    match (name, path) {
        ("model", _) | ("name", "/api/v2/routes/{*name}") => reference("ModelName"),
        ("name", _) => reference("TokenName"),
        _ if path.starts_with("/api/v2/nodes/") => reference("NodeId"),
        _ => json!({ "type": "string", "minLength": 1 }),
    }
}

fn query_schema(name: &str, path: &str) -> (&'static str, Value) {
    let text = json!({ "type": "string", "maxLength": MAX_FILTER_CHARS });
    let number = json!({ "type": "integer", "minimum": 1, "maximum": u32::MAX });
    match name {
        "limit" => {
            ("Most things on the page.", json!({ "type": "integer", "minimum": 1, "maximum": MAX_PAGE }))
        }
        "cursor" if path.contains("audit") => {
            ("next_cursor of the page before.", json!({ "type": "string", "pattern": "^[1-9][0-9]{0,17}$" }))
        }
        "cursor" => {
            let pattern = "^([A-Za-z0-9._:@-]|%2F|%20)*$";
            (
                "next_cursor of the page before.",
                json!({ "type": "string", "maxLength": MAX_CURSOR_BYTES, "pattern": pattern }),
            )
        }
        "dry_run" => ("Says what would be, and changes nothing.", json!({ "type": "boolean" })),
        "force" => ("Also changes and deletes what is there.", json!({ "type": "boolean" })),
        "move_streams" => {
            ("Also moves the streams that it has to others, one after another.", json!({ "type": "boolean" }))
        }
        "only_missing" => ("Leaves what is there as it is.", json!({ "type": "boolean" })),
        "without_placements" => ("Places every replica anew.", json!({ "type": "boolean" })),
        "from" => ("The earlier revision; without it the one before `to`.", number),
        "to" => ("The later revision; without it the present one.", number),
        "lines" if path.contains("/replicas/") => {
            let most = super::logs::MOST_LINES;
            (
                "How many of its last lines.",
                json!({ "type": "integer", "minimum": 0, "maximum": most, "default": 200 }),
            )
        }
        "follow" => {
            ("And what it writes from then on, until whoever asked goes.", json!({ "type": "boolean" }))
        }
        "previous" => ("Of its life before the present one.", json!({ "type": "boolean" })),
        "lines" => {
            let most = penstock_config::logging::KEPT_LINES;
            ("How many lines.", json!({ "type": "integer", "minimum": 1, "maximum": most, "default": 200 }))
        }
        "model" => ("Only records about this model.", text),
        "actor" => ("Only changes by this token.", text),
        "kind" => ("Only changes of this kind of thing.", text),
        "number" => ("With `hash`: number of a record whose hash was noted.", number),
        "hash" => (
            "With `number`: the hash that was noted.",
            json!({ "type": "string", "pattern": "^[0-9a-f]{64}$" }),
        ),
        _ => ("", text),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn built() -> Value {
        build(&super::super::api::rows()).expect("the schemas are JSON")
    }

    #[test]
    fn the_routers_routes_and_the_documents_are_the_same() {
        let document = built();
        let rows = super::super::api::rows();
        let routed: BTreeSet<(String, String)> =
            rows.iter().map(|row| (path_of(row.path), row.method.as_str().to_ascii_lowercase())).collect();
        assert_eq!(routed.len(), rows.len(), "no route is there twice");
        let paths = document["paths"].as_object().expect("paths");
        let documented: BTreeSet<(String, String)> = paths
            .iter()
            .flat_map(|(path, operations)| {
                operations
                    .as_object()
                    .expect("operations")
                    .keys()
                    .map(|method| (path.clone(), method.clone()))
            })
            .collect();
        assert_eq!(routed, documented);
        let ids: BTreeSet<&str> = rows.iter().map(|row| row.id).collect();
        assert_eq!(ids.len(), rows.len(), "every operation has its own id");
        assert!(rows.iter().all(|row| !row.answers.is_empty()), "every operation answers");
    }

    #[test]
    fn every_reference_leads_somewhere_and_every_schema_is_used() {
        let document = built();
        let mut found = BTreeSet::new();
        collect(&document, &mut found);
        for reference in &found {
            let pointer = reference.strip_prefix('#').expect("local");
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
        for name in document["components"]["schemas"].as_object().expect("schemas").keys() {
            assert!(found.contains(&format!("#/components/schemas/{name}")), "{name} is not used");
        }
    }

    fn collect(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => {
                found.extend(fields.get("$ref").and_then(Value::as_str).map(str::to_owned));
                fields.values().for_each(|value| collect(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| collect(value, found)),
            _ => {}
        }
    }

    #[test]
    fn what_changes_something_takes_more_than_a_viewer_and_only_files_and_probes_are_open() {
        for row in super::super::api::rows() {
            let reads = row.method == axum::http::Method::GET;
            let open = row.access == Access::Open;
            assert!(!open || (reads && !row.path.starts_with("/api/")), "{}", row.path);
            let viewer = row.access == super::super::table::VIEWER;
            assert!(reads || !viewer, "{} {}", row.method, row.path);
        }
    }
}
