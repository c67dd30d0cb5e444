//! What other shards see of a volume: how it is kept in step, and what waits for them.

use std::sync::Arc;

use bessel_reactor::device::Device;
use bessel_reactor::units::{BlockAddr, VolumeBlock};

use super::Tried;
use crate::format::NODE_ENTRIES;
use crate::pipeline::Request;
use crate::planted::{self, Bug};
use crate::radix::Located;
use crate::request::{CacheMode, CommandError, IoKind, IoStatus, Reply, VolumeHandle};
use crate::shard::Shard;
use crate::shared::{SharedVolume, Written};
use crate::volume::Shared;

impl<D: Device> Shard<D> {
    pub(super) fn share(&mut self, ticket: u64, handle: VolumeHandle, shards: usize) -> Tried {
        // Merges in place that are under way keep visitors from writing, as those that come later will.
        let of_volume = |request: u32| self.requests[request].volume == handle;
        let mut merging: Vec<u32> =
            self.pieces.iter().filter_map(|it| it.merges_in_place()).collect();
        merging.retain(|request| of_volume(*request));
        merging.sort_unstable();
        merging.dedup();
        let Some(table) = &self.shared_leaves else {
            let what = "this shard was made to share nothing".to_owned();
            return Err(CommandError::Limit(what).into());
        };
        let (index, volume) = (self.index, self.volumes[handle.0 as usize].as_mut());
        let volume = volume.expect("the caller has looked");
        let shared = match &volume.shared {
            Some(shared) => Arc::clone(&shared.volume),
            None => {
                let limits = (volume.sectors, volume.last_stamp + 1);
                let shared = SharedVolume::new(
                    volume.record.id,
                    &volume.name,
                    (index, handle),
                    limits,
                    shards,
                    table,
                );
                shared.set_writethrough(volume.cache == CacheMode::Writethrough);
                let shared = Arc::new(shared);
                volume.shared = Some(Box::new(Shared {
                    volume: Arc::clone(&shared),
                    bars: merging.len() as u32,
                    awaited: None,
                    stamp_used: false,
                    switching: None,
                    watched: false,
                    written: Written::default(),
                }));
                self.shared.push(handle);
                for request in merging {
                    self.requests[request].bars = true;
                }
                shared
            }
        };
        self.reply(ticket, Reply::Shared(shared));
        Ok(())
    }

    /// Shows what a request that had to be sent here has found, so that the next need not be.
    pub(crate) fn show_to_visitors(&mut self, request: &Request) {
        let is_data = matches!(request.kind(), IoKind::Read | IoKind::Write);
        let Some(shared) = &self.volume(request.volume).shared else { return };
        if request.status() != IoStatus::Done || !is_data {
            return;
        }
        let shared = Arc::clone(&shared.volume);
        let writes = request.kind() == IoKind::Write;
        let free = self.volume(request.volume).lets_visitors_write();
        let (first, last) = request.blocks();
        let mut block = first;
        while block <= last {
            if !shared.shows(block, writes && free) {
                match self.locate(request.volume, block) {
                    Located::Leaf { frame, writable, .. } => {
                        let entries = self.cache.entries(frame);
                        shared.show(block, Some(entries), writable && free);
                    }
                    Located::Hole { .. } => shared.show(block, None, false),
                    Located::Absent(_) => {}
                }
            }
            let leaf = block.get() / NODE_ENTRIES as u64;
            block = VolumeBlock::new((leaf + 1) * NODE_ENTRIES as u64);
        }
    }

    /// From now on looks at the visitors of a volume in each turn, for as long as something waits for them.
    pub(crate) fn watch_visitors(&mut self, handle: VolumeHandle) {
        if let Some(shared) = &mut self.volume_mut(handle).shared
            && !shared.watched
        {
            shared.watched = true;
            self.watched.push(handle);
        }
    }

    /// Does what waits for requests of visitors that have ended, and shows the next stamp where one has been
    /// used. Once a turn, where something waits.
    pub(crate) fn look_at_visitors(&mut self) {
        let mut awaited = false;
        let barriers = !self.barriers.is_empty();
        let mut watched = std::mem::take(&mut self.watched);
        watched.retain(|handle| {
            let Some(volume) = self.volume_if_open(*handle) else { return false };
            let last_stamp = volume.last_stamp;
            let Some(shared) = &mut volume.shared else { return false };
            if std::mem::take(&mut shared.stamp_used) {
                shared.volume.set_stamp(last_stamp + 1);
            }
            let oldest = shared.volume.oldest();
            let passed = |stamp| oldest.is_none_or(|oldest| oldest > stamp);
            let mut released = false;
            if shared.awaited.is_some_and(passed) {
                shared.awaited = None; // Who waits for more says so again.
                released = true;
            }
            self.released |= released;
            if self.volume(*handle).awaits_requests() {
                self.requests_ended(*handle);
            }
            let volume = self.volume_mut(*handle);
            let (waits, only) = (volume.awaits_requests(), volume.awaits_only_requests());
            let shared = volume.shared.as_mut().expect("just seen");
            let for_visitors = barriers || shared.awaited.is_some();
            shared.watched = waits || for_visitors;
            awaited |= (only || for_visitors) && oldest.is_some();
            shared.watched
        });
        // The list is kept, whose memory is there. What was done meanwhile may have come by others.
        let others = std::mem::replace(&mut self.watched, watched);
        self.watched.extend(others);
        self.visitors_awaited_since = match awaited {
            true => self.visitors_awaited_since.or(Some(self.now)),
            false => None,
        };
    }

    /// True when no visitor may still write in place what it was shown before `stamp`. Else somebody has to
    /// try again, and is woken.
    pub(crate) fn visitors_have_passed(&mut self, handle: VolumeHandle, stamp: u64) -> bool {
        let now = self.now;
        let volume = self.volume_mut(handle);
        let passed = volume.oldest_visitor().is_none_or(|oldest| oldest > stamp);
        if !passed && let Some(shared) = &mut volume.shared {
            if shared.awaited.is_none() {
                self.visitors_awaited_since = Some(now);
            }
            let shared = self.volume_mut(handle).shared.as_mut().expect("just seen");
            shared.awaited = Some(shared.awaited.map_or(stamp, |other| other.min(stamp)));
            self.watch_visitors(handle);
        }
        passed
    }

    /// True when no visitor has a request of the volume in flight. Else it has to be tried again.
    pub(crate) fn visitors_are_idle(&mut self, handle: VolumeHandle) -> bool {
        self.visitors_have_passed(handle, u64::MAX - 1)
    }

    /// Forbids visitors to write in place, for a request that holds on to that until it is complete. True
    /// once none does.
    pub(crate) fn bar_visitors(&mut self, index: u32, block: BlockAddr) -> bool {
        let handle = self.requests[index].volume;
        if !self.requests[index].bars
            && let Some(shared) = &mut self.volume_mut(handle).shared
        {
            shared.bars += 1;
            shared.volume.freeze();
            self.requests[index].bars = true;
        }
        self.visitors_have_left(index, block)
    }

    /// True when no visitor may still write in place to a block of the store that none may be looking up to
    /// write to any more.
    pub(crate) fn visitors_have_left(&mut self, index: u32, block: BlockAddr) -> bool {
        let handle = self.requests[index].volume;
        if self.volume(handle).shared.is_none() || planted::is(Bug::MergeUnderVisitors) {
            return true;
        }
        let stamp = match self.requests[index].awaits_visitors {
            Some((of, stamp)) if of == block => stamp,
            _ => {
                let stamp = self.volume_mut(handle).stamp_now();
                self.watch_visitors(handle);
                self.requests[index].awaits_visitors = Some((block, stamp));
                stamp
            }
        };
        self.visitors_have_passed(handle, stamp)
    }

    /// Takes note of what visitors have written, which no flush may cover that has begun by now.
    pub(crate) fn note_visitors_writes(&mut self, handle: VolumeHandle) {
        let mark = self.flusher.mark();
        let volume = self.volume_mut(handle);
        let Some(shared) = &mut volume.shared else { return };
        let before = std::mem::replace(&mut shared.written, shared.volume.written());
        let now = shared.written;
        if now.count != before.count && !planted::is(Bug::VisitorsWritesUnflushed) {
            volume.write_mark = Some(mark);
        }
        if now.doubtful != before.doubtful {
            let why = "the device failed to flush while another reactor was writing";
            self.latch(handle, why);
        }
    }
}
