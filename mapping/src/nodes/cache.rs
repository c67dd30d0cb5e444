//! The node cache: a bounded number of frames, each one radix node.
//!
//! Nodes only, never guest data (Parallax 3.4.4). The paper replaces by a plain hash of the block
//! address and names its weakness: a leaf may push out a root. Here a frame stays for as long as a
//! frame below it is cached, so the tree is evicted from the bottom up, and among the frames that
//! may go a clock gives higher levels more turns.
//!
//! What must not be broken:
//! - A frame that is dirty, in a commit round, pinned, or the parent of a cached frame is never
//!   evicted: its contents are not on the device yet, or somebody will ask for it next.
//! - A block address has at most one frame. The frame of a freed node is removed before its block
//!   can be handed out again.

use bessel_reactor::prefetch;
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr, ByteCount};

use crate::format::{Entry, NODE_ENTRIES};
use crate::planted::{self, Bug};

/// Index of a frame. Stable while the frame cannot be evicted; not to be kept across a wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FrameId(pub(crate) u32);

/// "No frame" in the index and in parent links.
const NONE: u32 = u32::MAX;

/// Fewest frames a cache works with: a path of four levels, its copy, and some to breathe.
pub(crate) const FRAMES_MIN: usize = 64;

/// Frames, of those used first, whose memory is touched when the cache is made: 64 MiB. Else the first to
/// use each waits for the system to find a page, and after a snapshot many are used at once. Not all
/// of a large cache: guests of a daemon that was killed wait for the next one to start.
const TOUCHED_FRAMES: usize = 16_384;

/// Turns of the clock that a frame of each level survives untouched. Leaves are 512 times as many
/// as the nodes above them, and a miss above costs a second miss below.
const TURNS: [u8; 5] = [0, 1, 3, 6, 6];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FrameState {
    /// Holds nothing.
    Free,
    /// Waits for its node to be read.
    Loading,
    /// Holds its node.
    Present,
}

/// What is known of a frame besides its entries.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub(crate) addr: BlockAddr,
    pub(crate) level: u8,
    pub(crate) state: FrameState,
    /// Changed since its last image was taken.
    pub(crate) dirty: bool,
    /// No tree on the device reaches it yet, so it may be written at once.
    pub(crate) fresh: bool,
    /// Unlinked from its tree: its block will be freed and it must not be written again.
    pub(crate) dropped: bool,
    /// Commit rounds that hold an image of it, or will take one, and are not durable.
    pub(crate) in_rounds: u16,
    /// The round that makes its latest change durable; 0 when it came clean from the device.
    pub(crate) change_round: u64,
    pins: u16,
    /// Cached frames that were reached through this one.
    children: u32,
    parent: u32,
    turns: u8,
}

impl Frame {
    const EMPTY: Self = Self {
        addr: BlockAddr::new(0),
        level: 0,
        state: FrameState::Free,
        dirty: false,
        fresh: false,
        dropped: false,
        in_rounds: 0,
        change_round: 0,
        pins: 0,
        children: 0,
        parent: NONE,
        turns: 0,
    };

    /// Somebody keeps it from being evicted.
    pub(crate) fn is_pinned(&self) -> bool {
        self.pins > 0
    }

    /// Holds nothing that the device does not, and nobody keeps it.
    fn is_idle(&self) -> bool {
        self.state == FrameState::Present
            && (!self.dirty || planted::is(Bug::EvictsDirty))
            && self.in_rounds == 0
            && self.pins == 0
    }

    fn evictable(&self) -> bool {
        self.is_idle() && self.children == 0
    }
}

/// Hits, misses and evictions since start.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct CacheCounters {
    /// Lookups that found their node.
    pub hits: u64,
    /// Lookups that had to read it.
    pub misses: u64,
    /// Nodes that made room for others.
    pub evictions: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct NodeCache {
    frames: Vec<Frame>,
    entries: Vec<[Entry; NODE_ENTRIES]>,
    free: Vec<u32>,
    /// Open addressing, linear probing, at most half full.
    index: Vec<u32>,
    index_mask: usize,
    hand: usize,
    /// How often a way from a root to a leaf may have changed.
    ways: u64,
    pub(crate) counters: CacheCounters,
}

impl NodeCache {
    /// A cache of `size` bytes of nodes, at least [`FRAMES_MIN`] frames.
    pub(crate) fn new(size: ByteCount) -> Self {
        let count = (size.get() / BLOCK_SIZE).max(FRAMES_MIN as u64) as usize;
        let index_size = (count * 2).next_power_of_two();
        let mut entries = vec![[Entry::from_bits(0); NODE_ENTRIES]; count];
        // Zeroes come from the system as pages that are not there yet.
        entries.iter_mut().take(TOUCHED_FRAMES).for_each(|node| node.fill(Entry::sparse()));
        Self {
            frames: vec![Frame::EMPTY; count],
            entries,
            free: (0..count as u32).rev().collect(),
            index: vec![NONE; index_size],
            index_mask: index_size - 1,
            hand: 0,
            ways: 0,
            counters: CacheCounters::default(),
        }
    }

    /// Frames there are.
    pub(crate) fn capacity(&self) -> usize {
        self.frames.len()
    }

    pub(crate) fn frame(&self, id: FrameId) -> &Frame {
        &self.frames[id.0 as usize]
    }

    pub(crate) fn frame_mut(&mut self, id: FrameId) -> &mut Frame {
        &mut self.frames[id.0 as usize]
    }

    pub(crate) fn entries(&self, id: FrameId) -> &[Entry; NODE_ENTRIES] {
        &self.entries[id.0 as usize]
    }

    pub(crate) fn entries_mut(&mut self, id: FrameId) -> &mut [Entry; NODE_ENTRIES] {
        self.note_change(id);
        &mut self.entries[id.0 as usize]
    }

    /// The entries of two frames, the second's to change.
    ///
    /// # Panics
    /// When they are one.
    pub(crate) fn entries_of_two(
        &mut self,
        one: FrameId,
        other: FrameId,
    ) -> (&[Entry; NODE_ENTRIES], &mut [Entry; NODE_ENTRIES]) {
        self.note_change(other);
        let both = self.entries.get_disjoint_mut([one.0 as usize, other.0 as usize]);
        let [one, other] = both.expect("a node is copied into another frame");
        (one, other)
    }

    /// The number of changes after which a leaf that was found is no longer known to be what a walk from
    /// its root leads to: as long as it is the same, no frame has gone and no node above a leaf has changed.
    #[inline]
    pub(crate) fn ways(&self) -> u64 {
        self.ways
    }

    /// The entries of a node are about to change.
    #[inline]
    fn note_change(&mut self, id: FrameId) {
        // Of a leaf the entries are looked at anew each time.
        self.ways += u64::from(self.frames[id.0 as usize].level > 1);
    }

    /// Has the entry at `slot` brought to the processor's cache.
    #[inline]
    pub(crate) fn expect(&self, id: FrameId, slot: usize) {
        prefetch(&raw const self.entries[id.0 as usize][slot]);
    }

    fn home(&self, addr: BlockAddr) -> usize {
        // Fibonacci hashing: neighbours in the store spread over the table.
        (addr.get().wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as usize & self.index_mask
    }

    /// The frame that holds, or waits for, the node at `addr`.
    pub(crate) fn find(&self, addr: BlockAddr) -> Option<FrameId> {
        let mut probe = self.home(addr);
        loop {
            match self.index[probe] {
                NONE => return None,
                id if self.frames[id as usize].addr == addr => return Some(FrameId(id)),
                _ => probe = (probe + 1) & self.index_mask,
            }
        }
    }

    /// The frame that holds the node at `addr`, read as one of `level`. A link that a damaged store
    /// has to a node of another level does not find it.
    #[inline]
    pub(crate) fn find_present(&self, addr: BlockAddr, level: u8) -> Option<FrameId> {
        let id = self.find(addr)?;
        let frame = self.frame(id);
        (frame.state == FrameState::Present && frame.level == level).then_some(id)
    }

    /// False when `child` was reached through another node than `parent`. A node that may be changed
    /// in place has one parent for as long as it is cached (FORMAT.md, "Writability"); a root that
    /// got a taller one above it has none.
    #[inline]
    pub(crate) fn may_belong_to(&self, child: FrameId, parent: FrameId) -> bool {
        let found = self.frames[child.0 as usize].parent;
        found == parent.0 || found == NONE
    }

    /// Marks a frame as used, for the clock.
    #[inline]
    pub(crate) fn touch(&mut self, id: FrameId) {
        let frame = &mut self.frames[id.0 as usize];
        frame.turns = TURNS[frame.level as usize];
    }

    /// Gives the node at `addr` a frame in state `Loading`, found by [`NodeCache::find`] from now
    /// on. `None` when every frame must stay: retry after a commit.
    ///
    /// # Panics
    /// When `addr` has a frame already.
    pub(crate) fn insert(
        &mut self,
        addr: BlockAddr,
        level: u8,
        parent: Option<FrameId>,
    ) -> Option<FrameId> {
        assert!(self.find(addr).is_none(), "node {addr} would be cached twice");
        // The parent must not be chosen as the victim.
        if let Some(parent) = parent {
            self.frames[parent.0 as usize].children += 1;
        }
        let Some(id) = self.free.pop().or_else(|| self.evict()) else {
            if let Some(parent) = parent {
                self.frames[parent.0 as usize].children -= 1;
            }
            return None;
        };
        self.frames[id as usize] = Frame {
            addr,
            level,
            state: FrameState::Loading,
            parent: parent.map_or(NONE, |parent| parent.0),
            turns: TURNS[level as usize],
            ..Frame::EMPTY
        };
        let mut probe = self.home(addr);
        while self.index[probe] != NONE {
            probe = (probe + 1) & self.index_mask;
        }
        self.index[probe] = id;
        Some(FrameId(id))
    }

    /// Frees a frame: its load failed, or its node is gone.
    ///
    /// # Panics
    /// When something still needs it.
    pub(crate) fn remove(&mut self, id: FrameId) {
        let frame = &self.frames[id.0 as usize];
        assert!(
            !frame.dirty && frame.in_rounds == 0 && frame.pins == 0 && frame.children == 0,
            "frame of node {} removed while in use: {frame:?}",
            frame.addr
        );
        self.unlink(id.0);
        self.free.push(id.0);
    }

    /// Frees frames whatever their contents are worth: their volume is closed, and the device has
    /// other contents. What was reached through them goes too, if nobody needs it: a node without the one
    /// above it would be found by nobody who looks for all that a volume may change.
    ///
    /// # Panics
    /// When one of them is pinned or being read.
    pub(crate) fn forget(&mut self, ids: &[FrameId]) {
        let mut goes = vec![false; self.frames.len()];
        ids.iter().for_each(|id| goes[id.0 as usize] = true);
        // Level by level, from above.
        for level in (1..TURNS.len() as u8).rev() {
            for (id, frame) in self.frames.iter().enumerate() {
                if frame.level == level
                    && frame.parent != NONE
                    && goes[frame.parent as usize]
                    && (frame.is_idle() && !planted::is(Bug::ForgottenAlone))
                {
                    goes[id] = true;
                }
            }
        }
        for frame in &mut self.frames {
            if frame.parent != NONE && goes[frame.parent as usize] {
                frame.parent = NONE;
            }
        }
        for id in (0..self.frames.len()).filter(|id| goes[*id]) {
            let frame = &mut self.frames[id];
            assert!(
                frame.state == FrameState::Present && frame.pins == 0,
                "frame of node {} forgotten while in use: {frame:?}",
                frame.addr
            );
            self.unlink(id as u32);
            self.free.push(id as u32);
        }
    }

    /// Keeps a frame from being evicted until [`NodeCache::unpin`].
    pub(crate) fn pin(&mut self, id: FrameId) {
        self.frames[id.0 as usize].pins += 1;
    }

    /// Undoes one [`NodeCache::pin`].
    pub(crate) fn unpin(&mut self, id: FrameId) {
        let frame = &mut self.frames[id.0 as usize];
        assert!(frame.pins > 0, "frame of node {} unpinned once too often", frame.addr);
        frame.pins -= 1;
    }

    /// Finds a victim and unlinks it. Bounded: each frame is looked at as often as the highest
    /// level has turns, plus once.
    fn evict(&mut self) -> Option<u32> {
        let rounds = usize::from(TURNS[TURNS.len() - 1]) + 1;
        for _ in 0..self.frames.len() * rounds {
            let id = self.hand;
            self.hand = (self.hand + 1) % self.frames.len();
            let frame = &mut self.frames[id];
            if !frame.evictable() {
                continue;
            }
            if frame.turns > 0 {
                frame.turns -= 1;
                continue;
            }
            self.unlink(id as u32);
            self.counters.evictions += 1;
            return Some(id as u32);
        }
        None
    }

    fn unlink(&mut self, id: u32) {
        self.ways += 1;
        let frame = std::mem::replace(&mut self.frames[id as usize], Frame::EMPTY);
        if frame.parent != NONE {
            self.frames[frame.parent as usize].children -= 1;
        }
        let mut hole = self.home(frame.addr);
        while self.index[hole] != id {
            assert_ne!(self.index[hole], NONE, "node {} is not in the index", frame.addr);
            hole = (hole + 1) & self.index_mask;
        }
        // Close the gap: move back every later entry of the run that may sit in the hole.
        let mut probe = hole;
        loop {
            probe = (probe + 1) & self.index_mask;
            let other = self.index[probe];
            if other == NONE {
                break;
            }
            let home = self.home(self.frames[other as usize].addr);
            let distance_to_hole = hole.wrapping_sub(home) & self.index_mask;
            let distance_to_probe = probe.wrapping_sub(home) & self.index_mask;
            if distance_to_hole <= distance_to_probe {
                self.index[hole] = other;
                hole = probe;
            }
        }
        self.index[hole] = NONE;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> NodeCache {
        NodeCache::new(ByteCount::new(0))
    }

    fn present(cache: &mut NodeCache, addr: u64, level: u8, parent: Option<FrameId>) -> FrameId {
        let id = cache.insert(BlockAddr::new(addr), level, parent).unwrap();
        cache.frame_mut(id).state = FrameState::Present;
        id
    }

    #[test]
    fn a_parent_outlives_its_cached_children_however_many_leaves_pass() {
        let mut cache = small();
        let root = present(&mut cache, 1, 3, None);
        cache.pin(root);
        let middle = present(&mut cache, 2, 2, Some(root));
        for leaf in 0..10 * FRAMES_MIN as u64 {
            present(&mut cache, 100 + leaf, 1, Some(middle));
            assert_eq!(cache.find(BlockAddr::new(2)), Some(middle), "after leaf {leaf}");
        }
        assert!(cache.counters.evictions > 0);
    }

    #[test]
    fn only_what_changes_a_way_to_a_leaf_counts_as_a_change_of_ways() {
        let mut cache = small();
        let root = present(&mut cache, 1, 2, None);
        let leaf = present(&mut cache, 2, 1, Some(root));
        let other = present(&mut cache, 3, 2, None);
        let changes = |cache: &mut NodeCache, change: &dyn Fn(&mut NodeCache)| {
            let before = cache.ways();
            change(cache);
            cache.ways() != before
        };
        assert!(!changes(&mut cache, &|cache| cache.entries_mut(leaf)[0] = Entry::sparse()));
        assert!(!changes(&mut cache, &|cache| cache.touch(leaf)));
        assert!(changes(&mut cache, &|cache| cache.entries_mut(root)[0] = Entry::sparse()));
        assert!(changes(&mut cache, &|cache| _ = cache.entries_of_two(root, other)));
        assert!(!changes(&mut cache, &|cache| _ = cache.entries_of_two(root, leaf)));
        assert!(changes(&mut cache, &|cache| cache.remove(leaf)));
        assert!(changes(&mut cache, &|cache| cache.forget(&[other])));
    }

    #[test]
    fn nothing_dirty_or_pinned_is_ever_evicted() {
        let mut cache = small();
        for addr in 0..FRAMES_MIN as u64 {
            let id = present(&mut cache, addr, 1, None);
            if addr % 2 == 0 { cache.pin(id) } else { cache.frame_mut(id).dirty = true }
        }
        assert_eq!(cache.insert(BlockAddr::new(9999), 1, None), None);
        assert!((0..FRAMES_MIN as u64).all(|addr| cache.find(BlockAddr::new(addr)).is_some()));
    }

    #[test]
    fn what_was_reached_through_forgotten_frames_goes_with_them_unless_it_is_needed() {
        let mut cache = small();
        let root = present(&mut cache, 1, 3, None);
        let middle = present(&mut cache, 2, 2, Some(root));
        let leaf = present(&mut cache, 3, 1, Some(middle));
        cache.frame_mut(root).dirty = true;
        cache.frame_mut(middle).in_rounds = 2;
        let idle = present(&mut cache, 4, 1, Some(middle));
        let below = present(&mut cache, 5, 2, Some(root));
        let deep = present(&mut cache, 6, 1, Some(below));
        let elsewhere = present(&mut cache, 7, 1, None);
        cache.pin(leaf);
        cache.forget(&[middle, root, middle]);
        let gone = [1, 2, 4, 5, 6].map(|addr| cache.find(BlockAddr::new(addr)));
        assert_eq!(gone, [None; 5], "{idle:?} {below:?} {deep:?}");
        assert_eq!(cache.find(BlockAddr::new(3)), Some(leaf));
        assert_eq!(cache.find(BlockAddr::new(7)), Some(elsewhere));
        cache.unpin(leaf);
        for addr in 0..10 * FRAMES_MIN as u64 {
            present(&mut cache, 100 + addr, 1, None);
        }
        assert_eq!(cache.find(BlockAddr::new(3)), None);
    }

    #[test]
    fn the_index_agrees_with_a_map_through_many_insertions_and_removals() {
        let mut cache = NodeCache::new(ByteCount::from_blocks(256));
        let mut model = std::collections::BTreeMap::new();
        let mut state = 7u64;
        for _ in 0..20_000 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let addr = BlockAddr::new((state >> 33) % 400);
            match model.remove(&addr) {
                Some(id) => cache.remove(id),
                None if model.len() < 256 => {
                    model.insert(addr, present(&mut cache, addr.get(), 1, None));
                }
                None => assert_eq!(cache.find(addr), None),
            }
        }
        for (addr, id) in &model {
            assert_eq!(cache.find(*addr), Some(*id));
        }
    }
}
