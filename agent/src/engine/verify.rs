//! Memory of GPUs before and after an engine: is it all given back, and is there enough for the next one.
//!
//! A process that is gone from `/proc` may still hold memory as the driver sees it, for a moment or, stuck in the kernel,
//! for ever. A stop therefore ends only when the driver lists no process of the engine any more, or after
//! `gpus.release_ms`, and then it says loudly what is left. An engine for which there is not enough memory is not started
//! to fail in a loop: it fails with a sentence that names who holds the memory.
//!
//! Only what can be told is judged: a driver that does not name processes (as in a container with process ids of its own)
//! holds up no stop, and an engine whose share of the memory is not known is started.

use std::{collections::BTreeSet, time::Duration};

use penstock_proto::v1;
use tokio::time::{Instant, sleep};

use super::{context::Context, process::Tree};
use crate::{assignment::Assignment, gpu::GpuReport, state::stem};

/// Between two looks at what an ended engine still holds.
const POLL: Duration = Duration::from_millis(250);
/// Longest wait for one reading.
const READING: Duration = Duration::from_secs(2);
/// What vLLM takes of each GPU unless it is told otherwise.
const VLLM_SHARE: f64 = 0.9;
/// Less memory than an engine asks for is told by the engine itself; much less is not worth a start. In percent of the GPU.
const TOLERANCE: f64 = 5.0;

/// The engine's processes, for [`released`] after they have ended.
pub(crate) fn pids(tree: &mut Tree) -> BTreeSet<u32> {
    tree.members().iter().filter_map(|process| u32::try_from(process.pid).ok()).collect()
}

/// Waits, at most `gpus.release_ms`, until the driver lists none of the replica's processes (or of `pids`) any more.
pub(crate) async fn released(cx: &Context, replica_id: &str, pids: &BTreeSet<u32>) {
    let longest = Duration::from_millis(cx.gpu_config.release_ms);
    let begun = Instant::now();
    let mut told = false;
    loop {
        let Some(report) = cx.gpus.fresh(READING).await else { return };
        let left = held_by(&report, replica_id, pids);
        if left.is_empty() {
            return;
        }
        if begun.elapsed() >= longest {
            cx.metrics.gpu_leftovers.inc();
            tracing::error!(
                replica = replica_id,
                "the engine has ended and its memory was not given back within {} ms: {}",
                longest.as_millis(),
                left.join(", ")
            );
            return;
        }
        if !std::mem::replace(&mut told, true) {
            let reason = format!("ended; waits for its memory: {}", left.join(", "));
            tracing::info!(replica = replica_id, "{reason}");
            cx.board.update(replica_id, |view| view.reason = reason);
        }
        sleep(POLL).await;
    }
}

/// What the replica still holds, in words.
fn held_by(report: &GpuReport, replica_id: &str, pids: &BTreeSet<u32>) -> Vec<String> {
    let own = |process: &v1::GpuProcess| {
        pids.contains(&process.pid)
            || process.replica_id == replica_id
            || (!process.replica_id.is_empty() && process.replica_id == stem(replica_id))
    };
    let all = report.gpus.iter().flat_map(|gpu| gpu.processes.iter().map(move |process| (gpu, process)));
    all.filter(|(_, process)| own(process)).map(|(gpu, process)| holding(gpu, process)).collect()
}

fn holding(gpu: &v1::Gpu, process: &v1::GpuProcess) -> String {
    let mib = process.used_mib.map_or_else(|| "memory".into(), |mib| format!("{mib} MiB"));
    format!("pid {} holds {mib} of GPU {}", process.pid, gpu.uuid)
}

/// The share of each GPU that an engine of this command line takes, where that is known.
pub(crate) fn memory_share(argv: &[String]) -> Option<f64> {
    const OPTION: &str = "--gpu-memory-utilization";
    let mut share = None;
    for (at, arg) in argv.iter().enumerate() {
        let (name, value) = arg.split_once('=').unwrap_or((arg, ""));
        if name.replace('_', "-") == OPTION {
            let value = if arg.contains('=') { Some(value) } else { argv.get(at + 1).map(String::as_str) };
            share = value.and_then(|value| value.parse::<f64>().ok()).filter(|s| (0.0..=1.0).contains(s));
        }
    }
    share
}

/// Why an engine of this command line would not fit on its GPUs at the moment, as far as that can be told.
pub(crate) async fn lacks(cx: &Context, assignment: &Assignment, argv: &[String]) -> Option<String> {
    if !cx.gpu_config.memory_check || assignment.gpu_uuids.is_empty() {
        return None;
    }
    let usual = (assignment.spec.engine == "vllm").then_some(VLLM_SHARE);
    let share = memory_share(argv).or(usual)?;
    let report = cx.gpus.fresh(READING).await?;
    lacks_in(&report, &assignment.gpu_uuids, share)
}

fn lacks_in(report: &GpuReport, gpu_uuids: &[String], share: f64) -> Option<String> {
    let full = |gpu: &&v1::Gpu| {
        let total = mib(gpu.memory_total_mib);
        let free = mib(gpu.memory_total_mib.saturating_sub(gpu.memory_used_mib));
        gpu_uuids.contains(&gpu.uuid) && total > 0.0 && free + total * TOLERANCE / 100.0 < total * share
    };
    let gpu = report.gpus.iter().find(full)?;
    let who = |process: &v1::GpuProcess| {
        let owner = match process.replica_id.as_str() {
            "" => "not of this agent",
            replica => replica,
        };
        let mib = process.used_mib.map_or_else(|| "some".into(), |mib| format!("{mib} MiB"));
        format!("pid {} ({owner}): {mib}", process.pid)
    };
    let mut holders: Vec<String> = gpu.processes.iter().map(who).collect();
    if holders.is_empty() {
        holders.push("the driver does not say by whom".into());
    }
    let free = gpu.memory_total_mib.saturating_sub(gpu.memory_used_mib);
    Some(format!(
        "not started: GPU {} has {free} of {} MiB free and the engine takes {:.0} % of it; in use by {}",
        gpu.uuid,
        gpu.memory_total_mib,
        share * 100.0,
        holders.join(", ")
    ))
}

/// Memory of a GPU is far below 2^52 MiB.
#[allow(clippy::cast_precision_loss)]
fn mib(mib: u64) -> f64 {
    mib as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::GpuKind;

    fn report(used_mib: u64, processes: &[(u32, u64, &str)]) -> GpuReport {
        let process = |(pid, mib, replica): &(u32, u64, &str)| v1::GpuProcess {
            pid: *pid,
            used_mib: Some(*mib),
            replica_id: (*replica).to_owned(),
        };
        let gpu = v1::Gpu {
            uuid: "g".into(),
            memory_total_mib: 1_000,
            memory_used_mib: used_mib,
            processes: processes.iter().map(process).collect(),
            ..v1::Gpu::default()
        };
        GpuReport { gpus: vec![gpu], ..GpuReport::empty(GpuKind::Nvml, "") }
    }

    #[test]
    fn the_share_is_the_last_that_the_command_line_gives() {
        let share = |args: &[&str]| memory_share(&args.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>());
        assert_eq!(share(&["serve", "m", "--gpu-memory-utilization", "0.5"]), Some(0.5));
        assert_eq!(share(&["--gpu_memory_utilization=0.7"]), Some(0.7));
        assert_eq!(share(&["--gpu-memory-utilization=0.7", "--gpu-memory-utilization", "0.3"]), Some(0.3));
        for odd in [&["serve"][..], &["--gpu-memory-utilization"], &["--gpu-memory-utilization=7"]] {
            assert_eq!(share(odd), None, "{odd:?}");
        }
    }

    #[test]
    fn an_engine_that_cannot_fit_is_told_who_holds_the_memory() {
        let uuids = ["g".to_owned()];
        let full = report(400, &[(7, 300, ""), (8, 100, "m-0")]);
        let reason = lacks_in(&full, &uuids, 0.9).expect("too little");
        assert_eq!(
            reason,
            "not started: GPU g has 600 of 1000 MiB free and the engine takes 90 % of it; in use by pid 7 (not of this \
             agent): 300 MiB, pid 8 (m-0): 100 MiB"
        );
        assert_eq!(lacks_in(&full, &uuids, 0.6), None);
        assert_eq!(lacks_in(&full, &uuids, 0.65), None, "nearly enough is for the engine to say");
        assert_eq!(lacks_in(&full, &["other".into()], 0.9), None);
        assert!(
            lacks_in(&report(400, &[]), &uuids, 0.9).expect("too little").contains("does not say by whom")
        );
    }

    #[test]
    fn what_an_ended_engine_holds_is_told_by_pid_and_by_mark() {
        let report = report(400, &[(7, 300, ""), (8, 100, "a/b"), (9, 5, "a%2Fb"), (10, 1, "c")]);
        let held = |pids: &[u32]| held_by(&report, "a/b", &pids.iter().copied().collect());
        assert_eq!(held(&[]), ["pid 8 holds 100 MiB of GPU g", "pid 9 holds 5 MiB of GPU g"]);
        assert_eq!(held(&[7]).len(), 3);
    }
}
