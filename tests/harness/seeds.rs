//! One seed, one run: a world, work in it, and crashes: the line of one life after another, and at
//! many instants of it every power cut that could have happened there.
//!
//! `tests/simulation.rs` runs a few thousand seeds on every change, `tests/soak.rs` fresh ones for
//! hours. Both do so here, so that either can replay what the other has found.

use std::fmt;
use std::ops::AddAssign;

use bessel_reactor::device::sim::{Keep, Random, Schedule, VolatileWrite};
use bessel_reactor::units::ByteCount;

use crate::workload::Workload;
use crate::world::{Faults, Outage, World, WorldConfig};

/// How much is made of each seed. A seed is the same run only under the same effort.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Effort {
    /// Of a thousand steps, at how many every power cut is tried.
    pub instants: u64,
    /// With up to this many volatile writes every subset of them is.
    pub exhaustive: usize,
    /// With more of them, or at random, so many are.
    pub samples: usize,
}

impl Effort {
    /// For thousands of seeds on every change.
    pub const SLICE: Self = Self { instants: 2, exhaustive: 4, samples: 3 };
    /// For hours.
    pub const SOAK: Self = Self { instants: 15, exhaustive: 10, samples: 40 };
}

/// What was done, to say what "nothing was found" is worth.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Tally {
    /// Runs.
    pub seeds: u64,
    /// Instants at which the power failed in more than one way.
    pub instants: u64,
    /// Of these, with every subset of the volatile writes.
    pub exhausted: u64,
    /// Power cuts that kept one subset of all there are at an instant.
    pub enumerated: u64,
    /// Power cuts that kept some of many volatile writes, or parts of them.
    pub sampled: u64,
    /// Power cuts between two lives of a run, at any step.
    pub cuts: u64,
    /// Power cuts after the nth write or flush.
    pub nth: u64,
    /// Kills of the process; the machine goes on.
    pub kills: u64,
    /// Orderly ends, with the power cut afterwards.
    pub shutdowns: u64,
    /// Stores opened, checked and compared as a whole.
    pub recoveries: u64,
    /// Volumes in these.
    pub volumes: u64,
    /// Snapshots in these.
    pub snapshots: u64,
    /// Snapshots that were cloned and read.
    pub snapshots_read: u64,
    /// Sectors compared with the model.
    pub sectors: u64,
    /// Deleted snapshots of which all that only they held was freed.
    pub reclaims: u64,
    /// Collections that came to their end.
    pub collections: u64,
    /// Diffs compared with the model.
    pub diffs: u64,
    /// Imports that came to their end.
    pub imports: u64,
    /// Volumes that moved to another shard.
    pub moves: u64,
    /// Requests that came in elsewhere than at the home of their volume.
    pub visiting: u64,
    /// Those of them that were sent there.
    pub forwarded: u64,
}

impl Tally {
    /// Ends of a life, of whatever kind but the orderly.
    pub fn crashes(&self) -> u64 {
        self.enumerated + self.sampled + self.cuts + self.nth + self.kills
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.seeds += other.seeds;
        self.instants += other.instants;
        self.exhausted += other.exhausted;
        self.enumerated += other.enumerated;
        self.sampled += other.sampled;
        self.cuts += other.cuts;
        self.nth += other.nth;
        self.kills += other.kills;
        self.shutdowns += other.shutdowns;
        self.recoveries += other.recoveries;
        self.volumes += other.volumes;
        self.snapshots += other.snapshots;
        self.snapshots_read += other.snapshots_read;
        self.sectors += other.sectors;
        self.reclaims += other.reclaims;
        self.collections += other.collections;
        self.diffs += other.diffs;
        self.imports += other.imports;
        self.moves += other.moves;
        self.visiting += other.visiting;
        self.forwarded += other.forwarded;
    }
}

/// One world of its seed's making.
pub fn config(seed: u64) -> WorldConfig {
    let mut random = Random::new(seed);
    WorldConfig {
        shards: 1 + random.below(3) as usize,
        capacity: ByteCount::new(*random.pick(&[64 << 20, 128 << 20])),
        extent_size: ByteCount::new(*random.pick(&[1 << 20, 2 << 20, 4 << 20])),
        volatile_cache: random.chance(3, 4),
        schedule: *random.pick(&[
            Schedule::Random,
            Schedule::Random,
            Schedule::Random,
            Schedule::AtOnce,
            Schedule::Fifo,
        ]),
        // The smallest there is, to evict all the time; or room for everything.
        node_cache: ByteCount::new(*random.pick(&[0, 512 << 10, 4 << 20])),
        requests: *random.pick(&[4, 16, 64]),
        offset_alignment: *random.pick(&[512, 512, 4096]),
        may_fill: true,
        // Full all the time, or never.
        journal_entries: *random.pick(&[50, 1000]),
        // Every eighth on a disk that goes wrong.
        visits: seed % 3 == 2,
        shared_leaves: [1, 2, 64][(seed / 3 % 3) as usize],
        steps_per_turn: [1, 8, 256][(seed / 9 % 3) as usize],
        faults: (seed % 8 == 5).then(|| Faults::of_seed(&mut random)),
        ..WorldConfig::new(seed)
    }
}

/// Runs one seed.
///
/// # Panics
/// When the target breaks a promise.
pub fn run(seed: u64, effort: &Effort) -> Tally {
    let mut run = Run {
        world: World::new(config(seed)),
        workload: Workload::default(),
        // Not the world's: what is tried on the side must not change the line.
        dice: Random::new(seed ^ 0x0dd5),
        effort: *effort,
        tally: Tally { seeds: 1, ..Tally::default() },
    };
    let lives = 2 + run.world.random.below(4);
    for _ in 0..lives {
        let steps = 1 + run.world.random.below(250);
        for _ in 0..steps {
            run.step();
        }
        run.end_life();
        run.recover();
    }
    run.work_until_the_power_goes();
    run.recover();
    run.tally.sectors += run.world.model.sectors_checked;
    run.tally.reclaims += run.world.reclaimed().1;
    let collections = run.world.collections().iter().filter(|it| it.is_ok());
    run.tally.collections += collections.count() as u64;
    run.tally.diffs += run.world.diffs();
    run.tally.imports += run.world.imports();
    run.tally.moves += run.world.moves();
    let [visiting, forwarded] = run.world.visiting_requests();
    run.tally.visiting += visiting;
    run.tally.forwarded += forwarded;
    run.tally
}

struct Run {
    world: World,
    workload: Workload,
    dice: Random,
    effort: Effort,
    tally: Tally,
}

impl Run {
    fn step(&mut self) {
        self.workload.step(&mut self.world);
        if self.dice.below(1000) < self.effort.instants {
            self.try_power_failures();
        }
    }

    fn end_life(&mut self) {
        match self.world.random.below(12) {
            8.. => {
                self.world.kill();
                self.tally.kills += 1;
            }
            0 => {
                self.world.shut_down().expect("nobody cuts the power here");
                self.tally.shutdowns += 1;
            }
            1 => {
                self.world.settle().expect("nobody cuts the power here");
                self.cut();
            }
            _ => self.cut(),
        }
    }

    fn cut(&mut self) {
        self.try_power_failures();
        self.world.crash_somehow();
        self.tally.cuts += 1;
    }

    /// A life that ends after the nth write or flush, wherever that leaves things.
    fn work_until_the_power_goes(&mut self) {
        self.world.disk.stop_after(1 + self.dice.below(60));
        // A full store without a volume to write to does nothing any more.
        for _ in 0..10_000 {
            if self.world.disk.stopped() {
                break;
            }
            self.workload.step(&mut self.world);
        }
        self.try_power_failures();
        self.world.crash_somehow();
        self.tally.nth += 1;
    }

    fn recover(&mut self) {
        self.world.recover();
        self.count_recovery(&RecoveredSizes::of(&self.world));
        if self.world.random.chance(1, 3) {
            self.tally.snapshots_read += self.world.verify_snapshots().expect("the power is back");
        }
    }

    fn count_recovery(&mut self, sizes: &RecoveredSizes) {
        self.tally.recoveries += 1;
        self.tally.volumes += sizes.volumes;
        self.tally.snapshots += sizes.snapshots;
    }

    /// Fails the power at this instant in every way, or in many, and goes on as if it had not.
    fn try_power_failures(&mut self) {
        let outage = self.world.power_failure(self.dice.next_u64());
        let writes = outage.writes();
        let exhaustive = writes.len() <= self.effort.exhaustive;
        let cuts = if exhaustive {
            every_subset(&writes)
        } else {
            let metadata: Vec<bool> = writes.iter().map(|w| outage.is_metadata(w)).collect();
            sample(&metadata, self.effort.samples, &mut self.dice)
        };
        self.tally.instants += 1;
        self.tally.exhausted += u64::from(exhaustive);
        for cut in &cuts {
            self.try_power_cut(&outage, &writes, cut);
        }
        if exhaustive {
            self.tally.enumerated += cuts.len() as u64;
        } else {
            self.tally.sampled += cuts.len() as u64;
        }
        let torn = torn(&writes, self.effort.samples, &mut self.dice);
        for cut in &torn {
            self.try_power_cut(&outage, &writes, cut);
        }
        self.tally.sampled += torn.len() as u64;
    }

    fn try_power_cut(&mut self, outage: &Outage, writes: &[VolatileWrite], cut: &Cut) {
        let _told = ToldOnPanic(|| format!("power cut that left {}", cut.of(writes)));
        let keep = |id, sector| {
            let index = writes.binary_search_by_key(&id, |write| write.id);
            cut.0[index.expect("every volatile write is listed")].keeps(sector)
        };
        let checked = self.world.model.sectors_checked;
        let mut world = outage.recover(self.dice.next_u64(), Keep::Parts(&keep));
        self.count_recovery(&RecoveredSizes::of(&world));
        if self.dice.chance(1, 32) {
            self.go_on(&mut world);
        }
        self.tally.sectors += world.model.sectors_checked - checked;
    }

    /// What was recovered must also bear work: a block it takes for free shows only now.
    fn go_on(&mut self, world: &mut World) {
        self.tally.snapshots_read += world.verify_snapshots().expect("the power is back");
        for _ in 0..self.dice.below(30) {
            self.workload.step(world);
        }
        world.crash_somehow();
        self.tally.cuts += 1;
        world.recover();
        self.count_recovery(&RecoveredSizes::of(world));
    }
}

struct RecoveredSizes {
    volumes: u64,
    snapshots: u64,
}

impl RecoveredSizes {
    fn of(world: &World) -> Self {
        let volumes = world.volumes();
        let snapshots = volumes.iter().map(|id| world.model.snapshots(*id).len() as u64).sum();
        Self { volumes: volumes.len() as u64, snapshots }
    }
}

/// What becomes of one volatile write in a power cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    Lost,
    Kept,
    /// Sectors are kept whose number, modulo 64, is a bit of this.
    Torn(u64),
}

impl Fate {
    fn keeps(self, sector: u64) -> bool {
        match self {
            Self::Lost => false,
            Self::Kept => true,
            Self::Torn(kept) => kept >> (sector % 64) & 1 == 1,
        }
    }

    fn kept_if(kept: bool) -> Self {
        if kept { Self::Kept } else { Self::Lost }
    }
}

/// What becomes of all volatile writes, oldest first.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Cut(Vec<Fate>);

impl Cut {
    /// Tells it, for who has to find out what went wrong.
    fn of(&self, writes: &[VolatileWrite]) -> impl fmt::Display {
        let one = |(write, fate): (&VolatileWrite, &Fate)| {
            format!("\n  {:?} of block {} + {} sectors", fate, write.block, write.sectors)
        };
        writes.iter().zip(&self.0).map(one).collect::<String>()
    }
}

fn every_subset(writes: &[VolatileWrite]) -> Vec<Cut> {
    let subset = |bits: u64| {
        let fate = |index| Fate::kept_if(bits >> index & 1 == 1);
        Cut((0..writes.len()).map(fate).collect())
    };
    (0..1 << writes.len()).map(subset).collect()
}

/// The cruellest, and `count` more at random.
fn sample(metadata: &[bool], count: usize, dice: &mut Random) -> Vec<Cut> {
    let all = |fate: &dyn Fn(usize) -> bool| {
        Cut((0..metadata.len()).map(|index| Fate::kept_if(fate(index))).collect())
    };
    let mut cuts = vec![
        all(&|_| false),
        all(&|_| true),
        all(&|index| metadata[index]),
        all(&|index| !metadata[index]),
    ];
    for _ in 0..count {
        let one = dice.below(metadata.len() as u64) as usize;
        cuts.push(match dice.below(6) {
            0 => all(&|index| index != one),
            1 => all(&|index| index == one),
            2 => all(&|index| index < one), // As they came.
            3 => all(&|index| index > one),
            _ => {
                let odds = 1 + dice.below(7);
                let fates = metadata.iter().map(|_| Fate::kept_if(dice.chance(odds, 8)));
                Cut(fates.collect())
            }
        });
    }
    cuts
}

/// Tears writes of more than one sector, at most `count` of them, each with the others kept, lost,
/// and any of both.
fn torn(writes: &[VolatileWrite], count: usize, dice: &mut Random) -> Vec<Cut> {
    let mut long: Vec<usize> = (0..writes.len()).filter(|i| writes[*i].sectors > 1).collect();
    dice.shuffle(&mut long);
    let mut cuts = Vec::new();
    for &index in long.iter().take(count) {
        for odds in [0, 4, 8] {
            let fates = writes.iter().map(|_| Fate::kept_if(dice.chance(odds, 8)));
            let mut fates: Vec<_> = fates.collect();
            fates[index] = Fate::Torn(match dice.below(3) {
                // Its first part, or its last.
                0 => (1 << (1 + dice.below(writes[index].sectors.min(64) - 1))) - 1,
                1 => u64::MAX << (1 + dice.below(writes[index].sectors.min(64) - 1)),
                _ => dice.next_u64(),
            });
            cuts.push(Cut(fates));
        }
    }
    cuts
}

/// Says on standard error what was going on when somebody panicked.
struct ToldOnPanic<F: Fn() -> String>(F);

impl<F: Fn() -> String> Drop for ToldOnPanic<F> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", (self.0)());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use bessel_mapping::request::{IoKind, IoStatus};

    use super::*;

    #[test]
    fn samples_hold_the_cruellest_cuts_and_torn_ones_tear_one_write() {
        let mut dice = Random::new(1);
        let metadata = [true, false, true];
        let cuts = sample(&metadata, 20, &mut dice);
        let kept = |cut: &Cut| cut.0.iter().map(|fate| fate.keeps(0)).collect::<Vec<_>>();
        let cuts: BTreeSet<_> = cuts.iter().map(kept).collect();
        let inverse = metadata.map(|metadata| !metadata);
        for cruel in [[false; 3], [true; 3], metadata, inverse] {
            assert!(cuts.contains(&cruel[..]), "{cruel:?}");
        }
    }

    /// A volume with a flushed write, and a world whose writes are all volatile or all durable.
    fn world() -> (World, bessel_mapping::request::VolumeId) {
        let mut world =
            World::new(WorldConfig { schedule: Schedule::AtOnce, ..WorldConfig::new(1) });
        let volume = world.create(ByteCount::new(8 << 20)).unwrap();
        world.write(volume, 0, 8).unwrap();
        world.flush(volume).unwrap();
        (world, volume)
    }

    #[test]
    fn every_subset_of_the_volatile_writes_is_one_recovery_and_the_world_goes_on() {
        let (mut world, volume) = world();
        world.write(volume, 8, 24).unwrap();
        let outage = world.power_failure(1);
        let writes = outage.writes();
        assert!(!writes.is_empty(), "nobody has flushed them");
        let subsets = every_subset(&writes);
        assert_eq!(subsets.len(), 1 << writes.len());
        assert!(subsets.iter().enumerate().all(|(i, cut)| !subsets[..i].contains(cut)));
        let torn = torn(&writes, 10, &mut Random::new(1));
        assert!(!torn.is_empty());
        for cut in subsets.iter().chain(&torn) {
            let keep = |id, sector| {
                let index = writes.binary_search_by_key(&id, |write| write.id).unwrap();
                cut.0[index].keeps(sector)
            };
            outage.recover(7, Keep::Parts(&keep));
        }
        assert_eq!(world.disk.counters().crashes, 0);
        assert_eq!(world.read(volume, 0, 32).unwrap(), IoStatus::Done);
    }

    #[test]
    #[should_panic(expected = "sector 0 came back as value 1, allowed [")]
    fn what_was_acknowledged_and_is_not_there_is_seen() {
        let (mut world, volume) = world();
        // A write and a flush that only the oracle has heard of.
        for (kind, sectors) in [(IoKind::Write, 8), (IoKind::Flush, 0)] {
            let op = world.model.begin(volume, kind, 0, sectors);
            world.model.end(op, IoStatus::Done, &[]);
        }
        world.power_failure(1).recover(7, Keep::Everything);
    }
}
