//! What a collection begins with, read from the device while shards write to it: the registry, the
//! snapshot logs, and the bitmaps.
//!
//! A sector whose write is seen half done is damaged, and is read again. An older record than the one
//! that is being written is as good: the tree that it names is the one that the newer one's was
//! derived from.

use bessel_reactor::device::Device;
use bessel_reactor::units::BLOCK_SIZE;

use super::mark::Marks;
use super::{CollectError, DeletedVolume};
use crate::blocking::Blocking;
use crate::forest::Tree;
use crate::format::{Bitmap, ExtentMap, ExtentType, Geometry, SlotPair, VolumeRecord};
use crate::planted::{self, Bug};
use crate::request::VolumeId;
use crate::store::{LogWalk, read_record};
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

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Survey {
    geometry: Geometry,
    secret: u64,
    extents: ExtentMap,
    next_slot: u32,
    logs: Vec<(VolumeId, LogWalk)>,
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
        } else if let Some((volume, mut walk)) = self.logs.pop() {
            for _ in 0..LOG_BLOCKS {
                self.read_log_block(volume, &mut walk, marks, io)?;
            }
            if walk.left() > 0 {
                self.logs.push((volume, walk));
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
                SlotPair::Record(_, damage) => damage.is_some(),
            },
        )?;
        let record = match read {
            SlotPair::Empty => return Ok(()),
            SlotPair::Record(record, None) => record,
            // Also beside a deletion: it may have been that of a newer volume.
            SlotPair::Damaged(damage) | SlotPair::Record(_, Some(damage)) => {
                return Err(CollectError::Damaged(format!("registry slot {slot}: {damage}")));
            }
        };
        let VolumeRecord { id, generation, root, height, .. } = record;
        if record.deleted {
            self.deleted.push(DeletedVolume { id, slot, generation });
            return Ok(());
        }
        reader.check_root(root)?;
        marks.root(Tree { root, height });
        self.logs.push((id, LogWalk::new(&record)));
        Ok(())
    }

    /// Reads the next block of a log, if there is one.
    fn read_log_block<D: Device>(
        &self,
        volume: VolumeId,
        walk: &mut LogWalk,
        marks: &mut Marks,
        io: &mut Blocking<'_, D>,
    ) -> Result<(), CollectError> {
        let holds = |block| self.extents.holds(block, ExtentType::Metadata);
        let damaged = |what: &dyn std::fmt::Display| {
            CollectError::Damaged(format!("volume {volume}: {what}"))
        };
        let Some(addr) = walk.next(holds).map_err(|fault| damaged(&fault))? else { return Ok(()) };
        let mut bytes = [0; BLOCK_SIZE as usize];
        let (next, part) = again_while(
            || {
                io.read_into(addr, &mut bytes).map_err(|source| CollectError::Device {
                    what: format!("the snapshot log of volume {volume} at block {addr}"),
                    source,
                })?;
                let mut next = walk.clone();
                let part = next.take(&bytes, self.secret, holds);
                Ok((next, part))
            },
            |(_, part)| part.is_err(),
        )?;
        let part = part.map_err(|fault| damaged(&fault))?;
        if !planted::is(Bug::LogsNotReached) {
            marks.log_block(addr);
        }
        for entry in part.entries.iter().filter(|entry| !entry.deleted) {
            marks.root(Tree { root: entry.root, height: entry.height });
        }
        *walk = next;
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
