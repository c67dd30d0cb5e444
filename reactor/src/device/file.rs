//! Opening the store's file or block device, and finding out what it can do.
//!
//! All questions are asked here, once, before the first I/O: size, alignments, whether a completed
//! write survives a power cut, and which engine suits. `uring.rs` does the I/O. A wrong answer here
//! loses data (a cache taken for durable) or speed, so whatever cannot be learned is taken to be
//! the careful way.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{major, minor};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, fstatfs};

use super::{DeviceProperties, Token, lock, mapped, ring};
use crate::buffer::BufferPool;
use crate::sys;
use crate::units::{ByteCount, SECTOR_SIZE};

/// `RAMFS_MAGIC` of `linux/magic.h`.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);
/// `HUGETLBFS_MAGIC` of the same.
const HUGETLBFS_MAGIC: FsType = FsType(0x9584_58f6);

/// Strictest offset alignment the rest of Bessel can honour: a block.
const OFFSET_ALIGNMENT_MAX: u32 = crate::units::BLOCK_SIZE as u32;

/// Memory alignment assumed of direct I/O where nothing says: a page always does.
const MEMORY_ALIGNMENT_UNKNOWN: u32 = 4096;

/// Operations that a queue is taken to hold where nothing says.
const POLLED_UNKNOWN: usize = 64;

/// Who carries out reads and writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Engine {
    /// `Uring` where the file can answer without waiting, `Mapped` where it is memory that cannot go
    /// away, `Inline` elsewhere.
    #[default]
    Auto,
    /// io_uring: many operations at once, none of them in the caller's time.
    Uring,
    /// The system call is made where the operation is queued. Right for tmpfs, whose I/O is a copy:
    /// io_uring hands it to a kernel worker that then fights the polling thread for its core.
    Inline,
    /// The file is mapped, and the copies made where the operations are handed over. For sealed memory
    /// files, and chosen for these by itself.
    Mapped,
}

/// How to open a device.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Most operations in flight: 1 to 16384.
    pub depth: u32,
    /// Open without the right to write; a write then fails with `EBADF`.
    pub read_only: bool,
    /// Who does the I/O.
    pub engine: Engine,
    /// The reads and writes of which this is true end at once and do nothing: a null device, to measure
    /// what everything else costs. Only of mapped memory.
    pub drops: Option<fn(Token) -> bool>,
    /// Ask a block device that can be polled for completions, rather than have it interrupt. For threads that poll
    /// anyway: one that has operations in flight there cannot sleep.
    pub poll: bool,
}

impl Default for OpenOptions {
    /// 256 operations, writable, the engine that suits, completions by interrupt.
    fn default() -> Self {
        Self { depth: 256, read_only: false, engine: Engine::Auto, drops: None, poll: false }
    }
}

/// The device cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// It does not exist, or we may not.
    #[error("cannot open {path}; check that it exists and that this user may read and write it")]
    Open {
        /// What was opened.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// A directory, socket, terminal...
    #[error("{path} is neither a block device nor a regular file; name one of these")]
    NotADevice {
        /// What was opened.
        path: PathBuf,
    },
    /// No room for a single sector.
    #[error("{path} is empty; give the file a size, or check the device's medium")]
    Empty {
        /// What was opened.
        path: PathBuf,
    },
    /// It would not say what it is.
    #[error("cannot find out the {what} of {path}")]
    Inspect {
        /// What was opened.
        path: PathBuf,
        /// What was asked.
        what: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// Sectors larger than a block.
    #[error(
        "{path} wants offsets that are multiples of {bytes} bytes; at most 4096 is supported, \
         so use another device"
    )]
    Alignment {
        /// What was opened.
        path: PathBuf,
        /// What it wants.
        bytes: u32,
    },
    /// No io_uring on this kernel, or not for us.
    #[error(
        "io_uring is not available; likely cause: a kernel before 5.15, or disabled by sysctl or \
         a container's seccomp filter; try `sysctl -w kernel.io_uring_disabled=0`"
    )]
    Ring {
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// The memory is there, and no room for it in the address space.
    #[error("cannot map the {bytes} bytes of {path}; choose a smaller size")]
    Map {
        /// What was opened.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// Only memory that cannot go away is mapped.
    #[error("{path} is not a sealed memory file, so it cannot be mapped; choose another engine")]
    NotSealed {
        /// What was opened.
        path: PathBuf,
    },
    /// io_uring is there, and its queues do not fit into the memory we may lock.
    #[error(
        "no memory for an io_uring queue; likely cause: this user may lock too little; raise \
         `ulimit -l`, or LimitMEMLOCK= of the systemd unit"
    )]
    LockedMemory {
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
}

impl OpenError {
    /// What a refusal to set up io_uring means.
    pub(super) fn ring(source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ENOMEM) => Self::LockedMemory { source },
            _ => Self::Ring { source },
        }
    }
}

/// An open file and what is known of it.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) file: File,
    pub(super) properties: DeviceProperties,
    /// Never [`Engine::Auto`].
    pub(super) engine: Engine,
    /// Its completions are to be polled for: so many at a time.
    pub(super) polled: Option<usize>,
}

/// Opens `path` and asks it everything.
pub(super) fn open(path: &Path, options: &OpenOptions) -> Result<OpenFile, OpenError> {
    let inspect = |what| {
        move |source: io::Error| OpenError::Inspect { path: path.to_path_buf(), what, source }
    };
    let file = File::options()
        .read(true)
        .write(!options.read_only)
        .open(path)
        .map_err(|source| OpenError::Open { path: path.to_path_buf(), source })?;
    let metadata = file.metadata().map_err(inspect("type"))?;
    let block_device = metadata.file_type().is_block_device();
    if !block_device && !metadata.is_file() {
        return Err(OpenError::NotADevice { path: path.to_path_buf() });
    }

    lock::mark_in_flight(&file).map_err(io::Error::from).map_err(inspect("locks"))?;
    let in_memory = !block_device && is_in_memory(&file).map_err(inspect("file system"))?;
    let direct = !in_memory && use_direct_io(&file);
    let bytes = if block_device {
        sys::block_device_bytes(file.as_fd()).map_err(inspect("size"))?
    } else {
        metadata.len()
    };
    let sector = if block_device {
        sys::block_device_sector(file.as_fd()).map_err(inspect("sector size"))?
    } else {
        SECTOR_SIZE as u32
    };
    let (memory_alignment, offset_alignment) = alignments(&file, direct, block_device, sector);
    if offset_alignment > OFFSET_ALIGNMENT_MAX {
        let path = path.to_path_buf();
        return Err(OpenError::Alignment { path, bytes: offset_alignment });
    }
    let capacity = bytes - bytes % u64::from(offset_alignment);
    if capacity == 0 {
        return Err(OpenError::Empty { path: path.to_path_buf() });
    }

    let volatile_cache = if in_memory {
        false // Nothing there survives a power cut, and killing the process loses nothing.
    } else if block_device && direct {
        // As the kernel tells it.
        queue_attribute(metadata.rdev(), "write_cache").is_none_or(|said| said != "write through")
    } else {
        true // The page cache, or a file system's metadata and the disk below it.
    };
    let engine = match options.engine {
        Engine::Auto if in_memory && mapped::is_sealed(&file) => Engine::Mapped,
        Engine::Auto if in_memory || !answers_at_once(&file) => Engine::Inline,
        Engine::Auto => Engine::Uring,
        Engine::Mapped if !mapped::is_sealed(&file) => {
            return Err(OpenError::NotSealed { path: path.to_path_buf() });
        }
        chosen => chosen,
    };
    assert!(options.drops.is_none() || engine == Engine::Mapped, "only mapped memory drops data");
    let polled = match options.poll && block_device && direct && engine == Engine::Uring {
        true => room_to_poll(path, metadata.rdev()),
        false => None,
    };
    let properties = DeviceProperties {
        capacity: ByteCount::new(capacity),
        offset_alignment,
        memory_alignment,
        volatile_cache,
        keeps_data: options.drops.is_none(),
    };
    Ok(OpenFile { file, properties, engine, polled })
}

/// Whether the file lives in memory only.
fn is_in_memory(file: &File) -> io::Result<bool> {
    let kind = fstatfs(file)?.filesystem_type();
    Ok([TMPFS_MAGIC, RAMFS_MAGIC, HUGETLBFS_MAGIC].contains(&kind))
}

/// Switches direct I/O on. False where the file system has none; the page cache then serves.
fn use_direct_io(file: &File) -> bool {
    let refused = sys::direct_alignment(file.as_fd()).is_some_and(|said| said.offset == 0);
    if refused {
        return false;
    }
    let Ok(flags) = fcntl(file, FcntlArg::F_GETFL) else { return false };
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_DIRECT;
    fcntl(file, FcntlArg::F_SETFL(flags)).is_ok()
}

/// Alignment of memory, then of offsets.
fn alignments(file: &File, direct: bool, block_device: bool, sector: u32) -> (u32, u32) {
    let offset_least = sector.max(SECTOR_SIZE as u32);
    if !direct {
        return (1, offset_least);
    }
    match sys::direct_alignment(file.as_fd()) {
        // What is said of memory is about addresses alone. Kernels also want the length of each
        // piece to be whole sectors, and one number stands for both here.
        Some(said) => {
            let offset = said.offset.max(offset_least);
            (said.memory.max(offset), offset)
        }
        None if block_device => (MEMORY_ALIGNMENT_UNKNOWN, offset_least),
        // The disk below a file may have 4096-byte sectors, and nobody says.
        None => (MEMORY_ALIGNMENT_UNKNOWN, OFFSET_ALIGNMENT_MAX),
    }
}

/// Whether the file takes requests that must not wait; see [`Engine::Inline`].
fn answers_at_once(file: &File) -> bool {
    let mut pool = BufferPool::new(1, 4096);
    let buffer = pool.take().expect("the pool was made with one buffer");
    let segment = pool.lend(&buffer);
    sys::takes_nowait(file.as_fd(), &segment)
}

/// How many operations a block device takes that are to be polled for; none if it is to interrupt.
///
/// Not asked of files: some writes to them are ended by a thread of the kernel's, which needs the core that a
/// reactor would spin on meanwhile.
fn room_to_poll(path: &Path, device: u64) -> Option<usize> {
    // Where there is a queue that nothing interrupts for, an administrator has made it (`nvme.poll_queues`).
    queue_attribute(device, "io_poll").filter(|said| said == "1")?;
    let opened = File::options().read(true).custom_flags(libc::O_DIRECT).open(path);
    let probed = opened.map_err(|_| "it cannot be opened again").and_then(ring::probe);
    if let Err(why) = probed {
        tracing::warn!(path = %path.display(), why, "the device has queues to be polled, and cannot be");
        return None;
    }
    let room = queue_attribute(device, "nr_requests").and_then(|said| said.parse().ok());
    Some(room.unwrap_or(POLLED_UNKNOWN))
}

/// What the kernel says of a block device's queue, as `write_cache` or `io_poll`.
fn queue_attribute(device: u64, name: &str) -> Option<String> {
    let node = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    // A partition has no queue of its own; its parent's is one level up.
    let candidates = [format!("{node}/queue/{name}"), format!("{node}/../queue/{name}")];
    let said = candidates.iter().find_map(|path| std::fs::read_to_string(path).ok());
    said.map(|said| said.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_refused_by_name() {
        let directory = std::env::temp_dir();
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        let error = open(&directory, &options).unwrap_err();
        assert!(matches!(&error, OpenError::NotADevice { path } if *path == directory), "{error}");
    }

    #[test]
    fn an_empty_file_is_refused() {
        let path = std::env::temp_dir().join(format!("bessel-empty-{}", std::process::id()));
        File::create(&path).unwrap();
        let error = open(&path, &OpenOptions::default()).unwrap_err();
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(error, OpenError::Empty { .. }), "{error}");
    }

    #[test]
    fn a_ring_refused_for_want_of_memory_is_not_blamed_on_the_kernel() {
        let error = |errno| OpenError::ring(io::Error::from_raw_os_error(errno)).to_string();
        assert!(error(libc::ENOMEM).contains("ulimit -l"), "{}", error(libc::ENOMEM));
        assert!(error(libc::ENOMEM).contains("LimitMEMLOCK"), "{}", error(libc::ENOMEM));
        assert!(error(libc::ENOSYS).contains("sysctl"), "{}", error(libc::ENOSYS));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = open(Path::new("/nonexistent/store"), &OpenOptions::default()).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/store"), "{error}");
    }
}
