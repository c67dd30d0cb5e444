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
    /// Nanoseconds during which requests were there, or might have been, and had to wait.
    pub(crate) nanoseconds: Counter,
}

/// One volume's limits at work.
pub(super) struct Limiter {
    pub(super) volume: VolumeHandle,
    requests: Option<Bucket>,
    bytes: Option<Bucket>,
    burst: Duration,
    waiting: Option<Waiting>,
    throttled: Arc<Throttled>,
}

/// Requests wait.
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
    fn charge(&mut self, amount: u64, now: Instant) {
        if self.paid_until < now {
            (self.paid_until, self.rest) = (now, 0);
        }
        // Fits 64 bits for requests up to 18 GB, which no ring holds.
        let cost = amount.saturating_mul(1_000_000_000).saturating_add(self.rest);
        self.paid_until = self.paid_until.after(Duration::from_nanos(cost / self.per_second));
        self.rest = cost % self.per_second;
    }
}

impl Limiter {
    pub(super) fn new(volume: VolumeHandle, limits: Limits, throttled: Arc<Throttled>) -> Self {
        let bucket = |per_second| Bucket { per_second, paid_until: Instant::default(), rest: 0 };
        Self {
            volume,
            requests: limits.iops.map(bucket),
            bytes: limits.bandwidth.map(|bytes| bucket(bytes.get())),
            burst: limits.burst,
            waiting: None,
            throttled,
        }
    }

    /// Whether a request has to wait. While they do, [`Limiter::deadline`] says how long.
    #[inline]
    pub(super) fn must_wait(&mut self, now: Instant) -> bool {
        let buckets = [&self.requests, &self.bytes].into_iter().flatten();
        let paid_until = buckets.map(|bucket| bucket.paid_until).max().unwrap_or_default();
        let ahead = paid_until.since(now).saturating_sub(self.burst);
        if !ahead.is_zero() {
            let since = self.waiting.map_or(now, |waiting| waiting.since);
            self.waiting = Some(Waiting { since, until: now.after(ahead) });
            return true;
        }
        self.end_wait(now);
        false
    }

    /// Notes that nothing waits any more. Also to be called before the limits go.
    pub(super) fn end_wait(&mut self, now: Instant) {
        if let Some(Waiting { since, .. }) = self.waiting.take() {
            self.throttled.nanoseconds.add(now.since(since).as_nanos() as u64);
        }
    }

    /// Notes that a request was admitted.
    #[inline]
    pub(super) fn charge(&mut self, bytes: u64, now: Instant) {
        if let Some(requests) = &mut self.requests {
            requests.charge(1, now);
        }
        if let Some(bucket) = &mut self.bytes {
            bucket.charge(bytes, now);
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

    const SECOND: u64 = 1_000_000_000;

    /// Requests of `bytes` that are admitted from one instant to another, asked for as often as may be.
    fn admitted(limiter: &mut Limiter, from: u64, until: u64, bytes: u64) -> u64 {
        let (mut now, mut count) = (Instant::from_nanos(from), 0);
        while now.as_nanos() < until {
            if limiter.must_wait(now) {
                let later = limiter.deadline().expect("it waits");
                assert!(later > now, "it waits for what has passed");
                now = later;
            } else {
                limiter.charge(bytes, now);
                count += 1;
            }
        }
        count
    }

    fn limiter(iops: Option<u64>, bandwidth: Option<u64>, burst: Duration) -> Limiter {
        let limits = Limits { iops, bandwidth: bandwidth.map(ByteCount::new), burst };
        Limiter::new(VolumeHandle(0), limits, Arc::default())
    }

    #[test]
    fn a_guest_gets_its_rate_and_what_it_saved_up() {
        for iops in [1, 7, 1000, 333_333] {
            let burst = Duration::from_secs(2);
            let mut limited = limiter(Some(iops), None, burst);
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
            let mut limited = limiter(None, Some(1 << 20), Duration::ZERO);
            let count = admitted(&mut limited, SECOND, 65 * SECOND, bytes);
            let passed = count * bytes;
            assert!(passed.abs_diff(64 << 20) <= bytes, "{passed} bytes in 64 s by {bytes}");
        }
    }

    #[test]
    fn the_tighter_limit_counts() {
        let mut limited = limiter(Some(100), Some(1 << 20), Duration::ZERO);
        let small = admitted(&mut limited, 0, SECOND, 512);
        assert_eq!(small, 100);
        let large = admitted(&mut limited, 2 * SECOND, 3 * SECOND, 1 << 19);
        assert_eq!(large, 2);
    }

    #[test]
    fn time_spent_waiting_is_counted_once() {
        let mut limited = limiter(Some(1), None, Duration::ZERO);
        let at = Instant::from_nanos;
        limited.charge(0, at(SECOND));
        for (now, waits) in [(5, true), (700_000_000, true), (SECOND, false), (SECOND + 9, false)] {
            assert_eq!(limited.must_wait(at(SECOND + now)), waits, "at {now}");
            assert_eq!(limited.deadline(), waits.then_some(at(2 * SECOND)));
        }
        assert_eq!(limited.throttled.nanoseconds.get(), SECOND - 5);
    }
}
