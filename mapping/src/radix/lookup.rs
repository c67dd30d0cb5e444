//! Lookup: from a volume's block to the node that maps it, by nodes in memory only.

use bessel_reactor::device::Device;
use bessel_reactor::units::{BlockAddr, VolumeBlock};

use super::{slot_at, slot_span};
use crate::format::{EntryKind, NODE_ENTRIES};
use crate::nodes::cache::FrameId;
use crate::planted::{self, Bug};
use crate::request::VolumeHandle;
use crate::shard::Shard;

/// Where a block is mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Located {
    /// In this slot of this leaf. `writable` when every link down to the leaf is.
    Leaf { frame: FrameId, slot: usize, writable: bool },
    /// Nowhere: it reads as zeroes, and so do the blocks after it, `blocks` in all.
    Hole { blocks: u64 },
    /// Below a node that is not in memory.
    Absent(Missing),
}

/// A node to be read before the tree can be followed further; or one that is in memory and cannot be
/// what this link leads to, of which [`Shard::wait_for_node`] makes an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Missing {
    pub(crate) addr: BlockAddr,
    pub(crate) level: u8,
    pub(crate) parent: Option<FrameId>,
}

/// A leaf that a walk has found, and what it stands and falls with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct KnownLeaf {
    /// [`NodeCache::ways`](crate::nodes::cache::NodeCache::ways) then.
    ways: u64,
    root: FrameId,
    /// Which of the volume's leaves it is.
    leaf: u64,
    frame: FrameId,
    writable: bool,
}

impl KnownLeaf {
    /// None is known.
    pub(crate) const NONE: Self =
        Self { ways: u64::MAX, root: FrameId(0), leaf: 0, frame: FrameId(0), writable: false };
}

impl<D: Device> Shard<D> {
    /// Finds the leaf entry of `block`, without a walk when it is in the leaf that the volume's last
    /// walk led to. Hot path.
    pub(crate) fn locate(&mut self, handle: VolumeHandle, block: VolumeBlock) -> Located {
        let known = self.volume(handle).last_leaf;
        self.recall(&known, handle, block).unwrap_or_else(|| self.walk(handle, block))
    }

    /// Finds the leaf of a block that will be located soon, and has its entry brought to the cache.
    pub(crate) fn look_ahead(&mut self, handle: VolumeHandle, block: VolumeBlock) -> KnownLeaf {
        let Located::Leaf { frame, slot, .. } = self.locate(handle, block) else {
            return KnownLeaf::NONE;
        };
        self.cache.expect(frame, slot);
        self.volume(handle).last_leaf
    }

    /// What is known of a leaf, if it still holds and maps `block`.
    #[inline]
    pub(crate) fn recall(
        &mut self,
        known: &KnownLeaf,
        handle: VolumeHandle,
        block: VolumeBlock,
    ) -> Option<Located> {
        let stale = known.ways != self.cache.ways()
            && !(known.ways != u64::MAX && planted::is(Bug::LeafKnownForEver));
        if stale
            || known.root != self.volume(handle).root
            || known.leaf != block.get() / NODE_ENTRIES as u64
        {
            return None;
        }
        // The nodes above it stay as long as it does.
        self.cache.touch(known.frame);
        self.cache.counters.hits += 1;
        let (frame, writable) = (known.frame, known.writable);
        Some(Located::Leaf { frame, slot: slot_at(block, 1), writable })
    }

    fn walk(&mut self, handle: VolumeHandle, block: VolumeBlock) -> Located {
        let mut frame = self.volume(handle).root;
        let mut level = self.cache.frame(frame).level;
        let mut writable = true;
        while level > 1 {
            let slot = slot_at(block, level);
            let entry = self.cache.entries(frame)[slot];
            writable &= !entry.read_only() || planted::is(Bug::ReadOnlyAboveIgnored);
            level -= 1;
            match entry.kind() {
                EntryKind::Node(below) => {
                    assert_eq!(below, level, "nodes were checked when they were loaded");
                    let addr = entry.block();
                    match self.cache.find_present(addr, level) {
                        Some(child) if !writable || self.cache.may_belong_to(child, frame) => {
                            self.cache.touch(child);
                            self.cache.counters.hits += 1;
                            frame = child;
                        }
                        _ => {
                            return Located::Absent(Missing { addr, level, parent: Some(frame) });
                        }
                    }
                }
                _ => {
                    let span = slot_span(level + 1);
                    return Located::Hole { blocks: span - block.get() % span };
                }
            }
        }
        let (ways, leaf) = (self.cache.ways(), block.get() / NODE_ENTRIES as u64);
        let volume = self.volume_mut(handle);
        volume.last_leaf = KnownLeaf { ways, root: volume.root, leaf, frame, writable };
        Located::Leaf { frame, slot: slot_at(block, 1), writable }
    }
}
