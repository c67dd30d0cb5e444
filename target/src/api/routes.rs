//! Every route: which method on which path does what. `openapi.rs` describes the same table.
//!
//! Whatever arrives is checked before the control plane hears of it: names and references by the
//! extractors, bodies by [`parse`], their length by the server.

use super::import::{import_difference, import_volume};
use super::types::{
    CLONES_MAX, ChangeSnapshot, ChangeVolume, CreateClones, CreateSnapshot, CreateVolume, DiffView,
    GcView, JobView, LimitsView, MoveVolume, Rollback, RolledBack, SetSchedule, SnapshotCreated,
    SnapshotDeleted, SnapshotView, SpaceView, StatsView, TreeView, VolumeView,
};
use super::{Refusal, RefusalKind, metrics, openapi};
use crate::control::Control;
use crate::limits::Limits;
use crate::plane::{ExportPlan, Gone, Needed, Step};
use crate::reference::{SnapshotReference, label, volume_name};
use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, FromRequestParts, Path, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, patch, post, put};
use axum::{Json, Router};
use bessel_mapping::request::SnapshotId;
use bessel_mapping::schedule::Schedule;
use bessel_mapping::snapshot_log::PAGE_MAX;
use bessel_reactor::units::ByteCount;
use hyper::body::Frame;
use serde::de::DeserializeOwned;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// Longest request body: the largest request is a name and a label of 64 bytes each.
pub(super) const BODY_BYTES_MAX: usize = 16 << 10;

pub(super) type Answer<T> = Result<Json<T>, Refusal>;

/// Every path with its methods.
fn table() -> Vec<(&'static str, MethodRouter<Control>)> {
    vec![
        ("/v1/volumes", get(list_volumes).post(create_volume)),
        ("/v1/volumes/{name}", get(show_volume).patch(change_volume).delete(delete_volume)),
        ("/v1/volumes/{name}/rollback", post(rollback_volume)),
        ("/v1/volumes/{name}/schedule", put(set_schedule).delete(end_schedule)),
        ("/v1/volumes/{name}/limits", put(set_limits).delete(end_limits)),
        ("/v1/volumes/{name}/home", put(move_volume)),
        ("/v1/volumes/{name}/detach", post(detach_volume)),
        ("/v1/volumes/{name}/attach", post(attach_volume)),
        ("/v1/volumes/{name}/space", get(show_space)),
        ("/v1/volumes/{name}/import", post(import_volume)),
        ("/v1/volumes/{name}/import/{snapshot}", post(import_difference)),
        ("/v1/volumes/{name}/snapshots", get(list_snapshots).post(create_snapshot)),
        ("/v1/snapshots/{snapshot}", patch(change_snapshot).delete(delete_snapshot)),
        ("/v1/snapshots/{snapshot}/clones", post(create_clones)),
        ("/v1/snapshots/{snapshot}/diff/{to}", get(diff_snapshots)),
        ("/v1/snapshots/{snapshot}/export", get(export_snapshot)),
        ("/v1/snapshots/{snapshot}/export/{to}", get(export_difference)),
        ("/v1/gc", get(show_gc).post(collect).delete(end_collection)),
        ("/v1/tree", get(show_tree)),
        ("/v1/jobs", get(show_jobs)),
        ("/v1/stats", get(show_stats)),
        ("/metrics", get(show_metrics)),
        ("/openapi.json", get(show_openapi)),
    ]
}

/// A route that reads its body itself, as it comes.
pub(super) fn takes_a_stream(path: &str) -> bool {
    let mut segments = path.split('/').skip(1);
    let [version, noun, _, verb] = std::array::from_fn(|_| segments.next().unwrap_or_default());
    (version, noun, verb) == ("v1", "volumes", "import")
}

/// What the Unix socket serves.
pub(super) fn router(control: Control) -> Router {
    build(control, |_| true)
}

/// What the TCP listener serves: nothing that changes anything or names a path on this machine.
pub(super) fn metrics_router(control: Control) -> Router {
    build(control, |path| matches!(path, "/metrics" | "/openapi.json"))
}

fn build(control: Control, wanted: impl Fn(&str) -> bool) -> Router {
    let mut router = Router::new();
    for (path, methods) in table() {
        if wanted(path) {
            router = router.route(path, methods);
        }
    }
    router
        .fallback(|| async { Refusal::not_found("no such path; GET /openapi.json lists them") })
        .method_not_allowed_fallback(|| async {
            let message = "this path has other methods; GET /openapi.json lists them";
            Refusal::new(RefusalKind::Method, message)
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(control)
}

/// The `{name}` of a path, checked.
pub(super) struct VolumeName(pub(super) String);

impl VolumeName {
    pub(super) fn check(text: &str) -> Result<Self, Refusal> {
        volume_name(text).map(Self).map_err(Refusal::malformed)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for VolumeName {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let Path(text) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|rejection| Refusal::malformed(rejection.body_text()))?;
        Self::check(&text)
    }
}

/// The `{snapshot}` of a path, checked.
pub(super) struct SnapshotName(pub(super) SnapshotReference);

impl SnapshotName {
    pub(super) fn check(text: &str) -> Result<Self, Refusal> {
        text.parse().map(Self).map_err(Refusal::malformed)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for SnapshotName {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let Path(text) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|rejection| Refusal::malformed(rejection.body_text()))?;
        Self::check(&text)
    }
}

/// The `{snapshot}` and the `{to}` of a path, checked.
struct TwoSnapshots(SnapshotReference, SnapshotReference);

impl<S: Send + Sync> FromRequestParts<S> for TwoSnapshots {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let Path((from, to)) = Path::<(String, String)>::from_request_parts(parts, state)
            .await
            .map_err(|rejection| Refusal::malformed(rejection.body_text()))?;
        let parse = |text: String| text.parse().map_err(Refusal::malformed);
        Ok(Self(parse(from)?, parse(to)?))
    }
}

/// A body as the request it should be.
fn parse<T: DeserializeOwned>(body: Result<Bytes, BytesRejection>) -> Result<T, Refusal> {
    let body = body.map_err(|_| Refusal::body_too_large(BODY_BYTES_MAX))?;
    serde_json::from_slice(&body).map_err(|error| {
        Refusal::malformed(format!(
            "the body is not the JSON it should be: {error}; see /openapi.json"
        ))
    })
}

async fn list_volumes(State(control): State<Control>) -> Answer<Vec<VolumeView>> {
    control.call(|plane| plane.list_volumes()).await.map(Json)
}

async fn create_volume(
    State(control): State<Control>,
    body: Result<Bytes, BytesRejection>,
) -> Answer<VolumeView> {
    let request: CreateVolume = parse(body)?;
    let name = volume_name(&request.name).map_err(Refusal::malformed)?;
    let size = request.size_bytes.map(ByteCount::new);
    let from: Option<SnapshotReference> =
        request.from.map(|text| text.parse()).transpose().map_err(Refusal::malformed)?;
    if let Some(from) = &from {
        read_for(&control, from).await?;
    }
    control.call(move |plane| plane.create_volume(&name, size, from.as_ref())).await.map(Json)
}

async fn show_volume(
    State(control): State<Control>,
    VolumeName(name): VolumeName,
) -> Answer<VolumeView> {
    control.call(move |plane| plane.show_volume(&name)).await.map(Json)
}

async fn change_volume(
    State(control): State<Control>,
    VolumeName(name): VolumeName,
    body: Result<Bytes, BytesRejection>,
) -> Answer<VolumeView> {
    let request: ChangeVolume = parse(body)?;
    match (request.name, request.size_bytes) {
        (Some(new_name), None) => {
            let new_name = volume_name(&new_name).map_err(Refusal::malformed)?;
            control.call(move |plane| plane.rename_volume(&name, &new_name)).await.map(Json)
        }
        (None, Some(size)) => {
            let size = ByteCount::new(size);
            control.call(move |plane| plane.resize_volume(&name, size)).await.map(Json)
        }
        _ => Err(Refusal::malformed("one change at a time; give either name or size_bytes")),
    }
}

async fn delete_volume(
    State(control): State<Control>,
    VolumeName(name): VolumeName,
) -> Answer<VolumeView> {
    control.call(move |plane| plane.delete_volume(&name)).await.map(Json)
}

async fn rollback_volume(
    State(control): State<Control>,
    VolumeName(name): VolumeName,
    body: Result<Bytes, BytesRejection>,
) -> Answer<RolledBack> {
    let request: Rollback = parse(body)?;
    let snapshot: SnapshotReference = request.snapshot.parse().map_err(Refusal::malformed)?;
    let kept = request.label.as_deref().map(label).transpose().map_err(Refusal::malformed)?;
    let force = request.force;
    // What is kept gets a label, which must be free.
    read_logs(&control, Needed::Volume(name.clone())).await?;
    read_for(&control, &snapshot).await?;
    control.call(move |plane| plane.rollback_volume(&name, &snapshot, kept, force)).await.map(Json)
}

async fn set_schedule(
    State(control): State<Control>,
    VolumeName(name): VolumeName,
    body: Result<Bytes, BytesRejection>,
) -> Answer<VolumeView> {
    let SetSchedule { every_ns, keep } = parse(body)?;
    let keep = keep.keep().ok_or_else(|| {
        Refusal::malformed("keep says both newest and ages; give one of them, or none to keep all")
    })?;
    let schedule = Schedule { every: Duration::from_nanos(every_ns), keep };
    schedule.check().map_err(Refusal::malformed)?;
    control.call(move |plane| plane.set_schedule(&name, Some(schedule))).await.map(Json)
}

async fn end_schedule(
    State(control): State<Control>,
    VolumeName(name): VolumeName,
) -> Answer<VolumeView> {
    control.call(move |plane| plane.set_schedule(&name, None)).await.map(Json)
}

async fn set_limits(
    State(control): State<Control>,
    VolumeName(name): VolumeName,
    body: Result<Bytes, BytesRejection>,
) -> Answer<VolumeView> {
    let LimitsView { iops, bytes_per_second, burst_ns } = parse(body)?;
    let bandwidth = bytes_per_second.map(ByteCount::new);
    let limits = Limits { iops, bandwidth, burst: Duration::from_nanos(burst_ns) };
    control.call(move |plane| plane.set_limits(&name, Some(limits))).await.map(Json)
}

async fn end_limits(
    State(control): State<Control>,
    VolumeName(name): VolumeName,
) -> Answer<VolumeView> {
    control.call(move |plane| plane.set_limits(&name, None)).await.map(Json)
}

async fn move_volume(
    State(control): State<Control>,
    VolumeName(name): VolumeName,
    body: Result<Bytes, BytesRejection>,
) -> Answer<VolumeView> {
    let MoveVolume { core } = parse(body)?;
    control.call(move |plane| plane.move_volume(&name, core)).await.map(Json)
}

async fn detach_volume(
    State(control): State<Control>,
    VolumeName(name): VolumeName,
) -> Answer<VolumeView> {
    control.call(move |plane| plane.detach_volume(&name)).await.map(Json)
}

async fn attach_volume(
    State(control): State<Control>,
    VolumeName(name): VolumeName,
) -> Answer<VolumeView> {
    control.call(move |plane| plane.attach_volume(&name)).await.map(Json)
}

async fn list_snapshots(
    State(control): State<Control>,
    VolumeName(name): VolumeName,
    Page { limit, after }: Page,
) -> Answer<Vec<SnapshotView>> {
    read_logs(&control, Needed::Volume(name.clone())).await?;
    let mut from = match after {
        None => Some(0),
        Some(after) => {
            let of = name.clone();
            control.call(move |plane| plane.check_is_of(&of, after)).await?;
            after.sequence.checked_add(1)
        }
    };
    let mut found: Vec<SnapshotView> = Vec::new();
    while let Some(at) = from.filter(|_| found.len() < limit) {
        let (name, left) = (name.clone(), limit - found.len());
        let (more, next) = control.call(move |plane| plane.list_snapshots(&name, at, left)).await?;
        found.extend(more);
        from = next;
    }
    Ok(Json(found))
}

/// The part of a list that is asked for.
struct Page {
    limit: usize,
    after: Option<SnapshotId>,
}

impl<S: Send + Sync> FromRequestParts<S> for Page {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        page(parts.uri.query().unwrap_or_default()).map_err(Refusal::malformed)
    }
}

fn page(query: &str) -> Result<Page, String> {
    let mut page = Page { limit: PAGE_MAX, after: None };
    for part in query.split('&').filter(|part| !part.is_empty()) {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        match key {
            "limit" => {
                let limit = value.parse().ok().filter(|limit| (1..=PAGE_MAX).contains(limit));
                page.limit =
                    limit.ok_or(format!("limit={value} will not do; give 1 to {PAGE_MAX}"))?;
            }
            "after" => {
                let after = value.parse().map_err(|()| {
                    format!(
                        "after={value} is no snapshot; give the id of the last one, such as 3.17"
                    )
                })?;
                page.after = Some(after);
            }
            _ => return Err(format!("there is no {key:?} here; give limit, after, or nothing")),
        }
    }
    Ok(page)
}

/// How often it is looked whether a log has been read, and how often in vain before it counts as stuck.
const LOG_LOOK: Duration = Duration::from_millis(5);
const LOG_LOOKS_MAX: u32 = 12_000;
/// How often a walk of trees that change is begun anew.
const SPACE_TRIES: u32 = 5;

/// Waits until the logs that somebody needs have been read: here, so that the control plane does not.
async fn read_logs(control: &Control, needed: Needed) -> Result<(), Refusal> {
    let (mut least, mut looks) = (u64::MAX, 0);
    loop {
        let of = needed.clone();
        let left = control.call(move |plane| plane.unread(&of)).await?;
        if left == 0 {
            return Ok(());
        }
        looks = if left < least { 0 } else { looks + 1 };
        least = least.min(left);
        if looks == LOG_LOOKS_MAX {
            return Err(Refusal::failed(format!(
                "{left} snapshots have not been read from their log for a minute; look at the device"
            )));
        }
        tokio::time::sleep(LOG_LOOK).await;
    }
}

/// The same for what a snapshot is found by.
async fn read_for(control: &Control, snapshot: &SnapshotReference) -> Result<(), Refusal> {
    read_logs(control, Needed::Snapshot(snapshot.clone())).await
}

async fn create_snapshot(
    State(control): State<Control>,
    VolumeName(name): VolumeName,
    body: Result<Bytes, BytesRejection>,
) -> Answer<SnapshotCreated> {
    let request: CreateSnapshot = parse(body)?;
    let label = request.label.as_deref().map(label).transpose().map_err(Refusal::malformed)?;
    if label.is_some() {
        read_logs(&control, Needed::Volume(name.clone())).await?;
    }
    control.call(move |plane| plane.create_snapshot(&name, label)).await.map(Json)
}

async fn change_snapshot(
    State(control): State<Control>,
    SnapshotName(snapshot): SnapshotName,
    body: Result<Bytes, BytesRejection>,
) -> Answer<SnapshotView> {
    let request: ChangeSnapshot = parse(body)?;
    let label = request.label.as_deref().map(label).transpose().map_err(Refusal::malformed)?;
    read_logs(&control, Needed::VolumeOf(snapshot.clone())).await?;
    control.call(move |plane| plane.label_snapshot(&snapshot, label)).await.map(Json)
}

async fn delete_snapshot(
    State(control): State<Control>,
    SnapshotName(snapshot): SnapshotName,
) -> Answer<SnapshotDeleted> {
    read_for(&control, &snapshot).await?;
    control.call(move |plane| plane.delete_snapshot(&snapshot)).await.map(Json)
}

async fn create_clones(
    State(control): State<Control>,
    SnapshotName(snapshot): SnapshotName,
    body: Result<Bytes, BytesRejection>,
) -> Answer<Vec<VolumeView>> {
    let CreateClones { prefix, count } = parse(body)?;
    if !(1..=CLONES_MAX).contains(&count) {
        let what = format!("{count} clones at once will not do; give 1 to {CLONES_MAX}");
        return Err(Refusal::malformed(what));
    }
    // The longest of the names stands for all.
    volume_name(&format!("{prefix}-{count}")).map_err(Refusal::malformed)?;
    read_for(&control, &snapshot).await?;
    control.call(move |plane| plane.create_clones(&snapshot, &prefix, count)).await.map(Json)
}

async fn diff_snapshots(
    State(control): State<Control>,
    TwoSnapshots(from, to): TwoSnapshots,
) -> Answer<DiffView> {
    read_for(&control, &from).await?;
    read_for(&control, &to).await?;
    let plan = control.call(move |plane| plane.plan_diff(&from, &to)).await?;
    on_a_thread("bessel-diff", move || plan.run()).await.map(Json)
}

async fn show_space(
    State(control): State<Control>,
    VolumeName(name): VolumeName,
) -> Answer<SpaceView> {
    read_logs(&control, Needed::Volume(name.clone())).await?;
    let mut tries = 0;
    loop {
        let plan = loop {
            let name = name.clone();
            match control.call(move |plane| plane.plan_space(&name)).await? {
                Ok(plan) => break plan,
                Err(Step::Later) => tokio::time::sleep(LOG_LOOK).await,
                Err(Step::More | Step::Done) => {}
            }
        };
        match on_a_thread("bessel-space", move || plan.run()).await {
            Err(refusal) if refusal.kind == RefusalKind::Damaged && tries < SPACE_TRIES => {
                tries += 1
            }
            answer => return answer.map(Json),
        }
    }
}

async fn export_snapshot(
    State(control): State<Control>,
    SnapshotName(snapshot): SnapshotName,
) -> Result<Response, Refusal> {
    read_for(&control, &snapshot).await?;
    let plan = control.call(move |plane| plane.plan_export(&snapshot, None)).await?;
    stream_out(plan)
}

async fn export_difference(
    State(control): State<Control>,
    TwoSnapshots(base, snapshot): TwoSnapshots,
) -> Result<Response, Refusal> {
    read_for(&control, &base).await?;
    read_for(&control, &snapshot).await?;
    let plan = control.call(move |plane| plane.plan_export(&snapshot, Some(&base))).await?;
    stream_out(plan)
}

/// Sends what a thread reads, as it comes. The thread ends when nobody takes it any more.
fn stream_out(plan: ExportPlan) -> Result<Response, Refusal> {
    let (sender, pieces) = mpsc::channel(PIECES_IN_FLIGHT);
    let read = move || {
        let send = |bytes: Vec<u8>| sender.blocking_send(bytes).map_err(|_| Gone);
        if let Err(refusal) = plan.run(send) {
            tracing::error!("an export has broken off: {refusal}");
        }
    };
    let spawned = std::thread::Builder::new().name("bessel-export".to_owned()).spawn(read);
    spawned.map_err(|error| Refusal::failed(format!("cannot start a thread: {error}")))?;
    let headers = [(CONTENT_TYPE, "application/octet-stream")];
    Ok((headers, Body::new(Pieces(pieces))).into_response())
}

/// Pieces of an export that have been read and not sent: of a MiB each.
const PIECES_IN_FLIGHT: usize = 4;

/// A body that is made while it is sent.
struct Pieces(mpsc::Receiver<Vec<u8>>);

impl hyper::body::Body for Pieces {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.0.poll_recv(context).map(|piece| piece.map(|bytes| Ok(Frame::data(bytes.into()))))
    }
}

/// Runs long work where nobody waits for it but its asker. It ends with the process at the latest.
async fn on_a_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    let (answer, answered) = oneshot::channel();
    let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // The asker may have hung up.
        let _ = answer.send(work());
    });
    spawned.map_err(|error| Refusal::failed(format!("cannot start a thread: {error}")))?;
    answered.await.unwrap_or_else(|_| Err(Refusal::failed("the walk ended early; see the log")))
}

async fn show_gc(State(control): State<Control>) -> Answer<GcView> {
    control.call(|plane| plane.gc()).await.map(Json)
}

async fn collect(State(control): State<Control>) -> Answer<GcView> {
    let asked_by = control.clone();
    control.call(move |plane| plane.collect(asked_by)).await.map(Json)
}

async fn end_collection(State(control): State<Control>) -> Answer<GcView> {
    control.call(|plane| plane.end_collection()).await.map(Json)
}

async fn show_tree(State(control): State<Control>) -> Answer<TreeView> {
    read_logs(&control, Needed::All).await?;
    let mut volumes = Vec::new();
    for branch in control.call(|plane| plane.branches()).await? {
        let (mut branch, mut more) = (branch, true);
        while more {
            (branch, more) = control.call(move |plane| Ok(plane.grow(branch))).await?;
        }
        volumes.push(branch.finish());
    }
    Ok(Json(TreeView { volumes }))
}

async fn show_jobs(State(control): State<Control>) -> Answer<Vec<JobView>> {
    control.call(|plane| Ok(plane.jobs())).await.map(Json)
}

async fn show_stats(State(control): State<Control>) -> Answer<StatsView> {
    control.call(|plane| plane.stats()).await.map(Json)
}

async fn show_metrics(State(control): State<Control>) -> Result<impl IntoResponse, Refusal> {
    let stats = control.call(|plane| plane.stats()).await?;
    Ok(([(CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics::prometheus(&stats)))
}

async fn show_openapi() -> Json<serde_json::Value> {
    Json(openapi::document())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_what_the_query_says_and_nothing_else() {
        let parse =
            |query| page(query).map(|page| (page.limit, page.after.map(|id| id.to_string())));
        assert_eq!(parse(""), Ok((PAGE_MAX, None)));
        assert_eq!(parse("limit=7&after=3.17"), Ok((7, Some("3.17".to_owned()))));
        for bad in
            ["limit=0", "limit=1025", "limit=", "limit=-1", "after=3", "after=", "page=2", "limit"]
        {
            assert!(page(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_description_lists_every_route_and_no_other() {
        let document = openapi::document();
        let described = document["paths"].as_object().unwrap();
        let mut described: Vec<(String, String)> = described
            .iter()
            .flat_map(|(path, methods)| {
                let methods = methods.as_object().unwrap().keys();
                methods.map(|method| (path.clone(), method.to_uppercase()))
            })
            .collect();
        let mut served: Vec<(String, String)> = Vec::new();
        for (path, methods) in table() {
            // `MethodRouter` shows its methods in its debug text only.
            let shown = format!("{methods:?}");
            for method in ["get", "post", "patch", "delete", "put"] {
                if !shown.contains(&format!("{method}: None")) {
                    served.push((path.to_owned(), method.to_uppercase()));
                }
            }
        }
        described.sort();
        served.sort();
        assert_eq!(described, served);
    }
}
