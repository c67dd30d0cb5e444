//! Carries a volume's queues between its vhost server and the reactors that poll them: the volume's home,
//! and others that serve some of its queues. From one home to another, too.

use super::port::{CoreMessage, CorePort, QueueSlot, Start};
use bessel_mapping::request::{CacheChooser, CacheMode, Command, Reply, VolumeHandle};
use bessel_vhost::{Connection, Queue, QueueHost};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Mutex, MutexGuard};

/// One volume, as its vhost server sees it. Control path.
pub(crate) struct VolumeHost {
    /// For log lines. A volume that is renamed keeps the name it was opened with here.
    name: String,
    connected: AtomicBool,
    /// Held while queues are started and stopped: one operation on them after the other.
    seat: Mutex<Seat>,
}

/// A reactor that serves queues of a volume, and what the volume is called there.
#[derive(Clone)]
pub(crate) struct Way {
    pub(crate) volume: VolumeHandle,
    pub(crate) port: CorePort,
}

/// Where a volume's queues are polled.
struct Seat {
    /// The volume's home first. None when it is open nowhere any more; its server is about to end then.
    ways: Vec<Way>,
    /// Where each queue is that the server has started.
    queues: Vec<Place>,
}

/// Where a queue is.
enum Place {
    /// With the server, which has not started it.
    Server,
    /// On a core: on which of the ways, and where there.
    Core(usize, QueueSlot),
    /// Here: it is started, and polled nowhere.
    Here(Box<Queue>),
}

/// A volume's queues, taken off their cores with none of their requests in flight. The server starts and
/// stops none meanwhile, but waits. When this is dropped before they have cores again, they have none, and
/// the server may only take them back.
pub(crate) struct TakenQueues<'a> {
    seat: MutexGuard<'a, Seat>,
    settled: bool,
}

impl VolumeHost {
    /// Its home is the first of `ways`.
    pub(crate) fn new(name: &str, ways: Vec<Way>, queues: u16) -> Self {
        let queues = (0..queues).map(|_| Place::Server).collect();
        Self {
            name: name.to_owned(),
            connected: AtomicBool::new(false),
            seat: Mutex::new(Seat { ways, queues }),
        }
    }

    /// A front-end is connected.
    pub(crate) fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Acquire)
    }

    fn seat(&self) -> MutexGuard<'_, Seat> {
        self.seat.lock().expect("no holder of this lock panics")
    }

    /// Has no queue popped from, waits until all that was popped has ended, runs `operation`, and lets all
    /// go on.
    pub(crate) fn hold<T>(&self, operation: impl FnOnce() -> T) -> T {
        let ways = self.seat().ways.clone();
        let holding = ways.iter().map(|Way { volume, port }| {
            let (answer, held) = sync_channel(1);
            port.send(CoreMessage::Hold { volume: *volume, answer });
            held
        });
        for held in holding.collect::<Vec<_>>() {
            held.recv().expect("a reactor answers every message before it ends");
        }
        let done = operation();
        for Way { volume, port } in &ways {
            port.send(CoreMessage::Release { volume: *volume });
        }
        done
    }

    /// Takes all queues off their cores, once what they have in flight has ended. Their guests' requests
    /// wait in the rings.
    pub(crate) fn take_queues(&self) -> TakenQueues<'_> {
        let mut seat = self.seat();
        let Seat { ways, queues } = &mut *seat;
        // All are told before the first is waited for.
        let stopping = queues.iter_mut().filter_map(|place| match place {
            Place::Core(way, slot) => {
                let (answer, stopped) = sync_channel(1);
                ways[*way].port.send(CoreMessage::Stop { slot: *slot, answer });
                Some((place, stopped))
            }
            Place::Server | Place::Here(_) => None,
        });
        for (place, stopped) in stopping.collect::<Vec<_>>() {
            let queue = stopped.recv();
            let queue = queue.expect("a reactor answers every message before it ends");
            *place = Place::Here(Box::new(queue));
        }
        TakenQueues { seat, settled: false }
    }
}

impl TakenQueues<'_> {
    /// Has them polled, and those that the server starts from now on, on these ways, the first of which is
    /// the volume's home.
    pub(crate) fn settle(mut self, ways: Vec<Way>) {
        for (index, place) in self.seat.queues.iter_mut().enumerate() {
            *place = match std::mem::replace(place, Place::Server) {
                Place::Here(queue) => start(&ways, index, *queue),
                other => other,
            };
        }
        self.seat.ways = ways;
        self.settled = true;
    }
}

impl Drop for TakenQueues<'_> {
    fn drop(&mut self) {
        if !self.settled {
            self.seat.ways.clear();
        }
    }
}

/// Queues take turns at the ways: the first is at home, so that a guest with one is served there alone.
fn start(ways: &[Way], index: usize, queue: Queue) -> Place {
    let at = index % ways.len();
    let Way { volume, port } = &ways[at];
    let volume = *volume;
    let slot = port.ask(|answer| CoreMessage::Start(Box::new(Start { queue, volume, answer })));
    Place::Core(at, slot)
}

impl QueueHost for VolumeHost {
    fn start(&self, index: usize, queue: Queue) {
        let mut seat = self.seat();
        seat.queues[index] = match &seat.ways[..] {
            [] => Place::Here(Box::new(queue)),
            ways => start(ways, index, queue),
        };
    }

    fn stop(&self, index: usize) -> Queue {
        let mut seat = self.seat();
        match std::mem::replace(&mut seat.queues[index], Place::Server) {
            Place::Core(way, slot) => {
                seat.ways[way].port.ask(|answer| CoreMessage::Stop { slot, answer })
            }
            Place::Here(queue) => *queue,
            Place::Server => panic!("only a queue that was started is stopped"),
        }
    }

    fn set_cache(&self, writeback: bool) {
        let cache = if writeback { CacheMode::Writeback } else { CacheMode::Writethrough };
        let seat = self.seat();
        let Some(Way { volume, port }) = seat.ways.first() else { return };
        let command = Command::SetCache { volume: *volume, cache, by: CacheChooser::Guest };
        if let Reply::Failed(error) = port.command(command).reply {
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
