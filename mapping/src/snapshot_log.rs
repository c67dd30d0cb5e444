//! A volume's snapshot log: its entries in memory and the blocks they lie in.
//!
//! Appended in order, 24 entries a block, each block chained to the one before it (FORMAT.md,
//! "Snapshot log"). An entry counts once the volume's record says so; until then a crash leaves
//! bytes that nobody reads. Labels and delete marks change an entry in place.

use bessel_reactor::units::BlockAddr;

use crate::format::{LOG_ENTRIES_PER_BLOCK, LogEntry, encode_log_block};
use crate::request::VolumeId;

#[derive(Debug, Default)]
pub(crate) struct SnapshotLog {
    pub(crate) entries: Vec<LogEntry>,
    pub(crate) blocks: Vec<BlockAddr>,
}

impl SnapshotLog {
    /// True when the next entry needs a block of its own.
    pub(crate) fn needs_block(&self) -> bool {
        self.entries.len() == self.blocks.len() * LOG_ENTRIES_PER_BLOCK
    }

    /// Appends `entry`. `block` must be given exactly when [`SnapshotLog::needs_block`].
    pub(crate) fn append(&mut self, entry: LogEntry, block: Option<BlockAddr>) {
        assert_eq!(self.needs_block(), block.is_some(), "a log block is full or has room");
        assert_eq!(entry.sequence, self.entries.len() as u64, "entries are appended in order");
        self.blocks.extend(block);
        self.entries.push(entry);
    }

    /// Address of the block that holds entry `sequence`.
    pub(crate) fn block_of(&self, sequence: u64) -> BlockAddr {
        self.blocks[sequence as usize / LOG_ENTRIES_PER_BLOCK]
    }

    /// Writes the block that holds entry `sequence` into `out`, as it should be on the device.
    pub(crate) fn image(&self, out: &mut [u8], sequence: u64, volume: VolumeId, secret: u64) {
        let index = sequence as usize / LOG_ENTRIES_PER_BLOCK;
        let first = index * LOG_ENTRIES_PER_BLOCK;
        let last = self.entries.len().min(first + LOG_ENTRIES_PER_BLOCK);
        let previous = index.checked_sub(1).map(|previous| self.blocks[previous]);
        let entries = &self.entries[first..last];
        encode_log_block(out, self.blocks[index], previous, volume, first as u64, entries, secret);
    }

    /// The newest entry with this label that is not deleted.
    pub(crate) fn by_label(&self, label: &str) -> Option<&LogEntry> {
        let live = |entry: &&LogEntry| !entry.deleted && entry.label.as_deref() == Some(label);
        self.entries.iter().rev().find(live)
    }
}
