//! Freeing blocks that nothing leads to any more, a message at a time: what [`crate::reclaim`] and
//! [`crate::gc`] have found. Every shard forgets a node before its block is freed; blocks of data go first.

use crate::message::BlockRun;
use crate::request::Command;
use crate::walk::BlockSet;

/// Runs in one message, as in a grant.
const RUNS_MAX: usize = 256;
/// Nodes in one message: each is looked for in the cache of every shard, in one turn.
const NODES_MAX: u64 = 1024;

/// What to ask whom.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Ask {
    /// Every shard.
    All(Command),
    /// Shard 0 alone.
    Authority(Command),
}

#[derive(Debug)]
enum Step {
    /// These nodes are to be forgotten.
    Forget(Vec<BlockRun>),
    /// These blocks are to be freed.
    Free(Vec<BlockRun>),
    Done,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Freeing {
    data: BlockSet,
    nodes: BlockSet,
    step: Step,
    /// Blocks of data that are free now, or will be when the answer comes.
    pub(crate) data_freed: u64,
    /// The same, radix nodes.
    pub(crate) nodes_freed: u64,
}

impl Freeing {
    pub(crate) fn new(data: BlockSet, nodes: BlockSet) -> Self {
        let mut freeing = Self { data, nodes, step: Step::Done, data_freed: 0, nodes_freed: 0 };
        freeing.step = freeing.more();
        freeing
    }

    /// What to do next; none when all is free.
    pub(crate) fn next(&self) -> Option<Ask> {
        match &self.step {
            Step::Forget(nodes) => Some(Ask::All(Command::Forget { nodes: nodes.clone() })),
            Step::Free(runs) => Some(Ask::Authority(Command::Free { runs: runs.clone() })),
            Step::Done => None,
        }
    }

    /// That was done.
    pub(crate) fn answered(&mut self) {
        self.step = match std::mem::replace(&mut self.step, Step::Done) {
            Step::Forget(nodes) => Step::Free(nodes),
            _ => self.more(),
        };
    }

    fn more(&mut self) -> Step {
        let count = |runs: &[BlockRun]| runs.iter().map(|run| u64::from(run.count)).sum::<u64>();
        let data = self.data.take_runs(RUNS_MAX, u64::MAX);
        if !data.is_empty() {
            self.data_freed += count(&data);
            return Step::Free(data);
        }
        let nodes = self.nodes.take_runs(RUNS_MAX, NODES_MAX);
        if !nodes.is_empty() {
            self.nodes_freed += count(&nodes);
            return Step::Forget(nodes);
        }
        Step::Done
    }
}
