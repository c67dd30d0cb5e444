//! vhost-user messages: bytes and descriptors in, typed messages out, and replies back to bytes.
//!
//! Pure: no socket, no session state. Lengths, counts and descriptors are checked here; whether a
//! message makes sense now is the session's business. Numbers are in native order, as the
//! specification asks; we run on little-endian machines only.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

use crate::inflight::InflightSpec;
use crate::memory::RegionSpec;

/// Bytes of a header: request, flags, payload size.
pub(crate) const HEADER_SIZE: usize = 12;
/// Longest payload accepted. SET_MEM_TABLE with [`FILES_MAX`] regions takes 1032 bytes,
/// SET_CONFIG of a whole configuration space 268.
const PAYLOAD_MAX: u32 = 4096;
/// Most descriptors in one message; front-ends send 8.
const FILES_MAX: usize = 32;
/// Largest configuration space (VHOST_USER_MAX_CONFIG_SIZE).
pub(crate) const CONFIG_MAX: u32 = 256;

const VERSION: u32 = 1;
const FLAG_VERSION_MASK: u32 = 3;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;
/// SET_VRING_KICK and its kin: no descriptor comes with the message.
const VRING_NO_FD: u64 = 1 << 8;

/// Back-end request 2: read the configuration space again.
const BACKEND_CONFIG_CHANGE: u32 = 2;

/// A header that passed its checks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    pub(crate) request: u32,
    pub(crate) need_reply: bool,
    pub(crate) size: usize,
}

/// An index of a ring with a number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct VringState {
    pub(crate) index: u32,
    pub(crate) value: u32,
}

/// Where a ring's parts are, in the front-end's address space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct VringAddresses {
    pub(crate) descriptors: u64,
    pub(crate) used: u64,
    pub(crate) available: u64,
}

/// Part of the configuration space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ConfigRange {
    pub(crate) offset: u32,
    pub(crate) size: u32,
    pub(crate) flags: u32,
}

/// What a front-end asks.
#[derive(Debug)]
pub(crate) enum Message {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<(RegionSpec, OwnedFd)>),
    SetVringNum(VringState),
    SetVringAddr(u32, VringAddresses),
    SetVringBase(VringState),
    GetVringBase(u32),
    SetVringKick(u32, Option<OwnedFd>),
    SetVringCall(u32, Option<OwnedFd>),
    SetVringErr(u32, Option<OwnedFd>),
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable(VringState),
    SetBackendReqFd(OwnedFd),
    GetConfig(ConfigRange),
    SetConfig(ConfigRange, Vec<u8>),
    GetInflightFd(InflightSpec),
    SetInflightFd(InflightSpec, OwnedFd),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(RegionSpec, OwnedFd),
    RemMemReg(RegionSpec),
    SetStatus(u64),
    GetStatus,
}

/// What is sent back, besides plain acknowledgements.
#[derive(Debug)]
pub(crate) enum Reply {
    U64(u64),
    VringState(VringState),
    /// A part of the configuration space; no bytes mean refusal.
    Config(ConfigRange, Vec<u8>),
    Inflight(InflightSpec, OwnedFd),
}

/// Why a message is none.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MessageError {
    #[error("message has version {0}, not 1")]
    Version(u32),
    #[error("message {0} is marked as a reply")]
    Reply(u32),
    #[error("message {request} has a payload of {size} bytes, more than {PAYLOAD_MAX}")]
    TooLong { request: u32, size: u32 },
    #[error("message {request} has a payload of {size} bytes, which is not its length")]
    Length { request: u32, size: usize },
    #[error("message {request} came with {found} descriptors, not {expected}")]
    Files { request: u32, found: usize, expected: usize },
    #[error("message {request} has {count} elements, which is not a number it can have")]
    Count { request: u32, count: u32 },
    #[error("message {0} is not supported")]
    Unknown(u32),
}

/// Checks a header.
pub(crate) fn header(bytes: &[u8; HEADER_SIZE]) -> Result<Header, MessageError> {
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let (request, flags, size) = (word(0), word(4), word(8));
    if flags & FLAG_VERSION_MASK != VERSION {
        return Err(MessageError::Version(flags & FLAG_VERSION_MASK));
    }
    if flags & FLAG_REPLY != 0 {
        return Err(MessageError::Reply(request));
    }
    if size > PAYLOAD_MAX {
        return Err(MessageError::TooLong { request, size });
    }
    Ok(Header { request, need_reply: flags & FLAG_NEED_REPLY != 0, size: size as usize })
}

/// Reads a payload from front to back.
struct Reader<'a> {
    request: u32,
    bytes: &'a [u8],
    whole: usize,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], MessageError> {
        let (now, later) = self.bytes.split_first_chunk().ok_or_else(|| self.wrong_length())?;
        self.bytes = later;
        Ok(*now)
    }

    fn u16(&mut self) -> Result<u16, MessageError> {
        Ok(u16::from_le_bytes(self.take()?))
    }

    fn u32(&mut self) -> Result<u32, MessageError> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64, MessageError> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    fn wrong_length(&self) -> MessageError {
        MessageError::Length { request: self.request, size: self.whole }
    }

    fn vring_state(&mut self) -> Result<VringState, MessageError> {
        Ok(VringState { index: self.u32()?, value: self.u32()? })
    }

    fn region(&mut self) -> Result<RegionSpec, MessageError> {
        let (guest, size, user, offset) = (self.u64()?, self.u64()?, self.u64()?, self.u64()?);
        Ok(RegionSpec { guest, size, user, offset })
    }

    fn single_region(&mut self) -> Result<RegionSpec, MessageError> {
        self.u64()?; // Padding.
        self.region()
    }

    fn config(&mut self) -> Result<ConfigRange, MessageError> {
        Ok(ConfigRange { offset: self.u32()?, size: self.u32()?, flags: self.u32()? })
    }

    fn inflight(&mut self) -> Result<InflightSpec, MessageError> {
        let (size, offset) = (self.u64()?, self.u64()?);
        let (num_queues, queue_size) = (self.u16()?, self.u16()?);
        // C pads the structure to 24 bytes; some front-ends send 20.
        if self.bytes.len() == 4 {
            self.u32()?;
        }
        Ok(InflightSpec { size, offset, num_queues, queue_size })
    }

    fn rest(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes).to_vec()
    }
}

/// The descriptors that came with a message, each to be claimed.
struct Files {
    request: u32,
    files: Vec<OwnedFd>,
}

impl Files {
    fn expect(&self, expected: usize) -> Result<(), MessageError> {
        let found = self.files.len();
        if found == expected {
            Ok(())
        } else {
            Err(MessageError::Files { request: self.request, found, expected })
        }
    }

    fn one(&mut self) -> Result<OwnedFd, MessageError> {
        self.expect(1)?;
        Ok(self.files.pop().expect("there is exactly one"))
    }

    /// The descriptor of SET_VRING_KICK and its kin, with the ring's index.
    fn vring(&mut self, value: u64) -> Result<(u32, Option<OwnedFd>), MessageError> {
        let index = (value & 0xff) as u32;
        if value & VRING_NO_FD == 0 { Ok((index, Some(self.one()?))) } else { Ok((index, None)) }
    }
}

/// Turns a payload and the descriptors that came with it into a message. Whatever descriptors it
/// does not claim are an error, and closed.
pub(crate) fn decode(
    request: u32,
    payload: &[u8],
    files: Vec<OwnedFd>,
) -> Result<Message, MessageError> {
    if files.len() > FILES_MAX {
        return Err(MessageError::Files { request, found: files.len(), expected: FILES_MAX });
    }
    let mut reader = Reader { request, bytes: payload, whole: payload.len() };
    let mut files = Files { request, files };
    let message = decode_body(&mut reader, &mut files)?;
    if !reader.bytes.is_empty() {
        return Err(reader.wrong_length());
    }
    files.expect(0)?;
    Ok(message)
}

fn decode_body(reader: &mut Reader<'_>, files: &mut Files) -> Result<Message, MessageError> {
    Ok(match reader.request {
        1 => Message::GetFeatures,
        2 => Message::SetFeatures(reader.u64()?),
        3 => Message::SetOwner,
        4 => Message::ResetOwner,
        5 => Message::SetMemTable(decode_table(reader, files)?),
        8 => Message::SetVringNum(reader.vring_state()?),
        9 => {
            let (index, _flags) = (reader.u32()?, reader.u32()?);
            let (descriptors, used, available) = (reader.u64()?, reader.u64()?, reader.u64()?);
            let _log = reader.u64()?;
            Message::SetVringAddr(index, VringAddresses { descriptors, used, available })
        }
        10 => Message::SetVringBase(reader.vring_state()?),
        11 => Message::GetVringBase(reader.vring_state()?.index),
        12 => {
            let (index, file) = files.vring(reader.u64()?)?;
            Message::SetVringKick(index, file)
        }
        13 => {
            let (index, file) = files.vring(reader.u64()?)?;
            Message::SetVringCall(index, file)
        }
        14 => {
            let (index, file) = files.vring(reader.u64()?)?;
            Message::SetVringErr(index, file)
        }
        15 => Message::GetProtocolFeatures,
        16 => Message::SetProtocolFeatures(reader.u64()?),
        17 => Message::GetQueueNum,
        18 => Message::SetVringEnable(reader.vring_state()?),
        21 => Message::SetBackendReqFd(files.one()?),
        24 => {
            let range = reader.config()?;
            // The payload has room for the answer; its bytes mean nothing.
            if reader.rest().len() != range.size as usize {
                return Err(reader.wrong_length());
            }
            Message::GetConfig(range)
        }
        25 => {
            let range = reader.config()?;
            let bytes = reader.rest();
            if bytes.len() != range.size as usize {
                return Err(reader.wrong_length());
            }
            Message::SetConfig(range, bytes)
        }
        31 => Message::GetInflightFd(reader.inflight()?),
        32 => Message::SetInflightFd(reader.inflight()?, files.one()?),
        34 => Message::ResetDevice,
        36 => Message::GetMaxMemSlots,
        37 => Message::AddMemReg(reader.single_region()?, files.one()?),
        38 => {
            // Some front-ends send the region's descriptor along; it is closed unused.
            files.files.truncate(files.files.len().saturating_sub(1));
            Message::RemMemReg(reader.single_region()?)
        }
        39 => Message::SetStatus(reader.u64()?),
        40 => Message::GetStatus,
        request => return Err(MessageError::Unknown(request)),
    })
}

fn decode_table(
    reader: &mut Reader<'_>,
    files: &mut Files,
) -> Result<Vec<(RegionSpec, OwnedFd)>, MessageError> {
    let (count, _padding) = (reader.u32()?, reader.u32()?);
    if count == 0 || count as usize > FILES_MAX {
        return Err(MessageError::Count { request: reader.request, count });
    }
    files.expect(count as usize)?;
    files.files.drain(..).map(|file| Ok((reader.region()?, file))).collect()
}

/// A reply to `request` as bytes, and the descriptor that goes with it.
pub(crate) fn encode(request: u32, reply: Reply) -> (Vec<u8>, Option<OwnedFd>) {
    let mut payload = Vec::new();
    let mut file = None;
    match reply {
        Reply::U64(value) => payload.extend(value.to_le_bytes()),
        Reply::VringState(state) => {
            payload.extend(state.index.to_le_bytes());
            payload.extend(state.value.to_le_bytes());
        }
        Reply::Config(range, bytes) => {
            payload.extend(range.offset.to_le_bytes());
            payload.extend((bytes.len() as u32).to_le_bytes());
            payload.extend(range.flags.to_le_bytes());
            payload.extend(bytes);
        }
        Reply::Inflight(spec, region) => {
            payload.extend(spec.size.to_le_bytes());
            payload.extend(spec.offset.to_le_bytes());
            payload.extend(spec.num_queues.to_le_bytes());
            payload.extend(spec.queue_size.to_le_bytes());
            payload.extend([0; 4]);
            file = Some(region);
        }
    }
    (with_header(request, VERSION | FLAG_REPLY, &payload), file)
}

/// The message that tells a front-end to read the configuration space again.
pub(crate) fn config_changed() -> Vec<u8> {
    with_header(BACKEND_CONFIG_CHANGE, VERSION, &[])
}

fn with_header(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_SIZE + payload.len());
    bytes.extend(request.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend((payload.len() as u32).to_le_bytes());
    bytes.extend(payload);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> OwnedFd {
        crate::fds::eventfd().unwrap().into()
    }

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn a_header_is_a_request_of_version_one_with_a_short_payload() {
        let bytes = |request: u32, flags: u32, size: u32| -> [u8; 12] {
            [request, flags, size].map(u32::to_le_bytes).as_flattened().try_into().unwrap()
        };
        let good = Header { request: 5, need_reply: true, size: 40 };
        assert_eq!(header(&bytes(5, 9, 40)), Ok(good));
        assert_eq!(header(&bytes(5, 2, 40)), Err(MessageError::Version(2)));
        assert_eq!(header(&bytes(5, 5, 40)), Err(MessageError::Reply(5)));
        let long = MessageError::TooLong { request: 5, size: u32::MAX };
        assert_eq!(header(&bytes(5, 1, u32::MAX)), Err(long));
    }

    #[test]
    fn every_length_but_the_right_one_is_refused() {
        let lengths = [
            (1, 0, 0),
            (2, 8, 0),
            (8, 8, 0),
            (9, 40, 0),
            (11, 8, 0),
            (12, 8, 1),
            (21, 0, 1),
            (32, 24, 1),
            (37, 40, 1),
            (38, 40, 0),
            (39, 8, 0),
        ];
        for (request, right, count) in lengths {
            for length in 0..64 {
                let files = (0..count).map(|_| file()).collect();
                let result = decode(request, &vec![0; length], files);
                // An in-flight message may lack its padding.
                let good = length == right || (request == 32 && length == 20);
                assert_eq!(result.is_ok(), good, "request {request}, {length} bytes");
            }
        }
    }

    #[test]
    fn descriptors_must_match_what_the_message_says() {
        let with_files = |request, payload: &[u64], count: usize| {
            decode(request, &words(payload), (0..count).map(|_| file()).collect())
        };
        assert!(matches!(with_files(12, &[3], 1), Ok(Message::SetVringKick(3, Some(_)))));
        assert!(matches!(with_files(13, &[0x103], 0), Ok(Message::SetVringCall(3, None))));
        assert!(with_files(12, &[3], 0).is_err());
        assert!(with_files(12, &[0x103], 1).is_err());
        assert!(with_files(1, &[], 1).is_err());
        assert!(with_files(1, &[], 200).is_err());
        assert!(matches!(with_files(38, &[0; 5], 1), Ok(Message::RemMemReg(_))));
        assert!(with_files(38, &[0; 5], 2).is_err());
        assert!(with_files(5, &[2, 0, 1, 0, 0, 0, 1, 0, 0], 1).is_err());
        assert!(with_files(5, &[2, 0, 1, 0, 0, 0, 1, 0, 0], 2).is_ok());
        assert!(with_files(5, &[0], 0).is_err());
        assert!(with_files(5, &[9999], 1).is_err());
    }

    #[test]
    fn a_configuration_message_is_as_long_as_it_says() {
        let message = |request: u32, size: u32, extra: usize| {
            let mut bytes = vec![0; 12 + extra];
            bytes[4..8].copy_from_slice(&size.to_le_bytes());
            decode(request, &bytes, Vec::new())
        };
        assert!(matches!(message(24, 60, 60), Ok(Message::GetConfig(range)) if range.size == 60));
        assert!(message(24, 60, 59).is_err());
        assert!(message(25, u32::MAX, 4).is_err());
    }

    #[test]
    fn no_bytes_whatever_make_the_decoder_panic() {
        // A small xorshift: the same bytes on every run.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut accepted = 0;
        for _ in 0..100_000 {
            let request = (next() % 48) as u32;
            let length = (next() % 80) as usize;
            let bytes: Vec<u8> = (0..length).map(|_| next() as u8).collect();
            accepted += u32::from(decode(request, &bytes, Vec::new()).is_ok());
        }
        assert!(accepted > 100, "some of it is a message");
    }
}
