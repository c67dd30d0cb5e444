//! Queues of one volume on several shards: what each rule of it is for (docs/decisions/0019). The seeded work and the
//! loops over power cuts come by all of it too; here each stands alone, at the instant where it counts.
//!
//! Volume 1 is at home on one shard of two. Requests come in *here*, at home, or *there*, on the other one.

use bessel_mapping::format::ExtentType;
use bessel_mapping::request::{CacheMode, CommandError, IoKind, IoStatus, Reply, VolumeId};
use bessel_reactor::device::sim::{Fault, Keep, OpKind, Schedule};
use bessel_reactor::units::ByteCount;
use bessel_tests::operations::{LEAF, SMALL, block};
use bessel_tests::world::{Action, Outcome, Ticket, World, WorldConfig};

const ON: &str = "the power is on";

/// Another volume at home on this shard, with a block.
fn volume_at(world: &mut World, home: usize) -> VolumeId {
    world.enter_at(home);
    loop {
        let volume = world.create(SMALL).expect(ON);
        if world.home(volume) == home {
            assert_eq!(world.write(volume, 0, 8), Ok(IoStatus::Done));
            return volume;
        }
    }
}

/// A read of this volume reaches the device, which does nothing; then it goes on.
fn expect_room(world: &mut World, volume: VolumeId) {
    let before = world.disk.flying().len();
    world.start_io(volume, IoKind::Read, 0, 8);
    steps(world, 8);
    assert_eq!(world.disk.flying().len(), before + 1);
    world.disk.release();
    world.settle().expect(ON);
}

fn steps(world: &mut World, count: usize) {
    for _ in 0..count {
        world.step();
    }
}

struct Two {
    world: World,
    volume: VolumeId,
    here: usize,
    there: usize,
}

impl Two {
    fn new(seed: u64) -> Self {
        Self::on(WorldConfig::new(seed))
    }

    /// A volume whose first blocks are written, flushed, and shown to the other shard.
    fn on(config: WorldConfig) -> Self {
        let mut two = Self::unshared(config);
        two.world.visit_everywhere().expect(ON);
        two.show();
        two.world.idle().expect(ON);
        two
    }

    /// The same, served at home alone.
    fn unshared(config: WorldConfig) -> Self {
        let config = WorldConfig { shards: 2, visits: true, schedule: Schedule::AtOnce, ..config };
        let mut world = World::new(config);
        let volume = world.create(SMALL).expect(ON);
        let here = world.home(volume);
        let mut two = Self { world, volume, here, there: 1 - here };
        two.at(two.here);
        two.write(0, 64);
        two.flush();
        two.world.idle().expect(ON);
        two
    }

    /// Requests come in on this shard from now on.
    fn at(&mut self, shard: usize) {
        self.world.enter_at(shard);
    }

    fn io(&mut self, kind: IoKind, sector: u64, sectors: u64) {
        let status = self.world.io(self.volume, kind, sector, sectors).expect(ON);
        assert_eq!(status, IoStatus::Done, "{kind:?} {sector}+{sectors}");
    }

    fn write(&mut self, sector: u64, sectors: u64) {
        self.io(IoKind::Write, sector, sectors);
    }

    fn read(&mut self, sector: u64, sectors: u64) {
        self.io(IoKind::Read, sector, sectors);
    }

    fn flush(&mut self) {
        self.io(IoKind::Flush, 0, 0);
    }

    /// Writes from there until nothing of it needs the home: it may be written in place from there.
    fn show(&mut self) {
        self.at(self.there);
        for _ in 0..100 {
            let before = self.forwarded();
            self.write(0, 64);
            if self.forwarded() == before {
                return;
            }
        }
        panic!("a hundred writes were sent to the home");
    }

    fn forwarded(&self) -> u64 {
        self.world.visiting_requests()[1]
    }

    fn steps(&mut self, count: usize) {
        steps(&mut self.world, count);
    }

    /// I/O of this kind to data stays in flight.
    fn hold(&mut self, held: OpKind) {
        let extents = self.world.extents();
        self.world.disk.hold(move |op, at| op == held && extents.holds(at, ExtentType::Data));
    }

    fn end(&mut self, tickets: &[Ticket]) {
        self.world.disk.release();
        for ticket in tickets {
            assert_eq!(self.world.wait(*ticket).expect(ON), Outcome::Io(IoStatus::Done));
        }
    }

    /// The power goes, and takes all that is not durable.
    fn crash(mut self) {
        self.world.crash(Keep::Nothing);
        self.world.recover();
    }
}

/// Enough seeds that memory suits: the dice also give memory that only the home can serve.
const SEEDS: std::ops::Range<u64> = 0..12;

#[test]
fn reads_and_writes_in_place_need_no_home() {
    let mut two = Two::new(1);
    let before = two.world.visiting_requests();
    for _ in 0..50 {
        two.write(0, 64);
        two.read(0, 64);
    }
    let after = two.world.visiting_requests();
    assert_eq!(after[0] - before[0], 100);
    // Of every eight some have memory that needs a bounce buffer.
    assert!(after[1] - before[1] < 40, "{before:?} {after:?}");
}

#[test]
fn what_is_written_after_a_cut_is_not_in_the_snapshot() {
    for seed in SEEDS {
        let mut two = Two::new(seed);
        two.world.snapshot(two.volume).expect(ON);
        two.write(0, 64);
        two.write(0, 64);
        two.world.verify_snapshots().expect(ON);
        two.at(two.here);
        two.read(0, 64);
        two.flush();
        two.crash();
    }
}

#[test]
fn what_the_home_changes_is_seen_there() {
    for seed in SEEDS {
        let mut two = Two::new(seed);
        // Moved, by a snapshot.
        two.world.snapshot(two.volume).expect(ON);
        two.at(two.here);
        two.write(0, 64);
        two.at(two.there);
        two.read(0, 64);
        // Taken away, block by block, and as a whole leaf.
        two.show();
        two.at(two.here);
        two.io(IoKind::Discard, block(2), block(2));
        two.at(two.there);
        two.read(0, 64);
        two.at(two.here);
        two.io(IoKind::WriteZeroes, 0, LEAF);
        two.at(two.there);
        two.read(0, 64);
        // Another tree.
        two.show();
        let snapshot = two.world.snapshot(two.volume).expect(ON);
        two.write(0, 64);
        two.world.settle().expect(ON);
        two.world.perform(Action::Rollback { snapshot }).expect(ON);
        two.read(0, 64);
        two.world.read_everything().expect(ON);
    }
}

#[test]
fn a_block_is_not_used_again_under_a_read_there() {
    for seed in SEEDS {
        let mut two = Two::new(seed);
        two.hold(OpKind::Read);
        let Some(read) = two.started(IoKind::Read, 0, 64) else { continue };
        two.at(two.here);
        two.io(IoKind::Discard, 0, 64);
        two.flush();
        // All that is free has been somebody's: the read would bring that.
        two.write(0, 64);
        two.write(block(64), 256);
        two.end(&[read]);
        two.world.idle().expect(ON);
        two.world.read_everything().expect(ON);
    }
}

#[test]
fn a_merge_waits_for_a_write_there_that_it_must_not_miss() {
    for alignment in [512, 4096] {
        for seed in SEEDS {
            let config = WorldConfig { offset_alignment: alignment, ..WorldConfig::new(seed) };
            let mut two = Two::on(config);
            two.hold(OpKind::Write);
            let Some(whole) = two.started(IoKind::Write, 0, 8) else { continue };
            if alignment == 512 {
                two.world.snapshot(two.volume).expect(ON);
            }
            two.at(two.here);
            let part = two.world.start_io(two.volume, IoKind::Write, 3, 2);
            two.steps(20);
            two.end(&[whole, part]);
            two.read(0, 8);
            two.flush();
            two.crash();
        }
    }
}

/// The merge reads and writes its block as a whole, on a device that knows no less; what is written there
/// meanwhile would be undone.
#[test]
fn a_merge_that_is_under_way_when_a_volume_is_shared_is_left_alone() {
    let mut met = 0;
    for seed in SEEDS {
        let config = WorldConfig { offset_alignment: 4096, ..WorldConfig::new(seed) };
        let mut two = Two::unshared(config);
        two.hold(OpKind::Write);
        let part = two.world.start_io(two.volume, IoKind::Write, 3, 2);
        two.steps(5);
        let merged = two.world.disk.flying()[0].block;
        two.world.disk.hold(move |op, at| op == OpKind::Write && at == merged);
        two.world.start_visit(two.volume, two.there);
        two.steps(20);
        // Another block of the leaf, so that it is shown.
        two.at(two.there);
        for _ in 0..10 {
            two.write(block(4), 8);
        }
        let whole = two.world.start_io(two.volume, IoKind::Write, 0, 8);
        two.steps(20);
        met += u32::from(!two.world.has_ended(whole));
        two.end(&[part, whole]);
        two.read(0, 8);
    }
    assert!(met > 0, "none had to wait");
}

#[test]
fn a_shard_visits_a_volume_once() {
    for seed in SEEDS {
        let mut two = Two::new(seed);
        two.hold(OpKind::Read);
        let Some(read) = two.started(IoKind::Read, 0, 64) else { continue };
        two.world.visit_again(two.volume, two.there);
        two.steps(30);
        let write = two.world.start_io(two.volume, IoKind::Write, 0, 8);
        two.steps(20);
        two.at(two.here);
        two.io(IoKind::Discard, 0, 64);
        two.flush();
        two.write(0, 64);
        two.end(&[read, write]);
        two.world.idle().expect(ON);
        two.world.read_everything().expect(ON);
    }
}

/// However busy the home is with queues of its own: one slot comes free at a time, and somebody wants each.
#[test]
fn what_is_sent_home_finds_room_there() {
    let mut two = Two::on(WorldConfig { requests: 8, ..WorldConfig::new(1) });
    two.flush();
    two.at(two.here);
    // Of so many that none is free: one volume by itself would leave some.
    let mut at_home = vec![two.volume];
    while at_home.len() < 9 {
        at_home.push(volume_at(&mut two.world, two.here));
    }
    two.world.idle().expect(ON);
    two.world.disk.hold_all_but(None);
    for volume in at_home.iter().cycle().take(18) {
        two.world.start_io(*volume, IoKind::Read, 0, 8);
    }
    two.steps(3);
    two.at(two.there);
    let sent = two.world.start_io(two.volume, IoKind::Flush, 0, 0);
    two.at(two.here);
    for _ in 0..200 {
        let next = two.world.disk.flying()[0].number;
        two.world.disk.hold_all_but(Some(next));
        for volume in &at_home {
            two.world.start_io(*volume, IoKind::Read, 0, 8);
        }
        two.steps(1);
        if two.world.has_ended(sent) {
            return;
        }
    }
    panic!("it was passed over 200 times");
}

/// And leaves some: a device that does nothing keeps them there.
#[test]
fn what_is_sent_home_leaves_room_there() {
    let config = WorldConfig { schedule: Schedule::AtOnce, requests: 8, ..WorldConfig::new(2) };
    let mut world = World::new(WorldConfig { shards: 3, visits: true, ..config });
    let busy = world.create(SMALL).expect(ON);
    let home = world.home(busy);
    let other = volume_at(&mut world, home);
    world.visit_everywhere().expect(ON);
    world.idle().expect(ON);
    world.disk.hold_all_but(None);
    for shard in (0..3).filter(|shard| *shard != home) {
        world.enter_at(shard);
        for at in 0..8 {
            world.start_io(busy, IoKind::Write, (8 * shard as u64 + at) * 8, 8); // Of new blocks.
        }
    }
    steps(&mut world, 200); // With the mail, which takes its time.
    world.enter_at(home);
    expect_room(&mut world, other);
}

/// What one volume is asked for at home and elsewhere together leaves some, too.
#[test]
fn a_volume_loaded_here_and_there_leaves_room_here() {
    let mut two = Two::on(WorldConfig { requests: 16, ..WorldConfig::new(4) });
    let other = volume_at(&mut two.world, two.here);
    two.at(two.here);
    two.world.idle().expect(ON);
    two.world.disk.hold_all_but(None);
    for _ in 0..32 {
        two.world.start_io(two.volume, IoKind::Read, 0, 8);
    }
    two.steps(3);
    two.at(two.there);
    for at in 0..32 {
        two.world.start_io(two.volume, IoKind::Write, 1000 + at * 8, 8); // Of new blocks.
    }
    two.steps(200); // With the mail, which takes its time.
    two.at(two.here);
    expect_room(&mut two.world, other);
}

/// A busy visitor leaves room for another one on its shard.
#[test]
fn there_is_a_context_for_another_visitor() {
    let mut two = Two::on(WorldConfig { requests: 8, ..WorldConfig::new(3) });
    let other = volume_at(&mut two.world, two.here);
    two.world.visit_everywhere().expect(ON);
    two.world.disk.hold_all_but(None);
    two.at(two.there);
    for _ in 0..16 {
        two.world.start_io(two.volume, IoKind::Read, 0, 8);
    }
    two.steps(8);
    expect_room(&mut two.world, other);
}

/// What a visitor has in flight at the cut may still land in the snapshot.
#[test]
fn a_snapshot_settles_when_what_was_in_flight_there_has_landed() {
    for seed in SEEDS {
        let mut two = Two::new(seed);
        two.hold(OpKind::Write);
        let Some(write) = two.started(IoKind::Write, 0, 64) else { continue };
        let snapshot = two.world.snapshot(two.volume).expect(ON);
        assert!(two.world.snapshots(two.volume).expect(ON)[0].settling, "seed {seed}");
        let refused = two.world.ask(Action::Rollback { snapshot }).expect(ON);
        assert_eq!(refused, Reply::Failed(CommandError::InUse));
        two.end(&[write]);
        // Nobody asks for anything any more, and it settles all the same.
        two.world.idle().expect(ON);
        assert!(!two.world.snapshots(two.volume).expect(ON)[0].settling, "seed {seed}");
        let clone = two.world.clone_of(snapshot, "clone").expect(ON).expect("it has settled");
        two.world.read(clone, 0, 64).expect(ON);
        two.world.verify_snapshots().expect(ON);
    }
}

#[test]
fn a_flush_makes_what_was_written_there_durable() {
    for seed in SEEDS {
        for everywhere in [false, true] {
            let mut two = Two::new(seed);
            // Nothing else is to be flushed.
            two.flush();
            two.write(0, 64);
            if !everywhere {
                two.at(two.here);
            }
            two.flush();
            two.crash();
        }
    }
}

#[test]
fn a_volume_that_is_closed_keeps_what_was_written_there() {
    for seed in SEEDS {
        let mut two = Two::new(seed);
        two.flush();
        two.write(0, 64);
        two.world.detach(two.volume).expect(ON);
        two.crash();
    }
}

#[test]
fn a_write_that_meets_the_switch_to_writethrough_is_durable_when_it_ends() {
    for seed in SEEDS {
        let mut two = Two::new(seed);
        two.hold(OpKind::Write);
        let Some(write) = two.started(IoKind::Write, 0, 64) else { continue };
        let (volume, cache) = (two.volume, CacheMode::Writethrough);
        let switch = two.world.start(Action::SetCache { volume, cache });
        two.steps(20);
        two.end(&[write]);
        let switched = two.world.wait(switch).expect(ON);
        assert_eq!(switched, Outcome::Reply(Reply::Done));
        two.write(64, 8);
        two.crash();
    }
}

/// Nobody knows then what the device has of it: the next flush must say so.
#[test]
fn a_flush_that_fails_spoils_what_was_written_there() {
    for seed in SEEDS {
        for in_flight in [false, true] {
            let mut two = Two::on(WorldConfig { may_fail: true, ..WorldConfig::new(seed) });
            let other = two.world.create(ByteCount::new(1 << 20)).expect(ON);
            two.world.idle().expect(ON);
            let mut write = None;
            if in_flight {
                two.hold(OpKind::Write);
                write = two.started(IoKind::Write, 0, 8);
                if write.is_none() {
                    continue;
                }
            } else {
                two.write(0, 8);
            }
            // Another volume's flush, wherever that is at home, and whoever hears of it first.
            let fault = Fault { kind: Some(OpKind::Flush), after: 0, lasting: false };
            two.at(two.world.home(other));
            if !in_flight {
                two.world.write(other, 0, 8).expect(ON);
            }
            two.world.disk.inject(fault);
            let _ = two.world.snapshot_or_not(other);
            two.end(&write.into_iter().collect::<Vec<_>>());
            two.at(two.here);
            let status = two.world.flush(two.volume).expect(ON);
            assert_eq!(status, IoStatus::Failed, "seed {seed}, in flight: {in_flight}");
        }
    }
}

impl Two {
    /// Begins something there. None when its memory is of the kind that only the home serves.
    fn started(&mut self, kind: IoKind, sector: u64, sectors: u64) -> Option<Ticket> {
        let before = self.forwarded();
        let ticket = self.world.start_io(self.volume, kind, sector, sectors);
        self.steps(5);
        if self.forwarded() == before {
            return Some(ticket);
        }
        self.end(&[ticket]);
        None
    }
}
