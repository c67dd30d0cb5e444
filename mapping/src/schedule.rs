//! Snapshots by schedule: when one is due, and which old ones go.
//!
//! Whoever keeps time asks a [`Timetable`] what is due and tells it what came of that; the daemon does
//! so on a thread of its own, the simulator in virtual time. It holds no clock and speaks to no shard.
//!
//! A volume has at most [`IN_FLIGHT_MAX`] scheduled snapshots under way: one that takes longer than it
//! is to the next does not stop that. When the next is due and so many are not answered, that one is
//! skipped and counted: a slow device gets fewer snapshots, not a queue of them. Nor is a stall made up
//! for afterwards.
//!
//! A volume may have a million snapshots. What a schedule knows of them it is told in pieces, and thinning
//! looks at some thousands at a time; it begins when all are known.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::time::Duration;

use bessel_reactor::clock::{Instant, WallTime};

use crate::planted::{self, Bug};

/// Least time between two snapshots of a schedule.
pub const EVERY_MIN: Duration = Duration::from_millis(1);
/// Most time between two snapshots of a schedule.
pub const EVERY_MAX: Duration = Duration::from_secs(365 * 24 * 3600);
/// Most ages in a [`Keep`]: ten years in steps of 3 are 16 from a millisecond on.
pub const AGES_MAX: usize = 16;
/// Most snapshots of a schedule under way: enough for a device that takes 8 ms for one where one is due
/// every millisecond.
pub const IN_FLIGHT_MAX: usize = 8;
/// Least time between two rounds of thinning: each writes the log blocks of what goes.
const THIN_INTERVAL: Duration = Duration::from_secs(1);
/// Snapshots that thinning looks at, and most that go, at once: those after them follow soon.
const THIN_STEP: usize = 4096;
/// Time from one such step to the next.
const THIN_STEP_INTERVAL: Duration = Duration::from_millis(5);

/// How often a volume's snapshots are taken, and which are kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Schedule {
    /// Time between two snapshots.
    pub every: Duration,
    /// Which stay.
    pub keep: Keep,
}

/// Which of a volume's snapshots stay. Those with a label and the newest one always do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Keep {
    /// All.
    All,
    /// So many without a label, the newest ones.
    Newest(u64),
    /// By age, from young to old; older ones than the last go.
    Ages(Vec<Age>),
}

/// What stays up to some age.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Age {
    /// For snapshots up to this old, and older than those of the age before.
    pub up_to: Duration,
    /// Of each period of this length, counted from 1970, the oldest stays; none: all do.
    pub spacing: Option<Duration>,
}

/// Why a schedule makes no sense.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ScheduleError {
    /// Too often, or hardly ever.
    #[error("a snapshot every {0:?} will not do; give 1ms to 365d")]
    Every(Duration),
    /// Nothing would stay.
    #[error("keeping no snapshot will not do; give at least 1, a list of ages, or all")]
    KeepsNone,
    /// No age, or more than there can be.
    #[error("{0} ages to keep will not do; give 1 to 16")]
    AgeCount(usize),
    /// An age that is not above the one before it.
    #[error(
        "ages to keep go from young to old, and {0:?} is not above the one before; put them in order"
    )]
    AgeOrder(Duration),
    /// A spacing below the one before it, which what it would keep has gone by already.
    #[error(
        "older snapshots cannot lie closer than younger ones, as with one every {0:?}; space them wider"
    )]
    SpacingOrder(Duration),
    /// A spacing that keeps nothing of its age.
    #[error("one snapshot every {0:?} is less than one for that age; give it a longer age")]
    SpacingAboveAge(Duration),
}

impl Schedule {
    /// Checks it.
    ///
    /// # Errors
    /// The first part that makes no sense.
    pub fn check(&self) -> Result<(), ScheduleError> {
        if !(EVERY_MIN..=EVERY_MAX).contains(&self.every) {
            return Err(ScheduleError::Every(self.every));
        }
        match &self.keep {
            Keep::All => Ok(()),
            Keep::Newest(0) => Err(ScheduleError::KeepsNone),
            Keep::Newest(_) => Ok(()),
            Keep::Ages(ages) => check_ages(ages),
        }
    }
}

fn check_ages(ages: &[Age]) -> Result<(), ScheduleError> {
    if !(1..=AGES_MAX).contains(&ages.len()) {
        return Err(ScheduleError::AgeCount(ages.len()));
    }
    let (mut age_before, mut spacing_before) = (Duration::ZERO, Duration::ZERO);
    for Age { up_to, spacing } in ages {
        if *up_to <= age_before {
            return Err(ScheduleError::AgeOrder(*up_to));
        }
        let spacing = spacing.unwrap_or_default();
        if spacing < spacing_before {
            return Err(ScheduleError::SpacingOrder(spacing));
        }
        if spacing > *up_to {
            return Err(ScheduleError::SpacingAboveAge(spacing));
        }
        (age_before, spacing_before) = (*up_to, spacing);
    }
    Ok(())
}

/// A snapshot that is not deleted, as thinning sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Known {
    /// Position in its volume's log.
    pub sequence: u64,
    /// When it was taken.
    pub time: WallTime,
    /// It has a label.
    pub labelled: bool,
}

/// Which of a volume's snapshots go at `now`, in the order of `snapshots`, which is that of its log.
/// What stays would stay if it were asked again.
pub fn to_thin(snapshots: &[Known], keep: &Keep, now: WallTime) -> Vec<u64> {
    let Some(newest) = snapshots.last() else { return Vec::new() };
    let may_go = |it: &&Known| {
        (!it.labelled || planted::is(Bug::ThinsLabelled)) && it.sequence != newest.sequence
    };
    match keep {
        Keep::All => Vec::new(),
        Keep::Newest(count) => {
            let plain = snapshots.iter().filter(|it| !it.labelled).count() as u64;
            let excess = plain.saturating_sub(*count);
            let oldest = snapshots.iter().filter(may_go).take(excess as usize);
            oldest.map(|it| it.sequence).collect()
        }
        Keep::Ages(ages) => {
            // The oldest of each period that a spacing makes, by the age it is of.
            let mut kept: HashMap<(usize, u64), (WallTime, u64)> = HashMap::new();
            for it in snapshots {
                if let Some(Place::Period(period)) = place(it.time, ages, now) {
                    let this = (it.time, it.sequence);
                    kept.entry(period)
                        .and_modify(|oldest| *oldest = this.min(*oldest))
                        .or_insert(this);
                }
            }
            let stays = |it: &Known| match place(it.time, ages, now) {
                None => false,
                Some(Place::Free) => true,
                Some(Place::Period(period)) => kept[&period] == (it.time, it.sequence),
            };
            let gone = snapshots.iter().filter(may_go).filter(|it| !stays(it));
            gone.map(|it| it.sequence).collect()
        }
    }
}

/// Where a snapshot of some age belongs.
enum Place {
    /// Where all stay.
    Free,
    /// In this period of this age, of which one stays.
    Period((usize, u64)),
}

/// None when it is older than anything that stays.
fn place(time: WallTime, ages: &[Age], now: WallTime) -> Option<Place> {
    let time = time.as_unix_nanos();
    // A clock that was set back leaves snapshots of the future, which are as young as can be.
    let age = Duration::from_nanos(now.as_unix_nanos().saturating_sub(time));
    let index = ages.iter().position(|it| age <= it.up_to)?;
    Some(match ages[index].spacing {
        None => Place::Free,
        Some(spacing) => Place::Period((index, time / spacing.as_nanos().max(1) as u64)),
    })
}

/// What a schedule has come to.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct ScheduleCounters {
    /// Snapshots taken.
    pub taken: u64,
    /// Snapshots that were due and not taken, since too many before were still under way or nobody asked
    /// in time.
    pub skipped: u64,
    /// Snapshots deleted because they were not to be kept.
    pub thinned: u64,
    /// Snapshots and deletions that failed.
    pub failed: u64,
}

/// What is to be done for a volume now.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Due {
    /// Take a snapshot, and say [`Timetable::taken`] or [`Timetable::failed`].
    pub snapshot: bool,
    /// Delete these snapshots, if any, and say [`Timetable::thinned`]. In the order of the log.
    pub thin: Vec<u64>,
}

/// Snapshots of a volume that are not deleted, as far as some of them may go. Those that somebody else
/// takes or deletes it is told of.
#[derive(Clone, Default, Debug)]
struct Live {
    plain: BTreeMap<u64, WallTime>,
    labelled: BTreeMap<u64, WallTime>,
    /// All of them by age, where that matters: those of one period follow one another.
    by_time: BTreeSet<(WallTime, u64)>,
}

impl Live {
    fn insert(&mut self, snapshot: Known, keep: &Keep) {
        self.remove(snapshot.sequence);
        let Known { sequence, time, labelled } = snapshot;
        match keep {
            Keep::All => return,
            Keep::Newest(_) => {}
            Keep::Ages(_) => {
                self.by_time.insert((time, sequence));
            }
        }
        let of_kind = if labelled { &mut self.labelled } else { &mut self.plain };
        of_kind.insert(sequence, time);
    }

    fn remove(&mut self, sequence: u64) {
        let time = self.plain.remove(&sequence).or_else(|| self.labelled.remove(&sequence));
        if let Some(time) = time {
            self.by_time.remove(&(time, sequence));
        }
    }

    /// The newest one by its place in the log.
    fn newest(&self) -> Option<u64> {
        let last = |of_kind: &BTreeMap<u64, WallTime>| of_kind.last_key_value().map(|(it, _)| *it);
        last(&self.plain).max(last(&self.labelled))
    }

    /// One that thinning may delete, if it is not to be kept.
    fn may_go(&self, sequence: u64, newest: u64) -> bool {
        let labelled = || self.labelled.contains_key(&sequence) && !planted::is(Bug::ThinsLabelled);
        sequence != newest && !labelled()
    }
}

/// A look at all snapshots from old to young, a step at a time. The time is that of its beginning.
#[derive(Clone, Copy, Debug)]
struct Pass {
    now: WallTime,
    after: Option<(WallTime, u64)>,
    /// The period that was looked at last.
    period: Option<(usize, u64)>,
}

/// A volume's schedule under way. See the module's documentation.
#[derive(Clone, Debug)]
pub struct Timetable {
    schedule: Schedule,
    due: Instant,
    thin_due: Instant,
    /// Snapshots under way.
    in_flight: usize,
    /// A deletion is.
    thinning: bool,
    live: Live,
    /// All snapshots that there were at the beginning are known.
    complete: bool,
    /// How far the look at all snapshots has come that is under way.
    pass: Option<Pass>,
    counters: ScheduleCounters,
}

impl Timetable {
    /// A schedule whose first snapshot is due at `now`, over a volume with these snapshots.
    ///
    /// # Panics
    /// When the schedule makes no sense: it is checked where it comes in.
    pub fn new(schedule: Schedule, now: Instant, live: impl IntoIterator<Item = Known>) -> Self {
        let mut table = Self::begin(schedule, now);
        table.known(live, true);
        table
    }

    /// The same, of a volume whose snapshots come later, by [`Timetable::known`].
    ///
    /// # Panics
    /// When the schedule makes no sense: it is checked where it comes in.
    pub fn begin(schedule: Schedule, now: Instant) -> Self {
        assert_eq!(schedule.check(), Ok(()), "{schedule:?}");
        Self {
            thin_due: now.after(schedule.every.max(THIN_INTERVAL)),
            schedule,
            due: now,
            in_flight: 0,
            thinning: false,
            live: Live::default(),
            complete: false,
            pass: None,
            counters: ScheduleCounters::default(),
        }
    }

    /// The schedule.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// What it has come to.
    pub fn counters(&self) -> ScheduleCounters {
        self.counters
    }

    /// When to ask again.
    pub fn next(&self) -> Instant {
        self.due.min(self.thin_due)
    }

    /// What is due at `now`, which is `wall` in the log.
    pub fn poll(&mut self, now: Instant, wall: WallTime) -> Due {
        let mut due = Due::default();
        if self.due <= now {
            let every = self.schedule.every.as_nanos() as u64;
            let missed = now.since(self.due).as_nanos() as u64 / every;
            due.snapshot = self.in_flight < IN_FLIGHT_MAX;
            self.counters.skipped += missed + u64::from(!due.snapshot);
            self.in_flight += usize::from(due.snapshot);
            self.due = self.due.after(Duration::from_nanos(every.saturating_mul(missed + 1)));
        }
        if self.thin_due <= now {
            self.thin_due = now.after(self.schedule.every.max(THIN_INTERVAL));
            if !self.thinning && self.complete {
                due.thin = self.next_to_thin(wall);
                self.thinning = !due.thin.is_empty();
                if self.pass.is_some() {
                    self.thin_due = now.after(THIN_STEP_INTERVAL);
                }
            }
        }
        due
    }

    /// Some of the snapshots that the volume had at the beginning; `complete` with the last of them.
    pub fn known(&mut self, snapshots: impl IntoIterator<Item = Known>, complete: bool) {
        snapshots.into_iter().for_each(|snapshot| self.note(snapshot));
        self.complete |= complete;
    }

    /// Some of what goes: what [`to_thin`] says, a step at a time.
    fn next_to_thin(&mut self, wall: WallTime) -> Vec<u64> {
        let Some(newest) = self.live.newest() else { return Vec::new() };
        match &self.schedule.keep {
            Keep::All => Vec::new(),
            Keep::Newest(count) => {
                let excess = (self.live.plain.len() as u64).saturating_sub(*count);
                let plain = self.live.plain.keys().copied();
                let oldest = plain.filter(|it| self.live.may_go(*it, newest)).take(excess as usize);
                oldest.take(THIN_STEP).collect()
            }
            Keep::Ages(ages) => {
                let start = Pass { now: wall, after: None, period: None };
                let mut pass = self.pass.take().unwrap_or(start);
                let from = pass.after.map_or(Bound::Unbounded, Bound::Excluded);
                let mut gone = Vec::new();
                let from_old_to_young = self.live.by_time.range((from, Bound::Unbounded));
                for (seen, &(time, sequence)) in from_old_to_young.enumerate() {
                    if seen == THIN_STEP {
                        self.pass = Some(pass);
                        break;
                    }
                    pass.after = Some((time, sequence));
                    let stays = match place(time, ages, pass.now) {
                        None => false,
                        Some(Place::Free) => true,
                        // They come in order of age, so the first of a period is its oldest.
                        Some(Place::Period(period)) => pass.period.replace(period) != Some(period),
                    };
                    if !stays && self.live.may_go(sequence, newest) {
                        gone.push(sequence);
                    }
                }
                gone.sort_unstable();
                gone
            }
        }
    }

    fn answered(&mut self) {
        self.in_flight = self.in_flight.checked_sub(1).expect("who answers was asked");
    }

    /// A snapshot that was due is there.
    pub fn taken(&mut self, sequence: u64, time: WallTime) {
        self.answered();
        self.counters.taken += 1;
        self.note(Known { sequence, time, labelled: false });
    }

    /// A snapshot that was due could not be taken.
    pub fn failed(&mut self) {
        self.answered();
        self.counters.failed += 1;
    }

    /// The snapshot that was due could not even be asked for.
    pub fn skipped(&mut self) {
        self.answered();
        self.counters.skipped += 1;
    }

    /// Snapshots that were asked for and not answered.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Of the snapshots that were to go, these are gone; none when that failed.
    pub fn thinned(&mut self, gone: Option<&[u64]>) {
        self.thinning = false;
        match gone {
            Some(gone) => {
                self.counters.thinned += gone.len() as u64;
                gone.iter().for_each(|sequence| self.forget(*sequence));
            }
            None => self.counters.failed += 1,
        }
    }

    /// Somebody has taken a snapshot, or given one a label or taken it away.
    pub fn note(&mut self, snapshot: Known) {
        self.live.insert(snapshot, &self.schedule.keep);
    }

    /// Somebody has deleted a snapshot.
    pub fn forget(&mut self, sequence: u64) {
        self.live.remove(sequence);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bessel_reactor::device::sim::Random;
    use std::collections::BTreeSet;

    const S: u64 = 1_000_000_000;

    fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    fn age(up_to: u64, spacing: Option<u64>) -> Age {
        Age { up_to: seconds(up_to), spacing: spacing.map(seconds) }
    }

    fn grandfather() -> Keep {
        Keep::Ages(vec![age(60, None), age(3600, Some(1)), age(86_400, Some(60))])
    }

    fn known(sequence: u64, nanoseconds: u64) -> Known {
        Known { sequence, time: WallTime::from_unix_nanos(nanoseconds), labelled: false }
    }

    fn policy(random: &mut Random) -> Keep {
        if random.chance(1, 4) {
            return Keep::Newest(1 + random.below(20));
        }
        let (mut ages, mut up_to, mut spacing) = (Vec::new(), 0, 0);
        for _ in 0..1 + random.below(4) {
            up_to += 1 + random.below(40 * S);
            spacing += random.below(up_to / 4 + 1);
            let spacing = (spacing > 0).then(|| Duration::from_nanos(spacing));
            ages.push(Age { up_to: Duration::from_nanos(up_to), spacing });
        }
        Keep::Ages(ages)
    }

    fn history(random: &mut Random) -> Vec<Known> {
        let mut time = 1_000 * S;
        let step = 1 + random.below(3 * S);
        let snapshots = (0..random.below(200)).map(|sequence| {
            // Now and then the clock is set back.
            let back = if random.chance(1, 30) { random.below(10 * S) } else { 0 };
            time = (time + random.below(step)).saturating_sub(back);
            Known { labelled: random.chance(1, 10), ..known(sequence * 2, time) }
        });
        snapshots.collect()
    }

    #[test]
    fn thinning_keeps_what_it_promises_and_is_done_when_it_is_done() {
        for seed in 0..3000 {
            let random = &mut Random::new(seed);
            let (keep, snapshots) = (policy(random), history(random));
            let schedule = Schedule { every: EVERY_MIN, keep: keep.clone() };
            assert_eq!(schedule.check(), Ok(()), "seed {seed}");
            let now = WallTime::from_unix_nanos(1_000 * S + random.below(400 * S));
            let gone = to_thin(&snapshots, &keep, now);
            assert_eq!(gone, to_thin(&snapshots, &keep, now), "seed {seed}: deterministic");
            let gone: BTreeSet<u64> = gone.into_iter().collect();
            let (gone, left): (Vec<Known>, Vec<Known>) =
                snapshots.iter().partition(|it| gone.contains(&it.sequence));
            assert_eq!(to_thin(&left, &keep, now), [], "seed {seed}: done when it is done");
            assert!(gone.iter().all(|it| !it.labelled), "seed {seed}: labels keep");
            assert_eq!(snapshots.last(), left.last(), "seed {seed}: the newest stays");
            match &keep {
                Keep::All => unreachable!("not drawn"),
                Keep::Newest(count) => {
                    let plain = |all: &[Known]| all.iter().filter(|it| !it.labelled).count() as u64;
                    let newest_labelled = snapshots.last().is_some_and(|it| it.labelled);
                    let expected = plain(&snapshots).min(*count);
                    assert_eq!(plain(&left), expected, "seed {seed}");
                    let oldest_left = left.iter().find(|it| !it.labelled);
                    let older =
                        |it: &Known| oldest_left.is_none_or(|left| it.sequence < left.sequence);
                    assert!(
                        gone.iter().all(older) || newest_labelled,
                        "seed {seed}: the newest ones"
                    );
                }
                Keep::Ages(ages) => check_ages_kept(seed, ages, now, &gone, &left),
            }
        }
    }

    fn check_ages_kept(seed: u64, ages: &[Age], now: WallTime, gone: &[Known], left: &[Known]) {
        let old = |it: &Known| now.as_unix_nanos().saturating_sub(it.time.as_unix_nanos());
        let rule = |it: &Known| ages.iter().find(|age| u128::from(old(it)) <= age.up_to.as_nanos());
        for it in gone {
            let Some(Age { spacing, .. }) = rule(it) else { continue }; // Older than all.
            let spacing = spacing.expect("where all stay, none goes").as_nanos() as u64;
            let near = |other: &&Known| {
                rule(other) == rule(it)
                    && other.time.as_unix_nanos() / spacing == it.time.as_unix_nanos() / spacing
            };
            let stayed = left.iter().filter(near).min_by_key(|other| other.time);
            assert!(
                stayed.is_some_and(|other| other.time <= it.time),
                "seed {seed}: {it:?} is missed"
            );
        }
        let mut periods = BTreeSet::new();
        let newest = left.last().map(|it| it.sequence);
        for it in left.iter().filter(|it| !it.labelled && Some(it.sequence) != newest) {
            let rule = rule(it).unwrap_or_else(|| panic!("seed {seed}: {it:?} is too old"));
            if let Some(spacing) = rule.spacing {
                let period = it.time.as_unix_nanos() / spacing.as_nanos() as u64;
                assert!(periods.insert((rule.up_to, period)), "seed {seed}: {it:?} is too close");
            }
        }
    }

    /// Thinned again and again as time goes on, as by the daemon.
    #[test]
    fn a_day_of_snapshots_is_dense_where_it_is_young_and_even_where_it_is_old() {
        let keep = grandfather();
        let mut live: Vec<Known> = Vec::new();
        let end = 26 * 3600 * 2;
        for half in 0..end {
            live.push(known(half, half * S / 2));
            if half % 500 == 0 || half + 1 == end {
                let now = WallTime::from_unix_nanos(half * S / 2);
                let gone: BTreeSet<u64> = to_thin(&live, &keep, now).into_iter().collect();
                live.retain(|it| !gone.contains(&it.sequence));
            }
        }
        let now = (end - 1) * S / 2;
        let count = |from: u64, to: u64| {
            let age = |it: &&Known| (from * S..to * S).contains(&(now - it.time.as_unix_nanos()));
            live.iter().filter(age).count()
        };
        assert_eq!(count(0, 60), 120);
        assert_eq!(count(61, 3600), 3539);
        let minutes = count(3660, 86_340);
        assert!((1377..=1379).contains(&minutes), "{minutes}");
        assert_eq!(count(86_401, u64::MAX / S), 0);
        let gap = |pair: &[Known]| pair[1].time.as_unix_nanos() - pair[0].time.as_unix_nanos();
        assert!(live.windows(2).all(|pair| gap(pair) <= 60 * S));
    }

    #[test]
    fn schedules_that_make_no_sense_say_why() {
        let keep = |keep| Schedule { every: seconds(1), keep }.check();
        assert_eq!(keep(Keep::All), Ok(()));
        assert_eq!(keep(grandfather()), Ok(()));
        assert_eq!(keep(Keep::Newest(0)), Err(ScheduleError::KeepsNone));
        assert_eq!(keep(Keep::Ages(vec![])), Err(ScheduleError::AgeCount(0)));
        let many = (1..=17).map(|it| age(it, None)).collect();
        assert_eq!(keep(Keep::Ages(many)), Err(ScheduleError::AgeCount(17)));
        let order = vec![age(60, None), age(60, Some(1))];
        assert_eq!(keep(Keep::Ages(order)), Err(ScheduleError::AgeOrder(seconds(60))));
        let closer = vec![age(60, Some(10)), age(600, Some(5))];
        assert_eq!(keep(Keep::Ages(closer)), Err(ScheduleError::SpacingOrder(seconds(5))));
        let none = vec![age(60, Some(61))];
        assert_eq!(keep(Keep::Ages(none)), Err(ScheduleError::SpacingAboveAge(seconds(61))));
        for every in [Duration::ZERO, Duration::from_micros(999), seconds(366 * 86_400)] {
            let schedule = Schedule { every, keep: Keep::All };
            assert_eq!(schedule.check(), Err(ScheduleError::Every(every)));
        }
    }

    /// In steps, with the snapshots told in pieces, it deletes what [`to_thin`] says.
    #[test]
    fn thinning_a_long_history_in_steps_deletes_the_same() {
        for seed in 0..400 {
            let random = &mut Random::new(seed);
            let keep = policy(random);
            let mut snapshots = history(random);
            if seed % 20 == 0 {
                let long = (0..10_000).map(|it| known(it, 1_000 * S + it * (S / 40)));
                snapshots = long.collect();
            }
            let schedule = Schedule { every: EVERY_MAX, keep: keep.clone() };
            let (mut now, wall) = (0, WallTime::from_unix_nanos(1_400 * S));
            let mut table = Timetable::begin(schedule, Instant::from_nanos(0));
            table.poll(Instant::from_nanos(0), wall);
            for piece in snapshots.chunks(64) {
                table.thin_due = Instant::from_nanos(now);
                assert_eq!(
                    table.poll(Instant::from_nanos(now), wall).thin,
                    [],
                    "not all are known"
                );
                table.known(piece.iter().copied(), false);
                now += 1;
            }
            table.known([], true);
            let mut gone: Vec<u64> = Vec::new();
            // Until a look at all of them finds nothing more.
            let mut found = true;
            while std::mem::take(&mut found) {
                loop {
                    table.thin_due = Instant::from_nanos(now);
                    let thin = table.poll(Instant::from_nanos(now), wall).thin;
                    assert!(thin.is_sorted() && thin.len() <= THIN_STEP);
                    now += 1;
                    if !thin.is_empty() {
                        found = true;
                        gone.extend(&thin);
                        table.thinned(Some(&thin));
                    }
                    if table.pass.is_none() {
                        break;
                    }
                }
            }
            gone.sort_unstable();
            assert_eq!(gone, to_thin(&snapshots, &keep, wall), "seed {seed}");
        }
    }

    #[test]
    fn a_schedule_that_keeps_all_remembers_none() {
        let mut table = timetable(Keep::All);
        for sequence in 0..100 {
            table.note(known(sequence, sequence));
        }
        assert!(table.live.plain.is_empty() && table.live.by_time.is_empty());
    }

    fn timetable(keep: Keep) -> Timetable {
        let schedule = Schedule { every: Duration::from_millis(10), keep };
        Timetable::new(schedule, Instant::from_nanos(0), [])
    }

    fn at(milliseconds: u64) -> (Instant, WallTime) {
        let nanoseconds = milliseconds * 1_000_000;
        (Instant::from_nanos(nanoseconds), WallTime::from_unix_nanos(nanoseconds))
    }

    #[test]
    fn late_snapshots_cost_the_next_one_when_there_are_many_and_a_stall_is_not_made_up() {
        let mut table = timetable(Keep::All);
        let snapshot_at = |table: &mut Timetable, milliseconds| {
            let (now, wall) = at(milliseconds);
            table.poll(now, wall).snapshot
        };
        assert!(snapshot_at(&mut table, 0));
        assert!(!snapshot_at(&mut table, 9), "not due");
        for late in 1..IN_FLIGHT_MAX as u64 {
            assert!(snapshot_at(&mut table, 10 * late), "{late} are not answered");
        }
        assert!(!snapshot_at(&mut table, 80), "none is answered");
        table.taken(0, at(82).1);
        assert!(!snapshot_at(&mut table, 89), "not made up");
        assert!(snapshot_at(&mut table, 90));
        table.failed();
        assert!(snapshot_at(&mut table, 165), "after a stall");
        assert_eq!(table.next(), at(170).0, "in step with the start");
        table.taken(1, at(165).1);
        assert!(snapshot_at(&mut table, 170));
        let ScheduleCounters { taken, skipped, failed, .. } = table.counters();
        assert_eq!((taken, skipped, failed), (2, 1 + 6, 1));
    }

    #[test]
    fn what_is_thinned_goes_in_one_batch_and_what_could_not_go_stays_known() {
        let mut table = timetable(Keep::Newest(2));
        for sequence in 0..10 {
            let (now, wall) = at(sequence * 10);
            assert!(table.poll(now, wall).snapshot);
            table.taken(sequence, wall);
        }
        table.note(Known { labelled: true, ..known(3, 30_000_000) });
        table.forget(4);
        let (now, wall) = at(1000);
        assert_eq!(table.poll(now, wall).thin, [0, 1, 2, 5, 6, 7]);
        let (now, wall) = at(2000);
        assert_eq!(table.poll(now, wall).thin, [], "the batch before is under way");
        table.thinned(None);
        let (now, wall) = at(3000);
        assert_eq!(table.poll(now, wall).thin, [0, 1, 2, 5, 6, 7], "tried again");
        table.thinned(Some(&[0, 1, 2, 5, 6]));
        let (now, wall) = at(4000);
        assert_eq!(table.poll(now, wall).thin, [7]);
        assert_eq!(table.counters().thinned, 5);
    }
}
