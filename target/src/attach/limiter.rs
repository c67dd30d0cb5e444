//! Holds a volume's guest to its limits.
//!
//! Hot path. A bucket is one instant: when all that was admitted is paid for, at the rate. A request is
//! admitted while that lies at most a burst ahead, whatever its size, and moves it on by what it costs
//! (the generic cell rate algorithm of ITU-T I.371). Nothing need be filled up as time passes, and
//! nobody need be woken but when the next request may go.

use crate::limits::Limits;
use bessel_mapping::request::VolumeHandle;
use bessel_reactor::clock::Instant;
use bessel_reactor::stats::Counter;
use std::sync::Arc;
use std::time::Duration;

/// What limits have come to, for one volume. Written by its reactor alone.
#[derive(Debug, Default)]
pub(crate) struct Throttled {
    /// Nanoseconds during which requests were there and had to wait.
    pub(crate) nanoseconds: Counter,
}

/// The limits of all volumes of a reactor that have some.
#[derive(Default)]
pub(super) struct Limiters(Vec<Limiter>);

/// What came of taking limits away.
pub(super) struct Removed<'a> {
    pub(super) limiter: Limiter,
    /// Limits that have another place now, and the queues they are for.
    pub(super) moved: Option<(usize, &'a [usize])>,
}

/// One volume's limits at work.
pub(crate) struct Limiter {
    volume: VolumeHandle,
    /// The volume's queues.
    slots: Vec<usize>,
    /// Which of `slots` is first to be looked at: one queue after the other gets what there is, or those
    /// looked at late would get nothing.
    next: usize,
    /// The queue that may be popped from in this turn.
    turn: Option<usize>,
    requests: Option<Bucket>,
    bytes: Option<Bucket>,
    burst: Duration,
    /// Requests are there that have to wait.
    waiting: Option<Waiting>,
    throttled: Arc<Throttled>,
}

#[derive(Clone, Copy)]
struct Waiting {
    since: Instant,
    until: Instant,
}

struct Bucket {
    per_second: u64,
    paid_until: Instant,
    /// What is owed beside that, less than a nanosecond, in `per_second`ths of one.
    rest: u64,
}

impl Bucket {
    /// A bucket of this rate that owes what `before` does.
    fn new(per_second: u64, before: Option<&Self>, now: Instant) -> Self {
        let owed = before.map_or(0, |before| {
            let time = before.paid_until.since(now).as_nanos();
            (time * u128::from(before.per_second) / u128::from(per_second)) as u64
        });
        Self { per_second, paid_until: now.after(Duration::from_nanos(owed)), rest: 0 }
    }

    fn charge(&mut self, amount: u64, now: Instant) {
        if self.paid_until < now {
            (self.paid_until, self.rest) = (now, 0);
        }
        // Saturates beyond 18 GB in one request, which only descriptors that share memory can name.
        let cost = amount.saturating_mul(1_000_000_000).saturating_add(self.rest);
        self.paid_until = self.paid_until.after(Duration::from_nanos(cost / self.per_second));
        self.rest = cost % self.per_second;
    }
}

impl Limiters {
    /// Gives a volume, whose queues these are, limits in the place of those it has. What its guest owes
    /// it still owes. Returns where they are now.
    pub(super) fn set(
        &mut self,
        volume: VolumeHandle,
        limits: Limits,
        throttled: Arc<Throttled>,
        slots: Vec<usize>,
        now: Instant,
    ) -> usize {
        let before = self.find(volume);
        let limiter = {
            let before = before.map(|index| &mut self.0[index]);
            Limiter::new(volume, limits, throttled, slots, before, now)
        };
        match before {
            Some(index) => {
                self.0[index] = limiter;
                index
            }
            None => {
                self.0.push(limiter);
                self.0.len() - 1
            }
        }
    }

    /// Takes a volume's limits away. Those of another may have their place now.
    pub(super) fn remove(&mut self, volume: VolumeHandle, now: Instant) -> Option<Removed<'_>> {
        let index = self.find(volume)?;
        let mut limiter = self.0.swap_remove(index);
        limiter.end_wait(now);
        let moved = self.0.get(index).map(|moved| (index, &moved.slots[..]));
        Some(Removed { limiter, moved })
    }

    /// Takes limits in that were another reactor's, for a volume that has no queues here yet.
    pub(super) fn put(&mut self, volume: VolumeHandle, mut limiter: Limiter) {
        (limiter.volume, limiter.next, limiter.turn) = (volume, 0, None);
        limiter.slots.clear();
        self.0.push(limiter);
    }

    /// Notes a queue of a volume. Returns where that one's limits are.
    pub(super) fn attach(&mut self, volume: VolumeHandle, slot: usize) -> Option<usize> {
        let index = self.find(volume)?;
        self.0[index].slots.push(slot);
        Some(index)
    }

    /// Forgets a queue.
    pub(super) fn detach(&mut self, index: usize, slot: usize) {
        self.0[index].slots.retain(|other| *other != slot);
    }

    fn find(&self, volume: VolumeHandle) -> Option<usize> {
        self.0.iter().position(|limiter| limiter.volume == volume)
    }

    /// Says which queues may be popped from in this turn.
    pub(super) fn begin_turn(&mut self, now: Instant, has_requests: impl Fn(usize) -> bool) {
        self.0.iter_mut().for_each(|limiter| limiter.begin_turn(now, &has_requests));
    }

    pub(super) fn get(&self, index: usize) -> &Limiter {
        &self.0[index]
    }

    pub(super) fn get_mut(&mut self, index: usize) -> &mut Limiter {
        &mut self.0[index]
    }
}

impl Limiter {
    fn new(
        volume: VolumeHandle,
        limits: Limits,
        throttled: Arc<Throttled>,
        slots: Vec<usize>,
        mut before: Option<&mut Self>,
        now: Instant,
    ) -> Self {
        if let Some(before) = &mut before {
            before.end_wait(now);
        }
        let (requests, bytes) =
            before.map_or((None, None), |it| (it.requests.as_ref(), it.bytes.as_ref()));
        Self {
            volume,
            slots,
            next: 0,
            turn: None,
            requests: limits.iops.map(|iops| Bucket::new(iops, requests, now)),
            bytes: limits.bandwidth.map(|rate| Bucket::new(rate.get(), bytes, now)),
            burst: limits.burst,
            waiting: None,
            throttled,
        }
    }

    /// How long a request would have to wait.
    #[inline]
    fn ahead(&self, now: Instant) -> Duration {
        let buckets = [&self.requests, &self.bytes].into_iter().flatten();
        let paid_until = buckets.map(|bucket| bucket.paid_until).max().unwrap_or_default();
        paid_until.since(now).saturating_sub(self.burst)
    }

    fn begin_turn(&mut self, now: Instant, has_requests: impl Fn(usize) -> bool) {
        self.turn = None;
        let count = self.slots.len();
        let places = (0..count).map(|at| (self.next + at) % count);
        let Some(at) = places.into_iter().find(|at| has_requests(self.slots[*at])) else {
            return self.end_wait(now);
        };
        let ahead = self.ahead(now);
        if ahead.is_zero() {
            self.end_wait(now);
            self.turn = Some(self.slots[at]);
            self.next = (at + 1) % count;
        } else {
            let since = self.waiting.map_or(now, |waiting| waiting.since);
            self.waiting = Some(Waiting { since, until: now.after(ahead) });
        }
    }

    /// Whether a request of this queue may be popped.
    #[inline]
    pub(super) fn admits(&self, slot: usize, now: Instant) -> bool {
        self.turn == Some(slot) && self.ahead(now).is_zero()
    }

    /// Notes that a request was popped.
    #[inline]
    pub(super) fn charge(&mut self, bytes: u64, now: Instant) {
        if let Some(requests) = &mut self.requests {
            requests.charge(1, now);
        }
        if let Some(bucket) = &mut self.bytes {
            bucket.charge(bytes, now);
        }
    }

    /// Nothing waits any more, or nothing was there to look whether it does.
    fn end_wait(&mut self, now: Instant) {
        if let Some(Waiting { since, until }) = self.waiting.take() {
            let waited = now.min(until).since(since);
            self.throttled.nanoseconds.add(waited.as_nanos() as u64);
        }
    }

    /// When requests that wait may go on.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.waiting.map(|waiting| waiting.until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bessel_reactor::units::ByteCount;
    use std::collections::BTreeMap;

    const SECOND: u64 = 1_000_000_000;

    fn at(nanoseconds: u64) -> Instant {
        Instant::from_nanos(nanoseconds)
    }

    fn limits(iops: Option<u64>, bandwidth: Option<u64>, burst: Duration) -> Limits {
        Limits { iops, bandwidth: bandwidth.map(ByteCount::new), burst }
    }

    fn limiter(limits: Limits) -> Limiter {
        Limiter::new(VolumeHandle(0), limits, Arc::default(), vec![5], None, at(0))
    }

    /// Requests of `bytes` that are admitted from one instant to another, asked for as often as may be.
    fn admitted(limiter: &mut Limiter, from: u64, until: u64, bytes: u64) -> u64 {
        let (mut now, mut count) = (at(from), 0);
        while now.as_nanos() < until {
            limiter.begin_turn(now, |_| true);
            if limiter.admits(5, now) {
                limiter.charge(bytes, now);
                count += 1;
            } else {
                let later = limiter.deadline().expect("it waits");
                assert!(later > now, "it waits for what has passed");
                now = later;
            }
        }
        count
    }

    #[test]
    fn a_guest_gets_its_rate_and_what_it_saved_up() {
        for iops in [1, 7, 1000, 333_333] {
            let mut limited = limiter(limits(Some(iops), None, Duration::from_secs(2)));
            let start = 10 * SECOND; // Idle until then.
            let first = admitted(&mut limited, start, start + SECOND, 4096);
            assert!((3 * iops..=3 * iops + 1).contains(&first), "{first} of {iops} a second");
            let then = admitted(&mut limited, start + SECOND, start + 11 * SECOND, 4096);
            assert!(then.abs_diff(10 * iops) <= 1, "{then} of {iops} a second");
        }
    }

    #[test]
    fn bytes_count_whatever_the_size_of_requests() {
        for bytes in [512, 4096, 1 << 20, 4 << 20] {
            let mut limited = limiter(limits(None, Some(1 << 20), Duration::ZERO));
            let count = admitted(&mut limited, SECOND, 65 * SECOND, bytes);
            let passed = count * bytes;
            assert!(passed.abs_diff(64 << 20) <= bytes, "{passed} bytes in 64 s by {bytes}");
        }
    }

    #[test]
    fn the_tighter_limit_counts() {
        let mut limited = limiter(limits(Some(100), Some(1 << 20), Duration::ZERO));
        assert_eq!(admitted(&mut limited, 0, SECOND, 512), 100);
        assert_eq!(admitted(&mut limited, 2 * SECOND, 3 * SECOND, 1 << 19), 2);
    }

    #[test]
    fn what_is_late_is_made_up_for_as_far_as_the_burst_goes() {
        // A reactor looks some time after the instant at which it might have.
        let mut limited = limiter(limits(Some(10_000), None, Duration::from_millis(1)));
        let (mut now, mut count) = (SECOND, 0);
        while now < 2 * SECOND {
            limited.begin_turn(at(now), |_| true);
            while limited.admits(5, at(now)) {
                limited.charge(0, at(now));
                count += 1;
            }
            now += 170_000;
        }
        assert!((10_000..=10_012).contains(&count), "{count} in a second");
    }

    #[test]
    fn queues_of_a_volume_take_turns() {
        let mut limited = limiter(limits(Some(1000), None, Duration::ZERO));
        limited.slots = vec![9, 2, 40, 7];
        let mut served = BTreeMap::new();
        for now in (SECOND..2 * SECOND).step_by(10_000) {
            // One of them has nothing to do half of the time.
            limited.begin_turn(at(now), |slot| slot != 40 || now < 3 * SECOND / 2);
            for slot in [2, 7, 9, 40] {
                while limited.admits(slot, at(now)) {
                    limited.charge(0, at(now));
                    *served.entry(slot).or_insert(0u32) += 1;
                }
            }
        }
        let share = |slot| served[&slot];
        assert_eq!(served.values().sum::<u32>(), 1000);
        assert_eq!(share(40), 125);
        assert!([2, 7, 9].into_iter().all(|slot| (290..=293).contains(&share(slot))), "{served:?}");
    }

    #[test]
    fn a_guest_owes_what_it_owed_when_limits_change() {
        let volume = VolumeHandle(3);
        let mut all = Limiters::default();
        let set = |all: &mut Limiters, rate| {
            let limits = limits(None, Some(rate), Duration::ZERO);
            all.set(volume, limits, Arc::default(), vec![5], at(SECOND))
        };
        let index = set(&mut all, 1 << 20);
        all.get_mut(index).charge(8 << 20, at(SECOND));
        for (rate, seconds) in [(1 << 20, 8), (4 << 20, 2), (1 << 19, 16)] {
            assert_eq!(set(&mut all, rate), index);
            all.begin_turn(at(SECOND), |_| true);
            assert_eq!(all.get(index).deadline(), Some(at((1 + seconds) * SECOND)), "{rate}");
        }
    }

    #[test]
    fn a_guest_owes_what_it_owed_on_another_reactor() {
        let (volume, there) = (VolumeHandle(3), VolumeHandle(0));
        let limits = limits(Some(10), None, Duration::ZERO);
        let [mut one, mut other] = [(); 2].map(|()| Limiters::default());
        one.set(volume, limits, Arc::default(), vec![5], at(SECOND));
        for _ in 0..30 {
            one.get_mut(0).charge(0, at(SECOND));
        }
        let Removed { limiter, moved } = one.remove(volume, at(SECOND)).unwrap();
        assert_eq!(moved, None);
        other.put(there, limiter);
        assert_eq!(other.attach(there, 7), Some(0));
        other.begin_turn(at(SECOND), |slot| slot == 7);
        assert_eq!(other.get(0).deadline(), Some(at(4 * SECOND)));
    }

    #[test]
    fn limits_leave_with_their_volume_and_no_other() {
        let slow = limits(Some(1), None, Duration::ZERO);
        let mut all = Limiters::default();
        for volume in 0..3u32 {
            let slots = vec![volume as usize * 10];
            all.set(VolumeHandle(volume), slow, Arc::default(), slots, at(0));
        }
        assert_eq!(all.attach(VolumeHandle(2), 21), Some(2));
        assert_eq!(all.attach(VolumeHandle(7), 70), None);
        // The last one has the place of the first now.
        assert_eq!(all.remove(VolumeHandle(0), at(0)).unwrap().moved, Some((0, &[20, 21][..])));
        assert_eq!(all.remove(VolumeHandle(1), at(0)).unwrap().moved, None);
        assert!(all.remove(VolumeHandle(1), at(0)).is_none());
        all.detach(0, 20);
        all.begin_turn(at(SECOND), |_| true);
        assert!(all.get(0).admits(21, at(SECOND)));
    }

    #[test]
    fn time_counts_while_requests_wait_and_no_longer() {
        let mut limited = limiter(limits(Some(1), None, Duration::ZERO));
        limited.charge(0, at(SECOND));
        let mut turn = |now: u64, there: bool| {
            limited.begin_turn(at(SECOND + now), |_| there);
            (limited.deadline().is_some(), limited.throttled.nanoseconds.get())
        };
        assert_eq!(turn(3, false), (false, 0), "nobody waits");
        assert_eq!(turn(5, true), (true, 0));
        assert_eq!(turn(700_000_000, true), (true, 0));
        assert_eq!(turn(SECOND + 9, true), (false, SECOND - 5), "what was late is not its doing");
        assert_eq!(turn(SECOND + 50, true), (false, SECOND - 5));
    }
}
