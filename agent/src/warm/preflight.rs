//! What of an agent's settings for warm starts can be looked at before any engine is started: `penstock preflight`.
//!
//! The same checks as before each start, on this machine and as this user. What a deployment says besides is looked at when
//! its engine starts.

use std::path::Path;

use penstock_config::agent::AgentConfig;

use super::{disk, restore};

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// What, by the settings' names.
    pub what: String,
    /// How it is, or what is wrong.
    pub found: Result<String, String>,
}

/// Looks at restore hooks, prefetch commands and the models' disk.
pub async fn preflight(config: &AgentConfig) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut check = |what: String, found: Result<String, String>| checks.push(Check { what, found });
    let warm = &config.warm;
    for (name, program) in &config.engines.programs {
        if let Some(command) = program.restore.command.first() {
            let what = format!("engines.{name}.restore");
            let found = match restore::checked(name, &program.restore, None, &warm.secrets_dir).await {
                Err(why) => Err(format!("engines would be started cold: {why}")),
                Ok(_) if !is_command(command) => Err(format!("{command} cannot be found or executed")),
                Ok(None) => Ok(format!("{command}, for deployments that name a storage")),
                Ok(Some(_)) => Ok(format!("{command}, from {}", program.restore.storage)),
            };
            check(what, found);
        }
        if let Some(command) = program.prefetch.command.first() {
            let found = match is_command(command) {
                true => Ok(command.clone()),
                false => Err(format!("{command} cannot be found or executed")),
            };
            check(format!("engines.{name}.prefetch"), found);
        }
    }
    if !warm.models_dir.is_empty() {
        let room = disk::room(warm).await;
        check("warm.models_dir".into(), room.map(|()| format!("{} has room to spare", warm.models_dir)));
    }
    checks
}

/// Whether this user can execute it: by its path, or found on the PATH.
fn is_command(command: &str) -> bool {
    let may =
        |path: &Path| path.is_file() && nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok();
    if command.contains('/') {
        return may(Path::new(command));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| may(&folder.join(command)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_would_end_in_a_cold_start_is_told_before() {
        let dir = tempfile::tempdir().unwrap();
        let mount = dir.path().to_str().unwrap().to_owned();
        let mut config = AgentConfig::default();
        assert_eq!(preflight(&config).await, [], "nothing is set");
        config.warm.models_dir.clone_from(&mount);
        config.warm.spare_gib = 0;
        let vllm = config.engines.programs.get_mut("vllm").unwrap();
        vllm.prefetch.command = vec!["no-such-command-here".into()];
        vllm.restore.command = vec!["sh".into()];
        vllm.restore.storage = format!("file://{mount}");
        vllm.restore.path = "/mnt/another".into();
        let found = |checks: &[Check], what: &str| {
            checks.iter().find(|c| c.what == what).map(|c| c.found.clone()).unwrap()
        };
        let checks = preflight(&config).await;
        let restore = found(&checks, "engines.vllm.restore").unwrap_err();
        assert!(restore.contains("does not lie under the path \"/mnt/another\""), "{restore}");
        assert!(found(&checks, "engines.vllm.prefetch").unwrap_err().contains("no-such-command-here"));
        assert!(found(&checks, "warm.models_dir").is_ok());
        config.engines.programs.get_mut("vllm").unwrap().restore.path.clone_from(&mount);
        assert!(found(&preflight(&config).await, "engines.vllm.restore").is_ok());
    }
}
