//! The decision: a verified chain, one call, one snapshot, one moment. The file to read first.
//!
//! ```text
//! VerifiedChain ─▶ Prepared (once per chain and snapshot) ─▶ decide [ times ▸ revoked? ▸ narrow ▸ decide ] ─▶ Decision
//! ```
//!
//! INVARIANT: pure. No clock, no randomness, no I/O, no log: `now` is an argument, so a recorded decision can be replayed.
//! Must not be reached but through `service`, which verifies, checks freshness and proof, and records what comes out.
//! Look next at `policy/compile/evaluate.rs` for the narrowing and at `service.rs` for what surrounds a decision.

mod explain;

pub use explain::{Finding, Mend, Need, Turn, explain};

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

/// A [`VerifiedChain`] with what one snapshot makes of it: pre-hashed revocation keys and permission bits.
///
/// Verified against the snapshot's trust; [`Prepared::fits`] says whether a later snapshot still agrees.
#[derive(Debug)]
pub struct Prepared {
    chain: Arc<VerifiedChain>,
    subject: Arc<Subject>,
    /// The tables by which this was made, to know them again: a chain that is kept does not keep an old policy in memory.
    trust: Weak<Trust>,
    policy: Weak<Compiled>,
    permissions: Resolved,
    /// What the documents in shadow would make of it; `None` where there are none.
    would_be: Option<Resolved>,
    session_too_long: Option<usize>,
    watched: Box<[Watched]>,
    clean_at: AtomicU64,
}

/// One thing whose revocation kills the chain.
#[derive(Debug)]
struct Watched {
    key: Key,
    hop: Option<u8>,
    suspended: Reason,
    watermark: Reason,
}

/// A moment that no index has: nothing is known to be clean yet.
const NEVER_CLEAN: u64 = u64::MAX;

/// A generation of the index as a snapshot of some number sees it, 32 bits of each: an older snapshot may still see what a
/// newer one sees lifted, so both must be the same for clean keys to be clean still.
fn moment(generation: u64, number: u64) -> u64 {
    generation << 32 | number & 0xffff_ffff
}

impl Prepared {
    /// Prepares a chain for a snapshot; `None` if it carries no identities (it was verified for conformance only).
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

    /// Whether the snapshot trusts and permits by the very tables that this was prepared with.
    pub fn fits(&self, snapshot: &Snapshot) -> bool {
        std::ptr::eq(self.policy.as_ptr(), Arc::as_ptr(snapshot.policy())) && self.is_trusted_by(snapshot)
    }

    /// Whether the snapshot trusts by the very table that the chain was verified with.
    pub fn is_trusted_by(&self, snapshot: &Snapshot) -> bool {
        // A weak pointer keeps its place taken, so no other table can stand there.
        std::ptr::eq(self.trust.as_ptr(), Arc::as_ptr(snapshot.trust()))
    }

    /// Bytes on the heap that are its own, the chain included: what policy and trust hold is not.
    pub fn heap_bytes(&self) -> usize {
        let would_be = self.would_be.as_ref().map_or(0, Resolved::heap_bytes);
        let chain = arc_bytes::<VerifiedChain>() + self.chain.heap_bytes();
        chain + self.permissions.heap_bytes() + would_be + size_of_val(&*self.watched)
    }

    /// The chain.
    pub fn chain(&self) -> &Arc<VerifiedChain> {
        &self.chain
    }

    /// Who it speaks for.
    pub fn subject(&self) -> &Arc<Subject> {
        &self.subject
    }
}

/// Decides one call.
///
/// Allocates nothing where the answer is an unconditional permit. `Prepared` must fit the snapshot; one that does not is denied.
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

/// What would be decided were the documents in shadow in force. Nobody enforces it.
fn would_be(prepared: &Prepared, call: &Call<'_>, snapshot: &Snapshot) -> Option<Box<WouldBe>> {
    let verdict = snapshot.policy().would_be()?.evaluate(prepared.would_be.as_ref()?, &prepared.subject, call);
    let (effect, reason, layer, matched) = (verdict.effect, verdict.reason, verdict.layer, verdict.matched);
    Some(Box::new(WouldBe { effect, reason, layer, matched }))
}

/// What a chain can reach of one tool, whatever the arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// The effect; with `maybe` the best that arguments can reach.
    pub effect: Effect,
    /// Why.
    pub reason: Reason,
    /// Arguments decide.
    pub maybe: bool,
}

/// Says for a tool what [`decide`] would, before the arguments are known.
pub fn reach(prepared: &Prepared, tool: &str, snapshot: &Snapshot, now: Now) -> Reach {
    if let Some(denial) = barred(prepared, Some(tool), snapshot, now) {
        return Reach { effect: denial.effect, reason: denial.reason, maybe: false };
    }
    let reached = snapshot.policy().reach(&prepared.permissions, &prepared.subject, tool);
    Reach { effect: reached.effect, reason: reached.reason, maybe: reached.maybe }
}

/// Why a chain may call nothing at all, whatever the tool; `None` if it may.
pub fn barred_from_all(prepared: &Prepared, snapshot: &Snapshot, now: Now) -> Option<Decision> {
    barred(prepared, None, snapshot, now)
}

/// Why a chain is good for nothing any more, by its times and the kill switch, whatever policy says; `None` if it is not.
pub fn voided(prepared: &Prepared, snapshot: &Snapshot, now: Now) -> Option<Decision> {
    voided_for(prepared, None, snapshot, now)
}

/// What stands before policy: the times of the chain, the kill switch, the agents' session limits.
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

/// The kill switch: every identity and every hop, on every call, cached or not.
fn revoked(prepared: &Prepared, tool: Option<&str>, snapshot: &Snapshot) -> Option<Decision> {
    let index = snapshot.revocations();
    let number = snapshot.revision().number;
    let root_iat_s = prepared.chain.root_iat_s();
    // INVARIANT: read before the keys are asked for, so an entry that comes in between moves the generation past this one.
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

/// A revocation takes effect before a snapshot of its revision exists: the answer names the later of the two.
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
