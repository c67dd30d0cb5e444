//! Giving back at once what only one deleted snapshot held.
//!
//! The snapshot's tree is walked beside those of its neighbours in the forest ([`crate::forest`]), and
//! what none of them has is free: the cost grows with what differs, not with the store. Everything
//! else is the collector's.
//!
//! Neighbours that are current trees change while they are read, from the device. They only ever lose
//! what they share, so what is found not to be shared never will be again; a snapshot or a clone of
//! one of them that is taken meanwhile, or a rollback, derives from what was there. But
//!
//! - a node of theirs may be free, or another, before it is read: then what lies there is not a node of
//!   that level, and the walk begins again, or it is taken for one, and the tree has nothing to share at
//!   that place any more;
//! - what was read may not be durable: a power cut would bring the link back that a commit round has
//!   removed. So the rounds that had begun have to end;
//! - requests that looked a block up before it was replaced may still read it. So those have to end;
//! - shards may have nodes in memory whose blocks become something else. So they forget them;
//! - and the mark must be durable before all this, which is the caller's to see to.
//!
//! It owns neither thread nor device: the caller does what [`Reclaim::next`] says, one snapshot after
//! the other.

use bessel_reactor::device::Device;
use bessel_reactor::units::ByteCount;

use crate::blocking::Blocking;
use crate::forest::{Forest, NoAnswer, Tree, TreeId, UnknownDescent};
use crate::freeing::{Ask, Freeing};
use crate::request::{Command, Reply, SnapshotId, VolumeId};
use crate::store::OpenedStore;
use crate::walk::{NodeReader, Sole, WalkError};

/// A deleted snapshot whose blocks are to be freed, and what it is to be compared with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReclaimPlan {
    /// The snapshot. Its mark is durable.
    pub snapshot: SnapshotId,
    tree: Tree,
    others: Vec<Tree>,
    /// Volumes whose state on the device this rests on.
    volumes: Vec<VolumeId>,
}

impl ReclaimPlan {
    /// Plans it with what is known of the forest now. `waits` says of snapshots that the forest has as
    /// deleted that their mark is not durable yet, or that their plan will be carried out after this
    /// one: they count as living. Snapshots that are not deleted when this
    /// is called may be later, if they get a plan that is carried out after this one.
    ///
    /// # Errors
    /// When volumes have to be looked at first, or the descent of a tree that matters is not known.
    pub fn new(
        forest: &Forest,
        snapshot: SnapshotId,
        waits: impl Fn(SnapshotId) -> bool,
    ) -> Result<Self, NoAnswer> {
        let others = forest.neighbours(snapshot, waits)?;
        let tree = forest.tree(snapshot).ok_or(UnknownDescent(snapshot.volume))?;
        let current = others.keys().filter_map(|id| match id {
            TreeId::Current(volume) => Some(*volume),
            TreeId::Snapshot(_) => None,
        });
        let volumes = current.chain([snapshot.volume]).collect();
        let mut others: Vec<Tree> = others.into_values().collect();
        others.sort_unstable_by_key(|tree| tree.root);
        others.dedup();
        Ok(Self { snapshot, tree, others, volumes })
    }

    /// The trees that must be whole when this is carried out, whatever else becomes of them.
    pub fn trees(&self) -> impl Iterator<Item = Tree> {
        self.others.iter().copied().chain([self.tree])
    }
}

/// What it came to.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Reclaimed {
    /// Blocks of guest data that are free now.
    pub data: u64,
    /// Blocks of radix nodes that are free now.
    pub nodes: u64,
    /// Radix nodes that were read to find them.
    pub nodes_read: u64,
}

impl Reclaimed {
    /// All that was freed.
    pub fn bytes(&self) -> ByteCount {
        ByteCount::from_blocks(self.data + self.nodes)
    }
}

/// Why nothing more is freed: the collector will find the rest.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReclaimError {
    /// A node cannot be read, or is damaged.
    #[error(transparent)]
    Walk(#[from] WalkError),
    /// A volume has failed.
    #[error("volume {0} has failed")]
    Unsure(VolumeId),
    /// A shard refused.
    #[error("{0}")]
    Refused(String),
}

/// What to do next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Next {
    /// Call [`Reclaim::read`].
    Read,
    /// Send this to every shard, and their replies to [`Reclaim::answered`].
    AskAll(Command),
    /// The same with shard 0 alone.
    AskAuthority(Command),
    /// Nothing: this is what it came to.
    Done(Reclaimed),
}

#[derive(Debug)]
enum State {
    Walk,
    Barrier,
    Free(Freeing),
}

/// How often a walk begins, at most.
const ATTEMPTS: u32 = 8;

/// See the module's documentation.
#[derive(Debug)]
pub struct Reclaim {
    plan: ReclaimPlan,
    reader: NodeReader,
    walk: Sole,
    attempts: u32,
    state: State,
}

impl Reclaim {
    /// Begins.
    ///
    /// # Errors
    /// When a root does not lie where nodes do.
    pub fn new(store: &OpenedStore, plan: ReclaimPlan) -> Result<Self, ReclaimError> {
        let reader = NodeReader::new(store);
        let walk = Sole::new(&reader, plan.tree, plan.others.clone())?;
        Ok(Self { plan, reader, walk, attempts: 1, state: State::Walk })
    }

    /// The snapshot.
    pub fn snapshot(&self) -> SnapshotId {
        self.plan.snapshot
    }

    /// What to do next.
    pub fn next(&self) -> Next {
        let freeing = match &self.state {
            State::Walk => return Next::Read,
            State::Barrier => return Next::AskAll(Command::Barrier),
            State::Free(freeing) => freeing,
        };
        match freeing.next() {
            Some(Ask::All(command)) => Next::AskAll(command),
            Some(Ask::Authority(command)) => Next::AskAuthority(command),
            None => Next::Done(Reclaimed {
                data: freeing.data_freed,
                nodes: freeing.nodes_freed,
                nodes_read: self.reader.nodes_read(),
            }),
        }
    }

    /// Reads some nodes.
    ///
    /// # Errors
    /// When that fails: it is over then, and nothing has been freed.
    pub fn read<D: Device>(&mut self, io: &mut Blocking<'_, D>) -> Result<(), ReclaimError> {
        match self.walk.step(&mut self.reader, io) {
            Ok(true) => self.state = State::Barrier,
            Ok(false) => {}
            // A current tree may have given up a node since the one above it was read, which is then
            // anything. What is damaged still is when all is read again.
            Err(WalkError::Node(_)) if self.attempts < ATTEMPTS => {
                self.attempts += 1;
                let ReclaimPlan { tree, others, .. } = &self.plan;
                self.walk = Sole::new(&self.reader, *tree, others.clone())?;
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Takes in what the shards have answered.
    ///
    /// # Errors
    /// When one of them refused: it is over then.
    pub fn answered(
        &mut self,
        replies: impl IntoIterator<Item = Reply>,
    ) -> Result<(), ReclaimError> {
        for reply in replies {
            match reply {
                Reply::Done => {}
                Reply::Passed { unsure, .. } => {
                    let involved = unsure.into_iter().find(|id| self.plan.volumes.contains(id));
                    if let Some(volume) = involved {
                        return Err(ReclaimError::Unsure(volume));
                    }
                }
                Reply::Failed(error) => return Err(ReclaimError::Refused(error.to_string())),
                reply => unreachable!("it was answered with {reply:?}"),
            }
        }
        match &mut self.state {
            State::Free(freeing) => freeing.answered(),
            _ => {
                let take = std::mem::take;
                let (data, nodes) = (take(&mut self.walk.data), take(&mut self.walk.nodes));
                self.state = State::Free(Freeing::new(data, nodes));
            }
        }
        Ok(())
    }
}
