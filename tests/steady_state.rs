//! The hot path allocates nothing: after a warm-up, reads, writes in place and allocating writes in
//! a small region leave the heap alone.
//!
//! The allocator counts; the device is one that does not allocate either. What is counted is the
//! shard from `submit` to `pop_completion`.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use bessel_mapping::request::{
    CacheChooser, CacheMode, Command, IoKind, IoRequest, IoStatus, Reply, VolumeHandle,
};
use bessel_mapping::shard::{Shard, ShardConfig};
use bessel_mapping::store::{self, FormatOptions, OpenMode};
use bessel_reactor::buffer::{BufferPool, Segment};
use bessel_reactor::clock::{Instant, WallTime};
use bessel_reactor::device::memory::MemoryDevice;
use bessel_reactor::device::sim::Random;
use bessel_reactor::units::{ByteCount, SECTORS_PER_BLOCK, Sector};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call goes to the system's allocator unchanged; counting touches only a thread-local
// without a destructor, which allocates nothing.
#[expect(unsafe_code, reason = "an allocator is unsafe to write; this one only counts")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above; `pointer` came from `System`, as everything here does.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const CAPACITY: ByteCount = ByteCount::new(64 << 20);
/// The small region: eight leaves.
const REGION_BLOCKS: u64 = 8 * 512;
const IN_FLIGHT: usize = 32;

struct Bench {
    /// The volume's home first. Each has a device of its own: nobody looks at what is read.
    shards: Vec<Shard<MemoryDevice>>,
    volume: VolumeHandle,
    /// A volume of the other shard's own.
    other: VolumeHandle,
    /// Where requests come in, and what the volume is called there.
    entrance: (usize, VolumeHandle),
    /// The others are not polled meanwhile.
    alone: bool,
    memory: Vec<Segment>,
    /// Owns what `memory` points to.
    _pool: BufferPool,
    idle: Vec<usize>,
    random: Random,
    now: Instant,
}

impl Bench {
    fn new(cache: CacheMode, capacity: ByteCount) -> Self {
        let config = |index| ShardConfig {
            index,
            node_cache: ByteCount::new(4 << 20),
            requests_max: 64,
            shared_leaves: 16,
            steps_per_turn: ShardConfig::STEPS_PER_TURN,
        };
        let depth = config(0).device_depth() as u32 + 64;
        let mut device = MemoryDevice::new(capacity, depth);
        let options = FormatOptions {
            extent_size: Some(ByteCount::new(4 << 20)),
            force: false,
            uuid: [1; 16],
            secret: 12345,
            time: WallTime::from_unix_nanos(1),
        };
        store::format(&mut device, &options, &mut |_, _| {}).expect("a blank device");
        let mode = OpenMode::ReadWrite { time: WallTime::from_unix_nanos(2) };
        let mut opened = store::open(&mut device, mode).expect("just formatted");
        let size = ByteCount::from_blocks(REGION_BLOCKS);
        let mut plan = |name, time| {
            let time = WallTime::from_unix_nanos(time);
            opened.directory.plan_create(name, size, None, time).expect("the first of its name")
        };
        let plans = [plan("v", 3), plan("w", 4)];
        let mut pool = BufferPool::new(IN_FLIGHT, 16 << 10);
        let memory = (0..IN_FLIGHT)
            .map(|_| {
                let buffer = pool.take().expect("as many as were made");
                pool.lend(&buffer)
            })
            .collect();
        let home = Shard::new(&config(0), device, &opened);
        let other = Shard::new(&config(1), MemoryDevice::new(capacity, depth), &opened);
        let mut bench = Self {
            shards: vec![home, other],
            volume: VolumeHandle(0),
            other: VolumeHandle(0),
            entrance: (0, VolumeHandle(0)),
            alone: false,
            memory,
            _pool: pool,
            idle: (0..IN_FLIGHT).collect(),
            random: Random::new(7),
            now: Instant::from_nanos(1),
        };
        let [volume, other] = [0, 1].map(|shard| {
            let plan = plans[shard].clone();
            let Reply::Opened(volume) = bench.command_to(shard, Command::Create(plan)) else {
                panic!("it is made")
            };
            let set = Command::SetCache { volume, cache, by: CacheChooser::Operator };
            assert_eq!(bench.command_to(shard, set), Reply::Done);
            volume
        });
        (bench.volume, bench.other, bench.entrance) = (volume, other, (0, volume));
        bench
    }

    fn turn(&mut self) {
        self.now = self.now.after(Duration::from_micros(10));
        for at in 0..self.shards.len() {
            if self.alone && at != self.entrance.0 {
                continue;
            }
            self.shards[at].poll(self.now);
            while let Some((to, message)) = self.shards[at].pop_message() {
                assert!(!self.alone, "a message to shard {to}");
                self.shards[to].deliver(message);
            }
            while let Some(done) = self.shards[at].pop_completion() {
                assert_eq!(done.status, IoStatus::Done);
                self.idle.push(done.tag as usize);
            }
        }
    }

    fn command(&mut self, command: Command) -> Reply {
        self.command_to(0, command)
    }

    fn command_to(&mut self, shard: usize, command: Command) -> Reply {
        self.shards[shard].control(1, command);
        loop {
            self.turn();
            if let Some((_, reply)) = self.shards[shard].pop_reply() {
                return reply;
            }
        }
    }

    /// Has requests come in on the other shard.
    fn visit(&mut self) {
        let share = Command::Share { volume: self.volume, shards: self.shards.len() };
        let Reply::Shared(shared) = self.command(share) else { panic!("it is shared") };
        let Reply::Opened(visit) = self.command_to(1, Command::Visit(shared)) else {
            panic!("it is visited")
        };
        self.entrance = (1, visit);
    }

    /// Does `count` requests of a kind that `choose` picks, keeping the shard busy.
    fn run(&mut self, count: usize, choose: fn(&mut Random) -> (IoKind, u64, u64)) {
        for _ in 0..count {
            while self.idle.is_empty() {
                self.turn();
            }
            let slot = self.idle.pop().expect("just checked");
            let (kind, sector, sectors) = choose(&mut self.random);
            let segment = self.memory[slot].part(0, (sectors * 512) as usize);
            let segments =
                if matches!(kind, IoKind::Read | IoKind::Write) { &[segment][..] } else { &[] };
            let request = IoRequest {
                tag: slot as u64,
                volume: self.entrance.1,
                kind,
                sector: Sector::new(sector),
                sectors,
                segments,
            };
            self.shards[self.entrance.0]
                .submit(&request)
                .expect("fewer are in flight than there are contexts");
        }
        while self.idle.len() < IN_FLIGHT {
            self.turn();
        }
    }

    /// Fails when `choose`'s requests allocate once they have been done often enough.
    fn allocates_nothing(&mut self, what: &str, choose: fn(&mut Random) -> (IoKind, u64, u64)) {
        self.run(20_000, choose);
        let before = ALLOCATIONS.get();
        self.run(20_000, choose);
        assert_eq!(ALLOCATIONS.get() - before, 0, "allocations by {what}");
    }
}

fn anywhere(random: &mut Random) -> u64 {
    random.below(REGION_BLOCKS - 4) * SECTORS_PER_BLOCK
}

fn mixture(random: &mut Random) -> (IoKind, u64, u64) {
    let kind = *random.pick(&[
        IoKind::Write,
        IoKind::Write,
        IoKind::Read,
        IoKind::Discard,
        IoKind::WriteZeroes,
        IoKind::Flush,
    ]);
    let aligned = anywhere(random);
    (kind, aligned + random.below(2), 1 + random.below(24))
}

#[test]
fn the_steady_state_leaves_the_heap_alone() {
    for cache in [CacheMode::Writeback, CacheMode::Writethrough] {
        let mut bench = Bench::new(cache, CAPACITY);
        bench.allocates_nothing("writes", |r| (IoKind::Write, anywhere(r), 8));
        bench.allocates_nothing("reads", |r| (IoKind::Read, anywhere(r), 32));
        bench.allocates_nothing("small writes", |r| (IoKind::Write, anywhere(r) + 3, 3));
        let what = "a mixture with discards, so that writes allocate blocks";
        bench.allocates_nothing(what, mixture);
    }
}

/// Requests that another shard than the home has, by itself and by messages.
#[test]
fn the_steady_state_of_a_visit_leaves_the_heap_alone() {
    let mut bench = Bench::new(CacheMode::Writeback, CAPACITY);
    bench.run(40_000, |r| (IoKind::Write, anywhere(r), 8));
    bench.visit();
    bench.allocates_nothing("writes", |r| (IoKind::Write, anywhere(r), 8));
    bench.allocates_nothing("reads", |r| (IoKind::Read, anywhere(r), 32));
    // All leaves are shown by now, and there is room for them.
    bench.alone = true;
    bench.allocates_nothing("writes in place", |r| (IoKind::Write, anywhere(r), 8));
    bench.alone = false;
    bench.allocates_nothing("a mixture with what the home does", mixture);
}

/// What reads cost with `SNAPSHOTS` behind, in instructions, which no neighbour changes. callgrind counts
/// those of [`measured_reads`]. With `VISIT` they come in on another shard than the home, with `OTHER` they are those of that
/// shard's own volume: bench/README.md, "Snapshots", has the command.
#[test]
#[ignore = "to be run under callgrind"]
fn reads_with_snapshots_behind() {
    let count = std::env::var("SNAPSHOTS").ok().map_or(0, |count| count.parse().expect("a number"));
    let mut bench = Bench::new(CacheMode::Writeback, ByteCount::new(1 << 30));
    bench.run(40_000, |r| (IoKind::Write, anywhere(r), 8));
    let volume = bench.volume;
    for _ in 0..count {
        bench.run(1, |r| (IoKind::Write, anywhere(r), 8));
        let time = WallTime::from_unix_nanos(4);
        let reply = bench.command(Command::Snapshot { volume, label: None, time });
        assert!(matches!(reply, Reply::Snapshot(_)), "{reply:?}");
    }
    if std::env::var_os("VISIT").is_some() {
        bench.visit();
    }
    if std::env::var_os("OTHER").is_some() {
        bench.entrance = (1, bench.other);
        bench.run(40_000, |r| (IoKind::Write, anywhere(r), 8));
    }
    bench.run(20_000, |r| (IoKind::Read, anywhere(r), 8));
    // What it costs the shard that has them.
    bench.alone = true;
    measured_reads(&mut bench);
}

#[inline(never)]
fn measured_reads(bench: &mut Bench) {
    bench.run(100_000, |r| (IoKind::Read, anywhere(r), 8));
}

#[test]
fn the_counter_counts() {
    let before = ALLOCATIONS.get();
    drop(std::hint::black_box(Box::new(1)));
    assert_eq!(ALLOCATIONS.get() - before, 1);
}
