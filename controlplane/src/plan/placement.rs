//! Replicas onto nodes: which node takes a new replica.
//!
//! Room is what the present nodes' healthy GPUs have left after every placed replica, leaving ones included: an engine
//! that still drains still holds its memory. Among the nodes that may take the replica and have room, in this order: the
//! one that keeps zones within `max_skew` (softly: a full zone never holds a replica back), that has fewest replicas of
//! the model, that does not rather take none, that needs no degraded GPU for it, whose GPU is the smallest that suffices, whose zone has fewest, that has
//! most GPUs free; ties go by name, so that the same input gives the same plan.

mod reserve;

use std::collections::{BTreeMap, BTreeSet};

use super::{
    NodeSeen, Observed,
    explain::Shortage,
    gpus::{self, Held, Request, Slot},
    nodes::Refusal,
    safety::Caps,
};
use crate::model::{Assignment, Deployment, Placement, policy::PlacementPolicy};
use reserve::Reserve;
pub(super) use reserve::RoomMade;

/// What is free, kept up to date while replicas are placed.
pub(super) struct Capacity<'a> {
    /// By name.
    rooms: Vec<Room<'a>>,
    /// Zones by their numbers; those of lost nodes are among them.
    zones: Vec<&'a str>,
    /// Nodes that are lost, with the zones they were in.
    lost: Vec<(&'a str, usize, NodeSeen<'a>)>,
    /// What sleeps, and what leaves.
    reserve: Reserve,
}

#[derive(Clone)]
struct Room<'a> {
    node_id: &'a str,
    node: NodeSeen<'a>,
    /// Numbers the zones.
    zone: usize,
    /// Healthy GPUs in the node's own order.
    slots: Vec<Slot<'a>>,
    /// How many of them are nobody's.
    free: usize,
    /// One of them is degraded.
    is_degraded: bool,
}

impl Room<'_> {
    /// The GiB that would be left over on the best GPU, if there is room.
    fn fits(&self, request: Request) -> Option<u64> {
        if request.memory_bytes == 0 && !request.share {
            return (self.free >= request.gpus).then_some(0);
        }
        gpus::room(&self.slots, request)
    }

    fn count_free(&mut self) {
        self.free = self.slots.iter().filter(|slot| slot.held == Held::Nobody).count();
    }
}

/// What one model asks for, and how it is spread, by the positions of [`Capacity`].
pub(super) struct Wish<'d> {
    pub(super) request: Request,
    policy: &'d PlacementPolicy,
    refusals: Vec<Option<Refusal>>,
    reluctant: Vec<bool>,
    on_node: Vec<usize>,
    in_zone: Vec<usize>,
    /// Which zones count.
    is_domain: Vec<bool>,
}

impl<'d> Wish<'d> {
    fn add(&mut self, node: usize, zone: usize) {
        for (counts, at) in [(&mut self.on_node, node), (&mut self.in_zone, zone)] {
            if let Some(count) = counts.get_mut(at) {
                *count += 1;
            }
        }
    }

    fn domains(&self) -> impl Iterator<Item = usize> {
        self.in_zone.iter().zip(&self.is_domain).filter(|(_, is_domain)| **is_domain).map(|(count, _)| *count)
    }

    /// Replicas in the emptiest zone: 0 while there are fewer zones than there should be.
    fn fewest(&self) -> usize {
        let wanted = usize::try_from(self.policy.spread.min_domains).unwrap_or(usize::MAX);
        if self.domains().count() < wanted { 0 } else { self.domains().min().unwrap_or(0) }
    }

    /// How far `count` replicas in one zone are beyond what `max_skew` allows.
    fn beyond(&self, count: usize, fewest: usize) -> usize {
        let max_skew = usize::try_from(self.policy.spread.max_skew).unwrap_or(usize::MAX);
        count.saturating_sub(fewest).saturating_sub(max_skew)
    }

    /// The measure that the rebalancer improves: how far the fullest zone is beyond what `max_skew` allows.
    pub(super) fn excess(&self) -> usize {
        self.beyond(self.domains().max().unwrap_or(0), self.fewest())
    }
}

impl<'a> Capacity<'a> {
    /// The room that `placements` leave on the present nodes.
    pub(super) fn new<'p>(observed: &Observed<'a>, placements: impl Iterator<Item = &'p Placement>) -> Self {
        let mut held: BTreeMap<&str, BTreeMap<&str, Held>> = BTreeMap::new();
        let mut reserve = Reserve::default();
        for (p, a) in placements.flat_map(|p| p.assignments.iter().map(move |a| (p, a))) {
            reserve.note(&p.model, a);
            let (on_node, request) = (held.entry(a.node_id.as_str()).or_default(), Request::of(&a.spec));
            for uuid in &a.gpu_uuids {
                let held = on_node.entry(uuid.as_str()).or_default();
                *held = held.and(request);
            }
        }
        let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
        let mut capacity = Self { rooms: Vec::new(), zones: Vec::new(), lost: Vec::new(), reserve };
        for (node_id, node) in &observed.nodes {
            let zone = *numbers.entry(node.zone).or_insert_with(|| {
                capacity.zones.push(node.zone);
                capacity.zones.len() - 1
            });
            if node.lost_since.is_some() {
                capacity.lost.push((node_id, zone, node.clone()));
                continue;
            }
            let (mut seen, held) = (BTreeSet::new(), held.get(node_id));
            let healthy =
                node.gpus.iter().filter(|gpu| gpu.fault.is_empty() && seen.insert(gpu.uuid.as_str()));
            let slot = |gpu: &'a crate::model::Gpu| {
                let held = held.and_then(|held| held.get(gpu.uuid.as_str())).copied().unwrap_or_default();
                Slot::new(gpu, node.used_mib.get(gpu.uuid.as_str()).copied().unwrap_or(0), held)
            };
            let slots = healthy.map(slot).collect();
            let is_degraded = node.gpus.iter().any(|gpu| gpu.degraded);
            let mut room = Room { node_id, node: node.clone(), zone, slots, free: 0, is_degraded };
            room.count_free();
            capacity.rooms.push(room);
        }
        capacity
    }

    fn position(&self, node_id: &str) -> Option<usize> {
        self.rooms.binary_search_by(|room| room.node_id.cmp(node_id)).ok()
    }

    /// What `deployment` asks for, given the nodes of its replicas that will `stay` and those where it keeps `failing`.
    pub(super) fn wish<'d, 's>(
        &self,
        deployment: &'d Deployment,
        stay: impl Iterator<Item = &'s str>,
        failing: &BTreeSet<&str>,
    ) -> Wish<'d> {
        let policy = &deployment.policy.placement;
        let mut wish = Wish {
            request: Request::of(&deployment.spec),
            policy,
            refusals: Vec::with_capacity(self.rooms.len()),
            reluctant: Vec::with_capacity(self.rooms.len()),
            on_node: vec![0; self.rooms.len()],
            in_zone: vec![0; self.zones.len()],
            is_domain: vec![false; self.zones.len()],
        };
        for room in &self.rooms {
            let refusal = room.node.refuses(room.node_id, policy);
            wish.refusals.push(refusal.or_else(|| failing.contains(room.node_id).then_some(Refusal::Failed)));
            wish.reluctant.push(room.node.is_reluctant(policy));
        }
        let present = self.rooms.iter().map(|room| (room.node_id, room.zone, &room.node));
        let lost = self.lost.iter().filter(|(_, _, node)| !node.zone.is_empty());
        for (node_id, zone, node) in present.chain(lost.map(|(id, zone, node)| (*id, *zone, node))) {
            if let Some(is_domain) = wish.is_domain.get_mut(zone) {
                *is_domain |= node.is_domain(node_id, policy);
            }
        }
        for node_id in stay {
            if let Some((at, room)) = self.position(node_id).and_then(|at| Some((at, self.rooms.get(at)?))) {
                wish.add(at, room.zone);
            }
        }
        wish
    }

    /// The best node with room.
    fn best(&self, wish: &Wish<'_>) -> Option<usize> {
        let fewest = wish.fewest();
        let key = |at: usize, room: &Room<'_>| {
            if wish.refusals.get(at).is_none_or(Option::is_some) {
                return None;
            }
            let left_over = room.fits(wish.request)?;
            let in_zone = wish.in_zone.get(room.zone).copied().unwrap_or(0);
            let (on_node, reluctant) = (wish.on_node.get(at)?, wish.reluctant.get(at)?);
            let beyond = wish.beyond(in_zone + 1, fewest);
            let degraded = room.is_degraded && !gpus::is_sound(&room.slots, wish.request);
            Some((beyond, *on_node, (*reluctant, degraded), left_over, in_zone, usize::MAX - room.free, at))
        };
        self.rooms.iter().enumerate().filter_map(|(at, room)| key(at, room)).min().map(|key| key.6)
    }

    /// So many replicas of `wish` find no place now: sleepers may end for them.
    pub(super) fn lacks(&mut self, model: &str, wish: &Wish<'_>, replicas: usize) {
        let may = wish.refusals.iter().map(Option::is_none).collect();
        self.reserve.need(model, wish.request, may, replicas);
    }

    /// The replica is as it is now: asleep, awake, or leaving.
    pub(super) fn note(&mut self, model: &str, assignment: &Assignment) {
        self.reserve.forget(&assignment.replica_id);
        self.reserve.note(model, assignment);
    }

    /// Once every model has taken its step: the sleepers that end for those that lack a place, and for whom.
    pub(super) fn make_room(self, caps: &mut Caps) -> RoomMade {
        self.reserve.make_room(self.rooms, caps)
    }

    /// Takes GPUs on one node for a replica.
    pub(super) fn take(&mut self, wish: &mut Wish<'_>) -> Result<(String, Vec<String>), Shortage> {
        let best = self.best(wish).and_then(|at| Some((at, self.rooms.get_mut(at)?)));
        let picked = best.and_then(|(at, room)| Some((at, gpus::pick(&room.slots, wish.request)?, room)));
        let Some((at, picked, room)) = picked else { return Err(self.shortage(wish)) };
        let mut uuids = Vec::with_capacity(picked.len());
        for position in picked {
            if let Some(slot) = room.slots.get_mut(position) {
                slot.held = slot.held.and(wish.request);
                uuids.push(slot.uuid.to_owned());
            }
        }
        room.count_free();
        wish.add(at, room.zone);
        Ok((room.node_id.to_owned(), uuids))
    }

    /// Whether a replica of `wish` would fit where `former` is, were that gone.
    pub(super) fn fits_instead_of(&self, wish: &Wish<'_>, former: &Assignment) -> bool {
        let Some(at) = self.position(&former.node_id) else { return false };
        let Some(room) = self.rooms.get(at).filter(|_| matches!(wish.refusals.get(at), Some(None))) else {
            return false;
        };
        gpus::room_without(&room.slots, wish.request, Request::of(&former.spec), &former.gpu_uuids)
    }

    /// Whether moving a replica from `node_id` to where a new one would go now brings the zones closer together.
    pub(super) fn improves(&self, wish: &Wish<'_>, node_id: &str) -> bool {
        let from = self.position(node_id).and_then(|at| self.rooms.get(at));
        let to = self.best(wish).and_then(|at| self.rooms.get(at));
        let Some((from, to)) = from.zip(to) else { return false };
        let mut after = wish.in_zone.clone();
        if let Some(count) = after.get_mut(from.zone) {
            *count = count.saturating_sub(1);
        }
        if let Some(count) = after.get_mut(to.zone) {
            *count += 1;
        }
        let in_domains = after.iter().zip(&wish.is_domain).filter(|(_, is_domain)| **is_domain);
        let most = |counts: &mut dyn Iterator<Item = usize>| counts.max().unwrap_or(0);
        let (before_most, after_most) =
            (most(&mut wish.domains()), most(&mut in_domains.map(|(count, _)| *count)));
        let before_at = wish.in_zone.get(from.zone).copied().unwrap_or(0);
        // Out of the fullest zone, into one that does not become as full.
        let landed = after.get(to.zone).copied().unwrap_or(usize::MAX);
        from.zone != to.zone && before_at == before_most && landed < before_at && after_most <= before_most
    }

    /// Replicas per zone that counts, for the report.
    pub(super) fn zones<'w>(&'w self, wish: &'w Wish<'_>) -> impl Iterator<Item = (&'w str, usize)> {
        let counted = self.zones.iter().zip(wish.in_zone.iter().zip(&wish.is_domain));
        counted.filter(|(_, (_, is_domain))| **is_domain).map(|(zone, (count, _))| (*zone, *count))
    }

    fn shortage(&self, wish: &Wish<'_>) -> Shortage {
        let request = wish.request;
        let mut reasons: BTreeMap<Refusal, usize> = BTreeMap::new();
        let (mut free, mut usable, mut most_on_one) = (0, 0, 0);
        for (room, refusal) in self.rooms.iter().zip(&wish.refusals) {
            let offering = gpus::offering(&room.slots, request);
            let reason = refusal.clone().unwrap_or_else(|| {
                (free, usable) = (free + offering, usable + room.slots.len());
                most_on_one = most_on_one.max(offering);
                if room.slots.len() < request.gpus {
                    Refusal::TooFewGpus
                } else if room.slots.iter().filter(|slot| slot.could(request)).count() < request.gpus {
                    Refusal::TooSmall
                } else {
                    Refusal::Busy
                }
            });
            *reasons.entry(reason).or_default() += 1;
        }
        Shortage { request, nodes: self.rooms.len(), free, usable, most_on_one, reasons }
    }
}
