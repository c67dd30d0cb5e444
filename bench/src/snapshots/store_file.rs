//! What a store file holds where, as `mapping/FORMAT.md` has it, to give its data back to the file system.
//!
//! A collector walks metadata and never reads data. So a store that maps more than there is memory for can be made in
//! memory all the same: write some, then make a hole where the data was. Bitmaps, nodes and records stay as
//! the daemon has written them; only what guests wrote reads as zeroes, which nobody reads.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};

const BLOCK_BYTES: u64 = 4096;
const SECTOR_BYTES: usize = 512;
/// Of a superblock copy: offsets of the fields that are used here.
const MAGIC: &[u8] = b"BESSELST";
const EXTENT_BLOCKS_AT: usize = 56;
const EXTENT_COUNT_AT: usize = 64;
const CATALOGUE_START_AT: usize = 72;
/// A sector of the catalogue.
const ENTRIES_PER_SECTOR: usize = 15;
const ENTRY_BYTES: usize = 32;
const TYPE_DATA: u8 = 3;
/// Bits of a bitmap block.
const BITMAP_BITS: u64 = 31744;
/// Most extents of a store.
const EXTENT_COUNT_MAX: u64 = 1 << 18;

/// Gives the space of all guests' data in the store at `path` back to the file system, and returns how much was looked at.
/// The data reads as zeroes afterwards. Nothing may be writing to the store.
pub(super) fn forget_data(path: &Path) -> Result<u64, String> {
    let failed = |error: std::io::Error| format!("cannot empty {}: {error}", path.display());
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
    let ranges = data_ranges(&file).map_err(failed)?;
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let mut bytes = 0;
    for range in ranges {
        bytes += range.end - range.start;
        let (start, length) = (range.start as i64, (range.end - range.start) as i64);
        fallocate(&file, hole, start, length).map_err(|error| failed(error.into()))?;
    }
    Ok(bytes)
}

/// Where the data extents lie, without their bitmaps, in bytes.
fn data_ranges(file: &File) -> std::io::Result<Vec<Range<u64>>> {
    let wrong = |what: &str| std::io::Error::new(std::io::ErrorKind::InvalidData, what.to_owned());
    let mut superblock = [0; SECTOR_BYTES];
    file.read_exact_at(&mut superblock, 0)?;
    let field = |at: usize| {
        let bytes = superblock[at..at + 8].try_into().expect("eight bytes were taken");
        u64::from_le_bytes(bytes)
    };
    let (extent_blocks, extent_count) = (field(EXTENT_BLOCKS_AT), field(EXTENT_COUNT_AT));
    if !superblock.starts_with(MAGIC) {
        return Err(wrong("it is no store"));
    }
    if !extent_blocks.is_power_of_two()
        || extent_blocks > 1 << 26
        || !(4..=EXTENT_COUNT_MAX).contains(&extent_count)
    {
        return Err(wrong("its superblock makes no sense"));
    }
    let catalogue = field(CATALOGUE_START_AT).checked_mul(BLOCK_BYTES);
    let catalogue = catalogue.ok_or_else(|| wrong("its catalogue is nowhere"))?;
    let bitmap_blocks = extent_blocks.div_ceil(BITMAP_BITS);
    let mut ranges = Vec::new();
    let mut sector = [0; SECTOR_BYTES];
    for first in (0..extent_count).step_by(ENTRIES_PER_SECTOR) {
        let at = catalogue + first / ENTRIES_PER_SECTOR as u64 * SECTOR_BYTES as u64;
        file.read_exact_at(&mut sector, at)?;
        for (place, entry) in sector.chunks(ENTRY_BYTES).take(ENTRIES_PER_SECTOR).enumerate() {
            let extent = first + place as u64;
            if entry[0] == TYPE_DATA && extent < extent_count {
                let start = extent * extent_blocks;
                let blocks = start + bitmap_blocks..start + extent_blocks;
                ranges.push(blocks.start * BLOCK_BYTES..blocks.end * BLOCK_BYTES);
            }
        }
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::Scratch;
    use std::os::unix::fs::MetadataExt;

    /// A store of 20 extents of 64 blocks, of which 3 and 17 hold data.
    fn store(path: &Path) -> File {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
        file.write_all_at(&vec![7; 20 * 64 * 4096], 0).unwrap();
        let mut superblock = [0; 512];
        superblock[..8].copy_from_slice(MAGIC);
        for (at, value) in [(56, 64u64), (64, 20), (72, 40)] {
            superblock[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        file.write_all_at(&superblock, 0).unwrap();
        let mut catalogue = [0; 1024];
        for extent in 0..20 {
            let at = extent / 15 * 512 + extent % 15 * 32;
            catalogue[at] = [1, 2, 3, 4][if matches!(extent, 3 | 17) { 2 } else { extent % 2 }];
        }
        file.write_all_at(&catalogue, 40 * 4096).unwrap();
        file
    }

    #[test]
    fn only_data_goes_and_its_bitmap_stays() {
        let scratch = Scratch::new(&std::env::temp_dir(), "test-store").unwrap();
        let path = scratch.path().join("store");
        let file = store(&path);
        let before = file.metadata().unwrap().blocks();
        assert_eq!(forget_data(&path).unwrap(), 2 * 63 * 4096);
        assert!(file.metadata().unwrap().blocks() < before, "no space was given back");
        assert_eq!(file.metadata().unwrap().len(), 20 * 64 * 4096);
        for block in 0..20 * 64u64 {
            let mut bytes = [1; 4096];
            file.read_exact_at(&mut bytes, block * 4096).unwrap();
            let is_data = matches!(block / 64, 3 | 17) && block % 64 != 0;
            assert_eq!(bytes == [0; 4096], is_data, "block {block}");
        }
    }

    #[test]
    fn what_is_no_store_is_left_alone() {
        let scratch = Scratch::new(&std::env::temp_dir(), "test-no-store").unwrap();
        let path = scratch.path().join("file");
        std::fs::write(&path, vec![7; 8192]).unwrap();
        assert!(forget_data(&path).unwrap_err().contains("it is no store"));
        let file = store(&scratch.path().join("store"));
        file.write_all_at(&u64::MAX.to_le_bytes(), 64).unwrap();
        assert!(data_ranges(&file).is_err(), "a count of extents that no store has");
    }
}
