//! The oracle: what each sector may hold, by the rules of DESIGN §4 and §5 and nothing else.
//!
//! For every sector it keeps the values that were written and when. A live read may return a value
//! unless a later write that began after that value's own end has completed (per-sector
//! linearizability). A power cut may bring back every value that no durable write has replaced.
//! Once something has been seen, what it rules out is dropped: a sector never changes by itself.
//! A snapshot is a read of the whole volume that lasts from its request to its reply.
//!
//! It knows nothing of blocks, nodes or devices: whatever the pipeline does, this must hold.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use bessel_mapping::request::{
    IoKind, IoStatus, LogState, SnapshotId, SnapshotInfo, VolumeId, VolumeInfo,
};
use bessel_reactor::clock::WallTime;
use bessel_reactor::units::{SECTOR_SIZE, SECTORS_PER_BLOCK};

/// What a sector holds: the number of the write that filled it, or [`ZERO`].
pub type Value = u64;

/// A sector that reads as zeroes.
pub const ZERO: Value = 0;

/// Not ended yet.
const NEVER: u64 = u64::MAX;

const SECTOR: usize = SECTOR_SIZE as usize;
const MAGIC: u64 = u64::from_le_bytes(*b"sector!\0");

/// Fills `bytes` with what `value` looks like in `sector`.
pub fn stamp(value: Value, sector: u64, bytes: &mut [u8]) {
    if value == ZERO {
        return bytes.fill(0);
    }
    let mut words = bytes.chunks_exact_mut(8);
    let mut state = value ^ sector.rotate_left(32);
    for word in [MAGIC, value, sector] {
        words.next().expect("a sector has 64 words").copy_from_slice(&word.to_le_bytes());
    }
    for word in words {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        word.copy_from_slice(&state.to_le_bytes());
    }
}

/// What value `bytes`, read from `sector`, is; or what they look like instead.
pub fn recognise(sector: u64, bytes: &[u8]) -> Result<Value, String> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(ZERO);
    }
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let mut expected = [0; SECTOR];
    stamp(word(8), sector, &mut expected);
    if word(8) != ZERO && bytes == expected {
        return Ok(word(8));
    }
    if bytes.iter().all(|byte| *byte == bytes[0]) {
        return Err(format!("bytes {:#04x} that no guest wrote: a leak of old contents", bytes[0]));
    }
    if word(0) == MAGIC {
        return Err(format!("(torn?) value {} as written to sector {}", word(8), word(16)));
    }
    Err(format!("foreign bytes, starting {:02x?}", &bytes[..16]))
}

/// One write to one sector.
#[derive(Clone, Debug)]
struct Candidate {
    value: Value,
    op: u64,
    submitted: u64,
    ended: u64,
    /// It ended well, so it happened, and whatever ended before it began is overwritten.
    applied: bool,
    /// No power cut can undo it.
    durable: bool,
    /// Another one began after it had ended, and has ended well.
    overwritten: bool,
    /// Only a power cut can bring it back: it is overwritten, or a read has shown that it is.
    gone: bool,
}

impl Candidate {
    /// Something the device certainly holds since `time`.
    fn settled(value: Value, time: u64) -> Self {
        Self {
            value,
            op: 0,
            submitted: time,
            ended: time,
            applied: true,
            durable: true,
            overwritten: false,
            gone: false,
        }
    }
}

type ImageId = usize;

/// What a snapshot holds, in sectors where it differs from `base`.
#[derive(Clone, Debug)]
struct Image {
    base: Option<ImageId>,
    sectors: BTreeMap<u64, Vec<Value>>,
}

/// What a volume holds, in sectors where it differs from `base`.
#[derive(Clone, Default, Debug)]
struct Content {
    base: Option<ImageId>,
    sectors: BTreeMap<u64, Vec<Candidate>>,
    /// Sectors that a power cut might change.
    unsettled: BTreeSet<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Existence {
    Yes,
    No,
    /// Being made. Until it has been, its identity may go to another.
    Making,
    /// Being made where the device is to have nothing of it. Its identity may go to another, too.
    Withheld,
    /// Being deleted.
    Deleting,
}

#[derive(Clone, Debug)]
struct SnapshotModel {
    time: u64,
    labels: Vec<Option<String>>,
    deleted: Vec<bool>,
    image: ImageId,
}

#[derive(Clone, Debug)]
struct PendingSnapshot {
    submitted: u64,
    time: u64,
    label: Option<String>,
    image: ImageId,
    /// For a rollback: what the volume holds once this snapshot is there.
    then: Option<Content>,
}

#[derive(Clone, Debug)]
struct VolumeModel {
    existence: Existence,
    names: Vec<String>,
    sizes: Vec<u64>,
    content: Content,
    snapshots: BTreeMap<u64, SnapshotModel>,
    pending: Vec<PendingSnapshot>,
    writethrough: bool,
}

#[derive(Clone, Debug)]
struct Op {
    volume: VolumeId,
    kind: IoKind,
    sector: u64,
    sectors: u64,
    submitted: u64,
    value: Value,
    writethrough: bool,
    /// For a read: what each of its sectors may return.
    allowed: Vec<Vec<Value>>,
}

impl Op {
    fn covers(&self, sector: u64) -> bool {
        (self.sector..self.sector + self.sectors).contains(&sector)
    }

    /// A discard promises zeroes for whole blocks only.
    fn is_sure_of(&self, sector: u64) -> bool {
        let block = sector / SECTORS_PER_BLOCK * SECTORS_PER_BLOCK;
        self.kind != IoKind::Discard
            || (self.covers(block) && self.covers(block + SECTORS_PER_BLOCK - 1))
    }
}

/// The oracle. See the module's documentation.
#[derive(Clone, Default, Debug)]
pub struct Model {
    clock: u64,
    next_op: u64,
    volumes: BTreeMap<VolumeId, VolumeModel>,
    /// Shared by clones of the model, until one of them learns more of an image.
    images: Vec<Rc<Image>>,
    ops: BTreeMap<u64, Op>,
    /// Sectors compared so far: a harness that looks at nothing finds nothing.
    pub sectors_checked: u64,
    /// What a sector may be read as because the disk has changed it, by its place in its block.
    excuses: BTreeSet<(u64, Vec<u8>)>,
    /// Sectors that were read as nothing else explains.
    pub sectors_excused: u64,
}

impl Model {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn volume(&mut self, id: VolumeId) -> &mut VolumeModel {
        self.volumes.get_mut(&id).unwrap_or_else(|| panic!("the model has no volume {id}"))
    }

    /// The disk has silently changed the sector at `place` in some block to these bytes: they may be
    /// read there, and from wherever the block was copied to. Whose block it was is not asked: but for
    /// zeroes and canaries, bytes say themselves which write to which sector they are of.
    pub fn excuse(&mut self, place: u64, bytes: &[u8]) {
        self.excuses.insert((place, bytes.to_vec()));
    }

    /// The device has lost metadata in a way that nothing can find: these sectors of the volume may be
    /// zeroes again, as they were before they were written.
    pub fn may_be_unwritten(&mut self, id: VolumeId, sectors: std::ops::Range<u64>) {
        let now = self.tick();
        for (_, list) in self.volume(id).content.sectors.range_mut(sectors) {
            list.push(Candidate::settled(ZERO, now));
        }
    }

    // ---- guest requests ----

    /// A request goes in. Returns its number, which for a write is its [`Value`].
    pub fn begin(&mut self, volume: VolumeId, kind: IoKind, sector: u64, sectors: u64) -> u64 {
        let submitted = self.tick();
        self.next_op += 1;
        let op_id = self.next_op;
        let value = if kind == IoKind::Write { op_id } else { ZERO };
        let writethrough = self.volume(volume).writethrough;
        let mut op = Op {
            volume,
            kind,
            sector,
            sectors,
            submitted,
            value,
            writethrough,
            allowed: Vec::new(),
        };
        match kind {
            IoKind::Read => {
                let content = &self.volumes[&volume].content;
                let live = |sector| live_values(&self.images, content, sector);
                op.allowed = (sector..sector + sectors).map(live).collect();
            }
            IoKind::Flush => {}
            IoKind::Write => self.begin_change(op_id, &op, (sector..sector + sectors).collect()),
            IoKind::Discard | IoKind::WriteZeroes => {
                // A sector that nobody ever wrote is zero already, and there may be 2^39 of them.
                let content = &self.volumes[&volume].content;
                let touched = touched(&self.images, content, sector..sector + sectors);
                self.begin_change(op_id, &op, touched.into_iter().collect());
            }
        }
        self.ops.insert(op_id, op);
        op_id
    }

    fn begin_change(&mut self, op_id: u64, op: &Op, sectors: Vec<u64>) {
        let zeroing: Vec<(u64, Op)> = self
            .ops
            .iter()
            .filter(|(_, other)| other.volume == op.volume)
            .filter(|(_, other)| matches!(other.kind, IoKind::Discard | IoKind::WriteZeroes))
            .map(|(id, other)| (*id, other.clone()))
            .collect();
        let volume = self.volumes.get_mut(&op.volume).expect("looked up by the caller");
        let content = &mut volume.content;
        for &sector in &sectors {
            if !content.sectors.contains_key(&sector) {
                let base = base_values(&self.images, content.base, sector);
                let mut list: Vec<_> = base.iter().map(|v| Candidate::settled(*v, 0)).collect();
                // Zeroing requests that passed over this sector because it held nothing.
                let passed = zeroing.iter().filter(|(_, zero)| zero.covers(sector));
                list.extend(passed.map(|(id, zero)| candidate(*id, zero)));
                content.sectors.insert(sector, list);
            }
            let list = content.sectors.get_mut(&sector).expect("just inserted");
            list.push(candidate(op_id, op));
            content.unsettled.insert(sector);
        }
        // A snapshot that is being taken may or may not catch it.
        for pending in &volume.pending {
            for &sector in &sectors {
                let base = self.images[pending.image].base;
                let values = base_values(&self.images, base, sector);
                let image = Rc::make_mut(&mut self.images[pending.image]);
                let list = image.sectors.entry(sector).or_insert(values);
                if !list.contains(&op.value) {
                    list.push(op.value);
                }
            }
        }
        for read in self.ops.values_mut() {
            if read.kind == IoKind::Read && read.volume == op.volume {
                for &sector in &sectors {
                    let at = sector.wrapping_sub(read.sector) as usize;
                    if let Some(allowed) = read.allowed.get_mut(at) {
                        allowed.push(op.value);
                    }
                }
            }
        }
    }

    /// A request came back; `bytes` are what a read brought.
    pub fn end(&mut self, op_id: u64, status: IoStatus, bytes: &[u8]) {
        let now = self.tick();
        let op = self.ops.remove(&op_id).expect("a request ends once");
        let done = status == IoStatus::Done;
        let volume = self.volumes.get_mut(&op.volume).expect("volumes go when quiet");
        let content = &mut volume.content;
        match op.kind {
            IoKind::Read if done => self.end_read(&op, bytes),
            IoKind::Read => {}
            IoKind::Flush if done => content.make_durable(op.submitted),
            IoKind::Flush => {}
            IoKind::Write | IoKind::Discard | IoKind::WriteZeroes => {
                let durable = volume.writethrough && op.writethrough && op.kind != IoKind::Discard;
                let range = op.sector..op.sector + op.sectors;
                for (sector, list) in content.sectors.range_mut(range) {
                    let applied = done && op.is_sure_of(*sector);
                    end_candidate(list, op_id, now, applied, applied && durable);
                }
            }
        }
    }

    fn end_read(&mut self, op: &Op, bytes: &[u8]) {
        for ((sector, allowed), bytes) in
            (op.sector..).zip(&op.allowed).zip(bytes.chunks_exact(SECTOR))
        {
            self.sectors_checked += 1;
            let content = &self.volumes[&op.volume].content;
            let history = || content.sectors.get(&sector);
            let value = match recognise(sector, bytes) {
                Ok(value) if allowed.contains(&value) => value,
                _ if is_excused(&self.excuses, sector, bytes) => {
                    self.sectors_excused += 1;
                    continue;
                }
                Ok(value) => panic!(
                    "volume {} sector {sector} reads as value {value}, allowed {allowed:?}; \
                     history {:#?}",
                    op.volume,
                    history()
                ),
                Err(what) => panic!(
                    "volume {} sector {sector} holds {what}; allowed {allowed:?}; history {:#?}",
                    op.volume,
                    history()
                ),
            };
            let volume = self.volumes.get_mut(&op.volume).expect("as above");
            let content = &mut volume.content;
            // Zeroes may come from several requests, and then it is not known which one was seen.
            let sure = allowed.iter().filter(|other| **other == value).count() == 1;
            match content.sectors.get_mut(&sector) {
                Some(list) if sure => seen(list, value, op.submitted),
                Some(_) => {}
                None => pin_image(&mut self.images, content.base, sector, value),
            }
        }
    }

    // ---- snapshots ----

    /// A snapshot is asked for. `time` identifies it: no two may have the same.
    pub fn begin_snapshot(&mut self, id: VolumeId, time: u64, label: Option<String>) {
        self.begin_cut(id, time, label, None);
    }

    /// A rollback is asked for: a snapshot of what is there now, and with it the volume reads as
    /// `target` does. Nothing else of the volume is in flight.
    pub fn begin_rollback(&mut self, target: SnapshotId, time: u64, label: Option<String>) {
        let base = Some(self.snapshot(target).image);
        let then = Content { base, ..Content::default() };
        self.begin_cut(target.volume, time, label, Some(then));
    }

    fn begin_cut(&mut self, id: VolumeId, time: u64, label: Option<String>, then: Option<Content>) {
        let submitted = self.tick();
        let content = &self.volumes[&id].content;
        // A read may have shown a write that had not completed; the snapshot owes it nothing.
        let standing = |list: &[Candidate]| -> Vec<Value> {
            let standing = list.iter().filter(|candidate| !candidate.overwritten);
            standing.map(|candidate| candidate.value).collect()
        };
        let written = content.sectors.iter();
        let sectors = written.map(|(sector, list)| (*sector, standing(list))).collect();
        self.images.push(Rc::new(Image { base: content.base, sectors }));
        let image = self.images.len() - 1;
        self.volume(id).pending.push(PendingSnapshot { submitted, time, label, image, then });
    }

    /// The snapshot of `time` is durable, and with it every write that completed before it.
    pub fn end_snapshot(&mut self, snapshot: SnapshotId, time: u64) {
        self.tick();
        let volume = self.volume(snapshot.volume);
        let at = volume.pending.iter().position(|pending| pending.time == time);
        let pending = volume.pending.remove(at.expect("a snapshot ends once"));
        match pending.then {
            Some(then) => volume.content = then,
            None => volume.content.make_durable(pending.submitted),
        }
        let model = SnapshotModel {
            time,
            labels: vec![pending.label],
            deleted: vec![false],
            image: pending.image,
        };
        let old = volume.snapshots.insert(snapshot.sequence, model);
        assert!(old.is_none(), "two snapshots {snapshot}");
    }

    /// A snapshot was refused; it must not turn up.
    pub fn fail_snapshot(&mut self, id: VolumeId, time: u64) {
        self.volume(id).pending.retain(|pending| pending.time != time);
    }

    /// A label or a delete mark may change from now on.
    pub fn begin_mark(&mut self, snapshot: SnapshotId, label: Option<Option<String>>) {
        let model = self.snapshot(snapshot);
        match label {
            Some(label) => model.labels.push(label),
            None => model.deleted.push(true),
        }
    }

    /// The label or delete mark is durable.
    pub fn end_mark(&mut self, snapshot: SnapshotId, label: Option<Option<String>>) {
        let model = self.snapshot(snapshot);
        match label {
            Some(label) => settle(&mut model.labels, &label),
            None => model.deleted = vec![true],
        }
    }

    /// A batch of deletions that spares labelled snapshots has ended, durably; it has deleted this
    /// one, or passed it over.
    ///
    /// # Panics
    /// When it has deleted a snapshot that had a label and nothing else.
    pub fn end_thinning(&mut self, snapshot: SnapshotId, gone: bool) {
        let model = self.snapshot(snapshot);
        if gone {
            let labels = &model.labels;
            assert!(labels.contains(&None), "snapshot {snapshot} is thinned, and has {labels:?}");
            model.deleted = vec![true];
        } else if model.deleted.contains(&false) {
            let at = model.deleted.iter().position(|deleted| *deleted);
            model.deleted.remove(at.expect("its deletion has begun"));
        }
    }

    /// Snapshots of a volume that are certainly there, not deleted, and without a label, and when
    /// they were taken.
    pub fn unlabelled(&self, id: VolumeId) -> Vec<(u64, WallTime)> {
        let plain = |model: &SnapshotModel| {
            !model.deleted.contains(&true) && model.labels.iter().all(Option::is_none)
        };
        let all = self.volumes[&id].snapshots.iter().filter(|(_, model)| plain(model));
        all.map(|(sequence, model)| (*sequence, WallTime::from_unix_nanos(model.time))).collect()
    }

    fn snapshot(&mut self, snapshot: SnapshotId) -> &mut SnapshotModel {
        let volume = self.volume(snapshot.volume);
        volume.snapshots.get_mut(&snapshot.sequence).expect("the model knows the snapshot")
    }

    /// Snapshots of a volume that are certainly there and not deleted.
    pub fn snapshots(&self, id: VolumeId) -> Vec<u64> {
        let there = |model: &SnapshotModel| !model.deleted.contains(&true);
        let all = self.volumes[&id].snapshots.iter();
        all.filter(|(_, model)| there(model)).map(|(sequence, _)| *sequence).collect()
    }

    /// What a sector of a snapshot may hold.
    pub fn values_in(&self, snapshot: SnapshotId, sector: u64) -> Vec<Value> {
        let image = self.volumes[&snapshot.volume].snapshots[&snapshot.sequence].image;
        base_values(&self.images, Some(image), sector)
    }

    /// Sectors that were ever written in a snapshot or before it.
    pub fn touched_by(&self, snapshot: SnapshotId) -> BTreeSet<u64> {
        let image = self.volumes[&snapshot.volume].snapshots[&snapshot.sequence].image;
        let content = Content { base: Some(image), ..Content::default() };
        touched(&self.images, &content, 0..u64::MAX)
    }

    // ---- volumes ----

    /// All volumes there ever were.
    pub fn volumes(&self) -> Vec<VolumeId> {
        self.volumes.keys().copied().collect()
    }

    /// A volume is being made, blank or from a snapshot.
    pub fn begin_create(&mut self, id: VolumeId, name: &str, size: u64, from: Option<SnapshotId>) {
        let base = from.map(|snapshot| self.snapshot(snapshot).image);
        let volume = VolumeModel {
            existence: Existence::Making,
            names: vec![name.to_owned()],
            sizes: vec![size],
            content: Content { base, ..Content::default() },
            snapshots: BTreeMap::new(),
            pending: Vec::new(),
            writethrough: false,
        };
        let old = self.volumes.insert(id, volume);
        assert!(old.is_none(), "two volumes {id}");
    }

    /// The volume is there, durably.
    pub fn end_create(&mut self, id: VolumeId) {
        self.volume(id).existence = Existence::Yes;
    }

    /// The volume that is being made is not to be there after a crash.
    pub fn withhold(&mut self, id: VolumeId) {
        self.volume(id).existence = Existence::Withheld;
    }

    /// The volume may be there from now on; if so, with all that was done to it.
    pub fn begin_publish(&mut self, id: VolumeId) {
        let now = self.tick();
        let volume = self.volume(id);
        volume.existence = Existence::Making;
        volume.content.make_durable(now);
    }

    /// The volume may go from now on.
    pub fn begin_delete(&mut self, id: VolumeId) {
        self.volume(id).existence = Existence::Deleting;
    }

    /// The volume is gone, durably.
    pub fn end_delete(&mut self, id: VolumeId) {
        self.volume(id).existence = Existence::No;
    }

    /// The volume was not made.
    pub fn fail_create(&mut self, id: VolumeId) {
        self.volumes.remove(&id);
    }

    /// The volume may have another size from now on.
    pub fn begin_grow(&mut self, id: VolumeId, size: u64) {
        self.volume(id).sizes.push(size);
    }

    /// The size is durable.
    pub fn end_grow(&mut self, id: VolumeId, size: u64) {
        settle(&mut self.volume(id).sizes, &size);
    }

    /// The volume may have another name from now on.
    pub fn begin_rename(&mut self, id: VolumeId, name: &str) {
        self.volume(id).names.push(name.to_owned());
    }

    /// The name is durable.
    pub fn end_rename(&mut self, id: VolumeId, name: &str) {
        settle(&mut self.volume(id).names, &name.to_owned());
    }

    /// Whether writes that begin from now on are durable when they complete.
    pub fn set_writethrough(&mut self, id: VolumeId, writethrough: bool) {
        self.volume(id).writethrough = writethrough;
    }

    /// The store was closed in order: everything that completed is durable, but in volumes that are
    /// in doubt.
    pub fn shut_down(&mut self, doubt: &BTreeSet<VolumeId>) {
        assert!(self.ops.is_empty(), "the store was closed under requests in flight");
        self.kill(doubt);
    }

    // ---- power cuts ----

    /// The process was killed and the machine goes on: everything that completed must be there.
    /// [`Model::crash`] comes next. Of volumes in doubt, because a fault has latched
    /// them, it may be gone.
    pub fn kill(&mut self, doubt: &BTreeSet<VolumeId>) {
        let now = self.tick();
        for (_, volume) in self.volumes.iter_mut().filter(|(id, _)| !doubt.contains(id)) {
            volume.content.make_durable(now);
        }
    }

    /// The volume was closed, all of it `committed` or left as the device had it, which then may
    /// hold whatever no durable write had replaced. No other volume may notice.
    pub fn detach(&mut self, id: VolumeId, committed: bool) {
        let now = self.tick();
        assert!(self.ops.values().all(|op| op.volume != id), "detached under requests");
        let content = &mut self.volume(id).content;
        if committed {
            content.make_durable(now);
        }
        content.forget_order(now);
    }

    /// A volume was handed over: everything that has completed is durable.
    pub fn handed_over(&mut self, id: VolumeId) {
        let now = self.tick();
        assert!(self.ops.values().all(|op| op.volume != id), "handed over under requests");
        self.volume(id).content.make_durable(now);
    }

    /// A volume whose deletion had failed turned out to be deleted.
    pub fn was_deleted(&mut self, id: VolumeId) {
        let existence = self.volume(id).existence;
        assert!(existence == Existence::Deleting, "nobody had deleted volume {id}");
        self.volume(id).existence = Existence::No;
    }

    /// The power went. What may be there afterwards is whatever no durable write had replaced.
    pub fn crash(&mut self) {
        let now = self.tick();
        self.ops.clear();
        for volume in self.volumes.values_mut() {
            volume.content.forget_order(now);
        }
    }

    /// Checks which volumes the store says there are, and believes it in what was open.
    pub fn recover_volumes(&mut self, present: &BTreeSet<VolumeId>) {
        self.volumes.retain(|id, volume| {
            let there = present.contains(id);
            volume.existence = match volume.existence {
                Existence::Yes if !there => panic!("volume {id} {:?} is gone", volume.names),
                Existence::No if there => panic!("volume {id} {:?} is back", volume.names),
                Existence::Withheld if there => {
                    panic!("volume {id} {:?} is there and was not whole", volume.names)
                }
                Existence::Making | Existence::Withheld if !there => return false,
                _ if there => Existence::Yes,
                _ => Existence::No,
            };
            true
        });
        for id in present {
            assert!(self.volumes.contains_key(id), "volume {id} appeared from nowhere");
        }
        // Snapshots of a deleted volume stay in the images for its clones.
    }

    /// Checks a volume's record and log against what they may say, and believes them. `snapshots` are all
    /// that the log can be read for.
    pub fn recover_volume(&mut self, info: &VolumeInfo, snapshots: &[SnapshotInfo]) {
        let id = info.id;
        let volume = self.volume(id);
        assert!(volume.names.contains(&info.name), "{id}: {} of {:?}", info.name, volume.names);
        volume.names = vec![info.name.clone()];
        let size = info.size.get();
        assert!(volume.sizes.contains(&size), "{id}: size {size} of {:?}", volume.sizes);
        volume.sizes = vec![size];
        // Older ones, if any, cannot be read.
        let first = info.log.out_of_reach;
        for (sequence, shown) in (first..).zip(snapshots) {
            assert_eq!(shown.id, SnapshotId { volume: id, sequence }, "a gap in the log");
            let time = shown.time.as_unix_nanos();
            if let Some(known) = volume.snapshots.get_mut(&sequence) {
                assert_eq!(known.time, time, "snapshot {} is another one now", shown.id);
                let label = &shown.label;
                assert!(known.labels.contains(label), "{label:?} of {:?}", known.labels);
                assert!(known.deleted.contains(&shown.deleted), "{} deleted?", shown.id);
                known.labels = vec![shown.label.clone()];
                known.deleted = vec![shown.deleted];
                continue;
            }
            // It became durable in the moment the power went.
            let at = volume.pending.iter().position(|pending| pending.time == time);
            let pending = volume.pending.remove(at.unwrap_or_else(|| {
                panic!("snapshot {} at {time} appeared from nowhere", shown.id)
            }));
            assert_eq!(pending.label, shown.label, "label of snapshot {}", shown.id);
            if let Some(then) = pending.then {
                volume.content = then;
            }
            let model = SnapshotModel {
                time,
                labels: vec![pending.label],
                deleted: vec![shown.deleted],
                image: pending.image,
            };
            volume.snapshots.insert(sequence, model);
        }
        let live = snapshots.iter().filter(|shown| !shown.deleted).count() as u64;
        let LogState { taken: shown, live: counted, .. } = info.log;
        assert_eq!(
            (shown, counted),
            (first + snapshots.len() as u64, live),
            "{id}: {:?}",
            info.log
        );
        let lost = volume.snapshots.keys().find(|sequence| **sequence >= shown);
        assert!(lost.is_none(), "snapshot {id}.{} is gone", lost.expect("just checked"));
        volume.pending.clear();
    }

    /// Checks sectors that were read while nothing else went on, after a power cut.
    pub fn observe(&mut self, id: VolumeId, first: u64, bytes: &[u8]) {
        let images = &mut self.images;
        let content = &mut self.volumes.get_mut(&id).expect("the model has the volume").content;
        for (sector, bytes) in (first..).zip(bytes.chunks_exact(SECTOR)) {
            self.sectors_checked += 1;
            let allowed = live_values(images, content, sector);
            let value = match recognise(sector, bytes) {
                Ok(value) if allowed.contains(&value) => value,
                _ if is_excused(&self.excuses, sector, bytes) => {
                    self.sectors_excused += 1;
                    continue;
                }
                Ok(value) => panic!(
                    "volume {id} sector {sector} came back as value {value}, allowed {allowed:?}"
                ),
                Err(what) => {
                    panic!("volume {id} sector {sector} came back as {what}, allowed {allowed:?}")
                }
            };
            match content.sectors.get_mut(&sector) {
                Some(list) => list.retain(|candidate| candidate.value == value),
                None => pin_image(images, content.base, sector, value),
            }
        }
    }

    /// Sectors of a volume that anybody ever wrote, in it or in what it was cloned from.
    pub fn touched(&self, id: VolumeId) -> BTreeSet<u64> {
        touched(&self.images, &self.volumes[&id].content, 0..u64::MAX)
    }
}

fn is_excused(excuses: &BTreeSet<(u64, Vec<u8>)>, sector: u64, bytes: &[u8]) -> bool {
    !excuses.is_empty() && excuses.contains(&(sector % SECTORS_PER_BLOCK, bytes.to_vec()))
}

/// Drops what came before `value`, which is durable; changes under way come after it.
fn settle<T: PartialEq>(values: &mut Vec<T>, value: &T) {
    let at = values.iter().position(|other| other == value);
    values.drain(..at.expect("what ends has begun"));
}

fn candidate(op_id: u64, op: &Op) -> Candidate {
    Candidate {
        value: op.value,
        op: op_id,
        submitted: op.submitted,
        ended: NEVER,
        applied: false,
        durable: false,
        overwritten: false,
        gone: false,
    }
}

/// Ends the request `op` in one sector, with all that follows for the others.
fn end_candidate(list: &mut Vec<Candidate>, op: u64, now: u64, applied: bool, durable: bool) {
    let Some(at) = list.iter().position(|candidate| candidate.op == op) else { return };
    let ended = &mut list[at];
    (ended.ended, ended.applied, ended.durable) = (now, applied, durable);
    let began = ended.submitted;
    if applied {
        for other in list.iter_mut().filter(|other| other.ended < began) {
            (other.overwritten, other.gone) = (true, true);
        }
    }
    if durable {
        list.retain(|other| other.ended >= began);
    }
}

/// Draws the conclusions from a read, begun at `submitted`, that returned `value`.
fn seen(list: &mut Vec<Candidate>, value: Value, submitted: u64) {
    // It is gone when it has been overwritten since the read began.
    let mut of_value = list.iter().filter(|other| other.value == value && !other.gone);
    let (Some(found), None) = (of_value.next().cloned(), of_value.next()) else { return };
    let settled = |candidate: &Candidate| candidate.op == 0;
    for other in list.iter_mut().filter(|other| other.op != found.op || other.value != value) {
        if other.ended < submitted || other.ended < found.submitted {
            other.gone = true;
        }
    }
    if settled(&found) {
        list.retain(|other| other.value == value || !settled(other));
    }
}

fn live_of(list: &[Candidate]) -> Vec<Value> {
    list.iter().filter(|candidate| !candidate.gone).map(|candidate| candidate.value).collect()
}

fn live_values(images: &[Rc<Image>], content: &Content, sector: u64) -> Vec<Value> {
    match content.sectors.get(&sector) {
        Some(list) => live_of(list),
        None => base_values(images, content.base, sector),
    }
}

fn base_values(images: &[Rc<Image>], base: Option<ImageId>, sector: u64) -> Vec<Value> {
    let mut next = base;
    while let Some(id) = next {
        if let Some(values) = images[id].sectors.get(&sector) {
            return values.clone();
        }
        next = images[id].base;
    }
    vec![ZERO]
}

fn pin_image(images: &mut [Rc<Image>], base: Option<ImageId>, sector: u64, value: Value) {
    let mut next = base;
    while let Some(id) = next {
        if let Some(values) = images[id].sectors.get(&sector) {
            assert!(values.contains(&value), "the caller checked");
            if values.len() > 1 {
                Rc::make_mut(&mut images[id]).sectors.insert(sector, vec![value]);
            }
            return;
        }
        next = images[id].base;
    }
}

fn touched(images: &[Rc<Image>], content: &Content, range: std::ops::Range<u64>) -> BTreeSet<u64> {
    let own = content.sectors.range(range.clone()).map(|(sector, _)| *sector);
    let mut all: BTreeSet<u64> = own.collect();
    let mut next = content.base;
    while let Some(id) = next {
        all.extend(images[id].sectors.range(range.clone()).map(|(sector, _)| *sector));
        next = images[id].base;
    }
    all
}

impl Content {
    /// Every value that may be there is as likely as any other.
    fn forget_order(&mut self, now: u64) {
        self.unsettled.clear();
        for list in self.sectors.values_mut() {
            let values: BTreeSet<Value> = list.iter().map(|c| c.value).collect();
            *list = values.into_iter().map(|v| Candidate::settled(v, now)).collect();
        }
    }

    /// Every write that completed before `time` can no longer be lost.
    fn make_durable(&mut self, time: u64) {
        let sectors = &mut self.sectors;
        self.unsettled.retain(|sector| {
            let list = sectors.get_mut(sector).expect("unsettled sectors were written");
            let covered = |c: &&mut Candidate| c.applied && c.ended <= time;
            list.iter_mut().filter(covered).for_each(|c| c.durable = true);
            let newest = list.iter().filter(|c| c.durable).map(|c| c.submitted).max();
            let newest = newest.unwrap_or(0);
            list.retain(|c| c.ended >= newest);
            list.len() > 1 || !list[0].durable
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: VolumeId = VolumeId(1);

    fn model() -> Model {
        let mut model = Model::default();
        model.begin_create(ID, "v", 1 << 20, None);
        model.end_create(ID);
        model
    }

    fn write(model: &mut Model, sector: u64) -> Value {
        let op = model.begin(ID, IoKind::Write, sector, 1);
        model.end(op, IoStatus::Done, &[]);
        op
    }

    fn flush(model: &mut Model) {
        let op = model.begin(ID, IoKind::Flush, 0, 0);
        model.end(op, IoStatus::Done, &[]);
    }

    fn bytes(value: Value, sector: u64) -> Vec<u8> {
        let mut bytes = vec![0; SECTOR];
        stamp(value, sector, &mut bytes);
        bytes
    }

    fn read(model: &mut Model, sector: u64, value: Value) {
        let op = model.begin(ID, IoKind::Read, sector, 1);
        model.end(op, IoStatus::Done, &bytes(value, sector));
    }

    #[test]
    fn a_completed_write_is_what_reads_return() {
        let mut model = model();
        read(&mut model, 3, ZERO);
        write(&mut model, 3);
        let value = write(&mut model, 3);
        read(&mut model, 3, value);
    }

    #[test]
    #[should_panic(expected = "reads as value 0")]
    fn an_overwritten_value_is_not_read_again() {
        let mut model = model();
        write(&mut model, 3);
        read(&mut model, 3, ZERO);
    }

    #[test]
    #[should_panic(expected = "reads as value 0")]
    fn once_a_write_in_flight_was_seen_the_old_value_is_gone() {
        let mut model = model();
        let op = model.begin(ID, IoKind::Write, 3, 1);
        read(&mut model, 3, ZERO);
        read(&mut model, 3, op);
        read(&mut model, 3, ZERO);
    }

    #[test]
    fn a_power_cut_may_undo_what_was_not_flushed() {
        let mut model = model();
        let first = write(&mut model, 3);
        flush(&mut model);
        let second = write(&mut model, 3);
        let third = write(&mut model, 3);
        for value in [first, second, third] {
            let mut after = model.clone();
            after.crash();
            after.observe(ID, 3, &bytes(value, 3));
        }
    }

    #[test]
    #[should_panic(expected = "came back as value 0")]
    fn a_flushed_write_survives() {
        let mut model = model();
        write(&mut model, 3);
        flush(&mut model);
        model.crash();
        model.observe(ID, 3, &bytes(ZERO, 3));
    }

    #[test]
    #[should_panic(expected = "came back as value 0")]
    fn a_writethrough_write_survives() {
        let mut model = model();
        model.set_writethrough(ID, true);
        write(&mut model, 3);
        model.crash();
        model.observe(ID, 3, &bytes(ZERO, 3));
    }

    #[test]
    #[should_panic(expected = "came back as value")]
    fn what_was_seen_after_a_power_cut_stays() {
        let mut model = model();
        let value = write(&mut model, 3);
        model.crash();
        model.observe(ID, 3, &bytes(ZERO, 3));
        model.crash();
        model.observe(ID, 3, &bytes(value, 3));
    }

    #[test]
    fn a_write_in_flight_may_be_on_either_side_of_a_snapshot() {
        let mut model = model();
        let before = write(&mut model, 3);
        let op = model.begin(ID, IoKind::Write, 3, 1);
        model.begin_snapshot(ID, 77, None);
        model.end(op, IoStatus::Done, &[]);
        let snapshot = SnapshotId { volume: ID, sequence: 0 };
        model.end_snapshot(snapshot, 77);
        let after = write(&mut model, 3);
        for value in [before, op, after] {
            let mut clone = model.clone();
            clone.begin_create(VolumeId(2), "c", 1 << 20, Some(snapshot));
            let check = || clone.observe(VolumeId(2), 3, &bytes(value, 3));
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(check));
            assert_eq!(outcome.is_ok(), value != after);
        }
    }

    #[test]
    fn a_torn_or_foreign_sector_is_recognised() {
        let mut sector = bytes(5, 9);
        assert_eq!(recognise(9, &sector), Ok(5));
        assert!(recognise(8, &sector).is_err(), "misplaced");
        sector[511] ^= 1;
        assert!(recognise(9, &sector).is_err(), "torn");
        assert!(recognise(9, &[0xa5; SECTOR]).unwrap_err().contains("leak"));
    }

    #[test]
    fn zeroing_races_with_a_first_write_of_a_sector() {
        let mut model = model();
        let zero = model.begin(ID, IoKind::WriteZeroes, 0, 8);
        let value = write(&mut model, 3);
        model.end(zero, IoStatus::Done, &[]);
        let mut other = model.clone();
        read(&mut model, 3, value);
        read(&mut other, 3, ZERO);
    }

    #[test]
    fn a_discard_promises_zeroes_for_whole_blocks_only() {
        let mut model = model();
        let edge = write(&mut model, 7);
        write(&mut model, 8);
        let op = model.begin(ID, IoKind::Discard, 7, 9);
        model.end(op, IoStatus::Done, &[]);
        read(&mut model, 7, edge);
        read(&mut model, 8, ZERO);
    }
}
