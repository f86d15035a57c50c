//! Every limit on what comes from outside, in one place; the unit is the last word of the name.

/// A token of a chain.
pub const TOKEN_BYTES_MAX: usize = 8 * 1024;
/// The tokens of a chain together.
pub const CHAIN_BYTES_MAX: usize = 32 * 1024;
/// A proof of possession.
pub const PROOF_BYTES_MAX: usize = 72 * 1024;
/// The arguments of a call.
pub const ARGUMENTS_BYTES_MAX: usize = 48 * 1024;
/// The environment of a call, `context_json`.
pub const CONTEXT_BYTES_MAX: usize = 16 * 1024;
/// `del_depth` and `del_max_depth` of a token: nine tokens in all.
pub const DELEGATION_DEPTH_MAX: u64 = 8;
/// Tokens in a chain.
pub const CHAIN_TOKENS_MAX: usize = 9;
/// Work that the conditions asked for one call may take together, about in bytes looked at by short conditions; more fails them.
pub const CONDITION_WORK_MAX: u64 = 2 * 1024 * 1024;
/// Nesting of constraints: a plain one is 1.
pub const CONSTRAINT_NESTING_MAX: usize = 32;
/// Nesting of any JSON or YAML value from outside.
pub const JSON_NESTING_MAX: usize = 96;
/// How far ahead of our clock an `iat` may be.
pub const IAT_SKEW_S: i64 = 30;
/// Lifetime of a root, unless its issuer's document says less or more.
pub const ROOT_LIFETIME_S_MAX: i64 = 8 * 3600;
/// No root lives longer, whatever its issuer's document says: revocations are kept by it, and what is forgotten must be over.
pub const ROOT_LIFETIME_S_BOUND: i64 = 24 * 3600;
/// For so long a revocation that time can make moot is kept: as long as a root lives, and a day for clocks that are wrong by hours.
pub const REVOCATION_KEPT_S: i64 = ROOT_LIFETIME_S_BOUND + 24 * 3600;
/// How long the first half of an act that takes two operators waits for the second.
pub const SECOND_OPERATOR_MS: i64 = 15 * 60_000;
/// Lifetime of a hop, unless its issuer's document says otherwise.
pub const HOP_LIFETIME_S_MAX: i64 = 3600;
/// How far a proof's `iat` may be from our clock, either way.
pub const PROOF_WINDOW_S: i64 = 30;
/// Keys of one issuer, and of one operator.
pub const KEYS_MAX: usize = 8;
/// A caller's `request_id`.
pub const REQUEST_ID_BYTES_MAX: usize = 128;
/// A tool's name.
pub const TOOL_NAME_BYTES_MAX: usize = 256;
/// An audience, a revision token, an id in a document, a key of a revocation target.
pub const ID_BYTES_MAX: usize = 2048;
/// Calls in a batch.
pub const BATCH_CALLS_MAX: usize = 128;
/// Tokens of a chain that are read at all: a few too many are a denial with its reason, far more are not looked at.
pub const CHAIN_TOKENS_READ_MAX: usize = 8 * CHAIN_TOKENS_MAX;
/// Tools asked for in one `ListTools`.
pub const LIST_TOOLS_MAX: usize = 10_000;
/// A decision request on the wire: chain, proof, arguments, context and room for the rest.
pub const CHECK_MESSAGE_BYTES_MAX: usize = 256 * 1024;
/// A batch on the wire.
pub const BATCH_MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Any message that is neither a decision request nor signed: health, reflection, `Info`, `Watch`.
pub const SMALL_MESSAGE_BYTES_MAX: usize = 8 * 1024;
/// A signed act that is not a policy folder.
pub const SIGNED_MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// A signed act with a policy folder, and its frame.
pub const POLICY_MESSAGE_BYTES_MAX: usize = POLICY_BYTES_MAX + 1024 * 1024;
/// From its headers to the end of a request of one message.
pub const MESSAGE_ARRIVAL_MS: u64 = 5000;
/// The same for a policy folder.
pub const POLICY_ARRIVAL_MS: u64 = 30_000;
/// One file of a policy folder.
pub const POLICY_FILE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// A policy folder.
pub const POLICY_BYTES_MAX: usize = 32 * 1024 * 1024;
/// Files in a policy folder.
pub const POLICY_FILES_MAX: usize = 10_000;
/// The reason that an operator gives for an act.
pub const ACT_REASON_BYTES_MAX: usize = 1024;
/// The account of an act in its record: what was done to whom, and the reason.
pub const ACT_ACCOUNT_BYTES_MAX: usize = ACT_REASON_BYTES_MAX + 4 * ID_BYTES_MAX;
/// An operator's signature over an act.
pub const OPERATOR_JWS_BYTES_MAX: usize = 4 * 1024;
/// Life of an operator's signature: `exp - iat`.
pub const OPERATOR_JWS_LIFETIME_S_MAX: i64 = 60;
/// Concurrent streams of one connection.
pub const STREAMS_PER_CONNECTION_MAX: u32 = 256;
/// Connections a listener keeps open.
pub const CONNECTIONS_MAX: usize = 4096;
/// Connections that each of the other listeners keeps open.
pub const CONTROL_CONNECTIONS_MAX: usize = 256;
/// Of those on the administration's listener, places that only connections have which signed lately.
pub const SIGNED_CONNECTIONS_KEPT: usize = 32;
/// For so long after a verified signature a connection counts as one that signed lately.
pub const SIGNED_LATELY_MS: u64 = 60_000;
/// A connection without a call for so long is closed.
pub const IDLE_CONNECTION_MS: u64 = 600_000;
/// A connection to the administration's listener that has signed nothing for so long is closed.
pub const UNSIGNED_CONNECTION_MS: u64 = 60_000;
/// A call that waits for anything counts as so many bytes beside its message: its headers, its task, its buffers.
pub const WAITING_CALL_BYTES: usize = 8 * 1024;
/// Bytes of calls that wait, of one connection, which no other connection can take from it.
pub const CONNECTION_OWN_BYTES: usize = 64 * 1024;
/// Bytes of calls that wait, of one connection.
pub const CONNECTION_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Bytes of calls that wait, beyond what is each connection's own, of all connections of the decisions' listener.
pub const DECISION_BYTES_MAX: usize = 256 * 1024 * 1024;
/// The same for the administration's listener: three policy folders.
pub const ADMIN_BYTES_MAX: usize = 3 * POLICY_MESSAGE_BYTES_MAX;
/// What flow control lets all connections of a listener send ahead of being read, about.
pub const WINDOWS_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Readers of revocations beside the first of each connection, which has a place of its own.
pub const SHARED_WATCHERS_MAX: usize = 1024;
/// Readers of revocations on one connection.
pub const CONNECTION_WATCHERS_MAX: usize = 8;
/// Verified chains kept in memory, by what they were seen to take: within a tenth.
pub const CHAIN_CACHE_BYTES_MAX: u64 = 512 * 1024 * 1024;
/// Life of a handle.
pub const HANDLE_LIFETIME_MS: i64 = 60_000;
/// Handles kept in memory, each weighed with its chain.
pub const HANDLES_BYTES_MAX: u64 = 1024 * 1024 * 1024;
/// Proofs in each of two tables: those used, so that none is used twice, and those shown, so that none proves a handle that somebody has
/// seen. Agents share them; about 75 MB each at most.
pub const PROOFS_REMEMBERED_MAX: usize = 1_000_000;
/// Canonical arguments of a call that asks for an approval: what is longer nobody would read.
pub const APPROVAL_ARGUMENTS_BYTES_MAX: usize = 16 * 1024;
/// Calls of one user by one leaf agent that wait for an approval.
pub const APPROVALS_WAITING_MAX: u64 = 100;
/// Calls of one leaf agent, whoever its users are, that wait for an approval.
pub const APPROVALS_WAITING_OF_AGENT_MAX: u64 = 1_000;
/// Calls of one user, by whatever agents, that wait for an approval.
pub const APPROVALS_WAITING_OF_USER_MAX: u64 = 1_000;
/// Calls that wait for an approval in one store.
pub const APPROVALS_WAITING_TOTAL_MAX: u64 = 10_000;
/// Layers that ask for one call: user, application, each agent, and room for more.
pub const APPROVAL_LAYERS_MAX: usize = 32;
/// Other calls that one call demands as prepared.
pub const APPROVALS_PREPARED_MAX: usize = 32;
/// Approvals in one list.
pub const APPROVALS_LISTED_MAX: usize = 1000;
/// For so long after a use the very same request gets the same answer again.
pub const APPROVAL_REPEAT_MS: i64 = 30_000;
/// For so long after its expiry an approval that an operator touched is kept, for lists and for a better reason of a denial.
pub const APPROVAL_KEPT_MS: i64 = 3_600_000;
/// Text of a caller of whom nothing was verified, in an audit record: what is longer is cut.
pub const STRANGER_TEXT_BYTES_MAX: usize = 128;
/// The account of a refused act of whom nobody verified, in an audit record: what is longer is cut.
pub const STRANGER_ACCOUNT_BYTES_MAX: usize = 512;
/// Denials of one caller and address prefix that are recorded one by one though nothing was verified: so many at once …
pub const STRANGER_RECORDS_BURST: u64 = 100;
/// … and so many a second; the others are merged. For each serving runtime.
pub const STRANGER_RECORDS_PER_S: u64 = 10;
/// Audit bytes for denials of callers of whom nothing was verified: so many at once …
pub const STRANGER_BYTES_BURST: u64 = 256 * 1024;
/// … and so many a second; then merged lines stand for all callers together. For each serving runtime.
pub const STRANGER_BYTES_PER_S: u64 = 32 * 1024;
/// How long merged denials are counted before their lines are written: what a crash may cost of the counts.
pub const STRANGER_MERGE_MS: u64 = 1_000;
/// Merged lines that are counted at once, and callers whose rate is known; what is beyond is counted for all callers together.
pub const STRANGERS_KNOWN_MAX: usize = 1_024;
/// Below this much room, or a fifth of the disk, denials of callers of whom nothing was verified are only recorded merged.
pub const DISK_LOW_BYTES: u64 = 512 * 1024 * 1024;
/// Below this much room, or a tenth of the disk, they are not written but only counted, and no cache is written.
pub const DISK_CRITICAL_BYTES: u64 = 256 * 1024 * 1024;
/// Below this much room, or a thirty-second of the disk, every call is denied: what is left is for acts and for the store.
pub const DISK_EXHAUSTED_BYTES: u64 = 64 * 1024 * 1024;
/// Calls of one serving runtime that use a proof or approval up at one time: more are denied at once, and use nothing.
pub const LEDGER_USES_MAX: usize = 512;
/// Uses that wait for the store, those that are given back among them: more are refused at once.
pub const LEDGER_QUEUE_MAX: usize = 4096;
/// How long a use waits for the store before it is refused, not done.
pub const LEDGER_WAIT_MS: u64 = 1_000;
