//! Shards on a disk that may hold anything: whatever is asked of them ends, one way or the other.

use std::collections::VecDeque;
use std::time::Duration;

use bessel_mapping::directory::VolumeEntry;
use bessel_mapping::message::Message;
use bessel_mapping::request::{
    CloneOrigin, Command, IoKind, IoRequest, IoStatus, Reply, SnapshotId, VolumeHandle,
};
use bessel_mapping::shard::{Shard, ShardConfig};
use bessel_mapping::store::{self, OpenMode, OpenedStore};
use bessel_reactor::buffer::{Buffer, BufferPool, Segment};
use bessel_reactor::clock::{Instant, WallTime};
use bessel_reactor::device::sim::{SimDevice, SimDisk};
use bessel_reactor::units::{ByteCount, SECTOR_SIZE, Sector};

/// Shards of the store: blocks pass between them.
const SHARDS: usize = 2;
/// Turns after which something is called endless. The disk does all it has at once, so that the
/// longest operation takes a few dozen, and 200 ms of time pass in 200.
const TURNS_MAX: u32 = 5000;
/// Most sectors of one request.
pub(super) const SECTORS_MAX: u64 = 64;

/// A store in service.
pub(super) struct Rig {
    pub(super) store: OpenedStore,
    disk: SimDisk,
    shards: Vec<Shard<SimDevice>>,
    now: Instant,
    tickets: u64,
    memory: Segment,
    _pool: (BufferPool, Buffer),
}

impl Rig {
    /// Opens the store on a disk, if it can be.
    pub(super) fn open(disk: &SimDisk) -> Option<Self> {
        let time = WallTime::from_unix_nanos(1_000);
        let store = store::open(&mut disk.connect(), OpenMode::ReadWrite { time }).ok()?;
        let shard = |index| {
            let node_cache = ByteCount::new(1 << 20);
            let config = ShardConfig {
                index,
                node_cache,
                requests_max: 8,
                shared_leaves: 0,
                steps_per_turn: 8,
            };
            Shard::new(&config, disk.connect(), &store)
        };
        let shards = (0..SHARDS).map(shard).collect();
        let mut pool = BufferPool::new(1, (SECTORS_MAX * SECTOR_SIZE) as usize);
        let buffer = pool.take().expect("it has one");
        let memory = pool.lend(&buffer);
        let now = Instant::from_nanos(1);
        let disk = disk.clone();
        Some(Self { store, disk, shards, now, tickets: 0, memory, _pool: (pool, buffer) })
    }

    fn turn(&mut self) {
        let mut mail: VecDeque<(usize, Message)> = VecDeque::new();
        for shard in &mut self.shards {
            shard.poll(self.now);
            mail.extend(std::iter::from_fn(|| shard.pop_message()));
        }
        for (to, message) in mail {
            self.shards[to].deliver(message);
        }
        self.now = self.now.after(Duration::from_millis(1));
    }

    fn until<T>(
        &mut self,
        what: &dyn std::fmt::Debug,
        mut done: impl FnMut(&mut Self) -> Option<T>,
    ) -> T {
        for _ in 0..TURNS_MAX {
            self.turn();
            if let Some(value) = done(self) {
                return value;
            }
        }
        panic!("{what:?} never ended");
    }

    /// Has a shard carry out a command.
    pub(super) fn ask(&mut self, shard: usize, command: Command) -> Reply {
        self.tickets += 1;
        let ticket = self.tickets;
        let what = format!("{command:?}");
        self.shards[shard].control(ticket, command);
        self.until(&what, |rig| {
            let (answered, reply) = rig.shards[shard].pop_reply()?;
            assert_eq!(answered, ticket, "one command at a time");
            Some(reply)
        })
    }

    /// Opens or makes a volume; which shard and what it is called there, if that worked.
    pub(super) fn volume(&mut self, shard: usize, command: Command) -> Option<Volume> {
        match self.ask(shard, command) {
            Reply::Opened(handle) => Some(Volume { shard, handle }),
            _ => None,
        }
    }

    /// A request of at most [`SECTORS_MAX`] sectors, from start to end.
    pub(super) fn io(
        &mut self,
        volume: Volume,
        kind: IoKind,
        sector: u64,
        sectors: u64,
    ) -> IoStatus {
        let sectors = sectors.min(SECTORS_MAX);
        let whole = self.memory.part(0, (sectors * SECTOR_SIZE) as usize);
        let segments =
            if matches!(kind, IoKind::Read | IoKind::Write) { vec![whole] } else { vec![] };
        self.tickets += 1;
        let request = IoRequest {
            tag: self.tickets,
            volume: volume.handle,
            kind,
            sector: Sector::new(sector),
            sectors,
            segments: &segments,
        };
        let submitted = self.shards[volume.shard].submit(&request);
        submitted.expect("nothing else is in flight");
        self.until(&(kind, sector, sectors), |rig| {
            rig.shards[volume.shard].pop_completion().map(|done| done.status)
        })
    }

    /// Opens a clone of a snapshot, as the control plane plans it.
    pub(super) fn clone_of(
        &mut self,
        shard: usize,
        origin: CloneOrigin,
        name: &str,
    ) -> Option<Volume> {
        let time = WallTime::from_unix_nanos(2_000);
        let plan = self.store.directory.plan_create(name, origin.size, Some(origin), time).ok()?;
        let volume = self.volume(shard, Command::Create(plan.clone()));
        match volume {
            Some(_) => self.store.directory.created(&plan),
            None => self.store.directory.abandoned(&plan),
        }
        volume
    }

    /// Every snapshot that can be cloned.
    pub(super) fn origins(&self) -> Vec<CloneOrigin> {
        let live = self.store.directory.entries().filter(|entry| !entry.record.deleted);
        live.flat_map(|VolumeEntry { record, .. }| {
            let log = store::read_log(&mut self.disk.connect(), &self.store, record);
            let live = log.entries.into_iter().filter(|snapshot| !snapshot.deleted);
            live.map(|snapshot| CloneOrigin {
                snapshot: SnapshotId { volume: record.id, sequence: snapshot.sequence },
                root: snapshot.root,
                height: snapshot.height,
                size: snapshot.size,
            })
        })
        .collect()
    }

    /// The orderly end, and who gives blocks back first.
    pub(super) fn shut_down(&mut self) {
        for shard in (0..SHARDS).rev() {
            self.ask(shard, Command::Shutdown);
            for _ in 0..4 {
                self.turn();
            }
        }
    }
}

/// A volume that is open.
#[derive(Clone, Copy, Debug)]
pub(super) struct Volume {
    pub(super) shard: usize,
    pub(super) handle: VolumeHandle,
}
