//! Walks over several trees: where two differ, and what only one holds, which is freed when it is
//! deleted. Against what a walk of each tree by itself, and the offline check, find.

use std::collections::BTreeMap;
use std::time::Duration;

use bessel_mapping::check::{self, CheckReport};
use bessel_mapping::forest::TreeId;
use bessel_mapping::format::ExtentType;
use bessel_mapping::request::{IoKind, IoStatus, SnapshotId, SnapshotInfo, VolumeId};
use bessel_mapping::store::{self, OpenMode};
use bessel_mapping::walk::{Change, ChangeKind, Space};
use bessel_reactor::device::sim::{Keep, OpKind, Random, Schedule};
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr, ByteCount, SECTORS_PER_BLOCK};
use bessel_tests::world::{Action, World, WorldConfig};

/// Sectors that one leaf maps, and one node of each level above it.
const LEAF: u64 = 512 * SECTORS_PER_BLOCK;
const MIDDLE: u64 = 512 * LEAF;
const ON: &str = "the power is on";

fn at_once(seed: u64) -> WorldConfig {
    let capacity = ByteCount::new(64 << 20);
    WorldConfig { schedule: Schedule::AtOnce, capacity, ..WorldConfig::new(seed) }
}

fn write(world: &mut World, volume: VolumeId, sector: u64, sectors: u64) {
    assert_eq!(world.write(volume, sector, sectors).expect(ON), IoStatus::Done);
}

fn snapshot(world: &mut World, volume: VolumeId) -> SnapshotInfo {
    let id = world.snapshot(volume).expect(ON);
    world.snapshots(volume).expect(ON)[id.sequence as usize].clone()
}

fn steps(world: &mut World, count: usize) {
    for _ in 0..count {
        world.step();
    }
}

/// Goes on until `found` has something.
fn step_until<T>(world: &mut World, found: impl Fn(&World) -> Option<T>) -> T {
    for _ in 0..10_000 {
        if let Some(found) = found(world) {
            return found;
        }
        world.step();
    }
    panic!("it never comes");
}

/// Where a volume's record lies: its two slots.
fn places_of_record(world: &World, volume: VolumeId) -> [BlockAddr; 2] {
    let disk = world.disk.fork(1);
    let store = store::open(&mut disk.connect(), OpenMode::ReadOnly).expect("it opens");
    let slot = store.directory.entry(volume).expect("it is whole").slot;
    [0, 1].map(|generation| store.geometry.registry_slot(slot, generation))
}

/// What a tree maps, by volume block.
fn content(changes: &[Change]) -> BTreeMap<u64, u64> {
    let mut mapped = BTreeMap::new();
    for change in changes {
        let ChangeKind::Data(home) = change.now else { panic!("a hole is no change to nothing") };
        for at in 0..change.blocks {
            mapped.insert(change.first.get() + at, home.get() + at);
        }
    }
    mapped
}

/// Blocks in which two maps differ, with what the second has there.
fn compare(before: &BTreeMap<u64, u64>, after: &BTreeMap<u64, u64>) -> BTreeMap<u64, Option<u64>> {
    let all = before.keys().chain(after.keys());
    let differs = all.filter(|block| before.get(block) != after.get(block));
    differs.map(|block| (*block, after.get(block).copied())).collect()
}

#[test]
fn a_diff_is_what_whole_walks_of_both_trees_say() {
    for seed in 0..6 {
        let mut world = World::new(at_once(seed));
        let mut random = Random::new(seed);
        let volume = world.create(ByteCount::new(8 << 30)).expect(ON);
        let mut taken = Vec::new();
        for round in 0..8 {
            for _ in 0..random.below(12) {
                let place = *random.pick(&[0, LEAF, MIDDLE - 4 * LEAF, MIDDLE, 3 * MIDDLE]);
                let sector = place + random.below(20) * SECTORS_PER_BLOCK;
                match random.below(4) {
                    0 => assert_eq!(
                        world.io(volume, IoKind::Discard, sector, 48).expect(ON),
                        IoStatus::Done
                    ),
                    1 if round > 2 => assert_eq!(
                        world.io(volume, IoKind::Discard, 0, 3 * LEAF).expect(ON),
                        IoStatus::Done
                    ),
                    _ => write(&mut world, volume, sector, 8 * (1 + random.below(5))),
                }
            }
            if round == 4 {
                // Four levels from here on.
                let size = ByteCount::new(700 << 30);
                world.perform(Action::Grow { volume, size }).expect(ON);
                write(&mut world, volume, 600 << 21, 16);
            }
            taken.push(snapshot(&mut world, volume));
        }
        let whole: Vec<_> = taken.iter().map(|it| content(&world.changes(None, it).0)).collect();
        assert!(whole.iter().all(|content| !content.is_empty()) || seed > 0);
        for (from, before) in taken.iter().zip(&whole) {
            for (to, after) in taken.iter().zip(&whole) {
                let (changes, _) = world.changes(Some(from), to);
                let in_order = changes.is_sorted_by(|one, next| {
                    one.first.add(one.blocks) <= next.first && one.blocks > 0
                });
                assert!(in_order, "{changes:?}");
                let mut found = BTreeMap::new();
                for change in &changes {
                    for at in 0..change.blocks {
                        let now = match change.now {
                            ChangeKind::Data(home) => Some(home.get() + at),
                            ChangeKind::Hole => None,
                        };
                        found.insert(change.first.get() + at, now);
                    }
                }
                assert_eq!(found, compare(before, after), "{} to {}", from.id, to.id);
            }
        }
    }
}

/// However much the volume holds, as many nodes are read as lie on the way to what differs.
#[test]
fn a_diff_costs_what_differs_and_not_what_there_is() {
    for leaves in [2, 40, 400] {
        let mut world = World::new(at_once(leaves));
        let volume = world.create(ByteCount::new(4 << 30)).expect(ON);
        for leaf in 0..leaves {
            write(&mut world, volume, leaf * LEAF, 8);
        }
        let before = snapshot(&mut world, volume);
        let (none, read) = world.changes(Some(&before), &before);
        assert_eq!((none, read), (Vec::new(), 0), "with itself");
        write(&mut world, volume, 0, 8);
        write(&mut world, volume, LEAF + 80, 8);
        let after = snapshot(&mut world, volume);
        let (changes, read) = world.changes(Some(&before), &after);
        assert_eq!(changes.len(), 2);
        // Root, middle and two leaves, of each.
        assert_eq!(read, 8, "{leaves} leaves");
        let (whole, all) = world.changes(None, &after);
        assert_eq!(content(&whole).len() as u64, leaves + 1);
        assert_eq!(all, 2 + leaves);
    }
}

fn reachable(report: &CheckReport) -> u64 {
    report.data.reachable + report.metadata.reachable
}

fn leaked(report: &CheckReport) -> u64 {
    report.data.leaked + report.metadata.leaked
}

/// A world of snapshots, rollbacks and clones with snapshots of their own, and all snapshots.
fn forest(seed: u64, config: WorldConfig) -> (World, Vec<SnapshotId>) {
    let mut world = World::new(config);
    let mut random = Random::new(seed);
    let first = world.create(ByteCount::new(4 << 30)).expect(ON);
    let mut volumes = vec![first];
    let mut taken = Vec::new();
    for _ in 0..14 {
        let volume = *random.pick(&volumes);
        for _ in 0..random.below(6) {
            let place = *random.pick(&[0, LEAF, MIDDLE, MIDDLE + 7 * LEAF]);
            let sector = place + random.below(9) * SECTORS_PER_BLOCK;
            if random.chance(1, 5) {
                let done = world.io(volume, IoKind::Discard, sector, 40).expect(ON);
                assert_eq!(done, IoStatus::Done);
            } else {
                write(&mut world, volume, sector, 8 * (1 + random.below(4)));
            }
        }
        match random.below(6) {
            0 if !taken.is_empty() && volumes.len() < 4 => {
                let origin = *random.pick(&taken);
                let name = world.fresh_name();
                volumes.extend(world.clone_of(origin, &name).expect(ON));
            }
            1 => {
                let own: Vec<_> = taken.iter().filter(|it| it.volume == volume).copied().collect();
                if !own.is_empty() {
                    let snapshot = *random.pick(&own);
                    world.perform(Action::Rollback { snapshot }).expect(ON);
                    let sequence = world.show(volume).expect(ON).log.taken - 1;
                    taken.push(SnapshotId { volume, sequence });
                }
            }
            _ => taken.push(world.snapshot(volume).expect(ON)),
        }
    }
    for volume in volumes {
        assert_eq!(world.flush(volume).expect(ON), IoStatus::Done);
    }
    world.idle().expect(ON);
    random.shuffle(&mut taken);
    (world, taken)
}

/// In a quiet store, whatever is deleted in whatever order: what is freed is what nothing reaches any
/// more, all of it.
#[test]
fn each_deletion_frees_exactly_what_nothing_else_holds() {
    for seed in 0..25 {
        let shards = 1 + seed as usize % 3;
        let (mut world, taken) = forest(seed, WorldConfig { shards, ..at_once(seed) });
        let mut before = world.check();
        let mut freed = world.reclaimed().0;
        let mut something = false;
        for snapshot in taken {
            world.perform(Action::DeleteSnapshot { snapshot }).expect(ON);
            world.reclaim_all().expect(ON);
            world.idle().expect(ON);
            let after = world.check();
            let now = world.reclaimed().0;
            let expected = reachable(&before) - reachable(&after);
            let found = (now.get() - freed.get()) / BLOCK_SIZE;
            assert_eq!(found, expected, "seed {seed}: {snapshot}");
            assert_eq!(leaked(&after), leaked(&before), "seed {seed}: {snapshot} leaks");
            something |= found > 3;
            (before, freed) = (after, now);
        }
        assert!(something, "seed {seed}: nothing was freed");
        world.shut_down().expect(ON);
        assert_eq!(leaked(&world.check()), 0, "seed {seed}");
        world.recover();
        world.verify_snapshots().expect(ON);
    }
}

/// The same with all deleted at once: one after the other is done.
#[test]
fn a_deletion_of_everything_at_once_leaks_nothing() {
    for seed in 0..25 {
        let (mut world, taken) = forest(seed, at_once(seed));
        for snapshot in taken {
            world.start(Action::DeleteSnapshot { snapshot });
        }
        world.reclaim_all().expect(ON);
        world.idle().expect(ON);
        world.shut_down().expect(ON);
        assert_eq!(leaked(&world.check()), 0, "seed {seed}");
        world.recover();
    }
}

/// A volume with a snapshot of a block, and the snapshot.
fn shared(config: WorldConfig) -> (World, VolumeId, SnapshotId) {
    let mut world = World::new(config);
    let volume = world.create(ByteCount::new(1 << 30)).expect(ON);
    write(&mut world, volume, 0, 24);
    let snapshot = world.snapshot(volume).expect(ON);
    world.idle().expect(ON);
    (world, volume, snapshot)
}

/// A read has looked the snapshot's block up and waits for the device; meanwhile the block is replaced
/// and the snapshot deleted.
#[test]
fn blocks_wait_for_requests_that_read_them() {
    for seed in 0..5 {
        let (mut world, volume, snapshot) = shared(at_once(seed));
        let extents = world.extents();
        world
            .disk
            .hold(move |op, block| op == OpKind::Read && extents.holds(block, ExtentType::Data));
        let read = world.start_io(volume, IoKind::Read, 0, 8);
        steps(&mut world, 20);
        write(&mut world, volume, 0, 24);
        assert_eq!(world.flush(volume).expect(ON), IoStatus::Done);
        world.perform(Action::DeleteSnapshot { snapshot }).expect(ON);
        steps(&mut world, 500);
        assert!(!world.has_ended(read), "the device holds it back");
        assert_eq!(world.reclaimed().1, 0, "and the block with it");
        world.disk.release();
        world.wait(read).expect(ON);
        world.reclaim_all().expect(ON);
        assert_eq!(world.reclaimed().1, 1);
        world.read(volume, 0, 24).expect(ON);
    }
}

/// A clone's commit has written a node and waits for the flush behind it: a power cut would bring the
/// old node back, with its link to a block of the snapshot, while the bitmap says that it is free.
#[test]
fn blocks_wait_until_it_is_durable_that_nothing_leads_to_them() {
    for power_fails in [true, false] {
        let (mut world, volume, snapshot) = shared(at_once(1));
        let clone = world.clone_of(snapshot, "clone").expect(ON).expect("there is room");
        // The clone's own copies of the path, linked; then one more block of it changes in place.
        write(&mut world, clone, 8, 8);
        assert_eq!(world.flush(clone).expect(ON), IoStatus::Done);
        write(&mut world, volume, 0, 24);
        assert_eq!(world.flush(volume).expect(ON), IoStatus::Done);

        // The clone commits in the background: no request waits for that round. The write of its leaf
        // is in flight.
        let extents = world.extents();
        world.disk.hold(move |op, block| {
            op == OpKind::Write && extents.holds(block, ExtentType::Metadata)
        });
        write(&mut world, clone, 0, 8);
        world.pass(Duration::from_secs(1));
        let leaf = step_until(&mut world, |world| {
            let mut flying = world.disk.flying().into_iter();
            flying.find(|op| op.kind == OpKind::Write).map(|op| op.block)
        });
        let before = world.disk.peek(leaf);
        // So no flush of the deletion covers it, of which the last one is under way when it lands.
        world.disk.hold(move |_, block| block == leaf);
        let places = places_of_record(&world, volume);
        let record = places.map(|place| world.disk.peek(place));
        let delete = world.start(Action::DeleteSnapshot { snapshot });
        step_until(&mut world, |world| {
            (places.map(|place| world.disk.peek(place)) != record).then_some(())
        });
        world.disk.hold(|op, _| op == OpKind::Flush);
        step_until(&mut world, |world| (world.disk.peek(leaf) != before).then_some(()));
        world.disk.release();
        step_until(&mut world, |world| world.has_ended(delete).then_some(()));
        world.disk.hold(|op, _| op == OpKind::Flush);
        steps(&mut world, 500);

        if power_fails {
            // What bitmaps say is kept, the leaf is not.
            world.crash_keeping_bitmaps();
            world.recover();
        } else {
            assert_eq!(world.reclaimed().1, 0);
            world.disk.release();
            world.reclaim_all().expect(ON);
            assert_eq!(world.reclaimed().1, 1);
            world.idle().expect(ON);
            world.check();
        }
    }
}

/// Its nodes' blocks become other nodes.
#[test]
fn freed_nodes_are_remembered_by_nobody() {
    for seed in 0..3 {
        let (mut world, volume, snapshot) = shared(at_once(seed));
        for leaf in 0..30 {
            write(&mut world, volume, leaf * LEAF, 8);
        }
        let second = world.snapshot(volume).expect(ON);
        for leaf in 0..30 {
            write(&mut world, volume, leaf * LEAF, 8);
        }
        assert_eq!(world.flush(volume).expect(ON), IoStatus::Done);
        for snapshot in [snapshot, second] {
            world.perform(Action::DeleteSnapshot { snapshot }).expect(ON);
        }
        world.reclaim_all().expect(ON);
        assert!(world.reclaimed().0 > ByteCount::from_blocks(60));
        world.idle().expect(ON);
        // New nodes until those blocks are among them.
        for leaf in 30..450 {
            write(&mut world, volume, leaf * LEAF, 8);
        }
        world.idle().expect(ON);
        world.crash(Keep::Nothing); // Which asks every shard.
        world.recover();
    }
}

/// The record before the last one may name the deleted tree as the current one, and counts when the
/// last one is lost.
#[test]
fn a_lost_record_brings_no_freed_tree_back() {
    let (mut world, volume, snapshot) = shared(at_once(1));
    write(&mut world, volume, 0, 24);
    assert_eq!(world.flush(volume).expect(ON), IoStatus::Done);
    world.perform(Action::DeleteSnapshot { snapshot }).expect(ON);
    world.reclaim_all().expect(ON);
    assert_eq!(world.reclaimed().1, 1);
    world.idle().expect(ON);
    let disk = world.disk.fork(1);
    let open = || store::open(&mut disk.connect(), OpenMode::ReadOnly).expect("it opens");
    let entry = open().directory.entry(volume).expect("it is whole").clone();
    let place = open().geometry.registry_slot(entry.slot, entry.record.generation);
    let mut bytes = disk.peek(place);
    bytes[40] ^= 1;
    disk.poke(place, &bytes);
    assert_eq!(
        open().directory.entry(volume).expect("the older one is").record.root,
        entry.record.root
    );
    let report = check::check(&mut disk.connect(), &mut |_, _| ()).expect("it opens");
    // The lost record itself is told, and nothing else is wrong.
    let other = report.findings.iter().find(|it| it.structure != check::Structure::Record);
    assert_eq!(other, None);
}

/// What all take together is what the check counts; what one alone holds is what its deletion frees;
/// what one refers to is what a walk of it alone finds.
#[test]
fn spaces_add_up_to_what_the_check_counts() {
    for seed in 0..15 {
        let (mut world, taken) = forest(seed, at_once(seed));
        for snapshot in taken {
            let volumes = world.volumes();
            let (spaces, total) = world.space(&volumes);
            let report = world.check();
            assert_eq!(total.data, report.data.reachable, "seed {seed}");
            let logs: usize = volumes
                .iter()
                .map(|id| world.show(*id).expect(ON).log.taken.div_ceil(24) as usize)
                .sum();
            assert_eq!(total.nodes + logs as u64, report.metadata.reachable, "seed {seed}");
            for (id, space) in &spaces {
                if let TreeId::Snapshot(id) = id {
                    let info = world.snapshots(id.volume).expect(ON)[id.sequence as usize].clone();
                    let (changes, nodes) = world.changes(None, &info);
                    let data = content(&changes).len() as u64;
                    assert_eq!((space.refers.data, space.refers.nodes), (data, nodes), "{id}");
                }
                let Space { data, nodes } = space.alone;
                assert!(data <= space.refers.data && nodes <= space.refers.nodes, "{id:?}");
            }
            let (_, mine) =
                spaces.iter().find(|(id, _)| *id == TreeId::Snapshot(snapshot)).unwrap();
            let before = world.reclaimed().0;
            world.perform(Action::DeleteSnapshot { snapshot }).expect(ON);
            world.reclaim_all().expect(ON);
            world.idle().expect(ON);
            let freed = (world.reclaimed().0.get() - before.get()) / BLOCK_SIZE;
            assert_eq!(mine.alone.data + mine.alone.nodes, freed, "seed {seed}: {snapshot}");
        }
    }
}
