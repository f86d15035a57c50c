//! Every limit on outside input, in one file. The unit is the last word of each name.
//!
//! The module that reads an input enforces its limit, and returns a clear error or a denial when the limit is exceeded.

/// Size of one token of a chain.
pub const TOKEN_BYTES_MAX: usize = 8 * 1024;
/// Size of all tokens of a chain together.
pub const CHAIN_BYTES_MAX: usize = 32 * 1024;
/// Size of a proof of possession.
pub const PROOF_BYTES_MAX: usize = 72 * 1024;
/// Size of the arguments of a call.
pub const ARGUMENTS_BYTES_MAX: usize = 48 * 1024;
/// Size of the environment of a call, `context_json`.
pub const CONTEXT_BYTES_MAX: usize = 16 * 1024;
/// `del_depth` and `del_max_depth` of a token. A chain has one token more: nine.
pub const DELEGATION_DEPTH_MAX: u64 = 8;
/// Number of tokens in a chain.
pub const CHAIN_TOKENS_MAX: usize = 9;
/// Work of all conditions of one call together. A unit is about one byte read by a short condition. A condition beyond the limit fails.
pub const CONDITION_WORK_MAX: u64 = 2 * 1024 * 1024;
/// Nesting of constraints. A constraint without clauses counts 1.
pub const CONSTRAINT_NESTING_MAX: usize = 32;
/// Nesting of any JSON or YAML value from outside.
pub const JSON_NESTING_MAX: usize = 96;
/// How far in the future an `iat` may lie, by our clock.
pub const IAT_SKEW_S: i64 = 30;
/// Default lifetime of a root. The document of its issuer may set another one.
pub const ROOT_LIFETIME_S_DEFAULT: i64 = 8 * 3600;
/// Maximum lifetime of a root, whatever its issuer's document says. Revocations are retained for at least this long, so that a revocation
/// is only pruned when the roots that it voids have expired.
pub const ROOT_LIFETIME_S_HARD_MAX: i64 = 24 * 3600;
/// Retention of revocations that can become moot with time: the maximum lifetime of a root, and a day for clocks that are wrong by hours.
pub const REVOCATION_RETENTION_S: i64 = ROOT_LIFETIME_S_HARD_MAX + 24 * 3600;
/// How long the first half of an act that needs two operators waits for the second half.
pub const TWO_PERSON_WINDOW_MS: i64 = 15 * 60_000;
/// Default lifetime of a hop. The document of its issuer may set another one.
pub const HOP_LIFETIME_S_DEFAULT: i64 = 3600;
/// How far a proof's `iat` may differ from our clock, in both directions.
pub const PROOF_WINDOW_S: i64 = 30;
/// Number of keys of one issuer, and of one operator.
pub const KEYS_MAX: usize = 8;
/// Size of a caller's `request_id`.
pub const REQUEST_ID_BYTES_MAX: usize = 128;
/// Size of a tool's name.
pub const TOOL_NAME_BYTES_MAX: usize = 256;
/// Size of an audience, a revision token, an id in a document, and a key of a revocation target.
pub const ID_BYTES_MAX: usize = 2048;
/// Number of keys whose revocations one query of the store reads.
pub const KEYS_PER_LOOKUP_MAX: usize = 10_000;
/// Number of calls in a batch.
pub const BATCH_CALLS_MAX: usize = 128;
/// Number of tokens of a chain that are read at all. A chain with a few tokens too many is denied with its reason; one with more than this
/// is not read.
pub const CHAIN_TOKENS_READ_MAX: usize = 8 * CHAIN_TOKENS_MAX;
/// Number of tools in one `ListTools` request.
pub const LIST_TOOLS_MAX: usize = 10_000;
/// Number of tools that a listing decides before it lets the other calls of its runtime run.
pub const LIST_SLICE_TOOLS: usize = 64;
/// Number of times that a listing begins anew because the view changed. After that it ends without letting other calls run.
pub const LIST_RESTARTS_MAX: usize = 3;
/// Size of a decision request on the wire: chain, proof, arguments, context, and space for the other fields.
pub const CHECK_MESSAGE_BYTES_MAX: usize = 256 * 1024;
/// Size of a batch on the wire.
pub const BATCH_MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Size of any message that is neither a decision request nor signed: health, reflection, `Info`, `Watch`.
pub const SMALL_MESSAGE_BYTES_MAX: usize = 8 * 1024;
/// Size of a signed act without a policy folder.
pub const SIGNED_MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Size of a signed act with a policy folder, including its frame.
pub const POLICY_MESSAGE_BYTES_MAX: usize = POLICY_BYTES_MAX + 1024 * 1024;
/// How long a request of one message may take to arrive, from its headers to its end.
pub const MESSAGE_READ_TIMEOUT_MS: u64 = 5000;
/// The same for a request with a policy folder.
pub const POLICY_READ_TIMEOUT_MS: u64 = 30_000;
/// Size of one file of a policy folder.
pub const POLICY_FILE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Size of a policy folder.
pub const POLICY_BYTES_MAX: usize = 32 * 1024 * 1024;
/// Number of files in a policy folder.
pub const POLICY_FILES_MAX: usize = 10_000;
/// Size of the reason that an operator gives for an act.
pub const ACT_REASON_BYTES_MAX: usize = 1024;
/// Size of the summary of an act in its record: the operation, its target and the reason.
pub const ACT_SUMMARY_BYTES_MAX: usize = ACT_REASON_BYTES_MAX + 4 * ID_BYTES_MAX;
/// Size of an operator's signature over an act.
pub const OPERATOR_JWS_BYTES_MAX: usize = 4 * 1024;
/// Lifetime of an operator's signature: `exp - iat`.
pub const OPERATOR_JWS_LIFETIME_S_MAX: i64 = 60;
/// Number of concurrent streams on one connection.
pub const STREAMS_PER_CONNECTION_MAX: u32 = 256;
/// Number of concurrent streams on one connection to the administration listener. Its one thread must reach an operator's act while
/// every other connection holds this many unsigned calls open.
pub const ADMIN_STREAMS_PER_CONNECTION_MAX: u32 = 16;
/// Number of open connections of the decisions' listener.
pub const CONNECTIONS_MAX: usize = 4096;
/// Number of open connections of each other listener.
pub const CONTROL_CONNECTIONS_MAX: usize = 256;
/// Number of connections on the administration listener that are reserved for clients with a recent signature.
pub const SIGNED_CONNECTIONS_RESERVED: usize = 32;
/// How long a verified signature counts as recent.
pub const RECENT_SIGNATURE_MS: u64 = 60_000;
/// How long a connection may be idle before it is closed.
pub const IDLE_CONNECTION_TIMEOUT_MS: u64 = 600_000;
/// How long a connection to the administration listener may stay open without a verified signature.
pub const UNSIGNED_CONNECTION_TIMEOUT_MS: u64 = 60_000;
/// Bytes that a waiting call is charged in addition to its message, for its task, its buffers and [`CALL_HEADER_BYTES`] of headers.
pub const WAITING_CALL_OVERHEAD_BYTES: usize = 8 * 1024;
/// Bytes of headers that are part of [`WAITING_CALL_OVERHEAD_BYTES`]. More headers are charged in addition.
pub const CALL_HEADER_BYTES: usize = 4 * 1024;
/// Bytes that each header of a waiting call is charged for its table entry, in addition to its value.
pub const HEADER_BYTES: usize = 256;
/// Number of headers of one call.
pub const CALL_HEADERS_MAX: usize = 64;
/// Bytes that each call of a batch is charged while the batch waits, for its request, its answer and the evidence for it.
pub const BATCH_CALL_BYTES: usize = 2 * 1024;
/// Bytes that each tool of a `ListTools` request is charged while it waits.
pub const LISTED_TOOL_BYTES: usize = 128;
/// Bytes that an open stream of server reflection is charged, for an answer that is not taken.
pub const REFLECTION_BYTES: usize = 80 * 1024;
/// Number of open streams on one connection that need no credential and may stay idle: health watches and server reflection.
pub const IDLE_STREAMS_MAX: usize = 8;
/// Size of the headers `traceparent` and `tracestate`. A longer one counts as absent.
pub const TRACE_HEADER_BYTES_MAX: usize = 512;
/// Burst of HTTP/2 frames on one connection that carry no call: `SETTINGS`, `PING`, `PRIORITY`, `WINDOW_UPDATE` and others.
pub const CONTROL_FRAMES_BURST: u64 = 1_024;
/// Rate of the same frames per second. Calls, messages and answers allow further ones.
pub const CONTROL_FRAMES_PER_S: u64 = 100;
/// How long a new connection is not cut by a full listener, so that its first call can be verified.
pub const CONNECTION_GRACE_MS: u64 = 250;
/// Bytes of waiting calls that are reserved for one connection.
pub const CONNECTION_RESERVED_BYTES: usize = 64 * 1024;
/// Bytes of waiting calls on one connection.
pub const CONNECTION_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Bytes of waiting calls on all connections of the decisions' listener, beyond the bytes reserved for each connection.
pub const DECISION_LISTENER_BYTES_MAX: usize = 256 * 1024 * 1024;
/// The same for the administration listener: three policy folders.
pub const ADMIN_LISTENER_BYTES_MAX: usize = 3 * POLICY_MESSAGE_BYTES_MAX;
/// Approximate number of bytes that flow control lets all connections of a listener send before the server has read them.
pub const FLOW_CONTROL_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Number of revocation watchers beyond the first of each connection, which has its own slot.
pub const SHARED_WATCHERS_MAX: usize = 1024;
/// Number of revocation watchers on one connection.
pub const CONNECTION_WATCHERS_MAX: usize = 8;
/// Size of the cache of verified chains. Each entry is weighed by its measured size, within a tenth.
pub const CHAIN_CACHE_BYTES_MAX: u64 = 512 * 1024 * 1024;
/// Lifetime of a handle.
pub const HANDLE_LIFETIME_MS: i64 = 60_000;
/// Size of the table of handles. Each handle is weighed together with its chain.
pub const HANDLE_CACHE_BYTES_MAX: u64 = 1024 * 1024 * 1024;
/// Number of proofs in each of two tables. One table holds used proofs, so that none is used twice. The other holds presented proofs, so
/// that no proof that another party may have seen proves a handle. All agents share the tables, each of at most about 75 MB.
pub const PROOFS_REMEMBERED_MAX: usize = 1_000_000;
/// Size of the canonical arguments of a call that needs approval. An approver could not review longer ones.
pub const APPROVAL_ARGUMENTS_BYTES_MAX: usize = 16 * 1024;
/// Number of waiting calls of one user by one leaf agent.
pub const APPROVALS_WAITING_MAX: u64 = 100;
/// Number of waiting calls of one leaf agent, for all users.
pub const APPROVALS_WAITING_OF_AGENT_MAX: u64 = 1_000;
/// Number of waiting calls of one user, by all agents.
pub const APPROVALS_WAITING_OF_USER_MAX: u64 = 1_000;
/// Number of waiting calls in one store.
pub const APPROVALS_WAITING_TOTAL_MAX: u64 = 10_000;
/// Number of layers that may require approval of one call: user, application, each agent, and space for more.
pub const APPROVAL_LAYERS_MAX: usize = 32;
/// Number of prepared calls that one call may require.
pub const APPROVALS_PREPARED_MAX: usize = 32;
/// Number of approvals in one list.
pub const APPROVALS_LISTED_MAX: usize = 1000;
/// How long an identical request gets the same answer again after its approval was used.
pub const APPROVAL_REPLAY_WINDOW_MS: i64 = 30_000;
/// How long an expired approval that an operator approved or refused is retained, for lists and for a precise denial reason.
pub const APPROVAL_RETENTION_MS: i64 = 3_600_000;
/// Size of a text from an unverified caller in an audit record. Longer text is cut.
pub const UNVERIFIED_TEXT_BYTES_MAX: usize = 128;
/// Size of the summary of an unverified, refused act in an audit record. Longer text is cut.
pub const UNVERIFIED_ACT_SUMMARY_BYTES_MAX: usize = 512;
/// Burst of unmerged records of one caller who proved nothing, by agent, operator or address prefix, for each serving runtime.
pub const UNVERIFIED_RECORDS_BURST: u64 = 100;
/// Rate of the same records per second, for each serving runtime. Further records are merged.
pub const UNVERIFIED_RECORDS_PER_S: u64 = 10;
/// Burst of audit bytes for such records, for each serving runtime. Refused acts with a verified signature have a separate budget
/// of the same size.
pub const UNVERIFIED_BYTES_BURST: u64 = 256 * 1024;
/// Rate of the same bytes per second, for each serving runtime. Beyond it, merged lines combine all callers.
pub const UNVERIFIED_BYTES_PER_S: u64 = 32 * 1024;
/// How long merged records are counted before their lines are written. A crash may lose the counts of this period.
pub const UNVERIFIED_MERGE_INTERVAL_MS: u64 = 1_000;
/// Number of merged lines that are counted at the same time, and of callers whose rate is tracked. Further callers share one line.
pub const UNVERIFIED_CALLERS_TRACKED_MAX: usize = 1_024;
/// Free space below which denials of unverified callers are only written merged. A fifth of the disk counts instead if that is less.
pub const DISK_LOW_BYTES: u64 = 512 * 1024 * 1024;
/// Free space below which such denials are only counted, and no cache is written. A tenth of the disk counts instead if that is less.
pub const DISK_CRITICAL_BYTES: u64 = 256 * 1024 * 1024;
/// Free space below which every call is denied; the rest is for acts and for the store. A thirty-second of the disk counts instead if that
/// is less.
pub const DISK_EXHAUSTED_BYTES: u64 = 64 * 1024 * 1024;
/// Number of concurrent calls of one serving runtime that use a proof or an approval. Further calls are denied at once and use nothing. Agents
/// share them.
pub const LEDGER_USES_IN_FLIGHT_MAX: u32 = 512;
/// Number of uses that wait for the store, including uses to undo. Further ones are refused at once.
pub const LEDGER_QUEUE_MAX: usize = 4096;
/// How long a use waits for the store before it is refused and not performed.
pub const LEDGER_TIMEOUT_MS: u64 = 1_000;
