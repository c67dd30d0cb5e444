//! Several writes to one block, in every order that the disk allows.
//!
//! Writes of parts of a block, whole writes, unmapping, flushes, snapshots and a clone's writes meet in
//! one block, which is a hole, discarded, zeroed, the volume's own, shared with a snapshot or a clone, or
//! what a rollback has brought back. A *race* is such a state and what is asked for, in its order. Every
//! interleaving is tried: of when each thing is asked for, and of which operation in flight the disk
//! completes next. (Metadata writes that are in flight together complete together: the loops over
//! power cuts care for the instants between them.) At some instants of each the power is cut as well.
//!
//! Races with few orders are tried in all of them; the others in those that differ in a bounded number
//! of choices from the plainest one, which asks for everything at once. `RACE=all` takes the bound off
//! and tries every race in every setting.
//!
//! The oracle decides, sector by sector: what nobody wrote keeps its bytes, what was written holds what
//! a guest may expect, and each snapshot holds what was complete before it and nothing that began after
//! it.
//!
//! `RACE=shared/two_parts/0:0.1.1.0` replays one order, `RACE=shared/two_parts` all that begin so.

use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use bessel_mapping::format::{ExtentMap, ExtentType};
use bessel_mapping::request::{CacheMode, IoKind, SnapshotId, VolumeId};
use bessel_reactor::device::sim::{Flying, Keep, OpKind, Schedule};
use bessel_reactor::units::{BlockAddr, ByteCount, SECTORS_PER_BLOCK};
use bessel_tests::world::{Action, World, WorldConfig};

const ON: &str = "the power is on";

/// The block that everybody wants, by its first sector. Its neighbours are in use as well.
const BLOCK: u64 = 3 * SECTORS_PER_BLOCK;

/// More orders than any race has.
const ORDERS_MAX: u64 = 10_000_000;

/// Choices in which an order of a large race differs from the plainest one, at most.
const DEVIATIONS_MAX: usize = 2;

/// Of so many instants that no order before has come through, the power is cut at one.
const CRASH_EVERY: u64 = 3;

/// Orders that once failed, whatever they found, as `RACE` names them.
const REGRESSIONS: &[&str] = &[];

/// What the block is before.
struct State {
    name: &'static str,
    prepare: fn(&mut World, VolumeId),
}

/// What is asked for. Sectors count from the start of [`BLOCK`].
#[derive(Clone, Copy, Debug)]
enum Ask {
    Io(IoKind, u64, u64),
    /// Of the clone, if there is one.
    OfClone(IoKind, u64, u64),
    Snapshot,
    SnapshotOfClone,
    /// A label, of the first snapshot if there is one: it has a round of its own.
    Label,
}

struct Script {
    name: &'static str,
    asks: &'static [Ask],
}

#[derive(Clone, Copy, Debug)]
struct Setting {
    volatile_cache: bool,
    cache: CacheMode,
    /// Of device I/O: a device that takes whole blocks only needs merges in place.
    offset_alignment: u32,
}

const SETTINGS: [Setting; 3] = [
    Setting { volatile_cache: true, cache: CacheMode::Writeback, offset_alignment: 512 },
    Setting { volatile_cache: false, cache: CacheMode::Writethrough, offset_alignment: 512 },
    Setting { volatile_cache: true, cache: CacheMode::Writeback, offset_alignment: 4096 },
];

fn write(world: &mut World, volume: VolumeId, sector: u64, sectors: u64) {
    world.write(volume, sector, sectors).expect(ON);
}

/// The block and its neighbours, durable.
fn written(world: &mut World, volume: VolumeId) {
    write(world, volume, BLOCK - 8, 24);
    world.flush(volume).expect(ON);
}

fn snapshotted(world: &mut World, volume: VolumeId) {
    written(world, volume);
    world.snapshot(volume).expect(ON);
}

fn unmapped(world: &mut World, volume: VolumeId, kind: IoKind) {
    written(world, volume);
    world.io(volume, kind, BLOCK, 8).expect(ON);
    world.flush(volume).expect(ON);
}

const STATES: [State; 9] = [
    State { name: "untouched", prepare: |_, _| () },
    State {
        name: "hole",
        prepare: |w, v| {
            write(w, v, BLOCK - 8, 8);
            w.flush(v).expect(ON);
        },
    },
    State { name: "discarded", prepare: |w, v| unmapped(w, v, IoKind::Discard) },
    State { name: "zeroed", prepare: |w, v| unmapped(w, v, IoKind::WriteZeroes) },
    State { name: "owned", prepare: written },
    State {
        name: "not_durable",
        prepare: |w, v| {
            snapshotted(w, v);
            write(w, v, BLOCK, 8);
        },
    },
    State { name: "shared", prepare: snapshotted },
    State {
        name: "cloned",
        prepare: |w, v| {
            snapshotted(w, v);
            let snapshot = SnapshotId { volume: v, sequence: 0 };
            w.clone_of(snapshot, "clone").expect(ON).expect("it has settled");
        },
    },
    State {
        name: "rolled_back",
        prepare: |w, v| {
            snapshotted(w, v);
            write(w, v, BLOCK + 2, 3);
            let snapshot = SnapshotId { volume: v, sequence: 0 };
            w.perform(Action::Rollback { snapshot }).expect(ON);
        },
    },
];

const SCRIPTS: [Script; 17] = {
    use Ask::{Io, Label, OfClone, Snapshot, SnapshotOfClone};
    use IoKind::{Discard, Flush, Read, Write, WriteZeroes};
    const fn script(name: &'static str, asks: &'static [Ask]) -> Script {
        Script { name, asks }
    }
    [
        script("two_parts", &[Io(Write, 0, 3), Io(Write, 3, 3), Io(Read, 0, 8)]),
        script("overlapping_parts", &[Io(Write, 0, 4), Io(Write, 2, 4), Io(Read, 0, 8)]),
        script("three_parts", &[Io(Write, 0, 2), Io(Write, 3, 2), Io(Write, 1, 3)]),
        script("part_and_whole", &[Io(Write, 2, 3), Io(Write, 0, 8), Io(Write, 4, 2)]),
        script("parts_across_neighbours", &[Io(Write, 6, 4), Io(Write, 1, 2), Io(Write, 0, 16)]),
        script("snapshot_between", &[Io(Write, 0, 3), Snapshot, Io(Write, 3, 3)]),
        script("snapshot_between_the_same", &[Io(Write, 1, 3), Snapshot, Io(Write, 1, 3)]),
        script(
            "snapshot_among_three",
            &[Io(Write, 0, 3), Snapshot, Io(Write, 3, 3), Io(Write, 1, 1)],
        ),
        script("snapshot_first", &[Snapshot, Io(Write, 0, 3), Io(Write, 2, 3)]),
        script(
            "two_snapshots",
            &[Io(Write, 0, 3), Snapshot, Io(Write, 3, 2), Snapshot, Io(Write, 4, 2)],
        ),
        script("discard_between", &[Io(Write, 0, 3), Io(Discard, 0, 8), Io(Write, 3, 3)]),
        script("zeroes_between", &[Io(Write, 0, 3), Io(WriteZeroes, 1, 4), Io(Write, 3, 3)]),
        script("whole_zeroes_between", &[Io(Write, 0, 3), Io(WriteZeroes, 0, 8), Io(Write, 3, 3)]),
        script(
            "discard_and_snapshot",
            &[Io(Write, 0, 3), Io(Discard, 0, 8), Snapshot, Io(Write, 3, 3)],
        ),
        script("flush_between", &[Io(Write, 0, 3), Io(Flush, 0, 0), Io(Write, 3, 3)]),
        script("label_and_snapshot", &[Io(Write, 0, 3), Label, Snapshot, Io(Write, 3, 3)]),
        script(
            "origin_and_clone",
            &[Io(Write, 0, 3), OfClone(Write, 2, 3), SnapshotOfClone, OfClone(Write, 4, 2)],
        ),
    ]
};

#[derive(Clone, Copy)]
struct Race {
    state: &'static State,
    script: &'static Script,
    /// Index into [`SETTINGS`].
    setting: usize,
}

/// When the power is cut in an order.
#[derive(Clone, Copy)]
enum Crashes {
    /// Every so often where it differs from the orders before it, in one of four ways.
    SomeThatAreNew,
    /// At every instant, in each way.
    All,
}

/// A choice that was made: which, of how many.
type Choice = (usize, usize);

#[derive(Clone, Copy, Default)]
struct Tally {
    orders: u64,
    instants: u64,
    crashes: u64,
}

impl Script {
    /// One command among a few writes: not so many orders that they could not all be tried.
    fn is_small(&self) -> bool {
        let is_command = |ask: &&Ask| !matches!(ask, Ask::Io(..));
        self.asks.len() < 4 && self.asks.iter().filter(is_command).count() < 2
    }
}

impl Race {
    fn name(&self) -> String {
        format!("{}/{}/{}", self.state.name, self.script.name, self.setting)
    }

    fn prepared(&self) -> (World, VolumeId) {
        let setting = SETTINGS[self.setting];
        let mut world = World::new(WorldConfig {
            volatile_cache: setting.volatile_cache,
            offset_alignment: setting.offset_alignment,
            schedule: Schedule::AtOnce,
            ..WorldConfig::new(5)
        });
        let volume = world.create(ByteCount::new(16 << 20)).expect(ON);
        // So that no claim gets in between.
        write(&mut world, volume, 1 << 14, 8);
        (self.state.prepare)(&mut world, volume);
        for volume in world.volumes() {
            world.perform(Action::SetCache { volume, cache: setting.cache }).expect(ON);
        }
        // No background commit may be due: what is not durable stays so.
        world.settle().expect(ON);
        (world, volume)
    }

    /// Runs one order: `prefix`, and from there on always the first choice. Returns the choices
    /// made.
    fn run(&self, prefix: &[usize], tally: &mut Tally, crashes: Crashes) -> Vec<Choice> {
        let (mut world, volume) = self.prepared();
        let extents = world.extents();
        let mut asks = self.script.asks.iter();
        let mut choices: Vec<Choice> = Vec::new();
        world.disk.hold_all_but(None);
        loop {
            quiesce(&mut world);
            let ready = ready(&world, &extents);
            let can_ask = usize::from(!asks.as_slice().is_empty());
            let count = ready.len() + can_ask;
            if count == 0 {
                break;
            }
            let depth = choices.len();
            let choice = prefix.get(depth).copied().unwrap_or(0);
            choices.push((choice, count));
            // Asking comes first, so that the first order has everything in flight at once.
            match choice.checked_sub(can_ask) {
                None => ask(&mut world, volume, *asks.next().expect("counted above")),
                Some(at) => ready[at].iter().for_each(|op| complete(&mut world, op)),
            }
            match crashes {
                Crashes::All => (0..4).for_each(|way| crash(&mut world, &extents, way)),
                Crashes::SomeThatAreNew if depth + 1 >= prefix.len() => {
                    tally.instants += 1;
                    if tally.instants.is_multiple_of(CRASH_EVERY) {
                        crash(&mut world, &extents, tally.instants / CRASH_EVERY);
                        tally.crashes += 1;
                    }
                }
                Crashes::SomeThatAreNew => {}
            }
        }
        world.disk.release();
        world.settle().expect(ON);
        world.read_everything().expect(ON);
        world.verify_snapshots().expect(ON);
        choices
    }

    /// Runs every order of at most `deviations`. `told` is set to the one under way.
    fn explore(&self, deviations: usize, told: &Mutex<String>) -> Tally {
        let mut tally = Tally::default();
        let mut prefix: Vec<usize> = Vec::new();
        loop {
            *told.lock().expect("nobody panics with it") = self.order(&prefix);
            let choices = self.run(&prefix, &mut tally, Crashes::SomeThatAreNew);
            tally.orders += 1;
            assert!(tally.orders < ORDERS_MAX, "{} has no end", self.name());
            // The next order differs in the last place where it can.
            let last = (0..choices.len()).rev().find(|&at| {
                let (choice, count) = choices[at];
                let before = choices[..at].iter().filter(|(choice, _)| *choice > 0).count();
                choice + 1 < count && before < deviations
            });
            let Some(last) = last else { return tally };
            prefix = choices[..=last].iter().map(|(choice, _)| *choice).collect();
            prefix[last] += 1;
        }
    }

    /// What `RACE` must be for one order.
    fn order(&self, prefix: &[usize]) -> String {
        let mut text = self.name();
        for (at, choice) in prefix.iter().enumerate() {
            let separator = if at == 0 { ':' } else { '.' };
            write!(text, "{separator}{choice}").expect("strings take everything");
        }
        text
    }
}

/// Goes on until nothing happens without the disk.
fn quiesce(world: &mut World) {
    // A turn may only note that there is something to do in the next one.
    let mut idle = 0;
    for _ in 0..1000 {
        idle = if world.step() { 0 } else { idle + 1 };
        if idle == 2 {
            return;
        }
    }
    panic!("it goes on and on with nothing from the disk");
}

/// What the disk may complete next: any data, or all of the rest.
fn ready(world: &World, extents: &ExtentMap) -> Vec<Vec<Flying>> {
    let is_data =
        |op: &Flying| op.kind != OpKind::Flush && extents.kind_of(op.block) == ExtentType::Data;
    let (data, rest): (Vec<_>, Vec<_>) = world.disk.flying().into_iter().partition(is_data);
    let rest = Some(rest).filter(|rest| !rest.is_empty());
    data.into_iter().map(|op| vec![op]).chain(rest).collect()
}

/// Lets the disk complete `op` and nothing else.
fn complete(world: &mut World, op: &Flying) {
    world.disk.hold_all_but(Some(op.number));
    let mut steps = 0;
    while world.disk.flying().contains(op) {
        world.step();
        steps += 1;
        assert!(steps < 100, "{op:?} never completes");
    }
    world.disk.hold_all_but(None);
}

fn ask(world: &mut World, volume: VolumeId, ask: Ask) {
    let clone = world.volumes().last().copied().filter(|last| *last != volume);
    let first = world.model.snapshots(volume).first().copied();
    match ask {
        Ask::Io(IoKind::Flush, ..) => {
            world.start_io(volume, IoKind::Flush, 0, 0);
        }
        Ask::Io(kind, sector, sectors) => {
            world.start_io(volume, kind, BLOCK + sector, sectors);
        }
        Ask::OfClone(kind, sector, sectors) => {
            world.start_io(clone.unwrap_or(volume), kind, BLOCK + sector, sectors);
        }
        Ask::Snapshot => {
            world.start(Action::Snapshot { volume, label: None });
        }
        Ask::SnapshotOfClone => {
            world.start(Action::Snapshot { volume: clone.unwrap_or(volume), label: None });
        }
        Ask::Label => {
            if let Some(sequence) = first {
                let label = Some(world.fresh_name());
                let snapshot = SnapshotId { volume, sequence };
                world.start(Action::Label { snapshot, label });
            }
        }
    }
}

/// Cuts the power in one way.
fn crash(world: &mut World, extents: &ExtentMap, seed: u64) {
    let metadata = |block: BlockAddr| extents.kind_of(block) != ExtentType::Data;
    let keep = match seed % 4 {
        0 => Keep::Nothing,
        1 => Keep::Everything,
        2 => Keep::Where(&metadata),
        _ => Keep::Random,
    };
    let mut after = world.power_failure(seed).recover(seed, keep);
    after.verify_snapshots().expect("the power is back");
}

/// All races, in all settings or in one each.
fn races(all_settings: bool) -> Vec<Race> {
    let mut list = Vec::new();
    for (row, state) in STATES.iter().enumerate() {
        for (column, script) in SCRIPTS.iter().enumerate() {
            let of_clone = script.asks.iter().any(|ask| matches!(ask, Ask::OfClone(..)));
            if of_clone && state.name != "cloned" {
                continue;
            }
            let one = (row + column) % SETTINGS.len();
            let settings = if all_settings { 0..SETTINGS.len() } else { one..one + 1 };
            list.extend(settings.map(|setting| Race { state, script, setting }));
        }
    }
    list
}

/// Runs `list` on every core.
fn run_all(list: &[Race], bounded: bool) -> Tally {
    let (next, orders, crashes) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let failed: Mutex<Vec<String>> = Mutex::default();
    let work = || {
        let told = Mutex::default();
        while let Some(race) = list.get(next.fetch_add(1, Ordering::Relaxed)) {
            let unbounded = !bounded || race.script.is_small();
            let deviations = if unbounded { usize::MAX } else { DEVIATIONS_MAX };
            match catch_unwind(AssertUnwindSafe(|| race.explore(deviations, &told))) {
                Ok(tally) => {
                    if std::env::var_os("TALLY").is_some() {
                        eprintln!("{}: {} orders", race.name(), tally.orders);
                    }
                    orders.fetch_add(tally.orders, Ordering::Relaxed);
                    crashes.fetch_add(tally.crashes, Ordering::Relaxed);
                }
                Err(_) => {
                    let told = told.lock().expect("nobody panics with it").clone();
                    eprintln!("*** {told}");
                    failed.lock().expect("nobody panics with it").push(told);
                }
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    let failed = failed.into_inner().expect("nobody panicked with it");
    assert!(
        failed.is_empty(),
        "{} races failed: {failed:?}; RACE={} cargo test -p bessel-tests --test races",
        failed.len(),
        failed[0]
    );
    Tally { orders: orders.into_inner(), crashes: crashes.into_inner(), instants: 0 }
}

/// Runs one order, with a power cut at each of its instants, in each way.
fn replay(text: &str) {
    let (name, order) = text.split_once(':').expect("a race and its order");
    let race = races(true).into_iter().find(|race| race.name() == name);
    let order: Vec<usize> =
        order.split('.').map(|part| part.parse().expect("an order is numbers")).collect();
    race.expect("there is such a race").run(&order, &mut Tally::default(), Crashes::All);
}

#[test]
fn untouched_sectors_keep_their_bytes_in_every_order() {
    let wanted = std::env::var("RACE").unwrap_or_default();
    let (name, order) = wanted.split_once(':').unwrap_or((&wanted, ""));
    let list = match name {
        "" | "all" => races(name == "all"),
        _ => races(true).into_iter().filter(|race| race.name().starts_with(name)).collect(),
    };
    if !order.is_empty() {
        return replay(&wanted);
    }
    REGRESSIONS.iter().for_each(|order| replay(order));
    let tally = run_all(&list, name.is_empty());
    println!("{} races, {} orders, {} power cuts", list.len(), tally.orders, tally.crashes);
    assert!(tally.orders > list.len() as u64, "a race with one order is none");
}
