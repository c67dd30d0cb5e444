//! Tens of thousands of snapshots of one volume on the real daemon: listed by pages, found, deleted, thinned,
//! across restarts, with their log read in the background.
//!
//! What a test waits for is what the daemon says of itself, never time.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use bessel_mapping::request::VolumeId;
use bessel_mapping::store::{self, OpenMode};
use bessel_reactor::device::{FileDevice, OpenOptions};
use serde_json::{Value, json};
use std::os::unix::fs::FileExt;
use std::path::Path;
use support::World;

const VM1: &str = "volumes:\n  - name: vm1\n    size: 64MiB\n    queues: 1\n";
const COUNT: usize = 20_000;
/// Who take snapshots at once.
const TAKERS: usize = 8;

/// A daemon over a store with room for the snapshots.
fn world(tag: &str) -> World {
    let mut world = World::new(tag);
    let store = world.store.clone();
    world.text(&format!("format {store} --size 512MiB"));
    world.serve(VM1);
    world
}

/// Takes snapshots of vm1. Every 100th of each taker has a label.
fn take(world: &World, count: usize) {
    std::thread::scope(|scope| {
        for taker in 0..TAKERS {
            scope.spawn(move || {
                for at in 0..count / TAKERS {
                    let label = (at % 100 == 0).then(|| format!("l{taker}.{at}"));
                    let body = json!({ "label": label }).to_string();
                    let answer = world.request("POST", "/v1/volumes/vm1/snapshots", &body);
                    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
                }
            });
        }
    });
}

fn get(world: &World, path: &str) -> Value {
    let answer = world.request("GET", path, "");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{path}: {answer}");
    serde_json::from_str(body).unwrap()
}

fn ids(list: &Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(|it| it["id"].as_str().unwrap().to_owned()).collect()
}

/// Waits until nothing of a deleted snapshot waits to be freed. Says how many were done with. What waits
/// when the collection begins that follows a crash is left to the next one.
fn reclaimed(world: &World, after_crash: bool) -> u64 {
    loop {
        let now = world.json("stats")["reclaim"].clone();
        let left = now["left_to_collector"].as_u64().unwrap();
        assert!(after_crash || left == 0, "{now}\n{}", world.log());
        if now["waiting"] == 0 {
            return now["snapshots"].as_u64().unwrap() + left;
        }
    }
}

fn check(world: &World) {
    assert_eq!(world.json(&format!("check {}", world.store))["clean"], true);
}

#[test]
fn tens_of_thousands_of_snapshots_are_listed_found_and_deleted() {
    let mut world = world("logs");
    take(&world, COUNT);
    let labelled = COUNT / 100;
    for life in 0..2 {
        if life == 0 {
            world.end("-TERM");
        } else {
            world.kill();
        }
        world.serve(VM1);
        // At once, whatever has been read by then: who needs more waits for it.
        // Not one of those with a label: they come 800 apart.
        let id = format!("1.{}", 400 + life);
        let deleted = world.json(&format!("snapshot delete {id}"));
        assert_eq!(deleted["left_to_collector"], Value::Null, "{deleted}");
        let by_label = world.json("snapshot label vm1@l3.1200 l3.1200");
        assert_eq!(by_label["label"], "l3.1200");
        let taken = world.refused("snapshot create vm1 --label l0.0");
        assert!(taken.contains("already taken"), "{taken}");
        assert_eq!(reclaimed(&world, life == 1), 1);
        let left = COUNT - 1 - life;
        let shown = world.json("volume show vm1");
        assert_eq!((&shown["snapshots"], &shown["snapshots_unread"]), (&left.into(), &0.into()));

        let all = world.json("snapshot list vm1");
        let all_ids = ids(&all);
        assert_eq!(all_ids.len(), left);
        assert!(!all_ids.contains(&id));
        let text = world.text("snapshot list vm1");
        assert_eq!(text.lines().count(), left + 1);
        assert!(text.lines().skip(1).map(|line| line.split(' ').next().unwrap()).eq(&all_ids));
        let with_label = all.as_array().unwrap().iter().filter(|it| it["label"] != Value::Null);
        assert_eq!(with_label.count(), labelled);
        assert_eq!(world.json("volume show vm1")["snapshot_list"], all);

        // By pages of any length.
        for limit in [1, 1000, 1024] {
            let page =
                get(&world, &format!("/v1/volumes/vm1/snapshots?limit={limit}&after=1.9999"));
            assert_eq!(ids(&page), all_ids[9999 - life..][..limit]);
        }
        assert_eq!(ids(&get(&world, "/v1/volumes/vm1/snapshots")), all_ids[..1024]);
        assert_eq!(get(&world, &format!("/v1/volumes/vm1/snapshots?after=1.{COUNT}")), json!([]));
        let after = world.json(&format!("snapshot list vm1 --after 1.{}", COUNT - 3));
        assert_eq!(ids(&after), all_ids[left - 2..]);

        // The newest at a time is the last one of that time: by the hundred in a second.
        let some = &all[12_345 - life];
        let named = format!("vm1@{}", some["time"].as_str().unwrap());
        let body = json!({ "name": format!("clone{life}"), "from": named }).to_string();
        let made = world.request("POST", "/v1/volumes", &body);
        assert!(made.starts_with("HTTP/1.1 200 "), "{made}");
        let origin = world.json(&format!("volume show clone{life}"))["origin"].clone();
        let mut same = all.as_array().unwrap().iter().filter(|it| it["time"] == some["time"]);
        assert_eq!(same.next_back().unwrap()["id"], origin);

        let tree = world.json("tree");
        assert_eq!(ids(&tree["volumes"][0]["snapshots"]), all_ids);
        let drawn = world.text("tree");
        assert!(drawn.lines().count() < 5 * labelled, "runs are folded");
    }
    for bad in ["limit=0", "limit=2000", "after=2.1", "after=x", "page=3"] {
        let answer = world.request("GET", &format!("/v1/volumes/vm1/snapshots?{bad}"), "");
        assert!(answer.starts_with("HTTP/1.1 400 "), "{bad}: {answer}");
    }
    world.end("-TERM");
    check(&world);
}

/// Thinned by the thousand, detached and attached, deleted while a clone lives, and all of it across a
/// restart, by which the log of what is deleted is read from the device.
#[test]
fn a_long_log_is_thinned_detached_and_outlived() {
    let mut world = world("long-logs");
    take(&world, COUNT / 2);
    world.text("volume create clone --from vm1@l0.0");
    let before = ids(&world.json("snapshot list vm1"));
    assert_eq!(before.len(), COUNT / 2);
    assert_eq!(world.json("volume detach vm1")["snapshots"], COUNT / 2);
    assert_eq!(ids(&world.json("snapshot list vm1")), before, "as it was last known");
    world.text("volume attach vm1");
    world.text("volume schedule vm1 --every 1s --keep 3");
    let labelled = (COUNT / 2 / TAKERS).div_ceil(100) * TAKERS;
    loop {
        let shown = world.json("volume list");
        let vm1 = shown.as_array().unwrap().iter().find(|it| it["name"] == "vm1").unwrap().clone();
        assert_eq!(vm1["schedule"]["failed"], 0, "{vm1}\n{}", world.log());
        if vm1["snapshots"] == labelled + 3 {
            break;
        }
    }
    world.text("volume schedule vm1 --off");
    reclaimed(&world, false);
    let left = ids(&world.json("snapshot list vm1"));
    // One more may have been taken by now.
    assert!((labelled + 3..labelled + 5).contains(&left.len()), "{left:?}");
    let origin = world.json("volume show clone")["origin"].clone();
    world.text("volume delete vm1");
    for _ in 0..2 {
        let tree = world.json("tree");
        let volumes = tree["volumes"].as_array().unwrap();
        let shown: Vec<_> = volumes.iter().map(|it| (&it["name"], &it["deleted"])).collect();
        assert_eq!(
            shown,
            [(&"vm1".into(), &true.into()), (&"clone".into(), &false.into())],
            "{tree}"
        );
        assert_eq!(ids(&volumes[0]["snapshots"]), [origin.as_str().unwrap()]);
        // What lies between them is gone, and known to be: what only it held is freed.
        world.text("snapshot create clone --label x");
        let deleted = world.json("snapshot delete clone@x");
        assert_eq!(deleted["left_to_collector"], Value::Null, "{deleted}");
        assert!(reclaimed(&world, false) > 0);
        world.end("-TERM");
        world.serve("");
    }
    world.end("-TERM");
    check(&world);
}

/// The volume is served, has its newer snapshots and takes more; of the others it says what, where and what
/// to do.
#[test]
fn a_damaged_old_block_of_a_log_costs_the_snapshots_up_to_it() {
    let mut world = world("damaged-log");
    take(&world, 160);
    world.text("volume create clone --from vm1@l0.0");
    world.end("-TERM");
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let mut device = FileDevice::open(Path::new(&world.store), &options).unwrap();
    let opened = store::open(&mut device, OpenMode::ReadOnly).unwrap();
    let record = &opened.directory.entry(VolumeId(1)).unwrap().record;
    let block = store::read_log(&mut device, &opened, record).blocks[3];
    drop(device);
    let file = std::fs::OpenOptions::new().write(true).open(&world.store).unwrap();
    file.write_all_at(&[0x5a; 16], block.offset().get() + 1000).unwrap();
    world.serve(VM1);
    let place = format!("block {block}");
    let told = |text: &str| {
        assert!(text.contains(&place) && text.contains("before 1.96"), "{text}");
        assert!(text.contains("bessel check"), "{text}");
    };
    told(&world.refused("snapshot list vm1"));
    told(&world.refused("snapshot delete 1.50"));
    told(&world.refused("snapshot create vm1 --label new"));
    told(&world.refused("volume create other --from vm1@no-such"));
    let shown = world.json("volume show vm1");
    assert_eq!((&shown["state"], &shown["snapshots_unread"]), (&"online".into(), &96.into()));
    assert!(shown["snapshots_fault"].as_str().unwrap().contains(&place), "{shown}");
    assert_eq!(ids(&shown["snapshot_list"]).len(), 64);
    assert_eq!(ids(&world.json("snapshot list vm1 --after 1.95")).len(), 64);
    assert!(world.text("volume show vm1").contains(&place));
    assert!(world.log().contains(&place), "{}", world.log());
    world.text("snapshot create vm1");
    assert_eq!(ids(&world.json("tree")["volumes"][0]["snapshots"]).len(), 65);
    // What it may share with its relatives is nobody's to free.
    let deleted = world.json("snapshot delete 1.120");
    assert!(deleted["left_to_collector"].is_string(), "{deleted}");
    world.text("snapshot create clone --label x");
    world.json("snapshot delete clone@x");
    assert_eq!(world.json("stats")["reclaim"]["snapshots"], 0);
    world.end("-TERM");
    let found = world.run(&format!("check {}", world.store));
    assert!(String::from_utf8_lossy(&found.stdout).contains(&place), "{found:?}");
}
