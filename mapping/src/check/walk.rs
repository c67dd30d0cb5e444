//! Follows trees, a batch of nodes at a time, without recursion.

use bessel_reactor::device::Device;
use bessel_reactor::units::{BLOCK_SIZE, BlockAddr};

use super::marks::{BitmapRead, Marks};
use super::{CheckReport, Finding, Path, Place, Severity, Structure, usage_of};
use crate::blocking::{Blocking, Span};
use crate::format::{
    Bitmap, Entry, EntryKind, ExtentType, LOG_ENTRIES_PER_BLOCK, LogEntry, NODE_BITS, NODE_ENTRIES,
    Node, NodeFault, check_entry, node_as_bytes_mut,
};
use crate::request::VolumeId;
use crate::store::{Losses, OpenedStore};

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
    losses: Losses,
    marks: Marks,
    progress: &'a mut dyn FnMut(u64, u64),
    pub(super) report: CheckReport,
}

impl<'a, 'd, D: Device> Walk<'a, 'd, D> {
    /// Reads the bitmaps.
    pub(super) fn new(
        io: Blocking<'d, D>,
        store: &'a OpenedStore,
        losses: Losses,
        report: CheckReport,
        progress: &'a mut dyn FnMut(u64, u64),
    ) -> Self {
        let marks = Marks::new(store.geometry);
        let mut walk = Self { io, store, losses, marks, progress, report };
        for extent in 0..store.geometry.extent_count {
            walk.read_bitmaps(extent);
        }
        walk
    }

    /// Reads the bitmap of an extent, if it has one.
    fn read_bitmaps(&mut self, extent: u64) {
        let geometry = self.store.geometry;
        let kind = self.store.extents.get(extent);
        let Some(usage) = usage_of(&mut self.report, kind) else { return };
        usage.extents += 1;
        let start = geometry.extent_start(extent);
        let mut bytes = vec![0; (geometry.bitmap_blocks * BLOCK_SIZE) as usize];
        // What cannot be read stays zero, which is damaged.
        self.io.read_each(&[Span { start, blocks: geometry.bitmap_blocks }], |addr, block| {
            let at = ((addr.get() - start.get()) * BLOCK_SIZE) as usize;
            if let Ok(block) = block {
                bytes[at..at + block.len()].copy_from_slice(block);
            }
        });
        for (index, block) in (0..).zip(bytes.chunks_exact(BLOCK_SIZE as usize)) {
            self.take_bitmap(extent, index, kind, block);
        }
    }

    fn take_bitmap(&mut self, extent: u64, index: u64, kind: ExtentType, block: &[u8]) {
        let geometry = self.store.geometry;
        let addr = geometry.bitmap_block(extent, index);
        let mut bitmap = Box::new(Bitmap::new());
        let mut read = match bitmap.decode_into(block, addr, self.store.secret) {
            Ok(()) => BitmapRead::Whole(bitmap),
            Err(damage) => {
                // Opening has not looked there: the catalogue has lost the extent.
                if self.store.catalogue[extent as usize].kind == ExtentType::Invalid {
                    let (severity, structure) = (Severity::Corrupt, Structure::Bitmap);
                    let place = format!("extent {extent}");
                    let finding = Finding::of(severity, structure, place, &damage);
                    self.report.report(finding.repairable());
                }
                BitmapRead::Damaged
            }
        };
        if let BitmapRead::Whole(bitmap) = &mut read
            && !bitmap.include(&geometry.fresh_bitmap(index))
        {
            let what = "offers the bitmap's own blocks, or blocks past the end of the extent";
            let place = format!("allocation bitmap at block {addr}");
            let (severity, structure) = (Severity::Corrupt, Structure::Bitmap);
            let finding = Finding::new(severity, structure, Some(addr), place, what);
            self.report.report(finding.repairable());
            read = BitmapRead::Amended(std::mem::take(bitmap));
        }
        let usable = geometry.fresh_bitmap_free(index);
        let free = read.bitmap().map_or(0, Bitmap::count_free);
        let usage = usage_of(&mut self.report, kind).expect("only these extents have bitmaps");
        usage.allocated += u64::from(usable - free);
        usage.leaked += u64::from(usable - free);
        self.marks.add_bitmap(extent, read);
    }

    /// Notes that a link that can be trusted leads to something of this type: where the catalogue
    /// has lost the extent, it tells what the extent holds.
    fn adopt(&mut self, block: BlockAddr, kind: ExtentType) {
        if let Some(extent) = self.losses.extents.adopt(&self.store.extents, block, kind) {
            self.read_bitmaps(extent);
        }
    }

    /// The blocks of a volume's log, as far as it could be read, and the sequence each begins with.
    pub(super) fn log_blocks(&self, volume: VolumeId) -> Vec<(BlockAddr, u64)> {
        let Some(log) = self.losses.logs.get(&volume) else { return Vec::new() };
        let first = log.entries.first().map_or(0, |entry| entry.sequence);
        log.blocks.iter().copied().zip((first..).step_by(LOG_ENTRIES_PER_BLOCK)).collect()
    }

    /// The snapshots of a volume that are not deleted, as far as its log could be read.
    pub(super) fn live_snapshots(&self, volume: VolumeId) -> Vec<LogEntry> {
        let entries = self.losses.logs.get(&volume).into_iter().flat_map(|log| &log.entries);
        entries.filter(|entry| !entry.deleted).cloned().collect()
    }

    /// A log block that was read. Nobody else may have it.
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
        self.adopt(tree.root, ExtentType::Metadata);
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
                self.losses.hide(|| format!("{}: {what}", tree.name));
                let (severity, structure) = (Severity::Corrupt, Structure::Node);
                let block = Some(visit.addr);
                self.report.report(Finding::new(severity, structure, block, &tree.name, what));
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
            if self.store.key.verify(*entry, addr, slot) {
                match entry.kind() {
                    EntryKind::Data if level == 1 => self.adopt(entry.block(), ExtentType::Data),
                    EntryKind::Node(below) if below + 1 == level => {
                        self.adopt(entry.block(), ExtentType::Metadata);
                    }
                    _ => {}
                }
            }
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
            self.losses.hide(|| format!("{}: {what}", tree.name));
            let (severity, structure) = (Severity::Corrupt, Structure::Node);
            self.report.report(Finding::new(severity, structure, Some(addr), &tree.name, what));
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
                let finding = conflict(name, path, what);
                self.report.report(finding.repairable());
            }
        }
        if let Some(what) = reached.conflict {
            // What lies below was followed as the first path has it, which may be the wrong one.
            self.losses.hide(|| format!("{name}: block {} is reached twice", path.block));
            self.report.report(conflict(name, path, what));
        }
        reached.first
    }

    /// What it came to.
    pub(super) fn finish(self) -> (Losses, Marks, CheckReport) {
        let total = self.report.metadata.reachable;
        (self.progress)(total, total);
        (self.losses, self.marks, self.report)
    }
}

/// Why a path should not lead to a block.
fn conflict(name: &str, path: Path, what: &str) -> Finding {
    let block = path.block;
    let (structure, of) = match path.place {
        Place::Tree { level: 0, first } => {
            (Structure::Data, format!("data block {block} (volume block {first})"))
        }
        Place::Tree { level, first } => {
            let of = format!("radix node at block {block} (level {level}, volume block {first})");
            (Structure::Node, of)
        }
        Place::Log { first_sequence, .. } => {
            let of = format!("snapshot log at block {block} (from snapshot {first_sequence})");
            (Structure::Log, of)
        }
    };
    Finding::new(Severity::Corrupt, structure, Some(block), name, format!("{of}: {what}"))
}
