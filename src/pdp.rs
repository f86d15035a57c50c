//! The decision function. Its inputs are a verified chain, one call, one snapshot and one point in time. Read this file first.
//!
//! ```text
//! VerifiedChain ─▶ Prepared (once per chain and snapshot) ─▶ decide [ times ▸ revoked? ▸ narrow ▸ decide ] ─▶ Decision
//! ```
//!
//! INVARIANT: this module is pure. It uses no clock, no randomness, no I/O and no log. `now` is an argument, so a recorded decision can be
//! replayed.
//!
//! Only `service` may call this module: `service` verifies the chain, checks freshness and proof of possession, and records the decision.
//! Look next at `policy/compile/evaluate.rs` for the evaluation of policy, and at `service.rs` for the steps around a decision.

mod explain;

pub use explain::{Finding, LayerAnswer, Mend, Need, Turn, explain};

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use crate::model::decision::{Decision, Effect, WouldBe};
use crate::model::heap::arc_bytes;
use crate::model::mutant::{Mutant, active};
use crate::model::reason::Reason;
use crate::model::request::{Call, Subject};
use crate::model::time::Now;
use crate::policy::{Compiled, Resolved};
use crate::revocation::{Hit, HitMeaning, Key, TargetRef};
use crate::snapshot::Snapshot;
use crate::token::trust::Trust;
use crate::token::{Options, VerifiedChain};

/// A [`VerifiedChain`] together with everything that one snapshot derives from it: pre-hashed revocation keys and permission bits.
///
/// The chain was verified against the trust of that snapshot. [`Prepared::fits`] says whether a later snapshot still uses the same tables.
#[derive(Debug)]
pub struct Prepared {
    chain: Arc<VerifiedChain>,
    subject: Arc<Subject>,
    /// The trust and policy tables that this value was derived from. They are weak pointers, so a cached chain does not keep an old policy
    /// in memory.
    trust: Weak<Trust>,
    policy: Weak<Compiled>,
    permissions: Resolved,
    /// The permissions under the documents in shadow mode; `None` if there are none.
    would_be: Option<Resolved>,
    session_too_long: Option<usize>,
    watched: Box<[Watched]>,
    clean_at: AtomicU64,
}

/// One revocation target of the chain. A revocation of any of these targets denies every call of the chain.
#[derive(Debug)]
struct Watched {
    key: Key,
    hop: Option<u8>,
    suspended: Reason,
    watermark: Reason,
}

/// The initial value of `clean_at`. No index ever has this stamp, so every key is checked on first use.
const NEVER_CLEAN: u64 = u64::MAX;

/// Combines a generation of the index (upper 32 bits) with a snapshot number (lower 32 bits).
///
/// An older snapshot may still see an entry that a newer snapshot sees lifted. The result of a check therefore stays valid only while both
/// numbers stay the same.
fn moment(generation: u64, number: u64) -> u64 {
    generation << 32 | number & 0xffff_ffff
}

impl Prepared {
    /// Prepares a chain for a snapshot. Returns `None` if the chain carries no identities, because it was verified for conformance only.
    pub fn new(chain: Arc<VerifiedChain>, snapshot: &Snapshot) -> Option<Self> {
        let subject = chain.subject()?.clone();
        let life_s = chain.levels().first().map_or(i64::MAX, |root| root.exp_s.saturating_sub(root.iat_s));
        let session_too_long =
            subject.agents.iter().position(|agent| snapshot.session_lifetime_s_max(agent).is_some_and(|max_s| life_s > max_s));
        Some(Self {
            watched: watched(&chain, &subject, snapshot),
            permissions: snapshot.policy().resolve(&subject),
            would_be: snapshot.policy().would_be().map(|policy| policy.resolve(&subject)),
            trust: Arc::downgrade(snapshot.trust()),
            policy: Arc::downgrade(snapshot.policy()),
            clean_at: AtomicU64::new(NEVER_CLEAN),
            session_too_long,
            subject,
            chain,
        })
    }

    /// Whether the snapshot still holds the trust and policy tables that this value was prepared with.
    pub fn fits(&self, snapshot: &Snapshot) -> bool {
        std::ptr::eq(self.policy.as_ptr(), Arc::as_ptr(snapshot.policy())) && self.is_trusted_by(snapshot)
    }

    /// Whether the snapshot still holds the trust table that the chain was verified with.
    pub fn is_trusted_by(&self, snapshot: &Snapshot) -> bool {
        // A weak pointer keeps its allocation reserved, so no other table can have the same address.
        std::ptr::eq(self.trust.as_ptr(), Arc::as_ptr(snapshot.trust()))
    }

    /// Bytes on the heap that belong to this value, including its chain. Data that is shared with policy and trust is not counted.
    pub fn heap_bytes(&self) -> usize {
        let would_be = self.would_be.as_ref().map_or(0, Resolved::heap_bytes);
        let chain = arc_bytes::<VerifiedChain>() + self.chain.heap_bytes();
        chain + self.permissions.heap_bytes() + would_be + size_of_val(&*self.watched)
    }

    /// The verified chain.
    pub fn chain(&self) -> &Arc<VerifiedChain> {
        &self.chain
    }

    /// The identities and scopes of the chain.
    pub fn subject(&self) -> &Arc<Subject> {
        &self.subject
    }
}

/// Decides one call.
///
/// An unconditional permit allocates nothing. `prepared` must fit the snapshot ([`Prepared::fits`]); otherwise the call is denied.
pub fn decide(prepared: &Prepared, call: &Call<'_>, snapshot: &Snapshot, now: Now) -> Decision {
    let number = snapshot.revision().number;
    if let Some(denial) = barred(prepared, Some(call.tool), snapshot, now) {
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
        prepared: verdict.prepared,
        would_be: would_be(prepared, call, snapshot),
        obligations: verdict.obligations,
        revision: number,
    }
}

/// Evaluates the call as if the documents in shadow mode were in force. The result is recorded and never enforced.
fn would_be(prepared: &Prepared, call: &Call<'_>, snapshot: &Snapshot) -> Option<Box<WouldBe>> {
    let verdict = snapshot.policy().would_be()?.evaluate(prepared.would_be.as_ref()?, &prepared.subject, call);
    let (effect, reason, layer, matched) = (verdict.effect, verdict.reason, verdict.layer, verdict.matched);
    Some(Box::new(WouldBe { effect, reason, layer, matched }))
}

/// The best result that a chain can reach for one tool, over all possible arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// The effect. If `maybe` is set, this is the best effect that some arguments reach.
    pub effect: Effect,
    /// The reason for the effect.
    pub reason: Reason,
    /// Whether the result depends on the arguments.
    pub maybe: bool,
}

/// Computes the result of [`decide`] for a tool as far as it is known without arguments.
pub fn reach(prepared: &Prepared, tool: &str, snapshot: &Snapshot, now: Now) -> Reach {
    if let Some(denial) = barred(prepared, Some(tool), snapshot, now) {
        return Reach { effect: denial.effect, reason: denial.reason, maybe: false };
    }
    let reached = snapshot.policy().reach(&prepared.permissions, &prepared.subject, tool);
    Reach { effect: reached.effect, reason: reached.reason, maybe: reached.maybe }
}

/// Returns the denial that applies to every tool, from the checks before policy; `None` if these checks pass.
pub fn barred_from_all(prepared: &Prepared, snapshot: &Snapshot, now: Now) -> Option<Decision> {
    barred(prepared, None, snapshot, now)
}

/// Returns the denial of a chain that is void whatever policy says, because of its times or a revocation; `None` if the chain is valid.
pub fn voided(prepared: &Prepared, snapshot: &Snapshot, now: Now) -> Option<Decision> {
    voided_for(prepared, None, snapshot, now)
}

/// Runs the checks that come before policy: the times of the chain, revocations, and the session limits of the agents.
fn barred(prepared: &Prepared, tool: Option<&str>, snapshot: &Snapshot, now: Now) -> Option<Decision> {
    let too_long = |hop| Decision::deny(Reason::TokenLifetime, snapshot.revision().number).at_hop(Some(hop));
    voided_for(prepared, tool, snapshot, now).or_else(|| prepared.session_too_long.map(too_long))
}

fn voided_for(prepared: &Prepared, tool: Option<&str>, snapshot: &Snapshot, now: Now) -> Option<Decision> {
    let number = snapshot.revision().number;
    if !prepared.fits(snapshot) {
        return Some(Decision::deny(Reason::RevisionUnavailable, number));
    }
    let options = Options { iat_skew_s: snapshot.iat_skew_s(), ..Options::default() };
    if let Err(rejection) = prepared.chain.check_times(now, &options) {
        return Some(Decision::deny(rejection.reason, number).at_hop(rejection.hop));
    }
    revoked(prepared, tool, snapshot)
}

/// Checks revocations: every identity and every hop, on every call, for cached chains too.
fn revoked(prepared: &Prepared, tool: Option<&str>, snapshot: &Snapshot) -> Option<Decision> {
    let index = snapshot.revocations();
    let number = snapshot.revision().number;
    let root_iat_s = prepared.chain.root_iat_s();
    // INVARIANT: the generation is read before the keys are looked up. An entry that is added in between then moves the generation past the
    // value read here.
    let moment = if active(Mutant::CleanForever) { 0 } else { moment(index.generation(), number) };
    if prepared.clean_at.load(Ordering::Acquire) != moment {
        for watched in &prepared.watched {
            if let Some(hit) = index.hit(watched.key, root_iat_s, number) {
                let reason = if hit.meaning == HitMeaning::Watermark { watched.watermark } else { watched.suspended };
                return Some(deny_by(&hit, reason, number).at_hop(watched.hop()));
            }
        }
        prepared.clean_at.store(moment, Ordering::Release);
    }
    let hit = index.hit(index.key(TargetRef::Tool(tool?)), root_iat_s, number)?;
    Some(deny_by(&hit, Reason::ToolSuspended, number))
}

/// Denies by an index hit. A revocation takes effect before a snapshot of its revision exists, so the answer names the later revision of
/// the two.
fn deny_by(hit: &Hit, reason: Reason, number: u64) -> Decision {
    Decision::deny(reason, number.max(hit.revision))
}

impl Watched {
    fn hop(&self) -> Option<usize> {
        self.hop.map(usize::from)
    }
}

fn watched(chain: &VerifiedChain, subject: &Subject, snapshot: &Snapshot) -> Box<[Watched]> {
    let index = snapshot.revocations();
    let mut watched = Vec::with_capacity(6 + 5 * chain.levels().len());
    let mut watch = |target: TargetRef<'_>, hop: Option<usize>, suspended: Reason, watermark: Reason| {
        let hop = hop.and_then(|hop| u8::try_from(hop).ok());
        watched.push(Watched { key: index.key(target), hop, suspended, watermark });
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
    watch(TargetRef::Key(chain.issuer_key()), Some(0), Reason::RevokedKey, Reason::RevokedKey);
    for (hop, level) in chain.levels().iter().enumerate() {
        watch(TargetRef::Key(level.holder.thumbprint().as_str()), Some(hop), Reason::RevokedKey, Reason::RevokedKey);
        watch(TargetRef::Token(&level.jti), Some(hop), Reason::RevokedToken, Reason::RevokedToken);
        watch(TargetRef::Hop(&level.hop_hash()), Some(hop), Reason::RevokedToken, Reason::RevokedToken);
    }
    watched.into_boxed_slice()
}
