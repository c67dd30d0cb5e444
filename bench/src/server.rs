//! The servers that are compared: how each is started, and that each is stopped.
//!
//! Whatever is made here goes away with its value, on every path out: processes get SIGTERM and
//! after a while SIGKILL, scratch directories are removed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use clap::ValueEnum;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;
use serde_json::json;

use crate::api::Api;
use crate::clock::Clock;
use crate::{cli, interrupt, size};

/// How long a server may take to open its store and listen.
pub(crate) const START_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a server may take to flush and leave.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// Bytes of a server's own words that go into our message when it fails.
const LOG_TAIL_BYTES: usize = 600;

/// The file name of the socket at which a contender serves.
const SOCKET: &str = "disk.sock";

/// The name of the snapshot inside a qcow2 file.
const QCOW2_SNAPSHOT: &str = "bench";

/// SPDK's programs that serve vhost-user-blk, the preferred one first.
const SPDK_PROGRAMS: [&str; 2] = ["spdk_tgt", "vhost"];

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Contender {
    /// qemu-storage-daemon over a raw file, by io_uring
    QsdUring,
    /// qemu-storage-daemon over a raw file, by its thread pool
    QsdThreads,
    /// qemu-storage-daemon over a qcow2 file, by io_uring
    QsdQcow2,
    /// SPDK's vhost target over a raw file, by Linux AIO
    SpdkAio,
    /// A volume of a Bessel store
    Bessel,
    /// No server: fio over a raw file by io_uring, the machine's limit for one core
    BareUring,
}

impl Contender {
    /// Its name in tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::QsdUring => "qsd io_uring",
            Self::QsdThreads => "qsd threads",
            Self::QsdQcow2 => "qsd qcow2",
            Self::SpdkAio => "spdk aio",
            Self::Bessel => "bessel",
            Self::BareUring => "bare io_uring",
        }
    }

    /// What it keeps its disk in. Contenders of the same kind share the file.
    pub(crate) fn medium(self) -> Medium {
        match self {
            Self::QsdUring | Self::QsdThreads | Self::SpdkAio | Self::BareUring => Medium::Raw,
            Self::QsdQcow2 => Medium::Qcow2,
            Self::Bessel => Medium::Store,
        }
    }

    /// Why it cannot serve a disk in `state` through so many queues, if it cannot.
    pub(crate) fn cannot(self, state: State, queues: u16) -> Option<&'static str> {
        if state == State::Snapshotted && self.medium() == Medium::Raw {
            return Some("a raw file has no snapshots");
        }
        (self == Self::BareUring && queues > 1).then_some("fio without a server has no queues")
    }

    /// The programs that it needs besides Bessel; of SPDK's the first that is there.
    fn programs(self) -> &'static [&'static str] {
        match self {
            Self::QsdUring | Self::QsdThreads => &["qemu-storage-daemon"],
            Self::QsdQcow2 => &["qemu-storage-daemon", "qemu-img"],
            Self::SpdkAio => &SPDK_PROGRAMS,
            Self::Bessel => &[],
            Self::BareUring => &["fio"],
        }
    }

    /// What its program says of its version, or why it cannot be measured here.
    pub(crate) fn version(self, bessel: Option<&Path>) -> Result<String, String> {
        match self {
            Self::Bessel => match bessel {
                Some(program) => program_version(program),
                None => Err("no --bessel PROGRAM was given".into()),
            },
            Self::SpdkAio => spdk_program()
                .ok_or_else(|| format!("neither of {} is in PATH", SPDK_PROGRAMS.join(", ")))
                .and_then(|program| program_version(Path::new(program))),
            _ => {
                let versions = self.programs().iter().map(|it| program_version(Path::new(it)));
                versions.collect::<Result<Vec<_>, _>>().map(|all| all.join(", "))
            }
        }
    }
}

/// What a disk is kept in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Medium {
    Raw,
    Qcow2,
    Store,
}

/// What has happened to a disk before it is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    /// Nothing: it was made just before, and nothing has been written to it.
    Empty,
    /// Every block has been written.
    Written,
    /// The same, and a snapshot was taken just before.
    Snapshotted,
}

impl State {
    /// Its name in tables and files.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Written => "written",
            Self::Snapshotted => "snapshotted",
        }
    }
}

/// What a server is started for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Serving {
    pub(crate) contender: Contender,
    pub(crate) state: State,
    pub(crate) queues: u16,
}

impl Serving {
    /// A written disk with one queue.
    pub(crate) fn written(contender: Contender) -> Self {
        Self { contender, state: State::Written, queues: 1 }
    }
}

/// The first line that `program --version` prints.
fn program_version(program: &Path) -> Result<String, String> {
    let mut command = Command::new(program);
    command.arg("--version");
    let output = finish(command)?;
    let said = String::from_utf8_lossy(&output.stdout);
    Ok(said.lines().next().unwrap_or("no version").trim().to_owned())
}

fn spdk_program() -> Option<&'static str> {
    SPDK_PROGRAMS.into_iter().find(|program| program_version(Path::new(program)).is_ok())
}

/// Runs a command to its end, which must be a good one.
fn finish(mut command: Command) -> Result<Output, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot start {program}: {error}; is it installed?"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{program} failed, with {}: {}", output.status, said.trim()));
    }
    Ok(output)
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
    /// The file in which `contender` keeps its disk in that state.
    pub(crate) fn disk_file(&self, contender: Contender, state: State) -> PathBuf {
        let extension = match contender.medium() {
            Medium::Raw => "raw",
            Medium::Qcow2 => "qcow2",
            Medium::Store => "store",
        };
        self.files.path().join(state.name()).with_extension(extension)
    }

    /// Bessel's store.
    pub(crate) fn store_file(&self) -> PathBuf {
        self.disk_file(Contender::Bessel, State::Written)
    }

    /// Makes the disk anew, sparse: a fill writes it. A store is made by its daemon.
    pub(crate) fn make_disk(&self, contender: Contender, state: State) -> Result<(), String> {
        self.remove_disk(contender, state)?;
        let path = self.disk_file(contender, state);
        match contender.medium() {
            Medium::Raw => File::create(&path)
                .and_then(|file| file.set_len(self.size_bytes))
                .map_err(|error| format!("cannot create {}: {error}", path.display())),
            Medium::Qcow2 => {
                let mut command = Command::new("qemu-img");
                command.args(["create", "-q", "-f", "qcow2"]).arg(qemu_img_name(&path));
                command.arg(self.size_bytes.to_string());
                finish(command).map(drop)
            }
            Medium::Store => Ok(()),
        }
    }

    /// Removes the disk, if there is one.
    pub(crate) fn remove_disk(&self, contender: Contender, state: State) -> Result<(), String> {
        let path = self.disk_file(contender, state);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(format!("cannot remove {}: {error}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Makes (`-c`) or deletes (`-d`) the snapshot inside a qcow2 file, which no server may have open.
    fn qcow2_snapshot(&self, action: &str) -> Result<(), String> {
        let mut command = Command::new("qemu-img");
        command.args(["snapshot", "-q", action, QCOW2_SNAPSHOT]);
        command.arg(qemu_img_name(&self.disk_file(Contender::QsdQcow2, State::Snapshotted)));
        finish(command).map(drop)
    }

    /// The socket at which a contender serves.
    pub(crate) fn socket(&self) -> PathBuf {
        self.run.path().join(SOCKET)
    }

    /// The socket at which Bessel serves its API.
    pub(crate) fn api_socket(&self) -> PathBuf {
        self.run.path().join("api.sock")
    }

    /// Starts a contender, pinned to the server's core, and waits until it has made its socket.
    pub(crate) fn start(&self, serving: Serving) -> Result<Server, String> {
        let command = match serving.contender {
            Contender::QsdUring => self.qsd(serving, "io_uring"),
            Contender::QsdThreads => self.qsd(serving, "threads"),
            Contender::QsdQcow2 => self.qsd(serving, "io_uring"),
            Contender::SpdkAio => self.spdk(serving)?,
            Contender::Bessel => self.bessel(serving)?,
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
        let mut server = Server::start(serving.contender.name(), command, log, self.server_core)?;
        server.wait_for(&self.socket())?;
        Ok(server)
    }

    /// The same with a snapshot taken just before, which goes away once `load` has been called: the next
    /// measurement has one of its own, and the space of this one.
    pub(crate) fn with_snapshot<T>(
        &self,
        serving: Serving,
        load: impl FnOnce(&Server) -> Result<T, String>,
    ) -> Result<T, String> {
        match serving.contender.medium() {
            Medium::Raw => panic!("a raw file has no snapshots"),
            Medium::Qcow2 => {
                self.qcow2_snapshot("-c")?;
                let loaded = load(&self.start(serving)?)?;
                self.qcow2_snapshot("-d").map(|()| loaded)
            }
            Medium::Store => {
                let mut server = self.start(serving)?;
                let api = Api { socket: self.api_socket() };
                server.wait_for(&api.socket)?;
                let explain = |error: String| server.explain(&error);
                let path = "/v1/volumes/bench/snapshots";
                let snapshot = api.ask("POST", path, &json!({})).map_err(explain)?;
                let id = snapshot["id"].as_str().ok_or_else(|| format!("{snapshot} has no id"))?;
                let loaded = load(&server)?;
                let path = format!("/v1/snapshots/{id}");
                api.ask("DELETE", &path, &json!(null)).map_err(explain).map(|_| loaded)
            }
        }
    }

    fn qsd(&self, serving: Serving, aio: &str) -> Command {
        let Serving { contender, state, queues } = serving;
        let file = escape_commas(&self.disk_file(contender, state));
        let socket = escape_commas(&self.socket());
        let direct = if self.direct { "on" } else { "off" };
        let disk = match contender.medium() {
            Medium::Qcow2 => format!(
                "driver=qcow2,node-name=disk,cache.direct={direct},file.driver=file,\
                 file.filename={file},file.aio={aio},file.cache.direct={direct}"
            ),
            _ => format!(
                "driver=file,node-name=disk,filename={file},aio={aio},cache.direct={direct}"
            ),
        };
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--object", "iothread,id=io", "--blockdev", &disk, "--export"]).arg(format!(
            "type=vhost-user-blk,id=export,addr.type=unix,addr.path={socket},node-name=disk,\
             writable=on,iothread=io,num-queues={queues}"
        ));
        command
    }

    /// SPDK's target: an AIO disk over the file behind a vhost controller, which is named as its socket. The
    /// controller takes as many queues as its client has.
    fn spdk(&self, serving: Serving) -> Result<Command, String> {
        let program = spdk_program().ok_or("SPDK's vhost target is not in PATH")?;
        let file = self.disk_file(serving.contender, serving.state);
        let config = self.run.path().join("spdk.json");
        fs::write(&config, spdk_config(&file).to_string())
            .map_err(|error| format!("cannot write {}: {error}", config.display()))?;
        let mut command = Command::new(program);
        command.arg("-m").arg(format!("[{}]", self.server_core));
        command.arg("-S").arg(self.run.path()).arg("-r").arg(self.run.path().join("rpc.sock"));
        command.arg("-c").arg(config);
        Ok(command)
    }

    fn bessel(&self, serving: Serving) -> Result<Command, String> {
        let program = self.bessel.as_ref().ok_or("there is no Bessel to start")?;
        let config = self.run.path().join("bessel.yaml");
        fs::write(&config, self.bessel_config(serving))
            .map_err(|error| format!("cannot write {}: {error}", config.display()))?;
        let mut command = Command::new(program);
        command.arg("serve").arg("--config").arg(config);
        Ok(command)
    }

    fn bessel_config(&self, serving: Serving) -> String {
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
             cache: writeback\n    queues: {queues}\n",
            device = quoted(&self.disk_file(Contender::Bessel, serving.state)),
            store = size::format(self.store_bytes),
            core = self.server_core,
            api = quoted(&self.api_socket()),
            size = size::format(self.size_bytes),
            socket = quoted(&self.socket()),
            queues = serving.queues,
        )
    }
}

fn spdk_config(file: &Path) -> serde_json::Value {
    let disk = json!({ "name": "disk", "filename": file.to_string_lossy(), "block_size": 512 });
    let controller = json!({ "ctrlr": SOCKET, "dev_name": "disk" });
    json!({ "subsystems": [
        { "subsystem": "bdev", "config": [{ "method": "bdev_aio_create", "params": disk }] },
        { "subsystem": "vhost_blk",
          "config": [{ "method": "vhost_create_blk_controller", "params": controller }] },
    ] })
}

/// What stands before a colon is a protocol to qemu-img, unless it is said to be a file.
fn qemu_img_name(path: &Path) -> std::ffi::OsString {
    let mut name = std::ffi::OsString::from("file:");
    name.push(path);
    name
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
    fn what_a_contender_cannot_do_has_a_reason() {
        let raw = [Contender::QsdUring, Contender::QsdThreads, Contender::SpdkAio];
        for contender in raw {
            assert!(contender.cannot(State::Snapshotted, 1).is_some());
            assert!(contender.cannot(State::Empty, 4).is_none());
        }
        for contender in [Contender::QsdQcow2, Contender::Bessel] {
            assert!(contender.cannot(State::Snapshotted, 4).is_none());
        }
        assert!(Contender::BareUring.cannot(State::Written, 2).is_some());
    }

    #[test]
    fn a_peer_that_is_not_there_is_told_with_its_program() {
        let missing = program_version(Path::new("/nonexistent/program")).unwrap_err();
        assert!(missing.contains("/nonexistent/program"), "{missing}");
        assert!(Contender::Bessel.version(None).unwrap_err().contains("--bessel"));
    }

    #[test]
    fn commas_and_quotes_in_paths_are_harmless() {
        assert_eq!(escape_commas(Path::new("/a,b")), "/a,,b");
    }
}
