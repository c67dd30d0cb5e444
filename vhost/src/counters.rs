//! What a queue tells other threads: counters, why it broke, and that somebody should look.

#![forbid(unsafe_code)]

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64};

use crate::fds;

/// Why a ring cannot be served on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum BrokenReason {
    /// The available index is further ahead than the ring is long.
    AvailableIndex = 1,
    /// A head is no descriptor of the ring.
    HeadOutOfRange = 2,
    /// A head is in flight already.
    HeadInFlight = 3,
    /// The front-end truncated its memory.
    MemoryTruncated = 4,
}

impl BrokenReason {
    fn from_code(code: u8) -> Option<Self> {
        [Self::AvailableIndex, Self::HeadOutOfRange, Self::HeadInFlight, Self::MemoryTruncated]
            .into_iter()
            .find(|reason| *reason as u8 == code)
    }
}

impl fmt::Display for BrokenReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AvailableIndex => "its available index is further ahead than the ring is long",
            Self::HeadOutOfRange => "its available ring names a descriptor outside the table",
            Self::HeadInFlight => "its available ring names a descriptor that is in flight",
            Self::MemoryTruncated => "its memory was truncated",
        })
    }
}

/// Counters of one queue: written by its poller, read by anyone.
#[derive(Debug, Default)]
pub struct QueueCounters {
    pub(crate) requests: AtomicU64,
    pub(crate) malformed: AtomicU64,
    pub(crate) calls: AtomicU64,
    pub(crate) broken: AtomicU8,
}

impl QueueCounters {
    /// Chains popped, malformed ones included.
    pub fn requests(&self) -> u64 {
        self.requests.load(Relaxed)
    }

    /// Chains that were no valid descriptor chain or had no room for header and status.
    pub fn malformed(&self) -> u64 {
        self.malformed.load(Relaxed)
    }

    /// Interrupts sent.
    pub fn calls(&self) -> u64 {
        self.calls.load(Relaxed)
    }

    /// Why the queue is broken, if it is.
    pub fn broken(&self) -> Option<BrokenReason> {
        BrokenReason::from_code(self.broken.load(Acquire))
    }

    /// Adds one; only the poller writes, so a load and a store do.
    pub(crate) fn bump(counter: &AtomicU64) {
        counter.store(counter.load(Relaxed) + 1, Relaxed);
    }
}

/// How a queue gets its control thread's attention: once for each kind of trouble.
#[derive(Debug)]
pub(crate) struct Notice {
    event: Arc<OwnedFd>,
    raised: AtomicBool,
}

impl Notice {
    pub(crate) fn new(event: Arc<OwnedFd>) -> Self {
        Self { event, raised: AtomicBool::new(false) }
    }

    /// For what may happen any number of times.
    pub(crate) fn raise_once(&self) {
        if !self.raised.swap(true, Relaxed) {
            self.raise();
        }
    }

    pub(crate) fn raise(&self) {
        fds::signal(self.event.as_fd());
    }
}
