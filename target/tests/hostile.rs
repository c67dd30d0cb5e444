//! Front-ends and guests that behave badly towards the real daemon: what they can cost it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use bessel_tests::guest::{FrontEnd, Guest, Options, RAM_GUEST, block, flag, message};
use bessel_tests::plain_host::eventfd;
use nix::poll::{PollFd, PollFlags, poll};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use support::World;

const VM1: &str = "volumes:\n  - name: vm1\n    size: 1GiB\n    queues: 1\n";

#[test]
fn connecting_again_and_again_does_not_fill_the_log() {
    const TIMES: usize = 2000;
    let mut world = World::new("flood");
    world.serve(VM1);
    let socket = world.path("vm1.sock");
    for _ in 0..TIMES {
        let mut front_end = FrontEnd::connect(Path::new(&socket)).unwrap();
        front_end.negotiate(u64::MAX).unwrap();
    }
    world.end("-TERM");
    let log = std::fs::read_to_string(world.path("log")).unwrap();
    let lines = log.lines().filter(|line| line.contains("front-end ")).count();
    // A line of each kind for each second that it took, however slow this machine is.
    assert!((2..TIMES / 4).contains(&lines), "{lines} lines: {log:.2000}");
}

#[test]
fn breaking_the_ring_again_and_again_does_not_fill_the_log() {
    const TIMES: usize = 300;
    let mut world = World::new("broken");
    world.serve(VM1);
    let socket = world.path("vm1.sock");
    for _ in 0..TIMES {
        let mut guest = Guest::connect(Path::new(&socket), Options::default()).unwrap();
        let error = eventfd();
        let payload = 0u64.to_le_bytes();
        guest.front_end.tell(message::SET_VRING_ERR, &payload, &[error.as_fd()]).unwrap();
        // More requests are announced than the ring has room for.
        guest.ram.put_u16(guest.place(0).available + 2, 5000);
        guest.kick_hard(0);
        let mut wait = [PollFd::new(error.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut wait, 10_000u16).unwrap(), 1, "the queue is not stopped");
    }
    world.end("-TERM");
    let log = std::fs::read_to_string(world.path("log")).unwrap();
    let lines = log.lines().filter(|line| line.contains("queue stopped")).count();
    assert!((1..TIMES / 4).contains(&lines), "{lines} lines: {log:.2000}");
}

#[test]
fn a_volumes_socket_is_for_its_owner_and_group() {
    let mut world = World::new("mode");
    world.serve(VM1);
    let mode = std::fs::metadata(world.path("vm1.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
}

/// A guest that gives its pages back while its request is under way has itself to blame, not the
/// disk, whose errors wake people up.
#[test]
fn memory_that_went_away_is_no_error_of_the_device() {
    let mut world = World::new("pages");
    world.serve(VM1);
    let options = Options { regions: 2, ..Options::default() };
    let mut guest = Guest::connect(Path::new(&world.path("vm1.sock")), options).unwrap();
    assert_eq!(guest.write(0, 0, &[1; 4096]), block::DONE);
    // The second region holds the spare memory, the first the rings, the header and the status.
    let half = guest.ram.size() / 2;
    assert!(guest.spare() >= half);
    let (header, status) = (guest.place(0).used + 3072, guest.place(0).used + 3584);
    let gone = RAM_GUEST + (guest.ram.size() - 8192) as u64;
    for kind in [block::OUT, block::IN] {
        guest.ram.put(header, &[0; 16]);
        guest.ram.put(header, &kind.to_le_bytes());
        guest.ram.put_u8(status, block::PENDING);
        let write = if kind == block::IN { flag::WRITE } else { 0 };
        let at = |offset: usize| RAM_GUEST + offset as u64;
        let chain = [(at(header), 16, 0), (gone, 4096, write), (at(status), 1, flag::WRITE)];
        guest.put_chain(guest.place(0).descriptors, 40, &chain);
        nix::unistd::ftruncate(guest.ram.file(), half as i64).unwrap();
        guest.push(0, 40);
        guest.kick_hard(0);
        guest.wait_used(0);
        assert_eq!(guest.ram.u8(status), block::IO_ERROR, "request {kind}");
    }
    let stats = world.json("stats");
    assert_eq!(stats["reactors"][0]["device_errors"], 0, "{stats}");
    let log = std::fs::read_to_string(world.path("log")).unwrap();
    assert!(!log.contains("ERROR"), "{log}");
}
