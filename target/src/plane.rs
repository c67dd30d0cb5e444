//! What the control plane can do: one method for each operation of the API.
//!
//! Owns the directory of volumes, their placement and their vhost servers; the reactors own
//! everything else and are asked by message. Names and references arrive checked (`api::routes`).
//! An operation plans in the directory, asks the home reactor, and notes the outcome; when the
//! reactor refuses, nothing has changed.

mod attachment;
mod collect;
mod forest;
mod import;
mod limits;
mod logs;
mod moving;
mod open;
mod schedule;
mod spread;
mod tree;
mod view;
mod walks;

use crate::api::types::{
    JobView, LatencyView, ReclaimView, RolledBack, SnapshotCreated, SnapshotDeleted, SnapshotView,
    StatsView, StoreView, VolumeStatsView, VolumeView,
};
use crate::api::{Refusal, RefusalKind};
use crate::attach::{CoreCounters, CoreMessage, CorePort, VolumeHost};
use crate::config::{Balance, GcConfig, Spread};
use crate::jobs::Jobs;
use crate::placement::Placement;
use crate::reclaimer::{Reclaimer, Stopper};
use crate::reference::SnapshotReference;
use crate::scheduler::Schedules;
use bessel_mapping::directory::{Directory, DirectoryError, VolumeSummary};
use bessel_mapping::forest::Forest;
use bessel_mapping::format::{ExtentMap, ExtentType, Geometry};
use bessel_mapping::request::{
    CacheMode, CloneOrigin, Command, CommandError, Reply, ShardStats, SnapshotId, SnapshotInfo,
    VolumeHandle, VolumeId, VolumeInfo, Which, deletions,
};
use bessel_mapping::schedule::ScheduleCounters;
use bessel_mapping::snapshot_log::SnapshotLog;
use bessel_mapping::store::OpenedStore;
use bessel_mapping::volume::VolumeCounters;
use bessel_reactor::clock::{Instant, SystemClock};
use bessel_reactor::units::{BLOCK_SIZE, ByteCount};
use bessel_vhost::ServerHandle;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use attachment::{Condition, Detached};
use collect::Collections;
pub(crate) use collect::End;
pub(crate) use forest::Step;
use forest::Unplanned;
use import::Importing;
use limits::Limited;
use logs::KeptLogs;
pub(crate) use logs::Needed;
use moving::Balancing;
pub(crate) use open::Service;
use schedule::Scheduled;
use spread::Visitor;
pub(crate) use view::uuid;
use walks::Pins;
pub(crate) use walks::{ExportPlan, Gone};

/// A clone waits for its snapshot to settle: for writes that were in flight when it was taken.
const SETTLING_TRIES: u32 = 200;
const SETTLING_PAUSE: Duration = Duration::from_millis(5);

/// A reactor, as the control plane knows it.
pub(crate) struct Home {
    /// The core it is pinned to.
    pub(crate) core: usize,
    pub(crate) port: CorePort,
    pub(crate) counters: Arc<CoreCounters>,
}

/// The store, as far as it is shown.
pub(crate) struct StoreFacts {
    pub(crate) device: PathBuf,
    /// What people call it.
    pub(crate) name: String,
    pub(crate) uuid: [u8; 16],
    pub(crate) geometry: Geometry,
    /// Shared with the shards, which turn unused extents into data and metadata.
    pub(crate) extents: ExtentMap,
    /// To read volumes of it again.
    pub(crate) opened: Arc<OpenedStore>,
}

/// What is done without anybody asking, as the configuration says.
pub(crate) struct Upkeep {
    pub(crate) gc: GcConfig,
    pub(crate) balance: Balance,
    pub(crate) spread: Spread,
}

/// A volume that is open on its home reactor.
struct Served {
    handle: VolumeHandle,
    /// Index of its home.
    home: usize,
    queues: u16,
    socket: PathBuf,
    /// The socket's path in its one spelling.
    place: PathBuf,
    /// As the configuration wants it, if it does.
    cache: Option<CacheMode>,
    schedule: Option<Scheduled>,
    limited: Limited,
    host: Arc<VolumeHost>,
    /// Other reactors that serve queues of it.
    visitors: Vec<Visitor>,
    /// An operator has moved it: it stays.
    placed_by_hand: bool,
    /// None only while an operation keeps front-ends away, or when the socket could not be bound.
    server: Option<ServerHandle>,
}

impl Served {
    /// How it is to be served when it is open again.
    fn into_service(self) -> Service {
        Service {
            socket: self.socket,
            queues: self.queues,
            cache: self.cache,
            schedule: self.schedule.map(|scheduled| scheduled.schedule),
            limits: self.limited.limits,
        }
    }
}

/// See the module's documentation.
pub(crate) struct ControlPlane {
    directory: Directory,
    homes: Vec<Home>,
    placement: Placement,
    balancing: Balancing,
    spread: Spread,
    schedules: Schedules,
    served: BTreeMap<VolumeId, Served>,
    /// Volumes that are open on a reactor and not served yet.
    restored: BTreeMap<VolumeId, (usize, VolumeHandle)>,
    /// Volumes that are open on a reactor and not whole yet.
    importing: BTreeMap<VolumeId, Importing>,
    /// Volumes that an operator has taken away.
    detached: BTreeMap<VolumeId, Detached>,
    /// How volumes that could not be opened were to be served.
    unopened: BTreeMap<VolumeId, Service>,
    /// Volumes that are not served in this life, since they could not be restored.
    withheld: BTreeSet<VolumeId>,
    /// Logs of volumes that are not open: of detached ones, and of deleted ones whose clones live.
    kept: KeptLogs,
    forest: Forest,
    unplanned: Unplanned,
    /// Volumes whose schedule is still to be told of snapshots, from this position of the log on.
    to_be_told: VecDeque<(VolumeId, u64)>,
    store: StoreFacts,
    /// Frees what deleted snapshots alone held, and collects; none once the daemon stops.
    reclaimer: Option<Reclaimer>,
    collections: Collections,
    pins: Pins,
    /// Long work that is under way.
    jobs: Jobs,
    /// Clones that could not be made: whether the device has them, nobody knows.
    unborn: Vec<(VolumeId, SnapshotId)>,
    /// Where the API is served, and in its directory the volumes without a socket of their own.
    api_socket: PathBuf,
    clock: SystemClock,
    started: Instant,
}

type Answered<T> = Result<T, Refusal>;

impl ControlPlane {
    /// A control plane over reactors that have no volume open yet.
    pub(crate) fn new(
        directory: Directory,
        homes: Vec<Home>,
        schedules: Schedules,
        store: StoreFacts,
        upkeep: Upkeep,
        api_socket: PathBuf,
        clock: SystemClock,
    ) -> Self {
        let ports = homes.iter().map(|home| home.port.clone()).collect();
        let reclaimer = Reclaimer::start(Arc::clone(&store.opened), store.device.clone(), ports);
        Self {
            directory,
            placement: Placement::new(homes.len()),
            balancing: Balancing::new(upkeep.balance),
            spread: upkeep.spread,
            reclaimer: Some(reclaimer),
            collections: Collections::new(upkeep.gc, store.opened.was_clean),
            pins: Pins::default(),
            jobs: Jobs::new(clock),
            unborn: Vec::new(),
            homes,
            schedules,
            served: BTreeMap::new(),
            restored: BTreeMap::new(),
            importing: BTreeMap::new(),
            detached: BTreeMap::new(),
            unopened: BTreeMap::new(),
            withheld: BTreeSet::new(),
            kept: KeptLogs::default(),
            forest: Forest::default(),
            unplanned: Unplanned::default(),
            to_be_told: VecDeque::new(),
            store,
            api_socket,
            started: clock.now(),
            clock,
        }
    }

    // Volumes.

    pub(crate) fn list_volumes(&mut self) -> Answered<Vec<VolumeView>> {
        let mut volumes: Vec<&VolumeSummary> =
            self.directory.volumes().filter(|volume| !volume.deleted).collect();
        volumes.sort_by(|one, other| one.name.cmp(&other.name));
        volumes.into_iter().map(|volume| self.view(volume)).collect()
    }

    pub(crate) fn show_volume(&mut self, name: &str) -> Answered<VolumeView> {
        self.view(self.find(name)?)
    }

    pub(crate) fn create_volume(
        &mut self,
        name: &str,
        size: Option<ByteCount>,
        from: Option<&SnapshotReference>,
    ) -> Answered<VolumeView> {
        let origin = from.map(|from| self.settled_origin(from)).transpose()?;
        let size = size.or(origin.map(|origin| origin.size));
        let size = size.ok_or_else(|| {
            Refusal::malformed("a volume that is no clone has no size by itself; give size_bytes")
        })?;
        let service = Service::by_default(name, self.socket_directory());
        self.create(name, size, origin, service)?;
        self.show_volume(name)
    }

    /// Makes clones of one snapshot, `prefix-1` to `prefix-count`, all at once: their commits share
    /// the device's flushes.
    pub(crate) fn create_clones(
        &mut self,
        from: &SnapshotReference,
        prefix: &str,
        count: u32,
    ) -> Answered<Vec<VolumeView>> {
        let origin = self.settled_origin(from)?;
        let made = self.create_many(&origin, prefix, count)?;
        let volumes = made.into_iter().filter_map(|id| self.directory.get(id));
        volumes.map(|volume| self.view(volume)).collect()
    }

    pub(crate) fn rename_volume(&mut self, name: &str, new_name: &str) -> Answered<VolumeView> {
        let (id, handle, home) = self.find_served(name)?;
        self.directory.plan_rename(id, new_name).map_err(refuse_plan)?;
        let renamed = self.ask(home, Command::Rename { volume: handle, name: new_name.to_owned() });
        self.directory.rename_ended(id, new_name, renamed.is_ok());
        renamed?;
        self.show_volume(new_name)
    }

    pub(crate) fn resize_volume(&mut self, name: &str, size: ByteCount) -> Answered<VolumeView> {
        let (id, handle, home) = self.find_served(name)?;
        self.directory.check_grow(id, size).map_err(refuse_plan)?;
        self.ask(home, Command::Grow { volume: handle, size })?;
        self.directory.grown(id, size);
        if let Some(server) = &self.served[&id].server {
            server.set_capacity(size.sectors());
        }
        self.show_volume(name)
    }

    pub(crate) fn rollback_volume(
        &mut self,
        name: &str,
        snapshot: &SnapshotReference,
        label: Option<String>,
        force: bool,
    ) -> Answered<RolledBack> {
        let (id, handle, home) = self.find_served(name)?;
        let snapshot = self.find_snapshot(snapshot)?;
        if snapshot.id.volume != id {
            return Err(Refusal::malformed(format!(
                "snapshot {} is not one of volume {name:?}; clone it with `bessel volume create \
                 NAME --from {}`",
                snapshot.id, snapshot.id
            )));
        }
        let sequence = snapshot.id.sequence;
        let roll_back = |plane: &mut Self| {
            let label = match &label {
                Some(label) => label.clone(),
                None => plane.label_of_abandoned(id)?,
            };
            let label = Some(label);
            let time = plane.clock.wall();
            let command = Command::Rollback { volume: handle, sequence, label, time };
            match plane.ask(home, command)? {
                Reply::Snapshot(kept) => Ok(kept),
                reply => unreachable!("a rollback was answered with {reply:?}"),
            }
        };
        let attached = self.served[&id].host.is_connected();
        let kept: SnapshotInfo = if attached && force {
            self.under_front_end(id, roll_back)?
        } else {
            let remedy = "stop the guest first, or give --force if nothing in it uses the disk";
            self.without_front_ends(id, name, remedy, roll_back)?
        };
        self.note_snapshot(&kept);
        let snapshot = view::snapshot(&snapshot, name);
        let kept = view::snapshot(&kept, name);
        Ok(RolledBack { volume: self.show_volume(name)?, snapshot, kept })
    }

    /// A label for what a rollback leaves, so that nothing thins it and everybody sees what it is.
    fn label_of_abandoned(&self, id: VolumeId) -> Answered<String> {
        for at in self.info(id)?.log.taken.. {
            let label = format!("before-rollback-{at}");
            if self.look_up(id, Which::Label(label.clone()))?.is_none() {
                return Ok(label);
            }
        }
        unreachable!("a volume has fewer labels than there are numbers")
    }

    pub(crate) fn delete_volume(&mut self, name: &str) -> Answered<VolumeView> {
        let (id, handle, home) = self.find_served(name)?;
        self.pins.check_volume_free(id)?;
        let view = self.show_volume(name)?;
        self.without_front_ends(id, name, "stop the guest first", |plane| {
            plane.schedules.end(id);
            plane.collections.note_volume_deletion();
            let log = match plane.ask(home, Command::Delete { volume: handle }) {
                Ok(Reply::Closed { log, .. }) => log,
                Ok(reply) => unreachable!("deleting a volume was answered with {reply:?}"),
                Err(refusal) => {
                    plane.begin_schedule(id);
                    return Err(refusal);
                }
            };
            let mut served = plane.served.remove(&id).expect("it was found above");
            plane.end_limits(&served);
            plane.end_visits(std::mem::take(&mut served.visitors));
            plane.placement.remove(served.home, served.queues);
            plane.directory.removed(id);
            plane.kept.insert(id, log);
            Ok(())
        })?;
        Ok(view)
    }

    // Snapshots.

    pub(crate) fn create_snapshot(
        &mut self,
        name: &str,
        label: Option<String>,
    ) -> Answered<SnapshotCreated> {
        let (_, handle, home) = self.find_served(name)?;
        let time = self.clock.wall();
        let answer =
            self.homes[home].port.command(Command::Snapshot { volume: handle, label, time });
        match answer.reply {
            Reply::Snapshot(snapshot) => {
                self.note_snapshot(&snapshot);
                Ok(SnapshotCreated {
                    snapshot: view::snapshot(&snapshot, name),
                    latency_ns: answer.latency.as_nanos() as u64,
                })
            }
            Reply::Failed(error) => Err(refuse_command(error)),
            reply => unreachable!("a snapshot command was answered with {reply:?}"),
        }
    }

    pub(crate) fn label_snapshot(
        &mut self,
        snapshot: &SnapshotReference,
        label: Option<String>,
    ) -> Answered<SnapshotView> {
        let found = self.find_snapshot(snapshot)?.id;
        let (handle, home) = self.handle_of(found.volume)?;
        self.ask(home, Command::Label { volume: handle, sequence: found.sequence, label })?;
        let labelled = self.find_snapshot(&SnapshotReference::Id(found))?;
        self.note_snapshot(&labelled);
        self.view_of_snapshot(&labelled)
    }

    pub(crate) fn delete_snapshot(
        &mut self,
        snapshot: &SnapshotReference,
    ) -> Answered<SnapshotDeleted> {
        let found = self.find_snapshot(snapshot)?;
        let SnapshotId { volume: id, sequence } = found.id;
        self.pins.check_free(found.id)?;
        let (volume, home) = self.handle_of(id)?;
        self.ask(home, Command::DeleteSnapshot { volume, sequence })
            .inspect_err(|_| self.collections.note_doubtful_deletion())?;
        self.schedules.deleted(id, sequence);
        let clones =
            self.directory.volumes().filter(|it| !it.deleted && it.origin == Some(found.id));
        let clones = clones.map(|clone| clone.name.clone()).collect();
        let left_to_collector = self.reclaim(id, &[sequence]).err();
        let snapshot = self.view_of_snapshot(&found)?;
        Ok(SnapshotDeleted { snapshot, clones, left_to_collector })
    }

    /// Deletes those of a volume's snapshots that have no label: what thinning asks for. Returns which
    /// are deleted.
    pub(crate) fn delete_snapshots_of(
        &mut self,
        id: VolumeId,
        sequences: &[u64],
    ) -> Answered<Vec<u64>> {
        // Those that are being read go another time.
        let is_free = |sequence: &u64| {
            self.pins.check_free(SnapshotId { volume: id, sequence: *sequence }).is_ok()
        };
        let sequences: Vec<u64> = sequences.iter().copied().filter(is_free).collect();
        let mut deleted = Vec::with_capacity(sequences.len());
        let outcome = self.mark_deleted(id, &sequences, &mut deleted);
        if outcome.is_err() {
            self.collections.note_doubtful_deletion();
        }
        if !deleted.is_empty()
            && let Err(why) = self.reclaim(id, &deleted)
        {
            tracing::debug!("thinning leaves space of volume {id} to the collector: {why}");
        }
        outcome.map(|()| deleted)
    }

    /// Marks snapshots deleted, in rounds of many, but for those that have a label, and notes which.
    fn mark_deleted(
        &self,
        id: VolumeId,
        sequences: &[u64],
        deleted: &mut Vec<u64>,
    ) -> Answered<()> {
        let (volume, home) = self.handle_of(id)?;
        for piece in deletions(sequences) {
            let sequences = piece.to_vec();
            let command = Command::DeleteSnapshots { volume, spare_labelled: true, sequences };
            match self.ask(home, command)? {
                Reply::Deleted(gone) => deleted.extend(gone),
                reply => unreachable!("a batch of deletions was answered with {reply:?}"),
            }
        }
        Ok(())
    }

    fn view_of_snapshot(&self, snapshot: &SnapshotInfo) -> Answered<SnapshotView> {
        let volume = self.directory.get(snapshot.id.volume);
        let name = &volume.expect("its snapshot was found").name;
        Ok(view::snapshot(snapshot, name))
    }

    // Counters.

    /// Long work that is under way, in the order in which it was begun.
    pub(crate) fn jobs(&self) -> Vec<JobView> {
        self.jobs.list()
    }

    pub(crate) fn stats(&mut self) -> Answered<StatsView> {
        let shards = (0..self.homes.len()).map(|home| self.shard_stats(home));
        let shards: Vec<ShardStats> = shards.collect::<Answered<_>>()?;
        let reactors = self.homes.iter().zip(&shards).enumerate();
        let counted = shards.iter().flat_map(|shard| &shard.volumes);
        let mut volumes: Vec<_> = counted
            .filter_map(|(id, counters)| {
                let volume = self.directory.get(*id)?;
                let failed = shards.iter().any(|shard| shard.latched.contains(id));
                let latched = failed.then_some("");
                let Condition { state, .. } = self.condition_of_open(*id, &volume.name, latched);
                let scheduled = self.scheduled_of(*id);
                let stats = view::volume_stats(&volume.name, state, counters, scheduled);
                Some(VolumeStatsView { throttled_ns: self.throttled_ns(*id), ..stats })
            })
            .collect();
        let closed = self
            .directory
            .volumes()
            .filter(|volume| !volume.deleted && self.open_at(volume.id).is_none());
        volumes.extend(closed.map(|volume| {
            let Condition { state, .. } = self.condition_of_closed(volume.id, &volume.name);
            let counters = (VolumeCounters::default(), ScheduleCounters::default());
            view::volume_stats(&volume.name, state, &counters.0, counters.1)
        }));
        volumes.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(StatsView {
            uptime_ns: self.clock.now().since(self.started).as_nanos() as u64,
            store: self.store_view(&shards),
            reactors: reactors
                .map(|(index, (home, shard))| {
                    view::reactor(index, home.core, &home.counters, shard)
                })
                .collect(),
            volumes,
            snapshot_latency: self.snapshot_latency(),
            reclaim: self.reclaim_counters(),
            gc: self.reclaimer.as_ref().map(Reclaimer::gc).unwrap_or_default(),
            jobs: self.jobs.list(),
        })
    }

    fn reclaim_counters(&self) -> ReclaimView {
        let counters = self.reclaimer.as_ref().map(Reclaimer::counters).unwrap_or_default();
        ReclaimView { waiting: counters.waiting + self.unplanned.len(), ..counters }
    }

    fn shard_stats(&self, home: usize) -> Answered<ShardStats> {
        match self.ask(home, Command::Stats)? {
            Reply::Stats(stats) => Ok(*stats),
            reply => unreachable!("a stats command was answered with {reply:?}"),
        }
    }

    /// What is allocated: everything in extents of a type that is neither free in their bitmaps nor
    /// claimed by a shard for use.
    fn store_view(&self, shards: &[ShardStats]) -> StoreView {
        let StoreFacts { name, uuid, geometry, extents, .. } = &self.store;
        let space = shards.iter().find_map(|shard| shard.space).unwrap_or_default();
        let claimed_data: u64 = shards.iter().map(|shard| shard.claimed_data).sum();
        let claimed_metadata: u64 = shards.iter().map(|shard| shard.claimed_metadata).sum();
        let usable = |kind| {
            let count = (0..extents.extent_count()).filter(|extent| extents.get(*extent) == kind);
            count.count() as u64 * geometry.usable_blocks()
        };
        // The numbers are not of one moment, so a difference may pass below zero.
        let data = usable(ExtentType::Data).saturating_sub(space.free_data + claimed_data);
        let metadata =
            usable(ExtentType::Metadata).saturating_sub(space.free_metadata + claimed_metadata);
        let total = geometry.size();
        let overhead =
            total.blocks_floor() - (geometry.extent_count - 1) * geometry.usable_blocks();
        let free = total.blocks_floor().saturating_sub(overhead + data + metadata);
        StoreView {
            device: name.clone(),
            uuid: view::uuid(uuid),
            total_bytes: total.get(),
            free_bytes: free * BLOCK_SIZE,
            data_bytes: data * BLOCK_SIZE,
            metadata_bytes: metadata * BLOCK_SIZE,
        }
    }

    fn snapshot_latency(&self) -> LatencyView {
        let [first, rest @ ..] = &self.homes[..] else { return LatencyView::default() };
        let mut all = first.counters.snapshot_latency_ns.snapshot();
        for home in rest {
            home.counters.snapshot_latency_ns.add_to(&mut all);
        }
        LatencyView {
            count: all.len(),
            p50_ns: all.value_at_quantile(0.5),
            p99_ns: all.value_at_quantile(0.99),
            max_ns: all.max(),
        }
    }

    // Between operations.

    /// Does a little of what is to be done when nobody asks for anything.
    pub(crate) fn work(&mut self) -> Step {
        let reading = if self.read_kept_logs() { Step::More } else { Step::Done };
        let steps = [reading, self.plan_what_waits(), self.tell_schedules()];
        let first = |wanted| steps.contains(&wanted).then_some(wanted);
        first(Step::More).or_else(|| first(Step::Later)).unwrap_or(Step::Done)
    }

    // The end.

    /// Ends everything in order: front-ends are dropped and their queues drained, then each shard
    /// commits and gives its claims back, the authority last, then the reactors end.
    pub(crate) fn shut_down(mut self) {
        for served in self.served.values_mut() {
            if let Some(server) = served.server.take() {
                server.stop();
            }
        }
        // It asks the reactors.
        self.reclaimer = None;
        for home in self.homes.iter().rev() {
            if let Reply::Failed(error) = home.port.command(Command::Shutdown).reply {
                tracing::error!(core = home.core, "reactor did not shut down in order: {error}");
            }
        }
        for home in &self.homes {
            home.port.send(CoreMessage::Finish);
        }
    }

    /// Ends what is being freed, so that nobody waits for that at the end.
    pub(crate) fn stopper(&self) -> Option<Stopper> {
        self.reclaimer.as_ref().map(Reclaimer::stopper)
    }

    // What operations are made of.

    fn reclaimer(&self) -> Answered<&Reclaimer> {
        self.reclaimer.as_ref().ok_or_else(Refusal::stopping)
    }

    fn ask(&self, home: usize, command: Command) -> Answered<Reply> {
        match self.homes[home].port.command(command).reply {
            Reply::Failed(error) => Err(refuse_command(error)),
            reply => Ok(reply),
        }
    }

    fn find(&self, name: &str) -> Answered<&VolumeSummary> {
        self.directory.find(name).ok_or_else(|| {
            Refusal::not_found(format!(
                "there is no volume {name:?}; `bessel volume list` shows those there are"
            ))
        })
    }

    fn find_served(&self, name: &str) -> Answered<(VolumeId, VolumeHandle, usize)> {
        let volume = self.find(name)?;
        let (handle, home) = self.handle_of(volume.id)?;
        Ok((volume.id, handle, home))
    }

    fn handle_of(&self, id: VolumeId) -> Answered<(VolumeHandle, usize)> {
        let served = self.served.get(&id).ok_or_else(|| self.not_open(id))?;
        Ok((served.handle, served.home))
    }

    /// Where a volume is open, also when nobody can use it yet.
    fn open_at(&self, id: VolumeId) -> Option<(VolumeHandle, usize)> {
        let served = self.served.get(&id).map(|served| (served.handle, served.home));
        served.or_else(|| self.importing.get(&id).map(|it| (it.handle, it.home)))
    }

    fn not_open(&self, id: VolumeId) -> Refusal {
        if let Some(refusal) = self.still_importing(id) {
            return refusal;
        }
        if self.detached.contains_key(&id) {
            let name = self.name_of_present(id).unwrap_or_else(|| id.to_string());
            return Refusal::conflict(format!(
                "volume {name:?} is detached; `bessel volume attach {name}` first"
            ));
        }
        let fault = self.directory.get(id).and_then(|volume| volume.fault.as_deref());
        let reason = fault.unwrap_or("see the daemon's log");
        let kind = if fault.is_some() { RefusalKind::Damaged } else { RefusalKind::Failed };
        Refusal::new(kind, format!("volume {id} could not be opened: {reason}"))
    }

    fn info(&self, id: VolumeId) -> Answered<VolumeInfo> {
        let (volume, home) = self.open_at(id).ok_or_else(|| self.not_open(id))?;
        match self.ask(home, Command::Show { volume })? {
            Reply::Volume(info) => Ok(*info),
            reply => unreachable!("a show command was answered with {reply:?}"),
        }
    }

    /// What a clone of the snapshot starts from, once the snapshot has settled.
    fn settled_origin(&self, reference: &SnapshotReference) -> Answered<CloneOrigin> {
        let mut snapshot = self.find_snapshot(reference)?;
        let by_id = SnapshotReference::Id(snapshot.id);
        for _ in 0..SETTLING_TRIES {
            if !snapshot.settling {
                break;
            }
            std::thread::sleep(SETTLING_PAUSE);
            snapshot = self.find_snapshot(&by_id)?;
        }
        if snapshot.settling {
            return Err(refuse_command(CommandError::Settling));
        }
        // What settled in the snapshot last may be what the failed flush has lost.
        let VolumeInfo { name, latched, .. } = self.info(snapshot.id.volume)?;
        if let Some(why) = latched {
            return Err(Refusal::failed(format!(
                "volume {name:?} has failed ({why}), and what its snapshots hold is not known before it is \
                 read anew; `bessel volume detach {name}` and `bessel volume attach {name}` first"
            )));
        }
        let SnapshotInfo { id, root, height, size, .. } = snapshot;
        Ok(CloneOrigin { snapshot: id, root, height, size })
    }

    /// Runs `operation` on a volume that nobody is connected to, nor can connect to meanwhile.
    fn without_front_ends<T>(
        &mut self,
        id: VolumeId,
        name: &str,
        remedy: &str,
        operation: impl FnOnce(&mut Self) -> Answered<T>,
    ) -> Answered<T> {
        let served = self.served.get_mut(&id).expect("the caller found it");
        if served.host.is_connected() {
            return Err(Refusal::conflict(format!(
                "volume {name:?} is in use by a front-end; {remedy}"
            )));
        }
        // From here on there is no socket to connect to. A front-end that came between the look
        // and this is dropped, as by a restart of the daemon.
        drop(served.server.take());
        let done = operation(self);
        if self.served.contains_key(&id) {
            self.start_server(id)?;
        }
        done
    }

    /// Runs `operation` on a volume between two requests of its guest, then tells the front-end to
    /// look at its disk again.
    fn under_front_end<T>(
        &mut self,
        id: VolumeId,
        operation: impl FnOnce(&mut Self) -> Answered<T>,
    ) -> Answered<T> {
        let host = Arc::clone(&self.served[&id].host);
        let done = host.hold(|| operation(self));
        if done.is_ok()
            && let Some(server) = &self.served[&id].server
        {
            server.notify_changed();
        }
        done
    }

    fn view(&self, volume: &VolumeSummary) -> Answered<VolumeView> {
        match self.served.get(&volume.id) {
            Some(served) => {
                let info = self.info(volume.id)?;
                let latched = info.latched.as_deref();
                let condition = self.condition_of_open(volume.id, &volume.name, latched);
                let visitors = served.visitors.iter().map(|visitor| visitor.home);
                let homes = std::iter::once(served.home).chain(visitors);
                let cores = homes.map(|home| self.homes[home].core).collect();
                Ok(view::volume(&info, served, cores, condition))
            }
            None => {
                let condition = self.condition_of_closed(volume.id, &volume.name);
                Ok(match self.detached.get(&volume.id) {
                    Some(detached) => {
                        let log = self.kept.get(volume.id).map(SnapshotLog::state);
                        let log = log.unwrap_or_default();
                        let core = self.homes[detached.home].core;
                        view::detached_volume(volume, detached, core, &log, condition)
                    }
                    None => view::closed_volume(volume, condition),
                })
            }
        }
    }
}

/// The API's word for what the directory refused.
fn refuse_plan(error: DirectoryError) -> Refusal {
    let kind = match error {
        DirectoryError::NameTaken(_) => RefusalKind::Conflict,
        DirectoryError::NoSuchVolume(_) => RefusalKind::NotFound,
        DirectoryError::RegistryFull(_) | DirectoryError::IdentitiesUsedUp => RefusalKind::NoSpace,
        DirectoryError::Name(_)
        | DirectoryError::Size(_)
        | DirectoryError::SmallerThanOrigin { .. } => RefusalKind::Malformed,
    };
    Refusal::new(kind, error.to_string())
}

/// The API's word for what a shard refused.
fn refuse_command(error: CommandError) -> Refusal {
    let kind = match error {
        CommandError::NoSpace => RefusalKind::NoSpace,
        CommandError::NoSuchSnapshot => RefusalKind::NotFound,
        CommandError::Settling
        | CommandError::LabelTaken(_)
        | CommandError::InUse
        | CommandError::Limit(_) => RefusalKind::Conflict,
        CommandError::Device(_) | CommandError::Corrupt(_) | CommandError::Log { .. } => {
            RefusalKind::Damaged
        }
        CommandError::Latched(_) => RefusalKind::Failed,
    };
    Refusal::new(kind, error.to_string())
}
