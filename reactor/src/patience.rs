//! How long a reactor polls in vain before it sleeps: learned from how long it had to wait before.
//!
//! Work that comes while the reactor polls costs the time until then; work that comes after it has
//! fallen asleep costs that and a sleep. So from the lengths of the last waits it is known what any
//! patience would have cost, and the cheapest one is taken. A core whose work comes every 20
//! microseconds spins through these, and one that hears of something once a second sleeps at once.
//! Patience is never above the price of a sleep.
//!
//! What is learned from lengths takes them for given. They are not where spinning itself holds up who
//! completes the device's operations: a loop device hands each to kernel threads, and first writes to a
//! file on ext4 are finished by one on the core where the disk interrupts, which may be the one that
//! spins. So now and then the reactor tries what comes of sleeping at once ([`Trials`]).
//!
//! Hot path: a few additions and comparisons for each wait that ends.

use std::time::Duration;

use crate::clock::Instant;

/// What a sleep costs when the device has nothing to do: what a core is worth that is there when guests
/// ask for something.
///
/// A message to a sleeping reactor took 24 to 29 microseconds until it was seen (medians; virtual
/// cores, Linux 6.18, a loaded machine), 14 of which its sender spent ringing. It is priced at more
/// than that, as somebody waits: at 20,000 writes a second to tmpfs, a wait of 50 microseconds
/// before each, a reactor that slept answered in 34 microseconds and took 40 % of its core, and one
/// that stayed awake in 3.4 and took all of it.
const SLEEP: Duration = Duration::from_micros(128);

/// What it costs while the device has operations in flight: what a core is worth that is there when they
/// complete.
///
/// Halting a virtual core between two completions costs throughput: 4 KiB random reads at depth 32
/// from a file with O_DIRECT, 51 thousand a second asleep after 50 microseconds, 90 thousand with
/// busy polling (one run of 3 s each, on a machine that was not idle). A disk that takes longer than
/// this gains nothing from a core that spins.
const SLEEP_BEFORE_DEVICE: Duration = Duration::from_micros(1024);

/// How long it takes to be woken, in the middle: see [`SLEEP`].
const WAKING: Duration = Duration::from_micros(26);

/// Waits are told apart by powers of two, in microseconds: up to 1, 2, 4 ... 1024, and longer.
const CLASSES: usize = 12;

/// Waits after which it is thought over anew.
const LESSON: u32 = 32;

/// Operations of the device, and time, after which it is known what a way to wait has come to. The kernel's
/// threads take their time to move to a core that has become free.
const PERIOD: u64 = 32;
const PERIOD_LENGTH: Duration = Duration::from_millis(50);
/// A trial that by then has done worse by one part in [`GAIN`] is over.
const HOPELESS: Duration = Duration::from_millis(10);
/// A period in which guests asked for nothing for longer than this says nothing of either way, and begins anew.
const PAUSE: Duration = Duration::from_millis(1);
/// Periods until the next trial: at first, and after many that changed nothing.
const REST: u32 = 8;
const REST_MAX: u32 = 128;
/// Sleeping has to bring one part in so many more than spinning to be taken, as somebody waits 26
/// microseconds longer where it brings nothing; and half of that to be kept.
const GAIN: u64 = 8;
/// Trials in a row that have to be won before the other way is taken.
const WINS: u32 = 2;

/// What there is to wait for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Wait {
    /// Guests and messages.
    Outside,
    /// The device too, which has operations in flight.
    Device,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Patience {
    of: [Learned; 2],
    trials: Trials,
}

/// Whether to spin for the device or to sleep at once: that by which more of its operations, of whatever kind,
/// complete in a second. The way that is taken is held against the other, a period each, and gives way to it when it has
/// twice in a row done worse.
#[derive(Debug)]
struct Trials {
    sleeps: bool,
    /// This period is the other way's.
    trying: bool,
    /// When this period began, and the device's count then.
    since: Option<(Instant, u64)>,
    /// Operations a second in the period before the trial.
    before: u64,
    won: u32,
    /// Periods until the next trial, and between the trials after it.
    left: u32,
    rest: u32,
}

impl Trials {
    const fn new() -> Self {
        Self {
            sleeps: false,
            trying: false,
            since: None,
            before: 0,
            won: 0,
            left: REST,
            rest: REST,
        }
    }

    /// A wait for the device has ended at `now`; `completed` counts its operations since the start.
    fn ended(&mut self, now: Instant, completed: u64) {
        let (since, count) = *self.since.get_or_insert((now, completed));
        let (length, completions) = (now.since(since), completed - count);
        let least = if self.trying { HOPELESS } else { PERIOD_LENGTH };
        if length < least || completions < PERIOD {
            return;
        }
        let rate = (u128::from(completions) * 1_000_000_000 / length.as_nanos()) as u64;
        if length < PERIOD_LENGTH && rate >= self.before - self.before / GAIN {
            return;
        }
        if self.trying {
            self.judge(rate);
        } else {
            self.before = rate;
            self.left = self.left.saturating_sub(1);
            self.trying = self.left == 0;
        }
        self.since = Some((now, completed));
    }

    /// Guests have asked for nothing for so long.
    fn paused(&mut self, length: Duration) {
        if length > PAUSE {
            self.since = None;
        }
    }

    /// A period of the other way has come to this rate.
    fn judge(&mut self, rate: u64) {
        self.trying = false;
        let won = match self.sleeps {
            false => rate > self.before.saturating_add(self.before / GAIN),
            true => self.before < rate.saturating_add(rate / (2 * GAIN)),
        };
        if !won {
            self.rest = (self.rest * 2).min(REST_MAX);
            (self.won, self.left) = (0, self.rest);
            return;
        }
        // The next trial follows upon one period of the way that is still taken.
        (self.won, self.left) = (self.won + 1, 1);
        if self.won == WINS {
            (self.sleeps, self.won, self.rest, self.left) = (!self.sleeps, 0, REST, REST);
        }
    }

    fn sleeps_now(&self) -> bool {
        self.sleeps != self.trying
    }
}

#[derive(Debug)]
struct Learned {
    /// What a sleep costs.
    sleep: Duration,
    /// How many waits of each length there were, older ones for less.
    waits: [u32; CLASSES],
    /// How many since it was thought over.
    new: u32,
    patience: Duration,
}

impl Patience {
    /// For who has a core to give.
    pub(crate) fn new() -> Self {
        Self::with([SLEEP, SLEEP_BEFORE_DEVICE])
    }

    /// For who would rather have others use the core: a sleep costs what the system takes for it, and none is
    /// put off while the device works, which interrupts.
    pub(crate) fn sparing() -> Self {
        Self::with([WAKING, Duration::ZERO])
    }

    /// Before anything is known: as long as a sleep costs.
    fn with(sleeps: [Duration; 2]) -> Self {
        let learned = |sleep| Learned { sleep, waits: [0; CLASSES], new: 0, patience: sleep };
        Self { of: sleeps.map(learned), trials: Trials::new() }
    }

    /// How long to poll in vain.
    pub(crate) fn of(&self, wait: Wait) -> Duration {
        match wait {
            Wait::Device if self.trials.sleeps_now() => Duration::ZERO,
            _ => self.of[wait as usize].patience,
        }
    }

    /// A wait for the device has ended, and it has completed so many operations since it was opened.
    pub(crate) fn device_answered(&mut self, now: Instant, completed: u64) {
        self.trials.ended(now, completed);
    }

    /// A wait has ended after this long, of which the last part went into waking up: had the reactor been
    /// awake, it would have been shorter. Else one that once slept would do so for ever, with a guest
    /// whose next request comes a while after the answer to the one before.
    pub(crate) fn ended_asleep(&mut self, wait: Wait, length: Duration) {
        self.ended(wait, length.saturating_sub(WAKING));
    }

    /// A wait has ended after this long, awake.
    pub(crate) fn ended(&mut self, wait: Wait, length: Duration) {
        if wait == Wait::Outside {
            self.trials.paused(length);
        }
        let learned = &mut self.of[wait as usize];
        let microseconds = u64::try_from(length.as_micros()).unwrap_or(u64::MAX);
        let class = u64::BITS - microseconds.leading_zeros();
        learned.waits[(class as usize).min(CLASSES - 1)] += 1;
        learned.new += 1;
        if learned.new == LESSON {
            learned.think_over();
        }
    }
}

impl Learned {
    /// Takes the patience that would have cost least, and lets what is old count for half.
    fn think_over(&mut self) {
        let all: u64 = self.waits.iter().map(|count| u64::from(*count)).sum();
        let sleep = self.sleep.as_micros() as u64;
        // Sleeping at once, and then polling through one more class each time.
        let (mut best, mut patience) = (all * sleep, 0);
        let (mut met, mut polled) = (0, 0);
        for (class, count) in self.waits.iter().enumerate().take(CLASSES - 1) {
            let length = 1 << class;
            if length > sleep {
                break;
            }
            met += u64::from(*count);
            polled += u64::from(*count) * length;
            let cost = polled + (all - met) * (length + sleep);
            if cost < best {
                (best, patience) = (cost, length);
            }
        }
        self.patience = Duration::from_micros(patience);
        self.waits.iter_mut().for_each(|count| *count /= 2);
        self.new = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn microseconds(count: u64) -> Duration {
        Duration::from_micros(count)
    }

    fn after(wait: Wait, lengths: impl IntoIterator<Item = u64>) -> Duration {
        let mut patience = Patience::new();
        lengths.into_iter().for_each(|length| patience.ended(wait, microseconds(length)));
        patience.of(wait)
    }

    #[test]
    fn before_anything_is_known_it_is_as_long_as_a_sleep_costs() {
        assert_eq!(after(Wait::Outside, []), SLEEP);
        assert_eq!(after(Wait::Device, [5; LESSON as usize - 1]), SLEEP_BEFORE_DEVICE);
    }

    #[test]
    fn who_hears_of_something_once_in_a_while_sleeps_at_once() {
        assert_eq!(after(Wait::Outside, [1_000_000; 32]), Duration::ZERO);
        assert_eq!(after(Wait::Outside, [70; 32]), Duration::ZERO);
        assert_eq!(after(Wait::Device, [5000; 32]), Duration::ZERO);
    }

    #[test]
    fn short_waits_are_spent_awake_and_no_longer_ones() {
        assert_eq!(after(Wait::Outside, [20; 32]), microseconds(32));
        assert_eq!(after(Wait::Device, [300; 32]), microseconds(512));
        let mostly_short = (0..64).map(|nth| if nth % 8 == 0 { 1_000_000 } else { 6 });
        assert_eq!(after(Wait::Outside, mostly_short), microseconds(8));
    }

    #[test]
    fn who_is_sparing_never_spins_for_the_device_and_for_others_no_longer_than_waking_up_takes() {
        let mut patience = Patience::sparing();
        let lengths = [1, 3, 20, 100, 1_000].into_iter().cycle().take(20 * LESSON as usize);
        let mut tried = false;
        for (completed, length) in (0..).zip(lengths) {
            for wait in [Wait::Device, Wait::Outside] {
                patience.ended_asleep(wait, microseconds(length));
            }
            let now = Instant::from_nanos(1).after(microseconds(1000 * completed));
            patience.device_answered(now, completed);
            tried |= patience.trials.trying;
            assert_eq!(patience.of(Wait::Device), Duration::ZERO);
            assert!(patience.of(Wait::Outside) <= WAKING);
        }
        assert!(tried, "whatever trials come to");
        let mut close = Patience::sparing();
        (0..LESSON).for_each(|_| close.ended(Wait::Outside, microseconds(3)));
        assert_eq!(close.of(Wait::Outside), microseconds(4), "what comes at once is waited for");
    }

    #[test]
    fn waking_up_is_no_part_of_the_wait() {
        let mut patience = Patience::new();
        // An idle spell, then a guest that asks again 45 microseconds after each answer.
        (0..32).for_each(|_| patience.ended_asleep(Wait::Outside, microseconds(10_000)));
        assert_eq!(patience.of(Wait::Outside), Duration::ZERO);
        (0..256).for_each(|_| patience.ended_asleep(Wait::Outside, microseconds(45 + 26)));
        assert_eq!(patience.of(Wait::Outside), microseconds(64));
    }

    /// Waits for a device that completes one operation after `awake` of spinning, or after `asleep` of
    /// sleeping: for how many of a thousand the reactor slept at once.
    fn device(awake: u64, asleep: u64, waits: u32) -> u32 {
        let mut patience = Patience::new();
        let (mut now, mut slept) = (Instant::from_nanos(1), 0);
        for nth in 0..waits {
            let spins = patience.of(Wait::Device);
            let ends_asleep = microseconds(awake) > spins;
            let length = match (ends_asleep, spins.is_zero()) {
                (false, _) => microseconds(awake),
                (true, true) => microseconds(asleep),
                (true, false) => spins + microseconds(asleep),
            };
            now = now.after(length);
            match ends_asleep {
                true => patience.ended_asleep(Wait::Device, length),
                false => patience.ended(Wait::Device, length),
            }
            patience.device_answered(now, u64::from(nth) + 1);
            slept += u32::from(spins.is_zero());
        }
        slept * 1000 / waits
    }

    #[test]
    fn where_spinning_holds_the_device_up_the_reactor_sleeps() {
        // Who completes them gets the core 700 microseconds later, or when the reactor has fallen asleep.
        let mut patience = Patience::new();
        let (mut now, mut slept) = (Instant::from_nanos(1), 0);
        for nth in 0..20_000_u64 {
            let spins = patience.of(Wait::Device);
            let starved = nth % 10 == 0;
            let asleep = starved || spins < microseconds(700);
            let length = if asleep { spins + microseconds(100) } else { microseconds(700) };
            now = now.after(length);
            match asleep {
                true => patience.ended_asleep(Wait::Device, length),
                false => patience.ended(Wait::Device, length),
            }
            patience.device_answered(now, nth + 1);
            slept += u32::from(spins.is_zero() && nth >= 10_000);
        }
        assert!(slept > 9_500, "{slept} of 10000");
    }

    #[test]
    fn where_it_does_not_the_reactor_spins() {
        let trials_alone = 1000 / REST_MAX + 1;
        assert!(device(80, 110, 2_000_000) <= trials_alone);
        // Nor where it is all the same, or nearly: who waits would wait longer with the next load.
        assert!(device(400, 400, 2_000_000) <= trials_alone);
        assert!(device(400, 360, 2_000_000) <= trials_alone);
    }

    #[test]
    fn where_the_device_works_better_beside_a_core_that_sleeps_the_reactor_sleeps() {
        // No wait outlasts patience, and each would be over sooner.
        assert!(device(80, 68, 2_000_000) >= 990);
    }

    #[test]
    fn a_way_that_has_become_the_worse_one_is_left() {
        let mut trials = Trials::new();
        let (mut now, mut completed) = (Instant::from_nanos(1), 0);
        let mut period = |trials: &mut Trials, spinning: u64, sleeping: u64| {
            let since = trials.since;
            while trials.since == since {
                let sleeps = trials.sleeps_now();
                now = now.after(microseconds(if sleeps { sleeping } else { spinning }));
                completed += 1;
                trials.ended(now, completed);
            }
        };
        (0..REST + 4).for_each(|_| period(&mut trials, 200, 100));
        assert!(trials.sleeps, "{trials:?}");
        (0..9 * REST_MAX).for_each(|_| period(&mut trials, 200, 100));
        assert!(trials.sleeps, "{trials:?}");
        // It has to go on being better, not merely as good.
        (0..REST_MAX + 4).for_each(|_| period(&mut trials, 100, 100));
        assert!(!trials.sleeps, "{trials:?}");
        (0..REST_MAX + 4).for_each(|_| period(&mut trials, 200, 100));
        assert!(trials.sleeps, "{trials:?}");
        // What it was taken for is not needed in full to keep it.
        (0..9 * REST_MAX).for_each(|_| period(&mut trials, 109, 100));
        assert!(trials.sleeps, "{trials:?}");
    }

    /// A device that answers a core that sleeps later by a quarter, under loads that work for `on` milliseconds
    /// and then have nothing to do for `off`.
    #[test]
    fn loads_with_pauses_are_not_taken_for_slow_ones() {
        let pairs =
            [(60, 140), (70, 30), (80, 120), (95, 400), (30, 170), (250, 250), (1000, 2000)];
        for (on, off) in pairs {
            let mut trials = Trials::new();
            let (mut now, mut completed) = (Instant::from_nanos(1), 0);
            let (mut waits, mut slept) = (0_u32, 0);
            while waits < 1_000_000 {
                let end = now.after(Duration::from_millis(on));
                while now < end {
                    let sleeps = trials.sleeps_now();
                    now = now.after(microseconds(if sleeps { 126 } else { 100 }));
                    completed += 1;
                    trials.ended(now, completed);
                    waits += 1;
                    slept += u32::from(sleeps);
                }
                now = now.after(Duration::from_millis(off));
                trials.paused(Duration::from_millis(off));
            }
            let bound = (1000 / REST_MAX + 5) * waits / 1000;
            assert!(slept <= bound, "{slept} of {waits} with {on} and {off}");
        }
    }

    #[test]
    fn both_kinds_of_waits_are_learned_apart() {
        let mut patience = Patience::new();
        (0..32).for_each(|_| patience.ended(Wait::Device, microseconds(100_000)));
        assert_eq!(patience.of(Wait::Device), Duration::ZERO);
        assert_eq!(patience.of(Wait::Outside), SLEEP);
    }

    #[test]
    fn what_changes_is_learned_anew() {
        let (short, long) = (std::iter::repeat_n(6, 10_000), std::iter::repeat_n(9000, 200));
        assert_eq!(after(Wait::Outside, short.clone()), microseconds(8));
        assert_eq!(after(Wait::Outside, short.clone().chain(long.clone())), Duration::ZERO);
        assert_eq!(after(Wait::Outside, long.chain(short.take(200))), microseconds(8));
    }

    #[test]
    fn any_length_has_a_class() {
        let mut patience = Patience::new();
        for length in [Duration::ZERO, Duration::from_nanos(999), Duration::MAX] {
            patience.ended(Wait::Outside, length);
        }
        assert_eq!(patience.of[0].waits[0], 2);
        assert_eq!(patience.of[0].waits[CLASSES - 1], 1);
    }

    /// Whatever the waits are, patience is the best of those there are for them.
    #[test]
    fn no_other_patience_would_have_cost_less() {
        let mut random = crate::device::sim::Random::new(7);
        for _ in 0..500 {
            let scale = 1 + random.below(4000);
            // The ends of classes, so that lengths are known exactly.
            let length = |random: &mut crate::device::sim::Random| {
                (1 + random.below(scale)).next_power_of_two() - 1
            };
            let lengths: Vec<u64> = (0..LESSON).map(|_| length(&mut random)).collect();
            let cost = |patience: u64| -> u64 {
                let sleep = SLEEP_BEFORE_DEVICE.as_micros() as u64;
                let top = |length: u64| (length + 1).next_power_of_two();
                let one = |length: &u64| match top(*length) <= patience {
                    true => top(*length),
                    false => patience + sleep,
                };
                lengths.iter().map(one).sum()
            };
            let chosen = after(Wait::Device, lengths.iter().copied()).as_micros() as u64;
            let best = (0..=10).map(|power| cost(1 << power)).chain([cost(0)]).min();
            assert_eq!(Some(cost(chosen)), best, "{chosen} for {lengths:?}");
        }
    }
}
