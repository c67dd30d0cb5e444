//! Descriptor chains to segments: bounded, each descriptor read once.
//!
//! A chain lives in the ring's table, or its end lives in an indirect table. A wrong chain is walked
//! on as long as it has a legal end, because its last writable byte is where the guest looks for
//! the answer; a chain without an end has no such byte.

#![forbid(unsafe_code)]

use std::ops::Range;

use bessel_reactor::buffer::Segment;

use crate::disk::SEG_MAX;
use crate::memory::AddressMap;
use crate::ring::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, DESCRIPTOR_SIZE, Descriptor, Ring};

/// A chain while it is walked. `segments[..readable]` the guest gives, the rest it takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Walk {
    /// Descriptors that may still come.
    budget: usize,
    pub(crate) readable: usize,
    /// The last writable descriptor: its last byte is the status.
    pub(crate) writable: Option<Descriptor>,
    /// No legal chain. It is walked on only to find its status byte.
    pub(crate) wrong: bool,
}

/// A chain that goes no further and does not end: there is no telling where its status byte is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NoEnd;

/// Most descriptors in a chain: the ring's size (virtio 1.2, 2.7.5.3.1), or what `seg_max` invites
/// a driver with a small ring to put into an indirect table.
fn chain_max(ring_size: u16) -> usize {
    usize::from(ring_size).max(SEG_MAX as usize + 2)
}

/// Most segments of a chain: each descriptor is one, and a few cross from one range to the next.
fn segments_max(ring_size: u16) -> usize {
    chain_max(ring_size) + 64
}

/// The chain of the request popped last, in storage that is made once.
#[derive(Debug)]
pub(crate) struct Chain {
    map: AddressMap,
    indirect: bool,
    descriptors_max: usize,
    segments: Vec<Segment>,
}

impl Chain {
    pub(crate) fn new(map: AddressMap, indirect: bool, ring_size: u16) -> Self {
        let segments = Vec::with_capacity(segments_max(ring_size));
        Self { map, indirect, descriptors_max: chain_max(ring_size), segments }
    }

    /// Guest addresses to segments.
    pub(crate) fn map(&self) -> &AddressMap {
        &self.map
    }

    /// As [`Chain::map`], to change registrations.
    pub(crate) fn map_mut(&mut self) -> &mut AddressMap {
        &mut self.map
    }

    /// Segments collected and not taken off.
    pub(crate) fn len(&self) -> usize {
        self.segments.len()
    }

    /// Some of the segments.
    pub(crate) fn segments(&self, range: Range<usize>) -> &[Segment] {
        &self.segments[range]
    }

    /// Bytes in some of the segments.
    pub(crate) fn bytes(&self, range: Range<usize>) -> u64 {
        self.segments[range].iter().map(|segment| segment.len() as u64).sum()
    }

    /// Has the descriptors of a chain brought to the processor's cache: the guest has written them on
    /// another core.
    #[inline]
    pub(crate) fn expect_descriptors(ring: &Ring, head: u16) {
        ring.descriptors.expect(DESCRIPTOR_SIZE * usize::from(head));
    }

    /// Has the memory that a chain begins with brought there: its header, or its indirect table. What is
    /// read of the descriptor is good for nothing else.
    #[inline]
    pub(crate) fn expect_start(&mut self, ring: &Ring, head: u16) {
        self.map.expect(ring.descriptor(head).address);
    }

    /// Walks a chain into `segments`, each descriptor read once.
    pub(crate) fn collect(&mut self, ring: &Ring, head: u16) -> Result<Walk, NoEnd> {
        self.segments.clear();
        let budget = self.descriptors_max;
        let mut walk = Walk { budget, readable: 0, writable: None, wrong: false };
        let mut index = head;
        loop {
            if walk.budget == 0 || index >= ring.size {
                return Err(NoEnd);
            }
            let descriptor = ring.descriptor(index);
            if descriptor.has(DESC_INDIRECT) {
                return self.collect_indirect(descriptor, walk);
            }
            self.take_descriptor(descriptor, &mut walk);
            if !descriptor.has(DESC_NEXT) {
                return Ok(walk);
            }
            index = descriptor.next;
        }
    }

    /// Walks on in an indirect table.
    fn collect_indirect(&mut self, table: Descriptor, mut walk: Walk) -> Result<Walk, NoEnd> {
        let whole = table.length.is_multiple_of(DESCRIPTOR_SIZE as u32);
        if !self.indirect || table.has(DESC_NEXT) || !whole {
            return Err(NoEnd);
        }
        let entries = table.length / DESCRIPTOR_SIZE as u32;
        let mut index = 0;
        loop {
            if walk.budget == 0 || u32::from(index) >= entries {
                return Err(NoEnd);
            }
            let offset = u64::from(index) * DESCRIPTOR_SIZE as u64;
            let address = table.address.checked_add(offset).ok_or(NoEnd)?;
            let descriptor = self.read_descriptor(address)?;
            if descriptor.has(DESC_INDIRECT) {
                return Err(NoEnd);
            }
            self.take_descriptor(descriptor, &mut walk);
            if !descriptor.has(DESC_NEXT) {
                return Ok(walk);
            }
            index = descriptor.next;
        }
    }

    fn read_descriptor(&mut self, address: u64) -> Result<Descriptor, NoEnd> {
        let mut bytes = [0; DESCRIPTOR_SIZE];
        self.map.read(address, &mut bytes).map_err(|_| NoEnd)?;
        // The guest may change the table while we look: the copy is what counts, and must be one.
        let bytes = std::hint::black_box(bytes);
        let (address, rest) = bytes.split_at(8);
        let word = |half: &[u8]| u64::from_le_bytes(half.try_into().expect("eight bytes"));
        Ok(Descriptor::from_words(word(address), word(rest)))
    }

    /// Adds one descriptor's memory to the chain.
    fn take_descriptor(&mut self, descriptor: Descriptor, walk: &mut Walk) {
        walk.budget -= 1;
        if descriptor.length == 0 {
            return;
        }
        if descriptor.has(DESC_WRITE) {
            walk.writable = Some(descriptor);
        } else {
            // Readable after writable is no legal order.
            walk.wrong |= walk.writable.is_some();
        }
        let segments = &mut self.segments;
        let found = self.map.segments(descriptor.address, descriptor.length, |segment| {
            if segments.len() < segments.capacity() {
                segments.push(segment);
            } else {
                walk.wrong = true;
            }
        });
        walk.wrong |= found.is_err();
        if walk.writable.is_none() {
            walk.readable = self.segments.len();
        }
    }

    /// Where the status byte of a wrong chain is: the last byte of its last writable descriptor.
    pub(crate) fn find_status(&mut self, writable: Descriptor) -> Option<Segment> {
        // A descriptor of no bytes was never counted as writable.
        let address = writable.address.wrapping_add(u64::from(writable.length) - 1);
        let mut place = None;
        self.map.segments(address, 1, |segment| place = Some(segment)).ok()?;
        place
    }

    /// Takes the last byte off the chain, for the status.
    pub(crate) fn take_status(&mut self) -> Segment {
        let last = self.segments.last_mut().expect("the caller saw a writable segment");
        let rest = last.len() - 1;
        let status = last.part(rest, 1);
        *last = last.part(0, rest);
        if rest == 0 {
            self.segments.pop();
        }
        status
    }

    /// Copies the first bytes of `segments[first..end]` out and takes them off; gives where the
    /// rest begins. `None` when there are not enough.
    pub(crate) fn take_readable(
        &mut self,
        first: usize,
        end: usize,
        bytes: &mut [u8; 16],
    ) -> Option<usize> {
        let head = self.segments[..end].get_mut(first)?;
        let (rest, last) = if head.len() >= bytes.len() {
            // What drivers do, and worth a branch: a copy of known length is no function call.
            head.read(bytes);
            (bytes.len(), first)
        } else {
            self.gather(first, end, bytes)?
        };
        // As in `read_descriptor`: one copy, judged as it is.
        *bytes = std::hint::black_box(*bytes);
        let segment = &mut self.segments[last];
        *segment = segment.part(rest, segment.len() - rest);
        Some(if segment.is_empty() { last + 1 } else { last })
    }

    /// Copies 16 bytes that lie in several segments; gives how many are in the last, and which
    /// that is.
    #[cold]
    fn gather(&self, first: usize, end: usize, bytes: &mut [u8; 16]) -> Option<(usize, usize)> {
        let mut done = 0;
        for (index, segment) in self.segments[..end].iter().enumerate().skip(first) {
            let part = segment.len().min(bytes.len() - done);
            segment.read(&mut bytes[done..done + part]);
            done += part;
            if done == bytes.len() {
                return Some((part, index));
            }
        }
        None
    }
}
