//! `bessel serve` as an operator meets it: the real program, a real store file, the real sockets.
//!
//! Each test has a directory and a daemon of its own and speaks to it through the command line; what
//! it waits for is a line of output or the end of a process, never time.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use bessel_mapping::format::{SUPERBLOCK_COPIES, Superblock};
use bessel_reactor::units::BLOCK_SIZE;
use bessel_tests::guest::{Guest, Options, block};
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use support::World;

const VM1: &str = "volumes:\n  - name: vm1\n    size: 1GiB\n    queues: 2\n";

#[test]
fn volumes_live_from_creation_to_deletion() {
    let mut world = World::new("volumes");
    let said = world.serve(VM1);
    assert!(said.contains(&format!("path={} ", world.path("vm1.sock"))), "{said}");
    assert!(said.contains("num-queues=2\n") && said.contains("vhost_user=true"), "{said}");

    let created = world.json("volume create vm2 --size 512MiB");
    assert_eq!(created["size_bytes"], 512 << 20);
    assert_eq!(created["socket"], world.path("vm2.sock"));
    assert!(Path::new(&world.path("vm2.sock")).exists());
    let names = |volumes: Value| -> Vec<String> {
        let volumes = volumes.as_array().unwrap().iter();
        volumes.map(|volume| volume["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(world.json("volume list")), ["vm1", "vm2"]);

    assert!(world.refused("volume create vm2 --size 1GiB").contains("already a volume named"));
    assert!(world.refused("volume create x --size 1000").contains("multiple of 512"));
    let odd = world.refused("volume create x --size 4097");
    assert!(odd.contains("bad volume size 4097 bytes"), "{odd}");
    assert!(world.refused("volume show nope").contains("there is no volume \"nope\""));
    assert!(world.refused("volume resize vm2 256MiB").contains("cannot shrink"));
    assert!(world.refused("volume rename vm2 vm1").contains("already a volume named"));

    assert_eq!(world.json("volume resize vm2 1TiB")["size_bytes"], 1u64 << 40);
    assert_eq!(world.json("volume rename vm2 vm3")["name"], "vm3");
    assert_eq!(world.json("volume show vm3")["id"], 2);
    world.text("volume delete vm3");
    assert_eq!(names(world.json("volume list")), ["vm1"]);
    assert!(!Path::new(&world.path("vm2.sock")).exists(), "the socket goes with its volume");
    assert_eq!(world.json("volume create vm2 --size 1MiB")["id"], 3, "identities are not reused");

    world.end("-TERM");
    assert!(!Path::new(&world.path("api.sock")).exists());
    assert!(!Path::new(&world.path("vm1.sock")).exists());
    assert_eq!(world.json(&format!("check {}", world.path("store.img")))["clean"], true);
}

#[test]
fn a_store_in_memory_serves_guests_and_is_gone_at_the_end() {
    let mut world = World::new("memory");
    world.store = "memory".to_owned();
    world.serve(VM1);
    let store = |world: &World| world.json("stats")["store"].clone();
    let first = store(&world);
    assert_eq!(first["device"], "memory");
    assert_eq!(first["total_bytes"], 64 << 20);
    let mut guest = Guest::connect(Path::new(&world.path("vm1.sock")), Options::default()).unwrap();
    let written: Vec<u8> = (0..65536u32).map(|at| (at % 253) as u8).collect();
    assert_eq!(guest.write(0, 40, &written), block::DONE);
    world.json("snapshot create vm1 --label before");
    assert_eq!(guest.write(0, 40, &[9; 512]), block::DONE);
    let (status, read) = guest.read(0, 40, 65536);
    assert_eq!((status, &read[..512]), (block::DONE, &[9; 512][..]));
    assert_eq!(read[512..], written[512..]);
    let journals = || {
        let entries = std::fs::read_dir(world.path("")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.ends_with(".journal")).count()
    };
    assert_eq!(journals(), 0, "nobody comes back for them");
    world.json("volume create clone --from vm1@before");
    let mut clone =
        Guest::connect(Path::new(&world.path("clone.sock")), Options::default()).unwrap();
    assert_eq!(clone.read(0, 40, 65536), (block::DONE, written));
    // Threads beside the reactors read it too.
    let diff = world.json("snapshot diff vm1@before vm1@before");
    assert_eq!(diff["changed_bytes"], 0);
    let reactor = world.json("stats")["reactors"][0].clone();
    assert!(reactor["busy_ns"].as_u64() > Some(0), "{reactor}");
    assert!(reactor["spun_ns"].as_u64() > Some(0), "{reactor}");
    drop((guest, clone));
    world.end("-TERM");
    assert!(!Path::new("memory").exists() && !Path::new(&world.path("memory")).exists());

    world.serve(VM1);
    assert_ne!(store(&world)["uuid"], first["uuid"]);
    assert_eq!(world.json("volume list").as_array().unwrap().len(), 1);
    assert_eq!(world.json("snapshot list vm1").as_array().unwrap().len(), 0);
    world.end("-TERM");
}

#[test]
fn a_null_store_maps_what_guests_write_and_drops_it() {
    let mut world = World::new("null");
    world.store = "\"null\"".to_owned();
    world.serve(VM1);
    assert_eq!(world.json("stats")["store"]["device"], "null");
    let mut guest = Guest::connect(Path::new(&world.path("vm1.sock")), Options::default()).unwrap();
    world.json("snapshot create vm1 --label before");
    assert_eq!(guest.write(0, 8, &[0x5a; 65536]), block::DONE);
    // Part of a block, of which the rest is merged with what it held.
    assert_eq!(guest.write(0, 3, &[0x5a; 512]), block::DONE);
    assert_eq!(guest.flush(0), block::DONE);
    drop(guest);
    // With memory of its own, in which a read leaves what is there.
    let mut guest = Guest::connect(Path::new(&world.path("vm1.sock")), Options::default()).unwrap();
    assert_eq!(guest.read(0, 0, 65536), (block::DONE, vec![0; 65536]));
    world.json("snapshot create vm1 --label after");
    let diff = world.json("snapshot diff vm1@before vm1@after");
    assert_eq!(diff["changed_bytes"], 65536 + 4096);
    drop(guest);
    world.end("-TERM");
}

#[test]
fn snapshots_are_labelled_cloned_rolled_back_and_deleted() {
    let mut world = World::new("snapshots");
    world.serve(VM1);
    let taken = world.json("snapshot create vm1 --label base");
    assert_eq!((&taken["id"], &taken["label"]), (&Value::from("1.0"), &Value::from("base")));
    assert!(taken["latency_ns"].as_u64().unwrap() > 0);
    assert_eq!(world.json("snapshot create vm1")["id"], "1.1");
    assert!(world.refused("snapshot create vm1 --label base").contains("already taken"));
    assert!(world.refused("snapshot label 1.1 base").contains("already taken"));
    assert_eq!(world.json("snapshot label 1.1 second")["label"], "second");

    let clone = world.json("volume create clone --from vm1@base");
    assert_eq!((&clone["origin"], &clone["size_bytes"]), (&"1.0".into(), &(1u64 << 30).into()));
    let larger = world.json("volume create larger --from 1.1 --size 2GiB");
    assert_eq!(larger["size_bytes"], 2u64 << 30);
    assert!(world.refused("volume create x --from 1.1 --size 1MiB").contains("smaller than"));
    assert!(world.refused("volume create x --from vm1@nope").contains("no snapshot vm1@nope"));
    assert!(world.refused("volume rollback clone 1.0").contains("not one of volume"));

    let said = world.text("volume rollback vm1 vm1@base");
    assert!(said.contains("what it held is kept as snapshot 1.2"), "{said}");
    let kept = world.json("snapshot list vm1");
    assert_eq!(kept.as_array().unwrap().len(), 3, "what the volume held is kept: {kept}");

    world.text("snapshot delete vm1@second");
    assert!(world.refused("snapshot delete 1.1").contains("no snapshot 1.1"));
    let tree = world.text("tree");
    for line in [
        "vm1 1GiB\n└─ 1.0 @base",
        "\n   ├─ left by a rollback",
        "\n   │  │  └─ larger 2GiB",
        "(deleted)",
        "\n   └─ clone 1GiB",
    ] {
        assert!(tree.contains(line), "{line:?} is not in\n{tree}");
    }
    assert!(world.text("tree --format dot").contains("\"s1.0\" -> \"v2\""));
    let stats = world.json("stats");
    assert_eq!(stats["snapshot_latency"]["count"], 2);

    // Killed without a word, it finds everything again.
    world.end("-KILL");
    world.serve(VM1);
    assert_eq!(world.text("tree"), tree);
    world.end("-TERM");
    assert_eq!(world.json(&format!("check {}", world.path("store.img")))["clean"], true);
}

#[test]
fn a_volume_with_a_guest_is_neither_deleted_nor_rolled_back() {
    let mut world = World::new("guest");
    world.serve(VM1);
    world.text("snapshot create vm1 --label base");
    let guest = UnixStream::connect(world.path("vm1.sock")).unwrap();
    while world.json("volume show vm1")["connected"] != true {}
    assert!(world.refused("volume delete vm1").contains("stop the guest first"));
    assert!(world.refused("volume rollback vm1 vm1@base").contains("stop the guest first"));
    drop(guest);
    while world.json("volume show vm1")["connected"] == true {}
    let done = world.json("volume rollback vm1 vm1@base");
    assert_eq!((&done["name"], &done["kept"]["id"]), (&"vm1".into(), &"1.1".into()));
    world.text("volume delete vm1");
}

#[test]
fn a_store_in_use_is_left_alone() {
    let mut world = World::new("in-use");
    world.serve(VM1);
    let holder = format!("in use by process {}", world.pid());
    let other = world.configure("other.yaml", "other.sock", "volumes: []\n");
    let error = world.refused(&format!("serve --config {other}"));
    assert!(error.contains("other.yaml:2: ") && error.contains(&holder), "{error}");
    for command in ["check store.img", "format store.img --force"] {
        assert!(world.refused(command).contains(&holder), "{command}");
    }
    assert!(!Path::new(&world.path("other.sock")).exists());
    assert_eq!(world.json("volume list").as_array().unwrap().len(), 1);
}

#[test]
fn format_destroys_nothing_without_force() {
    let world = World::new("format");
    assert!(world.refused("format store.img").contains("give --size"));
    let made = world.json("format store.img --size 64MiB --extent-size 1MiB");
    assert_eq!((&made["size_bytes"], &made["extents"]), (&(64 << 20).into(), &64.into()));
    let before = std::fs::read(world.path("store.img")).unwrap();
    for command in ["format store.img", "format store.img --size 128MiB"] {
        let error = world.refused(command);
        assert!(error.contains("holds a Bessel store") && error.contains("--force"), "{error}");
    }
    assert_eq!(std::fs::read(world.path("store.img")).unwrap(), before);
    assert!(world.json("format store.img --force")["replaced"].is_string());

    std::fs::write(world.path("notes.txt"), "precious".repeat(1 << 20)).unwrap();
    assert!(world.refused("format notes.txt").contains("--force"));
    let mut late = vec![0; 8 << 20];
    late[100_000] = 1;
    std::fs::write(world.path("late.img"), &late).unwrap();
    let error = world.refused("format late.img");
    assert!(error.contains("first at byte 100000") && error.contains("--force"), "{error}");
    assert_eq!(std::fs::read(world.path("late.img")).unwrap(), late);
    let missing = world.refused("format no/such/store.img --size 64MiB");
    assert!(missing.contains("cannot create"), "{missing}");
    for (length, byte, at) in
        [(100, 0, 0), (100, 1, 50), (5000, 1, 4500), (128 << 20, 1, 127 << 20)]
    {
        let mut kept = vec![0; length];
        kept[at] = byte;
        std::fs::write(world.path("kept.img"), &kept).unwrap();
        let error = world.refused("format kept.img --size 64MiB");
        assert!(error.contains("--force"), "{error}");
        assert!(std::fs::read(world.path("kept.img")).unwrap() == kept, "{length} bytes");
    }
    for arguments in ["--size 1MiB", "--size 65PiB", "--size 64MiB --extent-size 3MiB"] {
        for command in [format!("kept.img {arguments}"), format!("kept.img {arguments} --force")] {
            let error = world.refused(&format!("format {command}"));
            assert!(error.contains("kept.img"), "{error}");
            let length = std::fs::metadata(world.path("kept.img")).unwrap().len();
            assert_eq!(length, 128 << 20, "{command}");
        }
    }
    world.text("format kept.img --size 64MiB --force");
    std::os::unix::fs::symlink("nowhere.img", world.path("link.img")).unwrap();
    for command in ["format link.img --size 64MiB", "format link.img", "check link.img"] {
        let error = world.refused(command);
        assert!(error.contains("symbolic link to nowhere.img"), "{error}");
    }
    assert!(Command::new("mkfifo").arg(world.path("pipe")).status().unwrap().success());
    for command in ["format pipe", "check pipe"] {
        let error = world.refused(command);
        assert!(error.contains("neither a block device nor a regular file"), "{error}");
    }
    let small = world.refused("format small.img --size 1MiB");
    assert!(small.contains("too small"), "{small}");
    assert!(!Path::new(&world.path("small.img")).exists(), "what was made for it is gone again");
}

#[test]
fn a_device_that_is_no_store_is_refused_with_its_line_and_left_unchanged() {
    let world = World::new("foreign");
    let foreign = "not a store".repeat(1 << 20);
    std::fs::write(world.path("store.img"), &foreign).unwrap();
    let config = world.configure("bessel.yaml", "api.sock", "volumes: []\n");
    let error = world.refused(&format!("serve --config {config}"));
    assert!(error.contains("bessel.yaml:2: ") && error.contains("not a Bessel store"), "{error}");
    assert_eq!(std::fs::read(world.path("store.img")).unwrap(), foreign.as_bytes());

    std::fs::remove_file(world.path("store.img")).unwrap();
    world.text("format store.img --size 64MiB");
    let whole = std::fs::read(world.path("store.img")).unwrap();
    let cut = &whole[..32 << 20];
    std::fs::write(world.path("store.img"), cut).unwrap();
    let error = world.refused(&format!("serve --config {config}"));
    assert!(error.contains("truncated"), "{error}");
    assert_eq!(std::fs::read(world.path("store.img")).unwrap(), cut);

    let mut newer = whole;
    for copy in SUPERBLOCK_COPIES {
        let at = (copy.get() * BLOCK_SIZE) as usize;
        let Some(block) = newer.get_mut(at..at + BLOCK_SIZE as usize) else { continue };
        let mut superblock = Superblock::decode(block, copy).unwrap();
        superblock.features_incompatible = 1 << 40;
        superblock.encode_block(block, copy);
    }
    std::fs::write(world.path("store.img"), &newer).unwrap();
    let error = world.refused(&format!("serve --config {config}"));
    assert!(error.contains("bessel.yaml:2: ") && error.contains("newer"), "{error}");
    assert!(std::fs::read(world.path("store.img")).unwrap() == newer, "it was changed");
}

#[test]
fn no_volume_takes_the_place_of_something_else() {
    let mut world = World::new("places");
    let taken = format!(
        "volumes:\n  - name: vm1\n    size: 1MiB\n    socket: {}\n",
        world.path("other.sock")
    );
    world.serve(&taken);
    std::fs::write(world.path("notes.sock"), "precious").unwrap();
    let _listener = UnixListener::bind(world.path("busy.sock")).unwrap();
    drop(UnixListener::bind(world.path("stale.sock")).unwrap());
    for (name, reason) in [
        ("api", "belongs to the API"),
        ("other", "belongs to another volume"),
        ("notes", "exists and is no socket"),
        ("busy", "is in use"),
    ] {
        let error = world.refused(&format!("volume create {name} --size 1MiB"));
        assert!(error.contains(reason) && error.contains(&format!("/{name}.sock")), "{error}");
    }
    assert_eq!(std::fs::read(world.path("notes.sock")).unwrap(), b"precious");
    assert_eq!(world.json("volume list").as_array().unwrap().len(), 1, "none was made");
    world.text("volume create stale --size 1MiB");
}

#[test]
fn a_volume_whose_socket_is_taken_does_not_keep_the_daemon_from_starting() {
    let mut world = World::new("taken");
    world.serve("volumes: []\n");
    for name in ["vm1", "vm2", "vm3"] {
        world.text(&format!("volume create {name} --size 1MiB"));
    }
    world.text("volume rename vm1 api");
    world.end("-TERM");
    std::fs::write(world.path("vm2.sock"), "precious").unwrap();
    let said = world.serve("volumes: []\n");
    assert!(said.contains("vm3.sock"), "{said}");
    assert!(!said.contains("volume api ") && !said.contains("volume vm2 "), "{said}");
    assert_eq!(std::fs::read(world.path("vm2.sock")).unwrap(), b"precious");
    world.text("volume delete api");
    world.text("volume rename vm2 vm4");
    world.end("-TERM");
    let said = world.serve("volumes: []\n");
    assert!(said.contains("vm4.sock"), "{said}");
}

#[test]
fn a_file_with_anything_in_it_is_not_formatted_by_serving_it() {
    let mut world = World::new("lost");
    world.serve("volumes: []\n");
    world.text("volume create vm1 --size 16MiB");
    world.end("-TERM");
    let whole = std::fs::read(world.path("store.img")).unwrap();
    let config = world.path("bessel.yaml");
    for (zeroed, said) in [
        // Only the last superblock is left, from which everything can be restored.
        (64 << 10, None),
        (128 << 10, Some("a damaged Bessel store")),
        (256 << 10, Some("a damaged Bessel store")),
        (1 << 20, Some("its first MiB is zero")),
        (64 << 20, Some("its first MiB is zero")),
    ] {
        let mut lost = whole.clone();
        lost[..zeroed].fill(0);
        std::fs::write(world.path("store.img"), &lost).unwrap();
        let Some(said) = said else {
            world.serve("volumes: []\n");
            assert_eq!(world.json("volume show vm1")["id"], 1);
            world.end("-TERM");
            continue;
        };
        let error = world.refused(&format!("serve --config {config}"));
        assert!(error.contains("bessel.yaml:2: ") && error.contains(said), "{error}");
        assert!(error.contains("bessel format"), "{error}");
        assert!(std::fs::read(world.path("store.img")).unwrap() == lost, "{zeroed}");
    }
    // Made by a daemon that was killed before it wrote anything.
    std::fs::File::create(world.path("store.img")).unwrap().set_len(64 << 20).unwrap();
    world.serve("volumes: []\n");
    assert_eq!(world.json("volume list").as_array().unwrap().len(), 0);
}

#[test]
fn a_store_file_is_for_its_owner_alone() {
    let mut world = World::new("mode");
    world.serve("volumes: []\n");
    world.text("format other.img --size 64MiB");
    for file in ["store.img", "other.img"] {
        let mode = std::fs::metadata(world.path(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
}

#[test]
fn a_refused_configuration_touches_nothing() {
    let world = World::new("refused");
    let config =
        world.configure("bessel.yaml", "api.sock", "volumes:\n  - name: a\n    sise: 1GiB\n");
    let error = world.refused(&format!("serve --config {config}"));
    assert!(error.contains("bessel.yaml:9: ") && error.contains("sise"), "{error}");
    let left: Vec<_> = std::fs::read_dir(&world.directory).unwrap().collect();
    assert_eq!(left.len(), 1, "only the configuration is there: {left:?}");
    assert_eq!(world.run("volume create x").status.code(), Some(2), "wrong usage");
    assert!(world.refused("volume list").contains("is `bessel serve` running?"));
}

#[test]
fn hostile_clients_get_a_reason_and_others_an_answer() {
    let mut world = World::new("hostile");
    world.serve(VM1);
    let mode = std::fs::metadata(world.path("api.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let long = format!("{{\"name\":\"{}\"}}", "x".repeat(1 << 20));
    let deep = "[".repeat(16_000);
    for (method, path, body, status) in [
        ("GET", "/", "", 404),
        ("GET", "/v1/volumes/nope", "", 404),
        ("GET", "/v1/volumes/..%2f..%2fetc", "", 400),
        ("GET", "/v1/volumes/%ff", "", 400),
        ("PUT", "/v1/volumes", "", 405),
        ("POST", "/v1/volumes", "", 400),
        ("POST", "/v1/volumes", "{\"name\":\"x\",\"size_bytes\":-1}", 400),
        ("POST", "/v1/volumes", "{\"name\":\"x\",\"size_bytes\":1e300}", 400),
        ("POST", "/v1/volumes", "{\"name\":\"x\",\"size\":512}", 400),
        ("POST", "/v1/volumes", "{\"name\":\"x\"}", 400),
        ("POST", "/v1/volumes", "{\"name\":\"../x\",\"size_bytes\":4096}", 400),
        ("POST", "/v1/volumes", "{\"name\":\"vm1\",\"size_bytes\":4096}", 409),
        ("POST", "/v1/volumes", &deep, 400),
        ("POST", "/v1/volumes", &long, 413),
        ("PATCH", "/v1/volumes/vm1", "{}", 400),
        ("PATCH", "/v1/volumes/vm1", "{\"name\":\"y\",\"size_bytes\":4096}", 400),
        ("POST", "/v1/volumes/vm1/snapshots", "{\"label\":\"a b\"}", 400),
        ("DELETE", "/v1/snapshots/1.99999999999999999999", "", 400),
        ("DELETE", "/v1/snapshots/99.99", "", 404),
    ] {
        let answer = world.request(method, path, body);
        let context = format!("{method} {path} {:.60}: {answer}", body);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{context}");
        let (_, json) = answer.split_once("\r\n\r\n").unwrap();
        let reason = &serde_json::from_str::<Value>(json).unwrap()["error"];
        assert!(reason.as_str().is_some_and(|reason| !reason.is_empty()), "{context}");
    }
    world.garbage(b"\0\0\0\0\xff\xff\r\n\r\n");
    world.garbage(&b"GET / HTTP/1.1\r\nx: ".repeat(10_000));
    let _idle: Vec<_> =
        (0..100).map(|_| UnixStream::connect(world.path("api.sock")).unwrap()).collect();

    assert!(world.request("GET", "/openapi.json", "").contains("\"openapi\":\"3.1.0\""));
    let metrics = world.request("GET", "/metrics", "");
    assert!(metrics.contains("bessel_volume_reads_total{volume=\"vm1\"} 0\n"), "{metrics}");
    assert_eq!(world.json("volume list").as_array().unwrap().len(), 1);
    world.end("-TERM");
}
