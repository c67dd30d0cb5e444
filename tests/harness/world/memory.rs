//! A guest's memory for one request: pieces of any size that start anywhere, as guests have them.

use bessel_reactor::buffer::{Buffer, BufferPool, Segment};
use bessel_reactor::device::sim::Random;
use bessel_reactor::units::{BLOCK_SIZE, SECTOR_SIZE};

use crate::model::stamp;

/// Memory of one journal.
pub(super) struct JournalMemory {
    _pool: BufferPool,
    pub(super) segment: Segment,
}

impl JournalMemory {
    pub(super) fn new(entries: usize) -> Self {
        let mut pool = BufferPool::new(1, (64 + entries * 48).next_multiple_of(4096));
        let buffer = pool.take().expect("it has one");
        let segment = pool.lend(&buffer);
        Self { _pool: pool, segment }
    }
}

/// Guest memory of one request, kept until it completes.
pub(super) struct Memory {
    pool: BufferPool,
    buffer: Option<Buffer>,
    start: usize,
    length: usize,
    pub(super) segments: Vec<Segment>,
}

impl Memory {
    /// Guest memory for `length` bytes, in pieces of any size that start anywhere.
    pub(super) fn new(length: usize, random: &mut Random) -> Self {
        Self::made(length, random, 3, &[length, 4096, 512, 1000])
    }

    /// The same, of whole sectors, as devices like it.
    pub(super) fn of_sectors(length: usize, random: &mut Random) -> Self {
        Self::made(length, random, 2, &[length, 4096, 4096, 512])
    }

    fn made(length: usize, random: &mut Random, starts: u64, pieces: &[usize]) -> Self {
        let start = match random.below(starts) {
            0 => 0,
            1 => SECTOR_SIZE as usize * random.below(8) as usize,
            _ => random.below(BLOCK_SIZE) as usize,
        };
        let page = BLOCK_SIZE as usize;
        let mut pool = BufferPool::new(1, (start + length).div_ceil(page) * page);
        let buffer = pool.take();
        let mut memory = Self { pool, buffer, start, length, segments: Vec::new() };
        memory.segments = memory.split(random, pieces);
        memory
    }

    fn split(&mut self, random: &mut Random, pieces: &[usize]) -> Vec<Segment> {
        let buffer = self.buffer.as_ref().expect("taken in `new`");
        let whole = self.pool.lend(buffer).part(self.start, self.length);
        self.pool.returned(buffer);
        let mut segments = Vec::new();
        let mut at = 0;
        let piece = *random.pick(pieces);
        while at < self.length {
            let left = self.length - at;
            // At most 32 pieces, as a front-end with a sensible SEG_MAX gives.
            let length = if segments.len() == 31 { left } else { piece.min(left) };
            segments.push(whole.part(at, length));
            at += length;
        }
        segments
    }

    pub(super) fn fill(&mut self, value: u64, sector: u64) {
        let range = self.start..self.start + self.length;
        let buffer = self.buffer.as_mut().expect("taken in `new`");
        let bytes = &mut self.pool.bytes_mut(buffer)[range];
        for (sector, bytes) in (sector..).zip(bytes.chunks_exact_mut(SECTOR_SIZE as usize)) {
            stamp(value, sector, bytes);
        }
    }

    pub(super) fn spoil(&mut self) {
        let buffer = self.buffer.as_mut().expect("taken in `new`");
        self.pool.bytes_mut(buffer).fill(0xdd);
    }

    pub(super) fn bytes(&self) -> &[u8] {
        let buffer = self.buffer.as_ref().expect("taken in `new`");
        &self.pool.bytes(buffer)[self.start..self.start + self.length]
    }
}
