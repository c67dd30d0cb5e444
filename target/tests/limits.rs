//! Limits of what a guest may ask for, on the real daemon: held to, changed while requests wait, gone
//! with their volume.
//!
//! Nothing here looks at a clock. Where a limit must not be in the way any more, it would be for 64 s a
//! request, and a guest gives a request up for lost after 30.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use bessel_tests::guest::{Guest, Options, Ticket, block};
use serde_json::Value;
use std::path::Path;
use support::World;

/// Each request is paid for in 64 s.
const SLOW: &str = "volumes:\n  - name: vm1\n    size: 64MiB\n    queues: 1\n    limits: { bandwidth: 64KiB, burst: 1ms }\n";
const REQUEST: usize = 4 << 20;
const REQUESTS: usize = 4;

fn connect(world: &World, volume: &str) -> Guest {
    let socket = world.path(&format!("{volume}.sock"));
    let options = Options { queue_size: 8, data_max: REQUEST, ..Options::default() };
    Guest::connect(Path::new(&socket), options).unwrap()
}

fn submit_all(guest: &mut Guest) -> Vec<Ticket> {
    let sector = |at: usize| (at * REQUEST / 512) as u64;
    let bytes = vec![7; REQUEST];
    let tickets: Vec<_> =
        (0..REQUESTS).map(|at| guest.submit(0, block::OUT, sector(at), &bytes, 0)).collect();
    guest.kick(0);
    tickets
}

fn finish(guest: &mut Guest, tickets: &[Ticket]) {
    for _ in tickets {
        guest.wait_used(0);
    }
    assert!(tickets.iter().all(|ticket| guest.status(*ticket) == block::DONE));
}

fn limits(world: &World, volume: &str) -> Value {
    world.json(&format!("volume show {volume}"))["limits"].clone()
}

#[test]
fn requests_wait_for_their_limit_and_go_on_when_it_goes() {
    let mut world = World::new("limits");
    world.serve(SLOW);
    let found = limits(&world, "vm1");
    assert_eq!(
        (&found["bytes_per_second"], &found["burst_ns"]),
        (&65536.into(), &1_000_000.into())
    );
    let shown = world.text("volume show vm1");
    assert!(shown.contains("at most 64KiB a second, 1ms of it saved up"), "{shown}");
    let mut guest = connect(&world, "vm1");
    let tickets = submit_all(&mut guest);
    // The first one goes whatever its size.
    guest.wait_used(0);
    // A queue with requests that wait can be stopped, and goes on where it was.
    let base = guest.stop_queue(0).unwrap();
    assert_eq!(base, 1, "the others wait");
    guest.start_queue(0, base).unwrap();
    guest.kick_hard(0);
    let said = world.text("volume limit vm1 --off");
    assert!(said.contains("no limits"), "{said}");
    finish(&mut guest, &tickets[1..]);
    assert_eq!(limits(&world, "vm1"), Value::Null);
    tickets.into_iter().for_each(|ticket| guest.release(ticket));

    // One that is set while the guest runs holds it too.
    let said = world.text("volume limit vm1 --iops 1000000 --bandwidth 64KiB --burst 1ms");
    assert!(said.contains("at most 1000000 requests and 64KiB a second"), "{said}");
    let tickets = submit_all(&mut guest);
    guest.wait_used(0);
    let base = guest.stop_queue(0).unwrap();
    assert_eq!(usize::from(base), REQUESTS + 1, "the others wait");
    guest.start_queue(0, base).unwrap();
    guest.kick_hard(0);
    // Wider limits let them go as well. What they had to wait until then is told.
    world.text("volume limit vm1 --bandwidth 1TiB");
    finish(&mut guest, &tickets[1..]);
    let stats = world.json("stats");
    assert!(stats["volumes"][0]["throttled_ns"].as_u64() > Some(0), "{stats}");
    let metrics = world.request("GET", "/metrics", "");
    assert!(metrics.contains("bessel_volume_throttled_seconds_total{volume=\"vm1\"}"), "{metrics}");
    world.end("-TERM");
}

/// The reactor sleeps while they wait and wakes by itself, and each queue gets its share.
#[test]
fn requests_that_wait_go_on_by_themselves() {
    let mut world = World::new("limits-wake");
    world.serve("volumes:\n  - name: vm1\n    size: 64MiB\n    queues: 2\n    limits: { iops: 20, burst: 1ms }\n");
    let socket = world.path("vm1.sock");
    let mut guest =
        Guest::connect(Path::new(&socket), Options { queues: 2, ..Options::default() }).unwrap();
    for queue in [0, 1] {
        for at in 0..10 {
            guest.submit(queue, block::OUT, at * 8, &[1; 4096], 0);
        }
        guest.kick(queue);
    }
    for _ in 0..10 {
        guest.wait_used(0);
        guest.wait_used(1);
    }
    let stats = world.json("stats");
    assert!(stats["volumes"][0]["throttled_ns"].as_u64() > Some(0), "{stats}");
    world.end("-TERM");
}

#[test]
fn limits_go_and_come_with_their_volume_and_are_nobody_elses() {
    let mut world = World::new("limits-detach");
    world.serve(SLOW);
    let mut guest = connect(&world, "vm1");
    submit_all(&mut guest);
    guest.wait_used(0);
    // The guest is there, and most of its requests wait.
    let detached = world.json("volume detach vm1");
    assert_eq!(detached["limits"]["bytes_per_second"], 65536);
    drop(guest);
    // Whoever has its place now is not held to its limits.
    world.text("volume create vm2 --size 64MiB");
    let mut other = connect(&world, "vm2");
    let tickets = submit_all(&mut other);
    finish(&mut other, &tickets);
    world.text("volume attach vm1");
    assert_eq!(limits(&world, "vm1")["bytes_per_second"], 65536);
    let mut guest = connect(&world, "vm1");
    submit_all(&mut guest);
    guest.wait_used(0);
    assert_eq!(guest.stop_queue(0).unwrap(), 1, "the others wait again");
    drop(guest);
    while world.json("volume show vm1")["connected"] == true {}
    world.text("volume delete vm1");
    world.end("-TERM");
}

#[test]
fn limits_that_will_not_do_are_refused_and_change_nothing() {
    let mut world = World::new("limits-refused");
    world.serve(SLOW);
    for (arguments, words) in [
        ("volume limit vm1 --iops 0", "0 requests a second will not do; give 1 to"),
        ("volume limit vm1 --bandwidth 1KiB", "1KiB a second will not do; give 64KiB to 1TiB"),
        ("volume limit vm1 --iops 5 --burst 2h", "will not do; give 1ms to 1h"),
        ("volume limit none --iops 5", "no volume"),
    ] {
        let said = world.refused(arguments);
        assert!(said.contains(words), "{arguments}: {said}");
    }
    let answer = world.request("PUT", "/v1/volumes/vm1/limits", "{}");
    assert!(answer.contains("neither iops nor bandwidth is given"), "{answer}");
    let answer = world.request("PUT", "/v1/volumes/vm1/limits", "{\"iops\": -1}");
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    assert_eq!(limits(&world, "vm1")["bytes_per_second"], 65536);
    world.end("-TERM");
}
