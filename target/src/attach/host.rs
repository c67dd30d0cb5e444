//! Carries a volume's queues between its vhost server and its home reactor, and from one home to another.

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

/// Where a volume's queues are polled.
struct Seat {
    /// The volume on its home; none when it is open nowhere any more. Its server is about to end then.
    home: Option<(VolumeHandle, CorePort)>,
    /// Where each queue is that the server has started.
    queues: Vec<Place>,
}

/// Where a queue is.
enum Place {
    /// With the server, which has not started it.
    Server,
    /// On the home's core.
    Core(QueueSlot),
    /// Here: it is started, and polled nowhere.
    Here(Box<Queue>),
}

/// A volume's queues, taken off their core with none of their requests in flight. The server starts and
/// stops none meanwhile, but waits. When this is dropped before they have a core again, they have none, and
/// the server may only take them back.
pub(crate) struct TakenQueues<'a> {
    seat: MutexGuard<'a, Seat>,
    settled: bool,
}

impl VolumeHost {
    pub(crate) fn new(name: &str, volume: VolumeHandle, home: CorePort, queues: u16) -> Self {
        let queues = (0..queues).map(|_| Place::Server).collect();
        Self {
            name: name.to_owned(),
            connected: AtomicBool::new(false),
            seat: Mutex::new(Seat { home: Some((volume, home)), queues }),
        }
    }

    /// A front-end is connected.
    pub(crate) fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Acquire)
    }

    fn seat(&self) -> MutexGuard<'_, Seat> {
        self.seat.lock().expect("no holder of this lock panics")
    }

    /// Takes all queues off their core, once what they have in flight has ended. Their guests' requests
    /// wait in the rings.
    pub(crate) fn take_queues(&self) -> TakenQueues<'_> {
        let mut seat = self.seat();
        let Seat { home, queues } = &mut *seat;
        if let Some((_, core)) = home {
            // All are told before the first is waited for.
            let stopping = queues.iter_mut().filter_map(|place| match place {
                Place::Core(slot) => {
                    let (answer, stopped) = sync_channel(1);
                    core.send(CoreMessage::Stop { slot: *slot, answer });
                    Some((place, stopped))
                }
                Place::Server | Place::Here(_) => None,
            });
            for (place, stopped) in stopping.collect::<Vec<_>>() {
                let queue = stopped.recv();
                let queue = queue.expect("a reactor answers every message before it ends");
                *place = Place::Here(Box::new(queue));
            }
        }
        TakenQueues { seat, settled: false }
    }
}

impl TakenQueues<'_> {
    /// Has them polled, and those that the server starts from now on, at the volume's home.
    pub(crate) fn settle(mut self, volume: VolumeHandle, home: CorePort) {
        for place in &mut self.seat.queues {
            *place = match std::mem::replace(place, Place::Server) {
                Place::Here(queue) => Place::Core(start(&home, volume, *queue)),
                other => other,
            };
        }
        self.seat.home = Some((volume, home));
        self.settled = true;
    }
}

impl Drop for TakenQueues<'_> {
    fn drop(&mut self) {
        if !self.settled {
            self.seat.home = None;
        }
    }
}

fn start(home: &CorePort, volume: VolumeHandle, queue: Queue) -> QueueSlot {
    home.ask(|answer| CoreMessage::Start(Box::new(Start { queue, volume, answer })))
}

impl QueueHost for VolumeHost {
    fn start(&self, index: usize, queue: Queue) {
        let mut seat = self.seat();
        seat.queues[index] = match &seat.home {
            Some((volume, home)) => Place::Core(start(home, *volume, queue)),
            None => Place::Here(Box::new(queue)),
        };
    }

    fn stop(&self, index: usize) -> Queue {
        let mut seat = self.seat();
        match std::mem::replace(&mut seat.queues[index], Place::Server) {
            Place::Core(slot) => {
                let (_, home) = seat.home.as_ref().expect("a queue on a core has a home");
                home.ask(|answer| CoreMessage::Stop { slot, answer })
            }
            Place::Here(queue) => *queue,
            Place::Server => panic!("only a queue that was started is stopped"),
        }
    }

    fn set_cache(&self, writeback: bool) {
        let cache = if writeback { CacheMode::Writeback } else { CacheMode::Writethrough };
        let seat = self.seat();
        let Some((volume, home)) = &seat.home else { return };
        let command = Command::SetCache { volume: *volume, cache, by: CacheChooser::Guest };
        if let Reply::Failed(error) = home.command(command).reply {
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
