//! Every name that telemetry uses. The names are an interface, because dashboards and alerts depend on them.
//!
//! A name follows OpenTelemetry's semantic conventions where they define one, and begins with `portcullis.` otherwise. This file
//! holds only names. Look next at `metrics.rs` and `spans.rs`, which use them.

/// The service's name, and the name of the instrumentation scope.
pub const SERVICE: &str = "portcullis";
/// The attribute with the replica's name.
pub const SERVICE_INSTANCE_ID: &str = "service.instance.id";
/// The attribute with the program's version.
pub const SERVICE_VERSION: &str = "service.version";

/// The environment variable with the log's filter.
pub const LOG_VARIABLE: &str = "PORTCULLIS_LOG";
/// The environment variable that turns OTLP export on.
pub const OTLP_ENDPOINT_VARIABLE: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

/// Histogram: duration of a decision in the service, by effect.
pub const CHECK_DURATION: &str = "portcullis.check.duration";
/// Counter: decisions, by effect and reason.
pub const CHECK_DECISIONS: &str = "portcullis.check.decisions";
/// Counter: lookups of a verified chain, by result (`hit`, `miss`).
pub const CHAIN_CACHE: &str = "portcullis.chain_cache.lookups";
/// Gauge: verified chains in memory.
pub const CHAINS_KEPT: &str = "portcullis.chain_cache.entries";
/// Gauge: bytes that the verified chains take in memory.
pub const CHAINS_BYTES: &str = "portcullis.chain_cache.size";
/// Gauge: calls that wait for the store to use a proof or an approval up.
pub const LEDGER_USES: &str = "portcullis.ledger.uses";
/// Counter: chains whose signatures were verified.
pub const COLD_VERIFICATIONS: &str = "portcullis.chain.verifications";
/// Counter: spans that a limit suppressed.
pub const SPANS_SUPPRESSED: &str = "portcullis.spans.suppressed";
/// Histogram: time from the commit of a revocation to its effect on this replica.
pub const KILL_PROPAGATION: &str = "portcullis.kill.propagation";
/// Gauge: time since the snapshot was known to be the newest.
pub const SNAPSHOT_AGE: &str = "portcullis.snapshot.age";
/// Gauge: number of the revision by which the replica decides.
pub const REVISION: &str = "portcullis.revision";
/// Gauge: entries in the revocation index.
pub const REVOCATIONS: &str = "portcullis.revocations";
/// Gauge: estimated rate of needless lookups in the exact set.
pub const FALSE_POSITIVE_RATE: &str = "portcullis.filter.false_positive_rate";
/// Gauge: age of the newest commit that is not in effect yet.
pub const SYNC_LAG: &str = "portcullis.sync.lag";
/// Gauge: 1 for the state that the replica is in, 0 for the others.
pub const REPLICA_STATE: &str = "portcullis.replica.state";
/// Gauge: bytes of audit records that wait to be written.
pub const AUDIT_PENDING: &str = "portcullis.audit.pending";
/// Counter: audit records taken.
pub const AUDIT_RECORDS: &str = "portcullis.audit.records";
/// Counter: times that an audit recorder could no longer write, or lost its file.
pub const AUDIT_FAILURES: &str = "portcullis.audit.failures";
/// Gauge: 1 while an audit recorder cannot write.
pub const AUDIT_UNWRITABLE: &str = "portcullis.audit.unwritable";
/// Counter: denials of unverified callers that are counted in merged audit records.
pub const AUDIT_MERGED: &str = "portcullis.audit.merged";
/// Gauge: merged denials that are not written yet.
pub const AUDIT_MERGED_WAITING: &str = "portcullis.audit.merged_waiting";
/// Gauge: free bytes on the disk of the audit log.
pub const AUDIT_DISK_FREE: &str = "portcullis.audit.disk_free";
/// Gauge: how much room the disk of the audit log has: 1 for the present level, 0 for the others.
pub const AUDIT_ROOM: &str = "portcullis.audit.room";
/// Gauge: free bytes on the disk of a file store.
pub const STORE_DISK_FREE: &str = "portcullis.store.disk_free";
/// Gauge: how much room the disk of a file store has: 1 for the present level, 0 for the others.
pub const STORE_ROOM: &str = "portcullis.store.room";
/// Counter: failed writes of this replica's cache.
pub const CACHE_FAILURES: &str = "portcullis.cache.failures";
/// Gauge: 1 while this replica does not write its cache.
pub const CACHE_PAUSED: &str = "portcullis.cache.paused";
/// Gauge: open connections.
pub const CONNECTIONS: &str = "portcullis.server.connections";
/// Counter: connections that were refused because too many are open and none can be closed for them, by listener.
pub const CONNECTIONS_REFUSED: &str = "portcullis.server.connections_refused";
/// Counter: connections that the server closed, by listener and cause.
pub const CONNECTIONS_CUT: &str = "portcullis.server.connections_cut";
/// Counter: calls that were refused before decoding, by listener and cause.
pub const CALLS_REFUSED: &str = "portcullis.server.calls_refused";
/// Gauge: bytes that waiting calls hold beyond the allowance of each connection.
pub const WAITING_BYTES: &str = "portcullis.server.waiting";
/// The label with a listener's name.
pub const LISTENER: &str = "listener";
/// The label with the cause of a closed connection or a refusal.
pub const CAUSE: &str = "cause";

/// Counter: decisions that were also evaluated with shadow documents, by leaf agent, tool, effect and would-be effect.
pub const SHADOW_DECISIONS: &str = "portcullis.shadow.decisions";
/// Counter: decisions that the shadow documents would have changed.
pub const SHADOW_FLIPS: &str = "portcullis.shadow.flips";

/// The unit of a metric, as a word of its Prometheus name; `None` for a metric that counts things.
pub fn unit(name: &str) -> Option<&'static str> {
    match name {
        CHECK_DURATION | KILL_PROPAGATION | SNAPSHOT_AGE | SYNC_LAG => Some("seconds"),
        AUDIT_PENDING | AUDIT_DISK_FREE | STORE_DISK_FREE | WAITING_BYTES => Some("bytes"),
        _ => None,
    }
}

/// The single span of a decision.
pub const CHECK_SPAN: &str = "portcullis.check";
/// Attribute: the leaf agent, which makes the call.
pub const AGENT_ID: &str = "gen_ai.agent.id";
/// Attribute: the tool.
pub const TOOL_NAME: &str = "gen_ai.tool.name";
/// Attribute: the operation; always [`EXECUTE_TOOL`].
pub const OPERATION_NAME: &str = "gen_ai.operation.name";
/// The operation for which an agent requests a decision.
pub const EXECUTE_TOOL: &str = "execute_tool";
/// Attribute: the user, as the JSON array `["iss","sub"]`.
pub const USER_ID: &str = "enduser.id";
/// Attribute: the session.
pub const SESSION_ID: &str = "session.id";
/// Attribute: the application.
pub const APPLICATION_ID: &str = "portcullis.application.id";
/// Attribute: every agent of the chain, root to leaf.
pub const AGENTS: &str = "portcullis.agents";
/// Attribute: the task.
pub const TASK_ID: &str = "portcullis.task.id";
/// Attribute: the called method: `Check`, `ListTools` or `Explain`.
pub const METHOD: &str = "portcullis.method";
/// Attribute: the decision's id, as in the audit log.
pub const DECISION_ID: &str = "portcullis.decision.id";
/// Attribute and label: the effect.
pub const EFFECT: &str = "portcullis.effect";
/// Attribute and label: the reason.
pub const REASON: &str = "portcullis.reason";
/// Attribute: the layer with the least effect, which decided.
pub const LAYER: &str = "portcullis.deciding_layer";
/// Attribute: the revision that decided, `HISTORY.NUMBER`.
pub const REVISION_TOKEN: &str = "portcullis.revision";
/// Attribute: why the replica could not do its work. A denial by policy has no error type.
pub const ERROR_TYPE: &str = "error.type";
/// Label: the effect that shadow documents would have had.
pub const WOULD_BE: &str = "portcullis.would_be";
/// Label: the result of a cache lookup, `hit` or `miss`.
pub const RESULT: &str = "portcullis.result";
/// Label: the state of a replica.
pub const STATE: &str = "portcullis.state";
