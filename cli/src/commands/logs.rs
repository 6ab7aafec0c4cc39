//! `penstock logs`: the log of a replica's engine, from its node, or the control plane's own last lines.

use std::io::{IsTerminal, Write, stdout};

use reqwest::Method;

use super::{connect, tokens::records};
use crate::{
    api::{ApiError, Ask, ControlPlane},
    args::{Format, LogsArgs},
    output::{print, show},
};

pub(super) async fn run(args: &LogsArgs) -> Result<(), ApiError> {
    match &args.replica {
        Some(replica) => of_replica(args, replica).await,
        None => of_controlplane(args).await,
    }
}

async fn of_controlplane(args: &LogsArgs) -> Result<(), ApiError> {
    let query = [("lines", args.lines.to_string())];
    let ask = Ask { query: &query, ..Ask::default() };
    let json = connect(&args.remote)?.ask(Method::GET, &["api", "v2", "logs"], &ask).await?;
    if args.remote.output != Format::Table {
        return Ok(show(args.remote.output, &json, String::new)?);
    }
    let lines: Vec<String> = records(&json)
        .iter()
        .map(|line| line.as_str().map_or_else(|| line.to_string(), str::to_owned))
        .collect();
    Ok(print(&(lines.join("\n") + "\n"))?)
}

async fn of_replica(args: &LogsArgs, replica: &str) -> Result<(), ApiError> {
    if args.remote.output != Format::Table {
        return Err(ApiError::Usage(
            "a replica's log is plain text: --output is for the control plane's own".into(),
        ));
    }
    let server = connect(&args.remote)?;
    let (model, id) = named(&server, replica).await?;
    let query = [
        ("lines", args.lines.to_string()),
        ("follow", args.follow.to_string()),
        ("previous", args.previous.to_string()),
    ];
    let ask = Ask { query: &query, ..Ask::default() };
    let path = ["api", "v2", "models", &model, "replicas", &id, "logs"];
    let mut parts = server.stream(&path, &ask).await?;
    let plain = stdout().is_terminal();
    while let Some(part) = parts.next().await? {
        let part = if plain { harmless(&part) } else { part };
        let mut out = stdout().lock();
        out.write_all(&part)?;
        out.flush()?;
    }
    Ok(())
}

/// Model and replica. Ids of replicas have no slash, names of models may have some.
async fn named(server: &ControlPlane, replica: &str) -> Result<(String, String), ApiError> {
    match replica.rsplit_once('/') {
        Some((model, id)) if !model.is_empty() && !id.is_empty() => Ok((model.into(), id.into())),
        Some(_) => Err(ApiError::Usage(format!("{replica:?} is not MODEL/REPLICA, nor a REPLICA"))),
        None => Ok((server.endpoint(replica).await?.value.model, replica.to_owned())),
    }
}

/// What a model wrote into a log must not steer the operator's terminal: control characters become '?', but for colours.
fn harmless(part: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(part.len());
    let mut rest = part;
    while let Some((&byte, after)) = rest.split_first() {
        if let Some(length) = colour(rest) {
            let (code, after) = rest.split_at(length);
            out.extend_from_slice(code);
            rest = after;
            continue;
        }
        let shown = byte >= b' ' && byte != 0x7f || matches!(byte, b'\n' | b'\t' | b'\r');
        out.push(if shown { byte } else { b'?' });
        rest = after;
    }
    out
}

/// The length of a colour code ("ESC [ digits ; digits m") at the beginning.
fn colour(bytes: &[u8]) -> Option<usize> {
    let code = bytes.strip_prefix(b"\x1b[")?;
    let length = code.iter().position(|byte| !(byte.is_ascii_digit() || *byte == b';'))?;
    (code.get(length) == Some(&b'm') && length <= 16).then_some(length + 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_colours_a_terminal_and_does_nothing_else_to_it() {
        let text = b"\x1b[1;32mINFO\x1b[0m \xc3\xbc\n\x1b]0;title\x07 \x1b[2J\ttab\x1b[";
        let shown = String::from_utf8(harmless(text)).unwrap();
        assert_eq!(shown, "\x1b[1;32mINFO\x1b[0m \u{fc}\n?]0;title? ?[2J\ttab?[");
    }
}
