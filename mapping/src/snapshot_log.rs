//! A volume's snapshot log in memory: its entries and the blocks they lie in, as far as they were read.
//!
//! Appended in order, 24 entries a block, each block chained to the one before it (FORMAT.md,
//! "Snapshot log"). An entry counts once the volume's record says so; until then a crash leaves
//! bytes that nobody reads. Labels and delete marks change an entry in place.
//!
//! A log may have a million entries and more, and none of that is to be felt. It is opened with its newest
//! block alone, and older ones are put before it one at a time; what has not been read is *not known*,
//! never absent. An entry takes 48 bytes, labels lie beside. Nothing here looks at all entries at once:
//! those of 64 blocks have a summary together, by which a search passes over them.
//!
//! Shards have one for each volume that is open; whoever keeps a volume that is not has one too.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bessel_reactor::clock::WallTime;
use bessel_reactor::device::DeviceError;
use bessel_reactor::units::{BlockAddr, ByteCount};

use crate::directory::VolumeEntry;
use crate::format::{
    ExtentMap, ExtentType, LOG_ENTRIES_PER_BLOCK, LogEntry, Parent, encode_log_block,
};
use crate::planted::{self, Bug};
use crate::request::{LogState, SnapshotId, SnapshotInfo, VolumeId};
use crate::store::{LogPart, LogWalk, first_of_block};

const PER_BLOCK: u64 = LOG_ENTRIES_PER_BLOCK as u64;
/// Entries that have a summary together: 64 blocks of them, so that a million has 651.
const PER_GROUP: u64 = 64 * PER_BLOCK;
/// Groups that one search by time looks into: those whose times begin before and end after the one
/// asked for. There is one, unless the clock was set back.
const GROUPS_SEARCHED_MAX: u32 = 4;
/// Most snapshots in a page.
pub const PAGE_MAX: usize = 1024;
/// Entries looked at for one page, and groups of deleted ones passed over: a thinned log has many of these.
const VISITED_MAX: u64 = 4 * PER_GROUP;

/// An entry without its label and without its sequence, which its place says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    root: BlockAddr,
    time: WallTime,
    size: ByteCount,
    blocks_allocated: u64,
    parent: PackedParent,
    height: u8,
    deleted: bool,
}

const _: () = assert!(size_of::<Entry>() == 48);

/// A [`Parent`] in 8 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct PackedParent(u64);

impl PackedParent {
    const UNKNOWN: Self = Self(u64::MAX);
    const ORIGIN: Self = Self(u64::MAX - 1);

    fn new(parent: Parent) -> Self {
        match parent {
            Parent::Unknown => Self::UNKNOWN,
            Parent::Origin => Self::ORIGIN,
            Parent::Snapshot(sequence) => Self(sequence),
        }
    }

    fn get(self) -> Parent {
        match self {
            Self::UNKNOWN => Parent::Unknown,
            Self::ORIGIN => Parent::Origin,
            Self(sequence) => Parent::Snapshot(sequence),
        }
    }
}

impl Entry {
    const NONE: Self = Self {
        root: BlockAddr::new(0),
        time: WallTime::from_unix_nanos(0),
        size: ByteCount::new(0),
        blocks_allocated: 0,
        parent: PackedParent::UNKNOWN,
        height: 0,
        deleted: true,
    };

    fn new(entry: &LogEntry) -> Self {
        Self {
            root: entry.root,
            time: entry.time,
            size: entry.size,
            blocks_allocated: entry.blocks_allocated,
            parent: PackedParent::new(entry.parent),
            height: entry.height,
            deleted: entry.deleted,
        }
    }
}

/// A block of the log. Places past the end of the log hold nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Block {
    addr: BlockAddr,
    entries: [Entry; LOG_ENTRIES_PER_BLOCK],
}

/// What is known of 1536 entries together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Group {
    /// Entries that are not deleted.
    live: u32,
    /// None of these is from before, and none from after. They may be further apart, since they are not
    /// drawn in when an entry is deleted.
    first: WallTime,
    last: WallTime,
}

impl Group {
    const EMPTY: Self = Self {
        live: 0,
        first: WallTime::from_unix_nanos(u64::MAX),
        last: WallTime::from_unix_nanos(0),
    };
}

/// What lies before the entries that are here.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
enum Rest {
    /// Nothing: the log begins with them.
    #[default]
    Nothing,
    /// Entries that have not been read yet.
    Unread(LogWalk),
    /// Entries that cannot be read: why, and from which block on.
    Lost { why: String, previous: Option<BlockAddr> },
}

/// An entry that is not here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NotHere {
    /// There is none.
    None,
    /// It has not been read yet.
    Unread,
    /// It cannot be read.
    Lost {
        /// Neither can any before this one.
        before: SnapshotId,
        /// Why.
        why: String,
    },
}

/// Snapshots of a log, in order.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Page {
    /// Their sequences.
    pub sequences: Vec<u64>,
    /// Where the next page begins; none when this was the last.
    pub next: Option<u64>,
}

/// What a search by time has come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Newest {
    /// The newest of those looked at.
    pub found: Option<u64>,
    /// Those before this sequence have not been looked at; 0 when all were.
    pub rest: u64,
}

/// See the module's documentation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotLog {
    volume: VolumeId,
    /// Blocks from that of entry `first` on to the newest. Boxed, so that room for more of them is made
    /// by moving 8 bytes for each.
    blocks: VecDeque<Box<Block>>,
    groups: VecDeque<Group>,
    /// Which group is the first one here.
    groups_from: u64,
    /// Sequence of the oldest entry that is here, a multiple of 24.
    first: u64,
    count: u64,
    /// Entries that the device has.
    durable: u64,
    /// Of these, those that are here and not deleted.
    live: u64,
    rest: Rest,
    labels: BTreeMap<u64, Arc<str>>,
    /// The newest entry of each label that is not deleted.
    by_label: BTreeMap<Arc<str>, u64>,
}

impl SnapshotLog {
    /// That of a volume without a snapshot.
    pub fn new(volume: VolumeId) -> Self {
        Self {
            volume,
            blocks: VecDeque::new(),
            groups: VecDeque::new(),
            groups_from: 0,
            first: 0,
            count: 0,
            durable: 0,
            live: 0,
            rest: Rest::Nothing,
            labels: BTreeMap::new(),
            by_label: BTreeMap::new(),
        }
    }

    /// The end of a volume's log; the rest is to be read.
    pub fn begin(entry: &VolumeEntry, extents: &ExtentMap) -> Self {
        let record = &entry.record;
        let mut log = Self::new(record.id);
        (log.first, log.count) = (record.log_count, record.log_count);
        log.durable = record.log_count;
        match &entry.tail {
            Some(tail) => {
                let rest = LogWalk::before(record.id, tail);
                log.put_before(tail);
                log.go_on(rest, extents);
            }
            None => log.go_on(LogWalk::new(record), extents),
        }
        log
    }

    /// Settles what there is to read next.
    fn go_on(&mut self, walk: LogWalk, extents: &ExtentMap) {
        let holds = |block| extents.holds(block, ExtentType::Metadata);
        self.rest = match walk.next(holds) {
            Ok(None) => Rest::Nothing,
            Ok(Some(_)) => Rest::Unread(walk),
            Err(fault) => Rest::Lost { why: fault.what, previous: walk.link() },
        };
    }

    /// The block to read next, for [`SnapshotLog::take`].
    pub fn wanted(&self) -> Option<BlockAddr> {
        match &self.rest {
            Rest::Unread(walk) => walk.link(),
            Rest::Nothing | Rest::Lost { .. } => None,
        }
    }

    /// Takes in the block that was wanted, or that it cannot be read.
    ///
    /// # Panics
    /// When none was wanted.
    pub fn take(&mut self, read: Result<&[u8], DeviceError>, secret: u64, extents: &ExtentMap) {
        let Rest::Unread(walk) = &self.rest else { panic!("no block of the log was wanted") };
        let mut walk = walk.clone();
        let holds = |block| extents.holds(block, ExtentType::Metadata);
        let part = match read {
            Ok(block) => walk.take(block, secret, holds),
            Err(error) => Err(walk.unreadable(error)),
        };
        match part {
            Ok(part) => {
                self.put_before(&part);
                self.go_on(walk, extents);
            }
            Err(fault) => self.rest = Rest::Lost { why: fault.what, previous: walk.link() },
        }
    }

    /// Puts a block before those that are here.
    fn put_before(&mut self, part: &LogPart) {
        assert_eq!(part.first() + part.entries.len() as u64, self.first, "blocks are in order");
        self.first = part.first();
        let mut block = Block { addr: part.addr, entries: [Entry::NONE; LOG_ENTRIES_PER_BLOCK] };
        for (place, entry) in block.entries.iter_mut().zip(&part.entries) {
            *place = Entry::new(entry);
        }
        self.blocks.push_front(Box::new(block));
        for entry in part.entries.iter().rev() {
            self.count_in(entry);
            let Some(label) = &entry.label else { continue };
            let label: Arc<str> = label.as_str().into();
            self.labels.insert(entry.sequence, Arc::clone(&label));
            if !entry.deleted {
                self.live_label(&label, entry.sequence);
            }
        }
    }

    /// Notes an entry in the summaries.
    fn count_in(&mut self, entry: &LogEntry) {
        self.live += u64::from(!entry.deleted && entry.sequence < self.durable);
        let index = entry.sequence / PER_GROUP;
        if self.groups.is_empty() {
            self.groups_from = index;
        }
        if index < self.groups_from {
            self.groups.push_front(Group::EMPTY);
            self.groups_from = index;
        } else if index >= self.groups_from + self.groups.len() as u64 {
            self.groups.push_back(Group::EMPTY);
        }
        if !entry.deleted {
            let group = &mut self.groups[(index - self.groups_from) as usize];
            group.live += 1;
            group.first = group.first.min(entry.time);
            group.last = group.last.max(entry.time);
        }
    }

    /// The newest live entry of a label counts. No label is given twice; on a damaged store it may be.
    fn live_label(&mut self, label: &Arc<str>, sequence: u64) {
        let newest = self.by_label.entry(Arc::clone(label)).or_insert(sequence);
        *newest = sequence.max(*newest);
    }

    // What is there.

    /// What is known of it.
    pub fn state(&self) -> LogState {
        let fault = match &self.rest {
            Rest::Nothing | Rest::Unread(_) => None,
            Rest::Lost { why, .. } => Some(why.clone()),
        };
        LogState { taken: self.durable, live: self.live, out_of_reach: self.first, fault }
    }

    /// Entries, those that the device has not got yet included.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// Entries that the device has.
    pub(crate) fn durable(&self) -> u64 {
        self.durable
    }

    /// Why what lies before the entries that are here cannot be had now; none when there is nothing.
    fn missing(&self) -> Option<NotHere> {
        match &self.rest {
            Rest::Nothing => None,
            Rest::Unread(_) | Rest::Lost { .. } if planted::is(Bug::UnreadLogIsEmpty) => None,
            Rest::Unread(_) => Some(NotHere::Unread),
            Rest::Lost { why, .. } => {
                let before = SnapshotId { volume: self.volume, sequence: self.first };
                Some(NotHere::Lost { before, why: why.clone() })
            }
        }
    }

    /// Whether an entry is here.
    fn reach(&self, sequence: u64) -> Result<&Entry, NotHere> {
        if sequence >= self.count {
            return Err(NotHere::None);
        }
        let Some(at) = sequence.checked_sub(self.first) else {
            return Err(self.missing().unwrap_or(NotHere::None));
        };
        let block = &self.blocks[(at / PER_BLOCK) as usize];
        Ok(&block.entries[(at % PER_BLOCK) as usize])
    }

    fn reach_mut(&mut self, sequence: u64) -> &mut Entry {
        let at = sequence - self.first;
        let block = &mut self.blocks[(at / PER_BLOCK) as usize];
        &mut block.entries[(at % PER_BLOCK) as usize]
    }

    /// The snapshot with this sequence, deleted or not, as far as the log knows it: whether it settles,
    /// the volume knows.
    ///
    /// # Errors
    /// When it is not here.
    pub fn get(&self, sequence: u64) -> Result<SnapshotInfo, NotHere> {
        let entry = self.reach(sequence)?;
        Ok(SnapshotInfo {
            id: SnapshotId { volume: self.volume, sequence },
            time: entry.time,
            label: self.labels.get(&sequence).map(|label| (**label).to_owned()),
            size: entry.size,
            root: entry.root,
            height: entry.height,
            deleted: entry.deleted,
            settling: false,
            blocks_allocated: entry.blocks_allocated,
            parent: entry.parent.get(),
        })
    }

    /// True when the snapshot has a label.
    pub(crate) fn is_labelled(&self, sequence: u64) -> bool {
        self.labels.contains_key(&sequence)
    }

    /// True when the snapshot is marked deleted.
    ///
    /// # Errors
    /// When it is not here.
    pub(crate) fn is_deleted(&self, sequence: u64) -> Result<bool, NotHere> {
        Ok(self.reach(sequence)?.deleted)
    }

    /// The newest entry with this label that is not deleted.
    ///
    /// # Errors
    /// When it may be one that is not here.
    pub fn by_label(&self, label: &str) -> Result<Option<u64>, NotHere> {
        match self.by_label.get(label) {
            Some(sequence) => Ok(Some(*sequence)),
            None => self.missing().map_or(Ok(None), Err),
        }
    }

    /// Up to `limit` snapshots that the device has, from sequence `from` on, those that are deleted only
    /// when they are wanted. A page may have fewer, or none, and not be the last.
    ///
    /// # Errors
    /// When some of them are not here.
    pub fn page(&self, from: u64, limit: usize, with_deleted: bool) -> Result<Page, NotHere> {
        if from < self.first
            && let Some(missing) = self.missing()
        {
            return Err(missing);
        }
        let mut page = Page::default();
        let mut at = from.max(self.first);
        let mut visited = 0;
        while at < self.durable {
            if page.sequences.len() == limit.min(PAGE_MAX) || visited == VISITED_MAX {
                page.next = Some(at);
                break;
            }
            visited += 1;
            let group = at / PER_GROUP;
            if !with_deleted && self.groups[(group - self.groups_from) as usize].live == 0 {
                at = (group + 1) * PER_GROUP;
                continue;
            }
            if with_deleted || !self.reach(at)?.deleted {
                page.sequences.push(at);
            }
            at += 1;
        }
        Ok(page)
    }

    /// The newest snapshot taken at or before `then` that the device has and that is not deleted, of those
    /// before sequence `before`: by time, and of two at one time the later one. It looks at some, and says
    /// from where on to go on; the best of all that are found is the answer.
    ///
    /// # Errors
    /// When there are entries that are not here: a clock that was set back may have given any of them the
    /// time that is sought.
    pub fn newest_at(&self, then: WallTime, before: u64) -> Result<Newest, NotHere> {
        if let Some(missing) = self.missing() {
            return Err(missing);
        }
        let mut best: Option<(WallTime, u64)> = None;
        let mut searched = 0;
        let mut end = before.min(self.durable);
        while end > self.first {
            let index = (end - 1) / PER_GROUP;
            let group = &self.groups[(index - self.groups_from) as usize];
            let begin = (index * PER_GROUP).max(self.first);
            let better = best.is_none_or(|(time, _)| group.last > time);
            if group.live > 0 && group.first <= then && better {
                if searched == GROUPS_SEARCHED_MAX {
                    break;
                }
                searched += 1;
                for sequence in begin..end {
                    let entry = self.reach(sequence)?;
                    if !entry.deleted && entry.time <= then {
                        best = best.max(Some((entry.time, sequence)));
                    }
                }
            }
            end = begin;
        }
        Ok(Newest { found: best.map(|(_, sequence)| sequence), rest: end })
    }

    // Changing it.

    /// True when the next entry needs a block of its own.
    pub(crate) fn needs_block(&self) -> bool {
        self.count.is_multiple_of(PER_BLOCK)
    }

    /// Appends `entry`. `block` must be given exactly when [`SnapshotLog::needs_block`].
    pub(crate) fn append(&mut self, entry: &LogEntry, block: Option<BlockAddr>) {
        assert_eq!(self.needs_block(), block.is_some(), "a log block is full or has room");
        assert_eq!(entry.sequence, self.count, "entries are appended in order");
        if let Some(addr) = block {
            let entries = [Entry::NONE; LOG_ENTRIES_PER_BLOCK];
            self.blocks.push_back(Box::new(Block { addr, entries }));
        }
        self.count += 1;
        *self.reach_mut(entry.sequence) = Entry::new(entry);
        self.count_in(entry);
        self.set_label(entry.sequence, entry.label.as_deref());
    }

    /// The device has these entries now, and all before them.
    pub(crate) fn set_durable(&mut self, count: u64) {
        for sequence in self.durable..count {
            self.live += u64::from(self.reach(sequence).is_ok_and(|entry| !entry.deleted));
        }
        self.durable = self.durable.max(count);
    }

    /// Gives an entry that is here another label, or takes it away.
    pub(crate) fn set_label(&mut self, sequence: u64, label: Option<&str>) {
        self.forget_label(sequence);
        self.labels.remove(&sequence);
        if let Some(label) = label {
            let label: Arc<str> = label.into();
            self.live_label(&label, sequence);
            self.labels.insert(sequence, label);
        }
    }

    fn forget_label(&mut self, sequence: u64) {
        if let Some(label) = self.labels.get(&sequence)
            && self.by_label.get(label) == Some(&sequence)
        {
            self.by_label.remove(label);
        }
    }

    /// Marks an entry deleted that is here and is not.
    pub(crate) fn mark_deleted(&mut self, sequence: u64) {
        let entry = self.reach_mut(sequence);
        assert!(!entry.deleted, "snapshot {sequence} is deleted twice");
        entry.deleted = true;
        self.live -= u64::from(sequence < self.durable);
        self.groups[(sequence / PER_GROUP - self.groups_from) as usize].live -= 1;
        self.forget_label(sequence);
    }

    /// Address of the block that holds an entry that is here.
    pub(crate) fn block_of(&self, sequence: u64) -> BlockAddr {
        self.blocks[((sequence - self.first) / PER_BLOCK) as usize].addr
    }

    /// Writes the block that holds an entry that is here into `out`, as it should be on the device.
    pub(crate) fn image(&self, out: &mut [u8], sequence: u64, secret: u64) {
        let first = first_of_block(sequence);
        let index = ((first - self.first) / PER_BLOCK) as usize;
        let previous = match index.checked_sub(1) {
            Some(before) => Some(self.blocks[before].addr),
            None => match &self.rest {
                Rest::Nothing => None,
                Rest::Unread(_) => self.wanted(),
                Rest::Lost { previous, .. } => *previous,
            },
        };
        let last = self.count.min(first + PER_BLOCK);
        let entries: Vec<LogEntry> = (first..last).map(|sequence| self.entry(sequence)).collect();
        let addr = self.blocks[index].addr;
        encode_log_block(out, addr, previous, self.volume, first, &entries, secret);
    }

    fn entry(&self, sequence: u64) -> LogEntry {
        let info = self.get(sequence).expect("who writes a block has all of it");
        LogEntry {
            sequence,
            root: info.root,
            time: info.time,
            size: info.size,
            blocks_allocated: info.blocks_allocated,
            height: info.height,
            deleted: info.deleted,
            label: info.label,
            parent: info.parent,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bessel_reactor::device::sim::Random;

    const VOLUME: VolumeId = VolumeId(5);

    fn entry(sequence: u64, time: u64) -> LogEntry {
        LogEntry {
            sequence,
            root: BlockAddr::new(1000 + sequence),
            time: WallTime::from_unix_nanos(time),
            size: ByteCount::new(1 << 30),
            blocks_allocated: sequence * 3,
            height: 3 + (sequence % 2) as u8,
            deleted: false,
            label: None,
            parent: match sequence % 5 {
                0 => Parent::Unknown,
                1 => Parent::Origin,
                back => Parent::Snapshot(sequence - back),
            },
        }
    }

    fn append(log: &mut SnapshotLog, entry: &LogEntry) {
        let block = log.needs_block().then(|| BlockAddr::new(7 + entry.sequence));
        log.append(entry, block);
        log.set_durable(entry.sequence + 1);
    }

    fn part(entries: &[LogEntry]) -> LogPart {
        let first = entries[0].sequence;
        let previous = (first > 0).then(|| BlockAddr::new(7 + first - PER_BLOCK));
        LogPart { addr: BlockAddr::new(7 + first), entries: entries.to_vec(), previous }
    }

    /// Puts these entries into a log as they come from the device, the newest block first.
    fn loaded(entries: &[LogEntry]) -> SnapshotLog {
        let mut log = SnapshotLog::new(VOLUME);
        let count = entries.len() as u64;
        (log.first, log.count, log.durable) = (count, count, count);
        for block in entries.chunks(LOG_ENTRIES_PER_BLOCK).rev() {
            log.put_before(&part(block));
        }
        log
    }

    fn at(nanoseconds: u64) -> WallTime {
        WallTime::from_unix_nanos(nanoseconds)
    }

    fn all(log: &SnapshotLog, with_deleted: bool) -> Vec<u64> {
        let (mut found, mut from) = (Vec::new(), Some(0));
        while let Some(at) = from {
            let page = log.page(at, 100, with_deleted).unwrap();
            assert!(page.sequences.len() <= 100 && page.next.is_none_or(|next| next > at));
            found.extend(page.sequences);
            from = page.next;
        }
        found
    }

    fn newest(log: &SnapshotLog, then: u64) -> Option<u64> {
        let (mut best, mut before) = (None, u64::MAX);
        while before > 0 {
            let Newest { found, rest } = log.newest_at(at(then), before).unwrap();
            assert!(rest < before, "it comes to an end");
            let time = |sequence| log.get(sequence).unwrap().time;
            best = best.max(found.map(|sequence| (time(sequence), sequence)));
            before = rest;
        }
        best.map(|(_, sequence)| sequence)
    }

    /// Appended and changed, or read from the device afterwards: both say what a list of all entries says.
    #[test]
    fn it_says_what_a_plain_list_says() {
        for seed in 0..60 {
            let random = &mut Random::new(seed);
            let (mut log, mut list) = (SnapshotLog::new(VOLUME), Vec::<LogEntry>::new());
            let mut time = 1_000_000;
            for sequence in 0..1 + random.below(if seed % 6 == 0 { 9000 } else { 400 }) {
                // Now and then the clock is set back.
                time += random.below(5);
                let back = if random.chance(1, 200) { random.below(900_000) } else { 0 };
                time = time.saturating_sub(back).max(9);
                let mut new = entry(sequence, time);
                new.label = random.chance(1, 40).then(|| format!("l{sequence}"));
                append(&mut log, &new);
                list.push(new);
                if random.chance(1, 2) {
                    let which = random.below(sequence + 1);
                    let old = &mut list[which as usize];
                    if !old.deleted && random.chance(1, 8) {
                        let label = random.chance(1, 2).then(|| format!("m{sequence}"));
                        log.set_label(which, label.as_deref());
                        old.label = label;
                    } else if !old.deleted {
                        log.mark_deleted(which);
                        old.deleted = true;
                    }
                }
            }
            for log in [log, loaded(&list)] {
                let live: Vec<&LogEntry> = list.iter().filter(|entry| !entry.deleted).collect();
                let state = log.state();
                assert_eq!((state.taken, state.live), (list.len() as u64, live.len() as u64));
                assert_eq!(all(&log, true), (0..list.len() as u64).collect::<Vec<_>>());
                assert_eq!(all(&log, false), live.iter().map(|it| it.sequence).collect::<Vec<_>>());
                let entries: Vec<_> = (0..log.count()).map(|it| log.entry(it)).collect();
                assert_eq!(entries, list, "seed {seed}");
                for label in list.iter().filter_map(|entry| entry.label.as_deref()) {
                    let holder = live.iter().find(|entry| entry.label.as_deref() == Some(label));
                    assert_eq!(log.by_label(label), Ok(holder.map(|it| it.sequence)), "{label}");
                }
                for _ in 0..40 {
                    let then = list[random.below(list.len() as u64) as usize].time.as_unix_nanos();
                    let then = then - random.below(3);
                    let best = live.iter().filter(|entry| entry.time <= at(then));
                    let best = best.max_by_key(|entry| (entry.time, entry.sequence));
                    assert_eq!(newest(&log, then), best.map(|it| it.sequence), "seed {seed}");
                }
            }
        }
    }

    /// A block that is written again while older ones have not been read still links to them.
    #[test]
    fn the_oldest_block_here_keeps_its_link() {
        let list: Vec<LogEntry> = (0..60).map(|it| entry(it, it)).collect();
        let mut log = SnapshotLog::new(VOLUME);
        (log.first, log.count, log.durable) = (60, 60, 60);
        let tail = part(&list[48..]);
        log.put_before(&tail);
        log.rest = Rest::Unread(LogWalk::before(VOLUME, &tail));
        let mut image = [0; 4096];
        log.mark_deleted(50);
        for rest in [None, Some("damaged")] {
            if let Some(why) = rest {
                log.rest = Rest::Lost { why: why.to_owned(), previous: tail.previous };
            }
            log.image(&mut image, 50, 9);
            let read =
                crate::format::decode_log_block(&image, tail.addr, VOLUME, 48, 12, 9).unwrap();
            assert_eq!(read.previous, tail.previous);
            assert!(read.entries[2].deleted);
        }
    }

    #[test]
    fn what_has_not_been_read_is_not_known() {
        let list: Vec<LogEntry> =
            (0..60).map(|it| LogEntry { label: Some(format!("l{it}")), ..entry(it, it) }).collect();
        let mut log = SnapshotLog::new(VOLUME);
        (log.first, log.count, log.durable) = (60, 60, 60);
        let tail = part(&list[48..]);
        log.put_before(&tail);
        log.rest = Rest::Unread(LogWalk::before(VOLUME, &tail));
        assert_eq!(log.by_label("l50"), Ok(Some(50)));
        assert_eq!(log.by_label("l3"), Err(NotHere::Unread), "nor that there is none");
        assert_eq!(log.get(3), Err(NotHere::Unread));
        assert_eq!(log.get(60), Err(NotHere::None));
        assert_eq!(log.page(3, 9, false), Err(NotHere::Unread));
        assert_eq!(log.page(50, 9, false).unwrap().sequences, (50..59).collect::<Vec<_>>());
        assert_eq!(log.newest_at(at(55), 100), Err(NotHere::Unread));
        assert_eq!(log.state().out_of_reach, 48);
        append(&mut log, &entry(60, 60));
        assert_eq!((log.state().taken, log.state().live), (61, 13));
    }

    /// 1,000,000 snapshots in 50 MB and a bit.
    #[test]
    fn a_snapshot_without_a_label_takes_some_fifty_bytes() {
        let blocks = 1_000_000 / LOG_ENTRIES_PER_BLOCK;
        let each = size_of::<Block>() + size_of::<Box<Block>>();
        let groups = 1_000_000 / PER_GROUP as usize * size_of::<Group>();
        assert!((blocks * each + groups) / 1_000_000 <= 52);
    }
}
