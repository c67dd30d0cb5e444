//! What operators get wrong about snapshots: one clear line each, and nothing has changed.
//!
//! What the command line refuses by itself is wrong usage (status 2); the rest is the daemon's to refuse, or
//! the system's.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use bessel_tests::guest::{Guest, Options, block};
use std::fs::File;
use std::path::Path;
use std::process::Command;
use support::{World, refusal, tell};

const VOLUMES: &str = "volumes:\n  - name: vm1\n    size: 8MiB\n    queues: 1\n  \
                       - name: vm2\n    size: 8MiB\n    queues: 1\n";

fn connect(world: &World, volume: &str) -> Guest {
    let socket = world.path(&format!("{volume}.sock"));
    Guest::connect(Path::new(&socket), Options { queues: 1, ..Options::default() }).unwrap()
}

/// Two volumes with a snapshot each, of some MiB of data.
fn world(tag: &str) -> World {
    let mut world = World::new(tag);
    world.serve(VOLUMES);
    for volume in ["vm1", "vm2"] {
        let mut guest = connect(&world, volume);
        for place in 0..64 {
            assert_eq!(guest.write(0, place * 128, &[7; 64 << 10]), block::DONE);
        }
        drop(guest);
        world.text(&format!("snapshot create {volume} --label one"));
        while world.json(&format!("volume show {volume}"))["connected"] == true {}
    }
    world
}

/// Everything there is to see of volumes and snapshots, and the files in the directory.
fn state(world: &World) -> String {
    let mut files: Vec<_> = std::fs::read_dir(&world.directory)
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    format!("{}{}{files:?}", world.text("tree --json"), world.text("volume list --json"))
}

#[test]
fn a_snapshot_that_is_not_there_is_named_in_the_refusal_of_every_command() {
    let world = world("bad-unknown");
    let before = state(&world);
    for (snapshot, why) in [
        ("1.9", "there is no snapshot 1.9"),
        ("77.0", "there is no snapshot 77.0"),
        ("vm1@two", "there is no snapshot vm1@two"),
        ("vm9@one", "there is no volume \"vm9\""),
        (
            "vm1@2001-02-03T04:05:06Z",
            "no snapshot at or before 2001-02-03T04:05:06.000000000Z; its oldest is 1.0",
        ),
        ("vm1@10000d%ago", "no snapshot at or before "),
    ] {
        for command in [
            "snapshot label SNAPSHOT other",
            "snapshot delete SNAPSHOT",
            "snapshot diff SNAPSHOT 1.0",
            "snapshot diff 1.0 SNAPSHOT",
            "snapshot export SNAPSHOT out.img",
            "snapshot export 1.0 out.img --from SNAPSHOT",
            "snapshot export SNAPSHOT -",
            "volume create x --from SNAPSHOT",
            "volume create x --from SNAPSHOT --count 3",
            "volume rollback vm1 SNAPSHOT",
            "volume rollback vm1 SNAPSHOT --force",
        ] {
            let error = world.refused_of(command, ("SNAPSHOT", &snapshot.replace('%', " ")));
            assert!(error.contains(why), "{command} of {snapshot}: {error}");
        }
    }
    for typed in ["1", "vm1", "vm1@", "@one", "1.0.0", "vm1@a@b", "vm1@10 ago", "../x@one"] {
        let output = world.run_of("snapshot delete SNAPSHOT", ("SNAPSHOT", typed));
        assert_eq!(output.status.code(), Some(2), "{typed}: wrong usage");
    }
    assert_eq!(world.run("snapshot label vm1@one 2026-11-20T11:40:00Z").status.code(), Some(2));
    assert_eq!(state(&world), before);
}

#[test]
fn an_attached_volume_is_rolled_back_by_force_only() {
    let world = world("bad-attached");
    let mut guest = connect(&world, "vm1");
    assert_eq!(guest.write(0, 0, &[8; 4096]), block::DONE);
    while world.json("volume show vm1")["connected"] != true {}
    let before = state(&world);
    let error = world.refused("volume rollback vm1 vm1@one");
    assert!(
        error.contains("in use by a front-end; stop the guest first, or give --force"),
        "{error}"
    );
    assert!(world.refused("volume rollback vm1 vm2@one").contains("not one of volume"));
    assert!(world.refused("volume rollback vm1 vm2@one --force").contains("not one of volume"));
    assert_eq!(state(&world), before);
    assert_eq!(guest.read(0, 0, 4096), (block::DONE, vec![8; 4096]));
    world.text("volume rollback vm1 vm1@one --force");
    assert_eq!(guest.read(0, 0, 4096), (block::DONE, vec![7; 4096]));
}

#[test]
fn what_a_clone_needs_lives_on_when_its_snapshot_is_deleted_and_the_answer_says_so() {
    let world = world("bad-clone");
    world.text("volume create clone --from vm1@one");
    let said = world.text("snapshot delete vm1@one");
    assert!(said.contains("what its clones need lives on: clone"), "{said}");
    let mut guest = connect(&world, "clone");
    assert_eq!(guest.read(0, 63 * 128, 4096), (block::DONE, vec![7; 4096]));
    assert!(world.refused("volume create x --from 1.0").contains("there is no snapshot 1.0"));
}

#[test]
fn snapshots_that_are_not_related_are_neither_compared_nor_exported_as_a_difference() {
    let world = world("bad-unrelated");
    let before = state(&world);
    for command in [
        "snapshot diff vm1@one vm2@one",
        "snapshot diff 2.0 1.0 --json",
        "snapshot export vm1@one out --from vm2@one",
        "snapshot export vm1@one - --from vm2@one",
    ] {
        let error = world.refused(command);
        assert!(error.contains("have no origin in common"), "{command}: {error}");
    }
    assert_eq!(state(&world), before);
}

#[test]
fn an_export_to_a_full_disk_says_so_and_leaves_nothing() {
    let world = world("bad-full");
    let mut guest = connect(&world, "vm1");
    for place in 0..64 {
        assert_eq!(guest.write(0, place * 128, &[9; 64 << 10]), block::DONE);
    }
    drop(guest);
    while world.json("volume show vm1")["connected"] == true {}
    world.text("snapshot create vm1 --label two");
    std::fs::create_dir(world.path("small")).unwrap();
    let before = state(&world);
    // A pipe into something that is full.
    let full = File::options().write(true).open("/dev/full").unwrap();
    let error = refusal("export", &world.run_into("snapshot export vm1@one -", full));
    assert!(error.starts_with("bessel: cannot write -: No space left on device"), "{error}");

    // A file system of one MiB, in a mount namespace that goes with the command.
    for (export, kept) in [
        ("vm1@one one.img", "old.img\nprecious\n"),
        ("vm1@two diff --from vm1@one", "old.img\nprecious\n"),
        ("vm1@one old.img --force", "old.img\nprecious\n"),
    ] {
        let script = format!(
            "mount -t tmpfs -o size=1m none small || exit 77; cd small; echo precious > old.img; {} \
             snapshot export {export}; code=$?; ls -A; cat old.img; exit $code",
            env!("CARGO_BIN_EXE_bessel"),
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script]).current_dir(&world.directory);
        let output = command.env("BESSEL_API", world.path("api.sock")).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        if output.status.code() == Some(77) || error.contains("unshare: ") {
            return tell("skipped: an export to a full disk (it wants a mount namespace)");
        }
        let error = refusal(export, &output);
        assert!(error.starts_with("bessel: cannot write "), "{export}: {error}");
        assert!(error.contains("No space left on device"), "{export}: {error}");
        assert!(error.contains("nothing is left behind"), "{export}: {error}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), kept, "{export}");
    }
    // Nobody reads the snapshot any more.
    while !world.json("stats")["jobs"].as_array().unwrap().is_empty() {}
    assert_eq!(state(&world), before);
    world.text("snapshot delete vm1@one");
}
