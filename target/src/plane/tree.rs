//! Volumes and snapshots by descent.
//!
//! What was deleted is left out, except where something that lives descends from it.

use super::{Answered, ControlPlane, view};
use crate::api::types::{TreeView, TreeVolume};
use bessel_mapping::directory::VolumeSummary;
use bessel_mapping::format::LogEntry;
use bessel_mapping::request::{SnapshotId, SnapshotInfo, VolumeId};
use std::collections::BTreeSet;

impl ControlPlane {
    pub(crate) fn tree(&mut self) -> Answered<TreeView> {
        let kept = self.living_and_their_ancestors();
        let origins: BTreeSet<SnapshotId> = self
            .directory
            .volumes()
            .filter(|volume| kept.contains(&volume.id))
            .filter_map(|volume| volume.origin)
            .collect();
        let volumes = self.directory.volumes().filter(|volume| kept.contains(&volume.id));
        let volumes = volumes.map(|volume| {
            let snapshots = self.snapshots_of(volume)?;
            let shown = snapshots.iter().filter(|snapshot| {
                let gone = snapshot.deleted || volume.deleted;
                !gone || origins.contains(&snapshot.id)
            });
            Ok(TreeVolume {
                id: volume.id.0,
                name: volume.name.clone(),
                size_bytes: volume.size.get(),
                origin: volume.origin.map(|origin| origin.to_string()),
                deleted: volume.deleted,
                snapshots: shown.map(|snapshot| view::snapshot(snapshot, &volume.name)).collect(),
            })
        });
        Ok(TreeView { volumes: volumes.collect::<Answered<_>>()? })
    }

    fn living_and_their_ancestors(&self) -> BTreeSet<VolumeId> {
        let mut kept = BTreeSet::new();
        for volume in self.directory.volumes().filter(|volume| !volume.deleted) {
            let mut next = Some(volume);
            // Whoever is kept already has its ancestors kept: this also ends a cycle of origins,
            // which only a corrupt store can have.
            while let Some(volume) = next.filter(|volume| kept.insert(volume.id)) {
                next = volume.origin.and_then(|origin| self.directory.get(origin.volume));
            }
        }
        kept
    }

    /// From the reactor for an open volume, else as they were last known.
    pub(super) fn snapshots_of(&self, volume: &VolumeSummary) -> Answered<Vec<SnapshotInfo>> {
        if self.served.contains_key(&volume.id) {
            return Ok(self.info(volume.id)?.snapshots);
        }
        if let Some(detached) = self.detached.get(&volume.id) {
            return Ok(detached.snapshots.clone());
        }
        if let Some(snapshots) = self.departed.get(&volume.id) {
            return Ok(snapshots.clone());
        }
        let entry = self.directory.entry(volume.id);
        let log = entry.map_or(&[][..], |entry| &entry.log);
        Ok(log.iter().map(|entry| from_log(volume.id, entry)).collect())
    }
}

fn from_log(volume: VolumeId, entry: &LogEntry) -> SnapshotInfo {
    SnapshotInfo {
        id: SnapshotId { volume, sequence: entry.sequence },
        time: entry.time,
        label: entry.label.clone(),
        size: entry.size,
        root: entry.root,
        height: entry.height,
        deleted: entry.deleted,
        settling: false,
        blocks_allocated: entry.blocks_allocated,
    }
}
