//! The seam: what `mapping` asks of a block device, and nothing more.
//!
//! `uring.rs` is the real one, `sim.rs` the simulated one. Both complete operations in any order.
//! A caller that needs an order waits for completions: io_uring does not order an fsync after
//! earlier writes, so neither does this trait.

mod file;
mod lock;
#[expect(unsafe_code, reason = "a mapping, and the copies from and to it, behind safe calls")]
mod mapped;
pub mod memory;
#[expect(unsafe_code, reason = "entries of the ring name memory")]
mod ring;
#[expect(unsafe_code, reason = "the kernel reads and writes memory named in the ring")]
pub mod uring;
mod watch;

pub use lock::{DeviceLock, LockError};
pub use uring::{Engine, FileDevice, OpenError, OpenOptions, WatchId};

pub mod sim;

use crate::buffer::Segment;
use crate::units::{BlockAddr, ByteCount, ByteOffset};

/// Names an operation to its submitter. The device only hands it back.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Token(pub u64);

/// What a device can do and what it wants of its callers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceProperties {
    /// Size. Fixed while the device is open.
    pub capacity: ByteCount,
    /// Offsets and lengths must be multiples of this power of two: 512 or 4096.
    pub offset_alignment: u32,
    /// Memory addresses and the length of each segment must be multiples of this power of two;
    /// 1 when any memory will do.
    pub memory_alignment: u32,
    /// A completed write may be lost by a power cut until a flush that was submitted after its
    /// completion has completed.
    pub volatile_cache: bool,
    /// What was written can be read again. False of a device that is there to measure all but itself
    /// ([`OpenOptions::drops`]): a read of data leaves the memory as it is.
    pub keeps_data: bool,
}

/// How an operation ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Completion {
    /// The submitter's name for the operation.
    pub token: Token,
    /// All of it happened, or how it failed. A failed write leaves any mix of old and new sectors.
    pub result: Result<(), DeviceError>,
}

/// The device refused or failed an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DeviceError {
    /// The operating system's error number, as from a real device.
    #[error("device error {0}: {err}", err = std::io::Error::from_raw_os_error(*.0))]
    Os(i32),
    /// The device gave fewer bytes than asked, and no more on asking again: it is truncated.
    #[error("the device ended early; is it truncated?")]
    EndOfDevice,
    /// A flush succeeded, but one of another user of the device had failed: its cache may have lost
    /// what both had written.
    #[error("a flush of the device failed on another reactor")]
    FlushFailedElsewhere,
}

impl DeviceError {
    /// Whether it was not the device that failed but the memory of the operation, which is not
    /// there: a guest gave its pages back while the I/O went to them.
    pub fn is_of_memory(self) -> bool {
        self == Self::Os(libc::EFAULT)
    }
}

/// A block device that is driven by polling.
///
/// Contract, checked by each implementation with assertions (a violation is our bug):
/// - at most the depth given at construction operations are in flight;
/// - offset and total length are multiples of `offset_alignment` and inside `capacity`;
/// - segments satisfy `memory_alignment` and number at most [`SEGMENTS_MAX`];
/// - the segments' memory stays valid until the completion is reaped.
///
/// Operations complete in any order. Writes in flight over the same sectors land in any order. A
/// flush makes durable the writes whose completions were reaped before it was submitted.
pub trait Device {
    /// What the device can do.
    fn properties(&self) -> DeviceProperties;

    /// Queues a read of `segments`, filled one after the other from `offset` on.
    fn read(&mut self, token: Token, offset: ByteOffset, segments: &[Segment]);

    /// Queues a write of `segments`, laid one after the other from `offset` on.
    fn write(&mut self, token: Token, offset: ByteOffset, segments: &[Segment]);

    /// Queues a flush.
    fn flush(&mut self, token: Token);

    /// Hands everything that is still queued to the device, together, and asks one that announces nothing
    /// what has completed: to be called each turn. True when operations have completed meanwhile: to reap
    /// them now spares whoever waits a turn.
    fn submit(&mut self) -> bool;

    /// Says that the bytes of these blocks matter to nobody any more: nothing durable leads to them,
    /// and no operation on them is in flight. A device may lose them, now or at any time before they
    /// are written again. Most do nothing with it.
    fn retire(&mut self, start: BlockAddr, blocks: u64) {
        let _ = (start, blocks);
    }

    /// Appends the operations that have completed to `completions` and forgets them.
    fn reap(&mut self, completions: &mut Vec<Completion>);

    /// Makes reads that are queued from now on bring what the device holds. After a failed flush a
    /// cache in front of it may still show what was never written, and later lose it. To be called
    /// after a flush that succeeded. Control path: it may take a while.
    fn refresh(&mut self) {}
}

/// Most segments one operation may have. A caller with more makes two operations.
pub const SEGMENTS_MAX: usize = 64;
