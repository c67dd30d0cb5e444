//! The thread of an import: it takes a stream apart ([`crate::stream`]) and has the home of a new volume
//! write what it brings.
//!
//! The volume has no record on the device until all of it is there and durable (docs/decisions/0013), and
//! until then the control plane keeps everybody else away from it. Whatever goes wrong, also that nobody
//! sends any more, leaves no volume: an [`Import`] that is dropped before its end takes it back.
//!
//! The stream is hostile. Data goes from the socket into memory that the device reads, a bounded number
//! of pieces at a time, so a fast client waits for a slow device and guests get their turn.

use crate::api::types::Imported;
use crate::api::{Refusal, RefusalKind};
use crate::attach::{CoreMessage, CorePort, Order, OrderMemory};
use crate::control::Control;
use crate::jobs::Job;
use crate::reference::SnapshotReference;
use crate::stream::{Decoder, Header, Part, StreamError};
use bessel_mapping::format::VOLUME_SIZE_MAX;
use bessel_mapping::request::{IoKind, IoStatus, VolumeHandle, VolumeId};
use bessel_reactor::units::{ByteCount, SECTOR_SIZE, Sector};
use std::io::Read;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Bytes that are written together.
const PIECE_BYTES: usize = 256 << 10;
/// Pieces of one import on their way to the device.
const PIECES_IN_FLIGHT: usize = 4;
/// What a volume whose size nobody knows yet begins with, and the least that it has when it grows. It
/// doubles, so that it never has a taller tree than its size in the end wants.
pub(crate) const SIZE_FIRST: ByteCount = ByteCount::new(1 << 30);

/// What is asked for.
pub(crate) struct ImportRequest {
    /// The new volume.
    pub(crate) name: String,
    /// The snapshot that the stream is a difference to.
    pub(crate) from: Option<SnapshotReference>,
}

/// A volume that was made to be filled.
pub(crate) struct ImportSeat {
    pub(crate) id: VolumeId,
    pub(crate) volume: VolumeHandle,
    /// Its home.
    pub(crate) port: CorePort,
    pub(crate) size: ByteCount,
    pub(crate) job: Job,
}

/// Does an import from start to end.
///
/// # Errors
/// Why there is no volume.
pub(crate) fn run(
    control: &Control,
    request: ImportRequest,
    source: impl Read,
) -> Result<Imported, Refusal> {
    let name = request.name.clone();
    let (header, decoder) = Decoder::new(source).map_err(|error| refuse_stream(&name, error))?;
    let seat = control.call_and_wait(move |plane| plane.begin_import(&request, &header))?;
    let mut import = Import::new(control, name, seat);
    let received = import.receive(&header, decoder);
    let published = received.and_then(|it| import.publish(it.size).map(|()| it.data_bytes));
    match published {
        Ok(data_bytes) => {
            let id = import.id;
            let volume = control.call_and_wait(move |plane| plane.serve_import(id))?;
            Ok(Imported { volume, data_bytes })
        }
        Err(refusal) => {
            import.give_up();
            Err(refusal)
        }
    }
}

/// What came.
#[derive(Clone, Copy, Debug)]
struct Received {
    /// Of the volume.
    size: ByteCount,
    data_bytes: u64,
}

/// A volume that is being filled. Dropped before its end, it leaves nothing.
struct Import<'a> {
    control: &'a Control,
    name: String,
    id: VolumeId,
    /// As it is now.
    size: ByteCount,
    job: Job,
    /// Bytes of the volume that have been passed.
    position: u64,
    orders: Orders,
    ended: bool,
}

impl<'a> Import<'a> {
    fn new(control: &'a Control, name: String, seat: ImportSeat) -> Self {
        let ImportSeat { id, volume, port, size, job } = seat;
        let orders = Orders::new(port, volume);
        Self { control, name, id, size, job, position: 0, orders, ended: false }
    }

    /// Writes what the stream brings, durably.
    fn receive<R: Read>(
        &mut self,
        header: &Header,
        mut decoder: Decoder<R>,
    ) -> Result<Received, Refusal> {
        let mut data_bytes = 0;
        loop {
            let part = decoder.part().map_err(|error| refuse_stream(&self.name, error))?;
            let (first, blocks) = match part {
                Part::Data { first, blocks } | Part::Hole { first, blocks } => (first, blocks),
                Part::End { size } => {
                    let size = size.unwrap_or(header.size);
                    self.job.set_total(size.get());
                    self.grow(size)?;
                    self.pass(size.get());
                    self.orders.flush().map_err(|why| self.refuse(why))?;
                    return Ok(Received { size, data_bytes });
                }
            };
            let start = ByteCount::from_blocks(first.get()).get();
            let end = start + ByteCount::from_blocks(blocks).get();
            if !header.is_sized() && end > self.size.get() {
                let doubled = ByteCount::new(end.next_power_of_two());
                self.grow(doubled.clamp(SIZE_FIRST, VOLUME_SIZE_MAX))?;
            }
            match part {
                Part::Data { .. } => data_bytes += self.write_data(&mut decoder, start, end)?,
                // Where a new volume has nothing, it reads as zeroes.
                _ if header.base.is_none() => {}
                _ => self.write_zeroes(start, end)?,
            }
            self.pass(end);
        }
    }

    /// Writes the data of a part. Returns how much of it is the volume's.
    fn write_data<R: Read>(
        &mut self,
        decoder: &mut Decoder<R>,
        start: u64,
        end: u64,
    ) -> Result<u64, Refusal> {
        let (mut at, mut data_bytes) = (start, 0);
        while at < end {
            let mut memory = self.orders.memory().map_err(|why| self.refuse(why))?;
            let count = decoder.data(memory.bytes_mut());
            let count = count.map_err(|error| refuse_stream(&self.name, error))? as u64;
            let inside = count.min(self.size.get().saturating_sub(at));
            self.orders.send(IoKind::Write, at, inside, memory);
            data_bytes += inside;
            at += count;
            self.pass(at);
        }
        Ok(data_bytes)
    }

    fn write_zeroes(&mut self, start: u64, end: u64) -> Result<(), Refusal> {
        let memory = self.orders.memory().map_err(|why| self.refuse(why))?;
        let inside = end.min(self.size.get()).saturating_sub(start);
        self.orders.send(IoKind::WriteZeroes, start, inside, memory);
        Ok(())
    }

    /// Gives the volume this size, unless it has it already.
    fn grow(&mut self, size: ByteCount) -> Result<(), Refusal> {
        if size > self.size {
            let id = self.id;
            self.control.call_and_wait(move |plane| plane.grow_import(id, size))?;
            self.size = size;
        }
        Ok(())
    }

    /// Tells that all before `position` is done.
    fn pass(&mut self, position: u64) {
        self.job.advance(position.saturating_sub(self.position));
        self.position = self.position.max(position);
    }

    /// Makes the volume one as any other.
    fn publish(&mut self, size: ByteCount) -> Result<(), Refusal> {
        let id = self.id;
        self.control.call_and_wait(move |plane| plane.publish_import(id, size))?;
        self.ended = true;
        Ok(())
    }

    /// Takes it back, and gives its space back first, as far as that is possible.
    fn give_up(mut self) {
        self.orders.discard(self.size);
        self.ended = true;
        let id = self.id;
        let abandon = move |plane: &mut crate::plane::ControlPlane| {
            plane.abandon_import(id);
            Ok(())
        };
        if let Err(refusal) = self.control.call_and_wait(abandon) {
            tracing::error!(
                volume = self.name,
                "what was imported could not be removed: {refusal}"
            );
        }
    }

    fn refuse(&self, status: Unwritten) -> Refusal {
        let (kind, why) = match status {
            Unwritten(IoStatus::NoSpace) => (
                RefusalKind::NoSpace,
                "the store is full (or its device has failed to give more, as the log then says); delete \
                 volumes or snapshots, or make the store larger",
            ),
            Unwritten(_) => (RefusalKind::Failed, "the store could not be written; see the log"),
        };
        Refusal::new(kind, format!("volume {:?} was not imported: {why}", self.name))
    }
}

impl Drop for Import<'_> {
    fn drop(&mut self) {
        if !self.ended {
            // Only after a panic.
            let id = self.id;
            let _ = self.control.send(move |plane| plane.abandon_import(id));
        }
    }
}

/// Why a stream brought no volume. What somebody of ours has said is passed on as it is.
fn refuse_stream(name: &str, error: StreamError) -> Refusal {
    if let StreamError::Read(error) = &error
        && let Some(refusal) = error.get_ref().and_then(|inner| inner.downcast_ref::<Refusal>())
    {
        let what = format!("volume {name:?} was not imported: {refusal}");
        return Refusal::new(refusal.kind, what);
    }
    Refusal::malformed(format!("volume {name:?} was not imported: of its stream, {error}"))
}

/// A request was not done.
#[derive(Clone, Copy, Debug)]
struct Unwritten(IoStatus);

/// What a volume's home is doing for us.
struct Orders {
    port: CorePort,
    volume: VolumeHandle,
    /// Memory that no order has.
    idle: Vec<OrderMemory>,
    answer: SyncSender<Box<Order>>,
    answers: Receiver<Box<Order>>,
    in_flight: usize,
    /// The first order that was not done.
    failed: Option<IoStatus>,
}

impl Orders {
    fn new(port: CorePort, volume: VolumeHandle) -> Self {
        let idle = (0..PIECES_IN_FLIGHT).map(|_| OrderMemory::new(PIECE_BYTES)).collect();
        let (answer, answers) = sync_channel(PIECES_IN_FLIGHT);
        Self { port, volume, idle, answer, answers, in_flight: 0, failed: None }
    }

    /// Memory for one more order, once there is some.
    fn memory(&mut self) -> Result<OrderMemory, Unwritten> {
        loop {
            while let Ok(order) = self.answers.try_recv() {
                self.take_back(*order);
            }
            if let Some(status) = self.failed {
                return Err(Unwritten(status));
            }
            match self.idle.pop() {
                Some(memory) => return Ok(memory),
                None => self.wait_for_one(),
            }
        }
    }

    fn wait_for_one(&mut self) {
        let order = self.answers.recv().expect("the other end is held here too");
        self.take_back(*order);
    }

    fn take_back(&mut self, order: Order) {
        self.in_flight -= 1;
        if order.status != IoStatus::Done {
            self.failed.get_or_insert(order.status);
        }
        self.idle.push(order.memory);
    }

    /// Has this done to so many bytes from `start` on. Nothing is done to no bytes, but for a flush.
    fn send(&mut self, kind: IoKind, start: u64, bytes: u64, memory: OrderMemory) {
        if bytes == 0 && kind != IoKind::Flush {
            self.idle.push(memory);
            return;
        }
        self.in_flight += 1;
        self.port.send(CoreMessage::Order(Box::new(Order {
            volume: self.volume,
            kind,
            sector: Sector::new(start / SECTOR_SIZE),
            sectors: bytes / SECTOR_SIZE,
            memory,
            status: IoStatus::Failed,
            answer: self.answer.clone(),
        })));
    }

    /// Waits until all is done and durable.
    fn flush(&mut self) -> Result<(), Unwritten> {
        while self.in_flight > 0 {
            self.wait_for_one();
        }
        let memory = self.memory()?;
        self.send(IoKind::Flush, 0, 0, memory);
        self.wait_for_one();
        self.failed.map_or(Ok(()), |status| Err(Unwritten(status)))
    }

    /// Gives back what the volume has been given. A volume that has failed keeps it.
    fn discard(&mut self, size: ByteCount) {
        while self.in_flight > 0 {
            self.wait_for_one();
        }
        self.failed = None;
        if let Ok(memory) = self.memory() {
            self.send(IoKind::Discard, 0, size.get(), memory);
        }
        let _ = self.flush();
    }
}
