//! Guest memory that is registered with a core's device, once for all queues of a guest.
//!
//! Registering pins pages, which spares the kernel that work for each request. Off unless the
//! operator asks for it: a page that the hypervisor takes from its guest and gives back (balloon,
//! free page reporting, memory unplug) is another page then, while the device goes on with the
//! pinned one, and the guest would silently read stale data. It also makes the kernel allocate every
//! page of the range and takes the polling thread's time, so the memory of large guests is left
//! unregistered.

use bessel_reactor::buffer::Segment;
use bessel_reactor::device::FileDevice;
use bessel_vhost::Queue;

/// Largest guest whose memory is registered. Pinning takes about a quarter of a second for each
/// GiB that the guest has not touched yet, and the core serves nobody meanwhile.
const GUEST_BYTES_MAX: u64 = 512 << 20;

/// One range and who uses it.
#[derive(Debug)]
struct Range {
    /// Address, to recognise it by.
    start: usize,
    length: usize,
    registration: u32,
    queues: u32,
}

/// The ranges registered with one device.
#[derive(Debug)]
pub(super) struct RegisteredMemory {
    wanted: bool,
    ranges: Vec<Range>,
}

impl RegisteredMemory {
    /// None yet; and none ever unless `wanted`.
    pub(super) fn new(wanted: bool) -> Self {
        Self { wanted, ranges: Vec::new() }
    }

    /// Registers the memory of a queue's guest, as far as that is possible.
    pub(super) fn attach(&mut self, queue: &mut Queue, device: &mut FileDevice) {
        if !self.wanted {
            return;
        }
        let segments: Vec<Segment> = queue.memory_ranges().collect();
        if segments.iter().map(|segment| segment.len() as u64).sum::<u64>() > GUEST_BYTES_MAX {
            return;
        }
        for (index, segment) in segments.iter().enumerate() {
            if let Some(registration) = self.take(segment, device) {
                queue.register_range(index, registration);
            }
        }
    }

    fn take(&mut self, segment: &Segment, device: &mut FileDevice) -> Option<u32> {
        let start = segment.as_ptr() as usize;
        let same = |range: &&mut Range| range.start == start && range.length == segment.len();
        if let Some(range) = self.ranges.iter_mut().find(same) {
            range.queues += 1;
            return Some(range.registration);
        }
        let registration = device.register_buffer(segment)?;
        self.ranges.push(Range { start, length: segment.len(), registration, queues: 1 });
        Some(registration)
    }

    /// Gives back what a drained queue had, and unregisters what nobody uses any more: the memory
    /// may be unmapped next, or be used by another core's device.
    pub(super) fn detach(&mut self, queue: &mut Queue, device: &mut FileDevice) {
        for segment in queue.memory_ranges() {
            let start = segment.as_ptr() as usize;
            let same = |range: &Range| range.start == start && range.length == segment.len();
            let Some(index) = self.ranges.iter().position(same) else { continue };
            self.ranges[index].queues -= 1;
            if self.ranges[index].queues == 0 {
                device.unregister_buffer(self.ranges.swap_remove(index).registration);
            }
        }
        queue.unregister_ranges();
    }
}
