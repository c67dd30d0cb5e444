//! Collecting garbage on the real daemon: by hand, by schedule, when space runs out and after a kill,
//! beside guests that check what they read.
//!
//! What a test waits for is what the daemon says of itself, never time.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use bessel_tests::guest::{Guest, Options, block};
use serde_json::Value;
use std::path::Path;
use support::World;

const VM1: &str = "volumes:\n  - name: vm1\n    size: 2GiB\n    queues: 1\n";
const LEAF_SECTORS: u64 = 512 * 8;

fn guest(world: &World, volume: &str) -> Guest {
    let path = world.path(&format!("{volume}.sock"));
    Guest::connect(Path::new(&path), Options::default()).unwrap()
}

/// Writes a block into each of some leaves, each with a byte of its own.
fn write(guest: &mut Guest, leaves: std::ops::Range<u64>, round: u8) {
    for leaf in leaves {
        let bytes = [leaf as u8 ^ round; 4096];
        assert_eq!(guest.write(0, leaf * LEAF_SECTORS, &bytes), block::DONE, "leaf {leaf}");
    }
}

fn check_reads(guest: &mut Guest, leaves: std::ops::Range<u64>, round: u8) {
    for leaf in leaves {
        let (status, bytes) = guest.read(0, leaf * LEAF_SECTORS, 4096);
        assert_eq!(status, block::DONE);
        assert!(bytes.iter().all(|byte| *byte == leaf as u8 ^ round), "leaf {leaf}");
    }
}

fn status(world: &World) -> Value {
    world.json("gc --status")
}

fn until(world: &World, done: impl Fn(&Value) -> bool) -> Value {
    loop {
        let now = status(world);
        if done(&now) {
            return now;
        }
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap()
}

fn freed(report: &Value) -> u64 {
    number(&report["freed_data_bytes"]) + number(&report["freed_metadata_bytes"])
}

/// Waits until the collection that a killed daemon calls for has ended.
fn until_collected_after_a_kill(world: &World) -> Value {
    let last = until(world, |now| number(&now["ended"]) > 0)["last"].clone();
    assert_eq!((&last["trigger"], &last["outcome"]), (&"crash".into(), &"done".into()), "{last}");
    last
}

fn check_has_no_leak(world: &World) {
    let found = world.json(&format!("check {}", world.path("store.img")));
    assert_eq!(found["clean"], true, "{found}");
    for kind in ["data", "metadata"] {
        assert_eq!(found[kind]["leaked_bytes"], 0, "{found}");
    }
}

#[test]
fn a_deleted_volume_and_what_a_killed_daemon_had_claimed_come_back() {
    let mut world = World::new("collect");
    world.serve(VM1);
    let mut first = guest(&world, "vm1");
    write(&mut first, 0..40, 1);
    world.text("snapshot create vm1 --label base");
    world.text("volume create clone --from vm1@base");
    let mut second = guest(&world, "clone");
    write(&mut second, 0..10, 2);
    write(&mut second, 40..45, 2);
    drop(first);
    let report = loop {
        // Until the daemon has noticed that its front-end is gone.
        if world.run("volume delete vm1").status.success() {
            break world.json("gc");
        }
    };
    // Ten blocks that only the volume had; the clone needs the others, and their nodes.
    assert_eq!(report["freed_data_bytes"], 10 * 4096, "{report}");
    assert_eq!((&report["outcome"], &report["volumes_reclaimed"]), (&"done".into(), &1.into()));
    check_reads(&mut second, 0..10, 2);
    check_reads(&mut second, 10..40, 1);
    let told = world.text("gc");
    assert!(told.starts_with("0B freed (0B of data, 0B of metadata) in "), "{told}");
    assert!(told.contains("1 deleted volumes are gone; there is room for as many"), "{told}");
    let metrics = world.request("GET", "/metrics", "");
    assert!(metrics.contains("bessel_gc_runs_total 2"), "{metrics}");

    world.kill();
    world.serve("");
    let last = until_collected_after_a_kill(&world);
    assert!(freed(&last) > 0, "claims: {last}");
    let told = world.text("gc --status");
    assert!(told.starts_with("no collection is running\nthe last one, begun 20"), "{told}");
    let mut second = guest(&world, "clone");
    check_reads(&mut second, 0..10, 2);
    check_reads(&mut second, 10..40, 1);
    check_reads(&mut second, 40..45, 2);
    world.end("-TERM");
    check_has_no_leak(&world);
}

#[test]
fn a_collection_can_be_watched_and_ended_and_ends_with_the_daemon() {
    let mut world = World::new("collect-slowly");
    world.serve(&format!("gc: {{ rate: 1MiB, low_space: off }}\n{VM1}"));
    let mut guest = guest(&world, "vm1");
    // Some seconds of nodes, at that rate.
    write(&mut guest, 0..900, 3);
    assert_eq!(guest.flush(0), block::DONE);
    let ended = world.refused("gc --stop");
    assert!(ended.contains("no collection is running"), "{ended}");
    let running = world.spawn("gc");
    let now = until(&world, |now| now["phase"] == "mark" && number(&now["nodes_found"]) > 900);
    assert_eq!(now["trigger"], "command");
    let told = world.text("gc --status");
    assert!(told.contains("running: reading nodes; "), "{told}");
    let refused = world.refused("gc");
    assert!(refused.contains("a collection is running already"), "{refused}");
    write(&mut guest, 0..20, 4);
    world.text("gc --stop");
    let output = running.wait_with_output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(error, "bessel: the collection has ended early: an operator has ended it\n");

    let running = world.spawn("gc");
    until(&world, |now| now["phase"] == "mark" && number(&now["nodes_read"]) > 0);
    check_reads(&mut guest, 0..20, 4);
    check_reads(&mut guest, 20..900, 3);
    world.end("-TERM");
    assert!(!running.wait_with_output().unwrap().status.success());
    check_has_no_leak(&world);
}

#[test]
fn collections_come_by_schedule_and_when_space_runs_out() {
    let mut world = World::new("collect-by-itself");
    world.serve(&format!("gc: {{ every: 1s, rate: unlimited }}\n{VM1}"));
    let now = until(&world, |now| number(&now["ended"]) > 1);
    assert_eq!(
        (&now["last"]["trigger"], &now["last"]["outcome"]),
        (&"schedule".into(), &"done".into())
    );
    world.end("-TERM");

    // The store is 64 MiB, of which soon more than a tenth is in use.
    world.serve(&format!("gc: {{ low_space: 90% }}\n{VM1}"));
    let mut guest = guest(&world, "vm1");
    write(&mut guest, 0..900, 5);
    assert_eq!(guest.flush(0), block::DONE);
    let now = until(&world, |now| number(&now["ended"]) > 0);
    assert_eq!(now["last"]["trigger"], "low_space", "{now}");
    world.end("-TERM");
    check_has_no_leak(&world);
}

/// A guest that writes and reads, snapshots that come and go, and one collection after the other.
#[test]
fn collections_under_load_harm_nobody() {
    let mut world = World::new("collect-load");
    let scheduled = "    snapshots: { every: 5ms, keep: 4 }\n";
    world.serve(&format!("gc: {{ rate: unlimited }}\n{VM1}{scheduled}"));
    let mut guest = guest(&world, "vm1");
    write(&mut guest, 0..100, 0);
    for round in 1..40u8 {
        let running = world.spawn("gc --json");
        write(&mut guest, 0..50, round);
        check_reads(&mut guest, 0..50, round);
        check_reads(&mut guest, 50..100, 0);
        let output = running.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    assert_eq!(guest.flush(0), block::DONE);
    drop(guest);
    world.end("-TERM");
    let found = world.json(&format!("check {}", world.path("store.img")));
    assert_eq!(found["clean"], true, "{found}");
}

/// With a volume detached in order a collection knows what it has.
#[test]
fn a_detached_volume_keeps_what_it_has() {
    let mut world = World::new("collect-detached");
    world.serve(VM1);
    let mut writer = guest(&world, "vm1");
    write(&mut writer, 0..30, 7);
    drop(writer);
    world.text("volume detach vm1");
    world.text("volume create other --size 1MiB");
    let report = world.json("gc");
    assert_eq!((&report["outcome"], freed(&report)), (&"done".into(), 0), "{report}");
    world.text("volume attach vm1");
    check_reads(&mut guest(&world, "vm1"), 0..30, 7);
    world.end("-TERM");
    check_has_no_leak(&world);
}

fn write_and_flush(guest: &mut Guest, round: u8) {
    write(guest, 0..20, round);
    assert_eq!(guest.flush(0), block::DONE);
}

/// Three volumes, each but the first a clone of the one before, of which the second is deleted and collected.
fn chain_of_clones(world: &World) -> Guest {
    let mut first = guest(world, "vm1");
    write_and_flush(&mut first, 1);
    world.text("snapshot create vm1 --label base");
    world.text("volume create between --from vm1@base");
    world.text("snapshot create between --label base");
    world.text("volume create clone --from between@base");
    world.text("volume delete between");
    world.json("gc");
    first
}

/// Between two volumes of a chain of clones one is deleted, collected, and its slot another's. What the last
/// shares with the first must outlive the first one's snapshot.
#[test]
fn a_clone_keeps_what_it_has_when_its_origin_lost_its_slot() {
    let mut world = World::new("collect-holes");
    world.serve(&format!("gc: {{ low_space: off }}\n{VM1}"));
    let mut first = chain_of_clones(&world);
    let full = (0..).find_map(|number| {
        let output = world.run(&format!("volume create filler-{number} --size 1MiB"));
        (!output.status.success()).then(|| String::from_utf8(output.stderr).unwrap())
    });
    assert!(full.as_ref().unwrap().contains("registry"), "{full:?}");
    write_and_flush(&mut first, 2);
    world.text("snapshot delete vm1@base");
    while world.json("stats")["reclaim"]["waiting"].as_u64().unwrap() > 0 {}
    drop(first);
    let mut reader = guest(&world, "clone");
    check_reads(&mut reader, 0..20, 1);
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
    let mut first = chain_of_clones(&world);
    // Nodes where that log was.
    for leaf in 20..900 {
        assert_eq!(first.write(0, leaf * LEAF_SECTORS, &[7; 4096]), block::DONE, "leaf {leaf}");
    }
    assert_eq!(first.flush(0), block::DONE);
    drop(first);
    world.end("-TERM");
    world.serve(&format!("gc: {{ low_space: off }}\n{VM1}"));
    let mut first = guest(&world, "vm1");
    write_and_flush(&mut first, 2);
    let deleted = world.json("snapshot delete vm1@base");
    while world.json("stats")["reclaim"]["waiting"].as_u64().unwrap() > 0 {}
    drop(first);
    world.end("-TERM");
    let found = world.run(&format!("check {} --json", world.path("store.img")));
    assert!(found.status.success(), "{deleted}: {}", String::from_utf8_lossy(&found.stderr));
}
