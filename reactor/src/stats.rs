//! Counters and histograms that one core writes and any thread reads.
//!
//! Hot path on the writing side: a plain load, add and store, no locked instruction. That is right
//! only while each has a single writer; the owner of a type that holds them says who that is. A
//! reader sees each number as it was a moment ago, and several numbers not at the same moment.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram as HdrHistogram;

/// A number that only grows. One writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Starts at zero.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds `amount`. Only the one writer may call this: two would lose each other's.
    pub fn add(&self, amount: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
    }

    /// The number, on any thread.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Steps between one power of two and the next: each bucket is at most 1/32 of its value wide.
const STEPS: u64 = 32;
const STEP_BITS: u32 = STEPS.trailing_zeros();

/// Values from here on share the last bucket: 2^40 ns are 18 minutes, longer than any request.
const VALUE_LIMIT: u64 = 1 << 40;

/// 0..31 have a bucket each; then 32 for each power of two from 2^5 to 2^39.
const BUCKETS: usize = (STEPS + (40 - STEP_BITS as u64) * STEPS) as usize;

const _: () = assert!(bucket_of(VALUE_LIMIT - 1) == BUCKETS - 1);
const _: () = assert!(bucket_of(STEPS) == STEPS as usize);

/// Which bucket counts `value`. Values below the limit only.
const fn bucket_of(value: u64) -> usize {
    if value < STEPS {
        return value as usize;
    }
    let power = value.ilog2() - STEP_BITS;
    let step = (value >> power) - STEPS;
    (STEPS + power as u64 * STEPS + step) as usize
}

/// The largest value that `bucket` counts.
const fn bucket_top(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < STEPS {
        return bucket;
    }
    let (power, step) = ((bucket - STEPS) / STEPS, (bucket - STEPS) % STEPS);
    ((STEPS + step + 1) << power) - 1
}

/// How often which value was seen, to one part in 32; latencies in nanoseconds, mostly. One writer.
///
/// 9 KiB, all of it there from the start. [`Histogram::snapshot`] turns it into the histogram that
/// answers questions.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[AtomicU64]>,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl Histogram {
    /// Starts empty.
    pub fn new() -> Self {
        Self { buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Counts `value`. Only the one writer may call this.
    pub fn record(&self, value: u64) {
        let bucket = &self.buckets[bucket_of(value.min(VALUE_LIMIT - 1))];
        bucket.store(bucket.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// Counts a duration in nanoseconds. Only the one writer may call this.
    pub fn record_duration(&self, duration: Duration) {
        self.record(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX));
    }

    /// All that was counted so far, on any thread: for quantiles, means, and sums over cores.
    pub fn snapshot(&self) -> HdrHistogram<u64> {
        let mut copy = HdrHistogram::new_with_bounds(1, VALUE_LIMIT, 2)
            .expect("the bounds are constants in the allowed range");
        self.add_to(&mut copy);
        copy
    }

    /// Adds all that was counted so far to `sum`, which must reach to 2^40 or grow by itself, as
    /// those of [`Histogram::snapshot`] do.
    pub fn add_to(&self, sum: &mut HdrHistogram<u64>) {
        for (bucket, count) in self.buckets.iter().enumerate() {
            let count = count.load(Ordering::Relaxed);
            if count > 0 {
                sum.saturating_record_n(bucket_top(bucket), count);
            }
        }
    }
}

/// What a reactor's loop did. The reactor's thread is the writer.
#[derive(Debug, Default)]
pub struct ReactorStats {
    /// Turns of the loop.
    pub turns: Counter,
    /// Turns that found something to do.
    pub turns_busy: Counter,
    /// Times it went to sleep.
    pub sleeps: Counter,
    /// Sleeps ended by a watch or a completion, and not by time alone.
    pub wakeups: Counter,
    /// Time spent on work, in nanoseconds: in turns that found something to do.
    pub busy_ns: Counter,
    /// Time spent polling in vain, in nanoseconds: awake, and nothing to do.
    pub spun_ns: Counter,
    /// Time spent asleep, in nanoseconds. A sleep counts when it is over.
    pub asleep_ns: Counter,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_in_a_bucket_at_most_one_part_in_32_wide() {
        let mut floor = 0;
        for bucket in 0..BUCKETS {
            let top = bucket_top(bucket);
            assert_eq!((bucket_of(floor), bucket_of(top)), (bucket, bucket));
            assert!(top - floor <= floor / STEPS, "{floor} to {top}");
            floor = top + 1;
        }
        assert_eq!(floor, VALUE_LIMIT);
    }

    #[test]
    fn quantiles_are_those_of_the_values() {
        let histogram = Histogram::new();
        for value in 1..=10_000 {
            histogram.record(value * 100);
        }
        histogram.record(u64::MAX);
        let snapshot = histogram.snapshot();
        assert_eq!(snapshot.len(), 10_001);
        let median = snapshot.value_at_quantile(0.5) as f64;
        assert!((median / 500_000.0 - 1.0).abs() < 0.05, "{median}");
        assert!(snapshot.max() >= VALUE_LIMIT - 1);
    }

    #[test]
    fn histograms_of_two_cores_add_up() {
        let (one, two) = (Histogram::new(), Histogram::new());
        one.record(10);
        two.record_duration(Duration::from_micros(3));
        let mut sum = one.snapshot();
        two.add_to(&mut sum);
        assert_eq!((sum.len(), sum.min()), (2, 10));
    }

    #[test]
    fn a_counter_is_read_on_another_thread() {
        let counter = Counter::new();
        counter.add(2);
        counter.add(3);
        std::thread::scope(|scope| scope.spawn(|| assert_eq!(counter.get(), 5)).join().unwrap());
    }
}
