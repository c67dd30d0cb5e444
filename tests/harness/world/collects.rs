//! The collector beside everything else, as the daemon's thread runs it: a step of its own between
//! steps of the shards, and never while a deleted snapshot's blocks are being freed.

use std::collections::BTreeSet;

use bessel_mapping::blocking::Blocking;
use bessel_mapping::forest::Tree;
use bessel_mapping::gc::{CollectError, Collected, Collection, Next, Progress, Spare};
use bessel_mapping::request::{Command, Reply, SnapshotInfo, VolumeId, VolumeInfo};
use bessel_mapping::snapshot_log::PAGE_MAX;
use bessel_reactor::device::sim::Random;

use super::reclaims::marks;
use super::{OpenVolume, Pending, Ticket, World};

/// What is being done.
#[derive(Debug)]
enum Now {
    /// The shards, or shard 0, are asked.
    Asked { asked: BTreeSet<Ticket>, replies: Vec<Reply> },
    /// Volumes are asked what they have: some of their deleted snapshots wait to be freed.
    Look {
        asked: BTreeSet<Ticket>,
        shown: Vec<VolumeInfo>,
        snapshots: Vec<SnapshotInfo>,
        /// One has not told.
        failed: bool,
    },
}

#[derive(Debug)]
struct Running {
    job: Box<Collection>,
    now: Option<Now>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Collects {
    wanted: bool,
    running: Option<Running>,
    /// What is under way goes no further for now.
    held: bool,
    /// Volumes that were published while the one under way runs.
    pub(super) published: Vec<VolumeId>,
    /// A volume was deleted since it began.
    pub(super) volume_deleted: bool,
    /// A volume could not be made: whether the disk has it, nobody knows.
    pub(super) doubtful_creation: bool,
    /// Not the world's: worlds without collections go as they always went.
    dice: Random,
    done: Vec<Result<Collected, CollectError>>,
}

impl Collects {
    pub(super) fn new(seed: u64) -> Self {
        let dice = Random::new(seed ^ 0xc011ec7);
        Self {
            wanted: false,
            running: None,
            held: false,
            published: Vec::new(),
            volume_deleted: false,
            doubtful_creation: false,
            dice,
            done: Vec::new(),
        }
    }

    /// Nothing is wanted or under way.
    pub(super) fn is_idle(&self) -> bool {
        !self.wanted && self.running.is_none()
    }

    /// Volumes are being asked what they have.
    pub(super) fn is_looking(&self) -> bool {
        let now = self.running.as_ref().and_then(|running| running.now.as_ref());
        matches!(now, Some(Now::Look { .. }))
    }

    /// One is under way.
    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// The process ends.
    pub(super) fn clear(&mut self) {
        self.wanted = false;
        self.running = None;
        self.doubtful_creation = false;
    }
}

impl World {
    /// Has the store collected, once nothing is being freed otherwise.
    pub fn start_collection(&mut self) {
        self.collects.wanted = true;
    }

    /// The collections that have ended, in order.
    pub fn collections(&self) -> &[Result<Collected, CollectError>] {
        &self.collects.done
    }

    /// Collects, from start to end, and again when it has to be.
    pub fn collect_garbage(&mut self) -> Result<Result<Collected, CollectError>, super::PowerCut> {
        loop {
            let before = self.collects.done.len();
            self.start_collection();
            self.run_until(|world| world.collects.done.len() > before)?;
            let outcome = self.collects.done[before].clone();
            if !matches!(outcome, Err(CollectError::VolumeDeleted)) {
                return Ok(outcome);
            }
        }
    }

    /// How far the collection has come that is under way.
    pub fn collection_progress(&self) -> Option<Progress> {
        self.collects.running.as_ref().map(|running| running.job.progress())
    }

    /// Keeps the collection under way from going further, while everything else does.
    pub fn hold_collection(&mut self, held: bool) {
        self.collects.held = held;
    }

    /// Goes on until no collection is wanted or under way.
    pub fn await_collection(&mut self) -> Result<(), super::PowerCut> {
        self.run_until(|world| world.collects.is_idle())
    }

    /// Wants a collection now and then, as often as `times` of `of` times that it is asked.
    pub fn collect_sometimes(&mut self, times: u64, of: u64) {
        if self.collects.is_idle() && self.collects.dice.chance(times, of) {
            self.start_collection();
        }
    }

    /// Does a little of what is to be done, or nothing.
    pub(super) fn step_collection(&mut self) -> bool {
        // Its reads are waited for: they must come.
        if self.collects.is_idle()
            || self.collects.held
            || self.faults.is_some()
            || self.disk.stopped()
            || self.disk.is_holding()
        {
            return false;
        }
        if self.collects.dice.chance(1, 2) {
            return true;
        }
        let Some(running) = &mut self.collects.running else {
            if !self.reclaims.is_between() {
                return false;
            }
            self.collects.wanted = false;
            self.collects.published.clear();
            self.collects.volume_deleted = false;
            self.reclaims.collection_begins();
            self.tell(format_args!("collecting"));
            let job = Box::new(Collection::new(&self.store));
            self.collects.running = Some(Running { job, now: None });
            return true;
        };
        match running.now.take() {
            Some(Now::Asked { asked, replies }) if asked.is_empty() => {
                running.job.answered(replies);
            }
            Some(Now::Look { asked, shown, snapshots, failed }) if asked.is_empty() => {
                self.spare(&shown, &snapshots, failed);
            }
            None => {}
            waiting => {
                running.now = waiting;
                return false;
            }
        }
        self.go_on_collecting();
        true
    }

    fn go_on_collecting(&mut self) {
        let Some(running) = &mut self.collects.running else { return };
        let (shards, command) = match running.job.next() {
            Next::Read => {
                let mut device = self.disk.connect();
                running.job.read(&mut Blocking::new(&mut device));
                return;
            }
            Next::Spare if !self.moves.is_idle() => return, // Once all have a home.
            Next::Spare => return self.look_for_waiting(),
            Next::AskAll(command) => (self.shards.len(), command),
            Next::AskAuthority(command) => (1, command),
            Next::Done(outcome) => {
                self.tell(format_args!("collected: {outcome:?}"));
                self.collects.running = None;
                match &outcome {
                    Ok(collected) => self.store.directory.collected(&collected.deleted_volumes),
                    // These are no faults, and the next one goes further.
                    Err(
                        CollectError::Refused(_) | CollectError::VolumeDeleted | CollectError::Full,
                    ) => {}
                    Err(error) => assert!(self.may_fail(), "{error}"),
                }
                self.collects.done.push(outcome);
                return;
            }
        };
        let mut asked = BTreeSet::new();
        for shard in 0..shards {
            let ticket = self.ticket();
            asked.insert(ticket);
            self.commands.insert(ticket, Pending::Collect);
            self.control(shard, ticket, command.clone());
        }
        self.now_collecting(Now::Asked { asked, replies: Vec::new() });
    }

    fn now_collecting(&mut self, now: Now) {
        let running = self.collects.running.as_mut().expect("one is under way");
        running.now = Some(now);
    }

    /// Asks all volumes what they have.
    fn look_for_waiting(&mut self) {
        let unknown = self.store.directory.volumes().find(|volume| {
            let open =
                self.volumes.contains_key(&volume.id) || self.deleting.contains_key(&volume.id);
            !volume.deleted && !open
        });
        if unknown.is_some() || self.store.directory.unreadable().is_some() {
            let running = self.collects.running.as_mut().expect("one is under way");
            return running.job.fail("not all volumes are open".to_owned());
        }
        let open: Vec<OpenVolume> = self.volumes.values().copied().collect();
        let mut asked = BTreeSet::new();
        for OpenVolume { shard, handle: volume, .. } in open {
            let all = Command::Page { volume, from: 0, limit: PAGE_MAX, with_deleted: true };
            for command in [Command::Show { volume }, all] {
                let ticket = self.ticket();
                asked.insert(ticket);
                self.commands.insert(ticket, Pending::Collect);
                self.control(shard, ticket, command);
            }
        }
        let (shown, snapshots) = (Vec::new(), Vec::new());
        self.now_collecting(Now::Look { asked, shown, snapshots, failed: false });
    }

    /// The trees of deleted snapshots that wait or were left meanwhile, or whose mark is not durable yet.
    fn spare(&mut self, shown: &[VolumeInfo], snapshots: &[SnapshotInfo], mut failed: bool) {
        let mut waiting: Vec<_> = self.reclaims.waiting_or_left().collect();
        waiting.extend(self.commands.values().flat_map(marks));
        failed |= shown.iter().any(|it| it.latched.is_some()) || self.collects.doubtful_creation;
        let tree = |root, height| Tree { root, height };
        // The device had no record of these when it was read.
        let unread =
            |id: &VolumeId| self.unpublished.contains(id) || self.collects.published.contains(id);
        let snapshots = snapshots
            .iter()
            .filter(|it| waiting.contains(&it.id) || unread(&it.id.volume) && !it.deleted);
        let mut trees: Vec<Tree> = snapshots.map(|it| tree(it.root, it.height)).collect();
        let current = shown.iter().filter(|volume| unread(&volume.id));
        trees.extend(current.map(|it| tree(it.current.root, it.current.height)));
        let running = self.collects.running.as_mut().expect("one is under way");
        if failed {
            running.job.fail("a volume has failed".to_owned());
        } else {
            let volume_deleted = self.collects.volume_deleted || !self.deleting.is_empty();
            running.job.spare(Spare { trees, volume_deleted });
        }
    }

    /// A shard has answered.
    pub(super) fn collection_answered(&mut self, ticket: Ticket, reply: Reply) {
        let may_fail = self.may_fail();
        let Some(running) = &mut self.collects.running else { return };
        match &mut running.now {
            Some(Now::Asked { asked, replies }) => {
                let ours = asked.remove(&ticket);
                replies.extend(ours.then_some(reply));
            }
            Some(Now::Look { asked, shown, snapshots, failed }) => {
                if !asked.remove(&ticket) {
                    return;
                }
                match reply {
                    Reply::Volume(info) => shown.push(*info),
                    Reply::Page { snapshots: page, next } => {
                        assert_eq!(next, None, "a volume of a page of snapshots");
                        snapshots.extend(page);
                    }
                    // Its volume went meanwhile, with the command that was before this one; or its log
                    // cannot be read.
                    _ => *failed |= may_fail,
                }
            }
            None => {}
        }
    }
}
