//! Moving volumes from one reactor to another on the real daemon, under guests that check every block: to
//! and fro, with snapshots by schedule going on, with limits, and killed in the middle of it.
//!
//! What a test waits for is what the daemon and the guests say, never time. On a machine with one core
//! there is nowhere to move to, and that is said.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use bessel_reactor::device::sim::Random;
use bessel_tests::guest::{Guest, Options, block};
use std::path::Path;
use support::World;
use support::load::{DEPTH, Load, configuration, cores, roomy, serve_again, shown, under_load};
use support::reader::Reader;

#[test]
fn guests_go_on_while_their_volumes_move_to_and_fro() {
    let Some(cores) = cores("guests_go_on_while_their_volumes_move_to_and_fro") else { return };
    let mut world = roomy("moving");
    let schedule = "    snapshots: { every: 2ms, keep: 5 }\n";
    world.serve(&configuration(cores, "", schedule));
    let names = ["vm1", "vm2"];
    let mut loads = [Load::new(&world, names[0], 1), Load::new(&world, names[1], 2)];
    loads.iter_mut().for_each(|load| load.work(500));
    assert_eq!(shown(&world, "vm1")["core"], cores[0]);
    assert_eq!(shown(&world, "vm2")["core"], cores[1]);
    let mut taken = [0; 2];
    for round in 0..24 {
        for (at, name) in names.into_iter().enumerate() {
            let core = cores[(round + at + 1) % 2];
            under_load(&world, &mut loads, &format!("volume move {name} --to {core}"));
            let now = shown(&world, name);
            assert_eq!(now["core"], core, "{now}");
            assert_eq!(
                (&now["state"], &now["connected"]),
                (&"online".into(), &true.into()),
                "{now}"
            );
            assert_eq!(now["schedule"]["failed"], 0, "{now}\n{}", world.log());
            let so_far = now["schedule"]["taken"].as_u64().unwrap();
            assert!(so_far >= taken[at], "its schedule goes on, and does not begin anew: {now}");
            taken[at] = so_far;
            // On its new home it is snapshotted and thinned as on the old one.
            if round % 8 == 0 {
                while shown(&world, name)["schedule"]["taken"].as_u64() < Some(so_far + 5) {
                    loads.iter_mut().for_each(|load| load.work(4));
                }
            }
        }
    }
    // Counted on, too.
    let stats = world.json("stats");
    for (at, load) in loads.iter_mut().enumerate() {
        load.verify(|| world.log());
        let volume = &stats["volumes"][at];
        let counted: u64 =
            ["reads", "writes", "flushes"].iter().map(|key| volume[key].as_u64().unwrap()).sum();
        assert!(counted + DEPTH as u64 >= load.ended / 2, "{} requests: {volume}", load.ended);
        assert_eq!(load.guest.flush(0), block::DONE);
    }
    assert!(taken.iter().all(|taken| *taken > 50), "{taken:?}");
    let clean = |world: &World| {
        let store = world.path("store.img");
        let report = world.json(&format!("check {store}"));
        assert_eq!(report["clean"], true, "{report}");
    };
    let versions = loads.map(|load| load.versions);
    world.end("-TERM");
    clean(&world);
    world.serve(&configuration(cores, "", ""));
    for (name, versions) in names.into_iter().zip(versions) {
        let mut load = Load { versions, ..Load::new(&world, name, 3) };
        load.verify(|| world.log());
    }
    world.end("-TERM");
    clean(&world);
}

/// What was acknowledged and not flushed outlives a kill, whichever reactor had the volume, and wherever the
/// move was.
#[test]
fn a_daemon_that_is_killed_while_volumes_move_loses_nothing() {
    let Some(cores) = cores("a_daemon_that_is_killed_while_volumes_move_loses_nothing") else {
        return;
    };
    let mut world = roomy("moving-kill");
    let config = configuration(cores, "", "");
    world.serve(&config);
    let names = ["vm1", "vm2"];
    let mut loads = [Load::new(&world, names[0], 4), Load::new(&world, names[1], 5)];
    let mut random = Random::new(6);
    for round in 0..25 {
        loads.iter_mut().for_each(|load| load.work(50));
        for _ in 0..random.below(3) {
            let name = names[random.below(2) as usize];
            let core = cores[random.below(2) as usize];
            under_load(&world, &mut loads, &format!("volume move {name} --to {core}"));
            loads.iter_mut().for_each(|load| load.work(20));
        }
        let (name, core) = (names[round % 2], cores[round / 2 % 2]);
        let mut moving = world.spawn(&format!("volume move {name} --to {core}"));
        for _ in 0..random.below(60) {
            loads.iter_mut().for_each(|load| load.work(2));
        }
        world.kill();
        let _ = moving.wait();
        serve_again(&mut world, &config, &mut loads, names, &mut random);
    }
    drop(loads);
    world.end("-TERM");
    let report = world.json(&format!("check {}", world.path("store.img")));
    assert_eq!(report["clean"], true, "{report}");
}

#[test]
fn what_else_can_be_done_with_a_volume_can_be_done_where_it_is_now() {
    let Some(cores) = cores("what_else_can_be_done_with_a_volume_can_be_done_where_it_is_now")
    else {
        return;
    };
    let mut world = roomy("moving-after");
    world.serve(&configuration(cores, "", ""));
    let mut load = Load::new(&world, "vm1", 7);
    load.work(300);
    let said = world.text(&format!("volume move vm1 --to {}", cores[1]));
    assert_eq!(said, format!("volume vm1: served by the reactor on core {}\n", cores[1]));
    let text = world.text("volume show vm1");
    assert!(text.contains(&format!("1, on core {}", cores[1])), "{text}");
    load.work(100);
    load.settle();
    // Its queues are stopped and started where they are now.
    let base = load.guest.stop_queue(0).unwrap();
    load.guest.start_queue(0, base).unwrap();
    load.work(100);
    load.settle();
    let snapshot = world.json("snapshot create vm1 --label one");
    let before = load.versions.clone();
    load.work(300);
    load.settle();
    world.text("volume rollback vm1 vm1@one --force");
    load.versions = before;
    load.verify(|| world.log());
    world.text(&format!("volume move vm1 --to {}", cores[0]));
    // A clone is made where the snapshot's volume was before it went away.
    world.text(&format!("volume create clone --from {}", snapshot["id"].as_str().unwrap()));
    for core in [cores[1], cores[0]] {
        world.text(&format!("volume move clone --to {core}"));
        let versions = load.versions.clone();
        let mut of_clone = Load { versions, ..Load::new(&world, "clone", 8) };
        of_clone.verify(|| world.log());
        drop(of_clone);
        while shown(&world, "clone")["connected"] == true {}
    }
    world.text("volume rename vm1 other");
    world.text("volume resize other 128MiB");
    world.text(&format!("volume move other --to {}", cores[1]));
    load.work(100);
    load.verify(|| world.log());
    drop(load.guest);
    // Detached and attached, it has the home that it was moved to.
    world.text("volume detach other");
    let refused = world.refused(&format!("volume move other --to {}", cores[0]));
    assert!(refused.contains("is detached; `bessel volume attach other` first"), "{refused}");
    world.text("volume attach other");
    assert_eq!(shown(&world, "other")["core"], cores[1]);
    world.text("volume delete other");
    world.text("gc");
    world.end("-TERM");
    let report = world.json(&format!("check {}", world.path("store.img")));
    assert_eq!(report["clean"], true, "{report}");
}

/// The other reactor has no room for one volume more: what was handed over is taken back.
#[test]
fn a_volume_that_the_other_reactor_cannot_open_goes_on_where_it_was() {
    let Some(cores) = cores("a_volume_that_the_other_reactor_cannot_open_goes_on_where_it_was")
    else {
        return;
    };
    let mut world = roomy("moving-full");
    world.node_cache = "1MiB"; // 128 nodes for each reactor, and so 32 volumes.
    world.serve(&configuration(cores, "", "    limits: { iops: 1000000 }\n"));
    let mut load = Load::new(&world, "vm1", 11);
    load.work(200);
    let snapshot = world.json("snapshot create vm1");
    let from = snapshot["id"].as_str().unwrap().to_owned();
    // Clones have four queues, and these volumes have two: both reactors get the same.
    world.text(&format!("volume create clone --from {from} --count 62"));
    for _ in 0..5 {
        load.work(50);
        let refused = world.refused(&format!("volume move vm1 --to {}", cores[1]));
        for words in [
            &format!("volume \"vm1\" stays on core {}: ", cores[0]),
            "32 volumes are open on this reactor",
            "raise store.node_cache",
        ] {
            assert!(refused.contains(words), "{refused}");
        }
        let now = shown(&world, "vm1");
        assert_eq!((&now["core"], &now["state"]), (&cores[0].into(), &"online".into()), "{now}");
        assert_eq!(now["limits"]["iops"], 1_000_000);
    }
    load.work(200);
    load.verify(|| world.log());
    // With room there it goes, and its place here is free.
    world.text("volume delete vm2");
    load.work(50);
    world.text(&format!("volume move vm1 --to {}", cores[1]));
    load.work(200);
    load.verify(|| world.log());
    world.text("volume create another --size 1MiB");
    assert_eq!(shown(&world, "another")["core"], cores[0]);
    world.end("-TERM");
    let report = world.json(&format!("check {}", world.path("store.img")));
    assert_eq!(report["clean"], true, "{report}");
}

/// Each request is paid for in 64 s, so who waits would not be through by waiting.
#[test]
fn limits_go_with_their_volume() {
    const REQUEST: usize = 4 << 20;
    let Some(cores) = cores("limits_go_with_their_volume") else { return };
    let mut world = roomy("moving-limits");
    let limits = "    limits: { bandwidth: 64KiB, burst: 1ms }\n";
    world.serve(&configuration(cores, "", limits));
    let socket = world.path("vm1.sock");
    let options = Options { queue_size: 8, data_max: REQUEST, ..Options::default() };
    let mut guest = Guest::connect(Path::new(&socket), options).unwrap();
    let tickets: Vec<_> = (0..4)
        .map(|at| guest.submit(0, block::OUT, at * (REQUEST as u64 / 512), &vec![7; REQUEST], 0))
        .collect();
    guest.kick(0);
    guest.wait_used(0); // The first one goes whatever its size.
    for core in [cores[1], cores[0], cores[1]] {
        world.text(&format!("volume move vm1 --to {core}"));
        assert_eq!(shown(&world, "vm1")["limits"]["bytes_per_second"], 65536);
        let base = guest.stop_queue(0).unwrap();
        assert_eq!(base, 1, "what it owes it owes here, too: the others wait");
        guest.start_queue(0, base).unwrap();
        guest.kick_hard(0);
    }
    world.text("volume limit vm1 --off");
    for _ in 1..tickets.len() {
        guest.wait_used(0);
    }
    assert!(tickets.iter().all(|ticket| guest.status(*ticket) == block::DONE));
    // Nobody else is held to them.
    world.text("volume create vm3 --size 64MiB");
    world.text(&format!("volume move vm3 --to {}", cores[0]));
    let mut load = Load::new(&world, "vm3", 9);
    load.work(300);
    world.end("-TERM");
}

#[test]
fn a_move_that_cannot_be_is_refused_and_changes_nothing() {
    let Some(cores) = cores("a_move_that_cannot_be_is_refused_and_changes_nothing") else { return };
    let mut world = roomy("moving-refused");
    world.serve(&configuration(cores, "", ""));
    let nowhere = cores[0].max(cores[1]) + 1000;
    let refused = world.refused(&format!("volume move vm1 --to {nowhere}"));
    let expected = format!("no reactor runs on core {nowhere}, but on {}, {}", cores[0], cores[1]);
    assert!(refused.contains(&expected) && refused.contains("`reactors.cores`"), "{refused}");
    assert!(world.refused(&format!("volume move none --to {}", cores[0])).contains("no volume"));
    for (body, message) in [
        ("{}", "missing field `core`"),
        (r#"{"core": -1}"#, "invalid value"),
        (r#"{"core": 0, "force": true}"#, "unknown field `force`"),
    ] {
        let answer = world.request("PUT", "/v1/volumes/vm1/home", body);
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains(message), "{answer}");
    }
    // Where it is already: done.
    let mut load = Load::new(&world, "vm1", 10);
    load.work(100);
    let said = world.json(&format!("volume move vm1 --to {}", cores[0]));
    assert_eq!((&said["core"], &said["reactor"]), (&cores[0].into(), &0.into()), "{said}");
    load.work(100);
    load.verify(|| world.log());
    drop(load);
    world.text("volume detach vm1");
    let refused = world.refused(&format!("volume move vm1 --to {}", cores[1]));
    assert!(refused.contains("is detached; `bessel volume attach vm1` first"), "{refused}");
    assert_eq!(shown(&world, "vm1")["core"], cores[0]);
    world.end("-TERM");
}

/// By itself, where nobody has said where the volumes are to be: of two that a reactor is busy with, one goes to
/// the reactor that has nothing to do. Both guests have more in flight than they can use up while they wait
/// for a core, so that their reactor is busy all the time.
#[test]
fn a_busy_reactor_gives_a_volume_away() {
    let Some(cores) = cores("a_busy_reactor_gives_a_volume_away") else { return };
    let mut world = World::new("balance");
    let names = ["vm1", "vm2", "vm3"];
    let volume = |name| format!("  - name: {name}\n    size: 64MiB\n    queues: 1\n");
    world
        .serve(&format!("reactors:\n  cores: {cores:?}\nvolumes:\n{}", names.map(volume).concat()));
    let home = |name| shown(&world, name)["core"].as_u64().unwrap();
    let alone = names
        .into_iter()
        .find(|name| names.iter().all(|other| other == name || home(other) != home(name)));
    let alone = alone.expect("one reactor has one volume, the other one two");
    let busy: Vec<&str> = names.into_iter().filter(|name| *name != alone).collect();
    let mut readers: Vec<Reader> =
        busy.iter().map(|name| Reader::new(&world, name, 1, 48, 1 << 20)).collect();
    let mut looks = 0;
    while home(busy[0]) == home(busy[1]) {
        looks += 1;
        assert!(looks < 1000, "a million requests, and nothing was moved: {}", world.log());
        let so_far: Vec<u64> = readers.iter().map(|reader| reader.ended).collect();
        // Both went on since, and will again.
        while readers.iter().zip(&so_far).any(|(reader, ended)| reader.ended < ended + 1000) {
            readers.iter_mut().for_each(Reader::go_on);
        }
    }
    assert!(world.log().contains("`reactors.balance: off` leaves volumes"), "{}", world.log());
    let so_far: Vec<u64> = readers.iter().map(|reader| reader.ended).collect();
    while readers.iter().zip(&so_far).any(|(reader, ended)| reader.ended < ended + 1000) {
        readers.iter_mut().for_each(Reader::go_on);
    }
    world.end("-TERM");
}
