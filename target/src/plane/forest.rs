//! What the control plane knows of the forest of trees: which was derived from which.

use super::tree::from_log;
use super::{Answered, ControlPlane};
use bessel_mapping::directory::{VolumeEntry, VolumeSummary};
use bessel_mapping::forest::{Forest, ForestVolume};
use bessel_mapping::request::{CurrentTree, SnapshotInfo, VolumeId};
use std::collections::BTreeSet;

impl ControlPlane {
    /// The forest that a volume belongs to. All that is in it is asked now: no clone, rollback or
    /// deletion runs meanwhile, since this thread does those.
    pub(super) fn forest_of(&self, id: VolumeId) -> Answered<Forest> {
        let volumes = self.connected_to(id).into_iter();
        let listed = volumes.filter_map(|id| self.directory.get(id));
        let volumes = listed.map(|volume| self.in_forest(volume));
        let mut volumes = volumes.collect::<Answered<Vec<_>>>()?;
        let unborn = self.unborn.iter();
        volumes.extend(unborn.map(|(id, origin)| ForestVolume::unknown(*id, Some(*origin))));
        Ok(Forest::new(volumes))
    }

    /// The volumes that are connected to one by their origins.
    fn connected_to(&self, id: VolumeId) -> BTreeSet<VolumeId> {
        let (mut found, mut next) = (BTreeSet::new(), vec![id]);
        while let Some(id) = next.pop() {
            if !found.insert(id) {
                continue;
            }
            for volume in self.directory.volumes() {
                let origin = volume.origin.map(|origin| origin.volume);
                if volume.id == id {
                    next.extend(origin);
                } else if origin == Some(id) {
                    next.push(volume.id);
                }
            }
        }
        found
    }

    fn in_forest(&self, volume: &VolumeSummary) -> Answered<ForestVolume> {
        let VolumeSummary { id, origin, .. } = *volume;
        if volume.deleted {
            let known = self.departed.get(&id).cloned();
            let read = || self.directory.entry(id).map(snapshots_of_entry);
            return Ok(match known.or_else(read) {
                Some(snapshots) => ForestVolume::deleted(id, origin, &snapshots),
                None => ForestVolume::unknown(id, origin),
            });
        }
        if self.open_at(id).is_some() {
            let info = self.info(id)?;
            return Ok(match info.latched {
                None => ForestVolume::present(id, origin, &info.snapshots, info.current),
                // What the device holds of it is not known.
                Some(_) => ForestVolume::unknown(id, origin),
            });
        }
        if let Some(detached) = self.detached.get(&id) {
            return Ok(match detached.current {
                Some(current) => ForestVolume::present(id, origin, &detached.snapshots, current),
                None => ForestVolume::unknown(id, origin),
            });
        }
        let entry = self.directory.entry(id).filter(|_| !self.restored.contains_key(&id));
        Ok(match entry {
            Some(entry) => {
                let VolumeEntry { record, .. } = entry;
                let (root, height, parent) = (record.root, record.height, record.parent);
                let current = CurrentTree { root, height, parent };
                ForestVolume::present(id, origin, &snapshots_of_entry(entry), current)
            }
            None => ForestVolume::unknown(id, origin),
        })
    }
}

fn snapshots_of_entry(entry: &VolumeEntry) -> Vec<SnapshotInfo> {
    entry.log.iter().map(|snapshot| from_log(entry.record.id, snapshot)).collect()
}
