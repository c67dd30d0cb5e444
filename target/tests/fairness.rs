//! Guests that share a reactor of the real daemon: what one of them gets does not depend on how many
//! queues another one has.
//!
//! Nothing here looks at a clock: how much of one guest's work was done is counted in requests of the
//! other. They are large, so that the reactor has to work on them and the guests only to ask again. Both
//! have as many in flight: with fewer it would count who of guest and reactor has the core when, and what
//! is done for such a guest is for the unit tests of `attach/shares.rs`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use bessel_tests::guest::{Guest, Options, Ticket, block};
use std::path::Path;
use support::World;

const QUEUES: u16 = 8;
const REQUEST: usize = 256 << 10;
/// Requests of a queue in flight, where there are eight of them.
const DEPTH: usize = 8;
/// Requests of the busy volume for which the other one's are counted.
const REQUESTS: u64 = 4000;

/// A guest that reads and reads.
struct Reader {
    guest: Guest,
    queues: usize,
    tickets: Vec<Ticket>,
    ended: u64,
}

impl Reader {
    fn new(world: &World, volume: &str, queues: u16, depth: usize) -> Self {
        let socket = world.path(&format!("{volume}.sock"));
        let options = Options { queues, data_max: REQUEST, ..Options::default() };
        let mut guest = Guest::connect(Path::new(&socket), options).unwrap();
        let mut tickets = Vec::new();
        for queue in 0..usize::from(queues) {
            for at in 0..depth {
                let sector = (at * REQUEST / 512) as u64;
                tickets.push(guest.submit(queue, block::IN, sector, &[], REQUEST));
            }
        }
        Self { guest, queues: queues.into(), tickets, ended: 0 }
    }

    /// Asks again for all that has been answered.
    fn go_on(&mut self) {
        for queue in 0..self.queues {
            while let Some(used) = self.guest.poll_used(queue) {
                let named = |it: &Ticket| (it.queue, it.head) == (queue, used.head);
                let place = self.tickets.iter().position(named).unwrap();
                let ticket = self.tickets.swap_remove(place);
                assert_eq!(self.guest.status(ticket), block::DONE);
                self.guest.release(ticket);
                self.tickets.push(self.guest.submit(queue, block::IN, 0, &[], REQUEST));
                self.ended += 1;
            }
            self.guest.kick(queue);
        }
    }
}

/// How many requests of a guest with one queue and so many in flight end, while `REQUESTS` do of one with
/// eight queues that has 64 in flight.
fn ended_beside_many_queues(tag: &str, depth: usize) -> u64 {
    let mut world = World::new(tag);
    let core = bessel_reactor::reactor::usable_cores()[0];
    let volume =
        |name, queues| format!("  - name: {name}\n    size: 64MiB\n    queues: {queues}\n");
    world.serve(&format!(
        "reactors:\n  cores: [{core}]\nvolumes:\n{}{}",
        volume("vm1", QUEUES),
        volume("vm2", 1)
    ));
    let mut busy = Reader::new(&world, "vm1", QUEUES, DEPTH);
    let mut other = Reader::new(&world, "vm2", 1, depth);
    // Both are at it before anything is counted.
    while busy.ended < 500 || other.ended < 50 {
        busy.go_on();
        other.go_on();
    }
    let before = (busy.ended, other.ended);
    while busy.ended - before.0 < REQUESTS {
        busy.go_on();
        other.go_on();
    }
    let ended = other.ended - before.1;
    world.end("-TERM");
    ended
}

#[test]
fn a_guest_with_many_queues_gets_no_more_than_one_with_one() {
    // As deep as all eight together. By queues it would have an eighth of what they have.
    let ended = ended_beside_many_queues("fair-deep", usize::from(QUEUES) * DEPTH);
    assert!(ended >= REQUESTS / 2, "{ended} requests beside {REQUESTS}");
}
