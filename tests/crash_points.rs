//! Cuts the power at the nth device operation, fails it, or fails everything from it on, for every
//! n, in each named operation ([`bessel_tests::operations`]).
//!
//! For each operation and setting: prepare a world, act, and meet n, for n = 0, 1, ... until the
//! operation ends without meeting it.
//! - *Power cut*: what is in flight is lost in several ways; open again, run the offline check, compare
//!   every sector, snapshot and record with the oracle, see that the store still works, cut again
//!   with nothing kept, compare again.
//! - *Fault*, once or lasting, of any kind of operation or of one: heal the device and go on without a
//!   restart. Volumes that are not latched must work as if nothing had been, those that are must
//!   say so and refuse; then the power is cut and all of the above follows.
//!
//! A test's name is the operation and what happens to it; a failure says how to run it alone.

use std::time::Duration;

use bessel_mapping::format::ExtentType;
use bessel_mapping::request::{CacheMode, IoKind, IoStatus};
use bessel_mapping::store;
use bessel_reactor::device::sim::{Fault, Keep, OpKind, Schedule};
use bessel_reactor::units::{BlockAddr, ByteCount, SECTORS_PER_BLOCK};
use bessel_tests::operations::{
    Actor, Operation, Pace, SMALL, operation, use_everything, use_volumes,
};
use bessel_tests::world::{Action, World, WorldConfig};

/// No act needs more device operations than this.
const OPERATIONS_MAX: u64 = 2_000;

/// Longer than a shard believes that the store is full, when a claim has failed.
const A_WHILE: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug)]
struct Setting {
    volatile_cache: bool,
    cache: CacheMode,
    schedule: Schedule,
    shards: usize,
    /// Requests come in on every shard.
    visits: bool,
    pace: Pace,
}

const SETTINGS: [Setting; 6] = {
    use CacheMode::{Writeback, Writethrough};
    const fn setting(volatile_cache: bool, cache: CacheMode, schedule: Schedule) -> Setting {
        Setting { volatile_cache, cache, schedule, shards: 1, visits: false, pace: Pace::InTurn }
    }
    [
        setting(true, Writeback, Schedule::Fifo),
        Setting { pace: Pace::AtOnce, ..setting(true, Writethrough, Schedule::Fifo) },
        setting(false, Writeback, Schedule::Fifo),
        setting(false, Writethrough, Schedule::Fifo),
        Setting { shards: 2, visits: true, ..setting(true, Writeback, Schedule::Random) },
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
    fn keep<'a>(
        self,
        is_data: &'a dyn Fn(BlockAddr) -> bool,
        is_not: &'a dyn Fn(BlockAddr) -> bool,
    ) -> Keep<'a> {
        match self {
            Self::Nothing => Keep::Nothing,
            Self::Everything => Keep::Everything,
            Self::MetadataOnly => Keep::Where(is_not),
            Self::DataOnly => Keep::Where(is_data),
            Self::Random => Keep::Random,
        }
    }

    /// The world that the power cut leaves, recovered and looked at.
    fn strike(self, world: &mut World, seed: u64) -> World {
        let extents = world.extents();
        let is_data = |block: BlockAddr| extents.kind_of(block) == ExtentType::Data;
        let is_not = |block: BlockAddr| !is_data(block);
        let outage = world.power_failure(seed);
        let mut after = outage.recover(seed, self.keep(&is_data, &is_not));
        after.verify_snapshots().expect("the power is back");
        after
    }
}

/// What strikes.
#[derive(Clone, Copy, Debug)]
enum Blow {
    PowerCut,
    /// This kind of operation fails, any kind when none, once or from then on.
    Fault {
        kind: Option<OpKind>,
        lasting: bool,
    },
}

impl Blow {
    const ONCE: Self = Self::Fault { kind: None, lasting: false };
    const FROM_THERE_ON: [Self; 4] = [
        Self::Fault { kind: None, lasting: true },
        Self::Fault { kind: Some(OpKind::Read), lasting: true },
        Self::Fault { kind: Some(OpKind::Write), lasting: true },
        Self::Fault { kind: Some(OpKind::Flush), lasting: true },
    ];
}

/// One world, of one operation in one setting, that is struck at one of its device operations.
#[derive(Clone, Copy)]
struct Case {
    operation: &'static Operation,
    setting: Setting,
    blow: Blow,
    after: u64,
}

/// Runs `blow` through every device operation, in every setting.
fn at_every_operation(name: &str, blow: Blow) {
    let operation = operation(name);
    for setting in SETTINGS {
        let struck = (0..OPERATIONS_MAX).take_while(|&after| {
            let case = Case { operation, setting, blow, after };
            let context = || {
                let module = match blow {
                    Blow::PowerCut => "the_power_goes",
                    Blow::Fault { lasting: false, .. } => "one_operation_fails",
                    Blow::Fault { .. } => "all_fail_from_there_on",
                };
                format!(
                    "{blow:?} after {after} device operations, {setting:?}\n*** cargo test -p \
                     bessel-tests --test crash_points -- --exact {name}::{module}"
                )
            };
            explain(context, || case.run())
        });
        let count = struck.count() as u64;
        assert!(count < OPERATIONS_MAX, "the act still goes on after {OPERATIONS_MAX} operations");
        let reads_or_flushes =
            matches!(blow, Blow::Fault { kind: Some(OpKind::Read | OpKind::Flush), .. });
        assert!(count > 0 || reads_or_flushes, "the act does nothing to the device");
    }
}

impl Case {
    /// False when the operation ended before it was struck.
    fn run(&self) -> bool {
        let mut world = World::new(WorldConfig {
            volatile_cache: self.setting.volatile_cache,
            schedule: self.setting.schedule,
            shards: self.setting.shards,
            visits: self.setting.visits,
            ..WorldConfig::new(self.after)
        });
        // The preparation is not what is tested: let it be quick.
        world.disk.set_schedule(Schedule::AtOnce);
        (self.operation.prepare)(&mut world).expect("the power is on");
        for volume in world.volumes() {
            let action = Action::SetCache { volume, cache: self.setting.cache };
            world.perform(action).expect("the power is on");
        }
        if self.setting.visits {
            world.visit_everywhere().expect("the power is on");
        }
        world.idle().expect("the power is on");
        world.disk.set_schedule(self.setting.schedule);
        match self.blow {
            Blow::PowerCut => self.cut_the_power(world),
            Blow::Fault { kind, lasting } => self.fail(world, kind, lasting),
        }
    }

    fn cut_the_power(&self, mut world: World) -> bool {
        world.disk.stop_after(self.after);
        let mut actor = Actor::new(&mut world, self.setting.pace);
        let outcome = (self.operation.act)(&mut actor).and_then(|()| world.idle());
        for cut in CUTS {
            explain(
                || format!("{cut:?} kept"),
                || {
                    let mut after = cut.strike(&mut world, self.after);
                    // It must not only look well.
                    use_everything(&mut after);
                    after.crash(Keep::Nothing);
                    after.recover();
                },
            );
        }
        outcome.is_err()
    }

    fn fail(&self, mut world: World, kind: Option<OpKind>, lasting: bool) -> bool {
        let done = |world: &World| {
            let counters = world.disk.counters();
            match kind {
                None => counters.reads + counters.writes + counters.flushes,
                Some(OpKind::Read) => counters.reads,
                Some(OpKind::Write) => counters.writes,
                Some(OpKind::Flush) => counters.flushes,
            }
        };
        let before = done(&world);
        world.expect_failures(true);
        world.disk.inject(Fault { kind, after: self.after, lasting });
        let mut actor = Actor::new(&mut world, self.setting.pace);
        (self.operation.act)(&mut actor).expect("the power is on");
        world.idle().expect("the power is on");
        let struck = done(&world) - before > self.after;
        world.disk.heal();
        self.spread_the_news(&mut world);
        world.pass(A_WHILE);
        go_on(&mut world, kind != Some(OpKind::Read));
        let cuts = [Cut::Random, CUTS[self.after as usize % CUTS.len()]];
        for cut in cuts {
            explain(
                || format!("{cut:?} kept"),
                || {
                    let mut after = cut.strike(&mut world, self.after);
                    use_everything(&mut after);
                },
            );
        }
        struck
    }
}

impl Case {
    /// Lets every reactor hear of a flush that failed for another one: its next flush tells.
    fn spread_the_news(&self, world: &mut World) {
        if self.setting.shards == 1 {
            return;
        }
        // New volumes go to the reactors in turn, and each begins with a flush.
        for _ in 0..2 * self.setting.shards {
            let name = world.fresh_name();
            let reply = world.ask(Action::Create { name, size: SMALL });
            reply.expect("the power is on");
        }
    }
}

/// The device works again: whoever is not latched does too, and whoever is says so.
fn go_on(world: &mut World, may_latch: bool) {
    const ON: &str = "the power is on";
    let mut latched = Vec::new();
    for volume in world.volumes() {
        if world.show(volume).expect(ON).latched.is_some() {
            latched.push(volume);
        }
    }
    assert!(may_latch || latched.is_empty(), "latched without a write or flush that failed");
    for &volume in &latched {
        for (kind, sectors, expected) in [
            (IoKind::Read, 64, IoStatus::Done),
            (IoKind::Write, 8, IoStatus::Failed),
            (IoKind::WriteZeroes, 8, IoStatus::Failed),
            (IoKind::Flush, 0, IoStatus::Failed),
            (IoKind::Read, 64, IoStatus::Done),
        ] {
            assert_eq!(world.io(volume, kind, 0, sectors).expect(ON), expected, "{kind:?}");
        }
        let reply = world.ask(Action::Snapshot { volume, label: None }).expect(ON);
        assert!(format!("{reply:?}").contains("Latched"), "a snapshot of it: {reply:?}");
    }
    world.expect_failures(false);
    world.verify_snapshots().expect(ON);
    use_volumes(world, |volume| !latched.contains(&volume));
    world.read_everything().expect(ON);
    world.expect_failures(!latched.is_empty());
    world.idle().expect(ON);
    world.expect_failures(false);
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

macro_rules! each {
    ($($name:ident)*) => {
        $(
            mod $name {
                use super::{Blow, at_every_operation};

                #[test]
                fn the_power_goes() {
                    at_every_operation(stringify!($name), Blow::PowerCut);
                }

                #[test]
                fn one_operation_fails() {
                    at_every_operation(stringify!($name), Blow::ONCE);
                }

                #[test]
                fn all_fail_from_there_on() {
                    for blow in Blow::FROM_THERE_ON {
                        at_every_operation(stringify!($name), blow);
                    }
                }
            }
        )*
    };
}

bessel_tests::for_each_operation!(each);

/// A loop over an operation that does nothing would find nothing.
#[test]
fn diffs_and_schedules_do_their_work_in_the_loops() {
    const ON: &str = "the power is on";
    for pace in [Pace::InTurn, Pace::AtOnce] {
        let mut world = World::new(WorldConfig::new(3));
        let act = |world: &mut World, name: &str| {
            let operation = operation(name);
            (operation.prepare)(world).expect(ON);
            (operation.act)(&mut Actor::new(world, pace)).expect(ON);
            world.idle().expect(ON);
            *world.volumes().first().expect("it was prepared")
        };
        let volume = act(&mut world, "diff_of_snapshots");
        assert_eq!(world.diffs(), 1);
        // The oldest one was refused and the one between went.
        assert_eq!(world.model.snapshots(volume), [0, 2, 3]);
        assert_eq!(world.reclaimed().1, 1);
        let mut world = World::new(WorldConfig::new(4));
        let volume = act(&mut world, "a_schedule_takes_and_thins");
        let there = world.snapshots(volume).expect(ON);
        let thinned = there.iter().filter(|it| it.deleted).count();
        assert!(there.len() > 4 && thinned > 0, "{there:?}");
    }
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

/// Bitmaps that cannot be read for a moment are neither full for ever nor a reason to take extent
/// after extent from those that are unused.
#[test]
fn reads_that_fail_for_a_moment_do_not_use_the_store_up() {
    let mut world = World::new(WorldConfig { schedule: Schedule::AtOnce, ..WorldConfig::new(1) });
    let volume = world.create(ByteCount::new(1 << 30)).unwrap();
    world.write(volume, 0, 8).unwrap();
    world.flush(volume).unwrap();
    world.shut_down().unwrap(); // So that the next claim must read a bitmap.
    world.recover();
    let unused = |world: &World| {
        let opened = store::open(&mut world.disk.connect(), store::OpenMode::ReadOnly).unwrap();
        opened.catalogue.iter().filter(|entry| entry.kind == ExtentType::Unused).count()
    };
    let before = unused(&world);
    let (checked, blocks) = (world.model.sectors_checked, 300);
    world.expect_failures(true);
    world.disk.inject(Fault { kind: Some(OpKind::Read), after: 0, lasting: true });
    for block in 1..blocks {
        world.write(volume, block * SECTORS_PER_BLOCK, 8).unwrap();
    }
    world.disk.heal();
    world.expect_failures(false);
    world.pass(A_WHILE);
    for block in 1..blocks {
        let status = world.write(volume, block * SECTORS_PER_BLOCK, 8).unwrap();
        assert_eq!(status, IoStatus::Done, "block {block}");
    }
    world.read_everything().unwrap();
    assert!(world.model.sectors_checked > checked);
    world.idle().unwrap();
    world.crash(Keep::Everything);
    // Three hundred blocks need two extents more; and one of each kind was a detour at most.
    let after = unused(&world);
    assert!(before - after <= 4, "{before} extents were unused, {after} are");
    world.recover();
}

/// A block that was taken for a write that failed is not the volume's.
#[test]
fn a_write_that_fails_counts_no_block() {
    let mut world = World::new(WorldConfig { schedule: Schedule::AtOnce, ..WorldConfig::new(1) });
    let volume = world.create(ByteCount::new(1 << 30)).unwrap();
    world.write(volume, 0, 8).unwrap();
    let before = world.show(volume).unwrap().blocks_allocated;
    world.expect_failures(true);
    for (sector, sectors) in [(64, 24), (128, 3)] {
        world.disk.inject(Fault { kind: Some(OpKind::Write), after: 0, lasting: false });
        assert_eq!(world.write(volume, sector, sectors).unwrap(), IoStatus::Failed);
    }
    assert_eq!(world.show(volume).unwrap().blocks_allocated, before);
}
