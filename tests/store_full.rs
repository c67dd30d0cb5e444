//! A store without a free block refuses what needs one, and goes on with the rest.

use bessel_mapping::format::ExtentType;
use bessel_mapping::request::{IoKind, IoStatus, VolumeId};
use bessel_reactor::device::sim::{Keep, Schedule};
use bessel_reactor::units::{ByteCount, SECTORS_PER_BLOCK};
use bessel_tests::world::{Action, World, WorldConfig};

/// A world whose store is full of one volume's data, and the sectors of it that were written.
fn full(config: WorldConfig) -> (World, VolumeId, u64) {
    let mut world = World::new(WorldConfig {
        capacity: ByteCount::new(16 << 20),
        extent_size: ByteCount::new(1 << 20),
        schedule: Schedule::AtOnce,
        may_fill: true,
        ..config
    });
    let volume = world.create(ByteCount::new(1 << 30)).expect("the power is on");
    let mut sector = 0;
    loop {
        match world.write(volume, sector, 64).expect("the power is on") {
            IoStatus::Done => sector += 64,
            IoStatus::NoSpace => break,
            status => panic!("{status:?}"),
        }
        assert!(sector < ByteCount::new(16 << 20).sectors(), "more data than the store holds");
    }
    // Smaller requests may still fit; then nothing does.
    let mut next = sector + 64;
    while world.write(volume, next, SECTORS_PER_BLOCK).expect("the power is on") == IoStatus::Done {
        next += SECTORS_PER_BLOCK;
    }
    assert!(sector > ByteCount::new(8 << 20).sectors(), "full after {sector} sectors");
    (world, volume, sector)
}

#[test]
fn overwrites_reads_and_flushes_go_on_when_the_store_is_full() {
    let (mut world, volume, written) = full(WorldConfig::new(1));
    for sector in (0..written).step_by(512) {
        assert_eq!(world.write(volume, sector, 8).unwrap(), IoStatus::Done);
        assert_eq!(world.write(volume, sector + 3, 2).unwrap(), IoStatus::Done);
        assert_eq!(world.read(volume, sector, 64).unwrap(), IoStatus::Done);
    }
    assert_eq!(world.flush(volume).unwrap(), IoStatus::Done);
    world.crash(Keep::Nothing);
    world.recover();
}

#[test]
fn a_discard_makes_room_again() {
    for seed in 0..5 {
        let (mut world, volume, written) = full(WorldConfig::new(seed));
        let half = written / 2;
        assert_eq!(world.io(volume, IoKind::Discard, 0, half).unwrap(), IoStatus::Done);
        assert_eq!(world.flush(volume).unwrap(), IoStatus::Done);
        world.idle().unwrap();
        let mut sector = 0;
        while sector < half * 3 / 4 {
            let status = world.write(volume, sector, 64).unwrap();
            assert_eq!(status, IoStatus::Done, "sector {sector} of {half} freed");
            sector += 64;
        }
        assert_eq!(world.flush(volume).unwrap(), IoStatus::Done);
        world.crash_somehow();
        world.recover();
    }
}

#[test]
fn a_store_stays_full_and_whole_across_power_cuts() {
    for seed in 0..5 {
        let (mut world, volume, written) = full(WorldConfig::new(seed));
        for sector in (0..written).step_by(1024) {
            world.start_io(volume, IoKind::Write, sector + 5, 20);
            world.start_io(volume, IoKind::Write, (1 << 20) + sector, 20);
        }
        for _ in 0..20 {
            world.step();
        }
        world.crash_somehow();
        world.recover();
    }
}

#[test]
fn filling_and_discarding_over_and_over_leaks_nothing() {
    let (mut world, volume, written) = full(WorldConfig::new(9));
    let mut rounds = Vec::new();
    for _ in 0..6 {
        assert_eq!(world.io(volume, IoKind::Discard, 0, 1 << 20).unwrap(), IoStatus::Done);
        assert_eq!(world.flush(volume).unwrap(), IoStatus::Done);
        world.idle().unwrap();
        let mut sector = 0;
        while world.write(volume, sector, 64).unwrap() == IoStatus::Done {
            sector += 64;
        }
        rounds.push(sector);
    }
    let least = rounds.iter().min().unwrap();
    assert!(*least >= written - 512, "first {written} sectors fitted, later {rounds:?}");
}

#[test]
fn an_orderly_end_gives_every_unused_block_back() {
    for seed in 0..10 {
        let mut world = World::new(WorldConfig { shards: 3, ..WorldConfig::new(seed) });
        let volumes: Vec<_> = (0..4).map(|_| world.create(ByteCount::new(8 << 20))).collect();
        for volume in volumes.into_iter().map(Result::unwrap) {
            for _ in 0..20 {
                let sector = world.random.below(8000);
                world.start_io(volume, IoKind::Write, sector, 100);
                let sector = world.random.below(8000);
                world.start_io(volume, IoKind::Discard, sector, 500);
            }
            world.snapshot(volume).unwrap();
            world.start_io(volume, IoKind::Write, 0, 300);
        }
        world.shut_down().unwrap();
        let report = world.check();
        assert_eq!((report.data.leaked, report.metadata.leaked), (0, 0), "seed {seed}");
        world.recover();
    }
}

/// The freed blocks wait for a commit, and so does the write.
#[test]
fn what_a_discard_has_just_freed_can_be_written_at_once() {
    let (mut world, volume, sectors) = full(WorldConfig::new(1));
    assert_eq!(world.io(volume, IoKind::Discard, 0, sectors / 2).unwrap(), IoStatus::Done);
    assert_eq!(world.write(volume, 0, 8).unwrap(), IoStatus::Done);
}

/// A store with data blocks in plenty and this many free blocks for nodes and logs.
fn short_of_metadata(seed: u64, free: u32) -> (World, VolumeId) {
    let mut world = World::new(WorldConfig {
        capacity: ByteCount::new(6 << 20),
        extent_size: ByteCount::new(1 << 20),
        schedule: Schedule::AtOnce,
        may_fill: true,
        ..WorldConfig::new(seed)
    });
    world.prepare_extent(1, ExtentType::Metadata, free);
    for extent in 2..6 {
        world.prepare_extent(extent, ExtentType::Data, 255);
    }
    let volume = world.create(ByteCount::new(1 << 30)).expect("the power is on");
    (world, volume)
}

#[test]
fn without_a_block_for_nodes_what_is_mapped_goes_on() {
    for free in 3..20 {
        let (mut world, volume) = short_of_metadata(u64::from(free), free);
        let leaf = 512 * SECTORS_PER_BLOCK;
        let mut written = 0;
        while world.write(volume, written * leaf, 8).expect("the power is on") == IoStatus::Done {
            written += 1;
        }
        assert!(written < u64::from(free), "each leaf takes a block");
        let ticket = world.start(Action::Snapshot { volume, label: None });
        let refused = format!("{:?}", world.wait(ticket).expect("the power is on"));
        assert!(refused.contains("NoSpace"), "{refused}");
        for index in 0..written {
            assert_eq!(world.write(volume, index * leaf + 3, 30), Ok(IoStatus::Done));
            assert_eq!(world.read(volume, index * leaf, 40), Ok(IoStatus::Done));
        }
        assert_eq!(world.flush(volume), Ok(IoStatus::Done));
        world.crash_somehow();
        world.recover();
        assert_eq!(world.flush(volume), Ok(IoStatus::Done));
    }
}

/// Every snapshot takes a root, and every 24th a block for the log: whichever is lacking, the
/// snapshot is refused and the volume, with its other snapshots, is as before.
#[test]
fn a_snapshot_without_a_block_for_its_log_is_refused() {
    let mut refused_for_the_log = 0;
    for free in 4..34 {
        let (mut world, volume) = short_of_metadata(u64::from(free), free);
        let mut taken = 0;
        loop {
            let ticket = world.start(Action::Snapshot { volume, label: None });
            let reply = format!("{:?}", world.wait(ticket).expect("the power is on"));
            if reply.contains("NoSpace") {
                break;
            }
            taken += 1;
            assert!(taken <= free, "a snapshot without a root: {reply}");
        }
        // The volume's root is one block, each snapshot's another, and one in 24 the log's.
        let left = free - 1 - taken - u32::div_ceil(taken, 24);
        refused_for_the_log += u32::from(left > 0);
        assert!(left == 0 || left == 1 && taken % 24 == 0, "{taken} snapshots in {free} blocks");
        assert_eq!(world.flush(volume), Ok(IoStatus::Done));
        world.crash_somehow();
        world.recover();
    }
    assert!(refused_for_the_log > 0, "a block for a root was left, and none for the log");
}
