//! `bessel snapshot`: create, list, label, delete.

use super::output::{Table, duration, or_dash, print_either};
use super::{ApiArgs, Outcome};
use crate::api::types::{
    ChangeSnapshot, CreateSnapshot, SnapshotCreated, SnapshotDeleted, SnapshotView,
};
use crate::reference::{SnapshotReference, label, volume_name};
use bessel_reactor::units::ByteCount;
use clap::{Args, Subcommand};

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
    },
    /// Give a snapshot a label, or another one
    Label {
        /// An id such as 3.17, volume@label, volume@2026-11-20T11:40:00Z or "volume@10s ago"
        snapshot: SnapshotReference,
        /// The label, unique in the volume
        #[arg(value_parser = label)]
        label: String,
    },
    /// Mark a snapshot deleted
    Delete {
        /// An id such as 3.17, volume@label, volume@2026-11-20T11:40:00Z or "volume@10s ago"
        snapshot: SnapshotReference,
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
        SnapshotCommand::List { volume } => {
            let path = format!("/v1/volumes/{volume}/snapshots");
            let snapshots: Vec<SnapshotView> = client.get(&path)?;
            print_either(json, &snapshots, |snapshots| list(snapshots))
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
            print_either(json, &deleted, |SnapshotDeleted { snapshot, clones }| {
                let lives = match &clones[..] {
                    [] => String::new(),
                    clones => format!("; what its clones need lives on: {}", clones.join(", ")),
                };
                format!("deleted snapshot {}{lives}", snapshot.id)
            })
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

/// A table of snapshots.
pub(super) fn list(snapshots: &[SnapshotView]) -> String {
    let mut table = Table::new(&["ID", "LABEL", "TIME", "SIZE", "ALLOCATED", "STATE"]);
    for snapshot in snapshots {
        table.row(vec![
            snapshot.id.clone(),
            or_dash(&snapshot.label),
            snapshot.time.clone(),
            ByteCount::new(snapshot.size_bytes).human(),
            ByteCount::new(snapshot.allocated_bytes).human(),
            if snapshot.settling { "settling" } else { "-" }.to_owned(),
        ]);
    }
    table.render()
}
