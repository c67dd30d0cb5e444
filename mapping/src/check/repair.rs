//! `bessel check --repair`: writes again what follows from what else is on the device.
//!
//! Superblock copies, a record's other slot, the host's record, catalogue entries of extents that
//! trees lead to, and allocation bitmaps. Trees, logs and data follow from nothing and are left as
//! they are: in particular, a block that two trees may write stays in both.
//!
//! What must not be broken:
//! - Whatever is written replaces something damaged, marks more blocks allocated, or frees blocks
//!   that nothing needs; and goes out in that order, with a flush after each. Cut short at any
//!   write, the store is no worse, and the next repair goes on.
//! - A block is freed only when all trees were followed to their ends and the store was closed in
//!   order: else a tree that could not be found, or a killed daemon's journal, may lead to it
//!   (`docs/decisions/0007-journal-in-memory.md`). Nor may an older record still lead there.

use bessel_reactor::clock::WallTime;
use bessel_reactor::device::{Device, DeviceError};
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr, ByteCount, SECTOR_SIZE, SECTORS_PER_BLOCK};

use super::marks::BitmapRead;
use super::{CheckReport, FINDINGS_MAX, Finding, Look, Structure, check, look};
use crate::blocking::{Blocking, Span};
use crate::directory::VolumeEntry;
use crate::format::{
    Bitmap, CATALOGUE_ENTRIES_PER_BLOCK, CATALOGUE_ENTRIES_PER_SECTOR, CatalogueEntry, ExtentType,
    HostRecord, LogEntry, VolumeRecord, encode_catalogue_block,
};
use crate::store::{HOST_LOCAL, Losses, OpenError, OpenedStore};

type BlockBytes = [u8; BLOCK_SIZE as usize];

/// Something that a repair writes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RepairStep {
    /// What is written.
    pub structure: Structure,
    /// Where.
    pub block: BlockAddr,
    /// Whose it is, as `volume "vm1"`.
    pub place: String,
    /// What becomes of it.
    pub what: String,
}

impl std::fmt::Display for RepairStep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "repair: {}: {}", self.place, self.what)
    }
}

/// What can be repaired, and how. Nothing has been written.
pub struct RepairPlan {
    /// What is wrong with the store.
    pub report: CheckReport,
    /// What would be written, in order, the first [`FINDINGS_MAX`].
    pub steps: Vec<RepairStep>,
    /// How many more there are.
    pub steps_omitted: u64,
    /// Blocks that would be marked allocated because something reaches them.
    pub blocks_marked: u64,
    /// Blocks that would be freed because nothing does.
    pub blocks_freed: u64,
    /// Why blocks that nothing reaches stay allocated, if there are any and they do.
    pub leaks_kept: Option<String>,
    /// What is written together; a flush follows on each.
    phases: Vec<Vec<(BlockAddr, Box<BlockBytes>)>>,
}

/// What a repair came to: what a check then finds.
pub type RepairReport = CheckReport;

impl RepairPlan {
    /// True when there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.phases.is_empty()
    }

    fn step(
        &mut self,
        structure: Structure,
        block: BlockAddr,
        place: String,
        what: impl Into<String>,
    ) {
        if self.steps.len() < FINDINGS_MAX {
            self.steps.push(RepairStep { structure, block, place, what: what.into() });
        } else {
            self.steps_omitted += 1;
        }
    }

    fn phase(&mut self, writes: Vec<(BlockAddr, Box<BlockBytes>)>) {
        if !writes.is_empty() {
            self.phases.push(writes);
        }
    }
}

fn block_of(fill: impl FnOnce(&mut [u8])) -> Box<BlockBytes> {
    let mut block = Box::new([0; BLOCK_SIZE as usize]);
    fill(&mut block[..]);
    block
}

/// Finds out what can be repaired. `time` is for the host's record. `progress` as with [`check`].
///
/// # Errors
/// As [`check`].
pub fn plan_repair<D: Device>(
    device: &mut D,
    time: WallTime,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<RepairPlan, OpenError> {
    let Look { store, losses, marks, report } = look(device, progress)?;
    let leaked = report.data.leaked + report.metadata.leaked;
    let unsure = match &losses.hidden {
        Some(why) => Some(format!("a tree may lead to them ({why})")),
        None if !store.was_clean => Some(
            "the store was not closed in order, and a killed daemon may have left changes that \
             lead to them; serve it once, stop the daemon, and repair again"
                .to_owned(),
        ),
        None => None,
    };
    let may_free = unsure.is_none();
    let mut plan = RepairPlan {
        report,
        steps: Vec::new(),
        steps_omitted: 0,
        blocks_marked: 0,
        blocks_freed: 0,
        leaks_kept: unsure.filter(|_| leaked > 0),
        phases: Vec::new(),
    };
    plan_superblocks(&mut plan, &store, &losses);
    plan_host(&mut plan, &store, &losses, time);
    // Extents whose types are lost have no leaks that could be counted.
    let frees = may_free && (leaked > 0 || !losses.catalogue.is_empty());
    plan_records(&mut plan, &store, &losses, frees);
    let (marked, rebuilt) = plan_bitmaps(&mut plan, &store, &losses, &marks, may_free);
    plan.phase(marked);
    plan_catalogue(&mut Blocking::new(device), &mut plan, &store, &losses)
        .map_err(|source| OpenError::Device { doing: "reading the extent catalogue", source })?;
    plan.phase(rebuilt);
    Ok(plan)
}

/// Does what was planned, durably, and checks the store again. Nobody may have used it meanwhile.
///
/// # Errors
/// The device's. The store is no worse than before; plan and repair again.
pub fn repair<D: Device>(
    device: &mut D,
    plan: &RepairPlan,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<RepairReport, OpenError> {
    write_phases(&mut Blocking::new(device), &plan.phases)
        .map_err(|source| OpenError::Device { doing: "repairing", source })?;
    check(device, progress)
}

fn write_phases<D: Device>(
    io: &mut Blocking<'_, D>,
    phases: &[Vec<(BlockAddr, Box<BlockBytes>)>],
) -> Result<(), DeviceError> {
    for writes in phases {
        let spans = writes.iter().map(|(addr, _)| Span::one(*addr));
        let mut images = writes.iter();
        io.write(spans, |addr, block| {
            let (wanted, image) = images.next().expect("each block is asked for once, in order");
            assert_eq!(*wanted, addr, "blocks are filled in order");
            block.copy_from_slice(&image[..]);
        })?;
        io.flush()?;
    }
    Ok(())
}

/// Only copies that do not hold the superblock are written, so one that does stays.
fn plan_superblocks(plan: &mut RepairPlan, store: &OpenedStore, losses: &Losses) {
    let mut writes = Vec::new();
    for &copy in &losses.superblocks {
        let place = format!("superblock at block {copy}");
        plan.step(Structure::Superblock, copy, place, "written again from the other copies");
        writes.push((copy, block_of(|block| store.superblock.encode_block(block, copy))));
    }
    plan.phase(writes);
}

/// The record that is left is written again, as its successor, in place of the lost one; it does not
/// count as clean, since the lost one may have been newer. When none is left, the epochs that the
/// store shows say which one is new; the life that last served is forgotten with them.
fn plan_host(plan: &mut RepairPlan, store: &OpenedStore, losses: &Losses, time: WallTime) {
    if losses.host.is_empty() {
        return;
    }
    let shown = store.catalogue.iter().map(|entry| entry.owner_epoch);
    let records = store.directory.entries().map(|entry| entry.record.owner_epoch);
    let last = shown.chain(records).max().unwrap_or(0);
    let (host, slots) = match &store.host {
        Some(host) => (host.clone(), 1),
        None => {
            let epoch = last.saturating_add(1);
            let (id, life) = (HOST_LOCAL, [0; 16]);
            let name = String::new();
            (HostRecord { generation: 1, id, epoch, clean: false, name, life, time }, 2)
        }
    };
    for ahead in 1..=slots {
        let Some(generation) = host.generation.checked_add(ahead) else { return };
        let record = HostRecord { generation, clean: false, ..host.clone() };
        let block = store.geometry.host_slot(HOST_LOCAL, generation);
        let what = format!("record at block {block} written again, epoch {}", record.epoch);
        plan.step(Structure::Host, block, format!("host {HOST_LOCAL}"), what);
        let image = block_of(|out| record.encode_block(out, block, store.secret));
        plan.phase(vec![(block, image)]);
    }
}

/// A record that has lost the one beside it is written there too, as its own successor. So is one
/// whose older record names a tree that is freed (`frees`): should the newer be lost one day, the older
/// would lead to what others have by then.
fn plan_records(plan: &mut RepairPlan, store: &OpenedStore, losses: &Losses, frees: bool) {
    let mut writes = Vec::new();
    for (slot, record, lost) in &losses.records {
        let what = "written again from the one beside it";
        if let Some(write) = plan_successor(plan, store, *slot, record, what) {
            assert_eq!(write.0, *lost, "a record's successor lies in the other slot");
            writes.push(write);
        }
    }
    for (slot, record, root) in losses.older.iter().filter(|_| frees) {
        let live = |it: &LogEntry| !it.deleted && it.root == *root;
        let log = || losses.logs.get(&record.id).into_iter().flat_map(|log| &log.entries);
        let keeps = |_: &VolumeEntry| *root == record.root || log().any(live);
        if record.deleted || !store.directory.entry(record.id).is_some_and(keeps) {
            let what = "of before, whose blocks are freed, written over with the current one";
            writes.extend(plan_successor(plan, store, *slot, record, what));
        }
    }
    plan.phase(writes);
}

/// The record once more, in its other slot.
fn plan_successor(
    plan: &mut RepairPlan,
    store: &OpenedStore,
    slot: u32,
    record: &VolumeRecord,
    what: &str,
) -> Option<(BlockAddr, Box<BlockBytes>)> {
    /// Far below what a record's counters may be, and above what any writer reaches.
    const GENERATION_MAX: u64 = 1 << 60;
    if record.generation > GENERATION_MAX {
        return None;
    }
    let generation = record.generation + 1;
    let block = store.geometry.registry_slot(slot, generation);
    let place = format!("volume {:?} (registry slot {slot})", record.name);
    plan.step(Structure::Record, block, place, format!("record at block {block} {what}"));
    let record = VolumeRecord { generation, ..record.clone() };
    Some((block, block_of(|out| record.encode_block(out, block, store.secret))))
}

type Writes = Vec<(BlockAddr, Box<BlockBytes>)>;

/// What marks blocks allocated, and what frees some, or replaces what is damaged.
fn plan_bitmaps(
    plan: &mut RepairPlan,
    store: &OpenedStore,
    losses: &Losses,
    marks: &super::Marks,
    may_free: bool,
) -> (Writes, Writes) {
    let (mut marked, mut rebuilt) = (Vec::new(), Vec::new());
    let geometry = store.geometry;
    for extent in 0..geometry.extent_count {
        let kind = store.extents.get(extent);
        let has_bitmap = matches!(kind, ExtentType::Data | ExtentType::Metadata);
        if !has_bitmap || losses.extents.doubtful.contains(&extent) {
            continue;
        }
        for index in 0..geometry.bitmap_blocks {
            let (read, reached) = marks.part(extent, index);
            let addr = geometry.bitmap_block(extent, index);
            let image = |bitmap: &Bitmap| {
                (addr, block_of(|block| bitmap.encode(block, addr, store.secret)))
            };
            let place = format!("extent {extent}");
            let mut needed = geometry.fresh_bitmap(index);
            if let Some(reached) = reached {
                needed.include(reached);
            }
            let Some(found) = read.bitmap() else {
                if !may_free {
                    needed.set_range(0, Bitmap::BITS);
                }
                let free = needed.count_free();
                let what = format!("allocation bitmap at block {addr} rebuilt, {free} blocks free");
                plan.step(Structure::Bitmap, addr, place, what);
                rebuilt.push(image(&needed));
                continue;
            };
            let mut all = found.clone();
            all.include(&needed);
            let missing = found.count_free() - all.count_free();
            let leaked = needed.count_free() - all.count_free();
            if missing > 0 || matches!(read, BitmapRead::Amended(_)) {
                let what = format!(
                    "allocation bitmap at block {addr}: {missing} blocks marked that are in use"
                );
                plan.step(Structure::Bitmap, addr, place.clone(), what);
                plan.blocks_marked += u64::from(missing);
                marked.push(image(&all));
            }
            if may_free && leaked > 0 {
                let size = ByteCount::from_blocks(u64::from(leaked)).human();
                let what = format!(
                    "allocation bitmap at block {addr}: {leaked} blocks freed that nothing \
                     reaches ({size})"
                );
                plan.step(Structure::Bitmap, addr, place, what);
                plan.blocks_freed += u64::from(leaked);
                rebuilt.push(image(&needed));
            }
        }
    }
    (marked, rebuilt)
}

/// What an extent without a catalogue entry holds, when that is known. Nothing may be in one that
/// no tree leads to, as long as all trees were followed; but a killed daemon may have left data there.
fn type_of(
    store: &OpenedStore,
    losses: &Losses,
    extent: u64,
    found: Option<ExtentType>,
) -> Option<ExtentType> {
    match found {
        _ if losses.extents.doubtful.contains(&extent) => None,
        Some(kind) => Some(kind),
        None if losses.hidden.is_some() => None,
        None if store.was_clean => Some(ExtentType::Unused),
        None => Some(ExtentType::Data),
    }
}

/// Sectors of the catalogue, by number from its start, that can be written again: with the types of
/// their extents.
fn derivable(store: &OpenedStore, losses: &Losses, sector: u64) -> Option<Vec<(u64, ExtentType)>> {
    let per_sector = CATALOGUE_ENTRIES_PER_SECTOR as u64;
    let extents = sector * per_sector..(sector + 1) * per_sector;
    let found = losses.extents.found().filter(|(extent, _)| extents.contains(extent));
    found.map(|(extent, kind)| Some((extent, type_of(store, losses, extent, kind)?))).collect()
}

/// Whether what a finding says of the catalogue can be repaired.
pub(super) fn is_derivable(losses: &Losses, store: &OpenedStore, finding: &Finding) -> bool {
    let Some(block) = finding.block else { return false };
    let first = (block.get() - store.geometry.catalogue_start.get()) * SECTORS_PER_BLOCK;
    let mut lost = losses.catalogue.range(first..first + SECTORS_PER_BLOCK);
    lost.all(|sector| derivable(store, losses, *sector).is_some())
}

/// Whole sectors of a block are written as they are.
fn plan_catalogue<D: Device>(
    io: &mut Blocking<'_, D>,
    plan: &mut RepairPlan,
    store: &OpenedStore,
    losses: &Losses,
) -> Result<(), DeviceError> {
    let geometry = store.geometry;
    let mut writes: Writes = Vec::new();
    for &sector in &losses.catalogue {
        let Some(types) = derivable(store, losses, sector) else { continue };
        let addr = geometry.catalogue_start.add(sector / SECTORS_PER_BLOCK);
        if writes.last().is_none_or(|(last, _)| *last != addr) {
            let mut block = Box::new([0; BLOCK_SIZE as usize]);
            // Of one that cannot be read all sectors are lost.
            if io.read_into(addr, &mut block[..]).is_err() {
                block.fill(0);
            }
            writes.push((addr, block));
        }
        let (_, image) = writes.last_mut().expect("just pushed");
        let first = sector / SECTORS_PER_BLOCK * CATALOGUE_ENTRIES_PER_BLOCK as u64;
        let last = (first + CATALOGUE_ENTRIES_PER_BLOCK as u64).min(geometry.extent_count);
        let mut entries = store.catalogue[first as usize..last as usize].to_vec();
        for entry in entries.iter_mut().filter(|entry| entry.kind == ExtentType::Invalid) {
            entry.kind = ExtentType::Unused; // Of this or another sector; see below.
        }
        let mut names = Vec::new();
        for (extent, mut kind) in types {
            let reached = store.extents.get(extent) != ExtentType::Invalid;
            if kind == ExtentType::Data && !reached && !was_in_use(io, store, extent)? {
                kind = ExtentType::Unused;
            }
            let owner_epoch = if kind == ExtentType::Unused { 0 } else { store.epoch };
            entries[(extent - first) as usize] =
                CatalogueEntry { kind, owner_host: 0, owner_epoch };
            match kind {
                ExtentType::Data => names.push(format!("{extent} data")),
                ExtentType::Metadata => names.push(format!("{extent} metadata")),
                _ => {}
            }
        }
        let encoded = block_of(|out| {
            encode_catalogue_block(out, addr, first, &entries, store.secret);
        });
        let at = (sector % SECTORS_PER_BLOCK * SECTOR_SIZE) as usize;
        let range = at..at + SECTOR_SIZE as usize;
        image[range.clone()].copy_from_slice(&encoded[range]);
        let names = if names.is_empty() { "none in use".to_owned() } else { names.join(", ") };
        let what = format!(
            "sector {} of block {addr} written again from what trees lead to: extents {names}",
            sector % SECTORS_PER_BLOCK
        );
        plan.step(Structure::Catalogue, addr, "extent catalogue".to_owned(), what);
    }
    plan.phase(writes);
    Ok(())
}

/// Whether an extent has a bitmap in which something was allocated.
fn was_in_use<D: Device>(
    io: &mut Blocking<'_, D>,
    store: &OpenedStore,
    extent: u64,
) -> Result<bool, DeviceError> {
    for index in 0..store.geometry.bitmap_blocks {
        let addr = store.geometry.bitmap_block(extent, index);
        let mut block = [0; BLOCK_SIZE as usize];
        io.read_into(addr, &mut block)?;
        if let Ok(mut bitmap) = Bitmap::decode(&block, addr, store.secret) {
            bitmap.include(&store.geometry.fresh_bitmap(index));
            if bitmap.count_free() < store.geometry.fresh_bitmap_free(index) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}
