//! What the exchanges between threads are made of: as it is, or, with `--cfg loom`, as a model
//! checker can run it (`make loom`).
//!
//! The model explores every order in which two or three threads can meet, with every value that the
//! memory model lets a load see. So that a test can show that it would see a mistake, a model can
//! be told to weaken all fences ([`modelled::weakly`]).

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, fence};

#[cfg(not(loom))]
pub(crate) use crossbeam_queue::ArrayQueue;

#[cfg(loom)]
pub(crate) use loom::sync::atomic::AtomicBool;
#[cfg(loom)]
pub(crate) use modelled::{ArrayQueue, Bell, fence};

#[cfg(not(loom))]
pub(crate) use real::Bell;

#[cfg(not(loom))]
mod real {
    use std::os::fd::{AsRawFd, RawFd};

    use nix::errno::Errno;
    use nix::sys::eventfd::{EfdFlags, EventFd};

    /// Wakes whoever sleeps on its descriptor.
    #[derive(Debug)]
    pub(crate) struct Bell(EventFd);

    impl Bell {
        pub(crate) fn new() -> std::io::Result<Self> {
            let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
            Ok(Self(EventFd::from_flags(flags)?))
        }

        pub(crate) fn ring(&self) {
            match self.0.write(1) {
                // At the counter's limit the bell is ringing as loudly as it can.
                Ok(_) | Err(Errno::EAGAIN) => {}
                Err(error) => panic!("our own eventfd refused to ring: {error}"),
            }
        }

        /// How often it rang since it was silenced last.
        pub(crate) fn silence(&self) -> u64 {
            match self.0.read() {
                Ok(count) => count,
                Err(Errno::EAGAIN) => 0,
                Err(error) => panic!("our own eventfd refused to be read: {error}"),
            }
        }

        pub(crate) fn fd(&self) -> RawFd {
            self.0.as_raw_fd()
        }

        #[cfg(test)]
        pub(crate) fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
            std::os::fd::AsFd::as_fd(&self.0)
        }
    }
}

#[cfg(loom)]
pub(crate) mod modelled {
    use std::cell::Cell;
    use std::os::fd::RawFd;
    use std::sync::Mutex as Unseen;

    use loom::sync::atomic::{AtomicUsize, Ordering};
    use loom::sync::{Condvar, Mutex};

    thread_local! {
        // The threads of a model take turns on one thread of the system.
        static WEAK: Cell<bool> = const { Cell::new(false) };
    }

    /// Runs a model with every fence one step weaker than it is written.
    #[cfg(test)]
    pub(crate) fn weakly(run: impl FnOnce()) {
        struct Strong;
        impl Drop for Strong {
            fn drop(&mut self) {
                WEAK.set(false);
            }
        }
        let _strong = Strong; // Also after a panic, which is what such a run is for.
        WEAK.set(true);
        run();
    }

    /// A fence; one that orders no store before a later load when the model is weak.
    pub(crate) fn fence(order: Ordering) {
        let order = if WEAK.get() { Ordering::AcqRel } else { order };
        loom::sync::atomic::fence(order);
    }

    /// An eventfd. The kernel reads and writes its counter under a lock.
    #[derive(Debug)]
    pub(crate) struct Bell {
        rings: Mutex<u64>,
        rang: Condvar,
    }

    impl Bell {
        pub(crate) fn new() -> std::io::Result<Self> {
            Ok(Self { rings: Mutex::new(0), rang: Condvar::new() })
        }

        pub(crate) fn ring(&self) {
            *self.rings.lock().expect("no holder panics") += 1;
            self.rang.notify_one();
        }

        pub(crate) fn silence(&self) -> u64 {
            std::mem::take(&mut *self.rings.lock().expect("no holder panics"))
        }

        /// Sleeps until it rings. The model calls a sleep that nobody ends a deadlock.
        #[cfg(test)]
        pub(crate) fn wait(&self) {
            let mut rings = self.rings.lock().expect("no holder panics");
            while *rings == 0 {
                rings = self.rang.wait(rings).expect("no holder panics");
            }
        }

        pub(crate) fn fd(&self) -> RawFd {
            -1
        }
    }

    /// crossbeam's bounded queue, step by step and with the same orderings, but for its backing off:
    /// the crate itself cannot be put under the model checker.
    #[derive(Debug)]
    pub(crate) struct ArrayQueue<T> {
        head: AtomicUsize,
        tail: AtomicUsize,
        slots: Vec<Slot<T>>,
        one_lap: usize,
    }

    #[derive(Debug)]
    struct Slot<T> {
        stamp: AtomicUsize,
        /// Who may touch it is what `stamp` decides; the lock is never held by two, and orders
        /// nothing that the model sees.
        value: Unseen<Option<T>>,
    }

    impl<T> ArrayQueue<T> {
        pub(crate) fn new(capacity: usize) -> Self {
            assert!(capacity > 0, "a queue of no messages");
            let slot = |index| Slot { stamp: AtomicUsize::new(index), value: Unseen::new(None) };
            Self {
                head: AtomicUsize::new(0),
                tail: AtomicUsize::new(0),
                slots: (0..capacity).map(slot).collect(),
                one_lap: (capacity + 1).next_power_of_two(),
            }
        }

        fn after(&self, position: usize) -> usize {
            let (index, lap) = (position & (self.one_lap - 1), position & !(self.one_lap - 1));
            if index + 1 < self.slots.len() { position + 1 } else { lap + self.one_lap }
        }

        fn slot(&self, position: usize) -> &Slot<T> {
            &self.slots[position & (self.one_lap - 1)]
        }

        pub(crate) fn push(&self, value: T) -> Result<(), T> {
            let mut tail = self.tail.load(Ordering::Relaxed);
            loop {
                let slot = self.slot(tail);
                let stamp = slot.stamp.load(Ordering::Acquire);
                if tail == stamp {
                    let next = self.after(tail);
                    let won =
                        self.tail.compare_exchange(tail, next, Ordering::SeqCst, Ordering::Relaxed);
                    match won {
                        Ok(_) => {
                            *slot.value.try_lock().expect("the slot is ours") = Some(value);
                            slot.stamp.store(tail + 1, Ordering::Release);
                            return Ok(());
                        }
                        Err(other) => tail = other,
                    }
                    continue;
                }
                if stamp + self.one_lap == tail + 1 {
                    // Its own, which no test weakens.
                    loom::sync::atomic::fence(Ordering::SeqCst);
                    if self.head.load(Ordering::Relaxed) + self.one_lap == tail {
                        return Err(value);
                    }
                }
                loom::thread::yield_now();
                tail = self.tail.load(Ordering::Relaxed);
            }
        }

        pub(crate) fn pop(&self) -> Option<T> {
            let mut head = self.head.load(Ordering::Relaxed);
            loop {
                let slot = self.slot(head);
                let stamp = slot.stamp.load(Ordering::Acquire);
                if head + 1 == stamp {
                    let next = self.after(head);
                    let won =
                        self.head.compare_exchange(head, next, Ordering::SeqCst, Ordering::Relaxed);
                    match won {
                        Ok(_) => {
                            let value = slot.value.try_lock().expect("the slot is ours").take();
                            slot.stamp.store(head + self.one_lap, Ordering::Release);
                            return Some(value.expect("its stamp says that it is there"));
                        }
                        Err(other) => head = other,
                    }
                    continue;
                }
                if stamp == head {
                    loom::sync::atomic::fence(Ordering::SeqCst);
                    if self.tail.load(Ordering::Relaxed) == head {
                        return None;
                    }
                }
                loom::thread::yield_now();
                head = self.head.load(Ordering::Relaxed);
            }
        }

        pub(crate) fn is_empty(&self) -> bool {
            let head = self.head.load(Ordering::SeqCst);
            let tail = self.tail.load(Ordering::SeqCst);
            tail == head
        }
    }
}
