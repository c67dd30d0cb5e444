//! Looking snapshots up: one by one, or by pages.
//!
//! An open volume's home has its log; of one that is not open the control plane keeps it, as it was handed
//! over when the volume was closed or as it is read from the device, a few blocks between two operations.
//! A log is never copied. It may be long in being read: [`ControlPlane::unread`] says whether somebody who
//! needs it would have to wait, and who waits does so elsewhere, so that this thread goes on.

use super::{Answered, ControlPlane, refuse_command};
use crate::api::types::SnapshotView;
use crate::api::{Refusal, RefusalKind};
use crate::plane::view;
use crate::reference::{Moment, SnapshotReference};
use crate::time::rfc3339;
use bessel_mapping::blocking::Blocking;
use bessel_mapping::request::{
    Command, CommandError, LogState, Reply, SnapshotId, SnapshotInfo, VolumeId, Which,
};
use bessel_mapping::snapshot_log::{NotHere, PAGE_MAX, SnapshotLog};
use bessel_reactor::clock::WallTime;
use bessel_reactor::device::{FileDevice, OpenOptions};
use bessel_reactor::units::BLOCK_SIZE;
use std::collections::BTreeMap;

/// Log blocks read between two operations: some milliseconds at most.
const BLOCKS_PER_STEP: u32 = 32;

/// Logs of volumes that are not open.
#[derive(Default)]
pub(super) struct KeptLogs {
    logs: BTreeMap<VolumeId, Box<SnapshotLog>>,
    /// To read them by.
    device: Option<FileDevice>,
    /// It could not be opened.
    failed: bool,
}

impl KeptLogs {
    /// Keeps the log of a volume that was closed.
    pub(super) fn insert(&mut self, id: VolumeId, log: Box<SnapshotLog>) {
        self.logs.insert(id, log);
    }

    /// Forgets the log of a volume that is opened.
    pub(super) fn remove(&mut self, id: VolumeId) {
        self.logs.remove(&id);
    }

    pub(super) fn get(&self, id: VolumeId) -> Option<&SnapshotLog> {
        self.logs.get(&id).map(|log| &**log)
    }
}

/// Some snapshots of a volume, in order.
pub(super) struct Snapshots {
    pub(super) snapshots: Vec<SnapshotInfo>,
    /// Where the next page begins; none when this was the last.
    pub(super) next: Option<u64>,
}

/// Whose log somebody needs, and how much of it.
#[derive(Clone, Debug)]
pub(crate) enum Needed {
    /// All of a volume's.
    Volume(String),
    /// As much as a snapshot is found by.
    Snapshot(SnapshotReference),
    /// All of the volume that a snapshot is of.
    VolumeOf(SnapshotReference),
    /// All there are.
    All,
}

impl ControlPlane {
    /// How many snapshots are still to be read before somebody can go on.
    pub(crate) fn unread(&mut self, needed: &Needed) -> Answered<u64> {
        let (id, from) = match needed {
            Needed::All => {
                let all = self.living_and_their_ancestors();
                return Ok(all.into_iter().map(|id| self.unread_of(id)).sum());
            }
            Needed::Snapshot(SnapshotReference::Id(id)) => (id.volume, id.sequence),
            Needed::VolumeOf(SnapshotReference::Id(id)) => (id.volume, 0),
            Needed::Volume(name)
            | Needed::Snapshot(
                SnapshotReference::Label { volume: name, .. }
                | SnapshotReference::Time { volume: name, .. },
            )
            | Needed::VolumeOf(
                SnapshotReference::Label { volume: name, .. }
                | SnapshotReference::Time { volume: name, .. },
            ) => (self.find(name)?.id, 0),
        };
        Ok(self.unread_of(id).saturating_sub(from))
    }

    fn unread_of(&mut self, id: VolumeId) -> u64 {
        let log = match self.log_state(id) {
            Ok(log) => log,
            Err(_) => return 0, // Whoever asks for more is told.
        };
        if log.fault.is_some() { 0 } else { log.out_of_reach }
    }

    /// What is known of a volume's log. That of one that is not open begins to be read.
    pub(super) fn log_state(&mut self, id: VolumeId) -> Answered<LogState> {
        if self.served.contains_key(&id) {
            return Ok(self.info(id)?.log);
        }
        Ok(self.kept_log(id)?.state())
    }

    /// The log of a volume that is not open, which begins to be read if it was not before.
    pub(super) fn kept_log(&mut self, id: VolumeId) -> Answered<&SnapshotLog> {
        if self.kept.get(id).is_none() {
            let known = self.directory.entry(id).filter(|_| !self.restored.contains_key(&id));
            let Some(entry) = known else { return Err(self.not_open(id)) };
            let log = SnapshotLog::begin(entry, &self.store.extents);
            self.kept.insert(id, Box::new(log));
        }
        Ok(self.kept.get(id).expect("it is there now"))
    }

    /// Reads some more of the logs that are kept. True when there is more to read.
    pub(super) fn read_kept_logs(&mut self) -> bool {
        let KeptLogs { logs, device, failed } = &mut self.kept;
        if *failed {
            return false;
        }
        let Some(log) = logs.values_mut().find(|log| log.wanted().is_some()) else { return false };
        if device.is_none() {
            let options = OpenOptions { depth: 64, read_only: true, ..OpenOptions::default() };
            match FileDevice::open(&self.store.device, &options) {
                Ok(opened) => *device = Some(opened),
                Err(error) => {
                    let what = crate::one_line(&error);
                    tracing::error!("snapshot logs of closed volumes cannot be read: {what}");
                    *failed = true;
                    return false;
                }
            }
        }
        let device = device.as_mut().expect("it was just opened");
        let mut block = [0; BLOCK_SIZE as usize];
        for _ in 0..BLOCKS_PER_STEP {
            let Some(addr) = log.wanted() else { break };
            let read = Blocking::new(device).read_into(addr, &mut block);
            log.take(read.map(|()| &block[..]), self.store.opened.secret, &self.store.extents);
        }
        true
    }

    /// A page of a volume's snapshots, as [`Command::Page`] says.
    pub(super) fn page(
        &mut self,
        id: VolumeId,
        from: u64,
        limit: usize,
        with_deleted: bool,
    ) -> Answered<Snapshots> {
        if self.served.contains_key(&id) {
            let (volume, home) = self.handle_of(id)?;
            return match self.ask(home, Command::Page { volume, from, limit, with_deleted })? {
                Reply::Page { snapshots, next } => Ok(Snapshots { snapshots, next }),
                reply => unreachable!("a page was answered with {reply:?}"),
            };
        }
        if self.importing.contains_key(&id) {
            return Ok(Snapshots { snapshots: Vec::new(), next: None });
        }
        let log = self.kept_log(id)?;
        let page = log.page(from, limit, with_deleted).map_err(refuse_not_here)?;
        let snapshots = page.sequences.iter().map(|it| log.get(*it).expect("it is in the page"));
        Ok(Snapshots { snapshots: snapshots.collect(), next: page.next })
    }

    /// Refuses a snapshot that is none of this volume.
    pub(crate) fn check_is_of(&self, name: &str, snapshot: SnapshotId) -> Answered<()> {
        if self.find(name)?.id == snapshot.volume {
            return Ok(());
        }
        Err(Refusal::malformed(format!("snapshot {snapshot} is not one of volume {name:?}")))
    }

    /// Up to `limit` of a volume's snapshots that come after a position in its log: fewer only when there
    /// are no more, or when the next are still to be looked for, from the position that is told.
    pub(crate) fn list_snapshots(
        &mut self,
        name: &str,
        from: u64,
        limit: usize,
    ) -> Answered<(Vec<SnapshotView>, Option<u64>)> {
        let id = self.find(name)?.id;
        let Snapshots { snapshots, next } = self.page(id, from, limit.min(PAGE_MAX), false)?;
        let views = snapshots.iter().map(|snapshot| view::snapshot(snapshot, name));
        Ok((views.collect(), next))
    }

    /// The snapshot that somebody names, which is not deleted, of a volume that is open.
    pub(super) fn find_snapshot(&self, reference: &SnapshotReference) -> Answered<SnapshotInfo> {
        let missing = || Refusal::not_found(format!("there is no snapshot {reference}"));
        let volume = match reference {
            SnapshotReference::Id(SnapshotId { volume, .. }) => *volume,
            SnapshotReference::Label { volume, .. } | SnapshotReference::Time { volume, .. } => {
                self.find(volume)?.id
            }
        };
        if self.directory.get(volume).is_none_or(|volume| volume.deleted) {
            return Err(missing());
        }
        let which = match reference {
            SnapshotReference::Id(id) => Which::Sequence(id.sequence),
            SnapshotReference::Label { label, .. } => Which::Label(label.clone()),
            SnapshotReference::Time { volume: name, moment } => {
                return self.find_at(volume, moment, name);
            }
        };
        self.look_up(volume, which)?.ok_or_else(missing)
    }

    /// A snapshot of an open volume; none when there is no such one.
    pub(super) fn look_up(&self, id: VolumeId, which: Which) -> Answered<Option<SnapshotInfo>> {
        let (volume, home) = self.handle_of(id)?;
        match self.homes[home].port.command(Command::Find { volume, which }).reply {
            Reply::Snapshot(found) => Ok(Some(found)),
            Reply::Failed(CommandError::NoSuchSnapshot) => Ok(None),
            Reply::Failed(error) => Err(refuse_command(error)),
            reply => unreachable!("a look for a snapshot was answered with {reply:?}"),
        }
    }

    /// The newest of a volume's snapshots that had been taken by `moment`; else a line that says which
    /// there are.
    fn find_at(&self, id: VolumeId, moment: &Moment, name: &str) -> Answered<SnapshotInfo> {
        let text = moment.to_string();
        if let Some(labelled) = self.look_up(id, Which::Label(text.clone()))? {
            return Err(Refusal::not_found(label_or_time(name, &text, labelled.id)));
        }
        let then = moment.seen_from(self.clock.wall());
        if let Some(found) = self.newest_at(id, then)? {
            return Ok(found);
        }
        let (volume, home) = self.handle_of(id)?;
        let mut from = Some(0);
        while let Some(at) = from {
            let page = Command::Page { volume, from: at, limit: 1, with_deleted: false };
            let Reply::Page { snapshots, next } = self.ask(home, page)? else {
                unreachable!("a page is answered with one");
            };
            if let Some(oldest) = snapshots.first() {
                return Err(Refusal::not_found(format!(
                    "volume {name:?} has no snapshot at or before {}; its oldest is {} of {}",
                    rfc3339(then),
                    oldest.id,
                    rfc3339(oldest.time)
                )));
            }
            from = next;
        }
        Err(Refusal::not_found(format!("volume {name:?} has no snapshot at all")))
    }

    fn newest_at(&self, id: VolumeId, then: WallTime) -> Answered<Option<SnapshotInfo>> {
        let (volume, home) = self.handle_of(id)?;
        let (mut best, mut before) = (None::<SnapshotInfo>, u64::MAX);
        while before > 0 {
            match self.ask(home, Command::FindAt { volume, then, before })? {
                Reply::FoundAt { found, rest } => {
                    // A clock that was set back has given a later snapshot an earlier time.
                    let age = |snapshot: &SnapshotInfo| (snapshot.time, snapshot.id.sequence);
                    best = best.into_iter().chain(found).max_by_key(age);
                    before = rest;
                }
                reply => unreachable!("a search by time was answered with {reply:?}"),
            }
        }
        Ok(best)
    }
}

/// What is said of a name that may mean two things: a store of an older version may have labels that are
/// read as times today.
fn label_or_time(volume: &str, text: &str, labelled: SnapshotId) -> String {
    format!(
        "{volume}@{text} may be the label of snapshot {labelled} or a time; write {labelled}, or the time \
         another way"
    )
}

/// The API's word for an entry that is not to be had.
fn refuse_not_here(why: NotHere) -> Refusal {
    match why {
        NotHere::None => refuse_command(CommandError::NoSuchSnapshot),
        NotHere::Unread => {
            let what = "the volume's snapshot log is still being read; try again";
            Refusal::new(RefusalKind::Conflict, what)
        }
        NotHere::Lost { before, why } => refuse_command(CommandError::Log { before, why }),
    }
}
