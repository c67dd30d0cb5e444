//! States that seeded work comes to once in a thousand runs, or never, set up on purpose.
//!
//! Each of these tests is the only one, or by far the quickest, to see some bug of `make planted`
//! (docs/planted.md).

use bessel_mapping::check::{self, Severity};
use bessel_mapping::format::ExtentType;
use bessel_mapping::request::{
    CacheMode, CommandError, IoKind, IoStatus, Reply, SnapshotId, VolumeId,
};
use bessel_mapping::store::{self, FormatOptions, OpenError, OpenMode};
use bessel_reactor::clock::WallTime;
use bessel_reactor::device::sim::{Fault, Keep, OpKind, Schedule, SimConfig, SimDisk};
use bessel_reactor::units::{ByteCount, SECTORS_PER_BLOCK};
use bessel_tests::world::{Action, Outcome, World, WorldConfig};

/// Sectors that one leaf maps.
const LEAF: u64 = 512 * SECTORS_PER_BLOCK;

fn at_once(seed: u64) -> WorldConfig {
    WorldConfig { schedule: Schedule::AtOnce, ..WorldConfig::new(seed) }
}

/// A volume of 1 GiB with one block in its first leaf, durable.
fn written(config: WorldConfig) -> (World, VolumeId) {
    let mut world = World::new(config);
    let volume = world.create(ByteCount::new(1 << 30)).expect("the power is on");
    assert_eq!(world.write(volume, 0, 8).expect("the power is on"), IoStatus::Done);
    assert_eq!(world.flush(volume).expect("the power is on"), IoStatus::Done);
    world.idle().expect("the power is on");
    (world, volume)
}

fn steps(world: &mut World, count: usize) {
    for _ in 0..count {
        world.step();
    }
}

/// Writes to extents of this kind stay in flight, but for those of their bitmaps.
fn hold_writes(world: &mut World, kind: ExtentType) {
    let extents = world.extents();
    world.disk.hold(move |op, block| op == OpKind::Write && extents.holds(block, kind));
}

/// There is nothing to commit, and still something to flush.
#[test]
fn a_flush_of_writes_in_place_alone_keeps_them() {
    for (sector, sectors) in [(0, 8), (3, 2)] {
        let (mut world, volume) = written(at_once(1));
        assert_eq!(world.write(volume, sector, sectors).unwrap(), IoStatus::Done);
        assert_eq!(world.flush(volume).unwrap(), IoStatus::Done);
        world.crash(Keep::Nothing);
        world.recover();
    }
}

/// The second one finds a hole that only memory knows of: it must wait for what makes it one.
#[test]
fn zeroing_twice_promises_what_zeroing_once_does() {
    let (mut world, volume) = written(at_once(1));
    let cache = CacheMode::Writethrough;
    world.perform(Action::SetCache { volume, cache }).unwrap();
    hold_writes(&mut world, ExtentType::Metadata);
    let tickets = [(); 2].map(|()| {
        let ticket = world.start_io(volume, IoKind::WriteZeroes, 0, 8);
        steps(&mut world, 20);
        ticket
    });
    assert!(!world.has_ended(tickets[0]), "its commit is held back");
    world.crash(Keep::Nothing);
    world.recover();
}

/// Each new node of the path takes a block; they run out at every depth in turn.
#[test]
fn a_path_cut_short_by_a_full_store_is_whole() {
    for free in 4..20 {
        let mut world = World::new(WorldConfig {
            capacity: ByteCount::new(4 << 20),
            may_fill: true,
            ..at_once(u64::from(free))
        });
        for (extent, kind) in [(1, ExtentType::Data), (2, ExtentType::Data)] {
            world.prepare_extent(extent, kind, 100);
        }
        world.prepare_extent(3, ExtentType::Metadata, free);
        let volume = world.create(ByteCount::new(600 << 30)).unwrap();
        let mut full = false;
        for far in 0..10 {
            full |= world.write(volume, far * 30 * 512 * LEAF, 8).unwrap() == IoStatus::NoSpace;
        }
        assert!(full, "{free} blocks for ten paths");
        world.flush(volume).unwrap();
        world.idle().unwrap();
        world.crash(Keep::Nothing);
        world.recover();
    }
}

/// A write in place lands in the snapshot taken meanwhile: a clone made too early would see it land.
#[test]
fn a_clone_never_sees_its_snapshot_settle() {
    for seed in 0..5 {
        let (mut world, volume) = written(at_once(seed));
        hold_writes(&mut world, ExtentType::Data);
        let write = world.start_io(volume, IoKind::Write, 0, 8);
        steps(&mut world, 5);
        let snapshot = world.snapshot(volume).unwrap();
        let settling = world.snapshots(volume).unwrap()[0].settling;
        if settling {
            world.disk.release();
            world.wait(write).unwrap();
        }
        let clone = world.clone_of(snapshot, "clone").unwrap().expect("it has settled");
        world.read(clone, 0, 8).unwrap();
        if !settling {
            world.disk.release();
            world.wait(write).unwrap();
        }
        world.read(clone, 0, 8).unwrap();
        assert!(!world.snapshots(volume).unwrap()[0].settling, "not for ever");
    }
}

/// A small write after a snapshot takes the rest of its block from the old home, where a write from
/// before the snapshot has yet to land.
#[test]
fn a_merge_waits_for_the_write_in_place_that_it_must_not_miss() {
    for seed in 0..10 {
        let (mut world, volume) = written(at_once(seed));
        hold_writes(&mut world, ExtentType::Data);
        let before = world.start_io(volume, IoKind::Write, 0, 8);
        steps(&mut world, 5);
        world.snapshot(volume).unwrap();
        let after = world.start_io(volume, IoKind::Write, 3, 2);
        steps(&mut world, 20);
        world.disk.release();
        for write in [before, after] {
            assert_eq!(world.wait(write).unwrap(), Outcome::Io(IoStatus::Done));
        }
        world.read(volume, 0, 8).unwrap();
    }
}

/// The clone's root is above the snapshot's, and the snapshot stays as it is.
#[test]
fn a_clone_taller_than_its_snapshot_shares_it_read_only() {
    for keep in [Keep::Nothing, Keep::Everything] {
        let (mut world, volume) = written(at_once(1));
        let snapshot = world.snapshot(volume).unwrap();
        let size = ByteCount::new(600 << 30);
        let clone = world.larger_clone_of(snapshot, "clone", size).unwrap().expect("it settled");
        for sector in [0, 3, LEAF, size.sectors() - 8] {
            assert_eq!(world.write(clone, sector, 8).unwrap(), IoStatus::Done);
            assert_eq!(world.write(volume, sector % LEAF + 16, 8).unwrap(), IoStatus::Done);
        }
        world.verify_snapshots().unwrap();
        world.flush(clone).unwrap();
        world.crash(keep);
        world.recover();
        world.verify_snapshots().unwrap();
    }
}

/// A request in flight would end in whichever tree it meets.
#[test]
fn a_rollback_is_refused_while_requests_are_in_flight() {
    let (mut world, volume) = written(at_once(1));
    let snapshot = world.snapshot(volume).unwrap();
    hold_writes(&mut world, ExtentType::Data);
    let write = world.start_io(volume, IoKind::Write, 0, 8);
    steps(&mut world, 5);
    let rollback = world.start(Action::Rollback { snapshot });
    let refused = Outcome::Reply(Reply::Failed(CommandError::InUse));
    assert_eq!(world.wait(rollback).unwrap(), refused);
    world.disk.release();
    assert_eq!(world.wait(write).unwrap(), Outcome::Io(IoStatus::Done));
    world.perform(Action::Rollback { snapshot }).unwrap();
    world.read(volume, 0, 8).unwrap();
    world.crash(Keep::Nothing);
    world.recover();
}

/// Who thins has looked at the labels some time before.
#[test]
fn a_batch_of_deletions_passes_over_what_has_a_label_by_then() {
    let (mut world, volume) = written(at_once(1));
    for _ in 0..30 {
        world.snapshot(volume).unwrap();
    }
    let snapshot = |sequence| SnapshotId { volume, sequence };
    world.perform(Action::DeleteSnapshot { snapshot: snapshot(4) }).unwrap();
    let label = Some(world.fresh_name());
    let labelled = world.start(Action::Label { snapshot: snapshot(25), label });
    let sequences = vec![3, 4, 25, 26];
    let deleted = world.start(Action::DeleteSnapshots { volume, sequences });
    assert_eq!(world.wait(labelled).unwrap(), Outcome::Reply(Reply::Done));
    assert_eq!(world.wait(deleted).unwrap(), Outcome::Reply(Reply::Deleted(vec![3, 26])));
    let beyond = world.ask(Action::DeleteSnapshots { volume, sequences: vec![] }).unwrap();
    assert_eq!(beyond, Reply::Deleted(vec![]));
    world.crash(Keep::Nothing);
    world.recover();
    let there = world.snapshots(volume).unwrap();
    let gone = there.iter().filter(|it| it.deleted).map(|it| it.id.sequence);
    assert_eq!(gone.collect::<Vec<_>>(), [3, 4, 26]);
    assert_eq!(there[25].label.as_deref(), Some("n2"));
}

/// The journal must not forget what the old tree owes before the new one is there.
#[test]
fn a_rollback_that_is_killed_loses_nothing() {
    for count in 0..30 {
        let config = WorldConfig { schedule: Schedule::Fifo, ..WorldConfig::new(count) };
        let (mut world, volume) = written(config);
        let snapshot = world.snapshot(volume).unwrap();
        assert_eq!(world.write(volume, 0, 24).unwrap(), IoStatus::Done);
        world.start(Action::Rollback { snapshot });
        steps(&mut world, count as usize);
        world.kill();
        world.recover();
        world.verify_snapshots().unwrap();
    }
}

/// Two slots for each record, so that the loss of one costs one change and not the volume.
#[test]
fn a_lost_record_brings_back_the_one_before() {
    let (mut world, volume) = written(at_once(1));
    for round in 0..3 {
        let before = world.show(volume).unwrap().name.clone();
        let name = format!("round-{round}");
        world.perform(Action::Rename { volume, name: name.clone() }).unwrap();
        let disk = world.disk.fork(1);
        let look = || store::open(&mut disk.connect(), OpenMode::ReadOnly).expect("it opens");
        let entry = look().directory.entry(volume).expect("it is whole").clone();
        assert_eq!(entry.record.name, name);
        let place = look().geometry.registry_slot(entry.slot, entry.record.generation);
        let mut bytes = disk.peek(place);
        bytes[40] ^= 1;
        disk.poke(place, &bytes);
        let found = look();
        assert_eq!(found.faults, Vec::new());
        assert_eq!(found.directory.entry(volume).expect("the older one is").record.name, before);
        assert!(found.findings.iter().any(|finding| finding.severity == Severity::Corrupt));
    }
}

/// Damage while the store is served: what the bitmap offered is not known any more.
#[test]
fn nothing_is_allocated_from_a_bitmap_that_was_damaged_meanwhile() {
    let mut world = World::new(WorldConfig { may_fill: true, ..at_once(1) });
    let volume = world.create(ByteCount::new(1 << 30)).unwrap();
    assert_eq!(world.write(volume, 0, 80).unwrap(), IoStatus::Done);
    assert_eq!(world.flush(volume).unwrap(), IoStatus::Done);
    let opened = store::open(&mut world.disk.connect(), OpenMode::ReadOnly).expect("it opens");
    let extents = world.extents();
    for leaf in 1..200 {
        // Every time, since a claim from a bitmap that is in memory still writes it anew. A claim of
        // metadata for the leaves comes between two of data, and then it is read again.
        for extent in (0..extents.extent_count()).filter(|e| extents.get(*e) == ExtentType::Data) {
            let block = opened.geometry.bitmap_block(extent, 0);
            let mut bytes = world.disk.peek(block);
            bytes[200] = 0x5a;
            world.disk.poke(block, &bytes);
        }
        world.write(volume, leaf * LEAF, 8).unwrap();
    }
    for leaf in 0..200 {
        assert_eq!(world.read(volume, leaf * LEAF, 80).unwrap(), IoStatus::Done);
    }
}

/// W's flush fails and takes with it the bitmap by which V's next blocks are claimed. V has nothing
/// else to lose and is not latched; what it is given must be durable all the same.
#[test]
fn a_claim_whose_bitmap_was_lost_is_not_granted() {
    for seed in 0..10 {
        let mut world = World::new(WorldConfig { may_fail: true, ..at_once(seed) });
        let [v, w] = [(); 2].map(|()| world.create(ByteCount::new(1 << 30)).unwrap());
        for volume in [v, w] {
            assert_eq!(world.write(volume, 0, 8).unwrap(), IoStatus::Done);
            assert_eq!(world.flush(volume).unwrap(), IoStatus::Done);
        }
        world.idle().unwrap();
        assert_eq!(world.write(w, 0, 8).unwrap(), IoStatus::Done);
        // V takes blocks until a claim is on its way; none of its data is written yet.
        hold_writes(&mut world, ExtentType::Data);
        world.disk.inject(Fault { kind: Some(OpKind::Flush), after: 0, lasting: false });
        let start = |part: u64| world.start_io(v, IoKind::Write, part * 64, 64);
        let writes: Vec<_> = (1..16).map(start).collect();
        steps(&mut world, 20);
        assert_eq!(world.flush(w).unwrap(), IoStatus::Failed);
        world.disk.heal();
        world.disk.release();
        for write in writes {
            world.wait(write).unwrap();
        }
        world.flush(v).unwrap();
        world.crash(Keep::Nothing);
        world.recover();
    }
}

/// The same for the bitmap of a new extent, which is several blocks: those written before a flush
/// failed are lost, and the flush that follows the last one knows nothing of them.
#[test]
fn an_extent_whose_bitmap_was_lost_is_not_used() {
    for seed in 0..5 {
        let mut world = World::new(WorldConfig {
            may_fail: true,
            capacity: ByteCount::new(1 << 30),
            extent_size: ByteCount::new(256 << 20),
            ..at_once(seed)
        });
        let [v, w] = [(); 2].map(|()| world.create(ByteCount::new(1 << 30)).unwrap());
        world.idle().unwrap();
        let extent_blocks = world.extents().extent_blocks();
        world.disk.hold(move |op, block| {
            op == OpKind::Write && block.get() >= extent_blocks && block.get() % extent_blocks == 2
        });
        let write = world.start_io(v, IoKind::Write, 0, 8);
        steps(&mut world, 20);
        assert!(!world.has_ended(write), "the third block of the bitmap is held back");
        world.disk.inject(Fault { kind: Some(OpKind::Flush), after: 0, lasting: false });
        let rename = world.start(Action::Rename { volume: w, name: "other".into() });
        let outcome = format!("{:?}", world.wait(rename).unwrap());
        assert!(outcome.contains("Latched"), "{outcome}");
        world.disk.heal();
        world.disk.release();
        world.wait(write).unwrap();
        world.idle().unwrap();
        world.write(v, 0, 8).unwrap();
        world.flush(v).unwrap();
        world.crash(Keep::Nothing);
        world.recover();
    }
}

/// A world whose cache holds a fraction of its one volume's 400 leaves.
fn wide(config: WorldConfig) -> (World, VolumeId) {
    let mut world = World::new(WorldConfig {
        node_cache: ByteCount::new(0),
        capacity: ByteCount::new(64 << 20),
        ..config
    });
    let volume = world.create(ByteCount::new(1 << 30)).expect("the power is on");
    for leaf in 0..400 {
        assert_eq!(world.write(volume, leaf * LEAF, 8).expect("the power is on"), IoStatus::Done);
    }
    assert_eq!(world.flush(volume).expect("the power is on"), IoStatus::Done);
    world.idle().expect("the power is on");
    (world, volume)
}

/// The device still has the old node, and would give it to whoever reads it again.
#[test]
fn a_node_stays_in_memory_until_its_image_is_on_the_device() {
    let (mut world, volume) = wide(at_once(1));
    assert_eq!(world.write(volume, 8, 8).unwrap(), IoStatus::Done);
    world.disk.hold(|op, _| op == OpKind::Flush);
    let flush = world.start_io(volume, IoKind::Flush, 0, 0);
    for leaf in 1..400 {
        assert_eq!(world.read(volume, leaf * LEAF, 8).unwrap(), IoStatus::Done);
    }
    assert_eq!(world.read(volume, 8, 8).unwrap(), IoStatus::Done);
    assert!(!world.has_ended(flush), "the device has not flushed");
    world.disk.release();
    assert_eq!(world.wait(flush).unwrap(), Outcome::Io(IoStatus::Done));
    world.crash(Keep::Nothing);
    world.recover();
}

/// The same of one that a snapshot has frozen, whose image is not even taken before it is written.
#[test]
fn a_frozen_node_stays_in_memory_until_its_image_is_on_the_device() {
    let (mut world, volume) = wide(at_once(1));
    assert_eq!(world.write(volume, 8, 8).unwrap(), IoStatus::Done);
    world.disk.hold(|op, _| op == OpKind::Flush);
    let snapshot = world.start(Action::Snapshot { volume, label: None });
    for leaf in 1..400 {
        assert_eq!(world.read(volume, leaf * LEAF, 8).unwrap(), IoStatus::Done);
    }
    assert_eq!(world.read(volume, 8, 8).unwrap(), IoStatus::Done);
    assert!(!world.has_ended(snapshot), "the device has not flushed");
    world.disk.release();
    assert!(matches!(world.wait(snapshot).unwrap(), Outcome::Reply(Reply::Snapshot(_))));
    world.crash(Keep::Nothing);
    world.recover();
}

#[test]
fn a_node_that_cannot_be_read_fails_its_request_and_is_tried_again() {
    let (mut world, volume) = wide(WorldConfig { may_fail: true, ..at_once(1) });
    world.disk.inject(Fault { kind: Some(OpKind::Read), after: 0, lasting: false });
    assert_eq!(world.read(volume, 0, 8).unwrap(), IoStatus::Failed);
    world.disk.heal();
    assert_eq!(world.read(volume, 0, 8).unwrap(), IoStatus::Done);
}

/// A forced format over a store, which fails from some operation on, and any part of what was not
/// flushed survives: there is the old store, whole, or none, or the new one, whole.
#[test]
fn a_format_cut_short_leaves_a_whole_store_or_none() {
    let options = |name: u8| FormatOptions {
        extent_size: None,
        force: true,
        uuid: [name; 16],
        secret: u64::from(name) | 1,
        time: WallTime::from_unix_nanos(1),
    };
    let nothing = &mut |_: u64, _: u64| {};
    let mut formatted = false;
    for operations in 0.. {
        for seed in 0..6 {
            let config = SimConfig::new(ByteCount::new(8 << 20), seed);
            let disk = SimDisk::new(SimConfig { schedule: Schedule::AtOnce, ..config });
            disk.set_background(0xa5);
            store::format(&mut disk.connect(), &options(1), nothing).expect("the disk works");
            disk.inject(Fault { kind: None, after: operations, lasting: true });
            formatted = store::format(&mut disk.connect(), &options(2), nothing).is_ok();
            disk.heal();
            disk.crash(Keep::Random);
            match store::open(&mut disk.connect(), OpenMode::ReadOnly) {
                Ok(_) => {
                    let report = check::check(&mut disk.connect(), nothing).expect("it opens");
                    let mut bad = report.findings.iter();
                    let bad = bad.find(|finding| finding.severity == Severity::Corrupt);
                    assert_eq!(bad, None, "seed {seed}, operation {operations}");
                }
                Err(OpenError::NotAStore(_)) => {}
                Err(error) => panic!("seed {seed}, operation {operations}: {error}"),
            }
        }
        if formatted {
            assert!(operations > 10, "it fails only after all of its operations");
            return;
        }
    }
}
