//! What only one of several trees holds.

use bessel_reactor::device::Device;
use bessel_reactor::units::BlockAddr;

use super::{BATCH, BlockSet, NodeReader, WalkError, span, target};
use crate::blocking::Blocking;
use crate::forest::Tree;
use crate::format::{NODE_ENTRIES, Node};

/// A place of the tree, with what all trees have there.
#[derive(Debug)]
struct Visit {
    level: u8,
    /// The first volume block below.
    first: u64,
    /// None above the root of a tree that is lower than another.
    own: Option<BlockAddr>,
    /// What the others have there, each once. `own` is not among them.
    others: Vec<BlockAddr>,
}

/// The walk of one tree, which does not change, beside others, which may lose what they share with it
/// and never gain any of it.
///
/// At a place where another has the same node, all below is shared, and not looked at.
#[derive(Debug)]
pub struct Sole {
    tree: Tree,
    others: Vec<Tree>,
    stack: Vec<Visit>,
    /// Data blocks that the others did not have when they were read.
    pub data: BlockSet,
    /// The same, radix nodes.
    pub nodes: BlockSet,
}

impl Sole {
    /// Begins the walk of `tree`.
    ///
    /// # Errors
    /// When a root does not lie where nodes do.
    pub fn new(reader: &NodeReader, tree: Tree, others: Vec<Tree>) -> Result<Self, WalkError> {
        for tree in others.iter().chain([&tree]) {
            reader.check_root(tree.root)?;
        }
        let level = others.iter().chain([&tree]).map(|tree| tree.height).max();
        // The place above all roots: none of the trees has a node there, and all begin below it.
        let above =
            Visit { level: level.unwrap_or(0) + 1, first: 0, own: None, others: Vec::new() };
        let (data, nodes) = (BlockSet::default(), BlockSet::default());
        let mut walk = Self { tree, others, stack: Vec::new(), data, nodes };
        walk.descend(&above, None, &[]);
        Ok(walk)
    }

    /// Looks at some more places. True when all have been looked at.
    ///
    /// # Errors
    /// When a node cannot be read or is damaged. What was found so far is right, and not all.
    pub fn step<D: Device>(
        &mut self,
        reader: &mut NodeReader,
        io: &mut Blocking<'_, D>,
    ) -> Result<bool, WalkError> {
        let Some(level) = self.stack.last().map(|visit| visit.level) else { return Ok(true) };
        let (mut batch, mut nodes) = (Vec::new(), 0);
        while nodes < BATCH
            && let Some(visit) = self.stack.pop_if(|visit| visit.level == level)
        {
            nodes += 1 + visit.others.len();
            batch.push(visit);
        }
        let wanted = batch.iter().flat_map(|visit| visit.own.iter().chain(&visit.others));
        let wanted: Vec<BlockAddr> = wanted.copied().collect();
        let mut read = reader.read(io, &wanted, level)?.into_iter();
        for visit in batch {
            let own = visit.own.and_then(|_| read.next());
            let others: Vec<Box<Node>> = read.by_ref().take(visit.others.len()).collect();
            self.descend(&visit, own.as_deref(), &others);
        }
        Ok(self.stack.is_empty())
    }

    /// Compares what lies below a place, entry by entry.
    fn descend(&mut self, visit: &Visit, own: Option<&Node>, others: &[Box<Node>]) {
        let below = visit.level - 1;
        for slot in 0..NODE_ENTRIES {
            let is_root_of = |tree: &Tree| visit.first == 0 && slot == 0 && tree.height == below;
            let mut own = own.and_then(|node| target(node[slot]));
            own = own.or_else(|| is_root_of(&self.tree).then_some(self.tree.root));
            if own.is_none() && !(visit.first == 0 && slot == 0 && below > self.tree.height) {
                continue;
            }
            let roots = self.others.iter().filter(|tree| is_root_of(tree)).map(|tree| tree.root);
            let linked = others.iter().filter_map(|node| target(node[slot]));
            let mut there: Vec<BlockAddr> = linked.chain(roots).collect();
            there.sort_unstable();
            there.dedup();
            if let Some(own) = own {
                if there.binary_search(&own).is_ok() {
                    continue;
                }
                let found = if below == 0 { &mut self.data } else { &mut self.nodes };
                found.insert(own);
            }
            if below > 0 {
                let first = visit.first + slot as u64 * span(visit.level);
                self.stack.push(Visit { level: below, first, own, others: there });
            }
        }
    }
}
