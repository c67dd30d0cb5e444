//! Detaching and attaching a volume, mostly one that has failed: what the last good flush covered is
//! there, nothing is mixed, no other volume notices, and afterwards writes and flushes work again.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::panic::{AssertUnwindSafe, catch_unwind};

use bessel_mapping::format::ExtentType;
use bessel_mapping::request::{IoKind, IoStatus, Reply, VolumeId};
use bessel_reactor::device::Device;
use bessel_reactor::device::sim::{Fault, Keep, OpKind};
use bessel_reactor::units::ByteCount;
use bessel_tests::operations::{LEAF, SMALL, block};
use bessel_tests::workload::Workload;
use bessel_tests::world::{Action, Outcome, World, WorldConfig};

const SEEDS: std::ops::Range<u64> = 0..25;
/// Seeds that failed once.
const REGRESSIONS: &[u64] = &[];

fn failing(seed: u64, shards: usize) -> World {
    World::new(WorldConfig {
        shards,
        // Nodes are read all the time, or none is; the journal is full all the time, or never.
        node_cache: ByteCount::new([0, 1 << 20][seed as usize / 2 % 2]),
        journal_entries: [40, 1000][seed as usize / 4 % 2],
        may_fail: true,
        may_fill: true,
        ..WorldConfig::new(seed)
    })
}

fn fail_next(world: &World, kind: OpKind) {
    world.disk.inject(Fault { kind: Some(kind), after: 0, lasting: false });
}

fn done(status: Result<IoStatus, bessel_tests::world::PowerCut>) {
    assert_eq!(status.unwrap(), IoStatus::Done);
}

/// A volume with something flushed and something not, that has failed.
fn failed_volume(world: &mut World) -> VolumeId {
    let volume = world.create(ByteCount::new(8 << 20)).unwrap();
    done(world.write(volume, 0, 64));
    done(world.flush(volume));
    done(world.write(volume, 0, 8));
    done(world.write(volume, 4096, 64));
    fail_next(world, OpKind::Flush);
    assert_eq!(world.flush(volume).unwrap(), IoStatus::Failed);
    assert!(world.has_failed(volume).unwrap());
    volume
}

#[test]
fn a_failed_volume_is_detached_attached_and_works_again() {
    for seed in 0..40 {
        // On another reactor the failure echoes: its next flush fails for the same cause.
        let mut world = failing(seed, 1);
        let other = world.create(ByteCount::new(8 << 20)).unwrap();
        done(world.write(other, 0, 64));
        done(world.flush(other));
        world.idle().unwrap();
        let volume = failed_volume(&mut world);
        let reads = world.start_io(other, IoKind::Read, 0, 64);
        world.detach(volume).unwrap();
        assert_eq!(world.wait(reads).unwrap(), Outcome::Io(IoStatus::Done));
        done(world.write(other, 32, 64));
        world.attach(volume).unwrap().unwrap();
        done(world.write(volume, 8, 100));
        done(world.write(volume, 4096, 8));
        done(world.flush(volume));
        assert!(!world.has_failed(other).unwrap(), "seed {seed}: the other volume noticed");
        done(world.flush(other));
        let snapshot = world.snapshot(volume).unwrap();
        done(world.write(volume, 0, 8));
        world.crash(Keep::Nothing);
        world.recover();
        assert!(world.clone_of(snapshot, "clone").unwrap().is_some());
        world.verify_snapshots().unwrap();
    }
}

#[test]
fn a_volume_that_has_not_failed_loses_nothing_by_being_detached() {
    for seed in 0..40 {
        let mut world = World::new(WorldConfig::new(seed));
        let [one, two] = [(); 2].map(|()| world.create(ByteCount::new(8 << 20)).unwrap());
        for place in 0..20 {
            world.start_io(one, IoKind::Write, place * 8, 8);
            world.start_io(two, IoKind::Write, place * 8, 8);
        }
        world.start(Action::Snapshot { volume: one, label: None });
        world.detach(one).unwrap();
        assert_eq!(world.detached(), [one]);
        if seed % 2 == 0 {
            world.crash(Keep::Nothing);
            world.recover(); // A restart attaches it.
        } else {
            world.attach(one).unwrap().unwrap();
            done(world.write(one, 3, 8));
            world.kill();
            world.recover();
        }
        assert_eq!(world.volumes(), [one, two]);
    }
}

/// What was overwritten in place needs no round to be durable, and a flush all the same: once the volume
/// is not open, no flush that fails latches it any more.
#[test]
fn what_was_overwritten_in_place_is_durable_once_detached() {
    for seed in 0..20 {
        let mut world = failing(seed, 1 + seed as usize % 2);
        let volume = world.create(ByteCount::new(8 << 20)).unwrap();
        done(world.write(volume, 0, 64));
        done(world.flush(volume));
        world.idle().unwrap();
        done(world.write(volume, 0, 32));
        world.detach(volume).unwrap();
        if seed % 2 == 0 {
            // The front-end comes back and knows nothing of this.
            fail_next(&world, OpKind::Flush);
            world.attach(volume).unwrap().unwrap();
            world.read(volume, 0, 64).unwrap();
            done(world.flush(volume));
        }
        world.crash(Keep::Nothing);
        world.recover();
    }
}

#[test]
fn a_flush_that_fails_while_a_volume_is_detached_counts_as_its_failure() {
    for seed in 0..20 {
        let mut world = failing(seed, 1);
        let volume = world.create(ByteCount::new(8 << 20)).unwrap();
        done(world.write(volume, 0, 64));
        done(world.flush(volume));
        world.idle().unwrap();
        done(world.write(volume, 0, 32));
        fail_next(&world, OpKind::Flush);
        assert!(world.detach(volume).unwrap().is_some(), "seed {seed}");
        world.attach(volume).unwrap().unwrap();
        done(world.write(volume, 8, 8));
        done(world.flush(volume));
        world.crash(Keep::Nothing);
        world.recover();
    }
}

/// A write that was in flight at a snapshot lands in it. When the flush fails that should have made it
/// durable, a clone would show it, and once the cache is dropped not any more.
#[test]
fn no_clone_shows_what_a_failed_flush_may_have_lost_of_its_snapshot() {
    for seed in 0..20 {
        let mut world = failing(seed, 1 + seed as usize % 2);
        let volume = world.create(ByteCount::new(8 << 20)).unwrap();
        done(world.write(volume, 0, 64));
        done(world.flush(volume));
        world.idle().unwrap();
        let extents = world.extents();
        world.disk.hold(move |kind, block| {
            kind == OpKind::Write && extents.holds(block, ExtentType::Data)
        });
        let write = world.start_io(volume, IoKind::Write, 0, 32);
        for _ in 0..5 {
            world.step();
        }
        let snapshot = world.snapshot(volume).unwrap();
        world.disk.release();
        assert_eq!(world.wait(write).unwrap(), Outcome::Io(IoStatus::Done));
        fail_next(&world, OpKind::Flush);
        assert_eq!(world.flush(volume).unwrap(), IoStatus::Failed);
        let early = world.clone_of(snapshot, "early").unwrap();
        if let Some(clone) = early {
            world.read(clone, 0, 64).unwrap();
        }
        world.detach(volume).unwrap();
        world.attach(volume).unwrap().unwrap();
        if let Some(clone) = early {
            world.read(clone, 0, 64).unwrap();
        }
        assert!(world.clone_of(snapshot, "late").unwrap().is_some());
        world.verify_snapshots().unwrap();
    }
}

#[test]
fn a_device_that_still_fails_leaves_the_volume_detached() {
    for (kind, lasting) in [(OpKind::Flush, true), (OpKind::Read, true), (OpKind::Read, false)] {
        for seed in 0..10 {
            let mut world = failing(seed, 1 + seed as usize % 2);
            let volume = failed_volume(&mut world);
            world.detach(volume).unwrap();
            world.disk.inject(Fault { kind: Some(kind), after: 0, lasting });
            let refused = world.attach(volume).unwrap();
            assert!(refused.is_err(), "{kind:?} seed {seed}");
            assert_eq!(world.detached(), [volume]);
            world.disk.heal();
            world.attach(volume).unwrap().unwrap();
            done(world.write(volume, 0, 8));
            done(world.flush(volume));
            world.crash(Keep::Nothing);
            world.recover();
        }
    }
}

/// Of a volume that has failed nothing is made again after a kill: what its journal names may have
/// been lost with the flush, and the blocks hold somebody's old bytes then. That must hold also
/// while older entries of another volume keep its own from being retired.
#[test]
fn a_killed_process_does_not_bring_back_what_a_failed_flush_has_lost() {
    for seed in 0..40 {
        let mut world = World::new(WorldConfig { may_fail: true, ..WorldConfig::new(seed) });
        let [other, volume] = [(); 2].map(|()| world.create(ByteCount::new(8 << 20)).unwrap());
        done(world.write(volume, 64, 8)); // So that claims are there.
        world.idle().unwrap();
        // The other's data is durable by the volume's flush, its mapping is in the journal only.
        done(world.write(other, 0, 8));
        done(world.write(volume, 0, 8));
        done(world.flush(volume));
        done(world.write(volume, 8, 64));
        fail_next(&world, OpKind::Flush);
        assert_eq!(world.flush(volume).unwrap(), IoStatus::Failed);
        assert!(!world.has_failed(other).unwrap(), "seed {seed}");
        world.disk.connect().refresh(); // The cache is under pressure.
        world.kill();
        world.recover();
        done(world.write(volume, 0, 8));
        done(world.flush(volume));
    }
}

/// When a snapshot fails, the node that it froze goes with what it has lost, and the tree on the device
/// still may change what is below that in place. Its shard must not remember a leaf from there: nobody
/// finds it when the volume moves on, and it would be taken for what the leaf has become elsewhere, by the
/// volume when it comes back and by a clone.
#[test]
fn a_leaf_below_a_node_lost_with_a_snapshot_is_not_remembered() {
    for seed in 0..20 {
        let mut world = failing(seed, 2);
        let volume = world.create(SMALL).unwrap();
        world.create(SMALL).unwrap(); // So that the clone is made where the volume was.
        let home = world.home(volume);
        done(world.write(volume, 0, block(8)));
        done(world.write(volume, LEAF, 8));
        done(world.flush(volume));
        world.idle().unwrap();
        done(world.read(volume, 0, block(8)));
        // A new leaf changes the node above both.
        done(world.write(volume, 2 * LEAF, 8));
        fail_next(&world, OpKind::Flush);
        let reply = world.ask(Action::Snapshot { volume, label: None }).unwrap();
        assert!(matches!(reply, Reply::Failed(_)), "seed {seed}: {reply:?}");
        assert!(world.detach(volume).unwrap().is_some(), "seed {seed}");
        // What is below the root is not looked for here, and so not found when the volume goes.
        world.attach_unread(volume).unwrap().unwrap();
        assert!(world.model.snapshots(volume).is_empty(), "seed {seed}: the snapshot is durable");
        world.move_on(volume).unwrap();
        // No snapshot has the first leaf, so it changes where it is.
        done(world.io(volume, IoKind::Discard, 0, block(4)));
        done(world.write(volume, block(1), 8));
        done(world.write(volume, block(8), block(2)));
        let snapshot = world.snapshot(volume).unwrap();
        world.idle().unwrap();
        let reader = if seed % 2 == 0 {
            world.clone_of(snapshot, "clone").unwrap().unwrap()
        } else {
            world.move_on(volume).unwrap();
            volume
        };
        assert_eq!(world.home(reader), home, "seed {seed}");
        done(world.read(reader, 0, block(12)));
        done(world.write(reader, 0, block(12)));
        done(world.flush(reader));
        world.read_everything().unwrap();
        world.verify_snapshots().unwrap();
        world.crash(Keep::Nothing);
        world.recover();
    }
}

fn run(seed: u64) {
    let mut world = failing(seed, 1 + seed as usize % 2);
    let workload = Workload::default();
    for round in 0..3 {
        for _ in 0..60 {
            workload.step(&mut world);
        }
        let kind = *world.random.pick(&[OpKind::Flush, OpKind::Flush, OpKind::Write]);
        let after = world.random.below(30);
        let lasting = world.random.chance(1, 4);
        world.disk.inject(Fault { kind: Some(kind), after, lasting });
        for _ in 0..80 {
            workload.step(&mut world);
        }
        if world.random.chance(1, 3) {
            try_all(&mut world); // Under the fault.
        }
        world.disk.heal();
        for _ in 0..4 {
            try_all(&mut world);
            for _ in 0..20 {
                workload.step(&mut world);
            }
        }
        world.settle().expect("the power is on");
        match (round + seed) % 3 {
            0 => world.kill(),
            1 => world.crash(Keep::Nothing),
            _ => world.crash_somehow(),
        }
        world.recover();
        world.verify_snapshots().expect("the power is on");
    }
}

/// Detaches what has failed, and now and then what has not; attaches what is detached.
fn try_all(world: &mut World) {
    for id in world.volumes() {
        if world.has_failed(id).expect("the power is on") || world.random.chance(1, 6) {
            world.detach(id).expect("the power is on");
        }
    }
    for id in world.detached() {
        // Refused under the fault, and when another volume has failed meanwhile.
        let _ = world.attach(id).expect("the power is on");
    }
}

#[test]
fn volumes_come_and_go_under_load_on_a_device_that_fails() {
    let chosen = std::env::var("SEED").ok().map(|seed| seed.parse().expect("SEED is a number"));
    let seeds: Vec<u64> = match chosen {
        Some(seed) => vec![seed],
        None => REGRESSIONS.iter().copied().chain(SEEDS).collect(),
    };
    for seed in seeds {
        if catch_unwind(AssertUnwindSafe(|| run(seed))).is_err() {
            panic!("SEED={seed} cargo test -p bessel-tests --test detach_attach volumes_come");
        }
    }
}
