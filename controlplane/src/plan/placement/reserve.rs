//! The GPUs of sleepers: taken, and yet to be had by whoever finds no other.
//!
//! Models say in their turn what they lack; who ends for it is decided when all have had theirs, so that it does not matter
//! in which order they come. It is decided on the rooms as they will be when everything that leaves has left: those that
//! lack a place take one there, one after the other, so that what leaves already, for whomever, ends no further sleeper.

use super::{
    super::{gpus, gpus::Request, safety::Caps},
    Room,
};
use crate::model::{Assignment, Phase};

/// A replica whose GPUs come free, or would.
#[derive(Debug, Clone)]
struct Holding {
    model: String,
    replica_id: String,
    generation: u64,
    node_id: String,
    request: Request,
    gpu_uuids: Vec<String>,
}

impl Holding {
    fn leave(&self, room: &mut Room<'_>) {
        for slot in room.slots.iter_mut().filter(|slot| self.gpu_uuids.iter().any(|uuid| uuid == slot.uuid)) {
            slot.leave(self.request);
        }
        room.count_free();
    }
}

/// Replicas that found no place.
#[derive(Debug)]
struct Need {
    model: String,
    request: Request,
    /// By the rooms' positions: whether they may go there at all.
    may: Vec<bool>,
    replicas: usize,
}

/// What comes of it.
#[derive(Debug, Default)]
pub(in crate::plan) struct RoomMade {
    /// Sleepers that end: model and replica.
    pub(in crate::plan) ended: Vec<(String, String)>,
    /// Models that get a place when sleepers, or what leaves already, have ended: how many.
    pub(in crate::plan) comes: Vec<(String, usize)>,
}

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Reserve {
    asleep: Vec<Holding>,
    leaving: Vec<Holding>,
    needs: Vec<Need>,
}

impl Reserve {
    /// Takes in a replica as it is.
    pub(super) fn note(&mut self, model: &str, a: &Assignment) {
        if !a.asleep && a.phase != Phase::Leaving {
            return;
        }
        let holding = Holding {
            model: model.to_owned(),
            replica_id: a.replica_id.clone(),
            generation: a.generation,
            node_id: a.node_id.clone(),
            request: Request::of(&a.spec),
            gpu_uuids: a.gpu_uuids.clone(),
        };
        match a.phase {
            Phase::Active => self.asleep.push(holding),
            Phase::Leaving => self.leaving.push(holding),
        }
    }

    /// The replica is not what it was.
    pub(super) fn forget(&mut self, replica_id: &str) {
        self.asleep.retain(|holding| holding.replica_id != replica_id);
    }

    /// Takes in what a model lacks.
    pub(super) fn need(&mut self, model: &str, request: Request, may: Vec<bool>, replicas: usize) {
        self.needs.push(Need { model: model.to_owned(), request, may, replicas });
    }

    /// Ends as few sleepers as will do, all for one replica on one node, the oldest first, as far as the caps go.
    pub(super) fn make_room(mut self, mut rooms: Vec<Room<'_>>, caps: &mut Caps) -> RoomMade {
        let mut made = RoomMade::default();
        let needs = std::mem::take(&mut self.needs);
        if needs.is_empty() || self.asleep.is_empty() {
            return made;
        }
        for holding in std::mem::take(&mut self.leaving) {
            if let Some(room) = rooms.iter_mut().find(|room| room.node_id == holding.node_id) {
                holding.leave(room);
            }
        }
        for need in needs {
            let placed =
                (0..need.replicas).take_while(|_| self.place(&need, &mut rooms, caps, &mut made)).count();
            if placed > 0 {
                made.comes.push((need.model, placed));
            }
        }
        made
    }

    /// Takes a place for one replica in `rooms`. False: there is none to be had.
    fn place(&mut self, need: &Need, rooms: &mut [Room<'_>], caps: &mut Caps, made: &mut RoomMade) -> bool {
        let may = |at: usize| need.may.get(at).copied().unwrap_or(false);
        let most = caps.stops_left();
        let counts = rooms.iter().enumerate().filter(|(at, _)| may(*at));
        let counts = counts.filter_map(|(at, room)| Some((self.needed(room, need.request, most)?, at)));
        let Some((count, at)) = counts.min() else { return false };
        let Some(room) = rooms.get_mut(at) else { return false };
        let ended: Vec<Holding> = self.on(room).into_iter().take(count).cloned().collect();
        for holding in ended {
            caps.stop();
            holding.leave(room);
            self.forget(&holding.replica_id);
            made.ended.push((holding.model, holding.replica_id));
        }
        for position in gpus::pick(&room.slots, need.request).unwrap_or_default() {
            if let Some(slot) = room.slots.get_mut(position) {
                slot.held = slot.held.and(need.request);
            }
        }
        room.count_free();
        true
    }

    /// How many sleepers of the room, at most `most`, have to end for a replica to find a place there.
    fn needed(&self, room: &Room<'_>, request: Request, most: usize) -> Option<usize> {
        let mut after = room.clone();
        if after.fits(request).is_some() {
            return Some(0);
        }
        for (count, holding) in self.on(room).into_iter().enumerate().take(most) {
            holding.leave(&mut after);
            if after.fits(request).is_some() {
                return Some(count + 1);
            }
        }
        None
    }

    fn on(&self, room: &Room<'_>) -> Vec<&Holding> {
        let mut here: Vec<&Holding> = self.asleep.iter().filter(|h| h.node_id == room.node_id).collect();
        here.sort_by_key(|holding| holding.generation);
        here
    }
}
