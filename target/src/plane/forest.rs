//! What the control plane knows of the forest of trees: which was derived from which.
//!
//! It is kept from one deletion to the next, and catches up with what was taken meanwhile. Deletions,
//! clones, rollbacks, closings and openings are all carried out by this thread, so no one else has to tell
//! it of these; the snapshots of schedules it finds when it asks.

use super::logs::Snapshots;
use super::{Answered, ControlPlane};
use bessel_mapping::directory::VolumeSummary;
use bessel_mapping::forest::NoAnswer;
use bessel_mapping::reclaim::ReclaimPlan;
use bessel_mapping::request::{CurrentTree, LogState, SnapshotId, VolumeId};
use bessel_mapping::snapshot_log::PAGE_MAX;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Pages of one volume that are asked for between two operations.
const PAGES_PER_STEP: u32 = 8;

/// How far something has come that takes several steps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    /// To its end.
    Done,
    /// There is more to do at once.
    More,
    /// It waits for a log that is being read.
    Later,
}

/// Deleted snapshots for which it has not been found out what only they held, oldest first.
#[derive(Default)]
pub(super) struct Unplanned {
    queue: VecDeque<SnapshotId>,
    waiting: BTreeSet<SnapshotId>,
}

impl Unplanned {
    fn push(&mut self, snapshot: SnapshotId) {
        self.queue.push_back(snapshot);
        self.waiting.insert(snapshot);
    }

    fn pop(&mut self) {
        if let Some(snapshot) = self.queue.pop_front() {
            self.waiting.remove(&snapshot);
        }
    }

    pub(super) fn len(&self) -> u64 {
        self.queue.len() as u64
    }

    /// Leaves all of them to the collector.
    pub(super) fn leave(&mut self) -> VecDeque<SnapshotId> {
        self.waiting.clear();
        std::mem::take(&mut self.queue)
    }
}

/// What planning has come to.
enum Planned {
    Plan(ReclaimPlan),
    /// More has to be known first.
    Not(Step),
    /// It is the collector's.
    Left(String),
}

impl ControlPlane {
    /// Has what these snapshots of a volume alone held freed. Their marks are durable. What cannot be found
    /// out at once is found out between operations.
    ///
    /// # Errors
    /// Why that, for some of them, is left to the collector.
    pub(super) fn reclaim(&mut self, volume: VolumeId, sequences: &[u64]) -> Result<(), String> {
        if self.reclaimer.is_none() {
            return Ok(());
        }
        self.collections.note_deletion();
        let id = |sequence: &u64| SnapshotId { volume, sequence: *sequence };
        sequences.iter().for_each(|sequence| self.forest.mark_deleted(id(sequence)));
        let places: BTreeMap<u64, usize> = sequences.iter().copied().zip(0..).collect();
        self.begin_question();
        let mut outcome = Ok(());
        for (place, sequence) in sequences.iter().enumerate() {
            let snapshot = id(sequence);
            if self.unplanned.len() > 0 {
                self.unplanned.push(snapshot);
                continue;
            }
            // One after the other, so those that come later are still there.
            let later = |other: SnapshotId| {
                other.volume == volume && places.get(&other.sequence).is_some_and(|at| *at > place)
            };
            match self.plan(snapshot, later) {
                Planned::Not(_) => self.unplanned.push(snapshot),
                planned => outcome = self.hand_on(snapshot, planned).and(outcome),
            }
        }
        outcome
    }

    /// Does some of the planning that was put off.
    pub(super) fn plan_what_waits(&mut self) -> Step {
        let Some(&snapshot) = self.unplanned.queue.front() else { return Step::Done };
        self.begin_question();
        let waiting = std::mem::take(&mut self.unplanned.waiting);
        let planned = self.plan(snapshot, |other| other != snapshot && waiting.contains(&other));
        self.unplanned.waiting = waiting;
        if let Planned::Not(step) = planned {
            return step;
        }
        self.unplanned.pop();
        if let Err(why) = self.hand_on(snapshot, planned) {
            tracing::debug!(%snapshot, "its space is left to the collector: {why}");
        }
        Step::More
    }

    fn hand_on(&mut self, snapshot: SnapshotId, planned: Planned) -> Result<(), String> {
        let Some(reclaimer) = &self.reclaimer else { return Ok(()) };
        match planned {
            Planned::Plan(plan) => reclaimer.push(plan),
            Planned::Left(why) => {
                reclaimer.leave();
                if reclaimer.is_collecting() {
                    self.collections.note_left(snapshot);
                }
                return Err(why);
            }
            Planned::Not(_) => unreachable!("the caller has looked"),
        }
        Ok(())
    }

    /// What is asked of the forest from here on is asked of it as it is now.
    pub(super) fn begin_question(&mut self) {
        for volume in self.directory.volumes() {
            self.forest.add(volume.id, volume.origin);
        }
        for (id, origin) in &self.unborn {
            self.forest.add(*id, Some(*origin));
        }
        self.forest.begin();
    }

    fn plan(&mut self, snapshot: SnapshotId, waits: impl Fn(SnapshotId) -> bool) -> Planned {
        if let Some(slot) = self.directory.unreadable() {
            let why = format!("the volume record in registry slot {slot} cannot be read");
            return Planned::Left(why);
        }
        loop {
            let concerned = match ReclaimPlan::new(&self.forest, snapshot, &waits) {
                Ok(plan) => return Planned::Plan(plan),
                Err(NoAnswer::Unknown(unknown)) => return Planned::Left(unknown.to_string()),
                Err(NoAnswer::Ask(concerned)) => concerned,
            };
            for id in concerned {
                match self.catch_up(id) {
                    Ok(Step::Done) => {}
                    Ok(step) => return Planned::Not(step),
                    Err(refusal) => return Planned::Left(refusal.to_string()),
                }
            }
        }
    }

    /// Tells the forest what a volume has now, if all of that can be had in a few pages.
    pub(super) fn catch_up(&mut self, id: VolumeId) -> Answered<Step> {
        let Some(&VolumeSummary { deleted, .. }) = self.directory.get(id) else {
            self.forest.set_unknown(id);
            return Ok(Step::Done);
        };
        let (known, log) = if self.served.contains_key(&id) {
            let info = self.info(id)?;
            // What the device holds of one that has failed is not known.
            (info.latched.is_none().then_some(info.current), info.log)
        } else {
            match self.log_state(id) {
                Ok(log) => (self.current_of_closed(id), log),
                Err(_) => (None, LogState::default()),
            }
        };
        let lost = log.fault.is_some();
        let known = known.filter(|_| !lost && !deleted);
        if lost || known.is_none() && !deleted {
            self.forest.set_unknown(id);
            return Ok(Step::Done);
        }
        if log.out_of_reach > 0 {
            return Ok(Step::Later); // It is being read.
        }
        for _ in 0..PAGES_PER_STEP {
            let from = self.forest.known(id);
            if from >= log.taken {
                match known {
                    Some(current) => self.forest.set_present(id, current, log.taken),
                    None => self.forest.set_gone(id),
                }
                return Ok(Step::Done);
            }
            let Snapshots { snapshots, .. } = self.page(id, from, PAGE_MAX, true)?;
            self.forest.extend(id, &snapshots);
        }
        Ok(Step::More)
    }

    /// The current tree of a volume that is closed; none when it is not known.
    fn current_of_closed(&self, id: VolumeId) -> Option<CurrentTree> {
        if let Some(detached) = self.detached.get(&id) {
            return detached.current;
        }
        let entry = self.directory.entry(id).filter(|_| !self.restored.contains_key(&id))?;
        let record = &entry.record;
        Some(CurrentTree { root: record.root, height: record.height, parent: record.parent })
    }
}
