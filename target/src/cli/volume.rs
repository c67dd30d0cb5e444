//! `bessel volume`: create, import, list, show, resize, rename, rollback, schedule, limit, move, detach, attach, delete.

use super::import::{self, Import};
use super::output::{Parts, Table, or_dash, print, print_either};
use super::snapshot::{self, Pages};
use super::{ApiArgs, Outcome};
use crate::api::types::{
    CLONES_MAX, Cache, ChangeVolume, CreateClones, CreateVolume, KeepView, LimitsView, MoveVolume,
    Rollback, RolledBack, ScheduleView, SetSchedule, SnapshotView, State, VolumeView, nanoseconds,
};
use crate::keep::{keep_text, parse_keep};
use crate::reference::{SnapshotReference, label, volume_name};
use crate::size::parse_size;
use crate::span::{parse_span, span_text};
use bessel_mapping::request::{SnapshotId, VolumeId};
use bessel_mapping::schedule::Keep;
use bessel_reactor::units::ByteCount;
use clap::{ArgGroup, Args, Subcommand};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// `bessel volume`
#[derive(Args, Debug)]
pub(crate) struct VolumeArgs {
    #[command(flatten)]
    api: ApiArgs,
    #[command(subcommand)]
    command: VolumeCommand,
}

#[derive(Subcommand, Debug)]
enum VolumeCommand {
    /// Create a thin volume, empty or as a clone of a snapshot
    Create {
        /// Its name
        #[arg(value_parser = volume_name)]
        name: String,
        /// Its size, such as 4GiB; a clone is by default as large as its snapshot
        #[arg(long, value_parser = parse_size, required_unless_present = "from")]
        size: Option<ByteCount>,
        /// The snapshot it starts from: an id such as 3.17, volume@label, volume@2026-11-20T11:40:00Z
        /// or "volume@10s ago" (the newest at or before that time)
        #[arg(long, value_name = "SNAPSHOT")]
        from: Option<SnapshotReference>,
        /// So many clones at once, called NAME-1, NAME-2 and so on, as large as the snapshot
        #[arg(
            long,
            requires = "from",
            conflicts_with = "size",
            value_parser = clap::value_parser!(u32).range(1..=CLONES_MAX as i64)
        )]
        count: Option<u32>,
    },
    /// Create a volume with what a raw file, sparse or not, a block device or a pipe holds; or, with
    /// --from, with a snapshot and a difference to it that `bessel snapshot export --from` has made
    Import {
        /// Its name
        #[arg(value_parser = volume_name)]
        name: String,
        /// What to import; `-` is standard input
        file: PathBuf,
        /// Its size, at least that of the file; by default the file's, rounded up to 512 bytes
        #[arg(long, value_parser = parse_size, conflicts_with = "from")]
        size: Option<ByteCount>,
        /// The snapshot that FILE is a difference to
        #[arg(long, value_name = "SNAPSHOT")]
        from: Option<SnapshotReference>,
    },
    /// List the volumes
    List,
    /// Show a volume and its snapshots
    Show {
        /// The volume's name
        #[arg(value_parser = volume_name)]
        volume: String,
        /// Show what it and its snapshots take, alone and shared: reads all their metadata
        #[arg(long)]
        space: bool,
    },
    /// Make a volume larger
    Resize {
        /// The volume's name
        #[arg(value_parser = volume_name)]
        volume: String,
        /// The new size, at least the present one
        #[arg(value_parser = parse_size)]
        size: ByteCount,
    },
    /// Give a volume another name
    Rename {
        /// The volume's name
        #[arg(value_parser = volume_name)]
        volume: String,
        /// Its new name
        #[arg(value_parser = volume_name)]
        name: String,
    },
    /// Make a volume read as one of its snapshots does; what it holds now is kept as a new snapshot
    Rollback {
        /// The volume's name
        #[arg(value_parser = volume_name)]
        volume: String,
        /// An id such as 3.17, volume@label, volume@2026-11-20T11:40:00Z or "volume@10s ago"
        snapshot: SnapshotReference,
        /// Label of the snapshot that keeps what the volume holds [default: before-rollback-N]
        #[arg(long, value_parser = label)]
        label: Option<String>,
        /// Also under a connected front-end: its guest's requests pause, then reach the other contents.
        /// Virtio has no word for that, so a guest that has the disk mounted or cached damages it;
        /// unmount it first, and have the guest read it anew (`blockdev --flushbufs`)
        #[arg(long)]
        force: bool,
    },
    /// Take snapshots of a volume by schedule until the daemon ends, and delete old ones; the
    /// configuration has a key for what shall last
    #[command(group = ArgGroup::new("change").required(true).args(["every", "off"]))]
    Schedule {
        /// The volume's name
        #[arg(value_parser = volume_name)]
        volume: String,
        /// Time between two snapshots, such as 10ms, 1s or 1h
        #[arg(long, value_parser = parse_span, requires = "keep")]
        every: Option<Duration>,
        /// Which snapshots without a label stay: a number of the newest, all, or ages from young to
        /// old as in "1m, 1h every 1s, 1d every 1m"
        #[arg(long, value_parser = parse_keep, requires = "every")]
        keep: Option<Keep>,
        /// Take no more
        #[arg(long)]
        off: bool,
    },
    /// Hold a volume's guest to these limits, and no others, until the daemon ends; the configuration
    /// has a key for what shall last
    #[command(group = ArgGroup::new("change").required(true).multiple(true).args(["iops", "bandwidth", "off"]))]
    Limit {
        /// The volume's name
        #[arg(value_parser = volume_name)]
        volume: String,
        /// Requests of any kind in a second
        #[arg(long)]
        iops: Option<u64>,
        /// Bytes read and written in a second, together, such as 100MiB
        #[arg(long, value_parser = parse_size)]
        bandwidth: Option<ByteCount>,
        /// What an idle guest saves up, as the time it takes at the limit
        #[arg(long, value_parser = parse_span, default_value = "100ms", conflicts_with = "off")]
        burst: Duration,
        /// No limits any more
        #[arg(long, conflicts_with_all = ["iops", "bandwidth"])]
        off: bool,
    },
    /// Have the reactor on another core serve a volume, while its guest goes on; until the daemon ends it
    /// stays there
    Move {
        /// The volume's name
        #[arg(value_parser = volume_name)]
        volume: String,
        /// The core, one of `reactors.cores` in the configuration
        #[arg(long, value_name = "CORE")]
        to: usize,
    },
    /// Stop serving a volume until it is attached or the daemon starts again; guests lose their disk
    Detach {
        /// The volume's name
        #[arg(value_parser = volume_name)]
        volume: String,
    },
    /// Read a detached volume anew from the device and serve it: clears a failure
    Attach {
        /// The volume's name
        #[arg(value_parser = volume_name)]
        volume: String,
    },
    /// Delete a volume
    Delete {
        /// The volume's name
        #[arg(value_parser = volume_name)]
        volume: String,
    },
}

/// What `volume show --json` prints.
#[derive(Serialize, Deserialize)]
struct VolumeWithSnapshots {
    #[serde(flatten)]
    volume: VolumeView,
    snapshot_list: Vec<SnapshotView>,
}

/// Runs a `bessel volume` command.
pub(crate) fn run(arguments: &VolumeArgs) -> Outcome {
    let client = arguments.api.client();
    let json = arguments.api.json;
    match &arguments.command {
        VolumeCommand::Create { name, from: Some(from), count: Some(count), .. } => {
            let request = CreateClones { prefix: name.clone(), count: *count };
            let path = format!("/v1/snapshots/{}/clones", from.in_path());
            let volumes: Vec<VolumeView> = client.post(&path, &request)?;
            print_either(json, &volumes, |volumes| {
                let origin = volumes.first().and_then(|volume| volume.origin.as_ref());
                let origin = origin.map_or("-", |origin| &**origin);
                format!(
                    "created {count} volumes from snapshot {origin}: {name}-1 to {name}-{count}"
                )
            })
        }
        VolumeCommand::Create { name, size, from, .. } => {
            let request = CreateVolume {
                name: name.clone(),
                size_bytes: size.map(ByteCount::get),
                from: from.as_ref().map(ToString::to_string),
            };
            let volume: VolumeView = client.post("/v1/volumes", &request)?;
            print_either(json, &volume, |volume| {
                let size = ByteCount::new(volume.size_bytes).human();
                let from = volume.origin.as_ref();
                let from = from.map_or(String::new(), |origin| format!(" from snapshot {origin}"));
                format!(
                    "created volume {} of {size}{from}, served at {}",
                    volume.name, volume.socket
                )
            })
        }
        VolumeCommand::Import { name, file, size, from } => {
            let (size, from) = (*size, from.as_ref());
            import::run(&arguments.api, &Import { name, file, size, from })
        }
        VolumeCommand::List => {
            let volumes: Vec<VolumeView> = client.get("/v1/volumes")?;
            print_either(json, &volumes, |volumes| list(volumes))
        }
        VolumeCommand::Show { volume, space: true } => snapshot::show_space(&arguments.api, volume),
        VolumeCommand::Show { volume, .. } => {
            let view: VolumeView = client.get(&format!("/v1/volumes/{volume}"))?;
            // Of a damaged log, what can be read.
            let lost = view.snapshots_fault.as_ref().and(view.snapshots_unread.checked_sub(1));
            let after = lost.map(|sequence| SnapshotId { volume: VolumeId(view.id), sequence });
            let mut pages = Pages::new(&client, volume, after);
            if json {
                let mut shown = VolumeWithSnapshots { volume: view, snapshot_list: Vec::new() };
                while let Some(page) = pages.next()? {
                    shown.snapshot_list.extend(page);
                }
                return print_either(json, &shown, |_| String::new());
            }
            let mut parts = Parts::new(false, &snapshot::COLUMNS);
            let mut text = show(&view);
            while let Some(page) = pages.next()? {
                if !text.is_empty() {
                    text.push_str(if page.is_empty() { "" } else { "\n" });
                    print(&std::mem::take(&mut text))?;
                }
                if page.is_empty() || !parts.add(&page, snapshot::row)? {
                    break; // There is none, or nobody reads on.
                }
            }
            Ok(())
        }
        VolumeCommand::Resize { volume, size } => {
            let request = ChangeVolume { size_bytes: Some(size.get()), name: None };
            let volume: VolumeView = client.patch(&format!("/v1/volumes/{volume}"), &request)?;
            print_either(json, &volume, |volume| {
                let size = ByteCount::new(volume.size_bytes).human();
                format!("volume {} has {size} now", volume.name)
            })
        }
        VolumeCommand::Rename { volume, name } => {
            let request = ChangeVolume { name: Some(name.clone()), size_bytes: None };
            let renamed: VolumeView = client.patch(&format!("/v1/volumes/{volume}"), &request)?;
            print_either(json, &renamed, |renamed| {
                let name = &renamed.name;
                format!("volume {volume} is called {name} now; rename it in the configuration too")
            })
        }
        VolumeCommand::Rollback { volume, snapshot, label, force } => {
            let (snapshot, label) = (snapshot.to_string(), label.clone());
            let request = Rollback { snapshot, label, force: *force };
            let path = format!("/v1/volumes/{volume}/rollback");
            let done: RolledBack = client.post(&path, &request)?;
            print_either(json, &done, |RolledBack { volume, snapshot, kept }| {
                format!(
                    "volume {name} reads as snapshot {} of {} now; what it held is kept as snapshot {}: \
                     `bessel volume rollback {name} {}` undoes this",
                    snapshot::name(snapshot),
                    snapshot.time,
                    snapshot::name(kept),
                    kept.id,
                    name = volume.name,
                )
            })
        }
        VolumeCommand::Schedule { volume, every, keep, .. } => {
            let path = format!("/v1/volumes/{volume}/schedule");
            let volume: VolumeView = match every.zip(keep.as_ref()) {
                Some((every, keep)) => {
                    let (every_ns, keep) = (nanoseconds(every), KeepView::from(keep));
                    client.put(&path, &SetSchedule { every_ns, keep })?
                }
                None => client.delete(&path)?,
            };
            print_either(json, &volume, |volume| match &volume.schedule {
                Some(schedule) => format!(
                    "volume {}: {}, until the daemon ends; `snapshots:` in the configuration lasts",
                    volume.name,
                    schedule_text(schedule)
                ),
                None => format!("volume {}: no more snapshots by schedule", volume.name),
            })
        }
        VolumeCommand::Limit { volume, iops, bandwidth, burst, off } => {
            let path = format!("/v1/volumes/{volume}/limits");
            let bytes_per_second = bandwidth.map(ByteCount::get);
            let limits =
                LimitsView { iops: *iops, bytes_per_second, burst_ns: nanoseconds(*burst) };
            let volume: VolumeView =
                if *off { client.delete(&path)? } else { client.put(&path, &limits)? };
            print_either(json, &volume, |volume| match &volume.limits {
                Some(limits) => format!(
                    "volume {}: {}, until the daemon ends; `limits:` in the configuration lasts",
                    volume.name,
                    limits_text(limits)
                ),
                None => format!("volume {}: no limits", volume.name),
            })
        }
        VolumeCommand::Move { volume, to } => {
            let path = format!("/v1/volumes/{volume}/home");
            let done: VolumeView = client.put(&path, &MoveVolume { core: *to })?;
            print_either(json, &done, |volume| {
                format!("volume {}: served by the reactor on core {}", volume.name, volume.core)
            })
        }
        VolumeCommand::Detach { volume } => {
            let done: VolumeView = client.post(&format!("/v1/volumes/{volume}/detach"), &())?;
            print_either(json, &done, |volume| {
                let name = &volume.name;
                format!("volume {name} is detached; `bessel volume attach {name}` brings it back")
            })
        }
        VolumeCommand::Attach { volume } => {
            let done: VolumeView = client.post(&format!("/v1/volumes/{volume}/attach"), &())?;
            print_either(json, &done, |volume| {
                format!("volume {} is attached, served at {}", volume.name, volume.socket)
            })
        }
        VolumeCommand::Delete { volume } => {
            let volume: VolumeView = client.delete(&format!("/v1/volumes/{volume}"))?;
            print_either(json, &volume, |volume| format!("deleted volume {}", volume.name))
        }
    }
}

fn list(volumes: &[VolumeView]) -> String {
    let mut table = Table::new(&[
        "NAME",
        "ID",
        "SIZE",
        "CACHE",
        "SNAPSHOTS",
        "ORIGIN",
        "STATE",
        "GUEST",
        "SOCKET",
    ]);
    for volume in volumes {
        table.row(vec![
            volume.name.clone(),
            volume.id.to_string(),
            ByteCount::new(volume.size_bytes).human(),
            cache_name(volume.cache).to_owned(),
            count_of_snapshots(volume),
            or_dash(&volume.origin),
            state_name(volume.state).to_owned(),
            guest_state(volume).to_owned(),
            volume.socket.clone(),
        ]);
    }
    table.render()
}

fn show(volume: &VolumeView) -> String {
    let mut table = Table::new(&["volume", &volume.name]);
    for (key, value) in [
        ("id", volume.id.to_string()),
        ("size", ByteCount::new(volume.size_bytes).human()),
        ("cache", cache_name(volume.cache).to_owned()),
        ("queues", queues_text(volume)),
        ("socket", volume.socket.clone()),
        ("reactor", format!("{}, on core {}", volume.reactor, volume.core)),
        ("state", state_name(volume.state).to_owned()),
        ("guest", guest_state(volume).to_owned()),
        ("origin", or_dash(&volume.origin)),
        ("allocated", ByteCount::new(volume.allocated_bytes).human()),
        ("created", volume.created.clone()),
        ("snapshots", count_of_snapshots(volume)),
    ] {
        table.row(vec![key.to_owned(), value]);
    }
    if let Some(limits) = &volume.limits {
        table.row(vec!["limits".to_owned(), limits_text(limits)]);
    }
    if let Some(schedule) = &volume.schedule {
        let ScheduleView { taken, skipped, thinned, failed, .. } = schedule;
        let counts =
            format!("{taken} taken, {skipped} skipped, {thinned} thinned, {failed} failed");
        table.row(vec!["schedule".to_owned(), schedule_text(schedule)]);
        table.row(vec!["scheduled".to_owned(), counts]);
        if let Some(reason) = &schedule.reason {
            let what = if schedule.paused { "paused" } else { "trouble" };
            table.row(vec![what.to_owned(), reason.clone()]);
        }
    }
    let trouble =
        [("reason", &volume.reason), ("remedy", &volume.remedy), ("lost", &volume.snapshots_fault)];
    for (key, value) in trouble {
        if let Some(value) = value {
            table.row(vec![key.to_owned(), value.clone()]);
        }
    }
    table.render()
}

/// How many queues, and where they are polled, if that is not at home alone.
fn queues_text(volume: &VolumeView) -> String {
    let VolumeView { queues, queue_cores, .. } = volume;
    if queue_cores.len() < 2 {
        return queues.to_string();
    }
    let cores: Vec<String> = queue_cores.iter().map(usize::to_string).collect();
    format!("{queues}, on cores {} in turn", cores.join(", "))
}

/// How many snapshots: of those that are known, as long as some are not.
fn count_of_snapshots(volume: &VolumeView) -> String {
    let more = if volume.snapshots_unread > 0 { "+" } else { "" };
    format!("{}{more}", volume.snapshots)
}

/// `a snapshot every 1s, kept: 60`
fn schedule_text(schedule: &ScheduleView) -> String {
    let every = span_text(Duration::from_nanos(schedule.every_ns));
    let keep = schedule.keep.keep();
    let keep = keep.map_or_else(|| "-".to_owned(), |keep| keep_text(&keep));
    format!("a snapshot every {every}, kept: {keep}")
}

/// `at most 1000 requests and 100MiB a second, 100ms of it saved up`
fn limits_text(limits: &LimitsView) -> String {
    let requests = limits.iops.map(|iops| format!("{iops} requests"));
    let bytes = limits.bytes_per_second.map(|bytes| ByteCount::new(bytes).human());
    let both: Vec<_> = requests.into_iter().chain(bytes).collect();
    let burst = span_text(Duration::from_nanos(limits.burst_ns));
    format!("at most {} a second, {burst} of it saved up", both.join(" and "))
}

fn cache_name(cache: Cache) -> &'static str {
    match cache {
        Cache::Writeback => "writeback",
        Cache::Writethrough => "writethrough",
    }
}

fn state_name(state: State) -> &'static str {
    match state {
        State::Online => "online",
        State::Failed => "FAILED",
        State::Detached => "detached",
        State::Unavailable => "UNAVAILABLE",
        State::Importing => "importing",
    }
}

fn guest_state(volume: &VolumeView) -> &'static str {
    if volume.connected { "connected" } else { "-" }
}
