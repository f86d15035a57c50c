//! Tests that equal states decide alike, however they were reached: commit by commit or from a full state, with failed policies in between.

mod loom_tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::{FreshnessProof, FullState, Snapshot, SnapshotBuilder, SnapshotView, build_trust_table};
use crate::model::ids::{AgentId, GroupId, SessionId, TaskId, UserId};
use crate::model::json::JsonObject;
use crate::model::request::{DelegationSubject, TokenScope, ToolCall};
use crate::model::revision::{HistoryId, Revision, StateDigest};
use crate::model::rows::{DocumentKey, DocumentOrigin, DocumentRow, RowChange};
use crate::model::time::ClockReading;
use crate::policy::CompiledPolicy;
use crate::policy::source::{SourceFile, parse_files};
use crate::revocation::RevocationIndex;
use crate::token::PrivateKey;

/// Documents by kind and id, each in several forms. Some forms cannot be read or contradict other documents.
const FORMS: &[(&str, &str, &[&str])] = &[
    ("server", "a", &[r#""tools":{"x":{"risk":"read"},"y":{"risk":"read"}}"#, r#""tools":{"x":{"risk":"write"}}"#]),
    ("group", "g", &[r#""allow":["*"]"#, r#""allow":["a/x"]"#, r#""allow":["a/nothing"]"#, r#""allow":["a/y"]"#]),
    ("group.shadow", "g", &[r#""mode":"shadow""#, r#""mode":"shadow","allow":["a/x"]"#]),
    ("application", "p", &[r#""allow":["*"]"#]),
    ("permission_set", "s", &[r#""allow":["a/x"]"#, r#""allow":["*"]"#, r#""allow":["a/y"]"#]),
    (
        "guardrail",
        "r",
        &[r#""tools":["a/*"],"forbid_when":"context.tool.name == \"a/y\"""#, r#""tools":["a/x"],"forbid_when":"true""#],
    ),
    (
        "agent",
        "spiffe://t/a",
        &[
            r#""acts_for":["g"],"applications":["p"],"include":["s"],"keys":["kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"]"#,
            r#""acts_for":["g"],"applications":["p"],"allow":["a/x"],"delegates_to":["spiffe://t/b"]"#,
            r#""acts_for":["unheard-of"],"applications":["p"],"allow":["a/x"]"#,
            r#""nonsense":1"#,
        ],
    ),
    (
        "agent",
        "spiffe://t/b",
        &[
            r#""acts_for":["g"],"applications":["p"],"allow":["*"]"#,
            r#""acts_for":["g"],"applications":["*"],"include":["s"],"keys":["kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"]"#,
        ],
    ),
    ("agent.shadow", "spiffe://t/a", &[r#""mode":"shadow","acts_for":["g"],"applications":["p"],"allow":["a/y"]"#]),
];

fn row(kind: &str, id: &str, form: &str) -> DocumentRow {
    let json = format!(r#"{{"id":"{id}","kind":"{}",{form}}}"#, kind.trim_end_matches(".shadow"));
    let key = DocumentKey { kind: kind.to_owned(), id: id.to_owned() };
    DocumentRow { key, json, path: String::new(), line: 0, origin: DocumentOrigin::Api }
}

fn change(which: usize, form: usize) -> RowChange {
    let (kind, id, forms) = FORMS[which % FORMS.len()];
    match forms.get(form % (forms.len() + 1)) {
        Some(form) => RowChange::Document(row(kind, id, form)),
        None => RowChange::DocumentRemoved(DocumentKey { kind: kind.to_owned(), id: id.to_owned() }),
    }
}

fn full(number: u64, rows: &BTreeMap<DocumentKey, DocumentRow>) -> FullState {
    FullState {
        revision: Revision { history: HistoryId::new("h"), number },
        digest: StateDigest::default(),
        iat_skew_s: 30,
        freshness_bound_ms: 5_000,
        documents: rows.values().cloned().collect(),
        revocations: vec![],
    }
}

/// The answers of a snapshot to every possible call, and the agents and groups that it trusts.
fn says(snapshot: &Snapshot) -> Vec<String> {
    let policy = |policy: &CompiledPolicy| {
        let mut said = Vec::new();
        for agents in [&["spiffe://t/a"][..], &["spiffe://t/b"], &["spiffe://t/a", "spiffe://t/b"]] {
            let scope = TokenScope {
                tools: ["a/x", "a/y"].map(|tool| (tool.into(), crate::model::constraint::ConstraintMap::unconstrained())).into(),
            };
            let subject = DelegationSubject {
                user: UserId::new("https://i", "u"),
                groups: vec![GroupId::from("g")],
                application: "p".into(),
                agents: agents.iter().map(|id| AgentId::from(*id)).collect(),
                scopes: vec![scope; agents.len()],
                session: SessionId::from("s"),
                task: TaskId::from("t"),
            };
            let resolved = policy.resolve(&subject);
            let arguments = JsonObject::default();
            said.extend(["a/x", "a/y"].map(|tool| {
                let verdict = policy.evaluate(&resolved, &subject, &ToolCall::new(tool, &arguments));
                format!("{agents:?} {tool} {} {:?}", verdict.reason, verdict.matched)
            }));
        }
        said
    };
    let mut said = policy(snapshot.policy());
    said.extend(snapshot.policy().shadow_policy().map(|would_be| policy(would_be)).into_iter().flatten());
    said.extend(["spiffe://t/a", "spiffe://t/b"].map(|id| format!("{id} {}", snapshot.trust().knows_agent(id))));
    said.push(format!("{:?}", snapshot.trust().agent_for_key("kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k")));
    said.push(format!("{}", snapshot.trust().knows_group("g")));
    said
}

proptest! {
    #![proptest_config(ProptestConfig { cases: crate::testing::case_count::case_count(120), ..ProptestConfig::default() })]

    #[test]
    fn every_way_to_a_state_decides_alike(commits in prop::collection::vec(prop::collection::vec((any::<usize>(), 0..6usize), 1..4), 1..25), resync_at in 0..25usize) {
        let mut rows: BTreeMap<DocumentKey, DocumentRow> = BTreeMap::new();
        for (kind, id, forms) in FORMS.iter().filter(|(kind, ..)| !kind.ends_with(".shadow")) {
            let row = row(kind, id, forms[0]);
            rows.insert(row.key.clone(), row);
        }
        let mut builder = SnapshotBuilder::new(Default::default());
        builder.replace_all(full(1, &rows)).unwrap();
        let mut last_good = says(&SnapshotBuilder::new(Default::default()).replace_all(full(1, &rows)).unwrap());
        for (number, commit) in (2..).zip(commits) {
            let changes: Vec<RowChange> = commit.into_iter().map(|(which, form)| change(which, form)).collect();
            for change in &changes {
                match change {
                    RowChange::Document(row) => drop(rows.insert(row.key.clone(), row.clone())),
                    RowChange::DocumentRemoved(key) => drop(rows.remove(key)),
                    RowChange::Revocation(_) | RowChange::RevocationRemoved(_) => {}
                }
            }
            let snapshot = if number as usize == resync_at {
                builder.replace_all(full(number, &rows)).unwrap()
            } else {
                builder.apply_changes(number, StateDigest::default(), changes.iter()).unwrap()
            };
            match SnapshotBuilder::new(std::sync::Arc::new(RevocationIndex::new())).replace_all(full(number, &rows)) {
                Ok(anew) => {
                    prop_assert_eq!(builder.policy_error(), None);
                    prop_assert_eq!(snapshot.policy_number(), number);
                    last_good = says(&anew);
                }
                Err(_) => {
                    prop_assert!(builder.policy_error().is_some());
                    prop_assert!(snapshot.policy_number() < number);
                }
            }
            prop_assert_eq!(&says(&snapshot), &last_good);
        }
    }
}

#[test]
fn the_age_of_the_proof_says_what_a_view_may_answer() {
    use super::Freshness::{Closed, Fresh, Stale};
    let snapshot = SnapshotBuilder::new(Arc::new(RevocationIndex::new())).replace_all(full(1, &BTreeMap::new())).unwrap();
    let at = |ms: i64| ClockReading { unix_ns: ms * 1_000_000, boot_ns: ms * 1_000_000 };
    for (age_ms, freshness, valid_for_ms) in
        [(0, Fresh, 5_000), (999, Fresh, 4_001), (1_000, Stale, 4_000), (4_999, Stale, 1), (5_000, Closed, 0), (9_000, Closed, 0)]
    {
        let view = SnapshotView { snapshot: snapshot.clone(), proof: FreshnessProof::SentAt(at(10_000)) };
        let now = at(10_000 + age_ms);
        assert_eq!((view.freshness(now), view.valid_for_ms(now)), (freshness, valid_for_ms), "{age_ms} ms");
    }
    for proof in [FreshnessProof::Quarantined, FreshnessProof::Missing] {
        let view = SnapshotView { snapshot: snapshot.clone(), proof };
        assert_eq!((view.age_ms(at(0)), view.freshness(at(0)), view.valid_for_ms(at(0))), (None, Closed, 0));
    }
}

/// The table of trust is what the documents say; a document in shadow establishes nothing.
#[test]
fn trust_is_what_the_documents_say() {
    let key = |seed: u8| PrivateKey::from_seed([seed; 32]).unwrap().public_key().clone();
    let policy = format!(
        "{{kind: issuer, id: 'https://i', keys: {{jwks: {{keys: [{}]}}}}, audiences: ['https://g'], groups: [vouched], \
           applications: [p], typ: [at+jwt], lifetime_max: 2h, hop_lifetime_max: 30m}}\n---\n\
         {{kind: group, id: known, allow: []}}\n---\n\
         {{kind: agent, id: 'spiffe://t/a', keys: [{}], acts_for: [served]}}\n---\n\
         {{kind: agent, id: 'spiffe://t/s', mode: shadow, keys: [{}], acts_for: [shadowed]}}\n",
        key(1).to_jwk(),
        key(2).thumbprint(),
        key(3).thumbprint(),
    );
    let parsed = parse_files(&[SourceFile { path: "p.yaml".to_owned(), content: policy.into_bytes() }]);
    let trust = build_trust_table(&parsed.documents).unwrap();
    let issuer = trust.issuer("https://i").unwrap();
    assert_eq!((issuer.lifetime_max_s, issuer.hop_lifetime_max_s), (7_200, 1_800));
    assert_eq!((&issuer.audiences, &issuer.typ), (&["https://g".to_owned()].into(), &vec!["at+jwt".to_owned()]));
    assert!(issuer.groups.allows("vouched") && !issuer.groups.allows("known"));
    assert!(issuer.applications.allows("p") && !issuer.applications.allows("q"));
    let known = ["vouched", "known", "served", "shadowed"].map(|group| trust.knows_group(group));
    assert_eq!(known, [true, true, true, false]);
    assert_eq!(trust.agent_for_key(key(2).thumbprint().as_str()).map(AgentId::as_str), Some("spiffe://t/a"));
    assert!(trust.knows_agent("spiffe://t/a") && !trust.knows_agent("spiffe://t/s"));
    assert_eq!(trust.agent_for_key(key(3).thumbprint().as_str()), None);
}
