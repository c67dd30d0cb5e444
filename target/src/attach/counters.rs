//! What a core counts beside what its loop and its shard do, for anyone to read.

use bessel_reactor::stats::{Counter, Histogram, ReactorStats};
use std::sync::Arc;

/// What one core did. Written by that core alone.
#[derive(Debug, Default)]
pub(crate) struct CoreCounters {
    /// The loop itself.
    pub(crate) reactor: Arc<ReactorStats>,
    /// Messages it has taken from its inbox: from other reactors, and from the control plane. Whoever asks for
    /// the shard's counters does so by one.
    pub(crate) messages: Counter,
    /// Reads and writes of the device that were polled for, as of the last message.
    pub(crate) device_polled: Counter,
    /// Guest requests that found no free block.
    pub(crate) no_space: Counter,
    /// Nanoseconds from a snapshot command's arrival until it was durable.
    pub(crate) snapshot_latency_ns: Histogram,
}
