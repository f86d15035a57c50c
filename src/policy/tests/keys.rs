//! Tests of listed keys: newly listed keys, rotated-out keys, and documents that lose `two_person`.

use super::super::diff::{other_change_warnings, weakened_documents};
use super::super::document::Document;
use super::super::key_changes::{newly_listed_keys, rotated_keys};
use super::documents;

fn key(last: char) -> String {
    format!("{}{last}", "k".repeat(42))
}

fn agent(id: &str, keys: &[char], more: &str) -> String {
    let keys: Vec<String> = keys.iter().map(|last| key(*last)).collect();
    format!("---\n{{kind: agent, id: 'spiffe://t/{id}', keys: [{}]{more}}}\n", keys.join(", "))
}

const OPERATOR: &str = "---\n{kind: operator, id: o, roles: [audit], keys: [{kty: OKP, crv: Ed25519, x: 11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo}]}\n";

fn read(text: &str) -> Vec<Document> {
    documents(text.trim_start_matches("---\n"))
}

#[test]
fn keys_come_and_go() {
    let operator = read(OPERATOR)[0].clone();
    let of_operator = super::super::key_changes::document_keys(&operator)[0].to_string();
    let check = |before: &str, after: &str, new: &[&str], out: &[&str]| {
        let (before, after) = (read(before), read(after));
        let replaced: Vec<Document> = before.iter().filter(|document| !after.contains(document)).cloned().collect();
        let changed = after.iter().filter(|document| !before.contains(document));
        let listed: Vec<String> = newly_listed_keys(changed, &replaced).iter().map(|key| key.thumbprint.to_string()).collect();
        let rotated: Vec<String> = rotated_keys(&replaced, &after).iter().map(|key| key.thumbprint.to_string()).collect();
        assert_eq!(
            (listed, rotated),
            (new.iter().map(|key| (*key).to_owned()).collect(), out.iter().map(|key| (*key).to_owned()).collect())
        );
    };
    let (a, e, i) = (key('A'), key('E'), key('I'));
    let of = |id: &str, keys: &[char]| agent(id, keys, "");
    check(&of("a", &['A']), &of("a", &['A']), &[], &[]);
    check(&of("a", &['A']), &of("a", &['A', 'E']), &[&e], &[]);
    check(&of("a", &['A', 'E']), &of("a", &['E', 'I']), &[&i], &[&a]);
    // A key that another document lists stays valid. A removed document rotates out an operator's keys, but not an agent's.
    let both = |one: &[char], other: &[char]| of("a", one) + &of("b", other);
    check(&both(&['A'], &['E']), &both(&['E'], &['A']), &[&e, &a], &[]);
    check(&both(&['A'], &['E']), &of("b", &['E']), &[], &[]);
    check(&format!("{}{OPERATOR}", of("a", &['A'])), &of("a", &['A']), &[], &[&of_operator]);
    check(&of("a", &['A']), &format!("{}{OPERATOR}", of("a", &['A'])), &[&of_operator], &[]);
    // A shadow document lists no keys.
    check(&of("a", &['A']), &agent("a", &['A'], ", mode: shadow"), &[], &[]);
    check(&agent("a", &['A'], ", mode: shadow"), &agent("a", &['E'], ", mode: shadow"), &[], &[]);
}

#[test]
fn two_people_are_asked_for() {
    let check = |before: &str, after: &str, expected: bool, says: &str| {
        let (before, after) = (read(before), read(after));
        assert_eq!(!weakened_documents(&before, &after).is_empty(), expected, "{before:?} {after:?}");
        let said: Vec<String> = other_change_warnings(&before, &after).into_iter().map(|said| said.message).collect();
        assert_eq!(said.iter().any(|said| said.contains("two people")), !says.is_empty(), "{said:?}");
        assert!(says.is_empty() || said.iter().any(|said| said.contains(says)), "{said:?}");
    };
    let of = |more: &str| agent("a", &[], more);
    check(&of(""), &of(", two_person: true"), false, "from now on two people are needed");
    check(&of(", two_person: true"), &of(", two_person: true, owner: x"), false, "");
    for after in
        [&of(""), &of(", two_person: false"), &of(", two_person: true, mode: shadow"), &agent("b", &[], ", two_person: true")]
    {
        check(&of(", two_person: true"), after, true, "no longer needed");
    }
    check(&of(", two_person: true, mode: shadow"), &of(", mode: shadow"), false, "");
    let row = read(&of(", two_person: true"))[0].to_row(crate::model::rows::DocumentOrigin::Folder);
    assert!(row.json.contains("\"two_person\":true") && Document::from_row(&row).unwrap().two_person);
}
