//! The extent catalogue: what each extent holds, and which host allocates from it.
//!
//! Written when an extent is initialised, after its bitmap is durable; read whole at open.

use bessel_reactor::units::BlockAddr;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::extents::ExtentType;
use super::seal::{BLOCK, Damage, Fault, Kind, Place, SEALED_PAYLOAD, SECTOR, Seal, seal, unseal};

/// One extent on the device.
///
/// | offset | size | field         | meaning                                        |
/// |-------:|-----:|---------------|------------------------------------------------|
/// |      0 |    1 | `kind`        | [`ExtentType`]; 0 past the last extent         |
/// |      1 |    1 | reserved      | 0                                              |
/// |      2 |    2 | `owner_host`  | the host that allocates from it                |
/// |      4 |    4 | reserved      | 0                                              |
/// |      8 |    8 | `owner_epoch` | that host's epoch when it took the extent      |
/// |     16 |   16 | reserved      | 0                                              |
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct DiskEntry {
    kind: u8,
    reserved_1: u8,
    owner_host: U16,
    reserved_4: U32,
    owner_epoch: U64,
    reserved_16: [u8; 16],
}

/// Entries in a sector of the catalogue, which stands for itself.
pub const CATALOGUE_ENTRIES_PER_SECTOR: usize = ENTRIES_PER_SECTOR;
const ENTRIES_PER_SECTOR: usize = 15;
/// Extents that one catalogue block describes: 8 sectors × 15.
pub const CATALOGUE_ENTRIES_PER_BLOCK: usize = ENTRIES_PER_SECTOR * (BLOCK / SECTOR);

/// A catalogue sector: 15 entries, 16 bytes of zero, the seal.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct DiskSector {
    entries: [DiskEntry; ENTRIES_PER_SECTOR],
    reserved: [u8; 16],
    seal: Seal,
}

const _: () = assert!(size_of::<DiskEntry>() == 32);
const _: () = assert!(size_of::<DiskSector>() == SECTOR);
const _: () = assert!(ENTRIES_PER_SECTOR * 32 + 16 == SEALED_PAYLOAD);
const _: () = assert!(CATALOGUE_ENTRIES_PER_BLOCK == 120);

/// One extent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CatalogueEntry {
    /// What it holds; never invalid for an extent there is.
    pub kind: ExtentType,
    /// The host that allocates from it.
    pub owner_host: u16,
    /// That host's epoch when it took the extent.
    pub owner_epoch: u64,
}

impl CatalogueEntry {
    /// An extent that nobody has initialised.
    pub const UNUSED: Self = Self { kind: ExtentType::Unused, owner_host: 0, owner_epoch: 0 };
}

/// Fills `out` with the catalogue block at `addr`, which describes up to 120 extents from
/// `first_extent` on. `entries` are these extents; fewer than 120 only at the end of the store.
///
/// # Panics
/// When `out` is not one block or `entries` do not fit it.
pub fn encode_catalogue_block(
    out: &mut [u8],
    addr: BlockAddr,
    first_extent: u64,
    entries: &[CatalogueEntry],
    secret: u64,
) {
    assert_eq!(out.len(), BLOCK, "a catalogue block is one block");
    assert!(entries.len() <= CATALOGUE_ENTRIES_PER_BLOCK, "{} entries", entries.len());
    assert!(first_extent.is_multiple_of(CATALOGUE_ENTRIES_PER_BLOCK as u64));
    out.fill(0);
    let mut entries = entries.iter();
    for (index, bytes) in out.chunks_exact_mut(SECTOR).enumerate() {
        let sector = DiskSector::mut_from_bytes(bytes).expect("the chunk is one sector");
        for (disk, entry) in sector.entries.iter_mut().zip(entries.by_ref()) {
            assert_ne!(entry.kind, ExtentType::Invalid, "an extent there is has a type");
            disk.kind = entry.kind as u8;
            disk.owner_host = entry.owner_host.into();
            disk.owner_epoch = entry.owner_epoch.into();
        }
        seal(bytes, Place::new(addr, index as u8), Kind::Catalogue, secret);
    }
}

/// Reads the catalogue block at `addr`: appends the entries of its extents, of which the store has
/// `count`, to `entries`.
///
/// # Errors
/// The first damaged sector.
///
/// # Panics
/// When `bytes` is not one block or `count` is more than 120.
pub fn decode_catalogue_block(
    bytes: &[u8],
    addr: BlockAddr,
    count: usize,
    secret: u64,
    entries: &mut Vec<CatalogueEntry>,
) -> Result<(), Damage> {
    assert_eq!(bytes.len(), BLOCK, "a catalogue block is one block");
    assert!(count <= CATALOGUE_ENTRIES_PER_BLOCK, "{count} entries");
    for (index, bytes) in bytes.chunks_exact(SECTOR).enumerate() {
        let here = count.saturating_sub(index * ENTRIES_PER_SECTOR).min(ENTRIES_PER_SECTOR);
        decode_catalogue_sector(bytes, addr, index as u8, here, secret, entries)?;
    }
    Ok(())
}

/// Reads sector `index` of the catalogue block at `addr`: appends its first `count` entries to
/// `entries`, or nothing.
///
/// # Errors
/// What is wrong with it.
///
/// # Panics
/// When `bytes` is not one sector or `count` is more than 15.
pub fn decode_catalogue_sector(
    bytes: &[u8],
    addr: BlockAddr,
    index: u8,
    count: usize,
    secret: u64,
    entries: &mut Vec<CatalogueEntry>,
) -> Result<(), Damage> {
    let place = Place::new(addr, index);
    unseal(bytes, place, Kind::Catalogue, secret)?;
    let sector = DiskSector::ref_from_bytes(bytes).expect("the chunk is one sector");
    let known = |number| ExtentType::from_number(number).filter(|&k| k != ExtentType::Invalid);
    if !sector.entries[..count].iter().all(|disk| known(disk.kind).is_some()) {
        return Err(place.damage(Kind::Catalogue, Fault::Field("an extent has an unknown type")));
    }
    entries.extend(sector.entries[..count].iter().map(|disk| CatalogueEntry {
        kind: known(disk.kind).expect("checked above"),
        owner_host: disk.owner_host.get(),
        owner_epoch: disk.owner_epoch.get(),
    }));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDR: BlockAddr = BlockAddr::new(97);
    const SECRET: u64 = 4711;

    fn sample() -> Vec<CatalogueEntry> {
        (0..50)
            .map(|i| CatalogueEntry {
                kind: if i % 2 == 0 { ExtentType::Data } else { ExtentType::Metadata },
                owner_host: i,
                owner_epoch: u64::from(i) << 40,
            })
            .collect()
    }

    fn decode(bytes: &[u8], addr: BlockAddr) -> Result<Vec<CatalogueEntry>, Damage> {
        let mut entries = Vec::new();
        decode_catalogue_block(bytes, addr, 50, SECRET, &mut entries).map(|()| entries)
    }

    #[test]
    fn a_block_comes_back_and_any_damage_is_found() {
        let mut block = [0xff; BLOCK];
        encode_catalogue_block(&mut block, ADDR, 120, &sample(), SECRET);
        assert_eq!(decode(&block, ADDR), Ok(sample()));
        assert_eq!(block[SECTOR..SECTOR + 4], [4, 0, 15, 0], "extent 15 opens sector 1");
        for byte in 0..BLOCK {
            block[byte] ^= 1;
            let damage = decode(&block, ADDR).unwrap_err();
            assert_eq!(usize::from(damage.sector), byte / SECTOR);
            block[byte] ^= 1;
        }
        assert!(decode(&block, ADDR.add(1)).is_err());
    }

    #[test]
    fn an_extent_without_a_type_is_damage() {
        let mut block = [0; BLOCK];
        encode_catalogue_block(&mut block, ADDR, 0, &sample()[..49], SECRET);
        let damage = decode(&block, ADDR).unwrap_err();
        assert_eq!(damage.fault, Fault::Field("an extent has an unknown type"));
    }
}
