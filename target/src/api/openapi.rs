//! The OpenAPI 3.1 description, written by hand beside the types it describes.
//!
//! Tests hold it to the routes (none missing, none invented) and to the JSON that the types make.

use bessel_mapping::snapshot_log::PAGE_MAX;
use serde_json::{Map, Value, json};

/// The whole document.
pub(super) fn document() -> Value {
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Bessel",
            "version": env!("CARGO_PKG_VERSION"),
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
            "description": "Thin copy-on-write volumes for virtual machines. \
                Every refusal is a JSON object with one line in `error`: what is wrong and what to do.",
        },
        "paths": paths(),
        "components": { "schemas": schemas() },
    })
}

const VOLUME: &str = "name";
const SNAPSHOT: &str = "snapshot";
const TO: &str = "to";

fn paths() -> Value {
    json!({
        "/v1/volumes": {
            "get": operation("List the volumes", &[], None, array("Volume")),
            "post": operation("Create a volume, empty or as a clone", &[], Some("CreateVolume"), reference("Volume")),
        },
        "/v1/volumes/{name}": {
            "get": operation("Show a volume", &[VOLUME], None, reference("Volume")),
            "patch": operation("Rename or enlarge a volume", &[VOLUME], Some("ChangeVolume"), reference("Volume")),
            "delete": operation("Delete a volume that no front-end is connected to", &[VOLUME], None, reference("Volume")),
        },
        "/v1/volumes/{name}/rollback": {
            "post": operation("Make a volume read as one of its snapshots does", &[VOLUME], Some("Rollback"), reference("RolledBack")),
        },
        "/v1/volumes/{name}/schedule": {
            "put": operation("Take snapshots of a volume by schedule, until the daemon ends", &[VOLUME], Some("SetSchedule"), reference("Volume")),
            "delete": operation("Take no more snapshots of a volume by schedule", &[VOLUME], None, reference("Volume")),
        },
        "/v1/volumes/{name}/limits": {
            "put": operation("Hold a volume's guest to limits, until the daemon ends", &[VOLUME], Some("Limits"), reference("Volume")),
            "delete": operation("Hold a volume's guest to no limits", &[VOLUME], None, reference("Volume")),
        },
        "/v1/volumes/{name}/home": {
            "put": operation("Move a volume to the reactor on a core while its guest goes on", &[VOLUME], Some("MoveVolume"), reference("Volume")),
        },
        "/v1/volumes/{name}/detach": {
            "post": operation("Stop serving a volume until it is attached or the daemon starts again", &[VOLUME], None, reference("Volume")),
        },
        "/v1/volumes/{name}/attach": {
            "post": operation("Read a volume anew from the device and serve it", &[VOLUME], None, reference("Volume")),
        },
        "/v1/volumes/{name}/space": {
            "get": operation("What a volume and its snapshots take, alone and shared", &[VOLUME], None, reference("Space")),
        },
        "/v1/volumes/{name}/import": {
            "post": import("Make a volume of a stream: whole and durable, or not at all", &[VOLUME]),
        },
        "/v1/volumes/{name}/import/{snapshot}": {
            "post": import("Make a clone of a snapshot with a difference to it applied", &[VOLUME, SNAPSHOT]),
        },
        "/v1/volumes/{name}/snapshots": {
            "get": list("List a page of a volume's snapshots, oldest first; it has fewer than `limit` only when there are no more", &[VOLUME], array("Snapshot")),
            "post": operation("Take a snapshot; answered when it is durable", &[VOLUME], Some("CreateSnapshot"), reference("SnapshotCreated")),
        },
        "/v1/snapshots/{snapshot}": {
            "patch": operation("Label a snapshot", &[SNAPSHOT], Some("ChangeSnapshot"), reference("Snapshot")),
            "delete": operation("Delete a snapshot; what it alone held is freed soon after", &[SNAPSHOT], None, reference("SnapshotDeleted")),
        },
        "/v1/snapshots/{snapshot}/clones": {
            "post": operation("Make many clones of a snapshot at once", &[SNAPSHOT], Some("CreateClones"), array("Volume")),
        },
                    "/v1/snapshots/{snapshot}/diff/{to}": {
            "get": operation("Where two snapshots of one forest differ", &[SNAPSHOT, TO], None, reference("Diff")),
        },
        "/v1/snapshots/{snapshot}/export": {
            "get": export("Read out a snapshot", &[SNAPSHOT]),
        },
        "/v1/snapshots/{snapshot}/export/{to}": {
            "get": export("Read out the difference between two snapshots of one forest", &[SNAPSHOT, TO]),
        },
        "/v1/gc": {
            "get": operation("The collection of garbage under way, and the last one", &[], None, reference("Gc")),
            "post": operation("Begin a collection of garbage", &[], None, reference("Gc")),
            "delete": operation("End the collection under way; what it has freed stays free", &[], None, reference("Gc")),
        },
        "/v1/tree": {
            "get": operation("Volumes and snapshots by descent", &[], None, reference("Tree")),
        },
        "/v1/jobs": {
            "get": operation("Long work that is under way, and how far it has come", &[], None, array("Job")),
        },
        "/v1/stats": {
            "get": operation("Counters since the start, and space", &[], None, reference("Stats")),
        },
        "/metrics": {
            "get": {
                "summary": "The counters as Prometheus text",
                "responses": {
                    "200": {
                        "description": "Metrics",
                        "content": { "text/plain": { "schema": { "type": "string" } } },
                    },
                    "default": refusal(),
                },
            },
        },
        "/openapi.json": {
            "get": operation("This description", &[], None, json!({ "type": "object" })),
        },
    })
}

fn operation(summary: &str, parameters: &[&str], request: Option<&str>, answer: Value) -> Value {
    let mut operation = json!({
        "summary": summary,
        "responses": {
            "200": {
                "description": "Done",
                "content": { "application/json": { "schema": answer } },
            },
            "default": refusal(),
        },
    });
    if !parameters.is_empty() {
        operation["parameters"] = parameters.iter().copied().map(parameter).collect();
    }
    if let Some(request) = request {
        operation["requestBody"] = json!({
            "required": true,
            "content": { "application/json": { "schema": reference(request) } },
        });
    }
    operation
}

/// An operation whose answer is a page of a list.
fn list(summary: &str, parameters: &[&str], answer: Value) -> Value {
    let mut operation = operation(summary, parameters, None, answer);
    let page = [
        json!({
            "name": "limit",
            "in": "query",
            "required": false,
            "description": "How many",
            "schema": { "type": "integer", "minimum": 1, "maximum": PAGE_MAX, "default": PAGE_MAX },
        }),
        json!({
            "name": "after",
            "in": "query",
            "required": false,
            "description": "Those after this one, by its id: the last of the page before",
            "schema": { "type": "string" },
        }),
    ];
    let parameters = operation["parameters"].as_array_mut();
    parameters.expect("a list has a path").extend(page);
    operation
}

/// An operation whose answer is a stream of bytes.
fn export(summary: &str, parameters: &[&str]) -> Value {
    let mut operation = operation(summary, parameters, None, json!({}));
    operation["responses"]["200"] = json!({
        "description": "As docs/stream.md has it",
        "content": {
            "application/octet-stream": { "schema": { "type": "string", "format": "binary" } },
        },
    });
    operation
}

/// An operation that takes a stream of bytes.
fn import(summary: &str, parameters: &[&str]) -> Value {
    let mut operation = operation(summary, parameters, None, reference("Imported"));
    operation["requestBody"] = json!({
        "description": "As docs/stream.md has it",
        "required": true,
        "content": {
            "application/octet-stream": { "schema": { "type": "string", "format": "binary" } },
        },
    });
    operation
}

fn parameter(name: &str) -> Value {
    let description = match name {
        SNAPSHOT | TO => {
            "An id such as 3.17, volume@label, or volume@time: RFC 3339 or an age such as 10s ago"
        }
        _ => "The volume's name",
    };
    json!({
        "name": name,
        "in": "path",
        "required": true,
        "description": description,
        "schema": { "type": "string" },
    })
}

fn refusal() -> Value {
    json!({
        "description": "Refused: 400 malformed, 404 no such thing, 405 no such method, 409 not in \
            this state, 413 too long, 500 failed, 503 stopping, 507 store full",
        "content": { "application/json": { "schema": reference("Error") } },
    })
}

fn reference(schema: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{schema}") })
}

fn array(schema: &str) -> Value {
    json!({ "type": "array", "items": reference(schema) })
}

/// An object: each field with its type. `name?` may be left out; a `type?` may be null; `[]` is an
/// array of a schema; what is no basic type is a schema.
fn object(fields: &[(&str, &str)]) -> Value {
    let mut properties = Map::new();
    let mut required = Vec::new();
    for (name, kind) in fields {
        let key = name.trim_end_matches('?');
        if key == *name {
            required.push(Value::from(key));
        }
        properties.insert(key.to_owned(), field(kind));
    }
    json!({ "type": "object", "properties": properties, "required": required })
}

fn field(kind: &str) -> Value {
    if let Some(element) = kind.strip_suffix("[]") {
        return json!({ "type": "array", "items": field(element) });
    }
    if let Some(kind) = kind.strip_suffix('?') {
        return match kind {
            "integer" | "string" | "boolean" => json!({ "type": [kind, "null"] }),
            kind => json!({ "anyOf": [field(kind), { "type": "null" }] }),
        };
    }
    match kind {
        "cache" => json!({ "type": "string", "enum": ["writeback", "writethrough"] }),
        "state" => {
            let states = ["online", "failed", "detached", "unavailable", "importing"];
            json!({ "type": "string", "enum": states })
        }
        "job" => json!({ "type": "string", "enum": ["export", "import"] }),
        "range" => json!({ "type": "string", "enum": ["data", "hole"] }),
        "integer" => json!({ "type": "integer", "minimum": 0 }),
        "string" | "boolean" => json!({ "type": kind }),
        schema => reference(schema),
    }
}

const SNAPSHOT_FIELDS: &[(&str, &str)] = &[
    ("id", "string"),
    ("volume", "string"),
    ("label", "string?"),
    ("time", "string"),
    ("size_bytes", "integer"),
    ("allocated_bytes", "integer"),
    ("settling", "boolean"),
    ("deleted", "boolean"),
    ("parent", "string?"),
];

const VOLUME_FIELDS: &[(&str, &str)] = &[
    ("id", "integer"),
    ("name", "string"),
    ("size_bytes", "integer"),
    ("cache", "cache"),
    ("queues", "integer"),
    ("socket", "string"),
    ("reactor", "integer"),
    ("core", "integer"),
    ("queue_cores", "integer[]"),
    ("connected", "boolean"),
    ("origin", "string?"),
    ("created", "string"),
    ("state", "state"),
    ("reason", "string?"),
    ("remedy", "string?"),
    ("allocated_bytes", "integer"),
    ("snapshots", "integer"),
    ("snapshots_unread", "integer"),
    ("snapshots_fault", "string?"),
    ("schedule", "Schedule?"),
    ("limits", "Limits?"),
];

const SPACE_FIELDS: &[(&str, &str)] =
    &[("refers_bytes", "integer"), ("alone_bytes", "integer"), ("shared_bytes", "integer")];

fn schemas() -> Value {
    let rolled_back: Vec<_> = VOLUME_FIELDS
        .iter()
        .copied()
        .chain([("snapshot", "Snapshot"), ("kept", "Snapshot")])
        .collect();
    let imported: Vec<_> =
        VOLUME_FIELDS.iter().copied().chain([("data_bytes", "integer")]).collect();
    let created: Vec<_> =
        SNAPSHOT_FIELDS.iter().copied().chain([("latency_ns", "integer")]).collect();
    let deleted: Vec<_> = SNAPSHOT_FIELDS
        .iter()
        .copied()
        .chain([("clones", "string[]"), ("left_to_collector", "string?")])
        .collect();
    let snapshot_space: Vec<_> =
        [("id", "string")].into_iter().chain(SPACE_FIELDS.iter().copied()).collect();
    json!({
        "Error": object(&[("error", "string")]),
        "CreateVolume": object(&[("name", "string"), ("size_bytes?", "integer"), ("from?", "string")]),
        "CreateClones": object(&[("prefix", "string"), ("count", "integer")]),
        "ChangeVolume": object(&[("name?", "string"), ("size_bytes?", "integer")]),
        "Rollback": object(&[("snapshot", "string"), ("label?", "string"), ("force?", "boolean")]),
        "SetSchedule": object(&[("every_ns", "integer"), ("keep", "Keep")]),
        "Keep": object(&[("newest?", "integer?"), ("ages?", "Age[]?")]),
        "Age": object(&[("for_ns", "integer"), ("every_ns?", "integer?")]),
        "Schedule": object(&[
            ("every_ns", "integer"),
            ("keep", "Keep"),
            ("paused", "boolean"),
            ("reason", "string?"),
            ("taken", "integer"),
            ("skipped", "integer"),
            ("thinned", "integer"),
            ("failed", "integer"),
        ]),
        "MoveVolume": object(&[("core", "integer")]),
        "Limits": object(&[
            ("iops?", "integer?"),
            ("bytes_per_second?", "integer?"),
            ("burst_ns?", "integer"),
        ]),
        "CreateSnapshot": object(&[("label?", "string")]),
        "ChangeSnapshot": object(&[("label", "string?")]),
        "Volume": object(VOLUME_FIELDS),
        "RolledBack": object(&rolled_back),
        "Imported": object(&imported),
        "Snapshot": object(SNAPSHOT_FIELDS),
        "SnapshotCreated": object(&created),
        "Space": object(&[
            ("volume", "string"),
            ("current", "TreeSpace"),
            ("snapshots", "SnapshotSpace[]"),
            ("forest_data_bytes", "integer"),
            ("forest_nodes_bytes", "integer"),
        ]),
        "TreeSpace": object(SPACE_FIELDS),
        "SnapshotSpace": object(&snapshot_space),
        "SnapshotDeleted": object(&deleted),
        "Diff": object(&[
            ("from", "string"),
            ("to", "string"),
            ("from_size_bytes", "integer"),
            ("to_size_bytes", "integer"),
            ("changed_bytes", "integer"),
            ("nodes_read", "integer"),
            ("ranges", "DiffRange[]"),
        ]),
        "DiffRange": object(&[
            ("first_bytes", "integer"),
            ("length_bytes", "integer"),
            ("now", "range"),
        ]),
        "Tree": object(&[("volumes", "TreeVolume[]")]),
        "TreeVolume": object(&[
            ("id", "integer"),
            ("name", "string"),
            ("size_bytes", "integer"),
            ("origin", "string?"),
            ("deleted", "boolean"),
            ("parent", "string?"),
            ("snapshots", "Snapshot[]"),
        ]),
        "Stats": object(&[
            ("uptime_ns", "integer"),
            ("store", "Store"),
            ("reactors", "Reactor[]"),
            ("volumes", "VolumeStats[]"),
            ("snapshot_latency", "Latency"),
            ("reclaim", "Reclaim"),
            ("gc", "Gc"),
            ("jobs", "Job[]"),
        ]),
        "Gc": object(&[
            ("running", "boolean"),
            ("trigger", "string?"),
            ("started", "string?"),
            ("phase", "string?"),
            ("nodes_read", "integer"),
            ("nodes_found", "integer"),
            ("garbage_bytes", "integer"),
            ("freed_bytes", "integer"),
            ("ended", "integer"),
            ("freed_bytes_total", "integer"),
            ("last", "GcReport?"),
        ]),
        "GcReport": object(&[
            ("outcome", "string"),
            ("reason", "string?"),
            ("trigger", "string"),
            ("started", "string"),
            ("duration_ns", "integer"),
            ("nodes_read", "integer"),
            ("reachable_bytes", "integer"),
            ("freed_data_bytes", "integer"),
            ("freed_metadata_bytes", "integer"),
            ("volumes_reclaimed", "integer"),
            ("bitmaps_damaged", "integer"),
        ]),
        "Job": object(&[
            ("id", "integer"),
            ("kind", "job"),
            ("subject", "string"),
            ("done_bytes", "integer"),
            ("total_bytes", "integer?"),
            ("started", "string"),
        ]),
        "Reclaim": object(&[
            ("snapshots", "integer"),
            ("left_to_collector", "integer"),
            ("waiting", "integer"),
            ("freed_bytes", "integer"),
        ]),
        "Store": object(&[
            ("device", "string"),
            ("uuid", "string"),
            ("total_bytes", "integer"),
            ("free_bytes", "integer"),
            ("data_bytes", "integer"),
            ("metadata_bytes", "integer"),
        ]),
        "Reactor": object(&[
            ("index", "integer"),
            ("core", "integer"),
            ("turns", "integer"),
            ("turns_busy", "integer"),
            ("sleeps", "integer"),
            ("busy_ns", "integer"),
            ("spun_ns", "integer"),
            ("asleep_ns", "integer"),
            ("device_polled", "integer"),
            ("messages", "integer"),
            ("forwarded", "integer"),
            ("node_cache_hits", "integer"),
            ("node_cache_misses", "integer"),
            ("commits", "integer"),
            ("metadata_writes", "integer"),
            ("device_flushes", "integer"),
            ("device_flush_failures", "integer"),
            ("device_errors", "integer"),
            ("node_errors", "integer"),
            ("no_space", "integer"),
        ]),
        "VolumeStats": object(&[
            ("name", "string"),
            ("state", "state"),
            ("reads", "integer"),
            ("writes", "integer"),
            ("flushes", "integer"),
            ("discards", "integer"),
            ("read_bytes", "integer"),
            ("written_bytes", "integer"),
            ("errors", "integer"),
            ("allocated_bytes", "integer"),
            ("snapshots_scheduled", "integer"),
            ("snapshots_skipped", "integer"),
            ("snapshots_thinned", "integer"),
            ("snapshots_failed", "integer"),
            ("throttled_ns", "integer"),
        ]),
        "Latency": object(&[
            ("count", "integer"),
            ("p50_ns", "integer"),
            ("p99_ns", "integer"),
            ("max_ns", "integer"),
        ]),
    })
}

#[cfg(test)]
mod tests {
    use super::super::types::*;
    use super::*;
    use serde::Serialize;

    /// The description of `schema` has exactly the fields that `sample` serialises to, and allows
    /// the type of each value.
    fn describes<T: Serialize>(schema: &str, sample: T) {
        let description = &schemas()[schema]["properties"];
        let sample = serde_json::to_value(sample).unwrap();
        let fields = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(fields(description), fields(&sample), "{schema}");
        for (name, value) in sample.as_object().unwrap() {
            let kind = match value {
                Value::Null => "null",
                Value::Bool(_) => "boolean",
                Value::Number(_) => "integer",
                Value::String(_) => "string",
                Value::Array(_) => "array",
                Value::Object(_) => "$ref",
            };
            let described = description[name].to_string();
            assert!(described.contains(kind), "{schema}.{name} is {kind}, described {described}");
        }
    }

    fn snapshot() -> SnapshotView {
        SnapshotView {
            id: String::new(),
            volume: String::new(),
            label: None,
            time: String::new(),
            size_bytes: 0,
            allocated_bytes: 0,
            settling: false,
            deleted: false,
            parent: None,
        }
    }

    fn volume() -> VolumeView {
        VolumeView {
            id: 0,
            name: String::new(),
            size_bytes: 0,
            cache: Cache::Writeback,
            queues: 1,
            socket: String::new(),
            reactor: 0,
            core: 0,
            queue_cores: Vec::new(),
            connected: false,
            origin: None,
            created: String::new(),
            state: State::Online,
            reason: None,
            remedy: None,
            allocated_bytes: 0,
            snapshots: 0,
            snapshots_unread: 0,
            snapshots_fault: None,
            schedule: None,
            limits: None,
        }
    }

    fn keep() -> KeepView {
        KeepView { newest: Some(1), ages: Some(Vec::new()) }
    }

    #[test]
    fn the_schemas_are_what_the_types_serialise_to() {
        describes("Error", ErrorBody { error: String::new() });
        describes(
            "CreateVolume",
            CreateVolume { name: String::new(), size_bytes: Some(0), from: Some(String::new()) },
        );
        describes("CreateClones", CreateClones { prefix: String::new(), count: 1 });
        describes("ChangeVolume", ChangeVolume { name: Some(String::new()), size_bytes: Some(0) });
        let label = Some(String::new());
        describes("Rollback", Rollback { snapshot: String::new(), label, force: false });
        describes("CreateSnapshot", CreateSnapshot { label: Some(String::new()) });
        describes("ChangeSnapshot", ChangeSnapshot { label: None });
        describes("Snapshot", snapshot());
        describes("SnapshotCreated", SnapshotCreated { snapshot: snapshot(), latency_ns: 0 });
        let (clones, left_to_collector) = (Vec::new(), None);
        let deleted = SnapshotDeleted { snapshot: snapshot(), clones, left_to_collector };
        describes("SnapshotDeleted", deleted);
        describes("SetSchedule", SetSchedule { every_ns: 1, keep: keep() });
        describes("Keep", keep());
        describes("Age", AgeView { for_ns: 1, every_ns: Some(1) });
        let schedule = ScheduleView {
            every_ns: 1,
            keep: keep(),
            paused: false,
            reason: None,
            taken: 0,
            skipped: 0,
            thinned: 0,
            failed: 0,
        };
        describes("Schedule", schedule.clone());
        let limits = LimitsView { iops: Some(1), bytes_per_second: Some(1), burst_ns: 1 };
        describes("Limits", limits.clone());
        describes("MoveVolume", MoveVolume { core: 1 });
        let (schedule, limits) = (Some(schedule), Some(limits));
        describes("Volume", VolumeView { schedule, limits, ..volume() });
        describes("Volume", volume());
        describes(
            "RolledBack",
            RolledBack { volume: volume(), snapshot: snapshot(), kept: snapshot() },
        );
        describes("Imported", Imported { volume: volume(), data_bytes: 0 });
        let job = JobView {
            id: 1,
            kind: JobKind::Export,
            subject: String::new(),
            done_bytes: 0,
            total_bytes: None,
            started: String::new(),
        };
        describes("Job", job);
        let space = TreeSpaceView { refers_bytes: 0, alone_bytes: 0, shared_bytes: 0 };
        describes("TreeSpace", space);
        describes("SnapshotSpace", SnapshotSpaceView { id: String::new(), space });
        describes(
            "Space",
            SpaceView {
                volume: String::new(),
                current: Some(space),
                snapshots: Vec::new(),
                forest_data_bytes: 0,
                forest_nodes_bytes: 0,
            },
        );
        let range = DiffRange { first_bytes: 0, length_bytes: 0, now: RangeKind::Hole };
        describes("DiffRange", range);
        describes(
            "Diff",
            DiffView {
                from: String::new(),
                to: String::new(),
                from_size_bytes: 0,
                to_size_bytes: 0,
                changed_bytes: 0,
                nodes_read: 0,
                ranges: Vec::new(),
            },
        );
        describes("Reclaim", ReclaimView::default());
        let report = GcReport {
            outcome: GcOutcome::Done,
            reason: None,
            trigger: GcTrigger::Command,
            started: String::new(),
            duration_ns: 1,
            nodes_read: 0,
            reachable_bytes: 0,
            freed_data_bytes: 0,
            freed_metadata_bytes: 0,
            volumes_reclaimed: 0,
            bitmaps_damaged: 0,
        };
        describes("GcReport", report.clone());
        describes("Gc", GcView::default());
        let (trigger, phase) = (Some(GcTrigger::Crash), Some(GcPhase::Mark));
        describes("Gc", GcView { trigger, phase, last: Some(report), ..GcView::default() });
        describes("Tree", TreeView { volumes: Vec::new() });
        describes(
            "TreeVolume",
            TreeVolume {
                id: 0,
                name: String::new(),
                size_bytes: 0,
                origin: None,
                deleted: false,
                parent: None,
                snapshots: Vec::new(),
            },
        );
        describes("Stats", StatsView::default());
        describes("Store", StoreView::default());
        describes("Reactor", ReactorView::default());
        describes("VolumeStats", VolumeStatsView::default());
        describes("Latency", LatencyView::default());
    }
}
