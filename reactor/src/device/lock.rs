//! One daemon at a time on a device.
//!
//! A lock on the store is held by its own file descriptor for the whole life of the daemon, apart
//! from those that do I/O, so that reactors come and go without letting it slip. The kernel drops it
//! when the process dies, however it dies. It guards against a second process on this host only.
//!
//! What a killed process had in flight outlives it: the kernel finishes it later, on a device that
//! hangs much later, and it would land on top of what the next process has written meanwhile. So
//! every open device holds a second lock, shared, on a byte far beyond its end. It belongs to the
//! open file, which the ring keeps until its last operation has ended; whoever takes the device over
//! waits until it is free.

use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::stat::{major, minor};

/// How long a device may take over what a killed process had asked of it. Linux itself gives up on
/// a SCSI command after 30 s, and tries it again a few times.
const IN_FLIGHT_MAX: Duration = Duration::from_secs(120);
/// When to say that we wait. The kernel takes a moment to tear down a ring with nothing in it, too.
const IN_FLIGHT_WORTH_A_WORD: Duration = Duration::from_millis(500);
/// How often to look whether it is done.
const IN_FLIGHT_POLL: Duration = Duration::from_millis(5);
/// The byte whose lock says that I/O may be in flight: no device reaches there.
const IN_FLIGHT_BYTE: i64 = i64::MAX - 1;

/// Exclusive use of a device, until dropped.
#[derive(Debug)]
pub struct DeviceLock {
    _file: File,
}

/// The device is not ours to use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Another process has it.
    #[error("{path} is in use{holder}; stop that process, or name another device",
        holder = .holder.map_or(String::new(), |pid| format!(" by process {pid}")))]
    InUse {
        /// The device.
        path: PathBuf,
        /// Who holds the lock, when that can be found out.
        holder: Option<u32>,
    },
    /// A file system or another driver sits on the block device.
    #[error("{path} is mounted or claimed by the kernel; unmount it, or name another device")]
    Claimed {
        /// The device.
        path: PathBuf,
    },
    /// A directory, pipe, terminal...
    #[error("{path} is neither a block device nor a regular file; name one of these")]
    NotADevice {
        /// What was to be locked.
        path: PathBuf,
    },
    /// A symbolic link whose target is missing.
    #[error("{path} is a symbolic link to {target}, which is not there; correct the link")]
    Dangling {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// A process has gone and its I/O has not.
    #[error(
        "{path} has not finished what a killed process had asked of it after {} s; find out why it \
         hangs, then try again",
        IN_FLIGHT_MAX.as_secs()
    )]
    InFlight {
        /// The device.
        path: PathBuf,
    },
    /// It cannot be opened or locked.
    #[error("cannot lock {path}; check that it exists and that its file system has locks")]
    Os {
        /// The device.
        path: PathBuf,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
}

impl DeviceLock {
    /// Takes the lock, or says at once who has it. Waits for I/O that a killed process has left in
    /// flight, two minutes at most.
    pub fn acquire(path: &Path) -> Result<Self, LockError> {
        Self::acquire_within(path, IN_FLIGHT_MAX)
    }

    fn acquire_within(path: &Path, patience: Duration) -> Result<Self, LockError> {
        let failed = |source| LockError::Os { path: path.to_path_buf(), source };
        let kind = match std::fs::metadata(path) {
            Ok(metadata) => metadata.file_type(),
            Err(error) => {
                return Err(match std::fs::read_link(path) {
                    Ok(target) if error.kind() == io::ErrorKind::NotFound => {
                        LockError::Dangling { path: path.to_path_buf(), target }
                    }
                    _ => failed(error),
                });
            }
        };
        let block_device = kind.is_block_device();
        if !block_device && !kind.is_file() {
            return Err(LockError::NotADevice { path: path.to_path_buf() });
        }
        // O_EXCL on a block device claims it from mounts and from device-mapper as well.
        // And should it have become a pipe meanwhile, nobody waits for its other end.
        let flags = libc::O_NONBLOCK | if block_device { libc::O_EXCL } else { 0 };
        let file = match File::options().read(true).custom_flags(flags).open(path) {
            Ok(file) => file,
            Err(error) if block_device && error.raw_os_error() == Some(libc::EBUSY) => {
                return Err(busy(path));
            }
            Err(error) => return Err(failed(error)),
        };
        match file.try_lock() {
            Ok(()) => {
                wait_for_in_flight(&file, path, patience)?;
                Ok(Self { _file: file })
            }
            Err(TryLockError::WouldBlock) => {
                Err(LockError::InUse { path: path.to_path_buf(), holder: holder(path) })
            }
            Err(TryLockError::Error(error)) => Err(failed(error)),
        }
    }
}

/// Says of an open device, to whoever comes after us, that I/O may be in flight on it. Lasts until the
/// last reference to the open file is gone, the kernel's own among them.
pub(super) fn mark_in_flight(file: &File) -> nix::Result<()> {
    let lock = in_flight_lock(libc::F_RDLCK);
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock)).map(drop)
}

fn in_flight_lock(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: IN_FLIGHT_BYTE,
        l_len: 1,
        l_pid: 0,
    }
}

/// Nobody living uses the device. Returns once nobody dead does either.
fn wait_for_in_flight(file: &File, path: &Path, patience: Duration) -> Result<(), LockError> {
    let mut waited = Duration::ZERO;
    // Shared locks of other open files refuse an exclusive one. A descriptor open for reading may
    // not ask for one: it can ask whether somebody else could.
    while in_flight_elsewhere(file)
        .map_err(|error| LockError::Os { path: path.to_path_buf(), source: error.into() })?
    {
        if waited >= patience {
            return Err(LockError::InFlight { path: path.to_path_buf() });
        }
        if waited == IN_FLIGHT_WORTH_A_WORD {
            tracing::warn!(path = %path.display(), "I/O of a killed process is in flight, waiting for it");
        }
        std::thread::sleep(IN_FLIGHT_POLL);
        waited += IN_FLIGHT_POLL;
    }
    Ok(())
}

fn in_flight_elsewhere(file: &File) -> Result<bool, Errno> {
    let mut lock = in_flight_lock(libc::F_WRLCK);
    fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
}

/// A block device is claimed: by another daemon, whose lock shows, or by the kernel.
fn busy(path: &Path) -> LockError {
    let path_owned = path.to_path_buf();
    match holder(path) {
        Some(pid) => LockError::InUse { path: path_owned, holder: Some(pid) },
        None => LockError::Claimed { path: path_owned },
    }
}

/// The process that holds a lock on `path`, from the kernel's list.
fn holder(path: &Path) -> Option<u32> {
    let metadata = std::fs::metadata(path).ok()?;
    let device = format!("{:02x}:{:02x}", major(metadata.dev()), minor(metadata.dev()));
    let wanted = format!("{device}:{}", metadata.ino());
    holder_in(&std::fs::read_to_string("/proc/locks").ok()?, &wanted)
}

/// Finds `wanted` (`major:minor:inode`) in the text of `/proc/locks`:
/// `1: FLOCK  ADVISORY  WRITE 4321 fe:00:131 0 EOF`. Waiters' lines have a `->` more.
fn holder_in(locks: &str, wanted: &str) -> Option<u32> {
    locks.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let is_flock = words.nth(1) == Some("FLOCK");
        let pid = words.nth(2)?.parse().ok()?;
        (is_flock && words.next() == Some(wanted)).then_some(pid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_lock_is_refused_until_the_first_is_gone() {
        let path = std::env::temp_dir().join(format!("bessel-lock-{}", std::process::id()));
        File::create(&path).unwrap();
        let first = DeviceLock::acquire(&path).unwrap();
        let error = DeviceLock::acquire(&path).unwrap_err();
        assert!(
            matches!(error, LockError::InUse { holder, .. }
                if holder.is_none_or(|pid| pid == std::process::id())),
            "{error}"
        );
        drop(first);
        DeviceLock::acquire(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn what_a_killed_process_has_in_flight_is_waited_for() {
        let path = std::env::temp_dir().join(format!("bessel-flight-{}", std::process::id()));
        File::create(&path).unwrap();
        let dead = File::open(&path).unwrap();
        mark_in_flight(&dead).unwrap();
        let error = DeviceLock::acquire_within(&path, Duration::ZERO).unwrap_err();
        assert!(matches!(error, LockError::InFlight { .. }), "{error}");
        std::thread::scope(|scope| {
            let next = scope.spawn(|| DeviceLock::acquire(&path).map(drop));
            drop(dead);
            next.join().unwrap().unwrap();
        });
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn the_holder_is_found_and_waiters_are_not() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 fe:00:131 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 22 fe:00:130 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 33 fe:00:131 0 EOF\n\
                     3: -> FLOCK  ADVISORY  WRITE 44 fe:00:131 0 EOF\n";
        assert_eq!(holder_in(locks, "fe:00:131"), Some(33));
        assert_eq!(holder_in(locks, "fe:00:132"), None);
    }

    #[test]
    fn a_pipe_is_refused_without_waiting_for_its_other_end() {
        let path = std::env::temp_dir().join(format!("bessel-fifo-{}", std::process::id()));
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = DeviceLock::acquire(&path).unwrap_err();
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(error, LockError::NotADevice { .. }), "{error}");
    }

    #[test]
    fn a_link_to_nothing_says_so() {
        let path = std::env::temp_dir().join(format!("bessel-link-{}", std::process::id()));
        std::os::unix::fs::symlink("/nonexistent/store", &path).unwrap();
        let error = DeviceLock::acquire(&path).unwrap_err().to_string();
        std::fs::remove_file(&path).unwrap();
        assert!(error.contains("symbolic link to /nonexistent/store"), "{error}");
    }

    #[test]
    fn a_missing_device_is_named() {
        let error = DeviceLock::acquire(Path::new("/nonexistent/store")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/store"));
    }
}
