//! What a reactor polls.
//!
//! The reactor owns the thread and decides when to poll and when to sleep; the poller owns
//! everything that the core works on. It is taken as a generic: one is built for the daemon, small
//! ones for tests, and no call of the loop goes through a table.
//!
//! What must not be broken: work that turns up while the reactor sleeps has to end the sleep. Every
//! source of work is therefore either watched by the device in which the reactor sleeps, or an
//! operation of that device, or named by [`Poller::deadline`].

use crate::clock::Instant;
use crate::device::uring::{FileDevice, WatchId};

/// The work of one core. Hot path: no method may block, and `poll` allocates nothing.
pub trait Poller {
    /// One turn: a bounded amount of work. True when anything was done, or when something is in
    /// flight that only polling can find.
    ///
    /// Operations of [`Poller::device`] are not such a thing: their completion ends a sleep, or
    /// there is none while they must be polled for.
    fn poll(&mut self, now: Instant) -> bool;

    /// Called before sleeping: asks everybody who may bring work to ring (notifications of queues
    /// on, the inbox flagged), then looks once more. False when there is work: no sleep then.
    ///
    /// Either way [`Poller::woken`] is called next.
    fn prepare_sleep(&mut self) -> bool;

    /// Called after sleeping, or instead of it: takes back the requests to be rung, and reads the
    /// descriptors behind `woken`, the watches that fired.
    fn woken(&mut self, woken: &[WatchId]);

    /// When `poll` must run at the latest, if nothing else happens. Asked before each sleep.
    fn deadline(&self) -> Option<Instant>;

    /// The device in whose ring the reactor sleeps.
    fn device(&mut self) -> &mut FileDevice;

    /// True once the loop is to end. Asked each turn, before `poll`.
    fn finished(&self) -> bool;
}
