//! The seam to whoever polls the queues.
//!
//! The control path calls it from the volume's own thread and waits for each call to be done, so
//! what it says ("drained", "stopped") holds when the call returns. That is what makes it safe to
//! unmap guest memory afterwards.

use crate::queue::Queue;

/// A front-end, as far as the host may care.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Connection {
    /// The front-end's process id, as the kernel told it; 0 when unknown.
    pub pid: i32,
}

/// Carries queues to the thread that polls them. Implemented by the caller of [`crate::Server`].
///
/// Every call blocks until it is done; all come from the volume's control thread.
pub trait QueueHost: Send + Sync {
    /// Begins to poll `queue`. Poll it at least once before sleeping: requests may be waiting
    /// already, and the kick that announced them may be gone.
    fn start(&self, index: usize, queue: Queue);

    /// Stops taking new requests from the queue, waits until every request popped from it has
    /// completed (one that was put back included, see [`Queue::has_put_back`]), publishes, and
    /// gives the queue back with [`Queue::in_flight`] at zero.
    ///
    /// Called only for an index that was started and not stopped since. A queue that has broken
    /// is stopped the same way.
    fn stop(&self, index: usize) -> Queue;

    /// The guest wants a write cache with flushes (`true`) or every write durable when it
    /// completes (`false`). Holds for requests that are popped after the call.
    fn set_cache(&self, writeback: bool);

    /// A front-end has connected. No queue is started before.
    fn connected(&self, connection: Connection) {
        let _ = connection;
    }

    /// The front-end is gone; every queue was stopped before.
    fn disconnected(&self) {}
}
