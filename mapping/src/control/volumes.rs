//! Volumes as wholes: making, opening, growing, closing and deleting them.

use bessel_reactor::device::Device;
use bessel_reactor::units::{BlockAddr, ByteCount};

use super::{NotNow, Tried};
use crate::claims::Taken;
use crate::commit::{After, SealedImages};
use crate::directory::VolumeEntry;
use crate::flusher::FlushWaiter;
use crate::format::{Entry, EntryKind, ExtentType, Parent, VolumeRecord, height_for};
use crate::message::{BlockKind, BlockRun};
use crate::nodes::cache::{FrameId, FrameState};
use crate::pipeline::Work;
use crate::planted::{self, Bug};
use crate::radix::{Missing, Path};
use crate::request::{
    CacheChooser, CacheMode, CloneOrigin, CommandError, CreatePlan, HandedOver, Reply, VolumeHandle,
};
use crate::shard::Shard;
use crate::snapshot_log::SnapshotLog;
use crate::volume::{NO_REQUEST, Volume};

/// When the device gets a record of a new volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Published {
    AtOnce,
    /// With [`Command::Publish`](crate::request::Command::Publish).
    Later,
}

impl<D: Device> Shard<D> {
    pub(super) fn open(&mut self, ticket: u64, entry: &VolumeEntry) -> Tried {
        let frame = self.root_to_open(ticket, &entry.record)?;
        let log = SnapshotLog::begin(entry, &self.extents);
        let handle = self.add_volume(entry.slot, entry.record.clone(), log, frame)?;
        self.load_log(handle);
        self.reply(ticket, Reply::Opened(handle));
        Ok(())
    }

    /// Opens a volume that another shard has handed over.
    pub(super) fn take_over(&mut self, ticket: u64, handed: &mut HandedOver) -> Tried {
        let frame = self.root_to_open(ticket, &handed.record)?;
        // It is not refused any more.
        let log = std::mem::replace(&mut handed.log, SnapshotLog::new(handed.record.id));
        let handle = self.add_volume(handed.slot, handed.record.clone(), log, frame)?;
        self.volume_mut(handle).counters = handed.counters;
        self.load_log(handle);
        self.reply(ticket, Reply::Opened(handle));
        Ok(())
    }

    /// The root of a volume that can be opened now.
    fn root_to_open(&mut self, ticket: u64, record: &VolumeRecord) -> Result<FrameId, NotNow> {
        let VolumeRecord { root, height, .. } = *record;
        self.needs_room_in_journal()?;
        let frame = self.node(root, height, ticket)?;
        if let Some(other) = self.volumes.iter().flatten().find(|volume| volume.root == frame) {
            let what = format!("root block {root} is that of volume {:?} too", other.record.name);
            return Err(CommandError::Corrupt(format!("{what}; run `bessel check`")).into());
        }
        if let Err(full) = self.needs_room_for_volume() {
            // Another shard may open it now, and change it.
            self.cache.forget(&[frame]);
            return Err(full);
        }
        Ok(frame)
    }

    pub(super) fn create(&mut self, ticket: u64, plan: &CreatePlan, published: Published) -> Tried {
        self.needs_room_in_journal()?;
        let of_failed = self.volumes.iter().flatten().find_map(|volume| {
            let origin = plan.origin.filter(|origin| origin.snapshot.volume == volume.record.id);
            origin.and(volume.latched.clone())
        });
        if let Some(why) = of_failed {
            // A write that settled in the snapshot may be in the device's cache only, and go.
            return Err(CommandError::Latched(why).into());
        }
        let source = self.origin_node(plan.origin.as_ref(), ticket)?;
        let reused = plan.generation > 0;
        self.needs(2 + usize::from(reused), 1)?;
        let origin_height = plan.origin.map_or(0, |origin| origin.height);
        let height = height_for(plan.size).max(origin_height);
        let root = self.make_root(height, plan.origin.as_ref(), source)?;
        let record = VolumeRecord {
            generation: plan.generation,
            id: plan.id,
            deleted: false,
            size: plan.size,
            height,
            cache: CacheMode::Writeback,
            cache_by_guest: false,
            root: self.cache.frame(root).addr,
            log_tail: None,
            log_count: 0,
            origin: plan.origin.map(|origin| origin.snapshot),
            created: plan.created,
            owner_host: 0,
            owner_epoch: self.epoch,
            blocks_allocated: 1,
            name: plan.name.clone(),
            parent: Parent::Origin,
        };
        let log = SnapshotLog::new(plan.id);
        let handle = match self.add_volume(plan.registry_slot, record, log, root) {
            Ok(handle) => handle,
            Err(error) => {
                self.discard_root(root);
                return Err(error);
            }
        };
        let unpublished = published == Published::Later;
        self.volume_mut(handle).unpublished = unpublished;
        if reused && !unpublished {
            // Into both slots: a volume whose record is damaged later must not pass for the one before it,
            // which is deleted.
            self.seal_root(handle, root, None, After::Nothing);
            let none = SealedImages::default();
            self.seal_plain(handle, none, true, After::Create { ticket });
        } else {
            self.seal_root(handle, root, None, After::Create { ticket });
        }
        Ok(())
    }

    /// Writes the first record of a volume, once all that it holds is durable: a record is one sector,
    /// so the volume is there whole or not at all.
    pub(super) fn publish(&mut self, ticket: u64, handle: VolumeHandle, size: ByteCount) -> Tried {
        let volume = self.volume(handle);
        if !volume.unpublished {
            let what = "the volume is published already";
            return Err(CommandError::Limit(what.to_owned()).into());
        }
        if size > volume.record.size {
            return Err(CommandError::Limit(format!(
                "a volume of {} cannot be published as one of {}",
                volume.record.size.exact(),
                size.exact()
            ))
            .into());
        }
        if volume.has_requests() {
            return Err(CommandError::InUse.into());
        }
        if !volume.is_quiet() && !planted::is(Bug::PublishedUncommitted) {
            self.want_commit(handle);
            return Err(NotNow::Wait);
        }
        let reused = volume.record.generation > 0;
        self.needs(1 + usize::from(reused), 0)?;
        let volume = self.volume_mut(handle);
        volume.unpublished = false;
        volume.record.size = size;
        if reused {
            // Into both slots, as in `create`.
            self.seal_plain(handle, SealedImages::default(), true, After::Nothing);
        }
        self.seal_plain(handle, SealedImages::default(), true, After::Grow { ticket });
        Ok(())
    }

    /// Makes sure that one volume more can be forgotten at any time.
    fn needs_room_in_journal(&mut self) -> Tried {
        if self.journal_is_full() {
            self.want_all_commits();
            return Err(NotNow::Wait);
        }
        Ok(())
    }

    fn needs_room_for_volume(&self) -> Tried {
        let open = self.volumes.iter().flatten().count();
        if open >= self.cache.capacity() / 4 {
            return Err(CommandError::Limit(format!(
                "{open} volumes are open on this reactor, as many as its node cache can hold; \
                 raise store.node_cache"
            ))
            .into());
        }
        Ok(())
    }

    pub(super) fn add_volume(
        &mut self,
        slot: u32,
        record: VolumeRecord,
        log: SnapshotLog,
        root: FrameId,
    ) -> Result<VolumeHandle, NotNow> {
        self.needs_room_for_volume()?;
        let free = self.volumes.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.volumes.push(None);
            self.volumes.len() - 1
        });
        let handle = VolumeHandle(index as u32);
        self.cache.pin(root);
        self.volumes[index] = Some(Volume::new(handle, slot, record, log, root, self.first_round));
        Ok(handle)
    }

    /// The node at `addr`, read if need be.
    pub(super) fn node(
        &mut self,
        addr: BlockAddr,
        level: u8,
        ticket: u64,
    ) -> Result<FrameId, NotNow> {
        if !self.extents.holds(addr, ExtentType::Metadata) {
            return Err(CommandError::Corrupt(format!(
                "root block {addr} does not lie in a metadata extent; run `bessel check`"
            ))
            .into());
        }
        match self.cache.find_present(addr, level) {
            Some(frame) => Ok(frame),
            None => {
                let missing = Missing { addr, level, parent: None };
                self.wait_for_node(missing, Work::Command(ticket));
                Err(NotNow::Wait)
            }
        }
    }

    pub(super) fn origin_node(
        &mut self,
        origin: Option<&CloneOrigin>,
        ticket: u64,
    ) -> Result<Option<FrameId>, NotNow> {
        origin.map(|origin| self.node(origin.root, origin.height, ticket)).transpose()
    }

    /// Makes sure of image buffers and metadata blocks before anything is changed.
    pub(super) fn needs(&mut self, images: usize, blocks: u64) -> Tried {
        if self.sealed_images.available() < images {
            return Err(NotNow::Wait);
        }
        if self.claims.free(BlockKind::Metadata) >= blocks {
            return Ok(());
        }
        match self.claims.ask(BlockKind::Metadata, self.now) {
            Taken::Full if !self.rounds_free_blocks() => Err(CommandError::NoSpace.into()),
            _ => Err(NotNow::Wait),
        }
    }

    /// A new root: a read-only copy of `origin`'s, a taller one above it, or one of holes.
    pub(super) fn make_root(
        &mut self,
        height: u8,
        origin: Option<&CloneOrigin>,
        source: Option<FrameId>,
    ) -> Result<FrameId, NotNow> {
        if let Some(source) = source {
            self.cache.pin(source);
        }
        let made = self.new_root(height);
        if let Some(source) = source {
            self.cache.unpin(source);
        }
        let root = made?;
        match (origin, source) {
            (Some(origin), Some(source)) if origin.height == height => {
                self.fill_read_only(root, source);
            }
            (Some(origin), _) => {
                self.fill_with(root, Entry::sparse());
                let link = Entry::node(origin.height, origin.root);
                let writable = planted::is(Bug::TallCloneWritable);
                let link = if writable { link } else { link.to_read_only() };
                self.set_first_entry(root, link);
            }
            (None, _) => self.fill_with(root, Entry::sparse()),
        }
        Ok(root)
    }

    /// A frame with a new block, for a root.
    pub(super) fn new_root(&mut self, height: u8) -> Result<FrameId, NotNow> {
        match self.new_frame(height, None) {
            Path::Writable(root) => Ok(root),
            Path::Full => Err(CommandError::NoSpace.into()),
            Path::Wait | Path::Absent(_) => Err(NotNow::Wait),
        }
    }

    pub(super) fn set_first_entry(&mut self, node: FrameId, entry: Entry) {
        let sealed = self.key.seal(entry, self.cache.frame(node).addr, 0);
        self.cache.entries_mut(node)[0] = sealed;
    }

    /// Undoes [`Shard::make_root`].
    pub(super) fn discard_root(&mut self, root: FrameId) {
        let start = self.cache.frame(root).addr;
        self.cache.remove(root);
        self.claims.put(BlockKind::Metadata, BlockRun { start, count: 1 });
    }

    pub(super) fn rename(&mut self, ticket: u64, handle: VolumeHandle, name: &str) -> Tried {
        self.needs(1, 0)?;
        let name = name.to_owned();
        self.volume_mut(handle).record.name.clone_from(&name);
        self.seal_plain(handle, SealedImages::default(), true, After::Rename { ticket, name });
        Ok(())
    }

    /// Switches at once, and keeps the choice for the next opening.
    pub(super) fn set_cache(
        &mut self,
        ticket: u64,
        handle: VolumeHandle,
        cache: CacheMode,
        by: CacheChooser,
    ) -> Tried {
        let volume = self.volume_mut(handle);
        let by_guest = by == CacheChooser::Guest;
        let kept = volume.record.cache_by_guest && volume.cache == CacheMode::Writethrough;
        if kept && !by_guest && cache == CacheMode::Writeback {
            tracing::info!(
                volume = volume.name,
                "stays writethrough, as its guest chose; the guest can switch it back"
            );
            self.reply(ticket, Reply::Done);
            return Ok(());
        }
        let switches = volume.cache != cache;
        volume.cache = cache;
        if switches && volume.shared.is_some() {
            let through = cache == CacheMode::Writethrough;
            let stamp = volume.stamp_now();
            let shared = volume.shared.as_mut().expect("just looked");
            shared.volume.set_writethrough(through);
            shared.volume.freeze();
            shared.switching = through.then_some(stamp);
            self.watch_visitors(handle);
        }
        // What a visitor answers from then on is durable.
        let switching = self.volume(handle).shared.as_ref().and_then(|shared| shared.switching);
        if let Some(stamp) = switching
            && !self.visitors_have_passed(handle, stamp)
        {
            return Err(NotNow::Wait);
        }
        if cache == CacheMode::Writethrough {
            self.want_commit(handle);
        }
        let volume = self.volume(handle);
        let known = (volume.record.cache, volume.record.cache_by_guest) == (cache, by_guest);
        if known || volume.latched.is_some() {
            self.reply(ticket, Reply::Done);
            return Ok(());
        }
        self.needs(1, 0)?;
        let record = &mut self.volume_mut(handle).record;
        record.cache = cache;
        record.cache_by_guest = by_guest;
        self.seal_plain(handle, SealedImages::default(), true, After::Reply(ticket, Reply::Done));
        Ok(())
    }

    pub(super) fn grow(&mut self, ticket: u64, handle: VolumeHandle, size: ByteCount) -> Tried {
        let volume = self.volume(handle);
        let (old_size, old_root) = (volume.record.size, volume.root);
        if size < old_size {
            return Err(CommandError::Limit(format!(
                "a volume cannot shrink from {} to {}; create a smaller one and copy",
                old_size.human(),
                size.human()
            ))
            .into());
        }
        self.needs(2, 1)?;
        let old_height = self.cache.frame(old_root).level;
        let height = height_for(size).max(old_height);
        if height == old_height {
            self.volume_mut(handle).record.size = size;
            self.seal_plain(handle, SealedImages::default(), true, After::Grow { ticket });
            return Ok(());
        }
        // A taller root above the old one, which stays as it is: dirty or not, it is linked.
        let root = self.make_root(height, None, None)?;
        let link = Entry::node(old_height, self.cache.frame(old_root).addr);
        self.set_first_entry(root, link);
        self.replace_root(handle, root);
        let record = &mut self.volume_mut(handle).record;
        record.size = size;
        record.height = height;
        record.blocks_allocated += 1;
        self.seal_root(handle, root, None, After::Grow { ticket });
        Ok(())
    }

    /// Takes the volume out of memory, durably as it is, or as it is on the device once it is latched.
    pub(super) fn close(&mut self, ticket: u64, handle: VolumeHandle) -> Tried {
        self.rest(handle)?;
        let failed = self.volume(handle).latched.clone();
        let nodes = self.own_nodes(handle)?;
        if failed.is_some() {
            self.fail_sealed(handle);
        }
        let log = Box::new(self.forget_volume(handle, nodes).log);
        self.reply(ticket, Reply::Closed { failed, log });
        Ok(())
    }

    /// Takes the volume out of memory, durably as it is, for another shard.
    pub(super) fn hand_over(&mut self, ticket: u64, handle: VolumeHandle) -> Tried {
        self.rest(handle)?;
        if let Some(why) = &self.volume(handle).latched {
            return Err(CommandError::Latched(why.clone()).into());
        }
        // Elsewhere they change, and these would be what they were: when the volume comes back, or a clone
        // of a snapshot that has them is made here.
        let mut nodes = self.own_nodes(handle)?;
        if planted::is(Bug::HandedOverRemembered) {
            nodes.clear();
        }
        let handed = Box::new(self.forget_volume(handle, nodes));
        self.reply(ticket, Reply::HandedOver(handed));
        Ok(())
    }

    /// Lets what is under way of a volume that is closing end, and makes it durable unless it is latched.
    fn rest(&mut self, handle: VolumeHandle) -> Tried {
        self.volume_mut(handle).closing = true;
        if !self.visitors_are_idle(handle) {
            return Err(NotNow::Wait);
        }
        self.note_visitors_writes(handle);
        let volume = self.volume_mut(handle);
        let (failed, write_mark) = (volume.latched.is_some(), volume.write_mark);
        let working = volume.flight.is_some() || volume.log_loading || volume.releasing;
        if volume.active_head != NO_REQUEST || working {
            return Err(NotNow::Wait);
        }
        if failed {
            return Ok(());
        }
        if !volume.is_quiet() {
            self.want_commit(handle);
            return Err(NotNow::Wait);
        }
        if let Some(mark) = write_mark
            && !self.flusher.covers(mark)
            && !planted::is(Bug::ClosedUnflushed)
        {
            // What was written in place has no round. A flush that fails once the volume is not open
            // would latch nothing: its guest, back again, would have its next one succeed.
            let waiter = FlushWaiter::Close(handle);
            if !self.flusher.is_wanted_by(waiter) {
                self.flusher.want(mark, waiter);
            }
            return Err(NotNow::Wait);
        }
        Ok(())
    }

    /// Nodes in memory that the volume may change in place, and nobody else: below its root by writable
    /// links alone. A node is in memory for as long as one below it is, so none is missed.
    fn own_nodes(&self, handle: VolumeHandle) -> Result<Vec<FrameId>, NotNow> {
        let mut own = vec![self.volume(handle).root];
        let mut at = 0;
        while let Some(&parent) = own.get(at) {
            at += 1;
            if self.cache.frame(parent).level == 1 {
                continue; // It leads to data.
            }
            for entry in self.cache.entries(parent) {
                if entry.read_only() || !matches!(entry.kind(), EntryKind::Node(_)) {
                    continue;
                }
                let Some(child) = self.cache.find(entry.block()) else { continue };
                let frame = self.cache.frame(child);
                match frame.state {
                    FrameState::Loading => return Err(NotNow::Wait),
                    // A damaged store may have a link to anywhere.
                    _ if frame.level + 1 == self.cache.frame(parent).level
                        && self.cache.may_belong_to(child, parent) =>
                    {
                        own.push(child);
                    }
                    _ => {}
                }
            }
        }
        Ok(own)
    }

    pub(super) fn delete(&mut self, ticket: u64, handle: VolumeHandle) -> Tried {
        let volume = self.volume_mut(handle);
        if volume.has_requests() {
            return Err(CommandError::InUse.into());
        }
        volume.closing = true;
        if volume.log_loading || volume.releasing {
            return Err(NotNow::Wait);
        }
        if !volume.is_quiet() {
            self.want_commit(handle); // So that no frame of it stays dirty.
            return Err(NotNow::Wait);
        }
        self.needs(2, 0)?;
        self.volume_mut(handle).record.deleted = true;
        // Into both slots: once its blocks are somebody else's, the record from before must not count
        // again, whatever becomes of the newer one.
        if !planted::is(Bug::DeletedInOneSlot) {
            self.seal_plain(handle, SealedImages::default(), true, After::Nothing);
        }
        self.seal_plain(handle, SealedImages::default(), true, After::Close { ticket });
        Ok(())
    }
}
