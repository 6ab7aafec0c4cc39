//! Commands about what a deployment was.

use std::time::Duration;

use serde_json::Value;

use super::{connect, views, wait};
use crate::{
    api::{ApiError, Difference},
    args::{DiffArgs, ModelArgs, RollbackArgs},
    output::{show, table},
};

pub(crate) async fn history(args: &ModelArgs) -> Result<(), ApiError> {
    let reply = connect(&args.remote)?.revisions(&args.model).await?;
    show(args.remote.output, &reply.json, || {
        let rows = reply.value.revisions.iter().map(|revision| {
            let fields: Vec<&str> = revision.changes.iter().map(|c| c.field.as_str()).collect();
            let mut what = fields.join(", ");
            if let Some(to) = revision.rolled_back_to {
                what = format!("back to {to}: {what}");
            }
            [revision.number.to_string(), revision.unix_s.to_string(), what]
        });
        table(["REVISION", "AT (UNIX S)", "CHANGED"], rows)
    })?;
    Ok(())
}

pub(crate) async fn diff(args: &DiffArgs) -> Result<(), ApiError> {
    let model = args.model.as_deref().unwrap_or_default();
    let reply = connect(&args.remote)?.diff(model, args.from, args.to).await?;
    let differ = reply.value.changes.len();
    show(args.remote.output, &reply.json, || {
        let mut out = format!("revision {} to {}\n", reply.value.from, reply.value.to);
        reply.value.changes.iter().for_each(|change| out.push_str(&lines(change)));
        out
    })?;
    match args.exit_code && differ > 0 {
        true => Err(ApiError::Differs(format!("{differ} fields differ"))),
        false => Ok(()),
    }
}

pub(crate) async fn rollback(args: &RollbackArgs) -> Result<(), ApiError> {
    let server = connect(&args.remote)?;
    let mut reply = server.rollback(&args.model, args.to).await?;
    if args.wait.wait {
        reply = wait::as_wanted(&server, &args.model, Duration::from_secs(args.wait.timeout_s)).await?;
    }
    show(args.remote.output, &reply.json, || views::deployment_table(&[reply.value]))?;
    Ok(())
}

/// "- field: before" and "+ field: after".
fn lines(change: &Difference) -> String {
    let line = |sign: char, value: &Value| match value {
        Value::Null => String::new(),
        value => format!("{sign} {}: {value}\n", change.field),
    };
    line('-', &change.before) + &line('+', &change.after)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_that_was_not_there_has_one_line() {
        let change = Difference { field: "env.A".into(), before: Value::Null, after: "1".into() };
        assert_eq!(lines(&change), "+ env.A: \"1\"\n");
        let change = Difference { field: "rollout.max_surge".into(), before: 1.into(), after: 2.into() };
        assert_eq!(lines(&change), "- rollout.max_surge: 1\n+ rollout.max_surge: 2\n");
    }
}
