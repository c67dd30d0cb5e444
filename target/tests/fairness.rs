//! Guests that share a reactor of the real daemon: what one of them gets does not depend on how many
//! queues another one has.
//!
//! Nothing here looks at a clock: how much of one guest's work was done is counted in requests of the
//! other. They are large, so that the reactor has to work on them and the guests only to ask again. Both
//! have as many in flight: with fewer it would count who of guest and reactor has the core when, and what
//! is done for such a guest is for the unit tests of `attach/shares.rs`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use support::World;
use support::reader::Reader;

const QUEUES: u16 = 8;
const REQUEST: usize = 256 << 10;
/// Requests of a queue in flight, where there are eight of them.
const DEPTH: usize = 8;
/// Requests of the busy volume for which the other one's are counted.
const REQUESTS: u64 = 4000;

#[test]
fn a_guest_with_many_queues_gets_no_more_than_one_with_one() {
    let mut world = World::new("fair");
    let core = bessel_reactor::reactor::usable_cores()[0];
    let volume =
        |name, queues| format!("  - name: {name}\n    size: 64MiB\n    queues: {queues}\n");
    world.serve(&format!(
        "reactors:\n  cores: [{core}]\nvolumes:\n{}{}",
        volume("vm1", QUEUES),
        volume("vm2", 1)
    ));
    let mut busy = Reader::new(&world, "vm1", QUEUES, DEPTH, REQUEST);
    let mut other = Reader::new(&world, "vm2", 1, usize::from(QUEUES) * DEPTH, REQUEST);
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
    // As deep as all eight together. By queues it would have an eighth of what they have.
    assert!(ended >= REQUESTS / 2, "{ended} requests beside {REQUESTS}");
}
