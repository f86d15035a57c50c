//! Approvals from end to end: a call asks, a person answers with a signed act, and the call is made once. Attacks on approvals too.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use portcullis::api::r#gen as wire;
use portcullis::api::r#gen::RevocationMeaning::Dead;
use portcullis::api::r#gen::approval_service_client::ApprovalServiceClient;
use portcullis::api::r#gen::decision_service_client::DecisionServiceClient;
use portcullis::api::r#gen::policy_service_client::PolicyServiceClient;
use portcullis::model::approval::ApprovalFilter;
use portcullis::model::rows::{DocumentKey, DocumentOrigin, DocumentRow, StoreWrite};
use portcullis::model::time::SystemClock;
use portcullis::store::sqlite::SqliteStore;
use portcullis::store::{CommitRequest, Store as _};
use portcullis::token::PrivateKey;
use serde_json::{Value, json};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::harness::{
    CommandResult, ISSUER, OperatorClient, PATIENCE, ServerProcess, TestChain, TestWorld, agent_id, authorization, binary, jwk,
    now, run, signed,
};

const LIST: &str = "/portcullis.v1.ApprovalService/List";
const APPROVE: &str = "/portcullis.v1.ApprovalService/Approve";
const REFUSE: &str = "/portcullis.v1.ApprovalService/Refuse";
const APPLY: &str = "/portcullis.v1.PolicyService/Apply";
const REFUND: &str = "pay/refund";
const QUICK: &str = "pay/quick";
const ASKS: &str = "approve: [{pay/refund: {args: {amount: {max: 500}}, by: [leads], expires_in: 10m}}]";
const PREPARE: &str = "pay/prepare";
const EXECUTE: &str = "pay/execute";
/// As [`EXECUTE`], prepared by [`QUICK`].
const SWIFT: &str = "pay/swift";
const ROUNDS: usize = 60;

/// The operators who may answer, and others who may not.
const OPERATORS: &[(&str, &str)] = &[
    ("olga", "roles: [approve], groups: [leads], users: [{issuer: ISSUER, sub: olga}]"),
    ("otto", "roles: [approve], groups: [leads, payers], users: [{issuer: ISSUER, sub: otto}]"),
    ("pia", "roles: [approve], groups: [payers], users: [{issuer: ISSUER, sub: pia}]"),
    ("herself", "roles: [approve], groups: [leads], users: [{issuer: ISSUER, sub: bea}, {issuer: ISSUER, sub: ana}]"),
    ("nobody", "roles: [approve], groups: [leads]"),
    ("roleless", "roles: [respond, administer, audit], groups: [leads], users: [{issuer: ISSUER, sub: rob}]"),
];

/// A server whose agent alpha asks for refunds, and the operators with their keys.
struct ApprovalFixture {
    world: TestWorld,
    server: ServerProcess,
    local: OperatorClient,
    keys: Vec<PrivateKey>,
    client: DecisionServiceClient<Channel>,
    chain: TestChain,
}

impl ApprovalFixture {
    async fn new() -> Self {
        let world = TestWorld::new();
        let keys: Vec<PrivateKey> = OPERATORS.iter().map(|_| PrivateKey::generate().unwrap()).collect();
        let more = "{pay/quick: {by: [leads], expires_in: 3s}}, {pay/prepare: {by: [leads]}}";
        let tools = "quick: {risk: read}, prepare: {risk: read}, execute: {risk: destructive}, swift: {risk: write}";
        let allow = "allow: [crm/*, {pay/execute: {prepared: pay/prepare}}, {pay/swift: {prepared: pay/quick}}, lab/probe";
        let mut policy = world
            .policy()
            .replace(ASKS, &ASKS.replace("}]", &format!("}}, {more}]")))
            .replace("large: {risk: read}", &format!("large: {{risk: read}}, {tools}"))
            .replace("allow: [crm/*, lab/probe", allow);
        for ((id, rest), key) in OPERATORS.iter().zip(&keys) {
            let rest = rest.replace("ISSUER", ISSUER);
            policy.push_str(&format!("---\n{{kind: operator, id: {id}, keys: [{}], {rest}}}\n", jwk(key)));
        }
        world.write_policy(&policy);
        let server = ServerProcess::start(&world);
        let (local, client) = (server.operator().await, server.connect().await);
        let chain = world.root("alpha", |claims| {
            for tool in [QUICK, PREPARE, EXECUTE, SWIFT] {
                claims["authorization_details"][0]["tools"][tool] = json!({});
            }
        });
        Self { world, server, local, keys, client, chain }
    }

    fn key(&self, id: &str) -> &PrivateKey {
        OPERATORS.iter().zip(&self.keys).find_map(|((name, _), key)| (*name == id).then_some(key)).unwrap()
    }

    fn by(&self, id: &str, method: &str, message: &impl prost::Message) -> String {
        if id == "local" {
            return self.local.authorization(method, message);
        }
        authorization(self.key(id), &self.local.history, method, message)
    }

    /// A refund, with a proof of its own.
    fn refund(&self, amount: u64) -> wire::CheckRequest {
        self.world.call(&self.chain, REFUND, &format!("{{\"amount\":{amount}}}"))
    }

    async fn asks(&self, request: wire::CheckRequest, effect: wire::Effect, reason: &str) -> wire::CheckResponse {
        let answer = self.client.clone().check(request).await.unwrap().into_inner();
        assert_eq!((answer.effect(), answer.reason.as_str()), (effect, reason), "{}", answer.message);
        assert_eq!(answer.approval.is_some(), effect == wire::Effect::NeedsApproval);
        answer
    }

    /// Makes a call that needs an approval; returns the digest.
    async fn needs(&self, request: wire::CheckRequest) -> wire::Approval {
        let answer = self.asks(request, wire::Effect::NeedsApproval, "APPROVAL_REQUIRED").await;
        assert_eq!(answer.deciding_layer, "agent");
        answer.approval.unwrap()
    }

    async fn permits(&self, request: wire::CheckRequest) -> wire::CheckResponse {
        let answer = self.asks(request, wire::Effect::Permit, "OK").await;
        assert!(answer.deciding_layer.is_empty());
        answer
    }

    async fn denies(&self, request: wire::CheckRequest, reason: &str, layer: &str) -> wire::CheckResponse {
        let answer = self.asks(request, wire::Effect::Deny, reason).await;
        assert_eq!(answer.deciding_layer, layer);
        answer
    }

    async fn approve(&self, id: &str, digest: &str) -> Result<wire::ApprovalItem, Status> {
        let message = wire::ApproveRequest { digest: digest.to_owned(), reason: "seen".to_owned() };
        self.approve_signed(message.clone(), vec![self.by(id, APPROVE, &message)]).await
    }

    async fn approve_signed(&self, message: wire::ApproveRequest, by: Vec<String>) -> Result<wire::ApprovalItem, Status> {
        let mut client = ApprovalServiceClient::new(self.local.channel.clone());
        client.approve(signed(message, &by)).await.map(|answer| answer.into_inner().approval.unwrap())
    }

    async fn refuse(&self, id: &str, digest: &str) -> Result<wire::ApprovalItem, Status> {
        let message = wire::RefuseRequest { digest: digest.to_owned(), reason: "no".to_owned() };
        let by = self.by(id, REFUSE, &message);
        let mut client = ApprovalServiceClient::new(self.local.channel.clone());
        client.refuse(signed(message, &[by])).await.map(|answer| answer.into_inner().approval.unwrap())
    }

    async fn list(&self, id: &str, all: bool) -> Result<wire::ListApprovalsResponse, Status> {
        let message = wire::ListApprovalsRequest { all, limit: 0 };
        let by = self.by(id, LIST, &message);
        let mut client = ApprovalServiceClient::new(self.local.channel.clone());
        client.list(signed(message, &[by])).await.map(tonic::Response::into_inner)
    }

    /// Applies a changed policy; returns its revision.
    async fn apply(&self, change: impl FnOnce(String) -> String) -> String {
        let content = change(std::fs::read_to_string(self.world.policies().join("policy.yaml")).unwrap());
        let file = wire::PolicyFile { path: "policy.yaml".to_owned(), content: content.into() };
        let message = wire::ApplyPolicyRequest { files: vec![file], dry_run: false };
        // Two administrators sign, because the change includes operators.
        let by = [self.local.authorization(APPLY, &message), self.by("roleless", APPLY, &message)];
        let mut client = PolicyServiceClient::new(self.local.channel.clone());
        client.apply(signed(message, &by)).await.unwrap().into_inner().revision
    }

    fn store(&self) -> PathBuf {
        self.world.data().join("store.db")
    }

    /// A file with an operator's key, for the command line.
    fn key_file(&self, id: &str) -> PathBuf {
        let path = self.world.folder.path().join(format!("{id}.jwk"));
        std::fs::write(&path, self.key(id).to_jwk().as_bytes()).unwrap();
        path
    }
}

#[tokio::test]
async fn a_refund_is_asked_for_approved_and_made_once() {
    let desk = ApprovalFixture::new().await;
    let approval = desk.needs(desk.refund(100)).await;
    assert_eq!((approval.digest.len(), approval.approvers.as_slice()), (64, &["leads".to_owned()][..]));
    assert_eq!(desk.needs(desk.refund(100)).await, approval, "asking again changes nothing");
    let other = desk.needs(desk.refund(101)).await;
    assert_ne!(other.digest, approval.digest, "changed arguments are another call");

    let listed = desk.list("olga", false).await.unwrap();
    assert_eq!((listed.total, listed.approvals.len()), (2, 2));
    let item = &listed.approvals[0];
    assert_eq!((item.digest.as_str(), item.state.as_str(), item.tool.as_str()), (&*approval.digest, "waiting", REFUND));
    assert_eq!((item.user.as_str(), item.application.as_str()), (&*format!("[\"{ISSUER}\",\"ana\"]"), "portal"));
    assert_eq!((item.agents.as_slice(), item.session.as_str(), item.task.as_str()), (&[agent_id("alpha")][..], "s-1", "t-1"));
    assert_eq!(item.arguments_json, "{\"amount\":100}");
    let layer = &item.layers[0];
    assert_eq!((layer.layer.as_str(), layer.hop, layer.by.as_slice()), ("agent", 0, &["leads".to_owned()][..]));
    assert_eq!((layer.approved_by.as_str(), layer.expires_at_unix_ms), ("", approval.expires_at_unix_ms));

    let approved = desk.approve("olga", &approval.digest).await.unwrap();
    assert_eq!((approved.state.as_str(), approved.layers[0].approved_by.as_str()), ("approved", "olga"));
    desk.needs(desk.refund(101)).await;
    let permitted = desk.permits(desk.refund(100)).await;
    let used = desk.denies(desk.refund(100), "APPROVAL_USED", "agent").await;
    let again = desk.approve("otto", &approval.digest).await.unwrap_err();
    assert!(again.code() == Code::FailedPrecondition && again.message().contains("used already"), "{again:?}");

    let states = desk.list("roleless", true).await.unwrap().approvals;
    assert_eq!(states.iter().map(|item| item.state.as_str()).collect::<Vec<_>>(), ["used", "waiting"]);
    assert_eq!(desk.list("roleless", false).await.unwrap().total, 1);

    let lines = desk.server.audit();
    let digest_of = |id: &str| lines.iter().find(|line| line["decision_id"] == id).unwrap()["approval_digest"].clone();
    assert_eq!(digest_of(&permitted.decision_id), json!(approval.digest));
    assert_eq!(digest_of(&used.decision_id), json!(approval.digest));
    let act = lines.iter().find(|line| line["method"] == APPROVE && line["effect"] == "ACCEPTED").unwrap();
    assert_eq!(act["operators"], json!(["olga"]));
    let account = act["reason"].as_str().unwrap();
    assert!([approval.digest.as_str(), REFUND, "seen"].iter().all(|part| account.contains(part)), "{account}");
    assert!(act["revision"].is_string() && act["signatures"].as_array().unwrap().len() == 1, "{act}");
}

#[tokio::test]
async fn a_refused_call_is_denied() {
    let desk = ApprovalFixture::new().await;
    let (one, two) = (desk.needs(desk.refund(1)).await, desk.needs(desk.refund(2)).await);
    assert_eq!(desk.refuse("olga", &one.digest).await.unwrap().state, "refused");
    desk.denies(desk.refund(1), "APPROVAL_REFUSED", "agent").await;
    let late = desk.approve("otto", &one.digest).await.unwrap_err();
    assert!(late.code() == Code::FailedPrecondition && late.message().contains("refused by `olga`"), "{late:?}");
    // An approval can be withdrawn until it is used.
    desk.approve("olga", &two.digest).await.unwrap();
    desk.refuse("otto", &two.digest).await.unwrap();
    desk.denies(desk.refund(2), "APPROVAL_REFUSED", "agent").await;
}

#[tokio::test]
async fn only_who_may_answers() {
    let desk = ApprovalFixture::new().await;
    let digest = desk.needs(desk.refund(100)).await.digest;
    let check = async |id: &str, code: Code, says: &str| {
        for refused in [desk.approve(id, &digest).await.unwrap_err(), desk.refuse(id, &digest).await.unwrap_err()] {
            assert!(refused.code() == code && refused.message().contains(says), "{id}: {refused:?}");
        }
    };
    check("roleless", Code::PermissionDenied, "none of the roles").await;
    check("local", Code::PermissionDenied, "has no `users`").await;
    check("nobody", Code::PermissionDenied, "has no `users`").await;
    check("pia", Code::PermissionDenied, "none of the groups that may answer this call: leads").await;
    check("herself", Code::PermissionDenied, "is the user whom the call is made for").await;
    let message = wire::ApproveRequest { digest: digest.clone(), reason: String::new() };
    let two = vec![desk.by("olga", APPROVE, &message), desk.by("otto", APPROVE, &message)];
    let refused = desk.approve_signed(message.clone(), two).await.unwrap_err();
    assert!(refused.message().contains("one operator"), "{refused:?}");
    let agents = authorization(desk.world.key("alpha"), &desk.local.history, APPROVE, &message);
    let refused = desk.approve_signed(message.clone(), vec![agents]).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);

    for (bad, code, says) in [
        ("f".repeat(64), Code::FailedPrecondition, "never asked"),
        (digest.to_uppercase(), Code::InvalidArgument, "hex"),
        ("x".to_owned(), Code::InvalidArgument, "hex"),
        (String::new(), Code::InvalidArgument, "hex"),
    ] {
        let refused = desk.approve("olga", &bad).await.unwrap_err();
        assert!(refused.code() == code && refused.message().contains(says), "{bad}: {refused:?}");
    }
    let long = wire::ApproveRequest { digest: digest.clone(), reason: "x".repeat(2000) };
    let by = vec![desk.by("olga", APPROVE, &long)];
    assert_eq!(desk.approve_signed(long, by).await.unwrap_err().code(), Code::InvalidArgument);
    let refused = desk.server.audit().into_iter().filter(|line| line["kind"] == "act" && line["effect"] == "REFUSED").count();
    assert_eq!(refused, 10 + 2 + 4 + 1, "each leaves a line");
    desk.needs(desk.refund(100)).await;
    desk.approve("olga", &digest).await.unwrap();
    desk.permits(desk.refund(100)).await;
}

/// A folder with such a key is refused. If a store holds the key nevertheless, the key cannot approve.
#[tokio::test]
async fn an_agent_approves_nothing() {
    let desk = ApprovalFixture::new().await;
    let digest = desk.needs(desk.refund(100)).await.digest;
    let alpha = jwk(desk.world.key("alpha"));
    let mole = format!(
        r#"{{"groups":["leads"],"id":"mole","keys":[{alpha}],"kind":"operator","roles":["approve"],"users":[{{"issuer":"{ISSUER}","sub":"mole"}}]}}"#
    );
    let policy = format!("{}---\n{mole}\n", std::fs::read_to_string(desk.world.policies().join("policy.yaml")).unwrap());
    let folder = desk.world.folder.path().join("bad");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("policy.yaml"), policy).unwrap();
    let ran = run(&["policy", "check", folder.to_str().unwrap()]).ended(1);
    assert!(format!("{}{}", ran.stdout, ran.stderr).contains("is also one of agent"), "{ran:?}");

    let store = SqliteStore::open(&desk.store(), Arc::new(SystemClock)).unwrap();
    let key = DocumentKey { kind: "operator".into(), id: "mole".into() };
    let row = DocumentRow { key, json: mole, path: String::new(), line: 0, origin: DocumentOrigin::Api };
    store.commit(CommitRequest { writes: vec![StoreWrite::PutDocument(row)], ..Default::default() }).await.unwrap();
    let message = wire::ApproveRequest { digest: digest.clone(), reason: String::new() };
    let by = authorization(desk.world.key("alpha"), &desk.local.history, APPROVE, &message);
    let refused = desk.approve_signed(message, vec![by]).await.unwrap_err();
    let says = format!("also one of agent `{}`", agent_id("alpha"));
    assert!(refused.code() == Code::PermissionDenied && refused.message().contains(&says), "{refused:?}");
    desk.needs(desk.refund(100)).await;
}

#[tokio::test]
async fn what_expired_is_asked_anew() {
    let desk = ApprovalFixture::new().await;
    let call = || desk.world.call(&desk.chain, QUICK, "{}");
    let until = Instant::now() + PATIENCE;
    let past = async |unix_ms: i64| {
        while now(0).unix_ms() <= unix_ms {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let first = desk.needs(call()).await;
    past(first.expires_at_unix_ms).await;
    let late = desk.approve("olga", &first.digest).await.unwrap_err();
    assert!(late.code() == Code::FailedPrecondition && late.message().contains("expired"), "{late:?}");
    // On a slow machine the time may be over before the approval.
    let approved = loop {
        let asked = desk.needs(call()).await;
        assert!(asked.digest == first.digest && asked.expires_at_unix_ms > first.expires_at_unix_ms);
        match desk.approve("olga", &asked.digest).await {
            Ok(_) => break asked,
            Err(late) => assert!(Instant::now() < until, "{late:?}"),
        }
    };
    past(approved.expires_at_unix_ms).await;
    let anew = desk.needs(call()).await;
    assert!(anew.expires_at_unix_ms > approved.expires_at_unix_ms);
    let item = desk.list("olga", false).await.unwrap().approvals.pop().unwrap();
    assert_eq!((item.digest, item.layers[0].approved_by.as_str()), (first.digest, ""), "the approval is gone with its time");
}

#[tokio::test]
async fn every_layer_that_asks_must_be_approved() {
    let desk = ApprovalFixture::new().await;
    let digest = desk.needs(desk.refund(100)).await.digest;
    desk.approve("olga", &digest).await.unwrap();
    // The user's group asks now too, with other approvers.
    let staff = "{kind: group, id: staff, allow: [\"*\"]";
    let asks = format!("{staff}, approve: [{{pay/refund: {{by: [payers]}}}}]");
    let revision = desk.apply(|policy| policy.replace(staff, &asks)).await;
    let refund = || wire::CheckRequest { at_least: revision.clone(), ..desk.refund(100) };
    let answer = desk.asks(refund(), wire::Effect::NeedsApproval, "APPROVAL_REQUIRED").await;
    let approval = answer.approval.unwrap();
    assert_eq!((answer.deciding_layer.as_str(), approval.digest.as_str()), ("user", &*digest));
    assert_eq!(approval.approvers, ["payers"], "who approved already is not asked again");
    let done = desk.approve("olga", &digest).await.unwrap_err();
    assert!(done.message().contains("payers"), "{done:?}");
    let item = desk.approve("pia", &digest).await.unwrap();
    let given: Vec<_> = item.layers.iter().map(|layer| (layer.layer.as_str(), layer.approved_by.as_str())).collect();
    assert_eq!((given, item.state.as_str()), (vec![("agent", "olga"), ("user", "pia")], "approved"));
    desk.permits(refund()).await;
    desk.denies(refund(), "APPROVAL_USED", "user").await;
    // An operator in both groups needs one act.
    let digest = desk.asks(desk.refund(7), wire::Effect::NeedsApproval, "APPROVAL_REQUIRED").await.approval.unwrap().digest;
    assert_eq!(desk.approve("otto", &digest).await.unwrap().state, "approved");
    desk.permits(desk.refund(7)).await;
}

/// An approval by a former approver no longer counts, and another operator can approve.
#[tokio::test]
async fn an_approval_needs_an_approver_at_its_use() {
    let desk = ApprovalFixture::new().await;
    let olga = format!("roles: [approve], groups: [leads], users: [{{issuer: {ISSUER}, sub: olga}}]");
    let others = [
        olga.replace("roles: [approve]", "roles: [audit]"),
        olga.replace("groups: [leads]", "groups: [payers]"),
        olga.replace("sub: olga", "sub: ana"),
        olga.replace("sub: olga", "sub: olga2"),
    ];
    for (amount, other) in (1..).zip(&others) {
        let digest = desk.needs(desk.refund(amount)).await.digest;
        desk.approve("olga", &digest).await.unwrap();
        let revision = desk.apply(|policy| policy.replace(&olga, other)).await;
        let refund = || wire::CheckRequest { at_least: revision.clone(), ..desk.refund(amount) };
        if amount == 4 {
            // Another user of the same operator does not change this one.
            desk.permits(refund()).await;
            continue;
        }
        let asked = desk.needs(refund()).await;
        assert_eq!((&asked.digest, asked.approvers.as_slice()), (&digest, &["leads".to_owned()][..]));
        desk.approve("otto", &digest).await.unwrap();
        desk.permits(refund()).await;
        desk.apply(|policy| policy.replace(other.as_str(), &olga)).await;
    }
}

/// The preparation must still be permitted when the call uses it.
#[tokio::test]
async fn a_prepared_call_is_still_permitted_at_its_use() {
    let desk = ApprovalFixture::new().await;
    let call = |tool: &str| desk.world.call(&desk.chain, tool, "{\"id\":1}");
    let digest = desk.needs(call(PREPARE)).await.digest;
    desk.approve("olga", &digest).await.unwrap();
    let deny = "deny: [pay/large]";
    let revision = desk.apply(|policy| policy.replace(deny, "deny: [pay/large, pay/prepare]")).await;
    let denied = wire::CheckRequest { at_least: revision, ..call(EXECUTE) };
    let answer = desk.denies(denied, "AGENT_DENIES", "agent").await;
    assert!(answer.message.contains(PREPARE), "{}", answer.message);
    let revision = desk.apply(|policy| policy.replace("deny: [pay/large, pay/prepare]", deny)).await;
    desk.permits(wire::CheckRequest { at_least: revision, ..call(EXECUTE) }).await;
}

#[tokio::test]
async fn an_approval_never_lifts_a_deny() {
    let desk = ApprovalFixture::new().await;
    let digests = [desk.needs(desk.refund(1)).await.digest, desk.needs(desk.refund(2)).await.digest];
    for digest in &digests {
        desk.approve("olga", digest).await.unwrap();
    }
    let revision = desk
        .apply(|policy| policy.replace("deny: [pay/large]", "deny: [pay/large, {pay/refund: {args: {amount: {max: 1}}}}]"))
        .await;
    let denied = wire::CheckRequest { at_least: revision, ..desk.refund(1) };
    desk.denies(denied, "AGENT_DENIES", "agent").await;
    desk.local.revoke("session", &["s-1"], Dead).await;
    let until = Instant::now() + PATIENCE;
    loop {
        let answer = desk.client.clone().check(desk.refund(3)).await.unwrap().into_inner();
        if answer.reason == "REVOKED_SESSION" {
            break;
        }
        assert!(Instant::now() < until, "{}", answer.reason);
    }
    desk.denies(desk.refund(2), "REVOKED_SESSION", "revocation").await;
    let states: Vec<_> = desk.list("olga", true).await.unwrap().approvals.into_iter().map(|item| item.state).collect();
    assert_eq!(&states[..2], ["approved", "approved"], "what is denied uses nothing");
}

/// Prepare and execute are different tools. An approval of the first serves one call of the second, with equal arguments.
#[tokio::test]
async fn an_execution_needs_its_preparation() {
    let desk = ApprovalFixture::new().await;
    let call = |tool: &str, id: u64| desk.world.call(&desk.chain, tool, &format!("{{\"id\":{id}}}"));
    let denied = async |tool: &str, id: u64, reason: &str, names: &str| {
        let answer = desk.denies(call(tool, id), reason, "agent").await;
        assert!(answer.message.contains(names), "{}", answer.message);
    };
    denied(EXECUTE, 1, "APPROVAL_REQUIRED", PREPARE).await;
    let digest = desk.needs(call(PREPARE, 1)).await.digest;
    denied(EXECUTE, 1, "APPROVAL_REQUIRED", PREPARE).await;
    desk.approve("olga", &digest).await.unwrap();
    denied(EXECUTE, 2, "APPROVAL_REQUIRED", PREPARE).await;
    desk.permits(call(PREPARE, 1)).await;
    let request = wire::CheckRequest { request_id: "r".to_owned(), ..call(EXECUTE, 1) };
    let first = desk.permits(request.clone()).await;
    assert_eq!(desk.permits(request).await.decision_id, first.decision_id, "a lost answer is given again");
    denied(EXECUTE, 1, "APPROVAL_USED", PREPARE).await;
    desk.denies(call(PREPARE, 1), "APPROVAL_USED", "agent").await;
    let line = desk.server.audit().into_iter().find(|line| line["decision_id"] == json!(first.decision_id)).unwrap();
    assert_eq!(line["approval_digest"], json!(digest));

    let digest = desk.needs(call(PREPARE, 3)).await.digest;
    desk.refuse("olga", &digest).await.unwrap();
    denied(EXECUTE, 3, "APPROVAL_REFUSED", PREPARE).await;
    let until = Instant::now() + PATIENCE;
    let mut id = 4;
    let approved = loop {
        let asked = desk.needs(call(QUICK, id)).await;
        match desk.approve("olga", &asked.digest).await {
            Ok(_) => break asked,
            Err(late) => assert!(Instant::now() < until, "{late:?}"),
        }
        id += 1;
    };
    while now(0).unix_ms() <= approved.expires_at_unix_ms {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    denied(SWIFT, id, "APPROVAL_EXPIRED", QUICK).await;
}

#[tokio::test]
async fn a_lost_answer_is_given_again() {
    let desk = ApprovalFixture::new().await;
    let digest = desk.needs(desk.refund(100)).await.digest;
    // The proof that asked is spent, so a replay of it uses nothing.
    let replay = wire::CheckRequest { request_id: "r-0".to_owned(), want_handle: true, ..desk.refund(100) };
    desk.needs(replay.clone()).await;
    desk.approve("olga", &digest).await.unwrap();
    desk.denies(replay, "PROOF_REPLAYED", "identity").await;

    let request = wire::CheckRequest { request_id: "r-1".to_owned(), want_handle: true, ..desk.refund(100) };
    let first = desk.permits(request.clone()).await;
    let again = desk.permits(request.clone()).await;
    assert_eq!(again.decision_id, first.decision_id);
    assert_eq!((first.handle.len(), again.handle.len()), (16, 0), "the answer that is given again makes no handle");
    // The gateway comes back on another connection.
    let mut other = desk.server.connect().await;
    let elsewhere = other.check(request.clone()).await.unwrap().into_inner();
    assert_eq!((elsewhere.decision_id, elsewhere.handle.len()), (first.decision_id.clone(), 0));
    desk.denies(wire::CheckRequest { request_id: "r-2".to_owned(), ..request.clone() }, "PROOF_REPLAYED", "identity").await;
    desk.denies(wire::CheckRequest { request_id: String::new(), ..request }, "PROOF_REPLAYED", "identity").await;
    let anew = |id: &str| wire::CheckRequest { request_id: id.to_owned(), ..desk.refund(100) };
    desk.denies(anew("r-2"), "APPROVAL_USED", "agent").await;
    desk.denies(anew("r-1"), "APPROVAL_USED", "agent").await;
    let lines = desk.server.audit();
    let permits = lines.iter().filter(|line| line["decision_id"] == json!(first.decision_id)).count();
    assert_eq!(permits, 3, "each answer is recorded");
}

/// Callers hang up in the middle of a use, with each kind of call. Each use has its record, and no use happens without one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_hang_up_are_recorded() {
    let mut desk = ApprovalFixture::new().await;
    let (until, mut unseen, mut amount) = (Instant::now() + PATIENCE, vec!["check", "batch", "stream"], 0);
    // A call that arrives too late on a busy machine is as good as never made, and another round makes others.
    while !unseen.is_empty() {
        assert!(Instant::now() < until, "nobody was in the middle of a use by {unseen:?}");
        let mut asks: Vec<(&str, String, wire::CheckRequest)> = Vec::new();
        for way in ["check", "check", "check", "batch", "stream", "stream", "stream"] {
            amount += 1;
            let digest = desk.needs(desk.refund(amount)).await.digest;
            desk.approve("olga", &digest).await.unwrap();
            asks.push((way, digest, desk.refund(amount)));
        }
        let mut clients = Vec::new();
        for _ in &asks {
            clients.push(desk.server.connect().await);
        }
        // Nobody writes while this is held: every use stops in its middle.
        let other = rusqlite::Connection::open(desk.store()).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        let mut hanging = tokio::task::JoinSet::new();
        for ((way, _, request), mut client) in asks.iter().cloned().zip(clients) {
            hanging.spawn(async move {
                match way {
                    "check" => drop(client.check(request).await),
                    "batch" => drop(client.check_batch(wire::CheckBatchRequest { requests: vec![request] }).await),
                    _ => {
                        let mut answers = client.check_stream(tokio_stream::iter([request])).await.unwrap().into_inner();
                        drop(answers.message().await);
                    }
                }
            });
        }
        // Where the store answers none of them within a second, the first are refused.
        let enough = Instant::now() + Duration::from_millis(900);
        while desk.server.metric("portcullis_ledger_uses") < asks.len() as f64 && Instant::now() < enough {
            tokio::task::yield_now().await;
        }
        hanging.shutdown().await;
        other.execute_batch("COMMIT").unwrap();
        while desk.server.metric("portcullis_ledger_uses") > 0.0 {
            assert!(Instant::now() < until, "a use does not end");
            tokio::task::yield_now().await;
        }
        // Whatever was used was in its middle when its caller hung up: no answer could be given before.
        let items = desk.list("roleless", true).await.unwrap().approvals;
        let is_used = |digest: &str| items.iter().any(|item| item.digest == digest && item.state == "used");
        unseen.retain(|way| !asks.iter().any(|(asked, digest, _)| asked == way && is_used(digest)));
    }
    desk.server.terminate();
    assert!(desk.server.wait().success());
    let permitted: Vec<Value> = desk.server.audit().into_iter().filter(|line| line["effect"] == "PERMIT").collect();
    let store = SqliteStore::open(&desk.store(), Arc::new(SystemClock)).unwrap();
    let rows = store.approvals(ApprovalFilter::All, 1000).await.unwrap().rows;
    let used: Vec<_> =
        rows.iter().filter_map(|row| row.used.as_ref().map(|made| (&row.call.digest, &made.decision_id))).collect();
    for (digest, decision_id) in &used {
        let records = permitted.iter().filter(|line| line["decision_id"] == json!(decision_id)).collect::<Vec<_>>();
        assert_eq!(records.len(), 1, "{decision_id}: {records:?}");
        assert_eq!(records[0]["approval_digest"], json!(digest));
    }
    assert_eq!(permitted.len(), used.len(), "nothing is permitted without a use");
}

#[tokio::test]
async fn an_agent_may_have_so_many_wait() {
    let desk = ApprovalFixture::new().await;
    let requests: Vec<_> = (1..=100).map(|amount| desk.refund(amount)).collect();
    let answers = desk.client.clone().check_batch(wire::CheckBatchRequest { requests }).await.unwrap().into_inner().responses;
    let wrong: Vec<_> = answers.iter().filter(|answer| answer.effect() != wire::Effect::NeedsApproval).collect();
    assert!(wrong.is_empty(), "{} of {}: {:?}", wrong.len(), answers.len(), wrong.first());
    let over = desk.denies(desk.refund(101), "APPROVAL_REQUIRED", "agent").await;
    assert!(over.message.contains("100 calls of this user by this agent"), "{}", over.message);
    assert_eq!(desk.list("olga", false).await.unwrap().total, 100);
    desk.refuse("olga", &answers[0].approval.as_ref().unwrap().digest).await.unwrap();
    desk.needs(desk.refund(101)).await;
    let large = desk.world.call(&desk.chain, QUICK, &format!("{{\"a\":\"{}\"}}", "x".repeat(17_000)));
    let large = desk.denies(large, "APPROVAL_REQUIRED", "agent").await;
    assert!(large.message.contains("cannot be shown"), "{}", large.message);
}

/// Two replicas of one store receive the same approved call at the same time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_two_replicas_uses_an_approval() {
    let desk = ApprovalFixture::new().await;
    let store = format!("sqlite:{}", desk.store().display());
    let second =
        ServerProcess::start_at(&desk.world, binary().args(["--store", &store]), &desk.world.folder.path().join("second"));
    let clients = [desk.client.clone(), second.connect().await];
    for round in 0..ROUNDS {
        let amount = round as u64 + 1;
        let digest = desk.needs(desk.refund(amount)).await.digest;
        let item = clients[1].clone().check(desk.refund(amount)).await.unwrap().into_inner();
        assert_eq!(item.approval.unwrap().digest, digest, "the replicas speak of the same call");
        desk.approve(if round % 2 == 0 { "olga" } else { "otto" }, &digest).await.unwrap();
        let racers: Vec<_> = (0..6)
            .map(|racer| {
                let (mut client, request_id) = (clients[racer % 2].clone(), format!("r-{racer}"));
                let request = wire::CheckRequest { request_id, ..desk.refund(amount) };
                tokio::spawn(async move { client.check(request).await.unwrap().into_inner() })
            })
            .collect();
        let mut permits = 0;
        for racer in racers {
            let answer = racer.await.unwrap();
            match answer.effect() {
                wire::Effect::Permit => permits += 1,
                _ => assert_eq!(answer.reason, "APPROVAL_USED", "{}", answer.message),
            }
        }
        assert_eq!(permits, 1, "round {round}");
    }
    // The same request, lost on one replica, gets its answer again from the other.
    let digest = desk.needs(desk.refund(400)).await.digest;
    desk.approve("olga", &digest).await.unwrap();
    let request = wire::CheckRequest { request_id: "lost".to_owned(), want_handle: true, ..desk.refund(400) };
    let first = desk.permits(request.clone()).await;
    let again = clients[1].clone().check(request).await.unwrap().into_inner();
    assert_eq!((again.effect(), again.decision_id), (wire::Effect::Permit, first.decision_id));
}

#[tokio::test]
async fn the_command_line_shows_and_answers() {
    let mut desk = ApprovalFixture::new().await;
    let arguments = "{\"amount\":100,\"note\":\"\u{202e}ok\u{9b}2K\"}";
    let digest = desk.needs(desk.world.call(&desk.chain, REFUND, arguments)).await.digest;
    let other = desk.needs(desk.refund(2)).await.digest;
    let (url, olga) = (desk.server.admin_url(), desk.key_file("olga"));
    let cli = |command: &[&str]| -> CommandResult {
        let fixed = ["--target", &url, "--operator-key", olga.to_str().unwrap()];
        run(&[command, &fixed[..]].concat())
    };
    let table = cli(&["approvals"]).ended(0).stdout;
    for shown in [&digest[..12], "test.example/agent/alpha", REFUND, "\"amount\":100", "agent 0 by leads", "min left", "2 of 2"] {
        assert!(table.contains(shown), "no {shown} in:\n{table}");
    }
    assert!(!table.contains(&digest[..13]) && !table.contains('\u{202e}') && !table.contains('\u{9b}'), "{table}");
    let full = cli(&["approvals", &digest[..8]]).ended(0).stdout;
    assert!([&*digest, "portal", "s-1", "t-1", "\\u{202e}ok"].iter().all(|shown| full.contains(shown)), "{full}");
    let listed = cli(&["--json", "approvals"]).ended(0).json();
    let item = &listed["approvals"][0];
    assert_eq!((&listed["total"], &item["digest"], &item["state"]), (&json!(2), &json!(digest), &json!("waiting")));
    assert_eq!(item["arguments"], serde_json::from_str::<Value>(arguments).unwrap());
    assert_eq!((&item["layers"][0]["by"], &item["layers"][0]["hop"]), (&json!(["leads"]), &json!(0)));

    for (bad, says) in [(&digest[..7], "8 to 64"), ("XYZ01234", "8 to 64")] {
        assert!(cli(&["approve", bad]).ended(64).stderr.contains(says));
    }
    let unknown = if digest.starts_with("0000000") || other.starts_with("0000000") { "11111111" } else { "00000000" };
    assert!(cli(&["approve", unknown]).ended(1).stderr.contains("no call"));
    let ran = cli(&["approve", &digest[..8], "--reason", "checked the invoice"]).ended(0);
    assert!(ran.stdout.contains(&format!("approved {digest}")) && ran.stdout.contains("revision "), "{ran:?}");
    desk.permits(desk.world.call(&desk.chain, REFUND, arguments)).await;
    assert!(cli(&["approve", &digest]).ended(1).stderr.contains("used already"));
    let all = cli(&["--json", "approvals", "--all"]).ended(0).json();
    assert_eq!((&all["approvals"][0]["state"], &all["approvals"][1]["state"]), (&json!("used"), &json!("waiting")));
    let act = desk.server.audit().into_iter().find(|line| line["method"] == APPROVE && line["effect"] == "ACCEPTED").unwrap();
    assert!(act["reason"].as_str().unwrap().contains("checked the invoice"), "{act}");

    // The command opens the store itself, because no server runs.
    desk.server.terminate();
    assert!(desk.server.wait().success());
    let (store, data) = (format!("sqlite:{}", desk.store().display()), desk.world.data());
    let offline = ["--store", &store, "--data", data.to_str().unwrap(), "--operator-key", olga.to_str().unwrap()];
    let ran = run(&[&["--json", "refuse", &other[..10]], &offline[..]].concat()).ended(0);
    assert_eq!(ran.json()["approval"]["state"], json!("refused"));
    let left = run(&[&["--json", "approvals"], &offline[..]].concat()).ended(0).json();
    assert_eq!(left["total"], json!(0));
}

/// A stolen key approves. Once it is revoked the call waits again, whoever makes it.
#[tokio::test]
async fn an_approval_dies_with_the_key_that_gave_it() {
    let desk = ApprovalFixture::new().await;
    let approval = desk.needs(desk.refund(41)).await;
    let message = wire::ApproveRequest { digest: approval.digest.clone(), reason: String::new() };
    let mut client = ApprovalServiceClient::new(desk.local.channel.clone());
    client.approve(signed(message.clone(), &[desk.by("olga", APPROVE, &message)])).await.unwrap();
    desk.local.revoke("key", &[desk.key("olga").public_key().thumbprint().as_str()], Dead).await;
    let again = desk.needs(desk.refund(41)).await;
    assert_eq!(again.digest, approval.digest);
    client.approve(signed(message.clone(), &[desk.by("otto", APPROVE, &message)])).await.unwrap();
    desk.asks(desk.refund(41), wire::Effect::Permit, "OK").await;
}
