//! A file or block device, driven by polling: io_uring where it is the fastest, plain system calls or
//! copies where these are (see [`Engine`]). It also is where a reactor sleeps, in the same ring.
//!
//! This file may contain `unsafe`: the kernel reads and writes memory named in the ring's entries,
//! and no type can follow it there. The argument rests on three things. Memory for data comes as
//! [`Segment`]s, whose maker promised to keep it until the completion is reaped. Tables of pieces
//! live in `slots`, which is allocated once, never moves, and gives a slot away again only when the
//! kernel's answer for it was seen. And dropping the device waits for every operation.
//!
//! Hot path: `read`, `write`, `flush`, `submit`, `reap`. They allocate nothing; [`BATCH`] operations
//! share a system call, and a turn that queued nothing makes none unless the kernel asks for one, or
//! something must be polled for.
//!
//! A device that can be polled has a second ring, for reads and writes ([`OpenOptions::poll`]). It says
//! nothing by itself, and nobody can sleep in it: [`Device::submit`] asks while anything is in flight
//! there, once a turn, and [`FileDevice::wait`] comes back at once. Flushes cannot be polled for, and take
//! the plain ring, as does what is more than the device's queue holds.
//!
//! A device may be opened on any thread; the first that registers memory, hands operations over or
//! waits owns it from then on (`IORING_SETUP_SINGLE_ISSUER`; the ring is enabled at that moment).

use std::fs::File;
use std::os::fd::{AsFd, RawFd};
use std::path::Path;
use std::time::Duration;

use io_uring::types::FsyncFlags;
use io_uring::{opcode, squeue};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

pub use super::file::{Engine, OpenError, OpenOptions};
use super::mapped::Mapped;
pub use super::ring::BUFFERS_MAX;
use super::ring::{FILE, Ring};
pub use super::watch::{WATCHES_MAX, WatchId};
use super::watch::{WatchKey, Watches};
use super::{Completion, Device, DeviceError, DeviceProperties, SEGMENTS_MAX, Token, file};
use crate::buffer::Segment;
use crate::sys::{self, IoVec};
use crate::units::ByteOffset;

/// Most operations in flight that a device can be opened for: they and a poll for each watch fit
/// the kernel's largest submission ring, 32768.
pub const DEPTH_MAX: u32 = 16384;

/// Largest region the kernel takes as one registered buffer.
pub const BUFFER_BYTES_MAX: usize = 1 << 30;

/// Operations handed to the kernel together. What is over at the end of a turn goes as it is.
///
/// Holding all of them back until then saves system calls and starves the device: it completes a
/// batch, waits while we prepare the next, and so on in lockstep. Measured with 4 KiB requests on
/// ext4 and a virtio disk (2 virtual cores, Linux 6.18; medians of 7 runs of 2 s, in turns):
///
/// | thousand a second     | all at once | 8    | 4    | 2    |
/// | --------------------- | ----------- | ---- | ---- | ---- |
/// | writes at depth 32    | 119         | 139  | 147  | 149  |
/// | reads at depth 32     | 95          | 106  | 106  | 110  |
/// | reads at depth 8      | 66          | –    | 70   | 70   |
/// | writes at depth 128   | 176         | 175  | 177  | –    |
const BATCH: usize = 4;

/// Times an operation is asked again after `EAGAIN` or `EINTR` before that counts as its result.
/// The kernel waits by itself; a device that still says so this often will not stop.
const RETRIES_MAX: u16 = 1000;

/// What a completion in the ring is about: the top byte of `user_data`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Subject {
    /// The operation in this slot.
    Slot(u32),
    /// A watched file descriptor became readable, or was taken off.
    Watch(WatchKey),
    /// Nobody waits for it.
    Nobody,
}

const SUBJECT_SLOT: u64 = 0;
const SUBJECT_WATCH: u64 = 1;
const SUBJECT_NOBODY: u64 = 2;

impl Subject {
    fn to_user_data(self) -> u64 {
        match self {
            Self::Slot(index) => SUBJECT_SLOT << 56 | u64::from(index),
            Self::Watch(key) => SUBJECT_WATCH << 56 | key.to_bits(),
            Self::Nobody => SUBJECT_NOBODY << 56,
        }
    }

    fn from_user_data(user_data: u64) -> Self {
        let rest = user_data & ((1 << 56) - 1);
        match user_data >> 56 {
            SUBJECT_SLOT => Self::Slot(rest as u32),
            SUBJECT_WATCH => Self::Watch(WatchKey::from_bits(rest)),
            SUBJECT_NOBODY => Self::Nobody,
            other => panic!("completion of an unknown kind {other}"),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verb {
    Read,
    Write,
    Flush,
}

/// An operation, with everything the kernel may look at until it is done.
#[derive(Debug)]
struct Slot {
    token: Token,
    verb: Verb,
    /// Where the rest of it starts on the device.
    offset: u64,
    /// Bytes still to do.
    remaining: usize,
    /// The pieces not yet done are `pieces[first..count]`.
    first: usize,
    count: usize,
    /// The registered buffer that holds the only piece.
    registration: Option<u32>,
    retries: u16,
    pieces: [IoVec; SEGMENTS_MAX],
}

impl Slot {
    const EMPTY: Self = Self {
        token: Token(0),
        verb: Verb::Flush,
        offset: 0,
        remaining: 0,
        first: 0,
        count: 0,
        registration: None,
        retries: 0,
        pieces: [IoVec::EMPTY; SEGMENTS_MAX],
    };

    fn fill(&mut self, token: Token, verb: Verb, offset: u64, segments: &[Segment]) {
        self.token = token;
        self.verb = verb;
        self.offset = offset;
        self.remaining = 0;
        self.first = 0;
        self.count = segments.len();
        self.retries = 0;
        self.registration = match segments {
            [only] => only.registration(),
            _ => None,
        };
        for (piece, segment) in self.pieces.iter_mut().zip(segments) {
            *piece = IoVec::from(segment);
            self.remaining += segment.len();
        }
    }

    fn pieces(&self) -> &[IoVec] {
        &self.pieces[self.first..self.count]
    }

    /// Takes `bytes` off the front.
    fn advance(&mut self, bytes: usize) {
        self.offset += bytes as u64;
        self.remaining -= bytes;
        let mut left = bytes;
        while left > 0 {
            let piece = &mut self.pieces[self.first];
            let step = left.min(piece.len());
            piece.advance(step);
            left -= step;
            if piece.len() == 0 {
                self.first += 1;
            }
        }
    }

    /// Digests an answer of the kernel: a count of bytes, or an error number.
    ///
    /// `None` when there is more to do and it is worth asking again.
    fn answered(&mut self, answer: Result<usize, i32>, alignment: u32) -> Option<Outcome> {
        let bytes = match answer {
            Ok(bytes) => bytes,
            Err(libc::EAGAIN | libc::EINTR) if self.retries < RETRIES_MAX => {
                self.retries += 1;
                return None;
            }
            Err(error) => return Some(Err(DeviceError::Os(error))),
        };
        if self.verb == Verb::Flush {
            return Some(Ok(()));
        }
        assert!(bytes <= self.remaining, "the kernel moved {bytes} of {} bytes", self.remaining);
        if bytes == self.remaining {
            return Some(Ok(()));
        }
        // The end of a truncated file need not be aligned; direct I/O refuses to go on from there.
        let aligned = bytes - bytes % alignment as usize;
        if aligned == 0 {
            return Some(Err(DeviceError::EndOfDevice));
        }
        self.advance(aligned);
        None
    }

    /// The ring entry that asks for the rest of the operation.
    fn entry(&self) -> squeue::Entry {
        if self.verb == Verb::Flush {
            return opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build();
        }
        let pieces = self.pieces();
        let piece = pieces[0];
        let (address, length) = (piece.as_mut_ptr(), piece.len() as u32);
        let (vector, count) = (sys::as_iovecs(pieces), pieces.len() as u32);
        match (self.verb, self.registration) {
            (Verb::Read, Some(buffer)) => {
                opcode::ReadFixed::new(FILE, address, length, buffer as u16)
                    .offset(self.offset)
                    .build()
            }
            (Verb::Write, Some(buffer)) => {
                opcode::WriteFixed::new(FILE, address, length, buffer as u16)
                    .offset(self.offset)
                    .build()
            }
            (Verb::Read, None) if count == 1 => {
                opcode::Read::new(FILE, address, length).offset(self.offset).build()
            }
            (Verb::Write, None) if count == 1 => {
                opcode::Write::new(FILE, address, length).offset(self.offset).build()
            }
            (Verb::Read, None) => {
                opcode::Readv::new(FILE, vector, count).offset(self.offset).build()
            }
            (Verb::Write, None) => {
                opcode::Writev::new(FILE, vector, count).offset(self.offset).build()
            }
            (Verb::Flush, _) => unreachable!("returned above"),
        }
    }
}

type Outcome = Result<(), DeviceError>;

/// An open file or block device with its ring.
///
/// Invariants: a slot is either in `free` or known to the kernel (or being filled by a method);
/// `ready` and the slots in use together never exceed the depth; nothing is allocated after `open`
/// but by `register_buffer`.
#[derive(Debug)]
pub struct FileDevice {
    ring: Ring,
    /// For reads and writes, where the device can be polled.
    polled: Option<Polled>,
    file: File,
    properties: DeviceProperties,
    engine: Engine,
    /// With [`Engine::Mapped`].
    mapped: Option<Mapped>,
    /// See [`OpenOptions::drops`].
    drops: Option<fn(Token) -> bool>,
    /// Slots whose copies are to be made, with [`Engine::Mapped`].
    lined_up: Vec<u32>,
    slots: Box<[Slot]>,
    free: Vec<u32>,
    /// Operations that have ended and were not reaped yet.
    ready: Vec<Completion>,
    reaped: u64,
    /// Answers read from the ring in one go, before any is acted on.
    answers: Vec<(u64, i32)>,
    watches: Watches,
    /// Watches that fired since the last look.
    fired: Vec<WatchId>,
    /// Free numbers of the table of registered buffers; empty when there is no table.
    buffers_free: Vec<u32>,
    registration_warned: bool,
}

/// The ring of a device that is polled.
#[derive(Debug)]
struct Polled {
    ring: Ring,
    /// Operations that the kernel has or is about to get there.
    in_flight: usize,
    /// Most that the device's queue holds, if nobody else uses it: more would wait in threads of the
    /// kernel's, which spin.
    room: usize,
    /// Answers that were found there.
    found: u64,
    /// The device has said that it cannot be polled any more: no operation is put there again.
    refused: bool,
}

impl FileDevice {
    /// Opens a block device or file and finds out what it can do.
    ///
    /// # Panics
    /// When the depth is not 1 to [`DEPTH_MAX`].
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, OpenError> {
        let depth = options.depth;
        assert!((1..=DEPTH_MAX).contains(&depth), "a depth of {depth} is not 1 to {DEPTH_MAX}");
        let opened = file::open(path, options)?;
        let ring = Ring::new(&opened.file, depth).map_err(OpenError::ring)?;
        let polled = opened.polled.and_then(|room| {
            let polled = Polled::new(&opened.file, depth, room);
            polled
                .inspect_err(|error| tracing::warn!(%error, "no ring to poll the device with"))
                .ok()
        });
        let buffers_free = match opened.engine {
            Engine::Uring => polled.as_ref().map_or(&ring, |it| &it.ring).make_buffer_table(),
            _ => vec![],
        };
        let mapped = match opened.engine {
            Engine::Mapped => {
                let bytes = opened.properties.capacity.get();
                let mapped = Mapped::new(&opened.file, bytes, !options.read_only);
                let path = path.to_path_buf();
                Some(mapped.map_err(|source| OpenError::Map { path, bytes, source })?)
            }
            _ => None,
        };
        let answers_max = ring.answers_max();
        tracing::debug!(path = %path.display(), engine = ?opened.engine, polled = polled.is_some(),
            properties = ?opened.properties, "device opened");
        Ok(Self {
            ring,
            polled,
            file: opened.file,
            properties: opened.properties,
            engine: opened.engine,
            mapped,
            drops: options.drops,
            lined_up: Vec::with_capacity(depth as usize),
            slots: (0..depth).map(|_| Slot::EMPTY).collect(),
            free: (0..depth).rev().collect(),
            ready: Vec::with_capacity(depth as usize),
            reaped: 0,
            answers: Vec::with_capacity(answers_max),
            watches: Watches::new(),
            fired: Vec::with_capacity(WATCHES_MAX),
            buffers_free,
            registration_warned: false,
        })
    }

    /// The engine at work, never [`Engine::Auto`].
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// The device is asked for completions of reads and writes, and does not interrupt for them.
    pub fn is_polled(&self) -> bool {
        self.polled.as_ref().is_some_and(|polled| !polled.refused)
    }

    /// Reads and writes, or parts of them, whose completions were polled for.
    pub fn polled(&self) -> u64 {
        self.polled.as_ref().map_or(0, |polled| polled.found)
    }

    /// Something is in flight that the device will not announce: only turns find out when it is done.
    pub fn must_be_polled(&self) -> bool {
        self.polled.as_ref().is_some_and(|polled| polled.in_flight > 0)
    }

    /// Most operations in flight.
    pub fn depth(&self) -> usize {
        self.slots.len()
    }

    /// Operations that were reaped since the device was opened.
    pub fn reaped(&self) -> u64 {
        self.reaped
    }

    /// Operations queued or in flight, or completed and not yet reaped.
    pub fn in_flight(&self) -> usize {
        self.in_kernel() + self.ready.len()
    }

    /// Pins a region of memory, so that operations within it need not be mapped one by one.
    ///
    /// Returns the number for [`Segment::with_registration`], or `None` when operations must go
    /// without: regions over [`BUFFER_BYTES_MAX`] (the caller splits them), an engine that does not use
    /// the ring, a full table, or a limit of the system (one warning is logged).
    pub fn register_buffer(&mut self, region: &Segment) -> Option<u32> {
        if region.len() > BUFFER_BYTES_MAX {
            tracing::debug!(bytes = region.len(), "too large for one registered buffer");
            return None;
        }
        if self.polled.as_ref().is_some_and(|polled| polled.refused) {
            return None; // Its table is that of a ring that nothing goes through any more.
        }
        let index = self.buffers_free.pop()?;
        let registered = self.data_ring().set_buffer(index, Some(region));
        let Err(error) = registered else { return Some(index) };
        self.buffers_free.push(index);
        if !self.registration_warned {
            self.registration_warned = true;
            tracing::warn!(
                %error,
                bytes = region.len(),
                "cannot register memory for I/O, going on without; likely cause: RLIMIT_MEMLOCK"
            );
        }
        None
    }

    /// Gives back what [`FileDevice::register_buffer`] returned. Operations in flight keep it.
    ///
    /// # Panics
    /// When `index` is not registered.
    pub fn unregister_buffer(&mut self, index: u32) {
        assert!(
            index < BUFFERS_MAX && !self.buffers_free.contains(&index),
            "buffer {index} is not registered"
        );
        let removed = self.data_ring().set_buffer(index, None);
        match removed {
            Ok(()) => self.buffers_free.push(index),
            // The number is lost to us, the memory stays pinned; correct, if wasteful.
            Err(error) => tracing::warn!(%error, index, "cannot unregister memory for I/O"),
        }
    }

    /// Watches `fd` from the next [`FileDevice::wait`] on, until [`FileDevice::unwatch`].
    ///
    /// The watch is on what is readable, not on what has changed: whoever owns the descriptor reads
    /// it when it has fired, or no wait sleeps again. The descriptor stays open until `unwatch`.
    ///
    /// # Panics
    /// When `watch` is [`WATCHES_MAX`] or more, or taken.
    pub fn watch(&mut self, fd: RawFd, watch: WatchId) {
        self.watches.add(fd, watch);
    }

    /// Ends a watch: it never fires again.
    ///
    /// # Panics
    /// When there is no such watch.
    pub fn unwatch(&mut self, watch: WatchId) {
        self.fired.retain(|fired| *fired != watch);
        let Some(key) = self.watches.remove(watch) else { return };
        // At once, since the kernel's poll keeps the descriptor's file alive.
        let target = Subject::Watch(key).to_user_data();
        self.push_about_watch(opcode::PollRemove::new(target).build(), Subject::Nobody);
        self.ring.enter(0);
        self.collect();
    }

    /// Sleeps until a watched descriptor is readable, an operation has completed, or `timeout` has
    /// passed (`None`: never). Appends the watches that fired to `woken`.
    ///
    /// True when there are completions to reap. May also return without a cause; callers look at
    /// what there is to do and come back. Returns at once while anything must be polled for.
    pub fn wait(&mut self, timeout: Option<Duration>, woken: &mut Vec<WatchId>) -> bool {
        self.submit();
        // Watches that fired while we polled are stale: the kernel is asked anew below.
        self.collect();
        self.fired.clear();
        while let Some((key, fd)) = self.watches.next_to_arm() {
            let poll = opcode::PollAdd::new(io_uring::types::Fd(fd), libc::POLLIN as u32).build();
            self.push_about_watch(poll, Subject::Watch(key));
        }
        if self.ready.is_empty() && !self.must_be_polled() {
            self.ring.sleep(timeout);
        } else {
            self.ring.enter(0);
        }
        self.collect();
        woken.append(&mut self.fired);
        !self.ready.is_empty()
    }

    /// Operations the kernel has or is about to get.
    fn in_kernel(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The ring of reads and writes, and so of registered buffers.
    fn data_ring(&mut self) -> &mut Ring {
        self.polled.as_mut().map_or(&mut self.ring, |polled| &mut polled.ring)
    }

    /// Has the kernel do what is left of the operation in a slot. The ring, when a batch is together in it.
    fn push(&mut self, index: u32) -> Option<&mut Ring> {
        let slot = &mut self.slots[index as usize];
        let ring = match &mut self.polled {
            Some(polled) if slot.verb != Verb::Flush && polled.has_room() => {
                polled.in_flight += 1;
                &mut polled.ring
            }
            Some(_) => {
                slot.registration = None; // Its number is of the other ring.
                &mut self.ring
            }
            None => &mut self.ring,
        };
        let entry = slot.entry();
        // SAFETY: the entry names memory of the data, kept by the promise of `Segment::new`, or its slot's
        // table, which stays as it is until the answer is seen.
        unsafe { ring.push(entry, Subject::Slot(index).to_user_data()) };
        (ring.queued() >= BATCH).then_some(ring)
    }

    fn push_about_watch(&mut self, entry: squeue::Entry, subject: Subject) {
        // SAFETY: entries about watches name no memory.
        unsafe { self.ring.push(entry, subject.to_user_data()) };
    }

    /// Reads the rings' answers, then acts on them: operations end up in `ready` or go on, watches
    /// in `fired`.
    fn collect(&mut self) {
        let mut answers = std::mem::take(&mut self.answers);
        if let Some(polled) = &mut self.polled
            && polled.in_flight > 0
        {
            polled.ring.take_answers(&mut answers);
            polled.in_flight -= answers.len();
            // A queue that was taken away, or a device that was put in the place of another one.
            let refusal = -libc::EOPNOTSUPP;
            let refused = answers.iter().filter(|(_, result)| *result == refusal).count();
            polled.found += (answers.len() - refused) as u64;
            if refused > 0 && !std::mem::replace(&mut polled.refused, true) {
                tracing::warn!(
                    "the device cannot be polled any more: waiting for its interrupts, and without \
                     registered memory, until the next start"
                );
            }
            self.act_on(&mut answers, refusal);
        }
        self.ring.take_answers(&mut answers);
        self.act_on(&mut answers, 0);
        self.answers = answers;
    }

    /// Acts on answers. Operations whose answer is `again` (0 for none) are to be done anew.
    fn act_on(&mut self, answers: &mut Vec<(u64, i32)>, again: i32) {
        for (user_data, result) in answers.drain(..) {
            match Subject::from_user_data(user_data) {
                Subject::Slot(index) if again != 0 && result == again => {
                    self.push(index);
                }
                Subject::Slot(index) => self.slot_answered(index, result),
                Subject::Watch(key) => {
                    if let Some(watch) = self.watches.answered(key) {
                        self.fired.push(watch);
                    }
                }
                Subject::Nobody => {}
            }
        }
    }

    fn slot_answered(&mut self, index: u32, result: i32) {
        let answer = if result < 0 { Err(-result) } else { Ok(result as usize) };
        let slot = &mut self.slots[index as usize];
        match slot.answered(answer, self.properties.offset_alignment) {
            Some(result) => {
                self.ready.push(Completion { token: slot.token, result });
                self.free.push(index);
            }
            None => {
                self.push(index);
            }
        }
    }

    /// Checks the contract of [`Device`] for a read or write.
    fn check(&self, offset: ByteOffset, segments: &[Segment]) {
        let properties = &self.properties;
        assert!(
            !segments.is_empty() && segments.len() <= SEGMENTS_MAX,
            "{} segments in one operation",
            segments.len()
        );
        let mut bytes = 0;
        for segment in segments {
            assert!(
                !segment.is_empty() && segment.is_aligned(properties.memory_alignment as usize),
                "segment {segment:?} breaks the alignment of {}",
                properties.memory_alignment
            );
            bytes += segment.len() as u64;
        }
        let mask = u64::from(properties.offset_alignment) - 1;
        assert!(
            (offset.get() | bytes) & mask == 0,
            "{bytes} bytes at {offset:?} break the alignment of {}",
            properties.offset_alignment
        );
        let capacity = properties.capacity.get();
        assert!(
            bytes <= capacity && offset.get() <= capacity - bytes,
            "{bytes} bytes at {offset:?} end past the device's {capacity}"
        );
    }

    fn start_unless_dropped(
        &mut self,
        token: Token,
        verb: Verb,
        offset: ByteOffset,
        segments: &[Segment],
    ) {
        if self.drops.is_some_and(|drops| drops(token)) {
            assert!(self.in_flight() < self.slots.len(), "more operations than the device's depth");
            return self.ready.push(Completion { token, result: Ok(()) });
        }
        self.start(token, verb, offset.get(), segments);
    }

    /// Starts an operation whose arguments are checked.
    fn start(&mut self, token: Token, verb: Verb, offset: u64, segments: &[Segment]) {
        assert!(self.in_flight() < self.slots.len(), "more operations than the device's depth");
        let index = self.free.pop().expect("fewer operations than slots, by the line above");
        let slot = &mut self.slots[index as usize];
        slot.fill(token, verb, offset, segments);
        match self.engine {
            Engine::Uring => {
                if let Some(ring) = self.push(index) {
                    ring.hand_over();
                }
            }
            Engine::Mapped => self.lined_up.push(index),
            Engine::Inline | Engine::Auto => {
                let alignment = self.properties.offset_alignment;
                let result = run_inline(&self.file, slot, alignment);
                self.ready.push(Completion { token, result });
                self.free.push(index);
            }
        }
    }

    /// Makes the copies of a turn. While one is made, the memory of the next is on its way to the cache:
    /// 4 KiB at random places of 1 GiB took 525 ns so and 754 ns one by one (means of a million; virtual
    /// cores, 4 KiB pages).
    fn copy_all(&mut self) {
        let mapped = self.mapped.as_ref().expect("operations line up only for copies");
        for (nth, index) in self.lined_up.iter().enumerate() {
            if let Some(next) = self.lined_up.get(nth + 1) {
                let next = &self.slots[*next as usize];
                mapped.expect(next.offset, next.pieces());
            }
            let slot = &self.slots[*index as usize];
            self.ready.push(Completion { token: slot.token, result: run_mapped(mapped, slot) });
            self.free.push(*index);
        }
        self.lined_up.clear();
    }
}

impl Device for FileDevice {
    fn properties(&self) -> DeviceProperties {
        self.properties
    }

    fn read(&mut self, token: Token, offset: ByteOffset, segments: &[Segment]) {
        self.check(offset, segments);
        self.start_unless_dropped(token, Verb::Read, offset, segments);
    }

    fn write(&mut self, token: Token, offset: ByteOffset, segments: &[Segment]) {
        self.check(offset, segments);
        self.start_unless_dropped(token, Verb::Write, offset, segments);
    }

    fn flush(&mut self, token: Token) {
        if self.properties.volatile_cache {
            return self.start(token, Verb::Flush, 0, &[]);
        }
        // What has completed is as safe as it will get.
        assert!(self.in_flight() < self.slots.len(), "more operations than the device's depth");
        self.ready.push(Completion { token, result: Ok(()) });
    }

    fn submit(&mut self) -> bool {
        if !self.lined_up.is_empty() {
            self.copy_all();
        }
        if self.ring.queued() > 0 {
            self.ring.enter(0);
        }
        if let Some(polled) = &mut self.polled
            && polled.in_flight > 0
        {
            polled.ring.enter(0);
            self.collect();
        }
        !self.ready.is_empty()
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        if self.in_kernel() > 0 {
            self.collect();
            // Looking costs a few loads. The kernel is entered only if it says that it has put
            // completions off until we do, or if the rest of a short operation was queued.
            if self.ready.is_empty() && (self.ring.queued() > 0 || self.ring.is_due()) {
                self.ring.enter(0);
                self.collect();
            }
        }
        self.reaped += self.ready.len() as u64;
        completions.append(&mut self.ready);
    }

    fn refresh(&mut self) {
        // Pages of a buffered file that a failed flush had in hand count as clean and are newer than
        // the device. Those that are dirty stay. After direct I/O there are none.
        let whole = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        if let Err(error) = posix_fadvise(&self.file, 0, 0, whole) {
            tracing::warn!(%error, "cannot drop what the page cache holds of the device");
        }
    }
}

impl Drop for FileDevice {
    /// Waits for every operation: the kernel may write to memory until it says that it is done.
    fn drop(&mut self) {
        self.submit();
        while self.in_kernel() > 0 {
            match &mut self.polled {
                Some(polled) if polled.in_flight > 0 => {
                    polled.ring.enter(0);
                    std::thread::yield_now();
                }
                _ => self.ring.enter(1),
            }
            self.collect();
        }
    }
}

impl Polled {
    fn new(file: &File, depth: u32, room: usize) -> std::io::Result<Self> {
        Ok(Self { ring: Ring::polled(file, depth)?, in_flight: 0, room, found: 0, refused: false })
    }

    fn has_room(&self) -> bool {
        self.in_flight < self.room && !self.refused
    }
}

/// Carries out an operation by copying.
fn run_mapped(mapped: &Mapped, slot: &Slot) -> Outcome {
    match slot.verb {
        Verb::Read => mapped.read(slot.offset, slot.pieces()),
        Verb::Write if mapped.is_writable() => mapped.write(slot.offset, slot.pieces()),
        Verb::Write => return Err(DeviceError::Os(libc::EBADF)),
        Verb::Flush => {}
    }
    Ok(())
}

/// Carries out an operation with system calls.
fn run_inline(file: &File, slot: &mut Slot, alignment: u32) -> Outcome {
    loop {
        let answer = match slot.verb {
            Verb::Read => sys::read_at(file.as_fd(), slot.pieces(), slot.offset),
            Verb::Write => sys::write_at(file.as_fd(), slot.pieces(), slot.offset),
            Verb::Flush => file.sync_data().map(|()| 0),
        };
        let answer = answer.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO));
        if let Some(outcome) = slot.answered(answer, alignment) {
            return outcome;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::{Buffer, BufferPool};
    use nix::sys::eventfd::EventFd;
    use std::os::fd::AsRawFd;
    use std::path::PathBuf;

    const CAPACITY: u64 = 4 << 20;
    const BLOCK: usize = 4096;

    /// A file that is gone when the test ends.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(directory: &Path, name: &str) -> Self {
            let path = directory.join(format!("bessel-{name}-{}", std::process::id()));
            File::create(&path).unwrap().set_len(CAPACITY).unwrap();
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            std::fs::remove_file(&self.0).unwrap();
        }
    }

    fn open(scratch: &Scratch, engine: Engine, depth: u32) -> FileDevice {
        let options = OpenOptions { depth, engine, ..OpenOptions::default() };
        FileDevice::open(&scratch.0, &options).unwrap()
    }

    /// A device that is polled, whether it can be or not: most cannot, and say so with the first answer.
    fn open_to_be_polled(scratch: &Scratch, depth: u32) -> FileDevice {
        let mut device = open(scratch, Engine::Uring, depth);
        let polled = Polled::new(&device.file, depth, (depth as usize / 2).max(1)).unwrap();
        device.buffers_free = polled.ring.make_buffer_table();
        device.polled = Some(polled);
        device
    }

    /// A device of each engine: on the temporary directory's disk, and in memory.
    fn each_engine(name: &str, depth: u32, test: impl Fn(FileDevice, &Scratch)) {
        let disk = Scratch::new(&std::env::temp_dir(), name);
        test(open(&disk, Engine::Uring, depth), &disk);
        test(open_to_be_polled(&disk, depth), &disk);
        test(open(&disk, Engine::Inline, depth), &disk);
        let memory = Scratch::new(Path::new("/dev/shm"), name);
        test(open(&memory, Engine::Auto, depth), &memory);
        test(open(&memory, Engine::Uring, depth), &memory);
    }

    /// Submits and reaps until nothing is in flight.
    fn finish(device: &mut FileDevice) -> Vec<Completion> {
        let mut completions = vec![];
        while device.in_flight() > 0 {
            device.submit();
            device.reap(&mut completions);
        }
        completions
    }

    fn finish_one(device: &mut FileDevice) -> Result<(), DeviceError> {
        let completions = finish(device);
        assert_eq!(completions.len(), 1);
        completions[0].result
    }

    fn filled(pool: &mut BufferPool, byte: u8) -> Buffer {
        let mut buffer = pool.take().unwrap();
        pool.bytes_mut(&mut buffer).fill(byte);
        buffer
    }

    #[test]
    fn what_is_written_is_read_back_at_full_depth() {
        each_engine("depth", 64, |mut device, _| {
            let mut pool = BufferPool::new(64, BLOCK);
            let buffers: Vec<Buffer> = (0..64).map(|byte| filled(&mut pool, byte)).collect();
            for (index, buffer) in buffers.iter().enumerate() {
                let segment = pool.lend(buffer);
                let at = ByteOffset::new((index * BLOCK) as u64);
                device.write(Token(index as u64), at, &[segment]);
            }
            let mut tokens: Vec<u64> = finish(&mut device)
                .iter()
                .inspect(|completion| assert_eq!(completion.result, Ok(())))
                .map(|completion| completion.token.0)
                .collect();
            tokens.sort_unstable();
            assert_eq!(tokens, (0..64).collect::<Vec<u64>>());

            // Read back in the opposite order: buffer i gets block 63 - i.
            for (index, buffer) in buffers.iter().enumerate() {
                pool.returned(buffer);
                let segment = pool.lend(buffer);
                device.read(Token(0), ByteOffset::new(((63 - index) * BLOCK) as u64), &[segment]);
            }
            assert!(finish(&mut device).iter().all(|completion| completion.result.is_ok()));
            for (index, buffer) in buffers.iter().enumerate() {
                pool.returned(buffer);
                assert_eq!(pool.bytes(buffer), [63 - index as u8; BLOCK]);
            }
        });
    }

    #[test]
    fn segments_lie_one_after_the_other_on_the_device() {
        each_engine("segments", 4, |mut device, _| {
            let mut pool = BufferPool::new(4, BLOCK);
            let first = filled(&mut pool, 1);
            let second = filled(&mut pool, 2);
            let segments = [pool.lend(&first), pool.lend(&second)];
            device.write(Token(1), ByteOffset::new(8192), &segments);
            assert_eq!(finish_one(&mut device), Ok(()));
            let target = filled(&mut pool, 0);
            let segment = pool.lend(&target);
            device.read(Token(2), ByteOffset::new(8192 + 4096), &[segment]);
            assert_eq!(finish_one(&mut device), Ok(()));
            pool.returned(&target);
            assert_eq!(pool.bytes(&target), [2; BLOCK]);
        });
    }

    #[test]
    fn memory_as_badly_aligned_as_allowed_will_do() {
        each_engine("aligned", 4, |mut device, _| {
            let alignment = device.properties().memory_alignment as usize;
            let mut pool = BufferPool::new(2, 2 * BLOCK);
            let (source, target) = (filled(&mut pool, 3), filled(&mut pool, 0));
            for (token, buffer) in [(1, &source), (2, &target)] {
                let whole = pool.lend(buffer).part(alignment, BLOCK);
                let split = BLOCK - alignment.min(BLOCK / 2);
                let segments = [whole.part(0, split), whole.part(split, BLOCK - split)];
                match token {
                    1 => device.write(Token(token), ByteOffset::new(0), &segments),
                    _ => device.read(Token(token), ByteOffset::new(0), &segments),
                }
                assert_eq!(finish_one(&mut device), Ok(()), "{:?}", device.properties());
            }
            pool.returned(&target);
            assert_eq!(pool.bytes(&target)[alignment..alignment + BLOCK], [3; BLOCK]);
        });
    }

    #[test]
    fn registered_memory_carries_the_same_bytes() {
        let scratch = Scratch::new(&std::env::temp_dir(), "registered");
        let mut device = open(&scratch, Engine::Uring, 4);
        let mut pool = BufferPool::new(2, BLOCK);
        let registration = device.register_buffer(&pool.whole()).unwrap();
        pool.set_registration(registration);
        let source = filled(&mut pool, 9);
        let segment = pool.lend(&source);
        assert_eq!(segment.registration(), Some(registration));
        device.write(Token(1), ByteOffset::new(0), &[segment]);
        assert_eq!(finish_one(&mut device), Ok(()));
        let target = filled(&mut pool, 0);
        let segment = pool.lend(&target);
        device.read(Token(2), ByteOffset::new(0), &[segment]);
        assert_eq!(finish_one(&mut device), Ok(()));
        pool.returned(&target);
        assert_eq!(pool.bytes(&target), [9; BLOCK]);

        device.unregister_buffer(registration);
        pool.returned(&source);
        let segment = pool.lend(&source);
        device.read(Token(3), ByteOffset::new(0), &[segment]);
        assert_eq!(finish_one(&mut device), Err(DeviceError::Os(libc::EFAULT)));
    }

    #[test]
    fn a_dropped_device_finishes_what_it_was_given() {
        each_engine("dropped", 32, |mut device, scratch| {
            let mut pool = BufferPool::new(32, BLOCK);
            let buffers: Vec<Buffer> = (1..=32).map(|byte| filled(&mut pool, byte)).collect();
            for (index, buffer) in buffers.iter().enumerate() {
                let segment = pool.lend(buffer);
                device.write(Token(0), ByteOffset::new((index * BLOCK) as u64), &[segment]);
                if index == 15 {
                    device.submit();
                }
            }
            drop(device);
            drop(pool); // Would be the kernel's to read, were anything still in flight.
            let bytes = std::fs::read(&scratch.0).unwrap();
            for (index, block) in bytes.chunks(BLOCK).take(32).enumerate() {
                assert_eq!(block, [index as u8 + 1; BLOCK]);
            }
            File::create(&scratch.0).unwrap().set_len(CAPACITY).unwrap(); // For the next one.
        });
    }

    #[test]
    fn a_truncated_device_says_so_and_moves_nothing_twice() {
        each_engine("truncated", 4, |mut device, scratch| {
            let file = File::options().write(true).open(&scratch.0).unwrap();
            let mut pool = BufferPool::new(2, BLOCK);
            let buffers = [filled(&mut pool, 1), filled(&mut pool, 1)];
            for size in [4096, 4096 + 1000, 0] {
                file.set_len(size).unwrap();
                let segments = [pool.lend(&buffers[0]), pool.lend(&buffers[1])];
                device.read(Token(1), ByteOffset::new(0), &segments);
                assert_eq!(finish_one(&mut device), Err(DeviceError::EndOfDevice), "{size}");
                pool.returned(&buffers[0]);
                pool.returned(&buffers[1]);
            }
            file.set_len(CAPACITY).unwrap();
        });
    }

    #[test]
    fn a_flush_completes_and_only_a_volatile_cache_needs_it() {
        each_engine("flush", 4, |mut device, scratch| {
            let in_memory = scratch.0.starts_with("/dev/shm");
            assert_eq!(device.properties().volatile_cache, !in_memory);
            device.flush(Token(5));
            assert_eq!(finish(&mut device), [Completion { token: Token(5), result: Ok(()) }]);
        });
    }

    #[test]
    fn a_device_that_refuses_to_be_polled_is_waited_for_and_no_operation_is_lost() {
        let scratch = Scratch::new(Path::new("/dev/shm"), "refusing"); // Never can be.
        let mut device = open_to_be_polled(&scratch, 8);
        assert!(device.is_polled() && !device.must_be_polled());
        let mut pool = BufferPool::new(8, BLOCK);
        let buffers: Vec<Buffer> = (1..=8).map(|byte| filled(&mut pool, byte)).collect();
        let registration = device.register_buffer(&pool.whole()).unwrap();
        for (index, buffer) in buffers.iter().enumerate() {
            let segment = pool.lend(buffer).with_registration(registration);
            device.write(Token(index as u64), ByteOffset::new((index * BLOCK) as u64), &[segment]);
        }
        assert!(device.must_be_polled());
        let completions = finish(&mut device);
        assert!(completions.len() == 8 && completions.iter().all(|it| it.result.is_ok()));
        assert!(!device.is_polled() && !device.must_be_polled() && device.polled() == 0);

        buffers.iter().for_each(|buffer| pool.returned(buffer));
        let segment = pool.lend(&buffers[0]).with_registration(registration);
        device.read(Token(9), ByteOffset::new(7 * BLOCK as u64), &[segment]);
        let mut completions = vec![];
        while completions.is_empty() {
            device.wait(None, &mut vec![]);
            device.reap(&mut completions);
        }
        assert_eq!(completions, [Completion { token: Token(9), result: Ok(()) }]);
        pool.returned(&buffers[0]);
        assert_eq!(pool.bytes(&buffers[0]), [8; BLOCK]);
    }

    #[test]
    fn a_refused_write_is_the_systems_error() {
        let scratch = Scratch::new(&std::env::temp_dir(), "read-only");
        let options = OpenOptions {
            depth: 1,
            read_only: true,
            engine: Engine::Auto,
            ..OpenOptions::default()
        };
        let mut device = FileDevice::open(&scratch.0, &options).unwrap();
        let mut pool = BufferPool::new(1, BLOCK);
        let buffer = filled(&mut pool, 1);
        let segment = pool.lend(&buffer);
        device.write(Token(1), ByteOffset::new(0), &[segment]);
        assert_eq!(finish_one(&mut device), Err(DeviceError::Os(libc::EBADF)));
    }

    #[test]
    fn memory_files_are_done_inline_by_themselves() {
        let memory = Scratch::new(Path::new("/dev/shm"), "engine");
        assert_eq!(open(&memory, Engine::Auto, 1).engine(), Engine::Inline);
        assert_eq!(open(&memory, Engine::Auto, 1).properties().memory_alignment, 1);
    }

    #[test]
    fn sealed_memory_is_mapped_by_itself_and_all_who_open_it_see_the_same() {
        use nix::fcntl::{FcntlArg, SealFlag, fcntl};
        use nix::sys::memfd::{MFdFlags, memfd_create};
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = std::fs::File::from(memfd_create("sealed", flags).unwrap());
        file.set_len(8 * BLOCK as u64).unwrap();
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let open = |read_only| {
            let options =
                OpenOptions { depth: 4, read_only, engine: Engine::Auto, ..OpenOptions::default() };
            FileDevice::open(&path, &options).unwrap()
        };
        assert_eq!(open(false).engine(), Engine::Inline, "it may still be cut");
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
        let (mut one, mut other) = (open(false), open(true));
        assert_eq!((one.engine(), other.engine()), (Engine::Mapped, Engine::Mapped));
        assert_eq!(one.properties().capacity.get(), 8 * BLOCK as u64);

        let mut pool = BufferPool::new(2, 2 * BLOCK);
        let mut buffer = pool.take().unwrap();
        for (index, byte) in pool.bytes_mut(&mut buffer).iter_mut().enumerate() {
            *byte = (index % 251) as u8;
        }
        let whole = pool.lend(&buffer);
        let pieces = [whole.part(512, 1024), whole.part(4096, 512), whole.part(0, 512)];
        one.write(Token(1), ByteOffset::new(6 * BLOCK as u64 - 512), &pieces);
        one.flush(Token(2));
        assert!(finish(&mut one).iter().all(|it| it.result.is_ok()));

        let found = pool.take().unwrap();
        let segment = pool.lend(&found);
        other.read(Token(3), ByteOffset::new(6 * BLOCK as u64 - 512), &[segment.part(0, 2048)]);
        assert_eq!(finish_one(&mut other), Ok(()));
        pool.returned(&found);
        let mut found = found;
        let bytes = &pool.bytes_mut(&mut found)[..2048];
        let expected = (512..1536).chain(4096..4608).chain(0..512);
        assert!(bytes.iter().copied().eq(expected.map(|index: usize| (index % 251) as u8)));

        other.write(Token(4), ByteOffset::new(0), &[segment.part(0, 512)]);
        assert_eq!(finish_one(&mut other), Err(DeviceError::Os(libc::EBADF)));
    }

    #[test]
    fn a_short_answer_is_continued_where_it_ended() {
        let mut pool = BufferPool::new(3, BLOCK);
        let buffers: Vec<Buffer> = (0..3).map(|_| pool.take().unwrap()).collect();
        let segments: Vec<Segment> = buffers.iter().map(|buffer| pool.lend(buffer)).collect();
        let mut slot = Slot::EMPTY;
        slot.fill(Token(1), Verb::Read, 1 << 20, &segments);
        assert_eq!(slot.answered(Err(libc::EINTR), 512), None);
        // One and a half pieces, and a part of a sector that has to be read again.
        assert_eq!(slot.answered(Ok(BLOCK + 2048 + 100), 512), None);
        assert_eq!(slot.offset, (1 << 20) + 4096 + 2048);
        assert_eq!(slot.pieces().len(), 2);
        assert_eq!(slot.pieces()[0].as_mut_ptr(), segments[1].part(2048, 2048).as_ptr());
        assert_eq!(slot.answered(Ok(2048 + BLOCK), 512), Some(Ok(())));
    }

    /// Whatever the kernel's answers, what is asked next is what is left, from an aligned place on,
    /// and the operation is done when all of it is, and not before.
    #[test]
    fn any_sequence_of_short_answers_ends_where_it_should() {
        let mut random = crate::device::sim::Random::new(1);
        let mut pool = BufferPool::new(SEGMENTS_MAX, BLOCK);
        let buffers: Vec<Buffer> = (0..SEGMENTS_MAX).map(|_| pool.take().unwrap()).collect();
        let whole: Vec<Segment> = buffers.iter().map(|buffer| pool.lend(buffer)).collect();
        let (mut done, mut ended_early, mut failed) = (0, 0, 0);
        for _ in 0..20_000 {
            let alignment = *random.pick(&[1usize, 512, 4096]);
            let count = 1 + random.below(SEGMENTS_MAX as u64) as usize;
            let segments: Vec<Segment> = whole[..count]
                .iter()
                .map(|segment| {
                    let units = (BLOCK / alignment) as u64;
                    let length = alignment * (1 + random.below(units) as usize);
                    segment.part(BLOCK - length, length)
                })
                .collect();
            let total: usize = segments.iter().map(Segment::len).sum();
            let start = 4096 * random.below(1 << 40);
            let verb = *random.pick(&[Verb::Read, Verb::Write]);
            let mut slot = Slot::EMPTY;
            slot.fill(Token(1), verb, start, &segments);
            let mut through = 0;
            let mut asked_again = 0;
            let outcome = loop {
                // What is asked for next is the memory after `through` bytes, and no other.
                assert_eq!(
                    (slot.offset, slot.remaining),
                    (start + through as u64, total - through)
                );
                let mut skip = through;
                let mut left = segments.iter().filter_map(|segment| {
                    let cut = skip.min(segment.len());
                    skip -= cut;
                    let rest = segment.part(cut, segment.len() - cut);
                    (!rest.is_empty()).then(|| (rest.as_ptr(), rest.len()))
                });
                for piece in slot.pieces() {
                    assert_eq!(Some((piece.as_mut_ptr(), piece.len())), left.next());
                }
                assert_eq!(left.next(), None);
                let answer = match random.below(20) {
                    0 => Err(*random.pick(&[libc::EIO, libc::ENOSPC, libc::EFAULT])),
                    1..4 => Err(*random.pick(&[libc::EAGAIN, libc::EINTR])),
                    4..8 => Ok(slot.remaining),
                    8 => Ok(random.below(alignment as u64 + 1) as usize % (slot.remaining + 1)),
                    _ => Ok(random.below(slot.remaining as u64 + 1) as usize),
                };
                let outcome = slot.answered(answer, alignment as u32);
                let retry = matches!(answer, Err(libc::EAGAIN | libc::EINTR));
                match (answer, outcome) {
                    (Ok(bytes), None) => through += bytes - bytes % alignment,
                    (Err(_), None) if retry => asked_again += 1,
                    (Ok(bytes), Some(Ok(()))) => assert_eq!(through + bytes, total),
                    (Ok(bytes), Some(Err(DeviceError::EndOfDevice))) => {
                        assert!(bytes < alignment && bytes < total - through);
                    }
                    (Err(error), Some(Err(DeviceError::Os(told)))) => {
                        assert_eq!(error, told);
                        assert!(!retry || asked_again == RETRIES_MAX);
                    }
                    other => panic!("{other:?}"),
                }
                if let Some(outcome) = outcome {
                    break outcome;
                }
            };
            match outcome {
                Ok(()) => done += 1,
                Err(DeviceError::EndOfDevice) => ended_early += 1,
                Err(_) => failed += 1,
            }
        }
        assert!(
            done > 1000 && ended_early > 1000 && failed > 1000,
            "{done} {ended_early} {failed}"
        );
    }

    #[test]
    fn an_error_that_will_not_end_is_reported() {
        let mut slot = Slot::EMPTY;
        for _ in 0..RETRIES_MAX {
            assert_eq!(slot.answered(Err(libc::EAGAIN), 512), None);
        }
        assert_eq!(slot.answered(Err(libc::EAGAIN), 512), Some(Err(DeviceError::Os(libc::EAGAIN))));
    }

    #[test]
    fn a_wait_ends_for_what_is_readable_and_for_nothing_removed() {
        each_engine("watch", 4, |mut device, _| {
            let (one, two) = (EventFd::new().unwrap(), EventFd::new().unwrap());
            device.watch(one.as_raw_fd(), WatchId(0));
            device.watch(two.as_raw_fd(), WatchId(1023));
            let mut woken = vec![];
            device.wait(Some(Duration::ZERO), &mut woken);
            assert_eq!(woken, []);

            two.write(1).unwrap();
            device.wait(None, &mut woken);
            assert_eq!(woken, [WatchId(1023)]);
            // Nobody read it, so it is still readable.
            woken.clear();
            device.wait(None, &mut woken);
            assert_eq!(woken, [WatchId(1023)]);

            two.read().unwrap();
            one.write(1).unwrap();
            device.unwatch(WatchId(0));
            woken.clear();
            device.wait(Some(Duration::ZERO), &mut woken);
            assert_eq!(woken, []);

            device.watch(one.as_raw_fd(), WatchId(0));
            device.wait(None, &mut woken);
            assert_eq!(woken, [WatchId(0)]);
        });
    }

    #[test]
    fn a_wait_ends_when_an_operation_completes() {
        each_engine("wait", 4, |mut device, _| {
            let mut pool = BufferPool::new(1, BLOCK);
            let buffer = filled(&mut pool, 1);
            let segment = pool.lend(&buffer);
            device.read(Token(3), ByteOffset::new(0), &[segment]);
            let mut completions = vec![];
            while completions.is_empty() {
                device.wait(None, &mut vec![]);
                device.reap(&mut completions);
            }
            assert_eq!(completions, [Completion { token: Token(3), result: Ok(()) }]);
            assert_eq!(device.in_flight(), 0);
        });
    }

    #[test]
    fn a_wait_is_ended_from_another_thread() {
        each_engine("thread", 4, |mut device, _| {
            let bell = EventFd::new().unwrap();
            device.watch(bell.as_raw_fd(), WatchId(9));
            std::thread::scope(|scope| {
                // The device was opened here and is used there.
                let sleeper = scope.spawn(|| {
                    let mut device = device;
                    let mut woken = vec![];
                    while woken.is_empty() {
                        device.wait(None, &mut woken);
                    }
                    woken
                });
                bell.write(1).unwrap();
                assert_eq!(sleeper.join().unwrap(), [WatchId(9)]);
            });
        });
    }

    #[test]
    #[should_panic(expected = "end past the device")]
    fn an_operation_past_the_end_is_our_bug() {
        let scratch = Scratch::new(&std::env::temp_dir(), "past");
        let mut device = open(&scratch, Engine::Auto, 1);
        let mut pool = BufferPool::new(1, 8192);
        let buffer = filled(&mut pool, 0);
        let segment = pool.lend(&buffer);
        device.read(Token(0), ByteOffset::new(CAPACITY - 4096), &[segment]);
    }

    #[test]
    #[should_panic(expected = "more operations than the device's depth")]
    fn more_operations_than_the_depth_are_our_bug() {
        let scratch = Scratch::new(Path::new("/dev/shm"), "overflow");
        let mut device = open(&scratch, Engine::Auto, 1);
        device.flush(Token(0));
        device.flush(Token(1));
    }
}
