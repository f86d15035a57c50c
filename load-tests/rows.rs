//! A fleet of any size as the rows of a store: agents that share a few thousand permission sets, tens of thousands of tools, and
//! revoked sessions.
//!
//! The bench `scale` builds it in its own process. The load test of cold starts puts it into a store.

use portcullis::model::rows::{DocumentKey, DocumentOrigin, DocumentRow, RevocationRow, RevocationTarget};

/// Tools, in servers of one hundred each.
pub(crate) const SERVERS: usize = 100;
pub(crate) const TOOLS_A_SERVER: usize = 100;
/// Different permission sets that the agents share.
pub(crate) const SETS: usize = 3_000;
const GROUPS: usize = 200;
const APPLICATIONS: usize = 50;

pub(crate) fn base() -> Vec<DocumentRow> {
    let key = r#"{"crv":"Ed25519","kty":"OKP","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}"#;
    let mut rows = vec![document(
        "issuer",
        "https://issuer.example",
        &format!(r#""applications":["*"],"groups":["*"],"keys":{{"jwks":{{"keys":[{key}]}}}}"#),
    )];
    for server in 0..SERVERS {
        let tools: Vec<String> = (0..TOOLS_A_SERVER).map(|tool| format!(r#""t{tool}.read":{{"risk":"read"}}"#)).collect();
        rows.push(document("server", &format!("s{server}"), &format!(r#""tools":{{{}}}"#, tools.join(","))));
    }
    rows.extend((0..GROUPS).map(|number| document("group", &group(number), r#""allow":["*"]"#)));
    rows.extend((0..APPLICATIONS).map(|number| document("application", &application(number), r#""allow":["*"]"#)));
    rows
}

/// An agent with one of a few thousand permission sets, one of a few hundred settings, and a key of its own.
pub(crate) fn agent(number: usize, version: usize) -> DocumentRow {
    let (server, set) = (number % SERVERS, number % SETS);
    let own = if version == 0 { String::new() } else { format!(r#",{{"s{server}/t1.read":{{"args":{{"n":{version}}}}}}}"#) };
    let body = format!(
        r#""acts_for":["{}"],"allow":["s{server}/*.read",{{"s{}/*":{{"args":{{"limit":{set}}}}}}}{own}],"applications":["{}"],"deny":["s{}/t9.read"],"keys":["{}"]"#,
        group(number),
        (server + 1) % SERVERS,
        application(number),
        (server + 2) % SERVERS,
        thumbprint(number),
    );
    document("agent", &agent_id(number), &body)
}

pub(crate) fn revocation(number: usize) -> RevocationRow {
    RevocationRow {
        target: RevocationTarget::Session(format!("dead-{number}")),
        dead: true,
        suspended: false,
        watermark_unix_s: None,
        expires_at_unix_s: None,
        reason: String::new(),
        revision: 1,
    }
}

pub(crate) fn document(kind: &str, id: &str, body: &str) -> DocumentRow {
    let json = format!(r#"{{"id":"{id}","kind":"{kind}",{body}}}"#);
    let key = DocumentKey { kind: kind.to_owned(), id: id.to_owned() };
    DocumentRow { key, json, path: "fleet.yaml".to_owned(), line: 1, origin: DocumentOrigin::Folder }
}

pub(crate) fn agent_id(number: usize) -> String {
    format!("spiffe://fleet.example/agent/{number}")
}

pub(crate) fn group(number: usize) -> String {
    format!("group-{}", number % GROUPS)
}

pub(crate) fn application(number: usize) -> String {
    format!("app-{}", number % APPLICATIONS)
}

/// 43 characters of base64url, different for each agent.
pub(crate) fn thumbprint(number: usize) -> String {
    format!("{number:A>42}A")
}
