//! Messages between shards. Blocks change hands by the hundred or thousand, off the write path; and a
//! shard that serves queues of another one's volume sends what it cannot do itself to the home.

use bessel_reactor::buffer::Segment;
use bessel_reactor::units::{BlockAddr, Sector};

use crate::request::{IoKind, IoStatus, VolumeHandle, VolumeId};

/// What blocks are used for. Data and metadata never share an extent (Parallax 3.4.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockKind {
    /// Guest data.
    Data,
    /// Radix nodes and snapshot log blocks.
    Metadata,
}

impl BlockKind {
    pub(crate) const fn index(self) -> usize {
        match self {
            Self::Data => 0,
            Self::Metadata => 1,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Metadata => "metadata",
        }
    }
}

/// A run of blocks, one after the other in the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockRun {
    /// The first.
    pub start: BlockAddr,
    /// How many.
    pub count: u32,
}

/// A guest's request, on its way to the home of its volume.
#[derive(Debug)]
pub struct Forwarded {
    /// The shard that has it, and what it is called there.
    pub from: (usize, u32),
    /// The volume, as its home calls it.
    pub volume: VolumeHandle,
    /// Which one that is to be.
    pub id: VolumeId,
    /// What to do.
    pub kind: IoKind,
    /// First sector.
    pub sector: Sector,
    /// How many.
    pub sectors: u64,
    /// Guest memory. Some list comes back with the answer.
    pub segments: Vec<Segment>,
}

/// From one shard to another.
#[derive(Debug)]
pub enum Message {
    /// To the authority (shard 0): wants blocks.
    Claim {
        /// Who asks.
        shard: usize,
        /// Of which kind.
        kind: BlockKind,
        /// About how many.
        count: u32,
    },
    /// From the authority: these are yours, durably.
    Granted {
        /// Of which kind.
        kind: BlockKind,
        /// Empty when the store has none left.
        runs: Vec<BlockRun>,
    },
    /// To the authority: these are free again. Nothing on the device or in flight refers to them.
    Return {
        /// The runs, of either kind.
        runs: Vec<BlockRun>,
    },
    /// To a volume's home: do this.
    Forward(Forwarded),
    /// From a volume's home: a request that was sent there has ended.
    Ended {
        /// What it is called where it came from.
        request: u32,
        /// How.
        status: IoStatus,
        /// An empty list, in the place of the one that came with it.
        segments: Vec<Segment>,
    },
}
