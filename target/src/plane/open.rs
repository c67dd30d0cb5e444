//! Opening volumes on their home reactors and giving them a socket.

use super::{Answered, ControlPlane, Limited, Scheduled, Served, refuse_command, refuse_plan};
use crate::api::types::Cache;
use crate::api::{Refusal, RefusalKind};
use crate::attach::{CoreMessage, VolumeHost};
use crate::config::{QUEUES_DEFAULT, SOCKET_PATH_MAX, VolumeConfig, parent_of};
use crate::limits::Limits;
use crate::places;
use bessel_mapping::directory::VolumeSummary;
use bessel_mapping::journal::Change;
use bessel_mapping::request::{
    CacheChooser, CacheMode, CloneOrigin, Command, CreatePlan, Reply, SnapshotId, VolumeHandle,
    VolumeId,
};
use bessel_mapping::schedule::Schedule;
use bessel_reactor::units::ByteCount;
use bessel_vhost::{DiskInfo, Server};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;

/// Largest ring a front-end may set up: what a split ring can have (virtio 1.2, 2.7).
const QUEUE_SIZE_MAX: u16 = 32768;

/// How a volume is offered to guests.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) socket: PathBuf,
    pub(crate) queues: u16,
    /// None: as it is.
    pub(crate) cache: Option<CacheMode>,
    /// When snapshots are taken, if they are.
    pub(crate) schedule: Option<Schedule>,
    /// What its guest may ask for, if there is a limit.
    pub(crate) limits: Option<Limits>,
}

impl Service {
    /// For a volume that the configuration does not mention.
    pub(crate) fn by_default(name: &str, socket_directory: &Path) -> Self {
        let socket = socket_directory.join(format!("{name}.sock"));
        Self { socket, queues: QUEUES_DEFAULT, cache: None, schedule: None, limits: None }
    }

    /// As the configuration says.
    pub(crate) fn configured(config: &VolumeConfig) -> Self {
        let cache = match config.cache {
            Cache::Writeback => CacheMode::Writeback,
            Cache::Writethrough => CacheMode::Writethrough,
        };
        Self {
            socket: config.socket.clone(),
            queues: config.queues,
            cache: Some(cache),
            schedule: config.snapshots.clone(),
            limits: config.limits,
        }
    }
}

impl ControlPlane {
    /// Opens a volume of the store and serves it; makes it first when there is none.
    pub(crate) fn open_or_create(
        &mut self,
        name: &str,
        size: ByteCount,
        service: Service,
    ) -> Answered<()> {
        if let Some(volume) = self.directory.find(name) {
            let (id, found) = (volume.id, volume.size);
            if found != size {
                tracing::warn!(
                    volume = name,
                    "has {} on the store and {} in the configuration, which counts only when it \
                     is created; `bessel volume resize` makes it larger",
                    found.human(),
                    size.human()
                );
            }
            return self.open(id, service);
        }
        if let Some(slot) = self.directory.unreadable() {
            let what = format!(
                "not made: the volume record in registry slot {slot} cannot be read and may be its \
                 own; run `bessel check`, or make it with `bessel volume create`"
            );
            return Err(Refusal::new(RefusalKind::Damaged, what));
        }
        tracing::info!(volume = name, size = size.human(), "creating");
        self.create(name, size, None, service)
    }

    /// Makes a volume, durably, and serves it.
    pub(super) fn create(
        &mut self,
        name: &str,
        size: ByteCount,
        origin: Option<CloneOrigin>,
        service: Service,
    ) -> Answered<()> {
        let plan = self.directory.plan_create(name, size, origin, self.clock.wall());
        let plan = plan.map_err(refuse_plan)?;
        let opened = self
            .check_socket(&service.socket)
            .and_then(|()| self.open_at_home(Command::Create(plan.clone()), service.queues));
        let (home, handle) = opened.inspect_err(|refusal| {
            self.directory.abandoned(&plan);
            self.note_unmade(plan.id, origin.map(|origin| origin.snapshot), refusal);
        })?;
        self.directory.created(&plan);
        self.serve(plan.id, home, handle, service).map_err(|refusal| {
            Refusal::failed(format!("volume {name:?} was created but is not served: {refusal}"))
        })
    }

    /// A volume could not be made. After a failure of the device its record may be there all the same, and
    /// turn up at the next start; when it was refused, nothing was written.
    pub(super) fn note_unmade(
        &mut self,
        id: VolumeId,
        origin: Option<SnapshotId>,
        refusal: &Refusal,
    ) {
        if matches!(refusal.kind, RefusalKind::Failed | RefusalKind::Damaged) {
            self.collections.doubtful_creation = true;
            self.unborn.extend(origin.map(|origin| (id, origin)));
        }
    }

    /// Makes clones of a settled snapshot, durably, and serves them. All are on their way before the
    /// first is answered.
    pub(super) fn create_many(
        &mut self,
        origin: &CloneOrigin,
        prefix: &str,
        count: u32,
    ) -> Answered<Vec<VolumeId>> {
        let names: Vec<String> = (1..=count).map(|number| format!("{prefix}-{number}")).collect();
        let mut plans: Vec<(CreatePlan, Service)> = Vec::with_capacity(names.len());
        let planned = names.iter().try_for_each(|name| {
            let time = self.clock.wall();
            let plan = self.directory.plan_create(name, origin.size, Some(*origin), time);
            let plan = plan.map_err(refuse_plan)?;
            let service = Service::by_default(name, self.socket_directory());
            let free = self.check_socket(&service.socket);
            plans.push((plan, service));
            free
        });
        if let Err(refusal) = planned {
            plans.iter().for_each(|(plan, _)| self.directory.abandoned(plan));
            return Err(refusal);
        }
        let asked: Vec<_> = plans
            .into_iter()
            .map(|(plan, service)| {
                let answer = self.placement.place(service.queues).map(|home| {
                    let command = Command::Create(plan.clone());
                    let (answer, answered) = sync_channel(1);
                    self.homes[home].port.send(CoreMessage::Command { command, answer });
                    (home, answered)
                });
                (plan, service, answer)
            })
            .collect();
        let (mut made, mut failed) = (Vec::new(), None);
        for (plan, service, answer) in asked {
            let opened = match answer {
                Err(no_room) => Err(Refusal::conflict(no_room.to_string())),
                Ok((home, answered)) => match answered.recv().map(|answer| answer.reply) {
                    Ok(Reply::Opened(handle)) => Ok((home, handle)),
                    Ok(Reply::Failed(error)) => {
                        self.placement.remove(home, service.queues);
                        Err(refuse_command(error))
                    }
                    reply => unreachable!("a command that opens was answered with {reply:?}"),
                },
            };
            match opened {
                Ok((home, handle)) => {
                    self.directory.created(&plan);
                    made.push(plan.id);
                    if let Err(refusal) = self.serve(plan.id, home, handle, service) {
                        failed.get_or_insert(refusal);
                    }
                }
                Err(refusal) => {
                    self.directory.abandoned(&plan);
                    self.note_unmade(plan.id, Some(origin.snapshot), &refusal);
                    failed.get_or_insert(refusal);
                }
            }
        }
        match failed {
            None => Ok(made),
            Some(Refusal { kind, message }) => {
                let what = format!("{} of {count} clones were made, then: {message}", made.len());
                Err(Refusal::new(kind, what))
            }
        }
    }

    /// Opens a volume of the store and serves it.
    pub(crate) fn open(&mut self, id: VolumeId, service: Service) -> Answered<()> {
        let (home, handle) = match self.restored.remove(&id) {
            Some(open) => open,
            None => match self.open_unserved(id, service.queues) {
                Ok(open) => open,
                Err(refusal) => {
                    self.unopened.insert(id, service);
                    return Err(refusal);
                }
            },
        };
        self.serve(id, home, handle, service)
    }

    fn open_unserved(&mut self, id: VolumeId, queues: u16) -> Answered<(usize, VolumeHandle)> {
        let Some(entry) = self.directory.entry(id) else { return Err(self.not_open(id)) };
        let command = Command::Open(Box::new(entry.clone()));
        self.open_at_home(command, queues)
    }

    /// The name of a volume that is not deleted.
    pub(crate) fn name_of_present(&self, id: VolumeId) -> Option<String> {
        let volume = self.directory.get(id)?;
        (!volume.deleted).then(|| volume.name.clone())
    }

    /// True when nobody knows the volume, and its record may be one that cannot be read.
    pub(crate) fn may_be_unreadable(&self, id: VolumeId) -> bool {
        self.directory.get(id).is_none() && self.directory.unreadable().is_some()
    }

    /// Keeps a volume from being served.
    pub(crate) fn withhold(&mut self, id: VolumeId) {
        self.withheld.insert(id);
    }

    pub(crate) fn is_withheld(&self, name: &str) -> bool {
        self.directory.find(name).is_some_and(|volume| self.withheld.contains(&volume.id))
    }

    /// Opens a volume that will be served with this many queues, and makes changes to it again.
    pub(crate) fn restore(
        &mut self,
        id: VolumeId,
        changes: Vec<Change>,
        queues: u16,
    ) -> Answered<()> {
        let (home, handle) = self.open_unserved(id, queues)?;
        self.ask(home, Command::Restore { volume: handle, changes })?;
        self.restored.insert(id, (home, handle));
        Ok(())
    }

    /// Has the reactor with the most room carry out a command that opens a volume.
    pub(super) fn open_at_home(
        &mut self,
        command: Command,
        queues: u16,
    ) -> Answered<(usize, VolumeHandle)> {
        let placed = self.placement.place(queues);
        let home = placed.map_err(|error| Refusal::conflict(error.to_string()))?;
        match self.ask(home, command) {
            Ok(Reply::Opened(handle)) => Ok((home, handle)),
            Ok(reply) => unreachable!("a command that opens was answered with {reply:?}"),
            Err(refusal) => {
                self.placement.remove(home, queues);
                Err(refusal)
            }
        }
    }

    /// Names and identities of volumes that could be served and that nobody has tried to open yet.
    pub(crate) fn unserved(&self) -> Vec<(VolumeId, String)> {
        let volumes = self.directory.volumes();
        let waiting = volumes.filter(|VolumeSummary { id, deleted, fault, .. }| {
            let tried = self.served.contains_key(id) || self.unopened.contains_key(id);
            !deleted && fault.is_none() && !tried && !self.withheld.contains(id)
        });
        waiting.map(|volume| (volume.id, volume.name.clone())).collect()
    }

    /// Where each volume is served, for the operator. One whose socket could not be bound is not.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = (&str, ByteCount, u16, &Path)> {
        let served = self.served.iter().filter(|(_, served)| served.server.is_some());
        served.filter_map(|(id, served)| {
            let volume = self.directory.get(*id)?;
            Some((volume.name.as_str(), volume.size, served.queues, served.socket.as_path()))
        })
    }

    /// The directory where volumes without a socket of their own get theirs.
    pub(crate) fn socket_directory(&self) -> &Path {
        parent_of(&self.api_socket)
    }

    /// Notes a volume that its home has opened, and offers it to guests.
    pub(super) fn serve(
        &mut self,
        id: VolumeId,
        home: usize,
        handle: VolumeHandle,
        service: Service,
    ) -> Answered<()> {
        let Service { socket, queues, cache, schedule, limits } = service;
        let schedule = schedule.map(Scheduled::new);
        let limited = Limited::new(limits);
        let name = &self.directory.get(id).expect("what is open is in the directory").name;
        let name = name.clone();
        let visitors = self.begin_visits((home, handle), queues, limits.is_some());
        let ways = self.ways((home, handle), &visitors);
        let host = Arc::new(VolumeHost::new(&name, ways, queues));
        let place = places::normal(&socket);
        let served = Served {
            handle,
            home,
            queues,
            socket,
            place,
            cache,
            schedule,
            limited,
            host,
            visitors,
            placed_by_hand: false,
            server: None,
        };
        self.served.insert(id, served);
        if let Some(cache) = cache {
            let by = CacheChooser::Operator;
            self.ask(home, Command::SetCache { volume: handle, cache, by })?;
        }
        self.begin_schedule(id);
        self.begin_limits(id);
        self.start_server(id)
    }

    /// Binds the volume's socket and serves it.
    pub(super) fn start_server(&mut self, id: VolumeId) -> Answered<()> {
        let info = self.info(id)?;
        self.check_unclaimed(&self.served[&id].socket, Some(id))?;
        let served = self.served.get_mut(&id).expect("it has been opened");
        let disk = DiskInfo {
            id: info.name,
            capacity_sectors: info.size.sectors(),
            read_only: false,
            num_queues: served.queues,
            queue_size_max: QUEUE_SIZE_MAX,
            writeback: info.cache == CacheMode::Writeback,
        };
        let host = Arc::clone(&served.host);
        let server = Server::bind(&served.socket, disk, host)
            .map_err(|error| Refusal::failed(crate::one_line(&error)))?;
        let handle = server.spawn().map_err(|error| {
            Refusal::failed(format!("cannot start the thread of volume {id}: {error}"))
        })?;
        served.server = Some(handle);
        Ok(())
    }

    /// Refuses a socket path before a volume is made for it.
    pub(super) fn check_socket(&self, socket: &Path) -> Answered<()> {
        if socket.as_os_str().len() > SOCKET_PATH_MAX {
            return Err(Refusal::malformed(format!(
                "the volume's socket {} would have more than {SOCKET_PATH_MAX} bytes; choose a \
                 shorter name",
                socket.display()
            )));
        }
        self.check_unclaimed(socket, None)?;
        let path = socket.display();
        let Ok(metadata) = std::fs::symlink_metadata(socket) else { return Ok(()) };
        if !metadata.file_type().is_socket() {
            return Err(Refusal::conflict(format!(
                "{path} exists and is no socket; remove it or choose another name"
            )));
        }
        // A socket nobody listens on is left over from a killed process, and is replaced.
        if UnixStream::connect(socket).is_ok() {
            return Err(Refusal::conflict(format!(
                "socket {path} is in use; stop the process that listens there or choose another \
                 name"
            )));
        }
        Ok(())
    }

    /// Refuses a socket in the place of anything else of this daemon's. A volume that took the
    /// API's would keep it at the next start, and nobody could be told to delete it.
    fn check_unclaimed(&self, socket: &Path, of: Option<VolumeId>) -> Answered<()> {
        let place = places::normal(socket);
        // As bytes, and normal since they were bound: there may be thousands.
        let same = |other: &PathBuf| other.as_os_str() == place.as_os_str();
        let mut served = self.served.iter().filter(|(id, _)| of != Some(**id));
        let mut detached = self.detached.iter().filter(|(id, _)| of != Some(**id));
        let owner = if place == places::normal(&self.api_socket) {
            "the API"
        } else if places::is_store(socket, &self.store.device) {
            "the store"
        } else if served.any(|(_, served)| same(&served.place))
            || detached.any(|(_, other)| same(&places::normal(&other.service.socket)))
        {
            "another volume"
        } else {
            return Ok(());
        };
        Err(Refusal::conflict(format!(
            "socket {} belongs to {owner}; choose another name",
            socket.display()
        )))
    }
}
