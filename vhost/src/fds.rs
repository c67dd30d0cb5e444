//! File descriptors that come from outside (a marked `unsafe` file).
//!
//! Messages bring descriptors for memory, kicks and calls. Here they become owned, are checked to
//! be what they claim, and are used in ways that a hostile owner of the other end cannot turn
//! into a hang, with one exception: a front-end that clears O_NONBLOCK on its call eventfd *and*
//! fills it to the brim can make one write block. Linux has no flag for a write that prevents it.

use std::fs;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// SCM_MAX_FD of Linux: no message can bring more, so the buffer below is never too small and no
/// descriptor is lost unclosed.
const FILES_MAX: usize = 253;

/// Receives bytes, and whatever descriptors come with them, from a non-blocking socket.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    files: &mut Vec<OwnedFd>,
) -> nix::Result<usize> {
    let mut control = nix::cmsg_space!([std::os::fd::RawFd; FILES_MAX]);
    let mut slices = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = part {
            for descriptor in received {
                // SAFETY: the kernel has just installed this descriptor for us; nothing else knows
                // of it, so we own it.
                files.push(unsafe { OwnedFd::from_raw_fd(descriptor) });
            }
        }
    }
    Ok(message.bytes)
}

/// A fresh non-blocking eventfd.
pub(crate) fn eventfd() -> io::Result<EventFd> {
    Ok(EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?)
}

/// Adds one to an eventfd. A full counter means that it is readable already.
pub(crate) fn signal(event: BorrowedFd<'_>) {
    let _ = nix::unistd::write(event, &1u64.to_ne_bytes());
}

/// Checks that `file` is an eventfd, and makes it non-blocking.
pub(crate) fn check_eventfd(file: &OwnedFd) -> io::Result<()> {
    let name = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    if name.as_os_str() != "anon_inode:[eventfd]" {
        return Err(io::Error::other(format!("{} is no eventfd", name.display())));
    }
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Resets an eventfd, if it is not zero already. Never blocks, whatever its owner did to its flags.
pub(crate) fn drain(event: BorrowedFd<'_>) {
    let mut count = [0u8; 8];
    let slice = libc::iovec { iov_base: count.as_mut_ptr().cast(), iov_len: count.len() };
    // SAFETY: the iovec describes `count`, which outlives the call; offset -1 reads a stream.
    let result = unsafe { libc::preadv2(event.as_raw_fd(), &slice, 1, -1, libc::RWF_NOWAIT) };
    if result < 0 && Errno::last() == Errno::EOPNOTSUPP {
        // An old kernel. The descriptor was made non-blocking when it was received.
        let _ = nix::unistd::read(event, &mut count);
    }
}

/// Where a queue's notifications go: one descriptor number whose file can be changed while the
/// polling thread writes to it.
///
/// QEMU moves the call eventfd of a running queue each time the guest masks its interrupt; stopping
/// the queue for that would drain it.
#[derive(Debug)]
pub(crate) struct CallFd {
    stable: OwnedFd,
}

impl CallFd {
    /// Calls nobody yet.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { stable: eventfd()?.into() })
    }

    /// Sends notifications to `target` from now on, or nowhere.
    pub(crate) fn redirect(&self, target: Option<&OwnedFd>) -> io::Result<()> {
        let nowhere: OwnedFd;
        let source = match target {
            Some(target) => target,
            None => {
                nowhere = eventfd()?.into();
                &nowhere
            }
        };
        // SAFETY: `stable` owns this number, so nothing else loses a file; the kernel swaps the
        // file at once, so a concurrent write goes to the old or the new one.
        let result =
            unsafe { libc::dup3(source.as_raw_fd(), self.stable.as_raw_fd(), libc::O_CLOEXEC) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Notifies the guest.
    pub(crate) fn signal(&self) {
        signal(self.stable.as_fd());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirected_call_reaches_its_new_target() {
        let (first, second): (OwnedFd, OwnedFd) =
            (eventfd().unwrap().into(), eventfd().unwrap().into());
        let call = CallFd::new().unwrap();
        call.redirect(Some(&first)).unwrap();
        call.signal();
        call.redirect(Some(&second)).unwrap();
        call.signal();
        call.signal();
        call.redirect(None).unwrap();
        call.signal();
        let count = |file: &OwnedFd| {
            let mut bytes = [0; 8];
            nix::unistd::read(file, &mut bytes).unwrap();
            u64::from_ne_bytes(bytes)
        };
        assert_eq!((count(&first), count(&second)), (1, 2));
    }

    #[test]
    fn draining_an_empty_blocking_eventfd_returns() {
        let event = EventFd::from_value_and_flags(0, EfdFlags::empty()).unwrap();
        drain(event.as_fd());
        signal(event.as_fd());
        drain(event.as_fd());
        drain(event.as_fd());
    }

    #[test]
    fn only_an_eventfd_passes_for_one() {
        let (reader, _writer) = nix::unistd::pipe().unwrap();
        assert!(check_eventfd(&reader).is_err());
        assert!(check_eventfd(&eventfd().unwrap().into()).is_ok());
    }
}
