//! What has been reached so far, by block.
//!
//! Memory: three bits and a byte for each block of the parts that something reaches, one bit for
//! each block of other initialised extents, nothing for the rest. A TiB in use costs 350 MiB.

use bessel_reactor::units::BlockAddr;

use super::{Path, Place};
use crate::format::{BITMAP_BITS, Bitmap, Geometry};

/// What it means that a block was reached, by this path, now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Reached {
    /// For the first time: what lies below it has not been looked at.
    pub(super) first: bool,
    /// Its bitmap says it is free.
    pub(super) free: bool,
    /// Why it should not have been reached by this path.
    pub(super) conflict: Option<&'static str>,
}

/// The part of an extent that one bitmap block covers.
struct Part {
    allocated: BitmapRead,
    seen: Option<Box<Seen>>,
}

/// A bitmap block as it is on the device.
pub(super) enum BitmapRead {
    /// Everything counts as allocated: nothing of it is handed out.
    Damaged,
    /// It offered what it must not, and does not here.
    Amended(Box<Bitmap>),
    /// As it is.
    Whole(Box<Bitmap>),
}

impl BitmapRead {
    /// The bits, unless they are damaged.
    pub(super) fn bitmap(&self) -> Option<&Bitmap> {
        match self {
            Self::Damaged => None,
            Self::Amended(bitmap) | Self::Whole(bitmap) => Some(bitmap),
        }
    }
}

/// What was reached of a part.
struct Seen {
    reached: Bitmap,
    /// By a writable path.
    owned: Bitmap,
    /// A fingerprint of the place each block was first reached at. A full place would take eight
    /// bytes a block; one byte finds a wrong place 254 times in 255, and never cries wolf.
    places: Vec<u8>,
}

/// What has been reached of a store.
pub(super) struct Marks {
    geometry: Geometry,
    /// By extent; empty for one that is not initialised.
    extents: Vec<Vec<Part>>,
}

impl Marks {
    /// Nothing reached, no extent initialised.
    pub(super) fn new(geometry: Geometry) -> Self {
        let extents = (0..geometry.extent_count).map(|_| Vec::new()).collect();
        Self { geometry, extents }
    }

    /// Notes the next bitmap block of an extent; they come in order.
    pub(super) fn add_bitmap(&mut self, extent: u64, allocated: BitmapRead) {
        let parts = &mut self.extents[extent as usize];
        assert!((parts.len() as u64) < self.geometry.bitmap_blocks, "too many bitmap blocks");
        parts.push(Part { allocated, seen: None });
    }

    /// What bitmap block `index` of an extent with bitmaps says, and what of it was reached: none
    /// when nothing was.
    pub(super) fn part(&self, extent: u64, index: u64) -> (&BitmapRead, Option<&Bitmap>) {
        let part = &self.extents[extent as usize][index as usize];
        (&part.allocated, part.seen.as_deref().map(|seen| &seen.reached))
    }

    /// Notes that a path leads to a block, which lies in an initialised extent.
    ///
    /// # Panics
    /// When it does not.
    pub(super) fn reach(&mut self, path: Path) -> Reached {
        let (part, bit) = self.find(path.block);
        let free = part.allocated.bitmap().is_some_and(|allocated| !allocated.get(bit));
        let seen = part.seen.get_or_insert_with(Seen::new);
        let print = fingerprint(path.place);
        if !seen.reached.get(bit) {
            seen.reached.set(bit);
            seen.places[bit as usize] = print;
            if path.writable {
                seen.owned.set(bit);
            }
            return Reached { first: true, free, conflict: None };
        }
        let conflict = if seen.places[bit as usize] != print {
            Some("it is reached at two places: one of them reads the other's bytes")
        } else if seen.owned.get(bit) {
            Some("a tree that may write it in place reaches it too")
        } else if path.writable {
            Some("it may be written in place here, and is reached from elsewhere too")
        } else {
            None
        };
        Reached { first: false, free, conflict }
    }
    fn find(&mut self, block: BlockAddr) -> (&mut Part, u32) {
        let in_extent = block.get() % self.geometry.extent_blocks;
        let parts = &mut self.extents[self.geometry.extent_of(block) as usize];
        (&mut parts[(in_extent / BITMAP_BITS) as usize], (in_extent % BITMAP_BITS) as u32)
    }
}

impl Seen {
    fn new() -> Box<Self> {
        let places = vec![0; BITMAP_BITS as usize];
        Box::new(Self { reached: Bitmap::new(), owned: Bitmap::new(), places })
    }
}

fn fingerprint(place: Place) -> u8 {
    let (kind, number) = match place {
        Place::Tree { level, first } => (u64::from(level), first),
        Place::Log { volume, first_sequence } => (u64::MAX - volume, first_sequence),
    };
    let mixed = (number ^ kind.rotate_right(3)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed >> 56) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks() -> Marks {
        let geometry = Geometry::plan(bessel_reactor::units::ByteCount::new(8 << 20), None);
        let mut marks = Marks::new(geometry.unwrap());
        let mut allocated = Bitmap::new();
        allocated.set_range(0, 100);
        marks.add_bitmap(2, BitmapRead::Whole(Box::new(allocated)));
        marks
    }

    fn path(block: u64, first: u64, writable: bool) -> Path {
        Path {
            block: BlockAddr::new(512 + block),
            place: Place::Tree { level: 0, first },
            writable,
        }
    }

    #[test]
    fn sharing_is_fine_read_only_at_one_place() {
        let mut marks = marks();
        let again = Reached { first: false, free: false, conflict: None };
        assert_eq!(marks.reach(path(1, 7, false)), Reached { first: true, ..again });
        assert_eq!(marks.reach(path(1, 7, false)), again);
        assert!(marks.reach(path(1, 8, false)).conflict.is_some(), "another place");
        assert!(marks.reach(path(1, 7, true)).conflict.is_some(), "writable after read-only");
        assert!(marks.reach(path(2, 7, true)).conflict.is_none());
        assert!(marks.reach(path(2, 7, false)).conflict.is_some(), "read-only after writable");
    }

    #[test]
    fn a_free_block_is_told() {
        assert!(!marks().reach(path(99, 0, true)).free);
        assert!(marks().reach(path(100, 0, true)).free);
    }

    #[test]
    fn fingerprints_spread() {
        let mut seen = [0u32; 256];
        for level in 0..4 {
            for first in 0..4096 {
                seen[usize::from(fingerprint(Place::Tree {
                    level,
                    first: first << (9 * level),
                }))] += 1;
            }
        }
        assert!(seen.iter().all(|&count| (16..160).contains(&count)), "{seen:?}");
    }
}
