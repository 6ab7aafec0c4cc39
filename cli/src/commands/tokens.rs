//! Tokens of the control plane's API, and the audit of what was changed.

use reqwest::Method;
use serde_json::{Value, json};

use super::connect;
use crate::{
    api::{ApiError, Ask},
    args::{AuditArgs, Role, TokenCommand},
    output::{say, show, table},
};

pub(super) async fn run(command: &TokenCommand) -> Result<(), ApiError> {
    match command {
        TokenCommand::Create(args) => {
            let role = match args.role {
                Role::Viewer => "viewer",
                Role::Operator => "operator",
                Role::Admin => "admin",
            };
            let mut body = json!({ "name": args.name, "role": role });
            if let (Some(fields), Some(seconds)) = (body.as_object_mut(), args.expires_in_s) {
                fields.insert("expires_in_s".into(), seconds.into());
            }
            let ask = Ask { body: Some(&body), ..Ask::default() };
            let made = connect(&args.remote)?.ask(Method::POST, &["api", "v2", "tokens"], &ask).await?;
            let secret = made.get("token").and_then(Value::as_str).unwrap_or_default().to_owned();
            show(args.remote.output, &made, || format!("{secret}\n"))?;
            say("this token is shown once: keep it now");
        }
        TokenCommand::List(remote) => {
            let tokens = connect(remote)?.list("tokens").await?;
            show(remote.output, &json!({ "tokens": tokens }), || token_table(&tokens))?;
        }
        TokenCommand::Revoke(args) => {
            let path = ["api", "v2", "tokens", args.name.as_str()];
            let gone = connect(&args.remote)?.ask(Method::DELETE, &path, &Ask::default()).await?;
            show(args.remote.output, &gone, || format!("token {} is revoked\n", args.name))?;
        }
    }
    Ok(())
}

/// A field as a cell.
pub(super) fn cell(value: &Value, field: &str) -> String {
    match value.get(field) {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

pub(super) fn token_table(tokens: &[Value]) -> String {
    let rows = tokens.iter().map(|token| {
        let mut row = ["name", "role", "created_unix_s", "created_by", "expires_unix_s"]
            .map(|field| cell(token, field));
        if token.get("expired") == Some(&Value::Bool(true)) {
            row[4].push_str(" (expired)");
        }
        row
    });
    table(["NAME", "ROLE", "CREATED (UNIX S)", "BY", "EXPIRES (UNIX S)"], rows)
}

pub(super) async fn audit(args: &AuditArgs) -> Result<(), ApiError> {
    let mut query = vec![("limit", args.limit.to_string())];
    query.extend(args.model.as_ref().map(|model| ("model", model.clone())));
    query.extend(args.actor.as_ref().map(|actor| ("actor", actor.clone())));
    let ask = Ask { query: &query, ..Ask::default() };
    let json = connect(&args.remote)?.ask(Method::GET, &["api", "v2", "audit"], &ask).await?;
    show(args.remote.output, &json, || audit_table(&records(&json)))?;
    Ok(())
}

/// The list in an answer, whatever it is called.
pub(super) fn records(json: &Value) -> Vec<Value> {
    let mut lists = json.as_object().into_iter().flatten().filter_map(|(_, value)| value.as_array());
    lists.next_back().cloned().unwrap_or_default()
}

pub(super) fn audit_table(records: &[Value]) -> String {
    let rows = records.iter().map(|record| {
        // Of one that a follower handed on the client's own address is known.
        let client = cell(record, "client");
        let from = if client.is_empty() { cell(record, "peer") } else { client };
        let row = ["number", "unix_ms", "actor", "method", "kind", "name"].map(|field| cell(record, field));
        let [number, at, actor, method, kind, name] = row;
        [number, at, actor, method, kind, name, from]
    });
    table(["NUMBER", "AT (UNIX MS)", "WHO", "DID", "KIND", "NAME", "FROM"], rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_expired_and_whose_change_it_was_is_told() {
        let token = json!({"name": "ci", "role": "viewer", "created_unix_s": 1, "created_by": "me", "expires_unix_s": 9,
            "expired": true});
        assert!(token_table(&[token]).contains("ci    viewer  1                 me  9 (expired)"));
        let record = json!({"number": 3, "unix_ms": 7, "actor": "ci", "method": "PUT", "kind": "deployment",
            "name": "m", "peer": "10.0.0.2:1", "client": "10.0.0.9:2"});
        let text = audit_table(&records(&json!({"records": [record], "next_cursor": null})));
        assert!(text.contains("PUT  deployment  m     10.0.0.9:2"), "{text}");
        assert_eq!(records(&json!({"lines": ["a"]})), [json!("a")]);
    }
}
