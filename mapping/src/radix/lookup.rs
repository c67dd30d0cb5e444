//! Lookup: from a volume's block to the node that maps it, by nodes in memory only.

use bessel_reactor::device::Device;
use bessel_reactor::units::{BlockAddr, VolumeBlock};

use super::{slot_at, slot_span};
use crate::format::EntryKind;
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

impl<D: Device> Shard<D> {
    /// Finds the leaf entry of `block`. Hot path.
    pub(crate) fn locate(&mut self, handle: VolumeHandle, block: VolumeBlock) -> Located {
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
        Located::Leaf { frame, slot: slot_at(block, 1), writable }
    }
}
