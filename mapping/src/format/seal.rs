//! The sealed sector: 512 bytes that know where they belong, what they are, and that they are whole.
//!
//! A device writes a sector whole or not at all, but may tear a block between sectors. So each
//! sector of a structure carries its own seal and stands for itself, and a torn block is a legal
//! mix of old and new sectors. The seal holds the absolute place (a misdirected write is found),
//! the kind (a block of another structure is found) and a CRC32C whose start value is taken from
//! the store's secret (a sector of an earlier store on the same device is found).

use bessel_reactor::units::{BLOCK_SIZE, BlockAddr, SECTOR_SIZE, SECTORS_PER_BLOCK};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::planted::{self, Bug};

/// Bytes in a sector, as an index.
pub(super) const SECTOR: usize = SECTOR_SIZE as usize;
/// Bytes in a block, as an index.
pub(super) const BLOCK: usize = BLOCK_SIZE as usize;
/// Bytes of a sealed sector that its structure may use.
pub const SEALED_PAYLOAD: usize = SECTOR - size_of::<Seal>();

/// What a sealed sector holds; four readable characters on the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A superblock copy.
    Superblock,
    /// A host record.
    Host,
    /// Fifteen catalogue entries.
    Catalogue,
    /// A volume record.
    Volume,
    /// Three snapshot log entries.
    SnapshotLog,
    /// 3968 allocation bits.
    Bitmap,
}

impl Kind {
    const fn magic(self) -> u32 {
        u32::from_le_bytes(match self {
            Self::Superblock => *b"BSUP",
            Self::Host => *b"BHST",
            Self::Catalogue => *b"BCAT",
            Self::Volume => *b"BVOL",
            Self::SnapshotLog => *b"BLOG",
            Self::Bitmap => *b"BMAP",
        })
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Superblock => "superblock",
            Self::Host => "host record",
            Self::Catalogue => "extent catalogue",
            Self::Volume => "volume record",
            Self::SnapshotLog => "snapshot log",
            Self::Bitmap => "allocation bitmap",
        }
    }
}

/// The last 16 bytes of every sealed sector.
///
/// | offset | size | field   | meaning                                                        |
/// |-------:|-----:|---------|----------------------------------------------------------------|
/// |    496 |    8 | `place` | absolute sector number on the device                           |
/// |    504 |    4 | `kind`  | magic of the structure                                         |
/// |    508 |    4 | `crc`   | CRC32C of bytes 0..508, started from the low half of the secret |
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Seal {
    place: U64,
    kind: U32,
    crc: U32,
}

const _: () = assert!(size_of::<Seal>() == 16);
const CRC_OFFSET: usize = SECTOR - 4;

/// Bytes on the device that contradict themselves: where, and in what way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{structure} at block {block}, sector {sector}: {fault}", structure = .kind.name())]
pub struct Damage {
    /// What should be there.
    pub kind: Kind,
    /// The block.
    pub block: BlockAddr,
    /// The sector in the block, 0..8.
    pub sector: u8,
    /// What is wrong with it.
    pub fault: Fault,
}

/// What is wrong with a sector.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Fault {
    /// Nothing but zeroes: lost, or never written.
    #[error("the sector is all zero")]
    Zero,
    /// The bytes are not those that were sealed, or were sealed by another store.
    #[error("the checksum does not match")]
    Checksum,
    /// A whole sector, of another place.
    #[error("the sector belongs at sector {0} of the device")]
    Misplaced(u64),
    /// A whole sector, of another structure.
    #[error("the sector holds another structure (magic {0:#010x})")]
    Kind(u32),
    /// A whole sector of the right kind and place, with a value no writer of this format writes.
    #[error("{0}")]
    Field(&'static str),
}

/// The number a sector is sealed with: which block it is in, and which of that block's sectors.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// The block.
    pub(super) block: BlockAddr,
    /// The sector in the block.
    pub(super) sector: u8,
}

impl Place {
    pub(super) const fn new(block: BlockAddr, sector: u8) -> Self {
        assert!((sector as u64) < SECTORS_PER_BLOCK);
        Self { block, sector }
    }

    const fn absolute(self) -> u64 {
        self.block.get() * SECTORS_PER_BLOCK + self.sector as u64
    }

    pub(super) const fn damage(self, kind: Kind, fault: Fault) -> Damage {
        Damage { kind, block: self.block, sector: self.sector, fault }
    }
}

/// Seals a sector whose payload is in place. `seed` is the store's secret, or 0 for a superblock.
///
/// # Panics
/// When `bytes` is not one sector.
pub(super) fn seal(bytes: &mut [u8], place: Place, kind: Kind, seed: u64) {
    assert_eq!(bytes.len(), SECTOR, "a seal closes one sector");
    let mut seal =
        Seal { place: place.absolute().into(), kind: kind.magic().into(), crc: U32::ZERO };
    bytes[SEALED_PAYLOAD..].copy_from_slice(seal.as_bytes());
    seal.crc = crc32c::crc32c_append(seed as u32, &bytes[..CRC_OFFSET]).into();
    bytes[CRC_OFFSET..].copy_from_slice(seal.crc.as_bytes());
}

/// Checks a sector's seal.
///
/// # Errors
/// What is wrong with it. The payload says nothing then.
///
/// # Panics
/// When `bytes` is not one sector.
pub(super) fn unseal(bytes: &[u8], place: Place, kind: Kind, seed: u64) -> Result<(), Damage> {
    assert_eq!(bytes.len(), SECTOR, "a seal closes one sector");
    let seal = Seal::ref_from_bytes(&bytes[SEALED_PAYLOAD..]).expect("the slice is 16 bytes");
    let whole = crc32c::crc32c_append(seed as u32, &bytes[..CRC_OFFSET]) == seal.crc.get();
    let fault = if !whole && !planted::is(Bug::SealNotChecked) {
        if is_zero(bytes) { Fault::Zero } else { Fault::Checksum }
    } else if seal.kind.get() != kind.magic() {
        Fault::Kind(seal.kind.get())
    } else if seal.place.get() != place.absolute() {
        Fault::Misplaced(seal.place.get())
    } else {
        return Ok(());
    };
    Err(place.damage(kind, fault))
}

/// Whether a sector says that it was sealed for the absolute place it is read from. Needs no secret
/// and so proves nothing: it tells that a store was here, not that it is whole.
///
/// # Panics
/// When `bytes` is not one sector.
pub(crate) fn looks_sealed(bytes: &[u8], absolute: u64) -> bool {
    const KINDS: [Kind; 6] = [
        Kind::Superblock,
        Kind::Host,
        Kind::Catalogue,
        Kind::Volume,
        Kind::SnapshotLog,
        Kind::Bitmap,
    ];
    assert_eq!(bytes.len(), SECTOR, "a seal closes one sector");
    let seal = Seal::ref_from_bytes(&bytes[SEALED_PAYLOAD..]).expect("the slice is 16 bytes");
    seal.place.get() == absolute && KINDS.iter().any(|kind| kind.magic() == seal.kind.get())
}

/// The CRC a sealed sector carries, to chain superblocks by.
pub(super) fn crc_of(bytes: &[u8]) -> u32 {
    let crc: [u8; 4] = bytes[CRC_OFFSET..SECTOR].try_into().expect("four bytes");
    u32::from_le_bytes(crc)
}

/// True when there is nothing but zeroes.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = Place::new(BlockAddr::new(77), 5);
    const SECRET: u64 = 0x1234_5678_9abc_def1;

    fn sealed() -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = index as u8;
        }
        seal(&mut bytes, PLACE, Kind::Bitmap, SECRET);
        bytes
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let good = sealed();
        assert_eq!(unseal(&good, PLACE, Kind::Bitmap, SECRET), Ok(()));
        for bit in 0..SECTOR * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(unseal(&bad, PLACE, Kind::Bitmap, SECRET).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_sector_of_another_place_kind_or_store_is_found() {
        let bytes = sealed();
        let fault = |place, kind, seed| unseal(&bytes, place, kind, seed).unwrap_err().fault;
        let other_sector = Place::new(BlockAddr::new(77), 4);
        let other_block = Place::new(BlockAddr::new(78), 5);
        let home = 77 * 8 + 5;
        assert_eq!(fault(other_sector, Kind::Bitmap, SECRET), Fault::Misplaced(home));
        assert_eq!(fault(other_block, Kind::Bitmap, SECRET), Fault::Misplaced(home));
        assert_eq!(fault(PLACE, Kind::Volume, SECRET), Fault::Kind(Kind::Bitmap.magic()));
        assert_eq!(fault(PLACE, Kind::Bitmap, SECRET ^ 2), Fault::Checksum);
    }

    #[test]
    fn a_lost_sector_is_called_so() {
        let damage = unseal(&[0; SECTOR], PLACE, Kind::Volume, SECRET).unwrap_err();
        assert_eq!(
            damage.to_string(),
            "volume record at block 77, sector 5: the sector is all zero"
        );
    }
}
