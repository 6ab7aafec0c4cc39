//! What `/proc` says of processes: the one source that also knows processes which are not our children.
//!
//! Everything here is a snapshot that may be stale when it is read. A process is therefore identified by pid *and* start
//! time; a pid alone may already be another's.

use std::{collections::BTreeSet, fs, path::PathBuf};

/// One process, out of `/proc/PID/stat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Proc {
    /// Its id.
    pub(crate) pid: i32,
    /// Its parent.
    pub(crate) ppid: i32,
    /// Its process group.
    pub(crate) pgrp: i32,
    /// Its session.
    pub(crate) session: i32,
    /// One letter: R, S, D, Z, T ...
    pub(crate) state: char,
    /// Threads, itself included.
    pub(crate) threads: u32,
    /// Start time in clock ticks since boot.
    pub(crate) start_ticks: u64,
}

impl Proc {
    /// Nothing of it is left but its exit status. (A zombie whose other threads still end holds its memory.)
    pub(crate) fn is_dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X') && self.threads <= 1
    }
}

/// Reads one line of `/proc/PID/stat`. The command in parentheses may hold anything, so fields count from the last ')'.
pub(crate) fn parse_stat(line: &str) -> Option<Proc> {
    let pid = line.split_once(' ')?.0.parse().ok()?;
    let fields: Vec<&str> = line.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    // The field numbers of proc(5), less the three before: state 3, ppid 4, pgrp 5, session 6, num_threads 20, starttime 22.
    let field = |number: usize| fields.get(number - 3).copied();
    Some(Proc {
        pid,
        state: field(3)?.chars().next()?,
        ppid: field(4)?.parse().ok()?,
        pgrp: field(5)?.parse().ok()?,
        session: field(6)?.parse().ok()?,
        threads: field(20)?.parse().ok()?,
        start_ticks: field(22)?.parse().ok()?,
    })
}

/// The process `pid`, if there is one.
pub(crate) fn read(pid: i32) -> Option<Proc> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Every process that can be seen.
pub(crate) fn all() -> Vec<Proc> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
    pids.filter_map(read).collect()
}

/// The values of `names` in the environment that the process was started with. Processes of others are silent.
pub(crate) fn environment<const N: usize>(pid: i32, names: [&str; N]) -> [Option<String>; N] {
    let bytes = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    names.map(|name| {
        let value = |entry: &[u8]| Some(entry.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?.to_vec());
        let value = bytes.split(|b| *b == 0).find_map(value)?;
        String::from_utf8(value).ok()
    })
}

/// The files that standard output and standard error of the process go to.
pub(crate) fn outputs(pid: i32) -> Vec<PathBuf> {
    [1, 2].iter().filter_map(|fd| fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok()).collect()
}

/// Tells one boot of the machine from another: start times of two boots do not compare.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// Who listens on a TCP port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Listener {
    /// Nobody.
    None,
    /// The process that was asked about, or one of those.
    Theirs,
    /// Another process that can be seen.
    Other(i32),
    /// A process that cannot be seen.
    Hidden,
}

/// Whether one of `pids`, or who else, listens on `port`.
pub(crate) fn listener(port: u16, pids: &[i32]) -> Listener {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| fs::read_to_string(path).unwrap_or_default());
    let inodes: BTreeSet<u64> = tables.iter().flat_map(|table| listening_inodes(table, port)).collect();
    if inodes.is_empty() {
        return Listener::None;
    }
    let holds = |pid: &i32| sockets(*pid).iter().any(|inode| inodes.contains(inode));
    if pids.iter().any(holds) {
        return Listener::Theirs;
    }
    match all().into_iter().map(|p| p.pid).find(holds) {
        Some(pid) => Listener::Other(pid),
        None => Listener::Hidden,
    }
}

/// The inodes of the sockets that listen on `port`, out of the text of `/proc/net/tcp` or `tcp6`.
fn listening_inodes(table: &str, port: u16) -> Vec<u64> {
    listening(table).into_iter().filter(|(own, _)| *own == port).map(|(_, inode)| inode).collect()
}

/// Port and inode of each socket that listens.
fn listening(table: &str) -> Vec<(u16, u64)> {
    const LISTEN: &str = "0A";
    let socket = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (_, port) = fields.get(1)?.rsplit_once(':')?;
        let port = u16::from_str_radix(port, 16).ok()?;
        (*fields.get(3)? == LISTEN).then_some((port, fields.get(9)?.parse().ok()?))
    };
    table.lines().skip(1).filter_map(socket).collect()
}

/// The first port that the process listens on, if it does and may be looked at.
pub(crate) fn listening_port(pid: i32) -> Option<u16> {
    let held: BTreeSet<u64> = sockets(pid).into_iter().collect();
    let table = |path| fs::read_to_string(path).unwrap_or_default();
    let ports = ["/proc/net/tcp", "/proc/net/tcp6"].map(table);
    ports
        .iter()
        .flat_map(|table| listening(table))
        .filter(|(_, inode)| held.contains(inode))
        .map(|(port, _)| port)
        .min()
}

fn sockets(pid: i32) -> Vec<u64> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let inode = |entry: std::io::Result<fs::DirEntry>| {
        let target = fs::read_link(entry.ok()?.path()).ok()?;
        target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    };
    entries.filter_map(inode).collect()
}

/// The process's id as the system calls take it; 0, which no process has, where it does not fit.
pub(crate) fn raw_pid(pid: u32) -> i32 {
    i32::try_from(pid).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use proptest::prelude::*;

    use super::*;

    fn own_pid() -> i32 {
        raw_pid(std::process::id())
    }

    #[test]
    fn a_command_may_hold_spaces_and_parentheses() {
        let line = "812 (a) S (b) R 1 800 799 0 -1 4194560 1 0 0 0 5 6 0 0 20 0 13 0 98765 1 2 3";
        let expected =
            Proc { pid: 812, ppid: 1, pgrp: 800, session: 799, state: 'R', threads: 13, start_ticks: 98_765 };
        assert_eq!(parse_stat(line), Some(expected));
        assert!(!expected.is_dead());
        assert!(!Proc { state: 'Z', ..expected }.is_dead(), "its threads still end");
        assert!(Proc { state: 'Z', threads: 1, ..expected }.is_dead());
    }

    #[test]
    fn we_see_ourselves() {
        let own = own_pid();
        let me = read(own).expect("this process");
        assert!(all().contains(&Proc { state: me.state, threads: me.threads, ..me }) || read(own).is_some());
        let path = std::env::var("PATH").ok();
        assert_eq!(environment(own, ["PATH", "NO_SUCH_VARIABLE"]), [path, None]);
        assert!(!boot_id().is_empty());
    }

    #[test]
    fn a_listener_is_traced_to_its_process() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        assert_eq!(listener(port, &[own_pid()]), Listener::Theirs);
        assert_eq!(listener(port, &[]), Listener::Other(own_pid()));
        assert!(listening_port(own_pid()).is_some_and(|first| first <= port));
        drop(socket);
        assert_eq!(listener(port, &[own_pid()]), Listener::None);
    }

    proptest! {
        #[test]
        fn odd_lines_are_no_process(line in "[0-9 ()a-zA-Z-]{0,80}") {
            if let Some(process) = parse_stat(&line) {
                prop_assert!(line.starts_with(&process.pid.to_string()) || line.starts_with('0'));
            }
        }
    }
}
