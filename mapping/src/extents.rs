//! The allocation authority: the one owner of extents and bitmaps on this host.
//!
//! It lives in shard 0 and answers claims from every shard, one job at a time: nobody waits for it
//! but a shard that has run out of blocks. All of its I/O goes through the shard's device, so the
//! simulator sees each write.
//!
//! What must not be broken (FORMAT.md, "Claims"):
//! - A block is granted only when its bitmap bit is durable: after a crash it must not be handed
//!   out twice.
//! - An extent's bitmap is durable before the catalogue says that the extent has a type.
//! - A bit is cleared only for a block that nothing on the device or in flight refers to. A lost
//!   clearing is a leak, never a danger.

use std::collections::VecDeque;

use bessel_reactor::buffer::{Buffer, BufferPool};
use bessel_reactor::device::{Device, DeviceError, Token};
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr};

use crate::format::{
    BITMAP_BITS, Bitmap, CATALOGUE_ENTRIES_PER_BLOCK, CatalogueEntry, ExtentMap, ExtentType,
    Geometry, encode_catalogue_block,
};
use crate::message::{BlockKind, BlockRun, Message};
use crate::planted::{self, Bug};
use crate::store::{FreeCounts, OpenedStore};
use crate::walk::BlockSet;

/// Runs in one grant, so that a fragmented bitmap cannot make an endless message.
const RUNS_MAX: usize = 512;

#[derive(Debug)]
enum Job {
    Claim { shard: usize, kind: BlockKind, count: u32 },
    Return { runs: Vec<BlockRun> },
}

/// What the current job waits for.
#[derive(Debug)]
enum State {
    Idle,
    /// Reading the bitmap block that the job needs.
    ReadBitmap,
    /// Writing the bitmap of a fresh extent, this many of its blocks done.
    InitBitmap {
        extent: u64,
        done: u64,
    },
    InitFlush {
        extent: u64,
    },
    WriteCatalogue {
        extent: u64,
    },
    FlushCatalogue {
        extent: u64,
    },
    WriteClaim {
        runs: Vec<BlockRun>,
    },
    FlushClaim {
        runs: Vec<BlockRun>,
    },
    WriteReturn,
}

/// Which bitmap block: of which extent, and which of its blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct BitmapId {
    extent: u64,
    index: u64,
}

/// What the shard must do for the authority next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    /// Its I/O is in flight, or it has nothing to do.
    Wait,
    /// Flush the device, then call [`Authority::flushed`].
    Flush,
}

#[derive(Debug)]
pub(crate) struct Authority {
    geometry: Geometry,
    extents: ExtentMap,
    secret: u64,
    catalogue: Vec<CatalogueEntry>,
    epoch: u64,
    free: FreeCounts,
    jobs: VecDeque<Job>,
    state: State,
    pool: BufferPool,
    buffer: Buffer,
    current: Option<(BitmapId, Bitmap)>,
    token: Token,
    grants: Vec<(usize, Message)>,
    /// Bitmap blocks that the device failed to read in this job, and how many blocks are free there.
    /// They count as full until the job ends, so that it looks elsewhere, and no longer: the next
    /// read may succeed.
    unread: Vec<(BitmapId, u32)>,
    /// A flush failed while the job's writes were under way: they may never become durable.
    doubted: bool,
    /// Jobs that have ended.
    finished: u64,
    /// While a collection runs: blocks that were claimed or given back since it began, or were on
    /// their way then.
    watch: Option<Box<BlockSet>>,
    /// Failures since start, for the log and the metrics.
    pub(crate) failures: u64,
    /// Returns of a block that was free already.
    pub(crate) double_frees: u64,
}

impl Authority {
    pub(crate) fn new(store: &OpenedStore, token: Token) -> Self {
        let mut pool = BufferPool::new(1, BLOCK_SIZE as usize);
        Self {
            geometry: store.geometry,
            extents: store.extents.clone(),
            secret: store.secret,
            catalogue: store.catalogue.clone(),
            epoch: store.epoch,
            free: store.bitmap_free.clone(),
            jobs: VecDeque::new(),
            state: State::Idle,
            buffer: pool.take().expect("the pool has just been made"),
            pool,
            current: None,
            token,
            grants: Vec::new(),
            unread: Vec::new(),
            doubted: false,
            finished: 0,
            watch: None,
            failures: 0,
            double_frees: 0,
        }
    }

    /// Takes a [`Message::Claim`] or [`Message::Return`].
    pub(crate) fn accept(&mut self, message: Message) {
        match message {
            Message::Claim { shard, kind, count } => {
                // Before the returns that have not begun: somebody waits for it.
                let started = usize::from(!matches!(self.state, State::Idle));
                let is_claim = |job: &&Job| matches!(job, Job::Claim { .. });
                let claims = self.jobs.iter().skip(started).take_while(is_claim).count();
                self.jobs.insert(started + claims, Job::Claim { shard, kind, count });
            }
            Message::Return { mut runs } => {
                // One bitmap block after the other, from the end.
                runs.sort_unstable_by_key(|run| run.start.get());
                if !planted::is(Bug::ReturnsNotWatched) {
                    self.note(&runs);
                }
                self.jobs.push_back(Job::Return { runs });
            }
            message => unreachable!("{message:?} goes to a shard, not to the authority"),
        }
    }

    /// True when no job is queued or under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.jobs.is_empty() && matches!(self.state, State::Idle)
    }

    /// How many jobs have to end until the one that is under way has.
    pub(crate) fn jobs_under_way(&self) -> u64 {
        self.finished + u64::from(!matches!(self.state, State::Idle))
    }

    /// True when as many jobs as this have ended.
    pub(crate) fn have_finished(&self, jobs: u64) -> bool {
        self.finished >= jobs
    }

    /// Jobs that have not begun.
    pub(crate) fn jobs_waiting(&self) -> usize {
        self.jobs.len()
    }

    /// From here on notes what is claimed and given back, for a collection ([`crate::gc`]).
    pub(crate) fn watch(&mut self) {
        self.watch.get_or_insert_default();
        for index in 0..self.jobs.len() {
            if let Job::Return { runs } = &self.jobs[index]
                && !planted::is(Bug::ReturnsNotWatched)
            {
                let runs = runs.clone();
                self.note(&runs);
            }
        }
        if let State::WriteClaim { runs } | State::FlushClaim { runs } = &self.state {
            let runs = runs.clone();
            self.note(&runs);
        }
    }

    /// Ends that, and tells what there was.
    pub(crate) fn unwatch(&mut self) -> BlockSet {
        self.watch.take().map_or_else(BlockSet::default, |watch| *watch)
    }

    fn note(&mut self, runs: &[BlockRun]) {
        if let Some(watch) = &mut self.watch {
            runs.iter().for_each(|run| watch.insert_run(*run));
        }
    }

    /// There are some of [`Authority::grants`].
    pub(crate) fn has_grants(&self) -> bool {
        !self.grants.is_empty()
    }

    /// Answers to claims, to be delivered.
    pub(crate) fn grants(&mut self) -> impl Iterator<Item = (usize, Message)> {
        self.grants.drain(..)
    }

    /// Free blocks in the bitmaps of one kind's extents.
    pub(crate) fn free_blocks(&self, kind: BlockKind) -> u64 {
        self.extents_of(kind).map(|extent| self.free.extent(extent)).sum()
    }

    fn extents_of(&self, kind: BlockKind) -> impl Iterator<Item = u64> {
        let wanted = extent_type(kind);
        let all = self.catalogue.iter().zip(0..);
        all.filter(move |(entry, _)| entry.kind == wanted).map(|(_, extent)| extent)
    }

    /// Extents that nobody has claimed yet.
    pub(crate) fn unused_extents(&self) -> u64 {
        self.catalogue.iter().filter(|entry| entry.kind == ExtentType::Unused).count() as u64
    }

    fn type_of(&self, extent: u64) -> ExtentType {
        self.catalogue[extent as usize].kind
    }

    /// A flush of the device has failed: what the job under way has written is unknown.
    pub(crate) fn doubt(&mut self) {
        self.doubted = !matches!(self.state, State::Idle) && !planted::is(Bug::ClaimDoubtIgnored);
    }

    /// Starts the next job when idle.
    pub(crate) fn poll<D: Device>(&mut self, device: &mut D) -> Step {
        while matches!(self.state, State::Idle) && !self.jobs.is_empty() {
            self.start(device);
        }
        Step::Wait
    }

    fn start<D: Device>(&mut self, device: &mut D) {
        match &self.jobs[0] {
            Job::Claim { kind, .. } => {
                let kind = *kind;
                if let Some(id) = self.bitmap_with_room(kind) {
                    self.with_bitmap(id, device);
                } else if let Some(extent) = self.unused_extent() {
                    self.write_fresh_bitmap(extent, 0, device);
                } else {
                    self.grant(Vec::new());
                }
            }
            Job::Return { runs } => match runs.last() {
                Some(run) => self.with_bitmap(self.bitmap_of(run.start), device),
                None => self.end_job(),
            },
        }
    }

    fn bitmap_with_room(&self, kind: BlockKind) -> Option<BitmapId> {
        let wanted = extent_type(kind);
        let has_room = |id: &BitmapId| {
            self.type_of(id.extent) == wanted && self.free.get(id.extent, id.index) > 0
        };
        // Stay where the last claim was, for adjacency.
        if let Some((id, _)) = &self.current
            && has_room(id)
        {
            return Some(*id);
        }
        let blocks = 0..self.geometry.bitmap_blocks;
        self.extents_of(kind)
            .flat_map(|extent| blocks.clone().map(move |index| BitmapId { extent, index }))
            .find(has_room)
    }

    fn unused_extent(&self) -> Option<u64> {
        let found = self.catalogue.iter().position(|entry| entry.kind == ExtentType::Unused);
        found.map(|extent| extent as u64)
    }

    fn bitmap_of(&self, block: BlockAddr) -> BitmapId {
        let extent = self.geometry.extent_of(block);
        let bit = block.get() - self.geometry.extent_start(extent).get();
        BitmapId { extent, index: bit / BITMAP_BITS }
    }

    /// Block number of bit 0 of a bitmap block.
    fn first_block(&self, id: BitmapId) -> BlockAddr {
        self.geometry.extent_start(id.extent).add(id.index * BITMAP_BITS)
    }

    /// Goes on with the job once bitmap block `id` is in memory.
    fn with_bitmap<D: Device>(&mut self, id: BitmapId, device: &mut D) {
        if self.current.as_ref().is_some_and(|(current, _)| *current == id) {
            self.apply(device);
            return;
        }
        // The bitmap itself is filled in when the read completes.
        self.current = Some((id, Bitmap::default()));
        self.state = State::ReadBitmap;
        let addr = self.geometry.bitmap_block(id.extent, id.index);
        let segment = self.pool.lend(&self.buffer);
        device.read(self.token, addr.offset(), &[segment]);
    }

    /// Does the job to the current bitmap and writes it.
    fn apply<D: Device>(&mut self, device: &mut D) {
        let (id, mut bitmap) = self.current.take().expect("a bitmap was made current");
        let before = planted::is(Bug::ClaimForgotten).then(|| bitmap.clone());
        let first = self.first_block(id);
        let left = self.geometry.extent_blocks - id.index * BITMAP_BITS;
        let blocks = left.min(BITMAP_BITS);
        self.state = match &mut self.jobs[0] {
            Job::Claim { count, .. } => {
                State::WriteClaim { runs: claim_bits(&mut bitmap, first, *count) }
            }
            Job::Return { runs } => {
                let already_free = clear_bits(&mut bitmap, first, blocks, runs);
                if let Some(block) = already_free {
                    self.double_frees += 1;
                    tracing::error!("block {block} was freed twice; run `bessel check`");
                }
                State::WriteReturn
            }
        };
        self.free.set(id.extent, id.index, bitmap.count_free());
        if let State::WriteClaim { runs } = &self.state
            && self.watch.is_some()
        {
            let runs = runs.clone();
            self.note(&runs);
        }
        if matches!(&self.state, State::WriteClaim { runs } if runs.is_empty()) {
            // The count promised room that the bits do not have; it is right now. Look elsewhere.
            self.state = State::Idle;
            self.current = Some((id, bitmap));
            return;
        }
        self.write_bitmap(id, &bitmap, device);
        self.current = Some((id, before.unwrap_or(bitmap)));
    }

    fn write_bitmap<D: Device>(&mut self, id: BitmapId, bitmap: &Bitmap, device: &mut D) {
        let addr = self.geometry.bitmap_block(id.extent, id.index);
        bitmap.encode(self.pool.bytes_mut(&mut self.buffer), addr, self.secret);
        let segment = self.pool.lend(&self.buffer);
        device.write(self.token, addr.offset(), &[segment]);
    }

    fn write_fresh_bitmap<D: Device>(&mut self, extent: u64, index: u64, device: &mut D) {
        self.state = State::InitBitmap { extent, done: index };
        let bitmap = self.geometry.fresh_bitmap(index);
        self.write_bitmap(BitmapId { extent, index }, &bitmap, device);
    }

    fn write_catalogue<D: Device>(&mut self, extent: u64, device: &mut D) {
        let Job::Claim { kind, .. } = &self.jobs[0] else {
            unreachable!("only a claim takes a new extent");
        };
        let kind = extent_type(*kind);
        self.catalogue[extent as usize] =
            CatalogueEntry { kind, owner_host: 0, owner_epoch: self.epoch };
        self.state = State::WriteCatalogue { extent };
        let (addr, first) = self.geometry.catalogue_block_of(extent);
        let last = (first as usize + CATALOGUE_ENTRIES_PER_BLOCK).min(self.catalogue.len());
        encode_catalogue_block(
            self.pool.bytes_mut(&mut self.buffer),
            addr,
            first,
            &self.catalogue[first as usize..last],
            self.secret,
        );
        let segment = self.pool.lend(&self.buffer);
        device.write(self.token, addr.offset(), &[segment]);
    }

    /// Takes in the completion of the authority's one I/O.
    pub(crate) fn completed<D: Device>(
        &mut self,
        result: Result<(), DeviceError>,
        device: &mut D,
    ) -> Step {
        self.pool.returned(&self.buffer);
        if matches!(self.state, State::ReadBitmap) {
            return self.bitmap_read(result, device);
        }
        if let Err(error) = result {
            return self.fail(&error.to_string(), device);
        }
        if std::mem::take(&mut self.doubted) {
            return self.fail("a flush of the device failed meanwhile", device);
        }
        match std::mem::replace(&mut self.state, State::Idle) {
            State::InitBitmap { extent, done } if done + 1 < self.geometry.bitmap_blocks => {
                self.write_fresh_bitmap(extent, done + 1, device);
                Step::Wait
            }
            State::InitBitmap { extent, .. } if planted::is(Bug::CatalogueBeforeBitmap) => {
                self.write_catalogue(extent, device);
                Step::Wait
            }
            State::InitBitmap { extent, .. } => {
                self.state = State::InitFlush { extent };
                Step::Flush
            }
            State::WriteCatalogue { extent } => {
                self.extents.set(extent, self.type_of(extent));
                self.state = State::FlushCatalogue { extent };
                Step::Flush
            }
            State::WriteClaim { runs } if planted::is(Bug::ClaimNotFlushed) => {
                self.grant(runs);
                self.poll(device)
            }
            State::WriteClaim { runs } => {
                self.state = State::FlushClaim { runs };
                Step::Flush
            }
            State::WriteReturn => {
                if matches!(&self.jobs[0], Job::Return { runs } if runs.is_empty()) {
                    self.end_job();
                }
                self.poll(device)
            }
            state => unreachable!("no I/O was in flight in {state:?}"),
        }
    }

    /// The bitmap that the job needs has been read. Nothing is ever allocated from one that cannot
    /// be read or is damaged, nor freed to it; others may have room.
    fn bitmap_read<D: Device>(&mut self, result: Result<(), DeviceError>, device: &mut D) -> Step {
        self.state = State::Idle;
        self.doubted = false;
        let (id, _) = self.current.take().expect("a bitmap was made current");
        let addr = self.geometry.bitmap_block(id.extent, id.index);
        let failed = result.is_err();
        let read = result.map_err(|error| format!("bitmap at block {addr}: {error}"));
        let bitmap = read.and_then(|()| {
            Bitmap::decode(self.pool.bytes(&self.buffer), addr, self.secret)
                .map_err(|error| error.to_string())
                .or_else(|error| {
                    let free = planted::is(Bug::DamagedBitmapIsFree);
                    if free { Ok(self.geometry.fresh_bitmap(id.index)) } else { Err(error) }
                })
        });
        match bitmap {
            Ok(mut bitmap) => {
                if !planted::is(Bug::BitmapOffersItself)
                    && !bitmap.include(&self.geometry.fresh_bitmap(id.index))
                {
                    tracing::error!(
                        "bitmap at block {addr} offers its own blocks, or blocks past the end of the \
                         extent; they are not used; run `bessel check --repair`"
                    );
                }
                self.current = Some((id, bitmap));
                self.apply(device);
                self.poll(device)
            }
            Err(why) if matches!(self.jobs[0], Job::Claim { .. }) => {
                self.failures += 1;
                if failed {
                    self.unread.push((id, self.free.get(id.extent, id.index)));
                    tracing::error!("{why}: looking for free blocks elsewhere");
                } else {
                    tracing::error!("{why}: nothing more is allocated there");
                }
                self.free.set(id.extent, id.index, 0);
                self.poll(device)
            }
            Err(why) => self.fail(&why, device),
        }
    }

    /// Takes in the flush that [`Step::Flush`] asked for.
    pub(crate) fn flushed<D: Device>(
        &mut self,
        result: Result<(), DeviceError>,
        device: &mut D,
    ) -> Step {
        if let Err(error) = result {
            return self.fail(&error.to_string(), device);
        }
        if std::mem::take(&mut self.doubted) {
            return self.fail("a flush of the device failed meanwhile", device);
        }
        match std::mem::replace(&mut self.state, State::Idle) {
            State::InitFlush { extent } => {
                self.write_catalogue(extent, device);
                Step::Wait
            }
            State::FlushCatalogue { extent } => {
                // As it was just written: no need to read it, on a device that may fail to.
                let id = BitmapId { extent, index: 0 };
                self.current = Some((id, self.geometry.fresh_bitmap(0)));
                self.poll(device)
            }
            State::FlushClaim { runs } => {
                self.grant(runs);
                self.poll(device)
            }
            state => unreachable!("no flush was asked for in {state:?}"),
        }
    }

    /// The job that was under way has nothing left to do.
    fn end_job(&mut self) {
        self.jobs.pop_front();
        self.finished += 1;
    }

    fn grant(&mut self, runs: Vec<BlockRun>) {
        let Some(Job::Claim { shard, kind, .. }) = self.jobs.pop_front() else {
            unreachable!("grants answer claims");
        };
        self.finished += 1;
        for (id, free) in self.unread.drain(..) {
            self.free.set(id.extent, id.index, free);
        }
        self.grants.push((shard, Message::Granted { kind, runs }));
    }

    /// Ends the current job: a claim is answered with nothing, a return is a leak. What is on the
    /// device is unknown, so the bitmap in memory is forgotten.
    fn fail<D: Device>(&mut self, why: &str, device: &mut D) -> Step {
        self.doubted = false;
        self.failures += 1;
        tracing::error!("allocation: {why}; blocks may leak until the store is checked");
        self.current = None;
        if let State::WriteCatalogue { extent } | State::FlushCatalogue { extent } = self.state {
            // Whatever the catalogue says on the device, nothing in the extent has been used.
            self.catalogue[extent as usize].kind = ExtentType::Unused;
            self.extents.set(extent, ExtentType::Unused);
        }
        self.state = State::Idle;
        match &self.jobs[0] {
            Job::Claim { .. } => self.grant(Vec::new()),
            Job::Return { .. } => self.end_job(),
        }
        self.poll(device)
    }
}

const fn extent_type(kind: BlockKind) -> ExtentType {
    match kind {
        BlockKind::Data => ExtentType::Data,
        BlockKind::Metadata => ExtentType::Metadata,
    }
}

/// Sets up to `count` free bits and tells which.
fn claim_bits(bitmap: &mut Bitmap, first: BlockAddr, count: u32) -> Vec<BlockRun> {
    let mut runs = Vec::new();
    let (mut from, mut left) = (0, count);
    while left > 0
        && runs.len() < RUNS_MAX
        && let Some((bit, length)) = bitmap.find_free_run(from, left)
    {
        for taken in bit..bit + length {
            bitmap.set(taken);
        }
        runs.push(BlockRun { start: first.add(u64::from(bit)), count: length });
        from = bit + length;
        left -= length;
    }
    runs
}

/// Clears the bits of the runs at the end of `runs` that begin in this bitmap block, which covers
/// `blocks` blocks from `first` on, and cuts off what was cleared. Returns a block that was free
/// already, if there was one: links of a damaged tree led to it twice.
fn clear_bits(
    bitmap: &mut Bitmap,
    first: BlockAddr,
    blocks: u64,
    runs: &mut Vec<BlockRun>,
) -> Option<BlockAddr> {
    let mut already_free = None;
    while let Some(run) = runs.last_mut() {
        let Some(bit) = run.start.get().checked_sub(first.get()) else { break };
        if bit >= blocks {
            break;
        }
        let length = u64::from(run.count).min(blocks - bit) as u32;
        for freed in bit as u32..bit as u32 + length {
            if !bitmap.get(freed) {
                already_free = Some(first.add(u64::from(freed)));
            }
            bitmap.clear(freed);
        }
        if length == run.count {
            runs.pop();
        } else {
            run.start = run.start.add(u64::from(length));
            run.count -= length;
        }
    }
    already_free
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_blocks_of_this_bitmap_are_given_back_to_it() {
        let mut bitmap = Bitmap::default();
        bitmap.set_range(0, Bitmap::BITS);
        let run = |start, count| BlockRun { start: BlockAddr::new(start), count };
        // An extent of 256 blocks: the next one begins well inside the bits of a bitmap block.
        let mut runs = vec![run(600, 3), run(500, 20), run(260, 1)];
        assert_eq!(clear_bits(&mut bitmap, BlockAddr::new(256), 256, &mut runs), None);
        assert_eq!(runs, vec![run(600, 3), run(512, 8)]);
        let mut again = vec![run(500, 2)];
        let twice = clear_bits(&mut bitmap, BlockAddr::new(256), 256, &mut again);
        assert_eq!(twice, Some(BlockAddr::new(501)));
        assert_eq!(bitmap.count_free(), 12 + 1);
    }
}
