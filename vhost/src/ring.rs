//! The three parts of a split ring, as offsets into windows of guest memory.
//!
//! Says where each field is and with which memory order it is read or written; what the values
//! mean is the queue's business. Every field is read once by each call.

#![forbid(unsafe_code)]

use std::sync::atomic::Ordering::{Acquire, Relaxed};

use crate::memory::Window;

pub(crate) const DESCRIPTOR_SIZE: usize = 16;
pub(crate) const DESC_NEXT: u16 = 1;
pub(crate) const DESC_WRITE: u16 = 2;
pub(crate) const DESC_INDIRECT: u16 = 4;
/// Available-ring flag: no interrupt wanted.
pub(crate) const AVAIL_NO_INTERRUPT: u16 = 1;
/// Used-ring flag: no kick wanted.
pub(crate) const USED_NO_NOTIFY: u16 = 1;

/// The three parts of a split ring.
#[derive(Debug)]
pub(crate) struct Ring {
    pub(crate) descriptors: Window,
    pub(crate) available: Window,
    pub(crate) used: Window,
    /// Descriptors, a power of two.
    pub(crate) size: u16,
}

impl Ring {
    /// Bytes of the three parts. The event indexes at the end exist only when negotiated.
    pub(crate) fn lengths(size: u16, event_idx: bool) -> [usize; 3] {
        let (size, event) = (usize::from(size), if event_idx { 2 } else { 0 });
        [DESCRIPTOR_SIZE * size, 4 + 2 * size + event, 4 + 8 * size + event]
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    pub(crate) fn available_index(&self) -> u16 {
        // Pairs with the guest's release of its ring entries and descriptors.
        self.available.load_u16(2, Acquire)
    }

    pub(crate) fn available_head(&self, index: u16) -> u16 {
        self.available.load_u16(4 + 2 * self.slot(index), Relaxed)
    }

    pub(crate) fn used_index(&self) -> u16 {
        self.used.load_u16(2, Relaxed)
    }

    /// Has the place of used element `index` brought to the processor's cache.
    #[inline]
    pub(crate) fn expect_used(&self, index: u16) {
        self.used.expect_to_write(4 + 8 * self.slot(index));
    }

    pub(crate) fn put_used(&self, index: u16, head: u16, length: u32) {
        let at = 4 + 8 * self.slot(index);
        self.used.store_u32(at, head.into(), Relaxed);
        self.used.store_u32(at + 4, length, Relaxed);
    }

    /// The index at which the guest wants its next interrupt.
    pub(crate) fn used_event(&self) -> u16 {
        self.available.load_u16(4 + 2 * usize::from(self.size), Relaxed)
    }

    /// Sets the index at which we want the next kick.
    pub(crate) fn set_available_event(&self, index: u16) {
        self.used.store_u16(4 + 8 * usize::from(self.size), index, Relaxed);
    }

    pub(crate) fn descriptor(&self, index: u16) -> Descriptor {
        let at = DESCRIPTOR_SIZE * usize::from(index);
        let address = self.descriptors.load_u64(at, Relaxed);
        let rest = self.descriptors.load_u64(at + 8, Relaxed);
        Descriptor::from_words(address, rest)
    }
}

/// A descriptor, copied out of guest memory once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) length: u32,
    flags: u16,
    pub(crate) next: u16,
}

impl Descriptor {
    pub(crate) fn from_words(address: u64, rest: u64) -> Self {
        Self { address, length: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }

    pub(crate) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Whether an index that moves from `old` to `new` passes `event` (virtio 1.2, 2.7.10).
pub(crate) fn crossed(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_crossed_once_whichever_way_indexes_wrap() {
        assert!(crossed(5, 5, 6), "the entry asked for");
        assert!(!crossed(5, 6, 7), "it is past");
        assert!(!crossed(5, 4, 5), "not yet");
        assert!(crossed(5, 0, 9));
        assert!(crossed(0xffff, 0xfffe, 2));
        assert!(!crossed(3, 0xfffe, 2));
        for event in [0u16, 7, 0x7fff, 0xffff] {
            let fired = (0..=0xffffu16).filter(|old| crossed(event, *old, old.wrapping_add(1)));
            assert_eq!(fired.count(), 1, "one step in 65536 crosses {event}");
        }
    }
}
