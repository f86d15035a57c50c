//! A condition is refused in one line, or answered for a call: holds, does not, or fails, and the same when asked again.
//! The input is two texts: the condition, then the arguments as JSON, after the first line feed. `cargo +nightly fuzz run condition`
#![no_main]

use libfuzzer_sys::fuzz_target;
use portcullis::model::ids::UserId;
use portcullis::model::json::parse_object;
use portcullis::model::request::{DelegationSubject, ToolCall};
use portcullis::policy::condition::{CallFacts, Condition};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (condition, arguments) = text.split_once('\n').unwrap_or((text, "{}"));
    let condition = match Condition::parse(condition) {
        Ok(condition) => condition,
        Err(problem) => return assert!(!problem.contains('\n')),
    };
    let Ok(arguments) = parse_object(arguments.as_bytes()) else { return };
    let subject = DelegationSubject {
        user: UserId::new("https://i", "u"),
        groups: vec!["g".into()],
        application: "p".into(),
        agents: vec!["spiffe://t/a".into(), "spiffe://t/b".into()],
        scopes: vec![],
        session: "s".into(),
        task: "t".into(),
    };
    let call = ToolCall { environment: Some(&arguments), unix_s: 1_700_000_000, ..ToolCall::new("a/x", &arguments) };
    let facts = CallFacts { subject: &subject, call: &call, risk: "read", visible_agent_count: 2 };
    assert_eq!(condition.holds(&facts), condition.holds(&facts));
});
