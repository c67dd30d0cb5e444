//! The guest's side: vhost-user-blk over a Unix socket, virtqueues, request parsing.
//!
//! Two vocabularies. The control path is a [`Server`] for each volume: a thread that listens on the
//! volume's socket, speaks vhost-user with one front-end at a time, maps its memory and builds
//! [`Queue`]s. The hot path is the [`Queue`]: it is moved to the thread that polls it, turns
//! descriptor chains into checked [`BlockRequest`]s and completions into used-ring entries. The
//! [`QueueHost`], which the caller implements, carries queues across.
//!
//! Everything read from a socket or from guest memory is hostile: read once, checked once, and
//! answered with a status byte, a stopped queue or a dropped connection, which harm that guest
//! only. This crate never sees where a volume's blocks live.
//!
//! The messages are our own codec. The `vhost` crate (0.18) has no SET_STATUS and GET_STATUS, no
//! sender for configuration changes, and reads its socket blocking, without a way to stop between
//! the halves of a message.

#![deny(unsafe_code)]

mod chain;
mod connection;
mod counters;
mod disk;
#[expect(
    unsafe_code,
    reason = "raw system calls on descriptors, behind functions that are safe to call"
)]
mod fds;
mod features;
mod host;
mod inflight;
mod log_limit;
#[expect(unsafe_code, reason = "memory that guests share with us is its subject")]
mod memory;
mod messages;
mod queue;
mod request;
mod ring;
mod server;
mod session;
#[expect(unsafe_code, reason = "a signal handler")]
mod sigbus;
mod sync;

pub use counters::{BrokenReason, QueueCounters};
pub use disk::DiskInfo;
pub use host::{Connection, QueueHost};
pub use queue::{BlockRequest, Popped, Queue};
pub use request::{RequestKind, Status};
pub use server::{BindError, Server, ServerHandle};
