//! The command grammar: what may be typed, and which file answers it.
//!
//! One file for each noun. Commands that speak to the daemon do so through [`client::Client`] and
//! know only the API's types; `serve`, `format` and `check` work on a device. Values are checked
//! here, so a mistyped one is wrong usage (status 2) and reaches nobody.

mod check;
mod client;
mod export;
mod format;
mod gc;
mod import;
pub(crate) mod output;
mod snapshot;
mod stats;
mod tree;
mod volume;

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// What a command comes to. Errors are printed by `main`, with their sources, on one line.
pub(crate) type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Thin copy-on-write volumes for virtual machines, served over vhost-user-blk.
#[derive(Parser, Debug)]
#[command(name = "bessel", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Write an empty store to a block device or file
    Format(format::FormatArgs),
    /// Serve the volumes of a store until SIGTERM or SIGINT
    Serve(ServeArgs),
    /// Create, list, change and delete volumes
    Volume(volume::VolumeArgs),
    /// Take, list, label and delete snapshots
    Snapshot(snapshot::SnapshotArgs),
    /// Show volumes and snapshots by descent
    Tree(tree::TreeArgs),
    /// Free everything that no volume or snapshot needs, while volumes are served
    Gc(gc::GcArgs),
    /// Show counters and space
    Stats(stats::StatsArgs),
    /// Verify a store that no daemon serves, and repair what follows from the rest
    Check(check::CheckArgs),
}

/// `bessel serve`
#[derive(Args, Debug)]
struct ServeArgs {
    /// The YAML configuration
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// What every command that speaks to the daemon takes.
#[derive(Args, Debug)]
struct ApiArgs {
    /// Unix socket of the daemon
    #[arg(
        long,
        global = true,
        env = "BESSEL_API",
        value_name = "SOCKET",
        default_value = "/run/bessel/api.sock"
    )]
    api: PathBuf,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
}

impl ApiArgs {
    fn client(&self) -> client::Client {
        client::Client::new(&self.api)
    }
}

/// Parses the command line and does what it says. Wrong usage ends the process with status 2.
pub(crate) fn run() -> Outcome {
    match Cli::parse().command {
        Command::Format(arguments) => format::run(&arguments),
        Command::Serve(arguments) => crate::daemon::serve(&arguments.config),
        Command::Volume(arguments) => volume::run(&arguments),
        Command::Snapshot(arguments) => snapshot::run(&arguments),
        Command::Tree(arguments) => tree::run(&arguments),
        Command::Gc(arguments) => gc::run(&arguments),
        Command::Stats(arguments) => stats::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_grammar_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_the_design_promises_can_be_typed() {
        for line in [
            "format /dev/sdb",
            "format store.img --size 8GiB --extent-size 1MiB --force --json",
            "serve --config bessel.yaml",
            "volume create vm1 --size 4GiB",
            "volume create vm2 --size 4GiB --from vm1@base --json",
            "volume create vm2 --from 1.0",
            "volume create vm --from vm1@base --count 1000",
            "volume list --api /tmp/api.sock",
            "volume --api /tmp/api.sock list",
            "volume show vm1",
            "volume show vm1 --space",
            "snapshot list vm1 --space --json",
            "volume import vm1 disk.img",
            "volume import vm1 - --size 8GiB --json",
            "volume import vm2 difference --from vm1@base",
            "volume resize vm1 8GiB",
            "volume rename vm1 vm9",
            "volume rollback vm1 1.3",
            "volume delete vm1",
            "volume schedule vm1 --every 10ms --keep 60",
            "volume schedule vm1 --off",
            "volume limit vm1 --iops 5",
            "volume limit vm1 --iops 5 --bandwidth 100MiB --burst 2s",
            "volume limit vm1 --off --json",
            "snapshot delete vm1@2026-11-20T11:40:00Z",
            "volume rollback vm1 vm1@base --force --label kept",
            "volume detach vm1",
            "volume attach vm1 --json",
            "snapshot create vm1",
            "snapshot create vm1 --label base",
            "snapshot list vm1",
            "snapshot label vm1@base golden",
            "snapshot delete 1.0",
            "snapshot diff 1.0 vm1@base --json",
            "snapshot export vm1@base base.img --force",
            "snapshot export 1.3 - --from vm1@base",
            "tree",
            "tree --format dot",
            "tree --json",
            "gc",
            "gc --status --json",
            "gc --stop",
            "stats --json",
            "check /dev/sdb --json",
            "check /dev/sdb --repair",
            "check /dev/sdb --repair --yes --json",
        ] {
            let words = std::iter::once("bessel").chain(line.split(' '));
            Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }

    #[test]
    fn mistyped_values_are_wrong_usage() {
        for line in [
            "",
            "serve",
            "volume create vm1",
            "volume create ../x --size 4GiB",
            "volume create vm1 --size 4GB",
            "volume create vm1 --size 4GiB --from base",
            "volume create vm --count 1000",
            "volume create vm --from vm1@base --count 0",
            "volume schedule vm1",
            "volume schedule vm1 --every 10ms",
            "volume schedule vm1 --keep 60",
            "volume schedule vm1 --every 10 --keep 60",
            "volume schedule vm1 --every 10ms --keep some",
            "volume schedule vm1 --every 10ms --keep 60 --off",
            "volume limit vm1",
            "volume limit vm1 --burst 2s",
            "volume limit vm1 --off --iops 5",
            "volume limit vm1 --off --burst 2s",
            "volume limit vm1 --bandwidth 100MB",
            "snapshot create vm1 --label 20261120T114000Z",
            "snapshot label vm1 golden",
            "snapshot create vm1 --label a/b",
            "tree --format png",
            "gc --status --stop",
            "format",
            "check /dev/sdb --yes",
        ] {
            let words = std::iter::once("bessel").chain(line.split(' ').filter(|w| !w.is_empty()));
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }
}
