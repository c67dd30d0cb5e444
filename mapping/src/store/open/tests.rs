//! Refusals, repairs and isolation, on a small store that is damaged behind its back.

use super::*;
use crate::format::{LogEntry, Parent, encode_catalogue_block, encode_log_block};
use crate::request::{CacheMode, VolumeId};
use crate::snapshot_log::{NotHere, SnapshotLog};
use crate::store::read_log;
use crate::store::testing::{NOW, READ_WRITE, SECRET, disk, formatted};
use bessel_reactor::device::sim::{Fault, Keep, OpKind, SimDisk};

fn open_it(disk: &SimDisk) -> Result<OpenedStore, OpenError> {
    open(&mut disk.connect(), READ_WRITE)
}

/// Opening it is refused, and writes nothing.
fn refused(disk: &SimDisk) -> OpenError {
    let writes = disk.counters().writes;
    let error = open_it(disk).unwrap_err();
    assert_eq!(disk.counters().writes, writes, "{error}");
    error
}

fn geometry() -> Geometry {
    Geometry::plan(ByteCount::new(8 << 20), None).unwrap()
}

fn superblock(edit: impl FnOnce(&mut Superblock)) -> Superblock {
    let disk = formatted(8 << 20);
    let mut superblock =
        Superblock::decode(&disk.peek(BlockAddr::new(0)), BlockAddr::new(0)).unwrap();
    edit(&mut superblock);
    superblock
}

fn poke_superblock(disk: &SimDisk, superblock: &Superblock, copies: &[BlockAddr]) {
    for &copy in copies {
        poke(disk, copy, |block| superblock.encode_block(block, copy));
    }
}

fn poke(disk: &SimDisk, addr: BlockAddr, fill: impl FnOnce(&mut [u8; BLOCK])) {
    let mut block = disk.peek(addr);
    fill(&mut block);
    disk.poke(addr, &block);
}

/// A formatted store whose extent 1 is metadata, with an empty bitmap.
fn with_metadata() -> SimDisk {
    let disk = formatted(8 << 20);
    let geometry = geometry();
    let mut entries = vec![CatalogueEntry::UNUSED; 8];
    entries[0].kind = ExtentType::System;
    entries[1].kind = ExtentType::Metadata;
    let (addr, first) = geometry.catalogue_block_of(1);
    poke(&disk, addr, |block| encode_catalogue_block(block, addr, first, &entries, SECRET));
    let addr = geometry.bitmap_block(1, 0);
    poke(&disk, addr, |block| geometry.fresh_bitmap(0).encode(block, addr, SECRET));
    disk
}

fn record(id: u64, name: &str) -> VolumeRecord {
    VolumeRecord {
        generation: 1,
        id: VolumeId(id),
        deleted: false,
        size: ByteCount::new(1 << 30),
        height: 3,
        cache: CacheMode::Writeback,
        cache_by_guest: false,
        root: BlockAddr::new(257),
        log_tail: None,
        log_count: 0,
        origin: None,
        created: NOW,
        owner_host: 0,
        owner_epoch: 1,
        blocks_allocated: 0,
        name: name.to_owned(),
        parent: Parent::Origin,
    }
}

fn poke_record(disk: &SimDisk, slot: u32, record: &VolumeRecord) -> BlockAddr {
    let addr = geometry().registry_slot(slot, record.generation);
    poke(disk, addr, |block| record.encode_block(block, addr, SECRET));
    addr
}

fn log_entry(sequence: u64) -> LogEntry {
    LogEntry {
        sequence,
        root: BlockAddr::new(258),
        time: NOW,
        size: ByteCount::new(1 << 30),
        blocks_allocated: 3,
        height: 3,
        deleted: false,
        label: (sequence == 30).then(|| "thirty".to_owned()),
        parent: Parent::Unknown,
    }
}

/// Writes a log of `count` entries of volume `id`, its blocks at 300, 301, ...
fn poke_log(disk: &SimDisk, id: u64, count: u64) -> BlockAddr {
    let mut previous = None;
    for (first, addr) in (0..count).step_by(24).zip((300..).map(BlockAddr::new)) {
        let entries: Vec<_> = (first..count.min(first + 24)).map(log_entry).collect();
        poke(disk, addr, |block| {
            encode_log_block(block, addr, previous, VolumeId(id), first, &entries, SECRET);
        });
        previous = Some(addr);
    }
    previous.unwrap()
}

#[test]
fn each_life_has_an_epoch_and_an_orderly_one_ends_clean() {
    let disk = formatted(8 << 20);
    let first = open_it(&disk).unwrap();
    assert_eq!((first.epoch, first.was_clean), (1, true));
    disk.crash(Keep::Nothing);
    let second = open_it(&disk).unwrap();
    assert_eq!((second.epoch, second.was_clean), (2, false), "the epoch was durable");
    close(&mut disk.connect(), &second, second.host.as_ref().unwrap(), NOW).unwrap();
    disk.crash(Keep::Nothing);
    let third = open(&mut disk.connect(), OpenMode::ReadOnly).unwrap();
    assert_eq!((third.epoch, third.was_clean), (2, true));
}

#[test]
fn looking_writes_nothing() {
    let disk = with_metadata();
    poke(&disk, SUPERBLOCK_COPIES[2], |block| block[9] ^= 1);
    let writes = disk.counters().writes;
    let store = open(&mut disk.connect(), OpenMode::ReadOnly).unwrap();
    assert_eq!(store.findings.len(), 1);
    assert_eq!(disk.counters().writes, writes);
}

#[test]
fn a_blank_device_and_a_foreign_one_are_no_stores() {
    let blank = refused(&disk(8 << 20));
    assert!(matches!(blank, OpenError::NotAStore(Found::Blank)));
    let foreign = disk(8 << 20);
    poke(&foreign, BlockAddr::new(0), |block| block[..4].copy_from_slice(b"XFSB"));
    assert_eq!(
        refused(&foreign).to_string(),
        "the device holds an XFS file system, not a Bessel store; check the path, or make a store \
         with `bessel format`"
    );
    assert!(matches!(refused(&disk(4096)), OpenError::NotAStore(Found::Blank)));
}

#[test]
fn damaged_copies_are_named_and_renewed() {
    for bad in 0..4 {
        let disk = formatted(8 << 20);
        for (index, &copy) in SUPERBLOCK_COPIES.iter().enumerate().filter(|(i, _)| *i != bad) {
            let fill = |block: &mut [u8; BLOCK]| {
                if index % 2 == 0 { block[50] ^= 1 } else { block.fill(0) }
            };
            poke(&disk, copy, fill);
        }
        let store = open_it(&disk).unwrap();
        assert_eq!(store.findings.len(), 3);
        assert!(store.findings.iter().all(|finding| finding.severity == Severity::Warning));
        disk.crash(Keep::Nothing);
        assert!(open_it(&disk).unwrap().findings.is_empty(), "renewed, durably");
    }
    let disk = formatted(8 << 20);
    for copy in SUPERBLOCK_COPIES {
        poke(&disk, copy, |block| block[200] ^= 1);
    }
    assert!(matches!(refused(&disk), OpenError::Corrupt(_)));
}

#[test]
fn an_update_cut_short_between_the_halves_is_finished() {
    let newer = superblock(|superblock| {
        superblock.parent_checksum = superblock.checksum();
        superblock.sequence = 2;
        superblock.features_compatible = 1;
    });
    for half in [&SUPERBLOCK_COPIES[..2], &SUPERBLOCK_COPIES[..1], &SUPERBLOCK_COPIES[1..2]] {
        let disk = formatted(8 << 20);
        poke_superblock(&disk, &newer, half);
        assert_eq!(open_it(&disk).unwrap().superblock, newer);
        let again = open_it(&disk).unwrap();
        assert!(again.findings.is_empty());
        assert_eq!(again.superblock, newer);
    }
}

#[test]
fn copies_of_two_stores_are_not_mixed() {
    let disk = formatted(8 << 20);
    let other = superblock(|superblock| superblock.uuid[0] ^= 1);
    poke_superblock(&disk, &other, &SUPERBLOCK_COPIES[2..]);
    assert!(matches!(refused(&disk), OpenError::Corrupt(_)));
}

#[test]
fn features_decide_who_may_do_what() {
    let disk = formatted(8 << 20);
    poke_superblock(&disk, &superblock(|s| s.features_compatible = 1 << 9), &SUPERBLOCK_COPIES);
    assert!(open_it(&disk).is_ok());
    poke_superblock(&disk, &superblock(|s| s.features_read_only = 2), &SUPERBLOCK_COPIES);
    assert!(matches!(refused(&disk), OpenError::ReadOnlyFeatures { bits: 2 }));
    assert!(open(&mut disk.connect(), OpenMode::ReadOnly).is_ok());
    poke_superblock(&disk, &superblock(|s| s.features_incompatible = 4), &SUPERBLOCK_COPIES);
    assert!(matches!(refused(&disk), OpenError::UnknownFeatures { bits: 4 }));
    let read_only = open(&mut disk.connect(), OpenMode::ReadOnly);
    assert!(matches!(read_only, Err(OpenError::UnknownFeatures { bits: 4 })));
}

#[test]
fn a_truncated_device_is_refused_with_both_sizes() {
    let disk = formatted(8 << 20);
    let long = superblock(|s| {
        s.geometry = Geometry::plan(ByteCount::new(16 << 20), None).unwrap();
    });
    poke_superblock(&disk, &long, &SUPERBLOCK_COPIES);
    let error = refused(&disk);
    assert!(matches!(error, OpenError::Truncated { .. }));
    let text = error.to_string();
    assert!(text.contains("16MiB") && text.contains("8MiB"), "{text}");
}

#[test]
fn a_damaged_catalogue_refuses_the_store() {
    let disk = with_metadata();
    poke(&disk, geometry().catalogue_start, |block| block[3] ^= 1);
    assert!(matches!(refused(&disk), OpenError::Corrupt(_)));
}

#[test]
fn a_damaged_bitmap_offers_nothing() {
    let disk = with_metadata();
    assert_eq!(open_it(&disk).unwrap().bitmap_free.get(1, 0), 255);
    poke(&disk, geometry().bitmap_block(1, 0), |block| block[700] ^= 1);
    let store = open_it(&disk).unwrap();
    assert_eq!(store.bitmap_free.get(1, 0), 0);
    assert_eq!(store.findings[0].severity, Severity::Corrupt);
}

#[test]
fn volumes_come_back_with_their_logs() {
    let disk = with_metadata();
    poke_record(&disk, 0, &record(1, "one"));
    let tail = poke_log(&disk, 2, 50);
    let two =
        VolumeRecord { log_tail: Some(tail), log_count: 50, generation: 4, ..record(2, "two") };
    poke_record(&disk, 3, &VolumeRecord { generation: 3, name: "older".into(), ..record(2, "x") });
    poke_record(&disk, 3, &two);
    let store = open_it(&disk).unwrap();
    assert_eq!(store.faults, Vec::new());
    let entry = store.directory.entry(VolumeId(2)).unwrap();
    assert_eq!((entry.slot, &entry.record), (3, &two));
    let tail = entry.tail.as_ref().unwrap();
    assert_eq!(tail.entries, [48, 49].map(log_entry));
    assert_eq!((tail.addr, tail.previous), (BlockAddr::new(302), Some(BlockAddr::new(301))));
    let whole = read_log(&mut disk.connect(), &store, &two);
    assert_eq!(whole.entries, (0..50).map(log_entry).collect::<Vec<_>>());
    assert_eq!(whole.blocks, [300, 301, 302].map(BlockAddr::new));
    assert_eq!(whole.fault, None);
    assert_eq!(store.directory.find("one").unwrap().id, VolumeId(1));
}

/// A store with a log of `count` entries, and that log.
fn with_log(count: u64) -> (SimDisk, VolumeRecord) {
    let disk = with_metadata();
    let record = VolumeRecord {
        log_tail: (count > 0).then(|| poke_log(&disk, 1, count)),
        log_count: count,
        ..record(1, "vm")
    };
    poke_record(&disk, 0, &record);
    (disk, record)
}

#[test]
fn opening_reads_as_much_of_a_long_log_as_of_a_short_one() {
    let reads = |count| {
        let (disk, _) = with_log(count);
        disk.trace();
        open_it(&disk).unwrap();
        let reads = disk.trace().into_iter().filter(|op| op.kind == OpKind::Read);
        reads.map(|op| op.length.get()).collect::<Vec<_>>()
    };
    let one = reads(1);
    for count in [24, 25, 4000] {
        assert_eq!(reads(count), one, "{count} snapshots");
    }
    assert_eq!(reads(0).len() + 1, one.len(), "the newest block of the log");
}

#[test]
fn the_log_of_a_deleted_volume_is_nothing_that_opening_needs() {
    let (disk, record) = with_log(50);
    let deleted = VolumeRecord { deleted: true, generation: 2, ..record };
    poke_record(&disk, 0, &deleted);
    for block in 300..303 {
        poke(&disk, BlockAddr::new(block), |block| block.fill(0x5a)); // Others' by now.
    }
    let store = open_it(&disk).unwrap();
    assert_eq!((store.faults.len(), store.findings.len()), (0, 0));
    assert!(store.directory.entry(VolumeId(1)).unwrap().tail.is_none());
    assert!(survey(&mut disk.connect()).unwrap().0.findings.is_empty());
}

/// Reads the rest of a log as whoever has the volume open does; returns the blocks it took.
fn load(disk: &SimDisk, store: &OpenedStore) -> (SnapshotLog, Vec<BlockAddr>) {
    let entry = store.directory.entry(VolumeId(1)).unwrap();
    let (mut log, mut read) = (SnapshotLog::begin(entry, &store.extents), Vec::new());
    while let Some(addr) = log.wanted() {
        read.push(addr);
        log.take(Ok(&disk.peek(addr)), SECRET, &store.extents);
    }
    (log, read)
}

/// Damage to an older block is found when that is read: the volume opens, has its newer snapshots, and
/// says of the others what, where and from which on.
#[test]
fn damage_to_an_old_log_block_costs_the_snapshots_up_to_it() {
    type Damaging = fn(&SimDisk);
    let damages: [(&str, u64, Damaging); 5] = [
        ("block 302", 72, |disk| poke(disk, BlockAddr::new(302), |block| block[40] ^= 1)),
        ("block 300, sector 0: the sector is all zero", 24, |disk| {
            poke(disk, BlockAddr::new(300), |block| block.fill(0));
        }),
        ("outside metadata", 72, |disk| {
            let entries: Vec<_> = (72..96).map(log_entry).collect();
            let previous = Some(BlockAddr::new(5));
            poke(disk, BlockAddr::new(303), |block| {
                let addr = BlockAddr::new(303);
                encode_log_block(block, addr, previous, VolumeId(1), 72, &entries, SECRET);
            });
        }),
        ("block 303, sector 0: the block belongs at another place", 72, |disk| {
            let entries: Vec<_> = (72..96).map(log_entry).collect();
            let addr = BlockAddr::new(303);
            poke(disk, addr, |block| {
                encode_log_block(block, addr, Some(addr), VolumeId(1), 72, &entries, SECRET);
            });
        }),
        ("block 99999, is not in a metadata", 48, |disk| {
            let mut entries: Vec<_> = (24..48).map(log_entry).collect();
            entries[7].root = BlockAddr::new(99999);
            let (addr, previous) = (BlockAddr::new(301), Some(BlockAddr::new(300)));
            poke(disk, addr, |block| {
                encode_log_block(block, addr, previous, VolumeId(1), 24, &entries, SECRET);
            });
        }),
    ];
    for (expected, from, damage) in damages {
        let (disk, _) = with_log(100);
        damage(&disk);
        let store = open_it(&disk).unwrap();
        assert_eq!((store.faults.len(), store.findings.len()), (0, 0), "{expected}");
        let (log, _) = load(&disk, &store);
        let state = log.state();
        let why = state.fault.expect("it is damaged");
        assert!(why.contains(expected), "{why} / {expected}");
        assert_eq!((state.taken, state.live, state.out_of_reach), (100, 100 - from, from));
        assert!(log.get(from).is_ok() && log.page(from, 10, true).is_ok());
        for refused in [
            log.get(from - 1).unwrap_err(),
            log.page(0, 10, true).unwrap_err(),
            log.by_label("no such").unwrap_err(),
            log.newest_at(NOW, u64::MAX).unwrap_err(),
        ] {
            let NotHere::Lost { before, why: told } = refused else { panic!("{refused:?}") };
            assert_eq!((before.sequence, &told), (from, &why));
        }
        let (surveyed, losses) = survey(&mut disk.connect()).unwrap();
        assert_eq!(surveyed.faults.len(), 0);
        let [finding] = &surveyed.findings[..] else { panic!("{:?}", surveyed.findings) };
        assert!(finding.to_string().contains(expected), "{finding}");
        assert!(finding.what.contains(&format!("before 1.{from}")), "{finding}");
        assert!(losses.hidden.is_some(), "what they hold is not free");
    }
}

#[test]
fn a_log_is_read_to_its_beginning_newest_first() {
    let (disk, _) = with_log(100);
    let (log, read) = load(&disk, &open_it(&disk).unwrap());
    assert_eq!(read, [303, 302, 301, 300].map(BlockAddr::new));
    let state = log.state();
    assert_eq!((state.live, state.out_of_reach, state.fault), (100, 0, None));
    assert_eq!(log.by_label("thirty"), Ok(Some(30)));
    assert_eq!(log.by_label("no such"), Ok(None));
    assert_eq!(log.get(100), Err(NotHere::None));
}

/// Each damage takes its own volume out and no other.
#[test]
fn a_damaged_volume_fails_alone() {
    type Damaging = fn(&SimDisk);
    let damages: [(&str, Damaging); 7] = [
        ("checksum", |disk| poke(disk, geometry().registry_slot(1, 1), |block| block[40] ^= 1)),
        ("checksum", |disk| poke(disk, BlockAddr::new(301), |block| block[40] ^= 1)),
        ("all zero", |disk| poke(disk, BlockAddr::new(301), |block| block.fill(0))),
        ("outside metadata", |disk| {
            let tail = Some(BlockAddr::new(5));
            poke_record(
                disk,
                1,
                &VolumeRecord { log_tail: tail, log_count: 30, ..record(2, "bad") },
            );
        }),
        ("another place in the log", |disk| {
            let tail = Some(BlockAddr::new(300));
            poke_record(
                disk,
                1,
                &VolumeRecord { log_tail: tail, log_count: 30, ..record(2, "bad") },
            );
        }),
        ("root, block 99999", |disk| {
            let root = BlockAddr::new(99999);
            poke_record(disk, 1, &VolumeRecord { root, ..record(2, "bad") });
        }),
        ("same name", |disk| {
            poke_record(disk, 1, &record(2, "good"));
        }),
    ];
    for (expected, damage) in damages {
        let disk = with_metadata();
        poke_record(&disk, 0, &record(1, "good"));
        let tail = Some(poke_log(&disk, 2, 30));
        poke_record(&disk, 1, &VolumeRecord { log_tail: tail, log_count: 30, ..record(2, "bad") });
        assert!(open_it(&disk).unwrap().faults.is_empty());
        damage(&disk);
        let mut store = open_it(&disk).unwrap();
        assert_eq!(store.faults.len(), 1, "{expected}");
        let fault = store.faults[0].to_string();
        assert!(fault.contains(expected), "{fault} / {expected}");
        assert!(store.directory.entry(VolumeId(1)).is_some());
        assert!(store.directory.entry(VolumeId(2)).is_none());
        let plan = store.directory.plan_create("new", ByteCount::new(4096), None, NOW).unwrap();
        assert_eq!((plan.registry_slot, plan.id), (2, VolumeId(3)), "{expected}");
    }
}

#[test]
fn one_bad_slot_of_a_pair_leaves_the_other() {
    let disk = with_metadata();
    poke_record(&disk, 0, &VolumeRecord { generation: 2, ..record(1, "older") });
    let newer = poke_record(&disk, 0, &VolumeRecord { generation: 3, ..record(1, "newer") });
    assert!(open_it(&disk).unwrap().directory.find("newer").is_some());
    poke(&disk, newer, |block| block[0] ^= 1);
    let store = open_it(&disk).unwrap();
    assert!(store.faults.is_empty() && store.directory.find("older").is_some());
    assert_eq!(store.findings[0].severity, Severity::Corrupt);
}

#[test]
fn a_slot_of_zeroes_beside_a_later_generation_has_lost_its_record() {
    let disk = with_metadata();
    poke_record(&disk, 0, &VolumeRecord { generation: 2, ..record(1, "vm") });
    let store = open_it(&disk).unwrap();
    assert!(store.faults.is_empty() && store.directory.find("vm").is_some());
    assert!(store.findings[0].what.contains("all zero"), "{:?}", store.findings);

    // What the host's lost record said of how the store was closed is not known.
    let disk = formatted(8 << 20);
    for _ in 0..2 {
        let store = open_it(&disk).unwrap();
        close(&mut disk.connect(), &store, store.host.as_ref().unwrap(), NOW).unwrap();
    }
    assert!(open(&mut disk.connect(), OpenMode::ReadOnly).unwrap().was_clean);
    poke(&disk, geometry().host_slot(0, 5), |block| block.fill(0));
    let store = open(&mut disk.connect(), OpenMode::ReadOnly).unwrap();
    assert!(!store.was_clean);
}

#[test]
fn an_epoch_is_not_used_twice_when_its_record_is_lost() {
    let disk = formatted(8 << 20);
    for epoch in 1..=5 {
        assert_eq!(open_it(&disk).unwrap().epoch, epoch);
    }
    poke(&disk, geometry().host_slot(0, 5), |block| block[16] ^= 1);
    let store = open_it(&disk).unwrap();
    assert_eq!((store.epoch, store.findings.len()), (6, 1));
    assert!(open_it(&disk).unwrap().findings.is_empty(), "the lost slot was written again");
}

#[test]
fn an_epoch_that_cannot_be_read_is_not_guessed() {
    let disk = formatted(8 << 20);
    open_it(&disk).unwrap();
    poke(&disk, geometry().host_slot(0, 1), |block| block[16] ^= 1);
    assert!(matches!(refused(&disk), OpenError::Corrupt(_)));
    assert!(open(&mut disk.connect(), OpenMode::ReadOnly).is_ok());
}

#[test]
fn a_dying_device_is_an_error_and_not_a_panic() {
    let good = with_metadata();
    poke_record(&good, 0, &record(1, "vm"));
    for after in 0.. {
        let disk = good.fork(after);
        disk.inject(Fault { kind: None, after, lasting: true });
        match open_it(&disk) {
            Ok(_) => return assert!(disk.counters().flushes > 0 && after > 5),
            Err(error) => assert!(matches!(error, OpenError::Device { .. }), "{after}: {error}"),
        }
    }
}
