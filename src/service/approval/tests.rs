//! The digest, the fingerprint.

use super::*;
use crate::model::ids::UserId;
use crate::model::json::parse_object;

const EXPECTED: &str = "3e687299390908c57567388d1e12b51d8fb41f65964a70abb94e09a5e03f0e9d";

fn subject() -> Subject {
    Subject {
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
    let of = |arguments: &str| digest(&subject(), "payments/refund", &parse_object(arguments.as_bytes()).unwrap());
    // printf '%s' '["https://i","ana","erp",["spiffe://a/b"],"s","t","payments/refund",{"amount":100,"id":"x"}]' | sha256sum
    assert_eq!(of(r#"{"id":"x","amount":1e2}"#), of(r#"{ "amount":100.0, "id":"x" }"#));
    assert_ne!(of(r#"{"amount":100}"#), of(r#"{"amount":"100"}"#));
    assert_eq!(of(r#"{"id":"x","amount":100}"#), EXPECTED);
}
