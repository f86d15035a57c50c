//! Tests of what precedes policy: the tables that a chain was prepared with, its times, and everything whose revocation denies it.

use bytes::Bytes;
use serde_json::{Value, json};

use super::*;
use crate::model::json::JsonObject;
use crate::model::revision::{HistoryId, Revision, StateDigest};
use crate::model::rows::{DocumentOrigin, DocumentRow, RevocationRow, RevocationTarget, RowChange};
use crate::policy::source::{SourceFile, parse_files};
use crate::revocation::RevocationIndex;
use crate::snapshot::{FullState, SnapshotBuilder};
use crate::token::{PrivateKey, issue, verify};

const START_S: i64 = 1_704_067_200;
const ISSUER: &str = "https://i.example";
const TOOL: &str = "crm/read";
const AGENTS: [&str; 2] = ["spiffe://a.example/0", "spiffe://a.example/1"];
const SKEW_S: i64 = 5;

fn key(seed: u8) -> PrivateKey {
    PrivateKey::from_seed([seed; 32]).unwrap()
}

fn thumbprint(seed: u8) -> String {
    key(seed).public_key().thumbprint().to_string()
}

fn at(unix_s: i64) -> ClockReading {
    ClockReading { unix_ns: unix_s * 1_000_000_000, boot_ns: 0 }
}

fn rows(policy: &str) -> Vec<DocumentRow> {
    let parsed = parse_files(&[SourceFile { path: "p.yaml".to_owned(), content: policy.as_bytes().to_vec() }]);
    assert_eq!(parsed.diagnostics, []);
    parsed.documents.iter().map(|document| document.to_row(DocumentOrigin::Folder)).collect()
}

/// A replica at revision 1, and a chain of two tokens that it has prepared.
struct World {
    builder: SnapshotBuilder,
    snapshot: Arc<Snapshot>,
    tokens: Vec<Bytes>,
    prepared: PreparedChain,
}

impl World {
    fn new(more: &str) -> Self {
        let agents: Vec<String> = AGENTS
            .iter()
            .zip([11, 12])
            .map(|(id, seed)| {
                format!(
                    "{{kind: agent, id: '{id}', keys: [{}], applications: [portal], acts_for: [staff], delegates_to: ['{}'], allow: ['*']}}",
                    thumbprint(seed),
                    AGENTS[1]
                )
            })
            .collect();
        let policy = format!(
            "{{kind: issuer, id: '{ISSUER}', keys: {{jwks: {{keys: [{}]}}}}, audiences: ['https://g'], groups: [staff], \
               applications: [portal]}}\n---\n{{kind: application, id: portal, allow: ['*']}}\n---\n\
             {{kind: group, id: staff, allow: ['*']}}\n---\n{{kind: tool, id: {TOOL}, risk: read}}\n---\n{}{more}",
            key(1).public_key().to_jwk(),
            agents.join("\n---\n"),
        );
        let mut builder = SnapshotBuilder::new(Arc::new(RevocationIndex::new()));
        let state = FullState {
            revision: Revision { history: HistoryId::new("h"), number: 1 },
            digest: StateDigest::default(),
            iat_skew_s: SKEW_S,
            freshness_bound_ms: 5_000,
            documents: rows(&policy),
            revocations: vec![],
        };
        let snapshot = builder.replace_all(state).unwrap();
        let tokens = chain();
        let verified = verify(&tokens, snapshot.trust(), &VerificationOptions::default(), at(START_S + 60)).unwrap();
        let prepared = PreparedChain::new(Arc::new(verified), &snapshot).unwrap();
        Self { builder, snapshot, tokens, prepared }
    }

    fn apply(&mut self, number: u64, changes: &[RowChange]) -> Arc<Snapshot> {
        self.builder.apply_changes(number, StateDigest::default(), changes.iter()).unwrap()
    }

    fn decide(&self, snapshot: &Snapshot, unix_s: i64) -> Decision {
        let arguments = JsonObject::default();
        decide(&self.prepared, &ToolCall::new(TOOL, &arguments), snapshot, at(unix_s))
    }
}

/// A root for agent 0 and a hop to agent 1.
fn chain() -> Vec<Bytes> {
    let jwk = |seed: u8| -> Value { serde_json::from_str(&key(seed).public_key().to_jwk()).unwrap() };
    let claims = |level: u8| {
        json!({
            "jti": format!("t{level}"), "exp": START_S + 3600, "del_max_depth": 2, "aud": "https://g",
            "cnf": {"jwk": jwk(11 + level)}, "act": {"sub": AGENTS[usize::from(level)]},
            "authorization_details": [{"type": "attenuating_agent_token", "tools": {TOOL: {}}}],
        })
    };
    let mut root = claims(0);
    for (name, value) in [
        ("iss", json!(ISSUER)),
        ("sub", json!("ana")),
        ("sub_profile", json!("user")),
        ("client_id", json!("portal")),
        ("sid", json!("s1")),
        ("txn", json!("x1")),
        ("groups", json!(["staff"])),
    ] {
        root[name] = value;
    }
    let root = Bytes::from(issue::issue_root(&key(1), &root.to_string(), at(START_S)).unwrap());
    let hop = issue::issue_hop(&key(11), std::slice::from_ref(&root), &claims(1).to_string(), at(START_S)).unwrap();
    vec![root, hop.into()]
}

fn revoked(target: RevocationTarget, set: impl FnOnce(&mut RevocationRow)) -> RowChange {
    let mut row = RevocationRow {
        target,
        dead: false,
        suspended: false,
        watermark_unix_s: None,
        expires_at_unix_s: None,
        reason: String::new(),
        revision: 2,
    };
    set(&mut row);
    RowChange::Revocation(row)
}

/// Every identity, every token and the tool: each revocation denies with the reason and the hop that it hit.
#[test]
fn each_revocation_denies_with_its_reason_and_hop() {
    use Reason::*;
    let user = || RevocationTarget::User { issuer: ISSUER.to_owned(), subject: "ana".to_owned() };
    let agent = |hop: usize| RevocationTarget::Agent(AGENTS[hop].to_owned());
    let delegation = |hop: usize| RevocationTarget::Delegation {
        issuer: ISSUER.to_owned(),
        subject: "ana".to_owned(),
        agent: AGENTS[hop].to_owned(),
    };
    let application = || RevocationTarget::Application("portal".to_owned());
    let suspended: fn(&mut RevocationRow) = |row| row.suspended = true;
    let dead: fn(&mut RevocationRow) = |row| row.dead = true;
    let watermark: fn(&mut RevocationRow) = |row| row.watermark_unix_s = Some(START_S);
    for (target, set, reason, hop) in [
        (RevocationTarget::All, suspended, RevokedAll, None),
        (user(), suspended, UserSuspended, None),
        (user(), watermark, RevokedUser, None),
        (application(), suspended, ApplicationSuspended, None),
        (application(), watermark, RevokedApplication, None),
        (agent(0), suspended, AgentSuspended, Some(0)),
        (agent(1), suspended, AgentSuspended, Some(1)),
        (agent(1), watermark, RevokedAgent, Some(1)),
        (delegation(0), suspended, RevokedDelegation, Some(0)),
        (delegation(1), watermark, RevokedDelegation, Some(1)),
        (RevocationTarget::Session("s1".to_owned()), dead, RevokedSession, None),
        (RevocationTarget::Task("x1".to_owned()), dead, RevokedTask, None),
        (RevocationTarget::Key(thumbprint(1)), dead, RevokedKey, Some(0)),
        (RevocationTarget::Key(thumbprint(11)), dead, RevokedKey, Some(0)),
        (RevocationTarget::Key(thumbprint(12)), dead, RevokedKey, Some(1)),
        (RevocationTarget::Token("t0".to_owned()), dead, RevokedToken, Some(0)),
        (RevocationTarget::Token("t1".to_owned()), dead, RevokedToken, Some(1)),
        (RevocationTarget::Tool(TOOL.to_owned()), suspended, ToolSuspended, None),
    ] {
        let mut world = World::new("");
        let now = START_S + 60;
        assert_eq!(world.decide(&world.snapshot, now).effect, Effect::Permit);
        let name = format!("{target} {reason:?}");
        let is_tool = matches!(target, RevocationTarget::Tool(_));
        let next = world.apply(2, &[revoked(target, set)]);
        // The index is shared: the older snapshot denies as well, and names the revision that revoked.
        for snapshot in [&world.snapshot, &next] {
            let decision = world.decide(snapshot, now);
            assert_eq!(
                (decision.effect, decision.reason, decision.hop, decision.revision),
                (Effect::Deny, reason, hop, 2),
                "{name}"
            );
            let reached = evaluate_reach(&world.prepared, TOOL, snapshot, at(now));
            assert_eq!((reached.effect, reached.reason, reached.depends_on_arguments), (Effect::Deny, reason, false), "{name}");
            for whole in [deny_void_chain(&world.prepared, snapshot, at(now)), deny_all_tools(&world.prepared, snapshot, at(now))]
            {
                assert_eq!(whole.map(|denial| denial.reason), (!is_tool).then_some(reason), "{name}");
            }
        }
    }
}

/// A token is revoked by the hash of its signing input, too.
#[test]
fn a_hop_is_revoked_by_its_hash() {
    for hop in 0..2 {
        let mut world = World::new("");
        let hash = issue::token_hash(std::str::from_utf8(&world.tokens[hop]).unwrap());
        let next = world.apply(2, &[revoked(RevocationTarget::Hop(hash), |row| row.dead = true)]);
        let decision = world.decide(&next, START_S + 60);
        assert_eq!((decision.reason, decision.hop), (Reason::RevokedToken, Some(hop)));
    }
}

/// A chain that was found clean is checked again when the index or the snapshot moves.
#[test]
fn a_clean_chain_is_checked_again() {
    let mut world = World::new("");
    let (first, now) = (world.snapshot.clone(), START_S + 60);
    assert_eq!(world.decide(&first, now).effect, Effect::Permit);
    let agent = || RevocationTarget::Agent(AGENTS[1].to_owned());
    let second = world.apply(2, &[revoked(agent(), |row| row.suspended = true)]);
    let third = world.apply(3, &[revoked(agent(), |row| row.revision = 3)]);
    assert_eq!(world.decide(&third, now).effect, Effect::Permit, "reinstated");
    for snapshot in [&first, &second] {
        assert_eq!(world.decide(snapshot, now).reason, Reason::AgentSuspended, "an older snapshot still sees the suspension");
    }
    assert_eq!(world.decide(&third, now).effect, Effect::Permit);
}

/// A prepared chain is good for snapshots with the very tables that it was prepared with.
#[test]
fn a_chain_fits_the_tables_it_was_prepared_with() {
    let mut world = World::new("");
    let now = START_S + 60;
    let session = || revoked(RevocationTarget::Session("other".to_owned()), |row| row.dead = true);
    let same = world.apply(2, &[session()]);
    assert!(world.prepared.matches_snapshot(&same) && world.prepared.matches_trust(&same));
    assert_eq!(world.decide(&same, now).effect, Effect::Permit);
    let group = rows("{kind: group, id: staff, allow: []}");
    let other = world.apply(3, &group.into_iter().map(RowChange::Document).collect::<Vec<_>>());
    assert!(!world.prepared.matches_snapshot(&other));
    assert_eq!((world.decide(&other, now).effect, world.decide(&other, now).reason), (Effect::Deny, Reason::RevisionUnavailable));
    let foreign = World::new("");
    assert!(!world.prepared.matches_trust(&foreign.snapshot) && !world.prepared.matches_snapshot(&foreign.snapshot));
}

/// The skew is the snapshot's, not the default.
#[test]
fn times_are_checked_on_every_call() {
    let world = World::new("");
    for (unix_s, reason) in [
        (START_S - SKEW_S - 1, Reason::TokenNotYetValid),
        (START_S - SKEW_S, Reason::Ok),
        (START_S + 3599, Reason::Ok),
        (START_S + 3600, Reason::TokenExpired),
    ] {
        assert_eq!(world.decide(&world.snapshot, unix_s).reason, reason, "{unix_s}");
    }
}

/// Documents in shadow decide nothing and are told beside the decision.
#[test]
fn what_shadows_would_decide_is_told() {
    let world = World::new("");
    assert_eq!(world.decide(&world.snapshot, START_S).shadow_decision, None);
    let world = World::new("\n---\n{kind: group, id: staff, mode: shadow, allow: []}");
    let decision = world.decide(&world.snapshot, START_S);
    let would_be = decision.shadow_decision.unwrap();
    assert_eq!((decision.effect, would_be.effect, would_be.reason), (Effect::Permit, Effect::Deny, Reason::UserDenies));
}
