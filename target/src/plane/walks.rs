//! What is found by walking trees: where two snapshots differ, and what one holds, to be exported.
//!
//! The control plane only prepares a walk; it runs on a thread of its own, with a device of its own,
//! while the plane answers others. Until it ends the snapshots are *pinned*: deleting one of them is
//! refused, and so is deleting its volume.

use super::{Answered, ControlPlane, Step};
use crate::api::Refusal;
use crate::api::RefusalKind;
use crate::api::types::{
    DiffRange, DiffView, JobKind, RangeKind, SnapshotSpaceView, SpaceView, TreeSpaceView,
};
use crate::jobs::Job;
use crate::one_line;
use crate::reference::SnapshotReference;
use crate::stream::{Encoder, Header, Part};
use bessel_mapping::blocking::Blocking;
use bessel_mapping::forest::{Tree, TreeId};
use bessel_mapping::request::{SnapshotId, SnapshotInfo, VolumeId};
use bessel_mapping::store::OpenedStore;
use bessel_mapping::walk::{
    Change, ChangeKind, Changes, NodeReader, Space, TreeSpace, UsageWalk, WalkError,
};
use bessel_reactor::device::{FileDevice, OpenOptions};
use bessel_reactor::units::{BLOCK_SIZE, ByteCount};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

/// Snapshots that are being read, and how often.
#[derive(Clone, Default)]
pub(crate) struct Pins(Arc<Mutex<BTreeMap<SnapshotId, u32>>>);

/// Keeps snapshots pinned until it is dropped.
pub(crate) struct Pinned {
    pins: Pins,
    snapshots: Vec<SnapshotId>,
}

impl Pins {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<SnapshotId, u32>> {
        self.0.lock().expect("no holder of this lock panics")
    }

    pub(super) fn pin(&self, snapshots: Vec<SnapshotId>) -> Pinned {
        let mut pinned = self.lock();
        snapshots.iter().for_each(|snapshot| *pinned.entry(*snapshot).or_default() += 1);
        Pinned { pins: self.clone(), snapshots }
    }

    /// Refuses to delete a snapshot that is being read.
    pub(super) fn check_free(&self, snapshot: SnapshotId) -> Answered<()> {
        if !self.lock().contains_key(&snapshot) {
            return Ok(());
        }
        Err(Refusal::conflict(format!(
            "snapshot {snapshot} is being read by a diff or an export; delete it when that has ended"
        )))
    }

    /// Refuses to delete a volume of which a snapshot is being read.
    pub(super) fn check_volume_free(&self, volume: VolumeId) -> Answered<()> {
        let pinned = self.lock();
        match pinned.keys().find(|snapshot| snapshot.volume == volume) {
            None => Ok(()),
            Some(snapshot) => Err(Refusal::conflict(format!(
                "snapshot {snapshot} of it is being read by a diff or an export; delete it when that \
                 has ended"
            ))),
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let mut pinned = self.pins.lock();
        for snapshot in &self.snapshots {
            let count = pinned.get_mut(snapshot).expect("it was pinned");
            *count -= 1;
            if *count == 0 {
                pinned.remove(snapshot);
            }
        }
    }
}

/// A walk that compares two snapshots, prepared.
pub(crate) struct DiffPlan {
    source: WalkSource,
    from: SnapshotInfo,
    to: SnapshotInfo,
    _pinned: Pinned,
}

/// A snapshot to be read out, or its differences to another, prepared.
pub(crate) struct ExportPlan {
    source: WalkSource,
    store: [u8; 16],
    base: Option<SnapshotInfo>,
    snapshot: SnapshotInfo,
    job: Job,
    _pinned: Pinned,
}

/// A walk that finds out what space the trees of a forest take, prepared.
pub(crate) struct SpacePlan {
    source: WalkSource,
    volume: VolumeId,
    name: String,
    trees: Vec<(TreeId, Tree)>,
    _pinned: Pinned,
}

/// Where a walk reads.
struct WalkSource {
    store: Arc<OpenedStore>,
    path: PathBuf,
}

impl WalkSource {
    fn open(&self) -> Answered<FileDevice> {
        let options = OpenOptions { depth: 64, read_only: true, ..OpenOptions::default() };
        FileDevice::open(&self.path, &options).map_err(|error| Refusal::failed(one_line(&error)))
    }
}

fn tree(snapshot: &SnapshotInfo) -> Tree {
    Tree { root: snapshot.root, height: snapshot.height }
}

impl ControlPlane {
    fn walk_source(&self) -> WalkSource {
        let (store, path) = (Arc::clone(&self.store.opened), self.store.device.clone());
        WalkSource { store, path }
    }

    /// Prepares a walk that compares two snapshots of one forest.
    pub(crate) fn plan_diff(
        &self,
        from: &SnapshotReference,
        to: &SnapshotReference,
    ) -> Answered<DiffPlan> {
        let (from, to) = (self.find_snapshot(from)?, self.find_snapshot(to)?);
        let stem = |snapshot: &SnapshotInfo| self.stem_of(snapshot.id.volume);
        if stem(&from) != stem(&to) {
            return Err(unrelated(from.id, to.id));
        }
        let pinned = self.pins.pin(vec![from.id, to.id]);
        Ok(DiffPlan { source: self.walk_source(), from, to, _pinned: pinned })
    }

    /// Prepares to read out a snapshot, whole or as the difference to another of its forest. It is
    /// waited for until it has settled.
    pub(crate) fn plan_export(
        &self,
        snapshot: &SnapshotReference,
        base: Option<&SnapshotReference>,
    ) -> Answered<ExportPlan> {
        let settled = self.settled_origin(snapshot)?.snapshot;
        let snapshot = self.find_snapshot(&SnapshotReference::Id(settled))?;
        let base = base.map(|base| self.find_snapshot(base)).transpose()?;
        if let Some(base) = &base
            && self.stem_of(base.id.volume) != self.stem_of(settled.volume)
        {
            return Err(unrelated(base.id, settled));
        }
        let pinned = self.pins.pin(base.iter().chain([&snapshot]).map(|it| it.id).collect());
        let (source, store) = (self.walk_source(), self.store.uuid);
        let subject = match &base {
            None => snapshot.id.to_string(),
            Some(base) => format!("{} from {}", snapshot.id, base.id),
        };
        let job = self.jobs.begin(JobKind::Export, &subject, Some(snapshot.size.get()));
        Ok(ExportPlan { source, store, base, snapshot, job, _pinned: pinned })
    }

    /// Prepares to find out what space a volume and its snapshots take, and what of that they share
    /// with others of their forest; or a part of that, and says when to go on.
    pub(crate) fn plan_space(&mut self, name: &str) -> Answered<Result<SpacePlan, Step>> {
        let volume = self.find(name)?.id;
        self.begin_question();
        let connected = self.forest.connected(volume);
        for id in &connected {
            match self.catch_up(*id)? {
                Step::Done => {}
                step => return Ok(Err(step)),
            }
        }
        let mut trees: Vec<(TreeId, Tree)> = Vec::new();
        for id in connected {
            match self.forest.living(id) {
                Some(living) => trees.extend(living),
                None if self.is_present(id) => {
                    return Err(Refusal::conflict(format!(
                        "nobody knows what volume {id} shares with it, which has failed, has a damaged \
                         snapshot log or could not be opened; mend that first"
                    )));
                }
                None => {}
            }
        }
        let snapshots = trees.iter().filter_map(|(id, _)| match id {
            TreeId::Snapshot(id) => Some(*id),
            TreeId::Current(_) => None,
        });
        let pinned = self.pins.pin(snapshots.collect());
        let (source, name) = (self.walk_source(), name.to_owned());
        Ok(Ok(SpacePlan { source, volume, name, trees, _pinned: pinned }))
    }

    fn is_present(&self, id: VolumeId) -> bool {
        self.directory.get(id).is_some_and(|volume| !volume.deleted)
    }

    /// The volume from which this one comes in the end, by its origins.
    fn stem_of(&self, volume: VolumeId) -> VolumeId {
        let (mut stem, mut seen) = (volume, std::collections::BTreeSet::new());
        // A cycle of origins, which only a corrupt store can have, ends where it began.
        while seen.insert(stem)
            && let Some(origin) = self.directory.get(stem).and_then(|volume| volume.origin)
        {
            stem = origin.volume;
        }
        stem
    }
}

impl DiffPlan {
    /// Does it. It takes as long as there are differences.
    pub(crate) fn run(self) -> Answered<DiffView> {
        let mut device = self.source.open()?;
        let mut io = Blocking::new(&mut device);
        let mut reader = NodeReader::new(&self.source.store);
        let mut ranges: Vec<DiffRange> = Vec::new();
        let damaged = |error| Refusal::new(RefusalKind::Damaged, one_line(&error));
        let mut walk =
            Changes::new(&reader, Some(tree(&self.from)), tree(&self.to)).map_err(damaged)?;
        let end = self.from.size.max(self.to.size).get();
        let mut note = |change: Change| note_range(&mut ranges, change, end);
        while !walk.step(&mut reader, &mut io, &mut note).map_err(damaged)? {}
        Ok(DiffView {
            from: self.from.id.to_string(),
            to: self.to.id.to_string(),
            from_size_bytes: self.from.size.get(),
            to_size_bytes: self.to.size.get(),
            changed_bytes: ranges.iter().map(|range| range.length_bytes).sum(),
            nodes_read: reader.nodes_read(),
            ranges,
        })
    }
}

fn unrelated(from: SnapshotId, to: SnapshotId) -> Refusal {
    Refusal::malformed(format!(
        "snapshots {from} and {to} have no origin in common, so all of them differs; a diff is of one \
         volume, its clones and theirs"
    ))
}

/// Bytes that are read and sent together.
const EXPORT_BYTES: usize = 1 << 20;

impl ExportPlan {
    /// Does it: gives `send` the bytes of a [stream](crate::stream), piece by piece, until that has
    /// nobody to give them to.
    ///
    /// # Errors
    /// Why there is no more: it has been sent, too.
    pub(crate) fn run(self, mut send: impl FnMut(Vec<u8>) -> Result<(), Gone>) -> Answered<()> {
        let mut encoder = Encoder::default();
        let header = Header {
            store: self.store,
            snapshot: Some(self.snapshot.id),
            size: self.snapshot.size,
            time: self.snapshot.time,
            base: self.base.as_ref().map(|base| (base.id, base.size)),
        };
        if send(encoder.header(&header).to_vec()).is_err() {
            return Ok(());
        }
        match self.send_parts(&mut encoder, &mut send) {
            Ok(()) | Err(Ended::Gone) => Ok(()),
            Err(Ended::Failed(refusal)) => {
                let _ = send(encoder.break_off(&refusal.message));
                Err(refusal)
            }
        }
    }

    fn send_parts(
        &self,
        encoder: &mut Encoder,
        send: &mut impl FnMut(Vec<u8>) -> Result<(), Gone>,
    ) -> Result<(), Ended> {
        let damaged = |error| Refusal::new(RefusalKind::Damaged, one_line(&error));
        let mut device = self.source.open()?;
        let mut io = Blocking::new(&mut device);
        let mut reader = NodeReader::new(&self.source.store);
        let mut walk = Changes::new(&reader, self.base.as_ref().map(tree), tree(&self.snapshot))
            .map_err(damaged)?;
        let mut found = Vec::new();
        let size = self.snapshot.size.get();
        let mut position = 0;
        let mut pass = |to: u64| {
            // The last block may lie past the end in part.
            let to = to.min(size).max(position);
            self.job.advance(to - position);
            position = to;
        };
        let mut over = false;
        while !over {
            over = walk
                .step(&mut reader, &mut io, &mut |change| found.push(change))
                .map_err(damaged)?;
            for Change { first, blocks, now } in found.drain(..) {
                let start = ByteCount::from_blocks(first.get()).get();
                let ChangeKind::Data(home) = now else {
                    send(encoder.part(Part::Hole { first, blocks }).to_vec())?;
                    pass(start + ByteCount::from_blocks(blocks).get());
                    continue;
                };
                send(encoder.part(Part::Data { first, blocks }).to_vec())?;
                let piece = EXPORT_BYTES as u64 / BLOCK_SIZE;
                for done in (0..blocks).step_by(piece as usize) {
                    let mut bytes = vec![0; ((blocks - done).min(piece) * BLOCK_SIZE) as usize];
                    let block = home.add(done);
                    io.read_into(block, &mut bytes).map_err(|error| {
                        let what = format!("data at block {block} cannot be read: {error}");
                        Refusal::new(RefusalKind::Damaged, what)
                    })?;
                    encoder.data(&bytes);
                    let count = bytes.len() as u64;
                    send(bytes)?;
                    pass(start + ByteCount::from_blocks(done).get() + count);
                }
            }
        }
        pass(size);
        send(encoder.part(Part::End { size: None }).to_vec())?;
        Ok(())
    }
}

/// Nobody takes what is sent.
#[derive(Debug)]
pub(crate) struct Gone;

/// Why an export has not come to its end.
enum Ended {
    Gone,
    Failed(Refusal),
}

impl From<Gone> for Ended {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

impl From<Refusal> for Ended {
    fn from(refusal: Refusal) -> Self {
        Self::Failed(refusal)
    }
}

impl SpacePlan {
    /// Does it. Every radix node of the forest is read, most of them twice.
    ///
    /// # Errors
    /// Also when a current tree was changed under the walk and led it astray: a plan that is made anew
    /// knows the trees as they are then.
    pub(crate) fn run(self) -> Answered<SpaceView> {
        let mut device = self.source.open()?;
        let mut io = Blocking::new(&mut device);
        let trees = self.trees.iter().map(|(_, tree)| *tree).collect();
        match Self::walk(&self.source.store, &mut io, trees) {
            Ok((spaces, total)) => Ok(self.view(&spaces, total)),
            Err(error) => Err(Refusal::new(RefusalKind::Damaged, one_line(&error))),
        }
    }

    fn walk(
        store: &OpenedStore,
        io: &mut Blocking<'_, FileDevice>,
        trees: Vec<Tree>,
    ) -> Result<(Vec<TreeSpace>, Space), WalkError> {
        let mut reader = NodeReader::new(store);
        let mut walk = UsageWalk::new(&reader, trees)?;
        while !walk.step(&mut reader, io)? {}
        let (spaces, total) = walk.spaces();
        Ok((spaces.to_vec(), total))
    }

    fn view(&self, spaces: &[TreeSpace], total: Space) -> SpaceView {
        let of = |space: &TreeSpace| {
            let bytes = |it: Space| ByteCount::from_blocks(it.data + it.nodes).get();
            let (refers, alone) = (bytes(space.refers), bytes(space.alone));
            TreeSpaceView {
                refers_bytes: refers,
                alone_bytes: alone,
                shared_bytes: refers.saturating_sub(alone),
            }
        };
        let all = || self.trees.iter().zip(spaces);
        let current = all().find(|((id, _), _)| *id == TreeId::Current(self.volume));
        let snapshots = all().filter_map(|((id, _), space)| match id {
            TreeId::Snapshot(id) if id.volume == self.volume => {
                Some(SnapshotSpaceView { id: id.to_string(), space: of(space) })
            }
            _ => None,
        });
        SpaceView {
            volume: self.name.clone(),
            current: current.map(|(_, space)| of(space)),
            snapshots: snapshots.collect(),
            forest_data_bytes: ByteCount::from_blocks(total.data).get(),
            forest_nodes_bytes: ByteCount::from_blocks(total.nodes).get(),
        }
    }
}

/// Adds a change, joined to the range before it where only the store tells them apart. The last block
/// may lie past `end`, the end of the volume, in part.
fn note_range(ranges: &mut Vec<DiffRange>, change: Change, end: u64) {
    let first_bytes = ByteCount::from_blocks(change.first.get()).get();
    let length = ByteCount::from_blocks(change.blocks).get();
    let length_bytes = length.min(end.saturating_sub(first_bytes));
    let now = match change.now {
        ChangeKind::Data(_) => RangeKind::Data,
        ChangeKind::Hole => RangeKind::Hole,
    };
    match ranges.last_mut() {
        Some(last) if last.now == now && last.first_bytes + last.length_bytes == first_bytes => {
            last.length_bytes += length_bytes;
        }
        _ => ranges.push(DiffRange { first_bytes, length_bytes, now }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bessel_reactor::units::{BlockAddr, VolumeBlock};

    #[test]
    fn ranges_that_only_the_store_tells_apart_are_one() {
        let mut ranges = Vec::new();
        let data = |block| ChangeKind::Data(BlockAddr::new(block));
        let changes =
            [(0, 2, data(9)), (2, 1, data(50)), (3, 1, ChangeKind::Hole), (9, 1, data(1))];
        for (first, blocks, now) in changes {
            let first = VolumeBlock::new(first);
            note_range(&mut ranges, Change { first, blocks, now }, 9 * 4096 + 512);
        }
        let found: Vec<_> =
            ranges.iter().map(|it| (it.first_bytes, it.length_bytes, it.now)).collect();
        assert_eq!(
            found,
            [
                (0, 3 * 4096, RangeKind::Data),
                (3 * 4096, 4096, RangeKind::Hole),
                (9 * 4096, 512, RangeKind::Data)
            ]
        );
    }

    #[test]
    fn a_pinned_snapshot_is_not_deleted() {
        let pins = Pins::default();
        let id = |sequence| SnapshotId { volume: VolumeId(3), sequence };
        let first = pins.pin(vec![id(1), id(1)]);
        let second = pins.pin(vec![id(1), id(2)]);
        assert!(pins.check_free(id(1)).is_err() && pins.check_free(id(3)).is_ok());
        drop(first);
        assert!(pins.check_free(id(1)).is_err() && pins.check_volume_free(VolumeId(3)).is_err());
        drop(second);
        assert!(pins.check_free(id(1)).is_ok() && pins.check_volume_free(VolumeId(3)).is_ok());
    }
}
