//! Tests of policy differences: no widening is missed, and a change reported as narrower is narrower.

use proptest::prelude::*;

use super::super::compile::CompiledPolicy;
use super::super::diff::{self, ChangeDirection};
use super::super::document::{Document, DocumentBody};
use super::properties::{each_call, generated_calls, generated_policy, subject};
use super::{documents, file};

/// A mix of the documents of two policies with the same names.
fn mix_documents(before: &[Document], other: &[Document], kept: &[bool]) -> Vec<Document> {
    let find = |key: &crate::model::rows::DocumentKey| other.iter().find(|document| document.key == *key).cloned();
    let of_before = before.iter().zip(kept).filter_map(|(document, kept)| match (kept, &document.body) {
        (true, _) => Some(document.clone()),
        // A guardrail may be removed, but a document that others name may not.
        (false, DocumentBody::Guardrail(_)) => find(&document.key),
        (false, _) => Some(find(&document.key).unwrap_or_else(|| document.clone())),
    });
    let mut mixed: Vec<Document> = of_before.collect();
    let new = other.iter().filter(|document| before.iter().all(|old| old.key != document.key));
    mixed.extend(new.zip(kept).filter(|(_, kept)| **kept).map(|(document, _)| document.clone()));
    mixed
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn no_widening_is_missed(
        world in generated_policy(),
        other in generated_policy(),
        kept in prop::collection::vec(prop::bool::weighted(0.8), 13),
        subject in subject(),
        calls in generated_calls(),
    ) {
        let changed = mix_documents(&world, &other, &kept);
        let (before, after) = (CompiledPolicy::compile(&world).unwrap(), CompiledPolicy::compile(&changed).unwrap());
        let pairs = diff::compare_access(&before, &after, usize::MAX);
        let of = |agent: &str, tool: &str| {
            pairs.listed.iter().find(|pair| pair.agent.as_str() == agent && &*pair.tool == tool).map(|pair| pair.direction)
        };
        let (old, new) = (before.resolve(&subject), after.resolve(&subject));
        each_call(&calls, |call| {
            let (was, is) = (before.evaluate(&old, &subject, call).effect, after.evaluate(&new, &subject, call).effect);
            let directions: Vec<_> = subject.agents.iter().filter_map(|agent| of(agent.as_str(), call.tool)).collect();
            if is > was {
                assert!(directions.iter().any(|direction| *direction != ChangeDirection::Narrower), "{call:?} {was:?} {is:?} {directions:?}");
            }
            if is != was {
                assert!(!directions.is_empty(), "{call:?} {was:?} {is:?}");
            }
        });
    }

    #[test]
    fn nothing_changes_where_nothing_is_changed(world in generated_policy()) {
        let (before, after) = (CompiledPolicy::compile(&world).unwrap(), CompiledPolicy::compile(&world).unwrap());
        prop_assert_eq!(diff::compare_access(&before, &after, usize::MAX), diff::AgentToolChanges::default());
        prop_assert_eq!(diff::compare_documents(&world, &world), vec![]);
    }
}

const BASE: &str = "\
{kind: application, id: p, allow: ['*']}
---
{kind: group, id: g, allow: ['*']}
---
{kind: tool, id: pay/refund, risk: write}
---
{kind: tool, id: pay/read, risk: read}
---
{kind: operator, id: o, keys: [{kty: OKP, crv: Ed25519, x: 11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo}], roles: [approve], groups: [leads, others]}
---
";

/// The pairs of a change, as `agent tool before -> after direction`.
fn check(before: &str, after: &str, expected: &[&str]) {
    let compiled = |text: &str| CompiledPolicy::compile(&documents(&format!("{BASE}{text}"))).unwrap();
    let pairs = diff::compare_access(&compiled(before), &compiled(after), 100);
    let told: Vec<String> = pairs
        .listed
        .iter()
        .map(|pair| {
            let agent = pair.agent.as_str().rsplit('/').next().unwrap();
            format!("{agent} {} {} -> {} {}", pair.tool, pair.before, pair.after, pair.direction.as_str())
        })
        .collect();
    assert_eq!(told, expected, "{before}\n{after}");
    assert_eq!(pairs.total, pairs.listed.len() as u64);
}

fn agent(rest: &str) -> String {
    format!("{{kind: agent, id: 'spiffe://t/a', applications: [p], acts_for: [g], {rest}}}\n")
}

#[test]
fn each_kind_of_change_has_its_direction() {
    let read = agent("allow: [pay/read]");
    check(&read, &agent("allow: [pay/*]"), &["a pay/refund DENY -> PERMIT wider"]);
    check(&agent("allow: [pay/*]"), &read, &["a pay/refund PERMIT -> DENY narrower"]);
    check(&agent("allow: [pay/*]"), &agent("allow: ['*']"), &[]);
    let up_to = |max: u32| agent(&format!("allow: [{{pay/refund: {{args: {{amount: {{max: {max}}}}}}}}}]"));
    check(&up_to(500), &up_to(300), &["a pay/refund PERMIT? -> PERMIT? narrower"]);
    check(&up_to(300), &up_to(500), &["a pay/refund PERMIT? -> PERMIT? wider"]);
    let other_argument = agent("allow: [{pay/refund: {args: {sum: {max: 300}}}}]");
    check(&up_to(300), &other_argument, &["a pay/refund PERMIT? -> PERMIT? changed"]);
    let asks = |by: &str| agent(&format!("approve: [{{pay/refund: {{by: [{by}]}}}}]"));
    check(&asks("leads"), &asks("others"), &["a pay/refund NEEDS_APPROVAL -> NEEDS_APPROVAL changed"]);
    check(&asks("leads"), &agent("allow: [pay/refund]"), &["a pay/refund NEEDS_APPROVAL -> PERMIT wider"]);
    let when = |condition: &str| agent(&format!("allow: [{{pay/refund: {{when: '{condition}'}}}}]"));
    check(&when("context.time.hour_utc < 7"), &when("context.time.hour_utc < 8"), &["a pay/refund PERMIT? -> PERMIT? changed"]);
    check(&read, &agent("allow: [pay/read], deny: [{pay/read: {args: {id: 7}}}]"), &["a pay/read PERMIT -> PERMIT? narrower"]);
    // Widening changes come first.
    check(&read, &agent("allow: [pay/refund]"), &["a pay/refund DENY -> PERMIT wider", "a pay/read PERMIT -> DENY narrower"]);
}

#[test]
fn agents_come_and_go_and_ceilings_move() {
    let read = agent("allow: [pay/read]");
    let b = "---\n{kind: agent, id: 'spiffe://t/b', applications: ['*'], acts_for: ['*'], allow: ['*'], deny: [pay/refund]}\n";
    check(&read, &format!("{read}{b}"), &["b pay/read DENY -> PERMIT wider"]);
    check(&format!("{read}{b}"), &read, &["b pay/read PERMIT -> DENY narrower"]);
    let with = |more: &str| format!("{read}{b}---\n{more}");
    // The groups of a user count together. An agent that acts for every user gains from each group. A call that the agent itself
    // denies cannot change.
    let both = ["a pay/read PERMIT -> PERMIT? narrower", "b pay/read PERMIT? -> PERMIT? narrower"];
    check(&with("{kind: group, id: h}"), &with("{kind: group, id: h, deny: [{pay/read: {args: {id: 7}}}]}"), &both);
    let rail = "{kind: guardrail, id: r, tools: [pay/*], forbid_when: 'context.time.hour_utc < 7'}";
    check(&with("{kind: group, id: h}"), &with(&format!("{{kind: group, id: h}}\n---\n{rail}")), &both);
    check(
        &with(rail),
        &with(&rail.replace("< 7", "< 6")),
        &["a pay/read PERMIT? -> PERMIT? changed", "b pay/read PERMIT? -> PERMIT? changed"],
    );
    check(
        &agent("delegates_to: [], allow: [pay/read]"),
        &agent("delegates_to: ['spiffe://t/a'], allow: [pay/read]"),
        &["a pay/read PERMIT -> PERMIT wider"],
    );
    // An application that permits nothing does not count.
    let q = "---\n{kind: application, id: q, allow: [pay/refund]}\n";
    let in_both = agent("allow: [pay/*]").replace("[p]", "[p, q]");
    check(&format!("{}{q}", agent("allow: [pay/*]")), &format!("{in_both}{q}"), &["a pay/refund PERMIT -> PERMIT wider"]);
}

#[test]
fn a_fleet_is_compared_by_its_kinds() {
    let fleet = |allow: &str| {
        let agents = (0..20_000).map(|n| {
            let own = if n % 2 == 0 { allow } else { "pay/read" };
            format!("---\n{{kind: agent, id: 'spiffe://t/{n}', applications: [p], acts_for: [g], allow: [{own}]}}\n")
        });
        let text = format!("{BASE}{}", agents.collect::<String>().trim_start_matches("---\n"));
        CompiledPolicy::compile(&super::source::parse_files(&file(&text)).documents).unwrap()
    };
    let pairs = diff::compare_access(&fleet("pay/read"), &fleet("pay/*"), 100);
    assert_eq!((pairs.listed.len(), pairs.total), (100, 10_000));
    assert!(pairs.listed.iter().all(|pair| &*pair.tool == "pay/refund" && pair.direction == ChangeDirection::Wider));
}

#[test]
fn what_no_pair_shows_is_said() {
    let issuer = |more: &str| {
        format!(
            "{BASE}{{kind: issuer, id: 'https://i', audiences: [x], applications: [p], groups: [{more}], keys: {{jwks: {{keys: [{{kty: OKP, crv: Ed25519, x: 11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo}}]}}}}}}"
        )
    };
    let (before, after) = (documents(&issuer("g")), documents(&issuer("g, h")));
    let said = diff::other_change_warnings(&before, &after);
    assert!(said.len() == 1 && said[0].message.contains("issuer `https://i` is changed"), "{said:?}");
    let changes = diff::compare_documents(&before, &after);
    assert!(changes.len() == 1 && changes[0].change == "changed" && changes[0].key.kind == "issuer", "{changes:?}");
}
