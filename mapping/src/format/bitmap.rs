//! One block of an extent's allocation bitmap.
//!
//! Bit `i` of an extent says that its block `i` is allocated, or claimed to be handed out. Blocks
//! are claimed by the thousand, durably, before any is used, so a bitmap is written rarely and off
//! the write path. Sectors are sealed one by one: a torn bitmap block is a mix of old and new
//! claims, which leaks at most the claim.

use bessel_reactor::units::BlockAddr;
use zerocopy::IntoBytes;

use super::seal::{BLOCK, Damage, Kind, Place, SEALED_PAYLOAD, SECTOR, seal, unseal};

const WORDS_PER_SECTOR: usize = SEALED_PAYLOAD / size_of::<u64>();
const SECTORS: usize = BLOCK / SECTOR;
const WORDS: usize = WORDS_PER_SECTOR * SECTORS;

const _: () = assert!(WORDS_PER_SECTOR * size_of::<u64>() == SEALED_PAYLOAD);
const _: () = assert!(Bitmap::BITS == 31744);

/// One bitmap block in memory: 31744 bits, least significant first, set when allocated.
///
/// 4 KiB by value: box it where it would be moved about.
#[derive(Clone, PartialEq, Eq)]
pub struct Bitmap {
    words: [u64; WORDS],
}

impl std::fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bitmap {{ free: {} of {} }}", self.count_free(), Self::BITS)
    }
}

impl Default for Bitmap {
    fn default() -> Self {
        Self::new()
    }
}

impl Bitmap {
    /// Bits in a bitmap block: 8 sectors × 496 bytes × 8.
    pub const BITS: u32 = (WORDS * 64) as u32;

    /// All free.
    pub const fn new() -> Self {
        Self { words: [0; WORDS] }
    }

    /// Reads the bitmap block at `addr`.
    ///
    /// # Errors
    /// The first sector that is damaged.
    ///
    /// # Panics
    /// When `bytes` is not one block.
    pub fn decode(bytes: &[u8], addr: BlockAddr, secret: u64) -> Result<Self, Damage> {
        let mut bitmap = Self::new();
        bitmap.decode_into(bytes, addr, secret)?;
        Ok(bitmap)
    }

    /// [`Bitmap::decode`] into a bitmap there is; its bits mean nothing after an error.
    ///
    /// # Errors
    /// As [`Bitmap::decode`].
    pub fn decode_into(
        &mut self,
        bytes: &[u8],
        addr: BlockAddr,
        secret: u64,
    ) -> Result<(), Damage> {
        assert_eq!(bytes.len(), BLOCK, "a bitmap block is one block");
        let words = self.words.chunks_exact_mut(WORDS_PER_SECTOR);
        for (index, (sector, words)) in bytes.chunks_exact(SECTOR).zip(words).enumerate() {
            unseal(sector, Place::new(addr, index as u8), Kind::Bitmap, secret)?;
            words.as_mut_bytes().copy_from_slice(&sector[..SEALED_PAYLOAD]);
        }
        Ok(())
    }

    /// Fills `out` with the block to write to `addr`.
    ///
    /// # Panics
    /// When `out` is not one block.
    pub fn encode(&self, out: &mut [u8], addr: BlockAddr, secret: u64) {
        assert_eq!(out.len(), BLOCK, "a bitmap block is one block");
        let words = self.words.chunks_exact(WORDS_PER_SECTOR);
        for (index, (sector, words)) in out.chunks_exact_mut(SECTOR).zip(words).enumerate() {
            sector[..SEALED_PAYLOAD].copy_from_slice(words.as_bytes());
            seal(sector, Place::new(addr, index as u8), Kind::Bitmap, secret);
        }
    }

    /// True when the block is allocated.
    ///
    /// # Panics
    /// When there is no such bit; so do all functions here that take one.
    pub fn get(&self, bit: u32) -> bool {
        self.words[bit as usize / 64] >> (bit % 64) & 1 != 0
    }

    /// Marks a block allocated.
    pub fn set(&mut self, bit: u32) {
        self.words[bit as usize / 64] |= 1 << (bit % 64);
    }

    /// Marks a block free.
    pub fn clear(&mut self, bit: u32) {
        self.words[bit as usize / 64] &= !(1 << (bit % 64));
    }

    /// Marks `length` blocks from `start` on allocated.
    pub fn set_range(&mut self, start: u32, length: u32) {
        for (word, mask) in masks(start, length) {
            self.words[word] |= mask;
        }
    }

    /// Marks `length` blocks from `start` on free.
    pub fn clear_range(&mut self, start: u32, length: u32) {
        for (word, mask) in masks(start, length) {
            self.words[word] &= !mask;
        }
    }

    /// Marks allocated what is in `other`; true when it was already.
    pub fn include(&mut self, other: &Self) -> bool {
        let mut included = true;
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            included &= *word | other == *word;
            *word |= other;
        }
        included
    }

    /// How many are free.
    pub fn count_free(&self) -> u32 {
        self.words.iter().map(|word| word.count_zeros()).sum()
    }

    /// The allocated blocks, in order.
    pub fn allocated(&self) -> impl Iterator<Item = u32> {
        (0u32..).step_by(64).zip(&self.words).flat_map(|(first, word)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros())?;
                left &= left - 1;
                Some(first + bit)
            })
        })
    }

    /// The first run of free blocks at or after `from`, as its start and length, cut to `max`.
    pub fn find_free_run(&self, from: u32, max: u32) -> Option<(u32, u32)> {
        let start = self.next(from, 0)?;
        let end = self.next(start, u64::MAX).unwrap_or(Self::BITS);
        Some((start, (end - start).min(max)))
    }

    /// The first bit at or after `from` that is clear in `word ^ invert`.
    fn next(&self, from: u32, invert: u64) -> Option<u32> {
        if from >= Self::BITS {
            return None;
        }
        let first = from as usize / 64;
        let below = (1 << (from % 64)) - 1;
        for (index, word) in self.words.iter().enumerate().skip(first) {
            let hidden = if index == first { below } else { 0 };
            let word = (word ^ invert) | hidden;
            if word != u64::MAX {
                return Some(index as u32 * 64 + word.trailing_ones());
            }
        }
        None
    }
}

/// The words that `length` bits from `start` on touch, each with the mask of those bits.
fn masks(start: u32, length: u32) -> impl Iterator<Item = (usize, u64)> {
    let end = start.checked_add(length).filter(|&end| end <= Bitmap::BITS);
    let end = end.expect("a range of bits ends inside its bitmap");
    let words = if length == 0 { 0..0 } else { start / 64..(end - 1) / 64 + 1 };
    words.map(move |word| {
        let low = start.max(word * 64) - word * 64;
        let high = end.min(word * 64 + 64) - word * 64;
        let mask = (u64::MAX >> (64 - (high - low))) << low;
        (word as usize, mask)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDR: BlockAddr = BlockAddr::new(256);
    const SECRET: u64 = 99;

    fn sample() -> Bitmap {
        let mut bitmap = Bitmap::new();
        bitmap.set_range(0, 70);
        bitmap.set_range(4000, 1);
        bitmap.set_range(31000, 744);
        bitmap
    }

    #[test]
    fn a_bitmap_comes_back_and_any_damage_is_found() {
        let mut block = [0; BLOCK];
        sample().encode(&mut block, ADDR, SECRET);
        assert_eq!(Bitmap::decode(&block, ADDR, SECRET), Ok(sample()));
        assert_eq!(block[..9], [255, 255, 255, 255, 255, 255, 255, 255, 0x3f]);
        for byte in 0..BLOCK {
            block[byte] ^= 0x10;
            let damage = Bitmap::decode(&block, ADDR, SECRET).unwrap_err();
            assert_eq!(usize::from(damage.sector), byte / SECTOR);
            block[byte] ^= 0x10;
        }
        assert!(Bitmap::decode(&block, ADDR.add(1), SECRET).is_err());
    }

    #[test]
    fn a_torn_bitmap_is_a_mix_of_its_sectors() {
        let (mut old, mut new) = ([0; BLOCK], [0; BLOCK]);
        Bitmap::new().encode(&mut old, ADDR, SECRET);
        sample().encode(&mut new, ADDR, SECRET);
        old[..SECTOR].copy_from_slice(&new[..SECTOR]);
        let torn = Bitmap::decode(&old, ADDR, SECRET).unwrap();
        assert!(torn.get(69) && !torn.get(4000));
        assert_eq!(torn.count_free(), Bitmap::BITS - 70);
    }

    #[test]
    fn ranges_and_bits_agree() {
        for (start, length) in [(0, 0), (0, 1), (63, 2), (64, 64), (5, 300), (31743, 1), (0, 31744)]
        {
            let mut by_range = Bitmap::new();
            by_range.set_range(start, length);
            let mut by_bit = Bitmap::new();
            (start..start + length).for_each(|bit| by_bit.set(bit));
            assert_eq!(by_range, by_bit, "{start}+{length}");
            assert_eq!(by_range.count_free(), Bitmap::BITS - length);
            by_range.clear_range(start, length);
            assert_eq!(by_range, Bitmap::new());
        }
    }

    #[test]
    fn including_says_what_was_missing() {
        let mut bitmap = Bitmap::new();
        assert!(!bitmap.include(&sample()));
        assert_eq!(bitmap, sample());
        bitmap.set(4001);
        assert!(bitmap.include(&sample()));
        assert!(bitmap.get(4001));
    }

    #[test]
    fn runs_are_found_in_order_and_cut() {
        let bitmap = sample();
        assert_eq!(bitmap.find_free_run(0, 10), Some((70, 10)));
        assert_eq!(bitmap.find_free_run(75, u32::MAX), Some((75, 4000 - 75)));
        assert_eq!(bitmap.find_free_run(4000, u32::MAX), Some((4001, 31000 - 4001)));
        assert_eq!(bitmap.find_free_run(31000, 1), None);
        assert_eq!(bitmap.find_free_run(40000, 1), None);
        assert_eq!(Bitmap::new().find_free_run(0, u32::MAX), Some((0, Bitmap::BITS)));
    }

    #[test]
    #[should_panic(expected = "ends inside its bitmap")]
    fn a_range_past_the_end_is_our_bug() {
        Bitmap::new().set_range(31743, 2);
    }
}
