//! Carries a volume's queues between its vhost server and its home reactor.

use super::port::{CoreMessage, CorePort, QueueSlot, Start};
use bessel_mapping::request::{CacheChooser, CacheMode, Command, Reply, VolumeHandle};
use bessel_vhost::{Connection, Queue, QueueHost};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

/// One volume, as its vhost server sees it. Control path.
pub(crate) struct VolumeHost {
    /// For log lines. A volume that is renamed keeps the name it was opened with here.
    name: String,
    volume: VolumeHandle,
    home: CorePort,
    connected: AtomicBool,
    /// Where each queue that runs is on its core.
    slots: Mutex<Vec<Option<QueueSlot>>>,
}

impl VolumeHost {
    pub(crate) fn new(name: &str, volume: VolumeHandle, home: CorePort, queues: u16) -> Self {
        Self {
            name: name.to_owned(),
            volume,
            home,
            connected: AtomicBool::new(false),
            slots: Mutex::new(vec![None; usize::from(queues)]),
        }
    }

    /// A front-end is connected.
    pub(crate) fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Acquire)
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Option<QueueSlot>>> {
        self.slots.lock().expect("no holder of this lock panics")
    }
}

impl QueueHost for VolumeHost {
    fn start(&self, index: usize, queue: Queue) {
        let volume = self.volume;
        let slot =
            self.home.ask(|answer| CoreMessage::Start(Box::new(Start { queue, volume, answer })));
        self.slots()[index] = Some(slot);
    }

    fn stop(&self, index: usize) -> Queue {
        let slot = self.slots()[index].take().expect("only a queue that was started is stopped");
        self.home.ask(|answer| CoreMessage::Stop { slot, answer })
    }

    fn set_cache(&self, writeback: bool) {
        let cache = if writeback { CacheMode::Writeback } else { CacheMode::Writethrough };
        let command = Command::SetCache { volume: self.volume, cache, by: CacheChooser::Guest };
        if let Reply::Failed(error) = self.home.command(command).reply {
            tracing::error!(volume = self.name, "cannot switch the cache mode: {error}");
        }
    }

    fn connected(&self, _: Connection) {
        self.connected.store(true, Ordering::Release);
    }

    fn disconnected(&self) {
        self.connected.store(false, Ordering::Release);
    }
}
