//! The thread that frees: what deleted snapshots alone held, one snapshot after the other, and
//! collections. One of these at a time: each rests on nobody else freeing anything.
//!
//! It reads the store by a device of its own and asks the reactors for the rest by message, so neither
//! guests nor the control plane wait for it. What it does not come to, because the daemon stops or
//! something fails, the next collection finds.

mod collecting;

use crate::api::types::{GcTrigger, GcView, ReclaimView};
use crate::attach::CorePort;
use crate::one_line;
use bessel_mapping::blocking::Blocking;
use bessel_mapping::forest::Tree;
use bessel_mapping::reclaim::{Next, Reclaim, ReclaimPlan, Reclaimed};
use bessel_mapping::request::{Command, SnapshotId};
use bessel_mapping::store::OpenedStore;
use bessel_reactor::clock::WallTime;
use bessel_reactor::device::{FileDevice, OpenOptions};
use bessel_reactor::units::ByteCount;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

pub(crate) use collecting::Order;
use collecting::Status;

/// What the thread is asked for.
enum Job {
    Reclaim(ReclaimPlan),
    Collect(Order),
}

/// What the thread and the control plane share.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// Snapshots whose blocks are to be freed and have not been, with the trees that this needs.
    waiting: Mutex<BTreeMap<SnapshotId, Vec<Tree>>>,
    blocks: AtomicU64,
    snapshots: AtomicU64,
    given_up: AtomicU64,
    gc: Mutex<Status>,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, BTreeMap<SnapshotId, Vec<Tree>>> {
        self.waiting.lock().expect("no holder of this lock panics")
    }

    fn gc(&self) -> MutexGuard<'_, Status> {
        self.gc.lock().expect("no holder of this lock panics")
    }
}

/// Ends what the thread is doing, from wherever.
#[derive(Clone)]
pub(crate) struct Stopper(Arc<Shared>);

impl Stopper {
    /// The thread does nothing more, and ends what it is doing.
    pub(crate) fn stop(&self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}

/// See the module's documentation. Dropping it stops the thread after what it is doing.
pub(crate) struct Reclaimer {
    shared: Arc<Shared>,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread works with.
struct Worker {
    shared: Arc<Shared>,
    store: Arc<OpenedStore>,
    path: PathBuf,
    device: Option<FileDevice>,
    ports: Vec<CorePort>,
}

impl Reclaimer {
    /// Over the store at `path`, whose shards are behind these ports. When the system has no thread
    /// for it, everything is left to the collector.
    pub(crate) fn start(store: Arc<OpenedStore>, path: PathBuf, ports: Vec<CorePort>) -> Self {
        let shared = Arc::<Shared>::default();
        let (jobs, inbox) = channel();
        let worker = Worker { shared: Arc::clone(&shared), store, path, device: None, ports };
        let thread = std::thread::Builder::new()
            .name("bessel-reclaim".to_owned())
            .spawn(move || worker.run(&inbox));
        let thread = thread
            .inspect_err(|error| tracing::error!("cannot start the thread that frees: {error}"))
            .ok();
        Self { shared, jobs: Some(jobs), thread }
    }

    /// Takes a plan; it will be carried out after those before it.
    pub(crate) fn push(&self, plan: ReclaimPlan) {
        let snapshot = plan.snapshot;
        self.shared.waiting().insert(snapshot, plan.trees().collect());
        let job = Job::Reclaim(plan);
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        if !sent {
            self.shared.waiting().remove(&snapshot);
            self.leave();
        }
    }

    /// The trees that the snapshots that wait are and will be compared with.
    pub(crate) fn trees_waiting(&self) -> Vec<Tree> {
        let mut trees: Vec<Tree> = self.shared.waiting().values().flatten().copied().collect();
        trees.sort_unstable_by_key(|tree| tree.root);
        trees.dedup();
        trees
    }

    /// Has the store collected, after what waits by now. False when that was asked for before and has
    /// not ended.
    pub(crate) fn collect(&self, order: Order) -> bool {
        let now: WallTime = order.clock.wall();
        let trigger: GcTrigger = order.trigger;
        if !self.shared.gc().ask(trigger, now) {
            return false;
        }
        // Without its thread, which the system refused, it never ends; the log has said so.
        self.jobs.as_ref().is_some_and(|jobs| jobs.send(Job::Collect(order)).is_ok())
    }

    /// Ends the collection under way; false when there is none.
    pub(crate) fn end_collection(&self) -> bool {
        self.shared.gc().cancel()
    }

    /// True when a collection is under way or waits.
    pub(crate) fn is_collecting(&self) -> bool {
        self.shared.gc().is_under_way()
    }

    /// What is known of collections.
    pub(crate) fn gc(&self) -> GcView {
        self.shared.gc().view()
    }

    pub(crate) fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// A snapshot is left to the collector.
    pub(crate) fn leave(&self) {
        self.shared.given_up.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn counters(&self) -> ReclaimView {
        let shared = &self.shared;
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        // The others are counted before a snapshot ceases to wait.
        let waiting = shared.waiting().len() as u64;
        ReclaimView {
            snapshots: of(&shared.snapshots),
            left_to_collector: of(&shared.given_up),
            waiting,
            freed_bytes: ByteCount::from_blocks(of(&shared.blocks)).get(),
        }
    }
}

impl Drop for Reclaimer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that frees had panicked");
        }
    }
}

impl Worker {
    fn run(mut self, jobs: &Receiver<Job>) {
        collecting::go_last();
        for job in jobs {
            let plan = match job {
                Job::Reclaim(plan) => plan,
                Job::Collect(order) => {
                    self.collect(order);
                    continue;
                }
            };
            let snapshot = plan.snapshot;
            match self.reclaim(plan) {
                Ok(Reclaimed { data, nodes, nodes_read }) => {
                    self.shared.snapshots.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!(%snapshot, data, nodes, nodes_read, "freed");
                }
                Err(why) => {
                    self.shared.given_up.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(%snapshot, "its space is left to the collector: {why}");
                }
            }
            self.shared.waiting().remove(&snapshot);
        }
    }

    fn open_device(&mut self) -> Result<(), String> {
        if self.device.is_none() {
            let options = OpenOptions { depth: 64, read_only: true, ..OpenOptions::default() };
            let device = FileDevice::open(&self.path, &options);
            self.device = Some(device.map_err(|error| one_line(&error))?);
        }
        Ok(())
    }

    fn reclaim(&mut self, plan: ReclaimPlan) -> Result<Reclaimed, String> {
        let mut job = Reclaim::new(&self.store, plan).map_err(|error| one_line(&error))?;
        self.open_device()?;
        let device = self.device.as_mut().expect("it was just opened");
        let mut io = Blocking::new(device);
        loop {
            if self.shared.stop.load(Ordering::Relaxed) {
                return Err("the daemon stops".to_owned());
            }
            let (ports, command): (&[CorePort], Command) = match job.next() {
                Next::Read => {
                    job.read(&mut io).map_err(|error| one_line(&error))?;
                    continue;
                }
                Next::Done(reclaimed) => return Ok(reclaimed),
                Next::AskAll(command) => (&self.ports, command),
                Next::AskAuthority(command) => (&self.ports[..1], command),
            };
            let freed = match &command {
                Command::Free { runs } => runs.iter().map(|run| u64::from(run.count)).sum(),
                _ => 0,
            };
            let replies: Vec<_> =
                ports.iter().map(|port| port.command(command.clone()).reply).collect();
            job.answered(replies).map_err(|error| one_line(&error))?;
            self.shared.blocks.fetch_add(freed, Ordering::Relaxed);
        }
    }
}
