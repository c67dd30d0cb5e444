//! The store: format, radix trees, pipeline, snapshots, check.
//!
//! Owns no thread, clock, file or socket: it takes a [`bessel_reactor::device::Device`] as a
//! generic, time and randomness as arguments. Requests and completions go in; I/O and finished
//! requests come out.

#![forbid(unsafe_code)]

/// True in a build with mistakes on purpose, which must serve nobody: see `planted.rs`.
pub const PLANTED: bool = cfg!(feature = "planted");

pub mod blocking;
pub mod check;
pub mod directory;
pub mod forest;
pub mod format;
pub mod request;
pub mod store;

mod chunks;
mod claims;
mod commit;
mod control;
mod extents;
mod flusher;
mod freeing;
pub mod gc;
pub mod journal;
mod log_loads;
pub mod message;
pub mod nodes;
mod pipeline;
mod planted;
mod radix;
pub mod reclaim;
pub mod schedule;
pub mod shard;
pub mod shared;
mod slab;
pub mod snapshot_log;
mod sync;
mod visits;
pub mod volume;
pub mod walk;
