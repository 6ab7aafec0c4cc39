//! The restore hook: a command of the node's owner that starts an engine from a checkpoint, in place of the engine's own.
//!
//! The hook's process *is* the engine as far as the agent cares: its own group, its log, its port, the same proof of
//! readiness, the same end (SIGTERM, then SIGKILL to all of it); a hook that execs the restored process leaves nothing
//! between. What has to be true before it runs is checked at each start: the storage is one, the path that the deployment
//! takes the node to have is the one it has, the folder is there, the secret resolves. A deployment chooses storage, secret
//! and path, or none at all; the command is the node's alone, so that the control plane cannot have nodes run programs.
//!
//! The secret is resolved here, on the node, and handed to the hook alone: it is in no log, no record, no report.

use std::{collections::BTreeMap, fmt, path::Path, time::Duration};

use penstock_config::{
    storage::{SecretRef, Storage},
    warm::{RestoreProgram, filled},
};

use super::RestoreSpec;
use crate::{
    assignment::Assignment,
    engine::{command::Launch, context::Context},
};

/// Longest wait for a look at a folder: a mount may hang.
const LOOK: Duration = Duration::from_secs(5);
/// Names the file of the secret to the hook.
const SECRET_FILE_VARIABLE: &str = "PENSTOCK_RESTORE_SECRET_FILE";
/// Hands the secret itself to the hook.
const SECRET_VARIABLE: &str = "PENSTOCK_RESTORE_SECRET";

/// A hook that may run.
pub(crate) struct Hook {
    command: Vec<String>,
    storage: Storage,
    path: String,
    /// Variable and value.
    secret: Option<(&'static str, String)>,
    /// Longest time to a completion.
    pub(crate) timeout: Duration,
}

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { command, storage, path, timeout, secret: _ } = self;
        write!(f, "Hook {{ {command:?} {storage} {path:?} {timeout:?} }}")
    }
}

/// What settings and deployment make of it together, before anything is looked at.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    command: Vec<String>,
    storage: Storage,
    path: String,
    secret: Option<SecretRef>,
    timeout: Duration,
}

/// None: no restore is asked for.
fn wanted(
    engine: &str,
    program: &RestoreProgram,
    spec: Option<&RestoreSpec>,
) -> Result<Option<Wanted>, String> {
    let unsaid = RestoreSpec::default();
    let spec = spec.unwrap_or(&unsaid);
    let or = |said: &String, else_: &String| if said.is_empty() { else_.clone() } else { said.clone() };
    let storage = or(&spec.storage, &program.storage);
    if spec.off || storage.is_empty() {
        return Ok(None);
    }
    if program.command.is_empty() {
        // Settings that name a storage and no command have the hook switched off.
        let asked = !spec.storage.is_empty();
        let why = format!("this node has no hook for it (engines.{engine}.restore.command is empty)");
        return if asked { Err(why) } else { Ok(None) };
    }
    let storage: Storage = storage.parse().map_err(|e| format!("{e}"))?;
    let path = program.path.trim_end_matches('/').to_owned();
    let said = spec.path.trim_end_matches('/');
    if !said.is_empty() && said != path {
        return Err(format!(
            "the deployment's path is {said:?} and this node's is {path:?} (engines.{engine}.restore.path): they must be equal"
        ));
    }
    storage.agrees_with(&path).map_err(|e| format!("{e} (engines.{engine}.restore.path)"))?;
    let secret = or(&spec.secret_ref, &program.secret_ref);
    let secret = match secret.is_empty() {
        true => None,
        false => Some(secret.parse().map_err(|e| format!("the secret_ref is not accepted: {e}"))?),
    };
    let seconds = if spec.timeout_s == 0 { program.timeout_s } else { spec.timeout_s.into() };
    let (command, timeout) = (program.command.clone(), Duration::from_secs(seconds));
    Ok(Some(Wanted { command, storage, path, secret, timeout }))
}

/// The time that a hook for this assignment is given; None: it has none.
pub(crate) fn timeout(cx: &Context, assignment: &Assignment) -> Option<Duration> {
    let spec = &assignment.spec;
    let program = cx.config.programs.get(&spec.engine)?;
    let wanted = wanted(&spec.engine, &program.restore, spec.warm.restore.as_ref());
    Some(wanted.ok()??.timeout)
}

/// The hook for an assignment, if one is asked for.
///
/// # Errors
/// Why it cannot run: the engine is to be started cold.
pub(crate) async fn hook(cx: &Context, assignment: &Assignment) -> Result<Option<Hook>, String> {
    let spec = &assignment.spec;
    let Some(program) = cx.config.programs.get(&spec.engine) else { return Ok(None) };
    checked(&spec.engine, &program.restore, spec.warm.restore.as_ref(), &cx.warm.secrets_dir).await
}

/// The hook that settings and deployment ask for, with all that has to be there for it looked at.
///
/// # Errors
/// What is wrong or missing.
pub(super) async fn checked(
    engine: &str,
    program: &RestoreProgram,
    spec: Option<&RestoreSpec>,
    secrets_dir: &str,
) -> Result<Option<Hook>, String> {
    let Some(wanted) = wanted(engine, program, spec)? else { return Ok(None) };
    if !wanted.path.is_empty() && !is(&wanted.path, Path::is_dir).await? {
        return Err(format!("the path {} (engines.{engine}.restore.path) is no folder here", wanted.path));
    }
    if let Storage::File { path } = &wanted.storage
        && !is(path, Path::exists).await?
    {
        return Err(format!("there is nothing at {}", wanted.storage));
    }
    let secret = match &wanted.secret {
        None => None,
        Some(secret) => Some(resolve(secret, secrets_dir).await?),
    };
    let Wanted { command, storage, path, timeout, .. } = wanted;
    Ok(Some(Hook { command, storage, path, secret, timeout }))
}

async fn is(path: &str, what: fn(&Path) -> bool) -> Result<bool, String> {
    let looked = path.to_owned();
    let look = tokio::task::spawn_blocking(move || what(Path::new(&looked)));
    match tokio::time::timeout(LOOK, look).await {
        Ok(Ok(answer)) => Ok(answer),
        _ => Err(format!("{path} does not answer: its mount hangs")),
    }
}

async fn resolve(secret: &SecretRef, secrets_dir: &str) -> Result<(&'static str, String), String> {
    match secret {
        SecretRef::Env(name) => match std::env::var(name) {
            Ok(value) if !value.is_empty() => Ok((SECRET_VARIABLE, value)),
            _ => Err(format!("the secret {secret} is missing: the agent's environment has no such variable")),
        },
        SecretRef::File(_) if secrets_dir.is_empty() => {
            Err(format!("the secret {secret} is missing: warm.secrets_dir is not set on this node"))
        }
        SecretRef::File(name) => {
            let path = format!("{}/{name}", secrets_dir.trim_end_matches('/'));
            match is(&path, |path| std::fs::File::open(path).is_ok() && path.is_file()).await? {
                true => Ok((SECRET_FILE_VARIABLE, path)),
                false => {
                    Err(format!("the secret {secret} is missing: {path} is no file that the agent can read"))
                }
            }
        }
    }
}

impl Hook {
    /// What is executed in place of `launch`: the hook, in the engine's environment and with what it needs to know.
    pub(crate) fn instead_of(self, launch: Launch, assignment: &Assignment, host: &str, port: u16) -> Launch {
        let spec = &assignment.spec;
        let port = port.to_string();
        let storage = self.storage.to_string();
        let gpus = assignment.gpu_uuids.join(",");
        let known: BTreeMap<&str, &str> = BTreeMap::from([
            ("model", spec.served_model_name.as_str()),
            ("model_path", &spec.model_path),
            ("storage", &storage),
            ("path", &self.path),
            ("host", host),
            ("port", &port),
            ("gpus", &gpus),
            ("replica", &assignment.replica_id),
        ]);
        let value = |name: &str| known.get(name).map(|value| (*value).to_owned());
        // Names that are not known were refused with the settings.
        let argv =
            self.command.iter().map(|arg| filled(arg, value).unwrap_or_else(|_| arg.clone())).collect();
        let mut env = launch.env;
        for (name, value) in &known {
            env.insert(format!("PENSTOCK_RESTORE_{}", name.to_uppercase()), (*value).to_owned());
        }
        env.extend(self.secret.map(|(name, value)| (name.to_owned(), value)));
        Launch { argv, env, env_removed: launch.env_removed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program() -> RestoreProgram {
        RestoreProgram {
            command: ["/opt/restore", "--from={storage}", "{port}"].map(str::to_owned).to_vec(),
            storage: "file:///ckpt/default".into(),
            secret_ref: "env:KEY".into(),
            path: "/ckpt/".into(),
            timeout_s: 60,
        }
    }

    fn spec(change: impl FnOnce(&mut RestoreSpec)) -> RestoreSpec {
        let mut spec = RestoreSpec::default();
        change(&mut spec);
        spec
    }

    #[test]
    fn a_deployment_chooses_what_and_from_where_and_the_node_how() {
        let plain = wanted("vllm", &program(), None).unwrap().unwrap();
        assert_eq!((plain.path.as_str(), plain.timeout), ("/ckpt", Duration::from_secs(60)));
        let said = spec(|s| {
            (s.storage, s.secret_ref, s.timeout_s) = ("s3://bucket/x".into(), "file:key".into(), 5);
            s.path = "/ckpt".into();
        });
        let said = wanted("vllm", &program(), Some(&said)).unwrap().unwrap();
        assert_eq!(
            (said.storage.to_string().as_str(), said.timeout),
            ("s3://bucket/x", Duration::from_secs(5))
        );
        assert_eq!(said.secret, Some(SecretRef::File("key".into())));
        for none in [
            wanted("vllm", &program(), Some(&spec(|s| s.off = true))),
            wanted("vllm", &RestoreProgram::default(), None),
            wanted("vllm", &RestoreProgram { storage: String::new(), ..program() }, None),
        ] {
            assert_eq!(none, Ok(None));
        }
    }

    #[test]
    fn what_does_not_agree_is_said_with_both_sides() {
        for (program, spec, part) in [
            (
                program(),
                spec(|s| s.path = "/other".into()),
                "path is \"/other\" and this node's is \"/ckpt\"",
            ),
            (
                program(),
                spec(|s| s.storage = "file:///other/x".into()),
                "does not lie under the path \"/ckpt\"",
            ),
            (program(), spec(|s| s.storage = "ckpt".into()), "is no storage"),
            (program(), spec(|s| s.secret_ref = "hunter2".into()), "the secret_ref is not accepted"),
            (
                RestoreProgram::default(),
                spec(|s| s.storage = "s3://bucket/x".into()),
                "engines.vllm.restore.command is empty",
            ),
        ] {
            let error = wanted("vllm", &program, Some(&spec)).unwrap_err();
            assert!(error.contains(part) && !error.contains("hunter2"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_secret_is_a_file_or_a_variable_and_its_value_shows_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("key"), "sesame").unwrap();
        let folder = dir.path().to_str().unwrap();
        let file: SecretRef = "file:key".parse().unwrap();
        let found = resolve(&file, folder).await.unwrap();
        assert_eq!(found, (SECRET_FILE_VARIABLE, format!("{folder}/key")));
        let gone = resolve(&"file:gone".parse().unwrap(), folder).await.unwrap_err();
        assert!(gone.contains("the secret file:gone is missing"), "{gone}");
        assert!(resolve(&file, "").await.unwrap_err().contains("warm.secrets_dir is not set"));
        let unset = resolve(&"env:PENSTOCK_NO_SUCH_SECRET".parse().unwrap(), "").await.unwrap_err();
        assert!(unset.contains("has no such variable"), "{unset}");
        let hook = Hook {
            command: vec![],
            storage: "s3://bucket".parse().unwrap(),
            path: String::new(),
            secret: Some((SECRET_VARIABLE, "sesame".into())),
            timeout: LOOK,
        };
        assert!(!format!("{hook:?}").contains("sesame"));
    }

    #[test]
    fn the_hook_takes_the_engines_place_and_environment() {
        let wanted = wanted("vllm", &program(), None).unwrap().unwrap();
        let Wanted { command, storage, path, timeout, .. } = wanted;
        let secret = Some((SECRET_VARIABLE, "sesame".to_owned()));
        let hook = Hook { command, storage, path, secret, timeout };
        let env = BTreeMap::from([("CUDA_VISIBLE_DEVICES".to_owned(), "g".to_owned())]);
        let cold = Launch { argv: vec!["vllm".into()], env, env_removed: vec!["X"] };
        let mut assignment = crate::engine::records::tests::record("m-0", 0).assignment;
        assignment.gpu_uuids = vec!["g0".into(), "g1".into()];
        let launch = hook.instead_of(cold, &assignment, "127.0.0.1", 8000);
        assert_eq!(launch.argv.join(" "), "/opt/restore --from=file:///ckpt/default 8000");
        for (name, value) in [
            ("CUDA_VISIBLE_DEVICES", "g"),
            ("PENSTOCK_RESTORE_GPUS", "g0,g1"),
            ("PENSTOCK_RESTORE_REPLICA", "m-0"),
            ("PENSTOCK_RESTORE_SECRET", "sesame"),
        ] {
            assert_eq!(launch.env[name], value);
        }
    }
}
