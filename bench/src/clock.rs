//! The one place that reads the clock.
//!
//! Measuring time is this program's purpose, so it is an edge in the sense of the ban on
//! `Instant::now`; it keeps its own clock rather than depend on a crate that it measures.

use std::time::{Duration, Instant};

/// A monotonic clock counting from when it was started.
#[derive(Clone, Copy)]
pub(crate) struct Clock {
    start: Instant,
}

impl Clock {
    /// Starts counting now.
    #[expect(clippy::disallowed_methods, reason = "the edge where time is measured")]
    pub(crate) fn start() -> Self {
        Self { start: Instant::now() }
    }

    /// Nanoseconds since the start.
    pub(crate) fn now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    /// A point `after` from now that can be asked whether it has passed.
    pub(crate) fn deadline(&self, after: Duration) -> Deadline {
        let at_ns = self.now_ns().saturating_add(after.as_nanos() as u64);
        Deadline { clock: *self, at_ns }
    }
}

/// When to stop waiting.
pub(crate) struct Deadline {
    clock: Clock,
    at_ns: u64,
}

impl Deadline {
    /// True once the time is over.
    pub(crate) fn passed(&self) -> bool {
        self.clock.now_ns() >= self.at_ns
    }
}

/// Seconds since 1970, to tell one run's data from another's and to date a report.
#[expect(clippy::disallowed_methods, reason = "the edge where reports get their date")]
pub(crate) fn unix_time() -> Duration {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("the system clock is set after 1970")
}
