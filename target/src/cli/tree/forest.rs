//! The forest as lanes: what every drawing of it is made from.
//!
//! A lane is a line of snapshots each of which began as a copy of the one before. A volume's own lane
//! ends in what the volume holds now; what a rollback has left is a lane too, which ends in its last
//! snapshot. Each hangs from the snapshot that it began as a copy of, or stands at the top.

use crate::api::types::{SnapshotView, TreeView, TreeVolume};
use crate::time::parse_rfc3339;
use bessel_reactor::units::ByteCount;
use std::collections::{BTreeMap, BTreeSet};

/// Snapshots in a row that have neither label nor anything hanging from them: from so many on, all but
/// the first and the last are drawn as one.
const FOLD_MIN: usize = 4;

/// A line of snapshots.
pub(super) struct Lane<'a> {
    /// Whose they are.
    pub(super) volume: &'a TreeVolume,
    /// It ends in what the volume holds; else a rollback has left it.
    pub(super) current: bool,
    /// From old to new.
    pub(super) snapshots: Vec<&'a SnapshotView>,
}

/// All lanes, by what they hang from. Those at the top hang from nothing, "".
pub(super) struct Forest<'a> {
    lanes: BTreeMap<&'a str, Vec<Lane<'a>>>,
}

/// What a drawing shows at one place of a lane.
pub(super) enum Stop<'a> {
    Snapshot(&'a SnapshotView),
    /// Snapshots that are not shown one by one.
    Fold(&'a [&'a SnapshotView]),
}

impl<'a> Forest<'a> {
    pub(super) fn new(tree: &'a TreeView) -> Self {
        let snapshots = tree.volumes.iter().flat_map(|volume| &volume.snapshots);
        let known: BTreeSet<&str> = snapshots.map(|snapshot| &*snapshot.id).collect();
        // What hangs from a snapshot that is not in the answer stands on its own, and is not left out.
        let at =
            |parent: Option<&'a str>| parent.filter(|it| known.contains(it)).unwrap_or_default();
        let mut forest = Self { lanes: BTreeMap::new() };
        for volume in &tree.volumes {
            forest.add(volume, &at);
        }
        forest
    }

    fn add(&mut self, volume: &'a TreeVolume, at: &impl Fn(Option<&'a str>) -> &'a str) {
        let own: BTreeMap<&str, &SnapshotView> =
            volume.snapshots.iter().map(|snapshot| (&*snapshot.id, snapshot)).collect();
        let mut drawn = BTreeSet::new();
        // The volume's own lane, then from the newest snapshot on those that are on none yet: each goes
        // back to where it meets one that is.
        let origin = volume.origin.as_deref();
        let heads = volume.snapshots.iter().rev().map(|snapshot| Some(&*snapshot.id));
        for (index, head) in std::iter::once(volume.parent.as_deref()).chain(heads).enumerate() {
            let mut lane = Vec::new();
            let mut next = head;
            while let Some(snapshot) = next.and_then(|id| own.get(id)) {
                if !drawn.insert(&*snapshot.id) {
                    break; // Where it branches off; or a cycle, which only a corrupt store can have.
                }
                lane.push(*snapshot);
                next = snapshot.parent.as_deref();
            }
            let current = index == 0;
            if lane.is_empty() && !current {
                continue;
            }
            lane.reverse();
            // At the origin of the volume nothing of its own is left to hang from.
            let from = next.filter(|id| own.contains_key(id)).or(origin);
            let from = if lane.is_empty() { head.or(origin) } else { from };
            let lane = Lane { volume, current, snapshots: lane };
            self.lanes.entry(at(from)).or_default().push(lane);
        }
    }

    /// What stands at the top.
    pub(super) fn tops(&self) -> &[Lane<'a>] {
        self.from("")
    }

    /// What hangs from a snapshot.
    pub(super) fn from(&self, snapshot: &str) -> &[Lane<'a>] {
        self.lanes.get(snapshot).map_or(&[], |lanes| lanes)
    }

    /// Every lane with what it hangs from, or "".
    pub(super) fn all(&self) -> impl Iterator<Item = (&'a str, &Lane<'a>)> {
        self.lanes.iter().flat_map(|(from, lanes)| lanes.iter().map(|lane| (*from, lane)))
    }

    /// What is shown of a lane, oldest first. With `fold`, runs of snapshots that say nothing by
    /// themselves are one.
    pub(super) fn stops<'s>(&self, lane: &'s Lane<'a>, fold: bool) -> Vec<Stop<'s>> {
        let plain = |it: &SnapshotView| {
            it.label.is_none() && !it.deleted && !it.settling && self.from(&it.id).is_empty()
        };
        let mut stops = Vec::new();
        for run in lane.snapshots.chunk_by(|one, next| plain(one) && plain(next)) {
            match run {
                [first, folded @ .., last] if fold && run.len() >= FOLD_MIN => {
                    stops.push(Stop::Snapshot(first));
                    stops.push(Stop::Fold(folded));
                    stops.push(Stop::Snapshot(last));
                }
                few => stops.extend(few.iter().map(|it| Stop::Snapshot(it))),
            }
        }
        stops
    }
}

/// What a run of snapshots comes to: `9,997 snapshots`, `over 2.8h, every 1s`, `+40MiB`.
pub(super) fn fold_texts(snapshots: &[&SnapshotView]) -> Vec<String> {
    let mut texts = vec![format!("\u{2026} {} snapshots", grouped(snapshots.len()))];
    texts.extend(rhythm(snapshots));
    let allocated = snapshots.iter().map(|snapshot| snapshot.allocated_bytes);
    let allocated = ByteCount::new(allocated.fold(0, u64::saturating_add)).human();
    texts.push(format!("+{allocated}"));
    texts
}

/// Over how much time, and how far apart. None when their times do not say.
fn rhythm(snapshots: &[&SnapshotView]) -> Option<String> {
    let times: Option<Vec<u64>> = snapshots
        .iter()
        .map(|snapshot| parse_rfc3339(&snapshot.time).map(|time| time.as_unix_nanos()))
        .collect();
    let times = times?;
    let over = times.last()?.checked_sub(*times.first()?)?;
    let mut gaps: Vec<u64> = times.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).collect();
    gaps.sort_unstable();
    let at = |tenth: usize| gaps.get(gaps.len() * tenth / 10).copied();
    // Nine tenths of them: a pause or two do not change what the rhythm is.
    let (least, usual, most) = (at(1)?, at(5)?, at(8)?);
    let every = if most < 2 * least.max(1) {
        rough(usual)
    } else {
        format!("{} to {}", rough(least), rough(most))
    };
    Some(format!("over {}, every {every}", rough(over)))
}

/// A span with two digits or so.
fn rough(nanoseconds: u64) -> String {
    const UNITS: [(&str, f64); 6] =
        [("d", 864e11), ("h", 36e11), ("m", 6e10), ("s", 1e9), ("ms", 1e6), ("us", 1e3)];
    let value = nanoseconds as f64;
    // A little below a unit is that unit: 0.999 s is a second.
    let fits = UNITS.iter().find(|(_, unit)| value >= 0.95 * unit);
    let (name, unit) = fits.unwrap_or(&("ns", 1.0));
    let value = value / unit;
    let text = if value < 9.95 { format!("{value:.1}") } else { format!("{value:.0}") };
    format!("{}{name}", text.strip_suffix(".0").unwrap_or(&text))
}

/// `9,997`
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::tests::{after, family, snapshot, volume};
    use super::*;
    use crate::time::rfc3339;
    use bessel_reactor::clock::WallTime;

    fn ids<'a>(lane: &Lane<'a>) -> Vec<&'a str> {
        lane.snapshots.iter().map(|snapshot| &*snapshot.id).collect()
    }

    #[test]
    fn each_lane_hangs_from_what_it_began_as_a_copy_of() {
        let tree = family();
        let forest = Forest::new(&tree);
        let lanes: Vec<_> = forest
            .all()
            .map(|(from, lane)| (from, &*lane.volume.name, lane.current, ids(lane)))
            .collect();
        assert_eq!(
            lanes,
            [
                ("", "vm1", true, vec!["1.0", "1.1"]),
                ("", "vm5", true, vec![]),
                ("1.0", "vm2", true, vec!["2.0"]),
                ("1.0", "vm3", true, vec![]),
                ("2.0", "vm4", true, vec![]),
            ]
        );
    }

    /// Back to 1.1 from 1.3, back to the very first from 1.5, which kept 1.6.
    #[test]
    fn what_rollbacks_have_left_branches_off_where_they_went_back_to() {
        let snapshots = vec![
            snapshot("1.0", None),
            after("1.0", snapshot("1.1", None)),
            after("1.1", snapshot("1.2", None)),
            after("1.2", snapshot("1.3", Some("before-rollback-3"))),
            after("1.1", snapshot("1.4", None)),
            after("1.4", snapshot("1.5", None)),
            after("1.5", snapshot("1.6", Some("before-rollback-6"))),
        ];
        let mut tree = TreeView { volumes: vec![volume(1, None, snapshots)] };
        tree.volumes[0].parent = Some("1.0".to_owned());
        let forest = Forest::new(&tree);
        let lanes: Vec<_> =
            forest.all().map(|(from, lane)| (from, lane.current, ids(lane))).collect();
        assert_eq!(
            lanes,
            [
                ("", true, vec!["1.0"]),
                ("1.0", false, vec!["1.1", "1.4", "1.5", "1.6"]),
                ("1.1", false, vec!["1.2", "1.3"]),
            ]
        );
    }

    #[test]
    fn a_cycle_of_parents_is_drawn_once() {
        let snapshots =
            vec![after("1.1", snapshot("1.0", None)), after("1.0", snapshot("1.1", None))];
        let mut tree = TreeView { volumes: vec![volume(1, None, snapshots)] };
        tree.volumes[0].parent = Some("1.1".to_owned());
        let forest = Forest::new(&tree);
        assert_eq!(forest.all().map(|(_, lane)| lane.snapshots.len()).sum::<usize>(), 2);
    }

    #[test]
    fn a_run_says_how_many_over_what_time_and_how_far_apart() {
        let at = |nanoseconds| rfc3339(WallTime::from_unix_nanos(nanoseconds));
        let run = |gaps: &[u64]| {
            let mut time = 1_700_000_000_000_000_000;
            let mut snapshots = Vec::new();
            for gap in gaps {
                time += gap;
                snapshots.push(SnapshotView { time: at(time), ..snapshot("1.0", None) });
            }
            fold_texts(&snapshots.iter().collect::<Vec<_>>())
        };
        const S: u64 = 1_000_000_000;
        assert_eq!(
            run(&[S; 9997]),
            ["\u{2026} 9,997 snapshots", "over 2.8h, every 1s", "+78.1MiB"].map(str::to_owned)
        );
        assert_eq!(run(&[S + 300_000; 61])[1], "over 1m, every 1s");
        assert_eq!(run(&[[S / 100; 500], [S; 500]].concat())[1], "over 8.4m, every 10ms to 1s");
        assert_eq!((grouped(999), grouped(1_000_000)), ("999".into(), "1,000,000".into()));
    }
}
