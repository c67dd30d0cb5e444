//! What may be written when, and why that order: commit rounds.
//!
//! A volume's changes reach the device in rounds, one in flight at a time (FORMAT.md, "The commit
//! protocol"):
//!
//! 1. At one instant, an image of every changed node is taken. A mapping is installed only when
//!    its data write has completed, so everything the images name has been written, or is itself a
//!    node imaged at the same instant. Nodes that a snapshot has *frozen* are as they were at that
//!    instant for good, so their images are taken when they are written.
//! 2. *Fresh* nodes, which no tree on the device reaches, are written. A snapshot's new root and
//!    its log block are fresh too.
//! 3. The device is flushed: data and fresh nodes are durable.
//! 4. *Linked* nodes, the commit nodes, are written in place, and flushed.
//! 5. A round that changes the volume's record writes it now, into its other slot, and flushes.
//!
//! A crash before 4 leaves the old tree; during 4 any mix of old and new entries, each of which
//! leads to something durable; after it the new tree. Chains of dependency never exceed two, as
//! with the paper's commit node inheritance (4.1.3): a node that is not yet reachable goes out in
//! step 2, however often it has been changed. Requests that change nodes meanwhile gather for the
//! next round, and none of them delays this one. Nor does a round delay requests: a turn writes a
//! bounded number of images of nodes, whatever rounds are in flight, and the rest is for later ones.
//!
//! What must not be broken:
//! - Images and the list of what they need are taken together, never piecemeal, but for frozen nodes.
//!   Those stay in memory until their round has ended.
//! - Rounds of a volume end in the order they were sealed.
//! - A failed write or flush here latches the volume: what is on the device is unknown.

use std::collections::VecDeque;

use bessel_reactor::buffer::Buffer;
use bessel_reactor::device::Device;
use bessel_reactor::units::BlockAddr;

use crate::flusher::FlushWaiter;
use crate::format::{node_as_bytes, node_from_bytes};
use crate::message::BlockKind;
use crate::nodes::cache::{FrameId, FrameState};
use crate::planted::{self, Bug};
use crate::request::{CommandError, CurrentTree, HandedOver, Reply, VolumeHandle};
use crate::shard::{Shard, TokenKind};
use crate::volume::{Held, NO_REQUEST, Volume};

/// What to do when a round is durable.
#[derive(Debug)]
pub(crate) enum After {
    Nothing,
    /// Answer a command.
    Reply(u64, Reply),
    /// A new volume exists.
    Create {
        ticket: u64,
    },
    /// A snapshot has become durable.
    Snapshot {
        ticket: u64,
        sequence: u64,
    },
    /// The volume has its new size.
    Grow {
        ticket: u64,
    },
    /// The volume has its new name.
    Rename {
        ticket: u64,
        name: String,
    },
    /// The volume is deleted.
    Close {
        ticket: u64,
    },
}

/// Most images of a round that are taken when it is sealed: a snapshot has two, a batch of deletions
/// has a log block in each.
pub(crate) const SEALED_IMAGES_MAX: usize = 8;

/// Images taken when a round is sealed.
pub(crate) type SealedImages = [Option<(BlockAddr, Buffer)>; SEALED_IMAGES_MAX];

/// A round whose contents are fixed and that waits for its turn.
#[derive(Debug)]
pub(crate) struct Sealed {
    pub(crate) round: u64,
    /// Changed nodes of a tree that a snapshot has frozen: their images can wait, since nobody can
    /// change them any more.
    pub(crate) frozen: Vec<FrameId>,
    /// A new root, whose image is among `images`.
    pub(crate) root: Option<FrameId>,
    /// The tree below it, as `record` names it.
    pub(crate) tree: Option<CurrentTree>,
    /// Images taken already, of blocks that nothing reaches yet.
    pub(crate) images: SealedImages,
    /// The volume's record and the slot it goes to.
    pub(crate) record: Option<(BlockAddr, Buffer)>,
    pub(crate) after: After,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    WriteFresh,
    FlushFresh,
    WriteLinked,
    FlushLinked,
    WriteRecord,
    FlushRecord,
}

/// When images of a round's nodes are taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Taking {
    /// At once, since what they are taken of goes on changing.
    AtOnce,
    /// When they are written: a snapshot has frozen the nodes.
    Frozen,
}

/// An image that its round has still to write.
#[derive(Debug)]
pub(crate) enum Unwritten {
    /// Taken when the round began.
    Taken(BlockAddr, Buffer),
    /// To be taken of a frozen node, which stays in its frame for that.
    Frozen(BlockAddr, FrameId),
}

impl Unwritten {
    fn addr(&self) -> BlockAddr {
        match self {
            Self::Taken(addr, _) | Self::Frozen(addr, _) => *addr,
        }
    }
}

/// The round in flight.
///
/// While its phase has images that are not even in flight, the volume is in the shard's `image_queue`,
/// once.
#[derive(Debug)]
pub(crate) struct Flight {
    round: u64,
    phase: Phase,
    writes_in_flight: u32,
    failed: Option<String>,
    frames: Vec<FrameId>,
    /// For [`Phase::WriteFresh`].
    fresh: VecDeque<Unwritten>,
    /// For [`Phase::WriteLinked`].
    linked: VecDeque<Unwritten>,
    record: Option<(BlockAddr, Buffer)>,
    tree: Option<CurrentTree>,
    after: After,
}

impl Flight {
    pub(crate) fn round(&self) -> u64 {
        self.round
    }

    /// Images that the phase, one of writing, has still to write.
    fn unwritten(&mut self) -> &mut VecDeque<Unwritten> {
        match self.phase {
            Phase::WriteFresh => &mut self.fresh,
            _ => &mut self.linked, // None are left for the record's.
        }
    }
}

/// Where an image's buffer came from and goes back to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ImagePool {
    /// Nodes at the start of a round.
    Round,
    /// What a command fixed when it sealed its round.
    Sealed,
}

/// Most images that go to the device in one operation. What a snapshot makes later writes copy is
/// laid down side by side, so most of the next round is adjacent; beyond 64 KiB there is little more
/// to save.
const IMAGES_PER_WRITE: usize = 16;

/// Images of adjacent blocks, the first few places used.
type Images = [Option<Buffer>; IMAGES_PER_WRITE];

/// Images being written, by one operation.
#[derive(Debug)]
pub(crate) struct ImageWrite {
    volume: VolumeHandle,
    images: Images,
    pool: ImagePool,
}

impl<D: Device> Shard<D> {
    /// Asks for a round that covers everything changed so far.
    pub(crate) fn want_commit(&mut self, handle: VolumeHandle) {
        self.volume_mut(handle).commit_wanted = true;
        self.queue_round(handle);
    }

    /// Adds a round with fixed contents behind those that the volume has.
    pub(crate) fn push_sealed(&mut self, handle: VolumeHandle, sealed: Sealed) {
        self.volume_mut(handle).sealed.push_back(sealed);
        self.queue_round(handle);
    }

    fn queue_round(&mut self, handle: VolumeHandle) {
        let volume = self.volume_mut(handle);
        if !volume.queued_for_round && volume.flight.is_none() {
            volume.queued_for_round = true;
            self.round_queue.push_back(handle);
        }
    }

    /// Starts the rounds that can be started, first come, first served: a large round is not
    /// starved of image buffers by small ones behind it.
    pub(crate) fn start_rounds(&mut self) {
        while let Some(handle) = self.round_queue.pop_front() {
            let Some(volume) = self.volume_if_open(handle) else { continue };
            volume.queued_for_round = false;
            if !self.start_round(handle) {
                self.volume_mut(handle).queued_for_round = true;
                self.round_queue.push_front(handle);
                return;
            }
        }
    }

    /// Starts the volume's next round, if it has one. False when image buffers are lacking.
    fn start_round(&mut self, handle: VolumeHandle) -> bool {
        let volume = self.volume_mut(handle);
        if volume.flight.is_some() {
            return true;
        }
        if volume.latched.is_some() {
            self.fail_sealed(handle);
            return true;
        }
        let overtakes = planted::is(Bug::RoundOvertakesSnapshot)
            && volume.commit_wanted
            && !volume.dirty.is_empty();
        let needed = match volume.sealed.front() {
            Some(_) if !overtakes => 0, // Frozen: one by one.
            _ if volume.commit_wanted => volume.dirty.len(),
            _ => return true,
        };
        if self.images.available() < needed {
            return false;
        }
        let waiting = &mut self.volume_mut(handle).sealed;
        let (sealed, taking) = match if overtakes { None } else { waiting.pop_front() } {
            Some(sealed) => (sealed, Taking::Frozen),
            None => match self.seal_changes(handle) {
                Some(sealed) => (sealed, Taking::AtOnce),
                None => return true,
            },
        };
        self.launch(handle, sealed, taking);
        true
    }

    /// Seals everything changed so far into a round that is launched at once.
    fn seal_changes(&mut self, handle: VolumeHandle) -> Option<Sealed> {
        let spare = self.frame_lists.pop().unwrap_or_default();
        let volume = self.volume_mut(handle);
        volume.commit_wanted = false;
        volume.dirty_since = None;
        if volume.dirty.is_empty() {
            self.frame_lists.push(spare);
            return None;
        }
        let round = volume.next_round;
        volume.next_round += 1;
        Some(Sealed {
            round,
            frozen: std::mem::replace(&mut volume.dirty, spare),
            root: None,
            tree: None,
            images: SealedImages::default(),
            record: None,
            after: After::Nothing,
        })
    }

    /// Takes the images, or makes sure that they can be taken later, and begins to write.
    fn launch(&mut self, handle: VolumeHandle, sealed: Sealed, taking: Taking) {
        self.counters.rounds += 1;
        let mut flight = Flight {
            round: sealed.round,
            phase: Phase::WriteFresh,
            writes_in_flight: 0,
            failed: None,
            frames: self.frame_lists.pop().unwrap_or_default(),
            fresh: self.image_lists.pop().unwrap_or_default(),
            linked: self.image_lists.pop().unwrap_or_default(),
            record: sealed.record,
            tree: sealed.tree,
            after: sealed.after,
        };
        let mut frozen = sealed.frozen;
        for id in frozen.drain(..) {
            self.dirty_nodes -= 1;
            self.cache.frame_mut(id).dirty = false;
            if self.cache.frame(id).dropped {
                continue; // No image names it; its block is freed when this round is durable.
            }
            let addr = self.cache.frame(id).addr;
            let image = if taking == Taking::Frozen || planted::is(Bug::ImagesPiecemeal) {
                Unwritten::Frozen(addr, id)
            } else {
                Unwritten::Taken(addr, self.take_image(id))
            };
            let frame = self.cache.frame_mut(id);
            if planted::is(Bug::ChangesDuringRoundLost) {
                frame.dirty = true;
            }
            let forgotten = match taking {
                Taking::AtOnce => planted::is(Bug::EvictsInFlight),
                Taking::Frozen => planted::is(Bug::EvictsFrozen),
            };
            if forgotten && !frame.fresh {
                flight.linked.push_back(image);
                continue;
            }
            frame.in_rounds += 1;
            flight.frames.push(id);
            if frame.fresh || planted::is(Bug::LinkedWithFresh) {
                flight.fresh.push_back(image);
            } else {
                flight.linked.push_back(image);
            }
        }
        self.frame_lists.push(frozen);
        flight.frames.extend(sealed.root);
        for (addr, buffer) in sealed.images.into_iter().flatten() {
            self.write_sealed(handle, addr, buffer);
            flight.writes_in_flight += 1;
        }
        if planted::is(Bug::RecordWithNodes)
            && let Some((addr, buffer)) = flight.record.take()
        {
            self.write_sealed(handle, addr, buffer);
            flight.writes_in_flight += 1;
        }
        if !flight.fresh.is_empty() {
            self.image_queue.push_back(handle);
        }
        self.volume_mut(handle).flight = Some(flight);
        self.released = true; // Changes have room again.
        self.advance_round(handle);
    }

    /// Copies a node as it may go to the device now. It is checked when it does.
    fn take_image(&mut self, id: FrameId) -> Buffer {
        let mut buffer = self.images.take().expect("the caller made sure of a buffer");
        self.images.bytes_mut(&mut buffer).copy_from_slice(node_as_bytes(self.cache.entries(id)));
        buffer
    }

    /// Writes images of nodes for the rounds in flight, which take turns. Not all at once: where a
    /// device does its work when asked to, every request of every guest waits meanwhile. True when
    /// some are left that need not wait for anything.
    pub(crate) fn write_images(&mut self) -> bool {
        let mut written = 0;
        let mut lacking = 0; // Rounds, one after the other, that had to wait for a buffer.
        while lacking < self.image_queue.len() {
            if written == self.images_per_turn && !planted::is(Bug::TurnUnbounded) {
                return true;
            }
            let handle = self.image_queue.pop_front().expect("just looked");
            let volume = self.volumes[handle.0 as usize].as_mut();
            let flight = volume.and_then(|volume| volume.flight.as_mut());
            let flight = flight.expect("a volume with images to write has a round in flight");
            if flight.failed.is_some() {
                self.advance_round(handle); // Which ends it, once all that was written has ended.
                continue;
            }
            let unwritten = flight.unwritten();
            let first = unwritten.front().expect("a round is queued while it has images to write");
            if matches!(first, Unwritten::Frozen(..)) && self.images.available() == 0 {
                self.image_queue.push_back(handle);
                lacking += 1;
                continue;
            }
            flight.writes_in_flight += 1;
            written += self.write_adjacent(handle, self.images_per_turn.saturating_sub(written));
            if !self.unwritten(handle).is_empty() {
                self.image_queue.push_back(handle);
            }
            lacking = 0;
        }
        false
    }

    /// Images that the volume's round in flight has still to write in its phase.
    fn unwritten(&mut self, handle: VolumeHandle) -> &mut VecDeque<Unwritten> {
        let flight = self.volume_mut(handle).flight.as_mut();
        flight.expect("a volume with images to write has a round in flight").unwritten()
    }

    /// Writes the first image of the round in flight, for which there is a buffer, and as many of
    /// those behind it as lie behind it on the device too, `most` in all. Returns how many.
    fn write_adjacent(&mut self, handle: VolumeHandle, most: usize) -> usize {
        let mut images = Images::default();
        let mut start = None;
        let mut count = 0;
        while count < most.clamp(1, IMAGES_PER_WRITE) {
            let Some(next) = self.unwritten(handle).front() else { break };
            let addr = next.addr();
            if addr != start.get_or_insert(addr).add(count as u64) {
                break;
            }
            let needs_buffer = matches!(next, Unwritten::Frozen(..));
            if needs_buffer && self.images.available() == 0 {
                break;
            }
            let unwritten = self.unwritten(handle);
            let image = unwritten.pop_front().expect("just looked");
            images[count] = Some(self.checked_image(image));
            count += 1;
        }
        let start = start.expect("the caller has looked");
        self.write_images_at(handle, start, images, ImagePool::Round);
        count
    }

    /// A node's image, to be written now, checked once more.
    fn checked_image(&mut self, image: Unwritten) -> Buffer {
        let (addr, buffer) = match image {
            Unwritten::Taken(addr, mut buffer) => {
                if planted::is(Bug::ImagesAfterFlush)
                    && let Some(id) = self.cache.find(addr)
                    && !self.cache.frame(id).fresh
                {
                    let now = node_as_bytes(self.cache.entries(id));
                    self.images.bytes_mut(&mut buffer).copy_from_slice(now);
                }
                (addr, buffer)
            }
            Unwritten::Frozen(addr, id) => {
                let frame = self.cache.frame(id);
                assert!(
                    frame.addr == addr && frame.state == FrameState::Present,
                    "node {addr} was frozen and is not in its frame any more: {frame:?}"
                );
                (addr, self.take_image(id))
            }
        };
        let entries = node_from_bytes(self.images.bytes(&buffer));
        if let Some(slot) = self.key.first_wrong(entries, addr) {
            let entry = entries[slot];
            panic!("node {addr} slot {slot} holds {entry:?} with a wrong tag: memory is damaged");
        }
        buffer
    }

    /// Writes an image that was taken when its round was sealed.
    fn write_sealed(&mut self, handle: VolumeHandle, addr: BlockAddr, buffer: Buffer) {
        let mut images = Images::default();
        images[0] = Some(buffer);
        self.write_images_at(handle, addr, images, ImagePool::Sealed);
    }

    /// Writes images of adjacent blocks, from `addr` on.
    fn write_images_at(
        &mut self,
        handle: VolumeHandle,
        addr: BlockAddr,
        images: Images,
        pool: ImagePool,
    ) {
        let buffers = match pool {
            ImagePool::Round => &mut self.images,
            ImagePool::Sealed => &mut self.sealed_images,
        };
        self.scratch.clear();
        self.scratch.extend(images.iter().flatten().map(|buffer| buffers.lend(buffer)));
        self.counters.metadata_writes += self.scratch.len() as u64;
        let write = self.image_writes.insert(ImageWrite { volume: handle, images, pool });
        self.device.write(TokenKind::Image.token(write), addr.offset(), &self.scratch);
    }

    /// Takes in the end of a write of images.
    pub(crate) fn image_written(
        &mut self,
        write: u32,
        result: Result<(), bessel_reactor::device::DeviceError>,
    ) {
        let ImageWrite { volume: handle, images, pool } = self.image_writes.remove(write);
        let pool = match pool {
            ImagePool::Round => &mut self.images,
            ImagePool::Sealed => &mut self.sealed_images,
        };
        for buffer in images.into_iter().flatten() {
            pool.returned(&buffer);
            pool.put(buffer);
        }
        let mark = self.flusher.mark();
        let volume = self.volume_mut(handle);
        // A flush that fails from here on leaves the image unknown, whoever asked for that flush.
        if !planted::is(Bug::ImagesWithoutMark) {
            volume.write_mark = Some(mark);
        }
        let flight = volume.flight.as_mut().expect("images are written by a round in flight");
        flight.writes_in_flight -= 1;
        if let Err(error) = result
            && !planted::is(Bug::FailedImageIgnored)
        {
            flight.failed.get_or_insert_with(|| format!("writing metadata: {error}"));
        }
        self.advance_round(handle);
    }

    /// Takes in the end of the flush that the round in flight asked for.
    pub(crate) fn round_flushed(&mut self, handle: VolumeHandle, success: bool) {
        let volume = self.volume_mut(handle);
        let flight = volume.flight.as_mut().expect("flushes are asked for by a round in flight");
        if !success {
            flight.failed.get_or_insert_with(|| "the device failed to flush".to_owned());
        }
        flight.phase = match flight.phase {
            Phase::FlushFresh => Phase::WriteLinked,
            Phase::FlushLinked => Phase::WriteRecord,
            Phase::FlushRecord => {
                self.end_round(handle);
                return;
            }
            phase => unreachable!("no flush was asked for in {phase:?}"),
        };
        self.enter_phase(handle);
    }

    /// Goes on when every write of the phase has ended.
    fn advance_round(&mut self, handle: VolumeHandle) {
        let mut volatile = self.flusher.volatile;
        let mark = self.flusher.mark();
        let flight = self.volume_mut(handle).flight.as_mut().expect("a round is in flight");
        let failed = flight.failed.is_some();
        if flight.writes_in_flight > 0 || !(failed || flight.unwritten().is_empty()) {
            return;
        }
        if failed {
            self.end_round(handle);
            return;
        }
        flight.phase = match flight.phase {
            Phase::WriteFresh => Phase::FlushFresh,
            Phase::WriteLinked => Phase::FlushLinked,
            Phase::WriteRecord => Phase::FlushRecord,
            phase => unreachable!("no write was in flight in {phase:?}"),
        };
        volatile &= !match flight.phase {
            Phase::FlushFresh => planted::is(Bug::FirstFlushSkipped),
            Phase::FlushLinked => planted::is(Bug::SecondFlushSkipped),
            _ => planted::is(Bug::RecordFlushSkipped),
        };
        if volatile {
            self.flusher.want(mark, FlushWaiter::Round(handle));
        } else {
            self.round_flushed(handle, true);
        }
    }

    /// Starts the writes of the phase just entered, or skips it when it has none.
    fn enter_phase(&mut self, handle: VolumeHandle) {
        let flight = self.volume_mut(handle).flight.as_mut().expect("a round is in flight");
        if flight.failed.is_some() {
            self.end_round(handle);
            return;
        }
        if flight.phase == Phase::WriteLinked && !flight.linked.is_empty() {
            if planted::is(Bug::RecordWithLinked)
                && let Some((addr, buffer)) = flight.record.take()
            {
                flight.writes_in_flight += 1;
                self.write_sealed(handle, addr, buffer);
            }
            self.image_queue.push_back(handle);
            return;
        }
        if flight.record.is_none() {
            self.end_round(handle);
            return;
        }
        flight.phase = Phase::WriteRecord;
        flight.writes_in_flight = 1;
        let (addr, buffer) = flight.record.take().expect("checked above");
        self.write_sealed(handle, addr, buffer);
    }

    /// The round is durable, or has failed.
    fn end_round(&mut self, handle: VolumeHandle) {
        let mut flight = self.volume_mut(handle).flight.take().expect("a round is in flight");
        for mut unwritten in [flight.fresh, flight.linked] {
            for image in unwritten.drain(..) {
                // Only after a failure.
                if let Unwritten::Taken(_, buffer) = image {
                    self.images.put(buffer);
                }
            }
            self.image_lists.push(unwritten);
        }
        if let Some((_, buffer)) = flight.record {
            self.sealed_images.put(buffer); // Only after a failure.
        }
        self.released = true;
        if let Some(why) = flight.failed {
            self.image_queue.retain(|queued| *queued != handle);
            // The frames stay as they are: memory is newer than the device, so they must never be
            // evicted and read again.
            self.volume_mut(handle).lost.append(&mut flight.frames);
            self.frame_lists.push(flight.frames);
            self.latch(handle, &why);
            self.fail_sealed(handle);
            self.fail_after(handle, flight.after);
            return;
        }
        for id in flight.frames.drain(..) {
            let frame = self.cache.frame_mut(id);
            frame.in_rounds -= 1;
            frame.fresh = false;
            if planted::is(Bug::ChangesDuringRoundLost) {
                frame.dirty = false;
            }
        }
        self.frame_lists.push(flight.frames);
        let volume = self.volume_mut(handle);
        volume.durable_round = volume.durable_round.max(flight.round);
        volume.rounds_ended += 1;
        volume.durable_tree = flight.tree.unwrap_or(volume.durable_tree);
        self.retire_changes();
        self.release_unlinked(handle);
        self.wake_committing(handle);
        self.finish_after(handle, flight.after);
        if let Some(volume) = self.volume_if_open(handle)
            && (volume.commit_wanted || !volume.sealed.is_empty())
        {
            self.queue_round(handle);
        }
    }

    /// Lets requests go on whose round is durable, or that will never be.
    fn wake_committing(&mut self, handle: VolumeHandle) {
        let mut waiting = std::mem::take(&mut self.volume_mut(handle).committing);
        let durable = self.volume_mut(handle).durable_round;
        let latched = self.volume_mut(handle).latched.is_some();
        waiting.retain(|request| {
            let ready = latched || self.requests[*request].commit_round <= durable;
            if ready {
                self.runnable.push_back(crate::pipeline::Work::Request(*request));
            }
            !ready
        });
        self.volume_mut(handle).committing = waiting;
    }

    /// Stops the volume from changing anything on the device: what is there is unknown, and only
    /// detaching and recovering it makes it known again (DESIGN §4).
    pub(crate) fn latch(&mut self, handle: VolumeHandle, why: &str) {
        let volume = self.volumes[handle.0 as usize].as_mut().expect("the volume is open");
        if volume.latched.is_none() {
            tracing::error!(
                volume = volume.name,
                "{why}: the volume refuses writes and flushes, reads go on; check the device, then \
                 `bessel volume detach {name}` and `bessel volume attach {name}`",
                name = volume.name
            );
            volume.latched = Some(why.to_owned());
            volume.freeze_for_visitors();
            self.failures += 1;
            if !self.have_failed.contains(&volume.record.id) {
                self.have_failed.push(volume.record.id);
            }
            if let Some(journal) = &mut self.journal {
                journal.forget(volume.record.id);
            }
        }
        if let Some(flight) = &mut volume.flight {
            // What it would make reachable may not be durable.
            flight.failed.get_or_insert_with(|| why.to_owned());
        }
        // The nodes stay dirty, so that they are never evicted, but nobody waits for them any more.
        self.dirty_nodes -= volume.dirty.len();
        volume.lost.append(&mut volume.dirty);
        volume.dirty_since = None;
        self.retire_changes();
        self.wake_committing(handle);
        self.released = true;
        if planted::is(Bug::LatchNotKept) {
            self.volume_mut(handle).latched = None;
        }
    }

    pub(crate) fn fail_sealed(&mut self, handle: VolumeHandle) {
        while let Some(mut sealed) = self.volume_mut(handle).sealed.pop_front() {
            for (_, buffer) in sealed.images.into_iter().chain([sealed.record]).flatten() {
                self.sealed_images.put(buffer);
            }
            self.dirty_nodes -= sealed.frozen.len();
            let lost = &mut self.volume_mut(handle).lost;
            lost.append(&mut sealed.frozen);
            lost.extend(sealed.root);
            self.frame_lists.push(sealed.frozen);
            self.fail_after(handle, sealed.after);
        }
    }

    /// Takes a volume that nothing is under way in out of memory. What of it is not durable is lost;
    /// blocks that were unlinked or handed out for that leak, since the device may reach them. Forgets these
    /// nodes with it.
    pub(crate) fn forget_volume(
        &mut self,
        handle: VolumeHandle,
        mut nodes: Vec<FrameId>,
    ) -> HandedOver {
        self.release_all_unlinked(handle);
        let volume = self.volumes[handle.0 as usize].take().expect("the volume is open");
        self.releasing.retain(|releasing| *releasing != handle);
        assert!(volume.active_head == NO_REQUEST && volume.flight.is_none());
        assert!(!volume.log_loading, "a block of its log is being read");
        assert!(volume.sealed.is_empty() && volume.committing.is_empty());
        assert_eq!(
            volume.held,
            Held::default(),
            "a volume is closed that has something of its shard's"
        );
        assert!(volume.oldest_visitor().is_none(), "a volume is closed under visitors' requests");
        self.shared.retain(|shared| *shared != handle);
        self.watched.retain(|watched| *watched != handle);
        self.first_round = self.first_round.max(volume.next_round);
        self.cache.unpin(volume.root);
        self.dirty_nodes -= volume.dirty.len();
        nodes.extend(&volume.lost);
        nodes.extend(&volume.dirty);
        for unlinked in volume.unlinked.iter().filter(|it| it.kind == BlockKind::Metadata) {
            // Dropped from a tree that is no more: on the device it may be linked.
            let dropped = (0..u64::from(unlinked.run.count)).map(|at| unlinked.run.start.add(at));
            nodes.extend(dropped.filter_map(|node| self.cache.find(node)));
        }
        self.cache.forget(&nodes);
        if let Some(journal) = &mut self.journal {
            journal.forget(volume.record.id);
        }
        self.retire_changes();
        self.released = true;
        let counters = volume.all_counters();
        let Volume { slot, record, log, .. } = volume;
        HandedOver { slot, record, log, counters }
    }

    fn fail_after(&mut self, handle: VolumeHandle, after: After) {
        let ticket = match after {
            After::Nothing => return,
            After::Reply(ticket, _)
            | After::Snapshot { ticket, .. }
            | After::Create { ticket }
            | After::Grow { ticket }
            | After::Rename { ticket, .. }
            | After::Close { ticket } => ticket,
        };
        let volume = self.volume_mut(handle);
        let why = volume.latched.clone().unwrap_or_default();
        if matches!(after, After::Close { .. }) {
            volume.closing = false; // It stays, for all that is known.
        }
        if matches!(after, After::Create { .. }) {
            self.forget_volume(handle, Vec::new()); // Nobody has its handle.
        }
        self.reply(ticket, Reply::Failed(CommandError::Latched(why)));
    }
}
