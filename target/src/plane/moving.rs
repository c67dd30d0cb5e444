//! Moving a volume from one reactor to another while its guest goes on (docs/decisions/0018).
//!
//! The volume's queues are taken off their core, once what they have in flight has ended; its home makes
//! everything durable and hands it over; the other reactor opens it and polls the queues from then on. Its
//! guest's requests wait in the rings meanwhile, for as long as a flush takes and a little more.
//!
//! What fails leaves the volume where it was. One that can be opened nowhere any more is detached.

use super::attachment::Detached;
use super::{Answered, ControlPlane, Served, refuse_command};
use crate::api::types::VolumeView;
use crate::api::{Refusal, RefusalKind};
use crate::attach::{CoreMessage, Limiter};
use crate::balance::{Balancer, Counted, Move, cost};
use crate::cli::output;
use crate::config::Balance;
use bessel_mapping::request::{Command, CommandError, HandedOver, Reply, VolumeHandle, VolumeId};
use std::sync::Arc;

/// Where a volume is open after an attempt to move it.
enum Now {
    At { home: usize, handle: VolumeHandle },
    Nowhere(Box<HandedOver>),
}

/// What an attempt has come to.
struct Attempt {
    now: Now,
    refused: Option<Refusal>,
}

/// Who moves volumes by load.
pub(super) struct Balancing {
    balance: Balance,
    balancer: Balancer,
}

impl Balancing {
    pub(super) fn new(balance: Balance) -> Self {
        Self { balance, balancer: Balancer::default() }
    }
}

impl ControlPlane {
    /// Moves a volume to the reactor on a core, where it stays.
    pub(crate) fn move_volume(&mut self, name: &str, core: usize) -> Answered<VolumeView> {
        let (id, _, home) = self.find_served(name)?;
        let target = self.homes.iter().position(|home| home.core == core).ok_or_else(|| {
            let cores: Vec<String> = self.homes.iter().map(|home| home.core.to_string()).collect();
            Refusal::malformed(format!(
                "no reactor runs on core {core}, but on {}; `reactors.cores` in the configuration says \
                 where they run",
                cores.join(", ")
            ))
        })?;
        if target != home {
            let pause = self.relocate(id, target)?;
            tracing::info!(
                volume = name,
                "moved to the reactor on core {core}; requests waited for {pause}"
            );
        }
        self.served.get_mut(&id).expect("it is served").placed_by_hand = true;
        self.show_volume(name)
    }

    /// Moves a volume that is served to another reactor, and tells for how long its guest's requests had to
    /// wait for that.
    fn relocate(&mut self, id: VolumeId, target: usize) -> Answered<String> {
        let Served { handle, home, queues, ref host, .. } = self.served[&id];
        let host = Arc::clone(host);
        self.placement.reserve(target, queues).map_err(|_| {
            let core = self.homes[target].core;
            Refusal::conflict(format!(
                "the reactor on core {core} has no room for {queues} more queues; move or delete volumes \
                 that it serves"
            ))
        })?;
        // So that little is left to flush while the guest waits. What has failed is told by what follows.
        let _ = self.ask(home, Command::FlushDevice);
        self.schedules.hold(id);
        let paused = self.clock.now();
        let taken = host.take_queues();
        let visitors = std::mem::take(&mut self.served_mut(id).visitors);
        self.end_visits(visitors);
        let Attempt { now, refused } = self.pass_on(id, (home, handle), target);
        match now {
            Now::At { home: new, handle } => {
                let limited = self.served[&id].limited.limits.is_some();
                let visitors = self.begin_visits((new, handle), queues, limited);
                let ways = self.ways((new, handle), &visitors);
                self.placement.remove(if new == target { home } else { target }, queues);
                let served = self.served.get_mut(&id).expect("it is served");
                (served.home, served.handle, served.visitors) = (new, handle, visitors);
                let port = self.homes[new].port.clone();
                taken.settle(ways);
                self.schedules.go_on(id, handle, port);
            }
            Now::Nowhere(handed) => {
                self.placement.remove(target, queues);
                drop(taken);
                self.lost_home(id, handed, refused.as_ref());
            }
        }
        let pause = self.clock.now().since(paused).as_nanos() as u64;
        refused.map_or_else(|| Ok(output::duration(pause)), Err)
    }

    /// Has one reactor hand the volume over and another open it, or the first one again.
    fn pass_on(
        &mut self,
        id: VolumeId,
        (home, handle): (usize, VolumeHandle),
        target: usize,
    ) -> Attempt {
        let handed = match self.homes[home].port.command(Command::HandOver { volume: handle }).reply
        {
            Reply::HandedOver(handed) => handed,
            Reply::Failed(error) => {
                let refused = Some(self.not_moved(id, home, &refuse_command(error)));
                return Attempt { now: Now::At { home, handle }, refused };
            }
            reply => unreachable!("handing a volume over was answered with {reply:?}"),
        };
        // Its handle may be another volume's from here on.
        let take = |answer| CoreMessage::TakeLimits { volume: handle, answer };
        let limiter: Option<Box<Limiter>> = self.homes[home].port.ask(take);
        let (now, refused) = match self.take_over(target, handed) {
            Ok(handle) => (Now::At { home: target, handle }, None),
            Err((error, handed)) => match self.take_over(home, handed) {
                Ok(handle) => {
                    let refused = self.not_moved(id, home, &refuse_command(error));
                    (Now::At { home, handle }, Some(refused))
                }
                Err((again, handed)) => {
                    let name = &handed.record.name;
                    let refused = Refusal::new(
                        RefusalKind::Damaged,
                        format!(
                            "volume {name:?} could be opened neither on core {} ({error}) nor again on core \
                             {} ({again}); it is detached, with all that was written to it; check the device, \
                             then `bessel volume attach {name}`",
                            self.homes[target].core, self.homes[home].core
                        ),
                    );
                    (Now::Nowhere(handed), Some(refused))
                }
            },
        };
        if let (Now::At { home, handle: volume }, Some(limiter)) = (&now, limiter) {
            let volume = *volume;
            self.homes[*home].port.send(CoreMessage::PutLimits { volume, limiter });
        }
        Attempt { now, refused }
    }

    fn take_over(
        &self,
        home: usize,
        handed: Box<HandedOver>,
    ) -> Result<VolumeHandle, (CommandError, Box<HandedOver>)> {
        match self.homes[home].port.command(Command::TakeOver(handed)).reply {
            Reply::Opened(handle) => Ok(handle),
            Reply::NotTakenOver { error, volume } => Err((error, volume)),
            reply => unreachable!("taking a volume over was answered with {reply:?}"),
        }
    }

    fn not_moved(&self, id: VolumeId, home: usize, why: &Refusal) -> Refusal {
        let (name, core) = (self.name_of_present(id).unwrap_or_default(), self.homes[home].core);
        let what = format!("volume {name:?} stays on core {core}: {why}");
        Refusal::new(why.kind, what)
    }

    /// A volume that is open nowhere: its guest sees its disk go.
    fn lost_home(&mut self, id: VolumeId, handed: Box<HandedOver>, refused: Option<&Refusal>) {
        self.schedules.end(id);
        let mut served = self.served.remove(&id).expect("it was served");
        // Its queues are not on a core any more, and it ends by taking them back.
        drop(served.server.take());
        let reason = format!("it could not be moved: {}", refused.map_or("", |it| &it.message));
        tracing::error!(volume = handed.record.name, "detached: {reason}");
        let home = served.home;
        let service = served.into_service();
        let (cache, current) = (handed.record.cache, Some(handed.current()));
        self.detached.insert(id, Detached { home, service, cache, current, reason });
        self.kept.insert(id, Box::new(handed.log));
    }

    /// Moves a volume if some reactor has much more to do than another.
    pub(crate) fn balance_if_due(&mut self) {
        if self.balancing.balance == Balance::Off || self.homes.len() < 2 {
            return;
        }
        let busy = self.homes.iter().map(|home| home.counters.reactor.busy_ns.get()).collect();
        let mut balancer = std::mem::take(&mut self.balancing.balancer);
        let found = balancer.look(self.clock.now(), busy, || self.counted());
        self.balancing.balancer = balancer;
        let Some(Move { volume: id, source, target }) = found else { return };
        let Some(name) = self.name_of_present(id) else { return };
        let [from, to] = [source, target].map(|home| self.homes[home].core);
        match self.relocate(id, target) {
            Ok(pause) => tracing::info!(
                volume = name,
                "moved from core {from} to core {to}, which has less to do; requests waited for {pause}; \
                 `reactors.balance: off` leaves volumes where they are"
            ),
            Err(refusal) => {
                tracing::warn!(
                    volume = name,
                    "stays on core {from}, which has much to do: {refusal}"
                );
            }
        }
    }

    /// What each open volume has asked for.
    fn counted(&self) -> Option<Vec<Counted>> {
        let mut all = Vec::new();
        for home in 0..self.homes.len() {
            for (volume, counters) in self.shard_stats(home).ok()?.volumes {
                let served = self.served.get(&volume);
                // One that several serve has what others could give it.
                let movable = served
                    .is_some_and(|served| !served.placed_by_hand && served.visitors.is_empty());
                all.push(Counted { volume, home, cost: cost(&counters), movable });
            }
        }
        Some(all)
    }
}
