//! vLLM processes that are none of this agent's: reported, never touched.
//!
//! They hold GPU memory and ports that the control plane takes for free. Found by their names: vLLM renames its processes
//! (`VLLM::EngineCore`, `VLLM::Worker_TP0`), and its server is `vllm serve`, or Python running it. What runs for another
//! agent's state folder is foreign too, and says so.
//!
//! Of a command line only the model is told: others may hold keys.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt,
    sync::{Arc, Mutex, PoisonError},
};

use nix::unistd::{Uid, User};
use penstock_proto::v1;

use crate::engine::{
    adopt,
    command::STATE_DIR_VARIABLE,
    context::Context,
    procfs::{self, Proc},
};

/// Most that are reported.
const MOST: usize = 64;
/// Longest text out of a command line.
const LONGEST: usize = 200;
/// Clock ticks in a second, as `/proc` tells them to programs on every architecture that vLLM runs on.
const TICKS: u64 = 100;

/// What was found last.
#[derive(Debug, Default)]
pub(crate) struct Foreign {
    found: Mutex<Arc<Vec<v1::ForeignProcess>>>,
}

impl Foreign {
    /// What was found last.
    pub(crate) fn all(&self) -> Vec<v1::ForeignProcess> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).to_vec()
    }

    /// Takes the place of what was found before. What of it is new.
    pub(crate) fn replace(&self, found: Vec<v1::ForeignProcess>) -> Vec<v1::ForeignProcess> {
        let mut known = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let before: BTreeSet<u32> = known.iter().map(|process| process.pid).collect();
        let new = found.iter().filter(|process| !before.contains(&process.pid)).cloned().collect();
        *known = Arc::new(found);
        new
    }
}

/// What a process of vLLM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Server,
    EngineCore,
    Worker,
    Other,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::EngineCore => "engine_core",
            Self::Worker => "worker",
            Self::Other => "other",
        }
    }
}

/// What a process is by its name and command line, and the model it was started for, if it says; None: it is not vLLM.
fn kind(comm: &str, args: &[String]) -> Option<(Kind, String)> {
    let first = args.first().map_or("", String::as_str);
    if let Some(role) = [first, comm].into_iter().find_map(|name| name.strip_prefix("VLLM::")) {
        // `comm` is cut after 15 characters.
        let kind = match role {
            _ if role.starts_with("EngineCor") => Kind::EngineCore,
            _ if role.starts_with("Worker") => Kind::Worker,
            _ if role.starts_with("APIServer") || role.starts_with("ApiServer") => Kind::Server,
            _ => Kind::Other,
        };
        return Some((kind, String::new()));
    }
    let module = args
        .windows(2)
        .any(|pair| matches!(pair, [m, module] if m == "-m" && module.starts_with("vllm.entrypoints.")));
    if module {
        let at = args.iter().position(|arg| arg == "--model");
        let model = at.and_then(|at| args.get(at + 1)).cloned().unwrap_or_default();
        return Some((Kind::Server, model));
    }
    // `vllm serve MODEL`, or the interpreter running the script `vllm`.
    let base = |arg: &String| arg.rsplit('/').next().is_some_and(|name| name == "vllm");
    let at = args.iter().take(3).position(base)?;
    (args.get(at + 1)? == "serve").then(|| {
        let model = args.get(at + 2).filter(|arg| !arg.starts_with('-')).cloned().unwrap_or_default();
        (Kind::Server, model)
    })
}

/// Looks at every process of the machine. Blocks.
pub(crate) fn look(cx: &Context) -> Vec<v1::ForeignProcess> {
    // Those whose main process runs are known by group and session also where their marks cannot be read.
    let groups: BTreeSet<i32> = cx.board.all().iter().map(|view| view.pid).filter(|pid| *pid > 0).collect();
    let seen = adopt::look(&cx.state, &cx.cgroups).into_iter();
    let others = seen.filter(|s| s.stem.is_none() && !s.process.is_dead()).map(|s| s.process);
    let others = others.filter(|p| !groups.contains(&p.pgrp) && !groups.contains(&p.session));
    let gpus = cx.gpus.borrow().gpus.clone();
    let held = |pid: u32| {
        let holds = |gpu: &&v1::Gpu| gpu.processes.iter().any(|process| process.pid == pid);
        gpus.iter().filter(holds).map(|gpu| gpu.uuid.clone()).collect()
    };
    let told = others.filter_map(describe).take(MOST);
    told.map(|process| v1::ForeignProcess { gpu_uuids: held(process.pid), ..process }).collect()
}

fn describe(process: Proc) -> Option<v1::ForeignProcess> {
    let pid = process.pid;
    let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).ok();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let comm = text(read("comm")?);
    let arguments = text(read("cmdline").unwrap_or_default());
    let args: Vec<String> = arguments.split('\0').take(64).map(str::to_owned).collect();
    let (kind, model) = kind(comm.trim_end(), &args)?;
    let uid = fs::metadata(format!("/proc/{pid}")).map(|m| m.uid()).ok()?;
    let named = User::from_uid(Uid::from_raw(uid)).ok().flatten().map(|user| user.name);
    let [state_dir] = procfs::environment(pid, [STATE_DIR_VARIABLE]);
    Some(v1::ForeignProcess {
        pid: u32::try_from(pid).unwrap_or_default(),
        kind: kind.name().into(),
        model: clean(&model),
        user: named.unwrap_or_else(|| uid.to_string()),
        age_s: uptime_s().saturating_sub(process.start_ticks / TICKS),
        rss_mib: text(read("status").unwrap_or_default()).lines().find_map(rss_mib).unwrap_or_default(),
        port: procfs::listening_port(pid).map(u32::from).unwrap_or_default(),
        gpu_uuids: Vec::new(),
        state_dir: clean(&state_dir.unwrap_or_default()),
    })
}

fn clean(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(LONGEST).collect()
}

/// Out of "VmRSS:    905929 kB".
fn rss_mib(line: &str) -> Option<u64> {
    let kib: u64 = line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib / 1024)
}

fn uptime_s() -> u64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split('.').next().and_then(|seconds| seconds.parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is(comm: &str, args: &[&str]) -> Option<(&'static str, String)> {
        let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
        kind(comm, &args).map(|(kind, model)| (kind.name(), model))
    }

    #[test]
    fn vllm_is_known_by_its_names_and_nothing_else_is_taken_for_it() {
        let model = |kind, model: &str| Some((kind, model.to_owned()));
        assert_eq!(is("VLLM::EngineCor", &["VLLM::EngineCore", ""]), model("engine_core", ""));
        assert_eq!(is("VLLM::EngineCor", &[]), model("engine_core", ""));
        assert_eq!(is("python3", &["VLLM::Worker_TP1"]), model("worker", ""));
        assert_eq!(is("VLLM::DPCoordin", &["VLLM::DPCoordinator"]), model("other", ""));
        let serve = ["/usr/bin/python3", "/venv/bin/vllm", "serve", "/models/x", "--api-key", "secret"];
        assert_eq!(is("vllm", &serve), model("server", "/models/x"));
        assert_eq!(is("vllm", &["vllm", "serve", "--port", "1"]), model("server", ""));
        let module = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", "org/m"];
        assert_eq!(is("python", &module), model("server", "org/m"));
        assert_eq!(is("vllm", &["vllm", "bench", "serve"]), None);
        assert_eq!(is("grep", &["grep", "-r", "x", "vllm", "serve"]), None);
        assert_eq!(is("vim", &["vim", "vllm"]), None);
        assert_eq!(is("", &[]), None);
    }

    #[test]
    fn figures_are_read() {
        assert_eq!(rss_mib("VmRSS:\t  905929 kB"), Some(884));
        assert_eq!(rss_mib("VmSize:\t  905929 kB"), None);
        assert!(uptime_s() > 0);
        assert_eq!(clean("a\u{1b}b\n"), "ab");
    }

    #[test]
    fn only_what_is_new_is_told_again() {
        let foreign = Foreign::default();
        let process = |pid| v1::ForeignProcess { pid, ..Default::default() };
        assert_eq!(foreign.replace(vec![process(1), process(2)]).len(), 2);
        assert_eq!(foreign.replace(vec![process(2), process(3)]), [process(3)]);
        assert_eq!(foreign.all().len(), 2);
    }
}
