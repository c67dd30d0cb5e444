//! Where everything lies: the arithmetic of extents, catalogue, registry and bitmaps.
//!
//! A [`Geometry`] is computed once at format and afterwards read from the superblock and checked
//! against the same arithmetic, so no other code computes an address of a store structure.

use bessel_reactor::units::{BLOCK_SIZE, BlockAddr, ByteCount};

use super::bitmap::Bitmap;
use super::catalogue::CATALOGUE_ENTRIES_PER_BLOCK;

/// Most blocks in a store: 2^44 × 4 KiB = 64 PiB, the reach of an entry's 44 bits.
pub const STORE_BLOCKS_MAX: u64 = 1 << 44;
/// Smallest extent: 1 MiB.
pub const EXTENT_BLOCKS_MIN: u64 = (1 << 20) / BLOCK_SIZE;
/// Largest extent: 256 GiB, so that 2^18 of them make 64 PiB.
pub const EXTENT_BLOCKS_MAX: u64 = (256 << 30) / BLOCK_SIZE;
/// Fewest extents: one for the system, one each for data and metadata, one to spare.
pub const EXTENTS_MIN: u64 = 4;
/// Most extents: the catalogue then has 2185 blocks, and the map in memory 256 KiB.
pub const EXTENTS_MAX: u64 = 1 << 18;
/// Bits in one bitmap block: 8 sealed sectors of 496 bytes.
pub const BITMAP_BITS: u64 = Bitmap::BITS as u64;

const _: () = assert!(EXTENT_BLOCKS_MAX * EXTENTS_MAX == STORE_BLOCKS_MAX);

const HOST_START: u64 = 32;
const HOST_SLOTS: u64 = 16;
const GROUP_START: u64 = HOST_START + 2 * HOST_SLOTS;
const GROUP_SLOTS: u64 = 16;
const CATALOGUE_START: u64 = GROUP_START + 2 * GROUP_SLOTS;
const REGISTRY_SLOTS_MAX: u64 = 4096;
/// A store that cannot hold this many volumes is refused at format: its extents are too small.
const REGISTRY_SLOTS_MIN: u64 = 16;

const _: () = assert!(CATALOGUE_START == 96);

/// Extents by default: at least this many, so that data, metadata and later hosts get their own.
const DEFAULT_EXTENTS: u64 = 64;
/// Largest extent by default: 2 GiB, the paper's.
const DEFAULT_EXTENT_BLOCKS_MAX: u64 = (2 << 30) / BLOCK_SIZE;

/// Where everything lies on a store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Blocks in an extent, a power of two.
    pub extent_blocks: u64,
    /// Extents in the store.
    pub extent_count: u64,
    /// Bitmap blocks at the start of each data or metadata extent.
    pub bitmap_blocks: u64,
    /// First block of the host table: two blocks a host.
    pub host_start: BlockAddr,
    /// Hosts it has room for.
    pub host_slots: u32,
    /// First block of the group table: two blocks a group.
    pub group_start: BlockAddr,
    /// Groups it has room for.
    pub group_slots: u32,
    /// First block of the extent catalogue.
    pub catalogue_start: BlockAddr,
    /// Blocks of the extent catalogue.
    pub catalogue_blocks: u64,
    /// First block of the volume registry: two blocks a volume.
    pub registry_start: BlockAddr,
    /// Volumes it has room for.
    pub registry_slots: u32,
}

/// Why a store cannot have this shape.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GeometryError {
    /// Not a power of two, too small or too large.
    #[error("extent size {}: must be a power of two from 1MiB to 256GiB", .0.exact())]
    ExtentSize(ByteCount),
    /// Fewer than four extents fit.
    #[error(
        "{capacity} is too small: a store has at least 4 extents of {extent}; use a larger \
         device{hint}",
        capacity = .capacity.exact(),
        extent = .extent.human(),
        hint = if .extent.get() > 1 << 20 { " or a smaller --extent-size" } else { "" }
    )]
    TooSmall {
        /// What there is.
        capacity: ByteCount,
        /// The extent size asked for.
        extent: ByteCount,
    },
    /// More than 2^18 extents, or a catalogue that leaves no room for volumes in extent 0.
    #[error(
        "extents of {} are too small for {}: their catalogue would not fit; use a larger \
         --extent-size",
        .extent.human(), .capacity.human()
    )]
    TooManyExtents {
        /// What there is.
        capacity: ByteCount,
        /// The extent size asked for.
        extent: ByteCount,
    },
}

impl Geometry {
    /// The shape of a store on a device of this size. Whole extents only; what is left over at the
    /// end stays unused, as does everything past 64 PiB.
    ///
    /// # Errors
    /// When there is no such store.
    pub fn plan(
        capacity: ByteCount,
        extent_size: Option<ByteCount>,
    ) -> Result<Self, GeometryError> {
        let capacity_blocks = capacity.blocks_floor().min(STORE_BLOCKS_MAX);
        let extent_blocks = match extent_size {
            None => default_extent_blocks(capacity_blocks),
            Some(size) => {
                let blocks = size.blocks_floor();
                let fits = (EXTENT_BLOCKS_MIN..=EXTENT_BLOCKS_MAX).contains(&blocks);
                if !size.get().is_power_of_two() || !fits {
                    return Err(GeometryError::ExtentSize(size));
                }
                blocks
            }
        };
        let extent = ByteCount::from_blocks(extent_blocks);
        let extent_count = capacity_blocks / extent_blocks;
        if extent_count < EXTENTS_MIN {
            return Err(GeometryError::TooSmall { capacity, extent });
        }
        Self::of(extent_blocks, extent_count)
            .ok_or(GeometryError::TooManyExtents { capacity, extent })
    }

    /// The one shape that so many extents of this size have, if they have one.
    pub(super) fn of(extent_blocks: u64, extent_count: u64) -> Option<Self> {
        let blocks_fit = extent_blocks.is_power_of_two()
            && (EXTENT_BLOCKS_MIN..=EXTENT_BLOCKS_MAX).contains(&extent_blocks);
        if !blocks_fit || !(EXTENTS_MIN..=EXTENTS_MAX).contains(&extent_count) {
            return None;
        }
        let catalogue_blocks = extent_count.div_ceil(CATALOGUE_ENTRIES_PER_BLOCK as u64);
        let registry_start = CATALOGUE_START + catalogue_blocks;
        let room = extent_blocks.checked_sub(registry_start)?;
        let registry_slots = (room / 2).min(REGISTRY_SLOTS_MAX);
        if registry_slots < REGISTRY_SLOTS_MIN {
            return None;
        }
        Some(Self {
            extent_blocks,
            extent_count,
            bitmap_blocks: extent_blocks.div_ceil(BITMAP_BITS),
            host_start: BlockAddr::new(HOST_START),
            host_slots: HOST_SLOTS as u32,
            group_start: BlockAddr::new(GROUP_START),
            group_slots: GROUP_SLOTS as u32,
            catalogue_start: BlockAddr::new(CATALOGUE_START),
            catalogue_blocks,
            registry_start: BlockAddr::new(registry_start),
            registry_slots: registry_slots as u32,
        })
    }

    /// Size of the store.
    pub fn size(&self) -> ByteCount {
        ByteCount::from_blocks(self.extent_blocks * self.extent_count)
    }

    /// Blocks of an extent that can be allocated: all but its bitmap.
    pub fn usable_blocks(&self) -> u64 {
        self.extent_blocks - self.bitmap_blocks
    }

    /// The first block of an extent.
    ///
    /// # Panics
    /// When there is no such extent; so do all functions here that take one.
    pub fn extent_start(&self, extent: u64) -> BlockAddr {
        assert!(extent < self.extent_count, "extent {extent} of {}", self.extent_count);
        BlockAddr::new(extent * self.extent_blocks)
    }

    /// The extent a block lies in; past `extent_count` for a block outside the store.
    pub fn extent_of(&self, block: BlockAddr) -> u64 {
        block.get() / self.extent_blocks
    }

    /// Where generation `generation` of a volume's record lives.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn registry_slot(&self, slot: u32, generation: u64) -> BlockAddr {
        assert!(slot < self.registry_slots, "registry slot {slot} of {}", self.registry_slots);
        self.registry_start.add(2 * u64::from(slot) + generation % 2)
    }

    /// Where generation `generation` of a host's record lives.
    ///
    /// # Panics
    /// When there is no such host.
    pub fn host_slot(&self, host: u16, generation: u64) -> BlockAddr {
        assert!(u32::from(host) < self.host_slots, "host {host} of {}", self.host_slots);
        self.host_start.add(2 * u64::from(host) + generation % 2)
    }

    /// The catalogue block that describes an extent, and the first extent that block describes.
    pub fn catalogue_block_of(&self, extent: u64) -> (BlockAddr, u64) {
        assert!(extent < self.extent_count, "extent {extent} of {}", self.extent_count);
        let index = extent / CATALOGUE_ENTRIES_PER_BLOCK as u64;
        (self.catalogue_start.add(index), index * CATALOGUE_ENTRIES_PER_BLOCK as u64)
    }

    /// Bitmap block `index` of an extent.
    ///
    /// # Panics
    /// When there is no such bitmap block.
    pub fn bitmap_block(&self, extent: u64, index: u64) -> BlockAddr {
        assert!(index < self.bitmap_blocks, "bitmap block {index} of {}", self.bitmap_blocks);
        self.extent_start(extent).add(index)
    }

    /// The bitmap block and the bit in it that say whether `block` is allocated.
    ///
    /// # Panics
    /// When the block is outside the store.
    pub fn bitmap_bit_of(&self, block: BlockAddr) -> (BlockAddr, u32) {
        let in_extent = block.get() % self.extent_blocks;
        let bitmap = self.bitmap_block(self.extent_of(block), in_extent / BITMAP_BITS);
        (bitmap, (in_extent % BITMAP_BITS) as u32)
    }

    /// The block that bit `bit` of bitmap block `index` of an extent stands for.
    pub fn block_of_bit(&self, extent: u64, index: u64, bit: u32) -> BlockAddr {
        self.extent_start(extent).add(index * BITMAP_BITS + u64::from(bit))
    }

    /// Bitmap block `index` of an extent that was just initialised: set are the bitmap's own
    /// blocks and the bits past the end of the extent. No bitmap may offer these: who reads one
    /// [includes](Bitmap::include) this first.
    pub fn fresh_bitmap(&self, index: u64) -> Bitmap {
        assert!(index < self.bitmap_blocks, "bitmap block {index} of {}", self.bitmap_blocks);
        let first = index * BITMAP_BITS;
        let own = self.bitmap_blocks.saturating_sub(first).min(BITMAP_BITS) as u32;
        let inside = (self.extent_blocks - first).min(BITMAP_BITS) as u32;
        let mut bitmap = Bitmap::new();
        bitmap.set_range(0, own);
        bitmap.set_range(inside, Bitmap::BITS - inside);
        bitmap
    }

    /// Free bits of [`Geometry::fresh_bitmap`].
    pub fn fresh_bitmap_free(&self, index: u64) -> u32 {
        let first = index * BITMAP_BITS;
        let own = self.bitmap_blocks.saturating_sub(first).min(BITMAP_BITS);
        let inside = (self.extent_blocks - first).min(BITMAP_BITS);
        inside.saturating_sub(own) as u32
    }
}

/// The largest power of two up to 2 GiB that gives 64 extents, at least 1 MiB; for a store of more
/// than 2^18 of those, the smallest that gives no more than 2^18.
fn default_extent_blocks(capacity_blocks: u64) -> u64 {
    let mut blocks = DEFAULT_EXTENT_BLOCKS_MAX;
    while blocks > EXTENT_BLOCKS_MIN && capacity_blocks / blocks < DEFAULT_EXTENTS {
        blocks /= 2;
    }
    while capacity_blocks / blocks > EXTENTS_MAX {
        blocks *= 2;
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(bytes: u64) -> Geometry {
        Geometry::plan(ByteCount::new(bytes), None).unwrap()
    }

    #[test]
    fn default_shapes() {
        let shape = |bytes| {
            let geometry = plan(bytes);
            (geometry.extent_blocks * BLOCK_SIZE, geometry.extent_count)
        };
        assert_eq!(shape(4 << 20), (1 << 20, 4));
        assert_eq!(shape((64 << 20) + 5000), (1 << 20, 64));
        assert_eq!(shape(8 << 30), (128 << 20, 64));
        assert_eq!(shape(1 << 40), (2 << 30, 512));
        assert_eq!(shape(1 << 49), (2 << 30, 1 << 18));
        assert_eq!(shape(1 << 50), (4 << 30, 1 << 18));
        assert_eq!(shape(64 << 50), (256 << 30, 1 << 18));
        assert_eq!(shape(u64::MAX), (256 << 30, 1 << 18), "the rest is out of an entry's reach");
    }

    #[test]
    fn parts_of_the_system_extent_do_not_overlap() {
        for bytes in [4 << 20, 1 << 30, 1 << 40, 64 << 50] {
            let g = plan(bytes);
            assert!(g.catalogue_blocks * CATALOGUE_ENTRIES_PER_BLOCK as u64 >= g.extent_count);
            assert_eq!(g.catalogue_start.add(g.catalogue_blocks), g.registry_start);
            let end = g.registry_start.add(2 * u64::from(g.registry_slots));
            assert!(end.get() <= g.extent_blocks);
        }
        assert_eq!(plan(4 << 20).registry_slots, (256 - 97) / 2);
        assert_eq!(plan(1 << 40).registry_slots, 4096);
    }

    #[test]
    fn impossible_shapes_say_why() {
        let error = |bytes, extent| {
            Geometry::plan(ByteCount::new(bytes), Some(ByteCount::new(extent))).unwrap_err()
        };
        assert!(matches!(error(1 << 30, 3 << 20), GeometryError::ExtentSize(_)));
        assert!(matches!(error(1 << 30, 1 << 19), GeometryError::ExtentSize(_)));
        assert!(matches!(error(1 << 30, 0), GeometryError::ExtentSize(_)));
        assert!(matches!(error(1 << 60, 1 << 39), GeometryError::ExtentSize(_)));
        assert!(matches!(error(1 << 30, 1 << 29), GeometryError::TooSmall { .. }));
        assert!(matches!(error(256 << 30, 1 << 20), GeometryError::TooManyExtents { .. }));
        let text = Geometry::plan(ByteCount::new(1 << 20), None).unwrap_err().to_string();
        assert_eq!(
            text,
            "1MiB is too small: a store has at least 4 extents of 1MiB; use a larger device"
        );
    }

    #[test]
    fn every_block_has_its_bit_and_every_bit_its_block() {
        let g = Geometry::of(1 << 17, 5).unwrap();
        assert_eq!(g.bitmap_blocks, 5);
        for block in [1 << 17, (1 << 17) + 31744, (3 << 17) - 1, (5 << 17) - 1] {
            let block = BlockAddr::new(block);
            let (bitmap, bit) = g.bitmap_bit_of(block);
            let extent = g.extent_of(block);
            let index = bitmap.get() - g.extent_start(extent).get();
            assert_eq!(g.block_of_bit(extent, index, bit), block);
        }
    }

    #[test]
    fn a_fresh_bitmap_offers_exactly_the_usable_blocks() {
        // The last has so many bitmap blocks that they would not be covered by a part of a block.
        for extent_blocks in [256, 1 << 15, 1 << 16, 1 << 17, EXTENT_BLOCKS_MAX] {
            let g = Geometry::of(extent_blocks, 4).unwrap();
            let free: u64 = (0..g.bitmap_blocks)
                .map(|index| {
                    let free = g.fresh_bitmap(index).count_free();
                    assert_eq!(free, g.fresh_bitmap_free(index));
                    u64::from(free)
                })
                .sum();
            assert_eq!(free, g.usable_blocks(), "extent of {extent_blocks}");
        }
    }
}
