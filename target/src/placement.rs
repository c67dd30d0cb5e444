//! Which reactor serves which volume.
//!
//! A volume's mapping belongs to one reactor, its home; some of its queues may be polled on others. Volumes
//! go to the reactor with the fewest queues, in the order in which they are opened, so that a
//! restart with the same configuration places them as before. What they do there is not known yet; by
//! that they may be moved later (`balance.rs`).

use bessel_reactor::device::uring::WATCHES_MAX;

/// Most queues on one reactor: each is watched while the reactor sleeps, and so is its inbox.
const QUEUES_PER_REACTOR_MAX: usize = WATCHES_MAX - 1;

/// Queues promised to each reactor.
#[derive(Debug)]
pub(crate) struct Placement {
    queues: Vec<usize>,
}

/// Every reactor has as many queues as it can watch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "no reactor has room for {queues} more queues; delete volumes, offer fewer queues, or add cores \
     (each serves at most {QUEUES_PER_REACTOR_MAX})"
)]
pub(crate) struct NoRoom {
    queues: usize,
}

impl Placement {
    /// Empty reactors.
    ///
    /// # Panics
    /// When there is none.
    pub(crate) fn new(reactors: usize) -> Self {
        assert!(reactors > 0, "nothing to place on");
        Self { queues: vec![0; reactors] }
    }

    /// Gives a volume its home.
    pub(crate) fn place(&mut self, queues: u16) -> Result<usize, NoRoom> {
        let wanted = usize::from(queues);
        let least = self.queues.iter().enumerate().min_by_key(|(_, queues)| **queues);
        let (reactor, load) = least.expect("there is at least one reactor");
        if load + wanted > QUEUES_PER_REACTOR_MAX {
            return Err(NoRoom { queues: wanted });
        }
        self.queues[reactor] += wanted;
        Ok(reactor)
    }

    /// Makes room for a volume on the reactor that it is to be moved to.
    pub(crate) fn reserve(&mut self, reactor: usize, queues: u16) -> Result<(), NoRoom> {
        let wanted = usize::from(queues);
        if self.queues[reactor] + wanted > QUEUES_PER_REACTOR_MAX {
            return Err(NoRoom { queues: wanted });
        }
        self.queues[reactor] += wanted;
        Ok(())
    }

    /// Keeps room on other reactors for queues of a volume, which take turns at them and at its home. Those
    /// that are more than half full are for volumes of their own. Returns which have any, and how much each.
    pub(crate) fn reserve_visits(&mut self, others: Vec<usize>, queues: u16) -> (Vec<usize>, u16) {
        let mut found = others;
        loop {
            let each = queues.div_ceil(found.len() as u16 + 1);
            let room = |reactor: &usize| {
                self.queues[*reactor] + usize::from(each) <= QUEUES_PER_REACTOR_MAX / 2
            };
            let before = found.len();
            found.retain(room);
            if found.len() == before {
                for reactor in &found {
                    self.queues[*reactor] += usize::from(each);
                }
                return (found, each);
            }
        }
    }

    /// Takes a volume off its home, or off a reactor that visits it.
    ///
    /// # Panics
    /// When the reactor has fewer queues.
    pub(crate) fn remove(&mut self, reactor: usize, queues: u16) {
        let load = &mut self.queues[reactor];
        *load = load.checked_sub(usize::from(queues)).expect("what is removed was placed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visits_have_room_where_there_is_plenty_and_each_reactor_its_part() {
        let mut placement = Placement::new(4);
        assert_eq!(placement.reserve_visits(vec![1, 2, 3], 4), (vec![1, 2, 3], 1));
        assert_eq!(placement.reserve_visits(vec![1, 2], 4), (vec![1, 2], 2));
        // The more one has to have, the fewer have room for it.
        placement.queues = vec![0, QUEUES_PER_REACTOR_MAX / 2 - 1, 0, QUEUES_PER_REACTOR_MAX / 2];
        assert_eq!(placement.reserve_visits(vec![1, 2, 3], 4), (vec![2], 2));
        assert_eq!(placement.queues[1..3], [QUEUES_PER_REACTOR_MAX / 2 - 1, 2]);
        placement.remove(2, 2);
        placement.queues[2] = QUEUES_PER_REACTOR_MAX / 2;
        assert_eq!(placement.reserve_visits(vec![1, 2, 3], 4), (vec![], 4));
    }

    #[test]
    fn volumes_go_where_the_fewest_queues_are() {
        let mut placement = Placement::new(3);
        assert_eq!(placement.place(4), Ok(0));
        assert_eq!(placement.place(1), Ok(1));
        assert_eq!(placement.place(2), Ok(2));
        assert_eq!(placement.place(1), Ok(1));
        assert_eq!(placement.place(1), Ok(1));
        placement.remove(0, 4);
        assert_eq!(placement.place(8), Ok(0));
    }

    #[test]
    fn a_reactor_gets_no_more_queues_than_it_can_watch() {
        let mut placement = Placement::new(1);
        for _ in 0..WATCHES_MAX / 64 - 1 {
            placement.place(64).unwrap();
        }
        assert_eq!(placement.place(64), Err(NoRoom { queues: 64 }));
        assert_eq!(placement.reserve(0, 64), Err(NoRoom { queues: 64 }));
        assert_eq!(placement.place(62), Ok(0));
        assert_eq!(placement.reserve(0, 1), Ok(()));
        assert_eq!(placement.place(1), Err(NoRoom { queues: 1 }));
    }
}
