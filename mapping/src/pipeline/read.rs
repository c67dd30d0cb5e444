//! Reads: holes are zeroes without I/O; the rest is one I/O for each physically contiguous run.

use bessel_reactor::device::Device;
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr, VolumeBlock};

use super::{BOUNCE_BYTES, IO_BYTES_MAX, Piece, PieceKind, Step, copy_to_guest, for_each_part};
use crate::format::{EntryKind, NODE_ENTRIES};
use crate::nodes::cache::FrameId;
use crate::radix::Located;
use crate::shard::{Shard, TokenKind};

impl<D: Device> Shard<D> {
    /// Starts the read of the next run of the request.
    pub(super) fn read_step(&mut self, index: u32) -> Step {
        let (_, block, offset, left) = self.position(index);
        let Some(located) = self.locate_or_park(index, block) else { return Step::Parked };
        let (frame, slot) = match located {
            Located::Leaf { frame, slot, .. } => (frame, slot),
            Located::Hole { blocks } => return self.read_zeroes(index, blocks, offset, left),
            Located::Absent(_) => unreachable!("absent nodes park the request"),
        };
        // No run is longer than the request.
        let blocks_max = (offset as u64 + left).div_ceil(BLOCK_SIZE);
        let end = NODE_ENTRIES.min(slot + blocks_max as usize);
        let entries = self.cache.entries(frame);
        if entries[slot].kind() == EntryKind::Data {
            let home = entries[slot].block();
            let blocks = self.adjacent_data(frame, slot, end);
            let bytes = left.min(blocks * BLOCK_SIZE - offset as u64).min(io_bytes_max(offset));
            return self.start_read(index, block, home, offset, bytes as usize);
        }
        let hole = entries[slot..end].iter().take_while(|entry| entry.is_hole()).count();
        self.read_zeroes(index, hole as u64, offset, left)
    }

    /// Blocks from `slot` on that are data and lie one after the other in the store.
    pub(super) fn adjacent_data(&self, frame: FrameId, slot: usize, end: usize) -> u64 {
        let entries = self.cache.entries(frame);
        let home = entries[slot].block().get();
        let adjacent = entries[slot..end].iter().zip(home..).take_while(|(entry, expected)| {
            entry.kind() == EntryKind::Data && entry.block().get() == *expected
        });
        adjacent.count() as u64
    }

    fn read_zeroes(&mut self, index: u32, blocks: u64, offset: usize, left: u64) -> Step {
        let bytes = left.min(blocks * BLOCK_SIZE - offset as u64);
        let segments = &self.segments[index as usize];
        let place = self.requests[index].place;
        for_each_part(segments, place, bytes as usize, |part| part.zero());
        self.consume(index, bytes);
        Step::On
    }

    fn start_read(
        &mut self,
        index: u32,
        first: VolumeBlock,
        home: BlockAddr,
        offset: usize,
        wanted: usize,
    ) -> Step {
        if !self.may_begin_piece(index) {
            return self.park(index);
        }
        let place = self.requests[index].place;
        let aligned = (offset | wanted) & (self.offset_alignment - 1) == 0;
        let gathered = if aligned { self.gather(index, wanted, offset) } else { None };
        let (bytes, bounce) = match gathered {
            Some(bytes) => (bytes, None),
            None => {
                let Some(bounce) = self.take_bounce(index) else { return self.park(index) };
                (wanted.min(BOUNCE_BYTES - offset), Some(bounce))
            }
        };
        let count = (offset + bytes).div_ceil(BLOCK_SIZE as usize);
        let piece = Piece {
            request: index,
            kind: PieceKind::Read,
            first,
            count: count as u32,
            home,
            offset,
            bytes,
            place,
            bounce,
        };
        // A bounced read takes whole blocks: whatever the device's alignment, they satisfy it.
        let from = match &piece.bounce {
            Some(bounce) => {
                let whole = self.bounces.lend(bounce).part(0, count * BLOCK_SIZE as usize);
                if !self.keeps_data {
                    whole.zero(); // Else the guest would get what another one's request has left there.
                }
                self.scratch.clear();
                self.scratch.push(whole);
                home.offset()
            }
            None => home.offset().add(offset as u64),
        };
        let token = TokenKind::Piece.token(self.begin_piece(piece));
        self.device.read(token, from, &self.scratch);
        self.consume(index, bytes as u64);
        Step::On
    }

    pub(super) fn read_completed(&mut self, index: u32) {
        let piece = &self.pieces[index];
        if let Some(bounce) = &piece.bounce {
            let bytes = &self.bounces.bytes(bounce)[piece.offset..piece.offset + piece.bytes];
            copy_to_guest(&self.segments[piece.request as usize], piece.place, bytes);
        }
        let request = self.end_piece(index);
        self.finish_if_dispatched(request);
    }

    /// Completes the request if this was its last piece.
    pub(super) fn finish_if_dispatched(&mut self, request: u32) {
        if self.requests[request].dispatched() {
            self.finish(request);
        }
    }
}

/// Most bytes of one I/O that starts `offset` bytes into a block, so that it ends with a block.
pub(super) const fn io_bytes_max(offset: usize) -> u64 {
    IO_BYTES_MAX - offset as u64
}
