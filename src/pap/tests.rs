//! Acts on a store without a server: who may call, what can be revoked and reinstated, what is refused and how it is told.

use std::collections::BTreeSet;

use super::*;
use crate::audit::AuditLog;
use crate::model::limits::{ACT_REASON_BYTES_MAX, ID_BYTES_MAX, TWO_PERSON_WINDOW_MS};
use crate::model::rows::{RevocationKind, RevocationRow, RevocationTarget, RowChange};
use crate::model::time::ManualClock;
use crate::store::sqlite::SqliteStore;
use crate::token::PrivateKey;
use crate::token::operator_act::{AdminCall, sign_act};

const REVOKE: &str = "/portcullis.v1.RevocationService/Revoke";
const REINSTATE: &str = "/portcullis.v1.RevocationService/Reinstate";
const APPLY: &str = "/portcullis.v1.PolicyService/Apply";
const ROLLBACK: &str = "/portcullis.v1.PolicyService/Rollback";
const GET: &str = "/portcullis.v1.PolicyService/Get";

/// Seeds of the keys of operators: `root` has every role, `ada` administers, `rex` responds, `aud` audits.
const ROOT: u8 = 1;
const ADA: u8 = 2;
const REX: u8 = 3;
const AUD: u8 = 4;
const STRANGER: u8 = 9;

const ISSUER: &str = "https://i.example";
const AGENT: &str = "spiffe://a.example/b";

fn key(seed: u8) -> PrivateKey {
    PrivateKey::from_seed([seed; 32]).unwrap()
}

fn thumbprint(seed: u8) -> String {
    key(seed).public_key().thumbprint().to_string()
}

struct World {
    clock: Arc<ManualClock>,
    store: Arc<dyn Store>,
    admin: AdministrationPoint,
    _log: Arc<AuditLog>,
    _folder: tempfile::TempDir,
}

fn policy(more: &str) -> Vec<PolicyFile> {
    let issuer_key = key(20).public_key().to_jwk().replacen('{', r#"{"kid":"k1","#, 1);
    let operator = |id: &str, seed: u8, role: &str| {
        format!("{{kind: operator, id: {id}, keys: [{}], roles: [{role}]}}\n---\n", key(seed).public_key().to_jwk())
    };
    let content = format!(
        "{{kind: issuer, id: '{ISSUER}', keys: {{jwks: {{keys: [{issuer_key}]}}}}, audiences: ['https://g'], groups: [g], applications: [portal]}}\n---\n\
         {{kind: application, id: portal, allow: ['*']}}\n---\n{{kind: group, id: g, allow: ['*']}}\n---\n\
         {{kind: server, id: crm, tools: {{read: {{risk: read}}}}}}\n---\n\
         {{kind: agent, id: '{AGENT}', keys: [{}], applications: [portal], acts_for: [g], allow: ['*']}}\n---\n{}{}{}{more}",
        thumbprint(30),
        operator("ada", ADA, "administer"),
        operator("rex", REX, "respond"),
        operator("aud", AUD, "audit"),
    );
    vec![PolicyFile { path: "p.yaml".to_owned(), content: content.into_bytes() }]
}

impl World {
    /// A store with the policy, applied by its first operator.
    async fn new() -> Self {
        let clock = Arc::new(ManualClock::at_unix_s(1_700_000_000));
        let folder = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&folder.path().join("store.db"), clock.clone()).unwrap());
        let log = AuditLog::open(&folder.path().join("audit"), "n", clock.clone()).unwrap();
        let admin = AdministrationPoint::new(store.clone(), clock.clone(), log.open_recorder("acts").unwrap());
        let first = create_first_operator(&*store, "root", key(ROOT).public_key()).await.unwrap();
        assert_eq!(first.unwrap().revision.number, 1);
        let world = Self { clock, store, admin, _log: log, _folder: folder };
        let by = world.by(&[ROOT], APPLY).await.unwrap();
        world.admin.apply(&by, policy(""), false).await.unwrap();
        world
    }

    async fn signed(&self, seeds: &[u8], method: &str, message: &[u8]) -> Vec<String> {
        let history = self.store.revision().await.unwrap().history;
        let call = AdminCall { audience: history.as_str(), method, message };
        seeds.iter().map(|seed| format!("Operator {}", sign_act(&key(*seed), &call, self.clock.now()))).collect()
    }

    async fn by(&self, seeds: &[u8], method: &str) -> Result<AuthorizedAct, Error> {
        let signed = self.signed(seeds, method, b"message").await;
        let signed: Vec<&str> = signed.iter().map(String::as_str).collect();
        self.admin.authorize(method, b"message", &signed, "peer").await
    }

    async fn revoke(&self, seed: u8, target: &[&str], revocation_kind: Option<RevocationKind>) -> Result<RevocationRow, Error> {
        let by = self.by(&[seed], REVOKE).await?;
        let (kind, key) = target.split_first().unwrap();
        let key = key.iter().map(|part| (*part).to_owned()).collect();
        let request = RevokeRequest { kind: (*kind).to_owned(), key, revocation_kind, reason: "why".to_owned() };
        let RevokeOutcome { target, committed, .. } = self.admin.revoke(&by, request).await?;
        let [RowChange::Revocation(row)] = committed.changes.as_slice() else { panic!("{committed:?}") };
        assert_eq!((&row.target, row.reason.as_str(), row.revision), (&target, "why", committed.revision.number));
        Ok(row.clone())
    }

    async fn reinstate(&self, seeds: &[u8], target: &[&str]) -> Result<ReinstateOutcome, Error> {
        let by = self.by(seeds, REINSTATE).await?;
        let (kind, key) = target.split_first().unwrap();
        let key: Vec<String> = key.iter().map(|part| (*part).to_owned()).collect();
        self.admin.reinstate(&by, kind, &key, "why".to_owned()).await
    }

    async fn is_suspended(&self, target: RevocationTarget) -> bool {
        self.store.revocations_of(&[target]).await.unwrap().iter().any(|row| row.suspended)
    }
}

fn refused<T: std::fmt::Debug>(done: Result<T, Error>, code: &str, says: &str) {
    let error = done.expect_err(says);
    assert_eq!(error.code(), code, "{error}");
    assert!(error.to_string().contains(says), "{error}");
}

#[tokio::test]
async fn who_may_call() {
    let world = World::new().await;
    for seed in [ROOT, REX] {
        let by = world.by(&[seed], REVOKE).await.unwrap();
        assert_eq!((by.method(), by.peer(), by.keys().len(), by.jtis().len()), (REVOKE, "peer", 1, 1));
        assert!(!by.is_unrecorded());
    }
    let two = world.by(&[ROOT, ADA], REINSTATE).await.unwrap();
    assert_eq!(two.operators(), ["root", "ada"]);
    assert_eq!((two.operator_by_key(&thumbprint(ADA)), two.operator_by_key(&thumbprint(REX))), ("ada", ""));
    for (seeds, method, code, says) in [
        (&[][..], REVOKE, "UNAUTHENTICATED", "not signed"),
        (&[STRANGER], REVOKE, "UNAUTHENTICATED", "no operator has the key"),
        (&[ROOT, ROOT], REVOKE, "UNAUTHENTICATED", "signed twice"),
        (&[ROOT; 9], REVOKE, "UNAUTHENTICATED", "more than 8 signatures"),
        (&[ADA], REVOKE, "PERMISSION_DENIED", "operator `ada` has none of the roles this needs: respond"),
        (&[REX], REINSTATE, "PERMISSION_DENIED", "operator `rex` has none of the roles"),
        (&[ROOT, REX], REINSTATE, "PERMISSION_DENIED", "operator `rex` has none of the roles"),
        (&[ROOT], "/portcullis.v1.PolicyService/None", "PERMISSION_DENIED", "no role allows the method"),
    ] {
        refused(world.by(seeds, method).await, code, says);
    }
    refused(world.admin.authorize(REVOKE, b"", &["Bearer x"], "").await, "UNAUTHENTICATED", "Operator <compact JWS>");
    let signed = world.signed(&[REX], REVOKE, b"message").await;
    let other = world.admin.authorize(REVOKE, b"massage", &[&signed[0]], "").await;
    refused(other, "UNAUTHENTICATED", "hash of this message");
}

/// Looking at a signature before its message is there uses nothing up; an authorized call does.
#[tokio::test]
async fn a_signature_authorizes_once() {
    let world = World::new().await;
    let signed = world.signed(&[REX], REVOKE, b"message").await;
    let signed = [signed[0].as_str()];
    for _ in 0..2 {
        world.admin.check_signatures(REVOKE, &signed, "").await.unwrap();
    }
    world.admin.authorize(REVOKE, b"message", &signed, "").await.unwrap();
    refused(world.admin.check_signatures(REVOKE, &signed, "").await, "UNAUTHENTICATED", "used before");
    refused(world.admin.authorize(REVOKE, b"message", &signed, "").await, "UNAUTHENTICATED", "used before");
    world.revoke(ROOT, &["key", &thumbprint(REX)], None).await.unwrap();
    refused(world.by(&[REX], REVOKE).await, "REVOKED_KEY", "operator `rex` is revoked");
    let signed = world.signed(&[REX], REVOKE, b"message").await;
    refused(world.admin.check_signatures(REVOKE, &[&signed[0]], "").await, "REVOKED_KEY", "signs nothing");
}

#[tokio::test]
async fn what_names_nothing_is_refused_with_the_name_that_was_meant() {
    let world = World::new().await;
    let long = "x".repeat(ID_BYTES_MAX + 1);
    for (target, says) in [
        (&["agent", "crm"][..], "does not begin with `spiffe://`"),
        (&["agent"], "`agent` with 0 part(s) is not a target"),
        (&["all", "x"], "`all` with 1 part(s) is not a target"),
        (&["nothing", "x"], "is not a target"),
        (&["session", ""], "a part of 0 bytes"),
        (&["session", &long], "a part of 2049 bytes"),
        (&["session", "a\nb"], "control character"),
        (&["session", "*"], "`session *` is a pattern"),
        (&["application", "po*"], "is a pattern"),
        (&["user", ISSUER, "*"], "is a pattern"),
        (&["tool", "crm/raed*"], "has a `*`, a space"),
        (&["tool", "crm/rea*"], "did you mean `tool crm/read`?"),
        (&["tool", "crm"], "`crm` is not `server/tool`: name each tool"),
        (&["delegation", ISSUER, "ana", "b"], "`b` does not begin with `spiffe://`: a delegation is ISS SUB AGENT"),
        (&["delegation", ISSUER, "*", AGENT], "is a pattern, and a revocation takes one name"),
        (&["key", "short"], "43 characters"),
        (&["hop", "short"], "43 characters"),
        (&["issuer-key", ISSUER, "k2"], "has no key with kid `k2`; did you mean `k1`?"),
        (
            &["issuer-key", "https://i.exmaple", "k1"],
            "no document names issuer `https://i.exmaple`; did you mean `https://i.example`?",
        ),
        (&["issuer-key", "k1", ISSUER], "the issuer comes first"),
    ] {
        refused(world.revoke(REX, target, None).await, "INVALID_ARGUMENT", says);
    }
    let by = world.by(&[REX], REVOKE).await.unwrap();
    let request =
        |reason: String| RevokeRequest { kind: "session".to_owned(), key: vec!["s".to_owned()], revocation_kind: None, reason };
    refused(world.admin.revoke(&by, request("x".repeat(ACT_REASON_BYTES_MAX + 1))).await, "INVALID_ARGUMENT", "at most 1024");
    world.admin.revoke(&by, request("x".repeat(ACT_REASON_BYTES_MAX))).await.unwrap();
}

#[tokio::test]
async fn one_operator_lets_in_and_two_let_everything_in() {
    let world = World::new().await;
    let agent = || RevocationTarget::Agent(AGENT.to_owned());
    world.revoke(REX, &["agent", AGENT], None).await.unwrap();
    let slip = "spiffe://a.example/v";
    refused(
        world.reinstate(&[ADA], &["agent", slip]).await,
        "REJECTED",
        "did you mean `agent spiffe://a.example/b`, which is suspended?",
    );
    refused(world.reinstate(&[ADA], &["application", "porter"]).await, "REJECTED", "nothing bears that name");
    refused(world.reinstate(&[ADA], &["session", "s"]).await, "INVALID_ARGUMENT", "a session that was revoked is dead");
    let done = world.reinstate(&[ADA], &["agent", AGENT]).await.unwrap();
    assert_eq!(done.waits_until_unix_ms, None);
    assert!(!world.is_suspended(agent()).await);

    world.revoke(REX, &["all"], None).await.unwrap();
    let first = world.reinstate(&[ADA], &["all"]).await.unwrap();
    assert_eq!(first.waits_until_unix_ms, Some(first.committed.unix_ms + TWO_PERSON_WINDOW_MS));
    assert!(world.is_suspended(RevocationTarget::All).await);
    refused(world.reinstate(&[ADA], &["all"]).await, "REJECTED", "");
    assert_eq!(world.reinstate(&[ROOT], &["all"]).await.unwrap().waits_until_unix_ms, None);
    assert!(!world.is_suspended(RevocationTarget::All).await);

    world.revoke(REX, &["all"], None).await.unwrap();
    assert_eq!(world.reinstate(&[ADA, ROOT], &["all"]).await.unwrap().waits_until_unix_ms, None);
    assert!(!world.is_suspended(RevocationTarget::All).await);
}

/// A document may ask for two people for what it names: the agent's own and what users gave it, an application's, a tool's or its server's.
#[tokio::test]
async fn a_document_asks_for_two_people() {
    let world = World::new().await;
    let more = "{kind: application, id: vault, allow: ['*'], two_person: true}\n---\n\
                {kind: server, id: pay, two_person: true, tools: {refund: {risk: read}}}\n---\n\
                {kind: tool, id: lab/probe, risk: read, two_person: true}\n---\n\
                {kind: agent, id: 'spiffe://a.example/two', allow: ['*'], two_person: true}";
    let by = world.by(&[ROOT, ADA], APPLY).await.unwrap();
    world.admin.apply(&by, policy(more), false).await.unwrap();
    for (target, two) in [
        (&["application", "vault"][..], true),
        (&["application", "portal"], false),
        (&["tool", "pay/refund"], true),
        (&["tool", "lab/probe"], true),
        (&["tool", "crm/read"], false),
        (&["agent", "spiffe://a.example/two"], true),
        (&["agent", AGENT], false),
        (&["delegation", ISSUER, "ana", "spiffe://a.example/two"], true),
        (&["delegation", ISSUER, "ana", AGENT], false),
        (&["user", ISSUER, "ana"], false),
    ] {
        world.revoke(REX, target, None).await.unwrap();
        let done = world.reinstate(&[ADA], target).await.unwrap();
        assert_eq!(done.waits_until_unix_ms.is_some(), two, "{target:?}");
    }
}

/// Who only responds cannot lock everybody out of administration; who administers may.
#[tokio::test]
async fn the_last_administrator_is_locked_out_by_none_but_themselves() {
    let world = World::new().await;
    world.revoke(REX, &["key", &thumbprint(ADA)], None).await.unwrap();
    refused(world.revoke(REX, &["key", &thumbprint(ROOT)], None).await, "PERMISSION_DENIED", "nobody with the role `administer`");
    assert!(world.revoke(ROOT, &["key", &thumbprint(ROOT)], None).await.unwrap().dead);
    refused(world.by(&[ROOT], APPLY).await, "REVOKED_KEY", "root");
}

#[tokio::test]
async fn a_folder_is_applied_as_a_whole_or_not_at_all() {
    let world = World::new().await;
    let revision = || async { world.store.revision().await.unwrap() };
    let before = revision().await;
    let (one, two) = (&[ADA][..], &[ADA, ROOT][..]);
    let apply = async |seeds: &[u8], files: Vec<PolicyFile>, dry_run: bool| {
        let by = world.by(seeds, APPLY).await.unwrap();
        world.admin.apply(&by, files, dry_run).await
    };
    let roll_back = async |revision: &str, dry_run: bool| {
        let by = world.by(one, ROLLBACK).await.unwrap();
        world.admin.rollback(&by, revision, dry_run).await
    };
    let none = vec![PolicyFile { path: "p.yaml".to_owned(), content: b"{kind: group, id: x, allow: []}".to_vec() }];
    let removed = apply(two, none, true).await.unwrap();
    assert!(removed.changes.iter().filter(|change| change.change == "removed").count() >= 8, "{:?}", removed.changes);
    let error = policy("{kind: nothing}");
    refused(apply(two, error, false).await, "POLICY_INVALID", "1 error(s)");
    let by_one = policy(&format!("{{kind: operator, id: eve, keys: [{}], roles: [audit]}}", key(40).public_key().to_jwk()));
    refused(apply(one, by_one, false).await, "PERMISSION_DENIED", "operators or issuers change");
    let group = || policy("{kind: group, id: more, allow: []}");
    let dry = apply(one, group(), true).await.unwrap();
    assert_eq!((dry.changes.len(), dry.changes[0].change), (1, "added"));
    assert_eq!(revision().await, before, "nothing was written");
    let done = apply(one, group(), false).await.unwrap();
    assert_eq!((done.revision.clone(), done.changes.len()), (revision().await, 1));
    let again = apply(one, group(), false).await.unwrap();
    assert_eq!((again.revision, again.changes.len()), (done.revision, 0));

    let by = world.by(&[AUD], GET).await.unwrap();
    assert_eq!(world.admin.document(&by, "group", "more").await.unwrap().key.id, "more");
    refused(world.admin.document(&by, "group", "less").await, "NOT_FOUND", "group less");
    let groups = world.admin.document_keys(&by, Some("group")).await.unwrap();
    assert_eq!(groups.iter().map(|key| key.id.as_str()).collect::<Vec<_>>(), ["g", "more"]);
    let places = world.admin.document_locations(&by, groups.into_iter().skip(1).collect::<BTreeSet<_>>()).await.unwrap();
    assert!(places.len() == 1 && places.values().all(|(path, line)| path == "p.yaml" && *line > 1), "{places:?}");
    let history = world.admin.policy_history(&by, 10).await.unwrap();
    let told: Vec<_> = history.iter().map(|one| (one.operators.join(" "), one.put.len(), one.removed.len())).collect();
    assert_eq!(told, [("ada".to_owned(), 1, 0), ("root".to_owned(), 8, 0), (String::new(), 1, 0)]);
    assert_eq!((history[1].method.as_str(), history[1].account.as_str()), (APPLY, "apply a policy folder: 8 document(s) change"));
    let back = roll_back("2", false).await.unwrap();
    assert_eq!((back.changes.len(), back.changes[0].change), (1, "removed"));
    refused(roll_back("h.2", true).await, "INVALID_ARGUMENT", "revision");
}

#[tokio::test]
async fn the_first_operator_is_made_once() {
    let world = World::new().await;
    assert!(create_first_operator(&*world.store, "eve", key(40).public_key()).await.unwrap().is_none());
    let root = world.by(&[ROOT], GET).await.unwrap();
    let row = world.admin.document(&root, "operator", "root").await.unwrap();
    assert_eq!(row.origin, DocumentOrigin::Api);
}

#[test]
fn what_a_store_says_is_told_by_its_kind() {
    let text = || "x".to_owned();
    for (error, code, fault) in [
        (store::Error::Conflict { kind: text(), id: text() }, "CONFLICT", StoreFault::Conflict),
        (store::Error::ActReplayed { jti: text() }, "CONFLICT", StoreFault::Conflict),
        (store::Error::Rejected(text()), "REJECTED", StoreFault::Rejected),
        (store::Error::NoSignerLeft, "REJECTED", StoreFault::Rejected),
        (store::Error::OutcomeUnknown(text()), "COMMIT_UNKNOWN", StoreFault::Unknown),
        (store::Error::Unavailable(text()), "STORE_UNAVAILABLE", StoreFault::Unavailable),
        (store::Error::Corrupt(text()), "STORE_UNAVAILABLE", StoreFault::Unavailable),
    ] {
        let error = Error::Store(error);
        assert_eq!((error.code(), error.store_fault()), (code, fault), "{error}");
        let unrecorded = Error::Unrecorded { cause: Box::new(error) };
        assert_eq!((unrecorded.code(), unrecorded.store_fault()), (code, fault), "{unrecorded}");
    }
}
