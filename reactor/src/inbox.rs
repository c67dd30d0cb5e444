//! Bounded messages from other cores, and the bell that wakes a sleeping one.
//!
//! Any number of senders, one receiver. Sending takes no lock and makes no system call while the
//! receiver polls; only a receiver that said it will sleep is woken, through an eventfd that it
//! watches while asleep ([`Inbox::fd`]). What must not be broken is that a message is never left
//! lying with nobody awake. Sender and receiver each write one thing and then look at the other's:
//!
//! ```text
//! sender                        receiver (prepare_sleep)
//! 1 push the message            1 set `sleeping`
//! 2 fence (SeqCst)              2 fence (SeqCst)
//! 3 `sleeping`? ring the bell   3 a message? do not sleep
//! ```
//!
//! The fences are totally ordered. If the sender's comes first, the receiver sees the message at
//! its step 3; if the receiver's does, the sender sees the flag at its own. Without the fences both
//! could read the old value, each write still in its core's store buffer.
//!
//! All atomics of this exchange are in this file, and `make loom` puts it under a model checker,
//! with and without the fences (`mod models` below).

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::sync::{ArrayQueue, AtomicBool, Bell, fence};

/// The inbox has no room; the message comes back. Its sender keeps it and tries again later.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the inbox is full")]
pub struct Full<M>(pub M);

#[derive(Debug)]
struct Shared<M> {
    queue: ArrayQueue<M>,
    /// The receiver sleeps, or is about to, and nobody has rung yet.
    sleeping: AtomicBool,
    bell: Bell,
}

/// Sends to one inbox. Clones send to the same.
#[derive(Debug)]
pub struct Sender<M> {
    shared: Arc<Shared<M>>,
}

/// Receives what its senders send.
#[derive(Debug)]
pub struct Inbox<M> {
    shared: Arc<Shared<M>>,
}

/// Makes an inbox with room for `capacity` messages. All its memory is taken here.
///
/// Fails when the process has no file descriptor left.
///
/// # Panics
/// When `capacity` is zero.
pub fn inbox<M>(capacity: usize) -> std::io::Result<(Sender<M>, Inbox<M>)> {
    let shared = Arc::new(Shared {
        queue: ArrayQueue::new(capacity),
        sleeping: AtomicBool::new(false),
        bell: Bell::new()?,
    });
    Ok((Sender { shared: Arc::clone(&shared) }, Inbox { shared }))
}

impl<M> Clone for Sender<M> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<M> Sender<M> {
    /// Sends a message, waking the receiver if it sleeps. Messages of one sender arrive in order.
    pub fn send(&self, message: M) -> Result<(), Full<M>> {
        self.shared.queue.push(message).map_err(Full)?;
        fence(Ordering::SeqCst);
        // The load keeps the common case free of a shared write; the swap makes one of many
        // senders ring.
        let sleeping = &self.shared.sleeping;
        if sleeping.load(Ordering::Relaxed) && sleeping.swap(false, Ordering::Relaxed) {
            self.shared.bell.ring();
        }
        Ok(())
    }
}

impl<M> Inbox<M> {
    /// Takes the oldest message.
    pub fn pop(&mut self) -> Option<M> {
        self.shared.queue.pop()
    }

    /// True when there is no message at this moment.
    pub fn is_empty(&self) -> bool {
        self.shared.queue.is_empty()
    }

    /// Asks to be woken. False when messages came meanwhile: do not sleep. Either way the next
    /// thing to call is [`Inbox::woken`].
    pub fn prepare_sleep(&mut self) -> bool {
        // An exchange, though nothing is done with what it gives, so that it comes after the exchange
        // of any sender that has read what `woken` stored: the model checker knows no other way to
        // tell. It costs what a store and the fence cost.
        self.shared.sleeping.swap(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.shared.queue.is_empty()
    }

    /// No longer wants to be woken: the receiver polls again.
    ///
    /// Silences the bell each time, not only when it rang: a sender may have taken the flag and
    /// ring late, after we woke for another reason. That ring costs one short sleep; left
    /// unsilenced it would cost every later one.
    pub fn woken(&mut self) {
        self.shared.sleeping.store(false, Ordering::Relaxed);
        self.shared.bell.silence();
    }

    /// Becomes readable when a sleeping receiver is to wake. Watch it, never read it.
    pub fn fd(&self) -> RawFd {
        self.shared.bell.fd()
    }
}

#[cfg(test)]
#[cfg(not(loom))] // What they make is not the model's.
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    /// Whether the bell rings; waits for it as long as `timeout` says.
    fn rings<M>(inbox: &Inbox<M>, timeout: PollTimeout) -> bool {
        let fd = inbox.shared.bell.as_fd();
        poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout).unwrap() == 1
    }

    #[test]
    fn a_full_inbox_hands_the_message_back() {
        let (sender, mut inbox) = inbox(2).unwrap();
        sender.send(1).unwrap();
        sender.clone().send(2).unwrap();
        assert_eq!(sender.send(3), Err(Full(3)));
        assert_eq!((inbox.pop(), inbox.pop(), inbox.pop()), (Some(1), Some(2), None));
    }

    #[test]
    fn only_a_sleeper_is_rung_for_and_only_once() {
        let (sender, mut inbox) = inbox(8).unwrap();
        sender.send(1).unwrap();
        assert!(!rings(&inbox, PollTimeout::ZERO), "nobody sleeps");
        assert!(!inbox.prepare_sleep(), "a message is waiting");
        inbox.woken();
        inbox.pop();
        assert!(inbox.prepare_sleep());
        sender.send(2).unwrap();
        sender.send(3).unwrap();
        assert!(rings(&inbox, PollTimeout::ZERO));
        assert_eq!(inbox.shared.bell.silence(), 1);
        inbox.woken();
        assert!(!rings(&inbox, PollTimeout::ZERO));
    }

    #[test]
    fn a_late_ring_does_not_keep_the_receiver_awake() {
        let (_sender, mut inbox) = inbox::<()>(1).unwrap();
        assert!(inbox.prepare_sleep());
        inbox.woken();
        inbox.shared.bell.ring();
        assert!(inbox.prepare_sleep());
        assert!(rings(&inbox, PollTimeout::ZERO));
        inbox.woken();
        assert!(!rings(&inbox, PollTimeout::ZERO));
    }

    /// Two senders against a receiver that sleeps whenever it may: a lost wake-up hangs it for ever.
    #[test]
    fn every_message_wakes_a_receiver_that_sleeps_at_every_chance() {
        const MESSAGES: u64 = 50_000;
        let (sender, mut inbox) = inbox(4).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                let sender = sender.clone();
                scope.spawn(move || {
                    for number in 0..MESSAGES {
                        while sender.send(number).is_err() {
                            std::thread::yield_now();
                        }
                    }
                });
            }
            let (mut count, mut sum) = (0, 0);
            while count < 2 * MESSAGES {
                if let Some(number) = inbox.pop() {
                    count += 1;
                    sum += number;
                } else {
                    if inbox.prepare_sleep() {
                        assert!(rings(&inbox, PollTimeout::NONE));
                    }
                    inbox.woken();
                }
            }
            assert_eq!(sum, MESSAGES * (MESSAGES - 1));
        });
    }
}

/// Every meeting of senders with a receiver that sleeps at every chance: `make loom`. A wake-up that
/// is lost leaves the receiver asleep for ever, which the model reports as a deadlock.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::sync::modelled::weakly;
    use loom::model::Builder;
    use loom::thread;

    /// Senders of one message each, and a receiver that takes them all.
    fn meet(senders: u64) {
        let (sender, mut inbox) = inbox(2).expect("a model");
        let threads: Vec<_> = (0..senders)
            .map(|number| {
                let sender = sender.clone();
                thread::spawn(move || sender.send(1 << number).expect("there is room"))
            })
            .collect();
        receive(&mut inbox, senders);
        threads.into_iter().for_each(|thread| thread.join().expect("it does not panic"));
    }

    fn receive(inbox: &mut Inbox<u64>, messages: u64) {
        let (mut count, mut sum) = (0, 0);
        while count < messages {
            match inbox.pop() {
                Some(message) => (count, sum) = (count + 1, sum + message),
                None => {
                    if inbox.prepare_sleep() {
                        inbox.shared.bell.wait();
                    }
                    inbox.woken();
                }
            }
        }
        assert_eq!(sum, (1 << messages) - 1, "each message once");
    }

    #[test]
    fn a_message_always_wakes_a_receiver_that_sleeps() {
        loom::model(|| meet(1));
    }

    /// Every order with at most three changes from a thread that could go on.
    #[test]
    fn one_sender_may_send_again_while_the_receiver_wakes() {
        let mut builder = Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(|| {
            let (sender, mut inbox) = inbox(2).expect("a model");
            let thread = thread::spawn(move || {
                sender.send(1).expect("there is room");
                sender.send(2).expect("there is room");
            });
            receive(&mut inbox, 2);
            thread.join().expect("it does not panic");
        });
    }

    /// Three threads, and as many changes.
    #[test]
    fn two_senders_may_meet_at_the_bell() {
        let mut builder = Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(|| meet(2));
    }

    /// What the fences are for: without them, the model finds the wake-up that is lost.
    #[test]
    #[should_panic(expected = "deadlock")]
    fn without_the_fences_a_wake_up_is_lost() {
        weakly(|| loom::model(|| meet(1)));
    }
}
