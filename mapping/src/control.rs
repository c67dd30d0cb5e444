//! Commands: what changes a volume as a whole. The control path: it may wait, never err.
//!
//! A command that lacks something (a node, a frame, a block, an image buffer) stays in the queue
//! and is tried again; until it has everything it changes nothing. What it changes on the device
//! goes through the volume's commit rounds, so its order against guest writes is decided in one
//! place, `commit.rs`.

use bessel_reactor::buffer::Buffer;
use bessel_reactor::clock::WallTime;
use bessel_reactor::device::Device;
use bessel_reactor::units::{BlockAddr, ByteCount, VolumeBlock};

use crate::claims::Taken;
use crate::commit::{After, Sealed};
use crate::directory::VolumeEntry;
use crate::format::{
    Entry, ExtentType, LogEntry, NODE_ENTRIES, VolumeRecord, height_for, tree_blocks,
};
use crate::journal::{Change, Entry as JournalEntry, Mapped};
use crate::message::{BlockKind, BlockRun, Message};
use crate::nodes::cache::{FrameId, FrameState};
use crate::pipeline::Work;
use crate::radix::{Located, Missing, Path, slot_at};
use crate::request::{
    CacheChooser, CacheMode, CloneOrigin, Command, CommandError, CreatePlan, Reply, ShardStats,
    SnapshotId, SnapshotInfo, SpaceStats, VolumeHandle, VolumeInfo,
};
use crate::shard::Shard;
use crate::snapshot_log::SnapshotLog;
use crate::volume::{NO_REQUEST, Volume};

/// Rounds with fixed contents that a volume may have waiting, each holding image buffers.
const SEALED_MAX: usize = 16;

/// A command that has not been answered, or not been started.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) ticket: u64,
    pub(crate) command: Command,
}

/// What trying a command came to.
type Tried = Result<(), NotNow>;

/// Why a command did nothing.
#[derive(Debug)]
enum NotNow {
    /// Try again when something was released.
    Wait,
    /// It cannot be done.
    Refused(CommandError),
}

impl From<CommandError> for NotNow {
    fn from(error: CommandError) -> Self {
        Self::Refused(error)
    }
}

impl<D: Device> Shard<D> {
    /// Takes a command. Its answer comes out of [`Shard::pop_reply`] under the same ticket.
    pub fn control(&mut self, ticket: u64, command: Command) {
        self.commands.push_back(Pending { ticket, command });
        self.commands_ready = true;
    }

    /// Tries every waiting command once, those of one volume in order.
    pub(crate) fn try_commands(&mut self) {
        self.commands_ready = false;
        let mut held_back: Vec<VolumeHandle> = Vec::new();
        for _ in 0..self.commands.len() {
            let Some(pending) = self.commands.pop_front() else { return };
            let volume = pending.command.volume();
            if volume.is_some_and(|volume| held_back.contains(&volume)) {
                self.commands.push_back(pending);
                continue;
            }
            match self.try_command(pending.ticket, &pending.command) {
                Ok(()) => {}
                Err(NotNow::Wait) => {
                    held_back.extend(volume);
                    self.commands.push_back(pending);
                }
                Err(NotNow::Refused(error)) => {
                    if let Command::Delete { volume } = pending.command
                        && let Some(volume) = self.volume_if_open(volume)
                    {
                        volume.closing = false; // It stays.
                    }
                    self.reply(pending.ticket, Reply::Failed(error));
                }
            }
        }
    }

    /// A node that the command waited for cannot be had.
    pub(crate) fn fail_command(&mut self, ticket: u64, error: CommandError) {
        let waiting = self.commands.iter().position(|pending| pending.ticket == ticket);
        if let Some(waiting) = waiting {
            self.commands.remove(waiting);
            self.reply(ticket, Reply::Failed(error));
        }
    }

    pub(crate) fn reply(&mut self, ticket: u64, reply: Reply) {
        self.replies.push_back((ticket, reply));
    }

    fn try_command(&mut self, ticket: u64, command: &Command) -> Tried {
        if let Some(volume) = command.volume() {
            let volume = self.volume_if_open(volume).ok_or_else(|| {
                CommandError::Limit("the volume is not open here any more".to_owned())
            })?;
            if let Some(why) = &volume.latched
                && command.changes_the_device()
            {
                return Err(CommandError::Latched(why.clone()).into());
            }
            if volume.closing && !matches!(command, Command::Delete { .. }) {
                return Err(CommandError::Limit("the volume is being deleted".to_owned()).into());
            }
            if volume.sealed.len() >= SEALED_MAX {
                return Err(NotNow::Wait);
            }
        }
        match command {
            Command::Create(plan) => self.create(ticket, plan),
            Command::Open(entry) => self.open(ticket, entry),
            Command::Restore { volume, changes } => self.restore(ticket, *volume, changes),
            Command::Snapshot { volume, label, time } => {
                self.snapshot(ticket, *volume, label.as_deref(), *time)
            }
            Command::Label { volume, sequence, label } => {
                self.label(ticket, *volume, *sequence, label.as_deref())
            }
            Command::DeleteSnapshot { volume, sequence } => {
                self.delete_snapshot(ticket, *volume, *sequence)
            }
            Command::Rollback { volume, sequence, time } => {
                self.rollback(ticket, *volume, *sequence, *time)
            }
            Command::Rename { volume, name } => {
                self.change_record(ticket, *volume, |record| record.name.clone_from(name))
            }
            Command::Grow { volume, size } => self.grow(ticket, *volume, *size),
            Command::Delete { volume } => self.delete(ticket, *volume),
            Command::SetCache { volume, cache, by } => self.set_cache(ticket, *volume, *cache, *by),
            Command::Stats => {
                let stats = self.stats();
                self.reply(ticket, Reply::Stats(Box::new(stats)));
                Ok(())
            }
            Command::Show { volume } => {
                let info = self.info(*volume);
                self.reply(ticket, Reply::Volume(Box::new(info)));
                Ok(())
            }
            Command::Shutdown => self.shutdown(ticket),
        }
    }

    // Making and opening volumes.

    fn open(&mut self, ticket: u64, entry: &VolumeEntry) -> Tried {
        let (root, height) = (entry.record.root, entry.record.height);
        let frame = self.node(root, height, ticket)?;
        let log = SnapshotLog { entries: entry.log.clone(), blocks: entry.log_blocks.clone() };
        let handle = self.add_volume(entry.slot, entry.record.clone(), log, frame)?;
        self.reply(ticket, Reply::Opened(handle));
        Ok(())
    }

    fn create(&mut self, ticket: u64, plan: &CreatePlan) -> Tried {
        let source = self.origin_node(plan.origin.as_ref(), ticket)?;
        self.needs(2, 1)?;
        let height = height_for(plan.size);
        let root = self.make_root(height, plan.origin.as_ref(), source)?;
        let record = VolumeRecord {
            generation: 0,
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
        };
        let log = SnapshotLog::default();
        let handle = match self.add_volume(plan.registry_slot, record, log, root) {
            Ok(handle) => handle,
            Err(error) => {
                self.discard_root(root);
                return Err(error);
            }
        };
        self.seal_root(handle, root, None, After::Create { ticket });
        Ok(())
    }

    fn add_volume(
        &mut self,
        slot: u32,
        record: VolumeRecord,
        log: SnapshotLog,
        root: FrameId,
    ) -> Result<VolumeHandle, NotNow> {
        let open = self.volumes.iter().flatten().count();
        if open >= self.cache.capacity() / 4 {
            return Err(CommandError::Limit(format!(
                "{open} volumes are open on this reactor, as many as its node cache can hold; \
                 raise store.node_cache"
            ))
            .into());
        }
        let free = self.volumes.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.volumes.push(None);
            self.volumes.len() - 1
        });
        let handle = VolumeHandle(index as u32);
        self.cache.pin(root);
        self.volumes[index] = Some(Volume::new(handle, slot, record, log, root));
        Ok(handle)
    }

    /// The node at `addr`, read if need be.
    fn node(&mut self, addr: BlockAddr, level: u8, ticket: u64) -> Result<FrameId, NotNow> {
        if !self.extents.holds(addr, ExtentType::Metadata) {
            return Err(CommandError::Corrupt(format!(
                "root {addr} does not lie in a metadata extent; run `bessel check`"
            ))
            .into());
        }
        match self.cache.find(addr) {
            Some(frame) if self.cache.frame(frame).state == FrameState::Present => Ok(frame),
            _ => {
                let missing = Missing { addr, level, parent: None };
                self.wait_for_node(missing, Work::Command(ticket));
                Err(NotNow::Wait)
            }
        }
    }

    fn origin_node(
        &mut self,
        origin: Option<&CloneOrigin>,
        ticket: u64,
    ) -> Result<Option<FrameId>, NotNow> {
        origin.map(|origin| self.node(origin.root, origin.height, ticket)).transpose()
    }

    /// Makes sure of image buffers and metadata blocks before anything is changed.
    fn needs(&mut self, images: usize, blocks: u64) -> Tried {
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
    fn make_root(
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
                let entries = *self.cache.entries(source);
                self.fill_read_only(root, &entries);
            }
            (Some(origin), _) => {
                self.fill_with(root, Entry::sparse());
                let link = Entry::node(origin.height, origin.root).to_read_only();
                self.set_first_entry(root, link);
            }
            (None, _) => self.fill_with(root, Entry::sparse()),
        }
        Ok(root)
    }

    /// A frame with a new block, for a root.
    fn new_root(&mut self, height: u8) -> Result<FrameId, NotNow> {
        match self.new_frame(height, None) {
            Path::Writable(root) => Ok(root),
            Path::Full => Err(CommandError::NoSpace.into()),
            Path::Wait | Path::Absent(_) => Err(NotNow::Wait),
        }
    }

    fn set_first_entry(&mut self, node: FrameId, entry: Entry) {
        let sealed = self.key.seal(entry, self.cache.frame(node).addr, 0);
        self.cache.entries_mut(node)[0] = sealed;
    }

    /// Undoes [`Shard::make_root`].
    fn discard_root(&mut self, root: FrameId) {
        let start = self.cache.frame(root).addr;
        self.cache.remove(root);
        self.claims.put(BlockKind::Metadata, BlockRun { start, count: 1 });
    }

    // Sealing rounds.

    /// Seals a round that makes `root`, already the volume's, reachable.
    fn seal_root(
        &mut self,
        handle: VolumeHandle,
        root: FrameId,
        log: Option<(BlockAddr, Buffer)>,
        after: After,
    ) {
        let image = self.node_image(root);
        self.cache.frame_mut(root).in_rounds += 1;
        let volume = self.volume_mut(handle);
        volume.counters.nodes_allocated += 1;
        volume.record.root = image.0;
        let freezes = matches!(after, After::Snapshot { .. });
        let (round, frozen) = if freezes {
            let round = volume.next_round;
            volume.next_round += 1;
            volume.dirty_since = None;
            let spare = self.frame_lists.pop().unwrap_or_default();
            (round, std::mem::replace(&mut self.volume_mut(handle).dirty, spare))
        } else {
            (volume.next_round - 1, self.frame_lists.pop().unwrap_or_default())
        };
        let frame = self.cache.frame_mut(root);
        frame.change_round = round;
        let record = Some(self.record_image(handle));
        let images = [Some(image), log];
        let sealed = Sealed { round, frozen, root: Some(root), images, record, after };
        self.push_sealed(handle, sealed);
    }

    /// Seals a round that only writes the record, a log block, or both. It has no nodes, so it
    /// shares the number of the round before it.
    fn seal_plain(
        &mut self,
        handle: VolumeHandle,
        log: Option<(BlockAddr, Buffer)>,
        with_record: bool,
        after: After,
    ) {
        let record = with_record.then(|| self.record_image(handle));
        let round = self.volume(handle).next_round - 1;
        let frozen = self.frame_lists.pop().unwrap_or_default();
        let images = [log, None];
        self.push_sealed(handle, Sealed { round, frozen, root: None, images, record, after });
    }

    fn sealed_image(&mut self, fill: impl FnOnce(&mut [u8])) -> Buffer {
        let mut buffer = self.sealed_images.take().expect("`needs` made sure of it");
        fill(self.sealed_images.bytes_mut(&mut buffer));
        buffer
    }

    fn node_image(&mut self, node: FrameId) -> (BlockAddr, Buffer) {
        let mut buffer = self.sealed_images.take().expect("`needs` made sure of it");
        let bytes = crate::format::node_as_bytes(self.cache.entries(node));
        self.sealed_images.bytes_mut(&mut buffer).copy_from_slice(bytes);
        (self.cache.frame(node).addr, buffer)
    }

    /// The volume's next record, and the slot it goes to.
    fn record_image(&mut self, handle: VolumeHandle) -> (BlockAddr, Buffer) {
        let (secret, epoch) = (self.secret, self.epoch);
        let volume = self.volume_mut(handle);
        volume.record.generation += 1;
        volume.record.owner_epoch = epoch;
        let (slot, record) = (volume.slot, volume.record.clone());
        let addr = self.geometry.registry_slot(slot, record.generation);
        (addr, self.sealed_image(|out| record.encode_block(out, addr, secret)))
    }

    fn log_image(&mut self, handle: VolumeHandle, sequence: u64) -> (BlockAddr, Buffer) {
        let secret = self.secret;
        let mut buffer = self.sealed_images.take().expect("`needs` made sure of it");
        let volume = self.volumes[handle.0 as usize].as_ref().expect("the volume is open");
        let addr = volume.log.block_of(sequence);
        let out = self.sealed_images.bytes_mut(&mut buffer);
        volume.log.image(out, sequence, volume.record.id, secret);
        (addr, buffer)
    }

    fn change_record(
        &mut self,
        ticket: u64,
        handle: VolumeHandle,
        change: impl FnOnce(&mut VolumeRecord),
    ) -> Tried {
        self.needs(1, 0)?;
        change(&mut self.volume_mut(handle).record);
        self.seal_plain(handle, None, true, After::Reply(ticket, Reply::Done));
        Ok(())
    }

    /// Switches at once, and keeps the choice for the next opening.
    fn set_cache(
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
                volume = volume.record.name,
                "stays writethrough, as its guest chose; the guest can switch it back"
            );
            self.reply(ticket, Reply::Done);
            return Ok(());
        }
        volume.cache = cache;
        if cache == CacheMode::Writethrough {
            self.want_commit(handle);
        }
        let volume = self.volume(handle);
        let known = (volume.record.cache, volume.record.cache_by_guest) == (cache, by_guest);
        if known || volume.latched.is_some() {
            self.reply(ticket, Reply::Done);
            return Ok(());
        }
        self.change_record(ticket, handle, |record| {
            record.cache = cache;
            record.cache_by_guest = by_guest;
        })
    }

    /// Makes the changes again. When one has to wait, all are tried again: those that are made
    /// already change nothing.
    fn restore(&mut self, ticket: u64, handle: VolumeHandle, changes: &[Change]) -> Tried {
        for change in changes {
            let end = change.first.get().saturating_add(change.count);
            if end > ByteCount::from_sectors(self.volume(handle).sectors).blocks_ceil() {
                let what = format!("a change past the end of the volume, at block {}", end - 1);
                return Err(CommandError::Corrupt(what).into());
            }
            let mut at = change.first;
            while at.get() < end {
                at = self.restore_in_leaf(ticket, handle, change, at, end)?;
            }
        }
        if !self.volume(handle).is_quiet() {
            self.want_commit(handle);
            return Err(NotNow::Wait);
        }
        self.reply(ticket, Reply::Done);
        Ok(())
    }

    /// Makes the part of a change again that lies below one leaf. Returns where to go on.
    fn restore_in_leaf(
        &mut self,
        ticket: u64,
        handle: VolumeHandle,
        change: &Change,
        first: VolumeBlock,
        end: u64,
    ) -> Result<VolumeBlock, NotNow> {
        let slot = slot_at(first, 1);
        let count = (end - first.get()).min((NODE_ENTRIES - slot) as u64);
        let wanted = |at: usize| match change.now {
            Mapped::Data(home) => {
                Entry::data(home.add(first.get() - change.first.get() + at as u64))
            }
            Mapped::Sparse => Entry::sparse(),
            Mapped::Zeroed => Entry::zeroed(),
        };
        if let Mapped::Data(home) = change.now
            && !self.extents.holds(home, ExtentType::Data)
        {
            let what = format!("data at block {home}, which is in no data extent");
            return Err(CommandError::Corrupt(what).into());
        }
        let is_made = |found: Entry, wanted: Entry| {
            // A block that a snapshot has taken over since stays where it is, read-only. Holes of
            // either kind read the same.
            let same = found.kind() == wanted.kind() && found.block() == wanted.block();
            same || (found.is_hole() && wanted.is_hole())
        };
        match self.locate(handle, first) {
            Located::Absent(missing) => {
                self.wait_for_node(missing, Work::Command(ticket));
                return Err(NotNow::Wait);
            }
            Located::Hole { .. } if wanted(0).is_hole() => return Ok(first.add(count)),
            Located::Hole { .. } => {}
            Located::Leaf { frame, .. } => {
                let entries = &self.cache.entries(frame)[slot..slot + count as usize];
                let made = entries.iter().zip(0..).all(|(found, at)| is_made(*found, wanted(at)));
                if made {
                    return Ok(first.add(count));
                }
            }
        }
        let leaf = match self.make_writable(handle, first, 1) {
            Path::Writable(leaf) => leaf,
            Path::Absent(missing) => {
                self.wait_for_node(missing, Work::Command(ticket));
                return Err(NotNow::Wait);
            }
            Path::Wait => return Err(NotNow::Wait),
            Path::Full => return Err(CommandError::NoSpace.into()),
        };
        for at in 0..count as usize {
            if !is_made(self.cache.entries(leaf)[slot + at], wanted(at)) {
                self.set_entry(handle, leaf, slot + at, wanted(at));
            }
        }
        Ok(first.add(count))
    }

    // Snapshots.

    /// Takes a snapshot: the new root is a copy of the old one whose links are all read-only.
    fn snapshot(
        &mut self,
        ticket: u64,
        handle: VolumeHandle,
        label: Option<&str>,
        time: WallTime,
    ) -> Tried {
        let volume = self.volume(handle);
        if let Some(label) = label
            && volume.log.by_label(label).is_some()
        {
            return Err(CommandError::LabelTaken(label.to_owned()).into());
        }
        let old_root = volume.root;
        self.needs_for_cut(handle)?;
        let root = self.new_root(self.cache.frame(old_root).level)?;
        let entries = *self.cache.entries(old_root);
        self.fill_read_only(root, &entries);
        self.cut(ticket, handle, root, label, time);
        Ok(())
    }

    /// Makes sure of what [`Shard::cut`] takes, and a root.
    fn needs_for_cut(&mut self, handle: VolumeHandle) -> Tried {
        let log_block = self.volume(handle).log.needs_block();
        self.needs(3, 1 + u64::from(log_block))
    }

    /// The cut (Parallax 3.3.2, 4.2): from here on the volume's tree is the one below `root`, and
    /// the old tree is the snapshot's. Nothing is drained. Three blocks are written: the new root
    /// and the log, then the record.
    fn cut(
        &mut self,
        ticket: u64,
        handle: VolumeHandle,
        root: FrameId,
        label: Option<&str>,
        time: WallTime,
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
        let sequence = volume.log.entries.len() as u64;
        let entry = LogEntry {
            sequence,
            root: addr,
            time,
            size: volume.record.size,
            blocks_allocated: volume.record.blocks_allocated,
            height,
            deleted: false,
            label: label.map(str::to_owned),
        };
        volume.log.append(entry, log_block);
        volume.record.log_count = sequence + 1;
        volume.record.log_tail = Some(volume.log.block_of(sequence));
        volume.record.blocks_allocated = 1 + u64::from(log_block.is_some());
        if volume.active_head != NO_REQUEST {
            volume.settling.push_back((volume.last_stamp, sequence));
        }
        let log = self.log_image(handle, sequence);
        self.seal_root(handle, root, Some(log), After::Snapshot { ticket, sequence });
    }

    fn live_snapshot(&self, handle: VolumeHandle, sequence: u64) -> Result<LogEntry, NotNow> {
        let entry = self.volume(handle).log.entries.get(sequence as usize);
        let live = entry.filter(|entry| !entry.deleted);
        Ok(live.cloned().ok_or(CommandError::NoSuchSnapshot)?)
    }

    fn label(
        &mut self,
        ticket: u64,
        handle: VolumeHandle,
        sequence: u64,
        label: Option<&str>,
    ) -> Tried {
        self.live_snapshot(handle, sequence)?;
        if let Some(label) = label
            && let Some(holder) = self.volume(handle).log.by_label(label)
            && holder.sequence != sequence
        {
            return Err(CommandError::LabelTaken(label.to_owned()).into());
        }
        self.needs(1, 0)?;
        let entry = &mut self.volume_mut(handle).log.entries[sequence as usize];
        entry.label = label.map(str::to_owned);
        self.rewrite_log(ticket, handle, sequence);
        Ok(())
    }

    fn delete_snapshot(&mut self, ticket: u64, handle: VolumeHandle, sequence: u64) -> Tried {
        self.live_snapshot(handle, sequence)?;
        self.needs(1, 0)?;
        self.volume_mut(handle).log.entries[sequence as usize].deleted = true;
        self.rewrite_log(ticket, handle, sequence);
        Ok(())
    }

    fn rewrite_log(&mut self, ticket: u64, handle: VolumeHandle, sequence: u64) {
        let log = self.log_image(handle, sequence);
        self.seal_plain(handle, Some(log), false, After::Reply(ticket, Reply::Done));
    }

    /// Keeps what the volume holds now as a snapshot, then lets it read as snapshot `sequence`.
    fn rollback(
        &mut self,
        ticket: u64,
        handle: VolumeHandle,
        sequence: u64,
        time: WallTime,
    ) -> Tried {
        let volume = self.volume(handle);
        if volume.active_head != NO_REQUEST {
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
        let source = self.origin_node(Some(&origin), ticket)?;
        if !self.volume(handle).is_quiet() {
            // Changes of the old tree must not be made again in the new one after a kill.
            self.want_commit(handle);
            return Err(NotNow::Wait);
        }
        if self.journal.as_ref().is_some_and(|journal| !journal.has_room()) {
            self.want_all_commits();
            return Err(NotNow::Wait);
        }
        self.needs_for_cut(handle)?;
        let root = self.make_root(height, Some(&origin), source)?;
        self.cut(ticket, handle, root, None, time);
        let round = self.volume(handle).next_round - 1;
        if let Some(journal) = &mut self.journal {
            journal.append(id, round, &JournalEntry::Replaced(id));
        }
        Ok(())
    }

    fn replace_root(&mut self, handle: VolumeHandle, root: FrameId) -> FrameId {
        self.cache.pin(root);
        let old = std::mem::replace(&mut self.volume_mut(handle).root, root);
        self.cache.unpin(old);
        old
    }

    // Size and end.

    fn grow(&mut self, ticket: u64, handle: VolumeHandle, size: ByteCount) -> Tried {
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
            self.seal_plain(handle, None, true, After::Grow { ticket });
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

    fn delete(&mut self, ticket: u64, handle: VolumeHandle) -> Tried {
        let volume = self.volume_mut(handle);
        if volume.active_head != NO_REQUEST {
            return Err(CommandError::InUse.into());
        }
        volume.closing = true;
        if !volume.is_quiet() {
            self.want_commit(handle); // So that no frame of it stays dirty.
            return Err(NotNow::Wait);
        }
        self.needs(1, 0)?;
        self.volume_mut(handle).record.deleted = true;
        self.seal_plain(handle, None, true, After::Close { ticket });
        Ok(())
    }

    /// Commits everything, then gives unused blocks back.
    fn shutdown(&mut self, ticket: u64) -> Tried {
        let open: Vec<VolumeHandle> = self.open_volumes().collect();
        let mut quiet = self.requests.is_empty() && !self.claims.is_claiming();
        for handle in open {
            let volume = self.volume(handle);
            if volume.latched.is_none() && !volume.is_quiet() {
                quiet = false;
                self.want_commit(handle);
            }
        }
        if !quiet {
            return Err(NotNow::Wait);
        }
        let runs = self.claims.surplus(true);
        if !runs.is_empty() {
            self.tell_authority(Message::Return { runs });
            self.released = true; // Look again in the next turn.
            return Err(NotNow::Wait);
        }
        if self.authority.as_ref().is_some_and(|authority| !authority.is_idle()) {
            return Err(NotNow::Wait);
        }
        self.reply(ticket, Reply::Done);
        Ok(())
    }

    /// A round is durable: does what waited for it.
    pub(crate) fn finish_after(&mut self, handle: VolumeHandle, after: After) {
        match after {
            After::Nothing => {}
            After::Reply(ticket, reply) => self.reply(ticket, reply),
            After::Create { ticket } => self.reply(ticket, Reply::Opened(handle)),
            After::Snapshot { ticket, sequence } => {
                self.volume_mut(handle).durable_snapshots = sequence + 1;
                let info = self.snapshot_info(handle, sequence);
                self.reply(ticket, Reply::Snapshot(info));
            }
            After::Grow { ticket } => {
                let volume = self.volume_mut(handle);
                let limit = ByteCount::from_blocks(tree_blocks(volume.record.height));
                volume.sectors = volume.record.size.min(limit).sectors();
                self.reply(ticket, Reply::Done);
            }
            After::Close { ticket } => {
                let volume = self.volumes[handle.0 as usize].take().expect("the volume is open");
                self.cache.unpin(volume.root);
                self.reply(ticket, Reply::Done);
            }
        }
    }

    // What is there.

    fn snapshot_info(&self, handle: VolumeHandle, sequence: u64) -> SnapshotInfo {
        let volume = self.volume(handle);
        let entry = &volume.log.entries[sequence as usize];
        SnapshotInfo {
            id: SnapshotId { volume: volume.record.id, sequence },
            time: entry.time,
            label: entry.label.clone(),
            size: entry.size,
            root: entry.root,
            height: entry.height,
            deleted: entry.deleted,
            settling: volume.is_settling(sequence),
            blocks_allocated: entry.blocks_allocated,
        }
    }

    fn info(&self, handle: VolumeHandle) -> VolumeInfo {
        let volume = self.volume(handle);
        let snapshots = 0..volume.durable_snapshots;
        VolumeInfo {
            id: volume.record.id,
            name: volume.record.name.clone(),
            size: volume.record.size,
            cache: volume.cache,
            origin: volume.record.origin,
            created: volume.record.created,
            latched: volume.latched.clone(),
            blocks_allocated: volume.record.blocks_allocated,
            snapshots: snapshots.map(|sequence| self.snapshot_info(handle, sequence)).collect(),
        }
    }

    fn stats(&self) -> ShardStats {
        let space = self.authority.as_ref().map(|authority| SpaceStats {
            free_data: authority.free_blocks(BlockKind::Data),
            free_metadata: authority.free_blocks(BlockKind::Metadata),
            unused_extents: authority.unused_extents(),
            extent_blocks: self.geometry.extent_blocks,
            extent_count: self.geometry.extent_count,
        });
        let open = self.volumes.iter().flatten();
        ShardStats {
            cache: self.cache.counters,
            claimed_data: self.claims.free(BlockKind::Data),
            claimed_metadata: self.claims.free(BlockKind::Metadata),
            space,
            volumes: open.map(|volume| (volume.record.id, volume.counters)).collect(),
            ..self.counters.clone()
        }
    }
}

impl Command {
    /// The volume that the command is about.
    fn volume(&self) -> Option<VolumeHandle> {
        match self {
            Self::Create(_) | Self::Open(_) | Self::Stats | Self::Shutdown => None,
            Self::Snapshot { volume, .. }
            | Self::Restore { volume, .. }
            | Self::Label { volume, .. }
            | Self::DeleteSnapshot { volume, .. }
            | Self::Rollback { volume, .. }
            | Self::Rename { volume, .. }
            | Self::Grow { volume, .. }
            | Self::Delete { volume }
            | Self::SetCache { volume, .. }
            | Self::Show { volume } => Some(*volume),
        }
    }

    fn changes_the_device(&self) -> bool {
        !matches!(self, Self::SetCache { .. } | Self::Show { .. } | Self::Stats)
    }
}
