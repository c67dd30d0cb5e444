//! FLUSH, and what a write waits for in writethrough mode: rounds and device flushes.

use bessel_reactor::device::Device;

use crate::flusher::FlushWaiter;
use crate::planted::{self, Bug};
use crate::shard::Shard;

impl<D: Device> Shard<D> {
    /// Fixes, on arrival, what a FLUSH must wait for: everything completed before it.
    pub(super) fn note_what_a_flush_covers(&mut self, index: u32) {
        let handle = self.requests[index].volume;
        self.note_visitors_writes(handle);
        let volume = self.volume(handle);
        let (round, mark) = (volume.newest_change_round(), volume.write_mark);
        let request = &mut self.requests[index];
        request.commit_round = round;
        request.flush_mark = mark.filter(|_| !planted::is(Bug::FlushForgetsOverwrites));
    }

    /// True when the request has been put where a round or a flush will find it.
    pub(super) fn waits_for_durability(&mut self, index: u32) -> bool {
        let request = &self.requests[index];
        let (handle, round, mark) = (request.volume, request.commit_round, request.flush_mark);
        let volume = self.volume_mut(handle);
        if round > volume.durable_round {
            volume.committing.push(index);
            if round == volume.next_round {
                self.want_commit(handle);
            }
            return true;
        }
        if let Some(mark) = mark
            && !self.flusher.covers(mark)
        {
            self.flusher.want(mark, FlushWaiter::Request(index));
            return true;
        }
        false
    }
}
