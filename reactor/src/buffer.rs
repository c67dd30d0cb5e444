//! Memory that a device reads and writes: segments of anybody's memory, and our own pool.
//!
//! The kernel fills and drains this memory while we run, so none of it is ever lent out as a Rust
//! reference during an I/O. A [`Segment`] is a promise made once, where memory is mapped (guest
//! memory in `vhost`, the pool here); everything after that copies it about freely and safely.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// A contiguous range of memory that a device may read or write.
///
/// Made only by code that keeps the range mapped until every I/O over it has completed. Other
/// parties (the guest, the kernel) may change the bytes at any time, so they are only ever copied.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    address: NonNull<u8>,
    length: u32,
    /// Index of the io_uring registered buffer that holds the whole range.
    registration: u32,
}

/// No registered buffer holds this segment.
const UNREGISTERED: u32 = u32::MAX;

// SAFETY: a segment is an address and a length; the promise made at `Segment::new` is about the
// process's address space and so holds on every thread.
unsafe impl Send for Segment {}

impl Segment {
    /// Names `length` bytes at `address`.
    ///
    /// # Safety
    /// The range must stay mapped, readable and writable until every request that carries this
    /// segment, or a part or copy of it, has completed. No Rust reference to it may live meanwhile.
    pub const unsafe fn new(address: NonNull<u8>, length: u32) -> Self {
        Self { address, length, registration: UNREGISTERED }
    }

    /// The same range, known to lie in registered buffer `index` of the device it will go to.
    pub const fn with_registration(mut self, index: u32) -> Self {
        self.registration = index;
        self
    }

    /// The same range, for a device that has no such buffer.
    pub const fn without_registration(mut self) -> Self {
        self.registration = UNREGISTERED;
        self
    }

    /// The registered buffer that holds the range, if one does.
    pub const fn registration(&self) -> Option<u32> {
        if self.registration == UNREGISTERED { None } else { Some(self.registration) }
    }

    /// Length in bytes.
    pub const fn len(&self) -> usize {
        self.length as usize
    }

    /// True for a segment of no bytes.
    pub const fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Start of the range, to hand to the kernel.
    pub const fn as_ptr(&self) -> *mut u8 {
        self.address.as_ptr()
    }

    /// True when both address and length are multiples of `alignment` (a power of two).
    pub fn is_aligned(&self, alignment: usize) -> bool {
        (self.address.as_ptr() as usize | self.len()) & (alignment - 1) == 0
    }

    /// The part that starts at `offset` and is `length` bytes long.
    ///
    /// # Panics
    /// When the part does not lie inside the segment.
    pub fn part(&self, offset: usize, length: usize) -> Self {
        assert!(
            offset <= self.len() && length <= self.len() - offset,
            "part {offset}+{length} of a segment of {}",
            self.len()
        );
        // SAFETY: `offset` is at most the length, so the result is inside or one past the range
        // that `new`'s caller promised.
        let address = unsafe { self.address.add(offset) };
        Self { address, length: length as u32, registration: self.registration }
    }

    /// Copies the start of the segment into `target`.
    ///
    /// # Panics
    /// When `target` is longer than the segment.
    pub fn read(&self, target: &mut [u8]) {
        assert!(target.len() <= self.len(), "read past the end of a segment");
        // SAFETY: the source is mapped by the promise of `new` and long enough by the assertion;
        // the target is a Rust slice, which cannot overlap memory nobody holds a reference to.
        unsafe { self.address.as_ptr().copy_to_nonoverlapping(target.as_mut_ptr(), target.len()) }
    }

    /// Copies `source` to the start of the segment.
    ///
    /// # Panics
    /// When `source` is longer than the segment.
    pub fn write(&self, source: &[u8]) {
        assert!(source.len() <= self.len(), "write past the end of a segment");
        // SAFETY: as in `read`, with the directions swapped.
        unsafe { self.address.as_ptr().copy_from_nonoverlapping(source.as_ptr(), source.len()) }
    }

    /// Fills the segment with zeroes.
    pub fn zero(&self) {
        // SAFETY: the whole range is mapped and writable by the promise of `new`.
        unsafe { self.address.as_ptr().write_bytes(0, self.len()) }
    }

    /// Copies the start of this segment to the start of `target`, `length` bytes.
    ///
    /// # Panics
    /// When either is shorter.
    pub fn copy_to(&self, target: &Segment, length: usize) {
        assert!(length <= self.len() && length <= target.len(), "copy past the end of a segment");
        // SAFETY: both ranges are mapped and long enough; `copy_to` allows overlap, which a guest
        // can cause by naming the same page twice.
        unsafe { self.address.as_ptr().copy_to(target.address.as_ptr(), length) }
    }
}

/// One buffer of a [`BufferPool`]. Not `Clone`: who holds it owns the memory.
#[derive(Debug, PartialEq, Eq)]
pub struct Buffer {
    index: u32,
}

/// A fixed number of equal, page-aligned buffers in one allocation, made at start.
///
/// While a device uses a buffer its bytes cannot be borrowed: [`BufferPool::lend`] gives out the
/// segment and marks the buffer, [`BufferPool::returned`] takes the mark off again.
#[derive(Debug)]
pub struct BufferPool {
    /// First byte of the first buffer, 4096-byte aligned, inside `allocation`.
    base: NonNull<u8>,
    allocation: NonNull<u8>,
    layout: Layout,
    buffer_size: usize,
    free: Vec<u32>,
    lent: Vec<bool>,
    registration: u32,
}

// SAFETY: the pool owns its allocation alone; moving it to another thread moves that ownership.
unsafe impl Send for BufferPool {}

impl BufferPool {
    /// Allocates `count` buffers of `buffer_size` bytes, zeroed and 4096-byte aligned.
    ///
    /// # Panics
    /// When either number is zero or `buffer_size` is no multiple of 4096.
    pub fn new(count: usize, buffer_size: usize) -> Self {
        assert!(count > 0 && buffer_size > 0 && buffer_size.is_multiple_of(4096));
        // Aligned by hand: zeroed memory of a natural alignment comes from the system as untouched
        // pages, while asking for more alignment would write zeroes over all of it at once.
        let layout = Layout::array::<u8>(count * buffer_size + 4096)
            .expect("a pool is far smaller than the address space");
        // SAFETY: the layout has a non-zero size.
        let allocation = unsafe { alloc_zeroed(layout) };
        let allocation = NonNull::new(allocation).unwrap_or_else(|| handle_alloc_error(layout));
        // SAFETY: the offset is less than 4096, and the allocation has that much to spare.
        let base = unsafe { allocation.add(allocation.as_ptr().align_offset(4096)) };
        Self {
            base,
            allocation,
            layout,
            buffer_size,
            free: (0..count as u32).rev().collect(),
            lent: vec![false; count],
            registration: UNREGISTERED,
        }
    }

    /// Notes that the whole pool is registered buffer `index` of the device that will use it.
    pub fn set_registration(&mut self, index: u32) {
        self.registration = index;
    }

    /// The whole pool as one segment, to register it with a device.
    pub fn whole(&self) -> Segment {
        // SAFETY: the allocation lives as long as the pool, which outlives every I/O over it by
        // the contract of `lend`.
        unsafe { Segment::new(self.base, (self.lent.len() * self.buffer_size) as u32) }
    }

    /// Bytes in each buffer.
    pub fn buffer_size(&self) -> usize {
        self.buffer_size
    }

    /// Buffers that can be taken now.
    pub fn available(&self) -> usize {
        self.free.len()
    }

    /// Buffers there are.
    pub fn capacity(&self) -> usize {
        self.lent.len()
    }

    /// Takes a buffer, with whatever bytes it last held.
    pub fn take(&mut self) -> Option<Buffer> {
        self.free.pop().map(|index| Buffer { index })
    }

    /// Gives a buffer back.
    ///
    /// # Panics
    /// When it is still lent to a device.
    pub fn put(&mut self, buffer: Buffer) {
        assert!(!self.lent[buffer.index as usize], "buffer {} put back while lent", buffer.index);
        self.free.push(buffer.index);
    }

    fn address(&self, buffer: &Buffer) -> NonNull<u8> {
        // SAFETY: an index below `count` keeps the address inside the allocation.
        unsafe { self.base.add(buffer.index as usize * self.buffer_size) }
    }

    /// The buffer's memory for a device. Until [`BufferPool::returned`], its bytes cannot be
    /// borrowed. The pool must outlive the I/O.
    ///
    /// # Panics
    /// When it is lent already.
    pub fn lend(&mut self, buffer: &Buffer) -> Segment {
        let lent = &mut self.lent[buffer.index as usize];
        assert!(!*lent, "buffer {} lent twice", buffer.index);
        *lent = true;
        self.segment(buffer)
    }

    fn segment(&self, buffer: &Buffer) -> Segment {
        // SAFETY: the range is part of the pool's allocation, which its owner keeps until every
        // I/O has completed; `bytes` refuses to make references while the buffer is lent.
        let segment = unsafe { Segment::new(self.address(buffer), self.buffer_size as u32) };
        Segment { registration: self.registration, ..segment }
    }

    /// Notes that the device is done with the buffer.
    pub fn returned(&mut self, buffer: &Buffer) {
        assert!(self.lent[buffer.index as usize], "buffer {} returned unlent", buffer.index);
        self.lent[buffer.index as usize] = false;
    }

    /// The buffer's bytes.
    ///
    /// # Panics
    /// While it is lent to a device.
    pub fn bytes(&self, buffer: &Buffer) -> &[u8] {
        assert!(!self.lent[buffer.index as usize], "buffer {} read while lent", buffer.index);
        // SAFETY: the range is ours, initialised by `alloc_zeroed`, no device uses it (assertion),
        // and the shared borrow of the pool keeps `bytes_mut` away.
        unsafe { std::slice::from_raw_parts(self.address(buffer).as_ptr(), self.buffer_size) }
    }

    /// The buffer's bytes, to fill.
    ///
    /// # Panics
    /// While it is lent to a device.
    pub fn bytes_mut(&mut self, buffer: &mut Buffer) -> &mut [u8] {
        assert!(!self.lent[buffer.index as usize], "buffer {} changed while lent", buffer.index);
        // SAFETY: as in `bytes`; the exclusive borrow of the pool keeps every other slice away.
        unsafe { std::slice::from_raw_parts_mut(self.address(buffer).as_ptr(), self.buffer_size) }
    }
}

impl Drop for BufferPool {
    fn drop(&mut self) {
        // SAFETY: it came from `alloc_zeroed` with this layout and is freed once, here.
        unsafe { dealloc(self.allocation.as_ptr(), self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lent_buffer_comes_back_with_what_the_device_wrote() {
        let mut pool = BufferPool::new(2, 4096);
        let mut buffer = pool.take().unwrap();
        pool.bytes_mut(&mut buffer).fill(7);
        let segment = pool.lend(&buffer);
        segment.part(0, 8).write(&[1; 8]);
        pool.returned(&buffer);
        assert_eq!(&pool.bytes(&buffer)[..9], &[1, 1, 1, 1, 1, 1, 1, 1, 7]);
        pool.put(buffer);
        assert_eq!(pool.available(), 2);
    }

    #[test]
    #[should_panic(expected = "read while lent")]
    fn a_lent_buffer_cannot_be_read() {
        let mut pool = BufferPool::new(1, 4096);
        let buffer = pool.take().unwrap();
        let _segment = pool.lend(&buffer);
        pool.bytes(&buffer);
    }

    #[test]
    #[should_panic(expected = "part 4000+97")]
    fn a_part_outside_its_segment_is_our_bug() {
        let mut pool = BufferPool::new(1, 4096);
        let buffer = pool.take().unwrap();
        pool.lend(&buffer).part(4000, 97);
    }
}
