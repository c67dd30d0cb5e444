//! What a tree was derived from: the link that makes a forest of the trees of a store.

/// The tree that a tree began as a copy of.
///
/// On the device a 64-bit number: 0 unknown, 1 the origin, else 2 more than the snapshot's sequence.
/// Stores of programs that did not keep it have zeroes there.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Parent {
    /// Nobody has noted it.
    #[default]
    Unknown,
    /// The snapshot that the volume is a clone of; nothing, when it is no clone.
    Origin,
    /// The snapshot of the same volume with this sequence.
    Snapshot(u64),
}

impl Parent {
    /// As it lies on the device.
    pub(super) const fn encode(self) -> u64 {
        match self {
            Self::Unknown => 0,
            Self::Origin => 1,
            Self::Snapshot(sequence) => sequence + 2,
        }
    }

    /// From the device. None when it is a snapshot that is not before `end`: a tree begins as a copy
    /// of what was there.
    pub(super) const fn decode(number: u64, end: u64) -> Option<Self> {
        match number {
            0 => Some(Self::Unknown),
            1 => Some(Self::Origin),
            above if above - 2 < end => Some(Self::Snapshot(above - 2)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_what_lies_ahead_is_refused() {
        for parent in [Parent::Unknown, Parent::Origin, Parent::Snapshot(0), Parent::Snapshot(6)] {
            assert_eq!(Parent::decode(parent.encode(), 7), Some(parent));
        }
        assert_eq!(Parent::decode(Parent::Snapshot(7).encode(), 7), None);
        assert_eq!(Parent::decode(u64::MAX, 7), None);
        assert_eq!(Parent::decode(0, 0), Some(Parent::Unknown), "bytes that nobody wrote");
    }
}
