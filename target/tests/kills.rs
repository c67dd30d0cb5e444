//! The real daemon, killed again and again under guests that check every byte: several volumes with
//! several queues in both cache modes, snapshots and clones that are taken, rolled back and deleted,
//! volumes that are moved between reactors meanwhile, and `bessel check` after every kill.
//!
//! Two worlds. Over a file, only the process dies: its guests live on, reconnect with their in-flight
//! regions and must not notice more than a pause, so the oracle is not even told. Over a device that
//! forgets, the power goes: the guests begin anew, and what was flushed, or written through, is there.
//!
//! The instant of each kill comes from the seed: after so many completions, while a command runs, or
//! while the next daemon starts. `KILLS=5000` makes a soak of it, `SEED=n` repeats the choices of a run;
//! how the daemon's threads meet them is the machine's affair.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use bessel_mapping::format::Parent;
use bessel_mapping::request::{
    CacheMode, CurrentTree, IoKind, IoStatus, LogState, SnapshotId, SnapshotInfo, VolumeId,
    VolumeInfo,
};
use bessel_reactor::clock::WallTime;
use bessel_reactor::device::sim::Random;
use bessel_reactor::units::{BlockAddr, ByteCount};
use bessel_tests::guest::{BaseAfterReconnect, Guest, Options, Ticket, Used, block, range};
use bessel_tests::model::{Model, stamp};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Output;
use support::device::FaultyDevice;
use support::{World, tell};

const SECTOR: usize = 512;
/// Sectors of a volume: two leaves' worth.
const VOLUME_SECTORS: u64 = 16384;
/// Longest request.
const REQUEST_SECTORS: u64 = 64;
/// Requests of a guest in flight.
const DEPTH: usize = 10;
/// Clones alive at once, beside the volumes of the configuration.
const CLONES_MAX: usize = 2;
const STORE_BYTES: u64 = 4 << 30;

/// A request of a guest that has not been answered.
struct Flight {
    ticket: Ticket,
    op: u64,
    kind: IoKind,
    sectors: u64,
}

/// A volume and its guest.
struct Disk {
    id: VolumeId,
    name: String,
    queues: u16,
    guest: Option<Guest>,
    flights: Vec<Flight>,
    /// When a rollback whose outcome is not known was asked for.
    rolling_back: Option<u64>,
}

/// What an operator asks for.
enum Request {
    Snapshot { volume: VolumeId, time: u64 },
    DeleteSnapshot { snapshot: SnapshotId },
    Rollback { snapshot: SnapshotId, time: u64 },
    Clone { snapshot: SnapshotId, name: String },
    Delete { volume: VolumeId },
    Move { volume: VolumeId, core: usize },
}

struct Arena {
    /// None: a file, which a kill takes nothing from. Unmounted before the world takes its directory away.
    device: Option<FaultyDevice>,
    world: World,
    config: String,
    cores: Vec<usize>,
    model: Model,
    random: Random,
    disks: Vec<Disk>,
    /// When each snapshot was asked for, which is what the model knows it by, and its label.
    snapshots: BTreeMap<SnapshotId, (u64, Option<String>)>,
    clock: u64,
    completions: u64,
    kills: u64,
}

impl Arena {
    fn new(mut world: World, device: Option<FaultyDevice>, seed: u64) -> Self {
        let mut cores = bessel_reactor::reactor::usable_cores();
        cores.truncate(2);
        let mut config = format!("reactors:\n  cores: {cores:?}\nvolumes:\n");
        for (name, cache) in [("a", "writeback"), ("b", "writethrough"), ("c", "writeback")] {
            let size = VOLUME_SECTORS * SECTOR as u64;
            config.push_str(&format!(
                "  - name: {name}\n    size: {size}\n    queues: 2\n    cache: {cache}\n"
            ));
        }
        world.serve(&config);
        let mut arena = Self {
            world,
            device,
            config,
            cores,
            model: Model::default(),
            random: Random::new(seed),
            disks: Vec::new(),
            snapshots: BTreeMap::new(),
            clock: 0,
            completions: 0,
            kills: 0,
        };
        arena.reconcile();
        arena
    }

    // ---- guests ----

    fn connect(&mut self, at: usize) {
        let disk = &mut self.disks[at];
        let socket = self.world.path(&format!("{}.sock", disk.name));
        let options = Options { queues: disk.queues, inflight: true, ..Options::default() };
        disk.guest = Some(Guest::connect(Path::new(&socket), options).unwrap());
    }

    /// Lets guests work until `count` more of their requests have ended.
    fn work(&mut self, count: u64) {
        let end = self.completions + count;
        while self.completions < end {
            for at in 0..self.disks.len() {
                if self.disks[at].flights.len() < DEPTH {
                    self.submit(at);
                }
            }
            if !self.collect() {
                self.wait();
            }
        }
    }

    fn submit(&mut self, at: usize) {
        let kind = match self.random.below(100) {
            0..55 => IoKind::Write,
            55..78 => IoKind::Read,
            78..88 => IoKind::Flush,
            88..94 => IoKind::WriteZeroes,
            _ => IoKind::Discard,
        };
        // A few places, so that requests meet; one is on the edge of two leaves.
        let start = *self.random.pick(&[0, 4096 - 100, VOLUME_SECTORS - 400]);
        let length = match self.random.below(3) {
            0 => 8,
            1 => 8 * (1 + self.random.below(REQUEST_SECTORS / 8)),
            _ => 1 + self.random.below(REQUEST_SECTORS),
        };
        let first = start + self.random.below(300);
        let first = if self.random.chance(1, 2) { first / 8 * 8 } else { first };
        self.begin(at, kind, first, length);
    }

    fn begin(&mut self, at: usize, kind: IoKind, sector: u64, sectors: u64) {
        let disk = &mut self.disks[at];
        let queue = self.random.below(disk.queues.into()) as usize;
        let Some(guest) = disk.guest.as_mut().filter(|guest| guest.room(queue) > 0) else { return };
        let (sector, sectors) = if kind == IoKind::Flush { (0, 0) } else { (sector, sectors) };
        let op = self.model.begin(disk.id, kind, sector, sectors);
        let length = sectors as usize * SECTOR;
        let ticket = match kind {
            IoKind::Write => {
                let mut bytes = vec![0; length];
                for (sector, bytes) in (sector..).zip(bytes.chunks_exact_mut(SECTOR)) {
                    stamp(op, sector, bytes);
                }
                guest.submit(queue, block::OUT, sector, &bytes, 0)
            }
            IoKind::Read => guest.submit(queue, block::IN, sector, &[], length),
            IoKind::Flush => guest.submit(queue, block::FLUSH, 0, &[], 0),
            IoKind::Discard | IoKind::WriteZeroes => {
                let discard = kind == IoKind::Discard;
                let code = if discard { block::DISCARD } else { block::WRITE_ZEROES };
                guest.submit(queue, code, 0, &range(sector, sectors as u32, 0), 0)
            }
        };
        guest.kick(queue);
        disk.flights.push(Flight { ticket, op, kind, sectors });
    }

    /// Takes in what has ended. False when nothing has.
    fn collect(&mut self) -> bool {
        let before = self.completions;
        for at in 0..self.disks.len() {
            for queue in 0..usize::from(self.disks[at].queues) {
                while let Some(guest) = &mut self.disks[at].guest
                    && let Some(used) = guest.poll_used(queue)
                {
                    self.ended(at, queue, used);
                }
            }
        }
        self.completions > before
    }

    /// Waits for the end of one request, if there is one.
    fn wait(&mut self) {
        let with_work = self.disks.iter().position(|disk| !disk.flights.is_empty());
        let Some(at) = with_work else { return };
        let disk = &mut self.disks[at];
        let queue = disk.flights[0].ticket.queue;
        let used = disk.guest.as_mut().expect("it has requests").wait_used(queue);
        self.ended(at, queue, used);
    }

    fn ended(&mut self, at: usize, queue: usize, used: Used) {
        let disk = &mut self.disks[at];
        let named =
            |flight: &Flight| (flight.ticket.queue, flight.ticket.head) == (queue, used.head);
        let place = disk.flights.iter().position(named);
        let place = place.unwrap_or_else(|| panic!("{used:?} of {} was answered twice", disk.name));
        let Flight { ticket, op, kind, sectors } = disk.flights.remove(place);
        let guest = disk.guest.as_mut().expect("it has requests");
        let status = guest.status(ticket);
        assert_eq!(status, block::DONE, "{kind:?} on {}: {}", disk.name, self.world.log());
        let length = if kind == IoKind::Read { sectors as usize * SECTOR } else { 0 };
        let bytes = guest.data(ticket, length);
        guest.release(ticket);
        self.model.end(op, IoStatus::Done, &bytes);
        self.completions += 1;
    }

    /// Waits for everything a guest has asked for, and takes it off its volume.
    fn send_away(&mut self, at: usize) {
        while !self.disks[at].flights.is_empty() {
            if !self.collect() {
                self.wait();
            }
        }
        self.disks[at].guest = None;
        let show = format!("volume show {}", self.disks[at].name);
        while self.world.json(&show)["connected"] == true {}
    }

    /// Reads everything that was ever written to a volume, in pieces.
    fn touched(&self, at: usize) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for sector in self.model.touched(self.disks[at].id) {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == sector && *count < REQUEST_SECTORS => {
                    *count += 1;
                }
                _ => runs.push((sector, 1)),
            }
        }
        runs
    }

    /// Compares a volume that nobody else uses with what it may hold, which from then on it must.
    fn observe(&mut self, at: usize) {
        for (first, count) in self.touched(at) {
            let guest = self.disks[at].guest.as_mut().expect("it is connected");
            let (status, bytes) = guest.read(0, first, count as usize * SECTOR);
            assert_eq!(status, block::DONE, "{}", self.world.log());
            self.model.observe(self.disks[at].id, first, &bytes);
        }
    }

    // ---- operators ----

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn at(&self, volume: VolumeId) -> usize {
        self.disks.iter().position(|disk| disk.id == volume).expect("the volume is there")
    }

    /// Something an operator may ask for now. Guests that must not be there meanwhile are sent away.
    fn request(&mut self) -> Option<Request> {
        let at = self.random.below(self.disks.len() as u64) as usize;
        let volume = self.disks[at].id;
        let sequences = self.model.snapshots(volume);
        let snapshot = (!sequences.is_empty())
            .then(|| SnapshotId { volume, sequence: *self.random.pick(&sequences) });
        let core = *self.random.pick(&self.cores);
        Some(match (self.random.below(13), snapshot) {
            (0..4, _) => Request::Snapshot { volume, time: self.tick() },
            (4..6, Some(snapshot)) if self.disks.len() < 3 + CLONES_MAX => {
                let name = format!("clone{}", self.tick());
                Request::Clone { snapshot, name }
            }
            (6, Some(snapshot)) => Request::DeleteSnapshot { snapshot },
            (7, Some(snapshot)) => {
                self.send_away(at);
                Request::Rollback { snapshot, time: self.tick() }
            }
            (8, _) if at >= 3 => {
                self.send_away(at);
                Request::Delete { volume }
            }
            (9..12, _) => Request::Move { volume, core },
            _ => return None,
        })
    }

    /// The request as a command, told to the model.
    fn ask(&mut self, request: &Request) -> String {
        match request {
            Request::Snapshot { volume, time } => {
                let name = self.disks[self.at(*volume)].name.clone();
                self.model.begin_snapshot(*volume, *time, Some(format!("s{time}")));
                format!("snapshot create {name} --label s{time} --json")
            }
            Request::DeleteSnapshot { snapshot } => {
                self.model.begin_mark(*snapshot, None);
                format!("snapshot delete {snapshot} --json")
            }
            Request::Rollback { snapshot, time } => {
                let at = self.at(snapshot.volume);
                self.model.begin_rollback(*snapshot, *time, Some(format!("s{time}")));
                self.disks[at].rolling_back = Some(*time);
                format!("volume rollback {} {snapshot} --label s{time} --json", self.disks[at].name)
            }
            Request::Clone { snapshot, name } => {
                format!("volume create {name} --from {snapshot} --json")
            }
            Request::Delete { volume } => {
                self.model.begin_delete(*volume);
                format!("volume delete {} --json", self.disks[self.at(*volume)].name)
            }
            Request::Move { volume, core } => {
                let name = &self.disks[self.at(*volume)].name;
                format!("volume move {name} --to {core} --json")
            }
        }
    }

    /// Takes in a success. What was not answered is known when the daemon is back.
    fn answered(&mut self, request: &Request, output: &Output) {
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        let id = |value: &Value| value.as_str().unwrap().parse::<SnapshotId>().unwrap();
        match request {
            Request::Snapshot { time, .. } => {
                let snapshot = id(&answer["id"]);
                self.model.end_snapshot(snapshot, *time);
                self.snapshots.insert(snapshot, (*time, Some(format!("s{time}"))));
            }
            Request::DeleteSnapshot { snapshot } => self.model.end_mark(*snapshot, None),
            Request::Rollback { snapshot, time } => {
                let kept = id(&answer["kept"]["id"]);
                self.model.end_snapshot(kept, *time);
                self.snapshots.insert(kept, (*time, Some(format!("s{time}"))));
                let at = self.at(snapshot.volume);
                self.disks[at].rolling_back = None;
            }
            Request::Clone { .. } => self.found(&answer),
            Request::Delete { volume } => {
                self.model.end_delete(*volume);
                let at = self.at(*volume);
                self.disks.remove(at);
            }
            Request::Move { core, .. } => assert_eq!(answer["core"], *core),
        }
    }

    /// Does what an operator asks while guests work.
    fn operate(&mut self) {
        let Some(request) = self.request() else { return };
        let command = self.ask(&request);
        let output = self.world.run(&command);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {error}\n{}", self.world.log());
        self.answered(&request, &output);
        self.come_back();
    }

    /// Connects guests to the volumes that have none.
    fn come_back(&mut self) {
        for at in 0..self.disks.len() {
            if self.disks[at].guest.is_none() {
                self.connect(at);
            }
        }
    }

    /// Clones a snapshot, looks at all of the clone, and deletes it.
    fn verify_a_snapshot(&mut self) {
        let at = self.random.below(self.disks.len() as u64) as usize;
        let volume = self.disks[at].id;
        let sequences = self.model.snapshots(volume);
        if sequences.is_empty() {
            return;
        }
        let snapshot = SnapshotId { volume, sequence: *self.random.pick(&sequences) };
        let name = format!("look{}", self.tick());
        let made = self.world.json(&format!("volume create {name} --from {snapshot}"));
        self.found(&made);
        let last = self.disks.len() - 1;
        self.connect(last);
        self.observe(last);
        self.send_away(last);
        self.world.text(&format!("volume delete {name}"));
        self.model.begin_delete(self.disks[last].id);
        self.model.end_delete(self.disks[last].id);
        self.disks.pop();
    }

    // ---- the end of a daemon, and the next one ----

    /// Kills the daemon somewhere, and has the next one serve.
    fn kill_and_restart(&mut self) {
        let count = 1 + self.random.below(80);
        if self.random.chance(1, 3)
            && let Some(request) = self.request()
        {
            let command = self.ask(&request);
            let running = self.world.spawn(&command);
            let meanwhile = self.random.below(12);
            self.work(meanwhile);
            self.world.kill();
            let output = running.wait_with_output().unwrap();
            if output.status.success() {
                self.answered(&request, &output);
            }
        } else {
            self.work(count);
            self.world.kill();
        }
        self.died();
        while self.random.chance(1, 5) {
            self.kill_a_start();
        }
        let config = self.config.clone();
        self.world.serve(&config);
        self.reconcile();
    }

    /// Kills a daemon that has not begun to serve, or just has.
    fn kill_a_start(&mut self) {
        let api = PathBuf::from(self.world.path("api.sock"));
        let _ = std::fs::remove_file(&api);
        let directory = self.world.directory.clone();
        let journals = || std::fs::read_dir(&directory).unwrap().count();
        let before = journals();
        let config = self.config.clone();
        let until = self.random.below(3);
        self.world.start(&config);
        match until {
            0 => {}
            1 => while journals() <= before && !api.exists() {},
            _ => while !api.exists() {},
        }
        self.world.kill();
        self.died();
    }

    /// What a kill leaves behind, and `bessel check` of it.
    fn died(&mut self) {
        self.kills += 1;
        if let Some(device) = &self.device {
            device.cut_power();
            for entry in std::fs::read_dir(&self.world.directory).unwrap() {
                let path = entry.unwrap().path();
                if path.extension().is_some_and(|extension| extension == "journal") {
                    std::fs::remove_file(path).unwrap(); // They are memory.
                }
            }
            for disk in &mut self.disks {
                disk.guest = None;
                disk.flights.clear();
            }
            self.model.crash();
        }
        let store = self.world.store.clone();
        self.world.text(&format!("check {store}"));
    }

    /// Compares what the daemon says there is with what there may be, and has all guests back.
    fn reconcile(&mut self) {
        let listed = self.world.json("volume list");
        for volume in listed.as_array().unwrap() {
            assert_eq!(volume["state"], "online", "{volume}");
            if self.disks.iter().all(|disk| disk.id.0 != volume["id"].as_u64().unwrap()) {
                self.found(volume);
            }
        }
        let volumes = listed.as_array().unwrap().iter();
        let present: BTreeSet<_> =
            volumes.map(|volume| VolumeId(volume["id"].as_u64().unwrap())).collect();
        self.model.recover_volumes(&present);
        self.disks.retain(|disk| present.contains(&disk.id));
        for at in 0..self.disks.len() {
            let (info, snapshots) = self.info(at);
            for snapshot in &snapshots {
                let known = (snapshot.time.as_unix_nanos(), snapshot.label.clone());
                self.snapshots.insert(snapshot.id, known);
            }
            self.model.recover_volume(&info, &snapshots);
            self.disks[at].rolling_back = None;
            let writethrough = info.cache == CacheMode::Writethrough;
            self.model.set_writethrough(self.disks[at].id, writethrough);
            let socket = self.world.path(&format!("{}.sock", self.disks[at].name));
            let base =
                *self.random.pick(&[BaseAfterReconnect::Used, BaseAfterReconnect::Available]);
            match &mut self.disks[at].guest {
                Some(guest) => guest.reconnect(Path::new(&socket), base).unwrap(),
                None => self.connect(at),
            }
        }
        for at in 0..self.disks.len() {
            if self.disks[at].flights.is_empty() {
                self.observe(at);
            } else {
                for (first, count) in self.touched(at) {
                    self.begin(at, IoKind::Read, first, count);
                    self.collect();
                }
            }
        }
    }

    /// A volume that was not known, as the API shows it.
    fn found(&mut self, volume: &Value) {
        let id = VolumeId(volume["id"].as_u64().unwrap());
        let name = volume["name"].as_str().unwrap().to_owned();
        let origin = volume["origin"].as_str().map(|origin| origin.parse().unwrap());
        self.model.begin_create(id, &name, volume["size_bytes"].as_u64().unwrap(), origin);
        self.model.end_create(id);
        let queues = volume["queues"].as_u64().unwrap() as u16;
        let (guest, flights) = (None, Vec::new());
        self.disks.push(Disk { id, name, queues, guest, flights, rolling_back: None });
    }

    /// What the daemon says of a volume, in the model's terms: its times are those of the requests,
    /// and snapshots that it does not list are deleted.
    fn info(&self, at: usize) -> (VolumeInfo, Vec<SnapshotInfo>) {
        let disk = &self.disks[at];
        let shown = self.world.json(&format!("volume show {}", disk.name));
        let size = ByteCount::new(shown["size_bytes"].as_u64().unwrap());
        let mut live = BTreeMap::new();
        for snapshot in shown["snapshot_list"].as_array().unwrap() {
            let id: SnapshotId = snapshot["id"].as_str().unwrap().parse().unwrap();
            let label = snapshot["label"].as_str().map(str::to_owned);
            let asked = label.as_ref().map(|label| label[1..].parse().unwrap());
            let known = self.snapshots.get(&id).map(|(time, _)| *time);
            let time = asked.or(known).or(disk.rolling_back);
            live.insert(id.sequence, (time.expect("nobody asked for it"), label));
        }
        let known = self.snapshots.range(
            SnapshotId { volume: disk.id, sequence: 0 }..=SnapshotId {
                volume: disk.id,
                sequence: u64::MAX,
            },
        );
        let last_known = known.last().map(|(id, _)| id.sequence);
        let last = live.keys().max().copied().max(last_known);
        let snapshots = (0..last.map_or(0, |last| last + 1)).map(|sequence| {
            let id = SnapshotId { volume: disk.id, sequence };
            let deleted = !live.contains_key(&sequence);
            let (time, label) = live
                .get(&sequence)
                .or_else(|| self.snapshots.get(&id))
                .unwrap_or_else(|| panic!("snapshot {id} was made and deleted by nobody"));
            SnapshotInfo {
                id,
                time: WallTime::from_unix_nanos(*time),
                label: label.clone(),
                size,
                root: BlockAddr::new(1),
                height: 3,
                deleted,
                settling: false,
                blocks_allocated: 0,
                parent: Parent::Unknown,
            }
        });
        let snapshots: Vec<SnapshotInfo> = snapshots.collect();
        let live = snapshots.iter().filter(|snapshot| !snapshot.deleted).count() as u64;
        let log = LogState { taken: snapshots.len() as u64, live, out_of_reach: 0, fault: None };
        let info = VolumeInfo {
            id: disk.id,
            name: shown["name"].as_str().unwrap().to_owned(),
            size,
            cache: match shown["cache"].as_str().unwrap() {
                "writethrough" => CacheMode::Writethrough,
                _ => CacheMode::Writeback,
            },
            origin: None,
            created: WallTime::from_unix_nanos(0),
            latched: None,
            blocks_allocated: 0,
            log,
            current: CurrentTree { root: BlockAddr::new(1), height: 3, parent: Parent::Unknown },
        };
        (info, snapshots)
    }

    fn run(&mut self, kills: u64) {
        while self.kills < kills {
            if self.random.chance(1, 2) {
                self.work(20);
                self.operate();
            }
            self.kill_and_restart();
            if self.random.chance(1, 4) {
                self.verify_a_snapshot();
            }
        }
        for at in 0..self.disks.len() {
            self.send_away(at);
        }
        self.world.end("-TERM");
        let store = self.world.store.clone();
        self.world.text(&format!("check {store}"));
    }
}

/// So many kills, or as many as `KILLS` says.
fn rounds(usual: u64) -> u64 {
    std::env::var("KILLS").map_or(usual, |kills| kills.parse().expect("KILLS is a number"))
}

/// The seed of `SEED`, or a fresh one.
fn seed() -> u64 {
    let fresh = || {
        let mut bytes = [0; 4];
        std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
        u32::from_le_bytes(bytes).into()
    };
    std::env::var("SEED").map_or_else(|_| fresh(), |seed| seed.parse().expect("SEED is a number"))
}

fn run(test: &str, kills: u64, world: impl FnOnce(u64) -> Option<(World, Option<FaultyDevice>)>) {
    let (seed, kills) = (seed(), rounds(kills));
    let Some((world, device)) = world(seed) else { return };
    let replay = format!("SEED={seed} KILLS={kills} cargo test -p bessel --test kills {test}");
    tell(&format!("{replay} -- to repeat what now begins"));
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut arena = Arena::new(world, device, seed);
        arena.run(kills);
        (arena.kills, arena.completions, arena.model.sectors_checked)
    }));
    let Ok((kills, completions, sectors)) = outcome else { panic!("{replay}") };
    tell(&format!("{test}: {kills} kills, {completions} requests, {sectors} sectors compared"));
    assert!(sectors > 0, "a harness that looks at nothing finds nothing");
}

#[test]
fn a_killed_daemon_is_a_pause_to_its_guests() {
    run("a_killed_daemon", 100, |seed| {
        let mut world = World::new("kills-file");
        // On a real file system where there is one: the kernel's asynchronous I/O.
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let store = directory.join(format!("kills-{}-{seed}.img", std::process::id()));
        world.store = store.display().to_string();
        world.remove_at_end(store);
        let format = format!("format {} --size {STORE_BYTES} --extent-size 16MiB", world.store);
        world.text(&format);
        Some((world, None))
    });
}

#[test]
fn a_power_cut_takes_nothing_that_was_flushed() {
    run("a_power_cut", 50, |seed| {
        let mut world = World::new("kills-power");
        world.store = world.path("device");
        let backing = world.directory.join("backing");
        match FaultyDevice::mount(Path::new(&world.store), &backing, STORE_BYTES, seed) {
            Ok(device) => {
                world.text("format device --extent-size 16MiB");
                Some((world, Some(device)))
            }
            Err(why) => {
                tell(&format!(
                    "test a_power_cut_takes_nothing_that_was_flushed ... skipped: {why}"
                ));
                None
            }
        }
    });
}
