//! Discard and write zeroes: whole blocks become holes, whole subtrees at once where they are
//! shared; the edges of a write zeroes are ordinary small writes of zeroes.
//!
//! A discarded block reads as zeroes (*sparse*); a zeroed one too, and stays told apart from one
//! never written (*zeroed*). Blocks that only this volume reached are unlinked.

use bessel_reactor::device::Device;
use bessel_reactor::units::{BLOCK_SIZE, VolumeBlock};

use super::{Step, Work};
use crate::format::{Entry, EntryKind, NODE_ENTRIES};
use crate::journal::{Change, Mapped};
use crate::planted::{self, Bug};
use crate::radix::{Missing, Path, slot_at, slot_span};
use crate::request::{IoKind, IoStatus, VolumeHandle};
use crate::shard::Shard;

/// Entries of a leaf that are changed for one step: as much work as a small read.
const ENTRIES_PER_STEP: u32 = 8;

/// What the tree has for the next blocks of the request.
pub(crate) enum Cover {
    /// These many blocks are holes already, in memory.
    Hole { blocks: u64 },
    /// One link, in a node of this level, to a subtree that is shared and wholly covered.
    Shared { level: u8 },
    /// Entries of a leaf.
    Leaf,
    /// A node that must be read first.
    Absent(Missing),
}

impl<D: Device> Shard<D> {
    pub(super) fn unmap_step(&mut self, index: u32) -> Step {
        let (handle, block, offset, left) = self.position(index);
        if self.volume(handle).latched.is_some() {
            return Step::Failed(IoStatus::Failed);
        }
        if offset != 0 || left < BLOCK_SIZE {
            if self.requests[index].kind == IoKind::WriteZeroes
                && !planted::is(Bug::ZeroesSkipEdges)
            {
                return self.write_step(index);
            }
            if planted::is(Bug::DiscardRoundsOut)
                && !self.volume(handle).is_locked(block, 1)
                && let Path::Writable(leaf) = self.make_writable(handle, block, 1)
            {
                self.set_entry(handle, leaf, block, Entry::sparse());
            }
            // A discard is a hint; part of a block cannot be given back.
            self.consume(index, left.min(BLOCK_SIZE - offset as u64));
            return Step::On;
        }
        let blocks = left / BLOCK_SIZE;
        match self.cover(handle, block, blocks) {
            Cover::Hole { blocks: hole } => {
                // It may not be one on the device yet. (The node's own round would not do: the node
                // may be shared, and another volume counts its rounds by itself.)
                let round = self.volume(handle).newest_change_round();
                let request = &mut self.requests[index];
                if !planted::is(Bug::HoleNotAwaited) {
                    request.commit_round = request.commit_round.max(round);
                }
                self.consume(index, hole.min(blocks) * BLOCK_SIZE);
                Step::On
            }
            Cover::Shared { level } => self.unlink_shared(index, block, level),
            Cover::Leaf => self.clear_leaf(index, block, blocks),
            Cover::Absent(missing) => {
                self.wait_for_node(missing, Work::Request(index));
                Step::Parked
            }
        }
    }

    /// Looks from the root down for the highest link that settles the next blocks.
    pub(crate) fn cover(&mut self, handle: VolumeHandle, block: VolumeBlock, blocks: u64) -> Cover {
        let mut frame = self.volume(handle).root;
        let mut level = self.cache.frame(frame).level;
        let mut shared = false;
        while level > 1 {
            let entry = self.cache.entries(frame)[slot_at(block, level)];
            let span = slot_span(level);
            let EntryKind::Node(_) = entry.kind() else {
                return Cover::Hole { blocks: span - block.get() % span };
            };
            shared |= entry.read_only();
            if shared && block.get().is_multiple_of(span) && blocks >= span {
                return Cover::Shared { level };
            }
            level -= 1;
            match self.cache.find_present(entry.block(), level) {
                Some(child) if shared || self.cache.may_belong_to(child, frame) => {
                    self.cache.touch(child);
                    frame = child;
                }
                _ => {
                    let addr = entry.block();
                    return Cover::Absent(Missing { addr, level, parent: Some(frame) });
                }
            }
        }
        let slot = slot_at(block, 1);
        let entries = &self.cache.entries(frame)[slot..];
        let hole = entries.iter().take_while(|entry| entry.is_hole()).count();
        if hole > 0 { Cover::Hole { blocks: hole as u64 } } else { Cover::Leaf }
    }

    fn hole(&self, index: u32) -> Entry {
        match self.requests[index].kind {
            IoKind::Discard => Entry::sparse(),
            _ => Entry::zeroed(),
        }
    }

    /// Replaces the link to a shared subtree by a hole. What is below belongs to others.
    fn unlink_shared(&mut self, index: u32, block: VolumeBlock, level: u8) -> Step {
        let handle = self.requests[index].volume;
        let blocks = slot_span(level);
        if planted::is(Bug::SharedDiscardSkipped) {
            self.consume(index, blocks * BLOCK_SIZE);
            return Step::On;
        }
        if self.volume(handle).is_locked(block, blocks) && !planted::is(Bug::UnmapIgnoresLocks) {
            return self.park(index);
        }
        let node = match self.writable_for(index, block, level) {
            Ok(node) => node,
            Err(step) => return step,
        };
        let hole = self.hole(index);
        self.set_entry(handle, node, block, hole);
        self.unmapped(index, blocks);
        Step::On
    }

    /// Turns entries of a leaf into holes, and drops the leaf when nothing is left of it.
    fn clear_leaf(&mut self, index: u32, block: VolumeBlock, blocks: u64) -> Step {
        let handle = self.requests[index].volume;
        let slot = slot_at(block, 1);
        let count = blocks.min((NODE_ENTRIES - slot) as u64);
        if self.volume(handle).is_locked(block, count) && !planted::is(Bug::UnmapIgnoresLocks) {
            return self.park(index);
        }
        let leaf = match self.writable_for(index, block, 1) {
            Ok(leaf) => leaf,
            Err(step) => return step,
        };
        self.take_steps(handle, count as u32 / ENTRIES_PER_STEP);
        let hole = self.hole(index);
        for at in slot..slot + count as usize {
            if !self.cache.entries(leaf)[at].is_hole() {
                self.set_entry(handle, leaf, block.add((at - slot) as u64), hole);
            }
        }
        if count == NODE_ENTRIES as u64
            && let Path::Writable(parent) = self.make_writable(handle, block, 2)
        {
            self.set_entry(handle, parent, block, hole);
            self.drop_leaf(handle, leaf);
        }
        self.unmapped(index, count);
        Step::On
    }

    fn writable_for(
        &mut self,
        index: u32,
        block: VolumeBlock,
        level: u8,
    ) -> Result<crate::nodes::cache::FrameId, Step> {
        let handle = self.requests[index].volume;
        match self.make_writable(handle, block, level) {
            Path::Writable(node) => Ok(node),
            Path::Absent(missing) => {
                self.wait_for_node(missing, Work::Request(index));
                Err(Step::Parked)
            }
            Path::Wait => Err(self.park(index)),
            Path::Full => Err(Step::Failed(IoStatus::NoSpace)),
        }
    }

    fn unmapped(&mut self, index: u32, blocks: u64) {
        let (handle, first, ..) = self.position(index);
        let now = match self.requests[index].kind {
            IoKind::Discard => Mapped::Sparse,
            _ => Mapped::Zeroed,
        };
        if !planted::is(Bug::DiscardNotJournaled) {
            self.note_change(handle, Change { first, count: blocks, now });
        }
        let round = self.volume(handle).next_round;
        let request = &mut self.requests[index];
        request.commit_round = request.commit_round.max(round);
        self.consume(index, blocks * BLOCK_SIZE);
    }
}
