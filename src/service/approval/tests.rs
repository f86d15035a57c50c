//! Tests of the digest of a call and of the fingerprint of a request.

use super::*;
use crate::model::ids::UserId;
use crate::model::json::parse_object;

const EXPECTED: &str = "3e687299390908c57567388d1e12b51d8fb41f65964a70abb94e09a5e03f0e9d";

fn subject() -> DelegationSubject {
    DelegationSubject {
        user: UserId::new("https://i", "ana"),
        groups: vec![],
        application: "erp".into(),
        agents: vec!["spiffe://a/b".into()],
        scopes: vec![],
        session: "s".into(),
        task: "t".into(),
    }
}

#[test]
fn the_digest_is_of_the_canonical_call() {
    let of = |arguments: &str| call_digest(&subject(), "payments/refund", &parse_object(arguments.as_bytes()).unwrap());
    // printf '%s' '["https://i","ana","erp",["spiffe://a/b"],"s","t","payments/refund",{"amount":100,"id":"x"}]' | sha256sum
    assert_eq!(of(r#"{"id":"x","amount":1e2}"#), of(r#"{ "amount":100.0, "id":"x" }"#));
    assert_ne!(of(r#"{"amount":100}"#), of(r#"{"amount":"100"}"#));
    assert_eq!(of(r#"{"id":"x","amount":100}"#), EXPECTED);
}

#[test]
fn every_part_of_a_call_counts() {
    let arguments = parse_object(br#"{"amount":100}"#).unwrap();
    let plain = call_digest(&subject(), "pay/refund", &arguments);
    let check = |change: fn(&mut DelegationSubject)| {
        let mut other = subject();
        change(&mut other);
        assert_ne!(call_digest(&other, "pay/refund", &arguments), plain, "{other:?}");
    };
    check(|subject| subject.user = UserId::new("https://j", "ana"));
    check(|subject| subject.user = UserId::new("https://i", "bea"));
    check(|subject| subject.application = "crm".into());
    check(|subject| subject.agents = vec!["spiffe://a/c".into()]);
    check(|subject| subject.agents = vec!["spiffe://a/b".into(), "spiffe://a/c".into()]);
    check(|subject| (subject.session, subject.task) = ("t".into(), "s".into()));
    check(|subject| subject.task = "u".into());
    // The issuer's other claims and the grants of the tokens are checked on each call. They are no part of the digest.
    let mut same = subject();
    same.groups = vec!["staff".into()];
    assert_eq!(call_digest(&same, "pay/refund", &arguments), plain);
    assert_ne!(call_digest(&subject(), "pay/large", &arguments), plain);
    assert_ne!(call_digest(&subject(), "pay/refund", &parse_object(b"{}").unwrap()), plain);
}

#[test]
fn only_the_very_same_request_has_the_fingerprint() {
    use crate::service::request::AgentCredential;
    let request = |request_id: &str, proof: &str| DecisionRequest {
        request_id: request_id.to_owned(),
        proof: Some(proof.to_owned().into()).filter(|proof: &bytes::Bytes| !proof.is_empty()),
        ..DecisionRequest::new(AgentCredential::Chain(vec![]), "pay/refund")
    };
    let of = |gateway: &str, request_id: &str, proof: &str, tokens: &[&'static str]| {
        let tokens: Vec<bytes::Bytes> = tokens.iter().map(|token| bytes::Bytes::from_static(token.as_bytes())).collect();
        request_fingerprint(gateway, &request(request_id, proof), &tokens)
    };
    let plain = of("g", "r", "p", &["a", "b"]);
    assert!(plain.is_some() && plain == of("g", "r", "p", &["a", "b"]));
    for other in [
        of("h", "r", "p", &["a", "b"]),
        of("g", "s", "p", &["a", "b"]),
        of("g", "r", "q", &["a", "b"]),
        of("g", "r", "", &["a", "b"]),
        of("g", "r", "p", &["ab"]),
        of("g", "r", "p", &["a"]),
        of("g", "r", "p", &["b", "a"]),
        of("gr", "p", "", &["a", "b"]),
    ] {
        assert!(other.is_some() && other != plain);
    }
    assert_eq!(of("g", "", "p", &["a", "b"]), None, "a request without an id is never the same as another");
}
