//! `bessel serve`: start-up and shutdown in order.
//!
//! Whatever can be refused is refused before anything is touched, and on the way up each step has
//! its counterpart on the way down, also when a later step fails:
//!
//! ```text
//! configuration, device, cores ── look only
//! lock the device              ── dropped last
//! sockets                      ── look only
//! make and format the file     ── only if there was none
//! open the store               ── mark it closed
//! reactors                     ── commit, give claims back, end
//! volumes and their sockets    ── drop front-ends, drain queues
//! API                          ── stop
//! ```
//!
//! A daemon that is killed instead leaves a store that opens all the same, and guests whose
//! front-ends reconnect.

use crate::api::{ApiServer, RefusalKind};
use crate::attach::{Core, CoreCounters, CoreMessage, CorePort, CoreSeat};
use crate::cli::{Outcome, output};
use crate::config::{Config, ConfigError, IoPoll, Medium, Poll, QUEUES_DEFAULT, Spread};
use crate::control::Control;
use crate::journals::Journals;
use crate::plane::{ControlPlane, Home, Service, StoreFacts, Upkeep};
use crate::scheduler::{Scheduler, Schedules, Seat};
use crate::{entropy, one_line, scheduler};
use bessel_mapping::format::HostRecord;
use bessel_mapping::shard::{Shard, ShardConfig, is_data};
use bessel_mapping::store::{self, FormatOptions, OpenMode, OpenedStore};
use bessel_reactor::clock::SystemClock;
use bessel_reactor::device::{DeviceError, DeviceLock, FileDevice, OpenError, OpenOptions, Token};
use bessel_reactor::inbox::{Inbox, Sender, inbox};
use bessel_reactor::reactor::{
    PollMode, ReactorHandle, ReactorOptions, SpawnError, spawn, usable_cores,
};
use bessel_reactor::units::ByteCount;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::io::IsTerminal as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

#[cfg(any(test, feature = "fuzz"))]
mod rehearsal;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) use rehearsal::Rehearsal;

/// Guest requests in a shard at once. Some deep queues' worth; more wait in their rings.
const REQUESTS_PER_SHARD: usize = 1024;
/// Messages an inbox holds. A volume's control thread has one on its way at most, a shard a few, or one for
/// each request that it cannot do itself of a volume that is open elsewhere. More wait where they are.
const INBOX_MESSAGES: usize = 1024;
/// Of the memory for radix nodes, one part in so many more is taken for what reactors show each other of
/// volumes whose queues they share: a leaf of those is in both.
const SHARED_PART: u64 = 4;

/// Serves what the configuration says until SIGTERM or SIGINT.
pub(crate) fn serve(file: &Path) -> Outcome {
    start_log();
    raise_descriptor_limit();
    let mut config = Config::read(file)?;
    let _memory = config.make_memory()?;
    config.check_machine()?;
    // Blocked before any thread starts, so that all of them inherit it and only `wait` sees these.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block()?;

    let clock = SystemClock::start();
    let (_lock, mut device) = take_device(&config, &clock)?;
    let store = store::open(&mut device, OpenMode::ReadWrite { time: clock.wall() })
        .map_err(|error| config.device_error(one_line(&error)))?;
    report_state(&store);
    let store = Arc::new(store);

    let random = entropy::read().map_err(|error| {
        config.device_error(format!("cannot read random numbers to name this life: {error}"))
    })?;
    let journals = Journals::find(config.socket_directory(), &store, random.uuid);
    let journals = journals.map_err(|error| {
        let directory = config.socket_directory().display();
        config.device_error(format!("cannot look for journals in {directory}: {error}"))
    })?;

    let mut life = Life { device, store, clock, journals, host: None };
    let served = serve_store(&config, &mut life, &signals);
    // Also after a failure: everything that ran has ended by now.
    life.end();
    served
}

/// One life of the daemon on an open store.
struct Life {
    device: FileDevice,
    store: Arc<OpenedStore>,
    clock: SystemClock,
    journals: Journals,
    /// The host's record since guests may be served.
    host: Option<HostRecord>,
}

impl Life {
    /// From here on this life's journals count and those of the one before do not. Everything that
    /// was outstanding is durable, or carried.
    fn begin(&mut self) -> Result<(), DeviceError> {
        let (life, time) = (self.journals.life(), self.clock.wall());
        self.host = Some(store::begin_life(&mut self.device, &self.store, life, time)?);
        self.journals.forget_found();
        Ok(())
    }

    /// Everything has ended and is durable. A life that has not begun leaves the store as it found
    /// it, with what the one before it left to be done.
    fn end(mut self) {
        self.journals.forget_made();
        let nothing_left = match &self.host {
            Some(_) => !self.journals.carries(),
            None => self.store.was_clean,
        };
        let host = self.host.as_ref().or(self.store.host.as_ref());
        if let Some(host) = host.filter(|_| nothing_left)
            && let Err(error) = store::close(&mut self.device, &self.store, host, self.clock.wall())
        {
            tracing::error!("the store could not be marked as closed: {error}");
        }
    }
}

fn control_plane(
    config: &Config,
    life: &Life,
    homes: Vec<Home>,
    schedules: Schedules,
) -> ControlPlane {
    let store = &life.store;
    let facts = StoreFacts {
        device: config.store.device.clone(),
        name: config.store_name(),
        uuid: store.superblock.uuid,
        geometry: store.geometry,
        extents: store.extents.clone(),
        opened: Arc::clone(store),
    };
    let api = config.api.socket.clone();
    let (balance, spread) = (config.reactors.balance, config.reactors.spread);
    let upkeep = Upkeep { gc: config.gc, balance, spread };
    ControlPlane::new(store.directory.clone(), homes, schedules, facts, upkeep, api, life.clock)
}

/// Runs reactors, volumes and API over an open store, and has all of them ended when it returns.
fn serve_store(config: &Config, life: &mut Life, signals: &SigSet) -> Outcome {
    let (store, clock) = (Arc::clone(&life.store), life.clock);
    let reactors = Reactors::start(config, &store, clock, &mut life.journals)?;
    if !config.store.medium.outlives_the_daemon() {
        life.journals.forget_made(); // Nobody will come to look for them.
    }
    let Reactors { homes, handles } = reactors;
    let (schedules, seat) = scheduler::schedules();
    let mut plane = control_plane(config, life, homes, schedules.clone());
    let opened =
        restore_volumes(config, &mut plane, life).and_then(|()| open_volumes(config, &mut plane));
    let served = match opened {
        Ok(()) => serve_plane(config, plane, (schedules, seat), clock, signals),
        Err(error) => {
            plane.shut_down();
            Err(error.into())
        }
    };
    handles.into_iter().for_each(ReactorHandle::join);
    served
}

/// Serves the API until a signal comes, then shuts the control plane down.
fn serve_plane(
    config: &Config,
    plane: ControlPlane,
    (schedules, seat): (Schedules, Seat),
    clock: SystemClock,
    signals: &SigSet,
) -> Outcome {
    let greeting = greeting(config, &plane);
    let stopper = plane.stopper();
    let (control, thread) = Control::start(plane)?;
    let scheduler = Scheduler::start(schedules, seat, control.clone(), clock);
    let outcome = match ApiServer::start(&config.api, control) {
        Ok(api) if scheduler.is_ok() => {
            let waited = output::print(&greeting).and_then(|()| wait(signals));
            drop(api);
            waited
        }
        Ok(_) => Ok(()), // Not served without the scheduler, as is said below.
        Err(error) => Err(error.into()),
    };
    let outcome = scheduler.map_err(Into::into).and_then(|scheduler| {
        drop(scheduler);
        outcome
    });
    // API and scheduler held the last `Control`, but for a collection: so the thread ends.
    if let Some(stopper) = stopper {
        stopper.stop();
    }
    thread.join().shut_down();
    tracing::info!("stopped");
    outcome
}

fn wait(signals: &SigSet) -> Outcome {
    let signal = signals.wait()?;
    tracing::info!("stopping on {signal}");
    Ok(())
}

/// A volume takes about a dozen descriptors, and the usual soft limit of 1024 is for programs that
/// still use `select`.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(
            "cannot raise the limit of open files: {error}; expect room for few volumes"
        );
    }
}

fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let ansi = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi);
    log.with_writer(std::io::stderr).init();
}

/// Locks the device, making it first when it is a file that is not there.
fn take_device(
    config: &Config,
    clock: &SystemClock,
) -> Result<(DeviceLock, FileDevice), ConfigError> {
    let path = &config.store.device;
    let refuse = |error: &dyn std::error::Error| config.device_error(one_line(error));
    let lock = || DeviceLock::acquire(path).map_err(|error| refuse(&error));
    let open = || {
        let options = OpenOptions::default();
        FileDevice::open(path, &options).map_err(|error| refuse(&error))
    };
    if path.exists() {
        let lock = lock()?;
        config.check_sockets()?;
        let mut device = open()?;
        let ours = || !config.store.medium.outlives_the_daemon() || is_ours_to_format(path);
        if config.store.size.is_some() && ours() {
            // A file of the configured size that was made and not formatted: we were killed then.
            format(config, &mut device, clock)?;
        }
        return Ok((lock, device));
    }
    config.check_sockets()?;
    let size = config.store.size.expect("a device that does not exist has a size to be made with");
    create_file(path, size).map_err(|error| {
        config
            .device_error(format!("cannot create {}: {error}; check its directory", path.display()))
    })?;
    let made = lock().and_then(|lock| {
        let mut device = open()?;
        format(config, &mut device, clock)?;
        Ok((lock, device))
    });
    if made.is_err() {
        let _ = std::fs::remove_file(path);
    }
    made
}

/// Makes a sparse file for its owner alone: it will hold what guests keep secret.
///
/// # Errors
/// The file system's; for a size it cannot have, with that said.
pub(crate) fn create_file(path: &Path, size: ByteCount) -> std::io::Result<()> {
    let file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    let made = set_file_size(&file, size);
    if made.is_err() {
        let _ = std::fs::remove_file(path);
    }
    made
}

/// Gives a file its size; says whose limit it is when that is too large.
///
/// # Errors
/// The file system's.
pub(crate) fn set_file_size(file: &File, size: ByteCount) -> std::io::Result<()> {
    file.set_len(size.get()).map_err(|error| with_limit(error, size))
}

fn with_limit(error: std::io::Error, size: ByteCount) -> std::io::Error {
    let kind = error.kind();
    if kind != std::io::ErrorKind::FileTooLarge {
        return error;
    }
    let message = format!(
        "a file of {} is past the limit of this file system (choose a smaller size or another \
         file system)",
        size.human()
    );
    std::io::Error::new(kind, message)
}

/// A regular file in which nothing was ever written, not even zeroes: a file of the configured size
/// that was made and not formatted. What looks blank may be a store whose start is lost, and only
/// `bessel format`, which somebody types, may destroy that. A file system that cannot tell holes
/// says that all is data.
fn is_ours_to_format(path: &Path) -> bool {
    let Ok(file) = File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)
    else {
        return false;
    };
    file.metadata().is_ok_and(|metadata| metadata.is_file())
        && lseek(&file, 0, Whence::SeekData) == Err(Errno::ENXIO)
}

fn format(
    config: &Config,
    device: &mut FileDevice,
    clock: &SystemClock,
) -> Result<(), ConfigError> {
    let random = entropy::read().map_err(|error| {
        config.device_error(format!("cannot read random numbers to format it with: {error}"))
    })?;
    let options = FormatOptions {
        extent_size: None,
        force: false,
        uuid: random.uuid,
        secret: random.secret,
        time: clock.wall(),
    };
    let report = store::format(device, &options, &mut |_, _| ())
        .map_err(|error| config.device_error(one_line(&error)))?;
    let size = report.geometry.size().human();
    tracing::info!("formatted {} as a store of {size}", config.store_name());
    Ok(())
}

fn report_state(store: &OpenedStore) {
    if !store.was_clean {
        tracing::info!("the store was not closed in order last time; recovered");
    }
    for fault in &store.faults {
        tracing::error!("{fault}");
    }
    for finding in &store.findings {
        tracing::warn!("{finding}");
    }
}

/// The running reactors: what the control plane needs of them, and their threads.
struct Reactors {
    homes: Vec<Home>,
    handles: Vec<ReactorHandle>,
}

impl Reactors {
    /// Starts one on each core. When one fails, those before it have ended again.
    fn start(
        config: &Config,
        store: &Arc<OpenedStore>,
        clock: SystemClock,
        journals: &mut Journals,
    ) -> Result<Self, ConfigError> {
        let cores = match &config.reactors.cores {
            Some(cores) => cores.clone(),
            None => usable_cores().into_iter().take(1).collect(),
        };
        let refuse = |error: &dyn std::error::Error| config.device_error(one_line(error));
        let ends: Result<Vec<Ends>, _> = cores.iter().map(|_| inbox(INBOX_MESSAGES)).collect();
        let (senders, inboxes): (Vec<_>, Vec<_>) =
            ends.map_err(|error| refuse(&error))?.into_iter().unzip();
        let mut started = Self { homes: Vec::new(), handles: Vec::new() };
        for (index, (core, inbox)) in cores.iter().zip(inboxes).enumerate() {
            let port = CorePort::new(senders[index].clone());
            let counters = Arc::<CoreCounters>::default();
            let journal = match journals.make(index) {
                Ok(journal) => journal,
                Err(error) => {
                    started.end();
                    return Err(config.device_error(error));
                }
            };
            let seat = CoreSeat {
                inbox,
                peers: senders.clone(),
                counters: Arc::clone(&counters),
                clock,
                pin_guest_memory: config.reactors.pin_guest_memory,
                journal,
            };
            match start_reactor(config, store, index, *core, cores.len(), seat) {
                Ok(handle) => started.handles.push(handle),
                Err(error) => {
                    started.end();
                    return Err(refuse(&error));
                }
            }
            started.homes.push(Home { core: *core, port, counters });
        }
        Ok(started)
    }

    fn end(self) {
        for home in &self.homes {
            home.port.send(CoreMessage::Finish);
        }
        self.handles.into_iter().for_each(ReactorHandle::join);
    }
}

type Ends = (Sender<CoreMessage>, Inbox<CoreMessage>);

fn start_reactor(
    config: &Config,
    store: &Arc<OpenedStore>,
    index: usize,
    core: usize,
    cores: usize,
    seat: CoreSeat,
) -> Result<ReactorHandle, SpawnError<OpenError>> {
    let options = ReactorOptions {
        name: format!("reactor-{core}"),
        core: Some(core),
        mode: match config.reactors.poll {
            Poll::Adaptive => PollMode::Adaptive,
            Poll::Sparing => PollMode::Sparing,
            Poll::Busy => PollMode::Busy,
        },
        stats: Arc::clone(&seat.counters.reactor),
        clock: seat.clock,
    };
    let node_cache = ByteCount::new(config.store.node_cache.get() / cores as u64);
    let spreads = cores > 1 && config.reactors.spread == Spread::On;
    let shard = ShardConfig {
        index,
        node_cache,
        requests_max: REQUESTS_PER_SHARD,
        shared_leaves: if spreads { (node_cache.blocks_floor() / SHARED_PART) as usize } else { 0 },
        steps_per_turn: ShardConfig::STEPS_PER_TURN,
    };
    let (path, store) = (config.store.device.clone(), Arc::clone(store));
    // To be sparing of the core, and to look at the device all the time, cannot both be had.
    let poll = config.store.io_poll == IoPoll::On && config.reactors.poll != Poll::Sparing;
    let drops = (config.store.medium == Medium::Null).then_some(is_data as fn(Token) -> bool);
    spawn(options, move || {
        let depth = shard.device_depth() as u32;
        let options = OpenOptions { depth, drops, poll, ..OpenOptions::default() };
        let device = FileDevice::open(&path, &options)?;
        if device.is_polled() {
            tracing::info!(core, device = %path.display(), "reads and writes are polled for");
        }
        Ok(Core::new(Shard::new(&shard, device, &store), seat))
    })
}

/// Makes the changes again that a killed daemon had made and not yet made durable. All of them, before
/// anybody is served: until then its journals count, and what is written meanwhile would be undone.
/// A volume for which that fails is not served in this life; the next one tries again.
fn restore_volumes(
    config: &Config,
    plane: &mut ControlPlane,
    life: &mut Life,
) -> Result<(), ConfigError> {
    let mut left = Vec::new();
    for (id, changes) in life.journals.take_outstanding() {
        let Some(name) = plane.name_of_present(id) else {
            if plane.may_be_unreadable(id) {
                tracing::error!(
                    "what the killed daemon had not made durable of volume {id} is kept: its record \
                     cannot be read; mend that and start again"
                );
                left.push((id, changes));
            }
            continue;
        };
        let configured = config.volumes.iter().find(|volume| volume.name == name);
        let queues = configured.map_or(QUEUES_DEFAULT, |volume| volume.queues);
        tracing::info!(volume = name, changes = changes.len(), "restoring what was not durable");
        if let Err(refusal) = plane.restore(id, changes.clone(), queues) {
            tracing::error!(
                volume = name,
                "not served: what the killed daemon had not made durable cannot be restored: \
                 {refusal}; mend that and start again"
            );
            plane.withhold(id);
            left.push((id, changes));
        }
    }
    let carried = life.journals.carry(&left);
    carried.map_err(|error| config.device_error(error))?;
    life.begin().map_err(|error| config.device_error(format!("cannot begin to serve: {error}")))
}

/// Opens the volumes of the configuration, which must succeed, and then all others of the store. One
/// that is damaged fails alone.
fn open_volumes(config: &Config, plane: &mut ControlPlane) -> Result<(), ConfigError> {
    for (index, volume) in config.volumes.iter().enumerate() {
        if plane.is_withheld(&volume.name) {
            continue;
        }
        let service = Service::configured(volume);
        match plane.open_or_create(&volume.name, volume.size, service) {
            Ok(()) => {}
            Err(refusal) if refusal.kind == RefusalKind::Damaged => {
                tracing::error!(volume = volume.name, "not served: {refusal}");
            }
            Err(refusal) => {
                let what = format!("volume {:?}: {refusal}", volume.name);
                return Err(config.volume_error(index, what));
            }
        }
    }
    for (id, name) in plane.unserved() {
        let service = Service::by_default(&name, plane.socket_directory());
        if let Err(refusal) = plane.open(id, service) {
            tracing::error!(volume = name, "not served: {refusal}");
        }
    }
    Ok(())
}

/// What the operator is told: how to attach a guest to each volume, and where the API is.
fn greeting(config: &Config, plane: &ControlPlane) -> String {
    let mut text = String::new();
    for (name, size, queues, socket) in plane.sockets() {
        let (socket, size) = (socket.display(), size.human());
        text.push_str(&format!(
            "volume {name} ({size})\n  \
             qemu:             -object memory-backend-memfd,id=mem,size=1G,share=on \
             -numa node,memdev=mem -chardev socket,id=c0,path={socket} \
             -device vhost-user-blk-pci,chardev=c0,num-queues={queues}\n  \
             cloud-hypervisor: --cpus boot={queues} --memory size=1G,shared=on \
             --disk vhost_user=true,socket={socket},num_queues={queues}\n"
        ));
    }
    text.push_str(&format!("ready; API at {}\n", config.api.socket.display()));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_its_file_system_cannot_have_is_blamed_on_the_file_system() {
        let size = ByteCount::new(32 << 50);
        let told = with_limit(Errno::EFBIG.into(), size).to_string();
        assert!(told.contains("32PiB is past the limit of this file system"), "{told}");
        assert_eq!(with_limit(Errno::ENOSPC.into(), size).raw_os_error(), Some(28));
    }
}
