//! What each of many trees refers to, and what it alone holds.

use std::collections::HashMap;
use std::ops::AddAssign;

use bessel_reactor::device::Device;
use bessel_reactor::units::BlockAddr;

use super::{BATCH, BlockSet, NodeReader, WalkError, target};
use crate::blocking::Blocking;
use crate::forest::Tree;
use crate::format::{NODE_ENTRIES, Node};

/// Blocks, by what they are used for.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Space {
    /// Blocks of guest data.
    pub data: u64,
    /// Blocks of radix nodes.
    pub nodes: u64,
}

impl AddAssign for Space {
    fn add_assign(&mut self, other: Self) {
        self.data += other.data;
        self.nodes += other.nodes;
    }
}

/// The space of one tree.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct TreeSpace {
    /// All that it reaches.
    pub refers: Space,
    /// What of that no other of the trees reaches.
    pub alone: Space,
}

/// More than one tree reaches the node.
const SHARED: u32 = u32::MAX;

/// What is known of a node that was reached.
#[derive(Clone, Copy, Debug)]
struct Known {
    /// The tree that alone reaches it, as far as is known by now, or [`SHARED`].
    tree: u32,
    /// What lies below it, itself included; complete when its tree has been walked.
    space: Space,
}

/// A node to be read, and its place in the list of those that were reached.
#[derive(Clone, Copy, Debug)]
struct Visit {
    addr: BlockAddr,
    level: u8,
    at: usize,
}

/// The root has nothing above it.
const NOTHING: usize = usize::MAX;

/// The first time round every node is read once, by the first tree that reaches it; the second time
/// those that one tree alone reaches.
///
/// A block of data that two nodes lead to is in two trees: a tree has one node for each place.
#[derive(Debug)]
pub struct UsageWalk {
    trees: Vec<Tree>,
    spaces: Vec<TreeSpace>,
    total: Space,
    known: HashMap<BlockAddr, Known>,
    seen: BlockSet,
    shared: BlockSet,
    /// The second time round.
    again: bool,
    tree: usize,
    /// Nodes that this tree is the first to reach, in that order, each with the place of the one above.
    reached: Vec<(BlockAddr, usize)>,
    stack: Vec<Visit>,
}

impl UsageWalk {
    /// Begins the walk of these trees.
    ///
    /// # Errors
    /// When a root does not lie where nodes do.
    pub fn new(reader: &NodeReader, trees: Vec<Tree>) -> Result<Self, WalkError> {
        trees.iter().try_for_each(|tree| reader.check_root(tree.root))?;
        let mut walk = Self {
            spaces: vec![TreeSpace::default(); trees.len()],
            trees,
            total: Space::default(),
            known: HashMap::new(),
            seen: BlockSet::default(),
            shared: BlockSet::default(),
            again: false,
            tree: 0,
            reached: Vec::new(),
            stack: Vec::new(),
        };
        walk.begin_tree();
        Ok(walk)
    }

    /// What each tree has, in their order, and all of them together: to be asked when
    /// [`UsageWalk::step`] has come to its end.
    pub fn spaces(&self) -> (&[TreeSpace], Space) {
        (&self.spaces, self.total)
    }

    /// Looks at some more nodes. True when all have been looked at.
    ///
    /// # Errors
    /// When a node cannot be read or is damaged.
    pub fn step<D: Device>(
        &mut self,
        reader: &mut NodeReader,
        io: &mut Blocking<'_, D>,
    ) -> Result<bool, WalkError> {
        let Some(level) = self.stack.last().map(|visit| visit.level) else {
            return Ok(self.end_tree());
        };
        let mut batch = Vec::new();
        while batch.len() < BATCH
            && let Some(visit) = self.stack.pop_if(|visit| visit.level == level)
        {
            batch.push(visit);
        }
        let addrs: Vec<BlockAddr> = batch.iter().map(|visit| visit.addr).collect();
        let nodes = reader.read(io, &addrs, level)?;
        for (visit, node) in batch.into_iter().zip(nodes) {
            if self.again {
                self.count_alone(visit, &node);
            } else {
                self.count(visit, &node);
            }
        }
        Ok(false)
    }

    fn begin_tree(&mut self) {
        let Some(Tree { root, height }) = self.trees.get(self.tree).copied() else { return };
        if self.again {
            self.arrive_again(root, height);
        } else {
            self.arrive(root, height, NOTHING);
        }
    }

    /// True when it was the last one, the second time round.
    fn end_tree(&mut self) -> bool {
        // From the leaves up: each was reached through an earlier one.
        while let Some((addr, above)) = self.reached.pop() {
            let space = self.known[&addr].space;
            self.add(above, space);
        }
        self.tree += 1;
        if self.tree >= self.trees.len() {
            if self.again || self.trees.is_empty() {
                return true;
            }
            (self.again, self.tree) = (true, 0);
        }
        self.begin_tree();
        false
    }

    /// Adds to what lies below a node that this tree was the first to reach, or to the whole tree.
    fn add(&mut self, above: usize, space: Space) {
        match self.reached.get(above) {
            Some((addr, _)) => {
                self.known.get_mut(addr).expect("it was reached").space += space;
            }
            None => self.spaces[self.tree].refers += space,
        }
    }

    fn arrive(&mut self, addr: BlockAddr, level: u8, above: usize) {
        let tree = self.tree as u32;
        if let Some(known) = self.known.get_mut(&addr) {
            // In one tree twice, on a damaged store, it counts once.
            if known.tree != tree {
                known.tree = SHARED;
                let space = known.space;
                self.add(above, space);
            }
            return;
        }
        let space = Space { data: 0, nodes: 1 };
        self.known.insert(addr, Known { tree, space });
        self.total.nodes += 1;
        self.stack.push(Visit { addr, level, at: self.reached.len() });
        self.reached.push((addr, above));
    }

    fn count(&mut self, visit: Visit, node: &Node) {
        let targets = (0..NODE_ENTRIES).filter_map(|slot| target(node[slot]));
        if visit.level > 1 {
            targets.for_each(|child| self.arrive(child, visit.level - 1, visit.at));
            return;
        }
        for block in targets {
            if self.seen.insert(block) {
                self.total.data += 1;
            } else {
                self.shared.insert(block);
            }
            self.known.get_mut(&visit.addr).expect("it was reached").space.data += 1;
        }
    }

    fn arrive_again(&mut self, addr: BlockAddr, level: u8) {
        // A tree that changes may have got nodes since that nobody knew the first time.
        if self.known.get(&addr).is_some_and(|known| known.tree == self.tree as u32) {
            self.spaces[self.tree].alone.nodes += 1;
            self.stack.push(Visit { addr, level, at: NOTHING });
        }
    }

    fn count_alone(&mut self, visit: Visit, node: &Node) {
        let targets = (0..NODE_ENTRIES).filter_map(|slot| target(node[slot]));
        if visit.level > 1 {
            targets.for_each(|child| self.arrive_again(child, visit.level - 1));
            return;
        }
        let alone = targets.filter(|block| !self.shared.contains(*block)).count();
        self.spaces[self.tree].alone.data += alone as u64;
    }
}
