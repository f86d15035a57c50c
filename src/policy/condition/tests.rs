//! Tests of conditions: refused texts, readable facts and failed evaluations.

use super::*;
use crate::model::ids::{AgentId, GroupId, SessionId, TaskId, UserId};
use crate::model::json::{JsonObject, parse_object};

fn subject() -> DelegationSubject {
    DelegationSubject {
        user: UserId::new("https://i", "ana"),
        groups: vec![GroupId::from("ap"), GroupId::from("sales")],
        application: "erp".into(),
        agents: vec![AgentId::from("spiffe://t/a"), AgentId::from("spiffe://t/b")],
        scopes: vec![],
        session: SessionId::from("s-1"),
        task: TaskId::from("t-1"),
    }
}

fn object(text: &str) -> JsonObject {
    parse_object(text.as_bytes()).unwrap()
}

/// A Wednesday, 07:05:09 UTC.
const WEDNESDAY_S: i64 = 1_764_140_709 - 86_400 * 7 * 52;

fn ask(condition: &str, arguments: &str, environment: Option<&str>) -> Result<bool, ConditionError> {
    let (arguments, environment) = (object(arguments), environment.map(object));
    let call = ToolCall { environment: environment.as_ref(), unix_s: WEDNESDAY_S, ..ToolCall::new("pay/refund", &arguments) };
    let condition = Condition::parse(condition).unwrap_or_else(|error| panic!("{condition}: {error}"));
    condition.holds(&CallFacts {
        subject: &subject(),
        call: &call,
        risk: "write",
        visible_agent_count: 2,
        work: &WorkBudget::default(),
    })
}

#[test]
fn what_a_condition_sees() {
    let check = |condition: &str, expected: bool| assert_eq!(ask(condition, "{}", None), Ok(expected), "{condition}");
    for condition in [
        "true",
        r#"context.user.issuer == "https://i" && context.user.sub == "ana""#,
        r#"context.user.groups.contains("sales") && !context.user.groups.contains("hr")"#,
        r#"context.application.id == "erp""#,
        r#"context.agent.id == "spiffe://t/b" && context.agent.root == "spiffe://t/a" && context.agent.depth == 1"#,
        r#"context.agent.chain.containsAll(["spiffe://t/a", "spiffe://t/b"])"#,
        r#"context.session.id == "s-1" && context.session.task == "t-1""#,
        r#"context.tool.name == "pay/refund" && context.tool.server == "pay" && context.tool.risk == "write""#,
        "context.time.hour_utc == 7 && context.time.minute_utc == 5 && context.time.weekday_utc == 3",
        "context.time.unix_s > 1700000000",
        r#"context.time.date like "20*-*-*""#,
        r#"datetime(context.time.date) < datetime("2100-01-01")"#,
        "!(context.args has amount)",
        "!(context.env has network)",
        "if context.args has x then false else true",
        "true // a comment at the end",
    ] {
        check(condition, true);
    }
    check("context.time.hour_utc > 18", false);
    check(r#"context.agent.id like "spiffe://other/*""#, false);
}

#[test]
fn arguments_of_every_type() {
    let arguments = r#"{"i":100.0,"d":12.5,"s":"a","b":true,"n":null,"l":[1,2],"o":{"k":{"m":3}},"a b":1,"neg":-0}"#;
    let check = |condition: &str, expected: Result<bool, ConditionError>| {
        assert_eq!(ask(condition, arguments, None), expected, "{condition}");
    };
    for condition in [
        "context.args.i == 100",
        r#"context.args.d.greaterThan(decimal("12.4999"))"#,
        r#"context.args.s == "a""#,
        "context.args.b",
        "!(context.args has n)",
        "context.args.l.containsAny([2, 9])",
        "context.args.o.k.m == 3",
        "context.args has o.k",
        r#"context.args["a b"] == 1"#,
        "context.args.neg == 0",
        r#"context.args == {i: 1} || true"#,
    ] {
        check(condition, Ok(true));
    }
    // A missing argument, the wrong type, an overflow.
    for condition in
        ["context.args.missing > 1", "context.args.s > 1", "context.args.i * 9223372036854775807 > 0", "context.args.d < 3"]
    {
        check(condition, Err(ConditionError));
    }
}

#[test]
fn only_what_is_looked_at_is_made() {
    // The other argument cannot be expressed in Cedar.
    let arguments = r#"{"x":1,"y":0.123456,"z":[null]}"#;
    assert_eq!(ask("context.args.x == 1", arguments, None), Ok(true));
    assert_eq!(ask("context.args.y == 1", arguments, None), Err(ConditionError));
    assert_eq!(ask("context.args.z.isEmpty()", arguments, None), Err(ConditionError));
    assert_eq!(ask("context.args == {x: 1}", arguments, None), Err(ConditionError));
    let nested = format!("{}1{}", "[".repeat(90), "]".repeat(90));
    assert!(ask("context.args has deep", &format!(r#"{{"deep":{nested}}}"#), None).is_ok());
}

#[test]
fn the_environment_is_seen_and_known_to_be() {
    assert_eq!(ask(r#"context.env.network == "corp""#, "{}", Some(r#"{"network":"corp"}"#)), Ok(true));
    assert_eq!(ask(r#"context.env.network == "corp""#, "{}", None), Err(ConditionError));
    let asks = |text: &str| Condition::parse(text).unwrap().reads_environment();
    assert!(asks("context.env has x") && asks("context has env") && asks("true || context.env.x"));
    assert!(!asks(r#"context.args.env == "context.env""#));
}

/// An argument that looks like an escape of Cedar's JSON form is still plain data.
#[test]
fn arguments_cannot_become_entities() {
    let arguments = r#"{"x":{"__entity":{"type":"T","id":"i"}},"y":{"__extn":{"fn":"decimal","arg":"1.0"}}}"#;
    assert_eq!(ask(r#"context.args.x == {"__entity": {"type": "T", "id": "i"}}"#, arguments, None), Ok(true));
    assert_eq!(ask(r#"context.args.y == decimal("1.0")"#, arguments, None), Ok(false));
    assert_eq!(ask("context.args.x has __entity && context.args.y has __extn", arguments, None), Ok(true));
}

#[test]
fn what_is_refused() {
    let check = |condition: &str, expected: &str| {
        let said = Condition::parse(condition).expect_err(condition);
        assert!(said.contains(expected), "{condition}: {said}");
    };
    for (condition, expected) in [
        ("", "not a Cedar expression"),
        ("context.args.x >", "not a Cedar expression"),
        ("true }; permit (principal, action, resource) when { true", "not a Cedar expression"),
        ("true } unless { false", "not a Cedar expression"),
        ("1", "a condition needs a truth value, found a whole number"),
        (r#""yes""#, "found a string"),
        ("context", "`context` by itself is no value"),
        ("principal == principal", "`principal` has no meaning here"),
        (r#"principal in Group::"x""#, "no entities"),
        (r#"context.user.sub == User::"ana""#, "there are no entities in a condition"),
        ("context.args.x is User", "`is` has no meaning here"),
        (r#"context.args.x.hasTag("k")"#, "`hasTag` has no meaning here"),
        ("context.tme.hour_utc > 1", "`context` has no member `tme`: did you mean `time`?"),
        ("context.time.hour > 1", "`context.time` has no member `hour`"),
        ("context.time.hour_uct > 1", "did you mean `hour_utc`?"),
        ("context has tiem", "did you mean `time`?"),
        ("context.user has group", "`context.user` has no member `group`: did you mean `groups`?"),
        (r#"context.time.hour_utc > "7""#, "`>` needs whole numbers, found a string"),
        ("context.user.groups > 1", "`>` needs whole numbers, found a set"),
        (r#"context.time.hour_utc == "7""#, "which are never equal"),
        ("context.user.sub.contains(1)", "`contains` needs a set, found a string"),
        ("context.time.hour_utc like \"7*\"", "`like` needs a string"),
        ("context.user.sub && true", "`&&` needs a truth value, found a string"),
        ("!context.time.hour_utc", "`!` needs a truth value"),
        ("if 1 then true else false", "`if` needs a truth value"),
        ("context.args.amount < decimal(\"1.0\")", "`<` does not compare decimals"),
        ("context.user.sub.x == 1", "needs a record, found a string"),
        ("nonsense(context.args.x)", "not a Cedar expression"),
        (r#"ip("1.2.3.4").isInRange(context.time.hour_utc)"#, "`isInRange` needs an IP address, found a whole number"),
    ] {
        check(condition, expected);
    }
    check(&"(".repeat(13), "brackets inside each other: at most 12");
    check(&"if true then true else ".repeat(13), "`if`s: at most 12");
    check(&format!("true{}", " && true".repeat(65)), "operators: at most 64");
    check(&"!".repeat(3000), "operators: at most 64");
    check(&format!("context{}", ".a".repeat(13)), "members of members: at most 12");
    check(&format!("context{}", "[\"a\"]".repeat(600)), "members of members: at most 12");
    check(&format!("true {}", "|| true ".repeat(600)), "at most 4096");
}

#[test]
fn deep_conditions_within_the_limits_are_answered() {
    let many = format!("true{}", " && true".repeat(64));
    assert_eq!(ask(&many, "{}", None), Ok(true), "many");
    let brackets = format!("{}true{}", "(".repeat(12), ")".repeat(12));
    assert_eq!(ask(&brackets, "{}", None), Ok(true), "brackets");
    let mut choices = "true".to_owned();
    for _ in 0..12 {
        choices = format!("if true then {choices} else false");
    }
    assert_eq!(ask(&choices, "{}", None), Ok(true), "choices");
    let members = format!("context.args{} == 1", ".a".repeat(11));
    assert_eq!(ask(&members, "{}", None), Err(ConditionError), "members");
    // All limits together.
    let all = format!("{}{choices} && {members}{}{}", "(!(!(".repeat(4), ")))".repeat(4), " && true".repeat(50));
    assert_eq!(ask(&all, "{}", None), Err(ConditionError), "all");
}

/// The remaining work budget after the evaluation of a condition.
fn left_after(work: &WorkBudget, condition: &str, arguments: &JsonObject) -> (Result<bool, ConditionError>, u64) {
    let call = ToolCall::new("pay/refund", arguments);
    let condition = Condition::parse(condition).unwrap();
    let held = condition.holds(&CallFacts { subject: &subject(), call: &call, risk: "write", visible_agent_count: 1, work });
    (held, work.remaining())
}

#[test]
fn what_a_condition_looks_at_is_what_it_costs() {
    use crate::model::limits::{ARGUMENTS_BYTES_MAX, CONDITION_WORK_MAX};
    let large = object(&format!("{{\"note\":\"{}\",\"list\":[{}0],\"n\":1}}", "x".repeat(20_000), "1,".repeat(10_000)));
    let cost = |condition: &str| {
        let (held, left) = left_after(&WorkBudget::default(), condition, &large);
        assert!(held.is_ok(), "{condition}");
        CONDITION_WORK_MAX - left
    };
    let small = cost("context.args.n == 1");
    assert!(small < 1_000, "arguments that it does not look at cost nothing: {small}");
    assert_eq!(cost("context.time.hour_utc < 99"), cost("context.tool.risk == \"write\""));
    let note = cost(r#"context.args.note like "*y*" || true"#);
    assert!((20_000..21_000).contains(&note), "{note}");
    assert!(cost("context.args.list.contains(7) || true") > 160_000, "each value counts");
    let pattern = format!(r#"context.args.note like "*{}*" || true"#, "x".repeat(640));
    assert!((10 * note..13 * note).contains(&cost(&pattern)), "a longer pattern costs more");
    // The most expensive condition costs more than the budget of a call.
    let dearest = format!("{{\"list\":[{}0]}}", "1,".repeat(ARGUMENTS_BYTES_MAX / 2 - 10));
    let condition = format!("context.args.list.contains(\"{}\") || true", "x".repeat(1_600));
    assert_eq!(left_after(&WorkBudget::default(), &condition, &object(&dearest)), (Err(ConditionError), 0));
}

#[test]
fn work_that_is_used_up_fails_every_later_condition() {
    let work = WorkBudget::default();
    let large = object(&format!("{{\"note\":\"{}\"}}", "x".repeat(40_000)));
    let mut asked = 0;
    while left_after(&work, r#"context.args.note like "*y*""#, &large).0 == Ok(false) {
        asked += 1;
    }
    assert!((20..100).contains(&asked), "{asked} conditions look at 40 kB");
    assert_eq!(left_after(&work, "true", &large), (Err(ConditionError), 0));
}
