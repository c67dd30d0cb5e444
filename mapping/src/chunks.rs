//! A queue that grows without moving what is in it, and gives its memory back.
//!
//! What a discard of terabytes frees would, in a [`VecDeque`], be copied each time that grows: millions of
//! entries in one turn.

use std::collections::VecDeque;

/// Entries in a chunk.
const CHUNK: usize = 1024;

/// First in, first out. Nothing is allocated while it is short.
#[derive(Debug)]
pub(crate) struct Chunks<T> {
    /// None is empty unless it is the only one.
    chunks: VecDeque<VecDeque<T>>,
}

impl<T> Chunks<T> {
    /// An empty one with room for so many before anything is allocated.
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Self { chunks: VecDeque::from([VecDeque::with_capacity(capacity)]) }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.front().is_none()
    }

    pub(crate) fn front(&self) -> Option<&T> {
        self.chunks[0].front()
    }

    pub(crate) fn back_mut(&mut self) -> Option<&mut T> {
        self.chunks.back_mut().and_then(VecDeque::back_mut)
    }

    pub(crate) fn push_back(&mut self, entry: T) {
        if self.chunks.back().is_none_or(|chunk| chunk.len() >= CHUNK) {
            self.chunks.push_back(VecDeque::with_capacity(CHUNK));
        }
        self.chunks.back_mut().expect("there is one now").push_back(entry);
    }

    pub(crate) fn pop_front(&mut self) -> Option<T> {
        let entry = self.chunks[0].pop_front();
        if self.chunks[0].is_empty() && self.chunks.len() > 1 {
            self.chunks.pop_front();
        }
        entry
    }

    /// Oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.chunks.iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out_in_order_however_many_there_are() {
        let mut queue = Chunks::with_capacity(8);
        let (mut pushed, mut popped) = (0, 0);
        // Up and down, past the ends of chunks and to nothing in between.
        for (more, less) in
            [(3, 3), (1, 0), (5000, 10), (0, 4990), (2048, 2049), (9000, 8999), (7, 8)]
        {
            for _ in 0..more {
                queue.push_back(pushed);
                pushed += 1;
                assert_eq!(queue.back_mut(), Some(&mut (pushed - 1)));
            }
            assert!(queue.iter().copied().eq(popped..pushed));
            for _ in 0..less {
                assert_eq!(queue.front(), Some(&popped));
                assert_eq!(queue.pop_front(), Some(popped));
                popped += 1;
            }
            assert_eq!(queue.is_empty(), pushed == popped, "{more}, {less}");
        }
        assert_eq!((queue.pop_front(), queue.back_mut()), (None, None));
    }

    #[test]
    fn its_memory_is_given_back() {
        let mut queue = Chunks::with_capacity(8);
        (0..100 * CHUNK).for_each(|at| queue.push_back(at));
        (0..100 * CHUNK).for_each(|_| assert!(queue.pop_front().is_some()));
        assert_eq!(queue.chunks.len(), 1);
    }
}
