//! Collections: when one is begun, and what it must know of the volumes.
//!
//! One is begun by hand, by schedule, when free space or room for volumes runs out, and after a daemon
//! that was killed, since that has leaked what it had claimed. The thread that frees runs it
//! (`reclaimer`).

use super::{Answered, ControlPlane};
use crate::api::Refusal;
use crate::api::types::{GcTrigger, GcView};
use crate::config::GcConfig;
use crate::control::Control;
use crate::reclaimer::Order;
use bessel_mapping::forest::Tree;
use bessel_mapping::gc::{Collected, Spare};
use bessel_mapping::request::{SnapshotId, VolumeId};
use bessel_mapping::snapshot_log::PAGE_MAX;
use bessel_reactor::clock::Instant;
use bessel_reactor::units::ByteCount;
use std::collections::BTreeSet;
use std::time::Duration;

/// Least time between two collections that begin by themselves for anything but the schedule.
const PAUSE_MIN: Duration = Duration::from_secs(60);

/// What it grows to while they free next to nothing.
const PAUSE_MAX: Duration = Duration::from_hours(1);

/// What is next to nothing: this part of the store.
const LITTLE: u64 = 1000;

/// How a collection has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum End {
    /// It has freed all that it could.
    Done,
    /// An operator has ended it.
    Cancelled,
    /// It could not go on. What it was begun for is still so.
    Failed,
}

/// When collections are begun by themselves.
pub(super) struct Collections {
    config: GcConfig,
    /// The daemon before this one was not stopped in order, and nothing was collected since.
    after_crash: bool,
    /// Something was deleted since the last one began, or before this daemon did.
    deleted: bool,
    /// What of these two the collection under way was begun with.
    owed: (bool, bool),
    begun: Option<Instant>,
    /// Least time from that one to the next that low space begins.
    pause: Duration,
    /// Trees of volumes that were published while a collection runs: it may have read the registry
    /// before.
    published: Vec<Tree>,
    /// Snapshots that were left to the collector while one runs: it may have read the registry before they
    /// were cloned, and their log after they were deleted.
    left: Vec<SnapshotId>,
    /// A volume was deleted, or something else may have been, while a collection runs.
    begin_again: bool,
    /// A clone or volume could not be made: whether the device has it, nobody knows.
    pub(super) doubtful_creation: bool,
}

impl Collections {
    pub(super) fn new(config: GcConfig, was_clean: bool) -> Self {
        Self {
            config,
            after_crash: !was_clean,
            deleted: true,
            owed: (false, false),
            begun: None,
            pause: PAUSE_MIN,
            left: Vec::new(),
            begin_again: false,
            published: Vec::new(),
            doubtful_creation: false,
        }
    }

    /// Something was deleted, and may have left something behind.
    pub(super) fn note_deletion(&mut self) {
        self.deleted = true;
    }

    /// A volume is being deleted.
    pub(super) fn note_volume_deletion(&mut self) {
        self.deleted = true;
        self.begin_again = true;
    }

    /// Whether something is deleted, nobody knows.
    pub(super) fn note_doubtful_deletion(&mut self) {
        self.begin_again = true;
    }

    /// A snapshot that was deleted is left to the collector.
    pub(super) fn note_left(&mut self, snapshot: SnapshotId) {
        self.left.push(snapshot);
    }
}

impl ControlPlane {
    /// Begins a collection because somebody asks for one.
    pub(crate) fn collect(&mut self, control: Control) -> Answered<GcView> {
        if self.reclaimer()?.is_collecting() {
            return Err(Refusal::conflict(
                "a collection is running already; `bessel gc --status` shows how far it is",
            ));
        }
        self.begin_collection(GcTrigger::Command, control)
    }

    /// Begins a collection if it is time for one.
    pub(crate) fn collect_if_due(&mut self, control: Control) {
        let Ok(reclaimer) = self.reclaimer() else { return };
        if reclaimer.is_collecting() {
            return;
        }
        if let Some(trigger) = self.due() {
            // It is logged when it ends.
            let _ = self.begin_collection(trigger, control);
        }
    }

    fn due(&mut self) -> Option<GcTrigger> {
        let now = self.clock.now();
        let Collections { config, after_crash, deleted, begun, pause, .. } = &self.collections;
        let rested = |pause: Duration| begun.is_none_or(|begun| now.since(begun) >= pause);
        if *after_crash && rested(PAUSE_MIN) {
            return Some(GcTrigger::Crash);
        }
        if let Some(every) = config.every
            && now.since(begun.unwrap_or(self.started)) >= every
        {
            return Some(GcTrigger::Schedule);
        }
        let low = config.low_space_percent.filter(|_| *deleted && rested(*pause))?;
        if self.directory.free_slots() == 0 {
            return Some(GcTrigger::LowSpace);
        }
        let shards: Vec<_> = (0..self.homes.len())
            .map(|home| self.shard_stats(home))
            .collect::<Answered<_>>()
            .ok()?;
        let store = self.store_view(&shards);
        let is_low = store.free_bytes < store.total_bytes / 100 * u64::from(low);
        is_low.then_some(GcTrigger::LowSpace)
    }

    fn begin_collection(&mut self, trigger: GcTrigger, control: Control) -> Answered<GcView> {
        let (clock, rate) = (self.clock, self.collections.config.rate);
        let order = Order { trigger, control, clock, rate };
        if !self.reclaimer()?.collect(order) {
            return Err(Refusal::failed("the thread that collects is not there; see the log"));
        }
        let collections = &mut self.collections;
        let owed = (&mut collections.after_crash, &mut collections.deleted);
        collections.owed = (std::mem::take(owed.0), std::mem::take(owed.1));
        collections.begun = Some(clock.now());
        collections.published.clear();
        collections.left.clear();
        collections.begin_again = false;
        self.gc()
    }

    /// The collection under way, and the last one.
    pub(crate) fn gc(&self) -> Answered<GcView> {
        Ok(self.reclaimer()?.gc())
    }

    /// Ends the collection under way. What it has freed stays free.
    pub(crate) fn end_collection(&self) -> Answered<GcView> {
        if !self.reclaimer()?.end_collection() {
            return Err(Refusal::conflict("no collection is running"));
        }
        self.gc()
    }

    /// What a collection must leave whole and would not find: the trees that deleted snapshots need which
    /// wait to be freed by themselves, those of snapshots that were left to the collector since it began,
    /// and of volumes that are being imported.
    ///
    /// # Errors
    /// When nobody knows what some volume has on the device: then nothing can be told to be garbage.
    pub(crate) fn what_to_spare(&mut self) -> Result<Spare, String> {
        self.check_all_is_known()?;
        // What has no plan yet is found now, or by the next one: a plan that is made later would free
        // it again.
        for snapshot in self.unplanned.leave() {
            self.collections.note_deletion();
            self.collections.note_left(snapshot);
            self.reclaimer().map_err(|refusal| refusal.to_string())?.leave();
        }
        let volume_deleted = std::mem::take(&mut self.collections.begin_again);
        if volume_deleted {
            return Ok(Spare { trees: Vec::new(), volume_deleted });
        }
        let trees = self.trees_to_spare().map_err(|refusal| refusal.to_string())?;
        Ok(Spare { trees, volume_deleted })
    }

    fn trees_to_spare(&mut self) -> Answered<Vec<Tree>> {
        // The device has no record of what is being imported, nor may have had when it was read.
        let importing: Vec<VolumeId> = self.importing.keys().copied().collect();
        let unpublished = importing.into_iter().map(|id| self.tree_of(id));
        let mut trees = unpublished.collect::<Answered<Vec<_>>>()?;
        trees.extend(&self.collections.published);
        trees.extend(self.reclaimer()?.trees_waiting());
        let mut left: BTreeSet<SnapshotId> = self.collections.left.iter().copied().collect();
        while let Some(&SnapshotId { volume, sequence }) = left.first() {
            let page = self.page(volume, sequence, PAGE_MAX, true)?;
            let found = page.snapshots.iter().filter(|snapshot| left.remove(&snapshot.id));
            trees.extend(found.map(|it| Tree { root: it.root, height: it.height }));
            // The page began with it.
            left.remove(&SnapshotId { volume, sequence });
        }
        Ok(trees)
    }

    /// Refuses when nobody knows what some volume has on the device.
    fn check_all_is_known(&self) -> Result<(), String> {
        if let Some(doubt) = &self.store.opened.doubt {
            return Err(format!("{doubt}; stop the daemon and run `bessel check --repair`"));
        }
        if let Some(slot) = self.directory.unreadable() {
            return Err(format!(
                "the volume record in registry slot {slot} cannot be read; stop the daemon and run \
                 `bessel check --repair`"
            ));
        }
        if self.collections.doubtful_creation {
            return Err(
                "a volume could not be made when the device failed, and the device may have \
                        its record; check the device and start the daemon again"
                    .to_owned(),
            );
        }
        for home in 0..self.homes.len() {
            let failed = self.shard_stats(home).map_err(|refusal| refusal.to_string())?.latched;
            if let Some(name) = failed.into_iter().find_map(|id| self.name_of_present(id)) {
                return Err(format!(
                    "volume {name:?} has failed; check the device, then `bessel volume detach {name}` \
                     and `bessel volume attach {name}`"
                ));
            }
        }
        let present = self.directory.volumes().filter(|volume| !volume.deleted);
        let is_known = |id| {
            let detached = self.detached.get(id);
            let open = self.served.contains_key(id) || self.importing.contains_key(id);
            open || detached.is_some_and(|it| it.current.is_some())
        };
        if let Some(volume) = present.into_iter().find(|volume| !is_known(&volume.id)) {
            return Err(format!(
                "nobody knows what volume {:?} has, which could not be opened; `bessel volume show {}` \
                 says why",
                volume.name, volume.name
            ));
        }
        Ok(())
    }

    fn tree_of(&self, id: VolumeId) -> Answered<Tree> {
        let current = self.info(id)?.current;
        Ok(Tree { root: current.root, height: current.height })
    }

    /// A volume that was imported has its first record.
    pub(super) fn note_published(&mut self, id: VolumeId) -> Answered<()> {
        if self.reclaimer()?.is_collecting() {
            let tree = self.tree_of(id)?;
            self.collections.published.push(tree);
        }
        Ok(())
    }

    /// A collection has ended.
    pub(crate) fn collection_ended(&mut self, collected: &Collected, end: End) {
        self.directory.collected(&collected.deleted_volumes);
        let blocks = collected.data_freed + collected.metadata_freed;
        let little =
            ByteCount::from_blocks(blocks).get() < self.store.geometry.size().get() / LITTLE;
        let collections = &mut self.collections;
        collections.pause = if little { (collections.pause * 2).min(PAUSE_MAX) } else { PAUSE_MIN };
        let (after_crash, deleted) = std::mem::take(&mut collections.owed);
        if end == End::Failed {
            collections.after_crash |= after_crash;
            collections.deleted |= deleted;
        }
    }
}
