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
    shard: Shard<MemoryDevice>,
    volume: VolumeHandle,
    memory: Vec<Segment>,
    /// Owns what `memory` points to.
    _pool: BufferPool,
    idle: Vec<usize>,
    random: Random,
    now: Instant,
}

impl Bench {
    fn new(cache: CacheMode, capacity: ByteCount) -> Self {
        let config = ShardConfig {
            index: 0,
            node_cache: ByteCount::new(4 << 20),
            requests_max: 64,
            shared_leaves: 0,
        };
        let mut device = MemoryDevice::new(capacity, config.device_depth() as u32 + 64);
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
        let plan = opened.directory.plan_create(
            "v",
            ByteCount::from_blocks(REGION_BLOCKS),
            None,
            WallTime::from_unix_nanos(3),
        );
        let plan = plan.expect("the first volume");
        let mut pool = BufferPool::new(IN_FLIGHT, 16 << 10);
        let memory = (0..IN_FLIGHT)
            .map(|_| {
                let buffer = pool.take().expect("as many as were made");
                pool.lend(&buffer)
            })
            .collect();
        let mut bench = Self {
            shard: Shard::new(&config, device, &opened),
            volume: VolumeHandle(0),
            memory,
            _pool: pool,
            idle: (0..IN_FLIGHT).collect(),
            random: Random::new(7),
            now: Instant::from_nanos(1),
        };
        match bench.command(Command::Create(plan)) {
            Reply::Opened(handle) => bench.volume = handle,
            reply => panic!("{reply:?}"),
        }
        let volume = bench.volume;
        assert_eq!(
            bench.command(Command::SetCache { volume, cache, by: CacheChooser::Operator }),
            Reply::Done
        );
        bench
    }

    fn turn(&mut self) {
        self.now = self.now.after(Duration::from_micros(10));
        self.shard.poll(self.now);
        // One shard: what it has to say to others it says to itself.
        while let Some((to, message)) = self.shard.pop_message() {
            assert_eq!(to, 0);
            self.shard.deliver(message);
        }
        while let Some(done) = self.shard.pop_completion() {
            assert_eq!(done.status, IoStatus::Done);
            self.idle.push(done.tag as usize);
        }
    }

    fn command(&mut self, command: Command) -> Reply {
        self.shard.control(1, command);
        loop {
            self.turn();
            if let Some((_, reply)) = self.shard.pop_reply() {
                return reply;
            }
        }
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
                volume: self.volume,
                kind,
                sector: Sector::new(sector),
                sectors,
                segments,
            };
            self.shard.submit(&request).expect("fewer are in flight than there are contexts");
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

#[test]
fn the_steady_state_leaves_the_heap_alone() {
    for cache in [CacheMode::Writeback, CacheMode::Writethrough] {
        let mut bench = Bench::new(cache, CAPACITY);
        bench.allocates_nothing("writes", |r| (IoKind::Write, anywhere(r), 8));
        bench.allocates_nothing("reads", |r| (IoKind::Read, anywhere(r), 32));
        bench.allocates_nothing("small writes", |r| (IoKind::Write, anywhere(r) + 3, 3));
        bench.allocates_nothing("a mixture with discards, so that writes allocate blocks", |r| {
            let kind = *r.pick(&[
                IoKind::Write,
                IoKind::Write,
                IoKind::Read,
                IoKind::Discard,
                IoKind::WriteZeroes,
                IoKind::Flush,
            ]);
            let aligned = anywhere(r);
            (kind, aligned + r.below(2), 1 + r.below(24))
        });
    }
}

/// What reads cost with `SNAPSHOTS` behind, in instructions, which no neighbour changes. callgrind counts
/// those of [`measured_reads`]: bench/README.md, "Snapshots", has the command.
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
    bench.run(20_000, |r| (IoKind::Read, anywhere(r), 8));
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
