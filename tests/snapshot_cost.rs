//! A snapshot is three block writes, whatever the volume's size, contents and history.

use bessel_mapping::request::VolumeId;
use bessel_reactor::device::sim::{OpKind, Schedule, Traced};
use bessel_reactor::units::{BLOCK_SIZE, ByteCount};
use bessel_tests::world::{World, WorldConfig};

/// What a snapshot writes, but for claims of blocks: they are made for many requests at once.
fn snapshot_writes(world: &mut World, volume: VolumeId) -> Vec<Traced> {
    world.idle().expect("the power is on");
    world.disk.trace();
    world.snapshot(volume).expect("the power is on");
    let operations = world.disk.trace().into_iter();
    let writes = operations.filter(|op| op.kind == OpKind::Write && !world.is_allocation(op.block));
    writes.collect()
}

#[test]
fn a_snapshot_is_three_block_writes() {
    for size in [1 << 20, 4 << 30, 600 << 30, 256 << 40] {
        let config = WorldConfig { schedule: Schedule::AtOnce, ..WorldConfig::new(size) };
        let mut world = World::new(config);
        let volume = world.create(ByteCount::new(size)).unwrap();
        for count in 0..60 {
            world.write(volume, count * 8, 8 + count).unwrap();
            world.flush(volume).unwrap();
            let writes = snapshot_writes(&mut world, volume);
            assert_eq!(writes.len(), 3, "snapshot {count} of {size} bytes: {writes:?}");
            assert!(writes.iter().all(|write| write.length.get() <= BLOCK_SIZE));
        }
    }
}
