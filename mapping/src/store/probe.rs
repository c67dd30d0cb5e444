//! What a device holds, by its magic numbers.
//!
//! Only to refuse: `format` asks before it destroys, `open` asks to say what it was given instead
//! of a store. Nothing found here is ever trusted further.

use bessel_reactor::device::{Device, DeviceError};
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr, SECTOR_SIZE};

use crate::blocking::Blocking;
use crate::format::seal::looks_sealed;
use crate::format::{SUPERBLOCK_COPIES, Superblock, SuperblockFault};

/// What a device holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Found {
    /// Zeroes, as far as one looks: the first MiB.
    Blank,
    /// A store of this format's version.
    Store {
        /// Its identity.
        uuid: [u8; 16],
    },
    /// Something else; the text names it, as in "an ext4 file system".
    Foreign(String),
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Blank => f.write_str("nothing that is recognised (its first MiB is zero)"),
            Self::Store { uuid } => write!(f, "a Bessel store (uuid {})", uuid_text(uuid)),
            Self::Foreign(what) => f.write_str(what),
        }
    }
}

/// A UUID as people write it.
pub(super) fn uuid_text(uuid: &[u8; 16]) -> String {
    let hex = |range: std::ops::Range<usize>| -> String {
        uuid[range].iter().map(|byte| format!("{byte:02x}")).collect()
    };
    [hex(0..4), hex(4..6), hex(6..8), hex(8..10), hex(10..16)].join("-")
}

/// How much is looked at: past the first ZFS label, the farthest of the signatures, and over what a
/// store keeps ahead of its volumes, so that one whose superblocks are gone is still told from
/// nothing. A device counts as blank when all of this is zero.
const LOOK_BLOCKS: u64 = (1 << 20) / BLOCK_SIZE;

/// Signatures at fixed places, the more telling first: a boot sector's mark is in many file systems.
const SIGNATURES: &[(usize, &[u8], &str)] = &[
    (0, b"LUKS\xba\xbe", "a LUKS encrypted volume"),
    (0, b"XFSB", "an XFS file system"),
    (0x10040, b"_BHRfS_M", "a btrfs file system"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"KDMV", "a VMDK disk image"),
    (0, b"vhdxfile", "a VHDX disk image"),
    (0, b"hsqs", "a squashfs file system"),
    (0, b"LABELONE", "an LVM physical volume"),
    (512, b"LABELONE", "an LVM physical volume"),
    (1024, b"LABELONE", "an LVM physical volume"),
    (1536, b"LABELONE", "an LVM physical volume"),
    (0, &[0xfc, 0x4e, 0x2b, 0xa9], "a Linux RAID member"),
    (4096, &[0xfc, 0x4e, 0x2b, 0xa9], "a Linux RAID member"),
    (4096 - 10, b"SWAPSPACE2", "Linux swap space"),
    (4096 - 10, b"SWAP-SPACE", "Linux swap space"),
    (65536 - 10, b"SWAPSPACE2", "Linux swap space"),
    (1024, &[0x10, 0x20, 0xf5, 0xf2], "an F2FS file system"),
    (4096 + 24, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca", "a bcache device"),
    (0x10034, b"ReIsErFs", "a reiserfs file system"),
    (0x10034, b"ReIsEr2Fs", "a reiserfs file system"),
    (0x10034, b"ReIsEr3Fs", "a reiserfs file system"),
    (0x8001, b"CD001", "an ISO 9660 image"),
    (512, b"EFI PART", "a GPT partition table"),
    (4096, b"EFI PART", "a GPT partition table"),
    (3, b"NTFS    ", "an NTFS file system"),
    (3, b"EXFAT   ", "an exFAT file system"),
    (54, b"FAT", "a FAT file system"),
    (82, b"FAT32", "a FAT file system"),
    (510, &[0x55, 0xaa], "an MBR partition table or boot sector"),
];

/// Says what the device holds. Reads only.
///
/// # Errors
/// The device's.
pub fn probe<D: Device>(device: &mut D) -> Result<Found, DeviceError> {
    look(&mut Blocking::new(device))
}

/// [`probe`], for who has the device already.
pub(super) fn look<D: Device>(io: &mut Blocking<'_, D>) -> Result<Found, DeviceError> {
    let blocks = io.capacity_blocks().min(LOOK_BLOCKS);
    let mut bytes = vec![0; (blocks * BLOCK_SIZE) as usize];
    io.read_into(BlockAddr::new(0), &mut bytes)?;
    Ok(recognise(&bytes))
}

fn recognise(bytes: &[u8]) -> Found {
    if let Some(found) = recognise_store(bytes) {
        return found;
    }
    let fixed = SIGNATURES.iter().find(|(offset, magic, _)| at(bytes, *offset, magic));
    let name =
        recognise_ext(bytes).or(fixed.map(|(_, _, name)| *name)).or_else(|| recognise_zfs(bytes));
    if let Some(name) = name {
        return Found::Foreign(name.to_owned());
    }
    if has_sealed_sector(bytes) {
        return damaged_store();
    }
    match bytes.iter().position(|&byte| byte != 0) {
        None => Found::Blank,
        Some(offset) => Found::Foreign(format!("unknown data (first at byte {offset})")),
    }
}

fn recognise_store(bytes: &[u8]) -> Option<Found> {
    let mut damaged = None;
    for copy in SUPERBLOCK_COPIES {
        let Some(sector) = bytes.get(copy.offset().get() as usize..) else { break };
        if sector.is_empty() {
            break;
        }
        match Superblock::decode(sector, copy) {
            Ok(superblock) => return Some(Found::Store { uuid: superblock.uuid }),
            Err(SuperblockFault::Version { version, .. }) => {
                let what = format!("a Bessel store of format version {version}");
                return Some(Found::Foreign(what));
            }
            Err(SuperblockFault::Damaged(_)) => {
                damaged = Some(damaged_store());
            }
            Err(SuperblockFault::Zero(_) | SuperblockFault::Foreign(_)) => {}
        }
    }
    damaged
}

fn damaged_store() -> Found {
    Found::Foreign("a damaged Bessel store".to_owned())
}

/// Whether a host record, a piece of the catalogue or a volume record is where one of a store was
/// written. Their checksums are keyed by the superblock, which is not there to ask.
fn has_sealed_sector(bytes: &[u8]) -> bool {
    let mut sectors = (0..).zip(bytes.chunks_exact(SECTOR_SIZE as usize));
    sectors.any(|(place, sector)| looks_sealed(sector, place))
}

/// The ext family shares a magic number; features tell its members apart.
fn recognise_ext(bytes: &[u8]) -> Option<&'static str> {
    const JOURNAL: u32 = 0x4;
    /// Extents, 64-bit, flexible groups: what no ext3 has.
    const EXT4: u32 = 0x40 | 0x80 | 0x200;
    if !at(bytes, 0x438, &[0x53, 0xef]) {
        return None;
    }
    let word = |offset: usize| {
        bytes
            .get(offset..offset + 4)
            .map_or(0, |word| u32::from_le_bytes(word.try_into().expect("the range is four bytes")))
    };
    Some(if word(0x460) & EXT4 != 0 {
        "an ext4 file system"
    } else if word(0x45c) & JOURNAL != 0 {
        "an ext3 file system"
    } else {
        "an ext2 file system"
    })
}

/// ZFS has no magic at a fixed place: its uberblocks fill the second half of each 256 KiB label.
fn recognise_zfs(bytes: &[u8]) -> Option<&'static str> {
    const MAGIC: u64 = 0x00ba_b10c;
    let is_uberblock = |offset: usize| {
        at(bytes, offset, &MAGIC.to_le_bytes()) || at(bytes, offset, &MAGIC.to_be_bytes())
    };
    (128 << 10..256 << 10).step_by(1 << 10).any(is_uberblock).then_some("a ZFS pool member")
}

fn at(bytes: &[u8], offset: usize, magic: &[u8]) -> bool {
    bytes.get(offset..offset + magic.len()) == Some(magic)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::open;
    use crate::store::testing::{READ_WRITE, disk, formatted, options};

    fn recognised(patches: &[(usize, &[u8])]) -> Found {
        let mut bytes = vec![0; (LOOK_BLOCKS * BLOCK_SIZE) as usize];
        for (offset, patch) in patches {
            bytes[*offset..offset + patch.len()].copy_from_slice(patch);
        }
        recognise(&bytes)
    }

    #[test]
    fn what_people_lose_data_on_is_recognised() {
        type Patches<'a> = &'a [(usize, &'a [u8])];
        let cases: &[(&str, Patches)] = &[
            ("an ext2 file system", &[(0x438, &[0x53, 0xef])]),
            ("an ext3 file system", &[(0x438, &[0x53, 0xef]), (0x45c, &[4])]),
            ("an ext4 file system", &[(0x438, &[0x53, 0xef]), (0x45c, &[4]), (0x460, &[0x42])]),
            ("an XFS file system", &[(0, b"XFSB")]),
            ("a btrfs file system", &[(0x10040, b"_BHRfS_M")]),
            ("an LVM physical volume", &[(512, b"LABELONE"), (536, b"LVM2 001")]),
            ("a GPT partition table", &[(510, &[0x55, 0xaa]), (512, b"EFI PART")]),
            ("an MBR partition table or boot sector", &[(510, &[0x55, 0xaa])]),
            ("a qcow2 disk image", &[(0, b"QFI\xfb\0\0\0\x03")]),
            ("a LUKS encrypted volume", &[(0, b"LUKS\xba\xbe\0\x02")]),
            ("Linux swap space", &[(4086, b"SWAPSPACE2")]),
            ("a ZFS pool member", &[((128 << 10) + 3072, &0x00ba_b10c_u64.to_be_bytes())]),
            ("a reiserfs file system", &[(0x10034, b"ReIsErFs\0")]),
            ("a reiserfs file system", &[(0x10034, b"ReIsEr2Fs")]),
            ("a reiserfs file system", &[(0x10034, b"ReIsEr3Fs")]),
            ("unknown data (first at byte 60000)", &[(60000, b"x")]),
            ("unknown data (first at byte 100000)", &[(100_000, b"x")]),
            ("unknown data (first at byte 1048575)", &[((1 << 20) - 1, b"x")]),
        ];
        for (name, patches) in cases {
            assert_eq!(recognised(patches), Found::Foreign((*name).to_owned()));
        }
        assert_eq!(recognised(&[]), Found::Blank);
    }

    #[test]
    fn a_store_is_recognised_by_any_one_copy() {
        let disk = formatted(8 << 20);
        let store = Found::Store { uuid: options().uuid };
        assert_eq!(store.to_string(), "a Bessel store (uuid 62657373-656c-2d74-6573-742d75756964)");
        for copy in &SUPERBLOCK_COPIES[..3] {
            disk.poke(*copy, &[0; 4096]);
            assert_eq!(probe(&mut disk.connect()).unwrap(), store);
        }
        let mut last = disk.peek(SUPERBLOCK_COPIES[3]);
        last[100] ^= 1;
        disk.poke(SUPERBLOCK_COPIES[3], &last);
        let damaged = Found::Foreign("a damaged Bessel store".to_owned());
        assert_eq!(probe(&mut disk.connect()).unwrap(), damaged);
    }

    #[test]
    fn a_store_without_its_superblocks_is_not_blank() {
        let damaged = Found::Foreign("a damaged Bessel store".to_owned());
        let disk = formatted(64 << 20);
        let geometry = open(&mut disk.connect(), READ_WRITE).unwrap().geometry;
        for copy in SUPERBLOCK_COPIES {
            disk.poke(copy, &[0; 4096]);
        }
        assert_eq!(probe(&mut disk.connect()).unwrap(), damaged);
        for host in 0..2 * u64::from(geometry.host_slots) {
            disk.poke(geometry.host_start.add(host), &[0; 4096]);
        }
        assert_eq!(probe(&mut disk.connect()).unwrap(), damaged, "by its catalogue");
        for block in 0..geometry.catalogue_blocks {
            disk.poke(geometry.catalogue_start.add(block), &[0; 4096]);
        }
        assert_eq!(probe(&mut disk.connect()).unwrap(), Found::Blank);
    }

    #[test]
    fn a_store_that_lost_its_catalogue_as_well_is_known_by_its_host() {
        let disk = formatted(64 << 20);
        let geometry = open(&mut disk.connect(), READ_WRITE).unwrap().geometry;
        let zeroed = SUPERBLOCK_COPIES.into_iter();
        let catalogue = (0..geometry.catalogue_blocks).map(|at| geometry.catalogue_start.add(at));
        zeroed.chain(catalogue).for_each(|block| disk.poke(block, &[0; 4096]));
        let damaged = Found::Foreign("a damaged Bessel store".to_owned());
        assert_eq!(probe(&mut disk.connect()).unwrap(), damaged);
    }

    #[test]
    fn a_device_of_a_few_sectors_can_be_asked() {
        assert_eq!(probe(&mut disk(8192).connect()).unwrap(), Found::Blank);
    }
}
