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
//! A log may have a million snapshots, so a [`Forest`] is kept rather than made: it is told of what was
//! taken and deleted since, and asks for the volumes that a question is about and no others. A snapshot
//! takes 16 bytes in it, as long as most are derived from the one before.
//!
//! Pure: filled with what is known of the volumes, then asked.

use std::collections::{BTreeMap, BTreeSet};

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

/// A snapshot's tree.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Node {
    root: BlockAddr,
    height: u8,
    live: bool,
    /// It was derived from the snapshot before it, or, when it is the first, from the volume's origin:
    /// as almost all are. What others were derived from stands in [`Lineage::odd`].
    plain: bool,
}

const _: () = assert!(size_of::<Node>() == 16);

/// What is known of a volume.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
struct Lineage {
    /// The snapshot it is a clone of.
    origin: Option<SnapshotId>,
    /// Its snapshots by sequence, deleted ones included.
    nodes: Vec<Node>,
    /// Of snapshots that are not plain, what they were derived from.
    odd: BTreeMap<u64, Parent>,
    /// The other way round, for those that were derived from a snapshot of the volume.
    odd_children: BTreeSet<(u64, u64)>,
    /// Those that are not the first and were derived from the volume's origin.
    odd_of_origin: BTreeSet<u64>,
    /// One past the last of its snapshots that was derived from something unknown.
    unknown_until: u64,
    state: State,
    /// What is said of it was true when the question that is asked now began.
    fresh: bool,
}

/// What a volume is, as far as it is known.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
enum State {
    /// It may have trees that nobody knows.
    #[default]
    Unknown,
    /// It has this current tree, and all its snapshots are known that had been taken by then.
    Present(CurrentTree),
    /// It was deleted: none of its trees lives, and all its snapshots are known.
    Gone,
}

/// The descent of some tree that matters is not known: the collector, which asks for none, has to
/// find out what is free.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("what volume {0} was derived from is not known")]
pub struct UnknownDescent(pub VolumeId);

/// Why a question about the forest has no answer.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoAnswer {
    /// These volumes have to be told of anew first: ask once more then.
    #[error("volumes {0:?} are to be looked at first")]
    Ask(Vec<VolumeId>),
    /// There will be none.
    #[error(transparent)]
    Unknown(#[from] UnknownDescent),
}

/// See the module's documentation.
#[derive(Clone, Debug, Default)]
pub struct Forest {
    volumes: BTreeMap<VolumeId, Lineage>,
    clones: BTreeMap<SnapshotId, Vec<VolumeId>>,
}

impl Forest {
    // What it is told.

    /// There is such a volume, deleted or not, which is a clone of `origin`. Of its trees nothing is known
    /// yet. All volumes must be there before anything is asked.
    pub fn add(&mut self, id: VolumeId, origin: Option<SnapshotId>) {
        if self.volumes.contains_key(&id) {
            return;
        }
        if let Some(origin) = origin {
            self.clones.entry(origin).or_default().push(id);
        }
        self.volumes.insert(id, Lineage { origin, ..Lineage::default() });
    }

    /// Snapshots of a volume that are known: the next page begins here.
    pub fn known(&self, id: VolumeId) -> u64 {
        self.volumes.get(&id).map_or(0, |volume| volume.nodes.len() as u64)
    }

    /// Snapshots of a volume, deleted ones included, that come after those that are known.
    ///
    /// # Panics
    /// When there is no such volume, or snapshots are left out.
    pub fn extend(&mut self, id: VolumeId, snapshots: &[SnapshotInfo]) {
        let volume = self.volumes.get_mut(&id).expect("volumes are added first");
        for snapshot in snapshots {
            let sequence = volume.nodes.len() as u64;
            assert_eq!(snapshot.id, SnapshotId { volume: id, sequence }, "none is left out");
            let plain = match snapshot.parent {
                Parent::Origin => sequence == 0,
                Parent::Snapshot(parent) => parent + 1 == sequence,
                Parent::Unknown => false,
            };
            if !plain {
                volume.odd.insert(sequence, snapshot.parent);
                match snapshot.parent {
                    Parent::Unknown => volume.unknown_until = sequence + 1,
                    Parent::Origin => {
                        volume.odd_of_origin.insert(sequence);
                    }
                    Parent::Snapshot(parent) => {
                        volume.odd_children.insert((parent, sequence));
                    }
                }
            }
            let (root, height, live) = (snapshot.root, snapshot.height, !snapshot.deleted);
            volume.nodes.push(Node { root, height, live, plain });
        }
    }

    /// A snapshot is marked deleted, durably.
    pub fn mark_deleted(&mut self, id: SnapshotId) {
        let volume = self.volumes.get_mut(&id.volume);
        if let Some(node) = volume.and_then(|it| it.nodes.get_mut(id.sequence as usize)) {
            node.live = false;
        }
    }

    /// The volume has this current tree: as it was when the first `taken` of its snapshots had been, all of
    /// which are known.
    ///
    /// # Panics
    /// When they are not.
    pub fn set_present(&mut self, id: VolumeId, current: CurrentTree, taken: u64) {
        let volume = self.volumes.get_mut(&id).expect("volumes are added first");
        assert!(volume.nodes.len() as u64 >= taken, "the current tree comes after its snapshots");
        (volume.state, volume.fresh) = (State::Present(current), true);
    }

    /// The volume was deleted, and all its snapshots are known. Clones of it may live.
    pub fn set_gone(&mut self, id: VolumeId) {
        let volume = self.volumes.get_mut(&id).expect("volumes are added first");
        volume.nodes.iter_mut().for_each(|node| node.live = false);
        (volume.state, volume.fresh) = (State::Gone, true);
    }

    /// The volume may have trees that nobody knows: for now, until it is told of again.
    pub fn set_unknown(&mut self, id: VolumeId) {
        let volume = self.volumes.get_mut(&id).expect("volumes are added first");
        (volume.state, volume.fresh) = (State::Unknown, true);
    }

    /// What was said of the volume's snapshots holds no more: it is read anew from its device.
    pub fn forget(&mut self, id: VolumeId) {
        if let Some(volume) = self.volumes.get_mut(&id) {
            *volume = Lineage { origin: volume.origin, ..Lineage::default() };
        }
    }

    /// A question begins: what is said of volumes from here on counts for it, and nothing else.
    pub fn begin(&mut self) {
        self.volumes.values_mut().for_each(|volume| volume.fresh = false);
    }

    // What it is asked.

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

    /// The volumes that are connected to one by their origins, itself included.
    pub fn connected(&self, id: VolumeId) -> BTreeSet<VolumeId> {
        let (mut found, mut next) = (BTreeSet::new(), vec![id]);
        while let Some(id) = next.pop() {
            if !found.insert(id) {
                continue;
            }
            let origin = self.volumes.get(&id).and_then(|volume| volume.origin);
            next.extend(origin.map(|origin| origin.volume));
            let of_it = SnapshotId { volume: id, sequence: 0 }..=SnapshotId {
                volume: id,
                sequence: u64::MAX,
            };
            next.extend(self.clones.range(of_it).flat_map(|(_, clones)| clones));
        }
        found
    }

    /// The tree of a snapshot, deleted or not.
    pub fn tree(&self, snapshot: SnapshotId) -> Option<Tree> {
        self.node(snapshot).map(|node| Tree { root: node.root, height: node.height })
    }

    /// The trees of a volume that are not deleted, by name; none when it may have others.
    pub fn living(&self, id: VolumeId) -> Option<Vec<(TreeId, Tree)>> {
        let volume = self.volumes.get(&id)?;
        let current = match volume.state {
            State::Unknown => return None,
            State::Gone => None,
            State::Present(CurrentTree { root, height, .. }) => Some(Tree { root, height }),
        };
        let nodes = (0u64..).zip(&volume.nodes).filter(|(_, node)| node.live);
        let snapshots = nodes.map(|(sequence, node)| {
            let name = TreeId::Snapshot(SnapshotId { volume: id, sequence });
            (name, Tree { root: node.root, height: node.height })
        });
        Some(snapshots.chain(current.map(|tree| (TreeId::Current(id), tree))).collect())
    }

    fn node(&self, id: SnapshotId) -> Option<&Node> {
        self.volumes.get(&id.volume)?.nodes.get(id.sequence as usize)
    }

    /// The neighbours of a snapshot that was deleted: a block of it that any other living tree holds,
    /// one of these holds. `waits` says of a deleted snapshot that its mark is not durable yet, or that
    /// its blocks will be freed by themselves later: it counts as living.
    ///
    /// # Errors
    /// When volumes have to be looked at first, or the descent of a tree is not known that may be one of
    /// them, or lie between.
    pub fn neighbours(
        &self,
        of: SnapshotId,
        waits: impl Fn(SnapshotId) -> bool,
    ) -> Result<BTreeMap<TreeId, Tree>, NoAnswer> {
        let mut found = BTreeMap::new();
        let (mut next, mut seen) = (vec![of], BTreeSet::from([of]));
        while let Some(gone) = next.pop() {
            for neighbour in self.around(gone)? {
                match neighbour {
                    TreeId::Snapshot(id) => {
                        let node = self.node(id).expect("it is among the trees there are");
                        if !node.live && !waits(id) {
                            if seen.insert(id) && !planted::is(Bug::OtherBranchIgnored) {
                                next.push(id);
                            }
                        } else if id != of {
                            found.insert(neighbour, Tree { root: node.root, height: node.height });
                        }
                    }
                    TreeId::Current(id) => {
                        let State::Present(CurrentTree { root, height, .. }) =
                            self.volumes[&id].state
                        else {
                            unreachable!("it is among the trees there are")
                        };
                        found.insert(neighbour, Tree { root, height });
                    }
                }
            }
        }
        Ok(found)
    }

    /// The parent and the children of a snapshot.
    fn around(&self, id: SnapshotId) -> Result<Vec<TreeId>, NoAnswer> {
        let unknown = || NoAnswer::Unknown(UnknownDescent(id.volume));
        let clones = self.clones.get(&id).map_or(&[][..], Vec::as_slice);
        let origin = self.volumes.get(&id.volume).and_then(|volume| volume.origin);
        let parent_volume = (self.parent(id) == Some(Parent::Origin)).then_some(origin).flatten();
        let concerned = clones.iter().copied().chain([id.volume]);
        let concerned = concerned.chain(parent_volume.map(|origin| origin.volume));
        let known = |id: &VolumeId| self.volumes.get(id).is_none_or(|volume| volume.fresh);
        let stale: Vec<VolumeId> = concerned.filter(|id| !known(id)).collect();
        if !stale.is_empty() {
            return Err(NoAnswer::Ask(stale));
        }
        let Some(volume) = self.volumes.get(&id.volume).filter(|volume| volume.is_known()) else {
            return Err(unknown());
        };
        // Whatever is unknown may have been derived from any tree before it.
        if volume.unknown_until() > id.sequence {
            return Err(unknown());
        }
        let Some(parent) = self.parent(id) else { return Err(unknown()) };
        let mut around = volume.children(id);
        for clone in clones {
            let volume = &self.volumes[clone];
            if !volume.is_known() || volume.unknown_until() > 0 {
                return Err(UnknownDescent(*clone).into());
            }
            if !planted::is(Bug::ClonesIgnored) {
                around.extend(volume.children_of_origin(*clone));
            }
        }
        let parent = match parent {
            Parent::Unknown => return Err(unknown()),
            Parent::Origin => volume.origin,
            Parent::Snapshot(sequence) => Some(SnapshotId { volume: id.volume, sequence }),
        };
        if let Some(parent) = parent
            && !planted::is(Bug::AncestorIgnored)
        {
            let known = self.volumes.get(&parent.volume).is_some_and(Lineage::is_known);
            if !known || self.node(parent).is_none() {
                return Err(unknown()); // Of a volume that was reclaimed, or whose log is lost.
            }
            around.push(TreeId::Snapshot(parent));
        }
        Ok(around)
    }

    /// What a snapshot was derived from; none when there is no such snapshot, or it is not known yet.
    fn parent(&self, id: SnapshotId) -> Option<Parent> {
        let volume = self.volumes.get(&id.volume)?;
        let node = volume.nodes.get(id.sequence as usize)?;
        Some(match id.sequence.checked_sub(1) {
            _ if !node.plain => volume.odd[&id.sequence],
            None => Parent::Origin,
            Some(before) => Parent::Snapshot(before),
        })
    }

    /// For each snapshot of a volume, the sequence of the one that it was derived from, if that is one of
    /// the volume's.
    pub fn parent_in_volume(&self, id: SnapshotId) -> Option<u64> {
        match self.parent(id)? {
            Parent::Snapshot(sequence) => Some(sequence),
            Parent::Origin => None,
            // As most are, when nobody has noted it.
            Parent::Unknown => id.sequence.checked_sub(1),
        }
    }
}

impl Lineage {
    fn is_known(&self) -> bool {
        self.state != State::Unknown || planted::is(Bug::LostLogIsKnown)
    }

    /// One past the last of its trees, by sequence, that was derived from something unknown; the current
    /// one is past all snapshots.
    fn unknown_until(&self) -> u64 {
        match self.state {
            State::Present(CurrentTree { parent: Parent::Unknown, .. }) => u64::MAX,
            _ => self.unknown_until,
        }
    }

    /// Trees of the volume that were derived from this snapshot of it.
    fn children(&self, id: SnapshotId) -> Vec<TreeId> {
        let name = |sequence| TreeId::Snapshot(SnapshotId { volume: id.volume, sequence });
        let next = id.sequence + 1;
        let plain = self.nodes.get(next as usize).is_some_and(|node| node.plain);
        let odd = self.odd_children.range((id.sequence, 0)..=(id.sequence, u64::MAX));
        let snapshots = plain.then_some(next).into_iter().chain(odd.map(|(_, child)| *child));
        let current = match self.state {
            State::Present(current) => current.parent == Parent::Snapshot(id.sequence),
            State::Unknown | State::Gone => false,
        };
        let current = current.then_some(TreeId::Current(id.volume));
        snapshots.map(name).chain(current).collect()
    }

    /// Trees of the volume that were derived from what it is a clone of.
    fn children_of_origin(&self, id: VolumeId) -> Vec<TreeId> {
        let name = |sequence| TreeId::Snapshot(SnapshotId { volume: id, sequence });
        let first = self.nodes.first().filter(|node| node.plain).map(|_| 0);
        let snapshots = first.into_iter().chain(self.odd_of_origin.iter().copied());
        let current = match self.state {
            State::Present(current) => current.parent == Parent::Origin,
            State::Unknown | State::Gone => false,
        };
        snapshots.map(name).chain(current.then_some(TreeId::Current(id))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bessel_reactor::clock::WallTime;
    use bessel_reactor::units::ByteCount;
    use std::collections::BTreeSet;

    /// A volume of which each snapshot is given by its parent and whether it lives, the last one
    /// being the current tree; none when nothing is known of it.
    type Given<'a> = (u64, Option<(u64, u64)>, Option<&'a [(Parent, bool)]>);

    const ROOT: BlockAddr = BlockAddr::new(7);

    fn forest(volumes: &[Given]) -> Forest {
        let mut forest = Forest::default();
        for (id, origin, _) in volumes {
            let origin = origin.map(|(volume, sequence)| snapshot(volume, sequence));
            forest.add(VolumeId(*id), origin);
        }
        forest.begin();
        for (id, _, trees) in volumes {
            let volume = VolumeId(*id);
            let Some((current, snapshots)) = trees.and_then(|trees| trees.split_last()) else {
                forest.set_unknown(volume);
                continue;
            };
            let infos: Vec<SnapshotInfo> =
                (0u64..).zip(snapshots).map(|(it, tree)| info(snapshot(*id, it), *tree)).collect();
            // In pages, as it comes.
            infos.chunks(2).for_each(|page| forest.extend(volume, page));
            if current.1 {
                let now = CurrentTree { root: ROOT, height: 3, parent: current.0 };
                forest.set_present(volume, now, snapshots.len() as u64);
            } else {
                forest.set_gone(volume);
            }
        }
        forest
    }

    fn info(id: SnapshotId, (parent, live): (Parent, bool)) -> SnapshotInfo {
        SnapshotInfo {
            id,
            time: WallTime::from_unix_nanos(id.sequence),
            label: None,
            size: ByteCount::new(4096),
            root: ROOT,
            height: 3,
            deleted: !live,
            settling: false,
            blocks_allocated: 0,
            parent,
        }
    }

    fn snapshot(volume: u64, sequence: u64) -> SnapshotId {
        SnapshotId { volume: VolumeId(volume), sequence }
    }

    fn neighbours(forest: &Forest, of: SnapshotId) -> Result<Vec<String>, NoAnswer> {
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
        let forest = forest(&[
            (1, None, Some(&trees)),
            (2, Some((1, 1)), Some(&[(Origin, false), (Snapshot(0), true)])),
            (3, Some((1, 3)), Some(&[(Origin, true)])),
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
        let forest = forest(&[(1, None, Some(&trees))]);
        let of = |sequence| neighbours(&forest, snapshot(1, sequence));
        assert_eq!(of(0), Err(UnknownDescent(VolumeId(1)).into()));
        assert_eq!(of(1), Err(UnknownDescent(VolumeId(1)).into()), "its own parent is not known");
        assert_eq!(of(2).unwrap(), ["1.1", "1.3"]);
        assert_eq!(of(3).unwrap(), ["1.2", "v1"]);
    }

    #[test]
    fn a_clone_of_which_little_is_known_keeps_only_what_it_may_share() {
        let trees = [(Origin, true), (Snapshot(0), true), (Snapshot(1), true)];
        let odd = [(Origin, true), (Unknown, true)];
        for clone in [None, Some(&odd[..])] {
            let forest = forest(&[(1, None, Some(&trees)), (2, Some((1, 0)), clone)]);
            let of = |sequence| neighbours(&forest, snapshot(1, sequence));
            assert_eq!(of(0), Err(UnknownDescent(VolumeId(2)).into()));
            assert_eq!(of(1).unwrap(), ["1.0", "v1"]);
        }
    }

    #[test]
    fn clones_of_a_volume_that_was_reclaimed_are_left_alone() {
        let trees = [(Origin, true), (Snapshot(0), true)];
        let forest = forest(&[(2, Some((1, 5)), Some(&trees)), (3, Some((1, 6)), Some(&trees))]);
        assert!(neighbours(&forest, snapshot(2, 0)).is_err());
        assert_eq!(forest.stem(VolumeId(2)), forest.stem(VolumeId(3)));
    }

    #[test]
    fn only_volumes_that_are_concerned_are_asked_for_and_deletions_are_followed() {
        let trees = [(Origin, true), (Snapshot(0), true), (Snapshot(1), true)];
        let mut forest = forest(&[
            (1, None, Some(&trees)),
            (2, Some((1, 1)), Some(&trees)),
            (3, Some((2, 0)), Some(&trees)),
        ]);
        assert_eq!(forest.known(VolumeId(1)), 2);
        forest.begin();
        let ask =
            |volumes: &[u64]| Err(NoAnswer::Ask(volumes.iter().map(|id| VolumeId(*id)).collect()));
        assert_eq!(neighbours(&forest, snapshot(1, 0)), ask(&[1]));
        let now = |parent| CurrentTree { root: ROOT, height: 3, parent: Snapshot(parent) };
        // Snapshots are taken meanwhile.
        forest.extend(VolumeId(1), &[info(snapshot(1, 2), (Snapshot(1), true))]);
        forest.set_present(VolumeId(1), now(2), 3);
        assert_eq!(neighbours(&forest, snapshot(1, 0)).unwrap(), ["1.1"]);
        assert_eq!(neighbours(&forest, snapshot(1, 2)).unwrap(), ["1.1", "v1"]);
        assert_eq!(neighbours(&forest, snapshot(1, 1)), ask(&[2]), "its clone");
        forest.set_present(VolumeId(2), now(1), 2);
        assert_eq!(neighbours(&forest, snapshot(1, 1)).unwrap(), ["1.0", "1.2", "2.0"]);
        forest.mark_deleted(snapshot(2, 0));
        assert_eq!(neighbours(&forest, snapshot(1, 1)), ask(&[3]), "what lies beyond is a clone");
        forest.set_unknown(VolumeId(3));
        assert_eq!(neighbours(&forest, snapshot(1, 1)), Err(UnknownDescent(VolumeId(3)).into()));
        forest.set_present(VolumeId(3), now(1), 2);
        assert_eq!(neighbours(&forest, snapshot(1, 1)).unwrap(), ["1.0", "1.2", "2.1", "3.0"]);
        forest.forget(VolumeId(2));
        assert_eq!(forest.known(VolumeId(2)), 0);
        assert_eq!(neighbours(&forest, snapshot(1, 1)), ask(&[2]), "it is read anew");
        let all = forest.connected(VolumeId(3));
        assert_eq!(all.into_iter().map(|id| id.0).collect::<Vec<_>>(), [1, 2, 3]);
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
            let forest = forest(&[(1, None, Some(&trees))]);
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
