//! Cuts the power at the nth device operation, fails it, or fails everything from it on, for every
//! n, in what is done to a store as a whole: format, open (with superblock copies to renew), the
//! beginning of a life, and close.
//!
//! Afterwards there is the store that was, whole, with everything in it; only a format may leave none,
//! or the new one, empty.

use bessel_mapping::check;
use bessel_mapping::store::{self, FormatOptions, OpenError, OpenMode, OpenedStore};
use bessel_reactor::buffer::Segment;
use bessel_reactor::clock::WallTime;
use bessel_reactor::device::sim::{Fault, Keep, OpKind, Schedule, SimDevice, SimDisk};
use bessel_reactor::device::{Completion, Device, DeviceError, DeviceProperties, Token};
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr, ByteCount, ByteOffset};
use bessel_tests::world::{World, WorldConfig};

const ON: &str = "the power is on";
const NEW: [u8; 16] = *b"the-new-one-uuid";
const LIFE: [u8; 16] = *b"another-new-life";
const TIME: WallTime = WallTime::from_unix_nanos(1_000_000);
const READ_WRITE: OpenMode = OpenMode::ReadWrite { time: TIME };

/// No act needs more device operations than this.
const OPERATIONS_MAX: u64 = 1_000;

/// A device that answers with errors once the power is gone, where a [`SimDevice`] never answers
/// again: who waits for it would wait for ever.
struct Mains {
    device: SimDevice,
    disk: SimDisk,
    waiting: Vec<Token>,
}

impl Mains {
    fn connect(disk: &SimDisk) -> Self {
        Self { device: disk.connect(), disk: disk.clone(), waiting: Vec::new() }
    }

    /// True when the operation still reaches the disk.
    fn takes(&mut self, token: Token) -> bool {
        self.waiting.push(token);
        !self.disk.stopped()
    }
}

impl Device for Mains {
    fn properties(&self) -> DeviceProperties {
        self.device.properties()
    }

    fn read(&mut self, token: Token, offset: ByteOffset, segments: &[Segment]) {
        if self.takes(token) {
            self.device.read(token, offset, segments);
        }
    }

    fn write(&mut self, token: Token, offset: ByteOffset, segments: &[Segment]) {
        if self.takes(token) {
            self.device.write(token, offset, segments);
        }
    }

    fn flush(&mut self, token: Token) {
        if self.takes(token) {
            self.device.flush(token);
        }
    }

    fn submit(&mut self) -> bool {
        !self.disk.stopped() && self.device.submit()
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        let before = completions.len();
        self.device.reap(completions);
        for done in &completions[before..] {
            self.waiting.retain(|token| *token != done.token);
        }
        if self.disk.stopped() {
            let lost = |token| Completion { token, result: Err(DeviceError::Os(5)) };
            completions.extend(self.waiting.drain(..).map(lost));
        }
    }
}

/// Something done to a store as a whole, on the device it is given.
struct Act {
    /// What is done to the disk before.
    prepare: fn(&SimDisk),
    /// What is done; it may need the store open, as it was opened before the blow.
    act: fn(&mut Mains, Option<&OpenedStore>) -> Result<(), String>,
    needs_open: bool,
    /// The store may be gone afterwards, or be the new one.
    destroys: bool,
}

#[derive(Clone, Copy, Debug)]
enum Blow {
    PowerCut,
    Fault { kind: Option<OpKind>, lasting: bool },
}

const BLOWS: [Blow; 6] = [
    Blow::PowerCut,
    Blow::Fault { kind: None, lasting: false },
    Blow::Fault { kind: None, lasting: true },
    Blow::Fault { kind: Some(OpKind::Read), lasting: true },
    Blow::Fault { kind: Some(OpKind::Write), lasting: true },
    Blow::Fault { kind: Some(OpKind::Flush), lasting: true },
];

/// A store with two volumes, one a clone, closed in order.
fn full_store(volatile_cache: bool, schedule: Schedule, seed: u64) -> World {
    let mut world = World::new(WorldConfig {
        volatile_cache,
        schedule: Schedule::AtOnce,
        ..WorldConfig::new(seed)
    });
    let volume = world.create(ByteCount::new(16 << 20)).expect(ON);
    world.write(volume, 0, 24).expect(ON);
    let snapshot = world.snapshot(volume).expect(ON);
    world.clone_of(snapshot, "clone").expect(ON).expect("it has settled");
    world.write(volume, 5, 9).expect(ON);
    world.shut_down().expect(ON);
    world.disk.set_schedule(schedule);
    world
}

impl Act {
    fn at_every_operation(&self) {
        let fifo = Schedule::Fifo;
        for (volatile_cache, schedule, blows) in
            [(true, fifo, &BLOWS[..]), (false, fifo, &BLOWS), (true, Schedule::Random, &BLOWS[..1])]
        {
            for &blow in blows {
                let met = |after| self.run(volatile_cache, schedule, blow, after);
                let count = (0..OPERATIONS_MAX).take_while(|&after| met(after)).count() as u64;
                assert!(count < OPERATIONS_MAX, "it goes on and on");
                let all_kinds = matches!(blow, Blow::PowerCut | Blow::Fault { kind: None, .. });
                assert!(count > 0 || !all_kinds, "it does nothing to the device");
            }
        }
    }

    /// False when the act ended before it was struck.
    fn run(&self, volatile_cache: bool, schedule: Schedule, blow: Blow, after: u64) -> bool {
        let told = format!("{blow:?} after {after}, cache {volatile_cache}, {schedule:?}");
        let mut world = full_store(volatile_cache, schedule, after);
        let disk = &world.disk.clone();
        (self.prepare)(disk);
        let opened = self.needs_open.then(|| store::open(&mut disk.connect(), READ_WRITE));
        let opened = opened.map(|opened| opened.expect("the store opens"));
        let operations = || {
            let counters = disk.counters();
            counters.reads + counters.writes + counters.flushes
        };
        let before = operations();
        match blow {
            Blow::PowerCut => disk.stop_after(after),
            Blow::Fault { kind, lasting } => disk.inject(Fault { kind, after, lasting }),
        }
        let outcome = (self.act)(&mut Mains::connect(disk), opened.as_ref());
        let struck = match blow {
            Blow::PowerCut => disk.stopped(),
            // An error tells that it was; and so does a single failure that was not told.
            Blow::Fault { kind: None, .. } => operations() - before > after,
            Blow::Fault { .. } => outcome.is_err(),
        };
        assert!(struck || outcome.is_ok(), "{told}: {outcome:?}");
        for way in 0..4 {
            if matches!(blow, Blow::PowerCut) || way == after % 4 {
                self.look(&mut world, after * 4 + way, outcome.is_ok(), &told);
            }
        }
        if let Blow::Fault { .. } = blow {
            // Once the device works, the same thing can be done.
            disk.heal();
            let opened = self.needs_open.then(|| store::open(&mut disk.connect(), READ_WRITE));
            let opened = opened.map(|opened| opened.expect("the store opens"));
            let again = (self.act)(&mut Mains::connect(disk), opened.as_ref());
            assert_eq!(again, Ok(()), "{told}: again");
            self.look(&mut world, 0, true, &told);
        }
        struck
    }

    /// Cuts the power, in one of four ways, and looks at what is left.
    fn look(&self, world: &mut World, seed: u64, done: bool, told: &str) {
        let keep = || match seed % 4 {
            0 => Keep::Nothing,
            1 => Keep::Everything,
            2 => Keep::Where(&|block| block.get() % 16 == 0), // Some superblock copies.
            _ => Keep::Random,
        };
        let left = world.disk.power_failure(seed).disk(seed, keep());
        left.set_schedule(Schedule::AtOnce);
        match store::open(&mut left.connect(), OpenMode::ReadOnly) {
            Err(OpenError::NotAStore(_)) if self.destroys && !done => {}
            Err(error) => panic!("{told}: {error}"),
            Ok(store) if store.superblock.uuid == NEW => {
                assert!(self.destroys, "{told}: where does this come from?");
                assert_eq!(store.directory.volumes().count(), 0, "{told}");
                assert!(store.faults.is_empty(), "{told}: {:?}", store.faults);
                let report = check::check(&mut left.connect(), &mut |_, _| {}).expect("it opens");
                let bad = |finding: &&check::Finding| finding.severity == check::Severity::Corrupt;
                assert_eq!(report.findings.iter().filter(bad).count(), 0, "{told}");
            }
            Ok(_) => {
                assert!(!(self.destroys && done), "{told}: the old store is back");
                // The same disk once more.
                let mut after = world.power_failure(seed).recover(seed, keep());
                after.verify_snapshots().expect(ON);
            }
        }
    }
}

fn described<T, E: std::fmt::Debug>(result: Result<T, E>) -> Result<(), String> {
    result.map(drop).map_err(|error| format!("{error:?}"))
}

#[test]
fn format_over_a_store() {
    Act {
        prepare: |_| (),
        act: |device, _| {
            let options = FormatOptions {
                extent_size: Some(ByteCount::new(1 << 20)),
                force: true,
                uuid: NEW,
                secret: 77,
                time: TIME,
            };
            described(store::format(device, &options, &mut |_, _| {}))
        },
        needs_open: false,
        destroys: true,
    }
    .at_every_operation();
}

#[test]
fn open_with_superblock_copies_to_renew() {
    let losses: [fn(&SimDisk); 2] = [|disk| spoil(disk, [0, 24]), |disk| spoil(disk, [16, 24])];
    for prepare in losses {
        let act: fn(&mut Mains, Option<&OpenedStore>) -> Result<(), String> =
            |device, _| described(store::open(device, READ_WRITE));
        Act { prepare, act, needs_open: false, destroys: false }.at_every_operation();
    }
}

fn spoil(disk: &SimDisk, copies: [u64; 2]) {
    for copy in copies {
        disk.poke(BlockAddr::new(copy), &[0x5a; BLOCK_SIZE as usize]);
    }
}

#[test]
fn begin_a_life() {
    Act {
        prepare: |_| (),
        act: |device, store| {
            described(store::begin_life(device, store.expect("it is open"), LIFE, TIME))
        },
        needs_open: true,
        destroys: false,
    }
    .at_every_operation();
}

#[test]
fn close_in_order() {
    Act {
        prepare: |_| (),
        act: |device, store| {
            let store = store.expect("it is open");
            let host = store.host.as_ref().expect("for writing");
            described(store::close(device, store, host, TIME))
        },
        needs_open: true,
        destroys: false,
    }
    .at_every_operation();
}
