//! Copy on write: making the path from the root to a node writable, and changing entries.

use bessel_reactor::device::Device;
use bessel_reactor::units::{BlockAddr, VolumeBlock};

use super::lookup::Missing;
use super::{slot_at, slot_span};
use crate::claims::Taken;
use crate::format::{Entry, EntryKind};
use crate::message::{BlockKind, BlockRun};
use crate::nodes::cache::{FrameId, FrameState};
use crate::planted::{self, Bug};
use crate::request::VolumeHandle;
use crate::shard::{RELEASES_PER_STEP, Shard};
use crate::volume::Unlinked;

/// Nodes that one change may make dirty: a path of four levels, and a new root above it.
const DIRTY_PER_CHANGE: usize = 5;

/// How far a writable path has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Path {
    /// This node may be changed.
    Writable(FrameId),
    /// A node must be read first.
    Absent(Missing),
    /// Frames, blocks, or room for changes are lacking for the moment.
    Wait,
    /// The store has no metadata block left.
    Full,
}

impl<D: Device> Shard<D> {
    /// Makes the path from the root down to the node of `level` above `block` writable: read-only
    /// nodes are copied, holes become nodes. Each step leaves a tree that reads the same, so it can
    /// stop and be called again.
    pub(crate) fn make_writable(
        &mut self,
        handle: VolumeHandle,
        block: VolumeBlock,
        level: u8,
    ) -> Path {
        if !self.has_room_for_changes(handle) {
            return Path::Wait;
        }
        let mut frame = self.volume(handle).root;
        let mut at = self.cache.frame(frame).level;
        while at > level {
            let slot = slot_at(block, at);
            let entry = self.cache.entries(frame)[slot];
            at -= 1;
            let step = match entry.kind() {
                EntryKind::Node(_) => match self.cache.find_present(entry.block(), at) {
                    Some(child) if entry.read_only() => self.copy_node(handle, frame, block, child),
                    Some(child) if self.cache.may_belong_to(child, frame) => Path::Writable(child),
                    _ => {
                        let addr = entry.block();
                        return Path::Absent(Missing { addr, level: at, parent: Some(frame) });
                    }
                },
                _ => self.new_node(handle, frame, block, at, entry.untagged()),
            };
            match step {
                Path::Writable(child) => {
                    self.cache.touch(child);
                    frame = child;
                }
                other => return other,
            }
        }
        Path::Writable(frame)
    }

    /// False, with a commit on its way, when too much is changed and not yet on the device.
    fn has_room_for_changes(&mut self, handle: VolumeHandle) -> bool {
        if self.volume(handle).dirty.len() + DIRTY_PER_CHANGE > self.dirty_max {
            self.want_commit(handle);
            return false;
        }
        if self.journal_is_full() || self.dirty_nodes + DIRTY_PER_CHANGE > self.dirty_nodes_max {
            self.want_all_commits();
            return false;
        }
        true
    }

    /// Copies read-only `child` and links the copy, writable, into `parent`, where that leads to `block`.
    /// All links of the copy are read-only: what they lead to is shared (Parallax 3.3.2).
    fn copy_node(
        &mut self,
        handle: VolumeHandle,
        parent: FrameId,
        block: VolumeBlock,
        child: FrameId,
    ) -> Path {
        let level = self.cache.frame(child).level;
        self.cache.pin(child);
        let made = self.new_frame(level, Some(parent));
        self.cache.unpin(child);
        let Path::Writable(copy) = made else { return made };
        self.fill_read_only(copy, child);
        self.link_fresh(handle, parent, block, copy);
        Path::Writable(copy)
    }

    /// Fills a node with the entries of another, all read-only, sealed for their new place.
    pub(crate) fn fill_read_only(&mut self, target: FrameId, source: FrameId) {
        let (from, to) = (self.cache.frame(source).addr, self.cache.frame(target).addr);
        let stays_writable = match self.cache.frame(target).level {
            1 => planted::is(Bug::CopiedLeafWritable),
            _ => planted::is(Bug::CopiedNodeWritable),
        };
        let key = self.key;
        let (source, target) = self.cache.entries_of_two(source, target);
        if stays_writable {
            for (slot, entry) in source.iter().enumerate() {
                target[slot] = key.seal(*entry, to, slot);
            }
            return;
        }
        key.copy_read_only(source, from, target, to);
    }

    /// Makes a node of holes and links it into `parent`, where that leads to `block`.
    fn new_node(
        &mut self,
        handle: VolumeHandle,
        parent: FrameId,
        block: VolumeBlock,
        level: u8,
        hole: Entry,
    ) -> Path {
        assert!(hole.is_hole(), "only a hole becomes a node, not {hole:?}");
        let made = self.new_frame(level, Some(parent));
        let Path::Writable(node) = made else { return made };
        self.fill_with(node, hole);
        self.link_fresh(handle, parent, block, node);
        made
    }

    /// Fills a node with one entry, sealed for each slot.
    pub(crate) fn fill_with(&mut self, target: FrameId, entry: Entry) {
        let addr = self.cache.frame(target).addr;
        let key = self.key;
        for (slot, place) in self.cache.entries_mut(target).iter_mut().enumerate() {
            *place = key.seal(entry, addr, slot);
        }
    }

    /// A frame with a new block for a node of `level`; its entries are still to be filled in.
    pub(crate) fn new_frame(&mut self, level: u8, parent: Option<FrameId>) -> Path {
        let run = loop {
            match self.take_blocks(BlockKind::Metadata, 1) {
                // A tree reaches it: the bitmap lost its bit, or two links to it were unlinked. Who
                // reaches it keeps it.
                Taken::Run(run) if self.cache.find(run.start).is_some() => {
                    self.note_double_use(run.start);
                }
                Taken::Run(run) => break run,
                Taken::Wait => return Path::Wait,
                Taken::Full => return Path::Full,
            }
        };
        let Some(frame) = self.cache.insert(run.start, level, parent) else {
            self.claims.put(BlockKind::Metadata, run);
            self.want_all_commits(); // Only nodes that are on the device can make room.
            return Path::Wait;
        };
        let made = self.cache.frame_mut(frame);
        made.state = FrameState::Present;
        made.fresh = true;
        Path::Writable(frame)
    }

    fn link_fresh(
        &mut self,
        handle: VolumeHandle,
        parent: FrameId,
        block: VolumeBlock,
        child: FrameId,
    ) {
        let (level, addr) = (self.cache.frame(child).level, self.cache.frame(child).addr);
        let volume = self.volume_mut(handle);
        volume.counters.nodes_allocated += 1;
        volume.record.blocks_allocated += 1;
        if !planted::is(Bug::FreshNodeNotDirty) {
            self.mark_dirty(handle, child);
        }
        self.set_entry(handle, parent, block, Entry::node(level, addr));
    }

    /// Changes the entry of a writable node that leads to `block`. Data that only this volume reached is
    /// unlinked.
    pub(crate) fn set_entry(
        &mut self,
        handle: VolumeHandle,
        frame: FrameId,
        block: VolumeBlock,
        entry: Entry,
    ) {
        let (addr, level) = (self.cache.frame(frame).addr, self.cache.frame(frame).level);
        let slot = slot_at(block, level);
        let sealed = self.key.seal(entry, addr, slot);
        let old = std::mem::replace(&mut self.cache.entries_mut(frame)[slot], sealed);
        // Visitors see it before what was there comes free.
        if let Some(shared) = &self.volume(handle).shared {
            if level == 1 {
                shared.volume.set(block, entry);
            } else if entry.is_hole() {
                let span = slot_span(level);
                shared.volume.forget(VolumeBlock::new(block.get() / span * span), span);
            }
        }
        if old.kind() == EntryKind::Data && (!old.read_only() || planted::is(Bug::FreesSharedData))
        {
            self.volume_mut(handle).unlink_block(BlockKind::Data, old.block());
            self.watch_visitors(handle);
        }
        self.mark_dirty(handle, frame);
    }

    /// Notes that a node has changed; the volume's next round writes it.
    pub(crate) fn mark_dirty(&mut self, handle: VolumeHandle, frame: FrameId) {
        let now = self.now;
        let volume = self.volumes[handle.0 as usize].as_mut().expect("the volume is open");
        let changed = self.cache.frame_mut(frame);
        changed.change_round = volume.next_round;
        if !changed.dirty {
            changed.dirty = true;
            volume.dirty.push(frame);
            self.dirty_nodes += 1;
        }
        if volume.dirty_since.is_none() {
            volume.dirty_since = Some(now);
            self.background_due(now);
        }
    }

    /// Takes a leaf that only this volume reaches out of the tree: nothing below it is left.
    pub(crate) fn drop_leaf(&mut self, handle: VolumeHandle, leaf: FrameId) {
        let frame = self.cache.frame_mut(leaf);
        let addr = frame.addr;
        if std::mem::replace(&mut frame.dropped, true) {
            // A damaged tree links to it twice. It is freed once.
            return self.note_double_use(addr);
        }
        self.volume_mut(handle).unlink_block(BlockKind::Metadata, addr);
        self.watch_visitors(handle);
    }

    /// Puts blocks back that were used, and that nothing refers to any more.
    pub(crate) fn give_back(&mut self, kind: BlockKind, run: BlockRun) {
        if kind == BlockKind::Metadata && self.claims.hold(run) {
            return;
        }
        self.device.retire(run.start, u64::from(run.count));
        self.claims.put(kind, run);
    }

    /// Hands unlinked blocks back to the claims, as far as nobody can still use them: so many in a turn, the
    /// rest in the next ones.
    pub(crate) fn release_unlinked(&mut self, handle: VolumeHandle) {
        let oldest = self.oldest_stamp(handle);
        self.release_unlinked_before(handle, oldest);
    }

    /// The same, when the stamp of the volume's oldest request is known.
    pub(crate) fn release_unlinked_before(&mut self, handle: VolumeHandle, oldest: Option<u64>) {
        let (turn, most) = (self.turn, self.steps_per_turn.saturating_mul(RELEASES_PER_STEP));
        while self.volume(handle).releases.taken(turn) < most || planted::is(Bug::StepsUnbounded) {
            let volume = self.volume_mut(handle);
            let Some(unlinked) = volume.release(oldest) else { return };
            let count = if unlinked.kind == BlockKind::Data { 1 } else { unlinked.run.count };
            volume.releases.take(turn, count);
            self.release(unlinked);
        }
        if !std::mem::replace(&mut self.volume_mut(handle).releasing, true) {
            self.releasing.push(handle);
        }
    }

    /// The same, all of them at once.
    pub(crate) fn release_all_unlinked(&mut self, handle: VolumeHandle) {
        let oldest = self.oldest_stamp(handle);
        while let Some(unlinked) = self.volume_mut(handle).release(oldest) {
            self.release(unlinked);
        }
    }

    fn release(&mut self, unlinked: Unlinked) {
        match unlinked.kind {
            BlockKind::Data => self.give_back(BlockKind::Data, unlinked.run),
            BlockKind::Metadata => self.release_nodes(unlinked.run),
        }
        self.released = true;
    }

    /// Goes on with what was left in the turn before, as far as this one's share still goes.
    pub(crate) fn release_more(&mut self) {
        for _ in 0..self.releasing.len() {
            let handle = self.releasing.remove(0);
            self.volume_mut(handle).releasing = false;
            self.release_unlinked(handle);
            // Whoever waits for blocks hears of it, also when no more came.
            self.released = true;
        }
    }

    /// Frees the blocks of nodes, and removes their frames, so that their addresses can get new ones.
    fn release_nodes(&mut self, run: BlockRun) {
        for index in 0..u64::from(run.count) {
            let start: BlockAddr = run.start.add(index);
            match self.cache.find(start) {
                // A tree reaches it: a damaged one had a second link to it, and this is its end.
                Some(frame) if !self.cache.frame(frame).dropped => {
                    self.note_double_use(start);
                    continue;
                }
                Some(frame) => self.cache.remove(frame),
                None => {}
            }
            self.give_back(BlockKind::Metadata, BlockRun { start, count: 1 });
        }
    }

    /// Tells that a node's block was free and in use at once: the store is damaged. The block leaks.
    fn note_double_use(&mut self, block: BlockAddr) {
        self.double_uses += 1;
        if self.may_log() {
            tracing::error!(
                "the block of radix node {block} is free and in use at once; run `bessel check`"
            );
        }
    }
}
