//! Mistakes on purpose, to see that the tests would find them.
//!
//! Each [`Bug`] is a mistake that a maintainer could make, planted where it would be made. `make
//! planted` builds the tests with the feature `planted`, runs them once for each bug and says which
//! of them saw it (docs/planted.md). One bug is active in a process, that which the environment
//! variable `BESSEL_PLANTED` names; without it the code is as it should be.
//!
//! Without the feature [`is`] is a constant, so the compiler leaves nothing of all this; the
//! `bessel` program does not build with it.

use bessel_reactor::device::Device;
use bessel_reactor::units::{BlockAddr, VolumeBlock};

use crate::format::EntryKind;
use crate::radix::Located;
use crate::request::VolumeHandle;
use crate::shard::Shard;

macro_rules! bugs {
    ($($(#[doc = $what:literal])+ $name:ident,)+) => {
        /// See the module's documentation. Each says what is wrong with the code while it is active.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub(crate) enum Bug {
            $($(#[doc = $what])+ $name,)+
        }

        #[cfg(feature = "planted")]
        const ALL: &[Bug] = &[$(Bug::$name,)+];
    };
}

// `scripts/planted` reads this list: a name and what it breaks, and there which tests should see it.
bugs! {
    // Commit rounds.
    /// Commit nodes are written together with the new nodes and data they lead to.
    LinkedWithFresh,
    /// No flush between new nodes and data and the commit nodes that lead to them.
    FirstFlushSkipped,
    /// A round counts as durable before the flush that follows its commit nodes.
    SecondFlushSkipped,
    /// A command is answered before the flush that follows the volume's record.
    RecordFlushSkipped,
    /// Images of commit nodes are taken after the flush instead of before.
    ImagesAfterFlush,
    /// Each image is taken when it is written, also of nodes that no snapshot has frozen.
    ImagesPiecemeal,
    /// A turn writes all images that rounds have to write.
    TurnUnbounded,
    /// One volume may have all contexts and buffers of its shard.
    NoRoomForOthers,
    /// A turn does as much for a volume as its requests, and the blocks that come free, make it.
    StepsUnbounded,
    /// A node stays marked as changed while its round is in flight: what changes meanwhile is in no round.
    ChangesDuringRoundLost,
    /// A new node that was linked and not yet changed itself is in no round.
    FreshNodeNotDirty,
    /// The failed write of a node does not fail its round.
    FailedImageIgnored,
    /// The write of a node does not count as a write that a failed flush may have lost.
    ImagesWithoutMark,
    // Snapshots.
    /// A volume's record is written together with the nodes and the log that it names.
    RecordWithNodes,
    /// A snapshot's record is written together with the commit nodes of the tree it freezes.
    RecordWithLinked,
    /// Nodes changed before a snapshot go out after its record instead of before.
    SnapshotLeavesDirty,
    /// A round of the new tree goes out before the record that makes the new tree reachable.
    RoundOvertakesSnapshot,
    /// A copied leaf keeps its links writable: the snapshot's data is overwritten in place.
    CopiedLeafWritable,
    /// A copied root or middle node keeps its links writable: the snapshot's nodes are changed.
    CopiedNodeWritable,
    /// Lookup takes a path for writable when its last link is, whatever is above.
    ReadOnlyAboveIgnored,
    /// The leaf found last is taken for the one that a walk would find, whatever has changed since.
    LeafKnownForEver,
    /// What was reached through the forgotten nodes of a closed volume stays, found by nobody who looks for it.
    ForgottenAlone,
    /// A snapshot counts as settled while writes in flight still land in it.
    SettlingIgnored,
    /// A clone taller than its snapshot links to the snapshot's root by a writable link.
    TallCloneWritable,
    /// A record is written over the slot that counts instead of the other one.
    LiveSlotReused,
    /// Of a batch of delete marks only those in the first log block are written.
    BatchWritesOneBlock,
    /// A batch of deletions that spares labelled snapshots does not.
    BatchDeletesLabelled,
    /// Thinning does not care for labels.
    ThinsLabelled,
    /// Of two whole slots the older one is chosen.
    OlderSlotChosen,
    /// The record of a new volume is written before all that the volume holds is durable.
    PublishedUncommitted,
    /// A volume that is not published has a record on the device all the same.
    RecordedEarly,
    /// A rollback does not wait until changes of the tree it leaves are durable.
    RollbackWithoutCommit,
    /// A rollback does not care about requests in flight.
    RollbackUnderRequests,
    // Acknowledgements and flushes.
    /// A write in writethrough mode completes when its data has been written.
    WritethroughNotAwaited,
    /// A write waits for the round in flight instead of the next one, which holds its change.
    InstalledInRoundBefore,
    /// A write in place to a block that is not committed yet does not wait for that commit.
    UncommittedOverwritten,
    /// A write in place in writethrough mode completes without a flush.
    OverwriteNotFlushed,
    /// A FLUSH with nothing to commit does not flush what was written in place.
    FlushForgetsOverwrites,
    /// A FLUSH does not wait for the round in flight.
    FlushForgetsRound,
    /// Who wants a flush shares the one in flight, which began before the write had completed.
    FlushSharedTooEarly,
    /// Write zeroes over a hole does not wait for the round that makes it one.
    HoleNotAwaited,
    // Errors.
    /// A failed flush is submitted again, and its success counts.
    FlushRetried,
    /// A flush that failed on another shard is no concern of this one.
    FailureElsewhereIgnored,
    /// A claim is granted although a flush failed while it was being made durable.
    ClaimDoubtIgnored,
    /// A volume forgets at once that it was latched.
    LatchNotKept,
    /// A flush that succeeds unlatches the volumes that a failed one has latched.
    LatchClearedByFlush,
    /// A flush is believed before others that overlap it have been heard of.
    OverlappingFlushTrusted,
    /// A volume is closed without a flush of what was written in place.
    ClosedUnflushed,
    /// A shard that hands a volume over remembers nodes of it that change elsewhere.
    HandedOverRemembered,
    /// What waits for durability when its volume is latched completes well.
    LatchedStillAcknowledges,
    /// A failed write in place completes well.
    DataErrorIgnored,
    /// A node that cannot be read counts as one of holes.
    UnreadableNodeIsHole,
    // The pipeline.
    /// A mapping is installed when its data write is submitted.
    InstalledAtSubmission,
    /// A small write to a shared block puts zeroes around itself instead of the old sectors.
    MergeForgetsOld,
    /// A small write to a shared block merges with what the last snapshot holds.
    MergeFromSnapshot,
    /// A merge reads the old contents while a write in place to the block is in flight.
    MergeBeforeOverwrite,
    /// Writes do not care that somebody else is giving the block a new home.
    WritesIgnoreLocks,
    /// Discards and write zeroes do not care that a write is giving the block a new home.
    UnmapIgnoresLocks,
    /// A discard gives back blocks that it covers in part.
    DiscardRoundsOut,
    /// Write zeroes leaves the blocks that it covers in part as they are.
    ZeroesSkipEdges,
    /// A discard of a shared subtree does nothing.
    SharedDiscardSkipped,
    // Free space.
    /// A freed block is handed out before the commit that unlinks it is durable.
    ReusedBeforeCommit,
    /// A freed block is handed out while requests that looked it up are active.
    ReusedUnderRequests,
    /// Overwriting or discarding frees blocks that a snapshot has.
    FreesSharedData,
    /// Of blocks taken and not used, one too many is given back.
    ReturnsBlockInUse,
    /// Claimed blocks are handed out before their bitmap is flushed.
    ClaimNotFlushed,
    /// A claim is forgotten in memory: the next one, of whichever shard, gets the same blocks.
    ClaimForgotten,
    /// The catalogue names a new extent whose bitmap is not flushed.
    CatalogueBeforeBitmap,
    /// A bitmap that is damaged counts as one of free blocks.
    DamagedBitmapIsFree,
    /// A bitmap is believed that its own blocks are free, and those past the end of its extent.
    BitmapOffersItself,
    // What a deleted snapshot alone held.
    /// A deleted snapshot is not compared with its clones.
    ClonesIgnored,
    /// A deleted snapshot is not compared with what it was derived from.
    AncestorIgnored,
    /// A deleted snapshot is not compared with what lies beyond trees that are gone.
    OtherBranchIgnored,
    /// A snapshot counts as deleted before its mark is durable.
    MarkNotAwaited,
    /// A snapshot is deleted without a record that names no tree but the current one.
    OlderRecordKept,
    /// Blocks of a deleted snapshot are freed while requests that looked them up are active.
    FreedUnderRequests,
    /// Blocks of a deleted snapshot are freed while rounds that unlink them are not durable.
    FreedBeforeRounds,
    /// Nodes of a deleted snapshot stay in the node cache when their blocks are freed.
    FreedNodesRemembered,
    /// A diff does not look into what the later tree has nothing of.
    DiffPassesOverHoles,
    /// A diff takes nodes that cannot be read for empty ones.
    DiffTakesUnreadableForEmpty,
    // The collector.
    /// Claims that are open at the checkpoint of a collection count as retired.
    ClaimsNotRetired,
    /// A collection does not hear of blocks that were freed or claimed while it runs.
    ReuseNotWatched,
    /// A collection does not hear of blocks that are on their way back to the bitmaps.
    ReturnsNotWatched,
    /// A radix node that is freed while a collection runs becomes another one before that has ended.
    FreedNodesNotHeld,
    /// A collection begins while changes are in memory only.
    CheckpointNotCommitted,
    /// A collection begins while requests hold blocks that no tree has yet.
    CheckpointUnderRequests,
    /// A collection frees while what it has read is not durable, or requests still use it.
    SweepNotAwaited,
    /// A collection takes deleted snapshots for gone that are to be freed by themselves later.
    WaitingNotSpared,
    /// A collection does not look for the blocks of snapshot logs.
    LogsNotReached,
    /// A collection goes on when a volume has failed meanwhile.
    FailureUnderCollection,
    /// A deletion is written into one slot of a record only.
    DeletedInOneSlot,
    /// What is half written of a record is left so when a store is opened.
    HalfRecordsLeft,
    /// A collection does not hear of volumes that were deleted while it read where trees begin.
    DeletionUnderSurvey,
    // Snapshot logs.
    /// A log that has not been read counts as one without older snapshots.
    UnreadLogIsEmpty,
    /// A volume whose log cannot be read counts as one of which all is known.
    LostLogIsKnown,
    // The node cache.
    /// A changed node may be evicted.
    EvictsDirty,
    /// A commit node may be evicted while its image waits for the flush.
    EvictsInFlight,
    /// A frozen node may be evicted before its image is taken.
    EvictsFrozen,
    // The format.
    /// Tags of entries are not checked.
    TagNotChecked,
    /// A link may lead to any level.
    LevelNotChecked,
    /// A link may lead to an extent of any type.
    ExtentTypeNotChecked,
    /// The checksums of sealed sectors are not checked.
    SealNotChecked,
    /// Format does not flush the erasing of an old superblock before it clears the tables.
    EraseNotFlushed,
    /// Format does not flush the tables before it writes the superblock.
    SuperblockBeforeTables,
    // The journal of a killed process.
    /// Changes that a killed process has made are not made again.
    JournalNotReplayed,
    /// Changes of lives other than the last one are made again.
    JournalOfOtherLives,
    /// The first change to a block wins, not the last one.
    JournalOldestWins,
    /// What ends a volume in the journal of the shard that handed it over ends it in that of its new home.
    HandOverEndsAllJournals,
    /// Changes are forgotten when their round begins, not when it is durable.
    JournalRetiredEarly,
    /// An entry becomes whole when the next one is written, after its request has completed.
    JournalEntryLate,
    /// Discards and write zeroes are not noted.
    DiscardNotJournaled,
    /// A rollback does not note that the tree was replaced.
    RollbackNotJournaled,
    /// Changes made again are not committed before the journal that holds them is void.
    RestoreNotCommitted,
    // Volumes that several shards serve queues of.
    /// A snapshot does not stop writes in place on other shards.
    VisitorsMissCut,
    /// Other shards do not see that a mapping has changed.
    VisitorsMissChange,
    /// Blocks are used again while another shard may read or write them.
    VisitorsForgotten,
    /// A block is merged while another shard may be writing to it.
    MergeUnderVisitors,
    /// A flush does not know of writes in place on other shards.
    VisitorsWritesUnflushed,
    /// Requests of other shards begin only while a quarter of all slots is free.
    NoRoomForVisitors,
}

/// Whether this bug is active: never, in a build that is not for `make planted`.
#[cfg(not(feature = "planted"))]
#[inline(always)]
pub(crate) const fn is(_: Bug) -> bool {
    false
}

/// Whether this bug is active. Says so on standard error the first time.
#[cfg(feature = "planted")]
pub(crate) fn is(bug: Bug) -> bool {
    use std::io::Write;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};

    static ACTIVE: OnceLock<Option<Bug>> = OnceLock::new();
    static REACHED: AtomicBool = AtomicBool::new(false);

    let active = ACTIVE.get_or_init(|| {
        let name = std::env::var("BESSEL_PLANTED").ok()?;
        let found = ALL.iter().find(|bug| format!("{bug:?}") == name);
        Some(*found.unwrap_or_else(|| panic!("BESSEL_PLANTED={name} names no planted bug")))
    });
    if *active != Some(bug) {
        return false;
    }
    if !REACHED.swap(true, Ordering::Relaxed) {
        // Past the test harness, which keeps what is printed to itself; in one piece, whatever other
        // threads write.
        let line = format!("planted: {bug:?} is reached\n");
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
    true
}

impl<D: Device> Shard<D> {
    /// Where the volume's last snapshot has a block, if all of the path is in memory.
    pub(crate) fn block_in_last_snapshot(
        &mut self,
        handle: VolumeHandle,
        block: VolumeBlock,
    ) -> Option<BlockAddr> {
        let log = &self.volume(handle).log;
        let last = log.get(log.count().checked_sub(1)?).ok()?.root;
        let root = self.cache.find(last)?;
        let current = std::mem::replace(&mut self.volume_mut(handle).root, root);
        let located = self.locate(handle, block);
        self.volume_mut(handle).root = current;
        let Located::Leaf { frame, slot, .. } = located else { return None };
        let entry = self.cache.entries(frame)[slot];
        (entry.kind() == EntryKind::Data).then(|| entry.block())
    }
}
