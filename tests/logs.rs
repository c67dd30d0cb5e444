//! Long snapshot logs: opened by their end, read in the background, and used meanwhile.

use std::collections::BTreeSet;

use bessel_mapping::request::{
    Command, CommandError, IoStatus, LogState, Reply, SnapshotId, SnapshotInfo, VolumeId, Which,
};
use bessel_mapping::store::{self, OpenMode};
use bessel_reactor::clock::WallTime;
use bessel_reactor::device::sim::{Fault, Keep, OpKind, Random, Schedule};
use bessel_reactor::units::{BlockAddr, ByteCount};
use bessel_tests::world::{Action, Outcome, World, WorldConfig};

const ON: &str = "the power is on";

fn config(seed: u64) -> WorldConfig {
    WorldConfig {
        schedule: Schedule::AtOnce,
        capacity: ByteCount::new(64 << 20),
        ..WorldConfig::new(seed)
    }
}

/// Takes snapshots, many at a time, with some writes between them; every 100th has a label.
fn take(world: &mut World, volume: VolumeId, count: u64) {
    let mut done = 0;
    while done < count {
        let here = (count - done).min(25);
        world.write(volume, done / 25 % 8 * 8, 8).expect(ON);
        let started = (done..done + here).map(|at| {
            let label = (at % 100 == 0).then(|| format!("l{at}"));
            (world.start(Action::Snapshot { volume, label }), at)
        });
        for (ticket, at) in started.collect::<Vec<_>>() {
            match world.wait(ticket).expect(ON) {
                Outcome::Reply(Reply::Snapshot(info)) => assert_eq!(info.id.sequence, at),
                ended => panic!("snapshot {at}: {ended:?}"),
            }
        }
        done += here;
    }
    world.flush(volume).expect(ON);
    world.idle().expect(ON);
}

/// A world with a volume of so many snapshots.
fn with_snapshots(config: WorldConfig, count: u64) -> (World, VolumeId) {
    let mut world = World::new(config);
    let volume = world.create(ByteCount::new(1 << 20)).expect(ON);
    take(&mut world, volume, count);
    (world, volume)
}

/// Cuts the power and opens the store again, with the older blocks of the log held back from being read.
/// Returns how many snapshots they have.
fn reopen_holding_the_log(world: &mut World, volume: VolumeId) -> u64 {
    let mut older: BTreeSet<BlockAddr> = world.log_blocks(volume).into_iter().collect();
    let newest = *world.log_blocks(volume).last().expect("it has snapshots");
    older.remove(&newest);
    let held = older.len() as u64 * 24;
    world.crash(Keep::Random);
    world.reopen(|disk| {
        disk.hold(move |op, block| op == OpKind::Read && older.contains(&block));
    });
    held
}

fn log_of(world: &mut World, volume: VolumeId) -> LogState {
    world.show(volume).expect(ON).log
}

fn label(world: &mut World, volume: VolumeId, label: &str) -> Reply {
    let which = Which::Label(label.to_owned());
    world.look_up(volume, |volume| Command::Find { volume, which }).expect(ON)
}

/// The newest snapshot at or before a time, as whoever asks for it goes about it.
fn newest_at(world: &mut World, volume: VolumeId, then: WallTime) -> Option<SnapshotInfo> {
    let (mut best, mut before) = (None::<SnapshotInfo>, u64::MAX);
    while before > 0 {
        let at = before;
        let command = |volume| Command::FindAt { volume, then, before: at };
        let Reply::FoundAt { found, rest } = world.look_up(volume, command).expect(ON) else {
            panic!("it was refused")
        };
        let age = |it: &SnapshotInfo| (it.time, it.id.sequence);
        best = best.into_iter().chain(found).max_by_key(age);
        before = rest;
    }
    best
}

#[test]
fn opening_takes_as_many_reads_with_thousands_of_snapshots_as_with_one() {
    let reads = |count| {
        let (world, _) = with_snapshots(config(1), count);
        let disk = world.disk.fork(1);
        disk.set_schedule(Schedule::AtOnce);
        let extents = store::open(&mut disk.connect(), OpenMode::ReadOnly).expect("it opens");
        let bitmaps = extents.geometry.bitmap_blocks * extents.geometry.extent_count;
        let before = disk.counters().reads;
        store::open(&mut disk.connect(), OpenMode::ReadOnly).expect("it opens");
        (disk.counters().reads - before, bitmaps)
    };
    let (one, bitmaps) = reads(1);
    let (many, _) = reads(3000);
    // The bitmaps of extents that are in use are read, and more are.
    assert!(many <= one + bitmaps, "{one} reads with one snapshot, {many} with 3000");
}

/// Guests and new snapshots do not wait for a log that is being read; who needs what is not there does.
#[test]
fn while_its_log_is_being_read_a_volume_does_all_that_needs_none_of_it() {
    let (mut world, volume) = with_snapshots(config(2), 320);
    let held = reopen_holding_the_log(&mut world, volume);
    assert_eq!(held, 312);
    assert_eq!(
        log_of(&mut world, volume),
        LogState { taken: 320, live: 8, out_of_reach: held, fault: None }
    );
    assert_eq!(world.write(volume, 16, 8).expect(ON), IoStatus::Done);
    assert_eq!(world.read(volume, 0, 64).expect(ON), IoStatus::Done);
    for _ in 0..30 {
        world.snapshot(volume).expect(ON);
    }
    let snapshot = |sequence| SnapshotId { volume, sequence };
    assert!(world.find(snapshot(313)).expect(ON).is_some());
    assert_eq!(world.find(snapshot(350)).expect(ON), None);
    world.perform(Action::DeleteSnapshot { snapshot: snapshot(313) }).expect(ON);
    let by_label = |label: &str| Which::Label(label.to_owned());
    // Taken, by snapshots that are not there yet. The oracle is not told of what is to be refused.
    let time = WallTime::from_unix_nanos(1);
    let l300 = Some("l300".to_owned());
    let l100 = Some("l100".to_owned());
    let mut waiting = vec![
        world.start_look_up(volume, |volume| Command::Label { volume, sequence: 315, label: l300 }),
        world.start_look_up(volume, |volume| Command::Snapshot { volume, label: l100, time }),
    ];
    let actions = [
        Action::DeleteSnapshot { snapshot: snapshot(5) },
        Action::DeleteSnapshots { volume, sequences: vec![7, 100, 314] },
        Action::Label { snapshot: snapshot(9), label: Some("nine".to_owned()) },
    ];
    waiting.extend(actions.map(|action| world.start(action)));
    let looks = [by_label("l200"), by_label("no such"), Which::Sequence(3)];
    let looking: Vec<_> = looks
        .into_iter()
        .map(|which| world.start_look_up(volume, |volume| Command::Find { volume, which }))
        .collect();
    let then = WallTime::from_unix_nanos(u64::MAX);
    let by_time =
        world.start_look_up(volume, |volume| Command::FindAt { volume, then, before: u64::MAX });
    for _ in 0..2000 {
        world.step();
    }
    for ticket in waiting.iter().chain(&looking).chain([&by_time]) {
        assert!(!world.has_ended(*ticket), "{ticket} has not waited for the log");
    }
    // Those behind them went on all the same.
    world.snapshot(volume).expect(ON);
    world.disk.release();
    let mut ended = Vec::new();
    for ticket in waiting.into_iter().chain(looking) {
        match world.wait(ticket).expect(ON) {
            Outcome::Reply(reply) => ended.push(reply),
            ended => panic!("{ended:?}"),
        }
    }
    let taken = |label: &str| Reply::Failed(CommandError::LabelTaken(label.to_owned()));
    assert_eq!(ended[..2], [taken("l300"), taken("l100")]);
    assert_eq!(ended[2..5], [Reply::Done, Reply::Deleted(vec![7, 314]), Reply::Done]);
    assert!(matches!(&ended[5], Reply::Snapshot(found) if found.id == snapshot(200)));
    assert_eq!(ended[6], Reply::Failed(CommandError::NoSuchSnapshot));
    assert!(matches!(&ended[7], Reply::Snapshot(found) if found.id == snapshot(3)));
    let log = log_of(&mut world, volume);
    assert_eq!((log.taken, log.live, log.out_of_reach), (351, 347, 0));
    world.settle().expect(ON);
    world.compare();
}

/// The power goes while the log is being read, at whichever of its blocks, with commands waiting for it.
#[test]
fn a_power_cut_while_the_log_is_being_read_costs_nothing() {
    for seed in 0..40 {
        let config = WorldConfig { schedule: Schedule::Random, ..config(seed) };
        let (mut world, volume) = with_snapshots(config, 130 + seed);
        for _ in 0..4 {
            world.crash_somehow();
            world.reopen(|_| ());
            let there = world.model.snapshots(volume);
            for _ in 0..3 {
                let sequence = *world.random.pick(&there);
                let snapshot = SnapshotId { volume, sequence };
                let label = Some(world.fresh_name());
                match world.random.below(4) {
                    0 => drop(world.start(Action::DeleteSnapshot { snapshot })),
                    1 => drop(world.start(Action::Label { snapshot, label })),
                    2 => drop(world.start(Action::Snapshot { volume, label })),
                    _ => drop(world.start(Action::Snapshot { volume, label: None })),
                }
            }
            for _ in 0..world.random.below(60) {
                world.step();
            }
        }
        world.crash_somehow();
        world.recover();
    }
}

/// A deletion while the logs of its relatives are being read waits with the freeing, and frees what a
/// deletion at any time does.
#[test]
fn nothing_is_freed_before_the_logs_of_all_relatives_are_known() {
    let (mut world, volume) = with_snapshots(config(3), 60);
    let snapshot = SnapshotId { volume, sequence: 10 };
    world.write(volume, 64, 64).expect(ON);
    let mine = world.snapshot(volume).expect(ON);
    world.write(volume, 64, 64).expect(ON);
    let name = world.fresh_name();
    let clone = world.clone_of(mine, &name).expect(ON).expect("it is live");
    take_plain(&mut world, clone, 60);
    world.flush(volume).expect(ON);
    world.idle().expect(ON);
    reopen_holding_the_log(&mut world, clone);
    world.perform(Action::DeleteSnapshot { snapshot: mine }).expect(ON);
    for _ in 0..3000 {
        world.step();
    }
    assert_eq!(world.reclaimed(), (ByteCount::default(), 0), "what the clone shares is not known");
    world.disk.release();
    world.reclaim_all().expect(ON);
    assert_eq!(world.reclaimed().1, 1);
    world.perform(Action::DeleteSnapshot { snapshot }).expect(ON);
    world.reclaim_all().expect(ON);
    world.idle().expect(ON);
    world.read_everything().expect(ON);
    world.crash(Keep::Nothing);
    world.recover();
}

fn take_plain(world: &mut World, volume: VolumeId, count: u64) {
    for _ in 0..count {
        world.snapshot(volume).expect(ON);
    }
}

/// A clone whose log is damaged where it is old may have anything of what it was cloned from: deleting that
/// frees nothing.
#[test]
fn what_a_volume_with_a_damaged_log_may_have_is_not_freed() {
    let mut world = World::new(config(4));
    let volume = world.create(ByteCount::new(1 << 20)).expect(ON);
    world.write(volume, 0, 256).expect(ON);
    let origin = world.snapshot(volume).expect(ON);
    let name = world.fresh_name();
    let clone = world.clone_of(origin, &name).expect(ON).expect("it is live");
    take_plain(&mut world, clone, 30);
    // Nobody but the clone has what the snapshot has.
    world.write(volume, 0, 256).expect(ON);
    for volume in [volume, clone] {
        world.flush(volume).expect(ON);
    }
    world.idle().expect(ON);
    let oldest = world.log_blocks(clone)[0];
    world.crash(Keep::Random);
    let mut bytes = [0; 4096];
    world.reopen(|disk| {
        bytes = disk.peek(oldest);
        let mut damaged = bytes;
        damaged[40] ^= 1;
        disk.poke(oldest, &damaged);
    });
    world.idle().expect(ON);
    let log = log_of(&mut world, clone);
    let why = log.fault.expect("it is damaged");
    assert!(why.contains(&format!("block {oldest}")), "{why}");
    world.perform(Action::DeleteSnapshot { snapshot: origin }).expect(ON);
    world.reclaim_all().expect(ON);
    assert_eq!(world.reclaimed(), (ByteCount::default(), 0), "it was not known who has it");
    // Others fill what was free, if anything was.
    let other = world.create(ByteCount::new(1 << 20)).expect(ON);
    world.write(other, 0, 512).expect(ON);
    world.read_everything().expect(ON);
    for volume in [volume, clone, other] {
        world.flush(volume).expect(ON);
    }
    world.idle().expect(ON);
    world.crash(Keep::Nothing);
    world.disk.poke(oldest, &bytes); // What it was, so that all can be looked at.
    world.recover();
}

/// An error of the device counts as damage until the volume is attached again.
#[test]
fn a_log_that_could_not_be_read_is_read_when_the_volume_is_attached_again() {
    let (mut world, volume) = with_snapshots(config(5), 100);
    let blocks = world.log_blocks(volume);
    world.crash(Keep::Random);
    let first = blocks[2];
    world.reopen(move |disk| disk.hold(move |op, block| op == OpKind::Read && block == first));
    for _ in 0..500 {
        world.step();
    }
    world.expect_failures(true);
    world.disk.inject(Fault { kind: Some(OpKind::Read), after: 0, lasting: true });
    world.disk.release();
    for _ in 0..500 {
        world.step();
    }
    world.disk.heal();
    let log = log_of(&mut world, volume);
    assert_eq!(log.live, 100 - log.out_of_reach);
    let failed = blocks[log.out_of_reach as usize / 24 - 1];
    assert!(log.fault.is_some_and(|why| why.contains(&format!("block {failed}"))));
    assert!(matches!(label(&mut world, volume, "l0"), Reply::Failed(CommandError::Log { .. })));
    world.snapshot(volume).expect(ON);
    assert_eq!(world.detach(volume).expect(ON), None);
    world.attach(volume).expect(ON).expect("the device works");
    assert!(matches!(label(&mut world, volume, "l0"), Reply::Snapshot(_)));
    assert_eq!(
        log_of(&mut world, volume),
        LogState { taken: 101, live: 101, out_of_reach: 0, fault: None }
    );
    world.crash(Keep::Nothing);
    world.recover();
}

/// What a long log is for: found by label, by time and by pages, thinned, deleted from, and compared with
/// what the oracle knows, before and after a power cut.
#[test]
fn fifty_thousand_snapshots_are_found_thinned_and_deleted() {
    let count = 50_000;
    let config = WorldConfig {
        capacity: ByteCount::new(400 << 20),
        extent_size: ByteCount::new(32 << 20),
        node_cache: ByteCount::new(2 << 20),
        ..config(6)
    };
    let (mut world, volume) = with_snapshots(config, count);
    let held = reopen_holding_the_log(&mut world, volume);
    assert!(held > count - 50);
    world.read(volume, 0, 64).expect(ON);
    world.disk.release();
    let all = world.snapshots(volume).expect(ON);
    assert_eq!(all.len() as u64, count);
    let random = &mut Random::new(7);
    for _ in 0..200 {
        let at = random.below(count);
        let expected = &all[at as usize];
        assert_eq!(newest_at(&mut world, volume, expected.time).as_ref(), Some(expected));
        let at = at / 100 * 100;
        let Reply::Snapshot(found) = label(&mut world, volume, &format!("l{at}")) else {
            panic!("l{at} is not found")
        };
        assert_eq!(found, all[at as usize]);
    }
    let early = WallTime::from_unix_nanos(all[0].time.as_unix_nanos() - 1);
    assert_eq!(newest_at(&mut world, volume, early), None);
    // All go but one of ten, and the labelled ones.
    let going: Vec<u64> = (0..count).filter(|sequence| sequence % 10 != 7).collect();
    for piece in bessel_mapping::request::deletions(&going) {
        let sequences = piece.to_vec();
        world.perform(Action::DeleteSnapshots { volume, sequences }).expect(ON);
        // Freed as the daemon does it, one after the other, beside everything else: here enough of them.
        if world.reclaimed().1 > 300 {
            world.leave_to_collector();
        }
    }
    let stays = |sequence: u64| sequence % 10 == 7 || sequence.is_multiple_of(100);
    let left: Vec<u64> = (0..count).filter(|sequence| stays(*sequence)).collect();
    let live = left.len() as u64;
    for life in 0..2 {
        let log = log_of(&mut world, volume);
        assert_eq!((log.taken, log.live, log.out_of_reach), (count, live, 0), "life {life}");
        for _ in 0..200 {
            let at = random.below(count);
            let found =
                newest_at(&mut world, volume, all[at as usize].time).map(|it| it.id.sequence);
            assert_eq!(found, left.iter().rev().find(|it| **it <= at).copied());
        }
        world.crash(Keep::Random);
        world.recover();
    }
    world.read_everything().expect(ON);
}
