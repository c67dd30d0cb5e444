//! Volumes and snapshots by descent.
//!
//! What was deleted is left out, except where something that lives descends from it.

use super::{Answered, ControlPlane, view};
use crate::api::types::{SnapshotView, TreeView, TreeVolume};
use bessel_mapping::directory::VolumeSummary;
use bessel_mapping::format::{LogEntry, Parent};
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
            let shown = |snapshot: &SnapshotInfo| {
                let gone = snapshot.deleted || volume.deleted;
                !gone || origins.contains(&snapshot.id)
            };
            let nearest = nearest_shown(&snapshots, shown);
            let id = |sequence| SnapshotId { volume: volume.id, sequence }.to_string();
            let parent_of =
                |parent: Option<u64>| parent.and_then(|parent| nearest[parent as usize]).map(id);
            let view = |snapshot: &SnapshotInfo| SnapshotView {
                parent: parent_of(parent(snapshot)),
                ..view::snapshot(snapshot, &volume.name)
            };
            Ok(TreeVolume {
                id: volume.id.0,
                name: volume.name.clone(),
                size_bytes: volume.size.get(),
                origin: volume.origin.map(|origin| origin.to_string()),
                deleted: volume.deleted,
                parent: parent_of(self.current_parent(volume, &snapshots)?),
                snapshots: snapshots.iter().filter(|it| shown(it)).map(view).collect(),
            })
        });
        Ok(TreeView { volumes: volumes.collect::<Answered<_>>()? })
    }

    /// The sequence of the snapshot that what the volume holds began as a copy of.
    fn current_parent(
        &self,
        volume: &VolumeSummary,
        snapshots: &[SnapshotInfo],
    ) -> Answered<Option<u64>> {
        let parent = if self.open_at(volume.id).is_some() {
            self.info(volume.id)?.current.parent
        } else {
            let entry = self.directory.entry(volume.id).filter(|_| !volume.deleted);
            entry.map_or(Parent::Unknown, |entry| entry.record.parent)
        };
        Ok(match parent {
            Parent::Snapshot(sequence) => Some(sequence),
            Parent::Origin => None,
            Parent::Unknown => snapshots.last().map(|snapshot| snapshot.id.sequence),
        })
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
        if self.open_at(volume.id).is_some() {
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

/// The sequence of the snapshot that this one's tree began as a copy of, if it is one of its volume.
pub(super) fn parent(snapshot: &SnapshotInfo) -> Option<u64> {
    match snapshot.parent {
        Parent::Snapshot(sequence) => Some(sequence),
        Parent::Origin => None,
        // As most are, when nobody has noted it.
        Parent::Unknown => snapshot.id.sequence.checked_sub(1),
    }
}

/// For each snapshot in the log, the nearest that is shown: itself, or of those it descends from.
fn nearest_shown(
    snapshots: &[SnapshotInfo],
    shown: impl Fn(&SnapshotInfo) -> bool,
) -> Vec<Option<u64>> {
    let mut nearest: Vec<Option<u64>> = Vec::with_capacity(snapshots.len());
    for snapshot in snapshots {
        // A tree begins as a copy of an older one, which stands before it in the log.
        let above = parent(snapshot).and_then(|parent| *nearest.get(parent as usize)?);
        nearest.push(if shown(snapshot) { Some(snapshot.id.sequence) } else { above });
    }
    nearest
}

pub(super) fn from_log(volume: VolumeId, entry: &LogEntry) -> SnapshotInfo {
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
        parent: entry.parent,
    }
}
