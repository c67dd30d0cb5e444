//! What the guest sees of a volume before its first request: size, identity, limits.
//!
//! [`DiskInfo`] is what the caller says; [`Disk`] is the same, shared by a server and its queues,
//! with the size as an atomic so that a volume can grow while it is served.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bessel_reactor::units::{SECTOR_SIZE, Sector};

/// Bytes of a GET_ID answer (virtio 1.2, 5.2.6.1).
pub(crate) const ID_SIZE: usize = 20;
/// Bytes of `struct virtio_blk_config` up to and with the write-zeroes fields.
pub(crate) const CONFIG_SIZE: usize = 60;
/// Offset of `writeback`, the only field a guest may write.
pub(crate) const CONFIG_WRITEBACK_OFFSET: usize = 32;
/// Most data segments in a request. A queue of 128, the usual size, less header and status.
pub(crate) const SEG_MAX: u32 = 126;
/// Longest data segment in bytes. Large enough never to split what a guest can merge.
const SIZE_MAX: u32 = 4 << 20;
/// Most sectors in one discard or write-zeroes request: 2 GiB.
pub(crate) const DISCARD_SECTORS_MAX: u32 = 1 << 22;
/// Most queues: SET_VRING_KICK has eight bits for the index.
const QUEUES_MAX: u16 = 256;
/// Largest split ring (virtio 1.2, 2.7).
pub(crate) const QUEUE_SIZE_LIMIT: u16 = 32768;

/// What a volume's guest is told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskInfo {
    /// Answer to GET_ID, cut to 20 bytes; also names the volume in log lines.
    pub id: String,
    /// Size in 512-byte sectors.
    pub capacity_sectors: u64,
    /// Refuse writes, discards and write-zeroes.
    pub read_only: bool,
    /// Queues offered, 1 to 256.
    pub num_queues: u16,
    /// Largest ring a front-end may set up, a power of two up to 32768.
    pub queue_size_max: u16,
    /// Whether the volume starts with a write cache. A guest that does not negotiate FLUSH is
    /// always served without one.
    pub writeback: bool,
}

/// A [`DiskInfo`] in use.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) info: DiskInfo,
    pub(crate) id: [u8; ID_SIZE],
    capacity_sectors: AtomicU64,
    /// The front-end has not been told the size yet.
    resized: AtomicBool,
}

impl Disk {
    /// # Panics
    /// When a field is outside the range its documentation gives: the caller checks configuration.
    pub(crate) fn new(info: DiskInfo) -> Self {
        assert!((1..=QUEUES_MAX).contains(&info.num_queues), "{} queues", info.num_queues);
        assert!(
            info.queue_size_max.is_power_of_two() && info.queue_size_max <= QUEUE_SIZE_LIMIT,
            "queue size {}",
            info.queue_size_max
        );
        let mut id = [0; ID_SIZE];
        let length = info.id.len().min(ID_SIZE);
        id[..length].copy_from_slice(&info.id.as_bytes()[..length]);
        let capacity_sectors = AtomicU64::new(info.capacity_sectors);
        Self { info, id, capacity_sectors, resized: AtomicBool::new(false) }
    }

    /// The first sector that does not exist.
    pub(crate) fn capacity(&self) -> Sector {
        Sector::new(self.capacity_sectors.load(Ordering::Relaxed))
    }

    /// Changes the size; requests popped from now on are checked against it.
    pub(crate) fn set_capacity(&self, end: Sector) {
        self.capacity_sectors.store(end.get(), Ordering::Relaxed);
        self.resized.store(true, Ordering::Release);
    }

    /// Whether the size has changed since the last call.
    pub(crate) fn take_resized(&self) -> bool {
        self.resized.swap(false, Ordering::AcqRel)
    }

    /// The configuration space as the guest reads it.
    pub(crate) fn config_space(&self, writeback: bool) -> [u8; CONFIG_SIZE] {
        let mut space = [0; CONFIG_SIZE];
        let mut put = |offset: usize, bytes: &[u8]| {
            space[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &self.capacity().get().to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR_SIZE as u32).to_le_bytes()); // blk_size
        put(24, &[3, 0]); // physical_block_exp: 2^3 sectors are one block; alignment_offset
        put(26, &8u16.to_le_bytes()); // min_io_size: one block
        put(28, &256u32.to_le_bytes()); // opt_io_size: 128 KiB
        put(CONFIG_WRITEBACK_OFFSET, &[u8::from(writeback)]);
        put(34, &self.info.num_queues.to_le_bytes());
        put(36, &DISCARD_SECTORS_MAX.to_le_bytes());
        put(40, &1u32.to_le_bytes()); // max_discard_seg
        put(44, &8u32.to_le_bytes()); // discard_sector_alignment: one block
        put(48, &DISCARD_SECTORS_MAX.to_le_bytes()); // max_write_zeroes_sectors
        put(52, &1u32.to_le_bytes()); // max_write_zeroes_seg
        put(56, &[1]); // write_zeroes_may_unmap
        space
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn info() -> DiskInfo {
        DiskInfo {
            id: "a volume with a name longer than twenty bytes".into(),
            capacity_sectors: 0x1234,
            read_only: false,
            num_queues: 2,
            queue_size_max: 1024,
            writeback: true,
        }
    }

    #[test]
    fn the_configuration_space_follows_the_specification_and_the_size() {
        let disk = Disk::new(info());
        let space = disk.config_space(true);
        assert_eq!(space[..8], 0x1234u64.to_le_bytes());
        assert_eq!(space[20..24], 512u32.to_le_bytes());
        assert_eq!(space[32], 1);
        assert_eq!(space[34..36], [2, 0]);
        assert_eq!(space[57..], [0; 3]);
        disk.set_capacity(Sector::new(0x9999));
        assert_eq!(disk.config_space(false)[..2], [0x99, 0x99]);
        assert_eq!(disk.config_space(false)[32], 0);
    }

    #[test]
    fn a_long_name_is_cut_in_the_id() {
        assert_eq!(&Disk::new(info()).id, b"a volume with a name");
    }
}
