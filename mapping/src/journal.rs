//! What a killed process must not take with it: mappings that are installed and not yet durable.
//!
//! In writeback mode a write completes when its data has been written; its mapping reaches the
//! device with a later round. When the power goes, a guest expects to lose what no flush has
//! covered, and goes down itself. When only this process is killed, the guest lives on and expects
//! to lose nothing (DESIGN §8: "a pause, not an error"). The data is on the device or in the kernel
//! then; only the mapping is gone. So each change of a mapping is noted in memory that outlives the
//! process and not the host, before the request that made it completes; the next process on the
//! same boot makes the changes again before it serves anybody.
//!
//! One journal a shard, a ring of entries. An entry is retired when the round that holds its change
//! is durable. What must not be broken:
//! - Between the oldest entry that is not retired and the newest, none is missing: the *last* change
//!   to each block wins, and that may be one that is durable already.
//! - A volume's changes are in the journal of its home. A shard that closes a volume makes void what its
//!   journal has of it, before another opens it.
//! - An entry is whole or not there: a process can be killed between any two stores.
//! - A journal counts only while the store names the life that wrote it as the one that last served
//!   guests ([`crate::store::begin_life`]), on the same boot: afterwards its blocks may be somebody
//!   else's. A life that ends before it has served anybody changes nothing of that.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{Ordering, compiler_fence};

use bessel_reactor::buffer::Segment;
use bessel_reactor::units::{BlockAddr, VolumeBlock};

use crate::format::NODE_ENTRIES;
use crate::planted::{self, Bug};
use crate::request::VolumeId;

const MAGIC: [u8; 8] = *b"BESSELJ1";
const HEADER_BYTES: usize = 64;
/// Where the header keeps the number of the oldest entry that is not retired.
const TAIL_OFFSET: usize = 56;
const ENTRY_BYTES: usize = 48;
/// Entries that one step of a request may add, with some to spare.
const ENTRIES_PER_STEP: u64 = 4;

/// Bytes of memory for a journal: 65,536 entries, or a third of a second of allocating writes at
/// 200,000 a second, while rounds are due five times a second.
pub const JOURNAL_BYTES: usize = HEADER_BYTES + ENTRY_BYTES * 65_536;

/// Which life of which store a journal belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// UUID of the store.
    pub store: [u8; 16],
    /// The kernel's boot id.
    pub boot: [u8; 16],
    /// Random name of the life.
    pub life: [u8; 16],
}

/// What blocks of a volume became.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mapped {
    /// Data, one block after the other from here.
    Data(BlockAddr),
    /// Never written, or discarded.
    Sparse,
    /// Written with zeroes.
    Zeroed,
}

/// One change of a volume's mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// The first block that changed.
    pub first: VolumeBlock,
    /// How many.
    pub count: u64,
    /// What they became.
    pub now: Mapped,
}

/// An entry of a journal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// A mapping changed.
    Changed(VolumeId, Change),
    /// The volume's tree was replaced by another, durably complete one: forget what was before.
    Replaced(VolumeId),
}

/// Entries of one volume that one round holds, as a run in the ring.
#[derive(Debug)]
struct Span {
    volume: VolumeId,
    round: u64,
    /// The number after the last of them.
    end: u64,
}

/// A shard's journal. Hot path: appending copies 48 bytes.
#[derive(Debug)]
pub struct Journal {
    memory: Segment,
    capacity: u64,
    /// Entries are numbered from 1; a zeroed place holds none.
    tail: u64,
    next: u64,
    spans: VecDeque<Span>,
}

impl Journal {
    /// Starts an empty journal in `memory`, which is zeroed, at least [`JOURNAL_BYTES`] long or a
    /// test's shorter one, and stays as it is when the process ends.
    pub fn create(memory: Segment, identity: &Identity) -> Self {
        let capacity = (memory.len() - HEADER_BYTES) / ENTRY_BYTES;
        assert!(capacity as u64 > 2 * ENTRIES_PER_STEP, "{} bytes are no journal", memory.len());
        let mut header = [0; HEADER_BYTES];
        header[8..24].copy_from_slice(&identity.store);
        header[24..40].copy_from_slice(&identity.boot);
        header[40..56].copy_from_slice(&identity.life);
        header[TAIL_OFFSET..].copy_from_slice(&1u64.to_le_bytes());
        memory.write(&header);
        compiler_fence(Ordering::Release);
        memory.write(&MAGIC); // Last: a header is whole or none.
        let spans = VecDeque::with_capacity(1024);
        Self { memory, capacity: capacity as u64, tail: 1, next: 1, spans }
    }

    /// True when a step of a request may add what it has to add, and each of the `open` volumes can
    /// be forgotten after it.
    pub(crate) fn has_room(&self, open: usize) -> bool {
        self.next - self.tail + ENTRIES_PER_STEP + open as u64 <= self.capacity
    }

    /// Makes all changes of a volume void: no round will make them durable, and the next life must
    /// not make them again. Those that cannot be retired yet, since older ones of other volumes are
    /// before them, are overruled by an entry behind them.
    pub(crate) fn forget(&mut self, volume: VolumeId) {
        let mut found = false;
        for span in self.spans.iter_mut().filter(|span| span.volume == volume) {
            found |= span.round > 0;
            span.round = 0; // Which is always durable.
        }
        if found {
            self.append(volume, 0, &Entry::Replaced(volume));
        }
    }

    /// Notes changes that no round of this life will make durable: those of a volume that could not
    /// be restored, for the next life to try. In a journal of their own, long enough for them.
    pub fn carry(&mut self, volume: VolumeId, changes: &[Change]) {
        for change in changes {
            self.append(volume, u64::MAX, &Entry::Changed(volume, *change));
        }
    }

    /// Bytes of memory for a journal of this many entries.
    pub const fn bytes_for(entries: usize) -> usize {
        HEADER_BYTES + ENTRY_BYTES * (entries + 4 * ENTRIES_PER_STEP as usize)
    }

    /// Notes a change that round `round` of the volume will make durable.
    pub(crate) fn append(&mut self, volume: VolumeId, round: u64, entry: &Entry) {
        assert!(self.next - self.tail < self.capacity, "`has_room` is asked first");
        if planted::is(Bug::JournalEntryLate) {
            let place = self.place(self.next - 1);
            place.part(0, 8).write(&(self.next - 1).to_le_bytes());
            self.place(self.next).write(&encode(self.next, entry));
            self.place(self.next).part(0, 8).write(&[0xff; 8]);
        } else {
            self.place(self.next).write(&encode(self.next, entry));
        }
        compiler_fence(Ordering::Release); // Before whatever follows: a kill may come any time.
        self.next += 1;
        match self.spans.back_mut() {
            Some(last) if last.volume == volume && last.round == round => last.end = self.next,
            _ => self.spans.push_back(Span { volume, round, end: self.next }),
        }
    }

    /// Retires the oldest entries for as long as `durable` says so of their volume and round. True
    /// when any were.
    pub(crate) fn retire(&mut self, durable: impl Fn(VolumeId, u64) -> bool) -> bool {
        let tail = self.tail;
        while let Some(span) = self.spans.front()
            && durable(span.volume, span.round)
        {
            self.tail = span.end;
            self.spans.pop_front();
        }
        if self.tail > tail {
            self.memory.part(TAIL_OFFSET, 8).write(&self.tail.to_le_bytes());
            compiler_fence(Ordering::Release); // Before its entries are overwritten.
        }
        self.tail > tail
    }

    fn place(&self, number: u64) -> Segment {
        let index = (number % self.capacity) as usize;
        self.memory.part(HEADER_BYTES + index * ENTRY_BYTES, ENTRY_BYTES)
    }
}

fn encode(number: u64, entry: &Entry) -> [u8; ENTRY_BYTES] {
    let (volume, first, count, home, kind) = match entry {
        Entry::Replaced(volume) => (volume, 0, 0, 0, 4),
        Entry::Changed(volume, change) => {
            let (home, kind) = match change.now {
                Mapped::Data(home) => (home.get(), 1),
                Mapped::Sparse => (0, 2),
                Mapped::Zeroed => (0, 3u32),
            };
            (volume, change.first.get(), change.count, home, kind)
        }
    };
    let mut bytes = [0; ENTRY_BYTES];
    for (place, word) in bytes.chunks_exact_mut(8).zip([number, volume.0, first, count, home]) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes[40..44].copy_from_slice(&kind.to_le_bytes());
    let check = crc32c::crc32c(&bytes[..44]);
    bytes[44..].copy_from_slice(&check.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8; ENTRY_BYTES], number: u64) -> Option<Entry> {
    let word = |at: usize| {
        let bytes: [u8; 8] = bytes[at..at + 8].try_into().expect("eight bytes");
        u64::from_le_bytes(bytes)
    };
    let half = |at: usize| {
        let bytes: [u8; 4] = bytes[at..at + 4].try_into().expect("four bytes");
        u32::from_le_bytes(bytes)
    };
    if half(44) != crc32c::crc32c(&bytes[..44]) || word(0) != number {
        return None;
    }
    let volume = VolumeId(word(8));
    let now = match half(40) {
        // A piece of I/O lies below one leaf.
        1 if word(24) <= NODE_ENTRIES as u64 => Mapped::Data(BlockAddr::new(word(32))),
        2 => Mapped::Sparse,
        3 => Mapped::Zeroed,
        4 => return Some(Entry::Replaced(volume)),
        _ => return None,
    };
    // No store and no volume has more blocks than an entry of a node can name.
    let in_bounds = [word(16), word(24), word(32)].iter().all(|number| *number < 1 << 44);
    let change = Change { first: VolumeBlock::new(word(16)), count: word(24), now };
    in_bounds.then_some(Entry::Changed(volume, change))
}

/// Reads the journal that another life left in `memory`; `None` when there is none.
pub fn read(memory: &Segment) -> Option<(Identity, Vec<Entry>)> {
    if memory.len() < HEADER_BYTES + ENTRY_BYTES {
        return None;
    }
    let mut header = [0; HEADER_BYTES];
    memory.read(&mut header);
    if header[..8] != MAGIC {
        return None;
    }
    let bytes16 = |at: usize| header[at..at + 16].try_into().expect("sixteen bytes");
    let word = |at: usize| {
        let bytes: [u8; 8] = header[at..at + 8].try_into().expect("eight bytes");
        u64::from_le_bytes(bytes)
    };
    let identity = Identity { store: bytes16(8), boot: bytes16(24), life: bytes16(40) };
    let capacity = ((memory.len() - HEADER_BYTES) / ENTRY_BYTES) as u64;
    let tail = word(TAIL_OFFSET);
    let mut entries = Vec::new();
    for number in tail..tail.saturating_add(capacity) {
        let mut bytes = [0; ENTRY_BYTES];
        let index = (number % capacity) as usize;
        memory.part(HEADER_BYTES + index * ENTRY_BYTES, ENTRY_BYTES).read(&mut bytes);
        let Some(entry) = decode(&bytes, number) else { break };
        entries.push(entry);
    }
    Some((identity, entries))
}

/// What remains to be done for each volume, given the journals found, one of each shard, and the identity
/// of the life that last served guests: the last change to each block.
pub fn outstanding(
    journals: Vec<(Identity, Vec<Entry>)>,
    last: &Identity,
) -> BTreeMap<VolumeId, Vec<Change>> {
    let mut volumes: BTreeMap<VolumeId, Vec<Change>> = BTreeMap::new();
    if planted::is(Bug::JournalNotReplayed) {
        return volumes;
    }
    let any_life = planted::is(Bug::JournalOfOtherLives);
    let mut remaining: BTreeMap<VolumeId, Remaining> = BTreeMap::new();
    for (_, entries) in journals.iter().filter(|(identity, _)| any_life || identity == last) {
        // From the newest change to the oldest: who comes first, wins.
        for index in (0..entries.len()).rev() {
            let oldest_wins = planted::is(Bug::JournalOldestWins);
            match &entries[if oldest_wins { entries.len() - 1 - index } else { index }] {
                Entry::Replaced(volume) => remaining.entry(*volume).or_default().complete = true,
                Entry::Changed(volume, change) => {
                    remaining.entry(*volume).or_default().add(change);
                }
            }
        }
        // A volume that was handed over has entries in several journals. All but its last home's are
        // void, by their own last entry, which says nothing about the others.
        for (volume, of_journal) in &mut remaining {
            volumes.entry(*volume).or_default().append(&mut of_journal.changes);
        }
        if !planted::is(Bug::HandOverEndsAllJournals) {
            remaining.clear();
        }
    }
    volumes
}

/// Changes of one volume, none of which covers a block of another.
#[derive(Default)]
struct Remaining {
    changes: Vec<Change>,
    /// Ends of the covered ranges by their starts; disjoint.
    covered: BTreeMap<u64, u64>,
    /// What is older does not count.
    complete: bool,
}

impl Remaining {
    /// Adds the parts of an older change that no newer one covers.
    fn add(&mut self, change: &Change) {
        if self.complete {
            return;
        }
        let (mut at, end) = (change.first.get(), change.first.get().saturating_add(change.count));
        let mut gaps = Vec::new();
        let before = self.covered.range(..=at).next_back().map(|(_, end)| *end);
        at = at.max(before.unwrap_or(0));
        for (start, covered_end) in self.covered.range(at..) {
            if at >= end || *start >= end {
                break;
            }
            if at < *start {
                gaps.push((at, *start));
            }
            at = *covered_end;
        }
        if at < end {
            gaps.push((at, end));
        }
        for (start, end) in gaps {
            let skipped = start - change.first.get();
            let now = match change.now {
                Mapped::Data(home) => Mapped::Data(home.add(skipped)),
                hole => hole,
            };
            self.changes.push(Change { first: VolumeBlock::new(start), count: end - start, now });
            self.covered.insert(start, end);
        }
    }
}

#[cfg(test)]
mod tests {
    use bessel_reactor::buffer::{Buffer, BufferPool};

    use super::*;

    const V: VolumeId = VolumeId(3);
    const LIFE: Identity = Identity { store: [1; 16], boot: [2; 16], life: [9; 16] };

    fn memory() -> (BufferPool, Buffer) {
        let mut pool = BufferPool::new(1, 4096);
        let buffer = pool.take().unwrap();
        (pool, buffer)
    }

    fn change(first: u64, count: u64, now: Mapped) -> Change {
        Change { first: VolumeBlock::new(first), count, now }
    }

    fn data(first: u64, count: u64, home: u64) -> Change {
        change(first, count, Mapped::Data(BlockAddr::new(home)))
    }

    fn append(journal: &mut Journal, round: u64, change: Change) {
        journal.append(V, round, &Entry::Changed(V, change));
    }

    #[test]
    fn what_is_not_retired_is_read_back_round_and_round() {
        let (mut pool, buffer) = memory();
        let memory = pool.lend(&buffer);
        assert_eq!(read(&memory), None);
        let mut journal = Journal::create(memory, &LIFE);
        for round in 0..1000 {
            assert!(journal.has_room(0));
            append(&mut journal, round, data(round, 1, round + 7));
            append(&mut journal, round, change(round + 1, 2, Mapped::Zeroed));
            if round > 3 {
                assert!(journal.retire(|_, of| of + 3 < round));
            }
        }
        let (identity, entries) = read(&memory).unwrap();
        assert_eq!(identity, LIFE);
        assert_eq!(entries.len(), 2 * 4);
        assert_eq!(entries[0], Entry::Changed(V, data(996, 1, 1003)));
        assert_eq!(entries[7], Entry::Changed(V, change(1000, 2, Mapped::Zeroed)));
    }

    #[test]
    fn a_full_journal_says_so_before_it_overwrites_anything() {
        let (mut pool, buffer) = memory();
        let memory = pool.lend(&buffer);
        let mut journal = Journal::create(memory, &LIFE);
        let mut count = 0;
        while journal.has_room(1) {
            append(&mut journal, 1, data(count, 1, count));
            count += 1;
        }
        assert_eq!(read(&memory).unwrap().1.len() as u64, count);
        assert!(!journal.retire(|_, _| false));
        journal.forget(V); // There is room for that, once.
        journal.forget(V);
        assert_eq!(read(&memory).unwrap().1.len() as u64, count + 1);
        assert!(journal.retire(|_, _| true) && journal.has_room(0));
        assert_eq!(read(&memory).unwrap().1, vec![]);
    }

    #[test]
    fn an_entry_cut_short_ends_the_journal() {
        let (mut pool, buffer) = memory();
        let memory = pool.lend(&buffer);
        let mut journal = Journal::create(memory, &LIFE);
        append(&mut journal, 1, data(0, 1, 5));
        append(&mut journal, 1, data(1, 1, 6));
        memory.part(HEADER_BYTES + 2 * ENTRY_BYTES + 16, 1).write(&[99]);
        assert_eq!(read(&memory).unwrap().1, vec![Entry::Changed(V, data(0, 1, 5))]);
    }

    #[test]
    fn the_last_change_to_each_block_wins() {
        let entries = [data(0, 8, 100), change(2, 2, Mapped::Sparse), data(3, 1, 200)];
        let entries = entries.map(|change| Entry::Changed(V, change)).to_vec();
        let left = outstanding(vec![(LIFE, entries)], &LIFE);
        let expected =
            vec![data(3, 1, 200), change(2, 1, Mapped::Sparse), data(0, 2, 100), data(4, 4, 104)];
        assert_eq!(left[&V], expected);
    }

    #[test]
    fn a_replaced_tree_forgets_what_was_before() {
        let entries = vec![
            Entry::Changed(V, data(0, 1, 1)),
            Entry::Replaced(V),
            Entry::Changed(V, data(5, 1, 2)),
        ];
        assert_eq!(outstanding(vec![(LIFE, entries)], &LIFE)[&V], vec![data(5, 1, 2)]);
    }

    #[test]
    fn only_the_life_that_the_store_names_counts() {
        let entry = |block| vec![Entry::Changed(V, data(block, 1, block))];
        for other in [
            Identity { boot: [3; 16], ..LIFE },
            Identity { store: [3; 16], ..LIFE },
            Identity { life: [3; 16], ..LIFE },
        ] {
            let left = outstanding(vec![(other, entry(1)), (LIFE, entry(2))], &LIFE);
            assert_eq!(left[&V], vec![data(2, 1, 2)]);
        }
    }

    #[test]
    fn a_volume_that_was_forgotten_behind_another_stays_forgotten() {
        let (mut pool, buffer) = memory();
        let memory = pool.lend(&buffer);
        let mut journal = Journal::create(memory, &LIFE);
        let other = VolumeId(4);
        journal.append(other, 1, &Entry::Changed(other, data(9, 1, 90)));
        append(&mut journal, 1, data(0, 1, 5));
        journal.forget(V);
        // The other's change is not durable, so nothing is retired: a kill finds all of it.
        assert!(!journal.retire(|volume, round| volume == V || round == 0));
        let read_back = || outstanding(vec![read(&memory).unwrap()], &LIFE);
        assert_eq!(read_back()[&V], vec![]);
        assert_eq!(read_back()[&other], vec![data(9, 1, 90)]);
        append(&mut journal, 1, data(7, 1, 70)); // Attached again.
        assert_eq!(read_back()[&V], vec![data(7, 1, 70)]);
        // Rounds are counted anew: those of before are over.
        assert!(journal.retire(|volume, round| volume == other || round == 0));
        assert_eq!(read_back()[&V], vec![data(7, 1, 70)]);
    }

    #[test]
    fn a_volume_that_was_handed_over_is_what_its_last_home_says() {
        let mut pools = [memory(), memory()];
        let memories: Vec<_> = pools.iter_mut().map(|(pool, buffer)| pool.lend(buffer)).collect();
        let mut journals: Vec<_> = memories.iter().map(|it| Journal::create(*it, &LIFE)).collect();
        let other = VolumeId(4);
        for journal in &mut journals {
            // Never durable, so that nothing is retired.
            journal.append(other, 1, &Entry::Changed(other, data(9, 1, 90)));
        }
        for visit in 0..5u64 {
            let home = &mut journals[visit as usize % 2];
            let round = visit + 1;
            append(home, round, data(0, 1, 5 + visit));
            append(home, round, data(10 + visit, 1, 50));
            let found = memories.iter().map(|it| read(it).unwrap()).collect();
            let expected = vec![data(10 + visit, 1, 50), data(0, 1, 5 + visit)];
            assert_eq!(outstanding(found, &LIFE)[&V], expected, "visit {visit}");
            home.forget(V);
            let found = memories.iter().map(|it| read(it).unwrap()).collect();
            assert_eq!(outstanding(found, &LIFE)[&V], vec![], "after visit {visit}");
        }
    }

    #[test]
    fn numbers_that_no_store_can_have_end_the_journal() {
        let (mut pool, buffer) = memory();
        let memory = pool.lend(&buffer);
        let mut journal = Journal::create(memory, &LIFE);
        append(&mut journal, 1, data(u64::MAX - 1, 8, 5));
        assert_eq!(read(&memory).unwrap().1, vec![]);
    }
}
