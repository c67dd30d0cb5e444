//! Volumes of one shard: what one may take of what all of them share, however much it asks for.
//!
//! A busy guest asks for more than there is while the device does nothing, or for much at once while it does
//! all. Another one, that comes then, is let in and served.

use bessel_mapping::request::{Command, IoKind, IoStatus, Reply, VolumeId};
use bessel_reactor::device::sim::Schedule;
use bessel_reactor::units::{ByteCount, SECTORS_PER_BLOCK};
use bessel_tests::world::{Outcome, World, WorldConfig};

const ON: &str = "the power is on";
/// Sectors that one leaf maps.
const LEAF: u64 = 512 * SECTORS_PER_BLOCK;
const SIZE: ByteCount = ByteCount::new(1 << 30);

/// A volume of a busy guest, and another one, both with this much written: `sectors` at the start of each of
/// so many leaves, the last block first, so that no two of them are neighbours on the device.
struct Two {
    world: World,
    busy: VolumeId,
    other: VolumeId,
}

impl Two {
    fn new(config: WorldConfig, leaves: u64, sectors: u64) -> Self {
        let config = WorldConfig {
            schedule: Schedule::AtOnce,
            capacity: ByteCount::new(64 << 20),
            ..config
        };
        let mut world = World::new(config);
        let [busy, other] = [(); 2].map(|()| world.create(SIZE).expect(ON));
        for volume in [busy, other] {
            for leaf in 0..leaves {
                for block in (0..sectors / SECTORS_PER_BLOCK).rev() {
                    let sector = leaf * LEAF + block * SECTORS_PER_BLOCK;
                    assert_eq!(world.write(volume, sector, SECTORS_PER_BLOCK), Ok(IoStatus::Done));
                }
            }
        }
        world.idle().expect(ON);
        Self { world, busy, other }
    }

    fn steps(&mut self, count: usize) {
        for _ in 0..count {
            self.world.step();
        }
    }

    /// While the device does nothing, the busy guest asks for what `requests` says, which is more than there
    /// is room for; the other one's read of this place reaches the device all the same.
    fn expect_room(&mut self, requests: impl Iterator<Item = (u64, u64)>, place: (u64, u64)) {
        self.world.disk.hold_all_but(None);
        for (sector, sectors) in requests {
            self.world.start_io(self.busy, IoKind::Read, sector, sectors);
        }
        self.steps(8);
        let before = self.world.disk.flying().len();
        self.steps(8);
        assert_eq!(self.world.disk.flying().len(), before, "the busy guest has what it gets");
        let read = self.world.start_io(self.other, IoKind::Read, place.0, place.1);
        self.steps(8);
        let flying = self.world.disk.flying();
        assert!(flying.len() > before, "nothing came of it beside {before} operations");
        // And ends, although nothing else does.
        for _ in 0..100 {
            let last = self.world.disk.flying().last().map(|op| op.number);
            self.world.disk.hold_all_but(last);
            self.steps(8);
            if self.world.has_ended(read) {
                self.world.disk.release();
                assert_eq!(self.world.wait(read).expect(ON), Outcome::Io(IoStatus::Done));
                return self.world.settle().expect(ON);
            }
        }
        panic!("it does not end");
    }
}

#[test]
fn there_is_a_context_for_another_volume() {
    for requests in [4, 8, 64] {
        let mut two = Two::new(WorldConfig { requests, ..WorldConfig::new(1) }, 1, 8);
        two.expect_room((0..2 * requests).map(|_| (0, 8)), (0, 8));
    }
}

/// Large reads of blocks that lie apart are many operations of the device.
#[test]
fn there_is_an_operation_for_another_volume() {
    let mut two = Two::new(WorldConfig { requests: 32, ..WorldConfig::new(2) }, 1, 256);
    two.expect_room((0..16).map(|_| (0, 256)), (0, 8));
}

/// On a device of whole blocks, what is smaller goes through a bounce buffer.
#[test]
fn there_is_a_bounce_buffer_for_another_volume() {
    let config = WorldConfig { requests: 128, offset_alignment: 4096, ..WorldConfig::new(3) };
    let mut two = Two::new(config, 1, 8);
    two.expect_room((0..96).map(|_| (1, 2)), (1, 2));
}

/// Leaves that are not in memory take a buffer each until they are read.
#[test]
fn there_is_a_node_to_be_read_for_another_volume() {
    let config = WorldConfig { requests: 128, ..WorldConfig::new(4) };
    let mut two = Two::new(config, 100, 8);
    two.world.shut_down().expect(ON);
    two.world.recover();
    for volume in [two.busy, two.other] {
        // All but the leaf.
        assert_eq!(two.world.read(volume, 0, 8), Ok(IoStatus::Done));
    }
    two.expect_room((10..100).map(|leaf| (leaf * LEAF, 8)), (20 * LEAF, 8));
}

/// Turns until `requests` of a volume, which come at once, have ended, and the reads of another one's that have
/// ended meanwhile, one after the other.
fn turns_of(two: &mut Two, requests: &[(IoKind, u64, u64)]) -> (usize, usize) {
    let start = |two: &mut Two, request: &(IoKind, u64, u64)| {
        two.world.start_io(two.busy, request.0, request.1, request.2)
    };
    let tickets: Vec<_> = requests.iter().map(|request| start(two, request)).collect();
    let (mut turns, mut reads, mut reading) = (0, 0, None);
    while !tickets.iter().all(|ticket| two.world.has_ended(*ticket)) {
        match reading {
            Some(read) if !two.world.has_ended(read) => {}
            ended => {
                reads += usize::from(ended.is_some());
                reading = Some(two.world.start_io(two.other, IoKind::Read, 0, 8));
            }
        }
        two.world.step();
        turns += 1;
        assert!(turns < 10_000, "it does not end");
    }
    two.world.settle().expect(ON);
    (turns, reads)
}

/// A leaf is 65 steps, and a turn has 256 for each volume, however many requests there are to take them.
#[test]
fn many_long_discards_take_many_turns_and_let_others_in() {
    for kind in [IoKind::Discard, IoKind::WriteZeroes] {
        for (requests, leaves) in [(1, 64), (16, 4), (64, 1)] {
            // All of it may be changed at once: no round is waited for in between.
            let node_cache = ByteCount::new(16 << 20);
            let mut two = Two::new(WorldConfig { node_cache, ..WorldConfig::new(5) }, 64, 8);
            let leaf = |at| (kind, at * leaves * LEAF, leaves * LEAF);
            let requests: Vec<_> = (0..requests).map(leaf).collect();
            let (turns, reads) = turns_of(&mut two, &requests);
            let what = format!("{kind:?} {}: {turns} turns, {reads} reads", requests.len());
            assert!((16..20).contains(&turns), "{what}");
            assert!(reads >= turns / 3, "{what}"); // A read takes two.
        }
    }
}

/// The same of blocks that come free, all of them with one commit.
#[test]
fn many_blocks_come_free_in_many_turns() {
    const LEAVES: u64 = 8;
    let [node_cache, extent_size] = [16, 16].map(|mib| ByteCount::new(mib << 20));
    // Twice as many blocks as steps.
    let config =
        WorldConfig { node_cache, extent_size, steps_per_turn: 128, ..WorldConfig::new(7) };
    let mut two = Two::new(config, LEAVES, 256 * SECTORS_PER_BLOCK);
    let discarded = two.world.io(two.busy, IoKind::Discard, 0, LEAVES * LEAF);
    assert_eq!(discarded, Ok(IoStatus::Done));
    two.world.start_io(two.busy, IoKind::Flush, 0, 0);
    let mut free = Vec::new();
    for _ in 0..200 {
        match two.world.look_up(two.other, |_| Command::Stats).expect(ON) {
            Reply::Stats(stats) => free.push(stats.claimed_data),
            reply => panic!("{reply:?}"),
        }
    }
    let steps: Vec<u64> = free.windows(2).map(|two| two[1] - two[0]).collect();
    assert_eq!(steps.iter().sum::<u64>(), LEAVES * 256, "{steps:?}");
    // Asked once a turn, or less often.
    assert!(steps.iter().all(|came| *came <= 2 * 256), "{steps:?}");
}

/// Volumes of a shard that gives next to nothing back in a turn.
fn slow(seed: u64) -> Two {
    let config = WorldConfig { steps_per_turn: 1, may_fill: true, ..WorldConfig::new(seed) };
    Two::new(config, 4, 256 * SECTORS_PER_BLOCK)
}

/// Discards of all that one of them has are on their way to be given back.
fn release_slowly(two: &mut Two) {
    let discarded = two.world.io(two.busy, IoKind::Discard, 0, 4 * LEAF);
    assert_eq!(discarded, Ok(IoStatus::Done));
    two.world.start_io(two.busy, IoKind::Flush, 0, 0);
    two.steps(20);
}

/// What is being given back will be there: nobody is told that the store is full.
#[test]
fn a_full_store_waits_for_what_is_released() {
    let mut two = slow(8);
    let mut at = 8 * LEAF;
    while two.world.write(two.other, at, 8) == Ok(IoStatus::Done) {
        at += 8;
    }
    release_slowly(&mut two);
    let sectors = 128 * SECTORS_PER_BLOCK;
    let writes = [0, 1, 2, 3].map(|write| {
        two.world.start_io(two.other, IoKind::Write, 40 * LEAF + write * sectors, sectors)
    });
    for write in writes {
        assert_eq!(two.world.wait(write).expect(ON), Outcome::Io(IoStatus::Done));
    }
}

/// None of it leaks.
#[test]
fn a_shard_that_shuts_down_has_given_everything_back() {
    let mut two = slow(9);
    release_slowly(&mut two);
    two.world.shut_down().expect(ON);
    two.world.recover();
    let report = two.world.check();
    assert_eq!((report.data.leaked, report.metadata.leaked), (0, 0));
}

/// Who is first in a volume and has much to do does not keep its own later requests waiting.
#[test]
fn a_small_request_overtakes_a_long_one() {
    let mut two = Two::new(WorldConfig::new(6), 100, 256);
    let long = two.world.start_io(two.busy, IoKind::Discard, LEAF, 99 * LEAF);
    two.steps(1);
    let small = two.world.start_io(two.busy, IoKind::Read, 0, 256);
    for _ in 0..5 {
        two.steps(1);
        if two.world.has_ended(small) {
            assert!(!two.world.has_ended(long), "it is not long");
            return two.world.settle().expect(ON);
        }
    }
    panic!("it waits for the long one");
}
