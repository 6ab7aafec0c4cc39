//! What is known of an engine that is about to be ended because it does nothing: written down while it can still be seen.
//!
//! One text file for each such end, `dumps/REPLICA-TIME.txt` in the state folder: the reason, what the engine still answers, its
//! processes as `/proc` shows them (state, kernel function and stack where they may be read, threads, memory, open files), and
//! the end of its log. If `engines.dump_command` names a program, its output for each process as well: `py-spy dump` shows in
//! which line of Python each thread stands.
//!
//! Everything is bounded: the time ([`LONGEST`] together, since the engine's GPU waits), the size of each part, the number of
//! files (`engines.dumps_kept`, the oldest go). A part that cannot be had says why in its place.

use std::{
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::time::timeout;

use super::{context::Context, launch::Engine, logs, procfs};
use crate::state::stem;

/// For all of it.
const LONGEST: Duration = Duration::from_secs(15);
/// For one answer of the engine.
const ANSWER: Duration = Duration::from_secs(2);
/// For one run of the command.
const COMMAND: Duration = Duration::from_secs(5);
/// Processes that are looked at.
const PROCESSES: usize = 32;
/// Threads of each that are told one by one.
const THREADS: usize = 64;
/// Lines of the log.
const LOG_LINES: usize = 200;
/// Longest text of one part, in bytes.
const PART: usize = 256 << 10;

/// Writes the dump of `engine` and gives its path back; `None` when it could not be written, which is logged.
pub(crate) async fn write(cx: &Context, replica_id: &str, engine: &Engine, reason: &str) -> Option<PathBuf> {
    let kept = usize::try_from(cx.config.dumps_kept).unwrap_or(usize::MAX);
    if kept == 0 {
        return None;
    }
    let mut text = format!(
        "replica    {replica_id}\nreason     {reason}\ntime       {} (Unix)\nmain pid   {}\nport       {}\nrestarts   {}\n\
         up for     {} s in this agent's hands\ncommand    {}\n",
        unix_seconds(),
        engine.tree.pid(),
        engine.lease.port(),
        engine.restarts,
        engine.since.elapsed().as_secs(),
        engine.command.join(" "),
    );
    if timeout(LONGEST, gather(cx, replica_id, engine, &mut text)).await.is_err() {
        text.push_str("\n(the rest took too long)\n");
    }
    let (dir, id) = (cx.state.dumps(), replica_id.to_owned());
    let written = tokio::task::spawn_blocking(move || store(&dir, &id, &text, kept)).await;
    match written.unwrap_or_else(|broken| Err(io::Error::other(broken))) {
        Ok(path) => {
            tracing::warn!(replica = replica_id, path = %path.display(), "dump of an engine that is being ended");
            Some(path)
        }
        Err(error) => {
            tracing::error!(replica = replica_id, %error, "cannot write the dump of an engine");
            None
        }
    }
}

async fn gather(cx: &Context, replica_id: &str, engine: &Engine, text: &mut String) {
    let (probe, target) = (&cx.probe, &engine.target);
    let health = match probe.health(target, ANSWER).await {
        Ok(()) => "200".to_owned(),
        Err(why) => why,
    };
    part(text, "GET /health", &health);
    let log = cx.state.log(replica_id);
    part(text, "end of its log", &logs::tail(&log, LOG_LINES).join("\n"));
    let pgid = engine.tree.pid();
    let processes = tokio::task::spawn_blocking(move || {
        let members: Vec<i32> = {
            let own = |p: &procfs::Proc| p.pgrp == pgid || p.session == pgid;
            procfs::all().into_iter().filter(own).map(|p| p.pid).collect()
        };
        members.into_iter().take(PROCESSES).map(|pid| (pid, describe(pid))).collect::<Vec<_>>()
    });
    let processes = processes.await.unwrap_or_default();
    for (pid, described) in &processes {
        part(text, &format!("process {pid}"), described);
    }
    for (pid, _) in processes.iter().filter(|_| !cx.config.dump_command.is_empty()) {
        let said = command(&cx.config.dump_command, *pid).await;
        part(text, &format!("{} of {pid}", cx.config.dump_command.join(" ")), &said);
    }
    let metrics = probe.metrics_text(target, ANSWER).await.unwrap_or_else(|why| why);
    let told = metrics.lines().filter(|line| !line.starts_with('#') && !line.contains("_bucket{"));
    part(text, "GET /metrics, without buckets", &told.collect::<Vec<_>>().join("\n"));
}

fn part(text: &mut String, title: &str, body: &str) {
    let end = (0..=body.len().min(PART)).rev().find(|end| body.is_char_boundary(*end)).unwrap_or(0);
    let (shown, cut) = body.split_at(end);
    // Writing into a String does not fail.
    write!(text, "\n=== {title}\n{shown}\n").ok();
    if !cut.is_empty() {
        text.push_str("(cut)\n");
    }
}

/// One process, out of `/proc`.
fn describe(pid: i32) -> String {
    let file = |name: &str| fs::read(format!("/proc/{pid}/{name}"));
    let line = |name: &str| match file(name) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).replace('\0', " ").trim().to_owned(),
        Err(error) => format!("({error})"),
    };
    let status = line("status");
    let of_interest =
        ["Name", "State", "PPid", "Threads", "VmRSS", "VmHWM", "SigPnd", "ShdPnd", "SigBlk", "SigIgn"];
    let status =
        status.lines().filter(|l| l.split_once(':').is_some_and(|(key, _)| of_interest.contains(&key)));
    let files = fs::read_dir(format!("/proc/{pid}/fd")).map(Iterator::count);
    let files = files.map_or_else(|e| format!("({e})"), |count| count.to_string());
    let mut out = format!("command    {}\n", line("cmdline"));
    status.for_each(|l| out.push_str(&format!("{l}\n")));
    out.push_str(&format!("open files {files}\nwaits in   {}\n", line("wchan")));
    out.push_str(&format!("kernel stack\n{}\n", line("stack")));
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let threads = threads.into_iter().flatten().filter_map(|e| e.ok()?.file_name().into_string().ok());
    for thread in threads.take(THREADS) {
        let of = |name: &str| {
            fs::read_to_string(format!("/proc/{pid}/task/{thread}/{name}"))
                .unwrap_or_default()
                .trim()
                .to_owned()
        };
        let state = procfs::parse_stat(&of("stat")).map_or('?', |stat| stat.state);
        out.push_str(&format!("thread {thread} {} {state} in {}\n", of("comm"), of("wchan")));
    }
    out
}

/// What the operator's command says of a process; `{pid}` in its arguments is the process.
async fn command(command: &[String], pid: i32) -> String {
    let args: Vec<String> = command.iter().map(|arg| arg.replace("{pid}", &pid.to_string())).collect();
    let Some((program, args)) = args.split_first() else { return String::new() };
    let child = tokio::process::Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn();
    let output = match child {
        Ok(child) => timeout(COMMAND, child.wait_with_output()).await,
        Err(error) => return format!("cannot execute {program:?} (engines.dump_command): {error}"),
    };
    match output {
        Ok(Ok(output)) => {
            let (out, err) =
                (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            format!("{out}{err}({})", output.status)
        }
        Ok(Err(error)) => format!("({error})"),
        Err(_) => format!("(no end within {} s)", COMMAND.as_secs()),
    }
}

/// Writes the file and removes the oldest beyond `kept`.
fn store(dir: &Path, replica_id: &str, text: &str, kept: usize) -> io::Result<PathBuf> {
    fs::create_dir_all(dir)?;
    let path = dir.join(format!("{}-{}.txt", stem(replica_id), unix_millis()));
    fs::write(&path, text)?;
    let entries = fs::read_dir(dir)?.filter_map(|entry| {
        let entry = entry.ok()?;
        let is_dump = entry.path().extension().is_some_and(|extension| extension == "txt");
        is_dump.then_some((entry.metadata().ok()?.modified().ok()?, entry.path()))
    });
    let mut dumps: Vec<(SystemTime, PathBuf)> = entries.collect();
    dumps.sort();
    let surplus = dumps.len().saturating_sub(kept);
    for (_, old) in dumps.into_iter().take(surplus).filter(|(_, old)| *old != path) {
        fs::remove_file(old)?;
    }
    Ok(path)
}

fn unix_millis() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_described_from_what_may_be_read() {
        let own = procfs::raw_pid(std::process::id());
        let text = describe(own);
        for word in ["command ", "State:", "VmRSS:", "open files ", "waits in ", "kernel stack", "thread "] {
            assert!(text.contains(word), "{word} not in\n{text}");
        }
        assert!(describe(i32::MAX).contains("No such file"), "a process that has gone");
    }

    #[tokio::test]
    async fn the_operators_command_is_told_the_process_and_its_failure_is_told() {
        let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        assert!(command(&words(&["echo", "of {pid}"]), 77).await.starts_with("of 77\n"));
        assert!(command(&words(&["/no/such/py-spy"]), 77).await.contains("engines.dump_command"));
    }

    #[test]
    fn so_many_are_kept_and_the_newest_always() {
        let dir = tempfile::tempdir().unwrap();
        let mut last = PathBuf::new();
        for n in 0..5 {
            last = store(dir.path(), &format!("org/m-{n}"), "text", 2).unwrap();
        }
        fs::write(dir.path().join("notes.md"), "an operator's").unwrap();
        let left = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!((left, fs::read_to_string(last).unwrap().as_str()), (3, "text"));
    }

    #[test]
    fn a_part_is_cut_at_a_character() {
        let mut text = String::new();
        part(&mut text, "t", &"é".repeat(PART));
        assert!(text.len() < PART + 100 && text.ends_with("(cut)\n"));
    }
}
