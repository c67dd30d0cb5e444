//! Device flushes, shared: everyone who wants one while one is in flight shares the next.
//!
//! A flush covers the writes whose completions were reaped before it was started. So a wish names
//! the flush it needs by number: flushes are numbered from 1 in the order they are started, and a
//! write that completed when `n` had been started is durable once flush `n + 1` or a later one has
//! succeeded. On a device without a volatile cache there is nothing to do and nobody asks.
//!
//! Shards share the device's cache and not their flushes. When another shard's flush has failed, the
//! device may have dropped what this one has written, and a flush that succeeds afterwards does not
//! bring it back: so it counts as failed as well, once. Nor is it known who will hear first: a flush
//! that has ended well is believed only when all flushes of others that were under way at its end
//! have been heard of as well ([`Flusher::judge`]).

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

/// Most shards of a store: as many as Linux' set of processors has places.
const SHARDS_MAX: usize = 1024;

/// What the shards of a store know of each other's flushes of the device.
#[derive(Debug)]
pub struct SharedFlushes {
    /// Flushes that failed, whoever started them.
    failures: AtomicU64,
    /// Of each shard, how often a flush of it has started or ended: odd while one is under way.
    turns: Box<[AtomicU64]>,
    /// Shards there are.
    shards: AtomicU64,
}

impl Default for SharedFlushes {
    fn default() -> Self {
        Self::with_room_for(SHARDS_MAX)
    }
}

impl SharedFlushes {
    fn with_room_for(shards: usize) -> Self {
        Self {
            failures: AtomicU64::new(0),
            turns: (0..shards).map(|_| AtomicU64::new(0)).collect(),
            shards: AtomicU64::new(0),
        }
    }
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
    shared: Arc<SharedFlushes>,
    /// This shard's number.
    shard: usize,
    /// How the flush in flight ended, once it has and is not judged.
    ended: Option<bool>,
    /// Shards with a flush under way when that one ended, and their turns.
    overlapping: Vec<(usize, u64)>,
    /// How many of the failures this shard has taken note of.
    failures_seen: u64,
}

impl Flusher {
    /// That of a shard. It joins the others in `shared`.
    ///
    /// # Panics
    /// When there are more shards than processors can be.
    pub(crate) fn new(
        volatile: bool,
        waiters_max: usize,
        shard: usize,
        shared: Arc<SharedFlushes>,
    ) -> Self {
        assert!(shard < shared.turns.len(), "shard {shard} is more than there can be");
        shared.shards.fetch_max(shard as u64 + 1, Ordering::AcqRel);
        Self {
            volatile,
            started: 0,
            done: 0,
            in_flight: false,
            waiters: VecDeque::with_capacity(waiters_max),
            shard,
            ended: None,
            overlapping: Vec::with_capacity(shared.turns.len()),
            failures_seen: shared.failures.load(Ordering::Acquire),
            shared,
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

    /// How many flushes have failed, whoever started them.
    pub(crate) fn failures(&self) -> u64 {
        self.shared.failures.load(Ordering::SeqCst)
    }

    /// True when a flush has failed that this shard has not taken note of: volumes that it concerns are
    /// latched by the next flush here.
    pub(crate) fn is_in_doubt(&self) -> bool {
        self.shared.failures.load(Ordering::Acquire) != self.failures_seen
    }

    /// True when a flush should be submitted now; it counts as started from here on.
    pub(crate) fn start(&mut self) -> bool {
        if self.in_flight || self.waiters.is_empty() {
            return false;
        }
        self.in_flight = true;
        self.started += 1;
        // Before the device gets it: who hears of a flush that began later finds it there.
        self.shared.turns[self.shard].fetch_add(1, Ordering::SeqCst);
        true
    }

    /// Takes in the end of the flush in flight on the device. It is over when it is judged.
    pub(crate) fn end(&mut self, success: bool) {
        assert!(self.in_flight && self.ended.is_none(), "a flush ended that nobody started");
        if !success {
            self.shared.failures.fetch_add(1, Ordering::SeqCst);
        }
        self.shared.turns[self.shard].fetch_add(1, Ordering::SeqCst);
        self.ended = Some(success);
        if success && !planted::is(Bug::OverlappingFlushTrusted) {
            let shards = self.shared.shards.load(Ordering::SeqCst) as usize;
            for (shard, turns) in self.shared.turns[..shards].iter().enumerate() {
                let turn = turns.load(Ordering::SeqCst);
                if turn % 2 == 1 {
                    self.overlapping.push((shard, turn));
                }
            }
        }
    }

    /// True when a flush has ended well and waits for what is heard of others'.
    pub(crate) fn is_held(&self) -> bool {
        self.ended.is_some()
    }

    /// How the flush that has ended is to be taken; its waiters come out of [`Flusher::served`]. False
    /// when what it should have made durable is unknown. None while there is none, or another shard's
    /// that overlapped it has not been heard of: that may have failed before this one began.
    pub(crate) fn judge(&mut self) -> Option<bool> {
        let success = self.ended?;
        let turns = &self.shared.turns;
        self.overlapping.retain(|(shard, turn)| turns[*shard].load(Ordering::SeqCst) == *turn);
        if !self.overlapping.is_empty() {
            return None;
        }
        self.ended = None;
        self.in_flight = false;
        let failures = self.shared.failures.load(Ordering::SeqCst);
        let here_only = planted::is(Bug::FailureElsewhereIgnored);
        let good = success && (here_only || failures == self.failures_seen);
        self.failures_seen = failures;
        if good {
            self.done = self.started;
        }
        Some(good)
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

    fn completed(flusher: &mut Flusher, success: bool) -> Option<bool> {
        flusher.end(success);
        flusher.judge()
    }

    fn two_shards() -> [Flusher; 2] {
        let shared = Arc::<SharedFlushes>::default();
        [0, 1].map(|shard| Flusher::new(true, 8, shard, Arc::clone(&shared)))
    }

    #[test]
    fn a_write_that_completes_during_a_flush_needs_the_next_one() {
        let mut flusher = Flusher::new(true, 8, 0, Arc::default());
        flusher.want(flusher.mark(), A);
        assert!(flusher.start());
        let mark = flusher.mark();
        flusher.want(mark, B);
        flusher.want(mark, C);
        assert!(!flusher.start(), "one at a time");
        assert_eq!(completed(&mut flusher, true), Some(true));
        assert_eq!(flusher.served(), Some(A));
        assert_eq!(flusher.served(), None);
        assert!(!flusher.covers(mark));
        assert!(flusher.start());
        assert_eq!(completed(&mut flusher, true), Some(true));
        assert_eq!((flusher.served(), flusher.served()), (Some(B), Some(C)));
        assert!(flusher.covers(mark));
    }

    #[test]
    fn another_shards_failed_flush_spoils_the_next_one_here() {
        let [mut here, mut there] = two_shards();
        let mark = here.mark();
        there.want(there.mark(), A);
        there.start();
        assert_eq!(completed(&mut there, false), Some(false));
        here.want(mark, B);
        here.start();
        assert_eq!(completed(&mut here, true), Some(false));
        assert!(!here.covers(mark));
        here.want(here.mark(), C);
        assert_eq!(here.served(), Some(B));
        here.start();
        assert_eq!(completed(&mut here, true), Some(true), "once is enough");
    }

    /// The other's may have failed before this one began, though it is heard of later.
    #[test]
    fn a_flush_is_not_believed_before_others_that_overlap_it_have_been_heard_of() {
        for success in [true, false] {
            let [mut here, mut there] = two_shards();
            let mark = here.mark();
            there.want(there.mark(), A);
            here.want(mark, B);
            there.start();
            here.start();
            assert_eq!(completed(&mut here, true), None);
            assert!(here.is_held() && !here.covers(mark) && !here.start());
            assert_eq!(here.served(), None);
            assert_eq!(completed(&mut there, success), Some(success));
            there.want(there.mark(), C);
            there.start(); // That one does not matter any more.
            assert_eq!(here.judge(), Some(success));
            assert_eq!((here.covers(mark), here.served()), (success, Some(B)));
        }
    }

    #[test]
    fn a_failed_flush_covers_nothing() {
        let mut flusher = Flusher::new(true, 8, 0, Arc::default());
        let mark = flusher.mark();
        flusher.want(mark, A);
        flusher.start();
        assert_eq!(completed(&mut flusher, false), Some(false));
        assert_eq!(flusher.served(), Some(A));
        assert!(!flusher.covers(mark));
    }
}

/// Two shards whose flushes end at the same time: `make loom`.
///
/// What counts is that the failures are read once for each flush, so that those it is judged by are
/// those that are noted as seen. A `judge` that reads them a second time to note them loses one in
/// between; `reading_twice_loses_a_failure` shows that the model would see it.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::atomic::AtomicBool;
    use loom::thread;

    fn flush(flusher: &mut Flusher, success: bool) -> bool {
        flusher.want(flusher.mark(), FlushWaiter::Authority);
        assert!(flusher.start());
        flusher.end(success);
        let good = loop {
            match flusher.judge() {
                Some(good) => break good,
                None => thread::yield_now(),
            }
        };
        assert_eq!(flusher.served(), Some(FlushWaiter::Authority));
        good
    }

    /// A failed flush in one shard, and two good ones in another, of which `ended` says how each of
    /// them ended. Exactly one flush of the other counts as failed, that which comes after the
    /// failure is known at the latest.
    fn meet(ended: fn(&mut Flusher) -> bool) {
        let shared = Arc::new(SharedFlushes::with_room_for(2));
        let told = Arc::new(AtomicBool::new(false));
        let mut here = Flusher::new(true, 4, 0, Arc::clone(&shared));
        let mut there = Flusher::new(true, 4, 1, shared);
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
                flusher.failures_seen = flusher.shared.failures.load(Ordering::Acquire);
                good
            });
        });
    }
}
