//! Random work, random power cuts, one seed a run: everything nobody imagined.
//!
//! `SEEDS=17` runs one seed, `SEEDS=0..5000` a range; without it a fixed range runs. A failure
//! prints the command that replays it. Keep failing seeds in `REGRESSIONS`.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use bessel_reactor::device::sim::{Random, Schedule};
use bessel_reactor::units::ByteCount;
use bessel_tests::workload::Workload;
use bessel_tests::world::{World, WorldConfig};

/// Seeds that once found something, whatever it was.
const REGRESSIONS: &[u64] = &[1, 7, 12, 60];

/// Seeds that every run of the suite tries.
const FIXED: Range<u64> = 0..400;

fn seeds() -> Vec<u64> {
    let number = |text: &str| text.parse().expect("SEEDS is `n` or `from..to`");
    match std::env::var("SEEDS") {
        Err(_) => REGRESSIONS.iter().copied().chain(FIXED).collect(),
        Ok(text) => match text.split_once("..") {
            Some((from, to)) => (number(from)..number(to)).collect(),
            None => vec![number(&text)],
        },
    }
}

/// One world of its seed's making.
fn config(seed: u64) -> WorldConfig {
    let mut random = Random::new(seed);
    WorldConfig {
        shards: 1 + random.below(3) as usize,
        capacity: ByteCount::new(*random.pick(&[64 << 20, 128 << 20])),
        extent_size: ByteCount::new(*random.pick(&[1 << 20, 2 << 20, 4 << 20])),
        volatile_cache: random.chance(3, 4),
        schedule: *random.pick(&[
            Schedule::Random,
            Schedule::Random,
            Schedule::Random,
            Schedule::AtOnce,
            Schedule::Fifo,
        ]),
        // The smallest there is, to evict all the time; or room for everything.
        node_cache: ByteCount::new(*random.pick(&[0, 512 << 10, 4 << 20])),
        requests: *random.pick(&[4, 16, 64]),
        offset_alignment: *random.pick(&[512, 512, 4096]),
        may_fill: true,
        // Full all the time, or never.
        journal_entries: *random.pick(&[50, 1000]),
        ..WorldConfig::new(seed)
    }
}

/// Runs one seed; returns power cuts and sectors compared.
fn run(seed: u64) -> (u64, u64) {
    let mut world = World::new(config(seed));
    let workload = Workload::default();
    let lives = 2 + world.random.below(4);
    for _ in 0..lives {
        let steps = 1 + world.random.below(250);
        for _ in 0..steps {
            workload.step(&mut world);
        }
        match world.random.below(12) {
            8.. => world.kill(),
            0 => world.shut_down().expect("nobody cuts the power here"),
            1 => {
                world.settle().expect("nobody cuts the power here");
                world.crash_somehow();
            }
            _ => world.crash_somehow(),
        }
        world.recover();
        if world.random.chance(1, 3) {
            world.verify_snapshots().expect("the power is back");
        }
    }
    (world.disk.counters().crashes, world.model.sectors_checked)
}

#[test]
fn nothing_acknowledged_is_lost_and_nothing_foreign_is_seen() {
    let mut totals = (0, 0);
    let seeds = seeds();
    for &seed in &seeds {
        match catch_unwind(AssertUnwindSafe(|| run(seed))) {
            Ok((crashes, sectors)) => {
                totals = (totals.0 + crashes, totals.1 + sectors);
            }
            Err(_) => {
                panic!("seed {seed}: SEEDS={seed} cargo test -p bessel-tests --test simulation")
            }
        }
    }
    println!("{} seeds, {} power cuts, {} sectors compared", seeds.len(), totals.0, totals.1);
    assert!(totals.0 > 0 && totals.1 > 0, "a harness that looks at nothing finds nothing");
}

#[test]
fn one_seed_is_one_run() {
    let trace = |seed| {
        let mut world = World::new(config(seed));
        world.disk.trace();
        for _ in 0..100 {
            Workload::default().step(&mut world);
        }
        (world.disk.trace(), world.disk.counters())
    };
    assert_eq!(trace(1), trace(1));
    assert_ne!(trace(1), trace(2));
}
