//! A virtio-blk request, or the status byte that refuses it.
//!
//! Pure functions of bytes that were copied out of guest memory once: nothing here reads it again.

use bessel_reactor::units::{SECTOR_SIZE, Sector};

use crate::disk::DISCARD_SECTORS_MAX;

/// Bytes of the header of every request: type, reserved, sector.
pub(crate) const HEADER_SIZE: usize = 16;
/// Bytes of one discard or write-zeroes range: sector, count, flags.
pub(crate) const RANGE_SIZE: usize = 16;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

/// The only flag of a range: the device may deallocate.
const FLAG_UNMAP: u32 = 1;

/// What the guest wants of the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RequestKind {
    /// Fill the segments.
    Read,
    /// Take the bytes of the segments.
    Write,
    /// Make everything completed so far durable.
    Flush,
    /// The sectors are no longer needed.
    Discard,
    /// The sectors shall read as zero.
    WriteZeroes {
        /// They may be deallocated for it.
        unmap: bool,
    },
}

/// How a request ended, as the guest reads it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Status {
    /// VIRTIO_BLK_S_OK
    Done = 0,
    /// VIRTIO_BLK_S_IOERR
    IoError = 1,
    /// VIRTIO_BLK_S_UNSUPP
    Unsupported = 2,
}

/// What of the disk and the negotiation decides about a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// The first sector that does not exist.
    pub(crate) capacity: Sector,
    pub(crate) read_only: bool,
    pub(crate) discard: bool,
    pub(crate) write_zeroes: bool,
}

/// Byte counts of a chain's payload, header and status taken off.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Payload {
    /// The guest gives.
    pub(crate) readable: u64,
    /// The guest takes.
    pub(crate) writable: u64,
}

/// What becomes of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// It goes to the volume.
    Forward { kind: RequestKind, sector: Sector, sectors: u64 },
    /// It goes to the volume if its range, still to be read, is good.
    NeedsRange { kind: RangeKind },
    /// The disk's name is the answer.
    GetId,
    /// It is answered at once.
    Answer(Status),
}

/// Which request carries a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum RangeKind {
    Discard,
    WriteZeroes,
}

/// Judges a request by its header and the lengths of its payload.
pub(crate) fn judge(header: &[u8; HEADER_SIZE], payload: Payload, rules: Rules) -> Verdict {
    let sector = Sector::new(u64_at(header, 8));
    match u32_at(header, 0) {
        TYPE_IN => judge_transfer(RequestKind::Read, sector, payload.writable, rules),
        TYPE_OUT if rules.read_only => Verdict::Answer(Status::IoError),
        TYPE_OUT => judge_transfer(RequestKind::Write, sector, payload.readable, rules),
        TYPE_FLUSH => {
            Verdict::Forward { kind: RequestKind::Flush, sector: Sector::new(0), sectors: 0 }
        }
        TYPE_GET_ID if payload.writable == 0 => Verdict::Answer(Status::IoError),
        TYPE_GET_ID => Verdict::GetId,
        TYPE_DISCARD if rules.discard => judge_range_length(RangeKind::Discard, payload, rules),
        TYPE_WRITE_ZEROES if rules.write_zeroes => {
            judge_range_length(RangeKind::WriteZeroes, payload, rules)
        }
        _ => Verdict::Answer(Status::Unsupported),
    }
}

fn judge_transfer(kind: RequestKind, sector: Sector, bytes: u64, rules: Rules) -> Verdict {
    let sectors = bytes / SECTOR_SIZE;
    if !bytes.is_multiple_of(SECTOR_SIZE) || !inside(sector, sectors, rules.capacity) {
        return Verdict::Answer(Status::IoError);
    }
    if sectors == 0 {
        return Verdict::Answer(Status::Done);
    }
    Verdict::Forward { kind, sector, sectors }
}

/// One range exactly: `max_discard_seg` and `max_write_zeroes_seg` are 1.
fn judge_range_length(kind: RangeKind, payload: Payload, rules: Rules) -> Verdict {
    if rules.read_only || payload.readable == 0 {
        return Verdict::Answer(Status::IoError);
    }
    if payload.readable == RANGE_SIZE as u64 {
        return Verdict::NeedsRange { kind };
    }
    let whole = payload.readable.is_multiple_of(RANGE_SIZE as u64);
    Verdict::Answer(if whole { Status::Unsupported } else { Status::IoError })
}

/// Judges the range of a discard or write-zeroes request.
pub(crate) fn judge_range(kind: RangeKind, range: &[u8; RANGE_SIZE], rules: Rules) -> Verdict {
    let sector = Sector::new(u64_at(range, 0));
    let sectors = u32_at(range, 8);
    let flags = u32_at(range, 12);
    let unmap = flags & FLAG_UNMAP != 0;
    if flags & !FLAG_UNMAP != 0 || (unmap && kind == RangeKind::Discard) {
        return Verdict::Answer(Status::Unsupported);
    }
    if sectors > DISCARD_SECTORS_MAX || !inside(sector, sectors.into(), rules.capacity) {
        return Verdict::Answer(Status::IoError);
    }
    if sectors == 0 {
        return Verdict::Answer(Status::Done);
    }
    let kind = match kind {
        RangeKind::Discard => RequestKind::Discard,
        RangeKind::WriteZeroes => RequestKind::WriteZeroes { unmap },
    };
    Verdict::Forward { kind, sector, sectors: sectors.into() }
}

/// Whether the sectors lie inside the volume; written so that nothing can overflow.
fn inside(sector: Sector, sectors: u64, capacity: Sector) -> bool {
    sector <= capacity && sectors <= capacity.get() - sector.get()
}

fn u32_at(bytes: &[u8; 16], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8; 16], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules =
        Rules { capacity: Sector::new(100), read_only: false, discard: true, write_zeroes: true };
    const IO_ERROR: Verdict = Verdict::Answer(Status::IoError);
    const UNSUPPORTED: Verdict = Verdict::Answer(Status::Unsupported);

    fn header(kind: u32, sector: u64) -> [u8; 16] {
        let mut bytes = [0xff; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        bytes
    }

    fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
        bytes[12..].copy_from_slice(&flags.to_le_bytes());
        bytes
    }

    fn read(sector: u64, bytes: u64) -> Verdict {
        judge(&header(TYPE_IN, sector), Payload { readable: 0, writable: bytes }, RULES)
    }

    #[test]
    fn a_transfer_must_lie_inside_the_volume_and_be_whole_sectors() {
        let forward =
            Verdict::Forward { kind: RequestKind::Read, sector: Sector::new(99), sectors: 1 };
        assert_eq!(read(99, 512), forward);
        assert_eq!(read(99, 1024), IO_ERROR);
        assert_eq!(read(100, 512), IO_ERROR);
        assert_eq!(read(u64::MAX, 512), IO_ERROR);
        assert_eq!(read(1 << 55, 4096), IO_ERROR);
        assert_eq!(read(0, 511), IO_ERROR);
        assert_eq!(read(0, !511), IO_ERROR);
        assert_eq!(read(100, 0), Verdict::Answer(Status::Done));
    }

    #[test]
    fn a_read_only_disk_refuses_everything_that_writes() {
        let rules = Rules { read_only: true, ..RULES };
        let payload = Payload { readable: 512, writable: 0 };
        assert_eq!(judge(&header(TYPE_OUT, 0), payload, rules), IO_ERROR);
        let payload = Payload { readable: 16, writable: 0 };
        assert_eq!(judge(&header(TYPE_DISCARD, 0), payload, rules), IO_ERROR);
        assert_eq!(judge(&header(TYPE_WRITE_ZEROES, 0), payload, rules), IO_ERROR);
    }

    #[test]
    fn unknown_and_unnegotiated_types_are_unsupported() {
        let payload = Payload { readable: 16, writable: 0 };
        for kind in [2, 3, 9, 10, 12, 14, 16, u32::MAX] {
            assert_eq!(judge(&header(kind, 0), payload, RULES), UNSUPPORTED, "type {kind}");
        }
        let rules = Rules { discard: false, write_zeroes: false, ..RULES };
        assert_eq!(judge(&header(TYPE_DISCARD, 0), payload, rules), UNSUPPORTED);
        assert_eq!(judge(&header(TYPE_WRITE_ZEROES, 0), payload, rules), UNSUPPORTED);
    }

    #[test]
    fn range_requests_carry_one_range() {
        let judged =
            |readable| judge(&header(TYPE_DISCARD, 0), Payload { readable, writable: 0 }, RULES);
        assert_eq!(judged(16), Verdict::NeedsRange { kind: RangeKind::Discard });
        assert_eq!(judged(32), UNSUPPORTED);
        assert_eq!(judged(0), IO_ERROR);
        assert_eq!(judged(17), IO_ERROR);
    }

    #[test]
    fn ranges_are_checked_against_volume_limit_and_flags() {
        let discard = |bytes| judge_range(RangeKind::Discard, &bytes, RULES);
        let zeroes = |bytes| judge_range(RangeKind::WriteZeroes, &bytes, RULES);
        assert_eq!(discard(range(0, 8, FLAG_UNMAP)), UNSUPPORTED);
        assert_eq!(discard(range(0, 8, 2)), UNSUPPORTED);
        assert_eq!(zeroes(range(0, 8, 3)), UNSUPPORTED);
        assert_eq!(zeroes(range(99, 2, 0)), IO_ERROR);
        assert_eq!(zeroes(range(u64::MAX, 2, 0)), IO_ERROR);
        assert_eq!(discard(range(0, DISCARD_SECTORS_MAX + 1, 0)), IO_ERROR);
        assert_eq!(
            zeroes(range(1, 8, FLAG_UNMAP)),
            Verdict::Forward {
                kind: RequestKind::WriteZeroes { unmap: true },
                sector: Sector::new(1),
                sectors: 8
            }
        );
    }

    #[test]
    fn get_id_without_a_buffer_is_an_error() {
        let judged =
            |writable| judge(&header(TYPE_GET_ID, 0), Payload { readable: 0, writable }, RULES);
        assert_eq!(judged(0), IO_ERROR);
        assert_eq!(judged(20), Verdict::GetId);
        assert_eq!(judged(1), Verdict::GetId);
    }
}
