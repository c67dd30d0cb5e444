//! `bessel check`: whether everything that can be reached on a store is what it should be.
//!
//! Offline and read-only. Every volume's current tree and every snapshot's tree is walked, shared
//! subtrees once. What is checked of a block that is reached:
//!
//! - its entry has a good tag and leads to the level below, into an extent of the right type;
//! - it is allocated in its extent's bitmap, else it could be handed out again;
//! - it is reached at one place of a volume only: sharing comes from snapshots, which keep places,
//!   so a block at two places is the work of a stray write or a double allocation;
//! - if the path to it is writable, it is the only path. A block is only ever writable in a single
//!   tree; a snapshot's own links that were writable are frozen with it and count as read-only.
//!
//! Blocks that are allocated and not reached are counted, not reported: a crash leaks its claims,
//! deleted snapshots await the collector, and neither does harm.
//!
//! `marks.rs` remembers what was reached; `walk.rs` follows the trees; `repair.rs` writes again what
//! follows from what was found.
//!
//! The store is hostile: memory is a few bits for each block that its extents have, and a path
//! through a tree is as long as the tree is high.

mod marks;
mod repair;
mod walk;

pub use repair::{RepairPlan, RepairReport, RepairStep, plan_repair, repair};

use std::collections::BTreeMap;

use bessel_reactor::device::Device;
use bessel_reactor::units::BlockAddr;

use crate::blocking::{Blocking, Span};
use crate::format::{Damage, ExtentType, VolumeRecord};
use crate::store::{Losses, OpenError, OpenedStore, survey};
use marks::Marks;
use walk::{Tree, Walk};

/// How bad a finding is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Severity {
    /// Data is lost, or will be if the store is written.
    Corrupt,
    /// Something is not as it should be; nothing is lost by it.
    Warning,
}

/// What on the device something is about.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Structure {
    /// A superblock copy.
    Superblock,
    /// A host record.
    Host,
    /// The group table.
    Group,
    /// The extent catalogue.
    Catalogue,
    /// An allocation bitmap.
    Bitmap,
    /// A volume record.
    Record,
    /// A snapshot log.
    Log,
    /// A radix node.
    Node,
    /// A block of guest data.
    Data,
}

impl Structure {
    /// One word for programs.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Superblock => "superblock",
            Self::Host => "host",
            Self::Group => "group",
            Self::Catalogue => "catalogue",
            Self::Bitmap => "bitmap",
            Self::Record => "record",
            Self::Log => "log",
            Self::Node => "node",
            Self::Data => "data",
        }
    }
}

/// Something on the device that is not as it should be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What is damaged.
    pub structure: Structure,
    /// Which block, if it is one.
    pub block: Option<BlockAddr>,
    /// Whose it is, as `volume "vm1"`.
    pub place: String,
    /// What is wrong.
    pub what: String,
    /// It can be written again from what else is on the device: see [`repair`].
    pub repairable: bool,
}

impl Finding {
    pub(crate) fn new(
        severity: Severity,
        structure: Structure,
        block: Option<BlockAddr>,
        place: impl Into<String>,
        what: impl Into<String>,
    ) -> Self {
        let (place, what) = (place.into(), what.into());
        Self { severity, structure, block, place, what, repairable: false }
    }

    /// A damaged sector.
    pub(crate) fn of(
        severity: Severity,
        structure: Structure,
        place: impl Into<String>,
        damage: &Damage,
    ) -> Self {
        Self::new(severity, structure, Some(damage.block), place, damage.to_string())
    }

    pub(crate) fn repairable(self) -> Self {
        Self { repairable: true, ..self }
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let severity = match self.severity {
            Severity::Corrupt => "corrupt",
            Severity::Warning => "warning",
        };
        write!(f, "{severity}: {}: {}", self.place, self.what)
    }
}

/// Blocks of one extent type, bitmaps not counted.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Usage {
    /// Initialised extents.
    pub extents: u64,
    /// Blocks that their bitmaps say are allocated or claimed.
    pub allocated: u64,
    /// Blocks that some tree or log reaches.
    pub reachable: u64,
    /// Blocks allocated and not reached: leaked, claimed, or awaiting the collector.
    pub leaked: u64,
}

/// What a check came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CheckReport {
    /// What is wrong, the first [`FINDINGS_MAX`].
    pub findings: Vec<Finding>,
    /// How many more there are.
    pub findings_omitted: u64,
    /// Volumes that can be opened, whose trees were walked.
    pub volumes: u64,
    /// Snapshots whose trees were walked.
    pub snapshots: u64,
    /// Blocks of guest data.
    pub data: Usage,
    /// Blocks of radix nodes and snapshot logs.
    pub metadata: Usage,
}

/// Findings kept: enough to see what happened, few enough to read.
pub const FINDINGS_MAX: usize = 1000;

impl CheckReport {
    /// True when nothing was found.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty()
    }

    fn report(&mut self, finding: Finding) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(finding);
        } else {
            self.findings_omitted += 1;
        }
    }
}

/// Checks the store on a device. `progress` is told metadata blocks visited and to visit, at most.
///
/// # Errors
/// Why there is no store to check. Damage inside one is a finding, not an error.
pub fn check<D: Device>(
    device: &mut D,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CheckReport, OpenError> {
    Ok(look(device, progress)?.report)
}

/// Everything that a check has found out.
struct Look {
    store: OpenedStore,
    losses: Losses,
    marks: Marks,
    report: CheckReport,
}

fn look<D: Device>(device: &mut D, progress: &mut dyn FnMut(u64, u64)) -> Result<Look, OpenError> {
    let (mut store, mut losses) = survey(device)?;
    let mut report = CheckReport {
        findings: std::mem::take(&mut store.findings),
        findings_omitted: store.findings_omitted,
        volumes: 0,
        snapshots: 0,
        data: Usage::default(),
        metadata: Usage::default(),
    };
    std::mem::take(&mut store.faults).into_iter().for_each(|fault| report.report(fault));
    let mut io = Blocking::new(device);
    check_groups(&mut io, &store, &mut report);
    let unopened = std::mem::take(&mut losses.unopened);
    let mut walk = Walk::new(io, &store, losses, report, progress);
    visit_all(&store, &unopened, &mut walk);
    let (losses, marks, mut report) = walk.finish();
    for finding in &mut report.findings {
        if finding.structure == Structure::Catalogue {
            finding.repairable = repair::is_derivable(&losses, &store, finding);
        }
        // Whose bits would be rebuilt, if nobody knows what the extent holds?
        let extent = finding.block.map(|block| store.geometry.extent_of(block));
        if extent.is_some_and(|extent| losses.extents.doubtful.contains(&extent)) {
            finding.repairable = false;
        }
    }
    Ok(Look { store, losses, marks, report })
}

/// Groups come with a later feature, which will be announced by a flag: until then, zeroes.
fn check_groups<D: Device>(
    io: &mut Blocking<'_, D>,
    store: &OpenedStore,
    report: &mut CheckReport,
) {
    let start = store.geometry.group_start;
    let blocks = 2 * u64::from(store.geometry.group_slots);
    let mut wrong = BTreeMap::new();
    io.read_each(&[Span { start, blocks }], |addr, block| {
        match block {
            Ok(block) if block.iter().all(|&byte| byte == 0) => wrong.remove(&addr),
            Ok(_) => wrong.insert(addr, format!("block {addr} is reserved and not zero")),
            Err(error) => wrong.insert(addr, format!("block {addr} cannot be read: {error}")),
        };
    });
    for (addr, what) in wrong {
        let (severity, structure) = (Severity::Warning, Structure::Group);
        report.report(Finding::new(severity, structure, Some(addr), "group table", what));
    }
}

/// Current trees go first: a block they own that a snapshot reaches too is then reported for the
/// snapshot, which is the one that reads wrong bytes.
fn visit_all<D: Device>(
    store: &OpenedStore,
    unopened: &[(String, VolumeRecord)],
    walk: &mut Walk<'_, '_, D>,
) {
    let live = || store.directory.entries().filter(|entry| !entry.record.deleted);
    for entry in live() {
        let record = &entry.record;
        let name = format!("volume {:?}", record.name);
        for (addr, first_sequence) in walk.log_blocks(record.id) {
            walk.log_block(&name, addr, record.id, first_sequence);
        }
    }
    for entry in live() {
        let record = &entry.record;
        let name = format!("volume {:?}", record.name);
        walk.tree(&Tree { name, root: record.root, height: record.height, writable: true });
        walk.report.volumes += 1;
    }
    for entry in live() {
        for snapshot in walk.live_snapshots(entry.record.id) {
            let (id, sequence) = (entry.record.id, snapshot.sequence);
            let name = format!("snapshot {id}.{sequence} of volume {:?}", entry.record.name);
            let (root, height) = (snapshot.root, snapshot.height);
            walk.tree(&Tree { name, root, height, writable: false });
            walk.report.snapshots += 1;
        }
    }
    // What else is wrong with a volume that does not open, and which blocks it needs. Nobody writes by
    // its tree as it is.
    for (name, record) in unopened {
        if store.extents.holds(record.root, ExtentType::Metadata) {
            let (name, root, height) = (name.clone(), record.root, record.height);
            walk.tree(&Tree { name, root, height, writable: false });
        }
    }
}

/// Which of the two kinds of usage a block counts to.
fn usage_of(report: &mut CheckReport, kind: ExtentType) -> Option<&mut Usage> {
    match kind {
        ExtentType::Data => Some(&mut report.data),
        ExtentType::Metadata => Some(&mut report.metadata),
        ExtentType::Invalid | ExtentType::Unused | ExtentType::System => None,
    }
}

/// Where in a volume a block belongs: what tells a shared block from a stray one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    /// A data block (level 0) or node of a tree, by the first volume block it maps.
    Tree { level: u8, first: u64 },
    /// A snapshot log block.
    Log { volume: u64, first_sequence: u64 },
}

/// A path that leads to a block.
#[derive(Clone, Copy, Debug)]
struct Path {
    block: BlockAddr,
    place: Place,
    writable: bool,
}

#[cfg(test)]
mod tests;
