//! What a line of the audit log says: the facts of a decision and of an administrative act.
//!
//! All fields are borrowed and everything constant for a chain is serialized once, as a [`Fragment`]. Arguments, tokens and
//! keys have no field here, only their digests. Absent facts are absent members: what was not verified is not guessed.
//! Members are named as in the protocol, bytes are base64url, times end in their unit. Look next at `recorder.rs`.

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

/// One identity of a call and how it was established.
#[derive(Clone, Copy, Debug)]
pub struct Principal<'a> {
    /// In its wire form; a user's is the JSON array `["iss","sub"]`.
    pub id: &'a str,
    /// How it was established.
    pub evidence: Evidence,
}

/// One token of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Level<'a> {
    /// The token's `jti`.
    pub jti: &'a str,
    /// SHA-256 of the token's signing input: what `revoke hop` names.
    pub hop_hash: &'a [u8; 32],
    /// Thumbprint of the key that holds the token.
    pub holder_thumbprint: &'a str,
    /// The token's `iss`.
    pub issuer: &'a str,
    /// The token's `exp`.
    pub expires_at_unix_s: i64,
}

/// Everything about a chain that is the same in each of its calls.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChainFacts<'a> {
    /// Who delegated.
    pub user: Option<Principal<'a>>,
    /// Inside which application.
    pub application: Option<Principal<'a>>,
    /// Root to leaf.
    pub agents: &'a [Principal<'a>],
    /// The session.
    pub session: Option<Principal<'a>>,
    /// The task.
    pub task: Option<Principal<'a>>,
    /// The tokens, root to leaf.
    pub levels: &'a [Level<'a>],
}

/// The serialized [`ChainFacts`] of one chain: built once, kept with the verified chain, copied into each record.
///
/// The default is that of a caller of whom nothing was verified.
#[derive(Clone, Default)]
pub struct Fragment {
    /// Members of `principals`, without the braces.
    principals: Arc<[u8]>,
    /// The member `chain` with a comma before it, or nothing.
    chain: Arc<[u8]>,
}

/// One decision, permit or not.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// When it was decided.
    pub time_unix_ns: i64,
    /// The call: `Check`, `ListTools`, `Explain`.
    pub method: &'static str,
    /// Unique; the answer carries it too.
    pub decision_id: &'a str,
    /// The caller's; empty where it gave none.
    pub request_id: &'a str,
    /// The trace that the caller is in (W3C Trace Context).
    pub trace_id: Option<[u8; 16]>,
    /// What was answered.
    pub effect: Effect,
    /// Why.
    pub reason: Reason,
    /// The layer that gave the least answer.
    pub deciding_layer: Option<Layer>,
    /// Index of the token or agent at fault, root 0.
    pub hop: Option<usize>,
    /// The policy entry that decided.
    pub matched: Option<&'a EntryRef>,
    /// What documents in shadow would have made of it; absent where there are none.
    pub would_be: Option<&'a WouldBe>,
    /// The identities and tokens of the chain.
    pub chain: &'a Fragment,
    /// The tool asked for.
    pub tool: Option<Principal<'a>>,
    /// SHA-256 of the arguments' canonical form.
    pub arguments_sha256: Option<&'a [u8; 32]>,
    /// The proof of possession's `jti`.
    pub proof_jti: Option<&'a str>,
    /// What an approval was asked for or used on.
    pub approval_digest: Option<&'a str>,
    /// Duties that came with the permit.
    pub obligations: &'a [Obligation],
    /// Who asked: the gateway's identity, or its address where it has none.
    pub gateway: &'a str,
    /// The history that the revision belongs to.
    pub history: &'a HistoryId,
    /// Number of the revision that decided.
    pub revision: u64,
    /// Digest of the snapshot that decided, as text.
    pub snapshot_digest: &'a str,
    /// How long ago the snapshot was known to be the newest.
    pub snapshot_age_ms: u64,
    /// From the request's arrival in the service to the decision.
    pub latency_ns: u64,
}

/// How an administrative act ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActOutcome {
    /// It was done.
    Accepted,
    /// Nothing was done.
    Refused,
    /// The store broke off while it was done: it may or may not have been.
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

/// One administrative act, accepted or refused.
#[derive(Clone, Copy, Debug)]
pub struct Act<'a> {
    /// When.
    pub time_unix_ns: i64,
    /// Full gRPC method path, of those that there are.
    pub method: &'a str,
    /// The operators whose signatures were verified.
    pub operators: &'a [String],
    /// Their signatures; written only of an act that was accepted, for one of a refused act could still be presented.
    pub signatures: &'a [String],
    /// How it ended.
    pub outcome: ActOutcome,
    /// What kind of refusal it was, as on the wire; `OK` where it was none.
    pub code: &'static str,
    /// The operators' reason, or why the act was refused.
    pub reason: &'a str,
    /// The revision that the act made, `HISTORY.NUMBER`.
    pub revision: Option<&'a str>,
    /// From where it came.
    pub peer: &'a str,
}

impl Fragment {
    /// Serializes what is constant for a chain.
    pub fn new(facts: &ChainFacts<'_>) -> Self {
        // The opening brace is what tells `line::name` that no comma is due; it is cut off again.
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
    /// Bytes on the heap, counters included.
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
    /// Whether it is a denial and nothing was verified of who asked: whoever can connect can make any number of these.
    pub(super) fn is_of_nobody(&self) -> bool {
        self.effect == Effect::Deny && self.chain.principals.is_empty() && self.chain.chain.is_empty()
    }

    /// What is counted of it where it is merged.
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

    /// Appends the record as one line with its end.
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
    /// Whether the store changed, or may have: the line is kept until it can be written.
    pub(super) fn may_have_changed_the_store(&self) -> bool {
        self.outcome == ActOutcome::Unknown || (self.outcome == ActOutcome::Accepted && self.revision.is_some())
    }

    /// Whether it was refused and nobody's signature was verified: whoever can connect can make any number of these.
    pub(super) fn is_of_nobody(&self) -> bool {
        self.outcome == ActOutcome::Refused && self.operators.is_empty()
    }

    /// What is counted of it where it is merged.
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

    /// Appends the act as one line with its end.
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
