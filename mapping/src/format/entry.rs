//! One entry of a radix node, and the tag that binds it to its place.
//!
//! Hot path: an entry is a 64-bit number, copied freely. In memory, entries are used both with and
//! without tag; [`TagKey::seal`] puts the tag on before an image of the node goes to the device,
//! [`TagKey::verify`] checks it when a node is loaded and before it is written.

use bessel_reactor::crc::fold_crc32c;
use bessel_reactor::units::BlockAddr;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::node::NODE_ENTRIES;

/// One link of a radix tree, exactly as it lies on disk (FORMAT.md, "Radix nodes").
///
/// | bits  | field     | meaning                                                            |
/// |-------|-----------|--------------------------------------------------------------------|
/// | 63    | read-only | the subtree below is shared and is copied before it is changed     |
/// | 62–60 | kind      | see [`EntryKind`]                                                   |
/// | 59–44 | tag       | binds the other bits to node, slot and store; see [`TagKey`]       |
/// | 43–0  | block     | where it leads; 0 for a hole                                       |
///
/// All bits zero is *invalid*, so a lost sector is found and does not read as a hole.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Default,
)]
#[repr(transparent)]
pub struct Entry(u64);

const READ_ONLY: u64 = 1 << 63;
const KIND_SHIFT: u32 = 60;
const KIND_MASK: u64 = 0b111;
const TAG_SHIFT: u32 = 44;
const TAG_MASK: u64 = 0xffff << TAG_SHIFT;
const BLOCK_MASK: u64 = (1 << TAG_SHIFT) - 1;

const KIND_SPARSE: u64 = 1;
const KIND_ZEROED: u64 = 2;
const KIND_DATA: u64 = 3;
/// Plus the level, 1 to 3, less one.
const KIND_NODE: u64 = 4;
const KIND_SUPERPAGE: u64 = 7;

/// What an entry leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EntryKind {
    /// No writer writes this: the bytes are lost or damaged.
    Invalid,
    /// Never written; reads as zeroes.
    Sparse,
    /// Discarded or zeroed; reads as zeroes.
    Zeroed,
    /// A block of guest data. In leaves (level 1) only.
    Data,
    /// A node of this level, 1 to 3. In nodes of the level above only.
    Node(u8),
    /// Reserved for a later format; refused when found.
    Superpage,
}

impl Entry {
    /// The entry with these bits, as read from the device.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// All 64 bits.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// What it leads to.
    #[inline]
    pub const fn kind(self) -> EntryKind {
        match self.0 >> KIND_SHIFT & KIND_MASK {
            0 => EntryKind::Invalid,
            KIND_SPARSE => EntryKind::Sparse,
            KIND_ZEROED => EntryKind::Zeroed,
            KIND_DATA => EntryKind::Data,
            KIND_SUPERPAGE => EntryKind::Superpage,
            node => EntryKind::Node((node - KIND_NODE + 1) as u8),
        }
    }

    /// True when what it leads to must be copied before it is changed.
    #[inline]
    pub const fn read_only(self) -> bool {
        self.0 & READ_ONLY != 0
    }

    /// Where it leads; block 0 for a hole.
    #[inline]
    pub const fn block(self) -> BlockAddr {
        BlockAddr::new(self.0 & BLOCK_MASK)
    }

    /// True for sparse and zeroed: reads as zeroes, leads nowhere.
    #[inline]
    pub const fn is_hole(self) -> bool {
        matches!(self.kind(), EntryKind::Sparse | EntryKind::Zeroed)
    }

    /// The entry without its tag.
    #[inline]
    pub const fn untagged(self) -> Self {
        Self(self.0 & !TAG_MASK)
    }

    /// The tag bits.
    #[inline]
    pub const fn tag(self) -> u16 {
        ((self.0 & TAG_MASK) >> TAG_SHIFT) as u16
    }

    /// A hole that was never written, untagged.
    pub const fn sparse() -> Self {
        Self(KIND_SPARSE << KIND_SHIFT)
    }

    /// A hole that was discarded or zeroed, untagged.
    pub const fn zeroed() -> Self {
        Self(KIND_ZEROED << KIND_SHIFT)
    }

    /// A writable link to a block of data, untagged.
    ///
    /// # Panics
    /// When the block is 0 or past 64 PiB.
    #[inline]
    pub const fn data(block: BlockAddr) -> Self {
        Self::link(KIND_DATA, block)
    }

    /// A writable link to a node of `level` 1 to 3, untagged.
    ///
    /// # Panics
    /// When the level is another, or the block is 0 or past 64 PiB.
    #[inline]
    pub const fn node(level: u8, block: BlockAddr) -> Self {
        assert!(1 <= level && level <= 3, "entries lead to levels 1 to 3");
        Self::link(KIND_NODE + level as u64 - 1, block)
    }

    const fn link(kind: u64, block: BlockAddr) -> Self {
        assert!(block.get() != 0 && block.get() <= BLOCK_MASK, "block outside 1..2^44");
        Self(kind << KIND_SHIFT | block.get())
    }

    /// The same link, read-only and untagged. Holes stay as they are: there is nothing to share.
    #[inline]
    pub const fn to_read_only(self) -> Self {
        let entry = self.untagged();
        if entry.is_hole() { entry } else { Self(entry.0 | READ_ONLY) }
    }
}

/// Computes the tags of one store.
///
/// tag = fold16(crc32c(the entry's 8 bytes, tag bits zero)) xor top16((node × 512 + slot) × secret)
///
/// Both halves are needed. The CRC alone does not know the place: a whole node written to, or read
/// from, another address would verify. The keyed product alone does not know the bits. Together
/// they find every flip of up to a few bits, and a misplaced node escapes only if all of its 512
/// entries do, each with a chance of one in 65536. The secret keeps a guest from making a data
/// block that looks like a node.
#[derive(Clone, Copy)]
pub struct TagKey {
    secret: u64,
}

impl std::fmt::Debug for TagKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TagKey(..)")
    }
}

impl TagKey {
    /// The key of the store with this secret.
    ///
    /// # Panics
    /// When the secret is even: a product with it would lose the place's high bits.
    pub const fn new(secret: u64) -> Self {
        assert!(secret % 2 == 1, "a store's secret is odd");
        Self { secret }
    }

    #[inline]
    fn tag(self, untagged: Entry, node: BlockAddr, slot: usize) -> u16 {
        let place = node.get() * NODE_ENTRIES as u64 + slot as u64;
        folded_crc(untagged) ^ (place.wrapping_mul(self.secret) >> 48) as u16
    }

    /// The entry with the tag for `slot` of the node at `node`, whatever tag it had before.
    #[inline]
    pub fn seal(self, entry: Entry, node: BlockAddr, slot: usize) -> Entry {
        let untagged = entry.untagged();
        Entry(untagged.0 | u64::from(self.tag(untagged, node, slot)) << TAG_SHIFT)
    }

    /// Fills the node at `to` with the entries of `source`, the one at `from`, all of them read-only.
    ///
    /// A tag is linear in the entry's bits and the place's product but for a constant: how it differs
    /// follows from how these do, and nothing need be looked up. And a tag that was wrong stays so:
    /// what memory has damaged is not sealed anew.
    pub fn copy_read_only(
        self,
        source: &[Entry; NODE_ENTRIES],
        from: BlockAddr,
        target: &mut [Entry; NODE_ENTRIES],
        to: BlockAddr,
    ) {
        const WHEN_READ_ONLY: u64 =
            READ_ONLY | (CRC_SHARES[7][(READ_ONLY >> 56) as usize] as u64) << TAG_SHIFT;
        let product =
            |node: BlockAddr| (node.get() * NODE_ENTRIES as u64).wrapping_mul(self.secret);
        let (mut old_place, mut new_place) = (product(from), product(to));
        for (copy, Entry(bits)) in target.iter_mut().zip(source) {
            // Without a branch, so that several are done at once. Kinds 1 and 2 are holes.
            let [kind_0, kind_1, kind_2] = [0, 1, 2].map(|bit| bits >> (KIND_SHIFT + bit));
            let hole = (kind_0 ^ kind_1) & !kind_2;
            let becomes = !(hole | bits >> 63) & 1;
            let places = (old_place ^ new_place) >> 48 << TAG_SHIFT;
            *copy = Entry(bits ^ places ^ (becomes.wrapping_neg() & WHEN_READ_ONLY));
            old_place = old_place.wrapping_add(self.secret);
            new_place = new_place.wrapping_add(self.secret);
        }
    }

    /// The first entry of the node at `node` that [does not verify](Self::verify).
    pub fn first_wrong(self, entries: &[Entry; NODE_ENTRIES], node: BlockAddr) -> Option<usize> {
        let bits: &[u64; NODE_ENTRIES] = zerocopy::transmute_ref!(entries);
        let place = (node.get() * NODE_ENTRIES as u64).wrapping_mul(self.secret);
        let quick = fold_crc32c(bits, !TAG_MASK, (0, place), |(wrong, place), entry, crc| {
            let tag = (crc ^ crc >> 16) as u16 ^ (place >> 48) as u16;
            (wrong | Entry(entry).tag() ^ tag, place.wrapping_add(self.secret))
        });
        if let Some((0, _)) = quick {
            return None;
        }
        (0..NODE_ENTRIES).find(|slot| !self.verify(entries[*slot], node, *slot))
    }

    /// True when the entry was sealed for this place of this store and has not changed since.
    #[inline]
    pub fn verify(self, entry: Entry, node: BlockAddr, slot: usize) -> bool {
        entry.tag() == self.tag(entry.untagged(), node, slot)
    }
}

/// The CRC32C of the entry's 8 bytes, its upper half folded onto its lower.
///
/// A CRC of a fixed length is linear in the message's bits but for a constant, and so is folding it:
/// each byte's share can be looked up and the shares xored. Byte 6 and half of bytes 5 and 7 are the
/// tag, which is zero here. The general function dispatches over length, alignment and processor: a tag
/// took 12 ns with it and takes 2 ns so, for each of the 512 entries of a node loaded or written.
#[inline]
const fn folded_crc(untagged: Entry) -> u16 {
    #[inline]
    const fn share(bits: u64, byte: usize) -> u16 {
        CRC_SHARES[byte][(bits >> (8 * byte)) as u8 as usize]
    }
    let bits = untagged.0;
    CRC_OF_ZEROES
        ^ (share(bits, 0) ^ share(bits, 1))
        ^ (share(bits, 2) ^ share(bits, 3))
        ^ (share(bits, 4) ^ share(bits, 5))
        ^ share(bits, 7)
}

/// What each value of each byte of an entry adds to [`folded_crc`].
static CRC_SHARES: [[u16; 256]; 8] = crc_shares();
const CRC_OF_ZEROES: u16 = folded_crc_by_bits(0);

const fn crc_shares() -> [[u16; 256]; 8] {
    let mut shares = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 8 {
        let mut value = 1;
        while value < 256 {
            // One bit's share is computed; that of several is the sum of theirs.
            let rest = value & (value - 1);
            shares[byte][value] = if rest == 0 {
                folded_crc_by_bits((value as u64) << (8 * byte)) ^ CRC_OF_ZEROES
            } else {
                shares[byte][rest] ^ shares[byte][value ^ rest]
            };
            value += 1;
        }
        byte += 1;
    }
    shares
}

/// [`folded_crc`] of any 8 bytes, bit by bit, as the definition has it.
const fn folded_crc_by_bits(bits: u64) -> u16 {
    /// Castagnoli's polynomial, reflected.
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let mut register = u32::MAX;
    let mut bit = 0;
    while bit < 64 {
        let feedback = (register ^ (bits >> bit) as u32) & 1;
        register = (register >> 1) ^ (feedback * POLYNOMIAL);
        bit += 1;
    }
    let crc = !register;
    (crc ^ crc >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: TagKey = TagKey::new(0x9e37_79b9_7f4a_7c15);

    fn samples() -> [Entry; 6] {
        let block = BlockAddr::new(0x0abc_def0_1234 & BLOCK_MASK);
        [
            Entry::sparse(),
            Entry::zeroed(),
            Entry::data(block),
            Entry::data(block).to_read_only(),
            Entry::node(1, block),
            Entry::node(3, BlockAddr::new(BLOCK_MASK)).to_read_only(),
        ]
    }

    #[test]
    fn an_entry_says_what_it_was_made_of() {
        let block = BlockAddr::new(12345);
        assert_eq!(Entry::from_bits(0).kind(), EntryKind::Invalid);
        assert_eq!(Entry::from_bits(7 << 60).kind(), EntryKind::Superpage);
        assert_eq!(Entry::sparse().kind(), EntryKind::Sparse);
        assert_eq!(Entry::zeroed().kind(), EntryKind::Zeroed);
        assert_eq!(Entry::data(block).kind(), EntryKind::Data);
        for level in 1..=3 {
            let entry = Entry::node(level, block);
            assert_eq!(entry.kind(), EntryKind::Node(level));
            assert_eq!((entry.block(), entry.read_only()), (block, false));
            assert!(entry.to_read_only().read_only());
        }
        assert!(Entry::sparse().is_hole() && Entry::zeroed().is_hole());
        assert_eq!(Entry::zeroed().to_read_only(), Entry::zeroed());
    }

    /// FORMAT.md defines the tag by the CRC32C that everybody computes.
    #[test]
    fn the_tables_agree_with_the_general_function() {
        let mut bits = 1u64;
        for _ in 0..100_000 {
            bits = bits.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            let entry = Entry::from_bits(bits).untagged();
            let crc = crc32c::crc32c(&entry.bits().to_le_bytes());
            assert_eq!(folded_crc(entry), (crc ^ crc >> 16) as u16, "{entry:?}");
        }
    }

    #[test]
    fn every_flipped_bit_breaks_the_tag() {
        for entry in samples() {
            let sealed = KEY.seal(entry, BlockAddr::new(4711), 300);
            assert_eq!(sealed.untagged(), entry);
            assert!(KEY.verify(sealed, BlockAddr::new(4711), 300));
            for bit in 0..64 {
                let flipped = Entry::from_bits(sealed.bits() ^ 1 << bit);
                assert!(!KEY.verify(flipped, BlockAddr::new(4711), 300), "bit {bit} of {entry:?}");
            }
        }
    }

    #[test]
    fn a_read_only_copy_is_sealed_for_its_place_and_hides_no_damage() {
        let (from, to) = (BlockAddr::new(4711), BlockAddr::new(0x0123_4567_89ab));
        let mut source = [Entry::sparse(); NODE_ENTRIES];
        for (slot, entry) in source.iter_mut().enumerate() {
            *entry = KEY.seal(samples()[slot % samples().len()], from, slot);
        }
        source[77] = Entry::from_bits(source[77].bits() ^ 1 << 20);
        let mut copy = [Entry::from_bits(0); NODE_ENTRIES];
        KEY.copy_read_only(&source, from, &mut copy, to);
        for slot in (0..NODE_ENTRIES).filter(|slot| *slot != 77) {
            let expected = KEY.seal(source[slot].to_read_only(), to, slot);
            assert_eq!(copy[slot], expected, "slot {slot}");
        }
        assert!(!KEY.verify(copy[77], to, 77));
    }

    #[test]
    fn the_first_wrong_entry_of_a_node_is_found() {
        let at = BlockAddr::new(0x0123_4567_89ab);
        let mut node = [Entry::sparse(); NODE_ENTRIES];
        for (slot, entry) in node.iter_mut().enumerate() {
            *entry = KEY.seal(samples()[slot % samples().len()], at, slot);
        }
        assert_eq!(KEY.first_wrong(&node, at), None);
        assert_eq!(KEY.first_wrong(&node, at.add(1)), Some(0));
        for (slot, bit) in [(511, 0), (300, 63), (299, 44), (17, 59), (0, 43)] {
            node[slot] = Entry::from_bits(node[slot].bits() ^ 1 << bit);
            assert_eq!(KEY.first_wrong(&node, at), Some(slot), "bit {bit}");
        }
    }

    #[test]
    fn a_misplaced_node_is_found_whatever_it_holds() {
        for entry in samples() {
            for distance in (1..4096).chain((12..43).map(|shift| 1 << shift)) {
                let home = BlockAddr::new(1 << 20);
                let found = (0..NODE_ENTRIES)
                    .any(|slot| !KEY.verify(KEY.seal(entry, home, slot), home.add(distance), slot));
                assert!(found, "{entry:?} {distance} blocks away");
            }
        }
    }

    #[test]
    fn a_node_of_another_store_is_found() {
        let other = TagKey::new(0xd1b5_4a32_d192_ed03);
        let home = BlockAddr::new(1 << 20);
        let found = (0..NODE_ENTRIES)
            .filter(|&slot| !KEY.verify(other.seal(Entry::sparse(), home, slot), home, slot));
        assert!(found.count() > 0);
    }
}
