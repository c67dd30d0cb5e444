//! Snapshots: the cut, labels and delete marks, and rolling back, which is a cut to another root.

use std::collections::BTreeMap;

use bessel_reactor::clock::WallTime;
use bessel_reactor::device::Device;

use super::{NotNow, Tried};
use crate::claims::Taken;
use crate::commit::{After, SealedImages};
use crate::format::{LOG_ENTRIES_PER_BLOCK, LogEntry, Parent};
use crate::journal::Entry as JournalEntry;
use crate::message::BlockKind;
use crate::nodes::cache::FrameId;
use crate::planted::{self, Bug};
use crate::request::{
    CloneOrigin, CommandError, DELETED_BLOCKS_MAX, Reply, SnapshotId, SnapshotInfo, VolumeHandle,
};
use crate::shard::Shard;

impl<D: Device> Shard<D> {
    /// Takes a snapshot: the new root is a copy of the old one whose links are all read-only.
    pub(super) fn snapshot(
        &mut self,
        ticket: u64,
        handle: VolumeHandle,
        label: Option<&str>,
        time: WallTime,
    ) -> Tried {
        self.check_label_free(handle, label)?;
        let volume = self.volume(handle);
        let old_root = volume.root;
        self.needs_for_cut(handle)?;
        let root = self.new_root(self.cache.frame(old_root).level)?;
        self.fill_read_only(root, old_root);
        self.cut(ticket, handle, root, label, time, None);
        Ok(())
    }

    fn check_label_free(&self, handle: VolumeHandle, label: Option<&str>) -> Tried {
        let Some(label) = label else { return Ok(()) };
        match self.volume(handle).log.by_label(label)? {
            Some(_) => Err(CommandError::LabelTaken(label.to_owned()).into()),
            None => Ok(()),
        }
    }

    /// Makes sure of what [`Shard::cut`] takes, and a root.
    pub(super) fn needs_for_cut(&mut self, handle: VolumeHandle) -> Tried {
        let log_block = self.volume(handle).log.needs_block();
        self.needs(3, 1 + u64::from(log_block))
    }

    /// The cut (Parallax 3.3.2, 4.2): from here on the volume's tree is the one below `root`, and
    /// the old tree is the snapshot's. Nothing is drained. Three blocks are written: the new root
    /// and the log, then the record. `derived_from` is the snapshot that `root` is a copy of, when it
    /// is not the one taken.
    pub(super) fn cut(
        &mut self,
        ticket: u64,
        handle: VolumeHandle,
        root: FrameId,
        label: Option<&str>,
        time: WallTime,
        derived_from: Option<u64>,
    ) {
        let log_block = self.volume(handle).log.needs_block().then(|| {
            match self.claims.take(BlockKind::Metadata, 1, self.now) {
                Taken::Run(run) => run.start,
                taken => unreachable!("`needs` made sure of the log's block: {taken:?}"),
            }
        });
        let old_root = self.replace_root(handle, root);
        let (addr, height) = (self.cache.frame(old_root).addr, self.cache.frame(old_root).level);
        let volume = self.volume_mut(handle);
        let sequence = volume.log.count();
        let entry = LogEntry {
            sequence,
            root: addr,
            time,
            size: volume.record.size,
            blocks_allocated: volume.record.blocks_allocated,
            height,
            deleted: false,
            label: label.map(str::to_owned),
            parent: volume.record.parent,
        };
        volume.log.append(&entry, log_block);
        volume.record.log_count = sequence + 1;
        volume.record.log_tail = Some(volume.log.block_of(sequence));
        volume.record.parent = Parent::Snapshot(derived_from.unwrap_or(sequence));
        volume.record.blocks_allocated = 1 + u64::from(log_block.is_some());
        // Before anything is answered that comes after it.
        volume.freeze_for_visitors();
        let stamp = volume.stamp_now();
        if volume.has_requests() {
            volume.settling.push_back((stamp, sequence));
        }
        self.watch_visitors(handle);
        let log = self.log_image(handle, sequence);
        self.seal_root(handle, root, Some(log), After::Snapshot { ticket, sequence });
    }

    pub(super) fn live_snapshot(
        &self,
        handle: VolumeHandle,
        sequence: u64,
    ) -> Result<SnapshotInfo, NotNow> {
        let found = self.volume(handle).log.get(sequence)?;
        Ok(Some(found).filter(|found| !found.deleted).ok_or(CommandError::NoSuchSnapshot)?)
    }

    pub(super) fn label(
        &mut self,
        ticket: u64,
        handle: VolumeHandle,
        sequence: u64,
        label: Option<&str>,
    ) -> Tried {
        self.live_snapshot(handle, sequence)?;
        if let Some(label) = label
            && let Some(holder) = self.volume(handle).log.by_label(label)?
            && holder != sequence
        {
            return Err(CommandError::LabelTaken(label.to_owned()).into());
        }
        self.needs(1, 0)?;
        self.volume_mut(handle).log.set_label(sequence, label);
        self.rewrite_log(ticket, handle, sequence);
        Ok(())
    }

    /// Those of these snapshots that [`Command::DeleteSnapshots`](crate::request::Command) marks.
    pub(super) fn deletable(
        &self,
        handle: VolumeHandle,
        spare_labelled: bool,
        sequences: &[u64],
    ) -> Result<Vec<u64>, NotNow> {
        let spare_labelled = spare_labelled && !planted::is(Bug::BatchDeletesLabelled);
        let log = &self.volume(handle).log;
        let mut going = Vec::with_capacity(sequences.len());
        for sequence in sequences {
            let deleted = log.is_deleted(*sequence)?;
            let spared = spare_labelled && log.is_labelled(*sequence);
            if !(deleted || spared || going.contains(sequence)) {
                going.push(*sequence);
            }
        }
        Ok(going)
    }

    /// Marks snapshots deleted, all in one round. After a crash any of them may be; each stands for
    /// itself.
    pub(super) fn delete_snapshots(
        &mut self,
        ticket: u64,
        handle: VolumeHandle,
        sequences: &[u64],
        reply: Reply,
    ) -> Tried {
        // One entry of each log block, by which the block is found.
        let blocks: BTreeMap<u64, u64> =
            sequences.iter().map(|it| (it / LOG_ENTRIES_PER_BLOCK as u64, *it)).collect();
        if blocks.len() > DELETED_BLOCKS_MAX {
            let what = format!("{} log blocks are more than one round writes", blocks.len());
            return Err(CommandError::Limit(what).into());
        }
        self.needs(blocks.len() + 1, 0)?;
        for sequence in sequences {
            self.volume_mut(handle).log.mark_deleted(*sequence);
        }
        let mut images = SealedImages::default();
        let written = if planted::is(Bug::BatchWritesOneBlock) { 1 } else { blocks.len() };
        for (image, sequence) in images.iter_mut().zip(blocks.values().take(written)) {
            *image = Some(self.log_image(handle, *sequence));
        }
        // With the record, which is the same: of its two slots the older one may name the tree of one of
        // these as the current one, and must not once that is freed.
        let with_record = !sequences.is_empty() && !planted::is(Bug::OlderRecordKept);
        if planted::is(Bug::MarkNotAwaited) {
            self.seal_plain(handle, images, with_record, After::Nothing);
            self.reply(ticket, reply);
            return Ok(());
        }
        self.seal_plain(handle, images, with_record, After::Reply(ticket, reply));
        Ok(())
    }

    fn rewrite_log(&mut self, ticket: u64, handle: VolumeHandle, sequence: u64) {
        let mut images = SealedImages::default();
        images[0] = Some(self.log_image(handle, sequence));
        self.seal_plain(handle, images, false, After::Reply(ticket, Reply::Done));
    }

    /// Keeps what the volume holds now as a snapshot, then lets it read as snapshot `sequence`.
    pub(super) fn rollback(
        &mut self,
        ticket: u64,
        handle: VolumeHandle,
        sequence: u64,
        label: Option<&str>,
        time: WallTime,
    ) -> Tried {
        self.check_label_free(handle, label)?;
        let volume = self.volume(handle);
        if volume.has_requests() && !planted::is(Bug::RollbackUnderRequests) {
            return Err(CommandError::InUse.into());
        }
        if volume.is_settling(sequence) {
            return Err(CommandError::Settling.into());
        }
        let (height, id) = (self.cache.frame(volume.root).level, volume.record.id);
        let entry = self.live_snapshot(handle, sequence)?;
        let origin = CloneOrigin {
            snapshot: SnapshotId { volume: id, sequence },
            root: entry.root,
            height: entry.height,
            size: entry.size,
        };
        if origin.height > height {
            let what = format!("snapshot {sequence} has a taller tree than its volume");
            return Err(CommandError::Corrupt(what).into());
        }
        let source = self.origin_node(Some(&origin), ticket)?;
        let any_time =
            planted::is(Bug::RollbackWithoutCommit) || planted::is(Bug::RollbackUnderRequests);
        if !self.volume(handle).is_quiet() && !any_time {
            // Changes of the old tree must not be made again in the new one after a kill.
            self.want_commit(handle);
            return Err(NotNow::Wait);
        }
        if self.journal_is_full() {
            self.want_all_commits();
            return Err(NotNow::Wait);
        }
        self.needs_for_cut(handle)?;
        let root = self.make_root(height, Some(&origin), source)?;
        self.cut(ticket, handle, root, label, time, Some(sequence));
        if let Some(shared) = &self.volume(handle).shared {
            shared.volume.forget_all();
        }
        let round = self.volume(handle).next_round - 1;
        if let Some(journal) = &mut self.journal
            && !planted::is(Bug::RollbackNotJournaled)
        {
            journal.append(id, round, &JournalEntry::Replaced(id));
        }
        Ok(())
    }

    pub(super) fn replace_root(&mut self, handle: VolumeHandle, root: FrameId) -> FrameId {
        self.cache.pin(root);
        let old = std::mem::replace(&mut self.volume_mut(handle).root, root);
        self.cache.unpin(old);
        old
    }
}
