//! A cgroup (v2) for each engine: which processes are its own, a kill that nothing escapes, its memory, and whether the
//! kernel ended any of it for want of memory.
//!
//! ```text
//! HOME/penstock-HASH/           made by this agent; HASH is of its state folder, so that agents do not meet
//!          engine-STEM/         one for each replica, removed when nothing of its engine is left
//! ```
//!
//! HOME is the agent's own cgroup, or what the settings name. An agent that is alone in it goes to HOME/agent first, because
//! the kernel gives a cgroup's children memory accounting only where the cgroup has no process itself; one that a service
//! manager has put into HOME/agent finds HOME above. Whatever cannot be had is done without, said once: process group,
//! session and the marks in the environment own the processes as before.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use crate::state::hash;

/// Where an agent goes that would else stand in its engines' way.
const AGENT: &str = "agent";
const ENGINE: &str = "engine-";

/// Where engines' cgroups are made.
#[derive(Debug, Default)]
pub(crate) struct Cgroups {
    base: Option<PathBuf>,
    limit: Option<u64>,
}

/// The cgroup of one engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cgroup {
    dir: PathBuf,
}

/// What the kernel has counted of an engine's memory; absent where it does not count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    /// In use, in bytes.
    pub(crate) current: Option<u64>,
    /// Most that was in use, in bytes.
    pub(crate) peak: Option<u64>,
    /// Processes of it that the kernel ended for want of memory.
    pub(crate) oom_kills: Option<u64>,
}

impl Cgroups {
    /// As the setting `engines.cgroup` says: "auto", "off", or the path of a cgroup. `limit_mib`: each engine's most
    /// memory; 0: none.
    ///
    /// # Errors
    /// A sentence: a cgroup or a limit was asked for, and cannot be had.
    pub(crate) fn open(setting: &str, state_dir: &Path, limit_mib: u64) -> Result<Self, String> {
        let limit = (limit_mib > 0).then(|| limit_mib.saturating_mul(1 << 20));
        let unlimited = |why: &str| match limit {
            Some(_) => Err(format!("engines.memory_max_mib is {limit_mib}, and cannot be kept to: {why}")),
            None => Ok(Self::default()),
        };
        let name = format!("penstock-{:016x}", hash(&state_dir.to_string_lossy()));
        let (base, memory) = match setting {
            "off" => return unlimited("engines.cgroup is \"off\""),
            "auto" => match own().and_then(|own| make(&homes(&own), &name)) {
                Ok(made) => made,
                Err(why) => {
                    tracing::info!(
                        "no cgroups for engines ({why}); process groups and sessions own their processes"
                    );
                    return unlimited(&why);
                }
            },
            path => make(&[PathBuf::from(path)], &name).map_err(|why| {
                format!("engines.cgroup is {path:?}, and engines get no cgroups there: {why}")
            })?,
        };
        if !memory {
            let why =
                "the kernel does not count memory there (no memory controller, or other processes are in it)";
            if limit.is_some() {
                fs::remove_dir(&base).ok();
                return unlimited(why);
            }
            tracing::info!(base = %base.display(), "engines get cgroups, but no memory accounting: {why}");
        }
        tracing::info!(base = %base.display(), memory, "each engine gets a cgroup");
        Ok(Self { base: Some(base), limit })
    }

    /// A cgroup for the replica with this file stem: a new one, or what an earlier life left. None where there are none,
    /// or it cannot be made, which is logged.
    pub(crate) fn make(&self, stem: &str) -> Option<Cgroup> {
        let dir = self.base.as_ref()?.join(format!("{ENGINE}{stem}"));
        let made = fs::create_dir(&dir).or_else(|e| match e.kind() {
            io::ErrorKind::AlreadyExists => Ok(()),
            _ => Err(e),
        });
        let limited = made.and_then(|()| match self.limit {
            Some(limit) => {
                // One that is over it ends whole: half an engine is worse than none.
                fs::write(dir.join("memory.max"), limit.to_string())?;
                fs::write(dir.join("memory.oom.group"), "1")
            }
            None => Ok(()),
        });
        match limited {
            Ok(()) => Some(Cgroup { dir }),
            Err(error) => {
                tracing::warn!(dir = %dir.display(), %error, "an engine gets no cgroup");
                None
            }
        }
    }

    /// The cgroup that the replica with this file stem has.
    pub(crate) fn find(&self, stem: &str) -> Option<Cgroup> {
        let dir = self.base.as_ref()?.join(format!("{ENGINE}{stem}"));
        dir.is_dir().then_some(Cgroup { dir })
    }

    /// Who is in which replica's cgroup: file stems by pid.
    pub(crate) fn tied(&self) -> BTreeMap<i32, String> {
        let stems = self.all().into_iter().map(|(stem, cgroup)| (cgroup.members(), stem));
        stems.flat_map(|(pids, stem)| pids.into_iter().map(move |pid| (pid, stem.clone()))).collect()
    }

    /// Removes cgroups that nobody is in, but those of `keep`.
    pub(crate) fn sweep(&self, keep: impl Fn(&str) -> bool) {
        for (stem, cgroup) in self.all() {
            if !keep(&stem) && cgroup.members().is_empty() {
                fs::remove_dir(&cgroup.dir).ok();
            }
        }
    }

    /// Removes what this agent made, if nothing is in it.
    pub(crate) fn close(&self) {
        self.sweep(|_| false);
        if let Some(base) = &self.base {
            fs::remove_dir(base).ok();
        }
    }

    fn all(&self) -> Vec<(String, Cgroup)> {
        let Some(entries) = self.base.as_ref().and_then(|base| fs::read_dir(base).ok()) else {
            return Vec::new();
        };
        let cgroup = |entry: io::Result<fs::DirEntry>| {
            let dir = entry.ok()?.path();
            let stem = dir.file_name()?.to_str()?.strip_prefix(ENGINE)?.to_owned();
            dir.is_dir().then_some((stem, Cgroup { dir }))
        };
        entries.filter_map(cgroup).collect()
    }
}

impl Cgroup {
    /// One that an earlier agent has noted, if it is there.
    pub(crate) fn find(dir: &str) -> Option<Self> {
        let dir = PathBuf::from(dir);
        (dir.is_absolute() && dir.join("cgroup.procs").is_file()).then_some(Self { dir })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.dir
    }

    /// Puts a process into it.
    pub(crate) fn add(&self, pid: i32) -> io::Result<()> {
        fs::write(self.dir.join("cgroup.procs"), pid.to_string())
    }

    /// Who is in it; the dead are not.
    pub(crate) fn members(&self) -> Vec<i32> {
        let text = fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// SIGKILL to all of it at once. Whether the kernel can.
    pub(crate) fn kill(&self) -> bool {
        fs::write(self.dir.join("cgroup.kill"), "1").is_ok()
    }

    /// Its memory.
    pub(crate) fn memory(&self) -> Memory {
        let read = |file: &str| fs::read_to_string(self.dir.join(file)).ok();
        Memory {
            current: read("memory.current").and_then(|text| text.trim().parse().ok()),
            peak: read("memory.peak").and_then(|text| text.trim().parse().ok()),
            oom_kills: read("memory.events").and_then(|text| counter(&text, "oom_kill")),
        }
    }

    /// Removes it.
    ///
    /// # Errors
    /// Somebody is still in it.
    pub(crate) fn remove(&self) -> io::Result<()> {
        match fs::remove_dir(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// Processes that the kernel has ended for want of memory on this machine since it started, by whatever limit.
pub(crate) fn machine_oom_kills() -> Option<u64> {
    counter(&fs::read_to_string("/proc/vmstat").ok()?, "oom_kill")
}

/// The number behind `name` in lines of "NAME NUMBER".
fn counter(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

/// The folder of the cgroup that this process is in.
fn own() -> Result<PathBuf, String> {
    let read = |path: &str| fs::read_to_string(path).map_err(|e| format!("{path} cannot be read: {e}"));
    let (mounts, own) = (read("/proc/self/mountinfo")?, read("/proc/self/cgroup")?);
    folder(&mounts, &own).ok_or_else(|| "there is no cgroup v2 file system".to_owned())
}

/// Mount point and path, out of the text of `/proc/self/mountinfo` and `/proc/self/cgroup`.
fn folder(mounts: &str, own: &str) -> Option<PathBuf> {
    let path = own.lines().find_map(|line| line.strip_prefix("0::"))?;
    mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let fields: Vec<&str> = mount.split(' ').collect();
        let (root, point) = (*fields.get(3)?, *fields.get(4)?);
        let below = Path::new(path).strip_prefix(root).ok()?;
        (kind.split(' ').next()? == "cgroup2").then(|| Path::new(point).join(below).components().collect())
    })
}

/// Where engines' cgroups may go, the best first.
fn homes(own: &Path) -> Vec<PathBuf> {
    let above = own.parent().filter(|_| own.file_name().is_some_and(|name| name == AGENT));
    above.into_iter().chain([own]).map(Path::to_path_buf).collect()
}

/// Makes `name` in the first of `homes` where that can be done, and has memory counted there if that can be done too.
fn make(homes: &[PathBuf], name: &str) -> Result<(PathBuf, bool), String> {
    let mut why = "there is no home for them".to_owned();
    for home in homes {
        let base = home.join(name);
        if !home.join("cgroup.procs").is_file() {
            why = format!("{} is no cgroup of version 2", home.display());
            continue;
        }
        match fs::create_dir(&base) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                why = format!("{} cannot be made: {error}", base.display());
            }
            _ => {
                let memory = count_memory(home) && count_memory(&base);
                return Ok((base, memory));
            }
        }
    }
    Err(why)
}

/// Has the memory of a cgroup's children counted. Whether it is.
fn count_memory(home: &Path) -> bool {
    let lists = |file: &str| {
        fs::read_to_string(home.join(file))
            .is_ok_and(|text| text.split_ascii_whitespace().any(|c| c == "memory"))
    };
    let enable = || fs::write(home.join("cgroup.subtree_control"), "+memory").is_ok();
    if lists("cgroup.subtree_control") {
        return true;
    }
    if !lists("cgroup.controllers") {
        return false;
    }
    enable() || (step_aside(home) && enable())
}

/// Takes this process out of the way, if it alone is in it. Whether it did.
fn step_aside(home: &Path) -> bool {
    let (here, agent) = (Cgroup { dir: home.to_path_buf() }, Cgroup { dir: home.join(AGENT) });
    let own = super::procfs::raw_pid(std::process::id());
    here.members() == [own]
        && (agent.dir.is_dir() || fs::create_dir(&agent.dir).is_ok())
        && agent.add(own).is_ok()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A cgroup of a test's own, and what removes it in the end; None, with the reason printed, where there can be none.
    pub(crate) fn one(test: &str) -> Option<(Home, Cgroup)> {
        let state = format!("/{test}/{}", std::process::id());
        let cgroups = Cgroups::open("auto", Path::new(&state), 0).unwrap();
        let Some(cgroup) = cgroups.make("m-0") else {
            println!("skipped: no cgroup (v2) can be made here");
            return None;
        };
        Some((Home(cgroups), cgroup))
    }

    pub(crate) struct Home(pub(crate) Cgroups);

    impl Drop for Home {
        fn drop(&mut self) {
            self.0.close();
        }
    }

    #[test]
    fn the_own_cgroup_is_found_on_pure_and_mixed_machines_and_in_containers() {
        let pure = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";
        let find = |mounts: &str, own: &str| folder(mounts, own).map(|p| p.display().to_string());
        assert_eq!(
            find(pure, "0::/system.slice/penstock-agent.service\n").as_deref(),
            Some("/sys/fs/cgroup/system.slice/penstock-agent.service")
        );
        let mixed = "31 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                     32 30 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw";
        assert_eq!(find(mixed, "4:memory:/x\n0::/\n").as_deref(), Some("/sys/fs/cgroup/unified"));
        let contained = "40 1 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw";
        assert_eq!(find(contained, "0::/docker/abc").as_deref(), Some("/sys/fs/cgroup"));
        assert_eq!(find(contained, "0::/elsewhere"), None);
        assert_eq!(find("31 30 0:27 / /sys/fs/cgroup rw - cgroup cgroup rw", "4:memory:/x"), None);
    }

    #[test]
    fn a_service_managers_subgroup_of_the_agent_is_left_for_what_is_above() {
        assert_eq!(homes(Path::new("/c/unit/agent")), [Path::new("/c/unit"), Path::new("/c/unit/agent")]);
        assert_eq!(homes(Path::new("/c/unit")), [Path::new("/c/unit")]);
    }

    #[test]
    fn counters_are_read_by_their_whole_name() {
        let events = "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(counter(events, "oom_kill"), Some(2));
        assert_eq!(counter(events, "oom"), Some(3));
        assert_eq!(counter("", "oom"), None);
        assert!(machine_oom_kills().is_some());
    }

    #[test]
    fn what_was_asked_for_and_cannot_be_had_is_an_error_and_auto_is_none() {
        let state = Path::new("/a/state");
        assert!(Cgroups::open("off", state, 0).unwrap().make("m-0").is_none());
        let error = Cgroups::open("/no/such", state, 0).unwrap_err();
        assert!(
            error.contains("engines.cgroup is \"/no/such\"") && error.contains("no cgroup of version 2"),
            "{error}"
        );
        let error = Cgroups::open("off", state, 7).unwrap_err();
        assert!(error.contains("engines.memory_max_mib is 7"), "{error}");
    }

    #[test]
    fn a_cgroup_is_made_tied_to_its_replica_and_removed() {
        let Some((home, cgroup)) = one("cgroup") else { return };
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let pid = super::super::procfs::raw_pid(child.id());
        cgroup.add(pid).unwrap();
        assert_eq!(cgroup.members(), [pid]);
        assert_eq!(home.0.tied(), BTreeMap::from([(pid, "m-0".to_owned())]));
        assert_eq!(Cgroup::find(cgroup.path().to_str().unwrap()), Some(cgroup.clone()));
        assert!(cgroup.remove().is_err(), "somebody is in it");
        home.0.sweep(|_| false);
        assert!(cgroup.path().is_dir());
        if !cgroup.kill() {
            child.kill().unwrap();
        }
        child.wait().unwrap();
        cgroup.remove().unwrap();
        assert_eq!(Cgroup::find(cgroup.path().to_str().unwrap()), None);
    }
}
