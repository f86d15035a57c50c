//! The records of the audit log: the facts of a decision and of an administrative act, and their form as a JSON line.
//!
//! All fields are borrowed. Everything that is constant for a chain is serialized once, as a [`Fragment`]. Arguments, tokens and
//! keys have no field here, only their digests. A fact that was not verified is an absent member; nothing is guessed. Members
//! have the names of the protocol, bytes are base64url, and the name of a time ends in its unit. Look next at `recorder.rs`.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use crate::model::decision::{Effect, EntryRef, Evidence, Obligation, WouldBe};
use crate::model::heap::shared_bytes;
use crate::model::limits::{ACT_ACCOUNT_BYTES_MAX, STRANGER_ACCOUNT_BYTES_MAX, STRANGER_TEXT_BYTES_MAX};
use crate::model::reason::{Layer, Reason};
use crate::model::revision::HistoryId;

use super::line;
use super::merge::{Denial, Of, Origin};

/// One identity of a call, and how it was established.
#[derive(Clone, Copy, Debug)]
pub struct Principal<'a> {
    /// The id in its wire form; a user's id is the JSON array `["iss","sub"]`.
    pub id: &'a str,
    /// How the identity was established.
    pub evidence: Evidence,
}

/// One token of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Level<'a> {
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
    pub user: Option<Principal<'a>>,
    /// The application in which the agent runs.
    pub application: Option<Principal<'a>>,
    /// The agents, root to leaf.
    pub agents: &'a [Principal<'a>],
    /// The session, `sid` of the root.
    pub session: Option<Principal<'a>>,
    /// The task, `txn` of the root.
    pub task: Option<Principal<'a>>,
    /// The tokens, root to leaf.
    pub levels: &'a [Level<'a>],
}

/// The serialized [`ChainFacts`] of one chain: built once, kept with the verified chain, and copied into each record.
///
/// The default belongs to an unverified caller.
#[derive(Clone, Default)]
pub struct Fragment {
    /// Members of `principals`, without the braces.
    principals: Arc<[u8]>,
    /// The member `chain` with a comma before it; empty if there are no tokens.
    chain: Arc<[u8]>,
}

/// The record of one decision.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
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
    pub deciding_layer: Option<Layer>,
    /// Index of the token or agent at fault; the root is 0.
    pub hop: Option<usize>,
    /// The policy entry that decided.
    pub matched: Option<&'a EntryRef>,
    /// The decision that documents in shadow would have made; absent if no document is in shadow.
    pub would_be: Option<&'a WouldBe>,
    /// The serialized identities and tokens of the chain.
    pub chain: &'a Fragment,
    /// The requested tool.
    pub tool: Option<Principal<'a>>,
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
    /// The store broke off. The act may or may not have been carried out.
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
pub struct Act<'a> {
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
    /// The revision that the act made, `HISTORY.NUMBER`.
    pub revision: Option<&'a str>,
    /// The address or identity of the client.
    pub peer: &'a str,
}

impl Fragment {
    /// Serializes the facts that are constant for a chain.
    pub fn new(facts: &ChainFacts<'_>) -> Self {
        // Starts with a brace, because `line::name` writes no comma after a brace. The brace is cut off below.
        let mut principals = vec![b'{'];
        write_principal(&mut principals, "user", facts.user);
        write_principal(&mut principals, "application", facts.application);
        if !facts.agents.is_empty() {
            line::name(&mut principals, "agents");
            write_list(&mut principals, facts.agents, |out, agent| write_identity(out, *agent));
        }
        write_principal(&mut principals, "session", facts.session);
        write_principal(&mut principals, "task", facts.task);
        let mut chain = Vec::new();
        if !facts.levels.is_empty() {
            line::name(&mut chain, "chain");
            write_list(&mut chain, facts.levels, write_level);
        }
        Self { principals: principals.get(1..).unwrap_or_default().into(), chain: chain.into() }
    }
}

impl Fragment {
    /// Bytes on the heap, reference counts included.
    pub fn heap_bytes(&self) -> usize {
        [&self.principals, &self.chain].into_iter().map(shared_bytes).sum()
    }
}

impl fmt::Debug for Fragment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fragment").field("bytes", &(self.principals.len() + self.chain.len())).finish()
    }
}

impl Record<'_> {
    /// Whether this is a denial of an unverified caller. A client that can merely connect can cause any number of these.
    pub(super) fn is_of_nobody(&self) -> bool {
        self.effect == Effect::Deny && self.chain.principals.is_empty() && self.chain.chain.is_empty()
    }

    /// The parts of the record that are counted if it is merged.
    pub(super) fn denial(&self) -> Denial<'_> {
        Denial {
            of: Of::Decisions,
            origin: Origin::of(self.gateway),
            method: Cow::Borrowed(self.method),
            reason: self.reason.as_str(),
            decision_id: self.decision_id,
            time_unix_ns: self.time_unix_ns,
        }
    }

    /// Appends the record as one complete line.
    pub(super) fn write(&self, node: &str, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"kind\":\"decision\"");
        line::number_member(out, "time_unix_ns", self.time_unix_ns);
        line::text_member(out, "node", node);
        line::text_member(out, "method", self.method);
        line::text_member(out, "decision_id", self.decision_id);
        let text_bytes_max = if self.is_of_nobody() { STRANGER_TEXT_BYTES_MAX } else { usize::MAX };
        if !self.request_id.is_empty() {
            line::capped_member(out, "request_id", self.request_id, text_bytes_max);
        }
        if let Some(trace_id) = &self.trace_id {
            line::name(out, "trace_id");
            line::hex(out, trace_id);
        }
        self.write_answer(out);
        line::name(out, "principals");
        out.push(b'{');
        write_tool(out, self.tool, text_bytes_max);
        if self.tool.is_some() && !self.chain.principals.is_empty() {
            out.push(b',');
        }
        out.extend_from_slice(&self.chain.principals);
        out.push(b'}');
        out.extend_from_slice(&self.chain.chain);
        self.write_evidence(out);
        line::text_member(out, "gateway", self.gateway);
        line::name(out, "revision");
        write_revision(out, self.history, self.revision);
        line::text_member(out, "snapshot_digest", self.snapshot_digest);
        line::number_member(out, "snapshot_age_ms", self.snapshot_age_ms);
        line::number_member(out, "latency_ns", self.latency_ns);
        out.extend_from_slice(b"}\n");
    }

    fn write_answer(&self, out: &mut Vec<u8>) {
        line::text_member(out, "effect", self.effect.as_str());
        line::text_member(out, "reason", self.reason.as_str());
        line::optional_member(out, "deciding_layer", self.deciding_layer.map(Layer::as_str));
        if let Some(hop) = self.hop {
            line::number_member(out, "hop", u64::try_from(hop).unwrap_or(u64::MAX));
        }
        if let Some(matched) = self.matched {
            write_matched(out, matched);
        }
        if let Some(would_be) = self.would_be {
            line::name(out, "would_be");
            out.push(b'{');
            line::text_member(out, "effect", would_be.effect.as_str());
            line::text_member(out, "reason", would_be.reason.as_str());
            line::optional_member(out, "deciding_layer", would_be.layer.map(Layer::as_str));
            if let Some(matched) = &would_be.matched {
                write_matched(out, matched);
            }
            out.push(b'}');
        }
    }

    fn write_evidence(&self, out: &mut Vec<u8>) {
        if let Some(digest) = self.arguments_sha256 {
            line::name(out, "arguments_sha256");
            line::digest(out, digest);
        }
        line::optional_member(out, "proof_jti", self.proof_jti);
        line::optional_member(out, "approval_digest", self.approval_digest);
        if !self.obligations.is_empty() {
            line::name(out, "obligations");
            write_list(out, self.obligations, |out, obligation| {
                out.push(b'{');
                line::text_member(out, "kind", &obligation.kind);
                line::text_member(out, "parameters_json", &obligation.parameters_json);
                out.push(b'}');
            });
        }
    }
}

impl Act<'_> {
    /// Whether the store changed or may have changed. The line of such an act is kept until it can be written.
    pub(super) fn may_have_changed_the_store(&self) -> bool {
        self.outcome == ActOutcome::Unknown || (self.outcome == ActOutcome::Accepted && self.revision.is_some())
    }

    /// Whether this is a refused act without a verified signature. A client that can merely connect can cause any number of
    /// these.
    pub(super) fn is_of_nobody(&self) -> bool {
        self.outcome == ActOutcome::Refused && self.operators.is_empty()
    }

    /// The parts of the record that are counted if it is merged.
    pub(super) fn denial(&self) -> Denial<'_> {
        Denial {
            of: Of::Acts,
            origin: Origin::of(self.peer),
            method: Cow::Owned(line::capped(self.method, STRANGER_TEXT_BYTES_MAX).to_owned()),
            reason: self.code,
            decision_id: "",
            time_unix_ns: self.time_unix_ns,
        }
    }

    /// Appends the act as one complete line.
    pub(super) fn write(&self, node: &str, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"kind\":\"act\"");
        line::number_member(out, "time_unix_ns", self.time_unix_ns);
        line::text_member(out, "node", node);
        line::capped_member(out, "method", self.method, STRANGER_TEXT_BYTES_MAX);
        line::name(out, "operator");
        match self.operators.first() {
            Some(operator) => line::string(out, operator),
            None => out.extend_from_slice(b"null"),
        }
        line::list_member(out, "operators", self.operators);
        line::text_member(out, "effect", self.outcome.as_str());
        let reason_bytes_max = if self.is_of_nobody() { STRANGER_ACCOUNT_BYTES_MAX } else { ACT_ACCOUNT_BYTES_MAX };
        line::capped_member(out, "reason", self.reason, reason_bytes_max);
        line::list_member(out, "signatures", if self.outcome == ActOutcome::Accepted { self.signatures } else { &[] });
        line::name(out, "revision");
        match self.revision {
            Some(revision) => line::string(out, revision),
            None => out.extend_from_slice(b"null"),
        }
        line::text_member(out, "peer", self.peer);
        out.extend_from_slice(b"}\n");
    }
}

fn write_revision(out: &mut Vec<u8>, history: &HistoryId, number: u64) {
    line::string(out, history.as_str());
    // The number belongs inside the quotes.
    out.pop();
    out.push(b'.');
    line::number(out, number.into());
    out.push(b'"');
}

fn write_matched(out: &mut Vec<u8>, matched: &EntryRef) {
    line::name(out, "matched");
    out.push(b'{');
    line::text_member(out, "kind", matched.kind);
    line::text_member(out, "id", &matched.id);
    line::text_member(out, "entry", &matched.entry);
    out.push(b'}');
}

fn write_principal(out: &mut Vec<u8>, member: &str, principal: Option<Principal<'_>>) {
    if let Some(principal) = principal {
        line::name(out, member);
        write_identity(out, principal);
    }
}

fn write_tool(out: &mut Vec<u8>, tool: Option<Principal<'_>>, bytes_max: usize) {
    if let Some(tool) = tool {
        line::name(out, "tool");
        out.push(b'{');
        line::capped_member(out, "id", tool.id, bytes_max);
        line::text_member(out, "evidence", tool.evidence.as_str());
        out.push(b'}');
    }
}

fn write_identity(out: &mut Vec<u8>, principal: Principal<'_>) {
    out.push(b'{');
    line::text_member(out, "id", principal.id);
    line::text_member(out, "evidence", principal.evidence.as_str());
    out.push(b'}');
}

fn write_level(out: &mut Vec<u8>, level: &Level<'_>) {
    out.push(b'{');
    line::text_member(out, "jti", level.jti);
    line::name(out, "hop_hash");
    line::digest(out, level.hop_hash);
    line::text_member(out, "holder_thumbprint", level.holder_thumbprint);
    line::text_member(out, "issuer", level.issuer);
    line::number_member(out, "expires_at_unix_ms", level.expires_at_unix_s.saturating_mul(1_000));
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
