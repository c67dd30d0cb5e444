//! The YAML file as validated types.
//!
//! Reading happens in three passes, each of which may refuse: serde (syntax, unknown keys, types),
//! [`Config::parse`] (ranges, duplicates: all that the text alone decides), and
//! [`Config::check_machine`] with [`Config::check_sockets`] (does the device, the core, the
//! directory exist, is a socket taken).
//! All three only look: a refused file leaves the machine as it was. Every error is one line,
//! `FILE:LINE: what; remedy`.
//!
//! `configs/README.md` lists every key with unit, default and range; a change here is a change there.

mod locate;

use crate::api::types::Cache;
use crate::keep::parse_keep;
use crate::limits::{BURST_DEFAULT, Limits};
use crate::places;
use crate::reference;
use crate::size::parse_size;
use crate::span::parse_span;
use bessel_mapping::schedule::{Age, Keep, Schedule};
use bessel_reactor::reactor::usable_cores;
use bessel_reactor::units::{ByteCount, SECTOR_SIZE};
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor};
use std::fmt;
use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(crate) use locate::Step;
use locate::Step::{Index, Key};

/// Longest path a Unix socket address holds: `sun_path` is 108 bytes with its final zero.
pub(crate) const SOCKET_PATH_MAX: usize = 107;
/// Most request queues of one volume: the vCPUs of a large guest.
pub(crate) const QUEUES_MAX: u16 = 64;
/// Request queues of a volume for which none are given. A front-end uses as many of them as it
/// likes, and one that is not used costs nothing but its place on the reactor.
pub(crate) const QUEUES_DEFAULT: u16 = 4;
/// Least node cache: the nodes that a handful of concurrent requests pin, with room to replace.
pub(crate) const NODE_CACHE_MIN: ByteCount = ByteCount::new(1 << 20);
/// Most node cache. A size beyond it is a slip of the unit, and would fail at start as an abort.
const NODE_CACHE_MAX: ByteCount = ByteCount::new(1 << 40);
/// Largest volume: a tree of four levels (DESIGN, "The store").
const VOLUME_SIZE_MAX: ByteCount = ByteCount::new(256 << 40);
/// Smallest volume: one block.
const VOLUME_SIZE_MIN: ByteCount = ByteCount::new(4096);
/// Smallest store: four extents of the least extent size, 1 MiB.
const STORE_SIZE_MIN: ByteCount = ByteCount::new(4 << 20);
/// Largest store: the reach of a block address on the device (DESIGN, "The store").
pub(crate) const STORE_SIZE_MAX: ByteCount = ByteCount::new(64 << 50);
/// Largest file read as configuration; a real one is a few hundred bytes.
const FILE_SIZE_MAX: u64 = 1 << 20;

/// Why a configuration was refused: one line that says where, what and what to do.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{place}: {message}")]
pub(crate) struct ConfigError {
    /// `FILE:LINE`, or `FILE` when it could not be read.
    place: String,
    message: String,
}

/// A whole configuration, checked as far as its text goes.
#[derive(Debug)]
pub(crate) struct Config {
    /// `store:`
    pub(crate) store: StoreConfig,
    /// `reactors:`
    pub(crate) reactors: ReactorsConfig,
    /// `api:`
    pub(crate) api: ApiConfig,
    /// `gc:`
    pub(crate) gc: GcConfig,
    /// `volumes:`, in the order of the file. Names and sockets are unique.
    pub(crate) volumes: Vec<VolumeConfig>,
    /// For errors found later, which still name the line.
    source: Source,
}

/// What a store is kept in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Medium {
    /// A block device or file.
    Device,
    /// Memory, made at each start.
    Memory,
    /// The same for all but the volumes' data, which is dropped.
    Null,
}

impl Medium {
    /// Those that are no device, and are called by these words.
    const WORDS: [(&str, Self); 2] = [("memory", Self::Memory), ("null", Self::Null)];

    fn of(device: &Path) -> Self {
        let word = Self::WORDS.iter().find(|(word, _)| device == Path::new(word));
        word.map_or(Self::Device, |(_, medium)| *medium)
    }

    /// There is something left of the store when the daemon has ended, however it does.
    pub(crate) fn outlives_the_daemon(self) -> bool {
        self == Self::Device
    }
}

/// The shared device and how much memory its mapping may take.
#[derive(Debug)]
pub(crate) struct StoreConfig {
    /// Block device or file; for a store in memory, what [`Config::make_memory`] has made, once it has.
    pub(crate) device: PathBuf,
    /// What the store is kept in.
    pub(crate) medium: Medium,
    /// Size of the file to create when there is none.
    pub(crate) size: Option<ByteCount>,
    /// Memory for radix nodes, all reactors together.
    pub(crate) node_cache: ByteCount,
    /// Whether completions of guests' I/O are polled for.
    pub(crate) io_poll: IoPoll,
}

/// Which cores poll, and how.
#[derive(Debug)]
pub(crate) struct ReactorsConfig {
    /// One reactor on each; never empty, no core twice. `None`: the first core we may run on.
    pub(crate) cores: Option<Vec<usize>>,
    /// Whether an idle reactor sleeps.
    pub(crate) poll: Poll,
    /// Whether volumes are moved from a reactor that has much to do.
    pub(crate) balance: Balance,
    /// Whether the queues of one volume are polled on several reactors.
    pub(crate) spread: Spread,
    /// Whether guests' memory is registered with the device.
    pub(crate) pin_guest_memory: bool,
}

/// Whether an idle reactor sleeps.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Poll {
    /// Spins while there is work, then sleeps.
    #[default]
    Adaptive,
    /// Sleeps whenever the device has to be waited for, and soon when there is nothing to do.
    Sparing,
    /// Never sleeps.
    Busy,
}

/// Whether volumes are moved by load.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Balance {
    /// Those that no operator has moved.
    #[default]
    On,
    /// None.
    Off,
}

/// Whether the queues of one volume are polled on several reactors.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Spread {
    /// Those of volumes that have more than one queue, and no limits.
    #[default]
    On,
    /// All at their volume's home.
    Off,
}

/// Whether a device is asked for completions rather than having it interrupt for each.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum IoPoll {
    /// One with queues for that.
    #[default]
    On,
    /// None.
    Off,
}

/// Where the daemon is spoken to.
#[derive(Debug)]
pub(crate) struct ApiConfig {
    /// Unix socket of the API.
    pub(crate) socket: PathBuf,
    /// TCP address for read-only metrics, when wanted.
    pub(crate) listen: Option<SocketAddr>,
}

/// When garbage is collected by itself, and how fast.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct GcConfig {
    /// So often, whatever there is.
    pub(crate) every: Option<Duration>,
    /// When less than so many hundredths of the store are free, if something was deleted.
    pub(crate) low_space_percent: Option<u8>,
    /// Bytes of radix nodes read in a second, at most.
    pub(crate) rate: Option<ByteCount>,
}

/// Half of what one core of a usual machine can read and check, and some 128 GiB of guests' data.
const GC_RATE_DEFAULT: ByteCount = ByteCount::new(256 << 20);
/// Least rate: a slower collection never ends on a store of some size.
const GC_RATE_MIN: ByteCount = ByteCount::new(1 << 20);
/// Least time between two collections by schedule.
const GC_EVERY_MIN: Duration = Duration::from_secs(1);
/// Free hundredths of the store below which a collection is begun.
const GC_LOW_SPACE_DEFAULT: u8 = 10;
const GC_LOW_SPACE_MAX: u8 = 90;

impl Default for GcConfig {
    fn default() -> Self {
        let (low_space_percent, rate) = (Some(GC_LOW_SPACE_DEFAULT), Some(GC_RATE_DEFAULT));
        Self { every: None, low_space_percent, rate }
    }
}

/// A volume that shall exist and be served.
#[derive(Clone, Debug)]
pub(crate) struct VolumeConfig {
    /// Its name.
    pub(crate) name: String,
    /// Its size when it has to be created.
    pub(crate) size: ByteCount,
    /// Where front-ends connect.
    pub(crate) socket: PathBuf,
    /// Its cache mode at start.
    pub(crate) cache: Cache,
    /// Request queues offered, 1 to 64.
    pub(crate) queues: u16,
    /// When snapshots are taken by themselves, if they are.
    pub(crate) snapshots: Option<Schedule>,
    /// What its guest may ask for, if there is a limit.
    pub(crate) limits: Option<Limits>,
}

#[derive(Debug)]
struct Source {
    file: PathBuf,
    text: String,
}

impl Source {
    fn error(&self, path: &[Step], message: impl Into<String>) -> ConfigError {
        let line = locate::line_of(&self.text, path);
        ConfigError {
            place: format!("{}:{line}", self.file.display()),
            message: message.into().replace('\n', " "),
        }
    }

    /// Turns the parser's own error, whose text ends in a position, into ours, which starts with it.
    fn syntax_error(&self, error: &serde_yaml::Error) -> ConfigError {
        let text = error.to_string();
        let (line, message) = match error.location() {
            Some(location) => {
                let suffix = format!(" at line {} column {}", location.line(), location.column());
                let line = locate::within(&self.text, location.line());
                (line, text.strip_suffix(&suffix).unwrap_or(&text).to_owned())
            }
            None => (1, text),
        };
        // Our own `Deserialize` messages carry their remedy already.
        let remedy = if message.contains("; ") { "" } else { "; configs/README.md lists the keys" };
        ConfigError {
            place: format!("{}:{line}", self.file.display()),
            message: format!("{message}{remedy}").replace('\n', " "),
        }
    }
}

// What serde reads. Ranges that one value alone decides are checked here or in `Config::parse`.

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    store: RawStore,
    #[serde(default)]
    reactors: RawReactors,
    #[serde(default)]
    api: RawApi,
    #[serde(default)]
    gc: RawGc,
    #[serde(default)]
    volumes: Vec<RawVolume>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawStore {
    #[serde(deserialize_with = "device")]
    device: PathBuf,
    #[serde(default)]
    size: Option<Size>,
    #[serde(default)]
    node_cache: Option<Size>,
    #[serde(default)]
    io_poll: IoPoll,
}

/// A path. Nothing at all, which a bare `null` is in YAML, is no device: data would be dropped for want
/// of quotes.
fn device<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    let nothing =
        "no device is named; give a block device or a file (or `memory`, or \"null\" in quotes)";
    Option::<PathBuf>::deserialize(deserializer)?.ok_or_else(|| serde::de::Error::custom(nothing))
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawReactors {
    #[serde(default)]
    cores: Option<Vec<usize>>,
    #[serde(default)]
    poll: Poll,
    #[serde(default)]
    balance: Balance,
    #[serde(default)]
    spread: Spread,
    #[serde(default)]
    pin_guest_memory: bool,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawApi {
    #[serde(default)]
    socket: Option<PathBuf>,
    #[serde(default)]
    listen: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawGc {
    #[serde(default)]
    every: Option<Span>,
    #[serde(default)]
    low_space: Option<String>,
    #[serde(default)]
    rate: Option<RawRate>,
}

/// A size, or none when there is no limit.
struct RawRate(Option<ByteCount>);

impl<'de> Deserialize<'de> for RawRate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RateVisitor;
        impl Visitor<'_> for RateVisitor {
            type Value = RawRate;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a size a second such as 256MiB, or `unlimited`")
            }

            fn visit_u64<E: serde::de::Error>(self, bytes: u64) -> Result<RawRate, E> {
                Ok(RawRate(Some(ByteCount::new(bytes))))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<RawRate, E> {
                if text == "unlimited" {
                    return Ok(RawRate(None));
                }
                parse_size(text).map(|size| RawRate(Some(size))).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(RateVisitor)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawVolume {
    name: String,
    size: Size,
    #[serde(default)]
    socket: Option<PathBuf>,
    #[serde(default)]
    cache: Cache,
    #[serde(default)]
    queues: Option<u16>,
    #[serde(default)]
    snapshots: Option<RawSnapshots>,
    #[serde(default)]
    limits: Option<RawLimits>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawLimits {
    #[serde(default)]
    iops: Option<u64>,
    #[serde(default)]
    bandwidth: Option<Size>,
    #[serde(default)]
    burst: Option<Span>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSnapshots {
    every: Span,
    keep: RawKeep,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawAge {
    #[serde(rename = "for")]
    up_to: Span,
    #[serde(default)]
    every: Option<Span>,
}

struct Span(Duration);

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SpanVisitor;
        impl Visitor<'_> for SpanVisitor {
            type Value = Span;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a span of time such as 10ms, 1s, 5m, 2h or 1d")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Span, E> {
                parse_span(text).map(Span).map_err(E::custom)
            }
        }
        deserializer.deserialize_str(SpanVisitor)
    }
}

struct RawKeep(Keep);

impl<'de> Deserialize<'de> for RawKeep {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeepVisitor;
        impl<'de> Visitor<'de> for KeepVisitor {
            type Value = RawKeep;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a number of snapshots, `all`, or a list of ages")
            }

            fn visit_u64<E: serde::de::Error>(self, count: u64) -> Result<RawKeep, E> {
                Ok(RawKeep(Keep::Newest(count)))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<RawKeep, E> {
                parse_keep(text).map(RawKeep).map_err(E::custom)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut ages: A) -> Result<RawKeep, A::Error> {
                let mut kept = Vec::new();
                while let Some(RawAge { up_to, every }) = ages.next_element()? {
                    kept.push(Age { up_to: up_to.0, spacing: every.map(|it| it.0) });
                }
                Ok(RawKeep(Keep::Ages(kept)))
            }
        }
        deserializer.deserialize_any(KeepVisitor)
    }
}

struct Size(ByteCount);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// Parses inside the visit, where an error still gets the position of the value.
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = Size;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a size such as 4GiB, 512MiB or a number of bytes")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Size, E> {
                parse_size(text).map(Size).map_err(E::custom)
            }
        }
        deserializer.deserialize_str(SizeVisitor)
    }
}

impl Config {
    /// Reads and checks `file`. Looks at nothing else.
    pub(crate) fn read(file: &Path) -> Result<Self, ConfigError> {
        let refuse = |message: String| ConfigError { place: file.display().to_string(), message };
        let size = std::fs::metadata(file)
            .map_err(|error| refuse(format!("cannot be read: {error}; give --config a YAML file")))?
            .len();
        if size > FILE_SIZE_MAX {
            let message = format!("is {size} bytes long; a configuration has at most 1 MiB");
            return Err(refuse(message));
        }
        let text = std::fs::read_to_string(file).map_err(|error| {
            refuse(format!("cannot be read: {error}; give --config a YAML file"))
        })?;
        Self::parse(file, text)
    }

    /// Checks the text of a configuration; `file` is its name in errors.
    pub(crate) fn parse(file: &Path, text: String) -> Result<Self, ConfigError> {
        let source = Source { file: file.to_owned(), text };
        let raw: RawConfig =
            serde_yaml::from_str(&source.text).map_err(|error| source.syntax_error(&error))?;
        let store = checked_store(raw.store, &source)?;
        let reactors = checked_reactors(raw.reactors, &source)?;
        let api = checked_api(raw.api, &source)?;
        let gc = checked_gc(raw.gc, &source)?;
        let volumes = checked_volumes(raw.volumes, &api, &source)?;
        Ok(Self { store, reactors, api, gc, volumes, source })
    }

    /// An error at the value of `path`, for what turns out later: a locked device, a full store.
    pub(crate) fn error(&self, path: &[Step], message: impl Into<String>) -> ConfigError {
        self.source.error(path, message)
    }

    /// An error at volume number `index`, counted in the order of the file.
    pub(crate) fn volume_error(&self, index: usize, message: impl Into<String>) -> ConfigError {
        self.source.error(&[Key("volumes"), Index(index)], message)
    }

    /// An error at the device.
    pub(crate) fn device_error(&self, message: impl Into<String>) -> ConfigError {
        self.source.error(&[Key("store"), Key("device")], message)
    }

    /// The directory of the API socket, where volumes without a socket of their own get theirs.
    pub(crate) fn socket_directory(&self) -> &Path {
        parent_of(&self.api.socket)
    }

    /// What the store is called.
    pub(crate) fn store_name(&self) -> String {
        let word = Medium::WORDS.iter().find(|(_, medium)| *medium == self.store.medium);
        word.map_or_else(|| self.store.device.display().to_string(), |(word, _)| (*word).to_owned())
    }

    /// Makes the memory of a store that is to live there, as blank as a new file. It lasts as long as
    /// what is returned, which is nothing for other stores.
    ///
    /// # Errors
    /// When the system has none.
    pub(crate) fn make_memory(&mut self) -> Result<Option<File>, ConfigError> {
        let StoreConfig { medium, size: Some(size), .. } = self.store else { return Ok(None) };
        let word = self.store_name();
        let made = match medium {
            Medium::Device => return Ok(None),
            // Somebody who has had this configuration for years means the file.
            _ if Path::new(&word).exists() => {
                return Err(self.device_error(format!(
                    "{word:?} means a store in memory, and there is a file of this name here; write \
                     ./{word} for the file, or start the daemon elsewhere"
                )));
            }
            // What of it is written is mapping alone.
            Medium::Null => sealed_memory(size, MFdFlags::empty()),
            Medium::Memory => huge_memory(size)
                .inspect(|_| tracing::info!("the store takes {} of huge pages", size.human()))
                .or_else(|_| reserved_memory(size)),
        };
        let memory = made.map_err(|error| {
            self.device_error(format!(
                "no memory for a store of {}: {error}; choose a smaller store.size",
                size.human()
            ))
        })?;
        self.store.device = PathBuf::from(format!("/proc/self/fd/{}", memory.as_raw_fd()));
        Ok(Some(memory))
    }

    /// Checks device and cores against this machine. Changes nothing.
    pub(crate) fn check_machine(&self) -> Result<(), ConfigError> {
        self.check_device()?;
        self.check_places()?;
        self.check_cores()
    }

    /// Checks that every address to listen on is free. Changes nothing.
    pub(crate) fn check_sockets(&self) -> Result<(), ConfigError> {
        let api = [Key("api"), Key("socket")];
        self.check_socket(&self.api.socket, &api)?;
        for (index, volume) in self.volumes.iter().enumerate() {
            let path = [Key("volumes"), Index(index), Key("socket")];
            self.check_socket(&volume.socket, &path)?;
        }
        if let Some(listen) = self.api.listen {
            TcpListener::bind(listen).map_err(|error| {
                let message = format!("cannot listen on {listen}: {error}; choose another address");
                self.error(&[Key("api"), Key("listen")], message)
            })?;
        }
        Ok(())
    }

    fn check_device(&self) -> Result<(), ConfigError> {
        let device = &self.store.device;
        match std::fs::metadata(device) {
            Ok(metadata) => {
                let kind = metadata.file_type();
                if kind.is_file() || kind.is_block_device() {
                    return Ok(());
                }
                let name = device.display();
                Err(self.device_error(format!(
                    "{name} is neither a file nor a block device; name one of these"
                )))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                self.check_device_can_be_made()
            }
            Err(error) => Err(self.device_error(format!(
                "cannot look at {}: {error}; check its permissions",
                device.display()
            ))),
        }
    }

    fn check_device_can_be_made(&self) -> Result<(), ConfigError> {
        let device = self.store.device.display();
        if let Ok(target) = std::fs::read_link(&self.store.device) {
            return Err(self.device_error(format!(
                "{device} is a symbolic link to {}, which is not there; correct the link",
                target.display()
            )));
        }
        if self.store.size.is_none() {
            return Err(self.device_error(format!(
                "{device} does not exist; add store.size and it is created, or correct the path"
            )));
        }
        let parent = parent_of(&self.store.device);
        if !parent.is_dir() {
            return Err(self.device_error(format!(
                "{device} cannot be created: {parent} is no directory; try `mkdir -p {parent}`",
                parent = parent.display()
            )));
        }
        Ok(())
    }

    /// No two of store, API and volumes in one place, however they are spelt.
    fn check_places(&self) -> Result<(), ConfigError> {
        let api = (&self.api.socket, vec![Key("api"), Key("socket")]);
        let volumes = self.volumes.iter().enumerate().map(|(index, volume)| {
            (&volume.socket, vec![Key("volumes"), Index(index), Key("socket")])
        });
        let mut taken = Vec::new();
        for (socket, path) in std::iter::once(api).chain(volumes) {
            let name = socket.display();
            if places::is_store(socket, &self.store.device) {
                let message = format!("socket {name} is where the store is; choose another");
                return Err(self.error(&path, message));
            }
            let place = places::normal(socket);
            if taken.contains(&place) {
                let message = format!("socket {name} is given twice; choose another");
                return Err(self.error(&path, message));
            }
            taken.push(place);
        }
        Ok(())
    }

    fn check_cores(&self) -> Result<(), ConfigError> {
        let present = usable_cores();
        let Some(cores) = &self.reactors.cores else { return Ok(()) };
        for (index, core) in cores.iter().enumerate() {
            if !present.contains(core) {
                return Err(self.error(
                    &[Key("reactors"), Key("cores"), Index(index)],
                    format!("there is no core {core}; choose among {present:?}"),
                ));
            }
        }
        Ok(())
    }

    fn check_socket(&self, socket: &Path, path: &[Step]) -> Result<(), ConfigError> {
        let name = socket.display();
        let parent = parent_of(socket);
        if !parent.is_dir() {
            return Err(self.error(
                path,
                format!(
                    "{name} cannot be made: {parent} is no directory; try `mkdir -p {parent}`",
                    parent = parent.display()
                ),
            ));
        }
        let Ok(metadata) = std::fs::symlink_metadata(socket) else { return Ok(()) };
        if !metadata.file_type().is_socket() {
            return Err(self.error(
                path,
                format!("{name} exists and is no socket; remove it or choose another path"),
            ));
        }
        // A socket nobody listens on is left over from a killed process, and is replaced later.
        if UnixStream::connect(socket).is_ok() {
            return Err(self.error(
                path,
                format!("{name} is in use; stop the process that listens there or choose another"),
            ));
        }
        Ok(())
    }
}

fn checked_store(raw: RawStore, source: &Source) -> Result<StoreConfig, ConfigError> {
    let size = raw.size.map(|size| size.0);
    if let Some(size) = size
        && size < STORE_SIZE_MIN
    {
        return Err(source.error(
            &[Key("store"), Key("size")],
            format!("a store of {} is too small; give it at least 4MiB", size.exact()),
        ));
    }
    if let Some(size) = size
        && size > STORE_SIZE_MAX
    {
        return Err(source.error(
            &[Key("store"), Key("size")],
            format!("a store of {} is too large; give it at most 64PiB", size.exact()),
        ));
    }
    let node_cache = raw.node_cache.map_or(ByteCount::new(64 << 20), |size| size.0);
    if !(NODE_CACHE_MIN..=NODE_CACHE_MAX).contains(&node_cache) {
        return Err(source.error(
            &[Key("store"), Key("node_cache")],
            format!("a node cache of {} will not do; give 1MiB to 1TiB", node_cache.human()),
        ));
    }
    if raw.device.as_os_str().is_empty() {
        return Err(source.error(
            &[Key("store"), Key("device")],
            "the device is empty; name a block device or a file",
        ));
    }
    let medium = Medium::of(&raw.device);
    if medium != Medium::Device && size.is_none() {
        let word = raw.device.display();
        return Err(source.error(
            &[Key("store"), Key("device")],
            format!(
                "a store in memory needs a size: add store.size (for a file of this name write \
                 ./{word})"
            ),
        ));
    }
    let RawStore { device, io_poll, .. } = raw;
    Ok(StoreConfig { device, medium, size, node_cache, io_poll })
}

/// Sealed memory of huge pages, if so many are set aside: the processor looks them up 512 times less often.
fn huge_memory(size: ByteCount) -> std::io::Result<File> {
    const HUGE_PAGE: u64 = 2 << 20;
    let whole = ByteCount::new(size.get().next_multiple_of(HUGE_PAGE));
    let memory = sealed_memory(whole, MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB)?;
    reserve(memory, whole)
}

/// Sealed memory whose pages are there: a store that runs out of them ends the daemon.
fn reserved_memory(size: ByteCount) -> std::io::Result<File> {
    // The system would take what others have before it said no.
    if let Some(available) = available_memory()
        && size > available
    {
        return Err(std::io::Error::other(format!("the machine has {} left", available.human())));
    }
    reserve(sealed_memory(size, MFdFlags::empty())?, size)
}

/// What the system could give without taking it from anybody, within our control groups' limits; `None` if
/// it does not say.
fn available_memory() -> Option<ByteCount> {
    let said = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = said.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let ours = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let number = |path: PathBuf| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let left = Path::new("/sys/fs/cgroup").join(ours);
    let left = left.ancestors().filter_map(|group| {
        // "max" is no number, and no limit.
        let (most, taken) =
            (number(group.join("memory.max"))?, number(group.join("memory.current"))?);
        Some(most.saturating_sub(taken))
    });
    left.chain([kilobytes * 1024]).min().map(ByteCount::new)
}

fn reserve(memory: File, size: ByteCount) -> std::io::Result<File> {
    let bytes = i64::try_from(size.get()).map_err(|_| std::io::ErrorKind::OutOfMemory)?;
    fallocate(&memory, FallocateFlags::empty(), 0, bytes)?;
    Ok(memory)
}

/// Memory that stays as large as it is, since what is mapped must not go away.
fn sealed_memory(size: ByteCount, flags: MFdFlags) -> std::io::Result<File> {
    let flags = flags | MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let memory = File::from(memfd_create("bessel-store", flags)?);
    memory.set_len(size.get())?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&memory, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(memory)
}

fn checked_reactors(raw: RawReactors, source: &Source) -> Result<ReactorsConfig, ConfigError> {
    let path = [Key("reactors"), Key("cores")];
    if let Some(cores) = &raw.cores {
        if cores.is_empty() {
            return Err(source.error(&path, "no core is given; name at least one, as in [0]"));
        }
        for (index, core) in cores.iter().enumerate() {
            if cores[..index].contains(core) {
                return Err(source.error(
                    &[path[0], path[1], Index(index)],
                    format!("core {core} is given twice; a core runs one reactor"),
                ));
            }
        }
    }
    let RawReactors { cores, poll, balance, spread, pin_guest_memory } = raw;
    Ok(ReactorsConfig { cores, poll, balance, spread, pin_guest_memory })
}

fn checked_api(raw: RawApi, source: &Source) -> Result<ApiConfig, ConfigError> {
    let socket = raw.socket.unwrap_or_else(|| PathBuf::from("/run/bessel/api.sock"));
    check_socket_length(&socket, &[Key("api"), Key("socket")], source)?;
    let listen = match raw.listen {
        None => None,
        Some(text) => Some(text.parse().map_err(|_| {
            source.error(
                &[Key("api"), Key("listen")],
                format!("{text:?} is no address; write one like 127.0.0.1:9400"),
            )
        })?),
    };
    Ok(ApiConfig { socket, listen })
}

fn checked_gc(raw: RawGc, source: &Source) -> Result<GcConfig, ConfigError> {
    let error = |key, message: String| Err(source.error(&[Key("gc"), Key(key)], message));
    let every = raw.every.map(|every| every.0);
    if every.is_some_and(|every| every < GC_EVERY_MIN) {
        return error(
            "every",
            "a collection more than once a second will not do; give at least 1s".to_owned(),
        );
    }
    let low_space_percent = match raw.low_space.as_deref() {
        None => Some(GC_LOW_SPACE_DEFAULT),
        Some("off") => None,
        Some(text) => {
            let percent = text.strip_suffix('%').and_then(|digits| digits.parse().ok());
            match percent.filter(|percent| (1..=GC_LOW_SPACE_MAX).contains(percent)) {
                Some(percent) => Some(percent),
                None => {
                    let what =
                        format!("{text:?} is no share of the store; write 1% to 90%, or off");
                    return error("low_space", what);
                }
            }
        }
    };
    let rate = raw.rate.map_or(Some(GC_RATE_DEFAULT), |rate| rate.0);
    if let Some(rate) = rate.filter(|rate| *rate < GC_RATE_MIN) {
        let what = format!("a rate of {} a second will not do; give at least 1MiB", rate.exact());
        return error("rate", what);
    }
    Ok(GcConfig { every, low_space_percent, rate })
}

fn check_socket_length(socket: &Path, path: &[Step], source: &Source) -> Result<(), ConfigError> {
    let length = socket.as_os_str().len();
    if (1..=SOCKET_PATH_MAX).contains(&length) {
        return Ok(());
    }
    let what = if length == 0 {
        "the socket path is empty; name a file".to_owned()
    } else {
        format!("the socket path has {length} bytes; Unix sockets allow {SOCKET_PATH_MAX}")
            + ", choose a shorter directory"
    };
    Err(source.error(path, what))
}

fn checked_volumes(
    raw: Vec<RawVolume>,
    api: &ApiConfig,
    source: &Source,
) -> Result<Vec<VolumeConfig>, ConfigError> {
    let mut volumes: Vec<VolumeConfig> = Vec::with_capacity(raw.len());
    for (index, raw) in raw.into_iter().enumerate() {
        let at = |key| [Key("volumes"), Index(index), Key(key)];
        reference::volume_name(&raw.name)
            .map_err(|error| source.error(&at("name"), error.to_string()))?;
        if volumes.iter().any(|other| other.name == raw.name) {
            let message = format!("volume {:?} is given twice; rename or remove one", raw.name);
            return Err(source.error(&at("name"), message));
        }
        check_volume_size(raw.size.0).map_err(|what| source.error(&at("size"), what))?;
        let queues = raw.queues.unwrap_or(QUEUES_DEFAULT);
        if !(1..=QUEUES_MAX).contains(&queues) {
            let message = format!("{queues} queues will not do; give 1 to {QUEUES_MAX}");
            return Err(source.error(&at("queues"), message));
        }
        let socket =
            raw.socket.unwrap_or_else(|| parent_of(&api.socket).join(format!("{}.sock", raw.name)));
        check_socket_length(&socket, &at("socket"), source)?;
        let taken = socket == api.socket || volumes.iter().any(|other| other.socket == socket);
        if taken {
            let message = format!("socket {} is given twice; choose another", socket.display());
            return Err(source.error(&at("socket"), message));
        }
        let snapshots = raw.snapshots.map(|raw| Schedule { every: raw.every.0, keep: raw.keep.0 });
        if let Some(Err(error)) = snapshots.as_ref().map(Schedule::check) {
            return Err(source.error(&at("snapshots"), error.to_string()));
        }
        let limits = raw.limits.map(|raw| Limits {
            iops: raw.iops,
            bandwidth: raw.bandwidth.map(|size| size.0),
            burst: raw.burst.map_or(BURST_DEFAULT, |span| span.0),
        });
        if let Some(Err(error)) = limits.as_ref().map(Limits::check) {
            return Err(source.error(&at("limits"), error.to_string()));
        }
        volumes.push(VolumeConfig {
            name: raw.name,
            size: raw.size.0,
            socket,
            cache: raw.cache,
            queues,
            snapshots,
            limits,
        });
    }
    Ok(volumes)
}

/// `.` for a bare file name, whose parent would be the empty path.
pub(crate) fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn check_volume_size(size: ByteCount) -> Result<(), String> {
    if !size.get().is_multiple_of(SECTOR_SIZE) {
        return Err(format!("a size of {size} bytes is no multiple of 512; round it up"));
    }
    if !(VOLUME_SIZE_MIN..=VOLUME_SIZE_MAX).contains(&size) {
        return Err(format!("a volume of {} will not do; give 4KiB to 256TiB", size.exact()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    const WHOLE: &str = "\
store:
  device: /var/lib/bessel/store.img
  size: 8GiB
  node_cache: 64MiB
reactors:
  cores: [0, 1]
  poll: adaptive
api:
  socket: /run/bessel/api.sock
  listen: 127.0.0.1:9400
volumes:
  - name: vm1
    size: 4GiB
    socket: /run/bessel/vm1.sock
    cache: writethrough
    queues: 2
    snapshots: { every: 1s, keep: 60 }
  - name: vm2
    size: 4294967296
    snapshots:
      every: 10ms
      keep: [ { for: 1m }, { for: 1h, every: 1s } ]
    limits: { iops: 5000, bandwidth: 100MiB, burst: 2s }
gc: { every: 1d, low_space: 5%, rate: 64MiB }
";

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("bessel.yaml"), text.to_owned())
    }

    /// `WHOLE` with one line changed.
    fn refusal(line: usize, replacement: &str) -> String {
        let mut lines: Vec<&str> = WHOLE.lines().collect();
        lines[line - 1] = replacement;
        parse(&lines.join("\n")).expect_err(replacement).to_string()
    }

    #[test]
    fn every_key_is_read() {
        let config = parse(WHOLE).unwrap();
        assert_eq!(config.store.device, Path::new("/var/lib/bessel/store.img"));
        assert_eq!(config.store.size, Some(ByteCount::new(8 << 30)));
        assert_eq!(config.store.node_cache, ByteCount::new(64 << 20));
        assert_eq!(config.store.io_poll, IoPoll::On);
        let off = WHOLE.replace("  node_cache:", "  io_poll: off\n  node_cache:");
        assert_eq!(parse(&off).unwrap().store.io_poll, IoPoll::Off);
        assert_eq!(config.reactors.cores.as_deref(), Some(&[0, 1][..]));
        assert_eq!(config.reactors.poll, Poll::Adaptive);
        let sparing = WHOLE.replace("poll: adaptive", "poll: sparing");
        assert_eq!(parse(&sparing).unwrap().reactors.poll, Poll::Sparing);
        assert!(!config.reactors.pin_guest_memory);
        assert_eq!(config.reactors.balance, Balance::On);
        assert_eq!(config.reactors.spread, Spread::On);
        let off = WHOLE.replace("poll: adaptive", "spread: off");
        assert_eq!(parse(&off).unwrap().reactors.spread, Spread::Off);
        let off = WHOLE.replace("poll: adaptive", "balance: off");
        assert_eq!(parse(&off).unwrap().reactors.balance, Balance::Off);
        assert_eq!(config.api.socket, Path::new("/run/bessel/api.sock"));
        assert_eq!(config.api.listen, Some("127.0.0.1:9400".parse().unwrap()));
        let gc = GcConfig {
            every: Some(Duration::from_secs(86_400)),
            low_space_percent: Some(5),
            rate: Some(ByteCount::new(64 << 20)),
        };
        assert_eq!(config.gc, gc);
        let [vm1, vm2] = &config.volumes[..] else { panic!("two volumes") };
        assert_eq!((vm1.name.as_str(), vm1.size, vm1.queues), ("vm1", ByteCount::new(4 << 30), 2));
        assert_eq!(vm1.cache, Cache::Writethrough);
        assert_eq!((vm2.size, vm2.queues), (vm1.size, QUEUES_DEFAULT));
        let every = Duration::from_secs(1);
        let burst = Duration::from_secs(2);
        let (iops, bandwidth) = (Some(5000), Some(ByteCount::new(100 << 20)));
        assert_eq!((vm1.limits, vm2.limits), (None, Some(Limits { iops, bandwidth, burst })));
        assert_eq!(vm1.snapshots, Some(Schedule { every, keep: Keep::Newest(60) }));
        let by_age = parse_keep("1m, 1h every 1s").unwrap();
        assert_eq!(vm2.snapshots.as_ref().map(|it| &it.keep), Some(&by_age));
        assert_eq!(vm2.cache, Cache::Writeback);
        assert_eq!(vm2.socket, Path::new("/run/bessel/vm2.sock"));
    }

    #[test]
    fn a_store_alone_is_a_configuration() {
        let config = parse("store: { device: /dev/sdb }").unwrap();
        assert_eq!(config.api.socket, Path::new("/run/bessel/api.sock"));
        assert_eq!(config.store.node_cache, ByteCount::new(64 << 20));
        assert!(config.volumes.is_empty() && config.reactors.cores.is_none());
        assert_eq!(config.gc, GcConfig::default());
        let off = parse("store: { device: /dev/sdb }\ngc: { low_space: off, rate: unlimited }");
        let nothing = GcConfig { every: None, low_space_percent: None, rate: None };
        assert_eq!(off.unwrap().gc, nothing);
    }

    #[test]
    fn a_store_in_memory_needs_a_size_and_gets_memory_of_it() {
        for (word, written) in [("memory", "memory"), ("null", "'null'")] {
            let error = parse(&format!("store: {{ device: {written} }}")).unwrap_err().to_string();
            assert!(
                error.contains("store.size") && error.contains(&format!("./{word}")),
                "{error}"
            );
            let text = format!("store: {{ device: {written}, size: 8MiB }}");
            let mut config = parse(&text).unwrap();
            assert_eq!(config.store_name(), word);
            let memory = config.make_memory().unwrap().unwrap();
            assert_eq!(memory.metadata().unwrap().len(), 8 << 20);
            let there = memory.metadata().unwrap().blocks() * 512;
            assert_eq!(
                there,
                if word == "memory" { 8 << 20 } else { 0 },
                "pages that are reserved"
            );
            assert_eq!(config.store_name(), word);
            assert!(config.store.device.exists());
        }
        let mut file = parse("store: { device: ./memory, size: 8MiB }").unwrap();
        assert_eq!(file.store_name(), "./memory");
        assert!(file.make_memory().unwrap().is_none());
    }

    #[test]
    fn a_store_in_memory_that_the_machine_does_not_have_is_refused_at_the_start() {
        let mut config = parse("store: { device: memory, size: 1PiB }").unwrap();
        let error = config.make_memory().unwrap_err().to_string();
        assert!(error.contains("store.size") && error.contains("bessel.yaml:1"), "{error}");
    }

    #[test]
    fn a_bare_null_drops_nobodys_data() {
        for text in ["store: { device: null, size: 8MiB }", "store: { device: , size: 8MiB }"] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains("no device is named") && error.contains("quotes"), "{error}");
        }
        assert!(parse("store: { size: 8MiB }").unwrap_err().to_string().contains("device"));
    }

    #[test]
    fn the_examples_that_are_shipped_are_read() {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
        let mut count = 0;
        for entry in std::fs::read_dir(examples).unwrap() {
            let file = entry.unwrap().path();
            if file.extension().is_some_and(|extension| extension == "yaml") {
                let config = Config::read(&file).unwrap_or_else(|error| panic!("{error}"));
                assert!(!config.volumes.is_empty(), "{}", file.display());
                count += 1;
            }
        }
        assert!(count > 0, "there are no examples");
    }

    #[test]
    fn each_mistake_is_one_line_that_names_file_line_and_remedy() {
        let long = format!("    socket: /run/{}", "x".repeat(103));
        for (line, replacement, message) in [
            (3, "  sise: 8GiB", "store: unknown field `sise`, expected one of `device`, `size`"),
            (3, "  size: 8GB", "\"8GB\" is not a size; write 4GiB"),
            (3, "  size: 1MiB", "a store of 1MiB is too small; give it at least 4MiB"),
            (3, "  size: 65PiB", "a store of 65PiB is too large; give it at most 64PiB"),
            (4, "  node_cache: 4KiB", "a node cache of 4KiB will not do; give 1MiB to 1TiB"),
            (6, "  cores: []", "no core is given; name at least one"),
            (6, "  cores: [0, 0]", "core 0 is given twice; a core runs one reactor"),
            (6, "  cores: [-1]", "reactors.cores[0]: invalid type: integer `-1`"),
            (
                7,
                "  poll: sometimes",
                "unknown variant `sometimes`, expected one of `adaptive`, `sparing`, `busy`",
            ),
            (7, "  balance: no", "unknown variant `no`, expected `on` or `off`"),
            (10, "  listen: here", "\"here\" is no address; write one like 127.0.0.1:9400"),
            (12, "  - name: ../etc", "volume name \"../etc\" contains '/'; allowed are"),
            (12, "  - name: vm2", "volume \"vm2\" is given twice; rename or remove one"),
            (13, "    size: 1000", "a size of 1000 bytes is no multiple of 512; round it up"),
            (13, "    size: 512TiB", "a volume of 512TiB will not do; give 4KiB to 256TiB"),
            (13, "    size: 99999PiB", "is larger than any device can be; write at most 64PiB"),
            (14, "    socket: /run/bessel/api.sock", "socket /run/bessel/api.sock is given twice"),
            (14, "    socket: /run/bessel/vm2.sock", "socket /run/bessel/vm2.sock is given twice"),
            (14, &long, "has 108 bytes; Unix sockets allow 107, choose a shorter directory"),
            (15, "    cache: none", "unknown variant `none`"),
            (16, "    queues: 0", "0 queues will not do; give 1 to 64"),
            (16, "    queues: 65", "65 queues will not do; give 1 to 64"),
            (17, "    snapshot: { every: 1s, keep: 60 }", "unknown field `snapshot`"),
            (17, "    snapshots: { every: 1s }", "missing field `keep`"),
            (17, "    snapshots: { every: 1, keep: 60 }", "\"1\" is not a span of time; write"),
            (17, "    snapshots: { every: 0ms, keep: 60 }", "0ns will not do; give 1ms to 365d"),
            (17, "    snapshots: { every: 1s, keep: 0 }", "keeping no snapshot will not do; give"),
            (17, "    snapshots: { every: 1s, keep: some }", "\"some\" does not say which"),
            (17, "    snapshots: { every: 1s, keep: -1 }", "invalid type: integer `-1`"),
            (17, "    snapshots: { every: 1s, keep: [] }", "0 ages to keep will not do; give 1"),
            (17, "    snapshots: { every: 1s, keep: [ { every: 1s } ] }", "missing field `for`"),
            (
                17,
                "    snapshots: { every: 1s, keep: [ { for: 1m }, { for: 1s } ] }",
                "go from young",
            ),
            (23, "    limits: { burst: 1s }", "neither iops nor bandwidth is given; give one"),
            (23, "    limits: { iops: 0 }", "0 requests a second will not do; give 1 to"),
            (23, "    limits: { iops: many }", "invalid type: string \"many\""),
            (
                23,
                "    limits: { bandwidth: 1KiB }",
                "1KiB a second will not do; give 64KiB to 1TiB",
            ),
            (23, "    limits: { bandwidth: 1GB }", "\"1GB\" is not a size; write"),
            (
                23,
                "    limits: { iops: 1, burst: 2h }",
                "a burst of 7200s will not do; give 1ms to 1h",
            ),
            (23, "    limits: { iops: 1, bps: 1 }", "unknown field `bps`"),
            (24, "gc: { every: 10ms }", "a collection more than once a second will not do; give"),
            (24, "gc: { low_space: 95% }", "\"95%\" is no share of the store; write 1% to 90%"),
            (24, "gc: { low_space: few }", "\"few\" is no share of the store; write 1% to 90%"),
            (24, "gc: { rate: 1KiB }", "a rate of 1KiB a second will not do; give at least 1MiB"),
            (24, "gc: { rate: some }", "\"some\" is not a size; write"),
            (24, "gc: { sometimes: 1d }", "gc: unknown field `sometimes`, expected one of"),
            (16, "    queues: [2]", "volumes[0].queues: invalid type: sequence"),
            (16, "   queues: 2", "did not find expected"),
        ] {
            let error = refusal(line, replacement);
            // The second of two equal values is the one to blame.
            let blamed = match replacement.trim_start() {
                "- name: vm2" => 18,
                "socket: /run/bessel/vm2.sock" => 18,
                _ => line,
            };
            assert!(error.starts_with(&format!("bessel.yaml:{blamed}: ")), "{error}");
            assert!(error.contains(message), "{error}");
            assert!(error.contains("; ") && !error.contains('\n'), "no remedy: {error}");
        }
    }

    #[test]
    fn a_missing_key_is_blamed_on_what_should_hold_it() {
        let error = parse("volumes: []\nstore:\n  size: 1GiB\n").unwrap_err().to_string();
        assert!(error.starts_with("bessel.yaml:3: store: missing field `device`; "), "{error}");
        let error = parse("").unwrap_err().to_string();
        assert!(error.starts_with("bessel.yaml:1: "), "{error}");
    }

    /// A configuration over a fresh directory, which is removed with the guard.
    fn machine(tag: &str, change: impl Fn(&Path, String) -> String) -> (String, PathBuf) {
        let name = format!("bessel-config-{}-{tag}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&directory).unwrap();
        let text = format!(
            "store:\n  device: {0}/store.img\n  size: 1GiB\nreactors:\n  cores: [{1}]\napi:\n  \
             socket: {0}/api.sock\nvolumes:\n  - name: a\n    size: 1GiB\n    \
             socket: {0}/a.sock\n",
            directory.display(),
            usable_cores()[0],
        );
        let text = change(&directory, text);
        let checked = parse(&text).and_then(|config| {
            config.check_machine()?;
            config.check_sockets()
        });
        (checked.map_or_else(|error| error.to_string(), |()| "accepted".to_owned()), directory)
    }

    #[test]
    fn what_this_machine_lacks_is_refused_and_nothing_is_touched() {
        type Change = fn(&Path, String) -> String;
        let cases: [(&str, Change, &str); 13] = [
            ("fine", |_, text| text, "accepted"),
            (
                "on-store",
                |_, text| text.replace("/a.sock", "/store.img"),
                "bessel.yaml:11: socket ",
            ),
            (
                "api-on-store",
                |_, text| text.replace("/api.sock", "/./store.img"),
                "bessel.yaml:7: socket ",
            ),
            (
                "dangling",
                |directory, text| {
                    std::os::unix::fs::symlink("nowhere", directory.join("link")).unwrap();
                    text.replace("/store.img", "/link")
                },
                "bessel.yaml:2: ",
            ),
            (
                "two-spellings",
                |directory, text| {
                    let same = format!("/../{}/api.sock", directory.file_name().unwrap().display());
                    text.replace("/a.sock", &same)
                },
                "bessel.yaml:11: socket ",
            ),
            (
                "linked-store",
                |directory, text| {
                    std::os::unix::fs::symlink("a.sock", directory.join("link")).unwrap();
                    std::fs::write(directory.join("a.sock"), "").unwrap();
                    text.replace("/store.img", "/link")
                },
                "bessel.yaml:11: socket ",
            ),
            (
                "no-size",
                |_, text| text.replace("\n  size: 1GiB", "\n  node_cache: 1MiB"),
                "bessel.yaml:2: ",
            ),
            ("no-parent", |_, text| text.replace("/store.img", "/no/store.img"), "bessel.yaml:2: "),
            ("no-core", |_, text| text.replace("cores: [", "cores: [9999, "), "bessel.yaml:5: "),
            ("no-dir", |_, text| text.replace("/api.sock", "/no/api.sock"), "bessel.yaml:7: "),
            ("device-dir", |_, text| text.replace("/store.img", ""), "bessel.yaml:2: "),
            (
                "not-a-socket",
                |directory, text| {
                    std::fs::write(directory.join("a.sock"), "").unwrap();
                    text
                },
                "bessel.yaml:11: ",
            ),
            (
                "stale-socket",
                |directory, text| {
                    drop(std::os::unix::net::UnixListener::bind(directory.join("a.sock")).unwrap());
                    text
                },
                "accepted",
            ),
        ];
        for (tag, change, expected) in cases {
            let (outcome, directory) = machine(tag, change);
            assert!(outcome.starts_with(expected), "{tag}: {outcome}");
            assert!(outcome == "accepted" || outcome.contains("; "), "{tag}: no remedy: {outcome}");
            assert!(!directory.join("store.img").exists(), "{tag}");
            std::fs::remove_dir_all(&directory).unwrap();
        }
    }

    #[test]
    fn a_socket_that_somebody_listens_on_is_in_use() {
        let mut listeners = Vec::new();
        let listeners = std::cell::RefCell::new(&mut listeners);
        let (outcome, directory) = machine("live-socket", |directory, text| {
            let path = directory.join("a.sock");
            listeners.borrow_mut().push(std::os::unix::net::UnixListener::bind(path).unwrap());
            text
        });
        assert!(outcome.starts_with("bessel.yaml:11: "), "{outcome}");
        assert!(outcome.contains("is in use; stop the process"), "{outcome}");
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = Config::read(Path::new("/no/such.yaml")).unwrap_err().to_string();
        assert!(error.starts_with("/no/such.yaml: cannot be read: "), "{error}");
    }
}
