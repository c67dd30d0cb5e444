//! The volumes of a store: names, identities, registry slots.

use bessel_reactor::units::BlockAddr;

use crate::format::{LogEntry, VolumeRecord};

/// A volume as the registry has it, with its snapshot log: all that a shard needs to open it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeEntry {
    /// Where its record lives in the registry.
    pub slot: u32,
    /// Its current record.
    pub record: VolumeRecord,
    /// Its snapshots, oldest first.
    pub log: Vec<LogEntry>,
    /// The blocks its log lies in, oldest first: entry `n` is in block `n / 24`.
    pub log_blocks: Vec<BlockAddr>,
}
