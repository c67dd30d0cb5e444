//! The radix tree in memory: finding where a block lives, and making the way to it writable.
//!
//! A node has 512 entries of nine address bits; trees have three or four levels (Parallax 3.2.1).
//! A read-only link makes everything below it read-only (3.3.2), so a path is writable when each
//! of its links is.

mod lookup;
mod writable;

pub(crate) use lookup::{KnownLeaf, Located, Missing};
pub(crate) use writable::Path;

use bessel_reactor::units::VolumeBlock;

use crate::format::NODE_BITS;

/// The slot of a node of `level` that leads to `block`.
pub(crate) const fn slot_at(block: VolumeBlock, level: u8) -> usize {
    (block.get() >> (NODE_BITS * (level as u32 - 1))) as usize & ((1 << NODE_BITS) - 1)
}

/// Blocks below one slot of a node of `level`.
pub(crate) const fn slot_span(level: u8) -> u64 {
    1 << (NODE_BITS * (level as u32 - 1))
}
