//! The forest of a store's trees: which was derived from which (Parallax, Figure 3.4).
//!
//! A tree begins as a copy of another one's root: the current tree after a snapshot as a copy of the
//! snapshot, after a rollback as a copy of what was rolled back to, that of a clone as a copy of its
//! origin. From then on it only loses what it shares, block by block. So the trees that hold a block
//! are *connected* in the forest: whoever holds it and did not write it got it from its parent.
//!
//! That answers without looking at the rest of the store what only one snapshot holds: a block of it
//! that is in another tree at all is in one of its *neighbours*, the trees that are reached from it
//! through trees that are gone. Those are the nearest ancestor, the nearest descendants, and, below
//! an ancestor that is gone, the nearest ones of other branches.
//!
//! Pure: filled with what is known of the volumes, then asked.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use bessel_reactor::units::BlockAddr;

use crate::format::Parent;
use crate::planted::{self, Bug};
use crate::request::{CurrentTree, SnapshotId, SnapshotInfo, VolumeId};

/// A radix tree: that of a snapshot, or a volume's current one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tree {
    /// Its radix root.
    pub root: BlockAddr,
    /// Its levels, 3 or 4.
    pub height: u8,
}

/// Names a tree.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum TreeId {
    /// That of a snapshot.
    Snapshot(SnapshotId),
    /// The one that a volume has now.
    Current(VolumeId),
}

/// A tree and what it began as a copy of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Descent {
    /// The tree.
    pub tree: Tree,
    /// What it was derived from.
    pub parent: Parent,
    /// It is not deleted.
    pub live: bool,
}

/// A volume of the forest, deleted or not.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ForestVolume {
    /// Which.
    pub id: VolumeId,
    /// The snapshot it is a clone of.
    pub origin: Option<SnapshotId>,
    /// Its snapshots by sequence, deleted ones included; none is live when the volume is deleted.
    pub snapshots: Vec<Descent>,
    /// Its current tree; none when the volume is deleted, or when what it has now is not known.
    pub current: Option<Descent>,
    /// Nothing else of the volume can be live: all its trees are here.
    pub known: bool,
}

impl ForestVolume {
    /// A volume that is open, or closed and as it was last known.
    pub fn present(
        id: VolumeId,
        origin: Option<SnapshotId>,
        snapshots: &[SnapshotInfo],
        current: CurrentTree,
    ) -> Self {
        let CurrentTree { root, height, parent } = current;
        Self {
            current: Some(Descent { tree: Tree { root, height }, parent, live: true }),
            ..Self::gone(id, origin, snapshots, |snapshot| !snapshot.deleted)
        }
    }

    /// A deleted one, whose clones may live.
    pub fn deleted(id: VolumeId, origin: Option<SnapshotId>, snapshots: &[SnapshotInfo]) -> Self {
        Self::gone(id, origin, snapshots, |_| false)
    }

    /// One of which only the origin is known.
    pub fn unknown(id: VolumeId, origin: Option<SnapshotId>) -> Self {
        Self { known: false, ..Self::gone(id, origin, &[], |_| false) }
    }

    fn gone(
        id: VolumeId,
        origin: Option<SnapshotId>,
        snapshots: &[SnapshotInfo],
        live: impl Fn(&SnapshotInfo) -> bool,
    ) -> Self {
        let descent = |snapshot: &SnapshotInfo| Descent {
            tree: Tree { root: snapshot.root, height: snapshot.height },
            parent: snapshot.parent,
            live: live(snapshot),
        };
        let snapshots = snapshots.iter().map(descent).collect();
        Self { id, origin, snapshots, current: None, known: true }
    }
}

/// The descent of some tree that matters is not known: the collector, which asks for none, has to
/// find out what is free.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("what volume {0} was derived from is not known")]
pub struct UnknownDescent(pub VolumeId);

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub struct Forest {
    volumes: BTreeMap<VolumeId, ForestVolume>,
    children: HashMap<SnapshotId, Vec<TreeId>>,
    clones: HashMap<SnapshotId, Vec<VolumeId>>,
    /// One past the last tree of each volume, by sequence, that was derived from something unknown;
    /// the current one is past all snapshots.
    unknown_until: HashMap<VolumeId, u64>,
}

impl Forest {
    /// The forest of these volumes: all that are connected by their origins, deleted ones included.
    pub fn new(volumes: impl IntoIterator<Item = ForestVolume>) -> Self {
        let mut forest = Self::default();
        for volume in volumes {
            forest.add(volume);
        }
        forest
    }

    fn add(&mut self, volume: ForestVolume) {
        let ForestVolume { id, origin, .. } = volume;
        if let Some(origin) = origin {
            self.clones.entry(origin).or_default().push(id);
        }
        let sequences = 0..volume.snapshots.len() as u64;
        let name = |sequence| TreeId::Snapshot(SnapshotId { volume: id, sequence });
        let named = sequences.map(name).zip(&volume.snapshots);
        let current = volume.current.iter().map(|current| (TreeId::Current(id), current));
        for (index, (name, descent)) in (1u64..).zip(named.chain(current)) {
            let parent = match descent.parent {
                Parent::Snapshot(sequence) => Some(SnapshotId { volume: id, sequence }),
                Parent::Origin => origin,
                Parent::Unknown => {
                    self.unknown_until.insert(id, index);
                    None
                }
            };
            if let Some(parent) = parent {
                self.children.entry(parent).or_default().push(name);
            }
        }
        self.volumes.insert(id, volume);
    }

    /// The volume from which this one, by its origins, comes in the end. Two snapshots belong to one
    /// forest when those of their volumes are the same.
    pub fn stem(&self, volume: VolumeId) -> VolumeId {
        let (mut stem, mut seen) = (volume, BTreeSet::new());
        // A cycle of origins, which only a corrupt store can have, ends where it began.
        while seen.insert(stem)
            && let Some(origin) = self.volumes.get(&stem).and_then(|volume| volume.origin)
        {
            stem = origin.volume;
        }
        stem
    }

    /// The tree of a snapshot, deleted or not.
    pub fn tree(&self, snapshot: SnapshotId) -> Option<Tree> {
        self.descent(TreeId::Snapshot(snapshot)).map(|descent| descent.tree)
    }

    /// The trees that are not deleted, by name.
    pub fn living(&self) -> impl Iterator<Item = (TreeId, Tree)> {
        self.volumes.values().flat_map(|volume| {
            let sequences = 0..volume.snapshots.len() as u64;
            let name = |sequence| TreeId::Snapshot(SnapshotId { volume: volume.id, sequence });
            let named = sequences.map(name).zip(&volume.snapshots);
            let current = volume.current.iter().map(|it| (TreeId::Current(volume.id), it));
            let living = named.chain(current).filter(|(_, descent)| descent.live);
            living.map(|(id, descent)| (id, descent.tree))
        })
    }

    /// Volumes of which nobody knows what they have.
    pub fn unknown(&self) -> impl Iterator<Item = VolumeId> {
        self.volumes.values().filter(|volume| !volume.known).map(|volume| volume.id)
    }

    fn descent(&self, id: TreeId) -> Option<&Descent> {
        match id {
            TreeId::Snapshot(SnapshotId { volume, sequence }) => {
                self.volumes.get(&volume)?.snapshots.get(sequence as usize)
            }
            TreeId::Current(volume) => self.volumes.get(&volume)?.current.as_ref(),
        }
    }

    /// The neighbours of a snapshot that was deleted: a block of it that any other living tree holds,
    /// one of these holds. `waits` says of a deleted snapshot that its mark is not durable yet, or that
    /// its blocks will be freed by themselves later: it counts as living.
    ///
    /// # Errors
    /// When the descent of a tree is not known that may be one of them, or lie between.
    pub fn neighbours(
        &self,
        of: SnapshotId,
        waits: impl Fn(SnapshotId) -> bool,
    ) -> Result<BTreeMap<TreeId, Tree>, UnknownDescent> {
        let mut found = BTreeMap::new();
        let (mut next, mut seen) = (vec![of], BTreeSet::from([of]));
        while let Some(gone) = next.pop() {
            for neighbour in self.around(gone)? {
                let descent = self.descent(neighbour).expect("it is among the trees there are");
                match neighbour {
                    TreeId::Snapshot(id) if !descent.live && !waits(id) => {
                        if seen.insert(id) && !planted::is(Bug::OtherBranchIgnored) {
                            next.push(id);
                        }
                    }
                    TreeId::Snapshot(id) if id == of => {}
                    _ => {
                        found.insert(neighbour, descent.tree);
                    }
                }
            }
        }
        Ok(found)
    }

    /// The parent and the children of a snapshot.
    fn around(&self, id: SnapshotId) -> Result<Vec<TreeId>, UnknownDescent> {
        let unknown = Err(UnknownDescent(id.volume));
        let Some(volume) = self.volumes.get(&id.volume).filter(|volume| volume.known) else {
            return unknown;
        };
        // Whatever is unknown may have been derived from any tree before it.
        if self.unknown_until.get(&id.volume).is_some_and(|until| *until > id.sequence) {
            return unknown;
        }
        let Some(descent) = volume.snapshots.get(id.sequence as usize) else { return unknown };
        let mut around: Vec<TreeId> = self.children.get(&id).cloned().unwrap_or_default();
        for clone in self.clones.get(&id).into_iter().flatten() {
            if !self.volumes[clone].known || self.unknown_until.contains_key(clone) {
                return Err(UnknownDescent(*clone));
            }
        }
        if planted::is(Bug::ClonesIgnored) {
            around.retain(|child| match child {
                TreeId::Snapshot(child) => child.volume == id.volume,
                TreeId::Current(volume) => *volume == id.volume,
            });
        }
        let parent = match descent.parent {
            Parent::Unknown => return unknown,
            Parent::Origin => volume.origin,
            Parent::Snapshot(sequence) => Some(SnapshotId { volume: id.volume, sequence }),
        };
        if let Some(parent) = parent
            && !planted::is(Bug::AncestorIgnored)
        {
            let parent = TreeId::Snapshot(parent);
            if self.descent(parent).is_none() {
                return unknown; // Of a volume that was reclaimed.
            }
            around.push(parent);
        }
        Ok(around)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// A volume of which each snapshot is given by its parent and whether it lives, the last one
    /// being the current tree.
    fn volume(id: u64, origin: Option<(u64, u64)>, trees: &[(Parent, bool)]) -> ForestVolume {
        let descent = |&(parent, live): &(Parent, bool)| Descent {
            tree: Tree { root: BlockAddr::new(7), height: 3 },
            parent,
            live,
        };
        let (current, snapshots) = trees.split_last().unwrap();
        let origin =
            origin.map(|(volume, sequence)| SnapshotId { volume: VolumeId(volume), sequence });
        ForestVolume {
            id: VolumeId(id),
            origin,
            snapshots: snapshots.iter().map(descent).collect(),
            current: Some(descent(current)).filter(|current| current.live),
            known: true,
        }
    }

    fn snapshot(volume: u64, sequence: u64) -> SnapshotId {
        SnapshotId { volume: VolumeId(volume), sequence }
    }

    fn neighbours(forest: &Forest, of: SnapshotId) -> Result<Vec<String>, UnknownDescent> {
        let name = |id: &TreeId| match id {
            TreeId::Snapshot(id) => id.to_string(),
            TreeId::Current(id) => format!("v{id}"),
        };
        Ok(forest.neighbours(of, |_| false)?.keys().map(name).collect())
    }

    use Parent::{Origin, Snapshot, Unknown};

    #[test]
    fn neighbours_are_the_nearest_living_on_every_side() {
        // 0 - 1 - 2 - 3 - current, of which 1 is gone; 4 is what a rollback to 1 left, and 2.. came
        // of it; a clone of 1 and one of 3.
        let trees = [
            (Origin, true),
            (Snapshot(0), false),
            (Snapshot(1), true),
            (Snapshot(2), true),
            (Snapshot(1), true),
            (Snapshot(3), true),
        ];
        let forest = Forest::new([
            volume(1, None, &trees),
            volume(2, Some((1, 1)), &[(Origin, false), (Snapshot(0), true)]),
            volume(3, Some((1, 3)), &[(Origin, true)]),
        ]);
        let of = |sequence| neighbours(&forest, snapshot(1, sequence)).unwrap();
        assert_eq!(of(0), ["1.2", "1.4", "v2"]);
        assert_eq!(of(2), ["1.0", "1.3", "1.4", "v2"], "also beyond the one that is gone");
        assert_eq!(of(3), ["1.2", "v1", "v3"]);
        assert_eq!(of(4), ["1.0", "1.2", "v2"]);
        assert_eq!(neighbours(&forest, snapshot(2, 0)).unwrap(), ["1.0", "1.2", "1.4", "v2"]);
        let waits = |id: SnapshotId| id == snapshot(1, 1);
        let found = forest.neighbours(snapshot(1, 2), waits).unwrap();
        let found: Vec<_> = found.into_keys().collect();
        assert_eq!(found, [1, 3].map(|sequence| TreeId::Snapshot(snapshot(1, sequence))));
    }

    #[test]
    fn what_was_derived_from_something_unknown_may_have_been_derived_from_anything_before_it() {
        let trees = [
            (Unknown, true),
            (Unknown, true),
            (Snapshot(1), true),
            (Snapshot(2), true),
            (Snapshot(3), true),
        ];
        let forest = Forest::new([volume(1, None, &trees)]);
        let of = |sequence| neighbours(&forest, snapshot(1, sequence));
        assert_eq!(of(0), Err(UnknownDescent(VolumeId(1))));
        assert_eq!(of(1), Err(UnknownDescent(VolumeId(1))), "its own parent is not known");
        assert_eq!(of(2).unwrap(), ["1.1", "1.3"]);
        assert_eq!(of(3).unwrap(), ["1.2", "v1"]);
    }

    #[test]
    fn a_clone_of_which_little_is_known_keeps_only_what_it_may_share() {
        let trees = [(Origin, true), (Snapshot(0), true), (Snapshot(1), true)];
        let unknown = ForestVolume::unknown(VolumeId(2), Some(snapshot(1, 0)));
        for clone in [unknown, volume(2, Some((1, 0)), &[(Origin, true), (Unknown, true)])] {
            let forest = Forest::new([volume(1, None, &trees), clone]);
            let of = |sequence| neighbours(&forest, snapshot(1, sequence));
            assert_eq!(of(0), Err(UnknownDescent(VolumeId(2))));
            assert_eq!(of(1).unwrap(), ["1.0", "v1"]);
        }
    }

    #[test]
    fn clones_of_a_volume_that_was_reclaimed_are_left_alone() {
        let trees = [(Origin, true), (Snapshot(0), true)];
        let forest =
            Forest::new([volume(2, Some((1, 5)), &trees), volume(3, Some((1, 6)), &trees)]);
        assert!(neighbours(&forest, snapshot(2, 0)).is_err());
        assert_eq!(forest.stem(VolumeId(2)), forest.stem(VolumeId(3)));
    }

    /// Blocks are written into random trees and handed down; by the neighbours alone it must be found
    /// out which of them only one holds.
    #[test]
    fn a_block_in_any_other_tree_is_in_a_neighbour() {
        let mut state = 1u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        let mut freed = 0;
        for _ in 0..300 {
            let mut trees: Vec<(Parent, bool)> = Vec::new();
            let mut held: Vec<BTreeSet<u64>> = Vec::new();
            let (mut parent, mut content, mut block) = (Origin, BTreeSet::new(), 0);
            for sequence in 0..2 + random(12) {
                for _ in 0..random(4) {
                    content.insert(block);
                    block += 1;
                }
                content.retain(|_| random(4) > 0);
                trees.push((parent, random(3) > 0));
                held.push(content.clone());
                let back = if random(3) == 0 { random(sequence + 1) } else { sequence };
                (parent, content) = (Snapshot(back), held[back as usize].clone());
            }
            content.retain(|_| random(4) > 0);
            trees.push((parent, true));
            held.push(content);
            let forest = Forest::new([volume(1, None, &trees)]);
            let index = |id: &TreeId| match id {
                TreeId::Snapshot(id) => id.sequence as usize,
                TreeId::Current(_) => trees.len() - 1,
            };
            for of in 0..trees.len() - 1 {
                let near = forest.neighbours(snapshot(1, of as u64), |_| false).unwrap();
                for block in &held[of] {
                    let others = (0..trees.len()).filter(|other| *other != of && trees[*other].1);
                    let alone = !others.into_iter().any(|other| held[other].contains(block));
                    let found = !near.keys().any(|near| held[index(near)].contains(block));
                    assert_eq!(alone, found, "block {block} of {of} in {trees:?}");
                    freed += u32::from(alone);
                }
            }
        }
        assert!(freed > 300, "{freed}");
    }
}
