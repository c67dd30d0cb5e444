//! Walking a snapshot log: from its newest block back, each block checked before it is believed.
//!
//! The chain is on the device, so it is hostile: it may loop, wander into another log, or end early. The
//! sequence that a block must begin with falls with every step, so each of these is found at its first
//! wrong step, and a walk takes no more steps than the log has blocks.
//!
//! Pure: whoever walks reads the blocks, with a device of its own kind and at its own pace. Opening reads
//! the newest block and no more; a shard walks on in the background; `bessel check` walks to the end.

use bessel_reactor::device::{Device, DeviceError};
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr};

use super::OpenedStore;
use crate::blocking::Blocking;
use crate::check::Structure;
use crate::format::{
    Damage, ExtentType, LOG_ENTRIES_PER_BLOCK, LogEntry, VolumeRecord, decode_log_block,
    tree_blocks,
};
use crate::request::VolumeId;

/// What is wrong with a log.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{what}")]
pub struct LogFault {
    /// What is damaged: the log, or the root that an entry names.
    pub structure: Structure,
    /// Where, if it is one block.
    pub block: Option<BlockAddr>,
    /// What is wrong, with the block in it.
    pub what: String,
}

/// One block of a log, read and checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogPart {
    /// Where it lies.
    pub addr: BlockAddr,
    /// Its entries, in order, the first of them at a multiple of 24.
    pub entries: Vec<LogEntry>,
    /// The block before it.
    pub previous: Option<BlockAddr>,
}

impl LogPart {
    /// The sequence of its first entry.
    pub fn first(&self) -> u64 {
        self.entries.first().map_or(0, |entry| entry.sequence)
    }
}

/// See the module's documentation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogWalk {
    volume: VolumeId,
    next: Option<BlockAddr>,
    left: u64,
}

impl LogWalk {
    /// From the newest block of the log that this record names.
    pub fn new(record: &VolumeRecord) -> Self {
        Self { volume: record.id, next: record.log_tail, left: record.log_count }
    }

    /// Onwards from a block that was read already.
    pub fn before(volume: VolumeId, part: &LogPart) -> Self {
        Self { volume, next: part.previous, left: part.first() }
    }

    /// Where the block to read next lies, whether it can be one or not.
    pub(crate) fn link(&self) -> Option<BlockAddr> {
        self.next.filter(|_| self.left > 0)
    }

    /// Entries that have not been read: all those before this sequence.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// The block to read next; none when there is no more. `holds` says whether a block can be one of a
    /// log: whether it lies in a metadata extent.
    ///
    /// # Errors
    /// When the log leads nowhere.
    pub fn next(
        &self,
        mut holds: impl FnMut(BlockAddr) -> bool,
    ) -> Result<Option<BlockAddr>, LogFault> {
        if self.left == 0 {
            return Ok(None);
        }
        let Some(addr) = self.next else {
            return Err(fault(None, "its snapshot log ends early"));
        };
        if !holds(addr) {
            let what = format!("its snapshot log leads to block {addr}, outside metadata");
            return Err(fault(Some(addr), what));
        }
        Ok(Some(addr))
    }

    /// Takes in the block that [`LogWalk::next`] has named. `holds` says the same of the roots in it.
    ///
    /// # Errors
    /// When it is damaged, or not the block that belongs there: the walk is over then.
    ///
    /// # Panics
    /// When there is no next block.
    pub fn take(
        &mut self,
        block: &[u8],
        secret: u64,
        mut holds: impl FnMut(BlockAddr) -> bool,
    ) -> Result<LogPart, LogFault> {
        let addr = self.next.filter(|_| self.left > 0).expect("the walk has named a block");
        let first = first_of_block(self.left - 1);
        let count = (self.left - first) as usize;
        let read = decode_log_block(block, addr, self.volume, first, count, secret)
            .map_err(|damage: Damage| fault(Some(addr), damage.to_string()))?;
        for entry in &read.entries {
            let sequence = entry.sequence;
            // Nobody reads the tree of what is deleted, and it may have been reclaimed.
            if !entry.deleted && !holds(entry.root) {
                let root = entry.root;
                let what = format!(
                    "snapshot {sequence}: its root, block {root}, is not in a metadata extent"
                );
                return Err(LogFault { structure: Structure::Node, block: Some(root), what });
            }
            if entry.size.blocks_ceil() > tree_blocks(entry.height) {
                let what =
                    format!("snapshot {sequence} does not fit its tree, as block {addr} has it");
                return Err(fault(Some(addr), what));
            }
        }
        (self.next, self.left) = (read.previous, first);
        Ok(LogPart { addr, entries: read.entries, previous: read.previous })
    }

    /// What is wrong when the device does not give the next block.
    pub fn unreadable(&self, error: DeviceError) -> LogFault {
        let place = self.next.map_or_else(|| "no block".to_owned(), |addr| format!("block {addr}"));
        fault(self.next, format!("its snapshot log cannot be read at {place}: {error}"))
    }
}

/// The sequence of the first entry in the block that holds `sequence`.
pub(crate) const fn first_of_block(sequence: u64) -> u64 {
    sequence - sequence % LOG_ENTRIES_PER_BLOCK as u64
}

fn fault(block: Option<BlockAddr>, what: impl Into<String>) -> LogFault {
    LogFault { structure: Structure::Log, block, what: what.into() }
}

/// Does one step of a walk: reads the next block, if there is one.
pub(super) fn step<D: Device>(
    io: &mut Blocking<'_, D>,
    walk: &mut LogWalk,
    secret: u64,
    holds: &mut impl FnMut(BlockAddr) -> bool,
) -> Result<Option<LogPart>, LogFault> {
    let Some(addr) = walk.next(&mut *holds)? else { return Ok(None) };
    let mut block = [0; BLOCK_SIZE as usize];
    io.read_into(addr, &mut block).map_err(|error| walk.unreadable(error))?;
    walk.take(&block, secret, holds).map(Some)
}

/// A log, read as far as it can be: all of it when there is no fault.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct WholeLog {
    /// Its entries, oldest first. With a fault the older ones are missing.
    pub entries: Vec<LogEntry>,
    /// The blocks they lie in, oldest first.
    pub blocks: Vec<BlockAddr>,
    /// Why there is no more.
    pub fault: Option<LogFault>,
}

impl WholeLog {
    pub(super) fn read<D: Device>(
        io: &mut Blocking<'_, D>,
        record: &VolumeRecord,
        secret: u64,
        mut holds: impl FnMut(BlockAddr) -> bool,
    ) -> Self {
        let (mut walk, mut parts, mut fault) = (LogWalk::new(record), Vec::new(), None);
        loop {
            match step(io, &mut walk, secret, &mut holds) {
                Ok(Some(part)) => parts.push(part),
                Ok(None) => break,
                Err(why) => {
                    fault = Some(why);
                    break;
                }
            }
        }
        parts.reverse();
        let blocks = parts.iter().map(|part| part.addr).collect();
        Self { entries: parts.into_iter().flat_map(|part| part.entries).collect(), blocks, fault }
    }
}

/// Reads the log that a record names, all of it, as it is on the device now. It takes as long as the
/// log is long: for offline work.
pub fn read_log<D: Device>(device: &mut D, store: &OpenedStore, record: &VolumeRecord) -> WholeLog {
    let holds = |block| store.extents.holds(block, ExtentType::Metadata);
    WholeLog::read(&mut Blocking::new(device), record, store.secret, holds)
}
