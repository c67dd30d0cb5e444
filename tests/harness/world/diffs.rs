//! Diffs of snapshots beside everything else, as the daemon's threads make them: some nodes at a time
//! between steps of the shards, and what they read is not deleted meanwhile. What they find is compared
//! with what the model knows of both.

use std::collections::BTreeMap;

use bessel_mapping::blocking::Blocking;
use bessel_mapping::forest::Tree;
use bessel_mapping::request::{Command, Reply, SnapshotId, SnapshotInfo, VolumeId};
use bessel_mapping::walk::{Change, ChangeKind, Changes, NodeReader, WalkError};
use bessel_reactor::device::sim::Random;
use bessel_reactor::units::{BlockAddr, SECTOR_SIZE, SECTORS_PER_BLOCK};

use super::reclaims::marks;
use super::{Action, PowerCut, World};
use crate::model::{ZERO, recognise};

/// One under way.
#[derive(Debug)]
struct Running {
    before: Option<SnapshotInfo>,
    after: SnapshotInfo,
    reader: NodeReader,
    walk: Changes,
    found: Vec<Change>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Diffs {
    /// Not the world's.
    dice: Random,
    running: Option<Running>,
    done: u64,
}

impl Diffs {
    pub(super) fn new(seed: u64) -> Self {
        Self { dice: Random::new(seed ^ 0xd1ff), running: None, done: 0 }
    }

    /// Nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.running.is_none()
    }

    /// The process ends.
    pub(super) fn clear(&mut self) {
        self.running = None;
    }

    fn reads(&self) -> impl Iterator<Item = SnapshotId> {
        let running = self.running.iter();
        running.flat_map(|it| it.before.iter().chain([&it.after]).map(|snapshot| snapshot.id))
    }
}

impl World {
    /// How many diffs were compared with the model.
    pub fn diffs(&self) -> u64 {
        self.diffs.done
    }

    /// Compares two snapshots of a volume now and then, or one with nothing, and that with the model.
    pub fn diff_sometimes(
        &mut self,
        volume: VolumeId,
        times: u64,
        of: u64,
    ) -> Result<(), PowerCut> {
        if self.faults.is_some() || self.may_fail() || !self.diffs.dice.chance(times, of) {
            return Ok(());
        }
        let known = self.model.snapshots(volume);
        if known.is_empty() {
            return Ok(());
        }
        let id = |sequence: &u64| SnapshotId { volume, sequence: *sequence };
        let before = id(self.diffs.dice.pick(&known));
        let after = id(self.diffs.dice.pick(&known));
        self.start_diff((before != after).then_some(before), after)
    }

    /// Begins to compare two snapshots, or one with nothing: unless one is under way, or a snapshot
    /// cannot be read now.
    pub fn start_diff(
        &mut self,
        before: Option<SnapshotId>,
        after: SnapshotId,
    ) -> Result<(), PowerCut> {
        if !self.diffs.is_idle() {
            return Ok(());
        }
        let mut found = Vec::new();
        for SnapshotId { volume, sequence } in before.into_iter().chain([after]) {
            let page =
                |volume| Command::Page { volume, from: sequence, limit: 1, with_deleted: false };
            match self.look_up(volume, page)? {
                Reply::Page { snapshots, .. } => {
                    found.extend(snapshots.into_iter().find(|it| it.id.sequence == sequence));
                }
                reply => assert!(self.may_fail(), "a page was answered with {reply:?}"),
            }
        }
        // Who deletes one has come first.
        let going: Vec<SnapshotId> = self.commands.values().flat_map(marks).collect();
        let deleting =
            |it: &SnapshotInfo| going.contains(&it.id) || !self.volumes.contains_key(&it.id.volume);
        let whole = found.len() == 1 + usize::from(before.is_some());
        if !whole || found.iter().any(|it| it.settling || deleting(it)) {
            return Ok(());
        }
        let after = found.pop().expect("it was just counted");
        let before = found.pop();
        let tree = |it: &SnapshotInfo| Tree { root: it.root, height: it.height };
        let reader = NodeReader::new(&self.store);
        let walk = Changes::new(&reader, before.as_ref().map(tree), tree(&after));
        let walk = walk.expect("whole roots");
        self.tell(format_args!("diff of {before:?} and {after:?}"));
        self.diffs.running = Some(Running { before, after, reader, walk, found: Vec::new() });
        Ok(())
    }

    /// Goes on until no diff is under way.
    pub fn await_diff(&mut self) -> Result<(), PowerCut> {
        self.run_until(|world| world.diffs.is_idle())
    }

    /// What is left of it when nothing goes that a diff reads; none when it is refused.
    pub(super) fn spare_diffed(&self, action: Action) -> Option<Action> {
        let is_read = |id: SnapshotId| self.diffs.reads().any(|it| it == id);
        match action {
            Action::DeleteSnapshot { snapshot } if is_read(snapshot) => None,
            Action::DeleteSnapshots { volume, mut sequences } => {
                sequences.retain(|sequence| !is_read(SnapshotId { volume, sequence: *sequence }));
                Some(Action::DeleteSnapshots { volume, sequences })
            }
            Action::Delete { volume } if self.diffs.reads().any(|it| it.volume == volume) => None,
            action => Some(action),
        }
    }

    /// Does a little of what is to be done, or nothing.
    pub(super) fn step_diff(&mut self) -> bool {
        // Its reads are waited for: they must come.
        if self.diffs.is_idle() || self.disk.stopped() || self.disk.is_holding() {
            return false;
        }
        if self.diffs.dice.chance(1, 2) {
            return true;
        }
        let Running { reader, walk, found, .. } =
            self.diffs.running.as_mut().expect("it was just looked at");
        let mut device = self.disk.connect();
        let mut io = Blocking::new(&mut device);
        match walk.step(reader, &mut io, &mut |change| found.push(change)) {
            Ok(false) => {}
            Ok(true) => {
                let Running { before, after, found, .. } =
                    self.diffs.running.take().expect("it was just looked at");
                self.check_diff(before.as_ref(), &after, &found);
                self.diffs.done += 1;
            }
            Err(error) => {
                let blamed = self.may_fail() && matches!(error, WalkError::Device { .. });
                assert!(blamed, "a diff ended with {error}");
                self.diffs.running = None;
            }
        }
        true
    }

    fn check_diff(&self, before: Option<&SnapshotInfo>, after: &SnapshotInfo, changes: &[Change]) {
        let mut now: BTreeMap<u64, Option<BlockAddr>> = BTreeMap::new();
        for change in changes {
            for at in 0..change.blocks {
                let home = match change.now {
                    ChangeKind::Data(home) => Some(home.add(at)),
                    ChangeKind::Hole => None,
                };
                now.insert(change.first.get() + at, home);
            }
        }
        let end = after.size.sectors();
        for sector in self.model.touched_by(after.id).into_iter().filter(|sector| *sector < end) {
            let allowed = self.model.values_in(after.id, sector);
            let found = now.get(&(sector / SECTORS_PER_BLOCK));
            let Some(home) = found else {
                // It is not told: both have the same, or the first one has nothing.
                let old = before.map_or(vec![ZERO], |it| self.model.values_in(it.id, sector));
                let may_be_same = allowed.iter().any(|value| old.contains(value));
                assert!(may_be_same, "{before:?} to {after:?}: sector {sector} is not told");
                continue;
            };
            let value = home.map_or(ZERO, |home| {
                let at = (sector % SECTORS_PER_BLOCK * SECTOR_SIZE) as usize;
                let bytes = self.disk.peek(home);
                let sector_bytes = &bytes[at..at + SECTOR_SIZE as usize];
                recognise(sector, sector_bytes).expect("a snapshot holds what guests wrote")
            });
            assert!(allowed.contains(&value), "{}: sector {sector} holds {value}", after.id);
        }
    }
}
