//! Whole operations over a [`Device`], one after the other: for format, open, close and check.
//!
//! Control path only: it allocates, and it spins until the device is done. Serving I/O never comes
//! here. Large transfers are cut into chunks of which several are in flight.

use bessel_reactor::buffer::{Buffer, BufferPool};
use bessel_reactor::device::{Completion, Device, DeviceError, Token};
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr};

/// Blocks in one operation: 512 KiB, past which devices gain nothing.
const CHUNK_BLOCKS: u64 = 128;
/// Blocks in one operation on a small device, whose tables are small too: tests open thousands of
/// these, and large chunks take half of that time to bring in fresh memory.
pub(crate) const CHUNK_BLOCKS_SMALL: u64 = 4;
/// A device up to this many blocks, 1 GiB, is small.
const SMALL_BLOCKS: u64 = (1 << 30) / BLOCK_SIZE;
/// Operations in flight: 4 MiB of buffers. Every device is made with a larger depth.
const DEPTH: usize = 8;

/// A run of blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span {
    /// The first.
    pub start: BlockAddr,
    /// How many.
    pub blocks: u64,
}

impl Span {
    /// One block.
    pub const fn one(start: BlockAddr) -> Self {
        Self { start, blocks: 1 }
    }

    /// The span in pieces of at most `chunk` blocks.
    fn pieces(self, chunk: u64) -> impl Iterator<Item = Self> {
        (0..self.blocks).step_by(chunk as usize).map(move |done| Self {
            start: self.start.add(done),
            blocks: (self.blocks - done).min(chunk),
        })
    }

    fn bytes(self) -> usize {
        (self.blocks * BLOCK_SIZE) as usize
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

/// What is in flight under one token.
struct Flight {
    buffer: Buffer,
    span: Span,
}

/// A device, used synchronously. Nobody else may use it meanwhile.
pub struct Blocking<'d, D: Device> {
    device: &'d mut D,
    chunk_blocks: u64,
    pool: BufferPool,
    flights: [Option<Flight>; DEPTH],
    completions: Vec<Completion>,
}

impl<'d, D: Device> Blocking<'d, D> {
    /// Takes the device for a while.
    pub fn new(device: &'d mut D) -> Self {
        let small = device.properties().capacity.blocks_floor() <= SMALL_BLOCKS;
        let chunk_blocks = if small { CHUNK_BLOCKS_SMALL } else { CHUNK_BLOCKS };
        Self {
            device,
            chunk_blocks,
            pool: BufferPool::new(DEPTH, (chunk_blocks * BLOCK_SIZE) as usize),
            flights: [const { None }; DEPTH],
            completions: Vec::new(),
        }
    }

    /// Whole blocks the device has.
    pub fn capacity_blocks(&self) -> u64 {
        self.device.properties().capacity.blocks_floor()
    }

    /// Reads all `spans`, in any order; `sink` gets each as one or more pieces.
    ///
    /// # Errors
    /// The first operation that failed.
    pub fn read(
        &mut self,
        spans: impl IntoIterator<Item = Span>,
        mut sink: impl FnMut(BlockAddr, &[u8]),
    ) -> Result<(), DeviceError> {
        let sink = |span: Span, bytes: &mut [u8]| sink(span.start, bytes);
        self.transfer(Direction::Read, spans, sink)
    }

    /// [`Blocking::read`], block by block when something cannot be read: `sink` then gets each block,
    /// or why it cannot be had, and some of them twice.
    pub fn read_each(
        &mut self,
        spans: &[Span],
        mut sink: impl FnMut(BlockAddr, Result<&[u8], DeviceError>),
    ) {
        let whole = self.read(spans.iter().copied(), |start, bytes| {
            let addrs = (start.get()..).map(BlockAddr::new);
            for (addr, block) in addrs.zip(bytes.chunks_exact(BLOCK_SIZE as usize)) {
                sink(addr, Ok(block));
            }
        });
        if whole.is_ok() {
            return;
        }
        let mut block = [0; BLOCK_SIZE as usize];
        for span in spans {
            for addr in (0..span.blocks).map(|index| span.start.add(index)) {
                match self.read_into(addr, &mut block) {
                    Ok(()) => sink(addr, Ok(&block)),
                    Err(error) => sink(addr, Err(error)),
                }
            }
        }
    }

    /// Reads the blocks from `start` on into `target`, whole blocks.
    ///
    /// # Errors
    /// The first operation that failed.
    pub fn read_into(&mut self, start: BlockAddr, target: &mut [u8]) -> Result<(), DeviceError> {
        assert!(target.len().is_multiple_of(BLOCK_SIZE as usize), "whole blocks are read");
        let span = Span { start, blocks: target.len() as u64 / BLOCK_SIZE };
        self.read([span], |piece, bytes| {
            let at = ((piece.get() - start.get()) * BLOCK_SIZE) as usize;
            target[at..at + bytes.len()].copy_from_slice(bytes);
        })
    }

    /// Writes all `spans`, in any order; `fill` fills each, as one or more zeroed pieces.
    ///
    /// # Errors
    /// The first operation that failed. Others may have happened.
    pub fn write(
        &mut self,
        spans: impl IntoIterator<Item = Span>,
        mut fill: impl FnMut(BlockAddr, &mut [u8]),
    ) -> Result<(), DeviceError> {
        let fill = |span: Span, bytes: &mut [u8]| fill(span.start, bytes);
        self.transfer(Direction::Write, spans, fill)
    }

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// The device's. Nothing written since the last flush is known to be durable then.
    pub fn flush(&mut self) -> Result<(), DeviceError> {
        self.device.flush(Token(0));
        self.device.submit();
        loop {
            if let Some(completion) = self.reap().pop() {
                return completion.result;
            }
        }
    }

    /// Moves `spans` with up to `DEPTH` pieces in flight. `touch` sees a piece's bytes before they
    /// are written, or after they were read.
    fn transfer(
        &mut self,
        direction: Direction,
        spans: impl IntoIterator<Item = Span>,
        mut touch: impl FnMut(Span, &mut [u8]),
    ) -> Result<(), DeviceError> {
        let chunk = self.chunk_blocks;
        let mut pieces = spans.into_iter().flat_map(|span| span.pieces(chunk));
        let mut outcome = Ok(());
        loop {
            while outcome.is_ok() && self.pool.available() > 0 {
                let Some(span) = pieces.next() else { break };
                self.start(direction, span, &mut touch);
            }
            // Even after a failure all operations are awaited: the device holds our memory.
            if self.pool.available() == DEPTH {
                return outcome;
            }
            self.device.submit();
            for completion in self.reap() {
                let flight = self.flights[completion.token.0 as usize].take();
                let Flight { mut buffer, span } = flight.expect("a token completes once");
                self.pool.returned(&buffer);
                match completion.result {
                    Err(error) => outcome = outcome.and(Err(error)),
                    Ok(()) if direction == Direction::Read => {
                        touch(span, &mut self.pool.bytes_mut(&mut buffer)[..span.bytes()]);
                    }
                    Ok(()) => {}
                }
                self.pool.put(buffer);
            }
        }
    }

    fn start(&mut self, direction: Direction, span: Span, touch: &mut impl FnMut(Span, &mut [u8])) {
        let free = self.flights.iter().position(Option::is_none);
        let token = free.expect("there are as many places as buffers");
        let mut buffer = self.pool.take().expect("the caller saw one available");
        if direction == Direction::Write {
            let bytes = &mut self.pool.bytes_mut(&mut buffer)[..span.bytes()];
            bytes.fill(0);
            touch(span, bytes);
        }
        let segment = self.pool.lend(&buffer).part(0, span.bytes());
        let (token_name, offset) = (Token(token as u64), span.start.offset());
        match direction {
            Direction::Read => self.device.read(token_name, offset, &[segment]),
            Direction::Write => self.device.write(token_name, offset, &[segment]),
        }
        self.flights[token] = Some(Flight { buffer, span });
    }

    fn reap(&mut self) -> Vec<Completion> {
        self.device.reap(&mut self.completions);
        if self.completions.is_empty() {
            std::thread::yield_now();
        }
        std::mem::take(&mut self.completions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bessel_reactor::device::sim::{Fault, OpKind, SimConfig, SimDisk};
    use bessel_reactor::units::ByteCount;

    fn disk() -> SimDisk {
        SimDisk::new(SimConfig::new(ByteCount::new(16 << 20), 1))
    }

    #[test]
    fn what_is_written_in_pieces_is_read_back_whole() {
        let disk = disk();
        let mut device = disk.connect();
        let mut io = Blocking::new(&mut device);
        let span = Span { start: BlockAddr::new(5), blocks: 3 * CHUNK_BLOCKS + 7 };
        io.write([span, Span::one(BlockAddr::new(1))], |start, bytes| {
            for (block, chunk) in (start.get()..).zip(bytes.chunks_exact_mut(4096)) {
                chunk[..8].copy_from_slice(&block.to_le_bytes());
            }
        })
        .unwrap();
        io.flush().unwrap();
        let mut back = vec![1; span.bytes()];
        io.read_into(span.start, &mut back).unwrap();
        for (block, chunk) in (5u64..).zip(back.chunks_exact(4096)) {
            assert_eq!(chunk[..8], block.to_le_bytes());
            assert!(chunk[8..].iter().all(|&byte| byte == 0));
        }
        drop(device);
        assert_eq!(disk.volatile_sectors(), 0);
    }

    #[test]
    fn a_failure_is_reported_after_all_operations_have_ended() {
        let disk = disk();
        disk.inject(Fault { kind: Some(OpKind::Read), after: 2, lasting: false });
        let mut device = disk.connect();
        let mut io = Blocking::new(&mut device);
        let span = Span { start: BlockAddr::new(0), blocks: 6 * CHUNK_BLOCKS };
        assert!(io.read([span], |_, _| ()).is_err());
        assert_eq!(disk.in_flight(), 0);
    }
}
