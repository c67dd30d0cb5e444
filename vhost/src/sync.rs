//! The fence of the exchange with a guest, and, with `--cfg loom`, what a model checker needs to run
//! that exchange (`make loom`).

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::fence;

#[cfg(loom)]
pub(crate) use modelled::fence;

#[cfg(loom)]
pub(crate) mod modelled {
    use std::cell::Cell;

    use loom::sync::atomic::{AtomicU64, Ordering};

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

    /// Bytes of a mapping that a model sees: a small ring.
    const MODELLED: usize = 320;

    /// The integers of a mapping, one at each even offset. Each is read and written in one size only,
    /// as those of a ring are; the mapping's bytes themselves stay unused.
    #[derive(Debug)]
    pub(crate) struct Cells(Vec<AtomicU64>);

    impl Default for Cells {
        fn default() -> Self {
            Self((0..MODELLED / 2).map(|_| AtomicU64::new(0)).collect())
        }
    }

    impl Cells {
        pub(crate) fn load(&self, offset: usize, order: Ordering) -> u64 {
            self.0[offset / 2].load(order)
        }

        pub(crate) fn store(&self, offset: usize, value: u64, order: Ordering) {
            self.0[offset / 2].store(value, order);
        }
    }
}
