//! Devices without a kernel below them, for benchmarks and tests: what a path costs by itself.
//!
//! [`MemoryDevice`] keeps what is written; [`NullDevice`] does not, and leaves what it reads into
//! as it was. Both complete an operation where it is queued and hand it out at the next reap, in
//! order, so neither finds mistakes of ordering: that is what the simulated disk is for. Nothing
//! here survives the process, and there is no cache to lose.

use super::{Completion, Device, DeviceProperties, SEGMENTS_MAX, Token};
use crate::buffer::Segment;
use crate::units::{ByteCount, ByteOffset, SECTOR_SIZE};

/// A device in this process's memory.
#[derive(Debug)]
pub struct MemoryDevice {
    shell: Shell,
    bytes: Vec<u8>,
}

impl MemoryDevice {
    /// A zeroed device of `capacity` for at most `depth` operations in flight. Memory is taken from
    /// the system as it is first touched.
    ///
    /// # Panics
    /// When `capacity` is no multiple of 512, or more than the address space.
    pub fn new(capacity: ByteCount, depth: u32) -> Self {
        let bytes = usize::try_from(capacity.get()).expect("a memory device fits the memory");
        Self { shell: Shell::new(capacity, depth), bytes: vec![0; bytes] }
    }

    /// The place of each segment's bytes on the device.
    fn places(
        offset: ByteOffset,
        segments: &[Segment],
    ) -> impl Iterator<Item = (std::ops::Range<usize>, &Segment)> {
        segments.iter().scan(offset.get() as usize, |next, segment| {
            let start = *next;
            *next += segment.len();
            Some((start..*next, segment))
        })
    }
}

impl Device for MemoryDevice {
    fn properties(&self) -> DeviceProperties {
        self.shell.properties
    }

    fn read(&mut self, token: Token, offset: ByteOffset, segments: &[Segment]) {
        self.shell.accept(token, offset, segments);
        for (place, segment) in Self::places(offset, segments) {
            segment.write(&self.bytes[place]);
        }
    }

    fn write(&mut self, token: Token, offset: ByteOffset, segments: &[Segment]) {
        self.shell.accept(token, offset, segments);
        for (place, segment) in Self::places(offset, segments) {
            segment.read(&mut self.bytes[place]);
        }
    }

    fn flush(&mut self, token: Token) {
        self.shell.complete(token);
    }

    fn submit(&mut self) -> bool {
        !self.shell.ready.is_empty()
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        completions.append(&mut self.shell.ready);
    }
}

/// A device that does nothing, at once.
#[derive(Debug)]
pub struct NullDevice {
    shell: Shell,
}

impl NullDevice {
    /// A device of `capacity` for at most `depth` operations in flight.
    ///
    /// # Panics
    /// When `capacity` is no multiple of 512.
    pub fn new(capacity: ByteCount, depth: u32) -> Self {
        Self { shell: Shell::new(capacity, depth) }
    }
}

impl Device for NullDevice {
    fn properties(&self) -> DeviceProperties {
        self.shell.properties
    }

    fn read(&mut self, token: Token, offset: ByteOffset, segments: &[Segment]) {
        self.shell.accept(token, offset, segments);
    }

    fn write(&mut self, token: Token, offset: ByteOffset, segments: &[Segment]) {
        self.shell.accept(token, offset, segments);
    }

    fn flush(&mut self, token: Token) {
        self.shell.complete(token);
    }

    fn submit(&mut self) -> bool {
        !self.shell.ready.is_empty()
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        completions.append(&mut self.shell.ready);
    }
}

/// What the two have in common: the contract's checks, and completions that wait to be reaped.
#[derive(Debug)]
struct Shell {
    properties: DeviceProperties,
    depth: usize,
    ready: Vec<Completion>,
}

impl Shell {
    fn new(capacity: ByteCount, depth: u32) -> Self {
        assert!(capacity.get().is_multiple_of(SECTOR_SIZE), "{capacity:?} is no whole sectors");
        let properties = DeviceProperties {
            capacity,
            offset_alignment: SECTOR_SIZE as u32,
            memory_alignment: 1,
            volatile_cache: false,
            keeps_data: true,
        };
        let depth = depth as usize;
        Self { properties, depth, ready: Vec::with_capacity(depth) }
    }

    fn accept(&mut self, token: Token, offset: ByteOffset, segments: &[Segment]) {
        assert!(
            !segments.is_empty() && segments.len() <= SEGMENTS_MAX,
            "{} segments in one operation",
            segments.len()
        );
        assert!(segments.iter().all(|segment| !segment.is_empty()), "an empty segment");
        let bytes: u64 = segments.iter().map(|segment| segment.len() as u64).sum();
        assert!(
            (offset.get() | bytes).is_multiple_of(SECTOR_SIZE),
            "{bytes} bytes at {offset:?} are no whole sectors"
        );
        let capacity = self.properties.capacity.get();
        assert!(
            bytes <= capacity && offset.get() <= capacity - bytes,
            "{bytes} bytes at {offset:?} end past the device's {capacity}"
        );
        self.complete(token);
    }

    fn complete(&mut self, token: Token) {
        assert!(self.ready.len() < self.depth, "more operations than the device's depth");
        self.ready.push(Completion { token, result: Ok(()) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::BufferPool;

    #[test]
    fn memory_keeps_what_was_written_across_segments() {
        let mut device = MemoryDevice::new(ByteCount::new(1 << 20), 2);
        let mut pool = BufferPool::new(2, 4096);
        let (mut source, target) = (pool.take().unwrap(), pool.take().unwrap());
        pool.bytes_mut(&mut source)[..512].fill(1);
        pool.bytes_mut(&mut source)[512..1024].fill(2);
        let segment = pool.lend(&source);
        let both = [segment.part(512, 512), segment.part(0, 512)];
        device.write(Token(1), ByteOffset::new(1024), &both);
        let segment = pool.lend(&target);
        device.read(Token(2), ByteOffset::new(1024), &[segment.part(0, 1024)]);
        let mut completions = vec![];
        device.reap(&mut completions);
        let tokens: Vec<Token> = completions.iter().map(|completion| completion.token).collect();
        assert_eq!(tokens, [Token(1), Token(2)]);
        pool.returned(&target);
        assert_eq!(pool.bytes(&target)[..512], [2; 512]);
        assert_eq!(pool.bytes(&target)[512..1024], [1; 512]);
    }

    #[test]
    fn null_completes_and_touches_nothing() {
        let mut device = NullDevice::new(ByteCount::new(1 << 20), 2);
        let mut pool = BufferPool::new(1, 4096);
        let mut buffer = pool.take().unwrap();
        pool.bytes_mut(&mut buffer).fill(7);
        let segment = pool.lend(&buffer);
        device.read(Token(1), ByteOffset::new(0), &[segment]);
        device.flush(Token(2));
        let mut completions = vec![];
        device.reap(&mut completions);
        assert_eq!(completions.len(), 2);
        pool.returned(&buffer);
        assert_eq!(pool.bytes(&buffer), [7; 4096]);
    }

    #[test]
    #[should_panic(expected = "more operations than the device's depth")]
    fn more_operations_than_the_depth_are_our_bug() {
        let mut device = NullDevice::new(ByteCount::new(1 << 20), 1);
        device.flush(Token(1));
        device.flush(Token(2));
    }

    #[test]
    #[should_panic(expected = "end past the device")]
    fn an_operation_past_the_end_is_our_bug() {
        let mut device = MemoryDevice::new(ByteCount::new(4096), 1);
        let mut pool = BufferPool::new(1, 4096);
        let buffer = pool.take().unwrap();
        let segment = pool.lend(&buffer);
        device.read(Token(1), ByteOffset::new(512), &[segment]);
    }
}
