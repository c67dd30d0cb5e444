//! Looking at a world from outside at each of its instants.

use std::fmt;

use super::World;

/// Called after every step in which a write or flush was queued or has completed: between two such
/// steps, no power cut differs from one at the first.
pub(super) struct Observer(Box<dyn FnMut(&mut World)>);

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}

/// What tells instants apart.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Progress {
    queued: u64,
    in_flight: usize,
}

impl World {
    /// Calls `observer` at every instant at which a power failure may leave something new, until
    /// [`World::stop_observing`].
    pub fn observe_instants(&mut self, observer: impl FnMut(&mut Self) + 'static) {
        self.observer = Some(Observer(Box::new(observer)));
    }

    /// Ends [`World::observe_instants`].
    pub fn stop_observing(&mut self) {
        self.observer = None;
    }

    pub(super) fn tell_observer(&mut self) {
        let Some(mut observer) = self.observer.take() else { return };
        let counters = self.disk.counters();
        let now = Progress {
            queued: counters.writes + counters.flushes,
            in_flight: self.disk.in_flight(),
        };
        if std::mem::replace(&mut self.progress, now) != now && !self.disk.stopped() {
            observer.0(self);
        }
        self.observer = Some(observer);
    }
}
