//! Attacks with stolen, revoked or rotated-out operator keys, over raw gRPC and by the command line; and which operators can be locked
//! out.

use std::path::PathBuf;

use portcullis::api::r#gen as wire;
use portcullis::api::r#gen::approval_service_client::ApprovalServiceClient;
use portcullis::api::r#gen::fleet_service_client::FleetServiceClient;
use portcullis::api::r#gen::policy_service_client::PolicyServiceClient;
use portcullis::api::r#gen::revocation_service_client::RevocationServiceClient;
use portcullis::token::PrivateKey;
use prost::Message;
use serde_json::{Value, json};
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::harness::{
    CommandResult, OperatorClient, ServerProcess, TestWorld, agent_id, authorization, binary, jwk, run, run_with, signed, target,
};

const REVOKE: &str = "/portcullis.v1.RevocationService/Revoke";
const REINSTATE: &str = "/portcullis.v1.RevocationService/Reinstate";
const LIST: &str = "/portcullis.v1.RevocationService/List";
const REPLICAS: &str = "/portcullis.v1.FleetService/ListReplicas";
const APPLY: &str = "/portcullis.v1.PolicyService/Apply";
const ROLLBACK: &str = "/portcullis.v1.PolicyService/Rollback";
const APPROVE: &str = "/portcullis.v1.ApprovalService/Approve";

/// Two replicas of one store, and a team: `local` has every role, and so has `eve`, whose key is stolen.
struct OperatorTeam {
    world: TestWorld,
    url: String,
    servers: [ServerProcess; 2],
    local: OperatorClient,
    eve: PrivateKey,
    ada: PrivateKey,
    rob: PrivateKey,
}

impl OperatorTeam {
    async fn new() -> Self {
        let world = TestWorld::new();
        let [eve, ada, rob] = [(); 3].map(|()| PrivateKey::generate().unwrap());
        let mut policy = world.policy();
        for (id, key, roles) in
            [("eve", &eve, "respond, administer, approve, audit"), ("ada", &ada, "administer"), ("rob", &rob, "respond")]
        {
            policy.push_str(&format!("---\n{{kind: operator, id: {id}, keys: [{}], roles: [{roles}]}}\n", jwk(key)));
        }
        world.write_policy(&policy);
        let url = format!("sqlite:{}", world.folder.path().join("store.db").display());
        let with_store = || {
            let mut command = binary();
            command.arg("--store").arg(&url);
            command
        };
        let first = ServerProcess::start_with(&world, with_store().arg("--create").arg("--policies").arg(world.policies()));
        let second = ServerProcess::start_at(&world, &with_store(), &world.folder.path().join("data-2"));
        let local = first.operator().await;
        Self { world, url, servers: [first, second], local, eve, ada, rob }
    }

    async fn channels(&self) -> [Channel; 2] {
        [crate::harness::channel(&self.servers[0].admin).await, crate::harness::channel(&self.servers[1].admin).await]
    }

    fn by(&self, key: &PrivateKey, method: &str, message: &impl Message) -> String {
        authorization(key, &self.local.history, method, message)
    }

    async fn kill_key(&self, channel: &Channel, by: &PrivateKey, key: &PrivateKey) -> Result<(), Status> {
        let message = kill_key(key);
        let signature = self.by(by, REVOKE, &message);
        RevocationServiceClient::new(channel.clone()).revoke(signed(message, &[signature])).await.map(drop)
    }

    /// A command of an operator with this key, on the store itself.
    fn at_the_store(&self, key: &PrivateKey, arguments: &[&str]) -> CommandResult {
        let file = self.key_file(key);
        let mut command = binary();
        command.args(arguments).arg("--store").arg(&self.url).arg("--operator-key").arg(file);
        let data = self.world.folder.path().join("data-3");
        std::fs::create_dir_all(&data).unwrap();
        run_with(command.arg("--data").arg(data), "")
    }

    fn key_file(&self, key: &PrivateKey) -> PathBuf {
        let path = self.world.folder.path().join(format!("{}.jwk", key.public_key().thumbprint()));
        std::fs::write(&path, key.to_jwk().as_bytes()).unwrap();
        path
    }
}

fn thumbprint(key: &PrivateKey) -> String {
    key.public_key().thumbprint().to_string()
}

fn kill_key(key: &PrivateKey) -> wire::RevokeRequest {
    wire::RevokeRequest { target: Some(target("key", &[&thumbprint(key)])), reason: "stolen".to_owned(), ..Default::default() }
}

fn kill_alpha() -> wire::RevokeRequest {
    wire::RevokeRequest {
        target: Some(target("agent", &[&agent_id("alpha")])),
        reason: "attack".to_owned(),
        ..Default::default()
    }
}

fn reason_of(status: &Status) -> String {
    status.get_error_details().error_info().map(|info| info.reason.clone()).unwrap_or_default()
}

fn refused(server: &ServerProcess) -> Vec<Value> {
    server.audit().into_iter().filter(|line| line["kind"] == "act" && line["effect"] == "REFUSED").collect()
}

/// The answer of each method to these signers.
async fn everything(channel: &Channel, by: impl Fn(&str, &[u8]) -> Vec<String>) -> Vec<(&'static str, Result<(), Status>)> {
    let reinstate = wire::ReinstateRequest { target: kill_alpha().target, reason: String::new() };
    let list = wire::ListRevocationsRequest { limit: 0 };
    let apply = wire::ApplyPolicyRequest { files: vec![], dry_run: true };
    let rollback = wire::RollbackPolicyRequest { revision: "1".to_owned(), dry_run: true };
    let approve = wire::ApproveRequest { digest: "0".repeat(64), reason: String::new() };
    let mut revocations = RevocationServiceClient::new(channel.clone());
    let mut policy = PolicyServiceClient::new(channel.clone());
    let (revoke, replicas) = (kill_alpha(), wire::ListReplicasRequest {});
    let signed_by = |method: &str, bytes: Vec<u8>| by(method, &bytes);
    let mut answers = Vec::new();
    let authorizations = signed_by(REVOKE, revoke.encode_to_vec());
    answers.push((REVOKE, revocations.revoke(signed(revoke, &authorizations)).await.map(drop)));
    let authorizations = signed_by(REINSTATE, reinstate.encode_to_vec());
    answers.push((REINSTATE, revocations.reinstate(signed(reinstate, &authorizations)).await.map(drop)));
    let authorizations = signed_by(LIST, list.encode_to_vec());
    answers.push((LIST, revocations.list(signed(list, &authorizations)).await.map(drop)));
    let authorizations = signed_by(APPLY, apply.encode_to_vec());
    answers.push((APPLY, policy.apply(signed(apply, &authorizations)).await.map(drop)));
    let authorizations = signed_by(ROLLBACK, rollback.encode_to_vec());
    answers.push((ROLLBACK, policy.rollback(signed(rollback, &authorizations)).await.map(drop)));
    let authorizations = signed_by(APPROVE, approve.encode_to_vec());
    let mut approvals = ApprovalServiceClient::new(channel.clone());
    answers.push((APPROVE, approvals.approve(signed(approve, &authorizations)).await.map(drop)));
    let authorizations = signed_by(REPLICAS, replicas.encode_to_vec());
    let mut fleet = FleetServiceClient::new(channel.clone());
    answers.push((REPLICAS, fleet.list_replicas(signed(replicas, &authorizations)).await.map(drop)));
    answers
}

fn sign(key: &PrivateKey, history: &str, method: &str, bytes: &[u8]) -> String {
    use portcullis::token::operator_act::{self, AdminCall};
    let expected = AdminCall { audience: history, method, message: bytes };
    format!("Operator {}", operator_act::sign_act(key, &expected, crate::harness::now(0)))
}

#[tokio::test]
async fn a_revoked_key_signs_nothing_on_any_replica() {
    let team = OperatorTeam::new().await;
    let history = &team.local.history;
    let channels = team.channels().await;
    // Signed while the key was valid, and sent later.
    let kept = kill_alpha();
    let kept_by = [team.by(&team.eve, REVOKE, &kept)];
    team.kill_key(&channels[0], &team.local.key, &team.eve).await.unwrap();
    let before = team.local.revision_now().await;
    // The revocation holds at once, before any replica has followed it.
    for (server, channel) in team.servers.iter().zip(&channels).rev() {
        let already = refused(server).len();
        let late = RevocationServiceClient::new(channel.clone()).revoke(signed(kept.clone(), &kept_by)).await.unwrap_err();
        assert_eq!((late.code(), reason_of(&late).as_str()), (Code::Unauthenticated, "REVOKED_KEY"), "{late:?}");
        let alone = everything(channel, |method, bytes| vec![sign(&team.eve, history, method, bytes)]).await;
        // A valid second signature does not help, in either order.
        let first = everything(channel, |method, bytes| {
            vec![sign(&team.eve, history, method, bytes), sign(&team.local.key, history, method, bytes)]
        });
        let second = everything(channel, |method, bytes| {
            vec![sign(&team.local.key, history, method, bytes), sign(&team.eve, history, method, bytes)]
        });
        let answers = [alone, first.await, second.await].concat();
        let count = answers.len();
        for (method, answer) in answers {
            let status = answer.unwrap_err();
            assert_eq!(
                (status.code(), reason_of(&status).as_str()),
                (Code::Unauthenticated, "REVOKED_KEY"),
                "{method}: {status:?}"
            );
            assert!(status.message().contains(&thumbprint(&team.eve)), "{method}: {status:?}");
        }
        let lines = refused(server);
        assert_eq!(lines.len(), already + count + 1, "each is recorded");
        assert!(
            lines.iter().skip(already).all(|line| line["reason"].as_str().unwrap().contains("of operator `eve` is revoked")),
            "{lines:?}"
        );
    }
    let alone = team.at_the_store(&team.eve, &["revoke", "agent", &agent_id("alpha")]).ended(1);
    assert!(alone.stderr.contains("is revoked: it signs nothing any more"), "{alone:?}");
    team.at_the_store(&team.eve, &["revocations"]).ended(1);
    assert_eq!(team.local.revision_now().await, before, "nothing was written");
    // All other operators can still act.
    team.kill_key(&channels[1], &team.rob, &PrivateKey::generate().unwrap()).await.unwrap();
    team.at_the_store(&team.rob, &["revoke", "agent", &agent_id("alpha")]).ended(0);
}

impl OperatorClient {
    async fn revision_now(&self) -> String {
        let info = FleetServiceClient::new(self.channel.clone()).info(wire::InfoRequest {}).await;
        info.unwrap().into_inner().revision
    }
}

#[tokio::test]
async fn a_first_half_dies_with_the_key_that_signed_it() {
    let team = OperatorTeam::new().await;
    let channels = team.channels().await;
    let shut = wire::RevokeRequest { target: Some(target("all", &[])), ..Default::default() };
    let by = [team.by(&team.rob, REVOKE, &shut)];
    RevocationServiceClient::new(channels[0].clone()).revoke(signed(shut, &by)).await.unwrap();
    let message = wire::ReinstateRequest { target: Some(target("all", &[])), reason: "over".to_owned() };
    let reinstate = async |channel: &Channel, key: &PrivateKey| {
        let by = [team.by(key, REINSTATE, &message)];
        let answer = RevocationServiceClient::new(channel.clone()).reinstate(signed(message.clone(), &by)).await;
        answer.unwrap().into_inner().waits_for_second_until_unix_ms > 0
    };
    assert!(reinstate(&channels[0], &team.eve).await, "eve is the first");
    team.kill_key(&channels[0], &team.rob, &team.eve).await.unwrap();
    assert!(reinstate(&channels[1], &team.ada).await, "the first half is void, so ada is the first");
    assert!(!reinstate(&channels[0], &team.local.key).await, "and local the second");
}

#[tokio::test]
async fn the_last_administrator_is_not_locked_out_by_who_responds() {
    let team = OperatorTeam::new().await;
    let [channel, other] = team.channels().await;
    // One of several administrators can be revoked by a responder, because a stolen key must not wait for another administrator.
    team.kill_key(&channel, &team.rob, &team.eve).await.unwrap();
    team.kill_key(&other, &team.rob, &team.ada).await.unwrap();
    let before = team.local.revision_now().await;
    for channel in [&channel, &other] {
        let status = team.kill_key(channel, &team.rob, &team.local.key).await.unwrap_err();
        assert_eq!((status.code(), reason_of(&status).as_str()), (Code::PermissionDenied, "PERMISSION_DENIED"), "{status:?}");
        assert!(status.message().contains("nobody with the role `administer` would be left"), "{status:?}");
    }
    let line = refused(&team.servers[0]).pop().unwrap();
    assert_eq!((&line["operator"], &line["method"]), (&json!("rob"), &json!(REVOKE)));
    let refused = team.at_the_store(&team.rob, &["revoke", "key", &thumbprint(&team.local.key)]).ended(1);
    assert!(refused.stderr.contains("operator add"), "{refused:?}");
    assert_eq!(team.local.revision_now().await, before);
    // `revoke all` needs no administrator. An administrator may revoke its own key, which may be the stolen one.
    team.at_the_store(&team.rob, &["revoke", "all"]).ended(0);
    team.kill_key(&channel, &team.local.key, &team.local.key).await.unwrap();
    assert_eq!(team.kill_key(&other, &team.local.key, &team.rob).await.unwrap_err().code(), Code::Unauthenticated);
}

/// An operator who revokes the keys of all other administrators still needs a second one.
#[tokio::test]
async fn a_revoked_administrator_still_counts() {
    let team = OperatorTeam::new().await;
    let [channel, other] = team.channels().await;
    for key in [&team.local.key, &team.ada] {
        team.kill_key(&channel, &team.eve, key).await.unwrap();
    }
    let shut = wire::RevokeRequest { target: Some(target("all", &[])), ..Default::default() };
    let by = [team.by(&team.eve, REVOKE, &shut)];
    let mut revocations = RevocationServiceClient::new(other);
    revocations.revoke(signed(shut, &by)).await.unwrap();
    let message = wire::ReinstateRequest { target: Some(target("all", &[])), reason: "mine".to_owned() };
    let by = [team.by(&team.eve, REINSTATE, &message)];
    let alone = revocations.reinstate(signed(message, &by)).await.unwrap_err();
    assert_eq!(alone.code(), Code::PermissionDenied, "{alone:?}");
    let lack = "of 3 operators who administer, 1 has a live key: `eve`";
    assert!(alone.message().contains(lack) && alone.message().contains("--break-glass"), "nobody can be the second: {alone:?}");
    let content = format!(
        "{}---\n{{kind: operator, id: mallory, keys: [{}], roles: [administer]}}\n",
        std::fs::read_to_string(team.world.policies().join("policy.yaml")).unwrap(),
        jwk(&PrivateKey::generate().unwrap())
    );
    let file = wire::PolicyFile { path: "policy.yaml".to_owned(), content: content.into() };
    let apply = wire::ApplyPolicyRequest { files: vec![file], dry_run: false };
    let by = [team.by(&team.eve, APPLY, &apply)];
    let alone = PolicyServiceClient::new(channel).apply(signed(apply, &by)).await.unwrap_err();
    assert!(alone.code() == Code::PermissionDenied && alone.message().contains("second"), "{alone:?}");
    assert!(alone.message().contains(lack), "{alone:?}");
}

/// One server, and the command line of its first operator.
struct SingleServer {
    world: TestWorld,
    server: ServerProcess,
}

impl SingleServer {
    fn new() -> Self {
        let world = TestWorld::new();
        let server = ServerProcess::start(&world);
        Self { world, server }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.world.folder.path().join(name)
    }

    fn local(&self) -> PathBuf {
        self.world.data().join("local.jwk")
    }

    /// Runs a command at the server, signed with these keys.
    fn run(&self, keys: &[&PathBuf], arguments: &[&str]) -> CommandResult {
        let mut command = binary();
        command.arg("--json").args(arguments).arg("--target").arg(self.server.admin_url()).arg("--data").arg(self.file("cli"));
        for key in keys {
            command.arg("--operator-key").arg(key);
        }
        run_with(&mut command, "")
    }

    fn apply(&self, keys: &[&PathBuf], policy: &str) -> CommandResult {
        self.world.write_policy(policy);
        self.run(keys, &["policy", "apply", self.world.policies().to_str().unwrap()])
    }

    fn rollback(&self, keys: &[&PathBuf], revision: &Value) -> CommandResult {
        self.run(keys, &["policy", "rollback", revision.as_str().unwrap()])
    }

    fn add(&self, keys: &[&PathBuf], id: &str, more: &[&str]) -> (PathBuf, CommandResult) {
        let out = self.file(&format!("{id}.jwk"));
        let added = self.run(keys, &[&["operator", "add", id, "--out", out.to_str().unwrap()], more].concat());
        (out, added)
    }

    /// The operators with their state, and whether each of their keys is revoked.
    fn operators(&self, key: &PathBuf) -> Vec<(String, String, Vec<bool>)> {
        let said = self.run(&[key], &["operator", "list"]).ended(0).json();
        let of = |operator: &Value| {
            let text = |name: &str| operator[name].as_str().unwrap().to_owned();
            let keys = operator["keys"].as_array().unwrap().iter().map(|key| key["revoked"].as_bool().unwrap());
            (text("id"), text("state"), keys.collect())
        };
        said["operators"].as_array().unwrap().iter().map(of).collect()
    }
}

fn listed(id: &str, state: &str, revoked: bool) -> (String, String, Vec<bool>) {
    (id.to_owned(), state.to_owned(), vec![revoked])
}

fn public(file: &PathBuf) -> Value {
    jwk(&PrivateKey::from_jwk(&std::fs::read(file).unwrap()).unwrap())
}

#[test]
fn operators_come_and_go_by_command() {
    use std::os::unix::fs::PermissionsExt as _;
    let mut solo = SingleServer::new();
    let local = solo.local();
    let (ada, added) = solo.add(&[&local], "ada", &["--role", "administer", "--role", "respond", "--reason", "INC-1"]);
    let added = added.ended(0).json();
    assert_eq!((&added["operator"]["id"], &added["operator"]["roles"]), (&json!("ada"), &json!(["administer", "respond"])));
    assert_eq!(std::fs::metadata(&ada).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(solo.operators(&ada), [listed("ada", "active", false), listed("local", "active", false)]);
    // There are two administrators now, so one alone can no longer add, retire or apply operators.
    let bo = ["--role", "approve", "--group", "leads", "--user", crate::harness::ISSUER, "bo"];
    assert!(solo.add(&[&ada], "bo", &bo).1.ended(1).stderr.contains("a second one must sign"));
    assert!(!solo.file("bo.jwk").exists(), "nobody has the key of an operator who was not added");
    assert!(solo.run(&[&local], &["operator", "retire", "ada"]).ended(1).stderr.contains("a second one must sign"));
    let bo = solo.add(&[&ada, &local], "bo", &bo).1.ended(0).json();
    assert_eq!(bo["operator"]["users"], json!([[crate::harness::ISSUER, "bo"]]));
    let again = solo.run(&[&ada, &local], &["operator", "add", "bo", "--jwk", &public(&ada).to_string(), "--role", "audit"]);
    assert!(again.ended(64).stderr.contains("already"));
    // A folder leaves these operators alone. Its own operators are retired in the folder.
    let eve = PrivateKey::generate().unwrap();
    let with = format!("{}---\n{{kind: operator, id: eve, keys: [{}], roles: [audit]}}\n", solo.world.policy(), jwk(&eve));
    let applied = solo.apply(&[&ada, &local], &with).ended(0).json();
    assert_eq!(applied["changes"], json!([{ "change": "added", "kind": "operator", "id": "eve" }]));
    let refused = solo.run(&[&ada, &local], &["operator", "retire", "eve"]).ended(64);
    assert!(refused.stderr.contains("policy.yaml:") && refused.stderr.contains("revoke key"), "{refused:?}");

    solo.run(&[&ada, &local], &["operator", "retire", "local", "--reason", "everybody has their own"]).ended(0);
    let after = [
        listed("ada", "active", false),
        listed("bo", "active", false),
        listed("eve", "active", false),
        listed("local", "retired", true),
    ];
    assert_eq!(solo.operators(&ada), after);
    assert!(solo.run(&[&local], &["revocations"]).ended(1).stderr.contains("no operator has the key"));
    let last = solo.run(&[&ada], &["operator", "retire", "ada"]).ended(64);
    assert!(last.stderr.contains("no operator with the role `administer` would be left"), "{last:?}");
    let back = solo.run(&[&ada], &["operator", "add", "ghost", "--jwk", &public(&local).to_string(), "--role", "administer"]);
    assert!(back.ended(1).stderr.contains("is dead for good: it was revoked or rotated out (rotated out of operator local)"));
    // All of this survives a restart. `--policies` is an act of `local`, who is retired.
    solo.server.kill();
    let mut serve = binary();
    serve.arg("serve").arg("--policies").arg(solo.world.policies()).arg("--data").arg(solo.world.data());
    serve.args(["--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]);
    assert!(run_with(&mut serve, "").ended(78).stderr.contains("no operator has the key"));
    solo.server = ServerProcess::start_with(&solo.world, &binary());
    assert_eq!(solo.operators(&ada), after);
    let done = solo.server.audit().into_iter().filter(|line| line["method"] == "/portcullis.v1.OperatorService/Retire");
    let done: Vec<Value> = done.filter(|line| line["effect"] == "ACCEPTED").map(|line| line["operators"].clone()).collect();
    assert_eq!(done, [json!(["ada", "local"])]);
}

#[test]
fn a_key_that_was_rotated_out_does_not_come_back() {
    let mut solo = SingleServer::new();
    let local = solo.local();
    let keys: Vec<PrivateKey> = (0..4).map(|_| PrivateKey::generate().unwrap()).collect();
    let [old, new, spare, of_rob] = [0, 1, 2, 3].map(|index| &keys[index]);
    let alpha = |key: &PrivateKey| solo_policy(&solo.world, key);
    let rob = |key: &PrivateKey| format!("---\nkind: operator\nid: rob\nroles: [respond]\nkeys:\n  - {}\n", jwk(key));
    let first = solo.apply(&[&local], &format!("{}{}", alpha(old), rob(of_rob))).ended(0).json();
    // The agent's key is rotated, and the operator is retired.
    let rotated = solo.apply(&[&local], &alpha(new)).ended(0).json();
    let warned = rotated["warnings"].to_string();
    assert!(warned.contains(&format!("key `{}` of agent", thumbprint(old))), "{warned}");
    assert!(warned.contains(&format!("key `{}` of operator `rob` is rotated out", thumbprint(of_rob))), "{warned}");
    let shown = solo.run(&[&local], &["revocations"]).ended(0).json();
    assert_eq!(shown["total"], 3, "the key that alpha had at first too: {shown}");

    let check = |solo: &SingleServer| {
        let line = |text: &str, needle: &str| text.lines().position(|line| line.contains(needle)).unwrap() + 1;
        for (policy, key) in [(alpha(old), old), (format!("{}{}", alpha(new), rob(of_rob)), of_rob)] {
            let needle = if std::ptr::eq(key, old) { thumbprint(old) } else { jwk(of_rob)["x"].as_str().unwrap().to_owned() };
            let at = format!("policy.yaml:{}:", line(&policy, &needle));
            for arguments in [&["policy", "apply"][..], &["policy", "apply", "--dry-run"], &["policy", "diff"]] {
                solo.world.write_policy(&policy);
                let refused = solo.run(&[&local], &[arguments, &[solo.world.policies().to_str().unwrap()]].concat());
                let said = &refused.stderr;
                assert!(
                    refused.code == 1 && said.contains(&at) && said.contains(&thumbprint(key)),
                    "{arguments:?} {at}: {refused:?}"
                );
                assert!(said.contains("is dead for good"), "{refused:?}");
            }
        }
        let refused = solo.rollback(&[&local], &first["revision"]).ended(1);
        assert!(refused.stderr.contains("policy.yaml:") && refused.stderr.contains("is dead for good"), "{refused:?}");
        for key in [old, of_rob] {
            let add = ["operator", "add", "x", "--role", "audit", "--jwk", &jwk(key).to_string()];
            assert!(solo.run(&[&local], &add).ended(1).stderr.contains("is dead for good"));
        }
    };
    check(&solo);
    solo.server.kill();
    solo.server = ServerProcess::start_with(&solo.world, &binary());
    check(&solo);

    // Replacing the whole folder by another one kills no agent.
    solo.apply(&[&local], "{kind: group, id: staff}\n").ended(0);
    solo.apply(&[&local], &alpha(new)).ended(0);
    // A document with a key that was revoked in the meantime does not stop a server. No other document can get that key.
    solo.run(&[&local], &["revoke", "key", &thumbprint(new)]).ended(0);
    solo.apply(&[&local], &format!("{}# changed\n", alpha(new).replace("deny: [pay/large]", "deny: [pay/large, lab/probe]")))
        .ended(0);
    solo.apply(&[&local], &alpha(spare)).ended(0);
    assert!(solo.apply(&[&local], &alpha(new)).ended(1).stderr.contains("is dead for good"));
}

/// The world's policy, in which alpha has another key.
fn solo_policy(world: &TestWorld, key: &PrivateKey) -> String {
    world.policy().replace(&thumbprint(world.key("alpha")), &thumbprint(key))
}

#[test]
fn a_document_asks_for_two_people() {
    let solo = SingleServer::new();
    let local = solo.local();
    let (ada, added) = solo.add(&[&local], "ada", &["--role", "administer"]);
    added.ended(0);
    let alpha = agent_id("alpha");
    let two = solo.world.policy().replace(&format!("id: {alpha}\n"), &format!("id: {alpha}\ntwo_person: true\n"));
    let two = two
        .replace("id: pay\n", "id: pay\ntwo_person: true\n")
        .replace("{kind: application, id: kiosk,", "{kind: application, id: kiosk, two_person: true,");
    assert_eq!(two.matches("two_person").count(), 3);
    solo.world.write_policy(&two);
    let folder = solo.world.policies();
    let diff = solo.run(&[&ada], &["policy", "diff", folder.to_str().unwrap()]).ended(0).json();
    assert!(diff["warnings"].to_string().contains("from now on two people are needed to reinstate it"), "{diff}");
    solo.apply(&[&ada], &two).ended(0);

    let targets: [&[&str]; 4] = [
        &["agent", &alpha],
        &["delegation", crate::harness::ISSUER, "ana", &alpha],
        &["tool", "pay/refund"],
        &["application", "kiosk"],
    ];
    for target in targets {
        // No chain of this user was ever seen.
        let flags = |verb: &str| if verb == "revoke" { &["--unknown-ok"][..] } else { &[] };
        let act = |verb: &str, keys: &[&PathBuf]| solo.run(keys, &[&[verb], target, flags(verb)].concat());
        let waits = |ran: CommandResult| {
            assert!(ran.ended(4).json()["waits_for_second_until_unix_ms"].as_i64().unwrap() > 0, "{target:?}")
        };
        act("revoke", &[&local]).ended(0);
        waits(act("reinstate", &[&local]));
        assert!(act("reinstate", &[&local]).ended(1).stderr.contains("another operator"), "{target:?}");
        act("reinstate", &[&ada]).ended(0);
        // Two signatures in one call. An earlier first half does not count after another suspension.
        act("revoke", &[&local]).ended(0);
        waits(act("reinstate", &[&ada]));
        act("revoke", &[&local]).ended(0);
        waits(act("reinstate", &[&local]));
        act("reinstate", &[&local, &ada]).ended(0);
    }
    // A target whose document does not demand two people needs one operator.
    for target in [&["agent", &agent_id("beta")][..], &["tool", "crm/read"], &["application", "portal"]] {
        solo.run(&[&local], &[&["revoke"], target].concat()).ended(0);
        solo.run(&[&local], &[&["reinstate"], target].concat()).ended(0);
    }

    // The rule cannot be bypassed: not without the key, without the document, in shadow, or with an earlier policy.
    let plain = solo.world.policy();
    let gone = two.split("---\n").filter(|document| !document.contains("id: kiosk")).collect::<Vec<_>>().join("---\n");
    let shadow = two.replace("two_person: true, allow: [\"*\"]}", "two_person: true, mode: shadow, allow: [\"*\"]}");
    assert_ne!(shadow, two);
    for policy in [&plain, &gone, &shadow, &two.replace("id: pay\ntwo_person: true", "id: pay\ntwo_person: false")] {
        let alone = solo.apply(&[&ada], policy).ended(1);
        assert!(alone.stderr.contains("would no longer have it") && alone.stderr.contains("a second one must sign"), "{alone:?}");
    }
    let history = solo.run(&[&ada], &["policy", "history"]).ended(0).json();
    let before = &history["revisions"][1]["revision"];
    assert!(solo.rollback(&[&ada], before).ended(1).stderr.contains("a second one must sign"));
    solo.apply(&[&ada, &local], &plain).ended(0);
    // The key does not belong in a document of another kind.
    solo.world.write_policy(&format!("{plain}---\n{{kind: group, id: x, two_person: true}}\n"));
    let wrong = run(&["--json", "policy", "check", folder.to_str().unwrap()]);
    assert!(wrong.code == 1 && wrong.stdout.contains("has no meaning in a document of kind `group`"), "{wrong:?}");
}

#[test]
fn the_glass_is_broken_at_the_store_alone() {
    let solo = SingleServer::new();
    let local = solo.local();
    let before = solo.run(&[&local], &["policy", "history"]).ended(0).json();
    // The only administrator's key is stolen and revokes itself, so no administrator is left.
    let told = solo.run(&[&local], &["revoke", "key", &public_thumbprint(&local)]).ended(0).json();
    let note = told["name"]["note"].as_str().unwrap();
    assert!(note.contains("of 1 operator who administers, none has a live key") && note.contains("--break-glass"), "{note}");
    let refused = solo.run(&[&local], &["revocations"]).ended(1);
    assert!(refused.stderr.contains("is revoked: it signs nothing any more"), "{refused:?}");
    assert!(refused.stderr.contains("--break-glass"), "{refused:?}");
    let mut serve = binary();
    serve.arg("serve").arg("--policies").arg(solo.world.policies()).arg("--data").arg(solo.world.data());
    serve.args(["--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]);
    let refused = run_with(&mut serve, "").ended(78);
    assert!(refused.stderr.contains("of operator `local` is revoked"), "{refused:?}");
    assert!(refused.stderr.contains("start without --policies"), "{refused:?}");
    let store = format!("sqlite:{}", solo.world.data().join("store.db").display());
    let out = solo.file("ada.jwk");
    let add = [
        "operator",
        "add",
        "ada",
        "--role",
        "administer",
        "--role",
        "respond",
        "--reason",
        "INC-9",
        "--out",
        out.to_str().unwrap(),
    ];
    let on_the_store = |more: &[&str]| {
        let mut command = binary();
        command.arg("--json").args(add).args(["--store", &store]).arg("--data").arg(solo.world.data()).args(more);
        run_with(&mut command, "")
    };
    // A revoked key cannot add an operator at the store either.
    assert!(on_the_store(&[]).ended(1).stderr.contains("is revoked"));
    assert!(!out.exists(), "nobody has the key of an operator who was not added");
    // Nobody can add one over the network.
    assert_eq!(solo.run(&[&local], &[&add[..], &["--break-glass"]].concat()).code, 64);
    let added = on_the_store(&["--break-glass", "--operator-key", local.to_str().unwrap()]).ended(0);
    assert!(added.stderr.contains("the key of --operator-key is not used"), "{added:?}");
    // `local` still counts, so one more operator is needed where two must sign.
    assert!(added.stderr.contains("of 2 operators who administer, 1 has a live key: `ada`"), "{added:?}");
    let added = added.json();
    assert_eq!(added["operator"]["keys"][0]["thumbprint"], public_thumbprint(&out));
    // The running server knows the operator at once, and the history shows the act.
    let history = solo.run(&[&out], &["policy", "history"]).ended(0).json();
    let newest = &history["revisions"][0];
    let account = newest["account"].as_str().unwrap();
    assert!(
        account.starts_with("break glass, signed by nobody, user id ") && account.ends_with("add operator ada: INC-9"),
        "{newest}"
    );
    assert_eq!(newest["operators"], json!([]));
    assert_eq!(history["revisions"].as_array().unwrap().len(), before["revisions"].as_array().unwrap().len() + 1);
    let lines = crate::harness::audit_lines(&solo.world.data());
    assert!(lines.iter().any(|line| line["reason"].as_str().is_some_and(|reason| reason.contains("break glass"))), "{lines:?}");
    assert_eq!(solo.operators(&out), [listed("ada", "active", false), listed("local", "revoked", true)]);
    solo.run(&[&out], &["revoke", "agent", &agent_id("alpha")]).ended(0);
}

/// A folder knows the operators that commands added, and a refusal names the operator and the way out.
#[test]
fn a_folder_knows_the_operators_that_were_added_by_command() {
    let solo = SingleServer::new();
    let local = solo.local();
    solo.apply(&[&local], &solo.world.policy()).ended(0);
    // A mistyped issuer: the operator is named, warnings about other documents are left out, and no key is left behind.
    let wrong = ["--role", "approve", "--group", "leads", "--user", "https://nobody.example", "sue"];
    let (file, refused) = solo.add(&[&local], "sue", &wrong);
    let said = &refused.ended(1).stderr;
    assert!(said.contains("not done: the operator cannot be added: ") && said.contains("operator `sue`"), "{said}");
    assert!(said.contains("unknown issuer `https://nobody.example`") && !said.contains("(stored)"), "{said}");
    assert!(!file.exists());
    let warned = solo.add(&[&local], "max", &["--role", "approve", "--group", "leads"]).1.ended(0);
    assert!(warned.stderr.contains("without --user they can approve nothing"), "{warned:?}");
    solo.run(&[&local], &["operator", "retire", "max"]).ended(0);
    let right = ["--role", "approve", "--group", "leads", "--user", crate::harness::ISSUER, "sue"];
    solo.add(&[&local], "sue", &right).1.ended(0);

    let asking = |group: &str| {
        let extra = format!("---\nkind: group\nid: extra\napprove:\n- lab/probe: {{by: [{group}]}}\n");
        format!("{}{extra}", solo.world.policy())
    };
    for (group, is_told) in [("leads", false), ("ghosts", true)] {
        let applied = solo.apply(&[&local], &asking(group)).ended(0).json();
        let diff = solo.run(&[&local], &["policy", "diff", solo.world.policies().to_str().unwrap()]).ended(0).json();
        for answer in [applied, diff] {
            let warnings = answer["warnings"].to_string();
            assert_eq!(warnings.contains("nobody can approve"), is_told, "{group}: {warnings}");
        }
    }
    let refused = solo.apply(&[&local], "{kind: group, id: staff}\n").ended(1);
    assert!(
        refused.stderr.contains("operator `sue`") && refused.stderr.contains("portcullis operator retire sue"),
        "{refused:?}"
    );
    let typo = solo.run(&[&local], &["operator", "retire", "seu"]).ended(1);
    assert!(typo.stderr.contains("did you mean `sue`?"), "{typo:?}");
}

fn public_thumbprint(file: &PathBuf) -> String {
    thumbprint(&PrivateKey::from_jwk(&std::fs::read(file).unwrap()).unwrap())
}
