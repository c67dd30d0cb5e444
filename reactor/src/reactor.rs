//! The loop of one core: poll while there is work, then sleep in the device's ring.
//!
//! The loop knows nothing of what it polls (see [`Poller`]). It reads the clock once a turn, keeps
//! count, and decides on sleep. A turn that found nothing is not yet a reason to sleep: falling
//! asleep and being woken costs two system calls, the sender's, and the scheduler's time, so the
//! loop first spins for as long as has paid before (`patience.rs`).

use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;

use crate::clock::{Instant, SystemClock};
use crate::device::uring::{WATCHES_MAX, WatchId};
use crate::patience::{Patience, Wait};
use crate::poller::Poller;
use crate::stats::ReactorStats;

/// When a reactor sleeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PollMode {
    /// After a spell without work, of a length that is learned.
    #[default]
    Adaptive,
    /// The same, where the core is needed for other things: at once while the device works, if it will say when
    /// it is done, and soon without.
    Sparing,
    /// Never: the core is the reactor's alone.
    Busy,
}

/// How to start a reactor.
#[derive(Clone, Debug)]
pub struct ReactorOptions {
    /// The thread's name; the kernel shows its first 15 bytes.
    pub name: String,
    /// The core it stays on; `None` lets the scheduler choose.
    pub core: Option<usize>,
    /// When it sleeps.
    pub mode: PollMode,
    /// Where it counts what it does.
    pub stats: Arc<ReactorStats>,
    /// What it tells the time by. Reactors that exchange times share one.
    pub clock: SystemClock,
}

/// A reactor could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpawnError<E: std::error::Error + 'static> {
    /// There is no such core, or this process may not use it.
    #[error("core {core} cannot be used here; choose from: {usable}")]
    NoSuchCore {
        /// What was asked for.
        core: usize,
        /// The cores there are, as `0-3,6`.
        usable: String,
    },
    /// The system has no thread for it.
    #[error("cannot start the reactor's thread")]
    Thread(#[source] std::io::Error),
    /// Its poller could not be made.
    #[error(transparent)]
    Make(E),
}

/// A running reactor.
#[derive(Debug)]
pub struct ReactorHandle {
    thread: JoinHandle<()>,
}

impl ReactorHandle {
    /// Waits until the reactor's poller has finished.
    ///
    /// # Panics
    /// With the reactor's panic, if it panicked.
    pub fn join(self) {
        if let Err(panic) = self.thread.join() {
            std::panic::resume_unwind(panic);
        }
    }
}

/// Starts a reactor on a thread of its own. `make` runs there, pinned already, so that the
/// poller's memory and ring belong to the core; its error comes back to the caller.
pub fn spawn<P, E, F>(options: ReactorOptions, make: F) -> Result<ReactorHandle, SpawnError<E>>
where
    P: Poller,
    E: std::error::Error + Send + 'static,
    F: FnOnce() -> Result<P, E> + Send + 'static,
{
    let ReactorOptions { name, core, mode, stats, clock } = options;
    check_core(core)?;
    let (answer, started) = mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name(name)
        .spawn(move || {
            if !pin(core) {
                let _ = answer.send(Err(None));
                return;
            }
            match make() {
                Ok(poller) => {
                    let _ = answer.send(Ok(()));
                    run(poller, mode, &stats, &clock);
                }
                Err(error) => {
                    let _ = answer.send(Err(Some(error)));
                }
            }
        })
        .map_err(SpawnError::Thread)?;
    let handle = ReactorHandle { thread };
    let Ok(answer) = started.recv() else {
        handle.join();
        unreachable!("a reactor that gives no answer has panicked, and joining it panics");
    };
    match answer {
        Ok(()) => Ok(handle),
        Err(failure) => {
            handle.join();
            Err(match failure {
                Some(error) => SpawnError::Make(error),
                // The core went away between the check and the pinning.
                None => no_such_core(core.expect("only pinning fails without an error")),
            })
        }
    }
}

/// The cores this process may use, as the kernel numbers them.
pub fn usable_cores() -> Vec<usize> {
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    cores.into_iter().map(|core| core.id).collect()
}

/// Gives the calling thread the lowest priority there is: it gets what others leave over.
///
/// # Errors
/// The system's.
pub fn give_way() -> std::io::Result<()> {
    crate::sys::give_way()
}

fn check_core<E: std::error::Error>(core: Option<usize>) -> Result<(), SpawnError<E>> {
    match core {
        Some(core) if !usable_cores().contains(&core) => Err(no_such_core(core)),
        _ => Ok(()),
    }
}

fn no_such_core<E: std::error::Error>(core: usize) -> SpawnError<E> {
    SpawnError::NoSuchCore { core, usable: ranges(&usable_cores()) }
}

fn pin(core: Option<usize>) -> bool {
    core.is_none_or(|id| core_affinity::set_for_current(core_affinity::CoreId { id }))
}

/// Ascending numbers the way the kernel writes lists of cores: `0-3,6`.
fn ranges(numbers: &[usize]) -> String {
    let consecutive = numbers.chunk_by(|one, next| one + 1 == *next);
    let parts: Vec<String> = consecutive
        .map(|run| match run {
            [only] => only.to_string(),
            [first, .., last] => format!("{first}-{last}"),
            [] => String::new(),
        })
        .collect();
    parts.join(",")
}

/// Runs the loop on this thread until the poller has finished.
fn run<P: Poller>(mut poller: P, mode: PollMode, stats: &ReactorStats, clock: &SystemClock) {
    let mut woken = Vec::with_capacity(WATCHES_MAX);
    let mut patience = match mode {
        PollMode::Sparing => Patience::sparing(),
        PollMode::Adaptive | PollMode::Busy => Patience::new(),
    };
    let mut last = clock.now();
    // Since when there is nothing to do, and what we wait for.
    let mut waiting: Option<(Instant, Wait)> = None;
    while !poller.finished() {
        let now = clock.now();
        let spent = if waiting.is_none() { &stats.busy_ns } else { &stats.spun_ns };
        spent.add(now.since(last).as_nanos() as u64);
        last = now;
        stats.turns.add(1);
        if poller.poll(now) {
            stats.turns_busy.add(1);
            if let Some((since, wait)) = waiting.take() {
                patience.ended(wait, now.since(since));
                if wait == Wait::Device {
                    patience.device_answered(now, poller.device().reaped());
                }
            }
            continue;
        }
        let device_works = poller.device().in_flight() > 0;
        let wait = if device_works { Wait::Device } else { Wait::Outside };
        let (since, wait) = *waiting.get_or_insert((now, wait));
        let spins = mode == PollMode::Busy || poller.device().must_be_polled();
        if spins || now < since.after(patience.of(wait)) {
            std::hint::spin_loop();
            continue;
        }
        let sleeps = poller.prepare_sleep();
        let ready = clock.now();
        stats.spun_ns.add(ready.since(last).as_nanos() as u64);
        last = ready;
        let mut timed_out = false;
        if sleeps {
            timed_out = !sleep(&mut poller, last, stats, &mut woken);
            let awake = clock.now();
            stats.asleep_ns.add(awake.since(last).as_nanos() as u64);
            last = awake;
        }
        poller.woken(&woken);
        woken.clear();
        // A timer brings no reason to expect more: one turn for what is due, then back to sleep.
        if !timed_out {
            let length = last.since(since);
            match sleeps {
                true => patience.ended_asleep(wait, length),
                false => patience.ended(wait, length),
            }
            if wait == Wait::Device {
                patience.device_answered(last, poller.device().reaped());
            }
            waiting = None;
        }
    }
}

/// Sleeps until there is something to do. False when only time has passed.
fn sleep<P: Poller>(
    poller: &mut P,
    now: Instant,
    stats: &ReactorStats,
    woken: &mut Vec<WatchId>,
) -> bool {
    let timeout = poller.deadline().map(|deadline| deadline.since(now));
    stats.sleeps.add(1);
    let completed = poller.device().wait(timeout, woken);
    let cause = completed || !woken.is_empty();
    stats.wakeups.add(u64::from(cause));
    cause
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::{Buffer, BufferPool};
    use crate::device::uring::{Engine, FileDevice, OpenError, OpenOptions};
    use crate::device::{Device, Token};
    use crate::inbox::{Inbox, Sender, inbox};
    use crate::units::ByteOffset;
    use std::path::{Path, PathBuf};
    use std::time::Duration;

    enum Message {
        /// Answer with the number of turns so far.
        Echo,
        /// Poll again at the latest this long from now, and count when that happened.
        Alarm(Duration),
        Stop,
    }

    /// A core with nothing to do but answer.
    struct Answering {
        device: FileDevice,
        inbox: Inbox<Message>,
        answers: mpsc::Sender<Answer>,
        alarm: Option<Instant>,
        finished: bool,
    }

    #[derive(PartialEq, Eq, Debug)]
    enum Answer {
        Echo,
        Alarm,
    }

    const BELL: WatchId = WatchId(0);

    impl Poller for Answering {
        fn poll(&mut self, now: Instant) -> bool {
            if self.alarm.is_some_and(|alarm| alarm <= now) {
                self.alarm = None;
                self.answers.send(Answer::Alarm).unwrap();
                return true;
            }
            match self.inbox.pop() {
                Some(Message::Echo) => self.answers.send(Answer::Echo).unwrap(),
                Some(Message::Alarm(duration)) => self.alarm = Some(now.after(duration)),
                Some(Message::Stop) => self.finished = true,
                None => return false,
            }
            true
        }

        fn prepare_sleep(&mut self) -> bool {
            self.inbox.prepare_sleep()
        }

        fn woken(&mut self, woken: &[WatchId]) {
            assert!(woken.iter().all(|watch| *watch == BELL));
            self.inbox.woken();
        }

        fn deadline(&self) -> Option<Instant> {
            self.alarm
        }

        fn device(&mut self) -> &mut FileDevice {
            &mut self.device
        }

        fn finished(&self) -> bool {
            self.finished
        }
    }

    struct World {
        reactor: ReactorHandle,
        stats: Arc<ReactorStats>,
        sender: Sender<Message>,
        answers: mpsc::Receiver<Answer>,
        path: PathBuf,
    }

    fn start(name: &str, mode: PollMode, core: Option<usize>) -> World {
        let path = Path::new("/dev/shm").join(format!("bessel-{name}-{}", std::process::id()));
        std::fs::File::create(&path).unwrap().set_len(4096).unwrap();
        let (sender, inbox) = inbox(4).unwrap();
        let (answers_sender, answers) = mpsc::channel();
        let stats = Arc::new(ReactorStats::default());
        let device_path = path.clone();
        let make = move || {
            let options = OpenOptions { depth: 1, ..OpenOptions::default() };
            let mut device = FileDevice::open(&device_path, &options)?;
            device.watch(inbox.fd(), BELL);
            let answers = answers_sender;
            Ok::<_, OpenError>(Answering { device, inbox, answers, alarm: None, finished: false })
        };
        let reactor = spawn(options(mode, core, &stats), make).unwrap();
        World { reactor, stats, sender, answers, path }
    }

    fn options(mode: PollMode, core: Option<usize>, stats: &Arc<ReactorStats>) -> ReactorOptions {
        let (name, clock) = ("test".to_string(), SystemClock::start());
        ReactorOptions { name, core, mode, stats: Arc::clone(stats), clock }
    }

    impl World {
        fn send(&self, message: Message) {
            self.sender.send(message).ok().unwrap();
        }

        fn until(&self, condition: impl Fn(&ReactorStats) -> bool) {
            while !condition(&self.stats) {
                std::thread::yield_now();
            }
        }

        fn stop(self) -> Arc<ReactorStats> {
            self.send(Message::Stop);
            self.reactor.join();
            std::fs::remove_file(self.path).unwrap();
            self.stats
        }
    }

    #[test]
    fn an_idle_adaptive_reactor_takes_no_turn_until_a_message_wakes_it() {
        let world = start("idle", PollMode::Adaptive, usable_cores().last().copied());
        for round in 0..100 {
            world.until(|stats| stats.sleeps.get() > round);
            let turns = world.stats.turns.get();
            for _ in 0..100 {
                std::thread::yield_now();
            }
            assert_eq!(world.stats.turns.get(), turns, "a turn without a reason");
            assert_eq!(world.stats.sleeps.get(), round + 1);
            world.send(Message::Echo);
            assert_eq!(world.answers.recv(), Ok(Answer::Echo));
        }
        let stats = world.stop();
        assert!(stats.wakeups.get() >= 99, "{stats:?}");
        assert!(stats.asleep_ns.get() > 0);
    }

    /// Reads a block of a disk's file again and again.
    struct Reading {
        device: FileDevice,
        pool: BufferPool,
        buffer: Buffer,
        left: u32,
    }

    impl Poller for Reading {
        fn poll(&mut self, _: Instant) -> bool {
            let mut completions = Vec::new();
            self.device.reap(&mut completions);
            for completion in &completions {
                assert_eq!(completion.result, Ok(()));
                self.pool.returned(&self.buffer);
                self.left -= 1;
            }
            if self.left > 0 && self.device.in_flight() == 0 {
                let segment = self.pool.lend(&self.buffer);
                self.device.read(Token(0), ByteOffset::new(0), &[segment]);
                self.device.submit();
                return true;
            }
            !completions.is_empty()
        }

        fn prepare_sleep(&mut self) -> bool {
            true
        }

        fn woken(&mut self, _: &[WatchId]) {}

        fn deadline(&self) -> Option<Instant> {
            None
        }

        fn device(&mut self) -> &mut FileDevice {
            &mut self.device
        }

        fn finished(&self) -> bool {
            self.left == 0
        }
    }

    #[test]
    fn a_sparing_reactor_sleeps_while_the_disk_works_and_wakes_when_it_is_done() {
        let path = std::env::temp_dir().join(format!("bessel-sparing-{}", std::process::id()));
        std::fs::write(&path, vec![1; 4096]).unwrap();
        let stats = Arc::new(ReactorStats::default());
        let device_path = path.clone();
        let make = move || {
            let options = OpenOptions { depth: 1, engine: Engine::Uring, ..OpenOptions::default() };
            let device = FileDevice::open(&device_path, &options)?;
            let mut pool = BufferPool::new(1, 4096);
            let buffer = pool.take().unwrap();
            Ok::<_, OpenError>(Reading { device, pool, buffer, left: 200 })
        };
        spawn(options(PollMode::Sparing, None, &stats), make).unwrap().join();
        std::fs::remove_file(path).unwrap();
        // Some reads may be done before it has looked for the first time.
        assert!(stats.sleeps.get() >= 20, "{stats:?}");
    }

    #[test]
    fn a_sleeping_reactor_keeps_its_deadline() {
        let world = start("alarm", PollMode::Adaptive, None);
        world.send(Message::Alarm(Duration::from_millis(2)));
        assert_eq!(world.answers.recv(), Ok(Answer::Alarm));
        let stats = world.stop();
        assert!(stats.sleeps.get() >= 1, "{stats:?}");
    }

    #[test]
    fn a_busy_reactor_never_sleeps() {
        let world = start("busy", PollMode::Busy, None);
        world.until(|stats| stats.turns.get() > 10_000);
        world.send(Message::Echo);
        assert_eq!(world.answers.recv(), Ok(Answer::Echo));
        assert_eq!(world.stop().sleeps.get(), 0);
    }

    #[test]
    fn a_core_that_does_not_exist_is_refused_with_those_that_do() {
        let stats = Arc::new(ReactorStats::default());
        let refused = spawn(options(PollMode::Adaptive, Some(4095), &stats), || {
            Err::<Answering, OpenError>(OpenError::Empty { path: PathBuf::new() })
        });
        let error = refused.unwrap_err();
        assert!(matches!(error, SpawnError::NoSuchCore { core: 4095, .. }), "{error}");
        assert!(error.to_string().contains(&ranges(&usable_cores())), "{error}");
    }

    #[test]
    fn the_makers_error_comes_back() {
        let stats = Arc::new(ReactorStats::default());
        let refused = spawn(options(PollMode::Adaptive, None, &stats), || {
            Err::<Answering, OpenError>(OpenError::Empty { path: PathBuf::from("here") })
        });
        assert!(refused.unwrap_err().to_string().starts_with("here is empty"));
    }

    #[test]
    fn lists_of_cores_read_like_the_kernels() {
        assert_eq!(ranges(&[0, 1, 2, 3, 6, 8, 9]), "0-3,6,8-9");
        assert_eq!(ranges(&[]), "");
    }
}
