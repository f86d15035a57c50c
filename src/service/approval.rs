//! The digest that binds an approval to exactly one call.

use crate::model::decision::{ApprovalNeed, Decision};
use crate::model::ids::GroupId;
use crate::model::json::{Object, Value};
use crate::model::request::Subject;
use crate::model::time::Now;
use crate::service::request::ApprovalRequest;

/// What an operator must approve for a decision that asks for it.
pub(super) fn request(decision: &Decision, subject: &Subject, tool: &str, arguments: &Object, now: Now) -> ApprovalRequest {
    let mut approvers: Vec<GroupId> = decision.approvals.iter().flat_map(|need| need.by.iter().cloned()).collect();
    approvers.sort();
    approvers.dedup();
    let expires_in_ms = decision.approvals.iter().map(|need: &ApprovalNeed| need.expires_in_ms).min().unwrap_or(0);
    ApprovalRequest {
        digest: digest(subject, tool, arguments),
        approvers,
        expires_at_unix_ms: now.unix_ms().saturating_add(i64::try_from(expires_in_ms).unwrap_or(i64::MAX)),
    }
}

/// Hex SHA-256 of the JCS array `[iss, sub, client_id, [agent SPIFFE ids], sid, txn, tool, arguments]`.
fn digest(subject: &Subject, tool: &str, arguments: &Object) -> String {
    let text = |text: &str| Value::String(text.to_owned());
    let parts = Value::Array(vec![
        text(subject.user.issuer.as_str()),
        text(&subject.user.subject),
        text(subject.application.as_str()),
        Value::Array(subject.agents.iter().map(|agent| text(agent.as_str())).collect()),
        text(subject.session.as_str()),
        text(subject.task.as_str()),
        text(tool),
        Value::Object(arguments.clone()),
    ]);
    let digest = ring::digest::digest(&ring::digest::SHA256, parts.to_jcs().as_bytes());
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ids::UserId;
    use crate::model::json::parse_object;

    #[test]
    fn the_digest_is_of_the_canonical_call() {
        let subject = Subject {
            user: UserId::new("https://i", "ana"),
            groups: vec![],
            application: "erp".into(),
            agents: vec!["spiffe://a/b".into()],
            scopes: vec![],
            session: "s".into(),
            task: "t".into(),
        };
        let of = |arguments: &str| digest(&subject, "payments/refund", &parse_object(arguments.as_bytes()).unwrap());
        // printf '%s' '["https://i","ana","erp",["spiffe://a/b"],"s","t","payments/refund",{"amount":100,"id":"x"}]' | sha256sum
        assert_eq!(of(r#"{"id":"x","amount":1e2}"#), of(r#"{ "amount":100.0, "id":"x" }"#));
        assert_ne!(of(r#"{"amount":100}"#), of(r#"{"amount":"100"}"#));
        assert_eq!(of(r#"{"id":"x","amount":100}"#), EXPECTED);
    }

    const EXPECTED: &str = "3e687299390908c57567388d1e12b51d8fb41f65964a70abb94e09a5e03f0e9d";
}
