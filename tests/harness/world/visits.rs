//! Queues of a volume on other shards than its home, as the daemon has them: the home shares the volume, the
//! others visit it, and each request comes in wherever the dice say.

use std::collections::BTreeMap;

use bessel_mapping::request::{Command, Reply, VolumeHandle, VolumeId};
use bessel_reactor::device::sim::Random;

use super::{OpenVolume, Pending, World};

/// Visits of open volumes.
pub(super) struct Visits {
    /// What a volume is called on a shard that is not its home, with what it was called at home then.
    open: BTreeMap<(VolumeId, usize), (VolumeHandle, OpenVolume)>,
    /// Requests that came in on another shard than the home, and those of them that were sent there.
    requests: u64,
    pub(super) forwarded: u64,
    /// Where requests come in from now on, if the volume has a visit there; else the dice say.
    entrance: Option<usize>,
    /// Not the world's, which go as they always went.
    dice: Random,
}

impl Visits {
    pub(super) fn new(seed: u64) -> Self {
        let dice = Random::new(seed ^ 0x1_4157);
        Self { open: BTreeMap::new(), requests: 0, forwarded: 0, entrance: None, dice }
    }

    /// The process ends.
    pub(super) fn clear(&mut self) {
        self.open.clear();
    }
}

impl World {
    /// Requests that came in on another shard than their volume's home, and those of them that were sent
    /// there.
    pub fn visiting_requests(&self) -> [u64; 2] {
        [self.visits.requests, self.visits.forwarded]
    }

    /// From now on requests come in on this shard, where it has a visit of their volume.
    pub fn enter_at(&mut self, shard: usize) {
        self.visits.entrance = Some(shard);
    }

    /// Has every shard serve queues of every volume.
    pub fn visit_everywhere(&mut self) -> Result<(), super::PowerCut> {
        for id in self.volumes() {
            for shard in 0..self.shards.len() {
                self.start_visit(id, shard);
            }
        }
        self.settle()
    }

    /// Has some shard serve queues of some volume that it is not the home of, now and then.
    pub fn visit_sometimes(&mut self) {
        if !self.config.visits || self.shards.len() < 2 || !self.visits.dice.chance(1, 8) {
            return;
        }
        let volumes = self.volumes();
        if volumes.is_empty() {
            return;
        }
        let id = *self.visits.dice.pick(&volumes);
        let shard = self.visits.dice.below(self.shards.len() as u64) as usize;
        self.start_visit(id, shard);
    }

    /// Has a shard serve queues of a volume, unless it is its home or does so already.
    pub fn start_visit(&mut self, id: VolumeId, shard: usize) {
        if self.home(id) != shard && self.visit_of(id, shard).is_none() {
            self.visit_again(id, shard);
        }
    }

    /// The same, also when it does so already.
    pub fn visit_again(&mut self, id: VolumeId, shard: usize) {
        let OpenVolume { shard: home, handle, .. } = self.volumes[&id];
        let ticket = self.ticket();
        self.commands.insert(ticket, Pending::Share { volume: id, visitor: shard });
        let shards = self.shards.len();
        self.control(home, ticket, Command::Share { volume: handle, shards });
    }

    /// What a volume is called on a shard that visits it as it is now.
    fn visit_of(&self, id: VolumeId, shard: usize) -> Option<VolumeHandle> {
        let now = self.volumes.get(&id)?;
        let (visit, then) = self.visits.open.get(&(id, shard))?;
        let same = (then.shard, then.handle) == (now.shard, now.handle);
        same.then_some(*visit)
    }

    pub(super) fn shared(&mut self, id: VolumeId, visitor: usize, reply: &Reply) {
        let Reply::Shared(volume) = reply else { panic!("sharing was answered with {reply:?}") };
        let Some(open) = self.volumes.get(&id).copied() else { return };
        let ticket = self.ticket();
        self.commands.insert(ticket, Pending::Visit { volume: id, shard: visitor, open });
        self.control(visitor, ticket, Command::Visit(volume.clone()));
    }

    pub(super) fn visited(
        &mut self,
        key: (VolumeId, usize),
        open: OpenVolume,
        visit: VolumeHandle,
    ) {
        if let Some((before, _)) = self.visits.open.insert(key, (visit, open)) {
            self.end_visit(key.1, before);
        }
    }

    fn end_visit(&mut self, shard: usize, visit: VolumeHandle) {
        let ticket = self.ticket();
        self.commands.insert(ticket, Pending::OfDevice);
        self.control(shard, ticket, Command::EndVisit { visit });
    }

    /// Forgets the visits of a volume that nobody has a request of in flight: it is about to be closed here.
    pub(super) fn end_visits(&mut self, id: VolumeId) {
        let keys: Vec<_> = self.visits.open.keys().copied().filter(|key| key.0 == id).collect();
        for key in keys {
            let (visit, _) = self.visits.open.remove(&key).expect("just seen");
            self.end_visit(key.1, visit);
        }
    }

    /// Where a request of the volume comes in, and what the volume is called there.
    pub(super) fn entrance(&mut self, id: VolumeId) -> (usize, VolumeHandle) {
        let OpenVolume { shard: home, handle, .. } = self.volumes[&id];
        if !self.config.visits {
            return (home, handle);
        }
        let any = self.visits.dice.below(self.shards.len() as u64) as usize;
        let shard = self.visits.entrance.unwrap_or(any);
        match self.visit_of(id, shard) {
            Some(visit) => {
                self.visits.requests += 1;
                (shard, visit)
            }
            None => (home, handle),
        }
    }
}
