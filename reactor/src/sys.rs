//! The system calls that no safe wrapper offers: what a device is, and I/O from raw memory. And the
//! one instruction.
//!
//! Each function here is safe to call: what the kernel needs to be true of an argument is in the
//! argument's type. Memory comes as [`IoVec`], which only a [`Segment`] can make, so the promise of
//! `Segment::new` (mapped until the I/O is over) reaches the system call.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::buffer::Segment;

/// A piece of a segment in the form the kernel reads.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct IoVec(libc::iovec);

// SAFETY: an address and a length, never dereferenced here; what they promise holds on every
// thread, as for `Segment`.
unsafe impl Send for IoVec {}

impl IoVec {
    /// A piece of no bytes, for tables made ahead.
    pub(crate) const EMPTY: Self = Self(libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 });

    /// Start of the piece.
    pub(crate) fn as_mut_ptr(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Drops the first `bytes` bytes.
    ///
    /// # Panics
    /// When the piece is shorter.
    pub(crate) fn advance(&mut self, bytes: usize) {
        assert!(bytes <= self.0.iov_len, "advanced past the end of a piece");
        self.0.iov_base = self.0.iov_base.wrapping_byte_add(bytes);
        self.0.iov_len -= bytes;
    }
}

impl From<&Segment> for IoVec {
    fn from(segment: &Segment) -> Self {
        Self(libc::iovec { iov_base: segment.as_ptr().cast(), iov_len: segment.len() })
    }
}

/// The form in which the kernel takes a table of pieces.
pub(crate) fn as_iovecs(pieces: &[IoVec]) -> *const libc::iovec {
    pieces.as_ptr().cast()
}

/// Reads into `pieces` from `offset` on. Returns the bytes read; zero at the end.
pub(crate) fn read_at(fd: BorrowedFd<'_>, pieces: &[IoVec], offset: u64) -> io::Result<usize> {
    let (fd, offset) = (fd.as_raw_fd(), offset as i64);
    // A single piece without a table is the common case, and 3 % cheaper on tmpfs (4 KiB).
    let result = if let [IoVec(piece)] = pieces {
        // SAFETY: the piece comes from a `Segment`, mapped and writable until this I/O is over.
        unsafe { libc::pread(fd, piece.iov_base, piece.iov_len, offset) }
    } else {
        // SAFETY: as above for every piece; the table and its length are one slice.
        unsafe { libc::preadv(fd, as_iovecs(pieces), pieces.len() as i32, offset) }
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as usize) }
}

/// Writes `pieces` from `offset` on. Returns the bytes written.
pub(crate) fn write_at(fd: BorrowedFd<'_>, pieces: &[IoVec], offset: u64) -> io::Result<usize> {
    let (fd, offset) = (fd.as_raw_fd(), offset as i64);
    let result = if let [IoVec(piece)] = pieces {
        // SAFETY: as in `read_at`; the kernel only reads the memory.
        unsafe { libc::pwrite(fd, piece.iov_base, piece.iov_len, offset) }
    } else {
        // SAFETY: as in `read_at`; the kernel only reads the memory.
        unsafe { libc::pwritev(fd, as_iovecs(pieces), pieces.len() as i32, offset) }
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as usize) }
}

/// Whether the file can be asked to answer at once or say that it would wait. io_uring hands every
/// request for a file that cannot to a kernel worker.
///
/// Tries it with a read at offset zero.
pub(crate) fn takes_nowait(fd: BorrowedFd<'_>, scratch: &Segment) -> bool {
    let piece = IoVec::from(scratch);
    // SAFETY: the piece comes from a `Segment`; the table is the one element.
    let result =
        unsafe { libc::preadv2(fd.as_raw_fd(), as_iovecs(&[piece]), 1, 0, libc::RWF_NOWAIT) };
    // Any other failure is the device's, and shows when it is really read.
    result >= 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EOPNOTSUPP)
}

/// What direct I/O wants of addresses and offsets, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct DirectAlignment {
    pub(crate) memory: u32,
    pub(crate) offset: u32,
}

/// Asks the file system or driver for its alignments. `None` when the kernel (before 6.1) or the
/// file system does not say; zeroes when the file cannot do direct I/O.
pub(crate) fn direct_alignment(fd: BorrowedFd<'_>) -> Option<DirectAlignment> {
    // SAFETY: all-zero bytes are a valid `statx`, which is integers only.
    let mut answer: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is a C string, the answer a `statx` that outlives the call.
    let result = unsafe {
        libc::statx(
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut answer,
        )
    };
    let said = result == 0 && answer.stx_mask & libc::STATX_DIOALIGN != 0;
    said.then_some(DirectAlignment {
        memory: answer.stx_dio_mem_align,
        offset: answer.stx_dio_offset_align,
    })
}

/// Asks for the cache line at `address`, which will be read or written soon. Any address will do: it is
/// a hint, and nothing there is looked at.
#[inline]
pub fn prefetch<T>(address: *const T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: neither faults nor changes anything that the program sees.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = address;
}

/// As [`prefetch`], of a line that will be written: others lose their copies of it.
#[inline]
pub fn prefetch_to_write<T>(address: *const T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: as in `prefetch`.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_ET0>(address.cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = address;
}

mod ioctls {
    nix::ioctl_read!(
        /// BLKGETSIZE64 of `linux/fs.h`: size of a block device in bytes.
        block_size_bytes,
        0x12,
        114,
        u64
    );
    nix::ioctl_read_bad!(
        /// BLKSSZGET of `linux/fs.h`: bytes in a logical sector. Its number has no direction bits.
        block_sector_bytes,
        0x1268,
        libc::c_int
    );
}

/// Size of a block device in bytes.
pub(crate) fn block_device_bytes(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut bytes = 0;
    // SAFETY: the request writes one u64 to the address, which outlives the call.
    unsafe { ioctls::block_size_bytes(fd.as_raw_fd(), &raw mut bytes) }?;
    Ok(bytes)
}

/// Bytes in a logical sector of a block device.
pub(crate) fn block_device_sector(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut bytes = 0;
    // SAFETY: the request writes one int to the address, which outlives the call.
    unsafe { ioctls::block_sector_bytes(fd.as_raw_fd(), &raw mut bytes) }?;
    Ok(bytes as u32)
}

/// Gives the calling thread the lowest priority there is; on Linux threads have their own.
pub(crate) fn give_way() -> io::Result<()> {
    // SAFETY: the call takes numbers alone. 0 is the calling thread.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
