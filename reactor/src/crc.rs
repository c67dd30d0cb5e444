//! CRC32C of many words, one by one, by the processor's own instruction.
//!
//! Libraries compute the CRC of one long message and spend more on finding out how than eight bytes
//! take.

/// Folds over every word and the CRC32C of those of its eight bytes' bits that `mask` has,
/// little-endian. Nothing on a processor without an instruction for that.
pub fn fold_crc32c<T>(
    words: &[u64],
    mask: u64,
    start: T,
    step: impl FnMut(T, u64, u32) -> T,
) -> Option<T> {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("sse4.2") {
        // SAFETY: the processor has been asked.
        return Some(unsafe { by_instruction(words, mask, start, step) });
    }
    let _ = (words, mask, start, step);
    None
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
fn by_instruction<T>(
    words: &[u64],
    mask: u64,
    start: T,
    mut step: impl FnMut(T, u64, u32) -> T,
) -> T {
    // Not `Iterator::fold`: it has not the feature, so nothing with the instruction is inlined there.
    let mut state = start;
    for word in words {
        let register = std::arch::x86_64::_mm_crc32_u64(u64::from(u32::MAX), word & mask);
        state = step(state, *word, !(register as u32));
    }
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_crc_that_the_world_calls_crc32c() {
        let of = |words: &[u64], mask| {
            fold_crc32c(words, mask, Vec::new(), |mut all, word, crc| {
                all.push((word, crc));
                all
            })
        };
        let message = u64::from_le_bytes(*b"12345678");
        if let Some(found) = of(&[message, 0, u64::MAX], !0) {
            assert_eq!(found, [(message, 0x6087_809a), (0, 0x8c28_b28a), (!0, 0x4867_4bc7)]);
        }
        if let Some(found) = of(&[message | 1 << 63], message) {
            assert_eq!(found, [(message | 1 << 63, 0x6087_809a)]);
        }
    }
}
