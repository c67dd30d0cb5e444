//! The queues of one volume on several reactors (docs/decisions/0019): its home shares it, others visit it.
//!
//! A volume with one queue is served at its home alone, and so is one with limits, which one reactor keeps.

use super::{ControlPlane, Served};
use crate::attach::Way;
use crate::config::Spread;
use bessel_mapping::request::{Command, Reply, VolumeHandle, VolumeId};

/// A reactor that serves queues of a volume whose home is another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Visitor {
    /// Index of the reactor.
    pub(super) home: usize,
    /// What the volume is called there.
    visit: VolumeHandle,
    /// Queues that room is kept for there.
    queues: u16,
}

impl ControlPlane {
    /// Has other reactors made ready to serve queues of a volume that is open at its home. None where one
    /// is enough, or they have no room.
    pub(super) fn begin_visits(
        &mut self,
        (home, volume): (usize, VolumeHandle),
        queues: u16,
        limited: bool,
    ) -> Vec<Visitor> {
        let mut visitors = Vec::new();
        let count = self.homes.len().min(usize::from(queues));
        if self.spread == Spread::Off || limited || count < 2 {
            return visitors;
        }
        let shards = self.homes.len();
        let shared = match self.ask(home, Command::Share { volume, shards }) {
            Ok(Reply::Shared(shared)) => shared,
            Ok(reply) => unreachable!("sharing was answered with {reply:?}"),
            Err(refusal) => {
                tracing::warn!("all queues stay on core {}: {refusal}", self.homes[home].core);
                return visitors;
            }
        };
        let others = (1..count).map(|step| (home + step) % shards).collect();
        let (others, each) = self.placement.reserve_visits(others, queues);
        for other in others {
            match self.ask(other, Command::Visit(shared.clone())) {
                Ok(Reply::Opened(visit)) => {
                    visitors.push(Visitor { home: other, visit, queues: each });
                }
                reply => unreachable!("visiting was answered with {reply:?}"),
            }
        }
        visitors
    }

    /// Ends visits. None of their queues is on a core any more.
    pub(super) fn end_visits(&mut self, visitors: Vec<Visitor>) {
        for Visitor { home, visit, queues } in visitors {
            if let Err(refusal) = self.ask(home, Command::EndVisit { visit }) {
                unreachable!("ending a visit was answered with: {refusal}");
            }
            self.placement.remove(home, queues);
        }
    }

    /// The reactors that poll queues of a volume, its home first.
    pub(super) fn ways(
        &self,
        (home, volume): (usize, VolumeHandle),
        visitors: &[Visitor],
    ) -> Vec<Way> {
        let way = |home: usize, volume| Way { volume, port: self.homes[home].port.clone() };
        let others = visitors.iter().map(|visitor| way(visitor.home, visitor.visit));
        std::iter::once(way(home, volume)).chain(others).collect()
    }

    /// Puts a volume's queues where they belong, if that is elsewhere than where they are: it has got
    /// limits, or has none any more.
    pub(super) fn spread_anew(&mut self, id: VolumeId) {
        let Served { handle, home, queues, ref host, ref visitors, ref limited, .. } =
            self.served[&id];
        let (host, limited) = (std::sync::Arc::clone(host), limited.limits.is_some());
        let alone = limited || self.spread == Spread::Off || queues < 2 || self.homes.len() < 2;
        if alone == visitors.is_empty() {
            return;
        }
        let taken = host.take_queues();
        let before = std::mem::take(&mut self.served_mut(id).visitors);
        self.end_visits(before);
        let visitors = self.begin_visits((home, handle), queues, limited);
        taken.settle(self.ways((home, handle), &visitors));
        self.served_mut(id).visitors = visitors;
    }

    pub(super) fn served_mut(&mut self, id: VolumeId) -> &mut Served {
        self.served.get_mut(&id).expect("it is served")
    }
}
