//! What the API shows of volumes, snapshots and reactors. Pure functions.

use super::attachment::Detached;
use super::{Condition, Served};
use crate::api::types::{
    Cache, KeepView, LimitsView, ReactorView, ScheduleView, SnapshotView, State, VolumeStatsView,
    VolumeView, nanoseconds,
};
use crate::attach::CoreCounters;
use crate::limits::Limits;
use crate::scheduler::Progress;
use crate::time::rfc3339;
use bessel_mapping::directory::VolumeSummary;
use bessel_mapping::request::{
    CacheMode, LogState, ShardStats, SnapshotId, SnapshotInfo, VolumeInfo,
};
use bessel_mapping::schedule::{Schedule, ScheduleCounters};
use bessel_mapping::volume::VolumeCounters;
use bessel_reactor::units::{BLOCK_SIZE, ByteCount};

pub(super) fn volume(
    info: &VolumeInfo,
    served: &Served,
    queue_cores: Vec<usize>,
    condition: Condition,
) -> VolumeView {
    let Condition { state, reason, remedy } = condition;
    VolumeView {
        id: info.id.0,
        name: info.name.clone(),
        size_bytes: info.size.get(),
        cache: cache(info.cache),
        queues: served.queues,
        socket: served.socket.display().to_string(),
        reactor: served.home,
        core: queue_cores[0],
        queue_cores,
        connected: served.host.is_connected(),
        origin: info.origin.map(|origin| origin.to_string()),
        created: rfc3339(info.created),
        state,
        reason,
        remedy,
        allocated_bytes: ByteCount::from_blocks(info.blocks_allocated).get(),
        snapshots: info.log.live,
        snapshots_unread: info.log.out_of_reach,
        snapshots_fault: info.log.fault.clone(),
        schedule: served.schedule.as_ref().map(|it| schedule(&it.schedule, &it.progress)),
        limits: served.limited.limits.as_ref().map(limits),
    }
}

fn cache(mode: CacheMode) -> Cache {
    match mode {
        CacheMode::Writeback => Cache::Writeback,
        CacheMode::Writethrough => Cache::Writethrough,
    }
}

/// A volume that was detached, as it was then.
pub(super) fn detached_volume(
    volume: &VolumeSummary,
    detached: &Detached,
    core: usize,
    log: &LogState,
    condition: Condition,
) -> VolumeView {
    VolumeView {
        cache: cache(detached.cache),
        queues: detached.service.queues,
        socket: detached.service.socket.display().to_string(),
        reactor: detached.home,
        core,
        snapshots: log.live,
        snapshots_unread: log.out_of_reach,
        snapshots_fault: log.fault.clone(),
        schedule: detached.service.schedule.as_ref().map(detached_schedule),
        limits: detached.service.limits.as_ref().map(limits),
        ..closed_volume(volume, condition)
    }
}

/// A volume that is not open: it is there, and says why.
pub(super) fn closed_volume(volume: &VolumeSummary, condition: Condition) -> VolumeView {
    let Condition { state, reason, remedy } = condition;
    VolumeView {
        id: volume.id.0,
        name: volume.name.clone(),
        size_bytes: volume.size.get(),
        cache: Cache::default(),
        queues: 0,
        socket: String::new(),
        reactor: 0,
        core: 0,
        queue_cores: Vec::new(),
        connected: false,
        origin: volume.origin.map(|origin| origin.to_string()),
        created: rfc3339(volume.created),
        state,
        reason,
        remedy,
        allocated_bytes: 0,
        snapshots: 0,
        snapshots_unread: 0,
        snapshots_fault: None,
        schedule: None,
        limits: None,
    }
}

fn limits(limits: &Limits) -> LimitsView {
    LimitsView {
        iops: limits.iops,
        bytes_per_second: limits.bandwidth.map(ByteCount::get),
        burst_ns: nanoseconds(limits.burst),
    }
}

fn schedule(schedule: &Schedule, progress: &Progress) -> ScheduleView {
    let (counters, trouble) = (progress.counters(), progress.trouble());
    ScheduleView {
        every_ns: nanoseconds(schedule.every),
        keep: KeepView::from(&schedule.keep),
        paused: trouble.paused,
        reason: trouble.reason,
        taken: counters.taken,
        skipped: counters.skipped,
        thinned: counters.thinned,
        failed: counters.failed,
    }
}

fn detached_schedule(it: &Schedule) -> ScheduleView {
    let reason = Some("the volume is detached".to_owned());
    ScheduleView { paused: true, reason, ..schedule(it, &Progress::default()) }
}

pub(super) fn snapshot(info: &SnapshotInfo, volume: &str) -> SnapshotView {
    SnapshotView {
        id: info.id.to_string(),
        volume: volume.to_owned(),
        label: info.label.clone(),
        time: rfc3339(info.time),
        size_bytes: info.size.get(),
        allocated_bytes: ByteCount::from_blocks(info.blocks_allocated).get(),
        settling: info.settling,
        deleted: info.deleted,
        parent: super::tree::parent(info)
            .map(|sequence| SnapshotId { sequence, ..info.id }.to_string()),
    }
}

pub(super) fn volume_stats(
    name: &str,
    state: State,
    counters: &VolumeCounters,
    scheduled: ScheduleCounters,
) -> VolumeStatsView {
    VolumeStatsView {
        name: name.to_owned(),
        state,
        reads: counters.reads,
        writes: counters.writes,
        flushes: counters.flushes,
        discards: counters.unmaps,
        read_bytes: counters.read_bytes,
        written_bytes: counters.write_bytes,
        errors: counters.errors,
        allocated_bytes: (counters.data_allocated + counters.nodes_allocated) * BLOCK_SIZE,
        snapshots_scheduled: scheduled.taken,
        snapshots_skipped: scheduled.skipped,
        snapshots_thinned: scheduled.thinned,
        snapshots_failed: scheduled.failed,
        throttled_ns: 0,
    }
}

pub(super) fn reactor(
    index: usize,
    core: usize,
    counters: &CoreCounters,
    shard: &ShardStats,
) -> ReactorView {
    ReactorView {
        index,
        core,
        turns: counters.reactor.turns.get(),
        turns_busy: counters.reactor.turns_busy.get(),
        sleeps: counters.reactor.sleeps.get(),
        busy_ns: counters.reactor.busy_ns.get(),
        spun_ns: counters.reactor.spun_ns.get(),
        asleep_ns: counters.reactor.asleep_ns.get(),
        device_polled: counters.device_polled.get(),
        messages: counters.messages.get(),
        node_cache_hits: shard.cache.hits,
        node_cache_misses: shard.cache.misses,
        commits: shard.rounds,
        forwarded: shard.forwarded,
        metadata_writes: shard.metadata_writes,
        device_flushes: shard.flushes,
        device_flush_failures: shard.flush_failures,
        device_errors: shard.device_errors,
        node_errors: shard.node_errors,
        no_space: counters.no_space.get(),
    }
}

/// A UUID as people write it.
pub(crate) fn uuid(bytes: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}
