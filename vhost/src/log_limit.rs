//! A bound on the log lines that a front-end or a guest can cause.
//!
//! Connecting, going away and breaking a ring cost the other side microseconds, and it may do so
//! for ever: no such line comes more often than once a second, and the next one says how many were
//! left out. A limit belongs to one kind of line of one volume, so that a noisy guest silences
//! nobody else.

#![forbid(unsafe_code)]

use std::time::Duration;

use bessel_reactor::clock::{Instant, SystemClock};

/// Least time between two lines of a kind.
const INTERVAL: Duration = Duration::from_secs(1);

/// Decides which lines of a kind are written.
#[derive(Clone, Debug)]
pub(crate) struct LogLimit {
    clock: SystemClock,
    last: Option<Instant>,
    suppressed: u64,
}

/// A line is due.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Due {
    /// How many were left out since the line before; `None` when it was none.
    pub(crate) suppressed: Option<u64>,
}

impl LogLimit {
    pub(crate) fn start() -> Self {
        Self { clock: SystemClock::start(), last: None, suppressed: 0 }
    }

    /// Whether to write a line now. Not doing so counts it.
    pub(crate) fn due(&mut self) -> Option<Due> {
        self.due_at(self.clock.now())
    }

    fn due_at(&mut self, now: Instant) -> Option<Due> {
        if self.last.is_some_and(|last| now.since(last) < INTERVAL) {
            self.suppressed += 1;
            return None;
        }
        self.last = Some(now);
        let suppressed = std::mem::take(&mut self.suppressed);
        Some(Due { suppressed: (suppressed > 0).then_some(suppressed) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_makes_one_line_a_second_that_counts_the_rest() {
        let mut limit = LogLimit::start();
        let millisecond = |count: u64| Instant::from_nanos(count * 1_000_000);
        let lines: Vec<_> = (0..3000).filter_map(|at| limit.due_at(millisecond(at))).collect();
        let suppressed: Vec<_> = lines.iter().map(|line| line.suppressed).collect();
        assert_eq!(suppressed, [None, Some(999), Some(999)]);
        assert_eq!(limit.due_at(millisecond(60_000)), Some(Due { suppressed: Some(999) }));
        assert_eq!(limit.due_at(millisecond(61_000)), Some(Due { suppressed: None }));
    }
}
