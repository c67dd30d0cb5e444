//! What a volume's home shows to other shards, so that these can serve queues of it: where blocks lie,
//! and which may be written in place. And what they show to the home: what they have in flight.
//!
//! Only the home changes a mapping (DESIGN §7). It copies leaves that others ask for into a table of fixed
//! size and keeps the copies in step with the tree; others read them without locks. What they do not find
//! they send to the home ([`crate::visits`]). See docs/decisions/0019.
//!
//! What must not be broken:
//! - *A block is used for something else only when nobody can be reading or writing it as this volume's.*
//!   A visitor shows, before it looks up, the number that the home showed last (`stamp`), and the oldest such
//!   number of what it has in flight. Who takes a block out of the mapping remembers the number shown then;
//!   the block is free when all that is in flight has a later one.
//!
//!   ```text
//!   visitor                         home
//!   1 read `stamp`                  1 change the word
//!   2 write `oldest`                2 fence (SeqCst)
//!   3 fence (SeqCst)                3 read `oldest`
//!   4 read the word
//!   ```
//!
//!   If the visitor's fence comes first, the home sees `oldest`, and waits; if the home's does, the visitor
//!   sees the change. That is so with anything in flight before, too: then `oldest` is smaller still, and
//!   it is raised only to numbers that were read before their requests looked up.
//! - *What a snapshot has is not written to by what comes after it.* A cut changes `cut` before anything
//!   that comes after it is answered. A copy names the cut it was made after, and its blocks may be written
//!   in place only while that is the last one. Who can know of the snapshot has seen an answer that came
//!   after it, and so sees the new number, through whatever memory it learned by. A write that was looked up
//!   before is in flight at the cut, and is in the snapshot or not, as any such write (`settling`).
//! - *A copy is of one leaf.* Replacing it makes its version odd meanwhile (a sequence lock).
//!
//! `make loom` puts all of it under a model checker, with and without the fences (`mod models` below).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bessel_reactor::units::{BlockAddr, VolumeBlock};

use crate::format::{Entry, EntryKind, NODE_BITS, NODE_ENTRIES};
use crate::planted::{self, Bug};
use crate::request::{VolumeHandle, VolumeId};
use crate::sync::{AtomicU64, fence};
use crate::volume::VolumeCounters;

/// Bits of a leaf's number in its volume: what four levels have.
const LEAF_BITS: u32 = 3 * NODE_BITS;
/// Shown by who has nothing in flight.
const NOTHING: u64 = u64::MAX;
/// No cut has this number: a copy with it lets nothing be written in place.
const NO_CUT: u64 = 0;

/// In a word: it is a block with data, at the address above the flags.
const DATA: u64 = 1;
/// It may be written in place, as far as the leaf's copy goes.
const IN_PLACE: u64 = 2;
const FLAG_BITS: u32 = 2;
/// The home is to be asked.
const UNKNOWN: u64 = IN_PLACE;

/// Words of a copy. A model checker, which tries every order of every one, gets by with two.
const WORDS: usize = if cfg!(loom) { 2 } else { NODE_ENTRIES };

/// Where a block is, as far as the home shows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// Its leaf is not shown.
    Unknown,
    /// It reads as zeroes.
    Hole,
    /// Here. `in_place` when it may be written there.
    Data { home: BlockAddr, in_place: bool },
}

/// Copies of leaves, of all volumes of one home, each in the one place that its number leads to.
#[derive(Debug)]
pub(crate) struct LeafTable {
    headers: Box<[Header]>,
    words: Box<[AtomicU64]>,
    /// Names given out, so that none means two things.
    names: AtomicU64,
}

/// What there is in a place.
#[derive(Debug, Default)]
struct Header {
    /// Odd while it is being replaced.
    version: AtomicU64,
    /// The volume's name in the table, above the leaf's number.
    key: AtomicU64,
    /// The volume's last cut when the copy was made.
    cut: AtomicU64,
}

impl LeafTable {
    /// Room for up to `leaves` copies, of 4 KiB each: a power of two.
    pub(crate) fn new(leaves: usize) -> Self {
        let leaves = 1 << leaves.max(1).ilog2();
        Self {
            headers: (0..leaves).map(|_| Header::default()).collect(),
            words: (0..leaves * WORDS).map(|_| AtomicU64::new(0)).collect(),
            names: AtomicU64::new(1),
        }
    }

    fn fresh_name(&self) -> u64 {
        self.names.fetch_add(1, Ordering::Relaxed)
    }

    /// The place of a leaf: neighbours of one volume never compete.
    fn place(&self, key: u64) -> usize {
        let (name, leaf) = (key >> LEAF_BITS, key & ((1 << LEAF_BITS) - 1));
        let start = name.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20;
        (start.wrapping_add(leaf) as usize) & (self.headers.len() - 1)
    }
}

/// One volume, as its home shows it to visitors.
#[derive(Debug)]
pub struct SharedVolume {
    id: VolumeId,
    /// For log lines.
    name: String,
    home: usize,
    handle: VolumeHandle,
    table: Arc<LeafTable>,
    /// The volume's name in the table. With another one all its copies are void.
    key: AtomicU64,
    /// Counts what freezes blocks: cuts, and all else that forbids writes in place.
    cut: AtomicU64,
    /// What a request that comes now is to show.
    stamp: AtomicU64,
    sectors: AtomicU64,
    /// Not 0: a write is to be durable before it is answered.
    writethrough: AtomicU64,
    /// By shard.
    seats: Box<[Seat]>,
}

/// What one visitor shows. Written by it alone, and on cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
struct Seat {
    oldest: AtomicU64,
    /// Writes in place that have ended.
    written: AtomicU64,
    /// Writes that were in flight while some flush failed.
    doubtful: AtomicU64,
    reads: AtomicU64,
    read_bytes: AtomicU64,
    write_bytes: AtomicU64,
    errors: AtomicU64,
}

/// What all visitors have written.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Written {
    pub(crate) count: u64,
    pub(crate) doubtful: u64,
}

impl SharedVolume {
    /// A volume of which nothing is shown yet.
    pub(crate) fn new(
        id: VolumeId,
        name: &str,
        (home, handle): (usize, VolumeHandle),
        (sectors, stamp): (u64, u64),
        shards: usize,
        table: &Arc<LeafTable>,
    ) -> Self {
        Self {
            id,
            name: name.to_owned(),
            home,
            handle,
            key: AtomicU64::new(table.fresh_name() << LEAF_BITS),
            table: Arc::clone(table),
            cut: AtomicU64::new(NO_CUT + 1),
            stamp: AtomicU64::new(stamp),
            sectors: AtomicU64::new(sectors),
            writethrough: AtomicU64::new(0),
            seats: (0..shards).map(|_| Seat::new()).collect(),
        }
    }

    pub(crate) fn id(&self) -> VolumeId {
        self.id
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The shard that changes it.
    pub(crate) fn home(&self) -> usize {
        self.home
    }

    /// What it is called there.
    pub(crate) fn handle(&self) -> VolumeHandle {
        self.handle
    }

    // What the home does. None of it is called by anybody else.

    /// What a request that comes now shows.
    pub(crate) fn stamp(&self) -> u64 {
        self.stamp.load(Ordering::Acquire)
    }

    /// From now on requests show this.
    pub(crate) fn set_stamp(&self, stamp: u64) {
        self.stamp.store(stamp, Ordering::Release);
    }

    pub(crate) fn set_sectors(&self, sectors: u64) {
        self.sectors.store(sectors, Ordering::Release);
    }

    pub(crate) fn set_writethrough(&self, on: bool) {
        self.writethrough.store(u64::from(on), Ordering::Release);
    }

    /// Forbids to write in place whatever is shown by now.
    pub(crate) fn freeze(&self) {
        if !planted::is(Bug::VisitorsMissCut) {
            self.cut.store(self.cut.load(Ordering::Relaxed) + 1, Ordering::Release);
        }
    }

    /// Makes all copies void: the volume reads as another tree from here on.
    pub(crate) fn forget_all(&self) {
        self.key.store(self.table.fresh_name() << LEAF_BITS, Ordering::Release);
    }

    /// Makes the copies void that map some of `count` blocks.
    pub(crate) fn forget(&self, first: VolumeBlock, count: u64) {
        let (from, to) = (leaf_of(first), leaf_of(first.add(count - 1)));
        if to - from >= self.table.headers.len() as u64 {
            return self.forget_all();
        }
        for leaf in from..=to {
            let key = self.key.load(Ordering::Relaxed) | leaf;
            let place = self.table.place(key);
            if self.table.headers[place].key.load(Ordering::Relaxed) == key {
                self.table.replace(place, 0, NO_CUT, |_| 0);
            }
        }
    }

    /// True when the leaf of `block` is shown; with `in_place`, so that it may be written in place.
    pub(crate) fn shows(&self, block: VolumeBlock, in_place: bool) -> bool {
        let key = self.key.load(Ordering::Relaxed) | leaf_of(block);
        let header = &self.table.headers[self.table.place(key)];
        let current = header.cut.load(Ordering::Relaxed) == self.cut.load(Ordering::Relaxed);
        header.key.load(Ordering::Relaxed) == key && (current || !in_place)
    }

    /// Shows the leaf of `block`: its entries, or none for a leaf of holes. `writable` when the way to it
    /// is, and nothing forbids it.
    pub(crate) fn show(
        &self,
        block: VolumeBlock,
        entries: Option<&[Entry; NODE_ENTRIES]>,
        writable: bool,
    ) {
        let key = self.key.load(Ordering::Relaxed) | leaf_of(block);
        let cut = if writable { self.cut.load(Ordering::Relaxed) } else { NO_CUT };
        let word = |slot: usize| entries.map_or(0, |entries| word(entries[slot]));
        self.table.replace(self.table.place(key), key, cut, word);
    }

    /// Keeps the copy of the block's leaf in step, if there is one.
    pub(crate) fn set(&self, block: VolumeBlock, entry: Entry) {
        let key = self.key.load(Ordering::Relaxed) | leaf_of(block);
        let place = self.table.place(key);
        if self.table.headers[place].key.load(Ordering::Relaxed) == key
            && !planted::is(Bug::VisitorsMissChange)
        {
            let at = place * WORDS + slot_of(block);
            self.table.words[at].store(word(entry), Ordering::Release);
        }
    }

    /// The oldest number that a visitor shows, if one has anything in flight. What was changed before this
    /// call is seen by all who look up later.
    pub(crate) fn oldest(&self) -> Option<u64> {
        fence(Ordering::SeqCst);
        let shown = self.seats.iter().map(|seat| seat.oldest.load(Ordering::Acquire));
        shown.min().filter(|oldest| *oldest != NOTHING)
    }

    /// What visitors have written in place and answered by now. A failed flush that the caller has heard of is
    /// seen by all whose writes are not in it.
    pub(crate) fn written(&self) -> Written {
        fence(Ordering::SeqCst);
        let mut all = Written::default();
        for seat in &self.seats {
            all.count += seat.written.load(Ordering::Acquire);
            all.doubtful += seat.doubtful.load(Ordering::Acquire);
        }
        all
    }

    /// What visitors did by themselves.
    pub(crate) fn counters(&self) -> VolumeCounters {
        let mut all = VolumeCounters::default();
        for seat in &self.seats {
            all.reads += seat.reads.load(Ordering::Relaxed);
            all.read_bytes += seat.read_bytes.load(Ordering::Relaxed);
            all.writes += seat.written.load(Ordering::Relaxed);
            all.write_bytes += seat.write_bytes.load(Ordering::Relaxed);
            all.errors += seat.errors.load(Ordering::Relaxed);
        }
        all
    }

    // What visitors do.

    /// Sectors that may be addressed.
    pub(crate) fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Acquire)
    }

    /// True when a write that ends now has to be durable before it is answered.
    pub(crate) fn is_writethrough(&self) -> bool {
        self.writethrough.load(Ordering::Acquire) != 0
    }

    /// Shows that shard `visitor`, which had nothing in flight, has something from `stamp` on. Before it
    /// looks up.
    pub(crate) fn enter(&self, visitor: usize, stamp: u64) {
        self.seats[visitor].oldest.store(stamp, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Shows what its oldest is now, or that nothing is in flight any more.
    pub(crate) fn leave(&self, visitor: usize, oldest: Option<u64>) {
        self.seats[visitor].oldest.store(oldest.unwrap_or(NOTHING), Ordering::Release);
    }

    /// Where a block is. Between [`SharedVolume::enter`] and [`SharedVolume::leave`]. Hot path.
    #[inline]
    pub(crate) fn look_up(&self, block: VolumeBlock) -> Place {
        let key = self.key.load(Ordering::Acquire) | leaf_of(block);
        let place = self.table.place(key);
        let header = &self.table.headers[place];
        let version = header.version.load(Ordering::Acquire);
        if version % 2 == 1 || header.key.load(Ordering::Relaxed) != key {
            return Place::Unknown;
        }
        let copied_at = header.cut.load(Ordering::Relaxed);
        let word = &self.table.words[place * WORDS + slot_of(block)];
        let word = word.load(Ordering::Acquire);
        // After the word: who reads one from after a cut sees that cut.
        let cut = self.cut.load(Ordering::Acquire);
        fence(Ordering::Acquire);
        if header.version.load(Ordering::Relaxed) != version {
            return Place::Unknown;
        }
        if word & DATA == 0 {
            return if word == 0 { Place::Hole } else { Place::Unknown };
        }
        let in_place = word & IN_PLACE != 0 && copied_at == cut;
        Place::Data { home: BlockAddr::new(word >> FLAG_BITS), in_place }
    }

    /// Has what [`SharedVolume::look_up`] will need brought to the processor's cache.
    #[inline]
    pub(crate) fn expect(&self, block: VolumeBlock) {
        let key = self.key.load(Ordering::Relaxed) | leaf_of(block);
        let place = self.table.place(key);
        bessel_reactor::prefetch(&raw const self.table.headers[place]);
        bessel_reactor::prefetch(&raw const self.table.words[place * WORDS + slot_of(block)]);
    }

    /// Notes the end of a write in place of `visitor`, before its guest is told. `doubtful` is asked after
    /// the write is to be seen by whoever judges a flush that fails from here on.
    pub(crate) fn wrote(&self, visitor: usize, bytes: u64, doubtful: impl FnOnce() -> bool) {
        let seat = &self.seats[visitor];
        add(&seat.write_bytes, bytes);
        // One writer: no other can come between.
        seat.written.store(seat.written.load(Ordering::Relaxed) + 1, Ordering::Release);
        fence(Ordering::SeqCst);
        if doubtful() {
            seat.doubtful.store(seat.doubtful.load(Ordering::Relaxed) + 1, Ordering::Release);
        }
    }

    /// Notes the end of a read.
    pub(crate) fn did_read(&self, visitor: usize, bytes: u64) {
        add(&self.seats[visitor].reads, 1);
        add(&self.seats[visitor].read_bytes, bytes);
    }

    /// Notes a request that failed.
    pub(crate) fn failed(&self, visitor: usize) {
        add(&self.seats[visitor].errors, 1);
    }
}

impl PartialEq for SharedVolume {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Eq for SharedVolume {}

impl LeafTable {
    /// Puts a copy in a place. Called by the home alone.
    fn replace(&self, place: usize, key: u64, cut: u64, word: impl Fn(usize) -> u64) {
        let header = &self.headers[place];
        let version = header.version.load(Ordering::Relaxed);
        header.version.store(version + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        header.key.store(key, Ordering::Relaxed);
        header.cut.store(cut, Ordering::Relaxed);
        let words = &self.words[place * WORDS..(place + 1) * WORDS];
        for (slot, target) in words.iter().enumerate() {
            target.store(word(slot), Ordering::Relaxed);
        }
        header.version.store(version + 2, Ordering::Release);
    }
}

impl Seat {
    fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            oldest: AtomicU64::new(NOTHING),
            written: zero(),
            doubtful: zero(),
            reads: zero(),
            read_bytes: zero(),
            write_bytes: zero(),
            errors: zero(),
        }
    }
}

/// Adds to a counter that has one writer.
fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Ordering::Relaxed) + amount, Ordering::Relaxed);
}

fn leaf_of(block: VolumeBlock) -> u64 {
    block.get() / NODE_ENTRIES as u64
}

fn slot_of(block: VolumeBlock) -> usize {
    block.get() as usize % NODE_ENTRIES
}

fn word(entry: Entry) -> u64 {
    match entry.kind() {
        EntryKind::Data => {
            let in_place = if entry.read_only() { 0 } else { IN_PLACE };
            entry.block().get() << FLAG_BITS | in_place | DATA
        }
        EntryKind::Sparse | EntryKind::Zeroed => 0,
        // Nothing that a leaf has today.
        _ => UNKNOWN,
    }
}

#[cfg(test)]
#[cfg(not(loom))] // What they make is not the model's.
mod tests {
    use super::*;

    fn volume(leaves: usize) -> (Arc<LeafTable>, SharedVolume) {
        let table = Arc::new(LeafTable::new(leaves));
        let at = (0, VolumeHandle(3));
        let volume = SharedVolume::new(VolumeId(7), "v", at, (1 << 30, 1), 2, &table);
        (table, volume)
    }

    fn leaf(first: u64) -> [Entry; NODE_ENTRIES] {
        std::array::from_fn(|slot| Entry::data(BlockAddr::new(first + slot as u64)))
    }

    fn block(leaf: u64, slot: u64) -> VolumeBlock {
        VolumeBlock::new(leaf * NODE_ENTRIES as u64 + slot)
    }

    fn at(home: u64, in_place: bool) -> Place {
        Place::Data { home: BlockAddr::new(home), in_place }
    }

    #[test]
    fn a_leaf_that_is_shown_is_found_until_another_takes_its_place() {
        let (_, volume) = volume(4);
        assert_eq!(volume.look_up(block(1, 5)), Place::Unknown);
        for number in 0..4 {
            volume.show(block(number, 0), Some(&leaf(1000 * (number + 1))), true);
        }
        for number in 0..4 {
            assert_eq!(volume.look_up(block(number, 5)), at(1000 * (number + 1) + 5, true));
        }
        volume.show(block(5, 0), None, false);
        assert_eq!(volume.look_up(block(5, 511)), Place::Hole);
        let lost = (0..4).filter(|leaf| volume.look_up(block(*leaf, 0)) == Place::Unknown);
        assert_eq!(lost.count(), 1);
    }

    #[test]
    fn a_cut_freezes_what_was_shown_and_not_what_is_shown_after_it() {
        let (_, volume) = volume(4);
        volume.show(block(0, 0), Some(&leaf(1000)), true);
        volume.show(block(1, 0), Some(&leaf(2000)), false);
        assert!(volume.shows(block(0, 0), true) && !volume.shows(block(1, 0), true));
        assert_eq!(volume.look_up(block(1, 1)), at(2001, false));
        volume.freeze();
        assert_eq!(volume.look_up(block(0, 1)), at(1001, false));
        // The home gives it a new place; until it shows the leaf again, that is no other's to write to.
        volume.set(block(0, 1), Entry::data(BlockAddr::new(5000)));
        assert_eq!(volume.look_up(block(0, 1)), at(5000, false));
        assert!(volume.shows(block(0, 1), false) && !volume.shows(block(0, 1), true));
        let mut entries = leaf(1000).map(|entry| entry.to_read_only());
        entries[1] = Entry::data(BlockAddr::new(5000));
        volume.show(block(0, 0), Some(&entries), true);
        assert_eq!(volume.look_up(block(0, 1)), at(5000, true));
        assert_eq!(volume.look_up(block(0, 2)), at(1002, false));
    }

    #[test]
    fn what_is_forgotten_is_not_found_and_nothing_else_goes() {
        let (table, volume) = volume(8);
        let other =
            SharedVolume::new(VolumeId(8), "o", (0, VolumeHandle(4)), (1 << 30, 1), 2, &table);
        let shown = |volume: &SharedVolume, number| volume.look_up(block(number, 0));
        for number in 0..4 {
            volume.show(block(number, 0), Some(&leaf(1000)), true);
        }
        volume.forget(block(1, 0), 2 * NODE_ENTRIES as u64);
        let found = [0, 1, 2, 3].map(|number| shown(&volume, number) != Place::Unknown);
        assert_eq!(found, [true, false, false, true]);
        // More leaves than there are places.
        volume.forget(block(0, 0), 100 * NODE_ENTRIES as u64);
        assert_eq!([0, 3].map(|number| shown(&volume, number)), [Place::Unknown; 2]);
        other.show(block(0, 0), Some(&leaf(3000)), true);
        volume.show(block(0, 0), Some(&leaf(1000)), true);
        let both = [shown(&volume, 0), shown(&other, 0)];
        assert!(both == [at(1000, true), at(3000, true)] || both[1] == Place::Unknown, "{both:?}");
        volume.forget_all();
        assert_eq!(shown(&volume, 0), Place::Unknown);
    }

    #[test]
    fn the_home_sees_the_oldest_of_all_visitors() {
        let (_, volume) = volume(1);
        assert_eq!(volume.oldest(), None);
        volume.enter(0, 5);
        volume.enter(1, 3);
        assert_eq!(volume.oldest(), Some(3));
        volume.leave(1, Some(9));
        assert_eq!(volume.oldest(), Some(5));
        volume.leave(0, None);
        volume.leave(1, None);
        assert_eq!(volume.oldest(), None);
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::thread;

    const OLD: BlockAddr = BlockAddr::new(1000);
    const BLOCK: VolumeBlock = VolumeBlock::new(0);

    fn shown() -> Arc<SharedVolume> {
        let table = Arc::new(LeafTable::new(1));
        let at = (0, VolumeHandle(3));
        let volume = SharedVolume::new(VolumeId(7), "v", at, (1 << 30, 1), 1, &table);
        volume.show(BLOCK, Some(&[Entry::data(OLD); NODE_ENTRIES]), true);
        Arc::new(volume)
    }

    /// The home takes a block out of the mapping, and uses its contents for something else once it may, while
    /// a visitor does `visit`.
    fn reuse(volume: Arc<SharedVolume>, visit: fn(&SharedVolume, &UnsafeCell<()>)) {
        let contents = Arc::new(UnsafeCell::new(()));
        let visitor = {
            let (volume, contents) = (Arc::clone(&volume), Arc::clone(&contents));
            thread::spawn(move || visit(&volume, &contents))
        };
        volume.set(BLOCK, Entry::sparse());
        let stamp = volume.stamp();
        volume.set_stamp(stamp + 1);
        if volume.oldest().is_none_or(|oldest| oldest > stamp) {
            contents.with_mut(|_| ());
        }
        visitor.join().expect("it does not panic");
    }

    fn read(volume: &SharedVolume, contents: &UnsafeCell<()>) {
        if volume.look_up(BLOCK) != Place::Hole {
            contents.with(|_| ());
        }
        volume.leave(0, None);
    }

    #[test]
    fn a_block_is_used_again_when_no_visitor_can_be_reading_it() {
        loom::model(|| {
            reuse(shown(), |volume, contents| {
                volume.enter(0, volume.stamp());
                read(volume, contents);
            });
        });
    }

    #[test]
    #[should_panic(expected = "Causality violation")]
    fn without_the_fence_a_visitor_reads_what_is_used_again() {
        loom::model(|| {
            reuse(shown(), |volume, contents| {
                volume.seats[0].oldest.store(volume.stamp(), Ordering::Release);
                read(volume, contents);
            });
        });
    }

    /// A second request comes without a fence, behind one that is in flight: what that one shows covers it, and
    /// its own number takes over when that ends.
    #[test]
    fn a_request_behind_another_needs_no_fence() {
        loom::model(|| {
            let volume = shown();
            volume.enter(0, volume.stamp());
            reuse(volume, |volume, contents| {
                let stamp = volume.stamp();
                let reads = volume.look_up(BLOCK) != Place::Hole;
                volume.leave(0, Some(stamp)); // The one before it has ended.
                if reads {
                    contents.with(|_| ());
                }
                volume.leave(0, None);
            });
        });
    }

    /// A flush fails while a visitor's write ends. Whoever is second to look knows of it: the home sees the
    /// write, or the visitor the failure.
    #[test]
    fn a_write_and_a_failed_flush_do_not_miss_each_other() {
        loom::model(|| {
            let volume = shown();
            let failures = Arc::new(AtomicU64::new(0));
            let visitor = {
                let (volume, failures) = (Arc::clone(&volume), Arc::clone(&failures));
                thread::spawn(move || {
                    volume.wrote(0, 4096, || failures.load(Ordering::SeqCst) != 0);
                })
            };
            failures.fetch_add(1, Ordering::SeqCst);
            let seen = volume.written().count;
            visitor.join().expect("it does not panic");
            assert!(seen == 1 || volume.written().doubtful == 1, "nobody knows");
        });
    }

    /// The home cuts, gives the block a new place and answers; who has seen the answer must not write to
    /// the old one.
    #[test]
    fn who_has_seen_an_answer_from_after_a_cut_writes_nothing_into_the_snapshot() {
        loom::model(|| {
            let volume = shown();
            let answered = Arc::new(AtomicU64::new(0));
            let home = {
                let (volume, answered) = (Arc::clone(&volume), Arc::clone(&answered));
                thread::spawn(move || {
                    volume.freeze();
                    answered.store(1, Ordering::Release);
                    let moved = Entry::data(BlockAddr::new(2000));
                    volume.set(BLOCK, moved);
                    volume.show(BLOCK, Some(&[moved; NODE_ENTRIES]), true);
                })
            };
            let told = answered.load(Ordering::Acquire) == 1;
            let place = volume.look_up(BLOCK);
            if told {
                assert_ne!(place, Place::Data { home: OLD, in_place: true });
            }
            home.join().expect("it does not panic");
        });
    }

    /// The one place there is gets another leaf's copy, and this one's back, while a visitor looks up by
    /// `look_up`.
    fn replaced(look_up: fn(&SharedVolume) -> Place) {
        let volume = shown();
        let home = {
            let volume = Arc::clone(&volume);
            thread::spawn(move || {
                let other = VolumeBlock::new(NODE_ENTRIES as u64);
                let elsewhere = Entry::data(BlockAddr::new(7000));
                volume.show(other, Some(&[elsewhere; NODE_ENTRIES]), true);
                volume.show(BLOCK, Some(&[Entry::data(OLD); NODE_ENTRIES]), true);
            })
        };
        let place = look_up(&volume);
        let right = Place::Data { home: OLD, in_place: true };
        assert!(place == right || place == Place::Unknown, "a visitor reads {place:?}");
        home.join().expect("it does not panic");
    }

    #[test]
    fn a_copy_that_is_replaced_is_not_taken_for_another() {
        loom::model(|| replaced(|volume| volume.look_up(BLOCK)));
    }

    #[test]
    #[should_panic(expected = "a visitor reads")]
    fn without_the_version_it_is() {
        loom::model(|| {
            replaced(|volume| {
                let header = &volume.table.headers[0];
                if header.key.load(Ordering::Acquire) != volume.key.load(Ordering::Relaxed) {
                    return Place::Unknown;
                }
                let word = volume.table.words[0].load(Ordering::Acquire);
                Place::Data { home: BlockAddr::new(word >> FLAG_BITS), in_place: true }
            });
        });
    }
}
