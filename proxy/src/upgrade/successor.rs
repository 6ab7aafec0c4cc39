//! The old process's side: starting a successor, and waiting until it serves.

use std::{
    ffi::OsString,
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::Stdio,
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::{Child, Command},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{Offer, Ready, Socket, VARIABLE, channel};

/// Longest line of a successor.
const MOST_BYTES: u64 = 4_096;

/// Starts this process's command line again, offers it `sockets`, and waits until it serves; up to `longest`, or until
/// `cancel`. If this fails, nothing of it is left.
///
/// The program is looked for where it was found the first time (`argv[0]`), not in `/proc/self/exe`: after an upgrade of the
/// package that names a file which is deleted.
///
/// # Errors
/// A sentence about what stood in the way. The successor's own words are in the log, which it shares.
pub async fn start(
    sockets: &[Socket],
    has_tables: bool,
    longest: Duration,
    cancel: &CancellationToken,
) -> Result<Ready, String> {
    let mut line = std::env::args_os();
    let program = line.next().ok_or("this process has no name to start again")?;
    launch(program, line.collect(), sockets, has_tables, longest, cancel).await
}

async fn launch(
    program: OsString,
    arguments: Vec<OsString>,
    sockets: &[Socket],
    has_tables: bool,
    longest: Duration,
    cancel: &CancellationToken,
) -> Result<Ready, String> {
    let (ours, theirs) = UnixStream::pair().map_err(|e| format!("no pair of sockets to be had: {e}"))?;
    let mut child = Command::new(&program)
        .args(arguments)
        .env(VARIABLE, "stdin")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .map_err(|e| format!("cannot start {}: {e}", program.display()))?;
    let outcome = tokio::select! {
        outcome = timeout(longest, converse(ours, sockets, has_tables, &mut child)) => {
            outcome.unwrap_or_else(|_| Err(format!("it was not ready within {} ms", longest.as_millis())))
        }
        () = cancel.cancelled() => Err("this process was told to stop".into()),
    };
    if outcome.is_err() {
        // It may have ended by itself. Either way nothing of it stays.
        drop(child.kill().await);
    }
    outcome
}

/// Offers the sockets and waits for the answer, or for the end of `child`.
async fn converse(
    channel: UnixStream,
    sockets: &[Socket],
    has_tables: bool,
    child: &mut Child,
) -> Result<Ready, String> {
    let failed = |e: std::io::Error| format!("the sockets could not be handed over: {e}");
    let places = sockets.iter().map(|socket| socket.place.clone()).collect();
    let offer = Offer { pid: std::process::id(), has_tables, sockets: places };
    channel::send(&channel, &offer, sockets).map_err(failed)?;
    channel.set_nonblocking(true).map_err(failed)?;
    let channel = tokio::net::UnixStream::from_std(channel).map_err(failed)?;
    let mut line = String::new();
    let mut reader = BufReader::new(channel.take(MOST_BYTES));
    let read = reader.read_line(&mut line).await;
    match read {
        Ok(length) if length > 0 => {
            serde_json::from_str(&line).map_err(|e| format!("its answer could not be understood: {e}"))
        }
        // Its end of the pair is closed: it has ended, or is about to.
        _ => match child.wait().await {
            Ok(status) => {
                Err(format!("it ended before it was ready ({status}); its own words are in the log"))
            }
            Err(e) => Err(format!("it ended before it was ready: {e}")),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    async fn tried(
        program: &str,
        arguments: &[&str],
        longest: Duration,
        cancel: bool,
    ) -> Result<Ready, String> {
        let token = CancellationToken::new();
        if cancel {
            token.cancel();
        }
        let arguments = arguments.iter().map(OsString::from).collect();
        launch(program.into(), arguments, &[], false, longest, &token).await
    }

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn a_successor_that_answers_is_believed() {
        let answer = r#"read offer; printf '{"pid":7,"version":"9.9"}\n' >&0; exec sleep 0.1"#;
        let ready = tried("sh", &["-c", answer], LONG, false).await;
        assert_eq!(ready, Ok(Ready { pid: 7, version: "9.9".into() }));
    }

    #[tokio::test]
    async fn whatever_else_it_does_is_told_and_nothing_is_left() {
        let began = Instant::now();
        let said = |result: Result<Ready, String>| result.expect_err("no successor");
        assert!(
            said(tried("/no/such/program", &[], LONG, false).await).contains("cannot start /no/such/program")
        );
        let ended = said(tried("sh", &["-c", "read offer; exit 2"], LONG, false).await);
        assert!(ended.contains("exit status: 2"), "{ended}");
        let silent = tried("sh", &["-c", "exec sleep 600"], Duration::from_millis(200), false).await;
        assert_eq!(said(silent), "it was not ready within 200 ms");
        let garbled = tried("sh", &["-c", "echo hello >&0; exec sleep 600"], LONG, false).await;
        assert!(said(garbled).contains("could not be understood"));
        let cancelled = tried("sh", &["-c", "exec sleep 600"], LONG, true).await;
        assert_eq!(said(cancelled), "this process was told to stop");
        assert!(began.elapsed() < LONG);
    }
}
