//! The queues of one volume on two reactors of the real daemon, under guests that check every block.
//!
//! On a machine with one core there is one reactor, and that is said.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use bessel_reactor::device::sim::Random;
use bessel_tests::guest::block;
use serde_json::json;
use support::World;
use support::load::{Load, QUEUES, configuration, cores, roomy, serve_again, shown, under_load};

/// Messages that all reactors have taken.
fn messages(world: &World) -> u64 {
    let stats = world.json("stats");
    let reactors = stats["reactors"].as_array().unwrap();
    reactors.iter().map(|reactor| reactor["messages"].as_u64().unwrap()).sum()
}

/// Requests that all reactors have sent to the homes of their volumes.
fn forwarded(world: &World) -> u64 {
    let stats = world.json("stats");
    let reactors = stats["reactors"].as_array().unwrap();
    reactors.iter().map(|reactor| reactor["forwarded"].as_u64().unwrap()).sum()
}

fn check(world: &World) {
    let report = world.json(&format!("check {}", world.path("store.img")));
    assert_eq!(report["clean"], true, "{report}");
}

/// Reads and writes in place come by one reactor alone, whichever has their queue.
#[test]
fn what_is_mapped_is_read_and_written_without_a_word_to_the_home() {
    let Some(cores) = cores("what_is_mapped_is_read_and_written_without_a_word_to_the_home") else {
        return;
    };
    let mut world = roomy("spread-words");
    world.serve(&configuration(cores, "", ""));
    assert_eq!(shown(&world, "vm1")["queue_cores"], json!(cores));
    let text = world.text("volume show vm1");
    let [one, other] = cores;
    assert!(text.contains(&format!("{QUEUES}, on cores {one}, {other} in turn")), "{text}");
    let mut load = Load::new(&world, "vm1", 1);
    load.flushes = false;
    // All of it is mapped then, and was asked for on both queues.
    load.write_everything();
    load.work(4000);
    load.settle();
    let (before, sent) = (messages(&world), forwarded(&world));
    assert!(sent > 0, "what is not mapped is sent to the home");
    let of_figures = messages(&world) - before;
    load.work(4000);
    load.settle();
    let taken = messages(&world) - before - of_figures;
    // The figures are asked for by messages, some of them in between.
    assert!(
        taken <= 4 * of_figures,
        "{taken} messages for 4000 requests, {of_figures} for figures"
    );
    assert_eq!(forwarded(&world), sent);
    load.verify(|| world.log());
    let stats = world.json("stats");
    let counted: u64 =
        ["reads", "writes"].iter().map(|key| stats["volumes"][0][key].as_u64().unwrap()).sum();
    assert!(counted >= 8000, "wherever it was done, it is counted: {stats}");
    world.end("-TERM");
    check(&world);
}

/// Snapshots without end, and everything else that changes what others were shown.
#[test]
fn what_an_operator_does_meets_requests_on_both_reactors() {
    let Some(cores) = cores("what_an_operator_does_meets_requests_on_both_reactors") else {
        return;
    };
    let mut world = roomy("spread-operator");
    world.serve(&configuration(cores, "", ""));
    let names = ["vm1", "vm2"];
    let mut loads = [Load::new(&world, names[0], 2), Load::new(&world, names[1], 3)];
    loads.iter_mut().for_each(|load| load.work(500));
    for round in 0..12 {
        for name in names {
            under_load(&world, &mut loads, &format!("snapshot create {name} --label s{round}"));
            if round % 4 == 3 {
                under_load(&world, &mut loads, &format!("snapshot delete {name}@s{}", round - 1));
            }
        }
        loads.iter_mut().for_each(|load| load.work(100));
        // Limits are kept by one reactor: its queues come together, and part again.
        let (limits, expected) = match round % 2 {
            0 => ("--iops 100000000", json!([cores[0]])),
            _ => ("--off", json!(cores)),
        };
        under_load(&world, &mut loads, &format!("volume limit vm1 {limits}"));
        assert_eq!(shown(&world, "vm1")["queue_cores"], expected);
        loads.iter_mut().for_each(|load| load.work(100));
    }
    // Back to a snapshot under the guest that has both queues open.
    loads[0].settle();
    world.text("snapshot create vm1 --label here");
    let before = loads[0].versions.clone();
    loads[0].work(300);
    loads[0].settle();
    world.text("volume rollback vm1 vm1@here --force");
    loads[0].versions = before;
    under_load(&world, &mut loads, "volume resize vm1 128MiB");
    loads.iter_mut().for_each(|load| load.work(300));
    loads.iter_mut().for_each(|load| load.verify(|| world.log()));
    let stats = world.json("stats");
    for volume in stats["volumes"].as_array().unwrap() {
        assert_eq!(volume["errors"], 0, "{stats}");
    }
    drop(loads);
    for name in names {
        while shown(&world, name)["connected"] == true {}
    }
    world.text("volume detach vm2");
    world.text("volume attach vm2");
    assert_eq!(shown(&world, "vm2")["queue_cores"], json!([cores[1], cores[0]]));
    world.text("volume delete vm1");
    world.text("gc");
    world.end("-TERM");
    check(&world);
}

#[test]
fn a_daemon_that_is_killed_loses_nothing_of_either_reactor() {
    let Some(cores) = cores("a_daemon_that_is_killed_loses_nothing_of_either_reactor") else {
        return;
    };
    let mut world = roomy("spread-kill");
    let config = configuration(cores, "", "");
    world.serve(&config);
    let names = ["vm1", "vm2"];
    let mut loads = [Load::new(&world, names[0], 4), Load::new(&world, names[1], 5)];
    let mut random = Random::new(6);
    for _ in 0..25 {
        loads.iter_mut().for_each(|load| load.work(100));
        if random.chance(1, 2) {
            let name = names[random.below(2) as usize];
            under_load(&world, &mut loads, &format!("snapshot create {name}"));
        }
        loads.iter_mut().for_each(|load| load.work(random.below(100)));
        world.kill();
        serve_again(&mut world, &config, &mut loads, names, &mut random);
    }
    assert_eq!(loads[0].guest.flush(1), block::DONE);
    drop(loads);
    world.end("-TERM");
    check(&world);
}

#[test]
fn spreading_can_be_switched_off() {
    let Some(cores) = cores("spreading_can_be_switched_off") else { return };
    let mut world = roomy("spread-off");
    world.serve(&configuration(cores, "  spread: off\n", ""));
    assert_eq!(shown(&world, "vm1")["queue_cores"], json!([cores[0]]));
    let text = world.text("volume show vm1");
    assert!(!text.contains("in turn"), "{text}");
    let mut load = Load::new(&world, "vm1", 7);
    load.work(500);
    load.verify(|| world.log());
    assert_eq!(forwarded(&world), 0);
    world.end("-TERM");
    check(&world);
}
