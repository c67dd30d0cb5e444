//! Random numbers for a new store, from the kernel.

use std::io::Read;

/// What a new store is made with.
pub(crate) struct Entropy {
    /// Its identity: a version 4 UUID (RFC 9562).
    pub(crate) uuid: [u8; 16],
    /// Keys its tags and seals.
    pub(crate) secret: u64,
}

/// Reads fresh random numbers.
pub(crate) fn read() -> std::io::Result<Entropy> {
    let mut random = std::fs::File::open("/dev/urandom")?;
    let (mut uuid, mut secret) = ([0; 16], [0; 8]);
    random.read_exact(&mut uuid)?;
    random.read_exact(&mut secret)?;
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Ok(Entropy { uuid, secret: u64::from_le_bytes(secret) })
}
