//! The volume record: the one sector that makes a volume exist and says where its tree starts.
//!
//! A record is written when a volume is made or changed and at every snapshot, into the slot that
//! the current record does not occupy, after everything it names is durable.

use bessel_reactor::clock::WallTime;
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr, ByteCount, SECTOR_SIZE};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::lineage::Parent;
use super::name::{NAME_BYTES_MAX, check_name, decode_name, encode_name};
use super::node::tree_blocks;
use super::seal::{BLOCK, Damage, Fault, Kind, Place, SECTOR, Seal, seal, unseal};
use super::slots::Slot;
use crate::request::{CacheMode, SnapshotId, VolumeId};

/// Smallest volume: one block.
pub const VOLUME_SIZE_MIN: ByteCount = ByteCount::new(BLOCK_SIZE);
/// Largest volume: 256 TiB, what a tree of four levels maps.
pub const VOLUME_SIZE_MAX: ByteCount = ByteCount::from_blocks(tree_blocks(4));

/// A volume record on the device.
///
/// | offset | size | field              | meaning                                                |
/// |-------:|-----:|--------------------|--------------------------------------------------------|
/// |      0 |    8 | `generation`       | counts writes of this record; slot = its parity        |
/// |      8 |    8 | `id`               | identity, never reused                                 |
/// |     16 |    4 | `flags`            | bit 0 deleted, bit 1 has an origin, bit 2 the guest chose `cache` |
/// |     20 |    1 | `height`           | levels of the tree, 3 or 4                             |
/// |     21 |    1 | `cache`            | 0 writeback, 1 writethrough                            |
/// |     22 |    2 | `owner_host`       | the host that may write the volume                     |
/// |     24 |    8 | `size_bytes`       | a multiple of 512, 4096 to 256 TiB                     |
/// |     32 |    8 | `root`             | block of the tree's root node                          |
/// |     40 |    8 | `log_tail`         | block of the newest snapshot log block, 0 for none     |
/// |     48 |    8 | `log_count`        | entries in the log                                     |
/// |     56 |    8 | `origin_volume`    | with flag bit 1: the snapshot it was cloned from       |
/// |     64 |    8 | `origin_sequence`  | its place in that volume's log                         |
/// |     72 |    8 | `created`          | ns since 1970                                          |
/// |     80 |    8 | `owner_epoch`      | that host's epoch                                      |
/// |     88 |    8 | `blocks_allocated` | for the volume since its newest snapshot               |
/// |     96 |    1 | `name_length`      | bytes of `name`                                        |
/// |     97 |   64 | `name`             | see [`check_name`], zero-filled                        |
/// |    161 |    8 | `parent`           | what the current tree was derived from: see [`Parent`] |
/// |    169 |  327 | reserved           | 0                                                      |
/// |    496 |   16 | seal               |                                                        |
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct DiskVolume {
    generation: U64,
    id: U64,
    flags: U32,
    height: u8,
    cache: u8,
    owner_host: U16,
    size_bytes: U64,
    root: U64,
    log_tail: U64,
    log_count: U64,
    origin_volume: U64,
    origin_sequence: U64,
    created: U64,
    owner_epoch: U64,
    blocks_allocated: U64,
    name_length: u8,
    name: [u8; NAME_BYTES_MAX],
    parent: U64,
    reserved_169: [u8; 327],
    seal: Seal,
}

const _: () = assert!(size_of::<DiskVolume>() == SECTOR);

/// Counters are counted up from what is read, so what is read must leave room.
const COUNT_MAX: u64 = 1 << 62;

const FLAG_DELETED: u32 = 1 << 0;
const FLAG_ORIGIN: u32 = 1 << 1;
const FLAG_GUEST_CACHE: u32 = 1 << 2;

/// A volume, as the registry has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeRecord {
    /// Counts writes of this record. The next write has this plus one, and its slot.
    pub generation: u64,
    /// Identity, never reused.
    pub id: VolumeId,
    /// Marked deleted, awaiting the collector.
    pub deleted: bool,
    /// A multiple of a sector, [`VOLUME_SIZE_MIN`] to [`VOLUME_SIZE_MAX`].
    pub size: ByteCount,
    /// Levels of the tree, 3 or 4; they reach `size`.
    pub height: u8,
    /// When a write counts as done.
    pub cache: CacheMode,
    /// The guest chose that, not the operator.
    pub cache_by_guest: bool,
    /// Root node of the current tree.
    pub root: BlockAddr,
    /// Newest block of the snapshot log; none exactly when `log_count` is 0.
    pub log_tail: Option<BlockAddr>,
    /// Entries in the log. What the log's blocks hold past them does not exist.
    pub log_count: u64,
    /// The snapshot it was cloned from.
    pub origin: Option<SnapshotId>,
    /// When it was made.
    pub created: WallTime,
    /// The host that may write the volume.
    pub owner_host: u16,
    /// That host's epoch.
    pub owner_epoch: u64,
    /// Blocks allocated for the volume since its newest snapshot.
    pub blocks_allocated: u64,
    /// Its name; see [`check_name`].
    pub name: String,
    /// What its current tree was derived from.
    pub parent: Parent,
}

impl VolumeRecord {
    /// The sector to write to the start of block `place`, which is the slot of `generation`.
    ///
    /// # Panics
    /// When a field is outside what its documentation allows.
    pub fn encode(&self, place: BlockAddr, secret: u64) -> [u8; SECTOR] {
        if let Some(what) = self.fault() {
            panic!("volume {} would be written with a bad record: {what}", self.id);
        }
        let (name_length, name) = encode_name(&self.name);
        let flag = |set, flag| if set { flag } else { 0 };
        let disk = DiskVolume {
            generation: self.generation.into(),
            id: self.id.0.into(),
            flags: (flag(self.deleted, FLAG_DELETED)
                | flag(self.origin.is_some(), FLAG_ORIGIN)
                | flag(self.cache_by_guest, FLAG_GUEST_CACHE))
            .into(),
            height: self.height,
            cache: match self.cache {
                CacheMode::Writeback => 0,
                CacheMode::Writethrough => 1,
            },
            owner_host: self.owner_host.into(),
            size_bytes: self.size.get().into(),
            root: self.root.get().into(),
            log_tail: self.log_tail.map_or(0, BlockAddr::get).into(),
            log_count: self.log_count.into(),
            origin_volume: self.origin.map_or(0, |origin| origin.volume.0).into(),
            origin_sequence: self.origin.map_or(0, |origin| origin.sequence).into(),
            created: self.created.as_unix_nanos().into(),
            owner_epoch: self.owner_epoch.into(),
            blocks_allocated: self.blocks_allocated.into(),
            name_length,
            name,
            parent: self.parent.encode().into(),
            ..DiskVolume::new_zeroed()
        };
        let mut bytes = [0; SECTOR];
        bytes.copy_from_slice(disk.as_bytes());
        seal(&mut bytes, Place::new(place, 0), Kind::Volume, secret);
        bytes
    }

    /// [`VolumeRecord::encode`], as the whole block: the sector, then zeroes.
    ///
    /// # Panics
    /// As `encode`, and when `out` is not one block.
    pub fn encode_block(&self, out: &mut [u8], place: BlockAddr, secret: u64) {
        assert_eq!(out.len(), BLOCK, "a slot is one block");
        out[..SECTOR].copy_from_slice(&self.encode(place, secret));
        out[SECTOR..].fill(0);
    }

    /// Reads the slot at block `place`.
    ///
    /// # Panics
    /// When `bytes` is not one block.
    pub fn decode_slot(bytes: &[u8], place: BlockAddr, secret: u64) -> Slot<Self> {
        Slot::read(bytes, place, |sector, place| Self::decode(sector, place, secret))
    }

    /// Reads the record in the first sector of block `place`.
    ///
    /// # Errors
    /// What is wrong with it.
    ///
    /// # Panics
    /// When `bytes` is shorter than a sector.
    pub fn decode(bytes: &[u8], place: BlockAddr, secret: u64) -> Result<Self, Damage> {
        let (bytes, place) = (&bytes[..SECTOR], Place::new(place, 0));
        unseal(bytes, place, Kind::Volume, secret)?;
        let disk = DiskVolume::ref_from_bytes(bytes).expect("a record is one sector");
        let bad = |what| place.damage(Kind::Volume, Fault::Field(what));
        let flags = disk.flags.get();
        if flags & !(FLAG_DELETED | FLAG_ORIGIN | FLAG_GUEST_CACHE) != 0 {
            return Err(bad("unknown flags"));
        }
        let record = Self {
            generation: disk.generation.get(),
            id: VolumeId(disk.id.get()),
            deleted: flags & FLAG_DELETED != 0,
            cache_by_guest: flags & FLAG_GUEST_CACHE != 0,
            size: ByteCount::new(disk.size_bytes.get()),
            height: disk.height,
            cache: match disk.cache {
                0 => CacheMode::Writeback,
                1 => CacheMode::Writethrough,
                _ => return Err(bad("unknown cache mode")),
            },
            root: BlockAddr::new(disk.root.get()),
            log_tail: Some(disk.log_tail.get()).filter(|&tail| tail != 0).map(BlockAddr::new),
            log_count: disk.log_count.get(),
            origin: (flags & FLAG_ORIGIN != 0).then(|| SnapshotId {
                volume: VolumeId(disk.origin_volume.get()),
                sequence: disk.origin_sequence.get(),
            }),
            created: WallTime::from_unix_nanos(disk.created.get()),
            owner_host: disk.owner_host.get(),
            owner_epoch: disk.owner_epoch.get(),
            blocks_allocated: disk.blocks_allocated.get(),
            name: decode_name(disk.name_length, &disk.name)
                .ok_or(bad("the name is no text"))?
                .to_owned(),
            parent: Parent::decode(disk.parent.get(), disk.log_count.get())
                .ok_or(bad("its tree was derived from a snapshot that is not in its log"))?,
        };
        match record.fault() {
            None => Ok(record),
            Some(what) => Err(bad(what)),
        }
    }

    /// Whether what is left of a damaged slot still says that it held the record before this one.
    ///
    /// # Panics
    /// When `remains` are fewer than 16 bytes.
    pub fn follows(&self, remains: &[u8]) -> bool {
        let number = |at: usize| {
            let bytes = remains[at..at + 8].try_into().expect("the range is eight bytes");
            u64::from_le_bytes(bytes)
        };
        number(0).checked_add(1) == Some(self.generation) && number(8) == self.id.0
    }

    /// The rule a record breaks, if it does. Checked before bytes leave and after they return.
    fn fault(&self) -> Option<&'static str> {
        let size = self.size.get();
        if !(VOLUME_SIZE_MIN..=VOLUME_SIZE_MAX).contains(&self.size)
            || !size.is_multiple_of(SECTOR_SIZE)
        {
            return Some("the size is no multiple of 512 from 4096 to 256TiB");
        }
        if !matches!(self.height, 3 | 4) || self.size.blocks_ceil() > tree_blocks(self.height) {
            return Some("the tree's height does not fit the size");
        }
        if self.log_tail.is_some() != (self.log_count > 0) {
            return Some("the log's tail and count disagree");
        }
        if self.generation.max(self.blocks_allocated) > COUNT_MAX {
            return Some("a counter is larger than counting ever makes it");
        }
        if self.root.get() == 0 {
            return Some("there is no root");
        }
        if matches!(self.parent, Parent::Snapshot(sequence) if sequence >= self.log_count) {
            return Some("its tree was derived from a snapshot that is not in its log");
        }
        if check_name(&self.name).is_err() {
            return Some("the name is not one a volume can have");
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDR: BlockAddr = BlockAddr::new(101);
    const SECRET: u64 = 0xdead_beef_0000_0001;

    fn sample() -> VolumeRecord {
        VolumeRecord {
            generation: 7,
            id: VolumeId(3),
            deleted: false,
            size: ByteCount::new(4 << 30),
            height: 3,
            cache: CacheMode::Writethrough,
            cache_by_guest: false,
            root: BlockAddr::new(0xabc_def0_1234),
            log_tail: Some(BlockAddr::new(777)),
            log_count: 25,
            origin: Some(SnapshotId { volume: VolumeId(1), sequence: 0 }),
            created: WallTime::from_unix_nanos(1_700_000_000_000_000_000),
            owner_host: 0,
            owner_epoch: 12,
            blocks_allocated: 99,
            name: "vm1.root".into(),
            parent: Parent::Snapshot(24),
        }
    }

    fn change(edit: impl FnOnce(&mut VolumeRecord)) -> VolumeRecord {
        let mut record = sample();
        edit(&mut record);
        record
    }

    #[test]
    fn records_come_back() {
        let records = [
            sample(),
            change(|r| r.origin = None),
            change(|r| r.deleted = true),
            change(|r| r.cache_by_guest = true),
            change(|r| r.cache = CacheMode::Writeback),
            change(|r| (r.log_tail, r.log_count, r.parent) = (None, 0, Parent::Origin)),
            change(|r| r.parent = Parent::Unknown),
            change(|r| r.name = "x".repeat(64)),
            change(|r| (r.size, r.height) = (VOLUME_SIZE_MAX, 4)),
        ];
        for record in records {
            let bytes = record.encode(ADDR, SECRET);
            assert_eq!(VolumeRecord::decode(&bytes, ADDR, SECRET), Ok(record));
        }
    }

    #[test]
    fn any_damage_and_any_other_place_is_found() {
        let mut bytes = sample().encode(ADDR, SECRET);
        for bit in 0..SECTOR * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(VolumeRecord::decode(&bytes, ADDR, SECRET).is_err(), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        assert!(VolumeRecord::decode(&bytes, ADDR.add(1), SECRET).is_err());
        assert!(VolumeRecord::decode(&bytes, ADDR, SECRET + 2).is_err());
    }

    /// A sector with a good seal is still checked: it may come from a newer or a broken writer.
    #[test]
    fn well_sealed_nonsense_is_refused() {
        let refuse = |offset: usize, value: u8| {
            let mut bytes = sample().encode(ADDR, SECRET);
            bytes[offset] = value;
            seal(&mut bytes, Place::new(ADDR, 0), Kind::Volume, SECRET);
            let damage = VolumeRecord::decode(&bytes, ADDR, SECRET).unwrap_err();
            assert!(matches!(damage.fault, Fault::Field(_)), "byte {offset}: {damage}");
        };
        refuse(16, 8); // An unknown flag.
        refuse(20, 5); // Height.
        refuse(21, 2); // Cache mode.
        refuse(24, 1); // Size, no multiple of 512.
        refuse(30, 1); // Size, past what three levels reach.
        refuse(48, 0); // A tail without entries.
        refuse(7, 0x40); // Generation.
        refuse(95, 0x40); // Blocks allocated.
        refuse(96, 65); // Name length.
        refuse(96, 0); // No name.
        refuse(97, b'/'); // A name no volume can have.
        refuse(161, 27); // Derived from snapshot 25 of 25.
    }

    #[test]
    #[should_panic(expected = "would be written with a bad record")]
    fn a_bad_record_does_not_leave() {
        change(|r| r.log_tail = None).encode(ADDR, SECRET);
    }
}
