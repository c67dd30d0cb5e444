//! The measuring loop: keeps every slot of every queue busy, polls, and writes down what it saw.
//!
//! [`run`] is the whole of a measurement: connect, start queues, drive, stop. [`Driver`] is the
//! loop alone, over queues that someone serves. It never sleeps and never waits without a
//! bound: a server that stops answering, closes its socket or breaks the rings ends the run with
//! an error.
//!
//! Time is read once for each batch of completions. A request's latency runs from the reading
//! before it was shown to the server to the reading after it was found finished, so the loop's own
//! work counts against the server, equally for all.
//!
//! A load may have a pace: then a request comes when it is due, whether or not those before it have
//! been answered, and its latency counts from that moment. A stall delays all that come due meanwhile, and
//! shows as what it is. Without a pace the next request comes when one has been answered.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::{Clock, unix_time};
use crate::frontend::{Disk, Frontend, Wanted};
use crate::interrupt;
use crate::memory::{GuestMemory, PAGE};
use crate::pattern::{self, Found, Ledger};
use crate::plan::{self, Plan, RUN_ALIGNMENT, Settings, Source, Workload};
use crate::process;
use crate::queue::{Completion, Kind, Operation, Queue, Shape};
use crate::report::{Histograms, Report, Verified};
use crate::size;
use crate::timeline::Timeline;

/// No completion for this long, with requests in flight, means that the server hangs.
const STALL_TIMEOUT: Duration = Duration::from_secs(20);

/// With nothing finished for this long, look whether the server is still there.
const LIVENESS_AFTER: Duration = Duration::from_millis(20);

/// Turns without a completion between two readings of the clock: some tens of microseconds.
const IDLE_TURNS_PER_CLOCK: u32 = 2048;

/// Guest memory we are willing to take.
const MEMORY_BYTES_MAX: u64 = 4 << 30;

/// Blocks whose generation we are willing to remember: 320 MiB of ledger.
const LEDGER_BLOCKS_MAX: u64 = 64 << 20;

/// Called after each write that has been answered, before the next request is issued. What it waits for, the
/// load waits for.
pub(crate) type AfterWrite = Box<dyn FnMut() -> Result<(), String> + Send>;

/// A load, as asked for.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) socket: PathBuf,
    pub(crate) workload: Workload,
    pub(crate) block_bytes: u32,
    /// Requests in flight on each queue.
    pub(crate) depth: u16,
    pub(crate) queues: u16,
    /// The number of the first of them.
    pub(crate) first_queue: u16,
    /// Measure for this long, unless `requests` are done before.
    pub(crate) duration: Option<Duration>,
    /// Stop after this many requests.
    pub(crate) requests: Option<u64>,
    /// Requests a second that come due, answered or not; as many as the server takes when nothing is said.
    pub(crate) rate: Option<f64>,
    /// Load for this long before measuring.
    pub(crate) warmup: Duration,
    /// Bytes from the start of the disk that are used; all when nothing is said.
    pub(crate) region_bytes: Option<u64>,
    /// Where requests in order begin.
    pub(crate) first_byte: u64,
    pub(crate) read_percent: u8,
    pub(crate) flush_every: u64,
    /// Stop when each byte of the region has been visited once, in order.
    pub(crate) one_pass: bool,
    /// Ends with a flush that must succeed.
    pub(crate) flush_at_end: bool,
    pub(crate) verify: bool,
    pub(crate) event_index: bool,
    pub(crate) indirect: bool,
    pub(crate) seed: u64,
    /// Read time from this clock, and keep a timeline by it.
    pub(crate) timeline: Option<Clock>,
    /// The server's process; found through the socket when nothing is said.
    pub(crate) server_pid: Option<u32>,
    /// How long a server may take to make its socket.
    pub(crate) connect_patience: Duration,
    /// The longest the whole load may take.
    pub(crate) timeout: Duration,
}

impl Default for Options {
    /// Random 4 KiB reads, without an end: the caller sets a limit.
    fn default() -> Self {
        Self {
            socket: PathBuf::new(),
            workload: Workload::RandRead,
            block_bytes: 4096,
            depth: 32,
            queues: 1,
            first_queue: 0,
            duration: None,
            requests: None,
            rate: None,
            one_pass: false,
            warmup: Duration::ZERO,
            region_bytes: None,
            first_byte: 0,
            read_percent: 70,
            flush_every: 0,
            flush_at_end: false,
            verify: false,
            event_index: true,
            indirect: false,
            seed: 1,
            timeline: None,
            server_pid: None,
            connect_patience: Duration::from_secs(5),
            timeout: Duration::from_secs(600),
        }
    }
}

/// Runs a load against a server and returns what was measured.
pub(crate) fn run(options: &Options) -> Result<Report, String> {
    run_with(options, None)
}

/// The same, with something done after each write.
pub(crate) fn run_with(
    options: &Options,
    after_write: Option<AfterWrite>,
) -> Result<Report, String> {
    let wanted = Wanted {
        queues: options.queues,
        first_queue: options.first_queue,
        event_index: options.event_index,
        indirect: options.indirect,
    };
    let mut frontend = Frontend::connect(&options.socket, wanted, options.connect_patience)?;
    let settings = settle(options, frontend.disk())?;
    let shape = Shape {
        depth: options.depth,
        data_bytes_max: settings.data_bytes_max(),
        event_index: frontend.disk().event_index,
        indirect: options.indirect,
    };
    let queues = lay_out_queues(shape, options.queues)?;
    let memory = Arc::clone(&queues.memory);
    let mut driver = Driver::new(queues, settings, options.verify);
    driver.after_write = after_write;
    if let Some(clock) = options.timeline {
        let longest = options.warmup + options.duration.unwrap_or(options.timeout);
        driver.keep_timeline(clock, longest);
    }
    frontend.start(&memory, &driver.queues)?;
    let pid = options.server_pid.or_else(|| frontend.server_pid());
    let measured = driver.drive(
        Limits {
            warmup: options.warmup,
            duration: options.duration,
            requests: match options.one_pass {
                true => Some(plan::requests_of_a_pass(&settings)),
                false => options.requests,
            },
            rate: options.rate,
            timeout: options.timeout,
        },
        options.flush_at_end,
        &|| frontend.check_alive(),
        pid,
    );
    let report = Report::new(options, &settings, measured?);
    frontend.stop()?;
    Ok(report)
}

/// Checks the options against the disk, and fills in what was left open.
fn settle(options: &Options, disk: Disk) -> Result<Settings, String> {
    let region_bytes = options.region_bytes.unwrap_or(disk.capacity_bytes);
    let capacity = size::format(disk.capacity_bytes);
    if region_bytes > disk.capacity_bytes {
        let region = size::format(region_bytes);
        return Err(format!("a region of {region} does not fit the disk of {capacity}"));
    }
    if !region_bytes.is_multiple_of(512) || region_bytes < u64::from(options.block_bytes) {
        let region = size::format(region_bytes);
        return Err(format!(
            "a region of {region} is not a whole number of sectors that holds a block of {}",
            size::format(options.block_bytes.into())
        ));
    }
    if options.first_byte >= region_bytes {
        return Err(format!("byte {} to begin at is not in the region", options.first_byte));
    }
    if options.workload.writes() && disk.read_only {
        return Err("the disk is read-only; use --rw randread or read".into());
    }
    if (options.flush_every > 0 || options.flush_at_end) && !disk.flush {
        return Err("the server does not offer FLUSH; leave out --flush-every".into());
    }
    if options.workload == Workload::Discard {
        let Some(most) = disk.discard_bytes_max else {
            return Err("the server does not offer DISCARD".into());
        };
        if u64::from(options.block_bytes) > most {
            let most = size::format(most);
            return Err(format!("the server takes discards of up to {most}; use --block-size"));
        }
        if options.verify {
            return Err("there is nothing to verify in discards; leave out --verify".into());
        }
    }
    if options.verify && region_bytes / u64::from(options.block_bytes) > LEDGER_BLOCKS_MAX {
        return Err(format!("{} is too much to verify; use --region", size::format(region_bytes)));
    }
    if options.verify
        && options.workload == Workload::Runs
        && !RUN_ALIGNMENT.is_multiple_of(u64::from(options.block_bytes))
    {
        return Err("runs of larger blocks would overlap; verify with --block-size 4KiB".into());
    }
    Ok(Settings {
        workload: options.workload,
        region_bytes,
        first_byte: options.first_byte,
        block_bytes: options.block_bytes,
        read_percent: options.read_percent,
        flush_every: options.flush_every,
        seed: options.seed,
    })
}

/// Queues and the memory they lie in.
pub(crate) struct Queues {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) queues: Vec<Queue>,
}

/// Lays `count` queues out one after the other in new guest memory.
pub(crate) fn lay_out_queues(shape: Shape, count: u16) -> Result<Queues, String> {
    let stride = shape.memory_bytes().next_multiple_of(PAGE);
    let bytes = stride * u64::from(count);
    if bytes > MEMORY_BYTES_MAX {
        return Err(format!(
            "this load needs {} MiB of buffers; use a smaller depth, block size or --queues",
            bytes >> 20
        ));
    }
    let memory = Arc::new(GuestMemory::new(bytes)?);
    let queues = (0..u64::from(count))
        .map(|index| Queue::new(Arc::clone(&memory), index * stride, shape))
        .collect::<Result<_, _>>()?;
    Ok(Queues { memory, queues })
}

/// When to measure and when to stop.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) warmup: Duration,
    pub(crate) duration: Option<Duration>,
    pub(crate) requests: Option<u64>,
    pub(crate) rate: Option<f64>,
    pub(crate) timeout: Duration,
}

/// What a drive saw, before it is put into words.
pub(crate) struct Measured {
    pub(crate) nanoseconds: u64,
    /// Requests finished while measuring, flushes included.
    pub(crate) requests: u64,
    pub(crate) histograms: Histograms,
    pub(crate) bytes: u64,
    /// CPU time that the server took while measuring.
    pub(crate) server_cpu: Option<Duration>,
    pub(crate) kicks: u64,
    /// How long the flush at the end took.
    pub(crate) last_flush: Option<Duration>,
    /// Requests of a paced load that were due while measuring and never issued: the server was that far behind.
    pub(crate) not_issued: u64,
    pub(crate) timeline: Option<Timeline>,
    /// Time that this side wanted to poll but had lost its core.
    pub(crate) client_waited: Option<Duration>,
    pub(crate) verified: Option<Verified>,
}

/// A request in flight.
#[derive(Clone, Copy)]
struct Flight {
    operation: Operation,
    /// When it was submitted; of a paced load, when it was due.
    since_ns: u64,
}

/// When the requests of a paced load are due.
#[derive(Clone, Copy)]
struct Pace {
    start_ns: u64,
    period_ns: f64,
    /// Requests that have been issued.
    issued: u64,
}

impl Pace {
    /// When the next one is due.
    fn next_ns(&self) -> u64 {
        // Not a sum of periods: what is rounded off would add up.
        self.start_ns + (self.issued as f64 * self.period_ns) as u64
    }

    /// How many were due before `end_ns` and have not been issued.
    fn behind(&self, end_ns: u64) -> u64 {
        let due = (end_ns.saturating_sub(self.start_ns) as f64 / self.period_ns) as u64;
        due.saturating_sub(self.issued)
    }
}

/// Which completions count.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Window {
    WarmingUp,
    Open,
    Closed,
}

/// The loop, its slots and its notes. All memory is fixed after `new`.
pub(crate) struct Driver {
    memory: Arc<GuestMemory>,
    pub(crate) queues: Vec<Queue>,
    /// By queue and slot.
    flights: Vec<Vec<Option<Flight>>>,
    free_slots: Vec<Vec<u16>>,
    settings: Settings,
    ledger: Option<Ledger>,
    verified: Verified,
    /// A drawn request that waits until its block is idle (verifying only).
    held: Option<Operation>,
    scratch: Vec<u8>,
    clock: Clock,
    now_ns: u64,
    progress_ns: u64,
    idle_turns: u32,
    in_flight: u32,
    issued: u64,
    window: Window,
    /// Of a paced load, what was due before does not count.
    counts_from_ns: u64,
    finished: u64,
    bytes: u64,
    histograms: Histograms,
    pace: Option<Pace>,
    timeline: Option<Timeline>,
    after_write: Option<AfterWrite>,
}

impl Driver {
    /// Prepares a load over `queues`.
    pub(crate) fn new(queues: Queues, settings: Settings, verify: bool) -> Self {
        let Queues { memory, queues } = queues;
        let clock = Clock::start();
        let ledger = verify.then(|| {
            let blocks = settings.region_bytes.div_ceil(u64::from(settings.block_bytes));
            let run = pattern::mix(unix_time().as_nanos() as u64);
            Ledger::new(run, settings.block_bytes, blocks as usize)
        });
        let mut driver = Self {
            memory,
            flights: queues.iter().map(|queue| vec![None; queue.depth().into()]).collect(),
            free_slots: queues.iter().map(|queue| (0..queue.depth()).rev().collect()).collect(),
            queues,
            settings,
            ledger,
            verified: Verified::default(),
            held: None,
            scratch: vec![0; settings.data_bytes_max() as usize],
            clock,
            now_ns: 0,
            progress_ns: 0,
            idle_turns: 0,
            in_flight: 0,
            issued: 0,
            window: Window::WarmingUp,
            counts_from_ns: 0,
            finished: 0,
            bytes: 0,
            histograms: Histograms::new(),
            pace: None,
            timeline: None,
            after_write: None,
        };
        driver.fill_buffers();
        driver
    }

    /// Reads time from `clock` from here on, and notes what it sees in a timeline of at most `longest`.
    fn keep_timeline(&mut self, clock: Clock, longest: Duration) {
        self.clock = clock;
        self.timeline = Some(Timeline::new(self.read_clock(), longest));
    }

    /// Data to write that is neither zero nor equal from slot to slot.
    fn fill_buffers(&mut self) {
        for (index, queue) in self.queues.iter().enumerate() {
            for slot in 0..queue.depth() {
                let mut state = pattern::mix((index as u64) << 32 | u64::from(slot));
                for place in self.scratch.chunks_mut(8) {
                    state = pattern::mix(state);
                    place.copy_from_slice(&state.to_le_bytes()[..place.len()]);
                }
                self.memory.write(queue.data_offset(slot), &self.scratch);
            }
        }
    }

    /// Runs the load to its end. `alive` is asked when nothing happens.
    pub(crate) fn drive(
        &mut self,
        limits: Limits,
        flush_at_end: bool,
        alive: &dyn Fn() -> Result<(), String>,
        server_pid: Option<u32>,
    ) -> Result<Measured, String> {
        let give_up_ns = self.read_clock().saturating_add(limits.timeout.as_nanos() as u64);
        let watch = Watch { alive, give_up_ns };
        let mut source = Source::Plan(Plan::new(self.settings));
        let server_cpu = || server_pid.and_then(process::cpu_time);

        self.progress_ns = self.now_ns;
        let pace = |start_ns: u64| {
            limits.rate.map(|rate| Pace { start_ns, period_ns: 1e9 / rate, issued: 0 })
        };
        self.pace = pace(self.now_ns);
        if !limits.warmup.is_zero() {
            let until_ns = self.now_ns + limits.warmup.as_nanos() as u64;
            self.work(&mut source, until_ns, u64::MAX, &watch)?;
        }
        let cpu_before = server_cpu();
        let waited_before = process::time_waited_for_a_core();
        let kicks_before: u64 = self.kicks();
        let start_ns = self.read_clock();
        self.issued = 0;
        self.window = Window::Open;
        // A paced load begins anew: what a server is behind with after warming up is not held against it.
        self.pace = pace(start_ns);
        self.counts_from_ns = if self.pace.is_some() { start_ns } else { 0 };
        let until_ns =
            limits.duration.map_or(u64::MAX, |length| start_ns + length.as_nanos() as u64);
        self.work(&mut source, until_ns, limits.requests.unwrap_or(u64::MAX), &watch)?;
        let wanted = limits.requests.unwrap_or(u64::MAX) - self.issued;
        let behind = self.pace.map_or(0, |pace| pace.behind(self.now_ns.min(until_ns)));
        let not_issued = behind.min(wanted);
        if self.now_ns < until_ns || self.pace.is_some() {
            // Stopped by count: the measurement ends with the last request. So it does with a pace: what was due
            // in time counts, however late it was answered.
            self.drain(&watch)?;
        }
        let nanoseconds = self.now_ns - start_ns;
        let cpu_after = server_cpu();
        let waited_after = process::time_waited_for_a_core();
        self.window = Window::Closed;
        let kicks = self.kicks() - kicks_before;

        self.drain(&watch)?;
        let mut last_flush = None;
        if flush_at_end {
            let asked_ns = self.read_clock();
            self.issue_flush()?;
            self.drain(&watch)?;
            last_flush = Some(Duration::from_nanos(self.now_ns - asked_ns));
        }
        if self.ledger.is_some() && self.settings.workload.writes() {
            self.held = None;
            self.issued = 0;
            self.pace = None;
            let mut read_back = Source::ReadBack { cursor: 0, settings: self.settings };
            self.work(&mut read_back, u64::MAX, u64::MAX, &watch)?;
            self.drain(&watch)?;
        }
        Ok(Measured {
            nanoseconds,
            requests: self.finished,
            histograms: std::mem::replace(&mut self.histograms, Histograms::new()),
            bytes: self.bytes,
            server_cpu: difference(cpu_before, cpu_after),
            kicks,
            last_flush,
            not_issued,
            timeline: self.timeline.take(),
            client_waited: difference(waited_before, waited_after),
            verified: self.ledger.is_some().then_some(self.verified),
        })
    }

    /// Keeps the slots busy until `until_ns`, or until `requests` or all of `source` are issued.
    fn work(
        &mut self,
        source: &mut Source,
        until_ns: u64,
        requests: u64,
        watch: &Watch<'_>,
    ) -> Result<(), String> {
        while self.now_ns < until_ns {
            self.reap(watch)?;
            if self.pace.is_some() {
                self.read_clock(); // The next request may be due though nothing was answered.
            }
            if !self.issue(source, requests)? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Waits until nothing is in flight.
    fn drain(&mut self, watch: &Watch<'_>) -> Result<(), String> {
        while self.in_flight > 0 {
            self.reap(watch)?;
        }
        Ok(())
    }

    /// Takes what has finished. Without anything, now and then asks whether to go on waiting.
    fn reap(&mut self, watch: &Watch<'_>) -> Result<(), String> {
        let mut any = false;
        for index in 0..self.queues.len() {
            let mut taken = false;
            while let Some(completion) = self.queues[index].pop()? {
                if !any {
                    any = true;
                    self.read_clock();
                }
                taken = true;
                self.finish(index, completion)?;
            }
            if taken {
                self.queues[index].suppress_notifications();
            }
        }
        if any {
            self.progress_ns = self.now_ns;
            self.idle_turns = 0;
            return watch.check_time(self.now_ns);
        }
        self.idle_turns = self.idle_turns.wrapping_add(1);
        if self.idle_turns.is_multiple_of(IDLE_TURNS_PER_CLOCK) {
            self.read_clock();
            watch.check_time(self.now_ns)?;
            self.check_progress(watch)?;
        }
        std::hint::spin_loop();
        Ok(())
    }

    fn check_progress(&mut self, watch: &Watch<'_>) -> Result<(), String> {
        let idle = Duration::from_nanos(self.now_ns - self.progress_ns);
        if idle < LIVENESS_AFTER {
            return Ok(());
        }
        let in_flight = self.in_flight;
        (watch.alive)().map_err(|error| format!("{error}, with {in_flight} requests in flight"))?;
        if idle > STALL_TIMEOUT && in_flight > 0 {
            return Err(format!(
                "the server has finished none of {in_flight} requests for {} s",
                STALL_TIMEOUT.as_secs()
            ));
        }
        Ok(())
    }

    /// Fills free slots. False when there is nothing left to issue.
    fn issue(&mut self, source: &mut Source, requests: u64) -> Result<bool, String> {
        let mut more = true;
        'queues: for index in 0..self.queues.len() {
            while let Some(&slot) = self.free_slots[index].last() {
                if self.issued >= requests {
                    more = false;
                    break 'queues;
                }
                if self.pace.is_some_and(|pace| pace.next_ns() > self.now_ns) {
                    break 'queues;
                }
                let next = self.held.take().or_else(|| source.next(self.ledger.as_ref()));
                let Some(operation) = next else {
                    more = false;
                    break 'queues;
                };
                if !self.take_block(operation) {
                    self.held = Some(operation);
                    break 'queues;
                }
                self.free_slots[index].pop();
                self.submit(index, slot, operation);
            }
        }
        for queue in &mut self.queues {
            queue.publish()?;
        }
        Ok(more)
    }

    fn issue_flush(&mut self) -> Result<(), String> {
        let slot = self.free_slots[0].pop().expect("every slot is free after a drain");
        self.submit(0, slot, Operation { kind: Kind::Flush, offset: 0, bytes: 0 });
        self.queues[0].publish()
    }

    /// True when no other request has the block of `operation`, or nobody minds.
    fn take_block(&mut self, operation: Operation) -> bool {
        match &mut self.ledger {
            Some(ledger) if operation.kind != Kind::Flush => ledger.take(operation.offset),
            _ => true,
        }
    }

    fn submit(&mut self, index: usize, slot: u16, operation: Operation) {
        if let Some(ledger) = &mut self.ledger
            && operation.kind == Kind::Write
        {
            let data = &mut self.scratch[..operation.bytes as usize];
            pattern::fill(data, operation.offset / 512, ledger.next_stamp(operation.offset));
            self.memory.write(self.queues[index].data_offset(slot), data);
        }
        self.queues[index].submit(slot, operation);
        let mut since_ns = self.now_ns;
        if let Some(pace) = self.pace.as_mut().filter(|_| operation.kind != Kind::Flush) {
            since_ns = pace.next_ns();
            pace.issued += 1;
        }
        let flight = Flight { operation, since_ns };
        self.flights[index][usize::from(slot)] = Some(flight);
        self.in_flight += 1;
        self.issued += 1;
    }

    fn finish(&mut self, index: usize, completion: Completion) -> Result<(), String> {
        let Completion { slot, status } = completion;
        let Flight { operation, since_ns } = self.flights[index][usize::from(slot)]
            .take()
            .expect("the queue returns only slots that are in flight");
        self.free_slots[index].push(slot);
        self.in_flight -= 1;
        check_status(operation, status)?;
        self.verify(index, slot, operation)?;
        if self.window == Window::Open && since_ns >= self.counts_from_ns {
            self.finished += 1;
            self.bytes += u64::from(operation.bytes);
            self.histograms.record(operation.kind, self.now_ns - since_ns);
        }
        if let Some(timeline) = self.timeline.as_mut().filter(|_| operation.kind != Kind::Flush) {
            timeline.note(since_ns, self.now_ns);
        }
        match &mut self.after_write {
            Some(after_write) if operation.kind == Kind::Write => after_write(),
            _ => Ok(()),
        }
    }

    fn verify(&mut self, index: usize, slot: u16, operation: Operation) -> Result<(), String> {
        let Some(ledger) = &mut self.ledger else { return Ok(()) };
        if operation.kind == Kind::Flush {
            return Ok(());
        }
        ledger.give_back(operation.offset);
        if operation.kind == Kind::Write {
            return Ok(());
        }
        let data = &mut self.scratch[..operation.bytes as usize];
        self.memory.read(self.queues[index].data_offset(slot), data);
        let expected = ledger.expected(operation.offset);
        match pattern::check(data, operation.offset / 512, expected) {
            Ok(Found::Good) => self.verified.good += 1,
            Ok(Found::Unknown) => self.verified.unknown += 1,
            Err(error) => return Err(format!("wrong data: {error}")),
        }
        Ok(())
    }

    fn kicks(&self) -> u64 {
        self.queues.iter().map(|queue| queue.kicks).sum()
    }

    fn read_clock(&mut self) -> u64 {
        self.now_ns = self.clock.now_ns();
        self.now_ns
    }
}

fn difference(before: Option<Duration>, after: Option<Duration>) -> Option<Duration> {
    before.zip(after).map(|(before, after)| after.saturating_sub(before))
}

/// What ends a wait.
struct Watch<'a> {
    alive: &'a dyn Fn() -> Result<(), String>,
    give_up_ns: u64,
}

impl Watch<'_> {
    fn check_time(&self, now_ns: u64) -> Result<(), String> {
        if interrupt::requested() {
            return Err("interrupted".into());
        }
        if now_ns > self.give_up_ns {
            return Err("the load did not end in time; raise --timeout or ask for less".into());
        }
        Ok(())
    }
}

fn check_status(operation: Operation, status: u8) -> Result<(), String> {
    let what = match status {
        0 => return Ok(()),
        1 => "an I/O error",
        2 => "\"unsupported\"",
        0xff => "no status",
        _ => "an unknown status",
    };
    let Operation { kind, offset, bytes } = operation;
    let first = offset / 512;
    Err(format!("the server answered {kind:?} of {bytes} bytes at sector {first} with {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_device::{FakeDevice, Fault};
    use std::sync::atomic::{AtomicU64, Ordering};

    const NO_LIMIT: Limits = Limits {
        warmup: Duration::ZERO,
        duration: None,
        requests: None,
        rate: None,
        timeout: Duration::from_secs(60),
    };

    struct Case {
        workload: Workload,
        indirect: bool,
        event_index: bool,
        fault: Fault,
        flush_every: u64,
    }

    const PLAIN: Case = Case {
        workload: Workload::Mix,
        indirect: false,
        event_index: true,
        fault: Fault::None,
        flush_every: 0,
    };

    /// Drives 2000 verified requests on two queues against a device in this process.
    fn drive(case: Case) -> Result<Measured, String> {
        drive_with(case, Limits { requests: Some(2000), ..NO_LIMIT }, None)
    }

    fn drive_with(
        case: Case,
        limits: Limits,
        after_write: Option<AfterWrite>,
    ) -> Result<Measured, String> {
        let settings = Settings {
            workload: case.workload,
            region_bytes: 64 * 4096 + 512,
            first_byte: 0,
            block_bytes: 4096,
            read_percent: 70,
            flush_every: case.flush_every,
            seed: 1,
        };
        let shape = Shape {
            depth: 8,
            data_bytes_max: 4096,
            event_index: case.event_index,
            indirect: case.indirect,
        };
        let queues = lay_out_queues(shape, 2).unwrap();
        let mut driver = Driver::new(queues, settings, true);
        driver.after_write = after_write;
        let device = FakeDevice::serve(
            &driver.memory,
            &driver.queues,
            settings.region_bytes as usize,
            case.fault,
        );
        driver.drive(limits, true, &|| device.check_alive(), None)
    }

    #[test]
    fn a_faithful_device_is_measured_and_verified() {
        let cases = [
            PLAIN,
            Case { indirect: true, ..PLAIN },
            Case { event_index: false, ..PLAIN },
            Case { workload: Workload::RandWrite, flush_every: 5, ..PLAIN },
            Case { workload: Workload::Write, ..PLAIN },
        ];
        for case in cases {
            let measured = drive(case).unwrap();
            assert_eq!(measured.requests, 2000);
            let verified = measured.verified.unwrap();
            assert!(verified.good >= 64, "{verified:?}: at least all blocks are read back");
        }
    }

    #[test]
    fn every_fault_of_a_device_is_found() {
        let faults = [
            (Fault::DropWrite, "wrong data"),
            (Fault::FlipBit, "wrong data"),
            (Fault::Misplace, "wrong data"),
            (Fault::Fail, "an I/O error"),
            (Fault::NoStatus, "no status"),
            (Fault::UnknownHead, "which it does not have"),
            (Fault::Die, "in flight"),
        ];
        for (fault, expected) in faults {
            let error = drive(Case { fault, ..PLAIN }).err();
            let error = error.unwrap_or_else(|| panic!("{fault:?} went unnoticed"));
            assert!(error.contains(expected), "{fault:?}: {error}");
        }
    }

    #[test]
    fn what_a_paced_server_is_behind_shows_in_latency_and_count() {
        let duration = Duration::from_millis(20);
        // More than the clock lets through one by one.
        let rate = 1e9;
        let limits = Limits { duration: Some(duration), rate: Some(rate), ..NO_LIMIT };
        let Measured { requests, not_issued, histograms, .. } =
            drive_with(PLAIN, limits, None).unwrap();
        let due = (duration.as_secs_f64() * rate) as u64;
        assert!(not_issued > 0, "{requests} requests of {due}");
        assert!(requests + not_issued >= due, "{requests} and {not_issued} of {due}");
        // The last one was due when those before it were, and was answered when the time was over.
        let waited_ns = due - requests;
        let longest_ns = histograms.data().max();
        assert!(longest_ns >= waited_ns / 100 * 99, "{longest_ns} ns, not {waited_ns}");
    }

    #[test]
    fn a_paced_load_asks_for_no_more_than_is_due() {
        let limits =
            Limits { requests: Some(50), duration: None, rate: Some(10_000.0), ..NO_LIMIT };
        let measured = drive_with(PLAIN, limits, None).unwrap();
        assert_eq!((measured.requests, measured.not_issued), (50, 0));
        let period_ns = 100_000;
        assert!(measured.nanoseconds >= 49 * period_ns, "the last came before it was due");
    }

    #[test]
    fn something_can_be_done_after_each_write_and_its_failure_ends_the_load() {
        let case = || Case { workload: Workload::RandWrite, ..PLAIN };
        let (count, limits) =
            (Arc::new(AtomicU64::new(0)), Limits { requests: Some(300), ..NO_LIMIT });
        let counter = Arc::clone(&count);
        let each = move || {
            counter.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        drive_with(case(), limits, Some(Box::new(each))).unwrap();
        assert_eq!(count.load(Ordering::Relaxed), 300);
        let fails = Box::new(|| Err("no snapshot".to_owned()));
        let error = drive_with(case(), limits, Some(fails)).err();
        assert_eq!(error.as_deref(), Some("no snapshot"));
    }

    #[test]
    fn a_load_ends_by_itself_when_its_time_is_over() {
        let settings = Settings {
            workload: Workload::RandRead,
            region_bytes: 1 << 20,
            first_byte: 0,
            block_bytes: 512,
            read_percent: 70,
            flush_every: 0,
            seed: 1,
        };
        let shape = Shape { depth: 4, data_bytes_max: 512, event_index: true, indirect: false };
        let queues = lay_out_queues(shape, 1).unwrap();
        let mut driver = Driver::new(queues, settings, false);
        // Nobody serves the queue.
        let limits = Limits { timeout: Duration::from_millis(1), ..NO_LIMIT };
        let error = driver.drive(limits, false, &|| Ok(()), None).err().unwrap();
        assert!(error.contains("did not end in time"), "{error}");
    }

    #[test]
    fn options_that_do_not_fit_the_disk_are_refused() {
        let disk = Disk {
            capacity_bytes: 1 << 20,
            read_only: true,
            flush: false,
            discard_bytes_max: None,
            event_index: true,
        };
        let options = crate::cli::tests::load_options(&["--rw", "randread"]);
        assert_eq!(settle(&options, disk).unwrap().region_bytes, 1 << 20);
        for arguments in [
            ["--rw", "randwrite"].as_slice(),
            &["--rw", "read", "--flush-every", "1"],
            &["--rw", "read", "--region", "2MiB"],
            &["--rw", "read", "--region", "1000"],
            &["--rw", "read", "--region", "512"],
        ] {
            let options = crate::cli::tests::load_options(arguments);
            assert!(settle(&options, disk).is_err(), "{arguments:?} was accepted");
        }
        let disk = Disk { read_only: false, ..disk };
        let runs = ["--rw", "runs", "--verify", "--block-size"];
        for (block_size, fits) in [("4KiB", true), ("512", true), ("1536", false), ("64KiB", false)]
        {
            let arguments = [runs.as_slice(), &[block_size]].concat();
            let options = crate::cli::tests::load_options(&arguments);
            assert_eq!(settle(&options, disk).is_ok(), fits, "{arguments:?}");
        }
    }
}
