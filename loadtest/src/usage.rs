//! What a process uses, from /proc.

use std::time::Duration;

/// A tick of the times in /proc, the same on every Linux (`USER_HZ`).
const TICK: Duration = Duration::from_millis(10);

fn read(pid: u32, file: &str) -> Result<String, String> {
    let path = format!("/proc/{pid}/{file}");
    std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}; has it ended?"))
}

/// CPU time it has used.
pub(crate) fn cpu(pid: u32) -> Result<Duration, String> {
    let stat = read(pid, "stat")?;
    // The second field, a name, may hold blanks.
    let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ');
    let ticks: u32 = fields.skip(11).take(2).filter_map(|field| field.parse::<u32>().ok()).sum();
    Ok(TICK * ticks)
}

/// Memory that is in RAM, in bytes.
pub(crate) fn memory(pid: u32) -> Result<u64, String> {
    let status = read(pid, "status")?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.unwrap_or_default() * 1_024)
}
