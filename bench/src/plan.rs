//! Which request comes next.
//!
//! A plan is a pure function of its seed: two servers measured with equal settings see the same
//! offsets in the same order.

use clap::ValueEnum;
use serde::Serialize;

use crate::pattern::{Ledger, mix};
use crate::queue::{Kind, Operation, RANGE_BYTES};

/// The kind of load.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Workload {
    /// Reads at random places.
    #[value(name = "randread")]
    RandRead,
    /// Writes at random places.
    #[value(name = "randwrite")]
    RandWrite,
    /// Reads in order.
    Read,
    /// Writes in order.
    Write,
    /// Reads and writes at random places.
    Mix,
    /// One write at the start of each 64 KiB, in order.
    Stride,
    /// Runs of 64 to 256 KiB at random places, each written in order: files, as a page cache writes them back.
    Runs,
    /// Discards in order.
    Discard,
}

/// From one write of [`Workload::Stride`] to the next.
pub(crate) const STRIDE_BYTES: u64 = 64 << 10;

/// The shortest and the longest run of [`Workload::Runs`].
const RUN_BYTES: [u64; 2] = [64 << 10, 256 << 10];

/// A run begins at a multiple of this.
pub(crate) const RUN_ALIGNMENT: u64 = 4096;

impl Workload {
    /// True when requests of this load change the disk.
    pub(crate) fn writes(self) -> bool {
        !matches!(self, Self::RandRead | Self::Read)
    }

    fn is_sequential(self) -> bool {
        matches!(self, Self::Read | Self::Write | Self::Stride | Self::Discard)
    }

    /// Its name, as on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::RandRead => "randread",
            Self::RandWrite => "randwrite",
            Self::Read => "read",
            Self::Write => "write",
            Self::Mix => "mix",
            Self::Stride => "stride",
            Self::Runs => "runs",
            Self::Discard => "discard",
        }
    }
}

/// The part of the disk that is used, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub(crate) workload: Workload,
    /// Bytes from the start of the disk; a multiple of 512, at least one block.
    pub(crate) region_bytes: u64,
    /// Where requests in order begin; those after the end of the region begin at its start.
    pub(crate) first_byte: u64,
    /// Bytes of a request; a multiple of 512. Those of a discard are named, not carried.
    pub(crate) block_bytes: u32,
    /// Of 100 requests of a mixed load, how many are reads.
    pub(crate) read_percent: u8,
    /// A flush follows each run of this many writes or discards; 0 for none.
    pub(crate) flush_every: u64,
    pub(crate) seed: u64,
}

impl Settings {
    /// Longest data of a request.
    pub(crate) fn data_bytes_max(&self) -> u32 {
        match self.workload {
            Workload::Discard => RANGE_BYTES,
            _ => self.block_bytes,
        }
    }
}

/// Draws requests.
pub(crate) struct Plan {
    settings: Settings,
    state: u64,
    cursor: u64,
    /// Where the run ends that the cursor is in, of [`Workload::Runs`].
    run_end: u64,
    writes_since_flush: u64,
}

impl Plan {
    /// Starts from the seed.
    pub(crate) fn new(settings: Settings) -> Self {
        let Settings { region_bytes, block_bytes, first_byte, .. } = settings;
        assert!(first_byte < region_bytes, "where to begin was not checked");
        assert!(u64::from(block_bytes) <= region_bytes, "the region was not checked");
        Self {
            settings,
            state: mix(settings.seed),
            cursor: first_byte,
            run_end: 0,
            writes_since_flush: 0,
        }
    }

    /// The next request.
    pub(crate) fn draw(&mut self) -> Operation {
        let flush_every = self.settings.flush_every;
        if flush_every > 0 && self.writes_since_flush >= flush_every {
            self.writes_since_flush = 0;
            return Operation { kind: Kind::Flush, offset: 0, bytes: 0 };
        }
        let kind = self.draw_kind();
        self.writes_since_flush += u64::from(kind != Kind::Read);
        let (offset, bytes) = if self.settings.workload.is_sequential() {
            self.advance()
        } else if self.settings.workload == Workload::Runs {
            self.advance_in_run()
        } else {
            let blocks = self.settings.region_bytes / u64::from(self.settings.block_bytes);
            let block_bytes = self.settings.block_bytes;
            (self.random_below(blocks) * u64::from(block_bytes), block_bytes)
        };
        Operation { kind, offset, bytes }
    }

    fn draw_kind(&mut self) -> Kind {
        let reads = match self.settings.workload {
            Workload::Discard => return Kind::Discard,
            Workload::RandRead | Workload::Read => true,
            Workload::RandWrite | Workload::Write | Workload::Stride | Workload::Runs => false,
            Workload::Mix => self.random_below(100) < u64::from(self.settings.read_percent),
        };
        if reads { Kind::Read } else { Kind::Write }
    }

    /// The next piece in order; the last one of the region may be short.
    fn advance(&mut self) -> (u64, u32) {
        let offset = self.cursor;
        let left = self.settings.region_bytes - offset;
        let bytes = left.min(u64::from(self.settings.block_bytes)) as u32;
        let step = step(&self.settings).max(u64::from(bytes));
        let next = offset + step;
        self.cursor = if next < self.settings.region_bytes { next } else { 0 };
        (offset, bytes)
    }

    /// The next piece of a run, or the first of another.
    fn advance_in_run(&mut self) -> (u64, u32) {
        let Settings { region_bytes, block_bytes, .. } = self.settings;
        if self.cursor >= self.run_end {
            let [shortest, longest] = RUN_BYTES.map(|bytes| bytes / RUN_ALIGNMENT);
            let blocks = shortest + self.random_below(longest - shortest + 1);
            self.cursor = self.random_below(region_bytes.div_ceil(RUN_ALIGNMENT)) * RUN_ALIGNMENT;
            self.run_end = (self.cursor + blocks * RUN_ALIGNMENT).min(region_bytes);
        }
        let offset = self.cursor;
        let bytes = (self.run_end - offset).min(u64::from(block_bytes)) as u32;
        self.cursor = offset + u64::from(bytes);
        (offset, bytes)
    }

    /// A number below `bound`, by multiplication instead of division.
    fn random_below(&mut self, bound: u64) -> u64 {
        self.state = self.state.wrapping_add(1);
        ((u128::from(mix(self.state)) * u128::from(bound)) >> 64) as u64
    }
}

/// Requests in order that one pass over the region takes.
pub(crate) fn requests_of_a_pass(settings: &Settings) -> u64 {
    settings.region_bytes.div_ceil(step(settings))
}

/// From the start of one request in order to that of the next.
fn step(settings: &Settings) -> u64 {
    let block_bytes = u64::from(settings.block_bytes);
    if settings.workload == Workload::Stride { block_bytes.max(STRIDE_BYTES) } else { block_bytes }
}

/// Where requests come from: drawn by a plan, or reading back all that a ledger has.
pub(crate) enum Source {
    Plan(Plan),
    ReadBack {
        cursor: u64,
        /// Where the region ends: its last block may be short.
        settings: Settings,
    },
}

impl Source {
    /// The next request; nothing when all has been read back.
    pub(crate) fn next(&mut self, ledger: Option<&Ledger>) -> Option<Operation> {
        match self {
            Self::Plan(plan) => Some(plan.draw()),
            Self::ReadBack { cursor, settings } => {
                let offset = ledger?.written_from(*cursor)?;
                let left = settings.region_bytes - offset;
                let bytes = left.min(u64::from(settings.block_bytes)) as u32;
                *cursor = offset + u64::from(bytes);
                Some(Operation { kind: Kind::Read, offset, bytes })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(workload: Workload) -> Settings {
        Settings {
            workload,
            region_bytes: 10 * 4096 + 512,
            first_byte: 0,
            block_bytes: 4096,
            read_percent: 70,
            flush_every: 0,
            seed: 1,
        }
    }

    #[test]
    fn discards_go_through_the_region_in_order_and_carry_only_where() {
        let settings =
            Settings { region_bytes: 5 << 20, block_bytes: 2 << 20, ..settings(Workload::Discard) };
        assert_eq!((settings.data_bytes_max(), requests_of_a_pass(&settings)), (16, 3));
        let mut plan = Plan::new(settings);
        let discard = |mib: u64, mibs: u32| Operation {
            kind: Kind::Discard,
            offset: mib << 20,
            bytes: mibs << 20,
        };
        let drawn: Vec<_> = (0..4).map(|_| plan.draw()).collect();
        assert_eq!(drawn, [discard(0, 2), discard(2, 2), discard(4, 1), discard(0, 2)]);
    }

    #[test]
    fn random_requests_reach_every_whole_block_and_nothing_else() {
        let mut plan = Plan::new(settings(Workload::Mix));
        let mut seen = [0; 10];
        let mut reads = 0;
        for _ in 0..10_000 {
            let operation = plan.draw();
            assert_eq!((operation.offset % 4096, operation.bytes), (0, 4096));
            seen[(operation.offset / 4096) as usize] += 1;
            reads += u32::from(operation.kind == Kind::Read);
        }
        assert!(seen.iter().all(|count| (800..1200).contains(count)), "{seen:?}");
        assert!((6_700..7_300).contains(&reads), "{reads} reads of 10000");
    }

    #[test]
    fn one_pass_in_order_covers_the_region_with_its_short_end() {
        let settings = settings(Workload::Write);
        let mut plan = Plan::new(settings);
        let mut end = 0;
        for _ in 0..requests_of_a_pass(&settings) {
            let operation = plan.draw();
            assert_eq!(operation.offset, end);
            end += u64::from(operation.bytes);
        }
        assert_eq!(end, settings.region_bytes);
        assert_eq!(plan.draw().offset, 0, "and starts again");
    }

    #[test]
    fn a_stride_writes_once_in_each_64_kib() {
        let settings = Settings { region_bytes: 200 << 10, ..settings(Workload::Stride) };
        let mut plan = Plan::new(settings);
        assert_eq!(requests_of_a_pass(&settings), 4);
        let drawn: Vec<_> = (0..5).map(|_| plan.draw()).collect();
        let offsets: Vec<u64> = drawn.iter().map(|it| it.offset >> 10).collect();
        assert_eq!(offsets, [0, 64, 128, 192, 0]);
        assert!(drawn.iter().all(|it| it.kind == Kind::Write));
    }

    #[test]
    fn runs_are_written_in_order_and_end_inside_the_region() {
        let region_bytes = 4 << 20;
        let settings = Settings { region_bytes, block_bytes: 65536, ..settings(Workload::Runs) };
        let mut plan = Plan::new(settings);
        let (mut runs, mut run_bytes, mut end) = (0, 0, 0);
        for _ in 0..1000 {
            let Operation { kind, offset, bytes } = plan.draw();
            assert_eq!((kind, offset % 4096), (Kind::Write, 0));
            assert!(offset + u64::from(bytes) <= region_bytes);
            runs += u64::from(offset != end);
            run_bytes += u64::from(bytes);
            end = offset + u64::from(bytes);
        }
        let mean = run_bytes / runs;
        assert!((100 << 10..170 << 10).contains(&mean), "{mean} bytes in a run");
    }

    #[test]
    fn a_flush_follows_every_third_write() {
        let mut plan = Plan::new(Settings { flush_every: 3, ..settings(Workload::RandWrite) });
        let kinds: Vec<_> = (0..8).map(|_| plan.draw().kind == Kind::Flush).collect();
        assert_eq!(kinds, [false, false, false, true, false, false, false, true]);
    }

    #[test]
    fn reading_back_visits_each_written_block_once() {
        let settings = settings(Workload::RandWrite);
        let mut ledger = Ledger::new(1, 4096, 11);
        for offset in [0, 3 * 4096, 10 * 4096] {
            ledger.next_stamp(offset);
        }
        let mut source = Source::ReadBack { cursor: 0, settings };
        let visited: Vec<_> = std::iter::from_fn(|| source.next(Some(&ledger)))
            .map(|operation| (operation.offset, operation.bytes))
            .collect();
        assert_eq!(visited, [(0, 4096), (3 * 4096, 4096), (10 * 4096, 512)]);
    }
}
