//! What an `up` is to run, worked out of its flags and of what is on the disk, before anything is started.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{error::UpError, settings::Gpus};
use crate::{
    api::{Deployment, DeploymentSpec},
    args::{Engine, Ports, UpArgs},
};

/// Engines when neither the flags nor an earlier start say how many.
const ENGINES: u32 = 3;
/// Simulated GPUs at least, so that there is room to scale up and to try other models.
const GPUS: u32 = 8;

#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Name under which the model is served.
    pub(crate) model: String,
    pub(crate) engine: Engine,
    /// Engines, if the flags say.
    engines: Option<u32>,
    model_path: String,
    engine_args: Vec<String>,
    engine_env: BTreeMap<String, String>,
    /// The command that starts vLLM.
    pub(crate) vllm: Option<PathBuf>,
    /// GPUs to simulate, if the flags say.
    gpus: Option<u32>,
    /// Whether the machine has GPUs that vLLM can use.
    machine_has_gpus: bool,
    pub(crate) ports: Ports,
    pub(crate) ready: Duration,
}

impl Plan {
    pub(crate) fn new(options: &UpArgs) -> Result<Self, UpError> {
        let (vllm, model, model_path) = match options.engine {
            Engine::Sim => {
                refuse_vllm_flags(options)?;
                let model = options.model.clone().unwrap_or_else(|| "sim-model".into());
                (None, model.clone(), model)
            }
            Engine::Vllm => {
                let vllm = vllm_command(options.vllm_dir.as_deref())?;
                let (model, path) = vllm_model(options.model.as_deref(), options.model_dir.as_deref())?;
                (Some(vllm), model, path)
            }
        };
        let default_ready = if options.engine == Engine::Sim { 60 } else { 600 };
        Ok(Self {
            model,
            engine: options.engine,
            engines: options.engines,
            model_path,
            engine_args: options.engine_args.clone(),
            engine_env: engine_env(options),
            vllm,
            gpus: options.gpus,
            machine_has_gpus: machine_has_gpus(),
            ports: options.ports,
            ready: Duration::from_secs(options.ready_timeout_s.unwrap_or(default_ready)),
        })
    }

    /// The deployment to ask for. The number of engines is the flags', else that of the `stored` deployment: a second
    /// start resumes what `penstock scale` made of the first.
    pub(crate) fn spec(&self, stored: Option<&Deployment>) -> DeploymentSpec {
        DeploymentSpec {
            replicas: self.engines.or(stored.map(|d| d.replicas)).unwrap_or(ENGINES),
            engine: Some(self.engine_name().into()),
            model_path: Some(self.model_path.clone()),
            args: self.engine_args.clone(),
            env: self.engine_env.clone(),
            gpus_per_replica: Some(1),
            // These come with --engine-arg, or by `penstock deploy`.
            lora: Vec::new(),
            fields: serde_json::Map::new(),
        }
    }

    /// The GPUs to tell the agent of, when `others` are wanted by deployments of other models.
    pub(crate) fn gpus(&self, engines: u32, others: u32) -> Gpus {
        match self.gpus {
            Some(count) => Gpus::Simulated(count),
            None if self.engine == Engine::Vllm && self.machine_has_gpus => Gpus::Real,
            None => Gpus::Simulated(engines.saturating_add(others).saturating_add(1).clamp(GPUS, 4096)),
        }
    }

    /// The agent's name for the kind of engine.
    pub(crate) fn engine_name(&self) -> &'static str {
        match self.engine {
            Engine::Sim => "sim",
            Engine::Vllm => "vllm",
        }
    }
}

/// Whether the stored deployment is already what `spec` asks for.
pub(crate) fn is_as_asked(stored: &Deployment, spec: &DeploymentSpec) -> bool {
    stored.replicas == spec.replicas
        && spec.engine.as_ref() == Some(&stored.engine)
        && spec.model_path.as_ref() == Some(&stored.model_path)
        && spec.gpus_per_replica == Some(stored.gpus_per_replica)
        && spec.args == stored.args
        && spec.env == stored.env
}

fn refuse_vllm_flags(options: &UpArgs) -> Result<(), UpError> {
    for (flag, given) in [("--vllm-dir", &options.vllm_dir), ("--model-dir", &options.model_dir)] {
        if given.is_some() {
            return Err(UpError::Usage(format!("{flag} is for real vLLM: add --engine vllm")));
        }
    }
    Ok(())
}

fn vllm_command(dir: Option<&Path>) -> Result<PathBuf, UpError> {
    let Some(dir) = dir else {
        let path = std::env::var_os("PATH").unwrap_or_default();
        return std::env::split_paths(&path)
            .map(|folder| folder.join("vllm"))
            .find(|file| file.is_file())
            .ok_or_else(|| {
                UpError::Usage("vllm is not on the PATH: name its installation with --vllm-dir DIR".into())
            });
    };
    let candidates = ["venv/bin/vllm", "bin/vllm"].map(|file| dir.join(file));
    match candidates.iter().find(|file| file.is_file()) {
        // Not canonicalized: a virtual environment's program finds its libraries by the path it is called by.
        Some(file) => std::path::absolute(file).map_err(|e| UpError::io("use", file, &e)),
        None => {
            let [first, second] = candidates.map(|file| file.display().to_string());
            Err(UpError::Usage(format!(
                "no vLLM in {}: neither {first} nor {second} is a file; \
                 install it with `python3 -m venv DIR/venv && DIR/venv/bin/pip install vllm`",
                dir.display()
            )))
        }
    }
}

/// The served name and the model's path for `vllm serve`.
fn vllm_model(name: Option<&str>, dir: Option<&Path>) -> Result<(String, String), UpError> {
    match (name, dir) {
        (None, None) => Err(UpError::Usage(
            "--engine vllm needs a model: --model-dir DIR for a folder, or --model ID for one that vLLM downloads".into(),
        )),
        (Some(id), None) => Ok((id.into(), id.into())),
        (name, Some(dir)) => {
            if !dir.join("config.json").is_file() {
                return Err(UpError::Usage(format!(
                    "--model-dir {}: there is no config.json in it, so it is no model folder",
                    dir.display()
                )));
            }
            let path = dir.canonicalize().map_err(|e| UpError::io("use the model folder", dir, &e))?;
            let folder = path.file_name().map(|name| name.to_string_lossy().into_owned());
            let name = name.map(String::from).or(folder).ok_or_else(|| {
                UpError::Usage("--model-dir has no name of its own: name the model with --model NAME".into())
            })?;
            Ok((name, path.display().to_string()))
        }
    }
}

fn engine_env(options: &UpArgs) -> BTreeMap<String, String> {
    if options.engine == Engine::Sim {
        return BTreeMap::new();
    }
    // A title of its own would overwrite the environment of vLLM's processes, by which `up` knows them as its own.
    let mut env = BTreeMap::from([("SPT_NOENV".into(), "1".into())]);
    if options.model_dir.is_some() {
        // All there is to load is on the disk: ask no hub, and tell nobody.
        for name in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"] {
            env.insert(name.into(), "1".into());
        }
    }
    env
}

/// Whether NVIDIA's driver shows at least one GPU.
fn machine_has_gpus() -> bool {
    std::fs::read_dir("/proc/driver/nvidia/gpus").is_ok_and(|mut gpus| gpus.next().is_some())
        || Path::new("/dev/nvidia0").exists()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn plan(line: &str) -> Result<Plan, UpError> {
        let words = ["penstock", "up"].into_iter().chain(line.split_whitespace());
        match Cli::try_parse_from(words).unwrap().command {
            Command::Up(options) => Plan::new(&options),
            _ => unreachable!(),
        }
    }

    fn usage_error(line: &str) -> String {
        match plan(line) {
            Err(UpError::Usage(text)) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_second_start_keeps_the_number_of_engines_unless_the_flags_say_another() {
        let stored = Deployment { replicas: 5, ..Default::default() };
        assert_eq!(plan("").unwrap().spec(None).replicas, 3);
        assert_eq!(plan("").unwrap().spec(Some(&stored)).replicas, 5);
        assert_eq!(plan("--engines 2").unwrap().spec(Some(&stored)).replicas, 2);
    }

    #[test]
    fn a_deployment_that_is_already_there_is_recognised() {
        let plan = plan("--engine-arg=--sim-itl-ms=5").unwrap();
        let mut stored = Deployment {
            replicas: 3,
            engine: "sim".into(),
            model_path: "sim-model".into(),
            args: vec!["--sim-itl-ms=5".into()],
            gpus_per_replica: 1,
            ..Default::default()
        };
        assert!(is_as_asked(&stored, &plan.spec(Some(&stored))));
        stored.args.clear();
        assert!(!is_as_asked(&stored, &plan.spec(Some(&stored))));
    }

    #[test]
    fn simulated_gpus_leave_a_spare_one() {
        let plan = plan("").unwrap();
        assert_eq!(plan.gpus(3, 0), Gpus::Simulated(8));
        assert_eq!(plan.gpus(20, 4), Gpus::Simulated(25));
        assert_eq!(super::tests::plan("--gpus 2").unwrap().gpus(20, 4), Gpus::Simulated(2));
    }

    #[test]
    fn vllm_needs_a_program_and_a_model_that_are_there() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        let missing = usage_error(&format!("--engine vllm --vllm-dir {} --model-dir x", at("")));
        assert!(missing.contains("venv/bin/vllm") && missing.contains("pip install vllm"), "{missing}");
        std::fs::create_dir_all(dir.path().join("venv/bin")).unwrap();
        std::fs::write(dir.path().join("venv/bin/vllm"), "").unwrap();
        let no_model = usage_error(&format!("--engine vllm --vllm-dir {}", at("")));
        assert!(no_model.contains("--model-dir DIR"), "{no_model}");
        std::fs::create_dir(dir.path().join("tiny")).unwrap();
        let flags = format!("--engine vllm --vllm-dir {} --model-dir {}", at(""), at("tiny"));
        assert!(usage_error(&flags).contains("config.json"));
        std::fs::write(dir.path().join("tiny/config.json"), "{}").unwrap();
        let plan = plan(&flags).unwrap();
        assert_eq!(plan.model, "tiny");
        assert!(plan.vllm.as_ref().unwrap().ends_with("venv/bin/vllm"));
        let spec = plan.spec(None);
        assert!(spec.model_path.unwrap().ends_with("/tiny"));
        assert_eq!(spec.env["HF_HUB_OFFLINE"], "1");
        assert_eq!(plan.ready, Duration::from_secs(600));
    }

    #[test]
    fn flags_of_vllm_without_vllm_are_a_mistake() {
        assert!(usage_error("--model-dir /tmp").contains("--engine vllm"));
    }
}
