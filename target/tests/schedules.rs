//! Snapshots by schedule and by time, on the real daemon: taken, thinned, named, rolled back to.
//!
//! What a test waits for is what the daemon says of itself, never time.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use bessel_tests::guest::{Guest, Options, block};
use serde_json::Value;
use std::path::Path;
use support::World;

const VM1: &str = "volumes:\n  - name: vm1\n    size: 64MiB\n    queues: 1\n";
const SCHEDULED: &str = "    snapshots: { every: 1ms, keep: 5 }\n";

fn schedule(world: &World, volume: &str) -> Value {
    world.json(&format!("volume show {volume}"))["schedule"].clone()
}

/// Waits until the schedule of `volume` says so.
fn until(world: &World, volume: &str, done: impl Fn(&Value) -> bool) -> Value {
    loop {
        let now = schedule(world, volume);
        if done(&now) {
            return now;
        }
        assert_eq!(now["failed"], 0, "{now}\n{}", world.log());
    }
}

fn count(value: &Value) -> u64 {
    value.as_u64().unwrap()
}

fn live(world: &World, volume: &str) -> Vec<Value> {
    world.json(&format!("snapshot list {volume}")).as_array().unwrap().clone()
}

#[test]
fn a_schedule_takes_and_thins_and_lets_labels_be() {
    let mut world = World::new("schedule");
    world.serve(&format!("{VM1}{SCHEDULED}"));
    let label = world.json("snapshot create vm1 --label kept");
    let plain = world.json("snapshot create vm1");
    let now = until(&world, "vm1", |now| count(&now["thinned"]) > 50);
    assert_eq!(now["keep"]["newest"], 5, "{now}");
    assert_eq!((&now["every_ns"], &now["paused"]), (&1_000_000.into(), &false.into()));

    // Changed while it runs, and taken away; what is there stays as it is.
    let said = world.text("volume schedule vm1 --every 1h --keep 2");
    assert!(said.contains("a snapshot every 1h, kept: 2, until the daemon ends"), "{said}");
    world.text("volume schedule vm1 --off");
    assert_eq!(schedule(&world, "vm1"), Value::Null);
    let ids = |all: &[Value]| all.iter().map(|it| it["id"].clone()).collect::<Vec<_>>();
    let left = ids(&live(&world, "vm1"));
    assert!(left.contains(&label["id"]), "labels keep: {left:?}");
    assert!(!left.contains(&plain["id"]), "what has no label is thinned: {left:?}");
    let stats = world.json("stats");
    assert_eq!(stats["volumes"][0]["snapshots_scheduled"], 0, "that schedule has ended: {stats}");

    // What a volume of the configuration has at the next start stands there.
    world.end("-TERM");
    world.serve(&format!("{VM1}{SCHEDULED}"));
    until(&world, "vm1", |now| count(&now["taken"]) > 0);
    let metrics = world.request("GET", "/metrics", "");
    assert!(
        metrics.contains("bessel_volume_snapshots_scheduled_total{volume=\"vm1\"}"),
        "{metrics}"
    );
    world.end("-TERM");
    assert_eq!(world.json(&format!("check {}", world.path("store.img")))["clean"], true);
}

#[test]
fn a_schedule_goes_and_comes_with_its_volume() {
    let mut world = World::new("schedule-detach");
    world.serve(&format!("{VM1}{SCHEDULED}"));
    until(&world, "vm1", |now| count(&now["taken"]) > 3);
    let detached = world.json("volume detach vm1");
    assert_eq!(detached["schedule"]["paused"], true, "{detached}");
    let before = live(&world, "vm1").len();
    // Its handle on the reactor goes to this one, whose snapshots nobody asks for.
    world.text("volume create other --size 1MiB");
    world.text("volume attach vm1");
    until(&world, "vm1", |now| count(&now["taken"]) > 3);
    assert!(before > 0 && live(&world, "other").is_empty());
    world.text("volume delete vm1");
    assert!(world.refused("volume schedule vm1 --off").contains("no volume \"vm1\""));
    for (body, message) in [
        (r#"{"every_ns": 1000, "keep": {}}"#, "1µs will not do; give 1ms to 365d"),
        (r#"{"every_ns": 1000000000, "keep": {"newest": 0}}"#, "keeping no snapshot"),
        (r#"{"every_ns": 1000000000, "keep": {"newest": 1, "ages": []}}"#, "both newest and ages"),
        (r#"{"every_ns": 1000000000, "keep": {"ages": []}}"#, "0 ages to keep will not do"),
        (r#"{"every_ns": 1000000000}"#, "missing field `keep`"),
        (r#"{"every_ns": 1000000000, "keep": {"last": 1}}"#, "unknown field `last`"),
        (r#"{"every_ns": -1, "keep": {}}"#, "invalid value"),
    ] {
        let answer = world.request("PUT", "/v1/volumes/other/schedule", body);
        assert!(answer.starts_with("HTTP/1.1 400 "), "{body}: {answer}");
        assert!(answer.contains(message), "{body}: {answer}");
    }
    assert_eq!(schedule(&world, "other"), Value::Null);
    world.end("-TERM");
}

#[test]
fn a_moment_names_the_newest_snapshot_that_there_was() {
    let mut world = World::new("time");
    world.serve(VM1);
    let none = world.refused("snapshot delete vm1@2026-11-20T11:40:00Z");
    assert!(none.contains("volume \"vm1\" has no snapshot at all"), "{none}");
    let times: Vec<String> = (0..3)
        .map(|_| world.json("snapshot create vm1")["time"].as_str().unwrap().to_owned())
        .collect();
    let labels = std::cell::Cell::new(0);
    // Any operation tells which snapshot it was about; a label does no harm.
    let at = |time: &str| {
        labels.set(labels.get() + 1);
        world.json(&format!("snapshot label vm1@{time} l{}", labels.get()))["id"].clone()
    };
    assert_eq!(at(&times[1]), "1.1", "a snapshot's own time names it");
    let nanoseconds = times[1].trim_end_matches('Z').rsplit('.').next().unwrap().to_owned();
    let just_before = format!("{:09}", nanoseconds.parse::<u64>().unwrap().saturating_sub(1));
    let just_before = times[1].replace(&nanoseconds, &just_before);
    assert_eq!(at(&just_before), "1.0", "{times:?}");
    assert_eq!(at("2999-01-01T00:00:00+01:00"), "1.2");

    let early = world.refused("volume create x --from vm1@2001-02-03T04:05:06Z");
    let expected = "volume \"vm1\" has no snapshot at or before 2001-02-03T04:05:06.000000000Z; its oldest is 1.0";
    assert!(early.contains(expected), "{early}");
    assert!(early.contains(&times[0]), "{early}");
    let answer = world.request("DELETE", "/v1/snapshots/vm1@1000d%20ago", "");
    assert!(
        answer.starts_with("HTTP/1.1 404 ") && answer.contains("its oldest is 1.0"),
        "{answer}"
    );
    let taken = world.request("POST", "/v1/volumes", r#"{"name": "now", "from": "vm1@0s ago"}"#);
    assert!(taken.contains(r#""origin":"1.2""#), "{taken}");

    let answer = world.request("PATCH", "/v1/snapshots/1.0", r#"{"label": "20261120T114000Z"}"#);
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("read as a time"), "{answer}");
    for text in ["vm1@yesterday%20noon", "vm1@11:40", "vm1@5%20ago"] {
        let answer = world.request("DELETE", &format!("/v1/snapshots/{text}"), "");
        assert!(
            answer.starts_with("HTTP/1.1 400 ") && answer.contains("names no snapshot"),
            "{answer}"
        );
    }
    // Deleted ones are passed over.
    world.text("snapshot delete 1.2");
    assert_eq!(at("2999-01-01T00:00:00Z"), "1.1");

    let done = world.json(&format!("volume rollback vm1 vm1@{}", times[0]));
    assert_eq!((&done["snapshot"]["id"], &done["kept"]["id"]), (&"1.0".into(), &"1.3".into()));
    assert_eq!(done["kept"]["label"], "before-rollback-3");
    let tree = world.text("tree");
    let left = ["└─ 1.0 @", "left by a rollback", "   ├─ 1.1 @", "└─ 1.3 @before-rollback-3"];
    let lines: Vec<usize> = left.map(|text| tree.find(text).expect(&tree)).into();
    assert!(lines.is_sorted(), "{tree}");
    let undone = world.text("volume rollback vm1 vm1@before-rollback-3 --label mine");
    assert!(undone.contains("1.3 (vm1@before-rollback-3)"), "{undone}");
    assert!(undone.contains("`bessel volume rollback vm1 1.4` undoes this"), "{undone}");
    assert_eq!(world.json("snapshot list vm1")[3]["label"], "mine");
    let deleted = world.text("snapshot delete 1.1");
    assert_eq!(deleted, "deleted snapshot 1.1\n");
    world.text("volume create clone --from 1.0");
    let deleted = world.text("snapshot delete 1.0");
    assert!(deleted.contains("what its clones need lives on: clone"), "{deleted}");
}

/// Rolls back again and again under a guest that reads and writes: every request is answered, and what
/// it reads is one state or the other.
#[test]
fn a_guest_goes_on_over_a_forced_rollback_and_sees_the_other_contents() {
    let mut world = World::new("force");
    world.serve(VM1);
    let path = world.path("vm1.sock");
    let mut guest = Guest::connect(Path::new(&path), Options::default()).unwrap();
    assert_eq!(guest.write(0, 0, &[1; 4096]), block::DONE);
    world.text("snapshot create vm1 --label one");
    assert_eq!(guest.write(0, 0, &[2; 4096]), block::DONE);
    let refused = world.refused("volume rollback vm1 vm1@one");
    assert!(refused.contains("in use by a front-end; stop the guest first, or give --force"));
    for round in 0..20u8 {
        let tickets: Vec<_> = (1..20)
            .map(|block| guest.submit(0, block::OUT, block * 8, &[round; 4096], 0))
            .collect();
        guest.kick(0);
        let running = world.spawn("volume rollback vm1 vm1@one --force");
        for _ in &tickets {
            guest.wait_used(0);
        }
        for ticket in tickets {
            assert_eq!(guest.status(ticket), block::DONE);
            guest.release(ticket);
        }
        let output = running.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let (status, bytes) = guest.read(0, 0, 4096);
        assert_eq!((status, bytes), (block::DONE, vec![1; 4096]));
        assert_eq!(guest.write(0, 0, &[2; 4096]), block::DONE);
    }
    drop(guest);
    while world.json("volume show vm1")["connected"] == true {}
    world.end("-TERM");
    assert_eq!(world.json(&format!("check {}", world.path("store.img")))["clean"], true);
}

/// Gold images: each clone is a disk of its own.
#[test]
fn a_thousand_clones_are_made_at_once_and_share_nothing_but_their_past() {
    let mut world = World::new("gold");
    // Room for so many in the registry, and for their roots in memory.
    world.node_cache = "32MiB";
    world.text("format store.img --size 1GiB --extent-size 32MiB");
    world.serve(VM1);
    let socket = |world: &World, name: &str| world.path(&format!("{name}.sock"));
    let connect = |path: String| Guest::connect(Path::new(&path), Options::default()).unwrap();
    let mut guest = connect(socket(&world, "vm1"));
    assert_eq!(guest.write(0, 0, &[1; 8192]), block::DONE);
    world.text("snapshot create vm1 --label gold");
    assert!(world.refused("volume create c --from vm1@none --count 3").contains("no snapshot"));
    world.text("volume create vm-2 --size 1MiB");
    let taken = world.refused("volume create vm --from vm1@gold --count 3");
    assert!(taken.contains("already a volume named"), "{taken}");
    assert_eq!(world.json("volume list").as_array().unwrap().len(), 2, "nothing was made");
    world.text("volume delete vm-2");
    let said = world.text("volume create vm --from vm1@gold --count 1000");
    assert_eq!(said, "created 1000 volumes from snapshot 1.0: vm-1 to vm-1000\n");
    assert_eq!(world.json("volume list").as_array().unwrap().len(), 1001);
    let some: Vec<String> = [1, 2, 500, 1000].map(|number| format!("vm-{number}")).into();
    for (number, name) in some.iter().enumerate() {
        let mut guest = connect(socket(&world, name));
        assert_eq!(guest.write(0, 0, &[number as u8 + 2; 4096]), block::DONE, "{name}");
        assert_eq!(guest.flush(0), block::DONE, "{name}");
    }
    world.text("snapshot delete vm1@gold");
    world.end("-KILL");
    world.serve(VM1);
    for (number, name) in some.iter().enumerate() {
        let mut guest = connect(socket(&world, name));
        assert_eq!(guest.read(0, 0, 4096), (block::DONE, vec![number as u8 + 2; 4096]), "{name}");
        assert_eq!(guest.read(0, 8, 4096), (block::DONE, vec![1; 4096]), "{name}");
    }
    assert_eq!(connect(socket(&world, "vm1")).read(0, 0, 4096), (block::DONE, vec![1; 4096]));
    assert_eq!(connect(socket(&world, "vm-3")).read(0, 0, 4096), (block::DONE, vec![1; 4096]));
    world.end("-TERM");
    assert_eq!(world.json(&format!("check {}", world.path("store.img")))["clean"], true);
}
