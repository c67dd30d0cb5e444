//! Ways in which a collection, or the reuse of what it freed, has harmed somebody, or nearly.

use bessel_mapping::check;
use bessel_mapping::gc::{CollectError, Phase};
use bessel_mapping::request::{IoKind, IoStatus, VolumeId};
use bessel_mapping::store::{self, OpenMode};
use bessel_reactor::device::sim::{Keep, Schedule};
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr, ByteCount, SECTORS_PER_BLOCK};
use bessel_tests::world::{Action, World, WorldConfig};

const ON: &str = "the power is on";
const BLOCK: usize = BLOCK_SIZE as usize;

/// With room for all volumes that the registry has slots for.
fn at_once(seed: u64) -> WorldConfig {
    let capacity = ByteCount::new(64 << 20);
    let node_cache = ByteCount::new(4 << 20);
    WorldConfig { schedule: Schedule::AtOnce, capacity, node_cache, ..WorldConfig::new(seed) }
}

fn create(world: &mut World) -> VolumeId {
    world.create(ByteCount::new(1 << 20)).expect(ON)
}

fn write(world: &mut World, volume: VolumeId, sector: u64, sectors: u64) {
    assert_eq!(world.write(volume, sector, sectors).expect(ON), IoStatus::Done);
}

fn flush(world: &mut World, volume: VolumeId) {
    assert_eq!(world.flush(volume).expect(ON), IoStatus::Done);
}

fn collect(world: &mut World) {
    world.collect_garbage().expect(ON).expect("every volume is well");
}

/// Registry slot and generation of a volume's record, on the device.
fn record_of(world: &World, volume: VolumeId) -> (u32, [BlockAddr; 2], u64) {
    let disk = world.disk.fork(1);
    disk.set_schedule(Schedule::AtOnce);
    let store = store::open(&mut disk.connect(), OpenMode::ReadOnly).expect("it opens");
    let entry = store.directory.entry(volume).expect("it is whole");
    let places = [0, 1].map(|generation| store.geometry.registry_slot(entry.slot, generation));
    (entry.slot, places, entry.record.generation)
}

/// A clone of a clone, and what lies between them is deleted; its slot is the only one that a new volume
/// can have. From then on nothing says that the clone descends from the first volume, and a snapshot of
/// that which is deleted must not take along what the clone reads.
#[test]
fn a_clone_whose_origin_lost_its_slot_keeps_what_it_shares_with_those_before() {
    let mut world = World::new(at_once(1));
    let first = create(&mut world);
    write(&mut world, first, 0, 64);
    let base = world.snapshot(first).expect(ON);
    let between = world.clone_of(base, "between").expect(ON).expect("there is room");
    let snapshot = world.snapshot(between).expect(ON);
    let clone = world.clone_of(snapshot, "clone").expect(ON).expect("there is room");
    world.perform(Action::Delete { volume: between }).expect(ON);
    collect(&mut world);
    while world.may_create() {
        create(&mut world);
    }
    write(&mut world, first, 0, 64);
    flush(&mut world, first);
    world.perform(Action::DeleteSnapshot { snapshot: base }).expect(ON);
    world.reclaim_all().expect(ON);
    world.idle().expect(ON);
    world.check();
    world.read(clone, 0, 64).expect(ON);
}

/// The deletion is in one of a record's two blocks, and the volume as it was in the other. Once its blocks
/// are somebody else's, that one must not count again when the deletion is damaged.
#[test]
fn a_collected_volume_does_not_come_back_when_its_deletion_is_damaged() {
    let mut world = World::new(at_once(1));
    let gone = create(&mut world);
    let stays = create(&mut world);
    write(&mut world, gone, 0, 64);
    flush(&mut world, gone);
    world.perform(Action::Delete { volume: gone }).expect(ON);
    collect(&mut world);
    write(&mut world, stays, 0, 1024);
    flush(&mut world, stays);
    world.shut_down().expect(ON);

    let disk = world.disk.fork(1);
    disk.set_schedule(Schedule::AtOnce);
    let (_, places, generation) = record_of(&world, gone);
    disk.poke(places[generation as usize % 2], &[0x5a; BLOCK]);
    let report = check::check(&mut disk.connect(), &mut |_, _| {}).expect("it opens");
    let led_astray: Vec<_> = report
        .findings
        .iter()
        .filter(|finding| !matches!(finding.structure, check::Structure::Record))
        .collect();
    let store = store::open(&mut disk.connect(), OpenMode::ReadOnly).expect("it opens");
    let back = store.directory.get(gone).is_some_and(|it| !it.deleted && it.fault.is_none());
    assert!(!back, "the volume is served again, over blocks that were freed: {led_astray:#?}");
}

/// A clone is made in a slot that was looked at, and then the volume that it comes from is deleted before
/// its own slot is: none of the two is among the roots.
#[test]
fn a_clone_made_while_roots_are_read_keeps_what_its_deleted_origin_had() {
    for steps in 0..60 {
        let mut world = World::new(at_once(steps));
        let low = create(&mut world);
        let mut origin = low;
        while world.may_create() {
            origin = create(&mut world);
        }
        write(&mut world, origin, 0, 64);
        let snapshot = world.snapshot(origin).expect(ON);
        flush(&mut world, origin);
        world.perform(Action::Delete { volume: low }).expect(ON);
        collect(&mut world);
        world.start_collection();
        for _ in 0..steps {
            world.step();
        }
        world.hold_collection(true);
        let clone = world.clone_of(snapshot, "clone").expect(ON).expect("there is room");
        world.perform(Action::Delete { volume: origin }).expect(ON);
        world.hold_collection(false);
        world.await_collection().expect(ON);
        world.idle().expect(ON);
        world.check();
        world.read(clone, 0, 64).expect(ON);
    }
}

/// The same with a snapshot that is deleted, for which the daemon has no plan (`UnknownDescent`: the origin
/// of its volume is gone), after a clone was made of it: slots and logs are read one after the other, and the
/// logs last.
#[test]
fn a_clone_made_while_roots_are_read_keeps_what_its_deleted_snapshot_had() {
    begin_a_tree_while_roots_are_read(false);
}

/// The same after its volume was rolled back to it.
#[test]
fn a_rollback_while_roots_are_read_keeps_what_its_deleted_snapshot_had() {
    begin_a_tree_while_roots_are_read(true);
}

fn begin_a_tree_while_roots_are_read(rolls_back: bool) {
    for steps in 0..60 {
        let mut world = World::new(at_once(steps));
        let volume = create(&mut world);
        write(&mut world, volume, 0, 64);
        let snapshot = world.snapshot(volume).expect(ON);
        write(&mut world, volume, 0, 64);
        flush(&mut world, volume);
        world.idle().expect(ON);
        world.leave_deletions();
        world.start_collection();
        for _ in 0..steps {
            world.step();
        }
        world.hold_collection(true);
        let reader = if rolls_back {
            world.perform(Action::Rollback { snapshot }).expect(ON);
            volume
        } else {
            world.clone_of(snapshot, "clone").expect(ON).expect("there is room")
        };
        world.perform(Action::DeleteSnapshot { snapshot }).expect(ON);
        world.hold_collection(false);
        world.await_collection().expect(ON);
        world.idle().expect(ON);
        world.check();
        world.read(reader, 0, 64).expect(ON);
    }
}

/// Power fails between the two records of a volume in a used slot. It is there afterwards, and served; its
/// deleted predecessor must not be what is left of it when its one record is damaged.
#[test]
fn a_volume_that_was_made_in_part_is_not_taken_for_the_deleted_one_before_it() {
    let mut world = World::new(at_once(1));
    let mut low = create(&mut world);
    while world.may_create() {
        low = create(&mut world);
    }
    world.perform(Action::Delete { volume: low }).expect(ON);
    collect(&mut world);
    let name = world.fresh_name();
    let making = world.start(Action::Create { name: name.clone(), size: ByteCount::new(1 << 20) });
    let half = loop {
        let disk = world.disk.fork(1);
        disk.set_schedule(Schedule::AtOnce);
        disk.crash(Keep::Nothing);
        let store = store::open(&mut disk.connect(), OpenMode::ReadOnly).expect("it opens");
        if let Some(found) = store.directory.find(&name) {
            break found.id;
        }
        assert!(!world.has_ended(making));
        world.step();
    };
    world.crash(Keep::Nothing);
    world.recover();
    assert!(world.volumes().contains(&half));
    write(&mut world, half, 0, 64);
    flush(&mut world, half);
    world.shut_down().expect(ON);

    let (_, places, generation) = record_of(&world, half);
    let disk = world.disk.fork(1);
    disk.set_schedule(Schedule::AtOnce);
    disk.poke(places[generation as usize % 2], &[0x5a; BLOCK]);
    let store = store::open(&mut disk.connect(), OpenMode::ReadOnly).expect("it opens");
    let gone_quietly =
        store.directory.get(half).is_none() && store.directory.unreadable().is_none();
    assert!(!gone_quietly, "what it holds is garbage now: {:?}", store.faults);
}

/// A guest that maps and unmaps a leaf over and over, with a collection that takes its time: the nodes that
/// it frees are held back until the end, however many they are, and the store runs full.
#[test]
fn a_slow_collection_does_not_fill_the_store() {
    for slow in [false, true] {
        let capacity = ByteCount::new(8 << 20);
        let mut world = World::new(WorldConfig { capacity, ..at_once(1) });
        let volume = world.create(ByteCount::new(1 << 30)).expect(ON);
        let leaf = 512 * SECTORS_PER_BLOCK;
        write(&mut world, volume, 0, 8);
        flush(&mut world, volume);
        world.idle().expect(ON);
        if slow {
            world.start_collection();
            while world.collection_progress().is_none_or(|it| it.phase != Phase::Mark) {
                world.step();
            }
            world.hold_collection(true);
        }
        for _ in 0..2000 {
            write(&mut world, volume, 0, 8);
            let done = world.io(volume, IoKind::Discard, 0, leaf).expect(ON);
            assert_eq!(done, IoStatus::Done);
            flush(&mut world, volume);
        }
    }
}

/// A full store, from which a guest has just freed a node, as one is told to do (fstrim): who writes then gets
/// that block, also while a collection runs, which is what begins by itself when space runs out.
#[test]
fn a_full_store_has_room_again_after_a_discard_while_a_collection_runs() {
    for collects in [false, true] {
        let capacity = ByteCount::new(8 << 20);
        let mut world = World::new(WorldConfig { capacity, may_fill: true, ..at_once(1) });
        let leaf = 512 * SECTORS_PER_BLOCK;
        let trimmed = world.create(ByteCount::new(4 << 30)).expect(ON);
        let filler = world.create(ByteCount::new(4 << 30)).expect(ON);
        write(&mut world, trimmed, 0, 512);
        write(&mut world, trimmed, leaf, 8);
        let mut writes = (0..2048).map(|at| (at, world.write(filler, at * leaf, 8).expect(ON)));
        let full = writes.find(|(_, status)| *status == IoStatus::NoSpace);
        let (full, _) = full.expect("it is a small store");
        world.idle().expect(ON);
        if collects {
            world.start_collection();
            while world.collection_progress().is_none_or(|it| it.phase != Phase::Mark) {
                world.step();
            }
            world.hold_collection(true);
        }
        for (sector, sectors) in [(256, 256), (leaf, leaf)] {
            let done = world.io(trimmed, IoKind::Discard, sector, sectors).expect(ON);
            assert_eq!(done, IoStatus::Done);
            flush(&mut world, trimmed);
        }
        let written = world.write(filler, full * leaf, 8).expect(ON);
        assert_eq!(written, IoStatus::Done, "collects: {collects}");
        if collects {
            // What it read may have been something else by then.
            world.hold_collection(false);
            world.await_collection().expect(ON);
            assert_eq!(world.collections(), [Err(CollectError::Full)]);
            world.collect_garbage().expect(ON).expect("it need not be held back any more");
        }
    }
}
