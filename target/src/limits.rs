//! What a volume's guest may ask of the store in a second: so many requests, so many bytes.

use bessel_reactor::units::ByteCount;
use std::time::Duration;

/// Limits of one volume. What a guest has not used it may catch up on, as far as `burst` goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Limits {
    /// Requests of any kind in a second.
    pub(crate) iops: Option<u64>,
    /// Bytes read and written in a second, together.
    pub(crate) bandwidth: Option<ByteCount>,
    /// What an idle guest saves up, as the time it takes at the limit.
    pub(crate) burst: Duration,
}

/// Saved up unless something else is said: what a guest asks for in one go, and no more.
pub(crate) const BURST_DEFAULT: Duration = Duration::from_millis(100);
/// A reactor may look this late for what waits: less could not be made up for.
const BURST_MIN: Duration = Duration::from_millis(1);
const BURST_MAX: Duration = Duration::from_secs(60 * 60);
const IOPS_MAX: u64 = 1_000_000_000;
/// Below that a guest takes its disk for dead: 4 MiB, the largest request, would take over a minute.
const BANDWIDTH_MIN: ByteCount = ByteCount::new(64 << 10);
const BANDWIDTH_MAX: ByteCount = ByteCount::new(1 << 40);

/// The limits will not do.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum LimitsError {
    /// Nothing is limited.
    #[error("neither iops nor bandwidth is given; give one of them, or leave the limits out")]
    Nothing,
    /// Too few or too many requests.
    #[error("{0} requests a second will not do; give 1 to {IOPS_MAX}")]
    Iops(u64),
    /// Too few or too many bytes.
    #[error("{} a second will not do; give 64KiB to 1TiB", .0.exact())]
    Bandwidth(ByteCount),
    /// Too much to be saved up.
    #[error("a burst of {0:?} will not do; give 1ms to 1h")]
    Burst(Duration),
}

impl Limits {
    /// Says what is wrong with them.
    ///
    /// # Errors
    /// When something is.
    pub(crate) fn check(&self) -> Result<(), LimitsError> {
        if self.iops.is_none() && self.bandwidth.is_none() {
            return Err(LimitsError::Nothing);
        }
        if let Some(iops) = self.iops.filter(|iops| !(1..=IOPS_MAX).contains(iops)) {
            return Err(LimitsError::Iops(iops));
        }
        let allowed = BANDWIDTH_MIN..=BANDWIDTH_MAX;
        if let Some(bandwidth) = self.bandwidth.filter(|bytes| !allowed.contains(bytes)) {
            return Err(LimitsError::Bandwidth(bandwidth));
        }
        if !(BURST_MIN..=BURST_MAX).contains(&self.burst) {
            return Err(LimitsError::Burst(self.burst));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_would_stop_a_guest_or_limit_nothing_are_refused() {
        let sound = Limits { iops: Some(1), bandwidth: None, burst: BURST_MIN };
        assert_eq!(sound.check(), Ok(()));
        let bandwidth = |bytes| Some(ByteCount::new(bytes));
        assert_eq!(Limits { bandwidth: bandwidth(64 << 10), ..sound }.check(), Ok(()));
        for (wrong, words) in [
            (Limits { iops: None, ..sound }, "neither iops nor bandwidth"),
            (Limits { iops: Some(0), ..sound }, "0 requests a second will not do; give 1 to"),
            (Limits { bandwidth: bandwidth(4095), ..sound }, "will not do; give 64KiB to 1TiB"),
            (Limits { burst: Duration::from_secs(3601), ..sound }, "3601s will not do; give 1ms"),
            (Limits { burst: Duration::ZERO, ..sound }, "0ns will not do; give 1ms to 1h"),
        ] {
            let error = wrong.check().unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
