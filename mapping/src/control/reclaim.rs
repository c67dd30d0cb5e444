//! Giving back blocks that only a deleted snapshot held: see [`crate::reclaim`], which finds them.

use bessel_reactor::device::Device;
use bessel_reactor::units::BlockAddr;

use super::{NotNow, Tried};
use crate::message::{BlockRun, Message};
use crate::nodes::cache::FrameState;
use crate::planted::{self, Bug};
use crate::request::{CommandError, Reply, VolumeHandle, VolumeId};
use crate::shard::Shard;

/// Somebody waits for all that is under way now.
#[derive(Debug)]
pub(crate) struct Barrier {
    ticket: u64,
    /// Volumes of which something is: their last request by then, and their last round.
    waiting: Vec<(VolumeHandle, VolumeId, u64, u64)>,
    unsure: Vec<VolumeId>,
}

impl<D: Device> Shard<D> {
    pub(super) fn set_barrier(&mut self, ticket: u64) {
        let open = self.volumes.iter().flatten();
        let waiting = open.map(|volume| {
            (volume.handle, volume.record.id, volume.last_stamp, volume.next_round - 1)
        });
        let waiting = waiting.collect();
        self.barriers.push(Barrier { ticket, waiting, unsure: Vec::new() });
    }

    /// Answers those whose time has come. Nobody waits as a rule, and that costs nothing.
    pub(crate) fn pass_barriers(&mut self) {
        if self.barriers.is_empty() {
            return;
        }
        let mut barriers = std::mem::take(&mut self.barriers);
        for barrier in &mut barriers {
            let Barrier { waiting, unsure, .. } = barrier;
            waiting.retain(|&(handle, id, stamp, round)| {
                let found = self.volumes.get(handle.0 as usize).and_then(Option::as_ref);
                let Some(volume) = found.filter(|volume| volume.record.id == id) else {
                    unsure.push(id);
                    return false; // What was under way has ended with it.
                };
                let oldest = self.oldest_stamp(handle);
                let ended = oldest.is_none_or(|oldest| oldest > stamp);
                let ended = ended || planted::is(Bug::FreedUnderRequests);
                // The rounds of a volume that has failed end no more.
                let durable = volume.durable_round >= round || volume.latched.is_some();
                let durable = durable || planted::is(Bug::FreedBeforeRounds);
                !(ended && durable)
            });
        }
        for passed in barriers.extract_if(.., |barrier| barrier.waiting.is_empty()) {
            let unsure = passed.unsure.into_iter().chain(self.have_failed.iter().copied());
            self.replies.push_back((passed.ticket, Reply::Passed { unsure: unsure.collect() }));
        }
        self.barriers = barriers;
    }

    /// Frees the frames of nodes that no tree leads to any more.
    pub(super) fn forget_nodes(&mut self, ticket: u64, nodes: &[BlockRun]) -> Tried {
        let blocks = nodes.iter().flat_map(|run| {
            (0..u64::from(run.count)).map(|index: u64| -> BlockAddr { run.start.add(index) })
        });
        let frames: Vec<_> = blocks.filter_map(|block| self.cache.find(block)).collect();
        let mut loading = false;
        for id in &frames {
            let frame = self.cache.frame(*id);
            loading |= frame.state == FrameState::Loading;
            if frame.dirty || frame.in_rounds > 0 || frame.is_pinned() {
                let what = format!(
                    "radix node {} is in use, though no tree leads to it; run `bessel check`",
                    frame.addr
                );
                return Err(CommandError::Corrupt(what).into());
            }
        }
        if loading {
            return Err(NotNow::Wait);
        }
        if !frames.is_empty() && !planted::is(Bug::FreedNodesRemembered) {
            self.cache.forget(frames);
        }
        self.reply(ticket, Reply::Done);
        Ok(())
    }

    /// Hands blocks to the authority.
    pub(super) fn free(&mut self, ticket: u64, runs: &[BlockRun]) -> Tried {
        if self.authority.is_none() {
            let what = "blocks are freed by shard 0 alone".to_owned();
            return Err(CommandError::Limit(what).into());
        }
        for run in runs {
            self.device.retire(run.start, u64::from(run.count));
        }
        self.tell_authority(Message::Return { runs: runs.to_vec() });
        self.reply(ticket, Reply::Done);
        Ok(())
    }
}
