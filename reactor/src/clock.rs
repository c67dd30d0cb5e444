//! Time as an argument.
//!
//! Nothing that decides correctness reads a clock: the reactor reads it once a turn and hands the
//! result down, and the simulator hands down whatever its seed says.

use std::time::Duration;

/// Nanoseconds since an arbitrary start, never going back.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Instant(u64);

impl Instant {
    /// A point `nanoseconds` after the arbitrary start.
    pub const fn from_nanos(nanoseconds: u64) -> Self {
        Self(nanoseconds)
    }

    /// Nanoseconds since the arbitrary start.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// The point `duration` later, or the last one there is.
    pub const fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration.as_nanos() as u64))
    }

    /// Time from `earlier` to this point; zero when `earlier` is later.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// Seconds and nanoseconds since 1970, for records that people read.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct WallTime(u64);

impl WallTime {
    /// A wall-clock time `nanoseconds` after 1970-01-01T00:00:00Z.
    pub const fn from_unix_nanos(nanoseconds: u64) -> Self {
        Self(nanoseconds)
    }

    /// Nanoseconds since 1970-01-01T00:00:00Z.
    pub const fn as_unix_nanos(self) -> u64 {
        self.0
    }
}

/// Reads the real clocks. Only the edges of the program hold one.
#[derive(Clone, Copy, Debug)]
pub struct SystemClock {
    start: std::time::Instant,
}

impl SystemClock {
    /// Starts counting now.
    #[expect(clippy::disallowed_methods, reason = "this is the edge the ban points to")]
    pub fn start() -> Self {
        Self { start: std::time::Instant::now() }
    }

    /// Monotonic time since [`SystemClock::start`].
    pub fn now(&self) -> Instant {
        Instant(self.start.elapsed().as_nanos() as u64)
    }

    /// Wall-clock time.
    #[expect(clippy::disallowed_methods, reason = "this is the edge the ban points to")]
    pub fn wall(&self) -> WallTime {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        WallTime(since.map_or(0, |elapsed| elapsed.as_nanos() as u64))
    }
}
