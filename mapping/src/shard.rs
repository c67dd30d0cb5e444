//! A shard: the volumes of one reactor, and the turn that moves all of them.
//!
//! It owns no thread, clock, file or socket. Requests and commands go in, completions and replies
//! come out, and in between [`Shard::poll`] reaps the device, runs what can be run, and submits.
//! The reactor calls it with a real device and clock; the simulator with a simulated disk and the
//! time its seed says. Nothing here runs inside the reaping of completions: they are collected
//! first, then acted on.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bessel_reactor::buffer::{Buffer, BufferPool, Segment};
use bessel_reactor::clock::Instant;
use bessel_reactor::device::{Completion, Device, DeviceError, SEGMENTS_MAX, Token};
use bessel_reactor::units::{BLOCK_SIZE, ByteCount};

use crate::claims::{Claims, Taken};
use crate::commit::{ImageWrite, Unwritten};
use crate::control::{Barrier, Pending};
use crate::extents::{Authority, Step};
use crate::flusher::{FlushWaiter, Flusher};
use crate::format::{ExtentMap, Geometry, TagKey};
use crate::journal::{Change, Entry as JournalEntry, Journal};
use crate::log_loads::{LOG_LOADS_MAX, LogLoads};
use crate::message::{BlockKind, Forwarded, Message};
use crate::nodes::cache::{FrameId, NodeCache};
use crate::pipeline::{BOUNCE_BYTES, Piece, Request, WaitingOnNode, Work};
use crate::planted::{self, Bug};
use crate::request::{CommandError, IoCompletion, Reply, ShardStats, VolumeHandle, VolumeId};
use crate::shared::LeafTable;
use crate::slab::Slab;
use crate::store::OpenedStore;
use crate::visits::Visits;
use crate::volume::Volume;

/// How long a change may wait in writeback mode before a round takes it to the device.
const COMMIT_INTERVAL: Duration = Duration::from_millis(200);
/// How soon to look again whether another shard has heard of its flush, when one here waits for that:
/// after as long as it has waited, within these bounds.
const HELD_FLUSH_LOOK: [Duration; 2] = [Duration::from_micros(20), Duration::from_millis(10)];
/// Least time between two log lines about failing I/O.
const LOG_INTERVAL: Duration = Duration::from_secs(1);
/// Node reads in flight.
const LOADS_MAX: usize = 64;
/// Image buffers for what commands seal: three for a snapshot, so about 80 of those in flight.
const SEALED_IMAGES: usize = 256;
/// Requests of other shards' volumes at once: some deep queues. More wait in their rings.
const VISITS_MAX: usize = 1024;
/// Device operations that each of those has at most.
pub(crate) const PIECES_OF_A_VISIT: usize = 2;
/// Most bounce buffers: unaligned or partial pieces in flight.
const BOUNCES: usize = 64;
/// Segments of a request for which room is made at start.
const SEGMENTS_EXPECTED: usize = 130;

/// Blocks that a volume may give back for each step that it has: both take about as long.
pub(crate) const RELEASES_PER_STEP: u32 = 2;

/// What a shard is made with.
#[derive(Clone, Debug)]
pub struct ShardConfig {
    /// Its number; shard 0 is the allocation authority.
    pub index: usize,
    /// Bound of its node cache.
    pub node_cache: ByteCount,
    /// Most guest requests at once; more are refused as busy.
    pub requests_max: usize,
    /// Leaves of 4 KiB whose copies other shards can see; none, when they serve no queues of its volumes.
    pub shared_leaves: usize,
    /// What one volume may have done in a turn: [`ShardConfig::STEPS_PER_TURN`], or less to see what comes
    /// of it.
    pub steps_per_turn: u32,
}

impl ShardConfig {
    /// Steps of one volume in a turn, so that a discard of terabytes lets others in between. A step is as
    /// much work as a small request. The first one of a read or a write is none of these: how many of them
    /// come in a turn is for whoever submits them.
    pub const STEPS_PER_TURN: u32 = 256;

    /// Device operations that the shard may have in flight: open its device with this depth.
    pub fn device_depth(&self) -> usize {
        let images = images_for(self.node_cache);
        // Pieces, node and log loads, images of rounds and of commands, the authority, a flush.
        let own = self.pieces_max() + LOADS_MAX + LOG_LOADS_MAX + images + SEALED_IMAGES + 2;
        own + self.visits_max() * PIECES_OF_A_VISIT
    }

    /// Requests of other shards' volumes at once.
    fn visits_max(&self) -> usize {
        if self.shared_leaves == 0 { 0 } else { self.requests_max.min(VISITS_MAX) }
    }

    /// Most images of nodes that are written in a turn: a seventh of the largest round, or 73 with a
    /// cache of 32 MiB and more. On tmpfs an image takes 2 to 3 µs and the requests of a turn 70 to
    /// 150 µs, so that neither the turn nor the round gets much longer by the other.
    pub fn images_per_turn(&self) -> usize {
        dirty_max(images_for(self.node_cache)) / 7
    }

    fn pieces_max(&self) -> usize {
        self.requests_max * 2
    }
}

/// Image buffers for rounds: an eighth of the cache, so that a round takes its images at once.
fn images_for(node_cache: ByteCount) -> usize {
    (node_cache.blocks_floor() as usize / 8).clamp(32, 1024)
}

/// Nodes of one volume that may be changed and not imaged, with so many image buffers: what a round
/// takes at most, so that there is room for another's.
const fn dirty_max(images: usize) -> usize {
    images / 2
}

/// What a device operation is part of; the upper half of its token.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum TokenKind {
    /// A piece of a guest's request.
    Piece,
    /// The read of a node into a frame.
    Node,
    /// The write of an image.
    Image,
    /// The shared flush.
    Flush,
    /// The allocation authority's one I/O.
    Authority,
    /// The read of a block of a snapshot log.
    Log,
    /// A guest's request of a volume that is open on another shard, or a part of it.
    Visit,
}

impl TokenKind {
    const ALL: [Self; 7] = [
        Self::Piece,
        Self::Node,
        Self::Image,
        Self::Flush,
        Self::Authority,
        Self::Log,
        Self::Visit,
    ];

    pub(crate) const fn token(self, index: u32) -> Token {
        Token((self as u64) << 32 | index as u64)
    }

    fn of(token: Token) -> (Self, u32) {
        (Self::ALL[(token.0 >> 32) as usize], token.0 as u32)
    }
}

/// Whether a shard's device operation moves a volume's data, and not what maps it.
pub fn is_data(token: Token) -> bool {
    matches!(TokenKind::of(token).0, TokenKind::Piece | TokenKind::Visit)
}

/// See the module's documentation.
///
/// Hot path, owned by one reactor: after [`Shard::new`] the steady state allocates nothing.
#[derive(Debug)]
pub struct Shard<D: Device> {
    pub(crate) index: usize,
    pub(crate) device: D,
    pub(crate) geometry: Geometry,
    pub(crate) key: TagKey,
    pub(crate) secret: u64,
    pub(crate) epoch: u64,
    pub(crate) extents: ExtentMap,
    pub(crate) offset_alignment: usize,
    pub(crate) memory_alignment: usize,
    pub(crate) keeps_data: bool,
    pub(crate) now: Instant,

    pub(crate) volumes: Vec<Option<Volume>>,
    pub(crate) cache: NodeCache,
    pub(crate) claims: Claims,
    pub(crate) authority: Option<Authority>,
    pub(crate) flusher: Flusher,
    /// What the device said of the flush that is to be judged.
    flush_result: Result<(), DeviceError>,
    flush_ended: Instant,
    pub(crate) journal: Option<Journal>,

    pub(crate) requests: Slab<Request>,
    /// Guest memory of each request, by its slot.
    pub(crate) segments: Vec<Vec<Segment>>,
    pub(crate) pieces: Slab<Piece>,
    pub(crate) bounces: BufferPool,
    /// Segments of the I/O being built.
    pub(crate) scratch: Vec<Segment>,

    pub(crate) loads: BufferPool,
    /// The buffer each loading frame is read into, and the volume whose request began it.
    pub(crate) loading: Vec<Option<(Buffer, Option<VolumeHandle>)>>,
    pub(crate) parked_on_nodes: Vec<WaitingOnNode>,
    /// Work whose node cannot be had: it fails before this turn ends.
    pub(crate) doomed: Vec<(Work, CommandError)>,
    pub(crate) double_uses: u64,
    pub(crate) log_loads: LogLoads,

    pub(crate) images: BufferPool,
    pub(crate) sealed_images: BufferPool,
    pub(crate) image_writes: Slab<ImageWrite>,
    pub(crate) round_queue: VecDeque<VolumeHandle>,
    /// Volumes whose round in flight has images of nodes to write now.
    pub(crate) image_queue: VecDeque<VolumeHandle>,
    pub(crate) images_per_turn: usize,
    /// Number of the first round of a volume that is opened now: above those of all that were closed,
    /// whose nodes may still be cached and say in which round they changed last.
    pub(crate) first_round: u64,
    /// Empty lists kept for reuse.
    pub(crate) frame_lists: Vec<Vec<FrameId>>,
    pub(crate) image_lists: Vec<VecDeque<Unwritten>>,
    /// Nodes changed and not imaged, of all volumes.
    pub(crate) dirty_nodes: usize,
    pub(crate) dirty_nodes_max: usize,
    /// The same bound for one volume.
    pub(crate) dirty_max: usize,
    background_at: Option<Instant>,

    /// To be run in this turn.
    pub(crate) runnable: VecDeque<Work>,
    /// Number of the turn, from 1.
    pub(crate) turn: u64,
    pub(crate) steps_per_turn: u32,
    /// Volumes of which requests have run out of steps, each once.
    pub(crate) broken_off: VecDeque<VolumeHandle>,
    /// To be run when something was released.
    pub(crate) parked: Vec<Work>,
    /// Something that parked work may wait for has been given back.
    pub(crate) released: bool,
    /// Volumes that have more to give back than a turn's share, each once.
    pub(crate) releasing: Vec<VolumeHandle>,
    pub(crate) commands: VecDeque<Pending>,
    pub(crate) commands_ready: bool,
    /// Volumes that have latched since the shard was made, whatever became of them.
    pub(crate) have_failed: Vec<VolumeId>,
    /// How often a volume has latched.
    pub(crate) failures: u64,
    /// Barriers that have not been passed, oldest first.
    pub(crate) barriers: Vec<Barrier>,

    /// What other shards see of the volumes that are shared.
    pub(crate) shared_leaves: Option<Arc<LeafTable>>,
    pub(crate) shared: Vec<VolumeHandle>,
    /// Those of them of which something waits for visitors.
    pub(crate) watched: Vec<VolumeHandle>,
    /// Since when something has been waiting for requests of visitors.
    pub(crate) visitors_awaited_since: Option<Instant>,
    /// Requests that visitors have sent and that have no slot yet.
    pub(crate) forwarded: VecDeque<Forwarded>,
    /// Those that have one.
    pub(crate) forwarded_active: usize,
    /// Empty lists, to go back with answers.
    pub(crate) spare_segments: Vec<Vec<Segment>>,
    pub(crate) visits: Visits,

    pub(crate) done: VecDeque<IoCompletion>,
    pub(crate) replies: VecDeque<(u64, Reply)>,
    pub(crate) outbox: VecDeque<(usize, Message)>,
    completions: Vec<Completion>,
    pub(crate) counters: ShardStats,
    logged_at: Option<Instant>,
}

impl<D: Device> Shard<D> {
    /// A shard with no volume open. The device must have been opened with
    /// [`ShardConfig::device_depth`].
    pub fn new(config: &ShardConfig, device: D, store: &OpenedStore) -> Self {
        assert!(config.steps_per_turn > 0, "a volume that may have nothing done never ends");
        let properties = device.properties();
        let cache = NodeCache::new(config.node_cache);
        let images = images_for(config.node_cache);
        let frames = cache.capacity();
        let pieces_max = config.pieces_max();
        let authority =
            (config.index == 0).then(|| Authority::new(store, TokenKind::Authority.token(0)));
        let list = || VecDeque::with_capacity(images);
        Self {
            index: config.index,
            geometry: store.geometry,
            key: store.key,
            secret: store.secret,
            epoch: store.epoch,
            extents: store.extents.clone(),
            offset_alignment: properties.offset_alignment as usize,
            memory_alignment: properties.memory_alignment as usize,
            keeps_data: properties.keeps_data,
            now: Instant::default(),
            volumes: Vec::new(),
            claims: Claims::new(store.geometry.extent_blocks),
            authority,
            flusher: Flusher::new(
                properties.volatile_cache,
                config.requests_max + 64,
                config.index,
                Arc::clone(&store.flushes),
            ),
            flush_result: Ok(()),
            flush_ended: Instant::default(),
            journal: None,
            requests: Slab::new(config.requests_max),
            segments: (0..config.requests_max)
                .map(|_| Vec::with_capacity(SEGMENTS_EXPECTED))
                .collect(),
            pieces: Slab::new(pieces_max),
            bounces: BufferPool::new(BOUNCES.min(pieces_max), BOUNCE_BYTES),
            scratch: Vec::with_capacity(SEGMENTS_MAX),
            loads: BufferPool::new(LOADS_MAX, BLOCK_SIZE as usize),
            loading: (0..frames).map(|_| None).collect(),
            parked_on_nodes: Vec::with_capacity(config.requests_max + pieces_max),
            doomed: Vec::new(),
            double_uses: 0,
            log_loads: LogLoads::new(),
            images: BufferPool::new(images, BLOCK_SIZE as usize),
            sealed_images: BufferPool::new(SEALED_IMAGES, BLOCK_SIZE as usize),
            image_writes: Slab::new(images + SEALED_IMAGES),
            round_queue: VecDeque::with_capacity(64),
            image_queue: VecDeque::with_capacity(64),
            images_per_turn: config.images_per_turn(),
            first_round: 1,
            frame_lists: (0..8).map(|_| Vec::with_capacity(images)).collect(),
            image_lists: (0..8).map(|_| list()).collect(),
            dirty_nodes: 0,
            dirty_nodes_max: frames / 4,
            dirty_max: dirty_max(images),
            background_at: None,
            runnable: VecDeque::with_capacity(config.requests_max + pieces_max),
            turn: 0,
            steps_per_turn: config.steps_per_turn,
            broken_off: VecDeque::with_capacity(config.requests_max),
            parked: Vec::with_capacity(config.requests_max + pieces_max),
            released: false,
            releasing: Vec::with_capacity(64),
            commands: VecDeque::new(),
            commands_ready: false,
            have_failed: Vec::new(),
            failures: 0,
            barriers: Vec::new(),
            shared_leaves: (config.shared_leaves > 0)
                .then(|| Arc::new(LeafTable::new(config.shared_leaves))),
            shared: Vec::new(),
            watched: Vec::new(),
            visitors_awaited_since: None,
            forwarded: VecDeque::with_capacity(VISITS_MAX),
            forwarded_active: 0,
            spare_segments: Vec::with_capacity(config.requests_max),
            visits: Visits::new(config.visits_max()),
            done: VecDeque::with_capacity(config.requests_max + config.visits_max()),
            replies: VecDeque::new(),
            outbox: VecDeque::with_capacity(VISITS_MAX),
            completions: Vec::with_capacity(config.device_depth()),
            counters: ShardStats::default(),
            logged_at: None,
            cache,
            device,
        }
    }

    /// The device, for what the reactor does with it besides I/O.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// The pools that data goes through, to register with the device; set the registration on each.
    pub fn buffer_pools(&mut self) -> [&mut BufferPool; 4] {
        [&mut self.bounces, &mut self.loads, &mut self.images, &mut self.sealed_images]
    }

    /// From now on notes every change of a mapping in `journal`, so that it outlives the process.
    /// Its memory must live at least as long as the shard.
    pub fn set_journal(&mut self, journal: Journal) {
        self.journal = Some(journal);
    }

    /// One turn. True when anything was done, or is left to do without waiting for the device.
    pub fn poll(&mut self, now: Instant) -> bool {
        self.now = now;
        self.turn += 1;
        let mut progress = self.leave_visits();
        progress |= self.take_completions();
        if !self.watched.is_empty() || self.visitors_awaited_since.is_some() {
            self.look_at_visitors();
        }
        if !self.forwarded.is_empty() {
            progress |= self.admit_forwarded();
        }
        progress |= self.run_visits();
        if self.flusher.is_held() {
            self.judge_flush();
        }
        self.release_more();
        self.go_on();
        progress |= self.run_all();
        if self.commands_ready {
            progress = true;
            self.try_commands();
            self.run_all();
        }
        if self.background_at.is_some_and(|due| due <= now) {
            self.commit_in_background();
        }
        self.start_rounds();
        self.start_log_loads();
        let images_left = self.write_images();
        self.pass_barriers();
        self.send_claims();
        self.poll_authority();
        if self.flusher.start() {
            self.counters.flushes += 1;
            self.device.flush(TokenKind::Flush.token(0));
        }
        if self.device.submit() {
            // What these bring to do is done in the next turn.
            progress |= self.take_completions();
        }
        let left = !(self.broken_off.is_empty() && self.releasing.is_empty());
        progress || self.released || self.commands_ready || images_left || left
    }

    /// Tells that guests have been shown the completions that were popped. Call it before anybody is told
    /// that a queue is quiet; what does not happen here happens in the next turn.
    pub fn guests_answered(&mut self) {
        self.leave_visits();
    }

    /// Blocks found to be free and in use at once. None ever is, on a store that is not damaged.
    pub fn double_uses(&self) -> u64 {
        let freed_twice = self.authority.as_ref().map_or(0, |authority| authority.double_frees);
        self.double_uses + freed_twice
    }

    /// When [`Shard::poll`] must be called at the latest, if nothing else happens.
    pub fn deadline(&self) -> Option<Instant> {
        let held = self.flusher.is_held().then(|| {
            let [least, most] = HELD_FLUSH_LOOK;
            self.now.after(self.now.since(self.flush_ended).clamp(least, most))
        });
        let visitors = self.visitors_awaited_since.map(|since| {
            let [least, most] = HELD_FLUSH_LOOK;
            self.now.after(self.now.since(since).clamp(least, most))
        });
        held.into_iter().chain(self.background_at).chain(visitors).min()
    }

    /// A guest request that has ended.
    pub fn pop_completion(&mut self) -> Option<IoCompletion> {
        self.done.pop_front()
    }

    /// A command that has been answered: its ticket and the answer.
    pub fn pop_reply(&mut self) -> Option<(u64, Reply)> {
        self.replies.pop_front()
    }

    /// A message for another shard.
    pub fn pop_message(&mut self) -> Option<(usize, Message)> {
        self.outbox.pop_front()
    }

    /// Takes a message from another shard.
    pub fn deliver(&mut self, message: Message) {
        match message {
            Message::Granted { kind, runs } => {
                if self.claims.granted(kind, &runs, self.now) {
                    self.counters.store_full += 1;
                    if self.may_log() {
                        tracing::error!(
                            "the store is full: no free {} block; writes that need one fail until \
                             guests discard (fstrim) blocks that no snapshot has, or what was \
                             deleted is collected (`bessel gc`); a store cannot grow",
                            kind.name()
                        );
                    }
                }
                self.released = true;
            }
            Message::Forward(forwarded) => self.forwarded.push_back(forwarded),
            Message::Ended { request, status, segments } => {
                self.forwarded_ended(request, status, segments);
            }
            request => {
                let authority = self.authority.as_mut();
                authority.expect("claims and returns go to shard 0").accept(request);
            }
        }
    }

    /// True when the volume is open and has latched: see `CommandError::Latched`.
    pub fn is_latched(&self, handle: VolumeHandle) -> bool {
        let volume = self.volumes.get(handle.0 as usize).and_then(Option::as_ref);
        volume.is_some_and(|volume| volume.latched.is_some())
    }

    pub(crate) fn volume(&self, handle: VolumeHandle) -> &Volume {
        self.volumes[handle.0 as usize].as_ref().expect("the volume is open")
    }

    pub(crate) fn volume_mut(&mut self, handle: VolumeHandle) -> &mut Volume {
        self.volumes[handle.0 as usize].as_mut().expect("the volume is open")
    }

    pub(crate) fn volume_if_open(&mut self, handle: VolumeHandle) -> Option<&mut Volume> {
        self.volumes.get_mut(handle.0 as usize)?.as_mut()
    }

    pub(crate) fn open_volumes(&self) -> impl Iterator<Item = VolumeHandle> {
        self.volumes.iter().flatten().map(|volume| volume.handle)
    }

    /// True at most once a second: failing I/O must not flood the log.
    pub(crate) fn may_log(&mut self) -> bool {
        let due = self.logged_at.is_none_or(|at| self.now.since(at) >= LOG_INTERVAL);
        if due {
            self.logged_at = Some(self.now);
        }
        due
    }

    fn take_completions(&mut self) -> bool {
        let mut completions = std::mem::take(&mut self.completions);
        self.device.reap(&mut completions);
        let progress = !completions.is_empty();
        self.released |= progress;
        for Completion { token, result } in completions.drain(..) {
            self.completed(token, result);
        }
        self.completions = completions;
        progress
    }

    fn completed(&mut self, token: Token, result: Result<(), DeviceError>) {
        let (kind, index) = TokenKind::of(token);
        match kind {
            TokenKind::Piece => self.piece_completed(index, result),
            TokenKind::Node => self.node_loaded(FrameId(index), result),
            TokenKind::Image => self.image_written(index, result),
            TokenKind::Flush => self.flush_completed(result),
            TokenKind::Log => self.log_loaded(index, result),
            TokenKind::Visit => self.visit_completed(index, result),
            TokenKind::Authority => {
                let authority = self.authority.as_mut().expect("it submitted the I/O");
                let step = authority.completed(result, &mut self.device);
                self.authority_step(step);
            }
        }
    }

    fn flush_completed(&mut self, result: Result<(), DeviceError>) {
        if planted::is(Bug::FlushRetried) && result.is_err() {
            return self.device.flush(TokenKind::Flush.token(0));
        }
        self.flusher.end(result.is_ok());
        self.flush_result = result;
        self.flush_ended = self.now;
        self.judge_flush();
    }

    /// Serves everyone whose flush has ended. After a failed one, what any volume has written since
    /// the last good one is unknown (DESIGN §4).
    fn judge_flush(&mut self) {
        let Some(good) = self.flusher.judge() else { return };
        let this_one = std::mem::replace(&mut self.flush_result, Ok(()));
        let result = match this_one {
            Ok(()) if !good => Err(DeviceError::FlushFailedElsewhere),
            result => result,
        };
        if let Err(error) = result {
            self.counters.device_errors += 1;
            self.counters.flush_failures += u64::from(this_one.is_err());
            if let Some(authority) = &mut self.authority {
                authority.doubt();
            }
            for at in 0..self.shared.len() {
                self.note_visitors_writes(self.shared[at]);
            }
            let flusher = &self.flusher;
            let unsure = self
                .volumes
                .iter()
                .flatten()
                .filter(|volume| volume.write_mark.is_some_and(|mark| !flusher.covers(mark)));
            let unsure: Vec<VolumeHandle> = unsure.map(|volume| volume.handle).collect();
            for handle in unsure {
                self.latch(handle, &format!("the device failed to flush ({error})"));
            }
        }
        if planted::is(Bug::LatchClearedByFlush) && result.is_ok() {
            self.volumes.iter_mut().flatten().for_each(|volume| volume.latched = None);
        }
        while let Some(waiter) = self.flusher.served() {
            match waiter {
                FlushWaiter::Round(handle) => self.round_flushed(handle, result.is_ok()),
                FlushWaiter::Request(index) => {
                    if let Err(error) = result {
                        self.fail_work(
                            Work::Request(index),
                            &crate::request::CommandError::Device(error),
                        );
                    } else {
                        self.runnable.push_back(Work::Request(index));
                    }
                }
                FlushWaiter::Authority => {
                    let authority = self.authority.as_mut().expect("it asked for the flush");
                    let step = authority.flushed(result, &mut self.device);
                    self.authority_step(step);
                }
                FlushWaiter::Command(ticket) => self.device_flushed(ticket, this_one),
                // The command is tried again; the volume is latched by now if it failed.
                FlushWaiter::Close(_) => self.released = true,
            }
        }
    }

    /// Runs what is runnable, and what was parked for as long as something is released.
    fn run_all(&mut self) -> bool {
        let mut progress = false;
        loop {
            while let Some(work) = self.runnable.pop_front() {
                progress = true;
                self.run(work);
            }
            if !self.doomed.is_empty() {
                progress = true;
                self.fail_doomed();
            }
            if !std::mem::take(&mut self.released) {
                return progress;
            }
            self.commands_ready |= !self.commands.is_empty();
            self.runnable.extend(self.parked.drain(..));
            if self.runnable.is_empty() {
                return progress;
            }
        }
    }

    /// Asks for rounds of every volume: only they make room for more changed nodes.
    pub(crate) fn want_all_commits(&mut self) {
        for index in 0..self.volumes.len() {
            if let Some(volume) = &self.volumes[index]
                && !volume.dirty.is_empty()
            {
                self.want_commit(VolumeHandle(index as u32));
            }
        }
    }

    /// Notes a change that the volume's next round will hold, before anybody is told of it.
    pub(crate) fn note_change(&mut self, handle: VolumeHandle, change: Change) {
        let Some(journal) = &mut self.journal else { return };
        let volume = self.volumes[handle.0 as usize].as_ref().expect("the volume is open");
        let id = volume.record.id;
        journal.append(id, volume.next_round, &JournalEntry::Changed(id, change));
    }

    /// True when the journal has no room for one more change.
    pub(crate) fn journal_is_full(&self) -> bool {
        let open_at_most = self.volumes.len();
        self.journal.as_ref().is_some_and(|journal| !journal.has_room(open_at_most))
    }

    /// Forgets the changes that rounds have made durable, or that will never be.
    pub(crate) fn retire_changes(&mut self) {
        let Some(journal) = &mut self.journal else { return };
        let volumes = &self.volumes;
        let retired = journal.retire(|id, round| {
            let open = volumes.iter().flatten().find(|volume| volume.record.id == id);
            open.is_none_or(|volume| {
                let begun = planted::is(Bug::JournalRetiredEarly) && volume.next_round > round;
                volume.durable_round >= round || begun
            })
        });
        self.released |= retired;
    }

    /// Takes up to `count` adjacent blocks. A full store is one only when no round in sight frees
    /// any: what a guest has discarded, it may write again.
    pub(crate) fn take_blocks(&mut self, kind: BlockKind, count: u32) -> Taken {
        let taken = self.claims.take(kind, count, self.now);
        if taken != Taken::Full {
            return taken;
        }
        if kind == BlockKind::Metadata && self.break_watch() {
            return self.claims.take(kind, count, self.now);
        }
        if self.rounds_free_blocks() { Taken::Wait } else { taken }
    }

    /// Gives back what a collection has held back of nodes, which has to begin again. False when there
    /// is none.
    fn break_watch(&mut self) -> bool {
        let held = self.claims.break_watch();
        let some = !held.is_empty();
        for run in held {
            self.give_back(BlockKind::Metadata, run);
        }
        some
    }

    /// True when blocks are being given back, or will be with a round that is on its way, or now is.
    pub(crate) fn rounds_free_blocks(&mut self) -> bool {
        // Of either kind: what is behind one of the other kind comes in a later turn.
        let mut found = !self.releasing.is_empty();
        for index in 0..self.volumes.len() {
            let Some(volume) = &self.volumes[index] else { continue };
            if volume.frees_with_a_round() {
                found = true;
                self.want_commit(VolumeHandle(index as u32));
            } else if volume.shared.is_some() {
                let here = self.oldest_here(VolumeHandle(index as u32));
                found |= self.volume(VolumeHandle(index as u32)).frees_with_visitors(here);
            }
        }
        found
    }

    /// Makes sure that a change made now reaches the device in time.
    pub(crate) fn background_due(&mut self, now: Instant) {
        if self.background_at.is_none() {
            self.background_at = Some(now.after(COMMIT_INTERVAL));
        }
    }

    fn commit_in_background(&mut self) {
        let (now, mut next) = (self.now, None);
        for index in 0..self.volumes.len() {
            let Some(since) = self.volumes[index].as_ref().and_then(|volume| volume.dirty_since)
            else {
                continue;
            };
            let due = since.after(COMMIT_INTERVAL);
            if due <= now {
                self.want_commit(VolumeHandle(index as u32));
                // Should the round have to wait, it is queued; look again all the same.
                next = Some(now.after(COMMIT_INTERVAL));
            } else {
                next = Some(next.map_or(due, |next: Instant| next.min(due)));
            }
        }
        self.background_at = next;
    }

    fn send_claims(&mut self) {
        while let Some((kind, count)) = self.claims.wanted() {
            let shard = self.index;
            self.tell_authority(Message::Claim { shard, kind, count });
        }
        if self.claims.has_surplus() {
            let surplus = self.claims.surplus(false);
            self.tell_authority(Message::Return { runs: surplus });
        }
    }

    pub(crate) fn tell_authority(&mut self, message: Message) {
        match &mut self.authority {
            Some(authority) => authority.accept(message),
            None => self.outbox.push_back((0, message)),
        }
    }

    fn poll_authority(&mut self) {
        if let Some(authority) = &mut self.authority {
            authority.poll(&mut self.device);
            self.send_grants();
        }
    }

    fn authority_step(&mut self, step: Step) {
        match step {
            Step::Wait => {}
            Step::Flush if self.flusher.volatile => {
                self.flusher.want(self.flusher.mark(), FlushWaiter::Authority);
            }
            Step::Flush => {
                let authority = self.authority.as_mut().expect("it asked for the flush");
                let step = authority.flushed(Ok(()), &mut self.device);
                self.authority_step(step);
            }
        }
        self.send_grants();
    }

    fn send_grants(&mut self) {
        let Some(authority) = self.authority.as_mut().filter(|it| it.has_grants()) else { return };
        let grants: Vec<(usize, Message)> = authority.grants().collect();
        for (shard, grant) in grants {
            if shard == self.index {
                self.deliver(grant);
            } else {
                self.outbox.push_back((shard, grant));
            }
        }
    }
}
