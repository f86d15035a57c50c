//! The decision function. Its inputs are a verified chain, one call, one snapshot and one point in time. Read this file first.
//!
//! ```text
//! VerifiedChain ─▶ PreparedChain (once per chain and snapshot) ─▶ decide [ same snapshot? ▸ times ▸ revoked? ▸ session limit ▸ policy ] ─▶ Decision
//! ```
//!
//! INVARIANT: this module is pure: no clock, no randomness, no I/O and no log. `now` is an argument, so a recorded decision can be
//! replayed. Its one memory, the clean stamp of a [`PreparedChain`], only skips a check of revocations whose result cannot have changed.
//!
//! Only `service` may call this module: `service` verifies the chain, checks freshness and proof of possession, and records the decision.
//! Look next at `policy/compile/evaluate.rs` for the evaluation of policy, and at `service.rs` for the steps around a decision.

mod explain;
#[cfg(test)]
mod tests;

pub use explain::{FindingRemedy, LayerAnswer, LayerFinding, LayerRemedy, PermitRequirement, explain};

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use crate::model::decision::{Decision, Effect, ShadowDecision};
use crate::model::heap_size::arc_bytes;
use crate::model::mutant::{Mutant, is_active};
use crate::model::reason::Reason;
use crate::model::request::{DelegationSubject, ToolCall};
use crate::model::time::ClockReading;
use crate::policy::{CompiledPolicy, ResolvedSubject};
use crate::revocation::{RevocationEffect, RevocationHit, RevocationKey, TargetRef};
use crate::snapshot::Snapshot;
use crate::token::trust::TrustTable;
use crate::token::{VerificationOptions, VerifiedChain};

/// A [`VerifiedChain`] together with everything that one snapshot derives from it: pre-hashed revocation keys and permission bits.
///
/// The chain was verified against the trust of that snapshot. [`PreparedChain::matches_snapshot`] says whether a later snapshot still uses the same tables.
#[derive(Debug)]
pub struct PreparedChain {
    chain: Arc<VerifiedChain>,
    subject: Arc<DelegationSubject>,
    /// The trust and policy tables that this value was derived from. They are weak pointers, so a cached chain does not keep an old policy
    /// in memory.
    trust: Weak<TrustTable>,
    policy: Weak<CompiledPolicy>,
    permissions: ResolvedSubject,
    /// The permissions under the documents in shadow mode; `None` if there are none.
    shadow_permissions: Option<ResolvedSubject>,
    session_too_long_hop: Option<usize>,
    revocation_targets: Box<[WatchedTarget]>,
    /// The [`clean_stamp`] at which no target of the chain was revoked.
    clean_stamp: AtomicU64,
}

/// One revocation target of the chain. A revocation of any of these targets denies every call of the chain.
#[derive(Debug)]
struct WatchedTarget {
    key: RevocationKey,
    hop: Option<u8>,
    suspended_reason: Reason,
    watermark_reason: Reason,
}

/// The initial value of `clean_stamp`. No index ever has this stamp, so every key is checked on first use.
const NEVER_CLEAN: u64 = u64::MAX;

/// Combines a generation of the index (upper 32 bits) with a snapshot number (lower 32 bits).
///
/// An older snapshot may still see an entry that a newer snapshot sees lifted. The result of a check therefore stays valid only while both
/// numbers stay the same.
fn clean_stamp(generation: u64, number: u64) -> u64 {
    generation << 32 | number & 0xffff_ffff
}

impl PreparedChain {
    /// Prepares a chain for a snapshot. Returns `None` if the chain carries no identities, because it was verified for conformance only.
    pub fn new(chain: Arc<VerifiedChain>, snapshot: &Snapshot) -> Option<Self> {
        let subject = chain.subject()?.clone();
        let life_s = chain.tokens().first().map_or(i64::MAX, |root| root.exp_s.saturating_sub(root.iat_s));
        let session_too_long =
            subject.agents.iter().position(|agent| snapshot.session_lifetime_s_max(agent).is_some_and(|max_s| life_s > max_s));
        Some(Self {
            revocation_targets: watched_targets(&chain, &subject, snapshot),
            permissions: snapshot.policy().resolve(&subject),
            shadow_permissions: snapshot.policy().shadow_policy().map(|policy| policy.resolve(&subject)),
            trust: Arc::downgrade(snapshot.trust()),
            policy: Arc::downgrade(snapshot.policy()),
            clean_stamp: AtomicU64::new(NEVER_CLEAN),
            session_too_long_hop: session_too_long,
            subject,
            chain,
        })
    }

    /// Whether the snapshot still holds the trust and policy tables that this value was prepared with.
    pub fn matches_snapshot(&self, snapshot: &Snapshot) -> bool {
        std::ptr::eq(self.policy.as_ptr(), Arc::as_ptr(snapshot.policy())) && self.matches_trust(snapshot)
    }

    /// Whether the snapshot still holds the trust table that the chain was verified with.
    pub fn matches_trust(&self, snapshot: &Snapshot) -> bool {
        // A weak pointer keeps its allocation reserved, so no other table can have the same address.
        std::ptr::eq(self.trust.as_ptr(), Arc::as_ptr(snapshot.trust()))
    }

    /// Bytes on the heap that belong to this value, including its chain. Data that is shared with policy and trust is not counted.
    pub fn heap_bytes(&self) -> usize {
        let shadow = self.shadow_permissions.as_ref().map_or(0, ResolvedSubject::heap_bytes);
        let chain = arc_bytes::<VerifiedChain>() + self.chain.heap_bytes();
        chain + self.permissions.heap_bytes() + shadow + size_of_val(&*self.revocation_targets)
    }

    /// The verified chain.
    pub fn chain(&self) -> &Arc<VerifiedChain> {
        &self.chain
    }

    /// The identities and scopes of the chain.
    pub fn subject(&self) -> &Arc<DelegationSubject> {
        &self.subject
    }
}

/// Decides one call.
///
/// An unconditional permit allocates nothing. `prepared` must fit the snapshot ([`PreparedChain::matches_snapshot`]); otherwise the call is denied.
pub fn decide(prepared: &PreparedChain, call: &ToolCall<'_>, snapshot: &Snapshot, now: ClockReading) -> Decision {
    let number = snapshot.revision().number;
    if let Some(denial) = deny_before_policy(prepared, Some(call.tool), snapshot, now) {
        return denial;
    }
    let verdict = snapshot.policy().evaluate(&prepared.permissions, &prepared.subject, call);
    Decision {
        effect: verdict.effect,
        reason: verdict.reason,
        layer: verdict.layer,
        hop: verdict.hop,
        matched: verdict.matched,
        approvals: verdict.approvals,
        prepared_needs: verdict.prepared,
        shadow_decision: decide_shadow(prepared, call, snapshot),
        obligations: verdict.obligations,
        revision: number,
    }
}

/// Evaluates the call as if the documents in shadow mode were in force. The result is recorded and never enforced.
fn decide_shadow(prepared: &PreparedChain, call: &ToolCall<'_>, snapshot: &Snapshot) -> Option<Box<ShadowDecision>> {
    let verdict = snapshot.policy().shadow_policy()?.evaluate(prepared.shadow_permissions.as_ref()?, &prepared.subject, call);
    let (effect, reason, layer, matched) = (verdict.effect, verdict.reason, verdict.layer, verdict.matched);
    Some(Box::new(ShadowDecision { effect, reason, layer, matched }))
}

/// The best result that a chain can reach for one tool, over all possible arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ToolReach {
    /// The effect. If `depends_on_arguments` is set, this is the best effect that some arguments reach.
    pub effect: Effect,
    /// The reason for the effect.
    pub reason: Reason,
    /// Whether the result depends on the arguments.
    pub depends_on_arguments: bool,
}

/// Computes the result of [`decide`] for a tool as far as it is known without arguments.
pub fn evaluate_reach(prepared: &PreparedChain, tool: &str, snapshot: &Snapshot, now: ClockReading) -> ToolReach {
    if let Some(denial) = deny_before_policy(prepared, Some(tool), snapshot, now) {
        return ToolReach { effect: denial.effect, reason: denial.reason, depends_on_arguments: false };
    }
    let reached = snapshot.policy().tool_reach(&prepared.permissions, &prepared.subject, tool);
    ToolReach { effect: reached.effect, reason: reached.reason, depends_on_arguments: reached.depends_on_arguments }
}

/// Returns the denial that applies to every tool, from the checks before policy; `None` if these checks pass.
pub fn deny_all_tools(prepared: &PreparedChain, snapshot: &Snapshot, now: ClockReading) -> Option<Decision> {
    deny_before_policy(prepared, None, snapshot, now)
}

/// Returns the denial of a chain that is void whatever policy says, because of its times or a revocation; `None` if the chain is valid.
pub fn deny_void_chain(prepared: &PreparedChain, snapshot: &Snapshot, now: ClockReading) -> Option<Decision> {
    deny_void_chain_for_tool(prepared, None, snapshot, now)
}

/// Runs the checks that come before policy: the times of the chain, revocations, and the session limits of the agents. [`explain`] repeats
/// these checks, so a check that is added here must be added there.
fn deny_before_policy(prepared: &PreparedChain, tool: Option<&str>, snapshot: &Snapshot, now: ClockReading) -> Option<Decision> {
    let too_long = |hop| Decision::deny(Reason::TokenLifetime, snapshot.revision().number).with_hop(Some(hop));
    deny_void_chain_for_tool(prepared, tool, snapshot, now).or_else(|| prepared.session_too_long_hop.map(too_long))
}

fn deny_void_chain_for_tool(
    prepared: &PreparedChain,
    tool: Option<&str>,
    snapshot: &Snapshot,
    now: ClockReading,
) -> Option<Decision> {
    let number = snapshot.revision().number;
    if !prepared.matches_snapshot(snapshot) {
        return Some(Decision::deny(Reason::RevisionUnavailable, number));
    }
    let options = VerificationOptions { iat_skew_s: snapshot.iat_skew_s(), ..VerificationOptions::default() };
    if let Err(rejection) = prepared.chain.check_times(now, &options) {
        return Some(Decision::deny(rejection.reason, number).with_hop(rejection.hop));
    }
    deny_revoked(prepared, tool, snapshot)
}

/// Checks revocations: every identity and every hop, on every call, for cached chains too.
fn deny_revoked(prepared: &PreparedChain, tool: Option<&str>, snapshot: &Snapshot) -> Option<Decision> {
    let index = snapshot.revocations();
    let number = snapshot.revision().number;
    let root_iat_s = prepared.chain.root_iat_s();
    // INVARIANT: the generation is read before the keys are looked up. An entry that is added in between then moves the generation past the
    // value read here.
    let stamp = if is_active(Mutant::CleanForever) { 0 } else { clean_stamp(index.generation(), number) };
    if prepared.clean_stamp.load(Ordering::Acquire) != stamp {
        for watched in &prepared.revocation_targets {
            if let Some(hit) = index.find_hit(watched.key, root_iat_s, number) {
                let reason =
                    if hit.effect == RevocationEffect::Watermark { watched.watermark_reason } else { watched.suspended_reason };
                return Some(denial_for_hit(&hit, reason, number).with_hop(watched.hop()));
            }
        }
        prepared.clean_stamp.store(stamp, Ordering::Release);
    }
    let hit = index.find_hit(index.key(TargetRef::Tool(tool?)), root_iat_s, number)?;
    Some(denial_for_hit(&hit, Reason::ToolSuspended, number))
}

/// Denies by an index hit. A revocation takes effect before a snapshot of its revision exists, so the answer names the later revision of
/// the two.
fn denial_for_hit(hit: &RevocationHit, reason: Reason, number: u64) -> Decision {
    Decision::deny(reason, number.max(hit.revision))
}

impl WatchedTarget {
    fn hop(&self) -> Option<usize> {
        self.hop.map(usize::from)
    }
}

fn watched_targets(chain: &VerifiedChain, subject: &DelegationSubject, snapshot: &Snapshot) -> Box<[WatchedTarget]> {
    let index = snapshot.revocations();
    let mut watched = Vec::with_capacity(6 + 5 * chain.tokens().len());
    let mut watch = |target: TargetRef<'_>, hop: Option<usize>, suspended: Reason, watermark: Reason| {
        let hop = hop.and_then(|hop| u8::try_from(hop).ok());
        watched.push(WatchedTarget { key: index.key(target), hop, suspended_reason: suspended, watermark_reason: watermark });
    };
    let (issuer, user) = (subject.user.issuer.as_str(), &*subject.user.subject);
    watch(TargetRef::All, None, Reason::RevokedAll, Reason::RevokedAll);
    watch(TargetRef::User { issuer, subject: user }, None, Reason::UserSuspended, Reason::RevokedUser);
    watch(TargetRef::Application(subject.application.as_str()), None, Reason::ApplicationSuspended, Reason::RevokedApplication);
    for (hop, agent) in subject.agents.iter().map(|agent| agent.as_str()).enumerate() {
        watch(TargetRef::Agent(agent), Some(hop), Reason::AgentSuspended, Reason::RevokedAgent);
        let delegation = TargetRef::Delegation { issuer, subject: user, agent };
        watch(delegation, Some(hop), Reason::RevokedDelegation, Reason::RevokedDelegation);
    }
    watch(TargetRef::Session(subject.session.as_str()), None, Reason::RevokedSession, Reason::RevokedSession);
    watch(TargetRef::Task(subject.task.as_str()), None, Reason::RevokedTask, Reason::RevokedTask);
    watch(TargetRef::Key(chain.issuer_key_thumbprint()), Some(0), Reason::RevokedKey, Reason::RevokedKey);
    for (hop, level) in chain.tokens().iter().enumerate() {
        watch(TargetRef::Key(level.holder.thumbprint().as_str()), Some(hop), Reason::RevokedKey, Reason::RevokedKey);
        watch(TargetRef::Token(&level.jti), Some(hop), Reason::RevokedToken, Reason::RevokedToken);
        watch(TargetRef::Hop(&level.hop_hash()), Some(hop), Reason::RevokedToken, Reason::RevokedToken);
    }
    watched.into_boxed_slice()
}
