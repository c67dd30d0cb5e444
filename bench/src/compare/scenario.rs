//! What is measured: loads, and the named sets of them.

use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use crate::load::Options;
use crate::plan::{STRIDE_BYTES, Workload};
use crate::server::{Device, State};
use crate::size;

/// Requests of a guest that is after operations, and of one that is after bandwidth.
const SMALL_BYTES: u32 = 4 << 10;
const LARGE_BYTES: u32 = 128 << 10;

/// Depths from a lone reader to a busy database.
const DEPTHS: [u16; 3] = [1, 32, 128];

/// One thing that every contender is asked to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub(crate) struct Load {
    pub(crate) workload: Workload,
    pub(crate) block_bytes: u32,
    /// Requests in flight on each queue.
    pub(crate) depth: u16,
    pub(crate) queues: u16,
    /// A flush follows each run of this many writes; 0 for none.
    pub(crate) flush_every: u64,
    pub(crate) state: State,
}

impl Load {
    /// Requests of `block_bytes` on a written disk, through one queue and without a flush.
    pub(crate) fn new(workload: Workload, block_bytes: u32, depth: u16) -> Self {
        let state = State::Written;
        Self { workload, block_bytes, depth, queues: 1, flush_every: 0, state }
    }

    fn small(workload: Workload, depth: u16) -> Self {
        Self::new(workload, SMALL_BYTES, depth)
    }

    /// True when the state of the disk is used up by what is written to it.
    fn wears_off(&self) -> bool {
        self.state != State::Written && self.workload.writes()
    }

    /// Why it is not measured on such a device, if so.
    pub(super) fn cannot_be_on(&self, device: &Device) -> Option<&'static str> {
        use Workload::{Mix, RandRead, RandWrite};
        let asks_for_more = self.state != State::Written
            || self.queues > 1
            || self.flush_every > 0
            || !matches!(self.workload, RandRead | RandWrite | Mix);
        (*device == Device::Null && asks_for_more)
            .then_some("what moves no data shows what a random request costs, and no more")
    }

    /// How long to load before measuring: not at all where that would use up what is to be measured.
    pub(super) fn warmup(&self, warmup: Duration) -> Duration {
        if self.wears_off() { Duration::ZERO } else { warmup }
    }

    /// Where the state of the disk wears off, half as many requests as the disk has blocks: so most of them
    /// meet a block that none has met before. In strides all do, for one pass.
    pub(super) fn requests_max(&self, size_bytes: u64) -> Option<u64> {
        let requests = match self.workload {
            Workload::Stride => size_bytes.div_ceil(STRIDE_BYTES.max(self.block_bytes.into())),
            _ => size_bytes / u64::from(self.block_bytes) / 2,
        };
        self.wears_off().then_some(requests.max(1))
    }

    /// What a load generator is to do, but for how long and where.
    pub(super) fn options(&self, size_bytes: u64, warmup: Duration) -> Options {
        Options {
            workload: self.workload,
            block_bytes: self.block_bytes,
            depth: self.depth,
            queues: self.queues,
            flush_every: self.flush_every,
            warmup: self.warmup(warmup),
            requests: self.requests_max(size_bytes),
            ..Options::default()
        }
    }

    /// Its name without depth and queues: `randwrite 4KiB snapshotted`.
    pub(super) fn kind(&self) -> String {
        let mut name =
            format!("{} {}", self.workload.name(), size::format(self.block_bytes.into()));
        match self.flush_every {
            0 => {}
            1 => name += " +flush",
            every => name += &format!(" +flush/{every}"),
        }
        if self.state != State::Written {
            name = format!("{name} {}", self.state.name());
        }
        name
    }

    /// Its name without the depth: `randread 4KiB, 4 queues`.
    pub(super) fn name(&self) -> String {
        match self.queues {
            1 => self.kind(),
            queues => format!("{}, {queues} queues", self.kind()),
        }
    }
}

/// A set of loads that has a name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Scenario {
    /// Some of each of the others but flush and queues: what `make bench` runs
    Quick,
    /// All of the others: what `make bench-full` runs
    All,
    /// 4 KiB reads, writes and 70/30 mix at random places, at depths 1, 32 and 128
    Random,
    /// 128 KiB reads and writes in order, at depth 8
    Sequential,
    /// 4 KiB writes at random places of a disk that was never written
    Empty,
    /// 4 KiB writes and reads at random places, a snapshot taken just before
    Snapshotted,
    /// 4 KiB writes at random places, a flush after each
    Flush,
    /// 4 KiB reads and writes at random places through 1, 2 and 4 queues
    Queues,
}

impl Scenario {
    /// Its loads, in the order in which they are measured.
    pub(crate) fn loads(self) -> Vec<Load> {
        use Workload::{Mix, RandRead, RandWrite, Read, Stride, Write};
        let in_state = |state, loads: Vec<Load>| -> Vec<Load> {
            loads.into_iter().map(|load| Load { state, ..load }).collect()
        };
        match self {
            Self::Quick => {
                let mut loads = each([RandRead, RandWrite], [1, 32]);
                loads.extend(Self::Sequential.loads());
                let write = vec![Load::small(RandWrite, 32)];
                loads.extend(in_state(State::Empty, write.clone()));
                loads.extend(in_state(State::Snapshotted, write));
                loads
            }
            Self::All => {
                let parts = [
                    Self::Random,
                    Self::Sequential,
                    Self::Empty,
                    Self::Snapshotted,
                    Self::Flush,
                    Self::Queues,
                ];
                distinct(parts.into_iter().flat_map(Self::loads))
            }
            Self::Random => each([RandRead, RandWrite, Mix], DEPTHS),
            Self::Sequential => {
                [Read, Write].map(|workload| Load::new(workload, LARGE_BYTES, 8)).into()
            }
            Self::Empty => in_state(State::Empty, each([RandWrite], DEPTHS)),
            Self::Snapshotted => {
                let mut loads = each([RandWrite, RandRead], DEPTHS);
                loads.push(Load::small(Stride, 32));
                in_state(State::Snapshotted, loads)
            }
            Self::Flush => each([RandWrite], DEPTHS)
                .into_iter()
                .map(|load| Load { flush_every: 1, ..load })
                .collect(),
            Self::Queues => [1, 2, 4]
                .into_iter()
                .flat_map(|queues| {
                    each([RandRead, RandWrite], [32])
                        .into_iter()
                        .map(move |load| Load { queues, ..load })
                })
                .collect(),
        }
    }
}

/// Small requests of each kind at each depth.
fn each<const N: usize, const M: usize>(workloads: [Workload; N], depths: [u16; M]) -> Vec<Load> {
    workloads
        .into_iter()
        .flat_map(|workload| depths.map(|depth| Load::small(workload, depth)))
        .collect()
}

/// Each load once, at its first place.
pub(crate) fn distinct(loads: impl IntoIterator<Item = Load>) -> Vec<Load> {
    let mut kept = Vec::new();
    for load in loads {
        if !kept.contains(&load) {
            kept.push(load);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_has_every_load_of_the_others_once() {
        let all = Scenario::All.loads();
        assert_eq!(distinct(all.clone()), all, "one is measured twice");
        for &scenario in Scenario::value_variants() {
            let loads = scenario.loads();
            assert!(!loads.is_empty(), "{scenario:?} measures nothing");
            assert!(loads.iter().all(|load| all.contains(load)), "{scenario:?} is not in all");
        }
    }

    #[test]
    fn the_sets_are_what_their_names_say() {
        let small = |load: &Load| load.block_bytes == 4096;
        let random = Scenario::Random.loads();
        assert_eq!(random.len(), 9);
        assert!(random.iter().all(small));
        assert!(Scenario::Sequential.loads().iter().all(|load| !small(load) && load.depth == 8));
        assert!(Scenario::Empty.loads().iter().all(|load| load.state == State::Empty));
        assert!(Scenario::Flush.loads().iter().all(|load| load.flush_every == 1));
        let queues: Vec<_> = Scenario::Queues.loads().iter().map(|load| load.queues).collect();
        assert_eq!(queues, [1, 1, 2, 2, 4, 4]);
    }

    #[test]
    fn a_state_that_wears_off_is_measured_at_once_and_not_beyond_half_the_disk() {
        let warmup = Duration::from_secs(1);
        let load = Load::small(Workload::RandWrite, 1);
        let empty = Load { state: State::Empty, ..load };
        assert_eq!((load.warmup(warmup), load.requests_max(1 << 20)), (warmup, None));
        assert_eq!(empty.warmup(warmup), Duration::ZERO);
        assert_eq!(empty.requests_max(1 << 20), Some(128));
        assert_eq!(empty.requests_max(4096), Some(1));
        let stride = Load { workload: Workload::Stride, ..empty };
        assert_eq!(stride.requests_max(1 << 20), Some(16));
        let read = Load { workload: Workload::RandRead, ..empty };
        assert_eq!((read.warmup(warmup), read.requests_max(1 << 20)), (warmup, None));
    }

    #[test]
    fn a_null_device_has_random_requests_only() {
        let on_null = |load: &Load| load.cannot_be_on(&Device::Null).is_none();
        assert!(Scenario::Random.loads().iter().all(on_null));
        for scenario in
            [Scenario::Sequential, Scenario::Empty, Scenario::Snapshotted, Scenario::Flush]
        {
            assert!(!scenario.loads().iter().any(on_null), "{scenario:?}");
        }
        let loads = Scenario::All.loads();
        assert!(loads.iter().all(|load| load.cannot_be_on(&Device::Memory).is_none()));
    }

    #[test]
    fn names_tell_loads_apart() {
        let load = Load { state: State::Snapshotted, ..Load::small(Workload::RandWrite, 1) };
        assert_eq!(load.name(), "randwrite 4KiB snapshotted");
        let load = Load { queues: 4, flush_every: 1, ..Load::small(Workload::RandWrite, 1) };
        assert_eq!(load.name(), "randwrite 4KiB +flush, 4 queues");
        let all = Scenario::All.loads();
        let mut names: Vec<_> = all.iter().map(|load| (load.name(), load.depth)).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all.len());
    }
}
