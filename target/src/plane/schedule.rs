//! Schedules of snapshots: which volume has which, and telling the thread that takes them.
//!
//! A volume of the configuration has at each start the schedule that stands there, or none. One that is
//! set by the API counts until the daemon ends: the store says nothing of schedules.

use super::logs::Snapshots;
use super::{Answered, ControlPlane, Step};
use crate::api::Refusal;
use crate::api::types::VolumeView;
use crate::scheduler::{Begin, Progress};
use bessel_mapping::request::{SnapshotInfo, VolumeId};
use bessel_mapping::schedule::{Keep, Known, Schedule, ScheduleCounters};
use bessel_mapping::snapshot_log::PAGE_MAX;
use std::sync::Arc;

/// A volume's schedule, and what it has come to.
#[derive(Clone, Debug)]
pub(super) struct Scheduled {
    pub(super) schedule: Schedule,
    pub(super) progress: Arc<Progress>,
}

impl Scheduled {
    pub(super) fn new(schedule: Schedule) -> Self {
        Self { schedule, progress: Arc::default() }
    }
}

fn known(snapshot: &SnapshotInfo) -> Known {
    Known {
        sequence: snapshot.id.sequence,
        time: snapshot.time,
        labelled: snapshot.label.is_some(),
    }
}

impl ControlPlane {
    /// Gives a volume a schedule in the place of the one it has, or takes it away.
    pub(crate) fn set_schedule(
        &mut self,
        name: &str,
        schedule: Option<Schedule>,
    ) -> Answered<VolumeView> {
        if let Some(Err(error)) = schedule.as_ref().map(Schedule::check) {
            return Err(Refusal::malformed(error));
        }
        let (id, ..) = self.find_served(name)?;
        self.schedules.end(id);
        let served = self.served.get_mut(&id).expect("it was found above");
        served.schedule = schedule.map(Scheduled::new);
        self.begin_schedule(id);
        self.show_volume(name)
    }

    /// Begins the schedule of a volume that is open, if it has one.
    pub(super) fn begin_schedule(&mut self, id: VolumeId) {
        let Some(served) = self.served.get(&id) else { return };
        let Some(Scheduled { schedule, progress }) = served.schedule.clone() else { return };
        let Some(name) = self.name_of_present(id) else { return };
        let keeps_all = schedule.keep == Keep::All;
        self.schedules.begin(Begin {
            volume: id,
            name,
            handle: served.handle,
            port: self.homes[served.home].port.clone(),
            schedule,
            progress,
        });
        self.to_be_told.retain(|(other, _)| *other != id);
        if !keeps_all {
            self.to_be_told.push_back((id, 0));
        }
    }

    /// Tells a schedule of some more of the snapshots that its volume had when it began.
    pub(super) fn tell_schedules(&mut self) -> Step {
        let Some((id, from)) = self.to_be_told.pop_front() else { return Step::Done };
        let Ok(info) = self.info(id) else { return Step::More }; // It has no schedule any more.
        if info.log.out_of_reach > from && info.log.fault.is_none() {
            self.to_be_told.push_back((id, from));
            return Step::Later;
        }
        // What cannot be read is not thinned.
        let Ok(Snapshots { snapshots, next }) =
            self.page(id, from.max(info.log.out_of_reach), PAGE_MAX, false)
        else {
            return Step::More;
        };
        self.schedules.known(id, snapshots.iter().map(known).collect(), next.is_none());
        self.to_be_told.extend(next.map(|next| (id, next)));
        Step::More
    }

    /// Tells the volume's schedule of a snapshot that an operator has taken or labelled.
    pub(super) fn note_snapshot(&self, snapshot: &SnapshotInfo) {
        self.schedules.noted(snapshot.id.volume, known(snapshot));
    }

    /// What the schedule of an open volume has come to.
    pub(super) fn scheduled_of(&self, id: VolumeId) -> ScheduleCounters {
        let scheduled = self.served.get(&id).and_then(|served| served.schedule.as_ref());
        scheduled.map_or_else(ScheduleCounters::default, |it| it.progress.counters())
    }
}
