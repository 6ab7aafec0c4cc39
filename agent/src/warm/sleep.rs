//! vLLM's sleep mode: its GPU memory back without its end, and its service back without its start.
//!
//! The paths used here are vLLM's development paths, which it opens only when it is told to (`VLLM_SERVER_DEV_MODE=1`) and
//! protects by nothing: whoever reaches the engine's port reaches them. Proxies pass none of them on; the agent asks the
//! engine itself.
//!
//! Level 1 keeps the weights in the host's memory. Level 2 drops them: waking must read them again, between the weights'
//! memory and the KV cache's, or the engine would answer out of memory that holds nothing.

use std::time::Duration;

use serde_json::{Value, json};

use crate::{
    assignment::EngineSpec,
    engine::{
        context::Context,
        probe::{Probe, Target},
        records::Record,
    },
};

/// Longest wait for an engine's word on whether it sleeps: it costs it nothing.
const ASKED: Duration = Duration::from_secs(10);
/// Pause between two looks at whether it has fallen asleep, or woken.
const POLL: Duration = Duration::from_millis(100);

/// What an engine that may sleep is started with.
pub(crate) fn arguments(spec: &EngineSpec) -> Option<String> {
    let given = |arg: &String| arg.replace('_', "-") == "--enable-sleep-mode";
    (spec.warm.sleep_level > 0 && !spec.args.iter().any(given)).then(|| "--enable-sleep-mode".to_owned())
}

/// The variable that opens the paths.
pub(crate) fn environment(spec: &EngineSpec) -> Option<(String, String)> {
    (spec.warm.sleep_level > 0).then(|| ("VLLM_SERVER_DEV_MODE".to_owned(), "1".to_owned()))
}

/// Puts the engine to sleep and sees that it sleeps, within `deadline`. It must have nothing to do.
///
/// # Errors
/// What came instead. The engine may be in any state then.
pub(crate) async fn fall_asleep(
    probe: &Probe,
    target: &Target,
    level: u32,
    deadline: Duration,
) -> Result<(), String> {
    let falling = async {
        probe.post(target, &format!("/sleep?level={level}"), None, deadline).await?;
        until(probe, target, true).await
    };
    bounded(falling, deadline, "asleep").await
}

/// Wakes the engine and sees that it is awake, within `deadline`.
///
/// # Errors
/// What came instead. The engine may be in any state then.
pub(crate) async fn wake(
    probe: &Probe,
    target: &Target,
    level: u32,
    deadline: Duration,
) -> Result<(), String> {
    let waking = async {
        if level < 2 {
            probe.post(target, "/wake_up", None, deadline).await?;
        } else {
            probe.post(target, "/wake_up?tags=weights", None, deadline).await?;
            let reload = json!({"method": "reload_weights"});
            probe.post(target, "/collective_rpc", Some(&reload), deadline).await?;
            probe.post(target, "/wake_up?tags=kv_cache", None, deadline).await?;
        }
        until(probe, target, false).await
    };
    bounded(waking, deadline, "awake").await
}

async fn bounded(
    change: impl Future<Output = Result<(), String>>,
    deadline: Duration,
    wanted: &str,
) -> Result<(), String> {
    let late = || Err(format!("not {wanted} within {} ms", deadline.as_millis()));
    tokio::time::timeout(deadline, change).await.unwrap_or_else(|_| late())
}

async fn until(probe: &Probe, target: &Target, asleep: bool) -> Result<(), String> {
    while is_sleeping(probe, target).await? != asleep {
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// What the engine says of itself.
///
/// # Errors
/// What came instead of an answer.
pub(crate) async fn is_sleeping(probe: &Probe, target: &Target) -> Result<bool, String> {
    let answer = probe.json(target, "/is_sleeping", ASKED).await?;
    answer
        .get("is_sleeping")
        .and_then(Value::as_bool)
        .ok_or_else(|| "/is_sleeping was answered without is_sleeping".into())
}

/// Notes for the next agent whether the replica's engine sleeps.
pub(crate) fn note(cx: &Context, replica_id: &str, asleep: bool) {
    let Some(record) = cx.records.read(replica_id).filter(|record| record.asleep != asleep) else { return };
    if let Err(error) = cx.records.write(&Record { asleep, ..record }) {
        tracing::error!(replica = replica_id, %error, "cannot write the engine's record");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::warm::WarmSpec;

    #[test]
    fn only_an_engine_that_may_sleep_gets_the_flag_and_gets_it_once() {
        let spec = |sleep_level, args: &[&str]| EngineSpec {
            args: args.iter().map(|a| (*a).to_owned()).collect(),
            warm: WarmSpec { sleep_level, ..WarmSpec::default() },
            ..EngineSpec::default()
        };
        assert_eq!((arguments(&spec(0, &[])), environment(&spec(0, &[]))), (None, None));
        assert_eq!(arguments(&spec(1, &[])).as_deref(), Some("--enable-sleep-mode"));
        assert_eq!(arguments(&spec(2, &["--enable_sleep_mode"])), None);
        assert_eq!(environment(&spec(2, &[])), Some(("VLLM_SERVER_DEV_MODE".into(), "1".into())));
    }
}
