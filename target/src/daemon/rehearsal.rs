//! A daemon without its sockets and signals, on a small store of its own: what the fuzz target of
//! the API speaks to.

use super::{Control, Journals, Life, Reactors, control_plane, restore_volumes, take_device};
use crate::config::Config;
use crate::control::ControlThread;
use crate::entropy;
use crate::scheduler::{self, Scheduler};
use bessel_mapping::store::{self, OpenMode};
use bessel_reactor::clock::SystemClock;
use bessel_reactor::device::DeviceLock;
use bessel_reactor::reactor::ReactorHandle;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// See the module's documentation. Ends in order, and leaves nothing, when it is dropped.
pub(crate) struct Rehearsal {
    directory: PathBuf,
    /// None once it ends.
    running: Option<Running>,
}

struct Running {
    control: Control,
    scheduler: Scheduler,
    thread: ControlThread,
    reactors: Vec<ReactorHandle>,
    life: Life,
    _lock: DeviceLock,
}

impl Rehearsal {
    /// Starts one in a directory that nobody else has.
    ///
    /// # Panics
    /// When this machine cannot run the daemon at all.
    pub(crate) fn start() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let shared = Path::new("/dev/shm");
        let base = if shared.is_dir() { shared.to_owned() } else { std::env::temp_dir() };
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = base.join(format!("bessel-fuzz-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a directory of our own");
        let running = Some(Running::start(&directory));
        Self { directory, running }
    }

    /// Speaks to its control plane.
    pub(crate) fn control(&self) -> Control {
        self.running.as_ref().expect("it runs until it is dropped").control.clone()
    }
}

impl Running {
    fn start(directory: &Path) -> Self {
        let place = directory.display();
        let text = format!(
            "store:\n  device: {place}/store.img\n  size: 4GiB\n  node_cache: 4MiB\n\
             api:\n  socket: {place}/api.sock\n"
        );
        let config =
            Config::parse(Path::new("rehearsal.yaml"), text).expect("a good configuration");
        let clock = SystemClock::start();
        let (lock, mut device) = take_device(&config, &clock).expect("a file of our own");
        let opened = store::open(&mut device, OpenMode::ReadWrite { time: clock.wall() });
        let store = Arc::new(opened.expect("it was just made"));
        let life = entropy::read().expect("random numbers").uuid;
        let journals = Journals::find(directory, &store, life).expect("a readable directory");
        let mut life = Life { device, store: Arc::clone(&store), clock, journals, host: None };
        let reactors = Reactors::start(&config, &store, clock, &mut life.journals);
        let Reactors { homes, handles } = reactors.expect("a core and a ring");
        let (schedules, seat) = scheduler::schedules();
        let mut plane = control_plane(&config, &life, homes, schedules.clone());
        restore_volumes(&config, &mut plane, &mut life).expect("nothing is to be restored");
        let (control, thread) = Control::start(plane).expect("a thread");
        let scheduler = Scheduler::start(schedules, seat, control.clone(), clock);
        let scheduler = scheduler.expect("a thread");
        Self { control, scheduler, thread, reactors: handles, life, _lock: lock }
    }
}

impl Drop for Rehearsal {
    fn drop(&mut self) {
        if let Some(Running { control, scheduler, thread, reactors, life, _lock }) =
            self.running.take()
        {
            drop((control, scheduler));
            thread.join().shut_down();
            reactors.into_iter().for_each(ReactorHandle::join);
            life.end();
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}
