//! Which file descriptors a sleeping reactor is woken by.
//!
//! A watch is a poll that the kernel answers once, put into the ring again before each sleep. That
//! makes it a watch on *readable*, so nothing that arrived between two sleeps is missed, and one
//! that fires while the reactor polls anyway costs nothing. Generations tell the answer to a
//! removed watch from one to its successor under the same number: a removed watch never fires.

use std::os::fd::RawFd;

/// Most watches at once: the vrings of two thousand volumes of four queues on one core. The answers
/// that they may owe have room in the completion ring, which has 65536 places at most.
pub const WATCHES_MAX: usize = 8192;

/// Names a watch; chosen by its owner, below [`WATCHES_MAX`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct WatchId(pub u32);

/// A watch in one of its lives, as it travels through the ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct WatchKey {
    watch: WatchId,
    generation: u32,
}

impl WatchKey {
    /// 24 bits of generation above 32 of number: the part of `user_data` that is ours.
    pub(super) fn to_bits(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.watch.0)
    }

    pub(super) fn from_bits(bits: u64) -> Self {
        Self { watch: WatchId(bits as u32), generation: (bits >> 32) as u32 }
    }
}

/// Generations wrap here. An answer cannot be that late: removals are few and answers prompt.
const GENERATIONS: u32 = 1 << 24;

#[derive(Clone, Copy, Debug)]
struct Watch {
    fd: Option<RawFd>,
    /// The kernel has a poll for it.
    armed: bool,
    generation: u32,
}

/// The table of watches.
#[derive(Debug)]
pub(super) struct Watches {
    table: Box<[Watch]>,
    /// Watches that must be armed before the next sleep; some may have been removed since.
    unarmed: Vec<WatchId>,
}

impl Watches {
    pub(super) fn new() -> Self {
        let watch = Watch { fd: None, armed: false, generation: 0 };
        Self {
            table: vec![watch; WATCHES_MAX].into_boxed_slice(),
            unarmed: Vec::with_capacity(WATCHES_MAX),
        }
    }

    fn get(&mut self, watch: WatchId) -> &mut Watch {
        self.table.get_mut(watch.0 as usize).unwrap_or_else(|| panic!("no room for {watch:?}"))
    }

    pub(super) fn add(&mut self, fd: RawFd, watch: WatchId) {
        let entry = self.get(watch);
        assert!(entry.fd.is_none(), "{watch:?} is taken");
        entry.fd = Some(fd);
        self.unarmed.push(watch);
    }

    /// Returns the poll that has to be taken back from the kernel.
    pub(super) fn remove(&mut self, watch: WatchId) -> Option<WatchKey> {
        let entry = self.get(watch);
        assert!(entry.fd.is_some(), "{watch:?} does not exist");
        let key = WatchKey { watch, generation: entry.generation };
        let armed = entry.armed;
        *entry = Watch { fd: None, armed: false, generation: (entry.generation + 1) % GENERATIONS };
        self.unarmed.retain(|waiting| *waiting != watch);
        armed.then_some(key)
    }

    /// The next watch that the kernel has no poll for; it counts as armed from here on.
    pub(super) fn next_to_arm(&mut self) -> Option<(WatchKey, RawFd)> {
        let watch = self.unarmed.pop()?;
        let entry = self.get(watch);
        let fd = entry.fd.expect("removing a watch takes it off the list");
        entry.armed = true;
        Some((WatchKey { watch, generation: entry.generation }, fd))
    }

    /// Takes the answer to a poll. Returns the watch unless it was removed meanwhile.
    ///
    /// A poll that failed (a descriptor closed under us) counts as fired: its owner looks and finds
    /// out, which beats a watch that has silently gone blind.
    pub(super) fn answered(&mut self, key: WatchKey) -> Option<WatchId> {
        let entry = self.get(key.watch);
        if entry.generation != key.generation {
            return None;
        }
        assert!(entry.armed, "an answer to a poll that was not asked for");
        entry.armed = false;
        self.unarmed.push(key.watch);
        Some(key.watch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_to_a_removed_watch_is_not_its_successors() {
        let mut watches = Watches::new();
        watches.add(3, WatchId(7));
        let (key, fd) = watches.next_to_arm().unwrap();
        assert_eq!(fd, 3);
        assert_eq!(watches.remove(WatchId(7)), Some(key));
        watches.add(4, WatchId(7));
        assert_eq!(watches.answered(key), None);
        let (successor, _) = watches.next_to_arm().unwrap();
        assert_eq!(watches.answered(WatchKey::from_bits(successor.to_bits())), Some(WatchId(7)));
    }

    #[test]
    fn a_watch_is_armed_once_for_each_answer() {
        let mut watches = Watches::new();
        watches.add(3, WatchId(0));
        let (key, _) = watches.next_to_arm().unwrap();
        assert_eq!(watches.next_to_arm(), None);
        assert_eq!(watches.answered(key), Some(WatchId(0)));
        assert_eq!(watches.next_to_arm(), Some((key, 3)));
    }

    #[test]
    fn a_watch_never_armed_needs_no_removal_by_the_kernel() {
        let mut watches = Watches::new();
        watches.add(3, WatchId(1));
        assert_eq!(watches.remove(WatchId(1)), None);
        assert_eq!(watches.next_to_arm(), None);
    }

    #[test]
    #[should_panic(expected = "is taken")]
    fn a_number_taken_twice_is_our_bug() {
        let mut watches = Watches::new();
        watches.add(3, WatchId(1));
        watches.add(4, WatchId(1));
    }
}
