//! Where two trees differ, or what one holds, in the order of the volume.

use bessel_reactor::device::Device;
use bessel_reactor::units::{BlockAddr, VolumeBlock};

use super::{BATCH, NodeReader, WalkError, span, target};
use crate::blocking::Blocking;
use crate::forest::Tree;
use crate::format::{NODE_ENTRIES, Node};
use crate::planted::{self, Bug};

/// What the later tree has at a block where it differs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChangeKind {
    /// Data, from this block of the store on.
    Data(BlockAddr),
    /// Nothing: it reads as zeroes.
    Hole,
}

/// Adjacent blocks of a volume in which the later tree differs from the earlier one in the same way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// The first of them.
    pub first: VolumeBlock,
    /// How many.
    pub blocks: u64,
    /// What is there now. Data lies one after the other in the store too.
    pub now: ChangeKind,
}

impl Change {
    /// Takes in `next` when it goes on where this one ends.
    fn join(&mut self, next: &Self) -> bool {
        let joins = self.first.add(self.blocks) == next.first
            && match (self.now, next.now) {
                (ChangeKind::Hole, ChangeKind::Hole) => true,
                (ChangeKind::Data(here), ChangeKind::Data(there)) => here.add(self.blocks) == there,
                _ => false,
            };
        if joins {
            self.blocks += next.blocks;
        }
        joins
    }
}

/// A place at which the trees differ.
#[derive(Clone, Copy, Debug)]
struct Visit {
    level: u8,
    first: u64,
    before: Option<BlockAddr>,
    after: Option<BlockAddr>,
}

/// The walk of two trees of one forest side by side; or of one, compared with nothing.
///
/// Both must stay as they are meanwhile: snapshots that nobody frees.
#[derive(Debug)]
pub struct Changes {
    before: Option<Tree>,
    after: Tree,
    /// In the order of the volume, the next one last.
    stack: Vec<Visit>,
    /// The last change found, which the next one may go on.
    last: Option<Change>,
    position: u64,
}

impl Changes {
    /// Begins the walk.
    ///
    /// # Errors
    /// When a root does not lie where nodes do.
    pub fn new(reader: &NodeReader, before: Option<Tree>, after: Tree) -> Result<Self, WalkError> {
        for tree in before.iter().chain([&after]) {
            reader.check_root(tree.root)?;
        }
        let height = before.map_or(0, |tree| tree.height).max(after.height);
        // The place above both roots.
        let above = Visit { level: height + 1, first: 0, before: None, after: None };
        let mut walk = Self { before, after, stack: Vec::new(), last: None, position: 0 };
        walk.descend(above, None, None, &mut |_| ());
        Ok(walk)
    }

    /// The volume block up to which everything has been told but the last change.
    pub fn position(&self) -> VolumeBlock {
        VolumeBlock::new(self.position)
    }

    /// Looks at some more places and tells `found` of each change, in order. True when the walk has
    /// come to its end.
    ///
    /// # Errors
    /// When a node cannot be read or is damaged.
    pub fn step<D: Device>(
        &mut self,
        reader: &mut NodeReader,
        io: &mut Blocking<'_, D>,
        found: &mut dyn FnMut(Change),
    ) -> Result<bool, WalkError> {
        let Some(next) = self.stack.last().copied() else {
            self.last.take().into_iter().for_each(found);
            return Ok(true);
        };
        self.position = next.first;
        // Leaves, which hold nothing but data, can be read together and taken in order.
        let batch_max = if next.level == 1 { BATCH / 2 } else { 1 };
        let mut batch = Vec::new();
        while batch.len() < batch_max
            && let Some(visit) = self.stack.pop_if(|visit| visit.level == next.level)
        {
            batch.push(visit);
        }
        let wanted = batch.iter().flat_map(|visit| visit.before.into_iter().chain(visit.after));
        let wanted: Vec<BlockAddr> = wanted.collect();
        let read = match reader.read(io, &wanted, next.level) {
            Err(_) if planted::is(Bug::DiffTakesUnreadableForEmpty) => Vec::new(),
            read => read?,
        };
        let mut read = read.into_iter();
        for visit in batch {
            let before = visit.before.and_then(|_| read.next());
            let after = visit.after.and_then(|_| read.next());
            self.descend(visit, before.as_deref(), after.as_deref(), found);
        }
        Ok(false)
    }

    fn descend(
        &mut self,
        visit: Visit,
        before: Option<&Node>,
        after: Option<&Node>,
        found: &mut dyn FnMut(Change),
    ) {
        let below = visit.level - 1;
        let pushed = self.stack.len();
        for slot in 0..NODE_ENTRIES {
            let first = visit.first + slot as u64 * span(visit.level);
            let has = |node: Option<&Node>, tree: Option<Tree>| {
                let root = tree.filter(|tree| first == 0 && tree.height == below);
                node.and_then(|node| target(node[slot])).or(root.map(|tree| tree.root))
            };
            let (before, after) = (has(before, self.before), has(after, Some(self.after)));
            // Above a root that is yet to come, the other tree may have nothing.
            let comes =
                |tree: Option<Tree>| first == 0 && tree.is_some_and(|tree| below > tree.height);
            if before == after && !(comes(self.before) || comes(Some(self.after))) {
                continue;
            }
            if below > 0 {
                if after.is_none() && planted::is(Bug::DiffPassesOverHoles) {
                    continue;
                }
                self.stack.push(Visit { level: below, first, before, after });
                continue;
            }
            let now = after.map_or(ChangeKind::Hole, ChangeKind::Data);
            self.tell(Change { first: VolumeBlock::new(first), blocks: 1, now }, found);
        }
        self.stack[pushed..].reverse();
    }

    fn tell(&mut self, change: Change, found: &mut dyn FnMut(Change)) {
        if self.last.as_mut().is_some_and(|last| last.join(&change)) {
            return;
        }
        self.last.replace(change).into_iter().for_each(found);
    }
}
