//! The records of the audit log: the facts of a decision and of an administrative act, and their form as a JSON line.
//!
//! All fields are borrowed. Everything that is constant for a chain is serialized once, as a [`ChainFragment`]. Arguments, tokens
//! and keys have no field here, only their digests. A fact that was not verified is an absent member; nothing is guessed. Members
//! have the names of the protocol, bytes are base64url, and the name of a time ends in its unit. Look next at `recorder.rs`.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use crate::model::decision::{Effect, Evidence, Obligation, PolicyEntryRef, ShadowDecision};
use crate::model::heap_size::arc_slice_bytes;
use crate::model::limits::{ACT_SUMMARY_BYTES_MAX, UNVERIFIED_ACT_SUMMARY_BYTES_MAX, UNVERIFIED_TEXT_BYTES_MAX};
use crate::model::reason::{DecisionLayer, Reason};
use crate::model::revision::HistoryId;

use super::denial_merger::{CallerOrigin, MergeableRecord, MergedKind};
use super::json_line;

/// One identity of a call, and how it was established.
#[derive(Clone, Copy, Debug)]
pub struct PrincipalFacts<'a> {
    /// The id in its wire form; a user's id is the JSON array `["iss","sub"]`.
    pub id: &'a str,
    /// How the identity was established.
    pub evidence: Evidence,
}

/// One token of a chain.
#[derive(Clone, Copy, Debug)]
pub struct TokenFacts<'a> {
    /// The token's `jti`.
    pub jti: &'a str,
    /// SHA-256 of the token's signing input; `revoke hop` names a token by it.
    pub hop_hash: &'a [u8; 32],
    /// Thumbprint of the key to which the token is bound.
    pub holder_thumbprint: &'a str,
    /// The token's `iss`.
    pub issuer: &'a str,
    /// The token's `exp`.
    pub expires_at_unix_s: i64,
}

/// The facts of a chain that are the same in each of its calls.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChainFacts<'a> {
    /// The user who delegated.
    pub user: Option<PrincipalFacts<'a>>,
    /// The application in which the agent runs.
    pub application: Option<PrincipalFacts<'a>>,
    /// The agents, root to leaf.
    pub agents: &'a [PrincipalFacts<'a>],
    /// The session, `sid` of the root.
    pub session: Option<PrincipalFacts<'a>>,
    /// The task, `txn` of the root.
    pub task: Option<PrincipalFacts<'a>>,
    /// The tokens, root to leaf.
    pub tokens: &'a [TokenFacts<'a>],
}

/// The serialized [`ChainFacts`] of one chain: built once, kept with the verified chain, and copied into each record.
///
/// The default belongs to an unverified caller.
#[derive(Clone, Default)]
pub struct ChainFragment {
    /// Members of `principals`, without the braces.
    principals: Arc<[u8]>,
    /// The member `chain` with a comma before it; empty if there are no tokens.
    chain: Arc<[u8]>,
}

/// The record of one decision.
#[derive(Clone, Copy, Debug)]
pub struct DecisionRecord<'a> {
    /// Time of the decision.
    pub time_unix_ns: i64,
    /// The called method: `Check`, `ListTools` or `Explain`.
    pub method: &'static str,
    /// Unique id of the decision, which the answer carries too.
    pub decision_id: &'a str,
    /// The caller's id of the request; empty if the caller gave none.
    pub request_id: &'a str,
    /// The caller's trace (W3C Trace Context).
    pub trace_id: Option<[u8; 16]>,
    /// The effect that was answered.
    pub effect: Effect,
    /// The reason for the effect.
    pub reason: Reason,
    /// The layer with the least effect, which decided.
    pub deciding_layer: Option<DecisionLayer>,
    /// Index of the token or agent at fault; the root is 0.
    pub hop: Option<usize>,
    /// The policy entry that decided.
    pub matched: Option<&'a PolicyEntryRef>,
    /// The decision that documents in shadow would have made; absent if no document is in shadow.
    pub would_be: Option<&'a ShadowDecision>,
    /// The serialized identities and tokens of the chain.
    pub chain: &'a ChainFragment,
    /// Whether the caller proved, by this call or by its handle, that it holds a chain in force. A chain is not secret, so a verified
    /// chain alone says nothing about who sent it.
    pub proved: bool,
    /// The leaf agent of a verified chain.
    pub agent: Option<&'a str>,
    /// The requested tool.
    pub tool: Option<PrincipalFacts<'a>>,
    /// SHA-256 of the arguments' canonical form.
    pub arguments_sha256: Option<&'a [u8; 32]>,
    /// The proof of possession's `jti`.
    pub proof_jti: Option<&'a str>,
    /// Digest of the approval that was asked for or used.
    pub approval_digest: Option<&'a str>,
    /// The obligations of the permit.
    pub obligations: &'a [Obligation],
    /// The gateway that asked: its identity, or its address if it has none.
    pub gateway: &'a str,
    /// The history that the revision belongs to.
    pub history: &'a HistoryId,
    /// Number of the revision that decided.
    pub revision: u64,
    /// Digest of the snapshot that decided, as text.
    pub snapshot_digest: &'a str,
    /// Time since the snapshot was known to be the newest.
    pub snapshot_age_ms: u64,
    /// Time from the request's arrival in the service to the decision.
    pub latency_ns: u64,
}

/// The outcome of an administrative act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActOutcome {
    /// The act was carried out.
    Accepted,
    /// Nothing was changed.
    Refused,
    /// The store failed during the commit. The act may or may not have been carried out.
    Unknown,
}

impl ActOutcome {
    /// The name in the record.
    pub fn as_str(self) -> &'static str {
        match self {
            ActOutcome::Accepted => "ACCEPTED",
            ActOutcome::Refused => "REFUSED",
            ActOutcome::Unknown => "UNKNOWN",
        }
    }
}

/// The record of one administrative act, accepted or refused.
#[derive(Clone, Copy, Debug)]
pub struct ActRecord<'a> {
    /// Time of the act.
    pub time_unix_ns: i64,
    /// Full gRPC path of an existing method.
    pub method: &'a str,
    /// The operators whose signatures were verified.
    pub operators: &'a [String],
    /// Their signatures. They are written only for an accepted act, because a signature of a refused act could still be
    /// presented.
    pub signatures: &'a [String],
    /// The outcome.
    pub outcome: ActOutcome,
    /// The status code of the refusal, as on the wire; `OK` if the act was not refused.
    pub code: &'static str,
    /// The operators' reason, or the cause of the refusal.
    pub reason: &'a str,
    /// The revision that the act made or waited for, `HISTORY.NUMBER`.
    pub revision: Option<&'a str>,
    /// Whether the act was committed to the store.
    pub committed: bool,
    /// The address or identity of the client.
    pub peer: &'a str,
}

impl ChainFragment {
    /// Serializes the facts that are constant for a chain.
    pub fn new(facts: &ChainFacts<'_>) -> Self {
        // Starts with a brace, because `json_line::write_name` writes no comma after a brace. The brace is cut off below.
        let mut principals = vec![b'{'];
        write_principal(&mut principals, "user", facts.user);
        write_principal(&mut principals, "application", facts.application);
        if !facts.agents.is_empty() {
            json_line::write_name(&mut principals, "agents");
            write_list(&mut principals, facts.agents, |out, agent| write_identity(out, *agent));
        }
        write_principal(&mut principals, "session", facts.session);
        write_principal(&mut principals, "task", facts.task);
        let mut chain = Vec::new();
        if !facts.tokens.is_empty() {
            json_line::write_name(&mut chain, "chain");
            write_list(&mut chain, facts.tokens, write_token);
        }
        Self { principals: principals.get(1..).unwrap_or_default().into(), chain: chain.into() }
    }
}

impl ChainFragment {
    /// Bytes on the heap, reference counts included.
    pub fn heap_bytes(&self) -> usize {
        [&self.principals, &self.chain].into_iter().map(arc_slice_bytes).sum()
    }
}

impl fmt::Debug for ChainFragment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChainFragment").field("bytes", &(self.principals.len() + self.chain.len())).finish()
    }
}

impl DecisionRecord<'_> {
    /// Whether this is a denial of a caller without any verified identity.
    fn has_no_verified_identity(&self) -> bool {
        self.effect == Effect::Deny && self.chain.principals.is_empty() && self.chain.chain.is_empty()
    }

    /// Whether the record may be counted instead of being written: it permits nothing, and its caller proved nothing. A client that
    /// can merely connect, or that overheard a chain, can cause any number of these.
    pub(super) fn may_be_merged(&self) -> bool {
        // A listing and an explanation let no call through, whatever their effect is.
        !self.proved && (self.effect == Effect::Deny || self.method != "Check")
    }

    /// The key, the decision id and the time under which this record is counted if it is merged with others instead of written.
    pub(super) fn as_mergeable(&self) -> MergeableRecord<'_> {
        MergeableRecord {
            kind: MergedKind::Decisions,
            origin: self.agent.map_or_else(|| CallerOrigin::from_caller(self.gateway), |agent| CallerOrigin::Agent(agent.into())),
            method: Cow::Borrowed(self.method),
            effect: self.effect.as_str(),
            reason: self.reason.as_str(),
            decision_id: self.decision_id,
            time_unix_ns: self.time_unix_ns,
        }
    }

    /// Appends the record as one complete line.
    pub(super) fn write_line(&self, node: &str, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"kind\":\"decision\"");
        json_line::write_number_member(out, "time_unix_ns", self.time_unix_ns);
        json_line::write_text_member(out, "node", node);
        json_line::write_text_member(out, "method", self.method);
        json_line::write_text_member(out, "decision_id", self.decision_id);
        let text_bytes_max = if self.has_no_verified_identity() { UNVERIFIED_TEXT_BYTES_MAX } else { usize::MAX };
        if !self.request_id.is_empty() {
            json_line::write_truncated_member(out, "request_id", self.request_id, text_bytes_max);
        }
        if let Some(trace_id) = &self.trace_id {
            json_line::write_name(out, "trace_id");
            json_line::write_hex(out, trace_id);
        }
        self.write_answer(out);
        json_line::write_name(out, "principals");
        out.push(b'{');
        write_tool(out, self.tool, text_bytes_max);
        if self.tool.is_some() && !self.chain.principals.is_empty() {
            out.push(b',');
        }
        out.extend_from_slice(&self.chain.principals);
        out.push(b'}');
        out.extend_from_slice(&self.chain.chain);
        self.write_evidence(out);
        json_line::write_text_member(out, "gateway", self.gateway);
        json_line::write_name(out, "revision");
        write_revision(out, self.history, self.revision);
        json_line::write_text_member(out, "snapshot_digest", self.snapshot_digest);
        json_line::write_number_member(out, "snapshot_age_ms", self.snapshot_age_ms);
        json_line::write_number_member(out, "latency_ns", self.latency_ns);
        out.extend_from_slice(b"}\n");
    }

    fn write_answer(&self, out: &mut Vec<u8>) {
        json_line::write_text_member(out, "effect", self.effect.as_str());
        json_line::write_text_member(out, "reason", self.reason.as_str());
        json_line::write_optional_member(out, "deciding_layer", self.deciding_layer.map(DecisionLayer::as_str));
        if let Some(hop) = self.hop {
            json_line::write_number_member(out, "hop", u64::try_from(hop).unwrap_or(u64::MAX));
        }
        if let Some(matched) = self.matched {
            write_matched(out, matched);
        }
        if let Some(would_be) = self.would_be {
            json_line::write_name(out, "would_be");
            out.push(b'{');
            json_line::write_text_member(out, "effect", would_be.effect.as_str());
            json_line::write_text_member(out, "reason", would_be.reason.as_str());
            json_line::write_optional_member(out, "deciding_layer", would_be.layer.map(DecisionLayer::as_str));
            if let Some(matched) = &would_be.matched {
                write_matched(out, matched);
            }
            out.push(b'}');
        }
    }

    fn write_evidence(&self, out: &mut Vec<u8>) {
        if let Some(digest) = self.arguments_sha256 {
            json_line::write_name(out, "arguments_sha256");
            json_line::write_digest(out, digest);
        }
        json_line::write_optional_member(out, "proof_jti", self.proof_jti);
        json_line::write_optional_member(out, "approval_digest", self.approval_digest);
        if !self.obligations.is_empty() {
            json_line::write_name(out, "obligations");
            write_list(out, self.obligations, |out, obligation| {
                out.push(b'{');
                json_line::write_text_member(out, "kind", &obligation.kind);
                json_line::write_text_member(out, "parameters_json", &obligation.parameters_json);
                out.push(b'}');
            });
        }
    }
}

impl ActRecord<'_> {
    /// Whether the store changed or may have changed. The line of such an act is kept until it can be written.
    pub(super) fn may_have_changed_store(&self) -> bool {
        self.outcome == ActOutcome::Unknown || self.committed
    }

    /// Whether this is a refused act without a verified signature.
    pub(super) fn is_unverified_refusal(&self) -> bool {
        self.may_be_merged() && self.operators.is_empty()
    }

    /// Whether the record may be counted instead of being written: the act was refused. A client that can merely connect can cause any
    /// number of refusals. So can a client with an operator's revoked key, or with a signed act that it overheard.
    pub(super) fn may_be_merged(&self) -> bool {
        self.outcome == ActOutcome::Refused
    }

    /// The key and the time under which this record is counted if it is merged with others instead of written.
    pub(super) fn as_mergeable(&self) -> MergeableRecord<'_> {
        MergeableRecord {
            kind: MergedKind::Acts,
            origin: self.operators.first().map_or_else(
                || CallerOrigin::from_caller(self.peer),
                |operator| CallerOrigin::Operator(operator.as_str().into()),
            ),
            method: Cow::Owned(json_line::truncate_text(self.method, UNVERIFIED_TEXT_BYTES_MAX).to_owned()),
            effect: self.outcome.as_str(),
            reason: self.code,
            decision_id: "",
            time_unix_ns: self.time_unix_ns,
        }
    }

    /// Appends the act as one complete line.
    pub(super) fn write_line(&self, node: &str, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"kind\":\"act\"");
        json_line::write_number_member(out, "time_unix_ns", self.time_unix_ns);
        json_line::write_text_member(out, "node", node);
        json_line::write_truncated_member(out, "method", self.method, UNVERIFIED_TEXT_BYTES_MAX);
        json_line::write_name(out, "operator");
        match self.operators.first() {
            Some(operator) => json_line::write_string(out, operator),
            None => out.extend_from_slice(b"null"),
        }
        json_line::write_list_member(out, "operators", self.operators);
        json_line::write_text_member(out, "effect", self.outcome.as_str());
        let reason_bytes_max =
            if self.is_unverified_refusal() { UNVERIFIED_ACT_SUMMARY_BYTES_MAX } else { ACT_SUMMARY_BYTES_MAX };
        json_line::write_truncated_member(out, "reason", self.reason, reason_bytes_max);
        json_line::write_list_member(out, "signatures", if self.outcome == ActOutcome::Accepted { self.signatures } else { &[] });
        json_line::write_name(out, "revision");
        match self.revision {
            Some(revision) => json_line::write_string(out, revision),
            None => out.extend_from_slice(b"null"),
        }
        json_line::write_text_member(out, "peer", self.peer);
        out.extend_from_slice(b"}\n");
    }
}

/// Appends the first line of a file that follows a lost one, so that a reader of the log knows that records may be missing.
pub(super) fn write_gap_line(node: &str, time_unix_ns: i64, reason: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"kind\":\"gap\"");
    json_line::write_number_member(out, "time_unix_ns", time_unix_ns);
    json_line::write_text_member(out, "node", node);
    json_line::write_text_member(out, "reason", reason);
    out.extend_from_slice(b"}\n");
}

fn write_revision(out: &mut Vec<u8>, history: &HistoryId, number: u64) {
    json_line::write_string(out, history.as_str());
    // The number belongs inside the quotes.
    out.pop();
    out.push(b'.');
    json_line::write_number(out, number.into());
    out.push(b'"');
}

fn write_matched(out: &mut Vec<u8>, matched: &PolicyEntryRef) {
    json_line::write_name(out, "matched");
    out.push(b'{');
    json_line::write_text_member(out, "kind", matched.kind);
    json_line::write_text_member(out, "id", &matched.id);
    json_line::write_text_member(out, "entry", &matched.entry);
    out.push(b'}');
}

fn write_principal(out: &mut Vec<u8>, member: &str, principal: Option<PrincipalFacts<'_>>) {
    if let Some(principal) = principal {
        json_line::write_name(out, member);
        write_identity(out, principal);
    }
}

fn write_tool(out: &mut Vec<u8>, tool: Option<PrincipalFacts<'_>>, bytes_max: usize) {
    if let Some(tool) = tool {
        json_line::write_name(out, "tool");
        out.push(b'{');
        json_line::write_truncated_member(out, "id", tool.id, bytes_max);
        json_line::write_text_member(out, "evidence", tool.evidence.as_str());
        out.push(b'}');
    }
}

fn write_identity(out: &mut Vec<u8>, principal: PrincipalFacts<'_>) {
    out.push(b'{');
    json_line::write_text_member(out, "id", principal.id);
    json_line::write_text_member(out, "evidence", principal.evidence.as_str());
    out.push(b'}');
}

fn write_token(out: &mut Vec<u8>, level: &TokenFacts<'_>) {
    out.push(b'{');
    json_line::write_text_member(out, "jti", level.jti);
    json_line::write_name(out, "hop_hash");
    json_line::write_digest(out, level.hop_hash);
    json_line::write_text_member(out, "holder_thumbprint", level.holder_thumbprint);
    json_line::write_text_member(out, "issuer", level.issuer);
    json_line::write_number_member(out, "expires_at_unix_ms", level.expires_at_unix_s.saturating_mul(1_000));
    out.push(b'}');
}

fn write_list<T>(out: &mut Vec<u8>, items: &[T], mut write: impl FnMut(&mut Vec<u8>, &T)) {
    out.push(b'[');
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        write(out, item);
    }
    out.push(b']');
}
