//! The thread that takes snapshots by schedule.
//!
//! It alone keeps their time: a reactor hears of a snapshot when it is due, as of any other command.
//! It never waits for an answer, so a reactor or device that is slow costs its own volumes some
//! snapshots and the others nothing ([`Timetable`] says which are skipped). What thinning deletes goes
//! through the control plane, like every other deletion.
//!
//! It also has the control plane look every few seconds whether a collection is due, and whether a volume
//! should be moved.
//!
//! The control plane starts and ends a volume's schedule, and tells of what others do with its
//! snapshots. Once [`Schedules::end`] has returned, nothing more is sent for the volume, so that its
//! handle may go to another.

use crate::attach::{Answer, CoreMessage, CorePort};
use crate::control::Control;
use bessel_mapping::request::{Command, CommandError, Reply, VolumeHandle, VolumeId};
use bessel_mapping::schedule::{IN_FLIGHT_MAX, Known, Schedule, ScheduleCounters, Timetable};
use bessel_reactor::clock::{Instant, SystemClock};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often it is looked whether a collection is due, and whether a volume should have another home: often
/// enough to begin one before a store that fills up is full, and no load on an idle machine.
const LOOK: Duration = Duration::from_secs(5);
/// How often a paused schedule whose snapshots are under way looks for their answers.
const PAUSED_LOOK: Duration = Duration::from_millis(10);

/// What a schedule has come to, for whoever asks.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    taken: AtomicU64,
    skipped: AtomicU64,
    thinned: AtomicU64,
    failed: AtomicU64,
    /// Why it pauses, or why the last snapshot failed.
    trouble: Mutex<Trouble>,
}

/// What is wrong with a schedule.
#[derive(Clone, Default, Debug)]
pub(crate) struct Trouble {
    pub(crate) paused: bool,
    pub(crate) reason: Option<String>,
}

impl Progress {
    /// What was counted since the schedule was set.
    pub(crate) fn counters(&self) -> ScheduleCounters {
        ScheduleCounters {
            taken: self.taken.load(Ordering::Relaxed),
            skipped: self.skipped.load(Ordering::Relaxed),
            thinned: self.thinned.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
        }
    }

    /// What is wrong with it.
    pub(crate) fn trouble(&self) -> Trouble {
        self.trouble.lock().expect("no holder of this lock panics").clone()
    }

    fn publish(&self, counters: ScheduleCounters) {
        self.taken.store(counters.taken, Ordering::Relaxed);
        self.skipped.store(counters.skipped, Ordering::Relaxed);
        self.thinned.store(counters.thinned, Ordering::Relaxed);
        self.failed.store(counters.failed, Ordering::Relaxed);
    }

    fn set_trouble(&self, trouble: Trouble) {
        *self.trouble.lock().expect("no holder of this lock panics") = trouble;
    }
}

/// A schedule that begins.
pub(crate) struct Begin {
    pub(crate) volume: VolumeId,
    /// For the log.
    pub(crate) name: String,
    pub(crate) handle: VolumeHandle,
    pub(crate) port: CorePort,
    pub(crate) schedule: Schedule,
    pub(crate) progress: Arc<Progress>,
}

enum Message {
    Begin(Box<Begin>),
    End {
        volume: VolumeId,
        ended: SyncSender<()>,
    },
    /// The volume is about to be moved.
    Hold {
        volume: VolumeId,
        held: SyncSender<()>,
    },
    /// It is open here now.
    GoOn {
        volume: VolumeId,
        handle: VolumeHandle,
        port: CorePort,
    },
    /// Some of the snapshots that the volume had when its schedule began.
    Known {
        volume: VolumeId,
        snapshots: Vec<Known>,
        complete: bool,
    },
    /// Somebody has taken or labelled a snapshot.
    Noted {
        volume: VolumeId,
        snapshot: Known,
    },
    /// Somebody has deleted a snapshot.
    Deleted {
        volume: VolumeId,
        sequence: u64,
    },
    /// What a thinning has come to.
    Thinned {
        volume: VolumeId,
        gone: Result<Vec<u64>, String>,
    },
    Stop,
}

/// The control plane's end. Clones speak to the same thread.
#[derive(Clone)]
pub(crate) struct Schedules {
    messages: mpsc::Sender<Message>,
}

/// The thread's end, before it runs.
pub(crate) struct Seat {
    inbox: Receiver<Message>,
}

/// Both ends. What is sent before the thread runs waits for it.
pub(crate) fn schedules() -> (Schedules, Seat) {
    let (messages, inbox) = mpsc::channel();
    (Schedules { messages }, Seat { inbox })
}

impl Schedules {
    fn send(&self, message: Message) {
        // The thread is gone only when the daemon stops, and then there is nothing to schedule.
        let _ = self.messages.send(message);
    }

    /// Begins a volume's schedule, in the place of one that it may have.
    pub(crate) fn begin(&self, begin: Begin) {
        self.send(Message::Begin(Box::new(begin)));
    }

    /// Ends a volume's schedule. When it returns, nothing more is sent to the volume's home.
    pub(crate) fn end(&self, volume: VolumeId) {
        let (ended, wait) = sync_channel(1);
        self.send(Message::End { volume, ended });
        let _ = wait.recv(); // An error: the thread is gone, and with it all schedules.
    }

    /// Takes no snapshots by a volume's schedule until it goes on. When this returns, nothing more is sent to
    /// the volume's home.
    pub(crate) fn hold(&self, volume: VolumeId) {
        let (held, wait) = sync_channel(1);
        self.send(Message::Hold { volume, held });
        let _ = wait.recv(); // An error: the thread is gone, and with it all schedules.
    }

    /// Goes on with a schedule that was held, at the volume's home.
    pub(crate) fn go_on(&self, volume: VolumeId, handle: VolumeHandle, port: CorePort) {
        self.send(Message::GoOn { volume, handle, port });
    }

    /// Tells of some of the snapshots that the volume had when its schedule began and that are not deleted;
    /// `complete` with the last of them. Until then none is thinned.
    pub(crate) fn known(&self, volume: VolumeId, snapshots: Vec<Known>, complete: bool) {
        self.send(Message::Known { volume, snapshots, complete });
    }

    /// Tells of a snapshot that somebody has taken or labelled.
    pub(crate) fn noted(&self, volume: VolumeId, snapshot: Known) {
        self.send(Message::Noted { volume, snapshot });
    }

    /// Tells of a snapshot that somebody has deleted.
    pub(crate) fn deleted(&self, volume: VolumeId, sequence: u64) {
        self.send(Message::Deleted { volume, sequence });
    }
}

/// The running thread. Dropping it stops it.
pub(crate) struct Scheduler {
    schedules: Schedules,
    thread: Option<JoinHandle<()>>,
}

impl Scheduler {
    /// Starts the thread. It holds `control` until it is stopped.
    ///
    /// # Errors
    /// When the system has no thread for it.
    pub(crate) fn start(
        schedules: Schedules,
        seat: Seat,
        control: Control,
        clock: SystemClock,
    ) -> std::io::Result<Self> {
        let messages = schedules.clone();
        let mut timer = Timer {
            running: BTreeMap::new(),
            due: BTreeSet::new(),
            control,
            schedules: messages,
            look: clock.now(),
            clock,
        };
        let thread = std::thread::Builder::new()
            .name("bessel-schedule".to_owned())
            .spawn(move || timer.run(&seat.inbox))?;
        Ok(Self { schedules, thread: Some(thread) })
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.schedules.send(Message::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the snapshot schedules had panicked");
        }
    }
}

/// A volume's schedule.
struct Running {
    name: String,
    handle: VolumeHandle,
    port: CorePort,
    table: Timetable,
    progress: Arc<Progress>,
    /// Where its home answers: with room for all answers that can be under way.
    answers: (SyncSender<Answer>, Receiver<Answer>),
    /// The volume has failed: nothing more until it is attached again.
    paused: bool,
    /// What was said last, so that it is said once.
    said: Option<String>,
}

struct Timer {
    running: BTreeMap<VolumeId, Running>,
    /// When each is to be looked at next.
    due: BTreeSet<(Instant, VolumeId)>,
    control: Control,
    /// To answer to ourselves.
    schedules: Schedules,
    /// When the control plane is to look around next.
    look: Instant,
    clock: SystemClock,
}

impl Timer {
    fn run(&mut self, inbox: &Receiver<Message>) {
        loop {
            let now = self.clock.now();
            let next = self.due.first().map_or(self.look, |(due, _)| self.look.min(*due));
            let wait = next.since(now);
            match inbox.recv_timeout(wait) {
                Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(message) => self.take(message),
                Err(RecvTimeoutError::Timeout) => {}
            }
            self.do_what_is_due();
            self.look_around();
        }
    }

    fn look_around(&mut self) {
        let now = self.clock.now();
        if self.look <= now {
            self.look = now.after(LOOK);
            let control = self.control.clone();
            let _ = self.control.send(move |plane| {
                plane.collect_if_due(control);
                plane.balance_if_due();
            });
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Begin(begin) => self.begin(*begin),
            Message::End { volume, ended } => {
                self.forget(volume);
                let _ = ended.send(()); // Whoever asked waits, with room for it.
            }
            Message::Hold { volume, held } => {
                self.due.retain(|(_, other)| *other != volume);
                let _ = held.send(()); // Whoever asked waits, with room for it.
            }
            Message::GoOn { volume, handle, port } => {
                if let Some(running) = self.running.get_mut(&volume) {
                    (running.handle, running.port) = (handle, port);
                    // Of a paused one what is under way is counted still.
                    if !running.paused || running.table.in_flight() > 0 {
                        self.due.insert((running.table.next(), volume));
                    }
                }
            }
            Message::Known { volume, snapshots, complete } => {
                if let Some(running) = self.running.get_mut(&volume) {
                    running.table.known(snapshots, complete);
                }
            }
            Message::Noted { volume, snapshot } => {
                if let Some(running) = self.running.get_mut(&volume) {
                    running.take_answers(); // What it is about may be among them.
                    running.table.note(snapshot);
                }
            }
            Message::Deleted { volume, sequence } => {
                if let Some(running) = self.running.get_mut(&volume) {
                    running.take_answers(); // What it is about may be among them.
                    running.table.forget(sequence);
                }
            }
            Message::Thinned { volume, gone } => {
                if let Some(running) = self.running.get_mut(&volume) {
                    running.table.thinned(gone.as_deref().ok());
                    if let Err(why) = gone {
                        running.failed(format!("old snapshots could not be deleted: {why}"));
                    }
                    running.progress.publish(running.table.counters());
                }
            }
            Message::Stop => unreachable!("the loop has ended"),
        }
    }

    fn begin(&mut self, begin: Begin) {
        let Begin { volume, name, handle, port, schedule, progress } = begin;
        self.forget(volume);
        let table = Timetable::begin(schedule, self.clock.now());
        self.due.insert((table.next(), volume));
        let answers = sync_channel(IN_FLIGHT_MAX);
        let running =
            Running { name, handle, port, table, progress, answers, paused: false, said: None };
        self.running.insert(volume, running);
    }

    fn forget(&mut self, volume: VolumeId) {
        if self.running.remove(&volume).is_some() {
            self.due.retain(|(_, other)| *other != volume);
        }
    }

    fn do_what_is_due(&mut self) {
        loop {
            let now = self.clock.now();
            let Some((due, volume)) = self.due.first().copied().filter(|(due, _)| *due <= now)
            else {
                return;
            };
            self.due.remove(&(due, volume));
            let running = self.running.get_mut(&volume).expect("what is due runs");
            running.take_answers();
            running.progress.publish(running.table.counters());
            if running.paused {
                // Not due any more. Those under way are counted still.
                if running.table.in_flight() > 0 {
                    self.due.insert((now.after(PAUSED_LOOK), volume));
                }
                continue;
            }
            let due = running.table.poll(now, self.clock.wall());
            if due.snapshot {
                running.ask_for_snapshot(&self.clock);
            }
            self.due.insert((running.table.next(), volume));
            running.progress.publish(running.table.counters());
            if !due.thin.is_empty() {
                self.thin(volume, due.thin);
            }
        }
    }

    /// Has the control plane delete snapshots, and hears of it later.
    fn thin(&self, volume: VolumeId, sequences: Vec<u64>) {
        let schedules = self.schedules.clone();
        let _ = self.control.send(move |plane| {
            let gone = plane.delete_snapshots_of(volume, &sequences);
            let gone = gone.map_err(|refusal| refusal.to_string());
            schedules.send(Message::Thinned { volume, gone });
        });
    }
}

impl Running {
    /// Asks the volume's home for a snapshot, and does not wait for it.
    fn ask_for_snapshot(&mut self, clock: &SystemClock) {
        let command = Command::Snapshot { volume: self.handle, label: None, time: clock.wall() };
        let answer = self.answers.0.clone();
        if self.port.try_send(CoreMessage::Command { command, answer }).is_err() {
            self.table.skipped(); // Its inbox is full: it has more to do than snapshots.
        }
    }

    /// Takes in the answers to snapshots under way that have come.
    fn take_answers(&mut self) {
        while let Ok(Answer { reply, .. }) = self.answers.1.try_recv() {
            match reply {
                Reply::Snapshot(snapshot) => {
                    self.table.taken(snapshot.id.sequence, snapshot.time);
                    if !self.paused && self.said.take().is_some() {
                        tracing::info!(volume = self.name, "snapshots are taken again");
                        self.progress.set_trouble(Trouble::default());
                    }
                }
                Reply::Failed(error) => {
                    self.table.failed();
                    self.paused |= matches!(error, CommandError::Latched(_));
                    self.failed(error.to_string());
                }
                reply => unreachable!("a snapshot was answered with {reply:?}"),
            }
        }
    }

    /// Says why, unless that was the last thing said.
    fn failed(&mut self, why: String) {
        if self.said.as_ref() == Some(&why) {
            return;
        }
        if self.paused {
            let what = "its snapshot schedule pauses until it is attached again";
            tracing::warn!(volume = self.name, "{what}: {why}");
        } else {
            tracing::warn!(volume = self.name, "no snapshot by schedule: {why}");
        }
        let trouble = Trouble { paused: self.paused, reason: Some(why.clone()) };
        self.progress.set_trouble(trouble);
        self.said = Some(why);
    }
}
