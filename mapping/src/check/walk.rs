//! Follows trees, a batch of nodes at a time, without recursion.

use bessel_reactor::device::{Device, DeviceError};
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr};

use super::marks::Marks;
use super::{CheckReport, Finding, Path, Place, Severity, usage_of};
use crate::blocking::{Blocking, Span};
use crate::format::{
    Bitmap, Entry, ExtentType, NODE_BITS, NODE_ENTRIES, Node, NodeFault, check_entry,
    node_as_bytes_mut,
};
use crate::request::VolumeId;
use crate::store::{OpenError, OpenedStore};

/// Nodes read together. The stack then holds at most 3 levels × 64 × 512 nodes, 3 MiB.
const BATCH: usize = 64;

/// A tree to follow.
pub(super) struct Tree {
    /// What to call it.
    pub(super) name: String,
    pub(super) root: BlockAddr,
    pub(super) height: u8,
    /// It is a volume's current tree: its writable links mean what they say.
    pub(super) writable: bool,
}

/// A node to look at.
#[derive(Clone, Copy)]
struct Visit {
    addr: BlockAddr,
    level: u8,
    /// The first volume block it maps.
    first: u64,
    /// Every link from the root to it is writable.
    writable: bool,
}

/// A check under way.
pub(super) struct Walk<'a, 'd, D: Device> {
    io: Blocking<'d, D>,
    store: &'a OpenedStore,
    marks: Marks,
    progress: &'a mut dyn FnMut(u64, u64),
    pub(super) report: CheckReport,
}

impl<'a, 'd, D: Device> Walk<'a, 'd, D> {
    /// Reads the bitmaps.
    pub(super) fn new(
        io: Blocking<'d, D>,
        store: &'a OpenedStore,
        report: CheckReport,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Result<Self, OpenError> {
        let marks = Marks::new(store.geometry);
        let mut walk = Self { io, store, marks, progress, report };
        walk.read_bitmaps()
            .map_err(|source| OpenError::Device { doing: "reading the bitmaps", source })?;
        Ok(walk)
    }

    fn read_bitmaps(&mut self) -> Result<(), DeviceError> {
        let geometry = self.store.geometry;
        for (extent, entry) in (0u64..).zip(&self.store.catalogue) {
            let Some(usage) = usage_of(&mut self.report, entry.kind) else { continue };
            usage.extents += 1;
            let mut bytes = vec![0; (geometry.bitmap_blocks * BLOCK_SIZE) as usize];
            self.io.read_into(geometry.extent_start(extent), &mut bytes)?;
            for (index, block) in (0..).zip(bytes.chunks_exact(BLOCK_SIZE as usize)) {
                self.read_bitmap(extent, index, entry.kind, block);
            }
        }
        Ok(())
    }

    fn read_bitmap(&mut self, extent: u64, index: u64, kind: ExtentType, block: &[u8]) {
        let geometry = self.store.geometry;
        let addr = geometry.bitmap_block(extent, index);
        // Opening has reported a damaged one. Everything counts as allocated in it: nothing of it
        // is handed out.
        let mut bitmap = Bitmap::new();
        if bitmap.decode_into(block, addr, self.store.secret).is_err() {
            bitmap.set_range(0, Bitmap::BITS);
        }
        if !bitmap.include(&geometry.fresh_bitmap(index)) {
            let what = "offers the bitmap's own blocks, or blocks past the end of the extent";
            let place = format!("allocation bitmap at block {addr}");
            self.report.report(Finding::new(Severity::Corrupt, place, what));
        }
        let allocated = geometry.fresh_bitmap_free(index) - bitmap.count_free();
        let usage = usage_of(&mut self.report, kind).expect("only these extents have bitmaps");
        usage.allocated += u64::from(allocated);
        usage.leaked += u64::from(allocated);
        self.marks.add_bitmap(extent, bitmap);
    }

    /// A log block that opening has read. Nobody else may have it.
    pub(super) fn log_block(
        &mut self,
        name: &str,
        block: BlockAddr,
        volume: VolumeId,
        first_sequence: u64,
    ) {
        let place = Place::Log { volume: volume.0, first_sequence };
        self.arrive(name, Path { block, place, writable: true }, ExtentType::Metadata);
    }

    /// Follows a tree as far as nobody has been.
    pub(super) fn tree(&mut self, tree: &Tree) {
        let mut stack = Vec::new();
        let root = Visit { addr: tree.root, level: tree.height, first: 0, writable: tree.writable };
        self.arrive_at_node(tree, root, &mut stack);
        while !stack.is_empty() {
            let mut batch = stack.split_off(stack.len().saturating_sub(BATCH));
            batch.sort_by_key(|visit: &Visit| visit.addr);
            for (visit, node) in self.read_nodes(tree, &batch) {
                self.scan(tree, visit, &node, &mut stack);
            }
            let metadata = self.report.metadata;
            (self.progress)(metadata.reachable, metadata.allocated.max(metadata.reachable));
        }
    }

    /// Reads the nodes of a batch; reports those that cannot be read, and leaves them out.
    fn read_nodes(&mut self, tree: &Tree, batch: &[Visit]) -> Vec<(Visit, Box<Node>)> {
        let empty = || Box::new([Entry::default(); NODE_ENTRIES]);
        let mut nodes: Vec<_> = batch.iter().map(|&visit| (visit, empty())).collect();
        let spans = batch.iter().map(|visit| Span::one(visit.addr));
        let whole = self.io.read(spans, |addr, bytes| {
            let index = batch.binary_search_by_key(&addr, |visit| visit.addr);
            let (_, node) = &mut nodes[index.expect("only these blocks were asked for")];
            node_as_bytes_mut(node).copy_from_slice(bytes);
        });
        if whole.is_ok() {
            return nodes;
        }
        // Some block cannot be read: find out which, one at a time.
        nodes.retain_mut(|(visit, node)| {
            let outcome = self.io.read_into(visit.addr, node_as_bytes_mut(node));
            if let Err(error) = &outcome {
                let what = format!("radix node at block {} cannot be read: {error}", visit.addr);
                self.report.report(Finding::new(Severity::Corrupt, tree.name.as_str(), what));
            }
            outcome.is_ok()
        });
        nodes
    }

    /// Looks at every entry of a node.
    fn scan(&mut self, tree: &Tree, visit: Visit, node: &Node, stack: &mut Vec<Visit>) {
        let Visit { addr, level, first, writable } = visit;
        let mut first_fault: Option<NodeFault> = None;
        let mut faults = 0;
        for (slot, entry) in node.iter().enumerate() {
            let good = check_entry(node, addr, level, slot, self.store.key, &self.store.extents);
            if let Err(fault) = good {
                first_fault.get_or_insert(fault);
                faults += 1;
            } else if !entry.is_hole() {
                let child = Visit {
                    addr: entry.block(),
                    level: level - 1,
                    first: first + ((slot as u64) << (NODE_BITS * u32::from(level - 1))),
                    writable: writable && !entry.read_only(),
                };
                self.arrive_at_node(tree, child, stack);
            }
        }
        if let Some(fault) = first_fault {
            let what = match faults {
                1 => fault.to_string(),
                _ => format!("{fault}; {} more entries of the node are bad", faults - 1),
            };
            self.report.report(Finding::new(Severity::Corrupt, tree.name.as_str(), what));
        }
    }

    /// A node, or a block of data at level 0.
    fn arrive_at_node(&mut self, tree: &Tree, visit: Visit, stack: &mut Vec<Visit>) {
        let Visit { addr, level, first, writable } = visit;
        let kind = if level == 0 { ExtentType::Data } else { ExtentType::Metadata };
        let path = Path { block: addr, place: Place::Tree { level, first }, writable };
        if self.arrive(&tree.name, path, kind) && level > 0 {
            stack.push(visit);
        }
    }

    /// Notes that a path leads to a block; true when it is the first that does.
    fn arrive(&mut self, name: &str, path: Path, kind: ExtentType) -> bool {
        let reached = self.marks.reach(path);
        if reached.first {
            let usage = usage_of(&mut self.report, kind).expect("only these extents are reached");
            usage.reachable += 1;
            usage.leaked -= u64::from(!reached.free);
            if reached.free {
                let what = "it is free in its bitmap and may be handed out again";
                self.conflict(name, path, what);
            }
        }
        if let Some(what) = reached.conflict {
            self.conflict(name, path, what);
        }
        reached.first
    }

    fn conflict(&mut self, name: &str, path: Path, what: &str) {
        let block = path.block;
        let what = match path.place {
            Place::Tree { level: 0, first } => format!("data block {block} (volume block {first})"),
            Place::Tree { level, first } => {
                format!("radix node at block {block} (level {level}, volume block {first})")
            }
            Place::Log { first_sequence, .. } => {
                format!("snapshot log at block {block} (from snapshot {first_sequence})")
            }
        } + ": "
            + what;
        self.report.report(Finding::new(Severity::Corrupt, name, what));
    }

    /// What it came to.
    pub(super) fn finish(self) -> CheckReport {
        let total = self.report.metadata.reachable;
        (self.progress)(total, total);
        self.report
    }
}
