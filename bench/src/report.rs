//! What a load measured: numbers for programs (JSON) and a few lines for people.

use std::fmt;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::load::{Measured, Options};
use crate::plan::{Settings, Workload};
use crate::queue::Kind;
use crate::size;
use crate::timeline::Timeline;

/// Latencies beyond this are recorded as this.
const LATENCY_MAX: Duration = Duration::from_secs(60);

/// Share of the time that a client may lose its core before the figures come with a warning.
pub(crate) const WAIT_TOLERATED: f64 = 0.02;

/// Latencies of data requests and of flushes, in nanoseconds, to three digits.
pub(crate) struct Histograms {
    data: Histogram<u64>,
    flush: Histogram<u64>,
}

impl Histograms {
    /// Empty histograms; recording allocates nothing.
    pub(crate) fn new() -> Self {
        let empty = || {
            Histogram::new_with_bounds(1, LATENCY_MAX.as_nanos() as u64, 3)
                .expect("the bounds are constants that hdrhistogram takes")
        };
        Self { data: empty(), flush: empty() }
    }

    /// Those of reads and writes.
    #[cfg(test)]
    pub(crate) fn data(&self) -> &Histogram<u64> {
        &self.data
    }

    /// Notes the latency of one request.
    pub(crate) fn record(&mut self, kind: Kind, latency_ns: u64) {
        match kind {
            Kind::Read | Kind::Write | Kind::Discard => self.data.saturating_record(latency_ns),
            Kind::Flush => self.flush.saturating_record(latency_ns),
        }
    }
}

/// Reads that were checked against what was written.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Verified {
    /// Requests whose data was what it must be.
    pub(crate) good: u64,
    /// Requests of blocks that no verifying run has written.
    pub(crate) unknown: u64,
}

/// Latency of a kind of request, in nanoseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Latency {
    pub(crate) count: u64,
    pub(crate) mean: u64,
    pub(crate) p50: u64,
    pub(crate) p90: u64,
    pub(crate) p99: u64,
    pub(crate) p999: u64,
    pub(crate) p9999: u64,
    pub(crate) max: u64,
}

impl Latency {
    fn of(histogram: &Histogram<u64>) -> Option<Self> {
        (!histogram.is_empty()).then(|| Self {
            count: histogram.len(),
            mean: histogram.mean() as u64,
            p50: histogram.value_at_quantile(0.5),
            p90: histogram.value_at_quantile(0.9),
            p99: histogram.value_at_quantile(0.99),
            p999: histogram.value_at_quantile(0.999),
            p9999: histogram.value_at_quantile(0.9999),
            max: histogram.max(),
        })
    }
}

/// One measurement. The field names are those of the JSON output.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) workload: Workload,
    pub(crate) block_bytes: u32,
    pub(crate) depth: u16,
    pub(crate) queues: u16,
    pub(crate) region_bytes: u64,
    pub(crate) seconds: f64,
    /// Requests finished while measuring, flushes included.
    pub(crate) requests: u64,
    /// Reads and writes a second, without flushes.
    pub(crate) iops: f64,
    /// Megabytes (10^6 bytes) of data a second.
    pub(crate) megabytes_per_second: f64,
    /// Of reads and writes.
    pub(crate) latency_ns: Option<Latency>,
    pub(crate) flush_latency_ns: Option<Latency>,
    /// Requests of a paced load that were due and never issued, since the server was that far behind.
    pub(crate) not_issued: u64,
    /// The flush at the end, in seconds: not part of the rest.
    pub(crate) last_flush_seconds: Option<f64>,
    /// CPU time of the server for each request, waiting by polling included.
    pub(crate) server_cpu_us_per_request: Option<f64>,
    /// Share of one core that the server used: 1.0 is all of it.
    pub(crate) server_cores: Option<f64>,
    /// System calls that woke the server.
    pub(crate) kicks: u64,
    /// Share of the time for which another thread had the client's core: above 0.02 or so, the
    /// machine was too busy for the figures to mean much.
    pub(crate) client_waited: Option<f64>,
    pub(crate) verified: Option<Verified>,
    #[serde(skip)]
    pub(crate) timeline: Option<Timeline>,
}

impl Report {
    /// Turns what was measured into rates.
    pub(crate) fn new(options: &Options, settings: &Settings, measured: Measured) -> Self {
        let seconds = Duration::from_nanos(measured.nanoseconds).as_secs_f64();
        let rate = |count: f64| if seconds > 0.0 { count / seconds } else { 0.0 };
        let latency_ns = Latency::of(&measured.histograms.data);
        let data_requests = latency_ns.map_or(0, |latency| latency.count);
        let cpu = measured.server_cpu.map(|cpu| cpu.as_secs_f64());
        Self {
            workload: options.workload,
            block_bytes: options.block_bytes,
            depth: options.depth,
            queues: options.queues,
            region_bytes: settings.region_bytes,
            seconds,
            requests: measured.requests,
            iops: rate(data_requests as f64),
            megabytes_per_second: rate(measured.bytes as f64) / 1e6,
            latency_ns,
            flush_latency_ns: Latency::of(&measured.histograms.flush),
            not_issued: measured.not_issued,
            last_flush_seconds: measured.last_flush.map(|it| it.as_secs_f64()),
            server_cpu_us_per_request: cpu
                .filter(|_| measured.requests > 0)
                .map(|cpu| cpu * 1e6 / measured.requests as f64),
            server_cores: cpu.map(rate),
            kicks: measured.kicks,
            client_waited: measured.client_waited.map(|waited| rate(waited.as_secs_f64())),
            verified: measured.verified,
            timeline: measured.timeline,
        }
    }
}

/// Nanoseconds as microseconds.
fn us(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e3
}

impl fmt::Display for Latency {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "mean {:.1}  p50 {:.1}  p99 {:.1}  p99.9 {:.1}  max {:.1} µs",
            us(self.mean),
            us(self.p50),
            us(self.p99),
            us(self.p999),
            us(self.max)
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            out,
            "{} {}, depth {}, queues {}: {} requests in {:.2} s",
            self.workload.name(),
            size::format(self.block_bytes.into()),
            self.depth,
            self.queues,
            self.requests,
            self.seconds
        )?;
        writeln!(out, "  rate      {:.0} IOPS, {:.1} MB/s", self.iops, self.megabytes_per_second)?;
        if let Some(latency) = &self.latency_ns {
            writeln!(out, "  latency   {latency}")?;
        }
        if let Some(latency) = &self.flush_latency_ns {
            writeln!(out, "  flush     {latency}")?;
        }
        if let (Some(each), Some(cores)) = (self.server_cpu_us_per_request, self.server_cores) {
            writeln!(
                out,
                "  server    {each:.2} µs CPU a request, {:.0} % of a core",
                cores * 100.0
            )?;
        }
        write!(out, "  kicks     {}", self.kicks)?;
        if self.not_issued > 0 {
            write!(out, "\n  BEHIND    {} requests were due and not issued", self.not_issued)?;
        }
        if let Some(waited) = self.client_waited.filter(|waited| *waited > WAIT_TOLERATED) {
            let percent = waited * 100.0;
            write!(
                out,
                "\n  BUSY      the client was without its core for {percent:.0} % of the time"
            )?;
        }
        if let Some(Verified { good, unknown }) = self.verified {
            write!(out, "\n  verified  {good} reads good, {unknown} of blocks never written")?;
        }
        Ok(())
    }
}
