//! `bessel stats`: space, reactors, volumes, snapshot latencies.

use super::output::{Table, duration, or_dash, print_either};
use super::{ApiArgs, Outcome};
use crate::api::types::{JobKind, StatsView};
use bessel_reactor::units::ByteCount;
use clap::Args;

/// `bessel stats`
#[derive(Args, Debug)]
pub(crate) struct StatsArgs {
    #[command(flatten)]
    api: ApiArgs,
}

/// Runs `bessel stats`.
pub(crate) fn run(arguments: &StatsArgs) -> Outcome {
    let stats: StatsView = arguments.api.client().get("/v1/stats")?;
    print_either(arguments.api.json, &stats, text)
}

fn text(stats: &StatsView) -> String {
    let bytes = |count: u64| ByteCount::new(count).human();
    let store = &stats.store;
    let latency = &stats.snapshot_latency;
    let mut volumes = Table::new(&[
        "VOLUME",
        "READS",
        "READ",
        "WRITES",
        "WRITTEN",
        "FLUSHES",
        "DISCARDS",
        "ERRORS",
        "ALLOCATED",
    ]);
    for volume in &stats.volumes {
        volumes.row(vec![
            volume.name.clone(),
            volume.reads.to_string(),
            bytes(volume.read_bytes),
            volume.writes.to_string(),
            bytes(volume.written_bytes),
            volume.flushes.to_string(),
            volume.discards.to_string(),
            volume.errors.to_string(),
            bytes(volume.allocated_bytes),
        ]);
    }
    let mut reactors = Table::new(&[
        "REACTOR", "CORE", "BUSY", "SPUN", "ASLEEP", "SLEEPS", "HITS", "MISSES", "COMMITS",
    ]);
    for reactor in &stats.reactors {
        reactors.row(vec![
            reactor.index.to_string(),
            reactor.core.to_string(),
            duration(reactor.busy_ns),
            duration(reactor.spun_ns),
            duration(reactor.asleep_ns),
            reactor.sleeps.to_string(),
            reactor.node_cache_hits.to_string(),
            reactor.node_cache_misses.to_string(),
            reactor.commits.to_string(),
        ]);
    }
    let mut jobs = String::new();
    if !stats.jobs.is_empty() {
        let mut table = Table::new(&["JOB", "WORK", "OF", "DONE", "TOTAL", "STARTED"]);
        for job in &stats.jobs {
            table.row(vec![
                job.id.to_string(),
                match job.kind {
                    JobKind::Export => "export".to_owned(),
                    JobKind::Import => "import".to_owned(),
                },
                job.subject.clone(),
                bytes(job.done_bytes),
                or_dash(&job.total_bytes.map(bytes)),
                job.started.clone(),
            ]);
        }
        jobs = format!("\n{}", table.render());
    }
    format!(
        "store {}: {} in all, {} free, {} data, {} metadata\n\
         snapshots: {} taken, p50 {}, p99 {}, max {}\n\n{}\n{}{jobs}",
        store.device,
        bytes(store.total_bytes),
        bytes(store.free_bytes),
        bytes(store.data_bytes),
        bytes(store.metadata_bytes),
        latency.count,
        duration(latency.p50_ns),
        duration(latency.p99_ns),
        duration(latency.max_ns),
        volumes.render(),
        reactors.render(),
    )
}
