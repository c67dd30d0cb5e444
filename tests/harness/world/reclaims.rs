//! Freeing what deleted snapshots alone held, beside everything else, as the daemon's thread does it:
//! one after the other, a batch of nodes at a time between steps of the shards.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bessel_mapping::blocking::Blocking;
use bessel_mapping::forest::{Forest, ForestVolume, Tree, TreeId};
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
    /// Asking what volumes there are.
    Look {
        asked: BTreeMap<Ticket, VolumeId>,
        shown: Vec<VolumeInfo>,
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
    now: Now,
    /// Not the world's: worlds without deletions go as they always went.
    dice: Random,
    /// Clones that could not be made: whether the disk has them, nobody knows.
    pub(super) unborn: Vec<(VolumeId, SnapshotId)>,
    /// Snapshots of which all was found and freed.
    pub(super) done: u64,
    pub(super) freed: ByteCount,
}

impl Reclaims {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            waiting: VecDeque::new(),
            now: Now::Nothing,
            unborn: Vec::new(),
            dice: Random::new(seed ^ 0x4ec1a1),
            done: 0,
            freed: ByteCount::default(),
        }
    }

    /// The mark of a snapshot is durable.
    pub(super) fn push(&mut self, snapshot: SnapshotId) {
        self.waiting.push_back(snapshot);
    }

    /// Nothing waits and nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && matches!(self.now, Now::Nothing)
    }

    /// Nothing is under way, whatever waits.
    pub(super) fn is_between(&self) -> bool {
        matches!(self.now, Now::Nothing)
    }

    /// Snapshots that wait.
    pub(super) fn waiting(&self) -> impl Iterator<Item = SnapshotId> {
        self.waiting.iter().copied()
    }

    /// The process ends.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
        self.unborn.clear();
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
        let shown = volumes.iter().map(|id| self.show(*id).expect("the power is on"));
        let shown: Vec<_> = shown.collect();
        let forest = Forest::new(
            shown
                .iter()
                .map(|it| ForestVolume::present(it.id, it.origin, &it.snapshots, it.current)),
        );
        let (names, trees): (Vec<TreeId>, Vec<Tree>) = forest.living().unzip();
        let mut reader = NodeReader::new(&self.store);
        let mut device = self.disk.connect();
        let mut io = Blocking::new(&mut device);
        let mut walk = UsageWalk::new(&reader, trees).expect("whole roots");
        while !walk.step(&mut reader, &mut io).expect("whole trees") {}
        let (spaces, total) = walk.spaces();
        (names.into_iter().zip(spaces.iter().copied()).collect(), total)
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
            Now::Look { asked, .. } if asked.is_empty() => self.plan_reclaim(),
            Now::Work { asked, .. } if asked.is_empty() => self.work(),
            Now::Look { .. } | Now::Work { .. } => return false,
        }
        true
    }

    /// Asks every volume what it has. Nobody is making or deleting one at that moment.
    fn look(&mut self) {
        let moves = |pending: &Pending| {
            matches!(
                pending,
                Pending::Create { .. }
                    | Pending::Open { .. }
                    | Pending::Close
                    | Pending::Act { action: Action::Delete { .. } | Action::Rollback { .. }, .. }
            )
        };
        if self.commands.values().any(moves) {
            return;
        }
        let open: Vec<(VolumeId, OpenVolume)> =
            self.volumes.iter().map(|(id, open)| (*id, *open)).collect();
        let mut asked = BTreeMap::new();
        for (id, OpenVolume { shard, handle, .. }) in open {
            let ticket = self.ticket();
            asked.insert(ticket, id);
            self.commands.insert(ticket, Pending::Reclaim);
            self.shards[shard].control(ticket, Command::Show { volume: handle });
        }
        self.reclaims.now = Now::Look { asked, shown: Vec::new() };
    }

    fn plan_reclaim(&mut self) {
        let Now::Look { shown, .. } = std::mem::replace(&mut self.reclaims.now, Now::Nothing)
        else {
            unreachable!("the caller looked");
        };
        let snapshot = self.reclaims.waiting.pop_front().expect("one waits");
        if self.store.directory.unreadable().is_some() {
            return;
        }
        let mut volumes: BTreeMap<VolumeId, ForestVolume> = BTreeMap::new();
        // Of a volume that has failed nobody knows what the device holds, marks included.
        for VolumeInfo { id, origin, snapshots, current, .. } in
            shown.iter().filter(|it| it.latched.is_none())
        {
            volumes.insert(*id, ForestVolume::present(*id, *origin, snapshots, *current));
        }
        for volume in self.store.directory.volumes() {
            let unknown = || ForestVolume::unknown(volume.id, volume.origin);
            volumes.entry(volume.id).or_insert_with(unknown);
        }
        for (id, origin) in &self.reclaims.unborn {
            volumes.entry(*id).or_insert_with(|| ForestVolume::unknown(*id, Some(*origin)));
        }
        let forest = Forest::new(volumes.into_values());
        if forest.tree(snapshot).is_none() {
            return; // Its volume is gone.
        }
        // A mark that is under way is in the log that was shown, and not yet durable.
        let waiting = &self.reclaims.waiting;
        let marking = |other| self.commands.values().any(|pending| marks(pending).contains(&other));
        let waits = |other| waiting.contains(&other) || marking(other);
        let plan = ReclaimPlan::new(&forest, snapshot, waits);
        self.tell(format_args!("reclaim {snapshot}: {plan:?}"));
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
            self.shards[shard].control(ticket, command);
        }
        self.reclaims.now = Now::Work { job, asked, replies: Vec::new() };
    }

    /// A shard has answered.
    pub(super) fn reclaim_answered(&mut self, ticket: Ticket, reply: Reply) {
        match &mut self.reclaims.now {
            Now::Look { asked, shown } => {
                // Else its volume went meanwhile, with the command that was before this one.
                if asked.remove(&ticket).is_some()
                    && let Reply::Volume(info) = reply
                {
                    shown.push(*info);
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
