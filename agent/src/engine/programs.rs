//! The programs of `[engines]`: each is asked once for its version, and again when its file has changed.
//!
//! vLLM takes twenty seconds to say it (it imports PyTorch first), so it is asked in the background, and what it said is kept
//! beside the file's size and time across restarts of the agent. A start of an engine waits for the answer, but not for
//! long: without it everything is passed on, which is what happened before there was a table of versions.
//!
//! A program that hangs, prints without end or is not there costs its version and nothing else.

use std::{
    collections::BTreeMap,
    env, fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, UNIX_EPOCH},
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use penstock_config::agent::EngineProgram;
use penstock_proto::v1;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::Command,
    sync::Mutex as AsyncMutex,
};
use tokio_util::sync::CancellationToken;

use super::versions;
use crate::state::write_atomically;

/// Longest wait for a program's answer.
const DEADLINE: Duration = Duration::from_secs(120);
/// Longest wait of an engine's start for it.
const PATIENCE: Duration = Duration::from_secs(10);
/// How much of its output is read.
const OUTPUT_BYTES: u64 = 64 << 10;
/// How often files are looked at.
const LOOK: Duration = Duration::from_secs(30);
/// Longest version that is kept, in characters.
const VERSION_CHARS: usize = 64;

/// Which file a program is, and in which state: another state is another program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    path: PathBuf,
    bytes: u64,
    modified_ns: u128,
    command: Vec<String>,
}

/// What a program said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Answer {
    stamp: Stamp,
    /// Empty: it did not say.
    version: String,
    /// Why not.
    problem: String,
}

#[derive(Debug)]
struct Entry {
    program: EngineProgram,
    answer: Mutex<Option<Answer>>,
    /// Held while it is being asked, so that it is asked once at a time.
    asking: AsyncMutex<()>,
}

/// The node's programs.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    entries: Arc<BTreeMap<String, Entry>>,
    file: PathBuf,
}

impl Programs {
    /// With what was kept in `file`, if it can be read.
    pub(crate) fn new(programs: &BTreeMap<String, EngineProgram>, file: PathBuf) -> Self {
        let kept = fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let mut kept: BTreeMap<String, Answer> = kept.unwrap_or_default();
        let entry = |(name, program): (&String, &EngineProgram)| {
            // One that could not say it is asked again: it may have been installed since.
            let answer = kept.remove(name).filter(|answer| answer.problem.is_empty());
            let entry =
                Entry { program: program.clone(), answer: Mutex::new(answer), asking: AsyncMutex::default() };
            (name.clone(), entry)
        };
        Self { entries: Arc::new(programs.iter().map(entry).collect()), file }
    }

    /// Asks every program, one after the other, and again those whose files change, until `stop`.
    pub(crate) async fn follow(self, stop: CancellationToken) {
        let looking = async {
            loop {
                for name in self.entries.keys() {
                    self.ask(name).await;
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        stop.run_until_cancelled(looking).await;
    }

    /// What the program called its version; empty where it is not known in time.
    pub(crate) async fn version(&self, name: &str) -> String {
        tokio::time::timeout(PATIENCE, self.ask(name)).await.ok();
        let answer = self.entries.get(name).and_then(|entry| lock(&entry.answer).clone());
        answer.map(|answer| answer.version).unwrap_or_default()
    }

    /// All of them, as they are told.
    pub(crate) fn shown(&self) -> Vec<v1::EngineProgram> {
        let shown = |(name, entry): (&String, &Entry)| {
            let answer = lock(&entry.answer).clone();
            let (version, problem) =
                answer.map(|answer| (answer.version, answer.problem)).unwrap_or_default();
            let released = versions::released(&version).filter(|_| !entry.program.is_exec());
            let supports = released.map(versions::supports).unwrap_or_default();
            v1::EngineProgram {
                name: name.clone(),
                kind: entry.program.kind.clone(),
                version,
                problem,
                supports: supports.into_iter().map(str::to_owned).collect(),
            }
        };
        self.entries.iter().map(shown).collect()
    }

    /// Asks the program, unless it has answered and is still the same.
    async fn ask(&self, name: &str) {
        let Some(entry) = self.entries.get(name).filter(|entry| !entry.program.version_args.is_empty())
        else {
            return;
        };
        let _one_at_a_time = entry.asking.lock().await;
        let before = lock(&entry.answer).clone();
        let stamp = match stamp(&entry.program) {
            Ok(stamp) => stamp,
            Err(problem) => {
                let none = Stamp { path: PathBuf::new(), bytes: 0, modified_ns: 0, command: Vec::new() };
                self.note(name, entry, Answer { stamp: none, version: String::new(), problem });
                return;
            }
        };
        if before.is_some_and(|before| before.stamp == stamp) {
            return;
        }
        let (version, problem) = match run(&entry.program, &stamp.path).await {
            Ok(version) => (version, String::new()),
            Err(problem) => (String::new(), problem),
        };
        self.note(name, entry, Answer { stamp, version, problem });
    }

    fn note(&self, name: &str, entry: &Entry, answer: Answer) {
        let before = lock(&entry.answer).replace(answer.clone());
        if before.as_ref() == Some(&answer) {
            return;
        }
        if answer.problem.is_empty() {
            tracing::info!(engine = name, version = answer.version, "an engine's program told its version");
        } else {
            tracing::info!(engine = name, problem = answer.problem, "an engine's version is not known");
        }
        let kept: BTreeMap<&String, Answer> = self
            .entries
            .iter()
            .filter_map(|(name, entry)| Some((name, lock(&entry.answer).clone()?)))
            .collect();
        let written = serde_json::to_vec_pretty(&kept)
            .map_err(io::Error::from)
            .and_then(|bytes| write_atomically(&self.file, &bytes));
        if let Err(error) = written {
            tracing::warn!(path = %self.file.display(), %error, "cannot keep the versions of engines");
        }
    }
}

fn lock(answer: &Mutex<Option<Answer>>) -> MutexGuard<'_, Option<Answer>> {
    answer.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is executed to ask: of a template only the program, since its arguments would start a server.
fn question(program: &EngineProgram) -> Vec<String> {
    let leading = if program.is_exec() { 1 } else { program.command.len() };
    program.command.iter().take(leading).chain(&program.version_args).cloned().collect()
}

fn stamp(program: &EngineProgram) -> Result<Stamp, String> {
    let name = program.command.first().map(String::as_str).unwrap_or_default();
    let path = found(name).ok_or_else(|| format!("{name:?} is not there"))?;
    let metadata = fs::metadata(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let modified_ns = modified.map_or(0, |time| time.as_nanos());
    Ok(Stamp { path, bytes: metadata.len(), modified_ns, command: question(program) })
}

/// As the system will find it: a path as it is, a name on the PATH.
fn found(name: &str) -> Option<PathBuf> {
    if name.contains('/') {
        return Path::new(name).is_file().then(|| PathBuf::from(name));
    }
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}

async fn run(program: &EngineProgram, path: &Path) -> Result<String, String> {
    let question = question(program);
    let args = question.get(1..).unwrap_or_default();
    let mut command = Command::new(path);
    // In a group of its own, so that what it starts ends with it; without GPUs, so that it wakes none.
    command
        .args(args)
        .envs(&program.env)
        .env("CUDA_VISIBLE_DEVICES", "")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(|e| format!("cannot execute {}: {e}", path.display()))?;
    let group = child.id().and_then(|pid| i32::try_from(pid).ok());
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let answer = async { tokio::join!(read(out), read(err), child.wait()) };
    let answer = tokio::time::timeout(DEADLINE, answer).await;
    if let Some(group) = group {
        // Gone already, as a rule.
        killpg(Pid::from_raw(group), Signal::SIGKILL).ok();
    }
    let (out, err, status) = answer.map_err(|_| format!("no answer within {} s", DEADLINE.as_secs()))?;
    let version = versions::printed(&out).or_else(|| versions::printed(&err));
    match (version, status) {
        (Some(version), Ok(status)) if status.success() => Ok(version.chars().take(VERSION_CHARS).collect()),
        (_, Ok(status)) if !status.success() => {
            Err(format!("{} {} ended with {status}", path.display(), args.join(" ")))
        }
        (_, Ok(_)) => Err(format!("{} {} printed no version", path.display(), args.join(" "))),
        (_, Err(error)) => Err(format!("{}: {error}", path.display())),
    }
}

/// The first [`OUTPUT_BYTES`]; who prints more finds the pipe closed.
async fn read(pipe: Option<impl AsyncRead + Unpin>) -> String {
    let mut text = Vec::new();
    if let Some(pipe) = pipe {
        pipe.take(OUTPUT_BYTES).read_to_end(&mut text).await.ok();
    }
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn script(path: &Path, text: &str) {
        let new = path.with_extension("new");
        fs::write(&new, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(new, path).unwrap();
    }

    fn programs(dir: &Path, kind: &str) -> Programs {
        let command = vec![dir.join("vllm").to_str().unwrap().to_owned(), "{port}".into()];
        let command = if kind == "exec" { command } else { command[..1].to_vec() };
        let program = EngineProgram { kind: kind.into(), command, ..EngineProgram::default() };
        Programs::new(&[("vllm".to_owned(), program)].into(), dir.join("versions.json"))
    }

    #[tokio::test]
    async fn a_program_is_asked_once_until_its_file_changes() {
        let dir = tempfile::tempdir().unwrap();
        let count = "echo x >> \"$(dirname $0)/asked\"; echo INFO noise; echo";
        let asked = || fs::read_to_string(dir.path().join("asked")).unwrap_or_default().lines().count();
        script(&dir.path().join("vllm"), &format!("{count} 0.17.0"));
        let ours = programs(dir.path(), "vllm");
        assert_eq!(ours.shown()[0].version, "", "not asked yet");
        assert_eq!(ours.version("vllm").await, "0.17.0");
        assert_eq!(ours.version("vllm").await, "0.17.0");
        assert_eq!(asked(), 1);
        assert!(ours.shown()[0].supports.contains(&"sleep".to_owned()));
        // The next agent has it from the file.
        assert_eq!(programs(dir.path(), "vllm").shown()[0].version, "0.17.0");
        assert_eq!(programs(dir.path(), "vllm").version("vllm").await, "0.17.0");
        assert_eq!(asked(), 1);
        script(&dir.path().join("vllm"), &format!("{count} 0.32.0+cpu # longer"));
        assert_eq!(ours.version("vllm").await, "0.32.0+cpu");
        assert_eq!(asked(), 2);
    }

    #[tokio::test]
    async fn what_cannot_say_its_version_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let ours = programs(dir.path(), "vllm");
        assert_eq!(ours.version("vllm").await, "");
        assert!(ours.shown()[0].problem.contains("is not there"), "{:?}", ours.shown());
        for (text, part) in
            [("exit 3", "exit status: 3"), ("echo hello", "printed no version"), ("yes 1", "ended with")]
        {
            script(&dir.path().join("vllm"), text);
            assert_eq!(ours.version("vllm").await, "", "{text}");
            assert!(ours.shown()[0].problem.contains(part), "{text}: {:?}", ours.shown());
        }
        assert_eq!(ours.version("nobody").await, "");
    }

    #[tokio::test]
    async fn of_a_template_only_the_program_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        script(&dir.path().join("vllm"), "echo \"version: 1.2.3 of $*\" >&2");
        let ours = programs(dir.path(), "exec");
        assert_eq!(ours.version("vllm").await, "1.2.3");
        assert!(ours.shown()[0].supports.is_empty(), "its options are not vLLM's");
        assert_eq!(question(&ours.entries["vllm"].program)[1..], ["--version"]);
    }
}
