//! One polling core: units, memory for I/O, block devices over io_uring, messages between cores.
//!
//! Knows nothing of volumes or guests. `mapping` and `vhost` stand on it; nothing of ours is below
//! it.

pub mod buffer;
pub mod clock;
pub mod device;
pub mod inbox;
pub mod poller;
pub mod reactor;
pub mod stats;
mod sys;
pub mod units;
