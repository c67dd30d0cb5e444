//! What a collection begins with, read from the device while shards write to it: the registry, the
//! snapshot logs, and the bitmaps.
//!
//! A sector whose write is seen half done is damaged, and is read again. An older record than the one
//! that is being written is as good: the tree that it names is the one that the newer one's was
//! derived from.

use bessel_reactor::device::Device;
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr};

use super::mark::Marks;
use super::{CollectError, DeletedVolume};
use crate::blocking::Blocking;
use crate::forest::Tree;
use crate::format::{
    Bitmap, ExtentMap, ExtentType, Geometry, LOG_ENTRIES_PER_BLOCK, SlotPair, VolumeRecord,
    decode_log_block,
};
use crate::planted::{self, Bug};
use crate::request::VolumeId;
use crate::store::read_record;
use crate::walk::{NodeReader, READS_MAX};

/// Registry slots, log blocks and bitmap blocks that are read in one step.
const SLOTS: u32 = 64;
const LOG_BLOCKS: usize = 64;
const BITMAPS: usize = 32;

/// A bitmap block as it was at the checkpoint.
#[derive(Debug)]
pub(super) struct BitmapCopy {
    pub(super) extent: u64,
    /// Which of the extent's bitmap blocks.
    pub(super) index: u64,
    pub(super) kind: ExtentType,
    pub(super) bitmap: Box<Bitmap>,
}

/// A log that is read from its newest block on.
#[derive(Debug)]
struct LogCursor {
    volume: VolumeId,
    next: Option<BlockAddr>,
    entries_left: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Survey {
    geometry: Geometry,
    secret: u64,
    extents: ExtentMap,
    next_slot: u32,
    logs: Vec<LogCursor>,
    deleted: Vec<DeletedVolume>,
    /// The next bitmap block: of which extent, and which of its.
    next_bitmap: (u64, u64),
    bitmaps: Vec<BitmapCopy>,
    bitmaps_damaged: u64,
}

impl Survey {
    pub(super) fn new(store: &crate::store::OpenedStore) -> Self {
        Self {
            geometry: store.geometry,
            secret: store.secret,
            extents: store.extents.clone(),
            next_slot: 0,
            logs: Vec::new(),
            deleted: Vec::new(),
            next_bitmap: (1, 0),
            bitmaps: Vec::new(),
            bitmaps_damaged: 0,
        }
    }

    pub(super) fn bitmaps(&self) -> &[BitmapCopy] {
        &self.bitmaps
    }

    pub(super) fn bitmaps_damaged(&self) -> u64 {
        self.bitmaps_damaged
    }

    pub(super) fn deleted_volumes(&self) -> Vec<DeletedVolume> {
        self.deleted.clone()
    }

    /// Reads some more. True when all has been read.
    pub(super) fn step<D: Device>(
        &mut self,
        reader: &NodeReader,
        marks: &mut Marks,
        io: &mut Blocking<'_, D>,
    ) -> Result<bool, CollectError> {
        if self.next_slot < self.geometry.registry_slots {
            let end = self.geometry.registry_slots.min(self.next_slot + SLOTS);
            for slot in self.next_slot..end {
                self.read_slot(slot, reader, marks, io)?;
            }
            self.next_slot = end;
        } else if let Some(mut log) = self.logs.pop() {
            for _ in 0..LOG_BLOCKS {
                if log.entries_left > 0 {
                    self.read_log_block(&mut log, reader, marks, io)?;
                }
            }
            if log.entries_left > 0 {
                self.logs.push(log);
            }
        } else {
            for _ in 0..BITMAPS {
                if !self.read_bitmap(io)? {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    fn read_slot<D: Device>(
        &mut self,
        slot: u32,
        reader: &NodeReader,
        marks: &mut Marks,
        io: &mut Blocking<'_, D>,
    ) -> Result<(), CollectError> {
        let (geometry, secret) = (self.geometry, self.secret);
        let read = again_while(
            || {
                read_record(io, &geometry, secret, slot).map_err(|source| CollectError::Device {
                    what: format!("the volume record in registry slot {slot}"),
                    source,
                })
            },
            |pair| match pair {
                SlotPair::Empty => false,
                SlotPair::Damaged(_) => true,
                SlotPair::Record(record, damage) => damage.is_some() && !record.deleted,
            },
        )?;
        let record = match read {
            SlotPair::Empty => return Ok(()),
            SlotPair::Record(record, None) => record,
            SlotPair::Record(record, Some(_)) if record.deleted => record,
            SlotPair::Damaged(damage) | SlotPair::Record(_, Some(damage)) => {
                return Err(CollectError::Damaged(format!("registry slot {slot}: {damage}")));
            }
        };
        let VolumeRecord { id, generation, root, height, log_tail, log_count, .. } = record;
        if record.deleted {
            self.deleted.push(DeletedVolume { id, slot, generation });
            return Ok(());
        }
        reader.check_root(root)?;
        marks.root(Tree { root, height });
        self.logs.push(LogCursor { volume: id, next: log_tail, entries_left: log_count });
        Ok(())
    }

    fn read_log_block<D: Device>(
        &self,
        log: &mut LogCursor,
        reader: &NodeReader,
        marks: &mut Marks,
        io: &mut Blocking<'_, D>,
    ) -> Result<(), CollectError> {
        let volume = log.volume;
        let of = format!("the snapshot log of volume {volume}");
        let Some(addr) = log.next.filter(|it| self.extents.holds(*it, ExtentType::Metadata)) else {
            return Err(CollectError::Damaged(format!("{of} ends early, or leaves the metadata")));
        };
        let first =
            (log.entries_left - 1) / LOG_ENTRIES_PER_BLOCK as u64 * LOG_ENTRIES_PER_BLOCK as u64;
        let count = (log.entries_left - first) as usize;
        let secret = self.secret;
        let mut bytes = [0; BLOCK_SIZE as usize];
        let block = again_while(
            || {
                io.read_into(addr, &mut bytes).map_err(|source| CollectError::Device {
                    what: format!("{of} at block {addr}"),
                    source,
                })?;
                Ok(decode_log_block(&bytes, addr, volume, first, count, secret))
            },
            Result::is_err,
        )?;
        let block = block.map_err(|damage| CollectError::Damaged(damage.to_string()))?;
        if !planted::is(Bug::LogsNotReached) {
            marks.log_block(addr);
        }
        for entry in block.entries.iter().filter(|entry| !entry.deleted) {
            reader.check_root(entry.root)?;
            marks.root(Tree { root: entry.root, height: entry.height });
        }
        (log.next, log.entries_left) = (block.previous, first);
        Ok(())
    }

    /// Reads the next bitmap block; false when there is none.
    fn read_bitmap<D: Device>(&mut self, io: &mut Blocking<'_, D>) -> Result<bool, CollectError> {
        let (extent, index) = self.next_bitmap;
        if extent == self.geometry.extent_count {
            return Ok(false);
        }
        let kind = self.extents.get(extent);
        let used = matches!(kind, ExtentType::Data | ExtentType::Metadata);
        let last = !used || index + 1 == self.geometry.bitmap_blocks;
        self.next_bitmap = if last { (extent + 1, 0) } else { (extent, index + 1) };
        if !used {
            return Ok(true);
        }
        let addr = self.geometry.bitmap_block(extent, index);
        let secret = self.secret;
        let mut bytes = [0; BLOCK_SIZE as usize];
        let bitmap = again_while(
            || {
                io.read_into(addr, &mut bytes).map_err(|source| CollectError::Device {
                    what: format!("the bitmap of extent {extent} at block {addr}"),
                    source,
                })?;
                Ok(Bitmap::decode(&bytes, addr, secret))
            },
            Result::is_err,
        )?;
        match bitmap {
            Ok(bitmap) => {
                let bitmap = Box::new(bitmap);
                self.bitmaps.push(BitmapCopy { extent, index, kind, bitmap });
            }
            Err(_) => self.bitmaps_damaged += 1,
        }
        Ok(true)
    }
}

/// Reads until what was read is not `damaged`, or has been for so long that no write under way can be why.
fn again_while<T>(
    mut read: impl FnMut() -> Result<T, CollectError>,
    damaged: impl Fn(&T) -> bool,
) -> Result<T, CollectError> {
    for _ in 1..READS_MAX {
        let found = read()?;
        if !damaged(&found) {
            return Ok(found);
        }
    }
    read()
}
