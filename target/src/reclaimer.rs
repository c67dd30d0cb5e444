//! The thread that frees what deleted snapshots alone held, one snapshot after the other.
//!
//! It reads the store by a device of its own and asks the reactors for the rest by message, so neither
//! guests nor the control plane wait for it. What it does not come to, because the daemon stops or
//! something fails, the collector finds.

use crate::api::types::ReclaimView;
use crate::attach::CorePort;
use crate::one_line;
use bessel_mapping::blocking::Blocking;
use bessel_mapping::reclaim::{Next, Reclaim, ReclaimPlan, Reclaimed};
use bessel_mapping::request::{Command, SnapshotId};
use bessel_mapping::store::OpenedStore;
use bessel_reactor::device::{FileDevice, OpenOptions};
use bessel_reactor::units::ByteCount;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

/// What the thread and the control plane share.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// Snapshots whose blocks are to be freed and have not been.
    waiting: Mutex<BTreeSet<SnapshotId>>,
    blocks: AtomicU64,
    snapshots: AtomicU64,
    given_up: AtomicU64,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, BTreeSet<SnapshotId>> {
        self.waiting.lock().expect("no holder of this lock panics")
    }
}

/// See the module's documentation. Dropping it stops the thread after what it is doing.
pub(crate) struct Reclaimer {
    shared: Arc<Shared>,
    plans: Option<Sender<ReclaimPlan>>,
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
        let (plans, inbox) = channel();
        let worker = Worker { shared: Arc::clone(&shared), store, path, device: None, ports };
        let thread = std::thread::Builder::new()
            .name("bessel-reclaim".to_owned())
            .spawn(move || worker.run(&inbox));
        let thread = thread
            .inspect_err(|error| tracing::error!("cannot start the thread that frees: {error}"))
            .ok();
        Self { shared, plans: Some(plans), thread }
    }

    /// Takes a plan; it will be carried out after those before it.
    pub(crate) fn push(&self, plan: ReclaimPlan) {
        let snapshot = plan.snapshot;
        self.shared.waiting().insert(snapshot);
        let sent = self.plans.as_ref().is_some_and(|plans| plans.send(plan).is_ok());
        if !sent {
            self.shared.waiting().remove(&snapshot);
            self.leave();
        }
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
        self.plans = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that frees had panicked");
        }
    }
}

impl Worker {
    fn run(mut self, plans: &Receiver<ReclaimPlan>) {
        for plan in plans {
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

    fn reclaim(&mut self, plan: ReclaimPlan) -> Result<Reclaimed, String> {
        let mut job = Reclaim::new(&self.store, plan).map_err(|error| one_line(&error))?;
        if self.device.is_none() {
            let options = OpenOptions { depth: 64, read_only: true, ..OpenOptions::default() };
            let device = FileDevice::open(&self.path, &options);
            self.device = Some(device.map_err(|error| one_line(&error))?);
        }
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
