//! `bessel volume`: create, list, show, resize, rename, rollback, detach, attach, delete.

use super::output::{Table, or_dash, print_either};
use super::{ApiArgs, Outcome};
use crate::api::types::{
    Cache, ChangeVolume, CreateVolume, Rollback, RolledBack, SnapshotView, State, VolumeView,
};
use crate::reference::{SnapshotReference, volume_name};
use crate::size::parse_size;
use bessel_reactor::units::ByteCount;
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};

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
        /// The snapshot it starts from: an id such as 3.17, or volume@label
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
        /// An id such as 3.17, or volume@label
        snapshot: SnapshotReference,
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
        VolumeCommand::Create { name, size, from } => {
            let request = CreateVolume {
                name: name.clone(),
                size_bytes: size.map(ByteCount::get),
                from: from.as_ref().map(ToString::to_string),
            };
            let volume: VolumeView = client.post("/v1/volumes", &request)?;
            print_either(json, &volume, |volume| {
                let size = ByteCount::new(volume.size_bytes).human();
                format!("created volume {} of {size}, served at {}", volume.name, volume.socket)
            })
        }
        VolumeCommand::List => {
            let volumes: Vec<VolumeView> = client.get("/v1/volumes")?;
            print_either(json, &volumes, |volumes| list(volumes))
        }
        VolumeCommand::Show { volume } => {
            let shown = VolumeWithSnapshots {
                volume: client.get(&format!("/v1/volumes/{volume}"))?,
                snapshot_list: client.get(&format!("/v1/volumes/{volume}/snapshots"))?,
            };
            print_either(json, &shown, show)
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
        VolumeCommand::Rollback { volume, snapshot } => {
            let request = Rollback { snapshot: snapshot.to_string() };
            let path = format!("/v1/volumes/{volume}/rollback");
            let done: RolledBack = client.post(&path, &request)?;
            print_either(json, &done, |RolledBack { volume, kept }| {
                format!(
                    "volume {} reads as snapshot {snapshot} now; what it held is kept as snapshot {}",
                    volume.name, kept.id
                )
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
            volume.snapshots.to_string(),
            or_dash(&volume.origin),
            state_name(volume.state).to_owned(),
            guest_state(volume).to_owned(),
            volume.socket.clone(),
        ]);
    }
    table.render()
}

fn show(shown: &VolumeWithSnapshots) -> String {
    let volume = &shown.volume;
    let mut table = Table::new(&["volume", &volume.name]);
    for (key, value) in [
        ("id", volume.id.to_string()),
        ("size", ByteCount::new(volume.size_bytes).human()),
        ("cache", cache_name(volume.cache).to_owned()),
        ("queues", volume.queues.to_string()),
        ("socket", volume.socket.clone()),
        ("reactor", volume.reactor.to_string()),
        ("state", state_name(volume.state).to_owned()),
        ("guest", guest_state(volume).to_owned()),
        ("origin", or_dash(&volume.origin)),
        ("allocated", ByteCount::new(volume.allocated_bytes).human()),
        ("created", volume.created.clone()),
    ] {
        table.row(vec![key.to_owned(), value]);
    }
    for (key, value) in [("reason", &volume.reason), ("remedy", &volume.remedy)] {
        if let Some(value) = value {
            table.row(vec![key.to_owned(), value.clone()]);
        }
    }
    let mut text = table.render();
    if !shown.snapshot_list.is_empty() {
        text.push('\n');
        text.push_str(&super::snapshot::list(&shown.snapshot_list));
    }
    text
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
    }
}

fn guest_state(volume: &VolumeView) -> &'static str {
    if volume.connected { "connected" } else { "-" }
}
