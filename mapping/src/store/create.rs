//! Making a store.
//!
//! The superblock goes last, after everything it stands for is durable, and an old one goes first:
//! a format that is cut short leaves the old store or none, never half of one.

use bessel_reactor::clock::WallTime;
use bessel_reactor::device::{Device, DeviceError};
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr, ByteCount};

use super::probe::{Found, look};
use super::write_superblock;
use crate::blocking::{Blocking, Span};
use crate::format::{
    CATALOGUE_ENTRIES_PER_BLOCK, CatalogueEntry, ExtentType, Geometry, GeometryError,
    SUPERBLOCK_COPIES, Superblock, encode_catalogue_block,
};
use crate::planted::{self, Bug};

/// What to make.
#[derive(Clone)]
pub struct FormatOptions {
    /// Size of an extent; chosen by the device's size when none.
    pub extent_size: Option<ByteCount>,
    /// Destroy what the device holds.
    pub force: bool,
    /// Identity of the store; random.
    pub uuid: [u8; 16],
    /// Keys tags and seals; random. Its lowest bit is set for the caller.
    pub secret: u64,
    /// When.
    pub time: WallTime,
}

/// What was made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FormatReport {
    /// Identity of the store.
    pub uuid: [u8; 16],
    /// Where everything lies.
    pub geometry: Geometry,
    /// What was destroyed.
    pub replaced: Found,
}

/// Why no store was made.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The device holds something. It has not been changed.
    #[error("the device holds {0}; use --force to destroy it and make a store")]
    Occupied(Found),
    /// There is no store of this shape. The device has not been changed.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The device failed. It may hold nothing usable now; format again.
    #[error("the device failed while {doing}")]
    Device {
        /// What was being done.
        doing: &'static str,
        /// How it failed.
        #[source]
        source: DeviceError,
    },
}

fn failed(doing: &'static str) -> impl FnOnce(DeviceError) -> FormatError {
    move |source| FormatError::Device { doing, source }
}

/// Makes a store on the whole device. `progress` is told blocks written and blocks to write.
///
/// # Errors
/// Why it was refused, or how it failed.
pub fn format<D: Device>(
    device: &mut D,
    options: &FormatOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<FormatReport, FormatError> {
    let geometry = Geometry::plan(device.properties().capacity, options.extent_size)?;
    let mut io = Blocking::new(device);
    let replaced = look(&mut io).map_err(failed("looking for what it holds"))?;
    if replaced != Found::Blank && !options.force {
        return Err(FormatError::Occupied(replaced));
    }
    let superblock = Superblock {
        features_compatible: 0,
        features_read_only: 0,
        features_incompatible: 0,
        uuid: options.uuid,
        geometry,
        secret: options.secret | 1,
        sequence: 1,
        parent_checksum: 0,
        created: options.time,
    };
    write_system_extent(&mut io, &superblock, progress)?;
    let (first_half, second_half) = SUPERBLOCK_COPIES.split_at(2);
    for half in [first_half, second_half] {
        write_superblock(&mut io, &superblock, half).map_err(failed("writing the superblock"))?;
    }
    Ok(FormatReport { uuid: options.uuid, geometry, replaced })
}

/// Everything in extent 0 but the superblock, durably; first of all, no superblock.
fn write_system_extent<D: Device>(
    io: &mut Blocking<'_, D>,
    superblock: &Superblock,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), FormatError> {
    let geometry = &superblock.geometry;
    let end = geometry.registry_start.add(2 * u64::from(geometry.registry_slots));
    let mut done = 0;
    let mut note = |bytes: &[u8]| {
        done += bytes.len() as u64 / BLOCK_SIZE;
        progress(done, end.get());
    };

    let old = Span { start: BlockAddr::new(0), blocks: geometry.host_start.get() };
    io.write([old], |_, bytes| note(bytes)).map_err(failed("erasing what it held"))?;
    if !planted::is(Bug::EraseNotFlushed) {
        io.flush().map_err(failed("erasing what it held"))?;
    }

    let tables = span(geometry.host_start, geometry.catalogue_start);
    let registry = span(geometry.registry_start, end);
    io.write([tables, registry], |_, bytes| note(bytes))
        .map_err(failed("clearing the registry"))?;
    let catalogue = Span { start: geometry.catalogue_start, blocks: geometry.catalogue_blocks };
    io.write([catalogue], |start, bytes| {
        let blocks = bytes.chunks_exact_mut(BLOCK_SIZE as usize);
        for (addr, block) in (start.get()..).map(BlockAddr::new).zip(blocks) {
            fresh_catalogue_block(block, addr, superblock);
        }
        note(bytes);
    })
    .map_err(failed("writing the extent catalogue"))?;
    if planted::is(Bug::SuperblockBeforeTables) {
        return Ok(());
    }
    io.flush().map_err(failed("writing the extent catalogue"))
}

fn span(start: BlockAddr, end: BlockAddr) -> Span {
    Span { start, blocks: end.get() - start.get() }
}

/// The catalogue block at `addr` of a store whose extents are all unused but the first.
fn fresh_catalogue_block(block: &mut [u8], addr: BlockAddr, superblock: &Superblock) {
    let geometry = &superblock.geometry;
    let per_block = CATALOGUE_ENTRIES_PER_BLOCK as u64;
    let first = (addr.get() - geometry.catalogue_start.get()) * per_block;
    let mut entries = [CatalogueEntry::UNUSED; CATALOGUE_ENTRIES_PER_BLOCK];
    if first == 0 {
        entries[0].kind = ExtentType::System;
    }
    let count = (geometry.extent_count - first).min(per_block) as usize;
    encode_catalogue_block(block, addr, first, &entries[..count], superblock.secret);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocking::CHUNK_BLOCKS_SMALL;
    use crate::store::testing::{READ_WRITE, disk, formatted, options};
    use crate::store::{OpenError, OpenMode, open, probe};
    use bessel_reactor::device::sim::{Fault, Keep, OpKind};

    fn nothing(_: u64, _: u64) {}

    #[test]
    fn a_new_store_opens_empty() {
        let disk = formatted(64 << 20);
        let store = open(&mut disk.connect(), READ_WRITE).unwrap();
        assert_eq!((store.geometry.extent_count, store.geometry.extent_blocks), (64, 256));
        assert_eq!(store.superblock.uuid, options().uuid);
        assert_eq!(store.directory.volumes().count(), 0);
        assert_eq!(store.bitmap_free.total(), 63 * 255);
        assert_eq!(store.epoch, 1);
        assert!(store.faults.is_empty() && store.findings.is_empty());
    }

    #[test]
    fn the_largest_store_can_be_made_and_opened() {
        let disk = formatted(64 << 50);
        let store = open(&mut disk.connect(), OpenMode::ReadOnly).unwrap();
        assert_eq!(store.geometry.size(), ByteCount::new(64 << 50));
        assert_eq!(store.catalogue.len(), 1 << 18);
    }

    #[test]
    fn what_a_device_holds_is_named_and_kept() {
        let disk = disk(8 << 20);
        let mut block = [0; 4096];
        block[0x438..0x43a].copy_from_slice(&[0x53, 0xef]);
        disk.poke(BlockAddr::new(0), &block);
        let error = format(&mut disk.connect(), &options(), &mut nothing).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the device holds an ext2 file system; use --force to destroy it and make a store"
        );
        assert_eq!(disk.counters().writes, 0);
        let forced = FormatOptions { force: true, ..options() };
        let report = format(&mut disk.connect(), &forced, &mut nothing).unwrap();
        assert_eq!(report.replaced, Found::Foreign("an ext2 file system".into()));
        let error = format(&mut disk.connect(), &options(), &mut nothing).unwrap_err();
        assert!(matches!(error, FormatError::Occupied(Found::Store { .. })));
    }

    #[test]
    fn a_device_too_small_is_refused_unchanged() {
        let disk = disk((4 << 20) - 4096);
        let error = format(&mut disk.connect(), &options(), &mut nothing).unwrap_err();
        assert!(matches!(error, FormatError::Geometry(GeometryError::TooSmall { .. })));
        assert_eq!(disk.counters().writes, 0);
    }

    #[test]
    fn progress_ends_at_its_total() {
        let mut last = (0, 1);
        let disk = disk(8 << 20);
        format(&mut disk.connect(), &options(), &mut |done, total| {
            assert!(done > last.0 && done <= total);
            last = (done, total);
        })
        .unwrap();
        assert_eq!(last.0, last.1);
    }

    /// A forced format over a store, cut at each write, whatever of the unflushed writes was kept:
    /// afterwards there is the old store, whole, or none, or the new one.
    #[test]
    fn a_format_cut_short_leaves_no_half_a_store() {
        // Writes that erase superblock copies, before the flush after which anything else goes.
        let erasing = Geometry::plan(ByteCount::new(8 << 20), None)
            .unwrap()
            .host_start
            .get()
            .div_ceil(CHUNK_BLOCKS_SMALL);
        let forced =
            FormatOptions { force: true, uuid: *b"the-new-one-uuid", secret: 77, ..options() };
        for keep_all in [false, true] {
            for cut in 0.. {
                let disk = formatted(8 << 20);
                disk.inject(Fault { kind: Some(OpKind::Write), after: cut, lasting: true });
                let outcome = format(&mut disk.connect(), &forced, &mut nothing);
                disk.heal();
                disk.crash(if keep_all { Keep::Everything } else { Keep::Nothing });
                match open(&mut disk.connect(), READ_WRITE) {
                    Ok(store) if store.superblock.uuid == forced.uuid => {}
                    Ok(store) => {
                        assert!(cut < erasing, "the old store is back after write {cut}");
                        assert_eq!(store.directory.volumes().count(), 0);
                        assert!(store.faults.is_empty());
                    }
                    Err(OpenError::NotAStore(_)) => assert!(outcome.is_err()),
                    Err(error) => panic!("cut at {cut}: {error}"),
                }
                if outcome.is_ok() {
                    let found = probe(&mut disk.connect()).unwrap();
                    assert_eq!(found, Found::Store { uuid: forced.uuid });
                    break;
                }
            }
        }
    }
}
