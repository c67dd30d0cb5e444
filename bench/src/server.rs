//! The servers that are compared: how each is started, and that each is stopped.
//!
//! Whatever is made here goes away with its value, on every path out: processes get SIGTERM and
//! after a while SIGKILL, scratch directories are removed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use clap::ValueEnum;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;

use crate::clock::Clock;
use crate::{cli, interrupt, size};

/// How long a server may take to open its store and listen.
pub(crate) const START_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a server may take to flush and leave.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// Bytes of a server's own words that go into our message when it fails.
const LOG_TAIL_BYTES: usize = 600;

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Contender {
    /// qemu-storage-daemon over a raw file, by io_uring.
    QsdUring,
    /// qemu-storage-daemon over a raw file, by its thread pool.
    QsdThreads,
    /// A volume of a Bessel store.
    Bessel,
    /// No server: fio over a raw file by io_uring, the machine's limit for one core.
    BareUring,
}

impl Contender {
    /// Its name in tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::QsdUring => "qsd io_uring",
            Self::QsdThreads => "qsd threads",
            Self::Bessel => "bessel",
            Self::BareUring => "bare io_uring",
        }
    }
}

/// How Bessel's reactor waits for work.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Poll {
    Adaptive,
    Busy,
}

/// A directory of our own inside one that the user named; removed when dropped.
pub(crate) struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Makes a new directory in `parent`, whose name tells its `purpose`.
    pub(crate) fn new(parent: &Path, purpose: &str) -> Result<Self, String> {
        let path = parent.join(format!("bessel-bench-{purpose}.{}", std::process::id()));
        fs::create_dir(&path)
            .map_err(|error| format!("cannot create {}: {error}", path.display()))?;
        Ok(Self { path })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("bessel-bench: cannot remove {}: {error}", self.path.display());
        }
    }
}

/// One place of a comparison: where its files are and what its servers have in common.
pub(crate) struct Site {
    /// Holds the files that are measured.
    pub(crate) files: Scratch,
    /// Holds sockets, configuration and logs. Apart, since a socket's path may have 107 bytes.
    pub(crate) run: Scratch,
    /// Bypass the page cache: right for a disk, impossible or pointless on tmpfs.
    pub(crate) direct: bool,
    pub(crate) size_bytes: u64,
    pub(crate) store_bytes: u64,
    pub(crate) server_core: usize,
    pub(crate) poll: Poll,
    pub(crate) bessel: Option<PathBuf>,
}

impl Site {
    /// The raw file that one of the contenders without a store works on.
    pub(crate) fn raw_file(&self) -> PathBuf {
        self.files.path().join("raw.img")
    }

    /// Bessel's store.
    pub(crate) fn store_file(&self) -> PathBuf {
        self.files.path().join("store.img")
    }

    /// Makes the raw file, sparse: a fill writes it.
    pub(crate) fn make_raw_file(&self) -> Result<(), String> {
        let path = self.raw_file();
        File::create(&path)
            .and_then(|file| file.set_len(self.size_bytes))
            .map_err(|error| format!("cannot create {}: {error}", path.display()))
    }

    /// The socket at which `contender` serves.
    pub(crate) fn socket(&self) -> PathBuf {
        self.run.path().join("disk.sock")
    }

    /// The socket at which Bessel serves its API.
    pub(crate) fn api_socket(&self) -> PathBuf {
        self.run.path().join("api.sock")
    }

    /// Starts `contender`, pinned to the server's core, and waits until it has made its socket.
    pub(crate) fn start(&self, contender: Contender) -> Result<Server, String> {
        let command = match contender {
            Contender::QsdUring => self.qsd("io_uring"),
            Contender::QsdThreads => self.qsd("threads"),
            Contender::Bessel => self.bessel()?,
            Contender::BareUring => panic!("fio serves nothing"),
        };
        // One that was killed has left its sockets, at which nobody answers.
        for socket in [self.socket(), self.api_socket()] {
            if socket.exists() {
                fs::remove_file(&socket)
                    .map_err(|error| format!("cannot remove {}: {error}", socket.display()))?;
            }
        }
        let log = self.run.path().join("server.log");
        let mut server = Server::start(contender.name(), command, log, self.server_core)?;
        server.wait_for(&self.socket())?;
        Ok(server)
    }

    fn qsd(&self, aio: &str) -> Command {
        let (file, socket) = (escape_commas(&self.raw_file()), escape_commas(&self.socket()));
        let direct = if self.direct { "on" } else { "off" };
        let mut command = Command::new("qemu-storage-daemon");
        command
            .args(["--object", "iothread,id=io"])
            .arg("--blockdev")
            .arg(format!(
                "driver=file,node-name=disk,filename={file},aio={aio},cache.direct={direct}"
            ))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,addr.type=unix,addr.path={socket},\
                 node-name=disk,writable=on,iothread=io"
            ));
        command
    }

    fn bessel(&self) -> Result<Command, String> {
        let program = self.bessel.as_ref().ok_or("there is no Bessel to start")?;
        let config = self.run.path().join("bessel.yaml");
        fs::write(&config, self.bessel_config())
            .map_err(|error| format!("cannot write {}: {error}", config.display()))?;
        let mut command = Command::new(program);
        command.arg("serve").arg("--config").arg(config);
        Ok(command)
    }

    fn bessel_config(&self) -> String {
        // A JSON string is a YAML string, so any path can be written.
        let quoted = |path: &Path| serde_json::Value::from(path.to_string_lossy()).to_string();
        let poll = match self.poll {
            Poll::Adaptive => "adaptive",
            Poll::Busy => "busy",
        };
        format!(
            "store:\n  device: {device}\n  size: {store}\n  node_cache: 64MiB\n\
             reactors:\n  cores: [{core}]\n  poll: {poll}\n\
             api:\n  socket: {api}\n\
             volumes:\n  - name: bench\n    size: {size}\n    socket: {socket}\n    \
             cache: writeback\n    queues: 1\n",
            device = quoted(&self.store_file()),
            store = size::format(self.store_bytes),
            core = self.server_core,
            api = quoted(&self.api_socket()),
            size = size::format(self.size_bytes),
            socket = quoted(&self.socket()),
        )
    }
}

/// A comma ends a value on QEMU's command line, unless doubled.
fn escape_commas(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// Starts a command whose threads and children stay on `core`.
pub(crate) fn spawn_on_core(mut command: Command, core: usize) -> Result<Child, String> {
    // A child inherits its core and its blocked signals from the thread that starts it, so that
    // is a thread of its own.
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                cli::pin_this_thread(core)?;
                interrupt::unblock_in_this_thread()?;
                command.spawn().map_err(|error| {
                    let program = command.get_program().to_string_lossy();
                    format!("cannot start {program}: {error}; is it installed?")
                })
            })
            .join()
            .expect("the thread only starts a command")
    })
}

/// A running server; stopped when dropped.
pub(crate) struct Server {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Server {
    fn start(
        name: &'static str,
        mut command: Command,
        log: PathBuf,
        core: usize,
    ) -> Result<Self, String> {
        let file = File::create(&log)
            .and_then(|file| Ok((file.try_clone()?, file)))
            .map_err(|error| format!("cannot create {}: {error}", log.display()))?;
        command.stdin(Stdio::null()).stdout(file.0).stderr(file.1);
        let child = spawn_on_core(command, core)?;
        Ok(Self { name, child, log })
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the server has made `socket`.
    pub(crate) fn wait_for(&mut self, socket: &Path) -> Result<(), String> {
        self.wait_for_socket(socket).map_err(|error| self.explain(&error))
    }

    fn wait_for_socket(&mut self, socket: &Path) -> Result<(), String> {
        let deadline = Clock::start().deadline(START_TIMEOUT);
        while !socket.exists() {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(format!("it ended at once, with {status}"));
            }
            if deadline.passed() || interrupt::requested() {
                return Err("it did not make its socket in time".into());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Puts what the server itself said beside an error of ours.
    pub(crate) fn explain(&self, error: &str) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let tail = String::from_utf8_lossy(&log[log.len().saturating_sub(LOG_TAIL_BYTES)..]);
        match tail.trim() {
            "" => format!("{}: {error}", self.name),
            said => format!("{}: {error}; it said: {said}", self.name),
        }
    }

    /// Stops the server and waits until it has gone.
    fn stop(&mut self) {
        let pid = Pid::from_raw(self.child.id() as i32);
        // The child is not reaped before `try_wait` says so: the id is still its own.
        if matches!(self.child.try_wait(), Ok(None)) && kill(pid, Signal::SIGTERM).is_ok() {
            let deadline = Clock::start().deadline(STOP_TIMEOUT);
            while matches!(self.child.try_wait(), Ok(None)) && !deadline.passed() {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        if matches!(self.child.try_wait(), Ok(None)) {
            eprintln!("bessel-bench: {} does not leave after SIGTERM; killing it", self.name);
            // Both fail only when the child has already gone.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_gone_after_drop_and_its_words_are_kept() {
        let scratch = Scratch::new(&std::env::temp_dir(), "test").unwrap();
        let path = scratch.path().to_owned();
        let core = core_affinity::get_core_ids().unwrap()[0].id;
        let mut command = Command::new("sh");
        // Says a word, then waits for ever.
        command.args(["-c", "echo ready; exec tail -f /dev/null"]);
        let server = Server::start("sh", command, path.join("log"), core).unwrap();
        let deadline = Clock::start().deadline(Duration::from_secs(20));
        while !server.explain("x").contains("ready") && !deadline.passed() {
            std::thread::yield_now();
        }
        assert_eq!(server.explain("it failed"), "sh: it failed; it said: ready");
        let pid = Pid::from_raw(server.pid() as i32);
        drop(server);
        assert!(kill(pid, None).is_err(), "the process is still there");
        drop(scratch);
        assert!(!path.exists());
    }

    #[test]
    fn a_server_that_ends_at_once_is_not_waited_for() {
        let scratch = Scratch::new(&std::env::temp_dir(), "test-end").unwrap();
        let core = core_affinity::get_core_ids().unwrap()[0].id;
        let mut command = Command::new("sh");
        command.args(["-c", "echo no store >&2; exit 1"]);
        let mut server = Server::start("sh", command, scratch.path().join("log"), core).unwrap();
        let error = server.wait_for_socket(&scratch.path().join("socket")).unwrap_err();
        let message = server.explain(&error);
        assert!(message.contains("ended at once") && message.contains("no store"), "{message}");
    }

    #[test]
    fn commas_and_quotes_in_paths_are_harmless() {
        assert_eq!(escape_commas(Path::new("/a,b")), "/a,,b");
    }
}
