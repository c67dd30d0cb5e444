//! The collector: it frees all that nothing leads to and nothing else, beside guests and operators,
//! whatever is cut short.

use std::collections::BTreeSet;
use std::time::Duration;

use bessel_mapping::check::CheckReport;
use bessel_mapping::format::ExtentType;
use bessel_mapping::gc::{CollectError, Collected, Phase};
use bessel_mapping::request::{IoKind, IoStatus, SnapshotId, VolumeId};
use bessel_reactor::device::sim::{Fault, Keep, OpKind, Random, Schedule};
use bessel_reactor::units::{ByteCount, SECTORS_PER_BLOCK};
use bessel_tests::seeds;
use bessel_tests::workload::Workload;
use bessel_tests::world::{Action, World, WorldConfig};

/// Sectors that one leaf maps.
const LEAF: u64 = 512 * SECTORS_PER_BLOCK;
const ON: &str = "the power is on";

fn at_once(seed: u64) -> WorldConfig {
    let capacity = ByteCount::new(64 << 20);
    WorldConfig { schedule: Schedule::AtOnce, capacity, ..WorldConfig::new(seed) }
}

fn write(world: &mut World, volume: VolumeId, sector: u64, sectors: u64) {
    assert_eq!(world.write(volume, sector, sectors).expect(ON), IoStatus::Done);
}

fn collect(world: &mut World) -> Collected {
    world.collect_garbage().expect(ON).expect("every volume is well")
}

fn leaked(report: &CheckReport) -> u64 {
    report.data.leaked + report.metadata.leaked
}

/// A store of volumes, snapshots, clones, rollbacks, some of them deleted; and what is left of it.
fn history(seed: u64, config: WorldConfig) -> (World, Vec<SnapshotId>) {
    let mut world = World::new(config);
    let mut random = Random::new(seed);
    let first = world.create(ByteCount::new(4 << 30)).expect(ON);
    let (mut volumes, mut taken) = (vec![first], Vec::new());
    for _ in 0..30 {
        let volume = *random.pick(&volumes);
        for _ in 0..random.below(5) {
            let sector = random.below(4) * LEAF + random.below(9) * SECTORS_PER_BLOCK;
            if random.chance(1, 4) {
                let sectors = if random.chance(1, 3) { LEAF } else { 40 };
                let done = world.io(volume, IoKind::Discard, sector, sectors).expect(ON);
                assert_eq!(done, IoStatus::Done);
            } else {
                write(&mut world, volume, sector, 8 * (1 + random.below(4)));
            }
        }
        let own: Vec<SnapshotId> =
            taken.iter().filter(|it: &&SnapshotId| it.volume == volume).copied().collect();
        match random.below(9) {
            0 if !taken.is_empty() && volumes.len() < 4 => {
                let origin = *random.pick(&taken);
                let name = world.fresh_name();
                volumes.extend(world.clone_of(origin, &name).expect(ON));
            }
            1 if !own.is_empty() => {
                world.perform(Action::Rollback { snapshot: *random.pick(&own) }).expect(ON);
                let sequence = world.show(volume).expect(ON).log.taken - 1;
                taken.push(SnapshotId { volume, sequence });
            }
            2 if volumes.len() > 1 => {
                world.perform(Action::Delete { volume }).expect(ON);
                volumes.retain(|other| *other != volume);
                taken.retain(|snapshot| snapshot.volume != volume);
            }
            3 if !taken.is_empty() => {
                let at = random.below(taken.len() as u64) as usize;
                let snapshot = taken.swap_remove(at);
                world.start(Action::DeleteSnapshot { snapshot });
                world.settle().expect(ON);
            }
            _ => taken.push(world.snapshot(volume).expect(ON)),
        }
    }
    (world, taken)
}

/// Whatever the power cut has leaked, and all that was deleted: afterwards nothing leaks.
#[test]
fn a_collection_frees_all_that_nothing_leads_to_and_nothing_else() {
    let mut freed = 0;
    for seed in 0..40 {
        let shards = 1 + seed as usize % 3;
        let (mut world, _) = history(seed, WorldConfig { shards, ..at_once(seed) });
        // With claims open, and deletions on their way.
        world.crash(Keep::Everything);
        world.recover();
        world.idle().expect(ON);
        let before = world.check();
        let collected = collect(&mut world);
        world.idle().expect(ON);
        let report = world.check();
        assert_eq!(collected.data_reached, report.data.reachable, "seed {seed}");
        assert_eq!(collected.metadata_reached, report.metadata.reachable, "seed {seed}");
        assert_eq!(
            leaked(&before) - leaked(&report),
            collected.data_freed + collected.metadata_freed,
            "seed {seed}: {collected:?}"
        );
        freed += collected.data_freed.min(collected.metadata_freed);
        assert_eq!(
            collect(&mut world),
            Collected { data_freed: 0, metadata_freed: 0, ..collected }
        );
        world.shut_down().expect(ON);
        assert_eq!(leaked(&world.check()), 0, "seed {seed}");
        world.recover();
        world.verify_snapshots().expect(ON);
    }
    assert!(freed > 40 * 20, "{freed}");
}

/// One collection after the other beside guests and operators, and then the power goes.
#[test]
fn collections_beside_everything_else_harm_nobody() {
    let mut collections = 0;
    for seed in 0..60 {
        let config = WorldConfig { faults: None, ..seeds::config(seed) };
        let mut world = World::new(config);
        let workload = Workload { commands: 150, ..Workload::default() };
        for life in 0..3 {
            for _ in 0..200 {
                world.collect_sometimes(1, 2);
                workload.step(&mut world);
            }
            if life == 1 {
                world.await_collection().expect(ON);
            }
            world.crash_somehow();
            world.recover();
        }
        world.verify_snapshots().expect(ON);
        collections += world.collections().iter().filter(|it| it.is_ok()).count();
    }
    assert!(collections > 60, "{collections}");
}

fn step_until(world: &mut World, done: impl Fn(&World) -> bool) {
    for _ in 0..10_000 {
        if done(world) {
            return;
        }
        world.step();
    }
    panic!("it never comes");
}

/// A volume of many leaves, each written anew since its snapshot, and that snapshot deleted: much to
/// read and to free.
fn much_garbage(config: WorldConfig) -> (World, VolumeId) {
    let mut world = World::new(config);
    let gone = world.create(ByteCount::new(1 << 30)).expect(ON);
    let volume = world.create(ByteCount::new(1 << 30)).expect(ON);
    for leaf in 0..200 {
        write(&mut world, gone, leaf * LEAF, 8);
        write(&mut world, volume, leaf * LEAF, 8);
    }
    world.perform(Action::Delete { volume: gone }).expect(ON);
    assert_eq!(world.flush(volume).expect(ON), IoStatus::Done);
    world.idle().expect(ON);
    (world, volume)
}

/// What the device holds of a volume whose flush failed, nobody knows.
#[test]
fn a_collection_ends_when_a_volume_has_failed_meanwhile() {
    for phase in [Phase::Checkpoint, Phase::Mark] {
        let (mut world, volume) = much_garbage(at_once(1));
        world.start_collection();
        step_until(&mut world, |world| {
            world.collection_progress().is_some_and(|progress| progress.phase == phase)
        });
        write(&mut world, volume, 0, 8);
        write(&mut world, volume, LEAF * 300, 8);
        world.expect_failures(true);
        world.disk.inject(Fault { kind: Some(OpKind::Flush), after: 0, lasting: false });
        assert_eq!(world.flush(volume).expect(ON), IoStatus::Failed);
        world.await_collection().expect(ON);
        match world.collections() {
            [Err(CollectError::VolumeFailed)] => {}
            // It was asked before it had come to its nodes.
            [Err(CollectError::Refused(_))] if phase == Phase::Checkpoint => {}
            ended => panic!("{phase:?}: {ended:?}"),
        }
        world.crash(Keep::Nothing);
        world.expect_failures(false);
        world.recover();
        assert!(collect(&mut world).data_freed >= 200);
    }
}

/// Whatever a collection had freed when it was cut short stays free, and the next one does the rest.
#[test]
fn a_collection_that_is_cut_short_is_done_by_the_next() {
    for steps in (0..3000).step_by(150) {
        let (mut world, _) = much_garbage(at_once(steps));
        world.start_collection();
        for _ in 0..steps {
            world.step();
        }
        world.crash_somehow();
        world.recover();
        collect(&mut world);
        world.shut_down().expect(ON);
        assert_eq!(leaked(&world.check()), 0, "after {steps} steps");
        world.recover();
        world.verify_snapshots().expect(ON);
    }
}

/// It ends in order in the middle of one: what was held back is given back.
#[test]
fn an_orderly_end_in_the_middle_of_a_collection_leaks_no_more_than_there_was() {
    for steps in (0..1500).step_by(100) {
        let (mut world, volume) = much_garbage(at_once(steps));
        world.start_collection();
        for step in 0..steps {
            if step == 100 {
                // Nodes of its own become free meanwhile.
                world.start_io(volume, IoKind::Discard, 0, 5 * LEAF);
            }
            world.step();
        }
        world.settle().expect(ON);
        world.shut_down().expect(ON);
        let garbage = leaked(&world.check());
        world.recover();
        let collected = collect(&mut world);
        assert_eq!(collected.data_freed + collected.metadata_freed, garbage, "{steps} steps");
    }
}

/// The slots of deleted volumes come back, and whoever has one is not taken for who had it before.
#[test]
fn volumes_in_the_slots_of_others_are_whole() {
    // Room for all of them at once.
    let node_cache = ByteCount::new(4 << 20);
    let mut world = World::new(WorldConfig { node_cache, ..at_once(1) });
    let mut made = Vec::new();
    while world.may_create() {
        let volume = world.create(ByteCount::new(1 << 20)).expect(ON);
        // Records that count far.
        for _ in 0..made.len() % 4 {
            let name = world.fresh_name();
            world.perform(Action::Rename { volume, name }).expect(ON);
        }
        made.push(volume);
    }
    assert!(made.len() > 50);
    for (index, volume) in made.iter().enumerate() {
        write(&mut world, *volume, 0, 16);
        if index % 8 > 0 {
            world.perform(Action::Delete { volume: *volume }).expect(ON);
        }
    }
    assert!(!world.may_create());
    let gone = made.len() - made.len().div_ceil(8);
    assert_eq!(collect(&mut world).deleted_volumes.len(), gone);
    // At no instant is the old volume there again, or the new one in part.
    let name = world.fresh_name();
    let making = world.start(Action::Create { name, size: ByteCount::new(1 << 20) });
    while !world.has_ended(making) {
        world.step();
        for keep in [Keep::Everything, Keep::Nothing, Keep::Random] {
            world.power_failure(1).recover(1, keep);
        }
    }
    let gone = gone - 1;
    for at in 0..gone {
        assert!(world.may_create(), "{at} of {gone}");
        let volume = world.create(ByteCount::new(1 << 20)).expect(ON);
        assert!(!made.contains(&volume), "no identity is used twice");
        write(&mut world, volume, 8, 24);
        assert_eq!(world.flush(volume).expect(ON), IoStatus::Done);
        if at % 16 == 0 {
            world.crash(Keep::Nothing);
            world.recover();
            // After a start nobody knows which of them were collected.
            collect(&mut world);
        }
    }
    assert!(!world.may_create());
    world.crash(Keep::Nothing);
    world.recover();
    assert_eq!(world.volumes().len(), made.len());
    world.read_everything().expect(ON);
}

/// A clone that shares two blocks with a volume that is gone, in a leaf of its own; a collection that is
/// about to read its nodes.
fn about_to_mark() -> (World, VolumeId) {
    let mut world = World::new(at_once(1));
    let volume = world.create(ByteCount::new(1 << 30)).expect(ON);
    write(&mut world, volume, 0, 24);
    let snapshot = world.snapshot(volume).expect(ON);
    let clone = world.clone_of(snapshot, "clone").expect(ON).expect("there is room");
    write(&mut world, clone, 8, 8);
    assert_eq!(world.flush(clone).expect(ON), IoStatus::Done);
    world.perform(Action::Delete { volume }).expect(ON);
    world.idle().expect(ON);
    world.start_collection();
    step_until(&mut world, |world| {
        world.collection_progress().is_some_and(|progress| progress.phase == Phase::Mark)
    });
    world.hold_collection(true);
    (world, clone)
}

fn steps(world: &mut World, count: usize) {
    for _ in 0..count {
        world.step();
    }
}

/// A read has looked a block up, which is replaced meanwhile: nobody has it but that read.
#[test]
fn a_collection_waits_for_requests_that_read_what_it_frees() {
    let (mut world, clone) = about_to_mark();
    let extents = world.extents();
    world.disk.hold(move |op, block| op == OpKind::Read && extents.holds(block, ExtentType::Data));
    let read = world.start_io(clone, IoKind::Read, 0, 8);
    steps(&mut world, 20);
    write(&mut world, clone, 0, 8);
    assert_eq!(world.flush(clone).expect(ON), IoStatus::Done);
    world.hold_collection(false);
    steps(&mut world, 1000);
    assert!(!world.has_ended(read), "the device holds it back");
    assert!(world.collections().is_empty(), "and the collection with it");
    world.disk.release();
    world.wait(read).expect(ON);
    world.await_collection().expect(ON);
    assert!(matches!(world.collections(), [Ok(collected)] if collected.data_freed > 1));
    world.read(clone, 0, 24).expect(ON);
}

/// A node is written, and a power cut may still bring its older contents back, with a link to a block
/// that nothing leads to now.
#[test]
fn a_collection_waits_until_what_it_has_read_is_durable() {
    for power_fails in [true, false] {
        let (mut world, clone) = about_to_mark();
        let extents = world.extents();
        world.disk.hold(move |op, block| {
            op == OpKind::Write && extents.holds(block, ExtentType::Metadata)
        });
        write(&mut world, clone, 0, 8);
        world.pass(Duration::from_secs(1)); // A commit in the background.
        step_until(&mut world, |world| {
            world.disk.flying().iter().any(|op| op.kind == OpKind::Write)
        });
        let leaf = world.disk.flying().iter().find(|op| op.kind == OpKind::Write).unwrap().block;
        let before = world.disk.peek(leaf);
        world.disk.hold(|op, _| op == OpKind::Flush);
        step_until(&mut world, |world| world.disk.peek(leaf) != before);
        world.hold_collection(false);
        steps(&mut world, 1000);
        if power_fails {
            // What bitmaps say is kept, the leaf is not.
            world.crash_keeping_bitmaps();
            world.recover();
        } else {
            assert!(world.collections().is_empty());
            world.disk.release();
            world.await_collection().expect(ON);
            assert!(matches!(world.collections(), [Ok(collected)] if collected.data_freed > 1));
            world.check();
        }
    }
}

/// A collection has read where leaves are, and they are freed before it reads them: none is a node of another
/// level by then.
#[test]
fn a_collection_reads_no_other_node_in_the_place_of_one_that_was_freed() {
    let mut world = World::new(at_once(1));
    let regions = 200;
    let region = 512 * LEAF;
    let volume = world.create(ByteCount::new(regions << 30)).expect(ON);
    for leaf in 0..40 {
        write(&mut world, volume, leaf * LEAF, 8);
    }
    assert_eq!(world.flush(volume).expect(ON), IoStatus::Done);
    world.idle().expect(ON);
    world.start_collection();
    // The root and the node below it.
    step_until(&mut world, |world| {
        world.collection_progress().is_some_and(|progress| progress.nodes_read == 2)
    });
    world.hold_collection(true);
    assert_eq!(world.io(volume, IoKind::Discard, 0, 40 * LEAF).expect(ON), IoStatus::Done);
    assert_eq!(world.flush(volume).expect(ON), IoStatus::Done);
    for at in 1..regions {
        write(&mut world, volume, at * region, 8);
    }
    assert_eq!(world.flush(volume).expect(ON), IoStatus::Done);
    world.hold_collection(false);
    world.await_collection().expect(ON);
    assert!(matches!(world.collections(), [Ok(_)]), "{:?}", world.collections());
    world.check();
}

/// Blocks that were given back before a collection began and whose bits are not cleared yet are nobody's
/// garbage: they would be freed twice.
#[test]
fn blocks_on_their_way_back_are_not_freed_twice() {
    let mut world = World::new(at_once(1));
    let extents = world.extents();
    let data = || {
        let all = 0..extents.extent_count();
        all.filter(|extent| extents.get(*extent) == ExtentType::Data).collect::<BTreeSet<u64>>()
    };
    // Two volumes in extents of their own, of which more is freed at once than a shard keeps.
    let mut volumes = Vec::new();
    for _ in 0..2 {
        let volume = world.create(ByteCount::new(1 << 30)).expect(ON);
        let before = data();
        for sector in (0..4 * LEAF).step_by(160) {
            write(&mut world, volume, sector, 160);
        }
        assert_eq!(world.flush(volume).expect(ON), IoStatus::Done);
        volumes.push((volume, data().difference(&before).copied().collect::<BTreeSet<u64>>()));
    }
    world.idle().expect(ON);
    let hold_bitmaps = |world: &World, of: &BTreeSet<u64>| {
        let blocks: BTreeSet<_> = of.iter().map(|extent| extent * 256).collect();
        world.disk.hold(move |op, block| op == OpKind::Write && blocks.contains(&block.get()));
    };
    // The first job of the authority hangs, the second waits behind it.
    hold_bitmaps(&world, &volumes[0].1);
    for (volume, _) in &volumes {
        let sectors = 4 * LEAF;
        assert_eq!(world.io(*volume, IoKind::Discard, 0, sectors).expect(ON), IoStatus::Done);
        assert_eq!(world.flush(*volume).expect(ON), IoStatus::Done);
    }
    steps(&mut world, 100);
    world.start_collection();
    steps(&mut world, 100);
    assert!(world.collection_progress().is_some_and(|it| it.phase == Phase::Checkpoint));
    // Now the second one hangs, and the collection reads bitmaps that it has not written.
    hold_bitmaps(&world, &volumes[1].1);
    step_until(&mut world, |world| {
        world.collection_progress().is_none_or(|progress| progress.phase == Phase::Sweep)
    });
    world.disk.release();
    world.await_collection().expect(ON);
    world.idle().expect(ON);
    world.crash(Keep::Everything); // Which asks every shard whether a block was free twice.
    world.recover();
}
