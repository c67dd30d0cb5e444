//! Limits of volumes: which has which, and telling the reactors that hold guests to them.
//!
//! A volume of the configuration has at each start the limits that stand there, or none. Those that are
//! set by the API count until the daemon ends, as schedules do: the store says nothing of either.

use super::{Answered, ControlPlane, Served};
use crate::api::Refusal;
use crate::api::types::VolumeView;
use crate::attach::{CoreMessage, Throttled};
use crate::limits::Limits;
use bessel_mapping::request::VolumeId;
use std::sync::Arc;

/// A volume's limits, if it has some, and what they have come to since it was opened.
#[derive(Default, Debug)]
pub(super) struct Limited {
    pub(super) limits: Option<Limits>,
    throttled: Arc<Throttled>,
}

impl Limited {
    pub(super) fn new(limits: Option<Limits>) -> Self {
        Self { limits, throttled: Arc::default() }
    }
}

impl ControlPlane {
    /// Gives a volume limits in the place of those it has, or takes them away.
    pub(crate) fn set_limits(
        &mut self,
        name: &str,
        limits: Option<Limits>,
    ) -> Answered<VolumeView> {
        if let Some(Err(error)) = limits.as_ref().map(Limits::check) {
            return Err(Refusal::malformed(error));
        }
        let (id, ..) = self.find_served(name)?;
        let served = self.served.get_mut(&id).expect("it was found above");
        served.limited.limits = limits;
        // In this order: queues that come home find the limits there.
        self.begin_limits(id);
        self.spread_anew(id);
        self.show_volume(name)
    }

    /// Tells the reactor of a volume which limits it has, if any.
    pub(super) fn begin_limits(&self, id: VolumeId) {
        let served = &self.served[&id];
        let Limited { limits, throttled } = &served.limited;
        let limits = limits.map(|limits| (limits, Arc::clone(throttled)));
        let message = CoreMessage::Limit { volume: served.handle, limits };
        self.homes[served.home].port.send(message);
    }

    /// Has the reactor forget the limits of a volume that was just closed, before its handle can be
    /// another's.
    pub(super) fn end_limits(&self, closed: &Served) {
        let message = CoreMessage::Limit { volume: closed.handle, limits: None };
        self.homes[closed.home].port.send(message);
    }

    /// Nanoseconds for which guests of an open volume had to wait.
    pub(super) fn throttled_ns(&self, id: VolumeId) -> u64 {
        self.served.get(&id).map_or(0, |served| served.limited.throttled.nanoseconds.get())
    }
}
