//! What a vhost-user-blk front-end may rely on, checked through a real socket and real memory:
//! requests, notifications, every order of messages seen in practice, reconnects and kills.
//!
//! Hostile guests and front-ends have `vhost_hostile.rs`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use bessel_tests::guest::{
    BaseAfterReconnect, FrontEnd, Guest, Options, RAM_GUEST, block, feature, flag, message, state,
    words,
};
use bessel_tests::plain_host::{
    PlainHost, PlainVolume, SECTORS, disk_info, eventfd, memory_disk, socket_path,
};
use bessel_vhost::{BindError, DiskInfo, QueueHost, Server};

fn pattern(seed: u64, length: usize) -> Vec<u8> {
    (0..length as u64)
        .map(|at| seed.wrapping_mul(31).wrapping_add(at * 7 + (at >> 9)) as u8)
        .collect()
}

/// Every way to negotiate a split ring.
fn ring_kinds() -> Vec<u64> {
    let plain = !(feature::EVENT_IDX | feature::INDIRECT);
    vec![plain, plain | feature::EVENT_IDX, plain | feature::INDIRECT, u64::MAX]
}

#[test]
fn every_kind_of_request_works_with_every_kind_of_ring() {
    let world = PlainVolume::serve("kinds");
    for features in ring_kinds() {
        for queue_size in [4, 64, 1024] {
            let mut guest = world.guest(Options { features, queue_size, ..Options::default() });
            let bytes = pattern(features ^ u64::from(queue_size), 8192);
            assert_eq!(guest.write(0, 16, &bytes), block::DONE);
            assert_eq!(guest.read(0, 16, 8192), (block::DONE, bytes.clone()));
            assert_eq!(world.host.disk(16, 8192), bytes);
            assert_eq!(guest.flush(0), block::DONE);
            assert_eq!(guest.discard(0, 16, 4), block::DONE);
            assert_eq!(guest.write_zeroes(0, 20, 4, true), block::DONE);
            assert_eq!(guest.read(0, 16, 4096), (block::DONE, vec![0; 4096]));
            assert_eq!(guest.read(0, 24, 4096), (block::DONE, bytes[4096..].to_vec()));
            assert_eq!(guest.get_id(0), (block::DONE, b"volume-under-test\0\0\0".to_vec()));
            assert_eq!(guest.read(0, SECTORS, 512).0, block::IO_ERROR);
            assert_eq!(guest.write(0, SECTORS - 1, &[0; 1024]), block::IO_ERROR);
            assert_eq!(guest.run(0, 99, 0, &[], 0).0, block::UNSUPPORTED);
        }
    }
}

/// Keeps four rings full until their indexes have wrapped, sleeping on interrupts throughout. A
/// lost interrupt or kick ends at the harness's deadline.
#[test]
fn no_notification_is_lost_while_ring_indexes_wrap() {
    let world = PlainVolume::serve("wrap");
    for features in [u64::MAX, !feature::EVENT_IDX] {
        let options = Options {
            queues: 4,
            queue_size: 16,
            features,
            data_max: 512,
            regions: 1,
            inflight: true,
        };
        let mut guest = world.guest(options);
        let mut under_way = vec![Vec::new(); 4];
        for round in 0..(70_000 / 4) as u64 {
            let queue = (round % 4) as usize;
            for burst in 0..=(round % 7) {
                if guest.room(queue) == 0 {
                    break;
                }
                let sector = queue as u64 * 100 + burst;
                let ticket = guest.submit(queue, block::OUT, sector, &[round as u8; 512], 0);
                under_way[queue].push(ticket);
            }
            guest.kick(queue);
            while under_way[queue].len() > (round % 3) as usize {
                let used = guest.wait_used(queue);
                let place = under_way[queue].iter().position(|ticket| ticket.head == used.head);
                let ticket = under_way[queue].remove(place.expect("a request under way"));
                assert_eq!((guest.status(ticket), used.length), (block::DONE, 1));
                guest.release(ticket);
            }
        }
    }
}

#[test]
fn interrupts_come_only_when_asked_for() {
    let world = PlainVolume::serve("quiet");
    let mut guest = world.guest(Options { features: !feature::EVENT_IDX, ..Options::default() });
    guest.refuse_interrupts(0);
    guest.take_call(0); // Starting a ring signals it once.
    for sector in 0..20 {
        let ticket = guest.submit(0, block::OUT, sector, &[1; 512], 0);
        guest.kick(0);
        while guest.poll_used(0).is_none() {
            std::thread::yield_now();
        }
        guest.release(ticket);
    }
    assert!(!guest.take_call(0), "an interrupt that was refused");
    guest.ask_for_interrupt(0);
    assert_eq!(guest.write(0, 1, &[2; 512]), block::DONE);
}

#[test]
fn with_event_indexes_a_batch_interrupts_once_where_asked() {
    let world = PlainVolume::serve("event");
    let mut guest = world.guest(Options { queues: 2, ..Options::default() });
    guest.read(0, 0, 512);
    world.host.hold_from(0);
    guest.take_call(0);
    // The driver wants to hear of the fifth completion from here.
    let place = guest.place(0);
    let used = guest.ram.u16(place.used + 2);
    guest.ram.put_u16(place.available + 4 + 2 * 64, used + 4);
    let before = world.host.popped();
    let tickets: Vec<_> = (0..8).map(|at| guest.submit(0, block::IN, at, &[], 512)).collect();
    guest.kick(0);
    while world.host.popped() < before + 8 {
        std::thread::yield_now();
    }
    // Sectors 0 to 3 are answered: four completions, no interrupt.
    world.host.hold_from(4);
    while guest.ram.u16(place.used + 2) != used + 4 {
        std::thread::yield_now();
    }
    // The host's one thread looks at the event index before it turns to another ring.
    assert_eq!(guest.read(1, 0, 512).0, block::DONE);
    assert!(!guest.take_call(0), "four completions do not reach the fifth");
    world.host.hold_from(u64::MAX);
    assert!(guest.wait_call(0), "the fifth did");
    while guest.ram.u16(place.used + 2) != used + 8 {
        std::thread::yield_now();
    }
    assert_eq!(guest.read(1, 0, 512).0, block::DONE);
    guest.take_call(0);
    assert_eq!(guest.read(1, 0, 512).0, block::DONE);
    assert!(!guest.take_call(0), "nothing was completed since");
    assert!(tickets.iter().all(|ticket| guest.status(*ticket) == block::DONE));
}

/// A chain of (address, length, flags), with a name.
type Layout = (&'static str, Vec<(u64, u32, u16)>);

#[test]
fn buffers_of_any_layout_are_understood() {
    let world = PlainVolume::serve("layout");
    let mut guest = world.guest(Options::default());
    let bytes = pattern(1, 1024);
    assert_eq!(guest.write(0, 8, &bytes), block::DONE);
    let spare = guest.spare();
    let at = |offset: usize| RAM_GUEST + (spare + offset) as u64;
    let layouts: [Layout; 6] = [
        ("usual", vec![(at(0), 16, 0), (at(512), 1024, flag::WRITE), (at(256), 1, flag::WRITE)]),
        (
            "header byte by byte",
            (0..16)
                .map(|byte| (at(byte), 1, 0))
                .chain([(at(512), 1024, flag::WRITE), (at(256), 1, flag::WRITE)])
                .collect(),
        ),
        ("status behind the data", vec![(at(0), 16, 0), (at(512), 1025, flag::WRITE)]),
        (
            "data in odd pieces",
            vec![
                (at(0), 16, 0),
                (at(512), 1, flag::WRITE),
                (at(513), 700, flag::WRITE),
                (at(1213), 324, flag::WRITE),
            ],
        ),
        (
            "empty descriptors between",
            vec![
                (at(0), 0, 0),
                (at(0), 16, 0),
                (u64::MAX, 0, flag::WRITE),
                (at(512), 1024, flag::WRITE),
                (at(256), 1, flag::WRITE),
                (0, 0, flag::WRITE),
            ],
        ),
        (
            "more than the header to read",
            vec![(at(0), 100, 0), (at(512), 1024, flag::WRITE), (at(256), 1, flag::WRITE)],
        ),
    ];
    for (name, chain) in layouts {
        for indirect in [false, true] {
            guest.ram.put(spare, &words(&[u64::from(block::IN), 8]));
            guest.ram.put(spare + 256, &[0xff; 2048]);
            if indirect {
                guest.put_chain(spare + 8192, 0, &chain);
                let length = 16 * chain.len() as u32;
                guest.put_chain(
                    guest.place(0).descriptors,
                    40,
                    &[(at(8192), length, flag::INDIRECT)],
                );
            } else {
                guest.put_chain(guest.place(0).descriptors, 40, &chain);
            }
            guest.push(0, 40);
            guest.kick(0);
            let used = guest.wait_used(0);
            assert_eq!((used.head, used.length), (40, 1025), "{name}");
            assert_eq!(guest.ram.get(spare + 512, 1024), bytes, "{name}");
            let status = match name {
                "status behind the data" | "data in odd pieces" => 512 + 1024,
                _ => 256,
            };
            assert_eq!(guest.ram.u8(spare + status), block::DONE, "{name}");
        }
    }
}

#[test]
fn a_write_may_share_its_header_descriptor_with_its_data() {
    let world = PlainVolume::serve("shared");
    let mut guest = world.guest(Options::default());
    let spare = guest.spare();
    let at = |offset: usize| RAM_GUEST + (spare + offset) as u64;
    guest.ram.put(spare, &words(&[u64::from(block::OUT), 3]));
    guest.ram.put(spare + 16, &pattern(5, 512));
    guest.ram.put_u8(spare + 600, block::PENDING);
    let table = guest.place(0).descriptors;
    guest.put_chain(table, 40, &[(at(0), 500, 0), (at(500), 28, 0), (at(600), 1, flag::WRITE)]);
    guest.push(0, 40);
    guest.kick(0);
    assert_eq!(guest.wait_used(0).length, 1);
    assert_eq!(guest.ram.u8(spare + 600), block::DONE);
    assert_eq!(world.host.disk(3, 512), pattern(5, 512));
}

#[test]
fn a_buffer_over_two_memory_regions_is_whole() {
    let world = PlainVolume::serve("straddle");
    let mut guest = world.guest(Options { regions: 2, ..Options::default() });
    let middle = guest.ram.size() / 2;
    let spare = guest.spare();
    let at = |offset: usize| RAM_GUEST + offset as u64;
    let table = guest.place(0).descriptors;
    let bytes = pattern(9, 4096);
    guest.ram.put(spare, &words(&[u64::from(block::OUT), 64]));
    let saved = guest.ram.get(middle - 100, 4096);
    guest.ram.put(middle - 100, &bytes);
    let status = (at(spare + 64), 1, flag::WRITE);
    guest.put_chain(table, 40, &[(at(spare), 16, 0), (at(middle - 100), 4096, 0), status]);
    guest.push(0, 40);
    guest.kick(0);
    guest.wait_used(0);
    guest.ram.put(middle - 100, &saved);
    assert_eq!(guest.ram.u8(spare + 64), block::DONE);
    assert_eq!(world.host.disk(64, 4096), bytes);
}

#[test]
fn a_read_only_disk_reads_and_refuses_the_rest() {
    let world = PlainVolume::serve_with("readonly", DiskInfo { read_only: true, ..disk_info() });
    let mut guest = world.guest(Options::default());
    assert_ne!(guest.features & feature::RO, 0);
    assert_eq!(guest.read(0, 0, 4096), (block::DONE, vec![0; 4096]));
    assert_eq!(guest.write(0, 0, &[1; 512]), block::IO_ERROR);
    assert_ne!(guest.discard(0, 0, 8), block::DONE);
    assert_ne!(guest.write_zeroes(0, 0, 8, false), block::DONE);
    assert_eq!(guest.flush(0), block::DONE);
}

#[test]
fn the_configuration_space_comes_in_exactly_the_size_asked_for() {
    let world = PlainVolume::serve("config");
    let mut front_end = world.front_end();
    assert_eq!(front_end.config(0, 8).unwrap(), SECTORS.to_le_bytes());
    for size in [1, 36, 60, 61, 96, 256] {
        assert_eq!(front_end.config(0, size).unwrap().len(), size as usize);
    }
    assert_eq!(front_end.config(34, 2).unwrap(), [4, 0], "queues");
    assert_eq!(front_end.config(200, 56).unwrap(), [0; 56]);
    assert!(front_end.config(200, 57).unwrap().is_empty(), "past the largest space there is");
    assert!(front_end.config(u32::MAX, 2).unwrap().is_empty());
}

#[test]
fn the_guest_switches_the_cache_and_keeps_it_over_a_reconnect() {
    let world = PlainVolume::serve("cache");
    let mut guest = world.guest(Options::default());
    assert_eq!(guest.front_end.config(32, 1).unwrap(), [1]);
    guest.front_end.set_config(32, &[0]).unwrap();
    guest.front_end.set_config(32, &[0]).unwrap();
    assert_eq!(guest.front_end.config(32, 1).unwrap(), [0]);
    assert_eq!(world.host.journal().caches, [false], "told once");
    guest.reconnect(&world.socket, BaseAfterReconnect::Used).unwrap();
    assert_eq!(guest.front_end.config(32, 1).unwrap(), [0]);
    guest.front_end.set_config(32, &[1]).unwrap();
    assert_eq!(world.host.journal().caches, [false, true]);
}

#[test]
fn a_guest_that_knows_nothing_of_flushes_gets_no_write_cache() {
    let world = PlainVolume::serve("nocache");
    let mut guest = world
        .guest(Options { features: !(feature::FLUSH | feature::CONFIG_WCE), ..Options::default() });
    assert_eq!(guest.write(0, 0, &[1; 512]), block::DONE);
    assert_eq!(world.host.journal().caches, [false]);
    drop(guest);
    world.guest(Options::default());
    assert_eq!(world.host.journal().caches, [false, true]);
}

#[test]
fn protocol_features_may_be_set_without_being_read() {
    let world = PlainVolume::serve("unread");
    let mut front_end = FrontEnd::connect(&world.socket).unwrap();
    let features = feature::VERSION_1 | feature::PROTOCOL;
    let protocol = words(&[feature::PROTOCOL_REPLY_ACK]);
    front_end.send(message::SET_PROTOCOL_FEATURES, false, &protocol, &[]).unwrap();
    front_end.tell(message::SET_FEATURES, &words(&[features]), &[]).unwrap();
    assert_eq!(front_end.ask(message::GET_QUEUE_NUM, &[]).unwrap().u64(), 4);
}

#[test]
fn without_protocol_features_rings_start_enabled() {
    let world = PlainVolume::serve("bare");
    // Acknowledgements, which the harness wants, without the bit that makes rings start disabled.
    let protocol = words(&[feature::PROTOCOL_REPLY_ACK]);
    let options = Options { features: !feature::PROTOCOL, ..Options::default() };
    let mut guest = Guest::negotiate(&world.socket, options).unwrap();
    guest.front_end.send(message::SET_PROTOCOL_FEATURES, false, &protocol, &[]).unwrap();
    guest.share_memory().unwrap();
    guest.start_queue(0, 0).unwrap();
    assert_eq!(guest.write(0, 0, &[1; 512]), block::DONE);
}

#[test]
fn in_flight_messages_and_ring_sizes_come_in_either_order() {
    let world = PlainVolume::serve("order");
    let options = Options { inflight: true, ..Options::default() };
    for inflight_first in [true, false] {
        let mut guest = Guest::negotiate(&world.socket, options.clone()).unwrap();
        if inflight_first {
            guest.share_inflight().unwrap();
            guest.share_memory().unwrap();
            guest.start_queue(0, 0).unwrap();
        } else {
            guest.share_memory().unwrap();
            guest.start_queue(0, 0).unwrap();
            assert_eq!(guest.write(0, 7, &[1; 512]), block::DONE);
            // The new region takes its used index from the ring, or it would replay a batch.
            guest.share_inflight().unwrap();
        }
        assert_eq!(guest.write(0, 7, &[2; 512]), block::DONE);
        assert_eq!(guest.read(0, 7, 512), (block::DONE, vec![2; 512]));
    }
}

#[test]
fn the_largest_ring_there_is_works() {
    let world = PlainVolume::serve("large");
    let options =
        Options { queue_size: 32768, inflight: true, data_max: 4096, ..Options::default() };
    let mut guest = world.guest(options);
    let tickets: Vec<_> =
        (0..128).map(|at| guest.submit(0, block::OUT, at, &[at as u8; 512], 0)).collect();
    guest.kick(0);
    for _ in 0..128 {
        guest.wait_used(0);
    }
    assert!(tickets.iter().all(|ticket| guest.status(*ticket) == block::DONE));
}

#[test]
fn memory_is_replaced_under_a_running_ring_and_the_ring_is_signalled() {
    let world = PlainVolume::serve("remap");
    let mut guest = world.guest(Options { regions: 3, inflight: true, ..Options::default() });
    assert_eq!(guest.write(0, 0, &[1; 512]), block::DONE);
    world.host.hold_from(0);
    let before = world.host.popped();
    let ticket = guest.submit(0, block::IN, 0, &[], 512);
    guest.kick(0);
    while world.host.popped() == before {
        std::thread::yield_now();
    }
    guest.take_call(0);
    guest.share_memory().unwrap();
    assert_eq!(guest.status(ticket), block::DONE, "in flight over the old memory: drained first");
    assert!(guest.take_call(0), "the used ring is signalled again");
    world.host.hold_from(u64::MAX);
    guest.poll_used(0).unwrap();
    assert_eq!(guest.read(0, 0, 512), (block::DONE, vec![1; 512]));
}

#[test]
fn memory_is_added_and_removed_region_by_region() {
    let world = PlainVolume::serve("slots");
    let options = Options { regions: 2, ..Options::default() };
    let mut guest = Guest::negotiate(&world.socket, options).unwrap();
    assert!(guest.front_end.ask(message::GET_MAX_MEM_SLOTS, &[]).unwrap().u64() >= 8);
    let regions = guest.regions();
    let payload = |region: &[u64; 4]| words(&[&[0], region.as_slice()].concat());
    for region in &regions {
        let file = guest.ram.file().try_clone().unwrap();
        guest.front_end.tell(message::ADD_MEM_REG, &payload(region), &[file.as_fd()]).unwrap();
    }
    guest.start_queue(0, 0).unwrap();
    assert_eq!(guest.write(0, 0, &[1; 512]), block::DONE);
    // Without the region that holds the ring, the ring waits; with it again, it goes on.
    guest.front_end.tell(message::REM_MEM_REG, &payload(&regions[0]), &[]).unwrap();
    let ticket = guest.submit(0, block::IN, 0, &[], 512);
    guest.kick_hard(0);
    let file = guest.ram.file().try_clone().unwrap();
    guest.front_end.tell(message::ADD_MEM_REG, &payload(&regions[0]), &[file.as_fd()]).unwrap();
    guest.wait_used(0);
    assert_eq!(guest.data(ticket, 512), [1; 512]);
}

#[test]
fn the_call_descriptor_moves_while_requests_are_in_flight() {
    let world = PlainVolume::serve("call");
    let mut guest = world.guest(Options::default());
    world.host.hold_from(0);
    let ticket = guest.submit(0, block::IN, 0, &[], 512);
    guest.kick(0);
    while world.host.popped() == 0 {
        std::thread::yield_now();
    }
    guest.ask_for_interrupt(0);
    let call = eventfd();
    guest.front_end.tell(message::SET_VRING_CALL, &words(&[0]), &[call.as_fd()]).unwrap();
    assert_eq!(guest.status(ticket), block::PENDING, "the ring was not drained for it");
    let mut count = [0; 8];
    nix::unistd::read(&call, &mut count).expect("a moved call is signalled at once");
    world.host.hold_from(u64::MAX);
    while guest.poll_used(0).is_none() {
        std::thread::yield_now();
    }
    let mut waits = [nix::poll::PollFd::new(call.as_fd(), nix::poll::PollFlags::POLLIN)];
    assert_eq!(nix::poll::poll(&mut waits, 30_000u16), Ok(1), "the new descriptor is called");
}

#[test]
fn a_stopped_ring_goes_on_where_it_was() {
    let world = PlainVolume::serve("base");
    let mut guest = world.guest(Options { queues: 2, ..Options::default() });
    for sector in 0..5 {
        assert_eq!(guest.write(1, sector, &[sector as u8; 512]), block::DONE);
    }
    let base = guest.stop_queue(1).unwrap();
    assert_eq!(base, 5);
    assert_eq!(guest.stop_queue(1).unwrap(), 5, "stopping twice");
    assert_eq!(guest.read(0, 3, 512).1, [3; 512], "the other ring runs on");
    guest.start_queue(1, base).unwrap();
    assert_eq!(guest.read(1, 4, 512), (block::DONE, vec![4; 512]));
    guest.front_end.tell(message::SET_VRING_ENABLE, &state(1, 0), &[]).unwrap();
    let ticket = guest.submit(1, block::IN, 2, &[], 512);
    guest.kick_hard(1);
    assert_eq!(guest.read(0, 0, 512).0, block::DONE);
    assert_eq!(guest.status(ticket), block::PENDING, "a disabled ring does nothing");
    guest.front_end.tell(message::SET_VRING_ENABLE, &state(1, 1), &[]).unwrap();
    guest.wait_used(1);
    assert_eq!(guest.data(ticket, 512), [2; 512]);
}

/// What QEMU sends when the machine is stopped, and when it goes on.
#[test]
fn a_status_reset_keeps_the_base_for_who_asks_afterwards() {
    let world = PlainVolume::serve("qemu-stop");
    let mut guest = world.guest(Options { inflight: true, ..Options::default() });
    for sector in 0..7 {
        assert_eq!(guest.write(0, sector, &[sector as u8; 512]), block::DONE);
    }
    guest.front_end.tell(message::SET_STATUS, &words(&[0]), &[]).unwrap();
    guest.front_end.tell(message::SET_VRING_ENABLE, &state(0, 0), &[]).unwrap();
    assert_eq!(guest.stop_queue(0).unwrap(), 7);
    guest.share_inflight().unwrap();
    guest.start_queue(0, 7).unwrap();
    assert_eq!(guest.read(0, 6, 512), (block::DONE, vec![6; 512]));
}

#[test]
fn a_ring_without_a_kick_descriptor_is_polled() {
    let world = PlainVolume::serve("nokick");
    let mut guest = world.guest(Options::default());
    guest.front_end.tell(message::SET_VRING_KICK, &words(&[0x100]), &[]).unwrap();
    let ticket = guest.submit(0, block::GET_ID, 0, &[], 20);
    guest.wait_used(0); // Nobody kicked.
    assert_eq!(guest.status(ticket), block::DONE);
}

#[test]
fn a_reset_stops_rings_and_a_new_driver_starts_them_afresh() {
    let world = PlainVolume::serve("reset");
    let options = Options { inflight: true, ..Options::default() };
    let mut guest = world.guest(options.clone());
    guest.front_end.tell(message::SET_STATUS, &words(&[7]), &[]).unwrap();
    assert_eq!(guest.front_end.ask(message::GET_STATUS, &[]).unwrap().u64(), 7);
    assert_eq!(guest.write(0, 0, &[1; 512]), block::DONE);
    for reset in [message::RESET_DEVICE, message::SET_STATUS] {
        let payload = if reset == message::SET_STATUS { words(&[0]) } else { Vec::new() };
        guest.front_end.tell(reset, &payload, &[]).unwrap();
        let ticket = guest.submit(0, block::IN, 0, &[], 512);
        guest.kick_hard(0);
        assert_eq!(guest.front_end.ask(message::GET_STATUS, &[]).unwrap().u64(), 0);
        assert_eq!(guest.status(ticket), block::PENDING, "a reset ring does nothing");
        let used = guest.ram.u16(guest.place(0).used + 2);
        guest.share_inflight().unwrap();
        guest.start_queue(0, used).unwrap();
        guest.wait_used(0);
        assert_eq!(guest.data(ticket, 512), [1; 512]);
        guest.release(ticket);
    }
}

#[test]
fn a_second_front_end_waits_until_the_first_has_gone() {
    let world = PlainVolume::serve("second");
    let mut first = world.guest(Options::default());
    let (socket, host) = (world.socket.clone(), world.host.clone());
    let second = std::thread::spawn(move || {
        let mut guest = Guest::connect(&socket, Options::default()).unwrap();
        assert_eq!(host.journal().disconnected, 1, "the first had gone");
        guest.read(0, 0, 512)
    });
    assert_eq!(first.write(0, 0, &[9; 512]), block::DONE);
    assert_eq!(world.host.journal().connected, 1);
    drop(first);
    assert_eq!(second.join().unwrap(), (block::DONE, vec![9; 512]));
}

#[test]
fn a_front_end_that_dies_with_requests_in_flight_leaves_a_working_volume() {
    let world = PlainVolume::serve("dies");
    let mut guest = world.guest(Options { queues: 4, ..Options::default() });
    world.host.hold_from(0);
    for queue in 0..4 {
        for sector in 0..8 {
            guest.submit(queue, block::OUT, sector, &[1; 512], 0);
        }
        guest.kick(queue);
    }
    while world.host.popped() < 32 {
        std::thread::yield_now();
    }
    drop(guest);
    world.host.hold_from(u64::MAX);
    let mut guest = world.guest(Options::default());
    assert_eq!(world.host.journal().disconnected, 1);
    assert_eq!(guest.read(0, 7, 512), (block::DONE, vec![1; 512]), "drained, not dropped");
}

#[test]
fn a_live_resize_reaches_front_end_and_requests() {
    let world = PlainVolume::serve("resize");
    let mut guest = world.guest(Options::default());
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    guest.front_end.tell(message::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]).unwrap();
    assert_eq!(guest.read(0, SECTORS - 1, 1024).0, block::IO_ERROR);
    world.server.set_capacity(SECTORS / 2);
    let mut news = [0; 12];
    io::Read::read_exact(&mut &ours, &mut news).unwrap();
    assert_eq!(news, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], "read the configuration again");
    assert_eq!(guest.front_end.config(0, 8).unwrap(), (SECTORS / 2).to_le_bytes());
    assert_eq!(guest.read(0, SECTORS / 2 - 1, 512).0, block::DONE);
    assert_eq!(guest.read(0, SECTORS / 2, 512).0, block::IO_ERROR);
    // Also when the disk has changed and its size has not.
    world.server.notify_changed();
    io::Read::read_exact(&mut &ours, &mut news).unwrap();
    assert_eq!(news[..4], [2, 0, 0, 0]);
    assert_eq!(guest.front_end.config(0, 8).unwrap(), (SECTORS / 2).to_le_bytes());
}

#[test]
fn stopping_the_server_drains_and_removes_the_socket() {
    let world = PlainVolume::serve("stop");
    let mut guest = world.guest(Options::default());
    assert!(world.server.is_connected());
    world.host.hold_from(0);
    let ticket = guest.submit(0, block::OUT, 5, &[3; 512], 0);
    guest.kick(0);
    while world.host.popped() == 0 {
        std::thread::yield_now();
    }
    // Half a message must not hold it up.
    guest.front_end.send_bytes(&[1, 0, 0, 0, 1], &[]).unwrap();
    let PlainVolume { socket, host, server } = world;
    server.stop();
    assert_eq!(guest.status(ticket), block::DONE);
    assert!(!socket.exists());
    assert_eq!(host.disk(5, 512), [3; 512]);
    assert!(guest.front_end.receive().unwrap().is_none(), "the connection is closed");
}

fn bind(path: &Path) -> Result<Server, BindError> {
    let host: Arc<dyn QueueHost> = PlainHost::new(memory_disk(8));
    Server::bind(path, disk_info(), host)
}

#[test]
fn a_socket_path_that_cannot_be_ours_is_refused_with_the_reason() {
    let long = std::env::temp_dir().join("x".repeat(108));
    let message = bind(&long).unwrap_err().to_string();
    assert!(message.contains("more than 107"), "{message}");

    let path = socket_path("bind");
    let live = bind(&path).unwrap();
    assert!(matches!(bind(&path).unwrap_err(), BindError::InUse(_)));
    drop(live);
    assert!(!path.exists());

    // What a killed daemon leaves behind: a socket file that nobody listens on.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(bind(&path).unwrap());

    File::create(&path).unwrap();
    assert!(matches!(bind(&path).unwrap_err(), BindError::NotASocket(_)));
    assert!(path.exists(), "untouched");
    std::fs::remove_file(&path).unwrap();
    let nowhere = Path::new("/nonexistent/directory/volume.sock");
    assert!(matches!(bind(nowhere).unwrap_err(), BindError::Os { .. }));
}

/// A server in a process of its own, to be killed.
struct Victim {
    process: Child,
    output: Option<File>,
}

const VICTIM_SOCKET: &str = "BESSEL_TEST_VICTIM_SOCKET";
const VICTIM_DISK: &str = "BESSEL_TEST_VICTIM_DISK";
const VICTIM_HOLD: &str = "BESSEL_TEST_VICTIM_HOLD";

impl Victim {
    /// Returns once it listens.
    fn start(socket: &Path, disk: &Path, hold_from: u64) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "victim"])
            .env(VICTIM_SOCKET, socket)
            .env(VICTIM_DISK, disk)
            .env(VICTIM_HOLD, hold_from.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = io::BufReader::new(process.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("victim listens") {
            line.clear();
            assert_ne!(
                io::BufRead::read_line(&mut output, &mut line).unwrap(),
                0,
                "it never listened"
            );
        }
        Self { process, output: Some(File::from(OwnedFd::from(output.into_inner()))) }
    }

    fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.output.take();
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Not a test: the body of [`Victim`]'s process, which serves until its standard input ends.
#[test]
#[ignore = "run by other tests, in a process that they kill"]
fn victim() {
    let variable = |name| std::env::var(name).expect("set by `Victim::start`");
    let disk = File::options().read(true).write(true).open(variable(VICTIM_DISK)).unwrap();
    let capacity_sectors = disk.metadata().unwrap().len() / 512;
    let host = PlainHost::new(disk);
    host.hold_from(variable(VICTIM_HOLD).parse().unwrap());
    let socket = PathBuf::from(variable(VICTIM_SOCKET));
    let info = DiskInfo { capacity_sectors, ..disk_info() };
    let _server = Server::bind(&socket, info, host).unwrap().spawn().unwrap();
    println!("victim listens");
    io::Read::read_to_end(&mut io::stdin(), &mut Vec::new()).unwrap();
}

/// A file that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn disk(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("bessel-{}-{name}.img", std::process::id()));
        File::create(&path).unwrap().set_len(SECTORS * 512).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn requests_in_flight_survive_a_killed_server_in_order() {
    let (socket, disk) = (socket_path("kill"), Scratch::disk("kill"));
    let _left_behind = Scratch(socket.clone());
    let victim = Victim::start(&socket, &disk.0, 100);
    let options = Options { inflight: true, queues: 2, ..Options::default() };
    let mut guest = Guest::connect(&socket, options).unwrap();
    assert_eq!(guest.write(0, 0, &[1; 512]), block::DONE);
    // Two writes of one sector: their order must survive. Sector 1 completes meanwhile.
    let held: Vec<_> = [(100, 7), (101, 8), (100, 9)]
        .map(|(sector, byte)| guest.submit(0, block::OUT, sector, &[byte; 512], 0))
        .into();
    let other = guest.submit(1, block::OUT, 102, &[6; 512], 0);
    let done = guest.submit(0, block::OUT, 1, &[2; 512], 0);
    guest.kick(0);
    guest.kick(1);
    assert_eq!(guest.wait_used(0).head, done.head, "the only one that is not held");
    victim.kill();
    // Submitted while nobody is there.
    let late = guest.submit(0, block::OUT, 103, &[5; 512], 0);
    let victim = Victim::start(&socket, &disk.0, u64::MAX);
    guest.reconnect(&socket, BaseAfterReconnect::Used).unwrap();
    let mut heads: Vec<_> = (0..4).map(|_| guest.wait_used(0).head).collect();
    heads.sort_unstable();
    let mut expected: Vec<_> = held.iter().chain([&late]).map(|ticket| ticket.head).collect();
    expected.sort_unstable();
    assert_eq!(heads, expected, "each once");
    assert_eq!(guest.wait_used(1).head, other.head);
    assert_eq!(guest.read(0, 100, 1024).1, [[9; 512], [8; 512]].as_flattened());
    assert_eq!(guest.read(1, 102, 1024).1, [[6; 512], [5; 512]].as_flattened());
    assert_eq!((guest.poll_used(0), guest.poll_used(1)), (None, None));
    drop(victim);
}

#[test]
fn what_came_while_nobody_was_there_is_found_whatever_base_the_front_end_tells() {
    let (socket, disk) = (socket_path("late"), Scratch::disk("late"));
    let _left_behind = Scratch(socket.clone());
    let options = Options { inflight: true, ..Options::default() };
    let mut victim = Victim::start(&socket, &disk.0, u64::MAX);
    let mut guest = Guest::connect(&socket, options).unwrap();
    for (sector, base) in
        [BaseAfterReconnect::Used, BaseAfterReconnect::Available].iter().enumerate()
    {
        assert_eq!(guest.write(0, 0, &[1; 512]), block::DONE);
        victim.kill();
        let late = guest.submit(0, block::OUT, sector as u64, &[5; 512], 0);
        victim = Victim::start(&socket, &disk.0, u64::MAX);
        guest.reconnect(&socket, *base).unwrap();
        assert_eq!(guest.wait_used(0).head, late.head, "{base:?}");
        guest.release(late);
        assert_eq!(guest.read(0, sector as u64, 512).1, [5; 512]);
    }
    drop(victim);
}

/// A guest moved to another process (cloud-hypervisor restores a snapshot so) brings its rings, with
/// requests that nobody has popped, and asks for a region of its own.
#[test]
fn a_new_region_for_a_ring_with_requests_in_it_misses_none() {
    let world = PlainVolume::serve("moved");
    let mut guest = world.guest(Options { inflight: true, ..Options::default() });
    assert_eq!(guest.write(0, 0, &[1; 512]), block::DONE);
    assert_eq!(guest.stop_queue(0).unwrap(), 1);
    let late = guest.submit(0, block::OUT, 1, &[5; 512], 0);
    guest.forget_inflight();
    guest.share_inflight().unwrap();
    guest.start_queue(0, 2).unwrap();
    assert_eq!(guest.wait_used(0).head, late.head);
    guest.release(late);
    assert_eq!(guest.read(0, 1, 512).1, [5; 512]);
}

/// Kills the server at whatever instruction it is, again and again under load. Every request is
/// answered exactly once, and the disk holds what the last write to each sector said.
#[test]
fn no_request_is_lost_or_answered_twice_over_many_kills() {
    let (socket, disk) = (socket_path("kills"), Scratch::disk("kills"));
    let _left_behind = Scratch(socket.clone());
    let options = Options { inflight: true, queue_size: 32, data_max: 512, ..Options::default() };
    let mut victim = Victim::start(&socket, &disk.0, u64::MAX);
    let mut guest = Guest::connect(&socket, options).unwrap();
    let mut under_way = Vec::new();
    let mut written = vec![0u8; 64];
    let mut count = 0u64;
    for kill in 0..12u64 {
        let mut served = 0;
        while served < 200 + kill * 37 {
            while guest.room(0) > 0 && under_way.len() < 30 {
                // One write of a sector at a time, so that what is last is known.
                let sector = (count * 29 % 64) as usize;
                if under_way.iter().any(|(busy, _, _)| *busy == sector) {
                    break;
                }
                count += 1;
                let byte = count as u8;
                let ticket = guest.submit(0, block::OUT, sector as u64, &[byte; 512], 0);
                under_way.push((sector, byte, ticket));
            }
            guest.kick(0);
            while let Some(used) = guest.poll_used(0) {
                finish(&mut guest, &mut under_way, &mut written, used.head);
                served += 1;
            }
        }
        victim.kill();
        victim = Victim::start(&socket, &disk.0, u64::MAX);
        let bases = [BaseAfterReconnect::Used, BaseAfterReconnect::Available];
        guest.reconnect(&socket, bases[kill as usize % 2]).unwrap();
    }
    while !under_way.is_empty() {
        let used = guest.wait_used(0);
        finish(&mut guest, &mut under_way, &mut written, used.head);
    }
    assert_eq!(guest.poll_used(0), None);
    for (sector, byte) in written.iter().enumerate() {
        assert_eq!(guest.read(0, sector as u64, 512).1, [*byte; 512], "sector {sector}");
    }
    drop(victim);
}

type UnderWay = Vec<(usize, u8, bessel_tests::guest::Ticket)>;

fn finish(guest: &mut Guest, under_way: &mut UnderWay, written: &mut [u8], head: u16) {
    let place = under_way.iter().position(|(_, _, ticket)| ticket.head == head);
    let (sector, byte, ticket) = under_way.remove(place.expect("answered once"));
    assert_eq!(guest.status(ticket), block::DONE);
    written[sector] = byte;
    guest.release(ticket);
}
