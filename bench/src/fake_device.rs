//! A virtio-blk device in this process, for tests: serves queues from a thread, over a disk in
//! memory, faithfully or with one fault.
//!
//! It reads chains from guest memory as any device would and shares no layout code with
//! [`crate::queue`], so that a mistake there cannot cancel out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crate::memory::GuestMemory;
use crate::queue::Queue;

/// What the device does wrong, once or from the 100th request on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    None,
    /// Confirms writes without storing them.
    DropWrite,
    /// Stores one bit wrongly.
    FlipBit,
    /// Stores at the next block.
    Misplace,
    /// Answers with an I/O error.
    Fail,
    /// Returns a request without a status.
    NoStatus,
    /// Returns a request that it was never given.
    UnknownHead,
    /// Stops serving and hangs up.
    Die,
}

struct Ring {
    size: u16,
    /// Offsets of the descriptors, the used and the available ring.
    parts: [u64; 3],
    available_seen: u16,
    used_next: u16,
}

/// The serving thread; stops when dropped.
pub(crate) struct FakeDevice {
    stop: Arc<AtomicBool>,
    dead: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl FakeDevice {
    /// Starts to serve `queues`.
    pub(crate) fn serve(
        memory: &Arc<GuestMemory>,
        queues: &[Queue],
        disk_bytes: usize,
        fault: Fault,
    ) -> Self {
        let (stop, dead) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let start = memory.user_address(0);
        let rings = queues.iter().map(|queue| Ring {
            size: queue.size(),
            parts: queue.user_addresses().map(|address| address - start),
            available_seen: 0,
            used_next: 0,
        });
        let mut served = Served {
            memory: Arc::clone(memory),
            rings: rings.collect(),
            disk: vec![0; disk_bytes],
            fault,
            count: 0,
        };
        let (stopped, died) = (Arc::clone(&stop), Arc::clone(&dead));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) && served.turn() {
                // The tests may have one core for both sides.
                std::thread::yield_now();
            }
            died.store(true, Ordering::Relaxed);
        });
        Self { stop, dead, thread: Some(thread) }
    }

    /// As a front-end finds out through its socket.
    pub(crate) fn check_alive(&self) -> Result<(), String> {
        if self.dead.load(Ordering::Relaxed) { Err("the device is gone".into()) } else { Ok(()) }
    }
}

impl Drop for FakeDevice {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || matches!(ended, Some(Ok(()))), "the device panicked");
    }
}

struct Served {
    memory: Arc<GuestMemory>,
    rings: Vec<Ring>,
    disk: Vec<u8>,
    fault: Fault,
    count: u64,
}

impl Served {
    /// Serves what is there. False when the device has died.
    fn turn(&mut self) -> bool {
        for index in 0..self.rings.len() {
            let [_, _, available] = self.rings[index].parts;
            let published = self.memory.load_u16(available + 2, Ordering::Acquire);
            while self.rings[index].available_seen != published {
                let place = self.rings[index].available_seen % self.rings[index].size;
                self.rings[index].available_seen = self.rings[index].available_seen.wrapping_add(1);
                let at = available + 4 + 2 * u64::from(place);
                let head = self.memory.load_u16(at, Ordering::Relaxed);
                self.count += 1;
                if self.faulty(Fault::Die) {
                    return false;
                }
                self.serve_chain(index, head);
            }
        }
        true
    }

    fn faulty(&self, fault: Fault) -> bool {
        self.fault == fault && self.count >= 100
    }

    fn serve_chain(&mut self, index: usize, head: u16) {
        let chain = self.walk(self.rings[index].parts[0], head);
        let (header, rest) = chain.split_first().expect("a chain has a header");
        let (status, data) = rest.split_last().expect("a chain has a status");
        assert_eq!((header.1, status.1, status.2), (16, 1, true), "framing");
        let kind = self.memory.read_u32(header.0);
        let sector = u64::from(self.memory.read_u32(header.0 + 8))
            | u64::from(self.memory.read_u32(header.0 + 12)) << 32;
        for &(at, bytes, writable) in data {
            assert_eq!(writable, kind == 0, "only reads have writable data");
            self.transfer(kind, sector as usize * 512, at, bytes as usize);
        }
        if !self.faulty(Fault::NoStatus) {
            self.memory.write(status.0, &[u8::from(self.faulty(Fault::Fail))]);
        }
        self.give_back(index, head);
    }

    fn transfer(&mut self, kind: u32, position: usize, at: u64, bytes: usize) {
        let (misplace, flip) = (self.faulty(Fault::Misplace), self.faulty(Fault::FlipBit));
        match kind {
            0 => self.memory.write(at, &self.disk[position..position + bytes]),
            1 if self.faulty(Fault::DropWrite) => {}
            1 => {
                let position =
                    if misplace && position >= 4096 { position - 4096 } else { position };
                self.memory.read(at, &mut self.disk[position..position + bytes]);
                self.disk[position + bytes / 2] ^= u8::from(flip);
            }
            _ => panic!("request type {kind} has data"),
        }
    }

    /// Offset, length and direction of each descriptor of a chain.
    fn walk(&self, table: u64, head: u16) -> Vec<(u64, u32, bool)> {
        let mut chain = Vec::new();
        let (mut table, mut next) = (table, head);
        loop {
            let at = table + 16 * u64::from(next);
            let address =
                u64::from(self.memory.read_u32(at)) | u64::from(self.memory.read_u32(at + 4)) << 32;
            let offset = self.memory.offset_of(address);
            let flags = self.memory.load_u16(at + 12, Ordering::Relaxed);
            if flags & 4 != 0 {
                (table, next) = (offset, 0);
                continue;
            }
            chain.push((offset, self.memory.read_u32(at + 8), flags & 2 != 0));
            if flags & 1 == 0 {
                return chain;
            }
            next = self.memory.load_u16(at + 14, Ordering::Relaxed);
        }
    }

    fn give_back(&mut self, index: usize, head: u16) {
        let unknown = self.faulty(Fault::UnknownHead);
        let ring = &mut self.rings[index];
        let used = ring.parts[1];
        let place = u64::from(ring.used_next % ring.size);
        let head = if unknown { u32::MAX } else { u32::from(head) };
        self.memory.write(used + 4 + 8 * place, &head.to_le_bytes());
        ring.used_next = ring.used_next.wrapping_add(1);
        self.memory.store_u16(used + 2, ring.used_next, Ordering::Release);
    }
}
