//! How much each volume may hand to the shard in a turn of its reactor.
//!
//! Hot path. Volumes share, not queues: a guest does not get more for having made more queues. While
//! requests of several volumes wait, each of these may hand in as many, and as many bytes, as a single
//! queue may; while only one has any, each of its queues may.
//!
//! Queues of a volume take turns at its share. A turn that ends in the middle of somebody's share, since
//! the volume's was spent or since the shard had no room for it, goes on there in the next one, with what
//! was left: whoever is small or late is not passed over for that. How much of the shard's room a volume
//! may have is for the shard.
//!
//! Nothing here looks at a queue or at a clock: it is told what waits, and says who is next.

use bessel_mapping::request::VolumeHandle;

/// Most requests admitted from one queue in a turn, of few that wait and of many: a quarter of them in
/// between. Enough to batch submissions, few enough that a deep queue does not make its neighbours wait;
/// and that the guest is busy with the first answers while the last requests are served. On a null
/// device and at depth 32, 8 a turn came to 4.4 to 4.6 million reads a second, 16 to 3.8 and 32 to 3.6;
/// at depth 128, 32 came to 5.8 and 8 to 5.3 (two runs each, in turns).
const ADMITTED_PER_TURN: [u32; 2] = [8, 32];
/// Bytes after which no more requests are admitted from a queue in a turn: a copy of them takes some
/// hundred microseconds, for which all other queues wait.
const BYTES_PER_TURN: u64 = 1 << 20;
/// Turns of its neighbours' for which a volume still has its share when nothing of it waits. A guest with
/// few requests in flight has none there while they are served and while it makes the next one, and would
/// find its neighbours' queues all served before it each time. 16 × 32 requests take some hundred
/// microseconds, as a disk takes for one.
const TURNS_REMEMBERED: u32 = 16;

/// What may still be handed in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Allowance {
    requests: u32,
    bytes: u64,
}

/// What came of looking at a queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Admitted {
    Nothing,
    Something,
    /// The shard has no room for the volume. The request that it refused was not taken from the allowance.
    Busy,
}

/// What came of looking at the queues of a volume.
struct Came {
    /// Some were admitted.
    admitted: bool,
    /// The shard had no room for more.
    refused: bool,
}

/// A queue.
struct Place {
    slot: usize,
    /// Requests that waited when the turn began, as it was told.
    waiting: u32,
}

/// A volume with queues here.
struct Share {
    volume: VolumeHandle,
    places: Vec<Place>,
    /// Index of the place that is first.
    next: usize,
    /// What that place has left, if its turn was broken off.
    rest: Option<Allowance>,
    /// What the volume has left, if its turn was broken off.
    left: Option<Allowance>,
    /// Of all places.
    waiting: u32,
    /// Turns for which it is remembered.
    remembered: u32,
}

/// The volumes that have queues on a reactor.
///
/// Invariants
/// - Each volume here has a queue; whose last one leaves is gone.
/// - `first` and each `next` are indexes of what is there, or 0.
#[derive(Default)]
pub(super) struct Shares {
    volumes: Vec<Share>,
    /// Index of the volume that is first.
    first: usize,
    /// What each volume has in this turn, if there are several to share it.
    allowance: Option<Allowance>,
}

impl Allowance {
    /// Of a volume that shares with nobody: what its queues have counts.
    const UNLIMITED: Self = Self { requests: u32::MAX, bytes: u64::MAX };

    /// What so many requests that wait may have of a turn.
    fn of(waiting: u32) -> Self {
        let [few, many] = ADMITTED_PER_TURN;
        Self { requests: (waiting / 4).clamp(few, many), bytes: BYTES_PER_TURN }
    }

    pub(super) fn is_spent(&self) -> bool {
        self.requests == 0 || self.bytes == 0
    }

    /// Takes a request of so many bytes. The last one may be larger than what was left.
    pub(super) fn take(&mut self, bytes: u64) {
        self.requests -= 1;
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    fn min(self, other: Self) -> Self {
        Self { requests: self.requests.min(other.requests), bytes: self.bytes.min(other.bytes) }
    }

    /// Takes what another one has come down by.
    fn take_difference(&mut self, before: Self, after: Self) {
        self.requests -= before.requests - after.requests;
        self.bytes -= before.bytes - after.bytes;
    }
}

impl Shares {
    /// Notes a queue of a volume.
    pub(super) fn attach(&mut self, volume: VolumeHandle, slot: usize) {
        let place = Place { slot, waiting: 0 };
        match self.volumes.iter_mut().find(|share| share.volume == volume) {
            Some(share) => share.places.push(place),
            None => self.volumes.push(Share {
                volume,
                places: vec![place],
                next: 0,
                rest: None,
                left: None,
                waiting: 0,
                remembered: 0,
            }),
        }
    }

    /// Forgets a queue.
    pub(super) fn detach(&mut self, volume: VolumeHandle, slot: usize) {
        let of_volume = self.volumes.iter().position(|share| share.volume == volume);
        let index = of_volume.expect("a queue that leaves was noted when it came");
        self.volumes[index].detach(slot);
        if self.volumes[index].places.is_empty() {
            self.volumes.remove(index);
            self.first = index_without(self.first, index, self.volumes.len());
        }
    }

    /// Begins a turn, with what may be popped from each queue: 0 only if nothing may. False when that is
    /// so for all of them.
    #[inline]
    pub(super) fn begin_turn(&mut self, waiting: impl Fn(usize) -> u32) -> bool {
        let (mut deepest, mut sharing) = (0, 0);
        for share in &mut self.volumes {
            share.waiting = 0;
            for place in &mut share.places {
                place.waiting = waiting(place.slot);
                share.waiting += place.waiting;
            }
            if share.waiting > 0 {
                share.remembered = TURNS_REMEMBERED;
            }
            deepest = deepest.max(share.waiting);
            sharing += u32::from(share.remembered > 0);
        }
        self.allowance = (sharing > 1).then(|| Allowance::of(deepest));
        deepest > 0
    }

    /// Has every volume's queues looked at that may be popped from, within what each may hand in, another
    /// volume first each turn. True when that came to something. Call it when `begin_turn` said that
    /// something waits.
    #[inline]
    pub(super) fn serve(
        &mut self,
        mut admit: impl FnMut(usize, &mut Allowance) -> Admitted,
    ) -> bool {
        // Most guests have one queue, and many a reactor one guest: there is nothing to weigh.
        if let [Share { places, .. }] = &self.volumes[..]
            && let [Place { slot, waiting }] = places[..]
        {
            return admit(slot, &mut Allowance::of(waiting)) != Admitted::Nothing;
        }
        let count = self.volumes.len();
        let (mut progress, mut served, mut short, mut refused) = (false, None, None, false);
        let mut at = self.first;
        for _ in 0..count {
            let share = &mut self.volumes[at];
            if share.waiting > 0 {
                match share.serve(self.allowance, &mut admit) {
                    Came { admitted: false, refused: false } => {}
                    came => {
                        progress |= came.admitted;
                        refused |= came.refused;
                        // Who came short is first, or first again, except one that was first already and
                        // got nothing: it may have no more, and would be first for as long as that is so.
                        if came.refused && (came.admitted || at != self.first) {
                            short.get_or_insert(at);
                        }
                    }
                }
                served.get_or_insert(at);
            }
            at = index_after(at, count);
        }
        self.first = match (short, served) {
            (Some(at), _) => at,
            (None, Some(at)) => index_after(at, count),
            (None, None) => self.first,
        };
        if progress && count > 1 {
            for share in &mut self.volumes {
                share.remembered -= u32::from(share.remembered > 0);
            }
        }
        progress || refused
    }
}

impl Share {
    fn detach(&mut self, slot: usize) {
        let of_slot = self.places.iter().position(|place| place.slot == slot);
        let index = of_slot.expect("a queue that leaves was noted when it came");
        self.places.remove(index);
        if index == self.next {
            self.rest = None;
        }
        self.next = index_without(self.next, index, self.places.len());
    }

    /// The same of one volume, until `allowance` is spent. A queue may have all of it.
    #[inline]
    fn serve(
        &mut self,
        allowance: Option<Allowance>,
        admit: &mut impl FnMut(usize, &mut Allowance) -> Admitted,
    ) -> Came {
        let most = allowance.unwrap_or(Allowance::UNLIMITED);
        let mut left = self.left.take().unwrap_or(most).min(most);
        let mut rest = self.rest.take();
        let count = self.places.len();
        let (mut admitted, mut served) = (false, None);
        let mut at = self.next;
        // Who is first with the rest of its turn has another one when all have had theirs.
        for _ in 0..count + usize::from(rest.is_some()) {
            let place = &self.places[at];
            let rest = rest.take();
            if place.waiting > 0 {
                let mut own = rest.or(allowance).unwrap_or_else(|| Allowance::of(place.waiting));
                let before = own.min(left);
                let mut after = before;
                let came = admit(place.slot, &mut after);
                own.take_difference(before, after);
                left.take_difference(before, after);
                admitted |= before != after;
                if came == Admitted::Busy {
                    (self.next, self.rest, self.left) = (at, Some(own), Some(left));
                    return Came { admitted, refused: true };
                }
                if left.is_spent() {
                    // Whose turn this was is first again if it came short.
                    (self.next, self.rest) = match own.is_spent() {
                        true => (index_after(at, count), None),
                        false => (at, Some(own)),
                    };
                    return Came { admitted, refused: false };
                }
                served.get_or_insert(at);
            }
            at = index_after(at, count);
        }
        if let Some(at) = served {
            self.next = index_after(at, count);
        }
        Came { admitted, refused: false }
    }
}

/// The one after this in a ring of so many.
fn index_after(at: usize, count: usize) -> usize {
    if at + 1 < count { at + 1 } else { 0 }
}

/// Where what was at `at`, or came after it, is in a ring of `count` from which `removed` was taken.
fn index_without(at: usize, removed: usize, count: usize) -> usize {
    let at = if removed < at { at - 1 } else { at };
    if at < count { at } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    const KIB: u64 = 1024;

    /// A queue whose guest makes the next request when one was admitted, or all of them at once.
    #[derive(Clone)]
    struct Fake {
        volume: VolumeHandle,
        waiting: u32,
        bytes: u64,
        admitted: u64,
    }

    /// A reactor's queues, by slot, and what its shard has room for.
    struct Reactor {
        shares: Shares,
        queues: Vec<Fake>,
        /// Requests that the shard takes in a turn.
        room: u32,
        /// Requests that it has at once, and that end in a turn. One volume may have as many as three times
        /// those that are free.
        slots: usize,
        ending: usize,
        /// Volumes of those it has, oldest first.
        held: VecDeque<VolumeHandle>,
        /// Slots in the order in which they were looked at in the last turn.
        looked_at: Vec<usize>,
    }

    impl Reactor {
        /// Of volumes, each with queues in which so many requests wait.
        fn new(volumes: &[&[u32]]) -> Self {
            let mut reactor = Self {
                shares: Shares::default(),
                queues: Vec::new(),
                room: u32::MAX,
                slots: usize::MAX / 4,
                ending: usize::MAX,
                held: VecDeque::new(),
                looked_at: Vec::new(),
            };
            for (volume, queues) in (0..).zip(volumes) {
                queues.iter().for_each(|waiting| reactor.attach(volume, *waiting));
            }
            reactor
        }

        fn attach(&mut self, volume: u32, waiting: u32) {
            let volume = VolumeHandle(volume);
            self.shares.attach(volume, self.queues.len());
            self.queues.push(Fake { volume, waiting, bytes: 4 * KIB, admitted: 0 });
        }

        /// Guests keep as many waiting as there were. Returns what each queue got.
        fn turn(&mut self) -> Vec<u64> {
            let before = self.queues.clone();
            self.looked_at.clear();
            let mut room = self.room;
            self.held.drain(..self.ending.min(self.held.len()));
            let Self { shares, queues, looked_at, held, slots, .. } = self;
            let waits = shares.begin_turn(|slot| queues[slot].waiting);
            let progress = waits
                && shares.serve(|slot, allowance| {
                    looked_at.push(slot);
                    let queue = &mut queues[slot];
                    let of_volume = |held: &&VolumeHandle| **held == queue.volume;
                    let mut admitted = Admitted::Nothing;
                    while queue.waiting > 0 && !allowance.is_spent() {
                        let most = 3 * (*slots - held.len());
                        if room == 0 || held.iter().filter(of_volume).count() >= most {
                            return Admitted::Busy;
                        }
                        room -= 1;
                        held.push_back(queue.volume);
                        queue.waiting -= 1;
                        queue.admitted += 1;
                        allowance.take(queue.bytes);
                        admitted = Admitted::Something;
                    }
                    admitted
                });
            let came =
                self.queues.iter().zip(&before).map(|(now, then)| now.admitted - then.admitted);
            let came: Vec<u64> = came.collect();
            assert_eq!(progress, before.iter().any(|queue| queue.waiting > 0), "{came:?}");
            self.queues.iter_mut().zip(&before).for_each(|(now, then)| now.waiting = then.waiting);
            came
        }

        /// What each queue gets in so many turns.
        fn turns(&mut self, count: u32) -> Vec<u64> {
            let before = self.admitted();
            (0..count).for_each(|_| drop(self.turn()));
            self.admitted().iter().zip(before).map(|(now, then)| now - then).collect()
        }

        fn admitted(&self) -> Vec<u64> {
            self.queues.iter().map(|queue| queue.admitted).collect()
        }

        /// The same for each of so many volumes.
        fn turns_by_volume(&mut self, volumes: usize, count: u32) -> Vec<u64> {
            let by_queue = self.turns(count);
            let mut sums = vec![0; volumes];
            for (queue, admitted) in self.queues.iter().zip(by_queue) {
                sums[queue.volume.0 as usize] += admitted;
            }
            sums
        }
    }

    #[test]
    fn a_volume_by_itself_has_a_share_for_each_queue() {
        for (waiting, share) in [(1, 1), (8, 8), (20, 8), (64, 16), (128, 32), (1024, 32)] {
            for queues in [1, 2, 16] {
                let waits = vec![waiting; queues];
                let mut reactor = Reactor::new(&[&waits, &[0], &[0, 0]]);
                for _ in 0..5 {
                    assert_eq!(reactor.turn()[..queues], vec![share; queues], "{waiting} waiting");
                }
            }
        }
        let mut large = Reactor::new(&[&[128; 3]]);
        large.queues[1].bytes = 256 * KIB;
        large.queues[2].bytes = 4096 * KIB;
        assert_eq!(large.turn(), [32, 4, 1]);
    }

    #[test]
    fn nothing_comes_of_nothing() {
        assert_eq!(Reactor::new(&[]).turn(), [0; 0]);
        assert_eq!(Reactor::new(&[&[0], &[0, 0]]).turns(9), [0; 3]);
    }

    #[test]
    fn volumes_get_the_same_whatever_the_number_of_their_queues() {
        let mut reactor = Reactor::new(&[&[128; 8], &[128]]);
        for _ in 0..8 {
            let came = reactor.turn();
            assert_eq!((came[..8].iter().sum::<u64>(), came[8]), (32, 32), "{came:?}");
        }
        assert_eq!(reactor.turns(8), [32, 32, 32, 32, 32, 32, 32, 32, 256]);
        // One deep queue is no more than many, and none gets less for others that do nothing.
        let mut reactor = Reactor::new(&[&[16; 16], &[0], &[250], &[40, 0, 0, 300], &[0, 0]]);
        assert_eq!(reactor.turns_by_volume(5, 64), [2048, 0, 2048, 2048, 0]);
        // With few requests each, as they are admitted to one queue.
        assert_eq!(Reactor::new(&[&[2; 16], &[32]]).turns_by_volume(2, 64), [512, 512]);
    }

    #[test]
    fn a_volume_with_little_gets_all_of_it_in_each_turn() {
        for depth in [1, 4] {
            let mut reactor = Reactor::new(&[&[128; 8], &[depth]]);
            let came = reactor.turns_by_volume(2, 40);
            assert_eq!(came, [40 * 32, 40 * u64::from(depth)]);
        }
    }

    #[test]
    fn bytes_are_shared_like_requests() {
        let mut reactor = Reactor::new(&[&[128; 8], &[128; 2]]);
        reactor.queues[..8].iter_mut().for_each(|queue| queue.bytes = 128 * KIB);
        reactor.queues[8..].iter_mut().for_each(|queue| queue.bytes = 256 * KIB);
        assert_eq!(reactor.turns_by_volume(2, 10), [10 * 8, 10 * 4]);
        // What is large goes at once, and by itself.
        reactor.queues[..8].iter_mut().for_each(|queue| queue.bytes = 4096 * KIB);
        assert_eq!(reactor.turns_by_volume(2, 8), [8, 8 * 4]);
    }

    #[test]
    fn a_volume_is_remembered_while_it_has_nothing_for_a_while() {
        let mut reactor = Reactor::new(&[&[128; 8], &[1]]);
        let busy = |reactor: &mut Reactor| reactor.turn()[..8].iter().sum::<u64>();
        assert_eq!(busy(&mut reactor), 32);
        reactor.queues[8].waiting = 0;
        for _ in 1..TURNS_REMEMBERED {
            assert_eq!(busy(&mut reactor), 32);
        }
        assert_eq!(busy(&mut reactor), 256, "it has had its time");
        reactor.queues[8].waiting = 1;
        assert_eq!(busy(&mut reactor), 32);
        // Turns in which nobody does anything do not count.
        reactor.queues.iter_mut().for_each(|queue| queue.waiting = 0);
        reactor.turns(1000);
        reactor.queues[..8].iter_mut().for_each(|queue| queue.waiting = 128);
        assert_eq!(busy(&mut reactor), 32);
    }

    #[test]
    fn queues_of_a_volume_share_what_it_gets() {
        // Whatever stands beside them: some with next to nothing, one that takes most of a share.
        for queues in [
            &[128, 128, 128, 128][..],
            &[1, 128, 128, 128],
            &[31, 128, 0, 128],
            &[3, 128, 0, 0, 0, 0, 128],
            &[5, 128, 30, 0, 128, 31],
        ] {
            let mut reactor = Reactor::new(&[queues, &[128]]);
            let came = reactor.turns(1000);
            let deep = queues.iter().zip(&came).filter(|(waiting, _)| **waiting == 128);
            let deep: Vec<u64> = deep.map(|(_, came)| *came).collect();
            let [least, most] = [deep.iter().min().unwrap(), deep.iter().max().unwrap()];
            assert!(most - least <= 64, "{queues:?}: {came:?}");
            assert_eq!(came.iter().sum::<u64>(), 2 * 32_000, "{queues:?}: {came:?}");
        }
    }

    #[test]
    fn each_is_first_in_its_turn() {
        let mut reactor = Reactor::new(&[&[8], &[0], &[0], &[8], &[8]]);
        let mut first = [0; 5];
        for _ in 0..300 {
            reactor.turn();
            first[reactor.looked_at[0]] += 1;
        }
        assert_eq!(first, [100, 0, 0, 100, 100]);
        let mut reactor = Reactor::new(&[&[8, 0, 0, 8, 8]]);
        let mut first = [0; 5];
        for _ in 0..300 {
            reactor.turn();
            first[reactor.looked_at[0]] += 1;
        }
        assert_eq!(first, [100, 0, 0, 100, 100]);
    }

    /// However little room comes free at a time, and whoever was refused.
    #[test]
    fn a_full_shard_goes_to_all_alike() {
        for room in [1, 2, 5, 7, 8, 31, 33, 50, 63] {
            let mut reactor = Reactor::new(&[&[128; 8], &[128], &[128; 2]]);
            reactor.room = room;
            let turns = 32 * 3 * 8 * 10 / room;
            let came = reactor.turns_by_volume(3, turns);
            let even = u64::from(turns * room) / 3;
            assert!(came.iter().all(|came| came.abs_diff(even) <= 64), "{room}: {came:?}");
            let queues = reactor.admitted();
            let even = even / 8;
            assert!(queues[..8].iter().all(|came| came.abs_diff(even) <= 64), "{room}: {queues:?}");
            // And so are the queues of a volume that is alone.
            let mut reactor = Reactor::new(&[&[128; 8]]);
            reactor.room = room;
            let came = reactor.turns(turns);
            let even = u64::from(turns * room) / 8;
            assert!(came.iter().all(|came| came.abs_diff(even) <= 32), "{room}: {came:?}");
        }
    }

    #[test]
    fn who_was_refused_is_first() {
        let mut reactor = Reactor::new(&[&[128, 128], &[128, 128]]);
        reactor.room = 40;
        assert_eq!(reactor.turn(), [32, 0, 8, 0]);
        assert_eq!(reactor.turn(), [0, 16, 24, 0]);
        assert_eq!(reactor.looked_at, [2, 1]);
        assert_eq!(reactor.turn(), [0, 16, 0, 24]);
        assert_eq!(reactor.looked_at, [1, 3]);
    }

    /// A volume that may have no more is passed on from, also where there are more of them than slots.
    #[test]
    fn who_gets_nothing_is_not_first_for_ever() {
        for (volumes, slots) in [(3, 4), (4, 4), (9, 4), (9, 8), (40, 16)] {
            let deep = vec![&[128][..]; volumes];
            let mut reactor = Reactor::new(&deep);
            (reactor.slots, reactor.ending) = (slots, 1);
            reactor.turns(1000);
            let came = reactor.turns(1000 * volumes as u32);
            let even = came.iter().all(|came| (500..2000).contains(came));
            assert!(even, "{volumes} volumes, {slots} slots: {came:?}");
        }
    }

    /// However slow the device: who has as much as it may have keeps nobody else out.
    #[test]
    fn who_is_refused_keeps_nobody_out() {
        for ending in [1, 3, 8, 40] {
            let mut reactor = Reactor::new(&[&[128; 8], &[128], &[1], &[4], &[128; 2]]);
            (reactor.slots, reactor.ending) = (256, ending);
            // Until those that are many have what they may have.
            reactor.turns(2000);
            let came = reactor.turns_by_volume(5, 4000);
            let most = *came.iter().max().unwrap();
            let asked = [u64::MAX, u64::MAX, 4000, 16_000, u64::MAX];
            for (came_to, asked) in came.iter().zip(asked) {
                assert!(*came_to >= asked.min(most * 9 / 10), "{ending}: {came:?}");
            }
        }
    }

    #[test]
    fn queues_come_and_go() {
        let mut reactor = Reactor::new(&[&[128; 3], &[128], &[128; 2]]);
        reactor.room = 50;
        reactor.turns(7);
        // Slots are used again, so those that go are set to nothing and never named.
        for slot in [1, 3, 5, 2, 0, 4] {
            let volume = reactor.queues[slot].volume;
            reactor.shares.detach(volume, slot);
            reactor.queues[slot].waiting = 0;
            reactor.turns(13);
            assert!(!reactor.looked_at.contains(&slot));
        }
        assert!(reactor.shares.volumes.is_empty());
        reactor.attach(9, 128);
        assert_eq!(reactor.turn()[6], 32);
    }
}
