//! The counters as Prometheus text, from the same [`StatsView`] that `bessel stats` prints.

use super::types::{JobKind, State, StatsView};
use std::fmt::Write as _;

/// The text format, version 0.0.4.
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// One metric: its name, type and help, and its samples.
struct Metric<'a> {
    name: &'a str,
    kind: &'a str,
    help: &'a str,
}

impl Metric<'_> {
    fn write(&self, text: &mut String, samples: impl IntoIterator<Item = (String, f64)>) {
        let _ = writeln!(
            text,
            "# HELP {} {}\n# TYPE {} {}",
            self.name, self.help, self.name, self.kind
        );
        for (labels, value) in samples {
            let _ = writeln!(text, "{}{labels} {value}", self.name);
        }
    }
}

/// All metrics. Names of volumes are words (see `reference`), and so is what jobs are about: labels
/// need no escaping.
pub(super) fn prometheus(stats: &StatsView) -> String {
    let mut text = String::new();
    let one = |value: u64| [(String::new(), value as f64)];
    let counter = |name, help| Metric { name, kind: "counter", help };
    let gauge = |name, help| Metric { name, kind: "gauge", help };
    let uptime = stats.uptime_ns as f64 / 1e9;
    gauge("bessel_uptime_seconds", "Time since the daemon started.")
        .write(&mut text, [(String::new(), uptime)]);

    let store = &stats.store;
    gauge("bessel_store_bytes", "Size of the store.").write(&mut text, one(store.total_bytes));
    gauge("bessel_store_free_bytes", "In use by no volume or snapshot.")
        .write(&mut text, one(store.free_bytes));
    gauge("bessel_store_used_bytes", "Allocated, by type of extent.").write(
        &mut text,
        [
            ("{type=\"data\"}".to_owned(), store.data_bytes as f64),
            ("{type=\"metadata\"}".to_owned(), store.metadata_bytes as f64),
        ],
    );

    let mut in_state = |name, help, state| {
        let samples = stats.volumes.iter().map(|volume| {
            let is = f64::from(u8::from(volume.state == state));
            (format!("{{volume=\"{}\"}}", volume.name), is)
        });
        gauge(name, help).write(&mut text, samples);
    };
    in_state(
        "bessel_volume_failed",
        "1 while it refuses writes since a flush or write of the device has failed.",
        State::Failed,
    );
    in_state("bessel_volume_detached", "1 while it is detached.", State::Detached);
    in_state(
        "bessel_volume_unavailable",
        "1 when it could not be opened or served.",
        State::Unavailable,
    );

    in_state("bessel_volume_importing", "1 while it is being imported.", State::Importing);

    let mut by_volume = |name, help, value: fn(&super::types::VolumeStatsView) -> u64| {
        let samples = stats
            .volumes
            .iter()
            .map(|volume| (format!("{{volume=\"{}\"}}", volume.name), value(volume) as f64));
        counter(name, help).write(&mut text, samples);
    };
    by_volume("bessel_volume_reads_total", "Reads completed.", |it| it.reads);
    by_volume("bessel_volume_writes_total", "Writes completed.", |it| it.writes);
    by_volume("bessel_volume_flushes_total", "Flushes completed.", |it| it.flushes);
    by_volume("bessel_volume_discards_total", "Discards and write-zeroes completed.", |it| {
        it.discards
    });
    by_volume("bessel_volume_read_bytes_total", "Bytes read.", |it| it.read_bytes);
    by_volume("bessel_volume_written_bytes_total", "Bytes written.", |it| it.written_bytes);
    by_volume("bessel_volume_errors_total", "Requests answered with an error.", |it| it.errors);
    by_volume("bessel_volume_allocated_bytes_total", "Data and metadata given to it.", |it| {
        it.allocated_bytes
    });

    by_volume("bessel_volume_snapshots_scheduled_total", "Snapshots taken by schedule.", |it| {
        it.snapshots_scheduled
    });
    by_volume(
        "bessel_volume_snapshots_skipped_total",
        "Scheduled and not taken, since the one before had not ended.",
        |it| it.snapshots_skipped,
    );
    by_volume("bessel_volume_snapshots_thinned_total", "Deleted by the schedule.", |it| {
        it.snapshots_thinned
    });
    by_volume(
        "bessel_volume_snapshots_failed_total",
        "Snapshots by schedule, and deletions, that failed.",
        |it| it.snapshots_failed,
    );

    let throttled = stats.volumes.iter().map(|volume| {
        (format!("{{volume=\"{}\"}}", volume.name), volume.throttled_ns as f64 / 1e9)
    });
    counter("bessel_volume_throttled_seconds_total", "Time its guest had to wait for its limits.")
        .write(&mut text, throttled);

    let mut by_reactor = |name, help, value: fn(&super::types::ReactorView) -> f64| {
        let samples = stats
            .reactors
            .iter()
            .map(|reactor| (format!("{{reactor=\"{}\"}}", reactor.index), value(reactor)));
        counter(name, help).write(&mut text, samples);
    };
    by_reactor("bessel_reactor_turns_total", "Turns of the loop.", |it| it.turns as f64);
    by_reactor("bessel_reactor_turns_busy_total", "Turns that found work.", |it| {
        it.turns_busy as f64
    });
    by_reactor("bessel_reactor_sleeps_total", "Times it went to sleep.", |it| it.sleeps as f64);
    by_reactor("bessel_reactor_busy_seconds_total", "Time spent on work.", |it| {
        it.busy_ns as f64 / 1e9
    });
    by_reactor("bessel_reactor_spun_seconds_total", "Time spent awake with nothing to do.", |it| {
        it.spun_ns as f64 / 1e9
    });
    by_reactor("bessel_reactor_asleep_seconds_total", "Time spent asleep.", |it| {
        it.asleep_ns as f64 / 1e9
    });
    by_reactor(
        "bessel_reactor_device_polled_total",
        "Reads and writes of the device that were polled for, where it does not interrupt for them.",
        |it| it.device_polled as f64,
    );
    by_reactor(
        "bessel_reactor_messages_total",
        "Messages taken from other reactors and from the control plane.",
        |it| it.messages as f64,
    );
    by_reactor("bessel_node_cache_hits_total", "Nodes found in the cache.", |it| {
        it.node_cache_hits as f64
    });
    by_reactor("bessel_node_cache_misses_total", "Nodes loaded from the device.", |it| {
        it.node_cache_misses as f64
    });
    by_reactor("bessel_commits_total", "Commit rounds begun.", |it| it.commits as f64);
    by_reactor(
        "bessel_forwarded_total",
        "Guests' requests sent to the home of their volume.",
        |it| it.forwarded as f64,
    );
    by_reactor("bessel_metadata_writes_total", "Nodes, log blocks and records written.", |it| {
        it.metadata_writes as f64
    });
    by_reactor("bessel_device_flushes_total", "Flushes sent to the device.", |it| {
        it.device_flushes as f64
    });
    by_reactor("bessel_device_flush_failures_total", "Flushes that the device failed.", |it| {
        it.device_flush_failures as f64
    });
    by_reactor(
        "bessel_device_errors_total",
        "I/O that the device failed, flushes included.",
        |it| it.device_errors as f64,
    );
    by_reactor("bessel_node_errors_total", "Nodes unreadable or damaged.", |it| {
        it.node_errors as f64
    });
    by_reactor("bessel_no_space_total", "Requests that found the store full.", |it| {
        it.no_space as f64
    });

    let reclaim = &stats.reclaim;
    counter("bessel_reclaimed_bytes_total", "Freed as only deleted snapshots had held it.")
        .write(&mut text, one(reclaim.freed_bytes));
    counter("bessel_reclaimed_snapshots_total", "Deleted snapshots whose own space was freed.")
        .write(&mut text, one(reclaim.snapshots));
    counter("bessel_reclaims_left_total", "Deleted snapshots left to the collector.")
        .write(&mut text, one(reclaim.left_to_collector));
    gauge("bessel_reclaims_waiting", "Deleted snapshots whose own space is to be freed.")
        .write(&mut text, one(reclaim.waiting));
    let gc = &stats.gc;
    gauge("bessel_gc_running", "1 while garbage is collected.")
        .write(&mut text, one(u64::from(gc.running)));
    counter("bessel_gc_runs_total", "Collections that have ended.").write(&mut text, one(gc.ended));
    counter("bessel_gc_freed_bytes_total", "Freed by collections.")
        .write(&mut text, one(gc.freed_bytes_total));
    let mut by_job = |name, help, value: fn(&super::types::JobView) -> Option<u64>| {
        let samples = stats.jobs.iter().filter_map(|job| {
            let kind = match job.kind {
                JobKind::Export => "export",
                JobKind::Import => "import",
            };
            let labels =
                format!("{{id=\"{}\",kind=\"{kind}\",subject=\"{}\"}}", job.id, job.subject);
            Some((labels, value(job)? as f64))
        });
        gauge(name, help).write(&mut text, samples);
    };
    by_job("bessel_job_done_bytes", "How far long work has come.", |it| Some(it.done_bytes));
    by_job("bessel_job_total_bytes", "How far it is in the end, if that is known.", |it| {
        it.total_bytes
    });
    let latency = &stats.snapshot_latency;
    counter("bessel_snapshots_total", "Snapshots taken.").write(&mut text, one(latency.count));
    let seconds = |nanoseconds: u64| nanoseconds as f64 / 1e9;
    gauge("bessel_snapshot_latency_seconds", "From command to durable, since the start.").write(
        &mut text,
        [
            ("{quantile=\"0.5\"}".to_owned(), seconds(latency.p50_ns)),
            ("{quantile=\"0.99\"}".to_owned(), seconds(latency.p99_ns)),
            ("{quantile=\"1\"}".to_owned(), seconds(latency.max_ns)),
        ],
    );
    text
}
