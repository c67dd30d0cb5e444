//! Sealing: fixing what a command writes, as a round behind those that the volume has.

use bessel_reactor::buffer::Buffer;
use bessel_reactor::device::Device;
use bessel_reactor::units::BlockAddr;

use crate::commit::{After, Sealed, SealedImages};
use crate::nodes::cache::FrameId;
use crate::planted::{self, Bug};
use crate::request::{CurrentTree, VolumeHandle};
use crate::shard::Shard;

impl<D: Device> Shard<D> {
    /// Seals a round that makes `root`, already the volume's, reachable.
    pub(super) fn seal_root(
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
            let spare = self.frame_lists.pop().unwrap_or_default();
            let volume = self.volume_mut(handle);
            if planted::is(Bug::SnapshotLeavesDirty) {
                (round, spare)
            } else {
                volume.dirty_since = None;
                (round, std::mem::replace(&mut volume.dirty, spare))
            }
        } else {
            (volume.next_round - 1, self.frame_lists.pop().unwrap_or_default())
        };
        let frame = self.cache.frame_mut(root);
        frame.change_round = round;
        let record = self.next_record(handle);
        let named = &self.volume(handle).record;
        let tree = CurrentTree { root: named.root, height: named.height, parent: named.parent };
        let tree = Some(tree);
        let mut images = SealedImages::default();
        (images[0], images[1]) = (Some(image), log);
        let sealed = Sealed { round, frozen, root: Some(root), tree, images, record, after };
        self.push_sealed(handle, sealed);
    }

    /// Seals a round that only writes the record, log blocks, or both. A volume that is not published
    /// has no record to be written. It has no nodes, so it
    /// shares the number of the round before it.
    pub(super) fn seal_plain(
        &mut self,
        handle: VolumeHandle,
        images: SealedImages,
        with_record: bool,
        after: After,
    ) {
        let record = if with_record { self.next_record(handle) } else { None };
        let round = self.volume(handle).next_round - 1;
        let frozen = self.frame_lists.pop().unwrap_or_default();
        let (root, tree) = (None, None);
        self.push_sealed(handle, Sealed { round, frozen, root, tree, images, record, after });
    }

    pub(super) fn sealed_image(&mut self, fill: impl FnOnce(&mut [u8])) -> Buffer {
        let mut buffer = self.sealed_images.take().expect("`needs` made sure of it");
        fill(self.sealed_images.bytes_mut(&mut buffer));
        buffer
    }

    pub(super) fn node_image(&mut self, node: FrameId) -> (BlockAddr, Buffer) {
        let mut buffer = self.sealed_images.take().expect("`needs` made sure of it");
        let bytes = crate::format::node_as_bytes(self.cache.entries(node));
        self.sealed_images.bytes_mut(&mut buffer).copy_from_slice(bytes);
        (self.cache.frame(node).addr, buffer)
    }

    /// The volume's next record, and the slot it goes to; none while it is not published.
    fn next_record(&mut self, handle: VolumeHandle) -> Option<(BlockAddr, Buffer)> {
        let unpublished = self.volume(handle).unpublished;
        (!unpublished || planted::is(Bug::RecordedEarly)).then(|| self.record_image(handle))
    }

    fn record_image(&mut self, handle: VolumeHandle) -> (BlockAddr, Buffer) {
        let (secret, epoch) = (self.secret, self.epoch);
        let volume = self.volume_mut(handle);
        volume.record.generation += 1;
        volume.record.owner_epoch = epoch;
        let (slot, record) = (volume.slot, volume.record.clone());
        let live = planted::is(Bug::LiveSlotReused);
        let addr = self.geometry.registry_slot(slot, if live { 0 } else { record.generation });
        (addr, self.sealed_image(|out| record.encode_block(out, addr, secret)))
    }

    pub(super) fn log_image(&mut self, handle: VolumeHandle, sequence: u64) -> (BlockAddr, Buffer) {
        let secret = self.secret;
        let mut buffer = self.sealed_images.take().expect("`needs` made sure of it");
        let volume = self.volumes[handle.0 as usize].as_ref().expect("the volume is open");
        let addr = volume.log.block_of(sequence);
        let out = self.sealed_images.bytes_mut(&mut buffer);
        volume.log.image(out, sequence, secret);
        (addr, buffer)
    }
}
