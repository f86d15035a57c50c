//! Tests of policies that are legal but hardly intended, each with all messages of `policy check`: position, severity, message
//! and help.

use super::super::source::parse_files;
use super::super::validate;
use super::{KEY_X, file, linted};

/// The common documents of all cases, which have no mistakes themselves.
const BASE: &str = "
{kind: issuer, id: 'https://i', keys: {jwks: {keys: [KEY]}}, groups: [sales], applications: [portal, desk]}
---
{kind: application, id: portal, allow: ['*']}
---
{kind: application, id: desk, allow: [crm/*]}
---
{kind: group, id: sales, allow: [crm/*, hr/*]}
---
{kind: server, id: crm, tools: {read: {risk: read}, write: {risk: write}, wipe: {}, purge: {}, drop: {}, burn: {}}}
---
{kind: server, id: hr, tools: {read: {risk: read}}}
---
{kind: server, id: mail, tools: {send: {risk: write}}}
---
";

/// The public key of RFC 8032, section 7.1, test 2. An operator's key must not be an issuer's.
const OPERATOR_X: &str = "PUAXw-hDiVqStwqnTRt-vJyYLM8uxJaMwM1V8Sr0Zgw";

/// The first three lines of an agent's document; the case continues on the fourth.
fn agent(name: &str) -> String {
    let key = format!("{name:A<42}A");
    format!("kind: agent\nid: spiffe://t/{name}\nkeys: [{key}]")
}

/// A case, with `AGENT name` replaced by the first lines of an agent's document.
fn expanded(case: &str) -> String {
    let lines = case.lines().map(|line| match line.strip_prefix("AGENT ") {
        Some(name) => agent(name),
        None => line.replace("KEY", &key(KEY_X)).replace("HERS", &key(OPERATOR_X)),
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn key(x: &str) -> String {
    format!("{{kty: OKP, crv: Ed25519, x: {x}}}")
}

/// The diagnostics of a case. Lines count from the first line of the case.
fn said(case: &str) -> Vec<String> {
    let base = expanded(BASE.trim_start());
    let before = base.lines().count();
    let said = linted(&file(&format!("{base}\n{}", expanded(case))));
    let shifted = said.iter().map(|line| {
        let (number, rest) = line.strip_prefix("p.yaml:").unwrap().split_once(':').unwrap();
        format!("{}:{rest}", number.parse::<usize>().unwrap() - before)
    });
    shifted.collect()
}

/// The applications and users that most agents of the cases serve.
const SERVED: &str = "applications: [portal]\nacts_for: [sales]\n";

/// The cases with their diagnostics. `AGENT` stands for three lines, and `@` for two more: `applications` and `acts_for`.
const CASES: &[(&str, &[&str])] = &[
    // No diagnostics.
    ("{kind: tool, id: x/y}", &[]),
    ("AGENT a\n@allow: [crm/read]", &[]),
    ("AGENT a\napplications: ['*']\nacts_for: ['*']\nallow: [crm/read]", &[]),
    ("AGENT a\n@include: [s]\n---\n{kind: permission_set, id: s, allow: [crm/read]}", &[]),
    // Reachable agents, applications and groups.
    (
        "kind: agent\nid: spiffe://t/a\n@allow: [crm/read]",
        &["2:5: warning: agent `spiffe://t/a` cannot be reached: it has no `keys`, so it can hold no delegation (list in \
           `keys` the thumbprint that `portcullis token keygen` prints)"],
    ),
    (
        "AGENT a\nacts_for: [sales]\nallow: [crm/read]",
        &["2:5: warning: agent `spiffe://t/a` cannot be reached: it runs inside no application (name one in `applications`)"],
    ),
    (
        "AGENT a\napplications: []\nacts_for: [sales]\nallow: [crm/read]",
        &["2:5: warning: agent `spiffe://t/a` cannot be reached: it runs inside no application (name one in `applications`)"],
    ),
    (
        "AGENT a\napplications: [portal]\nallow: [crm/read]",
        &["2:5: warning: agent `spiffe://t/a` cannot be reached: it acts for nobody (name a group in `acts_for`, or `*` for \
           every user)"],
    ),
    (
        "AGENT a\napplications: [kiosk]\nacts_for: [sales]\nallow: [crm/read]\n---\nkind: application\nid: kiosk\nallow: [crm/*]",
        &[
            "2:5: warning: agent `spiffe://t/a` cannot be reached: no issuer speaks for `kiosk` of its `applications`",
            "9:5: warning: no issuer speaks for application `kiosk` (name it in `applications` of an issuer)",
        ],
    ),
    (
        "AGENT a\napplications: [portal]\nacts_for: [ops]\nallow: [crm/read]\n---\nkind: group\nid: ops\nallow: [crm/*]",
        &[
            "2:5: warning: agent `spiffe://t/a` cannot be reached: no issuer may say that a user is in `ops` of its `acts_for`",
            "9:5: warning: no issuer may say that a user is in group `ops` (name it in `groups` of an issuer)",
        ],
    ),
    (
        "AGENT a\napplications: [kiosk]\nacts_for: [sales]\nallow: [crm/read]\n---\n{kind: application, id: kiosk, allow: [crm/*]}\n\
         ---\n{kind: group, id: guests, allow: [crm/read]}\n\
         ---\n{kind: issuer, id: 'https://j', keys: {jwks: {keys: [KEY]}}, groups: [guests], applications: [kiosk]}",
        &["2:5: warning: agent `spiffe://t/a` cannot be reached: the issuers that speak for its `applications` are not those \
           that vouch for the groups of its `acts_for`"],
    ),
    (
        "AGENT a\n@deny: [crm/wipe]",
        &["2:5: warning: agent `spiffe://t/a` allows nothing, so nothing is permitted in any chain that it is part of"],
    ),
    (
        "kind: issuer\nid: https://j\nkeys: {jwks: {keys: [KEY]}}",
        &[
            "2:5: warning: issuer `https://j` speaks for no application, so no delegation of it is of use (name them in \
             `applications`)",
            "2:5: warning: issuer `https://j` vouches for no group, so its users may do nothing (name them in `groups`)",
        ],
    ),
    ("kind: permission_set\nid: s\nallow: [crm/read]", &["2:5: warning: nothing includes permission set `s`"]),
    (
        "{kind: permission_set, id: s, allow: [crm/read]}\n---\n{kind: permission_set, id: t, include: [s]}",
        &["1:28: warning: nothing includes permission set `s`", "3:28: warning: nothing includes permission set `t`"],
    ),
    // A shadow document is checked when it is enforced. Its includes count as used.
    ("AGENT a\n@mode: shadow\ninclude: [s]\n---\n{kind: permission_set, id: s, allow: [crm/read]}", &[]),
    ("AGENT a\nmode: shadow\nallow: ['*']", &[]),
    // Conditions depend on the call. An entry with a condition may never count, but an entry under it may.
    ("AGENT a\n@allow: ['*': {when: 'context.args has ticket'}]", &[]),
    (
        "AGENT a\n@allow: [crm/read]\ninclude: [s]\n---\n\
         {kind: permission_set, id: s, deny: [crm/*: {when: 'context.time.hour_utc < 7'}]}",
        &[],
    ),
    // Ceilings.
    (
        "AGENT a\napplications: [desk]\nacts_for: [sales]\nallow: [crm/read, hr/read]",
        &["6:19: warning: `hr/read` never counts: application `desk` allows none of what it matches"],
    ),
    (
        "AGENT a\n@allow: [crm/read]\napprove: [mail/send: {by: [leads]}]\n---\n\
         {kind: operator, id: o, keys: [HERS], roles: [approve], groups: [leads], users: [{issuer: 'https://i', sub: o}]}",
        &["7:11: warning: `mail/send` never counts: group `sales` allows none of what it matches"],
    ),
    (
        "AGENT a\napplications: [desk, other]\nacts_for: [sales]\nallow: [crm/read, hr/read]\n---\n\
         {kind: application, id: other, allow: [crm/*, hr/read], deny: [hr/*]}\n---\n\
         {kind: issuer, id: 'https://j', keys: {jwks: {keys: [KEY]}}, groups: ['*'], applications: ['*']}",
        &[
            "6:19: warning: `hr/read` never counts: no application of `applications` allows any of what it matches",
            "8:47: warning: `hr/read` never counts: `deny` of this document takes all it matches",
        ],
    ),
    (
        "AGENT a\napplications: [desk]\nacts_for: ['*']\nallow: [crm/read]\ninclude: [s]\n---\n{kind: permission_set, id: s, allow: [hr/*]}",
        &["7:11: warning: permission set `s` never counts: application `desk` allows none of what it allows"],
    ),
    ("AGENT a\n@allow: [crm/read]\ndeny: [mail/*]", &[]),
    // Destructive tools.
    (
        "AGENT a\n@allow: ['*']",
        &["6:9: warning: `*` allows what cannot be undone: `crm/burn`, `crm/drop`, `crm/purge` and 1 more (name the tools it \
           needs, or move these to `approve` or `deny`)"],
    ),
    (
        "AGENT a\n@include: [t]\n---\n{kind: permission_set, id: t, include: [s]}\n---\n{kind: permission_set, id: s, allow: ['*/*']}",
        &["6:11: warning: `*` of permission set `t` allows what cannot be undone: `crm/burn`, `crm/drop`, `crm/purge` and 1 \
           more (name the tools it needs, or move these to `approve` or `deny`)"],
    ),
    ("AGENT a\n@allow: ['*']\ndeny: [crm/burn, crm/drop, crm/purge, crm/wipe]", &[]),
    ("AGENT a\n@allow: [crm/*]", &[]),
    ("AGENT a\n@allow: ['*': {args: {dry_run: true}}]", &[]),
    // Permission sets beside a document's own entries.
    (
        "AGENT a\n@allow: [crm/read, hr/read]\ninclude: [s]\n---\n{kind: permission_set, id: s, deny: [hr/*]}",
        &["6:19: warning: `hr/read` never counts: `deny` of permission set `s` takes all it matches"],
    ),
    (
        "AGENT a\n@allow: [crm/read, crm/write]\ninclude: [s]\n---\n{kind: permission_set, id: s, approve: [crm/write: {by: [leads]}]}\n\
         ---\n{kind: operator, id: o, keys: [HERS], roles: [approve], groups: [leads], users: [{issuer: 'https://i', sub: o}]}",
        &["6:19: warning: `crm/write` never counts: `approve` of permission set `s` takes all it matches"],
    ),
    (
        "AGENT a\n@allow: [crm/read, hr/read]\ninclude: [s]\n---\n{kind: permission_set, id: s, allow: [crm/*.x, crm/rea*]}",
        &[
            "6:9: warning: `crm/read` adds nothing: permission set `s` covers it",
            "9:39: warning: pattern `crm/*.x` matches no registered tool",
        ],
    ),
    (
        "AGENT a\n@allow: [crm/read]\ndeny: [hr/*]\ninclude: [s]\n---\n{kind: permission_set, id: s, allow: [hr/read], deny: [hr/*]}",
        &[
            "7:8: warning: `hr/*` adds nothing: permission set `s` covers it",
            "8:11: warning: permission set `s` never counts: `deny` of this document takes all it allows",
            "10:39: warning: `hr/read` never counts: `deny` of this document takes all it matches",
        ],
    ),
    ("AGENT a\n@allow: [crm/*]\ninclude: [s]\n---\n{kind: permission_set, id: s, deny: [crm/read: {args: {x: 1}}]}", &[]),
    // Delegations.
    (
        "AGENT a\n@allow: [crm/read]\ndelegates_to: [spiffe://t/b]\nsession: {hops_max: 1}\n---\n\
         AGENT b\n@allow: [crm/read]\ndelegates_to: [spiffe://t/c]\n---\nAGENT c\n@allow: [crm/read]",
        &[
            "7:16: warning: `spiffe://t/c` can never be reached through `spiffe://t/a`: it is 2 hops away, and `hops_max` allows 1",
        ],
    ),
    (
        "AGENT a\n@allow: [crm/read]\ndelegates_to: [spiffe://t/a]",
        &["7:16: warning: agents hand on in a circle that only the depth limit of 8 hops ends: `spiffe://t/a` to \
           `spiffe://t/a` (say with `session: {hops_max: …}` of one of them how many hops are meant)"],
    ),
    (
        "AGENT a\n@allow: [crm/read]\ndelegates_to: [spiffe://t/b]\n---\nAGENT b\n@allow: [crm/read]\ndelegates_to: [spiffe://t/a]",
        &["15:16: warning: agents hand on in a circle that only the depth limit of 8 hops ends: `spiffe://t/a` to \
           `spiffe://t/b` to `spiffe://t/a` (say with `session: {hops_max: …}` of one of them how many hops are meant)"],
    ),
    (
        "AGENT a\n@allow: [crm/read]\ndelegates_to: [spiffe://t/b]\nsession: {hops_max: 2}\n---\n\
         AGENT b\n@allow: [crm/read]\ndelegates_to: [spiffe://t/a]",
        &[],
    ),
    (
        "AGENT a\n@allow: [crm/read]\ndelegates_to: [spiffe://t/b]\n---\nAGENT b\napplications: [desk]\nacts_for: [sales]\nallow: [crm/read]",
        &["7:16: warning: handing on to `spiffe://t/b` never works: the two have no application in common"],
    ),
    (
        "AGENT a\n@allow: [crm/read]\ndelegates_to: [spiffe://t/b]\n---\nAGENT b\n@allow: [hr/read]",
        &["7:16: warning: handing on to `spiffe://t/b` permits nothing: there is no tool that both allow"],
    ),
    (
        "AGENT a\n@allow: [crm/read]\ndelegates_to: [spiffe://t/b]\nsession: {hops_max: 0}\n---\nAGENT b\n@allow: [crm/read]",
        &["7:16: warning: `delegates_to` has no effect: `hops_max` is 0"],
    ),
    // A policy with an error gets no warnings, because documents may look unreachable only due to the error.
    (
        "AGENT a\napplications: [potral]\nacts_for: [sales]\nallow: [crm/read]",
        &["4:16: error: unknown application `potral` (did you mean `portal`?)"],
    ),
    (
        "AGENT a\napplications: [portal]\nacts_for: [sale]\nallow: [crm/read]",
        &["5:12: error: unknown group `sale` (did you mean `sales`?)"],
    ),
    ("AGENT a\n@allow: [crm/raed]", &["6:9: error: unknown tool `crm/raed` (did you mean `crm/read`?)"]),
    (
        "AGENT a\n@deny: [cmr/*]",
        &["6:8: error: pattern `cmr/*` matches no registered tool (a deny that matches nothing is a hole)"],
    ),
    ("AGENT a\n@aloww: [crm/read]", &["6:1: error: unknown key `aloww` (did you mean `allow`?)"]),
    ("AGENT a\n@include: [s]", &["6:11: error: unknown permission set `s`"]),
    ("AGENT a\n@delegates_to: ['*']", &["6:15: error: `delegates_to` must name each agent: there is no `*`"]),
    (
        "AGENT a\n@allow:\n- crm",
        &["7:3: error: tool pattern `crm` has no slash, so it matches no tool: write `server/tool`, or `*` alone for every tool"],
    ),
    ("AGENT a\n@session: {hops_max: 9}", &["6:21: error: `hops_max` must be a whole number from 0 to 8"]),
    (
        "kind: agent\nid: spiffe://t/a\nkeys: [short]",
        &["3:8: error: `short` is not a key thumbprint: 43 characters of base64url (RFC 7638)"],
    ),
    ("kind: group\nid: sales", &["2:5: error: group `sales` is defined twice: first in p.yaml:7"]),
    ("kind: gruop\nid: x", &["1:7: error: unknown kind `gruop` (did you mean `group`?)"]),
    (
        "AGENT a\n@allow:\n- crm/read: {when: 'context.user.grops.contains(\"x\")'}",
        &["7:20: error: `when`: `context.user` has no member `grops`: did you mean `groups`?"],
    ),
    (
        "AGENT a\n@allow:\n- crm/read: {when: 'context.env has ip'}",
        &[
            "7:20: error: `context.env` is the gateway's word and this entry would permit by it (say `evidence: attested` if that is meant)",
        ],
    ),
    ("AGENT a\n@allow:\n- crm/wipe: {prepared: crm/wip}", &["7:3: error: unknown tool `crm/wip` (did you mean `crm/wipe`?)"]),
    (
        "kind: guardrail\nid: g\ntools: [cmr/*]\nforbid_when: 'true'",
        &["3:9: error: pattern `cmr/*` matches no registered tool (a guardrail that guards nothing is a hole)"],
    ),
    ("kind: guardrail\nid: g\ntools: ['*']", &["1:1: error: `forbid_when` is missing"]),
    (
        "kind: tool\nid: a/b\nmode: shadow",
        &["3:7: error: a document of kind `tool` cannot be in shadow: only application, group, agent, permission_set, guardrail"],
    ),
    (
        "kind: test\nagent: spiffe://t/a\nuser: {issuer: 'https://i', sub: u, groups: [sales]}\napplication: portal\n\
         expect:\n- {tool: crm/raed, want: PERMIT}",
        &["2:8: error: unknown agent `spiffe://t/a`", "6:3: error: unknown tool `crm/raed` (did you mean `crm/read`?)"],
    ),
    ("kind: tool\nid: crm", &["2:5: error: id `crm` is not `server/tool`"]),
    ("kind: tool\nid: x/y\nrisk: high", &["3:7: error: `high` is no value of `risk`: expected `read`, `write`, `destructive`"]),
];

/// The cases without errors, as YAML.
pub(super) fn sound_cases() -> Vec<String> {
    let sound = CASES.iter().filter(|(_, expected)| !expected.iter().any(|line| line.contains(": error: ")));
    sound.map(|(case, _)| format!("{}\n{}", expanded(BASE.trim_start()), expanded(&case.replace('@', SERVED)))).collect()
}

#[test]
fn bad_policies() {
    let bad = CASES.iter().filter(|(_, expected)| !expected.is_empty()).count();
    assert!(bad >= 40, "{bad}");
    let wrong = CASES.iter().filter_map(|(case, expected)| {
        let said = said(&case.replace('@', SERVED));
        (said != *expected).then(|| format!("{case}\n  said {said:#?}\n  expected {expected:#?}\n"))
    });
    let wrong: Vec<String> = wrong.collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn without_an_issuer_that_alone_is_said() {
    let text = format!(
        "{}\napplications: [p]\nacts_for: [g]\nallow: [s/t]\n---\n{{kind: application, id: p, allow: [s/t]}}\n---\n{{kind: group, id: g, allow: [s/t]}}\n---\n{{kind: tool, id: s/t, risk: read}}",
        agent("a")
    );
    assert_eq!(
        linted(&file(&text)),
        ["p.yaml:2:5: warning: there is no issuer, so no delegation can begin and nothing is ever permitted"]
    );
}

/// A row of agents, each of which delegates to the next.
fn row(count: usize) -> String {
    let mut text = expanded(BASE.trim_start());
    for number in 0..count {
        let next = if number + 1 < count { format!("\ndelegates_to: [spiffe://t/{}]", number + 1) } else { String::new() };
        text.push_str(&format!("\n{}\n{SERVED}allow: [crm/read]{next}\n---", agent(&number.to_string())));
    }
    text
}

#[test]
fn a_row_longer_than_the_depth_limit() {
    assert_eq!(linted(&file(&row(9))), Vec::<String>::new());
    let said = linted(&file(&row(10)));
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(
        said[0].ends_with(
            "`spiffe://t/9` can never be reached through `spiffe://t/0`: it is 9 hops away, and the depth limit allows 8"
        ),
        "{said:?}"
    );
}

/// The cost for each agent does not grow with their number, because each delegation is followed a bounded number of times.
#[test]
fn agents_that_all_hand_on_to_each_other_end() {
    let names: Vec<String> = (0..400).map(|number| format!("spiffe://t/{number}")).collect();
    let mut text = expanded(BASE.trim_start());
    for number in 0..400 {
        text.push_str(&format!(
            "\n{}\n{SERVED}allow: [crm/read]\ndelegates_to: [{}]\n---",
            agent(&number.to_string()),
            names.join(", ")
        ));
    }
    let parsed = parse_files(&file(&text));
    assert_eq!(parsed.diagnostics, []);
    // Only cycles, as many as the limit.
    assert_eq!(validate::check_policy(&parsed.documents).len(), 100);
}
