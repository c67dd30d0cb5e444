//! Taking one volume off its shard while the others go on, and putting it back: what an operator does
//! about a volume that has failed.

use bessel_mapping::request::{CacheMode, Command, CommandError, Reply, VolumeId};
use bessel_mapping::store;

use super::{Pending, PowerCut, World};

impl World {
    /// Volumes that are detached.
    pub fn detached(&self) -> Vec<VolumeId> {
        self.detached.keys().copied().collect()
    }

    /// True when the volume refuses writes after an error of the device.
    pub fn has_failed(&mut self, id: VolumeId) -> Result<bool, PowerCut> {
        Ok(self.show(id)?.latched.is_some())
    }

    /// Detaches a volume once its requests and commands have ended; those of others go on. Says why it
    /// had failed, if it had.
    pub fn detach(&mut self, id: VolumeId) -> Result<Option<String>, PowerCut> {
        self.run_until(|world| {
            let of_it = |pending: &Pending| match pending {
                Pending::Act { action, .. } => super::subject(action) == id,
                _ => false,
            };
            !world.requests.values().any(|request| request.volume == id)
                && !world.commands.values().any(of_it)
        })?;
        let open = self.volumes[&id];
        self.end_visits(id);
        let ticket = self.ticket();
        self.commands.insert(ticket, Pending::Close);
        self.control(open.shard, ticket, Command::Close { volume: open.handle });
        let Reply::Closed { failed, .. } = self.reply(ticket)? else {
            panic!("volume {id} could not be detached");
        };
        assert!(failed.is_none() || self.config.may_fail, "{failed:?}");
        self.volumes.remove(&id);
        self.detached.insert(id, open.shard);
        self.model.detach(id, failed.is_none());
        Ok(failed)
    }

    fn of_device(
        &mut self,
        shard: usize,
        command: Command,
    ) -> Result<Result<(), CommandError>, PowerCut> {
        let ticket = self.ticket();
        self.commands.insert(ticket, Pending::OfDevice);
        self.control(shard, ticket, command);
        match self.reply(ticket)? {
            Reply::Done => Ok(Ok(())),
            Reply::Failed(error) => Ok(Err(error)),
            reply => panic!("a command about the device was answered with {reply:?}"),
        }
    }

    /// Attaches a detached volume and looks at everything in it. An error of the device, or
    /// another volume that has failed, leaves it detached.
    pub fn attach(&mut self, id: VolumeId) -> Result<Result<(), CommandError>, PowerCut> {
        let attached = self.attach_unread(id)?;
        if attached.is_ok() && self.volumes.contains_key(&id) {
            self.observe(id);
        }
        Ok(attached)
    }

    /// The same without a look at what it holds: of its nodes its shard reads the root alone.
    pub fn attach_unread(&mut self, id: VolumeId) -> Result<Result<(), CommandError>, PowerCut> {
        let shard = self.detached[&id];
        // Each front-end of the device hears of a failure once, and the first time that may be an old
        // one. All of them flush after the last failure, and know what it puts in doubt.
        let mut failed = false;
        for shard in 0..self.shards.len() {
            failed |= self.of_device(shard, Command::FlushDevice)?.is_err();
        }
        for shard in 0..if failed { self.shards.len() } else { 0 } {
            if let Err(error) = self.of_device(shard, Command::FlushDevice)? {
                return Ok(Err(error));
            }
        }
        for id in self.volumes() {
            if let Some(why) = self.show(id)?.latched {
                return Ok(Err(CommandError::Latched(why)));
            }
        }
        if let Err(error) = self.of_device(shard, Command::Refresh)? {
            return Ok(Err(error));
        }
        let slot = self.store.directory.get(id).expect("it was open").slot;
        let entry = match store::reread(&mut self.disk.connect(), &self.store, slot, id) {
            Ok(entry) => entry,
            Err(store::ReopenError::Device { source, .. }) => {
                return Ok(Err(CommandError::Device(source)));
            }
            Err(error) => panic!("volume {id} cannot be attached: {error}"),
        };
        self.store.directory.reread(entry.clone()).expect("names are fresh");
        if entry.record.deleted {
            self.detached.remove(&id);
            self.model.was_deleted(id);
            return Ok(Ok(()));
        }
        let ticket = self.ticket();
        let size = entry.record.size;
        self.commands.insert(ticket, Pending::Open { volume: id, shard, size });
        self.control(shard, ticket, Command::Open(Box::new(entry)));
        if let Reply::Failed(error) = self.reply(ticket)? {
            return Ok(Err(error));
        }
        self.detached.remove(&id);
        self.reclaims.forget(id);
        let snapshots = self.snapshots(id)?;
        let info = self.show(id)?;
        assert_eq!(info.latched, None, "attaching clears it");
        self.model.recover_volume(&info, &snapshots);
        self.model.set_writethrough(id, info.cache == CacheMode::Writethrough);
        self.settle()?;
        Ok(Ok(()))
    }
}
