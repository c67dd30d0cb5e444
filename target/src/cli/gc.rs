//! `bessel gc`: collects garbage, and says what came of it.

use super::client::Client;
use super::output::{Progress, duration, print, print_either};
use super::{ApiArgs, Outcome};
use crate::api::types::{GcOutcome, GcPhase, GcReport, GcView};
use bessel_reactor::units::ByteCount;
use clap::Args;
use serde_json::json;
use std::time::Duration;

/// How often the daemon is asked how far it is.
const LOOK: Duration = Duration::from_millis(50);

/// `bessel gc`
#[derive(Args, Debug)]
pub(crate) struct GcArgs {
    /// Show how far the collection is that is running, and what the last one came to
    #[arg(long, conflicts_with = "stop")]
    status: bool,
    /// End the collection that is running; what it has freed stays free
    #[arg(long)]
    stop: bool,
    #[command(flatten)]
    api: ApiArgs,
}

/// Runs `bessel gc`.
pub(crate) fn run(arguments: &GcArgs) -> Outcome {
    let (client, json) = (arguments.api.client(), arguments.api.json);
    if arguments.status {
        let view: GcView = client.get("/v1/gc")?;
        return print_either(json, &view, status);
    }
    if arguments.stop {
        let view: GcView = client.delete("/v1/gc")?;
        return print_either(json, &view, |_| "the collection is being ended".to_owned());
    }
    let begun: GcView = client.post("/v1/gc", &json!({}))?;
    let report = watch(&client, begun.ended, json)?;
    if json {
        print_either(true, &report, text)?;
    } else if report.outcome == GcOutcome::Done {
        print(&text(&report))?;
    }
    match report.reason {
        None => Ok(()),
        Some(reason) => Err(format!("the collection has ended early: {reason}").into()),
    }
}

/// Waits until one more than `ended` collections have ended, and shows how far it is.
fn watch(client: &Client, ended: u64, quiet: bool) -> Result<GcReport, Box<dyn std::error::Error>> {
    let bar = Progress::new("collecting", quiet);
    loop {
        let view: GcView = client.get("/v1/gc")?;
        if view.ended > ended
            && let Some(report) = view.last
        {
            return Ok(report);
        }
        let (done, total) = done(&view);
        bar.set(done, total);
        std::thread::sleep(LOOK);
    }
}

/// How much is done of what is known: reading nodes is nine tenths of it, freeing the last.
fn done(view: &GcView) -> (u64, u64) {
    let share = |done: u64, all: u64| done.saturating_mul(900).checked_div(all).unwrap_or(0);
    match view.phase {
        None | Some(GcPhase::Checkpoint) => (0, 1000),
        Some(GcPhase::Mark) => (share(view.nodes_read, view.nodes_found), 1000),
        Some(GcPhase::Sweep) => (900 + share(view.freed_bytes, view.garbage_bytes) / 9, 1000),
    }
}

fn status(view: &GcView) -> String {
    let mut text = match (view.running, view.phase) {
        (false, _) => "no collection is running\n".to_owned(),
        (true, None) => "a collection waits until what was deleted before is freed\n".to_owned(),
        (true, Some(phase)) => {
            let phase = match phase {
                GcPhase::Checkpoint => "looking where trees begin",
                GcPhase::Mark => "reading nodes",
                GcPhase::Sweep => "freeing",
            };
            let freed = ByteCount::new(view.freed_bytes).human();
            format!(
                "running: {phase}; {} of {} nodes read that are known, {freed} freed\n",
                view.nodes_read, view.nodes_found
            )
        }
    };
    match &view.last {
        None => text.push_str("none has ended since the daemon started\n"),
        Some(report) => {
            text.push_str(&format!("the last one, begun {}: ", report.started));
            match &report.reason {
                None => text.push_str(&self::text(report)),
                Some(reason) => text.push_str(&format!("ended early: {reason}\n")),
            }
        }
    }
    text
}

fn text(report: &GcReport) -> String {
    let bytes = |count: u64| ByteCount::new(count).human();
    let freed = report.freed_data_bytes + report.freed_metadata_bytes;
    let mut text = format!(
        "{} freed ({} of data, {} of metadata) in {}; {} in use, {} nodes read\n",
        bytes(freed),
        bytes(report.freed_data_bytes),
        bytes(report.freed_metadata_bytes),
        duration(report.duration_ns),
        bytes(report.reachable_bytes),
        report.nodes_read,
    );
    if report.volumes_reclaimed > 0 {
        let count = report.volumes_reclaimed;
        text.push_str(&format!("{count} deleted volumes are gone; there is room for as many\n"));
    }
    if report.bitmaps_damaged > 0 {
        let count = report.bitmaps_damaged;
        text.push_str(&format!(
            "{count} bitmap blocks are damaged, and nothing is freed there; stop the daemon and run \
             `bessel check --repair`\n"
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_grows_from_phase_to_phase() {
        let view = |phase, nodes_read, freed_bytes| GcView {
            phase: Some(phase),
            nodes_read,
            nodes_found: 100,
            garbage_bytes: 4096,
            freed_bytes,
            ..GcView::default()
        };
        assert_eq!(done(&GcView::default()), (0, 1000));
        assert_eq!(done(&view(GcPhase::Checkpoint, 0, 0)), (0, 1000));
        assert_eq!(done(&view(GcPhase::Mark, 50, 0)), (450, 1000));
        assert_eq!(done(&view(GcPhase::Sweep, 100, 2048)), (950, 1000));
        assert_eq!(done(&view(GcPhase::Sweep, 100, 4096)), (1000, 1000));
    }
}
