//! The machine that the figures are of.

use std::{fs::read_to_string, time::SystemTime};

use serde::{Deserialize, Serialize};

/// What the figures depend on and the reader cannot see.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Machine {
    pub(super) date: String,
    pub(super) cpu: String,
    pub(super) cores: usize,
    pub(super) memory_gib: f64,
    pub(super) kernel: String,
    /// Average of the last minute before the run began: what else was going on.
    pub(super) load_before: f64,
    pub(super) open_files: u64,
}

impl Machine {
    /// This one, now.
    pub(super) fn look(now: SystemTime, open_files: u64) -> Self {
        let read = |path| read_to_string(path).unwrap_or_default();
        Self {
            date: httpdate::fmt_http_date(now),
            cpu: cpu(&read("/proc/cpuinfo")),
            cores: std::thread::available_parallelism().map_or(0, |cores| cores.get()),
            memory_gib: memory_gib(&read("/proc/meminfo")),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load_before: load(&read("/proc/loadavg")),
            open_files,
        }
    }

    /// One line.
    pub(super) fn text(&self) -> String {
        format!(
            "{}: {} × {}, {:.0} GiB, Linux {}, load average {:.2} before it began, {} open files allowed",
            self.date, self.cores, self.cpu, self.memory_gib, self.kernel, self.load_before, self.open_files
        )
    }
}

fn cpu(cpuinfo: &str) -> String {
    let named = |key: &str| {
        let (_, value) = cpuinfo.lines().find(|line| line.starts_with(key))?.split_once(':')?;
        Some(value.trim().to_owned())
    };
    // Arm's kernels name parts by number only.
    named("model name").or_else(|| named("CPU part")).unwrap_or_else(|| "unknown CPU".into())
}

fn memory_gib(meminfo: &str) -> f64 {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    kib.unwrap_or_default() / f64::from(1 << 20)
}

fn load(loadavg: &str) -> f64 {
    loadavg.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_proc_says_becomes_one_line() {
        let machine = Machine {
            date: httpdate::fmt_http_date(SystemTime::UNIX_EPOCH),
            cpu: cpu("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n"),
            cores: 2,
            memory_gib: memory_gib("MemTotal:       24672132 kB\nMemFree: 1 kB\n"),
            kernel: "6.1.0".into(),
            load_before: load("0.25 0.5 0.75 1/234 5678\n"),
            open_files: 20_000,
        };
        assert_eq!(
            machine.text(),
            "Thu, 01 Jan 1970 00:00:00 GMT: 2 × Some CPU @ 3 GHz, 24 GiB, Linux 6.1.0, load average 0.25 before it began, \
             20000 open files allowed"
        );
        assert_eq!((cpu(""), memory_gib(""), load("")), ("unknown CPU".into(), 0.0, 0.0));
    }
}
