//! What goes into a shard and what comes out: guest I/O on the hot path, commands on the other.

use bessel_reactor::buffer::Segment;
use bessel_reactor::clock::WallTime;
use bessel_reactor::units::{BlockAddr, ByteCount, Sector};

use crate::format::{LOG_ENTRIES_PER_BLOCK, Parent, VolumeRecord};
use crate::snapshot_log::SnapshotLog;

/// A volume that is open on a shard. Small and dense, so the hot path can index with it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct VolumeHandle(pub u32);

/// Set in the handle of a volume that is open on another shard, and visited from this one.
const VISIT: u32 = 1 << 31;

impl VolumeHandle {
    pub(crate) const fn of_visit(index: u32) -> Self {
        Self(VISIT | index)
    }

    /// Which visit it is, if it is one.
    pub(crate) const fn visit(self) -> Option<u32> {
        if self.0 & VISIT == 0 { None } else { Some(self.0 & !VISIT) }
    }
}

/// Identifies a volume for ever; never reused within a store.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VolumeId(pub u64);

/// Identifies a snapshot for ever: the volume it was taken of, and its place in that volume's log.
///
/// Printed and parsed as `3.17`: snapshot 17 of volume 3.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SnapshotId {
    /// The volume it was taken of.
    pub volume: VolumeId,
    /// Position in the volume's snapshot log, from 0.
    pub sequence: u64,
}

impl std::fmt::Display for VolumeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl std::fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.volume.0, self.sequence)
    }
}

impl std::str::FromStr for SnapshotId {
    type Err = ();

    /// Parses `3.17`.
    fn from_str(text: &str) -> Result<Self, ()> {
        let (volume, sequence) = text.split_once('.').ok_or(())?;
        let number = |digits: &str| {
            if digits.bytes().all(|byte| byte.is_ascii_digit()) {
                digits.parse().ok()
            } else {
                None
            }
        };
        Ok(Self {
            volume: VolumeId(number(volume).ok_or(())?),
            sequence: number(sequence).ok_or(())?,
        })
    }
}

/// When a write counts as done. DESIGN "Durability".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CacheMode {
    /// A write completes when it is durable, its mapping included.
    Writethrough,
    /// A write completes when its data has been written; FLUSH makes it durable.
    Writeback,
}

/// Who chose a cache mode. A guest that chose writethrough sends no flushes, and does not choose
/// again when the daemon restarts below it; so the operator's writeback gives way to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CacheChooser {
    /// The configuration.
    Operator,
    /// The guest, by virtio's CONFIG_WCE.
    Guest,
}

/// What a guest asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoKind {
    /// Fill the segments from the volume.
    Read,
    /// Write the segments to the volume.
    Write,
    /// Make everything completed so far durable.
    Flush,
    /// The sectors are no longer needed; whole blocks of them read as zero afterwards.
    Discard,
    /// The sectors shall read as zero.
    WriteZeroes,
}

/// One guest request. The segments are copied in; their memory stays valid until completion.
#[derive(Clone, Copy, Debug)]
pub struct IoRequest<'a> {
    /// The submitter's name for the request, handed back on completion.
    pub tag: u64,
    /// Which volume.
    pub volume: VolumeHandle,
    /// What to do.
    pub kind: IoKind,
    /// First sector; ignored for a flush.
    pub sector: Sector,
    /// Sectors to discard or zero. For a read or write it must equal the segments' total.
    pub sectors: u64,
    /// Guest memory, for reads and writes only.
    pub segments: &'a [Segment],
}

/// How a guest request ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoStatus {
    /// Done.
    Done,
    /// Past the end of the volume, or segments that do not add up: refused, nothing touched.
    Refused,
    /// The store has no free block for it. Reads and overwrites still work.
    NoSpace,
    /// The device failed, or the volume is latched after a failed flush.
    Failed,
}

/// A finished guest request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IoCompletion {
    /// The submitter's name for it.
    pub tag: u64,
    /// How it ended.
    pub status: IoStatus,
}

/// The request's volume has all the request contexts that it may have, or there are no more; submit again after
/// completions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Busy;

/// What `volume create` asks of a shard, checked and numbered by the [`crate::directory`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CreatePlan {
    /// Where its record lives in the registry.
    pub registry_slot: u32,
    /// Generation of the record that a volume long gone has left there; 0 for none.
    pub generation: u64,
    /// Its identity.
    pub id: VolumeId,
    /// Its name, unique among volumes that are not deleted.
    pub name: String,
    /// Its size, a multiple of a sector.
    pub size: ByteCount,
    /// The snapshot it starts from.
    pub origin: Option<CloneOrigin>,
    /// For the record.
    pub created: WallTime,
}

/// A settled snapshot, as a clone starts from it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CloneOrigin {
    /// Which snapshot.
    pub snapshot: SnapshotId,
    /// Its radix root.
    pub root: BlockAddr,
    /// Levels of its tree: 3 or 4.
    pub height: u8,
    /// Size of the volume when it was taken.
    pub size: ByteCount,
}

/// Most log blocks in which [`Command::DeleteSnapshots`] marks snapshots: what a round writes at once.
pub const DELETED_BLOCKS_MAX: usize = crate::commit::SEALED_IMAGES_MAX;

/// Cuts positions in a log, in order, into pieces that [`Command::DeleteSnapshots`] takes.
pub fn deletions(sequences: &[u64]) -> impl Iterator<Item = &[u64]> {
    let block = |sequence: &u64| sequence / LOG_ENTRIES_PER_BLOCK as u64;
    let mut rest = sequences;
    std::iter::from_fn(move || {
        let mut blocks = 0;
        let mut last = None;
        let fits = rest.iter().take_while(|sequence| {
            blocks += usize::from(last != Some(block(sequence)));
            last = Some(block(sequence));
            blocks <= DELETED_BLOCKS_MAX
        });
        let (piece, after) = rest.split_at(fits.count());
        rest = after;
        (!piece.is_empty()).then_some(piece)
    })
}

/// Names a snapshot of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Which {
    /// By its position in the log.
    Sequence(u64),
    /// By its label.
    Label(String),
}

/// A control-path request to the home shard of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Command {
    /// Makes a volume, durably, and opens it.
    Create(CreatePlan),
    /// Makes a volume that the device has no record of before [`Command::Publish`], and opens it. Until
    /// then it takes requests and may grow, be shown, closed and deleted, and nothing else; what ends
    /// before leaves no volume.
    CreateUnpublished(CreatePlan),
    /// Makes an unpublished volume one as any other, with all that it holds, durably.
    Publish {
        /// Which volume.
        volume: VolumeHandle,
        /// The size it shall have: at most that which it has now, and all that was written lies in it.
        size: ByteCount,
    },
    /// Opens a volume that is in the registry. Its record was read by [`crate::store::open`].
    Open(Box<crate::directory::VolumeEntry>),
    /// Makes changes again that a killed process had made and not yet made durable, and answers
    /// when they are. Before anybody uses the volume.
    Restore {
        /// Which volume.
        volume: VolumeHandle,
        /// None covers a block of another ([`crate::journal::outstanding`]).
        changes: Vec<crate::journal::Change>,
    },
    /// Takes a snapshot; answered when it is durable.
    Snapshot {
        /// Which volume.
        volume: VolumeHandle,
        /// Its label, unique in the volume.
        label: Option<String>,
        /// For the log.
        time: WallTime,
    },
    /// Sets or clears a snapshot's label.
    Label {
        /// Which volume.
        volume: VolumeHandle,
        /// Position in its log.
        sequence: u64,
        /// The new label.
        label: Option<String>,
    },
    /// Marks a snapshot deleted. What it alone held is the caller's to free ([`crate::reclaim`]).
    DeleteSnapshot {
        /// Which volume.
        volume: VolumeHandle,
        /// Position in its log.
        sequence: u64,
    },
    /// Marks several snapshots deleted, in one round, and answers which: those that are already are
    /// passed over.
    DeleteSnapshots {
        /// Which volume.
        volume: VolumeHandle,
        /// Pass over those that have a label by now, too.
        spare_labelled: bool,
        /// Positions in its log, in at most [`DELETED_BLOCKS_MAX`] blocks of
        /// [`LOG_ENTRIES_PER_BLOCK`](crate::format::LOG_ENTRIES_PER_BLOCK).
        sequences: Vec<u64>,
    },
    /// Makes the volume read as the snapshot does. What it held is kept as a new snapshot, which is
    /// the answer. The caller has made sure that no guest is connected.
    Rollback {
        /// Which volume.
        volume: VolumeHandle,
        /// Position in its log.
        sequence: u64,
        /// Label of the snapshot that keeps what the volume held, unique in the volume.
        label: Option<String>,
        /// For the log.
        time: WallTime,
    },
    /// Gives the volume another name, checked for uniqueness by the directory.
    Rename {
        /// Which volume.
        volume: VolumeHandle,
        /// The new name.
        name: String,
    },
    /// Makes the volume larger.
    Grow {
        /// Which volume.
        volume: VolumeHandle,
        /// The new size, at least the old one.
        size: ByteCount,
    },
    /// Marks the volume deleted and closes it; answered as [`Command::Close`] is.
    Delete {
        /// Which volume.
        volume: VolumeHandle,
    },
    /// Switches between writeback and writethrough (virtio CONFIG_WCE), for good: the volume is
    /// opened with its last mode.
    SetCache {
        /// Which volume.
        volume: VolumeHandle,
        /// The new mode.
        cache: CacheMode,
        /// Who wants it.
        by: CacheChooser,
    },
    /// Closes the volume once its requests have ended, which get no company meanwhile. What is not
    /// durable is committed first; unless the volume is latched: then it is forgotten, and what the
    /// device holds counts.
    Close {
        /// Which volume.
        volume: VolumeHandle,
    },
    /// Closes the volume for another shard to open it, once its requests have ended: all of it is durable
    /// then, and this shard has forgotten every node that somebody may change. A volume that is latched,
    /// or becomes so meanwhile, is refused and stays.
    HandOver {
        /// Which volume.
        volume: VolumeHandle,
    },
    /// Opens a volume that a shard has handed over, as it was. When that is refused it comes back.
    TakeOver(Box<HandedOver>),
    /// Lets other shards serve queues of the volume, for as long as it is open here. Needs a shard that was
    /// made with [`crate::shard::ShardConfig::shared_leaves`].
    Share {
        /// Which volume.
        volume: VolumeHandle,
        /// How many shards there are.
        shards: usize,
    },
    /// Makes ready to serve queues of a volume that is open on another shard. The answer is what it is
    /// called here.
    Visit(std::sync::Arc<crate::shared::SharedVolume>),
    /// Ends that, once none of its requests is in flight here. Before its home closes the volume.
    EndVisit {
        /// What it is called here.
        visit: VolumeHandle,
    },
    /// Answered when every guest request that is active now has ended, and every round that is sealed or
    /// has begun is durable. Who then sees that no tree on the device leads to a block any more, and
    /// has seen it before this, may free that block.
    Barrier,
    /// Begins a collection ([`crate::gc`]): from here on the shard notes which blocks pass through its
    /// hands. Answered as [`Command::Barrier`] is, and when moreover all that was changed by then is
    /// durable: a block that was handed out before is on the device where a tree has it, or nowhere.
    Checkpoint,
    /// Ends that, and tells which blocks have passed.
    EndCheckpoint,
    /// Makes the shard forget what it has read of radix nodes that no tree leads to any more, so that
    /// their blocks can become others.
    Forget {
        /// The blocks of the nodes.
        nodes: Vec<crate::message::BlockRun>,
    },
    /// Makes blocks free that no tree leads to any more, and that every shard has forgotten. For shard
    /// 0; answered when they are on their way.
    Free {
        /// The blocks, of either kind.
        runs: Vec<crate::message::BlockRun>,
    },
    /// Flushes the device, and so learns of failures on other shards.
    FlushDevice,
    /// Makes reads bring what the device holds ([`Device::refresh`](bessel_reactor::device::Device)): to
    /// be done before a volume is read again that was closed because of a failed flush. After a
    /// [`Command::FlushDevice`] on every shard, and while none has a volume open that has failed:
    /// what such a volume reads may be only in the cache.
    Refresh,
    /// Counters of the shard.
    Stats,
    /// What is there: the volume, and how many snapshots.
    Show {
        /// Which volume.
        volume: VolumeHandle,
    },
    /// Snapshots of a volume, in order: up to `limit` of those from sequence `from` on. A page may have
    /// fewer and not be the last.
    Page {
        /// Which volume.
        volume: VolumeHandle,
        /// Position in its log.
        from: u64,
        /// How many, at most [`PAGE_MAX`](crate::snapshot_log::PAGE_MAX).
        limit: usize,
        /// Those that are marked deleted, too.
        with_deleted: bool,
    },
    /// One snapshot, which is not deleted.
    Find {
        /// Which volume.
        volume: VolumeHandle,
        /// Which snapshot.
        which: Which,
    },
    /// The newest snapshot taken at or before some time, which is not deleted: the best of those that
    /// some searches find, each of which begins where the one before it has ended.
    FindAt {
        /// Which volume.
        volume: VolumeHandle,
        /// The time.
        then: WallTime,
        /// Snapshots before this position in the log are looked at.
        before: u64,
    },
    /// Commits everything and gives unused claims back, before the process ends.
    Shutdown,
}

/// A volume between two shards: durable, and open on neither.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HandedOver {
    /// Where its record lives in the registry.
    pub slot: u32,
    /// Its record, as the device has it but for what it only counts.
    pub record: VolumeRecord,
    /// Its snapshots, as far as they were read.
    pub log: SnapshotLog,
    /// What guests have done to it.
    pub counters: crate::volume::VolumeCounters,
}

impl HandedOver {
    /// Its current tree.
    pub fn current(&self) -> CurrentTree {
        let VolumeRecord { root, height, parent, .. } = self.record;
        CurrentTree { root, height, parent }
    }
}

/// What a [`Command`] came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reply {
    /// Done, nothing to tell.
    Done,
    /// The volume, as other shards see it.
    Shared(std::sync::Arc<crate::shared::SharedVolume>),
    /// The volume is open.
    Opened(VolumeHandle),
    /// The volume is closed.
    Closed {
        /// Why what was not durable is lost; none when all of it is durable.
        failed: Option<String>,
        /// Its snapshots, as far as they were known: to look at, and since to forget a million takes a
        /// time that a reactor has not.
        log: Box<SnapshotLog>,
    },
    /// The volume is closed, and may be opened elsewhere.
    HandedOver(Box<HandedOver>),
    /// The volume that another shard has handed over is not open here.
    NotTakenOver {
        /// Why.
        error: CommandError,
        /// To be opened elsewhere.
        volume: Box<HandedOver>,
    },
    /// The snapshot is durable, or was found.
    Snapshot(SnapshotInfo),
    /// These snapshots are marked deleted, durably. The answer to [`Command::DeleteSnapshots`].
    Deleted(Vec<u64>),
    /// The answer to [`Command::Barrier`] and [`Command::Checkpoint`].
    Passed {
        /// Volumes that have failed since the shard was made: what the device holds of them is not known,
        /// or was not for a time.
        unsure: Vec<VolumeId>,
        /// How often one has.
        failures: u64,
    },
    /// The answer to [`Command::EndCheckpoint`].
    Watched {
        /// Blocks that were free in the shard's hands at the checkpoint or have been since.
        passed: Box<crate::walk::BlockSet>,
        /// A node that was freed since may have become something else already: there was no other block.
        broken: bool,
    },
    /// The answer to [`Command::Show`].
    Volume(Box<VolumeInfo>),
    /// The answer to [`Command::Page`].
    Page {
        /// The snapshots.
        snapshots: Vec<SnapshotInfo>,
        /// Where the next page begins; none when this was the last.
        next: Option<u64>,
    },
    /// The answer to [`Command::FindAt`].
    FoundAt {
        /// The newest of those looked at.
        found: Option<SnapshotInfo>,
        /// Those before this position have not been looked at; 0 when all were.
        rest: u64,
    },
    /// The answer to [`Command::Stats`].
    Stats(Box<ShardStats>),
    /// Refused or failed; nothing changed unless the message says so.
    Failed(CommandError),
}

/// Counters of a shard, since it was made.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct ShardStats {
    /// Commit rounds started.
    pub rounds: u64,
    /// Nodes, log blocks and records written.
    pub metadata_writes: u64,
    /// Device flushes started.
    pub flushes: u64,
    /// Device flushes that failed.
    pub flush_failures: u64,
    /// I/O that the device failed, flushes included.
    pub device_errors: u64,
    /// Radix nodes that could not be read or were damaged.
    pub node_errors: u64,
    /// Times the store was found full.
    pub store_full: u64,
    /// Requests of volumes that are open elsewhere, sent to their homes.
    pub forwarded: u64,
    /// The node cache.
    pub cache: crate::nodes::cache::CacheCounters,
    /// Blocks claimed or freed and ready for use by this shard.
    pub claimed_data: u64,
    /// The same, for metadata.
    pub claimed_metadata: u64,
    /// Free space as the bitmaps have it; only from shard 0.
    pub space: Option<SpaceStats>,
    /// Open volumes that refuse writes.
    pub latched: Vec<VolumeId>,
    /// Each open volume's counters.
    pub volumes: Vec<(VolumeId, crate::volume::VolumeCounters)>,
}

/// Free space in the store, in blocks. What shards have claimed is not in it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SpaceStats {
    /// Free in data extents.
    pub free_data: u64,
    /// Free in metadata extents.
    pub free_metadata: u64,
    /// Extents that can still become either.
    pub unused_extents: u64,
    /// Blocks in an extent.
    pub extent_blocks: u64,
    /// Extents in the store.
    pub extent_count: u64,
}

/// Why a command was refused or failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CommandError {
    /// No free metadata block.
    #[error(
        "the store is full: no free metadata block; discard (fstrim) in guests what no snapshot has, or \
         delete snapshots and volumes and run `bessel gc`: a store cannot grow"
    )]
    NoSpace,
    /// The device failed.
    #[error("the device failed: {0}")]
    Device(bessel_reactor::device::DeviceError),
    /// The volume is latched after a failed flush or commit.
    #[error(
        "the volume has failed ({0}) and refuses writes; check the device, then `bessel volume detach` \
         and `bessel volume attach` it"
    )]
    Latched(String),
    /// A block on the device contradicts itself.
    #[error("{0}")]
    Corrupt(String),
    /// Older snapshots of the volume cannot be read from its log.
    #[error(
        "snapshots before {before} cannot be read: {why}; guests, newer snapshots and new ones go on; run \
         `bessel check`, and `bessel volume detach` and `bessel volume attach` to read them again"
    )]
    Log {
        /// Snapshots before this one.
        before: SnapshotId,
        /// Why.
        why: String,
    },
    /// There is no such snapshot.
    #[error("no such snapshot")]
    NoSuchSnapshot,
    /// The snapshot still waits for writes that were in flight when it was taken.
    #[error("the snapshot is still settling; try again")]
    Settling,
    /// The snapshot's label is taken.
    #[error("label {0:?} is already taken in this volume; choose another or relabel that snapshot")]
    LabelTaken(String),
    /// The volume has requests in flight.
    #[error("the volume is in use; stop the guest first")]
    InUse,
    /// Too many of something; the text says what.
    #[error("{0}")]
    Limit(String),
}

/// A snapshot, as people see it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotInfo {
    /// Its identity.
    pub id: SnapshotId,
    /// When it was taken.
    pub time: WallTime,
    /// Its label.
    pub label: Option<String>,
    /// Size of the volume then.
    pub size: ByteCount,
    /// Its radix root.
    pub root: BlockAddr,
    /// Levels of its tree.
    pub height: u8,
    /// Marked deleted.
    pub deleted: bool,
    /// Writes that were in flight when it was taken have not drained.
    pub settling: bool,
    /// Metadata and data blocks allocated for the volume between the snapshot before it and it.
    pub blocks_allocated: u64,
    /// What its tree was derived from.
    pub parent: Parent,
}

/// What is known of a volume's snapshot log.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct LogState {
    /// Snapshots that were ever taken, deleted ones included.
    pub taken: u64,
    /// Those that are not deleted, of what is known.
    pub live: u64,
    /// Snapshots, the oldest ones, that are not known: they have not been read yet, or cannot be.
    pub out_of_reach: u64,
    /// Why they cannot be read, if so.
    pub fault: Option<String>,
}

/// A volume's current tree, as the device has it: a snapshot under way has not changed it yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CurrentTree {
    /// Its radix root.
    pub root: BlockAddr,
    /// Its levels, 3 or 4.
    pub height: u8,
    /// What it was derived from.
    pub parent: Parent,
}

/// A volume, as people see it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeInfo {
    /// Its identity.
    pub id: VolumeId,
    /// Its name.
    pub name: String,
    /// Its size.
    pub size: ByteCount,
    /// Its cache mode.
    pub cache: CacheMode,
    /// The snapshot it was cloned from.
    pub origin: Option<SnapshotId>,
    /// When it was made.
    pub created: WallTime,
    /// Why writes are refused, if they are.
    pub latched: Option<String>,
    /// Metadata and data blocks allocated for it since its newest snapshot.
    pub blocks_allocated: u64,
    /// Its snapshots, as far as they are known.
    pub log: LogState,
    /// Its current tree.
    pub current: CurrentTree,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deletions_are_cut_where_a_round_is_full_and_none_is_lost() {
        let every_tenth: Vec<u64> = (0..1000).step_by(10).collect();
        for sequences in
            [vec![], vec![5], (0..1000).collect(), every_tenth, vec![0, 10_000, 50_000]]
        {
            let pieces: Vec<&[u64]> = deletions(&sequences).collect();
            assert_eq!(pieces.concat(), sequences);
            for piece in pieces {
                let blocks: std::collections::BTreeSet<u64> =
                    piece.iter().map(|it| it / LOG_ENTRIES_PER_BLOCK as u64).collect();
                assert!((1..=DELETED_BLOCKS_MAX).contains(&blocks.len()), "{piece:?}");
            }
        }
    }

    #[test]
    fn a_full_store_is_told_what_helps_today() {
        let told = CommandError::NoSpace.to_string();
        assert!(told.contains("fstrim"), "{told}");
        assert!(told.contains("bessel gc") && !told.contains("or grow"), "{told}");
    }
}
