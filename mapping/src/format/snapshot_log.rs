//! The snapshot log: a chain of blocks, newest first, of a volume's snapshots in order.
//!
//! A snapshot appends its entry to the newest block, or starts a new one that links back to it.
//! The volume record says how many entries there are: one that was written for a snapshot whose
//! record never became durable does not exist. Labels and delete marks change entries in place;
//! an entry lies in one sealed sector, so it is the old one or the new one.

use bessel_reactor::clock::WallTime;
use bessel_reactor::units::{BlockAddr, ByteCount};
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::lineage::Parent;
use super::name::{NAME_BYTES_MAX, decode_name, encode_name};
use super::seal::{BLOCK, Damage, Fault, Kind, Place, SEALED_PAYLOAD, SECTOR, Seal, seal, unseal};
use crate::request::VolumeId;

/// A snapshot log entry on the device.
///
/// | offset | size | field              | meaning                                                |
/// |-------:|-----:|--------------------|--------------------------------------------------------|
/// |      0 |    8 | `sequence`         | place in the log, from 0                               |
/// |      8 |    8 | `root`             | block of the snapshot's root node                      |
/// |     16 |    8 | `time`             | ns since 1970                                          |
/// |     24 |    8 | `size_bytes`       | size of the volume then                                |
/// |     32 |    8 | `blocks_allocated` | for the volume between the snapshot before it and it   |
/// |     40 |    1 | `height`           | levels of the tree, 3 or 4                             |
/// |     41 |    1 | `flags`            | bit 0 present, bit 1 deleted                           |
/// |     42 |    1 | `label_length`     | bytes of `label`, 0 for none                           |
/// |     43 |    1 | reserved           | 0                                                      |
/// |     44 |   64 | `label`            | UTF-8, zero-filled                                     |
/// |    108 |    8 | `parent`           | what its tree was derived from: see [`Parent`]         |
/// |    116 |   12 | reserved           | 0                                                      |
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct DiskEntry {
    sequence: U64,
    root: U64,
    time: U64,
    size_bytes: U64,
    blocks_allocated: U64,
    height: u8,
    flags: u8,
    label_length: u8,
    reserved_43: u8,
    label: [u8; NAME_BYTES_MAX],
    parent: U64,
    reserved_116: [u8; 12],
}

const FLAG_PRESENT: u8 = 1 << 0;
const FLAG_DELETED: u8 = 1 << 1;

const ENTRIES_PER_SECTOR: usize = 3;
/// Entries in a log block: 8 sectors × 3.
pub const LOG_ENTRIES_PER_BLOCK: usize = ENTRIES_PER_SECTOR * (BLOCK / SECTOR);

/// A log sector. Each of a block's eight carries the block's header, so each stands for itself.
///
/// | offset | size | field            | meaning                                                  |
/// |-------:|-----:|------------------|----------------------------------------------------------|
/// |      0 |  384 | `entries`        | three entries                                            |
/// |    384 |    8 | `previous`       | the log block before this one, 0 for none                |
/// |    392 |    8 | `volume`         | whose log this is                                        |
/// |    400 |    8 | `first_sequence` | of the block's first entry, a multiple of 24             |
/// |    408 |   88 | reserved         | 0                                                        |
/// |    496 |   16 | seal             |                                                          |
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct DiskSector {
    entries: [DiskEntry; ENTRIES_PER_SECTOR],
    previous: U64,
    volume: U64,
    first_sequence: U64,
    reserved: [u8; 88],
    seal: Seal,
}

const _: () = assert!(size_of::<DiskEntry>() == 128);
const _: () = assert!(size_of::<DiskSector>() == SECTOR);
const _: () = assert!(ENTRIES_PER_SECTOR * 128 + 24 + 88 == SEALED_PAYLOAD);
const _: () = assert!(LOG_ENTRIES_PER_BLOCK == 24);

/// A snapshot, as its volume's log has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogEntry {
    /// Place in the log, from 0.
    pub sequence: u64,
    /// Root node of its tree.
    pub root: BlockAddr,
    /// When it was taken.
    pub time: WallTime,
    /// Size of the volume then.
    pub size: ByteCount,
    /// Blocks allocated for the volume between the snapshot before it and it.
    pub blocks_allocated: u64,
    /// Levels of its tree, 3 or 4.
    pub height: u8,
    /// Marked deleted, awaiting the collector.
    pub deleted: bool,
    /// Its label, at most 64 bytes, never empty.
    pub label: Option<String>,
    /// What its tree was derived from.
    pub parent: Parent,
}

/// One block of a snapshot log, read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogBlock {
    /// The log block before this one.
    pub previous: Option<BlockAddr>,
    /// Its entries, in order.
    pub entries: Vec<LogEntry>,
}

/// Fills `out` with the log block of `volume` at `addr`. `entries` are its first entries, one to
/// 24, from `first_sequence` on; `previous` is none exactly in a log's first block.
///
/// # Panics
/// When `out` is not one block, or the arguments contradict each other.
pub fn encode_log_block(
    out: &mut [u8],
    addr: BlockAddr,
    previous: Option<BlockAddr>,
    volume: VolumeId,
    first_sequence: u64,
    entries: &[LogEntry],
    secret: u64,
) {
    assert_eq!(out.len(), BLOCK, "a log block is one block");
    assert!((1..=LOG_ENTRIES_PER_BLOCK).contains(&entries.len()), "{} entries", entries.len());
    assert!(first_sequence.is_multiple_of(LOG_ENTRIES_PER_BLOCK as u64));
    assert_eq!(previous.is_none(), first_sequence == 0, "only the first block links nowhere");
    out.fill(0);
    let mut entries = entries.iter().zip(first_sequence..);
    for (index, bytes) in out.chunks_exact_mut(SECTOR).enumerate() {
        let sector = DiskSector::mut_from_bytes(bytes).expect("the chunk is one sector");
        for (disk, (entry, sequence)) in sector.entries.iter_mut().zip(entries.by_ref()) {
            assert_eq!(entry.sequence, sequence, "entries lie in order, without gaps");
            *disk = encode_entry(entry);
        }
        sector.previous = previous.map_or(0, BlockAddr::get).into();
        sector.volume = volume.0.into();
        sector.first_sequence = first_sequence.into();
        seal(bytes, Place::new(addr, index as u8), Kind::SnapshotLog, secret);
    }
}

fn encode_entry(entry: &LogEntry) -> DiskEntry {
    let label = entry.label.as_deref().unwrap_or_default();
    let (label_length, label) = encode_name(label);
    assert_eq!(entry.label.is_some(), label_length > 0, "a label is never empty");
    DiskEntry {
        sequence: entry.sequence.into(),
        root: entry.root.get().into(),
        time: entry.time.as_unix_nanos().into(),
        size_bytes: entry.size.get().into(),
        blocks_allocated: entry.blocks_allocated.into(),
        height: entry.height,
        flags: FLAG_PRESENT | if entry.deleted { FLAG_DELETED } else { 0 },
        label_length,
        label,
        parent: entry.parent.encode().into(),
        ..DiskEntry::new_zeroed()
    }
}

/// Reads the log block of `volume` at `addr`, which holds `count` entries, one to 24, from
/// `first_sequence` on. Sectors past these entries are not looked at.
///
/// # Errors
/// The first sector that is damaged or belongs to another log, or another place in this one.
///
/// # Panics
/// When `bytes` is not one block, or the arguments contradict each other.
pub fn decode_log_block(
    bytes: &[u8],
    addr: BlockAddr,
    volume: VolumeId,
    first_sequence: u64,
    count: usize,
    secret: u64,
) -> Result<LogBlock, Damage> {
    assert_eq!(bytes.len(), BLOCK, "a log block is one block");
    assert!((1..=LOG_ENTRIES_PER_BLOCK).contains(&count), "{count} entries");
    assert!(first_sequence.is_multiple_of(LOG_ENTRIES_PER_BLOCK as u64));
    let mut block = LogBlock { previous: None, entries: Vec::with_capacity(count) };
    for (index, bytes) in
        bytes.chunks_exact(SECTOR).take(count.div_ceil(ENTRIES_PER_SECTOR)).enumerate()
    {
        let place = Place::new(addr, index as u8);
        let bad = |what| place.damage(Kind::SnapshotLog, Fault::Field(what));
        unseal(bytes, place, Kind::SnapshotLog, secret)?;
        let sector = DiskSector::ref_from_bytes(bytes).expect("the chunk is one sector");
        if sector.volume.get() != volume.0 {
            return Err(bad("the log belongs to another volume"));
        }
        if sector.first_sequence.get() != first_sequence {
            return Err(bad("the block belongs at another place in the log"));
        }
        let previous = Some(sector.previous.get()).filter(|&p| p != 0).map(BlockAddr::new);
        if previous.is_none() != (first_sequence == 0) || (index > 0 && previous != block.previous)
        {
            return Err(bad("the link to the block before is wrong"));
        }
        block.previous = previous;
        let here = (count - index * ENTRIES_PER_SECTOR).min(ENTRIES_PER_SECTOR);
        for disk in &sector.entries[..here] {
            let sequence = first_sequence + block.entries.len() as u64;
            block.entries.push(decode_entry(disk, sequence).map_err(bad)?);
        }
    }
    Ok(block)
}

fn decode_entry(disk: &DiskEntry, sequence: u64) -> Result<LogEntry, &'static str> {
    if disk.flags & FLAG_PRESENT == 0 || disk.flags & !(FLAG_PRESENT | FLAG_DELETED) != 0 {
        return Err("an entry is missing or has unknown flags");
    }
    if disk.sequence.get() != sequence {
        return Err("an entry is out of order");
    }
    if !matches!(disk.height, 3 | 4) || disk.root.get() == 0 {
        return Err("an entry has no tree");
    }
    let label = decode_name(disk.label_length, &disk.label).ok_or("a label is no text")?;
    let parent = Parent::decode(disk.parent.get(), sequence)
        .ok_or("an entry was derived from one that came after it")?;
    Ok(LogEntry {
        sequence,
        root: BlockAddr::new(disk.root.get()),
        time: WallTime::from_unix_nanos(disk.time.get()),
        size: ByteCount::new(disk.size_bytes.get()),
        blocks_allocated: disk.blocks_allocated.get(),
        height: disk.height,
        deleted: disk.flags & FLAG_DELETED != 0,
        label: Some(label).filter(|label| !label.is_empty()).map(str::to_owned),
        parent,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDR: BlockAddr = BlockAddr::new(600);
    const PREVIOUS: Option<BlockAddr> = Some(BlockAddr::new(599));
    const VOLUME: VolumeId = VolumeId(5);
    const SECRET: u64 = 31;

    fn entries(count: u64) -> Vec<LogEntry> {
        (24..24 + count)
            .map(|sequence| LogEntry {
                sequence,
                root: BlockAddr::new(1000 + sequence),
                time: WallTime::from_unix_nanos(sequence << 30),
                size: ByteCount::new(1 << 30),
                blocks_allocated: sequence * 3,
                height: 3,
                deleted: sequence % 2 == 0,
                label: (sequence % 3 == 0).then(|| format!("nightly-{sequence}")),
                parent: match sequence % 5 {
                    0 => Parent::Unknown,
                    1 => Parent::Origin,
                    back => Parent::Snapshot(sequence - back),
                },
            })
            .collect()
    }

    fn encoded(count: u64) -> [u8; BLOCK] {
        let mut block = [0xff; BLOCK];
        encode_log_block(&mut block, ADDR, PREVIOUS, VOLUME, 24, &entries(count), SECRET);
        block
    }

    fn decode(bytes: &[u8], count: usize) -> Result<LogBlock, Damage> {
        decode_log_block(bytes, ADDR, VOLUME, 24, count, SECRET)
    }

    #[test]
    fn a_block_comes_back_and_any_damage_is_found() {
        let mut block = encoded(24);
        let good = LogBlock { previous: PREVIOUS, entries: entries(24) };
        assert_eq!(decode(&block, 24), Ok(good));
        for byte in 0..BLOCK {
            block[byte] ^= 0x80;
            let damage = decode(&block, 24).unwrap_err();
            assert_eq!(usize::from(damage.sector), byte / SECTOR);
            block[byte] ^= 0x80;
        }
    }

    #[test]
    fn entries_past_the_count_do_not_exist() {
        let block = encoded(5);
        assert_eq!(decode(&block, 4).unwrap().entries, entries(4));
        assert_eq!(decode(&block, 5).unwrap().entries, entries(5));
        let missing = Fault::Field("an entry is missing or has unknown flags");
        assert_eq!(decode(&block, 6).unwrap_err().fault, missing);
    }

    #[test]
    fn a_torn_append_leaves_the_older_entries() {
        let (old, new) = (encoded(4), encoded(7));
        for kept in 0..256u32 {
            let mut torn = old;
            for sector in (0..8).filter(|sector| kept >> sector & 1 != 0) {
                let range = sector * SECTOR..(sector + 1) * SECTOR;
                torn[range.clone()].copy_from_slice(&new[range]);
            }
            assert_eq!(decode(&torn, 4).unwrap().entries, entries(4), "sectors {kept:08b}");
        }
    }

    #[test]
    fn a_block_of_another_log_or_place_is_refused() {
        let block = encoded(24);
        let read = |addr, volume, first| decode_log_block(&block, addr, volume, first, 24, SECRET);
        assert!(read(ADDR, VOLUME, 24).is_ok());
        assert!(read(ADDR.add(1), VOLUME, 24).is_err());
        assert!(read(ADDR, VolumeId(6), 24).is_err());
        assert!(read(ADDR, VOLUME, 48).is_err());
    }

    /// A sector with a good seal is still checked.
    #[test]
    fn an_entry_that_was_derived_from_a_later_one_is_refused() {
        let mut bad = entries(1);
        bad[0].parent = Parent::Snapshot(24);
        let mut block = [0; BLOCK];
        encode_log_block(&mut block, ADDR, PREVIOUS, VOLUME, 24, &bad, SECRET);
        let ahead = Fault::Field("an entry was derived from one that came after it");
        assert_eq!(decode(&block, 1).unwrap_err().fault, ahead);
    }
}
