//! Guests that write, flush, and check all that they read, on every queue of their volumes.

use super::{World, tell};
use bessel_reactor::device::sim::Random;
use bessel_tests::guest::{BaseAfterReconnect, Guest, Options, Ticket, Used, block};
use serde_json::Value;
use std::path::Path;

pub(crate) const BLOCK: usize = 4096;
/// Blocks that are worked on: in several leaves, so that there are nodes to commit.
pub(crate) const BLOCKS: u64 = 2048;
/// Blocks from one that is worked on to the next.
pub(crate) const STRIDE: u64 = 7;
/// Queues of each volume.
pub(crate) const QUEUES: u16 = 2;
/// Requests of a guest in flight.
pub(crate) const DEPTH: usize = 16;

/// Two cores to serve from; none when this machine has one.
pub(crate) fn cores(test: &str) -> Option<[usize; 2]> {
    match bessel_reactor::reactor::usable_cores()[..] {
        [one, other, ..] => Some([one, other]),
        _ => {
            tell(&format!("test {test} ... skipped: it takes two cores"));
            None
        }
    }
}

/// Two volumes on two reactors, which are not moved but by hand; more about reactors and about each volume.
pub(crate) fn configuration(cores: [usize; 2], reactors: &str, volume: &str) -> String {
    let mut text = format!("reactors:\n  cores: {cores:?}\n  balance: off\n{reactors}volumes:\n");
    for (name, cache) in [("vm1", "writeback"), ("vm2", "writethrough")] {
        text.push_str(&format!(
            "  - name: {name}\n    size: 64MiB\n    queues: {QUEUES}\n    cache: {cache}\n{volume}"
        ));
    }
    text
}

/// A world whose store has room for what snapshots hold.
pub(crate) fn roomy(tag: &str) -> World {
    let world = World::new(tag);
    world.text(&format!("format {} --size 1GiB --extent-size 4MiB", world.store));
    world
}

/// What a volume says of itself.
pub(crate) fn shown(world: &World, volume: &str) -> Value {
    world.json(&format!("volume show {volume}"))
}

pub(crate) enum Work {
    Write,
    Flush,
    Read { block: u64, expected: u64 },
}

pub(crate) struct Flight {
    ticket: Ticket,
    work: Work,
}

/// A guest that writes, flushes, and knows what it has to read.
pub(crate) struct Load {
    pub(crate) guest: Guest,
    pub(crate) random: Random,
    /// What each block holds once its write has ended: 0 for zeroes.
    pub(crate) versions: Vec<u64>,
    /// Blocks with a request in flight.
    pub(crate) taken: Vec<bool>,
    pub(crate) flights: Vec<(Flight, Option<u64>)>,
    pub(crate) ended: u64,
    /// Flush now and then.
    pub(crate) flushes: bool,
    pub(crate) errors: Vec<String>,
}

pub(crate) fn contents(block: u64, version: u64) -> Vec<u8> {
    if version == 0 {
        return vec![0; BLOCK];
    }
    [block, version].map(u64::to_le_bytes).concat().repeat(BLOCK / 16)
}

pub(crate) fn connect(world: &World, volume: &str) -> Guest {
    let socket = world.path(&format!("{volume}.sock"));
    let options = Options { queues: QUEUES, inflight: true, ..Options::default() };
    Guest::connect(Path::new(&socket), options).unwrap()
}

impl Load {
    pub(crate) fn new(world: &World, volume: &str, seed: u64) -> Self {
        Self {
            guest: connect(world, volume),
            random: Random::new(seed),
            versions: vec![0; BLOCKS as usize],
            taken: vec![false; BLOCKS as usize],
            flights: Vec::new(),
            ended: 0,
            flushes: true,
            errors: Vec::new(),
        }
    }

    fn submit(&mut self) {
        let queue = self.random.below(QUEUES.into()) as usize;
        if self.guest.room(queue) == 0 {
            return;
        }
        if self.random.chance(1, 20) && self.flushes {
            let ticket = self.guest.submit(queue, block::FLUSH, 0, &[], 0);
            self.guest.kick(queue);
            self.flights.push((Flight { ticket, work: Work::Flush }, None));
            return;
        }
        let at = self.random.below(BLOCKS);
        if std::mem::replace(&mut self.taken[at as usize], true) {
            return;
        }
        let sector = at * STRIDE * 8;
        let version = &mut self.versions[at as usize];
        let (ticket, work) = if self.random.chance(2, 3) {
            *version += 1;
            let bytes = contents(at, *version);
            (self.guest.submit(queue, block::OUT, sector, &bytes, 0), Work::Write)
        } else {
            let work = Work::Read { block: at, expected: *version };
            (self.guest.submit(queue, block::IN, sector, &[], BLOCK), work)
        };
        self.guest.kick(queue);
        self.flights.push((Flight { ticket, work }, Some(at)));
    }

    fn end(&mut self, queue: usize, used: Used) {
        let named = |(flight, _): &(Flight, Option<u64>)| {
            (flight.ticket.queue, flight.ticket.head) == (queue, used.head)
        };
        let place = self.flights.iter().position(named).expect("each request is answered once");
        let (Flight { ticket, work }, taken) = self.flights.remove(place);
        if let Some(at) = taken {
            self.taken[at as usize] = false;
        }
        let status = self.guest.status(ticket);
        if status != block::DONE {
            self.errors.push(format!("a request ended with status {status}"));
        }
        if let Work::Read { block, expected } = work {
            let found = self.guest.data(ticket, BLOCK);
            if found != contents(block, expected) {
                let of = u64::from_le_bytes(found[..8].try_into().unwrap());
                let version = u64::from_le_bytes(found[8..16].try_into().unwrap());
                self.errors.push(format!(
                    "block {block} holds version {version} of block {of}, not {expected}"
                ));
            }
        }
        self.guest.release(ticket);
        self.ended += 1;
    }

    fn poll(&mut self) -> bool {
        let before = self.ended;
        for queue in 0..usize::from(QUEUES) {
            while let Some(used) = self.guest.poll_used(queue) {
                self.end(queue, used);
            }
        }
        self.ended > before
    }

    fn wait(&mut self) {
        if let Some((flight, _)) = self.flights.first() {
            let queue = flight.ticket.queue;
            let used = self.guest.wait_used(queue);
            self.end(queue, used);
        }
    }

    /// Goes on until so many more requests have ended.
    pub(crate) fn work(&mut self, count: u64) {
        let end = self.ended + count;
        while self.ended < end {
            while self.flights.len() < DEPTH {
                self.submit();
            }
            if !self.poll() {
                self.wait();
            }
        }
    }

    /// Writes each block, which nothing is in flight for.
    pub(crate) fn write_everything(&mut self) {
        self.settle();
        for at in 0..BLOCKS {
            self.versions[at as usize] += 1;
            let bytes = contents(at, self.versions[at as usize]);
            let queue = (at % u64::from(QUEUES)) as usize;
            let ticket = self.guest.submit(queue, block::OUT, at * STRIDE * 8, &bytes, 0);
            self.guest.kick(queue);
            self.guest.wait_used(queue);
            assert_eq!(self.guest.status(ticket), block::DONE);
            self.guest.release(ticket);
        }
    }

    pub(crate) fn settle(&mut self) {
        while !self.flights.is_empty() {
            if !self.poll() {
                self.wait();
            }
        }
    }

    /// Reads everything, and compares.
    pub(crate) fn verify(&mut self, log: impl Fn() -> String) {
        self.settle();
        for at in 0..BLOCKS {
            let (status, found) = self.guest.read(0, at * STRIDE * 8, BLOCK);
            assert_eq!(status, block::DONE, "{}", log());
            let version = self.versions[at as usize];
            assert!(found == contents(at, version), "block {at}, version {version}: {}", log());
        }
        assert!(self.errors.is_empty(), "{:?}: {}", self.errors, log());
    }
}

/// Runs a command while guests go on.
pub(crate) fn under_load(world: &World, loads: &mut [Load], command: &str) {
    let mut running = world.spawn(command);
    while running.try_wait().unwrap().is_none() {
        loads.iter_mut().for_each(|load| load.work(4));
    }
    let output = running.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {error}\n{}", world.log());
}

/// Starts a daemon again that was killed, under guests that stay, and sees that nothing is lost.
pub(crate) fn serve_again(
    world: &mut World,
    config: &str,
    loads: &mut [Load; 2],
    names: [&str; 2],
    random: &mut Random,
) {
    world.serve(config);
    for (load, name) in loads.iter_mut().zip(names) {
        let socket = world.path(&format!("{name}.sock"));
        let base = *random.pick(&[BaseAfterReconnect::Used, BaseAfterReconnect::Available]);
        load.guest.reconnect(Path::new(&socket), base).unwrap();
        load.verify(|| world.log());
    }
}
