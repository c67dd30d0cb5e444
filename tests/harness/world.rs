//! The simulated target: shards over one simulated disk, in virtual time, watched by the oracle.
//!
//! It does what the daemon does (format, open, submit, poll, pass messages on, close), one seeded
//! step at a time, and what no daemon wants: cut the power, reopen, and look at everything.
//! Tests speak to it in the words of guests and operators; each word goes to the model as well.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use bessel_mapping::format::{
    Bitmap, CATALOGUE_ENTRIES_PER_BLOCK, ExtentType, encode_catalogue_block,
};
use bessel_mapping::journal::Journal;
use bessel_mapping::message::Message;
use bessel_mapping::request::{
    Busy, CacheChooser, CacheMode, CloneOrigin, Command, CommandError, CreatePlan, IoKind,
    IoRequest, IoStatus, Reply, SnapshotId, SnapshotInfo, VolumeHandle, VolumeId, VolumeInfo,
    Which,
};
use bessel_mapping::shard::{Shard, ShardConfig};
use bessel_mapping::store;
use bessel_reactor::clock::{Instant, WallTime};
use bessel_reactor::device::sim::{Keep, Random, Schedule, SimConfig, SimDevice, SimDisk};
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr, ByteCount, SECTOR_SIZE, Sector};

use crate::model::Model;

mod attachment;
mod collects;
mod diffs;
mod faulty;
mod memory;
mod moves;
mod observer;
mod reclaims;
mod recovery;
mod schedules;
mod visits;

pub use faulty::Faults;
use memory::{JournalMemory, Memory};
pub use recovery::Outage;

/// Steps without an end after which the world is called stuck. The slowest operation of the disk
/// takes 200 reaps, a chain of a dozen of them 2,400; requests queue behind one another.
const STEPS_MAX: u64 = 200_000;

/// What a world is made of.
#[derive(Clone, Copy, Debug)]
pub struct WorldConfig {
    /// Decides everything that is left open.
    pub seed: u64,
    /// Shards over the one disk.
    pub shards: usize,
    /// Size of the disk.
    pub capacity: ByteCount,
    /// Size of an extent.
    pub extent_size: ByteCount,
    /// Whether the disk has a volatile cache.
    pub volatile_cache: bool,
    /// In which order the disk completes.
    pub schedule: Schedule,
    /// Bound of each shard's node cache.
    pub node_cache: ByteCount,
    /// Request contexts of each shard.
    pub requests: usize,
    /// Alignment of device I/O.
    pub offset_alignment: u32,
    /// Requests may end with `NoSpace`.
    pub may_fill: bool,
    /// The device fails: requests may end with `Failed`, commands with an error.
    pub may_fail: bool,
    /// How the disk goes wrong by itself, from the start; then anything may fail that meets it.
    pub faults: Option<Faults>,
    /// Entries in each shard's journal.
    pub journal_entries: usize,
    /// Requests come in on other shards too than their volumes' homes.
    pub visits: bool,
    /// Leaves that each shard shows to others.
    pub shared_leaves: usize,
    /// What a shard does for a volume in a turn.
    pub steps_per_turn: u32,
}

impl WorldConfig {
    /// A small store with a volatile cache and one shard.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            shards: 1,
            capacity: ByteCount::new(32 << 20),
            extent_size: ByteCount::new(1 << 20), // The smallest: the registry is read often.
            volatile_cache: true,
            schedule: Schedule::Random,
            node_cache: ByteCount::new(1 << 20),
            requests: 64,
            offset_alignment: 512,
            may_fill: false,
            may_fail: false,
            faults: None,
            journal_entries: 1000,
            visits: false,
            shared_leaves: 16,
            steps_per_turn: ShardConfig::STEPS_PER_TURN,
        }
    }
}

/// The power went before the answer came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PowerCut;

/// What operators ask for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Make a blank volume.
    Create {
        /// Its name.
        name: String,
        /// Its size.
        size: ByteCount,
    },
    /// Take a snapshot.
    Snapshot {
        /// Of which volume.
        volume: VolumeId,
        /// With which label.
        label: Option<String>,
    },
    /// Set or clear a label.
    Label {
        /// Of which snapshot.
        snapshot: SnapshotId,
        /// The label.
        label: Option<String>,
    },
    /// Mark a snapshot deleted.
    DeleteSnapshot {
        /// Which.
        snapshot: SnapshotId,
    },
    /// Mark those of these snapshots deleted that have no label by then.
    DeleteSnapshots {
        /// Of which volume.
        volume: VolumeId,
        /// Positions in its log.
        sequences: Vec<u64>,
    },
    /// Make the volume read as the snapshot does. Nothing of it may be in flight.
    Rollback {
        /// Which snapshot.
        snapshot: SnapshotId,
    },
    /// Make a volume that the device knows nothing of until it is published.
    CreateUnpublished {
        /// Its name.
        name: String,
        /// Its size.
        size: ByteCount,
    },
    /// Make it one as any other. Nothing of it may be in flight.
    Publish {
        /// Which volume.
        volume: VolumeId,
    },
    /// Make the volume larger.
    Grow {
        /// Which volume.
        volume: VolumeId,
        /// The new size.
        size: ByteCount,
    },
    /// Give the volume another name.
    Rename {
        /// Which volume.
        volume: VolumeId,
        /// The new name.
        name: String,
    },
    /// Delete the volume. Nothing of it may be in flight.
    Delete {
        /// Which volume.
        volume: VolumeId,
    },
    /// Switch the cache mode.
    SetCache {
        /// Of which volume.
        volume: VolumeId,
        /// The new mode.
        cache: CacheMode,
    },
}

/// Names something that was started.
pub type Ticket = u64;

#[derive(Clone, Copy, Debug)]
struct OpenVolume {
    shard: usize,
    handle: VolumeHandle,
    size: ByteCount,
}

struct Request {
    op: u64,
    home: usize,
    /// Where it comes in, and what its volume is called there.
    entrance: (usize, VolumeHandle),
    /// Faults of the disk before it.
    strikes: usize,
    volume: VolumeId,
    kind: IoKind,
    sector: u64,
    sectors: u64,
    memory: Option<Memory>,
}

#[derive(Clone, Debug)]
enum Pending {
    Restore,
    Open {
        volume: VolumeId,
        shard: usize,
        size: ByteCount,
    },
    Show,
    Create {
        plan: CreatePlan,
        shard: usize,
        published: bool,
    },
    Act {
        action: Action,
        time: u64,
    },
    Close,
    HandOver {
        volume: VolumeId,
        target: usize,
    },
    Share {
        volume: VolumeId,
        visitor: usize,
    },
    Visit {
        volume: VolumeId,
        shard: usize,
        open: OpenVolume,
    },
    TakeOver {
        volume: VolumeId,
        target: usize,
        /// It has not been refused elsewhere.
        first: bool,
    },
    OfDevice,
    Shutdown,
    /// Of who frees what deleted snapshots held.
    Reclaim,
    /// Of the collector.
    Collect,
}

/// How something that was started ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// A guest request.
    Io(IoStatus),
    /// A command.
    Reply(Reply),
}

/// See the module's documentation.
pub struct World {
    /// The disk, to cut, stop, count and damage.
    pub disk: SimDisk,
    /// The oracle.
    pub model: Model,
    /// The world's own dice.
    pub random: Random,
    /// How many snapshots are asked for at once. Not the world's, which go as they always went.
    page_dice: Random,
    config: WorldConfig,
    /// Tell on standard error what happens, for replays: set `TRACE=1`.
    trace: bool,
    store: store::OpenedStore,
    shards: Vec<Shard<SimDevice>>,
    /// Which front-end of the disk each shard has.
    fronts: Vec<u64>,
    /// How the disk goes wrong.
    faults: Option<Faults>,
    /// Faults of the disk before this life.
    life_strikes: usize,
    /// Volumes whose changes could not be made again after a kill, for damage: the daemon withholds
    /// them and keeps the changes; we do not look at them any more.
    withheld: BTreeSet<VolumeId>,
    /// Damaged blocks that something failed for: the offline check must name them.
    to_be_named: BTreeSet<BlockAddr>,
    /// Messages under way, by sender and receiver.
    mail: BTreeMap<(usize, usize), VecDeque<Message>>,
    now: Instant,
    /// Wall-clock time; also what tells snapshots apart.
    wall: u64,
    names: u64,
    tickets: u64,
    volumes: BTreeMap<VolumeId, OpenVolume>,
    /// Those of them that the device has no record of yet.
    unpublished: BTreeSet<VolumeId>,
    /// Volumes that were published.
    imports: u64,
    /// Volumes that are being deleted. When that fails they stay.
    deleting: BTreeMap<VolumeId, OpenVolume>,
    schedules: BTreeMap<VolumeId, schedules::Running>,
    /// Volumes that were detached, with the shard that had them.
    detached: BTreeMap<VolumeId, usize>,
    moves: moves::Moves,
    /// Shards that had something to do when they were polled last, or have got something since.
    awake: Vec<bool>,
    visits: visits::Visits,
    requests: BTreeMap<Ticket, Request>,
    /// Requests that a full shard has refused for now.
    waiting: VecDeque<Ticket>,
    commands: BTreeMap<Ticket, Pending>,
    outcomes: BTreeMap<Ticket, Outcome>,
    /// Memory that outlives a killed process: this life's journals, and those of lives whose changes
    /// are not made again yet.
    journals: Vec<JournalMemory>,
    /// Random name of this life of the process.
    life: [u8; 16],
    observer: Option<observer::Observer>,
    progress: observer::Progress,
    reclaims: reclaims::Reclaims,
    collects: collects::Collects,
    diffs: diffs::Diffs,
}

impl World {
    /// A freshly formatted and opened store.
    pub fn new(config: WorldConfig) -> Self {
        let disk = SimDisk::new(SimConfig {
            volatile_cache: config.volatile_cache,
            offset_alignment: config.offset_alignment,
            depth: 8192, // Each shard says what it needs; that is not what is tested.
            // Formatting is the same in any order: no need to wait for it here.
            schedule: Schedule::AtOnce,
            ..SimConfig::new(config.capacity, config.seed)
        });
        disk.set_background(0xa5); // A former owner's bytes: no guest may ever see them.
        disk.set_canary(0xc5); // Nor what has been freed, by whomever.
        let options = store::FormatOptions {
            extent_size: Some(config.extent_size),
            force: true,
            uuid: [7; 16],
            secret: Random::new(config.seed).next_u64() | 1,
            time: WallTime::from_unix_nanos(1),
        };
        let report = store::format(&mut disk.connect(), &options, &mut |_, _| {});
        report.expect("a blank disk can be formatted");
        let mut world = Self {
            store: open(&disk, 1),
            disk,
            model: Model::default(),
            random: Random::new(config.seed ^ 0x5eed),
            page_dice: Random::new(config.seed ^ 0xb00c),
            trace: std::env::var_os("TRACE").is_some(),
            config,
            shards: Vec::new(),
            fronts: Vec::new(),
            faults: config.faults,
            life_strikes: 0,
            withheld: BTreeSet::new(),
            to_be_named: BTreeSet::new(),
            mail: BTreeMap::new(),
            now: Instant::from_nanos(1),
            wall: 1,
            names: 0,
            tickets: 0,
            volumes: BTreeMap::new(),
            unpublished: BTreeSet::new(),
            imports: 0,
            deleting: BTreeMap::new(),
            schedules: BTreeMap::new(),
            detached: BTreeMap::new(),
            moves: moves::Moves::new(config.seed),
            awake: Vec::new(),
            visits: visits::Visits::new(config.seed),
            requests: BTreeMap::new(),
            waiting: VecDeque::new(),
            commands: BTreeMap::new(),
            outcomes: BTreeMap::new(),
            journals: Vec::new(),
            life: [0; 16],
            observer: None,
            progress: observer::Progress::default(),
            reclaims: reclaims::Reclaims::new(config.seed),
            collects: collects::Collects::new(config.seed),
            diffs: diffs::Diffs::new(config.seed),
        };
        world.start_shards();
        world.begin_life();
        world.resume_faults();
        world
    }

    fn start_shards(&mut self) {
        let faults = &self.store.faults;
        let excused = self.metadata_is_damaged();
        assert!(faults.is_empty() || excused, "volumes that do not open: {faults:?}");
        let WorldConfig { shards, node_cache, requests, shared_leaves, steps_per_turn, .. } =
            self.config;
        let config = |index| ShardConfig {
            index,
            node_cache,
            requests_max: requests,
            shared_leaves,
            steps_per_turn,
        };
        let devices: Vec<SimDevice> = (0..shards).map(|_| self.disk.connect()).collect();
        self.fronts = devices.iter().map(SimDevice::front).collect();
        self.life_strikes = self.disk.strikes();
        let shard = |(index, device)| Shard::new(&config(index), device, &self.store);
        self.shards = devices.into_iter().enumerate().map(shard).collect();
        self.awake = vec![true; shards];
        self.life = self.random.next_u64().to_le_bytes().repeat(2).try_into().expect("16 bytes");
        let identity = self.identity(self.life);
        for shard in &mut self.shards {
            let memory = JournalMemory::new(self.config.journal_entries);
            shard.set_journal(Journal::create(memory.segment, &identity));
            self.journals.push(memory);
        }
        self.disk.set_schedule(self.config.schedule);
    }

    // ---- time ----

    /// One turn of every shard, in any order, and some of the mail. True when anything happened.
    pub fn step(&mut self) -> bool {
        self.disk.set_now(self.now.as_nanos());
        let mut order: Vec<usize> = (0..self.shards.len()).collect();
        self.random.shuffle(&mut order);
        let mut progress = false;
        for index in order {
            if self.disk.stopped() {
                return false;
            }
            if self.config.visits && self.may_sleep(index) {
                continue;
            }
            self.awake[index] = self.shards[index].poll(self.now);
            progress |= self.awake[index];
            progress |= self.collect(index);
        }
        progress |= self.deliver_mail();
        progress |= self.step_reclaims();
        progress |= self.step_collection();
        progress |= self.step_diff();
        self.resubmit();
        self.now = self.now.after(Duration::from_nanos(self.random.below(20_000)));
        self.tell_observer();
        progress
    }

    /// A shard sleeps when it had nothing to do, until it gets something, the disk has, or its time comes: who
    /// relies on being polled in any case is found out.
    fn may_sleep(&self, index: usize) -> bool {
        let due = self.shards[index].deadline().is_some_and(|deadline| deadline <= self.now);
        !self.awake[index] && !due && self.disk.in_flight() == 0
    }

    fn collect(&mut self, index: usize) -> bool {
        let mut progress = false;
        while let Some(done) = self.shards[index].pop_completion() {
            self.completed(done.tag, done.status);
            progress = true;
        }
        self.shards[index].guests_answered();
        while let Some((ticket, reply)) = self.shards[index].pop_reply() {
            self.replied(ticket, reply);
            progress = true;
        }
        while let Some((to, message)) = self.shards[index].pop_message() {
            self.visits.forwarded += u64::from(matches!(message, Message::Forward(_)));
            self.mail.entry((index, to)).or_default().push_back(message);
            progress = true;
        }
        progress
    }

    /// Between two shards messages keep their order; how long they take is anybody's guess.
    fn deliver_mail(&mut self) -> bool {
        let mut progress = false;
        for ((_, to), queue) in &mut self.mail {
            while self.random.chance(1, 2)
                && let Some(message) = queue.pop_front()
            {
                self.shards[*to].deliver(message);
                self.awake[*to] = true;
                progress = true;
            }
            progress |= !queue.is_empty();
        }
        progress
    }

    /// When nothing moves but the clock, moves the clock to where something will.
    fn skip_time(&mut self) -> bool {
        let late = self.disk.next_due().map(Instant::from_nanos);
        let next = self.shards.iter().filter_map(Shard::deadline).chain(late).min();
        let Some(next) = next.filter(|next| *next > self.now) else { return false };
        self.now = next;
        true
    }

    /// Goes on until `done`, or the power goes.
    ///
    /// # Panics
    /// When nothing happens any more or it takes far too long.
    pub fn run_until(&mut self, mut done: impl FnMut(&mut Self) -> bool) -> Result<(), PowerCut> {
        for _ in 0..STEPS_MAX {
            if done(self) {
                return Ok(());
            }
            if self.disk.stopped() {
                return Err(PowerCut);
            }
            if !self.step() && self.disk.in_flight_in_time() == 0 {
                self.skip_time();
            }
        }
        panic!(
            "stuck: {} requests ({} not admitted), commands {:?}, {} in flight on the disk, {:?}",
            self.requests.len(),
            self.waiting.len(),
            self.commands,
            self.disk.in_flight(),
            self.requests.values().map(|r| (r.volume, r.kind, r.sector, r.sectors)).next()
        );
    }

    /// Goes on until everything that was started has ended.
    pub fn settle(&mut self) -> Result<(), PowerCut> {
        self.run_until(|world| world.requests.is_empty() && world.commands.is_empty())
    }

    /// Settles, then lets background commits finish: nothing is left to do.
    pub fn idle(&mut self) -> Result<(), PowerCut> {
        self.settle()?;
        let end = self.now.after(Duration::from_secs(10));
        self.run_until(|world| {
            world.disk.in_flight() == 0
                && world.shards.iter().all(|s| s.deadline().is_none())
                && world.reclaims.is_idle()
                && world.collects.is_idle()
                && world.diffs.is_idle()
                || world.now >= end
        })
    }

    /// Lets time pass, and does nothing meanwhile.
    pub fn pass(&mut self, time: Duration) {
        self.now = self.now.after(time);
    }

    /// Goes on until `ticket` has ended.
    pub fn wait(&mut self, ticket: Ticket) -> Result<Outcome, PowerCut> {
        self.run_until(|world| world.outcomes.contains_key(&ticket))?;
        Ok(self.outcomes.remove(&ticket).expect("just found"))
    }

    fn tell(&self, event: std::fmt::Arguments<'_>) {
        if self.trace {
            eprintln!("{:>12} {event}", self.now.as_nanos());
        }
    }

    /// Gives a shard a command.
    fn control(&mut self, shard: usize, ticket: Ticket, command: Command) {
        self.awake[shard] = true;
        self.shards[shard].control(ticket, command);
    }

    fn ticket(&mut self) -> Ticket {
        self.tickets += 1;
        self.tickets
    }

    fn wall(&mut self) -> WallTime {
        self.wall += 1;
        WallTime::from_unix_nanos(self.wall)
    }

    /// A name nobody has used.
    pub fn fresh_name(&mut self) -> String {
        self.names += 1;
        format!("n{}", self.names)
    }

    // ---- guests ----

    /// Starts a guest request.
    pub fn start_io(&mut self, id: VolumeId, kind: IoKind, sector: u64, sectors: u64) -> Ticket {
        let ticket = self.ticket();
        let op = self.model.begin(id, kind, sector, sectors);
        let memory = matches!(kind, IoKind::Read | IoKind::Write).then(|| {
            let length = (sectors * SECTOR_SIZE) as usize;
            // Other memory is the home's, and few requests would be done anywhere else.
            let mut memory = match self.config.visits && self.random.chance(7, 8) {
                true => Memory::of_sectors(length, &mut self.random),
                false => Memory::new(length, &mut self.random),
            };
            match kind {
                IoKind::Write => memory.fill(op, sector),
                _ => memory.spoil(),
            }
            memory
        });
        self.tell(format_args!("{ticket}: {kind:?} {sector}+{sectors} of {id}, value {op}"));
        let (home, strikes) = (self.volumes[&id].shard, self.disk.strikes());
        let entrance = self.entrance(id);
        let request =
            Request { op, home, entrance, strikes, volume: id, kind, sector, sectors, memory };
        self.requests.insert(ticket, request);
        if !self.submit(ticket) {
            self.waiting.push_back(ticket);
        }
        ticket
    }

    fn submit(&mut self, ticket: Ticket) -> bool {
        let request = &self.requests[&ticket];
        let (shard, volume) = request.entrance;
        let segments = request.memory.as_ref().map_or(&[][..], |memory| &memory.segments);
        let result = self.shards[shard].submit(&IoRequest {
            tag: ticket,
            volume,
            kind: request.kind,
            sector: Sector::new(request.sector),
            sectors: request.sectors,
            segments,
        });
        self.awake[shard] = true;
        match result {
            Ok(()) => true,
            Err(Busy) => false,
        }
    }

    fn resubmit(&mut self) {
        // Whose volume has what it gets keeps nobody else out.
        let mut refused = BTreeSet::new();
        for _ in 0..self.waiting.len() {
            let ticket = self.waiting.pop_front().expect("as many as there were");
            let (shard, volume) = self.requests[&ticket].entrance;
            let entrance = (shard, volume.0);
            if refused.contains(&entrance) || !self.submit(ticket) {
                refused.insert(entrance);
                self.waiting.push_back(ticket);
            }
        }
    }

    fn completed(&mut self, ticket: Ticket, status: IoStatus) {
        let request = self.requests.remove(&ticket).expect("a request completes once");
        let expected = match status {
            IoStatus::Done => true,
            IoStatus::NoSpace => self.config.may_fill || self.may_fail() && self.claims_may_fail(),
            IoStatus::Failed => {
                let Request { volume, home, entrance, strikes, kind, .. } = request;
                self.may_fail()
                    && (self.is_to_blame(home, strikes, kind)
                        || self.is_to_blame(entrance.0, strikes, kind)
                        || kind != IoKind::Read && self.is_latched(volume))
            }
            IoStatus::Refused => false,
        };
        assert!(
            expected,
            "{:?} of {}+{} on volume {} ended as {status:?}",
            request.kind, request.sector, request.sectors, request.volume
        );
        self.tell(format_args!("{ticket}: {status:?}"));
        self.absorb_damage();
        let bytes = request.memory.as_ref().map_or(&[][..], Memory::bytes);
        self.model.end(request.op, status, bytes);
        self.outcomes.insert(ticket, Outcome::Io(status));
    }

    /// Does a guest request from start to end.
    pub fn io(
        &mut self,
        id: VolumeId,
        kind: IoKind,
        sector: u64,
        sectors: u64,
    ) -> Result<IoStatus, PowerCut> {
        let ticket = self.start_io(id, kind, sector, sectors);
        match self.wait(ticket)? {
            Outcome::Io(status) => Ok(status),
            Outcome::Reply(_) => unreachable!("tickets of requests end with a status"),
        }
    }

    /// Writes and waits.
    pub fn write(&mut self, id: VolumeId, sector: u64, sectors: u64) -> Result<IoStatus, PowerCut> {
        self.io(id, IoKind::Write, sector, sectors)
    }

    /// Reads, waits, and compares with the model.
    pub fn read(&mut self, id: VolumeId, sector: u64, sectors: u64) -> Result<IoStatus, PowerCut> {
        self.io(id, IoKind::Read, sector, sectors)
    }

    /// Flushes and waits.
    pub fn flush(&mut self, id: VolumeId) -> Result<IoStatus, PowerCut> {
        self.io(id, IoKind::Flush, 0, 0)
    }

    /// True once `ticket` has ended.
    pub fn has_ended(&self, ticket: Ticket) -> bool {
        self.outcomes.contains_key(&ticket)
    }

    /// Guest requests that have not ended.
    pub fn requests_in_flight(&self) -> usize {
        self.requests.len()
    }

    // ---- operators ----

    /// Volumes that can be used.
    pub fn volumes(&self) -> Vec<VolumeId> {
        self.volumes.keys().copied().filter(|id| !self.unpublished.contains(id)).collect()
    }

    /// How many volumes were published.
    pub fn imports(&self) -> u64 {
        self.imports
    }

    /// Volumes that are being made.
    pub fn unpublished(&self) -> Vec<VolumeId> {
        self.unpublished.iter().copied().collect()
    }

    /// From here on, whether the device fails: see [`WorldConfig::may_fail`].
    pub fn expect_failures(&mut self, may_fail: bool) {
        self.config.may_fail = may_fail;
    }

    /// Requests come in on other shards too than the homes of their volumes.
    pub fn has_visits(&self) -> bool {
        self.config.visits
    }

    /// The size of a volume.
    pub fn size(&self, id: VolumeId) -> ByteCount {
        self.volumes[&id].size
    }

    /// Asks the control path for something.
    pub fn start(&mut self, action: Action) -> Ticket {
        match action {
            Action::Create { name, size } => self.start_create(&name, size, None, true),
            Action::CreateUnpublished { name, size } => self.start_create(&name, size, None, false),
            action => match self.spare_diffed(action) {
                Some(action) => self.start_act(action),
                None => {
                    let ticket = self.ticket();
                    let refused = Reply::Failed(CommandError::InUse);
                    self.outcomes.insert(ticket, Outcome::Reply(refused));
                    ticket
                }
            },
        }
    }

    fn start_create(
        &mut self,
        name: &str,
        size: ByteCount,
        from: Option<CloneOrigin>,
        published: bool,
    ) -> Ticket {
        let created = self.wall();
        let plan = self.store.directory.plan_create(name, size, from, created);
        let plan = plan.expect("names are fresh and slots are plenty");
        let (ticket, id) = (self.ticket(), plan.id);
        self.model.begin_create(id, name, size.get(), from.map(|origin| origin.snapshot));
        if !published {
            self.model.withhold(id);
        }
        let shard = id.0 as usize % self.shards.len();
        self.tell(format_args!("{ticket}: {plan:?}"));
        self.commands.insert(ticket, Pending::Create { plan: plan.clone(), shard, published });
        let command =
            if published { Command::Create(plan) } else { Command::CreateUnpublished(plan) };
        self.control(shard, ticket, command);
        ticket
    }

    fn start_act(&mut self, action: Action) -> Ticket {
        let (ticket, time) = (self.ticket(), self.wall());
        let time_ns = time.as_unix_nanos();
        let id = subject(&action);
        let OpenVolume { shard, handle: volume, .. } = self.volumes[&id];
        let command = match action.clone() {
            Action::Create { .. } | Action::CreateUnpublished { .. } => {
                unreachable!("handled by the caller")
            }
            Action::Publish { .. } => {
                self.model.begin_publish(id);
                Command::Publish { volume, size: self.volumes[&id].size }
            }
            Action::Snapshot { label, .. } => {
                self.model.begin_snapshot(id, time_ns, label.clone());
                Command::Snapshot { volume, label, time }
            }
            Action::Label { snapshot, label } => {
                self.model.begin_mark(snapshot, Some(label.clone()));
                Command::Label { volume, sequence: snapshot.sequence, label }
            }
            Action::DeleteSnapshot { snapshot } => {
                self.model.begin_mark(snapshot, None);
                Command::DeleteSnapshot { volume, sequence: snapshot.sequence }
            }
            Action::DeleteSnapshots { volume: id, sequences } => {
                for sequence in &sequences {
                    self.model.begin_mark(SnapshotId { volume: id, sequence: *sequence }, None);
                }
                Command::DeleteSnapshots { volume, spare_labelled: true, sequences }
            }
            Action::Rollback { snapshot } => {
                // Labelled as the daemon does it.
                let label = Some(format!("before-rollback-{time_ns}"));
                self.model.begin_rollback(snapshot, time_ns, label.clone());
                Command::Rollback { volume, sequence: snapshot.sequence, label, time }
            }
            Action::Grow { size, .. } => {
                self.model.begin_grow(id, size.get());
                Command::Grow { volume, size }
            }
            Action::Rename { name, .. } => {
                self.store.directory.plan_rename(id, &name).expect("names are fresh");
                self.model.begin_rename(id, &name);
                Command::Rename { volume, name }
            }
            Action::Delete { .. } => {
                self.model.begin_delete(id);
                Command::Delete { volume }
            }
            Action::SetCache { cache, .. } => {
                if cache == CacheMode::Writeback {
                    self.model.set_writethrough(id, false);
                }
                Command::SetCache { volume, cache, by: CacheChooser::Guest }
            }
        };
        if matches!(action, Action::Delete { .. }) {
            self.end_visits(id);
            let open = self.volumes.remove(&id).expect("it was just looked at");
            self.deleting.insert(id, open);
            self.collects.volume_deleted = true;
        }
        self.tell(format_args!("{ticket}: {action:?}"));
        self.commands.insert(ticket, Pending::Act { action, time: time_ns });
        self.control(shard, ticket, command);
        ticket
    }

    fn replied(&mut self, ticket: Ticket, reply: Reply) {
        let pending = self.commands.remove(&ticket).expect("a command is answered once");
        self.tell(format_args!("{ticket}: {reply:?}"));
        if matches!(pending, Pending::Reclaim) {
            return self.reclaim_answered(ticket, reply);
        }
        if matches!(pending, Pending::Collect) {
            return self.collection_answered(ticket, reply);
        }
        if let Reply::Failed(error) = &reply {
            // What is visited may have moved or gone meanwhile.
            if !matches!(pending, Pending::Show | Pending::Share { .. } | Pending::Visit { .. }) {
                self.failed(&pending, error);
            }
            if let Pending::HandOver { volume, .. } = pending {
                self.not_handed_over(volume);
            }
            self.outcomes.insert(ticket, Outcome::Reply(reply));
            return;
        }
        match (pending, &reply) {
            (Pending::Open { volume, shard, size }, Reply::Opened(handle)) => {
                self.volumes.insert(volume, OpenVolume { shard, handle: *handle, size });
            }
            (Pending::Create { plan, shard, published }, Reply::Opened(handle)) => {
                let open = OpenVolume { shard, handle: *handle, size: plan.size };
                self.volumes.insert(plan.id, open);
                self.store.directory.created(&plan);
                if published {
                    self.model.end_create(plan.id);
                } else {
                    self.unpublished.insert(plan.id);
                }
            }
            (
                Pending::Show,
                Reply::Volume(_)
                | Reply::Page { .. }
                | Reply::Snapshot(_)
                | Reply::FoundAt { .. }
                | Reply::Stats(_),
            )
            | (Pending::Close, Reply::Closed { .. })
            | (Pending::OfDevice | Pending::Shutdown | Pending::Restore, Reply::Done) => {}
            (Pending::HandOver { volume, target }, Reply::HandedOver(handed)) => {
                self.handed_over(volume, target, handed.clone());
            }
            (Pending::Share { volume, visitor }, reply) => self.shared(volume, visitor, reply),
            (Pending::Visit { volume, shard, open }, Reply::Opened(handle)) => {
                self.visited((volume, shard), open, *handle);
            }
            (Pending::TakeOver { volume, target, .. }, Reply::Opened(handle)) => {
                self.taken_over(volume, target, *handle);
            }
            (
                Pending::TakeOver { volume, target, first },
                Reply::NotTakenOver { error, volume: handed },
            ) => self.not_taken_over((volume, target, first), error, handed.clone()),
            (Pending::Act { action, time }, reply) => self.acted(action, time, reply),
            (pending, reply) => panic!("{pending:?} was answered with {reply:?}"),
        }
        self.outcomes.insert(ticket, Outcome::Reply(reply));
    }

    fn acted(&mut self, action: Action, time: u64, reply: &Reply) {
        self.note_for_schedule(&action, reply);
        match (action, reply) {
            (Action::Snapshot { .. } | Action::Rollback { .. }, Reply::Snapshot(info)) => {
                self.model.end_snapshot(info.id, time);
            }
            (Action::Label { snapshot, label }, Reply::Done) => {
                self.model.end_mark(snapshot, Some(label));
            }
            (Action::DeleteSnapshot { snapshot }, Reply::Done) => {
                self.model.end_mark(snapshot, None);
                self.reclaims.push(snapshot);
            }
            (Action::DeleteSnapshots { volume, sequences }, Reply::Deleted(gone)) => {
                for sequence in sequences {
                    let snapshot = SnapshotId { volume, sequence };
                    self.model.end_thinning(snapshot, gone.contains(&sequence));
                    if gone.contains(&sequence) {
                        self.reclaims.push(snapshot);
                    }
                }
            }
            (Action::Publish { volume }, Reply::Done) => {
                self.unpublished.remove(&volume);
                self.collects.published.push(volume);
                self.imports += 1;
                self.model.end_create(volume);
            }
            (Action::Grow { volume, size }, Reply::Done) => {
                self.store.directory.grown(volume, size);
                self.model.end_grow(volume, size.get());
                self.volumes.get_mut(&volume).expect("it is open").size = size;
            }
            (Action::Rename { volume, name }, Reply::Done) => {
                self.store.directory.rename_ended(volume, &name, true);
                self.model.end_rename(volume, &name);
            }
            (Action::Delete { volume }, Reply::Closed { .. }) => {
                self.deleting.remove(&volume);
                self.collects.volume_deleted = true;
                self.model.end_delete(volume);
                self.store.directory.removed(volume);
            }
            (Action::SetCache { volume, cache }, Reply::Done) => {
                // A later one may have taken effect already.
                let other = |pending: &Pending| {
                    matches!(pending, Pending::Act { action: Action::SetCache { volume: v, .. }, .. }
                        if *v == volume)
                };
                let last = !self.commands.values().any(other);
                self.model.set_writethrough(volume, last && cache == CacheMode::Writethrough);
            }
            (action, reply) => panic!("{action:?} was answered with {reply:?}"),
        }
    }

    fn failed(&mut self, pending: &Pending, error: &CommandError) {
        let expected = match error {
            CommandError::NoSpace => {
                self.config.may_fill || self.may_fail() && self.claims_may_fail()
            }
            CommandError::Device(_)
            | CommandError::Latched(_)
            | CommandError::Corrupt(_)
            | CommandError::Log { .. } => {
                let mut shards = 0..self.shards.len();
                self.may_fail()
                    && shards.any(|shard| self.is_to_blame(shard, self.life_strikes, IoKind::Write))
            }
            // Several may be under way, and the first one decides.
            CommandError::Settling | CommandError::NoSuchSnapshot | CommandError::InUse => true,
            CommandError::Limit(_) => matches!(pending, Pending::OfDevice),
            _ => false,
        };
        assert!(expected, "{pending:?} failed: {error}");
        // After an error of the device nobody knows what is on it: it may turn up after a power cut.
        let unknown = matches!(error, CommandError::Device(_) | CommandError::Latched(_));
        match pending {
            Pending::Act { action: Action::Rollback { snapshot }, .. } if unknown => {
                // Nor what it reads as until then.
                self.volumes.remove(&snapshot.volume);
            }
            Pending::Act {
                action: action @ (Action::Snapshot { .. } | Action::Rollback { .. }),
                time,
            } if !unknown => self.model.fail_snapshot(subject(action), *time),
            Pending::Act { action: Action::Rename { volume, name }, .. } => {
                self.store.directory.rename_ended(*volume, name, false);
            }
            Pending::Act { action: Action::Delete { volume }, .. } => {
                let open = self.deleting.remove(volume).expect("it was being deleted");
                self.volumes.insert(*volume, open);
            }
            Pending::Open { .. } => self.note_damage(self.life_strikes),
            Pending::Create { plan, .. } => {
                self.store.directory.abandoned(plan);
                if unknown {
                    let origin = plan.origin.map(|origin| (plan.id, origin.snapshot));
                    self.reclaims.unborn.extend(origin);
                    self.collects.doubtful_creation = true;
                } else {
                    self.model.fail_create(plan.id);
                }
            }
            _ => {}
        }
    }

    /// Asks the control path for something and waits for its answer, whatever it is.
    pub fn ask(&mut self, action: Action) -> Result<Reply, PowerCut> {
        let ticket = self.start(action);
        self.reply(ticket)
    }

    fn reply(&mut self, ticket: Ticket) -> Result<Reply, PowerCut> {
        match self.wait(ticket)? {
            Outcome::Reply(reply) => Ok(reply),
            Outcome::Io(_) => unreachable!("tickets of commands end with a reply"),
        }
    }

    /// Does what an operator asks, from start to end.
    ///
    /// # Panics
    /// When it is refused.
    pub fn perform(&mut self, action: Action) -> Result<Reply, PowerCut> {
        let reply = self.ask(action.clone())?;
        assert!(!matches!(reply, Reply::Failed(_)), "{action:?}: {reply:?}");
        Ok(reply)
    }

    /// Makes a blank volume.
    pub fn create(&mut self, size: ByteCount) -> Result<VolumeId, PowerCut> {
        let name = self.fresh_name();
        let before: BTreeSet<VolumeId> = self.volumes.keys().copied().collect();
        self.perform(Action::Create { name, size })?;
        let made = self.volumes.keys().find(|id| !before.contains(id));
        Ok(*made.expect("it was just made"))
    }

    /// Takes a snapshot.
    pub fn snapshot(&mut self, volume: VolumeId) -> Result<SnapshotId, PowerCut> {
        match self.perform(Action::Snapshot { volume, label: None })? {
            Reply::Snapshot(info) => Ok(info.id),
            reply => panic!("a snapshot was answered with {reply:?}"),
        }
    }

    /// Takes a snapshot, which may fail.
    pub fn snapshot_or_not(&mut self, volume: VolumeId) -> Result<Reply, PowerCut> {
        self.ask(Action::Snapshot { volume, label: None })
    }

    /// What a volume says of itself.
    pub fn show(&mut self, id: VolumeId) -> Result<Box<VolumeInfo>, PowerCut> {
        match self.look_up(id, |volume| Command::Show { volume })? {
            Reply::Volume(info) => Ok(info),
            reply => panic!("show was answered with {reply:?}"),
        }
    }

    /// Asks a volume for something that changes nothing.
    pub fn look_up(
        &mut self,
        id: VolumeId,
        command: impl FnOnce(VolumeHandle) -> Command,
    ) -> Result<Reply, PowerCut> {
        let ticket = self.start_look_up(id, command);
        self.reply(ticket)
    }

    /// The same, not waited for.
    pub fn start_look_up(
        &mut self,
        id: VolumeId,
        command: impl FnOnce(VolumeHandle) -> Command,
    ) -> Ticket {
        let ticket = self.ticket();
        let OpenVolume { shard, handle, .. } = self.volumes[&id];
        self.commands.insert(ticket, Pending::Show);
        self.control(shard, ticket, command(handle));
        ticket
    }

    /// A volume's snapshots, deleted ones included, by pages. Where the disk has damaged the log, the older
    /// ones are missing.
    pub fn snapshots(&mut self, id: VolumeId) -> Result<Vec<SnapshotInfo>, PowerCut> {
        let (mut all, mut from) = (Vec::new(), Some(0));
        while let Some(at) = from {
            let limit = 1 + self.page_dice.below(1024) as usize;
            let page = |volume| Command::Page { volume, from: at, limit, with_deleted: true };
            match self.look_up(id, page)? {
                Reply::Page { snapshots, next } => {
                    all.extend(snapshots);
                    from = next;
                }
                Reply::Failed(CommandError::Log { before, .. }) if self.metadata_is_damaged() => {
                    from = Some(before.sequence);
                }
                reply => panic!("a page was answered with {reply:?}"),
            }
        }
        Ok(all)
    }

    /// Blocks of a volume's snapshot log as the disk has it now, oldest first.
    pub fn log_blocks(&self, id: VolumeId) -> Vec<BlockAddr> {
        let store = store::open(&mut self.disk.connect(), store::OpenMode::ReadOnly);
        let store = store.expect("the store opens");
        let record = &store.directory.entry(id).expect("the volume opens").record;
        store::read_log(&mut self.disk.connect(), &store, record).blocks
    }

    /// A snapshot that is not deleted, as its volume has it; none when there is no such one.
    pub fn find(&mut self, snapshot: SnapshotId) -> Result<Option<SnapshotInfo>, PowerCut> {
        let which = Which::Sequence(snapshot.sequence);
        match self.look_up(snapshot.volume, |volume| Command::Find { volume, which })? {
            Reply::Snapshot(info) => Ok(Some(info)),
            Reply::Failed(CommandError::NoSuchSnapshot) => Ok(None),
            Reply::Failed(CommandError::Log { .. }) if self.may_fail() => Ok(None),
            reply => panic!("a snapshot was answered with {reply:?}"),
        }
    }

    /// True while the registry has a slot for one more volume. Those of deleted volumes stay taken until
    /// they are collected.
    pub fn may_create(&self) -> bool {
        self.store.directory.free_slots() > 0
    }

    /// Makes a clone, once the snapshot has settled. `None` when the snapshot is deleted, or the
    /// registry full.
    pub fn clone_of(
        &mut self,
        snapshot: SnapshotId,
        name: &str,
    ) -> Result<Option<VolumeId>, PowerCut> {
        self.larger_clone_of(snapshot, name, ByteCount::default())
    }

    /// The same, of at least this size.
    pub fn larger_clone_of(
        &mut self,
        snapshot: SnapshotId,
        name: &str,
        size: ByteCount,
    ) -> Result<Option<VolumeId>, PowerCut> {
        if !self.may_create() {
            return Ok(None);
        }
        for _ in 0..STEPS_MAX / 50 {
            let info = self.show(snapshot.volume)?;
            let Some(found) = self.find(snapshot)? else { return Ok(None) };
            if found.settling {
                // It settles when the requests do that were in flight.
                for _ in 0..50 {
                    if !self.step() && self.disk.in_flight_in_time() == 0 {
                        self.skip_time();
                    }
                }
                continue;
            }
            if info.latched.is_some() {
                return Ok(None);
            }
            let origin =
                CloneOrigin { snapshot, root: found.root, height: found.height, size: found.size };
            let ticket = self.start_create(name, size.max(origin.size), Some(origin), true);
            let Pending::Create { plan, .. } = &self.commands[&ticket] else {
                unreachable!("just inserted");
            };
            let clone = plan.id;
            return match self.reply(ticket)? {
                Reply::Opened(_) => Ok(Some(clone)),
                Reply::Failed(_) => Ok(None), // It was looked at when it came.
                reply => panic!("a clone was answered with {reply:?}"),
            };
        }
        panic!("snapshot {snapshot} never settles");
    }

    /// Makes an unused extent one of `kind` on the disk, of which only the last `free` blocks are
    /// free, so that they are what is handed out next. For a store that was just made.
    pub fn prepare_extent(&mut self, extent: u64, kind: ExtentType, free: u32) {
        let opened = open(&self.disk, 2);
        let (geometry, secret) = (opened.geometry, opened.secret);
        let mut bytes = [0; BLOCK_SIZE as usize];
        for index in 0..geometry.bitmap_blocks {
            let fresh = geometry.fresh_bitmap(index);
            let mut bitmap = Bitmap::new();
            bitmap.set_range(0, Bitmap::BITS);
            if index + 1 == geometry.bitmap_blocks {
                let mut last_free = (0..Bitmap::BITS).rev().filter(|bit| !fresh.get(*bit));
                last_free.by_ref().take(free as usize).for_each(|bit| bitmap.clear(bit));
            }
            let block = geometry.bitmap_block(extent, index);
            bitmap.encode(&mut bytes, block, secret);
            self.disk.poke(block, &bytes);
        }
        let (block, first) = geometry.catalogue_block_of(extent);
        let mut entries = opened.catalogue[first as usize..].to_vec();
        entries.truncate(CATALOGUE_ENTRIES_PER_BLOCK);
        entries[(extent - first) as usize].kind = kind;
        encode_catalogue_block(&mut bytes, block, first, &entries, secret);
        self.disk.poke(block, &bytes);
        self.crash(Keep::Everything);
        self.recover();
    }

    /// True for blocks by which blocks are claimed, the catalogue and the bitmaps: work that is
    /// done for many requests at once, ahead of need.
    pub fn is_allocation(&self, block: BlockAddr) -> bool {
        let geometry = &self.store.geometry;
        let extent = geometry.extent_of(block);
        if extent == 0 {
            let (first, _) = geometry.catalogue_block_of(0);
            let (last, _) = geometry.catalogue_block_of(geometry.extent_count - 1);
            return (first..=last).contains(&block);
        }
        block.get() - geometry.extent_start(extent).get() < geometry.bitmap_blocks
    }
}

fn subject(action: &Action) -> VolumeId {
    match action {
        Action::Create { .. } | Action::CreateUnpublished { .. } => {
            unreachable!("it has no volume yet")
        }
        Action::Snapshot { volume, .. }
        | Action::Publish { volume }
        | Action::Grow { volume, .. }
        | Action::Rename { volume, .. }
        | Action::Delete { volume }
        | Action::DeleteSnapshots { volume, .. }
        | Action::SetCache { volume, .. } => *volume,
        Action::Label { snapshot, .. }
        | Action::DeleteSnapshot { snapshot }
        | Action::Rollback { snapshot } => snapshot.volume,
    }
}

fn open(disk: &SimDisk, wall: u64) -> store::OpenedStore {
    let mode = store::OpenMode::ReadWrite { time: WallTime::from_unix_nanos(wall) };
    store::open(&mut disk.connect(), mode).expect("the store opens")
}
