//! A set of blocks.

use bessel_reactor::units::BlockAddr;

use crate::message::BlockRun;

/// Blocks that one part covers: 4 KiB of bits.
const PART_BLOCKS: u64 = 1 << 15;
const WORDS: usize = PART_BLOCKS as usize / 64;
/// Parts that are found by one step: 64 GiB of a store.
const SHELF_PARTS: u64 = 1 << 9;
/// Most blocks in a run that is taken out.
const RUN_BLOCKS_MAX: u32 = 1024;

type Part = Box<[u64; WORDS]>;
type Shelf = Box<[Option<Part>; SHELF_PARTS as usize]>;

/// A set of blocks of a store: one bit each, in the parts that have any. A store of 64 PiB, the largest
/// there is, has a million shelves.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct BlockSet {
    shelves: Vec<Option<Shelf>>,
    /// No part before this one has any block.
    first_part: u64,
    len: u64,
}

impl std::fmt::Debug for BlockSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockSet {{ {} blocks }}", self.len)
    }
}

/// The part that a block lies in, the word there and its bit.
const fn place(block: BlockAddr) -> (u64, usize, u64) {
    let at = block.get() % PART_BLOCKS;
    (block.get() / PART_BLOCKS, at as usize / 64, 1 << (at % 64))
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
        let (part, word, bit) = place(block);
        let word = &mut self.part_mut(part)[word];
        let new = *word & bit == 0;
        *word |= bit;
        self.len += u64::from(new);
        new
    }

    /// Adds the blocks of a run.
    pub fn insert_run(&mut self, run: BlockRun) {
        let (mut next, end) = (run.start.get(), run.start.get() + u64::from(run.count));
        while next < end {
            let (part, word, _) = place(BlockAddr::new(next));
            // To the end of this word, or of the run.
            let (low, count) = (next % 64, (64 - next % 64).min(end - next));
            let bits = (u64::MAX >> (64 - count)) << low;
            let word = &mut self.part_mut(part)[word];
            let new = (bits & !*word).count_ones();
            *word |= bits;
            self.len += u64::from(new);
            next += count;
        }
    }

    /// Adds all that is in another set.
    pub fn insert_all(&mut self, other: &Self) {
        for (index, shelf) in (0u64..).zip(&other.shelves) {
            let Some(shelf) = shelf else { continue };
            let parts = (index * SHELF_PARTS..).zip(shelf.iter());
            for (number, part) in parts.filter_map(|(number, part)| Some((number, part.as_ref()?)))
            {
                let mut new = 0;
                for (word, other) in self.part_mut(number).iter_mut().zip(part.iter()) {
                    new += u64::from((other & !*word).count_ones());
                    *word |= other;
                }
                self.len += new;
            }
        }
    }

    /// True when it is there.
    #[inline]
    pub fn contains(&self, block: BlockAddr) -> bool {
        let (part, word, bit) = place(block);
        let shelf = self.shelves.get((part / SHELF_PARTS) as usize).and_then(Option::as_ref);
        let part = shelf.and_then(|shelf| shelf[(part % SHELF_PARTS) as usize].as_ref());
        part.is_some_and(|part| part[word] & bit != 0)
    }

    /// Takes out the first runs, in order: up to `runs_max` of them, of at most 1024 blocks each, and no
    /// more than `blocks_max` blocks.
    pub fn take_runs(&mut self, runs_max: usize, blocks_max: u64) -> Vec<BlockRun> {
        let mut runs: Vec<BlockRun> = Vec::new();
        let mut left = blocks_max;
        while self.len > 0 {
            let number = self.first_part;
            let (shelf, place) = ((number / SHELF_PARTS) as usize, (number % SHELF_PARTS) as usize);
            let Some(parts) = self.shelves[shelf].as_mut() else {
                self.first_part = (shelf as u64 + 1) * SHELF_PARTS;
                continue;
            };
            let Some(part) = parts[place].as_mut() else {
                self.first_part += 1;
                continue;
            };
            let start = number * PART_BLOCKS;
            for (index, word) in part.iter_mut().enumerate() {
                while *word != 0 {
                    let bit = u64::from(word.trailing_zeros());
                    let block = BlockAddr::new(start + index as u64 * 64 + bit);
                    let goes_on = |run: &&mut BlockRun| {
                        run.count < RUN_BLOCKS_MAX && run.start.add(u64::from(run.count)) == block
                    };
                    if left == 0 {
                        return runs;
                    }
                    if let Some(run) = runs.last_mut().filter(goes_on) {
                        run.count += 1;
                    } else if runs.len() == runs_max {
                        return runs;
                    } else {
                        runs.push(BlockRun { start: block, count: 1 });
                    }
                    *word &= *word - 1;
                    self.len -= 1;
                    left -= 1;
                }
            }
            parts[place] = None;
        }
        runs
    }

    fn part_mut(&mut self, part: u64) -> &mut [u64; WORDS] {
        let shelf = (part / SHELF_PARTS) as usize;
        if self.shelves.len() <= shelf {
            self.shelves.resize(shelf + 1, None);
        }
        self.first_part = self.first_part.min(part);
        let parts = self.shelves[shelf].get_or_insert_with(|| Box::new([const { None }; 512]));
        parts[(part % SHELF_PARTS) as usize].get_or_insert_with(|| Box::new([0; WORDS]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, count: u32) -> BlockRun {
        BlockRun { start: BlockAddr::new(start), count }
    }

    #[test]
    fn blocks_come_out_once_in_runs() {
        let mut set = BlockSet::default();
        let blocks = [5, 6, 7, 64, 32767, 32768, 1 << 40];
        for block in blocks.into_iter().rev().map(BlockAddr::new) {
            assert!(set.insert(block) && !set.insert(block) && set.contains(block));
        }
        assert!(!set.contains(BlockAddr::new(8)) && !set.contains(BlockAddr::new(1 << 41)));
        assert_eq!(set.len(), 7);
        assert_eq!(set.take_runs(2, 9), [run(5, 3), run(64, 1)]);
        assert_eq!(set.len(), 3);
        assert!(set.insert(BlockAddr::new(1)), "before what was taken");
        assert_eq!(set.take_runs(9, 2), [run(1, 1), run(32767, 1)]);
        assert_eq!(set.take_runs(9, 9), [run(32768, 1), run(1 << 40, 1)]);
        assert!(set.is_empty() && set.take_runs(9, 9).is_empty());
    }

    #[test]
    fn a_long_run_is_cut() {
        let mut set = BlockSet::default();
        set.insert_run(run(0, 3000));
        let counts: Vec<u32> = set.take_runs(9, u64::MAX).iter().map(|run| run.count).collect();
        assert_eq!(counts, [1024, 1024, 952]);
    }

    #[test]
    fn a_union_counts_each_block_once() {
        let (mut one, mut other) = (BlockSet::default(), BlockSet::default());
        one.insert_run(run(10, 50));
        other.insert_run(run(40, 40));
        other.insert_run(run(1 << 30, 2));
        one.insert_all(&other);
        assert_eq!(one.len(), 70 + 2);
        assert_eq!(one.take_runs(9, u64::MAX), [run(10, 70), run(1 << 30, 2)]);
        for (start, count) in [(0, 64), (63, 2), (5, 300), (PART_BLOCKS - 3, 70), (64, 128)] {
            let (mut runs, mut blocks) = (BlockSet::default(), BlockSet::default());
            runs.insert(BlockAddr::new(start));
            runs.insert_run(run(start, count));
            (start..start + u64::from(count))
                .for_each(|it| assert!(blocks.insert(BlockAddr::new(it))));
            assert!(runs == blocks, "{start}+{count}");
        }
    }
}
