//! Diffs of snapshots while everything else goes on: as the daemon's threads make them, against what the
//! model knows of both.

use std::collections::BTreeMap;

use bessel_mapping::request::{SnapshotId, SnapshotInfo, VolumeId};
use bessel_mapping::walk::ChangeKind;
use bessel_reactor::device::sim::Random;
use bessel_reactor::units::{BlockAddr, SECTOR_SIZE, SECTORS_PER_BLOCK};

use super::reclaims::marks;
use super::{PowerCut, World};
use crate::model::{ZERO, recognise};

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Diffs {
    /// Not the world's.
    dice: Random,
    done: u64,
}

impl Diffs {
    pub(super) fn new(seed: u64) -> Self {
        Self { dice: Random::new(seed ^ 0xd1ff), done: 0 }
    }
}

impl World {
    /// How many diffs were compared with the model.
    pub fn diffs(&self) -> u64 {
        self.diffs.done
    }

    /// Compares two snapshots of a volume now and then, or one with nothing, and that with the model.
    ///
    /// # Panics
    /// When a difference is missing, or what is there now is not what the snapshot holds.
    pub fn diff_sometimes(
        &mut self,
        volume: VolumeId,
        times: u64,
        of: u64,
    ) -> Result<(), PowerCut> {
        if self.faults.is_some() || self.may_fail() || self.disk.is_holding() {
            return Ok(());
        }
        if !self.diffs.dice.chance(times, of) {
            return Ok(());
        }
        let known = self.model.snapshots(volume);
        if known.is_empty() {
            return Ok(());
        }
        let before = *self.diffs.dice.pick(&known);
        let after = *self.diffs.dice.pick(&known);
        let all = self.snapshots(volume)?;
        let find = |sequence| all.iter().find(|it| it.id.sequence == sequence);
        let (Some(before), Some(after)) = (find(before), find(after)) else { return Ok(()) };
        // Who deletes one waits for whoever reads it.
        let going: Vec<SnapshotId> = self.commands.values().flat_map(marks).collect();
        let unfit = |it: &SnapshotInfo| it.deleted || it.settling || going.contains(&it.id);
        if !unfit(before) && !unfit(after) && !self.disk.stopped() {
            let from = (before.id != after.id).then_some(before);
            self.check_diff(from, after);
            self.diffs.done += 1;
        }
        Ok(())
    }

    fn check_diff(&mut self, before: Option<&SnapshotInfo>, after: &SnapshotInfo) {
        let (changes, _) = self.changes(before, after);
        let mut now: BTreeMap<u64, Option<BlockAddr>> = BTreeMap::new();
        for change in &changes {
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
