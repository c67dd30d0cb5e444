//! The socket to one front-end: whole messages in, replies out, and a way to be interrupted.
//!
//! Never blocks in a read or write: every wait is a poll that also watches for the server's stop
//! and for news from the queues, so a front-end that sends half a message, or does not read its
//! replies, holds up itself only. An idle socket never times out.

#![forbid(unsafe_code)]

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, getsockopt, sendmsg, sockopt};

use crate::fds;
use crate::messages::{self, HEADER_SIZE, Header, MessageError};

/// What ended a wait.
#[derive(Debug)]
pub(crate) enum Event {
    /// A whole message has come.
    Message { header: Header, payload: Vec<u8>, files: Vec<OwnedFd> },
    /// A queue has news, or the size has changed.
    News,
    /// The server is to stop.
    Stop,
    /// The front-end has hung up.
    Closed,
}

/// Why the connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionError {
    #[error("the connection failed")]
    Io(#[from] io::Error),
    #[error("the front-end sent nonsense")]
    Message(#[from] MessageError),
    #[error("the server is stopping")]
    Stopping,
}

impl From<Errno> for ConnectionError {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

/// A connected front-end.
#[derive(Debug)]
pub(crate) struct FrontEnd<'a> {
    stream: UnixStream,
    stop: BorrowedFd<'a>,
    news: BorrowedFd<'a>,
}

/// What a wait was for.
enum Ready {
    Socket,
    News,
    Stop,
}

impl<'a> FrontEnd<'a> {
    pub(crate) fn new(
        stream: UnixStream,
        stop: BorrowedFd<'a>,
        news: BorrowedFd<'a>,
    ) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, stop, news })
    }

    /// The process at the other end; 0 when unknown.
    pub(crate) fn pid(&self) -> i32 {
        getsockopt(&self.stream, sockopt::PeerCredentials).map_or(0, |peer| peer.pid())
    }

    fn wait(&self, socket: PollFlags, news: bool) -> Result<Ready, ConnectionError> {
        let mut waits = [
            PollFd::new(self.stop, PollFlags::POLLIN),
            PollFd::new(self.stream.as_fd(), socket),
            PollFd::new(self.news, PollFlags::POLLIN),
        ];
        let count = if news { 3 } else { 2 };
        loop {
            match poll(&mut waits[..count], PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                result => result?,
            };
            let ready = waits.each_ref().map(|wait| wait.any() == Some(true));
            match ready {
                [true, _, _] => return Ok(Ready::Stop),
                [_, _, true] => return Ok(Ready::News),
                [_, true, _] => return Ok(Ready::Socket),
                _ => {}
            }
        }
    }

    /// Waits for the next message or event.
    pub(crate) fn next(&mut self) -> Result<Event, ConnectionError> {
        match self.wait(PollFlags::POLLIN, true)? {
            Ready::Socket => {}
            Ready::News => {
                fds::drain(self.news);
                return Ok(Event::News);
            }
            Ready::Stop => return Ok(Event::Stop),
        }
        let mut files = Vec::new();
        let mut bytes = [0; HEADER_SIZE];
        if !self.fill(&mut bytes, &mut files)? {
            return Ok(Event::Closed);
        }
        let header = messages::header(&bytes)?;
        let mut payload = vec![0; header.size];
        if !self.fill(&mut payload, &mut files)? {
            return Ok(Event::Closed);
        }
        Ok(Event::Message { header, payload, files })
    }

    /// Fills `buffer`; false when the front-end hangs up instead.
    fn fill(&self, buffer: &mut [u8], files: &mut Vec<OwnedFd>) -> Result<bool, ConnectionError> {
        let mut done = 0;
        while done < buffer.len() {
            match fds::receive(self.stream.as_fd(), &mut buffer[done..], files) {
                Ok(0) | Err(Errno::ECONNRESET) => return Ok(false),
                Ok(count) => done += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    if let Ready::Stop = self.wait(PollFlags::POLLIN, false)? {
                        return Err(ConnectionError::Stopping);
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    /// Sends `bytes`, and `file` with the first of them.
    pub(crate) fn send(&self, bytes: &[u8], file: Option<OwnedFd>) -> Result<(), ConnectionError> {
        let descriptor = file.as_ref().map(|file| [file.as_raw_fd()]);
        let mut done = 0;
        while done < bytes.len() {
            let control = descriptor.as_ref().filter(|_| done == 0);
            let control: Vec<_> = control
                .map(|descriptor| ControlMessage::ScmRights(descriptor))
                .into_iter()
                .collect();
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            let slices = [IoSlice::new(&bytes[done..])];
            match sendmsg::<()>(self.stream.as_raw_fd(), &slices, &control, flags, None) {
                Ok(count) => done += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    if let Ready::Stop = self.wait(PollFlags::POLLOUT, false)? {
                        return Err(ConnectionError::Stopping);
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
