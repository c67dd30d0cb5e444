//! Guests on volumes of the real daemon: what they write is there, in snapshots, in clones, and after
//! the daemon was killed.
//!
//! The guest is the misbehaving-when-asked driver of `bessel-tests`; here it behaves.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use bessel_tests::guest::{BaseAfterReconnect, Guest, Options, block};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use support::World;

const SECTORS_PER_BLOCK: u64 = 8;

fn volumes(names: &[&str]) -> String {
    let volume = |name: &&str| format!("  - name: {name}\n    size: 1GiB\n    queues: 2\n");
    format!("volumes:\n{}", names.iter().map(volume).collect::<String>())
}

fn connect(world: &World, volume: &str, options: Options) -> Guest {
    let socket = world.path(&format!("{volume}.sock"));
    Guest::connect(Path::new(&socket), options).unwrap()
}

/// Bytes that tell blocks and writes apart.
fn pattern(block: u64, write: u8) -> Vec<u8> {
    (0..4096u64).map(|byte| (block * 31 + byte) as u8 ^ write).collect()
}

fn write(guest: &mut Guest, block: u64, write: u8) {
    let status = guest.write(0, block * SECTORS_PER_BLOCK, &pattern(block, write));
    assert_eq!(status, block::DONE, "block {block}");
}

fn holds(guest: &mut Guest, block: u64, expected: &[u8]) {
    let (status, bytes) = guest.read(0, block * SECTORS_PER_BLOCK, 4096);
    assert_eq!(status, block::DONE, "block {block}");
    assert!(bytes == expected, "block {block} holds something else");
}

#[test]
fn a_snapshot_and_its_clone_keep_what_the_guest_had_written_before() {
    let mut world = World::new("clone");
    world.serve(&volumes(&["vm1"]));
    let mut guest = connect(&world, "vm1", Options::default());
    for block in 0..50 {
        write(&mut guest, block * 1000, 1);
    }
    world.text("snapshot create vm1 --label base");
    for block in 0..25 {
        write(&mut guest, block * 1000, 2);
    }
    world.text("volume create clone --from vm1@base");
    let mut cloned = connect(&world, "clone", Options::default());
    for block in 0..50 {
        holds(&mut cloned, block * 1000, &pattern(block * 1000, 1));
        let now = if block < 25 { 2 } else { 1 };
        holds(&mut guest, block * 1000, &pattern(block * 1000, now));
    }
    write(&mut cloned, 0, 3);
    holds(&mut guest, 0, &pattern(0, 2));
    holds(&mut cloned, 1, &[0; 4096]);

    drop(guest);
    while world.json("volume show vm1")["connected"] == true {}
    world.text("volume rollback vm1 vm1@base");
    let mut guest = connect(&world, "vm1", Options::default());
    holds(&mut guest, 0, &pattern(0, 1));
    world.end("-TERM");
    assert_eq!(world.json(&format!("check {}", world.path("store.img")))["clean"], true);
}

#[test]
fn volumes_on_two_reactors_do_not_touch_each_other() {
    let cores = bessel_reactor::reactor::usable_cores();
    let cores = format!("{:?}", &cores[..cores.len().min(2)]);
    let mut world = World::new("reactors");
    world.serve(&format!("reactors:\n  cores: {cores}\n{}", volumes(&["a", "b", "c"])));
    let names = ["a", "b", "c"];
    let mut guests = names.map(|name| connect(&world, name, Options::default()));
    for block in 0..200 {
        for (index, guest) in guests.iter_mut().enumerate() {
            write(guest, block * 77, index as u8);
        }
    }
    for (index, guest) in guests.iter_mut().enumerate() {
        assert_eq!(guest.flush(0), block::DONE);
        for block in 0..200 {
            holds(guest, block * 77, &pattern(block * 77, index as u8));
        }
    }
    let stats = world.json("stats");
    assert_eq!(stats["volumes"][1]["writes"], 200);
    assert_eq!(stats["volumes"][1]["read_bytes"], 200 * 4096);
    assert_eq!(stats["store"]["data_bytes"], 600 * 4096);
    world.end("-TERM");
    let report = world.json(&format!("check {}", world.path("store.img")));
    assert_eq!(report["clean"], true, "{report}");
    assert_eq!(report["data"]["leaked_bytes"], 0, "claims were given back: {report}");
}

/// How many messages each reactor has taken.
fn messages(world: &World) -> Vec<u64> {
    let stats = world.json("stats");
    let reactors = stats["reactors"].as_array().unwrap();
    reactors.iter().map(|reactor| reactor["messages"].as_u64().unwrap()).collect()
}

/// A reactor answers for its volumes alone. It hears of others when blocks are claimed or given back, and of
/// the control plane; what is there is read and written again without a word.
#[test]
fn reads_and_writes_in_place_take_no_message() {
    const BLOCKS: u64 = 64;
    let cores = bessel_reactor::reactor::usable_cores();
    let cores = &cores[..cores.len().min(2)];
    let mut world = World::new("messages");
    let reactors = format!("reactors:\n  cores: {cores:?}\n  balance: off\n");
    world.serve(&format!("{reactors}{}", volumes(&["a", "b"])));
    let mut guests = ["a", "b"].map(|name| connect(&world, name, Options::default()));
    for guest in &mut guests {
        (0..BLOCKS).for_each(|block| write(guest, block * 77, 1));
        assert_eq!(guest.flush(0), block::DONE);
    }
    let before = messages(&world);
    assert!(before.iter().all(|taken| *taken > 0), "its queues came by one: {before:?}");
    for round in 2..10 {
        for block in (0..BLOCKS).map(|block| block * 77) {
            for guest in &mut guests {
                write(guest, block, round);
                holds(guest, block, &pattern(block, round));
            }
        }
    }
    // The question is one.
    let expected: Vec<u64> = before.iter().map(|taken| taken + 1).collect();
    assert_eq!(messages(&world), expected);
    world.end("-TERM");
}

/// Kills the daemon with requests in flight and starts it again under a guest that stays. Every
/// request is answered, and has happened: the guest does not know of the kill.
fn kill_under_load(cache: &str) {
    let mut world = World::new(cache);
    let config = format!("{}    cache: {cache}\n", volumes(&["vm1"]));
    world.serve(&config);
    let options = Options { inflight: true, ..Options::default() };
    let mut guest = connect(&world, "vm1", options);
    for block in 0..20 {
        write(&mut guest, block, 1);
    }
    assert_eq!(guest.flush(0), block::DONE);
    let tickets: Vec<_> = (0..60)
        .map(|block| {
            let bytes = pattern(block, 2);
            guest.submit(0, block::OUT, block * SECTORS_PER_BLOCK, &bytes, 0)
        })
        .collect();
    guest.kick(0);
    world.end("-KILL");
    let pending = |guest: &Guest| -> Vec<bool> {
        tickets.iter().map(|ticket| guest.status(*ticket) == block::PENDING).collect()
    };
    world.serve(&config);
    guest.reconnect(Path::new(&world.path("vm1.sock")), BaseAfterReconnect::Used).unwrap();
    while pending(&guest).contains(&true) {
        guest.wait_used(0);
    }
    while guest.poll_used(0).is_some() {}
    for ticket in &tickets {
        assert_eq!(guest.status(*ticket), block::DONE);
        guest.release(*ticket);
    }
    for block in 0..60 {
        holds(&mut guest, block, &pattern(block, 2));
    }
    world.end("-TERM");
    assert_eq!(world.json(&format!("check {}", world.path("store.img")))["clean"], true);
}

#[test]
fn a_killed_daemon_loses_nothing_in_writeback_mode() {
    kill_under_load("writeback");
}

#[test]
fn a_killed_daemon_loses_nothing_in_writethrough_mode() {
    kill_under_load("writethrough");
}

/// Each life that ends before it serves leaves the next one what the killed one left.
#[test]
fn starts_that_fail_do_not_void_what_a_killed_daemon_left() {
    let mut world = World::new("failing");
    let config = volumes(&["vm1"]);
    world.serve(&config);
    let mut guest = connect(&world, "vm1", Options::default());
    for block in 0..30 {
        write(&mut guest, block, 1);
    }
    drop(guest);
    world.end("-KILL");
    for _ in 0..3 {
        world.fail_to_serve(&config);
    }
    world.serve(&config);
    let mut guest = connect(&world, "vm1", Options::default());
    for block in 0..30 {
        holds(&mut guest, block, &pattern(block, 1));
    }
    drop(guest);
    world.end("-TERM");
    let left = std::fs::read_dir(&world.directory).unwrap();
    let names = left.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let journals: Vec<_> = names.filter(|name| name.ends_with(".journal")).collect();
    assert!(journals.is_empty(), "an orderly end removes them: {journals:?}");
}

/// A record that cannot be read may come back: what a killed daemon had answered waits for it.
#[test]
fn changes_of_a_volume_whose_record_cannot_be_read_are_kept() {
    /// Where the registry of a store of 64 MiB lies: the first volume's two slots.
    const REGISTRY: [u64; 2] = [97 * 4096, 98 * 4096];
    let mut world = World::new("unread");
    let config = volumes(&["vm1", "vm2"]);
    world.serve(&config);
    let mut guest = connect(&world, "vm1", Options::default());
    for block in 0..30 {
        write(&mut guest, block, 1);
    }
    drop(guest);
    world.end("-KILL");
    let image = std::fs::File::options().write(true).read(true).open(world.path("store.img"));
    let image = image.unwrap();
    let flip = || {
        for offset in REGISTRY {
            let mut byte = [0];
            image.read_exact_at(&mut byte, offset + 300).unwrap();
            image.write_all_at(&[byte[0] ^ 1], offset + 300).unwrap();
        }
    };
    flip();
    for _ in 0..2 {
        let said = world.serve(&config);
        assert!(said.contains("volume vm2 ") && !said.contains("volume vm1 "), "{said}");
        world.end("-TERM");
    }
    flip();
    world.serve(&config);
    let mut guest = connect(&world, "vm1", Options::default());
    for block in 0..30 {
        holds(&mut guest, block, &pattern(block, 1));
    }
    drop(guest);
    world.end("-TERM");
    assert_eq!(world.json(&format!("check {}", world.path("store.img")))["clean"], true);
}

/// A store that was put back from a copy knows nothing of what its successor's journal says.
#[test]
fn a_journal_does_not_count_for_a_store_put_back_from_a_copy() {
    let mut world = World::new("putback");
    let config = volumes(&["vm1", "vm2"]);
    world.serve(&config);
    world.end("-TERM");
    std::fs::copy(world.path("store.img"), world.path("copy.img")).unwrap();
    world.serve(&config);
    let mut guest = connect(&world, "vm1", Options::default());
    for block in 0..40 {
        write(&mut guest, block, 1);
    }
    drop(guest);
    world.end("-KILL");
    std::fs::copy(world.path("copy.img"), world.path("store.img")).unwrap();
    world.serve(&config);
    let mut guest = connect(&world, "vm1", Options::default());
    for block in 0..40 {
        holds(&mut guest, block, &[0; 4096]);
    }
    drop(guest);
    world.end("-TERM");
    assert_eq!(world.json(&format!("check {}", world.path("store.img")))["clean"], true);
}

#[test]
fn a_volume_grows_under_its_guest() {
    let mut world = World::new("grow");
    world.serve(&volumes(&["vm1"]));
    let mut guest = connect(&world, "vm1", Options::default());
    let last = (1 << 30) / 4096;
    let (status, _) = guest.read(0, last * SECTORS_PER_BLOCK, 4096);
    assert_eq!(status, block::IO_ERROR, "past the end");
    world.text("volume resize vm1 2TiB");
    write(&mut guest, last, 1);
    let far = (2 << 40) / 4096 - 1;
    write(&mut guest, far, 2);
    holds(&mut guest, last, &pattern(last, 1));
    holds(&mut guest, far, &pattern(far, 2));
    let sectors = guest.front_end.config(0, 8).unwrap();
    assert_eq!(sectors, ((2u64 << 40) / 512).to_le_bytes());
}

#[test]
fn a_full_store_refuses_new_blocks_and_serves_the_rest() {
    let mut world = World::new("full");
    world.serve(&volumes(&["vm1"]));
    let mut guest = connect(&world, "vm1", Options::default());
    let bytes = vec![7; 64 << 10];
    let sectors = (bytes.len() / 512) as u64;
    // The store has 64 MiB, the volume 1 GiB.
    let full = (0..).find(|place| guest.write(0, place * sectors, &bytes) != block::DONE).unwrap();
    assert!((600..1024).contains(&full), "full after {full} writes of 64 KiB");
    assert_eq!(guest.write(0, 0, &[8; 4096]), block::DONE, "an overwrite needs no block");
    assert_eq!(guest.read(0, 0, 4096), (block::DONE, vec![8; 4096]));
    assert_eq!(guest.read(0, (full - 1) * sectors, 4096).0, block::DONE);
    assert!(world.json("stats")["reactors"][0]["no_space"].as_u64().unwrap() > 0);
    assert_eq!(world.log().matches("the store is full").count(), 1, "{}", world.log());
    assert_eq!(world.json("volume show vm1")["state"], "online");
    for place in 0..64 {
        assert_eq!(guest.discard(0, place * sectors, sectors as u32), block::DONE);
    }
    assert_eq!(guest.flush(0), block::DONE);
    assert_eq!(
        guest.write(0, full * sectors, &bytes),
        block::DONE,
        "discarded blocks are used again"
    );
}

#[test]
fn front_ends_that_come_and_go_leave_nothing_behind() {
    let mut world = World::new("come-and-go");
    world.serve(&volumes(&["vm1"]));
    let gone = |world: &World| while world.json("volume show vm1")["connected"] == true {};
    let descriptors =
        |world: &World| std::fs::read_dir(format!("/proc/{}/fd", world.pid())).unwrap().count();
    let options = || Options { queues: 2, inflight: true, ..Options::default() };
    drop(connect(&world, "vm1", options()));
    gone(&world);
    let before = descriptors(&world);
    for round in 0..30 {
        let mut guest = connect(&world, "vm1", options());
        for block in 0..40 {
            let queue = block as usize % 2;
            let sector = (round * 40 + block) * SECTORS_PER_BLOCK;
            guest.submit(queue, block::OUT, sector, &pattern(block, 1), 0);
        }
        guest.kick(0);
        guest.kick(1);
        if round % 3 == 0 {
            guest.stop_queue(0).unwrap();
        }
    }
    gone(&world);
    // The API may be about to close a connection, ours of a moment ago.
    let closed = (0..10_000).any(|_| descriptors(&world) <= before);
    assert!(closed, "{} descriptors instead of {before}", descriptors(&world));
    let mut guest = connect(&world, "vm1", options());
    write(&mut guest, 7, 9);
    holds(&mut guest, 7, &pattern(7, 9));
    drop(guest);
    world.end("-TERM");
    assert_eq!(world.json(&format!("check {}", world.path("store.img")))["clean"], true);
}

/// Waits until what deleted snapshots alone held is free, and returns how many bytes that was.
fn freed(world: &World) -> u64 {
    loop {
        let stats = world.json("stats");
        let reclaim = &stats["reclaim"];
        assert_eq!(reclaim["left_to_collector"], 0, "{}", world.log());
        if reclaim["waiting"] == 0 {
            return reclaim["freed_bytes"].as_u64().unwrap();
        }
    }
}

#[test]
fn what_snapshots_differ_in_is_told_and_is_free_when_only_a_deleted_one_has_it() {
    let mut world = World::new("diff");
    world.serve(&volumes(&["vm1", "vm2"]));
    let mut guest = connect(&world, "vm1", Options::default());
    for at in [0, 1, 2, 600, 100_000] {
        write(&mut guest, at, 1);
    }
    world.text("snapshot create vm1 --label one");
    write(&mut guest, 1, 2);
    write(&mut guest, 100_000, 2);
    write(&mut guest, 7, 2);
    world.text("snapshot create vm1 --label two");

    let diff = world.json("snapshot diff vm1@one vm1@two");
    let range = |first: u64| serde_json::json!({ "first_bytes": first * 4096, "length_bytes": 4096, "now": "data" });
    assert_eq!(diff["ranges"], serde_json::json!([range(1), range(7), range(100_000)]));
    assert_eq!((&diff["from"], &diff["to"]), (&"1.0".into(), &"1.1".into()));
    assert_eq!(diff["changed_bytes"], 3 * 4096);
    assert_eq!(diff["nodes_read"], 8, "root, middle and two leaves, of each");
    let back = world.json("snapshot diff 1.1 1.0");
    assert_eq!(back["ranges"][1]["now"], "hole");
    let text = world.text("snapshot diff vm1@one vm1@two");
    assert!(
        text.contains("4096       4096    data") && text.ends_with("3 ranges, 12KiB\n"),
        "{text}"
    );
    assert!(world.text("snapshot diff 1.1 1.1").contains("hold the same"));
    world.text("snapshot create vm2 --label other");
    assert!(world.refused("snapshot diff 1.0 2.0").contains("no origin in common"));
    assert!(world.refused("snapshot diff 1.0 1.9").contains("no snapshot 1.9"));

    // A clone keeps what it reads; what neither it nor anybody else has is free at once.
    world.text("volume create clone --from 1.0");
    world.text("snapshot delete vm1@one");
    assert_eq!(freed(&world), 4096, "its root; the clone has the rest");
    assert!(world.json("volume show clone")["origin"] == "1.0");
    let mut cloned = connect(&world, "clone", Options::default());
    holds(&mut cloned, 1, &pattern(1, 1));
    write(&mut guest, 7, 3);
    assert_eq!(guest.flush(0), block::DONE);
    let before = freed(&world);
    world.text("snapshot delete vm1@two");
    assert!(freed(&world) >= before + 4 * 4096, "a block and the path to it");
    for (at, now) in [(0, 1), (1, 2), (7, 3), (100_000, 2)] {
        holds(&mut guest, at, &pattern(at, now));
    }
    holds(&mut cloned, 100_000, &pattern(100_000, 1));
    drop((guest, cloned));
    world.end("-TERM");
    let report = world.json(&format!("check {}", world.path("store.img")));
    assert_eq!(report["clean"], true, "{report}");
    assert_eq!(report["data"]["leaked_bytes"], 0, "{report}");
    assert_eq!(report["metadata"]["leaked_bytes"], 0, "{report}");
}

#[test]
fn an_exported_snapshot_is_a_sparse_file_or_a_pipe_of_what_the_guest_had() {
    let mut world = World::new("export");
    world.serve("volumes:\n  - name: vm1\n    size: 8388096\n    queues: 1\n");
    let mut guest = connect(&world, "vm1", Options { queues: 1, ..Options::default() });
    let last = 8388096 / 4096; // Which lies past the end in part.
    for at in [0, 5, 6, 1000] {
        write(&mut guest, at, 1);
    }
    let status = guest.write(0, last * SECTORS_PER_BLOCK, &pattern(last, 1)[..3584]);
    assert_eq!(status, block::DONE);
    world.text("snapshot create vm1 --label one");
    write(&mut guest, 5, 2);
    world.text("snapshot create vm1 --label two");

    let mut expected = vec![0; 8388096];
    for at in [0, 5, 6, 1000, last] {
        let start = at as usize * 4096;
        let end = (start + 4096).min(expected.len());
        expected[start..end].copy_from_slice(&pattern(at, 1)[..end - start]);
    }
    let said = world.json("snapshot export vm1@one one.img");
    assert_eq!(
        (&said["size_bytes"], &said["data_bytes"]),
        (&8388096.into(), &(5 * 4096 - 512).into())
    );
    assert!(std::fs::read(world.path("one.img")).unwrap() == expected);
    let blocks =
        std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(world.path("one.img")).unwrap());
    assert!(blocks * 512 < 1 << 20, "it has {blocks} sectors of eight MiB");
    let piped = world.run("snapshot export vm1@one -");
    assert!(piped.status.success() && piped.stdout == expected);

    // Nothing is replaced, or half made.
    assert!(world.refused("snapshot export vm1@two one.img").contains("exists"));
    assert!(world.refused("snapshot export vm1@nope one.img --force").contains("no snapshot"));
    assert!(std::fs::read(world.path("one.img")).unwrap() == expected);
    world.text("snapshot export vm1@two one.img --force");
    expected[5 * 4096..6 * 4096].copy_from_slice(&pattern(5, 2));
    assert!(std::fs::read(world.path("one.img")).unwrap() == expected);
    assert!(world.refused("snapshot export vm1@one /dev/null --force").contains("no regular file"));
    assert!(world.refused("snapshot export vm1@one none/one.img").contains("cannot write"));

    // The difference is one block, in a stream that ends as it should.
    world.text("snapshot export vm1@two diff --from vm1@one");
    let stream = std::fs::read(world.path("diff")).unwrap();
    assert_eq!((&stream[..8], stream.len()), (&b"BESSELDF"[..], 128 + 24 + 4096 + 24));
    assert!(stream[152..152 + 4096] == pattern(5, 2));
    let names: Vec<_> = std::fs::read_dir(&world.directory).unwrap().collect();
    let parts = names.iter().filter(|name| format!("{name:?}").contains(".part-"));
    assert_eq!(parts.count(), 0);
    drop(guest);
    world.end("-TERM");
}
