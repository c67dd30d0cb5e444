//! One front-end, from connect to gone, as one table of messages.
//!
//! A ring runs when everything it needs is known, in whatever order it came: its size, its
//! addresses, memory that holds them, a kick, and (when protocol features are negotiated) being
//! enabled. A message that changes what a running ring stands on stops it first, which drains it,
//! and starts it again afterwards. So no request is ever in flight over memory that goes away.
//!
//! Every error ends the connection: the front-end is wrong or we do not understand it, and either
//! way its rings are safest stopped. The guest's cache setting outlives the connection, because a
//! guest does not set it again when its front-end reconnects.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{MsgFlags, send};

use crate::counters::{Notice, QueueCounters};
use crate::disk::{CONFIG_WRITEBACK_OFFSET, Disk};
use crate::fds::{self, CallFd};
use crate::features::{ProtocolFeatures, VirtioFeatures};
use crate::host::QueueHost;
use crate::inflight::{self, InflightError, InflightRegion, InflightSpec};
use crate::log_limit::{Due, LogLimit};
use crate::memory::{AddressMap, GuestMemory, MemoryError, REGIONS_MAX};
use crate::messages::{self, CONFIG_MAX, ConfigRange, Message, Reply, VringAddresses, VringState};
use crate::queue::{Queue, QueueParts};
use crate::ring::Ring;

/// Why a message ends the connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error("the front-end acknowledged feature bits {0:#x}, which were not offered")]
    Features(u64),
    #[error("the front-end acknowledged protocol feature bits {0:#x}, which were not offered")]
    ProtocolFeatures(u64),
    #[error("there is no queue {index}: the volume has {count}")]
    NoQueue { index: u32, count: u16 },
    #[error("queue size {size} is not a power of two up to {limit}")]
    QueueSize { size: u32, limit: u16 },
    #[error("queue base {0} is no ring index")]
    Base(u32),
    #[error("queue enable value {0} is neither 0 nor 1")]
    Enable(u32),
    #[error("the rings of queue {0} are not aligned inside one memory region")]
    RingPlace(usize),
    #[error(
        "the guest wrote {size} bytes at {offset} of the configuration space; only the cache mode can be written"
    )]
    ConfigWrite { offset: u32, size: u32 },
    #[error("an in-flight region for {queues} queues of {entries} is not one for this volume")]
    InflightShape { queues: u16, entries: u16 },
    #[error("guest memory was refused")]
    Memory(#[from] MemoryError),
    #[error("the in-flight region was refused")]
    Inflight(#[from] InflightError),
    #[error("a kick or call descriptor was refused")]
    Event(#[source] io::Error),
}

/// Where a ring's kicks come from.
#[derive(Clone, Debug)]
enum Kick {
    Event(Arc<OwnedFd>),
    /// The front-end will not kick: the ring is to be polled.
    Polled,
}

/// What is known of one ring.
#[derive(Debug)]
struct RingState {
    size: u16,
    base: u16,
    addresses: Option<VringAddresses>,
    kick: Option<Kick>,
    call: Arc<CallFd>,
    error: Option<OwnedFd>,
    enabled: bool,
    /// Set while the queue is with the host.
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    counters: Arc<QueueCounters>,
    malformed_logged: bool,
    broken_logged: bool,
}

impl RingState {
    fn new() -> io::Result<Self> {
        Ok(Self {
            size: 0,
            base: 0,
            addresses: None,
            kick: None,
            call: Arc::new(CallFd::new()?),
            error: None,
            enabled: false,
            running: None,
        })
    }

    /// Back to before the start. The base stays: QEMU resets the status when it merely stops the
    /// machine, and asks for the base afterwards. The call descriptor stays: front-ends set it once,
    /// before the first start.
    fn reset(&mut self) {
        (self.kick, self.enabled) = (None, false);
    }

    /// Forgets everything: the next front-end is another.
    fn forget(&mut self) -> io::Result<()> {
        self.reset();
        (self.size, self.base, self.addresses) = (0, 0, None);
        self.error = None;
        self.call.redirect(None)
    }
}

/// The cache mode the guest chose, and what the host was told.
#[derive(Clone, Copy, Debug)]
struct Cache {
    wanted: bool,
    told: bool,
}

/// The state of one volume's control path.
pub(crate) struct Session {
    disk: Arc<Disk>,
    host: Arc<dyn QueueHost>,
    news: Arc<OwnedFd>,
    features: VirtioFeatures,
    protocol: ProtocolFeatures,
    memory: Arc<GuestMemory>,
    inflight: Option<InflightRegion>,
    backend: Option<OwnedFd>,
    status: u64,
    rings: Vec<RingState>,
    cache: Cache,
    limits: LogLimits,
}

/// A limit for each line that a front-end can cause again and again by starting its rings anew.
/// They outlive the connection, since connecting anew is as cheap.
#[derive(Debug)]
struct LogLimits {
    broken: LogLimit,
    malformed: LogLimit,
    recovering: LogLimit,
}

/// Whether a ring that is not in guest memory is an error, or may wait for more memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    Refuse,
    Wait,
}

impl Session {
    pub(crate) fn new(
        disk: Arc<Disk>,
        host: Arc<dyn QueueHost>,
        news: Arc<OwnedFd>,
    ) -> io::Result<Self> {
        let rings =
            (0..disk.info.num_queues).map(|_| RingState::new()).collect::<Result<_, _>>()?;
        let cache = Cache { wanted: disk.info.writeback, told: disk.info.writeback };
        Ok(Self {
            disk,
            host,
            news,
            features: VirtioFeatures::default(),
            protocol: ProtocolFeatures::default(),
            memory: Arc::default(),
            inflight: None,
            backend: None,
            status: 0,
            rings,
            cache,
            limits: LogLimits {
                broken: LogLimit::start(),
                malformed: LogLimit::start(),
                recovering: LogLimit::start(),
            },
        })
    }

    /// Whether messages may ask for acknowledgements.
    pub(crate) fn reply_ack(&self) -> bool {
        self.protocol.reply_ack()
    }

    /// The table: what each message does. A reply is what the message itself asks for;
    /// acknowledgements are the caller's.
    pub(crate) fn handle(&mut self, message: Message) -> Result<Option<Reply>, SessionError> {
        match message {
            Message::GetFeatures => return Ok(Some(Reply::U64(self.offered().bits()))),
            Message::SetFeatures(bits) => self.set_features(bits)?,
            Message::SetOwner => {}
            Message::ResetOwner | Message::ResetDevice => {
                self.reset();
                self.inflight = None; // Requests end with the driver that made them.
            }
            Message::SetMemTable(table) => {
                let memory = GuestMemory::map(&table)?;
                self.replace_memory(memory)?;
            }
            Message::AddMemReg(spec, file) => {
                let memory = self.memory.with(spec, &file)?;
                self.replace_memory(memory)?;
            }
            Message::RemMemReg(spec) => {
                let memory = self.memory.without(&spec)?;
                self.replace_memory(memory)?;
            }
            Message::GetMaxMemSlots => return Ok(Some(Reply::U64(REGIONS_MAX as u64))),
            Message::SetVringNum(state) => self.set_vring_num(state)?,
            Message::SetVringAddr(index, addresses) => {
                self.change(index, |ring| ring.addresses = Some(addresses))?;
            }
            Message::SetVringBase(VringState { index, value }) => {
                let base = u16::try_from(value).map_err(|_| SessionError::Base(value))?;
                self.change(index, |ring| ring.base = base)?;
            }
            Message::GetVringBase(index) => return self.get_vring_base(index).map(Some),
            Message::SetVringKick(index, file) => self.set_vring_kick(index, file)?,
            Message::SetVringCall(index, file) => self.set_vring_call(index, file)?,
            Message::SetVringErr(index, file) => {
                let index = self.ring_index(index)?;
                file.iter().try_for_each(fds::check_eventfd).map_err(SessionError::Event)?;
                self.rings[index].error = file;
            }
            Message::SetVringEnable(state) => self.set_vring_enable(state)?,
            Message::GetProtocolFeatures => {
                return Ok(Some(Reply::U64(ProtocolFeatures::OFFERED.bits())));
            }
            Message::SetProtocolFeatures(bits) => {
                self.protocol = ProtocolFeatures::OFFERED
                    .acknowledge(bits)
                    .map_err(SessionError::ProtocolFeatures)?;
            }
            Message::GetQueueNum => {
                return Ok(Some(Reply::U64(self.disk.info.num_queues.into())));
            }
            Message::SetBackendReqFd(socket) => self.backend = Some(socket),
            Message::GetConfig(range) => return Ok(Some(self.get_config(range))),
            Message::SetConfig(range, bytes) => self.set_config(range, &bytes)?,
            Message::GetInflightFd(spec) => return self.get_inflight(spec).map(Some),
            Message::SetInflightFd(spec, file) => self.set_inflight(spec, &file)?,
            Message::SetStatus(0) => self.reset(),
            Message::SetStatus(status) => self.status = status,
            Message::GetStatus => return Ok(Some(Reply::U64(self.status))),
        }
        Ok(None)
    }

    /// Stops everything and forgets the front-end: it is gone, or we are going.
    pub(crate) fn close(&mut self) {
        self.reset();
        if let Err(error) = self.rings.iter_mut().try_for_each(RingState::forget) {
            tracing::error!(%error, "cannot close a call descriptor");
        }
        self.inflight = None;
        self.memory = Arc::default();
        self.backend = None;
        self.features = VirtioFeatures::default();
        self.protocol = ProtocolFeatures::default();
    }

    /// Logs what queues have found, once for each kind (see [`LogLimits`]), and passes on a change of size.
    pub(crate) fn take_news(&mut self) {
        let volume = &self.disk.info.id;
        for (queue, ring) in self.rings.iter_mut().enumerate() {
            let Some(running) = &mut ring.running else { continue };
            if let Some(reason) = running.counters.broken().filter(|_| !running.broken_logged) {
                running.broken_logged = true;
                if let Some(Due { suppressed }) = self.limits.broken.due() {
                    tracing::warn!(%volume, queue, %reason, suppressed, "queue stopped until the guest resets it");
                }
                ring.error.iter().for_each(|error| fds::signal(error.as_fd()));
            }
            if running.counters.malformed() > 0 && !running.malformed_logged {
                running.malformed_logged = true;
                if let Some(Due { suppressed }) = self.limits.malformed.due() {
                    tracing::warn!(%volume, queue, suppressed, "the guest sent malformed requests; counted only from here on");
                }
            }
        }
        if self.disk.take_resized()
            && let Some(backend) = &self.backend
        {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            if let Err(error) = send(backend.as_raw_fd(), &messages::config_changed(), flags) {
                tracing::warn!(%volume, %error, "the front-end was not told the new size");
            }
        }
    }

    fn offered(&self) -> VirtioFeatures {
        VirtioFeatures::offered(self.disk.info.read_only)
    }

    fn ring_index(&self, index: u32) -> Result<usize, SessionError> {
        let count = self.disk.info.num_queues;
        if index < count.into() {
            Ok(index as usize)
        } else {
            Err(SessionError::NoQueue { index, count })
        }
    }

    fn set_features(&mut self, bits: u64) -> Result<(), SessionError> {
        let features = self.offered().acknowledge(bits).map_err(SessionError::Features)?;
        if features != self.features {
            self.stop_all();
            self.features = features;
            self.start_all(Missing::Wait)?;
        }
        self.apply_cache();
        Ok(())
    }

    /// Tells the host the cache mode when it changes. A guest that knows nothing of write caches
    /// must not have one (virtio 1.2, 5.2.6.2).
    fn apply_cache(&mut self) {
        let writeback = self.cache.wanted && self.features.write_cache();
        if self.cache.told != writeback {
            self.cache.told = writeback;
            self.host.set_cache(writeback);
        }
    }

    fn replace_memory(&mut self, memory: GuestMemory) -> Result<(), SessionError> {
        self.stop_all();
        self.memory = Arc::new(memory);
        self.start_all(Missing::Wait)
    }

    /// Changes something a ring stands on.
    fn change(
        &mut self,
        index: u32,
        change: impl FnOnce(&mut RingState),
    ) -> Result<(), SessionError> {
        let index = self.ring_index(index)?;
        self.stop(index);
        change(&mut self.rings[index]);
        self.try_start(index, Missing::Refuse)
    }

    fn set_vring_num(&mut self, state: VringState) -> Result<(), SessionError> {
        let VringState { index, value: size } = state;
        let limit = self.disk.info.queue_size_max;
        let fits = size.is_power_of_two() && size <= limit.into();
        let size = u16::try_from(size).ok().filter(|_| fits);
        let size = size.ok_or(SessionError::QueueSize { size: state.value, limit })?;
        self.change(index, |ring| ring.size = size)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<Reply, SessionError> {
        let place = self.ring_index(index)?;
        self.stop(place);
        let ring = &mut self.rings[place];
        ring.kick = None;
        Ok(Reply::VringState(VringState { index, value: ring.base.into() }))
    }

    fn set_vring_kick(&mut self, index: u32, file: Option<OwnedFd>) -> Result<(), SessionError> {
        file.iter().try_for_each(fds::check_eventfd).map_err(SessionError::Event)?;
        let kick = file.map_or(Kick::Polled, |file| Kick::Event(Arc::new(file)));
        self.change(index, |ring| ring.kick = Some(kick))
    }

    /// Does not stop the ring: front-ends move the call descriptor while it runs.
    fn set_vring_call(&mut self, index: u32, file: Option<OwnedFd>) -> Result<(), SessionError> {
        let index = self.ring_index(index)?;
        file.iter().try_for_each(fds::check_eventfd).map_err(SessionError::Event)?;
        let ring = &self.rings[index];
        ring.call.redirect(file.as_ref()).map_err(SessionError::Event)?;
        if ring.running.is_some() {
            // An interrupt on its way to the old descriptor may have been lost.
            ring.call.signal();
        }
        Ok(())
    }

    fn set_vring_enable(&mut self, state: VringState) -> Result<(), SessionError> {
        let index = self.ring_index(state.index)?;
        match state.value {
            0 => self.stop(index),
            1 => {}
            value => return Err(SessionError::Enable(value)),
        }
        self.rings[index].enabled = state.value == 1;
        self.try_start(index, Missing::Refuse)
    }

    /// Exactly the bytes asked for: fields we do not have are zero. Nothing, which means refusal,
    /// past the largest space there can be.
    fn get_config(&self, range: ConfigRange) -> Reply {
        let end = range.offset.checked_add(range.size).filter(|end| *end <= CONFIG_MAX);
        let bytes = end.map_or_else(Vec::new, |end| {
            let mut space = self.disk.config_space(self.cache.wanted).to_vec();
            space.resize(CONFIG_MAX as usize, 0);
            space[range.offset as usize..end as usize].to_vec()
        });
        Reply::Config(range, bytes)
    }

    fn set_config(&mut self, range: ConfigRange, bytes: &[u8]) -> Result<(), SessionError> {
        let [writeback] = bytes else { return Err(config_write(range)) };
        if range.offset as usize != CONFIG_WRITEBACK_OFFSET || *writeback > 1 {
            return Err(config_write(range));
        }
        self.cache.wanted = *writeback == 1;
        self.apply_cache();
        Ok(())
    }

    fn get_inflight(&self, spec: InflightSpec) -> Result<Reply, SessionError> {
        self.check_inflight(spec)?;
        let (spec, file) = inflight::create(spec.num_queues, spec.queue_size)?;
        Ok(Reply::Inflight(spec, file))
    }

    fn set_inflight(&mut self, spec: InflightSpec, file: &OwnedFd) -> Result<(), SessionError> {
        self.check_inflight(spec)?;
        let region = InflightRegion::map(spec, file)?;
        self.stop_all();
        self.inflight = Some(region);
        self.start_all(Missing::Wait)
    }

    fn check_inflight(&self, spec: InflightSpec) -> Result<(), SessionError> {
        let InflightSpec { num_queues: queues, queue_size: entries, .. } = spec;
        let info = &self.disk.info;
        if (1..=info.num_queues).contains(&queues) && (1..=info.queue_size_max).contains(&entries) {
            Ok(())
        } else {
            Err(SessionError::InflightShape { queues, entries })
        }
    }

    /// Every ring stops, drained, until it is kicked and enabled anew.
    fn reset(&mut self) {
        self.stop_all();
        self.rings.iter_mut().for_each(RingState::reset);
        self.status = 0;
    }

    fn stop_all(&mut self) {
        (0..self.rings.len()).for_each(|index| self.stop(index));
    }

    fn start_all(&mut self, missing: Missing) -> Result<(), SessionError> {
        (0..self.rings.len()).try_for_each(|index| self.try_start(index, missing))
    }

    /// Gets the ring's queue back, drained.
    fn stop(&mut self, index: usize) {
        if self.rings[index].running.is_none() {
            return;
        }
        let queue = self.host.stop(index);
        assert_eq!(queue.in_flight(), 0, "the host gave queue {index} back undrained");
        self.take_news();
        self.rings[index].running = None;
        self.rings[index].base = queue.next_available();
    }

    /// Starts the ring if it is complete.
    fn try_start(&mut self, index: usize, missing: Missing) -> Result<(), SessionError> {
        let ring = &self.rings[index];
        let enabled = ring.enabled || !self.features.protocol_features();
        let (Some(addresses), Some(kick)) = (ring.addresses, ring.kick.clone()) else {
            return Ok(());
        };
        if ring.running.is_some() || !enabled || ring.size == 0 || self.memory.is_empty() {
            return Ok(());
        }
        let Some(parts) = self.place_ring(ring.size, addresses) else {
            return match missing {
                Missing::Refuse => Err(SessionError::RingPlace(index)),
                Missing::Wait => Ok(()),
            };
        };
        let queue = self.build(index, parts, kick)?;
        let counters = queue.counters().clone();
        let running = Running { counters, malformed_logged: false, broken_logged: false };
        self.rings[index].running = Some(running);
        self.host.start(index, queue);
        // Whatever was published before the ring moved may not have been announced.
        self.rings[index].call.signal();
        Ok(())
    }

    fn place_ring(&self, size: u16, addresses: VringAddresses) -> Option<Ring> {
        let [descriptors, available, used] = Ring::lengths(size, self.features.event_idx());
        Some(Ring {
            descriptors: self.memory.window_at_user(addresses.descriptors, descriptors, 16)?,
            available: self.memory.window_at_user(addresses.available, available, 2)?,
            used: self.memory.window_at_user(addresses.used, used, 4)?,
            size,
        })
    }

    fn build(&mut self, index: usize, ring: Ring, kick: Kick) -> Result<Queue, SessionError> {
        let state = &self.rings[index];
        let used = ring.used_index();
        let mut base = state.base;
        let (mut records, mut recovered) = (None, Vec::new());
        if let Some(region) = &self.inflight {
            let (queue, found) = region.recover(index, ring.size, used)?;
            // What was popped is what was used and what is in flight, whatever base we are told:
            // front-ends can only guess it. cloud-hypervisor says the available index, past what
            // was submitted while nobody was there.
            base = used.wrapping_add(found.heads.len() as u16);
            if !found.heads.is_empty() {
                let (volume, requests) = (&self.disk.info.id, found.heads.len());
                if let Some(Due { suppressed }) = self.limits.recovering.due() {
                    tracing::info!(%volume, queue = index, requests, suppressed, "recovering requests in flight");
                }
            }
            (records, recovered) = (Some(queue), found.heads);
        }
        let kick = match kick {
            Kick::Event(event) => Some(event),
            Kick::Polled => None,
        };
        Queue::new(QueueParts {
            ring,
            map: AddressMap::for_queue(self.memory.clone()),
            features: self.features,
            disk: self.disk.clone(),
            base,
            used,
            kick,
            call: state.call.clone(),
            inflight: records,
            recovered,
            counters: Arc::default(),
            notice: Notice::new(self.news.clone()),
        })
        .map_err(SessionError::Event)
    }
}

fn config_write(range: ConfigRange) -> SessionError {
    SessionError::ConfigWrite { offset: range.offset, size: range.size }
}
