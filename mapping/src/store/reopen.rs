//! Reading one volume of an open store again: it was closed because the device had failed, and what
//! was known of it may not be what the device holds.

use bessel_reactor::device::{Device, DeviceError};
use bessel_reactor::units::BLOCK_SIZE;

use super::OpenedStore;
use super::open::{Losses, VolumeFault, check_root, read_pair, read_tail, wrong_slot, zero_block};
use crate::blocking::Blocking;
use crate::directory::VolumeEntry;
use crate::format::{
    Geometry, SlotPair, VolumeRecord, choose_slot, find_lost_slot, refuse_wrong_slot, seal,
};
use crate::request::VolumeId;

/// Why a volume could not be read again.
#[derive(Debug, thiserror::Error)]
pub enum ReopenError {
    /// The device failed.
    #[error("its record in registry slot {slot} cannot be read")]
    Device {
        /// Where the record lies.
        slot: u32,
        /// How the device failed.
        #[source]
        source: DeviceError,
    },
    /// Neither copy of the record is whole, or it is another volume's.
    #[error("registry slot {slot}: {what}; run `bessel check`")]
    Record {
        /// Where the record lies.
        slot: u32,
        /// What is wrong with it.
        what: String,
    },
    /// Its record is whole and what it leads to is not.
    #[error("{0}; run `bessel check`")]
    Corrupt(String),
}

/// Reads the record in a slot of the registry.
///
/// # Errors
/// The device's.
pub(crate) fn read_record<D: Device>(
    io: &mut Blocking<'_, D>,
    geometry: &Geometry,
    secret: u64,
    slot: u32,
) -> Result<SlotPair<VolumeRecord>, DeviceError> {
    let start = geometry.registry_slot(slot, 0);
    let mut bytes = [0; 2 * BLOCK_SIZE as usize];
    io.read_into(start, &mut bytes)?;
    let mut pair =
        read_pair(&bytes, start, |block, addr| VolumeRecord::decode_slot(block, addr, secret));
    let wrong = |index: usize| wrong_slot(seal::Kind::Volume, start.add(index as u64));
    refuse_wrong_slot(&mut pair, |record| record.generation, wrong);
    let lost = |index: usize| zero_block(seal::Kind::Volume, start.add(index as u64));
    find_lost_slot(&mut pair, |record| record.generation > 1 && !record.deleted, lost);
    Ok(choose_slot(pair, |record| record.generation))
}

/// Reads record and snapshot log of volume `id`, whose record lies in `slot` of the registry, from
/// the device as they are now. Nobody has the volume open.
///
/// # Errors
/// Why it cannot be opened. Nothing is written in any case.
pub fn reread<D: Device>(
    device: &mut D,
    store: &OpenedStore,
    slot: u32,
    id: VolumeId,
) -> Result<VolumeEntry, ReopenError> {
    let mut io = Blocking::new(device);
    let pair = read_record(&mut io, &store.geometry, store.secret, slot)
        .map_err(|source| ReopenError::Device { slot, source })?;
    let wrong = |what| Err(ReopenError::Record { slot, what });
    let record = match pair {
        SlotPair::Record(record, _) if record.id == id => record,
        SlotPair::Record(record, _) => {
            return wrong(format!("it holds volume {}, not {id}", record.id));
        }
        SlotPair::Empty => return wrong(format!("it is empty; volume {id} is gone")),
        SlotPair::Damaged(damage) => return wrong(damage.to_string()),
    };
    let mut none = Losses::none(store.geometry);
    let corrupt = |fault: VolumeFault| ReopenError::Corrupt(fault.2);
    check_root(store, &mut none, record.root, record.deleted).map_err(corrupt)?;
    let tail = read_tail(&mut io, store, &mut none, &record).map_err(corrupt)?;
    Ok(VolumeEntry { slot, record, tail })
}
