//! The servers that are compared: how each is started, and that each is stopped.
//!
//! Whatever is made here goes away with its value, on every path out: processes get SIGTERM and
//! after a while SIGKILL, scratch directories are removed.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixStream;
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

/// The name of the snapshot inside a qcow2 file, and of an lvol's.
const SNAPSHOT: &str = "bench";

/// SPDK's programs that serve vhost-user-blk, the preferred one first.
const SPDK_PROGRAMS: [&str; 2] = ["spdk_tgt", "vhost"];

/// Memory that SPDK wants for itself; its disks in memory come on top.
const SPDK_BYTES: u64 = 1 << 30;

/// The cluster of an lvol: not SPDK's own choice of 4 MiB, all of which its first write after a snapshot would copy.
const LVOL_CLUSTER_BYTES: u64 = 64 << 10;
/// What a store of lvols has for its own use, at most, and what it keeps for each cluster.
const LVOL_STORE_BYTES: u64 = 64 << 20;
const LVOL_CLUSTER_PAGE_BYTES: u64 = 4096;

/// The name of SPDK's lvol, with its store's.
const LVOL: &str = "lvs/disk";

/// Longest wait for SPDK to answer a request.
const SPDK_TIMEOUT: Duration = Duration::from_secs(30);

/// Where the disks of a place are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Device {
    /// Files in a directory, on tmpfs or on a disk.
    Directory(PathBuf),
    /// Loop devices over files in a directory: block devices, where no other is to spare.
    Loop(PathBuf),
    /// The memory of the server. A disk is gone with its server.
    Memory,
    /// Nowhere: what is written is dropped, and reads bring nothing.
    Null,
}

impl Device {
    /// A disk is still there when the server that served it has gone.
    pub(crate) fn outlives_servers(&self) -> bool {
        self.directory().is_some()
    }

    /// Where its files are, if it has any.
    pub(crate) fn directory(&self) -> Option<&Path> {
        match self {
            Self::Directory(path) | Self::Loop(path) => Some(path),
            Self::Memory | Self::Null => None,
        }
    }
}

/// What stands before the directory whose files are to be block devices.
const LOOP: &[u8] = b"loop:";

/// As Bessel's configuration has it: a directory of such a name is written `./memory`.
impl From<OsString> for Device {
    fn from(text: OsString) -> Self {
        match text.to_str() {
            Some("memory") => Self::Memory,
            Some("null") => Self::Null,
            _ => match text.as_bytes().strip_prefix(LOOP) {
                Some(directory) => Self::Loop(OsStr::from_bytes(directory).into()),
                None => Self::Directory(text.into()),
            },
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => path.display().fmt(f),
            Self::Loop(path) => write!(f, "loop:{}", path.display()),
            Self::Memory => f.write_str("memory"),
            Self::Null => f.write_str("null"),
        }
    }
}

impl Serialize for Device {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

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
    /// SPDK's vhost target over a malloc disk: its own memory
    SpdkMalloc,
    /// SPDK's vhost target over a thin lvol of 64 KiB clusters on a malloc disk
    SpdkLvol,
    /// SPDK's vhost target over a null disk
    SpdkNull,
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
            Self::SpdkMalloc => "spdk malloc",
            Self::SpdkLvol => "spdk lvol",
            Self::SpdkNull => "spdk null",
            Self::Bessel => "bessel",
            Self::BareUring => "bare io_uring",
        }
    }

    /// What it keeps its disk in, where that is a directory. Contenders of the same kind share the file.
    pub(crate) fn medium(self) -> Medium {
        match self {
            Self::QsdUring | Self::QsdThreads | Self::SpdkAio | Self::BareUring => Medium::Raw,
            Self::QsdQcow2 => Medium::Qcow2,
            Self::SpdkMalloc | Self::SpdkLvol | Self::SpdkNull => Medium::NoFile,
            Self::Bessel => Medium::Store,
        }
    }

    /// Why its disk cannot be on such a device, if it cannot.
    pub(crate) fn cannot_be_on(self, device: &Device) -> Option<&'static str> {
        match (self, device) {
            (Self::Bessel, _)
            | (Self::SpdkMalloc | Self::SpdkLvol, Device::Memory)
            | (Self::SpdkNull, Device::Null) => None,
            (Self::SpdkMalloc | Self::SpdkLvol, _) => Some("has its disk in memory"),
            (Self::SpdkNull, _) => Some("drops what is written"),
            (_, Device::Directory(_) | Device::Loop(_)) => None,
            (_, Device::Memory | Device::Null) => Some("is measured on files"),
        }
    }

    /// Why it offers no FLUSH, if it does not.
    pub(crate) fn cannot_flush(self) -> Option<&'static str> {
        (self == Self::SpdkLvol).then_some("an lvol offers no FLUSH")
    }

    /// Why it cannot serve a disk in `state` through so many queues, if it cannot.
    pub(crate) fn cannot(self, state: State, queues: u16) -> Option<&'static str> {
        if state == State::Snapshotted && self.medium() == Medium::Raw {
            return Some("a raw file has no snapshots");
        }
        if state == State::Snapshotted && self == Self::SpdkMalloc {
            return Some("a malloc disk has no snapshots");
        }
        (self == Self::BareUring && queues > 1).then_some("fio without a server has no queues")
    }

    /// The programs that it needs besides Bessel; of SPDK's the first that is there.
    fn programs(self) -> &'static [&'static str] {
        match self {
            Self::QsdUring | Self::QsdThreads => &["qemu-storage-daemon"],
            Self::QsdQcow2 => &["qemu-storage-daemon", "qemu-img"],
            Self::SpdkAio | Self::SpdkMalloc | Self::SpdkLvol | Self::SpdkNull => &SPDK_PROGRAMS,
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
            Self::SpdkAio | Self::SpdkMalloc | Self::SpdkLvol | Self::SpdkNull => spdk_program()
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
    /// It has no disks in directories.
    NoFile,
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
    Sparing,
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
    pub(crate) device: Device,
    /// Holds the files that are measured, where the device is a directory.
    pub(crate) files: Option<Scratch>,
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
            Medium::NoFile => panic!("{} has no file", contender.name()),
        };
        let files = self.files.as_ref().expect("only disks in directories are files");
        files.path().join(state.name()).with_extension(extension)
    }

    /// Bessel's store.
    pub(crate) fn store_file(&self) -> PathBuf {
        self.disk_file(Contender::Bessel, State::Written)
    }

    /// What a server, or fio, is to open of a disk that is there: its file, or a block device made of it.
    pub(crate) fn open_disk(&self, contender: Contender, state: State) -> Result<Disk, String> {
        let path = self.disk_file(contender, state);
        match self.device {
            Device::Loop(_) => LoopDevice::over(&path)
                .map(|device| Disk { path: device.path.clone(), device: Some(device) }),
            _ => Ok(Disk { path, device: None }),
        }
    }

    /// Makes the disk anew, sparse: a fill writes it. A store is made by its daemon, but on a block device.
    pub(crate) fn make_disk(&self, contender: Contender, state: State) -> Result<(), String> {
        self.remove_disk(contender, state)?;
        let path = self.disk_file(contender, state);
        let in_block_device = matches!(self.device, Device::Loop(_));
        let make = |bytes| {
            let file = File::options().create(true).truncate(false).write(true).open(&path);
            file.and_then(|file| file.set_len(bytes))
                .map_err(|error| format!("cannot create {}: {error}", path.display()))
        };
        match contender.medium() {
            Medium::Raw => make(self.size_bytes),
            Medium::Qcow2 => {
                let mut command = Command::new("qemu-img");
                command.args(["create", "-q", "-f", "qcow2"]).arg(qemu_img_name(&path));
                command.arg(self.size_bytes.to_string());
                finish(command)?;
                match in_block_device {
                    // It grows within the device: room for as much again, for a snapshot, and its tables.
                    true => make(2 * self.size_bytes + (64 << 20)),
                    false => Ok(()),
                }
            }
            Medium::Store if in_block_device => {
                make(self.store_bytes)?;
                let mut command = Command::new(self.bessel()?);
                command.arg("format").arg(&path);
                finish(command).map(drop)
            }
            Medium::Store => Ok(()),
            Medium::NoFile => panic!("{} makes its disk itself", contender.name()),
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
        command.args(["snapshot", "-q", action, SNAPSHOT]);
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
        let Serving { contender, state, .. } = serving;
        let has_file = self.device.outlives_servers() && contender.medium() != Medium::NoFile;
        let disk = has_file.then(|| self.open_disk(contender, state)).transpose()?;
        let path = disk.as_ref().map(|disk| disk.path.as_path());
        let command = match (contender, path) {
            (Contender::QsdUring | Contender::QsdQcow2, Some(path)) => {
                self.qsd(serving, path, "io_uring")
            }
            (Contender::QsdThreads, Some(path)) => self.qsd(serving, path, "threads"),
            (
                Contender::SpdkAio
                | Contender::SpdkMalloc
                | Contender::SpdkLvol
                | Contender::SpdkNull,
                path,
            ) => self.spdk(serving, path)?,
            (Contender::Bessel, path) => self.serve_bessel(serving, path)?,
            (Contender::BareUring, _) => panic!("fio serves nothing"),
            (contender, None) => panic!("{} needs a file", contender.name()),
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
        // It has its disk open: a loop device that is taken down now goes when the server does, however it ends.
        drop(disk);
        Ok(server)
    }

    /// The same with a snapshot taken just before, which goes away once `load` has been called: the next
    /// measurement has one of its own, and the space of this one.
    pub(crate) fn with_snapshot<T>(
        &self,
        serving: Serving,
        load: impl FnOnce(&mut Server) -> Result<T, String>,
    ) -> Result<T, String> {
        match serving.contender.medium() {
            Medium::Raw | Medium::NoFile => panic!("there is no file with snapshots"),
            Medium::Qcow2 => {
                self.qcow2_snapshot("-c")?;
                let loaded = load(&mut self.start(serving)?)?;
                self.qcow2_snapshot("-d").map(|()| loaded)
            }
            Medium::Store => {
                let mut server = self.start(serving)?;
                let id = self.snapshot_of_bessel(&mut server)?;
                let loaded = load(&mut server)?;
                let path = format!("/v1/snapshots/{id}");
                let deleted = self.api().ask("DELETE", &path, &json!(null));
                deleted.map_err(|error| server.explain(&error)).map(|_| loaded)
            }
        }
    }

    /// Takes a snapshot of a disk that is gone with its server.
    pub(crate) fn take_snapshot(
        &self,
        contender: Contender,
        server: &mut Server,
    ) -> Result<(), String> {
        match contender {
            Contender::Bessel => self.snapshot_of_bessel(server).map(drop),
            Contender::SpdkLvol => {
                let rpc = self.spdk_socket();
                server.wait_for(&rpc)?;
                let parameters = json!({ "lvol_name": LVOL, "snapshot_name": SNAPSHOT });
                ask_spdk(&rpc, "bdev_lvol_snapshot", &parameters)
                    .map_err(|error| server.explain(&error))
            }
            _ => panic!("{} has no snapshots", contender.name()),
        }
    }

    /// Takes a snapshot of the volume that is served, and returns its id.
    fn snapshot_of_bessel(&self, server: &mut Server) -> Result<String, String> {
        let api = self.api();
        server.wait_for(&api.socket)?;
        let snapshot = api.ask("POST", "/v1/volumes/bench/snapshots", &json!({}));
        let snapshot = snapshot.map_err(|error| server.explain(&error))?;
        let id = snapshot["id"].as_str().ok_or_else(|| format!("{snapshot} has no id"))?;
        Ok(id.to_owned())
    }

    /// Messages that Bessel's reactors have taken until now.
    pub(crate) fn messages_of_bessel(&self) -> Result<u64, String> {
        let stats = self.api().ask("GET", "/v1/stats", &json!(null))?;
        let reactors = stats["reactors"].as_array().map_or(&[][..], Vec::as_slice);
        // An older daemon does not count them.
        let taken = reactors.iter().map(|reactor| reactor["messages"].as_u64());
        taken.sum::<Option<u64>>().ok_or_else(|| "this daemon counts no messages".into())
    }

    fn api(&self) -> Api {
        Api { socket: self.api_socket() }
    }

    /// The socket at which SPDK takes requests.
    fn spdk_socket(&self) -> PathBuf {
        self.run.path().join("rpc.sock")
    }

    fn qsd(&self, serving: Serving, disk: &Path, aio: &str) -> Command {
        let Serving { contender, queues, .. } = serving;
        let file = escape_commas(disk);
        let driver = match self.device {
            Device::Loop(_) => "host_device",
            _ => "file",
        };
        let socket = escape_commas(&self.socket());
        let direct = if self.direct { "on" } else { "off" };
        let disk = match contender.medium() {
            Medium::Qcow2 => format!(
                "driver=qcow2,node-name=disk,cache.direct={direct},file.driver={driver},\
                 file.filename={file},file.aio={aio},file.cache.direct={direct}"
            ),
            _ => format!(
                "driver={driver},node-name=disk,filename={file},aio={aio},cache.direct={direct}"
            ),
        };
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--object", "iothread,id=io", "--blockdev", &disk, "--export"]).arg(format!(
            "type=vhost-user-blk,id=export,addr.type=unix,addr.path={socket},node-name=disk,\
             writable=on,iothread=io,num-queues={queues}"
        ));
        command
    }

    /// SPDK's target: a disk behind a vhost controller, which is named as its socket. The controller takes as many
    /// queues as its client has.
    fn spdk(&self, serving: Serving, disk: Option<&Path>) -> Result<Command, String> {
        let program = spdk_program().ok_or("SPDK's vhost target is not in PATH")?;
        let config = self.run.path().join("spdk.json");
        fs::write(&config, self.spdk_config(serving, disk).to_string())
            .map_err(|error| format!("cannot write {}: {error}", config.display()))?;
        let mut command = Command::new(program);
        command.arg("-m").arg(format!("[{}]", self.server_core));
        command.arg("-S").arg(self.run.path()).arg("-r").arg(self.spdk_socket());
        // None of the disks is a PCI device. With them, and with huge pages, SPDK addresses memory as such devices do,
        // which it cannot do with a guest's that is none of its own: it dies as the guest connects.
        command.arg("--no-pci").arg("-c").arg(config);
        // What a disk in memory takes is rounded up, and need not lie in one piece.
        let memory_bytes = SPDK_BYTES + self.malloc_bytes(serving) * 3 / 2;
        if free_huge_bytes() >= memory_bytes {
            command.arg("--huge-unlink");
        } else {
            command.arg("--no-huge").arg("-s").arg(memory_bytes.div_ceil(1 << 20).to_string());
        }
        Ok(command)
    }

    /// Memory that SPDK's disk takes.
    fn malloc_bytes(&self, serving: Serving) -> u64 {
        match (serving.contender, serving.state) {
            (Contender::SpdkMalloc, _) => self.size_bytes,
            // With a snapshot behind, each cluster may be there twice.
            (Contender::SpdkLvol, State::Snapshotted) => Self::lvol_bytes(2 * self.size_bytes),
            (Contender::SpdkLvol, _) => Self::lvol_bytes(self.size_bytes),
            _ => 0,
        }
    }

    /// A store of lvols with room for so much.
    fn lvol_bytes(data_bytes: u64) -> u64 {
        data_bytes + data_bytes / LVOL_CLUSTER_BYTES * LVOL_CLUSTER_PAGE_BYTES + LVOL_STORE_BYTES
    }

    fn spdk_config(&self, serving: Serving, disk: Option<&Path>) -> serde_json::Value {
        const BLOCK_BYTES: u64 = 512;
        let method = |name: &str, params| json!({ "method": name, "params": params });
        let blocks = |name: &str, bytes: u64| json!({ "name": name, "block_size": BLOCK_BYTES, "num_blocks": bytes / BLOCK_BYTES });
        let malloc = |name| method("bdev_malloc_create", blocks(name, self.malloc_bytes(serving)));
        let (disks, served) = match serving.contender {
            Contender::SpdkMalloc => (vec![malloc("disk")], "disk"),
            Contender::SpdkNull => {
                (vec![method("bdev_null_create", blocks("disk", self.size_bytes))], "disk")
            }
            Contender::SpdkLvol => {
                let (store, name) = LVOL.split_once('/').expect("it is a store's");
                let store_of = json!({
                    "bdev_name": "base", "lvs_name": store, "cluster_sz": LVOL_CLUSTER_BYTES,
                    // Memory is zeroed already.
                    "clear_method": "none",
                });
                let lvol = json!({
                    "lvs_name": store, "lvol_name": name, "thin_provision": true,
                    "size_in_mib": self.size_bytes.div_ceil(1 << 20),
                });
                let disks = vec![
                    malloc("base"),
                    method("bdev_lvol_create_lvstore", store_of),
                    method("bdev_lvol_create", lvol),
                ];
                (disks, LVOL)
            }
            _ => {
                let file = disk.expect("a disk by AIO is a file's");
                let aio = json!({
                    "name": "disk", "filename": file.to_string_lossy(), "block_size": BLOCK_BYTES
                });
                (vec![method("bdev_aio_create", aio)], "disk")
            }
        };
        let controller = json!({ "ctrlr": SOCKET, "dev_name": served });
        let controllers = vec![method("vhost_create_blk_controller", controller)];
        json!({ "subsystems": [
            { "subsystem": "bdev", "config": disks },
            { "subsystem": "vhost_blk", "config": controllers },
        ] })
    }

    fn bessel(&self) -> Result<&Path, String> {
        self.bessel.as_deref().ok_or_else(|| "there is no Bessel to start".into())
    }

    fn serve_bessel(&self, serving: Serving, disk: Option<&Path>) -> Result<Command, String> {
        let config = self.run.path().join("bessel.yaml");
        fs::write(&config, self.bessel_config(serving, disk))
            .map_err(|error| format!("cannot write {}: {error}", config.display()))?;
        let mut command = Command::new(self.bessel()?);
        command.arg("serve").arg("--config").arg(config);
        Ok(command)
    }

    fn bessel_config(&self, serving: Serving, disk: Option<&Path>) -> String {
        // A JSON string is a YAML string, so any path can be written.
        let quoted = |path: &Path| serde_json::Value::from(path.to_string_lossy()).to_string();
        let poll = match self.poll {
            Poll::Adaptive => "adaptive",
            Poll::Sparing => "sparing",
            Poll::Busy => "busy",
        };
        format!(
            "store:\n  device: {device}\n  size: {store}\n  node_cache: 64MiB\n\
             reactors:\n  cores: [{core}]\n  poll: {poll}\n\
             api:\n  socket: {api}\n\
             volumes:\n  - name: bench\n    size: {size}\n    socket: {socket}\n    \
             cache: writeback\n    queues: {queues}\n",
            device = disk.map_or_else(|| format!("\"{}\"", self.device), quoted),
            store = size::format(self.store_bytes),
            core = self.server_core,
            api = quoted(&self.api_socket()),
            size = size::format(self.size_bytes),
            socket = quoted(&self.socket()),
            queues = serving.queues,
        )
    }
}

/// Has SPDK do something, and waits until it has.
fn ask_spdk(socket: &Path, method: &str, parameters: &serde_json::Value) -> Result<(), String> {
    let failed = |what: String| format!("{method}: {what}");
    let exchange = || -> std::io::Result<Option<serde_json::Value>> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(SPDK_TIMEOUT))?;
        let request = json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": parameters });
        stream.write_all(request.to_string().as_bytes())?;
        // An answer ends where its JSON does; the connection stays open.
        let answers = serde_json::Deserializer::from_reader(&stream).into_iter().next();
        Ok(answers.transpose()?)
    };
    let answer = exchange().map_err(|error| failed(error.to_string()))?;
    match answer.as_ref().map(|answer| &answer["error"]) {
        None => Err(failed("it hung up".into())),
        Some(error) if !error.is_null() => Err(failed(error.to_string())),
        Some(_) => Ok(()),
    }
}

/// Free huge pages, where they can be used.
fn free_huge_bytes() -> u64 {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    if !mounts.lines().any(|line| line.split(' ').nth(2) == Some("hugetlbfs")) {
        return 0;
    }
    huge_bytes(&fs::read_to_string("/proc/meminfo").unwrap_or_default())
}

/// Bytes of the free huge pages that `/proc/meminfo` tells of.
fn huge_bytes(meminfo: &str) -> u64 {
    let number = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    number("HugePages_Free:") * number("Hugepagesize:") * 1024
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

/// A disk as it is opened.
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    /// What that is, unless it is the file itself.
    #[expect(dead_code, reason = "it is gone when dropped")]
    device: Option<LoopDevice>,
}

/// A loop device; taken down when dropped, or when the last who has it open then lets go of it.
struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// Makes a block device of a file, without a page cache in between.
    fn over(file: &Path) -> Result<Self, String> {
        let mut command = Command::new("losetup");
        command.args(["--find", "--show", "--direct-io=on"]).arg(file);
        let said = finish(command)?.stdout;
        let device = Self { path: OsStr::from_bytes(said.trim_ascii()).into() };
        // The kernel makes one with a page cache in between where it cannot do without.
        let name = device.path.file_name().unwrap_or_default();
        let direct = Path::new("/sys/block").join(name).join("loop/dio");
        match fs::read_to_string(&direct) {
            Ok(said) if said.trim() == "1" => Ok(device),
            _ => Err(format!(
                "no direct I/O from a loop device to {}: it would measure the page cache; choose a directory of \
                 another file system",
                file.display()
            )),
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let mut command = Command::new("losetup");
        command.arg("--detach").arg(&self.path);
        if let Err(error) = finish(command) {
            eprintln!("bessel-bench: {} is left behind: {error}", self.path.display());
        }
    }
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
        let raw =
            [Contender::QsdUring, Contender::QsdThreads, Contender::SpdkAio, Contender::SpdkMalloc];
        for contender in raw {
            assert!(contender.cannot(State::Snapshotted, 1).is_some());
            assert!(contender.cannot(State::Empty, 4).is_none());
        }
        for contender in [Contender::QsdQcow2, Contender::Bessel, Contender::SpdkLvol] {
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
    fn free_huge_pages_are_told_in_bytes() {
        let said = "HugePages_Total:    9\nHugePages_Free:        3\nHugepagesize:       2048 kB\n";
        assert_eq!(huge_bytes(said), 6 << 20);
        assert_eq!(huge_bytes(""), 0);
    }

    #[test]
    fn commas_and_quotes_in_paths_are_harmless() {
        assert_eq!(escape_commas(Path::new("/a,b")), "/a,,b");
    }
}
