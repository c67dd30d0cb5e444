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
    /// Room for at least `leaves` copies, of 4 KiB each.
    pub(crate) fn new(leaves: usize) -> Self {
        let leaves = leaves.max(1).next_power_of_two();
        Self {
            headers: (0..leaves).map(|_| Header::default()).collect(),
            words: (0..leaves * NODE_ENTRIES).map(|_| AtomicU64::new(0)).collect(),
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
            let at = place * NODE_ENTRIES + slot_of(block);
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

    /// What visitors have written in place and answered by now.
    pub(crate) fn written(&self) -> Written {
        let mut all = Written::default();
        for seat in &self.seats {
            all.count += seat.written.load(Ordering::SeqCst);
            all.doubtful += seat.doubtful.load(Ordering::SeqCst);
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
        self.seats[visitor].oldest.store(stamp, Ordering::SeqCst);
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
        let word = &self.table.words[place * NODE_ENTRIES + slot_of(block)];
        let word = word.load(Ordering::Acquire);
        // After the word: who reads one from after a cut sees that cut.
        let cut = self.cut.load(Ordering::Acquire);
        fence(Ordering::Acquire);
        if header.version.load(Ordering::Relaxed) != version {
            return Place::Unknown;
        }
        if word & DATA == 0 {
            return Place::Hole;
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
        bessel_reactor::prefetch(
            &raw const self.table.words[place * NODE_ENTRIES + slot_of(block)],
        );
    }

    /// Notes the end of a write in place of `visitor`, before its guest is told. `doubtful` is asked after
    /// the write is to be seen by whoever judges a flush that fails from here on.
    pub(crate) fn wrote(&self, visitor: usize, bytes: u64, doubtful: impl FnOnce() -> bool) {
        let seat = &self.seats[visitor];
        add(&seat.write_bytes, bytes);
        // One writer: no other can come between.
        seat.written.store(seat.written.load(Ordering::Relaxed) + 1, Ordering::SeqCst);
        if doubtful() {
            seat.doubtful.store(seat.doubtful.load(Ordering::Relaxed) + 1, Ordering::SeqCst);
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
        let words = &self.words[place * NODE_ENTRIES..(place + 1) * NODE_ENTRIES];
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
        _ => 0,
    }
}
