//! Freeing what deleted snapshots alone held, beside everything else, as the daemon's thread does it:
//! one after the other, a batch of nodes at a time between steps of the shards.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bessel_mapping::blocking::Blocking;
use bessel_mapping::forest::{Forest, NoAnswer, Tree, TreeId};
use bessel_mapping::reclaim::{Next, Reclaim, ReclaimPlan};
use bessel_mapping::request::{Command, Reply, SnapshotId, SnapshotInfo, VolumeId, VolumeInfo};
use bessel_mapping::walk::{Change, Changes, NodeReader, Space, TreeSpace, UsageWalk};
use bessel_reactor::device::sim::Random;
use bessel_reactor::units::ByteCount;

use super::{Action, OpenVolume, Pending, Ticket, World};

/// What is being done about the first of the snapshots that wait.
#[derive(Debug)]
enum Now {
    Nothing,
    /// Asking about volumes that matter.
    Look {
        asked: BTreeMap<Ticket, VolumeId>,
        /// What they have said of themselves, once their snapshots are asked for.
        shown: BTreeMap<VolumeId, VolumeInfo>,
    },
    Work {
        job: Box<Reclaim>,
        asked: BTreeSet<Ticket>,
        replies: Vec<Reply>,
    },
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Reclaims {
    waiting: VecDeque<SnapshotId>,
    /// What is deleted from here on gets no plan.
    leaves: bool,
    /// Snapshots that were left to the collector since the collection began.
    left: Vec<SnapshotId>,
    now: Now,
    /// What is known of the trees, in this life.
    forest: Forest,
    /// Not the world's: worlds without deletions go as they always went.
    dice: Random,
    /// Clones that could not be made: whether the disk has them, nobody knows.
    pub(super) unborn: Vec<(VolumeId, SnapshotId)>,
    /// Snapshots of which all was found and freed.
    pub(super) done: u64,
    pub(super) freed: ByteCount,
}

impl Reclaims {
    /// Volumes are being asked what they have.
    pub(super) fn is_looking(&self) -> bool {
        matches!(self.now, Now::Look { .. })
    }

    pub(super) fn new(seed: u64) -> Self {
        Self {
            waiting: VecDeque::new(),
            leaves: false,
            left: Vec::new(),
            now: Now::Nothing,
            forest: Forest::default(),
            unborn: Vec::new(),
            dice: Random::new(seed ^ 0x4ec1a1),
            done: 0,
            freed: ByteCount::default(),
        }
    }

    /// The mark of a snapshot is durable.
    pub(super) fn push(&mut self, snapshot: SnapshotId) {
        self.forest.mark_deleted(snapshot);
        match self.leaves {
            true => self.left.push(snapshot),
            false => self.waiting.push_back(snapshot),
        }
    }

    /// A volume is read anew from the disk.
    pub(super) fn forget(&mut self, volume: VolumeId) {
        self.forest.forget(volume);
    }

    /// Nothing waits and nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && matches!(self.now, Now::Nothing)
    }

    /// Nothing is under way, whatever waits.
    pub(super) fn is_between(&self) -> bool {
        matches!(self.now, Now::Nothing)
    }

    /// Snapshots that wait, or were left to the collector since the collection began.
    pub(super) fn waiting_or_left(&self) -> impl Iterator<Item = SnapshotId> {
        self.waiting.iter().chain(&self.left).copied()
    }

    /// A collection begins.
    pub(super) fn collection_begins(&mut self) {
        self.left.clear();
    }

    /// The process ends.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
        self.left.clear();
        self.unborn.clear();
        self.forest = Forest::default();
        self.now = Now::Nothing;
    }
}

impl World {
    /// Bytes that were freed in this world when snapshots were deleted, and how many of these were
    /// done with.
    pub fn reclaimed(&self) -> (ByteCount, u64) {
        (self.reclaims.freed, self.reclaims.done)
    }

    /// Where two snapshots differ, or what one holds, and how many nodes were read to find that.
    pub fn changes(
        &self,
        before: Option<&SnapshotInfo>,
        after: &SnapshotInfo,
    ) -> (Vec<Change>, u64) {
        let tree = |it: &SnapshotInfo| Tree { root: it.root, height: it.height };
        let mut reader = NodeReader::new(&self.store);
        let mut device = self.disk.connect();
        let mut io = Blocking::new(&mut device);
        let mut found = Vec::new();
        let mut walk = Changes::new(&reader, before.map(tree), tree(after)).expect("whole roots");
        let mut note = |change| found.push(change);
        while !walk.step(&mut reader, &mut io, &mut note).expect("whole trees") {}
        (found, reader.nodes_read())
    }

    /// What the trees of these volumes and their snapshots take, and all of them together.
    pub fn space(&mut self, volumes: &[VolumeId]) -> (Vec<(TreeId, TreeSpace)>, Space) {
        let mut forest = Forest::default();
        for id in volumes {
            let info = self.show(*id).expect("the power is on");
            forest.add(*id, info.origin);
            forest.extend(*id, &self.snapshots(*id).expect("the power is on"));
            forest.set_present(*id, info.current, info.log.taken);
        }
        let living = volumes.iter().flat_map(|id| forest.living(*id).expect("it was just told of"));
        let (names, trees): (Vec<TreeId>, Vec<Tree>) = living.unzip();
        let mut reader = NodeReader::new(&self.store);
        let mut device = self.disk.connect();
        let mut io = Blocking::new(&mut device);
        let mut walk = UsageWalk::new(&reader, trees).expect("whole roots");
        while !walk.step(&mut reader, &mut io).expect("whole trees") {}
        let (spaces, total) = walk.spaces();
        (names.into_iter().zip(spaces.iter().copied()).collect(), total)
    }

    /// Leaves what waits to be freed to the collector.
    pub fn leave_to_collector(&mut self) {
        self.reclaims.left.extend(self.reclaims.waiting.drain(..));
        if matches!(self.reclaims.now, Now::Look { .. }) {
            self.reclaims.now = Now::Nothing;
        }
    }

    /// What is deleted from here on gets no plan, as in the daemon when the descent of a tree is not known:
    /// it is left to the collector at once, and does not wait.
    pub fn leave_deletions(&mut self) {
        self.reclaims.leaves = true;
    }

    /// Goes on until nothing of a deleted snapshot waits to be freed.
    pub fn reclaim_all(&mut self) -> Result<(), super::PowerCut> {
        self.run_until(|world| world.reclaims.is_idle() && world.commands.is_empty())
    }

    /// Does a little of what is to be done, or nothing.
    pub(super) fn step_reclaims(&mut self) -> bool {
        // Its reads are waited for: they must come.
        if self.reclaims.is_idle()
            || self.collects.is_running()
            || self.faults.is_some()
            || self.disk.stopped()
            || self.disk.is_holding()
        {
            return false;
        }
        if self.reclaims.dice.chance(1, 2) {
            return true;
        }
        match &mut self.reclaims.now {
            Now::Nothing => self.look(),
            // The control plane asks and plans at once: no volume moves meanwhile.
            Now::Look { .. } if !self.moves.is_idle() => return false,
            Now::Look { asked, .. } if asked.is_empty() => self.plan_reclaim(),
            Now::Work { asked, .. } if asked.is_empty() => self.work(),
            Now::Look { .. } | Now::Work { .. } => return false,
        }
        true
    }

    /// Begins with the next deleted snapshot. Nobody is making or deleting a volume at that moment.
    fn look(&mut self) {
        let moves = |pending: &Pending| {
            matches!(
                pending,
                Pending::Create { .. }
                    | Pending::Open { .. }
                    | Pending::Close
                    | Pending::HandOver { .. }
                    | Pending::TakeOver { .. }
                    | Pending::Act { action: Action::Delete { .. } | Action::Rollback { .. }, .. }
            )
        };
        if self.commands.values().any(moves) {
            return;
        }
        self.reclaims.forest.begin();
        self.reclaims.now = Now::Look { asked: BTreeMap::new(), shown: BTreeMap::new() };
    }

    /// Asks about these volumes. Of one that is not open, nobody knows what it has.
    fn look_at(&mut self, volumes: Vec<VolumeId>) {
        let mut asked = BTreeMap::new();
        for id in volumes {
            let Some(OpenVolume { shard, handle, .. }) = self.volumes.get(&id).copied() else {
                self.reclaims.forest.set_unknown(id);
                continue;
            };
            let ticket = self.ticket();
            asked.insert(ticket, id);
            self.commands.insert(ticket, Pending::Reclaim);
            self.control(shard, ticket, Command::Show { volume: handle });
        }
        self.reclaims.now = Now::Look { asked, shown: BTreeMap::new() };
    }

    /// A volume has answered: asks on until all its snapshots are known that it has spoken of.
    fn look_on(&mut self, id: VolumeId, reply: Reply) {
        let Now::Look { asked, shown } = &mut self.reclaims.now else { return };
        let forest = &mut self.reclaims.forest;
        match reply {
            // Of a volume that has failed nobody knows what the device holds, marks included.
            Reply::Volume(info) if info.latched.is_some() => return forest.set_unknown(id),
            Reply::Volume(info) => drop(shown.insert(id, *info)),
            Reply::Page { snapshots, .. } => {
                forest.extend(id, &snapshots);
            }
            // Its volume went meanwhile, or its log cannot be read.
            _ => return forest.set_unknown(id),
        }
        let (info, from) = (&shown[&id], forest.known(id));
        if from >= info.log.taken {
            return forest.set_present(id, info.current, info.log.taken);
        }
        let Some(OpenVolume { shard, handle, .. }) = self.volumes.get(&id).copied() else {
            return forest.set_unknown(id);
        };
        self.tickets += 1;
        let ticket = self.tickets;
        asked.insert(ticket, id);
        self.commands.insert(ticket, Pending::Reclaim);
        let limit = 1 + self.reclaims.dice.below(30) as usize;
        let command = Command::Page { volume: handle, from, limit, with_deleted: true };
        self.control(shard, ticket, command);
    }

    fn plan_reclaim(&mut self) {
        if self.store.directory.unreadable().is_some() {
            self.reclaims.waiting.pop_front();
            self.reclaims.now = Now::Nothing;
            return;
        }
        for volume in self.store.directory.volumes() {
            self.reclaims.forest.add(volume.id, volume.origin);
        }
        for (id, origin) in self.reclaims.unborn.clone() {
            self.reclaims.forest.add(id, Some(origin));
        }
        let snapshot = *self.reclaims.waiting.front().expect("one waits");
        // A mark that is under way is in the log that was shown, and not yet durable.
        let waiting = &self.reclaims.waiting;
        let marking = |other| self.commands.values().any(|pending| marks(pending).contains(&other));
        let later = |other| waiting.iter().skip(1).any(|it| *it == other);
        let waits = |other| later(other) || marking(other);
        let plan = ReclaimPlan::new(&self.reclaims.forest, snapshot, waits);
        if let Err(NoAnswer::Ask(volumes)) = plan {
            return self.look_at(volumes);
        }
        self.tell(format_args!("reclaim {snapshot}: {plan:?}"));
        self.reclaims.waiting.pop_front();
        self.reclaims.now = Now::Nothing;
        let Ok(plan) = plan else { return };
        let Ok(job) = Reclaim::new(&self.store, plan) else { return };
        let (asked, replies) = (BTreeSet::new(), Vec::new());
        self.reclaims.now = Now::Work { job: Box::new(job), asked, replies };
    }

    fn work(&mut self) {
        let now = std::mem::replace(&mut self.reclaims.now, Now::Nothing);
        let Now::Work { mut job, replies, .. } = now else { unreachable!("the caller looked") };
        if !replies.is_empty()
            && let Err(error) = job.answered(replies)
        {
            assert!(self.may_fail(), "{}: {error}", job.snapshot());
            return;
        }
        let (shards, command) = match job.next() {
            Next::Read => {
                let mut device = self.disk.connect();
                if let Err(error) = job.read(&mut Blocking::new(&mut device)) {
                    assert!(self.may_fail(), "{}: {error}", job.snapshot());
                    return;
                }
                (0, None)
            }
            Next::AskAll(command) => (self.shards.len(), Some(command)),
            Next::AskAuthority(command) => (1, Some(command)),
            Next::Done(reclaimed) => {
                self.tell(format_args!("reclaimed {}: {reclaimed:?}", job.snapshot()));
                self.reclaims.done += 1;
                let bytes = self.reclaims.freed.get() + reclaimed.bytes().get();
                self.reclaims.freed = ByteCount::new(bytes);
                return;
            }
        };
        let mut asked = BTreeSet::new();
        for (shard, command) in (0..shards).zip(command.into_iter().cycle()) {
            let ticket = self.ticket();
            asked.insert(ticket);
            self.commands.insert(ticket, Pending::Reclaim);
            self.control(shard, ticket, command);
        }
        self.reclaims.now = Now::Work { job, asked, replies: Vec::new() };
    }

    /// A shard has answered.
    pub(super) fn reclaim_answered(&mut self, ticket: Ticket, reply: Reply) {
        match &mut self.reclaims.now {
            Now::Look { asked, .. } => {
                if let Some(id) = asked.remove(&ticket) {
                    self.look_on(id, reply);
                }
            }
            Now::Work { asked, replies, .. } => {
                if asked.remove(&ticket) {
                    replies.push(reply);
                }
            }
            Now::Nothing => {}
        }
    }
}

/// The snapshots that a command marks deleted.
pub(super) fn marks(pending: &Pending) -> Vec<SnapshotId> {
    match pending {
        Pending::Act { action: Action::DeleteSnapshot { snapshot }, .. } => vec![*snapshot],
        Pending::Act { action: Action::DeleteSnapshots { volume, sequences }, .. } => {
            let id = |sequence: &u64| SnapshotId { volume: *volume, sequence: *sequence };
            sequences.iter().map(id).collect()
        }
        _ => Vec::new(),
    }
}
