//! A volume's socket and the thread behind it.
//!
//! One front-end at a time: another that connects waits in the backlog until the first has gone.
//! A front-end's errors end its connection with one log line and never the thread.
//!
//! The socket file is ours from bind to drop. A file left behind by a killed daemon is replaced; one
//! that somebody listens on is not. Its owner and group may connect, whatever the umask: a front-end
//! runs as a user of its own, and who shares a group with us is the operator's choice.

#![forbid(unsafe_code)]

use std::fmt;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use bessel_reactor::units::Sector;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};

use crate::connection::{ConnectionError, Event, FrontEnd};
use crate::disk::{Disk, DiskInfo};
use crate::fds;
use crate::host::{Connection, QueueHost};
use crate::log_limit::{Due, LogLimit};
use crate::messages::{self, Header, Reply};
use crate::session::{Session, SessionError};

/// Longest socket path in bytes: `sockaddr_un` has 108 with the closing zero.
const PATH_MAX: usize = 107;
/// Wait before accepting again when the process is out of descriptors or memory.
const ACCEPT_PAUSE_MS: u16 = 100;
/// Mode of the socket file.
const SOCKET_MODE: u32 = 0o660;
/// Front-ends that may wait for the one before them to go.
const BACKLOG: i32 = 128;
/// Failed connections that are all logged; after them only the 16th, 32nd, 64th ... are.
const FAILURES_LOGGED: u64 = 8;

/// Why a socket cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// The path does not fit a socket address.
    #[error("socket path {path} has {length} bytes, more than {PATH_MAX}; choose a shorter one")]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// Another process listens there.
    #[error("socket {0} is in use by another process; stop it or choose another path")]
    InUse(PathBuf),
    /// Something that is no socket has the name.
    #[error("{0} exists and is no socket; remove it or choose another path")]
    NotASocket(PathBuf),
    /// The operating system refused.
    #[error("cannot listen on {path}; does the directory exist and may we write to it?")]
    Os {
        /// The path.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

/// A volume's socket, bound and not yet served.
pub struct Server {
    listener: UnixListener,
    socket: SocketFile,
    disk: Arc<Disk>,
    host: Arc<dyn QueueHost>,
    shared: Arc<Shared>,
}

/// What the thread and its handle both hold.
#[derive(Debug)]
struct Shared {
    stop: OwnedFd,
    news: Arc<OwnedFd>,
    connected: AtomicBool,
}

/// Removes the socket file when dropped, if it is still the one that was bound.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).ok() == Some(self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Server {
    /// Listens on `path` for front-ends of `disk`, whose queues go to `host`.
    ///
    /// # Errors
    /// See [`BindError`]; nothing was touched then, except a stale socket file.
    ///
    /// # Panics
    /// When a field of `disk` is outside its documented range.
    pub fn bind(path: &Path, disk: DiskInfo, host: Arc<dyn QueueHost>) -> Result<Self, BindError> {
        let length = path.as_os_str().len();
        if length > PATH_MAX {
            return Err(BindError::TooLong { path: path.into(), length });
        }
        let os = |source| BindError::Os { path: path.into(), source };
        clear_stale(path)?;
        let (listener, socket) = listen(path).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => BindError::InUse(path.into()),
            _ => os(error),
        })?;
        listener.set_nonblocking(true).map_err(os)?;
        let shared = Shared {
            stop: fds::eventfd().map_err(os)?.into(),
            news: Arc::new(fds::eventfd().map_err(os)?.into()),
            connected: AtomicBool::new(false),
        };
        let disk = Arc::new(Disk::new(disk));
        Ok(Self { listener, socket, disk, host, shared: Arc::new(shared) })
    }

    /// Serves on a thread of its own until [`ServerHandle::stop`].
    ///
    /// # Errors
    /// When the thread or its descriptors cannot be made.
    pub fn spawn(self) -> io::Result<ServerHandle> {
        let (disk, shared) = (self.disk.clone(), self.shared.clone());
        let path = self.socket.path.clone();
        let session = Session::new(self.disk.clone(), self.host.clone(), self.shared.news.clone())?;
        let thread = std::thread::Builder::new()
            .name(format!("vhost-{}", self.disk.info.id))
            .spawn(move || self.serve(session))?;
        Ok(ServerHandle { thread: Some(thread), disk, shared, path })
    }

    fn serve(self, mut session: Session) {
        let volume = self.disk.info.id.clone();
        let mut failures = 0u64;
        let (mut arrivals, mut departures) = (LogLimit::start(), LogLimit::start());
        while let Some(stream) = self.accept() {
            self.shared.connected.store(true, Ordering::Release);
            let ended = self.serve_connection(stream, &mut session, &mut arrivals);
            session.close();
            self.host.disconnected();
            self.shared.connected.store(false, Ordering::Release);
            match ended {
                Ok(Ended::Stopped) | Err(ServeError::Connection(ConnectionError::Stopping)) => {
                    break;
                }
                Ok(Ended::Closed) => {
                    if let Some(Due { suppressed }) = departures.due() {
                        tracing::info!(%volume, suppressed, "front-end disconnected");
                    }
                }
                Err(error) => {
                    failures += 1;
                    if failures <= FAILURES_LOGGED || failures.is_power_of_two() {
                        let error = &error as &dyn std::error::Error;
                        tracing::warn!(%volume, error, failures, "front-end dropped");
                    }
                }
            }
        }
        tracing::debug!(%volume, "socket closed");
    }

    /// The next front-end; `None` when told to stop.
    fn accept(&self) -> Option<UnixStream> {
        loop {
            let mut waits = [
                PollFd::new(self.shared.stop.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            ];
            if poll(&mut waits, PollTimeout::NONE).is_err() {
                continue; // Interrupted; nothing else can go wrong with these descriptors.
            }
            if waits[0].any() == Some(true) {
                return None;
            }
            match self.listener.accept() {
                Ok((stream, _)) => return Some(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    let volume = &self.disk.info.id;
                    tracing::warn!(%volume, %error, "cannot accept a front-end; trying again");
                    let mut stop = [PollFd::new(self.shared.stop.as_fd(), PollFlags::POLLIN)];
                    let _ = poll(&mut stop, PollTimeout::from(ACCEPT_PAUSE_MS));
                }
            }
        }
    }

    fn serve_connection(
        &self,
        stream: UnixStream,
        session: &mut Session,
        arrivals: &mut LogLimit,
    ) -> Result<Ended, ServeError> {
        let (stop, news) = (self.shared.stop.as_fd(), self.shared.news.as_fd());
        let mut front_end = FrontEnd::new(stream, stop, news).map_err(ConnectionError::Io)?;
        let connection = Connection { pid: front_end.pid() };
        if let Some(Due { suppressed }) = arrivals.due() {
            let (volume, pid) = (&self.disk.info.id, connection.pid);
            tracing::info!(%volume, pid, suppressed, "front-end connected");
        }
        self.host.connected(connection);
        loop {
            match front_end.next()? {
                Event::Message { header, payload, files } => {
                    let message = messages::decode(header.request, &payload, files);
                    let message = message.map_err(ConnectionError::Message)?;
                    let result = session.handle(message);
                    answer(&front_end, header, session.reply_ack(), result)?;
                }
                Event::News => session.take_news(),
                Event::Stop => return Ok(Ended::Stopped),
                Event::Closed => return Ok(Ended::Closed),
            }
        }
    }
}

/// Sends what a message is owed: its own reply, or an acknowledgement if it asks for one.
fn answer(
    front_end: &FrontEnd<'_>,
    header: Header,
    reply_ack: bool,
    result: Result<Option<Reply>, SessionError>,
) -> Result<(), ServeError> {
    let reply = match &result {
        Ok(None) => Some(Reply::U64(0)).filter(|_| reply_ack && header.need_reply),
        Err(_) => Some(Reply::U64(1)).filter(|_| reply_ack && header.need_reply),
        Ok(Some(_)) => None,
    };
    let reply = match result {
        Ok(own) => own.or(reply),
        Err(error) => {
            if let Some(refusal) = reply {
                let (bytes, file) = messages::encode(header.request, refusal);
                // The error itself is what counts; the front-end may be gone already.
                let _ = front_end.send(&bytes, file);
            }
            return Err(error.into());
        }
    };
    if let Some(reply) = reply {
        let (bytes, file) = messages::encode(header.request, reply);
        front_end.send(&bytes, file)?;
    }
    Ok(())
}

/// How a connection ended well.
#[derive(Debug)]
enum Ended {
    Closed,
    Stopped,
}

/// How it ended badly.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error(transparent)]
    Session(#[from] SessionError),
}

/// Listens on a socket that its owner and group may connect to. Nobody can before `listen`, so the
/// mode is right by then.
fn listen(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let listener = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    socket::bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
    let socket = SocketFile { path: path.into(), identity: identity(path)? };
    // The umask has cut the mode that `bind` gave, and is the whole process's. A mode set by path
    // would follow a link that somebody put there meanwhile; one of a descriptor cannot.
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW;
    let file = File::options().read(true).custom_flags(flags.bits()).open(path)?;
    let found = file.metadata()?;
    if (found.dev(), found.ino()) != socket.identity || !found.file_type().is_socket() {
        return Err(io::Error::other("another process has put something else there"));
    }
    let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
    std::fs::set_permissions(itself, Permissions::from_mode(SOCKET_MODE))?;
    socket::listen(&listener, Backlog::new(BACKLOG)?)?;
    Ok((UnixListener::from(listener), socket))
}

/// Makes way for a new socket: removes one that nobody listens on.
fn clear_stale(path: &Path) -> Result<(), BindError> {
    let os = |source| BindError::Os { path: path.into(), source };
    let file = match std::fs::symlink_metadata(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(os(error)),
    };
    if !file.file_type().is_socket() {
        return Err(BindError::NotASocket(path.into()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.raw_os_error() == Some(Errno::ECONNREFUSED as i32) => {
            std::fs::remove_file(path).map_err(os)
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(os(error)),
        // Connected, or its backlog is full: somebody is there.
        _ => Err(BindError::InUse(path.into())),
    }
}

/// A volume being served. Dropping it stops the service.
#[derive(Debug)]
pub struct ServerHandle {
    thread: Option<JoinHandle<()>>,
    disk: Arc<Disk>,
    shared: Arc<Shared>,
    path: PathBuf,
}

impl ServerHandle {
    /// Drops the front-end, waits until its queues are drained, and removes the socket file.
    pub fn stop(mut self) {
        self.stop_and_join();
    }

    /// Whether a front-end is connected.
    pub fn is_connected(&self) -> bool {
        self.shared.connected.load(Ordering::Acquire)
    }

    /// Where the socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Changes the size in 512-byte sectors, and tells the front-end if it wants to know.
    pub fn set_capacity(&self, capacity_sectors: u64) {
        self.disk.set_capacity(Sector::new(capacity_sectors));
        fds::signal(self.shared.news.as_fd());
    }

    /// Tells the front-end, if it wants to know, that the disk is another one under its guest: that its
    /// configuration, unchanged as it may be, is to be read again.
    pub fn notify_changed(&self) {
        self.disk.set_capacity(self.disk.capacity());
        fds::signal(self.shared.news.as_fd());
    }

    fn stop_and_join(&mut self) {
        fds::signal(self.shared.stop.as_fd());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(path = %self.path.display(), "the server thread panicked");
        }
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.stop_and_join();
    }
}
