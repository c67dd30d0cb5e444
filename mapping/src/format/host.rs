//! The host table: which daemons have attached, and whether they left cleanly.
//!
//! Attaching read-write raises the host's epoch, durably, before anything else is written. What an
//! earlier life of the host wrote can so be told from what this one does.

use bessel_reactor::clock::WallTime;
use bessel_reactor::units::BlockAddr;
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::name::{NAME_BYTES_MAX, decode_name, encode_name};
use super::seal::{BLOCK, Damage, Fault, Kind, Place, SECTOR, Seal, seal, unseal};
use super::slots::Slot;

/// A host record on the device.
///
/// | offset | size | field         | meaning                                          |
/// |-------:|-----:|---------------|--------------------------------------------------|
/// |      0 |    8 | `generation`  | counts writes of this record; slot = its parity  |
/// |      8 |    2 | `id`          | which host, its place in the table               |
/// |     10 |    1 | `clean`       | 1 when it detached in order, 0 while attached    |
/// |     11 |    1 | `name_length` | bytes of `name`                                  |
/// |     12 |    4 | reserved      | 0                                                |
/// |     16 |    8 | `epoch`       | how many times it has attached                   |
/// |     24 |    8 | `time`        | of this write, ns since 1970                     |
/// |     32 |   64 | `name`        | for people, zero-filled                          |
/// |     96 |   16 | `life`        | random name of the life that last served guests  |
/// |    112 |  384 | reserved      | 0                                                |
/// |    496 |   16 | seal          |                                                  |
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct DiskHost {
    generation: U64,
    id: U16,
    clean: u8,
    name_length: u8,
    reserved_12: [u8; 4],
    epoch: U64,
    time: U64,
    name: [u8; NAME_BYTES_MAX],
    life: [u8; 16],
    reserved_112: [u8; 384],
    seal: Seal,
}

const _: () = assert!(size_of::<DiskHost>() == SECTOR);

/// It is counted up from what is read, so what is read must leave room.
const GENERATION_MAX: u64 = 1 << 62;

/// A host that has attached to the store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostRecord {
    /// Counts writes of this record.
    pub generation: u64,
    /// Its place in the host table.
    pub id: u16,
    /// How many times it has attached.
    pub epoch: u64,
    /// It detached in order.
    pub clean: bool,
    /// For people; at most 64 bytes.
    pub name: String,
    /// Random name of the life of the daemon that last served guests from the store; zero before the
    /// first. Attaching does not change it: what a killed life left behind in memory
    /// ([`crate::journal`]) counts for as long as its name stands here.
    pub life: [u8; 16],
    /// When it attached or detached.
    pub time: WallTime,
}

impl HostRecord {
    /// Fills `out` with the block to write to `place`.
    ///
    /// # Panics
    /// When `out` is not one block, or the name is too long.
    pub fn encode_block(&self, out: &mut [u8], place: BlockAddr, secret: u64) {
        assert_eq!(out.len(), BLOCK, "a slot is one block");
        let (name_length, name) = encode_name(&self.name);
        let disk = DiskHost {
            generation: self.generation.into(),
            id: self.id.into(),
            clean: self.clean.into(),
            name_length,
            epoch: self.epoch.into(),
            time: self.time.as_unix_nanos().into(),
            name,
            life: self.life,
            ..DiskHost::new_zeroed()
        };
        out.fill(0);
        out[..SECTOR].copy_from_slice(disk.as_bytes());
        seal(&mut out[..SECTOR], Place::new(place, 0), Kind::Host, secret);
    }

    /// Reads the slot at `place`.
    pub fn decode_slot(bytes: &[u8], place: BlockAddr, secret: u64) -> Slot<Self> {
        Slot::read(bytes, place, |sector, place| Self::decode(sector, place, secret))
    }

    fn decode(bytes: &[u8], place: BlockAddr, secret: u64) -> Result<Self, Damage> {
        let place = Place::new(place, 0);
        unseal(bytes, place, Kind::Host, secret)?;
        let disk = DiskHost::ref_from_bytes(bytes).expect("a record is one sector");
        let bad = |what| place.damage(Kind::Host, Fault::Field(what));
        if disk.generation.get() > GENERATION_MAX {
            return Err(bad("a counter is larger than counting ever makes it"));
        }
        let name = decode_name(disk.name_length, &disk.name);
        Ok(Self {
            generation: disk.generation.get(),
            id: disk.id.get(),
            epoch: disk.epoch.get(),
            clean: disk.clean != 0,
            name: name.ok_or(bad("the name is no text"))?.to_owned(),
            life: disk.life,
            time: WallTime::from_unix_nanos(disk.time.get()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{SlotPair, choose_slot};

    const ADDR: BlockAddr = BlockAddr::new(32);
    const SECRET: u64 = 17;

    fn record(generation: u64) -> HostRecord {
        HostRecord {
            generation,
            id: 0,
            life: [5; 16],
            epoch: 9,
            clean: true,
            name: "rack-1".into(),
            time: WallTime::from_unix_nanos(5),
        }
    }

    fn block(generation: u64, place: BlockAddr) -> [u8; BLOCK] {
        let mut out = [0xff; BLOCK];
        record(generation).encode_block(&mut out, place, SECRET);
        out
    }

    #[test]
    fn a_record_comes_back_and_any_damage_is_found() {
        let mut bytes = block(1, ADDR);
        assert_eq!(HostRecord::decode_slot(&bytes, ADDR, SECRET), Slot::Record(record(1)));
        for byte in 0..SECTOR {
            bytes[byte] ^= 4;
            let slot = HostRecord::decode_slot(&bytes, ADDR, SECRET);
            assert!(matches!(slot, Slot::Damaged(_)), "byte {byte}");
            bytes[byte] ^= 4;
        }
        assert!(matches!(HostRecord::decode_slot(&bytes, ADDR.add(1), SECRET), Slot::Damaged(_)));
    }

    #[test]
    fn a_generation_that_cannot_be_counted_up_is_refused() {
        let whole = |generation| {
            let slot = HostRecord::decode_slot(&block(generation, ADDR), ADDR, SECRET);
            matches!(slot, Slot::Record(_))
        };
        assert!(whole(1 << 62) && !whole((1 << 62) + 2) && !whole(u64::MAX));
    }

    #[test]
    fn the_newer_whole_slot_counts() {
        let read = |bytes: &[u8], i| HostRecord::decode_slot(bytes, ADDR.add(i), SECRET);
        let pair = |a: &[u8], b: &[u8]| choose_slot([read(a, 0), read(b, 1)], |r| r.generation);
        let (second, third) = (block(2, ADDR), block(3, ADDR.add(1)));
        let mut bad = third;
        bad[20] ^= 1;
        let zero = [0; BLOCK];
        assert_eq!(pair(&second, &third), SlotPair::Record(record(3), None));
        assert!(matches!(pair(&second, &bad), SlotPair::Record(r, Some(_)) if r == record(2)));
        assert_eq!(pair(&zero, &third), SlotPair::Record(record(3), None));
        assert_eq!(pair(&zero, &zero), SlotPair::Empty);
        assert!(matches!(pair(&zero, &bad), SlotPair::Damaged(_)));
        assert!(matches!(pair(&bad, &bad), SlotPair::Damaged(_)));
    }
}
