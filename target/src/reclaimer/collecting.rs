//! Collections: what is known of the one under way and of the last, and running one.
//!
//! It reads at a bounded rate and on the lowest priority, so that guests hardly notice: what the cores
//! and the device have left over is what it gets.

use super::Worker;
use crate::api::Refusal;
use crate::api::types::{GcOutcome, GcPhase, GcReport, GcTrigger, GcView};
use crate::control::Control;
use crate::one_line;
use crate::plane::End;
use crate::time::rfc3339;
use bessel_mapping::blocking::Blocking;
use bessel_mapping::gc::{CollectError, Collected, Collection, Next, Phase, Progress, Spare};
use bessel_mapping::request::{Command, Reply};
use bessel_reactor::clock::{Instant, SystemClock, WallTime};
use bessel_reactor::device::FileDevice;
use bessel_reactor::reactor::give_way;
use bessel_reactor::units::{BLOCK_SIZE, ByteCount};
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

/// How often a collection begins, at most, because volumes are deleted while it looks where trees begin.
const ATTEMPTS: u32 = 8;

/// What a collection is asked for with.
pub(crate) struct Order {
    pub(crate) trigger: GcTrigger,
    /// To ask which trees deleted snapshots need that wait. Held until the collection has ended.
    pub(crate) control: Control,
    pub(crate) clock: SystemClock,
    /// Bytes of nodes read in a second, at most.
    pub(crate) rate: Option<ByteCount>,
}

/// What is known of collections.
#[derive(Default)]
pub(super) struct Status {
    /// One was asked for and has not ended.
    under_way: Option<UnderWay>,
    ended: u64,
    freed_bytes: u64,
    last: Option<GcReport>,
    /// Whoever runs one is to end it.
    cancelled: bool,
}

struct UnderWay {
    trigger: GcTrigger,
    started: WallTime,
    /// None before it has begun: something else is being freed.
    progress: Option<Progress>,
}

impl Status {
    /// Notes that one is asked for; false when there is one already.
    pub(super) fn ask(&mut self, trigger: GcTrigger, now: WallTime) -> bool {
        if self.under_way.is_some() {
            return false;
        }
        self.cancelled = false;
        self.under_way = Some(UnderWay { trigger, started: now, progress: None });
        true
    }

    pub(super) fn is_under_way(&self) -> bool {
        self.under_way.is_some()
    }

    /// Ends the one under way; false when there is none.
    pub(super) fn cancel(&mut self) -> bool {
        self.cancelled = self.under_way.is_some();
        self.cancelled
    }

    pub(super) fn view(&self) -> GcView {
        let progress = self.under_way.as_ref().and_then(|it| it.progress);
        let known = progress.unwrap_or_default();
        GcView {
            running: self.under_way.is_some(),
            trigger: self.under_way.as_ref().map(|it| it.trigger),
            started: self.under_way.as_ref().map(|it| rfc3339(it.started)),
            phase: progress.map(|progress| match progress.phase {
                Phase::Checkpoint => GcPhase::Checkpoint,
                Phase::Mark => GcPhase::Mark,
                Phase::Sweep => GcPhase::Sweep,
            }),
            nodes_read: known.nodes_read,
            nodes_found: known.nodes_found,
            garbage_bytes: ByteCount::from_blocks(known.blocks_garbage).get(),
            freed_bytes: ByteCount::from_blocks(known.blocks_freed).get(),
            ended: self.ended,
            freed_bytes_total: self.freed_bytes,
            last: self.last.clone(),
        }
    }

    fn end(&mut self, report: GcReport) {
        self.under_way = None;
        self.ended += 1;
        self.freed_bytes += report.freed_data_bytes + report.freed_metadata_bytes;
        self.last = Some(report);
    }
}

impl Worker {
    /// Runs a collection from start to end.
    pub(super) fn collect(&mut self, order: Order) {
        let began = order.clock.now();
        let started = order.clock.wall();
        if let Some(under_way) = &mut self.shared.gc().under_way {
            under_way.progress = Some(Progress::default());
        }
        let mut outcome = self.run_collection(&order);
        for _ in 1..ATTEMPTS {
            // Looking where trees begin takes moments, and volumes are seldom deleted.
            let (_, Some(CollectError::VolumeDeleted)) = outcome else { break };
            outcome = self.run_collection(&order);
        }
        let duration = order.clock.now().since(began);
        let (collected, error) = outcome;
        let reason = error.map(|error| one_line(&error));
        let end = match &reason {
            None => End::Done,
            Some(_) if self.shared.gc().cancelled => End::Cancelled,
            Some(_) => End::Failed,
        };
        let bytes = |blocks| ByteCount::from_blocks(blocks).get();
        let report = GcReport {
            outcome: if reason.is_none() { GcOutcome::Done } else { GcOutcome::Failed },
            reason,
            trigger: order.trigger,
            started: rfc3339(started),
            duration_ns: duration.as_nanos() as u64,
            nodes_read: collected.nodes_read,
            reachable_bytes: collected.reached().get(),
            freed_data_bytes: bytes(collected.data_freed),
            freed_metadata_bytes: bytes(collected.metadata_freed),
            volumes_reclaimed: collected.deleted_volumes.len() as u64,
            bitmaps_damaged: collected.bitmaps_damaged,
        };
        match &report.reason {
            None => tracing::info!(
                freed =
                    ByteCount::new(report.freed_data_bytes + report.freed_metadata_bytes).human(),
                nodes_read = report.nodes_read,
                "collected garbage, {} after it was begun",
                crate::cli::output::duration(report.duration_ns)
            ),
            Some(why) => tracing::warn!("a collection has ended early: {why}"),
        }
        let _ = order.control.send(move |plane| plane.collection_ended(&collected, end));
        self.shared.gc().end(report);
    }

    /// What it has freed, and why it ended early if it did.
    fn run_collection(&mut self, order: &Order) -> (Collected, Option<CollectError>) {
        if let Err(why) = self.open_device() {
            return (Collected::default(), Some(CollectError::Refused(why)));
        }
        let mut job = Collection::new(&self.store);
        let mut device = self.device.take().expect("it was just opened");
        let ended = self.drive(&mut job, &mut device, order);
        self.device = Some(device);
        ended
    }

    fn drive(
        &self,
        job: &mut Collection,
        device: &mut FileDevice,
        order: &Order,
    ) -> (Collected, Option<CollectError>) {
        let mut io = Blocking::new(device);
        let mut pace =
            Pace { rate: order.rate, clock: order.clock, since: order.clock.now(), nodes: 0 };
        loop {
            if self.shared.stop.load(Ordering::Relaxed) {
                job.fail("the daemon stops; the next one begins again".to_owned());
            } else if self.shared.gc().cancelled {
                job.fail("an operator has ended it".to_owned());
            }
            match job.next() {
                Next::Read => {
                    job.read(&mut io);
                    pace.keep(job.progress().nodes_read);
                }
                Next::Spare => match self.what_to_spare(&order.control) {
                    Ok(spare) => job.spare(spare),
                    Err(why) => job.fail(why),
                },
                Next::AskAll(command) => job.answered(self.ask_all(&command)),
                Next::AskAuthority(command) => {
                    job.answered([self.ports[0].command(command).reply]);
                }
                Next::Done(Ok(collected)) => return (collected, None),
                Next::Done(Err(error)) => {
                    let (data_freed, metadata_freed) = job.freed();
                    let nodes_read = job.progress().nodes_read;
                    let freed = Collected {
                        nodes_read,
                        data_freed,
                        metadata_freed,
                        ..Collected::default()
                    };
                    return (freed, Some(error));
                }
            }
            if let Some(under_way) = &mut self.shared.gc().under_way {
                under_way.progress = Some(job.progress());
            }
        }
    }

    /// All at once: what one waits for may be with another.
    fn ask_all(&self, command: &Command) -> Vec<Reply> {
        let asked = self.ports.iter().map(|port| {
            let (answer, answered) = sync_channel(1);
            let command = command.clone();
            port.send(crate::attach::CoreMessage::Command { command, answer });
            answered
        });
        let asked: Vec<_> = asked.collect();
        let reply = |answered: std::sync::mpsc::Receiver<crate::attach::Answer>| {
            answered.recv().expect("a reactor answers what it is asked").reply
        };
        asked.into_iter().map(reply).collect()
    }

    /// Asks the control plane, which deletes snapshots and volumes one after the other: what it has
    /// marked by now waits here, or is in its answer.
    fn what_to_spare(&self, control: &Control) -> Result<Spare, String> {
        let (answer, answered) = sync_channel(1);
        let sent = control.send(move |plane| {
            let _ = answer.send(plane.what_to_spare());
        });
        sent.map_err(|refusal: Refusal| refusal.to_string())?;
        answered.recv().map_err(|_| "the daemon stops".to_owned())?
    }
}

/// Keeps reading below a rate.
struct Pace {
    rate: Option<ByteCount>,
    clock: SystemClock,
    since: Instant,
    nodes: u64,
}

/// What is made up for after a pause in which others had the core.
const BEHIND_MAX: Duration = Duration::from_millis(50);

impl Pace {
    fn keep(&mut self, nodes: u64) {
        let Some(rate) = self.rate else { return };
        let bytes = (nodes - std::mem::replace(&mut self.nodes, nodes)) * BLOCK_SIZE;
        let due = Duration::from_secs_f64(bytes as f64 / rate.get() as f64);
        self.since = self.since.after(due);
        let now = self.clock.now();
        let ahead = self.since.since(now);
        if ahead > Duration::ZERO {
            std::thread::sleep(ahead);
        } else if now.since(self.since) > BEHIND_MAX {
            self.since = now;
        }
    }
}

/// The thread's own: whoever serves guests goes first.
pub(super) fn go_last() {
    if let Err(error) = give_way() {
        tracing::debug!("the thread that frees keeps its priority: {error}");
    }
}
