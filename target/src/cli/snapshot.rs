//! `bessel snapshot`: create, list, label, delete, diff, export.

use super::client::{Client, ClientError};
use super::export::{self, Export};
use super::output::{Parts, Table, duration, or_dash, print_either};
use super::{ApiArgs, Outcome};
use crate::api::types::{
    ChangeSnapshot, CreateSnapshot, DiffView, RangeKind, SnapshotCreated, SnapshotDeleted,
    SnapshotView, SpaceView,
};
use crate::reference::{SnapshotReference, label, volume_name};
use bessel_mapping::request::SnapshotId;
use bessel_mapping::snapshot_log::PAGE_MAX;
use bessel_reactor::units::ByteCount;
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// `bessel snapshot`
#[derive(Args, Debug)]
pub(crate) struct SnapshotArgs {
    #[command(flatten)]
    api: ApiArgs,
    #[command(subcommand)]
    command: SnapshotCommand,
}

#[derive(Subcommand, Debug)]
enum SnapshotCommand {
    /// Take a snapshot; I/O goes on meanwhile
    Create {
        /// The volume's name
        #[arg(value_parser = volume_name)]
        volume: String,
        /// A label, unique in the volume
        #[arg(long, value_parser = label)]
        label: Option<String>,
    },
    /// List a volume's snapshots, oldest first
    List {
        /// The volume's name
        #[arg(value_parser = volume_name)]
        volume: String,
        /// Only those after this one, by its id
        #[arg(long, value_name = "ID", value_parser = snapshot_id, conflicts_with = "space")]
        after: Option<SnapshotId>,
        /// Show what the volume and they take, alone and shared: reads all their metadata
        #[arg(long)]
        space: bool,
    },
    /// Give a snapshot a label, or another one
    Label {
        /// An id such as 3.17, volume@label, volume@2026-11-20T11:40:00Z or "volume@10s ago"
        snapshot: SnapshotReference,
        /// The label, unique in the volume
        #[arg(value_parser = label)]
        label: String,
    },
    /// Delete a snapshot; clones of it live on
    Delete {
        /// An id such as 3.17, volume@label, volume@2026-11-20T11:40:00Z or "volume@10s ago"
        snapshot: SnapshotReference,
    },
    /// Show where two snapshots differ, of one volume or of clones of it
    Diff {
        /// The one to compare with: an id such as 3.17, or volume@label
        from: SnapshotReference,
        /// The other one
        to: SnapshotReference,
    },
    /// Read a snapshot out to a sparse raw file or a pipe
    Export {
        /// An id such as 3.17, or volume@label
        snapshot: SnapshotReference,
        /// The file to make; `-` is standard output, where holes are written as zeroes
        file: PathBuf,
        /// Only what differs from this snapshot, as a stream of ranges
        #[arg(long, value_name = "SNAPSHOT")]
        from: Option<SnapshotReference>,
        /// Replace the file if there is one
        #[arg(long)]
        force: bool,
    },
}

/// Runs a `bessel snapshot` command.
pub(crate) fn run(arguments: &SnapshotArgs) -> Outcome {
    let client = arguments.api.client();
    let json = arguments.api.json;
    match &arguments.command {
        SnapshotCommand::Create { volume, label } => {
            let request = CreateSnapshot { label: label.clone() };
            let path = format!("/v1/volumes/{volume}/snapshots");
            let created: SnapshotCreated = client.post(&path, &request)?;
            print_either(json, &created, |created| {
                let took = duration(created.latency_ns);
                format!("snapshot {}, durable in {took}", name(&created.snapshot))
            })
        }
        SnapshotCommand::List { volume, space: true, .. } => show_space(&arguments.api, volume),
        SnapshotCommand::List { volume, after, .. } => {
            let mut parts = Parts::new(json, &COLUMNS);
            let mut pages = Pages::new(&client, volume, *after);
            while let Some(page) = pages.next()? {
                if !parts.add(&page, row)? {
                    return Ok(()); // Nobody reads on.
                }
            }
            parts.end()
        }
        SnapshotCommand::Label { snapshot, label } => {
            let request = ChangeSnapshot { label: Some(label.clone()) };
            let path = format!("/v1/snapshots/{}", snapshot.in_path());
            let snapshot: SnapshotView = client.patch(&path, &request)?;
            print_either(json, &snapshot, |snapshot| format!("snapshot {}", name(snapshot)))
        }
        SnapshotCommand::Delete { snapshot } => {
            let path = format!("/v1/snapshots/{}", snapshot.in_path());
            let deleted: SnapshotDeleted = client.delete(&path)?;
            print_either(json, &deleted, |deleted| {
                let lives = match &deleted.clones[..] {
                    [] => String::new(),
                    clones => format!("; what its clones need lives on: {}", clones.join(", ")),
                };
                let left = match &deleted.left_to_collector {
                    None => String::new(),
                    Some(why) => format!("; the collector is left to free its space: {why}"),
                };
                format!("deleted snapshot {}{lives}{left}", deleted.snapshot.id)
            })
        }
        SnapshotCommand::Diff { from, to } => {
            let path = format!("/v1/snapshots/{}/diff/{}", from.in_path(), to.in_path());
            let diff: DiffView = client.patient().get(&path)?;
            print_either(json, &diff, differences)
        }
        SnapshotCommand::Export { snapshot, file, from, force } => {
            let (from, force) = (from.as_ref(), *force);
            export::run(&arguments.api, &Export { snapshot, from, file, force })
        }
    }
}

/// `1.3 (vm1@base)`, or `1.3 of vm1`.
pub(super) fn name(snapshot: &SnapshotView) -> String {
    match &snapshot.label {
        Some(label) => format!("{} ({}@{label})", snapshot.id, snapshot.volume),
        None => format!("{} of {}", snapshot.id, snapshot.volume),
    }
}

/// Shows what a volume and its snapshots take.
pub(super) fn show_space(api: &ApiArgs, volume: &str) -> Outcome {
    let path = format!("/v1/volumes/{volume}/space");
    let space: SpaceView = api.client().patient().get(&path)?;
    print_either(api.json, &space, |space| {
        let mut table = Table::new(&["ID", "REFERS", "ALONE", "SHARED"]);
        let snapshots = space.snapshots.iter().map(|it| (it.id.as_str(), it.space));
        let current = space.current.iter().map(|current| (space.volume.as_str(), *current));
        for (id, space) in snapshots.chain(current) {
            let size = |bytes| ByteCount::new(bytes).human();
            table.row(vec![
                id.to_owned(),
                size(space.refers_bytes),
                size(space.alone_bytes),
                size(space.shared_bytes),
            ]);
        }
        let data = ByteCount::new(space.forest_data_bytes).human();
        let nodes = ByteCount::new(space.forest_nodes_bytes).human();
        format!(
            "{}with all that is related to it: {data} of data, {nodes} of metadata\n",
            table.render()
        )
    })
}

/// A table of ranges, and their sum.
fn differences(diff: &DiffView) -> String {
    let mut table = Table::new(&["FIRST", "LENGTH", "NOW"]);
    for range in &diff.ranges {
        let now = match range.now {
            RangeKind::Data => "data",
            RangeKind::Hole => "hole",
        };
        table.row(vec![
            range.first_bytes.to_string(),
            range.length_bytes.to_string(),
            now.to_owned(),
        ]);
    }
    let changed = ByteCount::new(diff.changed_bytes).human();
    let sum = match diff.ranges.len() {
        0 => return format!("snapshots {} and {} hold the same", diff.from, diff.to),
        1 => format!("1 range, {changed}"),
        count => format!("{count} ranges, {changed}"),
    };
    format!("{}{sum}\n", table.render())
}

/// What a list of snapshots says of each.
pub(super) const COLUMNS: [&str; 6] = ["ID", "LABEL", "TIME", "SIZE", "ALLOCATED", "STATE"];

pub(super) fn row(snapshot: &SnapshotView) -> Vec<String> {
    vec![
        snapshot.id.clone(),
        or_dash(&snapshot.label),
        snapshot.time.clone(),
        ByteCount::new(snapshot.size_bytes).human(),
        ByteCount::new(snapshot.allocated_bytes).human(),
        if snapshot.settling { "settling" } else { "-" }.to_owned(),
    ]
}

/// An id such as 3.17.
fn snapshot_id(text: &str) -> Result<SnapshotId, String> {
    text.parse().map_err(|()| format!("{text:?} is no id of a snapshot, such as 3.17"))
}

/// A volume's snapshots, by pages: there may be a million.
pub(super) struct Pages<'a> {
    client: &'a Client,
    path: String,
    /// The last one of the page before.
    after: Option<String>,
    ended: bool,
}

impl<'a> Pages<'a> {
    pub(super) fn new(client: &'a Client, volume: &str, after: Option<SnapshotId>) -> Self {
        let path = format!("/v1/volumes/{volume}/snapshots?limit={PAGE_MAX}");
        Self { client, path, after: after.map(|id| id.to_string()), ended: false }
    }

    /// The next page; none when there are no more.
    pub(super) fn next(&mut self) -> Result<Option<Vec<SnapshotView>>, ClientError> {
        if self.ended {
            return Ok(None);
        }
        let after = self.after.take().map_or(String::new(), |after| format!("&after={after}"));
        let page: Vec<SnapshotView> = self.client.get(&format!("{}{after}", self.path))?;
        self.ended = page.len() < PAGE_MAX;
        self.after = page.last().map(|last| last.id.clone());
        Ok(Some(page))
    }
}
