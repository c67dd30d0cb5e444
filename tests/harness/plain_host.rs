//! The simplest host of queues: one thread that does every request on a file, at once.
//!
//! Stands in for reactor and store where the guest's side is what is tested. It sleeps on kicks
//! when idle, pretends to be busy now and then so that requests are put back, and can hold
//! requests to keep them in flight.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::guest::{FrontEnd, Guest, Options};
use bessel_reactor::buffer::Segment;
use bessel_vhost::{
    BlockRequest, Connection, DiskInfo, Popped, Queue, QueueHost, RequestKind, Server,
    ServerHandle, Status,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Every so many requests, one is put back as if the volume were busy.
const PUT_BACK_EVERY: u64 = 5;

enum Control {
    Start(usize, Box<Queue>),
    Stop(usize, Sender<Box<Queue>>),
    Quit,
}

/// What the host was told, for tests to look at.
#[derive(Debug, Default)]
pub struct Journal {
    /// Cache modes set, in order.
    pub caches: Vec<bool>,
    /// Front-ends that have come.
    pub connected: u32,
    /// Front-ends that have gone.
    pub disconnected: u32,
}

/// See the module.
#[derive(Debug)]
pub struct PlainHost {
    controls: Mutex<Sender<Control>>,
    shared: Arc<Shared>,
    journal: Mutex<Journal>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    wake: EventFd,
    /// Requests from this sector on are held.
    hold_from: AtomicU64,
    /// Requests popped so far.
    popped: AtomicU64,
    disk: File,
}

/// A disk of zeroes that lives as long as its file.
pub fn memory_disk(sectors: u64) -> File {
    let file = File::from(memfd_create("disk", MFdFlags::MFD_CLOEXEC).expect("memfd"));
    file.set_len(sectors * 512).expect("memfd size");
    file
}

impl PlainHost {
    /// Serves `disk`.
    pub fn new(disk: File) -> Arc<Self> {
        let (sender, receiver) = channel();
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let wake = EventFd::from_value_and_flags(0, flags).expect("eventfd");
        let hold_from = AtomicU64::new(u64::MAX);
        let shared = Arc::new(Shared { wake, hold_from, popped: AtomicU64::new(0), disk });
        let poller =
            Poller { shared: shared.clone(), controls: receiver, queues: Vec::new(), turn: 0 };
        let thread = std::thread::spawn(move || poller.run());
        let thread = Mutex::new(Some(thread));
        Arc::new(Self { controls: Mutex::new(sender), shared, journal: Mutex::default(), thread })
    }

    /// Holds requests from `sector` on; `u64::MAX` lets all go.
    pub fn hold_from(&self, sector: u64) {
        self.shared.hold_from.store(sector, Ordering::SeqCst);
        self.shared.wake.write(1).expect("eventfd");
    }

    /// Requests that have reached the host so far, held ones included.
    pub fn popped(&self) -> u64 {
        self.shared.popped.load(Ordering::SeqCst)
    }

    /// The disk's bytes, behind the guest's back.
    pub fn disk(&self, sector: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.shared.disk.read_exact_at(&mut bytes, sector * 512).expect("inside the disk");
        bytes
    }

    /// What the host was told.
    pub fn journal(&self) -> std::sync::MutexGuard<'_, Journal> {
        self.journal.lock().expect("no test panics with it locked")
    }

    fn control(&self, control: Control) {
        let controls = self.controls.lock().expect("no sender panics");
        controls.send(control).expect("the thread runs until `drop`");
        self.shared.wake.write(1).expect("eventfd");
    }
}

impl Drop for PlainHost {
    fn drop(&mut self) {
        self.control(Control::Quit);
        let thread = self.thread.lock().expect("locked only here").take();
        let result = thread.expect("taken only here").join();
        assert!(result.is_ok() || std::thread::panicking(), "the host's thread panicked");
    }
}

impl QueueHost for PlainHost {
    fn start(&self, index: usize, queue: Queue) {
        self.control(Control::Start(index, Box::new(queue)));
    }

    fn stop(&self, index: usize) -> Queue {
        let (sender, receiver) = channel();
        self.control(Control::Stop(index, sender));
        *receiver.recv().expect("the thread answers")
    }

    fn set_cache(&self, writeback: bool) {
        self.journal().caches.push(writeback);
    }

    fn connected(&self, _connection: Connection) {
        self.journal().connected += 1;
    }

    fn disconnected(&self) {
        self.journal().disconnected += 1;
    }
}

/// A request that outlives its pop.
struct Held {
    head: u16,
    kind: RequestKind,
    sector: u64,
    sectors: u64,
    segments: Vec<Segment>,
}

struct Hosted {
    index: usize,
    queue: Box<Queue>,
    held: Vec<Held>,
    broken: bool,
}

struct Poller {
    shared: Arc<Shared>,
    controls: Receiver<Control>,
    queues: Vec<Hosted>,
    turn: u64,
}

impl Poller {
    fn run(mut self) {
        loop {
            while let Ok(control) = self.controls.try_recv() {
                match control {
                    Control::Start(index, mut queue) => {
                        queue.disable_kicks();
                        self.queues.push(Hosted { index, queue, held: Vec::new(), broken: false });
                    }
                    Control::Stop(index, answer) => {
                        let place = self.queues.iter().position(|hosted| hosted.index == index);
                        let hosted = self.queues.remove(place.expect("a queue that was started"));
                        answer.send(self.drain(hosted)).expect("the caller waits");
                    }
                    Control::Quit => return,
                }
            }
            if !self.turn() {
                self.sleep();
            }
        }
    }

    /// Serves what waits; false when nothing did.
    fn turn(&mut self) -> bool {
        let hold_from = self.shared.hold_from.load(Ordering::SeqCst);
        let mut progress = false;
        for hosted in &mut self.queues {
            let (ready, held) =
                hosted.held.drain(..).partition(|held: &Held| held.sector < hold_from);
            hosted.held = held;
            let ready: Vec<Held> = ready;
            for request in ready {
                let status = serve(&self.shared.disk, &request);
                hosted.queue.complete(request.head, status);
                progress = true;
            }
            while !hosted.broken {
                let request = match hosted.queue.pop() {
                    Popped::Empty => break,
                    Popped::Broken(_) => {
                        hosted.broken = true;
                        break;
                    }
                    Popped::Answered => {
                        progress = true;
                        continue;
                    }
                    Popped::Request(request) => own(request),
                };
                progress = true;
                self.turn += 1;
                if self.turn.is_multiple_of(PUT_BACK_EVERY) {
                    hosted.queue.put_back(request.head);
                    break;
                }
                self.shared.popped.fetch_add(1, Ordering::SeqCst);
                if request.sector >= hold_from {
                    hosted.held.push(request);
                } else {
                    let status = serve(&self.shared.disk, &request);
                    hosted.queue.complete(request.head, status);
                }
            }
            hosted.queue.publish();
        }
        progress
    }

    fn drain(&mut self, mut hosted: Hosted) -> Box<Queue> {
        for request in hosted.held.drain(..) {
            let status = serve(&self.shared.disk, &request);
            hosted.queue.complete(request.head, status);
        }
        if hosted.queue.has_put_back() {
            let Popped::Request(request) = hosted.queue.pop() else {
                panic!("a request that was put back comes out again");
            };
            let request = own(request);
            let status = serve(&self.shared.disk, &request);
            hosted.queue.complete(request.head, status);
        }
        hosted.queue.publish();
        hosted.queue
    }

    /// Sleeps until a kick or a control comes, unless something came meanwhile.
    fn sleep(&mut self) {
        let mut awake = self.queues.iter_mut().filter(|hosted| !hosted.broken);
        if awake.any(|hosted| hosted.queue.enable_kicks()) {
            return;
        }
        let wake = PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN);
        let kicks =
            self.queues.iter().map(|hosted| PollFd::new(hosted.queue.kick_fd(), PollFlags::POLLIN));
        let mut waits: Vec<_> = std::iter::once(wake).chain(kicks).collect();
        poll(&mut waits, PollTimeout::NONE).expect("poll");
        let _ = self.shared.wake.read();
        for hosted in &mut self.queues {
            hosted.queue.drain_kick();
            hosted.queue.disable_kicks();
        }
    }
}

fn own(request: BlockRequest<'_>) -> Held {
    let BlockRequest { head, kind, sector, sectors, segments } = request;
    Held { head, kind, sector: sector.get(), sectors, segments: segments.to_vec() }
}

fn serve(disk: &File, request: &Held) -> Status {
    let mut bytes = vec![0; (request.sectors * 512) as usize];
    let at = request.sector * 512;
    let result = match request.kind {
        RequestKind::Read => disk.read_exact_at(&mut bytes, at).map(|()| {
            each_part(request, |segment, part| segment.write(&bytes[part]));
        }),
        RequestKind::Write => {
            each_part(request, |segment, part| segment.read(&mut bytes[part]));
            disk.write_all_at(&bytes, at)
        }
        RequestKind::Discard | RequestKind::WriteZeroes { .. } => disk.write_all_at(&bytes, at),
        RequestKind::Flush => Ok(()),
    };
    if result.is_ok() { Status::Done } else { Status::IoError }
}

fn each_part(request: &Held, mut act: impl FnMut(&Segment, std::ops::Range<usize>)) {
    let mut done = 0;
    for segment in &request.segments {
        act(segment, done..done + segment.len());
        done += segment.len();
    }
    assert_eq!(done as u64, request.sectors * 512, "segments hold the sectors exactly");
}

/// An eventfd for tests that need a descriptor of the right kind.
pub fn eventfd() -> OwnedFd {
    let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
    EventFd::from_value_and_flags(0, flags).expect("eventfd").into()
}

/// Sectors of the disks served by [`PlainVolume::serve`].
pub const SECTORS: u64 = 4096;

/// A volume on a plain host, served on a socket of its own.
#[derive(Debug)]
pub struct PlainVolume {
    /// Where its front-end connects.
    pub socket: PathBuf,
    /// Who does its requests.
    pub host: Arc<PlainHost>,
    /// Its control thread; stops when dropped.
    pub server: ServerHandle,
}

/// A socket path of this process's own, short enough.
pub fn socket_path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("bessel-{}-{name}.sock", std::process::id()))
}

/// A writable disk with four queues.
pub fn disk_info() -> DiskInfo {
    DiskInfo {
        id: "volume-under-test".into(),
        capacity_sectors: SECTORS,
        read_only: false,
        num_queues: 4,
        queue_size_max: 32768,
        writeback: true,
    }
}

impl PlainVolume {
    /// Serves a disk of zeroes.
    pub fn serve(name: &str) -> Self {
        Self::serve_with(name, disk_info())
    }

    /// Serves a disk of zeroes with other properties.
    pub fn serve_with(name: &str, info: DiskInfo) -> Self {
        let socket = socket_path(name);
        let host = PlainHost::new(memory_disk(info.capacity_sectors));
        let server = Server::bind(&socket, info, host.clone()).expect("a path of our own");
        let server = server.spawn().expect("a thread");
        Self { socket, host, server }
    }

    /// A guest of it, with its queues started.
    pub fn guest(&self, options: Options) -> Guest {
        Guest::connect(&self.socket, options).expect("a front-end that behaves is served")
    }

    /// A front-end that has agreed on all features, and no more.
    pub fn front_end(&self) -> FrontEnd {
        let mut front_end = FrontEnd::connect(&self.socket).expect("the server listens");
        front_end.negotiate(u64::MAX).expect("what is offered can be acknowledged");
        front_end
    }
}
