//! Commands: what changes a volume as a whole. The control path: it may wait, never err.
//!
//! A command that lacks something (a node, a frame, a block, an image buffer) stays in the queue
//! and is tried again; until it has everything it changes nothing. What it changes on the device
//! goes through the volume's commit rounds, so its order against guest writes is decided in one
//! place, `commit.rs`.
//!
//! | file           | commands                                          |
//! |----------------|---------------------------------------------------|
//! | `volumes.rs`   | create, publish, open, grow, close, hand over, delete, cache mode |
//! | `snapshots.rs` | snapshot, label, delete, rollback                 |
//! | `restore.rs`   | changes that a killed process had made            |
//! | `reclaim.rs`   | blocks that a deleted snapshot alone held         |
//! | `sharing.rs`   | what other shards see of a volume                 |
//! | `sealing.rs`   | (what all of them hand to a round)                |

mod reclaim;
mod restore;
mod sealing;
mod sharing;
mod snapshots;
mod volumes;

pub(crate) use reclaim::Barrier;
use volumes::Published;

use bessel_reactor::device::{Device, DeviceError};
use bessel_reactor::units::ByteCount;

use crate::commit::After;
use crate::flusher::FlushWaiter;
use crate::format::tree_blocks;
use crate::message::{BlockKind, Message};
use crate::request::{
    Command, CommandError, Reply, ShardStats, SnapshotInfo, SpaceStats, VolumeHandle, VolumeInfo,
    Which,
};
use crate::shard::Shard;
use crate::snapshot_log::{Newest, NotHere, Page};

/// Rounds with fixed contents that a volume may have waiting, each holding image buffers.
const SEALED_MAX: usize = 16;

/// A command that has not been answered, or not been started.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) ticket: u64,
    pub(crate) command: Command,
}

/// What trying a command came to.
pub(crate) type Tried = Result<(), NotNow>;

/// Why a command did nothing.
#[derive(Debug)]
pub(crate) enum NotNow {
    /// Try again when something was released; later commands of the volume wait behind it.
    Wait,
    /// Try again when more of the volume's log has been read. Others do not wait for that.
    WaitForLog,
    /// It cannot be done.
    Refused(CommandError),
}

impl From<CommandError> for NotNow {
    fn from(error: CommandError) -> Self {
        Self::Refused(error)
    }
}

impl From<NotHere> for NotNow {
    fn from(why: NotHere) -> Self {
        match why {
            NotHere::None => Self::Refused(CommandError::NoSuchSnapshot),
            NotHere::Unread => Self::WaitForLog,
            NotHere::Lost { before, why } => Self::Refused(CommandError::Log { before, why }),
        }
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
            let Some(mut pending) = self.commands.pop_front() else { return };
            let volume = pending.command.volume();
            if volume.is_some_and(|volume| held_back.contains(&volume)) {
                self.commands.push_back(pending);
                continue;
            }
            match self.try_command(pending.ticket, &mut pending.command) {
                Ok(()) => {}
                Err(NotNow::Wait) => {
                    held_back.extend(volume);
                    self.commands.push_back(pending);
                }
                Err(NotNow::WaitForLog) if self.log_loads.is_stopped() => {
                    let what = "the reactor shuts down".to_owned();
                    self.reply(pending.ticket, Reply::Failed(CommandError::Limit(what)));
                }
                Err(NotNow::WaitForLog) => self.commands.push_back(pending),
                Err(NotNow::Refused(error)) => self.refuse(pending, error),
            }
        }
    }

    fn refuse(&mut self, pending: Pending, error: CommandError) {
        let reply = match pending.command {
            Command::TakeOver(volume) => Reply::NotTakenOver { error, volume },
            Command::Delete { volume } | Command::HandOver { volume } => {
                if let Some(volume) = self.volume_if_open(volume) {
                    volume.closing = false; // It stays.
                }
                Reply::Failed(error)
            }
            _ => Reply::Failed(error),
        };
        self.reply(pending.ticket, reply);
    }

    /// A node that the command waited for cannot be had.
    pub(crate) fn fail_command(&mut self, ticket: u64, error: CommandError) {
        let waiting = self.commands.iter().position(|pending| pending.ticket == ticket);
        if let Some(pending) = waiting.and_then(|waiting| self.commands.remove(waiting)) {
            self.refuse(pending, error);
        }
    }

    /// The name of the volume that a command is about, for the log.
    pub(crate) fn name_of_subject(&self, ticket: u64) -> String {
        let mut waiting = self.commands.iter();
        let pending = waiting.find(|pending| pending.ticket == ticket);
        match pending.map(|pending| &pending.command) {
            Some(Command::Open(entry)) => entry.record.name.clone(),
            Some(Command::TakeOver(volume)) => volume.record.name.clone(),
            Some(Command::Create(plan) | Command::CreateUnpublished(plan)) => plan.name.clone(),
            other => {
                let handle = other.and_then(Command::volume);
                let open = handle.and_then(|handle| self.volumes.get(handle.0 as usize));
                open.and_then(Option::as_ref).map_or(String::new(), |it| it.name.clone())
            }
        }
    }

    pub(crate) fn reply(&mut self, ticket: u64, reply: Reply) {
        self.replies.push_back((ticket, reply));
    }

    fn try_command(&mut self, ticket: u64, command: &mut Command) -> Tried {
        if let Some(volume) = command.volume() {
            if command.changes_the_device() && self.volume_if_open(volume).is_some() {
                self.note_visitors_writes(volume); // It may have to be latched.
            }
            let volume = self.volume_if_open(volume).ok_or_else(|| {
                CommandError::Limit("the volume is not open here any more".to_owned())
            })?;
            if let Some(why) = &volume.latched
                && command.changes_the_device()
            {
                return Err(CommandError::Latched(why.clone()).into());
            }
            if volume.closing && !command.closes() {
                return Err(CommandError::Limit("the volume is being closed".to_owned()).into());
            }
            if volume.unpublished && !command.suits_unpublished() {
                return Err(CommandError::Limit("the volume is not whole yet".to_owned()).into());
            }
            if volume.sealed.len() >= SEALED_MAX {
                return Err(NotNow::Wait);
            }
        }
        match command {
            Command::Create(plan) => self.create(ticket, plan, Published::AtOnce),
            Command::CreateUnpublished(plan) => self.create(ticket, plan, Published::Later),
            Command::Publish { volume, size } => self.publish(ticket, *volume, *size),
            Command::Open(entry) => self.open(ticket, entry),
            Command::Restore { volume, changes } => self.restore(ticket, *volume, changes),
            Command::Snapshot { volume, label, time } => {
                self.snapshot(ticket, *volume, label.as_deref(), *time)
            }
            Command::Label { volume, sequence, label } => {
                self.label(ticket, *volume, *sequence, label.as_deref())
            }
            Command::DeleteSnapshot { volume, sequence } => {
                self.live_snapshot(*volume, *sequence)?;
                self.delete_snapshots(ticket, *volume, &[*sequence], Reply::Done)
            }
            Command::DeleteSnapshots { volume, spare_labelled, sequences } => {
                let going = self.deletable(*volume, *spare_labelled, sequences)?;
                self.delete_snapshots(ticket, *volume, &going, Reply::Deleted(going.clone()))
            }
            Command::Rollback { volume, sequence, label, time } => {
                self.rollback(ticket, *volume, *sequence, label.as_deref(), *time)
            }
            Command::Rename { volume, name } => self.rename(ticket, *volume, name),
            Command::Grow { volume, size } => self.grow(ticket, *volume, *size),
            Command::Delete { volume } => self.delete(ticket, *volume),
            Command::SetCache { volume, cache, by } => self.set_cache(ticket, *volume, *cache, *by),
            Command::Close { volume } => self.close(ticket, *volume),
            Command::HandOver { volume } => self.hand_over(ticket, *volume),
            Command::TakeOver(volume) => self.take_over(ticket, volume),
            Command::Share { volume, shards } => self.share(ticket, *volume, *shards),
            Command::Visit(volume) => self.begin_visit(ticket, volume),
            Command::EndVisit { visit } => self.end_visit(ticket, *visit),
            Command::Barrier => {
                self.set_barrier(ticket, false);
                Ok(())
            }
            Command::Checkpoint => {
                self.set_checkpoint(ticket);
                Ok(())
            }
            Command::EndCheckpoint => {
                self.end_checkpoint(ticket);
                Ok(())
            }
            Command::Forget { nodes } => self.forget_nodes(ticket, nodes),
            Command::Free { runs } => self.free(ticket, runs),
            Command::FlushDevice => {
                if self.flusher.volatile {
                    self.flusher.want(self.flusher.mark(), FlushWaiter::Command(ticket));
                } else {
                    self.device_flushed(ticket, Ok(()));
                }
                Ok(())
            }
            Command::Refresh => {
                if self.flusher.is_in_doubt() {
                    let what = "a flush has failed meanwhile; try again";
                    return Err(CommandError::Limit(what.to_owned()).into());
                }
                let mut open = self.volumes.iter().flatten();
                if let Some(failed) = open.find(|volume| volume.latched.is_some()) {
                    let name = &failed.name;
                    let what = format!("volume {name:?} has failed too; detach it first");
                    return Err(CommandError::Limit(what).into());
                }
                self.device.refresh();
                self.reply(ticket, Reply::Done);
                Ok(())
            }
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
            Command::Page { volume, from, limit, with_deleted } => {
                let Page { sequences, next } =
                    self.volume(*volume).log.page(*from, *limit, *with_deleted)?;
                let snapshots = sequences.iter().map(|it| self.snapshot_info(*volume, *it));
                let snapshots = snapshots.collect();
                self.reply(ticket, Reply::Page { snapshots, next });
                Ok(())
            }
            Command::Find { volume, which } => self.find(ticket, *volume, which),
            Command::FindAt { volume, then, before } => {
                let Newest { found, rest } = self.volume(*volume).log.newest_at(*then, *before)?;
                let found = found.map(|sequence| self.snapshot_info(*volume, sequence));
                self.reply(ticket, Reply::FoundAt { found, rest });
                Ok(())
            }
            Command::Shutdown => self.shutdown(ticket),
        }
    }

    /// The flush that [`Command::FlushDevice`] asked for has ended.
    pub(crate) fn device_flushed(&mut self, ticket: u64, result: Result<(), DeviceError>) {
        match result {
            Ok(()) => self.reply(ticket, Reply::Done),
            Err(error) => self.reply(ticket, Reply::Failed(CommandError::Device(error))),
        }
    }

    /// Commits everything, then gives unused blocks back.
    fn shutdown(&mut self, ticket: u64) -> Tried {
        let open: Vec<VolumeHandle> = self.open_volumes().collect();
        let logs_at_rest = self.log_loads.stop();
        let no_requests =
            self.requests.is_empty() && self.visits.are_idle() && self.forwarded.is_empty();
        let mut quiet = logs_at_rest && no_requests && !self.claims.is_claiming();
        for handle in open {
            quiet &= self.visitors_are_idle(handle);
            let volume = self.volume(handle);
            quiet &= !volume.releasing;
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
                self.volume_mut(handle).log.set_durable(sequence + 1);
                let info = self.snapshot_info(handle, sequence);
                self.reply(ticket, Reply::Snapshot(info));
            }
            After::Grow { ticket } => {
                let volume = self.volume_mut(handle);
                let limit = ByteCount::from_blocks(tree_blocks(volume.record.height));
                volume.sectors = volume.record.size.min(limit).sectors();
                if let Some(shared) = &volume.shared {
                    shared.volume.set_sectors(volume.sectors);
                }
                self.reply(ticket, Reply::Done);
            }
            After::Rename { ticket, name } => {
                self.volume_mut(handle).name = name;
                self.reply(ticket, Reply::Done);
            }
            After::Close { ticket } => {
                // Its nodes are the collector's to forget.
                let log = Box::new(self.forget_volume(handle, Vec::new()).log);
                self.reply(ticket, Reply::Closed { failed: None, log });
            }
        }
    }

    // What is there.

    fn snapshot_info(&self, handle: VolumeHandle, sequence: u64) -> SnapshotInfo {
        let volume = self.volume(handle);
        let info = volume.log.get(sequence).expect("only what is known is shown");
        SnapshotInfo { settling: volume.is_settling(sequence), ..info }
    }

    /// Answers with one snapshot, which the device has and which is not deleted.
    fn find(&mut self, ticket: u64, handle: VolumeHandle, which: &Which) -> Tried {
        let log = &self.volume(handle).log;
        let sequence = match which {
            Which::Sequence(sequence) => *sequence,
            Which::Label(label) => log.by_label(label)?.ok_or(CommandError::NoSuchSnapshot)?,
        };
        if sequence >= log.durable() || log.is_deleted(sequence)? {
            return Err(CommandError::NoSuchSnapshot.into());
        }
        let found = self.snapshot_info(handle, sequence);
        self.reply(ticket, Reply::Snapshot(found));
        Ok(())
    }

    fn info(&self, handle: VolumeHandle) -> VolumeInfo {
        let volume = self.volume(handle);
        VolumeInfo {
            id: volume.record.id,
            name: volume.name.clone(),
            size: volume.record.size,
            cache: volume.cache,
            origin: volume.record.origin,
            created: volume.record.created,
            latched: volume.latched.clone(),
            blocks_allocated: volume.record.blocks_allocated,
            log: volume.log.state(),
            current: volume.durable_tree,
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
        let latched = open.clone().filter(|volume| volume.latched.is_some());
        ShardStats {
            latched: latched.map(|volume| volume.record.id).collect(),
            cache: self.cache.counters,
            claimed_data: self.claims.free(BlockKind::Data),
            claimed_metadata: self.claims.free(BlockKind::Metadata),
            space,
            volumes: open.map(|volume| (volume.record.id, volume.all_counters())).collect(),
            ..self.counters.clone()
        }
    }
}
impl Command {
    /// The volume that the command is about.
    fn volume(&self) -> Option<VolumeHandle> {
        match self {
            Self::Create(_)
            | Self::CreateUnpublished(_)
            | Self::Open(_)
            | Self::TakeOver(_)
            | Self::Visit(_)
            | Self::EndVisit { .. }
            | Self::Barrier
            | Self::Checkpoint
            | Self::EndCheckpoint
            | Self::Forget { .. }
            | Self::Free { .. }
            | Self::FlushDevice
            | Self::Refresh
            | Self::Stats
            | Self::Shutdown => None,
            Self::Snapshot { volume, .. }
            | Self::Publish { volume, .. }
            | Self::Restore { volume, .. }
            | Self::Label { volume, .. }
            | Self::DeleteSnapshot { volume, .. }
            | Self::DeleteSnapshots { volume, .. }
            | Self::Rollback { volume, .. }
            | Self::Rename { volume, .. }
            | Self::Grow { volume, .. }
            | Self::Delete { volume }
            | Self::Close { volume }
            | Self::HandOver { volume }
            | Self::Share { volume, .. }
            | Self::SetCache { volume, .. }
            | Self::Page { volume, .. }
            | Self::Find { volume, .. }
            | Self::FindAt { volume, .. }
            | Self::Show { volume } => Some(*volume),
        }
    }

    /// Whether it can be done with a volume that the device has no record of.
    fn suits_unpublished(&self) -> bool {
        matches!(
            self,
            Self::Publish { .. }
                | Self::Grow { .. }
                | Self::Show { .. }
                | Self::Close { .. }
                | Self::Delete { .. }
        )
    }

    /// Whether the volume is not open any more afterwards.
    fn closes(&self) -> bool {
        matches!(self, Self::Delete { .. } | Self::Close { .. } | Self::HandOver { .. })
    }

    fn changes_the_device(&self) -> bool {
        let looks = matches!(
            self,
            Self::Show { .. }
                | Self::Share { .. }
                | Self::Page { .. }
                | Self::Find { .. }
                | Self::FindAt { .. }
        );
        !looks && !matches!(self, Self::Close { .. } | Self::SetCache { .. })
    }
}
