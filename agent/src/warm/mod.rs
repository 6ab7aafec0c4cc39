//! Warm starts: engines that sleep and are woken, that are restored from a checkpoint, whose models were fetched before.
//!
//! Each way is a shortcut and none is needed: whatever fails here, for whatever reason, ends in the ordinary start from
//! nothing, with the reason kept where the operator sees it. `docs/warm-starts.md` is the operator's side.
//!
//! The rooms: [`sleep`] (vLLM's sleep mode), [`restore`] (the hook), [`prefetch`] (models on this node's disks), [`disk`]
//! (is there room for them),
//! [`preflight`] (all of that before anything runs). What a supervisor does with them is in `engine::supervisor::warm`.

pub(crate) mod disk;
pub(crate) mod prefetch;
pub(crate) mod preflight;
pub(crate) mod restore;
pub(crate) mod sleep;

use std::time::Duration;

use penstock_proto::v1;
use serde::{Deserialize, Serialize};

/// How an engine became ready.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Way {
    /// Started from nothing; what it fetched, it fetched itself.
    #[default]
    Cold,
    /// The same, after the agent had fetched its model; the fetching is in the time if this start had to wait for it.
    Prefetched,
    /// By the restore hook.
    Restored,
    /// It had slept.
    Woken,
    /// An earlier agent had started it.
    Adopted,
}

impl Way {
    /// All of them.
    pub(crate) const ALL: [Self; 5] =
        [Self::Cold, Self::Prefetched, Self::Restored, Self::Woken, Self::Adopted];

    /// Label of metrics, value in JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Prefetched => "prefetched",
            Self::Restored => "restored",
            Self::Woken => "woken",
            Self::Adopted => "adopted",
        }
    }

    /// The setting that bounds it.
    pub(crate) fn limit(self) -> &'static str {
        match self {
            Self::Restored => "restore's timeout_s",
            Self::Woken => "warm.wake_ms",
            Self::Cold | Self::Prefetched | Self::Adopted => "engines.ready_s",
        }
    }
}

/// How an engine became ready last, for whoever looks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Started {
    /// None: it has not been ready.
    pub(crate) way: Option<Way>,
    /// From the beginning of its start, or of its waking, to the completion that proved it.
    pub(crate) took: Duration,
    /// Why a warmer way that was asked for was not gone; may be empty.
    pub(crate) note: String,
}

/// What a deployment says of warm starts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct WarmSpec {
    /// 0: it never sleeps.
    pub(crate) sleep_level: u32,
    /// None: as `[engines.NAME.restore]` says.
    pub(crate) restore: Option<RestoreSpec>,
    /// None: as `[engines.NAME.prefetch]` says.
    pub(crate) prefetch: Option<PrefetchSpec>,
}

/// What a deployment says of the restore hook; what is empty or 0 is as the node's settings say.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RestoreSpec {
    /// Always cold.
    pub(crate) off: bool,
    /// From where.
    pub(crate) storage: String,
    /// `file:NAME` or `env:NAME`.
    pub(crate) secret_ref: String,
    /// The base path that the deployment takes the node to have.
    pub(crate) path: String,
    /// Longest time until a completion.
    pub(crate) timeout_s: u32,
}

/// What a deployment says of prefetching.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct PrefetchSpec {
    /// Not at all.
    pub(crate) off: bool,
    /// What the model takes on disk; 0: not known.
    pub(crate) size_gib: u32,
}

impl WarmSpec {
    /// Out of the message.
    pub(crate) fn of(spec: &v1::EngineSpec) -> Self {
        Self {
            sleep_level: spec.sleep_level,
            restore: spec.restore.clone().map(|r| RestoreSpec {
                off: r.off,
                storage: r.storage,
                secret_ref: r.secret_ref,
                path: r.path,
                timeout_s: r.timeout_s,
            }),
            prefetch: spec.prefetch.map(|p| PrefetchSpec { off: p.off, size_gib: p.size_gib }),
        }
    }
}
