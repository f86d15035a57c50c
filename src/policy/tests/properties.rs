//! Property tests over policies, chains and calls: the compiled evaluator equals the reference, and nothing ever widens.
//!
//! The generated policies are tiny, so that names collide: four tools, two groups, two applications, three agents, two arguments.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;

use crate::model::constraint::{ArgumentConstraint, Constraint, ConstraintMap, NumberRange, RangeBound};
use crate::model::decision::Effect;
use crate::model::ids::{AgentId, ApplicationId, GroupId, SessionId, TaskId, UserId};
use crate::model::json::{JsonNumber, JsonObject, Value};
use crate::model::reason::Reason;
use crate::model::request::{DelegationSubject, TokenScope, ToolCall};
use crate::model::rows::DocumentOrigin;
use crate::store::StoredDocument;
use crate::store::hash_chain::state_digest;
use crate::testing::{case_count::case_count, reference};

use super::super::compile::CompiledPolicy;
use super::super::condition::Condition;
use super::super::document::{
    AgentSpec, ApprovalRule, Document, DocumentBody, EntryTerms, GuardrailSpec, NameSelection, PermissionEntry, PermissionLists,
    ServerSpec, ToolRisk, ToolSpec,
};
use super::super::source::SourceFile;
use super::super::{source, yaml};

const TOOLS: [&str; 4] = ["a/x", "a/y", "a/y/z", "b/x"];
const PATTERNS: [&str; 9] = ["*", "a/*", "*/x", "a/y/*", "*/*/*", "a/x", "a/y", "a/y/z", "b/x"];
const AGENTS: [&str; 3] = ["spiffe://t/a", "spiffe://t/b", "spiffe://t/c"];

pub(super) type GeneratedPolicy = Vec<Document>;

fn number(n: i8) -> Value {
    Value::Number(JsonNumber::from(i64::from(n)))
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        (0..4i8).prop_map(number),
        (0..2i8).prop_map(|n| Value::String(n.to_string())),
        Just(Value::Null),
        prop::collection::vec((0..3i8).prop_map(number), 0..3).prop_map(Value::Array),
    ]
}

fn constraint() -> impl Strategy<Value = Constraint> {
    let bound = || {
        prop::option::of((0..4i8, any::<bool>()))
            .prop_map(|bound| bound.map(|(at, inclusive)| RangeBound { value: JsonNumber::from(i64::from(at)), inclusive }))
    };
    let leaf = prop_oneof![
        (0..4i8).prop_map(|n| Constraint::Exact(number(n))),
        (bound(), bound()).prop_map(|(min, max)| Constraint::Range(NumberRange { min, max })),
        prop::collection::vec(value(), 1..3).prop_map(Constraint::OneOf),
        prop::collection::vec(value(), 0..3).prop_map(Constraint::NotOneOf),
        prop::collection::vec((0..3i8).prop_map(number), 0..3).prop_map(Constraint::Contains),
        prop::collection::vec((0..3i8).prop_map(number), 0..3).prop_map(Constraint::Subset),
        Just(Constraint::Wildcard),
    ];
    leaf.prop_recursive(2, 6, 2, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 1..3).prop_map(Constraint::All),
            prop::collection::vec(inner, 1..3).prop_map(Constraint::Any),
        ]
    })
}

/// A map of arguments, unconstrained in about half of the cases. `strict` excludes optional arguments and closed maps, as a deny
/// must.
fn argument_map(strict: bool) -> impl Strategy<Value = ConstraintMap> {
    let named = prop::collection::btree_map(
        prop::sample::select(vec![Arc::<str>::from("m"), Arc::from("n")]),
        (constraint(), any::<bool>())
            .prop_map(move |(constraint, optional)| ArgumentConstraint { constraint, optional: optional && !strict }),
        0..3,
    );
    prop_oneof![
        Just(ConstraintMap::unconstrained()),
        (named, any::<bool>())
            .prop_map(move |(named, open)| ConstraintMap { named: named.into_iter().collect(), allows_unnamed: open || strict }),
    ]
}

/// Conditions that hold, do not hold, fail, or depend on the call. They are parsed once, because parsing is slower than a
/// decision.
static CONDITIONS: LazyLock<Vec<Condition>> = LazyLock::new(|| {
    let texts = [
        "true",
        "false",
        "context.args.m > 1",
        "context.args has m && context.args.m == 1",
        r#"context.args has n && context.args.n == "1""#,
        "context.args.other == 1 || true",
        "context.time.hour_utc < 12",
        "context.time.weekday_utc <= 5",
        r#"context.user.groups.contains("g")"#,
        r#"context.application.id == "p""#,
        "context.agent.depth == 0",
        r#"context.agent.id == "spiffe://t/b""#,
        r#"context.agent.chain.contains("spiffe://t/c")"#,
        r#"context.tool.server == "a" && context.tool.risk == "read""#,
        "context.env has safe && context.env.safe",
        "context.env.safe",
    ];
    texts.iter().map(|text| Condition::parse(text).unwrap()).collect()
});

fn condition() -> impl Strategy<Value = Condition> {
    prop::sample::select(CONDITIONS.clone())
}

fn guardrail(id: &'static str) -> impl Strategy<Value = Option<Document>> {
    let tools = prop::sample::subsequence(PATTERNS.to_vec(), 1..3);
    prop::option::weighted(0.3, (tools, condition())).prop_map(move |guardrail| {
        let (tools, forbid_when) = guardrail?;
        let tools = tools.into_iter().map(Arc::from).collect();
        Some(Document::new(DocumentBody::Guardrail(GuardrailSpec { tools, forbid_when }), id))
    })
}

fn entry(approve: bool, deny: bool) -> impl Strategy<Value = PermissionEntry> {
    let approval = (prop::sample::subsequence(vec!["g", "h"], 1..=2), 1..3u64).prop_map(move |(by, minutes)| ApprovalRule {
        by: by.into_iter().map(GroupId::from).collect(),
        expires_in_ms: minutes * 60_000,
    });
    let when = prop::option::weighted(0.2, condition());
    let prepared = prop::option::weighted(0.1, prop::sample::select(vec![Arc::<str>::from("a/x"), Arc::from("b/x")]));
    (prop::sample::select(PATTERNS.to_vec()), argument_map(deny), approval, when, prepared, prop::bool::weighted(0.1)).prop_map(
        move |(pattern, arguments, approval, when, prepared, attested)| {
            let prepared = prepared.filter(|_| !deny);
            // A permitting entry may read the environment only if it is marked as attested.
            let attested = !deny && (attested || when.as_ref().is_some_and(Condition::reads_environment));
            PermissionEntry::new(
                pattern,
                EntryTerms { arguments, when, prepared, attested, approval: approve.then_some(approval) },
            )
        },
    )
}

/// Permissions that allow much, because a call must pass about six of them. `sets` are the permission sets to include.
fn permissions(sets: &'static [&'static str]) -> impl Strategy<Value = PermissionLists> {
    (
        prop::collection::vec(entry(false, false), 0..3),
        any::<bool>(),
        prop::collection::vec(entry(true, false), 0..2),
        prop::collection::vec(entry(false, true), 0..2),
        prop::sample::subsequence(sets.to_vec(), 0..=sets.len()),
        0..3u8,
    )
        .prop_map(|(mut allow, all, approve, deny, include, deny_seldom)| {
            if all {
                allow.push(PermissionEntry::new("*", EntryTerms::default()));
            }
            let deny = if deny_seldom == 0 { deny } else { Vec::new() };
            PermissionLists { allow, approve, deny, include: include.into_iter().map(Arc::from).collect() }
        })
}

fn names(all: &'static [&'static str]) -> impl Strategy<Value = NameSelection<String>> {
    prop_oneof![
        Just(NameSelection::All),
        prop::sample::subsequence(all.to_vec(), 0..=all.len())
            .prop_map(|some| NameSelection::Listed(some.into_iter().map(str::to_owned).collect())),
    ]
}

fn typed<T: for<'a> From<&'a str>>(names: NameSelection<String>) -> NameSelection<T> {
    match names {
        NameSelection::All => NameSelection::All,
        NameSelection::Listed(names) => NameSelection::Listed(names.iter().map(|name| T::from(name.as_str())).collect()),
    }
}

fn agent(id: &'static str) -> impl Strategy<Value = Document> {
    let delegates = prop::sample::subsequence(AGENTS.to_vec(), 1..=AGENTS.len());
    (names(&["p", "q"]), names(&["g", "h"]), delegates, prop::option::weighted(0.2, 0..3u64), permissions(&["s", "t"])).prop_map(
        move |(applications, acts_for, delegates_to, session_hops_max, permissions)| {
            let spec = AgentSpec {
                id: AgentId::from(id),
                owner: None,
                keys: Vec::new(),
                applications: typed(applications),
                acts_for: typed(acts_for),
                delegates_to: delegates_to.into_iter().map(AgentId::from).collect(),
                session_lifetime_max_s: None,
                session_hops_max,
                permissions,
            };
            Document::new(DocumentBody::Agent(spec), id)
        },
    )
}

pub(super) fn generated_policy() -> impl Strategy<Value = GeneratedPolicy> {
    let schema = prop::option::weighted(0.2, Just([7; 32]));
    let of = |sets| permissions(sets);
    (
        schema,
        of(&["s", "t"]),
        of(&["s"]),
        of(&["s", "t"]),
        of(&["t"]),
        of(&["t"]),
        of(&[]),
        agent(AGENTS[0]),
        agent(AGENTS[1]),
        (agent(AGENTS[2]), guardrail("r"), guardrail("q")),
    )
        .prop_map(|(schema_sha256, group_g, group_h, app_p, app_q, set_s, set_t, a, b, (c, first, second))| {
            let spec = |schema_sha256| ToolSpec { risk: ToolRisk::Read, proof: None, schema_sha256 };
            let tools = [("x", schema_sha256), ("y", None), ("y/z", None)].map(|(name, schema)| (Arc::from(name), spec(schema)));
            let mut world = vec![
                Document::new(DocumentBody::Server(ServerSpec { id: "a".into(), tools: tools.into() }), "a"),
                Document::new(DocumentBody::Tool(spec(None)), "b/x"),
                Document::new(DocumentBody::Group(group_g), "g"),
                Document::new(DocumentBody::Group(group_h), "h"),
                Document::new(DocumentBody::Application(app_p), "p"),
                Document::new(DocumentBody::Application(app_q), "q"),
                Document::new(DocumentBody::PermissionSet(set_s), "s"),
                Document::new(DocumentBody::PermissionSet(set_t), "t"),
                a,
                b,
                c,
            ];
            world.extend(first.into_iter().chain(second));
            world
        })
}

fn scope() -> impl Strategy<Value = TokenScope> {
    prop::sample::subsequence(TOOLS.to_vec(), 2..=4)
        .prop_flat_map(|tools| {
            let count = tools.len();
            (Just(tools), prop::collection::vec(argument_map(false), count))
        })
        .prop_map(|(tools, maps)| TokenScope { tools: tools.into_iter().map(Arc::from).zip(maps).collect() })
}

pub(super) fn subject() -> impl Strategy<Value = DelegationSubject> {
    let agents = prop::collection::vec(prop::sample::select(AGENTS.to_vec()), 1..4);
    let groups = prop::sample::subsequence(vec!["g", "h"], 1..=2);
    let application = prop_oneof![10 => Just("p"), 10 => Just("q"), 1 => Just("unheard-of")];
    let ghost = prop::bool::weighted(0.03);
    (agents, groups, application, prop::collection::vec(scope(), 3), ghost).prop_map(
        |(mut agents, groups, application, mut scopes, ghost)| {
            if ghost {
                agents.push("spiffe://t/ghost");
            }
            scopes.truncate(agents.len());
            DelegationSubject {
                user: UserId::new("https://i", "u"),
                groups: groups.into_iter().map(GroupId::from).collect(),
                application: ApplicationId::from(application),
                agents: agents.into_iter().map(AgentId::from).collect(),
                scopes,
                session: SessionId::from("s"),
                task: TaskId::from("t"),
            }
        },
    )
}

fn arguments() -> impl Strategy<Value = JsonObject> {
    let argument = || prop::option::of(value());
    (argument(), argument(), prop::option::weighted(0.1, value())).prop_map(|(m, n, other)| {
        let members = [("m", m), ("n", n), ("other", other)];
        JsonObject::from_members(members.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))))
    })
}

/// The facts of a call besides its tool.
#[derive(Clone, Debug)]
pub(super) struct GeneratedCall {
    arguments: JsonObject,
    tool_schema_sha256: Option<[u8; 32]>,
    environment: Option<JsonObject>,
    unix_s: i64,
}

/// Eight calls of each tool for one case, so that the test does not spend its time on generating policies.
pub(super) fn generated_calls() -> impl Strategy<Value = Vec<GeneratedCall>> {
    let schema = prop::option::of(prop::sample::select(vec![[7; 32], [8; 32]]));
    let environment =
        prop::option::of(any::<bool>().prop_map(|safe| JsonObject::from_members([("safe".to_owned(), Value::Bool(safe))])));
    let one = (arguments(), schema, environment, 1_700_000_000..1_701_000_000i64);
    let one = one.prop_map(|(arguments, tool_schema_sha256, environment, unix_s)| GeneratedCall {
        arguments,
        tool_schema_sha256,
        environment,
        unix_s,
    });
    prop::collection::vec(one, 8)
}

pub(super) fn each_call(calls: &[GeneratedCall], mut check: impl FnMut(&ToolCall<'_>)) {
    for GeneratedCall { arguments, tool_schema_sha256, environment, unix_s } in calls {
        let (tool_schema_sha256, environment, unix_s) = (*tool_schema_sha256, environment.as_ref(), *unix_s);
        for tool in TOOLS.into_iter().chain(["no/tool"]) {
            check(&ToolCall { tool, tool_schema_sha256, arguments, environment, unix_s });
        }
    }
}

/// The generated policies are useful only if calls end in every possible way.
#[test]
fn the_worlds_are_varied() {
    let mut runner = TestRunner::deterministic();
    let mut seen: BTreeMap<Reason, usize> = BTreeMap::new();
    let strategy = (generated_policy(), subject(), generated_calls());
    for _ in 0..300 {
        let (world, subject, calls) = strategy.new_tree(&mut runner).unwrap().current();
        each_call(&calls, |call| *seen.entry(reference::decide(&world, &subject, call).reason).or_default() += 1);
    }
    let common = [
        Reason::Ok,
        Reason::ApprovalRequired,
        Reason::ToolUnknown,
        Reason::ToolChanged,
        Reason::UserDenies,
        Reason::ApplicationDenies,
        Reason::ApplicationUnknown,
        Reason::ApplicationNotServed,
        Reason::UserNotServed,
        Reason::DelegationNotAllowed,
        Reason::AgentDenies,
        Reason::ToolNotGranted,
        Reason::ArgumentRefused,
        Reason::AgentUnknown,
        Reason::ChainTooDeep,
        Reason::ConditionError,
        Reason::GuardrailDenies,
    ];
    let rare: Vec<Reason> = common.into_iter().filter(|reason| seen.get(reason).copied().unwrap_or(0) < 20).collect();
    assert!(rare.is_empty(), "rarely seen: {rare:?} of {seen:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: case_count(1000), ..ProptestConfig::default() })]

    #[test]
    fn compiled_is_the_reference(world in generated_policy(), subject in subject(), calls in generated_calls()) {
        let compiled = CompiledPolicy::compile(&world).unwrap();
        let resolved = compiled.resolve(&subject);
        each_call(&calls, |call| {
            let verdict = compiled.evaluate(&resolved, &subject, call);
            let answer = reference::decide(&world, &subject, call);
            let told = (verdict.effect, verdict.reason, verdict.layer, verdict.hop, verdict.matched.as_deref().cloned(), verdict.approvals, verdict.prepared);
            let expected = (answer.effect, answer.reason, answer.layer, answer.hop, answer.matched, answer.approvals, answer.prepared);
            assert_eq!(told, expected, "{call:?}");
            // The decision is the least of the answers of all layers.
            let least = compiled.explain(&resolved, &subject, call).into_iter().map(|answer| answer.effect).min();
            assert_eq!(least, Some(verdict.effect), "{call:?}");
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: case_count(250), ..ProptestConfig::default() })]

    #[test]
    fn reach_bounds_what_every_call_gets(world in generated_policy(), subject in subject(), calls in generated_calls()) {
        let compiled = CompiledPolicy::compile(&world).unwrap();
        let resolved = compiled.resolve(&subject);
        each_call(&calls, |call| {
            let reach = compiled.tool_reach(&resolved, &subject, call.tool);
            let verdict = compiled.evaluate(&resolved, &subject, call);
            if verdict.reason != Reason::ToolChanged {
                assert!(verdict.effect <= reach.effect, "{call:?} {reach:?} {verdict:?}");
                assert!(reach.depends_on_arguments || verdict.effect == reach.effect, "{call:?} {reach:?} {verdict:?}");
            }
        });
    }

    #[test]
    fn order_never_matters(world in generated_policy(), subject in subject(), calls in generated_calls(), seed in any::<prop::sample::Index>()) {
        let mut other: GeneratedPolicy = world.clone();
        for document in &mut other {
            let (DocumentBody::Group(permissions) | DocumentBody::Application(permissions) | DocumentBody::PermissionSet(permissions)
                | DocumentBody::Agent(AgentSpec { permissions, .. })) = &mut document.body else { continue };
            for list in [&mut permissions.allow, &mut permissions.approve, &mut permissions.deny] {
                list.reverse();
                list.extend(list.first().cloned());
            }
            permissions.include.reverse();
        }
        let middle = seed.index(other.len());
        other.rotate_left(middle);
        let mut reversed = subject.clone();
        reversed.groups.reverse();
        let (first, second) = (CompiledPolicy::compile(&world).unwrap(), CompiledPolicy::compile(&other).unwrap());
        prop_assert_eq!(first.permission_set_count(), second.permission_set_count());
        let (resolved, resolved_other) = (first.resolve(&subject), second.resolve(&reversed));
        each_call(&calls, |call| {
            assert_eq!(first.evaluate(&resolved, &subject, call), second.evaluate(&resolved_other, &reversed, call), "{call:?}");
        });
    }

    #[test]
    fn a_deny_or_an_approval_only_takes_away(world in generated_policy(), subject in subject(), calls in generated_calls(), deny in entry(false, true), approve in entry(true, false), which in 2..11usize) {
        let before = CompiledPolicy::compile(&world).unwrap();
        let mut narrower = world.clone();
        let (DocumentBody::Group(permissions) | DocumentBody::Application(permissions) | DocumentBody::PermissionSet(permissions)
            | DocumentBody::Agent(AgentSpec { permissions, .. })) = &mut narrower[which].body else { panic!("holds permissions") };
        permissions.deny.push(deny);
        let with_deny = CompiledPolicy::compile(&narrower).unwrap();
        let (resolved, resolved_deny) = (before.resolve(&subject), with_deny.resolve(&subject));
        each_call(&calls, |call| {
            let effect = before.evaluate(&resolved, &subject, call).effect;
            assert!(with_deny.evaluate(&resolved_deny, &subject, call).effect <= effect, "{call:?}");
        });
        // An added approve entry turns a denial into an approval at best, never into a permit, and never overrides a deny.
        let (DocumentBody::Group(permissions) | DocumentBody::Application(permissions) | DocumentBody::PermissionSet(permissions)
            | DocumentBody::Agent(AgentSpec { permissions, .. })) = &mut narrower[which].body else { panic!("holds permissions") };
        permissions.approve.push(approve);
        let with_approve = CompiledPolicy::compile(&narrower).unwrap();
        let resolved_approve = with_approve.resolve(&subject);
        each_call(&calls, |call| {
            let (before, after) = (
                with_deny.evaluate(&resolved_deny, &subject, call).effect,
                with_approve.evaluate(&resolved_approve, &subject, call).effect,
            );
            assert!(after <= before || after == Effect::NeedsApproval, "{call:?}");
        });
    }

    #[test]
    fn a_hop_only_narrows(world in generated_policy(), subject in subject(), calls in generated_calls(), next in prop::sample::select(AGENTS.to_vec()), scope in scope()) {
        let compiled = CompiledPolicy::compile(&world).unwrap();
        let mut child = subject.clone();
        child.agents.push(AgentId::from(next));
        child.scopes.push(scope);
        let (resolved, resolved_child) = (compiled.resolve(&subject), compiled.resolve(&child));
        each_call(&calls, |call| {
            let parent = compiled.evaluate(&resolved, &subject, call).effect;
            assert!(compiled.evaluate(&resolved_child, &child, call).effect <= parent, "{call:?}");
        });
    }

    #[test]
    fn a_guardrail_only_takes_away(world in generated_policy(), subject in subject(), calls in generated_calls(), more in guardrail("z")) {
        let before = CompiledPolicy::compile(&world).unwrap();
        let guarded = CompiledPolicy::compile(&world.iter().cloned().chain(more).collect::<GeneratedPolicy>()).unwrap();
        let (resolved, resolved_guarded) = (before.resolve(&subject), guarded.resolve(&subject));
        each_call(&calls, |call| {
            let effect = before.evaluate(&resolved, &subject, call).effect;
            assert!(guarded.evaluate(&resolved_guarded, &subject, call).effect <= effect, "{call:?}");
        });
    }

    #[test]
    fn without_an_allow_there_is_no_more(world in generated_policy(), subject in subject(), calls in generated_calls(), which in 2..11usize) {
        let mut narrower = world.clone();
        let (DocumentBody::Group(permissions) | DocumentBody::Application(permissions) | DocumentBody::PermissionSet(permissions)
            | DocumentBody::Agent(AgentSpec { permissions, .. })) = &mut narrower[which].body else { panic!("holds permissions") };
        // A failing entry denies its whole layer, so an entry without a condition is removed instead.
        let Some(index) = permissions.allow.iter().position(|entry| entry.when.is_none() && entry.prepared.is_none()) else {
            return Ok(());
        };
        permissions.allow.remove(index);
        let (before, after) = (CompiledPolicy::compile(&world).unwrap(), CompiledPolicy::compile(&narrower).unwrap());
        let (resolved, resolved_after) = (before.resolve(&subject), after.resolve(&subject));
        each_call(&calls, |call| {
            let effect = before.evaluate(&resolved, &subject, call).effect;
            assert!(after.evaluate(&resolved_after, &subject, call).effect <= effect, "{call:?}");
        });
    }

    #[test]
    fn shadows_change_what_would_be_and_nothing_else(world in generated_policy(), changed in agent(AGENTS[1]), rail in guardrail("q"), group in permissions(&["s"]), subject in subject(), calls in generated_calls()) {
        let mut all = world.clone();
        all.push(changed.into_shadow());
        all.extend(rail.map(Document::into_shadow));
        all.push(Document::new(DocumentBody::Group(group), "g").into_shadow());
        let compiled = CompiledPolicy::compile(&all).unwrap();
        let would_be = compiled.shadow_policy().unwrap();
        let lit = reference::enforce_shadows(&all);
        let (resolved, resolved_would_be) = (compiled.resolve(&subject), would_be.resolve(&subject));
        each_call(&calls, |call| {
            let (verdict, answer) = (compiled.evaluate(&resolved, &subject, call), reference::decide(&world, &subject, call));
            assert_eq!((verdict.effect, verdict.reason), (answer.effect, answer.reason), "{call:?}");
            let (verdict, answer) = (would_be.evaluate(&resolved_would_be, &subject, call), reference::decide(&lit, &subject, call));
            assert_eq!((verdict.effect, verdict.reason), (answer.effect, answer.reason), "{call:?}");
        });
    }

    #[test]
    fn equal_policies_have_equal_digests(world in generated_policy(), middle in any::<prop::sample::Index>(), changed in agent(AGENTS[0])) {
        let digest = |world: &GeneratedPolicy| {
            let stored = |document: &Document| StoredDocument { row: document.to_row(DocumentOrigin::Folder), revision: 2 };
            state_digest(&world.iter().map(stored).collect::<Vec<_>>(), &[])
        };
        let mut turned = world.clone();
        turned.rotate_left(middle.index(world.len()));
        // The policy of another process, which reads the stored rows.
        let again: GeneratedPolicy = turned.iter().map(|document| Document::from_row(&document.to_row(DocumentOrigin::Folder)).unwrap()).collect();
        prop_assert_eq!(digest(&world), digest(&again));
        let mut other = world.clone();
        let same = other[8] == changed;
        other[8] = changed;
        prop_assert_eq!(same, digest(&world) == digest(&other));
    }

    #[test]
    fn rows_read_back_as_what_they_were(world in generated_policy()) {
        let shadows: Vec<Document> = world.iter().skip(2).cloned().map(Document::into_shadow).collect();
        for document in world.iter().chain(&shadows) {
            let row = document.to_row(DocumentOrigin::Api);
            prop_assert_eq!(&Document::from_row(&row).unwrap(), document, "{}", row.json);
            // JSON is valid YAML, so stored documents can be copied back into a folder.
            let parsed = source::parse_files(&[SourceFile { path: "p.yaml".to_owned(), content: row.json.into_bytes() }]);
            prop_assert_eq!(&parsed.diagnostics, &[]);
            prop_assert_eq!(&parsed.documents[..], std::slice::from_ref(document));
        }
    }

    #[test]
    fn a_change_of_agents_is_what_compiling_anew_is(world in generated_policy(), changed in agent(AGENTS[0]), subject in subject(), calls in generated_calls()) {
        let old = CompiledPolicy::compile(&world).unwrap();
        let patched = old.with_agents(std::slice::from_ref(&changed), &[]).unwrap();
        let mut anew = world.clone();
        anew[8] = changed;
        let anew = CompiledPolicy::compile(&anew).unwrap();
        let (a, b) = (patched.resolve(&subject), anew.resolve(&subject));
        each_call(&calls, |call| {
            assert_eq!(patched.evaluate(&a, &subject, call), anew.evaluate(&b, &subject, call), "{call:?}");
        });
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in r#"([a-z:\- \n\[\]{}?&*!|>'"%@`#,~<=\t\\.0-9]|---\n|kind: group\n|allow:\n|- ){0,60}"#) {
        let mut out = Vec::new();
        yaml::parse_documents(text.as_bytes(), "f", &mut out);
        source::parse_files(&[SourceFile { path: "p.yaml".to_owned(), content: text.clone().into_bytes() }]);
        source::parse_files(&[SourceFile { path: "p.yaml".to_owned(), content: format!("kind: agent\nid: spiffe://t/a\n{text}").into_bytes() }]);
    }
}
