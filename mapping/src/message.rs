//! Messages between shards. Only blocks change hands, by the hundred or thousand, off the write
//! path; volumes never do.

use bessel_reactor::units::BlockAddr;

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

/// From one shard to another.
#[derive(Clone, PartialEq, Eq, Debug)]
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
}
