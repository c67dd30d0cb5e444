//! Device flushes, shared: everyone who wants one while one is in flight shares the next.
//!
//! A flush covers the writes whose completions were reaped before it was started. So a wish names
//! the flush it needs by number: flushes are numbered from 1 in the order they are started, and a
//! write that completed when `n` had been started is durable once flush `n + 1` or a later one has
//! succeeded. On a device without a volatile cache there is nothing to do and nobody asks.

use std::collections::VecDeque;

use crate::request::VolumeHandle;

/// Who waits for a flush.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FlushWaiter {
    /// The commit round in flight of a volume.
    Round(VolumeHandle),
    /// A guest's request.
    Request(u32),
    /// The allocation authority.
    Authority,
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
}

impl Flusher {
    pub(crate) fn new(volatile: bool, waiters_max: usize) -> Self {
        let waiters = VecDeque::with_capacity(waiters_max);
        Self { volatile, started: 0, done: 0, in_flight: false, waiters }
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
        self.waiters.push_back((mark + 1, waiter));
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

    /// Takes in the end of the flush in flight; its waiters come out of [`Flusher::served`].
    pub(crate) fn completed(&mut self, success: bool) {
        assert!(self.in_flight, "a flush completed that nobody started");
        self.in_flight = false;
        if success {
            self.done = self.started;
        }
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
mod tests {
    use super::*;

    const A: FlushWaiter = FlushWaiter::Request(1);
    const B: FlushWaiter = FlushWaiter::Request(2);
    const C: FlushWaiter = FlushWaiter::Request(3);

    #[test]
    fn a_write_that_completes_during_a_flush_needs_the_next_one() {
        let mut flusher = Flusher::new(true, 8);
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
    fn a_failed_flush_covers_nothing() {
        let mut flusher = Flusher::new(true, 8);
        let mark = flusher.mark();
        flusher.want(mark, A);
        flusher.start();
        flusher.completed(false);
        assert_eq!(flusher.served(), Some(A));
        assert!(!flusher.covers(mark));
    }
}
