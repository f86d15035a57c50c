//! The project's own vectors, `tests/vectors/*.json`: generated here with fixed keys and times, and decided by the library.
//!
//! `UPDATE=1 cargo test token_vectors` writes the files again. Without it the test fails when a file and this code differ.

mod builder;
mod permit;
mod refuse;

use std::collections::HashSet;
use std::path::Path;

use bytes::Bytes;
use portcullis::model::json::{self, JsonObject};
use portcullis::model::jwk::NamedKey;
use portcullis::model::time::ClockReading;
use portcullis::token::trust::{AllowList, TrustTable, TrustedIssuer};
use portcullis::token::{ProofCall, RegistryMode, VerificationOptions, verify, verify_proof};
use serde_json::{Value, json};

/// Selects the vectors of a file.
type VectorFilter = fn(&Value) -> bool;

/// The files, each with the selection of its vectors.
const FILES: [(&str, VectorFilter); 3] = [
    ("tests/vectors/permit.json", |vector| vector["expected"]["verdict"] == "PERMIT"),
    ("tests/vectors/refuse-proof.json", |vector| is_refused(vector) && is_of_proof(vector)),
    ("tests/vectors/refuse-chain.json", |vector| is_refused(vector) && !is_of_proof(vector)),
];

/// Every item of the design's list "Refuse, one test each", in its order, with its further conditions. Each item must have a
/// vector.
const REFUSE_ONE_TEST_EACH: &[&str] = &[
    "`none` in any case",
    "HS256 keyed with a public key",
    "`alg` not the key's",
    "key material or URLs in the header",
    "foreign or injected `kid`",
    "unknown `crit`",
    "JSON serialization",
    "JWE",
    "duplicate members",
    "non-UTF-8",
    "padded base64",
    "wrong or missing `typ`",
    "proof presented as token",
    "token presented as proof",
    "missing `aud`",
    "foreign `aud`",
    "array `aud`",
    "private members in `cnf`",
    "`iat` ahead",
    "`exp` at or before `iat`",
    "fractional dates",
    "spliced parent held by the same key",
    "truncated chain",
    "reordered chain",
    "repeated chain",
    "depth jump",
    "raised `del_max_depth`",
    "child outliving parent",
    "added tool",
    "dropped constraint",
    "added `*`",
    "required made optional",
    "cross-type pairs",
    "parent token replayed by the child's holder",
    "hop asserting user, application or session",
    "proof replayed",
    "proof for another tool",
    "proof for other arguments",
    "proof for another leaf",
    "stale proof",
    "oversized",
    "too deep",
    "too nested",
    "`nbf` ahead",
    "control character in an id",
];

#[test]
fn the_files_are_what_the_generator_makes() {
    let whole = suite();
    let mut written = 0;
    for (file, holds) in FILES {
        let mut part = whole.clone();
        part["vectors"].as_array_mut().unwrap().retain(holds);
        written += part["vectors"].as_array().unwrap().len();
        // Another crate may enable maps that keep the order of insertion.
        part.sort_all_objects();
        let fresh = serde_json::to_string_pretty(&part).unwrap() + "\n";
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&path, &fresh).unwrap();
        }
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(committed == fresh, "{file} differs from what is generated: run `UPDATE=1 cargo test token_vectors`");
    }
    assert_eq!(written, whole["vectors"].as_array().unwrap().len(), "each vector stands in one file");
}

#[test]
fn every_item_has_a_vector_and_as_many_pass() {
    let suite = suite();
    let vectors = suite["vectors"].as_array().unwrap();
    let items: HashSet<&str> = vectors.iter().filter_map(|vector| vector["refuses"].as_str()).collect();
    let missing: Vec<_> = REFUSE_ONE_TEST_EACH.iter().filter(|item| !items.contains(*item)).collect();
    assert!(missing.is_empty(), "no vector for {missing:?}");
    let unknown: Vec<_> = items.iter().filter(|item| !REFUSE_ONE_TEST_EACH.contains(item)).collect();
    assert!(unknown.is_empty(), "not on the list: {unknown:?}");
    let ids: HashSet<&str> = vectors.iter().map(|vector| vector["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), vectors.len(), "ids are unique");
    let permits = vectors.iter().filter(|vector| vector["expected"]["verdict"] == "PERMIT").count();
    assert!(permits >= REFUSE_ONE_TEST_EACH.len(), "only {permits} vectors pass");
}

#[test]
fn every_vector_is_decided_as_it_says() {
    let suite = suite();
    let trust = trust(&suite["params"]["trust"]);
    let wrong: Vec<String> = suite["vectors"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|vector| {
            let (decided, message) = decide(vector, &suite["params"], &trust);
            (decided != vector["expected"]).then(|| format!("{}: {decided} {message}, not {}", vector["id"], vector["expected"]))
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn suite() -> Value {
    let vectors: Vec<Value> = refuse::vectors().into_iter().chain(permit::vectors()).map(|vector| vector.to_json()).collect();
    json!({
        "about": "delegation chains with identities; see README.md beside this file",
        "params": builder::params(),
        "vectors": vectors,
    })
}

fn is_refused(vector: &Value) -> bool {
    vector["expected"]["verdict"] != "PERMIT"
}

/// A fault of the proof has a reason of its own.
fn is_of_proof(vector: &Value) -> bool {
    vector["expected"]["reason"].as_str().unwrap().starts_with("PROOF_")
}

fn decide(vector: &Value, params: &Value, trust: &TrustTable) -> (Value, String) {
    let strings = |value: &Value| -> Vec<Bytes> {
        value.as_array().unwrap().iter().map(|text| Bytes::from(text.as_str().unwrap().to_owned())).collect()
    };
    let given = &vector["options"];
    let options = VerificationOptions {
        registry: if given["registry"] == "off" { RegistryMode::Off } else { RegistryMode::Required },
        require_chain_audience: given["require_chain_audience"] != false,
        require_proof_audience: given["require_proof_audience"] != false,
        nonce: given["nonce"].as_str().map(str::to_owned),
        ..VerificationOptions::default()
    };
    let now = ClockReading { unix_ns: params["now"].as_i64().unwrap() * 1_000_000_000, boot_ns: 0 };
    let (tool, audience) = (vector["tool"].as_str().unwrap(), vector["audience"].as_str());
    let arguments: JsonObject = json::parse_object(vector["arguments"].to_string().as_bytes()).unwrap();
    let expected = ProofCall { tool, arguments: &arguments, audience };
    let decided = verify(&strings(&vector["chain"]), trust, &options, now).and_then(|chain| {
        chain.check_audience(audience, &options)?;
        let proof = vector["proof"].as_str().unwrap_or_default();
        let verified = verify_proof(&chain, proof.as_bytes(), &expected, &options, now)?;
        chain.check_call(tool, &arguments)?;
        let used = strings(&vector["proofs_used"]);
        let replayed = used.iter().any(|used| {
            let used = verify_proof(&chain, used, &expected, &options, now).unwrap();
            used.replay_key() == verified.replay_key()
        });
        Ok(replayed)
    });
    match decided {
        Ok(false) => (json!({"verdict": "PERMIT", "reason": "OK", "hop": null}), String::new()),
        Ok(true) => (json!({"verdict": "DENY", "reason": "PROOF_REPLAYED", "hop": null}), String::new()),
        Err(refused) => {
            (json!({"verdict": "DENY", "reason": refused.reason.as_str(), "hop": refused.hop}), refused.message.clone())
        }
    }
}

fn trust(documents: &Value) -> TrustTable {
    fn texts<'a>(value: &'a Value) -> impl Iterator<Item = &'a str> + 'a {
        value.as_array().unwrap().iter().map(|text| text.as_str().unwrap())
    }
    fn listed<T: Ord + for<'a> From<&'a str>>(value: &Value) -> AllowList<T> {
        if texts(value).any(|text| text == "*") { AllowList::All } else { AllowList::Only(texts(value).map(T::from).collect()) }
    }
    let mut trust = TrustTable::new();
    for issuer in documents["issuers"].as_array().unwrap() {
        let key = |jwk: &Value| NamedKey::from_jwk(&json::parse_object(jwk.to_string().as_bytes()).unwrap()).unwrap();
        trust
            .put_issuer(TrustedIssuer {
                id: issuer["id"].as_str().unwrap().into(),
                keys: issuer["keys"].as_array().unwrap().iter().map(key).collect(),
                audiences: texts(&issuer["audiences"]).map(str::to_owned).collect(),
                groups: listed(&issuer["groups"]),
                applications: listed(&issuer["applications"]),
                typ: texts(&issuer["typ"]).map(str::to_owned).collect(),
                lifetime_max_s: issuer["lifetime_max_s"].as_i64().unwrap(),
                hop_lifetime_max_s: issuer["hop_lifetime_max_s"].as_i64().unwrap(),
            })
            .unwrap();
    }
    for agent in documents["agents"].as_array().unwrap() {
        trust.put_agent(agent["id"].as_str().unwrap().into(), texts(&agent["keys"]).map(Into::into)).unwrap();
    }
    trust.set_groups(texts(&documents["groups"]).map(Into::into));
    trust
}
