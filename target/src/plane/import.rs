//! Volumes that are being imported: made, kept from everybody else, and published or taken back.
//!
//! What is written to one comes from a thread of its own ([`crate::importer`]); here is only what must
//! not meet another operation half done. The device has no record of such a volume before it is whole
//! (docs/decisions/0013), so a daemon that ends in between leaves nothing to be mended.

use super::open::Service;
use super::{Answered, ControlPlane, refuse_plan, view};
use crate::api::types::{JobKind, VolumeView};
use crate::api::{Refusal, RefusalKind};
use crate::importer::{ImportRequest, ImportSeat, SIZE_FIRST};
use crate::stream::Header;
use bessel_mapping::request::{CloneOrigin, Command, SnapshotId, VolumeHandle, VolumeId};
use bessel_reactor::units::ByteCount;

/// A volume that nobody can use yet.
pub(super) struct Importing {
    pub(super) handle: VolumeHandle,
    /// Index of its home.
    pub(super) home: usize,
    /// How it will be served.
    service: Service,
    origin: Option<SnapshotId>,
}

impl ControlPlane {
    /// Makes a volume to be filled with what a stream brings that begins so.
    pub(crate) fn begin_import(
        &mut self,
        request: &ImportRequest,
        header: &Header,
    ) -> Answered<ImportSeat> {
        let ImportRequest { name, from } = request;
        let origin = match (from, &header.base) {
            (None, None) => None,
            (None, Some((base, _))) => {
                return Err(Refusal::malformed(format!(
                    "what is imported is the difference to snapshot {base}; name that with --from"
                )));
            }
            (Some(from), base) => {
                let found = self.find_snapshot(from)?.id;
                self.check_base(found, base.map(|(base, _)| base), &header.store)?;
                Some(self.settled_origin(from)?)
            }
        };
        let total = header.is_sized().then_some(header.size);
        let size = total.unwrap_or(SIZE_FIRST);
        let (id, home, volume) = self.create_unpublished(name, size, origin)?;
        let job = self.jobs.begin(JobKind::Import, name, total.map(ByteCount::get));
        tracing::info!(volume = name, "importing");
        Ok(ImportSeat { id, volume, port: self.homes[home].port.clone(), size, job })
    }

    /// Refuses a stream that is no difference to this snapshot.
    fn check_base(
        &self,
        given: SnapshotId,
        base: Option<SnapshotId>,
        store: &[u8; 16],
    ) -> Answered<()> {
        let base = base.ok_or_else(|| {
            Refusal::malformed(
                "what is imported is no difference; import it without --from, or make one with `bessel \
                 snapshot export --from`",
            )
        })?;
        if *store != self.store.uuid {
            return Err(Refusal::malformed(format!(
                "what is imported is the difference to snapshot {base} of another store, {}; this one \
                 is {}",
                view::uuid(store),
                view::uuid(&self.store.uuid)
            )));
        }
        if base != given {
            return Err(Refusal::malformed(format!(
                "what is imported is the difference to snapshot {base}, not to {given}; give --from \
                 {base}"
            )));
        }
        Ok(())
    }

    fn create_unpublished(
        &mut self,
        name: &str,
        size: ByteCount,
        origin: Option<CloneOrigin>,
    ) -> Answered<(VolumeId, usize, VolumeHandle)> {
        let plan = self.directory.plan_create(name, size, origin, self.clock.wall());
        let plan = plan.map_err(refuse_plan)?;
        let service = Service::by_default(name, self.socket_directory());
        let command = Command::CreateUnpublished(plan.clone());
        let opened = self
            .check_socket(&service.socket)
            .and_then(|()| self.open_at_home(command, service.queues));
        let (home, handle) = opened.inspect_err(|_| self.directory.abandoned(&plan))?;
        self.directory.created(&plan);
        let origin = origin.map(|origin| origin.snapshot);
        self.importing.insert(plan.id, Importing { handle, home, service, origin });
        Ok((plan.id, home, handle))
    }

    /// Makes a volume that is being imported larger.
    pub(crate) fn grow_import(&mut self, id: VolumeId, size: ByteCount) -> Answered<()> {
        let Importing { handle, home, .. } = self.importing[&id];
        self.directory.check_grow(id, size).map_err(refuse_plan)?;
        self.ask(home, Command::Grow { volume: handle, size })?;
        self.directory.grown(id, size);
        Ok(())
    }

    /// Makes a volume one as any other, durably, and of this size: all of it is there. Next it is to be
    /// served, or abandoned when this fails.
    pub(crate) fn publish_import(&mut self, id: VolumeId, size: ByteCount) -> Answered<()> {
        let Importing { handle, home, origin, .. } = self.importing[&id];
        self.directory.check_grow(id, size).map_err(refuse_plan)?;
        self.ask(home, Command::Publish { volume: handle, size }).inspect_err(|refusal| {
            // Its record may have reached the device all the same, and turn up whole at the next start.
            self.note_unmade(id, origin, refusal);
        })?;
        self.directory.grown(id, size);
        self.note_published(id)?;
        Ok(())
    }

    /// Serves a volume that was just published.
    pub(crate) fn serve_import(&mut self, id: VolumeId) -> Answered<VolumeView> {
        let importing = self.importing.remove(&id).expect("it was just published");
        let Importing { handle, home, service, .. } = importing;
        let name = self.name_of_present(id).expect("it was just published");
        tracing::info!(volume = name, "imported");
        self.serve(id, home, handle, service).map_err(|refusal| {
            Refusal::failed(format!("volume {name:?} was imported but is not served: {refusal}"))
        })?;
        self.show_volume(&name)
    }

    /// Forgets a volume that was not imported to its end.
    pub(crate) fn abandon_import(&mut self, id: VolumeId) {
        let Some(importing) = self.importing.remove(&id) else { return };
        let Importing { handle, home, service, .. } = importing;
        // One that has failed is only taken out of memory.
        let gone = self
            .ask(home, Command::Delete { volume: handle })
            .or_else(|_| self.ask(home, Command::Close { volume: handle }));
        let name = self.name_of_present(id).unwrap_or_default();
        match gone {
            Ok(_) => tracing::warn!(volume = name, "not imported: nothing of it is left"),
            Err(refusal) => {
                tracing::error!(volume = name, "not imported, and not closed: {refusal}")
            }
        }
        self.placement.remove(home, service.queues);
        self.directory.unmade(id);
    }

    /// Why a volume that is being imported cannot be used.
    pub(super) fn still_importing(&self, id: VolumeId) -> Option<Refusal> {
        self.importing.get(&id)?;
        let name = self.name_of_present(id).unwrap_or_else(|| id.to_string());
        let what = format!("volume {name:?} is being imported; wait until that has ended");
        Some(Refusal::new(RefusalKind::Conflict, what))
    }
}
