//! Which feature bits are offered, and nothing that does not work.
//!
//! Absent on purpose: IN_ORDER (requests complete in any order), packed rings, LOG_ALL and
//! LOG_SHMFD (live migration is later work).

/// VIRTIO_BLK_F_* and VIRTIO_F_* bits, as numbers for `1 << bit`.
mod bit {
    pub(super) const BLK_SIZE_MAX: u32 = 1;
    pub(super) const BLK_SEG_MAX: u32 = 2;
    pub(super) const BLK_RO: u32 = 5;
    pub(super) const BLK_BLK_SIZE: u32 = 6;
    pub(super) const BLK_FLUSH: u32 = 9;
    pub(super) const BLK_TOPOLOGY: u32 = 10;
    pub(super) const BLK_CONFIG_WCE: u32 = 11;
    pub(super) const BLK_MQ: u32 = 12;
    pub(super) const BLK_DISCARD: u32 = 13;
    pub(super) const BLK_WRITE_ZEROES: u32 = 14;
    pub(super) const RING_INDIRECT_DESC: u32 = 28;
    pub(super) const RING_EVENT_IDX: u32 = 29;
    pub(super) const VHOST_USER_PROTOCOL_FEATURES: u32 = 30;
    pub(super) const VERSION_1: u32 = 32;
}

/// A set of virtio features, as GET_FEATURES and SET_FEATURES carry it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct VirtioFeatures(u64);

impl VirtioFeatures {
    /// What a volume offers.
    pub(crate) fn offered(read_only: bool) -> Self {
        let mut bits = [
            bit::BLK_SIZE_MAX,
            bit::BLK_SEG_MAX,
            bit::BLK_BLK_SIZE,
            bit::BLK_FLUSH,
            bit::BLK_TOPOLOGY,
            bit::BLK_CONFIG_WCE,
            bit::BLK_MQ,
            bit::RING_INDIRECT_DESC,
            bit::RING_EVENT_IDX,
            bit::VHOST_USER_PROTOCOL_FEATURES,
            bit::VERSION_1,
        ]
        .iter()
        .fold(0, |bits, bit| bits | 1u64 << bit);
        bits |= if read_only {
            1 << bit::BLK_RO
        } else {
            1 << bit::BLK_DISCARD | 1 << bit::BLK_WRITE_ZEROES
        };
        Self(bits)
    }

    /// The wire form.
    pub(crate) const fn bits(self) -> u64 {
        self.0
    }

    /// What a front-end asks for, if all of it was offered; otherwise the bits that were not.
    pub(crate) fn acknowledge(self, bits: u64) -> Result<Self, u64> {
        let foreign = bits & !self.0;
        if foreign == 0 { Ok(Self(bits)) } else { Err(foreign) }
    }

    const fn has(self, bit: u32) -> bool {
        self.0 & (1 << bit) != 0
    }

    /// Rings start disabled and SET_VRING_ENABLE starts them.
    pub(crate) const fn protocol_features(self) -> bool {
        self.has(bit::VHOST_USER_PROTOCOL_FEATURES)
    }

    /// Notifications are asked for by index.
    pub(crate) const fn event_idx(self) -> bool {
        self.has(bit::RING_EVENT_IDX)
    }

    /// Chains may live in a table of their own.
    pub(crate) const fn indirect(self) -> bool {
        self.has(bit::RING_INDIRECT_DESC)
    }

    /// The guest knows about a write cache, so it may have one.
    pub(crate) const fn write_cache(self) -> bool {
        self.has(bit::BLK_FLUSH) || self.has(bit::BLK_CONFIG_WCE)
    }

    /// DISCARD requests are allowed.
    pub(crate) const fn discard(self) -> bool {
        self.has(bit::BLK_DISCARD)
    }

    /// WRITE_ZEROES requests are allowed.
    pub(crate) const fn write_zeroes(self) -> bool {
        self.has(bit::BLK_WRITE_ZEROES)
    }
}

/// A set of vhost-user protocol features.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct ProtocolFeatures(u64);

const PROTOCOL_MQ: u64 = 1 << 0;
const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
const PROTOCOL_BACKEND_REQ: u64 = 1 << 5;
const PROTOCOL_CONFIG: u64 = 1 << 9;
const PROTOCOL_INFLIGHT_SHMFD: u64 = 1 << 12;
const PROTOCOL_RESET_DEVICE: u64 = 1 << 13;
const PROTOCOL_CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
const PROTOCOL_STATUS: u64 = 1 << 16;

impl ProtocolFeatures {
    /// What every volume offers.
    pub(crate) const OFFERED: Self = Self(
        PROTOCOL_MQ
            | PROTOCOL_REPLY_ACK
            | PROTOCOL_BACKEND_REQ
            | PROTOCOL_CONFIG
            | PROTOCOL_INFLIGHT_SHMFD
            | PROTOCOL_RESET_DEVICE
            | PROTOCOL_CONFIGURE_MEM_SLOTS
            | PROTOCOL_STATUS,
    );

    /// The wire form.
    pub(crate) const fn bits(self) -> u64 {
        self.0
    }

    /// What a front-end asks for, if all of it was offered; otherwise the bits that were not.
    pub(crate) fn acknowledge(self, bits: u64) -> Result<Self, u64> {
        let foreign = bits & !self.0;
        if foreign == 0 { Ok(Self(bits)) } else { Err(foreign) }
    }

    /// Messages may ask for an acknowledgement.
    pub(crate) const fn reply_ack(self) -> bool {
        self.0 & PROTOCOL_REPLY_ACK != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_offered_cannot_be_acknowledged() {
        let offered = VirtioFeatures::offered(false);
        assert_eq!(offered.acknowledge(1 << 35), Err(1 << 35), "IN_ORDER");
        assert_eq!(offered.acknowledge(1 << 34 | 1 << 32), Err(1 << 34), "packed ring");
        assert!(offered.acknowledge(1 << 32 | 1 << 13).unwrap().discard());
        assert_eq!(ProtocolFeatures::OFFERED.acknowledge(1 << 1), Err(1 << 1), "LOG_SHMFD");
    }

    #[test]
    fn a_read_only_disk_says_so_and_offers_nothing_that_writes() {
        let offered = VirtioFeatures::offered(true);
        assert!(offered.has(bit::BLK_RO) && !offered.discard() && !offered.write_zeroes());
        assert!(!VirtioFeatures::offered(false).has(bit::BLK_RO));
    }
}
