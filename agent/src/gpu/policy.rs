//! What is made of what a GPU says: readings and XIDs in, a verdict out.
//!
//! Pure: time is an argument, and what has to be remembered between two readings is in [`Judge`]. A verdict follows the
//! reading as far as the reading tells (ECC counters, pending remaps, temperature, a card that does not answer): when the
//! sign is gone, so is the fault. What a reading does not tell, an XID, stands until an operator clears it or the machine
//! boots: the driver tells of it once. Applications' XIDs never condemn a GPU by themselves: a broken model that is moved
//! from GPU to GPU would condemn the whole fleet.
//!
//! Reasons are the same sentence as long as the trouble is the same: they are stored in the control plane, which must not
//! write once a second because a temperature changed.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use penstock_config::agent::{GpuAction, GpuPolicyConfig};
use penstock_proto::v1;
use serde::{Deserialize, Serialize};

use super::{Card, Recovery, Remedy, Trouble, xid};

/// Applications' XIDs that are kept by time, per GPU.
const KEPT: usize = 1_024;

/// How a GPU is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Health {
    /// As it should be.
    Healthy,
    /// Works, and should rather not be used.
    Degraded,
    /// Not to be used.
    Faulty,
}

/// What is made of a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// How it is.
    pub(crate) health: Health,
    /// Why; empty for a healthy one.
    pub(crate) reason: String,
    /// What would help.
    pub(crate) remedy: Remedy,
}

/// XIDs of one number on one GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Count {
    /// How many were seen.
    pub(crate) count: u64,
    /// When the last one was.
    pub(crate) last_unix_ms: u64,
    /// Seen by an operator: it condemns no more.
    pub(crate) cleared: bool,
}

/// What outlives the agent, until the machine boots.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Remembered {
    /// By GPU, by number.
    pub(crate) xids: BTreeMap<String, BTreeMap<u32, Count>>,
    /// Uncorrected ECC errors that an operator has accepted, by GPU.
    pub(crate) ecc_accepted: BTreeMap<String, u64>,
}

/// What is known of one GPU from before, beside what is [`Remembered`].
#[derive(Debug, Default)]
struct Past {
    /// Times of applications' XIDs.
    application: VecDeque<u64>,
    hot: Lasting,
    unreadable_since: Option<Instant>,
    /// Uncorrected ECC errors in the last reading that told of them.
    uncorrected: u64,
}

/// A sign that counts once it has lasted, and is gone once it has been away for as long.
#[derive(Debug, Default)]
struct Lasting {
    /// Since when the sign differs from what holds.
    since: Option<Instant>,
    holds: bool,
}

impl Lasting {
    fn look(&mut self, sign: bool, for_long: Duration, now: Instant) -> bool {
        if sign == self.holds {
            self.since = None;
        } else {
            let since = *self.since.get_or_insert(now);
            if now.saturating_duration_since(since) >= for_long {
                (self.holds, self.since) = (sign, None);
            }
        }
        self.holds
    }
}

/// Judges the GPUs of one node.
#[derive(Debug)]
pub(crate) struct Judge {
    policy: GpuPolicyConfig,
    remembered: Remembered,
    past: BTreeMap<String, Past>,
}

/// What speaks against a GPU.
#[derive(Default)]
struct Findings(Vec<(Health, String, Remedy)>);

impl Findings {
    fn add(&mut self, action: GpuAction, reason: impl Into<String>, remedy: Remedy) {
        match action {
            GpuAction::Fault => self.0.push((Health::Faulty, reason.into(), remedy)),
            GpuAction::Degrade => self.0.push((Health::Degraded, reason.into(), remedy)),
            GpuAction::Ignore => {}
        }
    }

    /// The worst, with everything that is as bad.
    fn verdict(self) -> Verdict {
        let health = self.0.iter().map(|found| found.0).max().unwrap_or(Health::Healthy);
        let worst: Vec<_> = self.0.into_iter().filter(|found| found.0 == health).collect();
        let remedy = worst.iter().map(|found| found.2).max().unwrap_or(Remedy::None);
        let reasons: Vec<String> = worst.into_iter().map(|found| found.1).collect();
        Verdict { health, reason: reasons.join("; "), remedy }
    }
}

impl Judge {
    /// Goes on from what is `remembered` since the machine booted.
    pub(crate) fn new(policy: GpuPolicyConfig, remembered: Remembered) -> Self {
        Self { policy, remembered, past: BTreeMap::new() }
    }

    /// What should outlive the agent.
    pub(crate) fn remembered(&self) -> &Remembered {
        &self.remembered
    }

    /// Whether an XID is one that says something of the GPU, and not of an application.
    pub(crate) fn is_of_hardware(&self, xid: u32) -> bool {
        self.policy.fault_xids.contains(&xid) || self.policy.degrade_xids.contains(&xid)
    }

    /// Notes an XID.
    pub(crate) fn note_xid(&mut self, uuid: &str, xid: u32, unix_ms: u64) {
        let of_gpu = self.remembered.xids.entry(uuid.to_owned()).or_default();
        let count = of_gpu.entry(xid).or_insert(Count { count: 0, last_unix_ms: 0, cleared: false });
        count.count = count.count.saturating_add(1);
        (count.last_unix_ms, count.cleared) = (unix_ms, false);
        if !self.is_of_hardware(xid) {
            let application = &mut self.past.entry(uuid.to_owned()).or_default().application;
            if application.len() == KEPT {
                application.pop_front();
            }
            application.push_back(unix_ms);
        }
    }

    /// An operator has seen to the GPU: its XIDs and its uncorrected errors up to now condemn it no more. False: there was
    /// nothing to clear.
    pub(crate) fn clear(&mut self, uuid: &str) -> bool {
        let before = self.remembered.clone();
        for count in self.remembered.xids.get_mut(uuid).into_iter().flat_map(BTreeMap::values_mut) {
            count.cleared = true;
        }
        if let Some(past) = self.past.get_mut(uuid) {
            past.application.clear();
            if past.uncorrected > 0 {
                self.remembered.ecc_accepted.insert(uuid.to_owned(), past.uncorrected);
            }
        }
        self.remembered != before
    }

    /// The verdict on `card` as it reads at `now`, which is `unix_ms`.
    pub(crate) fn judge(&mut self, card: &Card, now: Instant, unix_ms: u64) -> Verdict {
        let mut found = Findings::default();
        let uuid = &card.gpu.uuid;
        self.look_at_trouble(card, now, &mut found);
        self.look_at_xids(uuid, unix_ms, &mut found);
        if card.trouble.is_none() {
            self.look_at_errors(card, &mut found);
            self.look_at_heat(&card.gpu, now, &mut found);
        }
        found.verdict()
    }

    /// Its XIDs, as they are told to others.
    pub(crate) fn xids(&self, uuid: &str) -> Vec<v1::GpuXid> {
        let known = self.remembered.xids.get(uuid).into_iter().flatten();
        let told = known.filter(|(_, count)| !count.cleared).map(|(number, count)| v1::GpuXid {
            xid: *number,
            meaning: xid::meaning(*number).into(),
            count: count.count,
            last_unix_ms: count.last_unix_ms,
        });
        told.collect()
    }

    fn look_at_trouble(&mut self, card: &Card, now: Instant, found: &mut Findings) {
        let past = self.past.entry(card.gpu.uuid.clone()).or_default();
        let Some(trouble) = &card.trouble else {
            past.unreadable_since = None;
            return;
        };
        match trouble {
            Trouble::Lost => {
                found.add(GpuAction::Fault, "the driver says that the GPU is lost", Remedy::Reboot);
            }
            Trouble::NeedsReset => {
                found.add(GpuAction::Fault, "the driver says that the GPU needs a reset", Remedy::Reset);
            }
            Trouble::Unreadable(why) => {
                let since = *past.unreadable_since.get_or_insert(now);
                let limit = Duration::from_secs(self.policy.unreadable_s);
                let long = now.saturating_duration_since(since) >= limit;
                let action = if long { self.policy.unreadable } else { GpuAction::Degrade };
                found.add(action, format!("the driver cannot read it: {why}"), Remedy::Reset);
            }
        }
    }

    fn look_at_xids(&mut self, uuid: &str, unix_ms: u64, found: &mut Findings) {
        let known = self.remembered.xids.get(uuid).into_iter().flatten();
        for (number, _) in known.filter(|(_, count)| !count.cleared) {
            let action = match number {
                n if self.policy.fault_xids.contains(n) => GpuAction::Fault,
                n if self.policy.degrade_xids.contains(n) => GpuAction::Degrade,
                _ => GpuAction::Ignore,
            };
            found.add(action, xid::named(*number), xid::remedy(*number));
        }
        let limit = usize::try_from(self.policy.application_xids).unwrap_or(usize::MAX);
        let window_ms = self.policy.application_xids_s.saturating_mul(1_000);
        let Some(past) = self.past.get_mut(uuid) else { return };
        past.application.retain(|at| at.saturating_add(window_ms) > unix_ms);
        if limit > 0 && past.application.len() >= limit {
            let window_s = self.policy.application_xids_s;
            let reason = format!("{limit} or more XIDs of applications within {window_s} s");
            found.add(GpuAction::Degrade, reason, Remedy::None);
        }
    }

    fn look_at_errors(&mut self, card: &Card, found: &mut Findings) {
        let uuid = &card.gpu.uuid;
        let errors = card.gpu.errors.unwrap_or_default();
        let uncorrected = errors.uncorrected.unwrap_or(0);
        if let Some(past) = self.past.get_mut(uuid) {
            past.uncorrected = uncorrected;
        }
        // The counter begins anew at a reset: what was accepted before says nothing of what comes.
        if self.remembered.ecc_accepted.get(uuid).is_some_and(|accepted| uncorrected < *accepted) {
            self.remembered.ecc_accepted.remove(uuid);
        }
        if uncorrected > self.remembered.ecc_accepted.get(uuid).copied().unwrap_or(0) {
            let reason = "uncorrected ECC errors since the driver was loaded";
            found.add(self.policy.ecc_uncorrected, reason, Remedy::Reset);
        }
        if errors.remap_failed == Some(true) {
            let reason = "the remapping of a broken memory row failed";
            found.add(self.policy.remap_failed, reason, Remedy::Replacement);
        }
        if errors.remap_pending == Some(true) {
            let reason = "a broken memory row is remapped at the next reset";
            found.add(self.policy.remap_pending, reason, Remedy::Reset);
        }
        match card.recovery {
            Some(Recovery::Reset) => {
                found.add(GpuAction::Fault, "the driver asks for a reset of the GPU", Remedy::Reset);
            }
            Some(Recovery::Reboot) => {
                found.add(GpuAction::Fault, "the driver asks for a reboot of the machine", Remedy::Reboot);
            }
            Some(Recovery::Drain) => {
                let reason = "the driver asks to drain the GPU and to reset it";
                found.add(GpuAction::Degrade, reason, Remedy::Reset);
            }
            None => {}
        }
    }

    fn look_at_heat(&mut self, gpu: &v1::Gpu, now: Instant, found: &mut Findings) {
        let over = gpu.temperature_c.zip(gpu.slowdown_c).is_some_and(|(is, limit)| limit > 0 && is >= limit);
        let slowed = gpu.throttle_reasons.iter().any(|reason| reason == super::HOT);
        let hot_for = Duration::from_secs(self.policy.hot_s);
        let past = self.past.entry(gpu.uuid.clone()).or_default();
        if past.hot.look(over || slowed, hot_for, now) {
            let reason = "too hot: at its slowdown temperature, or slowed down by hardware";
            found.add(self.policy.hot, reason, Remedy::Cooling);
        }
    }
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
