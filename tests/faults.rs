//! A device that fails: requests may fail with it, but what was promised stands, nothing hangs,
//! nothing panics, and after a restart the store is whole.
//!
//! One operation fails, or every one from some point on, in the middle of seeded work. A failed
//! flush is the worst of them: the simulated disk, as a real one, succeeds with the next flush and
//! has lost what the failed one had in hand.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use bessel_mapping::format::ExtentType;
use bessel_mapping::request::{IoKind, IoStatus, Reply};
use bessel_reactor::device::sim::{Fault, Keep, OpKind, Schedule};
use bessel_reactor::units::ByteCount;
use bessel_tests::workload::Workload;
use bessel_tests::world::{Action, Outcome, World, WorldConfig};

fn failing(seed: u64, schedule: Schedule) -> World {
    World::new(WorldConfig {
        schedule,
        shards: 1 + seed as usize % 2,
        node_cache: ByteCount::new(0), // So that nodes are read all the time.
        may_fail: true,
        may_fill: true,
        ..WorldConfig::new(seed)
    })
}

fn run(seed: u64, fault: Fault) {
    let mut world = failing(seed, Schedule::Random);
    let workload = Workload::default();
    for _ in 0..60 {
        workload.step(&mut world);
    }
    world.disk.inject(fault);
    for _ in 0..100 {
        workload.step(&mut world);
    }
    world.disk.heal();
    for _ in 0..20 {
        workload.step(&mut world);
    }
    world.settle().expect("the power is on");
    world.crash_somehow();
    world.recover();
    for _ in 0..40 {
        workload.step(&mut world);
    }
    world.crash(Keep::Nothing);
    world.recover();
}

fn at_every_operation(kind: OpKind, lasting: bool) {
    for after in 0..40 {
        for seed in 0..3 {
            let fault = Fault { kind: Some(kind), after: after * 2 + seed, lasting };
            if catch_unwind(AssertUnwindSafe(|| run(seed + after * 10, fault))).is_err() {
                panic!("seed {} with {fault:?}", seed + after * 10);
            }
        }
    }
}

#[test]
fn one_read_fails() {
    at_every_operation(OpKind::Read, false);
}

#[test]
fn reads_fail_from_some_point_on() {
    at_every_operation(OpKind::Read, true);
}

#[test]
fn one_write_fails() {
    at_every_operation(OpKind::Write, false);
}

#[test]
fn writes_fail_from_some_point_on() {
    at_every_operation(OpKind::Write, true);
}

#[test]
fn one_flush_fails() {
    at_every_operation(OpKind::Flush, false);
}

#[test]
fn flushes_fail_from_some_point_on() {
    at_every_operation(OpKind::Flush, true);
}

#[test]
fn a_failed_flush_is_not_retried_into_success() {
    let mut world = failing(2, Schedule::AtOnce);
    let volume = world.create(ByteCount::new(8 << 20)).unwrap();
    world.write(volume, 0, 64).unwrap();
    world.flush(volume).unwrap();
    world.write(volume, 0, 64).unwrap();
    world.disk.inject(Fault { kind: Some(OpKind::Flush), after: 0, lasting: false });
    assert_eq!(world.flush(volume).unwrap(), IoStatus::Failed);
    world.disk.heal();
    assert_eq!(world.flush(volume).unwrap(), IoStatus::Failed, "what was lost stays lost");
    assert_eq!(world.write(volume, 0, 8).unwrap(), IoStatus::Failed);
    assert_eq!(world.read(volume, 8, 8).unwrap(), IoStatus::Done);
    let latched = world.show(volume).unwrap().latched;
    assert!(latched.is_some(), "the volume says so");
    let ticket = world.start(Action::Snapshot { volume, label: None });
    let reply = world.wait(ticket).unwrap();
    assert!(format!("{reply:?}").contains("Latched"), "{reply:?}");
    world.crash(Keep::Nothing);
    world.recover();
    assert_eq!(world.write(volume, 0, 8).unwrap(), IoStatus::Done, "a restart clears it");
    assert_eq!(world.flush(volume).unwrap(), IoStatus::Done);
    assert!(matches!(
        world.perform(Action::Snapshot { volume, label: None }).unwrap(),
        Reply::Snapshot(_)
    ));
}

/// W's flush fails while V's round has some of its new nodes in the device's cache: V's own flush,
/// which succeeds afterwards, must not make anything reachable that was lost.
#[test]
fn another_volumes_failed_flush_spoils_a_round_half_written() {
    for seed in 0..10 {
        let mut world = World::new(WorldConfig {
            schedule: Schedule::AtOnce,
            may_fail: true,
            ..WorldConfig::new(seed)
        });
        let [v, w] = [(); 2].map(|()| world.create(ByteCount::new(1 << 30)).unwrap());
        // More leaves than go to the device in one write.
        for leaf in 0..20 {
            assert_eq!(world.write(v, leaf * 512 * 8, 8).unwrap(), IoStatus::Done);
        }
        assert_eq!(world.write(w, 0, 8).unwrap(), IoStatus::Done);
        assert_eq!(world.flush(w).unwrap(), IoStatus::Done);
        // Of the writes of V's nodes, the first stays in flight; the others complete.
        let held = Rc::new(Cell::new(None));
        let others = Rc::new(Cell::new(0));
        let (extents, first, passed) = (world.extents(), Rc::clone(&held), Rc::clone(&others));
        world.disk.hold(move |kind, block| {
            let node = kind == OpKind::Write && extents.holds(block, ExtentType::Metadata);
            if node && first.get().is_none() {
                first.set(Some(block));
            }
            let is_held = node && first.get() == Some(block);
            passed.set(passed.get() + u32::from(node && !is_held));
            is_held
        });
        let flush = world.start_io(v, IoKind::Flush, 0, 0);
        for _ in 0..20 {
            world.step();
        }
        assert!(held.get().is_some() && others.get() > 0 && !world.has_ended(flush));
        assert_eq!(world.write(w, 0, 8).unwrap(), IoStatus::Done);
        world.disk.inject(Fault { kind: Some(OpKind::Flush), after: 0, lasting: false });
        assert_eq!(world.flush(w).unwrap(), IoStatus::Failed);
        world.disk.release();
        assert_eq!(world.wait(flush).unwrap(), Outcome::Io(IoStatus::Failed), "seed {seed}");
        world.crash(Keep::Nothing);
        world.recover();
    }
}

/// Reactors share the device's cache: what one of them has written is as lost as the other's.
#[test]
fn a_failed_flush_is_known_on_every_reactor() {
    for seed in 0..10 {
        let mut world = World::new(WorldConfig {
            shards: 2,
            schedule: Schedule::AtOnce,
            may_fail: true,
            ..WorldConfig::new(seed)
        });
        let [v, w] = [(); 2].map(|()| world.create(ByteCount::new(1 << 30)).unwrap());
        for volume in [v, w] {
            assert_eq!(world.write(volume, 0, 8).unwrap(), IoStatus::Done);
            assert_eq!(world.flush(volume).unwrap(), IoStatus::Done);
            assert_eq!(world.write(volume, 0, 8).unwrap(), IoStatus::Done);
        }
        world.disk.inject(Fault { kind: Some(OpKind::Flush), after: 0, lasting: false });
        assert_eq!(world.flush(w).unwrap(), IoStatus::Failed);
        assert_eq!(world.flush(v).unwrap(), IoStatus::Failed, "seed {seed}");
        world.crash(Keep::Nothing);
        world.recover();
    }
}

#[test]
fn volumes_that_could_not_be_made_do_not_stay_open() {
    let mut world = failing(1, Schedule::AtOnce);
    let volume = world.create(ByteCount::new(8 << 20)).unwrap();
    for attempt in 0..40 {
        world.disk.inject(Fault { kind: Some(OpKind::Write), after: 0, lasting: false });
        let (name, size) = (world.fresh_name(), ByteCount::new(8 << 20));
        let ticket = world.start(Action::Create { name, size });
        let reply = format!("{:?}", world.wait(ticket).unwrap());
        assert!(reply.contains("Latched") || reply.contains("NoSpace"), "{attempt}: {reply}");
        world.disk.heal();
    }
    assert_eq!(world.write(volume, 0, 8).unwrap(), IoStatus::Done);
}
