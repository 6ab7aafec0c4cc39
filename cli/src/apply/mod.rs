//! `penstock apply` and `penstock diff -f`: makes a site what manifests say, or shows what that would change.
//!
//! Everything is checked here first ([`crate::manifest`]), then decided from one look at the site ([`plan`]), then done
//! step by step, each against the revision that was looked at: a change that somebody else makes meanwhile is seen and
//! decided anew, never written over. Doing it twice changes nothing the second time.
//!
//! With `--dry-run` the control plane checks each change as well, and writes nothing. One that is too old for that is not
//! asked: it would take the request for a real one.

pub(crate) mod plan;

use std::{path::PathBuf, time::Duration};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use self::plan::{Action, Live, Prune, Step};
use crate::{
    api::{ApiError, Ask, ControlPlane},
    args::{ApplyArgs, Format},
    commands::{connect, wait},
    manifest::{self, Kind, Wanted},
    output::{self, show, table},
};

/// Looks at the site before a step that others outrun again and again is given up.
const ATTEMPTS: usize = 4;

/// Reads and checks the manifests; every problem is printed.
fn wanted(paths: &[PathBuf]) -> Result<Vec<Wanted>, ApiError> {
    manifest::load(paths)
        .and_then(|documents| manifest::check(&documents))
        .map_err(|problems| refused(&problems))
}

fn refused(problems: &[manifest::Problem]) -> ApiError {
    let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
    ApiError::Usage(format!("{}\nnothing was sent", lines.join("\n")))
}

async fn look(server: &ControlPlane) -> Result<Live, ApiError> {
    let mut live = Live::new();
    for kind in Kind::ALL {
        for shown in server.list(kind.path()).await? {
            let field = match kind {
                Kind::NodePolicy => "node_id",
                Kind::Deployment => "model",
                Kind::Route => "name",
            };
            if let Some(name) = shown.get(field).and_then(Value::as_str) {
                live.insert((kind, name.to_owned()), shown);
            }
        }
    }
    Ok(live)
}

/// `penstock diff -f`
pub(crate) async fn diff(
    server: &ControlPlane,
    files: &[PathBuf],
    prunes: &[Prune],
    exit_code: bool,
    format: Format,
) -> Result<(), ApiError> {
    let wanted = wanted(files)?;
    let steps = plan::plan(&wanted, &look(server).await?, prunes).map_err(|problems| refused(&problems))?;
    let results: Vec<Outcome> = steps.iter().map(|step| Outcome::of(step, Ok(()))).collect();
    show(format, &shown(&results, true), || story(&results))?;
    let differ = steps.iter().filter(|step| step.action != Action::Unchanged).count();
    match exit_code && differ > 0 {
        true => Err(ApiError::Differs(format!("{differ} of {} differ", steps.len()))),
        false => Ok(()),
    }
}

/// `penstock apply`
pub(crate) async fn apply(args: &ApplyArgs) -> Result<(), ApiError> {
    let server = connect(&args.remote)?;
    let wanted = wanted(&args.files)?;
    let steps =
        plan::plan(&wanted, &look(&server).await?, &args.prune).map_err(|problems| refused(&problems))?;
    let tries = args.dry_run && can_try(&server).await?;
    if args.dry_run && !tries {
        output::say("this control plane cannot try changes: they are checked here only");
    }
    let mut results = Vec::new();
    for step in steps {
        let outcome = match (args.dry_run, step.action) {
            (_, Action::Unchanged) => Ok(step),
            // What it refers to is not there yet, and would be refused for that.
            (true, _) if !tries || step.needs_others => Ok(step),
            (true, _) => {
                once(&server, &step, true).await.map(|()| step.clone()).map_err(|error| (step, error))
            }
            (false, _) => settle(&server, step, &wanted, &args.prune).await,
        };
        match outcome {
            Ok(step) => results.push(Outcome::of(&step, Ok(()))),
            Err((_, error @ ApiError::Unreachable { .. })) => {
                let done = Format::Table == args.remote.output && !results.is_empty();
                if done {
                    output::print(&summary(&results))?;
                }
                return Err(error);
            }
            Err((step, error)) => results.push(Outcome::of(&step, Err(error.to_string()))),
        }
    }
    let failed = results.iter().filter(|result| result.error.is_some()).count();
    if args.wait.wait && !args.dry_run && failed == 0 {
        for wanted in wanted.iter().filter(|wanted| wanted.manifest.kind == Kind::Deployment) {
            wait::as_wanted(&server, &wanted.manifest.name, Duration::from_secs(args.wait.timeout_s)).await?;
        }
    }
    show(args.remote.output, &shown(&results, args.dry_run), || match args.dry_run {
        true => story(&results),
        false => summary(&results),
    })?;
    match failed {
        0 => Ok(()),
        n => Err(ApiError::Found(format!("{n} of {} could not be applied", results.len()))),
    }
}

/// Whether `dry_run` is known there.
async fn can_try(server: &ControlPlane) -> Result<bool, ApiError> {
    match server.get(&["openapi.json"]).await {
        Ok(document) => Ok(document.to_string().contains("dry_run")),
        Err(error @ ApiError::Unreachable { .. }) => Err(error),
        Err(_) => Ok(false),
    }
}

/// Does a step, looking anew whenever somebody else was there first.
async fn settle(
    server: &ControlPlane,
    mut step: Step,
    wanted: &[Wanted],
    prunes: &[Prune],
) -> Result<Step, (Step, ApiError)> {
    let mut tries = 1;
    loop {
        let error = match once(server, &step, false).await {
            Ok(()) => return Ok(step),
            Err(error) => error,
        };
        let outrun = matches!(
            &error,
            ApiError::Refused { status, .. } if [StatusCode::PRECONDITION_FAILED, StatusCode::CONFLICT].contains(status)
        );
        if !outrun || tries == ATTEMPTS {
            return Err((step, error));
        }
        tries += 1;
        let again = match look(server).await {
            Ok(live) => plan::plan(wanted, &live, prunes).ok(),
            Err(error) => return Err((step, error)),
        };
        let again =
            again.and_then(|all| all.into_iter().find(|new| new.kind == step.kind && new.name == step.name));
        match again {
            Some(new) if new.action == Action::Unchanged => return Ok(new),
            Some(new) => step = new,
            // It was to be deleted, and is gone.
            None => return Ok(step),
        }
    }
}

async fn once(server: &ControlPlane, step: &Step, dry_run: bool) -> Result<(), ApiError> {
    let path = ["api", "v2", step.kind.path(), step.name.as_str()];
    let query: Vec<(&str, String)> = dry_run.then(|| ("dry_run", "true".to_owned())).into_iter().collect();
    let headers: Vec<(&str, String)> = match (step.revision, step.action, step.kind) {
        (Some(revision), ..) => vec![("if-match", format!("\"{revision}\""))],
        (None, Action::Create, Kind::Deployment) => vec![("if-none-match", "*".to_owned())],
        _ => Vec::new(),
    };
    let ask = Ask { query: &query, headers: &headers, body: Some(&step.body) };
    let done = match (step.action, step.kind) {
        (Action::Unchanged, _) => return Ok(()),
        (Action::Delete, Kind::Deployment | Kind::Route) => {
            server.ask(Method::DELETE, &path, &Ask { body: None, ..ask }).await
        }
        // Nothing said of a node is no policy.
        (Action::Delete, Kind::NodePolicy) | (Action::Create | Action::Change, _) => {
            server.ask(Method::PUT, &path, &ask).await
        }
    };
    match done {
        Err(ApiError::NotFound(_)) if step.action == Action::Delete => Ok(()),
        other => other.map(drop),
    }
}

/// How a step went.
struct Outcome {
    step: Step,
    error: Option<String>,
}

impl Outcome {
    fn of(step: &Step, done: Result<(), String>) -> Self {
        Self { step: step.clone(), error: done.err() }
    }

    fn word(&self) -> &'static str {
        if self.error.is_some() { "failed" } else { self.step.action.done() }
    }
}

fn shown(results: &[Outcome], dry_run: bool) -> Value {
    let each = results.iter().map(|result| {
        let Step { kind, name, at, differences, .. } = &result.step;
        json!({
            "kind": kind.as_str(), "name": name, "outcome": result.word(), "changes": differences,
            "error": result.error,
            "file": at.as_ref().map(|at| &at.file), "document": at.as_ref().map(|at| at.document),
        })
    });
    json!({ "dry_run": dry_run, "results": each.collect::<Vec<_>>() })
}

/// One line for each.
fn summary(results: &[Outcome]) -> String {
    let rows = results.iter().map(|result| {
        let fields: Vec<&str> = result.step.differences.iter().map(|d| d.field.as_str()).collect();
        let detail = match (&result.error, result.step.action) {
            (Some(error), _) => error.clone(),
            (None, Action::Change) => fields.join(", "),
            (None, _) => String::new(),
        };
        [result.step.kind.as_str().into(), result.step.name.clone(), result.word().into(), detail]
    });
    table(["KIND", "NAME", "OUTCOME", "DETAIL"], rows)
}

/// Field by field what would change.
fn story(results: &[Outcome]) -> String {
    let mut out = String::new();
    for result in results.iter().filter(|r| r.step.action != Action::Unchanged || r.error.is_some()) {
        let Step { kind, name, at, action, differences, .. } = &result.step;
        let from = at.as_ref().map(|at| format!(" ({}:{})", at.file, at.line)).unwrap_or_default();
        let becomes = match action {
            Action::Create => "would be created",
            Action::Change => "would change",
            Action::Delete => "would be deleted",
            Action::Unchanged => "would stay",
        };
        out.push_str(&format!("{} {name}{from} {becomes}\n", kind.as_str()));
        if let Some(error) = &result.error {
            out.push_str(&format!("  refused: {error}\n"));
        }
        for difference in differences.iter().filter(|_| *action != Action::Delete) {
            for (sign, value) in [('-', &difference.before), ('+', &difference.after)] {
                if let Some(value) = value.as_ref().filter(|value| !value.is_null()) {
                    out.push_str(&format!("  {sign} {}: {value}\n", difference.field));
                }
            }
        }
    }
    let count = |action| results.iter().filter(|result| result.step.action == action).count();
    out + &format!(
        "{} to create, {} to change, {} to delete, {} unchanged\n",
        count(Action::Create),
        count(Action::Change),
        count(Action::Delete),
        count(Action::Unchanged)
    )
}
