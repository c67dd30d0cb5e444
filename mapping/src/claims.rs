//! Blocks this shard may hand out: claimed by the thousand, and reused when freed.
//!
//! The bitmap is off the write path: a claim sets bits durably, once, for many blocks; from then on
//! they are this shard's (Parallax 3.4.1, DESIGN §3). A crash leaks at most what lies here, so
//! claims start small and double with use. A freed block comes back only when the commit that
//! unlinked it is durable and every request that could still use it has finished; `volume.rs`
//! decides that.

use std::collections::VecDeque;
use std::time::Duration;

use bessel_reactor::clock::Instant;

use crate::message::{BlockKind, BlockRun};
use crate::planted::{self, Bug};
use crate::walk::BlockSet;

/// First claim, in blocks: what an idle volume's daemon may leak when killed.
const CLAIM_FIRST: u32 = 128;
/// Largest claim: the paper's 10,000.
const CLAIM_LAST: u32 = 10_000;
/// How long "the store is full" is believed before asking again.
const FULL_RETRY: Duration = Duration::from_millis(200);

/// The answer to "give me blocks".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Taken {
    Run(BlockRun),
    /// A claim is under way: wait for it.
    Wait,
    /// The store has none.
    Full,
}

#[derive(Debug)]
struct Pool {
    kind: BlockKind,
    runs: VecDeque<BlockRun>,
    free: u64,
    next_claim: u32,
    claim_max: u32,
    /// A claim that should be sent, or has been.
    wanted: bool,
    sent: bool,
    /// Claims that have been answered.
    answered: u64,
    full_since: Option<Instant>,
}

/// What a collection must know of the blocks that pass through here while it runs ([`crate::gc`]).
#[derive(Debug, Default)]
struct Watch {
    /// Blocks that were here when it began, or have come since: in use again, perhaps, or soon.
    passed: BlockSet,
    /// See [`Claims::hold`].
    held: Vec<BlockRun>,
    /// Some of these were needed.
    broken: bool,
}

/// What [`Claims::unwatch`] tells.
#[derive(Debug, Default)]
pub(crate) struct Watched {
    /// Blocks that were here when it began, or have come since.
    pub(crate) passed: BlockSet,
    /// What was held, and may be put back now.
    pub(crate) held: Vec<BlockRun>,
    /// Some of it was needed before.
    pub(crate) broken: bool,
}

/// The blocks of both kinds. Hot path: no allocation beyond the queue's high-water mark, but for a
/// page of bits now and then while a collection runs.
#[derive(Debug)]
pub(crate) struct Claims {
    pools: [Pool; 2],
    watch: Option<Box<Watch>>,
}

impl Claims {
    pub(crate) fn new(extent_blocks: u64) -> Self {
        let claim_max = (extent_blocks / 4).clamp(32, u64::from(CLAIM_LAST)) as u32;
        let pool = |kind| Pool {
            kind,
            runs: VecDeque::with_capacity(4096),
            free: 0,
            next_claim: CLAIM_FIRST.min(claim_max),
            claim_max,
            wanted: false,
            sent: false,
            answered: 0,
            full_since: None,
        };
        Self { pools: [pool(BlockKind::Data), pool(BlockKind::Metadata)], watch: None }
    }

    /// From here on notes what passes, for a collection.
    pub(crate) fn watch(&mut self) {
        let mut watch = self.watch.take().unwrap_or_default();
        for pool in self.pools.iter().filter(|_| !planted::is(Bug::ClaimsNotRetired)) {
            pool.runs.iter().for_each(|run| watch.passed.insert_run(*run));
        }
        self.watch = Some(watch);
    }

    /// Ends that, and tells what there was.
    pub(crate) fn unwatch(&mut self) -> Watched {
        let Watch { passed, held, broken } =
            self.watch.take().map_or_else(Watch::default, |it| *it);
        Watched { passed, held, broken }
    }

    /// What is held, when there is no other block for a node: the collection has to begin again.
    pub(crate) fn break_watch(&mut self) -> Vec<BlockRun> {
        let Some(watch) = &mut self.watch else { return Vec::new() };
        watch.broken |= !watch.held.is_empty();
        std::mem::take(&mut watch.held)
    }

    /// Keeps the blocks of nodes that were freed while a collection runs; false when none does. Nothing
    /// else is written there before it has read its last node: it may be on the way to one of these.
    pub(crate) fn hold(&mut self, run: BlockRun) -> bool {
        self.note(run);
        let holds = |watch: &&mut Box<Watch>| !watch.broken && !planted::is(Bug::FreedNodesNotHeld);
        let watch = self.watch.as_mut().filter(holds);
        watch.map(|watch| watch.held.push(run)).is_some()
    }

    fn note(&mut self, run: BlockRun) {
        if let Some(watch) = &mut self.watch
            && !planted::is(Bug::ReuseNotWatched)
        {
            watch.passed.insert_run(run);
        }
    }

    /// Takes up to `count` adjacent blocks; at least one when there is any.
    pub(crate) fn take(&mut self, kind: BlockKind, count: u32, now: Instant) -> Taken {
        let pool = &mut self.pools[kind.index()];
        let Some(run) = pool.runs.front_mut() else {
            return pool.ask(now);
        };
        let taken = BlockRun { start: run.start, count: run.count.min(count) };
        if taken.count == run.count {
            pool.runs.pop_front();
        } else {
            run.start = run.start.add(u64::from(taken.count));
            run.count -= taken.count;
        }
        pool.free -= u64::from(taken.count);
        if pool.free < u64::from(pool.next_claim / 4) && pool.full_since.is_none() {
            pool.wanted = true; // Ahead of need, so that nobody waits.
        }
        Taken::Run(taken)
    }

    /// Asks for more of a kind than there is.
    pub(crate) fn ask(&mut self, kind: BlockKind, now: Instant) -> Taken {
        self.pools[kind.index()].ask(now)
    }

    /// Puts blocks back that nothing refers to.
    pub(crate) fn put(&mut self, kind: BlockKind, run: BlockRun) {
        self.note(run);
        let pool = &mut self.pools[kind.index()];
        pool.free += u64::from(run.count);
        pool.full_since = None;
        match pool.runs.back_mut() {
            Some(last) if last.start.add(u64::from(last.count)) == run.start => {
                last.count += run.count;
            }
            _ => pool.runs.push_back(run),
        }
    }

    /// Puts back blocks that were taken a moment ago and not used, to be taken again first.
    pub(crate) fn put_first(&mut self, kind: BlockKind, run: BlockRun) {
        self.note(run);
        let pool = &mut self.pools[kind.index()];
        pool.free += u64::from(run.count);
        match pool.runs.front_mut() {
            Some(first) if run.start.add(u64::from(run.count)) == first.start => {
                first.start = run.start;
                first.count += run.count;
            }
            _ => pool.runs.push_front(run),
        }
    }

    /// True while a claim is under way.
    pub(crate) fn is_claiming(&self) -> bool {
        self.pools.iter().any(|pool| pool.sent)
    }

    /// For each kind, how many claims have to be answered until the one is that is under way.
    pub(crate) fn claiming(&self) -> [u64; 2] {
        [0, 1].map(|kind: usize| {
            let pool = &self.pools[kind];
            pool.answered + u64::from(pool.sent)
        })
    }

    /// True when as many claims as this have been answered.
    pub(crate) fn have_answered(&self, claims: [u64; 2]) -> bool {
        self.pools.iter().zip(claims).all(|(pool, claims)| pool.answered >= claims)
    }

    /// The claim to send now, if one is wanted.
    pub(crate) fn wanted(&mut self) -> Option<(BlockKind, u32)> {
        let pool = self.pools.iter_mut().find(|pool| pool.wanted && !pool.sent)?;
        pool.sent = true;
        Some((pool.kind, pool.next_claim))
    }

    /// Takes in the answer to a claim. True when the store has just been found full.
    pub(crate) fn granted(&mut self, kind: BlockKind, runs: &[BlockRun], now: Instant) -> bool {
        let pool = &mut self.pools[kind.index()];
        pool.sent = false;
        pool.answered += 1;
        pool.wanted = false;
        if runs.is_empty() {
            pool.next_claim = CLAIM_FIRST.min(pool.claim_max);
            return pool.full_since.replace(now).is_none();
        }
        pool.next_claim = (pool.next_claim * 2).min(pool.claim_max);
        for run in runs {
            self.put(kind, *run);
        }
        false
    }

    /// Blocks ready to be handed out.
    pub(crate) fn free(&self, kind: BlockKind) -> u64 {
        self.pools[kind.index()].free
    }

    /// There are far more blocks than this shard needs.
    pub(crate) fn has_surplus(&self) -> bool {
        self.pools.iter().any(|pool| pool.free > pool.keeps())
    }

    /// Runs to give back because there are far more than this shard needs; or all of them.
    pub(crate) fn surplus(&mut self, everything: bool) -> Vec<BlockRun> {
        let mut runs = Vec::new();
        if everything && let Some(watch) = &mut self.watch {
            runs.append(&mut watch.held);
        }
        for pool in &mut self.pools {
            let keep = if everything { 0 } else { pool.keeps() };
            if pool.free <= keep {
                continue;
            }
            // Down to half, so that the next few frees do not bring us back here.
            while pool.free > keep / 2 {
                let run = pool.runs.pop_back().expect("free counts what is in the runs");
                pool.free -= u64::from(run.count);
                runs.push(run);
            }
        }
        runs
    }
}

impl Pool {
    /// Most free blocks that it keeps.
    fn keeps(&self) -> u64 {
        u64::from(self.claim_max) * 4
    }

    fn ask(&mut self, now: Instant) -> Taken {
        if let Some(since) = self.full_since {
            if now.since(since) < FULL_RETRY {
                return Taken::Full;
            }
            self.full_since = None;
        }
        self.wanted = true;
        Taken::Wait
    }
}

#[cfg(test)]
mod tests {
    use bessel_reactor::units::BlockAddr;

    use super::*;

    const NOW: Instant = Instant::from_nanos(1_000_000_000);

    fn run(start: u64, count: u32) -> BlockRun {
        BlockRun { start: BlockAddr::new(start), count }
    }

    #[test]
    fn an_empty_pool_asks_once_and_grows_its_claims() {
        let mut claims = Claims::new(1 << 19);
        assert_eq!(claims.take(BlockKind::Data, 1, NOW), Taken::Wait);
        assert_eq!(claims.wanted(), Some((BlockKind::Data, 128)));
        assert_eq!(claims.wanted(), None, "one claim at a time");
        claims.granted(BlockKind::Data, &[run(100, 128)], NOW);
        assert_eq!(claims.take(BlockKind::Data, 100, NOW), Taken::Run(run(100, 100)));
        assert_eq!(claims.wanted(), Some((BlockKind::Data, 256)), "ahead of need");
    }

    #[test]
    fn a_full_store_is_asked_again_after_a_while_and_a_freed_block_ends_it() {
        let mut claims = Claims::new(1 << 19);
        claims.take(BlockKind::Metadata, 1, NOW);
        claims.wanted();
        assert!(claims.granted(BlockKind::Metadata, &[], NOW));
        assert_eq!(claims.take(BlockKind::Metadata, 1, NOW), Taken::Full);
        let later = NOW.after(FULL_RETRY);
        assert_eq!(claims.take(BlockKind::Metadata, 1, later), Taken::Wait);
        claims.wanted();
        claims.granted(BlockKind::Metadata, &[], later);
        claims.put(BlockKind::Metadata, run(7, 1));
        assert_eq!(claims.take(BlockKind::Metadata, 5, later), Taken::Run(run(7, 1)));
    }

    #[test]
    fn everything_can_be_given_back() {
        let mut claims = Claims::new(1 << 19);
        claims.put(BlockKind::Data, run(10, 5));
        claims.put(BlockKind::Data, run(15, 5));
        claims.put(BlockKind::Metadata, run(99, 1));
        assert_eq!(claims.surplus(true), vec![run(10, 10), run(99, 1)]);
        assert_eq!(claims.free(BlockKind::Data), 0);
    }
}
