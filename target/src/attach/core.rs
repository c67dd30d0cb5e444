//! What one reactor polls: its shard of the store and the queues of the guests it serves.
//!
//! Hot path. A turn takes few messages, admits requests of every volume in turn, lets the shard
//! work, answers what has finished, and shows each guest its answers once. Nothing here allocates,
//! locks or logs but what a control message brings with it.
//!
//! Invariants
//! - A request that was popped is in the shard or parked in its queue, never lost: a shard that is
//!   busy gets it again next turn.
//! - A queue leaves only when none of its requests is in flight, so that its guest's memory may be
//!   unmapped once it is handed back.

use super::counters::CoreCounters;
use super::limiter::{Limiter, Limiters, Removed, Throttled};

use super::memory::RegisteredMemory;
use super::orders::Orders;
use super::port::{Answer, CoreMessage, QueueSlot, Start};
use super::shares::{Admitted, Allowance, Shares};
use crate::limits::Limits;
use bessel_mapping::journal::Journal;
use bessel_mapping::message::Message;
use bessel_mapping::request::{
    Command, IoCompletion, IoKind, IoRequest, IoStatus, Reply, VolumeHandle,
};
use bessel_mapping::shard::Shard;
use bessel_reactor::clock::{Instant, SystemClock};
use bessel_reactor::device::{FileDevice, WatchId};
use bessel_reactor::inbox::{Full, Inbox, Sender};
use bessel_reactor::outliving::OutlivingMemory;
use bessel_reactor::poller::Poller;
use bessel_reactor::units::SECTOR_SIZE;
use bessel_vhost::{Popped, Queue, RequestKind, Status};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

/// Most messages of the control path taken in a turn. Data first.
const MESSAGES_PER_TURN: u32 = 4;
/// Most messages of other shards taken in a turn: guests' requests are among them.
const REQUESTS_PER_TURN: u32 = 64;
/// The watch on the inbox; queues have the numbers after it.
const INBOX_WATCH: WatchId = WatchId(0);

/// A queue that is polled here.
struct Attached {
    queue: Queue,
    volume: VolumeHandle,
    /// The request popped last was put back.
    parked: bool,
    /// The ring is unusable; what is in flight still completes.
    broken: bool,
    /// Somebody waits for the queue to drain.
    stopping: Option<SyncSender<Queue>>,
    /// Its volume is held.
    held: bool,
    /// Index of its volume's limiter, if that has one.
    limiter: Option<usize>,
}

/// A volume whose queues are not popped from, and who waits for what they had in flight.
struct Hold {
    volume: VolumeHandle,
    answer: Option<SyncSender<()>>,
}

/// A command that the shard has not answered.
struct Pending {
    answer: SyncSender<Answer>,
    arrived: Instant,
    snapshot: bool,
}

/// What a core is made of, but for its shard, which must be made on the core's own thread.
pub(crate) struct CoreSeat {
    pub(crate) inbox: Inbox<CoreMessage>,
    /// By shard; its own is there and not used.
    pub(crate) peers: Vec<Sender<CoreMessage>>,
    pub(crate) counters: Arc<CoreCounters>,
    pub(crate) clock: SystemClock,
    pub(crate) pin_guest_memory: bool,
    pub(crate) journal: (OutlivingMemory, Journal),
}

/// See the module's documentation.
pub(crate) struct Core {
    shard: Shard<FileDevice>,
    inbox: Inbox<CoreMessage>,
    peers: Vec<Sender<CoreMessage>>,
    /// To other shards whose inboxes were full, oldest first.
    outgoing: VecDeque<(usize, Message)>,
    /// By slot.
    queues: Vec<Option<Attached>>,
    shares: Shares,
    /// Few and short: operations of the control plane.
    holds: Vec<Hold>,
    limiters: Limiters,
    /// By ticket.
    commands: Vec<Option<Pending>>,
    memory: RegisteredMemory,
    /// Dropped after the shard, whose device reads their memory.
    orders: Orders,
    counters: Arc<CoreCounters>,
    clock: SystemClock,
    finished: bool,
    /// Dropped after the shard, which writes to it.
    _journal_memory: OutlivingMemory,
}

impl Core {
    /// Takes the seat. Call it on the thread that polls.
    pub(crate) fn new(mut shard: Shard<FileDevice>, seat: CoreSeat) -> Self {
        shard.device_mut().watch(seat.inbox.fd(), INBOX_WATCH);
        register_pools(&mut shard);
        let (journal_memory, journal) = seat.journal;
        shard.set_journal(journal);
        Self {
            shard,
            inbox: seat.inbox,
            peers: seat.peers,
            outgoing: VecDeque::with_capacity(REQUESTS_PER_TURN as usize),
            queues: Vec::new(),
            shares: Shares::default(),
            holds: Vec::new(),
            limiters: Limiters::default(),
            commands: Vec::new(),
            memory: RegisteredMemory::new(seat.pin_guest_memory),
            orders: Orders::default(),
            counters: seat.counters,
            clock: seat.clock,
            finished: false,
            _journal_memory: journal_memory,
        }
    }

    fn take_messages(&mut self, now: Instant) -> bool {
        let (mut taken, mut of_shards) = (0, 0);
        while taken - of_shards < u64::from(MESSAGES_PER_TURN)
            && of_shards < u64::from(REQUESTS_PER_TURN)
        {
            let Some(message) = self.inbox.pop() else { break };
            taken += 1;
            match message {
                CoreMessage::Command { command, answer } => self.begin(command, answer, now),
                CoreMessage::Start(start) => self.attach(*start),
                CoreMessage::Stop { slot, answer } => {
                    self.attached(slot.0 as usize).stopping = Some(answer);
                }
                CoreMessage::Hold { volume, answer } => {
                    self.holds.push(Hold { volume, answer: Some(answer) });
                    self.mark_held();
                }
                CoreMessage::Release { volume } => {
                    self.holds.retain(|hold| hold.volume != volume);
                    self.mark_held();
                }
                CoreMessage::Limit { volume, limits } => self.limit(volume, limits, now),
                CoreMessage::TakeLimits { volume, answer } => {
                    // The asker waits for the answer, so there is someone to take it and room for it.
                    let _ = answer.send(self.take_limits(volume, now));
                }
                CoreMessage::PutLimits { volume, limiter } => self.limiters.put(volume, *limiter),
                CoreMessage::Order(order) => self.orders.push(order),
                CoreMessage::Shard(message) => {
                    of_shards += 1;
                    self.shard.deliver(message);
                }
                CoreMessage::Finish => self.finished = true,
            }
        }
        // Most turns take none, and need not write.
        if taken > 0 {
            self.counters.messages.add(taken);
            let polled = &self.counters.device_polled;
            polled.add(self.shard.device_mut().polled() - polled.get());
        }
        taken > 0
    }

    fn begin(&mut self, command: Command, answer: SyncSender<Answer>, now: Instant) {
        let snapshot = matches!(command, Command::Snapshot { .. });
        let ticket = free_index(&mut self.commands);
        self.commands[ticket] = Some(Pending { answer, arrived: now, snapshot });
        self.shard.control(ticket as u64, command);
    }

    fn attach(&mut self, start: Start) {
        let Start { mut queue, volume, answer } = start;
        let slot = free_index(&mut self.queues);
        queue.disable_kicks();
        self.memory.attach(&mut queue, self.shard.device_mut());
        let kick = std::os::fd::AsRawFd::as_raw_fd(&queue.kick_fd());
        self.shard.device_mut().watch(kick, queue_watch(slot));
        self.queues[slot] = Some(Attached {
            queue,
            volume,
            parked: false,
            broken: false,
            stopping: None,
            held: false,
            limiter: self.limiters.attach(volume, slot),
        });
        self.shares.attach(volume, slot);
        self.mark_held();
        // The asker waits for the answer, so there is someone to take it and room for it.
        let _ = answer.send(QueueSlot(slot as u32));
    }

    fn mark_held(&mut self) {
        for attached in self.queues.iter_mut().flatten() {
            attached.held = self.holds.iter().any(|hold| hold.volume == attached.volume);
        }
    }

    /// Holds a volume to limits, or to none.
    fn limit(
        &mut self,
        volume: VolumeHandle,
        limits: Option<(Limits, Arc<Throttled>)>,
        now: Instant,
    ) {
        let queues = self.queues.iter_mut().enumerate();
        let of_volume = queues.filter_map(|(slot, attached)| {
            attached.as_mut().filter(|attached| attached.volume == volume).map(|it| (slot, it))
        });
        let Some((limits, throttled)) = limits else {
            of_volume.for_each(|(_, attached)| attached.limiter = None);
            let _ = self.take_limits(volume, now);
            return;
        };
        let slots: Vec<usize> = of_volume.map(|(slot, _)| slot).collect();
        let index = self.limiters.set(volume, limits, throttled, slots.clone(), now);
        for slot in slots {
            self.attached(slot).limiter = Some(index);
        }
    }

    /// Takes the limits of a volume away whose queues are not held to them any more.
    fn take_limits(&mut self, volume: VolumeHandle, now: Instant) -> Option<Box<Limiter>> {
        let Removed { limiter, moved } = self.limiters.remove(volume, now)?;
        if let Some((index, slots)) = moved {
            for slot in slots {
                let moved = self.queues[*slot].as_mut();
                moved.expect("a limiter names attached queues").limiter = Some(index);
            }
        }
        Some(Box::new(limiter))
    }

    /// Tells who has a volume held that it is quiet.
    fn answer_holds(&mut self) -> bool {
        let mut progress = false;
        for hold in &mut self.holds {
            let busy = |attached: &Attached| {
                attached.volume == hold.volume
                    && (attached.parked || attached.queue.in_flight() > 0)
            };
            if hold.answer.is_some() && !self.queues.iter().flatten().any(busy) {
                let answer = hold.answer.take().expect("just looked");
                // The asker waits for the answer, so there is someone to take it and room for it.
                let _ = answer.send(());
                progress = true;
            }
        }
        progress
    }

    fn attached(&mut self, slot: usize) -> &mut Attached {
        self.queues[slot].as_mut().expect("a slot is named only while its queue is attached")
    }

    /// Pops from the queues of every volume, a few requests each.
    fn admit_requests(&mut self, now: Instant) -> bool {
        let Self { shard, queues, shares, limiters, .. } = self;
        limiters.begin_turn(now, |slot| {
            let attached = queues[slot].as_ref();
            attached.is_some_and(|attached| attached.serves() && attached.queue.has_requests())
        });
        let waits = shares.begin_turn(|slot| {
            let attached = queues[slot].as_ref().expect("a share is of attached queues");
            let limiter = attached.limiter.map(|index| limiters.get(index));
            attached.waiting(slot, limiter, now)
        });
        waits
            && shares.serve(|slot, allowance| {
                let attached = queues[slot].as_mut().expect("a share is of attached queues");
                let limiter = attached.limiter.map(|index| limiters.get_mut(index));
                attached.admit(slot, shard, limiter, allowance, now)
            })
    }

    fn finish_requests(&mut self) -> bool {
        let mut progress = false;
        while let Some(completion) = self.shard.pop_completion() {
            progress = true;
            if self.orders.finish(completion.tag, completion.status) {
                continue;
            }
            if completion.status == IoStatus::NoSpace {
                self.counters.no_space.add(1);
            }
            let slot = (completion.tag >> 16) as usize;
            self.attached(slot).finish(&completion);
        }
        for attached in self.queues.iter_mut().flatten() {
            attached.queue.publish();
        }
        progress
    }

    /// Replies wait for the messages sent before them: whoever hears that a shard has shut down may
    /// rely on the blocks it gave back being with the authority.
    fn answer_commands(&mut self) -> bool {
        let mut progress = false;
        if !self.outgoing.is_empty() {
            return progress;
        }
        while let Some((ticket, reply)) = self.shard.pop_reply() {
            progress = true;
            let pending = self.commands[ticket as usize].take();
            let pending = pending.expect("a shard answers each command once");
            // Read anew: with inline I/O a command takes its time within a turn.
            let latency = self.clock.now().since(pending.arrived);
            if pending.snapshot && matches!(reply, Reply::Snapshot(_)) {
                self.counters.snapshot_latency_ns.record_duration(latency);
            }
            let _ = pending.answer.send(Answer { reply, latency });
        }
        progress
    }

    fn pass_messages_on(&mut self) -> bool {
        while let Some(message) = self.shard.pop_message() {
            self.outgoing.push_back(message);
        }
        let mut progress = false;
        while let Some((shard, message)) = self.outgoing.pop_front() {
            match self.peers[shard].send(CoreMessage::Shard(message)) {
                Ok(()) => progress = true,
                Err(Full(CoreMessage::Shard(message))) => {
                    self.outgoing.push_front((shard, message));
                    break;
                }
                Err(Full(_)) => unreachable!("the message that was sent comes back"),
            }
        }
        progress
    }

    fn hand_back_queues(&mut self) -> bool {
        let mut progress = false;
        for slot in 0..self.queues.len() {
            let drained = |attached: &Attached| {
                attached.stopping.is_some() && !attached.parked && attached.queue.in_flight() == 0
            };
            if !self.queues[slot].as_ref().is_some_and(drained) {
                continue;
            }
            progress = true;
            let mut attached = self.queues[slot].take().expect("it is there: it has drained");
            let device = self.shard.device_mut();
            device.unwatch(queue_watch(slot));
            self.memory.detach(&mut attached.queue, device);
            if let Some(index) = attached.limiter {
                self.limiters.detach(index, slot);
            }
            self.shares.detach(attached.volume, slot);
            let asker = attached.stopping.expect("it is stopping: it has drained");
            let _ = asker.send(attached.queue);
        }
        progress
    }
}

impl Poller for Core {
    fn poll(&mut self, now: Instant) -> bool {
        let mut progress = self.take_messages(now);
        // One, and before the guests' requests: many of those could keep it out for ever.
        progress |= self.orders.admit(&mut self.shard);
        progress |= self.admit_requests(now);
        progress |= self.shard.poll(now);
        progress |= self.finish_requests(); // Frees the shard's slots and queue heads.
        self.shard.guests_answered();
        progress |= self.pass_messages_on();
        progress |= self.answer_commands();
        progress |= self.hand_back_queues();
        progress |= !self.holds.is_empty() && self.answer_holds();
        progress
    }

    fn prepare_sleep(&mut self) -> bool {
        let mut idle = self.outgoing.is_empty() && self.inbox.prepare_sleep();
        for attached in self.queues.iter_mut().flatten() {
            // What waits for its limit is no work until the deadline.
            let limiter = attached.limiter.map(|index| self.limiters.get(index));
            let waits = limiter.is_some_and(|limiter| limiter.deadline().is_some());
            // Asked of every queue, also once there is work: `woken` takes all of it back.
            idle &= waits || !(attached.serves() && attached.queue.enable_kicks());
        }
        idle
    }

    fn woken(&mut self, woken: &[WatchId]) {
        self.inbox.woken();
        for WatchId(watch) in woken.iter().filter(|watch| **watch != INBOX_WATCH) {
            // A queue may have been handed back since the kernel was asked.
            if let Some(Some(attached)) = self.queues.get(*watch as usize - 1) {
                attached.queue.drain_kick();
            }
        }
        for attached in self.queues.iter_mut().flatten() {
            attached.queue.disable_kicks();
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let serving = self.queues.iter().flatten().filter(|attached| attached.serves());
        let limited =
            serving.filter_map(|attached| self.limiters.get(attached.limiter?).deadline());
        limited.chain(self.shard.deadline()).min()
    }

    fn device(&mut self) -> &mut FileDevice {
        self.shard.device_mut()
    }

    fn finished(&self) -> bool {
        self.finished
    }
}

/// Registers the shard's own memory with its device, as far as that is possible. At the start, since
/// no buffer of a pool may be lent meanwhile.
fn register_pools(shard: &mut Shard<FileDevice>) {
    let pools = shard.buffer_pools().map(|pool| pool.whole());
    for (index, whole) in pools.iter().enumerate() {
        if let Some(registration) = shard.device_mut().register_buffer(whole) {
            shard.buffer_pools()[index].set_registration(registration);
        }
    }
}

impl Attached {
    /// Still pops from its ring.
    fn serves(&self) -> bool {
        !self.broken && !self.held && self.stopping.is_none()
    }

    /// Requests that may be popped in this turn, as far as a look tells: 0 only if none may.
    fn waiting(&self, slot: usize, limiter: Option<&Limiter>, now: Instant) -> u32 {
        let some = self.parked || (self.serves() && self.queue.has_requests());
        let may = |limiter: &Limiter| self.queue.owes() || limiter.admits(slot, now);
        if some && limiter.is_none_or(may) { self.queue.waiting().max(1) } else { 0 }
    }

    /// Hands requests of the queue to the shard. One that is stopping gives only what it parked.
    fn admit(
        &mut self,
        slot: usize,
        shard: &mut Shard<FileDevice>,
        mut limiter: Option<&mut Limiter>,
        allowance: &mut Allowance,
        now: Instant,
    ) -> Admitted {
        let mut admitted = Admitted::Nothing;
        if self.parked && !shard.has_room(self.volume) {
            return Admitted::Busy; // As it was the last time, without taking it from the ring again.
        }
        while !allowance.is_spent() && (self.serves() || self.parked) {
            // What was in flight before goes: somebody may wait for the queue to drain.
            if let Some(limiter) = &limiter
                && !self.queue.owes()
                && !limiter.admits(slot, now)
            {
                break;
            }
            let request = match self.queue.pop() {
                Popped::Request(request) => request,
                Popped::Answered => {
                    allowance.take(0);
                    if let Some(limiter) = &mut limiter {
                        limiter.charge(0, now);
                    }
                    admitted = Admitted::Something;
                    continue;
                }
                Popped::Empty => break,
                Popped::Broken(_) => {
                    // The session learns of it from the queue itself, and says so.
                    self.broken = true;
                    break;
                }
            };
            let head = request.head;
            // What moves none is a request like others, and no more.
            let bytes = match request.kind {
                RequestKind::Read | RequestKind::Write => request.sectors * SECTOR_SIZE,
                RequestKind::Flush | RequestKind::Discard | RequestKind::WriteZeroes { .. } => 0,
            };
            let submitted = shard.submit(&IoRequest {
                tag: tag(slot, head),
                volume: self.volume,
                kind: io_kind(request.kind),
                sector: request.sector,
                sectors: request.sectors,
                segments: request.segments,
            });
            if submitted.is_err() {
                self.queue.put_back(head);
                self.parked = true;
                return Admitted::Busy;
            }
            self.parked = false;
            admitted = Admitted::Something;
            allowance.take(bytes);
            if let Some(limiter) = &mut limiter {
                limiter.charge(bytes, now);
            }
        }
        admitted
    }

    fn finish(&mut self, completion: &IoCompletion) {
        let status = match completion.status {
            IoStatus::Done => Status::Done,
            IoStatus::Refused | IoStatus::NoSpace | IoStatus::Failed => Status::IoError,
        };
        self.queue.complete(completion.tag as u16, status);
    }
}

fn io_kind(kind: RequestKind) -> IoKind {
    match kind {
        RequestKind::Read => IoKind::Read,
        RequestKind::Write => IoKind::Write,
        RequestKind::Flush => IoKind::Flush,
        RequestKind::Discard => IoKind::Discard,
        // Blocks that read as zero are always deallocated here; `unmap` only permits it.
        RequestKind::WriteZeroes { .. } => IoKind::WriteZeroes,
    }
}

/// The shard's name for a request: slot above, head in the low 16 bits.
fn tag(slot: usize, head: u16) -> u64 {
    (slot as u64) << 16 | u64::from(head)
}

fn queue_watch(slot: usize) -> WatchId {
    WatchId(slot as u32 + 1)
}

/// The first free place, made if there is none.
pub(super) fn free_index<T>(places: &mut Vec<Option<T>>) -> usize {
    match places.iter().position(Option::is_none) {
        Some(index) => index,
        None => {
            places.push(None);
            places.len() - 1
        }
    }
}
