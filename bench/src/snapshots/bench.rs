//! A daemon over a store of its own, with one written volume and whatever else a part asks for.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use serde_json::{Value, json};

use super::Plan;
use crate::api::Api;
use crate::clock::Clock;
use crate::load::{self, AfterWrite, Options};
use crate::plan::Workload;
use crate::report::Report;
use crate::server::{Contender, Device, Poll, START_TIMEOUT, Scratch, Server, Serving, Site};
use crate::{cli, interrupt, process};

/// The volume that is there from the start.
pub(super) const MAIN: &str = "bench";
/// Beyond what was asked for, one load may take this long to connect, flush and stop.
const SLACK: Duration = Duration::from_secs(60);
const WARMUP: Duration = Duration::from_millis(300);
/// Requests that are sent to the API before the first is answered, twice as fast as one by one. They and their
/// answers, 100 KB, fit the buffers of a socket, so neither side waits for the other to read.
const REQUESTS_AHEAD: u64 = 256;
/// Threads of the daemon that serve guests have names that begin so.
const REACTOR_THREADS: &str = "reactor-";

/// The daemon; stopped when dropped, and its store removed.
pub(super) struct Bench<'a> {
    pub(super) plan: &'a Plan,
    /// Nothing only while it is being restarted.
    server: Option<Server>,
    pub(super) api: Api,
    /// Dropped after the server.
    pub(super) site: Site,
}

/// Bytes that were written, counted by the daemon.
#[derive(Clone, Copy)]
pub(super) struct Written {
    /// By guests, to all volumes.
    pub(super) data: u64,
    /// Nodes, log blocks and volume records; bitmaps, of which one covers thousands of blocks, are not counted.
    pub(super) metadata: u64,
}

impl Written {
    pub(super) fn since(self, before: Self) -> Self {
        Self { data: self.data - before.data, metadata: self.metadata - before.metadata }
    }

    /// Bytes written for each byte that was asked for.
    pub(super) fn ratio(self) -> f64 {
        (self.data + self.metadata) as f64 / self.data as f64
    }
}

/// What a schedule has come to.
pub(super) struct Taken {
    pub(super) taken: u64,
    pub(super) skipped: u64,
}

impl<'a> Bench<'a> {
    /// Starts a daemon and fills its volume.
    pub(super) fn start(plan: &'a Plan) -> Result<Self, String> {
        Self::with_store(plan, plan.store_bytes)
    }

    /// The same over a store of another size.
    pub(super) fn with_store(plan: &'a Plan, store_bytes: u64) -> Result<Self, String> {
        let bench = Self::empty(plan, store_bytes)?;
        bench.fill(bench.site.socket())?;
        Ok(bench)
    }

    /// Starts a daemon whose volume is left unwritten: for parts that make their own, all in the same way.
    pub(super) fn empty(plan: &'a Plan, store_bytes: u64) -> Result<Self, String> {
        let kind = statfs(&plan.dir)
            .map_err(|error| format!("cannot look at {}: {error}", plan.dir.display()))?;
        let site = Site {
            device: Device::Directory(plan.dir.clone()),
            files: Some(Scratch::new(&plan.dir, "files")?),
            run: Scratch::new(&std::env::temp_dir(), "run")?,
            direct: kind.filesystem_type() != TMPFS_MAGIC,
            size_bytes: plan.size_bytes,
            store_bytes,
            server_core: plan.server_core,
            poll: Poll::Adaptive,
            bessel: Some(plan.bessel.clone()),
        };
        let mut server = site.start(Serving::written(Contender::Bessel))?;
        let api = Api { socket: site.api_socket() };
        server.wait_for(&api.socket)?;
        Ok(Self { plan, server: Some(server), api, site })
    }

    fn server(&self) -> &Server {
        self.server.as_ref().expect("only a restart, which borrows all of it, is without a server")
    }

    /// Stops the daemon in order, starts it again and reads one block of the volume at `socket`. Returns the time
    /// from the start of the process until that was answered.
    pub(super) fn restart(&mut self, socket: &Path) -> Result<Duration, String> {
        drop(self.server.take());
        let clock = Clock::start();
        self.server = Some(self.site.start(Serving::written(Contender::Bessel))?);
        self.load(Options {
            socket: socket.to_owned(),
            requests: Some(1),
            depth: 1,
            connect_patience: START_TIMEOUT,
            ..Options::default()
        })?;
        let took = Duration::from_nanos(clock.now_ns());
        let server = self.server.as_mut().expect("it was started above");
        server.wait_for(&self.api.socket)?; // Its sockets come one after the other.
        Ok(took)
    }

    /// Makes a volume, and returns where it is served.
    pub(super) fn create(&self, name: &str, size_bytes: u64) -> Result<PathBuf, String> {
        let body = json!({ "name": name, "size_bytes": size_bytes });
        let volume = self.api.ask("POST", "/v1/volumes", &body)?;
        let socket = volume["socket"].as_str();
        socket.map(PathBuf::from).ok_or_else(|| format!("{name} is not served: {volume}"))
    }

    /// Writes all of the volume at `socket`.
    pub(super) fn fill(&self, socket: PathBuf) -> Result<(), String> {
        let filled = self.load(Options {
            socket,
            workload: Workload::Write,
            block_bytes: 256 << 10,
            depth: 8,
            one_pass: true,
            flush_at_end: true,
            ..Options::default()
        });
        filled.map(drop)
    }

    /// Loads the volume at the socket that is named; without one, that which is there from the start.
    pub(super) fn load(&self, options: Options) -> Result<Report, String> {
        self.load_with(options, None)
    }

    /// The same, with something done after each write.
    pub(super) fn load_with(
        &self,
        mut options: Options,
        after_write: Option<AfterWrite>,
    ) -> Result<Report, String> {
        if interrupt::requested() {
            return Err("interrupted".into());
        }
        if options.socket.as_os_str().is_empty() {
            options.socket = self.site.socket();
        }
        options.server_pid = Some(self.server().pid());
        let core = self.plan.client_core;
        let loaded = std::thread::scope(|scope| {
            let load = || {
                cli::pin_this_thread(core)?;
                load::run_with(&options, after_write)
            };
            scope.spawn(load).join().expect("a load does not panic")
        });
        let report = loaded.map_err(|error| self.server().explain(&error))?;
        self.plan.waits.note(&report);
        Ok(report)
    }

    /// Random 4 KiB requests for some time.
    pub(super) fn random(
        &self,
        workload: Workload,
        duration: Duration,
        seed: u32,
    ) -> Result<Report, String> {
        self.load(random(workload, duration, seed))
    }

    /// A few random writes to the volume at `socket`.
    pub(super) fn write_some(
        &self,
        socket: PathBuf,
        requests: u64,
        seed: u64,
    ) -> Result<(), String> {
        let options = Options {
            socket,
            workload: Workload::RandWrite,
            requests: Some(requests),
            depth: 4,
            seed,
            ..Options::default()
        };
        self.load(options).map(drop)
    }

    /// Takes a snapshot of the first volume.
    pub(super) fn snapshot(&self) -> Result<Value, String> {
        self.api.ask("POST", &format!("/v1/volumes/{MAIN}/snapshots"), &json!({}))
    }

    /// Takes `count` snapshots of `volume` as fast as the API does, and calls `progress` with how many there are.
    pub(super) fn snapshots(
        &self,
        volume: &str,
        count: u64,
        mut progress: impl FnMut(u64) -> Result<(), String>,
    ) -> Result<(), String> {
        let path = format!("/v1/volumes/{volume}/snapshots");
        let mut connection = self.api.connect()?;
        let mut taken = 0;
        while taken < count {
            let batch = (count - taken).min(REQUESTS_AHEAD);
            connection.ask_many(("POST", &path), &json!({}), batch as usize)?;
            taken += batch;
            progress(taken)?;
        }
        Ok(())
    }

    /// Snapshots of the first volume so often a second; none at 0.
    pub(super) fn schedule(&self, per_second: u64) -> Result<(), String> {
        if per_second == 0 {
            return Ok(());
        }
        let path = format!("/v1/volumes/{MAIN}/schedule");
        let every = 1_000_000_000 / per_second;
        let body = json!({ "every_ns": every, "keep": {} });
        self.api.ask("PUT", &path, &body).map(drop)
    }

    /// Ends the schedule, if there is one, and says what it came to.
    pub(super) fn end_schedule(&self) -> Result<Taken, String> {
        let path = format!("/v1/volumes/{MAIN}");
        let schedule = self.api.ask("GET", &path, &Value::Null)?["schedule"].take();
        if schedule.is_null() {
            return Ok(Taken { taken: 0, skipped: 0 });
        }
        self.api.ask("DELETE", &format!("{path}/schedule"), &Value::Null)?;
        let number = |name: &str| {
            let number = schedule[name].as_u64();
            number.ok_or_else(|| format!("the schedule does not tell {name}: {schedule}"))
        };
        if number("failed")? > 0 {
            return Err(format!("snapshots of the schedule failed: {}", schedule["reason"]));
        }
        Ok(Taken { taken: number("taken")?, skipped: number("skipped")? })
    }

    pub(super) fn stats(&self) -> Result<Value, String> {
        self.api.ask("GET", "/v1/stats", &Value::Null)
    }

    /// What has been written since the daemon was started.
    pub(super) fn written(&self) -> Result<Written, String> {
        let stats = self.stats()?;
        let sum = |list: &str, name: &str| -> Result<u64, String> {
            let list = stats[list].as_array().ok_or_else(|| format!("no {list} in the stats"))?;
            list.iter().map(|it| number(it, name)).sum()
        };
        Ok(Written {
            data: sum("volumes", "written_bytes")?,
            metadata: sum("reactors", "metadata_writes")? * 4096,
        })
    }

    /// Space that nodes and snapshot logs take.
    pub(super) fn metadata_bytes(&self) -> Result<u64, String> {
        number(&self.stats()?["store"], "metadata_bytes")
    }

    /// CPU time of the reactors so far, what they spend on waiting included.
    pub(super) fn reactor_cpu(&self) -> Result<Duration, String> {
        process::threads_cpu_time(self.server().pid(), REACTOR_THREADS)
            .ok_or_else(|| "the daemon has no thread that is called a reactor".into())
    }
}

/// Random 4 KiB requests for some time.
pub(super) fn random(workload: Workload, duration: Duration, seed: u32) -> Options {
    Options {
        workload,
        duration: Some(duration),
        warmup: WARMUP.min(duration),
        timeout: duration + WARMUP + SLACK,
        seed: u64::from(seed) + 1,
        ..Options::default()
    }
}

/// A number that must be there.
pub(super) fn number(of: &Value, name: &str) -> Result<u64, String> {
    of[name].as_u64().ok_or_else(|| format!("the API does not tell {name}"))
}
