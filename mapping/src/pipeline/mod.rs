//! A request's life: `lookup → (load nodes) → (allocate) → data I/O → install → (commit) →
//! complete` (DESIGN §4).
//!
//! A request is cut into *pieces*, each one I/O over physically contiguous blocks; holes and
//! unmapping need no piece. A step that cannot go on parks its context, on the node it needs or on
//! "something was released", and is run again from its start: until a step can finish it changes
//! nothing that running it again would change twice.
//!
//! What must not be broken:
//! - A context is in one place: running, parked once, broken off until the next turn, or waiting for its
//!   pieces.
//! - A piece holds its lock from before it reads old contents until its mapping is installed.
//! - Waiting pieces wait for I/O, memory or blocks, never for another piece's lock.

mod flush;
mod read;
mod unmap;
mod write;

pub(crate) use unmap::Cover;

use bessel_reactor::buffer::{Buffer, Segment};
use bessel_reactor::device::{Device, DeviceError, SEGMENTS_MAX};
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr, SECTOR_SIZE, Sector, VolumeBlock};

use crate::message::{Forwarded, Message};
use crate::nodes::cache::{FrameId, FrameState};
use crate::planted::{self, Bug};
use crate::radix::{KnownLeaf, Located};
use crate::request::{Busy, CacheMode, IoCompletion, IoKind, IoRequest, IoStatus, VolumeHandle};
use crate::shard::{Shard, TokenKind};
use crate::slab::may_have;
use crate::volume::{NO_REQUEST, Volume};

/// Most bytes in one device I/O.
pub(crate) const IO_BYTES_MAX: u64 = 1 << 20;
/// Bytes in a bounce buffer: what one unaligned piece carries.
pub(crate) const BOUNCE_BYTES: usize = 64 << 10;
/// Requests of visitors that are begun in a turn.
const FORWARDED_PER_TURN: usize = 64;

/// Something to be run, now or when what it waits for is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Work {
    /// Go on with a guest's request.
    Request(u32),
    /// Install the mapping of a piece whose data is written.
    Piece(u32),
    /// Try the command with this ticket again.
    Command(u64),
}

/// A guest's request, in its slot until it is complete.
#[derive(Debug)]
pub(crate) struct Request {
    tag: u64,
    /// The shard that has it from its guest, and what it is called there, if that is not this one.
    asker: Option<(usize, u32)>,
    pub(crate) volume: VolumeHandle,
    kind: IoKind,
    first: Sector,
    sectors: u64,
    /// Sectors whose I/O has been started, or that needed none.
    started: u64,
    /// Where the next byte of guest memory is.
    place: GuestPlace,
    /// The leaf of its first block, found when it came.
    leaf: KnownLeaf,
    pieces: u32,
    parked: bool,
    status: IoStatus,
    /// The request's number in its volume.
    pub(crate) stamp: u64,
    previous: u32,
    next: u32,
    /// It is durable once this round is.
    pub(crate) commit_round: u64,
    /// And once a flush covers this mark.
    flush_mark: Option<u64>,
    /// A merge of what lies here waits for the writes in place of visitors up to this stamp.
    pub(crate) awaits_visitors: Option<(BlockAddr, u64)>,
    /// It forbids visitors to write in place.
    pub(crate) bars: bool,
}

/// A position in a request's guest memory.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct GuestPlace {
    segment: usize,
    offset: usize,
}

/// One I/O of a request.
#[derive(Debug)]
pub(crate) struct Piece {
    request: u32,
    kind: PieceKind,
    /// The blocks of the volume it covers, all below one leaf.
    first: VolumeBlock,
    count: u32,
    /// Where they lie, or will lie, in the store.
    home: BlockAddr,
    /// Bytes of the request in it, from `offset` in the first block on.
    offset: usize,
    bytes: usize,
    /// Where the request's bytes start in guest memory.
    place: GuestPlace,
    bounce: Option<Buffer>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum PieceKind {
    Read,
    /// Overwrites blocks that are this volume's alone.
    WriteInPlace,
    /// Writes a merged block back to where it was. Holds a lock.
    Rewrite,
    /// Writes whole blocks, or merged ones, to new homes. Holds a lock.
    Allocate,
    /// Reads the block that the write covers in part. Holds a lock.
    MergeRead {
        target: MergeTarget,
    },
}

/// Where a merged block goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum MergeTarget {
    /// To this new home.
    NewHome(BlockAddr),
    /// Back: the device cannot write less than a block.
    SameHome,
}

/// Work that waits for a node to be read as one of this level.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct WaitingOnNode {
    frame: FrameId,
    level: u8,
    work: Work,
}

/// What became of one step of a request.
enum Step {
    /// Go on with the next.
    On,
    /// It will be run again.
    Parked,
    /// The request ends with this status.
    Failed(IoStatus),
}

impl Piece {
    /// Its request, if it merges a block into the place that it has.
    pub(crate) fn merges_in_place(&self) -> Option<u32> {
        let in_place = matches!(
            self.kind,
            PieceKind::Rewrite | PieceKind::MergeRead { target: MergeTarget::SameHome }
        );
        in_place.then_some(self.request)
    }
}

impl Request {
    fn left_bytes(&self) -> u64 {
        (self.sectors - self.started) * SECTOR_SIZE
    }

    fn next_sector(&self) -> Sector {
        self.first.add(self.started)
    }

    fn dispatched(&self) -> bool {
        self.started == self.sectors || self.status != IoStatus::Done
    }

    /// What it asks for, for which shard, if another has it from its guest.
    pub(crate) fn kind(&self) -> IoKind {
        self.kind
    }

    pub(crate) fn status(&self) -> IoStatus {
        self.status
    }

    /// Its first and its last block. It has sectors.
    pub(crate) fn blocks(&self) -> (VolumeBlock, VolumeBlock) {
        (self.first.block(), self.first.add(self.sectors - 1).block())
    }
}

impl<D: Device> Shard<D> {
    /// Takes a guest's request. Its end comes out of [`Shard::pop_completion`], also when it is
    /// refused. Hot path.
    ///
    /// # Errors
    /// [`Busy`] when every context is in use, or as many as one volume may have of them; nothing was taken.
    pub fn submit(&mut self, request: &IoRequest<'_>) -> Result<(), Busy> {
        if let Some(visit) = request.volume.visit() {
            return self.submit_visit(visit, request);
        }
        if !self.forwarded.is_empty() && self.requests.available() <= self.kept_for_visitors() {
            return Err(Busy);
        }
        match self.check(request) {
            Ok(volume) if !self.requests.has_room(|| volume.held.requests) => return Err(Busy),
            Ok(_) => self.admit(request, None),
            Err(status) => self.done.push_back(IoCompletion { tag: request.tag, status }),
        }
        Ok(())
    }

    /// Whether a request of the volume would find room, as far as a look tells.
    #[inline]
    pub fn has_room(&self, volume: VolumeHandle) -> bool {
        match volume.visit() {
            Some(visit) => self.has_room_for_visit(visit),
            None => {
                let volume = self.volumes.get(volume.0 as usize).and_then(Option::as_ref);
                volume.is_none_or(|volume| self.requests.has_room(|| volume.held.requests))
            }
        }
    }

    /// Takes the requests that visitors have sent, as far as there is room.
    pub(crate) fn admit_forwarded(&mut self) -> bool {
        let mut progress = false;
        for _ in 0..FORWARDED_PER_TURN {
            let lacking =
                planted::is(Bug::NoRoomForVisitors) && self.requests.available() <= self.kept();
            if lacking || !self.has_room_for_forwarded() {
                break;
            }
            let Some(forwarded) = self.forwarded.pop_front() else { break };
            progress = true;
            let Forwarded { from, volume, id, kind, sector, sectors, mut segments } = forwarded;
            let request = IoRequest { tag: 0, volume, kind, sector, sectors, segments: &segments };
            let found = self.volumes.get(volume.0 as usize).and_then(Option::as_ref);
            let same = found.is_some_and(|volume| volume.record.id == id);
            let checked =
                if same { self.check(&request).map(drop) } else { Err(IoStatus::Refused) };
            match checked {
                Ok(()) => {
                    self.forwarded_active += 1;
                    self.admit(&request, Some(from));
                    segments.clear();
                    self.spare_segments.push(segments);
                }
                Err(status) => {
                    segments.clear();
                    let (shard, request) = from;
                    self.outbox.push_back((shard, Message::Ended { request, status, segments }));
                }
            }
        }
        progress
    }

    /// Free slots that are for those that visitors have sent, however many come in here; none while they
    /// have what they may have.
    fn kept_for_visitors(&self) -> usize {
        if self.has_room_for_forwarded() { self.forwarded.len().min(self.kept()) } else { 0 }
    }

    /// Of the slots, how many are kept for requests of visitors while some wait, and from them.
    fn kept(&self) -> usize {
        self.requests.capacity() / 4
    }

    /// Visitors' requests, all of them together, may have as many slots as those of one volume here.
    fn has_room_for_forwarded(&self) -> bool {
        self.requests.has_room(|| self.forwarded_active)
    }

    /// Puts a request that was checked into a slot.
    fn admit(&mut self, request: &IoRequest<'_>, asker: Option<(usize, u32)>) {
        // What it needs is on its way to the processor's cache while those before it are run.
        let leaf = match request.kind {
            IoKind::Read | IoKind::Write => self.look_ahead(request.volume, request.sector.block()),
            IoKind::Flush | IoKind::Discard | IoKind::WriteZeroes => KnownLeaf::NONE,
        };
        let volume = self.volumes[request.volume.0 as usize].as_mut().expect("checked above");
        volume.last_stamp += 1;
        volume.held.requests += usize::from(asker.is_none());
        let is_flush = request.kind == IoKind::Flush;
        let index = self.requests.insert(Request {
            tag: request.tag,
            asker,
            volume: request.volume,
            kind: request.kind,
            first: request.sector,
            sectors: if is_flush { 0 } else { request.sectors },
            started: 0,
            place: GuestPlace::default(),
            leaf,
            pieces: 0,
            parked: false,
            status: IoStatus::Done,
            stamp: volume.last_stamp,
            previous: volume.active_tail,
            next: NO_REQUEST,
            commit_round: 0,
            flush_mark: None,
            awaits_visitors: None,
            bars: false,
        });
        match volume.active_tail {
            NO_REQUEST => volume.active_head = index,
            tail => self.requests[tail].next = index,
        }
        volume.active_tail = index;
        let segments = &mut self.segments[index as usize];
        segments.clear();
        segments.extend_from_slice(request.segments);
        if is_flush {
            self.note_what_a_flush_covers(index);
        }
        self.runnable.push_back(Work::Request(index));
    }

    /// Checks what the submitter vouches for only in part: places and lengths come from a guest.
    fn check(&self, request: &IoRequest<'_>) -> Result<&Volume, IoStatus> {
        let volume = self.volumes.get(request.volume.0 as usize).and_then(Option::as_ref);
        let volume = volume.filter(|volume| !volume.closing).ok_or(IoStatus::Refused)?;
        if request.kind != IoKind::Read && volume.latched.is_some() {
            return Err(IoStatus::Failed);
        }
        if request.kind == IoKind::Flush {
            return Ok(volume);
        }
        let end = request.sector.get().checked_add(request.sectors).ok_or(IoStatus::Refused)?;
        if end > volume.sectors || request.sectors == 0 {
            return Err(IoStatus::Refused);
        }
        if matches!(request.kind, IoKind::Read | IoKind::Write) {
            let total: u64 = request.segments.iter().map(|segment| segment.len() as u64).sum();
            if total != request.sectors * SECTOR_SIZE {
                return Err(IoStatus::Refused);
            }
        }
        Ok(volume)
    }

    /// Runs one piece of work.
    pub(crate) fn run(&mut self, work: Work) {
        match work {
            Work::Request(index) => {
                self.requests[index].parked = false;
                self.advance(index);
            }
            Work::Piece(index) => self.install(index),
            Work::Command(_) => self.commands_ready = true,
        }
    }

    /// The node that `work` waited for cannot be had.
    pub(crate) fn fail_work(&mut self, work: Work, why: &crate::request::CommandError) {
        match work {
            Work::Request(index) => {
                let request = &mut self.requests[index];
                request.parked = false;
                request.status = IoStatus::Failed;
                self.finish(index);
            }
            Work::Piece(index) => self.abandon(index, IoStatus::Failed),
            Work::Command(ticket) => self.fail_command(ticket, why.clone()),
        }
    }

    /// Starts as much of the request's I/O as can be started in this turn.
    fn advance(&mut self, index: u32) {
        let mut first = true;
        loop {
            let request = &self.requests[index];
            if request.dispatched() {
                self.finish(index);
                return;
            }
            let (handle, kind) = (request.volume, request.kind);
            let free = std::mem::take(&mut first) && matches!(kind, IoKind::Read | IoKind::Write);
            if !free {
                if !self.has_steps(handle) {
                    return self.break_off(handle, index);
                }
                self.take_steps(handle, 1);
            }
            let step = match kind {
                IoKind::Read => self.read_step(index),
                IoKind::Write => self.write_step(index),
                IoKind::Discard | IoKind::WriteZeroes => self.unmap_step(index),
                IoKind::Flush => unreachable!("a flush has no sectors to start"),
            };
            match step {
                Step::On => {}
                Step::Parked => {
                    self.requests[index].parked = true;
                    return;
                }
                Step::Failed(status) => self.requests[index].status = status,
            }
        }
    }

    /// Leaves the request for the next turn.
    #[cold]
    fn break_off(&mut self, handle: VolumeHandle, index: u32) {
        self.requests[index].parked = true;
        let broken_off = &mut self.volume_mut(handle).broken_off;
        broken_off.push_back(index);
        if broken_off.len() == 1 {
            self.broken_off.push_back(handle);
        }
    }

    /// Whether the volume has steps left in this turn.
    fn has_steps(&self, handle: VolumeHandle) -> bool {
        let taken = self.volume(handle).steps.taken(self.turn);
        taken < self.steps_per_turn || planted::is(Bug::StepsUnbounded)
    }

    /// Takes so many of them; the last ones may be more than are left.
    fn take_steps(&mut self, handle: VolumeHandle, count: u32) {
        let turn = self.turn;
        self.volume_mut(handle).steps.take(turn, count);
    }

    /// Goes on with the requests that ran out of steps, of each volume in the order in which they did.
    pub(crate) fn go_on(&mut self) {
        for _ in 0..self.broken_off.len() {
            let handle = self.broken_off[0];
            while let Some(index) = self.volume(handle).broken_off.front().copied()
                && self.has_steps(handle)
            {
                self.run(Work::Request(index));
                // Only now, so that the volume is in the shard's list once if it ran out again.
                self.volume_mut(handle).broken_off.pop_front();
            }
            self.broken_off.pop_front();
            if !self.volume(handle).broken_off.is_empty() {
                self.broken_off.push_back(handle);
            }
        }
    }

    /// Parks the request until something is released.
    fn park(&mut self, index: u32) -> Step {
        self.parked.push(Work::Request(index));
        Step::Parked
    }

    /// Completes the request if nothing is left to wait for.
    fn finish(&mut self, index: u32) {
        let request = &self.requests[index];
        if request.pieces > 0 || request.parked {
            return;
        }
        let handle = request.volume;
        if request.status == IoStatus::Done && request.kind != IoKind::Read {
            let volume = self.volume(handle);
            let promises_durability = request.kind == IoKind::Flush
                || volume.cache == CacheMode::Writethrough
                    && !planted::is(Bug::WritethroughNotAwaited);
            if volume.latched.is_some() {
                if !planted::is(Bug::LatchedStillAcknowledges) {
                    self.requests[index].status = IoStatus::Failed;
                }
            } else if promises_durability && self.waits_for_durability(index) {
                self.requests[index].parked = true;
                return;
            }
        }
        self.complete(index);
    }

    fn complete(&mut self, index: u32) {
        let request = self.requests.remove(index);
        if request.bars {
            let shared = self.volume_mut(request.volume).shared.as_mut();
            shared.expect("only what is shared is barred").bars -= 1;
        }
        match request.asker {
            None => {
                self.done.push_back(IoCompletion { tag: request.tag, status: request.status });
            }
            Some((shard, asked)) => {
                self.show_to_visitors(&request);
                let segments = self.spare_segments.pop().unwrap_or_default();
                let answer = Message::Ended { request: asked, status: request.status, segments };
                self.outbox.push_back((shard, answer));
                self.forwarded_active -= 1;
            }
        }
        match request.previous {
            NO_REQUEST => self.volume_mut(request.volume).active_head = request.next,
            previous => self.requests[previous].next = request.next,
        }
        match request.next {
            NO_REQUEST => self.volume_mut(request.volume).active_tail = request.previous,
            next => self.requests[next].previous = request.previous,
        }
        self.released = true;
        let volume = self.volume_mut(request.volume);
        volume.held.requests -= usize::from(request.asker.is_none());
        let counters = &mut volume.counters;
        let bytes = request.sectors * SECTOR_SIZE;
        match (request.status, request.kind) {
            (IoStatus::Done, IoKind::Read) => {
                counters.reads += 1;
                counters.read_bytes += bytes;
            }
            (IoStatus::Done, IoKind::Write) => {
                counters.writes += 1;
                counters.write_bytes += bytes;
            }
            (IoStatus::Done, IoKind::Flush) => counters.flushes += 1,
            (IoStatus::Done, _) => counters.unmaps += 1,
            _ => counters.errors += 1,
        }
        if volume.awaits_only_requests() {
            self.requests_ended(request.volume);
        }
    }

    /// Does what waits until the oldest requests of a volume have ended.
    pub(crate) fn requests_ended(&mut self, handle: VolumeHandle) {
        let oldest = self.oldest_stamp(handle);
        let passed = |stamp| oldest.is_none_or(|oldest| oldest > stamp);
        if self.volume(handle).settling.front().is_some_and(|(stamp, _)| passed(*stamp)) {
            // What has ended meanwhile may be in doubt.
            self.note_visitors_writes(handle);
        }
        let volume = self.volume_mut(handle);
        while volume.settling.front().is_some_and(|(stamp, _)| passed(*stamp)) {
            volume.settling.pop_front();
        }
        if !volume.unlinked.is_empty() {
            self.release_unlinked_before(handle, oldest);
        }
    }

    /// Stamp of the volume's oldest request that is not complete, of those that are here.
    pub(crate) fn oldest_here(&self, handle: VolumeHandle) -> Option<u64> {
        match self.volume(handle).active_head {
            NO_REQUEST => None,
            head => Some(self.requests[head].stamp),
        }
    }

    /// The same, here or on other shards.
    pub(crate) fn oldest_stamp(&self, handle: VolumeHandle) -> Option<u64> {
        let here = self.oldest_here(handle);
        let elsewhere =
            self.volume(handle).oldest_visitor().filter(|_| !planted::is(Bug::VisitorsForgotten));
        here.into_iter().chain(elsewhere).min()
    }

    /// Whether the request's volume may begin another piece.
    #[inline]
    fn may_begin_piece(&self, index: u32) -> bool {
        self.pieces.has_room(|| self.volume(self.requests[index].volume).held.pieces)
    }

    /// Begins a piece.
    fn begin_piece(&mut self, piece: Piece) -> u32 {
        let request = &mut self.requests[piece.request];
        request.pieces += 1;
        let handle = request.volume;
        self.volume_mut(handle).held.pieces += 1;
        self.pieces.insert(piece)
    }

    /// Whether the request's volume may have another bounce buffer.
    fn may_bounce(&self, index: u32) -> bool {
        let held = || self.volume(self.requests[index].volume).held.bounces;
        may_have(self.bounces.available(), self.bounces.capacity(), held)
    }

    /// A bounce buffer for a piece of the request that begins now; none when its volume may have none.
    fn take_bounce(&mut self, index: u32) -> Option<Buffer> {
        if !self.may_bounce(index) {
            return None;
        }
        let bounce = self.bounces.take()?;
        let handle = self.requests[index].volume;
        self.volume_mut(handle).held.bounces += 1;
        Some(bounce)
    }

    /// Ends a piece and gives back what it held. Returns its request, which may be complete now.
    fn end_piece(&mut self, index: u32) -> u32 {
        let piece = self.pieces.remove(index);
        self.released = true;
        let request = &mut self.requests[piece.request];
        request.pieces -= 1;
        let volume = self.volumes[request.volume.0 as usize].as_mut();
        let volume = volume.expect("a volume with requests is open");
        volume.held.pieces -= 1;
        if let Some(bounce) = piece.bounce {
            volume.held.bounces -= 1;
            self.bounces.put(bounce);
        }
        match piece.kind {
            PieceKind::Read => {}
            PieceKind::WriteInPlace => volume.overwrites -= 1,
            _ => volume.unlock(index),
        }
        piece.request
    }

    /// Takes in the end of a piece's I/O.
    pub(crate) fn piece_completed(&mut self, index: u32, result: Result<(), DeviceError>) {
        if let Some(bounce) = &self.pieces[index].bounce {
            self.bounces.returned(bounce);
        }
        if let Err(error) = result
            && !(planted::is(Bug::DataErrorIgnored)
                && self.pieces[index].kind == PieceKind::WriteInPlace)
        {
            self.data_error(index, error);
            return;
        }
        match self.pieces[index].kind {
            PieceKind::Read => self.read_completed(index),
            PieceKind::WriteInPlace | PieceKind::Rewrite => self.overwrite_completed(index),
            PieceKind::Allocate => {
                // Not when it is installed, which may be later: a flush that fails meanwhile leaves
                // the data unknown.
                self.note_data_written(index);
                self.install(index);
            }
            PieceKind::MergeRead { target } => self.merge(index, target),
        }
    }

    fn note_data_written(&mut self, index: u32) {
        let mark = self.flusher.mark();
        let handle = self.requests[self.pieces[index].request].volume;
        self.volume_mut(handle).write_mark = Some(mark);
    }

    /// Fails the request, and blames who is to blame: the device, or a guest whose memory went away
    /// under the I/O. A bounce buffer is ours and always there.
    fn data_error(&mut self, index: u32, error: DeviceError) {
        let guest = error.is_of_memory() && self.pieces[index].bounce.is_none();
        self.counters.device_errors += u64::from(!guest);
        if self.may_log() {
            let volume = self.requests[self.pieces[index].request].volume;
            let name = &self.volume(volume).name;
            if guest {
                tracing::debug!(volume = name, "data I/O met guest memory that is not there");
                return self.abandon(index, IoStatus::Failed);
            }
            tracing::error!(volume = name, home = %self.pieces[index].home, "data I/O: {error}");
        }
        self.abandon(index, IoStatus::Failed);
    }

    /// Ends a piece that failed; its new blocks go back, nothing was installed.
    fn abandon(&mut self, index: u32, status: IoStatus) {
        let piece = &self.pieces[index];
        let home = match piece.kind {
            PieceKind::Allocate => Some((piece.home, piece.count)),
            PieceKind::MergeRead { target: MergeTarget::NewHome(home) } => Some((home, 1)),
            _ => None,
        };
        if let Some((start, count)) = home {
            let run = crate::message::BlockRun { start, count };
            self.give_back(crate::message::BlockKind::Data, run);
            let handle = self.requests[self.pieces[index].request].volume;
            let allocated = &mut self.volume_mut(handle).record.blocks_allocated;
            *allocated = allocated.saturating_sub(u64::from(count));
        }
        let request = self.end_piece(index);
        self.requests[request].status = status;
        self.finish(request);
    }

    /// Reads a node unless somebody does already, and parks `work` until it is there. A node that is
    /// there and was not found is not what the link says: then `work` fails, after this turn of it.
    pub(crate) fn wait_for_node(&mut self, missing: crate::radix::Missing, work: Work) {
        if let Some(frame) = self.cache.find(missing.addr) {
            let found = self.cache.frame(frame);
            if found.state == FrameState::Present {
                let what = if found.level == missing.level {
                    "is reached from another tree, or another place, that may change it too"
                } else {
                    "is reached as a node of another level too"
                };
                let (addr, level) = (missing.addr, missing.level);
                let what = format!("radix node at block {addr} (level {level}) {what}");
                self.doomed.push((work, crate::request::CommandError::Corrupt(what)));
                return;
            }
            // A command is tried again whenever anything is released, and may be here already.
            let waiting = WaitingOnNode { frame, level: missing.level, work };
            let waits = matches!(work, Work::Command(_)) && self.parked_on_nodes.contains(&waiting);
            if !waits {
                self.parked_on_nodes.push(waiting);
            }
            return;
        }
        // Of a command there is no volume to blame, and few run at a time.
        let volume = match work {
            Work::Request(index) => Some(self.requests[index].volume),
            Work::Piece(index) => Some(self.requests[self.pieces[index].request].volume),
            Work::Command(_) => None,
        };
        let held = || volume.map_or(0, |handle| self.volume(handle).held.loads);
        if !may_have(self.loads.available(), self.loads.capacity(), held) {
            self.parked.push(work);
            return;
        }
        let buffer = self.loads.take().expect("one is free");
        let Some(frame) = self.cache.insert(missing.addr, missing.level, missing.parent) else {
            self.loads.put(buffer);
            self.want_all_commits();
            self.parked.push(work);
            return;
        };
        self.cache.counters.misses += 1;
        if let Some(handle) = volume {
            self.volume_mut(handle).held.loads += 1;
        }
        let segment = self.loads.lend(&buffer);
        self.loading[frame.0 as usize] = Some((buffer, volume));
        self.device.read(TokenKind::Node.token(frame.0), missing.addr.offset(), &[segment]);
        self.parked_on_nodes.push(WaitingOnNode { frame, level: missing.level, work });
    }

    /// Takes in the end of a node's read: checks it, and lets go on who waited for it.
    pub(crate) fn node_loaded(&mut self, frame: FrameId, result: Result<(), DeviceError>) {
        let loading = self.loading[frame.0 as usize].take();
        let (buffer, volume) = loading.expect("the node was being read");
        if let Some(handle) = volume {
            // It is open: the request that began this waits for it.
            self.volume_mut(handle).held.loads -= 1;
        }
        self.loads.returned(&buffer);
        let (addr, level) = (self.cache.frame(frame).addr, self.cache.frame(frame).level);
        let checked = result.map_err(crate::request::CommandError::Device).and_then(|()| {
            let node = crate::format::node_from_bytes(self.loads.bytes(&buffer));
            crate::format::check_node(node, addr, level, self.key, &self.extents)
                .map(|()| *node)
                .map_err(|fault| crate::request::CommandError::Corrupt(fault.to_string()))
        });
        self.loads.put(buffer);
        self.released = true;
        if planted::is(Bug::UnreadableNodeIsHole) && checked.is_err() {
            self.fill_with(frame, crate::format::Entry::sparse());
        }
        match checked.or_else(|error| {
            let found = *self.cache.entries(frame);
            if planted::is(Bug::UnreadableNodeIsHole) { Ok(found) } else { Err(error) }
        }) {
            Ok(node) => {
                *self.cache.entries_mut(frame) = node;
                self.cache.frame_mut(frame).state = FrameState::Present;
                let runnable = &mut self.runnable;
                self.parked_on_nodes.retain(|waiting| {
                    if waiting.frame == frame {
                        runnable.push_back(waiting.work);
                    }
                    waiting.frame != frame
                });
            }
            Err(error) => {
                self.cache.remove(frame);
                let waiting = std::mem::take(&mut self.parked_on_nodes);
                for waiting in waiting {
                    if waiting.frame != frame {
                        self.parked_on_nodes.push(waiting);
                    } else if waiting.level == level {
                        self.doomed.push((waiting.work, error.clone()));
                    } else {
                        // It was read as what somebody else's link said it is.
                        self.runnable.push_back(waiting.work);
                    }
                }
            }
        }
    }

    /// Ends work that waited for a node that cannot be had.
    pub(crate) fn fail_doomed(&mut self) {
        while let Some((work, error)) = self.doomed.pop() {
            self.counters.node_errors += 1;
            if self.may_log() {
                let volume = self.name_of(work);
                tracing::error!(volume, "{error}; what needs it fails, run `bessel check`");
            }
            self.fail_work(work, &error);
        }
    }

    /// The name of the volume that something is done for.
    fn name_of(&self, work: Work) -> String {
        let request = match work {
            Work::Request(index) => index,
            Work::Piece(index) => self.pieces[index].request,
            Work::Command(ticket) => return self.name_of_subject(ticket),
        };
        self.volume(self.requests[request].volume).name.clone()
    }

    /// Collects up to `wanted` bytes of the request's guest memory into `scratch`, from where it
    /// stands: see [`gather`].
    fn gather(&mut self, index: u32, wanted: usize, offset: usize) -> Option<usize> {
        let (segments, place) = (&self.segments[index as usize], self.requests[index].place);
        gather(segments, place, wanted, offset, self.memory_alignment, &mut self.scratch)
    }

    /// Notes that the next `bytes` of the request are being taken care of.
    fn consume(&mut self, index: u32, bytes: u64) {
        let request = &mut self.requests[index];
        request.started += bytes / SECTOR_SIZE;
        if matches!(request.kind, IoKind::Read | IoKind::Write) {
            request.place = advance_place(&self.segments[index as usize], request.place, bytes);
        }
    }

    /// Where the request goes on: sector, its block, bytes into the block, bytes left.
    fn position(&self, index: u32) -> (VolumeHandle, VolumeBlock, usize, u64) {
        let request = &self.requests[index];
        let sector = request.next_sector();
        (request.volume, sector.block(), sector.offset_in_block() as usize, request.left_bytes())
    }

    /// Looks the request's next block up, parking the request when a node is missing.
    fn locate_or_park(&mut self, index: u32, block: VolumeBlock) -> Option<Located> {
        let (handle, leaf) = (self.requests[index].volume, self.requests[index].leaf);
        let located = self.recall(&leaf, handle, block);
        match located.unwrap_or_else(|| self.locate(handle, block)) {
            Located::Absent(missing) => {
                self.wait_for_node(missing, Work::Request(index));
                None
            }
            located => Some(located),
        }
    }
}

/// Collects up to `wanted` bytes of guest memory into `target`, from `place` on, for an I/O that starts
/// `offset` bytes into a block. Returns how many bytes, always up to the end of a block or of what was
/// wanted; `None` when the memory needs a bounce buffer.
pub(crate) fn gather(
    segments: &[Segment],
    place: GuestPlace,
    wanted: usize,
    offset: usize,
    alignment: usize,
    target: &mut Vec<Segment>,
) -> Option<usize> {
    target.clear();
    let mut total = 0;
    let mut skip = place.offset;
    for segment in &segments[place.segment..] {
        if total == wanted || target.len() == SEGMENTS_MAX {
            break;
        }
        let part = segment.part(skip, (segment.len() - skip).min(wanted - total));
        skip = 0;
        if part.is_empty() {
            continue;
        }
        if !part.is_aligned(alignment) {
            return None;
        }
        total += part.len();
        target.push(part);
    }
    if total < wanted {
        let surplus = (offset + total) % BLOCK_SIZE as usize;
        if surplus >= total {
            return None;
        }
        trim(target, surplus);
        total -= surplus;
    }
    Some(total)
}

/// Takes `bytes` off the end of what was gathered.
fn trim(gathered: &mut Vec<Segment>, mut bytes: usize) {
    while bytes > 0 {
        let last = gathered.pop().expect("no more is trimmed than was gathered");
        if last.len() > bytes {
            gathered.push(last.part(0, last.len() - bytes));
            return;
        }
        bytes -= last.len();
    }
}

/// The place `bytes` further on.
pub(crate) fn advance_place(
    segments: &[Segment],
    mut place: GuestPlace,
    mut bytes: u64,
) -> GuestPlace {
    while bytes > 0 {
        let room = (segments[place.segment].len() - place.offset) as u64;
        if bytes < room {
            place.offset += bytes as usize;
            return place;
        }
        bytes -= room;
        place = GuestPlace { segment: place.segment + 1, offset: 0 };
    }
    place
}

/// Calls `each` with the parts of guest memory that make up `bytes` from `place` on.
pub(crate) fn for_each_part(
    segments: &[Segment],
    mut place: GuestPlace,
    mut bytes: usize,
    mut each: impl FnMut(Segment),
) {
    while bytes > 0 {
        let segment = segments[place.segment];
        let length = (segment.len() - place.offset).min(bytes);
        each(segment.part(place.offset, length));
        bytes -= length;
        place = GuestPlace { segment: place.segment + 1, offset: 0 };
    }
}

/// Copies guest memory into `target`.
fn copy_from_guest(segments: &[Segment], place: GuestPlace, target: &mut [u8]) {
    let mut at = 0;
    for_each_part(segments, place, target.len(), |part| {
        part.read(&mut target[at..at + part.len()]);
        at += part.len();
    });
}

/// Copies `source` into guest memory.
fn copy_to_guest(segments: &[Segment], place: GuestPlace, source: &[u8]) {
    let mut at = 0;
    for_each_part(segments, place, source.len(), |part| {
        part.write(&source[at..at + part.len()]);
        at += part.len();
    });
}
