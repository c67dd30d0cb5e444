//! A store as a whole: making one, recognising one, opening and closing it.
//!
//! Control path. Nothing here serves I/O; what it finds is handed to shards, which do. A device that
//! is refused, for whatever reason, has not been changed.
//!
//! | file        | does                                                                   |
//! |-------------|------------------------------------------------------------------------|
//! | `probe.rs`  | says what a device holds, so that nobody formats over a file system    |
//! | `create.rs` | makes a store, its superblock last                                     |
//! | `open.rs`   | reads everything but trees and old snapshots; raises the host's epoch  |
//! | `log.rs`    | walks snapshot logs, from their newest block back                      |
//! | `reopen.rs` | reads one volume of an open store again                                |

mod create;
mod log;
mod open;
mod probe;
mod reopen;

pub use create::{FormatError, FormatOptions, FormatReport, format};
pub(crate) use log::first_of_block;
pub use log::{LogFault, LogPart, LogWalk, WholeLog, read_log};
pub(crate) use open::{Losses, survey};
pub use open::{OpenError, OpenMode, OpenedStore, begin_life, close, open};
pub use probe::{Found, probe};
pub(crate) use reopen::read_record;
pub use reopen::{ReopenError, reread};

use bessel_reactor::device::{Device, DeviceError};
use bessel_reactor::units::BlockAddr;

use crate::blocking::{Blocking, Span};
use crate::format::{Geometry, Superblock};

/// A daemon on this store before hosts are named by their leases: the first of the host table.
pub const HOST_LOCAL: u16 = 0;

/// Free blocks by bitmap block, so that an allocator reads a bitmap only to find room it has.
///
/// Memory is spent on initialised extents only: a store of 64 PiB has half a billion bitmap blocks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FreeCounts {
    geometry: Geometry,
    /// By extent: the counts of one that is initialised, or none. Empty for the system extent.
    extents: Vec<Option<Box<[u32]>>>,
}

impl FreeCounts {
    /// All data and metadata extents unused.
    pub fn new(geometry: Geometry) -> Self {
        let mut extents = vec![None; geometry.extent_count as usize];
        extents[0] = Some(Box::default());
        Self { geometry, extents }
    }

    /// Free blocks that bitmap block `index` of an extent shows, or will when it is initialised;
    /// none in the system extent.
    ///
    /// # Panics
    /// When there is no such extent or bitmap block.
    pub fn get(&self, extent: u64, index: u64) -> u32 {
        assert!(index < self.geometry.bitmap_blocks, "bitmap block {index}");
        match &self.extents[extent as usize] {
            None => self.geometry.fresh_bitmap_free(index),
            Some(counts) => counts.get(index as usize).copied().unwrap_or(0),
        }
    }

    /// Notes how many are free now. An extent that was unused counts as initialised afterwards.
    ///
    /// # Panics
    /// When there is no such bitmap block, and for the system extent.
    pub fn set(&mut self, extent: u64, index: u64, free: u32) {
        let geometry = self.geometry;
        let counts = self.extents[extent as usize].get_or_insert_with(|| {
            (0..geometry.bitmap_blocks).map(|index| geometry.fresh_bitmap_free(index)).collect()
        });
        counts[index as usize] = free;
    }

    /// Free blocks of an extent.
    pub fn extent(&self, extent: u64) -> u64 {
        match &self.extents[extent as usize] {
            None => self.geometry.usable_blocks(),
            Some(counts) => counts.iter().map(|&free| u64::from(free)).sum(),
        }
    }

    /// Free blocks of the store.
    pub fn total(&self) -> u64 {
        (0..self.geometry.extent_count).map(|extent| self.extent(extent)).sum()
    }
}

/// Writes `superblock` to these copies and makes them durable.
fn write_superblock<D: Device>(
    io: &mut Blocking<'_, D>,
    superblock: &Superblock,
    copies: &[BlockAddr],
) -> Result<(), DeviceError> {
    io.write(copies.iter().map(|&copy| Span::one(copy)), |addr, block| {
        superblock.encode_block(block, addr);
    })?;
    io.flush()
}

#[cfg(test)]
pub(crate) mod testing {
    //! A small store on a simulated disk, for the tests of this crate.

    use super::*;
    use bessel_reactor::clock::WallTime;
    use bessel_reactor::device::sim::{Schedule, SimConfig, SimDisk};
    use bessel_reactor::units::ByteCount;

    pub(crate) const SECRET: u64 = 0x5eed_0000_1234_5677;
    pub(crate) const NOW: WallTime = WallTime::from_unix_nanos(1_700_000_000_000_000_000);

    pub(crate) fn disk(bytes: u64) -> SimDisk {
        let mut config = SimConfig::new(ByteCount::new(bytes), 1);
        config.schedule = Schedule::AtOnce;
        SimDisk::new(config)
    }

    pub(crate) fn options() -> FormatOptions {
        FormatOptions {
            extent_size: None,
            force: false,
            uuid: *b"bessel-test-uuid",
            secret: SECRET,
            time: NOW,
        }
    }

    pub(crate) fn formatted(bytes: u64) -> SimDisk {
        let disk = disk(bytes);
        format(&mut disk.connect(), &options(), &mut |_, _| ()).unwrap();
        disk
    }

    pub(crate) const READ_WRITE: OpenMode = OpenMode::ReadWrite { time: NOW };

    #[test]
    fn free_counts_cost_memory_for_initialised_extents_only() {
        let geometry = Geometry::plan(ByteCount::new(64 << 50), None).unwrap();
        let mut counts = FreeCounts::new(geometry);
        assert_eq!(counts.total(), (geometry.extent_count - 1) * geometry.usable_blocks());
        let before = counts.extent(7);
        counts.set(7, 1, 5);
        assert_eq!(counts.get(7, 1), 5);
        assert_eq!(counts.get(7, 0), geometry.fresh_bitmap_free(0));
        assert_eq!(before - counts.extent(7), u64::from(geometry.fresh_bitmap_free(1)) - 5);
        assert_eq!(counts.get(0, 0), 0);
    }
}
