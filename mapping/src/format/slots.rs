//! Two-slot records: the newer of two sealed sectors counts, and the next write spares it.
//!
//! Generation `g` lives in slot `g % 2`. A write that is lost or fails leaves the other slot, so a
//! record is always whole: it is the old one or the new one.

use bessel_reactor::units::BlockAddr;

use super::seal::{BLOCK, Damage, SECTOR, is_zero};
use crate::planted::{self, Bug};

/// What one slot of a pair holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Slot<T> {
    /// Nothing but zeroes.
    Empty,
    /// A record.
    Record(T),
    /// Something that is no record.
    Damaged(Damage),
}

impl<T> Slot<T> {
    /// What the block at `addr` holds; `decode` reads its first sector.
    pub(super) fn read(
        bytes: &[u8],
        addr: BlockAddr,
        decode: impl FnOnce(&[u8], BlockAddr) -> Result<T, Damage>,
    ) -> Self {
        assert_eq!(bytes.len(), BLOCK, "a slot is one block");
        if is_zero(&bytes[..SECTOR]) {
            return Self::Empty;
        }
        match decode(&bytes[..SECTOR], addr) {
            Ok(record) => Self::Record(record),
            Err(damage) => Self::Damaged(damage),
        }
    }
}

/// What a pair of slots comes to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SlotPair<T> {
    /// Never used.
    Empty,
    /// The record that counts, and what is wrong with the other slot, if anything is.
    Record(T, Option<Damage>),
    /// There was a record and none can be read.
    Damaged(Damage),
}

/// A slot that holds nothing, beside a record that has others (`has_others`: it was not the first, nor
/// is it the last that there will ever be), has lost what it held.
pub fn find_lost_slot<T>(
    slots: &mut [Slot<T>; 2],
    has_others: impl Fn(&T) -> bool,
    lost: impl Fn(usize) -> Damage,
) {
    for index in 0..2 {
        let beside = matches!(&slots[1 - index], Slot::Record(record) if has_others(record));
        if beside && matches!(slots[index], Slot::Empty) {
            slots[index] = Slot::Damaged(lost(index));
        }
    }
}

/// A record whose generation belongs into the other slot was put there by no writer: its successor
/// would go over it, and not beside it.
pub fn refuse_wrong_slot<T>(
    slots: &mut [Slot<T>; 2],
    generation: impl Fn(&T) -> u64,
    wrong: impl Fn(usize) -> Damage,
) {
    for (index, slot) in slots.iter_mut().enumerate() {
        if matches!(slot, Slot::Record(record) if generation(record) % 2 != index as u64) {
            *slot = Slot::Damaged(wrong(index));
        }
    }
}

/// Chooses between the two slots of a pair by `generation`.
pub fn choose_slot<T>(slots: [Slot<T>; 2], generation: impl Fn(&T) -> u64) -> SlotPair<T> {
    match slots {
        [Slot::Empty, Slot::Empty] => SlotPair::Empty,
        [Slot::Record(a), Slot::Record(b)] => {
            // A writer puts each generation into the slot of its parity, so the two differ.
            let first = (generation(&a) > generation(&b)) != planted::is(Bug::OlderSlotChosen);
            SlotPair::Record(if first { a } else { b }, None)
        }
        [Slot::Record(record), Slot::Empty] | [Slot::Empty, Slot::Record(record)] => {
            SlotPair::Record(record, None)
        }
        [Slot::Record(record), Slot::Damaged(damage)]
        | [Slot::Damaged(damage), Slot::Record(record)] => SlotPair::Record(record, Some(damage)),
        [Slot::Damaged(damage), _] | [_, Slot::Damaged(damage)] => SlotPair::Damaged(damage),
    }
}
