//! Trees made by hand, good ones and bad ones.

use super::*;
use crate::format::{
    Bitmap, CatalogueEntry, Entry, Geometry, LogEntry, NODE_ENTRIES, Parent, TagKey, VolumeRecord,
    encode_catalogue_block, encode_log_block, node_as_bytes,
};
use crate::request::{CacheMode, VolumeId};
use crate::store::testing::{NOW, SECRET, formatted};
use bessel_reactor::device::sim::{Fault, OpKind, SimDisk};
use bessel_reactor::units::ByteCount;

const KEY: TagKey = TagKey::new(SECRET);
const META: u64 = 256;
const DATA: u64 = 512;

/// A store of 1 MiB extents: 1 is metadata, 2 is data, so blocks of metadata are `META + n`.
struct Craft {
    disk: SimDisk,
    geometry: Geometry,
    bitmaps: [Bitmap; 2],
}

impl Craft {
    fn new() -> Self {
        let geometry = Geometry::plan(ByteCount::new(8 << 20), None).unwrap();
        let bitmaps = [geometry.fresh_bitmap(0), geometry.fresh_bitmap(0)];
        Self { disk: formatted(8 << 20), geometry, bitmaps }
    }

    fn put(&self, addr: u64, fill: impl FnOnce(&mut [u8], BlockAddr)) {
        let mut block = [0; 4096];
        fill(&mut block, BlockAddr::new(addr));
        self.disk.poke(BlockAddr::new(addr), &block);
    }

    fn allocate(&mut self, addr: u64) {
        self.bitmaps[(addr / 256 - 1) as usize].set((addr % 256) as u32);
    }

    /// A node with these entries, the rest sparse, allocated; and what it links to, if data.
    fn node(&mut self, addr: u64, entries: &[(usize, Entry)]) -> u64 {
        let mut node = [Entry::sparse(); NODE_ENTRIES];
        for &(slot, entry) in entries {
            node[slot] = entry;
            if entry.block().get() >= DATA {
                self.allocate(entry.block().get());
            }
        }
        for (slot, entry) in node.iter_mut().enumerate() {
            *entry = KEY.seal(*entry, BlockAddr::new(addr), slot);
        }
        self.allocate(addr);
        self.put(addr, |block, _| block.copy_from_slice(node_as_bytes(&node)));
        addr
    }

    /// A path of three nodes from `addr` on, the root first, to data block `data` at place 5.
    fn path(&mut self, addr: u64, data: u64) -> u64 {
        self.node(addr + 2, &[(5, Entry::data(BlockAddr::new(data)))]);
        self.node(addr + 1, &[(0, node(1, addr + 2))]);
        self.node(addr, &[(0, node(2, addr + 1))])
    }

    fn volume(&mut self, slot: u32, root: u64, log: &[(u64, bool)]) {
        let log_addr = META + 200 + u64::from(slot);
        let id = VolumeId(u64::from(slot) + 1);
        let entries: Vec<_> = (0u64..)
            .zip(log)
            .map(|(sequence, &(root, deleted))| LogEntry {
                sequence,
                root: BlockAddr::new(root),
                time: NOW,
                size: ByteCount::new(1 << 30),
                blocks_allocated: 0,
                height: 3,
                deleted,
                label: None,
                parent: Parent::Unknown,
            })
            .collect();
        if !entries.is_empty() {
            self.allocate(log_addr);
            self.put(log_addr, |block, addr| {
                encode_log_block(block, addr, None, id, 0, &entries, SECRET);
            });
        }
        let record = VolumeRecord {
            generation: 1,
            id,
            deleted: false,
            size: ByteCount::new(1 << 30),
            height: 3,
            cache: CacheMode::Writeback,
            cache_by_guest: false,
            root: BlockAddr::new(root),
            log_tail: (!log.is_empty()).then_some(BlockAddr::new(log_addr)),
            log_count: log.len() as u64,
            origin: None,
            created: NOW,
            owner_host: 0,
            owner_epoch: 1,
            blocks_allocated: 0,
            name: format!("vm{slot}"),
            parent: Parent::Unknown,
        };
        let place = self.geometry.registry_slot(slot, 1);
        self.put(place.get(), |block, addr| record.encode_block(block, addr, SECRET));
    }

    fn check(&self) -> CheckReport {
        let mut entries = [CatalogueEntry::UNUSED; 8];
        entries[0].kind = ExtentType::System;
        entries[1].kind = ExtentType::Metadata;
        entries[2].kind = ExtentType::Data;
        self.put(self.geometry.catalogue_start.get(), |block, addr| {
            encode_catalogue_block(block, addr, 0, &entries, SECRET);
        });
        for (addr, bitmap) in [META, DATA].into_iter().zip(&self.bitmaps) {
            self.put(addr, |block, addr| bitmap.encode(block, addr, SECRET));
        }
        check(&mut self.disk.connect(), &mut |_, _| ()).unwrap()
    }

    /// One finding, which says this.
    fn finds(&self, severity: Severity, text: &str) {
        let report = self.check();
        assert_eq!(report.findings.len(), 1, "{text}: {:?}", report.findings);
        let finding = &report.findings[0];
        assert_eq!(finding.severity, severity);
        assert!(finding.to_string().contains(text), "{finding} / {text}");
        assert!(!report.is_clean());
    }
}

fn node(level: u8, addr: u64) -> Entry {
    Entry::node(level, BlockAddr::new(addr))
}

fn data(addr: u64) -> Entry {
    Entry::data(BlockAddr::new(addr))
}

/// Volume vm0 with a snapshot: the snapshot's tree is `META+10..13` over data `DATA+10`; the
/// current root `META+20` shares it and has a leaf of its own, `META+22`, at volume block 512.
fn shared() -> Craft {
    let mut craft = Craft::new();
    let old_root = craft.path(META + 10, DATA + 10);
    craft.node(META + 22, &[(0, data(DATA + 22))]);
    craft.node(META + 21, &[(0, node(1, META + 12).to_read_only()), (1, node(1, META + 22))]);
    let root = craft.node(META + 20, &[(0, node(2, META + 21))]);
    craft.volume(0, root, &[(old_root, false)]);
    craft
}

#[test]
fn a_good_store_has_no_findings_and_its_blocks_are_counted() {
    let mut craft = shared();
    let report = craft.check();
    assert_eq!(report.findings, Vec::new());
    assert!(report.is_clean());
    assert_eq!((report.volumes, report.snapshots), (1, 1));
    assert_eq!(report.data, Usage { extents: 1, allocated: 2, reachable: 2, leaked: 0 });
    // Two roots, two nodes of level 2, two leaves, a log block.
    assert_eq!(report.metadata, Usage { extents: 1, allocated: 7, reachable: 7, leaked: 0 });

    for addr in [META + 100, DATA + 100, DATA + 101] {
        craft.allocate(addr);
    }
    let report = craft.check();
    assert!(report.is_clean(), "a leak does no harm");
    assert_eq!((report.metadata.leaked, report.data.leaked), (1, 2));
}

#[test]
fn deleted_snapshots_are_not_walked() {
    let mut craft = shared();
    craft.volume(0, META + 20, &[(META + 10, true)]);
    let report = craft.check();
    assert!(report.is_clean());
    assert_eq!((report.snapshots, report.metadata.leaked), (0, 2), "its root and its level 2");
}

#[test]
fn a_damaged_entry_is_found_wherever_it_is() {
    for addr in [META + 10, META + 11, META + 12, META + 20, META + 21, META + 22] {
        let craft = shared();
        let mut block = craft.disk.peek(BlockAddr::new(addr));
        block[8 * 300 + 6] ^= 0x40;
        craft.disk.poke(BlockAddr::new(addr), &block);
        craft.finds(Severity::Corrupt, "slot 300: the tag does not match");
    }
}

#[test]
fn a_lost_sector_is_one_finding() {
    let craft = shared();
    let mut block = craft.disk.peek(BlockAddr::new(META + 22));
    block[512..1024].fill(0);
    craft.disk.poke(BlockAddr::new(META + 22), &block);
    craft.finds(Severity::Corrupt, "slot 64: the entry is all zero");
    craft.finds(Severity::Corrupt, "63 more entries");
}

#[test]
fn reaching_a_free_block_is_found() {
    for (extent, bit, text) in [(0, 22, "radix node"), (1, 22, "data block"), (0, 200, "log")] {
        let mut craft = shared();
        craft.bitmaps[extent].clear(bit);
        craft.finds(Severity::Corrupt, "may be handed out again");
        craft.finds(Severity::Corrupt, text);
    }
}

#[test]
fn a_block_writable_in_one_tree_is_in_no_other() {
    let mut craft = shared();
    craft.node(META + 21, &[(0, node(1, META + 12)), (1, node(1, META + 22))]);
    craft.finds(Severity::Corrupt, "a tree that may write it in place reaches it too");

    // Two volumes with one leaf, writable in both.
    let mut craft = Craft::new();
    let first = craft.path(META + 10, DATA + 10);
    craft.node(META + 21, &[(0, node(1, META + 12))]);
    let second = craft.node(META + 20, &[(0, node(2, META + 21))]);
    craft.volume(0, first, &[]);
    craft.volume(1, second, &[]);
    craft.finds(Severity::Corrupt, "a tree that may write it in place reaches it too");

    // The clone may write what the other shares read-only.
    craft.node(META + 11, &[(0, node(1, META + 12).to_read_only())]);
    craft.finds(Severity::Corrupt, "may be written in place here");
}

#[test]
fn a_block_at_two_places_is_found() {
    let mut craft = Craft::new();
    let twice = data(DATA + 10).to_read_only();
    craft.node(META + 12, &[(5, twice), (6, twice)]);
    craft.node(META + 11, &[(0, node(1, META + 12))]);
    let root = craft.node(META + 10, &[(0, node(2, META + 11))]);
    craft.volume(0, root, &[]);
    craft.finds(Severity::Corrupt, "(volume block 6): it is reached at two places");
}

#[test]
fn a_node_that_cannot_be_read_does_not_end_the_check() {
    let craft = shared();
    let reads = |disk: &SimDisk| disk.counters().reads;
    let before = reads(&craft.disk);
    craft.check();
    let total = reads(&craft.disk) - before;
    let mut unreadable = 0;
    for after in 0..total {
        let disk = craft.disk.fork(after);
        disk.inject(Fault { kind: Some(OpKind::Read), after, lasting: false });
        match check(&mut disk.connect(), &mut |_, _| ()) {
            // A read that fails once is tried again, alone.
            Ok(report) => unreadable += u64::from(report.is_clean()),
            Err(error) => assert!(matches!(error, OpenError::Device { .. }), "{error}"),
        }
    }
    assert!(unreadable > 3, "nodes are read {unreadable} times");
}

#[test]
fn bitmaps_that_offer_what_they_must_not_are_found() {
    let mut craft = shared();
    craft.bitmaps[0].clear(0);
    craft.finds(Severity::Corrupt, "offers the bitmap's own blocks");
    let mut craft = shared();
    craft.bitmaps[1].clear(256);
    craft.finds(Severity::Corrupt, "past the end of the extent");
}

#[test]
fn damage_outside_the_trees_is_named() {
    let craft = shared();
    craft.disk.poke(BlockAddr::new(16), &[0; 4096]);
    craft.finds(Severity::Warning, "superblock at block 16");
    let craft = shared();
    craft.disk.poke(BlockAddr::new(70), &[1; 4096]);
    craft.finds(Severity::Warning, "group table: block 70");
    let craft = shared();
    craft.disk.poke(craft.geometry.registry_slot(7, 0), &[1; 4096]);
    craft.finds(Severity::Corrupt, "registry slot 7: volume record");
    let craft = shared();
    craft.disk.poke(BlockAddr::new(META + 200), &[0; 4096]);
    let report = craft.check();
    assert!(report.findings[0].place.starts_with("volume \"vm0\""), "{:?}", report.findings);
}

/// Flips a bit in, zeroes, and puts another sector into, every sector that something depends on.
#[test]
fn no_damage_goes_unseen() {
    let craft = shared();
    assert!(craft.check().is_clean());
    let record = craft.geometry.registry_slot(0, 1).get();
    let whole = [craft.geometry.catalogue_start.get(), META, DATA];
    let nodes = [10, 11, 12, 20, 21, 22].map(|place| META + place);
    let first_sectors = [0, 8, 16, 24, record, META + 200].map(|block| (block, 0));
    let all_sectors = whole.into_iter().chain(nodes);
    let sectors = all_sectors.flat_map(|block| (0..8).map(move |sector| (block, sector)));
    for (block, sector) in sectors.chain(first_sectors) {
        let other = craft.disk.peek(BlockAddr::new(if block == META { DATA } else { META }));
        for damage in ["a bit", "zeroes", "another's"] {
            let disk = craft.disk.fork(0);
            let mut bytes = disk.peek(BlockAddr::new(block));
            let range = sector * 512..sector * 512 + 512;
            match damage {
                "a bit" => bytes[range.start + (sector * 37 + block as usize) % 512] ^= 8,
                "zeroes" => bytes[range].fill(0),
                _ => bytes[range.clone()].copy_from_slice(&other[range]),
            }
            disk.poke(BlockAddr::new(block), &bytes);
            match check(&mut disk.connect(), &mut |_, _| ()) {
                // A pair of zero slots is a volume that never was: nothing refers to it.
                Ok(report) if block == record && damage == "zeroes" => assert!(report.is_clean()),
                Ok(report) => assert!(!report.is_clean(), "{damage} at {block}.{sector}"),
                Err(error) => assert!(matches!(error, OpenError::Corrupt(_)), "{error}"),
            }
        }
    }
}

#[test]
fn progress_does_not_pass_its_total() {
    let craft = shared();
    craft.check();
    let mut last = 0;
    check(&mut craft.disk.connect(), &mut |done, total| {
        assert!(last <= done && done <= total);
        last = done;
    })
    .unwrap();
    assert_eq!(last, 7);
}
