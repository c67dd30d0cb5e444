//! Guest memory: mapped once, translated often (a marked `unsafe` file).
//!
//! The front-end gives regions: a guest-physical range, the same range in its own address space,
//! and a file. Each is mapped here ([`GuestMemory`], control path) and flattened for the hot path
//! into a sorted table that each queue owns ([`AddressMap`]). Rings and in-flight regions are read
//! and written through a [`Window`], whose every access is bounds-checked and atomic, because the
//! other side changes the same bytes meanwhile.
//!
//! Must not be broken: whoever holds a [`Segment`] made here, or a request with one, holds up the
//! queue that owns the map; a queue is drained before its memory is dropped.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use bessel_reactor::buffer::Segment;
use bessel_reactor::{prefetch, prefetch_to_write};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::statfs::{FUSE_SUPER_MAGIC, HUGETLBFS_MAGIC, NFS_SUPER_MAGIC, fstatfs};

use crate::sigbus::Guard;

/// Longest range of the flattened table: the most that one io_uring registered buffer can hold.
const RANGE_MAX: u64 = 1 << 30;
/// Most memory of one guest. Our address space is 128 TiB and is shared by all guests.
const MEMORY_MAX: u64 = 16 << 40;
/// Most regions of one guest, answered to GET_MAX_MEM_SLOTS.
pub(crate) const REGIONS_MAX: usize = 64;

/// A memory region as a message describes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct RegionSpec {
    /// Guest-physical address.
    pub(crate) guest: u64,
    /// Length in bytes.
    pub(crate) size: u64,
    /// Address in the front-end's own space; ring addresses are given in it.
    pub(crate) user: u64,
    /// Where the region starts in its file.
    pub(crate) offset: u64,
}

/// Why memory was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error("region at {guest:#x} of {size:#x} bytes wraps around the address space")]
    Wraps { guest: u64, size: u64 },
    #[error("region at {guest:#x} is empty")]
    Empty { guest: u64 },
    #[error("regions at {first:#x} and {second:#x} overlap")]
    Overlap { first: u64, second: u64 },
    #[error("more than {REGIONS_MAX} regions")]
    TooMany,
    #[error("more than {MEMORY_MAX} bytes of memory")]
    TooLarge,
    #[error("file of {file} bytes is shorter than its region, which ends at {end}")]
    Short { file: u64, end: u64 },
    #[error("memory is not a regular file or memfd; use memory-backend-memfd with share=on")]
    NotAFile,
    #[error("memory on FUSE or NFS can stall the daemon; use memory-backend-memfd")]
    SlowFile,
    #[error("no region {guest:#x} of {size:#x} bytes")]
    Unknown { guest: u64, size: u64 },
    #[error("too many mappings in the daemon; serve fewer guests")]
    TableFull,
    #[error("cannot map memory")]
    Map(#[source] io::Error),
}

/// A shared mapping of a part of somebody else's file, unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// The first byte asked for; the mapping itself starts at `base`.
    start: NonNull<u8>,
    length: usize,
    base: NonNull<u8>,
    base_length: usize,
    /// Taken out before unmapping.
    guard: Option<Guard>,
    /// What a model sees of it.
    #[cfg(loom)]
    cells: crate::sync::modelled::Cells,
}

// SAFETY: a mapping is an address range of the process; it is accessed only through atomics
// (`Window`) and segments, both made for memory that others change.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `length` bytes of `file` from `offset` on, after checking that the file has them.
    pub(crate) fn new(file: &OwnedFd, offset: u64, length: u64) -> Result<Self, MemoryError> {
        if length == 0 {
            return Err(MemoryError::Empty { guest: 0 });
        }
        let end = offset.checked_add(length).filter(|end| *end <= i64::MAX as u64);
        let end = end.ok_or(MemoryError::Wraps { guest: offset, size: length })?;
        if length > MEMORY_MAX {
            return Err(MemoryError::TooLarge);
        }
        let page = check_file(file, end)?;
        let base_offset = offset / page * page;
        let base_length = (end - base_offset).next_multiple_of(page) as usize;
        let count = NonZeroUsize::new(base_length).expect("a region is not empty");
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: the kernel chooses the address, so no other mapping is replaced; the result is
        // used only through this type.
        let base = unsafe { mmap(None, count, access, flags, file, base_offset as i64) }
            .map_err(|error| MemoryError::Map(error.into()))?
            .cast::<u8>();
        // SAFETY: the range was mapped just above, is unmapped in `drop` after the guard is gone,
        // and is guest memory, in which any bytes may turn up at any time.
        let guard = unsafe { Guard::protect(base.as_ptr() as usize, base_length) };
        // SAFETY: `base_offset` is at most `offset`, and the difference is less than a page, which
        // the mapping includes.
        let start = unsafe { base.add((offset - base_offset) as usize) };
        let mapping = Self {
            start,
            length: length as usize,
            base,
            base_length,
            guard,
            #[cfg(loom)]
            cells: crate::sync::modelled::Cells::default(),
        };
        if mapping.guard.is_none() {
            return Err(MemoryError::TableFull);
        }
        Ok(mapping)
    }

    /// The file was truncated meanwhile and the mapping holds zeroes.
    pub(crate) fn poisoned(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::poisoned)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        drop(self.guard.take());
        // SAFETY: the range is the mapping made in `new`; windows and segments over it are gone by
        // the contracts of their types.
        if let Err(error) = unsafe { munmap(self.base.cast(), self.base_length) } {
            tracing::error!(%error, "cannot unmap guest memory");
        }
    }
}

/// Checks that `file` can be mapped up to `end` without stalls; gives its page size.
fn check_file(file: &OwnedFd, end: u64) -> Result<u64, MemoryError> {
    let copy = file.try_clone().map_err(MemoryError::Map)?;
    let metadata = File::from(copy).metadata().map_err(MemoryError::Map)?;
    if !metadata.file_type().is_file() || metadata.file_type().is_socket() {
        return Err(MemoryError::NotAFile);
    }
    if metadata.size() < end {
        return Err(MemoryError::Short { file: metadata.size(), end });
    }
    let kind = fstatfs(file.as_fd()).map_err(|error| MemoryError::Map(error.into()))?;
    match kind.filesystem_type() {
        FUSE_SUPER_MAGIC | NFS_SUPER_MAGIC => Err(MemoryError::SlowFile),
        HUGETLBFS_MAGIC => Ok(metadata.blksize()),
        _ => Ok(4096),
    }
}

/// A region that is mapped.
#[derive(Debug)]
struct Region {
    spec: RegionSpec,
    mapping: Arc<Mapping>,
}

/// All memory of one guest, at one moment: changes make a new value that shares the mappings.
#[derive(Debug, Default)]
pub(crate) struct GuestMemory {
    /// Sorted by guest address, disjoint.
    regions: Vec<Arc<Region>>,
}

impl GuestMemory {
    /// Maps a whole table, SET_MEM_TABLE.
    pub(crate) fn map(table: &[(RegionSpec, OwnedFd)]) -> Result<Self, MemoryError> {
        table.iter().try_fold(Self::default(), |memory, (spec, file)| memory.with(*spec, file))
    }

    /// This memory and one more region, ADD_MEM_REG.
    pub(crate) fn with(&self, spec: RegionSpec, file: &OwnedFd) -> Result<Self, MemoryError> {
        check_spec(&spec)?;
        if self.regions.len() == REGIONS_MAX {
            return Err(MemoryError::TooMany);
        }
        let total: u64 = self.regions.iter().map(|region| region.spec.size).sum();
        if spec.size > MEMORY_MAX || total + spec.size > MEMORY_MAX {
            return Err(MemoryError::TooLarge);
        }
        let overlapping = self.regions.iter().find(|region| {
            region.spec.guest < spec.guest + spec.size
                && spec.guest < region.spec.guest + region.spec.size
        });
        if let Some(region) = overlapping {
            return Err(MemoryError::Overlap { first: region.spec.guest, second: spec.guest });
        }
        let mapping = Arc::new(Mapping::new(file, spec.offset, spec.size)?);
        let mut regions = self.regions.clone();
        let place = regions.partition_point(|region| region.spec.guest < spec.guest);
        regions.insert(place, Arc::new(Region { spec, mapping }));
        Ok(Self { regions })
    }

    /// This memory without one region, REM_MEM_REG. The file offset does not count.
    pub(crate) fn without(&self, spec: &RegionSpec) -> Result<Self, MemoryError> {
        let place = self.regions.iter().position(|region| {
            (region.spec.guest, region.spec.size, region.spec.user)
                == (spec.guest, spec.size, spec.user)
        });
        let place = place.ok_or(MemoryError::Unknown { guest: spec.guest, size: spec.size })?;
        let mut regions = self.regions.clone();
        regions.remove(place);
        Ok(Self { regions })
    }

    /// A window at an address of the front-end's space: a ring. `None` when it does not lie in one
    /// region or is not a multiple of `alignment`.
    pub(crate) fn window_at_user(
        &self,
        user: u64,
        length: usize,
        alignment: u64,
    ) -> Option<Window> {
        self.regions.iter().find_map(|region| {
            let offset = user.checked_sub(region.spec.user)?;
            let window = Window::new(&region.mapping, offset, length)?;
            (window.base.as_ptr() as u64).is_multiple_of(alignment).then_some(window)
        })
    }

    /// There is no memory yet.
    pub(crate) fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Some of it was truncated by its owner.
    fn poisoned(&self) -> bool {
        self.regions.iter().any(|region| region.mapping.poisoned())
    }
}

fn check_spec(spec: &RegionSpec) -> Result<(), MemoryError> {
    let RegionSpec { guest, size, user, .. } = *spec;
    if size == 0 {
        return Err(MemoryError::Empty { guest });
    }
    if guest.checked_add(size).is_none() || user.checked_add(size).is_none() {
        return Err(MemoryError::Wraps { guest, size });
    }
    Ok(())
}

/// A part of a mapping that is shared with another process: atomics at checked offsets.
///
/// Holds its mapping, so it can never dangle.
#[derive(Debug)]
pub(crate) struct Window {
    mapping: Arc<Mapping>,
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: `base` points into `mapping`, which is Send and Sync and is held alive.
unsafe impl Send for Window {}

macro_rules! window_load {
    ($name:ident, $atomic:ty, $int:ty) => {
        /// Reads a little-endian integer.
        #[inline]
        pub(crate) fn $name(&self, offset: usize, order: Ordering) -> $int {
            #[cfg(loom)]
            return self.mapping.cells.load(self.place(offset), order) as $int;
            #[cfg(not(loom))]
            <$int>::from_le(self.atomic::<$atomic>(offset).load(order))
        }
    };
}

macro_rules! window_store {
    ($name:ident, $atomic:ty, $int:ty) => {
        /// Writes a little-endian integer.
        #[inline]
        pub(crate) fn $name(&self, offset: usize, value: $int, order: Ordering) {
            #[cfg(loom)]
            self.mapping.cells.store(self.place(offset), value.into(), order);
            #[cfg(not(loom))]
            self.atomic::<$atomic>(offset).store(value.to_le(), order);
        }
    };
}

impl Window {
    /// The `length` bytes at `offset` of `mapping`, if they are inside it.
    pub(crate) fn new(mapping: &Arc<Mapping>, offset: u64, length: usize) -> Option<Self> {
        let offset = usize::try_from(offset).ok()?;
        if offset > mapping.length || length > mapping.length - offset {
            return None;
        }
        // SAFETY: `offset` is at most the mapping's length (checked above).
        let base = unsafe { mapping.start.add(offset) };
        Some(Self { mapping: mapping.clone(), base, length })
    }

    /// An offset in the mapping instead of the window.
    #[cfg(loom)]
    fn place(&self, offset: usize) -> usize {
        assert!(offset < self.length, "outside the window");
        self.base.as_ptr() as usize - self.mapping.start.as_ptr() as usize + offset
    }

    /// The atomic integer at `offset`.
    ///
    /// # Panics
    /// When it is outside the window or misaligned: offsets come from our own arithmetic.
    #[cfg_attr(loom, expect(dead_code, reason = "a model has integers of its own"))]
    #[inline]
    fn atomic<T: Atomic>(&self, offset: usize) -> &T {
        let size = size_of::<T>();
        assert!(self.length >= size && offset <= self.length - size, "outside the window");
        // SAFETY: the assertion keeps the result inside the window.
        let address = unsafe { self.base.add(offset) }.cast::<T>();
        assert!(address.is_aligned(), "misaligned ring access");
        // SAFETY: the address is mapped as long as `self.mapping` lives, which the borrow of
        // `self` ensures, and aligned (assertion). `Atomic` types are valid for any bytes and may
        // be changed by others while they are borrowed.
        unsafe { address.as_ref() }
    }

    /// As [`Window::expect`], of a line that will be written.
    #[inline]
    pub(crate) fn expect_to_write(&self, offset: usize) {
        prefetch_to_write(self.base.as_ptr().wrapping_add(offset));
    }

    /// Has the cache line at `offset` brought to the processor's cache.
    #[inline]
    pub(crate) fn expect(&self, offset: usize) {
        prefetch(self.base.as_ptr().wrapping_add(offset));
    }

    window_load!(load_u8, AtomicU8, u8);
    window_load!(load_u16, AtomicU16, u16);
    window_load!(load_u64, AtomicU64, u64);
    window_store!(store_u8, AtomicU8, u8);
    window_store!(store_u16, AtomicU16, u16);
    window_store!(store_u32, AtomicU32, u32);
    window_store!(store_u64, AtomicU64, u64);

    /// Its owner truncated the file.
    pub(crate) fn poisoned(&self) -> bool {
        self.mapping.poisoned()
    }
}

/// The atomic integers, for which any bytes are valid.
trait Atomic {}
impl Atomic for AtomicU8 {}
impl Atomic for AtomicU16 {}
impl Atomic for AtomicU32 {}
impl Atomic for AtomicU64 {}

/// An address that is in no region.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Unmapped;

/// Part of a region, at most [`RANGE_MAX`] long.
#[derive(Clone, Copy, Debug)]
struct Range {
    start: u64,
    length: u64,
    whole: Segment,
}

/// Guest-physical addresses to segments, for one queue.
///
/// Hot path. Ranges are sorted and disjoint; `last` is where the previous lookup hit, which is
/// where the next one hits almost always.
#[derive(Debug)]
pub(crate) struct AddressMap {
    ranges: Box<[Range]>,
    last: usize,
    memory: Arc<GuestMemory>,
}

impl AddressMap {
    /// Flattens `memory`.
    ///
    /// # Safety
    /// The map, or its `memory`, must live until every request that carries a segment from
    /// [`AddressMap::append`] has completed.
    unsafe fn flatten(memory: Arc<GuestMemory>) -> Self {
        let mut ranges = Vec::new();
        for region in &memory.regions {
            let mut offset = 0;
            while offset < region.spec.size {
                let length = (region.spec.size - offset).min(RANGE_MAX);
                // SAFETY: `offset` is inside the region, whose mapping is as long as the region.
                let address = unsafe { region.mapping.start.add(offset as usize) };
                // SAFETY: the range is mapped and writable while `memory` lives, which the caller
                // promises to be long enough; nobody makes references to guest memory other than
                // to atomics.
                let whole = unsafe { Segment::new(address, length as u32) };
                ranges.push(Range { start: region.spec.guest + offset, length, whole });
                offset += length;
            }
        }
        Self { ranges: ranges.into(), last: 0, memory }
    }

    /// The map for a queue, which drains before it drops it ([`crate::Queue`]'s `drop` sees to it).
    pub(crate) fn for_queue(memory: Arc<GuestMemory>) -> Self {
        // SAFETY: `Queue` is the only user; it leaks its map when dropped with requests in flight.
        unsafe { Self::flatten(memory) }
    }

    /// The range that holds `address`.
    #[inline]
    fn find(&mut self, address: u64) -> Result<&Range, Unmapped> {
        let holds = |range: &Range| address.wrapping_sub(range.start) < range.length;
        if !self.ranges.get(self.last).is_some_and(holds) {
            let after = self.ranges.partition_point(|range| range.start <= address);
            self.last = after.checked_sub(1).ok_or(Unmapped)?;
        }
        self.ranges.get(self.last).filter(|range| holds(range)).ok_or(Unmapped)
    }

    /// Has the cache line at `address` brought to the processor's cache, if there is one.
    #[inline]
    pub(crate) fn expect(&mut self, address: u64) {
        if let Ok(range) = self.find(address) {
            prefetch(range.whole.as_ptr().wrapping_add((address - range.start) as usize));
        }
    }

    /// Gives `take` the segments of `length` bytes at `address`, one for each range they touch.
    /// On an error some may have been given already.
    #[inline]
    pub(crate) fn segments(
        &mut self,
        mut address: u64,
        mut length: u32,
        mut take: impl FnMut(Segment),
    ) -> Result<(), Unmapped> {
        while length > 0 {
            let range = self.find(address)?;
            let offset = address - range.start;
            let part = (range.length - offset).min(length.into());
            take(range.whole.part(offset as usize, part as usize));
            length -= part as u32;
            address = address.checked_add(part).ok_or(Unmapped)?;
        }
        Ok(())
    }

    /// Copies guest memory out.
    #[inline]
    pub(crate) fn read<const N: usize>(
        &mut self,
        address: u64,
        bytes: &mut [u8; N],
    ) -> Result<(), Unmapped> {
        let range = self.find(address)?;
        let offset = address - range.start;
        if range.length - offset >= N as u64 {
            // All but always: a copy of known length.
            range.whole.part(offset as usize, N).read(bytes);
            return Ok(());
        }
        let mut done = 0;
        self.segments(address, N as u32, |segment| {
            segment.read(&mut bytes[done..done + segment.len()]);
            done += segment.len();
        })
    }

    /// The ranges as segments, in a fixed order.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = Segment> + '_ {
        self.ranges.iter().map(|range| range.whole)
    }

    /// Notes that range `index` is registered buffer `registration` of the queue's device.
    pub(crate) fn register(&mut self, index: usize, registration: u32) {
        self.ranges[index].whole = self.ranges[index].whole.with_registration(registration);
    }

    /// Forgets what was registered: the queue leaves the device that knows these buffers.
    pub(crate) fn unregister(&mut self) {
        for range in &mut self.ranges {
            range.whole = range.whole.without_registration();
        }
    }

    /// Some of the memory was truncated by its owner.
    pub(crate) fn poisoned(&self) -> bool {
        self.memory.poisoned()
    }

    /// Keeps the memory mapped for ever, when that is the only safe thing left.
    pub(crate) fn leak(&self) {
        std::mem::forget(self.memory.clone());
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::unistd::ftruncate;

    use super::*;

    fn memfd(size: u64) -> OwnedFd {
        let file = memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap();
        ftruncate(&file, size as i64).unwrap();
        file
    }

    fn spec(guest: u64, size: u64) -> RegionSpec {
        RegionSpec { guest, size, user: guest + 0x7000_0000_0000, offset: 0 }
    }

    fn lengths(map: &mut AddressMap, address: u64, length: u32) -> Result<Vec<usize>, Unmapped> {
        let mut found = Vec::new();
        map.segments(address, length, |segment| found.push(segment.len()))?;
        Ok(found)
    }

    #[test]
    fn a_buffer_over_two_regions_becomes_two_segments() {
        let memory = GuestMemory::map(&[
            (spec(0x10000, 0x2000), memfd(0x2000)),
            (spec(0x12000, 0x1000), memfd(0x1000)),
            (spec(0x20000, 0x1000), memfd(0x1000)),
        ])
        .unwrap();
        let mut map = AddressMap::for_queue(Arc::new(memory));
        assert_eq!(lengths(&mut map, 0x11ff0, 0x20), Ok(vec![0x10, 0x10]));
        assert_eq!(lengths(&mut map, 0x10000, 0x3000), Ok(vec![0x2000, 0x1000]));
        assert_eq!(lengths(&mut map, 0x12fff, 1), Ok(vec![1]));
        assert_eq!(lengths(&mut map, 0x12fff, 2), Err(Unmapped));
        assert_eq!(lengths(&mut map, 0xffff, 1), Err(Unmapped));
        assert_eq!(lengths(&mut map, u64::MAX, 1), Err(Unmapped));
        assert_eq!(lengths(&mut map, 0x20fff, u32::MAX), Err(Unmapped));
        assert_eq!(lengths(&mut map, 0x20000, 0x1000), Ok(vec![0x1000]));
    }

    #[test]
    fn a_region_over_a_gibibyte_is_split_for_registration() {
        let memory = GuestMemory::map(&[(spec(0, 5 << 29), memfd(5 << 29))]).unwrap();
        let mut map = AddressMap::for_queue(Arc::new(memory));
        let ranges: Vec<_> = map.ranges().map(|range| range.len()).collect();
        assert_eq!(ranges, [1 << 30, 1 << 30, 1 << 29]);
        map.register(1, 9);
        let mut seen = Vec::new();
        map.segments((1 << 30) - 1, 2, |segment| seen.push(segment.registration())).unwrap();
        assert_eq!(seen, [None, Some(9)]);
        map.unregister();
        map.segments((1 << 30) - 1, 2, |segment| seen.push(segment.registration())).unwrap();
        assert_eq!(seen[2..], [None, None], "another device may have another buffer 9");
    }

    #[test]
    fn a_region_may_start_inside_a_page_of_its_file() {
        let file = memfd(0x3000);
        let mut writer = File::from(file.try_clone().unwrap());
        writer.write_all(&[7; 0x3000]).unwrap();
        let spec = RegionSpec { guest: 0x1000, size: 0x1000, user: 0x1000, offset: 0x1234 };
        let memory = GuestMemory::map(&[(spec, file)]).unwrap();
        let mut map = AddressMap::for_queue(Arc::new(memory));
        let mut bytes = [0; 8];
        map.read(0x1ff8, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 8]);
    }

    #[test]
    fn bad_tables_are_refused() {
        let refused = |table: &[(RegionSpec, u64)]| {
            let table: Vec<_> = table.iter().map(|(spec, size)| (*spec, memfd(*size))).collect();
            GuestMemory::map(&table).unwrap_err()
        };
        let overlap = [(spec(0x1000, 0x2000), 0x2000), (spec(0x2000, 0x1000), 0x1000)];
        assert!(matches!(refused(&overlap), MemoryError::Overlap { .. }));
        assert!(matches!(refused(&[(spec(0, 0x2000), 0x1000)]), MemoryError::Short { .. }));
        assert!(matches!(refused(&[(spec(0, 0), 0x1000)]), MemoryError::Empty { .. }));
        let wraps = RegionSpec { guest: u64::MAX, size: 2, user: 0, offset: 0 };
        assert!(matches!(refused(&[(wraps, 0x1000)]), MemoryError::Wraps { .. }));
        let wraps = RegionSpec { guest: 0, size: 0x1000, user: 0, offset: u64::MAX };
        assert!(matches!(refused(&[(wraps, 0x1000)]), MemoryError::Wraps { .. }));
        assert!(matches!(refused(&[(spec(0, 1 << 50), 1 << 50)]), MemoryError::TooLarge));
        let many: Vec<_> = (0..65).map(|i| (spec(i << 12, 0x1000), 0x1000)).collect();
        assert!(matches!(refused(&many), MemoryError::TooMany));
        let (pipe, _writer) = nix::unistd::pipe().unwrap();
        let error = GuestMemory::map(&[(spec(0, 0x1000), pipe)]).unwrap_err();
        assert!(matches!(error, MemoryError::NotAFile));
    }

    #[test]
    fn regions_are_added_and_removed_one_by_one() {
        let memory = GuestMemory::default().with(spec(0, 0x1000), &memfd(0x1000)).unwrap();
        let memory = memory.with(spec(0x4000, 0x1000), &memfd(0x1000)).unwrap();
        let user = |guest: u64| guest + 0x7000_0000_0000;
        assert!(memory.window_at_user(user(0x4000), 0x1000, 16).is_some());
        assert!(memory.window_at_user(user(0x4001), 16, 16).is_none(), "misaligned");
        assert!(memory.window_at_user(user(0x4ff0), 32, 16).is_none(), "too long");
        let memory = memory.without(&spec(0x4000, 0x1000)).unwrap();
        assert!(memory.window_at_user(user(0x4000), 0x1000, 16).is_none());
        assert!(matches!(memory.without(&spec(0x4000, 0x1000)), Err(MemoryError::Unknown { .. })));
    }

    #[test]
    fn truncated_memory_turns_to_zeroes_and_harms_nobody_else() {
        let (file, neighbour_file) = (memfd(0x4000), memfd(0x1000));
        let mapping = Arc::new(Mapping::new(&file, 0, 0x4000).unwrap());
        let neighbour = Arc::new(Mapping::new(&neighbour_file, 0, 0x1000).unwrap());
        let window = Window::new(&mapping, 0, 0x4000).unwrap();
        let beside = Window::new(&neighbour, 0, 0x1000).unwrap();
        window.store_u64(0x3000, 5, Ordering::Relaxed);
        beside.store_u64(0, 6, Ordering::Relaxed);
        let before = crate::sigbus::events();
        ftruncate(&file, 0x1000).unwrap();
        assert_eq!(window.load_u64(0x3000, Ordering::Relaxed), 0);
        assert!(window.poisoned() && crate::sigbus::events() > before);
        assert!(!beside.poisoned());
        assert_eq!(beside.load_u64(0, Ordering::Relaxed), 6);
    }

    #[test]
    #[should_panic(expected = "outside the window")]
    fn a_window_access_outside_it_is_our_bug() {
        let mapping = Arc::new(Mapping::new(&memfd(0x1000), 0, 0x1000).unwrap());
        Window::new(&mapping, 0xff8, 8).unwrap().load_u64(8, Ordering::Relaxed);
    }
}
