//! A front-end that sends anything: messages in any order, with any payload and any descriptors,
//! while it changes and truncates the memory it has lent.
//!
//! One server serves all inputs, one connection each, so whatever a connection leaves behind harms
//! the next one. The host does every request at once, on the control thread, when a queue starts
//! and when it stops: one input is one run.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::Duration;

use bessel_vhost::{
    BlockRequest, DiskInfo, Popped, Queue, QueueHost, RequestKind, Server, ServerHandle, Status,
};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use super::input::Input;
use crate::guest::{FrontEnd, Guest, Options, RAM_GUEST, RAM_USER, message, state, words};
use crate::plain_host::{disk_info, eventfd, memory_disk, socket_path};

/// Bytes of guest memory.
const RAM: u64 = 64 << 10;
/// Messages and other things that one input does.
const STEPS_MAX: usize = 100;
/// How long the server may take to be done with a connection: it only ends a hang.
const DEADLINE: Duration = Duration::from_secs(30);

/// A server whose socket has no name any more: nothing is left behind when the process ends.
pub(super) struct Hidden {
    server: ServerHandle,
    socket: OwnedFd,
}

impl Hidden {
    pub(super) fn serve(name: &str, info: DiskInfo, host: Arc<dyn QueueHost>) -> Self {
        let path = socket_path(name);
        let server = Server::bind(&path, info, host).expect("a path of our own");
        let server = server.spawn().expect("a thread");
        let socket = open(&path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
        let socket = socket.expect("it was just made");
        std::fs::remove_file(&path).expect("it is ours");
        Self { server, socket }
    }

    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.socket.as_raw_fd()).into()
    }

    pub(super) fn guest(&self, options: Options) -> Guest {
        Guest::connect(&self.path(), options).expect("a front-end that behaves is served")
    }
}

/// What every request must be, whatever the guest did. Touches its memory.
pub(super) fn check_request(request: &BlockRequest<'_>, ranges: &[(usize, usize)], capacity: u64) {
    let (first, sectors) = (request.sector.get(), request.sectors);
    assert!(first.checked_add(sectors).is_some_and(|end| end <= capacity), "{request:?}");
    let mut bytes = 0;
    for segment in request.segments {
        let start = segment.as_ptr() as usize;
        let inside = |&(base, length): &(usize, usize)| {
            start >= base && segment.len() <= length && start - base <= length - segment.len()
        };
        assert!(ranges.iter().any(inside), "{request:?} is outside guest memory");
        assert!(!segment.is_empty(), "{request:?}");
        let last = segment.part(segment.len() - 1, 1);
        last.read(&mut [0]);
        if request.kind == RequestKind::Read {
            last.write(&[0xa5]);
        }
        bytes += segment.len() as u64;
    }
    match request.kind {
        RequestKind::Read | RequestKind::Write => {
            assert_eq!(bytes, sectors * 512, "{request:?}");
        }
        _ => assert!(request.segments.is_empty(), "{request:?}"),
    }
}

/// Does every request at once.
#[derive(Default)]
struct AtOnce {
    queues: Mutex<Vec<Option<Queue>>>,
    /// Front-ends that have gone.
    gone: Mutex<u64>,
    went: Condvar,
}

impl AtOnce {
    fn serve(queue: &mut Queue) {
        let ranges: Vec<_> =
            queue.memory_ranges().map(|range| (range.as_ptr() as usize, range.len())).collect();
        // The volume may have been larger when the queue last looked.
        let capacity = CAPACITIES.into_iter().max().expect("there are some");
        for turn in 0..64u32 {
            let (head, again) = match queue.pop() {
                Popped::Empty | Popped::Broken(_) => break,
                Popped::Answered => continue,
                Popped::Request(request) => {
                    check_request(&request, &ranges, capacity);
                    (request.head, turn % 5 == 4)
                }
            };
            if again {
                queue.put_back(head);
                break;
            }
            queue.complete(head, Status::Done);
        }
        queue.publish();
    }
}

impl QueueHost for AtOnce {
    fn start(&self, index: usize, mut queue: Queue) {
        queue.disable_kicks();
        Self::serve(&mut queue);
        queue.enable_kicks();
        let mut queues = self.queues.lock().expect("no holder panics");
        if queues.len() <= index {
            queues.resize_with(index + 1, || None);
        }
        assert!(queues[index].replace(queue).is_none(), "queue {index} was started twice");
    }

    fn stop(&self, index: usize) -> Queue {
        let mut queues = self.queues.lock().expect("no holder panics");
        let mut queue = queues[index].take().expect("only a queue that was started is stopped");
        queue.drain_kick();
        Self::serve(&mut queue);
        if queue.has_put_back() {
            let Popped::Request(request) = queue.pop() else {
                panic!("what was put back comes out again");
            };
            let head = request.head;
            queue.complete(head, Status::IoError);
            queue.publish();
        }
        queue
    }

    fn set_cache(&self, _writeback: bool) {}

    fn disconnected(&self) {
        let queues = self.queues.lock().expect("no holder panics");
        assert!(queues.iter().all(Option::is_none), "a queue runs without a front-end");
        *self.gone.lock().expect("no holder panics") += 1;
        self.went.notify_all();
    }
}

/// Sizes that the volume has.
const CAPACITIES: [u64; 3] = [1, 4096, 1 << 40];

fn server() -> &'static (Hidden, Arc<AtOnce>) {
    static SERVER: OnceLock<(Hidden, Arc<AtOnce>)> = OnceLock::new();
    SERVER.get_or_init(|| {
        let host = Arc::<AtOnce>::default();
        let info = DiskInfo { num_queues: 3, queue_size_max: 1024, ..disk_info() };
        (Hidden::serve("fuzz-messages", info, host.clone()), host)
    })
}

/// Descriptors that a front-end may send.
struct Files {
    ram: File,
    kick: OwnedFd,
    inflight: File,
    pair: (UnixStream, UnixStream),
    null: File,
}

impl Files {
    fn new() -> Self {
        Self {
            ram: memory_disk(RAM / 512),
            kick: eventfd(),
            inflight: memory_disk(16),
            pair: UnixStream::pair().expect("a pair of sockets"),
            null: File::open("/dev/null").expect("every machine has it"),
        }
    }

    fn pick(&self, input: &mut Input<'_>) -> BorrowedFd<'_> {
        match input.below(8) {
            0..=2 => self.ram.as_fd(),
            3 | 4 => self.kick.as_fd(),
            5 => self.inflight.as_fd(),
            6 => self.pair.0.as_fd(),
            _ => self.null.as_fd(),
        }
    }
}

/// The target; see the module's documentation.
pub fn vhost_messages(data: &[u8]) {
    let (server, host) = server();
    let gone = *host.gone.lock().expect("no holder panics");
    let mut front_end = FrontEnd::connect(&server.path()).expect("the server listens");
    let files = Files::new();
    let mut input = Input::new(data);
    for _ in 0..STEPS_MAX {
        if input.is_empty() || step(server, &front_end, &files, &mut input).is_err() {
            break; // It was refused, and the connection with it.
        }
    }
    front_end.hang_up();
    front_end.wait_for_hangup();
    let now = host.gone.lock().expect("no holder panics");
    let waited = host.went.wait_timeout_while(now, DEADLINE, |now| *now == gone);
    let (now, result) = waited.expect("no holder panics");
    assert!(!result.timed_out(), "the server is not done with the connection, or has died");
    assert_eq!(*now, gone + 1);
    server.server.set_capacity(CAPACITIES[1]);
}

fn step(
    server: &Hidden,
    front_end: &FrontEnd,
    files: &Files,
    input: &mut Input<'_>,
) -> std::io::Result<()> {
    match input.below(16) {
        0 => {
            let request = u32::from(input.u8() % 48);
            let count = input.below(80);
            let payload = input.bytes(count);
            let count = input.pick(&[0, 0, 1, 1, 2, 9, 40]);
            let sent: Vec<_> = (0..count).map(|_| files.pick(input)).collect();
            front_end.send(request, input.u8() & 1 == 1, payload, &sent)
        }
        1 => {
            let count = 1 + input.below(64);
            front_end.send_bytes(input.bytes(count).get(..).unwrap_or(&[0]), &[])
        }
        2 => bring_up(front_end, files, input.below(3) as u32, input),
        3 => files.ram.write_all_at(
            {
                let count = 1 + input.below(32);
                input.bytes(count)
            },
            u64::from(input.u16()),
        ),
        4 => request(files, input),
        5 => {
            // Larger again as well: the pages come back, the mapping does not.
            let size = input.pick(&[0, 4096, RAM / 2, RAM]);
            files.ram.set_len(size)
        }
        6 => {
            let value: u64 = input.u64().min(u64::MAX - 1);
            let _ = nix::unistd::write(&files.kick, &value.to_le_bytes());
            Ok(())
        }
        7 => {
            server.server.set_capacity(input.pick(&CAPACITIES));
            Ok(())
        }
        _ => shaped(front_end, files, input),
    }
}

/// A message of the right shape.
fn shaped(front_end: &FrontEnd, files: &Files, input: &mut Input<'_>) -> std::io::Result<()> {
    use message as m;
    let ack = input.u8() & 1 == 1;
    let ring = input.below(4) as u32;
    let none: &[BorrowedFd<'_>] = &[];
    let send = |request, payload: &[u8], files: &[BorrowedFd<'_>]| {
        front_end.send(request, ack, payload, files)
    };
    match input.below(24) {
        0 => send(m::GET_FEATURES, &[], none),
        1 => send(m::SET_FEATURES, &words(&[features(input)]), none),
        2 => send(m::SET_PROTOCOL_FEATURES, &words(&[protocol(input)]), none),
        3 => {
            let count = 1 + input.below(3);
            let mut payload = words(&[count as u64]);
            let mut sent = Vec::new();
            for index in 0..count as u64 {
                payload.extend(words(&region(input, index)));
                sent.push(if input.u8() < 250 { files.ram.as_fd() } else { files.pick(input) });
            }
            send(m::SET_MEM_TABLE, &payload, &sent)
        }
        4 => {
            let payload = [words(&[0]), words(&region(input, 0))].concat();
            let file = if input.u8() < 250 { files.ram.as_fd() } else { files.pick(input) };
            send(m::ADD_MEM_REG, &payload, &[file])
        }
        5 => {
            let payload = [words(&[0]), words(&region(input, 0))].concat();
            send(m::REM_MEM_REG, &payload, none)
        }
        6 => send(m::SET_VRING_NUM, &state(ring, input.pick(&[0, 1, 4, 16, 256, 1024])), none),
        7 => {
            let mut payload = state(ring, 0);
            let user = |input: &mut Input<'_>| RAM_USER + u64::from(input.u16() & !15);
            payload.extend(words(&[user(input), user(input), user(input), 0]));
            send(m::SET_VRING_ADDR, &payload, none)
        }
        8 => send(m::SET_VRING_BASE, &state(ring, input.u16().into()), none),
        9 => send(m::GET_VRING_BASE, &state(ring, 0), none),
        10..=12 => {
            let request = input.pick(&[m::SET_VRING_KICK, m::SET_VRING_CALL, m::SET_VRING_ERR]);
            match input.below(8) {
                0 => send(request, &words(&[u64::from(ring) | 1 << 8]), none),
                1 => send(request, &words(&[ring.into()]), &[files.pick(input)]),
                _ => send(request, &words(&[ring.into()]), &[files.kick.as_fd()]),
            }
        }
        13 => send(m::SET_VRING_ENABLE, &state(ring, (input.u8() & 1).into()), none),
        14 => {
            let range = [input.u8().into(), u32::from(input.u8()), 0];
            let payload = [range.map(u32::to_le_bytes).concat(), vec![0; range[1] as usize]];
            send(m::GET_CONFIG, &payload.concat(), none)
        }
        15 => {
            let payload = [32u32, 1, 0].map(u32::to_le_bytes).concat();
            send(m::SET_CONFIG, &[payload, vec![input.u8() & 3]].concat(), none)
        }
        16 => send(m::GET_INFLIGHT_FD, &inflight(input), none),
        17 => send(m::SET_INFLIGHT_FD, &inflight(input), &[files.inflight.as_fd()]),
        18 => send(m::RESET_DEVICE, &[], none),
        19 => send(m::SET_STATUS, &words(&[input.u8().into()]), none),
        20 => send(m::SET_BACKEND_REQ_FD, &[], &[files.pair.0.as_fd()]),
        21 => send(m::GET_STATUS, &[], none),
        22 => {
            files.inflight.write_all_at(&input.u64().to_le_bytes(), u64::from(input.u16() % 8000))
        }
        _ => send(m::GET_QUEUE_NUM, &[], none),
    }
}

/// All bits that are offered, or some of them, or any.
fn features(input: &mut Input<'_>) -> u64 {
    let offered = 0x1_7000_7e46;
    match input.below(3) {
        0 => offered,
        1 => offered & input.u64(),
        _ => input.u64(),
    }
}

fn protocol(input: &mut Input<'_>) -> u64 {
    if input.u8() < 200 { u64::from(input.u32() & 0x1ffff) } else { input.u64() }
}

/// A part of RAM, or nearly one.
fn region(input: &mut Input<'_>, index: u64) -> [u64; 4] {
    let part = RAM / 4;
    let at = index * part;
    let mut region = [RAM_GUEST + at, part, RAM_USER + at, at];
    if index == 0 && input.u8() & 1 == 0 {
        region[1] = RAM;
    }
    let change = input.u8();
    if change & 1 != 0 {
        let field = usize::from(change >> 1 & 3);
        region[field] = match change >> 3 & 3 {
            0 => input.u64(),
            1 => region[field].wrapping_add(input.u16().into()),
            2 => 0,
            _ => u64::MAX - u64::from(input.u8()),
        };
    }
    region
}

fn inflight(input: &mut Input<'_>) -> Vec<u8> {
    let size = input.pick(&[8192u64, 4096, 0, 1 << 40]);
    let mut payload = words(&[size, u64::from(input.u8())]);
    payload.extend(input.pick(&[3u16, 1, 0, 64]).to_le_bytes());
    payload.extend(input.pick(&[16u16, 64, 0, 1024]).to_le_bytes());
    payload.extend([0; 4]);
    payload
}

/// Where the parts of a ring of 16 lie, in a page for each ring.
fn ring_at(ring: u32) -> [u64; 3] {
    let page = 4096 * (1 + u64::from(ring));
    [page, page + 1024, page + 512]
}

/// A ring set up as it should be.
fn bring_up(
    front_end: &FrontEnd,
    files: &Files,
    ring: u32,
    input: &mut Input<'_>,
) -> std::io::Result<()> {
    let ways = input.u8();
    let none: &[BorrowedFd<'_>] = &[];
    if ways & 1 == 0 {
        let table = words(&[1, RAM_GUEST, RAM, RAM_USER, 0]);
        front_end.send(message::SET_FEATURES, false, &words(&[0x1_7000_7e46]), none)?;
        front_end.send(message::SET_MEM_TABLE, false, &table, &[files.ram.as_fd()])?;
    }
    let [descriptors, used, available] = ring_at(ring).map(|at| RAM_USER + at);
    let addresses = [state(ring, 0), words(&[descriptors, used, available, 0])].concat();
    front_end.send(message::SET_VRING_NUM, false, &state(ring, 16), none)?;
    front_end.send(message::SET_VRING_ADDR, false, &addresses, none)?;
    let (index, kick) = (words(&[ring.into()]), [files.kick.as_fd()]);
    front_end.send(message::SET_VRING_CALL, false, &index, &kick)?;
    front_end.send(message::SET_VRING_KICK, false, &index, &kick)?;
    front_end.send(message::SET_VRING_ENABLE, false, &state(ring, 1), none)
}

/// A request in a ring, as a guest makes it.
fn request(files: &Files, input: &mut Input<'_>) -> std::io::Result<()> {
    let [descriptors, _, available] = ring_at(input.below(3) as u32);
    let kind = input.pick(&[0u32, 1, 4, 8, 11, 13]);
    let data = input.pick(&[512u32, 16, 0, 20, 4096, u32::MAX]);
    let header = [words(&[kind.into()]), words(&[input.u8().into()])].concat();
    let place = u64::from(input.u16());
    files.ram.write_all_at(&header, place.min(RAM - 16))?;
    let flags: [u64; 3] = [1, 1 | u64::from(input.u8() & 6), 2];
    let lengths = [16, data, 1].map(u64::from);
    for (number, (flags, length)) in (0u64..).zip(flags.into_iter().zip(lengths)) {
        let rest = length | flags << 32 | (number + 1) << 48;
        let descriptor = words(&[RAM_GUEST + place + number * 16, rest]);
        files.ram.write_all_at(&descriptor, descriptors + number * 16)?;
    }
    let index = u16::from(input.u8());
    files.ram.write_all_at(&index.to_le_bytes(), available + 2)?;
    Ok(())
}
