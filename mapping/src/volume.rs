//! An open volume: its tree's root, its commit rounds, and who is using what.
//!
//! Owned by its home shard; nobody else changes its mapping (DESIGN §7).

use std::collections::VecDeque;
use std::sync::Arc;

use bessel_reactor::clock::Instant;
use bessel_reactor::units::{BlockAddr, VolumeBlock};

use crate::chunks::Chunks;
use crate::commit::{Flight, Sealed};
use crate::format::VolumeRecord;
use crate::message::{BlockKind, BlockRun};
use crate::nodes::cache::FrameId;
use crate::planted::{self, Bug};
use crate::radix::KnownLeaf;
use crate::request::{CacheMode, CurrentTree, VolumeHandle};
use crate::shared::{SharedVolume, Written};
use crate::snapshot_log::SnapshotLog;

/// "No request" in the list of active ones.
pub(crate) const NO_REQUEST: u32 = u32::MAX;

/// Blocks that the tree in memory no longer names.
///
/// They come back to the claims when `round`, which unlinks them on the device, is durable, and
/// every request up to number `stamp` has finished: one of those may still read or write them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unlinked {
    pub(crate) round: u64,
    pub(crate) stamp: u64,
    pub(crate) kind: BlockKind,
    pub(crate) run: BlockRun,
}

/// What the requests of a volume have of what all volumes of a shard share.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Held {
    /// Those that came in here; `Shard::forwarded_active` counts the others.
    pub(crate) requests: usize,
    pub(crate) pieces: usize,
    pub(crate) bounces: usize,
    /// Buffers in which nodes are read.
    pub(crate) loads: usize,
}

/// What has been done of something in a turn of a shard, for one volume.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct InTurn {
    turn: u64,
    taken: u32,
}

/// Blocks of the volume that one piece of I/O is giving a new home or merging.
///
/// While it stands, nobody else allocates, merges, overwrites in place, or unmaps there: the merge
/// of a small write has read the rest of the block and will write it back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RangeLock {
    pub(crate) first: VolumeBlock,
    pub(crate) count: u64,
    pub(crate) piece: u32,
}

/// What guests did to a volume since it was opened.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct VolumeCounters {
    /// Reads completed.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes completed.
    pub writes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// Discards and write-zeroes completed.
    pub unmaps: u64,
    /// Requests that ended in an error status.
    pub errors: u64,
    /// Data blocks given to it.
    pub data_allocated: u64,
    /// Nodes given to it, snapshots' roots included.
    pub nodes_allocated: u64,
}

/// What the home keeps of a volume that others serve queues of.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) volume: Arc<SharedVolume>,
    /// Requests that forbid visitors to write in place, and wait until none does.
    pub(crate) bars: u32,
    /// Something waits for the requests of visitors up to this stamp.
    pub(crate) awaited: Option<u64>,
    /// The stamp that is shown was given to something: the next is to be shown.
    pub(crate) stamp_used: bool,
    /// It is in the shard's list of volumes whose visitors are to be looked at.
    pub(crate) watched: bool,
    /// The volume became writethrough: visitors' requests up to this stamp may not know it.
    pub(crate) switching: Option<u64>,
    /// What visitors had written when it was asked last.
    pub(crate) written: Written,
}

#[derive(Debug)]
pub(crate) struct Volume {
    pub(crate) handle: VolumeHandle,
    pub(crate) slot: u32,
    /// As the next record to be written would say it.
    pub(crate) record: VolumeRecord,
    /// The device has no record of it, and gets none before it is told to.
    pub(crate) unpublished: bool,
    /// What everybody calls it. Follows the record once that is durable.
    pub(crate) name: String,
    pub(crate) log: SnapshotLog,
    /// A block of its log is being read.
    pub(crate) log_loading: bool,
    pub(crate) cache: CacheMode,
    /// Sectors a guest may address. Follows the record once that is durable.
    pub(crate) sectors: u64,
    /// Pinned.
    pub(crate) root: FrameId,
    /// Where the last walk from the root has led.
    pub(crate) last_leaf: KnownLeaf,

    /// Nodes changed since the last round was sealed; their changes go into `next_round`.
    pub(crate) dirty: Vec<FrameId>,
    pub(crate) dirty_since: Option<Instant>,
    pub(crate) commit_wanted: bool,
    pub(crate) next_round: u64,
    pub(crate) durable_round: u64,
    /// How many rounds have become durable, those included that have no number of their own.
    pub(crate) rounds_ended: u64,
    /// Rounds whose contents are fixed, oldest first, behind the one in flight.
    pub(crate) sealed: VecDeque<Sealed>,
    pub(crate) flight: Option<Flight>,
    /// In the shard's queue of volumes that have a round to start.
    pub(crate) queued_for_round: bool,
    /// Requests that wait for a round.
    pub(crate) committing: Vec<u32>,
    pub(crate) unlinked: Chunks<Unlinked>,
    /// What was released of these.
    pub(crate) releases: InTurn,
    /// It is in the shard's list of volumes that release more in the next turn.
    pub(crate) releasing: bool,

    /// Requests in the order they arrived, as a list through their slots.
    pub(crate) active_head: u32,
    pub(crate) active_tail: u32,
    pub(crate) last_stamp: u64,
    /// What they have of the shard's.
    pub(crate) held: Held,
    /// What they have done.
    pub(crate) steps: InTurn,
    /// Requests that ran out of steps, in the order in which they are gone on with.
    pub(crate) broken_off: VecDeque<u32>,
    pub(crate) locks: Vec<RangeLock>,
    /// Writes in place that have not landed.
    pub(crate) overwrites: u32,
    /// The last flush that had been started when a write of this volume, data or metadata, last
    /// completed.
    pub(crate) write_mark: Option<u64>,
    /// Snapshots that wait for the requests up to a stamp: (stamp, sequence).
    pub(crate) settling: VecDeque<(u64, u64)>,
    /// The tree that the record on the device names.
    pub(crate) durable_tree: CurrentTree,

    /// How far a restore has come: which change, and how many of its blocks are done.
    pub(crate) restored: (usize, u64),
    pub(crate) latched: Option<String>,
    /// Once latched: nodes that memory has newer than the device, or may have. They are never
    /// evicted, and go when the volume is closed.
    pub(crate) lost: Vec<FrameId>,
    pub(crate) closing: bool,
    pub(crate) counters: VolumeCounters,
    /// Other shards may serve queues of it.
    pub(crate) shared: Option<Box<Shared>>,
}

impl InTurn {
    /// How much it is in this turn.
    pub(crate) fn taken(&self, turn: u64) -> u32 {
        if self.turn == turn { self.taken } else { 0 }
    }

    /// Adds so much.
    pub(crate) fn take(&mut self, turn: u64, count: u32) {
        *self = Self { turn, taken: self.taken(turn) + count };
    }
}

impl Volume {
    pub(crate) fn new(
        handle: VolumeHandle,
        slot: u32,
        record: VolumeRecord,
        log: SnapshotLog,
        root: FrameId,
        first_round: u64,
    ) -> Self {
        Self {
            handle,
            slot,
            cache: record.cache,
            sectors: record.size.sectors(),
            name: record.name.clone(),
            durable_tree: CurrentTree {
                root: record.root,
                height: record.height,
                parent: record.parent,
            },
            record,
            unpublished: false,
            log,
            log_loading: false,
            root,
            last_leaf: KnownLeaf::NONE,
            dirty: Vec::with_capacity(256),
            dirty_since: None,
            commit_wanted: false,
            next_round: first_round,
            durable_round: first_round - 1,
            rounds_ended: 0,
            sealed: VecDeque::with_capacity(16),
            flight: None,
            queued_for_round: false,
            committing: Vec::with_capacity(256),
            // Room for a few rounds of a busy volume; there may be thousands of idle ones.
            unlinked: Chunks::with_capacity(256),
            releases: InTurn::default(),
            releasing: false,
            active_head: NO_REQUEST,
            active_tail: NO_REQUEST,
            last_stamp: 0,
            held: Held::default(),
            steps: InTurn::default(),
            broken_off: VecDeque::new(),
            locks: Vec::with_capacity(256),
            overwrites: 0,
            write_mark: None,
            settling: VecDeque::new(),
            restored: (0, 0),
            latched: None,
            lost: Vec::new(),
            closing: false,
            counters: VolumeCounters::default(),
            shared: None,
        }
    }

    /// A stamp that no request shows which comes from now on, and every one that is there, or an older one. If
    /// others serve queues of the volume it is to be watched from here on ([`Shard::watch_visitors`]).
    ///
    /// [`Shard::watch_visitors`]: crate::shard::Shard::watch_visitors
    pub(crate) fn stamp_now(&mut self) -> u64 {
        if let Some(shared) = &mut self.shared {
            shared.stamp_used = true;
            self.last_stamp = self.last_stamp.max(shared.volume.stamp());
        }
        self.last_stamp
    }

    /// The stamp of the oldest request that visitors have in flight.
    pub(crate) fn oldest_visitor(&self) -> Option<u64> {
        self.shared.as_ref().and_then(|shared| shared.volume.oldest())
    }

    /// True when it has requests in flight, here or elsewhere.
    pub(crate) fn has_requests(&self) -> bool {
        self.active_head != NO_REQUEST || self.oldest_visitor().is_some()
    }

    /// What guests did, wherever their queues are.
    pub(crate) fn all_counters(&self) -> VolumeCounters {
        let mut all = self.counters;
        if let Some(shared) = &self.shared {
            let elsewhere = shared.volume.counters();
            all.reads += elsewhere.reads;
            all.read_bytes += elsewhere.read_bytes;
            all.writes += elsewhere.writes;
            all.write_bytes += elsewhere.write_bytes;
            all.errors += elsewhere.errors;
        }
        all
    }

    /// Something waits for requests to end that were there before it.
    pub(crate) fn awaits_requests(&self) -> bool {
        !(self.settling.is_empty() && self.unlinked.is_empty())
    }

    /// Something waits for nothing else.
    pub(crate) fn awaits_only_requests(&self) -> bool {
        let unlinked = self.unlinked.front();
        !self.settling.is_empty() || unlinked.is_some_and(|it| it.round <= self.durable_round)
    }

    /// True when blocks come free with requests of visitors, which wait for nothing but the device.
    /// `oldest_here` is the stamp of the oldest request at home.
    pub(crate) fn frees_with_visitors(&self, oldest_here: Option<u64>) -> bool {
        self.shared.is_some()
            && self.unlinked.front().is_some_and(|unlinked| {
                unlinked.round <= self.durable_round
                    && oldest_here.is_none_or(|oldest| oldest > unlinked.stamp)
            })
    }

    /// Whether visitors may write in place at all.
    pub(crate) fn lets_visitors_write(&self) -> bool {
        self.latched.is_none()
            && self.cache == CacheMode::Writeback
            && self.shared.as_ref().is_some_and(|shared| shared.bars == 0)
    }

    /// Forbids visitors to write in place what they have been shown.
    pub(crate) fn freeze_for_visitors(&self) {
        if let Some(shared) = &self.shared {
            shared.volume.freeze();
        }
    }

    /// True when somebody holds one of these blocks of the volume.
    pub(crate) fn is_locked(&self, first: VolumeBlock, count: u64) -> bool {
        let end = first.get() + count;
        let overlaps = |lock: &RangeLock| {
            lock.first.get() < end && first.get() < lock.first.get() + lock.count
        };
        self.locks.iter().any(overlaps)
    }

    pub(crate) fn lock(&mut self, first: VolumeBlock, count: u64, piece: u32) {
        let may_overlap =
            planted::is(Bug::WritesIgnoreLocks) || planted::is(Bug::UnmapIgnoresLocks);
        assert!(
            may_overlap || !self.is_locked(first, count),
            "blocks {first}+{count} locked twice"
        );
        self.locks.push(RangeLock { first, count, piece });
    }

    pub(crate) fn unlock(&mut self, piece: u32) {
        let held = self.locks.iter().position(|lock| lock.piece == piece);
        self.locks.swap_remove(held.expect("a piece that unlocks has locked"));
    }

    /// Notes that the tree in memory no longer names these blocks.
    pub(crate) fn unlink(&mut self, kind: BlockKind, run: BlockRun) {
        let freed = u64::from(run.count);
        self.record.blocks_allocated = self.record.blocks_allocated.saturating_sub(freed);
        let (round, stamp) = (self.next_round, self.stamp_now());
        if let Some(last) = self.unlinked.back_mut()
            && (last.round, last.stamp, last.kind) == (round, stamp, kind)
            && last.run.start.add(u64::from(last.run.count)) == run.start
        {
            last.run.count += run.count;
            return;
        }
        self.unlinked.push_back(Unlinked { round, stamp, kind, run });
    }

    /// Unlinks one block.
    pub(crate) fn unlink_block(&mut self, kind: BlockKind, block: BlockAddr) {
        self.unlink(kind, BlockRun { start: block, count: 1 });
    }

    /// The next unlinked run that may be handed out again. `oldest` is the stamp of the oldest
    /// request that is still active.
    pub(crate) fn release(&mut self, oldest: Option<u64>) -> Option<Unlinked> {
        let first = self.unlinked.front()?;
        let finished = oldest.is_none_or(|oldest| oldest > first.stamp);
        let finished = finished || planted::is(Bug::ReusedUnderRequests);
        let early = first.kind == BlockKind::Data && planted::is(Bug::ReusedBeforeCommit);
        if first.round > self.durable_round && !early || !finished {
            return None;
        }
        self.unlinked.pop_front()
    }

    /// The newest round that some change waits for; 0 when every change is durable.
    pub(crate) fn newest_change_round(&self) -> u64 {
        if !self.dirty.is_empty() {
            return self.next_round;
        }
        let sealed = self.sealed.back().map(|sealed| sealed.round);
        let in_flight = self.flight.as_ref().map(Flight::round);
        let in_flight = in_flight.filter(|_| !planted::is(Bug::FlushForgetsRound));
        sealed.or(in_flight).unwrap_or(0)
    }

    /// How many rounds have to end until all have that are sealed or in flight now.
    pub(crate) fn rounds_under_way(&self) -> u64 {
        self.rounds_ended + self.sealed.len() as u64 + u64::from(self.flight.is_some())
    }

    /// True when blocks come free with a round that has not ended. Those that wait for requests do
    /// not count: one of these may be waiting for blocks.
    pub(crate) fn frees_with_a_round(&self) -> bool {
        let round = self.unlinked.front().map(|unlinked| unlinked.round);
        self.latched.is_none() && round.is_some_and(|round| round > self.durable_round)
    }

    /// True when nothing is under way: no request, no round, nothing to commit.
    pub(crate) fn is_quiet(&self) -> bool {
        !self.has_requests()
            && self.flight.is_none()
            && self.sealed.is_empty()
            && self.dirty.is_empty()
    }

    /// True while writes that were in flight at the snapshot may still land in its blocks.
    pub(crate) fn is_settling(&self, sequence: u64) -> bool {
        !planted::is(Bug::SettlingIgnored)
            && self.settling.iter().any(|(_, settling)| *settling == sequence)
    }
}
