//! The end of a world, and what comes after: power cuts and orderly ends, opening the store again,
//! and looking at everything that it says and holds.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bessel_mapping::check;
use bessel_mapping::format::{ExtentMap, ExtentType};
use bessel_mapping::journal::{self, Change, Identity};
use bessel_mapping::request::{
    CacheMode, Command, IoKind, IoRequest, IoStatus, Reply, SnapshotId, VolumeId,
};
use bessel_mapping::store;
use bessel_reactor::clock::{Instant, WallTime};
use bessel_reactor::device::sim::{
    Fault, Keep, OpKind, PowerFailure, Random, Schedule, SimDisk, VolatileWrite,
};
use bessel_reactor::units::{ByteCount, SECTOR_SIZE, SECTORS_PER_BLOCK, Sector};

use super::collects::Collects;
use super::diffs::Diffs;
use super::memory::Memory;
use super::moves::Moves;
use super::observer::Progress;
use super::reclaims::Reclaims;
use super::visits::Visits;
use super::{Action, OpenVolume, Outcome, Pending, PowerCut, STEPS_MAX, World, WorldConfig, open};
use crate::model::Model;

impl World {
    /// What each extent holds, as the shards know it now.
    pub fn extents(&self) -> ExtentMap {
        self.store.extents.clone()
    }

    /// Cuts the power in one of several cruel ways, chosen by the world's dice.
    pub fn crash_somehow(&mut self) {
        let extents = self.store.extents.clone();
        let metadata = |block| extents.kind_of(block) != ExtentType::Data;
        let data = |block| extents.kind_of(block) == ExtentType::Data;
        let way = self.random.below(6);
        self.tell(format_args!("way {way} of keeping"));
        match way {
            0 => self.crash(Keep::Nothing),
            1 => self.crash(Keep::Everything),
            2 => self.crash(Keep::Where(&metadata)),
            3 => self.crash(Keep::Where(&data)),
            _ => self.crash(Keep::Random),
        }
    }

    /// What a power failure at this instant could leave, to look at before life goes on.
    pub fn power_failure(&mut self, seed: u64) -> Outage {
        self.absorb_damage();
        let mut model = self.model.clone();
        model.crash();
        Outage {
            failure: self.disk.power_failure(seed),
            withheld: self.withheld.clone(),
            extents: self.extents(),
            model,
            config: self.config,
            trace: self.trace,
            now: self.now,
            wall: self.wall,
            names: self.names,
            tickets: self.tickets,
        }
    }

    /// Cuts the power. [`World::recover`] comes next.
    pub fn crash(&mut self, keep: Keep<'_>) {
        self.tell(format_args!("power cut"));
        self.disk.crash(keep);
        self.forget();
        self.journals.clear();
        self.model.crash();
    }

    /// Cuts the power, and of all that was not durable only what bitmaps say is kept.
    pub fn crash_keeping_bitmaps(&mut self) {
        let extents = self.extents();
        let is_bitmap = |block| {
            let kind = extents.kind_of(block);
            matches!(kind, ExtentType::Data | ExtentType::Metadata) && !extents.holds(block, kind)
        };
        self.crash(Keep::Where(&is_bitmap));
    }

    /// Kills the process: what the disk has taken it keeps, and so does memory that was made to
    /// outlive it. [`World::recover`] comes next.
    pub fn kill(&mut self) {
        self.tell(format_args!("killed"));
        let doubt = self.in_doubt();
        self.disk.crash(Keep::Everything);
        self.forget();
        self.model.kill(&doubt);
        self.model.crash();
    }

    /// Who a journal of `life` belongs to.
    pub(super) fn identity(&self, life: [u8; 16]) -> Identity {
        Identity { store: [7; 16], boot: [8; 16], life }
    }

    /// From here on this life's journals count, and no other's.
    pub(super) fn begin_life(&mut self) {
        let schedule = self.config.schedule;
        self.disk.set_schedule(Schedule::AtOnce);
        let (life, time) = (self.life, self.wall());
        let begun = store::begin_life(&mut self.disk.connect(), &self.store, life, time);
        self.store.host = Some(begun.expect("the device works"));
        self.disk.set_schedule(schedule);
    }

    fn forget(&mut self) {
        for shard in self.shards.iter().filter(|_| !self.may_fail()) {
            assert_eq!(shard.double_uses(), 0, "a block was free and in use at once");
        }
        self.reclaims.clear();
        self.collects.clear();
        self.diffs.clear();
        self.shards.clear(); // Before the guest memory that their requests point to.
        self.requests.clear();
        self.waiting.clear();
        self.mail.clear();
        self.commands.clear();
        self.outcomes.clear();
        self.volumes.clear();
        self.unpublished.clear();
        self.deleting.clear();
        self.schedules.clear();
        self.detached.clear();
        self.moves.clear();
        self.visits.clear();
    }

    /// Closes the store in order, and cuts the power afterwards to see that all was durable.
    pub fn shut_down(&mut self) -> Result<(), PowerCut> {
        if self.faults.is_some() {
            self.pause_faults();
        }
        self.reclaims.clear();
        self.collects.clear();
        self.diffs.clear();
        self.settle()?;
        // The authority last: the others give their claims back to it.
        for shard in (0..self.shards.len()).rev() {
            let ticket = self.ticket();
            self.commands.insert(ticket, Pending::Shutdown);
            self.control(shard, ticket, Command::Shutdown);
            self.wait(ticket)?;
            self.run_until(|world| world.mail.values().all(VecDeque::is_empty))?;
        }
        // Stopped disks complete nothing, and closing waits for the disk.
        if self.disk.stopped() {
            return Err(PowerCut);
        }
        self.disk.stay_on();
        let time = self.wall();
        self.disk.set_schedule(Schedule::AtOnce);
        let host = self.store.host.as_ref().expect("it is open read-write");
        let closed = store::close(&mut self.disk.connect(), &self.store, host, time);
        assert!(closed.is_ok() || self.may_fail(), "closing: {closed:?}");
        let doubt = self.in_doubt();
        self.model.shut_down(&doubt);
        self.crash(Keep::Nothing);
        Ok(())
    }

    /// Opens the store after a power cut and looks at everything: the offline check, the registry,
    /// the logs, and every sector that anybody ever wrote.
    pub fn recover(&mut self) {
        self.pause_faults();
        while !self.recover_unless_killed() {}
        self.compare();
        self.resume_faults();
    }

    /// Opens the store after a power cut and looks at nothing yet. From the moment that volumes are opened
    /// on, `meddle` has the disk do something.
    pub fn reopen(&mut self, meddle: impl FnOnce(&SimDisk)) {
        self.disk.set_schedule(Schedule::AtOnce);
        self.check();
        let wall = self.wall().as_unix_nanos();
        self.store = open(&self.disk, wall);
        meddle(&self.disk);
        assert!(self.serve_unless_killed(false), "nobody kills it");
    }

    /// Compares everything there is, now that the store is open again, with the model.
    pub fn compare(&mut self) {
        for id in self.volumes() {
            // When they are there, so is all of the log that can be read.
            let snapshots = self.snapshots(id).expect("the power is back");
            let info = self.show(id).expect("the power is back");
            self.model.recover_volume(&info, &snapshots);
            self.model.set_writethrough(id, info.cache == CacheMode::Writethrough);
            self.observe(id);
        }
        self.damage_is_named();
    }

    /// Something has failed for what the shards met since the first `strikes` faults.
    pub(super) fn note_damage(&mut self, strikes: usize) {
        let met = self.disk.strikes_since(strikes).into_iter();
        let met = met.filter(|strike| self.fronts.contains(&strike.front));
        let met: Vec<_> = met.map(|s| s.block).filter(|block| !self.is_data(*block)).collect();
        self.to_be_named.extend(met);
    }

    /// Damage that something failed for, the offline check finds and names.
    fn damage_is_named(&mut self) {
        let met = std::mem::take(&mut self.to_be_named);
        if met.is_empty() {
            return;
        }
        let report = self.check();
        for block in met {
            let number = block.to_string();
            let names = |text: &str| text.split(|c: char| !c.is_ascii_digit()).any(|w| w == number);
            let named = report.findings.iter().any(|f| names(&f.what) || names(&f.place));
            assert!(named, "damage in block {block} is not named: {:#?}", report.findings);
        }
    }

    /// Opens the store and makes the changes of killed lives again. False when this life was killed
    /// at that in turn.
    fn recover_unless_killed(&mut self) -> bool {
        self.disk.set_schedule(Schedule::AtOnce);
        self.check();
        let wall = self.wall().as_unix_nanos();
        self.store = open(&self.disk, wall);
        self.serve()
    }

    /// Serves the store that was just opened. False when this life was killed at that.
    fn serve(&mut self) -> bool {
        self.serve_unless_killed(true)
    }

    fn serve_unless_killed(&mut self, may_be_killed: bool) -> bool {
        let live = self.store.directory.entries().filter(|entry| !entry.record.deleted);
        let entries: Vec<_> = live.cloned().collect();
        let listed = self.store.directory.volumes().filter(|volume| !volume.deleted);
        self.model.recover_volumes(&listed.map(|volume| volume.id).collect());
        let host = self.store.host.as_ref().expect("it is open read-write");
        let last = self.identity(host.life);
        let journals = self.journals.iter().filter_map(|memory| journal::read(&memory.segment));
        let outstanding = journal::outstanding(journals.collect(), &last);
        let earlier_lives = self.journals.len();
        self.start_shards();
        for entry in entries {
            if self.withheld.contains(&entry.record.id) {
                continue;
            }
            let (ticket, volume) = (self.ticket(), entry.record.id);
            let shard = volume.0 as usize % self.shards.len();
            let size = entry.record.size;
            self.commands.insert(ticket, Pending::Open { volume, shard, size });
            self.control(shard, ticket, Command::Open(Box::new(entry)));
        }
        self.settle().expect("the power is back");
        if !self.restore(outstanding) {
            return false;
        }
        self.begin_life();
        if may_be_killed && self.random.chance(1, 8) {
            // Killed before it could remove what counts no more.
            self.tell(format_args!("killed again, when all was made"));
            self.disk.crash(Keep::Everything);
            self.forget();
            return false;
        }
        if self.random.chance(3, 4) {
            self.journals.drain(..earlier_lives); // Else they could not be removed.
        }
        true
    }

    /// Makes the changes of killed lives again; some of these lives are killed at it in turn.
    fn restore(&mut self, outstanding: BTreeMap<VolumeId, Vec<Change>>) -> bool {
        for (id, changes) in outstanding {
            let Some(open) = self.volumes.get(&id) else { continue };
            let (shard, volume) = (open.shard, open.handle);
            let ticket = self.ticket();
            self.tell(format_args!("{ticket}: {} changes of {id} again", changes.len()));
            self.commands.insert(ticket, Pending::Restore);
            self.control(shard, ticket, Command::Restore { volume, changes });
            if self.random.chance(1, 8) {
                for _ in 0..self.random.below(60) {
                    self.step();
                }
                self.tell(format_args!("killed again"));
                self.disk.crash(Keep::Everything);
                self.forget();
                return false;
            }
            match self.wait(ticket).expect("the power is back") {
                Outcome::Reply(Reply::Done) => {}
                // It was looked at when it came.
                Outcome::Reply(Reply::Failed(_)) if self.metadata_is_damaged() => {
                    self.volumes.remove(&id);
                    self.withheld.insert(id);
                }
                ended => panic!("restoring {id} ended as {ended:?}"),
            }
        }
        true
    }

    /// Runs the offline check on the disk as it is.
    ///
    /// # Panics
    /// When it finds anything corrupt, and the disk has damaged nothing.
    pub fn check(&self) -> check::CheckReport {
        check_disk(&self.disk, self.metadata_is_damaged())
    }

    /// Reads every sector of the volume that was ever written, and some that never were.
    pub(super) fn observe(&mut self, id: VolumeId) {
        let sectors = self.size(id).sectors();
        let mut wanted: BTreeSet<u64> = self.model.touched(id);
        for near in [0, sectors / 2, sectors - 1, self.random.below(sectors)] {
            wanted.insert(near);
        }
        wanted.retain(|sector| *sector < sectors);
        let mut run: Option<(u64, u64)> = None;
        for sector in wanted.into_iter().chain([u64::MAX]) {
            run = match run {
                Some((first, count)) if first + count == sector && count < 512 => {
                    Some((first, count + 1))
                }
                Some((first, count)) => {
                    self.observe_run(id, first, count);
                    Some((sector, 1))
                }
                None => Some((sector, 1)),
            };
        }
    }

    /// A read that the model does not see as a request: nothing else goes on.
    fn observe_run(&mut self, id: VolumeId, sector: u64, sectors: u64) {
        let mut memory = Memory::new((sectors * SECTOR_SIZE) as usize, &mut self.random);
        memory.spoil();
        let OpenVolume { shard, handle: volume, .. } = self.volumes[&id];
        let request = IoRequest {
            tag: u64::MAX,
            volume,
            kind: IoKind::Read,
            sector: Sector::new(sector),
            sectors,
            segments: &memory.segments,
        };
        self.shards[shard].submit(&request).expect("the shard has nothing else to do");
        let strikes = self.disk.strikes();
        let mut steps = 0;
        let done = loop {
            self.shards[shard].poll(self.now);
            if let Some(done) = self.shards[shard].pop_completion() {
                break done;
            }
            steps += 1;
            assert!(steps < STEPS_MAX, "a read of {sector}+{sectors} never ended");
        };
        self.absorb_damage();
        assert_eq!(done.tag, u64::MAX);
        if done.status == IoStatus::Failed && self.is_to_blame(shard, strikes, IoKind::Read) {
            self.note_damage(strikes);
            return; // Another one may be below another node.
        }
        assert_eq!(done.status, IoStatus::Done, "{sector}+{sectors}");
        self.model.observe(id, sector, memory.bytes());
    }

    /// Reads every sector of every volume that was ever written, as guests do.
    pub fn read_everything(&mut self) -> Result<(), PowerCut> {
        for id in self.volumes() {
            let end = self.size(id).sectors();
            let touched = self.model.touched(id).into_iter().filter(|sector| *sector < end);
            let blocks: BTreeSet<u64> = touched.map(|s| s / SECTORS_PER_BLOCK).collect();
            for block in blocks {
                let first = block * SECTORS_PER_BLOCK;
                let sectors = SECTORS_PER_BLOCK.min(end - first);
                let status = self.read(id, first, sectors)?;
                assert_eq!(status, IoStatus::Done, "reading {first}+{sectors} of volume {id}");
            }
        }
        Ok(())
    }

    /// Clones every snapshot and reads the clones: snapshots never change. Returns how many.
    pub fn verify_snapshots(&mut self) -> Result<u64, PowerCut> {
        self.pause_faults();
        self.settle()?;
        let mut verified = 0;
        for id in self.volumes() {
            for sequence in self.model.snapshots(id) {
                let name = self.fresh_name();
                let snapshot = SnapshotId { volume: id, sequence };
                if let Some(clone) = self.clone_of(snapshot, &name)? {
                    self.settle()?;
                    self.observe(clone);
                    self.damage_is_named(); // Later it may be reached no more.
                    self.perform(Action::Delete { volume: clone })?;
                    verified += 1;
                }
            }
        }
        self.resume_faults();
        Ok(verified)
    }
}

/// `excused` when the disk has damaged metadata.
fn check_disk(disk: &SimDisk, excused: bool) -> check::CheckReport {
    let report = check::check(&mut disk.connect(), &mut |_, _| {});
    let report = report.expect("the store opens");
    let corrupt = report.findings.iter().filter(|f| f.severity == check::Severity::Corrupt);
    let corrupt: Vec<_> = corrupt.collect();
    assert!(corrupt.is_empty() || excused, "check found: {corrupt:#?}");
    report
}

/// A power failure at one instant of a world: any number of recoveries from it, each of them in a
/// world of its own, while the one it was taken from goes on.
pub struct Outage {
    failure: PowerFailure,
    withheld: BTreeSet<VolumeId>,
    extents: ExtentMap,
    model: Model,
    config: WorldConfig,
    trace: bool,
    now: Instant,
    wall: u64,
    names: u64,
    tickets: u64,
}

impl Outage {
    /// The writes that a power cut decides on, oldest first.
    pub fn writes(&self) -> Vec<VolatileWrite> {
        self.failure.writes()
    }

    /// True for what is no guest's data.
    pub fn is_metadata(&self, write: &VolatileWrite) -> bool {
        self.extents.kind_of(write.block) != ExtentType::Data
    }

    /// Brings the power back with `keep` kept: opens the store, checks it, and compares all of it.
    ///
    /// # Panics
    /// When anything promised is not there, or anything is there that must not be.
    pub fn recover(&self, seed: u64, keep: Keep<'_>) -> World {
        let disk = self.failure.disk(seed, keep);
        disk.set_schedule(Schedule::AtOnce);
        let mut random = Random::new(seed);
        if random.chance(1, 16) {
            self.cut_again(&disk, &mut random);
        }
        let mut damaged = disk.damaged_blocks().into_iter();
        let excused = damaged.any(|block| !self.extents.holds(block, ExtentType::Data));
        check_disk(&disk, excused);
        let mut world = World {
            store: open(&disk, self.wall + 1),
            disk,
            model: self.model.clone(),
            config: self.config_of(seed, &mut random),
            random,
            page_dice: Random::new(seed ^ 0xb00c),
            trace: self.trace,
            shards: Vec::new(),
            fronts: Vec::new(),
            faults: None,
            life_strikes: 0,
            withheld: self.withheld.clone(),
            to_be_named: BTreeSet::new(),
            mail: BTreeMap::new(),
            now: self.now,
            wall: self.wall + 1,
            names: self.names,
            tickets: self.tickets,
            schedules: BTreeMap::new(),
            volumes: BTreeMap::new(),
            unpublished: BTreeSet::new(),
            imports: 0,
            deleting: BTreeMap::new(),
            detached: BTreeMap::new(),
            moves: Moves::new(seed),
            awake: Vec::new(),
            visits: Visits::new(seed),
            requests: BTreeMap::new(),
            waiting: VecDeque::new(),
            commands: BTreeMap::new(),
            outcomes: BTreeMap::new(),
            journals: Vec::new(),
            life: [0; 16],
            observer: None,
            progress: Progress::default(),
            reclaims: Reclaims::new(seed),
            collects: Collects::new(seed),
            diffs: Diffs::new(seed),
        };
        // Killed when all was made: again.
        if world.serve() {
            world.compare();
        } else {
            world.recover();
        }
        world
    }

    /// Most recoveries are made with as little as there can be: what a shard is made of takes longer
    /// to make than all the rest of a recovery.
    fn config_of(&self, seed: u64, random: &mut Random) -> WorldConfig {
        if random.chance(1, 16) {
            return WorldConfig { seed, ..self.config };
        }
        let node_cache = ByteCount::new(0);
        WorldConfig { seed, shards: 1, node_cache, requests: 4, journal_entries: 50, ..self.config }
    }

    /// Cuts the power once more, in the middle of opening the store.
    fn cut_again(&self, disk: &SimDisk, random: &mut Random) {
        disk.inject(Fault { kind: Some(OpKind::Write), after: random.below(4), lasting: true });
        let mode = store::OpenMode::ReadWrite { time: WallTime::from_unix_nanos(self.wall + 1) };
        // It may have come to its end, or not: no promise hangs on it.
        let _ = store::open(&mut disk.connect(), mode);
        disk.crash(Keep::Random);
    }
}
