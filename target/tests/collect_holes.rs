//! A chain of clones that the reuse of a registry slot has cut, on the real daemon.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use bessel_tests::guest::{Guest, Options, block};
use std::path::Path;
use support::World;

const VM1: &str = "volumes:\n  - name: vm1\n    size: 2GiB\n    queues: 1\n";
const LEAF_SECTORS: u64 = 512 * 8;

fn guest(world: &World, volume: &str) -> Guest {
    let path = world.path(&format!("{volume}.sock"));
    Guest::connect(Path::new(&path), Options::default()).unwrap()
}

fn write(guest: &mut Guest, round: u8) {
    for leaf in 0..20 {
        let bytes = [leaf as u8 ^ round; 4096];
        assert_eq!(guest.write(0, leaf * LEAF_SECTORS, &bytes), block::DONE, "leaf {leaf}");
    }
    assert_eq!(guest.flush(0), block::DONE);
}

/// Between two volumes of a chain of clones one is deleted, collected, and its slot another's. What the last
/// shares with the first must outlive the first one's snapshot.
#[test]
fn a_clone_keeps_what_it_has_when_its_origin_lost_its_slot() {
    let mut world = World::new("collect-holes");
    world.serve(&format!("gc: {{ low_space: off }}\n{VM1}"));
    let mut first = guest(&world, "vm1");
    write(&mut first, 1);
    world.text("snapshot create vm1 --label base");
    world.text("volume create between --from vm1@base");
    world.text("snapshot create between --label base");
    world.text("volume create clone --from between@base");
    world.text("volume delete between");
    world.json("gc");
    let full = (0..).find_map(|number| {
        let output = world.run(&format!("volume create filler-{number} --size 1MiB"));
        (!output.status.success()).then(|| String::from_utf8(output.stderr).unwrap())
    });
    assert!(full.as_ref().unwrap().contains("registry"), "{full:?}");
    write(&mut first, 2);
    world.text("snapshot delete vm1@base");
    while world.json("stats")["reclaim"]["waiting"].as_u64().unwrap() > 0 {}
    drop(first);
    let mut reader = guest(&world, "clone");
    for leaf in 0..20 {
        let (status, bytes) = reader.read(0, leaf * LEAF_SECTORS, 4096);
        assert_eq!(status, block::DONE);
        assert!(bytes.iter().all(|byte| *byte == leaf as u8 ^ 1), "leaf {leaf}");
    }
    drop(reader);
    world.end("-TERM");
    let found = world.json(&format!("check {}", world.path("store.img")));
    assert_eq!(found["clean"], true, "{found}");
}

/// The same without another in its slot: its log was collected, is written over, and cannot be read by the
/// next daemon. That it has no snapshots is then not known.
#[test]
fn a_clone_keeps_what_it_has_when_the_log_of_its_origin_was_collected() {
    let mut world = World::new("collect-log-holes");
    world.serve(&format!("gc: {{ low_space: off }}\n{VM1}"));
    let mut first = guest(&world, "vm1");
    write(&mut first, 1);
    world.text("snapshot create vm1 --label base");
    world.text("volume create between --from vm1@base");
    world.text("snapshot create between --label base");
    world.text("volume create clone --from between@base");
    world.text("volume delete between");
    world.json("gc");
    // Nodes where that log was.
    for leaf in 20..900 {
        assert_eq!(first.write(0, leaf * LEAF_SECTORS, &[7; 4096]), block::DONE, "leaf {leaf}");
    }
    assert_eq!(first.flush(0), block::DONE);
    drop(first);
    world.end("-TERM");
    world.serve(&format!("gc: {{ low_space: off }}\n{VM1}"));
    let mut first = guest(&world, "vm1");
    write(&mut first, 2);
    let deleted = world.json("snapshot delete vm1@base");
    while world.json("stats")["reclaim"]["waiting"].as_u64().unwrap() > 0 {}
    drop(first);
    world.end("-TERM");
    let found = world.run(&format!("check {} --json", world.path("store.img")));
    assert!(found.status.success(), "{deleted}: {}", String::from_utf8_lossy(&found.stderr));
}
