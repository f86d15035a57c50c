//! Attacks on administration, over raw gRPC: a message without a signature of the right operator for exactly that message changes
//! nothing.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use portcullis::api::r#gen as wire;
use portcullis::api::r#gen::fleet_service_client::FleetServiceClient;
use portcullis::api::r#gen::policy_service_client::PolicyServiceClient;
use portcullis::api::r#gen::revocation_service_client::RevocationServiceClient;
use portcullis::token::{PrivateKey, issue};
use prost::Message;
use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::harness::{OperatorClient, ServerProcess, TestWorld, agent_id, authorization, channel, jwk, now, signed, target};

const REVOKE: &str = "/portcullis.v1.RevocationService/Revoke";
const REINSTATE: &str = "/portcullis.v1.RevocationService/Reinstate";
const LIST: &str = "/portcullis.v1.RevocationService/List";
const APPLY: &str = "/portcullis.v1.PolicyService/Apply";

fn kill_alpha() -> wire::RevokeRequest {
    wire::RevokeRequest {
        target: Some(target("agent", &[&agent_id("alpha")])),
        reason: "attack".to_owned(),
        ..Default::default()
    }
}

impl OperatorClient {
    async fn try_revoke(&self, message: wire::RevokeRequest, by: &[String]) -> Result<wire::RevokeResponse, Status> {
        let mut client = RevocationServiceClient::new(self.channel.clone());
        client.revoke(signed(message, by)).await.map(tonic::Response::into_inner)
    }

    async fn try_reinstate(&self, message: wire::ReinstateRequest, by: &[String]) -> Result<wire::ReinstateResponse, Status> {
        let mut client = RevocationServiceClient::new(self.channel.clone());
        client.reinstate(signed(message, by)).await.map(tonic::Response::into_inner)
    }

    async fn try_list(&self, by: &[String]) -> Result<wire::ListRevocationsResponse, Status> {
        let mut client = RevocationServiceClient::new(self.channel.clone());
        client.list(signed(wire::ListRevocationsRequest { limit: 0 }, by)).await.map(tonic::Response::into_inner)
    }

    async fn try_apply(&self, message: wire::ApplyPolicyRequest, by: &[String]) -> Result<wire::ApplyPolicyResponse, Status> {
        PolicyServiceClient::new(self.channel.clone()).apply(signed(message, by)).await.map(tonic::Response::into_inner)
    }

    async fn revision(&self) -> String {
        let mut client = FleetServiceClient::new(self.channel.clone());
        client.info(wire::InfoRequest {}).await.unwrap().into_inner().revision
    }

    /// A signature with these claims instead of the right ones.
    fn forged(&self, method: &str, message: &impl Message, change: impl FnOnce(&mut Value)) -> String {
        let right = self.authorization(method, message);
        let payload = right.split('.').nth(1).unwrap();
        let mut claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).unwrap()).unwrap();
        change(&mut claims);
        format!("Operator {}", issue::sign_jws(&self.key, &issue::jws_header("operator+jwt"), claims.to_string().as_bytes()))
    }
}

/// The refused acts in the audit log, newest last.
fn refused(server: &ServerProcess) -> Vec<Value> {
    server.audit().into_iter().filter(|line| line["kind"] == "act" && line["effect"] == "REFUSED").collect()
}

fn reason_of(status: &Status) -> (String, String) {
    let details = status.get_error_details();
    let info = details.error_info().unwrap_or_else(|| panic!("no ErrorInfo: {status:?}"));
    (info.reason.clone(), info.domain.clone())
}

#[tokio::test]
async fn a_signature_that_does_not_fit_is_refused_and_recorded() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let operator = server.operator().await;
    let before = operator.revision().await;
    let message = kill_alpha();
    let unix_s = now(0).unix_s();
    let dates = |iat: i64, exp: i64| {
        operator.forged(REVOKE, &message, |claims| (claims["iat"], claims["exp"]) = (json!(iat), json!(exp)))
    };
    let stranger = PrivateKey::generate().unwrap();
    let right = operator.authorization(REVOKE, &message);
    let (head, tail) = right.split_at(right.len() - 40);
    let other_signature = format!("{head}{}{}", if tail.starts_with('A') { 'B' } else { 'A' }, &tail[1..]);
    let attacks: Vec<(&str, Vec<String>, &str)> = vec![
        ("unsigned", vec![], "not signed"),
        ("not an operator's", vec!["Bearer x.y.z".to_owned()], "not `Operator"),
        ("garbage", vec!["Operator garbage".to_owned()], "malformed"),
        ("another message", vec![operator.authorization(REVOKE, &wire::RevokeRequest::default())], "`hth`"),
        ("another method", vec![operator.authorization(REINSTATE, &message)], "`htm`"),
        ("another history", vec![operator.forged(REVOKE, &message, |claims| claims["aud"] = json!("other"))], "`aud`"),
        ("no audience", vec![operator.forged(REVOKE, &message, |claims| claims["aud"] = Value::Null)], "`aud`"),
        ("stale", vec![dates(unix_s - 90, unix_s - 40)], "expired"),
        ("ahead", vec![dates(unix_s + 300, unix_s + 330)], "not valid yet"),
        ("long-lived", vec![dates(unix_s, unix_s + 3600)], "lives more than"),
        ("no jti", vec![operator.forged(REVOKE, &message, |claims| claims["jti"] = json!(""))], "`jti`"),
        ("a stranger's key", vec![authorization(&stranger, &operator.history, REVOKE, &message)], "no operator has the key"),
        (
            "an agent's key",
            vec![authorization(world.key("alpha"), &operator.history, REVOKE, &message)],
            "no operator has the key",
        ),
        ("a signature changed", vec![other_signature], "does not verify"),
        ("one operator twice", vec![right, operator.authorization(REVOKE, &message)], "signed twice"),
    ];
    for (count, (name, by, says)) in attacks.iter().enumerate() {
        let status = operator.try_revoke(message.clone(), by).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{name}: {status:?}");
        assert_eq!(reason_of(&status), ("UNAUTHENTICATED".to_owned(), "portcullis".to_owned()), "{name}");
        assert!(status.message().contains(says), "{name}: {}", status.message());
        let lines = refused(&server);
        assert_eq!(lines.len(), count + 1, "{name}: one line each");
        let line = lines.last().unwrap();
        assert_eq!(
            (&line["method"], &line["signatures"], &line["revision"]),
            (&json!(REVOKE), &json!([]), &Value::Null),
            "{name}"
        );
        assert_eq!(line["reason"], status.message(), "{name}");
        assert!(line["time_unix_ns"].as_i64().unwrap() > 0 && line["peer"].as_str().unwrap().starts_with("127.0.0.1:"), "{line}");
        assert!(line.get("operator").is_some(), "{line}");
    }
    assert_eq!(operator.revision().await, before, "nothing was written");
    let listed = operator.try_list(&[operator.authorization(LIST, &wire::ListRevocationsRequest { limit: 0 })]).await.unwrap();
    assert_eq!(listed.total, 0);
}

#[tokio::test]
async fn a_signature_counts_once() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let operator = server.operator().await;
    let by = [operator.authorization(REVOKE, &kill_alpha())];
    let revoked = operator.try_revoke(kill_alpha(), &by).await.unwrap().revision;
    let again = operator.try_revoke(kill_alpha(), &by).await.unwrap_err();
    assert_eq!((again.code(), operator.revision().await), (Code::Unauthenticated, revoked), "{again:?}");
    assert!(again.message().contains("used before"), "{again:?}");
    let line = refused(&server).pop().unwrap();
    assert_eq!((&line["operator"], &line["method"]), (&json!("local"), &json!(REVOKE)));

    let read = [operator.authorization(LIST, &wire::ListRevocationsRequest { limit: 0 })];
    assert_eq!(operator.try_list(&read).await.unwrap().total, 1);
    let again = operator.try_list(&read).await.unwrap_err();
    assert_eq!(again.code(), Code::Unauthenticated);
    let line = refused(&server).pop().unwrap();
    assert_eq!((&line["operator"], &line["method"]), (&json!("local"), &json!(LIST)));

    let dry = wire::ApplyPolicyRequest { files: vec![], dry_run: true };
    let by_dry = [operator.authorization(APPLY, &dry)];
    operator.try_apply(dry.clone(), &by_dry).await.unwrap();
    let again = operator.try_apply(dry, &by_dry).await.unwrap_err();
    assert_eq!(again.code(), Code::Unauthenticated, "{again:?}");

    // The act is recorded with its signature.
    let done: Vec<Value> =
        server.audit().into_iter().filter(|line| line["effect"] == "ACCEPTED" && line["method"] == REVOKE).collect();
    assert_eq!(done.len(), 1);
    assert_eq!(done[0]["signatures"], json!([by[0].strip_prefix("Operator ").unwrap()]));
    assert_eq!(done[0]["operators"], json!(["local"]));
    assert!(done[0]["reason"].as_str().unwrap().contains("attack"), "{}", done[0]);
}

/// The second server starts in the same second. It would accept the operator's key, but its history is another.
#[tokio::test]
async fn a_signature_for_another_store_is_refused() {
    let (here, there) = (TestWorld::new(), TestWorld::new());
    let (first, second) = (ServerProcess::start(&here), ServerProcess::start(&there));
    let (operator, other) = (first.operator().await, second.operator().await);
    assert_ne!(operator.history, other.history);
    let by = authorization(&operator.key, &other.history, REVOKE, &kill_alpha());
    let refused = operator.try_revoke(kill_alpha(), &[by]).await.unwrap_err();
    assert!(refused.code() == Code::Unauthenticated && refused.message().contains("`aud`"), "{refused:?}");
    let by = authorization(&operator.key, &other.history, REVOKE, &kill_alpha());
    let refused = other.try_revoke(kill_alpha(), &[by]).await.unwrap_err();
    assert!(refused.code() == Code::Unauthenticated && refused.message().contains("no operator has"), "{refused:?}");
}

/// The policy with more operators, and their keys.
struct OperatorFixture {
    world: TestWorld,
    server: ServerProcess,
    local: OperatorClient,
    responder: PrivateKey,
    admin: PrivateKey,
}

impl OperatorFixture {
    async fn new() -> Self {
        let world = TestWorld::new();
        let [responder, admin] = [(); 2].map(|()| PrivateKey::generate().unwrap());
        let mut policy = world.policy();
        for (id, key, roles) in [("responder", &responder, "respond"), ("admin", &admin, "administer")] {
            policy.push_str(&format!("---\n{{kind: operator, id: {id}, keys: [{}], roles: [{roles}]}}\n", jwk(key)));
        }
        world.write_policy(&policy);
        let server = ServerProcess::start(&world);
        let local = server.operator().await;
        Self { world, server, local, responder, admin }
    }

    fn files(&self, extra: &str) -> wire::ApplyPolicyRequest {
        let mut content = std::fs::read_to_string(self.world.policies().join("policy.yaml")).unwrap();
        content.push_str(extra);
        let file = wire::PolicyFile { path: "policy.yaml".to_owned(), content: content.into() };
        wire::ApplyPolicyRequest { files: vec![file], dry_run: false }
    }

    fn by(&self, key: &PrivateKey, method: &str, message: &impl Message) -> String {
        authorization(key, &self.local.history, method, message)
    }
}

#[tokio::test]
async fn an_operator_does_what_its_roles_allow() {
    let team = OperatorFixture::new().await;
    let local = &team.local;
    let by = [team.by(&team.responder, REVOKE, &kill_alpha())];
    local.try_revoke(kill_alpha(), &by).await.unwrap();
    let before = local.revision().await;

    let message = wire::ReinstateRequest { target: kill_alpha().target, reason: String::new() };
    let by = [team.by(&team.responder, REINSTATE, &message)];
    let status = local.try_reinstate(message.clone(), &by).await.unwrap_err();
    assert_eq!((status.code(), reason_of(&status).0), (Code::PermissionDenied, "PERMISSION_DENIED".to_owned()));
    let line = refused(&team.server).pop().unwrap();
    assert_eq!((&line["operator"], &line["method"]), (&json!("responder"), &json!(REINSTATE)));

    let apply = team.files("---\n{kind: group, id: new, allow: [crm/read]}\n");
    let status = local.try_apply(apply.clone(), &[team.by(&team.responder, APPLY, &apply)]).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    let status = local.try_revoke(kill_alpha(), &[team.by(&team.admin, REVOKE, &kill_alpha())]).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    // One signer without the role spoils the act, because signers do not share their roles.
    let by = [team.by(&team.admin, REINSTATE, &message), team.by(&team.responder, REINSTATE, &message)];
    assert_eq!(local.try_reinstate(message.clone(), &by).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(refused(&team.server).len(), 4);
    assert_eq!(local.revision().await, before);

    local.try_reinstate(message.clone(), &[team.by(&team.admin, REINSTATE, &message)]).await.unwrap();
    local.try_apply(apply.clone(), &[team.by(&team.admin, APPLY, &apply)]).await.unwrap();
}

#[tokio::test]
async fn everything_is_reinstated_by_two_people() {
    let team = OperatorFixture::new().await;
    let local = &team.local;
    let shut = wire::RevokeRequest { target: Some(target("all", &[])), reason: "drill".to_owned(), ..Default::default() };
    let message = wire::ReinstateRequest { target: Some(target("all", &[])), reason: "over".to_owned() };
    let is_shut = async || {
        let empty = wire::ListRevocationsRequest { limit: 0 };
        let listed = local.try_list(&[local.authorization(LIST, &empty)]).await.unwrap();
        listed.revocations.iter().any(|row| row.target == Some(target("all", &[])) && row.suspended)
    };
    local.try_revoke(shut.clone(), &[local.authorization(REVOKE, &shut)]).await.unwrap();
    let by = [team.by(&team.responder, REINSTATE, &message)];
    assert_eq!(local.try_reinstate(message.clone(), &by).await.unwrap_err().code(), Code::PermissionDenied);

    // Two calls in a row: the first one waits; the same operator is refused; another operator completes it.
    let mine = [local.authorization(REINSTATE, &message)];
    let first = local.try_reinstate(message.clone(), &mine).await.unwrap();
    assert_eq!(first.waits_for_second_until_unix_ms, first.committed_at_unix_ms + 15 * 60_000);
    assert!(is_shut().await);
    assert_eq!(local.try_reinstate(message.clone(), &mine).await.unwrap_err().code(), Code::Unauthenticated, "replayed");
    let again = [local.authorization(REINSTATE, &message)];
    let status = local.try_reinstate(message.clone(), &again).await.unwrap_err();
    assert_eq!((status.code(), reason_of(&status).0.as_str()), (Code::FailedPrecondition, "REJECTED"), "{status:?}");
    assert!(status.message().contains("another operator"), "{status:?}");
    assert!(is_shut().await);
    let second = local.try_reinstate(message.clone(), &[team.by(&team.admin, REINSTATE, &message)]).await.unwrap();
    assert_eq!(second.waits_for_second_until_unix_ms, 0);
    assert!(!is_shut().await);
    let accepted = team.server.audit().into_iter().filter(|line| line["effect"] == "ACCEPTED" && line["method"] == REINSTATE);
    let operators: Vec<_> = accepted.map(|line| line["operators"].clone()).collect();
    assert_eq!(operators, [json!(["local"]), json!(["admin"])], "both halves are recorded");

    // Two signatures in one call. A call that waits for an earlier shutdown does not count for the next one.
    local.try_revoke(shut.clone(), &[local.authorization(REVOKE, &shut)]).await.unwrap();
    local.try_reinstate(message.clone(), &[local.authorization(REINSTATE, &message)]).await.unwrap();
    local.try_revoke(shut.clone(), &[local.authorization(REVOKE, &shut)]).await.unwrap();
    let by = [team.by(&team.admin, REINSTATE, &message)];
    assert!(local.try_reinstate(message.clone(), &by).await.unwrap().waits_for_second_until_unix_ms > 0);
    let two = [local.authorization(REINSTATE, &message), team.by(&team.admin, REINSTATE, &message)];
    assert_eq!(local.try_reinstate(message.clone(), &two).await.unwrap().waits_for_second_until_unix_ms, 0);
    assert!(!is_shut().await);
}

#[tokio::test]
async fn who_is_trusted_changes_by_two_people() {
    let team = OperatorFixture::new().await;
    let local = &team.local;
    let before = local.revision().await;
    let new = PrivateKey::generate().unwrap();
    let operator = team.files(&format!("---\n{{kind: operator, id: new, keys: [{}], roles: [administer]}}\n", jwk(&new)));
    let issuer = team.files(&format!("---\n{{kind: issuer, id: \"https://evil\", keys: {{jwks: {{keys: [{}]}}}}}}\n", jwk(&new)));
    for message in [&operator, &issuer] {
        let status = local.try_apply(message.clone(), &[local.authorization(APPLY, message)]).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
        assert!(status.message().contains("second"), "{status:?}");
        let line = refused(&team.server).pop().unwrap();
        assert_eq!((&line["operator"], &line["method"]), (&json!("local"), &json!(APPLY)));
        let twice = [local.authorization(APPLY, message), local.authorization(APPLY, message)];
        assert_eq!(local.try_apply(message.clone(), &twice).await.unwrap_err().code(), Code::Unauthenticated);
    }
    assert_eq!(local.revision().await, before);
    let two = [local.authorization(APPLY, &operator), team.by(&team.admin, APPLY, &operator)];
    local.try_apply(operator.clone(), &two).await.unwrap();
    let done = team.server.audit().into_iter().rfind(|line| line["effect"] == "ACCEPTED" && line["method"] == APPLY).unwrap();
    assert_eq!(done["operators"], json!(["local", "admin"]));
    assert_eq!(done["signatures"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn a_policy_with_an_error_changes_nothing() {
    let team = OperatorFixture::new().await;
    let local = &team.local;
    let before = local.revision().await;
    let bad = team.files("---\n{kind: application, id: x, alow: [crm/read]}\n");
    let status = local.try_apply(bad.clone(), &[local.authorization(APPLY, &bad)]).await.unwrap_err();
    assert_eq!((status.code(), reason_of(&status).0.as_str()), (Code::InvalidArgument, "POLICY_INVALID"));
    assert!(status.message().contains("policy.yaml:") && status.message().contains("alow"), "{status:?}");
    assert_eq!((local.revision().await, refused(&team.server).len()), (before, 1));
}

#[tokio::test]
async fn targets_and_meanings_that_are_none_are_refused() {
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    let operator = server.operator().await;
    let before = operator.revision().await;
    let long = "x".repeat(3000);
    let cases = [
        ("planet", vec!["x"], 0),
        ("agent", vec![], 0),
        ("agent", vec!["a", "b"], 0),
        ("agent", vec!["not-spiffe"], 0),
        ("session", vec![""], 0),
        ("session", vec![&long], 0),
        ("key", vec!["short"], 0),
        ("issuer-key", vec!["https://nobody", "k"], 0),
        ("all", vec!["x"], 0),
        ("session", vec!["s"], wire::RevocationMeaning::Suspend as i32),
        ("tool", vec!["crm/read"], wire::RevocationMeaning::Watermark as i32),
        ("session", vec!["s"], 77),
    ];
    for (count, (kind, key, meaning)) in cases.into_iter().enumerate() {
        let message = wire::RevokeRequest { target: Some(target(kind, &key)), meaning, reason: String::new() };
        let status = operator.try_revoke(message.clone(), &[operator.authorization(REVOKE, &message)]).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{kind} {key:?} {meaning}: {status:?}");
        assert_eq!(reason_of(&status).1, "portcullis");
        let lines = refused(&server);
        assert_eq!(lines.len(), count + 1, "{kind} {key:?} {meaning}: recorded");
        assert_eq!((&lines[count]["method"], &lines[count]["operator"]), (&json!(REVOKE), &json!("local")));
    }
    assert_eq!(operator.revision().await, before);
}

#[tokio::test]
async fn health_reflection_and_info_are_unsigned() {
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_client::HealthClient;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let world = TestWorld::new();
    let server = ServerProcess::start(&world);
    for (address, services) in [
        (&server.decisions, &["portcullis.v1.DecisionService", "portcullis.v1.FleetService"][..]),
        (&server.admin, &["portcullis.v1.RevocationService", "portcullis.v1.PolicyService", "portcullis.v1.FleetService"]),
    ] {
        let channel = channel(address).await;
        for service in ["", services[0]] {
            let mut client = HealthClient::new(channel.clone());
            let health = client.check(HealthCheckRequest { service: service.to_owned() }).await.unwrap().into_inner();
            assert_eq!(health.status, 1, "`{service}` serves");
        }
        let request = tonic_reflection::pb::v1::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut client = ServerReflectionClient::new(channel.clone());
        let mut stream = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
        let Some(MessageResponse::ListServicesResponse(listed)) = stream.message().await.unwrap().unwrap().message_response
        else {
            panic!("no list of services")
        };
        let names: Vec<_> = listed.service.into_iter().map(|service| service.name).collect();
        assert!(services.iter().all(|service| names.iter().any(|name| name == service)), "{names:?}");
        let info = FleetServiceClient::new(channel).info(wire::InfoRequest {}).await.unwrap().into_inner();
        assert!(info.revision.starts_with(&format!("{}.", info.history_id)) && !info.version.is_empty(), "{info:?}");
    }
    assert!(refused(&server).is_empty());
}
