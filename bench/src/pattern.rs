//! Data that says where and when it was written, and the ledger of what a disk must hold.
//!
//! Each 512-byte sector carries its own number, the run that wrote it and the generation of its
//! block, followed by words computed from these. So a sector that was lost, torn, misplaced, or
//! comes from another volume or an older write is found on reading and can be named.

/// First word of a stamped sector: "BESSELBN".
const MAGIC: u64 = u64::from_le_bytes(*b"BESSELBN");

pub(crate) const SECTOR_BYTES: usize = 512;

/// Who wrote a sector.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Stamp {
    /// A number drawn for each run.
    pub(crate) run: u64,
    /// Counts the writes of one block in that run, from 1.
    pub(crate) generation: u32,
}

/// A step of splitmix64: turns any number into a well-mixed one.
pub(crate) fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Fills `data`, which starts at sector `first_sector` of the disk, with the pattern of `stamp`.
pub(crate) fn fill(data: &mut [u8], first_sector: u64, stamp: Stamp) {
    for (sector, bytes) in (first_sector..).zip(data.chunks_exact_mut(SECTOR_BYTES)) {
        for (word, place) in words(sector, stamp).zip(bytes.chunks_exact_mut(8)) {
            place.copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// The 64 words of a sector.
fn words(sector: u64, stamp: Stamp) -> impl Iterator<Item = u64> {
    let generation = u64::from(stamp.generation);
    let seed = mix(mix(sector) ^ stamp.run ^ generation.rotate_left(32));
    let body =
        (0..60u64).map(move |index| seed.wrapping_add(index).wrapping_mul(0x2545_f491_4f6c_dd1d));
    [MAGIC, stamp.run, sector, generation].into_iter().chain(body)
}

/// What reading found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Found {
    /// Every sector holds what it must.
    Good,
    /// The block was not written by this run and carries no pattern: nothing can be said.
    Unknown,
}

/// Checks `data`, read from `first_sector` on. `expected` is the stamp of this run's last write
/// of the block, or nothing when this run has not written it: then any whole pattern will do.
pub(crate) fn check(
    data: &[u8],
    first_sector: u64,
    expected: Option<Stamp>,
) -> Result<Found, String> {
    let mut found = Found::Good;
    for (sector, bytes) in (first_sector..).zip(data.chunks_exact(SECTOR_BYTES)) {
        if check_sector(bytes, sector, expected)? == Found::Unknown {
            found = Found::Unknown;
        }
    }
    Ok(found)
}

fn check_sector(bytes: &[u8], sector: u64, expected: Option<Stamp>) -> Result<Found, String> {
    let word = |index: usize| {
        u64::from_le_bytes(bytes[8 * index..8 * index + 8].try_into().expect("eight bytes"))
    };
    if word(0) != MAGIC {
        return match expected {
            None => Ok(Found::Unknown),
            Some(stamp) => Err(format!(
                "sector {sector} lost its write of generation {}: it starts with {:#018x}",
                stamp.generation,
                word(0)
            )),
        };
    }
    let stamp = Stamp { run: word(1), generation: word(3) as u32 };
    if word(2) != sector {
        return Err(format!("sector {sector} holds the data of sector {}", word(2)));
    }
    if let Some(expected) = expected
        && stamp != expected
    {
        return Err(format!(
            "sector {sector} holds generation {} of run {:#x}, not generation {} of run {:#x}",
            stamp.generation, stamp.run, expected.generation, expected.run
        ));
    }
    match words(sector, stamp).enumerate().find(|(index, expected)| word(*index) != *expected) {
        None => Ok(Found::Good),
        Some((index, expected)) => Err(format!(
            "sector {sector} is damaged at byte {}: {:#018x}, not {expected:#018x}",
            8 * index,
            word(index)
        )),
    }
}

/// What this run has written to each block of its region, and which blocks are in use.
///
/// A block has one request in flight at most: the outcome of two at once would be ambiguous.
pub(crate) struct Ledger {
    run: u64,
    block_bytes: u32,
    generations: Vec<u32>,
    busy: Vec<bool>,
}

impl Ledger {
    /// A ledger of `blocks` blocks that this run has not written yet.
    pub(crate) fn new(run: u64, block_bytes: u32, blocks: usize) -> Self {
        Self { run, block_bytes, generations: vec![0; blocks], busy: vec![false; blocks] }
    }

    /// The block at byte `offset`.
    fn block(&self, offset: u64) -> usize {
        (offset / u64::from(self.block_bytes)) as usize
    }

    /// Takes the block at `offset` for one request; false when another one has it.
    pub(crate) fn take(&mut self, offset: u64) -> bool {
        let block = self.block(offset);
        !std::mem::replace(&mut self.busy[block], true)
    }

    /// Gives the block at `offset` back.
    pub(crate) fn give_back(&mut self, offset: u64) {
        let block = self.block(offset);
        let was_busy = std::mem::take(&mut self.busy[block]);
        assert!(was_busy, "block {block} given back without being taken");
    }

    /// The stamp for the next write of the block at `offset`, expected of it from now on.
    pub(crate) fn next_stamp(&mut self, offset: u64) -> Stamp {
        let block = self.block(offset);
        let generation = &mut self.generations[block];
        *generation = generation.checked_add(1).expect("fewer than 2^32 writes of one block");
        Stamp { run: self.run, generation: *generation }
    }

    /// What the block at `offset` must hold, if this run has written it.
    pub(crate) fn expected(&self, offset: u64) -> Option<Stamp> {
        let generation = self.generations[self.block(offset)];
        (generation > 0).then_some(Stamp { run: self.run, generation })
    }

    /// Byte offset of the first block written by this run at or after byte `offset`.
    pub(crate) fn written_from(&self, offset: u64) -> Option<u64> {
        let first = self.block(offset.next_multiple_of(u64::from(self.block_bytes)));
        let later = self.generations.get(first..)?;
        let found = later.iter().position(|generation| *generation > 0)?;
        Some((first + found) as u64 * u64::from(self.block_bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp { run: 7, generation: 3 };

    fn block(first_sector: u64, stamp: Stamp) -> Vec<u8> {
        let mut data = vec![0; 4096];
        fill(&mut data, first_sector, stamp);
        data
    }

    #[test]
    fn what_was_written_is_recognised() {
        let data = block(800, STAMP);
        assert_eq!(check(&data, 800, Some(STAMP)), Ok(Found::Good));
        assert_eq!(check(&data, 800, None), Ok(Found::Good));
        assert_eq!(check(&[0; 4096], 800, None), Ok(Found::Unknown));
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let data = block(800, STAMP);
        for bit in 0..data.len() * 8 {
            let mut damaged = data.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(check(&damaged, 800, Some(STAMP)).is_err(), "bit {bit} went unnoticed");
        }
    }

    #[test]
    fn lost_torn_stale_and_misplaced_writes_are_found() {
        let refused = |data: &[u8]| check(data, 800, Some(STAMP)).is_err();
        let stale = block(800, Stamp { generation: 2, ..STAMP });
        let mut torn = block(800, STAMP);
        torn[2048..].copy_from_slice(&stale[2048..]);
        assert!(refused(&[0; 4096]), "lost");
        assert!(refused(&stale), "stale");
        assert!(refused(&torn), "torn");
        assert!(refused(&block(808, STAMP)), "misplaced");
        assert!(refused(&block(800, Stamp { run: 8, ..STAMP })), "of another run");
        assert!(check(&block(808, STAMP), 800, None).is_err(), "misplaced, by anyone");
    }

    #[test]
    fn a_ledger_knows_what_was_written() {
        let mut ledger = Ledger::new(7, 4096, 10);
        assert_eq!(ledger.expected(8192), None);
        assert!(ledger.take(8192) && !ledger.take(8192));
        assert_eq!(ledger.next_stamp(8192).generation, 1);
        ledger.give_back(8192);
        assert_eq!(ledger.expected(8192), Some(Stamp { run: 7, generation: 1 }));
        assert_eq!(ledger.written_from(0), Some(8192));
        assert_eq!(ledger.written_from(8193), None);
        assert_eq!(ledger.written_from(1 << 40), None);
    }
}
