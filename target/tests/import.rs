//! `bessel volume import` with the real daemon: what was exported or is in a file becomes a volume, whole
//! and durable, or nothing does.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use bessel_tests::guest::{Guest, Options, block};
use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output};
use support::{World, refusal};

const NOTHING: &str = "volumes: []\n";
const BLOCK: u64 = 4096;

/// Bytes that tell blocks and writes apart, none of them all zero.
fn pattern(block: u64, write: u8) -> Vec<u8> {
    (0..BLOCK).map(|byte| (block * 31 + byte) as u8 ^ write).collect()
}

/// Makes a sparse file of `size` bytes with these blocks in it.
fn sparse(world: &World, name: &str, size: u64, blocks: &[u64]) -> Vec<u8> {
    let file = File::create(world.path(name)).unwrap();
    file.set_len(size).unwrap();
    for &at in blocks {
        let bytes = pattern(at, 1);
        let inside = (size - at * BLOCK).min(BLOCK) as usize;
        file.write_all_at(&bytes[..inside], at * BLOCK).unwrap();
    }
    std::fs::read(world.path(name)).unwrap()
}

/// What a volume holds, by a snapshot of it.
fn contents(world: &World, volume: &str) -> Vec<u8> {
    let id = world.json(&format!("snapshot create {volume}"))["id"].as_str().unwrap().to_owned();
    let piped = world.run(&format!("snapshot export {id} -"));
    assert!(piped.status.success(), "{}", String::from_utf8_lossy(&piped.stderr));
    piped.stdout
}

fn is_clean(world: &World) {
    let report = world.json(&format!("check {}", world.path("store.img")));
    assert_eq!(report["clean"], true, "{report}");
}

/// Runs a command with these bytes down its standard input.
fn piped(world: &World, arguments: &str, bytes: &[u8]) -> Output {
    let mut child = world.spawn_fed(arguments);
    let mut input = child.stdin.take().unwrap();
    // It may have seen enough before all is written.
    let _ = input.write_all(bytes);
    drop(input);
    child.wait_with_output().unwrap()
}

fn refused(output: &Output) -> String {
    refusal("import", output)
}

fn volumes(world: &World) -> usize {
    world.json("volume list").as_array().unwrap().len()
}

#[test]
fn what_was_exported_comes_back_and_stays_sparse() {
    let mut world = World::new("import-round");
    world.serve("volumes:\n  - name: vm1\n    size: 8388096\n    queues: 1\n");
    let last = 8388096 / BLOCK; // Which lies past the end in part.
    let bytes = sparse(&world, "made.img", 8388096, &[0, 5, 6, 1000, last]);
    let made = world.json("volume import vm2 made.img");
    assert_eq!((&made["size_bytes"], &made["state"]), (&8388096.into(), &"online".into()));
    assert_eq!(
        (&made["data_bytes"], &made["file_bytes"]),
        (&(5 * 4096 - 512).into(), &8388096.into())
    );
    assert_eq!(made["socket"], world.path("vm2.sock"));
    assert!(contents(&world, "vm2") == bytes);

    // Exported and imported again, it takes what it took, and no more.
    world.text("snapshot export 2.0 out.img");
    assert!(std::fs::read(world.path("out.img")).unwrap() == bytes);
    let said = world.text("volume import vm3 out.img");
    assert!(said.starts_with("imported out.img as volume vm3: "), "{said}");
    let space =
        |volume: &str| world.json(&format!("volume show {volume} --space"))["current"].clone();
    assert_eq!(space("vm3")["refers_bytes"], space("vm2")["refers_bytes"]);
    let allocated = std::fs::metadata(world.path("out.img")).unwrap().blocks() * 512;
    assert!(space("vm3")["refers_bytes"].as_u64().unwrap() <= allocated + 5 * BLOCK);
    assert!(contents(&world, "vm3") == bytes);

    // A guest can use it at once, and all of it outlives the daemon.
    let mut guest = Guest::connect(
        Path::new(&world.path("vm3.sock")),
        Options { queues: 1, ..Options::default() },
    )
    .unwrap();
    assert_eq!(guest.read(0, 5 * 8, 4096), (block::DONE, pattern(5, 1)));
    assert_eq!(guest.write(0, 5 * 8, &pattern(5, 2)), block::DONE);
    drop(guest);
    world.end("-KILL");
    world.serve(NOTHING);
    let mut changed = bytes.clone();
    changed[5 * 4096..6 * 4096].copy_from_slice(&pattern(5, 2));
    assert!(contents(&world, "vm3") == changed);
    assert!(contents(&world, "vm2") == bytes);
    world.end("-TERM");
    is_clean(&world);
}

#[test]
fn a_pipe_becomes_as_sparse_as_a_file_with_and_without_its_size() {
    let mut world = World::new("import-pipe");
    world.serve(NOTHING);
    // Blocks of zeroes in it are written, not holes.
    let mut bytes = sparse(&world, "made.img", 5 << 20, &[3, 4, 700, 1279]);
    std::fs::write(world.path("full.img"), &bytes).unwrap();
    for (name, arguments) in [
        ("piped", "volume import piped - --json"),
        ("sized", "volume import sized - --size 5MiB --json"),
        ("filed", "volume import filed full.img --json"),
    ] {
        let input = if name == "filed" { &[][..] } else { &bytes };
        let output = piped(&world, arguments, input);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let made: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(
            (&made["size_bytes"], &made["data_bytes"]),
            (&(5 << 20).into(), &(4 * 4096).into())
        );
        assert!(contents(&world, name) == bytes, "{name}");
    }
    // Larger than what it began with.
    let larger = world.json("volume import larger made.img --size 1GiB");
    assert_eq!(larger["size_bytes"], 1 << 30);
    // Rounded up with zeroes.
    bytes.truncate(2 << 20);
    bytes.extend(b"the end");
    std::fs::write(world.path("odd.img"), &bytes).unwrap();
    let said = world.text("volume import odd odd.img");
    assert!(said.contains("its 2097159 bytes were filled up with zeroes"), "{said}");
    let output = piped(&world, "volume import oddpipe -", &bytes);
    assert!(output.status.success());
    bytes.resize((2 << 20) + 512, 0);
    for name in ["odd", "oddpipe"] {
        assert_eq!(world.json(&format!("volume show {name}"))["size_bytes"], (2 << 20) + 512);
        assert!(contents(&world, name) == bytes, "{name}");
    }
    let tiny = piped(&world, "volume import tiny - --json", b"x");
    let tiny: serde_json::Value = serde_json::from_slice(&tiny.stdout).unwrap();
    assert_eq!(tiny["size_bytes"], 4096, "the least that a volume has");
    world.end("-TERM");
    is_clean(&world);
}

/// A pipe that brings more than a volume begins with, so that it grows while it is filled: past the size at
/// which its tree becomes taller, too.
#[test]
fn a_volume_whose_size_nobody_knew_has_the_size_of_what_came() {
    let mut world = World::new("import-grows");
    world.serve(NOTHING);
    for (number, blocks) in [(1, (3u64 << 30) / BLOCK), (2, (600u64 << 30) / BLOCK)] {
        let mut stream = Stream::new(0);
        stream.data(7, &pattern(7, 1));
        stream.data(blocks - 1, &pattern(blocks - 1, 1));
        let size = blocks * BLOCK - 512;
        let answer = world.post(&format!("/v1/volumes/big{number}/import"), &stream.end(size));
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(answer.contains(&format!("\"size_bytes\":{size},")), "{answer}");
        let socket = world.path(&format!("big{number}.sock"));
        let mut guest =
            Guest::connect(Path::new(&socket), Options { queues: 1, ..Options::default() });
        let guest = guest.as_mut().unwrap();
        assert_eq!(guest.read(0, 7 * 8, 4096), (block::DONE, pattern(7, 1)));
        let (status, bytes) = guest.read(0, (blocks - 1) * 8, 3584);
        assert_eq!((status, &bytes[..]), (block::DONE, &pattern(blocks - 1, 1)[..3584]));
        assert_eq!(guest.read(0, (blocks - 1) * 8, 4096).0, block::IO_ERROR, "past the end");
    }
    world.end("-TERM");
    is_clean(&world);
}

#[test]
fn a_difference_is_applied_to_the_snapshot_it_was_made_from_and_to_no_other() {
    let mut world = World::new("import-diff");
    let size = 4 << 20;
    let mut one = sparse(&world, "one.img", size, &[0, 5, 6, 600]);
    world.serve(NOTHING);
    world.text("volume import vm1 one.img");
    world.text("snapshot create vm1 --label one");
    let socket = world.path("vm1.sock");
    let mut guest =
        Guest::connect(Path::new(&socket), Options { queues: 1, ..Options::default() }).unwrap();
    assert_eq!(guest.write(0, 5 * 8, &pattern(5, 2)), block::DONE);
    assert_eq!(guest.write(0, 900 * 8, &pattern(900, 2)), block::DONE);
    assert_eq!(guest.discard(0, 600 * 8, 8), block::DONE);
    drop(guest);
    world.text("snapshot create vm1 --label two");
    world.text("snapshot export vm1@two diff --from vm1@one");
    one[5 * 4096..6 * 4096].copy_from_slice(&pattern(5, 2));
    one[900 * 4096..901 * 4096].copy_from_slice(&pattern(900, 2));
    one[600 * 4096..601 * 4096].fill(0);

    let made = world.json("volume import vm2 diff --from vm1@one");
    assert_eq!((&made["origin"], &made["data_bytes"]), (&"1.0".into(), &(2 * 4096).into()));
    assert!(contents(&world, "vm2") == one);
    let stream = std::fs::read(world.path("diff")).unwrap();
    assert!(piped(&world, "volume import vm3 - --from 1.0", &stream).status.success());
    assert!(contents(&world, "vm3") == one);

    for (command, why) in [
        ("volume import x diff --from vm1@two", "the difference to snapshot 1.0, not to 1.1"),
        ("volume import x diff", "give --from 1.0"),
        ("volume import x one.img --from vm1@one", "no difference made by"),
        ("volume import x diff --from vm1@three", "no snapshot vm1@three"),
        ("volume import vm2 diff --from 1.0", "already a volume named"),
    ] {
        let error = world.refused(command);
        assert!(error.contains(why), "{command}: {error}");
    }
    let answer = world.post("/v1/volumes/x/import", &stream);
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("--from"), "{answer}");
    assert_eq!(volumes(&world), 3);
    // Nobody but its own store has the snapshot.
    world.end("-TERM");
    let mut other = World::new("import-other");
    other.serve(NOTHING);
    other.text("volume create vm1 --size 4MiB");
    other.text("snapshot create vm1");
    std::fs::write(other.path("diff"), &stream).unwrap();
    let error = other.refused("volume import x diff --from 1.0");
    assert!(error.contains("of another store"), "{error}");
    is_clean(&world);
}

#[test]
fn what_cannot_be_a_volume_is_refused_in_a_line_and_leaves_nothing() {
    let mut world = World::new("import-refused");
    world.serve("volumes:\n  - name: vm1\n    size: 1MiB\n");
    sparse(&world, "one.img", 1 << 20, &[0]);
    File::create(world.path("empty.img")).unwrap();
    File::create(world.path("huge.img")).unwrap().set_len(257 << 40).unwrap();
    std::fs::create_dir(world.path("directory")).unwrap();
    for (command, why) in [
        ("volume import vm1 one.img", "already a volume named \"vm1\""),
        ("volume import x empty.img", "empty.img is empty"),
        ("volume import x huge.img", "has 257TiB, and a volume at most 256TiB"),
        ("volume import x directory", "is a directory"),
        ("volume import x missing.img", "cannot open missing.img"),
        ("volume import x /dev/zero", "neither a file nor a block device"),
        ("volume import x one.img --size 512KiB", "more than the 512KiB"),
        ("volume import x one.img --size 1048577", "multiple of 512"),
        ("volume import api one.img", "belongs to the API"),
    ] {
        let error = world.refused(command);
        assert!(error.contains(why), "{command}: {error}");
    }
    assert!(refused(&piped(&world, "volume import x -", b"")).contains("- is empty"));
    let long = piped(&world, "volume import x - --size 1MiB", &vec![7; 3 << 20]);
    assert!(refused(&long).contains("more than the 1MiB"));
    assert_eq!(world.run("volume import x one.img --size 1MiB --from 1.0").status.code(), Some(2));
    assert_eq!(volumes(&world), 1);
    world.text("volume import x one.img");
    world.end("-TERM");
    is_clean(&world);
}

/// A stream, made by hand.
struct Stream {
    bytes: Vec<u8>,
    crc: u32,
}

impl Stream {
    fn new(size: u64) -> Self {
        let mut stream = Self { bytes: Vec::new(), crc: 0 };
        let mut header = [0; 128];
        header[..8].copy_from_slice(b"BESSELDF");
        header[8] = 1;
        header[48..56].copy_from_slice(&size.to_le_bytes());
        stream.seal(&mut header, 12);
        stream
    }

    fn seal(&mut self, bytes: &mut [u8], at: usize) {
        let crc = crc32c::crc32c_append(self.crc, bytes);
        bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
        self.crc = crc32c::crc32c_append(self.crc, bytes);
        self.bytes.extend_from_slice(bytes);
    }

    fn record(&mut self, kind: u32, first: u64, count: u64) {
        let mut record = [0; 24];
        record[..4].copy_from_slice(&kind.to_le_bytes());
        record[8..16].copy_from_slice(&first.to_le_bytes());
        record[16..24].copy_from_slice(&count.to_le_bytes());
        self.seal(&mut record, 4);
    }

    fn data(&mut self, first: u64, bytes: &[u8]) {
        self.record(1, first, bytes.len() as u64 / BLOCK);
        self.crc = crc32c::crc32c_append(self.crc, bytes);
        self.bytes.extend_from_slice(bytes);
    }

    fn end(mut self, size: u64) -> Vec<u8> {
        self.record(3, size, 0);
        self.bytes
    }
}

#[test]
fn streams_that_are_cut_short_or_lie_leave_no_volume() {
    let mut world = World::new("import-cut");
    world.serve(NOTHING);
    let size = 2 << 20;
    let whole = |size| {
        let mut stream = Stream::new(size);
        stream.data(3, &pattern(3, 1));
        stream.data(100, &[pattern(100, 1), pattern(101, 1)].concat());
        stream
    };
    let good = whole(size).end(0);
    let free = |world: &World| world.json("stats")["store"]["data_bytes"].as_u64().unwrap();
    let mut bad: Vec<(Vec<u8>, &str)> = Vec::new();
    for length in [0, 100, 128, 140, 152, 4000, 4300, good.len() - 24, good.len() - 1] {
        bad.push((good[..length].to_vec(), "ends early"));
    }
    for (at, why) in
        [(0, "no stream of Bessel"), (9, "version"), (50, "checksum"), (2000, "checksum")]
    {
        let mut damaged = good.clone();
        damaged[at] ^= 0x40;
        bad.push((damaged, why));
    }
    let mut with = |change: &dyn Fn(&mut Stream), why| {
        let mut stream = whole(size);
        change(&mut stream);
        bad.push((stream.end(0), why));
    };
    with(&|stream| stream.data(50, &pattern(50, 1)), "out of order");
    with(&|stream| stream.data(101, &pattern(101, 1)), "out of order");
    with(&|stream| stream.record(1, 511, 2), "past the volume");
    with(&|stream| stream.record(1, u64::MAX, 1), "past the volume");
    with(&|stream| stream.record(1, 200, 0), "empty");
    with(&|stream| stream.record(7, 200, 1), "no known kind");
    let mut broken = whole(size);
    broken.record(4, 0, 9);
    broken.bytes.extend(b"the mouse");
    bad.push((broken.bytes, "the mouse"));
    for wrong in [1 << 60, 513, 100, 4096] {
        bad.push((whole(wrong).end(0), ""));
    }
    bad.push((whole(0).end(0), "a size that cannot be"));
    bad.push((whole(0).end(5 * BLOCK), "a size that cannot be"));
    bad.push((whole(0).end(1 << 60), "a size that cannot be"));
    bad.push((whole(0).end((102 * BLOCK) + 1), "multiple of 512"));
    for (stream, why) in &bad {
        let answer = world.post("/v1/volumes/x/import", stream);
        let context = format!("{why:?} of {} bytes: {answer}", stream.len());
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains(why), "{context}");
        assert_eq!(volumes(&world), 0, "{context}");
        assert_eq!(free(&world), 0, "what it had written is free again: {context}");
        assert!(!Path::new(&world.path("x.sock")).exists());
    }
    // The name is free, and so is everything else.
    let answer = world.post("/v1/volumes/x/import", &good);
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert_eq!(contents(&world, "x").len(), size as usize);
    world.end("-TERM");
    is_clean(&world);
}

/// Starts an import that has written something and waits for more.
fn begin(world: &World, name: &str) -> Child {
    let mut child = world.spawn_fed(&format!("volume import {name} -"));
    let bytes: Vec<u8> = (0..512).flat_map(|block| pattern(block, 1)).collect();
    child.stdin.as_mut().unwrap().write_all(&bytes).unwrap();
    child.stdin.as_mut().unwrap().flush().unwrap();
    // Its first MiB at least has come, and is counted.
    while !world.json("stats")["jobs"]
        .as_array()
        .unwrap()
        .iter()
        .any(|job| job["subject"] == name && job["done_bytes"].as_u64().unwrap() >= 1 << 20)
    {}
    child
}

/// Waits until nothing is under way.
fn idle(world: &World) {
    while !world.json("stats")["jobs"].as_array().unwrap().is_empty() {}
}

#[test]
fn a_volume_that_is_being_imported_is_nobodys_and_is_told_of() {
    let mut world = World::new("import-busy");
    world.serve("volumes:\n  - name: vm1\n    size: 1MiB\n");
    let child = begin(&world, "x");
    let jobs = world.request("GET", "/v1/jobs", "");
    assert!(jobs.contains("\"kind\":\"import\",\"subject\":\"x\""), "{jobs}");
    assert!(jobs.contains("\"total_bytes\":null,\"started\":\"20"), "{jobs}");
    let metrics = world.request("GET", "/metrics", "");
    assert!(metrics.contains("bessel_job_done_bytes{id=\"1\",kind=\"import\",subject=\"x\"} "));
    assert!(metrics.contains("bessel_volume_importing{volume=\"x\"} 1\n"), "{metrics}");
    let stats = world.text("stats");
    assert!(stats.contains("JOB  WORK") && stats.contains("import  x"), "{stats}");
    assert_eq!(world.json("stats")["volumes"].as_array().unwrap().len(), 2);
    assert_eq!(world.json("volume show x")["state"], "importing");
    assert!(world.text("volume list").contains("importing"));
    assert!(world.text("tree").contains('x'));
    assert!(!Path::new(&world.path("x.sock")).exists(), "no front-end connects");
    for command in [
        "volume delete x",
        "volume rename x y",
        "volume resize x 4GiB",
        "volume detach x",
        "volume attach x",
        "volume schedule x --every 1s --keep 3",
        "snapshot create x",
        "volume rollback x 2.0",
        "volume create y --from 2.0",
    ] {
        let error = world.refused(command);
        assert!(error.contains("\"x\" is being imported; wait"), "{command}: {error}");
    }
    for command in
        ["volume create x --size 1MiB", "volume rename vm1 x", "volume import x vm1.sock"]
    {
        let error = world.refused(command);
        assert!(
            error.contains("already a volume named") || error.contains("cannot open"),
            "{error}"
        );
    }
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    idle(&world);
    assert_eq!(contents(&world, "x").len(), 2 << 20);
    assert!(!world.text("stats").contains("JOB"));
    world.end("-TERM");
    is_clean(&world);
}

#[test]
fn a_client_that_is_gone_leaves_no_volume() {
    let mut world = World::new("import-gone");
    world.serve(NOTHING);
    let mut child = begin(&world, "x");
    child.kill().unwrap();
    child.wait().unwrap();
    idle(&world);
    while volumes(&world) > 0 {}
    assert_eq!(world.json("stats")["store"]["data_bytes"], 0);
    assert!(world.log().contains("not imported: nothing of it is left"), "{}", world.log());
    // The same for one that only hangs up.
    let mut stream = UnixStream::connect(world.path("api.sock")).unwrap();
    let mut begun = Stream::new(1 << 20);
    begun.data(0, &pattern(0, 1));
    let head = "POST /v1/volumes/x/import HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&begun.bytes).unwrap();
    while volumes(&world) == 0 {}
    drop(stream);
    while volumes(&world) > 0 {}
    world.end("-TERM");
    is_clean(&world);
}

#[test]
fn a_daemon_that_stops_ends_an_import_and_says_so() {
    let mut world = World::new("import-stop");
    world.serve(NOTHING);
    let mut child = begin(&world, "x");
    let input = child.stdin.take();
    world.end("-TERM");
    // It reads its pipe until that ends, and hears of it when it sends.
    drop(input);
    let error = refused(&child.wait_with_output().unwrap());
    assert!(error.contains("not imported: the daemon is stopping"), "{error}");
    is_clean(&world);
    world.serve(NOTHING);
    assert_eq!(volumes(&world), 0);
    world.end("-TERM");
}

#[test]
fn a_daemon_that_is_killed_during_an_import_leaves_no_volume() {
    let mut world = World::new("import-kill");
    world.serve(NOTHING);
    sparse(&world, "one.img", 1 << 20, &[0, 9]);
    world.text("volume import base one.img");
    world.text("snapshot create base");
    for round in 0..3 {
        let child = begin(&world, "x");
        world.end("-KILL");
        let output = child.wait_with_output().unwrap();
        let error = refused(&output);
        assert!(error.contains("broke off"), "{error}");
        world.serve(NOTHING);
        assert_eq!(volumes(&world), 1, "round {round}");
        assert!(!Path::new(&world.path("x.sock")).exists());
    }
    // Its name, its slot and its number are free.
    let made = world.json("volume import x one.img");
    assert_eq!(made["id"], 2, "nothing on the device knows of those before");
    world.end("-TERM");
    is_clean(&world);
    // What they had written is found by who looks for it.
    world.text(&format!("check {} --repair --yes", world.path("store.img")));
    let report = world.json(&format!("check {}", world.path("store.img")));
    assert_eq!(report["data"]["leaked_bytes"], 0, "{report}");
    world.serve(NOTHING);
    assert!(contents(&world, "x") == std::fs::read(world.path("one.img")).unwrap());
    world.end("-TERM");
}

#[test]
fn an_import_into_a_full_store_is_refused_and_gives_back_what_it_took() {
    let mut world = World::new("import-full");
    world.serve(NOTHING);
    let bytes: Vec<u8> = (0..80 << 8).flat_map(|block| pattern(block, 1)).collect();
    std::fs::write(world.path("large.img"), &bytes).unwrap(); // 80 MiB; the store has 64.
    for command in ["volume import x large.img", "volume import x -"] {
        let output = piped(&world, command, &bytes);
        let error = refused(&output);
        assert!(error.contains("volume \"x\" was not imported: the store is full"), "{error}");
        assert_eq!(volumes(&world), 0);
        assert_eq!(world.json("stats")["store"]["data_bytes"], 0);
    }
    sparse(&world, "one.img", 32 << 20, &(0..8192).collect::<Vec<_>>());
    world.text("volume import x one.img");
    world.end("-TERM");
    is_clean(&world);
}

#[test]
fn a_file_that_changes_its_size_while_it_is_read_is_not_imported() {
    let mut world = World::new("import-changes");
    world.serve(NOTHING);
    let file = File::create(world.path("changes.img")).unwrap();
    for at in 0..2048 {
        file.write_all_at(&pattern(at, 1), at * BLOCK).unwrap();
    }
    let signal = |world: &World, signal: &str| {
        let sent = Command::new("kill").args([signal, &world.pid().to_string()]).status().unwrap();
        assert!(sent.success());
    };
    for size in [9 << 20, 5 << 20] {
        // A daemon that takes nothing keeps it in the middle of the file.
        signal(&world, "-STOP");
        let child = world.spawn("volume import x changes.img");
        let connected = || {
            let files = std::fs::read_dir(format!("/proc/{}/fd", child.id())).unwrap();
            let mut links = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
            links.any(|link| link.to_string_lossy().starts_with("socket:"))
        };
        while !connected() {}
        file.set_len(size).unwrap();
        signal(&world, "-CONT");
        let error = refused(&child.wait_with_output().unwrap());
        assert!(error.contains("changes.img has changed its size while it was read"), "{error}");
        assert_eq!(volumes(&world), 0);
        file.set_len(8 << 20).unwrap();
    }
    world.end("-TERM");
    is_clean(&world);
}

/// Long work draws its bar on standard error when that is a terminal.
#[test]
fn exports_and_imports_show_their_progress_on_a_terminal() {
    let mut world = World::new("import-progress");
    world.serve(NOTHING);
    sparse(&world, "one.img", 8 << 20, &(0..2048).collect::<Vec<_>>());
    let shown = |world: &World, arguments: &str, input: Option<&str>| {
        let mut terminal = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY).unwrap();
        grantpt(&terminal).unwrap();
        unlockpt(&terminal).unwrap();
        let name = ptsname_r(&terminal).unwrap();
        let end = File::options().read(true).write(true).open(name).unwrap();
        let input = input.map(|name| File::open(world.path(name)).unwrap());
        let mut child = world.spawn_on_terminal(arguments, input, end);
        let mut drawn = Vec::new();
        // The kernel says EIO when the last holder of the other end is gone.
        let _ = terminal.read_to_end(&mut drawn);
        assert!(child.wait().unwrap().success(), "{}", String::from_utf8_lossy(&drawn));
        String::from_utf8_lossy(&drawn).into_owned()
    };
    for (arguments, input, what) in [
        ("volume import vm1 one.img", None, "importing ["),
        ("volume import vm2 -", Some("one.img"), "importing "),
        ("snapshot create vm1 --label one", None, ""),
        ("volume rollback vm1 1.0", None, ""),
        ("snapshot export 1.0 out.img", None, "exporting ["),
        ("snapshot export 1.0 -", None, "exporting ["),
        ("volume create blank --size 8MiB", None, ""),
    ] {
        let drawn = shown(&world, arguments, input);
        assert!(drawn.contains(what), "{arguments}: {drawn:?}");
        assert!(!what.contains('[') || drawn.contains('%'), "{arguments}: {drawn:?}");
    }
    let socket = world.path("vm1.sock");
    let mut guest =
        Guest::connect(Path::new(&socket), Options { queues: 1, ..Options::default() }).unwrap();
    for place in 0..16 {
        assert_eq!(guest.write(0, place * 128, &[7; 64 << 10]), block::DONE);
    }
    world.text("snapshot create vm1 --label two");
    let drawn = shown(&world, "snapshot export vm1@two diff --from vm1@one", None);
    assert!(drawn.contains("exporting [") && drawn.contains('%'), "{drawn:?}");
    let drawn = shown(&world, "volume import vm3 diff --from vm1@one", None);
    assert!(drawn.contains("importing [") && drawn.contains('%'), "{drawn:?}");
    assert_eq!(shown(&world, "volume import vm4 one.img --json", None), "", "not for programs");
}
