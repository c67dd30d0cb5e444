//! Opening a store: everything but the trees is read and checked, once, here.
//!
//! What concerns the whole store and cannot be trusted refuses the store, unchanged. What concerns
//! one volume takes that volume out alone. Only when all has been read is anything written: bad
//! superblock copies are renewed, and the host's epoch is raised, before a shard sees the store.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use bessel_reactor::clock::WallTime;
use bessel_reactor::device::{Device, DeviceError};
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr, ByteCount};

use super::probe::{Found, look};
use super::{FreeCounts, HOST_LOCAL, write_superblock};
use crate::blocking::{Blocking, Span};
use crate::check::{Finding, Severity};
use crate::directory::{Directory, VolumeEntry};
use crate::format::{
    Bitmap, CATALOGUE_ENTRIES_PER_BLOCK, CatalogueEntry, Damage, ExtentMap, ExtentType,
    FEATURES_INCOMPATIBLE_KNOWN, FEATURES_READ_ONLY_KNOWN, Geometry, HostRecord,
    LOG_ENTRIES_PER_BLOCK, LogEntry, SUPERBLOCK_COPIES, Slot, SlotPair, Superblock,
    SuperblockFault, TagKey, VolumeRecord, choose_slot, decode_catalogue_block, decode_log_block,
    tree_blocks,
};

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
    /// Volumes that could not be opened and why, one line each.
    pub faults: Vec<String>,
    /// What else was found to be wrong and could be lived with.
    pub findings: Vec<Finding>,
    /// Device flushes that failed since, of whichever shard: all shards write to one cache.
    pub flush_failures: Arc<AtomicU64>,
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
    #[error("the store is damaged: {0}; run `bessel check`, and restore the device from a backup")]
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

/// Opens the store on a device.
///
/// # Errors
/// Why it is refused.
pub fn open<D: Device>(device: &mut D, mode: OpenMode) -> Result<OpenedStore, OpenError> {
    let capacity = device.properties().capacity;
    let mut io = Blocking::new(device);
    let mut findings = Vec::new();
    let (superblock, bad_copies) = read_superblock(&mut io, &mut findings)?;
    check_features(&superblock, mode)?;
    if capacity < superblock.geometry.size() {
        return Err(OpenError::Truncated { store: superblock.geometry.size(), device: capacity });
    }
    let (geometry, secret) = (superblock.geometry, superblock.secret);
    let catalogue = read_catalogue(&mut io, &superblock)?;
    let types: Vec<_> = catalogue.iter().map(|entry| entry.kind).collect();
    let extents = ExtentMap::new(geometry.extent_blocks, geometry.bitmap_blocks, &types);
    let host = read_host(&mut io, &superblock, mode, &mut findings)?;
    let bitmap_free = count_free(&mut io, &superblock, &catalogue, &mut findings)?;
    let mut store = OpenedStore {
        geometry,
        key: TagKey::new(secret),
        secret,
        epoch: host.as_ref().map_or(0, |host| host.epoch),
        was_clean: host.as_ref().is_none_or(|host| host.clean),
        host,
        extents,
        catalogue,
        bitmap_free,
        directory: Directory::new(geometry.registry_slots),
        faults: Vec::new(),
        findings,
        flush_failures: Arc::default(),
        superblock,
    };
    read_registry(&mut io, &mut store)?;
    if let OpenMode::ReadWrite { time } = mode {
        write_superblock(&mut io, &store.superblock, &bad_copies)
            .map_err(failed("renewing the superblock"))?;
        attach(&mut io, &mut store, time)?;
    }
    Ok(store)
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
    findings: &mut Vec<Finding>,
) -> Result<(Superblock, Vec<BlockAddr>), OpenError> {
    let present = SUPERBLOCK_COPIES.iter().filter(|copy| copy.get() < io.capacity_blocks());
    let spans: Vec<_> = present.map(|&copy| Span::one(copy)).collect();
    let mut copies = Vec::with_capacity(SUPERBLOCK_COPIES.len());
    io.read(spans, |addr, block| copies.push((addr, Superblock::decode(block, addr))))
        .map_err(failed("reading the superblock"))?;
    copies.sort_by_key(|(addr, _)| *addr);

    for (_, copy) in &copies {
        if let Err(SuperblockFault::Version { version, .. }) = copy {
            return Err(OpenError::Newer { version: *version });
        }
    }
    let valid = || copies.iter().filter_map(|(_, copy)| copy.as_ref().ok());
    let Some(best) = valid().max_by_key(|superblock| superblock.sequence).cloned() else {
        return Err(no_superblock(io, copies.into_iter().filter_map(|(_, copy)| copy.err())));
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
        findings.push(Finding::new(Severity::Warning, format!("superblock at block {addr}"), what));
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

fn read_catalogue<D: Device>(
    io: &mut Blocking<'_, D>,
    superblock: &Superblock,
) -> Result<Vec<CatalogueEntry>, OpenError> {
    let geometry = &superblock.geometry;
    let mut bytes = vec![0; geometry.catalogue_blocks as usize * BLOCK];
    io.read_into(geometry.catalogue_start, &mut bytes)
        .map_err(failed("reading the extent catalogue"))?;
    let count = geometry.extent_count as usize;
    let mut entries = Vec::with_capacity(count);
    let addrs = (geometry.catalogue_start.get()..).map(BlockAddr::new);
    for (addr, block) in addrs.zip(bytes.chunks_exact(BLOCK)) {
        let here = (count - entries.len()).min(CATALOGUE_ENTRIES_PER_BLOCK);
        decode_catalogue_block(block, addr, here, superblock.secret, &mut entries)
            .map_err(|damage| OpenError::Corrupt(damage.to_string()))?;
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
    findings: &mut Vec<Finding>,
) -> Result<Option<HostRecord>, OpenError> {
    let geometry = &superblock.geometry;
    let mut bytes = [0; 2 * BLOCK];
    let start = geometry.host_slot(HOST_LOCAL, 0);
    io.read_into(start, &mut bytes).map_err(failed("reading the host table"))?;
    let slots = read_pair(&bytes, start, |block, addr| {
        HostRecord::decode_slot(block, addr, superblock.secret)
    });
    let place = format!("host {HOST_LOCAL}");
    match choose_slot(slots, |host| host.generation) {
        SlotPair::Empty => Ok(None),
        SlotPair::Record(host, None) => Ok(Some(host)),
        SlotPair::Record(mut host, Some(damage)) => {
            findings.push(Finding::new(Severity::Warning, place, damage.to_string()));
            // The lost record may have been that of the next life: no epoch is used twice.
            host.epoch = host.epoch.saturating_add(1);
            Ok(Some(host))
        }
        // Without the last epoch, what this life writes cannot be told from what an earlier did.
        SlotPair::Damaged(damage) if mode == OpenMode::ReadOnly => {
            findings.push(Finding::new(Severity::Corrupt, place, damage.to_string()));
            Ok(None)
        }
        SlotPair::Damaged(damage) => Err(OpenError::Corrupt(damage.to_string())),
    }
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
    findings: &mut Vec<Finding>,
) -> Result<FreeCounts, OpenError> {
    let geometry = superblock.geometry;
    let mut counts = FreeCounts::new(geometry);
    let used =
        |entry: &CatalogueEntry| matches!(entry.kind, ExtentType::Data | ExtentType::Metadata);
    let spans = (0u64..).zip(catalogue).filter(|(_, entry)| used(entry)).map(|(extent, _)| Span {
        start: geometry.extent_start(extent),
        blocks: geometry.bitmap_blocks,
    });
    let mut bitmap = Bitmap::new();
    io.read(spans, |start, bytes| {
        let addrs = (start.get()..).map(BlockAddr::new);
        for (addr, block) in addrs.zip(bytes.chunks_exact(BLOCK)) {
            let extent = geometry.extent_of(addr);
            let index = addr.get() - geometry.extent_start(extent).get();
            let free = match bitmap.decode_into(block, addr, superblock.secret) {
                Ok(()) => bitmap.count_free(),
                Err(damage) => {
                    let place = format!("extent {extent}");
                    findings.push(Finding::new(Severity::Corrupt, place, damage.to_string()));
                    0
                }
            };
            counts.set(extent, index, free);
        }
    })
    .map_err(failed("reading the allocation bitmaps"))?;
    Ok(counts)
}

fn read_registry<D: Device>(
    io: &mut Blocking<'_, D>,
    store: &mut OpenedStore,
) -> Result<(), OpenError> {
    let geometry = store.geometry;
    let span =
        Span { start: geometry.registry_start, blocks: 2 * u64::from(geometry.registry_slots) };
    let mut pairs: Vec<[Slot<VolumeRecord>; 2]> = Vec::new();
    pairs.resize_with(geometry.registry_slots as usize, || [Slot::Empty, Slot::Empty]);
    let secret = store.secret;
    io.read([span], |start, bytes| {
        let addrs = (start.get()..).map(BlockAddr::new);
        for (addr, block) in addrs.zip(bytes.chunks_exact(BLOCK)) {
            let index = (addr.get() - span.start.get()) as usize;
            pairs[index / 2][index % 2] = VolumeRecord::decode_slot(block, addr, secret);
        }
    })
    .map_err(failed("reading the volume registry"))?;
    for (slot, pair) in (0u32..).zip(pairs) {
        match choose_slot(pair, |record| record.generation) {
            SlotPair::Empty => {}
            SlotPair::Record(record, damage) => {
                if let Some(damage) = damage {
                    let place = format!("volume {:?} (registry slot {slot})", record.name);
                    let what = format!("an older record is used: {damage}");
                    store.findings.push(Finding::new(Severity::Warning, place, what));
                }
                read_volume(io, store, slot, record);
            }
            SlotPair::Damaged(damage) => {
                store.faults.push(format!("registry slot {slot}: {damage}"));
                store.directory.add_unreadable(slot);
            }
        }
    }
    Ok(())
}

/// Reads a volume's log and puts the volume into the directory, as good or as faulted.
fn read_volume<D: Device>(
    io: &mut Blocking<'_, D>,
    store: &mut OpenedStore,
    slot: u32,
    record: VolumeRecord,
) {
    let copy = record.clone();
    let outcome = check_root(store, record.root, record.deleted)
        .and_then(|()| read_log(io, store, &record))
        .and_then(|(log, log_blocks)| {
            store.directory.add(VolumeEntry { slot, record, log, log_blocks })
        });
    if let Err(fault) = outcome {
        let VolumeRecord { id, name, .. } = &copy;
        store.faults.push(format!("volume {name:?} (id {id}, registry slot {slot}): {fault}"));
        store.directory.add_faulted(slot, &copy, fault);
    }
}

/// Nobody reads the tree of what is deleted, and the collector may have reclaimed it.
pub(super) fn check_root(
    store: &OpenedStore,
    root: BlockAddr,
    deleted: bool,
) -> Result<(), String> {
    if deleted || store.extents.holds(root, ExtentType::Metadata) {
        Ok(())
    } else {
        Err(format!("its root, block {root}, is not in a metadata extent"))
    }
}

/// The entries of a log, oldest first, and the blocks they lie in.
pub(super) type Log = (Vec<LogEntry>, Vec<BlockAddr>);

/// Walks a log back from its tail. The sequence each block must have falls with every step, so a
/// chain that loops or wanders is found at once.
pub(super) fn read_log<D: Device>(
    io: &mut Blocking<'_, D>,
    store: &OpenedStore,
    record: &VolumeRecord,
) -> Result<Log, String> {
    let per_block = LOG_ENTRIES_PER_BLOCK as u64;
    let mut newest_first = Vec::new();
    let mut next = record.log_tail;
    let mut left = record.log_count;
    let mut block = [0; BLOCK];
    while left > 0 {
        let addr = next.ok_or("its snapshot log ends early")?;
        if !store.extents.holds(addr, ExtentType::Metadata) {
            return Err(format!("its snapshot log leads to block {addr}, outside metadata"));
        }
        io.read_into(addr, &mut block)
            .map_err(|error| format!("its snapshot log cannot be read at block {addr}: {error}"))?;
        let first = (left - 1) / per_block * per_block;
        let count = (left - first) as usize;
        let read = decode_log_block(&block, addr, record.id, first, count, store.secret)
            .map_err(|damage: Damage| damage.to_string())?;
        for entry in &read.entries {
            check_root(store, entry.root, entry.deleted)
                .map_err(|fault| format!("snapshot {}: {fault}", entry.sequence))?;
            if entry.size.blocks_ceil() > tree_blocks(entry.height) {
                return Err(format!("snapshot {} does not fit its tree", entry.sequence));
            }
        }
        next = read.previous;
        left = first;
        newest_first.push((addr, read.entries));
    }
    newest_first.reverse();
    let blocks = newest_first.iter().map(|(addr, _)| *addr).collect();
    let log = newest_first.into_iter().flat_map(|(_, entries)| entries).collect();
    Ok((log, blocks))
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
