//! A memory file, mapped: I/O to it is a copy, without a system call.
//!
//! Only for files that nobody can make smaller ([`is_sealed`]): a copy to where a file has ended would
//! end the process. So does one for which the system has no page left, so whoever makes the file reserves
//! them. Memory of a guest that the guest has taken away reads as zeroes here (`vhost/src/sigbus.rs`), where
//! the kernel would have refused it: what it then writes to its own volume is zeroes.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};

use crate::sys::{IoVec, prefetch};

/// Whether the file is memory that stays as large as it is.
pub(super) fn is_sealed(file: &File) -> bool {
    let seals = fcntl(file, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain);
    seals.is_ok_and(|seals| seals.contains(SealFlag::F_SEAL_SHRINK))
}

/// Bytes at the start of an operation's memory that are asked for ahead: by then the processor sees by
/// itself where this goes, and it has found the page.
const EXPECTED_BYTES: usize = 1024;
const CACHE_LINE: usize = 64;

/// The first bytes of a sealed file, in our address space.
///
/// Others may map the same file. Who writes where and when is theirs to agree on, as with any device:
/// copies that meet leave a mixture.
#[derive(Debug)]
pub(super) struct Mapped {
    base: NonNull<u8>,
    length: NonZeroUsize,
    writable: bool,
}

// SAFETY: the mapping is not bound to a thread, and is only copied from and to.
unsafe impl Send for Mapped {}

impl Mapped {
    /// Maps `length` bytes of a sealed file, which has as many.
    ///
    /// # Errors
    /// The system's.
    ///
    /// # Panics
    /// When the file is not sealed.
    pub(super) fn new(file: &File, length: u64, writable: bool) -> io::Result<Self> {
        assert!(is_sealed(file), "only memory that cannot go away is mapped");
        let too_long = |_| io::Error::from(io::ErrorKind::OutOfMemory);
        let length = usize::try_from(length).map_err(too_long)?;
        let length = NonZeroUsize::new(length).expect("an empty device was refused");
        let write = if writable { ProtFlags::PROT_WRITE } else { ProtFlags::empty() };
        let access = ProtFlags::PROT_READ | write;
        let mut flags = MapFlags::MAP_SHARED;
        let metadata = file.metadata()?;
        // Pages that are there need not be found one by one, and others stay where they are: nowhere.
        if writable && metadata.blocks() * 512 >= metadata.size() {
            flags |= MapFlags::MAP_POPULATE;
        }
        // SAFETY: the kernel chooses a place where nothing is.
        let base = unsafe { mmap(None, length, access, flags, file, 0) }?;
        // A picture of a crash is of us, not of what guests keep. Nothing depends on it.
        // SAFETY: the mapping was made in the line above, and stays as it is.
        let _ = unsafe { madvise(base, length.get(), MmapAdvise::MADV_DONTDUMP) };
        Ok(Self { base: base.cast(), length, writable })
    }

    /// Whether [`Mapped::write`] may be called.
    pub(super) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Has the memory of an operation that comes soon brought to the cache.
    #[inline]
    pub(super) fn expect(&self, offset: u64, pieces: &[IoVec]) {
        let Some(piece) = pieces.first() else { return };
        let here = self.base.as_ptr().wrapping_add(offset as usize);
        for line in (0..piece.len().min(EXPECTED_BYTES)).step_by(CACHE_LINE) {
            prefetch(here.wrapping_add(line));
            prefetch(piece.as_mut_ptr().wrapping_add(line));
        }
    }

    /// Copies from `offset` on into `pieces`.
    ///
    /// # Panics
    /// When that is past the end.
    pub(super) fn read(&self, offset: u64, pieces: &[IoVec]) {
        self.each(offset, pieces, |here, piece, length| {
            // SAFETY: `each` has seen that `length` bytes are there here; the piece comes from a
            // `Segment`, mapped and writable until this I/O is over. They may be the same memory
            // only if somebody made a guest's memory of this file, hence `copy`.
            unsafe { std::ptr::copy(here, piece, length) }
        })
    }

    /// Copies `pieces` to `offset` and on.
    ///
    /// # Panics
    /// When that is past the end, or the file was mapped to be read alone.
    pub(super) fn write(&self, offset: u64, pieces: &[IoVec]) {
        assert!(self.writable, "a write to memory that is mapped to be read");
        self.each(offset, pieces, |here, piece, length| {
            // SAFETY: as in `read`, the other way round.
            unsafe { std::ptr::copy(piece, here, length) }
        })
    }

    fn each(&self, offset: u64, pieces: &[IoVec], mut copy: impl FnMut(*mut u8, *mut u8, usize)) {
        let start = usize::try_from(offset).expect("a device fits the address space");
        let mut done = 0;
        for piece in pieces {
            let end = (start + done).checked_add(piece.len());
            assert!(
                end.is_some_and(|end| end <= self.length.get()),
                "a copy past the device's end"
            );
            let here = self.base.as_ptr().wrapping_add(start + done);
            copy(here, piece.as_mut_ptr(), piece.len());
            done += piece.len();
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` and not unmapped since; nobody has kept an address in it.
        let unmapped = unsafe { munmap(self.base.cast(), self.length.get()) };
        unmapped.expect("it was mapped as a whole");
    }
}
