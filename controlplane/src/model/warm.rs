//! How a deployment's engines may be started other than from nothing, and whether they may sleep. Part of the engine's spec:
//! a change rolls out. What is not said is as the node's settings say; `docs/warm-starts.md` explains it to operators.

use penstock_proto::v1;
use serde::{Deserialize, Serialize};

/// See the module's text.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WarmSpec {
    /// None: they never sleep.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sleep: Option<Sleep>,
    /// None: as `[engines.NAME.restore]` of the node says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restore: Option<Restore>,
    /// None: as `[engines.NAME.prefetch]` of the node says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefetch: Option<Prefetch>,
}

/// A model that goes to zero sleeps instead of ending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sleep {
    /// 1 keeps the weights in the host's memory, 2 drops them.
    pub level: u32,
}

/// What the node's restore hook is told; what is empty or 0 is as the node's settings say.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Restore {
    /// Always started cold.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub off: bool,
    /// file:///PATH, s3://BUCKET/PREFIX or oci://REGISTRY/REPOSITORY:TAG
    #[serde(skip_serializing_if = "String::is_empty")]
    pub storage: String,
    /// file:NAME or env:NAME, resolved on the node.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub secret_ref: String,
    /// The storage's base path on the node; must be the node's.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub path: String,
    /// Longest time from the hook's start to a completion.
    #[serde(skip_serializing_if = "is_zero")]
    pub timeout_s: u32,
}

/// What the node's prefetch command is told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Prefetch {
    /// Not fetched ahead.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub off: bool,
    /// What the model takes on disk; 0: not known.
    #[serde(skip_serializing_if = "is_zero")]
    pub size_gib: u32,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl WarmSpec {
    /// Nothing was said.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Into the message to agents.
    pub fn put_on(&self, wire: &mut v1::EngineSpec) {
        wire.sleep_level = self.sleep.map_or(0, |sleep| sleep.level);
        wire.restore = self.restore.as_ref().map(|restore| v1::RestoreSpec {
            off: restore.off,
            storage: restore.storage.clone(),
            secret_ref: restore.secret_ref.clone(),
            path: restore.path.clone(),
            timeout_s: restore.timeout_s,
        });
        wire.prefetch = self.prefetch.map(|p| v1::PrefetchSpec { off: p.off, size_gib: p.size_gib });
    }
}
