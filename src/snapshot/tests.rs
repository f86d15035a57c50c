//! Tests that equal states decide alike, however they were reached: commit by commit or from a full state, with failed policies in between.

mod loomed;

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{Builder, FullState, Snapshot};
use crate::model::ids::{AgentId, GroupId, SessionId, TaskId, UserId};
use crate::model::json::Object;
use crate::model::records::{Change, DocumentKey, DocumentRow, Origin};
use crate::model::request::{Call, Scope, Subject};
use crate::model::revision::{HistoryId, Revision, StateDigest};
use crate::policy::Compiled;
use crate::revocation::Index;

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
    DocumentRow { key, json, path: String::new(), line: 0, origin: Origin::Api }
}

fn change(which: usize, form: usize) -> Change {
    let (kind, id, forms) = FORMS[which % FORMS.len()];
    match forms.get(form % (forms.len() + 1)) {
        Some(form) => Change::Document(row(kind, id, form)),
        None => Change::DocumentRemoved(DocumentKey { kind: kind.to_owned(), id: id.to_owned() }),
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
    let policy = |policy: &Compiled| {
        let mut said = Vec::new();
        for agents in [&["spiffe://t/a"][..], &["spiffe://t/b"], &["spiffe://t/a", "spiffe://t/b"]] {
            let scope = Scope {
                tools: ["a/x", "a/y"].map(|tool| (tool.into(), crate::model::constraint::ArgumentMap::unconstrained())).into(),
            };
            let subject = Subject {
                user: UserId::new("https://i", "u"),
                groups: vec![GroupId::from("g")],
                application: "p".into(),
                agents: agents.iter().map(|id| AgentId::from(*id)).collect(),
                scopes: vec![scope; agents.len()],
                session: SessionId::from("s"),
                task: TaskId::from("t"),
            };
            let resolved = policy.resolve(&subject);
            let arguments = Object::default();
            said.extend(["a/x", "a/y"].map(|tool| {
                let verdict = policy.evaluate(&resolved, &subject, &Call::new(tool, &arguments));
                format!("{agents:?} {tool} {} {:?}", verdict.reason, verdict.matched)
            }));
        }
        said
    };
    let mut said = policy(snapshot.policy());
    said.extend(snapshot.policy().would_be().map(|would_be| policy(would_be)).into_iter().flatten());
    said.extend(["spiffe://t/a", "spiffe://t/b"].map(|id| format!("{id} {}", snapshot.trust().knows_agent(id))));
    said.push(format!("{:?}", snapshot.trust().agent_of("kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k")));
    said.push(format!("{}", snapshot.trust().knows_group("g")));
    said
}

proptest! {
    #![proptest_config(ProptestConfig { cases: crate::testing::cases::cases(120), ..ProptestConfig::default() })]

    #[test]
    fn every_way_to_a_state_decides_alike(commits in prop::collection::vec(prop::collection::vec((any::<usize>(), 0..6usize), 1..4), 1..25), resync_at in 0..25usize) {
        let mut rows: BTreeMap<DocumentKey, DocumentRow> = BTreeMap::new();
        for (kind, id, forms) in FORMS.iter().filter(|(kind, ..)| !kind.ends_with(".shadow")) {
            let row = row(kind, id, forms[0]);
            rows.insert(row.key.clone(), row);
        }
        let mut builder = Builder::new(Default::default());
        builder.replace(full(1, &rows)).unwrap();
        let mut last_good = says(&Builder::new(Default::default()).replace(full(1, &rows)).unwrap());
        for (number, commit) in (2..).zip(commits) {
            let changes: Vec<Change> = commit.into_iter().map(|(which, form)| change(which, form)).collect();
            for change in &changes {
                match change {
                    Change::Document(row) => drop(rows.insert(row.key.clone(), row.clone())),
                    Change::DocumentRemoved(key) => drop(rows.remove(key)),
                    Change::Revocation(_) | Change::RevocationRemoved(_) => {}
                }
            }
            let snapshot = if number as usize == resync_at {
                builder.replace(full(number, &rows)).unwrap()
            } else {
                builder.apply(number, StateDigest::default(), changes.iter()).unwrap()
            };
            match Builder::new(std::sync::Arc::new(Index::new())).replace(full(number, &rows)) {
                Ok(anew) => {
                    prop_assert_eq!(builder.problem(), None);
                    prop_assert_eq!(snapshot.policy_number(), number);
                    last_good = says(&anew);
                }
                Err(_) => {
                    prop_assert!(builder.problem().is_some());
                    prop_assert!(snapshot.policy_number() < number);
                }
            }
            prop_assert_eq!(&says(&snapshot), &last_good);
        }
    }
}
