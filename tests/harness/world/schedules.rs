//! Snapshots by schedule, as the daemon's scheduler takes them, in virtual time.

use std::time::Duration;

use bessel_mapping::request::{Reply, VolumeId, deletions};
use bessel_mapping::schedule::{Age, Keep, Known, Schedule, Timetable};
use bessel_reactor::clock::{Instant, WallTime};

use super::{Action, Outcome, PowerCut, Ticket, World};

/// Nanoseconds of a schedule in one of the world, in which a life lasts some milliseconds.
const SCHEDULE_SCALE: u64 = 1000;

/// A schedule under way, and what it waits for.
#[derive(Clone, Debug)]
pub(super) struct Running {
    table: Timetable,
    taking: Vec<Ticket>,
    /// Deletions that have not ended, and those that have.
    thinning: Vec<Ticket>,
    thinned: Vec<u64>,
}

impl World {
    /// Gives a volume a schedule drawn from the world's dice, or takes it away.
    pub fn change_schedule(&mut self, volume: VolumeId) {
        if self.schedules.remove(&volume).is_some() && self.random.chance(1, 2) {
            return;
        }
        let milliseconds = Duration::from_millis;
        let keep = match self.random.below(3) {
            0 => Keep::Newest(1 + self.random.below(5)),
            1 => Keep::Ages(vec![
                Age { up_to: milliseconds(300), spacing: None },
                Age { up_to: milliseconds(2000), spacing: Some(milliseconds(200)) },
            ]),
            _ => Keep::All,
        };
        let every = milliseconds(100 + self.random.below(900));
        self.set_schedule(volume, Schedule { every, keep });
    }

    /// Gives a volume a schedule, in whose time the world's microseconds are milliseconds.
    pub fn set_schedule(&mut self, volume: VolumeId, schedule: Schedule) {
        let known = |(sequence, time)| Known { sequence, time, labelled: false };
        let live: Vec<Known> = self.model.unlabelled(volume).into_iter().map(known).collect();
        let table = Timetable::new(schedule, self.schedule_time().0, live);
        let running =
            Running { table, taking: Vec::new(), thinning: Vec::new(), thinned: Vec::new() };
        self.schedules.insert(volume, running);
    }

    /// Goes on until everything has been answered that a volume's schedule has asked for.
    pub fn await_schedule(&mut self, volume: VolumeId) -> Result<(), PowerCut> {
        self.run_until(|world| {
            let running = world.schedules.get(&volume);
            let mut asked = running.into_iter().flat_map(|it| it.taking.iter().chain(&it.thinning));
            asked.all(|ticket| world.outcomes.contains_key(ticket))
        })
    }

    /// Takes a volume's schedule away.
    pub fn drop_schedule(&mut self, volume: VolumeId) {
        self.schedules.remove(&volume);
    }

    fn schedule_time(&self) -> (Instant, WallTime) {
        let nanoseconds = self.now.as_nanos() * SCHEDULE_SCALE;
        (Instant::from_nanos(nanoseconds), WallTime::from_unix_nanos(nanoseconds))
    }

    /// Does what schedules ask for now.
    pub fn run_schedules(&mut self) {
        let (now, wall) = self.schedule_time();
        let mut schedules = std::mem::take(&mut self.schedules);
        let moving = |volume| self.moves.is_moving(volume);
        schedules.retain(|volume, _| self.volumes.contains_key(volume) || moving(*volume));
        for (volume, running) in &mut schedules {
            if self.moves.is_moving(*volume) {
                continue; // It is late, then.
            }
            self.take_answers(running, wall);
            let due = running.table.poll(now, wall);
            if due.snapshot {
                let action = Action::Snapshot { volume: *volume, label: None };
                running.taking.push(self.start(action));
            }
            // What somebody deletes at this moment, or may have deleted, is not asked for again.
            let there = self.model.snapshots(*volume);
            let (going, unknown): (Vec<u64>, Vec<u64>) =
                due.thin.iter().partition(|sequence| there.contains(sequence));
            unknown.iter().for_each(|sequence| running.table.forget(*sequence));
            for piece in deletions(&going) {
                let sequences = piece.to_vec();
                let action = Action::DeleteSnapshots { volume: *volume, sequences };
                running.thinning.push(self.start(action));
            }
            if going.is_empty() && !unknown.is_empty() {
                running.table.thinned(Some(&[]));
            }
        }
        self.schedules = schedules;
    }

    fn take_answers(&mut self, running: &mut Running, wall: WallTime) {
        for ticket in std::mem::take(&mut running.taking) {
            match self.outcomes.remove(&ticket) {
                None => running.taking.push(ticket),
                Some(Outcome::Reply(Reply::Snapshot(info))) => {
                    running.table.taken(info.id.sequence, wall);
                }
                Some(_) => running.table.failed(),
            }
        }
        let waited = !running.thinning.is_empty();
        running.thinning.retain(|ticket| match self.outcomes.remove(ticket) {
            Some(Outcome::Reply(Reply::Deleted(gone))) => {
                running.thinned.extend(gone);
                false
            }
            Some(_) => false,
            None => true,
        });
        if waited && running.thinning.is_empty() {
            running.table.thinned(Some(&std::mem::take(&mut running.thinned)));
        }
    }

    /// Tells the volume's schedule what others have done.
    pub(super) fn note_for_schedule(&mut self, action: &Action, reply: &Reply) {
        let wall = self.schedule_time().1;
        let known = |sequence, labelled| Known { sequence, time: wall, labelled };
        let (volume, note) = match (action, reply) {
            (Action::Snapshot { volume, label: Some(_) }, Reply::Snapshot(info)) => {
                (*volume, known(info.id.sequence, true))
            }
            (Action::Rollback { snapshot }, Reply::Snapshot(info)) => {
                (snapshot.volume, known(info.id.sequence, true))
            }
            (Action::Label { snapshot, label }, _) => {
                (snapshot.volume, known(snapshot.sequence, label.is_some()))
            }
            (Action::DeleteSnapshot { snapshot }, _) => {
                let running = self.schedules.get_mut(&snapshot.volume);
                running.into_iter().for_each(|it| it.table.forget(snapshot.sequence));
                return;
            }
            _ => return,
        };
        self.schedules.get_mut(&volume).into_iter().for_each(|it| it.table.note(note));
    }
}
