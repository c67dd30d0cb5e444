//! The volumes of a store: names, identities, registry slots.
//!
//! Control path. Filled by [`crate::store::open`], afterwards kept by whoever sends commands to
//! shards: it plans a command here, sends it, and notes its outcome here. A plan reserves what it
//! was given, so two commands on their way at once cannot get the same name, identity or slot.

use std::collections::{BTreeMap, BTreeSet};

use bessel_reactor::clock::WallTime;
use bessel_reactor::units::{ByteCount, SECTOR_SIZE};

use crate::format::{NameError, VOLUME_SIZE_MAX, VOLUME_SIZE_MIN, VolumeRecord, check_name};
use crate::gc::DeletedVolume;
use crate::request::{CloneOrigin, CreatePlan, SnapshotId, VolumeId};
use crate::store::LogPart;

/// A volume as the registry has it, with the end of its snapshot log: all that a shard needs to open it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeEntry {
    /// Where its record lives in the registry.
    pub slot: u32,
    /// Its current record.
    pub record: VolumeRecord,
    /// The newest block of its log; none when it has no snapshot, or is deleted.
    pub tail: Option<LogPart>,
}

/// A volume in the directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeSummary {
    /// Where its record lives in the registry.
    pub slot: u32,
    /// Its identity.
    pub id: VolumeId,
    /// Its name, unique among volumes that are not deleted.
    pub name: String,
    /// Its size.
    pub size: ByteCount,
    /// The snapshot it was cloned from.
    pub origin: Option<SnapshotId>,
    /// When it was made.
    pub created: WallTime,
    /// Marked deleted, awaiting the collector.
    pub deleted: bool,
    /// Why it cannot be opened, if it cannot.
    pub fault: Option<String>,
}

/// Why a command on the directory is refused. Nothing has changed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DirectoryError {
    /// Not a name a volume can have.
    #[error("bad volume name: {0}")]
    Name(#[from] NameError),
    /// Another volume has it, or is about to.
    #[error("there is already a volume named {0:?}; choose another name or rename that one")]
    NameTaken(String),
    /// Not a size a volume can have.
    #[error("bad volume size {}: must be a multiple of 512 bytes, from 4KiB to 256TiB", .0.exact())]
    Size(ByteCount),
    /// A clone holds all that its snapshot does.
    #[error(
        "the clone's size {} is smaller than its snapshot's, {}; ask for at least that",
        .asked.exact(), .origin.exact()
    )]
    SmallerThanOrigin {
        /// The size asked for.
        asked: ByteCount,
        /// The snapshot's.
        origin: ByteCount,
    },
    /// Every registry slot is taken.
    #[error(
        "the store's registry has room for {0} volumes and is full; slots of deleted volumes \
         return with the next collection: run `bessel gc`"
    )]
    RegistryFull(u32),
    /// The identities are used up: one of a volume in the registry is the largest there is.
    #[error("the store has no volume identity left")]
    IdentitiesUsedUp,
    /// There is no volume with this identity, or it is deleted.
    #[error("there is no volume {0}")]
    NoSuchVolume(VolumeId),
}

/// All volumes of a store, deleted ones included.
#[derive(Clone, Debug)]
pub struct Directory {
    volumes: BTreeMap<VolumeId, VolumeSummary>,
    /// As read when the store was opened; out of date once a shard has opened the volume.
    entries: BTreeMap<VolumeId, VolumeEntry>,
    /// Registry slots that hold a record, readable or not, or are promised to a plan.
    slots_taken: BTreeSet<u32>,
    /// Those of them that hold nothing but the record of a deleted volume that a collection has seen,
    /// with that record's generation.
    collected: BTreeMap<u32, (VolumeId, u64)>,
    /// Those of them that a plan has.
    promised: BTreeMap<u32, (VolumeId, u64)>,
    /// What the slots of volumes held that have one of those.
    before: BTreeMap<u32, (VolumeId, u64)>,
    slots: u32,
    /// Names promised to plans that have not ended.
    names_reserved: BTreeSet<String>,
    /// One above the largest identity seen; none when that is the largest there is.
    id_next: Option<u64>,
    /// Records that cannot be read. Identities are given out in order, so theirs are at most this
    /// many above the largest that can be read, and the next volume's is chosen past them.
    unreadable: u64,
    /// The first slot with such a record.
    unreadable_slot: Option<u32>,
}

impl Directory {
    /// An empty directory of a registry with so many slots.
    pub fn new(slots: u32) -> Self {
        Self {
            volumes: BTreeMap::new(),
            entries: BTreeMap::new(),
            slots_taken: BTreeSet::new(),
            collected: BTreeMap::new(),
            promised: BTreeMap::new(),
            before: BTreeMap::new(),
            slots,
            names_reserved: BTreeSet::new(),
            id_next: Some(1),
            unreadable: 0,
            unreadable_slot: None,
        }
    }

    /// Every volume, by identity, deleted and faulted ones included.
    pub fn volumes(&self) -> impl Iterator<Item = &VolumeSummary> {
        self.volumes.values()
    }

    /// The volume with this identity, deleted or not.
    pub fn get(&self, id: VolumeId) -> Option<&VolumeSummary> {
        self.volumes.get(&id)
    }

    /// The volume with this name that is not deleted.
    pub fn find(&self, name: &str) -> Option<&VolumeSummary> {
        self.volumes.values().find(|volume| !volume.deleted && volume.name == name)
    }

    /// The volume as it was read when the store was opened, to hand to a shard. None when it could
    /// not be read, or was made since.
    pub fn entry(&self, id: VolumeId) -> Option<&VolumeEntry> {
        self.entries.get(&id)
    }

    /// All volumes as they were read when the store was opened, deleted ones included.
    pub fn entries(&self) -> impl Iterator<Item = &VolumeEntry> {
        self.entries.values()
    }

    /// Notes a volume that was read whole.
    ///
    /// # Errors
    /// Why it cannot be: another has its identity or name. The caller reports that.
    pub(crate) fn add(&mut self, entry: VolumeEntry) -> Result<(), String> {
        self.check_unique(&entry.record)?;
        self.list(entry.slot, &entry.record, None);
        self.entries.insert(entry.record.id, entry);
        Ok(())
    }

    /// Notes that a record was written once more, as it is.
    pub(crate) fn renewed(&mut self, record: &VolumeRecord) {
        if let Some(entry) = self.entries.get_mut(&record.id) {
            entry.record.generation = record.generation;
        }
    }

    /// Notes a volume whose record was read and that cannot be opened. Its name, identity and slot
    /// stay taken.
    pub(crate) fn add_faulted(&mut self, slot: u32, record: &VolumeRecord, fault: String) {
        if self.volumes.contains_key(&record.id) {
            self.slots_taken.insert(slot);
        } else {
            self.list(slot, record, Some(fault));
        }
    }

    /// Volumes that are not deleted and do not know a snapshot of theirs that was cloned: each with
    /// the last such snapshot and its clone's name. A clone is made when the record that knows the
    /// snapshot is durable, so one later than theirs is lost.
    pub(crate) fn passed_over(&self) -> Vec<(VolumeId, u64, String)> {
        let mut last: BTreeMap<VolumeId, (u64, &str)> = BTreeMap::new();
        for (origin, name) in self.volumes.values().filter_map(|it| Some((it.origin?, &it.name))) {
            let found = last.entry(origin.volume).or_insert((origin.sequence, name));
            if origin.sequence > found.0 {
                *found = (origin.sequence, name);
            }
        }
        let passed = |(id, (sequence, name)): (VolumeId, (u64, &str))| {
            let record = &self.entries.get(&id)?.record;
            let passed = !record.deleted && record.log_count <= sequence;
            passed.then(|| (id, sequence, name.to_owned()))
        };
        last.into_iter().filter_map(passed).collect()
    }

    /// Notes that a volume that was read whole cannot be opened all the same.
    pub(crate) fn take_out(&mut self, id: VolumeId, fault: String) {
        self.entries.remove(&id);
        if let Some(volume) = self.volumes.get_mut(&id) {
            volume.fault = Some(fault);
        }
    }

    /// Notes a slot whose record cannot be read.
    pub(crate) fn add_unreadable(&mut self, slot: u32) {
        self.slots_taken.insert(slot);
        self.unreadable += 1;
        self.unreadable_slot.get_or_insert(slot);
    }

    /// A registry slot whose record cannot be read, if there is one: whose it is, nobody knows.
    pub fn unreadable(&self) -> Option<u32> {
        self.unreadable_slot
    }

    fn check_unique(&self, record: &VolumeRecord) -> Result<(), String> {
        if let Some(other) = self.volumes.get(&record.id) {
            return Err(format!("registry slot {} has the same identity", other.slot));
        }
        match self.find(&record.name) {
            Some(other) if !record.deleted => Err(format!("volume {} has the same name", other.id)),
            _ => Ok(()),
        }
    }

    fn list(&mut self, slot: u32, record: &VolumeRecord, fault: Option<String>) {
        self.slots_taken.insert(slot);
        let above = record.id.0.checked_add(1);
        self.id_next = self.id_next.zip(above).map(|(next, above)| next.max(above));
        let summary = VolumeSummary {
            slot,
            id: record.id,
            name: record.name.clone(),
            size: record.size,
            origin: record.origin,
            created: record.created,
            deleted: record.deleted,
            fault,
        };
        self.volumes.insert(record.id, summary);
    }

    /// Notes a volume as it was read again ([`crate::store::reread`]): after an error of the device
    /// name, size and deletion may be other than was known.
    ///
    /// # Errors
    /// When another volume has its name by now. Nothing has changed.
    pub fn reread(&mut self, entry: VolumeEntry) -> Result<(), DirectoryError> {
        let record = &entry.record;
        let other = self.find(&record.name).filter(|other| other.id != record.id);
        if !record.deleted && (other.is_some() || self.names_reserved.contains(&record.name)) {
            return Err(DirectoryError::NameTaken(record.name.clone()));
        }
        self.list(entry.slot, record, None);
        self.entries.insert(record.id, entry);
        Ok(())
    }

    /// Checks a new volume and gives it identity and slot. End the plan with
    /// [`Directory::created`] or [`Directory::abandoned`].
    ///
    /// # Errors
    /// Why there can be no such volume.
    pub fn plan_create(
        &mut self,
        name: &str,
        size: ByteCount,
        origin: Option<CloneOrigin>,
        time: WallTime,
    ) -> Result<CreatePlan, DirectoryError> {
        self.check_name_free(name)?;
        check_size(size)?;
        if let Some(origin) = origin.filter(|origin| origin.size > size) {
            return Err(DirectoryError::SmallerThanOrigin { asked: size, origin: origin.size });
        }
        let (registry_slot, generation) =
            self.free_slot().ok_or(DirectoryError::RegistryFull(self.slots))?;
        let id = self.id_next.and_then(|id| id.checked_add(self.unreadable));
        let id = id.ok_or(DirectoryError::IdentitiesUsedUp)?;
        (self.id_next, self.unreadable) = (id.checked_add(1), 0);
        self.slots_taken.insert(registry_slot);
        if let Some(before) = self.collected.remove(&registry_slot) {
            self.promised.insert(registry_slot, before);
        }
        self.names_reserved.insert(name.to_owned());
        Ok(CreatePlan {
            registry_slot,
            generation,
            id: VolumeId(id),
            name: name.to_owned(),
            size,
            origin,
            created: time,
        })
    }

    /// A slot for a new record, and the generation of the record there; 0 for none. One that was never
    /// used goes first. That of a volume with clones stays: without it nobody would know what they share
    /// with those that it came from.
    fn free_slot(&self) -> Option<(u32, u64)> {
        if let Some(slot) = (0..self.slots).find(|slot| !self.slots_taken.contains(slot)) {
            return Some((slot, 0));
        }
        let is_origin = |id: VolumeId| {
            let mut origins = self.volumes.values().filter_map(|volume| volume.origin);
            origins.any(|origin| origin.volume == id)
        };
        let mut free = self.collected.iter().filter(|(_, (id, _))| !is_origin(*id));
        let (slot, (_, generation)) = free.next()?;
        Some((*slot, *generation))
    }

    /// How many volumes more there is room for.
    pub fn free_slots(&self) -> usize {
        let origins: BTreeSet<VolumeId> =
            self.volumes.values().filter_map(|it| Some(it.origin?.volume)).collect();
        let collected = self.collected.values().filter(|(id, _)| !origins.contains(id));
        self.slots as usize - self.slots_taken.len() + collected.count()
    }

    /// Notes of which deleted volumes a collection has found that nothing is left but their records: new
    /// volumes may have their slots.
    pub fn collected(&mut self, deleted: &[DeletedVolume]) {
        for DeletedVolume { id, slot, generation } in deleted {
            let known = self.volumes.get(id).is_some_and(|it| it.deleted && it.slot == *slot);
            // It was read before the slot was promised to somebody.
            if known && !self.promised.contains_key(slot) {
                self.collected.insert(*slot, (*id, *generation));
            }
        }
    }

    /// Notes that a planned volume exists, durably.
    ///
    /// # Panics
    /// When there was no such plan.
    pub fn created(&mut self, plan: &CreatePlan) {
        assert!(self.names_reserved.remove(&plan.name), "{:?} was not planned", plan.name);
        if let Some(before) = self.promised.remove(&plan.registry_slot) {
            self.before.insert(plan.registry_slot, before);
            self.volumes.retain(|_, volume| volume.slot != plan.registry_slot);
            self.entries.retain(|_, entry| entry.slot != plan.registry_slot);
        }
        let summary = VolumeSummary {
            slot: plan.registry_slot,
            id: plan.id,
            name: plan.name.clone(),
            size: plan.size,
            origin: plan.origin.map(|origin| origin.snapshot),
            created: plan.created,
            deleted: false,
            fault: None,
        };
        self.volumes.insert(plan.id, summary);
    }

    /// Notes that a planned volume was not made. Its identity is not used again: whether its record
    /// reached the device is not known after every failure.
    ///
    /// # Panics
    /// When there was no such plan.
    pub fn abandoned(&mut self, plan: &CreatePlan) {
        assert!(self.names_reserved.remove(&plan.name), "{:?} was not planned", plan.name);
        self.promised.remove(&plan.registry_slot);
        if plan.generation == 0 {
            self.slots_taken.remove(&plan.registry_slot);
        } // Else nobody knows which generation is there, before the next collection.
    }

    /// Notes that a volume is gone that the device never had a record of: its slot is free, or holds what it
    /// held before.
    pub fn unmade(&mut self, id: VolumeId) {
        let Some(volume) = self.volumes.remove(&id) else { return };
        match self.before.remove(&volume.slot) {
            Some(before) => {
                self.collected.insert(volume.slot, before);
            }
            None => {
                self.slots_taken.remove(&volume.slot);
            }
        }
    }

    /// Checks a new name and reserves it. End the plan with [`Directory::rename_ended`].
    ///
    /// # Errors
    /// Why the volume cannot have it.
    pub fn plan_rename(&mut self, id: VolumeId, name: &str) -> Result<(), DirectoryError> {
        self.live(id)?;
        self.check_name_free(name)?;
        self.names_reserved.insert(name.to_owned());
        Ok(())
    }

    /// Notes whether a planned rename is durable.
    ///
    /// # Panics
    /// When there was no such plan.
    pub fn rename_ended(&mut self, id: VolumeId, name: &str, done: bool) {
        assert!(self.names_reserved.remove(name), "{name:?} was not planned");
        if done && let Some(volume) = self.volumes.get_mut(&id) {
            volume.name = name.to_owned();
        }
    }

    /// Checks the new size of a volume that grows.
    ///
    /// # Errors
    /// Why it cannot have it.
    pub fn check_grow(&self, id: VolumeId, size: ByteCount) -> Result<(), DirectoryError> {
        self.live(id)?;
        check_size(size)
    }

    /// Notes that a volume has another size, durably.
    pub fn grown(&mut self, id: VolumeId, size: ByteCount) {
        if let Some(volume) = self.volumes.get_mut(&id) {
            volume.size = size;
        }
    }

    /// Notes that a volume is marked deleted, durably. Its slot stays taken until the collector has
    /// seen it.
    pub fn removed(&mut self, id: VolumeId) {
        if let Some(volume) = self.volumes.get_mut(&id) {
            volume.deleted = true;
        }
    }

    fn live(&self, id: VolumeId) -> Result<&VolumeSummary, DirectoryError> {
        let volume = self.volumes.get(&id).filter(|volume| !volume.deleted);
        volume.ok_or(DirectoryError::NoSuchVolume(id))
    }

    fn check_name_free(&self, name: &str) -> Result<(), DirectoryError> {
        check_name(name)?;
        if self.find(name).is_some() || self.names_reserved.contains(name) {
            return Err(DirectoryError::NameTaken(name.to_owned()));
        }
        Ok(())
    }
}

fn check_size(size: ByteCount) -> Result<(), DirectoryError> {
    let whole = size.get().is_multiple_of(SECTOR_SIZE);
    if whole && (VOLUME_SIZE_MIN..=VOLUME_SIZE_MAX).contains(&size) {
        Ok(())
    } else {
        Err(DirectoryError::Size(size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bessel_reactor::units::BlockAddr;

    use crate::format::Parent;
    use crate::request::CacheMode;

    const GIB: ByteCount = ByteCount::new(1 << 30);
    const NOW: WallTime = WallTime::from_unix_nanos(1);

    fn entry(slot: u32, id: u64, name: &str, deleted: bool) -> VolumeEntry {
        let record = VolumeRecord {
            generation: 1,
            id: VolumeId(id),
            deleted,
            size: GIB,
            height: 3,
            cache: CacheMode::Writeback,
            cache_by_guest: false,
            root: BlockAddr::new(1000),
            log_tail: None,
            log_count: 0,
            origin: None,
            created: NOW,
            owner_host: 0,
            owner_epoch: 1,
            blocks_allocated: 0,
            name: name.into(),
            parent: Parent::Origin,
        };
        VolumeEntry { slot, record, tail: None }
    }

    fn plan(directory: &mut Directory, name: &str) -> Result<CreatePlan, DirectoryError> {
        directory.plan_create(name, GIB, None, NOW)
    }

    #[test]
    fn two_plans_at_once_share_nothing() {
        let mut directory = Directory::new(2);
        let first = plan(&mut directory, "a").unwrap();
        let taken = DirectoryError::NameTaken("a".into());
        assert_eq!(plan(&mut directory, "a"), Err(taken.clone()));
        let second = plan(&mut directory, "b").unwrap();
        assert_ne!(first.registry_slot, second.registry_slot);
        assert_ne!(first.id, second.id);
        assert_eq!(plan(&mut directory, "c"), Err(DirectoryError::RegistryFull(2)));
        directory.abandoned(&first);
        directory.created(&second);
        let third = plan(&mut directory, "a").unwrap();
        assert_eq!(third.registry_slot, first.registry_slot);
        assert!(third.id > second.id, "an identity is not used twice");
        directory.created(&third);
        assert_eq!(directory.find("a").unwrap().id, third.id);
        assert_eq!(plan(&mut directory, "a"), Err(taken));
    }

    #[test]
    fn a_deleted_volume_frees_its_name_and_nothing_else() {
        let mut directory = Directory::new(3);
        directory.add(entry(0, 5, "old", true)).unwrap();
        directory.add(entry(1, 7, "vm", false)).unwrap();
        assert!(directory.find("old").is_none());
        directory.removed(VolumeId(7));
        let next = plan(&mut directory, "vm").unwrap();
        assert_eq!((next.id, next.registry_slot), (VolumeId(8), 2));
        assert_eq!(directory.volumes().count(), 2);
    }

    #[test]
    fn slots_of_collected_volumes_are_taken_last_and_go_on_counting() {
        let mut directory = Directory::new(3);
        directory.add(entry(0, 1, "origin", true)).unwrap();
        directory.add(entry(1, 2, "gone", true)).unwrap();
        let snapshot = SnapshotId { volume: VolumeId(1), sequence: 0 };
        let mut clone = entry(2, 3, "clone", false);
        clone.record.origin = Some(snapshot);
        directory.add(clone).unwrap();
        assert_eq!(plan(&mut directory, "a"), Err(DirectoryError::RegistryFull(3)));
        let deleted = |id, slot| DeletedVolume { id: VolumeId(id), slot, generation: 7 };
        // The third is none that is deleted, whatever a record said.
        directory.collected(&[deleted(1, 0), deleted(2, 1), deleted(3, 2)]);
        assert_eq!(directory.free_slots(), 1, "of one a clone lives");
        let first = plan(&mut directory, "a").unwrap();
        assert_eq!((first.registry_slot, first.generation, first.id), (1, 7, VolumeId(4)));
        directory.collected(&[deleted(2, 1)]);
        let full = DirectoryError::RegistryFull(3);
        assert_eq!(plan(&mut directory, "b"), Err(full.clone()), "it is promised");
        directory.abandoned(&first);
        assert_eq!(plan(&mut directory, "b"), Err(full), "nobody knows what is there");
        directory.collected(&[deleted(2, 1)]);
        let second = plan(&mut directory, "b").unwrap();
        directory.created(&second);
        assert!(directory.get(VolumeId(2)).is_none() && directory.get(second.id).is_some());
        assert_eq!(directory.free_slots(), 0);
        directory.unmade(second.id);
        // One that the device never had a record of leaves what was there.
        let third = plan(&mut directory, "c").unwrap();
        directory.created(&third);
        assert_eq!(directory.free_slots(), 0);
        directory.unmade(third.id);
        let fourth = plan(&mut directory, "d").unwrap();
        assert_eq!((fourth.registry_slot, fourth.generation), (1, 7));
    }

    #[test]
    fn identities_of_unreadable_volumes_are_not_given_out() {
        let mut directory = Directory::new(8);
        directory.add_unreadable(0);
        directory.add(entry(1, 4, "vm", false)).unwrap();
        directory.add_unreadable(2);
        let next = plan(&mut directory, "new").unwrap();
        assert!(next.id > VolumeId(6), "slots 0 and 2 may hold volumes 5 and 6: {next:?}");
        assert_eq!(next.registry_slot, 3);
    }

    #[test]
    fn doubles_in_the_registry_are_found() {
        let mut directory = Directory::new(8);
        directory.add(entry(0, 1, "vm", false)).unwrap();
        assert!(directory.add(entry(1, 1, "other", false)).is_err());
        assert!(directory.add(entry(1, 2, "vm", false)).is_err());
        assert!(directory.add(entry(1, 2, "vm", true)).is_ok());
    }

    #[test]
    fn bad_requests_say_why() {
        let mut directory = Directory::new(8);
        directory.add(entry(0, 1, "vm", false)).unwrap();
        let mut create = |name: &str, size: u64, origin| {
            directory.plan_create(name, ByteCount::new(size), origin, NOW).unwrap_err()
        };
        assert!(matches!(create("a/b", 1 << 30, None), DirectoryError::Name(_)));
        for size in [0, 512, 4097, (256 << 40) + 512, u64::MAX] {
            assert!(matches!(create("a", size, None), DirectoryError::Size(_)), "{size}");
        }
        let origin = CloneOrigin {
            snapshot: SnapshotId { volume: VolumeId(1), sequence: 0 },
            root: BlockAddr::new(1000),
            height: 3,
            size: GIB,
        };
        let small = create("a", 4096, Some(origin));
        assert_eq!(
            small.to_string(),
            "the clone's size 4KiB is smaller than its snapshot's, 1GiB; ask for at least that"
        );
    }

    #[test]
    fn a_name_moves_when_its_rename_is_durable() {
        let mut directory = Directory::new(8);
        directory.add(entry(0, 1, "old", false)).unwrap();
        directory.plan_rename(VolumeId(1), "new").unwrap();
        assert!(plan(&mut directory, "new").is_err(), "promised");
        directory.rename_ended(VolumeId(1), "new", false);
        assert!(directory.find("old").is_some());
        directory.plan_rename(VolumeId(1), "new").unwrap();
        directory.rename_ended(VolumeId(1), "new", true);
        assert!(directory.find("old").is_none() && directory.find("new").is_some());
        let nobody = directory.plan_rename(VolumeId(9), "x");
        assert_eq!(nobody, Err(DirectoryError::NoSuchVolume(VolumeId(9))));
    }
}
