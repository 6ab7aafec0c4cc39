//! The GPUs of one node: what each still offers, and which of them a replica gets.
//!
//! A GPU belongs to one replica, unless all that use it share theirs (`share_gpu`): then it takes as many as its memory
//! holds. Degraded GPUs are taken only where healthy ones are too few. Among GPUs that offer enough the smallest is taken, so that a small model does not sit on a large GPU; several
//! are taken out of one link group, else out of one NUMA node, where the agent reports such, and out of the tightest
//! group that has enough, so that the wider ones stay whole.

use std::collections::BTreeMap;

use crate::model::{EngineSpec, Gpu};

/// What one replica asks of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) gpus: usize,
    /// Of each; 0: any.
    pub(super) memory_bytes: u64,
    pub(super) share: bool,
}

impl Request {
    pub(super) fn of(spec: &EngineSpec) -> Self {
        let gpus = usize::try_from(spec.gpus_per_replica).unwrap_or(usize::MAX);
        let resources = &spec.resources;
        Self { gpus, memory_bytes: resources.gpu_memory_bytes, share: resources.share_gpu }
    }
}

/// Who uses a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Held {
    #[default]
    Nobody,
    /// One replica.
    Whole,
    /// Replicas that share it, with so many bytes in all.
    Shared(u64),
}

impl Held {
    /// With one replica more.
    pub(super) fn and(self, request: Request) -> Self {
        match (self, request.share) {
            (Self::Whole, _) | (_, false) => Self::Whole,
            (Self::Nobody, true) => Self::Shared(request.memory_bytes),
            (Self::Shared(sum), true) => Self::Shared(sum.saturating_add(request.memory_bytes)),
        }
    }

    /// With one replica less.
    fn without(self, request: Request) -> Self {
        match self {
            Self::Shared(sum) if request.share && sum > request.memory_bytes => {
                Self::Shared(sum - request.memory_bytes)
            }
            _ => Self::Nobody,
        }
    }
}

/// A usable GPU.
#[derive(Debug, Clone)]
pub(super) struct Slot<'a> {
    pub(super) uuid: &'a str,
    total_bytes: u64,
    /// In use as last reported, by whomever.
    used_bytes: u64,
    numa_node: Option<u32>,
    link_group: &'a str,
    degraded: bool,
    pub(super) held: Held,
}

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

impl<'a> Slot<'a> {
    pub(super) fn new(gpu: &'a Gpu, used_mib: u64, held: Held) -> Self {
        Self {
            uuid: &gpu.uuid,
            total_bytes: gpu.memory_total_mib.saturating_mul(MIB),
            used_bytes: used_mib.saturating_mul(MIB),
            numa_node: gpu.numa_node,
            link_group: &gpu.link_group,
            degraded: gpu.degraded,
            held,
        }
    }

    /// None: not enough. Else the whole GiB that would be left over, when memory was asked for.
    fn offers(&self, request: Request) -> Option<u64> {
        let free = match self.held {
            Held::Whole => return None,
            Held::Shared(_) if !request.share => return None,
            Held::Shared(sum) => self.total_bytes.saturating_sub(sum),
            Held::Nobody if request.memory_bytes == 0 => return Some(0),
            // What others use on a GPU that is nobody's is not ours to give. Of a held one the use is known to be ours.
            Held::Nobody => self.total_bytes.saturating_sub(self.used_bytes),
        };
        free.checked_sub(request.memory_bytes)?;
        Some((self.total_bytes - request.memory_bytes) / GIB)
    }

    /// As it is when a replica that asked for `former` is not there.
    pub(super) fn leave(&mut self, former: Request) {
        self.held = self.held.without(former);
        // Its memory is free once it has ended.
        self.used_bytes = 0;
    }

    /// Whether it could ever do, empty.
    pub(super) fn could(&self, request: Request) -> bool {
        self.total_bytes >= request.memory_bytes
    }
}

/// Whether `slots` have room, and the GiB that would be left over on the best of them.
pub(super) fn room(slots: &[Slot<'_>], request: Request) -> Option<u64> {
    let mut offered = 0;
    let mut least = u64::MAX;
    for left in slots.iter().filter_map(|slot| slot.offers(request)) {
        offered += 1;
        least = least.min(left);
    }
    (offered >= request.gpus).then_some(least)
}

/// How many of `slots` offer enough.
pub(super) fn offering(slots: &[Slot<'_>], request: Request) -> usize {
    slots.iter().filter(|slot| slot.offers(request).is_some()).count()
}

/// Whether healthy ones alone would do.
pub(super) fn is_sound(slots: &[Slot<'_>], request: Request) -> bool {
    let sound = slots.iter().filter(|slot| !slot.degraded && slot.offers(request).is_some());
    sound.take(request.gpus).count() == request.gpus
}

/// The positions of those that a replica gets.
pub(super) fn pick(slots: &[Slot<'_>], request: Request) -> Option<Vec<usize>> {
    let offers = slots.iter().enumerate().filter_map(|(at, slot)| Some((at, slot, slot.offers(request)?)));
    let mut offers: Vec<_> = offers.collect();
    if offers.len() < request.gpus {
        return None;
    }
    if is_sound(slots, request) {
        offers.retain(|(_, slot, _)| !slot.degraded);
    }
    let mut links: BTreeMap<&str, usize> = BTreeMap::new();
    let mut numas: BTreeMap<u32, usize> = BTreeMap::new();
    for (_, slot, _) in &offers {
        if !slot.link_group.is_empty() {
            *links.entry(slot.link_group).or_default() += 1;
        }
        if let Some(numa) = slot.numa_node {
            *numas.entry(numa).or_default() += 1;
        }
    }
    let tightest_link = links
        .iter()
        .filter(|(_, count)| **count >= request.gpus)
        .min_by_key(|(name, count)| (**count, *name));
    let tightest_numa = numas
        .iter()
        .filter(|(_, count)| **count >= request.gpus)
        .min_by_key(|(name, count)| (**count, *name));
    let in_group = |slot: &Slot<'_>| match (tightest_link, tightest_numa) {
        (Some((link, _)), _) => slot.link_group == *link,
        (None, Some((numa, _))) => slot.numa_node == Some(*numa),
        (None, None) => true,
    };
    // One GPU may come from anywhere: a GPU without links rather than one out of a group.
    let anywhere = request.gpus <= 1;
    let mut chosen: Vec<_> = offers.iter().filter(|(_, slot, _)| anywhere || in_group(slot)).collect();
    chosen.sort_by_key(|(at, slot, left)| {
        let begun = matches!(slot.held, Held::Shared(_));
        let linked = links.get(slot.link_group).copied().unwrap_or(0);
        // Several that fit no group: as many as can be out of the largest.
        let by_group = if anywhere { linked } else { usize::MAX - linked };
        (!begun, *left, by_group, *at)
    });
    let mut picked: Vec<usize> = chosen.into_iter().take(request.gpus).map(|(at, ..)| *at).collect();
    picked.sort_unstable();
    Some(picked)
}

/// Whether `request` would find room if the replica that asked for `former` on `uuids` were not there.
pub(super) fn room_without(slots: &[Slot<'_>], request: Request, former: Request, uuids: &[String]) -> bool {
    let mut slots = slots.to_vec();
    for slot in slots.iter_mut().filter(|slot| uuids.iter().any(|uuid| uuid == slot.uuid)) {
        slot.leave(former);
    }
    room(&slots, request).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(uuid: &str, gib: u64, numa_node: Option<u32>, link_group: &str) -> Gpu {
        Gpu {
            uuid: uuid.into(),
            name: String::new(),
            memory_total_mib: gib * 1024,
            fault: String::new(),
            degraded: false,
            numa_node,
            link_group: link_group.into(),
        }
    }

    const fn ask(gpus: usize, gib: u64, share: bool) -> Request {
        Request { gpus, memory_bytes: gib * GIB, share }
    }

    #[test]
    fn the_smallest_that_suffices_is_taken_and_foreign_memory_is_not_ours() {
        let gpus = [gpu("h200", 141, None, ""), gpu("h100", 80, None, ""), gpu("l4", 24, None, "")];
        let slots = |used| -> Vec<Slot<'_>> {
            gpus.iter().zip(used).map(|(g, used)| Slot::new(g, used, Held::Nobody)).collect()
        };
        assert_eq!(pick(&slots([0, 0, 0]), ask(1, 20, false)), Some(vec![2]));
        assert_eq!(pick(&slots([0, 0, 0]), ask(1, 40, false)), Some(vec![1]));
        assert_eq!(pick(&slots([0, 60 * 1024, 0]), ask(1, 40, false)), Some(vec![0]), "60 GiB are in use");
        assert_eq!(pick(&slots([0, 0, 0]), ask(2, 40, false)), Some(vec![0, 1]));
        assert_eq!(pick(&slots([0, 0, 0]), ask(3, 40, false)), None);
        assert_eq!(pick(&slots([9, 9, 9]), ask(3, 0, false)), Some(vec![0, 1, 2]), "any will do");
    }

    #[test]
    fn several_come_out_of_the_tightest_group() {
        let gpus = [
            gpu("a", 80, Some(0), "x"),
            gpu("b", 80, Some(0), "y"),
            gpu("c", 80, Some(1), "x"),
            gpu("d", 80, Some(1), "x"),
            gpu("e", 80, Some(1), "y"),
        ];
        let slots: Vec<_> = gpus.iter().map(|g| Slot::new(g, 0, Held::Nobody)).collect();
        assert_eq!(pick(&slots, ask(2, 0, false)), Some(vec![1, 4]), "the pair y, and x stays whole");
        assert_eq!(pick(&slots, ask(3, 0, false)), Some(vec![0, 2, 3]));
        assert_eq!(pick(&slots, ask(1, 0, false)), Some(vec![1]), "out of the smaller group");
        assert_eq!(pick(&slots, ask(4, 0, false)), Some(vec![0, 1, 2, 3]), "no group has four: any four");
        let plain: Vec<Gpu> = gpus.iter().map(|g| Gpu { link_group: String::new(), ..g.clone() }).collect();
        let slots: Vec<_> = plain.iter().map(|g| Slot::new(g, 0, Held::Nobody)).collect();
        assert_eq!(pick(&slots, ask(2, 0, false)), Some(vec![0, 1]), "one NUMA node");
    }

    #[test]
    fn a_degraded_gpu_is_taken_only_where_healthy_ones_are_too_few() {
        let mut gpus = [gpu("a", 24, None, ""), gpu("b", 80, None, ""), gpu("c", 80, None, "")];
        gpus[0].degraded = true;
        let slots: Vec<_> = gpus.iter().map(|g| Slot::new(g, 0, Held::Nobody)).collect();
        assert_eq!(pick(&slots, ask(1, 20, false)), Some(vec![1]), "not the smallest");
        assert_eq!(pick(&slots, ask(2, 0, false)), Some(vec![1, 2]));
        assert_eq!(pick(&slots, ask(3, 0, false)), Some(vec![0, 1, 2]));
        assert!(is_sound(&slots, ask(2, 0, false)) && !is_sound(&slots, ask(3, 0, false)));
    }

    #[test]
    fn a_shared_gpu_is_filled_before_another_is_begun() {
        let gpus = [gpu("a", 80, None, ""), gpu("b", 80, None, "")];
        let request = ask(1, 30, true);
        let held = Held::Nobody.and(request);
        let slots = [Slot::new(&gpus[0], 0, Held::Nobody), Slot::new(&gpus[1], 0, held)];
        assert_eq!(pick(&slots, request), Some(vec![1]));
        assert_eq!(pick(&slots, ask(1, 0, false)), Some(vec![0]), "a whole GPU is nobody's");
        let full = [Slot::new(&gpus[1], 0, held.and(request))];
        assert_eq!(pick(&full, request), None, "20 GiB are left");
        assert!(room_without(&full, request, request, &["b".into()]));
        assert_eq!(held.and(ask(1, 0, false)), Held::Whole);
        assert_eq!(offering(&slots, request), 2);
    }
}
