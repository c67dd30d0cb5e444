//! Random work, random power cuts, one seed a run: everything nobody imagined.
//!
//! `SEEDS=17` runs one seed, `SEEDS=0..5000` a range; without it a fixed range runs, and a few fresh
//! seeds, which are printed first. A failure prints the command that replays it. Keep failing seeds
//! in `REGRESSIONS`. `make soak` does the same for hours, and more of it for each seed.

use std::io::Write;
use std::num::NonZero;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use bessel_reactor::device::sim::Random;
use bessel_tests::seeds::{Effort, Tally, config, run};
use bessel_tests::workload::Workload;
use bessel_tests::world::World;

/// Seeds that once found something, whatever it was.
const REGRESSIONS: &[u64] = &[1, 7, 12, 60, 219, 1330];

/// Seeds that every run of the suite tries.
const FIXED: Range<u64> = 0..2000;

/// Seeds that only this run of the suite tries.
const FRESH: usize = 20;

fn seeds() -> Vec<u64> {
    let number = |text: &str| text.parse().expect("SEEDS is `n` or `from..to`");
    match std::env::var("SEEDS") {
        Err(_) => REGRESSIONS.iter().copied().chain(FIXED).chain(fresh_seeds()).collect(),
        Ok(text) => match text.split_once("..") {
            Some((from, to)) => (number(from)..number(to)).collect(),
            None => vec![number(&text)],
        },
    }
}

#[expect(clippy::disallowed_methods, reason = "the edge where fresh seeds come from")]
fn fresh_seeds() -> Vec<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970");
    let mut random = Random::new(now.as_nanos() as u64);
    let fresh: Vec<u64> = (0..FRESH).map(|_| random.below(1 << 32)).collect();
    say(&format!("fresh seeds: {fresh:?}"));
    fresh
}

/// Prints at once, also where the harness keeps the output of tests that pass to itself: a run that
/// hangs or is killed must have said what it was doing.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[test]
fn nothing_acknowledged_is_lost_and_nothing_foreign_is_seen() {
    let seeds = seeds();
    let next = AtomicUsize::new(0);
    let (total, failed) = (Mutex::new(Tally::default()), Mutex::new(Vec::new()));
    let work = || {
        while let Some(&seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
            match catch_unwind(AssertUnwindSafe(|| run(seed, &Effort::SLICE))) {
                Ok(tally) => *total.lock().expect("nobody panics with it") += tally,
                Err(_) => {
                    let replay =
                        format!("SEEDS={seed} cargo test -p bessel-tests --test simulation");
                    say(&format!("seed {seed} failed: {replay}"));
                    failed.lock().expect("nobody panics with it").push(replay);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, NonZero::get) {
            scope.spawn(work);
        }
    });
    let total = total.into_inner().expect("nobody panics with it");
    println!("{total:#?}");
    let failed = failed.into_inner().expect("nobody panics with it");
    assert!(failed.is_empty(), "these failed:\n{}", failed.join("\n"));
    // A seed alone, replayed, need not come by everything.
    let few = seeds.len() < 100;
    let Tally { enumerated, sampled, nth, sectors, .. } = total;
    let Tally { reclaims, collections, diffs, imports, moves, .. } = total;
    let counts = [enumerated, sampled, nth, sectors, reclaims, collections, diffs, imports, moves];
    let visited = total.forwarded > 0 && total.visiting > total.forwarded;
    let looked = few || visited && counts.iter().all(|count| *count > 0);
    assert!(looked, "a harness that looks at nothing finds nothing: {total:#?}");
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
    assert_eq!(run(3, &Effort::SLICE), run(3, &Effort::SLICE), "and so is all that is tried aside");
}
