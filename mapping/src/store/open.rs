//! Opening a store: everything but trees and old snapshots is read and checked, once, here.
//!
//! Of a snapshot log only the newest block is read, which is what appending needs: opening takes no longer
//! for a million snapshots than for none. The rest is read later, by whoever has the volume open. The log
//! of a deleted volume is not looked at: nobody appends to it, and its blocks may have been reclaimed.
//!
//! What concerns the whole store and cannot be trusted refuses the store, unchanged. What concerns
//! one volume takes that volume out alone. Only when all has been read is anything written: bad
//! superblock copies are renewed, and the host's epoch is raised, before a shard sees the store.
//!
//! `bessel check` reads a store by the same code, but stops at nothing that leaves something to see.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bessel_reactor::clock::WallTime;
use bessel_reactor::device::{Device, DeviceError};
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr, ByteCount, SECTOR_SIZE, SECTORS_PER_BLOCK};

use super::log::{LogFault, LogPart, LogWalk, WholeLog, step};
use super::probe::{Found, look};
use super::{FreeCounts, HOST_LOCAL, write_superblock};
use crate::blocking::{Blocking, Span};
use crate::check::{FINDINGS_MAX, Finding, Severity, Structure};
use crate::directory::{Directory, VolumeEntry};
use crate::flusher::SharedFlushes;
use crate::format::{
    Bitmap, CATALOGUE_ENTRIES_PER_SECTOR, CatalogueEntry, Damage, ExtentMap, ExtentType,
    FEATURES_INCOMPATIBLE_KNOWN, FEATURES_READ_ONLY_KNOWN, Geometry, HostRecord, SUPERBLOCK_COPIES,
    Slot, SlotPair, Superblock, SuperblockFault, TagKey, VolumeRecord, choose_slot,
    decode_catalogue_sector, find_lost_slot, refuse_wrong_slot, seal,
};
use crate::planted::{self, Bug};
use crate::request::VolumeId;

const BLOCK: usize = BLOCK_SIZE as usize;

/// What to open a store for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenMode {
    /// To serve it. The caller has made sure that nobody else does.
    ReadWrite {
        /// For the host table.
        time: WallTime,
    },
    /// To look at it. Writes nothing.
    ReadOnly,
}

/// An open store: all that shards need to start.
#[derive(Debug)]
pub struct OpenedStore {
    /// Identity, sequence, features.
    pub superblock: Superblock,
    /// Where everything lies.
    pub geometry: Geometry,
    /// Makes and checks tags.
    pub key: TagKey,
    /// Keys seals.
    pub secret: u64,
    /// The host's epoch in this life; when read-only, that of its last one, 0 if it had none.
    pub epoch: u64,
    /// The host's record as it is on the device; none before its first life.
    pub host: Option<HostRecord>,
    /// The store was closed in order when it was last open, or never was open.
    pub was_clean: bool,
    /// What each extent holds.
    pub extents: ExtentMap,
    /// The extent catalogue, by extent.
    pub catalogue: Vec<CatalogueEntry>,
    /// Free blocks by bitmap block.
    pub bitmap_free: FreeCounts,
    /// All volumes.
    pub directory: Directory,
    /// Volumes that could not be opened and why.
    pub faults: Vec<Finding>,
    /// What else was found to be wrong and could be lived with, the first [`FINDINGS_MAX`].
    pub findings: Vec<Finding>,
    /// How many more there are.
    pub findings_omitted: u64,
    /// Why nothing may be freed because nobody was seen to need it: a volume goes on from a record that may
    /// not be its newest.
    pub doubt: Option<String>,
    /// What shards know of each other's flushes: they all write to one cache.
    pub flushes: Arc<SharedFlushes>,
}

impl OpenedStore {
    /// True when a daemon has served guests from it.
    pub fn has_served(&self) -> bool {
        self.last_life() != NO_LIFE
    }

    /// The life of the daemon that last served guests from the store.
    pub fn last_life(&self) -> [u8; 16] {
        self.host.as_ref().map_or(NO_LIFE, |host| host.life)
    }
}

/// Why a store was not opened. It has not been changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no store on the device.
    #[error(
        "the device holds {0}, not a Bessel store; check the path, or make a store with `bessel format`"
    )]
    NotAStore(Found),
    /// A later version made it.
    #[error(
        "the store has format version {version}, this program knows version 1; use a newer bessel"
    )]
    Newer {
        /// The store's.
        version: u32,
    },
    /// It uses features that this program does not know.
    #[error(
        "the store uses features unknown to this program (incompatible: {bits:#x}); use a newer \
         bessel"
    )]
    UnknownFeatures {
        /// Those it does not know.
        bits: u64,
    },
    /// It uses features that this program does not know and that only allow reading.
    #[error(
        "the store uses features that this program can only read past (read-only compatible: \
         {bits:#x}); use a newer bessel to write"
    )]
    ReadOnlyFeatures {
        /// Those it does not know.
        bits: u64,
    },
    /// The device is smaller than the store.
    #[error(
        "the device is truncated: the store has {}, the device {}; restore the device to its full \
         size",
        .store.exact(), .device.exact()
    )]
    Truncated {
        /// Size of the store.
        store: ByteCount,
        /// Size of the device.
        device: ByteCount,
    },
    /// What the whole store hangs on contradicts itself.
    #[error(
        "the store is damaged: {0}; see what `bessel check --repair` can do, else restore the \
         device from a backup"
    )]
    Corrupt(String),
    /// The device failed.
    #[error("the device failed while {doing}")]
    Device {
        /// What was being done.
        doing: &'static str,
        /// How it failed.
        #[source]
        source: DeviceError,
    },
}

fn failed(doing: &'static str) -> impl FnOnce(DeviceError) -> OpenError {
    move |source| OpenError::Device { doing, source }
}

/// What a store has lost that stands elsewhere too, or follows from something else: what
/// [`crate::check::repair`] can write again.
#[derive(Debug)]
pub(crate) struct Losses {
    /// Superblock copies that do not hold the superblock.
    pub(crate) superblocks: Vec<BlockAddr>,
    /// The host's slots that are damaged.
    pub(crate) host: Vec<BlockAddr>,
    /// Sectors of the catalogue: the first extent each describes.
    pub(crate) catalogue: BTreeSet<u64>,
    /// What is known of the extents that these described.
    pub(crate) extents: LostExtents,
    /// Damaged slots of volume records that have a good one: its slot and the damaged block.
    pub(crate) records: Vec<(u32, VolumeRecord, BlockAddr)>,
    /// Volumes whose older record names another tree, or says that they are not deleted: the slot,
    /// the record that counts, and the older one's root.
    pub(crate) older: Vec<(u32, VolumeRecord, BlockAddr)>,
    /// Records that stand in one of their two slots, beside that of another volume, or of the same one
    /// before it was deleted.
    pub(crate) half: Vec<(u32, VolumeRecord)>,
    /// Volumes that cannot be opened and whose trees can be found, and what to call them.
    pub(crate) unopened: Vec<(String, VolumeRecord)>,
    /// Snapshot logs as far as they can be read, those of deleted volumes too; of a survey only.
    pub(crate) logs: BTreeMap<VolumeId, WholeLog>,
    /// Why trees may exist that cannot be found, the first reason.
    pub(crate) hidden: Option<String>,
    /// See [`OpenedStore::doubt`].
    older_used: Option<String>,
}

/// Extents whose catalogue entries are lost. What whole links lead to tells what they hold.
#[derive(Debug)]
pub(crate) struct LostExtents {
    geometry: Geometry,
    /// By extent, what was found in it.
    found: BTreeMap<u64, Option<ExtentType>>,
    /// Extents that links of both kinds lead to.
    pub(crate) doubtful: BTreeSet<u64>,
}

impl LostExtents {
    /// Notes that a link that can be trusted leads to something of this type. Returns the extent
    /// when it had no type until now; it has one then.
    pub(crate) fn adopt(
        &mut self,
        extents: &ExtentMap,
        block: BlockAddr,
        kind: ExtentType,
    ) -> Option<u64> {
        let extent = self.geometry.extent_of(block);
        let found = self.found.get_mut(&extent)?;
        if block.get() % self.geometry.extent_blocks < self.geometry.bitmap_blocks {
            return None; // Nothing links to a bitmap.
        }
        match *found {
            None => {
                *found = Some(kind);
                extents.set(extent, kind);
                return Some(extent);
            }
            Some(found) if found != kind => {
                self.doubtful.insert(extent);
            }
            Some(_) => {}
        }
        None
    }

    /// Extents whose entries are lost, and what was found in them.
    pub(crate) fn found(&self) -> impl Iterator<Item = (u64, Option<ExtentType>)> {
        self.found.iter().map(|(&extent, &kind)| (extent, kind))
    }
}

/// Whether a store that has lost its catalogue or its host may be looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leniency {
    None,
    All,
}

/// Opens the store on a device.
///
/// # Errors
/// Why it is refused.
pub fn open<D: Device>(device: &mut D, mode: OpenMode) -> Result<OpenedStore, OpenError> {
    let mut io = Blocking::new(device);
    let (mut store, losses) = read_store(&mut io, mode, Leniency::None)?;
    if let OpenMode::ReadWrite { time } = mode {
        write_superblock(&mut io, &store.superblock, &losses.superblocks)
            .map_err(failed("renewing the superblock"))?;
        attach(&mut io, &mut store, time)?;
        write_half_records(&mut io, &mut store, losses.half)
            .map_err(failed("writing what was cut short of the registry"))?;
    }
    Ok(store)
}

/// Writes deletions, and records of volumes in used slots, into their other slot too, where a crash or an
/// earlier version has left something else: that would count if the newer one were damaged, and its
/// blocks may be somebody else's.
fn write_half_records<D: Device>(
    io: &mut Blocking<'_, D>,
    store: &mut OpenedStore,
    half: Vec<(u32, VolumeRecord)>,
) -> Result<(), DeviceError> {
    if half.is_empty() || planted::is(Bug::HalfRecordsLeft) {
        return Ok(());
    }
    let half: BTreeMap<BlockAddr, VolumeRecord> = half
        .into_iter()
        .map(|(slot, mut record)| {
            record.generation += 1;
            (store.geometry.registry_slot(slot, record.generation), record)
        })
        .collect();
    io.write(half.keys().map(|place| Span::one(*place)), |addr, block| {
        half[&addr].encode_block(block, addr, store.secret);
    })?;
    io.flush()?;
    half.into_values().for_each(|record| store.directory.renewed(&record));
    Ok(())
}

/// Reads as much of a store as there is, to find out what is wrong with it. Writes nothing.
///
/// # Errors
/// When there is no store, or not even its shape can be known.
pub(crate) fn survey<D: Device>(device: &mut D) -> Result<(OpenedStore, Losses), OpenError> {
    read_store(&mut Blocking::new(device), OpenMode::ReadOnly, Leniency::All)
}

fn read_store<D: Device>(
    io: &mut Blocking<'_, D>,
    mode: OpenMode,
    leniency: Leniency,
) -> Result<(OpenedStore, Losses), OpenError> {
    let mut findings = Findings::default();
    let (superblock, superblocks) = read_superblock(io, &mut findings)?;
    check_features(&superblock, mode)?;
    let (size, device) = (superblock.geometry.size(), ByteCount::from_blocks(io.capacity_blocks()));
    if device < size {
        return Err(OpenError::Truncated { store: size, device });
    }
    let (geometry, secret) = (superblock.geometry, superblock.secret);
    let mut losses = Losses { superblocks, ..Losses::none(geometry) };
    let catalogue = read_catalogue(io, &superblock, leniency, &mut losses, &mut findings)?;
    let types: Vec<_> = catalogue.iter().map(|entry| entry.kind).collect();
    let extents = ExtentMap::new(geometry.extent_blocks, geometry.bitmap_blocks, &types);
    let host = read_host(io, &superblock, mode, &mut losses, &mut findings)?;
    let bitmap_free = count_free(io, &superblock, &catalogue, &mut findings);
    let mut store = OpenedStore {
        geometry,
        key: TagKey::new(secret),
        secret,
        epoch: host.as_ref().map_or(0, |host| host.epoch),
        was_clean: host.as_ref().is_none_or(|host| host.clean) && losses.host.is_empty(),
        host,
        extents,
        catalogue,
        bitmap_free,
        directory: Directory::new(geometry.registry_slots),
        faults: Vec::new(),
        findings: Vec::new(),
        findings_omitted: 0,
        doubt: None,
        flushes: Arc::default(),
        superblock,
    };
    find_lost_host(&mut store, mode, &mut losses, &mut findings)?;
    read_registry(io, &mut store, &mut losses, &mut findings);
    if leniency == Leniency::All {
        read_logs(io, &store, &mut losses, &mut findings);
    }
    store.doubt = losses.older_used.take();
    store.findings = findings.kept;
    store.findings_omitted = findings.omitted;
    Ok((store, losses))
}

/// What was found to be wrong, within a bound: a hostile store can have any number of damages.
#[derive(Default)]
struct Findings {
    kept: Vec<Finding>,
    omitted: u64,
}

impl Findings {
    fn push(&mut self, finding: Finding) {
        if self.kept.len() < FINDINGS_MAX {
            self.kept.push(finding);
        } else {
            self.omitted += 1;
        }
    }
}

/// The life of a host that has never served anybody.
const NO_LIFE: [u8; 16] = [0; 16];

/// Notes that the host has left in order. Nothing may be written to the store after this.
///
/// # Errors
/// The device's. The store then counts as not closed, which costs nothing but a remark.
///
/// # Panics
/// When `host` is not the record of this opening: that of [`OpenedStore::host`] or [`begin_life`].
pub fn close<D: Device>(
    device: &mut D,
    store: &OpenedStore,
    host: &HostRecord,
    time: WallTime,
) -> Result<(), DeviceError> {
    assert!(host.epoch == store.epoch && !host.clean, "only what is open is closed");
    let record = HostRecord { generation: host.generation + 1, clean: true, time, ..host.clone() };
    write_host(&mut Blocking::new(device), store, &record)
}

/// Begins to serve guests: from here on, durably, what other lives have left in memory
/// ([`crate::journal`]) is void, and what this life leaves will count. Everything outstanding must
/// have been made again and be durable. Returns the host's record as it is now, for [`close`].
///
/// # Errors
/// The device's; which of the two lives counts is unknown then.
///
/// # Panics
/// When the store was opened read-only.
pub fn begin_life<D: Device>(
    device: &mut D,
    store: &OpenedStore,
    life: [u8; 16],
    time: WallTime,
) -> Result<HostRecord, DeviceError> {
    let host = store.host.as_ref().filter(|host| !host.clean && host.epoch == store.epoch);
    let host = host.expect("only a store opened read-write is served from");
    let record = HostRecord { generation: host.generation + 1, life, time, ..host.clone() };
    write_host(&mut Blocking::new(device), store, &record)?;
    Ok(record)
}

/// The superblock that counts, and the copies that do not hold it.
fn read_superblock<D: Device>(
    io: &mut Blocking<'_, D>,
    findings: &mut Findings,
) -> Result<(Superblock, Vec<BlockAddr>), OpenError> {
    let present = SUPERBLOCK_COPIES.iter().filter(|copy| copy.get() < io.capacity_blocks());
    let spans: Vec<_> = present.map(|&copy| Span::one(copy)).collect();
    let mut copies = BTreeMap::new();
    let mut unreadable = None;
    io.read_each(&spans, |addr, block| {
        let copy = block.map(|block| Superblock::decode(block, addr));
        let lost = SuperblockFault::Damaged(unreadable_block(seal::Kind::Superblock, addr));
        copies.insert(
            addr,
            copy.unwrap_or_else(|error| {
                unreadable = Some(error);
                Err(lost)
            }),
        );
    });

    for copy in copies.values() {
        if let Err(SuperblockFault::Version { version, .. }) = copy {
            return Err(OpenError::Newer { version: *version });
        }
    }
    let valid = || copies.values().filter_map(|copy| copy.as_ref().ok());
    if let (None, Some(source)) = (valid().next(), unreadable) {
        return Err(OpenError::Device { doing: "reading the superblock", source });
    }
    let Some(best) = valid().max_by_key(|superblock| superblock.sequence).cloned() else {
        return Err(no_superblock(io, copies.into_values().filter_map(Result::err)));
    };
    let same = |other: &Superblock| {
        (other.uuid, other.geometry, other.secret) == (best.uuid, best.geometry, best.secret)
    };
    if !valid().all(same) {
        let what = "its superblock copies are of different stores".to_owned();
        return Err(OpenError::Corrupt(what));
    }
    let mut bad = Vec::new();
    for (addr, copy) in &copies {
        let what = match copy {
            Ok(superblock) if superblock.sequence == best.sequence => continue,
            Ok(superblock) => format!(
                "the copy has sequence {}, the newest {}: its update was cut short",
                superblock.sequence, best.sequence
            ),
            Err(fault) => fault.to_string(),
        };
        bad.push(*addr);
        let place = format!("superblock at block {addr}");
        let finding =
            Finding::new(Severity::Warning, Structure::Superblock, Some(*addr), place, what);
        findings.push(finding.repairable());
    }
    Ok((best, bad))
}

/// Says what the device is instead of a store.
fn no_superblock<D: Device>(
    io: &mut Blocking<'_, D>,
    faults: impl Iterator<Item = SuperblockFault>,
) -> OpenError {
    let mut damaged = faults.filter(|fault| matches!(fault, SuperblockFault::Damaged(_)));
    if let Some(fault) = damaged.next() {
        return OpenError::Corrupt(format!("no superblock copy is whole ({fault})"));
    }
    match look(io) {
        Ok(found) => OpenError::NotAStore(found),
        Err(source) => OpenError::Device { doing: "looking for what it holds", source },
    }
}

fn check_features(superblock: &Superblock, mode: OpenMode) -> Result<(), OpenError> {
    let bits = superblock.features_incompatible & !FEATURES_INCOMPATIBLE_KNOWN;
    if bits != 0 {
        return Err(OpenError::UnknownFeatures { bits });
    }
    let bits = superblock.features_read_only & !FEATURES_READ_ONLY_KNOWN;
    if bits != 0 && mode != OpenMode::ReadOnly {
        return Err(OpenError::ReadOnlyFeatures { bits });
    }
    Ok(())
}

/// The extent catalogue. When damage may be lived with, extents without an entry have no type.
fn read_catalogue<D: Device>(
    io: &mut Blocking<'_, D>,
    superblock: &Superblock,
    leniency: Leniency,
    losses: &mut Losses,
    findings: &mut Findings,
) -> Result<Vec<CatalogueEntry>, OpenError> {
    let geometry = &superblock.geometry;
    let start = geometry.catalogue_start;
    let mut bytes = vec![0; geometry.catalogue_blocks as usize * BLOCK];
    let unreadable = read_blocks(io, start, &mut bytes);
    if let (Leniency::None, Some((_, source))) = (leniency, unreadable.iter().next()) {
        return Err(failed("reading the extent catalogue")(*source));
    }
    let count = geometry.extent_count as usize;
    let mut entries = Vec::with_capacity(count);
    let sectors = (0u8..8).cycle().zip(bytes.chunks_exact(SECTOR_SIZE as usize));
    for (index, (sector, bytes)) in (0u64..).zip(sectors) {
        let addr = geometry.catalogue_start.add(index / SECTORS_PER_BLOCK);
        let first = entries.len();
        let here = (count - first).min(CATALOGUE_ENTRIES_PER_SECTOR);
        let read =
            decode_catalogue_sector(bytes, addr, sector, here, superblock.secret, &mut entries);
        let Err(mut damage) = read else { continue };
        if unreadable.contains_key(&addr) {
            damage.fault = UNREADABLE;
        }
        if leniency == Leniency::None {
            return Err(OpenError::Corrupt(damage.to_string()));
        }
        let place = match here {
            0 => "no extents".to_owned(),
            _ => format!("extents {first} to {}", first + here - 1),
        };
        findings.push(Finding::of(Severity::Corrupt, Structure::Catalogue, place, &damage));
        losses.catalogue.insert(index);
        let lost = CatalogueEntry { kind: ExtentType::Invalid, ..CatalogueEntry::UNUSED };
        entries.resize(first + here, lost);
        losses.extents.found.extend((first..first + here).map(|extent| (extent as u64, None)));
    }
    if losses.extents.found.remove(&0).is_some() {
        entries[0].kind = ExtentType::System;
    }
    let systems = entries.iter().filter(|entry| entry.kind == ExtentType::System).count();
    if entries[0].kind != ExtentType::System || systems != 1 {
        let what = "the extent catalogue does not have extent 0 alone as system extent".to_owned();
        return Err(OpenError::Corrupt(what));
    }
    Ok(entries)
}

fn read_host<D: Device>(
    io: &mut Blocking<'_, D>,
    superblock: &Superblock,
    mode: OpenMode,
    losses: &mut Losses,
    findings: &mut Findings,
) -> Result<Option<HostRecord>, OpenError> {
    let geometry = &superblock.geometry;
    let mut bytes = [0; 2 * BLOCK];
    let start = geometry.host_slot(HOST_LOCAL, 0);
    let unreadable = read_blocks(io, start, &mut bytes);
    if let (true, Some((_, source))) = (mode != OpenMode::ReadOnly, unreadable.iter().next()) {
        return Err(failed("reading the host table")(*source));
    }
    let mut slots = read_pair(&bytes, start, |block, addr| match unreadable.get(&addr) {
        Some(_) => Slot::Damaged(unreadable_block(seal::Kind::Host, addr)),
        None => HostRecord::decode_slot(block, addr, superblock.secret),
    });
    let wrong = |index| wrong_slot(seal::Kind::Host, start.add(index as u64));
    refuse_wrong_slot(&mut slots, |host| host.generation, wrong);
    let lost = |index| zero_block(seal::Kind::Host, start.add(index as u64));
    find_lost_slot(&mut slots, |host| host.generation > 1, lost);
    let damages = damages_of(&slots);
    losses.host.extend(damages.iter().map(|damage| damage.block));
    let finding = host_finding;
    match choose_slot(slots, |host| host.generation) {
        SlotPair::Empty => Ok(None),
        SlotPair::Record(host, None) => Ok(Some(host)),
        SlotPair::Record(mut host, Some(damage)) => {
            findings.push(finding(Severity::Warning, &damage));
            // The lost record may have been that of the next life: no epoch is used twice.
            host.epoch = host.epoch.saturating_add(1);
            Ok(Some(host))
        }
        // Without the last epoch, what this life writes cannot be told from what an earlier did.
        SlotPair::Damaged(_) if mode == OpenMode::ReadOnly => {
            damages.iter().for_each(|damage| findings.push(finding(Severity::Corrupt, damage)));
            Ok(None)
        }
        SlotPair::Damaged(damage) => Err(OpenError::Corrupt(damage.to_string())),
    }
}

fn host_finding(severity: Severity, damage: &Damage) -> Finding {
    let place = format!("host {HOST_LOCAL}");
    Finding::of(severity, Structure::Host, place, damage).repairable()
}

/// A host table of zeroes is that of a store that nobody has attached to, and nobody has put
/// anything into one. When there is something, the table is lost, and with it how the store was
/// closed and what was the last epoch.
fn find_lost_host(
    store: &mut OpenedStore,
    mode: OpenMode,
    losses: &mut Losses,
    findings: &mut Findings,
) -> Result<(), OpenError> {
    let attached = store.catalogue.iter().any(|entry| entry.owner_epoch > 0);
    if store.host.is_some() || !losses.host.is_empty() || !attached {
        return Ok(());
    }
    for generation in 0..2 {
        let block = store.geometry.host_slot(HOST_LOCAL, generation);
        let damage = zero_block(seal::Kind::Host, block);
        if mode != OpenMode::ReadOnly {
            return Err(OpenError::Corrupt(damage.to_string()));
        }
        findings.push(host_finding(Severity::Corrupt, &damage));
        losses.host.push(block);
    }
    store.was_clean = false;
    Ok(())
}

fn damages_of<T>(slots: &[Slot<T>; 2]) -> Vec<Damage> {
    let damage = |slot: &Slot<T>| match slot {
        Slot::Damaged(damage) => Some(*damage),
        Slot::Empty | Slot::Record(_) => None,
    };
    slots.iter().filter_map(damage).collect()
}

/// The damage of a block that should hold something and holds zeroes.
pub(super) fn zero_block(kind: seal::Kind, block: BlockAddr) -> Damage {
    Damage { kind, block, sector: 0, fault: seal::Fault::Zero }
}

/// The damage of a block whose record belongs into the one beside it.
pub(super) fn wrong_slot(kind: seal::Kind, block: BlockAddr) -> Damage {
    let fault = seal::Fault::Field("its generation belongs into the other slot");
    Damage { kind, block, sector: 0, fault }
}

/// The damage of a block that the device does not give.
fn unreadable_block(kind: seal::Kind, block: BlockAddr) -> Damage {
    Damage { kind, block, sector: 0, fault: UNREADABLE }
}

const UNREADABLE: seal::Fault = seal::Fault::Field("the device cannot read it");

/// Reads the blocks from `start` on into `target`. Those that cannot be read are zero there, and told.
fn read_blocks<D: Device>(
    io: &mut Blocking<'_, D>,
    start: BlockAddr,
    target: &mut [u8],
) -> BTreeMap<BlockAddr, DeviceError> {
    let mut unreadable = BTreeMap::new();
    let span = Span { start, blocks: (target.len() / BLOCK) as u64 };
    io.read_each(&[span], |addr, block| {
        let at = (addr.get() - start.get()) as usize * BLOCK;
        match block {
            Ok(block) => target[at..at + BLOCK].copy_from_slice(block),
            Err(error) => {
                target[at..at + BLOCK].fill(0);
                unreadable.insert(addr, error);
            }
        }
    });
    unreadable
}

pub(super) fn read_pair<T>(
    bytes: &[u8],
    start: BlockAddr,
    decode: impl Fn(&[u8], BlockAddr) -> Slot<T>,
) -> [Slot<T>; 2] {
    [decode(&bytes[..BLOCK], start), decode(&bytes[BLOCK..2 * BLOCK], start.add(1))]
}

/// Reads the bitmaps of all initialised extents. A damaged bitmap block offers nothing: its blocks
/// stay readable, and none of them is handed out twice.
fn count_free<D: Device>(
    io: &mut Blocking<'_, D>,
    superblock: &Superblock,
    catalogue: &[CatalogueEntry],
    findings: &mut Findings,
) -> FreeCounts {
    let geometry = superblock.geometry;
    let mut counts = FreeCounts::new(geometry);
    let used =
        |entry: &CatalogueEntry| matches!(entry.kind, ExtentType::Data | ExtentType::Metadata);
    let spans = (0u64..).zip(catalogue).filter(|(_, entry)| used(entry)).map(|(extent, _)| Span {
        start: geometry.extent_start(extent),
        blocks: geometry.bitmap_blocks,
    });
    let mut bitmap = Bitmap::new();
    // A hostile store can have millions of them.
    let (mut damages, mut omitted) = (BTreeMap::new(), 0);
    io.read_each(&spans.collect::<Vec<_>>(), |addr, block| {
        let read = match block {
            Ok(block) => bitmap.decode_into(block, addr, superblock.secret),
            Err(_) => Err(unreadable_block(seal::Kind::Bitmap, addr)),
        };
        let extent = geometry.extent_of(addr);
        let index = addr.get() - geometry.extent_start(extent).get();
        if read.is_ok() {
            bitmap.include(&geometry.fresh_bitmap(index));
        }
        counts.set(extent, index, read.map_or(0, |()| bitmap.count_free()));
        match read {
            Ok(()) => {}
            Err(_) if damages.len() == FINDINGS_MAX => omitted += 1,
            Err(damage) => {
                damages.insert(addr, damage);
            }
        }
    });
    for (addr, damage) in &damages {
        let place = format!("extent {}", geometry.extent_of(*addr));
        let finding = Finding::of(Severity::Corrupt, Structure::Bitmap, place, damage);
        findings.push(finding.repairable());
    }
    findings.omitted += omitted;
    counts
}

/// Reads all volumes. What cannot be read takes one volume out.
fn read_registry<D: Device>(
    io: &mut Blocking<'_, D>,
    store: &mut OpenedStore,
    losses: &mut Losses,
    findings: &mut Findings,
) {
    let geometry = store.geometry;
    let span =
        Span { start: geometry.registry_start, blocks: 2 * u64::from(geometry.registry_slots) };
    let mut pairs: Vec<[Slot<VolumeRecord>; 2]> = Vec::new();
    pairs.resize_with(geometry.registry_slots as usize, || [Slot::Empty, Slot::Empty]);
    let mut unreadable = BTreeMap::new();
    // How damaged slots begin: what is left there of generation and identity.
    let mut remains: BTreeMap<BlockAddr, [u8; 16]> = BTreeMap::new();
    let secret = store.secret;
    io.read_each(&[span], |addr, block| {
        let index = (addr.get() - span.start.get()) as usize;
        match block {
            Ok(block) => {
                let slot = VolumeRecord::decode_slot(block, addr, secret);
                if matches!(slot, Slot::Damaged(_)) {
                    remains.insert(addr, block[..16].try_into().expect("it is longer"));
                }
                pairs[index / 2][index % 2] = slot;
            }
            Err(error) => {
                unreadable.insert(index as u32 / 2, (addr, error));
            }
        }
    });
    let mut lost_beside = Vec::new();
    let mut empty = None;
    for (slot, mut pair) in (0u32..).zip(pairs) {
        let place = format!("registry slot {slot}");
        if let Some((addr, error)) = unreadable.get(&slot) {
            // The record that counts may be the one that cannot be read, and come back.
            let what = format!("volume record at block {addr} cannot be read: {error}");
            let structure = Structure::Record;
            store.faults.push(Finding::new(Severity::Corrupt, structure, Some(*addr), place, what));
            store.directory.add_unreadable(slot);
            losses.hide(|| format!("registry slot {slot} cannot be read"));
            continue;
        }
        let wrong =
            |index| wrong_slot(seal::Kind::Volume, geometry.registry_slot(slot, index as u64));
        refuse_wrong_slot(&mut pair, |record| record.generation, wrong);
        let lost =
            |index| zero_block(seal::Kind::Volume, geometry.registry_slot(slot, index as u64));
        // A volume that is deleted stays so: whatever was beside its last record is of no use.
        find_lost_slot(&mut pair, |record| record.generation > 1 && !record.deleted, lost);
        let damages = damages_of(&pair);
        losses.older.extend(older_of(slot, &pair));
        losses.half.extend(half_of(slot, &pair));
        match choose_slot(pair, |record| record.generation) {
            SlotPair::Empty => {
                empty.get_or_insert(slot);
                continue;
            }
            SlotPair::Record(record, damage) => {
                lost_beside.extend(damage.map(|damage| (slot, record.clone(), damage)));
                read_volume(io, store, losses, slot, record);
            }
            SlotPair::Damaged(_) => {
                let (severity, structure) = (Severity::Corrupt, Structure::Record);
                store
                    .faults
                    .extend(damages.iter().map(|it| Finding::of(severity, structure, &place, it)));
                store.directory.add_unreadable(slot);
                losses.hide(|| format!("registry slot {slot} cannot be read"));
            }
        }
        if let Some(empty) = empty {
            // Slots are given out from the first on, and kept.
            losses.hide(|| format!("registry slot {empty} is empty and slot {slot} is not"));
        }
    }
    find_passed_over(store, losses);
    for (slot, record, damage) in lost_beside {
        let before = remains.get(&damage.block).is_some_and(|remains| record.follows(remains));
        // A volume that is deleted has no later record.
        let older = record.deleted || before && damage.fault == seal::Fault::Checksum;
        note_lost_record(store, losses, findings, slot, record, &damage, older);
    }
}

/// See [`Losses::older`].
fn older_of(slot: u32, pair: &[Slot<VolumeRecord>; 2]) -> Option<(u32, VolumeRecord, BlockAddr)> {
    let [Slot::Record(a), Slot::Record(b)] = pair else { return None };
    let (older, newer) = if a.generation < b.generation { (a, b) } else { (b, a) };
    let differs = older.root != newer.root || older.deleted != newer.deleted;
    differs.then(|| (slot, newer.clone(), older.root))
}

/// See [`Losses::half`].
fn half_of(slot: u32, pair: &[Slot<VolumeRecord>; 2]) -> Option<(u32, VolumeRecord)> {
    let [Slot::Record(a), Slot::Record(b)] = pair else { return None };
    let (older, newer) = if a.generation < b.generation { (a, b) } else { (b, a) };
    let half = older.id != newer.id || newer.deleted && !older.deleted;
    half.then(|| (slot, newer.clone()))
}

/// Takes out volumes whose record is older than a clone of theirs. The record that was lost froze the
/// tree that the clone shares: who writes by this one writes into the clone.
fn find_passed_over(store: &mut OpenedStore, losses: &mut Losses) {
    for (id, sequence, clone) in store.directory.passed_over() {
        let entry = store.directory.entry(id).expect("only what is whole is passed over");
        let VolumeEntry { slot, record, .. } = entry;
        let block = store.geometry.registry_slot(*slot, record.generation);
        let what = format!(
            "its record at block {block} is from before snapshot {sequence}, of which volume \
             {clone:?} is a clone: a later record is lost"
        );
        let place = format!("volume {:?} (id {id}, registry slot {slot})", record.name);
        losses.hide(|| format!("volume {:?} cannot be opened", record.name));
        losses.unopened.push((format!("volume {:?}", record.name), record.clone()));
        let (severity, structure) = (Severity::Corrupt, Structure::Record);
        store.faults.push(Finding::new(severity, structure, Some(block), place, what.clone()));
        store.directory.take_out(id, what);
    }
}

/// Notes that the slot beside a record is damaged. `older`: it held the one before.
fn note_lost_record(
    store: &OpenedStore,
    losses: &mut Losses,
    findings: &mut Findings,
    slot: u32,
    record: VolumeRecord,
    damage: &Damage,
    older: bool,
) {
    let name = &record.name;
    let (severity, what) = if older {
        (Severity::Warning, format!("the record before the current one is lost: {damage}"))
    } else {
        let lost = format!("volume {name:?} has lost a record that may have been its newest");
        losses.older_used.get_or_insert_with(|| lost.clone());
        losses.hide(|| lost);
        let what = "the record beside it is used, which may be the older: what was written since \
                    a snapshot may be lost";
        (Severity::Corrupt, format!("{damage}; {what}"))
    };
    let place = format!("volume {name:?} (registry slot {slot})");
    let finding = Finding::new(severity, Structure::Record, Some(damage.block), place, what);
    // Of one that does not open, whatever is left is left to whoever can make something of it.
    let opens = store.directory.entry(record.id).is_some_and(|entry| entry.slot == slot);
    findings.push(if opens { finding.repairable() } else { finding });
    if opens {
        losses.records.push((slot, record, damage.block));
    }
}

impl Losses {
    /// Nothing is lost.
    pub(super) fn none(geometry: Geometry) -> Self {
        Self {
            superblocks: Vec::new(),
            host: Vec::new(),
            catalogue: BTreeSet::new(),
            extents: LostExtents { geometry, found: BTreeMap::new(), doubtful: BTreeSet::new() },
            records: Vec::new(),
            older: Vec::new(),
            half: Vec::new(),
            unopened: Vec::new(),
            logs: BTreeMap::new(),
            hidden: None,
            older_used: None,
        }
    }

    /// Notes why trees may exist that nobody can find.
    pub(crate) fn hide(&mut self, why: impl FnOnce() -> String) {
        if self.hidden.is_none() {
            self.hidden = Some(why());
        }
    }

    /// True when the block can hold something of this type, as far as that is known.
    fn holds(&mut self, extents: &ExtentMap, block: BlockAddr, kind: ExtentType) -> bool {
        self.extents.adopt(extents, block, kind);
        extents.holds(block, kind)
    }
}

/// What is wrong with a volume: of what, where, and what.
pub(super) struct VolumeFault(Structure, Option<BlockAddr>, pub(super) String);

/// Reads the newest block of a volume's log and puts the volume into the directory, as good or as
/// faulted.
fn read_volume<D: Device>(
    io: &mut Blocking<'_, D>,
    store: &mut OpenedStore,
    losses: &mut Losses,
    slot: u32,
    record: VolumeRecord,
) {
    let copy = record.clone();
    let outcome = check_root(store, losses, record.root, record.deleted)
        .and_then(|()| read_tail(io, store, losses, &record))
        .and_then(|tail| {
            store.directory.add(VolumeEntry { slot, record, tail }).map_err(|fault| {
                let block = store.geometry.registry_slot(slot, copy.generation);
                VolumeFault(Structure::Record, Some(block), fault)
            })
        });
    if let Err(VolumeFault(structure, block, fault)) = outcome {
        let VolumeRecord { id, name, .. } = &copy;
        let place = format!("volume {name:?} (id {id}, registry slot {slot})");
        if !copy.deleted {
            losses.hide(|| format!("volume {name:?} cannot be opened"));
            losses.unopened.push((format!("volume {name:?}"), copy.clone()));
        }
        let finding = Finding::new(Severity::Corrupt, structure, block, place, fault.clone());
        store.faults.push(finding);
        store.directory.add_faulted(slot, &copy, fault);
    }
}

/// Nobody reads the tree of what is deleted, and the collector may have reclaimed it.
pub(super) fn check_root(
    store: &OpenedStore,
    losses: &mut Losses,
    root: BlockAddr,
    deleted: bool,
) -> Result<(), VolumeFault> {
    if deleted || losses.holds(&store.extents, root, ExtentType::Metadata) {
        Ok(())
    } else {
        let what = format!("its root, block {root}, is not in a metadata extent");
        Err(VolumeFault(Structure::Node, Some(root), what))
    }
}

/// The newest block of a volume's log, to which snapshots are appended; none when it has no snapshot,
/// or is deleted.
pub(super) fn read_tail<D: Device>(
    io: &mut Blocking<'_, D>,
    store: &OpenedStore,
    losses: &mut Losses,
    record: &VolumeRecord,
) -> Result<Option<LogPart>, VolumeFault> {
    if record.deleted {
        return Ok(None);
    }
    let mut holds = |block| losses.holds(&store.extents, block, ExtentType::Metadata);
    let read = step(io, &mut LogWalk::new(record), store.secret, &mut holds);
    read.map_err(|LogFault { structure, block, what }| VolumeFault(structure, block, what))
}

/// Reads the logs of all volumes, to find out what is wrong with them. Nothing hangs on that of a
/// deleted volume, whose blocks may be others' by now.
fn read_logs<D: Device>(
    io: &mut Blocking<'_, D>,
    store: &OpenedStore,
    losses: &mut Losses,
    findings: &mut Findings,
) {
    for VolumeEntry { slot, record, .. } in store.directory.entries() {
        let VolumeRecord { id, name, .. } = record;
        let holds = |block| losses.holds(&store.extents, block, ExtentType::Metadata);
        let log = WholeLog::read(io, record, store.secret, holds);
        if let Some(LogFault { structure, block, what }) = &log.fault
            && !record.deleted
        {
            losses.hide(|| format!("snapshots of volume {name:?} cannot be found"));
            let place = format!("volume {name:?} (id {id}, registry slot {slot})");
            let read = log.entries.first().map_or(record.log_count, |entry| entry.sequence);
            let what = format!("{what}; its snapshots before {id}.{read} are out of reach");
            findings.push(Finding::new(Severity::Corrupt, *structure, *block, place, what));
        }
        losses.logs.insert(*id, log);
    }
}

/// Starts a new life of the host: its epoch is durable before anything else of it is written.
fn attach<D: Device>(
    io: &mut Blocking<'_, D>,
    store: &mut OpenedStore,
    time: WallTime,
) -> Result<(), OpenError> {
    let before = store.host.take();
    let (generation, name, life) =
        before.map_or((0, String::new(), NO_LIFE), |host| (host.generation, host.name, host.life));
    let (Some(epoch), Some(generation)) = (store.epoch.checked_add(1), generation.checked_add(1))
    else {
        return Err(OpenError::Corrupt("the host table's counters are used up".to_owned()));
    };
    let id = HOST_LOCAL;
    let record = HostRecord { generation, id, epoch, clean: false, name, life, time };
    write_host(io, store, &record).map_err(failed("raising the host's epoch"))?;
    store.epoch = epoch;
    store.host = Some(record);
    Ok(())
}

fn write_host<D: Device>(
    io: &mut Blocking<'_, D>,
    store: &OpenedStore,
    record: &HostRecord,
) -> Result<(), DeviceError> {
    let place = store.geometry.host_slot(record.id, record.generation);
    io.write([Span::one(place)], |addr, block| record.encode_block(block, addr, store.secret))?;
    io.flush()
}

#[cfg(test)]
mod tests;
