//! A ring, its descriptors and an in-flight region with anything at all in them.
//!
//! A front-end that behaves sets the queue up over a real socket and real shared memory; then the
//! input writes to that memory as a guest may, and pops, completes, puts back and publishes as a
//! poller may. Every request that comes out must lie in guest memory and inside the volume, and
//! there are never more in flight than the ring holds.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, OnceLock};

use bessel_reactor::buffer::Segment;
use bessel_vhost::{Popped, Queue, QueueHost, RequestKind, Status};

use super::input::Input;
use super::messages::{Hidden, check_request};
use crate::guest::{Descriptor, Guest, Options, RAM_GUEST, feature};
use crate::plain_host::disk_info;

/// Hands the one queue to whoever asks.
#[derive(Default)]
struct Catcher {
    queue: Mutex<Option<Queue>>,
}

impl Catcher {
    fn take(&self) -> Option<Queue> {
        self.queue.lock().expect("no holder panics").take()
    }

    fn put(&self, queue: Queue) {
        *self.queue.lock().expect("no holder panics") = Some(queue);
    }
}

impl QueueHost for Catcher {
    fn start(&self, index: usize, queue: Queue) {
        assert_eq!(index, 0);
        self.put(queue);
    }

    fn stop(&self, _index: usize) -> Queue {
        self.take().expect("it was handed back before")
    }

    fn set_cache(&self, _writeback: bool) {}
}

fn server() -> &'static (Hidden, Arc<Catcher>) {
    static SERVER: OnceLock<(Hidden, Arc<Catcher>)> = OnceLock::new();
    SERVER.get_or_init(|| {
        let host = Arc::<Catcher>::default();
        (Hidden::serve("fuzz-virtqueue", disk_info(), host.clone()), host)
    })
}

/// A request that was popped.
struct Held {
    kind: RequestKind,
    segments: Vec<Segment>,
}

/// The poller of the one queue, and all that it must find.
struct Poller {
    queue: Queue,
    ranges: Vec<(usize, usize)>,
    held: BTreeMap<u16, Held>,
    /// The request popped last, while it can be put back.
    last: Option<u16>,
    parked: Option<u16>,
    /// Requests that came from the ring since the last publish.
    popped: u32,
    recovered: u32,
}

impl Poller {
    fn new(queue: Queue, recovered: u32) -> Self {
        let ranges = queue.memory_ranges();
        let ranges = ranges.map(|range| (range.as_ptr() as usize, range.len())).collect();
        let held = BTreeMap::new();
        Self { queue, ranges, held, last: None, parked: None, popped: 0, recovered }
    }

    /// Pops once; false when nothing more comes.
    fn pop(&mut self) -> bool {
        let size = u32::from(self.queue.size());
        let was_parked = self.parked.take();
        self.last = None;
        let goes_on = match self.queue.pop() {
            Popped::Empty | Popped::Broken(_) => {
                assert_eq!(was_parked, None, "what was put back comes out again");
                false
            }
            Popped::Answered => {
                assert_eq!(was_parked, None, "what was put back was well formed");
                self.popped += 1;
                true
            }
            Popped::Request(request) => {
                check_request(&request, &self.ranges, disk_info().capacity_sectors);
                let (head, kind) = (request.head, request.kind);
                let segments = request.segments.to_vec();
                match was_parked {
                    Some(parked) => assert_eq!(parked, head, "another than was put back"),
                    None => {
                        let before = self.held.insert(head, Held { kind, segments });
                        assert!(before.is_none(), "head {head} is in flight twice");
                        self.popped += 1;
                    }
                }
                self.last = Some(head);
                true
            }
        };
        assert_eq!(self.queue.in_flight(), self.held.len() as u32);
        assert!(self.queue.in_flight() <= size, "more in flight than the ring holds");
        // A guest that does nothing new cannot make us pop on and on.
        assert!(self.popped <= 2 * size + self.recovered, "popping does not end");
        goes_on
    }

    fn complete(&mut self, index: usize, status: Status) {
        let heads = self.held.keys().filter(|head| Some(**head) != self.parked);
        let Some(head) = heads.clone().nth(index % heads.count().max(1)).copied() else { return };
        let held = self.held.remove(&head).expect("it was just found");
        if held.kind == RequestKind::Read {
            held.segments.iter().for_each(|segment| segment.write(&[0x5a][..segment.len().min(1)]));
        }
        self.last = self.last.filter(|last| *last != head);
        self.queue.complete(head, status);
        assert_eq!(self.queue.in_flight(), self.held.len() as u32);
    }

    fn put_back(&mut self) {
        if let Some(head) = self.last.take() {
            self.queue.put_back(head);
            self.parked = Some(head);
        }
    }

    fn publish(&mut self) {
        self.queue.publish();
        self.popped = self.held.len() as u32;
        self.recovered = 0;
    }

    /// As a host stops a queue.
    fn drain(mut self) -> Queue {
        if self.queue.has_put_back() {
            assert!(self.pop());
        }
        while !self.held.is_empty() {
            self.complete(0, Status::Done);
        }
        self.publish();
        assert_eq!(self.queue.in_flight(), 0);
        self.queue
    }
}

const STATUSES: [Status; 3] = [Status::Done, Status::IoError, Status::Unsupported];

/// The target; see the module's documentation.
pub fn virtqueue(data: &[u8]) {
    let mut input = Input::new(data);
    let (server, host) = server();
    let shape = input.u8();
    let mut features = u64::MAX;
    if shape & 1 != 0 {
        features &= !feature::EVENT_IDX;
    }
    if shape & 2 != 0 {
        features &= !feature::INDIRECT;
    }
    let options = Options {
        queue_size: 1 << (shape >> 5), // 1 to 128
        features,
        inflight: shape & 4 != 0,
        data_max: 512,
        regions: 1 + usize::from(shape >> 3 & 3),
        ..Options::default()
    };
    let size = options.queue_size;
    let mut guest = server.guest(options);
    let mut poller = Poller::new(host.take().expect("the ring is complete"), 0);
    let mut available: u16 = 0;
    while !input.is_empty() {
        match input.below(16) {
            // What guests do: a chain of three descriptors, made available.
            0 | 1 => {
                let head = input.u16() % size;
                chain(&guest, &mut input, head, size);
                put_available(&guest, &mut available, head, size);
            }
            2 => put_descriptor(&guest, &mut input, size),
            3 => {
                let head = input.u16();
                put_available(&guest, &mut available, head, size);
            }
            4 => {
                available = match input.below(3) {
                    0 => input.u16(),
                    1 => available.wrapping_add(input.u8().into()),
                    _ => available.wrapping_sub(input.u8().into()),
                };
                guest.ram.put_u16(guest.place(0).available + 2, available);
            }
            5 | 6 => {
                for _ in 0..=input.below(8) {
                    if !poller.pop() {
                        break;
                    }
                }
            }
            7 => {
                let (index, status) = (input.below(256), input.pick(&STATUSES));
                poller.complete(index, status);
            }
            8 => poller.put_back(),
            9 => poller.publish(),
            10 => {
                poller.queue.enable_kicks();
                poller.queue.drain_kick();
                poller.queue.disable_kicks();
            }
            11 => {
                // The index at which the guest wants its next interrupt, and its flags.
                let place = guest.place(0).available;
                guest.ram.put_u16(place, input.u16());
                guest.ram.put_u16(place + 4 + 2 * usize::from(size), input.u16());
            }
            12 => {
                let at = input.below(guest.ram.size().min(1 << 16));
                let count = 1 + input.below(24);
                let bytes = input.bytes(count);
                let fits = bytes.len().min(guest.ram.size() - at);
                guest.ram.put(at, &bytes[..fits]);
            }
            13 => {
                let Some(region) = guest.inflight_file() else { continue };
                let length = region.metadata().expect("a memfd has a size").len();
                let at = u64::from(input.u16()) % length;
                let count = 1 + input.below(16);
                let bytes = input.bytes(count.min((length - at) as usize)); // It is sealed.
                region.write_all_at(bytes, at).expect("a memfd can be written");
            }
            _ => {
                host.put(poller.drain());
                let base = guest.stop_queue(0).expect("the queue was running");
                let base = if input.u8() & 1 == 0 { base } else { input.u16() };
                if guest.start_queue(0, base).is_err() {
                    // The in-flight region is of a version that nobody knows.
                    assert!(guest.inflight_file().is_some(), "a ring that was good is refused");
                    return;
                }
                poller = Poller::new(host.take().expect("the ring is complete"), size.into());
            }
        }
    }
    while poller.pop() {}
    host.put(poller.drain());
}

fn put_available(guest: &Guest, available: &mut u16, head: u16, size: u16) {
    let place = guest.place(0).available;
    guest.ram.put_u16(place + 4 + 2 * usize::from(*available % size), head);
    *available = available.wrapping_add(1);
    guest.ram.put_u16(place + 2, *available);
}

/// Header, data and status from `head` on, with one thing in it as the input likes.
fn chain(guest: &Guest, input: &mut Input<'_>, head: u16, size: u16) {
    let spare = guest.spare();
    let at = spare + usize::from(head) * 1024;
    let kinds = [0u32, 1, 4, 8, 11, 13, 2, 0xdead];
    let (kind, shape) = (input.pick(&kinds), input.u8());
    let sector = if shape & 1 == 0 { u64::from(input.u8()) } else { input.u64() };
    guest.ram.put(at, &[kind.to_le_bytes(), [0; 4]].concat());
    guest.ram.put(at + 8, &sector.to_le_bytes());
    let length = if shape & 2 == 0 { 512 } else { input.u32() };
    let data_flags = if matches!(kind, 0 | 8) { 2 } else { 0 };
    let descriptors = [(at, 16, 0u16), (at + 16, length, data_flags), (at + 900, 1, 2)];
    let indirect = shape & 4 != 0;
    let table = if indirect { at + 704 } else { guest.place(0).descriptors };
    for (number, (place, length, flags)) in (0u16..).zip(descriptors) {
        let index = if indirect { number } else { head.wrapping_add(number) % size };
        let following = if indirect { number + 1 } else { index.wrapping_add(1) % size };
        let next = if number < 2 { 1 } else { 0 };
        let descriptor = Descriptor {
            address: RAM_GUEST + place as u64,
            length,
            flags: flags | next,
            next: following,
        };
        guest.put_descriptor_at(table, index, descriptor);
    }
    if indirect {
        let length = if shape & 8 == 0 { 48 } else { input.u32() };
        let address = RAM_GUEST + table as u64;
        guest.put_descriptor(0, head, Descriptor { address, length, flags: 4, next: 0 });
    }
}

/// Any descriptor, in the ring's table or one of the places where indirect tables are.
fn put_descriptor(guest: &Guest, input: &mut Input<'_>, size: u16) {
    let shape = input.u8();
    let index = input.u16() % size;
    let end = RAM_GUEST + guest.ram.size() as u64;
    let address = match shape & 3 {
        0 => input.u64(),
        1 => end.wrapping_sub(input.u16().into()),
        2 => RAM_GUEST + u64::from(input.u16()),
        _ => RAM_GUEST + (guest.spare() + usize::from(index) * 1024 + 704) as u64,
    };
    let length = match shape >> 2 & 3 {
        0 => input.u32(),
        1 => 16 * u32::from(input.u8()),
        2 => input.u8().into(),
        _ => 512,
    };
    let (flags, next) = (u16::from(input.u8() & 7), input.u16());
    let next = if shape & 16 == 0 { next % size } else { next };
    let descriptor = Descriptor { address, length, flags, next };
    if shape & 32 == 0 {
        guest.put_descriptor(0, index, descriptor);
    } else {
        let table = guest.spare() + usize::from(index) * 1024 + 704;
        guest.put_descriptor_at(table, next % 8, descriptor);
    }
}
