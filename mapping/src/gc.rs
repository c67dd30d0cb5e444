//! The collector: frees every block that no living tree and no log leads to, while volumes are served.
//!
//! It is Algorithm 1 of Parallax (3.4.3): checkpoint the bitmaps, mark what is reached from the roots
//! in as many passes as trees have levels, each in disk order, and free what was allocated in the
//! checkpoint and was not reached. It needs to know nothing of what was deleted, nor of what a killed
//! daemon had claimed: whatever nobody reaches is found.
//!
//! | file        | step                                                                       |
//! |-------------|----------------------------------------------------------------------------|
//! | `survey.rs` | roots, logs and bitmaps, read from the device                              |
//! | `mark.rs`   | the passes over the nodes                                                  |
//!
//! As printed the algorithm frees blocks in use: one that was handed out before the checkpoint and linked
//! after its parent was scanned, one that was freed and handed out again meanwhile. What must not be
//! broken, and why a block that is freed here is reached by nobody:
//!
//! - **The checkpoint is an instant after which every allocated block is on the device where a tree has
//!   it, is in somebody's hands, or is garbage.** So each shard ends the requests it has, commits what
//!   they changed, and from the beginning of that on notes every block that passes through its hands:
//!   those it had claimed, those it is granted, those that its volumes free. None of them is a candidate.
//! - A tree only ever loses what it shares, gains blocks that passed through those hands, or begins as
//!   a copy of another living tree. So what is reached at the end was reached at the checkpoint, by a
//!   tree that lived then, or has passed.
//! - Trees that lived then stay readable: whatever is deleted meanwhile is freed later. A node that a
//!   volume itself frees is held back, so that a link that was just read does not lead to another node;
//!   a shard that needs one all the same says so, and nothing is freed.
//! - Roots are not read at one instant. A tree that begins as a copy of another after that one's place was
//!   read is reached through it, unless it was read as deleted: so all that was deleted since the
//!   collection began is spared, and after the deletion of a volume it begins again.
//! - What was read may not be durable, and requests may still use what they looked up before. So before
//!   anything is freed the rounds and requests under way have to end, and no volume may have failed.
//! - Snapshots that were deleted and wait to be freed by [`crate::reclaim`] count as living, with the
//!   trees they will be compared with: else those would be freed twice.
//!
//! A crash at any time leaves what was not freed, for the next collection; nothing has to be undone.
//!
//! It owns neither thread nor device: the caller does what [`Collection::next`] says.

mod mark;
mod survey;

use bessel_reactor::device::{Device, DeviceError};
use bessel_reactor::units::{BlockAddr, ByteCount};

use crate::blocking::Blocking;
use crate::forest::Tree;
use crate::format::{BITMAP_BITS, ExtentType, Geometry};
use crate::freeing::{Ask, Freeing};
use crate::planted::{self, Bug};
use crate::request::{Command, Reply, VolumeId};
use crate::store::OpenedStore;
use crate::walk::{BlockSet, NodeReader, WalkError};
use mark::Marks;
use survey::{BitmapCopy, Survey};

/// Bitmap blocks that are compared with what was reached in one step.
const SWEEP_BITMAPS: usize = 64;

/// What to do next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Next {
    /// Send this to every shard, and their replies to [`Collection::answered`].
    AskAll(Command),
    /// The same with shard 0 alone.
    AskAuthority(Command),
    /// Call [`Collection::read`].
    Read,
    /// Call [`Collection::spare`]; or [`Collection::fail`], when a volume's state on the device is not
    /// known.
    Spare,
    /// Nothing: this is what it came to.
    Done(Result<Collected, CollectError>),
}

/// What the roots on the device do not tell.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Spare {
    /// Trees to leave whole: those that deleted snapshots need which wait to be freed by themselves, those
    /// of all other snapshots that were marked deleted since the collection began, and those of volumes
    /// that the device has no record of yet, or had not when the collection began.
    pub trees: Vec<Tree>,
    /// A volume was deleted since the collection began.
    pub volume_deleted: bool,
}

/// What a collection came to.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Collected {
    /// Radix nodes that were read.
    pub nodes_read: u64,
    /// Blocks of guest data that something leads to.
    pub data_reached: u64,
    /// The same, radix nodes and log blocks.
    pub metadata_reached: u64,
    /// Blocks of guest data that are free now and were not.
    pub data_freed: u64,
    /// The same, radix nodes and log blocks.
    pub metadata_freed: u64,
    /// Bitmap blocks that are damaged: nothing is freed there.
    pub bitmaps_damaged: u64,
    /// Volumes whose record says that they are deleted: their slots may get others.
    pub deleted_volumes: Vec<DeletedVolume>,
}

impl Collected {
    /// All that something leads to.
    pub fn reached(&self) -> ByteCount {
        ByteCount::from_blocks(self.data_reached + self.metadata_reached)
    }
}

/// A volume of which nothing but its record is left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeletedVolume {
    /// Which.
    pub id: VolumeId,
    /// Where its record lies.
    pub slot: u32,
    /// That record's generation.
    pub generation: u64,
}

/// How far it has come.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Progress {
    /// Where it is.
    pub phase: Phase,
    /// Radix nodes read.
    pub nodes_read: u64,
    /// Radix nodes found up to now, those that were read included.
    pub nodes_found: u64,
    /// Blocks freed.
    pub blocks_freed: u64,
    /// Blocks found to be garbage, those that were freed included; known when all have been compared.
    pub blocks_garbage: u64,
}

/// The part of the work that a collection is at.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Phase {
    /// Waiting for requests and rounds under way, reading roots, logs and bitmaps.
    #[default]
    Checkpoint,
    /// Reading nodes.
    Mark,
    /// Freeing.
    Sweep,
}

/// Why a collection did not come to its end. What it had freed by then was garbage; nothing else changed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CollectError {
    /// A node cannot be read, or is damaged.
    #[error(transparent)]
    Walk(#[from] WalkError),
    /// A record, a log block or a bitmap cannot be read.
    #[error("{what} cannot be read")]
    Device {
        /// Of what.
        what: String,
        /// How the device failed.
        #[source]
        source: DeviceError,
    },
    /// A record or a log block is damaged.
    #[error("{0}; run `bessel check`")]
    Damaged(String),
    /// A volume failed while it was under way.
    #[error("a volume has failed meanwhile")]
    VolumeFailed,
    /// A volume was deleted while it was looked where trees begin: begin again.
    #[error("a volume was deleted meanwhile; run it again")]
    VolumeDeleted,
    /// A shard needed what was held back: there was no other free block for a node.
    #[error("the store is so full that it needed what was held back; run it again")]
    Full,
    /// The caller ended it, or a shard refused.
    #[error("{0}")]
    Refused(String),
}

#[derive(Debug)]
enum State {
    Checkpoint,
    Survey,
    Spare,
    Mark,
    Barrier,
    /// The shards cease to watch; after a failure, too.
    End,
    Sweep,
    Free(Freeing),
    Over,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Collection {
    geometry: Geometry,
    reader: NodeReader,
    state: State,
    survey: Survey,
    marks: Marks,
    /// How often volumes had failed by the checkpoint.
    failures: u64,
    /// What has passed through the hands of shards.
    passed: BlockSet,
    /// Bitmaps that were compared.
    swept: usize,
    data_garbage: BlockSet,
    nodes_garbage: BlockSet,
    /// Blocks in these, before they are freed.
    garbage: u64,
    collected: Collected,
    failed: Option<CollectError>,
}

impl Collection {
    /// Begins.
    pub fn new(store: &OpenedStore) -> Self {
        Self {
            geometry: store.geometry,
            reader: NodeReader::new(store),
            state: State::Checkpoint,
            survey: Survey::new(store),
            marks: Marks::default(),
            failures: 0,
            passed: BlockSet::default(),
            swept: 0,
            data_garbage: BlockSet::default(),
            nodes_garbage: BlockSet::default(),
            garbage: 0,
            collected: Collected::default(),
            failed: None,
        }
    }

    /// What to do next.
    pub fn next(&self) -> Next {
        match &self.state {
            State::Checkpoint => Next::AskAll(Command::Checkpoint),
            State::Survey | State::Mark | State::Sweep => Next::Read,
            State::Spare => Next::Spare,
            State::Barrier => Next::AskAll(Command::Barrier),
            State::End => Next::AskAll(Command::EndCheckpoint),
            State::Free(freeing) => match freeing.next() {
                Some(Ask::All(command)) => Next::AskAll(command),
                Some(Ask::Authority(command)) => Next::AskAuthority(command),
                None => self.done(),
            },
            State::Over => self.done(),
        }
    }

    fn done(&self) -> Next {
        Next::Done(match &self.failed {
            Some(error) => Err(error.clone()),
            None => Ok(Collected { nodes_read: self.reader.nodes_read(), ..self.collected_now() }),
        })
    }

    fn collected_now(&self) -> Collected {
        let (data_freed, metadata_freed) = self.freed();
        Collected { data_freed, metadata_freed, ..self.collected.clone() }
    }

    /// Blocks of data and of metadata that were freed.
    pub fn freed(&self) -> (u64, u64) {
        match &self.state {
            State::Free(freeing) => (freeing.data_freed, freeing.nodes_freed),
            _ => (self.collected.data_freed, self.collected.metadata_freed),
        }
    }

    /// How far it has come.
    pub fn progress(&self) -> Progress {
        let phase = match &self.state {
            State::Checkpoint | State::Survey | State::Spare => Phase::Checkpoint,
            State::Mark => Phase::Mark,
            _ => Phase::Sweep,
        };
        let (data, nodes) = self.freed();
        let nodes_read = self.reader.nodes_read();
        Progress {
            phase,
            nodes_read,
            nodes_found: nodes_read + self.marks.nodes_waiting(),
            blocks_freed: data + nodes,
            blocks_garbage: self.garbage,
        }
    }

    /// Ends it for a reason of the caller's. What is under way is still to be ended: go on as
    /// [`Collection::next`] says.
    pub fn fail(&mut self, why: String) {
        self.give_up(CollectError::Refused(why));
    }

    fn give_up(&mut self, error: CollectError) {
        self.failed.get_or_insert(error);
        (self.collected.data_freed, self.collected.metadata_freed) = self.freed();
        self.state = match self.state {
            // The shards watch, or may.
            State::Checkpoint | State::Survey | State::Spare | State::Mark | State::Barrier => {
                State::End
            }
            State::End => return,
            State::Sweep | State::Free(_) | State::Over => State::Over,
        };
    }

    /// Takes in what the roots on the device do not tell.
    pub fn spare(&mut self, spare: Spare) {
        let Spare { trees, volume_deleted } = spare;
        if volume_deleted && !planted::is(Bug::DeletionUnderSurvey) {
            return self.give_up(CollectError::VolumeDeleted);
        }
        for tree in trees.into_iter().filter(|_| !planted::is(Bug::WaitingNotSpared)) {
            if let Err(error) = self.reader.check_root(tree.root) {
                return self.give_up(error.into());
            }
            self.marks.root(tree);
        }
        self.state = State::Mark;
    }

    /// Does a bounded part of the reading.
    pub fn read<D: Device>(&mut self, io: &mut Blocking<'_, D>) {
        let done = match self.state {
            State::Survey => self.survey.step(&self.reader, &mut self.marks, io),
            State::Mark => self.marks.step(&mut self.reader, io).map_err(CollectError::from),
            State::Sweep => Ok(self.sweep()),
            _ => unreachable!("nothing is to be read in {:?}", self.state),
        };
        let next = match (done, &self.state) {
            (Err(error), _) => return self.give_up(error),
            (Ok(false), _) => return,
            (Ok(true), State::Survey) => State::Spare,
            (Ok(true), State::Mark) => {
                let collected = &mut self.collected;
                collected.data_reached = self.marks.data_reached();
                collected.metadata_reached = self.marks.reached() - collected.data_reached;
                if planted::is(Bug::SweepNotAwaited) { State::End } else { State::Barrier }
            }
            (Ok(true), _) => {
                let take = std::mem::take;
                let (data, nodes) = (take(&mut self.data_garbage), take(&mut self.nodes_garbage));
                self.garbage = data.len() + nodes.len();
                State::Free(Freeing::new(data, nodes))
            }
        };
        self.state = next;
    }

    /// Compares some bitmaps of the checkpoint with what was reached and what has passed.
    fn sweep(&mut self) -> bool {
        let bitmaps = &self.survey.bitmaps()[self.swept..];
        let count = bitmaps.len().min(SWEEP_BITMAPS);
        for BitmapCopy { extent, index, kind, bitmap } in &bitmaps[..count] {
            let first = self.geometry.extent_start(*extent).add(index * BITMAP_BITS);
            let unusable = self.geometry.fresh_bitmap(*index);
            let garbage = match kind {
                ExtentType::Data => &mut self.data_garbage,
                _ => &mut self.nodes_garbage,
            };
            for bit in bitmap.allocated() {
                let block: BlockAddr = first.add(u64::from(bit));
                let used = unusable.get(bit)
                    || self.marks.has_reached(block)
                    || self.passed.contains(block);
                if !used {
                    garbage.insert(block);
                }
            }
        }
        self.swept += count;
        self.swept == self.survey.bitmaps().len()
    }

    /// Takes in what the shards have answered.
    pub fn answered(&mut self, replies: impl IntoIterator<Item = Reply>) {
        let mut failures_now = 0;
        for reply in replies {
            match reply {
                Reply::Done => {}
                Reply::Passed { failures, .. } => failures_now += failures,
                Reply::Watched { passed, broken } => {
                    self.passed.insert_all(&passed);
                    if broken {
                        // Whatever it has found since, what it read may have been something else by then.
                        self.failed = Some(CollectError::Full);
                    }
                }
                Reply::Failed(error) => {
                    return self.give_up(CollectError::Refused(error.to_string()));
                }
                reply => unreachable!("a collection was answered with {reply:?}"),
            }
        }
        match &mut self.state {
            State::Checkpoint => {
                self.failures = failures_now;
                self.state = State::Survey;
            }
            State::Barrier => {
                if failures_now != self.failures && !planted::is(Bug::FailureUnderCollection) {
                    return self.give_up(CollectError::VolumeFailed);
                }
                self.state = State::End;
            }
            State::End if self.failed.is_some() => self.state = State::Over,
            State::End => {
                self.collected.bitmaps_damaged = self.survey.bitmaps_damaged();
                self.collected.deleted_volumes = self.survey.deleted_volumes();
                self.state = State::Sweep;
            }
            State::Free(freeing) => freeing.answered(),
            state => unreachable!("nobody was asked in {state:?}"),
        }
    }
}
