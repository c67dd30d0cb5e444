//! A simulated disk: as wrong as a real one may be, and the same again from the same seed.
//!
//! [`SimDisk`] is the platter and its cache; any number of [`SimDevice`] front-ends, one for each
//! shard, reach it through [`Device`]. It reorders, loses unflushed writes, tears at sectors and
//! fails: on demand ([`Fault`]), or by itself every so often ([`FaultRates`]). But for the silent
//! faults among these, what it may *not* do is as important, because the crash tests lean on it:
//! - a write takes effect no earlier than its submission and no later than its completion; until
//!   then each of its sectors is old or new, and a read may meet either;
//! - a flush makes durable every write whose completion was reaped before `flush` was called;
//! - a sector never tears, and one that nobody writes never changes by itself;
//! - a power cut leaves, of each sector, what is durable or what some later write brought there,
//!   whether that write had completed or not; sectors are independent of one another.
//!
//! [`SimDisk::crash`] cuts the power once. [`SimDisk::power_failure`] leaves the disk alone and
//! gives the disks that a power cut at this instant could leave, as many as are asked for: that is
//! how every subset of a few writes is tried.
//!
//! One run is a function of the seed and the calls: all iteration is over ordered maps.

#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::rc::Rc;

use super::{Completion, Device, DeviceError, DeviceProperties, SEGMENTS_MAX, Token};
use crate::buffer::Segment;
use crate::units::{BLOCK_SIZE, BlockAddr, ByteCount, ByteOffset, SECTOR_SIZE, SECTORS_PER_BLOCK};

const SECTOR: usize = SECTOR_SIZE as usize;
const BLOCK: usize = BLOCK_SIZE as usize;

/// A seeded generator (xoshiro256**, seeded by splitmix64): small, fast, and ours, so that a seed
/// means the same run in every release.
#[derive(Clone, Debug)]
pub struct Random([u64; 4]);

impl Random {
    /// The sequence of `seed`.
    pub fn new(seed: u64) -> Self {
        let mut state = seed;
        let mut split = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = state;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        };
        Self([split(), split(), split(), split()])
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        let [a, b, c, d] = &mut self.0;
        let result = b.wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let shifted = *b << 17;
        *c ^= *a;
        *d ^= *b;
        *b ^= *c;
        *a ^= *d;
        *c ^= shifted;
        *d = d.rotate_left(45);
        result
    }

    /// A number below `bound`, as good as uniform.
    ///
    /// # Panics
    /// When `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "no number is below zero");
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u64
    }

    /// True `times` out of `of`.
    pub fn chance(&mut self, times: u64, of: u64) -> bool {
        self.below(of) < times
    }

    /// One of `choices`.
    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len() as u64) as usize]
    }

    /// Changes one bit.
    pub fn flip(&mut self, bytes: &mut [u8]) {
        let bit = self.below(bytes.len() as u64 * 8);
        bytes[bit as usize / 8] ^= 1 << (bit % 8);
    }

    /// Puts `items` in any order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

/// In which order operations complete.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Schedule {
    /// Any, as the seed says; some operations are overtaken by hundreds of others.
    Random,
    /// The oldest first, one at a reap: the exhaustive loops stop between any two.
    Fifo,
    /// Everything that was submitted, oldest first, at the next reap.
    AtOnce,
}

/// What a simulated disk is like.
#[derive(Clone, Copy, Debug)]
pub struct SimConfig {
    /// Size; sparse, so it may be anything.
    pub capacity: ByteCount,
    /// See [`DeviceProperties::volatile_cache`].
    pub volatile_cache: bool,
    /// See [`DeviceProperties::offset_alignment`].
    pub offset_alignment: u32,
    /// See [`DeviceProperties::memory_alignment`].
    pub memory_alignment: u32,
    /// Most operations in flight on one front-end.
    pub depth: usize,
    /// The order of completions.
    pub schedule: Schedule,
    /// What decides everything that is left open.
    pub seed: u64,
}

impl SimConfig {
    /// A disk of `capacity` with a volatile cache that completes in any order.
    pub fn new(capacity: ByteCount, seed: u64) -> Self {
        Self {
            capacity,
            volatile_cache: true,
            offset_alignment: 512,
            memory_alignment: 512,
            depth: 256,
            schedule: Schedule::Random,
            seed,
        }
    }
}

/// The kind of an operation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum OpKind {
    /// A read.
    Read,
    /// A write.
    Write,
    /// A flush.
    Flush,
}

/// One operation, as it was queued.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Traced {
    /// What it did.
    pub kind: OpKind,
    /// The block its first sector lies in; 0 for a flush.
    pub block: BlockAddr,
    /// How much; 0 for a flush.
    pub length: ByteCount,
}

/// Names an operation among all there ever were.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct OpNumber(u64);

/// An operation in flight.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flying {
    /// Names it.
    pub number: OpNumber,
    /// What it does.
    pub kind: OpKind,
    /// The block its first sector lies in; 0 for a flush.
    pub block: BlockAddr,
}

/// Makes operations fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// Which kind it strikes; `None` counts every kind.
    pub kind: Option<OpKind>,
    /// How many such operations are let through first.
    pub after: u64,
    /// Whether all later ones fail as well.
    pub lasting: bool,
}

/// How often things go wrong by themselves: of a million operations that it could strike, each fault
/// strikes so many. The default is a sound disk.
///
/// A fault that the disk tells of fails the operation. The silent ones (`lost_write`,
/// `misdirected_write`, `flip_at_rest`, `flip_on_read`) do not: what they did is told by
/// [`SimDisk::take_damage`], for an oracle, and never to the shards.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct FaultRates {
    /// Reads that fail; the memory they were to fill is spoiled.
    pub read_error: u32,
    /// Writes that fail, with any of their sectors written.
    pub write_error: u32,
    /// Flushes that fail, and lose some of what they had in hand.
    pub flush_error: u32,
    /// Of the reads and writes that fail for one of these reasons, those that leave a bad sector
    /// behind. It fails every read until it is written again; one in two fails writes as well.
    pub lasting: u32,
    /// Reads and writes that end early with [`DeviceError::EndOfDevice`]: the front part is done.
    /// This is what is left of short I/O at this seam: a device that says less than was asked is
    /// asked for the rest below it, and gives up when it gets nothing more.
    pub short: u32,
    /// Operations that take minutes of [`SimDisk::set_now`]'s time.
    pub late: u32,
    /// Writes that are acknowledged and never happen.
    pub lost_write: u32,
    /// Writes that are acknowledged and happen somewhere else, over what is there.
    pub misdirected_write: u32,
    /// Whether misdirected writes may hit blocks that have these rates.
    pub stray_target: bool,
    /// Writes of which one bit is another one on the disk.
    pub flip_at_rest: u32,
    /// Reads of which one bit is another one in memory.
    pub flip_on_read: u32,
}

impl FaultRates {
    /// Nothing goes wrong.
    pub const NONE: Self = Self {
        read_error: 0,
        write_error: 0,
        flush_error: 0,
        lasting: 0,
        short: 0,
        late: 0,
        lost_write: 0,
        misdirected_write: 0,
        stray_target: false,
        flip_at_rest: 0,
        flip_on_read: 0,
    };
}

/// What a fault did to an operation that a front-end had asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Harm {
    /// It failed.
    Failed,
    /// It read something else than was written there.
    Damaged,
}

/// One operation that a fault made go wrong, as its front-end felt it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Strike {
    /// [`SimDevice::front`] of the front-end that felt it.
    pub front: u64,
    /// The operation.
    pub kind: OpKind,
    /// The block its first sector lies in; 0 for a flush.
    pub block: BlockAddr,
    /// Blocks it touched.
    pub blocks: u64,
    /// What became of it.
    pub harm: Harm,
}

/// A block that holds, or was read as, something else than was written there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Damage {
    /// Which.
    pub block: BlockAddr,
    /// What it should hold.
    pub meant: Box<[u8; BLOCK]>,
    /// What its sectors may be read as instead: number in the block, and bytes.
    pub found: Vec<(usize, Box<[u8]>)>,
}

/// What a power cut leaves of the sectors that were not durable.
pub enum Keep<'a> {
    /// None of them: the cache is gone and nothing in flight arrived.
    Nothing,
    /// All of them, in the order they arrived.
    Everything,
    /// Any of them, block by block whole, torn or not at all, as the seed says.
    Random,
    /// The newest contents of the blocks it accepts, the durable ones of the rest. With "is
    /// metadata" it is the cruellest cut there is: pointers kept, what they point to lost.
    Where(&'a dyn Fn(BlockAddr) -> bool),
    /// Of each sector what the newest write brought whose part there is accepted: a write that is
    /// accepted for some of its sectors is torn. Sectors count from the write's first, from 0.
    Parts(&'a dyn Fn(WriteId, u64) -> bool),
}

/// Names a write among all there ever were; later writes have larger ones.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct WriteId(u64);

/// A write that a power cut may still undo, in whole or in part.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VolatileWrite {
    /// Names it.
    pub id: WriteId,
    /// The block its first sector lies in.
    pub block: BlockAddr,
    /// Its length in sectors.
    pub sectors: u64,
}

/// How much was done since the disk was made. Operations count when they are queued.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SimCounters {
    /// Reads queued.
    pub reads: u64,
    /// Writes queued.
    pub writes: u64,
    /// Flushes queued.
    pub flushes: u64,
    /// Bytes asked for.
    pub bytes_read: u64,
    /// Bytes given.
    pub bytes_written: u64,
    /// Power cuts.
    pub crashes: u64,
    /// Operations that took minutes.
    pub late: u64,
}

/// The bytes of one write, shared by all the sectors that still hold them.
struct WriteData {
    /// Set when it is queued.
    id: Cell<WriteId>,
    sector: u64,
    bytes: Box<[u8]>,
    /// What should be there instead, if a silent fault has made these bytes.
    meant: Option<Box<[u8]>>,
    /// Value of `Disk::completions` when it completed; `u64::MAX` until then.
    completed: Cell<u64>,
}

/// What one not yet durable write left in one sector.
#[derive(Clone)]
struct Version {
    data: Rc<WriteData>,
    offset: usize,
    /// A failed flush had it in hand: later flushes succeed without it, as on Linux.
    doomed: bool,
}

impl Version {
    fn bytes(&self) -> &[u8] {
        &self.data.bytes[self.offset..self.offset + SECTOR]
    }

    /// What should be there, if it is something else.
    fn meant(&self) -> Option<&[u8]> {
        let meant = &self.data.meant.as_ref()?[self.offset..self.offset + SECTOR];
        (meant != self.bytes()).then_some(meant)
    }
}

/// By sector, in the order in which they arrived; never empty.
type Versions = BTreeMap<u64, Vec<Version>>;

/// Blocks of a chunk of [`Platter`].
const CHUNK: u64 = 64;

type Chunk = [Option<Rc<[u8; BLOCK]>>; CHUNK as usize];

/// What survives anything: sparse blocks, in chunks that clones share, so that a clone costs little.
#[derive(Clone, Default)]
struct Platter(BTreeMap<u64, Rc<Chunk>>);

impl Platter {
    fn get(&self, block: u64) -> Option<&[u8; BLOCK]> {
        self.0.get(&(block / CHUNK))?[(block % CHUNK) as usize].as_deref()
    }

    fn slot(&mut self, block: u64) -> &mut Option<Rc<[u8; BLOCK]>> {
        let chunk = self.0.entry(block / CHUNK).or_insert_with(|| Rc::new([const { None }; _]));
        &mut Rc::make_mut(chunk)[(block % CHUNK) as usize]
    }

    fn blocks(&self) -> impl Iterator<Item = u64> {
        self.0.iter().flat_map(|(chunk, blocks)| {
            let there = blocks.iter().zip(chunk * CHUNK..).filter(|(block, _)| block.is_some());
            there.map(|(_, block)| block)
        })
    }

    fn set(&mut self, block: u64, bytes: &[u8; BLOCK]) {
        *self.slot(block) = Some(Rc::new(*bytes));
    }

    /// Changes one sector; the rest of a block that was blank is `background`.
    fn set_sector(&mut self, sector: u64, bytes: &[u8], background: u8) {
        let slot = self.slot(sector / SECTORS_PER_BLOCK);
        let block = slot.get_or_insert_with(|| Rc::new([background; BLOCK]));
        let start = (sector % SECTORS_PER_BLOCK) as usize * SECTOR;
        Rc::make_mut(block)[start..start + SECTOR].copy_from_slice(bytes);
    }
}

enum Work {
    Read,
    Write {
        data: Rc<WriteData>,
        landed: Vec<bool>,
    },
    /// Covers writes whose `completed` is below this.
    Flush {
        covers: u64,
    },
}

struct Op {
    front: u64,
    /// Names it among all there ever were; tokens are its front-end's affair.
    number: u64,
    token: Token,
    work: Work,
    segments: Vec<Segment>,
    sector: u64,
    sectors: u64,
    submitted: bool,
    /// Reaps of its front-end that must pass first.
    delay: u64,
    /// The time that must have come, in nanoseconds.
    due: u64,
    failure: Option<DeviceError>,
    silent: Option<Silent>,
}

/// What goes wrong with an operation that succeeds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Silent {
    Lost,
    Misdirected,
    FlipAtRest,
    FlipOnRead,
}

impl Op {
    fn kind(&self) -> OpKind {
        match self.work {
            Work::Read => OpKind::Read,
            Work::Write { .. } => OpKind::Write,
            Work::Flush { .. } => OpKind::Flush,
        }
    }

    fn block(&self) -> BlockAddr {
        BlockAddr::new(self.sector / SECTORS_PER_BLOCK)
    }

    /// True when `filter` means one of the blocks.
    fn is_meant_by(&self, filter: &OpFilter) -> bool {
        let end = (self.sector + self.sectors).div_ceil(SECTORS_PER_BLOCK);
        let blocks = self.block().get()..end.max(self.block().get() + 1);
        blocks.map(BlockAddr::new).any(|block| filter(self.kind(), block))
    }

    fn overlaps(&self, sector: u64, sectors: u64) -> bool {
        self.sector < sector + sectors && sector < self.sector + self.sectors
    }
}

/// Says of an operation whether it is meant, by its kind and each of its blocks.
type OpFilter = Box<dyn Fn(OpKind, BlockAddr) -> bool>;

/// A sector, and what it holds or is read as.
type Found = (u64, Box<[u8]>);

/// The rates that hold for an operation, by its kind and first block.
type RatesOf = Box<dyn Fn(OpKind, BlockAddr) -> FaultRates>;

/// The shortest and the longest time that a late operation takes, in nanoseconds: 1 to 10 minutes.
const LATE: std::ops::Range<u64> = 60_000_000_000..600_000_000_000;

struct Disk {
    config: SimConfig,
    random: Random,
    durable: Platter,
    /// The last version of each sector is what reads see.
    volatile: Versions,
    background: u8,
    canary: Option<u8>,
    ops: Vec<Op>,
    /// Writes completed so far.
    completions: u64,
    /// Front-ends made before the last power cut are dead.
    first_living_front: u64,
    next_front: u64,
    next_number: u64,
    /// Writes and flushes that may still complete before the power goes.
    power_left: Option<u64>,
    faults: Vec<Fault>,
    /// Front-ends that have not heard of a failed flush: their next one fails too, as each open
    /// file of Linux hears of a write-back error once.
    owed_failures: BTreeSet<u64>,
    rates: Option<RatesOf>,
    /// Sectors that cannot be read; true for those that cannot be written either.
    bad: BTreeMap<u64, bool>,
    /// Durable sectors that do not hold what was last written there, which is kept here.
    damaged: BTreeMap<u64, Box<[u8]>>,
    damage: Vec<Damage>,
    strikes: Vec<Strike>,
    /// Time, for late operations.
    now: u64,
    hold: Option<OpFilter>,
    /// The one operation, if any, that may complete.
    only: Option<Option<u64>>,
    exclusive: Option<OpFilter>,
    trace: Option<Vec<Traced>>,
    counters: SimCounters,
}

/// A simulated disk. Clones are handles on the same one.
#[derive(Clone)]
pub struct SimDisk(Rc<RefCell<Disk>>);

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let disk = self.0.borrow();
        f.debug_struct("SimDisk")
            .field("config", &disk.config)
            .field("in_flight", &disk.ops.len())
            .field("volatile_sectors", &disk.volatile.len())
            .field("counters", &disk.counters)
            .finish()
    }
}

impl SimDisk {
    /// A blank disk.
    pub fn new(config: SimConfig) -> Self {
        Self(Rc::new(RefCell::new(Disk {
            config,
            random: Random::new(config.seed),
            durable: Platter::default(),
            volatile: BTreeMap::new(),
            background: 0,
            canary: None,
            ops: Vec::new(),
            completions: 0,
            first_living_front: 0,
            next_front: 0,
            next_number: 0,
            power_left: None,
            faults: Vec::new(),
            owed_failures: BTreeSet::new(),
            rates: None,
            bad: BTreeMap::new(),
            damaged: BTreeMap::new(),
            damage: Vec::new(),
            strikes: Vec::new(),
            now: 0,
            hold: None,
            only: None,
            exclusive: None,
            trace: None,
            counters: SimCounters::default(),
        })))
    }

    /// Another disk with the durable contents of this one, and a seed of its own.
    pub fn fork(&self, seed: u64) -> Self {
        let disk = self.0.borrow();
        let copy = Self::new(SimConfig { seed, ..disk.config });
        copy.0.borrow_mut().durable = disk.durable.clone();
        copy.0.borrow_mut().damaged = disk.damaged.clone();
        copy.0.borrow_mut().background = disk.background;
        copy.0.borrow_mut().canary = disk.canary;
        copy
    }

    /// A front-end for one shard.
    pub fn connect(&self) -> SimDevice {
        let mut disk = self.0.borrow_mut();
        let front = disk.next_front;
        disk.next_front += 1;
        SimDevice { disk: self.clone(), front }
    }

    /// Changes the order of completions from here on.
    pub fn set_schedule(&self, schedule: Schedule) {
        self.0.borrow_mut().config.schedule = schedule;
    }

    /// What blocks that were never written read as: a former tenant's bytes, to catch leaks with.
    pub fn set_background(&self, byte: u8) {
        self.0.borrow_mut().background = byte;
    }

    /// What blocks hold from the moment on in which they are retired ([`Device::retire`]): whoever
    /// reads one later than that, or retires it while it is in use, is found out by it, also when
    /// the bytes there were his own.
    pub fn set_canary(&self, byte: u8) {
        self.0.borrow_mut().canary = Some(byte);
    }

    /// Lets `operations` more writes and flushes complete, then nothing any more, reads included.
    /// Whatever is in flight then stays in flight, for [`SimDisk::crash`] to decide on.
    pub fn stop_after(&self, operations: u64) {
        self.0.borrow_mut().power_left = Some(operations);
    }

    /// Takes [`SimDisk::stop_after`] back, unless it has taken hold: a caller that does nothing but
    /// wait for the disk would wait for ever.
    pub fn stay_on(&self) {
        let power = &mut self.0.borrow_mut().power_left;
        *power = power.filter(|left| *left == 0);
    }

    /// True once [`SimDisk::stop_after`] has taken hold.
    pub fn stopped(&self) -> bool {
        self.0.borrow().power_left == Some(0)
    }

    /// Adds a fault. Operations are counted from here, when they are queued.
    pub fn inject(&self, fault: Fault) {
        self.0.borrow_mut().faults.push(fault);
    }

    /// True while a lasting fault is at work.
    pub fn is_failing(&self) -> bool {
        self.0.borrow().faults.iter().any(|fault| fault.lasting && fault.after == 0)
    }

    /// Takes all faults away, and mends bad sectors. What is damaged stays so.
    pub fn heal(&self) {
        let mut disk = self.0.borrow_mut();
        disk.faults.clear();
        disk.rates = None;
        disk.bad.clear();
    }

    /// From here on operations go wrong by themselves, at the rates that `rates_of` gives for their
    /// kind and first block (0 for a flush), until [`SimDisk::heal`] or a power cut.
    pub fn set_rates(&self, rates_of: impl Fn(OpKind, BlockAddr) -> FaultRates + 'static) {
        self.0.borrow_mut().rates = Some(Box::new(rates_of));
    }

    /// Tells the time, in nanoseconds, to operations that are late.
    pub fn set_now(&self, now: u64) {
        self.0.borrow_mut().now = now;
    }

    /// When the next operation that is late may complete, in nanoseconds.
    pub fn next_due(&self) -> Option<u64> {
        let disk = self.0.borrow();
        disk.ops.iter().map(|op| op.due).filter(|due| *due > disk.now).min()
    }

    /// Operations in flight that are not late.
    pub fn in_flight_in_time(&self) -> usize {
        let disk = self.0.borrow();
        disk.ops.iter().filter(|op| op.due <= disk.now).count()
    }

    /// What silent faults did since the last call, and will not be told again.
    pub fn take_damage(&self) -> Vec<Damage> {
        std::mem::take(&mut self.0.borrow_mut().damage)
    }

    /// Blocks that hold something else than was written there last.
    pub fn damaged_blocks(&self) -> BTreeSet<BlockAddr> {
        let disk = self.0.borrow();
        let sectors = disk.damaged.keys().chain(disk.volatile.keys());
        let damaged = sectors.filter(|sector| disk.meant_instead(**sector).is_some());
        damaged.map(|sector| BlockAddr::new(sector / SECTORS_PER_BLOCK)).collect()
    }

    /// How many operations went wrong so far; for [`SimDisk::strikes_since`].
    pub fn strikes(&self) -> usize {
        self.0.borrow().strikes.len()
    }

    /// The operations that went wrong after the first `count`, in the order in which they completed.
    pub fn strikes_since(&self, count: usize) -> Vec<Strike> {
        self.0.borrow().strikes[count..].to_vec()
    }

    /// Keeps the operations that `filter` means from completing until [`SimDisk::release`].
    pub fn hold(&self, filter: impl Fn(OpKind, BlockAddr) -> bool + 'static) {
        self.0.borrow_mut().hold = Some(Box::new(filter));
    }

    /// Keeps everything from completing but the operation `only`, until [`SimDisk::release`]: a test
    /// that tries every order says each time which is next.
    pub fn hold_all_but(&self, only: Option<OpNumber>) {
        self.0.borrow_mut().only = Some(only.map(|number| number.0));
    }

    /// True while [`SimDisk::hold_all_but`] is at work: who does nothing but wait for an operation
    /// would wait for ever.
    pub fn is_holding(&self) -> bool {
        self.0.borrow().only.is_some()
    }

    /// The operations in flight that may complete next, in the order in which they were queued.
    pub fn flying(&self) -> Vec<Flying> {
        let disk = self.0.borrow();
        let flying = disk.ops.iter().filter(|op| op.submitted);
        let told =
            |op: &Op| Flying { number: OpNumber(op.number), kind: op.kind(), block: op.block() };
        flying.map(told).collect()
    }

    /// Ends [`SimDisk::hold`] and [`SimDisk::hold_all_but`].
    pub fn release(&self) {
        self.0.borrow_mut().only = None;
        self.0.borrow_mut().hold = None;
    }

    /// Panics from here on when two writes of a sector are in flight together and `filter` means
    /// the later one: two writes of one node must never be.
    pub fn forbid_overlapping_writes(&self, filter: impl Fn(OpKind, BlockAddr) -> bool + 'static) {
        self.0.borrow_mut().exclusive = Some(Box::new(filter));
    }

    /// Starts a new trace and returns the one before it.
    pub fn trace(&self) -> Vec<Traced> {
        self.0.borrow_mut().trace.replace(Vec::new()).unwrap_or_default()
    }

    /// What was done so far.
    pub fn counters(&self) -> SimCounters {
        self.0.borrow().counters
    }

    /// Operations that were queued and have not completed.
    pub fn in_flight(&self) -> usize {
        self.0.borrow().ops.len()
    }

    /// Sectors that a power cut could still change.
    pub fn volatile_sectors(&self) -> usize {
        self.0.borrow().volatile.len()
    }

    /// The bytes of a block as a read would see them now.
    pub fn peek(&self, block: BlockAddr) -> [u8; BLOCK] {
        let mut bytes = [0; BLOCK];
        self.0.borrow().read_block(block.get() * SECTORS_PER_BLOCK, &mut bytes);
        bytes
    }

    /// Changes the durable bytes of a block behind everybody's back, to damage it.
    pub fn poke(&self, block: BlockAddr, bytes: &[u8; BLOCK]) {
        self.0.borrow_mut().replace(block.get(), bytes);
    }

    /// Cuts the power and brings it back. Front-ends made before are dead: they complete nothing.
    pub fn crash(&self, keep: Keep<'_>) {
        self.0.borrow_mut().crash(keep);
    }

    /// What would be if the power failed now. This disk goes on as if nothing had been asked; `seed`
    /// decides in which order writes in flight had arrived.
    pub fn power_failure(&self, seed: u64) -> PowerFailure {
        let disk = self.0.borrow();
        let mut volatile = disk.volatile.clone();
        let mut flying: Vec<&Op> = disk.ops.iter().collect();
        Random::new(seed).shuffle(&mut flying);
        arrive(&mut volatile, flying.into_iter());
        PowerFailure {
            config: disk.config,
            background: disk.background,
            canary: disk.canary,
            durable: disk.durable.clone(),
            damaged: disk.damaged.clone(),
            volatile,
        }
    }
}

/// A power failure at one instant of a disk's life, and all the disks it may leave behind.
pub struct PowerFailure {
    config: SimConfig,
    background: u8,
    canary: Option<u8>,
    durable: Platter,
    damaged: BTreeMap<u64, Box<[u8]>>,
    volatile: Versions,
}

impl fmt::Debug for PowerFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PowerFailure").field("writes", &self.writes()).finish()
    }
}

impl PowerFailure {
    /// The writes that it decides on, oldest first.
    pub fn writes(&self) -> Vec<VolatileWrite> {
        let mut writes = BTreeMap::new();
        for version in self.volatile.values().flatten() {
            let data = &version.data;
            writes.entry(data.id.get()).or_insert_with(|| VolatileWrite {
                id: data.id.get(),
                block: BlockAddr::new(data.sector / SECTORS_PER_BLOCK),
                sectors: (data.bytes.len() / SECTOR) as u64,
            });
        }
        writes.into_values().collect()
    }

    /// The disk as it is when the power is back and `keep` was kept. `seed` is the new disk's, and
    /// decides what `keep` leaves open.
    pub fn disk(&self, seed: u64, keep: Keep<'_>) -> SimDisk {
        let disk = SimDisk::new(SimConfig { seed, ..self.config });
        {
            let mut disk = disk.0.borrow_mut();
            disk.background = self.background;
            disk.canary = self.canary;
            disk.durable = self.durable.clone();
            disk.damaged = self.damaged.clone();
            disk.keep(&self.volatile, keep);
        }
        disk
    }
}

/// Lets what is left of writes in flight arrive, in the order given.
fn arrive<'a>(volatile: &mut Versions, flying: impl Iterator<Item = &'a Op>) {
    for op in flying.filter(|op| op.submitted) {
        let Work::Write { data, landed } = &op.work else { continue };
        for (index, _) in landed.iter().enumerate().filter(|(_, landed)| !**landed) {
            let data = Rc::clone(data);
            let version = Version { data, offset: index * SECTOR, doomed: false };
            volatile.entry(op.sector + index as u64).or_default().push(version);
        }
    }
}

impl Disk {
    fn replace(&mut self, block: u64, bytes: &[u8; BLOCK]) {
        self.durable.set(block, bytes);
        let first = block * SECTORS_PER_BLOCK;
        for sector in first..first + SECTORS_PER_BLOCK {
            self.volatile.remove(&sector);
            self.damaged.remove(&sector);
        }
    }

    fn retire(&mut self, block: u64) {
        let in_use = |op: &Op| op.overlaps(block * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK);
        assert!(!self.ops.iter().any(in_use), "block {block} is retired, and I/O on it in flight");
        if let Some(byte) = self.canary {
            self.replace(block, &[byte; BLOCK]);
        }
    }

    fn read_sector(&self, sector: u64, target: &mut [u8]) {
        if let Some(version) = self.volatile.get(&sector).and_then(|versions| versions.last()) {
            return target.copy_from_slice(version.bytes());
        }
        match self.durable.get(sector / SECTORS_PER_BLOCK) {
            Some(block) => {
                let start = (sector % SECTORS_PER_BLOCK) as usize * SECTOR;
                target.copy_from_slice(&block[start..start + SECTOR]);
            }
            None => target.fill(self.background),
        }
    }

    /// Reads sectors of one block, from `sector` on.
    fn read_block(&self, sector: u64, target: &mut [u8]) {
        let end = sector + (target.len() / SECTOR) as u64;
        if self.volatile.range(sector..end).next().is_some() {
            for (sector, target) in (sector..).zip(target.chunks_mut(SECTOR)) {
                self.read_sector(sector, target);
            }
            return;
        }
        match self.durable.get(sector / SECTORS_PER_BLOCK) {
            Some(block) => {
                let start = (sector % SECTORS_PER_BLOCK) as usize * SECTOR;
                target.copy_from_slice(&block[start..start + target.len()]);
            }
            None => target.fill(self.background),
        }
    }

    fn make_durable(&mut self, sector: u64, version: &Version) {
        self.durable.set_sector(sector, version.bytes(), self.background);
        match version.meant() {
            Some(meant) => self.damaged.insert(sector, meant.into()),
            None => self.damaged.remove(&sector),
        };
    }

    /// One sector of a write reaches the disk, or its cache.
    fn land(&mut self, sector: u64, version: Version) {
        if self.bad.get(&sector) == Some(&false) {
            self.bad.remove(&sector);
        }
        if self.config.volatile_cache {
            self.volatile.entry(sector).or_default().push(version);
        } else {
            self.make_durable(sector, &version);
        }
    }

    /// Lets the sectors of `op` that `chosen` picks arrive, unless they have.
    fn land_some(&mut self, op: &mut Op, mut chosen: impl FnMut(&mut Random, u64) -> bool) {
        let Work::Write { data, landed } = &mut op.work else { return };
        for (index, landed) in landed.iter_mut().enumerate() {
            let sector = op.sector + index as u64;
            if !*landed && chosen(&mut self.random, sector) {
                *landed = true;
                let data = Rc::clone(data);
                self.land(sector, Version { data, offset: index * SECTOR, doomed: false });
            }
        }
    }

    /// Writes in flight may arrive at any moment: whoever touches their sectors meets some of them.
    fn disturb(&mut self, sector: u64, sectors: u64) {
        let mut ops = std::mem::take(&mut self.ops);
        for op in ops.iter_mut().filter(|op| op.submitted && op.overlaps(sector, sectors)) {
            let odds = self.random.below(3);
            self.land_some(op, |random, at| {
                (sector..sector + sectors).contains(&at) && random.chance(odds, 2)
            });
        }
        self.ops = ops;
    }

    fn queue(&mut self, mut op: Op, length: u64) {
        if op.front < self.first_living_front {
            return;
        }
        let in_flight = self.ops.iter().filter(|other| other.front == op.front).count();
        assert!(in_flight < self.config.depth, "more than {} operations in flight", in_flight);
        let kind = op.kind();
        if let (OpKind::Write, Some(filter)) = (kind, &self.exclusive) {
            let overlap = self
                .ops
                .iter()
                .any(|other| other.kind() == kind && other.overlaps(op.sector, op.sectors));
            assert!(
                !overlap || !op.is_meant_by(filter),
                "two writes of block {} are in flight together",
                op.block()
            );
        }
        match kind {
            OpKind::Read => {
                self.counters.reads += 1;
                self.counters.bytes_read += length;
            }
            OpKind::Write => {
                self.counters.writes += 1;
                self.counters.bytes_written += length;
            }
            OpKind::Flush => self.counters.flushes += 1,
        }
        if let Some(trace) = &mut self.trace {
            trace.push(Traced { kind, block: op.block(), length: ByteCount::new(length) });
        }
        for fault in self.faults.iter_mut().filter(|f| f.kind.is_none_or(|k| k == kind)) {
            match fault.after {
                0 => {
                    op.failure = Some(DeviceError::Os(libc::EIO));
                    fault.after = if fault.lasting { 0 } else { u64::MAX };
                }
                _ => fault.after -= 1,
            }
        }
        self.draw_fate(&mut op);
        if self.config.schedule == Schedule::Random {
            op.delay = match self.random.below(16) {
                0 => self.random.below(200),
                1..8 => self.random.below(8),
                _ => 0,
            };
        }
        op.number = self.next_number;
        self.next_number += 1;
        if let Work::Write { data, .. } = &op.work {
            data.id.set(WriteId(op.number));
        }
        self.ops.push(op);
    }

    /// Decides what goes wrong with an operation by itself.
    fn draw_fate(&mut self, op: &mut Op) {
        let kind = op.kind();
        let range = op.sector..op.sector + op.sectors;
        let is_bad = |(_, writes): (&u64, &bool)| kind == OpKind::Read || *writes;
        if kind != OpKind::Flush && self.bad.range(range.clone()).any(is_bad) {
            op.failure = Some(DeviceError::Os(libc::EIO));
        }
        let Some(rates_of) = &self.rates else { return };
        let rates = rates_of(kind, op.block());
        let random = &mut self.random;
        let mut strikes = |rate: u32| rate > 0 && random.chance(u64::from(rate), 1_000_000);
        if strikes(rates.late) {
            self.counters.late += 1;
            op.due = self.now + LATE.start + self.random.below(LATE.end - LATE.start);
            return;
        }
        let error_rate = match kind {
            OpKind::Read => rates.read_error,
            OpKind::Write => rates.write_error,
            OpKind::Flush => rates.flush_error,
        };
        if strikes(error_rate) {
            op.failure = Some(DeviceError::Os(libc::EIO));
        } else if kind != OpKind::Flush && strikes(rates.short) {
            op.failure = Some(DeviceError::EndOfDevice);
        }
        if op.failure.is_some() {
            if kind != OpKind::Flush && strikes(rates.lasting) {
                let sector = range.start + self.random.below(op.sectors);
                let writes = self.random.chance(1, 2);
                self.bad.insert(sector, writes);
            }
            return;
        }
        op.silent = match kind {
            OpKind::Read => strikes(rates.flip_on_read).then_some(Silent::FlipOnRead),
            OpKind::Write if strikes(rates.lost_write) => Some(Silent::Lost),
            OpKind::Write if strikes(rates.misdirected_write) => Some(Silent::Misdirected),
            OpKind::Write => strikes(rates.flip_at_rest).then_some(Silent::FlipAtRest),
            OpKind::Flush => None,
        };
        if let (Some(Silent::Lost | Silent::Misdirected), Work::Write { landed, .. }) =
            (op.silent, &mut op.work)
        {
            landed.fill(true); // None of it is left to arrive.
        }
    }

    fn reap(&mut self, front: u64, completions: &mut Vec<Completion>) {
        if front < self.first_living_front {
            return;
        }
        let mut ready = Vec::new();
        for op in self.ops.iter_mut().filter(|op| op.front == front && op.submitted) {
            if self.hold.as_ref().is_some_and(|held| op.is_meant_by(held))
                || self.only.is_some_and(|only| only != Some(op.number))
            {
                continue;
            }
            match op.delay {
                0 if op.due > self.now => {}
                0 => ready.push(op.number),
                _ => op.delay -= 1,
            }
        }
        match self.config.schedule {
            Schedule::Random => self.random.shuffle(&mut ready),
            Schedule::Fifo => ready.truncate(1),
            Schedule::AtOnce => {}
        }
        for number in ready {
            if self.power_left == Some(0) {
                break;
            }
            let index = self.ops.iter().position(|op| op.number == number);
            let op = self.ops.remove(index.expect("it was there when `ready` was made"));
            if let (Some(left), true) = (&mut self.power_left, op.kind() != OpKind::Read) {
                *left -= 1;
            }
            completions.push(self.complete(op));
        }
    }

    fn complete(&mut self, mut op: Op) -> Completion {
        self.disturb(op.sector, op.sectors);
        match &op.work {
            Work::Read => self.complete_read(&op),
            Work::Write { data, .. } => {
                let data = Rc::clone(data);
                let mut now = vec![0; data.bytes.len()];
                gather(&op.segments, &mut now);
                assert!(now == *data.bytes, "memory changed under the write of {}", op.block());
                // What a failed write has left in the cache is flushed like anything else there.
                let completed = self.completions;
                match op.failure {
                    None => self.land_some(&mut op, |_, _| true),
                    Some(DeviceError::EndOfDevice) => {
                        let end = op.sector + self.random.below(op.sectors);
                        self.land_some(&mut op, |_, sector| sector < end);
                    }
                    Some(_) => self.land_some(&mut op, |random, _| random.chance(1, 2)),
                }
                match op.silent {
                    Some(Silent::Misdirected) => self.misdirect(&op, &data, completed),
                    Some(Silent::Lost) => self.lose(&op, &data, completed),
                    Some(Silent::FlipAtRest) => self.flip_at_rest(&op, &data, completed),
                    Some(Silent::FlipOnRead) | None => {}
                }
                data.completed.set(completed);
                self.completions += 1;
            }
            Work::Flush { covers } => {
                let owed = self.owed_failures.remove(&op.front);
                if op.failure.is_some() {
                    self.owed_failures = (self.first_living_front..self.next_front).collect();
                    self.owed_failures.remove(&op.front);
                } else if owed {
                    op.failure = Some(DeviceError::Os(libc::EIO));
                }
                self.settle(*covers, op.failure.is_some());
            }
        }
        if op.failure.is_some() {
            self.note_strike(&op, Harm::Failed);
        }
        Completion { token: op.token, result: op.failure.map_or(Ok(()), Err) }
    }

    fn note_strike(&mut self, op: &Op, harm: Harm) {
        let end = (op.sector + op.sectors).div_ceil(SECTORS_PER_BLOCK);
        self.strikes.push(Strike {
            front: op.front,
            kind: op.kind(),
            block: op.block(),
            blocks: end - op.block().get(),
            harm,
        });
    }

    fn complete_read(&mut self, op: &Op) {
        if op.failure.is_some() {
            // Nothing is promised about the memory after a failed read, so nobody may look at it.
            return op.segments.iter().for_each(|s| s.write(&vec![0xee; s.len()]));
        }
        let mut bytes = self.bytes_of(op);
        let flipped = op.silent == Some(Silent::FlipOnRead);
        if flipped {
            let sector = op.sector + self.random.below(op.sectors);
            let at = (sector - op.sector) as usize * SECTOR;
            self.random.flip(&mut bytes[at..at + SECTOR]);
            let found = bytes[at..at + SECTOR].into();
            self.note_damage(sector / SECTORS_PER_BLOCK, vec![(sector, found)]);
        }
        scatter(&bytes, &op.segments);
        let damaged = |sector| self.meant_instead(sector).is_some();
        if flipped || (op.sector..op.sector + op.sectors).any(damaged) {
            self.note_strike(op, Harm::Damaged);
        }
    }

    /// Remembers what `block` is read as instead of what it should hold.
    fn note_damage(&mut self, block: u64, found: Vec<Found>) {
        let mut meant = Box::new([0; BLOCK]);
        self.read_meant(block * SECTORS_PER_BLOCK, &mut meant[..]);
        let place = |sector: u64| (sector % SECTORS_PER_BLOCK) as usize;
        let found = found.into_iter().map(|(sector, bytes)| (place(sector), bytes)).collect();
        self.damage.push(Damage { block: BlockAddr::new(block), meant, found });
    }

    /// What a sector should hold, if it holds something else.
    fn meant_instead(&self, sector: u64) -> Option<&[u8]> {
        match self.volatile.get(&sector).and_then(|versions| versions.last()) {
            Some(version) => version.meant(),
            None => self.damaged.get(&sector).map(|meant| &meant[..]),
        }
    }

    /// What the sectors from `first` on should hold.
    fn read_meant(&self, first: u64, target: &mut [u8]) {
        for (sector, target) in (first..).zip(target.chunks_mut(SECTOR)) {
            match self.meant_instead(sector) {
                Some(meant) => target.copy_from_slice(meant),
                None => self.read_sector(sector, target),
            }
        }
    }

    /// The sectors from `first` on hold `bytes` from now on, by the doing of the write `of`, and
    /// should hold `meant`.
    fn spoil(
        &mut self,
        first: u64,
        bytes: Vec<u8>,
        meant: Vec<u8>,
        of: &WriteData,
        completed: u64,
    ) {
        let wrong = Rc::new(WriteData {
            id: of.id.clone(),
            sector: first,
            bytes: bytes.into(),
            meant: Some(meant.into()),
            completed: Cell::new(completed),
        });
        let mut found: BTreeMap<u64, Vec<Found>> = BTreeMap::new();
        let end = first + (wrong.bytes.len() / SECTOR) as u64;
        for (sector, offset) in (first..end).zip((0..).step_by(SECTOR)) {
            let version = Version { data: Rc::clone(&wrong), offset, doomed: false };
            if version.meant().is_some() {
                let block = sector / SECTORS_PER_BLOCK;
                found.entry(block).or_default().push((sector, version.bytes().into()));
            }
            self.land(sector, version);
        }
        for (block, found) in found {
            self.note_damage(block, found);
        }
    }

    /// Leaves everything as it was, though the write of `data` is acknowledged.
    fn lose(&mut self, op: &Op, data: &WriteData, completed: u64) {
        let before = self.bytes_of(op);
        self.spoil(op.sector, before, data.bytes.to_vec(), data, completed);
    }

    /// Lets a write arrive somewhere else, if there is anywhere.
    fn misdirect(&mut self, op: &Op, data: &WriteData, completed: u64) {
        self.lose(op, data, completed);
        let Some(rates_of) = &self.rates else { return };
        let offset = op.sector % SECTORS_PER_BLOCK;
        let fits = |block: &u64| {
            let start = block * SECTORS_PER_BLOCK + offset;
            let blocks = *block..(start + op.sectors).div_ceil(SECTORS_PER_BLOCK);
            !op.overlaps(start, op.sectors)
                && blocks.into_iter().all(|block| {
                    let known = self.durable.get(block).is_some();
                    known && rates_of(OpKind::Write, BlockAddr::new(block)).stray_target
                })
        };
        let targets: Vec<u64> = self.durable.blocks().filter(fits).collect();
        if targets.is_empty() {
            return;
        }
        let first = self.random.pick(&targets) * SECTORS_PER_BLOCK + offset;
        let mut meant = vec![0; data.bytes.len()];
        self.read_meant(first, &mut meant);
        self.spoil(first, data.bytes.to_vec(), meant, data, completed);
    }

    /// Lets one bit of a write that has just arrived be another one.
    fn flip_at_rest(&mut self, op: &Op, data: &WriteData, completed: u64) {
        let sector = op.sector + self.random.below(op.sectors);
        let at = (sector - op.sector) as usize * SECTOR;
        let right = data.bytes[at..at + SECTOR].to_vec();
        let mut bytes = right.clone();
        self.random.flip(&mut bytes);
        self.spoil(sector, bytes, right, data, completed);
    }

    fn bytes_of(&self, op: &Op) -> Vec<u8> {
        let mut bytes = vec![0; op.sectors as usize * SECTOR];
        let end = op.sector + op.sectors;
        let mut sector = op.sector;
        while sector < end {
            let block = sector / SECTORS_PER_BLOCK;
            let next = end.min((block + 1) * SECTORS_PER_BLOCK);
            let place = |at: u64| (at - op.sector) as usize * SECTOR;
            self.read_block(sector, &mut bytes[place(sector)..place(next)]);
            sector = next;
        }
        bytes
    }

    /// A flush of the writes before `covers` ends, well or badly.
    fn settle(&mut self, covers: u64, failed: bool) {
        for (sector, mut versions) in std::mem::take(&mut self.volatile) {
            let covered = |version: &Version| version.data.completed.get() < covers;
            if failed && self.random.chance(1, 2) {
                versions.iter_mut().filter(|v| covered(v)).for_each(|v| v.doomed = true);
            } else if let Some(last) = versions.iter().rposition(|v| covered(v) && !v.doomed) {
                self.make_durable(sector, &versions[last]);
                versions.drain(..=last);
            }
            if !versions.is_empty() {
                self.volatile.insert(sector, versions);
            }
        }
    }

    fn crash(&mut self, keep: Keep<'_>) {
        let mut ops = std::mem::take(&mut self.ops);
        self.random.shuffle(&mut ops);
        let mut volatile = std::mem::take(&mut self.volatile);
        arrive(&mut volatile, ops.iter());
        self.keep(&volatile, keep);
        self.first_living_front = self.next_front;
        self.power_left = None;
        self.faults.clear();
        self.rates = None;
        self.owed_failures.clear();
        self.hold = None;
        self.only = None;
        self.counters.crashes += 1;
    }

    /// Makes durable what a power cut leaves of `volatile`.
    fn keep(&mut self, volatile: &Versions, keep: Keep<'_>) {
        let mut block_now = None;
        let mut mood = 0;
        for (&sector, versions) in volatile {
            let block = sector / SECTORS_PER_BLOCK;
            if block_now != Some(block) {
                block_now = Some(block);
                mood = self.random.below(3);
            }
            let newest = versions.len() - 1;
            let kept = match &keep {
                Keep::Nothing => None,
                Keep::Everything => Some(newest),
                Keep::Where(accepts) => accepts(BlockAddr::new(block)).then_some(newest),
                Keep::Parts(accepts) => versions.iter().rposition(|version| {
                    accepts(version.data.id.get(), (version.offset / SECTOR) as u64)
                }),
                Keep::Random => match mood {
                    0 => None,
                    1 => Some(newest),
                    _ => self
                        .random
                        .below(versions.len() as u64 + 1)
                        .checked_sub(1)
                        .map(|i| i as usize),
                },
            };
            if let Some(kept) = kept {
                self.make_durable(sector, &versions[kept]);
            }
        }
    }
}

/// Lays `bytes` into `segments`, one after the other.
fn scatter(bytes: &[u8], segments: &[Segment]) {
    let mut rest = bytes;
    for segment in segments {
        let (part, after) = rest.split_at(segment.len());
        segment.write(part);
        rest = after;
    }
}

/// Collects the bytes of `segments`, one after the other.
fn gather(segments: &[Segment], target: &mut [u8]) {
    let mut rest = target;
    for segment in segments {
        let (part, after) = rest.split_at_mut(segment.len());
        segment.read(part);
        rest = after;
    }
}

/// One shard's way to a [`SimDisk`]. Dropping it is killing the process: what it had in flight
/// arrives in part, and nothing of it is promised.
#[derive(Debug)]
pub struct SimDevice {
    disk: SimDisk,
    front: u64,
}

impl SimDevice {
    /// Which front-end of its disk it is.
    pub fn front(&self) -> u64 {
        self.front
    }

    fn op(&self, token: Token, offset: ByteOffset, segments: &[Segment], write: bool) -> (Op, u64) {
        let config = self.disk.0.borrow().config;
        let length: u64 = segments.iter().map(|segment| segment.len() as u64).sum();
        let alignment = u64::from(config.offset_alignment);
        assert!(
            offset.get().is_multiple_of(alignment) && length.is_multiple_of(alignment),
            "{length} bytes at {offset} are not aligned to {alignment}"
        );
        assert!(length > 0, "an operation of no bytes at {offset}");
        assert!(
            offset.get().checked_add(length).is_some_and(|end| end <= config.capacity.get()),
            "{length} bytes at {offset} reach past the end of the device at {}",
            config.capacity
        );
        assert!(segments.len() <= SEGMENTS_MAX, "{} segments", segments.len());
        for segment in segments {
            assert!(segment.is_aligned(config.memory_alignment as usize), "unaligned {segment:?}");
        }
        let sectors = length / SECTOR_SIZE;
        let work = if write {
            let mut bytes = vec![0; length as usize];
            gather(segments, &mut bytes);
            let data = WriteData {
                id: Cell::new(WriteId(u64::MAX)),
                sector: offset.get() / SECTOR_SIZE,
                bytes: bytes.into(),
                meant: None,
                completed: Cell::new(u64::MAX),
            };
            Work::Write { data: Rc::new(data), landed: vec![false; sectors as usize] }
        } else {
            Work::Read
        };
        let op = Op {
            front: self.front,
            number: 0,
            token,
            work,
            segments: segments.to_vec(),
            sector: offset.get() / SECTOR_SIZE,
            sectors,
            submitted: false,
            delay: 0,
            due: 0,
            failure: None,
            silent: None,
        };
        (op, length)
    }
}

impl Device for SimDevice {
    fn properties(&self) -> DeviceProperties {
        let config = self.disk.0.borrow().config;
        DeviceProperties {
            capacity: config.capacity,
            offset_alignment: config.offset_alignment,
            memory_alignment: config.memory_alignment,
            volatile_cache: config.volatile_cache,
            keeps_data: true,
        }
    }

    fn read(&mut self, token: Token, offset: ByteOffset, segments: &[Segment]) {
        let (op, length) = self.op(token, offset, segments, false);
        self.disk.0.borrow_mut().queue(op, length);
    }

    fn write(&mut self, token: Token, offset: ByteOffset, segments: &[Segment]) {
        let (op, length) = self.op(token, offset, segments, true);
        self.disk.0.borrow_mut().queue(op, length);
    }

    fn flush(&mut self, token: Token) {
        let mut disk = self.disk.0.borrow_mut();
        // Not when `submit` is called: an inline device flushes here and now.
        let covers = disk.completions;
        let op = Op {
            front: self.front,
            number: 0,
            token,
            work: Work::Flush { covers },
            segments: Vec::new(),
            sector: 0,
            sectors: 0,
            submitted: false,
            delay: 0,
            due: 0,
            failure: None,
            silent: None,
        };
        disk.queue(op, 0);
    }

    fn submit(&mut self) -> bool {
        let mut disk = self.disk.0.borrow_mut();
        for op in disk.ops.iter_mut().filter(|op| op.front == self.front) {
            op.submitted = true;
        }
        false
    }

    fn retire(&mut self, start: BlockAddr, blocks: u64) {
        let mut disk = self.disk.0.borrow_mut();
        if self.front < disk.first_living_front {
            return;
        }
        (start.get()..start.get() + blocks).for_each(|block| disk.retire(block));
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        self.disk.0.borrow_mut().reap(self.front, completions);
    }

    fn refresh(&mut self) {
        // What a failed flush had in hand, later flushes do not write: now it is seen no more.
        self.disk.0.borrow_mut().volatile.retain(|_, versions| {
            versions.retain(|version| !version.doomed);
            !versions.is_empty()
        });
    }
}

impl Drop for SimDevice {
    fn drop(&mut self) {
        // The segments may be gone by now: only bytes copied at submission are used. A panicking
        // test may drop us inside a borrow, and then there is nothing left to get right.
        let Ok(mut disk) = self.disk.0.try_borrow_mut() else { return };
        let ops = std::mem::take(&mut disk.ops);
        let (mine, others) = ops.into_iter().partition(|op| op.front == self.front);
        disk.ops = others;
        let mine: Vec<Op> = mine;
        for mut op in mine.into_iter().filter(|op| op.submitted) {
            disk.land_some(&mut op, |random, _| random.chance(1, 2));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::{Buffer, BufferPool};

    const FIRST: BlockAddr = BlockAddr::new(5);
    const SECOND: BlockAddr = BlockAddr::new(900);

    /// A front-end, memory for it, and a name for each operation.
    struct Desk {
        device: SimDevice,
        pool: BufferPool,
        next: u64,
        lent: BTreeMap<u64, Buffer>,
        done: Vec<Completion>,
    }

    impl Desk {
        fn at(disk: &SimDisk) -> Self {
            Self {
                device: disk.connect(),
                pool: BufferPool::new(64, BLOCK),
                next: 0,
                lent: BTreeMap::new(),
                done: Vec::new(),
            }
        }

        fn name(&mut self) -> Token {
            self.next += 1;
            Token(self.next)
        }

        fn start_write(&mut self, block: BlockAddr, byte: u8) -> Token {
            let token = self.name();
            let mut buffer = self.pool.take().unwrap();
            self.pool.bytes_mut(&mut buffer).fill(byte);
            self.device.write(token, block.offset(), &[self.pool.lend(&buffer)]);
            self.device.submit();
            self.lent.insert(token.0, buffer);
            token
        }

        fn start_read(&mut self, block: BlockAddr) -> Token {
            let token = self.name();
            let buffer = self.pool.take().unwrap();
            self.device.read(token, block.offset(), &[self.pool.lend(&buffer)]);
            self.device.submit();
            self.lent.insert(token.0, buffer);
            token
        }

        fn start_flush(&mut self) -> Token {
            let token = self.name();
            self.device.flush(token);
            self.device.submit();
            token
        }

        fn finish(&mut self, token: Token) -> Result<(), DeviceError> {
            for _ in 0..1000 {
                self.device.reap(&mut self.done);
                if let Some(at) = self.done.iter().position(|done| done.token == token) {
                    return self.done.remove(at).result;
                }
            }
            panic!("{token:?} never completed");
        }

        fn write(&mut self, block: BlockAddr, byte: u8) -> Result<(), DeviceError> {
            let token = self.start_write(block, byte);
            let result = self.finish(token);
            let buffer = self.lent.remove(&token.0).unwrap();
            self.pool.returned(&buffer);
            self.pool.put(buffer);
            result
        }

        fn flush(&mut self) -> Result<(), DeviceError> {
            let token = self.start_flush();
            self.finish(token)
        }

        fn read(&mut self, block: BlockAddr) -> Vec<u8> {
            let token = self.start_read(block);
            self.finish(token).unwrap();
            let buffer = self.lent.remove(&token.0).unwrap();
            self.pool.returned(&buffer);
            let bytes = self.pool.bytes(&buffer).to_vec();
            self.pool.put(buffer);
            bytes
        }
    }

    fn disk(seed: u64) -> SimDisk {
        SimDisk::new(SimConfig::new(ByteCount::new(64 << 50), seed))
    }

    fn solid(seed: u64) -> SimDisk {
        let config = SimConfig::new(ByteCount::new(64 << 20), seed);
        SimDisk::new(SimConfig { volatile_cache: false, ..config })
    }

    fn sectors(bytes: &[u8]) -> Vec<u8> {
        bytes.chunks(SECTOR).for_each(|s| assert!(s.iter().all(|b| *b == s[0]), "torn inside"));
        bytes.chunks(SECTOR).map(|sector| sector[0]).collect()
    }

    #[test]
    fn what_was_written_is_read_to_the_last_block_of_64_pib() {
        let disk = disk(1);
        let mut desk = Desk::at(&disk);
        let last = BlockAddr::new((64 << 50) / BLOCK_SIZE - 1);
        desk.write(last, 7).unwrap();
        assert_eq!(desk.read(last), [7; BLOCK]);
        assert_eq!(desk.read(FIRST), [0; BLOCK]);
        disk.set_background(0xa5);
        assert_eq!(Desk::at(&disk).read(FIRST), [0xa5; BLOCK]);
    }

    #[test]
    fn every_front_end_sees_the_same_disk() {
        let disk = disk(2);
        let (mut one, mut two) = (Desk::at(&disk), Desk::at(&disk));
        one.write(FIRST, 1).unwrap();
        assert_eq!(two.read(FIRST), [1; BLOCK]);
        two.flush().unwrap();
        disk.crash(Keep::Nothing);
        assert_eq!(disk.peek(FIRST), [1; BLOCK], "any front-end's flush covers every write");
    }

    #[test]
    fn a_flush_keeps_what_completed_before_it_and_nothing_else() {
        let disk = disk(3);
        disk.set_schedule(Schedule::AtOnce);
        let mut desk = Desk::at(&disk);
        desk.write(FIRST, 1).unwrap();
        let flush = desk.start_flush();
        desk.write(SECOND, 2).unwrap();
        desk.finish(flush).unwrap();
        disk.crash(Keep::Nothing);
        assert_eq!(disk.peek(FIRST), [1; BLOCK]);
        assert_eq!(disk.peek(SECOND), [0; BLOCK], "completed after the flush was queued");
    }

    #[test]
    fn a_retired_block_holds_the_canary_for_good_until_it_is_written_again() {
        let disk = disk(14);
        disk.set_canary(0xc5);
        let mut desk = Desk::at(&disk);
        desk.write(FIRST, 1).unwrap();
        desk.write(SECOND, 2).unwrap();
        desk.device.retire(FIRST, 1);
        assert_eq!((disk.peek(FIRST), disk.peek(SECOND)), ([0xc5; BLOCK], [2; BLOCK]));
        for keep in [Keep::Nothing, Keep::Everything] {
            assert_eq!(disk.power_failure(1).disk(1, keep).peek(FIRST), [0xc5; BLOCK]);
        }
        desk.write(FIRST, 3).unwrap();
        assert_eq!(desk.read(FIRST), [3; BLOCK]);
    }

    #[test]
    #[should_panic(expected = "block 5 is retired, and I/O on it in flight")]
    fn a_block_in_use_must_not_be_retired() {
        let mut desk = Desk::at(&disk(15));
        desk.start_read(FIRST);
        desk.device.retire(FIRST, 1);
    }

    #[test]
    fn a_disk_without_a_cache_keeps_every_completed_write() {
        let disk = solid(4);
        Desk::at(&disk).write(FIRST, 1).unwrap();
        disk.crash(Keep::Nothing);
        assert_eq!(disk.peek(FIRST), [1; BLOCK]);
    }

    #[test]
    fn a_power_failure_offers_every_subset_of_the_writes_and_leaves_the_disk_alone() {
        let disk = disk(13);
        disk.set_schedule(Schedule::AtOnce);
        let mut desk = Desk::at(&disk);
        desk.write(FIRST, 1).unwrap();
        desk.flush().unwrap();
        desk.write(FIRST, 2).unwrap();
        desk.write(SECOND, 3).unwrap();
        desk.start_write(FIRST, 4); // In flight: it may have arrived all the same.
        let failure = disk.power_failure(1);
        let writes = failure.writes();
        let blocks: Vec<_> = writes.iter().map(|write| (write.block, write.sectors)).collect();
        assert_eq!(blocks, [(FIRST, 8), (SECOND, 8), (FIRST, 8)]);
        let [two, three, four] = [0, 1, 2].map(|index| writes[index].id);
        for (kept, first, second) in [
            (&[][..], 1, 0),
            (&[two], 2, 0),
            (&[three], 1, 3),
            (&[four], 4, 0),
            (&[two, three], 2, 3),
            (&[two, four], 4, 0),
            (&[three, four], 4, 3),
            (&[two, three, four], 4, 3),
        ] {
            let left = failure.disk(1, Keep::Parts(&|id, _| kept.contains(&id)));
            assert_eq!(left.peek(FIRST), [first; BLOCK], "{kept:?}");
            assert_eq!(left.peek(SECOND), [second; BLOCK], "{kept:?}");
            assert_eq!(left.volatile_sectors(), 0);
        }
        let torn = failure.disk(1, Keep::Parts(&|id, sector| id == four && sector % 2 == 0));
        assert_eq!(sectors(&torn.peek(FIRST)), [4, 1, 4, 1, 4, 1, 4, 1]);
        assert_eq!((disk.in_flight(), disk.counters().crashes), (1, 0));
        assert_eq!(disk.peek(SECOND), [3; BLOCK], "the disk goes on");
    }

    #[test]
    fn each_way_of_keeping_keeps_what_it_says() {
        let left = |keep: Keep<'_>| {
            let disk = disk(5);
            let mut desk = Desk::at(&disk);
            desk.write(FIRST, 1).unwrap();
            desk.write(SECOND, 2).unwrap();
            disk.crash(keep);
            (disk.peek(FIRST)[0], disk.peek(SECOND)[0])
        };
        assert_eq!(left(Keep::Nothing), (0, 0));
        assert_eq!(left(Keep::Everything), (1, 2));
        assert_eq!(left(Keep::Where(&|block| block == SECOND)), (0, 2));
    }

    #[test]
    fn a_power_cut_may_leave_any_version_of_any_sector() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let disk = disk(seed);
            let mut desk = Desk::at(&disk);
            desk.write(FIRST, 1).unwrap();
            desk.write(FIRST, 2).unwrap();
            disk.stop_after(0);
            desk.start_write(FIRST, 3);
            disk.crash(Keep::Random);
            seen.extend(sectors(&disk.peek(FIRST)).into_iter().enumerate());
        }
        assert_eq!(seen.len(), 8 * 4, "each of 8 sectors with each of 4 versions");
    }

    #[test]
    fn overlapping_writes_land_in_any_order_and_readers_meet_either() {
        let (mut first, mut second, mut mixed) = (0, 0, 0);
        let mut early = 0;
        for seed in 0..200 {
            let disk = disk(seed);
            let mut desk = Desk::at(&disk);
            let one = desk.start_write(FIRST, 1);
            let two = desk.start_write(FIRST, 2);
            disk.hold(|kind, _| kind == OpKind::Write);
            early += u32::from(desk.read(FIRST)[0] != 0);
            disk.release();
            desk.finish(one).unwrap();
            desk.finish(two).unwrap();
            match &sectors(&disk.peek(FIRST))[..] {
                all if all.iter().all(|byte| *byte == 1) => first += 1,
                all if all.iter().all(|byte| *byte == 2) => second += 1,
                _ => mixed += 1,
            }
        }
        assert!(first > 0 && second > 0 && mixed > 0 && early > 0);
    }

    #[test]
    fn power_goes_after_the_nth_write_or_flush() {
        let disk = solid(6);
        disk.set_schedule(Schedule::Fifo);
        let mut desk = Desk::at(&disk);
        disk.stop_after(2);
        desk.write(FIRST, 1).unwrap();
        desk.read(FIRST);
        desk.flush().unwrap();
        assert!(disk.stopped());
        desk.start_write(SECOND, 2);
        desk.device.reap(&mut desk.done);
        assert!(desk.done.is_empty());
        disk.crash(Keep::Nothing);
        assert!(!disk.stopped());
        assert_eq!((disk.peek(FIRST)[0], disk.peek(SECOND)[0]), (1, 0));
        desk.device.reap(&mut desk.done);
        assert!(desk.done.is_empty(), "an old front-end is dead");
    }

    #[test]
    fn nothing_happens_before_submit() {
        let disk = disk(7);
        disk.set_schedule(Schedule::AtOnce);
        let mut device = disk.connect();
        device.flush(Token(1));
        let mut done = Vec::new();
        device.reap(&mut done);
        assert!(done.is_empty());
        device.submit();
        device.reap(&mut done);
        assert_eq!(done, [Completion { token: Token(1), result: Ok(()) }]);
    }

    #[test]
    fn faults_strike_the_operation_they_name() {
        let disk = disk(8);
        let mut desk = Desk::at(&disk);
        disk.inject(Fault { kind: Some(OpKind::Write), after: 1, lasting: false });
        desk.write(FIRST, 1).unwrap();
        assert_eq!(desk.write(FIRST, 2), Err(DeviceError::Os(libc::EIO)));
        desk.write(SECOND, 3).unwrap();
        assert!(sectors(&desk.read(FIRST)).iter().all(|byte| [1, 2].contains(byte)));
        disk.inject(Fault { kind: None, after: 0, lasting: true });
        assert!(desk.write(FIRST, 4).is_err() && desk.flush().is_err());
        disk.heal();
        desk.write(FIRST, 5).unwrap();
    }

    #[test]
    fn a_failed_flush_may_lose_what_the_next_good_one_seems_to_cover() {
        let (mut kept, mut lost) = (0, 0);
        for seed in 0..50 {
            let disk = disk(seed);
            let mut desk = Desk::at(&disk);
            desk.write(FIRST, 1).unwrap();
            disk.inject(Fault { kind: Some(OpKind::Flush), after: 0, lasting: false });
            desk.flush().unwrap_err();
            desk.flush().unwrap();
            disk.crash(Keep::Nothing);
            match disk.peek(FIRST)[0] {
                0 => lost += 1,
                _ => kept += 1,
            }
        }
        assert!(kept > 0 && lost > 0);
    }

    #[test]
    fn what_is_read_after_a_good_flush_and_a_refresh_stays() {
        let (mut kept, mut lost) = (0, 0);
        for seed in 0..50 {
            let disk = disk(seed);
            let mut desk = Desk::at(&disk);
            desk.write(FIRST, 1).unwrap();
            disk.inject(Fault { kind: Some(OpKind::Flush), after: 0, lasting: false });
            desk.flush().unwrap_err();
            assert_eq!(desk.read(FIRST)[0], 1, "the cache still shows it");
            desk.flush().unwrap();
            desk.device.refresh();
            let seen = desk.read(FIRST);
            disk.crash(Keep::Nothing);
            assert_eq!(disk.peek(FIRST)[..], seen[..], "seed {seed}");
            if seen[0] == 1 { kept += 1 } else { lost += 1 }
        }
        assert!(kept > 0 && lost > 0);
    }

    #[test]
    fn every_front_end_hears_of_a_failed_flush_once() {
        let disk = disk(16);
        let (mut one, mut two) = (Desk::at(&disk), Desk::at(&disk));
        disk.inject(Fault { kind: Some(OpKind::Flush), after: 0, lasting: false });
        assert!(one.flush().is_err());
        assert!(two.flush().is_err());
        assert!(one.flush().is_ok() && two.flush().is_ok() && Desk::at(&disk).flush().is_ok());
    }

    #[test]
    fn one_seed_is_one_run() {
        let run = |seed| {
            let disk = disk(seed);
            let mut desk = Desk::at(&disk);
            for block in 0..40 {
                desk.start_write(BlockAddr::new(block % 7), block as u8);
            }
            while disk.in_flight() > 20 {
                desk.device.reap(&mut desk.done);
            }
            disk.crash(Keep::Random);
            let image: Vec<_> = (0..7).map(|block| disk.peek(BlockAddr::new(block))).collect();
            (desk.done, image)
        };
        assert_eq!(run(9), run(9));
        assert_ne!(run(9), run(10));
    }

    #[test]
    fn a_fork_has_what_was_durable_and_goes_its_own_way() {
        let disk = solid(11);
        let mut desk = Desk::at(&disk);
        desk.write(FIRST, 1).unwrap();
        let fork = disk.fork(12);
        desk.write(FIRST, 2).unwrap();
        assert_eq!((fork.peek(FIRST)[0], disk.peek(FIRST)[0]), (1, 2));
    }

    #[test]
    fn the_trace_lists_operations_as_they_were_queued() {
        let disk = disk(13);
        let mut desk = Desk::at(&disk);
        disk.trace();
        desk.write(FIRST, 1).unwrap();
        desk.flush().unwrap();
        let block = ByteCount::new(BLOCK_SIZE);
        let zero = (BlockAddr::new(0), ByteCount::new(0));
        let expected = [
            Traced { kind: OpKind::Write, block: FIRST, length: block },
            Traced { kind: OpKind::Flush, block: zero.0, length: zero.1 },
        ];
        assert_eq!(disk.trace(), expected);
        assert_eq!((disk.counters().writes, disk.counters().flushes), (1, 1));
    }

    /// Every operation on `SECOND` meets `rates`.
    fn faulty(seed: u64, rates: FaultRates) -> (SimDisk, Desk) {
        let disk = solid(seed);
        let mut desk = Desk::at(&disk);
        desk.write(FIRST, 1).unwrap();
        desk.write(SECOND, 2).unwrap();
        disk.set_rates(move |kind, block| match (kind, block) {
            (OpKind::Flush, _) | (_, SECOND) => rates,
            _ => FaultRates { stray_target: true, ..FaultRates::NONE },
        });
        (disk, desk)
    }

    const ALWAYS: u32 = 1_000_000;

    #[test]
    fn errors_strike_at_their_rates_and_are_told() {
        let rates = FaultRates { read_error: ALWAYS, write_error: ALWAYS, ..FaultRates::NONE };
        let (disk, mut desk) = faulty(20, FaultRates { flush_error: ALWAYS, ..rates });
        assert_eq!(desk.write(SECOND, 3), Err(DeviceError::Os(libc::EIO)));
        assert!(sectors(&disk.peek(SECOND)).iter().all(|byte| [2, 3].contains(byte)));
        let read = desk.start_read(SECOND);
        assert!(desk.finish(read).is_err() && desk.flush().is_err());
        desk.write(FIRST, 4).unwrap();
        let struck: Vec<_> = disk.strikes_since(0).iter().map(|strike| strike.kind).collect();
        assert_eq!(struck, [OpKind::Write, OpKind::Read, OpKind::Flush]);
        assert!(disk.take_damage().is_empty(), "nothing of it is silent");
        disk.heal();
        desk.write(SECOND, 5).unwrap();
        assert_eq!(desk.read(SECOND), [5; BLOCK]);
    }

    #[test]
    fn half_of_a_million_is_every_other_one() {
        let rates = FaultRates { write_error: ALWAYS / 2, ..FaultRates::NONE };
        let (_, mut desk) = faulty(21, rates);
        let failed = (0..400).filter(|_| desk.write(SECOND, 3).is_err()).count();
        assert!((150..250).contains(&failed), "{failed} of 400");
    }

    #[test]
    fn a_bad_sector_stays_bad_until_it_is_written() {
        let (mut mended, mut for_good) = (0, 0);
        for seed in 0..20 {
            let rates = FaultRates { read_error: ALWAYS, lasting: ALWAYS, ..FaultRates::NONE };
            let (disk, mut desk) = faulty(seed, rates);
            let read = desk.start_read(SECOND);
            assert!(desk.finish(read).is_err());
            disk.set_rates(|_, _| FaultRates::NONE);
            for _ in 0..3 {
                let read = desk.start_read(SECOND);
                assert!(desk.finish(read).is_err(), "it lasts");
            }
            match desk.write(SECOND, 3) {
                Ok(()) => {
                    assert_eq!(desk.read(SECOND), [3; BLOCK]);
                    mended += 1;
                }
                Err(_) => for_good += 1,
            }
        }
        assert!(mended > 0 && for_good > 0);
    }

    #[test]
    fn what_ends_early_has_done_the_front_part() {
        for seed in 0..20 {
            let (disk, mut desk) = faulty(seed, FaultRates { short: ALWAYS, ..FaultRates::NONE });
            assert_eq!(desk.write(SECOND, 3), Err(DeviceError::EndOfDevice));
            let left = sectors(&disk.peek(SECOND));
            assert!(left.is_sorted_by(|a, b| a >= b) && left[7] == 2, "{left:?}");
        }
    }

    #[test]
    fn a_late_operation_waits_for_its_time_and_nobody_else_does() {
        let (disk, mut desk) = faulty(22, FaultRates { late: ALWAYS, ..FaultRates::NONE });
        let late = desk.start_write(SECOND, 3);
        for _ in 0..300 {
            desk.write(FIRST, 4).unwrap();
        }
        assert_eq!((disk.in_flight(), disk.in_flight_in_time()), (1, 0));
        let due = disk.next_due().expect("it is late");
        assert!(due >= LATE.start);
        disk.set_now(due);
        desk.finish(late).unwrap();
        disk.heal();
        assert_eq!(desk.read(SECOND), [3; BLOCK]);
    }

    #[test]
    fn a_lost_write_is_acknowledged_and_never_there() {
        let (disk, mut desk) = faulty(23, FaultRates { lost_write: ALWAYS, ..FaultRates::NONE });
        desk.write(SECOND, 3).unwrap();
        assert_eq!(desk.read(SECOND), [2; BLOCK]);
        disk.crash(Keep::Everything);
        assert_eq!(disk.peek(SECOND), [2; BLOCK]);
        let [damage] = &disk.take_damage()[..] else { panic!("one block is damaged") };
        assert_eq!((damage.block, *damage.meant), (SECOND, [3; BLOCK]));
        assert!(damage.found.iter().all(|(_, bytes)| **bytes == [2; SECTOR]));
        assert_eq!(disk.damaged_blocks(), BTreeSet::from([SECOND]));
        assert_eq!(disk.strikes_since(0).len(), 1, "the read that met it");
        let mut desk = Desk::at(&disk);
        desk.write(SECOND, 4).unwrap();
        assert!(disk.damaged_blocks().is_empty());
    }

    #[test]
    fn a_misdirected_write_lands_on_another_block() {
        let rates = FaultRates { misdirected_write: ALWAYS, ..FaultRates::NONE };
        let (disk, mut desk) = faulty(24, rates);
        desk.write(SECOND, 3).unwrap();
        assert_eq!((desk.read(FIRST), desk.read(SECOND)), (vec![3; BLOCK], vec![2; BLOCK]));
        let [lost, hit] = &disk.take_damage()[..] else { panic!("two blocks are damaged") };
        assert_eq!((lost.block, *lost.meant), (SECOND, [3; BLOCK]));
        assert_eq!((hit.block, *hit.meant), (FIRST, [1; BLOCK]));
        assert_eq!(&*hit.found[0].1, [3; SECTOR]);
    }

    #[test]
    fn one_bit_flips_at_rest_or_on_its_way() {
        let ones = |bytes: &[u8], right: u8| {
            bytes.iter().map(|byte| (byte ^ right).count_ones()).sum::<u32>()
        };
        let (disk, mut desk) = faulty(25, FaultRates { flip_at_rest: ALWAYS, ..FaultRates::NONE });
        desk.write(SECOND, 3).unwrap();
        assert_eq!(ones(&desk.read(SECOND), 3), 1);
        assert_eq!(ones(&desk.read(SECOND), 3), 1, "it stays");
        assert_eq!(disk.take_damage().len(), 1);
        let (disk, mut desk) = faulty(26, FaultRates { flip_on_read: ALWAYS, ..FaultRates::NONE });
        assert_eq!(ones(&desk.read(SECOND), 2), 1);
        assert_eq!(disk.peek(SECOND), [2; BLOCK], "only on its way");
        assert_eq!((disk.take_damage().len(), disk.strikes()), (1, 1));
    }

    #[test]
    #[should_panic(expected = "memory changed under the write of 5")]
    fn memory_must_not_change_under_a_write() {
        let disk = disk(14);
        let mut desk = Desk::at(&disk);
        let mut buffer = desk.pool.take().unwrap();
        desk.pool.bytes_mut(&mut buffer).fill(1);
        let segment = desk.pool.lend(&buffer);
        desk.device.write(Token(77), FIRST.offset(), &[segment]);
        desk.device.submit();
        segment.write(&[2]);
        let _ = desk.finish(Token(77));
    }

    #[test]
    #[should_panic(expected = "two writes of block 5 are in flight together")]
    fn overlapping_writes_can_be_forbidden() {
        let disk = disk(15);
        disk.forbid_overlapping_writes(|_, block| block == FIRST);
        let mut desk = Desk::at(&disk);
        desk.start_write(FIRST, 1);
        desk.start_write(FIRST, 2);
    }
}
