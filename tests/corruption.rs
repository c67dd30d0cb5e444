//! Damage to every kind of block on the device, one at a time: what is damaged fails, clearly, and
//! everything else is served; nothing panics, loops or hangs; `bessel check` names it; `--repair`
//! writes again what follows from the rest, whatever moment it is cut short at.
//!
//! Each case has a name, and `CASE=name` runs it alone.

use std::collections::{BTreeMap, BTreeSet};

use bessel_mapping::check::{self, CheckReport, FINDINGS_MAX, Finding, Severity, Structure};
use bessel_mapping::format::{
    Bitmap, Entry, EntryKind, ExtentType, LOG_ENTRIES_PER_BLOCK, LogEntry, NODE_BITS, NODE_ENTRIES,
    Node, SUPERBLOCK_COPIES, VolumeRecord, encode_log_block, node_as_bytes, node_as_bytes_mut,
};
use bessel_mapping::request::{
    CloneOrigin, Command, IoKind, IoRequest, IoStatus, Reply, SnapshotId, VolumeHandle, Which,
};
use bessel_mapping::shard::{Shard, ShardConfig};
use bessel_mapping::store::{self, OpenError, OpenMode, OpenedStore};
use bessel_reactor::buffer::{BufferPool, Segment};
use bessel_reactor::clock::{Instant, WallTime};
use bessel_reactor::device::sim::{Fault, FaultRates, Keep, Random, Schedule, SimDevice, SimDisk};
use bessel_reactor::device::{Device, Token};
use bessel_reactor::units::{BlockAddr, ByteCount, SECTOR_SIZE, Sector};
use bessel_tests::world::{Action, World, WorldConfig};

const BLOCK: usize = 4096;
/// Where a volume is written and read: both ends of a leaf, of the node above it, and the start.
const PLACES: [u64; 5] = [0, 511 * 8, 513 * 8, (1 << 18) * 8 - 8, (1 << 18) * 8];
const PLACE_SECTORS: u64 = 24;
/// Turns after which something is called endless: no request of these tests needs a hundred.
const TURNS_MAX: u32 = 20_000;
const NOW: WallTime = WallTime::from_unix_nanos(1_000_000);

// ---- the store ----

/// A store closed in order, as it is and as it was some time before.
struct Base {
    disk: SimDisk,
    older: SimDisk,
    opened: OpenedStore,
    /// What volumes and snapshots read as.
    contents: BTreeMap<String, Contents>,
    /// Every block that a tree reaches, and who reaches it.
    nodes: BTreeMap<u64, Reached>,
    /// Blocks of data of each volume's current tree that only this one may write.
    owned_data: BTreeMap<String, Vec<u64>>,
}

type Contents = BTreeMap<u64, Vec<u8>>;

/// Who reaches a node, and as what.
#[derive(Clone, Default)]
struct Reached {
    level: u8,
    volumes: BTreeSet<String>,
    snapshots: BTreeSet<String>,
}

fn write_all(world: &mut World, volume: bessel_mapping::request::VolumeId) {
    let sectors = world.size(volume).sectors();
    for place in PLACES.into_iter().filter(|place| place + PLACE_SECTORS <= sectors) {
        let count = 1 + world.random.below(PLACE_SECTORS);
        world.write(volume, place, count).expect("no power cut");
    }
}

impl Base {
    /// Volumes n1 (26 snapshots: two log blocks), n2 (a clone), n3, n4 (four levels), n6 (deleted).
    fn new() -> Self {
        let mut world = World::new(WorldConfig {
            capacity: ByteCount::new(20 << 20),
            schedule: Schedule::AtOnce,
            ..WorldConfig::new(5)
        });
        let first = world.create(ByteCount::new(4 << 30)).expect("no power cut");
        write_all(&mut world, first);
        let snapshot = world.snapshot(first).expect("no power cut");
        let name = world.fresh_name();
        let clone = world.clone_of(snapshot, &name).expect("no power cut").expect("it is live");
        let third = world.create(ByteCount::new(3 << 30)).expect("no power cut");
        let tall = world.create(ByteCount::new(600 << 30)).expect("no power cut");
        let doomed = world.create(ByteCount::new(1 << 30)).expect("no power cut");
        for volume in [first, clone, third, tall, doomed] {
            write_all(&mut world, volume);
        }
        world.snapshot(third).expect("no power cut");
        for volume in [first, clone, third, tall] {
            world.flush(volume).expect("no power cut");
        }
        let older = world.disk.fork(1);
        for _ in 0..25 {
            let sectors = 1 + world.random.below(PLACE_SECTORS);
            world.write(first, PLACES[2], sectors).expect("no power cut");
            world.snapshot(first).expect("no power cut");
        }
        world.snapshot(third).expect("no power cut");
        for volume in [first, clone, third, tall] {
            write_all(&mut world, volume);
        }
        world.perform(Action::Delete { volume: doomed }).expect("no power cut");
        world.shut_down().expect("no power cut");
        let disk = world.disk.fork(2);
        disk.set_schedule(Schedule::AtOnce);
        let opened = store::open(&mut disk.connect(), OpenMode::ReadOnly).expect("it is whole");
        let mut base = Self {
            disk,
            older,
            opened,
            contents: BTreeMap::new(),
            nodes: BTreeMap::new(),
            owned_data: BTreeMap::new(),
        };
        base.map_trees();
        let mut served = Served::start(&base.disk.fork(3)).expect("it is whole");
        assert!(served.refused.is_empty(), "{:?}", served.refused);
        base.contents = served.read_everything();
        base
    }

    fn node(&self, addr: BlockAddr) -> Node {
        let mut node = [Entry::default(); NODE_ENTRIES];
        node_as_bytes_mut(&mut node).copy_from_slice(&self.disk.peek(addr));
        node
    }

    fn map_trees(&mut self) {
        let entries: Vec<_> = self.opened.directory.entries().cloned().collect();
        for entry in entries.iter().filter(|entry| !entry.record.deleted) {
            let record = &entry.record;
            let name = record.name.clone();
            self.map_tree(
                record.root,
                record.height,
                true,
                &mut |reached| {
                    reached.volumes.insert(name.clone());
                },
                &name,
            );
            let log = store::read_log(&mut self.disk.connect(), &self.opened, record);
            for snapshot in log.entries.iter().filter(|snapshot| !snapshot.deleted) {
                let of = format!("{}.{}", record.id, snapshot.sequence);
                self.map_tree(
                    snapshot.root,
                    snapshot.height,
                    false,
                    &mut |reached| {
                        reached.snapshots.insert(of.clone());
                    },
                    &name,
                );
            }
        }
    }

    fn map_tree(
        &mut self,
        root: BlockAddr,
        height: u8,
        current: bool,
        note: &mut dyn FnMut(&mut Reached),
        name: &str,
    ) {
        let mut stack = vec![(root, height, current)];
        while let Some((addr, level, writable)) = stack.pop() {
            let reached = self.nodes.entry(addr.get()).or_default();
            reached.level = level;
            note(reached);
            for entry in self.node(addr).iter().filter(|entry| !entry.is_hole()) {
                let writable = writable && !entry.read_only();
                match entry.kind() {
                    EntryKind::Node(below) => stack.push((entry.block(), below, writable)),
                    EntryKind::Data if writable => {
                        let owned = self.owned_data.entry(name.to_owned()).or_default();
                        owned.push(entry.block().get());
                    }
                    _ => {}
                }
            }
        }
    }

    fn record(&self, name: &str) -> (u32, VolumeRecord) {
        let entry = self.opened.directory.entries().find(|entry| entry.record.name == name);
        let entry = entry.expect("the base has it");
        (entry.slot, entry.record.clone())
    }

    /// The current path of a volume from the root to the leaf of its first block.
    fn path(&self, name: &str) -> Vec<u64> {
        let (_, record) = self.record(name);
        let mut path = vec![record.root.get()];
        for _ in 1..record.height {
            let node = self.node(BlockAddr::new(*path.last().expect("not empty")));
            path.push(node[0].block().get());
        }
        path
    }

    /// Changes entries of a node on `disk`, with tags as this store makes them.
    fn forge(&self, disk: &SimDisk, addr: u64, entries: &[(usize, Entry)]) {
        let addr = BlockAddr::new(addr);
        let mut node = [Entry::default(); NODE_ENTRIES];
        node_as_bytes_mut(&mut node).copy_from_slice(&disk.peek(addr));
        for &(slot, entry) in entries {
            node[slot] = self.opened.key.seal(entry, addr, slot);
        }
        let bytes = node_as_bytes(&node).try_into().expect("a node is a block");
        disk.poke(addr, bytes);
    }

    fn forge_record(&self, disk: &SimDisk, name: &str, change: impl FnOnce(&mut VolumeRecord)) {
        let (slot, mut record) = self.record(name);
        change(&mut record);
        let addr = self.opened.geometry.registry_slot(slot, record.generation);
        let mut block = [0; BLOCK];
        record.encode_block(&mut block, addr, self.opened.secret);
        disk.poke(addr, &block);
    }

    fn bitmaps(&self) -> Vec<u64> {
        let geometry = &self.opened.geometry;
        let used = |extent: &u64| {
            matches!(self.opened.extents.get(*extent), ExtentType::Data | ExtentType::Metadata)
        };
        let extents = (0..geometry.extent_count).filter(used);
        extents.map(|extent| geometry.bitmap_block(extent, 0).get()).collect()
    }
}

// ---- serving it ----

/// A shard over a disk, with every volume that can be opened.
struct Served {
    shard: Shard<SimDevice>,
    store: OpenedStore,
    disk: SimDisk,
    open: BTreeMap<String, (VolumeHandle, ByteCount)>,
    /// Volumes that could not be opened, and what was said.
    refused: BTreeMap<String, String>,
    now: u64,
    tickets: u64,
}

impl Served {
    fn start(disk: &SimDisk) -> Result<Self, OpenError> {
        disk.set_schedule(Schedule::AtOnce);
        let store = store::open(&mut disk.connect(), OpenMode::ReadWrite { time: NOW })?;
        let config = ShardConfig {
            index: 0,
            node_cache: ByteCount::new(1 << 20),
            requests_max: 8,
            shared_leaves: 0,
            steps_per_turn: ShardConfig::STEPS_PER_TURN,
        };
        let shard = Shard::new(&config, disk.connect(), &store);
        let (open, refused) = (BTreeMap::new(), BTreeMap::new());
        let disk = disk.clone();
        let mut served = Self { shard, store, disk, open, refused, now: 1, tickets: 0 };
        let volumes: Vec<_> = served.store.directory.volumes().cloned().collect();
        for volume in volumes.iter().filter(|volume| !volume.deleted) {
            let Some(entry) = served.store.directory.entry(volume.id).cloned() else {
                let why = volume.fault.clone().expect("what is not there has a reason");
                served.refused.insert(volume.name.clone(), why);
                continue;
            };
            match served.command(Command::Open(Box::new(entry))) {
                Reply::Opened(handle) => {
                    served.open.insert(volume.name.clone(), (handle, volume.size));
                }
                Reply::Failed(error) => {
                    served.refused.insert(volume.name.clone(), error.to_string());
                }
                reply => panic!("open was answered with {reply:?}"),
            }
        }
        Ok(served)
    }

    fn turn(&mut self) {
        self.now += 1_000_000;
        self.shard.poll(Instant::from_nanos(self.now));
        assert!(self.shard.pop_message().is_none(), "there is one shard");
    }

    fn command(&mut self, command: Command) -> Reply {
        self.tickets += 1;
        let ticket = self.tickets;
        self.shard.control(ticket, command);
        for _ in 0..TURNS_MAX {
            self.turn();
            if let Some((answered, reply)) = self.shard.pop_reply() {
                assert_eq!(answered, ticket);
                return reply;
            }
        }
        panic!("a command never ends");
    }

    /// One request over `bytes`, which a read fills.
    fn io(&mut self, name: &str, kind: IoKind, sector: u64, bytes: &mut [u8]) -> IoStatus {
        let (volume, _) = self.open[name];
        let mut pool = BufferPool::new(1, bytes.len().next_multiple_of(BLOCK).max(BLOCK));
        let mut buffer = pool.take().expect("it has one");
        pool.bytes_mut(&mut buffer)[..bytes.len()].copy_from_slice(bytes);
        let segment: Segment = pool.lend(&buffer).part(0, bytes.len());
        let moves = matches!(kind, IoKind::Read | IoKind::Write);
        let segments = if moves { vec![segment] } else { Vec::new() };
        self.tickets += 1;
        let sectors = bytes.len() as u64 / SECTOR_SIZE;
        let (tag, sector) = (self.tickets, Sector::new(sector));
        let request = IoRequest { tag, volume, kind, sector, sectors, segments: &segments };
        self.shard.submit(&request).expect("one at a time");
        for _ in 0..TURNS_MAX {
            self.turn();
            if let Some(done) = self.shard.pop_completion() {
                assert_eq!(done.tag, tag);
                pool.returned(&buffer);
                bytes.copy_from_slice(&pool.bytes(&buffer)[..bytes.len()]);
                return done.status;
            }
        }
        panic!("{kind:?} of {name} at {sector} never ends");
    }

    /// What a volume holds at every place; `None` where it cannot be read.
    fn read(&mut self, name: &str) -> BTreeMap<u64, Option<Vec<u8>>> {
        let sectors = self.open[name].1.sectors();
        let mut found = BTreeMap::new();
        for place in PLACES.into_iter().filter(|place| place + PLACE_SECTORS <= sectors) {
            let mut bytes = vec![0xee; (PLACE_SECTORS * SECTOR_SIZE) as usize];
            let status = self.io(name, IoKind::Read, place, &mut bytes);
            assert!(matches!(status, IoStatus::Done | IoStatus::Failed), "{status:?}");
            found.insert(place, (status == IoStatus::Done).then_some(bytes));
        }
        found
    }

    /// Everything that volumes and snapshots hold; snapshots are read through clones.
    fn read_everything(&mut self) -> BTreeMap<String, Contents> {
        let whole = |found: BTreeMap<u64, Option<Vec<u8>>>| -> Contents {
            found.into_iter().map(|(at, bytes)| (at, bytes.expect("it can be read"))).collect()
        };
        let mut contents = BTreeMap::new();
        for name in self.open.keys().cloned().collect::<Vec<_>>() {
            let found = self.read(&name);
            contents.insert(name, whole(found));
        }
        for (id, clone) in self.clone_snapshots(usize::MAX) {
            let found = self.read(&clone.expect("it can be cloned"));
            contents.insert(id, whole(found));
        }
        contents
    }

    /// Clones up to `most` snapshots of each open volume, the newest first: by id, the clone's name,
    /// or why there is none.
    fn clone_snapshots(&mut self, most: usize) -> BTreeMap<String, Result<String, String>> {
        let entries: Vec<_> = self.store.directory.entries().cloned().collect();
        let mut clones = BTreeMap::new();
        for entry in &entries {
            if !self.open.contains_key(&entry.record.name) {
                continue;
            }
            let log = store::read_log(&mut self.disk.connect(), &self.store, &entry.record);
            let live = log.entries.iter().rev().filter(|snapshot| !snapshot.deleted);
            for snapshot in live.take(most) {
                let id = SnapshotId { volume: entry.record.id, sequence: snapshot.sequence };
                let (root, height, size) = (snapshot.root, snapshot.height, snapshot.size);
                let origin = CloneOrigin { snapshot: id, root, height, size };
                let name = format!("of-{id}");
                let plan = self.store.directory.plan_create(&name, size, Some(origin), NOW);
                let plan = plan.expect("names are fresh and slots are plenty");
                let made = match self.command(Command::Create(plan.clone())) {
                    Reply::Opened(handle) => {
                        self.store.directory.created(&plan);
                        self.open.insert(name.clone(), (handle, size));
                        Ok(name)
                    }
                    Reply::Failed(error) => {
                        self.store.directory.abandoned(&plan);
                        Err(error.to_string())
                    }
                    reply => panic!("a clone was answered with {reply:?}"),
                };
                clones.insert(id.to_string(), made);
            }
        }
        clones
    }

    /// Writes, discards, takes a snapshot and flushes; whatever comes of it. True when all went well.
    fn use_it(&mut self, name: &str, seed: u64) -> bool {
        let mut good = true;
        let sectors = self.open[name].1.sectors();
        for place in PLACES.into_iter().filter(|place| place + PLACE_SECTORS <= sectors) {
            let mut bytes = vec![seed as u8; 8 * SECTOR_SIZE as usize];
            good &= self.io(name, IoKind::Write, place, &mut bytes) == IoStatus::Done;
            good &= self.io(name, IoKind::Discard, place + 8, &mut bytes) == IoStatus::Done;
            good &= self.io(name, IoKind::Write, place + 3, &mut bytes[..512]) == IoStatus::Done;
        }
        good &= self.io(name, IoKind::Flush, 0, &mut []) == IoStatus::Done;
        let volume = self.open[name].0;
        let command = Command::Snapshot { volume, label: None, time: NOW };
        good &= matches!(self.command(command), Reply::Snapshot(_));
        // A whole leaf, twice: what is dropped twice must not be freed twice.
        for _ in 0..2 {
            let mut bytes = vec![seed as u8; 8 * SECTOR_SIZE as usize];
            good &= self.io(name, IoKind::Write, 0, &mut bytes) == IoStatus::Done;
            let mut leaf = vec![0; 512 * BLOCK];
            good &= self.io(name, IoKind::Discard, 0, &mut leaf) == IoStatus::Done;
        }
        good &= self.io(name, IoKind::Flush, 0, &mut []) == IoStatus::Done;
        good
    }

    fn shut_down(mut self) {
        match self.command(Command::Shutdown) {
            Reply::Done | Reply::Failed(_) => {}
            reply => panic!("shutting down was answered with {reply:?}"),
        }
    }
}

// ---- cases ----

fn check(disk: &SimDisk) -> Result<CheckReport, OpenError> {
    let report = check::check(&mut disk.connect(), &mut |done, total| assert!(done <= total));
    if let Ok(report) = &report {
        assert!(report.findings.len() <= FINDINGS_MAX);
    }
    report
}

/// Runs a case, unless another one was asked for.
fn case(name: &str, ran: &mut u32, run: impl FnOnce()) {
    let wanted = std::env::var("CASE").ok();
    if wanted.is_some_and(|wanted| wanted != name) {
        return;
    }
    *ran += 1;
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
    if let Err(panic) = outcome {
        eprintln!("replay: CASE={name} cargo test -p bessel-tests --test corruption");
        std::panic::resume_unwind(panic);
    }
}

/// What a damage may cost.
#[derive(Clone, Default)]
struct Cost {
    /// Volumes some of whose data may be out of reach, or older.
    volumes: BTreeSet<String>,
    /// And snapshots.
    snapshots: BTreeSet<String>,
    /// What of these can be read may be something else than before: the damage looks like no damage.
    silent: bool,
}

impl Cost {
    fn of(volumes: &[&str]) -> Self {
        Self { volumes: volumes.iter().map(|name| (*name).to_owned()).collect(), ..Self::default() }
    }
}

/// Serves a damaged store: who is not concerned reads all that was there, before and after everybody
/// has written; who is, reads what was there or gets an error. Returns how many requests, openings
/// and clones failed.
fn serve(base: &Base, disk: &SimDisk, cost: &Cost) -> u32 {
    let mut served = Served::start(disk).expect("damage to one volume leaves the others");
    let mut failed = 0;
    for (name, why) in &served.refused {
        assert!(cost.volumes.contains(name), "{name} was not damaged: {why}");
        assert!(why.contains("block") || why.contains("log ends early"), "says not where: {why}");
        failed += 1;
    }
    for name in base.contents.keys().filter(|name| name.starts_with('n')) {
        if !served.open.contains_key(name) {
            continue;
        }
        let concerned = cost.volumes.contains(name);
        for (at, bytes) in served.read(name) {
            match bytes {
                Some(_) if concerned && cost.silent => {}
                Some(bytes) => {
                    assert!(bytes == base.contents[name][&at], "{name} reads wrong at {at}");
                }
                None => {
                    assert!(concerned, "{name} cannot be read at {at}");
                    failed += 1;
                }
            }
        }
    }
    for (id, clone) in served.clone_snapshots(2) {
        let volume = &base.snapshot_owner(&id);
        let concerned = cost.snapshots.contains(&id) || cost.volumes.contains(volume);
        let Ok(clone) = clone.inspect_err(|why| {
            assert!(concerned, "snapshot {id} was not damaged: {why}");
            assert!(why.contains("block"), "says not where: {why}");
        }) else {
            failed += 1;
            continue;
        };
        for (at, bytes) in served.read(&clone) {
            match bytes {
                Some(_) if concerned && cost.silent => {}
                Some(bytes) => assert!(bytes == base.contents[&id][&at], "{id} at {at}"),
                None => {
                    assert!(concerned, "snapshot {id} cannot be read at {at}");
                    failed += 1;
                }
            }
        }
    }
    // Who is not concerned goes on first: the others may do what they want with their own.
    let (concerned, others): (Vec<_>, Vec<_>) =
        served.open.keys().cloned().partition(|name| cost.volumes.contains(name));
    let mut written = BTreeMap::new();
    for (name, seed) in others.iter().zip(1..) {
        if name.starts_with('n') {
            assert!(served.use_it(name, seed), "{name} cannot be written");
            written.insert(name.clone(), served.read(name));
        }
    }
    for (name, seed) in concerned.iter().zip(100..) {
        failed += u32::from(!served.use_it(name, seed));
    }
    for (name, before) in written {
        assert!(served.read(&name) == before, "{name} changes when a damaged volume is written");
    }
    served.shut_down();
    failed
}

impl Base {
    fn snapshot_owner(&self, id: &str) -> String {
        let volume = id.split('.').next().expect("it has a first part");
        let mut entries = self.opened.directory.entries();
        let entry = entries.find(|entry| entry.record.id.to_string() == volume);
        entry.expect("the base has it").record.name.clone()
    }
}

/// A volume whose older snapshots cannot be read for a damaged block of its log: it has the snapshots from
/// `kept` on and new ones, and says of the others, and of what might be one of them, what, where and what
/// to do.
fn serve_newer_snapshots(disk: &SimDisk, name: &str, damaged: u64, kept: u64) {
    let mut served = Served::start(disk).expect("it is one volume's");
    let volume = served.open[name].0;
    let label = |label: &str| Some(label.to_owned());
    let refused = [
        Command::Page { volume, from: 0, limit: 10, with_deleted: true },
        Command::Find { volume, which: Which::Sequence(kept - 1) },
        Command::Find { volume, which: Which::Label("no such".to_owned()) },
        Command::FindAt { volume, then: NOW, before: u64::MAX },
        Command::Label { volume, sequence: 0, label: label("x") },
        Command::Label { volume, sequence: kept, label: label("may be taken") },
        Command::Snapshot { volume, label: label("may be taken"), time: NOW },
        Command::DeleteSnapshot { volume, sequence: kept - 1 },
        Command::DeleteSnapshots { volume, spare_labelled: true, sequences: vec![0, kept] },
        Command::Rollback { volume, sequence: kept - 1, label: None, time: NOW },
    ];
    for command in refused {
        let Reply::Failed(error) = served.command(command.clone()) else {
            panic!("{command:?} was carried out")
        };
        let told = error.to_string();
        assert!(told.contains(&format!("block {damaged}")), "{command:?}: {told}");
        assert!(told.contains("bessel check"), "says not what to do: {told}");
    }
    let Reply::Volume(info) = served.command(Command::Show { volume }) else { panic!("show") };
    assert_eq!(info.log.out_of_reach, kept);
    assert_eq!(info.log.live, info.log.taken - kept, "none of those in reach was deleted");
    let page = Command::Page { volume, from: kept, limit: 1024, with_deleted: false };
    let Reply::Page { snapshots, next: None } = served.command(page) else { panic!("a page") };
    assert_eq!(snapshots.len() as u64, info.log.live);
    let delete = Command::DeleteSnapshot { volume, sequence: kept };
    assert_eq!(served.command(delete), Reply::Done);
    for _ in 0..30 {
        let command = Command::Snapshot { volume, label: None, time: NOW };
        assert!(matches!(served.command(command), Reply::Snapshot(_)), "new ones go on");
    }
    served.shut_down();
    // What was written links to the damaged block as before, and to nothing else.
    let mut again = Served::start(&disk.fork(1)).expect("as before");
    let volume = again.open[name].0;
    let page = Command::Page { volume, from: kept, limit: 1024, with_deleted: false };
    let Reply::Page { snapshots: then, .. } = again.command(page) else { panic!("a page") };
    assert_eq!(then.len(), snapshots.len() + 29);
    let report = check(disk).expect("as before");
    assert_named(&report, Structure::Log, damaged);
}

/// Repairs what can be: nothing that is called repairable is left, a second repair finds nothing to
/// do, and nobody has lost anything that was there before it.
fn repair_and_serve(base: &Base, disk: &SimDisk, cost: &Cost) {
    let Ok(plan) = check::plan_repair(&mut disk.connect(), NOW, &mut |_, _| ()) else { return };
    let writes = disk.counters().writes;
    let after = check::repair(&mut disk.connect(), &plan, &mut |_, _| ()).expect("the disk works");
    assert_eq!(plan.is_empty(), disk.counters().writes == writes, "it writes what it plans");
    let left: Vec<&Finding> = after.findings.iter().filter(|found| found.repairable).collect();
    assert!(left.is_empty(), "not repaired: {left:#?}");
    let again = check::plan_repair(&mut disk.connect(), NOW, &mut |_, _| ()).expect("as before");
    assert!(again.is_empty(), "repaired again: {:#?}", again.steps);
    let unrepairable = plan.report.findings.iter().filter(|found| !found.repairable).count();
    if unrepairable == 0 {
        assert!(after.is_clean(), "{:#?}", after.findings);
        serve(base, &disk.fork(8), cost);
    } else if Served::start(&disk.fork(9)).is_ok() {
        serve(base, &disk.fork(8), cost);
    }
}

// ---- damage to bytes ----

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Damage {
    Zeroed,
    Random,
    BitFlip,
    Torn,
    Older,
    Misplaced,
}

const DAMAGES: [Damage; 6] = [
    Damage::Zeroed,
    Damage::Random,
    Damage::BitFlip,
    Damage::Torn,
    Damage::Older,
    Damage::Misplaced,
];

/// Damages the first `used` bytes of a block. False when that changes nothing.
fn damage(base: &Base, disk: &SimDisk, block: u64, used: usize, how: Damage, seed: u64) -> bool {
    let mut random = Random::new(seed ^ block << 8 ^ (how as u64) << 40);
    let addr = BlockAddr::new(block);
    let before = disk.peek(addr);
    let mut bytes = before;
    match how {
        Damage::Zeroed => bytes.fill(0),
        Damage::Random => bytes.fill_with(|| random.next_u64() as u8),
        Damage::BitFlip => bytes[random.below(used as u64) as usize] ^= 1 << random.below(8),
        Damage::Torn => {
            let sector = random.below(used as u64 / 512) as usize * 512;
            bytes[sector..sector + 512].fill_with(|| random.next_u64() as u8);
        }
        Damage::Older => bytes = base.older.peek(addr),
        Damage::Misplaced => {
            let others: Vec<u64> = base.nodes.keys().copied().filter(|&b| b != block).collect();
            bytes = disk.peek(BlockAddr::new(*random.pick(&others)));
        }
    }
    disk.poke(addr, &bytes);
    bytes[..used] != before[..used]
}

/// The check finds something about this block, and says so.
fn assert_named(report: &CheckReport, structure: Structure, block: u64) {
    let found = report.findings.iter().any(|finding| {
        finding.structure == structure
            && finding.block == Some(BlockAddr::new(block))
            && finding.to_string().contains(&block.to_string())
    });
    assert!(found, "{structure:?} at block {block} is not named: {:#?}", report.findings);
}

#[test]
fn superblock_copies_stand_in_for_one_another() {
    let base = Base::new();
    let mut ran = 0;
    for lost in 1u32..16 {
        for how in DAMAGES {
            case(&format!("superblock-{lost}-{how:?}"), &mut ran, || {
                let disk = base.disk.fork(1);
                let hit = |index: &usize| lost & 1 << index != 0;
                let mut changed = Vec::new();
                for index in (0..4).filter(hit) {
                    let copy = SUPERBLOCK_COPIES[index].get();
                    if damage(&base, &disk, copy, 512, how, 1) {
                        changed.push(copy);
                    }
                }
                if changed.len() == 4 {
                    let error = check(&disk).expect_err("there is no superblock");
                    let served = Served::start(&disk).err().expect("there is no superblock");
                    for text in [error.to_string(), served.to_string()] {
                        let told = ["superblock", "not a Bessel store"];
                        assert!(told.iter().any(|told| text.contains(told)), "{text}");
                    }
                    return;
                }
                let report = check(&disk).expect("one copy is whole");
                for copy in &changed {
                    assert_named(&report, Structure::Superblock, *copy);
                }
                let twin = disk.fork(2);
                assert_eq!(serve(&base, &disk, &Cost::default()), 0);
                repair_and_serve(&base, &twin, &Cost::default());
            });
        }
    }
    eprintln!("{ran} cases");
}

#[test]
fn what_the_store_hangs_on_is_refused_clearly_and_rebuilt() {
    let base = Base::new();
    let geometry = base.opened.geometry;
    let catalogue = geometry.catalogue_start.get();
    let host = [geometry.host_slot(0, 0).get(), geometry.host_slot(0, 1).get()];
    let mut ran = 0;
    for how in DAMAGES {
        for seed in 0..6 {
            case(&format!("catalogue-{how:?}-{seed}"), &mut ran, || {
                let disk = base.disk.fork(seed);
                if !damage(&base, &disk, catalogue, BLOCK, how, seed) {
                    return;
                }
                let report = check(&disk).expect("what is left is looked at");
                if how == Damage::Older {
                    // Extents taken since are unused in it: links lead to them all the same.
                    assert!(!report.is_clean());
                    return;
                }
                assert_named(&report, Structure::Catalogue, catalogue);
                let error = Served::start(&disk).err().expect("types of extents are not guessed");
                assert!(error.to_string().contains(&format!("block {catalogue}")), "{error}");
                repair_and_serve(&base, &disk, &Cost::default());
                assert_eq!(serve(&base, &disk.fork(1), &Cost::default()), 0, "nothing is lost");
            });
        }
        for lost in 1..4 {
            case(&format!("host-{lost}-{how:?}"), &mut ran, || {
                let disk = base.disk.fork(1);
                let hit = (0..2).filter(|index| lost & 1 << index != 0);
                let mut changed = Vec::new();
                for index in hit {
                    if damage(&base, &disk, host[index], 512, how, 1) && how != Damage::Older {
                        changed.push(host[index]);
                    }
                }
                let report = check(&disk).expect("trees hang on no host");
                for block in &changed {
                    assert_named(&report, Structure::Host, *block);
                }
                if changed.len() == 2 {
                    let error = Served::start(&disk).err().expect("the epoch is lost");
                    assert!(error.to_string().contains("host record at block"), "{error}");
                } else {
                    assert_eq!(serve(&base, &disk.fork(1), &Cost::default()), 0);
                }
                repair_and_serve(&base, &disk, &Cost::default());
            });
        }
    }
    eprintln!("{ran} cases");
}

#[test]
fn bitmaps_are_found_damaged_and_rebuilt() {
    let base = Base::new();
    let mut ran = 0;
    for bitmap in base.bitmaps() {
        for how in DAMAGES {
            for seed in 0..3 {
                case(&format!("bitmap-{bitmap}-{how:?}-{seed}"), &mut ran, || {
                    let disk = base.disk.fork(seed);
                    if !damage(&base, &disk, bitmap, BLOCK, how, seed) {
                        return;
                    }
                    let report = check(&disk).expect("trees hang on no bitmap");
                    if how == Damage::Older {
                        // Whole, and says that blocks are free that are not: only a check sees it.
                        let offered = report.findings.iter().any(|it| it.what.contains("is free"));
                        let kept = report.data.leaked + report.metadata.leaked > 0;
                        assert!(offered || kept || report.is_clean(), "{:?}", report.findings);
                    } else {
                        assert_named(&report, Structure::Bitmap, bitmap);
                        assert_eq!(serve(&base, &disk.fork(1), &Cost::default()), 0);
                    }
                    repair_and_serve(&base, &disk, &Cost::default());
                    assert!(check(&disk).expect("it was repaired").findings.is_empty());
                });
            }
        }
    }
    eprintln!("{ran} cases");
}

#[test]
fn a_volume_with_a_damaged_record_or_log_fails_alone() {
    let base = Base::new();
    let geometry = base.opened.geometry;
    let mut ran = 0;
    for name in ["n1", "n2", "n3", "n4"] {
        let (slot, record) = base.record(name);
        let newest = record.generation;
        let pair = [geometry.registry_slot(slot, newest), geometry.registry_slot(slot, newest + 1)];
        for lost in 1..4u32 {
            for how in DAMAGES {
                case(&format!("record-{name}-{lost}-{how:?}"), &mut ran, || {
                    let disk = base.disk.fork(1);
                    let mut changed = Vec::new();
                    for (index, addr) in pair.iter().enumerate() {
                        if lost & 1 << index != 0
                            && disk.peek(*addr)[..512] != [0; 512]
                            && damage(&base, &disk, addr.get(), 512, how, 1)
                        {
                            changed.push(addr.get());
                        }
                    }
                    // The record before it, which names what the volume was then.
                    let cost = Cost { silent: true, ..Cost::of(&[name]) };
                    let report = check(&disk).expect("one volume's");
                    // An old record is whole; two zero ones are a volume that never was.
                    let gone = pair.iter().all(|addr| disk.peek(*addr)[..512] == [0; 512]);
                    if how != Damage::Older && !gone && !changed.is_empty() {
                        assert_named(&report, Structure::Record, *changed.last().expect("some"));
                    }
                    if gone {
                        return;
                    }
                    serve_rest(&base, &disk.fork(1), &cost);
                    repair_rest(&disk);
                });
            }
        }
    }
    for name in ["n1", "n3"] {
        let entries: Vec<_> = base.opened.directory.entries().cloned().collect();
        let entry = entries.iter().find(|entry| entry.record.name == name).expect("it is there");
        let log = store::read_log(&mut base.disk.connect(), &base.opened, &entry.record);
        let (blocks, count) = (log.blocks, log.entries.len());
        for (index, block) in blocks.iter().map(|block| block.get()).enumerate() {
            let newest = index + 1 == blocks.len();
            let here = (count - index * LOG_ENTRIES_PER_BLOCK).min(LOG_ENTRIES_PER_BLOCK);
            let used = here.div_ceil(3) * 512;
            for how in DAMAGES {
                for seed in 0..3 {
                    case(&format!("log-{name}-{block}-{how:?}-{seed}"), &mut ran, || {
                        let disk = base.disk.fork(seed);
                        if !damage(&base, &disk, block, used, how, seed) {
                            return;
                        }
                        let cost = Cost::of(&[name]);
                        let report = check(&disk).expect("one volume's");
                        // Entries of an old log block are whole; those it lacks are named.
                        assert_named(&report, Structure::Log, block);
                        let owner = format!("volume {name:?}");
                        assert!(report.findings.iter().any(|it| it.place.contains(&owner)));
                        if newest {
                            assert_eq!(serve(&base, &disk.fork(1), &cost), 1, "it does not open");
                        } else {
                            assert_eq!(serve(&base, &disk.fork(1), &cost), 0, "it is served");
                            let kept = ((index + 1) * LOG_ENTRIES_PER_BLOCK) as u64;
                            serve_newer_snapshots(&disk.fork(1), name, block, kept);
                        }
                        repair_and_serve(&base, &disk, &cost);
                    });
                }
            }
        }
    }
    eprintln!("{ran} cases");
}

/// A volume whose record is an older one may read as it did then; all others as ever.
fn serve_rest(base: &Base, disk: &SimDisk, cost: &Cost) {
    let mut served = Served::start(disk).expect("one volume's");
    for name in base.contents.keys().filter(|name| name.starts_with('n')) {
        if cost.volumes.contains(name) {
            continue;
        }
        assert!(served.open.contains_key(name), "{name}: {:?}", served.refused);
        for (at, bytes) in served.read(name) {
            assert!(bytes.as_ref() == Some(&base.contents[name][&at]), "{name} at {at}");
        }
        assert!(served.use_it(name, 7), "{name} cannot be written");
    }
    served.shut_down();
}

fn repair_rest(disk: &SimDisk) {
    let plan = check::plan_repair(&mut disk.connect(), NOW, &mut |_, _| ()).expect("it opens");
    let after = check::repair(&mut disk.connect(), &plan, &mut |_, _| ()).expect("the disk works");
    assert!(after.findings.iter().all(|found| !found.repairable), "{:#?}", after.findings);
}

#[test]
fn damaged_nodes_fail_what_goes_through_them() {
    let base = Base::new();
    let mut ran = 0;
    let mut kinds = BTreeSet::new();
    for (&block, reached) in &base.nodes {
        let Reached { level, volumes, snapshots } = reached;
        let kind = (*level, volumes.clone(), snapshots.len().min(2));
        if !kinds.insert(kind) {
            continue; // One of each level for each set of owners.
        }
        for how in DAMAGES {
            for seed in 0..2 {
                case(&format!("node-{block}-{how:?}-{seed}"), &mut ran, || {
                    let disk = base.disk.fork(seed);
                    if !damage(&base, &disk, block, BLOCK, how, seed) {
                        return;
                    }
                    let (volumes, snapshots) = (volumes.clone(), snapshots.clone());
                    let cost = Cost { volumes, snapshots, silent: how == Damage::Older };
                    let report = check(&disk).expect("one tree's");
                    if how != Damage::Older {
                        assert_named(&report, Structure::Node, block);
                        let of = |it: &Finding| it.place.contains("volume");
                        assert!(report.findings.iter().all(of), "{:?}", report.findings);
                        serve(&base, &disk.fork(1), &cost);
                    } else {
                        // An old node is whole. Its owner reads old data, or what is now another's.
                        serve_reads(&base, &disk.fork(1), &cost);
                    }
                    if how != Damage::Older {
                        repair_and_serve(&base, &disk, &cost);
                    }
                });
            }
        }
    }
    assert!(kinds.len() > 15, "{kinds:?}");
    eprintln!("{ran} cases");
}

/// Reads everything; who is not concerned reads what was there.
fn serve_reads(base: &Base, disk: &SimDisk, cost: &Cost) {
    let mut served = Served::start(disk).expect("one volume's");
    for name in served.open.keys().cloned().collect::<Vec<_>>() {
        for (at, bytes) in served.read(&name) {
            let good = bytes.as_ref() == Some(&base.contents[&name][&at]);
            assert!(good || cost.volumes.contains(&name), "{name} at {at}");
        }
    }
}

#[test]
fn two_blocks_that_changed_places_are_found() {
    let base = Base::new();
    let geometry = base.opened.geometry;
    let (slot, record) = base.record("n3");
    let log = base.record("n1").1.log_tail.expect("it has snapshots").get();
    let bitmaps = base.bitmaps();
    let pairs = [
        (base.path("n2")[0], base.path("n4")[0]),
        (base.path("n1")[2], base.path("n3")[2]),
        (bitmaps[0], bitmaps[1]),
        (log, base.path("n4")[2]),
        (geometry.registry_slot(slot, record.generation).get(), geometry.registry_slot(0, 0).get()),
        (geometry.registry_slot(slot, 0).get(), geometry.registry_slot(slot, 1).get()),
        (0, 8),
        (geometry.catalogue_start.get(), bitmaps[0]),
    ];
    let mut ran = 0;
    for (one, other) in pairs {
        case(&format!("swapped-{one}-{other}"), &mut ran, || {
            let disk = base.disk.fork(1);
            let [a, b] = [one, other].map(BlockAddr::new);
            let (first, second) = (disk.peek(a), disk.peek(b));
            disk.poke(a, &second);
            disk.poke(b, &first);
            let report = check(&disk).expect("something is left to look at");
            for block in [a, b] {
                let named = report.findings.iter().any(|finding| finding.block == Some(block));
                assert!(named, "block {block} is not named: {:#?}", report.findings);
            }
            if let Ok(mut served) = Served::start(&disk) {
                for name in served.open.keys().cloned().collect::<Vec<_>>() {
                    served.read(&name);
                    served.use_it(&name, 3);
                }
                served.shut_down();
            }
            repair_rest(&disk);
        });
    }
    assert!(ran == 8 || std::env::var("CASE").is_ok());
}

/// Makes a sector of a block one that the device cannot read, for good.
fn make_unreadable(disk: &SimDisk, block: BlockAddr) {
    const ALWAYS: u32 = 1_000_000;
    disk.set_schedule(Schedule::AtOnce);
    disk.set_rates(move |_, addr| {
        if addr != block {
            return FaultRates::NONE;
        }
        FaultRates { read_error: ALWAYS, lasting: ALWAYS, ..FaultRates::NONE }
    });
    let mut pool = BufferPool::new(1, BLOCK);
    let buffer = pool.take().expect("it has one");
    let segment = pool.lend(&buffer);
    let mut device = disk.connect();
    device.read(Token(0), block.offset(), &[segment]);
    device.submit();
    let mut completions = Vec::new();
    while completions.is_empty() {
        device.reap(&mut completions);
    }
    pool.returned(&buffer);
    assert!(completions[0].result.is_err(), "the block is bad");
    disk.set_rates(|_, _| FaultRates::NONE);
}

/// A block that the device fails to read is one that is lost, and takes no more with it.
#[test]
fn unreadable_blocks_cost_what_damaged_ones_do() {
    let base = Base::new();
    let (slot, record) = base.record("n3");
    let newest = base.opened.geometry.registry_slot(slot, record.generation);
    let log = base.record("n1").1.log_tail.expect("it has snapshots");
    let leaf = BlockAddr::new(base.path("n3")[2]);
    let bitmap = BlockAddr::new(base.bitmaps()[0]);
    let blocks = [
        ("superblock", Structure::Superblock, SUPERBLOCK_COPIES[1], Cost::default()),
        ("record", Structure::Record, newest, Cost::of(&["n3"])),
        ("log", Structure::Log, log, Cost::of(&["n1"])),
        ("node", Structure::Node, leaf, Cost::of(&["n3"])),
        ("bitmap", Structure::Bitmap, bitmap, Cost::default()),
    ];
    let mut ran = 0;
    for (name, structure, block, cost) in blocks {
        case(&format!("unreadable-{name}"), &mut ran, || {
            let disk = base.disk.fork(1);
            make_unreadable(&disk, block);
            let report = check(&disk).expect("something is left to look at");
            assert_named(&report, structure, block.get());
            if structure == Structure::Superblock {
                return; // Opening renews it, which this device may refuse.
            }
            let mut served = Served::start(&disk).expect("all others open");
            for name in base.contents.keys().filter(|name| name.starts_with('n')) {
                let Some(_) = served.open.get(name) else {
                    assert!(cost.volumes.contains(name), "{:?}", served.refused);
                    let told = served.store.faults.iter().map(|fault| fault.to_string());
                    let told: Vec<_> =
                        told.filter(|told| told.contains("cannot be read")).collect();
                    assert!(told[0].contains(&block.to_string()), "{told:?}");
                    continue;
                };
                for (at, bytes) in served.read(name) {
                    let good = bytes.as_ref() == Some(&base.contents[name][&at]);
                    let lost = bytes.is_none() && cost.volumes.contains(name);
                    assert!(good || lost, "{name} at {at}");
                }
            }
        });
    }
    assert!(ran == 5 || std::env::var("CASE").is_ok());
}

// ---- forged with the store's own secret ----

/// A forged store: where the check must point, and whom it concerns.
struct Forged {
    structure: Structure,
    block: u64,
    cost: Cost,
    /// A request or an opening of those concerned must fail while it is served.
    fails: bool,
}

type Forging = fn(&Base, &SimDisk) -> Forged;

fn node_link(level: u8, block: u64) -> Entry {
    Entry::node(level, BlockAddr::new(block))
}

fn data_link(block: u64) -> Entry {
    Entry::data(BlockAddr::new(block))
}

fn forged(structure: Structure, block: u64, volumes: &[&str], fails: bool) -> Forged {
    Forged { structure, block, cost: Cost { silent: true, ..Cost::of(volumes) }, fails }
}

const FORGINGS: [(&str, Forging); 20] = [
    ("data-of-another-volume", |base, disk| {
        let leaf = base.path("n3")[2];
        let data = base.owned_data["n1"][0];
        base.forge(disk, leaf, &[(0, data_link(data))]);
        forged(Structure::Data, data, &["n1", "n3"], false)
    }),
    ("leaf-of-another-volume", |base, disk| {
        let (mine, other) = (base.path("n3"), base.path("n1"));
        base.forge(disk, mine[1], &[(0, node_link(1, other[2]))]);
        forged(Structure::Node, other[2], &["n1", "n3"], true)
    }),
    ("subtree-of-another-volume", |base, disk| {
        let (mine, other) = (base.path("n3"), base.path("n1"));
        base.forge(disk, mine[0], &[(0, node_link(2, other[1]))]);
        forged(Structure::Node, other[1], &["n1", "n3"], true)
    }),
    ("root-of-another-volume", |base, disk| {
        let root = base.record("n1").1.root;
        base.forge_record(disk, "n3", |record| record.root = root);
        forged(Structure::Node, root.get(), &["n1", "n3"], true)
    }),
    ("tree-below-a-taller-one", |base, disk| {
        let (mine, other) = (base.path("n4"), base.path("n1"));
        base.forge(disk, mine[0], &[(0, node_link(3, other[0]))]);
        forged(Structure::Node, other[0], &["n1", "n4"], false)
    }),
    ("leaf-twice-in-one-node", |base, disk| {
        let path = base.path("n3");
        base.forge(disk, path[1], &[(1, node_link(1, path[2]))]);
        forged(Structure::Node, path[2], &["n3"], false)
    }),
    ("data-twice-in-one-leaf", |base, disk| {
        let (leaf, data) = (base.path("n3")[2], base.owned_data["n3"][0]);
        base.forge(disk, leaf, &[(400, data_link(data)), (401, data_link(data))]);
        forged(Structure::Data, data, &["n3"], false)
    }),
    ("cycle-to-itself", |base, disk| {
        let path = base.path("n3");
        base.forge(disk, path[1], &[(0, node_link(1, path[1]))]);
        forged(Structure::Node, path[1], &["n3"], true)
    }),
    ("cycle-to-the-root", |base, disk| {
        let path = base.path("n3");
        base.forge(disk, path[0], &[(0, node_link(2, path[0]))]);
        forged(Structure::Node, path[0], &["n3"], true)
    }),
    ("cycle-over-two-levels", |base, disk| {
        let path = base.path("n3");
        base.forge(disk, path[1], &[(0, node_link(1, path[0]))]);
        forged(Structure::Node, path[0], &["n3"], true)
    }),
    ("node-of-another-level", |base, disk| {
        let (mine, other) = (base.path("n3"), base.path("n1"));
        base.forge(disk, mine[1], &[(0, node_link(1, other[1]))]);
        forged(Structure::Node, other[1], &["n3"], true)
    }),
    ("leaf-as-a-middle-node", |base, disk| {
        let (mine, other) = (base.path("n3"), base.path("n1"));
        base.forge(disk, mine[0], &[(0, node_link(2, other[2]))]);
        forged(Structure::Node, other[2], &["n3"], true)
    }),
    ("entry-of-another-level", |base, disk| {
        let path = base.path("n3");
        base.forge(disk, path[1], &[(0, node_link(2, path[1]))]);
        forged(Structure::Node, path[1], &["n3"], true)
    }),
    ("data-in-a-metadata-extent", |base, disk| {
        let path = base.path("n3");
        base.forge(disk, path[2], &[(0, data_link(path[2]))]);
        forged(Structure::Node, path[2], &["n3"], true)
    }),
    ("node-in-a-data-extent", |base, disk| {
        let (path, data) = (base.path("n3"), base.owned_data["n1"][0]);
        base.forge(disk, path[1], &[(0, node_link(1, data))]);
        forged(Structure::Node, path[1], &["n3"], true)
    }),
    ("link-past-the-end", |base, disk| {
        let path = base.path("n3");
        base.forge(disk, path[2], &[(0, data_link(1 << 40))]);
        forged(Structure::Node, path[2], &["n3"], true)
    }),
    ("link-into-a-bitmap", |base, disk| {
        let (path, bitmap) = (base.path("n3"), base.bitmaps()[0]);
        base.forge(disk, path[1], &[(0, node_link(1, bitmap))]);
        forged(Structure::Node, path[1], &["n3"], true)
    }),
    ("root-past-the-end", |base, disk| {
        base.forge_record(disk, "n3", |record| record.root = BlockAddr::new(1 << 40));
        forged(Structure::Node, 1 << 40, &["n3"], true)
    }),
    ("log-that-loops", |base, disk| {
        let (_, record) = base.record("n1");
        let tail = record.log_tail.expect("it has snapshots");
        let entries: Vec<LogEntry> = {
            let mut all = base.opened.directory.entries();
            let entry = all.find(|entry| entry.record.name == "n1").expect("it is there");
            let log = store::read_log(&mut base.disk.connect(), &base.opened, &entry.record);
            log.entries[LOG_ENTRIES_PER_BLOCK..].to_vec()
        };
        let mut block = [0; BLOCK];
        let first = LOG_ENTRIES_PER_BLOCK as u64;
        let secret = base.opened.secret;
        encode_log_block(&mut block, tail, Some(tail), record.id, first, &entries, secret);
        disk.poke(tail, &block);
        serve_newer_snapshots(&disk.fork(1), "n1", tail.get(), first);
        forged(Structure::Log, tail.get(), &["n1"], false)
    }),
    ("log-that-never-ends", |base, disk| {
        base.forge_record(disk, "n1", |record| record.log_count = 1 << 60);
        let tail = base.record("n1").1.log_tail.expect("it has snapshots");
        forged(Structure::Log, tail.get(), &["n1"], true)
    }),
];

/// Links that lead to what another tree owns: the check names the block, serving harms no third
/// volume and never panics, and a repair leaves the trees as they are.
#[test]
fn forged_links_harm_nobody_else() {
    let base = Base::new();
    let mut ran = 0;
    for (name, forge) in FORGINGS {
        case(&format!("forged-{name}"), &mut ran, || {
            let disk = base.disk.fork(1);
            let Forged { structure, block, cost, fails } = forge(&base, &disk);
            let report = check(&disk).expect("one volume's");
            assert_named(&report, structure, block);
            let concerned = |finding: &Finding| {
                cost.volumes.iter().any(|name| finding.place.contains(&format!("volume {name:?}")))
            };
            assert!(report.findings.iter().any(concerned), "{:#?}", report.findings);
            // In either order: whoever comes first has the node in memory.
            let failed = serve(&base, &disk.fork(1), &cost);
            assert!(!fails || failed > 0, "nobody was told");
            let trees = |disk: &SimDisk| -> Vec<[u8; BLOCK]> {
                base.nodes.keys().map(|&block| disk.peek(BlockAddr::new(block))).collect()
            };
            let before = trees(&disk);
            repair_rest(&disk);
            assert!(trees(&disk) == before, "a repair has changed a tree");
            let after = check(&disk).expect("as before");
            assert_named(&after, structure, block);
        });
    }
    assert!(ran as usize == FORGINGS.len() || std::env::var("CASE").is_ok());
}

/// Bitmaps that offer what trees reach, in use: no panic, and what they offer stays with the store.
#[test]
fn bitmaps_forged_free_are_marked_again() {
    let base = Base::new();
    let geometry = base.opened.geometry;
    for extent in base.bitmaps().iter().map(|&at| geometry.extent_of(BlockAddr::new(at))) {
        let disk = base.disk.fork(1);
        let addr = geometry.bitmap_block(extent, 0);
        let mut block = [0; BLOCK];
        Bitmap::new().encode(&mut block, addr, base.opened.secret);
        disk.poke(addr, &block);
        let report = check(&disk).expect("trees hang on no bitmap");
        assert_named(&report, Structure::Bitmap, addr.get());
        let in_use = disk.fork(1);
        let mut served = Served::start(&in_use).expect("it looks whole");
        for name in served.open.keys().cloned().collect::<Vec<_>>() {
            served.use_it(&name, 9);
        }
        served.shut_down();
        let report = check(&in_use).expect("trees may be damaged");
        assert!(report.findings.len() <= FINDINGS_MAX);
        repair_and_serve(&base, &disk, &Cost::default());
        assert!(check(&disk).expect("it was repaired").is_clean());
    }
}

/// A bitmap that offers its own blocks, and those past the end of its extent: nobody is given them,
/// not even by a store without another block to give.
#[test]
fn no_bitmap_offers_itself_or_what_lies_past_its_extent() {
    let base = Base::new();
    let geometry = base.opened.geometry;
    let disk = base.disk.fork(1);
    let mut forged = 0;
    for addr in base.bitmaps().into_iter().map(BlockAddr::new) {
        let whole =
            Bitmap::decode(&disk.peek(addr), addr, base.opened.secret).expect("it is whole");
        let never = geometry.fresh_bitmap(0);
        let mut bitmap = Bitmap::new();
        whole.allocated().filter(|bit| !never.get(*bit)).for_each(|bit| bitmap.set(bit));
        let mut block = [0; BLOCK];
        bitmap.encode(&mut block, addr, base.opened.secret);
        disk.poke(addr, &block);
        assert_named(&check(&disk).expect("it opens"), Structure::Bitmap, addr.get());
        forged += 1;
    }
    assert!(forged > 1);
    let mut served = Served::start(&disk).expect("it looks whole");
    let name = "n3";
    let mut write = |block: u64| served.io(name, IoKind::Write, block * 8, &mut vec![7; BLOCK]);
    let full = (0..).map(&mut write).find(|status| *status != IoStatus::Done);
    assert_eq!(full, Some(IoStatus::NoSpace));
    served.shut_down();
    let report = check(&disk).expect("no bitmap was given out");
    let about = |finding: &Finding| finding.structure != Structure::Bitmap;
    assert!(!report.findings.iter().any(about), "{:?}", report.findings);
}

// ---- repairs cut short ----

/// Everything that can be repaired, damaged at once, with leaked blocks besides.
fn damaged_all_over(base: &Base) -> SimDisk {
    let disk = base.disk.fork(1);
    let geometry = base.opened.geometry;
    let (slot, record) = base.record("n3");
    let bitmaps = base.bitmaps();
    // Leaks, of which nothing tells: bits are set that nothing needs.
    let leaky = BlockAddr::new(*bitmaps.last().expect("some"));
    let mut bitmap =
        Bitmap::decode(&disk.peek(leaky), leaky, base.opened.secret).expect("it is whole");
    let free = bitmap.find_free_run(0, 20).expect("there is room");
    bitmap.set_range(free.0, free.1);
    let mut block = [0; BLOCK];
    bitmap.encode(&mut block, leaky, base.opened.secret);
    disk.poke(leaky, &block);
    let spoiled = [
        SUPERBLOCK_COPIES[0].get(),
        SUPERBLOCK_COPIES[3].get(),
        geometry.catalogue_start.get(),
        geometry.registry_slot(slot, record.generation + 1).get(),
        bitmaps[0],
    ];
    for block in spoiled {
        assert!(damage(base, &disk, block, 512, Damage::BitFlip, 3));
    }
    disk
}

/// The nth operation of a repair is the last one before the power goes, for every n, whatever of
/// the writes under way survives: the store is no worse, and the next repair finishes.
#[test]
fn a_repair_cut_short_is_done_by_the_next() {
    let base = Base::new();
    let bad = damaged_all_over(&base);
    let plan = |disk: &SimDisk| {
        check::plan_repair(&mut disk.connect(), NOW, &mut |_, _| ()).expect("it is repairable")
    };
    let steps = plan(&bad).steps;
    assert!(steps.len() >= 6, "{steps:#?}");
    let freed = plan(&bad).blocks_freed;
    assert!(freed >= 20, "leaks are freed: {steps:#?}");
    let mut cuts = 0;
    'cut: for after in 0.. {
        let kept: [Keep<'_>; 2] = [Keep::Nothing, Keep::Everything];
        let random = (0..8).map(|_| Keep::Random);
        for (seed, keep) in (0u64..).zip(kept.into_iter().chain(random)) {
            let disk = bad.fork(seed + 100 * after);
            let planned = plan(&disk);
            disk.inject(Fault { kind: None, after, lasting: true });
            let outcome = check::repair(&mut disk.connect(), &planned, &mut |_, _| ());
            disk.heal();
            disk.crash(keep);
            let name = format!("repair cut after {after} operations, seed {seed}");
            let report = check(&disk).unwrap_or_else(|error| panic!("{name}: {error}"));
            let lost: Vec<_> = report.findings.iter().filter(|it| !it.repairable).collect();
            assert!(lost.is_empty(), "{name}: {lost:#?}");
            let again = plan(&disk);
            let done = check::repair(&mut disk.connect(), &again, &mut |_, _| ());
            let done = done.unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(done.is_clean(), "{name}: {:#?}", done.findings);
            assert_eq!(done.data.leaked + done.metadata.leaked, 0, "{name}");
            assert!(plan(&disk).is_empty(), "{name}");
            if seed < 3 {
                assert_eq!(serve(&base, &disk, &Cost::default()), 0, "{name}");
            }
            cuts += 1;
            if outcome.is_ok() {
                break 'cut;
            }
        }
    }
    assert!(cuts > 60, "{cuts} cuts");
}

/// What a killed daemon's journal may lead to is not freed, nor what a tree may lead to that cannot
/// be followed.
#[test]
fn what_something_may_need_is_not_freed() {
    let base = Base::new();
    let plan = |disk: &SimDisk| {
        check::plan_repair(&mut disk.connect(), NOW, &mut |_, _| ()).expect("it is repairable")
    };
    let killed = base.disk.fork(1);
    drop(Served::start(&killed).expect("it is whole"));
    assert!(plan(&killed).blocks_freed == 0);
    let why = plan(&killed).leaks_kept.expect("the deleted volume's blocks are leaks");
    assert!(why.contains("not closed in order"), "{why}");

    let hidden = base.disk.fork(1);
    let leaf = base.path("n3")[2];
    assert!(damage(&base, &hidden, leaf, BLOCK, Damage::Zeroed, 1));
    assert!(plan(&hidden).blocks_freed == 0);
    let why = plan(&hidden).leaks_kept.expect("the same");
    assert!(why.contains(&leaf.to_string()), "{why}");

    let whole = base.disk.fork(1);
    assert!(plan(&whole).blocks_freed > 0 && plan(&whole).leaks_kept.is_none());
    // A leaf maps 512 blocks: where places are is of no account to the store.
    const { assert!(NODE_ENTRIES == 1 << NODE_BITS) };
}

/// A damaged record beside a whole one may have been the newer: what only it led to is not freed, and
/// nobody says that nothing is lost. The bytes that are left may tell that it was the older.
#[test]
fn what_a_lost_record_may_have_led_to_is_not_freed() {
    let base = Base::new();
    let (slot, record) = base.record("n3");
    let [newest, older] =
        [0, 1].map(|back| base.opened.geometry.registry_slot(slot, record.generation + back));
    for how in [Damage::Zeroed, Damage::Random, Damage::Misplaced] {
        for block in [newest, older] {
            let disk = base.disk.fork(1);
            assert!(damage(&base, &disk, block.get(), 512, how, 1));
            let plan =
                check::plan_repair(&mut disk.connect(), NOW, &mut |_, _| ()).expect("it opens");
            assert_eq!(plan.blocks_freed, 0, "{how:?}: {:#?}", plan.steps);
            let why = plan.leaks_kept.as_ref().expect("the deleted volume's blocks are leaks");
            assert!(why.contains("n3"), "{why}");
            let named = |it: &&Finding| it.block == Some(block) && it.severity == Severity::Corrupt;
            assert!(plan.report.findings.iter().any(|it| named(&it)), "{:#?}", plan.report);
        }
    }
    for (block, severity) in [(newest, Severity::Corrupt), (older, Severity::Warning)] {
        let disk = base.disk.fork(1);
        let mut bytes = disk.peek(block);
        bytes[200] ^= 1;
        disk.poke(block, &bytes);
        let plan = check::plan_repair(&mut disk.connect(), NOW, &mut |_, _| ()).expect("it opens");
        assert_eq!(plan.report.findings[0].severity, severity);
        assert_eq!(plan.blocks_freed > 0, severity == Severity::Warning);
    }
}

/// The record that knew a snapshot is lost, and the snapshot has a clone: by the record before it, the
/// volume may write what the clone reads. It does not open, and the clone is served.
#[test]
fn a_record_older_than_a_clone_is_not_served() {
    let mut world = World::new(WorldConfig { schedule: Schedule::AtOnce, ..WorldConfig::new(3) });
    let origin = world.create(ByteCount::new(1 << 30)).expect("no power cut");
    write_all(&mut world, origin);
    world.flush(origin).expect("no power cut");
    let snapshot = world.snapshot(origin).expect("no power cut");
    let clone = world.clone_of(snapshot, "clone").expect("no power cut").expect("it is live");
    world.flush(clone).expect("no power cut");
    world.shut_down().expect("no power cut");
    let disk = world.disk.fork(1);
    disk.set_schedule(Schedule::AtOnce);
    let whole = store::open(&mut disk.connect(), OpenMode::ReadOnly).expect("it is whole");
    let entry = whole.directory.entry(origin).expect("it is whole");
    let newest = whole.geometry.registry_slot(entry.slot, entry.record.generation);
    let name = entry.record.name.clone();
    let before = Served::start(&disk.fork(2)).expect("it is whole").read("clone");
    disk.poke(newest, &[0x5a; BLOCK]);

    let mut served = Served::start(&disk.fork(3)).expect("one volume's");
    if served.open.contains_key(&name) {
        served.use_it(&name, 7);
    }
    assert!(served.read("clone") == before, "the clone reads what its origin wrote");
    assert!(served.refused[&name].contains("is a clone"), "{:?}", served.refused);
    assert!(served.use_it("clone", 8));
    served.shut_down();
    let report = check(&disk).expect("one volume's");
    let passed = |it: &Finding| it.what.contains("is a clone") && it.place.contains(&name);
    assert!(report.findings.iter().any(passed), "{:#?}", report.findings);
    repair_rest(&disk);
    assert!(disk.peek(newest) == [0x5a; BLOCK], "what may be mended by hand is left");
    let mut served = Served::start(&disk).expect("one volume's");
    assert!(!served.open.contains_key(&name) && served.read("clone") == before);
}

/// What a repair frees, no older record may lead to: it counts when the newer one is lost.
#[test]
fn older_records_do_not_lead_to_what_a_repair_has_freed() {
    let mut world = World::new(WorldConfig { schedule: Schedule::AtOnce, ..WorldConfig::new(4) });
    let [kept, doomed] =
        [(); 2].map(|()| world.create(ByteCount::new(1 << 30)).expect("no power cut"));
    for volume in [kept, doomed] {
        write_all(&mut world, volume);
        world.flush(volume).expect("no power cut");
    }
    let snapshot = world.snapshot(kept).expect("no power cut");
    write_all(&mut world, kept);
    world.flush(kept).expect("no power cut");
    world.perform(Action::DeleteSnapshot { snapshot }).expect("no power cut");
    world.perform(Action::Delete { volume: doomed }).expect("no power cut");
    world.settle().expect("no power cut");
    world.shut_down().expect("no power cut");
    let disk = world.disk.fork(1);
    disk.set_schedule(Schedule::AtOnce);
    let plan = check::plan_repair(&mut disk.connect(), NOW, &mut |_, _| ()).expect("it is whole");
    assert!(plan.blocks_freed > 0);
    let after = check::repair(&mut disk.connect(), &plan, &mut |_, _| ()).expect("the disk works");
    assert!(after.is_clean(), "{:#?}", after.findings);
    assert!(
        check::plan_repair(&mut disk.connect(), NOW, &mut |_, _| ()).expect("as before").is_empty()
    );
    let whole = store::open(&mut disk.connect(), OpenMode::ReadOnly).expect("it is whole");
    for entry in whole.directory.entries() {
        let disk = disk.fork(2);
        let newest = whole.geometry.registry_slot(entry.slot, entry.record.generation);
        disk.poke(newest, &[0x5a; BLOCK]);
        let report = check(&disk).expect("one volume's");
        let freed = |it: &&Finding| it.structure != Structure::Record;
        let freed: Vec<_> = report.findings.iter().filter(freed).collect();
        assert!(freed.is_empty(), "{}: {freed:#?}", entry.record.name);
        let found = store::open(&mut disk.connect(), OpenMode::ReadOnly).expect("one volume's");
        let found = &found.directory.entry(entry.record.id).expect("the other record").record;
        assert_eq!((found.root, found.deleted), (entry.record.root, entry.record.deleted));
    }
}

/// Only who has the secret can put a whole record into the wrong slot; it is named all the same.
#[test]
fn a_record_in_the_wrong_slot_is_damage() {
    let base = Base::new();
    let (slot, record) = base.record("n3");
    let place = |generation| base.opened.geometry.registry_slot(slot, generation);
    let disk = base.disk.fork(1);
    let wrong = place(record.generation + 1);
    let mut block = [0; BLOCK];
    let forged = VolumeRecord { generation: record.generation + 2, ..record.clone() };
    forged.encode_block(&mut block, wrong, base.opened.secret);
    disk.poke(wrong, &block);
    assert!(damage(&base, &disk, place(record.generation).get(), 512, Damage::Random, 1));
    let report = check(&disk).expect("one volume's");
    assert_named(&report, Structure::Record, wrong.get());
    serve_rest(&base, &disk.fork(1), &Cost::of(&["n3"]));
    repair_rest(&disk);
}

/// What keeps a volume from being opened does not hide what else is wrong with it.
#[test]
fn the_tree_of_a_volume_that_does_not_open_is_looked_at() {
    let base = Base::new();
    let disk = base.disk.fork(1);
    let log = base.record("n1").1.log_tail.expect("it has snapshots").get();
    let leaf = base.path("n1")[2];
    for block in [log, leaf] {
        assert!(damage(&base, &disk, block, 512, Damage::Random, 1));
    }
    let report = check(&disk).expect("one volume's");
    assert_named(&report, Structure::Log, log);
    assert_named(&report, Structure::Node, leaf);
    assert!(report.findings.iter().all(|it| it.place.contains("n1")), "{:#?}", report.findings);
}

/// A check goes on when the device does not give a block that the whole store hangs on.
#[test]
fn unreadable_blocks_of_the_store_itself_are_named() {
    let base = Base::new();
    let geometry = base.opened.geometry;
    let blocks = [
        (Structure::Catalogue, geometry.catalogue_start),
        (Structure::Host, geometry.host_slot(0, 0)),
        (Structure::Host, geometry.host_slot(0, 1)),
        (Structure::Group, geometry.group_start),
    ];
    for (structure, block) in blocks {
        let disk = base.disk.fork(1);
        make_unreadable(&disk, block);
        let report = check(&disk).expect("something is left to look at");
        assert_named(&report, structure, block.get());
        let others = report.findings.iter().filter(|it| it.block != Some(block)).count();
        assert_eq!(others, 0, "{:#?}", report.findings);
    }
}
