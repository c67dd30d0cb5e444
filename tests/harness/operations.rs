//! The named operations of the exhaustive loops: first writes, copies on write and merges at each
//! level, unmapping, flushes, claims, snapshots, and all that changes a record.
//!
//! Each has what was there before and what is done. What is done works in any world, also in one
//! that other operations have left behind or whose device fails, so that sequences can be made of
//! them: an operation that finds nothing to work on does nothing.

use std::time::Duration;

use bessel_mapping::request::{CacheMode, IoKind, Reply, SnapshotId, VolumeId};
use bessel_mapping::schedule::{Keep, Schedule};
use bessel_reactor::units::{ByteCount, SECTORS_PER_BLOCK};

use crate::world::{Action, PowerCut, World};

/// A volume of three levels, of a few leaves.
pub const SMALL: ByteCount = ByteCount::new(16 << 20);
/// A volume of three levels with more than one node in the middle.
pub const WIDE: ByteCount = ByteCount::new(4 << 30);
/// A volume of four levels.
pub const HIGH: ByteCount = ByteCount::new(600 << 30);

/// The first sector of a block.
pub const fn block(number: u64) -> u64 {
    number * SECTORS_PER_BLOCK
}

/// Sectors that one leaf maps, and one node of each level above it.
pub const LEAF: u64 = block(512);
/// See [`LEAF`].
pub const MIDDLE: u64 = 512 * LEAF;
/// See [`LEAF`].
pub const UPPER: u64 = 512 * MIDDLE;

/// Makes what is there before an operation. The power is on and the device works.
pub type Prepare = fn(&mut World) -> Result<(), PowerCut>;

/// What is done.
pub type Act = fn(&mut Actor<'_>) -> Result<(), PowerCut>;

/// One of [`OPERATIONS`].
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    /// What it is about, unique.
    pub name: &'static str,
    /// What is there before.
    pub prepare: Prepare,
    /// What is done.
    pub act: Act,
    /// Not done, to another world, by any other operation: worth a place in a sequence.
    pub in_sequences: bool,
}

/// The operation of this name.
///
/// # Panics
/// When there is none.
pub fn operation(name: &str) -> &'static Operation {
    let found = OPERATIONS.iter().find(|operation| operation.name == name);
    found.unwrap_or_else(|| panic!("there is no operation {name:?}"))
}

/// Whether an [`Actor`] waits for each thing it starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pace {
    /// Each step ends before the next begins.
    InTurn,
    /// Each step begins at once, whatever is still under way, unless it cannot be asked for then.
    AtOnce,
}

/// Who does an operation. It works on the world's first volume, or on the last one, the clone.
pub struct Actor<'w> {
    /// Where.
    pub world: &'w mut World,
    pace: Pace,
}

impl<'w> Actor<'w> {
    /// Somebody who acts in `world`.
    pub fn new(world: &'w mut World, pace: Pace) -> Self {
        Self { world, pace }
    }

    fn first(&self) -> Option<VolumeId> {
        self.world.volumes().first().copied()
    }

    fn last(&self) -> Option<VolumeId> {
        self.world.volumes().last().copied()
    }

    /// The volume that is being made.
    fn unpublished(&self) -> Option<VolumeId> {
        self.world.unpublished().last().copied()
    }

    /// The oldest snapshot of the first volume.
    fn oldest(&self) -> Option<SnapshotId> {
        let volume = self.first()?;
        let sequence = *self.world.model.snapshots(volume).first()?;
        Some(SnapshotId { volume, sequence })
    }

    /// The newest snapshot of the last volume.
    fn last_snapshot(&self) -> Option<SnapshotId> {
        let volume = self.last()?;
        let sequence = *self.world.model.snapshots(volume).last()?;
        Some(SnapshotId { volume, sequence })
    }

    /// Starts a request, if the volume is large enough for it.
    fn start_in(&mut self, volume: Option<VolumeId>, kind: IoKind, sector: u64, sectors: u64) {
        if let Some(volume) = volume
            && sector + sectors <= self.world.size(volume).sectors()
        {
            self.world.start_io(volume, kind, sector, sectors);
        }
    }

    fn pause(&mut self) -> Result<(), PowerCut> {
        match self.pace {
            Pace::InTurn => self.world.settle(),
            Pace::AtOnce => Ok(()),
        }
    }

    fn io_in(
        &mut self,
        volume: Option<VolumeId>,
        kind: IoKind,
        sector: u64,
        sectors: u64,
    ) -> Result<(), PowerCut> {
        self.start_in(volume, kind, sector, sectors);
        self.pause()
    }

    fn start(&mut self, kind: IoKind, sector: u64, sectors: u64) {
        self.start_in(self.first(), kind, sector, sectors);
    }

    fn io(&mut self, kind: IoKind, sector: u64, sectors: u64) -> Result<(), PowerCut> {
        self.io_in(self.first(), kind, sector, sectors)
    }

    fn write(&mut self, sector: u64, sectors: u64) -> Result<(), PowerCut> {
        self.io(IoKind::Write, sector, sectors)
    }

    fn flush(&mut self) -> Result<(), PowerCut> {
        self.io(IoKind::Flush, 0, 0)
    }

    fn ask(&mut self, action: Action) -> Result<(), PowerCut> {
        self.world.start(action);
        self.pause()
    }

    /// For what is refused while the volume is in use.
    fn ask_alone(&mut self, action: impl FnOnce(&Self) -> Option<Action>) -> Result<(), PowerCut> {
        self.world.settle()?;
        match action(self) {
            Some(action) => self.ask(action),
            None => Ok(()),
        }
    }

    fn snapshot(&mut self, volume: Option<VolumeId>) -> Result<(), PowerCut> {
        let label = Some(self.world.fresh_name());
        match volume {
            Some(volume) => self.ask(Action::Snapshot { volume, label }),
            None => Ok(()),
        }
    }

    fn grow(&mut self, size: impl FnOnce(ByteCount) -> ByteCount) -> Result<(), PowerCut> {
        // Alone, because a volume that is growing already cannot shrink back to what it is asked.
        self.ask_alone(|actor| {
            let volume = actor.first()?;
            Some(Action::Grow { volume, size: size(actor.world.size(volume)) })
        })
    }

    fn set_cache(&mut self, cache: CacheMode) -> Result<(), PowerCut> {
        match self.first() {
            Some(volume) => self.ask(Action::SetCache { volume, cache }),
            None => Ok(()),
        }
    }

    /// Moves the first volume to the next shard. With one shard it is handed over and taken back.
    fn move_on(&mut self) -> Result<(), PowerCut> {
        let Some(volume) = self.first() else { return Ok(()) };
        let target = (self.world.home(volume) + 1) % self.world.shard_count();
        self.world.start_move(volume, target)?;
        self.pause()
    }

    fn clone_oldest(&mut self) -> Result<(), PowerCut> {
        let name = self.world.fresh_name();
        match self.oldest() {
            Some(snapshot) => self.world.clone_of(snapshot, &name).map(drop),
            None => Ok(()),
        }
    }
}

fn small(world: &mut World) -> Result<(), PowerCut> {
    world.create(SMALL).map(drop)
}

fn wide(world: &mut World) -> Result<(), PowerCut> {
    world.create(WIDE).map(drop)
}

fn high(world: &mut World) -> Result<(), PowerCut> {
    world.create(HIGH).map(drop)
}

fn first(world: &World) -> VolumeId {
    world.volumes()[0]
}

fn write(world: &mut World, sector: u64, sectors: u64) -> Result<(), PowerCut> {
    world.write(first(world), sector, sectors).map(drop)
}

fn flush(world: &mut World) -> Result<(), PowerCut> {
    world.flush(first(world)).map(drop)
}

/// Two blocks in the volume's first leaf and one in its second, all durable.
fn fill(world: &mut World) -> Result<(), PowerCut> {
    write(world, block(0), block(2))?;
    write(world, LEAF, block(1))?;
    flush(world)
}

/// A small volume with something in it.
fn written(world: &mut World) -> Result<(), PowerCut> {
    small(world)?;
    fill(world)
}

/// The same with a snapshot of it.
fn snapshotted(world: &mut World) -> Result<(), PowerCut> {
    written(world)?;
    world.snapshot(first(world)).map(drop)
}

fn clone_first(world: &mut World) -> Result<(), PowerCut> {
    let snapshot = SnapshotId { volume: first(world), sequence: 0 };
    let name = world.fresh_name();
    world.clone_of(snapshot, &name).map(drop)
}

/// The same with a clone of the snapshot.
fn cloned(world: &mut World) -> Result<(), PowerCut> {
    snapshotted(world)?;
    clone_first(world)
}

/// Four levels with something at both ends of each, and a snapshot.
fn high_snapshotted(world: &mut World) -> Result<(), PowerCut> {
    high(world)?;
    for sector in [0, LEAF, MIDDLE, UPPER, UPPER + MIDDLE + LEAF] {
        write(world, sector, 8)?;
    }
    world.snapshot(first(world)).map(drop)
}

/// What sequences begin with: two nodes in the middle, a snapshot and a clone of it, blocks that
/// are shared and blocks that are not, and something that is not durable yet.
pub fn everything(world: &mut World) -> Result<(), PowerCut> {
    wide(world)?;
    fill(world)?;
    write(world, MIDDLE, 8)?;
    world.snapshot(first(world))?;
    clone_first(world)?;
    write(world, block(1), 8)?;
    write(world, 2 * LEAF, block(2))?;
    flush(world)?;
    write(world, block(6), 8)
}

macro_rules! operations {
    ($($name:ident $(($in_sequences:literal))?: $prepare:expr, $act:expr;)*) => {
        /// Every named operation.
        pub const OPERATIONS: &[Operation] = &[$(
            Operation {
                name: stringify!($name),
                prepare: $prepare,
                act: $act,
                in_sequences: operations!(@ $($in_sequences)?),
            },
        )*];

        /// Calls a macro with the names of all operations, for a test of each.
        #[macro_export]
        macro_rules! for_each_operation {
            ($callback:ident) => {
                $callback! { $($name)* }
            };
        }
    };
    (@ $in_sequences:literal) => { $in_sequences };
    (@) => { true };
}

use IoKind::{Discard, Flush, Write, WriteZeroes};

// `(false)`: it differs from another one by what was there before only.
operations! {
    first_write_of_a_volume: small, |a| a.write(0, 8);
    first_write_through_four_levels(false): high, |a| a.write(UPPER - 8, 16);
    first_write_in_a_leaf_that_exists: written, |a| a.write(block(5), 8);
    first_write_in_a_new_leaf: written, |a| a.write(3 * LEAF, 8);
    first_write_in_a_new_node_of_the_middle: |w| {
        wide(w)?;
        write(w, 0, 8)?;
        flush(w)
    }, |a| a.write(MIDDLE + LEAF, 8);
    first_write_in_a_new_node_of_the_third_level(false): |w| {
        high(w)?;
        write(w, 0, 8)?;
        flush(w)
    }, |a| a.write(UPPER + MIDDLE, 8);
    write_across_two_leaves_and_their_parents: wide, |a| a.write(MIDDLE - block(2), block(4));
    overwrite_in_place(false): written, |a| a.write(0, 16);
    overwrite_in_place_of_part_of_a_block: written, |a| a.write(3, 10);
    first_write_of_part_of_a_block: written, |a| a.write(block(7) + 3, 2);
    first_write_of_part_of_a_block_that_was_discarded(false): |w| {
        written(w)?;
        w.io(first(w), Discard, 0, 8)?;
        flush(w)
    }, |a| a.write(3, 2);
    first_write_of_part_of_a_zeroed_block(false): |w| {
        written(w)?;
        w.io(first(w), WriteZeroes, 0, 8)?;
        flush(w)
    }, |a| a.write(3, 2);
    first_writes_of_two_parts_of_one_block: written, |a| {
        a.start(Write, block(7), 3);
        a.start(Write, block(7) + 3, 2);
        a.start(Write, block(7) + 2, 4);
        a.pause()
    };
    copy_on_write_of_a_block(false): snapshotted, |a| a.write(0, 8);
    copy_on_write_of_part_of_a_block(false): snapshotted, |a| a.write(3, 2);
    copy_on_write_of_two_parts_of_one_block(false): snapshotted, |a| {
        a.start(Write, 1, 2);
        a.start(Write, 4, 2);
        a.start(Write, 2, 3);
        a.pause()
    };
    copy_on_write_twice_in_one_leaf: snapshotted, |a| {
        a.write(0, 8)?;
        a.write(8, 8)
    };
    copy_on_write_in_a_leaf_that_is_copied(false): |w| {
        snapshotted(w)?;
        write(w, 0, 8)?;
        flush(w)
    }, |a| a.write(8, 8);
    copy_on_write_of_a_second_leaf: |w| {
        snapshotted(w)?;
        write(w, 0, 8)?;
        flush(w)
    }, |a| a.write(LEAF, 8);
    copy_on_write_of_a_node_of_the_middle: |w| {
        high_snapshotted(w)?;
        write(w, 0, 8)?;
        flush(w)
    }, |a| a.write(MIDDLE, 8);
    copy_on_write_of_a_node_of_the_third_level(false): |w| {
        high_snapshotted(w)?;
        write(w, 0, 8)?;
        flush(w)
    }, |a| a.write(UPPER, 8);
    copy_on_write_through_four_levels(false): high_snapshotted,
        |a| a.write(UPPER + MIDDLE + LEAF, 3);
    discard_of_an_owned_block: written, |a| a.io(Discard, 0, 8);
    discard_of_a_snapshotted_block(false): snapshotted, |a| a.io(Discard, 0, 8);
    discard_of_whole_leaves: written, |a| a.io(Discard, 0, 2 * LEAF);
    discard_of_everything_under_a_snapshot: snapshotted, |a| {
        let sectors = a.first().map_or(0, |volume| a.world.size(volume).sectors());
        a.io(Discard, 0, sectors)
    };
    discard_with_ragged_edges: written, |a| a.io(Discard, 3, LEAF);
    discard_of_a_subtree_of_the_middle(false): high_snapshotted, |a| a.io(Discard, 0, UPPER);
    discard_of_a_subtree_that_is_owned: |w| {
        wide(w)?;
        for leaf in 0..4 {
            write(w, leaf * LEAF, 8)?;
        }
        flush(w)
    }, |a| a.io(Discard, 0, MIDDLE);
    write_zeroes_of_whole_blocks: written, |a| a.io(WriteZeroes, 0, 16);
    write_zeroes_of_part_of_a_block: written, |a| a.io(WriteZeroes, 3, 2);
    write_zeroes_of_part_of_a_snapshotted_block(false): snapshotted, |a| a.io(WriteZeroes, 3, 8);
    write_zeroes_of_a_hole_and_its_edges: snapshotted, |a| a.io(WriteZeroes, block(20) + 3, block(3));
    a_freed_block_is_used_again: written, |a| {
        a.io(Discard, 0, 8)?;
        a.flush()?;
        a.write(2 * LEAF, block(8))?;
        a.flush()
    };
    flush_of_many_changes: written, |a| {
        for leaf in 0..6 {
            a.start(Write, leaf * LEAF + block(leaf), 12);
        }
        a.pause()?;
        a.flush()
    };
    flush_of_a_write_in_place: written, |a| {
        a.write(0, 8)?;
        a.flush()
    };
    two_flushes_with_writes_between: written, |a| {
        a.start(Write, block(9), 8);
        a.start(Flush, 0, 0);
        a.start(Write, block(10), 8);
        a.start(Flush, 0, 0);
        a.start(Write, block(9), 8);
        a.pause()
    };
    a_claim_takes_a_new_extent: written, |a| {
        for part in 0..5 {
            a.write(LEAF + part * 512, 512)?;
        }
        a.flush()
    };
    snapshot_with_nothing_changed(false): written, |a| a.snapshot(a.first());
    snapshot_of_unflushed_writes: written, |a| {
        a.write(block(3), 8)?;
        a.write(3 * LEAF, 8)?;
        a.snapshot(a.first())
    };
    snapshot_with_requests_in_flight: written, |a| {
        a.start(Write, 0, 16); // In place.
        a.start(Write, block(5), 8); // Allocating.
        a.start(Write, block(6) + 2, 3); // Merging.
        if let Some(volume) = a.first() {
            let label = Some(a.world.fresh_name());
            a.world.start(Action::Snapshot { volume, label });
        }
        a.start(Write, 0, 8);
        a.start(Discard, 8, 8);
        a.start(Flush, 0, 0);
        a.pause()
    };
    two_snapshots_in_flight: written, |a| {
        a.start(Write, 0, 8);
        for sector in [4, LEAF] {
            if let Some(volume) = a.first() {
                a.world.start(Action::Snapshot { volume, label: None });
            }
            a.start(Write, sector, 8);
        }
        a.pause()
    };
    snapshot_that_needs_a_new_log_block(false): |w| {
        written(w)?;
        for _ in 0..24 {
            w.snapshot(first(w))?;
        }
        Ok(())
    }, |a| a.snapshot(a.first());
    write_after_many_snapshots(false): |w| {
        written(w)?;
        for round in 0..5 {
            write(w, round * 8, 8)?;
            w.snapshot(first(w))?;
        }
        Ok(())
    }, |a| a.write(3, 40);
    create_a_volume: written, |a| {
        let name = a.world.fresh_name();
        a.ask(Action::Create { name, size: HIGH })
    };
    import_a_volume: written, |a| {
        let name = a.world.fresh_name();
        a.ask(Action::CreateUnpublished { name, size: WIDE })?;
        a.world.settle()?;
        for (sector, sectors) in [(0, 24), (LEAF, 8), (MIDDLE, 8)] {
            a.io_in(a.unpublished(), Write, sector, sectors)?;
        }
        a.io_in(a.unpublished(), Discard, block(1), block(1))?;
        a.ask_alone(|a| Some(Action::Publish { volume: a.unpublished()? }))
    };
    clone_a_snapshot: snapshotted, |a| a.clone_oldest();
    write_to_a_clone: cloned, |a| {
        a.io_in(a.last(), Write, 2, 10)?;
        a.io_in(a.last(), Write, LEAF, 8)?;
        a.io_in(a.last(), Flush, 0, 0)
    };
    discard_on_a_clone: cloned, |a| {
        a.io_in(a.last(), Discard, 0, LEAF)?;
        a.io_in(a.last(), Flush, 0, 0)
    };
    snapshot_of_a_clone: cloned, |a| {
        a.io_in(a.last(), Write, 0, 8)?;
        a.snapshot(a.last())?;
        a.io_in(a.last(), Write, 0, 8)
    };
    rollback_to_a_snapshot: |w| {
        snapshotted(w)?;
        write(w, 0, 16)?;
        write(w, 2 * LEAF, 8)?;
        flush(w)
    }, |a| {
        a.ask_alone(|a| Some(Action::Rollback { snapshot: a.oldest()? }))?;
        a.world.settle()?; // What it reads as is known only then.
        a.write(0, 8)
    };
    rollback_of_unflushed_writes(false): |w| {
        snapshotted(w)?;
        write(w, 0, 16)
    }, |a| {
        a.write(5, 20)?;
        a.ask_alone(|a| Some(Action::Rollback { snapshot: a.oldest()? }))?;
        a.world.settle()
    };
    label_a_snapshot: snapshotted, |a| {
        let label = Some(a.world.fresh_name());
        let Some(snapshot) = a.oldest() else { return Ok(()) };
        a.ask(Action::Label { snapshot, label })?;
        a.ask(Action::Label { snapshot, label: None })
    };
    label_while_a_snapshot_is_taken: snapshotted, |a| {
        a.write(0, 8)?;
        let Some(snapshot) = a.oldest() else { return Ok(()) };
        let [old, new] = [(); 2].map(|()| Some(a.world.fresh_name()));
        a.world.start(Action::Snapshot { volume: snapshot.volume, label: new });
        a.world.start(Action::Label { snapshot, label: old });
        a.pause()
    };
    delete_a_snapshot: snapshotted, |a| match a.oldest() {
        Some(snapshot) => a.ask(Action::DeleteSnapshot { snapshot }),
        None => Ok(()),
    };
    delete_many_snapshots: |w| {
        written(w)?;
        for round in 0..27 {
            if round % 9 == 0 {
                write(w, round * 8, 8)?;
            }
            let label = (round == 25).then(|| w.fresh_name());
            w.perform(Action::Snapshot { volume: first(w), label })?;
        }
        Ok(())
    }, |a| match a.first() {
        Some(volume) => {
            // In two blocks of the log, and one of them has a label.
            let there = a.world.model.snapshots(volume).into_iter();
            let sequences = there.filter(|sequence| *sequence > 20).collect();
            a.ask(Action::DeleteSnapshots { volume, sequences })
        }
        None => Ok(()),
    };
    delete_a_snapshot_that_shares_little: |w| {
        wide(w)?;
        for leaf in 0..3 {
            write(w, leaf * LEAF, block(3))?;
        }
        w.snapshot(first(w))?;
        write(w, 0, block(2))?;
        write(w, LEAF, block(3))?;
        w.snapshot(first(w))?;
        write(w, 0, block(3))?;
        write(w, 2 * LEAF, block(2))?;
        flush(w)
    }, |a| match a.last_snapshot() {
        Some(snapshot) => a.ask(Action::DeleteSnapshot { snapshot }),
        None => Ok(()),
    };
    delete_both_neighbours_of_a_clone(false): |w| {
        cloned(w)?;
        let clone = *w.volumes().last().expect("it was just made");
        write(w, 0, block(2))?;
        w.io(clone, Write, 0, block(1))?;
        w.snapshot(first(w))?;
        w.snapshot(clone)?;
        w.io(clone, Write, LEAF, block(1))?;
        w.io(clone, Flush, 0, 0)?;
        flush(w)
    }, |a| {
        for snapshot in [a.oldest(), a.last_snapshot()].into_iter().flatten() {
            a.ask(Action::DeleteSnapshot { snapshot })?;
        }
        Ok(())
    };
    delete_a_volume: cloned, |a| a.ask_alone(|a| Some(Action::Delete { volume: a.first()? }));
    delete_a_volume_with_changes(false): cloned, |a| {
        a.write(0, 24)?;
        a.ask_alone(|a| Some(Action::Delete { volume: a.first()? }))
    };
    collect_garbage: |w| {
        cloned(w)?;
        let clone = *w.volumes().last().expect("it was just made");
        w.snapshot(clone)?;
        w.io(clone, Write, LEAF, block(2))?;
        w.io(clone, Flush, 0, 0)?;
        let gone = first(w);
        w.perform(Action::Delete { volume: gone })?;
        // And what a killed daemon had claimed.
        w.crash(bessel_reactor::device::sim::Keep::Everything);
        w.recover();
        // Each shard has claims again.
        for _ in 0..2 {
            let volume = w.create(SMALL)?;
            w.io(volume, Write, 0, block(1))?;
            w.io(volume, Flush, 0, 0)?;
        }
        Ok(())
    }, |a| {
        a.world.start_collection();
        a.write(0, 24)?;
        a.snapshot(a.last())?;
        a.write(LEAF, block(1))?;
        a.io(Discard, 0, LEAF)?;
        a.world.await_collection()
    };
    diff_of_snapshots: |w| {
        wide(w)?;
        for leaf in 0..3 {
            write(w, leaf * LEAF, block(2))?;
        }
        w.snapshot(first(w))?;
        write(w, 0, block(2))?;
        w.io(first(w), Discard, LEAF, LEAF)?;
        w.snapshot(first(w))?;
        write(w, 0, block(1))?;
        write(w, MIDDLE, block(2))?;
        w.snapshot(first(w))?;
        flush(w)
    }, |a| {
        // What it reads is not deleted meanwhile, what lies between is.
        if let Some(volume) = a.first() {
            let there = a.world.model.snapshots(volume);
            let id = |sequence: &u64| SnapshotId { volume, sequence: *sequence };
            if let Some(newest) = there.last().map(id) {
                let oldest = there.first().map(id).filter(|oldest| *oldest != newest);
                a.world.start_diff(oldest, newest)?;
            }
            for snapshot in there.iter().take(2).map(id) {
                a.ask(Action::DeleteSnapshot { snapshot })?;
            }
        }
        a.write(0, 24)?;
        a.io(Discard, MIDDLE, block(1))?;
        a.snapshot(a.first())?;
        a.write(LEAF, 8)?;
        a.world.await_diff()
    };
    a_schedule_takes_and_thins: |w| {
        written(w)?;
        w.snapshot(first(w)).map(drop)
    }, |a| {
        let Some(volume) = a.first() else { return Ok(()) };
        let every = Duration::from_millis(100);
        a.world.set_schedule(volume, Schedule { every, keep: Keep::Newest(2) });
        for round in 0..5 {
            // Several are under way at once.
            for _ in 0..3 {
                a.world.pass(Duration::from_micros(120));
                a.world.run_schedules();
            }
            a.write(round * 12, 12)?;
            a.flush()?;
            a.world.await_schedule(volume)?;
        }
        a.world.run_schedules();
        a.world.await_schedule(volume)?;
        a.world.drop_schedule(volume);
        Ok(())
    };
    rename_a_volume: written, |a| {
        let name = a.world.fresh_name();
        match a.first() {
            Some(volume) => a.ask(Action::Rename { volume, name }),
            None => Ok(()),
        }
    };
    grow_a_volume: written, |a| {
        let end = a.first().map_or(0, |volume| a.world.size(volume).sectors());
        a.grow(|size| ByteCount::new(size.get() + (4 << 20)))?;
        a.write(end, 8)
    };
    grow_a_volume_by_a_level: written, |a| {
        a.write(block(3), 8)?;
        a.grow(|size| size.max(HIGH))?;
        a.write(UPPER, 8)
    };
    switch_to_writethrough_and_back: written, |a| {
        a.write(block(3), 8)?;
        a.set_cache(CacheMode::Writethrough)?;
        a.write(block(4), 8)?;
        a.set_cache(CacheMode::Writeback)
    };
    move_a_volume: snapshotted, |a| {
        a.write(0, 20)?; // In place, for a part.
        a.write(3 * LEAF, 8)?;
        a.move_on()?;
        a.write(4, 12)?;
        a.write(LEAF + 8, 8)?;
        a.flush()
    };
    move_a_volume_to_and_fro(false): snapshotted, |a| {
        a.write(0, 24)?;
        if let Some(volume) = a.first() {
            // Under way when the volume is asked for.
            a.world.start(Action::Snapshot { volume, label: None });
        }
        a.move_on()?;
        a.world.settle()?;
        // In leaves that the first shard knows.
        a.write(8, 40)?;
        a.io(Discard, LEAF, block(1))?;
        a.world.settle()?;
        a.move_on()?;
        a.world.settle()?;
        a.io(IoKind::Read, 0, 48)?;
        a.io(IoKind::Read, LEAF, block(1))?;
        a.write(16, 8)?;
        a.snapshot(a.first())?;
        a.write(0, 8)?;
        a.flush()
    };
    orderly_shutdown: snapshotted, |a| {
        a.write(0, 20)?;
        a.write(3 * LEAF, 8)?;
        a.world.shut_down()?;
        a.world.recover(); // With a device that works: failing ones are replaced.
        Ok(())
    };
}

/// Uses every volume that can be used, to see that the world is in order and not only looks so:
/// small and large writes, a snapshot, a flush. All must succeed.
///
/// # Panics
/// When something fails.
pub fn use_everything(world: &mut World) {
    use_volumes(world, |_| true);
}

/// The same with the volumes that `wanted` accepts.
///
/// # Panics
/// When something fails.
pub fn use_volumes(world: &mut World, wanted: impl Fn(VolumeId) -> bool) {
    const ON: &str = "the power is on";
    for volume in world.volumes().into_iter().filter(|volume| wanted(*volume)) {
        for (sector, sectors) in [(3, 21), (LEAF - 8, 16)] {
            let status = world.write(volume, sector, sectors).expect(ON);
            assert_eq!(status, bessel_mapping::request::IoStatus::Done, "{volume}: {sector}");
        }
        let reply = world.ask(Action::Snapshot { volume, label: None }).expect(ON);
        assert!(matches!(reply, Reply::Snapshot(_)), "a snapshot of {volume}: {reply:?}");
        for (kind, sector, sectors) in [(Write, 8, 8), (IoKind::Read, 0, 64), (Flush, 0, 0)] {
            let status = world.io(volume, kind, sector, sectors).expect(ON);
            assert_eq!(status, bessel_mapping::request::IoStatus::Done, "{volume}: {kind:?}");
        }
    }
}
