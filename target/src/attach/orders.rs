//! I/O that the control path has a core do: what an import writes.
//!
//! An [`Order`] is a request with memory of its own. It is sent to the core, rests there with that
//! memory until the shard has finished with it, and comes back with its status: so nobody can touch or
//! free what the device reads. Whoever sends orders bounds how many it has under way; the core admits
//! one a turn, so that guests hardly notice.
//!
//! Hot path within the core: it only moves orders about, in memory that grows to as many as there are
//! at once.

use bessel_mapping::request::{Busy, IoKind, IoRequest, IoStatus, VolumeHandle};
use bessel_mapping::shard::Shard;
use bessel_reactor::buffer::{Buffer, BufferPool};
use bessel_reactor::device::FileDevice;
use bessel_reactor::units::Sector;
use std::collections::VecDeque;
use std::sync::mpsc::SyncSender;

/// Set in the tags of orders, and not in those of guests' requests.
const ORDER_TAG: u64 = 1 << 63;

/// Memory of an order.
pub(crate) struct OrderMemory {
    /// Of the one buffer.
    pool: BufferPool,
    buffer: Buffer,
}

impl OrderMemory {
    /// So many bytes of it, a multiple of 4096.
    pub(crate) fn new(bytes: usize) -> Self {
        let mut pool = BufferPool::new(1, bytes);
        let buffer = pool.take().expect("the pool has one buffer");
        Self { pool, buffer }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.pool.bytes_mut(&mut self.buffer)
    }
}

/// See the module's documentation.
pub(crate) struct Order {
    pub(crate) volume: VolumeHandle,
    pub(crate) kind: IoKind,
    pub(crate) sector: Sector,
    pub(crate) sectors: u64,
    /// A write takes its bytes from the start of this; nothing else uses it.
    pub(crate) memory: OrderMemory,
    /// What became of it, once it is back.
    pub(crate) status: IoStatus,
    /// Where it goes when it is done: with room for all orders that go there, so that the core does not
    /// wait.
    pub(crate) answer: SyncSender<Box<Order>>,
}

/// The orders that a core has.
#[derive(Default)]
pub(super) struct Orders {
    waiting: VecDeque<Box<Order>>,
    /// By the number in the tag.
    running: Vec<Option<Box<Order>>>,
}

impl Orders {
    pub(super) fn push(&mut self, order: Box<Order>) {
        self.waiting.push_back(order);
    }

    /// Hands the oldest order to the shard, if there is one. True when there was.
    pub(super) fn admit(&mut self, shard: &mut Shard<FileDevice>) -> bool {
        let Some(mut order) = self.waiting.pop_front() else { return false };
        let number = super::core::free_index(&mut self.running);
        let Order { volume, kind, sector, sectors, memory, .. } = &mut *order;
        let bytes = sectors.saturating_mul(bessel_reactor::units::SECTOR_SIZE);
        let segment = (*kind == IoKind::Write)
            .then(|| memory.pool.lend(&memory.buffer).part(0, bytes as usize));
        let submitted = shard.submit(&IoRequest {
            tag: ORDER_TAG | number as u64,
            volume: *volume,
            kind: *kind,
            sector: *sector,
            sectors: *sectors,
            segments: segment.as_slice(),
        });
        match submitted {
            Ok(()) => self.running[number] = Some(order),
            Err(Busy) => {
                order.take_back();
                self.waiting.push_front(order);
            }
        }
        true
    }

    /// Takes in the end of a request with this tag, if it is an order's.
    pub(super) fn finish(&mut self, tag: u64, status: IoStatus) -> bool {
        if tag & ORDER_TAG == 0 {
            return false;
        }
        let order = self.running[(tag & !ORDER_TAG) as usize].take();
        let mut order = order.expect("a shard ends each request once");
        order.take_back();
        order.status = status;
        let answer = order.answer.clone();
        // Who sent it may have given up.
        let _ = answer.send(order);
        true
    }
}

impl Order {
    /// The device is done with its memory.
    fn take_back(&mut self) {
        if self.kind == IoKind::Write {
            self.memory.pool.returned(&self.memory.buffer);
        }
    }
}
