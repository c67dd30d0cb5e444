//! A set of blocks.

use std::collections::BTreeMap;

use bessel_reactor::units::BlockAddr;

use crate::message::BlockRun;

/// Blocks that one part covers: 4 KiB of bits.
const PART_BLOCKS: u64 = 1 << 15;
const WORDS: usize = PART_BLOCKS as usize / 64;

type Part = Box<[u64; WORDS]>;

/// A set of blocks of a store: one bit each, in the parts that have any.
#[derive(Clone, Debug, Default)]
pub struct BlockSet {
    parts: BTreeMap<u64, Part>,
    len: u64,
}

impl BlockSet {
    /// Blocks in it.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a block; false when it was there.
    pub fn insert(&mut self, block: BlockAddr) -> bool {
        let part = self.parts.entry(block.get() / PART_BLOCKS);
        let part = part.or_insert_with(|| Box::new([0; WORDS]));
        let at = block.get() % PART_BLOCKS;
        let (word, bit) = (&mut part[at as usize / 64], 1 << (at % 64));
        let new = *word & bit == 0;
        *word |= bit;
        self.len += u64::from(new);
        new
    }

    /// True when it is there.
    pub fn contains(&self, block: BlockAddr) -> bool {
        let at = block.get() % PART_BLOCKS;
        let part = self.parts.get(&(block.get() / PART_BLOCKS));
        part.is_some_and(|part| part[at as usize / 64] >> (at % 64) & 1 == 1)
    }

    /// Takes out the first runs, in order: up to `runs_max` of them, of at most 1024 blocks each.
    pub fn take_runs(&mut self, runs_max: usize) -> Vec<BlockRun> {
        let mut runs: Vec<BlockRun> = Vec::new();
        while let Some(mut entry) = self.parts.first_entry() {
            let start = entry.key() * PART_BLOCKS;
            for (index, word) in entry.get_mut().iter_mut().enumerate() {
                while *word != 0 {
                    let bit = u64::from(word.trailing_zeros());
                    let block = BlockAddr::new(start + index as u64 * 64 + bit);
                    let goes_on = |run: &&mut BlockRun| {
                        run.count < 1024 && run.start.add(u64::from(run.count)) == block
                    };
                    if let Some(run) = runs.last_mut().filter(goes_on) {
                        run.count += 1;
                    } else if runs.len() == runs_max {
                        return runs;
                    } else {
                        runs.push(BlockRun { start: block, count: 1 });
                    }
                    *word &= *word - 1;
                    self.len -= 1;
                }
            }
            entry.remove();
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_come_out_once_in_runs() {
        let mut set = BlockSet::default();
        let blocks = [5, 6, 7, 64, 32767, 32768, 1 << 40];
        for block in blocks.into_iter().rev().map(BlockAddr::new) {
            assert!(set.insert(block) && !set.insert(block) && set.contains(block));
        }
        assert!(!set.contains(BlockAddr::new(8)) && !set.contains(BlockAddr::new(1 << 41)));
        assert_eq!(set.len(), 7);
        let run = |start, count| BlockRun { start: BlockAddr::new(start), count };
        assert_eq!(set.take_runs(2), [run(5, 3), run(64, 1)]);
        assert_eq!(set.len(), 3);
        assert_eq!(set.take_runs(9), [run(32767, 2), run(1 << 40, 1)]);
        assert!(set.is_empty() && set.take_runs(9).is_empty());
    }

    #[test]
    fn a_long_run_is_cut() {
        let mut set = BlockSet::default();
        (0..3000).for_each(|block| assert!(set.insert(BlockAddr::new(block))));
        let counts: Vec<u32> = set.take_runs(9).iter().map(|run| run.count).collect();
        assert_eq!(counts, [1024, 1024, 952]);
    }
}
