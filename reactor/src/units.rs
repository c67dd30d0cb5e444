//! Every unit that crosses a function boundary, and every conversion between them.
//!
//! A block index, a byte offset, and a guest sector are all 64-bit numbers; mixing two of them is
//! the most expensive kind of storage bug. Here each is its own type, and each conversion says
//! how it rounds.
//!
//! They are inlined by word and not by the linker alone: tests are built without link-time optimisation, and calls
//! for these and for tags were 30 % of the simulation's time.

use std::fmt;

/// Bytes in a sector, the unit of virtio-blk requests (virtio 1.2, 5.2.6).
pub const SECTOR_SIZE: u64 = 512;
/// Bytes in a block, the unit of mapping and allocation.
pub const BLOCK_SIZE: u64 = 4096;
/// Sectors in a block.
pub const SECTORS_PER_BLOCK: u64 = BLOCK_SIZE / SECTOR_SIZE;

macro_rules! unit {
    ($(#[$meta:meta])* $name:ident, $suffix:literal) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a bare number, at the edge where it has just been read or computed.
            #[inline]
            pub const fn new(value: u64) -> Self {
                Self(value)
            }

            /// The bare number, for arithmetic and for the wire.
            #[inline]
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!("{}", $suffix), self.0)
            }
        }
    };
}

unit!(
    /// Physical block number in the store. Counts blocks, not bytes.
    BlockAddr,
    "b"
);
unit!(
    /// Block number inside a volume, before mapping.
    VolumeBlock,
    "vb"
);
unit!(
    /// Byte position on the device.
    ByteOffset,
    "@B"
);
unit!(
    /// A length in bytes.
    ByteCount,
    "B"
);
unit!(
    /// Position in a volume in 512-byte sectors, as virtio-blk requests give it.
    Sector,
    "s"
);

impl BlockAddr {
    /// Where the block starts on the device.
    #[inline]
    pub const fn offset(self) -> ByteOffset {
        ByteOffset(self.0 * BLOCK_SIZE)
    }

    /// The block `count` places further on.
    #[inline]
    pub const fn add(self, count: u64) -> Self {
        Self(self.0 + count)
    }
}

impl VolumeBlock {
    /// The first sector of the block.
    #[inline]
    pub const fn sector(self) -> Sector {
        Sector(self.0 * SECTORS_PER_BLOCK)
    }

    /// The block `count` places further on.
    #[inline]
    pub const fn add(self, count: u64) -> Self {
        Self(self.0 + count)
    }
}

impl Sector {
    /// The block this sector lies in; rounds down.
    #[inline]
    pub const fn block(self) -> VolumeBlock {
        VolumeBlock(self.0 / SECTORS_PER_BLOCK)
    }

    /// Bytes between the start of the sector's block and the sector.
    #[inline]
    pub const fn offset_in_block(self) -> u64 {
        self.0 % SECTORS_PER_BLOCK * SECTOR_SIZE
    }

    /// The sector `count` places further on.
    #[inline]
    pub const fn add(self, count: u64) -> Self {
        Self(self.0 + count)
    }
}

impl ByteOffset {
    /// The position `bytes` further on.
    #[inline]
    pub const fn add(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

impl ByteCount {
    /// Whole blocks in this many bytes; rounds down.
    #[inline]
    pub const fn blocks_floor(self) -> u64 {
        self.0 / BLOCK_SIZE
    }

    /// Blocks needed to hold this many bytes; rounds up.
    #[inline]
    pub const fn blocks_ceil(self) -> u64 {
        self.0.div_ceil(BLOCK_SIZE)
    }

    /// Whole sectors in this many bytes; rounds down.
    #[inline]
    pub const fn sectors(self) -> u64 {
        self.0 / SECTOR_SIZE
    }

    /// The length of `count` blocks.
    #[inline]
    pub const fn from_blocks(count: u64) -> Self {
        Self(count * BLOCK_SIZE)
    }

    /// The length of `count` sectors.
    #[inline]
    pub const fn from_sectors(count: u64) -> Self {
        Self(count * SECTOR_SIZE)
    }

    /// The length as people write it: `4GiB`, `512MiB`, or bytes when it is no round number.
    pub fn human(self) -> String {
        const UNITS: [(&str, u32); 5] =
            [("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        for (name, shift) in UNITS {
            let unit = 1u64 << shift;
            if self.0 >= unit {
                if self.0.is_multiple_of(unit) {
                    return format!("{}{name}", self.0 / unit);
                }
                return format!("{:.1}{name}", self.0 as f64 / unit as f64);
            }
        }
        format!("{}B", self.0)
    }

    /// As [`ByteCount::human`] where that says all, else every byte: for refusals, in which rounding
    /// would hide what is wrong.
    pub fn exact(self) -> String {
        let human = self.human();
        if human.contains('.') { format!("{} bytes", self.0) } else { human }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_knows_its_block_and_its_place_in_it() {
        let sector = Sector::new(8 * 7 + 3);
        assert_eq!(sector.block(), VolumeBlock::new(7));
        assert_eq!(sector.offset_in_block(), 3 * 512);
        assert_eq!(VolumeBlock::new(7).sector(), Sector::new(56));
    }

    #[test]
    fn rounding_is_what_the_name_says() {
        let bytes = ByteCount::new(4097);
        assert_eq!(bytes.blocks_floor(), 1);
        assert_eq!(bytes.blocks_ceil(), 2);
        assert_eq!(bytes.sectors(), 8);
    }

    #[test]
    fn sizes_print_as_people_write_them() {
        assert_eq!(ByteCount::new(4 << 30).human(), "4GiB");
        assert_eq!(ByteCount::new(512 << 20).human(), "512MiB");
        assert_eq!(ByteCount::new(100).human(), "100B");
        assert_eq!(ByteCount::new((3 << 30) / 2).human(), "1.5GiB");
        assert_eq!(ByteCount::new(4096).exact(), "4KiB");
        assert_eq!(ByteCount::new(4097).exact(), "4097 bytes");
    }
}
