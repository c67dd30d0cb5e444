//! Short sequences of operations, with a power cut at every instant of each: most crash bugs that are
//! known of file systems need three operations or fewer.
//!
//! All ordered pairs of the named operations, one after the other and on top of one another, and all
//! triples of a smaller core, in one world each. At every instant at which the disk has taken or
//! completed a write or a flush, the power fails, in two ways; the world that is left is opened,
//! checked and compared with the oracle, and the original goes on.
//!
//! A run of the suite tries all pairs and a sample of the triples, the same ones each time.
//! `SEQUENCES=all` tries everything, in every setting; `SEQUENCES=first_write_of_a_volume,grow_a_volume`
//! one sequence in every setting; and a failure prints what replays it, which names setting and seed
//! as well: `SEQUENCES=first_write_of_a_volume,grow_a_volume:2:17`.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use bessel_mapping::format::ExtentType;
use bessel_mapping::request::CacheMode;
use bessel_reactor::device::sim::{Keep, Random, Schedule};
use bessel_reactor::units::BlockAddr;
use bessel_tests::operations::{Actor, OPERATIONS, Operation, Pace, everything, operation};
use bessel_tests::world::{Action, World, WorldConfig};

/// Operations of which all triples are made: one of each kind.
const CORE: [&str; 12] = [
    "first_writes_of_two_parts_of_one_block",
    "copy_on_write_twice_in_one_leaf",
    "discard_of_whole_leaves",
    "write_zeroes_of_a_hole_and_its_edges",
    "flush_of_many_changes",
    "snapshot_with_requests_in_flight",
    "write_to_a_clone",
    "clone_a_snapshot",
    "rollback_to_a_snapshot",
    "delete_a_volume",
    "grow_a_volume_by_a_level",
    "orderly_shutdown",
];

/// Of so many triples, a run of the suite tries one.
const SAMPLE: u64 = 12;

/// What once failed, whatever it found, as `SEQUENCES` names it.
const REGRESSIONS: &[&str] = &[];

#[derive(Clone, Copy, Debug)]
struct Setting {
    volatile_cache: bool,
    cache: CacheMode,
    shards: usize,
    pace: Pace,
}

const SETTINGS: [Setting; 6] = {
    use CacheMode::{Writeback, Writethrough};
    use Pace::{AtOnce, InTurn};
    const fn setting(volatile_cache: bool, cache: CacheMode, shards: usize, pace: Pace) -> Setting {
        Setting { volatile_cache, cache, shards, pace }
    }
    [
        setting(true, Writeback, 1, InTurn),
        setting(true, Writeback, 1, AtOnce),
        setting(true, Writethrough, 1, AtOnce),
        setting(false, Writeback, 1, AtOnce),
        setting(true, Writeback, 2, AtOnce),
        setting(false, Writethrough, 2, InTurn),
    ]
};

#[derive(Clone)]
struct Sequence {
    operations: Vec<&'static Operation>,
    /// Index into [`SETTINGS`].
    setting: usize,
    /// Decides what is left open.
    seed: u64,
}

impl Sequence {
    /// Runs it, with a power cut at every instant. Returns how many there were.
    fn run(&self) -> u64 {
        let setting = SETTINGS[self.setting];
        let mut world = World::new(WorldConfig {
            volatile_cache: setting.volatile_cache,
            schedule: Schedule::Fifo,
            shards: setting.shards,
            ..WorldConfig::new(self.seed)
        });
        const ON: &str = "the power is on";
        world.disk.set_schedule(Schedule::AtOnce);
        everything(&mut world).expect(ON);
        for volume in world.volumes() {
            world.perform(Action::SetCache { volume, cache: setting.cache }).expect(ON);
        }
        world.disk.set_schedule(Schedule::Fifo);
        let crashes = Rc::new(Cell::new(0));
        let counter = Rc::clone(&crashes);
        let seed = self.seed;
        world.observe_instants(move |world| {
            let instant = counter.get();
            counter.set(instant + crash(world, seed.wrapping_add(instant)));
        });
        for operation in &self.operations {
            let mut actor = Actor::new(&mut world, setting.pace);
            (operation.act)(&mut actor).expect(ON);
        }
        world.idle().expect(ON);
        world.stop_observing();
        world.read_everything().expect(ON);
        crashes.get()
    }

    /// What `SEQUENCES` must be for this one.
    fn name(&self) -> String {
        let names: Vec<_> = self.operations.iter().map(|operation| operation.name).collect();
        format!("{}:{}:{}", names.join(","), self.setting, self.seed)
    }

    /// The sequences that [`Sequence::name`], or the part of it before the setting, means.
    fn parse(text: &str) -> Vec<Self> {
        let mut parts = text.split(':');
        let names = parts.next().expect("there is one part at least");
        let operations: Vec<_> = names.split(',').map(operation).collect();
        let mut number =
            || parts.next().map(|part| part.parse().expect("setting and seed are numbers"));
        let (setting, seed) = (number(), number().unwrap_or(0));
        let settings = setting.map_or(0..SETTINGS.len(), |one| one as usize..one as usize + 1);
        settings.map(|setting| Self { operations: operations.clone(), setting, seed }).collect()
    }
}

/// Cuts the power in two ways, one of them the cruellest. Returns how many these were.
fn crash(world: &mut World, seed: u64) -> u64 {
    let extents = world.extents();
    let metadata = |block: BlockAddr| extents.kind_of(block) != ExtentType::Data;
    let outage = world.power_failure(seed);
    let ways = match seed % 4 {
        // Nothing is at stake: all ways are the same.
        _ if outage.writes().is_empty() => vec![Keep::Nothing],
        0 => vec![Keep::Where(&metadata), Keep::Nothing],
        1 => vec![Keep::Where(&metadata), Keep::Everything],
        _ => vec![Keep::Where(&metadata), Keep::Random],
    };
    let count = ways.len() as u64;
    for keep in ways {
        outage.recover(seed, keep).verify_snapshots().expect("the power is back");
    }
    count
}

/// What to try, in which settings.
fn sequences() -> Vec<Sequence> {
    let wanted = std::env::var("SEQUENCES").unwrap_or_default();
    if !wanted.is_empty() && wanted != "all" {
        return Sequence::parse(&wanted);
    }
    let all = wanted == "all";
    let mut list = Vec::new();
    let mut add = |operations: &[&'static Operation], one: usize| {
        let settings = if all { 0..SETTINGS.len() } else { one..one + 1 };
        for setting in settings {
            let seed = list.len() as u64;
            list.push(Sequence { operations: operations.to_vec(), setting, seed });
        }
    };
    let operations: Vec<_> = OPERATIONS.iter().filter(|operation| operation.in_sequences).collect();
    for (row, first) in operations.iter().enumerate() {
        for (column, second) in operations.iter().enumerate() {
            // Each setting comes up in every row and column.
            add(&[first, second], (row + column) % SETTINGS.len());
        }
    }
    let core = CORE.map(operation);
    let mut random = Random::new(3);
    for first in core {
        for second in core {
            for third in core {
                let setting = random.below(SETTINGS.len() as u64) as usize;
                if random.chance(1, SAMPLE) || all {
                    add(&[first, second, third], setting);
                }
            }
        }
    }
    REGRESSIONS.iter().flat_map(|text| Sequence::parse(text)).chain(list).collect()
}

/// Tries `list` on every core. Returns how many power cuts there were.
fn try_all(list: &[Sequence]) -> u64 {
    let (next, crashes) = (AtomicUsize::new(0), AtomicU64::new(0));
    let failed: Mutex<Vec<String>> = Mutex::default();
    let work = || {
        while let Some(sequence) = list.get(next.fetch_add(1, Ordering::Relaxed)) {
            match catch_unwind(AssertUnwindSafe(|| sequence.run())) {
                Ok(count) => {
                    crashes.fetch_add(count, Ordering::Relaxed);
                }
                Err(_) => {
                    let name = sequence.name();
                    eprintln!("*** {name}: {:?}", SETTINGS[sequence.setting]);
                    failed.lock().expect("nobody panics with it").push(name);
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
    let mut failed = failed.into_inner().expect("nobody panicked with it");
    failed.sort_by_key(String::len);
    assert!(
        failed.is_empty(),
        "{} sequences failed: {failed:?}; SEQUENCES={} cargo test -p bessel-tests --test sequences",
        failed.len(),
        failed[0]
    );
    crashes.into_inner()
}

#[test]
fn no_short_sequence_loses_or_leaks_anything_wherever_the_power_goes() {
    let list = sequences();
    let crashes = try_all(&list);
    println!("{} sequences, {crashes} power cuts", list.len());
    assert!(crashes > list.len() as u64, "sequences that do nothing find nothing");
}
