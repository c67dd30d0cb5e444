//! Making changes again that a killed process had made (`journal.rs`).

use bessel_reactor::device::Device;
use bessel_reactor::units::{ByteCount, VolumeBlock};

use super::{NotNow, Tried};
use crate::format::{Entry, ExtentType, NODE_ENTRIES};
use crate::journal::{Change, Mapped};
use crate::pipeline::Work;
use crate::radix::{Located, Path, slot_at};
use crate::request::{CommandError, Reply, VolumeHandle};
use crate::shard::Shard;

impl<D: Device> Shard<D> {
    /// Makes the changes again. When one has to wait, all are tried again: those that are made
    /// already change nothing.
    pub(super) fn restore(
        &mut self,
        ticket: u64,
        handle: VolumeHandle,
        changes: &[Change],
    ) -> Tried {
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
    pub(super) fn restore_in_leaf(
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
}
