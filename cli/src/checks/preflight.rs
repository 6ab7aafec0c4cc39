//! `penstock preflight`: is this machine fit for what shall run on it? Asked before anything is installed.

use std::{path::Path, process::Stdio, time::Duration};

use penstock_config::{agent::AgentConfig, controlplane::StoreConfig};
use penstock_controlplane::store::members::{self, Member};

use super::{
    findings::{self, Finding, bytes, fail, ok, warn},
    judge, machine,
};
use crate::{
    api::ApiError,
    args::{Part, PreflightArgs},
    output::print,
};

/// `vllm --version` imports half of Python's machine learning first.
const VLLM_PATIENCE: Duration = Duration::from_secs(120);
const GIB: u64 = 1 << 30;

/// What was found out of the machine.
#[derive(Debug, Clone, Default)]
struct Facts {
    system: String,
    kernel: String,
    /// Soft and hard.
    open_files: Option<(u64, u64)>,
    somaxconn: Option<u64>,
    /// Ports that cannot be had, with who wants them and why not.
    taken: Vec<(u16, &'static str, String)>,
    etcd: Vec<Member>,
    /// The release, or why there is none; None: not asked.
    vllm: Option<Result<String, String>>,
    /// Driver and GPUs, or why there are none; None: not asked.
    gpus: Option<Result<(String, u32), String>>,
    state_dir: String,
    disk: Option<(u64, u64)>,
    writable: bool,
    memory: Option<(u64, u64)>,
    /// Size of /dev/shm.
    shared: Option<u64>,
    cgroup_v2: bool,
    parts: Vec<&'static str>,
    /// What the agent's settings want of this machine, or why they cannot be read; None: not asked.
    warm: Option<Result<Vec<penstock_agent::Check>, String>>,
}

/// The ports that a part listens on by default.
fn ports(part: Part) -> &'static [u16] {
    match part {
        Part::Proxy => &[8081, 18081],
        Part::Controlplane => &[18090, 18091],
        Part::Agent => &[18092, 10814],
    }
}

fn name(part: Part) -> &'static str {
    match part {
        Part::Proxy => "proxy",
        Part::Controlplane => "control plane",
        Part::Agent => "agent",
    }
}

pub(crate) async fn run(args: &PreflightArgs) -> Result<(), ApiError> {
    let facts = gather(args).await;
    let found = judged(&facts);
    let text = if args.json { format!("{:#}\n", findings::json(&found)) } else { findings::text(&found) };
    print(&text)?;
    findings::verdict(&found, args.strict)
}

async fn gather(args: &PreflightArgs) -> Facts {
    let every = [Part::Proxy, Part::Controlplane, Part::Agent];
    let parts: Vec<Part> =
        every.into_iter().filter(|p| args.parts.is_empty() || args.parts.contains(p)).collect();
    let for_engines = parts.contains(&Part::Agent);
    let wanted = parts.iter().flat_map(|part| ports(*part).iter().map(|port| (*port, name(*part))));
    let taken = wanted.filter_map(|(port, part)| machine::taken(port).map(|why| (port, part, why))).collect();
    let mut etcd = Vec::new();
    if !args.etcd.is_empty() {
        let settings =
            StoreConfig { kind: "etcd".into(), endpoints: args.etcd.clone(), ..StoreConfig::default() };
        etcd = members::look(&settings).await;
    }
    let vllm = if for_engines { Some(vllm(&args.vllm).await) } else { None };
    Facts {
        system: machine::distribution(),
        kernel: machine::kernel(),
        open_files: machine::open_files(),
        somaxconn: machine::number("/proc/sys/net/core/somaxconn"),
        taken,
        etcd,
        vllm,
        gpus: for_engines.then(gpus),
        state_dir: args.state_dir.display().to_string(),
        disk: machine::disk(&args.state_dir),
        writable: machine::writable(&args.state_dir),
        memory: machine::memory(),
        shared: machine::disk(Path::new("/dev/shm")).map(|(_, total)| total),
        cgroup_v2: Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
        parts: parts.into_iter().map(name).collect(),
        warm: match &args.agent_config {
            Some(file) => Some(warm(file).await),
            None => None,
        },
    }
}

async fn warm(file: &Path) -> Result<Vec<penstock_agent::Check>, String> {
    let config: AgentConfig = penstock_config::load("agent", Some(file), penstock_config::environment())
        .map_err(|error| error.to_string())?;
    config.validate()?;
    Ok(penstock_agent::preflight(&config).await)
}

/// Its release as it says.
async fn vllm(command: &str) -> Result<String, String> {
    let Some(file) = machine::command(command) else {
        return Err(format!("{command} is not there"));
    };
    let mut asked = tokio::process::Command::new(&file);
    asked.arg("--version").stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(VLLM_PATIENCE, asked.output()).await;
    let output = output
        .map_err(|_| format!("{} --version gave no answer within {VLLM_PATIENCE:?}", file.display()))?;
    let output = output.map_err(|error| format!("{} cannot be run: {error}", file.display()))?;
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        let last = complained.lines().last().unwrap_or_default();
        return Err(format!("{} --version failed ({}): {last}", file.display(), output.status));
    }
    let line = said.lines().rfind(|line| line.contains(|c: char| c.is_ascii_digit())).unwrap_or_default();
    Ok(format!("{} ({})", line.trim(), file.display()))
}

/// By NVIDIA's own library, as the agent asks.
fn gpus() -> Result<(String, u32), String> {
    let nvml = nvml_wrapper::Nvml::init().map_err(|error| error.to_string())?;
    let driver = nvml.sys_driver_version().map_err(|error| error.to_string())?;
    Ok((driver, nvml.device_count().map_err(|error| error.to_string())?))
}

fn judged(facts: &Facts) -> Vec<Finding> {
    let mut out = vec![kernel(&facts.system, &facts.kernel)];
    out.extend(facts.open_files.map(open_files));
    out.extend(facts.somaxconn.map(|most| match most {
        0..4_096 => warn(
            "listen backlog",
            format!("net.core.somaxconn is {most}: bursts of connections are refused beyond it"),
            "sysctl -w net.core.somaxconn=4096, and into /etc/sysctl.d",
        ),
        _ => ok("listen backlog", format!("net.core.somaxconn is {most}")),
    }));
    for (port, part, why) in &facts.taken {
        let advice =
            format!("`ss -tlnp 'sport = :{port}'` names who has it; or set another port for the {part}");
        out.push(fail("ports", format!("{port}, for the {part}: {why}"), advice));
    }
    if facts.taken.is_empty() {
        out.push(ok("ports", format!("free for: {}", facts.parts.join(", "))));
    }
    for Member { endpoint, says } in &facts.etcd {
        let what = format!("etcd {endpoint}");
        out.push(match says {
            Err(why) => {
                fail(&what, why.clone(), "start it, or open the way to it; with TLS use `doctor --config`")
            }
            Ok(says) if says.leader == 0 => {
                fail(&what, "it has no leader", "bring a majority of its members up")
            }
            Ok(says) => ok(&what, format!("release {}, {} members", says.version, says.members.len())),
        });
    }
    let advice = "install vLLM, or name it with --vllm; engines.vllm.command of the agent says the same";
    out.extend(facts.vllm.as_ref().map(|vllm| match vllm {
        Ok(release) => ok("vllm", release.clone()),
        Err(why) => fail("vllm", why.clone(), advice),
    }));
    out.extend(facts.gpus.as_ref().map(|gpus| match gpus {
        Ok((driver, 0)) => {
            fail("GPUs", format!("driver {driver} sees none"), "`nvidia-smi` and the kernel's log say more")
        }
        Ok((driver, count)) => ok("GPUs", format!("{count}, driver {driver}")),
        Err(why) => fail(
            "GPUs",
            format!("NVIDIA's library cannot be used: {why}"),
            "install NVIDIA's driver; without GPUs set gpus.source = \"simulated\"",
        ),
    }));
    let folder = &facts.state_dir;
    out.push(match facts.writable {
        true => ok("state folder", format!("{folder} can be written")),
        false => fail(
            "state folder",
            format!("{folder} cannot be made or written by this user"),
            format!("mkdir -p {folder} and chown it to the user that runs Penstock"),
        ),
    });
    out.extend(facts.disk.map(|(free, total)| judge::disk(folder, free, total)));
    out.extend(facts.memory.map(|(total, available)| {
        let why = format!("{} available of {}", bytes(available), bytes(total));
        match available {
            0..536_870_912 => {
                fail("memory", why, "a control plane or a proxy takes 100 to 500 MiB, an engine far more")
            }
            536_870_912..2_147_483_648 => {
                warn("memory", why, "enough for control planes and proxies, not for engines")
            }
            _ => ok("memory", why),
        }
    }));
    match &facts.warm {
        None => {}
        Some(Err(why)) => {
            out.push(fail("agent's settings", why.clone(), "config/agent.toml explains every key"))
        }
        Some(Ok(checks)) => out.extend(checks.iter().map(|check| match &check.found {
            Ok(how) => ok(&check.what, how.clone()),
            Err(why) => fail(&check.what, why.clone(), "docs/warm-starts.md says what has to agree"),
        })),
    }
    if facts.parts.contains(&"agent") {
        out.extend(facts.shared.map(|size| match size {
            size if size < GIB => warn(
                "shared memory",
                format!("/dev/shm has {}", bytes(size)),
                "vLLM with several GPUs needs more: mount it larger, or --shm-size for containers",
            ),
            size => ok("shared memory", format!("/dev/shm has {}", bytes(size))),
        }));
        out.push(match facts.cgroup_v2 {
            true => ok("cgroups", "version 2"),
            false => warn(
                "cgroups",
                "version 2 is not mounted",
                "limits of memory by systemd need it: boot with systemd.unified_cgroup_hierarchy=1",
            ),
        });
    }
    out
}

fn kernel(system: &str, release: &str) -> Finding {
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let why = format!("{system}, kernel {release}");
    match version {
        (0, 0) => fail("system", "this is no Linux", "Penstock runs on Linux"),
        version if version < (4, 18) => fail("system", why, "kernel 4.18 or newer is needed"),
        version if version < (5, 10) => warn("system", why, "it is tested on 5.10 and newer"),
        _ => ok("system", why),
    }
}

fn open_files((soft, hard): (u64, u64)) -> Finding {
    let why = format!("{soft} (may be raised to {hard})");
    let advice = "LimitNOFILE=1048576 in the systemd unit, or ulimit -n: each stream takes two files";
    match hard {
        0..4_096 => fail("open files", why, advice),
        4_096..65_536 => warn("open files", why, advice),
        _ => ok("open files", why),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::findings::Level, *};

    fn check(found: Result<String, String>) -> penstock_agent::Check {
        penstock_agent::Check { what: "engines.vllm.restore".into(), found }
    }

    fn fine() -> Facts {
        Facts {
            system: "Debian 12".into(),
            kernel: "6.1.0-18-amd64".into(),
            open_files: Some((1_024, 1_048_576)),
            somaxconn: Some(4_096),
            vllm: Some(Ok("0.11.0 (/opt/vllm)".into())),
            gpus: Some(Ok(("550.54".into(), 8))),
            state_dir: "/var/lib/penstock".into(),
            disk: Some((80 * GIB, 100 * GIB)),
            writable: true,
            memory: Some((64 * GIB, 32 * GIB)),
            shared: Some(8 * GIB),
            cgroup_v2: true,
            parts: vec!["proxy", "agent"],
            warm: Some(Ok(vec![check(Ok("fine".into()))])),
            ..Facts::default()
        }
    }

    #[test]
    fn a_fit_machine_has_nothing_to_tell_and_each_fault_is_found() {
        assert!(judged(&fine()).iter().all(|finding| finding.level == Level::Ok), "{:?}", judged(&fine()));
        type Break = fn(&mut Facts);
        let cases: [(Break, Level, &str); 16] = [
            (|f| f.warm = Some(Ok(vec![check(Err("paths differ".into()))])), Level::Fail, "paths differ"),
            (|f| f.warm = Some(Err("no such key".into())), Level::Fail, "no such key"),
            (|f| f.kernel = "4.4.0".into(), Level::Fail, "kernel 4.4.0"),
            (|f| f.kernel = String::new(), Level::Fail, "no Linux"),
            (|f| f.kernel = "5.4.0".into(), Level::Warn, "kernel 5.4.0"),
            (|f| f.open_files = Some((1_024, 1_024)), Level::Fail, "1024"),
            (|f| f.somaxconn = Some(128), Level::Warn, "somaxconn is 128"),
            (
                |f| f.taken = vec![(8081, "proxy", "in use".into())],
                Level::Fail,
                "8081, for the proxy: in use",
            ),
            (|f| f.vllm = Some(Err("vllm is not there".into())), Level::Fail, "not there"),
            (|f| f.gpus = Some(Err("no library".into())), Level::Fail, "no library"),
            (|f| f.gpus = Some(Ok(("550".into(), 0))), Level::Fail, "sees none"),
            (|f| f.writable = false, Level::Fail, "cannot be made"),
            (|f| f.disk = Some((GIB, 100 * GIB)), Level::Fail, "1.0 GiB free"),
            (|f| f.memory = Some((GIB, GIB)), Level::Warn, "1.0 GiB available"),
            (|f| f.shared = Some(64 << 20), Level::Warn, "64 MiB"),
            (|f| f.cgroup_v2 = false, Level::Warn, "version 2 is not mounted"),
        ];
        for (broken, level, part) in cases {
            let mut facts = fine();
            broken(&mut facts);
            let found = judged(&facts);
            assert!(found.iter().any(|f| f.level == level && f.why.contains(part)), "{part} in {found:#?}");
        }
    }
}
