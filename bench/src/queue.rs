//! A split virtqueue, driven by polling, whose slots are laid out once and then reused.
//!
//! A queue of depth *d* has *d* slots. A slot has its own three descriptors (header, data,
//! status), header, status byte and page-aligned data buffer, so submitting a request writes a
//! few bytes and searches nothing. Layout of a queue's part of guest memory:
//!
//! ```text
//! descriptors | available ring | used ring | indirect tables | headers | data, one run a slot
//! ```
//!
//! Used notifications are suppressed: with the event index by keeping `used_event` just behind
//! what was seen, otherwise by flag. The device is kicked only when it asks for it.
//!
//! The device is not trusted: an id it returns must name a slot that is in flight.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};

use crate::memory::{GuestMemory, PAGE};

/// Descriptors of a request: header, data, status.
const CHAIN: u16 = 3;
const DESCRIPTOR_BYTES: u64 = 16;
const HEADER_BYTES: u64 = 16;
/// A header and its status byte share 32 bytes.
const HEADER_STRIDE: u64 = 32;
/// What the status byte holds until the device has written it; not a virtio-blk status.
const STATUS_PENDING: u8 = 0xff;

/// Requests in flight on one queue, at most: three descriptors each fill the 32768 of the
/// largest ring that virtio allows.
pub(crate) const DEPTH_MAX: u16 = 32768 / CHAIN;

/// What a queue is to look like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Requests in flight, 1 to [`DEPTH_MAX`].
    pub(crate) depth: u16,
    /// Longest data of one request.
    pub(crate) data_bytes_max: u32,
    /// The event index was negotiated.
    pub(crate) event_index: bool,
    /// Requests are single descriptors that lead to a table of three.
    pub(crate) indirect: bool,
}

impl Shape {
    /// Entries of the ring: a power of two that holds every slot's descriptors.
    pub(crate) fn ring_size(&self) -> u16 {
        let entries = if self.indirect { self.depth } else { self.depth * CHAIN };
        entries.next_power_of_two().max(4)
    }

    /// Bytes of guest memory a queue takes.
    pub(crate) fn memory_bytes(&self) -> u64 {
        Layout::new(*self, 0).data.end
    }
}

/// Where the parts of a queue lie in guest memory, in bytes from its start.
struct Layout {
    descriptors: Range<u64>,
    available: Range<u64>,
    used: Range<u64>,
    indirect: Range<u64>,
    headers: Range<u64>,
    data: Range<u64>,
    data_stride: u64,
}

impl Layout {
    fn new(shape: Shape, start: u64) -> Self {
        assert!(start.is_multiple_of(PAGE), "a queue starts a page");
        let (size, depth) = (u64::from(shape.ring_size()), u64::from(shape.depth));
        let data_stride = u64::from(shape.data_bytes_max).next_multiple_of(PAGE);
        let mut end = start;
        let mut page_aligned = |bytes: u64| {
            let begin = end.next_multiple_of(PAGE);
            end = begin + bytes;
            begin..end
        };
        Self {
            descriptors: page_aligned(size * DESCRIPTOR_BYTES),
            available: page_aligned(2 + 2 + 2 * size + 2),
            used: page_aligned(2 + 2 + 8 * size + 2),
            indirect: page_aligned(depth * u64::from(CHAIN) * DESCRIPTOR_BYTES),
            headers: page_aligned(depth * HEADER_STRIDE),
            data: page_aligned(depth * data_stride),
            data_stride,
        }
    }
}

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
}

/// The data of a discard: first sector, number of sectors, flags (VIRTIO 1.2, 5.2.6).
pub(crate) const RANGE_BYTES: u32 = 16;

/// One request: `bytes` at byte `offset` of the disk. Both are 0 for a flush.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Operation {
    pub(crate) kind: Kind,
    pub(crate) offset: u64,
    pub(crate) bytes: u32,
}

impl Operation {
    /// Bytes in its data buffer.
    fn data_bytes(&self) -> u32 {
        match self.kind {
            Kind::Discard => RANGE_BYTES,
            Kind::Read | Kind::Write | Kind::Flush => self.bytes,
        }
    }
}

/// A slot that the device has returned, with its status byte.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Completion {
    pub(crate) slot: u16,
    pub(crate) status: u8,
}

/// The driver's side of one virtqueue.
pub(crate) struct Queue {
    memory: Arc<GuestMemory>,
    shape: Shape,
    layout: Layout,
    size: u16,
    /// Requests put into the available ring, published or not.
    available_next: u16,
    /// The available index that the device has been shown.
    available_published: u16,
    /// Used elements taken.
    used_seen: u16,
    in_flight: Vec<bool>,
    kick: EventFd,
    call: EventFd,
    /// Times the device was kicked.
    pub(crate) kicks: u64,
}

impl Queue {
    /// Lays a queue out at `start`, which begins a page.
    pub(crate) fn new(memory: Arc<GuestMemory>, start: u64, shape: Shape) -> Result<Self, String> {
        assert!((1..=DEPTH_MAX).contains(&shape.depth), "depth {} was not checked", shape.depth);
        let event = || {
            EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
                .map_err(|error| format!("cannot create an eventfd: {error}"))
        };
        let queue = Self {
            size: shape.ring_size(),
            layout: Layout::new(shape, start),
            in_flight: vec![false; usize::from(shape.depth)],
            memory,
            shape,
            available_next: 0,
            available_published: 0,
            used_seen: 0,
            kick: event()?,
            call: event()?,
            kicks: 0,
        };
        queue.lay_out_chains();
        if !shape.event_index {
            let flags = VRING_AVAIL_F_NO_INTERRUPT as u16;
            queue.memory.store_u16(queue.layout.available.start, flags, Ordering::Release);
        }
        queue.suppress_notifications();
        Ok(queue)
    }

    /// Entries of the ring.
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// Number of slots.
    pub(crate) fn depth(&self) -> u16 {
        self.shape.depth
    }

    /// User addresses of the descriptors, the used ring and the available ring.
    pub(crate) fn user_addresses(&self) -> [u64; 3] {
        [&self.layout.descriptors, &self.layout.used, &self.layout.available]
            .map(|part| self.memory.user_address(part.start))
    }

    /// The descriptor that wakes the device.
    pub(crate) fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// The descriptor by which the device would wake us; we poll, and never read it.
    pub(crate) fn call(&self) -> &EventFd {
        &self.call
    }

    /// Where the data of `slot` lies in guest memory.
    pub(crate) fn data_offset(&self, slot: u16) -> u64 {
        self.layout.data.start + u64::from(slot) * self.layout.data_stride
    }

    /// Puts a request into the ring. The device sees it after [`Queue::publish`].
    ///
    /// The slot must be free; for a write its data must already be in place.
    pub(crate) fn submit(&mut self, slot: u16, operation: Operation) {
        let in_flight = &mut self.in_flight[usize::from(slot)];
        assert!(!*in_flight, "slot {slot} submitted twice");
        *in_flight = true;
        assert!(operation.data_bytes() <= self.shape.data_bytes_max, "data longer than its buffer");
        self.write_header(slot, operation);
        let place = self.available_next & (self.size - 1);
        let entry = self.layout.available.start + 4 + 2 * u64::from(place);
        // Relaxed: the index published later carries the release.
        self.memory.store_u16(entry, self.head(slot), Ordering::Relaxed);
        self.available_next = self.available_next.wrapping_add(1);
    }

    /// Shows the device what was submitted since the last call, and kicks it if it asks for it.
    pub(crate) fn publish(&mut self) -> Result<(), String> {
        let (old, new) = (self.available_published, self.available_next);
        if old == new {
            return Ok(());
        }
        self.memory.store_u16(self.layout.available.start + 2, new, Ordering::Release);
        self.available_published = new;
        // The index must be visible before the device's wish is read: otherwise it could go to
        // sleep between the two, and neither side would act.
        fence(Ordering::SeqCst);
        if self.device_wants_kick(old, new) {
            self.kicks += 1;
            self.kick.write(1).map_err(|error| format!("cannot kick the server: {error}"))?;
        }
        Ok(())
    }

    /// Takes the next request that the device has finished.
    pub(crate) fn pop(&mut self) -> Result<Option<Completion>, String> {
        let used = self.memory.load_u16(self.layout.used.start + 2, Ordering::Acquire);
        if used == self.used_seen {
            return Ok(None);
        }
        let place = u64::from(self.used_seen & (self.size - 1));
        let head = self.memory.read_u32(self.layout.used.start + 4 + 8 * place);
        let slot = self
            .slot_of(head)
            .filter(|slot| std::mem::take(&mut self.in_flight[usize::from(*slot)]))
            .ok_or_else(|| format!("the server returned request {head}, which it does not have"))?;
        self.used_seen = self.used_seen.wrapping_add(1);
        Ok(Some(Completion { slot, status: self.memory.read_u8(self.status_offset(slot)) }))
    }

    /// Tells the device that what was taken needs no notification, nor what follows.
    ///
    /// To be called after each batch of [`Queue::pop`]: with the event index the wish lapses
    /// after 2^16 requests.
    pub(crate) fn suppress_notifications(&self) {
        if self.shape.event_index {
            let used_event = self.layout.available.end - 2;
            self.memory.store_u16(used_event, self.used_seen.wrapping_sub(1), Ordering::Relaxed);
        }
    }

    fn device_wants_kick(&self, old: u16, new: u16) -> bool {
        let used = &self.layout.used;
        if self.shape.event_index {
            let available_event = self.memory.load_u16(used.end - 2, Ordering::Relaxed);
            event_is_due(available_event, old, new)
        } else {
            let flags = self.memory.load_u16(used.start, Ordering::Relaxed);
            flags & VRING_USED_F_NO_NOTIFY as u16 == 0
        }
    }

    fn lay_out_chains(&self) {
        let (next, write) = (VRING_DESC_F_NEXT as u16, VRING_DESC_F_WRITE as u16);
        for slot in 0..self.shape.depth {
            let first = self.first_of_chain(slot);
            let header = self.header_offset(slot);
            self.write_descriptor(slot, 0, header, HEADER_BYTES as u32, next, first + 1);
            let data = self.data_offset(slot);
            self.write_descriptor(slot, 1, data, self.shape.data_bytes_max, next, first + 2);
            self.write_descriptor(slot, 2, self.status_offset(slot), 1, write, 0);
            if self.shape.indirect {
                let place = self.layout.descriptors.start + u64::from(slot) * DESCRIPTOR_BYTES;
                let table = self.table_offset(slot);
                let table_bytes = u32::from(CHAIN) * DESCRIPTOR_BYTES as u32;
                let flags = VRING_DESC_F_INDIRECT as u16;
                self.memory.write(place, &self.descriptor(table, table_bytes, flags, 0));
            }
        }
    }

    fn write_header(&self, slot: u16, operation: Operation) {
        let (next, write) = (VRING_DESC_F_NEXT as u16, VRING_DESC_F_WRITE as u16);
        let (kind, data_flags) = match operation.kind {
            Kind::Read => (VIRTIO_BLK_T_IN, next | write),
            Kind::Write => (VIRTIO_BLK_T_OUT, next),
            Kind::Flush => (VIRTIO_BLK_T_FLUSH, next),
            Kind::Discard => (VIRTIO_BLK_T_DISCARD, next),
        };
        let first_sector = operation.offset / 512;
        let data = self.data_offset(slot);
        let mut header_sector = first_sector;
        if operation.kind == Kind::Discard {
            header_sector = 0; // Where it is stands in its data.
            let mut range = [0; RANGE_BYTES as usize];
            range[..8].copy_from_slice(&first_sector.to_le_bytes());
            range[8..12].copy_from_slice(&(operation.bytes / 512).to_le_bytes());
            self.memory.write(data, &range);
        }
        let mut header = [0; HEADER_BYTES as usize + 1];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..16].copy_from_slice(&header_sector.to_le_bytes());
        header[16] = STATUS_PENDING;
        self.memory.write(self.header_offset(slot), &header);
        let (first, header_at) = (self.first_of_chain(slot), self.header_offset(slot));
        // A flush has no data: its header leads straight to its status.
        let after_header = if operation.kind == Kind::Flush { first + 2 } else { first + 1 };
        self.write_descriptor(slot, 0, header_at, HEADER_BYTES as u32, next, after_header);
        self.write_descriptor(slot, 1, data, operation.data_bytes(), data_flags, first + 2);
    }

    fn write_descriptor(&self, slot: u16, link: u64, at: u64, bytes: u32, flags: u16, next: u16) {
        let place = self.table_offset(slot) + link * DESCRIPTOR_BYTES;
        self.memory.write(place, &self.descriptor(at, bytes, flags, next));
    }

    fn descriptor(&self, at: u64, bytes: u32, flags: u16, next: u16) -> [u8; 16] {
        let mut raw = [0; DESCRIPTOR_BYTES as usize];
        raw[..8].copy_from_slice(&self.memory.guest_address(at).to_le_bytes());
        raw[8..12].copy_from_slice(&bytes.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        raw
    }

    /// Where the three descriptors of `slot` lie.
    fn table_offset(&self, slot: u16) -> u64 {
        let part =
            if self.shape.indirect { &self.layout.indirect } else { &self.layout.descriptors };
        part.start + u64::from(slot) * u64::from(CHAIN) * DESCRIPTOR_BYTES
    }

    /// The number by which the first descriptor of `slot` is linked to, inside its table.
    fn first_of_chain(&self, slot: u16) -> u16 {
        if self.shape.indirect { 0 } else { slot * CHAIN }
    }

    /// What the rings call `slot`.
    fn head(&self, slot: u16) -> u16 {
        if self.shape.indirect { slot } else { slot * CHAIN }
    }

    fn slot_of(&self, head: u32) -> Option<u16> {
        let step = if self.shape.indirect { 1 } else { u32::from(CHAIN) };
        let slot = u16::try_from(head / step).ok()?;
        (head.is_multiple_of(step) && slot < self.shape.depth).then_some(slot)
    }

    fn header_offset(&self, slot: u16) -> u64 {
        self.layout.headers.start + u64::from(slot) * HEADER_STRIDE
    }

    fn status_offset(&self, slot: u16) -> u64 {
        self.header_offset(slot) + HEADER_BYTES
    }
}

/// True when the step of an index from `old` to `new` passes `event` (VIRTIO 1.2, 2.7.10).
pub(crate) fn event_is_due(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(depth: u16, indirect: bool) -> Queue {
        let shape = Shape { depth, data_bytes_max: 5000, event_index: true, indirect };
        let memory = Arc::new(GuestMemory::new(PAGE + shape.memory_bytes()).unwrap());
        Queue::new(memory, PAGE, shape).unwrap()
    }

    #[test]
    fn an_event_is_due_once_when_its_index_is_passed_also_across_the_wrap() {
        for start in [0u16, 100, 65_534, 65_535] {
            let at = |steps: u16| start.wrapping_add(steps);
            assert!(event_is_due(at(0), at(0), at(1)), "the very next entry");
            assert!(event_is_due(at(2), at(0), at(5)), "in the middle of a batch");
            assert!(!event_is_due(at(5), at(0), at(5)), "not reached yet");
            assert!(!event_is_due(at(0).wrapping_sub(1), at(0), at(5)), "already behind");
        }
    }

    #[test]
    fn parts_of_a_queue_do_not_overlap_and_are_inside_its_memory() {
        for indirect in [false, true] {
            let Layout { descriptors, available, used, indirect, headers, data, .. } =
                queue(33, indirect).layout;
            let parts = [descriptors, available, used, indirect, headers, data];
            assert!(parts.is_sorted_by(|before, after| before.end <= after.start), "{parts:?}");
            assert!(parts.iter().all(|part| part.start.is_multiple_of(PAGE)));
        }
    }

    #[test]
    fn the_deepest_queue_fits_the_largest_ring() {
        let shape = |depth| Shape { depth, data_bytes_max: 0, event_index: true, indirect: false };
        assert_eq!(shape(DEPTH_MAX).ring_size(), 32768);
        assert_eq!(shape(1).ring_size(), 4);
        assert_eq!(shape(32).ring_size(), 128);
    }

    #[test]
    fn a_request_that_is_not_in_flight_cannot_come_back() {
        let mut queue = queue(4, false);
        queue.submit(1, Operation { kind: Kind::Read, offset: 0, bytes: 512 });
        queue.publish().unwrap();
        for head in [0, 1, 4, 12, u32::MAX] {
            queue.memory.write(queue.layout.used.start + 4, &u32::to_le_bytes(head));
            queue.memory.store_u16(queue.layout.used.start + 2, 1, Ordering::Release);
            assert!(queue.pop().is_err(), "head {head} was taken");
        }
        queue.memory.write(queue.layout.used.start + 4, &u32::to_le_bytes(3));
        assert_eq!(queue.pop().unwrap().map(|completion| completion.slot), Some(1));
        assert!(queue.pop().unwrap().is_none());
    }

    #[test]
    fn the_device_is_kicked_only_when_it_asks() {
        let mut queue = queue(8, false);
        let read = Operation { kind: Kind::Read, offset: 0, bytes: 512 };
        queue.submit(0, read);
        queue.publish().unwrap();
        assert_eq!(queue.kicks, 1, "avail_event 0 asks for the first request");
        queue.submit(1, read);
        queue.publish().unwrap();
        queue.publish().unwrap();
        assert_eq!(queue.kicks, 1, "the device has not asked again");
        queue.memory.store_u16(queue.layout.used.end - 2, 2, Ordering::Release);
        queue.submit(2, read);
        queue.publish().unwrap();
        assert_eq!(queue.kicks, 2);
    }
}
