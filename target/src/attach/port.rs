//! How the control path speaks to a core: what it may send, and waiting for the answer.

use super::limiter::{Limiter, Throttled};
use super::orders::Order;
use crate::limits::Limits;
use bessel_mapping::message::Message;
use bessel_mapping::request::{Command, Reply, VolumeHandle};
use bessel_reactor::inbox::{Full, Sender};
use bessel_vhost::Queue;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

/// Pause before another try when an inbox is full. The reactor empties it within microseconds.
const FULL_PAUSE: Duration = Duration::from_micros(100);

/// Names an attached queue on its core.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct QueueSlot(pub(crate) u32);

/// What a core may be sent.
///
/// Answers go through channels with room for them, made by the asker: the core neither waits nor
/// allocates to give one.
pub(crate) enum CoreMessage {
    /// Run this and say what came of it.
    Command { command: Command, answer: SyncSender<Answer> },
    /// Poll this queue.
    Start(Box<Start>),
    /// Drain this queue and hand it back.
    Stop { slot: QueueSlot, answer: SyncSender<Queue> },
    /// Pop nothing more from the volume's queues, and say when all that was popped has ended.
    Hold { volume: VolumeHandle, answer: SyncSender<()> },
    /// Go on with the volume's queues.
    Release { volume: VolumeHandle },
    /// Hold the volume's guest to these limits in the place of those it has, or to none.
    Limit { volume: VolumeHandle, limits: Option<(Limits, Arc<Throttled>)> },
    /// Forget the volume's limits, and hand over how they stand, if it has any.
    TakeLimits { volume: VolumeHandle, answer: SyncSender<Option<Box<Limiter>>> },
    /// Hold the volume's guest to limits that stand so.
    PutLimits { volume: VolumeHandle, limiter: Box<Limiter> },
    /// Do this and send it back.
    Order(Box<Order>),
    /// From another core's shard.
    Shard(Message),
    /// End the loop. Sent last, when no queue is attached.
    Finish,
}

/// A queue on its way to a core.
pub(crate) struct Start {
    pub(crate) queue: Queue,
    pub(crate) volume: VolumeHandle,
    pub(crate) answer: SyncSender<QueueSlot>,
}

/// The core has more messages waiting than it takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct InboxFull;

/// A reply of the shard.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) reply: Reply,
    /// From the moment the command reached the reactor until the shard had replied.
    pub(crate) latency: Duration,
}

/// The control path's end of a core's inbox. Clones speak to the same core.
#[derive(Clone)]
pub(crate) struct CorePort {
    sender: Sender<CoreMessage>,
}

impl CorePort {
    pub(crate) fn new(sender: Sender<CoreMessage>) -> Self {
        Self { sender }
    }

    /// Sends, waiting for room.
    pub(crate) fn send(&self, mut message: CoreMessage) {
        while let Err(Full(returned)) = self.sender.send(message) {
            message = returned;
            std::thread::sleep(FULL_PAUSE);
        }
    }

    /// Sends, unless there is no room now.
    ///
    /// # Errors
    /// When there is none: nothing is sent.
    pub(crate) fn try_send(&self, message: CoreMessage) -> Result<(), InboxFull> {
        self.sender.send(message).map_err(|_| InboxFull)
    }

    /// Sends a message that carries a channel for its answer, and waits for that.
    ///
    /// # Panics
    /// When the reactor has ended: it had panicked, since it is only told to finish last of all.
    pub(crate) fn ask<T>(&self, message: impl FnOnce(SyncSender<T>) -> CoreMessage) -> T {
        let (answer, answered) = sync_channel(1);
        self.send(message(answer));
        answered.recv().expect("a reactor answers every message before it ends")
    }

    /// Runs a command on the core's shard.
    pub(crate) fn command(&self, command: Command) -> Answer {
        self.ask(|answer| CoreMessage::Command { command, answer })
    }
}
