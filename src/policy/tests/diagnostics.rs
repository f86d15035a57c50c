//! Tests of refused policies, each with all of its diagnostics: message, line, column and suggestion.

use super::super::source::SourceFile;
use super::{KEY_X, diagnostics, file};

/// The common documents of all cases, in the first four lines.
const BASE: &str = "{kind: server, id: crm, tools: {read: {risk: read}, write: {risk: write}, wipe: {}}}
--- {kind: group, id: sales}
--- {kind: application, id: portal, allow: ['*']}
--- {kind: permission_set, id: reads, allow: [crm/read]}
";

/// `expected` has one line for each diagnostic, without the path. Lines count from the first line of the case.
fn check(case: &str, expected: &[&str]) {
    let base = BASE.replace("--- ", "---\n").trim_end().to_owned();
    let before = base.lines().count() + 1;
    let said = diagnostics(&file(&format!("{base}\n---\n{case}")));
    let said: Vec<String> = said
        .iter()
        .map(|line| {
            let mut parts = line.strip_prefix("p.yaml:").unwrap().splitn(2, ':');
            let number: usize = parts.next().unwrap().parse().unwrap();
            format!("{}:{}", number - before, parts.next().unwrap())
        })
        .collect();
    assert_eq!(said, expected, "{case}");
}

fn issuer(keys: &str, more: &str) -> String {
    format!("kind: issuer\nid: https://i\nkeys: {keys}\n{more}")
}

fn jwk(x: &str) -> String {
    format!("{{kty: OKP, crv: Ed25519, x: {x}}}")
}

#[test]
fn documents_and_their_keys() {
    check("{kind: group, id: g}", &[]);
    check("- kind: group", &["1:1: error: a document must be a mapping, found a list"]);
    check("id: g", &["1:1: error: `kind` is missing"]);
    check("kind: group", &["1:1: error: `id` is missing"]);
    check("kind: gruop\nid: g", &["1:7: error: unknown kind `gruop` (did you mean `group`?)"]);
    check("kind: [group]\nid: g", &["1:7: error: `kind` must be a string, found a list"]);
    check("kind: group\nid: 12", &["2:5: error: `id` must be a string, found a number (quote it if it is text: '12')"]);
    check("kind: group\nid: ''", &["2:5: error: `id` must not be empty"]);
    check("kind: group\nid: ' g'", &["2:5: error: `id` begins or ends with a space"]);
    check("kind: group\nid: \"a\\tb\"", &["2:5: error: `id` holds a control character"]);
    check("kind: group\nid: \"a\\0b\"", &["2:5: error: `id` holds a control character"]);
    check(
        "kind: tool\nid: portcullis/list_tools",
        &[
            "2:5: error: id `portcullis/list_tools` belongs to `portcullis`, the server whose tools are calls to this program itself",
        ],
    );
    check("kind: group\nid: '*'", &["2:5: error: id `*` means every one where it is named: choose another"]);
    check("kind: group\nid: g\naloww: [crm/*]", &["3:1: error: unknown key `aloww` (did you mean `allow`?)"]);
    check("kind: group\nid: g\nwhatever: 1", &["3:1: error: unknown key `whatever`"]);
    check("kind: group\nid: g\nid: h", &["3:1: error: duplicate key `id`: it stands on line 10 already"]);
    check("kind: agent\nid: spiffe://t/a\nmode: shadow", &[]);
    check(
        "kind: agent\nid: spiffe://t/a\nmode: shadwo",
        &["3:7: error: `shadwo` is no value of `mode`: expected `enforce`, `shadow` (did you mean `shadow`?)"],
    );
    check(
        "kind: tool\nid: a/b\nmode: shadow",
        &["3:7: error: a document of kind `tool` cannot be in shadow: only application, group, agent, permission_set, guardrail"],
    );
    check(
        "kind: group\nid: sales\nmode: shadow\nallow: [crm/raed]",
        &["4:9: error: unknown tool `crm/raed` (did you mean `crm/read`?)"],
    );
    check("kind: group\nid: sales", &["2:5: error: group `sales` is defined twice: first in p.yaml:3"]);
    check(
        "kind: group\nid: g\nallow: [\n",
        &["4:1: error: not valid YAML: while parsing a node, did not find expected node content"],
    );
}

#[test]
fn guardrails() {
    let guardrail = |rest: &str| format!("kind: guardrail\nid: g\n{rest}");
    check(&guardrail("tools: [crm/*]\nforbid_when: 'context.time.hour_utc < 7'"), &[]);
    check(&guardrail("tools: ['*']\nforbid_when: context.env has unsafe"), &[]);
    check(&guardrail("tools: [crm/*]"), &["1:1: error: `forbid_when` is missing"]);
    check(&guardrail("forbid_when: 'true'"), &["1:1: error: `tools` is missing"]);
    check(
        &guardrail("tools: []\nforbid_when: 'true'"),
        &["3:8: error: `tools` must name what the guardrail guards, `*` for every tool"],
    );
    check(
        &guardrail("tools: [crn/*]\nforbid_when: 'true'"),
        &["3:9: error: pattern `crn/*` matches no registered tool (a guardrail that guards nothing is a hole)"],
    );
    check(
        &guardrail("tools: [crm/raed]\nforbid_when: 'true'"),
        &["3:9: error: unknown tool `crm/raed` (did you mean `crm/read`?)"],
    );
    check(
        &guardrail("tools: [crm]\nforbid_when: 'true'"),
        &["3:9: error: tool pattern `crm` has no slash, so it matches no tool: write `server/tool`, or `*` alone for every tool"],
    );
    check(
        &guardrail("tools: [crm/*]\nforbid_when: 7"),
        &["4:14: error: `forbid_when`: a condition needs a truth value, found a whole number"],
    );
    check(&guardrail("tools: [crm/*]\nforbid_when: 'true'\nallow: [crm/*]"), &["5:1: error: unknown key `allow`"]);
}

#[test]
fn tests() {
    let issuer = format!("kind: issuer\nid: https://i\nkeys: {{jwks: {{keys: [{}]}}}}\n---\n", jwk(KEY_X));
    let test = |rest: &str| format!("{issuer}kind: agent\nid: spiffe://t/a\n---\nkind: test\n{rest}");
    let whole = "user: {issuer: https://i, sub: u}\napplication: portal\n";
    check(&test(&format!("agent: spiffe://t/a\n{whole}expect: [{{tool: crm/read, want: DENY, reason: AGENT_DENIES}}]")), &[]);
    check(
        &test(&format!("{whole}expect: []")),
        &["8:1: error: a test needs either `agent` or `agents`, the chain from root to leaf"],
    );
    check(
        &test(&format!("agent: spiffe://t/b\n{whole}expect: []")),
        &["9:8: error: unknown agent `spiffe://t/b` (did you mean `spiffe://t/a`?)"],
    );
    check(
        &test(&format!("agent: spiffe://t/a\n{whole}expect: [{{tool: crm/raed, want: DENY}}]")),
        &["12:10: error: unknown tool `crm/raed` (did you mean `crm/read`?)"],
    );
    check(&test(&format!("agent: spiffe://t/a\n{whole}expect: [{{tool: no/such, want: DENY, reason: TOOL_UNKNOWN}}]")), &[]);
    check(
        &test(&format!("agent: spiffe://t/a\n{whole}expect: [{{tool: crm/read, want: ALLOW}}]")),
        &["12:33: error: `ALLOW` is no value of `want`: expected `PERMIT`, `NEEDS_APPROVAL`, `DENY`"],
    );
    check(
        &test(&format!("agent: spiffe://t/a\n{whole}at: noon\nexpect: []")),
        &["12:5: error: `noon` is not a time: write `2026-11-25T08:30:00Z`"],
    );
    check(
        &test("agent: spiffe://t/a\nuser: {issuer: https://j, sub: u}\napplication: portal\nexpect: []"),
        &["10:16: error: unknown issuer `https://j` (did you mean `https://i`?)"],
    );
}

#[test]
fn issuers() {
    let good = format!("{{jwks: {{keys: [{}]}}}}", jwk(KEY_X));
    check(&issuer(&good, "groups: [sales]\napplications: ['*']"), &[]);
    check("kind: issuer\nid: https://i", &["1:1: error: `keys` is missing"]);
    check(&issuer("{}", ""), &["3:7: error: `keys` must hold either `file` or `jwks`"]);
    check(&issuer("{jwks: {}}", ""), &["3:14: error: a JWK Set must be a mapping with `keys`, a list"]);
    check(&issuer("{jwks: {keys: []}}", ""), &["3:14: error: there must be 1 to 8 keys, found 0"]);
    check(
        &issuer("{jwks: {keys: [{kty: RSA}]}}", ""),
        &["3:22: error: the JWK is not an Ed25519 key: `kty` must be `OKP` and `crv` `Ed25519`"],
    );
    check(
        &issuer(&format!("{{jwks: {{keys: [{{kty: OKP, crv: Ed25519, x: {KEY_X}, d: {KEY_X}}}]}}}}"), ""),
        &["3:22: error: the JWK holds private key material"],
    );
    let twice = format!("{{jwks: {{keys: [{0}, {0}]}}}}", jwk(KEY_X));
    check(
        &issuer(&twice, ""),
        &[&format!(
            "3:14: error: a key stands twice: `{}`",
            r#"{"crv":"Ed25519","kty":"OKP","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}"#
        )],
    );
    check(
        &issuer("{file: ../k.json}", ""),
        &["3:14: error: `../k.json` must be relative to the document's file and stay inside the policy folder"],
    );
    check(&issuer("{file: k.json}", ""), &["3:14: error: there is no file `k.json` in the policy folder"]);
    check(&issuer(&good, "groups: [slaes]"), &["4:10: error: unknown group `slaes` (did you mean `sales`?)"]);
    check(&issuer(&good, "applications: [portals]"), &["4:16: error: unknown application `portals` (did you mean `portal`?)"]);
    check(
        &issuer(&good, "groups: [sales, '*']"),
        &["4:9: error: `*` in `groups` means all, so nothing else may stand beside it"],
    );
    check(&issuer(&good, "typ: [jwt]"), &["4:7: error: `jwt` is no value of `typ`: expected `aat+jwt`, `at+jwt`"]);
    check(&issuer(&good, "typ: []"), &["4:6: error: `typ` must name a type, or be left out for `aat+jwt`"]);
    check(
        &issuer(&good, "lifetime_max: 8"),
        &[
            "4:15: error: `lifetime_max`: `8` is not a duration: write a whole number and a unit, such as `30s`, `10m`, `8h` or `90d`",
        ],
    );
    check(&issuer(&good, "hop_lifetime_max: 1500ms"), &["4:19: error: `hop_lifetime_max` must be one or more whole seconds"]);
    let broken = SourceFile { path: "keys/k.json".to_owned(), content: b"{".to_vec() };
    let main = SourceFile { path: "i.yaml".to_owned(), content: issuer("{file: keys/k.json}", "").into_bytes() };
    assert_eq!(
        diagnostics(&[main, broken]),
        ["i.yaml:3:14: error: `keys/k.json` is not JSON: EOF while parsing an object at line 1 column 1",]
    );
}

#[test]
fn tools_and_servers() {
    check("kind: tool\nid: crm", &["2:5: error: id `crm` is not `server/tool`"]);
    check("kind: tool\nid: crm/*", &["2:5: error: id `crm/*` has a `*`, a space or a character outside visible ASCII"]);
    check("kind: tool\nid: crm/a b", &["2:5: error: id `crm/a b` has a `*`, a space or a character outside visible ASCII"]);
    check("kind: tool\nid: crm/read", &["2:5: error: tool `crm/read` is defined twice: first in p.yaml:1"]);
    check(
        "kind: server\nid: crn\ntools: {a: {risk: reed}}",
        &["3:19: error: `reed` is no value of `risk`: expected `read`, `write`, `destructive` (did you mean `read`?)"],
    );
    check(
        "kind: server\nid: a/b\ntools: {}",
        &["2:5: error: id `a/b` has a slash: the first slash of a tool's name ends the server's"],
    );
    check("kind: server\nid: s", &["1:1: error: `tools` is missing"]);
    check(
        "kind: server\nid: s\ntools: [a]",
        &["3:8: error: `tools` must be a mapping of tool names: `leads.read: {risk: read}`, found a list"],
    );
    check("kind: server\nid: s\ntools:\n  a:", &["4:4: error: tool `a` must be a mapping, found nothing"]);
    check("kind: tool\nid: a/b\nschema_sha256: 5b1c", &["3:16: error: `schema_sha256` must be 64 hexadecimal digits"]);
    check(
        "kind: tool\nid: a/b\nproof: always",
        &["3:8: error: `always` is no value of `proof`: expected `per_call`, `per_handle`, `none`"],
    );
}

#[test]
fn agents() {
    let agent = |more: &str| format!("kind: agent\nid: spiffe://t/a\n{more}");
    check("kind: agent\nid: sales", &["2:5: error: id `sales` does not begin with `spiffe://`"]);
    check(
        &agent("applications: [portla]\nacts_for: [sale]\ndelegates_to: [spiffe://t/b]"),
        &[
            "3:16: error: unknown application `portla` (did you mean `portal`?)",
            "4:12: error: unknown group `sale` (did you mean `sales`?)",
            "5:16: error: unknown agent `spiffe://t/b` (did you mean `spiffe://t/a`?)",
        ],
    );
    check(&agent("delegates_to: ['*']"), &["3:15: error: `delegates_to` must name each agent: there is no `*`"]);
    check(&agent("keys: [abc]"), &["3:8: error: `abc` is not a key thumbprint: 43 characters of base64url (RFC 7638)"]);
    check(
        &agent("keys: [kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4l]"),
        &[
            "3:8: error: `kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4l` is not a key thumbprint: 43 characters of base64url (RFC 7638)",
        ],
    );
    let keys = "keys:\n- kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k";
    check(
        &agent(&format!("{keys}\n---\nkind: agent\nid: spiffe://t/b\n{keys}")),
        &["9:3: error: key `kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k` is listed twice: first by `spiffe://t/a` in p.yaml:9"],
    );
    check(&agent("session: {hops_max: 9}"), &["3:21: error: `hops_max` must be a whole number from 0 to 8"]);
    check(&agent("session: {hops: 1}"), &["3:11: error: unknown key `hops`"]);
    check(
        &agent("session: {hops_max: 0}\ndelegates_to: [spiffe://t/a]"),
        &["4:16: warning: `delegates_to` has no effect: `hops_max` is 0"],
    );
    check(&agent("include: [raeds]"), &["3:11: error: unknown permission set `raeds` (did you mean `reads`?)"]);
    check(&agent("applications: portal"), &["3:15: error: `applications` must be a list of strings, found a string"]);
}

#[test]
fn entries() {
    let group = |more: &str| format!("kind: group\nid: g\n{more}");
    check(&group("allow: crm/*"), &["3:8: error: `allow` must be a list of entries, found a string"]);
    check(&group("allow: [crm/raed]"), &["3:9: error: unknown tool `crm/raed` (did you mean `crm/read`?)"]);
    check(
        &group("allow: [crm]"),
        &["3:9: error: tool pattern `crm` has no slash, so it matches no tool: write `server/tool`, or `*` alone for every tool"],
    );
    check(&group("allow: [crm/]"), &["3:9: error: tool pattern `crm/` lacks a server or a tool: write `server/tool`"]);
    check(&group("allow: [hr/*]"), &["3:9: warning: pattern `hr/*` matches no registered tool"]);
    check(
        &group("allow:\n- crm/*\ndeny:\n- hr/*"),
        &["6:3: error: pattern `hr/*` matches no registered tool (a deny that matches nothing is a hole)"],
    );
    check(
        &group("allow:\n- crm/read: {args: {}}\n  crm/write: {}"),
        &["4:3: error: an entry is a tool pattern, or one pattern with a mapping: `crm/*: {args: {…}}`"],
    );
    check(&group("allow: [crm/read: ]"), &["3:17: error: the entry `crm/read` must be a mapping, found nothing"]);
    check(&group("allow: [crm/read: {when: 'true'}]"), &[]);
    check(
        &group("allow: [crm/read: {when: 'context.tme.hour_utc > 7'}]"),
        &["3:26: error: `when`: `context` has no member `tme`: did you mean `time`?"],
    );
    check(
        &group("allow: [crm/read: {when: 'context.env.safe'}]"),
        &[
            "3:26: error: `context.env` is the gateway's word and this entry would permit by it (say `evidence: attested` if that is meant)",
        ],
    );
    check(&group("allow: [crm/read: {when: 'context.env.safe', evidence: attested}]"), &[]);
    check(&group("allow: [crm/*]\ndeny: [crm/read: {when: 'context.env.safe'}]"), &[]);
    check(
        &group("allow: [crm/*]\ndeny: [crm/read: {evidence: attested}]"),
        &["4:29: error: `evidence` means nothing in a deny: it may look at `context.env` as it is"],
    );
    check(
        &group("allow: [crm/read: {evidence: verified}]"),
        &["3:30: error: `verified` is no value of `evidence`: expected `attested`"],
    );
    check(&group("allow: [crm/write: {prepared: crm/read}]"), &[]);
    check(
        &group("allow: [crm/write: {prepared: crm/raed}]"),
        &["3:9: error: unknown tool `crm/raed` (did you mean `crm/read`?)"],
    );
    check(
        &group("allow: [crm/write: {prepared: crm/*}]"),
        &["3:31: error: `prepared`: `crm/*` must name one tool, not a pattern"],
    );
    check(
        &group("allow: [crm/*]\ndeny: [crm/read: {prepared: crm/write}]"),
        &["4:29: error: `prepared` means nothing in a deny"],
    );
    check(&group("allow: [crm/read: {arg: {a: 1}}]"), &["3:20: error: unknown key `arg` (did you mean `args`?)"]);
    check(&group("allow: [crm/read: {by: [x]}]"), &["3:20: error: unknown key `by`"]);
    check(&group("allow: [crm/read: {only: 'yes'}]"), &["3:26: error: `only` must be true or false, found a string"]);
    check(
        &group("deny: [crm/read: {only: true}]"),
        &["3:25: error: `only` means nothing in a deny: it fires whatever else is there"],
    );
    check(
        &group("approve: [crm/wipe]"),
        &["3:11: error: the entry `crm/wipe` has no `by`: say which groups of operators approve"],
    );
    check(
        &group("approve: [crm/wipe: {by: [], expires_in: 0s}]"),
        &[
            "3:11: error: `expires_in` must be longer than nothing",
            "3:11: error: the entry has no `by`: say which groups of operators approve",
        ],
    );
    check(
        &group("approve: [crm/wipe: {by: [leads]}]"),
        &["3:11: warning: nobody can approve `crm/wipe`: no operator is in group `leads`"],
    );
}

#[test]
fn arguments() {
    let allow = |args: &str| format!("kind: group\nid: g\nallow:\n- crm/read: {{args: {args}}}");
    check(&allow("[a]"), &["4:20: error: `args` must be a mapping of argument names, found a list"]);
    check(&allow("{'*': 1}"), &["4:21: error: an argument must be named; others pass unless the entry says `only: true`"]);
    check(&allow("{a: []}"), &["4:24: error: argument `a`: constraint `one_of` has no `values`"]);
    check(&allow("{a: {}}"), &["4:24: error: a range needs `min` or `max`"]);
    check(&allow("{a: {mx: 1}}"), &["4:25: error: unknown key `mx` (did you mean `max`?)"]);
    check(
        &allow("{a: {prefix: b}}"),
        &["4:25: error: unknown key `prefix` (write `min` and `max`, a value, a list, or a constraint with `constraint_type`)"],
    );
    check(
        &allow("{a: {max: '5'}}"),
        &["4:24: error: argument `a`: `max` of a range must be a number within ±(2^53-1), of no more digits than a double keeps"],
    );
    let uncomparable =
        "4:24: error: argument `a`: a number is beyond ±(2^53-1), or has more digits than a double keeps, and cannot be compared";
    check(&allow("{a: 9007199254740993}"), &[uncomparable]);
    check(&allow("{a: 15.0000000000000001}"), &[uncomparable]);
    check(&allow("{a: {constraint_type: regex}}"), &["4:24: error: argument `a`: unknown constraint_type `regex`"]);
    check(&allow("{a: {min: 5, max: 1}}"), &["4:3: warning: `crm/read` never counts: no value of argument `a` can satisfy it"]);
    check(
        "kind: group\nid: g\ndeny: [crm/read: {args: {a: {constraint_type: wildcard, optional: true}}}]",
        &["3:26: error: `optional` means nothing in a deny: leaving the argument out is no escape"],
    );
}

#[test]
fn entries_that_never_count() {
    let group = |more: &str| format!("kind: group\nid: g\n{more}");
    check(
        &group("allow: [crm/read]\ndeny: [crm/*]"),
        &["3:9: warning: `crm/read` never counts: `deny` of this document takes all it matches"],
    );
    check(&group("allow: [crm/*]\ndeny: [crm/read]"), &[]);
    check(&group("allow: [crm/read]\ndeny: [crm/read: {args: {a: 1}}]"), &[]);
    check(
        &group("allow:\n- crm/*\n- crm/read\n- crm/write: {args: {a: 1}}\n- crm/*"),
        &[
            "5:3: warning: `crm/read` adds nothing: `crm/*` covers it",
            "6:3: warning: `crm/write` adds nothing: `crm/*` covers it",
            "7:3: warning: `crm/*` adds nothing: `crm/*` covers it",
        ],
    );
    check(&group("deny: [crm/*, crm/wipe]"), &["3:15: warning: `crm/wipe` adds nothing: `crm/*` covers it"]);
}

#[test]
fn includes() {
    check("kind: permission_set\nid: a\ninclude: [a]", &["3:11: error: permission sets include each other: `a` includes `a`"]);
    let set = |id: &str, include: &str| format!("kind: permission_set\nid: {id}\ninclude: [{include}]");
    check(
        &[set("a", "reads, b"), set("b", "c"), set("c", "reads, a"), set("d", "a, b, c")].join("\n---\n"),
        &["11:18: error: permission sets include each other: `a` includes `b` includes `c` includes `a`"],
    );
    let diamond = [set("a", "b, c"), set("b", "d"), set("c", "d"), set("d", "reads")].join("\n---\n");
    check(&diamond, &[]);
}

#[test]
fn operators() {
    let operator = |more: &str| format!("kind: operator\nid: ada\nkeys: [{}]\n{more}", jwk(KEY_X));
    check("kind: operator\nid: ada", &["1:1: error: `keys` is missing", "1:1: error: `roles` is missing"]);
    check(
        &operator("roles: [admin]"),
        &["4:9: error: `admin` is no value of `roles`: expected `respond`, `administer`, `approve`, `audit`"],
    );
    check(&operator("roles: [audit]\nusers: [{issuer: https://i}]"), &["5:9: error: `sub` is missing"]);
    check(&operator("roles: [approve]\nusers: [{issuer: https://i, sub: a}]"), &["5:9: error: unknown issuer `https://i`"]);
    check(
        &operator("roles: [approve]"),
        &["2:5: warning: an operator who approves has no `users`: their own calls cannot be told from others'"],
    );
    check(
        &format!("{}\n---\n{}", operator("roles: []"), operator("roles: []").replace("ada", "bob")),
        &["8:8: error: key `kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k` is listed twice: first by `ada` in p.yaml:9"],
    );
    let shared = |kind: &str| {
        format!(
            "3:8: error: key `kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k` is also one of {kind} in p.yaml:14 \
             (make a key for the operator alone: `portcullis token keygen`)"
        )
    };
    let agent = "kind: agent\nid: spiffe://t/b\nkeys: [kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k]";
    check(&format!("{}\n---\n{agent}", operator("roles: []")), &[&shared("agent `spiffe://t/b`")]);
    let issuer = issuer(&format!("{{jwks: {{keys: [{}]}}}}", jwk(KEY_X)), "");
    check(&format!("{}\n---\n{issuer}", operator("roles: []")), &[&shared("issuer `https://i`")]);
    check(
        &operator("roles: []").replace(KEY_X, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"),
        &["3:8: error: `x` of the key is a point of small order"],
    );
}

#[test]
fn everything_wrong_is_said_at_once_and_in_order() {
    let second = SourceFile { path: "a.yaml".to_owned(), content: b"kind: nope\nid: x\n---\n{kind: group}".to_vec() };
    let mut files = file("kind: group\nid: g\nallow: [x y]\nb: 1\nc: 2");
    files.push(second);
    assert_eq!(
        diagnostics(&files),
        [
            "a.yaml:1:7: error: unknown kind `nope`",
            "a.yaml:4:1: error: `id` is missing",
            "p.yaml:3:9: error: tool pattern `x y` has a space or a character outside visible ASCII",
            "p.yaml:4:1: error: unknown key `b`",
            "p.yaml:5:1: error: unknown key `c`",
        ]
    );
}

#[test]
fn a_tool_that_stands_in_two_servers_is_found_where_it_stands() {
    check(
        "kind: tool\nid: s/b\n---\nkind: server\nid: s\ntools:\n  c: {}\n  b: {}",
        &["8:3: error: tool `s/b` is defined twice: first in p.yaml:9"],
    );
}
