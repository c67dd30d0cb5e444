//! Faults that strike by themselves, each at its own rate, alone and all together, in seeded work
//! with power cuts, kills and orderly ends between. The rules are in `harness/world/faulty.rs`.
//!
//! `SEEDS=17` runs one seed of every kind, `SEEDS=0..5000` a range; without it a fixed range runs. A
//! failure prints the command that replays it. Keep failing seeds in `REGRESSIONS`.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use bessel_mapping::check::Severity;
use bessel_mapping::format::ExtentType;
use bessel_mapping::request::{IoKind, IoStatus, VolumeId};
use bessel_reactor::device::sim::{FaultRates, Keep, OpKind, Random, Schedule};
use bessel_reactor::units::{BlockAddr, ByteCount};
use bessel_tests::workload::Workload;
use bessel_tests::world::{Faults, World, WorldConfig};

/// Seeds of a kind that once found something, whatever it was.
const REGRESSIONS: &[(&str, u64)] = &[("node_bits_flip_on_the_disk", 200)];

/// Seeds of each kind that every run of the suite tries.
const FIXED: std::ops::Range<u64> = 0..40;

fn seeds(kind: &str) -> Vec<u64> {
    let number = |text: &str| text.parse().expect("SEEDS is `n` or `from..to`");
    match std::env::var("SEEDS") {
        Err(_) => {
            let kept = REGRESSIONS.iter().filter(|(of, _)| *of == kind).map(|(_, seed)| *seed);
            kept.chain(FIXED).collect()
        }
        Ok(text) => match text.split_once("..") {
            Some((from, to)) => (number(from)..number(to)).collect(),
            None => vec![number(&text)],
        },
    }
}

fn config(seed: u64, faults: impl Fn(&mut Random) -> Faults) -> WorldConfig {
    let mut random = Random::new(seed ^ 0xfa17);
    WorldConfig {
        shards: 1 + random.below(3) as usize,
        capacity: ByteCount::new(*random.pick(&[64 << 20, 128 << 20])),
        extent_size: ByteCount::new(*random.pick(&[1 << 20, 4 << 20])),
        volatile_cache: random.chance(3, 4),
        schedule: *random.pick(&[Schedule::Random, Schedule::Random, Schedule::AtOnce]),
        // Mostly the smallest there is: nodes are read all the time.
        node_cache: ByteCount::new(*random.pick(&[0, 0, 512 << 10])),
        requests: *random.pick(&[16, 64]),
        offset_alignment: *random.pick(&[512, 512, 4096]),
        may_fill: true,
        journal_entries: *random.pick(&[50, 1000]),
        faults: Some(faults(&mut random)),
        ..WorldConfig::new(seed)
    }
}

/// What a run came to: faults felt, sectors compared, sectors that only a fault explains.
type Found = (u64, u64, u64);

fn run(seed: u64, faults: impl Fn(&mut Random) -> Faults) -> Found {
    let mut world = World::new(config(seed, faults));
    let workload = Workload::default();
    for _ in 0..2 + world.random.below(3) {
        for _ in 0..1 + world.random.below(200) {
            workload.step(&mut world);
        }
        if world.random.chance(1, 2) {
            world.probe();
        }
        match world.random.below(8) {
            0 => world.shut_down().expect("nobody cuts the power here"),
            1..4 => world.kill(),
            _ => world.crash_somehow(),
        }
        world.recover();
        if world.random.chance(1, 4) {
            world.verify_snapshots().expect("the power is back");
        }
    }
    let told = world.disk.strikes() as u64 + world.disk.counters().late;
    (told, world.model.sectors_checked, world.model.sectors_excused)
}

/// Runs all seeds of `kind`, which is the name of its test. At least one must have felt a fault.
fn run_all(kind: &str, faults: impl Fn(&mut Random) -> Faults) -> Found {
    let mut totals = (0, 0, 0);
    let seeds = seeds(kind);
    for &seed in &seeds {
        match catch_unwind(AssertUnwindSafe(|| run(seed, &faults))) {
            Ok((strikes, checked, excused)) => {
                totals = (totals.0 + strikes, totals.1 + checked, totals.2 + excused);
            }
            Err(_) => panic!(
                "seed {seed}: SEEDS={seed} cargo test -p bessel-tests --test fault_rates -- \
                 --exact {kind}"
            ),
        }
    }
    let (strikes, checked, excused) = totals;
    println!(
        "{kind}: {} seeds, {strikes} faults felt, {checked} sectors compared, {excused} damaged",
        seeds.len()
    );
    assert!(checked > 0, "a harness that looks at nothing finds nothing");
    totals
}

/// Seldom or often.
fn rate(random: &mut Random) -> u32 {
    *random.pick(&[2_000, 10_000, 50_000])
}

/// The same for nodes, which are read and written seldom.
fn node_rate(random: &mut Random) -> u32 {
    *random.pick(&[10_000, 50_000, 200_000])
}

fn felt(found: Found) {
    assert!(found.0 > 0 || std::env::var_os("SEEDS").is_some(), "no fault was felt");
}

#[test]
fn reads_fail() {
    felt(run_all("reads_fail", |random| {
        Faults::everywhere(FaultRates { read_error: rate(random), ..FaultRates::NONE })
    }));
}

#[test]
fn reads_fail_for_good() {
    felt(run_all("reads_fail_for_good", |random| {
        let lasting = 1_000_000;
        Faults::everywhere(FaultRates { read_error: rate(random), lasting, ..FaultRates::NONE })
    }));
}

#[test]
fn writes_fail() {
    felt(run_all("writes_fail", |random| {
        Faults::everywhere(FaultRates { write_error: rate(random), ..FaultRates::NONE })
    }));
}

#[test]
fn writes_fail_for_good() {
    felt(run_all("writes_fail_for_good", |random| {
        let lasting = 1_000_000;
        Faults::everywhere(FaultRates { write_error: rate(random), lasting, ..FaultRates::NONE })
    }));
}

#[test]
fn flushes_fail() {
    felt(run_all("flushes_fail", |random| {
        Faults::everywhere(FaultRates { flush_error: rate(random), ..FaultRates::NONE })
    }));
}

#[test]
fn transfers_end_early() {
    felt(run_all("transfers_end_early", |random| {
        Faults::everywhere(FaultRates { short: rate(random), ..FaultRates::NONE })
    }));
}

#[test]
fn operations_take_minutes() {
    felt(run_all("operations_take_minutes", |random| {
        Faults::everywhere(FaultRates { late: rate(random), ..FaultRates::NONE })
    }));
}

/// The faults of guest data that nobody can notice: only those sectors are given up.
fn silently(kind: &str, rates: impl Fn(u32) -> FaultRates) {
    let found = run_all(kind, |random| Faults { data: rates(rate(random)), ..Faults::default() });
    assert!(found.2 > 0 || std::env::var_os("SEEDS").is_some(), "no damage was met");
}

#[test]
fn data_writes_are_lost() {
    silently("data_writes_are_lost", |rate| FaultRates { lost_write: rate, ..FaultRates::NONE });
}

#[test]
fn data_writes_go_astray() {
    silently("data_writes_go_astray", |rate| FaultRates {
        misdirected_write: rate,
        stray_target: true,
        ..FaultRates::NONE
    });
}

#[test]
fn data_bits_flip_on_the_disk() {
    silently("data_bits_flip_on_the_disk", |rate| FaultRates {
        flip_at_rest: rate,
        ..FaultRates::NONE
    });
}

#[test]
fn data_bits_flip_on_their_way() {
    silently("data_bits_flip_on_their_way", |rate| FaultRates {
        flip_on_read: rate,
        ..FaultRates::NONE
    });
}

#[test]
fn node_bits_flip_on_their_way() {
    felt(run_all("node_bits_flip_on_their_way", |random| {
        let rates = FaultRates { flip_on_read: node_rate(random), ..FaultRates::NONE };
        Faults { tree: rates, rest: rates, ..Faults::default() }
    }));
}

#[test]
fn node_bits_flip_on_the_disk() {
    felt(run_all("node_bits_flip_on_the_disk", |random| {
        let rates = FaultRates { flip_at_rest: node_rate(random), ..FaultRates::NONE };
        Faults { tree: rates, ..Faults::default() }
    }));
}

/// Guest data lands on nodes and logs, and on other guest data.
#[test]
fn data_writes_go_astray_into_metadata() {
    felt(run_all("data_writes_go_astray_into_metadata", |random| {
        let target = FaultRates { stray_target: true, ..FaultRates::NONE };
        let data = FaultRates { misdirected_write: rate(random), ..target };
        Faults { data, tree: target, ..Faults::default() }
    }));
}

#[test]
fn anything_goes_wrong() {
    felt(run_all("anything_goes_wrong", Faults::of_seed));
}

/// As the one before, with metadata that is damaged as well, where that can be found.
#[test]
fn anything_is_damaged() {
    felt(run_all("anything_is_damaged", |random| {
        let faults = Faults::of_seed(random);
        let flips = FaultRates {
            flip_at_rest: *random.pick(&[0, 2_000]),
            flip_on_read: *random.pick(&[0, 2_000]),
            stray_target: random.chance(1, 2),
            ..faults.tree
        };
        let on_read = FaultRates { flip_at_rest: 0, stray_target: false, ..flips };
        Faults { tree: flips, rest: on_read, ..faults }
    }));
}

// One reactor's volumes share its device. What one of them waits for, the others must not.

const SURE: u32 = 1_000_000;

/// A world with two volumes on one reactor, whose first leaves are on the device.
fn two_volumes(seed: u64) -> (World, VolumeId, VolumeId) {
    let mut world = World::new(WorldConfig {
        may_fail: true,
        node_cache: ByteCount::new(0),
        schedule: Schedule::AtOnce,
        ..WorldConfig::new(seed)
    });
    let [v, w] = [(); 2].map(|()| world.create(ByteCount::new(1 << 30)).expect("the power is on"));
    for volume in [v, w] {
        assert_eq!(world.write(volume, 0, 8), Ok(IoStatus::Done));
        assert_eq!(world.flush(volume), Ok(IoStatus::Done));
    }
    world.idle().expect("the power is on");
    (world, v, w)
}

/// From here on the first operation that `strikes` means has these rates, and no other.
fn strike_once(
    world: &World,
    rates: FaultRates,
    strikes: impl Fn(OpKind, BlockAddr) -> bool + 'static,
) -> Rc<Cell<bool>> {
    let struck = Rc::new(Cell::new(false));
    let told = Rc::clone(&struck);
    world.disk.set_rates(move |kind, block| {
        if told.get() || !strikes(kind, block) {
            return FaultRates::NONE;
        }
        told.set(true);
        rates
    });
    struck
}

fn steps(world: &mut World, count: usize) {
    for _ in 0..count {
        world.step();
    }
}

/// `begin` starts something of the first volume, of which the first operation that `late` means
/// takes minutes. Meanwhile, on the same reactor, the second volume lacks nothing.
fn nobody_else_waits(late: (OpKind, ExtentType), begin: impl Fn(&mut World, VolumeId) -> u64) {
    for seed in 0..5 {
        let (mut world, v, w) = two_volumes(seed);
        let extents = world.extents();
        let rates = FaultRates { late: SURE, ..FaultRates::NONE };
        let struck =
            strike_once(&world, rates, move |kind, block| (kind, extents.kind_of(block)) == late);
        let ticket = begin(&mut world, v);
        steps(&mut world, 50);
        assert!(struck.get() && world.disk.next_due().is_some(), "something is late");
        for at in [0, 8, 1 << 15] {
            assert_eq!(world.write(w, at, 8), Ok(IoStatus::Done));
            assert_eq!(world.read(w, at, 8), Ok(IoStatus::Done));
            assert_eq!(world.flush(w), Ok(IoStatus::Done));
        }
        assert_eq!(world.io(w, IoKind::Discard, 8, 8), Ok(IoStatus::Done));
        let snapshot = world.snapshot(w).expect("the power is on");
        assert_eq!(world.write(w, 3, 2), Ok(IoStatus::Done));
        let name = world.fresh_name();
        assert!(world.clone_of(snapshot, &name).expect("the power is on").is_some());
        // Time would have passed if anything had waited for what is late.
        assert!(!world.has_ended(ticket) && world.disk.next_due().is_some(), "seed {seed}");
        world.settle().expect("the power is on");
        assert!(world.latched().is_empty(), "late is not failed");
        world.crash(Keep::Nothing);
        world.recover();
    }
}

#[test]
fn a_late_data_write_holds_up_nobody_else() {
    nobody_else_waits((OpKind::Write, ExtentType::Data), |world, v| {
        world.start_io(v, IoKind::Write, 64, 8)
    });
}

#[test]
fn a_late_data_read_holds_up_nobody_else() {
    nobody_else_waits((OpKind::Read, ExtentType::Data), |world, v| {
        world.start_io(v, IoKind::Read, 0, 8)
    });
}

#[test]
fn a_late_commit_holds_up_nobody_else() {
    nobody_else_waits((OpKind::Write, ExtentType::Metadata), |world, v| {
        assert_eq!(world.write(v, 64, 8), Ok(IoStatus::Done));
        world.start_io(v, IoKind::Flush, 0, 0)
    });
}

// Lost writes of metadata. Each entry of a node and each sealed sector vouches for itself and not
// for being the newest, so an older one that is whole cannot be told from the right one. What holds
// nevertheless:

/// A node that was never written where it should be is found, and fails its own volume only.
#[test]
fn a_lost_new_node_is_found() {
    for seed in 0..5 {
        let (mut world, v, w) = two_volumes(seed);
        let (far, extents) = (1 << 15, world.extents());
        let lost = FaultRates { lost_write: SURE, ..FaultRates::NONE };
        let blocks = (0..ByteCount::new(32 << 20).blocks_floor()).map(BlockAddr::new);
        let blank: BTreeSet<_> = blocks
            .filter(|block| extents.holds(*block, ExtentType::Metadata))
            .filter(|block| world.disk.peek(*block).iter().all(|byte| *byte == 0xa5))
            .collect();
        let struck = strike_once(&world, lost, move |kind, block| {
            kind == OpKind::Write && blank.contains(&block)
        });
        assert_eq!(world.write(v, far, 8), Ok(IoStatus::Done));
        assert_eq!(world.flush(v), Ok(IoStatus::Done));
        assert!(struck.get());
        assert_eq!(world.write(w, far, 8), Ok(IoStatus::Done));
        assert_eq!(world.flush(w), Ok(IoStatus::Done));
        world.crash(Keep::Nothing);
        world.recover(); // Looks that the check names it.
        assert_eq!(world.read(v, far, 8), Ok(IoStatus::Failed));
        assert_eq!(world.write(v, far, 8), Ok(IoStatus::Failed));
        assert_eq!(world.read(v, 0, 8), Ok(IoStatus::Done), "elsewhere the volume is whole");
        for at in [0, far] {
            assert_eq!(world.read(w, at, 8), Ok(IoStatus::Done));
            assert_eq!(world.write(w, at, 8), Ok(IoStatus::Done));
        }
    }
}

/// A node that was to be changed where it is and was not: an older state of what it maps is back,
/// silently. No other block of the volume changes, nor any other volume.
#[test]
fn a_lost_change_of_a_node_takes_back_that_change_alone() {
    for seed in 0..5 {
        let (mut world, v, w) = two_volumes(seed);
        let extents = world.extents();
        let lost = FaultRates { lost_write: SURE, ..FaultRates::NONE };
        let struck = strike_once(&world, lost, move |kind, block| {
            kind == OpKind::Write && extents.holds(block, ExtentType::Metadata)
        });
        assert_eq!(world.write(v, 64, 8), Ok(IoStatus::Done));
        assert_eq!(world.flush(v), Ok(IoStatus::Done));
        assert!(struck.get() && !world.disk.damaged_blocks().is_empty());
        assert_eq!(world.write(w, 64, 8), Ok(IoStatus::Done));
        assert_eq!(world.flush(w), Ok(IoStatus::Done));
        world.crash(Keep::Nothing);
        assert!(world.check().is_clean(), "it cannot be found");
        world.model.may_be_unwritten(v, 64..72);
        world.recover();
        for volume in [v, w] {
            assert_eq!(world.write(volume, 64, 8), Ok(IoStatus::Done));
            assert_eq!(world.read(volume, 0, 8), Ok(IoStatus::Done));
        }
    }
}

/// When the change that was lost had freed a block, and the block has become another volume's, two
/// volumes share it. Nothing notices that at run time; the offline check does.
#[test]
fn what_a_lost_change_of_a_node_makes_two_volumes_share_the_check_names() {
    let (mut world, v, w) = two_volumes(1);
    let extents = world.extents();
    let lost = FaultRates { lost_write: SURE, ..FaultRates::NONE };
    let struck = strike_once(&world, lost, move |kind, block| {
        kind == OpKind::Write && extents.holds(block, ExtentType::Metadata)
    });
    assert_eq!(world.io(v, IoKind::Discard, 0, 8), Ok(IoStatus::Done));
    assert_eq!(world.flush(v), Ok(IoStatus::Done));
    assert!(struck.get());
    world.idle().expect("the power is on");
    // As many blocks as there are claimed, so that the freed one is among them.
    for at in 0..512 {
        assert_eq!(world.write(w, 4096 + at * 8, 8), Ok(IoStatus::Done));
    }
    assert_eq!(world.flush(w), Ok(IoStatus::Done));
    world.crash(Keep::Nothing);
    corrupt(&world);
}

/// The same with the bits of a claim: the check names blocks that are used and not allocated.
#[test]
fn a_lost_claim_the_check_names() {
    let (mut world, v, _) = two_volumes(1);
    let extents = world.extents();
    world.disk.set_rates(move |kind, block| match extents.kind_of(block) {
        ExtentType::Data if kind == OpKind::Write && !extents.holds(block, ExtentType::Data) => {
            FaultRates { lost_write: SURE, ..FaultRates::NONE }
        }
        _ => FaultRates::NONE,
    });
    for at in 0..256 {
        assert_eq!(world.write(v, 4096 + at * 8, 8), Ok(IoStatus::Done));
    }
    assert_eq!(world.flush(v), Ok(IoStatus::Done));
    assert!(!world.disk.damaged_blocks().is_empty());
    world.crash(Keep::Nothing);
    corrupt(&world);
}

fn corrupt(world: &World) {
    let report = world.check();
    let corrupt = report.findings.iter().any(|finding| finding.severity == Severity::Corrupt);
    assert!(corrupt, "{:?}", report.findings);
}
