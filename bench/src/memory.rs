//! Guest memory: one memfd, mapped here and, through the same descriptor, in the server.
//!
//! The only file of this crate with `unsafe`. Everything else works with offsets into the region,
//! and every access is checked against its length. The other side may change any byte at any
//! time, so nothing here hands out a reference: bytes are copied in and out, and ring indexes
//! are atomics.

#![allow(unsafe_code)]

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// Size and alignment of a page, and of everything that starts a page in the region.
pub(crate) const PAGE: u64 = 4096;

/// Where the region starts in the guest's physical address space.
///
/// Neither 0 nor equal to the mapping's address, so that a server that mixes the two kinds of
/// address fails at once.
const GUEST_BASE: u64 = 1 << 30;

/// A shared memory region. Offsets count bytes from its start.
pub(crate) struct GuestMemory {
    file: OwnedFd,
    base: NonNull<u8>,
    bytes: u64,
}

// SAFETY: the struct owns its mapping, which stays valid and in place until drop, from any
// thread. Bytes are accessed by copy or by atomics, never through references to plain memory.
unsafe impl Send for GuestMemory {}
// SAFETY: as above. Two threads that copy the same bytes at once read garbage, as with any peer
// that ignores the ring protocol, but no reference to plain memory ever exists.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Makes and maps a zeroed region of `bytes`, rounded up to pages, with all pages present.
    pub(crate) fn new(bytes: u64) -> Result<Self, String> {
        let bytes = bytes.next_multiple_of(PAGE).max(PAGE);
        let length = usize::try_from(bytes)
            .ok()
            .and_then(NonZeroUsize::new)
            .ok_or_else(|| format!("guest memory of {bytes} bytes does not fit in memory"))?;
        let fail = |what: &str, error: nix::Error| format!("cannot {what} guest memory: {error}");
        let file = memfd_create(c"bessel-bench", MFdFlags::MFD_CLOEXEC)
            .map_err(|error| fail("create", error))?;
        nix::unistd::ftruncate(&file, bytes as i64).map_err(|error| fail("size", error))?;
        // SAFETY: a fresh mapping at an address the kernel chooses overlaps nothing. The memfd has
        // `bytes` bytes and only this process and the server it is sent to know it; a server that
        // truncates it ends this process by SIGBUS, which is an end.
        let base = unsafe {
            mmap(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                // Populated, so that no page fault is measured as latency.
                MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE,
                &file,
                0,
            )
        }
        .map_err(|error| fail("map", error))?;
        Ok(Self { file, base: base.cast(), bytes })
    }

    /// The descriptor to send to the server.
    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Length in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The address of `offset` in this process, which vhost-user calls the user address.
    pub(crate) fn user_address(&self, offset: u64) -> u64 {
        self.base.as_ptr() as u64 + offset
    }

    /// The address of `offset` in guest memory, as descriptors carry it.
    pub(crate) fn guest_address(&self, offset: u64) -> u64 {
        GUEST_BASE + offset
    }

    /// The offset of a guest address, for the device side of tests.
    #[cfg(test)]
    pub(crate) fn offset_of(&self, guest_address: u64) -> u64 {
        guest_address.checked_sub(GUEST_BASE).expect("tests use addresses of the region")
    }

    /// Copies `bytes` to `offset`.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        let target = self.pointer(offset, bytes.len());
        // SAFETY: `pointer` checked that the target range is inside the mapping; the source is a
        // live slice of the same length in other memory (no reference to the mapping exists).
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) }
    }

    /// Copies the bytes at `offset` out.
    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) {
        let source = self.pointer(offset, bytes.len());
        // SAFETY: `pointer` checked that the source range is inside the mapping; the target is a
        // live, exclusive slice of the same length in other memory.
        unsafe { std::ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), bytes.len()) }
    }

    /// The byte at `offset`.
    pub(crate) fn read_u8(&self, offset: u64) -> u8 {
        let mut byte = [0];
        self.read(offset, &mut byte);
        byte[0]
    }

    /// The 32-bit little-endian number at `offset`.
    pub(crate) fn read_u32(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Loads a little-endian ring field at an even `offset`.
    pub(crate) fn load_u16(&self, offset: u64, ordering: Ordering) -> u16 {
        u16::from_le(self.atomic(offset).load(ordering))
    }

    /// Stores a little-endian ring field at an even `offset`.
    pub(crate) fn store_u16(&self, offset: u64, value: u16, ordering: Ordering) {
        self.atomic(offset).store(value.to_le(), ordering);
    }

    fn atomic(&self, offset: u64) -> &AtomicU16 {
        assert!(offset.is_multiple_of(2), "ring field at odd offset {offset}");
        let pointer = self.pointer(offset, 2);
        // SAFETY: the two bytes are inside the mapping, which outlives `self`; the mapping starts
        // on a page and the offset is even, so the address is aligned; no plain reference to the
        // mapping exists, and the server accesses ring fields atomically too.
        unsafe { AtomicU16::from_ptr(pointer.cast()) }
    }

    fn pointer(&self, offset: u64, length: usize) -> *mut u8 {
        let end = offset.checked_add(length as u64);
        assert!(
            end.is_some_and(|end| end <= self.bytes),
            "access to {length} bytes at {offset} of a region of {} bytes",
            self.bytes
        );
        // SAFETY: the assertion above keeps the result inside the mapping.
        unsafe { self.base.as_ptr().add(offset as usize) }
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: `base` and `bytes` are those of the mapping made in `new`, which only this
        // struct knows and which is not used after drop.
        let unmapped = unsafe { munmap(self.base.cast(), self.bytes as usize) };
        assert!(unmapped.is_ok(), "unmapping what was mapped cannot fail");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_as_written() {
        let memory = GuestMemory::new(PAGE + 1).unwrap();
        assert_eq!(memory.bytes(), 2 * PAGE);
        memory.write(PAGE - 2, &[1, 2, 3, 4]);
        assert_eq!(memory.read_u32(PAGE - 2), 0x0403_0201);
        assert_eq!(memory.load_u16(PAGE, Ordering::Acquire), 0x0403);
        memory.store_u16(PAGE, 0xbeef, Ordering::Release);
        assert_eq!(memory.read_u8(PAGE), 0xef);
    }

    #[test]
    #[should_panic(expected = "access to 2 bytes")]
    fn access_past_the_end_is_caught() {
        GuestMemory::new(PAGE).unwrap().write(PAGE - 1, &[0, 0]);
    }
}
