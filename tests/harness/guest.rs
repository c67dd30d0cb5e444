//! A guest and its front-end: a virtio-blk driver over a real socket and real shared memory, which
//! can behave and misbehave.
//!
//! [`FrontEnd`] speaks messages, raw if need be. [`Ram`] is the guest's memory. [`Guest`] puts both
//! together with rings and requests; what it does step by step is public, so that a test can do
//! one step wrong. Waits end at a deadline with a panic that says what did not come.
//!
//! This file is marked `unsafe`: guest memory is a mapping that another process or thread changes.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::unistd::ftruncate;

/// Hang guard: nothing a test waits for takes this long on a working server.
const DEADLINE: Duration = Duration::from_secs(30);

/// Guest-physical address of the first byte of RAM.
pub const RAM_GUEST: u64 = 0x4000_0000;
/// Address of the same byte in the front-end's address space, as messages give it.
pub const RAM_USER: u64 = 0x7a00_0000_0000;

/// Message numbers of the vhost-user specification.
#[expect(missing_docs, reason = "the specification says what they do")]
pub mod message {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}

/// Feature bits.
#[expect(missing_docs, reason = "the specification says what they mean")]
pub mod feature {
    pub const RO: u64 = 1 << 5;
    pub const FLUSH: u64 = 1 << 9;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const INDIRECT: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
}

/// Descriptor flags.
#[expect(missing_docs, reason = "the specification says what they mean")]
pub mod flag {
    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const INDIRECT: u16 = 4;
}

/// Request types and status bytes.
#[expect(missing_docs, reason = "the specification says what they mean")]
pub mod block {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
    pub const DONE: u8 = 0;
    pub const IO_ERROR: u8 = 1;
    pub const UNSUPPORTED: u8 = 2;
    /// What a status byte holds before the device has written it.
    pub const PENDING: u8 = 0xff;
}

/// The guest's memory: a memfd, mapped here, and by whoever it is sent to.
#[derive(Debug)]
pub struct Ram {
    file: OwnedFd,
    base: NonNull<u8>,
    size: usize,
}

// SAFETY: the mapping is used through atomics and byte copies only, from any thread.
unsafe impl Send for Ram {}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: the range is the mapping made in `new`, and nothing borrows from it.
        unsafe { munmap(self.base.cast(), self.size) }.expect("the range is mapped");
    }
}

impl Ram {
    /// `size` bytes of zeroes.
    pub fn new(size: usize) -> Self {
        let file = memfd_create("guest-ram", MFdFlags::MFD_CLOEXEC).expect("memfd");
        ftruncate(&file, size as i64).expect("memfd size");
        let length = NonZeroUsize::new(size).expect("memory of some size");
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the kernel chooses the address; the mapping is unmapped in `drop`.
        let base = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, &file, 0) };
        Self { file, base: base.expect("map memfd").cast(), size }
    }

    /// Its length in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The file, to send to a back-end or to do evil with.
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    fn at<T>(&self, offset: usize) -> &T {
        assert!(offset.is_multiple_of(align_of::<T>()) && offset + size_of::<T>() <= self.size);
        // SAFETY: in bounds and aligned by the assertion (the base is page aligned). `T` is one of
        // the atomics, for all of which any bytes are valid and shared change is allowed.
        unsafe { self.base.add(offset).cast::<T>().as_ref() }
    }

    /// Reads a byte.
    pub fn u8(&self, offset: usize) -> u8 {
        self.at::<AtomicU8>(offset).load(Ordering::Acquire)
    }

    /// Reads 16 bits.
    pub fn u16(&self, offset: usize) -> u16 {
        self.at::<AtomicU16>(offset).load(Ordering::Acquire)
    }

    /// Reads 32 bits.
    pub fn u32(&self, offset: usize) -> u32 {
        self.at::<AtomicU32>(offset).load(Ordering::Acquire)
    }

    /// Writes a byte.
    pub fn put_u8(&self, offset: usize, value: u8) {
        self.at::<AtomicU8>(offset).store(value, Ordering::Release);
    }

    /// Writes 16 bits.
    pub fn put_u16(&self, offset: usize, value: u16) {
        self.at::<AtomicU16>(offset).store(value, Ordering::Release);
    }

    /// Writes 64 bits.
    pub fn put_u64(&self, offset: usize, value: u64) {
        self.at::<AtomicU64>(offset).store(value, Ordering::Release);
    }

    /// Copies bytes in.
    pub fn put(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.size);
        // SAFETY: in bounds by the assertion; `bytes` cannot overlap memory nobody borrows.
        unsafe { self.base.add(offset).as_ptr().copy_from(bytes.as_ptr(), bytes.len()) }
    }

    /// Copies bytes out.
    pub fn get(&self, offset: usize, length: usize) -> Vec<u8> {
        assert!(offset + length <= self.size);
        let mut bytes = vec![0; length];
        // SAFETY: in bounds by the assertion; `bytes` is ours.
        unsafe { self.base.add(offset).as_ptr().copy_to(bytes.as_mut_ptr(), length) }
        bytes
    }
}

/// A message as it came.
#[derive(Debug)]
pub struct Answer {
    /// Which request it answers.
    pub request: u32,
    /// Its payload.
    pub payload: Vec<u8>,
    /// The descriptors that came with it.
    pub files: Vec<OwnedFd>,
}

impl Answer {
    /// The first 64 bits of the payload.
    pub fn u64(&self) -> u64 {
        u64::from_le_bytes(self.payload[..8].try_into().expect("eight bytes"))
    }
}

/// The control socket, from the front-end's side.
#[derive(Debug)]
pub struct FrontEnd {
    stream: UnixStream,
}

/// Makes a payload of little-endian 64-bit words.
pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Makes a payload of a ring index and a number.
pub fn state(index: u32, value: u32) -> Vec<u8> {
    [index.to_le_bytes(), value.to_le_bytes()].concat()
}

impl FrontEnd {
    /// Connects to a back-end's socket.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        Ok(Self { stream })
    }

    /// Sends a request, well formed but for what the arguments say.
    pub fn send(
        &self,
        request: u32,
        need_reply: bool,
        payload: &[u8],
        files: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let flags = if need_reply { 9u32 } else { 1 };
        let mut bytes = Vec::with_capacity(12 + payload.len());
        bytes.extend(request.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend((payload.len() as u32).to_le_bytes());
        bytes.extend(payload);
        self.send_bytes(&bytes, files)
    }

    /// Sends any bytes at all.
    pub fn send_bytes(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let raw: Vec<RawFd> = files.iter().map(|file| file.as_raw_fd()).collect();
        let control: &[ControlMessage<'_>] =
            if raw.is_empty() { &[] } else { &[ControlMessage::ScmRights(&raw)] };
        let slices = [IoSlice::new(bytes)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        let sent = loop {
            match sendmsg::<()>(self.stream.as_raw_fd(), &slices, control, flags, None) {
                Err(nix::errno::Errno::EINTR) => {}
                result => break result?,
            }
        };
        if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Receives one message; `None` when the back-end has hung up.
    pub fn receive(&mut self) -> io::Result<Option<Answer>> {
        let mut header = [0u8; 12];
        let mut files = Vec::new();
        let count = {
            let mut control = nix::cmsg_space!([RawFd; 8]);
            let mut slices = [IoSliceMut::new(&mut header)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_WAITALL;
            let raw = self.stream.as_raw_fd();
            let message = loop {
                match recvmsg::<()>(raw, &mut slices, Some(&mut control), flags) {
                    Err(nix::errno::Errno::EINTR) => {}
                    Err(nix::errno::Errno::ECONNRESET) => return Ok(None),
                    result => break result?,
                }
            };
            for part in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(received) = part {
                    for descriptor in received {
                        // SAFETY: the kernel has just installed it for us alone.
                        files.push(unsafe { OwnedFd::from_raw_fd(descriptor) });
                    }
                }
            }
            message.bytes
        };
        if count == 0 {
            return Ok(None);
        }
        if count < header.len() {
            self.stream.read_exact(&mut header[count..])?;
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four"));
        let mut payload = vec![0; word(8) as usize];
        self.stream.read_exact(&mut payload)?;
        assert_eq!(word(4), 5, "a reply of version 1");
        Ok(Some(Answer { request: word(0), payload, files }))
    }

    /// Sends a request that has a reply of its own, and gives the reply.
    pub fn ask(&mut self, request: u32, payload: &[u8]) -> io::Result<Answer> {
        self.send(request, false, payload, &[])?;
        let answer = self.receive()?.ok_or(io::ErrorKind::UnexpectedEof)?;
        assert_eq!(answer.request, request, "a reply to another request");
        Ok(answer)
    }

    /// Sends a request and waits for its acknowledgement, which must be negotiated; fails when it
    /// is refused.
    pub fn tell(
        &mut self,
        request: u32,
        payload: &[u8],
        files: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        self.send(request, true, payload, files)?;
        let answer = self.receive()?.ok_or(io::ErrorKind::UnexpectedEof)?;
        assert_eq!(answer.request, request, "an acknowledgement of another request");
        if answer.u64() == 0 { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    /// Says that nothing more will be sent. What the back-end sends can still be received.
    pub fn hang_up(&self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Write); // It may be gone already.
    }

    /// Waits until the back-end hangs up, reading whatever comes before.
    pub fn wait_for_hangup(&mut self) {
        while self.receive().expect("the back-end hangs up before the deadline").is_some() {}
    }

    /// Agrees on features: of those wanted, what is offered. Gives what was agreed.
    pub fn negotiate(&mut self, wanted: u64) -> io::Result<u64> {
        let features = self.ask(message::GET_FEATURES, &[])?.u64() & wanted;
        self.send(message::SET_FEATURES, false, &words(&[features]), &[])?;
        if features & feature::PROTOCOL != 0 {
            let protocol = self.ask(message::GET_PROTOCOL_FEATURES, &[])?.u64();
            self.send(message::SET_PROTOCOL_FEATURES, false, &words(&[protocol]), &[])?;
        }
        self.send(message::SET_OWNER, false, &[], &[])?;
        Ok(features)
    }

    /// Reads part of the configuration space; no bytes mean refusal.
    pub fn config(&mut self, offset: u32, size: u32) -> io::Result<Vec<u8>> {
        let mut payload = [offset, size, 0].map(u32::to_le_bytes).concat();
        payload.resize(12 + size as usize, 0);
        let mut answer = self.ask(message::GET_CONFIG, &payload)?;
        Ok(answer.payload.split_off(12))
    }

    /// Writes part of the configuration space.
    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        let mut payload = [offset, bytes.len() as u32, 0].map(u32::to_le_bytes).concat();
        payload.extend(bytes);
        self.tell(message::SET_CONFIG, &payload, &[])
    }
}

/// How a [`Guest`] sets itself up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Queues it starts.
    pub queues: u16,
    /// Descriptors in each ring.
    pub queue_size: u16,
    /// Feature bits it acknowledges, if they are offered.
    pub features: u64,
    /// Ask for an in-flight region and keep it over reconnects.
    pub inflight: bool,
    /// Longest data of one request in bytes.
    pub data_max: usize,
    /// Memory regions that RAM is cut into.
    pub regions: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 64,
            features: u64::MAX,
            inflight: false,
            data_max: 64 << 10,
            regions: 1,
        }
    }
}

/// A descriptor, as it lies in memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Descriptor {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// See [`flag`].
    pub flags: u16,
    /// Index of the next one, with [`flag::NEXT`].
    pub next: u16,
}

/// A finished request as the used ring gives it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Used {
    /// Head of its chain.
    pub head: u16,
    /// Bytes the device says it wrote.
    pub length: u32,
}

/// A request under way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ticket {
    /// Which queue.
    pub queue: usize,
    /// Head of its chain.
    pub head: u16,
    slot: usize,
}

/// Where the parts of one ring and its requests lie, as offsets into RAM.
#[derive(Clone, Copy, Debug)]
pub struct RingPlace {
    /// The descriptor table.
    pub descriptors: usize,
    /// The available ring.
    pub available: usize,
    /// The used ring.
    pub used: usize,
    /// The first slot: header and status, an indirect table, data.
    slots: usize,
    /// The first byte behind the last slot.
    end: usize,
}

/// One virtqueue, from the driver's side.
#[derive(Debug)]
struct DriverRing {
    place: RingPlace,
    available: u16,
    kicked: u16,
    used: u16,
    free: Vec<usize>,
    kick: EventFd,
    call: EventFd,
}

/// Bytes of a slot before its data: header at 0, status at 16, indirect table at 64.
const SLOT_HEAD: usize = 512;
const SLOT_STATUS: usize = 16;
const SLOT_TABLE: usize = 64;
/// Descriptors of a request that is not indirect.
const DIRECT: usize = 3;

/// A guest with a vhost-user-blk disk.
#[derive(Debug)]
pub struct Guest {
    /// The control socket.
    pub front_end: FrontEnd,
    /// Its memory.
    pub ram: Ram,
    /// What was agreed.
    pub features: u64,
    options: Options,
    rings: Vec<DriverRing>,
    /// The in-flight region and the message that describes it.
    inflight: Option<(Vec<u8>, OwnedFd)>,
}

/// Where a front-end says that a ring goes on after its back-end died; it can only guess.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BaseAfterReconnect {
    /// At the used index, as QEMU does it.
    Used,
    /// At the available index, as cloud-hypervisor does it.
    Available,
}

impl Guest {
    /// Connects, agrees on features and starts every queue.
    pub fn connect(path: &Path, options: Options) -> io::Result<Self> {
        let mut guest = Self::negotiate(path, options)?;
        guest.share_memory()?;
        guest.share_inflight()?;
        (0..guest.rings.len()).try_for_each(|queue| guest.start_queue(queue, 0))?;
        Ok(guest)
    }

    /// Connects and agrees on features, no more.
    pub fn negotiate(path: &Path, options: Options) -> io::Result<Self> {
        let mut front_end = FrontEnd::connect(path)?;
        let features = front_end.negotiate(options.features)?;
        let mut end = 0;
        let rings = (0..options.queues)
            .map(|_| {
                let ring = DriverRing::new(end, &options, features);
                end = ring.place.end;
                ring
            })
            .collect();
        // A tail that no ring or slot uses, for a test's own chains.
        let size = (end + (256 << 10)).next_multiple_of(4096 * options.regions);
        Ok(Self { front_end, ram: Ram::new(size), features, options, rings, inflight: None })
    }

    /// The regions of RAM as messages describe them: guest address, size, user address, offset.
    pub fn regions(&self) -> Vec<[u64; 4]> {
        let part = (self.ram.size() / self.options.regions) as u64;
        (0..self.options.regions as u64)
            .map(|index| [RAM_GUEST + index * part, part, RAM_USER + index * part, index * part])
            .collect()
    }

    /// Sends the memory table.
    pub fn share_memory(&mut self) -> io::Result<()> {
        let regions = self.regions();
        let mut payload = words(&[regions.len() as u64]);
        payload.extend(words(regions.as_flattened()));
        let files = vec![self.ram.file.as_fd(); regions.len()];
        self.front_end.tell(message::SET_MEM_TABLE, &payload, &files)
    }

    /// Gets an in-flight region the first time, and hands it back every time.
    pub fn share_inflight(&mut self) -> io::Result<()> {
        if !self.options.inflight {
            return Ok(());
        }
        if self.inflight.is_none() {
            let mut ask = words(&[0, 0]);
            ask.extend(self.options.queues.to_le_bytes());
            ask.extend(self.options.queue_size.to_le_bytes());
            ask.extend([0; 4]);
            let mut answer = self.front_end.ask(message::GET_INFLIGHT_FD, &ask)?;
            let file = answer.files.pop().expect("an in-flight region comes with its file");
            self.inflight = Some((answer.payload, file));
        }
        let (payload, file) = self.inflight.as_ref().expect("it was made above");
        self.front_end.tell(message::SET_INFLIGHT_FD, payload, &[file.as_fd()])
    }

    /// The next [`Guest::share_inflight`] asks for a new region.
    pub fn forget_inflight(&mut self) {
        self.inflight = None;
    }

    /// The in-flight region, if there is one: memory that the guest can spoil.
    pub fn inflight_file(&self) -> Option<File> {
        let (_, file) = self.inflight.as_ref()?;
        Some(file.try_clone().expect("descriptors enough").into())
    }

    /// Describes a ring to the back-end and enables it.
    pub fn start_queue(&mut self, queue: usize, base: u16) -> io::Result<()> {
        let index = queue as u32;
        let size = self.options.queue_size.into();
        self.front_end.tell(message::SET_VRING_NUM, &state(index, size), &[])?;
        self.front_end.tell(message::SET_VRING_BASE, &state(index, base.into()), &[])?;
        let addresses = self.ring_addresses(queue);
        self.front_end.tell(message::SET_VRING_ADDR, &addresses, &[])?;
        let ring = &self.rings[queue];
        let (kick, call) = (ring.kick.as_fd(), ring.call.as_fd());
        self.front_end.tell(message::SET_VRING_KICK, &words(&[queue as u64]), &[kick])?;
        self.front_end.tell(message::SET_VRING_CALL, &words(&[queue as u64]), &[call])?;
        if self.features & feature::PROTOCOL != 0 {
            self.front_end.tell(message::SET_VRING_ENABLE, &state(index, 1), &[])?;
        }
        Ok(())
    }

    /// The payload of SET_VRING_ADDR.
    pub fn ring_addresses(&self, queue: usize) -> Vec<u8> {
        let place = self.rings[queue].place;
        let user = |offset: usize| RAM_USER + offset as u64;
        let mut payload = state(queue as u32, 0);
        let (descriptors, used) = (user(place.descriptors), user(place.used));
        payload.extend(words(&[descriptors, used, user(place.available), 0]));
        payload
    }

    /// Stops a queue; gives the base to start it with again.
    pub fn stop_queue(&mut self, queue: usize) -> io::Result<u16> {
        let answer = self.front_end.ask(message::GET_VRING_BASE, &state(queue as u32, 0))?;
        Ok(u16::from_le_bytes(answer.payload[4..6].try_into().expect("two bytes")))
    }

    /// Connects again after the back-end, or the connection, has died: same memory, same in-flight
    /// region, rings where `base` says.
    pub fn reconnect(&mut self, path: &Path, base: BaseAfterReconnect) -> io::Result<()> {
        self.front_end = FrontEnd::connect(path)?;
        self.front_end.negotiate(self.features)?;
        self.share_inflight()?;
        self.share_memory()?;
        for queue in 0..self.rings.len() {
            let place = self.rings[queue].place;
            let index = match base {
                BaseAfterReconnect::Used => place.used,
                BaseAfterReconnect::Available => place.available,
            };
            self.start_queue(queue, self.ram.u16(index + 2))?;
        }
        Ok(())
    }

    /// Where a ring is.
    pub fn place(&self, queue: usize) -> RingPlace {
        self.rings[queue].place
    }

    /// An offset in RAM that is no ring's and no slot's; 256 KiB follow it.
    pub fn spare(&self) -> usize {
        self.rings.last().map_or(0, |ring| ring.place.end)
    }

    /// Writes a descriptor into a ring's table.
    pub fn put_descriptor(&self, queue: usize, index: u16, descriptor: Descriptor) {
        put_descriptor(&self.ram, self.rings[queue].place.descriptors, index, descriptor);
    }

    /// Writes a descriptor into a table anywhere in RAM.
    pub fn put_descriptor_at(&self, table: usize, index: u16, descriptor: Descriptor) {
        put_descriptor(&self.ram, table, index, descriptor);
    }

    /// Makes a chain available. [`Guest::kick`] tells the device.
    pub fn push(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = usize::from(ring.available) % usize::from(self.options.queue_size);
        self.ram.put_u16(ring.place.available + 4 + 2 * slot, head);
        ring.available = ring.available.wrapping_add(1);
        self.ram.put_u16(ring.place.available + 2, ring.available);
    }

    /// Kicks the device if it wants to be.
    pub fn kick(&mut self, queue: usize) {
        fence(Ordering::SeqCst);
        let size = usize::from(self.options.queue_size);
        let event_idx = self.features & feature::EVENT_IDX != 0;
        let ring = &mut self.rings[queue];
        let wanted = if event_idx {
            let event = self.ram.u16(ring.place.used + 4 + 8 * size);
            let passed = ring.available.wrapping_sub(event).wrapping_sub(1);
            passed < ring.available.wrapping_sub(ring.kicked)
        } else {
            self.ram.u16(ring.place.used) & 1 == 0
        };
        ring.kicked = ring.available;
        if wanted {
            ring.kick.write(1).expect("the counter is far from full");
        }
    }

    /// Kicks the device whether it wants or not.
    pub fn kick_hard(&mut self, queue: usize) {
        self.rings[queue].kick.write(1).expect("the counter is far from full");
    }

    /// Takes the next used element, if there is one.
    pub fn poll_used(&mut self, queue: usize) -> Option<Used> {
        let size = usize::from(self.options.queue_size);
        let ring = &mut self.rings[queue];
        if self.ram.u16(ring.place.used + 2) == ring.used {
            return None;
        }
        let at = ring.place.used + 4 + 8 * (usize::from(ring.used) % size);
        ring.used = ring.used.wrapping_add(1);
        Some(Used { head: self.ram.u32(at) as u16, length: self.ram.u32(at + 4) })
    }

    /// Waits for the next used element the way a driver does: ask for an interrupt, look again,
    /// sleep until it comes.
    ///
    /// # Panics
    /// When none comes before the deadline.
    pub fn wait_used(&mut self, queue: usize) -> Used {
        loop {
            if let Some(used) = self.poll_used(queue) {
                return used;
            }
            self.ask_for_interrupt(queue);
            if let Some(used) = self.poll_used(queue) {
                return used;
            }
            assert!(self.wait_call(queue), "no interrupt on queue {queue}");
        }
    }

    /// Waits for an interrupt; false when none comes before the deadline.
    pub fn wait_call(&self, queue: usize) -> bool {
        let call = &self.rings[queue].call;
        let mut waits = [PollFd::new(call.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(DEADLINE).expect("it fits");
        if poll(&mut waits, timeout).expect("poll") == 0 {
            return false;
        }
        let _ = call.read();
        true
    }

    /// Takes the interrupts that have come; gives whether there was one.
    pub fn take_call(&self, queue: usize) -> bool {
        self.rings[queue].call.read().is_ok()
    }

    /// Asks for an interrupt at the next used element.
    pub fn ask_for_interrupt(&mut self, queue: usize) {
        let ring = &self.rings[queue];
        if self.features & feature::EVENT_IDX != 0 {
            let size = usize::from(self.options.queue_size);
            self.ram.put_u16(ring.place.available + 4 + 2 * size, ring.used);
        } else {
            self.ram.put_u16(ring.place.available, 0);
        }
        fence(Ordering::SeqCst);
    }

    /// Asks for no interrupts, by flag; has no meaning with event indexes.
    pub fn refuse_interrupts(&mut self, queue: usize) {
        self.ram.put_u16(self.rings[queue].place.available, 1);
    }

    /// Free slots of a queue: how many requests can be submitted now.
    pub fn room(&self, queue: usize) -> usize {
        self.rings[queue].free.len()
    }

    /// Puts a request into the ring without a kick. `give` are its data for the device, `take` is
    /// how many bytes the device shall fill in.
    ///
    /// # Panics
    /// When there is no free slot or the data are too long.
    pub fn submit(
        &mut self,
        queue: usize,
        kind: u32,
        sector: u64,
        give: &[u8],
        take: usize,
    ) -> Ticket {
        assert!(give.len() <= self.options.data_max && take <= self.options.data_max);
        let indirect = self.features & feature::INDIRECT != 0;
        let slot = self.rings[queue].free.pop().expect("a free slot");
        let base = self.slot_base(queue, slot);
        let mut header = words(&[u64::from(kind), sector]);
        header.truncate(16);
        self.ram.put(base, &header);
        self.ram.put_u8(base + SLOT_STATUS, block::PENDING);
        self.ram.put(base + SLOT_HEAD, give);

        let guest = |offset: usize| RAM_GUEST + offset as u64;
        let mut chain = vec![(guest(base), 16, 0)];
        if !give.is_empty() {
            chain.push((guest(base + SLOT_HEAD), give.len() as u32, 0));
        }
        if take > 0 {
            chain.push((guest(base + SLOT_HEAD), take as u32, flag::WRITE));
        }
        chain.push((guest(base + SLOT_STATUS), 1, flag::WRITE));
        let table = self.rings[queue].place.descriptors;
        let head = if indirect { slot as u16 } else { (slot * DIRECT) as u16 };
        if indirect {
            self.put_chain(base + SLOT_TABLE, 0, &chain);
            let address = guest(base + SLOT_TABLE);
            let length = 16 * chain.len() as u32;
            let link = Descriptor { address, length, flags: flag::INDIRECT, next: 0 };
            put_descriptor(&self.ram, table, head, link);
        } else {
            self.put_chain(table, head, &chain);
        }
        self.push(queue, head);
        Ticket { queue, head, slot }
    }

    /// Writes a chain of (address, length, flags) into consecutive descriptors.
    pub fn put_chain(&self, table: usize, first: u16, chain: &[(u64, u32, u16)]) {
        for (place, (address, length, flags)) in chain.iter().enumerate() {
            let last = place + 1 == chain.len();
            let flags = if last { *flags } else { flags | flag::NEXT };
            let index = first + place as u16;
            let descriptor =
                Descriptor { address: *address, length: *length, flags, next: index + 1 };
            put_descriptor(&self.ram, table, index, descriptor);
        }
    }

    /// The status byte of a request; [`block::PENDING`] before it is answered.
    pub fn status(&self, ticket: Ticket) -> u8 {
        self.ram.u8(self.slot_base(ticket.queue, ticket.slot) + SLOT_STATUS)
    }

    /// What the device filled in.
    pub fn data(&self, ticket: Ticket, length: usize) -> Vec<u8> {
        self.ram.get(self.slot_base(ticket.queue, ticket.slot) + SLOT_HEAD, length)
    }

    /// Gives a finished request's slot back.
    pub fn release(&mut self, ticket: Ticket) {
        self.rings[ticket.queue].free.push(ticket.slot);
    }

    fn slot_base(&self, queue: usize, slot: usize) -> usize {
        self.rings[queue].place.slots + slot * slot_size(&self.options)
    }

    /// One request from submission to status, alone on its queue.
    ///
    /// # Panics
    /// When something else finishes instead, or nothing does before the deadline.
    pub fn run(
        &mut self,
        queue: usize,
        kind: u32,
        sector: u64,
        give: &[u8],
        take: usize,
    ) -> (u8, Vec<u8>) {
        let ticket = self.submit(queue, kind, sector, give, take);
        self.kick(queue);
        let used = self.wait_used(queue);
        assert_eq!(used.head, ticket.head, "another request finished");
        let answer = (self.status(ticket), self.data(ticket, take));
        self.release(ticket);
        answer
    }

    /// Reads `length` bytes; gives status and data.
    pub fn read(&mut self, queue: usize, sector: u64, length: usize) -> (u8, Vec<u8>) {
        self.run(queue, block::IN, sector, &[], length)
    }

    /// Writes; gives the status.
    pub fn write(&mut self, queue: usize, sector: u64, bytes: &[u8]) -> u8 {
        self.run(queue, block::OUT, sector, bytes, 0).0
    }

    /// Makes everything durable; gives the status.
    pub fn flush(&mut self, queue: usize) -> u8 {
        self.run(queue, block::FLUSH, 0, &[], 0).0
    }

    /// Discards sectors; gives the status.
    pub fn discard(&mut self, queue: usize, sector: u64, sectors: u32) -> u8 {
        self.run(queue, block::DISCARD, 0, &range(sector, sectors, 0), 0).0
    }

    /// Zeroes sectors; gives the status.
    pub fn write_zeroes(&mut self, queue: usize, sector: u64, sectors: u32, unmap: bool) -> u8 {
        let range = range(sector, sectors, u32::from(unmap));
        self.run(queue, block::WRITE_ZEROES, 0, &range, 0).0
    }

    /// The disk's name; gives the status and 20 bytes.
    pub fn get_id(&mut self, queue: usize) -> (u8, Vec<u8>) {
        self.run(queue, block::GET_ID, 0, &[], 20)
    }
}

/// The payload of a discard or write-zeroes request.
pub fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = words(&[sector]);
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

fn put_descriptor(ram: &Ram, table: usize, index: u16, descriptor: Descriptor) {
    let at = table + 16 * usize::from(index);
    let Descriptor { address, length, flags, next } = descriptor;
    ram.put_u64(at, address);
    let rest = u64::from(length) | u64::from(flags) << 32 | u64::from(next) << 48;
    ram.put_u64(at + 8, rest);
}

fn slot_size(options: &Options) -> usize {
    SLOT_HEAD + options.data_max.next_multiple_of(512)
}

impl DriverRing {
    fn new(start: usize, options: &Options, features: u64) -> Self {
        let size = usize::from(options.queue_size);
        let indirect = features & feature::INDIRECT != 0;
        // More slots than this keep no test busier and cost memory.
        let slots = if indirect { size } else { size / DIRECT }.clamp(1, 128);
        let descriptors = start.next_multiple_of(4096);
        let available = descriptors + 16 * size;
        let used = (available + 6 + 2 * size).next_multiple_of(64);
        let first = (used + 6 + 8 * size).next_multiple_of(4096);
        let end = (first + slots * slot_size(options)).next_multiple_of(4096);
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let event = || EventFd::from_value_and_flags(0, flags).expect("an eventfd");
        Self {
            place: RingPlace { descriptors, available, used, slots: first, end },
            available: 0,
            kicked: 0,
            used: 0,
            free: (0..slots).rev().collect(),
            kick: event(),
            call: event(),
        }
    }
}
