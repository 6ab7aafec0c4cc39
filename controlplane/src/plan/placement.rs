//! Replicas onto GPUs: which node takes a new replica.
//!
//! Room is what the present nodes' healthy GPUs have left after every placed replica, leaving ones included: an engine
//! that still drains still holds its memory. Among the nodes with room the choice spreads a model, first over zones,
//! then over nodes, then towards the emptier node; ties go by name, so that the same input gives the same plan.

use std::collections::{BTreeMap, BTreeSet};

use super::Observed;
use crate::model::Placement;

/// What is free, kept up to date while replicas are placed.
pub(super) struct Capacity<'a> {
    /// By name.
    rooms: Vec<Room<'a>>,
}

struct Room<'a> {
    node_id: &'a str,
    /// Numbers the zones.
    zone: usize,
    /// Free GPUs in the node's own order.
    free: Vec<&'a str>,
    usable: usize,
}

/// Where one model's replicas are, as counts by the positions of [`Capacity`].
pub(super) struct Spread {
    on_node: Vec<usize>,
    in_zone: Vec<usize>,
}

/// Why a replica found no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shortage {
    pub(super) needed: usize,
    pub(super) nodes: usize,
    pub(super) free: usize,
    pub(super) usable: usize,
    /// Most that are free on any one node.
    pub(super) most_on_one: usize,
}

impl<'a> Capacity<'a> {
    /// The room that `placements` leave on the present nodes.
    pub(super) fn new<'p>(observed: &Observed<'a>, placements: impl Iterator<Item = &'p Placement>) -> Self {
        let mut taken: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for assignment in placements.flat_map(|p| &p.assignments) {
            let on_node = taken.entry(assignment.node_id.as_str()).or_default();
            on_node.extend(assignment.gpu_uuids.iter().map(String::as_str));
        }
        let mut zones: BTreeMap<&str, usize> = BTreeMap::new();
        let mut rooms = Vec::new();
        for (name, node) in observed.nodes.iter().filter(|(_, node)| node.lost_since.is_none()) {
            let mut seen = BTreeSet::new();
            let healthy =
                node.gpus.iter().filter(|gpu| gpu.fault.is_empty() && seen.insert(gpu.uuid.as_str()));
            let healthy: Vec<&str> = healthy.map(|gpu| gpu.uuid.as_str()).collect();
            let taken = taken.get(name);
            let is_free = |gpu: &&&str| taken.is_none_or(|taken| !taken.contains(**gpu));
            let free = healthy.iter().filter(is_free).copied().collect();
            let next = zones.len();
            let zone = *zones.entry(node.zone).or_insert(next);
            rooms.push(Room { node_id: name, zone, free, usable: healthy.len() });
        }
        Self { rooms }
    }

    /// Where the replicas of `placement` are.
    pub(super) fn spread(&self, placement: &Placement) -> Spread {
        let mut spread = Spread { on_node: vec![0; self.rooms.len()], in_zone: vec![0; self.rooms.len()] };
        for assignment in &placement.assignments {
            let position = self.rooms.binary_search_by(|room| room.node_id.cmp(&assignment.node_id));
            if let Some((at, room)) = position.ok().and_then(|at| Some((at, self.rooms.get(at)?))) {
                spread.add(at, room.zone);
            }
        }
        spread
    }

    /// Takes `needed` GPUs on one node for a replica of the model that is spread as `spread` says.
    pub(super) fn take(
        &mut self,
        spread: &mut Spread,
        needed: usize,
    ) -> Result<(String, Vec<String>), Shortage> {
        let with_room = self.rooms.iter().enumerate().filter(|(_, room)| room.free.len() >= needed);
        let best = with_room.min_by_key(|(at, room)| {
            let (zone, node) = (spread.in_zone.get(room.zone), spread.on_node.get(*at));
            (zone, node, usize::MAX - room.free.len(), *at)
        });
        let Some(at) = best.map(|(at, _)| at) else { return Err(self.shortage(needed)) };
        let Some(room) = self.rooms.get_mut(at) else { return Err(self.shortage(needed)) };
        spread.add(at, room.zone);
        Ok((room.node_id.to_owned(), room.free.drain(..needed).map(str::to_owned).collect()))
    }

    fn shortage(&self, needed: usize) -> Shortage {
        Shortage {
            needed,
            nodes: self.rooms.len(),
            free: self.rooms.iter().map(|room| room.free.len()).sum(),
            usable: self.rooms.iter().map(|room| room.usable).sum(),
            most_on_one: self.rooms.iter().map(|room| room.free.len()).max().unwrap_or(0),
        }
    }
}

impl Spread {
    fn add(&mut self, node: usize, zone: usize) {
        for (counts, at) in [(&mut self.on_node, node), (&mut self.in_zone, zone)] {
            if let Some(count) = counts.get_mut(at) {
                *count += 1;
            }
        }
    }
}

impl Shortage {
    /// "waits for ..."
    pub(super) fn sentence(&self) -> String {
        let Self { needed, nodes, free, usable, most_on_one } = *self;
        let gpus = if needed == 1 { "a GPU".to_owned() } else { format!("{needed} GPUs on one node") };
        if nodes == 0 {
            return "waits for a node: none is present".into();
        }
        if free >= needed {
            return format!(
                "waits for {gpus}: at most {most_on_one} are free on any one node, {free} free of {usable}"
            );
        }
        format!("waits for {gpus}: needs {needed}, {free} free of {usable}")
    }
}
