//! What lies on the device: every on-disk type of format version 1, and nothing else.
//!
//! `FORMAT.md` beside this crate's `src` holds the byte maps; the constants and assertions here
//! hold the compiler to them. Nothing in this folder performs I/O, and nothing outside it knows an
//! offset. A change here is a change of the format: it goes with `FORMAT.md` and `tests/golden` in
//! one commit.
//!
//! Two kinds of structure exist. *Radix nodes* carry a tag in each entry. Everything else is made
//! of *sealed sectors* ([`seal`]). Both stand the tearing of a block into old and new sectors.

mod bitmap;
mod catalogue;
mod entry;
mod extents;
mod geometry;
mod host;
mod lineage;
mod name;
mod node;
mod registry;
pub mod seal;
mod slots;
mod snapshot_log;
mod superblock;

pub use bitmap::Bitmap;
pub use catalogue::{
    CATALOGUE_ENTRIES_PER_BLOCK, CATALOGUE_ENTRIES_PER_SECTOR, CatalogueEntry,
    decode_catalogue_block, decode_catalogue_sector, encode_catalogue_block,
};
pub use entry::{Entry, EntryKind, TagKey};
pub use extents::{ExtentMap, ExtentType};
pub use geometry::{
    BITMAP_BITS, EXTENT_BLOCKS_MAX, EXTENT_BLOCKS_MIN, EXTENTS_MAX, EXTENTS_MIN, Geometry,
    GeometryError, STORE_BLOCKS_MAX,
};
pub use host::HostRecord;
pub use lineage::Parent;
pub use name::{NAME_BYTES_MAX, NameError, check_name};
pub use node::{
    NODE_BITS, NODE_ENTRIES, Node, NodeFault, check_entry, check_node, height_for, node_as_bytes,
    node_as_bytes_mut, node_from_bytes, node_from_bytes_mut, tree_blocks,
};
pub use registry::{VOLUME_SIZE_MAX, VOLUME_SIZE_MIN, VolumeRecord};
pub use seal::Damage;
pub use slots::{Slot, SlotPair, choose_slot, find_lost_slot, refuse_wrong_slot};
pub use snapshot_log::{
    LOG_ENTRIES_PER_BLOCK, LogBlock, LogEntry, decode_log_block, encode_log_block,
};
pub use superblock::{
    FEATURES_INCOMPATIBLE_KNOWN, FEATURES_READ_ONLY_KNOWN, FORMAT_VERSION, SUPERBLOCK_COPIES,
    Superblock, SuperblockFault,
};

#[cfg(not(target_endian = "little"))]
compile_error!("radix nodes are used in memory as they lie on the device, which is little-endian");
