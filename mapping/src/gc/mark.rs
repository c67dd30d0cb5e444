//! The passes: from the highest nodes down, each level in disk order.

use bessel_reactor::device::Device;
use bessel_reactor::units::BlockAddr;

use crate::blocking::Blocking;
use crate::forest::Tree;
use crate::format::NODE_ENTRIES;
use crate::walk::{BlockSet, NodeReader, WalkError, target};

/// Levels of the tallest tree, and one for data.
const LEVELS: usize = 5;
/// Runs of nodes, and nodes, that are read in one step.
const RUNS_MAX: usize = 64;
const NODES_MAX: u64 = 256;

/// The reachability map, one bit a block, and the nodes that were reached and have not been read.
#[derive(Debug, Default)]
pub(super) struct Marks {
    reached: BlockSet,
    /// By level. Every node has one level, wherever it is linked, so it is read once.
    waiting: [BlockSet; LEVELS],
    data_reached: u64,
}

impl Marks {
    /// Notes a root.
    pub(super) fn root(&mut self, tree: Tree) {
        self.node(tree.root, tree.height);
    }

    /// Notes a block of a log, which leads to nothing that is not noted anyway.
    pub(super) fn log_block(&mut self, block: BlockAddr) {
        self.reached.insert(block);
    }

    fn node(&mut self, block: BlockAddr, level: u8) {
        if self.reached.insert(block) {
            self.waiting[usize::from(level)].insert(block);
        }
    }

    /// Reads some nodes. True when all have been read.
    pub(super) fn step<D: Device>(
        &mut self,
        reader: &mut NodeReader,
        io: &mut Blocking<'_, D>,
    ) -> Result<bool, WalkError> {
        let Some(level) = self.waiting.iter().rposition(|waiting| !waiting.is_empty()) else {
            return Ok(true);
        };
        let runs = self.waiting[level].take_runs(RUNS_MAX, NODES_MAX);
        let level = level as u8;
        reader.read_runs(io, &runs, level, |node| {
            let targets = (0..NODE_ENTRIES).filter_map(|slot| target(node[slot]));
            if level > 1 {
                targets.for_each(|child| self.node(child, level - 1));
            } else {
                targets.for_each(|block| {
                    self.data_reached += u64::from(self.reached.insert(block));
                });
            }
        })?;
        Ok(false)
    }

    pub(super) fn has_reached(&self, block: BlockAddr) -> bool {
        self.reached.contains(block)
    }

    /// All blocks that were reached.
    pub(super) fn reached(&self) -> u64 {
        self.reached.len()
    }

    /// Those of them that hold guest data.
    pub(super) fn data_reached(&self) -> u64 {
        self.data_reached
    }

    /// Nodes that are known and have not been read.
    pub(super) fn nodes_waiting(&self) -> u64 {
        self.waiting.iter().map(BlockSet::len).sum()
    }
}
