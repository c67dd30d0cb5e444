//! Slots made at start, handed out by index: contexts of requests and pieces of I/O.

use crate::planted::{self, Bug};

/// Whether a volume may have one more of something of which `free` of `all` are free: it holds three times as
/// many as are free at most. One by itself gets three quarters, so that whoever comes finds room, however
/// long it is until something ends; several get the same each (*dynamic thresholds*: Choudhury and Hahne,
/// Dynamic queue length thresholds for shared-memory packet switches, 1998).
///
/// How many it holds is asked only when that counts: with more than a quarter free, the threshold is above all
/// that are taken.
#[inline]
pub(crate) fn may_have(free: usize, all: usize, held: impl FnOnce() -> usize) -> bool {
    if planted::is(Bug::NoRoomForOthers) {
        return free > 0;
    }
    4 * free > all || held() < 3 * free
}

/// A fixed number of slots. Taking and freeing never allocates.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    slots: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            slots: (0..capacity).map(|_| None).collect(),
            free: (0..capacity as u32).rev().collect(),
        }
    }

    /// Whether a volume that holds so many slots may have one more: see [`may_have`].
    #[inline]
    pub(crate) fn has_room(&self, held: impl FnOnce() -> usize) -> bool {
        may_have(self.free.len(), self.slots.len(), held)
    }

    pub(crate) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    pub(crate) fn capacity(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn available(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// # Panics
    /// When full: callers check first.
    pub(crate) fn insert(&mut self, value: T) -> u32 {
        let index = self.free.pop().expect("callers check for room first");
        self.slots[index as usize] = Some(value);
        index
    }

    pub(crate) fn remove(&mut self, index: u32) -> T {
        let value = self.slots[index as usize].take().expect("slot is taken");
        self.free.push(index);
        value
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().flatten()
    }
}

impl<T> std::ops::Index<u32> for Slab<T> {
    type Output = T;

    fn index(&self, index: u32) -> &T {
        self.slots[index as usize].as_ref().expect("slot is taken")
    }
}

impl<T> std::ops::IndexMut<u32> for Slab<T> {
    fn index_mut(&mut self, index: u32) -> &mut T {
        self.slots[index as usize].as_mut().expect("slot is taken")
    }
}
