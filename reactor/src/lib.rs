//! One polling core: units, memory for I/O, block devices over io_uring, messages between cores.
//!
//! Knows nothing of volumes or guests. `mapping` and `vhost` stand on it; nothing of ours is below
//! it.
//!
//! A [`reactor`] is one thread on one core that polls one [`poller::Poller`] and sleeps in the ring
//! of its [`device`] when there is nothing to do. Whatever may bring work rings there: a watched
//! descriptor (a guest's kick, the [`inbox`] through which other threads speak to the core), the
//! completion of an I/O, a deadline. Reactors share no memory that both write but inboxes; what
//! they count ([`stats`]) each writes alone. Memory for I/O is a [`buffer::Segment`], wherever it
//! came from; numbers have their [`units`], and time ([`clock`]) is an argument.

#![deny(unsafe_code)]

#[expect(unsafe_code, reason = "memory that devices and guests share with us is its subject")]
pub mod buffer;
pub mod clock;
#[cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "an instruction that not every processor has")
)]
pub mod crc;
pub mod device;
pub mod inbox;
#[expect(unsafe_code, reason = "it maps files")]
pub mod outliving;
mod patience;
pub mod poller;
pub mod reactor;
pub mod stats;
mod sync;
#[expect(unsafe_code, reason = "raw system calls, behind functions that are safe to call")]
mod sys;
pub mod units;

pub use sys::{prefetch, prefetch_to_write};
