//! The threads and sockets of the API.
//!
//! One thread with a single-threaded runtime serves all connections; it never touches a reactor
//! itself. Stopping it ends the listeners at once, then waits for answers that are being made, for
//! a bounded time: a client that does not read its answer cannot hold the daemon up.

use super::limit::{self, Limits, PATIENCE};
use super::routes;
use crate::config::ApiConfig;
use crate::control::Control;
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{Mode, fchmod};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::watch;

/// How long answers that are being made when the daemon stops may take to leave.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(2);

/// Most connections at once: of the owner's tools on the Unix socket, of anyone over TCP.
const LIMITS: Limits = Limits { connections: 256, patience: PATIENCE };
const TCP_LIMITS: Limits = Limits { connections: 32, patience: PATIENCE };

/// Why the API cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    #[error("{0} is in use; stop the process that listens there or choose another api.socket")]
    InUse(PathBuf),
    #[error("{0} exists and is no socket; remove it or choose another api.socket")]
    NoSocket(PathBuf),
    #[error("cannot listen on {path}: {source}; check the permissions of its directory")]
    Socket { path: PathBuf, source: io::Error },
    #[error("cannot listen on {address}: {source}; choose another api.listen")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("cannot start the API's thread: {0}")]
    Thread(io::Error),
}

/// A running API. Dropping it stops it.
pub(crate) struct ApiServer {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    socket: PathBuf,
}

impl ApiServer {
    /// Binds the sockets, then serves `control` on a thread of its own.
    ///
    /// # Errors
    /// When a socket is taken or cannot be made. Nothing is left behind then.
    pub(crate) fn start(config: &ApiConfig, control: Control) -> Result<Self, ApiError> {
        let tcp = config.listen.map(bind_tcp).transpose()?;
        let listener = bind(&config.socket)?; // Last, since it leaves a file behind.
        let (stop, stopping) = watch::channel(false);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(ApiError::Thread)?;
        let serve = move || runtime.block_on(serve(listener, tcp, control, stopping));
        let thread = std::thread::Builder::new()
            .name("bessel-api".to_owned())
            .spawn(serve)
            .map_err(ApiError::Thread)?;
        Ok(Self { stop, thread: Some(thread), socket: config.socket.clone() })
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        // The receiver is gone when the thread has ended by itself; there is nobody to tell then.
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the API's thread had panicked");
        }
        // The next daemon replaces a file that stays behind.
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Binds a Unix socket for its owner alone, in the place of one that nobody listens on.
fn bind(path: &Path) -> Result<UnixListener, ApiError> {
    let failed = |source| ApiError::Socket { path: path.to_owned(), source };
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(ApiError::NoSocket(path.to_owned()));
        }
        if UnixStream::connect(path).is_ok() {
            return Err(ApiError::InUse(path.to_owned()));
        }
        std::fs::remove_file(path).map_err(failed)?;
    }
    let listener = bind_for_owner(path).map_err(|error| failed(error.into()))?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

/// Linux gives the file that `bind` makes the mode that the socket has. A mode set afterwards would
/// leave a moment in which anyone can connect, and the umask belongs to the whole process.
fn bind_for_owner(path: &Path) -> nix::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    socket::bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    socket::listen(&socket, Backlog::new(64)?)?;
    Ok(UnixListener::from(socket))
}

fn bind_tcp(address: SocketAddr) -> Result<std::net::TcpListener, ApiError> {
    let failed = |source| ApiError::Listen { address, source };
    let listener = std::net::TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

async fn serve(
    listener: UnixListener,
    tcp: Option<std::net::TcpListener>,
    control: Control,
    mut stopping: watch::Receiver<bool>,
) {
    let main = match tokio::net::UnixListener::from_std(listener) {
        Ok(listener) => {
            let router = routes::router(control.clone());
            limit::serve(listener, router, LIMITS, stopping.clone())
        }
        Err(error) => return tracing::error!("cannot serve the API: {error}"),
    };
    if let Some(tcp) = tcp {
        match tokio::net::TcpListener::from_std(tcp) {
            Ok(tcp) => {
                let router = routes::metrics_router(control);
                tokio::spawn(limit::serve(tcp, router, TCP_LIMITS, stopping.clone()));
            }
            Err(error) => tracing::error!("cannot serve metrics over TCP: {error}"),
        }
    }
    let deadline = async {
        // An error means that the sender is gone, which is a stop as well.
        let _ = stopping.wait_for(|stop| *stop).await;
        tokio::time::sleep(DRAIN_TIME_MAX).await;
    };
    tokio::select! {
        () = main => {}
        () = deadline => tracing::warn!("a client of the API did not take its answer in time"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_socket_is_for_its_owner_and_replaces_only_what_nobody_uses() {
        let name = format!("bessel-api-{}.sock", std::process::id());
        let path = std::env::temp_dir().join(name);
        let first = bind(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(bind(&path), Err(ApiError::InUse(_))));
        drop(first);
        drop(bind(&path).expect("a stale socket is replaced"));
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path), Err(ApiError::NoSocket(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        std::fs::remove_file(&path).unwrap();
    }
}
