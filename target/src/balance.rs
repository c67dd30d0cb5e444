//! When a volume should have another home, by what reactors and volumes did: decisions, and nothing else.
//!
//! A reactor's load is the share of its time that it spends on work. What of that a volume causes nobody
//! measures on the hot path; it is taken to be the volume's share of what all volumes there asked for.
//!
//! Nothing flaps. A volume is moved only where the other reactor stays less busy by a clear margin than the
//! busiest was, so that moving it back would be refused while its load stays what it is; several looks must
//! agree, so that no burst decides; after each there is a rest, in which its effect is seen first; and a
//! volume that was moved stays for a good while, should its load not be what was thought.

use bessel_mapping::request::VolumeId;
use bessel_mapping::volume::VolumeCounters;
use bessel_reactor::clock::Instant;
use std::collections::BTreeMap;
use std::time::Duration;

/// A reactor that is less busy than this, in thousandths of its time, is not relieved: its guests hardly wait.
const BUSY_MIN: u64 = 600;
/// How much less busy than the busiest reactor was the other must stay, in thousandths of its time: more
/// than a load that is steady varies from one look to the next.
const GAIN_MIN: u64 = 150;
/// What a volume must be worth, in the same: a pause of some milliseconds.
const SHARE_MIN: u64 = 20;
/// How often a move must be the best one, running.
const AGREEING: u32 = 3;
/// From a move to the next.
const REST: Duration = Duration::from_secs(60);
/// From a volume's move, or a vain attempt, to its next: what a volume costs is taken to be what it asks
/// for, and where that is wrong it would go to and fro.
const STAY: Duration = Duration::from_secs(3600);
/// Looks that come sooner after the last one tell nothing: whoever looks had to wait, and comes twice.
const PERIOD_MIN: Duration = Duration::from_secs(2);
/// Bytes that cost as much as a request: moving these takes about as long as all the rest of one.
const BYTES_PER_COST: u64 = 32 << 10;

/// What a volume did in a while.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct VolumeLoad {
    pub(crate) volume: VolumeId,
    /// What it asked for, in units that matter only beside each other.
    pub(crate) cost: u64,
    /// It may be moved.
    pub(crate) movable: bool,
}

/// What a reactor did in a while.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct ReactorLoad {
    /// Thousandths of the time that went into work.
    pub(crate) busy: u64,
    pub(crate) volumes: Vec<VolumeLoad>,
}

/// What is to be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Move {
    pub(crate) volume: VolumeId,
    /// Indices of reactors.
    pub(crate) source: usize,
    pub(crate) target: usize,
}

/// The move from the busiest reactor to the least busy one after which the busier of the two is least
/// busy; none when that would gain little.
pub(crate) fn plan(reactors: &[ReactorLoad]) -> Option<Move> {
    let busy = |at: &usize| reactors[*at].busy;
    // The first of those that are equally busy, in both cases.
    let source = (0..reactors.len()).rev().max_by_key(busy)?;
    let target = (0..reactors.len()).min_by_key(busy)?;
    let ReactorLoad { busy: most, volumes } = &reactors[source];
    let all: u64 = volumes.iter().map(|volume| volume.cost).sum();
    if source == target || *most < BUSY_MIN || all == 0 {
        return None;
    }
    let share = |volume: &VolumeLoad| {
        (u128::from(*most) * u128::from(volume.cost) / u128::from(all)) as u64
    };
    let after =
        |volume: &VolumeLoad| (most - share(volume)).max(reactors[target].busy + share(volume));
    let fits = |volume: &&VolumeLoad| {
        let share = share(volume);
        volume.movable && share >= SHARE_MIN && reactors[target].busy + share + GAIN_MIN <= *most
    };
    let best = volumes.iter().filter(fits).min_by_key(|volume| after(volume))?;
    Some(Move { volume: best.volume, source, target })
}

/// What a volume has asked for since it was opened.
pub(crate) fn cost(counters: &VolumeCounters) -> u64 {
    let VolumeCounters { reads, writes, flushes, unmaps, read_bytes, write_bytes, .. } = counters;
    reads + writes + flushes + unmaps + (read_bytes + write_bytes) / BYTES_PER_COST
}

/// What was counted up to some moment.
#[derive(Default)]
struct Sample {
    at: Instant,
    busy_ns: Vec<u64>,
    /// Of volumes, if anybody was busy enough to ask for it.
    costs: Option<BTreeMap<VolumeId, u64>>,
}

/// A volume as it is counted now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counted {
    pub(crate) volume: VolumeId,
    /// Index of its reactor.
    pub(crate) home: usize,
    /// Since it was opened.
    pub(crate) cost: u64,
    pub(crate) movable: bool,
}

/// Looks now and then, and says what is to be done.
#[derive(Default)]
pub(crate) struct Balancer {
    before: Option<Sample>,
    /// The move that was best at the last look, and how often it was, running.
    favoured: Option<(Move, u32)>,
    rests_until: Instant,
    /// When volumes were moved, or were to be.
    moved: BTreeMap<VolumeId, Instant>,
}

impl Balancer {
    /// Takes in for how long each reactor has worked since the start, and asks what the volumes have done
    /// if that matters.
    pub(crate) fn look(
        &mut self,
        now: Instant,
        busy_ns: Vec<u64>,
        volumes: impl FnOnce() -> Option<Vec<Counted>>,
    ) -> Option<Move> {
        if self.before.as_ref().is_some_and(|before| now.since(before.at) < PERIOD_MIN) {
            return None;
        }
        let before = self.before.replace(Sample { at: now, busy_ns, costs: None })?;
        let sample = self.before.as_mut().expect("it was just put there");
        let period = now.since(before.at).as_nanos().max(1);
        let busy = sample.busy_ns.iter().zip(&before.busy_ns).map(|(now, before)| {
            (u128::from(now.saturating_sub(*before)) * 1000 / period).min(1000) as u64
        });
        let busy: Vec<u64> = busy.collect();
        if now < self.rests_until || busy.iter().all(|busy| *busy < BUSY_MIN) {
            self.favoured = None;
            return None;
        }
        self.moved.retain(|_, at| now.since(*at) < STAY);
        let counted = volumes()?;
        sample.costs = Some(counted.iter().map(|it| (it.volume, it.cost)).collect());
        let costs = before.costs?;
        let mut reactors: Vec<ReactorLoad> =
            busy.into_iter().map(|busy| ReactorLoad { busy, ..ReactorLoad::default() }).collect();
        for Counted { volume, home, cost, movable } in counted {
            // One that was opened anew counts from nothing.
            let before = costs.get(&volume).copied().filter(|before| *before <= cost);
            let cost = cost - before.unwrap_or(0);
            let movable = movable && !self.moved.contains_key(&volume);
            reactors[home].volumes.push(VolumeLoad { volume, cost, movable });
        }
        let best = plan(&reactors);
        let times = match (&self.favoured, best) {
            // Which of several volumes that do as much is a matter of chance.
            (Some((favoured, times)), Some(best))
                if (favoured.source, favoured.target) == (best.source, best.target) =>
            {
                times + 1
            }
            _ => 1,
        };
        self.favoured = best.map(|best| (best, times));
        if times < AGREEING {
            return None;
        }
        self.favoured = None;
        self.rests_until = now.after(REST);
        self.moved.extend(best.map(|best| (best.volume, now)));
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn volume(id: u64, cost: u64) -> VolumeLoad {
        VolumeLoad { volume: VolumeId(id), cost, movable: true }
    }

    fn reactor(busy: u64, volumes: &[(u64, u64)]) -> ReactorLoad {
        let volumes = volumes.iter().map(|(id, cost)| volume(*id, *cost)).collect();
        ReactorLoad { busy, volumes }
    }

    fn planned(reactors: &[ReactorLoad]) -> Option<(u64, usize, usize)> {
        plan(reactors).map(|it| (it.volume.0, it.source, it.target))
    }

    #[test]
    fn the_busiest_reactor_gives_what_evens_things_out_best() {
        let busy = reactor(900, &[(1, 10), (2, 40), (3, 50)]);
        assert_eq!(planned(&[reactor(100, &[(4, 1)]), busy.clone()]), Some((2, 1, 0)));
        // Half of it would make the other one as busy as this.
        assert_eq!(planned(&[busy.clone(), reactor(500, &[])]), Some((1, 0, 1)));
        assert_eq!(planned(&[busy.clone(), reactor(600, &[]), reactor(0, &[])]), Some((3, 0, 2)));
        let whole = reactor(1000, &[(1, 999), (2, 1)]);
        assert_eq!(planned(&[whole, reactor(0, &[])]), None, "then the other one would be it");
    }

    #[test]
    fn many_small_volumes_are_moved_one_by_one() {
        let thirty: Vec<(u64, u64)> = (0..30).map(|id| (id, 10)).collect();
        assert_eq!(planned(&[reactor(1000, &thirty), reactor(0, &[])]), Some((0, 0, 1)));
        let hundred: Vec<(u64, u64)> = (0..100).map(|id| (id, 10)).collect();
        assert_eq!(planned(&[reactor(1000, &hundred), reactor(0, &[])]), None, "not worth it");
    }

    #[test]
    fn nothing_moves_for_little() {
        assert_eq!(planned(&[]), None);
        assert_eq!(planned(&[reactor(1000, &[(1, 1), (2, 1)])]), None);
        assert_eq!(planned(&[reactor(599, &[(1, 1), (2, 1)]), reactor(0, &[])]), None);
        assert_eq!(planned(&[reactor(1000, &[(1, 1)]), reactor(0, &[])]), None);
        assert_eq!(planned(&[reactor(1000, &[(1, 0), (2, 0)]), reactor(0, &[])]), None);
        assert_eq!(planned(&[reactor(800, &[(1, 1), (2, 1)]), reactor(300, &[])]), None);
        let mut held = reactor(1000, &[(1, 1), (2, 1), (3, 1)]);
        held.volumes.iter_mut().for_each(|volume| volume.movable = false);
        assert_eq!(planned(&[held.clone(), reactor(0, &[])]), None);
        held.volumes[2].movable = true;
        assert_eq!(planned(&[held, reactor(0, &[])]), Some((3, 0, 1)));
    }

    /// Whatever the loads are, with each move the maximum falls, so they come to an end.
    #[test]
    fn moves_never_go_in_circles() {
        let mut state = 5u64;
        let mut dice = |below: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        for _ in 0..2000 {
            let count = 2 + dice(4) as usize;
            let mut homes: Vec<usize> =
                (0..1 + dice(12)).map(|_| dice(count as u64) as usize).collect();
            // Thousandths of a reactor each; who has too much to do is busy all the time.
            let loads: Vec<u64> = homes.iter().map(|_| dice(500)).collect();
            let mut moves = 0;
            loop {
                let mut reactors = vec![ReactorLoad::default(); count];
                for (id, home) in homes.iter().enumerate() {
                    reactors[*home].busy += loads[id];
                    reactors[*home].volumes.push(volume(id as u64, loads[id]));
                }
                let most = reactors.iter().map(|it| it.busy).max().unwrap();
                let Some(Move { volume, source, target }) = plan(&reactors) else { break };
                let load = loads[volume.0 as usize];
                assert_eq!(homes[volume.0 as usize], source);
                assert!(reactors[target].busy + load + GAIN_MIN <= most + 1, "{reactors:?}");
                homes[volume.0 as usize] = target;
                moves += 1;
                assert!(moves < 100, "{loads:?}");
            }
        }
    }

    struct Machine {
        balancer: Balancer,
        seconds: u64,
        busy_ns: Vec<u64>,
        costs: Vec<u64>,
        homes: Vec<usize>,
    }

    impl Machine {
        /// Five seconds, in which reactors are so busy and volumes do so much.
        fn pass(&mut self, busy: [u64; 2], costs: [u64; 3]) -> Option<(u64, usize)> {
            self.seconds += 5;
            for (total, busy) in self.busy_ns.iter_mut().zip(busy) {
                *total += busy * 5 * SECOND / 1000;
            }
            self.costs.iter_mut().zip(costs).for_each(|(total, cost)| *total += cost);
            let now = Instant::from_nanos(self.seconds * SECOND);
            let (costs, homes) = (&self.costs, &self.homes);
            let counted = |id: usize| Counted {
                volume: VolumeId(id as u64),
                home: homes[id],
                cost: costs[id],
                movable: true,
            };
            let found = self
                .balancer
                .look(now, self.busy_ns.clone(), || Some((0..3).map(counted).collect()))?;
            self.homes[found.volume.0 as usize] = found.target;
            Some((found.volume.0, found.target))
        }
    }

    #[test]
    fn what_lasts_decides_and_then_there_is_a_rest() {
        let mut machine = Machine {
            balancer: Balancer::default(),
            seconds: 100,
            busy_ns: vec![7 * SECOND, 9 * SECOND],
            costs: vec![1_000_000, 5, 5],
            homes: vec![0, 0, 1],
        };
        let mut pass = |busy, costs| machine.pass(busy, costs);
        let one_sided = ([900, 100], [300, 500, 50]);
        assert_eq!(pass([0, 0], [0, 0, 0]), None);
        // The first look at volumes has nothing to compare with; then three of one mind.
        for _ in 0..3 {
            assert_eq!(pass(one_sided.0, one_sided.1), None);
        }
        // A burst elsewhere: counted anew.
        assert_eq!(pass([500, 500], [300, 500, 5000]), None);
        for _ in 0..3 {
            assert_eq!(pass(one_sided.0, one_sided.1), None);
        }
        assert_eq!(pass(one_sided.0, one_sided.1), Some((0, 1)));
        // Whatever it is like afterwards, for a minute nothing moves.
        for _ in 0..11 {
            assert_eq!(pass([100, 1000], [500, 500, 500]), None);
        }
        for _ in 0..3 {
            assert_eq!(pass([100, 1000], [500, 500, 500]), None);
        }
        // Not the one that came.
        assert_eq!(pass([100, 1000], [500, 500, 500]), Some((2, 0)));
        // A volume that is opened anew counts from nothing, not from what was.
        machine.costs[1] = 0;
        assert_eq!(machine.pass([1000, 1000], [1, 1, 1]), None);
    }
}
