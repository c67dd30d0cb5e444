//! A radix node: 512 entries, used in memory as they lie on the device.
//!
//! Each entry stands for itself, so there is no checksum over the node: a torn node is a legal mix
//! of its old and new entries, and nodes are updated in place. [`check_node`] is the one gate
//! between bytes from the device and a tree we follow: after it, a link leads to the level below,
//! into an extent of the right type, and so a cycle cannot be followed.

use bessel_reactor::units::{BlockAddr, ByteCount};
use zerocopy::{FromBytes, IntoBytes};

use super::entry::{Entry, EntryKind, TagKey};
use super::extents::{ExtentMap, ExtentType};
use super::seal::BLOCK;
use crate::planted::{self, Bug};

/// Entries in a node.
pub const NODE_ENTRIES: usize = 512;
/// Bits of a volume's block number that one level resolves.
pub const NODE_BITS: u32 = 9;

const _: () = assert!(1 << NODE_BITS == NODE_ENTRIES);
const _: () = assert!(size_of::<Node>() == BLOCK);

/// One node of a volume's radix tree (FORMAT.md, "Radix nodes"): entry `i` at byte 8 `i`.
pub type Node = [Entry; NODE_ENTRIES];

/// Blocks that a tree of `height` 3 or 4 can map: 512 GiB or 256 TiB.
pub const fn tree_blocks(height: u8) -> u64 {
    1 << (NODE_BITS * height as u32)
}

/// Levels of the tree of a volume of this size: 3 to 512 GiB, 4 above.
pub const fn height_for(size: ByteCount) -> u8 {
    if size.blocks_ceil() <= tree_blocks(3) { 3 } else { 4 }
}

/// A block's bytes as a node. Nothing is checked: see [`check_node`].
///
/// # Panics
/// When `bytes` is not one block, or not aligned to 8 bytes. Pool buffers are both.
pub fn node_from_bytes(bytes: &[u8]) -> &Node {
    Node::ref_from_bytes(bytes).expect("a node is read into one aligned block")
}

/// A block's bytes as a node, to change.
///
/// # Panics
/// As [`node_from_bytes`].
pub fn node_from_bytes_mut(bytes: &mut [u8]) -> &mut Node {
    Node::mut_from_bytes(bytes).expect("a node is built in one aligned block")
}

/// The bytes of a node, to write to the device.
pub fn node_as_bytes(node: &Node) -> &[u8] {
    node.as_bytes()
}

/// The bytes of a node, to fill from the device.
pub fn node_as_bytes_mut(node: &mut Node) -> &mut [u8] {
    node.as_mut_bytes()
}

/// An entry that cannot be followed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("radix node at block {node} (level {level}), slot {slot}: {what} (entry {bits:#018x})", bits = .entry.bits())]
pub struct NodeFault {
    /// The node.
    pub node: BlockAddr,
    /// Its level in the tree, 1 for a leaf.
    pub level: u8,
    /// The slot.
    pub slot: usize,
    /// What is there.
    pub entry: Entry,
    /// What is wrong with it.
    pub what: &'static str,
}

/// Checks every entry of the node of `level` 1 to 4 at `addr`: see [`check_entry`].
///
/// # Errors
/// The first entry that cannot be followed.
pub fn check_node(
    node: &Node,
    addr: BlockAddr,
    level: u8,
    key: TagKey,
    extents: &ExtentMap,
) -> Result<(), NodeFault> {
    let sealed = key.first_wrong(node, addr).is_none();
    for (slot, &entry) in node.iter().enumerate() {
        let fault = if sealed {
            link_fault(entry, level, extents)
        } else {
            entry_fault(entry, addr, level, slot, key, extents)
        };
        if let Some(what) = fault {
            return Err(NodeFault { node: addr, level, slot, entry, what });
        }
    }
    Ok(())
}

/// Checks one entry: its tag, its kind against the node's level, and that its block lies in an
/// extent of the right type and not in that extent's bitmap.
///
/// # Errors
/// What is wrong with it.
#[inline]
pub fn check_entry(
    node: &Node,
    addr: BlockAddr,
    level: u8,
    slot: usize,
    key: TagKey,
    extents: &ExtentMap,
) -> Result<(), NodeFault> {
    let entry = node[slot];
    match entry_fault(entry, addr, level, slot, key, extents) {
        None => Ok(()),
        Some(what) => Err(NodeFault { node: addr, level, slot, entry, what }),
    }
}

#[inline]
fn entry_fault(
    entry: Entry,
    addr: BlockAddr,
    level: u8,
    slot: usize,
    key: TagKey,
    extents: &ExtentMap,
) -> Option<&'static str> {
    if entry.bits() == 0 {
        return Some("the entry is all zero: its sector was lost or never written");
    }
    if !key.verify(entry, addr, slot) && !planted::is(Bug::TagNotChecked) {
        return Some("the tag does not match: the entry is damaged or belongs elsewhere");
    }
    link_fault(entry, level, extents)
}

/// What is wrong with an entry whose tag is right.
#[inline]
fn link_fault(entry: Entry, level: u8, extents: &ExtentMap) -> Option<&'static str> {
    let wanted = match entry.kind() {
        EntryKind::Invalid => return Some("the entry has kind 0, which no writer writes"),
        EntryKind::Superpage => {
            return Some("the entry is a superpage, which this version does not know");
        }
        EntryKind::Sparse | EntryKind::Zeroed => {
            let clean = entry.block().get() == 0 && !entry.read_only();
            return if clean { None } else { Some("a hole has a block or the read-only bit") };
        }
        EntryKind::Data if level == 1 => ExtentType::Data,
        EntryKind::Data => return Some("data is linked above the leaves"),
        EntryKind::Node(child) if child + 1 == level || planted::is(Bug::LevelNotChecked) => {
            ExtentType::Metadata
        }
        EntryKind::Node(_) => return Some("the link does not lead to the level below"),
    };
    if !extents.holds(entry.block(), wanted) && !planted::is(Bug::ExtentTypeNotChecked) {
        return Some("the block is outside the store, in an extent of another type or in a bitmap");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: TagKey = TagKey::new(0x9e37_79b9_7f4a_7c15);
    const ADDR: BlockAddr = BlockAddr::new(256 * 2 + 9);

    /// Extents of 256 blocks, one bitmap block each: 0 system, 1 data, 2 metadata, 3 unused.
    fn extents() -> ExtentMap {
        let types =
            [ExtentType::System, ExtentType::Data, ExtentType::Metadata, ExtentType::Unused];
        ExtentMap::new(256, 1, &types)
    }

    fn node_with(slot: usize, entry: Entry) -> Node {
        let mut node = [Entry::sparse(); NODE_ENTRIES];
        node[slot] = entry;
        for (slot, entry) in node.iter_mut().enumerate() {
            *entry = KEY.seal(*entry, ADDR, slot);
        }
        node
    }

    fn fault(level: u8, entry: Entry) -> Option<&'static str> {
        let result = check_node(&node_with(17, entry), ADDR, level, KEY, &extents());
        result.err().map(|fault| {
            assert_eq!(fault.slot, 17);
            fault.what
        })
    }

    const DATA: BlockAddr = BlockAddr::new(256 + 1);
    const META: BlockAddr = BlockAddr::new(2 * 256 + 1);

    #[test]
    fn good_links_pass_at_their_level() {
        assert_eq!(fault(1, Entry::data(DATA)), None);
        assert_eq!(fault(1, Entry::data(DATA).to_read_only()), None);
        assert_eq!(fault(1, Entry::zeroed()), None);
        for level in 1..=3 {
            assert_eq!(fault(level + 1, Entry::node(level, META)), None);
        }
    }

    #[test]
    fn links_to_the_wrong_level_are_refused() {
        assert!(fault(2, Entry::data(DATA)).is_some());
        assert!(fault(1, Entry::node(1, META)).is_some());
        assert!(fault(2, Entry::node(2, META)).is_some());
        assert!(fault(4, Entry::node(1, META)).is_some());
        assert!(fault(1, Entry::from_bits(7 << 60 | DATA.get())).is_some());
        assert!(fault(1, Entry::from_bits(DATA.get())).is_some());
    }

    #[test]
    fn links_into_the_wrong_place_are_refused() {
        for block in [META.get(), 256, 255, 3 * 256 + 5, 4 * 256, 1 << 40] {
            assert!(fault(1, Entry::data(BlockAddr::new(block))).is_some(), "data at {block}");
        }
        for block in [DATA.get(), 512, 100, 4 * 256] {
            assert!(fault(2, Entry::node(1, BlockAddr::new(block))).is_some(), "node at {block}");
        }
        assert!(fault(1, Entry::from_bits(Entry::sparse().bits() | 1 << 63)).is_some());
        assert!(fault(1, Entry::from_bits(Entry::sparse().bits() | 300)).is_some());
    }

    #[test]
    fn a_lost_sector_is_not_a_hole() {
        let mut node = node_with(0, Entry::sparse());
        node[64..128].fill(Entry::from_bits(0));
        let fault = check_node(&node, ADDR, 1, KEY, &extents()).unwrap_err();
        assert_eq!(fault.slot, 64);
    }

    #[test]
    fn bytes_and_entries_are_one_thing() {
        let node = node_with(3, Entry::data(DATA));
        let bytes = node_as_bytes(&node);
        assert_eq!(bytes[24..32], node[3].bits().to_le_bytes());
        assert_eq!(node_from_bytes(bytes), &node);
    }

    #[test]
    fn height_follows_size() {
        assert_eq!(height_for(ByteCount::new(512 << 30)), 3);
        assert_eq!(height_for(ByteCount::new((512 << 30) + 512)), 4);
        assert_eq!(height_for(ByteCount::new(256 << 40)), 4);
        assert_eq!(ByteCount::from_blocks(tree_blocks(4)), ByteCount::new(256 << 40));
    }
}
