//! Seeded work for a [`World`]: what guests and operators do, mostly in the places where it hurts.
//!
//! Sectors are drawn from a few hot regions (the start, the edges of leaves and of the nodes above
//! them, the end), because two requests that never meet test nothing.

use bessel_mapping::request::{CacheMode, IoKind, SnapshotId, VolumeId};
use bessel_reactor::units::{ByteCount, SECTORS_PER_BLOCK};

use crate::world::{Action, PowerCut, World};

/// Sectors that one leaf maps.
const LEAF_SECTORS: u64 = 512 * SECTORS_PER_BLOCK;
/// Sectors that one node of the second level maps.
const MIDDLE_SECTORS: u64 = 512 * LEAF_SECTORS;
/// Sectors in a hot region: small enough that requests collide.
const REGION_SECTORS: u64 = 24 * SECTORS_PER_BLOCK;

/// What to do how often. Weights are relative.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Most guest requests in flight at once.
    pub concurrency: usize,
    /// Most volumes at once.
    pub volumes: usize,
    /// Largest request in sectors.
    pub sectors_max: u64,
    /// Of a thousand steps, how many ask the control path for something.
    pub commands: u64,
}

impl Default for Workload {
    fn default() -> Self {
        Self { concurrency: 12, volumes: 5, sectors_max: 160, commands: 60 }
    }
}

impl Workload {
    /// Starts one thing, or lets the world go on a little. Stops early when the power goes.
    pub fn step(&self, world: &mut World) {
        if world.volumes().is_empty() {
            if world.disk.is_failing() || !world.may_create() {
                return; // It would be refused again and again.
            }
            let size = ByteCount::new(8 << 20);
            let name = world.fresh_name();
            world.start(Action::Create { name, size });
            let _ = world.settle();
            return;
        }
        world.run_schedules();
        world.collect_sometimes(1, 60);
        world.visit_sometimes();
        if world.move_sometimes(1, 40).is_err() || world.volumes().is_empty() {
            return;
        }
        let volumes = world.volumes();
        let volume = *world.random.pick(&volumes);
        if world.diff_sometimes(volume, 1, 40).is_err() {
            return;
        }
        if world.random.chance(1, 12) && self.import(world).is_err() {
            return;
        }
        if world.random.below(1000) < self.commands {
            self.command(world);
        } else if world.requests_in_flight() < self.concurrency {
            self.request(world);
        }
        for _ in 0..world.random.below(6) {
            world.step();
        }
    }

    fn request(&self, world: &mut World) {
        let volumes = world.volumes();
        let volume = *world.random.pick(&volumes);
        let sectors = world.size(volume).sectors();
        if world.has_visits() && world.random.chance(1, 2) {
            // Often the same few blocks: what visitors do by themselves has been there before.
            let kind = *world.random.pick(&[IoKind::Write, IoKind::Read]);
            let block = world.random.below(12);
            let count = 1 + world.random.below(3);
            world.start_io(volume, kind, block * SECTORS_PER_BLOCK, count * SECTORS_PER_BLOCK);
            return;
        }
        let kind = match world.random.below(100) {
            0..55 => IoKind::Write,
            55..80 => IoKind::Read,
            80..87 => IoKind::Flush,
            87..93 => IoKind::WriteZeroes,
            _ => IoKind::Discard,
        };
        if kind == IoKind::Flush {
            world.start_io(volume, kind, 0, 0);
            return;
        }
        let unmaps = matches!(kind, IoKind::WriteZeroes | IoKind::Discard);
        let (first, count) = match unmaps && world.random.chance(1, 6) {
            true => Self::leaves(world, sectors),
            false => self.range(world, sectors),
        };
        world.start_io(volume, kind, first, count);
    }

    /// One or more whole leaves, which unmapping may take out of the tree at once, or all there is.
    fn leaves(world: &mut World, sectors: u64) -> (u64, u64) {
        let start = *world.random.pick(&[0, LEAF_SECTORS, MIDDLE_SECTORS]);
        let start = if start < sectors { start } else { 0 };
        let leaves = *world.random.pick(&[1, 2, sectors / LEAF_SECTORS + 1]);
        (start, (leaves * LEAF_SECTORS).min(sectors - start))
    }

    /// Where a request goes in a volume of `sectors`.
    fn range(&self, world: &mut World, sectors: u64) -> (u64, u64) {
        let random = &mut world.random;
        let half = REGION_SECTORS / 2;
        let regions = [0, LEAF_SECTORS - half, MIDDLE_SECTORS - half, sectors - REGION_SECTORS];
        let start = *random.pick(&regions);
        let start = if start + REGION_SECTORS > sectors { 0 } else { start };
        let within = random.below(REGION_SECTORS);
        let length = match random.below(10) {
            0..3 => SECTORS_PER_BLOCK,
            3..6 => 1 + random.below(2 * SECTORS_PER_BLOCK),
            6..9 => SECTORS_PER_BLOCK * (1 + random.below(8)),
            _ => 1 + random.below(self.sectors_max),
        };
        let aligned = random.chance(1, 2);
        let first = start + if aligned { within / 8 * 8 } else { within };
        (first, length.min(sectors - first))
    }

    /// Goes on with the volume that is being imported, begins one, or does neither.
    fn import(&self, world: &mut World) -> Result<(), PowerCut> {
        let Some(volume) = world.unpublished().first().copied() else {
            let few = world.volumes().len() < self.volumes;
            if few && world.may_create() && world.random.chance(1, 8) {
                let size = ByteCount::new(*world.random.pick(&[1 << 20, (2 << 30) + 512]));
                let name = world.fresh_name();
                world.ask(Action::CreateUnpublished { name, size })?;
            }
            return Ok(());
        };
        if world.random.chance(1, 6) {
            // Whoever imports has waited for what was written.
            world.settle()?;
            world.ask(Action::Publish { volume })?;
            return Ok(());
        }
        let sectors = world.size(volume).sectors();
        let (first, count) = self.range(world, sectors);
        world.start_io(volume, IoKind::Write, first, count);
        Ok(())
    }

    fn command(&self, world: &mut World) {
        let volumes = world.volumes();
        let volume = *world.random.pick(&volumes);
        match world.random.below(100) {
            0..45 => {
                let label = world.random.chance(1, 3).then(|| world.fresh_name());
                world.start(Action::Snapshot { volume, label });
            }
            45..53 => self.on_snapshot(world, volume, |world, snapshot| {
                let label = world.random.chance(2, 3).then(|| world.fresh_name());
                world.start(Action::Label { snapshot, label });
            }),
            53..61 => self.on_snapshot(world, volume, |world, snapshot| {
                if volumes.len() < self.volumes {
                    let name = world.fresh_name();
                    let _ = world.clone_of(snapshot, &name);
                }
            }),
            61..69 => self.on_snapshot(world, volume, |world, snapshot| {
                if world.settle().is_ok() {
                    world.start(Action::Rollback { snapshot });
                    let _ = world.settle();
                }
            }),
            69..80 => self.on_snapshot(world, volume, |world, snapshot| {
                world.start(Action::DeleteSnapshot { snapshot });
            }),
            80..85 if volumes.len() > 1 => {
                if world.settle().is_ok() {
                    world.start(Action::Delete { volume });
                    let _ = world.settle();
                }
            }
            85..90 if volumes.len() < self.volumes && world.may_create() => {
                let size = *world.random.pick(&[1 << 20, 5 << 20, (2 << 30) + 512, 600 << 30]);
                let (name, size) = (world.fresh_name(), ByteCount::new(size));
                world.start(Action::Create { name, size });
            }
            90..93 => {
                let size = ByteCount::new(world.size(volume).get() + (1 << 20));
                world.start(Action::Grow { volume, size });
            }
            93 => world.change_schedule(volume),
            94 => {
                let name = world.fresh_name();
                world.start(Action::Rename { volume, name });
            }
            _ => {
                let modes = [CacheMode::Writeback, CacheMode::Writethrough];
                let cache = *world.random.pick(&modes);
                world.start(Action::SetCache { volume, cache });
            }
        }
    }

    /// Does something with one of the volume's snapshots, if it has any.
    fn on_snapshot(
        &self,
        world: &mut World,
        volume: VolumeId,
        act: impl FnOnce(&mut World, SnapshotId),
    ) {
        let sequences = world.model.snapshots(volume);
        if !sequences.is_empty() {
            let sequence = *world.random.pick(&sequences);
            act(world, SnapshotId { volume, sequence });
        }
    }
}
