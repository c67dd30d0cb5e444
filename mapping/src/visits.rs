//! Requests of queues whose volume is open on another shard: looked up and done here as far as the home
//! shows the way, sent to the home where it does not ([`crate::shared`]).
//!
//! A request is done here as a whole or not at all. What the home is for, and what is rare, goes there:
//! blocks without a place of their own, discards, flushes, memory that needs a bounce buffer, and all
//! writes of a volume in writethrough mode, which wait for commits.

use std::collections::VecDeque;
use std::sync::Arc;

use bessel_reactor::buffer::Segment;
use bessel_reactor::device::{Device, DeviceError, SEGMENTS_MAX};
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr, SECTOR_SIZE, Sector};

use crate::control::{NotNow, Tried};
use crate::message::{Forwarded, Message};
use crate::pipeline::{GuestPlace, IO_BYTES_MAX, advance_place, for_each_part, gather};
use crate::request::{
    Busy, CommandError, IoCompletion, IoKind, IoRequest, IoStatus, Reply, VolumeHandle,
};
use crate::shard::{PIECES_OF_A_VISIT, Shard, TokenKind};
use crate::shared::{Place, SharedVolume};
use crate::slab::Slab;

/// Segments of a request for which room is made at start; a request with more makes its slot larger.
const SEGMENTS_EXPECTED: usize = 34;

/// What a shard has in hand for volumes that are open elsewhere.
#[derive(Debug)]
pub(crate) struct Visits {
    open: Vec<Option<Visit>>,
    requests: Slab<VisitRequest>,
    /// Guest memory of each request, by its slot.
    segments: Vec<Vec<Segment>>,
    runnable: VecDeque<u32>,
    /// Visits and stamps of requests that have ended in this turn.
    ended: Vec<(u32, u64)>,
    /// Parts of the request that is being looked up.
    parts: Vec<Part>,
    /// Device operations that may still be begun.
    pieces_left: usize,
}

/// A volume that is open on another shard.
#[derive(Debug)]
struct Visit {
    volume: Arc<SharedVolume>,
    /// Requests in its slots, those at the home included.
    requests: u32,
    /// What has I/O in flight here: how many requests, by the stamp they show, oldest first.
    in_flight: VecDeque<(u64, u32)>,
}

/// A guest's request.
#[derive(Debug)]
struct VisitRequest {
    tag: u64,
    visit: u32,
    kind: IoKind,
    first: Sector,
    sectors: u64,
    /// What it shows.
    stamp: u64,
    pieces: u32,
    failed: bool,
    /// Flushes that had failed when it began.
    failures: u64,
}

/// Adjacent blocks of a request, or a hole.
#[derive(Clone, Copy, Debug)]
struct Part {
    home: Option<BlockAddr>,
    /// Bytes into the first block.
    offset: usize,
    bytes: usize,
}

impl Visits {
    /// Room for `requests_max` requests.
    pub(crate) fn new(requests_max: usize) -> Self {
        let segments = || Vec::with_capacity(SEGMENTS_EXPECTED);
        Self {
            open: Vec::new(),
            requests: Slab::new(requests_max),
            segments: (0..requests_max).map(|_| segments()).collect(),
            runnable: VecDeque::with_capacity(requests_max),
            ended: Vec::with_capacity(requests_max),
            parts: Vec::with_capacity((IO_BYTES_MAX / BLOCK_SIZE) as usize + 1),
            pieces_left: requests_max * PIECES_OF_A_VISIT,
        }
    }

    /// True while nothing is in hand.
    pub(crate) fn are_idle(&self) -> bool {
        self.requests.is_empty() && self.ended.is_empty()
    }

    fn visit(&mut self, index: u32) -> &mut Visit {
        self.open[index as usize].as_mut().expect("a visit with requests is open")
    }
}

impl Visit {
    /// Shows that one more request is in flight, and returns the stamp it shows.
    fn enter(&mut self, shard: usize) -> u64 {
        let stamp = self.volume.stamp();
        match self.in_flight.back_mut() {
            Some((last, count)) if *last == stamp => *count += 1,
            last => {
                if last.is_none() {
                    self.volume.enter(shard, stamp);
                }
                self.in_flight.push_back((stamp, 1));
            }
        }
        stamp
    }

    /// Takes that back.
    fn leave(&mut self, shard: usize, stamp: u64) {
        let at = self.in_flight.partition_point(|(other, _)| *other < stamp);
        self.in_flight[at].1 -= 1;
        if self.in_flight[at].1 == 0 {
            self.in_flight.remove(at);
            if at == 0 {
                self.volume.leave(shard, self.in_flight.front().map(|(stamp, _)| *stamp));
            }
        }
    }
}

impl<D: Device> Shard<D> {
    // Control path.

    pub(crate) fn begin_visit(&mut self, ticket: u64, volume: &Arc<SharedVolume>) -> Tried {
        if volume.home() == self.index {
            let what = "a volume is not visited from its home";
            return Err(CommandError::Limit(what.to_owned()).into());
        }
        let open = &mut self.visits.open;
        if open.iter().flatten().any(|visit| Arc::ptr_eq(&visit.volume, volume)) {
            let what = "the volume is visited from here already";
            return Err(CommandError::Limit(what.to_owned()).into());
        }
        let index = open.iter().position(Option::is_none).unwrap_or_else(|| {
            open.push(None);
            open.len() - 1
        });
        // As many as requests, at most; few, as a rule.
        let in_flight = VecDeque::with_capacity(64);
        open[index] = Some(Visit { volume: Arc::clone(volume), requests: 0, in_flight });
        self.reply(ticket, Reply::Opened(VolumeHandle::of_visit(index as u32)));
        Ok(())
    }

    pub(crate) fn end_visit(&mut self, ticket: u64, visit: VolumeHandle) -> Tried {
        let index = visit.visit().map(|index| index as usize);
        let open = index.and_then(|index| self.visits.open.get_mut(index));
        let Some(open) = open.filter(|open| open.is_some()) else {
            let what = "the volume is not visited from here";
            return Err(CommandError::Limit(what.to_owned()).into());
        };
        if open.as_ref().is_some_and(|visit| visit.requests > 0) {
            return Err(NotNow::Wait);
        }
        *open = None;
        self.reply(ticket, Reply::Done);
        Ok(())
    }

    // Hot path.

    /// Whether a request of this visit would find room.
    pub(crate) fn has_room_for_visit(&self, index: u32) -> bool {
        let visit = self.visits.open.get(index as usize).and_then(Option::as_ref);
        visit.is_none_or(|visit| self.visits.requests.has_room(|| visit.requests as usize))
    }

    /// Takes a request of a queue that is served here for another shard's volume.
    pub(crate) fn submit_visit(&mut self, index: u32, request: &IoRequest<'_>) -> Result<(), Busy> {
        if !self.has_room_for_visit(index) {
            return Err(Busy);
        }
        let Some(visit) = self.visits.open.get_mut(index as usize).and_then(Option::as_mut) else {
            self.done.push_back(IoCompletion { tag: request.tag, status: IoStatus::Refused });
            return Ok(());
        };
        visit.requests += 1;
        if matches!(request.kind, IoKind::Read | IoKind::Write) {
            visit.volume.expect(request.sector.block());
        }
        let slot = self.visits.requests.insert(VisitRequest {
            tag: request.tag,
            visit: index,
            kind: request.kind,
            first: request.sector,
            sectors: request.sectors,
            stamp: 0,
            pieces: 0,
            failed: false,
            failures: 0,
        });
        let segments = &mut self.visits.segments[slot as usize];
        segments.clear();
        segments.extend_from_slice(request.segments);
        self.visits.runnable.push_back(slot);
        Ok(())
    }

    /// Shows that the requests of the last turn have ended: who waits for them waits until their guests have
    /// been answered, which is done between turns. True when there were any.
    pub(crate) fn leave_visits(&mut self) -> bool {
        let some = !self.visits.ended.is_empty();
        while let Some((visit, stamp)) = self.visits.ended.pop() {
            self.visits.visit(visit).leave(self.index, stamp);
            self.visit_request_gone(visit);
        }
        some
    }

    /// Starts what has come. True when something had.
    pub(crate) fn run_visits(&mut self) -> bool {
        let mut progress = false;
        while let Some(slot) = self.visits.runnable.pop_front() {
            progress = true;
            self.start_visit(slot);
        }
        progress
    }

    fn start_visit(&mut self, slot: u32) {
        let shard = self.index;
        let request = &self.visits.requests[slot];
        let (index, kind) = (request.visit, request.kind);
        if !matches!(kind, IoKind::Read | IoKind::Write) || !self.is_whole(slot) {
            return self.forward(slot);
        }
        let failures = self.flusher.failures();
        let stamp = self.visits.visit(index).enter(shard);
        if !self.find_parts(slot) || !self.start_parts(slot) {
            self.visits.visit(index).leave(shard, stamp);
            return self.forward(slot);
        }
        let request = &mut self.visits.requests[slot];
        (request.stamp, request.failures) = (stamp, failures);
        if request.pieces == 0 {
            self.end_visit_io(slot); // All of it is a hole.
        }
    }

    /// Whether the request is one that can be done here: its places come from a guest.
    fn is_whole(&self, slot: u32) -> bool {
        let request = &self.visits.requests[slot];
        let visit = self.visits.open[request.visit as usize].as_ref();
        let volume = &visit.expect("a visit with requests is open").volume;
        let segments = self.visits.segments[slot as usize].iter();
        let total: u64 = segments.map(|segment| segment.len() as u64).sum();
        let end = request.first.get().checked_add(request.sectors);
        request.sectors > 0
            && end.is_some_and(|end| end <= volume.sectors())
            && total == request.sectors * SECTOR_SIZE
            && self.keeps_data
    }

    /// Looks all of the request up. False when something of it is the home's.
    fn find_parts(&mut self, slot: u32) -> bool {
        let Visits { open, requests, parts, .. } = &mut self.visits;
        let request = &requests[slot];
        let visit = open[request.visit as usize].as_ref();
        let volume = &visit.expect("a visit with requests is open").volume;
        let (mut block, mut offset) =
            (request.first.block(), request.first.offset_in_block() as usize);
        let mut left = (request.sectors * SECTOR_SIZE) as usize;
        parts.clear();
        while left > 0 {
            let bytes = left.min(BLOCK_SIZE as usize - offset);
            let home = match volume.look_up(block) {
                Place::Unknown => return false,
                Place::Hole if request.kind == IoKind::Write => return false,
                Place::Data { in_place: false, .. } if request.kind == IoKind::Write => {
                    return false;
                }
                Place::Hole => None,
                Place::Data { home, .. } => Some(home),
            };
            match parts.last_mut() {
                Some(last) if goes_on(last, home, bytes) => last.bytes += bytes,
                _ => parts.push(Part { home, offset, bytes }),
            }
            left -= bytes;
            offset = 0;
            block = block.add(1);
        }
        true
    }

    /// Gives all parts to the device. False, with nothing given, when the request needs the home.
    fn start_parts(&mut self, slot: u32) -> bool {
        let (memory, offset) = (self.memory_alignment, self.offset_alignment - 1);
        let Visits { requests, segments, parts, pieces_left, .. } = &mut self.visits;
        let segments = &segments[slot as usize];
        let cut = parts.len() > 1;
        let suits = parts.len() <= *pieces_left
            && segments.len() <= SEGMENTS_MAX
            && segments.iter().all(|segment| segment.is_aligned(memory))
            && parts.iter().all(|part| {
                (part.offset | part.bytes) & offset == 0
                    && (!cut || part.bytes.is_multiple_of(memory))
            });
        if !suits {
            return false;
        }
        let token = TokenKind::Visit.token(slot);
        let request = &mut requests[slot];
        let mut place = GuestPlace::default();
        for Part { home, offset, bytes } in parts.iter().copied() {
            match home {
                None => for_each_part(segments, place, bytes, |part| part.zero()),
                Some(home) => {
                    let found = gather(segments, place, bytes, offset, memory, &mut self.scratch);
                    assert_eq!(found, Some(bytes), "few and aligned segments are one I/O");
                    let from = home.offset().add(offset as u64);
                    match request.kind {
                        IoKind::Write => self.device.write(token, from, &self.scratch),
                        _ => self.device.read(token, from, &self.scratch),
                    }
                    request.pieces += 1;
                    *pieces_left -= 1;
                }
            }
            place = advance_place(segments, place, bytes as u64);
        }
        true
    }

    /// Takes in the end of an I/O.
    pub(crate) fn visit_completed(&mut self, slot: u32, result: Result<(), DeviceError>) {
        let request = &mut self.visits.requests[slot];
        request.pieces -= 1;
        self.visits.pieces_left += 1;
        if let Err(error) = result {
            request.failed = true;
            let guest = error.is_of_memory();
            self.counters.device_errors += u64::from(!guest);
            if self.may_log() {
                let index = self.visits.requests[slot].visit;
                let volume = self.visits.visit(index).volume.name();
                if guest {
                    tracing::debug!(volume, "data I/O met guest memory that is not there");
                } else {
                    tracing::error!(volume, "data I/O: {error}");
                }
            }
        }
        if self.visits.requests[slot].pieces == 0 {
            self.end_visit_io(slot);
        }
    }

    /// All I/O of a request has ended.
    fn end_visit_io(&mut self, slot: u32) {
        let shard = self.index;
        let VisitRequest { visit, kind, sectors, stamp, failed, failures, .. } =
            self.visits.requests[slot];
        let volume = &self.visits.open[visit as usize].as_ref().expect("it is open").volume;
        let bytes = sectors * SECTOR_SIZE;
        if kind == IoKind::Write {
            // Also one that failed: part of it may have been written.
            let flusher = &self.flusher;
            volume.wrote(shard, bytes, || flusher.failures() != failures);
        } else if !failed {
            volume.did_read(shard, bytes);
        }
        if failed {
            volume.failed(shard);
        }
        if kind == IoKind::Write && !failed && volume.is_writethrough() {
            // It was looked up before its guest chose writethrough.
            self.visits.requests[slot].kind = IoKind::Flush;
            self.visits.visit(visit).leave(shard, stamp);
            return self.forward(slot);
        }
        self.visits.ended.push((visit, stamp));
        let request = self.visits.requests.remove(slot);
        let status = if failed { IoStatus::Failed } else { IoStatus::Done };
        self.done.push_back(IoCompletion { tag: request.tag, status });
    }

    /// One request less belongs to a visit, which a command may wait for.
    fn visit_request_gone(&mut self, visit: u32) {
        let visit = self.visits.visit(visit);
        visit.requests -= 1;
        self.commands_ready |= visit.requests == 0 && !self.commands.is_empty();
    }

    /// Sends a request to its volume's home.
    fn forward(&mut self, slot: u32) {
        self.counters.forwarded += 1;
        let mut segments = std::mem::take(&mut self.visits.segments[slot as usize]);
        for segment in &mut segments {
            *segment = segment.without_registration(); // Of this shard's device.
        }
        let request = &self.visits.requests[slot];
        let visit = self.visits.open[request.visit as usize].as_ref().expect("it is open");
        let forwarded = Forwarded {
            from: (self.index, slot),
            volume: visit.volume.handle(),
            id: visit.volume.id(),
            kind: request.kind,
            sector: request.first,
            sectors: request.sectors,
            segments,
        };
        let home = visit.volume.home();
        self.outbox.push_back((home, Message::Forward(forwarded)));
    }

    /// The home has done a request that was sent there.
    pub(crate) fn forwarded_ended(&mut self, slot: u32, status: IoStatus, segments: Vec<Segment>) {
        self.visits.segments[slot as usize] = segments;
        let request = self.visits.requests.remove(slot);
        self.visit_request_gone(request.visit);
        self.done.push_back(IoCompletion { tag: request.tag, status });
    }
}

/// Whether `bytes` at `home`, or of a hole, belong to the part before them.
fn goes_on(last: &Part, home: Option<BlockAddr>, bytes: usize) -> bool {
    match (last.home, home) {
        (None, None) => true,
        (Some(start), Some(home)) => {
            let end = last.offset + last.bytes; // The end of a block.
            let next = start.get() + end as u64 / BLOCK_SIZE;
            next == home.get() && (end + bytes) as u64 <= IO_BYTES_MAX
        }
        _ => false,
    }
}
