//! The front-end's side of a vhost-user-blk session: connect, agree on features, start queues.
//!
//! Control path only. Once [`Frontend::start`] has returned, the socket is silent until
//! [`Frontend::stop`]; requests travel through the rings in [`crate::queue`].

use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, getsockopt, recv, sockopt::PeerCredentials};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::clock::Clock;
use crate::memory::GuestMemory;
use crate::message::{Channel, Request, payload_u32, payload_u64};
use crate::queue::Queue;

/// How long one message may take. Generous: a server may open or drain a volume meanwhile.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

const F_PROTOCOL_FEATURES: u32 = 30;
const PROTOCOL_MQ: u32 = 0;
const PROTOCOL_REPLY_ACK: u32 = 3;
const PROTOCOL_CONFIG: u32 = 9;

/// Bytes of the configuration space we ask for: up to the end of write zeroes, as QEMU does.
const CONFIG_BYTES: usize = 60;

/// What the caller wants of a session.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// Number of queues to start.
    pub(crate) queues: u16,
    /// Number of the first of them.
    pub(crate) first_queue: u16,
    /// Use the event index when it is offered.
    pub(crate) event_index: bool,
    /// Use indirect descriptors; the server must offer them.
    pub(crate) indirect: bool,
}

/// What was agreed, and what the disk says of itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Disk {
    /// Size in bytes.
    pub(crate) capacity_bytes: u64,
    /// Writes are refused.
    pub(crate) read_only: bool,
    /// FLUSH was negotiated: completed writes may be volatile until one.
    pub(crate) flush: bool,
    /// Most bytes of a discard, if DISCARD was negotiated.
    pub(crate) discard_bytes_max: Option<u64>,
    /// The event index was negotiated.
    pub(crate) event_index: bool,
}

/// A session with a vhost-user-blk server.
pub(crate) struct Frontend {
    channel: Channel,
    features: u64,
    disk: Disk,
    first_queue: u32,
    queues_started: u32,
}

impl Frontend {
    /// Connects to `socket` and agrees on features. Waits up to `patience` for a server that is
    /// still starting.
    pub(crate) fn connect(
        socket: &Path,
        wanted: Wanted,
        patience: Duration,
    ) -> Result<Self, String> {
        let stream = connect_patiently(socket, patience)?;
        stream
            .set_read_timeout(Some(ANSWER_TIMEOUT))
            .and_then(|()| stream.set_write_timeout(Some(ANSWER_TIMEOUT)))
            .map_err(|error| format!("cannot set a time limit on the socket: {error}"))?;
        let mut channel = Channel::new(stream);
        channel.tell(Request::SetOwner, &[], &[])?;
        let offered = channel.ask_u64(Request::GetFeatures)?;
        let features = choose_features(offered, wanted)?;
        agree_on_protocol(&mut channel, wanted)?;
        let config = get_config(&mut channel)?;
        channel.tell(Request::SetFeatures, &payload_u64(&[features]), &[])?;
        let disk = Disk {
            capacity_bytes: capacity_bytes(&config)?,
            read_only: has(features, VIRTIO_BLK_F_RO),
            flush: has(features, VIRTIO_BLK_F_FLUSH),
            discard_bytes_max: has(features, VIRTIO_BLK_F_DISCARD)
                .then(|| discard_bytes_max(&config)),
            event_index: has(features, VIRTIO_RING_F_EVENT_IDX),
        };
        let first_queue = wanted.first_queue.into();
        Ok(Self { channel, features, disk, first_queue, queues_started: 0 })
    }

    /// The disk behind the session.
    pub(crate) fn disk(&self) -> Disk {
        self.disk
    }

    /// The process that serves the socket, as the kernel recorded it.
    pub(crate) fn server_pid(&self) -> Option<u32> {
        let credentials = getsockopt(self.channel.stream(), PeerCredentials).ok()?;
        u32::try_from(credentials.pid()).ok().filter(|pid| *pid != 0)
    }

    /// Hands memory and queues to the server, which serves them from here on.
    pub(crate) fn start(&mut self, memory: &GuestMemory, queues: &[Queue]) -> Result<(), String> {
        let region = [
            memory.guest_address(0),
            memory.bytes(),
            memory.user_address(0),
            /* in the fd */ 0,
        ];
        let mut table = payload_u32(&[1, 0]);
        table.extend(payload_u64(&region));
        self.channel.tell(Request::SetMemTable, &table, &[memory.file()])?;
        for (index, queue) in queues.iter().enumerate() {
            self.start_queue(self.first_queue + index as u32, queue)?;
            self.queues_started = index as u32 + 1;
        }
        Ok(())
    }

    fn start_queue(&mut self, index: u32, queue: &Queue) -> Result<(), String> {
        let channel = &mut self.channel;
        let size = u32::from(queue.size());
        channel.tell(Request::SetVringNum, &payload_u32(&[index, size]), &[])?;
        channel.tell(Request::SetVringBase, &payload_u32(&[index, 0]), &[])?;
        let [descriptors, used, available] = queue.user_addresses();
        let mut address = payload_u32(&[index, 0]);
        address.extend(payload_u64(&[descriptors, used, available, 0]));
        channel.tell(Request::SetVringAddr, &address, &[])?;
        let which = payload_u64(&[u64::from(index)]);
        channel.tell(Request::SetVringCall, &which, &[queue.call().as_fd()])?;
        channel.tell(Request::SetVringKick, &which, &[queue.kick().as_fd()])?;
        if has(self.features, F_PROTOCOL_FEATURES) {
            channel.tell(Request::SetVringEnable, &payload_u32(&[index, 1]), &[])?;
        }
        Ok(())
    }

    /// Stops every queue that was started; the server has then let go of guest memory.
    pub(crate) fn stop(&mut self) -> Result<(), String> {
        let started = std::mem::take(&mut self.queues_started);
        for index in self.first_queue..self.first_queue + started {
            self.channel.ask(Request::GetVringBase, &payload_u32(&[index, 0]))?;
        }
        Ok(())
    }

    /// An error when the server has closed the connection. Does not wait.
    pub(crate) fn check_alive(&self) -> Result<(), String> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
        match recv(self.channel.stream().as_raw_fd(), &mut [0; 1], flags) {
            Ok(0) => Err("the server closed the connection".into()),
            Ok(_) => Err("the server sent a message that nothing asked for".into()),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
            Err(error) => Err(format!("the connection to the server broke: {error}")),
        }
    }
}

/// A server that was started a moment ago may not have made its socket yet.
fn connect_patiently(socket: &Path, patience: Duration) -> Result<UnixStream, String> {
    let deadline = Clock::start().deadline(patience);
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused)
                    && !deadline.passed() =>
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => {
                return Err(format!(
                    "cannot connect to {}: {error}; is the server running?",
                    socket.display()
                ));
            }
        }
    }
}

fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

/// Takes what we can use of `offered`, and refuses a server without what we need.
fn choose_features(offered: u64, wanted: Wanted) -> Result<u64, String> {
    let mut features = 1u64 << VIRTIO_F_VERSION_1
        | 1 << F_PROTOCOL_FEATURES
        | 1 << VIRTIO_BLK_F_FLUSH
        | 1 << VIRTIO_BLK_F_DISCARD
        | 1 << VIRTIO_BLK_F_RO;
    let required = [
        (true, VIRTIO_F_VERSION_1, "VERSION_1"),
        (true, F_PROTOCOL_FEATURES, "PROTOCOL_FEATURES, which carries the size of the disk"),
        (wanted.first_queue + wanted.queues > 1, VIRTIO_BLK_F_MQ, "MQ; use --queues 1"),
        (wanted.indirect, VIRTIO_RING_F_INDIRECT_DESC, "INDIRECT_DESC; leave out --indirect"),
    ];
    for (needed, bit, name) in required {
        if needed && !has(offered, bit) {
            return Err(format!("the server does not offer {name}"));
        }
        features |= u64::from(needed) << bit;
    }
    features |= u64::from(wanted.event_index) << VIRTIO_RING_F_EVENT_IDX;
    Ok(offered & features)
}

fn agree_on_protocol(channel: &mut Channel, wanted: Wanted) -> Result<(), String> {
    let offered = channel.ask_u64(Request::GetProtocolFeatures)?;
    if !has(offered, PROTOCOL_CONFIG) {
        return Err("the server does not offer CONFIG, which carries the size of the disk".into());
    }
    let ours = 1 << PROTOCOL_MQ | 1 << PROTOCOL_REPLY_ACK | 1 << PROTOCOL_CONFIG;
    let features = offered & ours;
    channel.tell(Request::SetProtocolFeatures, &payload_u64(&[features]), &[])?;
    channel.acknowledged = has(features, PROTOCOL_REPLY_ACK);
    if has(features, PROTOCOL_MQ) {
        let queues_max = channel.ask_u64(Request::GetQueueNum)?;
        let needed = wanted.first_queue + wanted.queues;
        if u64::from(needed) > queues_max {
            return Err(format!("the server has {queues_max} queues, not {needed}"));
        }
    }
    Ok(())
}

fn get_config(channel: &mut Channel) -> Result<Vec<u8>, String> {
    let mut payload = payload_u32(&[0, CONFIG_BYTES as u32, 0]);
    let header_bytes = payload.len();
    payload.resize(header_bytes + CONFIG_BYTES, 0);
    let reply = channel.ask(Request::GetConfig, &payload)?;
    match reply.get(header_bytes..) {
        Some(config) if config.len() == CONFIG_BYTES => Ok(config.to_vec()),
        _ => Err(format!(
            "the server answered GetConfig for {CONFIG_BYTES} bytes with a payload of {} bytes",
            reply.len()
        )),
    }
}

/// The first field of the configuration space counts 512-byte sectors.
fn capacity_bytes(config: &[u8]) -> Result<u64, String> {
    let sectors = u64::from_le_bytes(config[..8].try_into().expect("eight of sixty bytes"));
    sectors.checked_mul(512).ok_or_else(|| format!("a disk of {sectors} sectors cannot be"))
}

/// `max_discard_sectors` (VIRTIO 1.2, 5.2.4).
fn discard_bytes_max(config: &[u8]) -> u64 {
    let sectors = u32::from_le_bytes(config[36..40].try_into().expect("four of sixty bytes"));
    u64::from(sectors) * 512
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Wanted = Wanted { queues: 1, first_queue: 0, event_index: true, indirect: false };

    #[test]
    fn features_are_never_more_than_offered() {
        let offered = 1u64 << VIRTIO_F_VERSION_1 | 1 << F_PROTOCOL_FEATURES | 1 << 35;
        assert_eq!(choose_features(offered, ONE), Ok(offered & !(1 << 35)), "35 is IN_ORDER");
        let all = choose_features(u64::MAX, ONE).unwrap();
        assert!(has(all, VIRTIO_RING_F_EVENT_IDX) && !has(all, VIRTIO_RING_F_INDIRECT_DESC));
    }

    #[test]
    fn a_server_without_what_we_need_is_refused() {
        assert!(choose_features(0, ONE).is_err());
        let plain = 1u64 << VIRTIO_F_VERSION_1 | 1 << F_PROTOCOL_FEATURES;
        assert!(choose_features(plain, Wanted { queues: 2, ..ONE }).is_err());
        assert!(choose_features(plain, Wanted { indirect: true, ..ONE }).is_err());
    }

    #[test]
    fn a_missing_server_is_an_error() {
        let error = Frontend::connect(Path::new("/nonexistent/socket"), ONE, Duration::ZERO);
        assert!(error.err().unwrap().contains("is the server running"));
    }
}
