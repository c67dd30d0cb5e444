//! Device flushes, shared: everyone who wants one while one is in flight shares the next.
//!
//! A flush covers the writes whose completions were reaped before it was started. So a wish names
//! the flush it needs by number: flushes are numbered from 1 in the order they are started, and a
//! write that completed when `n` had been started is durable once flush `n + 1` or a later one has
//! succeeded. On a device without a volatile cache there is nothing to do and nobody asks.
//!
//! Shards share the device's cache and not their flushes. When another shard's flush has failed, the
//! device may have dropped what this one has written, and a flush that succeeds afterwards does not
//! bring it back: so it counts as failed as well, once.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::planted::{self, Bug};
use crate::request::VolumeHandle;
use crate::sync::AtomicU64;

/// Who waits for a flush.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FlushWaiter {
    /// The commit round in flight of a volume.
    Round(VolumeHandle),
    /// A guest's request.
    Request(u32),
    /// The allocation authority.
    Authority,
    /// A command, by its ticket.
    Command(u64),
    /// The volume, to be closed.
    Close(VolumeHandle),
}

#[derive(Debug)]
pub(crate) struct Flusher {
    pub(crate) volatile: bool,
    /// Number of the last flush that was started.
    started: u64,
    /// Number of the last flush that succeeded.
    done: u64,
    in_flight: bool,
    waiters: VecDeque<(u64, FlushWaiter)>,
    /// Flushes of the device that failed, whoever started them.
    failures: Arc<AtomicU64>,
    /// How many of those this shard has taken note of.
    failures_seen: u64,
}

impl Flusher {
    pub(crate) fn new(volatile: bool, waiters_max: usize, failures: Arc<AtomicU64>) -> Self {
        Self {
            volatile,
            started: 0,
            done: 0,
            in_flight: false,
            waiters: VecDeque::with_capacity(waiters_max),
            failures_seen: failures.load(Ordering::Acquire),
            failures,
        }
    }

    /// The mark of a write that completes now.
    pub(crate) fn mark(&self) -> u64 {
        self.started
    }

    /// True when a write with this mark is durable as far as flushes go.
    pub(crate) fn covers(&self, mark: u64) -> bool {
        !self.volatile || self.done > mark
    }

    /// Asks for a flush that covers a write with this mark.
    pub(crate) fn want(&mut self, mark: u64, waiter: FlushWaiter) {
        assert!(self.volatile, "nobody waits for flushes of a device that needs none");
        let later = !planted::is(Bug::FlushSharedTooEarly);
        self.waiters.push_back((mark + u64::from(later), waiter));
    }

    /// True while `waiter` waits for a flush.
    pub(crate) fn is_wanted_by(&self, waiter: FlushWaiter) -> bool {
        self.waiters.iter().any(|(_, other)| *other == waiter)
    }

    /// True when a flush has failed that this shard has not taken note of: volumes that it concerns are
    /// latched by the next flush here.
    pub(crate) fn is_in_doubt(&self) -> bool {
        self.failures.load(Ordering::Acquire) != self.failures_seen
    }

    /// True when a flush should be submitted now; it counts as started from here on.
    pub(crate) fn start(&mut self) -> bool {
        if self.in_flight || self.waiters.is_empty() {
            return false;
        }
        self.in_flight = true;
        self.started += 1;
        true
    }

    /// Takes in the end of the flush in flight; its waiters come out of [`Flusher::served`]. False
    /// when what it should have made durable is unknown.
    pub(crate) fn completed(&mut self, success: bool) -> bool {
        assert!(self.in_flight, "a flush completed that nobody started");
        self.in_flight = false;
        if !success {
            self.failures.fetch_add(1, Ordering::AcqRel);
        }
        let failures = self.failures.load(Ordering::Acquire);
        let here_only = planted::is(Bug::FailureElsewhereIgnored);
        let good = success && (here_only || failures == self.failures_seen);
        self.failures_seen = failures;
        if good {
            self.done = self.started;
        }
        good
    }

    /// The next waiter whose flush has ended, whichever way.
    pub(crate) fn served(&mut self) -> Option<FlushWaiter> {
        if self.in_flight {
            return None;
        }
        let served = self.waiters.iter().position(|(number, _)| *number <= self.started)?;
        self.waiters.remove(served).map(|(_, waiter)| waiter)
    }
}

#[cfg(test)]
#[cfg(not(loom))] // What they make is not the model's.
mod tests {
    use super::*;

    const A: FlushWaiter = FlushWaiter::Request(1);
    const B: FlushWaiter = FlushWaiter::Request(2);
    const C: FlushWaiter = FlushWaiter::Request(3);

    #[test]
    fn a_write_that_completes_during_a_flush_needs_the_next_one() {
        let mut flusher = Flusher::new(true, 8, Arc::default());
        flusher.want(flusher.mark(), A);
        assert!(flusher.start());
        let mark = flusher.mark();
        flusher.want(mark, B);
        flusher.want(mark, C);
        assert!(!flusher.start(), "one at a time");
        flusher.completed(true);
        assert_eq!(flusher.served(), Some(A));
        assert_eq!(flusher.served(), None);
        assert!(!flusher.covers(mark));
        assert!(flusher.start());
        flusher.completed(true);
        assert_eq!((flusher.served(), flusher.served()), (Some(B), Some(C)));
        assert!(flusher.covers(mark));
    }

    #[test]
    fn another_shards_failed_flush_spoils_the_next_one_here() {
        let failures = Arc::new(AtomicU64::new(0));
        let mut here = Flusher::new(true, 8, Arc::clone(&failures));
        let mut there = Flusher::new(true, 8, failures);
        let mark = here.mark();
        there.want(there.mark(), A);
        there.start();
        assert!(!there.completed(false));
        here.want(mark, B);
        here.start();
        assert!(!here.completed(true));
        assert!(!here.covers(mark));
        here.want(here.mark(), C);
        assert_eq!(here.served(), Some(B));
        here.start();
        assert!(here.completed(true), "once is enough");
    }

    #[test]
    fn a_failed_flush_covers_nothing() {
        let mut flusher = Flusher::new(true, 8, Arc::default());
        let mark = flusher.mark();
        flusher.want(mark, A);
        flusher.start();
        flusher.completed(false);
        assert_eq!(flusher.served(), Some(A));
        assert!(!flusher.covers(mark));
    }
}

/// Two shards whose flushes end at the same time: `make loom`.
///
/// All that the shards share is one counter. Any ordering of its accesses does: what counts is that
/// it is read once for each flush, so that the failures a flush is judged by are those that are
/// noted as seen. `completed` that reads it a second time to note it loses a failure in between;
/// `reading_twice_loses_a_failure` shows that the model would see it.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::atomic::AtomicBool;
    use loom::thread;

    fn flush(flusher: &mut Flusher, success: bool) -> bool {
        flusher.want(flusher.mark(), FlushWaiter::Authority);
        assert!(flusher.start());
        let good = flusher.completed(success);
        assert_eq!(flusher.served(), Some(FlushWaiter::Authority));
        good
    }

    /// A failed flush in one shard, and two good ones in another, of which `ended` says how each of
    /// them ended. Exactly one flush of the other counts as failed, that which comes after the
    /// failure is known at the latest.
    fn meet(ended: fn(&mut Flusher) -> bool) {
        let failures = Arc::new(AtomicU64::new(0));
        let told = Arc::new(AtomicBool::new(false));
        let mut here = Flusher::new(true, 4, Arc::clone(&failures));
        let mut there = Flusher::new(true, 4, failures);
        let other = {
            let told = Arc::clone(&told);
            thread::spawn(move || {
                assert!(!flush(&mut there, false));
                told.store(true, Ordering::Release); // Its guest hears of it.
            })
        };
        let mut spoiled = 0;
        for _ in 0..2 {
            let known = told.load(Ordering::Acquire);
            let good = ended(&mut here);
            spoiled += u32::from(!good);
            assert!(!known || spoiled == 1, "a flush is good after a failure that is known");
        }
        other.join().expect("it does not panic");
        spoiled += u32::from(!ended(&mut here));
        assert_eq!(spoiled, 1, "one failure spoils one flush of each shard");
    }

    #[test]
    fn another_shards_failure_spoils_exactly_one_flush_here() {
        loom::model(|| meet(|flusher| flush(flusher, true)));
    }

    #[test]
    #[should_panic(expected = "spoils one flush")]
    fn reading_twice_loses_a_failure() {
        loom::model(|| {
            meet(|flusher| {
                let good = flush(flusher, true);
                flusher.failures_seen = flusher.failures.load(Ordering::Acquire);
                good
            });
        });
    }
}
