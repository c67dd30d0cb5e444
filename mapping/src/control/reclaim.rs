//! What a shard does for who frees blocks: see [`crate::reclaim`] and [`crate::gc`], which find them.

use bessel_reactor::device::Device;
use bessel_reactor::units::BlockAddr;

use super::{NotNow, Tried};
use crate::claims::Watched;
use crate::extents::Authority;
use crate::message::{BlockKind, BlockRun, Message};
use crate::nodes::cache::FrameState;
use crate::planted::{self, Bug};
use crate::request::{CommandError, Reply, VolumeHandle, VolumeId};
use crate::shard::Shard;

/// Who frees a lot waits while so many jobs of the authority have not begun: claims go first, and the list
/// has an end.
const JOBS_WAITING_MAX: usize = 64;

/// Somebody waits for all that is under way now.
#[derive(Debug)]
pub(crate) struct Barrier {
    ticket: u64,
    waiting: Vec<Waiting>,
    /// Claims, and jobs of the authority, that must have ended.
    claims: [u64; 2],
    jobs: u64,
    /// When all have ended, what they have changed is to be committed.
    commits: bool,
}

/// A volume of which something is under way.
#[derive(Debug)]
struct Waiting {
    handle: VolumeHandle,
    id: VolumeId,
    /// Its last request.
    stamp: u64,
    /// How many rounds must have ended, and which must be durable.
    rounds: u64,
    round: u64,
}

impl<D: Device> Shard<D> {
    pub(super) fn set_barrier(&mut self, ticket: u64, commits: bool) {
        let open = self.volumes.iter_mut().flatten();
        let waiting = open.map(|volume| Waiting {
            handle: volume.handle,
            id: volume.record.id,
            stamp: volume.stamp_now(),
            rounds: volume.rounds_under_way(),
            round: 0,
        });
        let waiting = waiting.collect();
        for at in 0..self.shared.len() {
            self.watch_visitors(self.shared[at]);
        }
        let jobs = self.authority.as_ref().map_or(0, Authority::jobs_under_way);
        self.barriers.push(Barrier {
            ticket,
            waiting,
            claims: self.claims.claiming(),
            jobs,
            commits,
        });
    }

    /// Notes what passes from here on, and waits for what is under way, then for what that has changed.
    pub(super) fn set_checkpoint(&mut self, ticket: u64) {
        self.claims.watch();
        if let Some(authority) = &mut self.authority {
            authority.watch();
        }
        self.set_barrier(ticket, !planted::is(Bug::CheckpointNotCommitted));
    }

    pub(super) fn end_checkpoint(&mut self, ticket: u64) {
        let Watched { mut passed, held, broken } = self.claims.unwatch();
        for run in held {
            self.give_back(BlockKind::Metadata, run);
        }
        if let Some(authority) = &mut self.authority {
            passed.insert_all(&authority.unwatch());
        }
        // On their way to the claims: some request or round still has them, or there were too many for a turn.
        for volume in self.volumes.iter().flatten() {
            volume.unlinked.iter().for_each(|unlinked| passed.insert_run(unlinked.run));
        }
        self.released = true; // There may be nodes' blocks again.
        self.reply(ticket, Reply::Watched { passed: Box::new(passed), broken });
    }

    /// Answers those whose time has come. Nobody waits as a rule, and that costs nothing.
    pub(crate) fn pass_barriers(&mut self) {
        if self.barriers.is_empty() {
            return;
        }
        let mut barriers = std::mem::take(&mut self.barriers);
        barriers.retain_mut(|barrier| {
            if !self.has_passed(barrier) {
                return true;
            }
            if std::mem::take(&mut barrier.commits) {
                self.await_changes(barrier);
                return true;
            }
            let (unsure, failures) = (self.have_failed.clone(), self.failures);
            self.reply(barrier.ticket, Reply::Passed { unsure, failures });
            false
        });
        self.barriers = barriers;
    }

    fn has_passed(&self, barrier: &mut Barrier) -> bool {
        barrier.waiting.retain(|waiting| {
            let found = self.volumes.get(waiting.handle.0 as usize).and_then(Option::as_ref);
            // What was under way of one that was closed has ended with it, or has failed.
            let Some(volume) = found.filter(|volume| volume.record.id == waiting.id) else {
                return false;
            };
            let oldest = self.oldest_stamp(waiting.handle);
            let ended = oldest.is_none_or(|oldest| oldest > waiting.stamp);
            let ended = ended
                || planted::is(Bug::FreedUnderRequests)
                || barrier.commits && planted::is(Bug::CheckpointUnderRequests);
            // The rounds of a volume that has failed end no more.
            let durable = volume.latched.is_some()
                || volume.rounds_ended >= waiting.rounds && volume.durable_round >= waiting.round;
            let durable = durable || planted::is(Bug::FreedBeforeRounds);
            !(ended && durable)
        });
        let idle = |authority: &Authority| authority.have_finished(barrier.jobs);
        barrier.waiting.is_empty()
            && self.claims.have_answered(barrier.claims)
            && self.authority.as_ref().is_none_or(idle)
    }

    /// Commits what has been changed by now, and waits for that.
    fn await_changes(&mut self, barrier: &mut Barrier) {
        for index in 0..self.volumes.len() {
            let Some(volume) = &self.volumes[index] else { continue };
            let round = volume.newest_change_round();
            if volume.latched.is_some() || volume.durable_round >= round {
                continue;
            }
            let (handle, id) = (volume.handle, volume.record.id);
            barrier.waiting.push(Waiting { handle, id, stamp: 0, rounds: 0, round });
            self.want_commit(handle);
        }
        self.released = true; // In the next turn.
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
            self.cache.forget(&frames);
        }
        self.reply(ticket, Reply::Done);
        Ok(())
    }

    /// Hands blocks to the authority.
    pub(super) fn free(&mut self, ticket: u64, runs: &[BlockRun]) -> Tried {
        let Some(authority) = &self.authority else {
            let what = "blocks are freed by shard 0 alone".to_owned();
            return Err(CommandError::Limit(what).into());
        };
        if authority.jobs_waiting() >= JOBS_WAITING_MAX {
            return Err(NotNow::Wait);
        }
        for run in runs {
            self.device.retire(run.start, u64::from(run.count));
        }
        self.tell_authority(Message::Return { runs: runs.to_vec() });
        self.reply(ticket, Reply::Done);
        Ok(())
    }
}
