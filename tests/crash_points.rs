//! Cuts the power at the nth device write or flush, for every n, in each kind of request.
//!
//! For each scenario, cache mode, kind of disk and kind of power cut: prepare a world, stop the
//! disk after n operations of the act, cut, reopen, run the offline check, compare every sector,
//! snapshot and record with the oracle, and see that the store still works: write, flush, cut again
//! with nothing kept, compare again. Then the same with n + 1, until the act survives whole.

use bessel_mapping::format::ExtentType;
use bessel_mapping::request::{CacheMode, IoKind, IoStatus, SnapshotId, VolumeId};
use bessel_reactor::device::sim::{Keep, OpKind, Schedule};
use bessel_reactor::units::{BlockAddr, ByteCount, SECTORS_PER_BLOCK};
use bessel_tests::world::{Action, PowerCut, World, WorldConfig};

/// A volume of three levels, of a few leaves.
const SMALL: ByteCount = ByteCount::new(16 << 20);
/// A volume of three levels with more than one node in the middle.
const WIDE: ByteCount = ByteCount::new(4 << 30);
/// A volume of four levels.
const HIGH: ByteCount = ByteCount::new(600 << 30);

/// The first sector of a block.
const fn block(number: u64) -> u64 {
    number * SECTORS_PER_BLOCK
}

/// Sectors that one leaf maps, and one node of each level above it.
const LEAF: u64 = block(512);
const MIDDLE: u64 = 512 * LEAF;
const UPPER: u64 = 512 * MIDDLE;

/// No act needs more device operations than this.
const OPERATIONS_MAX: u64 = 2_000;

type Part = fn(&mut World) -> Result<(), PowerCut>;

/// What was there before, what the power goes in, and nothing else.
struct Scenario {
    prepare: Part,
    act: Part,
}

#[derive(Clone, Copy, Debug)]
struct Setting {
    volatile_cache: bool,
    cache: CacheMode,
    schedule: Schedule,
}

const SETTINGS: [Setting; 6] = {
    use CacheMode::{Writeback, Writethrough};
    const fn setting(volatile_cache: bool, cache: CacheMode, schedule: Schedule) -> Setting {
        Setting { volatile_cache, cache, schedule }
    }
    [
        setting(true, Writeback, Schedule::Fifo),
        setting(true, Writethrough, Schedule::Fifo),
        setting(false, Writeback, Schedule::Fifo),
        setting(false, Writethrough, Schedule::Fifo),
        setting(true, Writeback, Schedule::Random),
        setting(true, Writethrough, Schedule::AtOnce),
    ]
};

#[derive(Clone, Copy, Debug)]
enum Cut {
    Nothing,
    Everything,
    MetadataOnly,
    DataOnly,
    Random,
}

const CUTS: [Cut; 5] =
    [Cut::Nothing, Cut::Everything, Cut::MetadataOnly, Cut::DataOnly, Cut::Random];

impl Cut {
    fn strike(self, world: &mut World) {
        let extents = world.extents();
        let is_data = |block: BlockAddr| extents.kind_of(block) == ExtentType::Data;
        match self {
            Self::Nothing => world.crash(Keep::Nothing),
            Self::Everything => world.crash(Keep::Everything),
            Self::MetadataOnly => world.crash(Keep::Where(&|block| !is_data(block))),
            Self::DataOnly => world.crash(Keep::Where(&is_data)),
            Self::Random => world.crash(Keep::Random),
        }
    }
}

impl Scenario {
    fn at_every_operation(&self) {
        for setting in SETTINGS {
            for cut in CUTS {
                self.every_cut(setting, cut);
            }
        }
    }

    fn every_cut(&self, setting: Setting, cut: Cut) {
        for operations in 0..OPERATIONS_MAX {
            let context = || format!("{setting:?}, {cut:?} kept, after operation {operations}");
            let survived = explain(context, || self.one(setting, cut, operations));
            if survived {
                assert!(operations > 0, "the act does nothing to the device");
                return;
            }
        }
        panic!("the act still goes on after {OPERATIONS_MAX} operations");
    }

    /// True when the act ended before the power went.
    fn one(&self, setting: Setting, cut: Cut, operations: u64) -> bool {
        let mut world = World::new(WorldConfig {
            volatile_cache: setting.volatile_cache,
            schedule: setting.schedule,
            ..WorldConfig::new(operations)
        });
        // The preparation is not what is tested: let it be quick.
        world.disk.set_schedule(Schedule::AtOnce);
        (self.prepare)(&mut world).expect("the power is on");
        for volume in world.volumes() {
            let action = Action::SetCache { volume, cache: setting.cache };
            world.perform(action).expect("the power is on");
        }
        world.idle().expect("the power is on");
        world.disk.set_schedule(setting.schedule);
        world.disk.stop_after(operations);
        let outcome = (self.act)(&mut world).and_then(|()| world.idle());
        cut.strike(&mut world);
        world.recover();
        world.verify_snapshots().expect("the power is back");
        // It must not only look well.
        for volume in world.volumes() {
            world.write(volume, 3, 21).expect("the power is back");
            world.write(volume, LEAF - 8, 16).expect("the power is back");
            world.snapshot(volume).expect("the power is back");
            world.write(volume, 8, 8).expect("the power is back");
            world.flush(volume).expect("the power is back");
        }
        world.crash(Keep::Nothing);
        world.recover();
        outcome.is_ok()
    }
}

/// Adds `context` to whatever panic `body` ends in.
fn explain<T>(context: impl Fn() -> String, body: impl FnOnce() -> T) -> T {
    struct OnPanic<F: Fn() -> String>(F);
    impl<F: Fn() -> String> Drop for OnPanic<F> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("*** {}", (self.0)());
            }
        }
    }
    let _guard = OnPanic(context);
    body()
}

fn first(world: &World) -> VolumeId {
    world.volumes()[0]
}

fn last(world: &World) -> VolumeId {
    *world.volumes().last().expect("there is one")
}

fn small(world: &mut World) -> Result<(), PowerCut> {
    world.create(SMALL).map(drop)
}

fn high(world: &mut World) -> Result<(), PowerCut> {
    world.create(HIGH).map(drop)
}

/// A small volume with two blocks in its first leaf and one in its second, all durable.
fn written(world: &mut World) -> Result<(), PowerCut> {
    let volume = world.create(SMALL)?;
    world.write(volume, block(0), block(2))?;
    world.write(volume, LEAF, block(1))?;
    world.flush(volume)?;
    Ok(())
}

/// The same with a snapshot of it.
fn snapshotted(world: &mut World) -> Result<(), PowerCut> {
    written(world)?;
    world.snapshot(first(world)).map(drop)
}

/// The same with a clone of the snapshot.
fn cloned(world: &mut World) -> Result<(), PowerCut> {
    snapshotted(world)?;
    world.clone_of(snapshot(first(world), 0), "clone").map(drop)
}

const fn snapshot(volume: VolumeId, sequence: u64) -> SnapshotId {
    SnapshotId { volume, sequence }
}

fn write(world: &mut World, sector: u64, sectors: u64) -> Result<(), PowerCut> {
    world.write(first(world), sector, sectors).map(drop)
}

fn unmap(world: &mut World, kind: IoKind, sector: u64, sectors: u64) -> Result<(), PowerCut> {
    world.io(first(world), kind, sector, sectors).map(drop)
}

macro_rules! scenarios {
    ($($name:ident: $prepare:expr, $act:expr;)*) => {
        $(
            #[test]
            fn $name() {
                Scenario { prepare: $prepare, act: $act }.at_every_operation();
            }
        )*
    };
}

scenarios! {
    first_write_of_a_volume: small, |w| write(w, 0, 8);
    first_write_through_four_levels: high, |w| write(w, UPPER - 8, 16);
    first_write_in_a_leaf_that_exists: written, |w| write(w, block(5), 8);
    first_write_in_a_new_leaf: written, |w| write(w, 3 * LEAF, 8);
    first_write_in_a_new_node_of_the_middle: |w| {
        let volume = w.create(WIDE)?;
        w.write(volume, 0, 8)?;
        w.flush(volume).map(drop)
    }, |w| write(w, MIDDLE + LEAF, 8);
    write_across_two_leaves_and_their_parents: |w| w.create(WIDE).map(drop),
        |w| write(w, MIDDLE - block(2), block(4));
    overwrite_in_place: written, |w| write(w, 0, 16);
    overwrite_in_place_of_part_of_a_block: written, |w| write(w, 3, 10);
    first_write_of_part_of_a_block: written, |w| write(w, block(7) + 3, 2);
    first_writes_of_two_parts_of_one_block: written, |w| {
        let volume = first(w);
        w.start_io(volume, IoKind::Write, block(7), 3);
        w.start_io(volume, IoKind::Write, block(7) + 3, 2);
        w.start_io(volume, IoKind::Write, block(7) + 2, 4);
        w.settle()
    };
    copy_on_write_of_a_block: snapshotted, |w| write(w, 0, 8);
    copy_on_write_of_part_of_a_block: snapshotted, |w| write(w, 3, 2);
    copy_on_write_twice_in_one_leaf: snapshotted, |w| {
        write(w, 0, 8)?;
        write(w, 8, 8)
    };
    copy_on_write_of_a_second_leaf: |w| {
        snapshotted(w)?;
        write(w, 0, 8)?;
        w.flush(first(w)).map(drop)
    }, |w| write(w, LEAF, 8);
    copy_on_write_through_four_levels: |w| {
        high(w)?;
        write(w, UPPER + MIDDLE + LEAF, 8)?;
        w.snapshot(first(w)).map(drop)
    }, |w| write(w, UPPER + MIDDLE + LEAF, 3);
    discard_of_an_owned_block: written, |w| unmap(w, IoKind::Discard, 0, 8);
    discard_of_a_snapshotted_block: snapshotted, |w| unmap(w, IoKind::Discard, 0, 8);
    discard_of_whole_leaves: written, |w| unmap(w, IoKind::Discard, 0, 2 * LEAF);
    discard_of_everything_under_a_snapshot: snapshotted, |w| {
        let sectors = SMALL.sectors();
        unmap(w, IoKind::Discard, 0, sectors)
    };
    discard_with_ragged_edges: written, |w| unmap(w, IoKind::Discard, 3, LEAF);
    discard_of_a_subtree_of_the_middle: |w| {
        high(w)?;
        write(w, 0, 8)?;
        write(w, MIDDLE, 8)?;
        write(w, UPPER, 8)?;
        w.flush(first(w)).map(drop)
    }, |w| unmap(w, IoKind::Discard, 0, UPPER);
    write_zeroes_of_whole_blocks: written, |w| unmap(w, IoKind::WriteZeroes, 0, 16);
    write_zeroes_of_part_of_a_block: written, |w| unmap(w, IoKind::WriteZeroes, 3, 2);
    write_zeroes_of_part_of_a_snapshotted_block: snapshotted,
        |w| unmap(w, IoKind::WriteZeroes, 3, 8);
    a_freed_block_is_used_again: written, |w| {
        unmap(w, IoKind::Discard, 0, 8)?;
        w.flush(first(w))?;
        write(w, 2 * LEAF, block(8))?;
        w.flush(first(w)).map(drop)
    };
    flush_of_many_changes: written, |w| {
        let volume = first(w);
        for leaf in 0..6 {
            w.start_io(volume, IoKind::Write, leaf * LEAF + block(leaf), 12);
        }
        w.settle()?;
        w.flush(volume).map(drop)
    };
    two_flushes_with_writes_between: written, |w| {
        let volume = first(w);
        w.start_io(volume, IoKind::Write, block(9), 8);
        w.start_io(volume, IoKind::Flush, 0, 0);
        w.start_io(volume, IoKind::Write, block(10), 8);
        w.start_io(volume, IoKind::Flush, 0, 0);
        w.start_io(volume, IoKind::Write, block(9), 8);
        w.settle()
    };
    a_claim_takes_a_new_extent: written, |w| {
        for part in 0..5 {
            write(w, LEAF + part * 512, 512)?;
        }
        w.flush(first(w)).map(drop)
    };
    snapshot_with_nothing_changed: written, |w| w.snapshot(first(w)).map(drop);
    snapshot_of_unflushed_writes: written, |w| {
        write(w, block(3), 8)?;
        write(w, 3 * LEAF, 8)?;
        w.snapshot(first(w)).map(drop)
    };
    snapshot_with_requests_in_flight: written, |w| {
        let volume = first(w);
        w.start_io(volume, IoKind::Write, 0, 16); // In place.
        w.start_io(volume, IoKind::Write, block(5), 8); // Allocating.
        w.start_io(volume, IoKind::Write, block(6) + 2, 3); // Merging.
        w.start(Action::Snapshot { volume, label: Some("one".into()) });
        w.start_io(volume, IoKind::Write, 0, 8);
        w.start_io(volume, IoKind::Discard, 8, 8);
        w.start_io(volume, IoKind::Flush, 0, 0);
        w.settle()
    };
    two_snapshots_in_flight: written, |w| {
        let volume = first(w);
        w.start_io(volume, IoKind::Write, 0, 8);
        w.start(Action::Snapshot { volume, label: None });
        w.start_io(volume, IoKind::Write, 4, 8);
        w.start(Action::Snapshot { volume, label: None });
        w.start_io(volume, IoKind::Write, LEAF, 8);
        w.settle()
    };
    snapshot_that_needs_a_new_log_block: |w| {
        written(w)?;
        for _ in 0..24 {
            w.snapshot(first(w))?;
        }
        Ok(())
    }, |w| w.snapshot(first(w)).map(drop);
    write_after_many_snapshots: |w| {
        written(w)?;
        for round in 0..5 {
            write(w, round * 8, 8)?;
            w.snapshot(first(w))?;
        }
        Ok(())
    }, |w| write(w, 3, 40);
    create_a_volume: written, |w| w.create(HIGH).map(drop);
    clone_a_snapshot: snapshotted, |w| {
        let from = snapshot(first(w), 0);
        w.clone_of(from, "clone").map(drop)
    };
    write_to_a_clone: cloned, |w| {
        let clone = last(w);
        w.write(clone, 2, 10)?;
        w.write(clone, LEAF, 8)?;
        w.flush(clone).map(drop)
    };
    discard_on_a_clone: cloned, |w| {
        let clone = last(w);
        w.io(clone, IoKind::Discard, 0, LEAF)?;
        w.flush(clone).map(drop)
    };
    snapshot_of_a_clone: cloned, |w| {
        let clone = last(w);
        w.write(clone, 0, 8)?;
        w.snapshot(clone)?;
        w.write(clone, 0, 8).map(drop)
    };
    rollback_to_a_snapshot: |w| {
        snapshotted(w)?;
        write(w, 0, 16)?;
        write(w, 2 * LEAF, 8)?;
        w.flush(first(w)).map(drop)
    }, |w| {
        let snapshot = snapshot(first(w), 0);
        w.perform(Action::Rollback { snapshot })?;
        write(w, 0, 8)
    };
    rollback_of_unflushed_writes: |w| {
        snapshotted(w)?;
        write(w, 0, 16)
    }, |w| {
        write(w, 5, 20)?;
        let snapshot = snapshot(first(w), 0);
        w.perform(Action::Rollback { snapshot }).map(drop)
    };
    label_a_snapshot: snapshotted, |w| {
        let snapshot = snapshot(first(w), 0);
        w.perform(Action::Label { snapshot, label: Some("kept".into()) })?;
        w.perform(Action::Label { snapshot, label: None }).map(drop)
    };
    label_while_a_snapshot_is_taken: snapshotted, |w| {
        let volume = first(w);
        write(w, 0, 8)?;
        w.start(Action::Snapshot { volume, label: Some("new".into()) });
        w.start(Action::Label { snapshot: snapshot(volume, 0), label: Some("old".into()) });
        w.settle()
    };
    delete_a_snapshot: snapshotted, |w| {
        let snapshot = snapshot(first(w), 0);
        w.perform(Action::DeleteSnapshot { snapshot }).map(drop)
    };
    delete_a_volume: cloned, |w| {
        let volume = first(w);
        w.perform(Action::Delete { volume }).map(drop)
    };
    rename_a_volume: written, |w| {
        let volume = first(w);
        w.perform(Action::Rename { volume, name: "other".into() }).map(drop)
    };
    grow_a_volume: written, |w| {
        let volume = first(w);
        w.perform(Action::Grow { volume, size: ByteCount::new(20 << 20) })?;
        write(w, SMALL.sectors(), 8)
    };
    grow_a_volume_by_a_level: written, |w| {
        let volume = first(w);
        write(w, block(3), 8)?;
        w.perform(Action::Grow { volume, size: HIGH })?;
        write(w, UPPER, 8)
    };
    switch_to_writethrough_and_back: written, |w| {
        let volume = first(w);
        write(w, block(3), 8)?;
        w.perform(Action::SetCache { volume, cache: CacheMode::Writethrough })?;
        write(w, block(4), 8)?;
        w.perform(Action::SetCache { volume, cache: CacheMode::Writeback }).map(drop)
    };
    orderly_shutdown: snapshotted, |w| {
        write(w, 0, 20)?;
        write(w, 3 * LEAF, 8)?;
        w.shut_down()?;
        w.recover();
        Ok(())
    };
}

/// A hole below a node that a clone shares with its origin: whose rounds would it wait for?
#[test]
fn zeroing_a_shared_hole_completes_in_a_writethrough_clone() {
    let mut world = World::new(WorldConfig { schedule: Schedule::AtOnce, ..WorldConfig::new(1) });
    let origin = world.create(ByteCount::new(1 << 30)).unwrap();
    for block in 0..8 {
        assert_eq!(world.write(origin, block * 8, 8).unwrap(), IoStatus::Done);
        assert_eq!(world.flush(origin).unwrap(), IoStatus::Done);
    }
    let snapshot = world.snapshot(origin).unwrap();
    let clone = world.clone_of(snapshot, "clone").unwrap().expect("the snapshot has settled");
    let cache = CacheMode::Writethrough;
    world.perform(Action::SetCache { volume: clone, cache }).unwrap();
    assert_eq!(world.io(clone, IoKind::WriteZeroes, 800, 8).unwrap(), IoStatus::Done);
}

/// A discard of shared blocks took hardly any room; making it again must not take more, nor more
/// frames than there are.
#[test]
fn a_large_shared_discard_is_restored_by_the_links_that_made_it() {
    let mut world = World::new(WorldConfig {
        schedule: Schedule::AtOnce,
        node_cache: ByteCount::new(0),
        capacity: ByteCount::new(64 << 20),
        ..WorldConfig::new(1)
    });
    let leaf_sectors = 512 * SECTORS_PER_BLOCK;
    let volume = world.create(ByteCount::new(1 << 30)).unwrap();
    for leaf in 0..400 {
        assert_eq!(world.write(volume, leaf * leaf_sectors, 8).unwrap(), IoStatus::Done);
    }
    world.snapshot(volume).unwrap();
    let sectors = ByteCount::new(1 << 30).sectors();
    assert_eq!(world.io(volume, IoKind::Discard, 0, sectors).unwrap(), IoStatus::Done);
    assert_eq!(world.write(volume, 0, 8).unwrap(), IoStatus::Done);
    world.kill();
    world.recover();
    let allocated = world.show(volume).unwrap().blocks_allocated;
    assert!(allocated < 16, "{allocated} blocks for a hole and one block");
}

/// A node that takes its time from the device keeps nobody waiting but who needs it.
#[test]
fn a_miss_in_the_node_cache_stalls_no_other_request() {
    let mut world = World::new(WorldConfig {
        schedule: Schedule::AtOnce,
        node_cache: ByteCount::new(0),
        capacity: ByteCount::new(64 << 20),
        ..WorldConfig::new(1)
    });
    let leaf_sectors = 512 * SECTORS_PER_BLOCK;
    let volume = world.create(ByteCount::new(1 << 30)).unwrap();
    for leaf in 0..400 {
        assert_eq!(world.write(volume, leaf * leaf_sectors, 8).unwrap(), IoStatus::Done);
    }
    assert_eq!(world.flush(volume).unwrap(), IoStatus::Done);
    let extents = world.extents();
    world.disk.hold(move |kind, block| {
        kind == OpKind::Read && extents.kind_of(block) == ExtentType::Metadata
    });
    let missing = world.start_io(volume, IoKind::Read, 0, 8);
    for _ in 0..10 {
        assert_eq!(world.read(volume, 399 * leaf_sectors, 8).unwrap(), IoStatus::Done);
        assert_eq!(world.write(volume, 399 * leaf_sectors, 8).unwrap(), IoStatus::Done);
    }
    assert!(!world.has_ended(missing), "its leaf has long been evicted");
    world.disk.release();
    world.wait(missing).unwrap();
}
