//! What the API says and understands: the JSON of `openapi.json`, shared by daemon and client.
//!
//! Units are in the field names. Unknown fields in requests are refused, so that a misspelt option
//! is an error rather than a default. Fields are only ever added to responses.

use crate::limits::BURST_DEFAULT;
use bessel_mapping::schedule::{Age, Keep};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// When a write counts as done.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Cache {
    /// When its data is written; FLUSH makes it durable.
    #[default]
    Writeback,
    /// When it is durable.
    Writethrough,
}

/// Any refusal.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct ErrorBody {
    /// One line: what is wrong and what to do.
    pub(crate) error: String,
}

/// `POST /v1/volumes`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateVolume {
    /// A name no other volume has.
    pub(crate) name: String,
    /// A multiple of 512. May be left out for a clone, which then has the size of its snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) size_bytes: Option<u64>,
    /// The snapshot it starts from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<String>,
}

/// Most clones made by one request: the most volumes that a store has room for.
pub(crate) const CLONES_MAX: u32 = 4096;

/// `POST /v1/snapshots/{snapshot}/clones`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateClones {
    /// They are called so, with `-1`, `-2` and so on behind it.
    pub(crate) prefix: String,
    /// How many, 1 to 4096.
    pub(crate) count: u32,
}

/// `PATCH /v1/volumes/{name}`: one change at a time.
#[derive(Clone, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ChangeVolume {
    /// A new name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    /// A new size, at least the present one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) size_bytes: Option<u64>,
}

/// `POST /v1/volumes/{name}/rollback`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rollback {
    /// A snapshot of this volume.
    pub(crate) snapshot: String,
    /// For the snapshot that keeps what the volume holds; a label is made up when none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) label: Option<String>,
    /// Also while a front-end is connected, whose guest then has another disk under it.
    #[serde(default)]
    pub(crate) force: bool,
}

/// Which of a volume's snapshots stay: all when neither is given. Those with a label always do.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct KeepView {
    /// So many without a label, the newest.
    #[serde(default)]
    pub(crate) newest: Option<u64>,
    /// By age, from young to old; what is older than the last goes.
    #[serde(default)]
    pub(crate) ages: Option<Vec<AgeView>>,
}

/// What stays up to some age.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AgeView {
    /// For snapshots up to this old.
    pub(crate) for_ns: u64,
    /// Of each period of this length the oldest stays; null: all do.
    #[serde(default)]
    pub(crate) every_ns: Option<u64>,
}

/// `PUT /v1/volumes/{name}/schedule`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SetSchedule {
    /// Time between two snapshots.
    pub(crate) every_ns: u64,
    /// Which of the volume's snapshots stay.
    pub(crate) keep: KeepView,
}

/// `PUT /v1/volumes/{name}/home`
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MoveVolume {
    /// One that a reactor is pinned to.
    pub(crate) core: usize,
}

/// Limits of what a volume's guest may ask for; also `PUT /v1/volumes/{name}/limits`, with one of the
/// first two at least.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LimitsView {
    /// Requests of any kind in a second.
    #[serde(default)]
    pub(crate) iops: Option<u64>,
    /// Bytes read and written in a second, together.
    #[serde(default)]
    pub(crate) bytes_per_second: Option<u64>,
    /// What an idle guest saves up, as the time it takes at the limit.
    #[serde(default = "burst_default")]
    pub(crate) burst_ns: u64,
}

fn burst_default() -> u64 {
    nanoseconds(BURST_DEFAULT)
}

/// A volume's schedule of snapshots, and what it has come to since it was set or the volume attached.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct ScheduleView {
    /// Time between two snapshots.
    pub(crate) every_ns: u64,
    /// Which of the volume's snapshots stay.
    pub(crate) keep: KeepView,
    /// Nothing is taken until the volume is attached again.
    pub(crate) paused: bool,
    /// Why it pauses, or why the last snapshot or deletion failed.
    pub(crate) reason: Option<String>,
    /// Snapshots taken.
    pub(crate) taken: u64,
    /// Due and not taken: the one before had not ended.
    pub(crate) skipped: u64,
    /// Snapshots deleted since they were not to be kept.
    pub(crate) thinned: u64,
    /// Snapshots that could not be taken, and failed deletions.
    pub(crate) failed: u64,
}

pub(crate) fn nanoseconds(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

impl From<&Keep> for KeepView {
    fn from(keep: &Keep) -> Self {
        let age = |Age { up_to, spacing }: &Age| AgeView {
            for_ns: nanoseconds(*up_to),
            every_ns: spacing.map(nanoseconds),
        };
        match keep {
            Keep::All => Self::default(),
            Keep::Newest(count) => Self { newest: Some(*count), ages: None },
            Keep::Ages(ages) => Self { newest: None, ages: Some(ages.iter().map(age).collect()) },
        }
    }
}

impl KeepView {
    /// What it says; none when it says two things.
    pub(crate) fn keep(&self) -> Option<Keep> {
        let age = |AgeView { for_ns, every_ns }: &AgeView| Age {
            up_to: Duration::from_nanos(*for_ns),
            spacing: every_ns.map(Duration::from_nanos),
        };
        match (self.newest, &self.ages) {
            (None, None) => Some(Keep::All),
            (Some(count), None) => Some(Keep::Newest(count)),
            (None, Some(ages)) => Some(Keep::Ages(ages.iter().map(age).collect())),
            (Some(_), Some(_)) => None,
        }
    }
}

/// `POST /v1/volumes/{name}/snapshots`
#[derive(Clone, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateSnapshot {
    /// A label no other snapshot of the volume has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) label: Option<String>,
}

/// `PATCH /v1/snapshots/{snapshot}`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ChangeSnapshot {
    /// The new label; null takes the label away.
    pub(crate) label: Option<String>,
}

/// What guests can do with a volume.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    /// Everything.
    #[default]
    Online,
    /// Only read: a write or flush of the device has failed, and what it holds is not known.
    Failed,
    /// Nothing: an operator has detached it.
    Detached,
    /// Nothing: it could not be opened or served.
    Unavailable,
    /// Nothing: it is being imported, and not whole yet.
    Importing,
}

/// A volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct VolumeView {
    /// Never reused in this store.
    pub(crate) id: u64,
    /// Unique among the volumes there are.
    pub(crate) name: String,
    /// What the guest sees.
    pub(crate) size_bytes: u64,
    /// The mode now; a guest may switch it.
    pub(crate) cache: Cache,
    /// Request queues offered.
    pub(crate) queues: u16,
    /// Where front-ends connect.
    pub(crate) socket: String,
    /// Index of the reactor that serves it.
    pub(crate) reactor: usize,
    /// The core that reactor is pinned to.
    #[serde(default)]
    pub(crate) core: usize,
    /// The cores that its queues are polled on, in turn: the first queue on the first.
    #[serde(default)]
    pub(crate) queue_cores: Vec<usize>,
    /// A front-end is connected.
    pub(crate) connected: bool,
    /// Id of the snapshot it was cloned from.
    pub(crate) origin: Option<String>,
    /// RFC 3339, UTC.
    pub(crate) created: String,
    /// What guests can do with it.
    pub(crate) state: State,
    /// Why it is not online.
    pub(crate) reason: Option<String>,
    /// What to do about that.
    pub(crate) remedy: Option<String>,
    /// Data and metadata allocated for it since its newest snapshot.
    pub(crate) allocated_bytes: u64,
    /// Snapshots there are, deleted ones not counted, of those that are known.
    pub(crate) snapshots: u64,
    /// Snapshots, deleted ones included, that are not known: the oldest ones. Their log is being read, as
    /// it is after each start, or cannot be.
    #[serde(default)]
    pub(crate) snapshots_unread: u64,
    /// Why these cannot be read, if so.
    #[serde(default)]
    pub(crate) snapshots_fault: Option<String>,
    /// When snapshots are taken by themselves, if they are.
    #[serde(default)]
    pub(crate) schedule: Option<ScheduleView>,
    /// What its guest may ask for, if there is a limit.
    #[serde(default)]
    pub(crate) limits: Option<LimitsView>,
}

/// `POST /v1/volumes/{name}/import`: a volume that is whole and durable.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Imported {
    /// What was made.
    #[serde(flatten)]
    pub(crate) volume: VolumeView,
    /// How much data came for it; the rest are holes, or what the snapshot below has.
    pub(crate) data_bytes: u64,
}

/// What long work does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum JobKind {
    /// A snapshot is being read out, whole or as a difference.
    Export,
    /// A volume is being made of a stream.
    Import,
}

/// `GET /v1/jobs`: long work that is under way.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct JobView {
    /// Counted from 1 since the daemon started.
    pub(crate) id: u64,
    /// What it does.
    pub(crate) kind: JobKind,
    /// A snapshot's id, two of them for a difference, or a volume's name.
    pub(crate) subject: String,
    /// How far it has come: bytes of the volume that it has passed, holes included.
    pub(crate) done_bytes: u64,
    /// How far that is in the end; null while nobody knows.
    pub(crate) total_bytes: Option<u64>,
    /// RFC 3339, UTC.
    pub(crate) started: String,
}

/// `GET /v1/volumes/{name}/space`: blocks of data and radix nodes, snapshot logs not counted.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct SpaceView {
    /// The volume's name.
    pub(crate) volume: String,
    /// What it holds now; null when it is being deleted.
    pub(crate) current: Option<TreeSpaceView>,
    /// Its snapshots, oldest first.
    pub(crate) snapshots: Vec<SnapshotSpaceView>,
    /// Data of all volumes and snapshots of its forest together, each block counted once.
    pub(crate) forest_data_bytes: u64,
    /// The same, radix nodes.
    pub(crate) forest_nodes_bytes: u64,
}

/// What a volume or snapshot takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct TreeSpaceView {
    /// All that it refers to.
    pub(crate) refers_bytes: u64,
    /// What of that nothing else refers to: free when it is deleted.
    pub(crate) alone_bytes: u64,
    /// The rest.
    pub(crate) shared_bytes: u64,
}

/// What a snapshot takes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct SnapshotSpaceView {
    /// Which.
    pub(crate) id: String,
    /// What it takes.
    #[serde(flatten)]
    pub(crate) space: TreeSpaceView,
}

/// `GET /v1/snapshots/{snapshot}/diff/{to}`
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct DiffView {
    /// Id of the snapshot that was compared with.
    pub(crate) from: String,
    /// Id of the other one.
    pub(crate) to: String,
    /// Size of the volume at the first.
    pub(crate) from_size_bytes: u64,
    /// Size of the volume at the other.
    pub(crate) to_size_bytes: u64,
    /// Sum of the ranges.
    pub(crate) changed_bytes: u64,
    /// Radix nodes that were read to find them.
    pub(crate) nodes_read: u64,
    /// Where they differ, in order, in whole blocks.
    pub(crate) ranges: Vec<DiffRange>,
}

/// Bytes in which two snapshots differ.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct DiffRange {
    /// Where the range begins.
    pub(crate) first_bytes: u64,
    /// Its length.
    pub(crate) length_bytes: u64,
    /// What the second snapshot has there.
    pub(crate) now: RangeKind,
}

/// What a snapshot has in a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RangeKind {
    /// Blocks that were written.
    Data,
    /// Nothing: it reads as zeroes.
    Hole,
}

/// A volume after a rollback.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct RolledBack {
    /// As it is now.
    #[serde(flatten)]
    pub(crate) volume: VolumeView,
    /// The snapshot that it reads as.
    pub(crate) snapshot: SnapshotView,
    /// The snapshot that keeps what the volume held before.
    pub(crate) kept: SnapshotView,
}

/// A snapshot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct SnapshotView {
    /// As in `3.17`; never reused.
    pub(crate) id: String,
    /// Name of the volume it was taken of.
    pub(crate) volume: String,
    /// Unique in the volume.
    pub(crate) label: Option<String>,
    /// RFC 3339, UTC.
    pub(crate) time: String,
    /// Size of the volume then.
    pub(crate) size_bytes: u64,
    /// Data and metadata allocated for the volume between the snapshot before and this one.
    pub(crate) allocated_bytes: u64,
    /// Writes in flight when it was taken have not drained; it cannot be cloned yet.
    pub(crate) settling: bool,
    /// Marked deleted; shown only where something descends from it.
    pub(crate) deleted: bool,
    /// Id of the snapshot that its contents were first a copy of; null when it goes back to the
    /// volume's beginning. In a tree the nearest one of those shown.
    pub(crate) parent: Option<String>,
}

/// A snapshot that has just become durable.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct SnapshotCreated {
    /// What was taken.
    #[serde(flatten)]
    pub(crate) snapshot: SnapshotView,
    /// From the moment the command reached the reactor until the snapshot was durable.
    pub(crate) latency_ns: u64,
}

/// A snapshot that has just been deleted.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct SnapshotDeleted {
    /// As it was.
    #[serde(flatten)]
    pub(crate) snapshot: SnapshotView,
    /// Names of volumes that were cloned from it: what they need of it lives on.
    pub(crate) clones: Vec<String>,
    /// Why what it alone held is not freed at once but by the collector, if so.
    pub(crate) left_to_collector: Option<String>,
}

/// `GET /v1/tree`: volumes, each with its snapshots, oldest first. Edges are `origin`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct TreeView {
    /// By id. A deleted volume is here while a clone descends from it.
    pub(crate) volumes: Vec<TreeVolume>,
}

/// A volume in the tree.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct TreeVolume {
    /// Its id.
    pub(crate) id: u64,
    /// Its name.
    pub(crate) name: String,
    /// Its size.
    pub(crate) size_bytes: u64,
    /// Id of the snapshot it was cloned from.
    pub(crate) origin: Option<String>,
    /// Deleted; only its snapshots live on, in clones.
    pub(crate) deleted: bool,
    /// Id of the nearest snapshot of those shown that what the volume holds was first a copy of: its
    /// newest, unless it was rolled back; null when it goes back to the volume's beginning.
    pub(crate) parent: Option<String>,
    /// Its snapshots, oldest first.
    pub(crate) snapshots: Vec<SnapshotView>,
}

/// `GET /v1/stats`: counters since the daemon started, and the space there is now.
#[derive(Clone, PartialEq, Default, Debug, Serialize, Deserialize)]
pub(crate) struct StatsView {
    /// Since the daemon started.
    pub(crate) uptime_ns: u64,
    /// The store.
    pub(crate) store: StoreView,
    /// One for each core.
    pub(crate) reactors: Vec<ReactorView>,
    /// One for each volume, by name.
    pub(crate) volumes: Vec<VolumeStatsView>,
    /// Latencies of all snapshots taken.
    pub(crate) snapshot_latency: LatencyView,
    /// What deleted snapshots alone held.
    #[serde(default)]
    pub(crate) reclaim: ReclaimView,
    /// Collections.
    #[serde(default)]
    pub(crate) gc: GcView,
    /// Long work that is under way.
    #[serde(default)]
    pub(crate) jobs: Vec<JobView>,
}

/// Freeing what deleted snapshots alone held, since the start.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub(crate) struct ReclaimView {
    /// Snapshots that were done with.
    pub(crate) snapshots: u64,
    /// Snapshots that were left to the collector.
    pub(crate) left_to_collector: u64,
    /// Snapshots that are still waiting for it.
    pub(crate) waiting: u64,
    /// What was freed.
    pub(crate) freed_bytes: u64,
}

/// `GET /v1/gc`: the collection under way, and the last one.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub(crate) struct GcView {
    /// One was asked for and has not ended.
    pub(crate) running: bool,
    /// Why it was begun.
    pub(crate) trigger: Option<GcTrigger>,
    /// When it was asked for, RFC 3339.
    pub(crate) started: Option<String>,
    /// Where it is; none while something else is freed first.
    pub(crate) phase: Option<GcPhase>,
    /// Radix nodes read.
    pub(crate) nodes_read: u64,
    /// Radix nodes known by now, those that were read included.
    pub(crate) nodes_found: u64,
    /// What is found to be free, once that is known.
    pub(crate) garbage_bytes: u64,
    /// What of that is free by now.
    pub(crate) freed_bytes: u64,
    /// How many have ended since the daemon started.
    pub(crate) ended: u64,
    /// What these have freed.
    pub(crate) freed_bytes_total: u64,
    /// The last one that has ended.
    pub(crate) last: Option<GcReport>,
}

/// Why a collection is begun.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum GcTrigger {
    /// Somebody asked for it.
    Command,
    /// It was time.
    Schedule,
    /// Space, or room for volumes, runs out.
    LowSpace,
    /// The daemon before this one was not stopped in order.
    Crash,
}

/// The part of its work that a collection is at.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum GcPhase {
    /// Waiting for what is under way, reading where trees begin.
    Checkpoint,
    /// Reading nodes.
    Mark,
    /// Freeing.
    Sweep,
}

/// What a collection came to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct GcReport {
    /// Whether it came to its end.
    pub(crate) outcome: GcOutcome,
    /// Why not.
    pub(crate) reason: Option<String>,
    /// Why it was begun.
    pub(crate) trigger: GcTrigger,
    /// When, RFC 3339.
    pub(crate) started: String,
    /// How long it took.
    pub(crate) duration_ns: u64,
    /// Radix nodes read.
    pub(crate) nodes_read: u64,
    /// What volumes and snapshots hold.
    pub(crate) reachable_bytes: u64,
    /// Guests' data that is free now and was not.
    pub(crate) freed_data_bytes: u64,
    /// The same, radix nodes and snapshot logs.
    pub(crate) freed_metadata_bytes: u64,
    /// Deleted volumes of which nothing is left.
    pub(crate) volumes_reclaimed: u64,
    /// Bitmap blocks that are damaged, where nothing is freed.
    pub(crate) bitmaps_damaged: u64,
}

/// Whether a collection came to its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum GcOutcome {
    /// It did.
    Done,
    /// It did not.
    Failed,
}

/// Space on the store.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub(crate) struct StoreView {
    /// Path of the device.
    pub(crate) device: String,
    /// Identity of the store.
    pub(crate) uuid: String,
    /// The whole store.
    pub(crate) total_bytes: u64,
    /// Not in use by any volume or snapshot. Part of it is claimed by reactors, ready for use.
    pub(crate) free_bytes: u64,
    /// Guests' data.
    pub(crate) data_bytes: u64,
    /// Radix nodes and snapshot logs.
    pub(crate) metadata_bytes: u64,
}

/// One reactor.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub(crate) struct ReactorView {
    /// From 0.
    pub(crate) index: usize,
    /// The core it is pinned to.
    pub(crate) core: usize,
    /// Turns of the loop.
    pub(crate) turns: u64,
    /// Turns that found work.
    pub(crate) turns_busy: u64,
    /// Times it went to sleep.
    pub(crate) sleeps: u64,
    /// Time spent on work.
    pub(crate) busy_ns: u64,
    /// Time spent awake with nothing to do.
    pub(crate) spun_ns: u64,
    /// Time spent asleep.
    pub(crate) asleep_ns: u64,
    /// Reads and writes of the device that were polled for, where it does not interrupt for them; else 0.
    pub(crate) device_polled: u64,
    /// Messages taken from other reactors and from the control plane. Asking for these figures is one.
    pub(crate) messages: u64,
    /// Guests' requests sent to the home of their volume: what is not mapped, or cannot be written in place.
    pub(crate) forwarded: u64,
    /// Nodes found in the cache.
    pub(crate) node_cache_hits: u64,
    /// Nodes loaded from the device.
    pub(crate) node_cache_misses: u64,
    /// Commit rounds begun.
    pub(crate) commits: u64,
    /// Nodes, log blocks and volume records written.
    pub(crate) metadata_writes: u64,
    /// Flushes sent to the device.
    pub(crate) device_flushes: u64,
    /// Flushes that the device failed.
    pub(crate) device_flush_failures: u64,
    /// I/O that the device failed, flushes included.
    pub(crate) device_errors: u64,
    /// Nodes that could not be read or contradicted themselves.
    pub(crate) node_errors: u64,
    /// Guest requests that found the store full.
    pub(crate) no_space: u64,
}

/// What guests asked of a volume.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub(crate) struct VolumeStatsView {
    /// The volume's name.
    pub(crate) name: String,
    /// What guests can do with it.
    pub(crate) state: State,
    /// Reads completed.
    pub(crate) reads: u64,
    /// Writes completed.
    pub(crate) writes: u64,
    /// Flushes completed.
    pub(crate) flushes: u64,
    /// Discards and write-zeroes completed.
    pub(crate) discards: u64,
    /// Bytes of the reads.
    pub(crate) read_bytes: u64,
    /// Bytes of the writes.
    pub(crate) written_bytes: u64,
    /// Requests that were answered with an error.
    pub(crate) errors: u64,
    /// Data and metadata given to it.
    pub(crate) allocated_bytes: u64,
    /// Snapshots taken by its schedule.
    pub(crate) snapshots_scheduled: u64,
    /// Scheduled and not taken: the one before had not ended.
    pub(crate) snapshots_skipped: u64,
    /// Snapshots that its schedule has deleted.
    pub(crate) snapshots_thinned: u64,
    /// Snapshots by schedule that failed, and failed deletions.
    pub(crate) snapshots_failed: u64,
    /// Time for which its guest had to wait for its limits.
    #[serde(default)]
    pub(crate) throttled_ns: u64,
}

/// A distribution of times.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub(crate) struct LatencyView {
    /// How many.
    pub(crate) count: u64,
    /// Half were no longer than this.
    pub(crate) p50_ns: u64,
    /// 99 of 100 were no longer than this.
    pub(crate) p99_ns: u64,
    /// The longest.
    pub(crate) max_ns: u64,
}
