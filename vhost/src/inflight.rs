//! What survives our restart: which requests were in flight, in memory that the front-end keeps.
//!
//! The layout is the vhost-user specification's for split rings. A header of 16 bytes for each
//! queue (features u64, version u16, descriptor count u16, head of the last batch u16, used index
//! u16) is followed by 16 bytes for each descriptor (in flight u8, 5 bytes of padding, next in the
//! batch u16, counter u64).
//!
//! The order of the stores is what makes a kill at any instruction recoverable; only program order
//! matters, since a killed process's earlier stores have all happened:
//!
//! | step | store |
//! |---|---|
//! | popped | the counter, then the in-flight mark |
//! | completed | link the head to the batch, then the batch to the head |
//! | published | the ring's used index, then the marks of the batch off, then the used index here |
//!
//! A kill between the last row's stores leaves `used index` behind the ring's by the size of the
//! batch, whose marks are then taken off by following the links.
//!
//! The front-end can write to this memory: every index read from it is checked.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, Release};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

use crate::memory::{Mapping, MemoryError, Window};

const HEADER_SIZE: usize = 16;
const ENTRY_SIZE: usize = 16;
/// Queues start on cache lines of their own.
const ALIGNMENT: usize = 64;
const VERSION: u16 = 1;

const VERSION_AT: usize = 8;
const COUNT_AT: usize = 10;
const BATCH_AT: usize = 12;
const USED_AT: usize = 14;

/// The region's shape, as GET_INFLIGHT_FD and SET_INFLIGHT_FD carry it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct InflightSpec {
    /// Bytes of the region.
    pub(crate) size: u64,
    /// Where it starts in its file.
    pub(crate) offset: u64,
    pub(crate) num_queues: u16,
    pub(crate) queue_size: u16,
}

/// Why an in-flight region was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InflightError {
    #[error("in-flight region of {size} bytes is too small for {queues} queues of {entries}")]
    Small { size: u64, queues: u16, entries: u16 },
    #[error("in-flight region at offset {offset} is not aligned to 8 bytes")]
    Misaligned { offset: u64 },
    #[error("in-flight region has version {0}, not 1")]
    Version(u16),
    #[error("in-flight region of {region} entries does not fit a ring of {ring}")]
    RingSize { region: u16, ring: u16 },
    #[error("in-flight region has no queue {0}")]
    NoQueue(usize),
    #[error("cannot make an in-flight region")]
    Create(#[source] io::Error),
    #[error("cannot map the in-flight region")]
    Memory(#[from] MemoryError),
}

/// Bytes that one queue of the region takes.
fn queue_bytes(queue_size: u16) -> usize {
    (HEADER_SIZE + ENTRY_SIZE * usize::from(queue_size)).next_multiple_of(ALIGNMENT)
}

/// Makes a fresh region for a front-end to keep. It cannot be resized by anybody afterwards.
pub(crate) fn create(
    num_queues: u16,
    queue_size: u16,
) -> Result<(InflightSpec, OwnedFd), InflightError> {
    let size = (usize::from(num_queues) * queue_bytes(queue_size)) as u64;
    let make = || -> nix::Result<OwnedFd> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = memfd_create("bessel-inflight", flags)?;
        ftruncate(&file, size as i64)?;
        let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(file)
    };
    let file = make().map_err(|error| InflightError::Create(error.into()))?;
    Ok((InflightSpec { size, offset: 0, num_queues, queue_size }, file))
}

/// The region of one device, mapped.
#[derive(Debug)]
pub(crate) struct InflightRegion {
    spec: InflightSpec,
    mapping: Arc<Mapping>,
}

impl InflightRegion {
    /// Maps the region that a front-end hands back.
    pub(crate) fn map(spec: InflightSpec, file: &OwnedFd) -> Result<Self, InflightError> {
        let needed = usize::from(spec.num_queues) * queue_bytes(spec.queue_size);
        if spec.size < needed as u64 || needed == 0 {
            let InflightSpec { size, num_queues, queue_size, .. } = spec;
            return Err(InflightError::Small { size, queues: num_queues, entries: queue_size });
        }
        if !spec.offset.is_multiple_of(8) {
            return Err(InflightError::Misaligned { offset: spec.offset });
        }
        let mapping = Arc::new(Mapping::new(file, spec.offset, spec.size)?);
        Ok(Self { spec, mapping })
    }

    /// The part of queue `index`, whose ring has `ring_size` descriptors, and what it remembers.
    /// `ring_used` is the ring's used index.
    pub(crate) fn recover(
        &self,
        index: usize,
        ring_size: u16,
        ring_used: u16,
    ) -> Result<(InflightQueue, Recovered), InflightError> {
        let InflightSpec { num_queues, queue_size, .. } = self.spec;
        if index >= usize::from(num_queues) {
            return Err(InflightError::NoQueue(index));
        }
        if ring_size > queue_size {
            return Err(InflightError::RingSize { region: queue_size, ring: ring_size });
        }
        let offset = index * queue_bytes(queue_size);
        let window = Window::new(&self.mapping, offset as u64, queue_bytes(queue_size))
            .expect("`map` checked the size for every queue");
        let mut queue = InflightQueue { window, size: ring_size, next_counter: 0 };
        let recovered = queue.recover(ring_used)?;
        Ok((queue, recovered))
    }
}

/// What a region remembers of a queue.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// Heads that were in flight, the last one popped first: take them from the end.
    pub(crate) heads: Vec<u16>,
}

/// One queue's records. Hot path.
#[derive(Debug)]
pub(crate) struct InflightQueue {
    window: Window,
    size: u16,
    next_counter: u64,
}

fn entry_at(head: u16) -> usize {
    HEADER_SIZE + ENTRY_SIZE * usize::from(head)
}

impl InflightQueue {
    /// Notes that `head` was popped.
    #[inline]
    pub(crate) fn popped(&mut self, head: u16) {
        let at = entry_at(head);
        self.window.store_u64(at + 8, self.next_counter, Relaxed);
        self.window.store_u8(at, 1, Release);
        self.next_counter = self.next_counter.wrapping_add(1);
    }

    /// Notes that `head` is in the used ring, not yet published.
    #[inline]
    pub(crate) fn completed(&mut self, head: u16) {
        let batch = self.window.load_u16(BATCH_AT, Relaxed);
        self.window.store_u16(entry_at(head) + 6, batch, Relaxed);
        self.window.store_u16(BATCH_AT, head, Release);
    }

    /// Notes that the ring's used index says `used` now, which covers the heads in `batch`.
    #[inline]
    pub(crate) fn published(&mut self, batch: &[u16], used: u16) {
        // The caller stored the ring's index just now; these must not move before it.
        std::sync::atomic::fence(Release);
        for head in batch {
            self.window.store_u8(entry_at(*head), 0, Relaxed);
        }
        self.window.store_u16(USED_AT, used, Release);
    }

    fn recover(&mut self, ring_used: u16) -> Result<Recovered, InflightError> {
        match self.window.load_u16(VERSION_AT, Relaxed) {
            0 => {
                self.window.store_u16(COUNT_AT, self.size, Relaxed);
                self.window.store_u16(USED_AT, ring_used, Relaxed);
                self.window.store_u16(VERSION_AT, VERSION, Release);
            }
            VERSION => self.finish_batch(ring_used),
            version => return Err(InflightError::Version(version)),
        }
        let mut marked: Vec<(u64, u16)> = (0..self.size)
            .filter(|head| self.window.load_u8(entry_at(*head), Relaxed) == 1)
            .map(|head| (self.window.load_u64(entry_at(head) + 8, Relaxed), head))
            .collect();
        marked.sort_unstable_by(|left, right| right.cmp(left));
        self.next_counter = marked.first().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(Recovered { heads: marked.into_iter().map(|(_, head)| head).collect() })
    }

    /// Takes the marks off a batch that was published but not finished.
    fn finish_batch(&mut self, ring_used: u16) {
        let mut left =
            ring_used.wrapping_sub(self.window.load_u16(USED_AT, Relaxed)).min(self.size);
        let mut head = self.window.load_u16(BATCH_AT, Relaxed);
        while left > 0 && head < self.size {
            self.window.store_u8(entry_at(head), 0, Relaxed);
            head = self.window.load_u16(entry_at(head) + 6, Relaxed);
            left -= 1;
        }
        self.window.store_u16(USED_AT, ring_used, Release);
    }

    /// Its owner truncated the region.
    pub(crate) fn poisoned(&self) -> bool {
        self.window.poisoned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region() -> InflightRegion {
        let (spec, file) = create(2, 8).unwrap();
        InflightRegion::map(spec, &file).unwrap()
    }

    fn recover(region: &InflightRegion, used: u16) -> (InflightQueue, Vec<u16>) {
        let (queue, recovered) = region.recover(1, 8, used).unwrap();
        (queue, recovered.heads)
    }

    #[test]
    fn what_was_popped_and_not_published_comes_back_in_order() {
        let region = region();
        let (mut queue, heads) = recover(&region, 100);
        assert!(heads.is_empty());
        for head in [5, 2, 7, 0] {
            queue.popped(head);
        }
        queue.completed(2);
        queue.published(&[2], 101);
        // Completed but not published: the guest has not seen it.
        queue.completed(7);
        let (_, heads) = recover(&region, 101);
        assert_eq!(heads, [0, 7, 5], "taken from the end: 5, 7, 0");
    }

    #[test]
    fn a_kill_between_publishing_and_noting_it_replays_nothing() {
        let region = region();
        let (mut queue, _) = recover(&region, 0xffff);
        for head in [1, 2, 3] {
            queue.popped(head);
        }
        queue.completed(3);
        queue.completed(1);
        // The ring's index was stored (two more, wrapped); the kill came before `published`.
        let (mut queue, heads) = recover(&region, 1);
        assert_eq!(heads, [2]);
        queue.popped(6);
        let (_, heads) = recover(&region, 1);
        assert_eq!(heads, [6, 2], "counters go on after the largest");
    }

    #[test]
    fn a_new_region_takes_its_used_index_from_the_ring() {
        let region = region();
        let (mut queue, _) = recover(&region, 40000);
        queue.popped(3);
        let (_, heads) = recover(&region, 40000);
        assert_eq!(heads, [3]);
    }

    #[test]
    fn nonsense_in_the_region_is_bounded() {
        let region = region();
        let (queue, _) = recover(&region, 0);
        queue.window.store_u16(BATCH_AT, 0xffff, Relaxed);
        queue.window.store_u16(USED_AT, 17, Relaxed);
        assert!(recover(&region, 0).1.is_empty());
        queue.window.store_u16(BATCH_AT, 3, Relaxed);
        queue.window.store_u16(entry_at(3) + 6, 3, Relaxed);
        assert!(recover(&region, 9).1.is_empty(), "a batch linked to itself ends");
        queue.window.store_u16(VERSION_AT, 9, Relaxed);
        assert!(matches!(region.recover(1, 8, 0), Err(InflightError::Version(9))));
        assert!(matches!(region.recover(2, 8, 0), Err(InflightError::NoQueue(2))));
        assert!(matches!(region.recover(0, 16, 0), Err(InflightError::RingSize { .. })));
    }

    #[test]
    fn a_region_that_does_not_hold_its_queues_is_refused() {
        let (spec, file) = create(2, 8).unwrap();
        let refused = |spec| InflightRegion::map(spec, &file).unwrap_err();
        let small = InflightSpec { queue_size: 1024, ..spec };
        assert!(matches!(refused(small), InflightError::Small { .. }));
        let large = InflightSpec { size: 1 << 20, queue_size: 1024, ..spec };
        assert!(matches!(refused(large), InflightError::Memory(MemoryError::Short { .. })));
        let odd = InflightSpec { size: spec.size - 8, offset: 4, queue_size: 1, ..spec };
        assert!(matches!(refused(odd), InflightError::Misaligned { .. }));
    }
}
