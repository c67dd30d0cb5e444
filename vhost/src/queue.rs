//! A virtqueue as its poller sees it: requests come out checked, completions go in.
//!
//! Hot path: no allocation, no lock, no log. A queue is built by the control path, moved to the
//! thread that polls it, and handed back drained. Split rings only.
//!
//! What a hostile guest can do is fixed here. A chain that is wrong is answered with an error
//! status if it has a status byte, and with an empty used element if not. A ring that contradicts
//! itself (an available index too far ahead, a head that does not exist or is in flight already)
//! breaks the queue: nothing more is popped, what is in flight still completes. Every walk is
//! bounded by the ring's size.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, Release, SeqCst};

use bessel_reactor::buffer::Segment;
use bessel_reactor::units::Sector;
use bessel_reactor::{prefetch, prefetch_to_write};

use crate::chain::{Chain, NoEnd};
use crate::counters::{BrokenReason, Notice, QueueCounters};
use crate::disk::Disk;
use crate::fds::{self, CallFd};
use crate::features::VirtioFeatures;
use crate::inflight::InflightQueue;
use crate::memory::AddressMap;
use crate::request::{self, HEADER_SIZE, Payload, RANGE_SIZE, RequestKind, Rules, Status, Verdict};
use crate::ring::{AVAIL_NO_INTERRUPT, Descriptor, Ring, USED_NO_NOTIFY, crossed};
use crate::sigbus;
use crate::sync::fence;

/// How many requests ahead the descriptors of one are asked for, and what they begin with.
const DESCRIPTORS_AHEAD: u16 = 4;
const START_AHEAD: u16 = 2;

/// What [`Queue::pop`] found.
#[derive(Debug)]
pub enum Popped<'a> {
    /// Nothing is waiting.
    Empty,
    /// A request for the volume.
    Request(BlockRequest<'a>),
    /// A request that was answered here: malformed, refused, or GET_ID. Pop on; publish later.
    Answered,
    /// The ring is unusable. Pop no more; complete what is in flight.
    Broken(BrokenReason),
}

/// A request whose every field was checked: it lies inside the volume, and the segments of a read
/// or write hold `sectors` sectors exactly.
#[derive(Clone, Copy, Debug)]
pub struct BlockRequest<'a> {
    /// Names the request in [`Queue::complete`]. Unique among those in flight on its queue.
    pub head: u16,
    /// What to do.
    pub kind: RequestKind,
    /// The first sector; 0 for a flush.
    pub sector: Sector,
    /// How many sectors; 0 for a flush.
    pub sectors: u64,
    /// Guest memory of a read or write, of any alignment and length; empty for the others. The
    /// memory stays valid until the request completes, the slice until the next pop.
    pub segments: &'a [Segment],
}

/// What we keep of a request in flight.
#[derive(Clone, Copy, Debug)]
struct Head {
    status: Option<Segment>,
    /// Length for the used element.
    written: u32,
    busy: bool,
}

/// The last request popped, as far as it is not in `segments`.
#[derive(Clone, Copy, Debug)]
struct Parsed {
    head: u16,
    kind: RequestKind,
    sector: Sector,
    sectors: u64,
    first: usize,
    end: usize,
}

/// What a request that never reaches the volume is told.
#[derive(Clone, Copy, Debug)]
struct Answer {
    /// `None` when the chain has no status byte.
    status: Option<Status>,
    written: u32,
}

/// What a queue is made of. The control path fills it in.
#[derive(Debug)]
pub(crate) struct QueueParts {
    pub(crate) ring: Ring,
    pub(crate) map: AddressMap,
    pub(crate) features: VirtioFeatures,
    pub(crate) disk: Arc<Disk>,
    pub(crate) base: u16,
    pub(crate) used: u16,
    pub(crate) kick: Option<Arc<OwnedFd>>,
    pub(crate) call: Arc<CallFd>,
    pub(crate) inflight: Option<InflightQueue>,
    /// Heads to pop again first, the first one last.
    pub(crate) recovered: Vec<u16>,
    pub(crate) counters: Arc<QueueCounters>,
    pub(crate) notice: Notice,
}

/// One virtqueue of a connected guest.
///
/// Belongs to one thread at a time. Must be drained ([`Queue::in_flight`] is zero) before it is
/// dropped: devices write to the guest memory that it holds.
#[derive(Debug)]
pub struct Queue {
    ring: Ring,
    event_idx: bool,
    rules: Rules,
    disk: Arc<Disk>,
    /// The next entry of the available ring to take.
    next: u16,
    /// The available index when last looked at.
    seen: u16,
    /// The next entry of the used ring to fill.
    used: u16,
    /// The used index when the guest's wish for an interrupt was last looked at.
    judged: u16,
    kick: Option<Arc<OwnedFd>>,
    /// Stands in for `kick` when the front-end gave none.
    no_kick: Option<OwnedFd>,
    call: Arc<CallFd>,
    inflight: Option<InflightQueue>,
    recovered: Vec<u16>,
    heads: Box<[Head]>,
    in_flight: u32,
    /// Heads completed since the last publish.
    batch: Vec<u16>,
    /// The request popped last.
    chain: Chain,
    /// Its head, and the address of its header: where that of the next one may be. A hint.
    before: (u16, usize),
    last: Option<Parsed>,
    /// Put back by the poller, given out again first.
    parked: Option<Parsed>,
    broken: Option<BrokenReason>,
    poisonings: u64,
    counters: Arc<QueueCounters>,
    notice: Notice,
}

impl Queue {
    pub(crate) fn new(parts: QueueParts) -> std::io::Result<Self> {
        let size = usize::from(parts.ring.size);
        let features = parts.features;
        let no_kick = if parts.kick.is_none() { Some(fds::eventfd()?.into()) } else { None };
        let queue = Self {
            event_idx: features.event_idx(),
            rules: Rules {
                capacity: parts.disk.capacity(),
                read_only: parts.disk.info.read_only,
                discard: features.discard(),
                write_zeroes: features.write_zeroes(),
            },
            disk: parts.disk,
            next: parts.base,
            seen: parts.base,
            used: parts.used,
            judged: parts.used,
            kick: parts.kick,
            no_kick,
            call: parts.call,
            inflight: parts.inflight,
            recovered: parts.recovered,
            heads: vec![Head { status: None, written: 0, busy: false }; size].into(),
            in_flight: 0,
            batch: Vec::with_capacity(size),
            chain: Chain::new(parts.map, features.indirect(), parts.ring.size),
            before: (0, 0),
            last: None,
            parked: None,
            broken: None,
            poisonings: sigbus::events(),
            counters: parts.counters,
            notice: parts.notice,
            ring: parts.ring,
        };
        queue.ring.used.store_u16(0, 0, Relaxed);
        Ok(queue)
    }

    /// The next request. Looks at the available index once for each batch.
    pub fn pop(&mut self) -> Popped<'_> {
        if let Some(parsed) = self.parked.take() {
            return Popped::Request(self.request(parsed));
        }
        let head = match self.next_head() {
            Ok(Some(head)) => head,
            Ok(None) => return Popped::Empty,
            Err(reason) => return Popped::Broken(self.break_off(reason)),
        };
        QueueCounters::bump(&self.counters.requests);
        match self.parse(head) {
            Ok(parsed) => Popped::Request(self.request(parsed)),
            Err(answer) => {
                self.finish(head, answer.status, answer.written);
                Popped::Answered
            }
        }
    }

    /// Takes back the request that was popped last, to give it out again at the next pop: the
    /// volume had no room for it.
    ///
    /// # Panics
    /// When `head` is not the last request popped, or has been completed or put back.
    pub fn put_back(&mut self, head: u16) {
        let parsed = self.last.take().filter(|parsed| parsed.head == head);
        let parsed = parsed.expect("only the request popped last can be put back");
        assert!(self.heads[usize::from(head)].busy, "head {head} put back after completion");
        self.parked = Some(parsed);
    }

    /// Answers a request: writes its status byte and its used element. The guest sees it at the
    /// next [`Queue::publish`].
    ///
    /// # Panics
    /// When `head` is not in flight.
    pub fn complete(&mut self, head: u16, status: Status) {
        let written = self.heads[usize::from(head)].written;
        self.finish(head, Some(status), written);
    }

    /// Shows the guest everything that was completed since the last call, and interrupts it if it
    /// wants that. Once a turn; costs nothing when nothing was completed.
    pub fn publish(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        self.ring.used.store_u16(2, self.used, Release);
        if let Some(inflight) = &mut self.inflight {
            inflight.published(&self.batch, self.used);
        }
        self.batch.clear();
        // The guest stores its wish and then looks at the used index; we stored the used index
        // and now look at the wish. With a full fence on each side one of us sees the other.
        fence(SeqCst);
        if self.interrupt_wanted() {
            QueueCounters::bump(&self.counters.calls);
            self.call.signal();
        }
    }

    fn interrupt_wanted(&mut self) -> bool {
        let previous = std::mem::replace(&mut self.judged, self.used);
        if self.event_idx {
            crossed(self.ring.used_event(), previous, self.used)
        } else {
            self.ring.available.load_u16(0, Relaxed) & AVAIL_NO_INTERRUPT == 0
        }
    }

    /// Asks the guest for a kick when it adds requests, before the poller sleeps. True when there
    /// is work already: pop again instead of sleeping. Always true for a front-end that gave no
    /// kick descriptor.
    pub fn enable_kicks(&mut self) -> bool {
        if self.broken.is_some() {
            return false;
        }
        if self.event_idx {
            self.ring.set_available_event(self.next);
        } else {
            self.ring.used.store_u16(0, 0, Relaxed);
        }
        // As in `publish`, with the roles swapped.
        fence(SeqCst);
        self.kick.is_none() || self.has_requests()
    }

    /// Tells the guest that kicks are not needed: the queue is polled.
    pub fn disable_kicks(&mut self) {
        // With event indexes nothing need be done: the guest kicks when it passes the index asked
        // for last, which it has done or will do once in 65536 requests.
        if !self.event_idx {
            self.ring.used.store_u16(0, USED_NO_NOTIFY, Relaxed);
        }
    }

    /// Readable when the guest has kicked.
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        let event = self.kick.as_deref().or(self.no_kick.as_ref());
        event.expect("one of the two is made at construction").as_fd()
    }

    /// Forgets the kicks that came. Never blocks.
    pub fn drain_kick(&self) {
        fds::drain(self.kick_fd());
    }

    /// Requests popped and not completed.
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// A request was put back: it is in flight, and the next pop gives it out again. Whoever stops
    /// the queue pops it and sees it through.
    pub fn has_put_back(&self) -> bool {
        self.parked.is_some()
    }

    /// The next pop gives out what was in flight before: put back, or picked up after the death of who
    /// served the queue. Whoever stops the queue has to see it through.
    pub fn owes(&self) -> bool {
        self.parked.is_some() || !self.recovered.is_empty()
    }

    /// The next pop would give something out. A broken queue has nothing.
    pub fn has_requests(&self) -> bool {
        let owes = self.owes();
        self.broken.is_none() && (owes || self.ring.available_index() != self.next)
    }

    /// Requests that are in the ring and not popped, as a look at it tells.
    pub fn waiting(&self) -> u32 {
        self.ring.available_index().wrapping_sub(self.next).into()
    }

    /// Largest number of requests that can be in flight.
    pub fn size(&self) -> u16 {
        self.ring.size
    }

    /// Counters, to be read from other threads.
    pub fn counters(&self) -> &Arc<QueueCounters> {
        &self.counters
    }

    /// Guest memory as ranges of at most 1 GiB, in a fixed order, to register with a device.
    pub fn memory_ranges(&self) -> impl Iterator<Item = Segment> + '_ {
        self.chain.map().ranges()
    }

    /// Notes that range `index` of [`Queue::memory_ranges`] is registered buffer `registration`.
    pub fn register_range(&mut self, index: usize, registration: u32) {
        self.chain.map_mut().register(index, registration);
    }

    /// Forgets which ranges are registered, before the queue is polled on another device.
    pub fn unregister_ranges(&mut self) {
        self.chain.map_mut().unregister();
    }

    /// The next entry of the available ring, for GET_VRING_BASE.
    pub(crate) fn next_available(&self) -> u16 {
        self.next
    }

    fn request(&mut self, parsed: Parsed) -> BlockRequest<'_> {
        self.last = Some(parsed);
        BlockRequest {
            head: parsed.head,
            kind: parsed.kind,
            sector: parsed.sector,
            sectors: parsed.sectors,
            segments: self.chain.segments(parsed.first..parsed.end),
        }
    }

    /// Takes the next head: those recovered first, then the available ring's.
    fn next_head(&mut self) -> Result<Option<u16>, BrokenReason> {
        if let Some(reason) = self.broken {
            return Err(reason);
        }
        if let Some(head) = self.recovered.pop() {
            self.begin(head)?;
            return Ok(Some(head));
        }
        if self.next == self.seen && !self.look()? {
            return Ok(None);
        }
        self.look_ahead();
        let head = self.ring.available_head(self.next);
        if head >= self.ring.size {
            return Err(BrokenReason::HeadOutOfRange);
        }
        self.begin(head)?;
        self.next = self.next.wrapping_add(1);
        self.ring.expect_used(self.used.wrapping_add(self.in_flight as u16 - 1));
        if let Some(inflight) = &mut self.inflight {
            inflight.popped(head);
        }
        Ok(Some(head))
    }

    /// Asks for what the requests after the next one will need, so that it comes from the guest's core
    /// while this one is looked at.
    #[inline]
    fn look_ahead(&mut self) {
        let waiting = self.seen.wrapping_sub(self.next);
        if waiting > DESCRIPTORS_AHEAD {
            let head = self.ring.available_head(self.next.wrapping_add(DESCRIPTORS_AHEAD));
            Chain::expect_descriptors(&self.ring, head);
        }
        if waiting > START_AHEAD {
            let head = self.ring.available_head(self.next.wrapping_add(START_AHEAD));
            if head < self.ring.size {
                self.chain.expect_start(&self.ring, head);
            }
        }
    }

    /// Looks for new entries of the available ring.
    fn look(&mut self) -> Result<bool, BrokenReason> {
        let index = self.ring.available_index();
        if index == self.next {
            return Ok(false);
        }
        if self.poisonings != sigbus::events() {
            self.poisonings = sigbus::events();
            let inflight = self.inflight.as_ref().is_some_and(InflightQueue::poisoned);
            if inflight || self.chain.map().poisoned() {
                return Err(BrokenReason::MemoryTruncated);
            }
        }
        // Entries that wait, are in flight or are not published share the ring's descriptors.
        let waiting = u32::from(index.wrapping_sub(self.next));
        let taken = self.in_flight + self.batch.len() as u32;
        if waiting + taken > self.ring.size.into() {
            return Err(BrokenReason::AvailableIndex);
        }
        self.seen = index;
        // A guest that has one request at a time uses the same descriptors again and again.
        let (head, header) = self.before;
        Chain::expect_descriptors(&self.ring, head);
        prefetch(std::ptr::without_provenance::<u8>(header));
        self.rules.capacity = self.disk.capacity();
        Ok(true)
    }

    fn begin(&mut self, head: u16) -> Result<(), BrokenReason> {
        let entry = &mut self.heads[usize::from(head)];
        if entry.busy {
            return Err(BrokenReason::HeadInFlight);
        }
        *entry = Head { status: None, written: 0, busy: true };
        self.in_flight += 1;
        Ok(())
    }

    fn finish(&mut self, head: u16, status: Option<Status>, written: u32) {
        let entry = &mut self.heads[usize::from(head)];
        assert!(entry.busy, "head {head} completed while not in flight");
        entry.busy = false;
        if let (Some(place), Some(status)) = (entry.status, status) {
            place.write(&[status as u8]);
        }
        self.in_flight -= 1;
        self.ring.put_used(self.used, head, written);
        self.used = self.used.wrapping_add(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.completed(head);
        }
        self.batch.push(head);
    }

    #[cold]
    fn break_off(&mut self, reason: BrokenReason) -> BrokenReason {
        if self.broken.replace(reason).is_none() {
            self.counters.broken.store(reason as u8, Release);
            self.notice.raise();
        }
        reason
    }

    #[cold]
    fn count_malformed(&self) {
        QueueCounters::bump(&self.counters.malformed);
        self.notice.raise_once();
    }

    /// Turns the chain at `head` into a request, or into the answer that refuses it.
    fn parse(&mut self, head: u16) -> Result<Parsed, Answer> {
        let readable = match self.chain.collect(&self.ring, head) {
            Ok(walk) if !walk.wrong && walk.readable < self.chain.len() => walk.readable,
            Ok(walk) => return Err(self.answer_malformed(head, walk.writable)),
            Err(NoEnd) => return Err(self.answer_malformed(head, None)),
        };
        self.before = (head, self.chain.segments(0..1)[0].as_ptr().addr());
        let writable = self.chain.bytes(readable..self.chain.len());
        let written = writable.min(u32::MAX.into()) as u32;
        let entry = &mut self.heads[usize::from(head)];
        let status = self.chain.take_status();
        prefetch_to_write(status.as_ptr());
        (entry.status, entry.written) = (Some(status), written);
        let answer = |status| Answer { status: Some(status), written };

        let end = self.chain.len();
        let mut header = [0; HEADER_SIZE];
        let Some(first) = self.chain.take_readable(0, readable, &mut header) else {
            self.count_malformed();
            return Err(answer(Status::IoError));
        };
        let payload =
            Payload { readable: self.chain.bytes(first..readable), writable: writable - 1 };
        let mut verdict = request::judge(&header, payload, self.rules);
        if let Verdict::NeedsRange { kind } = verdict {
            let mut range = [0; RANGE_SIZE];
            let taken = self.chain.take_readable(first, readable, &mut range);
            taken.expect("`judge` checked the length");
            verdict = request::judge_range(kind, &range, self.rules);
        }
        let (kind, sector, sectors) = match verdict {
            Verdict::Forward { kind, sector, sectors } => (kind, sector, sectors),
            Verdict::GetId => {
                self.write_id(readable, end);
                return Err(answer(Status::Done));
            }
            Verdict::Answer(status) => return Err(answer(status)),
            Verdict::NeedsRange { .. } => unreachable!("a range was judged above"),
        };
        let (first, end) = match kind {
            RequestKind::Read => (readable, end),
            RequestKind::Write => (first, readable),
            _ => (0, 0),
        };
        Ok(Parsed { head, kind, sector, sectors, first, end })
    }

    /// Refuses a chain that is none, through its status byte if that can be found.
    #[cold]
    fn answer_malformed(&mut self, head: u16, writable: Option<Descriptor>) -> Answer {
        self.count_malformed();
        let place = writable.and_then(|last| self.chain.find_status(last));
        self.heads[usize::from(head)].status = place;
        Answer { status: place.map(|_| Status::IoError), written: u32::from(place.is_some()) }
    }

    fn write_id(&self, first: usize, end: usize) {
        let mut left: &[u8] = &self.disk.id;
        for segment in self.chain.segments(first..end) {
            let (now, later) = left.split_at(left.len().min(segment.len()));
            segment.write(now);
            left = later;
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if self.in_flight > 0 {
            // Devices may still write to this memory. Leaking it is the lesser harm.
            self.chain.map().leak();
            let requests = self.in_flight;
            tracing::error!(requests, "a queue was dropped with requests in flight");
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::unistd::ftruncate;

    use super::*;
    use crate::disk::DiskInfo;
    use crate::memory::{GuestMemory, RegionSpec, Window};

    const SIZE: u16 = 8;
    const AVAILABLE: usize = 0x1000;
    const USED: usize = 0x2000;
    const DATA: usize = 0x4000;

    /// A ring of eight flushes, each a header and a status, and the driver's view of it.
    struct Fixture {
        queue: Queue,
        ram: Window,
    }

    fn fixture(event_idx: bool, kick: bool) -> Fixture {
        let file = memfd_create("queue", MFdFlags::MFD_CLOEXEC).unwrap();
        ftruncate(&file, 0x10000).unwrap();
        let spec = RegionSpec { guest: 0, size: 0x10000, user: 0, offset: 0 };
        let memory = Arc::new(GuestMemory::map(&[(spec, file)]).unwrap());
        let ram = memory.window_at_user(0, 0x10000, 16).unwrap();
        for head in 0..usize::from(SIZE) / 2 {
            let header = DATA + 64 * head;
            ram.store_u64(header, 4, Relaxed);
            ram.store_u64(32 * head, header as u64, Relaxed);
            ram.store_u64(32 * head + 8, 16 | 1 << 32 | (2 * head as u64 + 1) << 48, Relaxed);
            ram.store_u64(32 * head + 16, header as u64 + 16, Relaxed);
            ram.store_u64(32 * head + 24, 1 | 2 << 32, Relaxed);
        }
        let [descriptors, available, used] = Ring::lengths(SIZE, true);
        let ring = Ring {
            descriptors: memory.window_at_user(0, descriptors, 16).unwrap(),
            available: memory.window_at_user(AVAILABLE as u64, available, 2).unwrap(),
            used: memory.window_at_user(USED as u64, used, 4).unwrap(),
            size: SIZE,
        };
        let event = if event_idx { 1 << 29 } else { 0 };
        let features = VirtioFeatures::offered(false).acknowledge(1 << 32 | event).unwrap();
        let info = DiskInfo {
            id: "queue".into(),
            capacity_sectors: 8,
            read_only: false,
            num_queues: 1,
            queue_size_max: SIZE,
            writeback: true,
        };
        let queue = Queue::new(QueueParts {
            ring,
            map: AddressMap::for_queue(memory),
            features,
            disk: Arc::new(Disk::new(info)),
            base: 0,
            used: 0,
            kick: kick.then(|| Arc::new(fds::eventfd().unwrap().into())),
            call: Arc::new(CallFd::new().unwrap()),
            inflight: None,
            recovered: Vec::new(),
            counters: Arc::default(),
            notice: Notice::new(Arc::new(fds::eventfd().unwrap().into())),
        });
        Fixture { queue: queue.unwrap(), ram }
    }

    impl Fixture {
        /// Makes `head` available as entry `index`.
        fn push(&self, index: u16, head: u16) {
            let slot = usize::from(index % SIZE);
            self.ram.store_u16(AVAILABLE + 4 + 2 * slot, head, Relaxed);
            self.ram.store_u16(AVAILABLE + 2, index.wrapping_add(1), Release);
        }

        fn pop(&mut self) -> Option<u16> {
            match self.queue.pop() {
                Popped::Request(request) => Some(request.head),
                Popped::Empty => None,
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn work_that_came_before_sleeping_is_seen() {
        for event_idx in [false, true] {
            let mut fixture = fixture(event_idx, true);
            fixture.queue.disable_kicks();
            assert_eq!(fixture.pop(), None);
            // Between the last look and the sleep, while the guest thinks that kicks are off.
            fixture.push(0, 2);
            assert!(fixture.queue.enable_kicks());
            assert_eq!(fixture.pop(), Some(2));
            assert!(!fixture.queue.enable_kicks(), "nothing more");
            fixture.queue.complete(2, Status::Done);
        }
    }

    #[test]
    fn a_queue_without_kicks_never_lets_its_poller_sleep() {
        assert!(fixture(true, false).queue.enable_kicks());
        assert!(!fixture(true, true).queue.enable_kicks());
    }

    #[test]
    fn a_request_put_back_comes_again_before_any_other() {
        let mut fixture = fixture(false, true);
        fixture.push(0, 4);
        fixture.push(1, 6);
        assert_eq!(fixture.pop(), Some(4));
        fixture.queue.put_back(4);
        assert!(fixture.queue.has_put_back() && fixture.queue.in_flight() == 1);
        assert!(fixture.queue.enable_kicks(), "it is work to do");
        assert_eq!((fixture.pop(), fixture.pop(), fixture.pop()), (Some(4), Some(6), None));
        fixture.queue.complete(6, Status::Done);
        fixture.queue.complete(4, Status::IoError);
        fixture.queue.publish();
        assert_eq!(fixture.ram.load_u16(USED + 2, Relaxed), 2);
        assert_eq!(fixture.ram.load_u8(DATA + 64 * 2 + 16, Relaxed), Status::IoError as u8);
    }

    #[test]
    fn completions_are_invisible_until_published() {
        let mut fixture = fixture(true, true);
        fixture.push(0, 0);
        assert_eq!(fixture.pop(), Some(0));
        fixture.queue.complete(0, Status::Done);
        assert_eq!(fixture.ram.load_u16(USED + 2, Relaxed), 0);
        fixture.queue.publish();
        assert_eq!(fixture.ram.load_u16(USED + 2, Relaxed), 1);
        assert_eq!(fixture.queue.counters().calls(), 1, "index 0 was asked for");
        fixture.queue.publish();
        assert_eq!(fixture.queue.counters().calls(), 1, "nothing new, no call");
    }

    #[test]
    #[should_panic(expected = "head 0 completed while not in flight")]
    fn completing_twice_is_our_bug() {
        let mut fixture = fixture(false, true);
        fixture.push(0, 0);
        fixture.pop();
        fixture.queue.complete(0, Status::Done);
        fixture.queue.complete(0, Status::Done);
    }
}

/// Every meeting of a guest with the poller of its ring, at the two places where one of them may go
/// to sleep: `make loom`. Real code on the device's side; the guest's follows virtio 1.2, 2.7.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::disk::DiskInfo;
    use crate::memory::{GuestMemory, Mapping, Window};
    use crate::sync::modelled::weakly;
    use loom::sync::{Condvar, Mutex};
    use loom::thread;
    use std::sync::atomic::Ordering::Acquire;

    const SIZE: u16 = 4;
    const FEATURES: u64 = 1 << 32;
    const EVENT_IDX: u64 = 1 << 29;

    /// The ring, from the guest's side or from ours.
    fn ring(mapping: &Arc<Mapping>) -> Ring {
        let window = |offset| Window::new(mapping, offset, 128).expect("it is that large");
        Ring { descriptors: window(0), available: window(128), used: window(256), size: SIZE }
    }

    fn memory() -> Arc<Mapping> {
        let file = nix::sys::memfd::memfd_create("model", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
        let file = file.expect("a memfd");
        nix::unistd::ftruncate(&file, 4096).expect("memory");
        Arc::new(Mapping::new(&file, 0, 4096).expect("it can be mapped"))
    }

    /// A queue whose guest makes chains of one empty descriptor: they are answered at once.
    fn queue(mapping: &Arc<Mapping>, features: u64) -> Queue {
        let event = || -> Arc<OwnedFd> { Arc::new(fds::eventfd().expect("an eventfd").into()) };
        let disk = DiskInfo {
            id: "model".into(),
            capacity_sectors: 8,
            read_only: false,
            num_queues: 1,
            queue_size_max: SIZE,
            writeback: true,
        };
        Queue::new(QueueParts {
            ring: ring(mapping),
            map: AddressMap::for_queue(Arc::<GuestMemory>::default()),
            features: VirtioFeatures::offered(false).acknowledge(features).expect("offered"),
            disk: Arc::new(Disk::new(disk)),
            base: 0,
            used: 0,
            kick: Some(event()),
            call: Arc::new(CallFd::new().expect("an eventfd")),
            inflight: None,
            recovered: Vec::new(),
            counters: Arc::default(),
            notice: Notice::new(event()),
        })
        .expect("a queue")
    }

    /// An eventfd. The kernel reads and writes its counter under a lock.
    #[derive(Default)]
    struct Bell(Mutex<bool>, Condvar);

    impl Bell {
        fn ring(&self) {
            *self.0.lock().expect("no holder panics") = true;
            self.1.notify_one();
        }

        /// Sleeps until it rings. The model calls a sleep that nobody ends a deadlock.
        fn wait(&self) {
            let mut rang = self.0.lock().expect("no holder panics");
            while !*rang {
                rang = self.1.wait(rang).expect("no holder panics");
            }
        }

        fn silence(&self) {
            *self.0.lock().expect("no holder panics") = false;
        }
    }

    /// The guest makes requests available, one after the other, and kicks when it is asked to. The
    /// poller sleeps at every chance.
    fn kicks(features: u64, requests: u16) {
        let mapping = memory();
        // Not the model's: dropping one of its own after a deadlock, which some tests want, aborts.
        let bell = Arc::new(Bell::default());
        let mut queue = queue(&mapping, features);
        queue.disable_kicks();
        let guest = {
            let (ring, bell) = (ring(&mapping), bell.clone());
            thread::spawn(move || {
                for index in 0..requests {
                    ring.available.store_u16(4 + 2 * usize::from(index), index, Relaxed);
                    ring.available.store_u16(2, index + 1, Release);
                    fence(SeqCst);
                    let wanted = if features & EVENT_IDX == 0 {
                        ring.used.load_u16(0, Relaxed) & USED_NO_NOTIFY == 0
                    } else {
                        let event = ring.used.load_u16(4 + 8 * usize::from(SIZE), Relaxed);
                        crossed(event, index, index + 1)
                    };
                    if wanted {
                        bell.ring();
                    }
                }
            })
        };
        let mut answered = 0;
        while answered < requests {
            match queue.pop() {
                Popped::Answered => answered += 1,
                Popped::Empty => {
                    if !queue.enable_kicks() {
                        bell.wait();
                    }
                    bell.silence();
                    queue.disable_kicks();
                }
                other => panic!("{other:?}"),
            }
        }
        guest.join().expect("it does not panic");
    }

    /// The guest asks for an interrupt and looks again, while the poller publishes what it asked
    /// for: it sees the used element, or it is interrupted.
    fn interrupts(features: u64) {
        let mapping = memory();
        let mut queue = queue(&mapping, features);
        let counters = queue.counters().clone();
        let guest = ring(&mapping);
        guest.available.store_u16(4, 0, Relaxed);
        guest.available.store_u16(0, AVAIL_NO_INTERRUPT, Relaxed); // It polls, so far.
        guest.available.store_u16(4 + 2 * usize::from(SIZE), 0x8000, Relaxed);
        guest.available.store_u16(2, 1, Release);
        let guest = thread::spawn(move || {
            guest.available.store_u16(0, 0, Relaxed);
            guest.available.store_u16(4 + 2 * usize::from(SIZE), 0, Relaxed);
            fence(SeqCst);
            guest.used.load_u16(2, Acquire) == 0 // It goes to sleep.
        });
        assert!(matches!(queue.pop(), Popped::Answered));
        queue.publish();
        let sleeps = guest.join().expect("it does not panic");
        assert!(!sleeps || counters.calls() == 1, "the guest sleeps and nobody calls");
    }

    #[test]
    fn a_request_always_wakes_a_poller_that_asked_for_kicks() {
        loom::model(|| kicks(FEATURES, 1));
        loom::model(|| kicks(FEATURES | EVENT_IDX, 1));
    }

    /// Every order with at most three changes from a thread that could go on.
    #[test]
    fn a_request_may_come_while_the_poller_wakes() {
        for features in [FEATURES, FEATURES | EVENT_IDX] {
            let mut builder = loom::model::Builder::new();
            builder.preemption_bound = Some(3);
            builder.check(move || kicks(features, 2));
        }
    }

    #[test]
    fn an_answer_is_seen_or_announced() {
        loom::model(|| interrupts(FEATURES));
        loom::model(|| interrupts(FEATURES | EVENT_IDX));
    }

    /// What the fences are for: without them, the model finds what is lost.
    #[test]
    #[should_panic(expected = "deadlock")]
    fn without_the_fences_a_kick_is_lost() {
        weakly(|| loom::model(|| kicks(FEATURES, 1)));
    }

    /// The second request: the index asked for first is that of the first one anyway.
    #[test]
    #[should_panic(expected = "deadlock")]
    fn without_the_fences_a_kick_by_event_index_is_lost() {
        weakly(|| loom::model(|| kicks(FEATURES | EVENT_IDX, 2)));
    }

    #[test]
    #[should_panic(expected = "nobody calls")]
    fn without_the_fences_an_interrupt_is_lost() {
        weakly(|| loom::model(|| interrupts(FEATURES)));
    }

    #[test]
    #[should_panic(expected = "nobody calls")]
    fn without_the_fences_an_interrupt_by_event_index_is_lost() {
        weakly(|| loom::model(|| interrupts(FEATURES | EVENT_IDX)));
    }
}
