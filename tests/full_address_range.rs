//! The largest store and the largest volume: every field is wide enough, to its last bit.

use bessel_mapping::format::{ExtentType, VOLUME_SIZE_MAX};
use bessel_mapping::request::IoKind;
use bessel_reactor::device::sim::{Keep, OpKind, Schedule};
use bessel_reactor::units::{ByteCount, SECTORS_PER_BLOCK};
use bessel_tests::world::{World, WorldConfig};

const STORE: ByteCount = ByteCount::new(64 << 50);
const EXTENT: ByteCount = ByteCount::new(256 << 30);

fn largest(seed: u64) -> World {
    World::new(WorldConfig {
        capacity: STORE,
        extent_size: EXTENT,
        schedule: Schedule::AtOnce,
        ..WorldConfig::new(seed)
    })
}

/// First, last and middle sectors of the largest volume, and both sides of every level's edges.
fn places() -> Vec<u64> {
    let sectors = VOLUME_SIZE_MAX.sectors();
    let mut places = vec![0, 1, sectors / 2 - 1, sectors / 2, sectors - 9, sectors - 1];
    for bits in [9, 18, 27] {
        let edge = (1 << bits) * SECTORS_PER_BLOCK;
        places.extend([edge - 1, edge, sectors - edge - 1, sectors - edge]);
    }
    places
}

#[test]
fn every_corner_of_256_tib_keeps_its_bytes() {
    let mut world = largest(1);
    let volume = world.create(VOLUME_SIZE_MAX).unwrap();
    for sector in places() {
        world.write(volume, sector, 1).unwrap();
    }
    world.snapshot(volume).unwrap();
    for sector in places() {
        world.write(volume, sector / 8 * 8, 8).unwrap();
        world.read(volume, sector / 8 * 8, 8).unwrap();
    }
    world.flush(volume).unwrap();
    world.crash(Keep::Nothing);
    world.recover();
    world.verify_snapshots().unwrap();
    world.io(volume, IoKind::Discard, 0, VOLUME_SIZE_MAX.sectors()).unwrap();
    world.flush(volume).unwrap();
    world.crash(Keep::Nothing);
    world.recover();
}

#[test]
fn the_last_blocks_of_64_pib_are_used_like_any_other() {
    let mut world = largest(2);
    let extents = STORE.get() / EXTENT.get();
    world.prepare_extent(extents - 1, ExtentType::Data, 100);
    world.prepare_extent(extents - 2, ExtentType::Metadata, 200);
    let volume = world.create(VOLUME_SIZE_MAX).unwrap();
    world.disk.trace();
    for sector in places() {
        world.write(volume, sector, 1).unwrap();
    }
    world.write(volume, 1 << 20, 100 * SECTORS_PER_BLOCK).unwrap();
    world.flush(volume).unwrap();
    let end = STORE.blocks_floor();
    let written = world.disk.trace().into_iter().filter(|op| op.kind == OpKind::Write);
    let last = written.map(|op| op.block.get() + op.length.blocks_ceil()).max();
    assert_eq!(last, Some(end), "the last block there is");
    world.crash(Keep::Nothing);
    world.recover();
    for sector in places() {
        world.read(volume, sector, 1).unwrap();
    }
}
