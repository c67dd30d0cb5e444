//! A world whose disk goes wrong by itself, and what may follow from that and what may not.
//!
//! A fault that the disk tells of may fail what met it, and nothing else: a request fails only when
//! its reactor felt a fault while it was under way, or when its volume is latched; and a volume is
//! latched only after a failed write of its metadata, or a failed flush. Everything else must go
//! on, and everything that was acknowledged must stand.
//!
//! Of silent faults, damage to a node, a log or a bitmap must be found when it is looked at, and
//! then counts as a fault that the disk tells of. Guest data carries no checksum: a sector of it
//! that the disk has changed may read as the disk has it, and only as that. Where the design cannot
//! find damage to metadata, because what is there is well formed (a write in place that was lost), a
//! world must not be given such faults: what holds then is tested case by case.

use std::collections::BTreeSet;

use bessel_mapping::format::ExtentType;
use bessel_mapping::request::{IoKind, IoStatus, VolumeId};
use bessel_reactor::device::sim::{FaultRates, Harm, OpKind, Random, Strike};
use bessel_reactor::units::BlockAddr;

use super::{OpenVolume, World};

/// How often which part of the store goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Faults {
    /// Blocks of guest data.
    pub data: FaultRates,
    /// Radix nodes and snapshot logs.
    pub tree: FaultRates,
    /// The system extent and the bitmaps; and flushes.
    pub rest: FaultRates,
}

impl Faults {
    /// The same for every part.
    pub fn everywhere(rates: FaultRates) -> Self {
        Self { data: rates, tree: rates, rest: rates }
    }

    /// Some faults, seldom or often, as the dice say; all that the oracle can judge in any run.
    pub fn of_seed(random: &mut Random) -> Self {
        let mut rate = |often: u64| match random.chance(often, 10) {
            true => *random.pick(&[500, 3_000, 20_000]),
            false => 0,
        };
        let told = FaultRates {
            read_error: rate(4),
            write_error: rate(3),
            flush_error: rate(2),
            lasting: 300_000,
            short: rate(3),
            late: rate(4),
            ..FaultRates::NONE
        };
        let silent = FaultRates {
            lost_write: rate(3),
            misdirected_write: rate(3),
            stray_target: true,
            flip_at_rest: rate(3),
            flip_on_read: rate(3),
            ..told
        };
        Self { data: silent, ..Self::everywhere(told) }
    }
}

impl World {
    /// From here on the disk goes wrong as `faults` say, but for times when the store is opened or
    /// looked at; or is sound again. What it was told to do before by other means it does no more.
    pub fn set_faults(&mut self, faults: Option<Faults>) {
        self.faults = faults;
        self.resume_faults();
    }

    /// The disk is sound until [`World::resume_faults`].
    pub(super) fn pause_faults(&mut self) {
        self.disk.heal();
    }

    pub(super) fn resume_faults(&mut self) {
        self.disk.heal();
        let Some(faults) = self.faults else { return };
        let extents = self.extents();
        self.disk.set_rates(move |kind, block| match extents.kind_of(block) {
            _ if kind == OpKind::Flush => faults.rest,
            ExtentType::Data if extents.holds(block, ExtentType::Data) => faults.data,
            ExtentType::Metadata if extents.holds(block, ExtentType::Metadata) => faults.tree,
            _ => faults.rest,
        });
    }

    /// True when requests and commands may fail.
    pub(super) fn may_fail(&self) -> bool {
        self.config.may_fail || self.config.faults.is_some() || self.faults.is_some()
    }

    pub(super) fn is_data(&self, block: BlockAddr) -> bool {
        self.store.extents.holds(block, ExtentType::Data)
    }

    /// What went wrong since the first `count` times and was told to, or must have been noticed by,
    /// a shard.
    fn felt_since(&self, count: usize) -> impl Iterator<Item = Strike> {
        let told = |strike: &Strike| strike.harm == Harm::Failed || !self.is_data(strike.block);
        let felt: Vec<_> = self.disk.strikes_since(count).into_iter().filter(told).collect();
        felt.into_iter()
    }

    /// Whether the disk is to blame when this shard fails something that began after the first
    /// `count` faults.
    pub(super) fn is_to_blame(&self, shard: usize, count: usize, kind: IoKind) -> bool {
        let front = self.fronts[shard];
        self.felt_since(count).any(|strike| match strike.kind {
            OpKind::Flush => kind != IoKind::Read, // It is everybody's.
            OpKind::Write => kind != IoKind::Read && strike.front == front,
            OpKind::Read => strike.front == front,
        })
    }

    /// Whether blocks may be lacking because the authority met faults in this life.
    pub(super) fn claims_may_fail(&self) -> bool {
        self.is_to_blame(0, self.life_strikes, IoKind::Write)
    }

    /// Whether the volume is latched, which only a fault of this life can have done.
    pub(super) fn is_latched(&self, id: VolumeId) -> bool {
        let Some(OpenVolume { shard, handle, .. }) = self.volumes.get(&id) else { return false };
        let latched = self.shards[*shard].is_latched(*handle);
        if latched {
            let mut felt = self.felt_since(self.life_strikes);
            let cause = felt.find(|strike| match strike.kind {
                OpKind::Flush => true,
                OpKind::Write => strike.front == self.fronts[*shard] && !self.is_data(strike.block),
                OpKind::Read => false,
            });
            assert!(cause.is_some(), "volume {id} is latched, and nothing has failed for it");
        }
        latched
    }

    /// Volumes that are latched now.
    pub fn latched(&self) -> BTreeSet<VolumeId> {
        self.volumes.keys().copied().filter(|id| self.is_latched(*id)).collect()
    }

    /// Volumes of which only what is on the device counts: those that are latched, or were when
    /// something that was to end them failed.
    pub(super) fn in_doubt(&self) -> BTreeSet<VolumeId> {
        let mut doubt = self.latched();
        if self.may_fail() {
            let all = self.model.volumes();
            doubt.extend(all.into_iter().filter(|id| !self.volumes.contains_key(id)));
        }
        doubt
    }

    /// Lets the model know what guest data the disk has changed silently.
    pub(super) fn absorb_damage(&mut self) {
        for damage in self.disk.take_damage() {
            if !self.is_data(damage.block) {
                continue;
            }
            let places: Vec<usize> = damage.found.iter().map(|(place, _)| *place).collect();
            self.tell(format_args!("sectors {places:?} of data block {} change", damage.block));
            for (place, bytes) in &damage.found {
                self.model.excuse(*place as u64, bytes);
            }
        }
    }

    /// True when metadata on the disk is not what was written there.
    pub(super) fn metadata_is_damaged(&self) -> bool {
        self.disk.damaged_blocks().iter().any(|block| !self.is_data(*block))
    }

    /// With the disk sound again: everything ends, and every volume that is not latched serves.
    /// Those that are latched are no more than metadata writes have failed, if every flush has
    /// succeeded; they refuse to promise anything, and go on reading.
    pub fn probe(&mut self) {
        self.pause_faults();
        self.settle().expect("the power is on");
        let latched = self.latched();
        let struck: Vec<Strike> = self.felt_since(self.life_strikes).collect();
        if struck.iter().all(|strike| strike.kind != OpKind::Flush) {
            let metadata =
                |strike: &&Strike| strike.kind == OpKind::Write && !self.is_data(strike.block);
            let causes = struck.iter().filter(metadata).count();
            assert!(latched.len() <= causes, "{latched:?} are latched by {causes} failed writes");
        }
        for id in self.volumes() {
            let sectors = self.size(id).sectors();
            let at = self.random.below(sectors);
            let before = self.disk.strikes();
            let [wrote, flushed, read] = [IoKind::Write, IoKind::Flush, IoKind::Read].map(|kind| {
                let (sector, count) = if kind == IoKind::Flush { (0, 0) } else { (at, 1) };
                self.io(id, kind, sector, count).expect("the power is on")
            });
            let met_damage = self.felt_since(before).next().is_some();
            // A reactor may hear only now of a flush that failed on another.
            let latched = self.latched();
            match wrote {
                IoStatus::Failed => assert!(latched.contains(&id) || met_damage, "{id} at {at}"),
                IoStatus::NoSpace => assert!(self.config.may_fill || self.claims_may_fail()),
                status => assert_eq!(status, IoStatus::Done),
            }
            let expected = if latched.contains(&id) { IoStatus::Failed } else { IoStatus::Done };
            assert_eq!(flushed, expected, "the flush of {id}");
            assert!(read == IoStatus::Done || met_damage, "{id} reads at {at}: {read:?}");
        }
    }
}
