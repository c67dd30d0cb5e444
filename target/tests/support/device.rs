//! A store on a device that can fail and forget: a file of which a flush fails when a test says so, and
//! that loses what was not flushed when a test cuts its power.
//!
//! It is a FUSE file system of one file, served by a thread of the test. The daemon sees a file, and its
//! reads, writes and flushes are real system calls. The mount is in a mount namespace of the test's
//! thread and of what that starts, so nothing is left of it, however the test ends.

use bessel_reactor::device::sim::Random;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

const SECTOR: usize = 512;
/// Largest write that the kernel sends.
const WRITE_MAX: u32 = 128 << 10;
const HEADER_IN: usize = 40;
const WRITE_IN: usize = 40;

// Of `linux/fuse.h`.
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const ACCESS: u32 = 34;
const INTERRUPT: u32 = 36;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;
const FLAG_BIG_WRITES: u32 = 1 << 5;
const FLAG_MAX_PAGES: u32 = 1 << 22;
const FOPEN_DIRECT_IO: u32 = 1;

/// What the device holds and how it behaves.
struct Medium {
    /// What no power cut takes.
    durable: File,
    size: u64,
    /// Sectors written since the last flush.
    cached: BTreeMap<u64, [u8; SECTOR]>,
    /// Flushes fail while this is above zero.
    failing: u64,
    /// Reads fail.
    unreadable: bool,
    flushes: u64,
    flushes_failed: u64,
    random: Random,
}

/// See the module's documentation.
pub(crate) struct FaultyDevice {
    path: PathBuf,
    medium: Arc<Mutex<Medium>>,
    server: Option<JoinHandle<()>>,
}

impl FaultyDevice {
    /// Mounts a device of `size` bytes over `path`, with its durable part in the file `backing`. An error
    /// says what the machine lacks for that.
    pub(crate) fn mount(path: &Path, backing: &Path, size: u64, seed: u64) -> Result<Self, String> {
        let lacks = |what: &str, error: &dyn std::fmt::Display| Err(format!("{what}: {error}"));
        let fuse = match File::options().read(true).write(true).open("/dev/fuse") {
            Ok(fuse) => fuse,
            Err(error) => return lacks("cannot open /dev/fuse", &error),
        };
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNS) {
            return lacks("no mount namespace of its own", &error);
        }
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        File::create(path).unwrap();
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(true);
        let durable = options.open(backing).unwrap();
        durable.set_len(size).unwrap();
        let options = format!(
            "fd={},rootmode=100600,user_id={},group_id={}",
            fuse.as_raw_fd(),
            nix::unistd::getuid(),
            nix::unistd::getgid()
        );
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        let mounted = mount(Some("bessel-test"), path, Some("fuse"), flags, Some(options.as_str()));
        if let Err(error) = mounted {
            return lacks("cannot mount a FUSE file system", &error);
        }
        let medium = Arc::new(Mutex::new(Medium {
            durable,
            size,
            cached: BTreeMap::new(),
            failing: 0,
            unreadable: false,
            flushes: 0,
            flushes_failed: 0,
            random: Random::new(seed),
        }));
        let served = Arc::clone(&medium);
        let server = std::thread::spawn(move || serve(fuse, &served));
        Ok(Self { path: path.to_owned(), medium, server: Some(server) })
    }

    fn medium(&self) -> MutexGuard<'_, Medium> {
        self.medium.lock().unwrap()
    }

    /// Lets the next `count` flushes fail. Of what they should have made durable, half is lost.
    pub(crate) fn fail_flushes(&self, count: u64) {
        self.medium().failing = count;
    }

    /// From here on reads fail, or do not any more.
    pub(crate) fn fail_reads(&self, fail: bool) {
        self.medium().unreadable = fail;
    }

    /// Flushes so far, and how many of them failed.
    pub(crate) fn flushes(&self) -> (u64, u64) {
        let medium = self.medium();
        (medium.flushes, medium.flushes_failed)
    }

    /// Cuts the power: of what was not flushed some is lost, or all of it. Returns how many sectors.
    pub(crate) fn cut_power(&self) -> usize {
        let mut medium = self.medium();
        let keep = medium.random.below(3) * 50; // None, half or all.
        let cached = std::mem::take(&mut medium.cached);
        let before = cached.len();
        let mut lost = before;
        for (sector, bytes) in cached {
            if medium.random.chance(keep, 100) {
                medium.make_durable(sector, &bytes);
                lost -= 1;
            }
        }
        lost
    }
}

impl Drop for FaultyDevice {
    fn drop(&mut self) {
        // The thread ends when the last user is gone: a daemon that still runs ends first.
        let unmounted = umount2(&self.path, MntFlags::MNT_DETACH);
        if let (Ok(()), Some(server), false) =
            (unmounted, self.server.take(), std::thread::panicking())
        {
            let _ = server.join();
        }
    }
}

impl Medium {
    fn make_durable(&self, sector: u64, bytes: &[u8; SECTOR]) {
        self.durable.write_all_at(bytes, sector * SECTOR as u64).unwrap();
    }

    fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let end = self.size.min(offset + length as u64);
        let mut bytes = vec![0; end.saturating_sub(offset) as usize];
        self.durable.read_exact_at(&mut bytes, offset).unwrap();
        let first = offset / SECTOR as u64;
        for (sector, cached) in self.cached.range(first..end.div_ceil(SECTOR as u64)) {
            let at = (*sector * SECTOR as u64 - offset) as usize;
            bytes[at..at + SECTOR].copy_from_slice(cached);
        }
        bytes
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        assert!(offset.is_multiple_of(SECTOR as u64) && bytes.len().is_multiple_of(SECTOR));
        for (sector, bytes) in (offset / SECTOR as u64..).zip(bytes.chunks_exact(SECTOR)) {
            self.cached.insert(sector, bytes.try_into().unwrap());
        }
    }

    /// True when it has succeeded.
    fn flush(&mut self) -> bool {
        self.flushes += 1;
        let fails = self.failing > 0;
        self.failing = self.failing.saturating_sub(1);
        self.flushes_failed += u64::from(fails);
        for (sector, bytes) in std::mem::take(&mut self.cached) {
            if !fails || self.random.chance(1, 2) {
                self.make_durable(sector, &bytes);
            }
        }
        !fails
    }
}

/// Answers the kernel until the file system is unmounted.
fn serve(mut fuse: File, medium: &Mutex<Medium>) {
    let mut request = vec![0; HEADER_IN + WRITE_IN + WRITE_MAX as usize + 4096];
    loop {
        let length = match fuse.read(&mut request) {
            Ok(length) => length,
            Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => return,
            // Interrupted, or the request was taken back.
            Err(_) => continue,
        };
        let request = &request[..length];
        let opcode = u32_at(request, 4);
        let answer = answer(opcode, &request[HEADER_IN..], &mut medium.lock().unwrap());
        let Some(answer) = answer else { continue };
        let (error, payload) = match answer {
            Ok(payload) => (0, payload),
            Err(errno) => (-errno, Vec::new()),
        };
        let mut reply = Vec::with_capacity(16 + payload.len());
        reply.extend((16 + payload.len() as u32).to_le_bytes());
        reply.extend(error.to_le_bytes());
        reply.extend(&request[8..16]); // Which request it is.
        reply.extend(payload);
        // Refused when whoever asked has been killed.
        let _ = fuse.write(&reply);
    }
}

fn answer(opcode: u32, body: &[u8], medium: &mut Medium) -> Option<Result<Vec<u8>, i32>> {
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
    Some(match opcode {
        INIT => {
            let mut out: Vec<u8> =
                words(&[7, 31, 0, FLAG_BIG_WRITES | FLAG_MAX_PAGES, 0, WRITE_MAX, 1]);
            out.extend((WRITE_MAX / 4096).to_le_bytes()); // Pages, and no alignment.
            out.resize(64, 0);
            Ok(out)
        }
        GETATTR | SETATTR => Ok(attributes(medium.size)),
        OPEN => Ok(words(&[0, 0, FOPEN_DIRECT_IO, 0])),
        READ if medium.unreadable => Err(nix::libc::EIO),
        READ => Ok(medium.read(u64_at(body, 8), u32_at(body, 16) as usize)),
        WRITE => {
            let length = u32_at(body, 16);
            medium.write(u64_at(body, 8), &body[WRITE_IN..][..length as usize]);
            Ok(words(&[length, 0]))
        }
        FSYNC if medium.flush() => Ok(Vec::new()),
        FSYNC => Err(nix::libc::EIO),
        STATFS => {
            let mut out = vec![0; 80];
            out[40..44].copy_from_slice(&4096u32.to_le_bytes());
            out[44..48].copy_from_slice(&255u32.to_le_bytes());
            Ok(out)
        }
        FLUSH | RELEASE | ACCESS | DESTROY => Ok(Vec::new()),
        FORGET | BATCH_FORGET | INTERRUPT => return None,
        _ => Err(nix::libc::ENOSYS),
    })
}

fn attributes(size: u64) -> Vec<u8> {
    let mut out = vec![0; 104];
    out[16..24].copy_from_slice(&1u64.to_le_bytes()); // The inode.
    out[24..32].copy_from_slice(&size.to_le_bytes());
    out[76..80].copy_from_slice(&0o100_600u32.to_le_bytes());
    out[80..84].copy_from_slice(&1u32.to_le_bytes());
    out[84..88].copy_from_slice(&nix::unistd::getuid().as_raw().to_le_bytes());
    out[88..92].copy_from_slice(&nix::unistd::getgid().as_raw().to_le_bytes());
    out[96..100].copy_from_slice(&4096u32.to_le_bytes());
    out
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
