//! What each extent holds, shared by every core.
//!
//! A map of one byte an extent, read when a link is checked and changed when an extent is
//! initialised. An extent's type only ever goes from unused to data or metadata, and only after
//! its bitmap and catalogue entry are durable, so a reader that sees the old type merely refuses a
//! link that nobody can have written yet.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use bessel_reactor::units::BlockAddr;

/// What an extent holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum ExtentType {
    /// Outside the store.
    Invalid = 0,
    /// Not yet initialised: no bitmap.
    Unused = 1,
    /// Extent 0: superblocks, hosts, catalogue, registry.
    System = 2,
    /// Guest data.
    Data = 3,
    /// Radix nodes and snapshot logs.
    Metadata = 4,
}

impl ExtentType {
    /// The type with this number on the device.
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::Invalid,
            1 => Self::Unused,
            2 => Self::System,
            3 => Self::Data,
            4 => Self::Metadata,
            _ => return None,
        })
    }
}

/// The types of all extents. A clone is another handle to the same map.
#[derive(Clone, Debug)]
pub struct ExtentMap {
    types: Arc<[AtomicU8]>,
    extent_shift: u32,
    bitmap_blocks: u64,
}

impl ExtentMap {
    /// A map of extents of `extent_blocks`, each with `bitmap_blocks` at its start.
    ///
    /// # Panics
    /// When `extent_blocks` is no power of two.
    pub fn new(extent_blocks: u64, bitmap_blocks: u64, types: &[ExtentType]) -> Self {
        assert!(extent_blocks.is_power_of_two(), "an extent is a power of two blocks");
        Self {
            types: types.iter().map(|&kind| AtomicU8::new(kind as u8)).collect(),
            extent_shift: extent_blocks.trailing_zeros(),
            bitmap_blocks,
        }
    }

    /// Blocks in an extent.
    pub fn extent_blocks(&self) -> u64 {
        1 << self.extent_shift
    }

    /// Extents in the store.
    pub fn extent_count(&self) -> u64 {
        self.types.len() as u64
    }

    /// The type of the extent the block lies in; invalid outside the store.
    #[inline]
    pub fn kind_of(&self, block: BlockAddr) -> ExtentType {
        self.get(block.get() >> self.extent_shift)
    }

    /// The type of an extent; invalid outside the store.
    #[inline]
    pub fn get(&self, extent: u64) -> ExtentType {
        let Some(kind) = usize::try_from(extent).ok().and_then(|index| self.types.get(index))
        else {
            return ExtentType::Invalid;
        };
        // Acquire pairs with `set`: who sees the new type sees what was done before it was set.
        ExtentType::from_number(kind.load(Ordering::Acquire)).expect("only types are stored")
    }

    /// True when the block can hold something of this type: its extent has the type, and the block
    /// is not one of the extent's bitmap blocks.
    #[inline]
    pub fn holds(&self, block: BlockAddr, kind: ExtentType) -> bool {
        let in_extent = block.get() & (self.extent_blocks() - 1);
        self.kind_of(block) == kind && in_extent >= self.bitmap_blocks
    }

    /// Notes that an extent has been initialised, durably.
    ///
    /// # Panics
    /// When there is no such extent.
    pub fn set(&self, extent: u64, kind: ExtentType) {
        self.types[extent as usize].store(kind as u8, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_seen_through_every_handle() {
        let map = ExtentMap::new(256, 1, &[ExtentType::System, ExtentType::Unused]);
        let other = map.clone();
        assert_eq!(other.kind_of(BlockAddr::new(300)), ExtentType::Unused);
        map.set(1, ExtentType::Data);
        assert_eq!(other.kind_of(BlockAddr::new(300)), ExtentType::Data);
        assert!(other.holds(BlockAddr::new(257), ExtentType::Data));
        assert!(!other.holds(BlockAddr::new(256), ExtentType::Data), "the bitmap is no data");
        assert_eq!(other.kind_of(BlockAddr::new(512)), ExtentType::Invalid);
        assert_eq!(other.kind_of(BlockAddr::new(u64::MAX)), ExtentType::Invalid);
    }
}
