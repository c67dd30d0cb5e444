//! Volumes and snapshots by descent.
//!
//! What was deleted is left out, except where something that lives descends from it.
//!
//! The control plane gives the volumes, and then their snapshots by pages. Who asks for the tree puts them
//! together, since that may take as long as there are snapshots.

use super::logs::Snapshots;
use super::{Answered, ControlPlane, view};
use crate::api::types::TreeVolume;
use bessel_mapping::directory::VolumeSummary;
use bessel_mapping::format::Parent;
use bessel_mapping::request::{SnapshotId, SnapshotInfo, VolumeId};
use bessel_mapping::snapshot_log::PAGE_MAX;
use std::collections::BTreeSet;

/// A volume of the tree whose snapshots are being looked at, from old to new.
pub(crate) struct Branch {
    id: VolumeId,
    volume: TreeVolume,
    /// Snapshots that clones were made of: they are shown though they are deleted.
    origins: BTreeSet<u64>,
    /// The sequence of the snapshot that what the volume holds began as a copy of.
    current: CurrentParent,
    /// For each snapshot, the nearest that is shown: itself, or of those it descends from; from `first` on.
    nearest: Vec<u64>,
    first: u64,
}

#[derive(Clone, Copy)]
enum CurrentParent {
    Of(Option<u64>),
    /// As most are, when nobody has noted it.
    Newest,
}

/// No snapshot that is shown.
const NONE: u64 = u64::MAX;

impl Branch {
    /// What the API shows of it, when all its snapshots were looked at.
    pub(crate) fn finish(self) -> TreeVolume {
        let newest = (self.first + self.nearest.len() as u64).checked_sub(1);
        let parent = match self.current {
            CurrentParent::Of(parent) => parent,
            CurrentParent::Newest => newest,
        };
        TreeVolume { parent: self.shown(parent), ..self.volume }
    }

    /// The name of the nearest snapshot that is shown above one.
    fn shown(&self, parent: Option<u64>) -> Option<String> {
        let at = parent?.checked_sub(self.first)?;
        let nearest = self.nearest.get(at as usize).copied().filter(|it| *it != NONE)?;
        Some(SnapshotId { volume: self.id, sequence: nearest }.to_string())
    }

    fn add(&mut self, snapshots: &[SnapshotInfo]) {
        for snapshot in snapshots {
            let sequence = snapshot.id.sequence;
            if self.nearest.is_empty() {
                self.first = sequence;
            }
            // A tree begins as a copy of an older one, which stands before it in the log.
            let above = parent(snapshot).and_then(|parent| parent.checked_sub(self.first));
            let above = above.and_then(|at| self.nearest.get(at as usize).copied());
            let gone = snapshot.deleted || self.volume.deleted;
            let is_shown = !gone || self.origins.contains(&sequence);
            if is_shown {
                let view = view::snapshot(snapshot, &self.volume.name);
                let parent = self.shown(parent(snapshot));
                self.volume.snapshots.push(crate::api::types::SnapshotView { parent, ..view });
            }
            self.nearest.push(if is_shown { sequence } else { above.unwrap_or(NONE) });
        }
    }
}

impl ControlPlane {
    /// The volumes of the tree, without their snapshots.
    pub(crate) fn branches(&mut self) -> Answered<Vec<Branch>> {
        let kept = self.living_and_their_ancestors();
        let origins: BTreeSet<SnapshotId> = self
            .directory
            .volumes()
            .filter(|volume| kept.contains(&volume.id))
            .filter_map(|volume| volume.origin)
            .collect();
        let volumes = self.directory.volumes().filter(|volume| kept.contains(&volume.id));
        let branches = volumes.map(|volume| {
            let id = volume.id;
            let all =
                SnapshotId { volume: id, sequence: 0 }..=SnapshotId { volume: id, sequence: NONE };
            Ok(Branch {
                id,
                origins: origins.range(all).map(|origin| origin.sequence).collect(),
                current: self.current_parent(volume)?,
                volume: TreeVolume {
                    id: id.0,
                    name: volume.name.clone(),
                    size_bytes: volume.size.get(),
                    origin: volume.origin.map(|origin| origin.to_string()),
                    deleted: volume.deleted,
                    parent: None,
                    snapshots: Vec::new(),
                },
                nearest: Vec::new(),
                first: 0,
            })
        });
        branches.collect()
    }

    /// Looks at some more snapshots of a branch. True when there are more. Those that cannot be read are
    /// left out, and so are all when nobody knows them any more.
    pub(crate) fn grow(&mut self, mut branch: Branch) -> (Branch, bool) {
        let readable = self.log_state(branch.id).map_or(0, |log| log.out_of_reach);
        let from = (branch.first + branch.nearest.len() as u64).max(readable);
        if !branch.nearest.is_empty() && from > branch.first + branch.nearest.len() as u64 {
            return (branch, false); // It was opened anew meanwhile.
        }
        match self.page(branch.id, from, PAGE_MAX, true) {
            Ok(Snapshots { snapshots, next }) => {
                branch.add(&snapshots);
                (branch, next.is_some())
            }
            Err(_) => (branch, false),
        }
    }

    fn current_parent(&self, volume: &VolumeSummary) -> Answered<CurrentParent> {
        let parent = if self.served.contains_key(&volume.id) {
            self.info(volume.id)?.current.parent
        } else {
            let entry = self.directory.entry(volume.id).filter(|_| !volume.deleted);
            entry.map_or(Parent::Unknown, |entry| entry.record.parent)
        };
        Ok(match parent {
            Parent::Snapshot(sequence) => CurrentParent::Of(Some(sequence)),
            Parent::Origin => CurrentParent::Of(None),
            Parent::Unknown => CurrentParent::Newest,
        })
    }

    pub(super) fn living_and_their_ancestors(&self) -> BTreeSet<VolumeId> {
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
