//! A store without a free block refuses what needs one, and goes on with the rest.

use bessel_mapping::request::{IoKind, IoStatus, VolumeId};
use bessel_reactor::device::sim::{Keep, Schedule};
use bessel_reactor::units::{ByteCount, SECTORS_PER_BLOCK};
use bessel_tests::world::{World, WorldConfig};

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
