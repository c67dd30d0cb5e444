//! Damaged stores as an operator meets them: what is served, what `bessel check` says, and what it
//! repairs. The store is a real file whose blocks are damaged behind the daemon's back.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use bessel_mapping::format::{SUPERBLOCK_COPIES, Slot, Superblock, VolumeRecord};
use bessel_reactor::units::BlockAddr;
use serde_json::Value;
use std::os::unix::fs::FileExt;
use support::World;

const TWO: &str = "volumes:\n  - name: vm1\n    size: 1GiB\n  - name: vm2\n    size: 1GiB\n";
const BLOCK: u64 = 4096;
/// Blocks in an extent of a store of 64 MiB.
const EXTENT: u64 = 256;
/// Where the catalogue and the registry of such a store lie (FORMAT.md, section 3).
const CATALOGUE: u64 = 96;
const REGISTRY: u64 = 97;

struct Image(std::fs::File);

impl Image {
    fn of(world: &World) -> Self {
        let mut options = std::fs::File::options();
        Self(options.read(true).write(true).open(world.path("store.img")).unwrap())
    }

    fn block(&self, block: u64) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK as usize];
        self.0.read_exact_at(&mut bytes, block * BLOCK).unwrap();
        bytes
    }

    fn zero(&self, block: u64) {
        self.0.write_all_at(&[0; BLOCK as usize], block * BLOCK).unwrap();
    }

    fn spoil(&self, block: u64) {
        let mut bytes = self.block(block);
        bytes[100] ^= 0x20;
        self.0.write_all_at(&bytes, block * BLOCK).unwrap();
    }

    /// The first blocks of extents that have a bitmap.
    fn bitmaps(&self) -> Vec<u64> {
        let starts = (1..64).map(|extent| extent * EXTENT);
        starts.filter(|start| self.block(*start)[504..508] == *b"BMAP").collect()
    }

    /// Where the older of vm1's two records lies.
    fn older_record(&self) -> u64 {
        let copy = SUPERBLOCK_COPIES[0];
        let secret = Superblock::decode(&self.block(copy.get()), copy).unwrap().secret;
        let generation = |block| {
            let addr = BlockAddr::new(block);
            match VolumeRecord::decode_slot(&self.block(block), addr, secret) {
                Slot::Record(record) => record.generation,
                _ => panic!("vm1 has had two records"),
            }
        };
        let [first, second] = [REGISTRY, REGISTRY + 1].map(|block| (generation(block), block));
        first.min(second).1
    }

    /// Where vm1's root lies, as the newer of its records says.
    fn root(&self) -> u64 {
        let newest = (REGISTRY..REGISTRY + 2)
            .map(|block| self.block(block))
            .max_by_key(|record| u64::from_le_bytes(record[..8].try_into().unwrap()))
            .unwrap();
        u64::from_le_bytes(newest[32..40].try_into().unwrap())
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; 64 << 20];
        self.0.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

/// A store with two volumes and snapshots, closed in order.
fn store(tag: &str) -> World {
    let mut world = World::new(tag);
    world.serve(TWO);
    for _ in 0..3 {
        world.text("snapshot create vm1");
        world.text("snapshot create vm2");
    }
    world.text("volume create clone --from 1.1");
    world.end("-TERM");
    world
}

fn findings(report: &Value) -> &Vec<Value> {
    report["findings"].as_array().unwrap()
}

/// Runs a command that ends with status 1 and has JSON to show all the same.
fn failing_json(world: &World, arguments: &str) -> Value {
    let output = world.run(&format!("{arguments} --json"));
    assert_eq!(output.status.code(), Some(1), "{arguments}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn what_follows_from_the_rest_is_shown_first_and_then_repaired() {
    let mut world = store("repair");
    let image = Image::of(&world);
    let bitmaps = image.bitmaps();
    assert!(!bitmaps.is_empty());
    image.spoil(image.older_record()); // The newest is beside it.
    image.zero(8);
    image.spoil(CATALOGUE);
    bitmaps.iter().for_each(|bitmap| image.spoil(*bitmap));
    let damaged = image.bytes();

    let report = failing_json(&world, "check store.img");
    for structure in ["superblock", "catalogue", "bitmap", "record"] {
        let found = findings(&report).iter().find(|it| it["structure"] == structure);
        let found = found.unwrap_or_else(|| panic!("no {structure} in {report}"));
        assert_eq!(found["repairable"], true, "{found}");
        assert!(found["block"].is_u64(), "{found}");
    }
    let told = world.refused("check store.img");
    assert!(told.contains("--repair"), "{told}");

    // Nobody sits at a terminal here, and nobody agreed.
    let told = world.refused("check store.img --repair");
    assert!(told.contains("nothing was written") && told.contains("--yes"), "{told}");
    let planned = failing_json(&world, "check store.img --repair");
    assert!(planned["repaired"].is_null());
    let steps = planned["steps"].as_array().unwrap();
    assert!(steps.len() >= 3 + bitmaps.len(), "{planned}");
    assert!(image.bytes() == damaged, "showing the plan has changed the store");

    let done = world.json("check store.img --repair --yes");
    assert_eq!(done["repaired"]["clean"], true, "{done}");
    assert_eq!(world.json("check store.img")["clean"], true);
    assert!(world.text("check store.img --repair").contains("nothing to repair"));
    let said = world.serve(TWO);
    assert!(said.contains("volume vm1 ") && said.contains("volume clone "), "{said}");
    assert_eq!(world.json("snapshot list vm1").as_array().unwrap().len(), 3);
    let told = world.refused("check store.img --repair --yes");
    assert!(told.contains("in use"), "{told}");
    world.end("-TERM");
    assert_eq!(world.json("check store.img")["clean"], true);
}

#[test]
fn leaks_of_a_killed_daemon_are_freed_only_when_nothing_may_need_them() {
    let mut world = World::new("leaks");
    world.serve(TWO);
    world.text("snapshot create vm1");
    world.end("-KILL");
    let planned = world.json("check store.img --repair --yes");
    assert_eq!(planned["freed_bytes"], 0, "{planned}");
    let why = planned["leaks_kept"].as_str().unwrap();
    assert!(why.contains("serve it once"), "{why}");
    world.serve(TWO);
    world.end("-TERM");
    let done = world.json("check store.img --repair --yes");
    assert!(done["freed_bytes"].as_u64().unwrap() > 0, "{done}");
    assert_eq!(done["repaired"]["data"]["leaked_bytes"], 0);
    assert_eq!(done["repaired"]["metadata"]["leaked_bytes"], 0);
    world.serve(TWO);
    world.text("snapshot create vm1");
    world.end("-TERM");
    assert_eq!(world.json("check store.img")["clean"], true);
}

/// A damaged volume that the configuration names does not keep the others from being served, and no
/// empty one is put in its place.
#[test]
fn a_damaged_volume_is_not_served_and_all_others_are() {
    // Its root; both of its records; its log.
    type Damaging = fn(&Image, &Value);
    let damages: [(&str, Damaging); 2] = [
        ("root", |image, volume| image.zero(volume["root"].as_u64().unwrap())),
        ("record", |image, _| {
            image.spoil(REGISTRY);
            image.spoil(REGISTRY + 1);
        }),
    ];
    for (what, damage) in damages {
        let mut world = store(&format!("alone-{what}"));
        let image = Image::of(&world);
        damage(&image, &serde_json::json!({ "root": image.root() }));
        let said = world.serve(TWO);
        assert!(!said.contains("volume vm1 "), "{what}: {said}");
        assert!(said.contains("volume vm2 ") && said.contains("volume clone "), "{what}: {said}");
        let log = std::fs::read_to_string(world.path("log")).unwrap();
        let told = log.lines().any(|line| line.contains("vm1") && line.contains("not served"));
        assert!(told, "{what}: {log}");
        world.text("snapshot create vm2");
        world.text("snapshot create clone");
        world.end("-TERM");
        let planned = failing_json(&world, "check store.img --repair --yes");
        assert_eq!(planned["freed_bytes"], 0, "{what}: its blocks may be wanted: {planned}");
        let left = findings(&planned["report"]).iter().filter(|it| it["repairable"] == false);
        assert!(left.count() > 0, "{what}: {planned}");
    }
}

/// What kept a volume from being opened may go while the daemon runs. Then it is served as the
/// configuration says, as if it had never been away.
#[test]
fn a_volume_that_was_mended_is_attached_where_it_was_to_be_served() {
    let mut world = store("mended");
    let image = Image::of(&world);
    let root = image.root();
    let whole = image.block(root);
    image.zero(root);
    let socket = world.path("elsewhere.sock");
    world.serve(&format!(
        "volumes:\n  - name: vm1\n    size: 1GiB\n    socket: {socket}\n    queues: 3\n    \
         cache: writethrough\n"
    ));
    assert_eq!(world.json("volume show vm1")["state"], "unavailable");
    assert!(world.refused("volume attach vm1").contains(&format!("block {root}")));
    image.0.write_all_at(&whole, root * BLOCK).unwrap();
    let attached = world.json("volume attach vm1");
    assert_eq!(attached["state"], "online", "{attached}");
    assert_eq!(attached["socket"], socket.as_str());
    assert_eq!((&attached["queues"], &attached["cache"]), (&3.into(), &"writethrough".into()));
    let detached = world.json("volume detach vm1");
    assert_eq!(detached["socket"], socket.as_str());
    assert_eq!(world.json("volume attach vm1")["socket"], socket.as_str());
    world.end("-TERM");
}
