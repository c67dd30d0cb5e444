//! Clones of one snapshot, by the thousand.

use std::time::Duration;

use serde_json::json;

use super::bench::Bench;
use super::{Plan, Row};
use crate::clock::Clock;

pub(super) fn clones(plan: &Plan) -> Result<Vec<Row>, String> {
    let bench = Bench::start(plan)?;
    let snapshot = bench.snapshot()?;
    let id = snapshot["id"].as_str().ok_or_else(|| format!("{snapshot} has no id"))?;
    let body = json!({ "prefix": "clone", "count": plan.clones });
    let clock = Clock::start();
    let made = bench.api.ask("POST", &format!("/v1/snapshots/{id}/clones"), &body)?;
    let took = Duration::from_nanos(clock.now_ns()).as_secs_f64() * 1e3;
    let count = made.as_array().map_or(0, Vec::len);
    let row = Row::new(
        format!("{count} clones of a snapshot, durable and served"),
        format!("{took:.0} ms"),
    )
    .goal("1,000 in < 1 s");
    Ok(vec![row.figures([("count", count as f64), ("milliseconds", took)])])
}
