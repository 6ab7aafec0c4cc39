//! How each peer is started: program, arguments, environment and files.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use super::{
    configs::{self, Options, Setting},
    peer::Peer,
};

/// Where the programs are.
#[derive(Debug, Clone)]
pub(super) struct Programs {
    pub(super) proxy: PathBuf,
    pub(super) relay: PathBuf,
    pub(super) engine_sim: PathBuf,
    /// The folder that `scripts/bench_peers.sh` fills.
    pub(super) peers: Option<PathBuf>,
}

/// A process to be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<String>,
    pub(super) environment: Vec<(&'static str, String)>,
    /// Names in the folder, and what they hold.
    pub(super) files: Vec<(&'static str, String)>,
}

impl Programs {
    /// The program that `peer` is, from the cache folder where it is not ours; none for [`Peer::Direct`].
    fn of(&self, peer: Peer) -> Option<PathBuf> {
        let below = |path: &str| self.peers.as_ref().map(|folder| folder.join(path));
        match peer {
            Peer::Direct => None,
            Peer::Relay => Some(self.relay.clone()),
            Peer::Penstock | Peer::PenstockOn | Peer::PenstockOff => Some(self.proxy.clone()),
            Peer::Nginx => below("debian/usr/sbin/nginx"),
            Peer::Haproxy => below("debian/usr/sbin/haproxy"),
            // The program itself, linked to from inside its package: the package's own start script is another process.
            Peer::Envoy => below("envoy/bin/envoy-binary"),
            Peer::VllmRouter => below("vllm-router/bin/vllm-router"),
            Peer::Smg => below("smg/bin/smg"),
            Peer::Litellm => below("litellm/bin/litellm"),
        }
    }

    /// The program of `peer`.
    ///
    /// # Errors
    /// Why it is not there, as the installing script has noted it if that was run.
    pub(super) fn find(&self, peer: Peer) -> Result<PathBuf, String> {
        let program = self.of(peer).ok_or("not installed: --peers-dir is not given")?;
        if program.is_file() {
            return Ok(program);
        }
        let noted = self.peers.as_ref().filter(|_| peer.is_installed_on_demand());
        let noted = noted.and_then(|folder| note(folder, peer, "failed"));
        Err(match noted {
            Some(why) => format!("not installed: {why}"),
            None => format!("not installed: there is no {}", program.display()),
        })
    }

    /// The version that the installing script has noted.
    pub(super) fn noted_version(&self, peer: Peer) -> Option<String> {
        note(self.peers.as_ref()?, peer, "version")
    }
}

/// The first line of a file that the installing script has left.
fn note(folder: &Path, peer: Peer, what: &str) -> Option<String> {
    let text = std::fs::read_to_string(folder.join(format!("{}.{what}", peer.name()))).ok()?;
    text.lines().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
}

/// How `peer`, which is `program`, is started. `ads` tells Penstock of the engines.
pub(super) fn plan(peer: Peer, program: PathBuf, setting: &Setting<'_>, ads: SocketAddr) -> Plan {
    let Setting { port, spare_port, threads, .. } = *setting;
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let urls = || setting.engines.iter().map(|engine| format!("http://{engine}"));
    let plan = Plan { program, ..Plan::default() };
    match peer {
        Peer::Direct => plan,
        Peer::Relay => {
            let mut arguments = words(&["--threads", &threads.to_string()]);
            arguments.extend(["--listen".into(), format!("127.0.0.1:{port}")]);
            arguments
                .extend(setting.engines.iter().flat_map(|engine| ["--engine".into(), engine.to_string()]));
            Plan { arguments, ..plan }
        }
        Peer::Penstock | Peer::PenstockOn | Peer::PenstockOff => {
            let options = match peer {
                Peer::PenstockOn => Options::On,
                Peer::PenstockOff => Options::Off,
                _ => Options::Default,
            };
            Plan {
                arguments: vec!["--config".into(), setting.path("proxy.toml")],
                files: vec![("proxy.toml", configs::penstock(setting, ads, options))],
                ..plan
            }
        }
        Peer::Nginx => Plan {
            arguments: words(&["-p", &setting.path(""), "-c", &setting.path("nginx.conf"), "-e", "stderr"]),
            files: vec![("nginx.conf", configs::nginx(setting))],
            environment: libraries(&plan.program),
            ..plan
        },
        Peer::Haproxy => Plan {
            arguments: words(&["-db", "-q", "-f", &setting.path("haproxy.cfg")]),
            files: vec![("haproxy.cfg", configs::haproxy(setting))],
            environment: libraries(&plan.program),
            ..plan
        },
        Peer::Envoy => Plan {
            arguments: words(&[
                "--config-path",
                &setting.path("envoy.json"),
                "--concurrency",
                &threads.to_string(),
                "--disable-hot-restart",
                "--log-level",
                "error",
            ]),
            files: vec![("envoy.json", configs::envoy(setting).to_string())],
            ..plan
        },
        Peer::VllmRouter => {
            // It knows no least connections: the less busy of two comes closest.
            let mut arguments =
                words(&["--host", "127.0.0.1", "--policy", "power_of_two", "--log-level", "error"]);
            arguments.extend(["--port".into(), port.to_string()]);
            arguments.extend(["--prometheus-port".into(), spare_port.to_string()]);
            arguments.extend(words(&["--max-concurrent-requests", "100000", "--queue-size", "100000"]));
            arguments.extend(words(&[
                "--request-timeout-secs",
                "3600",
                "--worker-startup-check-interval",
                "1",
            ]));
            arguments.push("--worker-urls".into());
            arguments.extend(urls());
            let environment = vec![("TOKIO_WORKER_THREADS", threads.to_string())];
            Plan { arguments, environment, ..plan }
        }
        Peer::Smg => {
            let mut arguments =
                words(&["launch", "--host", "127.0.0.1", "--log-level", "error", "--backend", "vllm"]);
            arguments.extend(words(&["--policy", "power_of_two", "--power-of-two-load-metric", "requests"]));
            arguments.extend(["--port".into(), port.to_string()]);
            arguments.extend(["--prometheus-port".into(), spare_port.to_string()]);
            arguments.extend(words(&["--prometheus-host", "127.0.0.1", "--max-concurrent-requests", "0"]));
            arguments.extend(words(&[
                "--request-timeout-secs",
                "3600",
                "--worker-startup-check-interval",
                "1",
            ]));
            arguments.extend(words(&["--disable-tokenizer-autoload"]));
            if setting.tls {
                arguments.extend(["--tls-cert-path".into(), setting.path(configs::CERTIFICATE)]);
                arguments.extend(["--tls-key-path".into(), setting.path(configs::KEY)]);
            }
            arguments.push("--worker-urls".into());
            arguments.extend(urls());
            let environment = vec![("TOKIO_WORKER_THREADS", threads.to_string())];
            Plan { arguments, environment, ..plan }
        }
        Peer::Litellm => {
            let mut arguments = words(&["--config", &setting.path("config.yaml"), "--host", "127.0.0.1"]);
            arguments.extend(["--port".into(), port.to_string()]);
            arguments.extend(["--num_workers".into(), threads.to_string()]);
            arguments.extend(words(&["--keepalive_timeout", "3600"]));
            // Its parent takes a worker that is still being loaded for a dead one.
            arguments.extend(words(&["--timeout_worker_healthcheck", "600"]));
            arguments.extend(["--log_config".into(), setting.path("log.json")]);
            if setting.tls {
                // Its default server knows HTTP/1.1 only.
                arguments.push("--run_hypercorn".into());
                arguments.extend(["--ssl_certfile_path".into(), setting.path(configs::CERTIFICATE)]);
                arguments.extend(["--ssl_keyfile_path".into(), setting.path(configs::KEY)]);
            }
            // Nothing is to be fetched from the internet, nothing said for each request, and nobody has to show a key.
            let environment = [
                ("LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY", "true"),
                ("LITELLM_LOCAL_MODEL_COST_MAP", "True"),
                ("LITELLM_LOG", "ERROR"),
                ("LITELLM_TELEMETRY", "False"),
            ];
            Plan {
                arguments,
                environment: environment.map(|(name, value)| (name, value.to_owned())).to_vec(),
                files: vec![
                    ("config.yaml", configs::litellm(setting).to_string()),
                    ("log.json", configs::NO_ACCESS_LOG.to_owned()),
                ],
                ..plan
            }
        }
    }
}

/// Where the libraries are that came along with a program `ROOT/usr/sbin/NAME`.
fn libraries(program: &Path) -> Vec<(&'static str, String)> {
    let usr = program.parent().and_then(Path::parent);
    let path = |usr: &Path| {
        let triplet = format!("{}-linux-gnu", std::env::consts::ARCH);
        ("LD_LIBRARY_PATH", usr.join("lib").join(triplet).display().to_string())
    };
    usr.map(path).into_iter().collect()
}
