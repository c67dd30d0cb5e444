//! Reading the snapshot logs of open volumes in the background.
//!
//! A volume is opened with the newest block of its log. The others are read behind the guests' backs,
//! newest first since each names the one before it: one read at a time for a volume, few for the shard,
//! volumes in turn. When all has been read, all this costs a look at an empty queue.
//!
//! Nobody changes what has not been read: whoever wants to waits for it (`control.rs`). So a block is
//! read as the last life left it.

use std::collections::VecDeque;

use bessel_reactor::buffer::{Buffer, BufferPool};
use bessel_reactor::device::{Device, DeviceError};
use bessel_reactor::units::BLOCK_SIZE;

use crate::request::VolumeHandle;
use crate::shard::{Shard, TokenKind};
use crate::slab::Slab;

/// Log blocks being read at once, by one shard. To take one in costs some microseconds, and all that have
/// come are taken in in one turn.
pub(crate) const LOG_LOADS_MAX: usize = 4;

/// A block being read.
#[derive(Debug)]
struct Load {
    volume: VolumeHandle,
    buffer: Buffer,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct LogLoads {
    /// Volumes of which there is something to read.
    queue: VecDeque<VolumeHandle>,
    buffers: BufferPool,
    loads: Slab<Load>,
    stopped: bool,
}

impl LogLoads {
    pub(crate) fn new() -> Self {
        Self {
            queue: VecDeque::new(),
            buffers: BufferPool::new(LOG_LOADS_MAX, BLOCK_SIZE as usize),
            loads: Slab::new(LOG_LOADS_MAX),
            stopped: false,
        }
    }

    /// Begins no more reads: the shard shuts down. True when none is under way.
    pub(crate) fn stop(&mut self) -> bool {
        self.stopped = true;
        self.loads.is_empty()
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped
    }
}

impl<D: Device> Shard<D> {
    /// Has the log of a volume that was just opened read.
    pub(crate) fn load_log(&mut self, handle: VolumeHandle) {
        if self.volume(handle).log.wanted().is_some() {
            self.log_loads.queue.push_back(handle);
        }
    }

    /// Begins what reads can be begun.
    pub(crate) fn start_log_loads(&mut self) {
        if self.log_loads.queue.is_empty() || self.log_loads.stopped {
            return;
        }
        for _ in 0..self.log_loads.queue.len().min(LOG_LOADS_MAX) {
            if self.log_loads.loads.is_full() {
                return;
            }
            let Some(handle) = self.log_loads.queue.pop_front() else { return };
            let Some(volume) = self.volume_if_open(handle) else { continue };
            let Some(addr) = volume.log.wanted().filter(|_| !volume.log_loading) else { continue };
            if volume.closing {
                self.log_loads.queue.push_back(handle); // It may stay.
                continue;
            }
            volume.log_loading = true;
            let loads = &mut self.log_loads;
            let buffer = loads.buffers.take().expect("there are as many as loads");
            let segment = loads.buffers.lend(&buffer);
            let load = loads.loads.insert(Load { volume: handle, buffer });
            self.device.read(TokenKind::Log.token(load), addr.offset(), &[segment]);
        }
    }

    /// Takes in a block that has been read.
    pub(crate) fn log_loaded(&mut self, load: u32, result: Result<(), DeviceError>) {
        let Self { log_loads, volumes, extents, secret, .. } = self;
        let Load { volume: handle, buffer } = log_loads.loads.remove(load);
        log_loads.buffers.returned(&buffer);
        let volume = volumes[handle.0 as usize].as_mut();
        let volume = volume.expect("a volume is not closed while its log is being read");
        volume.log_loading = false;
        let read = result.map(|()| log_loads.buffers.bytes(&buffer));
        volume.log.take(read, *secret, extents);
        log_loads.buffers.put(buffer);
        if volume.log.wanted().is_some() {
            log_loads.queue.push_back(handle);
        } else if let Some(why) = volume.log.state().fault {
            tracing::error!(
                volume = volume.name,
                "{why}: snapshots before {}.{} cannot be read; guests go on, and so do newer snapshots; \
                 run `bessel check`",
                volume.record.id,
                volume.log.state().out_of_reach
            );
        }
    }
}
