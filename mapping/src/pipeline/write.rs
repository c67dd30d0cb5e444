//! Writes: in place where the path is writable, to new blocks where it is not, merged where a
//! write covers a block in part.
//!
//! What must not be broken (DESIGN §4; the races are in `tests/crash_points.rs` and the simulator):
//! - A new home enters the tree only when its data has been written ("install on completion").
//! - A merge reads the old contents only when no write in place to that block is in flight, and
//!   under a lock that keeps every other change of the block away until it is installed. Otherwise
//!   it would write back sectors that somebody else has written and had acknowledged meanwhile.

use bessel_reactor::device::Device;
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr, VolumeBlock};

use super::read::io_bytes_max;
use super::{BOUNCE_BYTES, MergeTarget, Piece, PieceKind, Step, Work, copy_from_guest};
use crate::claims::Taken;
use crate::format::{Entry, EntryKind, NODE_ENTRIES};
use crate::journal::{Change, Mapped};
use crate::message::{BlockKind, BlockRun};
use crate::nodes::cache::FrameId;
use crate::planted::{self, Bug};
use crate::radix::{Located, Path, slot_at};
use crate::request::{IoKind, IoStatus, VolumeHandle};
use crate::shard::{Shard, TokenKind};

/// Where the write's next block is, and how much of it the write covers.
#[derive(Clone, Copy)]
struct Target {
    block: VolumeBlock,
    offset: usize,
    left: u64,
}

impl Target {
    fn covers_block(&self) -> bool {
        self.offset == 0 && self.left >= BLOCK_SIZE
    }

    /// Bytes of the write in its first block.
    fn bytes_in_block(&self) -> usize {
        self.left.min(BLOCK_SIZE - self.offset as u64) as usize
    }
}

impl<D: Device> Shard<D> {
    /// Starts the write of the next run of the request.
    pub(super) fn write_step(&mut self, index: u32) -> Step {
        if !self.may_begin_piece(index) {
            return self.park(index);
        }
        let (handle, block, offset, mut left) = self.position(index);
        if self.requests[index].kind == IoKind::WriteZeroes {
            left = left.min(BLOCK_SIZE - offset as u64); // An edge; whole blocks are unmapped.
        }
        let target = Target { block, offset, left };
        let Some(located) = self.locate_or_park(index, block) else { return Step::Parked };
        if self.volume(handle).is_locked(block, 1) && !planted::is(Bug::WritesIgnoreLocks) {
            return self.park(index);
        }
        match located {
            Located::Leaf { frame, slot, writable } => {
                let entry = self.cache.entries(frame)[slot];
                if writable && entry.kind() == EntryKind::Data && !entry.read_only() {
                    self.overwrite(index, target, frame, slot)
                } else if target.covers_block() {
                    let blocks = self.blocks_to_allocate(handle, target, frame, slot, writable);
                    self.allocate(index, target, blocks)
                } else {
                    let old = (entry.kind() == EntryKind::Data
                        && !planted::is(Bug::MergeForgetsOld))
                    .then(|| entry.block());
                    let old = match planted::is(Bug::MergeFromSnapshot) {
                        true => self.block_in_last_snapshot(handle, block).or(old),
                        false => old,
                    };
                    self.merge_into_new(index, target, old)
                }
            }
            Located::Hole { .. } if target.covers_block() => {
                let in_leaf = (NODE_ENTRIES - slot_at(block, 1)) as u64;
                let blocks = self.unlocked(handle, block, in_leaf.min(left / BLOCK_SIZE));
                self.allocate(index, target, blocks)
            }
            Located::Hole { .. } => self.merge_into_new(index, target, None),
            Located::Absent(_) => unreachable!("absent nodes park the request"),
        }
    }

    /// Starts a write in place of as many adjacent blocks as the write and the leaf have.
    fn overwrite(&mut self, index: u32, target: Target, leaf: FrameId, slot: usize) -> Step {
        let handle = self.requests[index].volume;
        // The block may have been installed by a write whose commit is still under way.
        let change_round = self.cache.frame(leaf).change_round;
        let request = &mut self.requests[index];
        if !planted::is(Bug::UncommittedOverwritten) {
            request.commit_round = request.commit_round.max(change_round);
        }
        let home = self.cache.entries(leaf)[slot].block();
        let covered = (target.offset as u64 + target.left).div_ceil(BLOCK_SIZE);
        let end = NODE_ENTRIES.min(slot + covered as usize);
        let entries = self.cache.entries(leaf);
        let in_place = entries[slot..end].iter().zip(home.get()..).take_while(|(entry, at)| {
            entry.kind() == EntryKind::Data && !entry.read_only() && entry.block().get() == *at
        });
        let blocks = self.unlocked(handle, target.block, in_place.count() as u64);
        let wanted = target.left.min(blocks * BLOCK_SIZE - target.offset as u64);
        let mut wanted = wanted.min(io_bytes_max(target.offset)) as usize;
        if (target.offset | wanted) & (self.offset_alignment - 1) != 0 {
            // The device cannot write part of a block: whole blocks first, then the rest merged.
            let whole = wanted & !(BLOCK_SIZE as usize - 1);
            if target.offset != 0 || whole == 0 {
                return self.merge_in_place(index, target, home);
            }
            wanted = whole;
        }
        self.start_write(index, target, PieceKind::WriteInPlace, home, wanted)
    }

    /// Whole blocks from `slot` on that the write covers, that need a new home, and that nobody
    /// else is giving one.
    fn blocks_to_allocate(
        &self,
        handle: VolumeHandle,
        target: Target,
        leaf: FrameId,
        slot: usize,
        writable: bool,
    ) -> u64 {
        let end = NODE_ENTRIES.min(slot + (target.left / BLOCK_SIZE) as usize);
        let entries = &self.cache.entries(leaf)[slot..end];
        let homeless = entries.iter().take_while(|entry| {
            !(writable && entry.kind() == EntryKind::Data && !entry.read_only())
        });
        self.unlocked(handle, target.block, homeless.count() as u64)
    }

    /// How many of `blocks` blocks nobody holds, from an unlocked first one on.
    fn unlocked(&self, handle: VolumeHandle, first: VolumeBlock, blocks: u64) -> u64 {
        let volume = self.volume(handle);
        if volume.locks.is_empty() {
            return blocks;
        }
        let free = (1..blocks).take_while(|at| !volume.is_locked(first.add(*at), 1));
        1 + free.count() as u64
    }

    /// Starts the write of up to `blocks` whole blocks to new homes.
    fn allocate(&mut self, index: u32, target: Target, blocks: u64) -> Step {
        let wanted = (blocks * BLOCK_SIZE).min(io_bytes_max(0));
        let run = match self.take_blocks(BlockKind::Data, (wanted / BLOCK_SIZE) as u32) {
            Taken::Run(run) => run,
            Taken::Wait => return self.park(index),
            Taken::Full => return Step::Failed(IoStatus::NoSpace),
        };
        let wanted = run.count as usize * BLOCK_SIZE as usize;
        self.start_write(index, target, PieceKind::Allocate, run.start, wanted)
    }

    /// Starts a write of up to `wanted` bytes from guest memory to `home`. What it has taken from
    /// the claims and does not use goes back.
    fn start_write(
        &mut self,
        index: u32,
        target: Target,
        kind: PieceKind,
        home: BlockAddr,
        wanted: usize,
    ) -> Step {
        let place = self.requests[index].place;
        let zeroes = self.requests[index].kind == IoKind::WriteZeroes;
        let gathered = if zeroes { None } else { self.gather(index, wanted, target.offset) };
        let bytes = gathered.unwrap_or(wanted.min(BOUNCE_BYTES - target.offset));
        let count = (target.offset + bytes).div_ceil(BLOCK_SIZE as usize) as u32;
        let bounce = match gathered {
            Some(_) => None,
            None => {
                let bounce = self.filled_bounce(index, bytes, zeroes);
                if bounce.is_none() {
                    self.return_unused(kind, home, 0, wanted);
                    return self.park(index);
                }
                bounce
            }
        };
        self.return_unused(kind, home, count, wanted);
        let piece = Piece {
            request: index,
            kind,
            first: target.block,
            count,
            home,
            offset: target.offset,
            bytes,
            place,
            bounce,
        };
        let from = home.offset().add(target.offset as u64);
        let piece_index = self.begin_piece(piece);
        if kind == PieceKind::Allocate {
            let handle = self.requests[index].volume;
            self.volume_mut(handle).lock(target.block, u64::from(count), piece_index);
            self.note_data_allocated(handle, count);
        } else {
            let handle = self.requests[index].volume;
            self.volume_mut(handle).overwrites += 1;
        }
        self.device.write(TokenKind::Piece.token(piece_index), from, &self.scratch);
        self.consume(index, bytes as u64);
        if planted::is(Bug::InstalledAtSubmission) && kind == PieceKind::Allocate {
            let handle = self.requests[index].volume;
            if let Path::Writable(leaf) = self.make_writable(handle, target.block, 1) {
                for at in 0..u64::from(count) {
                    self.set_entry(handle, leaf, target.block.add(at), Entry::data(home.add(at)));
                }
            }
        }
        Step::On
    }

    fn note_data_allocated(&mut self, handle: VolumeHandle, count: u32) {
        let volume = self.volume_mut(handle);
        volume.counters.data_allocated += u64::from(count);
        volume.record.blocks_allocated += u64::from(count);
    }

    /// A bounce buffer with `bytes` of the request in it, and `scratch` naming them.
    fn filled_bounce(
        &mut self,
        index: u32,
        bytes: usize,
        zeroes: bool,
    ) -> Option<bessel_reactor::buffer::Buffer> {
        let mut bounce = self.take_bounce(index)?;
        let target = &mut self.bounces.bytes_mut(&mut bounce)[..bytes];
        if zeroes {
            target.fill(0);
        } else {
            copy_from_guest(&self.segments[index as usize], self.requests[index].place, target);
        }
        let segment = self.bounces.lend(&bounce).part(0, bytes);
        self.scratch.clear();
        self.scratch.push(segment);
        Some(bounce)
    }

    /// Gives back the blocks of an allocation behind the first `count`.
    fn return_unused(&mut self, kind: PieceKind, home: BlockAddr, count: u32, wanted: usize) {
        let unused = (wanted / BLOCK_SIZE as usize) as u32 - count.min((wanted / 4096) as u32);
        if kind == PieceKind::Allocate && unused > 0 {
            let too_many = u32::from(planted::is(Bug::ReturnsBlockInUse)).min(count);
            let (count, unused) = (count - too_many, unused + too_many);
            let run = BlockRun { start: home.add(u64::from(count)), count: unused };
            self.claims.put_first(BlockKind::Data, run);
        }
    }

    /// Writes part of a block that has no home of its own: the rest comes from `old`, or is zero.
    fn merge_into_new(&mut self, index: u32, target: Target, old: Option<BlockAddr>) -> Step {
        if self.overwrites_in_flight(index, target.block) {
            return self.park(index);
        }
        if let Some(old) = old
            && !self.visitors_have_left(index, old)
        {
            return self.park(index);
        }
        if !self.may_bounce(index) {
            return self.park(index);
        }
        let home = match self.take_blocks(BlockKind::Data, 1) {
            Taken::Run(run) => run.start,
            Taken::Wait => return self.park(index),
            Taken::Full => return Step::Failed(IoStatus::NoSpace),
        };
        self.note_data_allocated(self.requests[index].volume, 1);
        self.start_merge(index, target, MergeTarget::NewHome(home), old);
        Step::On
    }

    /// Writes part of a block in place on a device that writes whole blocks only.
    fn merge_in_place(&mut self, index: u32, target: Target, home: BlockAddr) -> Step {
        if self.overwrites_in_flight(index, target.block) || !self.may_bounce(index) {
            return self.park(index);
        }
        if !self.bar_visitors(index, home) {
            return self.park(index);
        }
        self.start_merge(index, target, MergeTarget::SameHome, Some(home));
        Step::On
    }

    /// True while a write in place to the block has not landed: what a merge read now could miss it.
    fn overwrites_in_flight(&self, index: u32, block: VolumeBlock) -> bool {
        let handle = self.requests[index].volume;
        if self.volume(handle).overwrites == 0 || planted::is(Bug::MergeBeforeOverwrite) {
            return false;
        }
        self.pieces.iter().any(|piece| {
            piece.kind == PieceKind::WriteInPlace
                && piece.first <= block
                && block.get() < piece.first.get() + u64::from(piece.count)
                && self.requests[piece.request].volume == handle
        })
    }

    fn start_merge(
        &mut self,
        index: u32,
        target: Target,
        merge: MergeTarget,
        old: Option<BlockAddr>,
    ) {
        let bounce = self.take_bounce(index).expect("checked by the caller");
        let whole = self.bounces.lend(&bounce).part(0, BLOCK_SIZE as usize);
        let bytes = target.bytes_in_block();
        let home = old.unwrap_or_default();
        let piece = self.begin_piece(Piece {
            request: index,
            kind: PieceKind::MergeRead { target: merge },
            first: target.block,
            count: 1,
            home,
            offset: target.offset,
            bytes,
            place: self.requests[index].place,
            bounce: Some(bounce),
        });
        let handle = self.requests[index].volume;
        self.volume_mut(handle).lock(target.block, 1, piece);
        self.consume(index, bytes as u64);
        match old {
            Some(old) => {
                self.device.read(TokenKind::Piece.token(piece), old.offset(), &[whole]);
            }
            None => {
                whole.zero();
                self.piece_completed(piece, Ok(()));
            }
        }
    }

    /// The old contents are in the bounce buffer: puts the new bytes over them and writes.
    pub(super) fn merge(&mut self, index: u32, target: MergeTarget) {
        let piece = &mut self.pieces[index];
        let (kind, home) = match target {
            MergeTarget::NewHome(home) => (PieceKind::Allocate, home),
            MergeTarget::SameHome => (PieceKind::Rewrite, piece.home),
        };
        piece.kind = kind;
        piece.home = home;
        let (request, place) = (piece.request, piece.place);
        let range = piece.offset..piece.offset + piece.bytes;
        let bounce = piece.bounce.as_mut().expect("a merge has a bounce buffer");
        let bytes = &mut self.bounces.bytes_mut(bounce)[range];
        if self.requests[request].kind == IoKind::WriteZeroes {
            bytes.fill(0);
        } else {
            copy_from_guest(&self.segments[request as usize], place, bytes);
        }
        let whole = self.bounces.lend(bounce).part(0, BLOCK_SIZE as usize);
        self.device.write(TokenKind::Piece.token(index), home.offset(), &[whole]);
    }

    /// A write in place has landed.
    pub(super) fn overwrite_completed(&mut self, index: u32) {
        self.note_data_written(index);
        let request = self.end_piece(index);
        if !planted::is(Bug::OverwriteNotFlushed) {
            self.requests[request].flush_mark = Some(self.flusher.mark());
        }
        self.finish_if_dispatched(request);
    }

    /// The data of an allocating write is on the device: its mapping enters the tree. Runs again
    /// from here when it had to wait.
    pub(super) fn install(&mut self, index: u32) {
        let piece = &self.pieces[index];
        let (first, count, home) = (piece.first, piece.count, piece.home);
        let handle = self.requests[piece.request].volume;
        if self.volume(handle).latched.is_some() {
            self.abandon(index, IoStatus::Failed);
            return;
        }
        let leaf = match self.make_writable(handle, first, 1) {
            Path::Writable(leaf) => leaf,
            Path::Absent(missing) => {
                self.wait_for_node(missing, Work::Piece(index));
                return;
            }
            Path::Wait => {
                self.parked.push(Work::Piece(index));
                return;
            }
            Path::Full => {
                self.abandon(index, IoStatus::NoSpace);
                return;
            }
        };
        let now = Mapped::Data(home);
        self.note_change(handle, Change { first, count: u64::from(count), now });
        let slot = slot_at(first, 1);
        for at in 0..count as usize {
            let entry = Entry::data(home.add(at as u64));
            if planted::is(Bug::InstalledAtSubmission)
                && self.cache.entries(leaf)[slot + at].untagged() == entry
            {
                continue;
            }
            self.set_entry(handle, leaf, first.add(at as u64), entry);
        }
        let before = u64::from(planted::is(Bug::InstalledInRoundBefore));
        let round = self.volume(handle).next_round - before;
        let request = self.end_piece(index);
        let waiting = &mut self.requests[request];
        waiting.commit_round = waiting.commit_round.max(round);
        self.finish_if_dispatched(request);
    }
}
