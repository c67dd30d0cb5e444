//! vhost-user messages, as the front-end sends and reads them.
//!
//! Follows the vhost-user specification of QEMU. A message is a header of three 32-bit numbers
//! (request, flags, payload size) and a payload; descriptors travel beside the header. Replies
//! are as hostile as any input: sizes are bounded and every read has the socket's time limit.

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// Requests of the front-end that we use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    GetConfig = 24,
}

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 0x3;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;
const HEADER_BYTES: usize = 12;

/// The longest reply we expect is GET_CONFIG's: 12 bytes and the configuration space.
const REPLY_BYTES_MAX: usize = 512;

/// A connection that speaks vhost-user.
pub(crate) struct Channel {
    stream: UnixStream,
    /// REPLY_ACK was negotiated: requests without a reply of their own get a status.
    pub(crate) acknowledged: bool,
}

impl Channel {
    /// Takes over a connected socket, whose time limits are already set.
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream, acknowledged: false }
    }

    /// The socket, to find out who is at the other end and whether it is still there.
    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends a request that has a reply, and returns the reply's payload.
    pub(crate) fn ask(&mut self, request: Request, payload: &[u8]) -> Result<Vec<u8>, String> {
        self.send(request, payload, &[], 0)?;
        self.reply(request)
    }

    /// Sends a request whose reply is one 64-bit number.
    pub(crate) fn ask_u64(&mut self, request: Request) -> Result<u64, String> {
        let payload = self.ask(request, &[])?;
        let bytes: [u8; 8] = payload.try_into().map_err(|payload: Vec<u8>| {
            format!("the server answered {request:?} with {} bytes, not 8", payload.len())
        })?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Sends a request that has no reply; with REPLY_ACK, waits until the server has accepted it.
    pub(crate) fn tell(
        &mut self,
        request: Request,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), String> {
        let flags = if self.acknowledged { FLAG_NEED_REPLY } else { 0 };
        self.send(request, payload, descriptors, flags)?;
        if !self.acknowledged {
            return Ok(());
        }
        match self.reply(request)?.as_slice() {
            [0, 0, 0, 0, 0, 0, 0, 0] => Ok(()),
            status => Err(format!("the server refused {request:?} with status {status:?}")),
        }
    }

    fn send(
        &mut self,
        request: Request,
        payload: &[u8],
        descriptors: &[BorrowedFd<'_>],
        flags: u32,
    ) -> Result<(), String> {
        let message = encode(request, payload, flags);
        let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
        // MSG_NOSIGNAL: a server that has gone is an error to report, not a SIGPIPE.
        let sent = sendmsg::<()>(
            self.stream.as_raw_fd(),
            &[IoSlice::new(&message)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map_err(|error| format!("cannot send {request:?} to the server: {error}"))?;
        self.stream
            .write_all(&message[sent..])
            .map_err(|error| format!("cannot send {request:?} to the server: {error}"))
    }

    fn reply(&mut self, request: Request) -> Result<Vec<u8>, String> {
        let mut header = [0; HEADER_BYTES];
        self.read(request, &mut header)?;
        let length = decode_reply_header(request, &header)?;
        let mut payload = vec![0; length];
        self.read(request, &mut payload)?;
        Ok(payload)
    }

    fn read(&mut self, request: Request, bytes: &mut [u8]) -> Result<(), String> {
        self.stream.read_exact(bytes).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => {
                format!("the server closed the connection instead of answering {request:?}")
            }
            ErrorKind::WouldBlock | ErrorKind::TimedOut => format!(
                "the server did not answer {request:?} in time; it may be serving another client"
            ),
            _ => format!("cannot read the answer to {request:?}: {error}"),
        })
    }
}

fn encode(request: Request, payload: &[u8], flags: u32) -> Vec<u8> {
    let mut message = Vec::with_capacity(HEADER_BYTES + payload.len());
    message.extend((request as u32).to_le_bytes());
    message.extend((VERSION | flags).to_le_bytes());
    message.extend((payload.len() as u32).to_le_bytes());
    message.extend(payload);
    message
}

/// Checks the header of a reply to `request` and returns the length of its payload.
fn decode_reply_header(request: Request, header: &[u8; HEADER_BYTES]) -> Result<usize, String> {
    let field = |index: usize| {
        u32::from_le_bytes(header[4 * index..4 * index + 4].try_into().expect("four bytes"))
    };
    let (answered, flags, length) = (field(0), field(1), field(2) as usize);
    if answered != request as u32 {
        return Err(format!("the server answered {request:?} with a message of type {answered}"));
    }
    if flags & VERSION_MASK != VERSION || flags & FLAG_REPLY == 0 {
        return Err(format!("the server answered {request:?} with flags {flags:#x}"));
    }
    if length > REPLY_BYTES_MAX {
        return Err(format!("the server answered {request:?} with {length} bytes"));
    }
    Ok(length)
}

/// Joins 32-bit numbers to a payload.
pub(crate) fn payload_u32(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Joins 64-bit numbers to a payload.
pub(crate) fn payload_u64(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn header(request: u32, flags: u32, length: u32) -> [u8; HEADER_BYTES] {
        payload_u32(&[request, flags, length]).try_into().unwrap()
    }

    #[test]
    fn a_request_lies_on_the_wire_as_specified() {
        assert_eq!(
            encode(Request::SetVringNum, &payload_u32(&[1, 256]), FLAG_NEED_REPLY),
            [8, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
        );
    }

    #[test]
    fn only_a_fitting_reply_is_taken() {
        let ask = Request::GetFeatures;
        assert_eq!(decode_reply_header(ask, &header(1, 5, 8)), Ok(8));
        assert!(decode_reply_header(ask, &header(2, 5, 8)).is_err(), "another request's answer");
        assert!(decode_reply_header(ask, &header(1, 1, 8)).is_err(), "not a reply");
        assert!(decode_reply_header(ask, &header(1, 4, 8)).is_err(), "version 0");
        assert!(decode_reply_header(ask, &header(1, 5, u32::MAX)).is_err(), "endless");
    }

    #[test]
    fn a_server_that_closes_or_stays_silent_is_an_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
        let mut channel = Channel::new(ours);
        let silent = channel.ask_u64(Request::GetFeatures).unwrap_err();
        assert!(silent.contains("in time"), "{silent}");
        drop(theirs);
        assert!(channel.ask_u64(Request::GetFeatures).is_err());
    }
}
