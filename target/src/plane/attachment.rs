//! Detaching a volume and attaching it again while the others go on: the way out for a volume that
//! has failed, and a way to take any volume from its guest.
//!
//! Detaching stops the volume's server, which drains its queues, and takes the volume out of its
//! reactor's memory: committed, or as the device has it once it has failed. Attaching reads record,
//! log and root from the device anew. Nothing on the device says that a volume is detached, since a
//! device that fails could not be told: a daemon that starts attaches all volumes.

use super::open::Service;
use super::{Answered, ControlPlane, refuse_command, refuse_plan};
use crate::api::Refusal;
use crate::api::types::{State, VolumeView};
use bessel_mapping::request::{CacheMode, Command, CurrentTree, Reply, VolumeHandle, VolumeId};
use bessel_mapping::store;
use bessel_reactor::device::{FileDevice, OpenOptions};

/// A volume that was detached.
pub(crate) struct Detached {
    /// Its home, now and when it is attached. Its queues keep their place there.
    pub(super) home: usize,
    pub(super) service: Service,
    pub(super) cache: CacheMode,
    /// Its current tree; none when it had failed, so that nobody knows what the device holds.
    pub(super) current: Option<CurrentTree>,
    /// Why it was detached, or could not be attached.
    pub(super) reason: String,
}

/// What guests can do with a volume, and if not everything, why, and what to do.
#[derive(Default)]
pub(super) struct Condition {
    pub(super) state: State,
    pub(super) reason: Option<String>,
    pub(super) remedy: Option<String>,
}

impl ControlPlane {
    /// Stops serving a volume. Guests that are connected see their disk go, and come back once it is
    /// attached.
    pub(crate) fn detach_volume(&mut self, name: &str) -> Answered<VolumeView> {
        let (id, handle, home) = self.find_served(name)?;
        let served = self.served.get_mut(&id).expect("it was found above");
        // With its socket gone nobody connects, and its queues have drained when this returns.
        drop(served.server.take());
        // Its handle may be another volume's soon.
        self.schedules.end(id);
        let info = self.info(id)?;
        let (failed, log) = match self.ask(home, Command::Close { volume: handle })? {
            Reply::Closed { failed, log } => (failed, log),
            reply => unreachable!("closing a volume was answered with {reply:?}"),
        };
        let mut served = self.served.remove(&id).expect("it was found above");
        self.end_limits(&served);
        self.end_visits(std::mem::take(&mut served.visitors));
        let well = failed.is_none();
        let reason = match failed {
            Some(why) => format!("an operator detached it after it had failed ({why})"),
            None => "an operator detached it".to_owned(),
        };
        tracing::info!(volume = name, "detached: {reason}");
        let service = served.into_service();
        let cache = info.cache;
        let current = Some(info.current).filter(|_| well);
        self.detached.insert(id, Detached { home, service, cache, current, reason });
        // As it was last known.
        self.kept.insert(id, log);
        self.show_volume(name)
    }

    /// Reads a volume anew from the device and serves it: one that was detached, or could not be
    /// opened when the daemon started.
    pub(crate) fn attach_volume(&mut self, name: &str) -> Answered<VolumeView> {
        let id = self.find(name)?.id;
        if self.served.contains_key(&id) {
            return Err(Refusal::conflict(format!(
                "volume {name:?} is attached; to have it read anew, `bessel volume detach` it first"
            )));
        }
        if let Some(refusal) = self.still_importing(id) {
            return Err(refusal);
        }
        if self.withheld.contains(&id) {
            return Err(Refusal::conflict(format!(
                "volume {name:?} waits for what a killed daemon had not made durable, which could \
                 not be restored; mend what the log says and start the daemon again"
            )));
        }
        self.refresh_device()?;
        let attached = self.open_again(id);
        let (home, handle, service) = attached.inspect_err(|refusal| {
            if let Some(detached) = self.detached.get_mut(&id) {
                detached.reason = format!("it could not be attached: {refusal}");
            }
        })?;
        self.detached.remove(&id);
        self.kept.remove(id);
        self.forest.forget(id);
        self.serve(id, home, handle, service).map_err(|refusal| {
            Refusal::failed(format!("volume {name:?} is attached but not served: {refusal}"))
        })?;
        let name = self.name_of_present(id).expect("it was just opened");
        tracing::info!(volume = name, "attached");
        self.show_volume(&name)
    }

    /// Makes sure that what is read from the device now is what it holds: after a failed flush its
    /// cache may show what was never written.
    fn refresh_device(&mut self) -> Answered<()> {
        // An open file hears of a failure once, so the first flush may fail for an old one. Then all
        // flush once more: what that failure puts in doubt, also on reactors that had flushed before
        // it, they have latched after that.
        let mut failed = false;
        for home in 0..self.homes.len() {
            failed |= self.ask(home, Command::FlushDevice).is_err();
        }
        if failed {
            for home in 0..self.homes.len() {
                self.ask(home, Command::FlushDevice)?;
            }
        }
        for home in 0..self.homes.len() {
            let failed = self.shard_stats(home)?.latched;
            let names = failed.into_iter().filter_map(|id| self.name_of_present(id));
            let names: Vec<String> = names.collect();
            if !names.is_empty() {
                return Err(Refusal::conflict(format!(
                    "failed volumes still read what the device may have lost; `bessel volume detach` \
                     them first: {}",
                    names.join(", ")
                )));
            }
        }
        for home in 0..self.homes.len() {
            self.ask(home, Command::Refresh)?;
        }
        Ok(())
    }

    fn open_again(&mut self, id: VolumeId) -> Answered<(usize, VolumeHandle, Service)> {
        let slot = self.directory.get(id).expect("the caller found it").slot;
        let failed = |error: &dyn std::error::Error| Refusal::failed(crate::one_line(error));
        let options = OpenOptions { depth: 64, read_only: true, ..OpenOptions::default() };
        let mut device =
            FileDevice::open(&self.store.device, &options).map_err(|error| failed(&error))?;
        let entry = store::reread(&mut device, &self.store.opened, slot, id)
            .map_err(|error| failed(&error))?;
        let (name, deleted) = (entry.record.name.clone(), entry.record.deleted);
        self.directory.reread(entry.clone()).map_err(refuse_plan)?;
        if deleted {
            if let Some(Detached { home, service, .. }) = self.detached.remove(&id) {
                self.placement.remove(home, service.queues);
            }
            return Err(Refusal::not_found(format!(
                "volume {name:?} is gone: the device has its deletion"
            )));
        }
        let command = Command::Open(Box::new(entry));
        let Some(Detached { home, service, .. }) = self.detached.get(&id) else {
            let by_default = || Service::by_default(&name, self.socket_directory());
            let service = self.unopened.get(&id).cloned().unwrap_or_else(by_default);
            let (home, handle) = self.open_at_home(command, service.queues)?;
            self.unopened.remove(&id);
            return Ok((home, handle, service));
        };
        match self.homes[*home].port.command(command).reply {
            Reply::Opened(handle) => Ok((*home, handle, service.clone())),
            Reply::Failed(error) => Err(refuse_command(error)),
            reply => unreachable!("a command that opens was answered with {reply:?}"),
        }
    }

    /// How a volume is that is open on a reactor.
    pub(super) fn condition_of_open(
        &self,
        id: VolumeId,
        name: &str,
        latched: Option<&str>,
    ) -> Condition {
        if self.importing.contains_key(&id) {
            return self.condition_of_closed(id, name);
        }
        if let Some(why) = latched {
            return Condition {
                state: State::Failed,
                reason: Some(why.to_owned()),
                remedy: Some(format!(
                    "check the device, then `bessel volume detach {name}` and `bessel volume attach \
                     {name}`; what was not flushed before is lost"
                )),
            };
        }
        if self.served.get(&id).is_some_and(|served| served.server.is_none()) {
            return Condition {
                state: State::Unavailable,
                reason: Some("its socket could not be bound; see the daemon's log".to_owned()),
                remedy: Some(format!(
                    "free the socket, then `bessel volume detach {name}` and `bessel volume attach \
                     {name}`"
                )),
            };
        }
        Condition::default()
    }

    /// How a volume is that nobody can use.
    pub(super) fn condition_of_closed(&self, id: VolumeId, name: &str) -> Condition {
        if self.importing.contains_key(&id) {
            return Condition {
                state: State::Importing,
                reason: Some("it is being imported, and not whole yet".to_owned()),
                remedy: Some(
                    "wait until that has ended; `bessel stats` shows how far it is".into(),
                ),
            };
        }
        if let Some(detached) = self.detached.get(&id) {
            return Condition {
                state: State::Detached,
                reason: Some(detached.reason.clone()),
                remedy: Some(format!("`bessel volume attach {name}`, or start the daemon again")),
            };
        }
        let fault = self.directory.get(id).and_then(|volume| volume.fault.as_deref());
        let reason = fault.unwrap_or("it could not be opened; see the daemon's log");
        Condition {
            state: State::Unavailable,
            reason: Some(reason.to_owned()),
            remedy: Some(format!("mend that, then `bessel volume attach {name}`")),
        }
    }
}
