//! Starts a program as the leader of a session of its own.
//!
//! `posix_spawn` does it in one call of the C library: the session is there before the program runs, an executable that
//! cannot be had is an error here and not a code in a log, and no code of ours runs between fork and exec. (The standard
//! library's `Command` can only make a process group without `unsafe`.) A session keeps the engine from the agent's
//! terminal, and holds together what an engine moves to further groups.

use std::{
    collections::BTreeMap,
    ffi::{CString, OsStr, OsString},
    fs::File,
    io,
    os::{fd::AsRawFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    libc,
    spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn},
    sys::signal::{SigSet, Signal},
    unistd::{AccessFlags, access},
};

use super::command::Launch;

/// Where a process finds programs when it has no PATH.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// Runs `launch` in a session of its own, without input, its output going to `log`. Its pid, which is the id of the
/// session and of the process group as well.
///
/// # Errors
/// There is no such program, or it cannot be executed; the text names it.
pub(crate) fn spawn(launch: &Launch, log: &File) -> io::Result<i32> {
    let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, why.to_owned());
    let program = launch.argv.first().ok_or_else(|| invalid("the command is empty"))?;
    let failed = |kind: io::ErrorKind, why: &dyn std::fmt::Display| {
        io::Error::new(kind, format!("cannot execute {program:?} (engines.NAME.command): {why}"))
    };
    let mut env: BTreeMap<OsString, OsString> = std::env::vars_os().collect();
    for name in &launch.env_removed {
        env.remove(OsStr::new(name));
    }
    env.extend(launch.env.iter().map(|(name, value)| (name.into(), value.into())));
    let path = env.get(OsStr::new("PATH")).map_or_else(|| OsStr::new(DEFAULT_PATH), OsString::as_os_str);
    let file = find(program, path).ok_or_else(|| {
        let why = format!("no such program in PATH, which is {}", path.display());
        failed(io::ErrorKind::NotFound, &why)
    })?;

    let text = |bytes: &[u8]| {
        CString::new(bytes).map_err(|_| invalid("an argument or variable holds a NUL character"))
    };
    let argv: Vec<CString> = launch.argv.iter().map(|arg| text(arg.as_bytes())).collect::<Result<_, _>>()?;
    let pair =
        |(name, value): (&OsString, &OsString)| text(&[name.as_bytes(), b"=", value.as_bytes()].concat());
    let envp: Vec<CString> = env.iter().map(pair).collect::<Result<_, _>>()?;
    let spawned = start(&file, &argv, &envp, &File::open("/dev/null")?, log);
    spawned.map_err(|errno| {
        let error = io::Error::from(errno);
        failed(error.kind(), &error)
    })
}

fn start(file: &Path, argv: &[CString], envp: &[CString], nothing: &File, log: &File) -> Result<i32, Errno> {
    let mut files = PosixSpawnFileActions::init()?;
    files.add_dup2(nothing.as_raw_fd(), libc::STDIN_FILENO)?;
    files.add_dup2(log.as_raw_fd(), libc::STDOUT_FILENO)?;
    files.add_dup2(log.as_raw_fd(), libc::STDERR_FILENO)?;
    let mut attributes = PosixSpawnAttr::init()?;
    // What the standard library does for its children: ours ignores SIGPIPE, theirs shall not.
    let mut defaults = SigSet::empty();
    defaults.add(Signal::SIGPIPE);
    attributes.set_sigdefault(&defaults)?;
    attributes.set_sigmask(&SigSet::empty())?;
    let session = PosixSpawnFlags::from_bits_retain(i32::from(libc::POSIX_SPAWN_SETSID));
    attributes.set_flags(
        PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF | PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK | session,
    )?;
    posix_spawn(file, &files, &attributes, argv, envp).map(nix::unistd::Pid::as_raw)
}

/// The file that `program` names: a path, or the first executable of that name in `path`.
fn find(program: &str, path: &OsStr) -> Option<PathBuf> {
    if program.contains('/') {
        return Some(PathBuf::from(program));
    }
    let executable = |file: &PathBuf| file.is_file() && access(file, AccessFlags::X_OK).is_ok();
    std::env::split_paths(path).map(|dir| dir.join(program)).find(executable)
}

#[cfg(test)]
mod tests {
    use nix::{sys::wait::waitpid, unistd::Pid};

    use super::*;
    use crate::engine::procfs;

    fn launch(argv: &[&str], env: &[(&str, &str)]) -> Launch {
        Launch {
            argv: argv.iter().map(|a| (*a).to_owned()).collect(),
            env: env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            env_removed: vec!["HOME"],
        }
    }

    #[test]
    fn a_program_leads_its_session_and_has_its_output_and_environment() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let script = "echo $WORD $HOME; echo err >&2; read x; kill -9 $$";
        let pid = spawn(&launch(&["sh", "-c", script], &[("WORD", "hello")]), &File::create(&path).unwrap())
            .unwrap();
        let process = procfs::read(pid).unwrap();
        assert_eq!((process.pgrp, process.session), (pid, pid));
        waitpid(Pid::from_raw(pid), None).unwrap();
        assert_eq!(std::fs::read_to_string(path).unwrap(), "hello\nerr\n");
    }

    #[test]
    fn what_cannot_be_executed_is_named() {
        let log = tempfile::tempfile().unwrap();
        let error = |argv: &[&str], env: &[(&str, &str)]| spawn(&launch(argv, env), &log).unwrap_err();
        let missing = error(&["no-such-program"], &[("PATH", "/nowhere")]);
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        assert!(
            missing.to_string().contains(
                "\"no-such-program\" (engines.NAME.command): no such program in PATH, which is /nowhere"
            ),
            "{missing}"
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        let plain = error(&[file.path().to_str().unwrap()], &[]);
        assert_eq!(plain.kind(), io::ErrorKind::PermissionDenied);
        assert!(error(&["/nowhere/x"], &[]).to_string().contains("/nowhere/x"));
        assert!(error(&[], &[]).to_string().contains("empty"));
    }
}
