//! What goes over the API when a snapshot is exported or a volume imported, and what the file of a
//! diff holds (docs/stream.md): a header, ranges with their data, an end mark.
//!
//! Each part carries the CRC32C of everything up to its own end, so that what was cut short or
//! damaged is noticed, at the latest at the end mark. What is read is hostile.

use bessel_mapping::request::{SnapshotId, VolumeId};
use bessel_reactor::clock::WallTime;
use bessel_reactor::units::{BLOCK_SIZE, ByteCount, VolumeBlock};
use std::io::{self, Read};

const MAGIC: [u8; 8] = *b"BESSELDF";
const VERSION: u32 = 1;
/// Bytes of a header.
pub(crate) const HEADER_BYTES: usize = 128;
/// Bytes of what begins a range.
pub(crate) const RECORD_BYTES: usize = 24;
/// Longest text that says why a stream breaks off.
const REASON_BYTES_MAX: u64 = 4096;
/// Blocks past which no volume has any: 256 TiB.
const BLOCKS_MAX: u64 = 1 << 36;

const DATA: u32 = 1;
const HOLE: u32 = 2;
const END: u32 = 3;
const BROKEN_OFF: u32 = 4;

/// What a stream is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    /// The store.
    pub(crate) store: [u8; 16],
    /// The snapshot whose contents it brings; none when they are of a file.
    pub(crate) snapshot: Option<SnapshotId>,
    /// Size of the volume then; 0 while nobody knows: the end mark tells it.
    pub(crate) size: ByteCount,
    /// When it was taken.
    pub(crate) time: WallTime,
    /// The snapshot that it is a difference to, and the size then; none when it is whole.
    pub(crate) base: Option<(SnapshotId, ByteCount)>,
}

impl Header {
    /// The size of the volume is known before the end.
    pub(crate) fn is_sized(&self) -> bool {
        self.size.get() > 0
    }

    /// Blocks of the volume, or of what it is a difference to if that is longer: what a part may name.
    fn blocks(&self) -> u64 {
        let base = self.base.map_or(0, |(_, size)| size.blocks_ceil());
        if self.is_sized() { self.size.blocks_ceil().max(base) } else { BLOCKS_MAX }
    }
}

/// A part of a stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Part {
    /// So many blocks of data follow, to be put from `first` on.
    Data { first: VolumeBlock, blocks: u64 },
    /// These blocks read as zeroes.
    Hole { first: VolumeBlock, blocks: u64 },
    /// All is there.
    End {
        /// The volume's size, if the header has not told it.
        size: Option<ByteCount>,
    },
}

/// Why a stream cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    #[error("cannot read it: {0}")]
    Read(#[from] io::Error),
    #[error("it ends early")]
    CutShort,
    #[error("it is no stream of Bessel; it begins {0:02x?}")]
    Foreign([u8; 8]),
    #[error("it has version {0}, and this program knows version {VERSION}")]
    Version(u32),
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    /// In the words of who sent it.
    #[error("{0}")]
    BrokenOff(String),
}

fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// Makes the bytes of a stream, in order.
#[derive(Default)]
pub(crate) struct Encoder {
    crc: u32,
}

impl Encoder {
    /// The header, first of all.
    pub(crate) fn header(&mut self, header: &Header) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..32].copy_from_slice(&header.store);
        if let Some(snapshot) = header.snapshot {
            put(&mut bytes, 32, snapshot.volume.0);
            put(&mut bytes, 40, snapshot.sequence);
        }
        put(&mut bytes, 48, header.size.get());
        put(&mut bytes, 56, header.time.as_unix_nanos());
        if let Some((base, size)) = header.base {
            put(&mut bytes, 64, base.volume.0);
            put(&mut bytes, 72, base.sequence);
            put(&mut bytes, 80, size.get());
        }
        self.seal(&mut bytes, 12);
        bytes
    }

    /// What begins a part.
    pub(crate) fn part(&mut self, part: Part) -> [u8; RECORD_BYTES] {
        let (kind, first, blocks) = match part {
            Part::Data { first, blocks } => (DATA, first.get(), blocks),
            Part::Hole { first, blocks } => (HOLE, first.get(), blocks),
            Part::End { size } => (END, size.map_or(0, ByteCount::get), 0),
        };
        self.record(kind, first, blocks)
    }

    /// Data of the part that was begun.
    pub(crate) fn data(&mut self, bytes: &[u8]) {
        self.crc = crc32c::crc32c_append(self.crc, bytes);
    }

    /// Says why there is no more.
    pub(crate) fn break_off(&mut self, why: &str) -> Vec<u8> {
        let why = &why.as_bytes()[..why.len().min(REASON_BYTES_MAX as usize)];
        let mut bytes = self.record(BROKEN_OFF, 0, why.len() as u64).to_vec();
        bytes.extend_from_slice(why);
        bytes
    }

    fn record(&mut self, kind: u32, first: u64, count: u64) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        put(&mut bytes, 8, first);
        put(&mut bytes, 16, count);
        self.seal(&mut bytes, 4);
        bytes
    }

    /// The checksum of everything so far and of these bytes, in which it counts as zero.
    fn seal(&mut self, bytes: &mut [u8], at: usize) {
        let crc = crc32c::crc32c_append(self.crc, bytes);
        bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
        self.crc = crc32c::crc32c_append(self.crc, bytes);
    }
}

/// Takes a stream apart.
pub(crate) struct Decoder<R> {
    source: R,
    crc: u32,
    /// Bytes of data that come before the next part.
    left: u64,
    /// The first block that a part may name next, and the end of those that one may.
    next: u64,
    end: u64,
    sized: bool,
}

impl<R: Read> Decoder<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// When it is none.
    pub(crate) fn new(source: R) -> Result<(Header, Self), StreamError> {
        let mut decoder = Self { source, crc: 0, left: 0, next: 0, end: 0, sized: false };
        let mut bytes = [0; HEADER_BYTES];
        decoder.fill(&mut bytes[..8])?;
        if bytes[..8] != MAGIC {
            return Err(StreamError::Foreign(bytes[..8].try_into().expect("eight bytes")));
        }
        decoder.fill(&mut bytes[8..])?;
        if word(&bytes, 8) != VERSION {
            return Err(StreamError::Version(word(&bytes, 8)));
        }
        decoder.check(&mut bytes, 12)?;
        let snapshot = |at: usize| {
            let volume = VolumeId(number(&bytes, at));
            let sequence = number(&bytes, at + 8);
            (volume.0 != 0).then_some(SnapshotId { volume, sequence })
        };
        let header = Header {
            store: bytes[16..32].try_into().expect("sixteen bytes"),
            snapshot: snapshot(32),
            size: ByteCount::new(number(&bytes, 48)),
            time: WallTime::from_unix_nanos(number(&bytes, 56)),
            base: snapshot(64).map(|base| (base, ByteCount::new(number(&bytes, 80)))),
        };
        if header.size.blocks_ceil() > BLOCKS_MAX {
            return Err(StreamError::Damaged("no volume is as large as it says"));
        }
        if header.base.is_some_and(|(_, size)| size.blocks_ceil() > BLOCKS_MAX) {
            return Err(StreamError::Damaged("no snapshot is as large as it says of its base"));
        }
        if header.base.is_some() && !header.is_sized() {
            return Err(StreamError::Damaged("a difference has no size"));
        }
        (decoder.end, decoder.sized) = (header.blocks(), header.is_sized());
        Ok((header, decoder))
    }

    /// The next part. The data of the one before it has been read.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn part(&mut self) -> Result<Part, StreamError> {
        assert_eq!(self.left, 0, "the data of the last part comes first");
        let mut bytes = [0; RECORD_BYTES];
        self.fill(&mut bytes)?;
        self.check(&mut bytes, 4)?;
        let (first, blocks) = (number(&bytes, 8), number(&bytes, 16));
        let kind = word(&bytes, 0);
        if kind == BROKEN_OFF {
            let mut why = vec![0; blocks.min(REASON_BYTES_MAX) as usize];
            self.fill(&mut why)?;
            return Err(StreamError::BrokenOff(String::from_utf8_lossy(&why).into_owned()));
        }
        match kind {
            DATA => {
                let first = self.range(first, blocks)?;
                self.left = blocks * BLOCK_SIZE;
                Ok(Part::Data { first, blocks })
            }
            HOLE => Ok(Part::Hole { first: self.range(first, blocks)?, blocks }),
            END if self.sized => Ok(Part::End { size: None }),
            END => {
                let size = ByteCount::new(first);
                if size.get() == 0 || !(self.next..=BLOCKS_MAX).contains(&size.blocks_ceil()) {
                    return Err(StreamError::Damaged("its end tells a size that cannot be"));
                }
                Ok(Part::End { size: Some(size) })
            }
            _ => Err(StreamError::Damaged("a part is of no known kind")),
        }
    }

    /// Checks a range of blocks, which come in order and inside the volume.
    fn range(&mut self, first: u64, blocks: u64) -> Result<VolumeBlock, StreamError> {
        let end = first.checked_add(blocks).filter(|end| blocks > 0 && *end <= self.end);
        let end = end.ok_or(StreamError::Damaged("a range is empty or lies past the volume"))?;
        if first < self.next {
            return Err(StreamError::Damaged("its parts are out of order"));
        }
        self.next = end;
        Ok(VolumeBlock::new(first))
    }

    /// Reads the next bytes of data, as many as `bytes` has room for, but not past the end of the
    /// part. Returns how many.
    ///
    /// # Errors
    /// When they do not come.
    pub(crate) fn data(&mut self, bytes: &mut [u8]) -> Result<usize, StreamError> {
        let count = self.left.min(bytes.len() as u64) as usize;
        let bytes = &mut bytes[..count];
        self.fill(bytes)?;
        self.crc = crc32c::crc32c_append(self.crc, bytes);
        self.left -= count as u64;
        Ok(count)
    }

    fn check(&mut self, bytes: &mut [u8], at: usize) -> Result<(), StreamError> {
        let found = word(bytes, at);
        bytes[at..at + 4].fill(0);
        let expected = crc32c::crc32c_append(self.crc, bytes);
        bytes[at..at + 4].copy_from_slice(&found.to_le_bytes());
        self.crc = crc32c::crc32c_append(self.crc, bytes);
        if found == expected { Ok(()) } else { Err(StreamError::Damaged("a checksum is wrong")) }
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), StreamError> {
        self.source.read_exact(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => StreamError::CutShort,
            _ => StreamError::Read(error),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bessel_reactor::device::sim::Random;

    fn header() -> Header {
        let snapshot = |sequence| SnapshotId { volume: VolumeId(3), sequence };
        Header {
            store: [7; 16],
            snapshot: Some(snapshot(17)),
            size: ByteCount::new(1 << 30),
            time: WallTime::from_unix_nanos(12345),
            base: Some((snapshot(0), ByteCount::new(1 << 29))),
        }
    }

    fn parts() -> [Part; 3] {
        let first = VolumeBlock::new;
        [
            Part::Data { first: first(5), blocks: 2 },
            Part::Hole { first: first(9), blocks: 100 },
            Part::Data { first: first(200), blocks: 1 },
        ]
    }

    fn stream() -> Vec<u8> {
        let mut encoder = Encoder::default();
        let mut bytes = encoder.header(&header()).to_vec();
        for part in parts() {
            bytes.extend(encoder.part(part));
            if let Part::Data { first, blocks } = part {
                let data = vec![first.get() as u8; (blocks * BLOCK_SIZE) as usize];
                encoder.data(&data);
                bytes.extend(data);
            }
        }
        bytes.extend(encoder.part(Part::End { size: None }));
        bytes
    }

    fn read(bytes: &[u8]) -> Result<(Header, Vec<Part>), StreamError> {
        let (header, mut decoder) = Decoder::new(bytes)?;
        let mut found = Vec::new();
        loop {
            let part = decoder.part()?;
            found.push(part);
            match part {
                Part::End { .. } => return Ok((header, found)),
                Part::Hole { .. } => {}
                Part::Data { .. } => {
                    let mut block = [0; 3000];
                    while decoder.data(&mut block)? > 0 {}
                }
            }
        }
    }

    #[test]
    fn a_stream_comes_back_and_any_damage_or_end_is_found() {
        let bytes = stream();
        let (found, mut found_parts) = read(&bytes).unwrap();
        assert_eq!((found, found_parts.pop()), (header(), Some(Part::End { size: None })));
        assert_eq!(found_parts, parts());
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            assert!(read(&bad).is_err(), "byte {at}");
        }
        for length in (0..bytes.len()).step_by(7).chain([bytes.len() - 1]) {
            assert!(matches!(read(&bytes[..length]), Err(StreamError::CutShort)), "{length} bytes");
        }
    }

    #[test]
    fn why_a_stream_breaks_off_is_told() {
        let mut encoder = Encoder::default();
        let mut bytes = encoder.header(&header()).to_vec();
        bytes.extend(encoder.break_off("the device failed"));
        assert_eq!(read(&bytes).unwrap_err().to_string(), "the device failed");
    }

    #[test]
    fn well_sealed_nonsense_is_refused() {
        for (kind, first, blocks) in
            [(DATA, 0, 0), (DATA, u64::MAX, 2), (HOLE, BLOCKS_MAX, 1), (9, 0, 1)]
        {
            let mut encoder = Encoder::default();
            let mut bytes = encoder.header(&header()).to_vec();
            bytes.extend(encoder.record(kind, first, blocks));
            assert!(
                matches!(read(&bytes), Err(StreamError::Damaged(_))),
                "{kind} {first} {blocks}"
            );
        }
    }

    #[test]
    fn the_end_tells_the_size_when_the_header_does_not() {
        let ended = |size: u64, last: u64| {
            let mut encoder = Encoder::default();
            let header = Header { size: ByteCount::default(), base: None, ..header() };
            let mut bytes = encoder.header(&header).to_vec();
            let first = VolumeBlock::new(last);
            bytes.extend(encoder.part(Part::Hole { first, blocks: 1 }));
            bytes.extend(encoder.part(Part::End { size: Some(ByteCount::new(size)) }));
            read(&bytes).map(|(_, parts)| parts[1])
        };
        let size = ByteCount::new(4097);
        assert_eq!(ended(4097, 1).unwrap(), Part::End { size: Some(size) });
        assert!(ended(4096, 1).is_err(), "a part lies past the end");
        assert!(ended(0, 0).is_err() && ended((256 << 40) + 1, 1).is_err());
        let mut encoder = Encoder::default();
        let unsized_difference = encoder.header(&Header { size: ByteCount::default(), ..header() });
        assert!(read(&unsized_difference).is_err(), "a difference has a size");
    }

    /// The daemon reads what clients send: whatever is well sealed and told in any order, parts come in
    /// order, inside the volume, and with no more data than was sent.
    #[test]
    fn whatever_is_sent_parts_come_in_order_and_inside_the_volume() {
        let mut whole = 0;
        for seed in 0..3000 {
            let mut random = Random::new(seed);
            let odd = [0, 1, 2, 3, 511, 512, 1 << 18, BLOCKS_MAX, u64::MAX - 1, u64::MAX];
            let size = ByteCount::new(*random.pick(&[0, 1, 4096, 8192, 1 << 30, 1 << 48]));
            let base = random.chance(1, 2).then(|| {
                let volume = VolumeId(random.below(3));
                let size = ByteCount::new(*random.pick(&[0, 4096, 1 << 31, u64::MAX]));
                (SnapshotId { volume, sequence: random.below(3) }, size)
            });
            let mut encoder = Encoder::default();
            let mut bytes = encoder.header(&Header { size, base, ..header() }).to_vec();
            let mut next = 0;
            for _ in 0..random.below(6) {
                let kind = [DATA, DATA, HOLE, END, BROKEN_OFF, 9][random.below(6) as usize];
                let first = if random.chance(3, 4) { next } else { *random.pick(&odd) };
                let usual = if random.chance(7, 8) { &odd[..3] } else { &odd[..] };
                let blocks = *random.pick(usual);
                bytes.extend(encoder.record(kind, first, blocks));
                let data = vec![seed as u8; blocks.min(3) as usize * BLOCK_SIZE as usize];
                if kind == DATA {
                    encoder.data(&data);
                    bytes.extend(data);
                }
                next = first.saturating_add(blocks);
            }
            bytes.extend(encoder.record(END, random.pick(&odd).wrapping_mul(BLOCK_SIZE), 0));
            let Ok((header, parts)) = read(&bytes) else { continue };
            whole += 1;
            let mut next = 0;
            for part in parts {
                let (Part::Data { first, blocks } | Part::Hole { first, blocks }) = part else {
                    continue;
                };
                assert!(first.get() >= next && blocks > 0, "seed {seed}: {part:?}");
                next = first.get() + blocks;
                assert!(next <= header.blocks(), "seed {seed}: {part:?} of {header:?}");
            }
        }
        assert!(whole > 100, "most are refused for one thing: {whole}");
    }
}
