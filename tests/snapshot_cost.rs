//! A snapshot is three block writes, whatever the volume's size, contents and history. What it has to
//! write of the tree it freezes, it writes a little at a time, and so does every other round.

use bessel_mapping::format::ExtentType;
use bessel_mapping::request::{IoKind, IoStatus, VolumeId};
use bessel_mapping::shard::ShardConfig;
use bessel_reactor::device::sim::{OpKind, Schedule, Traced};
use bessel_reactor::units::{BLOCK_SIZE, ByteCount, SECTORS_PER_BLOCK};
use bessel_tests::world::{Action, Ticket, World, WorldConfig};

/// Sectors that one leaf maps.
const LEAF: u64 = 512 * SECTORS_PER_BLOCK;

/// What a snapshot writes, but for claims of blocks: they are made for many requests at once.
fn snapshot_writes(world: &mut World, volume: VolumeId) -> Vec<Traced> {
    world.idle().expect("the power is on");
    world.disk.trace();
    world.snapshot(volume).expect("the power is on");
    let operations = world.disk.trace().into_iter();
    let writes = operations.filter(|op| op.kind == OpKind::Write && !world.is_allocation(op.block));
    writes.collect()
}

#[test]
fn a_snapshot_is_three_block_writes() {
    for size in [1 << 20, 4 << 30, 600 << 30, 256 << 40] {
        let config = WorldConfig { schedule: Schedule::AtOnce, ..WorldConfig::new(size) };
        let mut world = World::new(config);
        let volume = world.create(ByteCount::new(size)).unwrap();
        for count in 0..60 {
            world.write(volume, count * 8, 8 + count).unwrap();
            world.flush(volume).unwrap();
            let writes = snapshot_writes(&mut world, volume);
            assert_eq!(writes.len(), 3, "snapshot {count} of {size} bytes: {writes:?}");
            assert!(writes.iter().all(|write| write.length.get() <= BLOCK_SIZE));
        }
    }
}

/// What makes a volume write its changed nodes.
enum Start {
    Flush,
    Snapshot,
}

/// What was written until something had ended.
struct Written {
    /// Images of nodes and of the log, by turn.
    turns: Vec<usize>,
    /// How many operations they took.
    operations: usize,
    /// Reads that have ended meanwhile.
    reads: usize,
}

fn written_by_turns(world: &mut World, volume: VolumeId, started: Ticket) -> Written {
    let extents = world.extents();
    let (mut turns, mut operations, mut reads, mut reading) = (Vec::new(), 0, 0, None);
    while !world.has_ended(started) {
        match reading {
            Some(read) if !world.has_ended(read) => {}
            ended => {
                reads += usize::from(ended.is_some());
                reading = Some(world.start_io(volume, IoKind::Read, 0, 8));
            }
        }
        world.disk.trace();
        world.step();
        let traced = world.disk.trace().into_iter();
        let images = traced
            .filter(|op| op.kind == OpKind::Write && !world.is_allocation(op.block))
            .filter(|op| extents.holds(op.block, ExtentType::Metadata))
            .map(|op| (op.length.get() / BLOCK_SIZE) as usize)
            .collect::<Vec<_>>();
        operations += images.len();
        turns.push(images.iter().sum());
        assert!(turns.len() < 1000, "it does not end: {turns:?}");
    }
    world.settle().expect("the power is on");
    Written { turns, operations, reads }
}

/// Where a device works when it is asked to, as in memory, a turn that wrote all changed nodes at once
/// would keep every guest waiting for it.
#[test]
fn a_turn_writes_few_images_however_many_nodes_have_changed() {
    const TURNS: usize = 5;
    let node_cache = ByteCount::new(4 << 20);
    let config = WorldConfig {
        schedule: Schedule::AtOnce,
        capacity: ByteCount::new(64 << 20),
        node_cache,
        ..WorldConfig::new(1)
    };
    let shard = ShardConfig {
        index: 0,
        node_cache,
        requests_max: 64,
        shared_leaves: 0,
        steps_per_turn: ShardConfig::STEPS_PER_TURN,
    };
    let most = shard.images_per_turn();
    let mut world = World::new(config);
    let volume = world.create(ByteCount::new(1 << 30)).expect("the power is on");
    let change_leaves = |world: &mut World, block: u64| {
        for leaf in 0..(TURNS * most) as u64 {
            let sector = leaf * LEAF + block * SECTORS_PER_BLOCK;
            assert_eq!(world.write(volume, sector, 8), Ok(IoStatus::Done));
        }
    };
    let cases = [
        ("new leaves, by a flush", Start::Flush),
        ("leaves changed in place, by a flush", Start::Flush),
        ("leaves changed in place, by a snapshot", Start::Snapshot),
        ("copied leaves, by a snapshot", Start::Snapshot),
        ("copied leaves, by a flush", Start::Flush),
    ];
    for (block, (what, start)) in (0..).zip(cases) {
        change_leaves(&mut world, block);
        let started = match start {
            Start::Flush => world.start_io(volume, IoKind::Flush, 0, 0),
            Start::Snapshot => world.start(Action::Snapshot { volume, label: None }),
        };
        let Written { turns, operations, reads } = written_by_turns(&mut world, volume, started);
        // A snapshot's new root and its log block are written when it is taken.
        assert!(turns.iter().all(|images| *images <= most + 2), "{what}: {turns:?}");
        assert!(turns.iter().sum::<usize>() >= TURNS * most, "{what}: {turns:?}");
        // Leaves have been given blocks side by side, when they were new and when they were copied.
        assert!(operations <= TURNS * most / 4, "{what}: {operations} for {turns:?}");
        assert!(reads >= TURNS / 2, "{what}: {reads} reads ended in {} turns", turns.len());
    }
}

/// What time cannot show on a shared machine: reads do the same, however many snapshots are behind.
#[test]
fn reads_cost_the_device_the_same_with_snapshots_behind() {
    let config = WorldConfig { schedule: Schedule::AtOnce, ..WorldConfig::new(1) };
    let mut world = World::new(config);
    let volume = world.create(ByteCount::new(1 << 30)).unwrap();
    for leaf in 0..20 {
        world.write(volume, leaf * LEAF, 64).unwrap();
    }
    let cost_of_reads = |world: &mut World| {
        world.settle().unwrap();
        world.disk.trace();
        for leaf in 0..20 {
            for block in 0..8 {
                world.read(volume, leaf * LEAF + block * SECTORS_PER_BLOCK, 8).unwrap();
            }
        }
        world.disk.trace().len()
    };
    let none = cost_of_reads(&mut world);
    assert_eq!(none, 20 * 8, "one operation each");
    for count in 1..=300 {
        world.write(volume, count % 20 * LEAF, 8).unwrap();
        world.snapshot(volume).unwrap();
        if [1, 10, 100, 300].contains(&count) {
            assert_eq!(cost_of_reads(&mut world), none, "{count} snapshots behind");
        }
    }
}
