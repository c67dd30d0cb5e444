//! Making changes again that a killed process had made (`journal.rs`).

use bessel_reactor::device::Device;
use bessel_reactor::units::{BlockAddr, ByteCount, VolumeBlock};

use super::{NotNow, Tried};
use crate::format::{Entry, EntryKind, ExtentType, NODE_ENTRIES};
use crate::journal::{Change, Mapped};
use crate::nodes::cache::FrameId;
use crate::pipeline::{Cover, Work};
use crate::planted::{self, Bug};
use crate::radix::{Located, Path, slot_at, slot_span};
use crate::request::{CommandError, Reply, VolumeHandle};
use crate::shard::Shard;

impl<D: Device> Shard<D> {
    /// Makes the changes again, a step at a time: when one has to wait, this goes on from there.
    pub(super) fn restore(
        &mut self,
        ticket: u64,
        handle: VolumeHandle,
        changes: &[Change],
    ) -> Tried {
        loop {
            let (index, done) = self.volume(handle).restored;
            let Some(change) = changes.get(index) else { break };
            if done == change.count {
                self.volume_mut(handle).restored = (index + 1, 0);
                continue;
            }
            let end = change.first.get().saturating_add(change.count);
            if end > ByteCount::from_sectors(self.volume(handle).sectors).blocks_ceil() {
                let what = format!("a change past the end of the volume, at block {}", end - 1);
                return Err(CommandError::Corrupt(what).into());
            }
            let (at, left) = (change.first.add(done), change.count - done);
            let made = match change.now {
                Mapped::Data(home) => {
                    self.restore_data(ticket, handle, at, home.add(done), left)?
                }
                Mapped::Sparse => self.restore_hole(ticket, handle, at, Entry::sparse(), left)?,
                Mapped::Zeroed => self.restore_hole(ticket, handle, at, Entry::zeroed(), left)?,
            };
            self.volume_mut(handle).restored = (index, done + made.min(left));
        }
        if !self.volume(handle).is_quiet() && !planted::is(Bug::RestoreNotCommitted) {
            self.want_commit(handle);
            return Err(NotNow::Wait);
        }
        self.reply(ticket, Reply::Done);
        Ok(())
    }

    /// Maps the blocks below one leaf to data again. Returns how many.
    fn restore_data(
        &mut self,
        ticket: u64,
        handle: VolumeHandle,
        first: VolumeBlock,
        home: BlockAddr,
        left: u64,
    ) -> Result<u64, NotNow> {
        let slot = slot_at(first, 1);
        let count = left.min((NODE_ENTRIES - slot) as u64);
        let last = home.add(count - 1);
        if ![home, last].iter().all(|block| self.extents.holds(*block, ExtentType::Data)) {
            let what = format!("data at blocks {home} to {last}, which are in no data extent");
            return Err(CommandError::Corrupt(what).into());
        }
        // A block that a snapshot has taken over since stays where it is, read-only.
        let is_made = |found: &Entry, at: u64| {
            found.kind() == EntryKind::Data && found.block() == home.add(at)
        };
        match self.locate(handle, first) {
            Located::Absent(missing) => {
                self.wait_for_node(missing, Work::Command(ticket));
                return Err(NotNow::Wait);
            }
            Located::Hole { .. } => {}
            Located::Leaf { frame, .. } => {
                let entries = &self.cache.entries(frame)[slot..slot + count as usize];
                if entries.iter().zip(0..).all(|(found, at)| is_made(found, at)) {
                    return Ok(count);
                }
            }
        }
        let leaf = self.writable_for_restore(ticket, handle, first, 1)?;
        for at in 0..count {
            let place = slot + at as usize;
            if !is_made(&self.cache.entries(leaf)[place], at) {
                self.set_entry(handle, leaf, first.add(at), Entry::data(home.add(at)));
            }
        }
        Ok(count)
    }

    /// Makes a hole again, by the same links that made it: no more room is needed than then. Returns
    /// how many blocks were done.
    fn restore_hole(
        &mut self,
        ticket: u64,
        handle: VolumeHandle,
        first: VolumeBlock,
        hole: Entry,
        left: u64,
    ) -> Result<u64, NotNow> {
        match self.cover(handle, first, left) {
            Cover::Hole { blocks } => Ok(blocks),
            Cover::Absent(missing) => {
                self.wait_for_node(missing, Work::Command(ticket));
                Err(NotNow::Wait)
            }
            Cover::Shared { level } => {
                let node = self.writable_for_restore(ticket, handle, first, level)?;
                self.set_entry(handle, node, first, hole);
                Ok(slot_span(level))
            }
            Cover::Leaf => {
                let slot = slot_at(first, 1);
                let count = left.min((NODE_ENTRIES - slot) as u64);
                let leaf = self.writable_for_restore(ticket, handle, first, 1)?;
                for place in slot..slot + count as usize {
                    if !self.cache.entries(leaf)[place].is_hole() {
                        self.set_entry(handle, leaf, first.add((place - slot) as u64), hole);
                    }
                }
                Ok(count)
            }
        }
    }

    fn writable_for_restore(
        &mut self,
        ticket: u64,
        handle: VolumeHandle,
        block: VolumeBlock,
        level: u8,
    ) -> Result<FrameId, NotNow> {
        match self.make_writable(handle, block, level) {
            Path::Writable(node) => Ok(node),
            Path::Absent(missing) => {
                self.wait_for_node(missing, Work::Command(ticket));
                Err(NotNow::Wait)
            }
            Path::Wait => Err(NotNow::Wait),
            Path::Full => Err(CommandError::NoSpace.into()),
        }
    }
}
