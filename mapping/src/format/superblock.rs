//! The superblock: what this device is, and where everything lies.
//!
//! Four copies, 32 KiB apart. They are written in two flushed halves, so at any instant one half is
//! whole. The first 12 bytes and the seal mean the same in every version of the format: a daemon
//! that is too old can say so.

use bessel_reactor::clock::WallTime;
use bessel_reactor::units::BlockAddr;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::geometry::Geometry;
use super::seal::{BLOCK, Damage, Fault, Kind, Place, SECTOR, Seal, crc_of, is_zero, seal, unseal};

/// Where the copies lie.
pub const SUPERBLOCK_COPIES: [BlockAddr; 4] =
    [BlockAddr::new(0), BlockAddr::new(8), BlockAddr::new(16), BlockAddr::new(24)];
/// The format this code reads and writes.
pub const FORMAT_VERSION: u32 = 1;
/// Incompatible features this code knows: a store with another one cannot be opened.
pub const FEATURES_INCOMPATIBLE_KNOWN: u64 = 0;
/// Read-only compatible features this code knows: a store with another one opens read-only.
pub const FEATURES_READ_ONLY_KNOWN: u64 = 0;

const MAGIC: [u8; 8] = *b"BESSELST";
/// Superblocks are sealed without the secret: they hold it.
const SEED: u64 = 0;

/// A superblock on the device.
///
/// | offset | size | field                | meaning                                              |
/// |-------:|-----:|----------------------|------------------------------------------------------|
/// |      0 |    8 | `magic`              | `BESSELST`                                           |
/// |      8 |    4 | `version`            | 1                                                    |
/// |     12 |    4 | reserved             | 0                                                    |
/// |     16 |    8 | `features_compatible`   | may be ignored by who does not know them          |
/// |     24 |    8 | `features_read_only`    | who does not know one opens read-only             |
/// |     32 |    8 | `features_incompatible` | who does not know one refuses                     |
/// |     40 |   16 | `uuid`               | identity of the store                                |
/// |     56 |    8 | `extent_blocks`      | see [`Geometry`], so for the next nine                |
/// |     64 |    8 | `extent_count`       |                                                      |
/// |     72 |    8 | `catalogue_start`    |                                                      |
/// |     80 |    8 | `catalogue_blocks`   |                                                      |
/// |     88 |    8 | `registry_start`     |                                                      |
/// |     96 |    8 | `registry_slots`     |                                                      |
/// |    104 |    8 | `host_start`         |                                                      |
/// |    112 |    8 | `host_slots`         |                                                      |
/// |    120 |    8 | `group_start`        |                                                      |
/// |    128 |    8 | `group_slots`        |                                                      |
/// |    136 |    8 | `secret`             | random and odd; keys tags and seals                  |
/// |    144 |    8 | `sequence`           | counts changes of the superblock, from 1             |
/// |    152 |    4 | `parent_checksum`    | CRC of copy 0 of the sequence before; 0 in the first |
/// |    156 |    4 | reserved             | 0                                                    |
/// |    160 |    8 | `created`            | ns since 1970                                        |
/// |    168 |  328 | reserved             | 0                                                    |
/// |    496 |   16 | seal                 | with seed 0                                          |
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct DiskSuperblock {
    magic: [u8; 8],
    version: U32,
    reserved_12: U32,
    features_compatible: U64,
    features_read_only: U64,
    features_incompatible: U64,
    uuid: [u8; 16],
    extent_blocks: U64,
    extent_count: U64,
    catalogue_start: U64,
    catalogue_blocks: U64,
    registry_start: U64,
    registry_slots: U64,
    host_start: U64,
    host_slots: U64,
    group_start: U64,
    group_slots: U64,
    secret: U64,
    sequence: U64,
    parent_checksum: U32,
    reserved_156: U32,
    created: U64,
    reserved_168: [u8; 328],
    seal: Seal,
}

const _: () = assert!(size_of::<DiskSuperblock>() == SECTOR);

/// What a store is.
#[derive(Clone, PartialEq, Eq)]
pub struct Superblock {
    /// May be ignored by who does not know them.
    pub features_compatible: u64,
    /// Who does not know one opens read-only.
    pub features_read_only: u64,
    /// Who does not know one refuses.
    pub features_incompatible: u64,
    /// Identity of the store.
    pub uuid: [u8; 16],
    /// Where everything lies.
    pub geometry: Geometry,
    /// Random and odd; keys tags and seals.
    pub secret: u64,
    /// Counts changes of the superblock, from 1.
    pub sequence: u64,
    /// CRC of copy 0 of the sequence before; 0 in the first.
    pub parent_checksum: u32,
    /// When the store was formatted.
    pub created: WallTime,
}

impl std::fmt::Debug for Superblock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The secret stays out of logs.
        f.debug_struct("Superblock")
            .field("uuid", &self.uuid)
            .field("sequence", &self.sequence)
            .field("geometry", &self.geometry)
            .finish_non_exhaustive()
    }
}

/// Why a block is not a superblock we can use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SuperblockFault {
    /// Nothing but zeroes.
    #[error("superblock copy at block {0} is all zero")]
    Zero(BlockAddr),
    /// Does not begin as a superblock does.
    #[error("block {0} holds no superblock")]
    Foreign(BlockAddr),
    /// Begins as one, and is damaged.
    #[error(transparent)]
    Damaged(#[from] Damage),
    /// A whole superblock of a version this code does not know.
    #[error("superblock copy at block {addr} has format version {version}")]
    Version {
        /// The copy.
        addr: BlockAddr,
        /// Its version.
        version: u32,
    },
}

impl Superblock {
    /// Fills `out` with the copy to write to `addr`, one of [`SUPERBLOCK_COPIES`].
    ///
    /// # Panics
    /// When `out` is not one block or the secret is even.
    pub fn encode_block(&self, out: &mut [u8], addr: BlockAddr) {
        assert_eq!(out.len(), BLOCK, "a superblock copy is one block");
        assert!(self.secret % 2 == 1, "a store's secret is odd");
        let geometry = &self.geometry;
        let disk = DiskSuperblock {
            magic: MAGIC,
            version: FORMAT_VERSION.into(),
            features_compatible: self.features_compatible.into(),
            features_read_only: self.features_read_only.into(),
            features_incompatible: self.features_incompatible.into(),
            uuid: self.uuid,
            extent_blocks: geometry.extent_blocks.into(),
            extent_count: geometry.extent_count.into(),
            catalogue_start: geometry.catalogue_start.get().into(),
            catalogue_blocks: geometry.catalogue_blocks.into(),
            registry_start: geometry.registry_start.get().into(),
            registry_slots: u64::from(geometry.registry_slots).into(),
            host_start: geometry.host_start.get().into(),
            host_slots: u64::from(geometry.host_slots).into(),
            group_start: geometry.group_start.get().into(),
            group_slots: u64::from(geometry.group_slots).into(),
            secret: self.secret.into(),
            sequence: self.sequence.into(),
            parent_checksum: self.parent_checksum.into(),
            created: self.created.as_unix_nanos().into(),
            ..DiskSuperblock::new_zeroed()
        };
        out.fill(0);
        out[..SECTOR].copy_from_slice(disk.as_bytes());
        seal(&mut out[..SECTOR], Place::new(addr, 0), Kind::Superblock, SEED);
    }

    /// The CRC that copy 0 of this superblock has on the device, for its successor's parent field.
    pub fn checksum(&self) -> u32 {
        let mut block = [0; BLOCK];
        self.encode_block(&mut block, SUPERBLOCK_COPIES[0]);
        crc_of(&block)
    }

    /// Reads the copy at `addr`. Features are not judged here: who opens knows for what.
    ///
    /// # Errors
    /// Why it is none.
    ///
    /// # Panics
    /// When `bytes` is shorter than a sector.
    pub fn decode(bytes: &[u8], addr: BlockAddr) -> Result<Self, SuperblockFault> {
        let (bytes, place) = (&bytes[..SECTOR], Place::new(addr, 0));
        let disk = DiskSuperblock::ref_from_bytes(bytes).expect("a superblock is one sector");
        if is_zero(bytes) {
            return Err(SuperblockFault::Zero(addr));
        }
        if disk.magic != MAGIC {
            return Err(SuperblockFault::Foreign(addr));
        }
        unseal(bytes, place, Kind::Superblock, SEED)?;
        if disk.version.get() != FORMAT_VERSION {
            return Err(SuperblockFault::Version { addr, version: disk.version.get() });
        }
        let bad = |what| place.damage(Kind::Superblock, Fault::Field(what));
        let geometry = Geometry::of(disk.extent_blocks.get(), disk.extent_count.get())
            .filter(|geometry| disk.places_match(geometry))
            .ok_or(bad("the geometry contradicts itself"))?;
        if disk.secret.get() % 2 == 0 {
            return Err(bad("the secret is even").into());
        }
        Ok(Self {
            features_compatible: disk.features_compatible.get(),
            features_read_only: disk.features_read_only.get(),
            features_incompatible: disk.features_incompatible.get(),
            uuid: disk.uuid,
            geometry,
            secret: disk.secret.get(),
            sequence: disk.sequence.get(),
            parent_checksum: disk.parent_checksum.get(),
            created: WallTime::from_unix_nanos(disk.created.get()),
        })
    }
}

impl DiskSuperblock {
    /// True when the places written are those that version 1 computes.
    fn places_match(&self, geometry: &Geometry) -> bool {
        self.catalogue_start.get() == geometry.catalogue_start.get()
            && self.catalogue_blocks.get() == geometry.catalogue_blocks
            && self.registry_start.get() == geometry.registry_start.get()
            && self.registry_slots.get() == u64::from(geometry.registry_slots)
            && self.host_start.get() == geometry.host_start.get()
            && self.host_slots.get() == u64::from(geometry.host_slots)
            && self.group_start.get() == geometry.group_start.get()
            && self.group_slots.get() == u64::from(geometry.group_slots)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bessel_reactor::units::ByteCount;

    const ADDR: BlockAddr = SUPERBLOCK_COPIES[1];

    fn sample() -> Superblock {
        Superblock {
            features_compatible: 1,
            features_read_only: 2,
            features_incompatible: 4,
            uuid: *b"0123456789abcdef",
            geometry: Geometry::plan(ByteCount::new(8 << 30), None).unwrap(),
            secret: 0xfeed_f00d_1234_5679,
            sequence: 3,
            parent_checksum: 77,
            created: WallTime::from_unix_nanos(12),
        }
    }

    fn encoded() -> [u8; BLOCK] {
        let mut block = [0xff; BLOCK];
        sample().encode_block(&mut block, ADDR);
        block
    }

    #[test]
    fn a_superblock_comes_back_and_any_damage_is_found() {
        let mut block = encoded();
        assert_eq!(Superblock::decode(&block, ADDR), Ok(sample()));
        for bit in 0..SECTOR * 8 {
            block[bit / 8] ^= 1 << (bit % 8);
            assert!(Superblock::decode(&block, ADDR).is_err(), "bit {bit}");
            block[bit / 8] ^= 1 << (bit % 8);
        }
        assert!(Superblock::decode(&block, SUPERBLOCK_COPIES[0]).is_err());
    }

    #[test]
    fn a_newer_version_is_named_and_not_interpreted() {
        let mut block = encoded();
        block[8] = 9;
        block[56..136].fill(0xee);
        seal(&mut block[..SECTOR], Place::new(ADDR, 0), Kind::Superblock, SEED);
        let fault = SuperblockFault::Version { addr: ADDR, version: 9 };
        assert_eq!(Superblock::decode(&block, ADDR), Err(fault));
    }

    #[test]
    fn well_sealed_nonsense_is_refused() {
        for (offset, value) in [(56, 1), (64, 3), (72, 1), (96, 1), (112, 9), (136, 2)] {
            let mut block = encoded();
            block[offset] = value;
            seal(&mut block[..SECTOR], Place::new(ADDR, 0), Kind::Superblock, SEED);
            let result = Superblock::decode(&block, ADDR);
            assert!(matches!(result, Err(SuperblockFault::Damaged(_))), "byte {offset}");
        }
    }

    #[test]
    fn what_is_no_superblock_is_told_from_a_damaged_one() {
        let zero = Superblock::decode(&[0; BLOCK], ADDR);
        assert_eq!(zero, Err(SuperblockFault::Zero(ADDR)));
        let foreign = Superblock::decode(&[7; BLOCK], ADDR);
        assert_eq!(foreign, Err(SuperblockFault::Foreign(ADDR)));
    }
}
