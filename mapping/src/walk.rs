//! Walks over trees on the device, side by side, beside the shards that serve the volumes.
//!
//! | file         | walks                                                                |
//! |--------------|----------------------------------------------------------------------|
//! | `changes.rs` | two trees, or one: where they differ, in the order of the volume     |
//! | `sole.rs`    | one tree against many: the blocks that no other has                  |
//! | `usage.rs`   | all trees of a forest: what each refers to, and holds alone          |
//! | `blocks.rs`  | (a set of blocks)                                                    |
//!
//! All rest on *places*: a block is reached at one level and first volume block in every tree, so two
//! trees share a subtree exactly when both have the same address at its place. What is shared is not
//! read: the cost grows with what differs, not with the volumes. Control path; each takes a
//! [`Blocking`] device of its own and does a bounded part of the work in each call.
//!
//! Nodes are read while shards write them. A node is a legal mix of its old and new entries at any
//! time; a sector whose write is seen half done has a bad tag, and is read again.

mod blocks;
mod changes;
mod sole;
mod usage;

pub use blocks::BlockSet;
pub use changes::{Change, ChangeKind, Changes};
pub use sole::Sole;
pub use usage::{Space, TreeSpace, UsageWalk};

use bessel_reactor::device::{Device, DeviceError};
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr};

use crate::blocking::{Blocking, Span};
use crate::format::{
    Entry, ExtentMap, NODE_BITS, NODE_ENTRIES, Node, NodeFault, TagKey, check_node,
    node_as_bytes_mut, node_from_bytes,
};
use crate::message::BlockRun;
use crate::store::OpenedStore;

/// Nodes read together.
const BATCH: usize = 64;
/// How often a node with a bad entry is read before that counts. A write under way takes far less.
pub(crate) const READS_MAX: u32 = 1000;

/// Why a walk cannot go on.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WalkError {
    /// The device failed.
    #[error("radix nodes from block {addr} on cannot be read")]
    Device {
        /// The first of them.
        addr: BlockAddr,
        /// How it failed.
        #[source]
        source: DeviceError,
    },
    /// A node has an entry that cannot be followed.
    #[error("{0}; run `bessel check`")]
    Node(#[from] NodeFault),
    /// A root is not where nodes are.
    #[error("root block {0} does not lie in a metadata extent; run `bessel check`")]
    Root(BlockAddr),
}

/// What a walk needs to know of a store.
#[derive(Clone, Debug)]
pub struct NodeReader {
    key: TagKey,
    extents: ExtentMap,
    nodes_read: u64,
}

impl NodeReader {
    /// For walks over this store. `extents` are those that the shards have by now.
    pub fn new(store: &OpenedStore) -> Self {
        Self { key: store.key, extents: store.extents.clone(), nodes_read: 0 }
    }

    /// Nodes read so far, one that was read again counted once.
    pub fn nodes_read(&self) -> u64 {
        self.nodes_read
    }

    /// Reads nodes of one level, several at a time.
    fn read<D: Device>(
        &mut self,
        io: &mut Blocking<'_, D>,
        addrs: &[BlockAddr],
        level: u8,
    ) -> Result<Vec<Box<Node>>, WalkError> {
        let empty = || Box::new([Entry::default(); NODE_ENTRIES]);
        let mut sorted: Vec<(BlockAddr, usize)> =
            addrs.iter().enumerate().map(|(index, addr)| (*addr, index)).collect();
        sorted.sort_unstable();
        let mut nodes: Vec<Box<Node>> = addrs.iter().map(|_| empty()).collect();
        let failed = |source| WalkError::Device { addr: sorted[0].0, source };
        io.read(sorted.iter().map(|(addr, _)| Span::one(*addr)), |addr, bytes| {
            let at = sorted.partition_point(|(other, _)| *other < addr);
            for (_, index) in sorted[at..].iter().take_while(|(other, _)| *other == addr) {
                node_as_bytes_mut(&mut nodes[*index]).copy_from_slice(bytes);
            }
        })
        .map_err(failed)?;
        for (addr, node) in addrs.iter().zip(&mut nodes) {
            self.settle(io, *addr, level, node)?;
        }
        self.nodes_read += addrs.len() as u64;
        Ok(nodes)
    }

    /// Reads all nodes of these runs, of one level, in any order; `each` gets one after the other.
    pub(crate) fn read_runs<D: Device>(
        &mut self,
        io: &mut Blocking<'_, D>,
        runs: &[BlockRun],
        level: u8,
        mut each: impl FnMut(&Node),
    ) -> Result<(), WalkError> {
        let mut unsettled = Vec::new();
        let span = |run: &BlockRun| Span { start: run.start, blocks: u64::from(run.count) };
        let first = runs.first().map_or(BlockAddr::new(0), |run| run.start);
        io.read(runs.iter().map(span), |start, bytes| {
            let blocks = bytes.chunks_exact(BLOCK_SIZE as usize);
            for (addr, bytes) in (0..).map(|index| start.add(index)).zip(blocks) {
                let node = node_from_bytes(bytes);
                if check_node(node, addr, level, self.key, &self.extents).is_ok() {
                    each(node);
                } else {
                    unsettled.push(addr);
                }
            }
        })
        .map_err(|source| WalkError::Device { addr: first, source })?;
        let mut node = Box::new([Entry::default(); NODE_ENTRIES]);
        for addr in unsettled {
            self.settle(io, addr, level, &mut node)?;
            each(&node);
        }
        self.nodes_read += runs.iter().map(|run| u64::from(run.count)).sum::<u64>();
        Ok(())
    }

    /// Reads a node again for as long as it has bad entries: its write may be under way.
    fn settle<D: Device>(
        &self,
        io: &mut Blocking<'_, D>,
        addr: BlockAddr,
        level: u8,
        node: &mut Node,
    ) -> Result<(), WalkError> {
        for _ in 0..READS_MAX {
            if check_node(node, addr, level, self.key, &self.extents).is_ok() {
                return Ok(());
            }
            io.read_into(addr, node_as_bytes_mut(node))
                .map_err(|source| WalkError::Device { addr, source })?;
        }
        Ok(check_node(node, addr, level, self.key, &self.extents)?)
    }

    /// Refuses a root that no node can be at.
    pub(crate) fn check_root(&self, root: BlockAddr) -> Result<(), WalkError> {
        if self.extents.holds(root, crate::format::ExtentType::Metadata) {
            Ok(())
        } else {
            Err(WalkError::Root(root))
        }
    }
}

/// Volume blocks below one entry of a node of this level.
const fn span(level: u8) -> u64 {
    1 << (NODE_BITS * (level as u32 - 1))
}

/// Where an entry leads: none for a hole.
pub(crate) fn target(entry: Entry) -> Option<BlockAddr> {
    (!entry.is_hole()).then(|| entry.block())
}
