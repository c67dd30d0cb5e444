//! Moving a volume from one shard to another while the others go on, as the daemon does it: its queues
//! are stopped, its home hands it over, the other shard takes it over.
//!
//! It is open nowhere meanwhile, so it is none of [`World::volumes`].

use std::collections::BTreeMap;

use bessel_mapping::request::{
    Command, CommandError, HandedOver, IoKind, Reply, VolumeHandle, VolumeId,
};
use bessel_reactor::device::sim::Random;

use super::{Action, OpenVolume, Outcome, Pending, PowerCut, Ticket, World};

/// Volumes between two shards.
pub(super) struct Moves {
    /// Where each was, by its volume.
    under_way: BTreeMap<VolumeId, OpenVolume>,
    /// Volumes that have another home than before.
    done: u64,
    /// Not the world's, which go as they always went.
    dice: Random,
}

impl Moves {
    pub(super) fn new(seed: u64) -> Self {
        let dice = Random::new(seed ^ 0x307e5);
        Self { under_way: BTreeMap::new(), done: 0, dice }
    }

    /// The process ends.
    pub(super) fn clear(&mut self) {
        self.under_way.clear();
    }

    pub(super) fn is_moving(&self, id: VolumeId) -> bool {
        self.under_way.contains_key(&id)
    }

    pub(super) fn is_idle(&self) -> bool {
        self.under_way.is_empty()
    }
}

impl World {
    /// How often a volume has moved to another shard.
    pub fn moves(&self) -> u64 {
        self.moves.done
    }

    /// How many shards there are.
    pub fn shard_count(&self) -> usize {
        self.shards.len()
    }

    /// The shard that has a volume open.
    pub fn home(&self, id: VolumeId) -> usize {
        self.volumes[&id].shard
    }

    /// Moves a volume, now and then, as often as `times` of `of` times that it is asked.
    pub fn move_sometimes(&mut self, times: u64, of: u64) -> Result<(), PowerCut> {
        let volumes = self.volumes();
        if volumes.is_empty() || !self.moves.dice.chance(times, of) {
            return Ok(());
        }
        let id = *self.moves.dice.pick(&volumes);
        let target = self.moves.dice.below(self.shards.len() as u64) as usize;
        self.start_move(id, target).map(drop)
    }

    /// Begins to move a volume to a shard, once its requests have ended; those of others go on. To the one
    /// that has it, it is handed over and taken back.
    pub fn start_move(&mut self, id: VolumeId, target: usize) -> Result<Ticket, PowerCut> {
        // One operation of the control plane after the other, but for snapshots by schedule.
        self.run_until(|world| {
            let of_it = |pending: &Pending| match pending {
                Pending::Act { action: Action::Snapshot { label: None, .. }, .. } => false,
                Pending::Act { action, .. } => super::subject(action) == id,
                _ => false,
            };
            let frozen = world.faults.is_some() || world.disk.is_holding();
            let asked = world.reclaims.is_looking() || world.collects.is_looking();
            !world.requests.values().any(|request| request.volume == id)
                && !world.commands.values().any(of_it)
                && (frozen || !asked)
        })?;
        let ticket = self.ticket();
        self.end_visits(id);
        let Some(open) = self.volumes.remove(&id) else {
            // What was under way has taken it away.
            let refused = Reply::Failed(CommandError::InUse);
            self.outcomes.insert(ticket, Outcome::Reply(refused));
            return Ok(ticket);
        };
        self.tell(format_args!("{ticket}: {id} goes from shard {} to {target}", open.shard));
        self.moves.under_way.insert(id, open);
        self.commands.insert(ticket, Pending::HandOver { volume: id, target });
        self.control(open.shard, ticket, Command::HandOver { volume: open.handle });
        Ok(ticket)
    }

    /// Moves a volume to the shard after the one that has it, from start to end.
    pub fn move_on(&mut self, id: VolumeId) -> Result<(), PowerCut> {
        let target = (self.home(id) + 1) % self.shards.len();
        self.start_move(id, target)?;
        self.run_until(|world| world.moves.is_idle())
    }

    /// All that had ended is durable, and the volume is open nowhere.
    pub(super) fn handed_over(&mut self, id: VolumeId, target: usize, handed: Box<HandedOver>) {
        self.model.handed_over(id);
        self.take_over(id, target, handed, true);
    }

    fn take_over(&mut self, id: VolumeId, target: usize, handed: Box<HandedOver>, first: bool) {
        let ticket = self.ticket();
        self.commands.insert(ticket, Pending::TakeOver { volume: id, target, first });
        self.control(target, ticket, Command::TakeOver(handed));
    }

    pub(super) fn taken_over(&mut self, id: VolumeId, shard: usize, handle: VolumeHandle) {
        let before = self.moves.under_way.remove(&id).expect("it was under way");
        self.moves.done += u64::from(before.shard != shard);
        self.volumes.insert(id, OpenVolume { shard, handle, ..before });
    }

    /// It goes back to where it was; if that cannot have it either, it is left detached.
    pub(super) fn not_taken_over(
        &mut self,
        (id, target, first): (VolumeId, usize, bool),
        error: &CommandError,
        handed: Box<HandedOver>,
    ) {
        let blamed = self.is_to_blame(target, self.life_strikes, IoKind::Read);
        assert!(self.may_fail() && blamed, "{id} was not taken over: {error}");
        let home = self.moves.under_way[&id].shard;
        if first && home != target {
            return self.take_over(id, home, handed, false);
        }
        self.moves.under_way.remove(&id);
        self.detached.insert(id, home);
        self.model.detach(id, true);
    }

    /// It stays where it is.
    pub(super) fn not_handed_over(&mut self, id: VolumeId) {
        let open = self.moves.under_way.remove(&id).expect("it was under way");
        self.volumes.insert(id, open);
    }
}
