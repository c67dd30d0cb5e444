//! Memory that outlives this process: a file mapped for sharing.
//!
//! What is stored there is in the kernel's hands at once, and stays when the process is killed. It is
//! lost with the machine unless the kernel has happened to write it out.

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::ptr::NonNull;

use nix::fcntl::{Flock, FlockArg, posix_fallocate};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::buffer::Segment;

/// A mapped file.
#[derive(Debug)]
pub struct OutlivingMemory {
    address: NonNull<u8>,
    length: NonZeroUsize,
    /// Locked: nobody else opens the file while we have it.
    _file: Flock<File>,
}

// SAFETY: the mapping belongs to the process; the value owns it alone and may be moved anywhere.
unsafe impl Send for OutlivingMemory {}

impl OutlivingMemory {
    /// Makes a file of `length` zeroes that did not exist, readable by its owner only. Its space is
    /// taken now: a file system that fills up later cannot fault a store to it.
    ///
    /// # Errors
    /// What the system says, no space being the likeliest.
    pub fn create(path: &Path, length: usize) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(path)?;
        let made = posix_fallocate(&file, 0, length as i64)
            .map_err(io::Error::from)
            .and_then(|()| Self::map(file, length));
        if made.is_err() {
            let _ = std::fs::remove_file(path);
        }
        made
    }

    /// Maps a file that another process of ours made.
    ///
    /// # Errors
    /// What the system says; `InvalidData` for an empty file; `WouldBlock` while another process has it; and a file that anybody else
    /// could have made or changed, or that is no file, is refused as `PermissionDenied`.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = options.read(true).write(true).custom_flags(flags).open(path)?;
        let metadata = file.metadata()?;
        let ours = metadata.uid() == nix::unistd::geteuid().as_raw();
        if !metadata.is_file() || !ours || metadata.mode() & 0o077 != 0 {
            let what = "not a file that only we can read and write";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
        }
        let length = metadata.len();
        Self::map(file, usize::try_from(length).unwrap_or(0).min(u32::MAX as usize))
    }

    fn map(file: File, length: usize) -> io::Result<Self> {
        let locked = Flock::lock(file, FlockArg::LockExclusiveNonblock);
        let file = locked.map_err(|(_, error)| io::Error::from(error))?;
        let length = NonZeroUsize::new(length)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "an empty file"))?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let address = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &*file, 0) }?;
        Ok(Self { address: address.cast(), length, _file: file })
    }

    /// All of it. Must not be used once this value is gone.
    pub fn segment(&self) -> Segment {
        // SAFETY: the range stays mapped for as long as `self` lives, which the caller keeps longer
        // than the segment's users; no reference into it is ever made.
        unsafe { Segment::new(self.address, self.length.get() as u32) }
    }
}

impl Drop for OutlivingMemory {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map` with this length and is unmapped once, here.
        let unmapped = unsafe { munmap(self.address.cast(), self.length.get()) };
        debug_assert!(unmapped.is_ok(), "a mapping of ours can be unmapped");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_mapping_stores_the_next_one_finds() {
        let path = std::env::temp_dir().join(format!("bessel-outliving-{}", std::process::id()));
        let memory = OutlivingMemory::create(&path, 8192).unwrap();
        assert!(OutlivingMemory::create(&path, 8192).is_err(), "it exists");
        assert!(OutlivingMemory::open(&path).is_err(), "it is in use");
        memory.segment().part(4096, 5).write(b"hello");
        drop(memory);
        let memory = OutlivingMemory::open(&path).unwrap();
        let mut found = [0; 5];
        memory.segment().part(4096, 5).read(&mut found);
        assert_eq!((&found, memory.segment().len()), (b"hello", 8192));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn what_others_could_have_made_is_refused() {
        use std::os::unix::fs::PermissionsExt as _;
        let path = std::env::temp_dir().join(format!("bessel-planted-{}", std::process::id()));
        drop(OutlivingMemory::create(&path, 4096).unwrap());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(OutlivingMemory::open(&path).is_err());
        let link = path.with_extension("link");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(OutlivingMemory::open(&link).is_err());
        assert!(OutlivingMemory::open(&std::env::temp_dir()).is_err());
        std::fs::remove_file(&link).unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}
