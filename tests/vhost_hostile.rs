//! Guests and front-ends that lie, and what it costs them: an error status, a stopped queue or a
//! dropped connection. Never a crash, never a hang, never anybody else's data or service.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use bessel_tests::guest::{
    Descriptor, FrontEnd, Guest, Options, RAM_GUEST, RAM_USER, block, feature, flag, message,
    range, state, words,
};
use bessel_tests::plain_host::{PlainVolume, SECTORS, eventfd};
use nix::poll::{PollFd, PollFlags, poll};
use nix::unistd::ftruncate;

/// A volume to attack, and another whose guest must never notice.
struct Attack {
    victim: PlainVolume,
    bystander: PlainVolume,
    neighbour: Guest,
    round: u8,
}

impl Attack {
    fn new(name: &str) -> Self {
        let bystander = PlainVolume::serve(&format!("{name}-bystander"));
        let neighbour = bystander.guest(Options::default());
        Self { victim: PlainVolume::serve(name), bystander, neighbour, round: 0 }
    }

    /// Both volumes serve well-behaved guests, and the victim's disk is untouched.
    fn assert_unharmed(&mut self, after: &str) {
        self.round += 1;
        let bytes = [self.round; 512];
        assert_eq!(self.neighbour.write(0, 9, &bytes), block::DONE, "bystander after {after}");
        assert_eq!(self.neighbour.read(0, 9, 512).1, bytes, "bystander after {after}");
        let mut guest = self.victim.guest(Options::default());
        let status = guest.write(0, SECTORS - 1, &bytes);
        assert_eq!(status, block::DONE, "the volume after {after}");
        assert_eq!(guest.read(0, SECTORS - 1, 512).1, bytes, "the volume after {after}");
        let rest = self.victim.host.disk(0, (SECTORS as usize - 1) * 512);
        assert!(rest.iter().all(|byte| *byte == 0), "the disk after {after}");
        assert_eq!(self.bystander.host.journal().connected, 1, "the bystander after {after}");
    }
}

/// What a bad chain comes to.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Outcome {
    /// This status byte, at offset 256 of the spare memory.
    Status(u8),
    /// A used element of no bytes.
    Nothing,
}

const DATA: usize = 1024;
const STATUS: usize = 256;
const TABLE: usize = 8192;

/// The spare memory of a guest, as guest addresses.
fn at(guest: &Guest, offset: usize) -> u64 {
    RAM_GUEST + (guest.spare() + offset) as u64
}

type Link = (u64, u32, u16);

struct BadChain {
    name: &'static str,
    kind: u32,
    sector: u64,
    chain: fn(&Guest) -> Vec<Link>,
    outcome: Outcome,
}

fn usual(guest: &Guest, data: u32, flags: u16) -> Vec<Link> {
    vec![(at(guest, 0), 16, 0), (at(guest, DATA), data, flags), (at(guest, STATUS), 1, flag::WRITE)]
}

fn with_range(guest: &Guest, sector: u64, sectors: u32, flags: u32) -> Vec<Link> {
    guest.ram.put(guest.spare() + DATA, &range(sector, sectors, flags));
    usual(guest, 16, 0)
}

const IO_ERROR: Outcome = Outcome::Status(block::IO_ERROR);
const UNSUPPORTED: Outcome = Outcome::Status(block::UNSUPPORTED);
const OUTSIDE: u64 = 0x1_0000_0000_0000;

macro_rules! bad {
    ($name:literal, $kind:expr, $sector:expr, $outcome:expr, $chain:expr) => {
        BadChain { name: $name, kind: $kind, sector: $sector, outcome: $outcome, chain: $chain }
    };
}

fn bad_chains() -> Vec<BadChain> {
    use block::{DISCARD, FLUSH, GET_ID, IN, OUT, WRITE_ZEROES};
    use flag::WRITE;
    vec![
        bad!("read past the end", IN, SECTORS, IO_ERROR, |g| usual(g, 512, WRITE)),
        bad!("read over the end", IN, SECTORS - 1, IO_ERROR, |g| usual(g, 1024, WRITE)),
        bad!("write past the end", OUT, SECTORS, IO_ERROR, |g| usual(g, 512, 0)),
        bad!("write at 2^55, which wraps in bytes", OUT, 1 << 55, IO_ERROR, |g| usual(g, 512, 0)),
        bad!("write at the last sector there is", OUT, u64::MAX, IO_ERROR, |g| usual(g, 512, 0)),
        bad!("read of part of a sector", IN, 0, IO_ERROR, |g| usual(g, 511, WRITE)),
        bad!("write of part of a sector", OUT, 0, IO_ERROR, |g| usual(g, 513, 0)),
        bad!("write in the wrong direction", OUT, 0, IO_ERROR, |g| {
            usual(g, 500, WRITE).into_iter().chain([(at(g, 600), 3, 0)]).collect()
        }),
        bad!("unknown type", 0xdead, 0, UNSUPPORTED, |g| usual(g, 512, WRITE)),
        bad!("SCSI", 2, 0, UNSUPPORTED, |g| usual(g, 512, WRITE)),
        bad!("secure erase", 14, 0, UNSUPPORTED, |g| with_range(g, 0, 8, 0)),
        bad!("name without a buffer", GET_ID, 0, IO_ERROR, |g| {
            vec![(at(g, 0), 16, 0), (at(g, STATUS), 1, WRITE)]
        }),
        bad!("discard past the end", DISCARD, 0, IO_ERROR, |g| with_range(g, SECTORS, 1, 0)),
        bad!("discard that wraps", DISCARD, 0, IO_ERROR, |g| with_range(g, u64::MAX - 3, 8, 0)),
        bad!("discard over the limit", DISCARD, 0, IO_ERROR, |g| with_range(g, 0, u32::MAX, 0)),
        bad!("discard with unmap", DISCARD, 0, UNSUPPORTED, |g| with_range(g, 0, 8, 1)),
        bad!("zeroes with odd flags", WRITE_ZEROES, 0, UNSUPPORTED, |g| with_range(g, 0, 8, 6)),
        bad!("zeroes past the end", WRITE_ZEROES, 0, IO_ERROR, |g| with_range(g, SECTORS, 1, 1)),
        bad!("discard of no range", DISCARD, 0, IO_ERROR, |g| {
            vec![(at(g, 0), 16, 0), (at(g, STATUS), 1, WRITE)]
        }),
        bad!("discard of two ranges", DISCARD, 0, UNSUPPORTED, |g| usual(g, 32, 0)),
        bad!("discard of half a range", DISCARD, 0, IO_ERROR, |g| usual(g, 15, 0)),
        bad!("short header", IN, 0, IO_ERROR, |g| {
            vec![(at(g, 0), 15, 0), (at(g, STATUS), 1, WRITE)]
        }),
        bad!("no header", IN, 0, IO_ERROR, |g| vec![(at(g, STATUS), 1, WRITE)]),
        bad!("no status", OUT, 0, Outcome::Nothing, |g| {
            vec![(at(g, 0), 16, 0), (at(g, DATA), 512, 0)]
        }),
        bad!("only a header", FLUSH, 0, Outcome::Nothing, |g| vec![(at(g, 0), 16, 0)]),
        bad!("an empty descriptor alone", FLUSH, 0, Outcome::Nothing, |g| vec![(at(g, 0), 0, 0)]),
        bad!("status of no bytes", FLUSH, 0, Outcome::Nothing, |g| {
            vec![(at(g, 0), 16, 0), (at(g, STATUS), 0, WRITE)]
        }),
        bad!("readable after writable", IN, 0, IO_ERROR, |g| {
            vec![
                (at(g, 0), 16, 0),
                (at(g, DATA), 512, WRITE),
                (at(g, 64), 8, 0),
                (at(g, STATUS), 1, WRITE),
            ]
        }),
        bad!("header outside memory", IN, 0, IO_ERROR, |g| {
            vec![(OUTSIDE, 16, 0), (at(g, DATA), 512, WRITE), (at(g, STATUS), 1, WRITE)]
        }),
        bad!("data outside memory", IN, 0, IO_ERROR, |g| {
            vec![(at(g, 0), 16, 0), (OUTSIDE, 512, WRITE), (at(g, STATUS), 1, WRITE)]
        }),
        bad!("data that run out of memory", OUT, 0, IO_ERROR, |g| {
            let end = RAM_GUEST + g.ram.size() as u64;
            vec![(at(g, 0), 16, 0), (end - 256, 512, 0), (at(g, STATUS), 1, WRITE)]
        }),
        bad!("data that wrap around the address space", OUT, 0, IO_ERROR, |g| {
            vec![(at(g, 0), 16, 0), (u64::MAX - 100, 512, 0), (at(g, STATUS), 1, WRITE)]
        }),
        bad!("data of 4 GiB", IN, 0, IO_ERROR, |g| usual(g, u32::MAX, WRITE)),
        bad!("status outside memory", FLUSH, 0, Outcome::Nothing, |g| {
            vec![(at(g, 0), 16, 0), (OUTSIDE, 1, WRITE)]
        }),
        bad!("status at the end of the address space", FLUSH, 0, Outcome::Nothing, |g| {
            vec![(at(g, 0), 16, 0), (u64::MAX, u32::MAX, WRITE)]
        }),
    ]
}

#[test]
fn a_bad_chain_gets_an_error_status_or_an_empty_element_and_the_ring_goes_on() {
    let mut attack = Attack::new("chains");
    for indirect in [false, true] {
        for bad in bad_chains() {
            let mut guest = attack.victim.guest(Options::default());
            let chain = (bad.chain)(&guest);
            guest.ram.put(guest.spare(), &words(&[u64::from(bad.kind), bad.sector]));
            guest.ram.put_u8(guest.spare() + STATUS, block::PENDING);
            let table = guest.place(0).descriptors;
            if indirect {
                guest.put_chain(guest.spare() + TABLE, 0, &chain);
                let link = (at(&guest, TABLE), 16 * chain.len() as u32, flag::INDIRECT);
                guest.put_chain(table, 40, &[link]);
            } else {
                guest.put_chain(table, 40, &chain);
            }
            guest.push(0, 40);
            guest.kick(0);
            let used = guest.wait_used(0);
            assert_eq!(used.head, 40, "{}", bad.name);
            let status = guest.ram.u8(guest.spare() + STATUS);
            match bad.outcome {
                Outcome::Status(expected) => assert_eq!(status, expected, "{}", bad.name),
                Outcome::Nothing => {
                    assert_eq!((status, used.length), (block::PENDING, 0), "{}", bad.name);
                }
            }
            assert_eq!(guest.read(0, 0, 512).0, block::DONE, "the same ring after {}", bad.name);
            drop(guest);
            attack.assert_unharmed(bad.name);
        }
    }
}

type Linker = fn(&Guest) -> Vec<(u16, Descriptor)>;

/// Chains that never end, or leave the table: there is no telling where their status byte is.
#[test]
fn a_chain_without_an_end_gets_an_empty_element() {
    let mut attack = Attack::new("endless");
    let endless: [(&str, Linker); 11] = [
        ("a descriptor linked to itself", |g| {
            let address = at(g, 0);
            vec![(40, Descriptor { address, length: 16, flags: flag::NEXT, next: 40 })]
        }),
        ("two linked to each other", |g| {
            let link = |next| Descriptor { address: at(g, 0), length: 16, flags: flag::NEXT, next };
            vec![(40, link(41)), (41, link(40))]
        }),
        ("a loop of empty descriptors", |_| {
            vec![(
                40,
                Descriptor { flags: flag::NEXT | flag::WRITE, next: 40, ..Descriptor::default() },
            )]
        }),
        ("a next outside the table", |g| {
            let address = at(g, 0);
            vec![(40, Descriptor { address, length: 16, flags: flag::NEXT, next: 64 })]
        }),
        ("the largest next there is", |g| {
            let address = at(g, 0);
            vec![(40, Descriptor { address, length: 16, flags: flag::NEXT, next: u16::MAX })]
        }),
        ("an indirect table of odd length", |g| {
            vec![(
                40,
                Descriptor { address: at(g, TABLE), length: 17, flags: flag::INDIRECT, next: 0 },
            )]
        }),
        ("an indirect table of no length", |g| {
            vec![(
                40,
                Descriptor { address: at(g, TABLE), length: 0, flags: flag::INDIRECT, next: 0 },
            )]
        }),
        ("an indirect table outside memory", |_| {
            vec![(40, Descriptor { address: OUTSIDE, length: 48, flags: flag::INDIRECT, next: 0 })]
        }),
        ("an indirect table at the end of the address space", |_| {
            let address = u64::MAX - 15;
            vec![(40, Descriptor { address, length: !15, flags: flag::INDIRECT, next: 0 })]
        }),
        ("an indirect table with a next", |g| {
            let flags = flag::INDIRECT | flag::NEXT;
            vec![(40, Descriptor { address: at(g, TABLE), length: 48, flags, next: 41 })]
        }),
        ("an indirect table in an indirect table", |g| {
            let link = (at(g, TABLE), 48, flag::INDIRECT);
            g.put_chain(g.spare() + TABLE, 0, &[link]);
            vec![(
                40,
                Descriptor { address: at(g, TABLE), length: 48, flags: flag::INDIRECT, next: 0 },
            )]
        }),
    ];
    for (name, link) in endless {
        let mut guest = attack.victim.guest(Options::default());
        for (index, descriptor) in link(&guest) {
            guest.put_descriptor(0, index, descriptor);
        }
        guest.push(0, 40);
        guest.kick(0);
        let used = guest.wait_used(0);
        assert_eq!((used.head, used.length), (40, 0), "{name}");
        assert_eq!(guest.read(0, 0, 512).0, block::DONE, "the same ring after {name}");
        drop(guest);
        attack.assert_unharmed(name);
    }
}

#[test]
fn an_endless_indirect_table_and_an_unnegotiated_one_get_empty_elements() {
    let mut attack = Attack::new("indirect");
    let mut guest = attack.victim.guest(Options::default());
    let table = guest.spare() + TABLE;
    let address = at(&guest, 0);
    for index in 0..200 {
        let next = (index + 1) % 200;
        guest.put_descriptor_at(
            table,
            index,
            Descriptor { address, length: 1, flags: flag::NEXT, next },
        );
    }
    let link = (at(&guest, TABLE), 16 * 200, flag::INDIRECT);
    guest.put_chain(guest.place(0).descriptors, 40, &[link]);
    guest.push(0, 40);
    guest.kick(0);
    assert_eq!(guest.wait_used(0).length, 0, "a loop in the table");
    drop(guest);

    let mut guest =
        attack.victim.guest(Options { features: !feature::INDIRECT, ..Options::default() });
    guest.ram.put(guest.spare(), &words(&[u64::from(block::FLUSH), 0]));
    guest.ram.put_u8(guest.spare() + STATUS, block::PENDING);
    let flush = [(at(&guest, 0), 16, 0), (at(&guest, STATUS), 1, flag::WRITE)];
    guest.put_chain(guest.spare() + TABLE, 0, &flush);
    let link = (at(&guest, TABLE), 32, flag::INDIRECT);
    guest.put_chain(guest.place(0).descriptors, 40, &[link]);
    guest.push(0, 40);
    guest.kick(0);
    assert_eq!(guest.wait_used(0).length, 0, "indirect without the feature");
    assert_eq!(guest.ram.u8(guest.spare() + STATUS), block::PENDING);
    drop(guest);
    attack.assert_unharmed("indirect tables");
}

/// Waits until the back-end says through the error descriptor that it has given the ring up.
fn wait_for_error(error: &OwnedFd, name: &str) {
    let mut waits = [PollFd::new(error.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut waits, 30_000u16), Ok(1), "{name}: the ring was not given up");
}

type Break = fn(&mut Guest);

#[test]
fn a_ring_that_contradicts_itself_is_given_up_and_the_others_go_on() {
    let mut attack = Attack::new("broken");
    let breaks: [(&str, Break); 5] = [
        ("an available index far ahead", |g| {
            let place = g.place(1);
            g.ram.put_u16(place.available + 2, g.ram.u16(place.available + 2).wrapping_add(65));
        }),
        ("an available index that went back", |g| {
            let place = g.place(1);
            g.ram.put_u16(place.available + 2, g.ram.u16(place.available + 2).wrapping_sub(1));
        }),
        ("a head outside the table", |g| g.push(1, 64)),
        ("the largest head there is", |g| g.push(1, u16::MAX)),
        ("a head that is in flight", |g| {
            let ticket = g.submit(1, block::IN, 0, &[], 512);
            g.push(1, ticket.head);
        }),
    ];
    for (name, break_it) in breaks {
        let mut guest = attack.victim.guest(Options { queues: 2, ..Options::default() });
        let error = eventfd();
        guest.front_end.tell(message::SET_VRING_ERR, &words(&[1]), &[error.as_fd()]).unwrap();
        assert_eq!(guest.read(1, 0, 512).0, block::DONE);
        attack.victim.host.hold_from(0);
        break_it(&mut guest);
        guest.kick_hard(1);
        wait_for_error(&error, name);
        attack.victim.host.hold_from(u64::MAX);
        assert_eq!(guest.read(0, 0, 512).0, block::DONE, "the other ring after {name}");
        // A driver that resets the ring is served again.
        guest.stop_queue(1).unwrap();
        drop(guest);
        attack.assert_unharmed(name);
    }
}

#[test]
fn memory_truncated_under_us_stops_that_guest_only() {
    let mut attack = Attack::new("truncate");
    for name in ["everything", "all but the rings"] {
        let mut guest = attack.victim.guest(Options { regions: 2, ..Options::default() });
        let error = eventfd();
        guest.front_end.tell(message::SET_VRING_ERR, &words(&[0]), &[error.as_fd()]).unwrap();
        assert_eq!(guest.read(0, 0, 512).0, block::DONE);
        // The second region holds the spare memory, the first the rings.
        let half = guest.ram.size() / 2;
        assert!(guest.spare() >= half);
        if name == "everything" {
            ftruncate(guest.ram.file(), 0).unwrap();
            guest.kick_hard(0);
        } else {
            let chain = [(at(&guest, 0), 16, 0), (at(&guest, STATUS), 1, flag::WRITE)];
            guest.put_chain(guest.place(0).descriptors, 40, &chain);
            ftruncate(guest.ram.file(), half as i64).unwrap();
            guest.push(0, 40);
            guest.kick_hard(0);
            guest.wait_used(0); // Its header was read as zeroes.
            guest.push(0, 40);
            guest.kick_hard(0);
        }
        wait_for_error(&error, name);
        attack.assert_neighbour_unharmed();
        // Our own mapping of the memory is as dead as theirs: nothing of it may be touched again.
        drop(guest);
        attack.assert_unharmed(name);
    }
}

impl Attack {
    fn assert_neighbour_unharmed(&mut self) {
        assert_eq!(self.neighbour.read(0, 9, 512).0, block::DONE);
    }
}

type Message = fn(&mut FrontEnd);

fn tell(front_end: &mut FrontEnd, request: u32, payload: &[u8], files: &[&OwnedFd]) {
    let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
    // The refusal may come as an answer, or as a hang-up.
    let result = front_end.tell(request, payload, &files);
    assert!(result.is_err(), "request {request} was accepted");
}

fn region(guest: u64, size: u64, user: u64, offset: u64) -> Vec<u8> {
    words(&[1, guest, size, user, offset])
}

fn memfd(size: i64) -> OwnedFd {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let file = memfd_create("evil", MFdFlags::MFD_CLOEXEC).unwrap();
    ftruncate(&file, size).unwrap();
    file
}

fn inflight(size: u64, offset: u64, queues: u16, entries: u16) -> Vec<u8> {
    let mut payload = words(&[size, offset]);
    payload.extend(queues.to_le_bytes());
    payload.extend(entries.to_le_bytes());
    payload.extend([0; 4]);
    payload
}

fn send_raw(front_end: &mut FrontEnd, words: &[u32]) {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    // The server may hang up before all of it is sent.
    let _ = front_end.send_bytes(&bytes, &[]);
}

fn bad_messages() -> Vec<(&'static str, Message)> {
    use message::*;
    vec![
        ("request 0", |f| send_raw(f, &[0, 1, 0])),
        ("an unknown request", |f| send_raw(f, &[9999, 1, 0])),
        ("a request that was not offered", |f| send_raw(f, &[6, 1, 8, 0, 0])),
        ("version 0", |f| send_raw(f, &[GET_FEATURES, 0, 0])),
        ("version 3", |f| send_raw(f, &[GET_FEATURES, 3, 0])),
        ("a reply", |f| send_raw(f, &[GET_FEATURES, 5, 0])),
        ("a payload of 4 GiB", |f| send_raw(f, &[SET_FEATURES, 1, u32::MAX])),
        ("a payload too long for its request", |f| send_raw(f, &[SET_OWNER, 1, 4, 0])),
        ("a payload too short for its request", |f| send_raw(f, &[SET_FEATURES, 1, 4, 0])),
        ("features that were not offered", |f| tell(f, SET_FEATURES, &words(&[1 << 35]), &[])),
        ("protocol features that were not offered", |f| {
            tell(f, SET_PROTOCOL_FEATURES, &words(&[1 << 1 | 1 << 3]), &[]);
        }),
        ("no memory regions", |f| tell(f, SET_MEM_TABLE, &words(&[0]), &[])),
        ("9999 memory regions", |f| tell(f, SET_MEM_TABLE, &words(&[9999]), &[&memfd(4096)])),
        ("a region without a file", |f| {
            tell(f, SET_MEM_TABLE, &region(0, 4096, 0, 0), &[]);
        }),
        ("a region and two files", |f| {
            tell(f, SET_MEM_TABLE, &region(0, 4096, 0, 0), &[&memfd(4096), &memfd(4096)]);
        }),
        ("a region of no bytes", |f| {
            tell(f, SET_MEM_TABLE, &region(0, 0, 0, 0), &[&memfd(4096)]);
        }),
        ("a region longer than its file", |f| {
            tell(f, SET_MEM_TABLE, &region(0, 8192, 0, 0), &[&memfd(4096)]);
        }),
        ("a region that wraps in guest memory", |f| {
            tell(f, SET_MEM_TABLE, &region(u64::MAX - 1, 4096, 0, 0), &[&memfd(4096)]);
        }),
        ("a region that wraps in its file", |f| {
            tell(f, SET_MEM_TABLE, &region(0, 4096, 0, u64::MAX - 100), &[&memfd(4096)]);
        }),
        ("a region of 8 EiB", |f| {
            tell(f, SET_MEM_TABLE, &region(0, 1 << 62, 0, 0), &[&memfd(i64::MAX)]);
        }),
        ("a region that is an eventfd", |f| {
            tell(f, SET_MEM_TABLE, &region(0, 4096, 0, 0), &[&eventfd()]);
        }),
        ("a region that is a device", |f| {
            let zero = std::fs::File::options().read(true).write(true).open("/dev/zero").unwrap();
            tell(f, SET_MEM_TABLE, &region(0, 4096, 0, 0), &[&zero.into()]);
        }),
        ("regions that overlap", |f| {
            let table = words(&[2, 0, 8192, 0, 0, 4096, 4096, 8192, 0]);
            tell(f, SET_MEM_TABLE, &table, &[&memfd(8192), &memfd(4096)]);
        }),
        ("a region to add twice", |f| {
            let region = words(&[0, 0, 4096, 0, 0]);
            f.tell(ADD_MEM_REG, &region, &[memfd(4096).as_fd()]).unwrap();
            tell(f, ADD_MEM_REG, &region, &[&memfd(4096)]);
        }),
        ("a region to remove that is not there", |f| {
            tell(f, REM_MEM_REG, &words(&[0, 0, 4096, 0, 0]), &[]);
        }),
        ("queue 9999", |f| tell(f, SET_VRING_NUM, &state(9999, 64), &[])),
        ("queue 4 of 4", |f| tell(f, SET_VRING_BASE, &state(4, 0), &[])),
        ("the base of queue 2^32 - 1", |f| {
            f.send(GET_VRING_BASE, false, &state(u32::MAX, 0), &[]).unwrap();
        }),
        ("a queue of no descriptors", |f| tell(f, SET_VRING_NUM, &state(0, 0), &[])),
        ("a queue of 100 descriptors", |f| tell(f, SET_VRING_NUM, &state(0, 100), &[])),
        ("a queue of 65536 descriptors", |f| tell(f, SET_VRING_NUM, &state(0, 65536), &[])),
        ("a base that is no index", |f| tell(f, SET_VRING_BASE, &state(0, 1 << 16), &[])),
        ("enable 2", |f| tell(f, SET_VRING_ENABLE, &state(0, 2), &[])),
        ("a kick of queue 255", |f| tell(f, SET_VRING_KICK, &words(&[255]), &[&eventfd()])),
        ("a kick without a descriptor", |f| tell(f, SET_VRING_KICK, &words(&[0]), &[])),
        ("a kick that is a file", |f| tell(f, SET_VRING_KICK, &words(&[0]), &[&memfd(8)])),
        ("a call that is a socket", |f| {
            let (ours, _theirs) = UnixStream::pair().unwrap();
            tell(f, SET_VRING_CALL, &words(&[0]), &[&ours.into()]);
        }),
        ("a call that is a full pipe", |f| {
            let (_reader, writer) = nix::unistd::pipe().unwrap();
            tell(f, SET_VRING_CALL, &words(&[0]), &[&writer]);
        }),
        ("descriptors where none belong", |f| tell(f, SET_OWNER, &[], &[&eventfd()])),
        ("a write to the capacity", |f| {
            let mut payload = [0u32, 8, 0].map(u32::to_le_bytes).concat();
            payload.extend([0xff; 8]);
            tell(f, SET_CONFIG, &payload, &[]);
        }),
        ("a write past the configuration space", |f| {
            let mut payload = [u32::MAX, 1, 0].map(u32::to_le_bytes).concat();
            payload.push(0);
            tell(f, SET_CONFIG, &payload, &[]);
        }),
        ("a cache mode of 2", |f| assert!(f.set_config(32, &[2]).is_err())),
        ("a configuration read that says another length", |f| {
            send_raw(f, &[GET_CONFIG, 1, 12, 0, 200, 0]);
        }),
        ("in-flight records for no queues", |f| {
            f.send(GET_INFLIGHT_FD, false, &inflight(0, 0, 0, 64), &[]).unwrap();
        }),
        ("in-flight records for 65535 queues", |f| {
            f.send(GET_INFLIGHT_FD, false, &inflight(0, 0, u16::MAX, u16::MAX), &[]).unwrap();
        }),
        ("an in-flight region too small for its queues", |f| {
            tell(f, SET_INFLIGHT_FD, &inflight(64, 0, 4, 1024), &[&memfd(64)]);
        }),
        ("an in-flight region longer than its file", |f| {
            tell(f, SET_INFLIGHT_FD, &inflight(1 << 40, 0, 4, 64), &[&memfd(64)]);
        }),
        ("an in-flight region at an odd offset", |f| {
            tell(f, SET_INFLIGHT_FD, &inflight(8192, 3, 4, 64), &[&memfd(16384)]);
        }),
        ("an in-flight region at the end of everything", |f| {
            tell(f, SET_INFLIGHT_FD, &inflight(8192, u64::MAX - 7, 4, 64), &[&memfd(16384)]);
        }),
    ]
}

#[test]
fn a_bad_message_ends_its_connection_only() {
    let mut attack = Attack::new("messages");
    let bad = bad_messages();
    assert!(bad.len() >= 40);
    for (name, send) in bad {
        let mut front_end = attack.victim.front_end();
        send(&mut front_end);
        front_end.wait_for_hangup();
        attack.assert_unharmed(name);
    }
}

/// Addresses of descriptors, used ring and available ring.
type Place = fn(&Guest) -> [u64; 3];

#[test]
fn rings_that_are_not_in_memory_end_the_connection() {
    let mut attack = Attack::new("rings");
    let places: [(&str, Place); 6] = [
        ("descriptors outside memory", |g| [0x1000, ring(g).1, ring(g).2]),
        ("a used ring that ends outside", |g| {
            [ring(g).0, RAM_USER + g.ram.size() as u64 - 64, ring(g).2]
        }),
        ("an available ring at the end of the address space", |g| [ring(g).0, ring(g).1, u64::MAX]),
        ("misaligned descriptors", |g| [ring(g).0 + 8, ring(g).1, ring(g).2]),
        ("a misaligned used ring", |g| [ring(g).0, ring(g).1 + 2, ring(g).2]),
        ("a misaligned available ring", |g| [ring(g).0, ring(g).1, ring(g).2 + 1]),
    ];
    for (name, place) in places {
        let mut guest = Guest::negotiate(&attack.victim.socket, Options::default()).unwrap();
        guest.share_memory().unwrap();
        let [descriptors, used, available] = place(&guest);
        let mut payload = state(0, 0);
        payload.extend(words(&[descriptors, used, available, 0]));
        let front_end = &mut guest.front_end;
        front_end.tell(message::SET_VRING_NUM, &state(0, 64), &[]).unwrap();
        front_end.tell(message::SET_VRING_ADDR, &payload, &[]).unwrap();
        front_end.tell(message::SET_VRING_KICK, &words(&[0]), &[eventfd().as_fd()]).unwrap();
        tell(front_end, message::SET_VRING_ENABLE, &state(0, 1), &[]);
        front_end.wait_for_hangup();
        attack.assert_unharmed(name);
    }
}

/// The user addresses of ring 0: descriptors, used, available.
fn ring(guest: &Guest) -> (u64, u64, u64) {
    let place = guest.place(0);
    let user = |offset: usize| RAM_USER + offset as u64;
    (user(place.descriptors), user(place.used), user(place.available))
}

#[test]
fn an_in_flight_region_full_of_nonsense_harms_its_own_guest_only() {
    let mut attack = Attack::new("inflight");
    for byte in [0x01u8, 0xff] {
        let mut guest = Guest::negotiate(&attack.victim.socket, Options::default()).unwrap();
        guest.share_memory().unwrap();
        let file = memfd(16384);
        let mut region = vec![byte; 16384];
        region[8..10].copy_from_slice(&1u16.to_le_bytes()); // The version that it claims.
        nix::sys::uio::pwrite(&file, &region, 0).unwrap();
        let payload = inflight(16384, 0, 4, 64);
        guest.front_end.tell(message::SET_INFLIGHT_FD, &payload, &[file.as_fd()]).unwrap();
        guest.start_queue(0, 0).unwrap();
        // Whatever heads it names are chains of zeroes: each is answered with nothing.
        if byte == 1 {
            for _ in 0..64 - 1 {
                assert_eq!(guest.wait_used(0).length, 0);
            }
        }
        drop(guest);
        attack.assert_unharmed("nonsense in flight");
    }
}

#[test]
fn half_a_message_and_a_silent_hangup_are_survived() {
    let mut attack = Attack::new("half");
    for bytes in [
        &[1u8, 0][..],
        &[2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0],
        &[2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 1],
    ] {
        let front_end = attack.victim.front_end();
        front_end.send_bytes(bytes, &[]).unwrap();
        drop(front_end);
        attack.assert_unharmed("half a message");
    }
    // More requests with replies than the socket holds, none of them read.
    let mut front_end = attack.victim.front_end();
    for _ in 0..100 {
        front_end.send(message::GET_FEATURES, false, &[], &[]).unwrap();
    }
    drop(front_end);
    attack.assert_unharmed("unread replies");
    // As many descriptors as a message can carry.
    front_end = attack.victim.front_end();
    let event = eventfd();
    let many = vec![event.as_fd(); 253];
    front_end.send(message::SET_MEM_TABLE, false, &region(0, 4096, 0, 0), &many).unwrap();
    front_end.wait_for_hangup();
    attack.assert_unharmed("253 descriptors");
}

/// A guest that changes descriptors while they are read: any answer is right, a crash is not.
#[test]
fn a_guest_that_changes_its_requests_meanwhile_gets_some_answer() {
    let mut attack = Attack::new("race");
    let mut guest = attack.victim.guest(Options::default());
    let table = guest.spare() + TABLE;
    let chain = [
        (at(&guest, 0), 16, 0),
        (at(&guest, DATA), 512, flag::WRITE),
        (at(&guest, STATUS), 1, flag::WRITE),
    ];
    let link = (at(&guest, TABLE), 48, flag::INDIRECT);
    guest.put_chain(guest.place(0).descriptors, 40, &[link]);
    for round in 0..2_000u64 {
        guest.ram.put(guest.spare(), &words(&[0, round % 8]));
        guest.put_chain(table, 0, &chain);
        guest.push(0, 40);
        guest.kick(0);
        // Races with the walk; the address, the length, the flags, the header.
        guest.ram.put_u64(table + 16 * (round as usize % 3), OUTSIDE * (round % 2));
        guest.ram.put_u64(
            table + 16 * (round as usize % 3) + 8,
            round.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        );
        guest.ram.put_u64(guest.spare() + 8, u64::MAX - round);
        assert_eq!(guest.wait_used(0).head, 40);
    }
    drop(guest);
    // The race may have made writes of it; the disk's contents are the guest's own affair.
    assert_eq!(attack.neighbour.read(0, 9, 512).0, block::DONE);
    let mut guest = attack.victim.guest(Options::default());
    assert_eq!(guest.write(0, 0, &[1; 512]), block::DONE);
}
