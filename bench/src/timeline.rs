//! How long requests took that were in flight at some moment.
//!
//! A histogram says that some requests were slow, not when. To tell whether something delays requests one
//! has to look at those that were in flight when it happened, and beside them at others. Memory is fixed, and
//! noting a request costs a few instructions: each slice of time keeps the longest latency of the requests
//! that were in flight in it.

use std::ops::Range;
use std::time::Duration;

/// A slice: as long as a few requests at depth 32.
const SLICE_NS: u64 = 50_000;

/// A day at 50 µs would be 7 GiB; what comes after so many slices, 45 minutes, is not kept.
const SLICES_MAX: usize = 54_000_000;

/// The longest latency by time.
#[derive(Clone, Debug)]
pub(crate) struct Timeline {
    /// By the clock that the load was given.
    start_ns: u64,
    /// In nanoseconds, of the requests in flight in each slice.
    longest: Vec<u32>,
}

impl Timeline {
    /// Starts at `start_ns` and keeps what happens in the time that follows.
    pub(crate) fn new(start_ns: u64, time: Duration) -> Self {
        let slices = (time.as_nanos() as u64).div_ceil(SLICE_NS) as usize + 1;
        Self { start_ns, longest: vec![0; slices.min(SLICES_MAX)] }
    }

    /// Notes a request that was in flight from one time to another.
    pub(crate) fn note(&mut self, from_ns: u64, to_ns: u64) {
        let latency_ns = u32::try_from(to_ns - from_ns).unwrap_or(u32::MAX);
        let slices = self.slices(from_ns..to_ns);
        for longest in &mut self.longest[slices] {
            *longest = latency_ns.max(*longest);
        }
    }

    /// The longest latency of the requests in flight in some slice of `time`, in nanoseconds. Nothing if the
    /// time is not all covered: what is beyond an end was not seen.
    pub(crate) fn longest(&self, time: Range<u64>) -> Option<u64> {
        let end_ns = self.start_ns + self.longest.len() as u64 * SLICE_NS;
        if time.start < self.start_ns || time.end >= end_ns {
            return None;
        }
        self.longest[self.slices(time)].iter().max().map(|it| u64::from(*it))
    }

    fn slices(&self, time: Range<u64>) -> Range<usize> {
        let slice = |at_ns: u64| (at_ns.saturating_sub(self.start_ns) / SLICE_NS) as usize;
        let end = (slice(time.end) + 1).min(self.longest.len());
        slice(time.start).min(end)..end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_knows_the_longest_of_the_requests_that_were_in_flight() {
        let start = 1_000_000_000;
        let mut timeline = Timeline::new(start, Duration::from_millis(10));
        timeline.note(start + 100_000, start + 180_000);
        timeline.note(start + 3_000_000, start + 5_000_000);
        timeline.note(start + 4_000_000, start + 4_020_000);
        let at = |from: u64, to: u64| timeline.longest(start + from..start + to);
        assert_eq!(at(150_000, 150_001), Some(80_000));
        assert_eq!(at(1_000_000, 1_200_000), Some(0), "nothing was in flight");
        assert_eq!(at(4_900_000, 4_900_001), Some(2_000_000));
        assert_eq!(at(0, 9_000_000), Some(2_000_000));
        assert_eq!(at(9_000_000, 11_000_000), None, "nobody looked any more");
        assert_eq!(timeline.longest(0..start), None);
    }

    #[test]
    fn what_is_beyond_the_end_is_not_noted() {
        let mut timeline = Timeline::new(0, Duration::from_millis(1));
        timeline.note(900_000, 9_000_000);
        timeline.note(8_000_000, 9_000_000);
        assert_eq!(timeline.longest(900_000..950_000), Some(8_100_000));
    }
}
