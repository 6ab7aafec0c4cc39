//! CPU time and memory of a process and everything below it.
//!
//! A gateway may be one process or many (nginx's and LiteLLM's workers), and workers may come and go. So its CPU time is
//! that of the whole tree, of children that have ended too: those their parents have waited for are in the parents'
//! `cutime` and `cstime`. What ends detached from the tree is lost; none of the peers does that.
//!
//! Those times are told in hundredths of a second. The scheduler tells those of living threads in nanoseconds, so the
//! difference of two looks is taken from there, unless threads have ended in between: then the two do not agree.
//!
//! Memory is PSS, in which a page that several processes share counts once; where the kernel does not tell it, RSS.

use std::{collections::BTreeSet, path::Path, time::Duration};

/// A tick of the times in /proc, the same on every Linux (`USER_HZ`).
const TICK: Duration = Duration::from_millis(10);

/// What /proc/PID/stat says of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stat {
    pid: u32,
    parent: u32,
    /// Of itself and of the children that it has waited for.
    ticks: u64,
}

impl Stat {
    /// Reads the one line of /proc/PID/stat.
    fn parse(line: &str) -> Option<Self> {
        let pid = line.split(' ').next()?.parse().ok()?;
        // The second field, a name, may hold blanks and parentheses.
        let mut fields = line.rsplit_once(") ")?.1.split(' ');
        let parent = fields.nth(1)?.parse().ok()?;
        // utime, stime, cutime, cstime: fields 14 to 17, and two of those behind the name are taken.
        let times = fields.skip(9).take(4).map(|field| field.parse::<u64>().ok());
        let times: Vec<u64> = times.collect::<Option<_>>()?;
        (times.len() == 4).then(|| Self { pid, parent, ticks: times.iter().sum() })
    }
}

/// `root` and all below it, as far as they are in `all`.
fn members(all: &[Stat], root: u32) -> Vec<Stat> {
    let mut found: Vec<Stat> = all.iter().copied().filter(|stat| stat.pid == root).collect();
    let mut seen = BTreeSet::from([root]);
    let mut next = 0;
    while let Some(parent) = found.get(next).map(|stat| stat.pid) {
        next += 1;
        for stat in all.iter().filter(|stat| stat.parent == parent) {
            if seen.insert(stat.pid) {
                found.push(*stat);
            }
        }
    }
    found
}

/// CPU time of the members.
fn cpu_of(members: &[Stat]) -> Duration {
    let ticks: u64 = members.iter().map(|stat| stat.ticks).sum();
    TICK * u32::try_from(ticks).unwrap_or(u32::MAX)
}

/// What a tree had used when it was looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Used {
    /// By all, those included that have ended.
    coarse: Duration,
    /// By the threads that lived.
    fine: Duration,
    processes: u32,
}

impl Used {
    /// What was used between `earlier` and this.
    pub(super) fn since(self, earlier: Self) -> Duration {
        let coarse = self.coarse.saturating_sub(earlier.coarse);
        // Two times of each process, each told too low by up to a tick, at both looks.
        let slack = TICK * 4 * self.processes.max(earlier.processes);
        match self.fine.checked_sub(earlier.fine) {
            Some(fine) if fine.abs_diff(coarse) <= slack => fine,
            _ => coarse,
        }
    }
}

/// The first number of /proc/PID/task/TID/schedstat: nanoseconds on a CPU.
fn on_cpu(schedstat: &str) -> Option<Duration> {
    schedstat.split(' ').next()?.parse().ok().map(Duration::from_nanos)
}

/// Of the living threads of a process; nothing where the kernel does not count it.
fn fine_of(pid: u32) -> Duration {
    let tasks = std::fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task"));
    let tasks = tasks.into_iter().flatten().flatten();
    tasks.filter_map(|task| on_cpu(&std::fs::read_to_string(task.path().join("schedstat")).ok()?)).sum()
}

/// The value of a line `Name:  123 kB`, in bytes.
fn kib_line(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(rest.split_whitespace().next()?.parse::<u64>().ok()? * 1_024)
}

/// The tree below a process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tree {
    pub(super) root: u32,
}

impl Tree {
    fn members(self) -> Result<Vec<Stat>, String> {
        let entries = std::fs::read_dir("/proc").map_err(|e| format!("/proc: {e}"))?;
        let pids = entries.flatten().filter(|entry| {
            entry.file_name().to_str().is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        });
        // A process that ends while the list is read is none.
        let all: Vec<Stat> = pids
            .filter_map(|entry| Stat::parse(&std::fs::read_to_string(entry.path().join("stat")).ok()?))
            .collect();
        let members = members(&all, self.root);
        if members.is_empty() { Err(format!("process {} has ended", self.root)) } else { Ok(members) }
    }

    /// Every process of it.
    pub(super) fn pids(self) -> Vec<u32> {
        self.members().unwrap_or_default().iter().map(|stat| stat.pid).collect()
    }

    /// CPU time that it has used since its beginning.
    pub(super) fn cpu(self) -> Result<Used, String> {
        let members = self.members()?;
        let fine = members.iter().map(|stat| fine_of(stat.pid)).sum();
        let processes = u32::try_from(members.len()).unwrap_or(u32::MAX);
        Ok(Used { coarse: cpu_of(&members), fine, processes })
    }

    /// Memory that is in RAM, in bytes.
    pub(super) fn memory(self) -> Result<u64, String> {
        Ok(self.members()?.iter().map(|stat| memory_of(stat.pid)).sum())
    }
}

/// Of one process; 0 if it has just ended.
fn memory_of(pid: u32) -> u64 {
    let folder = Path::new("/proc").join(pid.to_string());
    let line = |file: &str, name: &str| kib_line(&std::fs::read_to_string(folder.join(file)).ok()?, name);
    line("smaps_rollup", "Pss").or_else(|| line("status", "VmRSS")).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(pid: u32, parent: u32, times: [u64; 4]) -> Stat {
        let [utime, stime, cutime, cstime] = times;
        let line = format!(
            "{pid} (a (b) c) S {parent} 7 7 0 -1 4194560 1200 0 3 0 {utime} {stime} {cutime} {cstime} 20 0 4 0 123 456 789"
        );
        Stat::parse(&line).unwrap()
    }

    #[test]
    fn a_tree_is_a_process_and_all_below_it_with_what_has_ended() {
        let all = [
            stat(1, 0, [900, 0, 0, 0]),
            stat(10, 1, [1, 2, 30, 40]),
            // Listed before its parent.
            stat(12, 11, [1_000, 0, 0, 0]),
            stat(11, 10, [100, 200, 0, 0]),
            stat(20, 1, [5_000, 0, 0, 0]),
        ];
        let pids = |root| members(&all, root).iter().map(|stat| stat.pid).collect::<Vec<_>>();
        assert_eq!(pids(10), [10, 11, 12]);
        assert_eq!(pids(20), [20]);
        assert!(pids(99).is_empty());
        assert_eq!(cpu_of(&members(&all, 10)), Duration::from_millis(13_730));
    }

    #[test]
    fn a_process_that_is_its_own_parent_ends_the_search() {
        assert_eq!(members(&[stat(5, 5, [1, 0, 0, 0])], 5).len(), 1);
    }

    #[test]
    fn what_is_no_stat_line_is_none() {
        for line in ["", "x (y) S 1", "5 (y", "5 (y) S 1 2 3 4 5 6 7 8 9 10 11 12 x 14 15 16"] {
            assert_eq!(Stat::parse(line), None, "{line}");
        }
    }

    #[test]
    fn nanoseconds_count_unless_threads_have_ended() {
        let used = |coarse_ms, fine_us| Used {
            coarse: Duration::from_millis(coarse_ms),
            fine: Duration::from_micros(fine_us),
            processes: 1,
        };
        assert_eq!(used(110, 104_321).since(used(90, 91_000)), Duration::from_micros(13_321));
        // A thread took what it had used along.
        assert_eq!(used(500, 150_000).since(used(100, 99_000)), Duration::from_millis(400));
        assert_eq!(used(500, 50_000).since(used(100, 99_000)), Duration::from_millis(400));
        // A kernel that does not count.
        assert_eq!(used(500, 0).since(used(100, 0)), Duration::from_millis(400));
        assert_eq!(on_cpu("123456 789 10\n"), Some(Duration::from_nanos(123_456)));
        assert_eq!(on_cpu(""), None);
    }

    #[test]
    fn pss_is_not_a_line_that_begins_alike() {
        let text = "5500-7fff ---p 00000000 00:00 0    [rollup]\nRss:  9 kB\nPss_Dirty:  3 kB\nPss:   7 kB\n";
        assert_eq!(kib_line(text, "Pss"), Some(7 * 1_024));
        assert_eq!(kib_line(text, "Swap"), None);
    }

    #[test]
    fn this_process_has_used_cpu_and_memory() {
        let tree = Tree { root: std::process::id() };
        assert!(tree.pids().contains(&std::process::id()));
        assert!(tree.memory().unwrap() > 1 << 20);
        let earlier = tree.cpu().unwrap();
        assert!(earlier.processes >= 1);
        assert!(tree.cpu().unwrap().since(earlier) < Duration::from_secs(60));
        assert!(Tree { root: u32::MAX }.cpu().unwrap_err().contains("has ended"));
    }
}
