//! A device whose flush fails, as guests and the operator meet it: a real daemon on a device that fails
//! on demand, and loses some of what it had not flushed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use bessel_tests::guest::{BaseAfterReconnect, Guest, Options, block};
use std::io::Write;
use std::path::Path;
use support::device::FaultyDevice;
use support::{World, refusal, tell};

const SECTORS_PER_BLOCK: u64 = 8;
const VOLUMES: &str =
    "volumes:\n  - name: vm1\n    size: 1GiB\n    queues: 2\n  - name: vm2\n    size: 1GiB\n";

/// A world on a device that fails on demand, or none where the machine has no FUSE.
fn world(name: &str) -> Option<(World, FaultyDevice)> {
    let mut world = World::new(name);
    world.store = world.path("device");
    let backing = world.directory.join("backing");
    match FaultyDevice::mount(Path::new(&world.store), &backing, 256 << 20, 1) {
        Ok(device) => {
            world.text("format device --extent-size 4MiB");
            Some((world, device))
        }
        Err(why) => {
            tell(&format!("test {name} ... skipped: {why}"));
            None
        }
    }
}

fn connect(world: &World, volume: &str) -> Guest {
    let options = Options { inflight: true, ..Options::default() };
    Guest::connect(Path::new(&world.path(&format!("{volume}.sock"))), options).unwrap()
}

fn write(guest: &mut Guest, block: u64, byte: u8) -> u8 {
    guest.write(0, block * SECTORS_PER_BLOCK, &[byte; 4096])
}

fn read(guest: &mut Guest, block: u64) -> Vec<u8> {
    let (status, bytes) = guest.read(0, block * SECTORS_PER_BLOCK, 4096);
    assert_eq!(status, block::DONE, "block {block}");
    bytes
}

/// The value of a metric.
fn metric(world: &World, sample: &str) -> f64 {
    let answer = world.request("GET", "/metrics", "");
    let line = answer.lines().find_map(|line| line.strip_prefix(sample));
    line.unwrap_or_else(|| panic!("no {sample} in {answer}")).trim().parse().unwrap()
}

/// What is handed over is durable, or it is not handed over: the volume stays, and has failed as by any
/// other flush.
#[test]
fn a_volume_whose_flush_fails_while_it_is_moved_stays_and_says_so() {
    let cores = bessel_reactor::reactor::usable_cores();
    let [from, to, ..] = cores[..] else {
        return tell("test a_volume_whose_flush_fails_while_it_is_moved ... skipped: one core");
    };
    let Some((mut world, device)) = world("failed_flush_move") else { return };
    world.serve(&format!("reactors:\n  cores: [{from}, {to}]\n  balance: off\n{VOLUMES}"));
    let mut one = connect(&world, "vm1");
    for number in 0..20 {
        assert_eq!(write(&mut one, number, 1), block::DONE);
    }
    assert_eq!(one.flush(0), block::DONE);
    for number in 10..40 {
        assert_eq!(write(&mut one, number, 2), block::DONE);
    }
    device.fail_flushes(1);
    let refused = world.refused(&format!("volume move vm1 --to {to}"));
    let words = [&format!("volume \"vm1\" stays on core {from}: ")[..], "`bessel volume detach`"];
    assert!(words.iter().all(|words| refused.contains(words)), "{refused}");
    let shown = world.json("volume show vm1");
    assert_eq!((&shown["state"], &shown["core"]), (&"failed".into(), &from.into()), "{shown}");
    assert!(read(&mut one, 3) == [1; 4096], "reads go on");
    assert_eq!(write(&mut one, 0, 3), block::IO_ERROR);
    // Nor is it moved later, before it is known what the device holds.
    assert!(world.refused(&format!("volume move vm1 --to {to}")).contains("stays on core"));
    drop(one);
    world.text("volume detach vm1");
    world.text("volume attach vm1");
    let moved = world.json(&format!("volume move vm1 --to {to}"));
    assert_eq!((&moved["state"], &moved["core"]), (&"online".into(), &to.into()), "{moved}");
    let mut one = connect(&world, "vm1");
    assert!((0..10).all(|number| read(&mut one, number) == [1; 4096]));
    assert_eq!((write(&mut one, 3, 4), one.flush(0)), (block::DONE, block::DONE));
    drop(one);
    world.end("-TERM");
    world.text("check device");
}

/// The device cannot be read any more when the volume is between two reactors.
#[test]
fn a_volume_that_can_be_opened_nowhere_any_more_is_detached_with_all_it_had() {
    let cores = bessel_reactor::reactor::usable_cores();
    let [from, to, ..] = cores[..] else {
        return tell("test a_volume_that_can_be_opened_nowhere ... skipped: one core");
    };
    let Some((mut world, device)) = world("failed_read_move") else { return };
    world.serve(&format!("reactors:\n  cores: [{from}, {to}]\n  balance: off\n{VOLUMES}"));
    let mut one = connect(&world, "vm1");
    for number in 0..40 {
        assert_eq!(write(&mut one, number, 1), block::DONE);
    }
    world.text("snapshot create vm1 --label kept");
    for number in 0..20 {
        assert_eq!(write(&mut one, number, 2), block::DONE);
    }
    device.fail_reads(true);
    let refused = world.refused(&format!("volume move vm1 --to {to}"));
    for words in [
        &format!("could be opened neither on core {to} (")[..],
        &format!("nor again on core {from} ("),
        "it is detached, with all that was written to it",
        "`bessel volume attach vm1`",
    ] {
        assert!(refused.contains(words), "{refused}");
    }
    let shown = world.json("volume show vm1");
    assert_eq!((&shown["state"], &shown["snapshots"]), (&"detached".into(), &1.into()), "{shown}");
    assert!(shown["reason"].as_str().unwrap().contains("could not be moved"), "{shown}");
    assert!(!Path::new(&world.path("vm1.sock")).exists(), "its guest has seen its disk go");
    assert!(world.refused("volume attach vm1").contains("device"));
    assert!(world.refused(&format!("volume move vm1 --to {to}")).contains("is detached"));
    device.fail_reads(false);
    let attached = world.json("volume attach vm1");
    assert_eq!((&attached["state"], &attached["core"]), (&"online".into(), &from.into()));
    let path = world.path("vm1.sock");
    one.reconnect(Path::new(&path), BaseAfterReconnect::Used).unwrap();
    assert!((0..40).all(|number| read(&mut one, number) == [2 - (number / 20) as u8; 4096]));
    world.text(&format!("volume move vm1 --to {to}"));
    assert_eq!((write(&mut one, 3, 4), one.flush(0)), (block::DONE, block::DONE));
    drop(one);
    world.end("-TERM");
    world.text("check device");
}

#[test]
fn a_failed_flush_is_told_everywhere_and_detach_and_attach_recover() {
    let Some((mut world, device)) = world("failed_flush") else { return };
    world.serve(VOLUMES);
    let (mut one, mut two) = (connect(&world, "vm1"), connect(&world, "vm2"));
    for number in 0..40 {
        assert_eq!(write(&mut one, number, 1), block::DONE);
        assert_eq!(write(&mut two, number, 11), block::DONE);
    }
    assert_eq!((one.flush(0), two.flush(0)), (block::DONE, block::DONE));
    world.text("snapshot create vm1 --label good");
    // A mapping that is not durable when the flush fails, and an overwrite.
    for number in 20..60 {
        assert_eq!(write(&mut one, number, 2), block::DONE);
    }
    device.fail_flushes(1);
    assert_eq!(one.flush(0), block::IO_ERROR);
    assert_eq!(device.flushes().1, 1, "the device has failed once");

    // Guests: errors for what changes anything, reads go on; also when the device is well again.
    assert_eq!(write(&mut one, 0, 3), block::IO_ERROR);
    assert_eq!(one.flush(0), block::IO_ERROR);
    assert_eq!(one.discard(0, 0, 8), block::IO_ERROR);
    assert_eq!(read(&mut one, 3), [1; 4096]);
    // The operator: API, command line, metrics, log.
    let shown = world.json("volume show vm1");
    assert_eq!(shown["state"], "failed");
    assert!(shown["reason"].as_str().unwrap().contains("failed to flush"), "{shown}");
    assert!(shown["remedy"].as_str().unwrap().contains("bessel volume detach vm1"), "{shown}");
    assert!(
        world
            .text("volume list")
            .lines()
            .any(|line| line.starts_with("vm1 ") && line.contains(" FAILED "))
    );
    assert!(world.text("volume show vm1").contains("remedy"));
    assert_eq!(metric(&world, "bessel_volume_failed{volume=\"vm1\"}"), 1.0);
    assert_eq!(metric(&world, "bessel_volume_failed{volume=\"vm2\"}"), 0.0);
    assert_eq!(metric(&world, "bessel_device_flush_failures_total{reactor=\"0\"}"), 1.0);
    assert!(world.refused("snapshot create vm1").contains("bessel volume detach"));
    let log = world.log();
    let told = log.lines().filter(|line| line.contains("ERROR") && line.contains("vm1"));
    assert_eq!(told.count(), 1, "{log}");
    assert!(world.refused("volume attach vm1").contains("detach"));

    // vm2 has noticed nothing, and does not while vm1 goes and comes.
    assert_eq!(write(&mut two, 41, 12), block::DONE);
    let detached = world.json("volume detach vm1");
    assert_eq!((&detached["state"], &detached["snapshots"]), (&"detached".into(), &1.into()));
    assert!(!Path::new(&world.path("vm1.sock")).exists());
    assert_eq!(world.json("volume show vm1")["snapshot_list"][0]["label"], "good");
    assert!(world.text("tree").contains("@good"));
    assert_eq!(metric(&world, "bessel_volume_detached{volume=\"vm1\"}"), 1.0);
    for command in
        ["snapshot create vm1", "volume detach vm1", "volume delete vm1", "volume resize vm1 2GiB"]
    {
        assert!(world.refused(command).contains("is detached"), "{command}");
    }
    let taken = world.refused("volume create vm1 --size 1MiB");
    assert!(taken.contains("already a volume named"), "{taken}");
    assert_eq!((two.flush(0), read(&mut two, 41)), (block::DONE, vec![12; 4096]));

    // The device still fails: it stays detached and says why.
    device.fail_flushes(2);
    assert!(world.refused("volume attach vm1").contains("device error"));
    assert_eq!(world.json("volume show vm1")["state"], "detached");
    let attached = world.json("volume attach vm1");
    assert_eq!(
        (&attached["state"], &attached["reason"]),
        (&"online".into(), &serde_json::Value::Null)
    );
    assert_eq!(metric(&world, "bessel_volume_failed{volume=\"vm1\"}"), 0.0);
    let path = world.path("vm1.sock");
    one.reconnect(Path::new(&path), BaseAfterReconnect::Used).unwrap();
    for number in 0..60 {
        let bytes = read(&mut one, number);
        assert!(
            bytes.chunks(512).all(|sector| match number {
                0..20 => sector == [1; 512],
                20..40 => sector == [1; 512] || sector == [2; 512],
                _ => sector == [0; 512] || sector == [2; 512],
            }),
            "block {number} holds {:?}",
            &bytes[..16]
        );
    }
    for number in 0..60 {
        assert_eq!(write(&mut one, number, 4), block::DONE);
    }
    assert_eq!(one.flush(0), block::DONE);
    world.text("volume create clone --from vm1@good");
    let mut clone = connect(&world, "clone");
    for number in 0..40 {
        assert_eq!(read(&mut clone, number), [1; 4096], "block {number} of the snapshot");
    }
    for number in 0..40 {
        assert_eq!(read(&mut two, number), [11; 4096], "block {number} of vm2");
    }
    drop((one, two, clone));

    // What was flushed outlives the power.
    world.kill();
    remove_journals(&world);
    device.cut_power();
    world.text("check device");
    world.serve(VOLUMES);
    let mut one = connect(&world, "vm1");
    for number in 0..60 {
        assert_eq!(read(&mut one, number), [4; 4096], "block {number}");
    }
    drop(one);
    world.end("-TERM");
    world.text("check device");
}

/// Nobody has journals after a power cut: the memory is gone, and so is the boot.
fn remove_journals(world: &World) {
    for entry in std::fs::read_dir(&world.directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "journal") {
            std::fs::remove_file(path).unwrap();
        }
    }
}

/// Whether a volume whose deletion failed is there, the device says when the volume is attached again.
/// Until then it must be possible to look at it and to detach it.
#[test]
fn a_volume_whose_deletion_failed_is_like_any_that_has_failed() {
    let Some((mut world, device)) = world("failed_delete") else { return };
    world.serve(VOLUMES);
    let mut guest = connect(&world, "vm1");
    assert_eq!((write(&mut guest, 7, 1), guest.flush(0)), (block::DONE, block::DONE));
    drop(guest);
    while world.json("volume show vm1")["connected"] == true {}
    device.fail_flushes(1);
    let refused = world.refused("volume delete vm1");
    assert!(refused.contains("failed to flush"), "{refused}");
    assert_eq!(world.json("volume show vm1")["state"], "failed");
    assert_eq!(world.json("volume list")[1]["state"], "online");
    world.text("tree");
    assert_eq!(read(&mut connect(&world, "vm1"), 7), [1; 4096]);
    assert_eq!(world.json("volume detach vm1")["state"], "detached");
    assert_eq!(world.json("volume attach vm1")["state"], "online");
    assert_eq!(read(&mut connect(&world, "vm1"), 7), [1; 4096]);
    world.end("-TERM");
    world.text("check device");
}

/// The name that could not be given is nobody's, and the operator is told to use the other.
#[test]
fn a_volume_whose_renaming_failed_is_shown_by_the_name_it_has() {
    let Some((mut world, device)) = world("failed_rename") else { return };
    world.serve(VOLUMES);
    device.fail_flushes(1);
    world.refused("volume rename vm1 vm3");
    let shown = world.json("volume show vm1");
    assert_eq!((&shown["name"], &shown["state"]), (&"vm1".into(), &"failed".into()));
    assert!(!world.log().contains("vm3"), "{}", world.log());
    world.text("volume detach vm1");
    assert_eq!(world.json("volume attach vm1")["name"], "vm1");
    world.end("-TERM");
}

/// A guest that is back after its volume was away must not be told that what it wrote before is
/// durable, when a flush has failed meanwhile.
#[test]
fn what_a_guest_has_overwritten_is_flushed_before_its_volume_goes() {
    let Some((mut world, device)) = world("detach_unflushed") else { return };
    world.serve(VOLUMES);
    let mut guest = connect(&world, "vm1");
    (0..40).for_each(|number| assert_eq!(write(&mut guest, number, 1), block::DONE));
    assert_eq!(guest.flush(0), block::DONE);
    (0..40).for_each(|number| assert_eq!(write(&mut guest, number, 2), block::DONE));
    world.text("volume detach vm1");
    device.fail_flushes(1);
    world.text("volume attach vm1");
    guest.reconnect(Path::new(&world.path("vm1.sock")), BaseAfterReconnect::Used).unwrap();
    assert_eq!(guest.flush(0), block::DONE);
    for number in 0..40 {
        assert_eq!(read(&mut guest, number), [2; 4096], "block {number}");
    }
    // The same failure while it is being detached is its own.
    (0..40).for_each(|number| assert_eq!(write(&mut guest, number, 3), block::DONE));
    device.fail_flushes(1);
    let detached = world.json("volume detach vm1");
    assert!(detached["reason"].as_str().unwrap().contains("failed to flush"), "{detached}");
    world.text("volume attach vm1");
    drop(guest);
    world.end("-TERM");
    world.text("check device");
}

#[test]
fn a_volume_that_is_well_is_detached_and_attached_under_its_guest() {
    let mut world = World::new("detach");
    world.serve(VOLUMES);
    let mut guest = connect(&world, "vm1");
    for number in 0..100 {
        assert_eq!(write(&mut guest, number, 1), block::DONE);
    }
    let tickets: Vec<_> = (0..30)
        .map(|number| guest.submit(0, block::OUT, number * SECTORS_PER_BLOCK, &[2; 4096], 0))
        .collect();
    guest.kick(0);
    world.text("volume detach vm1");
    // What the guest has in its ring by then waits there.
    world.text("volume attach vm1");
    guest.reconnect(Path::new(&world.path("vm1.sock")), BaseAfterReconnect::Used).unwrap();
    while tickets.iter().any(|ticket| guest.status(*ticket) == block::PENDING) {
        guest.wait_used(0);
    }
    while guest.poll_used(0).is_some() {}
    for ticket in tickets {
        assert_eq!(guest.status(ticket), block::DONE);
        guest.release(ticket);
    }
    for number in 0..100 {
        let byte = if number < 30 { 2 } else { 1 };
        assert_eq!(read(&mut guest, number), [byte; 4096], "block {number}");
    }
    // Detached does not outlive the daemon.
    drop(guest);
    world.text("volume detach vm1");
    world.end("-KILL");
    world.serve(VOLUMES);
    assert_eq!(world.json("volume show vm1")["state"], "online");
    let mut guest = connect(&world, "vm1");
    assert_eq!(read(&mut guest, 99), [1; 4096]);
    world.text("volume detach vm2");
    world.end("-TERM");
    assert_eq!(world.json(&format!("check {}", world.path("store.img")))["clean"], true);
}

#[test]
fn a_schedule_pauses_with_its_volume_says_so_once_and_goes_on_when_it_is_attached() {
    let Some((mut world, device)) = world("failed_schedule") else { return };
    world.serve(VOLUMES);
    let schedule = |world: &World, volume: &str| {
        world.json(&format!("volume show {volume}"))["schedule"].clone()
    };
    let taken = |world: &World, volume: &str| schedule(world, volume)["taken"].as_u64().unwrap();
    world.text("volume schedule vm1 --every 1ms --keep 5");
    while taken(&world, "vm1") < 10 {}
    device.fail_flushes(1);
    while schedule(&world, "vm1")["paused"] != true {}
    let paused = schedule(&world, "vm1");
    assert!(paused["reason"].as_str().unwrap().contains("failed to flush"), "{paused}");
    assert!(world.text("volume show vm1").contains("\npaused "));

    // The others go on, and nothing more is tried or said of this one.
    world.text("volume schedule vm2 --every 1ms --keep 5");
    while taken(&world, "vm2") < 50 {}
    assert_eq!(schedule(&world, "vm1"), paused);
    let log = world.log();
    assert_eq!(log.lines().filter(|line| line.contains("schedule pauses")).count(), 1, "{log}");

    world.text("volume detach vm1");
    world.text("volume attach vm1");
    while taken(&world, "vm1") < 10 {}
    assert_eq!(schedule(&world, "vm1")["paused"], false);
    world.end("-TERM");
    drop(device);
    assert_eq!(world.json("check backing")["clean"], true);
}

/// What an import has written may be lost then: there is no volume, and the next import is as good as ever.
#[test]
fn an_import_whose_flush_fails_leaves_no_volume_and_harms_nobody() {
    let Some((mut world, device)) = world("import_flush") else { return };
    world.serve(VOLUMES);
    let mut guest = connect(&world, "vm1");
    assert_eq!((write(&mut guest, 0, 1), guest.flush(0)), (block::DONE, block::DONE));
    let bytes: Vec<u8> = (0..2u32 << 20).flat_map(|number| number.to_le_bytes()).collect();
    let mut child = world.spawn_fed("volume import x -");
    let mut input = child.stdin.take().unwrap();
    input.write_all(&bytes).unwrap();
    let written = |job: &serde_json::Value| job["done_bytes"] == 8 << 20;
    while !world.json("stats")["jobs"].as_array().unwrap().iter().any(written) {}
    device.fail_flushes(1);
    drop(input);
    let error = refusal("import", &child.wait_with_output().unwrap());
    // Which flush it was, that of the import or one that takes blocks into use, nobody chooses.
    let reasons = ["the store could not be written", "its device has failed to give more"];
    assert!(reasons.iter().any(|reason| error.contains(reason)), "{error}");
    assert_eq!(world.json("volume list").as_array().unwrap().len(), 2);
    assert_eq!((write(&mut guest, 0, 2), guest.flush(0)), (block::DONE, block::DONE));

    std::fs::write(world.path("x.img"), &bytes).unwrap();
    // For a moment a reactor that could take no more blocks into use does not try again.
    while !world.run("volume import x x.img").status.success() {}
    drop(guest);
    world.end("-KILL");
    device.cut_power();
    world.serve(VOLUMES);
    world.text("snapshot create x --label all");
    assert!(world.run("snapshot export x@all -").stdout == bytes);
    world.end("-TERM");
    assert_eq!(world.json(&format!("check {}", world.store))["clean"], true);
}
